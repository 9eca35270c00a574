"""The puzzle data set on disk: read and validated.

A data set is a folder `<data>/<split>/` with a `dataset.json` and, for each set named there, five arrays:
`<set>__inputs.npy` and `<set>__labels.npy` (examples, seq_len), `<set>__puzzle_identifiers.npy` (puzzles),
`<set>__puzzle_indices.npy` (puzzles + 1: where the examples of each puzzle begin) and
`<set>__group_indices.npy` (groups + 1: where the puzzles of each group begin). A group holds one original
puzzle and its augmentations. The layout is the official HRM code's: its data sets and these
are exchangeable.
"""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from hrm.errors import UserError

# About how many bytes a pass over a memory-mapped array or a file takes at a time.
CHUNK_BYTES = 1 << 23


class DatasetError(UserError):
    """A data set that is missing, damaged, or contradicts itself or what was asked of it."""


@dataclass(frozen=True)
class Metadata:
    """The contents of `dataset.json`.

    Labels equal to ignore_label_id carry no loss (None: every label counts); pad_id and blank_identifier_id
    fill up short batches; mean_puzzle_examples is the mean number of examples of a puzzle.
    """

    pad_id: int
    ignore_label_id: int | None
    blank_identifier_id: int
    vocab_size: int
    seq_len: int
    num_puzzle_identifiers: int
    total_groups: int
    mean_puzzle_examples: float
    sets: list[str]


@dataclass(frozen=True)
class PuzzleSet:
    """The arrays of one set, integers: inputs and labels (N, S), puzzle_identifiers (P,), puzzle_indices
    (P + 1,) into the examples, group_indices (G + 1,) into the puzzles."""

    inputs: np.ndarray
    labels: np.ndarray
    puzzle_identifiers: np.ndarray
    puzzle_indices: np.ndarray
    group_indices: np.ndarray


ARRAYS = tuple(field.name for field in fields(PuzzleSet))
MAPPED = ("inputs", "labels")
# A further array that a set may have: how hard each example is. The official reader leaves it alone.
DIFFICULTY = "difficulty"


