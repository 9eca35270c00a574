"""Reads untrusted files safely, and writes files atomically."""

import errno
import io
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, BinaryIO

from hrm.common.errors import UserError
from hrm.common.text import size_text

# Maximum nesting depth of JSON; an ARC task has six levels.
_DEEPEST = 32
# First bytes of files that are not UTF-8 text.
_NO_TEXT = {
    b"\x1f\x8b": "packed by gzip; unpack it, with gunzip",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save it as .csv",
    b"PAR1": "a Parquet table; write it as .csv, as pandas does with to_csv",
    b"\xff\xfe": "text in UTF-16; save it in UTF-8",
    b"\xfe\xff": "text in UTF-16; save it in UTF-8",
}


def open_bounded(path: str | os.PathLike[str], error: type[UserError] = UserError) -> BinaryIO:
    """A regular file to read bytes from. Raises `error` for pipes, devices and folders, OSError as `open`."""
    # O_NONBLOCK: opening a pipe without a writer would block.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise error(f"{path}: a folder, pipe or device; expected a file")
    return os.fdopen(descriptor, "rb")


def read_limited(
    path: str | os.PathLike[str], limit: int, expected: str, error: type[UserError] = UserError
) -> bytes:
    """The bytes of a file of at most `limit` bytes; a larger file is rejected unread.

    expected: a description of the right contents. Raises `error`, and OSError like `open`.
    """
    with open_bounded(path, error) as file:
        # The file may grow while it is read.
        large = os.fstat(file.fileno()).st_size > limit
        content = b"" if large else file.read(limit + 1)
    if large or len(content) > limit:
        raise error(f"{path}: more than {size_text(limit)}, expected {expected}")
    return content


def read_text(
    path: str | os.PathLike[str], limit: int, expected: str, error: type[UserError] = UserError
) -> str:
    """The text of a UTF-8 file of at most `limit` bytes; see `read_limited`."""
    try:
        return read_limited(path, limit, expected, error).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise error(f"{path}: not text in UTF-8, expected {expected}") from None


def read_json(
    path: str | os.PathLike[str], limit: int, expected: str, error: type[UserError] = UserError
) -> Any:
    """The contents of a JSON file of at most `limit` bytes: strict JSON without repeated keys."""

    def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(items)
        if len(value) < len(items):
            name = Counter(name for name, _ in items).most_common(1)[0][0]
            raise error(f"{path}: {name[:60]!r} occurs twice in one object; leave one of them out")
        return value

    def refused(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    text = read_limited(path, limit, expected, error)
    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refused)
        # Limit the depth, because callers may recurse.
        level = [value]
        for _ in range(_DEEPEST):
            level = [inner for each in level for inner in _inside(each) if isinstance(inner, dict | list)]
        if level:
            raise ValueError(f"nested deeper than {_DEEPEST} levels")
        return value
    except (ValueError, RecursionError) as fault:
        reason = " ".join(str(fault).split())
        raise error(f"{path}: not readable as JSON ({reason}), expected {expected}") from None


def to_json(value: Any) -> str:
    """One line of strict JSON; a float that is not finite, which JSON cannot hold, becomes null."""
    return json.dumps(_finite(value), allow_nan=False)


def numbered_lines(
    path: str | os.PathLike[str], longest: int, expected: str, error: type[UserError] = UserError
) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their ends, from number 1; foreign bytes become U+FFFD.

    A line of more than `longest` characters is rejected before it fills memory. Raises `error`, and OSError.
    """
    raw = open_bounded(path, error)
    with io.TextIOWrapper(raw, "utf-8-sig", "replace", newline="") as file:
        start = raw.read(4)
        raw.seek(0)
        for mark, remedy in _NO_TEXT.items():
            if start.startswith(mark):
                raise error(f"{path}: {remedy}")
        number = 0
        while line := file.readline(longest + 1):
            number += 1
            if len(line) > longest:
                raise error(f"{path}: line {number}: longer than {longest} characters, expected {expected}")
            yield number, line


def open_own(path: str | os.PathLike[str], mode: str) -> IO[Any]:
    """Opens a file in a run's folder to write or append; text is UTF-8.

    Raises UserError for a link, which could lead from a foreign folder to any of the user's files.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)

    try:
        return open(path, mode, encoding=None if "b" in mode else "utf-8", opener=opener)
    except OSError as fault:
        if fault.errno != errno.ELOOP:
            raise
        raise UserError(f"{path}: is a link, and writes do not follow links; give another folder") from None


def check_file(path: Path) -> None:
    """Raises UserError if `new_file` could not write there; call it before long work."""
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{path}: cannot be written; give a file in a folder that exists")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write in a temporary folder; it becomes `path` if the block succeeds.

    A link at `path` is replaced, not followed.
    """
    check_file(path)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        file = Path(folder) / "whole"
        yield file
        file.replace(path)


def write_whole(path: Path, text: str) -> None:
    """Writes a text as UTF-8, atomically."""
    try:
        with new_file(path) as file:
            file.write_text(text, encoding="utf-8")
    # The error of a full disk has no file name.
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    # float() also takes the scalars of numpy and torch
    return number if math.isfinite(number := float(value)) else None
