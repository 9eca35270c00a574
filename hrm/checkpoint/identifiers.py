"""The names of a puzzle table's rows: a learnt embedding belongs to a name, not to a row number.

A checkpoint holds a hash of each name in `identifiers.safetensors`. Names of one puzzle in this project's,
HRM's and TRM's data sets have one hash.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hrm.checkpoint.safe_io import CheckpointError, read_safetensors
from hrm.common.hub import is_remote
from hrm.common.text import with_sources
from hrm.data.format import DatasetError, read_names

IDENTIFIERS, NAMES = "identifiers.safetensors", "identifiers.json"
# The name of rows without a puzzle.
BLANK = "<blank>"
_KEY = "hashes"


@dataclass(frozen=True)
class Identifiers:
    """The names of the rows of a puzzle table.

    source: the file of the names, which may be missing. hashes: (rows,) int64, None if the names are unknown.
    """

    source: Path
    hashes: Tensor | None

    def row_of(self, name: str) -> int | None:
        """The row of a name; None for an unknown one."""
        if self.hashes is None:
            return None
        rows = (self.hashes == hashes_of([name])).nonzero()
        return int(rows[0]) if len(rows) else None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the file IDENTIFIERS in a checkpoint."""
        return {} if self.hashes is None else {_KEY: self.hashes}


def hashes_of(names: Iterable[str]) -> Tensor:
    """The first 64 bits of each name's BLAKE2b hash, (N,) int64."""
    # TRM separates the parts of a name by |||, HRM and this project by _.
    texts = (name.replace("|||", "_").encode("utf-8", "surrogatepass") for name in names)
    digests = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts)
    return torch.from_numpy(np.frombuffer(digests, "<i8").astype(np.int64))


def identifiers_of_data(folder: str | Path, rows: int) -> Identifiers:
    """The names of a data set with `rows` identifiers; unknown unless the list is complete."""
    path = Path(folder) / NAMES
    try:
        names = read_names(folder)
    except DatasetError:
        names = []
    return Identifiers(path, hashes_of(names) if len(names) == rows else None)


def identifiers_of_checkpoint(file: Path, rows: int) -> Identifiers:
    """The names of the table in a weights file, from the files next to it. Raises CheckpointError."""
    path = file.parent / IDENTIFIERS
    if not path.is_file():
        return identifiers_of_data(file.parent, rows)
    hashes = read_safetensors(path).get(_KEY)
    if hashes is None or hashes.dtype != torch.int64 or hashes.shape != (rows,):
        raise CheckpointError(
            f"{path} does not hold a hash for each of {rows} puzzle embeddings; use another checkpoint"
        )
    return Identifiers(path, hashes)


def follow_names(
    table: Tensor, there: Identifiers, here: Identifiers, rows: int, file: Path, remedy: str
) -> tuple[Tensor, list[str]]:
    """The puzzle table for the data `here`, (rows, width), and notes for the user.

    table: the checkpoint's table, whose rows have the names `there`. A name in both keeps its vector; a new
    name starts at zero. If names are unknown, the table does not change. file: the checkpoint, for messages.
    Raises CheckpointError, which ends in `remedy`, if no puzzle is known.
    """
    if len(table) == rows == 1:
        return table, []
    if there.hashes is None or here.hashes is None:
        if len(table) != rows:
            return table, []
        missing, whose = (there, "that") if there.hashes is None else (here, "this")
        beside = with_sources(str(missing.source.parent))
        # The user cannot copy a file into a hub repository.
        folder = (
            "a folder with the other files of the checkpoint" if is_remote(beside) else f"{beside}/{NAMES}"
        )
        return table, [
            f"warning: {file}: its puzzle embeddings are matched by number, which is right only for the "
            f"training data; to match them by name, copy the {NAMES} of {whose} data to {folder}"
        ]
    if torch.equal(there.hashes, here.hashes):
        return table, []
    order = torch.argsort(there.hashes, stable=True)
    place = torch.searchsorted(there.hashes[order], here.hashes).clamp_(max=len(order) - 1)
    source = order[place]
    known = there.hashes[source] == here.hashes
    puzzles = here.hashes != hashes_of([BLANK])
    count, kept = int(puzzles.sum()), int((known & puzzles).sum())
    if count and not kept:
        raise CheckpointError(
            f"{file} knows none of the {count:,} puzzles named in {here.source}, so its puzzle embeddings "
            f"belong to others; {remedy}"
        )
    moved = table.new_zeros(rows, table.shape[1])
    moved[known] = table[source[known]]
    lost = len(table) - int(torch.isin(there.hashes, here.hashes).sum())
    text = f"{file}: {kept:,} of {count:,} puzzles are known by name and keep their embeddings"
    text += f"; {count - kept:,} new ones start fresh" if kept < count else ""
    return moved, [text + (f"; {lost:,} of the checkpoint's are not in this data" if lost else "")]
