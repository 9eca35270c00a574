"""Signs of life: how ranks that wait for one another learn that one of them is gone, or does not come.

Each rank writes a sign into the rendezvous store every few seconds and reads the others'. A rank whose sign
no longer changes was killed, stopped or cut off, however long the collective that waits for it would wait.
The signs come from a thread of their own, so a rank that compiles, evaluates or saves goes on giving them;
they tell what its main thread does, and so which rank the others wait for.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from threading import Event, Thread
from typing import Any, NamedTuple
from uuid import uuid4

from torch.distributed import PrefixStore, Store

from hrm import guard
from hrm.common.errors import UserError
from hrm.ranks import Place

# Seconds without a sign after which a rank counts as lost.
SILENCE = 40.0
# Signs in that time.
SIGNS = 15
# Signs missed by a rank that its guard kills: a little later, so that the others can say why.
KILLED = SIGNS + 4
# Signs missed by a rank that counts as lost when its connection has broken as well.
MISSED = 3
# Seconds that ranks wait for one that lives, before the job ends; it is named long before.
PATIENCE = 1800.0
WARNING = 60.0
# Seconds that ranks may start apart: importing torch from a slow disk takes its time.
JOINING = 120.0
REMEDY = "the same command goes on from the last checkpoint"


class Activity(NamedTuple):
    """What a rank's main thread does: its name for it, collectives begun so far, whether it is in one."""

    doing: str = "starting"
    collectives: int = 0
    waits: bool = False


@dataclass(frozen=True)
class Sign:
    """What a rank says of itself: who it is, how often it has said so, what it does, and its end.

    turns: signs since that last changed. end: None while it runs, "" after it has left in order, else the
    error that ended it.
    """

    rank: int
    node: str
    host: str
    pid: int
    count: int = 0
    doing: str = ""
    collectives: int = 0
    waits: bool = False
    turns: int = 0
    end: str | None = None

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @classmethod
    def read(cls, written: dict[str, Any]) -> "Sign":
        """The sign of a rank that may run another version of this code, which is told later."""
        return cls(**{field.name: written[field.name] for field in fields(cls) if field.name in written})


def late(signs: list[Sign]) -> list[Sign]:
    """The ranks that have begun the fewest collectives and are in none: those that the others wait for."""
    free = [sign for sign in signs if not sign.waits]
    fewest = min((sign.collectives for sign in free), default=0)
    waiting = [sign.collectives for sign in signs if sign.waits]
    # One that is past the collective has left it earlier, as the source of a broadcast does.
    return [sign for sign in free if sign.collectives == fewest < max(waiting, default=0)]


def meet(store: Store, here: Place, joining: float = JOINING) -> str:
    """The prefix of the store's keys that belong to this attempt of the job alone; every rank calls it once.

    A store may outlive the ranks: torchrun restarts them on the one it keeps, where what dead ranks wrote
    still lies. So rank 0 draws a name for the attempt and gives it to each rank that asks with a token of
    its own, until every one has given a sign under it. Raises UserError for ranks that do not come.
    """
    token = uuid4().hex
    if here.rank > 0:
        store.set(f"asks/{here.rank}", token)
        deadline = time.monotonic() + joining
        while not store.check([f"answer/{token}"]):
            _wait(deadline, [0], here.size, joining)
        return store.get(f"answer/{token}").decode()

    attempt = PrefixStore(token, store)
    for rank in range(here.size):
        attempt.set(_key(rank), "null")
    asked, absent = dict.fromkeys(range(here.size), b""), list(range(1, here.size))
    deadline = time.monotonic() + joining
    while absent:
        for rank in absent:
            if store.check([f"asks/{rank}"]) and (asks := store.get(f"asks/{rank}")) != asked[rank]:
                asked[rank] = asks
                store.set(f"answer/{asks.decode()}", token)
        absent = [rank for rank in absent if attempt.get(_key(rank)) == b"null"]
        if absent:
            _wait(deadline, absent, here.size, joining)
    return token


def _wait(deadline: float, ranks: list[int], size: int, joining: float) -> None:
    if time.monotonic() > deadline:
        raise UserError(_not_joined(ranks, size, joining))
    time.sleep(0.05)


