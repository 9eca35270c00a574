"""Fresh symmetries: transforms each training example by a random symmetry when its batch is made.

They have the distribution of stored augmentations without their size on disk. The symmetry of a row depends
only on the seed, the position of the batch in the run and the row in the global batch, so it is the same
after a resumption and on any number of ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from hrm.data.arc.fresh import Names, boxes, placed, turned_sizes
from hrm.data.dataset import Batch, PuzzleDataset
from hrm.data.format import IGNORE_LABEL, DatasetError, ignored_labels, read_names
from hrm.data.maze.search import SYMMETRIES, symmetric
from hrm.data.order import Drawn
from hrm.data.puzzle_kinds import Kind
from hrm.data.sudoku.files import row_keys
from hrm.data.sudoku.symmetry import random_symmetries
from hrm.data.workers import compiled

# Maximum number of draws for an example whose symmetric copy is an answer of another split.
ATTEMPTS = 64
# Labels per read.
CHUNK_ROWS = 1 << 15


class Held(NamedTuple):
    """Examples of a split whose answers training must not use, by set; None for all."""

    dataset: PuzzleDataset
    examples: dict[str, np.ndarray] | None = None


class Symmetries(ABC):
    """The symmetries of one kind of puzzle."""

    # Whether equal labels mean equal puzzles, and so a leak.
    labels_leak = True

    @abstractmethod
    def apply(
        self, batch: Batch, numbers: np.random.Generator, total: int, rows: np.ndarray, sizes: np.ndarray
    ) -> Batch:
        """Transforms the batch, rows `rows` of a global batch of `total`, by random symmetries.

        numbers: the random generator of the global batch, which every rank uses alike. sizes: the number of
        examples of each row's puzzle. The shape does not change.
        """


class SudokuSymmetries(Symmetries):
    """Permutations of digits, bands, rows, stacks and columns, and transposition."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind

    def apply(
        self, batch: Batch, numbers: np.random.Generator, total: int, rows: np.ndarray, sizes: np.ndarray
    ) -> Batch:
        cells, digits = (part[rows] for part in random_symmetries(total, self._kind.rows, numbers))
        # Padding and blanks keep their tokens.
        tokens = np.empty((len(rows), self._kind.rows + 2), np.int32)
        tokens[:, :2] = 0, 1
        tokens[:, 2:] = digits[:, 1:] + np.int32(1)
        return _rearranged(batch, cells, tokens)


class MazeSymmetries(Symmetries):
    """The eight symmetries of a square, or the four of a rectangle."""

    def __init__(self, kind: Kind) -> None:
        board = np.arange(kind.rows * kind.cols).reshape(kind.rows, kind.cols)
        turned = [symmetric(board, symmetry) for symmetry in range(SYMMETRIES)]
        self._cells = np.stack([cells.ravel() for cells in turned if cells.shape == board.shape])

    def apply(
        self, batch: Batch, numbers: np.random.Generator, total: int, rows: np.ndarray, sizes: np.ndarray
    ) -> Batch:
        cells = self._cells[numbers.integers(len(self._cells), size=total)[rows]]
        return _rearranged(batch, cells, np.zeros((len(rows), 0), np.int32))


class ArcSymmetries(Symmetries):
    """Turns and colours of the data set's names, and random places on the canvas.

    See `hrm.data.arc.fresh`. On average one of a puzzle's E examples stays in the upper left corner, as in
    the builder.
    """

    labels_leak = False

    def __init__(self, kind: Kind, dataset: PuzzleDataset) -> None:
        self._side = kind.rows
        names = read_names(dataset.folder.parent)
        if len(names) != dataset.metadata.num_puzzle_identifiers:
            raise DatasetError(
                f"{dataset.folder.parent / 'identifiers.json'}: {len(names)} names, expected "
                f"{dataset.metadata.num_puzzle_identifiers} as dataset.json says; build both together"
            )
        self._names = Names(names)

    def apply(
        self, batch: Batch, numbers: np.random.Generator, total: int, rows: np.ndarray, sizes: np.ndarray
    ) -> Batch:
        name, stays, *place = numbers.random((4, total))[:, rows]
        identifiers = self._names.draw(batch.puzzle_identifiers, name)
        turns, colours = self._names.symmetries(batch.puzzle_identifiers, identifiers)
        shape = (-1, self._side, self._side)
        canvases = [array.reshape(shape) for array in (batch.inputs, batch.labels)]
        found = [boxes(canvas) for canvas in canvases]
        size = np.maximum(*(turned_sizes(box, turns) for box in found))
        free = np.stack(place, axis=1) * (self._side - size + 1)
        places = np.where((stays * sizes < 1)[:, None], 0, free.astype(np.int64))
        inputs, labels = (
            placed(canvas, box, turns, colours, places).reshape(batch.inputs.shape)
            for canvas, box in zip(canvases, found, strict=True)
        )
        return Batch(inputs, labels, identifiers.astype(np.int32))


