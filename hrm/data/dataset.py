"""A split of a data set: opened and checked as a whole, fingerprinted, and drawn from in batches.

The training order can be drawn again exactly for a seed, from any batch on; a test split is walked once.
Before a batch is read its files are held against what was opened, and what is read against the vocabulary.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hrm.data.checksums import CHECKSUMS, Contents, Snapshot, checksum_faults, read_contents
from hrm.data.format import (
    ARRAYS,
    DIFFICULTY,
    MAPPED,
    MAX_DESCRIPTION_BYTES,
    DamagedFile,
    DatasetError,
    PuzzleSet,
    array_path,
    check_totals,
    first_outside,
    out_of_range,
    read_description,
    read_metadata,
    read_set,
)

# The label that carries no loss, in every batch.
IGNORE_LABEL = -100


class PuzzleDataset:
    """One split of a data set, checked as a whole when it is opened, with its checksums where it has them.

    path, split: the folder and the split in it ("train", "test"). It offers `metadata` and `sets`, name to
    PuzzleSet in the order of dataset.json, inputs and labels memory-mapped. Raises DatasetError with the
    file, the first bad row, its value and what was expected.
    """

    def __init__(self, path: str | Path, split: str) -> None:
        self.folder = Path(path) / split
        if not self.folder.is_dir():
            raise DatasetError(
                f"{self.folder}: no such folder, expected a data set's {split} split (dataset.json and its "
                f"arrays); build one with `python -m hrm.data sudoku --output-dir {path}`"
            )
        description = self.folder / "dataset.json"
        self._opened = Snapshot()
        self._opened.add(description)
        self.metadata = read_metadata(description)
        names = self.metadata.sets
        arrays = [array_path(self.folder, name, array) for name in names for array in ARRAYS]
        self._files = [description, *arrays]
        self._opened.add(*arrays)
        self.sets = {name: read_set(self.folder, name, self.metadata) for name in names}
        check_totals(description, self.metadata, self.sets)
        self._mapped = {
            name: [str(array_path(self.folder, name, array)) for array in MAPPED] for name in names
        }
        self._opened.check()
        self._verify()

    @cached_property
    def contents(self) -> Contents:
        """Fingerprint and sums of the files as they were opened. Raises DatasetError where they changed."""
        difficulty = [array_path(self.folder, name, DIFFICULTY) for name in self.metadata.sets]
        contents = read_contents(self._files, [path for path in difficulty if path.is_file()])
        self._opened.check()
        return contents

    def check_unchanged(self, name: str) -> None:
        """Raises DatasetError when a mapped file of the set `name` is not the one that was opened any more.

        To be called before rows are read: to read behind the new end of a file ends the process.
        """
        self._opened.check(self._mapped[name])

    def _verify(self) -> None:
        path = self.folder / CHECKSUMS
        if path.exists():
            listed = read_description(path, MAX_DESCRIPTION_BYTES, "the checksums of a split")
            for file, what in checksum_faults(listed, self.contents.sums):
                remedy = f"build or copy the data set again; if it was changed on purpose, delete {CHECKSUMS}"
                raise DamagedFile(self.folder / file, what, remedy)


def check_same_task(train: PuzzleDataset, test: PuzzleDataset) -> None:
    """Raise DatasetError unless one model fits both splits: same cells, vocabulary and puzzle identifiers."""
    for key in ("seq_len", "vocab_size", "num_puzzle_identifiers"):
        here, there = getattr(train.metadata, key), getattr(test.metadata, key)
        if here != there:
            raise DatasetError(
                f"{test.folder / 'dataset.json'}: {key} is {there}, but {here} in {train.folder.name}; build "
                "both splits together"
            )


def fingerprint(dataset: PuzzleDataset) -> str:
    """SHA-256 (hex) over the bytes of a split's dataset.json and of all its arrays, in a fixed order."""
    return dataset.contents.fingerprint


def digests(dataset: PuzzleDataset) -> dict[str, str]:
    """SHA-256 (hex) of each file that the fingerprint covers, by its name in the split's folder."""
    files = {path.name for path in dataset._files}
    return {name: sum["sha256"] for name, sum in dataset.contents.sums.items() if name in files}


