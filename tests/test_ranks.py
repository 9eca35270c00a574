"""Ranks that torchrun starts: they train what one rank trains, and end well when one of them does not."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import train
from hrm.checkpoint import load_checkpoint
from tests.test_train import assert_same_run, metrics_of, words

ROOT = Path(train.__file__).parent
PROGRAM = Path(__file__).with_name("rank_program.py")
RUN = ["max_steps=50", "epochs=20", "log_interval=1"]


class Ended(NamedTuple):
    """One node's torchrun: its exit status and all that its ranks and it wrote."""

    status: int
    text: str

    def lines(self, start: str) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith(start)]


def torchrun(ranks: int, *program: str, nodes: int = 1, options: tuple[str, ...] = ()) -> list[Ended]:
    """Runs a program by one torchrun for each node, `ranks` on each, until all have ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = [f"--rdzv-endpoint=127.0.0.1:{port}"]
    if "--rdzv-backend=c10d" not in options:
        meeting = ["--master-addr=127.0.0.1", f"--master-port={port}"]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", *meeting, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    agents = [
        subprocess.Popen(
            [*command, f"--nnodes={nodes}", f"--node-rank={node}", *program],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(nodes)
    ]
    try:
        deadline = time.monotonic() + 120
        texts = [agent.communicate(timeout=deadline - time.monotonic())[0] for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()
    return [Ended(agent.returncode, text) for agent, text in zip(agents, texts, strict=True)]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture
def trained(tiny_sudoku, out):
    """Trains RUN, once for each number of ranks, and returns the run's folder."""

    def run(ranks: int, *more: str) -> Path:
        name = f"{'variant' if more else 'run'}-of-{ranks}"
        folder = out / tiny_sudoku.name / name
        argv = words(tiny_sudoku, out, *RUN, f"run_name={name}", *more)
        if not folder.exists():
            if ranks == 1:
                assert train.main(argv) == 0
            else:
                ended = torchrun(ranks, "train.py", *argv)[0]
                assert ended.status == 0, ended.text
        return folder

    return run


@pytest.fixture
def faulty(tiny_sudoku, out, tmp_path, request):
    """Trains RUN, or sums for 50 steps, with a fault in one rank; see rank_program."""
    name = f"run_name={request.node.callspec.id if hasattr(request.node, 'callspec') else request.node.name}"

    def run(fault: str, ranks: int, *more: str, nodes: int = 1, options: tuple[str, ...] = ()) -> list[Ended]:
        argv = words(tiny_sudoku, out, *RUN, name, *more)
        own = {word.partition(":")[2].split("=")[0] for word in more if word[0].isdigit()}
        argv = [word for word in argv if word.split("=")[0] not in own]
        program = [str(PROGRAM), "train", fault, str(tmp_path / "once"), "6", *argv]
        return torchrun(ranks, *program, nodes=nodes, options=options)

    def sums(fault: str, ranks: int, nodes: int = 1) -> list[Ended]:
        return torchrun(ranks, str(PROGRAM), "sums", fault, str(tmp_path / "once"), "6", nodes=nodes)

    run.sums = sums
    run.folder = out / tiny_sudoku.name / name.split("=")[1]
    return run


# Feudal and gated, with every loss, average and limit that a variant can have.
VARIANT = (
    "arch=feudal",
    "arch.use_gating=true",
    "loss.gate_saturation_weight=0.1",
    "loss.gate_stability_weight=0.1",
    "loss.gate_loss_warmup_steps=10",
    "loss.gate_loss_ramp_steps=20",
    "ema=true",
    "grad_clip=1",
)


