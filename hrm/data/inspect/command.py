"""Inspects a data set: its contents, sample puzzles, violations (`python -m hrm.data inspect`).

Exit status: 0 if every check passes, 1 if the data set has a fault, 2 if there is no data set.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from hrm.common.errors import UserError
from hrm.common.figures import require_matplotlib
from hrm.common.files import check_file, new_file
from hrm.common.text import size_text
from hrm.data.boards import Tokens
from hrm.data.checksums import CHECKSUMS
from hrm.data.dataset import PuzzleDataset
from hrm.data.deviations import deviations
from hrm.data.format import DIFFICULTY, KINDS, DatasetError
from hrm.data.inspect.histogram import histogram
from hrm.data.inspect.invariants import (
    Findings,
    Split,
    check_identifiers,
    check_same_task,
    check_split,
    chunks,
    leaks,
)
from hrm.data.inspect.render import png
from hrm.data.inspect.rules import check_rules, check_unique
from hrm.data.puzzle_kinds import Kind

# Maximum vocabulary whose tokens are counted.
MOST_TOKENS = 1 << 12
MOST_SAMPLES = 100
# Maximum width, in characters, of two boards printed side by side.
MOST_COLUMNS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m hrm.data inspect`."""
    add = parser.add_argument
    add("path", type=Path, help="folder of a data set, or of one of its splits")
    add("--split", help="split to inspect: train or test (default: both)")
    add("--samples", type=int, default=2, help="random puzzles to show from each split (default 2)")
    add("--kind", choices=KINDS, help="the kind of puzzle (default: as declared, or by sizes)")
    add("--png", type=Path, metavar="FILE", help="also draw the samples into this file")
    add("--seed", type=int, default=0, help="seed of the samples (default 0)")
    add("--deep", action="store_true", help="solve every Sudoku, to check that it has one solution")
    parser.epilog = "exit status: 0 all checks passed, 1 the data set has a fault, 2 there is no data set"
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Checks a data set, and prints its contents and each violation.

    Raises UserError if there is no data set, SystemExit with status 1 if it has a fault.
    """
    if not 0 <= args.samples <= MOST_SAMPLES:
        raise UserError(f"samples={args.samples}: expected 0 to {MOST_SAMPLES}")
    if args.seed < 0:
        raise UserError(f"seed={args.seed}: expected at least 0")
    if args.png is not None:
        require_matplotlib()
        check_file(args.png)
    root, folders = _folders(args.path, args.split)
    findings = Findings()
    splits = [check_split(folder, findings, args.kind) for folder in folders]
    check_same_task(splits, findings)
    check_identifiers(root, splits, findings)
    for split in splits:
        check_rules(split, findings)
        if args.deep:
            check_unique(split, findings)
    shared = _check_leaks(splits, findings)
    drawn = {split.folder.name: _samples(split, args.samples, args.seed) for split in splits}
    print(f"{root}")
    for split in splits:
        print("\n".join(_statistics(split)))
        print("\n".join(_texts(split, drawn[split.folder.name])))
    if shared:
        print(f"{shared:,} training label rows are also in the test split")
    if args.png is not None:
        _draw(args.png, splits, drawn)
    print("\n".join(_notes(root, splits)))
    print("\n".join([*findings.lines(root), f"violations: {findings.total:,}"]))
    if findings.total:
        raise SystemExit(1)


def _notes(root: Path, splits: list[Split]) -> Iterator[str]:
    """Deviations that are not violations, for splits without checksums, which other programs wrote."""
    for split in splits:
        if split.asked is None and not (split.folder / CHECKSUMS).exists():
            with suppress(DatasetError):
                yield from (f"note: {text}" for text in deviations(PuzzleDataset(root, split.folder.name)))


def _folders(path: Path, wanted: str | None) -> tuple[Path, list[Path]]:
    """The data set's folder and the folders of its splits."""
    if not path.is_dir():
        raise DatasetError(f"{path}: no such folder; give the folder of a data set")
    if _is_split(path):
        if wanted not in (None, path.name):
            raise DatasetError(f"{path}: is the split {path.name}, not {wanted}; leave out --split")
        return path.parent, [path]
    # Put train before test.
    found = sorted((folder for folder in path.iterdir() if _is_split(folder)), reverse=True)
    folders = [folder for folder in found if wanted in (None, folder.name)]
    if not folders:
        if found:
            there = ", ".join(folder.name for folder in found)
            raise DatasetError(f"{path}: no split {wanted!r} in it; give one of {there}")
        raise DatasetError(f"{path}: not a data set; expected <split>/dataset.json and arrays")
    return path, folders


def _is_split(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "dataset.json").exists() or any(folder.glob("*__*.npy")))


def _check_leaks(splits: list[Split], findings: Findings) -> int:
    """Reports training labels that are also test labels. They are violations for Sudoku and mazes; for other
    kinds, different questions may share an answer, so they are only counted.
    """
    named = {split.folder.name: split for split in splits}
    count = 0
    if {"train", "test"} <= named.keys():
        kind = named["train"].kind
        for path, rows in leaks(named["train"], named["test"]):
            if kind is not None and kind.name in ("sudoku", "maze"):
                findings.add_rows(path, rows, "row {} is also a label of the test split".format)
            else:
                count += len(rows)
    return count


