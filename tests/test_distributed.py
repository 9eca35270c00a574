"""The parts of a job of many ranks, in one process; tests/test_ranks.py runs whole jobs."""

import faulthandler
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from threading import Thread
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore

from hrm import distributed
from hrm.common import errors, versions
from hrm.common.errors import RankLost, UserError, run_command
from hrm.common.versions import differences, package_versions
from hrm.distributed import Place, World, digest, joined, place

GIVEN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture
def environment(monkeypatch):
    """Sets what torchrun sets, with changes; None takes a variable away."""

    def give(**changes: str | None) -> None:
        for name, value in {**GIVEN, **changes}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return give


def test_one_rank_needs_no_process_group():
    with joined("cpu", 8) as (world, device):
        assert device == torch.device("cpu") and (world.rank, world.size) == (0, 1)
    x = torch.tensor([[1.0], [2.0]])
    assert world.is_main and world.all_gather(x) is x and world.all_reduce(x) is x and world.broadcast(x) is x
    assert world.rows(8) == slice(0, 8) and World(2, 4).rows(8) == slice(4, 6)
    world.barrier()
    world.check_equal({"weights": "a"})
    assert [world.highest(code) for code in (0, 2, 1)] == [0, 2, 1]
    assert [world.highest_now(code) for code in (0, 2, 1)] == [0, 2, 1]
    assert not dist.is_initialized()


def test_the_rank_comes_from_the_launcher(environment):
    assert place() == Place(0, 1, 0)
    environment()
    assert place() == Place(3, 4, 1)
    environment(WORLD_SIZE="1", RANK=None, MASTER_ADDR=None)
    assert place() == Place()


@pytest.mark.parametrize(
    "changes",
    [
        {"RANK": None},
        {"RANK": "4"},
        {"RANK": "-1"},
        {"WORLD_SIZE": "two"},
        {"LOCAL_RANK": "x"},
        {"LOCAL_RANK": None},
        {"MASTER_ADDR": None},
        {"MASTER_PORT": ""},
    ],
)
def test_a_place_that_no_launcher_gives_is_refused(environment, changes):
    environment(**changes)
    [(name, value)] = changes.items()
    with (
        pytest.raises(UserError, match="start the ranks with torchrun, or unset WORLD_SIZE") as error,
        joined("cpu", 8),
    ):
        pass
    assert re.search(rf"\b{name}={value or ''}[ :]", str(error.value))


@pytest.mark.parametrize(
    ("device", "batch", "part"),
    [
        ("cuda:1", 8, "device=cuda:1 under torchrun: ranks need device=cuda"),
        ("cpu", 9, "global_batch_size=9 cannot be shared by 4 ranks"),
        ("cuda", 8, "LOCAL_RANK=1 on a machine with 1 GPUs: lower torchrun's --nproc_per_node"),
        # The port is no one's.
        ("cpu", 8, "MASTER_ADDR=127.0.0.1 MASTER_PORT=1: the ranks cannot connect there"),
    ],
)
def test_indivisible_batches_are_refused(environment, monkeypatch, device, batch, part):
    environment()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(distributed, "JOINING", 0.5)
    with pytest.raises(UserError, match=part), joined(device, batch):
        pass


def test_a_digest_is_of_the_bytes():
    assert digest(torch.tensor([], dtype=torch.float32)) == "e3b0c44298fc1c14"
    assert digest(torch.tensor([97, 98, 99], dtype=torch.uint8)) == "ba7816bf8f01cfea"
    table = torch.arange(6.0).reshape(2, 3)
    assert digest(table.t()) == digest(torch.tensor([0.0, 3, 1, 4, 2, 5])) != digest(table)
    for tensor in (torch.tensor(1.5), torch.tensor([True]), torch.ones(2, dtype=torch.bfloat16)):
        changed = tensor.clone()
        changed.reshape(-1)[0] = 0
        assert digest(tensor) == digest(tensor.clone()) != digest(changed)


# ------------------------------------------------------------------------------------------------ joining