def symmetries_of(kind: Kind, dataset: PuzzleDataset) -> Symmetries:
    """The symmetries of a training split. Raises DatasetError for a kind without any."""
    if kind.name == "sudoku":
        return SudokuSymmetries(kind)
    if kind.name == "maze":
        return MazeSymmetries(kind)
    if kind.name == "arc":
        return ArcSymmetries(kind, dataset)
    raise DatasetError(
        f"{dataset.folder}: augment=true supports Sudoku, mazes and ARC; set it to "
        f"false for data of kind {kind.name}"
    )


class FreshSymmetries:
    """Transforms every training example by a random symmetry; an `Augment` of `dataset.train_batches`.

    held: the examples whose labels no draw may produce, as builders keep splits disjoint. Such a draw is
    repeated up to ATTEMPTS times; then the example does not change.
    """

    def __init__(self, dataset: PuzzleDataset, kind: Kind, seed: int, held: Iterable[Held] = ()) -> None:
        self._dataset, self._seed = dataset, seed
        self._symmetries = symmetries_of(kind, dataset)
        found = [_label_keys(each) for each in held if self._symmetries.labels_leak]
        self._forbidden = np.unique(np.concatenate([np.zeros(0, np.uint64), *found]))

    def __call__(self, batch: Batch, drawn: Drawn, rows: slice) -> Batch:
        """Transforms the batch, rows `rows` of the global batch `drawn`, by fresh symmetries."""
        places, total = np.arange(len(drawn.examples))[rows], len(drawn.examples)
        starts = self._dataset.sets[drawn.set_name].puzzle_indices
        sizes = (starts[drawn.puzzles + 1] - starts[drawn.puzzles])[rows]
        made = Batch(*(array.copy() for array in _arrays(batch)))
        pending = np.arange(len(places))
        for attempt in range(ATTEMPTS):
            # This key of four numbers differs from the three-number keys that draw the examples: none ends in
            # 0.
            numbers = np.random.default_rng([self._seed, *drawn.index, attempt + 1])
            part = Batch(*(array[pending] for array in _arrays(batch)))
            new = self._symmetries.apply(part, numbers, total, places[pending], sizes[pending])
            leaks = _contains(self._forbidden, row_keys(new.labels)) if len(self._forbidden) else None
            good = np.ones(len(pending), bool) if leaks is None else ~leaks
            for target, values in zip(_arrays(made), _arrays(new), strict=True):
                target[pending[good]] = values[good]
            pending = pending[~good]
            if not len(pending):
                break
        return made


def _rearranged(batch: Batch, cells: np.ndarray, tokens: np.ndarray) -> Batch:
    """Rows with cell cells[i] in cell i, cells (b, S). tokens: (b, n), new ones for the first n tokens."""
    inputs, labels = np.empty_like(batch.inputs), np.empty_like(batch.labels)
    for before, after in ((batch.inputs, inputs), (batch.labels, labels)):
        _rearrange(before, cells, tokens, after)
    return Batch(inputs, labels, batch.puzzle_identifiers)


@compiled
def _rearrange(before, cells, tokens, after):
    for row in range(len(before)):
        for cell in range(before.shape[1]):
            token = before[row, cells[row, cell]]
            # Negative labels carry no loss.
            after[row, cell] = tokens[row, token] if 0 <= token < tokens.shape[1] else token


def _arrays(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return batch.inputs, batch.labels, batch.puzzle_identifiers


def _label_keys(held: Held) -> np.ndarray:
    """A hash of the labels of every held example, as batches hold them."""
    keys, ignored = [], ignored_labels(held.dataset.metadata.ignore_label_id)
    for name, part in held.dataset.sets.items():
        examples = np.arange(len(part.labels)) if held.examples is None else held.examples[name]
        for first in range(0, len(examples), CHUNK_ROWS):
            held.dataset.check_unchanged(name)
            labels = part.labels[examples[first : first + CHUNK_ROWS]].astype(np.int32)
            labels[np.isin(labels, ignored)] = IGNORE_LABEL
            keys.append(row_keys(labels))
    return np.concatenate(keys)


def _contains(sorted_keys: np.ndarray, keys: np.ndarray) -> np.ndarray:
    places = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return np.asarray(sorted_keys[places] == keys)
