"""Requests to end a run early: by a signal, a time limit or output without a reader.

The run first finishes and saves its step.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from hrm.common.errors import Stopped
from hrm.common.streams import CLOSED_STATUS, on_failure

if TYPE_CHECKING:
    from hrm.distributed import World

# Requests in order of urgency. All ranks follow the most urgent one.
CONTINUE, SAVE, TIME_OVER, UNREAD, HANG_UP, INTERRUPT, TERMINATE = range(7)
# Name and exit status of each request to end. 75 is EX_TEMPFAIL of sysexits.h, "try again later"; the others
# are the statuses of a process killed by the signal.
REASONS = {
    TIME_OVER: ("max_seconds", 75),
    UNREAD: ("standard output", CLOSED_STATUS),
    HANG_UP: ("SIGHUP", 129),
    INTERRUPT: ("SIGINT", 130),
    TERMINATE: ("SIGTERM", 143),
}
# Seconds to ignore signals after the first: a scheduler and a launcher may both forward one request.
ECHO = 1.0
# Windows has no SIGHUP.
_CODES = {getattr(signal, name): code for code, (name, _) in REASONS.items() if hasattr(signal, name)}


class StopSignals:
    """Collects requests to end or save the run; within the context, signals only create requests.

    The first SIGINT, SIGTERM or SIGHUP is a request. After ECHO seconds, signals have their default effect
    again, so a second signal ends the process immediately. A signal that the process ignored at its start, as
    under nohup, stays ignored. Only the main thread receives signals; in other threads only the time limit
    and the output work.
    """

    def __init__(self, max_seconds: float | None, save_seconds: float | None, *, speaks: bool = True) -> None:
        """max_seconds: from now to the end of the run; save_seconds: between checkpoints; None: never.

        speaks: whether this rank prints a line after a signal.
        """
        self._start = self._saved = time.monotonic()
        self._max_seconds, self._save_seconds, self._speaks = max_seconds, save_seconds, speaks
        self._signal, self._asked, self._raises = CONTINUE, False, False
        self._before: dict[int, Any] = {}
        self._streams = ExitStack()

    def check(self, world: "World", least: int = TIME_OVER) -> bool:
        """Raises Stopped on all ranks if any rank has a request of at least the urgency `least`.

        Returns whether the clock requires a checkpoint. All ranks call it together.
        """
        code = world.highest(self.ask())
        if code >= least:
            raise Stopped(code)
        return code == SAVE

    def ask(self) -> int:
        """This rank's most urgent request. SAVE is returned once until `saved` is called."""
        now = time.monotonic()
        if self._signal:
            return self._signal
        if self._max_seconds is not None and now - self._start >= self._max_seconds:
            return TIME_OVER
        due = self._save_seconds is not None and now - self._saved >= self._save_seconds
        asked_before, self._asked = self._asked, self._asked or due
        return SAVE if due and not asked_before else CONTINUE

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A context in which a request to end raises Stopped immediately, for work that may be lost.

        If there is a request, a failure in the context counts as the stop, because a signal reaches this
        process and its children. Outside the main thread the request raises at the end.
        """
        self._raise()
        is_main = threading.current_thread() is threading.main_thread()
        # Windows has no such timer.
        limit = self._max_seconds if is_main and hasattr(signal, "setitimer") else None
        if limit is not None:
            before = signal.signal(signal.SIGALRM, lambda *_: self._raise())
            signal.setitimer(signal.ITIMER_REAL, max(self._start + limit - time.monotonic(), 0) + 0.01)
        self._raises = is_main
        try:
            yield
        except Exception:
            self._raise()
            raise
        finally:
            self._raises = False
            if limit is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
        self._raise()

    def _raise(self) -> None:
        if (code := self.ask()) >= TIME_OVER:
            raise Stopped(code)

    def saved(self) -> None:
        """Restarts the timer of the next checkpoint."""
        self._saved, self._asked = time.monotonic(), False

    def _unread(self, text: str) -> None:
        self._signal = max(self._signal, UNREAD)
        # The other stream may still have a reader.
        with suppress(OSError):
            os.write(2, f"\n{text}: saves and ends after this step\n".encode())

    def _note(self, number: int, _: object) -> None:
        self._signal = _CODES[number]
        for other in self._before:
            signal.signal(other, signal.SIG_IGN)
        if self._speaks:
            name = REASONS[self._signal][0]
            then = "ends now, before this step" if self._raises else "saves and ends after this step"
            # Do not use print, which the signal may have interrupted.
            with suppress(OSError):
                os.write(2, f"\n{name}: {then}; a second signal ends at once\n".encode())
        time.sleep(ECHO)
        # A write to a closed terminal or pipe would end this run before it has saved.
        for descriptor in filter(_is_unread, (1, 2)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        for other in self._before:
            signal.signal(other, signal.SIG_DFL)
        if self._raises:
            raise Stopped(self._signal)

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in _CODES if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heeded}
        self._streams.enter_context(on_failure(self._unread))
        return self

    def __exit__(self, *_: object) -> None:
        self._streams.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _is_unread(descriptor: int) -> bool:
    """Whether a descriptor has no reader left; always False on Windows, which has no poll."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(descriptor, select.POLLERR)
    return bool(poll.poll(0))