def in_threads(*calls) -> list:
    results: list = [None] * len(calls)

    def run(i: int) -> None:
        try:
            results[i] = calls[i]()
        except UserError as error:
            results[i] = error

    threads = [Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_each_attempt_has_a_name_of_its_own_that_its_ranks_share():
    store = HashStore()
    # A rank that died while it joined, before this attempt.
    store.set("asks/1", "dead")
    first, second = (
        in_threads(*(lambda rank=rank: distributed._attempt(store, Place(rank, 3)) for rank in order))
        for order in ((1, 2, 0), (0, 1, 2))
    )
    assert len(set(first)) == len(set(second)) == 1 and first[0] != second[0]


def test_missing_ranks_are_reported(monkeypatch):
    monkeypatch.setattr(distributed, "JOINING", 1.0)
    store = HashStore()
    main, one, three = in_threads(
        *(lambda rank=rank: distributed._attempt(store, Place(rank, 5)) for rank in (0, 1, 3))
    )
    assert isinstance(main, UserError) and one == three != main
    assert str(main).startswith("ranks 2, 4 of 5 did not join within 1 s: ")
    with pytest.raises(UserError, match="rank 0 of 5 did not join"):
        distributed._attempt(HashStore(), Place(1, 5))


# ------------------------------------------------------------------------------------------- missing ranks

BROKEN = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1")
SILENT = "[Rank 0]: Rank 2 failed to pass monitoredBarrier in 10000 ms"
WAITS = "Rank 1 successfully reached monitoredBarrier, but received errors while waiting for rank 0"


@pytest.fixture
def peers(monkeypatch) -> Iterator[Any]:
    """Joins a rank to two others; `closed` and `roll_call` say how torch.distributed's functions fail."""
    closed: list[int] = []
    roll_call: list[str] = []
    naps: list[float] = []

    def irecv(_: torch.Tensor, rank: int, *__, **___) -> None:
        if rank in closed:
            raise BROKEN

    def monitored_barrier(*_) -> None:
        if roll_call:
            raise RuntimeError(roll_call[0])

    monkeypatch.setattr(dist, "irecv", irecv)
    monkeypatch.setattr(dist, "monitored_barrier", monitored_barrier)
    monkeypatch.setattr(distributed, "ROLL_CALL", 0.2)
    monkeypatch.setattr(distributed, "ENDING", 0.3)
    monkeypatch.setattr(distributed.time, "sleep", naps.append)
    store, group = HashStore(), cast(dist.ProcessGroup, None)

    def make(rank: int) -> Any:
        made = distributed._Peers(
            rank, 6.0, store, group, group, [f"rank {i} (host h, pid {i})" for i in range(3)]
        )
        return SimpleNamespace(here=made, store=store, closed=closed, roll_call=roll_call, naps=naps)

    yield make
    faulthandler.cancel_dump_traceback_later()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def fail(here: Any, error: Exception = BROKEN) -> str:
    with pytest.raises(RankLost) as lost, here.collective():
        raise error
    assert str(lost.value).endswith("; the same command continues from the last checkpoint")
    return str(lost.value)


def test_a_rank_that_died_is_named_from_its_closed_connection(peers):
    job = peers(1)
    job.closed.append(2)
    signal.signal(signal.SIGTERM, lambda *_: None)
    assert fail(job.here).startswith("rank 2 (host h, pid 2): connection closed, the process has ended; ")
    # It gives torchrun time to end it, whose signal then does so at once.
    assert 0.3 in job.naps and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    # Others give the first reason, though they find another rank gone as well.
    job.closed.append(1)
    assert fail(peers(0).here).startswith("rank 2 (host h, pid 2): connection closed")


def test_the_error_that_ended_a_rank_is_given_as_the_reason(peers):
    job = peers(0)
    job.closed.append(1)
    job.here.tell("rank 1 (host h, pid 1) failed: KeyError: 'x'")
    assert fail(job.here).startswith("rank 1 (host h, pid 1) failed: KeyError: 'x'; ")


def test_a_rank_that_does_not_pass_a_barrier_is_named(peers):
    job = peers(0)
    job.roll_call.append("no roll call is needed")
    assert fail(job.here, RuntimeError(SILENT)).startswith(
        "rank_timeout=6: no response from rank 2 (host h, pid 2); "
    )


def test_a_rank_that_does_not_answer_the_roll_call_is_named_on_all(peers):
    timeout = RuntimeError("Timed out waiting 6000ms for recv operation to complete")
    job = peers(0)
    job.roll_call.append(SILENT)
    name = "rank_timeout=6: no response from rank 2 (host h, pid 2); "
    assert fail(job.here, timeout).startswith(name)
    # Ranks other than 0 take its verdict.
    job.roll_call[:] = [WAITS]
    assert fail(peers(1).here, timeout).startswith(name)


def test_rank_0_is_reported_if_it_does_not_answer(peers):
    job = peers(1)
    job.roll_call.append(WAITS)
    assert "no response from rank 0 (host h, pid 0); " in fail(job.here, RuntimeError(WAITS))


def test_an_error_without_a_lost_rank_is_unchanged(peers):
    job = peers(0)
    for error in torch.OutOfMemoryError("the device is full"), ValueError("shape"), BROKEN:
        with pytest.raises(type(error), match=re.escape(str(error))) as raised, job.here.collective():
            raise error
        assert not isinstance(raised.value, UserError) and not job.store.check(["reason"])


def test_a_stuck_rank_leaves_the_others_time_to_name_it():
    """A roll call, a verdict of rank 0, torchrun's time, and that of a node's first rank."""
    assert distributed.SPARE > 1.5 * distributed.ROLL_CALL + 4 * errors.ENDING


def test_a_stuck_rank_ends_itself_after_the_others_have_named_it(peers, monkeypatch):
    armed: list[tuple[float, bool]] = []
    monkeypatch.setattr(
        faulthandler, "dump_traceback_later", lambda seconds, exit: armed.append((seconds, exit))
    )
    job = peers(0)
    for _ in range(3):
        with job.here.collective():
            pass
    # Not at every collective of a fast step.
    assert armed == [(6 + distributed.SPARE, True)]
    job.closed.append(1)
    fail(job.here)
    assert armed[-1] == (distributed.LAST, True) and distributed.LAST <= 60


# ------------------------------------------------------------------------------------------------ versions


def test_differences_are_short():
    long = [{"code": "x" * 100 + end} for end in "abb"]
    told = differences(long)
    assert len(told) < 200 and told.startswith("code (rank 0 has xxx") and ", the others have xxx" in told
    first, second = re.findall(r"x… \((\w{8})\)", told)
    assert first != second
    assert differences([{"a": "1"}, {"a": "1"}]) == "" and differences(long[1:]) == ""


def test_sources_are_compared_file_by_file(tmp_path, monkeypatch):
    """A comment changed in a copy is a difference in that file alone."""
    before = versions.versions()
    assert {"train.py", "hrm/model/act.py", "kernels/rope.py", "torch", "numpy", "triton"} <= before.keys()
    for package in ("hrm", "kernels"):
        shutil.copytree(versions.ROOT / package, tmp_path / package)
    shutil.copy(versions.ROOT / "train.py", tmp_path)
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    assert versions.versions() == before
    for name in ("hrm/data/dataset.py", "kernels/rope.py", "train.py"):
        with (tmp_path / name).open("a") as copied:
            copied.write("# changed\n")
    changed = versions.versions()
    assert changed.keys() == before.keys()
    assert [name for name in before if changed[name] != before[name]] == [
        "hrm/data/dataset.py",
        "kernels/rope.py",
        "train.py",
    ]


def test_settings_and_kinds_of_device_are_compared_too(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = versions.versions()
    assert before["CUBLAS_WORKSPACE_CONFIG"] == "unset" and before["torch"].startswith(torch.__version__)
    assert before["threads (OMP_NUM_THREADS)"] == str(torch.get_num_threads())
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    changed = versions.versions()
    assert {name: changed[name] for name in changed if changed[name] != before[name]} == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8"
    }
    card = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="that")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    on_gpu = versions.versions("cuda:1")
    assert on_gpu["GPU"] == "compute capability 9.0, 132 multiprocessors" and on_gpu["nccl"] == "2.27.5"
    assert "processor" not in on_gpu and before.keys() - on_gpu.keys() == {
        "processor",
        "threads (OMP_NUM_THREADS)",
    }


