"""Checks that the files of a split are intact, and that they do not change after they are opened.

Builders write `checksums.json` next to the arrays, `{file name: {"size": bytes, "sha256": hex}}`; official
data sets have none. A run checks its open files again before every batch, because reading the memory map of a
truncated file kills the process.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hrm.common.text import literal
from hrm.data.format import DatasetError

DESCRIPTION, CHECKSUMS = "dataset.json", "checksums.json"
_KIND = re.compile(rb',\s*"kind":\s*"[a-z]*"')
# Small enough to stay in the processor's cache for the second digest.
_PIECE_BYTES = 1 << 18

# Entries by file name: {"size": bytes, "sha256": hex}.
Sums = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Contents:
    """The fingerprint of all files, and the size and digest of each."""

    fingerprint: str
    sums: Sums


def read_contents(
    paths: Sequence[Path], further: Sequence[Path] = (), *, with_kind: bool = False
) -> Contents:
    """Digests of files with different names; each file is read once.

    paths: files of the fingerprint, a SHA-256 (hex) over their sizes and bytes in this order. The fingerprint
    omits the declared kind, so that declaring it does not change the fingerprint; with_kind=True includes it.
    further: files outside the fingerprint.
    """
    together = hashlib.sha256()
    sums: Sums = {}
    buffer = memoryview(bytearray(_PIECE_BYTES))
    for path in (*paths, *further):
        own = hashlib.sha256()
        digests = [own] if path in further else [own, together]
        if path.name == DESCRIPTION and path not in further and not with_kind:
            content = path.read_bytes()
            plain = _KIND.sub(b"", content)
            own.update(content)
            together.update(len(plain).to_bytes(8, "little") + plain)
            sums[path.name] = {"size": len(content), "sha256": own.hexdigest()}
            continue
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if path not in further:
                # Hash the size first, so that no byte can move to a neighbouring file unnoticed.
                together.update(size.to_bytes(8, "little"))
            while count := file.readinto(buffer):
                for digest in digests:
                    digest.update(buffer[:count])
        sums[path.name] = {"size": size, "sha256": own.hexdigest()}
    return Contents(together.hexdigest(), sums)


def write_checksums(folder: Path, paths: Sequence[Path]) -> None:
    """Writes the checksums.json of finished files in a folder."""
    text = json.dumps(read_contents((), paths).sums, indent=1) + "\n"
    (folder / CHECKSUMS).write_text(text, encoding="utf-8")


def checksum_faults(listed: Any, found: Sums) -> Iterator[tuple[str, str]]:
    """Each file that differs from checksums.json, with a description of the difference.

    listed: the unchecked contents of checksums.json. found: the checksums of the existing files.
    """
    if not isinstance(listed, dict):
        yield CHECKSUMS, f"holds {type(listed).__name__}, expected a JSON object"
        return
    for name in sorted(listed.keys() | found.keys()):
        if name not in found:
            yield CHECKSUMS, f"lists {literal(name)}, which is not a file of the split"
        elif name not in listed:
            yield CHECKSUMS, f"does not list {name}"
        elif listed[name] != found[name]:
            yield name, f"its bytes are not those that {CHECKSUMS} lists"


def changed_files(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Descriptions of the differences between two splits' `digests`: ["x.npy changed", ...]."""
    both = [f"{name} changed" for name in old if name in new and new[name] != old[name]]
    gone = [f"{name} is gone" for name in old if name not in new]
    return [*both, *gone, *(f"{name} is new" for name in new if name not in old)]


class _State(NamedTuple):
    """A file's identity, size and modification time in nanoseconds."""

    device: int
    inode: int
    size: int
    written: int


class Snapshot:
    """The states of files before they were opened."""

    def __init__(self) -> None:
        self._states: dict[str, _State | None] = {}

    def add(self, *paths: Path) -> None:
        """Records the present states of files, which may be missing."""
        self._states |= {str(path): _state(str(path)) for path in paths}

    def check(self, paths: Sequence[str] | None = None) -> None:
        """Raises DatasetError for the first changed file among `paths`, or among all."""
        for path in self._states if paths is None else paths:
            before, now = self._states[path], _state(path)
            if now != before:
                raise DatasetError(
                    f"{path}: {_change(before, now)} after it was opened; restore the file, "
                    "and the same command continues from the last checkpoint"
                )


def _state(path: str) -> _State | None:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _State(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _change(before: _State | None, now: _State | None) -> str:
    if now is None:
        return "was removed"
    if before is None:
        return "was made"
    if now.size != before.size:
        return f"{'shrank' if now.size < before.size else 'grew'} from {before.size:,} to {now.size:,} bytes"
    if now.inode != before.inode or now.device != before.device:
        return "was replaced by another file"
    return "was written to"