@dataclass(frozen=True)
class Batch:
    """One rank's rows of a global batch, int32: inputs and labels (b, S), puzzle_identifiers (b,)."""

    inputs: np.ndarray
    labels: np.ndarray
    puzzle_identifiers: np.ndarray

    def rows(self, first: int, last: int) -> "Batch":
        """The rows first to last - 1."""
        arrays = (self.inputs, self.labels, self.puzzle_identifiers)
        return Batch(*(array[first:last] for array in arrays))


@dataclass(frozen=True)
class TrainBatch(Batch):
    """A Batch with its own place in the run, `index`, and that of the batch that follows it, `position`; both
    are (iteration, number in it). `batch_members` tells of an index what was in the batch, train_batches goes
    on from a position as its `start`. The last batch of an iteration has the position (iteration + 1, 0)."""

    index: tuple[int, int]
    position: tuple[int, int]


class Members(NamedTuple):
    """What a global batch was drawn from: a set, rows of its inputs and labels, and the puzzle identifier of
    each, both (B,) int64."""

    set_name: str
    examples: np.ndarray
    puzzle_identifiers: np.ndarray


def steps_in(dataset: PuzzleDataset, epochs: int, global_batch_size: int) -> int:
    """The official code's estimate of the steps of a run, which also sets its schedule's length."""
    metadata = dataset.metadata
    return int(epochs * metadata.total_groups * metadata.mean_puzzle_examples / global_batch_size)


def train_batches(
    dataset: PuzzleDataset,
    *,
    seed: int,
    epochs: int,
    epochs_per_iter: int,
    global_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    start: tuple[int, int] = (0, 0),
) -> Iterator[TrainBatch]:
    """Iterate over the training batches of a run, this rank's rows of each.

    An iteration packs `epochs_per_iter` epochs (the last one what is left of `epochs`): for each epoch a
    permutation of the groups, from each group one random puzzle, of that puzzle as many random examples as
    there is room for, until the global batch is full; the last, partial batch of an iteration is dropped.
    With several sets, an iteration goes through them one after the other. Rank r gets rows [r*b, (r+1)*b)
    with b = global_batch_size // world_size, and the order depends on (seed, iteration) alone.

    Groups and puzzles come in the official reader's order for the same seed, epochs_per_iter and global
    batch size; the examples inside a puzzle of several are drawn from a generator of their own, where the
    official reader uses NumPy's global one. Going to `start` reads no example. Raises DatasetError when
    world_size does not divide the batch, when an iteration has no full batch, when `start` is not in the run.
    """
    local = _local_batch_size(global_batch_size, rank, world_size)
    rows = slice(rank * local, (rank + 1) * local)

    def walk(drawn: Iterator[_Drawn]) -> Iterator[TrainBatch]:
        for each in drawn:
            batch = _batch(dataset, each.set_name, each.examples[rows], each.puzzles[rows])
            arrays = (batch.inputs, batch.labels, batch.puzzle_identifiers)
            yield TrainBatch(*arrays, each.index, each.position)

    return walk(_draw(dataset, seed, epochs, epochs_per_iter, global_batch_size, start))


def batch_members(
    dataset: PuzzleDataset,
    *,
    seed: int,
    epochs: int,
    epochs_per_iter: int,
    global_batch_size: int,
    position: tuple[int, int],
) -> Members:
    """What the training batch at a place of a run consists of, drawn again from the seed.

    position: the `index` of the batch; the others as for train_batches, which raises the same errors.
    """
    drawn = _draw(dataset, seed, epochs, epochs_per_iter, global_batch_size, position)
    found = next(drawn, None)
    if found is None or found.index != position:
        raise DatasetError(f"{dataset.folder}: the run of {epochs} epochs has no batch at {position}")
    identifiers = dataset.sets[found.set_name].puzzle_identifiers[found.puzzles]
    return Members(found.set_name, found.examples, identifiers)


def test_batches(
    dataset: PuzzleDataset,
    *,
    global_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    examples: Mapping[str, np.ndarray] | None = None,
) -> Iterator[tuple[str, Batch, int]]:
    """Iterate over every example of every set once, in order: (set name, this rank's rows, valid rows).

    examples: those to take of each set, increasing, as `subset` draws them; None for all. The third number
    counts the rows of the GLOBAL batch that are examples; the last batch of a set is filled up with pad_id,
    label -100 and the blank identifier. Raises DatasetError when world_size does not divide the batch.
    """
    local = _local_batch_size(global_batch_size, rank, world_size)

    def walk() -> Iterator[tuple[str, Batch, int]]:
        for name, part in dataset.sets.items():
            taken = np.arange(len(part.inputs)) if examples is None else examples[name]
            for first in range(0, len(taken), global_batch_size):
                rows = taken[first : first + global_batch_size]
                own = rows[rank * local : (rank + 1) * local]
                puzzles = np.searchsorted(part.puzzle_indices, own, side="right") - 1
                yield name, _batch(dataset, name, own, puzzles, local), len(rows)

    return walk()


