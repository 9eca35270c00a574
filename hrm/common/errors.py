"""User errors, and how every command reports them."""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hrm.common.streams import CLOSED_STATUS, OutputClosed, OutputFailed, watched
from hrm.common.text import printable, with_sources

# Errors when writing fails. The error of a full disk has no file name.
_UNWRITABLE = {errno.ENOSPC, errno.EROFS, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}

# Seconds that torchrun may need on a busy machine to end a node's ranks after one has failed.
ENDING = 5.0


class UserError(Exception):
    """A mistake in the user's input: a key, a value, a file.

    Its text is one line with the name, the expected value and a remedy.
    """

    status = 2


class Stopped(BaseException):
    """Ends the work after a signal or a time limit. code: a key of `hrm.training.signals.REASONS`.

    It is not a subclass of Exception, so that no library handles it as its own failure.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class RankLost(UserError):
    """Another rank has ended or does not respond, so this rank cannot continue."""

    status = 1


def run_command(
    command: Callable[[], int | None], interrupted: str = "the lines printed so far are valid"
) -> int:
    """Runs a command; returns its exit status: its own, 2 after a mistake, 130 after Ctrl-C, 143 after
    SIGTERM.

    A mistake is printed in one line. interrupted: the line after Ctrl-C, or after SIGTERM within
    `interrupted_by_sigterm`. A file error of the system (no permission, a full or damaged disk) counts as the
    user's mistake; any other error is a bug and keeps its traceback. If the reader of the output is gone, the
    command ends silently with CLOSED_STATUS, also within argparse's help. Under torchrun an error of all
    ranks is printed once per node, and Ctrl-C only by rank 0; the process then ends immediately.
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
    """Treats SIGTERM, which schedulers send, like Ctrl-C: unfinished files are removed."""

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
    """On all ranks but a node's first, waits until torchrun ends this process after the first rank's
    error."""
    if local_rank := _number("LOCAL_RANK"):
        time.sleep(ENDING + local_rank / 4)


def _end(status: int) -> int:
    """Returns the status; a rank of a group exits here, because gloo's threads may wait for a lost rank."""
    if _is_joined():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _is_joined() -> bool:
    # Import late: not every command needs PyTorch.
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def _number(name: str) -> int:
    """This rank's number in torchrun's environment; 0 without torchrun."""
    text = os.environ.get(name, "")
    return int(text) if os.environ.get("WORLD_SIZE", "1") != "1" and text.isdecimal() else 0
