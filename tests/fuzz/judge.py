"""The project's readers as functions of bytes: each takes what they hold, or refuses it in one line.

A target writes its input where the reader looks for it, among valid files, and calls the reader as the
commands do. `judge` says what came of it; anything but a value or a `UserError` of one short line is a
`Finding`. Nothing is imported before a target needs it: only checkpoints and run folders wait for PyTorch.
"""

import contextlib
import io
import os
import resource
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from hrm.common.errors import UserError
from tests.fuzz.mutations import LONGEST, bytes_changed

# Bounds of one input: CPU seconds, far above any slow machine's, bytes of memory, characters of a message.
SECONDS, MEMORY, MESSAGE = 60.0, 128 << 20, 2000


class Finding(Exception):
    """What a reader must not do: another exception than its own, a hang, a page of text, too much memory."""


class _TooSlow(BaseException):
    """Beyond the reach of `except Exception`."""


@dataclass(frozen=True)
class Target:
    """A reader: `run` reads some bytes, `seeds` gives valid ones, `change` makes one of them odd.

    words: pieces of its grammar. status: the exit statuses that are an answer too.
    """

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], tuple[bytes, ...]]
    change: Callable[[Random, bytes], bytes] | None = None
    words: tuple[bytes, ...] = ()
    status: tuple[int, ...] = ()

    def draw(self, random: Random) -> bytes:
        """An input that is nearly valid."""
        data = random.choice(self.seeds())
        changes: tuple[int, ...] = (1, 1, 2, 4, 16)
        if self.change is not None and random.random() < 0.75:
            data, changes = self.change(random, data), (0, 0, 0, 1)
        for _ in range(random.choice(changes)):
            data = bytes_changed(random, data, self.words)
        return data[:LONGEST]


@cache
def warm(target: Target) -> None:
    """Reads every seed, which must be valid, so that code is loaded and compiled before anything counts."""
    for data in target.seeds():
        with _quiet():
            try:
                target.run(data)
            except SystemExit as error:
                if error.code not in target.status:
                    raise


@dataclass(frozen=True)
class Refusal:
    """What a reader says of an input that it does not take, and the line of the project that says so."""

    message: str
    where: str


def judge(target: Target, data: bytes) -> Refusal | None:
    """The reason why the target rejected the data; None if it accepted them. Raises Finding for anything
    else."""
    before, refusal = _most_memory(), None
    try:
        with _quiet() as said, _clock():
            target.run(data)
    except UserError as error:
        message = str(error)
        if not message.isprintable() or not 0 < len(message) <= MESSAGE:
            raise Finding(f"not one short line: {message[:200]!r} ({len(message)} characters)") from error
        place = traceback.extract_tb(error.__traceback__, limit=-1)[0]
        refusal = Refusal(message, f"{Path(place.filename).name}:{place.lineno}")
    except SystemExit as error:
        if error.code not in target.status:
            raise Finding(f"exit status {error.code}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise Finding(f"{type(error).__name__}: {str(error)[:200]}") from error
    if not all(line.isprintable() for line in said.getvalue().split("\n")):
        raise Finding("control characters for the terminal")
    if (grown := _most_memory() - before) > MEMORY:
        raise Finding(f"{grown >> 20} MiB of memory")
    return refusal


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if os.access(memory, os.W_OK) else None)


def place() -> Path:
    """A folder in memory, where the system has such a place; gone when this process ends."""
    return Path(_folder().name)


def leave() -> None:
    """Gives up that folder for a new one: a process that was ended left it half changed."""
    _folder().cleanup()
    _folder.cache_clear()


def put(name: str, data: bytes) -> Path:
    """A file in `place()`."""
    path = place() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def files_of(folder: str, make: Callable[[], Mapping[str, bytes]]) -> Mapping[str, bytes]:
    """The valid files of a folder, which are there from then on."""
    files = make()
    if not (place() / folder).exists():
        for name, data in files.items():
            put(f"{folder}/{name}", data)
    return files


def given(*seeds: bytes) -> Callable[[], tuple[bytes, ...]]:
    """These seeds, for a target whose seeds need not be made."""
    return lambda: seeds


def text(data: bytes) -> str:
    """Bytes as the system hands them to a program."""
    return data.decode("utf-8", "surrogateescape")


def _most_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
        yield said


@contextlib.contextmanager
def _clock() -> Iterator[None]:
    """Ends what takes too long; by this process's own time, as other processes may hold it up."""

    def stop(number: int, frame: object) -> None:
        raise _TooSlow(f"more than {SECONDS:g} s")

    earlier = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, earlier)
