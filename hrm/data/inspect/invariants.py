"""Checks every invariant of a data set on disk, and reports all violations.

`format.read_set` stops at the first fault, because training must not start on damaged data. These checks
continue, in chunks of the memory maps, and skip only those that depend on a damaged part.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from hrm.common.errors import UserError
from hrm.common.text import literal
from hrm.data.checksums import CHECKSUMS, checksum_faults, read_contents
from hrm.data.format import (
    ARRAYS,
    CHUNK_BYTES,
    DIFFICULTY,
    MAPPED,
    MAX_DESCRIPTION_BYTES,
    MAX_NAMES_BYTES,
    DamagedFile,
    Metadata,
    array_path,
    ignored_labels,
    metadata_faults,
    open_array,
    read_description,
)
from hrm.data.puzzle_kinds import Kind, declared, kind_for, recognised

# Maximum number of reported violations per file; further ones are only counted.
MOST = 20
INDICES = {"puzzle_indices": "inputs", "group_indices": "puzzle_identifiers"}


class Findings:
    """The first MOST violations of each file, and their number."""

    def __init__(self) -> None:
        self.told: dict[Path, list[str]] = {}
        self.counts: Counter[Path] = Counter()

    def add(self, path: Path, what: str) -> None:
        self.add_rows(path, range(1), lambda _: what)

    def add_rows(self, path: Path, rows: Sequence[int] | np.ndarray, tell: Callable[[int], str]) -> None:
        """Adds a violation for each of `rows`; tell(row) describes it."""
        if not len(rows):
            return
        told = self.told.setdefault(path, [])
        told += [tell(int(row)) for row in rows[: MOST - len(told)]]
        self.counts[path] += len(rows)

    @property
    def total(self) -> int:
        return self.counts.total()

    def lines(self, folder: Path) -> Iterator[str]:
        """A line for each violation, with paths relative to `folder`."""
        for path, told in self.told.items():
            name = path.relative_to(folder)
            yield from (f"{name}: {what}" for what in told)
            if more := self.counts[path] - len(told):
                yield f"{name}: and {more} more"


@dataclass
class Split:
    """The readable parts of a split.

    facts: the valid fields of dataset.json. sets: by set, the arrays with the right type and number of
    dimensions, as memory maps. asked: the user's kind, which replaces that of dataset.json.
    """

    folder: Path
    facts: dict[str, Any]
    sets: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    asked: str | None = None

    @cached_property
    def kind(self) -> Kind | None:
        """The kind of the puzzles, by `puzzle_kinds.kind_of`; None if the sizes are unknown.

        Raises UserError if the user's kind does not fit the sizes.
        """
        if not {"vocab_size", "seq_len"} <= self.facts.keys():
            return None
        kind = kind_for(self.facts["vocab_size"], self.facts["seq_len"], self.facts.get("columns"))
        if self.asked is not None:
            return declared(kind, self.asked)
        if name := self.facts.get("kind"):
            # `check_split` reports a kind that does not fit.
            with suppress(UserError):
                return declared(kind, name)
            return replace(kind, name="tokens")
        examples = [pair for name in self.sets if (pair := self.examples(name)) is not None]
        return recognised(kind, examples, self.ignored)

    @property
    def ignored(self) -> tuple[int, ...]:
        """The labels that carry no loss."""
        return ignored_labels(self.facts.get("ignore_label_id"))

    def examples(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Inputs and labels (N, S) of a set; None if they contradict each other or dataset.json."""
        inputs, labels = (self.sets[name].get(array) for array in MAPPED)
        if inputs is None or labels is None or inputs.shape != labels.shape:
            return None
        return (inputs, labels) if inputs.shape[1] == self.facts.get("seq_len") else None

    def answers(self, inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Labels (..., S) int64; cells without loss get the input's token, except padding in ARC."""
        if self.kind is not None and self.kind.name == "arc":
            return labels.astype(np.int64)
        return np.where(np.isin(labels, self.ignored), inputs, labels).astype(np.int64)


def chunks(array: np.ndarray) -> Iterator[slice]:
    """Slices of the rows of an array, each of about CHUNK_BYTES."""
    step = max(1, CHUNK_BYTES // max(1, array[:1].nbytes))
    for first in range(0, len(array), step):
        yield slice(first, min(first + step, len(array)))


def check_split(folder: Path, findings: Findings, kind: str | None = None) -> Split:
    """Checks the files of a split against each other. kind: see `Split.asked`."""
    split = Split(folder, _description(folder / "dataset.json", findings), asked=kind)
    names = split.facts.get("sets")
    if names is None:
        names = sorted({path.name.split("__")[0] for path in folder.glob("?*__inputs.npy")})
    for name in names:
        split.sets[name] = _arrays(folder, name, findings)
        _check_set(split, name, findings)
    _check_totals(split, findings)
    _check_kind(split, findings)
    _check_sums(folder, names, findings)
    return split


def _description(path: Path, findings: Findings) -> dict[str, Any]:
    """The valid fields of a dataset.json."""
    values = _json(path, MAX_DESCRIPTION_BYTES, "a split's description", findings)
    if values is None:
        return {}
    if not isinstance(values, dict):
        findings.add(path, f"holds {type(values).__name__}, expected a JSON object")
        return {}
    wrong = set()
    for key, what in metadata_faults(values):
        findings.add(path, what)
        wrong.add(key)
    return {field.name: values.get(field.name) for field in fields(Metadata) if field.name not in wrong}


def _arrays(folder: Path, name: str, findings: Findings) -> dict[str, np.ndarray]:
    arrays = {}
    for array in (*ARRAYS, DIFFICULTY):
        path = array_path(folder, name, array)
        if array == DIFFICULTY and not path.exists():
            continue
        try:
            arrays[array] = open_array(path, 2 if array in MAPPED else 1)
        except DamagedFile as damage:
            findings.add(path, damage.what)
    return arrays


def _check_set(split: Split, name: str, findings: Findings) -> None:
    facts, arrays = split.facts, split.sets[name]
    paths = {array: array_path(split.folder, name, array) for array in (*ARRAYS, DIFFICULTY)}
    for array in MAPPED:
        if array in arrays and arrays[array].shape[1] != facts.get("seq_len", arrays[array].shape[1]):
            cells = arrays[array].shape[1]
            findings.add(paths[array], f"rows of {cells} cells, dataset.json says seq_len {facts['seq_len']}")
    for array, counted, more in (
        ("labels", "inputs", 0),
        (DIFFICULTY, "inputs", 0),
        ("puzzle_indices", "puzzle_identifiers", 1),
    ):
        if array in arrays and counted in arrays:
            there, wanted = len(arrays[array]), len(arrays[counted]) + more
            if there != wanted:
                found = f"{there} rows, expected {wanted}, as the {counted} are {len(arrays[counted])}"
                findings.add(paths[array], found)
    for array, counted in INDICES.items():
        if array in arrays:
            _check_indices(paths[array], arrays[array], arrays.get(counted), counted, findings)
    limits = {"inputs": "vocab_size", "labels": "vocab_size", "puzzle_identifiers": "num_puzzle_identifiers"}
    for array, bound in limits.items():
        if array in arrays and bound in facts:
            also = split.ignored if array == "labels" else ()
            _check_range(paths[array], arrays[array], bound, facts[bound], also, findings)


def _check_indices(
    path: Path, indices: np.ndarray, counted: np.ndarray | None, what: str, findings: Findings
) -> None:
    if indices[0] != 0:
        findings.add(path, f"row 0 holds {indices[0]}, expected 0")
    if len(indices) < 2:
        findings.add(path, "one number, expected at least 2")
    wrong = np.nonzero(indices[1:] <= indices[:-1])[0] + 1
    findings.add_rows(
        path, wrong, lambda row: f"row {row} holds {indices[row]} after {indices[row - 1]}, expected more"
    )
    if counted is not None and indices[-1] != len(counted):
        findings.add(path, f"ends with {indices[-1]}, expected {len(counted)}, the number of {what}")


def _check_range(
    path: Path, array: np.ndarray, bound: str, limit: int, also: tuple[int, ...], findings: Findings
) -> None:
    for rows in chunks(array):
        chunk = array[rows].reshape(rows.stop - rows.start, -1)
        bad = ((chunk < 0) | (chunk >= limit)) & ~np.isin(chunk, also)

        def tell(row: int, first: int = rows.start, chunk: np.ndarray = chunk, bad: np.ndarray = bad) -> str:
            cell = int(bad[row].argmax())
            where = f"row {first + row}" + (f", cell {cell}," if chunk.shape[1] > 1 else "")
            return f"{where} holds {chunk[row, cell]}, expected 0 to {limit - 1} ({bound} {limit})"

        findings.add_rows(path, np.nonzero(bad.any(axis=1))[0], tell)


def _check_totals(split: Split, findings: Findings) -> None:
    path, facts = split.folder / "dataset.json", split.facts
    sets = split.sets.values()
    if not sets:
        return
    if "total_groups" in facts and all("group_indices" in arrays for arrays in sets):
        groups = sum(len(arrays["group_indices"]) - 1 for arrays in sets)
        if groups != facts["total_groups"]:
            findings.add(
                path, f"total_groups is {facts['total_groups']}, but the arrays hold {groups} groups"
            )
    if "mean_puzzle_examples" in facts and all({"inputs", "puzzle_identifiers"} <= a.keys() for a in sets):
        puzzles = sum(len(arrays["puzzle_identifiers"]) for arrays in sets)
        mean = sum(len(arrays["inputs"]) for arrays in sets) / puzzles
        if not math.isclose(mean, facts["mean_puzzle_examples"], rel_tol=1e-4):
            said = facts["mean_puzzle_examples"]
            findings.add(path, f"mean_puzzle_examples is {said}, but the arrays give {mean:.6g}")


def _check_kind(split: Split, findings: Findings) -> None:
    if split.kind is not None and any(split.examples(name) for name in split.sets):
        try:
            declared(split.kind, split.facts.get("kind") or split.kind.name)
        except UserError as fault:
            findings.add(split.folder / "dataset.json", str(fault))


def _check_sums(folder: Path, names: Sequence[str], findings: Findings) -> None:
    """Checks the bytes of every file against checksums.json, if there is one."""
    if not (folder / CHECKSUMS).exists():
        return
    paths = [array_path(folder, name, array) for name in names for array in (*ARRAYS, DIFFICULTY)]
    listed = _json(folder / CHECKSUMS, MAX_DESCRIPTION_BYTES, "the checksums of a split", findings)
    if listed is not None:
        there = [path for path in [folder / "dataset.json", *paths] if path.is_file()]
        for name, what in checksum_faults(listed, read_contents((), there).sums):
            findings.add(folder / name, what)


def check_identifiers(folder: Path, splits: list[Split], findings: Findings) -> None:
    """Checks identifiers.json: a name for every puzzle identifier, each name once."""
    path = folder / "identifiers.json"
    names = _json(path, MAX_NAMES_BYTES, "a list of names", findings)
    if names is None:
        return
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        findings.add(path, "expected a list of names")
        return
    for split in splits:
        count = split.facts.get("num_puzzle_identifiers", len(names))
        if len(names) != count:
            where = f"{split.folder.name}/dataset.json says num_puzzle_identifiers {count}"
            findings.add(path, f"{len(names)} names, but {where}")
    first: dict[str, int] = {}
    again = [row for row, name in enumerate(names) if first.setdefault(name, row) != row]
    findings.add_rows(
        path, again, lambda row: f"name {row}, {literal(names[row])}, is also name {first[names[row]]}"
    )


def check_same_task(splits: list[Split], findings: Findings) -> None:
    """Checks that one model fits all splits."""
    for split in splits[1:]:
        for key in ("seq_len", "vocab_size", "num_puzzle_identifiers"):
            here, there = split.facts.get(key), splits[0].facts.get(key)
            if here != there and None not in (here, there):
                what = f"{key} is {here}, but {there} in {splits[0].folder.name}"
                findings.add(split.folder / "dataset.json", what)


def leaks(train: Split, test: Split) -> Iterator[tuple[Path, np.ndarray]]:
    """Training label rows that are also test label rows, by file, in chunks."""
    known = np.unique([digest for name in test.sets for _, found in _digests(test, name) for digest in found])
    for name in train.sets:
        for first, found in _digests(train, name):
            again = np.isin(found, known)
            yield array_path(train.folder, name, "labels"), np.nonzero(again)[0] + first


def _digests(split: Split, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each chunk's first row and a 16-byte hash of each answer, independent of the integer type."""
    if examples := split.examples(name):
        for rows in chunks(examples[1]):
            answers = np.ascontiguousarray(split.answers(*(array[rows] for array in examples)))
            digests = [blake2b(row, digest_size=16).digest() for row in answers]
            yield rows.start, np.array(digests, "S16")


def _json(path: Path, limit: int, expected: str, findings: Findings) -> Any:
    """The contents of a JSON file; None if it cannot be read."""
    try:
        values = read_description(path, limit, expected)
    except DamagedFile as damage:
        findings.add(path, damage.what)
        return None
    if values is None:
        findings.add(path, "holds null")
    return values