def test_versions_are_those_of_installed_packages():
    found = package_versions("numpy", "no_such_package")
    assert (
        found == {"torch": torch.__version__, "numpy": versions.installed("numpy")}
        and found["numpy"] != "none"
    )


# ------------------------------------------------------------------------------------------------ voices


class Left(BaseException):
    """In place of the process's end."""


@pytest.mark.parametrize(
    ("rank", "local_rank", "error", "said", "status", "waits"),
    [
        (0, 0, UserError("no"), "error: no", 2, False),
        (3, 0, UserError("no"), "error: rank 3: no", 2, False),
        (3, 1, UserError("no"), "error: rank 3: no", 2, True),
        (3, 0, RankLost("rank 1 is gone"), "error: rank 1 is gone", 1, False),
        (3, 1, FileNotFoundError(2, "no such file", "f"), "error: rank 3: f: no such file; check", 2, True),
        (3, 1, ValueError("a bug"), "ValueError: a bug", 1, True),
        (0, 0, OSError("a bug"), "OSError: a bug", 1, False),
        (0, 0, KeyboardInterrupt(), "interrupted: goes on", 130, False),
        (3, 0, KeyboardInterrupt(), "", 130, False),
    ],
)
def test_the_first_rank_of_a_node_speaks_at_once(
    environment, monkeypatch, capsys, rank, local_rank, error, said, status, waits
):
    naps: list[float] = []

    def leave(status: int) -> None:
        raise Left(status)

    monkeypatch.setattr(errors.time, "sleep", naps.append)
    monkeypatch.setattr(errors.os, "_exit", leave)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    environment(RANK=str(rank), LOCAL_RANK=str(local_rank))

    def command() -> None:
        raise error

    with pytest.raises(Left) as left:
        run_command(command, "goes on")
    assert left.value.args == (status,) and [nap > errors.ENDING for nap in naps] == [True] * waits
    err = capsys.readouterr().err
    assert said in err if said else not err
