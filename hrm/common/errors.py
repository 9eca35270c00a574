"""The mistakes a user of the commands can make, and how every command answers them."""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hrm.common.streams import CLOSED_STATUS, OutputClosed, OutputFailed, watched
from hrm.common.text import printable, with_sources

# Errors of a place that cannot be written. Those of a full disk come without the file's name.
_UNWRITABLE = {errno.ENOSPC, errno.EROFS, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}

# Seconds that torchrun may take on a busy machine to end a node's ranks after one of them has failed.
ENDING = 5.0


class UserError(Exception):
    """A mistake in what the user gave: a key, a value, a file.

    Its text is one line that names the thing, says what was expected, and gives the remedy.
    """

    status = 2


class Stopped(BaseException):
    """Ends the work after a signal or a time limit; code: which, a key of `hrm.training.signals.REASONS`.

    No Exception, so that no library takes it for a failure of its own.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class RankLost(UserError):
    """Another rank has ended, or does not come: this one cannot continue."""

    status = 1


def run_command(
    command: Callable[[], int | None], interrupted: str = "the lines printed so far are valid"
) -> int:
    """Runs a command; returns its status: its own, 2 after a mistake, 130 after Ctrl-C, 143 after SIGTERM.

    A mistake is printed in one line. interrupted: the line after Ctrl-C, or after SIGTERM within
    `interrupted_by_sigterm`. A file that the system refuses (no permission, a full or damaged disk) is the
    user's to mend as well; any other error is ours and keeps its traceback. Output that nobody reads any more
    ends the command quietly with CLOSED_STATUS, also within argparse's help. Under torchrun an error that
    every rank meets is printed once for each node, and Ctrl-C by rank 0 alone; the process then ends at once.
    """
    try:
        with watched():
            return _answered(command, interrupted)
    except OutputClosed:
        return _end(CLOSED_STATUS)
    except OutputFailed as error:
        return _mistake(str(error))


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Treats SIGTERM, as a scheduler sends it, like Ctrl-C: what is unfinished is cleaned up."""

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number))

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _answered(command: Callable[[], int | None], interrupted: str) -> int:
    try:
        return command() or 0
    except UserError as error:
        return _mistake(str(error), error.status)
    except KeyboardInterrupt as stop:
        if _number("RANK") == 0:
            print(f"interrupted: {interrupted}", file=sys.stderr)
        return _end(128 + (stop.args or (signal.SIGINT,))[0])
    except OutputFailed:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            return _mistake(f"{error.filename}: {error.strerror}; check the path and its permissions")
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            return _mistake(f"cannot write: {error.strerror}; free space, or give another folder")
        _let_first_speak()
        if not _is_joined():
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        return _end(1)


def _mistake(text: str, status: int = UserError.status) -> int:
    _let_first_speak()
    mine = f"rank {rank}: " if (rank := _number("RANK")) and status == UserError.status else ""
    print(f"error: {mine}{printable(with_sources(text))}", file=sys.stderr)
    return _end(status)


def _let_first_speak() -> None:
    """On all but a node's first rank, waits for torchrun to end this process after that rank's error."""
    if local_rank := _number("LOCAL_RANK"):
        time.sleep(ENDING + local_rank / 4)


def _end(status: int) -> int:
    """Returns the status; ends one of several ranks here, for gloo's threads may wait for a lost rank."""
    if _is_joined():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _is_joined() -> bool:
    # Commands that need no PyTorch do not wait for its import.
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def _number(name: str) -> int:
    """A rank's number in the environment that torchrun sets; 0 for a process alone."""
    text = os.environ.get(name, "")
    return int(text) if os.environ.get("WORLD_SIZE", "1") != "1" and text.isdecimal() else 0
