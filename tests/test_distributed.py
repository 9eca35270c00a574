"""The parts of a job of many ranks, in one process; tests/test_ranks.py runs whole jobs."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from threading import Thread
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch.distributed import HashStore, PrefixStore, Store

from hrm import distributed, guard, heartbeat, ranks, software
from hrm.agreement import CALLS, newly_slow
from hrm.common.errors import UserError
from hrm.distributed import World, digest
from hrm.heartbeat import Heartbeat, Sign, late, meet
from hrm.ranks import Place, one_voice, place
from hrm.software import versions

GIVEN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1"}
GIVEN |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
# Long against what a busy machine takes away from a thread.
SILENCE = 2.0


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
    world = World()
    x = torch.tensor([[1.0], [2.0]])
    assert world.is_main and world.all_gather(x) is x and world.all_reduce(x) is x and world.broadcast(x) is x
    assert world.rows(8) == slice(0, 8) and World(2, 4).rows(8) == slice(4, 6)
    world.barrier()
    world.check_equal({"weights": "a"})
    world.doing("step 1")
    assert [world.highest(code) for code in (0, 2, 1)] == [0, 2, 1]
    assert world.stragglers(9.0) is None
    with distributed.joined("cpu", 8) as joined:
        assert joined == (World(), torch.device("cpu"))


def test_a_place_is_what_the_launcher_gives(environment):
    assert place() == Place(0, 1, 0)
    environment()
    assert place() == Place(3, 4, 1, "1")
    environment(GROUP_RANK=None)
    assert place().node == "of rank 3"
    environment(WORLD_SIZE="1", RANK=None, MASTER_ADDR=None)
    assert place() == Place()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"RANK": None}, "WORLD_SIZE without RANK"),
        ({"RANK": "4"}, "RANK=4 of WORLD_SIZE=4"),
        ({"RANK": "-1"}, "RANK=-1: expected a whole number from 0 on"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: expected a whole number from 1 on"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x"),
        ({"MASTER_ADDR": None}, "WORLD_SIZE=4 without MASTER_ADDR"),
        ({"MASTER_PORT": ""}, "WORLD_SIZE=4 without MASTER_PORT"),
    ],
)
def test_a_place_that_no_launcher_gives_is_refused(environment, changes, part):
    environment(**changes)
    with pytest.raises(UserError, match="start the ranks with torchrun, or unset WORLD_SIZE") as error:
        distributed.start("cpu", 8)
    assert str(error.value).startswith(part)


@pytest.mark.parametrize(
    ("device", "batch", "part"),
    [
        ("cuda:1", 8, "device=cuda:1 under torchrun: ranks need device=cuda"),
        ("cpu", 9, "global_batch_size=9 cannot be shared by 4 ranks"),
        ("cuda", 8, "LOCAL_RANK=1 on a machine with 1 GPUs: lower torchrun's --nproc_per_node"),
        # The port is no one's.
        ("cpu", 8, "MASTER_ADDR=127.0.0.1 MASTER_PORT=1: the ranks cannot meet there"),
    ],
)
def test_what_ranks_cannot_share_is_refused(environment, monkeypatch, device, batch, part):
    environment()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(distributed, "JOINING", 0.5)
    with pytest.raises(UserError, match=part):
        distributed.start(device, batch)


def test_a_digest_is_of_the_bytes():
    assert digest(torch.tensor([], dtype=torch.float32)) == "e3b0c44298fc1c14"
    assert digest(torch.tensor([97, 98, 99], dtype=torch.uint8)) == "ba7816bf8f01cfea"
    table = torch.arange(6.0).reshape(2, 3)
    assert digest(table.t()) == digest(torch.tensor([0.0, 3, 1, 4, 2, 5])) != digest(table)
    for tensor in (torch.tensor(1.5), torch.tensor([True]), torch.ones(2, dtype=torch.bfloat16)):
        changed = tensor.clone()
        changed.reshape(-1)[0] = 0
        assert digest(tensor) == digest(tensor.clone()) != digest(changed)


# ------------------------------------------------------------------------------------------------ meeting


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


def join(store: HashStore, rank: int, size: int, joining: float = 20.0) -> str:
    """Meets, and gives a first sign as a heartbeat does."""
    name = meet(store, Place(rank, size), joining)
    PrefixStore(name, store).set(f"sign/{rank}", "{}")
    return name


def test_each_attempt_has_a_name_of_its_own_that_its_ranks_share():
    store = HashStore()
    # A rank that died while it was joining, before this attempt.
    store.set("asks/1", "dead")
    first = in_threads(*(lambda rank=rank: join(store, rank, 3) for rank in (1, 2, 0)))
    second = in_threads(*(lambda rank=rank: join(store, rank, 3) for rank in (0, 1, 2)))
    assert len(set(first)) == len(set(second)) == 1 and first[0] != second[0]


def test_ranks_that_do_not_come_are_named():
    store = HashStore()
    main, one, three = in_threads(*(lambda rank=rank: join(store, rank, 5, 1.0) for rank in (0, 1, 3)))
    assert isinstance(main, UserError) and one == three != main
    assert str(main).startswith("ranks 2, 4 of 5 did not join within 1 s: ")
    with pytest.raises(UserError, match="rank 0 of 5 did not join"):
        join(HashStore(), 1, 5, 0.2)


# --------------------------------------------------------------------------------------------- heartbeats


class Listener(Heartbeat):
    """A heartbeat that notes what it would end the process with."""

    def __init__(self, store: HashStore, here: Place, joining: float, patience: float) -> None:
        self.verdicts: list[str] = []
        self.reachable = True

        def connect() -> Store:
            return cast(Store, Failing(store, self))

        super().__init__(connect, "there:1", here, SILENCE, patience, joining)

    def _die(self, line, lost) -> None:
        self.verdicts.append(line)

    def leave(self, error: str = "") -> None:
        super().leave(error)
        # It would end this process, which stays.
        self._guard.communicate()

    def freeze(self) -> None:
        """Stops giving signs, as a process that was killed does."""
        self._leaving.set()
        self._guard.communicate()


class Failing:
    """A connection to a store that may be gone."""

    def __init__(self, store: HashStore, owner: Listener) -> None:
        self.store, self.owner = store, owner

    def __getattr__(self, name: str):
        if not self.owner.reachable:
            raise RuntimeError("Broken pipe")
        return getattr(self.store, name)


@pytest.fixture
def hearts() -> Iterator:
    made: list[Listener] = []

    def make(size: int, nodes: str, joining: float = 60.0, patience: float = 1000.0) -> list[Listener]:
        """One for each character of `nodes`, which names its rank's node."""
        store = HashStore()
        for rank in range(size):
            store.set(f"sign/{rank}", "null")
        for rank, node in enumerate(nodes):
            made.append(Listener(store, Place(rank, size, 0, node), joining, patience))
        return made

    yield make
    for heart in made:
        heart.freeze()