def read_metadata(path: Path) -> Metadata:
    """Read and check a dataset.json; keys it does not know are left alone. Raises DatasetError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatasetError(
            f"{path}: no such file, expected the description of the data set beside it"
        ) from None
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{path}: not readable as JSON ({_one_line(error)}); build the data set again"
        ) from None
    if not isinstance(values, dict):
        raise DatasetError(f"{path}: expected a JSON object, found {type(values).__name__}")

    def whole(key: str, low: int) -> int:
        value = values[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise DatasetError(f"{path}: {key} is {value!r}, expected a whole number of at least {low}")
        return value

    values.setdefault("ignore_label_id", None)
    missing = [field.name for field in fields(Metadata) if field.name not in values]
    if missing:
        raise DatasetError(
            f"{path}: no {', '.join(missing)}; expected every field of the data set's description"
        )
    ignore = values["ignore_label_id"]
    if ignore is not None and (isinstance(ignore, bool) or not isinstance(ignore, int)):
        raise DatasetError(f"{path}: ignore_label_id is {ignore!r}, expected a whole number or null")
    mean = values["mean_puzzle_examples"]
    if isinstance(mean, bool) or not isinstance(mean, (int, float)) or not 0 < mean < math.inf:
        raise DatasetError(f"{path}: mean_puzzle_examples is {mean!r}, expected a number above 0")
    names = values["sets"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DatasetError(f"{path}: sets is {names!r}, expected a list of at least one name")
    for name in names:
        # A name becomes part of a file name: it must not lead out of the folder.
        if not name or "/" in name or "\\" in name or ".." in name or "\0" in name:
            raise DatasetError(
                f"{path}: set name {name!r}, expected a plain name without path separators or '..'"
            )
        if names.count(name) > 1:
            raise DatasetError(f"{path}: set name {name!r} is there twice, expected every name once")
    metadata = Metadata(
        pad_id=whole("pad_id", 0),
        ignore_label_id=ignore,
        blank_identifier_id=whole("blank_identifier_id", 0),
        vocab_size=whole("vocab_size", 1),
        seq_len=whole("seq_len", 1),
        num_puzzle_identifiers=whole("num_puzzle_identifiers", 1),
        total_groups=whole("total_groups", 1),
        mean_puzzle_examples=float(mean),
        sets=names,
    )
    for key, bound in (("pad_id", "vocab_size"), ("blank_identifier_id", "num_puzzle_identifiers")):
        if getattr(metadata, key) >= getattr(metadata, bound):
            value, limit = getattr(metadata, key), getattr(metadata, bound)
            raise DatasetError(f"{path}: {key} is {value}, expected less than {bound} {limit}")
    return metadata


def array_path(folder: Path, set_name: str, array: str) -> Path:
    """File of one array of a set."""
    return folder / f"{set_name}__{array}.npy"


def read_set(folder: Path, name: str, meta: Metadata) -> PuzzleSet:
    """Open the arrays of one set and check them against each other and the metadata. Raises DatasetError."""
    paths = {array: array_path(folder, name, array) for array in ARRAYS}
    arrays = {array: _load(path, mapped=array in MAPPED) for array, path in paths.items()}
    part = PuzzleSet(**arrays)
    for array in MAPPED:
        _check_shape(paths[array], arrays[array], 2)
        if arrays[array].shape[1] != meta.seq_len:
            raise _damage(
                paths[array],
                f"rows of {arrays[array].shape[1]} cells, dataset.json says seq_len {meta.seq_len}",
            )
    for array in ARRAYS[2:]:
        _check_shape(paths[array], arrays[array], 1)
    examples, puzzles = len(part.inputs), len(part.puzzle_identifiers)
    if len(part.labels) != examples:
        raise _damage(paths["labels"], f"{len(part.labels)} rows, but the inputs have {examples}")
    if len(part.puzzle_indices) != puzzles + 1:
        raise _damage(
            paths["puzzle_indices"],
            f"length {len(part.puzzle_indices)}, expected one more than the {puzzles} puzzle identifiers",
        )
    _check_indices(paths["puzzle_indices"], part.puzzle_indices, examples, "examples")
    _check_indices(paths["group_indices"], part.group_indices, puzzles, "puzzles")
    vocab, ids = f"vocab_size {meta.vocab_size}", f"num_puzzle_identifiers {meta.num_puzzle_identifiers}"
    _check_range(paths["inputs"], part.inputs, meta.vocab_size, vocab)
    _check_range(paths["labels"], part.labels, meta.vocab_size, vocab, also=meta.ignore_label_id)
    _check_range(paths["puzzle_identifiers"], part.puzzle_identifiers, meta.num_puzzle_identifiers, ids)
    return part


def read_difficulty(folder: Path, name: str, examples: int) -> np.ndarray | None:
    """How hard each example of a set is, (examples,) int64; None where nothing says. Raises DatasetError."""
    path = array_path(folder, name, DIFFICULTY)
    if not path.exists():
        return None
    difficulty = _load(path, mapped=False)
    if difficulty.shape != (examples,):
        raise _damage(path, f"shape {difficulty.shape}, expected a number for each of {examples} examples")
    return difficulty


def _damage(path: Path, what: str) -> DatasetError:
    return DatasetError(f"{path}: {what}; the data set is damaged or incomplete, build or copy it again")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _load(path: Path, *, mapped: bool) -> np.ndarray:
    if not path.is_file():
        raise _damage(path, "no such file, but dataset.json names its set")
    try:
        array: Any = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    # A cut or foreign file makes NumPy raise nearly anything: end of file, struct, syntax and memory errors.
    except Exception as error:
        raise _damage(path, f"not a readable .npy array ({_one_line(error)})") from None
    if not isinstance(array, np.ndarray):
        raise _damage(path, "an archive, expected a single .npy array")
    if array.dtype.kind not in "iu":
        raise _damage(path, f"numbers of type {array.dtype}, expected integers")
    return array.view(np.ndarray) if mapped else array.astype(np.int64)


def _check_shape(path: Path, array: np.ndarray, ndim: int) -> None:
    if array.ndim != ndim or not array.size:
        raise _damage(path, f"shape {array.shape}, expected {('numbers', 'rows of cells')[ndim - 1]}")


def _check_indices(path: Path, indices: np.ndarray, end: int, of_what: str) -> None:
    if len(indices) < 2 or indices[0] != 0:
        raise _damage(
            path, f"starts with {indices[0]} and has length {len(indices)}, expected 0 and at least 2"
        )
    steps = indices[1:] > indices[:-1]
    if not steps.all():
        row = int(steps.argmin()) + 1
        raise _damage(
            path, f"row {row} holds {indices[row]} after {indices[row - 1]}, expected increasing numbers"
        )
    if indices[-1] != end:
        raise _damage(path, f"ends with {indices[-1]}, expected {end}, the number of {of_what}")


def _check_range(path: Path, array: np.ndarray, limit: int, reason: str, also: int | None = None) -> None:
    rows = max(1, CHUNK_BYTES // max(1, array[0].nbytes))
    for first in range(0, len(array), rows):
        chunk = array[first : first + rows]
        if chunk.max() < limit and (chunk.dtype.kind == "u" or chunk.min() >= 0):
            continue
        bad = (chunk < 0) | (chunk >= limit)
        if also is not None:
            bad &= chunk != also
        if bad.any():
            where = np.unravel_index(int(bad.argmax()), bad.shape)
            raise _damage(
                path,
                f"row {first + int(where[0])} holds {chunk[where]}, expected 0 <= value < {limit} ({reason})",
            )


def check_totals(path: Path, metadata: Metadata, sets: dict[str, PuzzleSet]) -> None:
    """Check the totals of a dataset.json against all its sets. Raises DatasetError."""
    groups = sum(len(part.group_indices) - 1 for part in sets.values())
    if groups != metadata.total_groups:
        raise _damage(path, f"total_groups is {metadata.total_groups}, but the arrays hold {groups} groups")
    mean = sum(len(part.inputs) for part in sets.values()) / sum(
        len(part.puzzle_identifiers) for part in sets.values()
    )
    if not math.isclose(mean, metadata.mean_puzzle_examples, rel_tol=1e-4):
        raise _damage(
            path, f"mean_puzzle_examples is {metadata.mean_puzzle_examples}, but the arrays give {mean:.6g}"
        )