@pytest.mark.parametrize(("ranks", "more"), [(2, ()), (4, ()), (2, VARIANT)], ids=["2", "4", "2-variant"])
def test_ranks_train_what_one_rank_trains(tiny_sudoku, out, trained, ranks, more):
    """Over 50 steps, to 1e-6: gradients are summed in another order, the batches are the same."""
    runs = [trained(1, *more), trained(ranks, *more)]
    for mine, theirs in zip(*map(metrics_of, runs), strict=True):
        losses = {name for name in mine if name.endswith("loss")}
        # Statistics of the gates are a sample: of the main rank's first sequences.
        gates = {name for name in mine if name.startswith("train/gates/")}
        assert gates == {name for name in theirs if name.startswith("train/gates/")}
        for name in gates:
            assert theirs[name] == pytest.approx(mine[name], abs=0.02), name
        mine, theirs = ({n: run[n] for n in run if n not in gates} for run in (mine, theirs))
        rounded = losses | {name for name in mine if name.startswith("train/grad_")}
        rounded |= {name for name in mine if name.startswith(("train/goal_", "train/puzzle_emb_"))}
        rounded |= {name for name in mine if "/goal_" in name}
        for name in rounded - losses:
            assert theirs[name] == pytest.approx(mine[name], rel=1e-4, abs=1e-6), name
        assert {n: theirs[n] for n in theirs if n not in rounded} == {
            n: mine[n] for n in mine if n not in rounded
        }
        # Absolutely where a loss is all but 0.
        assert {n: theirs[n] for n in losses} == pytest.approx(
            {n: mine[n] for n in losses}, rel=1e-6, abs=1e-7
        )
    one, many = map(load_checkpoint, runs)
    assert one.step == many.step == 50 and one.weights.keys() == many.weights.keys()
    for name, tensor in one.weights.items():
        torch.testing.assert_close(many.weights[name], tensor, rtol=1e-6, atol=1e-6)
    assert one.extra.keys() == many.extra.keys() == ({"ema.safetensors"} if more else set())
    for name, tensor in one.extra.get("ema.safetensors", {}).items():
        torch.testing.assert_close(many.extra["ema.safetensors"][name], tensor, rtol=1e-6, atol=1e-6)
    for name in ("inputs", "labels", "puzzle_identifiers", "steps", "halted"):
        assert torch.equal(many.training["carry"][name], one.training["carry"][name])


