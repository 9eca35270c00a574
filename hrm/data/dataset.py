"""A split of a data set: checks it completely, computes its fingerprint, and reads it in batches.

The seed determines the order of training, which can restart at any batch; a test split is read once, in
order. Each read first checks that the files have not changed since they were opened, then that tokens are
valid.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hrm.data.checksums import CHECKSUMS, Contents, Snapshot, checksum_faults, read_contents
from hrm.data.format import (
    ARRAYS,
    DIFFICULTY,
    IGNORE_LABEL,
    MAPPED,
    MAX_DESCRIPTION_BYTES,
    SCHEDULE_ONLY,
    DamagedFile,
    DatasetError,
    array_path,
    first_outside,
    ignored_labels,
    out_of_range,
    read_description,
    read_metadata,
    read_set,
    true_totals,
)
from hrm.data.order import Drawn, draw


class PuzzleDataset:
    """One split of a data set. Opening it checks all values, and the checksums if there are any.

    path, split: the data set's folder and the split in it ("train", "test"). metadata: the description, with
    the totals of the arrays. sets: PuzzleSet by name in the order of dataset.json; inputs and labels are
    memory maps. notes: lines about wrong totals in dataset.json. Raises DatasetError with the file, the first
    bad row, its value and the expected values.
    """

    def __init__(self, path: str | Path, split: str) -> None:
        self.folder = Path(path) / split
        if not self.folder.is_dir():
            raise DatasetError(_missing(Path(path), split))
        description = self.folder / "dataset.json"
        self._opened = Snapshot()
        self._opened.add(description)
        self.metadata = read_metadata(description)
        names = self.metadata.sets
        arrays = [array_path(self.folder, name, array) for name in names for array in ARRAYS]
        self._files = [description, *arrays]
        self._opened.add(*arrays)
        self.sets = {name: read_set(self.folder, name, self.metadata) for name in names}
        self.metadata, wrong = true_totals(self.metadata, self.sets)
        self.notes = [
            f"{description}: {what}; {SCHEDULE_ONLY}, which follows the arrays here" for what in wrong
        ]
        self._mapped = {
            name: [str(array_path(self.folder, name, array)) for array in MAPPED] for name in names
        }
        self._opened.check()
        self._verify()

    @cached_property
    def contents(self) -> Contents:
        """Fingerprint and checksums of the opened files. Raises DatasetError if they changed."""
        difficulty = [array_path(self.folder, name, DIFFICULTY) for name in self.metadata.sets]
        contents = read_contents(self._files, [path for path in difficulty if path.is_file()])
        self._opened.check()
        return contents

    def has_fingerprint(self, value: object) -> bool:
        """Whether this is the split's fingerprint, in this version or in versions that included the declared
        kind."""
        now = self.contents.fingerprint
        return value == now or value == read_contents(self._files, with_kind=True).fingerprint

    def check_unchanged(self, name: str) -> None:
        """Raises DatasetError if a memory-mapped file of the set `name` changed since it was opened.

        Call it before reading rows: reading past the end of a truncated file kills the process.
        """
        self._opened.check(self._mapped[name])

    def _verify(self) -> None:
        path = self.folder / CHECKSUMS
        if path.exists():
            listed = read_description(path, MAX_DESCRIPTION_BYTES, "the checksums of a split")
            for file, what in checksum_faults(listed, self.contents.sums):
                remedy = f"build or copy the data set again; after an intended change, rename {CHECKSUMS}"
                raise DamagedFile(self.folder / file, what, remedy)


def _missing(path: Path, split: str) -> str:
    """The error message for a missing split folder, with a likely place."""
    if not path.exists():
        return (
            f"{path / split}: no such folder, expected a data set's {split} split (dataset.json and its "
            f"arrays); build one with `python -m hrm.data sudoku --output-dir {path}`"
        )
    if (path / "dataset.json").is_file():
        return (
            f"{path}: a split, expected the folder of a whole data set; give {path.parent}, and the arrays "
            f"of {split} in {path.parent / split}"
        )
    if path.is_file():
        return (
            f"{path}: a file, expected the folder of a data set; `python -m hrm.data sudoku --help` (maze, "
            "arc likewise) shows how to build one from a file of puzzles"
        )
    there = sorted(file.parent.name for file in path.glob("*/dataset.json"))
    return (
        f"{path / split}: no such folder, expected a data set's {split} split (dataset.json and its arrays); "
        f"{path} has {', '.join(there) if there else 'no split; give the folder of a data set'}"
    )


def check_same_task(train: PuzzleDataset, test: PuzzleDataset) -> None:
    """Raises DatasetError unless both splits have the same cells, vocabulary and puzzle identifiers."""
    for key in ("seq_len", "vocab_size", "num_puzzle_identifiers"):
        here, there = getattr(train.metadata, key), getattr(test.metadata, key)
        if here != there:
            raise DatasetError(
                f"{test.folder / 'dataset.json'}: {key} is {there}, but {here} in {train.folder.name}; build "
                "both splits together"
            )


def fingerprint(dataset: PuzzleDataset) -> str:
    """SHA-256 (hex) over all arrays of a split and its dataset.json without the kind, in a fixed order."""
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
    """A Batch with its position in the run, `index`, and the position of the next batch, `position`.

    Both are (iteration, number in it); after the last batch of an iteration, position is (iteration + 1, 0).
    `batch_members` takes an index, and `train_batches` a position as its `start`.
    """

    index: tuple[int, int]
    position: tuple[int, int]


class Members(NamedTuple):
    """The contents of a global batch: a set, its rows of inputs and labels, and their puzzle identifiers.

    examples, puzzle_identifiers: (B,) int64.
    """

    set_name: str
    examples: np.ndarray
    puzzle_identifiers: np.ndarray


# Replaces this rank's rows of a global batch by symmetric ones; see `hrm.data.symmetries`.
Augment = Callable[[Batch, Drawn, slice], Batch]
# Indices of groups, by set.
Groups = Mapping[str, np.ndarray]


def steps_in(
    dataset: PuzzleDataset, epochs: int, global_batch_size: int, groups: Groups | None = None
) -> int:
    """The number of steps of a run by the official code's estimate, which is also the schedule's length."""
    metadata = dataset.metadata
    count = metadata.total_groups if groups is None else sum(map(len, groups.values()))
    return int(epochs * count * metadata.mean_puzzle_examples / global_batch_size)


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
    groups: Groups | None = None,
    augment: Augment | None = None,
) -> Iterator[TrainBatch]:
    """Iterate over the training batches of a run; yields this rank's rows of each.

    An iteration packs `epochs_per_iter` epochs; the last iteration packs the rest of `epochs`. Each epoch
    permutes the groups and takes one random puzzle of each group, and of that puzzle as many random examples
    as fit into the global batch. The last, partial batch of an iteration is dropped. Several sets follow one
    another within an iteration. Rank r gets rows [r*b, (r+1)*b) with b = global_batch_size // world_size. The
    order depends only on (seed, iteration).

    Groups and puzzles come in the official reader's order for the same seed, epochs_per_iter and global
    batch size. The examples within a puzzle come from a separate generator; the official reader uses NumPy's
    global one. Skipping to `start` reads no example. groups: the training groups of each set, None for all.
    augment: applied to every batch. Raises DatasetError if world_size does not divide the batch, an iteration
    has no full batch, or `start` is not in the run.
    """
    local = _local_batch_size(global_batch_size, rank, world_size)
    rows = slice(rank * local, (rank + 1) * local)

    def walk(drawn: Iterator[Drawn]) -> Iterator[TrainBatch]:
        for each in drawn:
            batch = _batch(dataset, each.set_name, each.examples[rows], each.puzzles[rows])
            if augment is not None:
                batch = augment(batch, each, rows)
            arrays = (batch.inputs, batch.labels, batch.puzzle_identifiers)
            yield TrainBatch(*arrays, each.index, each.position)

    return walk(
        draw(
            dataset.folder,
            dataset.sets,
            seed=seed,
            epochs=epochs,
            epochs_per_iter=epochs_per_iter,
            global_batch_size=global_batch_size,
            start=start,
            groups=groups,
        )
    )


def batch_members(
    dataset: PuzzleDataset,
    *,
    seed: int,
    epochs: int,
    epochs_per_iter: int,
    global_batch_size: int,
    position: tuple[int, int],
    groups: Groups | None = None,
) -> Members:
    """The contents of the training batch at a position of a run, drawn again from the seed.

    position: the `index` of the batch; other arguments and errors: see `train_batches`.
    """
    drawn = draw(
        dataset.folder,
        dataset.sets,
        seed=seed,
        epochs=epochs,
        epochs_per_iter=epochs_per_iter,
        global_batch_size=global_batch_size,
        start=position,
        groups=groups,
    )
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

    examples: by set, ascending indices of the examples to read, as from `subset`; None for all. The
    third value counts the examples in the GLOBAL batch; the last batch of a set is padded with pad_id, label
    -100 and the blank identifier. Raises DatasetError if world_size does not divide the batch.
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


def subset(
    dataset: PuzzleDataset, samples: int, seed: int, examples: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """A random sample of a split, fixed by the seed: ascending indices of examples by set, for
    `test_batches`.

    examples: by set, the ascending indices to choose from, None for all. Each set gets a proportional number
    of `samples`, rounded by largest remainders. If there are no more than `samples` examples, all are used.
    Raises DatasetError for samples < 1.
    """
    if samples < 1:
        raise DatasetError(f"{dataset.folder}: samples is {samples}, expected at least 1")
    if examples is None:
        examples = {name: np.arange(len(part.inputs)) for name, part in dataset.sets.items()}
    sizes = np.array([len(examples[name]) for name in dataset.sets])
    total = int(sizes.sum())
    samples = min(samples, total)
    shares, remainders = np.divmod(sizes * samples, total)
    largest = np.argsort(-remainders, kind="stable")[: samples - shares.sum()]
    shares[largest] += 1
    rng = np.random.default_rng(seed)
    return {
        name: examples[name][np.sort(rng.choice(size, share, replace=False))]
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
    """Rows of a memory-mapped array, int32; checks again that they are in the vocabulary."""
    metadata = dataset.metadata
    values = getattr(dataset.sets[name], array)[examples]
    also = ignored_labels(metadata.ignore_label_id) if array == "labels" else ()
    if where := first_outside(values, metadata.vocab_size, also):
        path, row = array_path(dataset.folder, name, array), int(examples[where[0]])
        raise out_of_range(path, row, values[where], metadata.vocab_size, f"vocab_size {metadata.vocab_size}")
    return values.astype(np.int32)
