"""Requests to end a run before its time, met after a step with a checkpoint: signals, and a limit of time."""

import os
import signal
import threading
import time
from typing import Any

# What a rank asks for after a step, by urgency: of different ones the highest counts.
GO_ON, SAVE, TIME_OVER, INTERRUPT, TERMINATE = range(5)
# What each request to end is called, and the exit status that tells of it. 75 is EX_TEMPFAIL of sysexits.h:
# try again later; the others are those of a process that the signal has killed.
REASONS = {
    TIME_OVER: ("max_seconds", 75),
    INTERRUPT: ("SIGINT", 128 + signal.SIGINT),
    TERMINATE: ("SIGTERM", 128 + signal.SIGTERM),
}
_CODES: dict[int, int] = {signal.SIGINT: INTERRUPT, signal.SIGTERM: TERMINATE}


class Stopped(Exception):
    """Ends the loop of a run, on every rank at the same place. code: one of REASONS."""

    def __init__(self, code: int) -> None:
        super().__init__(REASONS[code][0])
        self.code = code


class Interruption:
    """Whether the run is to end, or a checkpoint is due; a context in which signals only ask for it.

    The first SIGINT or SIGTERM is noted; after it they do what they do to any process, so a second one ends
    it at once. Outside the main thread, which alone receives signals, only the limit of time counts.
    """

    def __init__(self, max_seconds: float | None, save_seconds: float | None, *, speaks: bool = True) -> None:
        """max_seconds: from now on, until the run is to end; save_seconds: between checkpoints; None: never.

        speaks: whether this rank is the one that answers a signal with a line.
        """
        self._start = self._saved = time.monotonic()
        self._max_seconds, self._save_seconds, self._speaks = max_seconds, save_seconds, speaks
        self._signal = GO_ON
        self._before: dict[int, Any] = {}

    @property
    def code(self) -> int:
        """The most urgent request."""
        now = time.monotonic()
        if self._signal:
            return self._signal
        if self._max_seconds is not None and now - self._start >= self._max_seconds:
            return TIME_OVER
        due = self._save_seconds is not None and now - self._saved >= self._save_seconds
        return SAVE if due else GO_ON

    def saved(self) -> None:
        """A checkpoint has been made: the next one is due in `save_seconds`."""
        self._saved = time.monotonic()

    def _note(self, number: int, _: object) -> None:
        self._signal = _CODES[number]
        for other in _CODES:
            signal.signal(other, signal.SIG_DFL)
        if self._speaks:
            name = REASONS[self._signal][0]
            # Not print: the signal may have come in the middle of one.
            os.write(2, f"\n{name}: saves and ends after this step; a second signal ends at once\n".encode())

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _CODES}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