def test_one_rank_goes_on_where_two_left_off(tiny_sudoku, out, trained):
    for ranks in (1, 2):
        argv = words(tiny_sudoku, out, *RUN[1:], "max_steps=60", f"run_name=after-{ranks}")
        assert train.main([*argv, f"resume={trained(ranks)}"]) == 0
    one, two = (out / tiny_sudoku.name / f"after-{ranks}" for ranks in (1, 2))
    assert load_checkpoint(one).step == load_checkpoint(two).step == 60
    for name, tensor in load_checkpoint(one).weights.items():
        torch.testing.assert_close(load_checkpoint(two).weights[name], tensor, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("nodes", "options"),
    [
        pytest.param(1, (), id="static"),
        pytest.param(2, (), id="static-nodes"),
        pytest.param(2, ("--rdzv-backend=c10d",), id="c10d-nodes"),
    ],
)
def test_a_killed_rank_is_restarted_and_the_result_is_the_same(trained, faulty, nodes, options):
    """Bit for bit, from the last checkpoint, on the rendezvous store of the first attempt."""
    ended = faulty("1:30:KILL", 2 // nodes, nodes=nodes, options=("--max-restarts=3", *options))
    assert [node.status for node in ended] == [0] * nodes, ended
    assert sum("at step 24" in node.text for node in ended) == 1
    assert_same_run(trained(2), faulty.folder)


def test_a_killed_rank_ends_the_job(faulty):
    begun = time.monotonic()
    [ended] = faulty("1:30:KILL", 2)
    assert ended.status != 0 and time.monotonic() - begun < 60
    assert "rank      : 1" in ended.text and "SIGKILL" in ended.text
    assert "hrm/" not in ended.text


def test_a_rank_killed_on_another_node_is_named(faulty):
    begun = time.monotonic()
    first, second = faulty.sums("1:30:KILL", 1, nodes=2)
    assert first.status != 0 and second.status != 0 and time.monotonic() - begun < 60
    [line] = first.lines("error: ")
    assert line.startswith(f"error: rank 1 (host {socket.gethostname()}, pid ")
    assert "connection closed and no sign of life" in line
    assert "hrm/" not in first.text


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_stopped_rank_is_named(faulty, nodes):
    """Ended as well: a stopped process would keep its torchrun waiting. Rank 0 is the one that is stopped."""
    begun = time.monotonic()
    ended = faulty("0:30:STOP", 2 // nodes, nodes=nodes)
    assert all(node.status != 0 for node in ended) and time.monotonic() - begun < 60
    [line] = ended[-1].lines("error: ")
    assert line.startswith(f"error: rank 0 (host {socket.gethostname()}, pid ")
    assert "has not been heard of for 6 s" in line and "goes on from the last checkpoint" in line
    assert "Traceback" not in ended[-1].text.partition("torch/distributed")[0]


def test_a_mistake_of_one_rank_is_told_by_it(faulty):
    [ended] = faulty.sums("1:30:mistake", 2)
    assert ended.status != 0
    assert ended.lines("error: ") == ["error: rank 1: the disk is full"]


def test_a_bug_of_one_rank_keeps_its_traceback_and_is_named_on_the_other_node(faulty):
    first, second = faulty.sums("1:30:bug", 1, nodes=2)
    assert first.status != 0 and second.status != 0
    [line] = first.lines("error: ")
    assert line.startswith("error: rank 1 (host ") and line.endswith(" failed: ZeroDivisionError: a bug")
    assert second.lines("[rank1]: ZeroDivisionError: a bug")
    assert not second.lines("error: ")


def test_ranks_that_were_told_different_things_are_refused(faulty):
    [ended] = faulty(
        "none", 3, "global_batch_size=6", "0:lr=0.1", "1:lr=0.1", "2:lr=0.5", "1:arch.H_cycles=3"
    )
    assert ended.status != 0
    [line] = ended.lines("error: ")
    assert "the ranks differ in arch.H_cycles (rank 1 has 3, the others have 2), lr (rank 2 has 0.5, " in line
    assert "the others have 0.1): start" in line
    assert "same code, configuration, data" in line


def test_ranks_with_different_data_are_refused(faulty, tiny_sudoku, tmp_path, monkeypatch):
    from hrm.data.sudoku import builtin_sudoku

    monkeypatch.setenv("HRM_CACHE", str(tmp_path))
    other = builtin_sudoku(4, 48, 20, 0, 1)
    [ended] = faulty("none", 2, f"0:data_path={tiny_sudoku}", f"1:data_path={other}", "project_name=p")
    assert ended.status != 0
    [line] = ended.lines("error: ")
    assert "the ranks differ in training data (rank 0 has " in line


def test_collectives(tmp_path):
    [ended] = torchrun(3, str(PROGRAM), "collectives", str(tmp_path))
    # An error that every rank meets is told once.
    assert ended.status != 0 and ended.lines("error: ") == ["error: every rank meets this"]
    for rank in range(3):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert got["world"] == (rank, 3) and got["device"] == torch.device("cpu")
        assert got["rows"] == slice(2 * rank, 2 * rank + 2)
        assert got["reduced"].tolist() == [3, 3]
        assert got["gathered"].tolist() == [[0, 7], [1, 7], [2, 7]]
        assert got["bools"].tolist() == [False, True, True, True, False, True]
        assert got["bools"].dtype == torch.bool
        assert got["float64"].tolist() == [[1, 1]] * 3 and got["bfloat16"].tolist() == [1] * 4
        assert got["bool"].tolist() == [True, False] and got["parameter"].tolist() == [1]
        assert got["differ"].startswith(
            "the ranks differ in weights (rank 2 has b2, the others have a1): start"
        )
        assert got["all"].startswith(
            "the ranks differ in weights (rank 0 has w0, rank 1 has w1, rank 2 has w2), "
            "code (rank 0 has nothing, the others have c3): start"
        )
