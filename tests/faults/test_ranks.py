"""Ranks that are killed, stopped or stuck, or that differ: the job ends in time, says which, and goes on."""

import re
import shutil
import socket
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import train
from hrm.checkpoint.read import load_checkpoint
from tests.support.paths import ROOT
from tests.support.runs import assert_same_run, words
from tests.support.torchrun import PROGRAM, Ended, torchrun

# 24 steps, with a checkpoint every 6.
RUN = ["max_steps=24", "eval_interval=1", "epochs=4", "log_interval=1", "rank_timeout=6"]
REMEDY = "the same command continues from the last checkpoint"
HERE = socket.gethostname()
# A stopped process outlives a SIGTERM. Recent versions of torchrun need not wait 30 seconds to kill it.
KILL_SOON = ["--shutdown-timeout=5"] if "--shutdown-timeout" in get_args_parser().format_help() else []


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def undisturbed(tiny_sudoku, out) -> Path:
    """The folder of a run by two ranks to which nothing happened."""
    [ended] = torchrun(2, "train.py", *words(tiny_sudoku, out, *RUN, "run_name=undisturbed"))
    assert ended.status == 0, ended.text
    return out / tiny_sudoku.name / "undisturbed"


def sums(fault: str, once: Path, ranks: int, nodes: int = 1, *words: str) -> list[Ended]:
    """Sums for 50 steps with a fault, which must end the job within a minute."""
    ended = torchrun(ranks // nodes, str(PROGRAM), "sums", fault, str(once), *words, nodes=nodes)
    [struck] = once.parent.glob(f"{once.name}*")
    assert all(node.status != 0 for node in ended) and time.time() - struck.stat().st_mtime < 60, ended
    return ended


@pytest.mark.parametrize(
    ("faults", "options"),
    [
        pytest.param(
            {
                "1:10:KILL": "rank 1 .*: connection closed, the process has ended",
                "0:16:mistake": "rank 0 .* failed: the disk is full",
            },
            (),
            id="static",
        ),
        # torchrun ends a stopped process on another node, too; its nodes learn of an end before the ranks do.
        pytest.param(
            {"0:10:STOP": "rank_timeout=6: no response from rank 0 "},
            ("--rdzv-backend=c10d", *KILL_SOON),
            id="c10d",
        ),
    ],
)
def test_the_run_continues_without_a_difference(
    tiny_sudoku, out, undisturbed, tmp_path, request, faults, options
):
    """Two nodes: each fault is named, and torchrun restarts the run from the last checkpoint, bit for bit.

    The rendezvous store of the first attempt is used again.
    """
    name = request.node.callspec.id
    argv = words(tiny_sudoku, out, *RUN, f"run_name={name}")
    program = [str(PROGRAM), "train", ",".join(faults), str(tmp_path / "once"), *argv]
    ended = torchrun(1, *program, nodes=2, options=("--max-restarts=3", *options))
    assert [node.status for node in ended] == [0, 0], ended
    assert sum(node.text.count("\nresuming ") for node in ended) == len(faults)
    told = [line for node in ended for line in node.lines("error: ")]
    for reason in filter(None, faults.values()):
        assert any(re.search(f"{reason}.*; {REMEDY}", line) for line in told), told
    assert_same_run(undisturbed, out / tiny_sudoku.name / name)


def test_a_stopped_run_saves_on_all_ranks_and_continues(tiny_sudoku, out, undisturbed, tmp_path):
    """By a signal to one rank, then to torchrun, which sends it to each: the same step on all ranks."""
    argv = words(tiny_sudoku, out, *RUN, "run_name=asked")
    faults = "1:8:TERM,0:15:agent"
    program = [str(PROGRAM), "train", faults, str(tmp_path / "once"), *argv]
    for status, step in ((0, range(9, 12)), (1, range(16, 19)), (0, [24])):
        # For torchrun a status other than 0 would be a failure that starts the ranks again.
        [ended] = torchrun(2, *program, options=("--max-restarts=1",))
        assert ended.status == status and not ended.lines("error: "), ended.text
        assert load_checkpoint(out / tiny_sudoku.name / "asked").step in step
    assert_same_run(undisturbed, out / tiny_sudoku.name / "asked")


def test_a_killed_rank_ends_the_job(tmp_path):
    [ended] = sums("1:30:KILL", tmp_path / "once", 2)
    assert "rank      : 1" in ended.text and "SIGKILL" in ended.text


def test_a_stuck_rank_is_reported_on_every_node(tmp_path):
    """Of four ranks on two nodes; torchrun ends the one that sleeps after its neighbour has spoken."""
    for node in sums("2:30:sleep", tmp_path / "once", 4, 2):
        [line] = node.lines("error: ")
        name = rf"rank 2 \(host {re.escape(HERE)}, pid \d+\)"
        assert re.fullmatch(f"error: rank_timeout=4: no response from {name}; {REMEDY}", line)


def test_a_rank_stuck_before_a_barrier_is_reported(tmp_path):
    [ended] = sums("1:30:sleep", tmp_path / "once", 2, 1, "barrier")
    assert "Rank 1 failed to pass monitoredBarrier in 3600 ms" in ended.text
    [line] = ended.lines("error: ")
    assert line.startswith("error: rank_timeout=4: no response from rank 1 (host ")


def test_a_mistake_of_one_rank_is_reported_by_it(tmp_path):
    [ended] = sums("1:30:mistake", tmp_path / "once", 2)
    assert ended.lines("error: ") == ["error: rank 1: the disk is full"]


def test_a_bug_on_one_rank_keeps_its_traceback_and_is_reported_on_the_other_node(tmp_path):
    first, second = sums("1:30:bug", tmp_path / "once", 2, 2)
    [line] = first.lines("error: ")
    assert line.startswith("error: rank 1 (host ") and line.endswith(
        f" failed: ZeroDivisionError: a bug; {REMEDY}"
    )
    assert second.lines("[rank1]: ZeroDivisionError: a bug")
    assert not second.lines("error: ")


def test_ranks_with_other_code_or_configuration_are_refused(tiny_sudoku, out, tmp_path):
    """Rank 2 has a copy of the sources with one comment more."""
    for package in ("hrm", "kernels"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(train.__file__, tmp_path)
    with (tmp_path / "hrm/model/act.py").open("a") as copied:
        copied.write("# another version\n")
    argv = words(tiny_sudoku, out, *RUN, "run_name=differ", "global_batch_size=6")
    argv = [word for word in argv if not word.startswith(("lr=", "arch.H_cycles="))]
    argv += ["0:lr=0.1", "1:lr=0.1", "2:lr=0.5", "1:arch.H_cycles=3"]
    program = [str(PROGRAM), "train", "none", "-", *argv]
    [ended] = torchrun(3, *program, environment={"SOURCES": f"2:{tmp_path}"}, fork=False)
    assert ended.status != 0 and "hrm/distributed.py" not in ended.text
    [line] = ended.lines("error: ")
    assert "the ranks differ in arch.H_cycles (rank 1 has 3, the others have 2), lr (rank 2 has 0.5, " in line
    assert re.search(
        r"others have 0\.1\), hrm/model/act\.py \(rank 2 has \w{12}, the others have \w{12}\): start", line
    )
    assert "same code, configuration, data" in line
    assert not (out / tiny_sudoku.name / "differ").exists()