def wait_for(condition) -> float:
    """Looks until a condition holds; returns the seconds that took, on a busy machine more than it should."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < 60, "waited in vain"
        time.sleep(0.02)
    return time.monotonic() - begun


def test_a_silent_rank_is_named_and_a_busy_one_is_not(hearts):
    one, two, three = hearts(3, "aab")
    # Python's own work takes turns with the threads that give signs.
    until, n = time.monotonic() + 1.5 * SILENCE, 0
    while time.monotonic() < until:
        n += 1
    assert not one.verdicts + two.verdicts + three.verdicts
    two.freeze()
    took = wait_for(lambda: one.verdicts and three.verdicts)
    assert took > 0.8 * SILENCE
    for verdict in one.verdicts[0], three.verdicts[0]:
        assert verdict.startswith("rank 1 (host ") and f"pid {os.getpid()}) has not been heard" in verdict
        assert "for 2 s: killed, stopped or cut off" in verdict


def test_a_rank_that_leaves_is_not_missed_and_one_that_fails_elsewhere_is_named(hearts):
    one, two, three, four = hearts(4, "aabc")
    two.leave()
    # Its own node's torchrun ends the ranks there, after it has told its error.
    three.leave("ValueError: no")
    wait_for(lambda: one.verdicts and four.verdicts)
    assert " failed: ValueError: no" in one.verdicts[0] and one.verdicts[0].startswith("rank 2 (")
    one.verdicts.clear()
    time.sleep(1.5 * SILENCE)
    assert not [verdict for verdict in one.verdicts if "rank 1" in verdict]


def test_an_error_is_left_to_the_torchrun_of_its_node(hearts):
    one, two = hearts(2, "aa")
    two.leave("ValueError: no")
    time.sleep(0.5 * SILENCE)
    assert not one.verdicts


def test_a_store_that_is_gone_is_named_and_not_the_ranks(hearts):
    one, _two = hearts(2, "ab")
    wait_for(lambda: one._signs())
    one.reachable = False
    wait_for(lambda: one.verdicts)
    assert one.verdicts[0].startswith("the rendezvous store at there:1, kept by the first node's torchrun")
    # And heard again when it is back.
    one.reachable = True
    wait_for(lambda: one._missed[0] == 0)


def test_a_rank_that_never_joined_is_named_after_its_time(hearts):
    one, two = hearts(3, "ab", joining=1.0)
    wait_for(lambda: one.verdicts and two.verdicts)
    assert one.verdicts[0].startswith("rank 2 of 3 did not join within 1 s")


def test_a_broken_collective_is_explained(hearts, monkeypatch):
    one, two, three = hearts(3, "abc")
    wait_for(lambda: len(one._signs()) == 2)
    # All are there: the cause lies elsewhere, and the error is as it was.
    assert one.why_broken() is None
    two.freeze()
    assert "rank 1 (host" in (why := one.why_broken()) and "connection closed and no sign of life" in why
    monkeypatch.setattr(distributed, "_heartbeat", one)
    with pytest.raises(UserError, match=r"rank 1 \(host"), distributed._together():
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1")
    for error in torch.OutOfMemoryError("the device is full"), ValueError("shape"):
        with pytest.raises(type(error), match=str(error)), distributed._together():
            raise error
    # There is nothing to save any more: torchrun's signal ends this rank at once.
    try:
        signal.signal(signal.SIGTERM, lambda *_: None)
        with pytest.raises(UserError), distributed._together():
            raise RuntimeError("Connection closed by peer [127.0.0.1]:1")
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    three.leave("KeyError: 'x'")
    assert "rank 2 (" in (why := one.why_broken()) and "failed: KeyError: 'x'" in why


def test_a_collective_that_broke_with_the_first_node_is_explained(hearts):
    one, _two = hearts(2, "ab")
    wait_for(lambda: one._signs())
    one.reachable = False
    assert "rendezvous store at there:1" in one.why_broken()


def test_an_error_told_on_this_node_is_given_time(hearts):
    one, two = hearts(2, "aa")
    wait_for(lambda: one._signs())
    two.leave("ValueError: no")
    begun = time.monotonic()
    assert "rank 1 (" in (why := one.why_broken()) and "failed: ValueError: no" in why
    assert time.monotonic() - begun > 5 * SILENCE / heartbeat.SIGNS


# ------------------------------------------------------------------------------------- ranks that do not come


def sign(rank: int, collectives: int, waits: bool, **more) -> Sign:
    return Sign(rank, "a", "host", 100 + rank, collectives=collectives, waits=waits, **more)


@pytest.mark.parametrize(
    ("signs", "missing"),
    [
        ([sign(0, 5, True), sign(1, 4, False)], [1]),
        ([sign(0, 5, True), sign(1, 4, False), sign(2, 3, False), sign(3, 3, False)], [2, 3]),
        # One that is itself in an earlier collective waits as well.
        ([sign(0, 5, True), sign(1, 4, True), sign(2, 3, False)], [2]),
        # The source of a broadcast is past it.
        ([sign(0, 6, False), sign(1, 5, True), sign(2, 4, False)], [2]),
        ([sign(0, 6, False), sign(1, 5, True)], []),
        ([sign(0, 5, True), sign(1, 5, True)], []),
        ([sign(0, 5, False), sign(1, 4, False)], []),
        # One that left in order while the others go on.
        ([sign(0, 5, True), sign(1, 4, False, end="")], [1]),
    ],
)
def test_the_ranks_behind_are_those_that_the_others_wait_for(signs, missing):
    assert [late_sign.rank for late_sign in late(signs)] == missing


def test_a_sign_of_another_version_is_read():
    written = {"rank": 1, "node": "a", "host": "h", "pid": 7, "count": 2, "mood": "fine"}
    assert Sign.read(written) == Sign(1, "a", "h", 7, 2)


def test_a_rank_that_does_not_come_is_told_of_and_then_named_by_all(hearts, capsys):
    """Its threads live: only what its main thread does tells."""
    zero, one, two = hearts(3, "aab", patience=2 * SILENCE)
    one.doing("evaluating")
    with zero.waiting(), two.waiting():
        wait_for(lambda: zero._sign.turns * zero._period >= zero._warning)
        wait_for(lambda: "waiting for" in capsys.readouterr().err)
        wait_for(lambda: zero.verdicts and one.verdicts and two.verdicts)
    # Said once, by one of those that wait.
    assert not capsys.readouterr().err
    for verdict in zero.verdicts[0], one.verdicts[0], two.verdicts[0]:
        who = f"rank_timeout={2 * SILENCE:g}: waited in vain for rank 1 (host {zero._sign.host}, pid "
        assert verdict.startswith(who)
        seconds = float(re.search(r": evaluating for (\d+) s; the same command", verdict)[1])
        assert 2 * SILENCE <= seconds < 3 * SILENCE
    assert zero._activity == ("starting", 1, False) and one._activity == ("evaluating", 0, False)


def test_the_first_rank_that_waits_tells_whom_it_waits_for(hearts, capsys):
    zero, one, two = hearts(3, "abc", patience=2 * SILENCE)
    zero.doing("step 3")
    with one.waiting(), two.waiting():
        wait_for(lambda: one._warned and two._warned and zero._warned)
    told = capsys.readouterr().err
    assert re.fullmatch(r"waiting for rank 0 \(host \S+, pid \d+\): step 3 for \d+ s\n", told)
    assert not zero.verdicts + one.verdicts + two.verdicts


def test_ranks_that_work_or_wait_in_turn_are_left_in_peace(hearts, capsys):
    zero, one = hearts(2, "ab", patience=SILENCE / 2)
    until = time.monotonic() + SILENCE
    while time.monotonic() < until:
        # Collectives that take their time, and one that has just begun another.
        with zero.waiting(), one.waiting():
            time.sleep(0.02)
    # Alone at work: nobody waits.
    time.sleep(SILENCE)
    assert not zero.verdicts + one.verdicts
    assert not capsys.readouterr().err


def test_a_rank_that_left_while_others_wait_for_it_is_named(hearts):
    zero, one = hearts(2, "ab", patience=SILENCE / 2)
    one.leave()
    with zero.waiting():
        wait_for(lambda: zero.verdicts)
    assert re.search(r"waited in vain for rank 1 \(.*\): ended; the same command", zero.verdicts[0])


def test_a_silent_rank_is_not_judged_by_what_it_last_said(hearts):
    zero, one = hearts(2, "ab", patience=SILENCE / 2)
    with zero.waiting(), one.waiting():
        wait_for(lambda: zero._signs() and zero._signs()[0].waits)
        one.freeze()
        wait_for(lambda: zero.verdicts)
    assert "has not been heard of" in zero.verdicts[0]


def test_ranks_that_all_wait_blame_what_lies_between_them(hearts):
    zero, one = hearts(2, "ab", patience=SILENCE)
    zero.doing("step 7")
    one.doing("step 7")
    with zero.waiting(), one.waiting():
        wait_for(lambda: zero.verdicts and one.verdicts)
    assert "all ranks wait for one another at step 7, so the network between them" in one.verdicts[0]


@pytest.mark.parametrize(
    ("rank", "beside", "lost", "speaks"),
    [
        (0, [1, 2], [], True),
        (1, [0, 2], [], False),
        (1, [0, 2], [0], True),
        # The one that did not come leaves it to those that waited, if there are any.
        (0, [1], [0], False),
        (0, [], [0], True),
        (0, [1], [0, 1], True),
    ],
)
def test_one_rank_of_a_node_says_why_it_ends(monkeypatch, capsys, rank, beside, lost, speaks):
    heart = object.__new__(Heartbeat)
    heart._sign, others = sign(rank, 0, False), [sign(other, 0, False) for other in beside]
    monkeypatch.setattr(heart, "_signs", lambda: others)
    naps: list[float] = []
    monkeypatch.setattr(heartbeat.time, "sleep", naps.append)

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(heartbeat.os, "_exit", leave)
    with pytest.raises(SystemExit, match="1"):
        heart._die("why", [sign(other, 0, False) for other in lost])
    assert (capsys.readouterr().err == "error: why\n") is speaks and (naps == [2]) is not speaks


# ------------------------------------------------------------------------------------------------ agreement


def test_a_slow_rank_is_told_once_after_some_calls_in_a_row():
    slow = [0, 0, 0]
    for _ in range(CALLS - 1):
        assert newly_slow([1.0, 1.0, 1.6], slow) == []
    # Back to its pace in between, it starts from the front.
    assert newly_slow([1.0, 1.0, 1.4], slow) == [] and slow == [0, 0, 0]
    for _ in range(CALLS - 1):
        assert newly_slow([1.6, 1.0, 1.0], slow) == []
    assert newly_slow([1.6, 1.0, 1.0], slow) == [0]
    for _ in range(2 * CALLS):
        assert newly_slow([1.6, 1.0, 1.0], slow) == []
    # Of two, by the faster one.
    pair = [0, CALLS - 1]
    assert newly_slow([1.0, 1.6], pair) == [1]


def test_differences_are_short():
    long = ["x" * 100 + end for end in "abb"]
    told = distributed._difference(long)
    assert len(told) < 200 and told.startswith("rank 0 has xxx") and ", the others have xxx" in told
    first, second = re.findall(r"x… \((\w{8})\)", told)
    assert first != second
    assert distributed._difference(["a", "a"]) == "" and distributed._difference(long[1:]) == ""


# ------------------------------------------------------------------------------------------------- software


def test_software_is_named_file_by_file(tmp_path, monkeypatch):
    """A copy with a comment changed is other software, in that file alone."""
    before = versions()
    assert {"train.py", "hrm/model/act.py", "kernels/rope.py", "torch", "numpy", "triton"} <= before.keys()
    for package in ("hrm", "kernels"):
        shutil.copytree(software.ROOT / package, tmp_path / package)
    shutil.copy(software.ROOT / "train.py", tmp_path)
    monkeypatch.setattr(software, "ROOT", tmp_path)
    assert versions() == before
    for name in ("hrm/data/dataset.py", "kernels/rope.py", "train.py"):
        with (tmp_path / name).open("a") as copied:
            copied.write("# changed\n")
    changed = versions()
    assert changed.keys() == before.keys()
    assert [name for name in before if changed[name] != before[name]] == [
        "hrm/data/dataset.py",
        "kernels/rope.py",
        "train.py",
    ]


def test_settings_and_kinds_of_device_are_software_too(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = versions()
    assert before["CUBLAS_WORKSPACE_CONFIG"] == "unset" and before["torch"].startswith(torch.__version__)
    assert before["threads (OMP_NUM_THREADS)"] == str(torch.get_num_threads())
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    changed = versions()
    assert {name: changed[name] for name in changed if changed[name] != before[name]} == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8"
    }
    card = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="that")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    on_gpu = versions("cuda:1")
    assert on_gpu["GPU"] == "compute capability 9.0, 132 multiprocessors" and on_gpu["nccl"] == "2.27.5"
    assert "processor" not in on_gpu and before.keys() - on_gpu.keys() == {
        "processor",
        "threads (OMP_NUM_THREADS)",
    }


# ------------------------------------------------------------------------------------------ guard, voices


def test_the_guard_kills_only_a_process_that_gives_no_sign(tmp_path):
    """A parent that gives signs for a while and then stops itself; one that ends; one that goes on."""
    parent = f"""
