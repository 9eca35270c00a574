"""Requests to end a run before its time, met after a step with a checkpoint: signals, and a limit of time."""

import os
import select
import signal
import threading
import time
from contextlib import suppress
from typing import Any

# What a rank asks for after a step, by urgency: of different ones the highest counts.
GO_ON, SAVE, TIME_OVER, HANG_UP, INTERRUPT, TERMINATE = range(6)
# What each request to end is called, and the exit status that tells of it. 75 is EX_TEMPFAIL of sysexits.h:
# try again later; the others are those of a process that the signal has killed.
REASONS = {
    TIME_OVER: ("max_seconds", 75),
    HANG_UP: ("SIGHUP", 129),
    INTERRUPT: ("SIGINT", 130),
    TERMINATE: ("SIGTERM", 143),
}
# Seconds in which another signal is taken for an echo of the first.
ECHO = 1.0
# Windows has no SIGHUP.
_CODES = {getattr(signal, name): code for code, (name, _) in REASONS.items() if hasattr(signal, name)}


class Stopped(Exception):
    """Ends the loop of a run, on every rank at the same place. code: one of REASONS."""

    def __init__(self, code: int) -> None:
        super().__init__(REASONS[code][0])
        self.code = code


class Interruption:
    """Whether the run is to end, or a checkpoint is due; a context in which signals only ask for it.

    The first SIGINT, SIGTERM or SIGHUP is noted; a second after it they do what they do to any process, so
    another one ends it at once. One that the process was started to ignore, as by nohup, stays ignored.
    Outside the main thread, which alone receives signals, only the limit of time counts.
    """

    def __init__(self, max_seconds: float | None, save_seconds: float | None, *, speaks: bool = True) -> None:
        """max_seconds: from now on, until the run is to end; save_seconds: between checkpoints; None: never.

        speaks: whether this rank is the one that answers a signal with a line.
        """
        self._start = self._saved = time.monotonic()
        self._max_seconds, self._save_seconds, self._speaks = max_seconds, save_seconds, speaks
        self._signal, self._asked = GO_ON, False
        self._before: dict[int, Any] = {}

    def ask(self) -> int:
        """The most urgent request; that for a checkpoint is made once, until `saved`."""
        now = time.monotonic()
        if self._signal:
            return self._signal
        if self._max_seconds is not None and now - self._start >= self._max_seconds:
            return TIME_OVER
        due = self._save_seconds is not None and now - self._saved >= self._save_seconds
        asked_before, self._asked = self._asked, self._asked or due
        return SAVE if due and not asked_before else GO_ON

    def saved(self) -> None:
        """A checkpoint has been made: the next one is due in `save_seconds`."""
        self._saved, self._asked = time.monotonic(), False

    def _note(self, number: int, _: object) -> None:
        self._signal = _CODES[number]
        for other in self._before:
            signal.signal(other, signal.SIG_IGN)
        if self._speaks:
            name = REASONS[self._signal][0]
            # Not print: the signal may have come in the middle of one.
            with suppress(OSError):
                os.write(
                    2, f"\n{name}: saves and ends after this step; a second signal ends at once\n".encode()
                )
        # A scheduler and a launcher may both pass on the same request.
        time.sleep(ECHO)
        # A terminal that closed, or what Ctrl-C has ended as well: to write there would end this run.
        for descriptor in filter(_is_unread, (1, 2)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        for other in self._before:
            signal.signal(other, signal.SIG_DFL)

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in _CODES if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _is_unread(descriptor: int) -> bool:
    """Whether what is written to a descriptor can reach nobody; Windows does not tell."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(descriptor, select.POLLERR)
    return bool(poll.poll(0))
