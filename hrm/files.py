"""Files that a command writes for its user: whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from hrm.errors import UserError


def check_file(path: Path) -> None:
    """Raise UserError when `new_file` could not write there: to know before hours of work."""
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{path}: cannot be written; give a file in a folder that exists")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write, alone in a folder beside `path`; it takes that name when the block ends well."""
    check_file(path)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        file = Path(folder) / "whole"
        yield file
        file.replace(path)


def write_whole(path: Path, text: str) -> None:
    """Writes a text as UTF-8, whole or not at all."""
    with new_file(path) as file:
        file.write_text(text, encoding="utf-8")