def subset(dataset: PuzzleDataset, samples: int, seed: int) -> dict[str, np.ndarray]:
    """A fixed random part of a split, for `test_batches`: of each set the numbers of examples, increasing.

    The sets have their share of `samples` (all examples where there are no more), rounded by the largest
    remainders; the same for the same seed. Raises DatasetError for fewer than one.
    """
    if samples < 1:
        raise DatasetError(f"{dataset.folder}: a part of {samples} examples is none; expected at least 1")
    sizes = np.array([len(part.inputs) for part in dataset.sets.values()])
    total = int(sizes.sum())
    samples = min(samples, total)
    shares, remainders = np.divmod(sizes * samples, total)
    largest = np.argsort(-remainders, kind="stable")[: samples - shares.sum()]
    shares[largest] += 1
    rng = np.random.default_rng(seed)
    return {
        name: np.sort(rng.choice(size, share, replace=False))
        for name, size, share in zip(dataset.sets, sizes, shares, strict=True)
    }


def _local_batch_size(global_batch_size: int, rank: int, world_size: int) -> int:
    if global_batch_size < 1 or world_size < 1 or global_batch_size % world_size:
        raise DatasetError(
            f"global_batch_size={global_batch_size} cannot be shared by {world_size} processes; "
            f"expected a multiple of {world_size}"
        )
    if not 0 <= rank < world_size:
        raise DatasetError(
            f"rank={rank} is not one of the {world_size} processes, expected 0 to {world_size - 1}"
        )
    return global_batch_size // world_size


def _most_examples(part: PuzzleSet) -> int:
    """The most examples one epoch can give: the largest puzzle of every group."""
    return int(np.maximum.reduceat(np.diff(part.puzzle_indices), part.group_indices[:-1]).sum())


def _too_small(dataset: PuzzleDataset, examples: int, epochs: int, global_batch_size: int) -> DatasetError:
    return DatasetError(
        f"{dataset.folder}: an iteration of {epochs} epochs gives {examples} examples, fewer than one "
        f"batch of global_batch_size={global_batch_size}; lower global_batch_size or raise eval_interval"
    )


@dataclass(frozen=True)
class _Drawn:
    """A global batch to be read: its set, examples and their puzzles, its place and the next one's."""

    set_name: str
    examples: np.ndarray
    puzzles: np.ndarray
    index: tuple[int, int]
    position: tuple[int, int]


