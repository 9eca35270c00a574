"""The file format of puzzle data sets: reads and validates files.

A data set is a folder `<data>/<split>/` with a `dataset.json` and, for each set named there, five arrays:
`<set>__inputs.npy` and `<set>__labels.npy` (examples, seq_len), `<set>__puzzle_identifiers.npy` (puzzles),
`<set>__puzzle_indices.npy` (puzzles + 1: where the examples of each puzzle begin) and
`<set>__group_indices.npy` (groups + 1: where the puzzles of each group begin). A group holds one original
puzzle and its augmentations. The format is that of the official HRM code, and each program can read the
other's data.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from hrm.common.errors import UserError
from hrm.common.files import read_json
from hrm.common.text import literal, one_line

# Approximate chunk size in bytes for passes over a memory map.
CHUNK_BYTES = 1 << 23
# Maximum bytes of JSON files. 128 MiB hold the names of three million puzzles; ARC with a thousand
# augmentations of each task has one million.
MAX_DESCRIPTION_BYTES, MAX_NAMES_BYTES = 1 << 20, 1 << 27
# Maximum bytes of an array's header; NumPy writes 128.
MAX_HEADER_BYTES = 1 << 14
# The integers of a dataset.json with their ranges. Three of them determine the size of a model, so absurd
# values are rejected here, before any allocation.
NUMBERS = {
    "pad_id": (0, 1 << 20),
    "blank_identifier_id": (0, 1 << 27),
    "vocab_size": (1, 1 << 20),
    "seq_len": (1, 1 << 16),
    "num_puzzle_identifiers": (1, 1 << 27),
    "total_groups": (1, 1 << 40),
}
MAX_MEAN = 1 << 40
# Maximum number of sets, and of bytes in a set's name: its file names must stay within 255 bytes.
MAX_SETS, MAX_SET_NAME = 1000, 200
# The kinds of puzzle that a data set may declare; "tokens" is any sequence task.
KINDS = ("sudoku", "maze", "arc", "tokens")
# A label that never carries loss, whatever ignore_label_id is: PyTorch's own index for ignored targets.
IGNORE_LABEL = -100
# The effect of a wrong total in dataset.json.
SCHEDULE_ONLY = "it only sets the length of the schedule"


class DatasetError(UserError):
    """A data set that is missing, damaged, contradictory, or unfit for the request."""


class DamagedFile(DatasetError):
    """A damaged file of a data set, with its path and the fault."""

    def __init__(
        self,
        path: Path,
        what: str,
        remedy: str = "the data set is damaged or incomplete; build or copy it again",
    ) -> None:
        super().__init__(f"{path}: {what}; {remedy}")
        self.path, self.what = path, what


@dataclass(frozen=True)
class Metadata:
    """The contents of `dataset.json`.

    Labels equal to ignore_label_id carry no loss (None: every label counts). pad_id and blank_identifier_id
    pad short batches. mean_puzzle_examples is the mean number of examples per puzzle. kind: one of KINDS,
    None if not declared. columns: cells in a row of a board that is not square, else None.
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
    kind: str | None = None
    columns: int | None = None


@dataclass(frozen=True)
class PuzzleSet:
    """The integer arrays of one set.

    inputs, labels: (N, S). puzzle_identifiers: (P,). puzzle_indices: (P + 1,), where each puzzle's examples
    begin. group_indices: (G + 1,), where each group's puzzles begin.
    """

    inputs: np.ndarray
    labels: np.ndarray
    puzzle_identifiers: np.ndarray
    puzzle_indices: np.ndarray
    group_indices: np.ndarray


ARRAYS = tuple(field.name for field in fields(PuzzleSet))
MAPPED = ("inputs", "labels")
# An optional array of a set: the difficulty of each example. The official reader ignores it.
DIFFICULTY = "difficulty"


def read_description(path: Path, limit: int, expected: str) -> Any:
    """The contents of a JSON file of a data set, of at most `limit` bytes. Raises DamagedFile."""
    try:
        return read_json(path, limit, expected)
    except FileNotFoundError:
        raise DamagedFile(path, "no such file") from None
    except UserError as fault:
        raise DamagedFile(path, str(fault).removeprefix(f"{path}: ")) from None