def _statistics(split: Split) -> Iterator[str]:
    kind = split.kind
    yield f"{split.folder.name}: {_kind_text(kind)}"
    for name, arrays in split.sets.items():
        counts = [
            f"{len(arrays[array]) - less:,} {what}"
            for what, array, less in (
                ("groups", "group_indices", 1),
                ("puzzles", "puzzle_identifiers", 0),
                ("examples", "inputs", 0),
            )
            if array in arrays
        ]
        yield f"  set {name}: {', '.join(counts)}"
        for what, array in (
            ("puzzles per group", "group_indices"),
            ("examples per puzzle", "puzzle_indices"),
        ):
            if array in arrays and len(arrays[array]) > 1:
                yield f"    {what}: {_range(np.diff(arrays[array]))}"
        if "puzzle_identifiers" in arrays:
            used = len(np.unique(arrays["puzzle_identifiers"]))
            known = split.facts.get("num_puzzle_identifiers", "?")
            yield f"    puzzle identifiers used: {used:,} of {known}"
        for array in ("inputs", "labels"):
            if array in arrays and kind is not None:
                yield f"    {array}: {_tokens(kind, arrays[array])}"
        if kind is not None and kind.name == "sudoku" and "inputs" in arrays:
            yield f"    clues: {_range(_clues(arrays['inputs']))}"
        if DIFFICULTY in arrays:
            yield "    difficulty:"
            yield from (f"      {line}" for line in histogram(arrays[DIFFICULTY]))
    files = sorted(path for path in split.folder.iterdir() if path.is_file())
    yield "  files: " + ", ".join(f"{path.name} {size_text(path.stat().st_size)}" for path in files)


def _kind_text(kind: Kind | None) -> str:
    if kind is None:
        return "puzzles of unknown sizes"
    return f"{kind.name}, {kind.rows} x {kind.cols} cells, vocabulary {kind.vocab_size}"


def _range(numbers: np.ndarray) -> str:
    least, most = int(numbers.min()), int(numbers.max())
    return f"{least:,}" if least == most else f"{least:,} to {most:,}, mean {numbers.mean():,.1f}"


def _clues(inputs: np.ndarray) -> np.ndarray:
    return np.concatenate([(inputs[rows] > 1).sum(axis=1) for rows in chunks(inputs)])


def _tokens(kind: Kind, array: np.ndarray) -> str:
    """The share of every token."""
    if kind.vocab_size > MOST_TOKENS:
        return f"vocabulary of {kind.vocab_size:,} tokens, not counted"
    counts = np.zeros(kind.vocab_size, np.int64)
    for rows in chunks(array):
        chunk = array[rows]
        known = chunk[(chunk >= 0) & (chunk < kind.vocab_size)]
        counts += np.bincount(known.astype(np.int64), minlength=kind.vocab_size)
    total = max(1, int(counts.sum()))
    shares = [f"{kind.symbol(token)} {count / total:.1%}" for token, count in enumerate(counts) if count]
    return ", ".join(shares[:16]) + (f" and {len(shares) - 16} more" if len(shares) > 16 else "")


@dataclass(frozen=True)
class Sample:
    """An example of a split: its set and row, and its input and label, (S,) integers."""

    name: str
    row: int
    question: np.ndarray
    answer: np.ndarray


def _samples(split: Split, count: int, seed: int) -> list[Sample]:
    """Random examples from all sets, in order."""
    usable = [(name, pair) for name in split.sets if (pair := split.examples(name)) is not None]
    ends = np.cumsum([len(inputs) for _, (inputs, _) in usable])
    if not len(ends) or split.kind is None:
        return []
    chosen = np.random.default_rng(seed).choice(ends[-1], min(count, ends[-1]), replace=False)
    samples = []
    for number in np.sort(chosen):
        place = int(np.searchsorted(ends, number, side="right"))
        name, (inputs, labels) = usable[place]
        row = int(number - (ends[place - 1] if place else 0))
        answer = split.answers(inputs[row], labels[row])
        samples.append(Sample(name, row, inputs[row].astype(np.int64), answer))
    return samples


def _texts(split: Split, samples: list[Sample]) -> Iterator[str]:
    kind, color = split.kind, sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for sample in samples:
        if kind is None:
            continue
        yield f"  {sample.name}, row {sample.row}, and its label:"
        left = kind.text(sample.question, color=color).splitlines()
        right = kind.text(sample.answer, sample.question, color).splitlines()
        # Widths without colour codes.
        room = [len(line) for line in kind.text(sample.question).splitlines()]
        gap = max(room) + 3
        if gap + max(len(line) for line in kind.text(sample.answer).splitlines()) > MOST_COLUMNS:
            yield from (f"    {line}" for line in (*left, "", *right))
            continue
        for first, second, taken in zip_longest(left, right, room, fillvalue=None):
            yield f"    {first or ''}{' ' * (gap - (taken or 0))}{second or ''}".rstrip()


def _draw(path: Path, splits: list[Split], drawn: dict[str, list[Sample]]) -> None:
    split = next((split for split in splits if drawn[split.folder.name]), None)
    if split is None or split.kind is None:
        raise UserError(f"{path}: there is no sample to draw; raise --samples or repair the data set")
    boards: list[tuple[str, Tokens, Tokens | None]] = []
    # A picture shows a single kind; splits of different kinds are a violation.
    for other in splits:
        if other.kind == split.kind:
            for sample in drawn[other.folder.name]:
                title = f"{other.folder.name}, {sample.name} {sample.row}"
                boards += [(title, sample.question, None), ("its label", sample.answer, sample.question)]
    with new_file(path) as file:
        file.write_bytes(png(split.kind, boards))