def _not_joined(ranks: list[int], size: int, joining: float) -> str:
    return (
        f"{_named(ranks)} of {size} did not join within {joining:.0f} s: start all of them, and look for "
        "their own errors"
    )


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _key(rank: int) -> str:
    return f"sign/{rank}"


def _guard(period: float) -> "subprocess.Popen[bytes]":
    """Starts a process that kills this one when it gets no more bytes from it."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", guard.__file__, str(period), str(KILLED)],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Ctrl-C is not for it.
        start_new_session=True,
    )


class Heartbeat:
    """This rank's signs of life, and an ear for the others'.

    connect: makes a new connection to this attempt's part of the store (see `meet`) at `address`. A rank
    silent for `silence` seconds, one of another node that failed, or one that the others have waited for
    `patience` seconds in a collective, ends this process with one line and status 1.
    """

    def __init__(
        self,
        connect: Callable[[], Store],
        address: str,
        here: Place,
        silence: float = SILENCE,
        patience: float = PATIENCE,
        joining: float = JOINING,
    ) -> None:
        self._connect, self._address, self._here = connect, address, here
        self._silence, self._joining, self._period = silence, joining, silence / SIGNS
        self._patience, self._warning, self._warned = patience, min(WARNING, patience / 10), 0
        # Replaced whole by the main thread, looked at by the others.
        self._activity = Activity()
        self._sign = Sign(here.rank, here.node, socket.gethostname(), os.getpid())
        self._keys = [_key(rank) for rank in range(here.size)]
        self._heard: list[bytes] = [b"null"] * here.size
        # Signs missed in a row, of each rank: at each answer of the store those that are still the old ones.
        # For this rank, turns without an answer. Never by the clock: a whole job may be suspended.
        self._missed = [0] * here.size
        self._end: str | None = None
        self._guard = _guard(self._period)
        self._leaving = Event()
        self._threads = [Thread(target=turn, daemon=True) for turn in (self._speak, self._watch)]
        for thread in self._threads:
            thread.start()

    def doing(self, what: str) -> None:
        """Notes what the main thread is about to do, in the words that the others would read of it."""
        self._activity = self._activity._replace(doing=what)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what the main thread cannot finish before the others come."""
        doing, begun_before, _ = self._activity
        self._activity = Activity(doing, begun_before + 1, True)
        try:
            yield
        finally:
            self._activity = Activity(doing, begun_before + 1, False)

    def leave(self, error: str = "") -> None:
        """Tells the others that this rank ends: in order, or with the error that ended it."""
        self._end = error
        self._leaving.set()
        # Not for ever: the store may be what is gone.
        self._threads[0].join(timeout=5)
        if not error:
            # After an error it stays, should the process not find its end.
            self._guard.communicate()

    def why_broken(self) -> str | None:
        """Which rank is gone, asked when a collective has failed; waits for missed signs. None if none is."""
        for _ in range(2 * MISSED):
            time.sleep(self._period)
            ended = [sign for sign in self._signs() if sign.end is not None]
            for sign in ended:
                # One of this node tells its error itself, and torchrun then ends them all.
                if sign.node != self._here.node:
                    return self._ended(sign)
            lost = self._lost(MISSED)
            if lost:
                return f"{', '.join(map(str, lost))}: connection closed and no sign of life; {REMEDY}"
            if self._missed[self._here.rank] >= MISSED:
                return self._store_lost()
        return self._ended(ended[0]) if ended else None

    def _speak(self) -> None:
        store, last = self._connect(), self._activity
        while True:
            leaving = self._leaving.is_set()
            now = self._activity
            turns = self._sign.turns + 1 if now is last else 0
            count, last = self._sign.count + 1, now
            self._sign = replace(self._sign, count=count, turns=turns, end=self._end, **now._asdict())
            try:
                store.set(_key(self._here.rank), json.dumps(asdict(self._sign)))
                heard = store.multi_get(self._keys)
            except RuntimeError:
                # A connection that broke stays broken.
                with suppress(RuntimeError):
                    store = self._connect()
            else:
                for rank, (old, new) in enumerate(zip(self._heard, heard, strict=True)):
                    self._missed[rank] = self._missed[rank] + 1 if old == new else 0
                self._heard = heard
            if leaving:
                return
            self._leaving.wait(self._period)

    def _watch(self) -> None:
        while not self._leaving.wait(self._period):
            self._missed[self._here.rank] += 1
            self._judge()
            assert self._guard.stdin is not None
            with suppress(BrokenPipeError):
                self._guard.stdin.write(b".")

    def _judge(self) -> None:
        if self._missed[self._here.rank] >= SIGNS:
            self._die(self._store_lost(), [])
        signs = self._signs()
        for sign in signs:
            if sign.end and sign.node != self._here.node:
                self._die(self._ended(sign), [])
        lost = self._lost(SIGNS)
        if lost:
            ranks = f"{', '.join(map(str, lost))} {'have' if len(lost) > 1 else 'has'}"
            line = (
                f"{ranks} not been heard of for {self._silence:.0f} s: killed, stopped or cut off; {REMEDY}"
            )
            self._die(line, lost)
        present = {sign.rank for sign in signs} | {self._here.rank}
        absent = [rank for rank in range(self._here.size) if rank not in present]
        if absent and min(self._missed[rank] for rank in absent) * self._period >= self._joining:
            self._die(_not_joined(absent, self._here.size, self._joining), [])
        self._judge_waiting([*signs, self._sign])

    def _judge_waiting(self, signs: list[Sign]) -> None:
        """Names the ranks that others wait for when that takes long, and ends the job when it takes too long.

        Every rank comes to the same verdict: one that does not come as well as those that wait for it.
        """
        running = [sign for sign in signs if sign.end is None]
        waiting = [sign for sign in running if sign.waits]
        longest = max(waiting, key=lambda sign: sign.turns, default=self._sign)
        seconds = longest.turns * self._period
        # What a silent rank said last says nothing of it: its silence is judged.
        silent = any(self._missed[sign.rank] >= MISSED for sign in running)
        if not waiting or silent or seconds < self._warning:
            return
        missing = late(signs)
        told = ", ".join(
            f"{sign}: {sign.doing} for {sign.turns * self._period:.0f} s"
            if sign.end is None
            else f"{sign}: ended"
            for sign in missing
        )
        if seconds >= self._patience:
            reason = f"rank_timeout={self._patience:g}: waited in vain for {told}"
            if not missing:
                reason = (
                    f"rank_timeout={self._patience:g}: all ranks wait for one another at {longest.doing}, "
                    "so the network between them or a device hangs"
                )
            self._die(f"{reason}; {REMEDY}", missing)
        elif self._warned != longest.collectives:
            self._warned = longest.collectives
            if missing and self._here.rank == min(sign.rank for sign in waiting):
                print(f"waiting for {told}", file=sys.stderr, flush=True)

    def _lost(self, missed: int) -> list[Sign]:
        """The ranks that have joined, have not said that they end, and of which so many signs were missed."""
        return [sign for sign in self._signs() if sign.end is None and self._missed[sign.rank] >= missed]

    def _signs(self) -> list[Sign]:
        """The last signs of the other ranks that have joined."""
        heard = (json.loads(sign) for sign in self._heard)
        return [sign for one in heard if one and (sign := Sign.read(one)).rank != self._here.rank]

    def _store_lost(self) -> str:
        return (
            f"the rendezvous store at {self._address}, kept by the first node's torchrun, has not answered "
            f"for {self._missed[self._here.rank] * self._period:.0f} s: it is down or cut off; {REMEDY}"
        )

    def _ended(self, sign: Sign) -> str:
        return f"{sign} failed: {sign.end}" if sign.end else f"{sign} has ended before the others"

    def _die(self, line: str, lost: list[Sign]) -> None:
        """Ends this process; the first rank of a node, other than those `lost`, says why."""
        mine = self._sign
        beside = {sign.rank for sign in self._signs() if sign.node == mine.node and sign.end is None}
        speakers = (beside | {mine.rank}) - {sign.rank for sign in lost}
        if mine.rank != min(speakers, default=mine.rank):
            # torchrun ends this process when the one that speaks has ended.
            time.sleep(2)
            os._exit(1)
        print(f"error: {line}", file=sys.stderr, flush=True)
        os._exit(1)