def read_names(folder: str | Path) -> list[str]:
    """The name of every puzzle identifier of a data set, from its identifiers.json. Raises DatasetError."""
    path = Path(folder) / "identifiers.json"
    expected = "the list of names that the builder of the data set wrote; build or copy it again"
    try:
        names = read_json(path, MAX_NAMES_BYTES, expected, DatasetError)
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file, expected {expected}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DatasetError(f"{path}: no list of names, expected {expected}")
    return names


def read_metadata(path: Path) -> Metadata:
    """Reads and checks a dataset.json, ignoring unknown keys. Raises DamagedFile."""
    values = read_description(path, MAX_DESCRIPTION_BYTES, "a split's description")
    if not isinstance(values, dict):
        raise DamagedFile(path, f"holds {type(values).__name__}, expected a JSON object")
    for _, what in metadata_faults(values):
        raise DamagedFile(path, what)
    known: dict[str, Any] = {field.name: values.get(field.name) for field in fields(Metadata)}
    return Metadata(**known | {"mean_puzzle_examples": float(values["mean_puzzle_examples"])})


def metadata_faults(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each invalid field of a dataset.json, with the fault."""

    def expected(key: str, what: str) -> tuple[str, str]:
        there = f"is {literal(values[key])}" if key in values else "is missing"
        return key, f"{key} {there}, expected {what}"

    for key, (low, high) in NUMBERS.items():
        if not _is_whole(values.get(key), low, high):
            yield expected(key, f"a whole number from {low} to {high}")
    ignore = values.get("ignore_label_id")
    # Batches are int32.
    if ignore is not None and not _is_whole(ignore, -(1 << 31), (1 << 31) - 1):
        yield expected("ignore_label_id", "a whole number of 32 bits or null")
    mean = values.get("mean_puzzle_examples")
    if isinstance(mean, bool) or not isinstance(mean, int | float) or not 0 < mean <= MAX_MEAN:
        yield expected("mean_puzzle_examples", f"a number above 0 and up to {MAX_MEAN}")
    kind, columns = values.get("kind"), values.get("columns")
    if kind is not None and kind not in KINDS:
        yield expected("kind", f"one of {', '.join(KINDS)}, or no such key")
    cells = values.get("seq_len")
    if columns is not None and not (
        _is_whole(columns, 1, NUMBERS["seq_len"][1]) and isinstance(cells, int) and cells % columns == 0
    ):
        yield expected("columns", f"a divisor of seq_len {literal(cells)}, or no such key")
    names: Any = values.get("sets")
    listed = isinstance(names, list) and 0 < len(names) <= MAX_SETS and all(map(_is_plain, names))
    if not listed or len(set(names)) != len(names):
        yield expected("sets", f"a list of different plain names, at least one and at most {MAX_SETS}")
    for key, bound in (("pad_id", "vocab_size"), ("blank_identifier_id", "num_puzzle_identifiers")):
        value: Any = values.get(key)
        limit: Any = values.get(bound)
        if _is_whole(value, *NUMBERS[key]) and _is_whole(limit, *NUMBERS[bound]) and value >= limit:
            yield expected(key, f"less than {bound} {limit}")


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_plain(name: Any) -> bool:
    """Whether the files of a set with this name stay in the split's folder on every system.

    Links are followed: data files cannot create links, so the user has made them.
    """
    return (
        isinstance(name, str)
        and name.isprintable()
        and 0 < len(name.encode()) <= MAX_SET_NAME
        and not set(name) & set("/\\:")
        and ".." not in name
    )


def array_path(folder: Path, set_name: str, array: str) -> Path:
    """The file of one array of a set."""
    return folder / f"{set_name}__{array}.npy"


def open_array(path: Path, dimensions: int) -> np.ndarray:
    """Opens the integers of a .npy file as a memory map, after checking its header.

    dimensions: 1 for numbers, 2 for rows of cells. Raises DamagedFile.
    """
    if not path.is_file():
        raise DamagedFile(path, "no such file")
    with path.open("rb") as file:
        head = BytesIO(file.read(MAX_HEADER_BYTES))
        try:
            if np.lib.format.read_magic(head) == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(head)
            else:
                shape, fortran, dtype = np.lib.format.read_array_header_2_0(head)
        # On invalid files NumPy raises syntax, token, memory and recursion errors, among others.
        except Exception as error:
            raise DamagedFile(path, f"not a readable .npy array ({one_line(error)})") from None
        if dtype.kind not in "iu":
            raise DamagedFile(path, f"numbers of type {one_line(str(dtype), 60)}, expected integers")
        if len(shape) != dimensions or not all(_is_whole(count, 1, 1 << 48) for count in shape):
            expected = ("numbers", "rows of cells")[dimensions - 1]
            raise DamagedFile(path, f"shape {literal(shape)}, expected {expected}")
        offset, size = head.tell(), os.fstat(file.fileno()).st_size
        expected_size = offset + math.prod(shape) * dtype.itemsize
        if size != expected_size:
            raise DamagedFile(path, f"{size:,} bytes, expected {expected_size:,} for its shape {shape}")
        try:
            array = np.memmap(file, dtype, "r", offset, shape, "F" if fortran else "C")
        except (OSError, ValueError) as error:
            raise DamagedFile(path, f"cannot be mapped into memory ({one_line(error)})") from None
    return array.view(np.ndarray)


def read_set(folder: Path, name: str, meta: Metadata) -> PuzzleSet:
    """Opens the arrays of one set, checked against each other and the metadata. Raises DamagedFile."""
    paths = {array: array_path(folder, name, array) for array in ARRAYS}
    arrays = {array: open_array(path, 2 if array in MAPPED else 1) for array, path in paths.items()}
    for array in MAPPED:
        if arrays[array].shape[1] != meta.seq_len:
            raise DamagedFile(
                paths[array],
                f"rows of {arrays[array].shape[1]} cells, dataset.json says seq_len {meta.seq_len}",
            )
    lengths = {array: len(values) for array, values in arrays.items()}
    examples, puzzles = lengths["inputs"], lengths["puzzle_identifiers"]
    if lengths["labels"] != examples:
        raise DamagedFile(paths["labels"], f"{lengths['labels']} rows, but the inputs have {examples}")
    if lengths["puzzle_indices"] != puzzles + 1:
        found = f"length {lengths['puzzle_indices']}"
        raise DamagedFile(
            paths["puzzle_indices"], f"{found}, expected one more than the {puzzles} puzzle identifiers"
        )
    # Check lengths before copying into memory: every puzzle has an example, every group a puzzle.
    for array, most in (("puzzle_identifiers", examples), ("group_indices", puzzles + 1)):
        if lengths[array] > most:
            raise DamagedFile(paths[array], f"length {lengths[array]}, expected at most {most}")
    for array in ARRAYS[2:]:
        arrays[array] = _in_memory(paths[array], arrays[array])
    _check_indices(paths["puzzle_indices"], arrays["puzzle_indices"], examples, "examples")
    _check_indices(paths["group_indices"], arrays["group_indices"], puzzles, "puzzles")
    vocab, ids = f"vocab_size {meta.vocab_size}", f"num_puzzle_identifiers {meta.num_puzzle_identifiers}"
    _check_range(paths["inputs"], arrays["inputs"], meta.vocab_size, vocab)
    _check_range(
        paths["labels"], arrays["labels"], meta.vocab_size, vocab, also=ignored_labels(meta.ignore_label_id)
    )
    identifiers = arrays["puzzle_identifiers"]
    _check_range(paths["puzzle_identifiers"], identifiers, meta.num_puzzle_identifiers, ids)
    return PuzzleSet(**arrays)


def read_difficulty(folder: Path, name: str, examples: int) -> np.ndarray | None:
    """The difficulty of each example of a set, (examples,) int64, or None. Raises DamagedFile."""
    path = array_path(folder, name, DIFFICULTY)
    if not path.exists():
        return None
    difficulty = open_array(path, 1)
    if len(difficulty) != examples:
        raise DamagedFile(
            path, f"shape {difficulty.shape}, expected a number for each of {examples} examples"
        )
    return _in_memory(path, difficulty)


def ignored_labels(ignore_label_id: int | None) -> tuple[int, ...]:
    """The labels that carry no loss. The official reader passes -100 to the loss, which ignores it."""
    return (IGNORE_LABEL,) if ignore_label_id is None else (IGNORE_LABEL, ignore_label_id)


def first_outside(values: np.ndarray, limit: int, also: tuple[int, ...] = ()) -> tuple[int, ...] | None:
    """The index of the first integer that is neither in 0 to limit - 1 nor in `also`; None without one."""
    if not values.size or (values.max() < limit and (values.dtype.kind == "u" or values.min() >= 0)):
        return None
    bad = ((values < 0) | (values >= limit)) & ~np.isin(values, also)
    if not bad.any():
        return None
    return tuple(int(index) for index in np.unravel_index(int(bad.argmax()), bad.shape))


def out_of_range(path: Path, row: int, value: Any, limit: int, reason: str) -> DamagedFile:
    """The error of a value that `first_outside` found. reason: the origin of the limit."""
    what = f"row {row} holds {value}, expected 0 <= value < {limit} ({reason})"
    if value < 0 and path.name.endswith("__labels.npy"):
        remedy = f"if {value} marks labels that do not count, set ignore_label_id to it in dataset.json"
        return DamagedFile(path, what, remedy)
    return DamagedFile(path, what)


def _in_memory(path: Path, array: np.ndarray) -> np.ndarray:
    """A copy in int64."""
    if array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max:
        raise DamagedFile(path, f"row {int(array.argmax())} holds {array.max()}, expected at most 63 bits")
    try:
        return array.astype(np.int64)
    except MemoryError:
        raise DamagedFile(path, f"{len(array):,} numbers, more than there is memory for") from None


def _check_indices(path: Path, indices: np.ndarray, end: int, of_what: str) -> None:
    if len(indices) < 2 or indices[0] != 0:
        raise DamagedFile(
            path, f"starts with {indices[0]} and has length {len(indices)}, expected 0 and at least 2"
        )
    steps = indices[1:] > indices[:-1]
    if not steps.all():
        row = int(steps.argmin()) + 1
        raise DamagedFile(
            path, f"row {row} holds {indices[row]} after {indices[row - 1]}, expected increasing numbers"
        )
    if indices[-1] != end:
        raise DamagedFile(path, f"ends with {indices[-1]}, expected {end}, the number of {of_what}")


def _check_range(path: Path, array: np.ndarray, limit: int, reason: str, also: tuple[int, ...] = ()) -> None:
    rows = max(1, CHUNK_BYTES // max(1, array[0].nbytes))
    for first in range(0, len(array), rows):
        chunk = array[first : first + rows]
        if where := first_outside(chunk, limit, also):
            raise out_of_range(path, first + where[0], chunk[where], limit, reason)


def true_totals(metadata: Metadata, sets: Mapping[str, PuzzleSet]) -> tuple[Metadata, list[str]]:
    """The metadata with totals computed from the arrays, and a line for each wrong total in dataset.json.

    The totals only set the length of the schedule, so wrong ones damage no data.
    """
    groups = sum(len(part.group_indices) - 1 for part in sets.values())
    mean = sum(len(part.inputs) for part in sets.values()) / sum(
        len(part.puzzle_identifiers) for part in sets.values()
    )
    notes = []
    if groups != metadata.total_groups:
        notes.append(f"total_groups is {metadata.total_groups}, but the arrays hold {groups} groups")
        metadata = replace(metadata, total_groups=groups)
    if not math.isclose(mean, metadata.mean_puzzle_examples, rel_tol=1e-4):
        there = metadata.mean_puzzle_examples
        notes.append(f"mean_puzzle_examples is {there:g}, but the arrays give {mean:.6g}")
        metadata = replace(metadata, mean_puzzle_examples=mean)
    return metadata, notes
