"""A split of a data set: opened and checked as a whole, fingerprinted, and drawn from in batches.

The training order can be drawn again exactly for a seed, from any batch on; a test split is walked once.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hrm.data.layout import (
    ARRAYS,
    CHUNK_BYTES,
    DatasetError,
    PuzzleSet,
    array_path,
    check_totals,
    read_metadata,
    read_set,
)

# The label that carries no loss, in every batch.
IGNORE_LABEL = -100


class PuzzleDataset:
    """One split of a data set, checked as a whole when it is opened.

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
        self.metadata = read_metadata(self.folder / "dataset.json")
        self.sets = {name: read_set(self.folder, name, self.metadata) for name in self.metadata.sets}
        check_totals(self.folder / "dataset.json", self.metadata, self.sets)


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
    digest = hashlib.sha256()
    paths = [array_path(dataset.folder, name, array) for name in dataset.metadata.sets for array in ARRAYS]
    for path in [dataset.folder / "dataset.json", *paths]:
        # The size in front keeps bytes from moving between neighbouring files unseen.
        digest.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


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
    """A Batch with `position`, (iteration, batch index) of the batch that follows it: hand it to
    train_batches as `start` to go on from there. The last batch of an iteration says (iteration + 1, 0)."""

    position: tuple[int, int]


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
    if epochs < 1 or epochs_per_iter < 1 or seed < 0:
        raise DatasetError(
            f"epochs={epochs}, epochs_per_iter={epochs_per_iter}, seed={seed}: expected at least 1, 1 and 0"
        )
    longest = min(epochs, epochs_per_iter)
    most = max(longest * _most_examples(part) for part in dataset.sets.values())
    if most < global_batch_size:
        raise _too_small(dataset, most, longest, global_batch_size)
    rows = slice(rank * local, (rank + 1) * local)
    return _run(dataset, seed, epochs, epochs_per_iter, global_batch_size, rows, start)


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
                yield name, _batch(dataset, part, own, puzzles, local), len(rows)

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


def _run(
    dataset: PuzzleDataset,
    seed: int,
    epochs: int,
    epochs_per_iter: int,
    global_batch_size: int,
    rows: slice,
    start: tuple[int, int],
) -> Iterator[TrainBatch]:
    for iteration in range(start[0], -(-epochs // epochs_per_iter)):
        span = min(epochs_per_iter, epochs - iteration * epochs_per_iter)
        plan: list[tuple[PuzzleSet, np.ndarray]] = []
        most = 0
        for number, part in enumerate(dataset.sets.values()):
            # The official reader counts an iteration for every set it goes through.
            count = iteration * len(dataset.sets) + number + 1
            puzzles = _draw_puzzles(part, np.random.Generator(np.random.Philox(seed=seed + count)), span)
            ends = np.cumsum(part.puzzle_indices[puzzles + 1] - part.puzzle_indices[puzzles])
            most = max(most, int(ends[-1]))
            plan += [(part, puzzles[first:last]) for first, last in _pack(ends, global_batch_size)]
        first = start[1] if iteration == start[0] else 0
        if not plan and span == min(epochs, epochs_per_iter):
            raise _too_small(dataset, most, span, global_batch_size)
        if first > len(plan):
            raise DatasetError(
                f"{dataset.folder}: cannot go on at batch {first} of an iteration of {len(plan)}; expected "
                "the data set, global_batch_size and eval_interval that the run began with"
            )
        for index in range(first, len(plan)):
            part, puzzles = plan[index]
            examples, owners = _draw_examples(part, puzzles, (seed, iteration, index))
            batch = _batch(
                dataset, part, examples[:global_batch_size][rows], owners[:global_batch_size][rows]
            )
            position = (iteration, index + 1) if index + 1 < len(plan) else (iteration + 1, 0)
            yield TrainBatch(batch.inputs, batch.labels, batch.puzzle_identifiers, position)


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
    part: PuzzleSet,
    examples: np.ndarray,
    puzzles: np.ndarray,
    rows: int | None = None,
) -> Batch:
    metadata = dataset.metadata
    inputs = part.inputs[examples].astype(np.int32)
    labels = part.labels[examples].astype(np.int32)
    identifiers = part.puzzle_identifiers[puzzles].astype(np.int32)
    if metadata.ignore_label_id is not None:
        labels[labels == metadata.ignore_label_id] = IGNORE_LABEL
    short = 0 if rows is None else rows - len(examples)
    if short:
        inputs = np.pad(inputs, ((0, short), (0, 0)), constant_values=metadata.pad_id)
        labels = np.pad(labels, ((0, short), (0, 0)), constant_values=IGNORE_LABEL)
        identifiers = np.pad(identifiers, (0, short), constant_values=metadata.blank_identifier_id)
    return Batch(inputs, labels, identifiers)