import os, signal, subprocess, sys, time
guard = subprocess.Popen([sys.executable, {guard.__file__!r}, "0.1", "5"], stdin=subprocess.PIPE, bufsize=0)
for _ in range(15):
    guard.stdin.write(b".")
    time.sleep(0.1)
print("alive", flush=True)
if sys.argv[1] == "stops":
    os.kill(os.getpid(), signal.SIGSTOP)
if sys.argv[1] == "leaves":
    guard.communicate()
    time.sleep(1)
"""
    begun = time.monotonic()
    for way, status in (("stops", -signal.SIGKILL), ("leaves", 0), ("ends", 0)):
        done = subprocess.run([sys.executable, "-c", parent, way], capture_output=True, text=True, timeout=60)
        assert done.returncode == status and done.stdout == "alive\n", done.stderr
    assert time.monotonic() - begun > 3 * 1.5


@pytest.mark.parametrize(
    ("rank", "local_rank", "error", "raised", "waits"),
    [
        (0, 0, UserError("no"), "no", False),
        (3, 0, UserError("no"), "rank 3: no", False),
        (3, 1, UserError("no"), "rank 3: no", True),
        (3, 1, ValueError("a bug"), "a bug", True),
        (0, 0, KeyboardInterrupt(), "", False),
    ],
)
def test_the_first_rank_of_a_node_speaks_at_once(
    environment, monkeypatch, rank, local_rank, error, raised, waits
):
    naps: list[float] = []
    monkeypatch.setattr(ranks.time, "sleep", naps.append)
    environment(RANK=str(rank), LOCAL_RANK=str(local_rank))

    def command() -> None:
        raise error

    with pytest.raises(type(error)) as told:
        one_voice(command)
    assert str(told.value) == raised and [nap > ranks.ENDING for nap in naps] == [True] * waits


def test_an_interrupt_is_told_by_rank_0_alone(environment):
    environment()

    def command() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        one_voice(command)
    assert ended.value.code == 130


def test_the_constants_end_a_job_within_a_minute():
    period = heartbeat.SILENCE / heartbeat.SIGNS
    # A sign may be two turns old when the counting starts.
    assert heartbeat.SILENCE + 2 * period < 50 and (heartbeat.KILLED + 1) * period < 60
    assert heartbeat.KILLED > heartbeat.SIGNS + 2
