"""Handles standard streams whose reader is gone or that cannot be written."""

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

# The status of a process that SIGPIPE ends.
CLOSED_STATUS = 141
_CLOSED = {errno.EPIPE, errno.ECONNRESET, errno.EBADF, getattr(errno, "ESHUTDOWN", errno.EPIPE)}
# Called with a line for the user instead of raising an error.
_instead: list[Callable[[str], None]] = []


class OutputClosed(SystemExit):
    """A standard stream has no reader left. The command ends silently with CLOSED_STATUS."""

    def __init__(self) -> None:
        super().__init__(CLOSED_STATUS)


class OutputFailed(Exception):
    """A standard stream cannot be written, as on a full disk. Its text is one line."""


@contextmanager
def watched() -> Iterator[None]:
    """Within this context, a failing write to a standard stream raises OutputClosed or OutputFailed.

    The failed stream discards further output. The context flushes the streams at its end, so that the
    interpreter writes nothing at exit.
    """
    before = sys.stdout, sys.stderr
    streams = [_Stream(stream, name) for stream, name in zip(before, _NAMES, strict=True)]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in streams)
    try:
        try:
            yield
        finally:
            for stream in streams:
                stream.flush()
    finally:
        sys.stdout, sys.stderr = before


@contextmanager
def on_failure(call: Callable[[str], None]) -> Iterator[None]:
    """Within this context, a failing stream calls `call` with one line instead of raising an error."""
    _instead.append(call)
    try:
        yield
    finally:
        _instead.remove(call)


_NAMES = ("standard output", "standard error")


class _Stream:
    """A standard stream. It discards all output if the process has no such stream (None)."""

    def __init__(self, stream: TextIO | None, name: str) -> None:
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        descriptor = self._stream.fileno()
        closed = error.errno in _CLOSED or (
            # A closed terminal or a damaged disk gives this error.
            error.errno == errno.EIO and not stat.S_ISREG(os.fstat(descriptor).st_mode)
        )
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)
        text = f"{self._name}: {'nobody reads it any more' if closed else error.strerror or error}"
        if _instead:
            _instead[-1](text)
        elif closed:
            raise OutputClosed from None
        else:
            raise OutputFailed(f"{text}; free space, or write elsewhere") from None