def _draw(
    dataset: PuzzleDataset,
    seed: int,
    epochs: int,
    epochs_per_iter: int,
    global_batch_size: int,
    start: tuple[int, int],
) -> Iterator[_Drawn]:
    """The global batches of a run from `start` on; no example is read."""
    if epochs < 1 or epochs_per_iter < 1 or seed < 0:
        raise DatasetError(
            f"epochs={epochs}, epochs_per_iter={epochs_per_iter}, seed={seed}: expected at least 1, 1 and 0"
        )
    longest = min(epochs, epochs_per_iter)
    most = max(longest * _most_examples(part) for part in dataset.sets.values())
    if most < global_batch_size:
        raise _too_small(dataset, most, longest, global_batch_size)

    def walk() -> Iterator[_Drawn]:
        for iteration in range(start[0], -(-epochs // epochs_per_iter)):
            span = min(epochs_per_iter, epochs - iteration * epochs_per_iter)
            plan: list[tuple[str, np.ndarray]] = []
            most = 0
            for number, (name, part) in enumerate(dataset.sets.items()):
                # The official reader counts an iteration for every set it goes through.
                count = iteration * len(dataset.sets) + number + 1
                puzzles = _draw_puzzles(part, np.random.Generator(np.random.Philox(seed=seed + count)), span)
                ends = np.cumsum(part.puzzle_indices[puzzles + 1] - part.puzzle_indices[puzzles])
                most = max(most, int(ends[-1]))
                plan += [(name, puzzles[first:last]) for first, last in _pack(ends, global_batch_size)]
            first = start[1] if iteration == start[0] else 0
            if not plan and span == longest:
                raise _too_small(dataset, most, span, global_batch_size)
            if first > len(plan):
                raise DatasetError(
                    f"{dataset.folder}: cannot go on at batch {first} of an iteration of {len(plan)}; "
                    "expected the data set, global_batch_size and eval_interval that the run began with"
                )
            for index in range(first, len(plan)):
                name, puzzles = plan[index]
                examples, owners = _draw_examples(dataset.sets[name], puzzles, (seed, iteration, index))
                position = (iteration, index + 1) if index + 1 < len(plan) else (iteration + 1, 0)
                whole = slice(global_batch_size)
                yield _Drawn(name, examples[whole], owners[whole], (iteration, index), position)

    return walk()


def _draw_puzzles(part: PuzzleSet, rng: np.random.Generator, epochs: int) -> np.ndarray:
    """One puzzle of every group for every epoch, in the order of training: (epochs * groups,) int64."""
    groups = len(part.group_indices) - 1
    order = np.concatenate([rng.permutation(groups) for _ in range(epochs)])
    # Bounds as arrays draw the same numbers as one call per group; in place and in pieces for large sets.
    for first in range(0, len(order), 1 << 20):
        piece = order[first : first + (1 << 20)]
        piece[:] = rng.integers(part.group_indices[piece], part.group_indices[piece + 1])
    return order


def _pack(ends: np.ndarray, global_batch_size: int) -> Iterator[tuple[int, int]]:
    """The first and last + 1 puzzle of every full batch, from the running total of the puzzles' examples: a
    puzzle that overfills its batch is cut, and the next batch begins with the next puzzle."""
    first, taken = 0, 0
    while (last := int(np.searchsorted(ends, taken + global_batch_size))) < len(ends):
        yield first, last + 1
        first, taken = last + 1, int(ends[last])


def _draw_examples(
    part: PuzzleSet, puzzles: np.ndarray, key: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """All examples of the puzzles, shuffled inside each puzzle, and the puzzle of each."""
    begins = part.puzzle_indices[puzzles].astype(np.int64)
    sizes = part.puzzle_indices[puzzles + 1] - begins
    if (sizes == 1).all():
        return begins, puzzles
    slots = np.repeat(np.arange(len(puzzles)), sizes)
    examples = np.arange(len(slots)) + np.repeat(begins - (np.cumsum(sizes) - sizes), sizes)
    shuffle = np.lexsort((np.random.default_rng(key).random(len(slots)), slots))
    return examples[shuffle], puzzles[slots]


def _batch(
    dataset: PuzzleDataset,
    name: str,
    examples: np.ndarray,
    puzzles: np.ndarray,
    rows: int | None = None,
) -> Batch:
    metadata, part = dataset.metadata, dataset.sets[name]
    dataset.check_unchanged(name)
    inputs = _tokens(dataset, name, "inputs", examples)
    labels = _tokens(dataset, name, "labels", examples)
    identifiers = part.puzzle_identifiers[puzzles].astype(np.int32)
    if metadata.ignore_label_id is not None:
        labels[labels == metadata.ignore_label_id] = IGNORE_LABEL
    short = 0 if rows is None else rows - len(examples)
    if short:
        inputs = np.pad(inputs, ((0, short), (0, 0)), constant_values=metadata.pad_id)
        labels = np.pad(labels, ((0, short), (0, 0)), constant_values=IGNORE_LABEL)
        identifiers = np.pad(identifiers, (0, short), constant_values=metadata.blank_identifier_id)
    return Batch(inputs, labels, identifiers)


def _tokens(dataset: PuzzleDataset, name: str, array: str, examples: np.ndarray) -> np.ndarray:
    """Rows of a mapped array, int32, once more in the vocabulary as they were when it was opened."""
    metadata = dataset.metadata
    values = getattr(dataset.sets[name], array)[examples]
    also = metadata.ignore_label_id if array == "labels" else None
    if where := first_outside(values, metadata.vocab_size, also):
        path, row = array_path(dataset.folder, name, array), int(examples[where[0]])
        raise out_of_range(path, row, values[where], metadata.vocab_size, f"vocab_size {metadata.vocab_size}")
    return values.astype(np.int32)
