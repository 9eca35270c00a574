"""ARC grids on their canvas, and augmentations: the eight symmetries of the square, permutations of nine
colours.

A canvas is a square of tokens, by default 30 x 30, row by row. Token 0 is padding, and colour c is token c +
2. Token 1 marks the end of the grid: it is below the last row and right of the last column, if the canvas has
room. An augmentation rotates or reflects all grids of a task in the same way (a "turn", `t0` to `t7`) and
permutes colours 1 to 9; black does not change. Its name is `<task>_t<k>_<perm>`, where digit c of perm is the
new colour of colour c.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hrm.data.format import DatasetError

# Side of the official canvas, and of the largest one.
SIDE, LARGEST_SIDE = 30, 128
VOCAB_SIZE = 12
END, FIRST_COLOUR = 1, 2
COLOURS = 10
# Maximum number of draws per requested augmentation.
TRIALS = 5

# Inverses of the symmetries 0 to 7; the last two reflect at the diagonals.
TURNS: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
    lambda grid: grid,
    lambda grid: np.rot90(grid, 1),
    lambda grid: np.rot90(grid, 2),
    lambda grid: np.rot90(grid, 3),
    lambda grid: grid[:, ::-1],
    lambda grid: grid[::-1],
    lambda grid: grid.T,
    lambda grid: grid[::-1, ::-1].T,
)
INVERSE_TURNS = (0, 3, 2, 1, 4, 5, 6, 7)

# TRM's data sets separate the parts of names by |||.
_AUGMENTED = re.compile(
    r"(?P<task>.+)(?P<rule>_|\|\|\|)t(?P<turn>[0-7])(?P=rule)(?P<colours>0[1-9]{9})", re.S
)
_SAME_COLOURS = "".join(map(str, range(COLOURS)))

# Random weights of cells and colours for hashes of pairs; a fixed seed keeps augmentations reproducible.
_weights = np.random.default_rng(0)
_CELLS = _weights.integers(1 << 63, size=(2, LARGEST_SIDE, LARGEST_SIDE), dtype=np.uint64)
_COLOURS = _weights.integers(1 << 63, size=COLOURS, dtype=np.uint64) | np.uint64(1)
_MIX = _weights.integers(1 << 63, size=2, dtype=np.uint64) | np.uint64(1)


@dataclass(frozen=True)
class Pair:
    """An input and output grid, each (rows, columns) uint8 of colours 0 to 9; an unknown output is None."""

    input: np.ndarray
    output: np.ndarray | None

    @property
    def grids(self) -> tuple[np.ndarray, ...]:
        return (self.input,) if self.output is None else (self.input, self.output)


def canvas(grid: np.ndarray, row: int = 0, col: int = 0, side: int = SIDE) -> np.ndarray:
    """Tokens (side * side,) uint8 of a grid (rows, columns) of colours that begins at (row, col)."""
    return _placed(grid, row, col, side).ravel()


def grid_of(tokens: np.ndarray) -> np.ndarray | None:
    """The grid on a square canvas (S,), (rows, columns) uint8 of colours; None without one.

    As in the official evaluation it is the largest rectangle of colours in the upper left corner, with the
    fewest rows among equal areas. End lines may be incomplete; a grid elsewhere is not found.
    """
    side = math.isqrt(len(tokens))
    board = np.asarray(tokens).reshape(side, side)
    coloured = (board >= FIRST_COLOUR) & (board < VOCAB_SIZE)
    # Width of the coloured rectangle down to each row.
    widths = np.minimum.accumulate(np.cumprod(coloured, axis=1).sum(axis=1))
    rows = int((widths * np.arange(1, side + 1)).argmax()) + 1
    columns = int(widths[rows - 1])
    return (board[:rows, :columns] - FIRST_COLOUR).astype(np.uint8) if columns else None


def task_of(name: str) -> str:
    """The name of a puzzle's task; an original puzzle has the name of its task."""
    found = _AUGMENTED.fullmatch(name)
    return found["task"] if found else name


def inverse(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """The function that maps a grid (rows, columns) of the puzzle with this name back to its task's grid.

    Names are this project's, the official code's or TRM's (`<task>|||t<k>|||<perm>`). Raises DatasetError for
    a name whose last part is not a permutation.
    """
    _, number, digits = symmetry_of(name)
    colours = np.array([int(digit) for digit in digits], np.uint8)
    back, turn = np.argsort(colours).astype(np.uint8), TURNS[INVERSE_TURNS[number]]
    return lambda grid: back[turn(grid)]


def symmetry_of(name: str) -> tuple[str, int, str]:
    """The task, the turn and the colour permutation (as digits) in the name of a puzzle.

    Names and errors: see `inverse`.
    """
    found = _AUGMENTED.fullmatch(name)
    if found is None:
        return name, 0, _SAME_COLOURS
    if len(set(found["colours"])) < COLOURS:
        raise DatasetError(
            f"puzzle {name!r}: {found['colours']} holds a colour twice, expected every digit once; build the "
            "data set again"
        )
    return found["task"], int(found["turn"]), found["colours"]


@dataclass(frozen=True)
class Augmentations:
    """Augmentations of a task, starting with the identity. turns: symmetries (N,) 0 to 7; colours: (N, 10)
    uint8."""

    turns: np.ndarray
    colours: np.ndarray

    def first(self, count: int) -> "Augmentations":
        """The first `count` augmentations."""
        return Augmentations(self.turns[:count], self.colours[:count])

    def names(self, task: str) -> list[str]:
        """The names of the task's N puzzles; the first is the name of the task."""
        digits = (self.colours + ord("0")).tobytes().decode("ascii")
        codes = (digits[first : first + COLOURS] for first in range(COLOURS, len(digits), COLOURS))
        turns = self.turns[1:].tolist()
        return [task, *(f"{task}_t{turn}_{code}" for turn, code in zip(turns, codes, strict=True))]


def draw(pairs: Sequence[Pair], num_aug: int, rng: np.random.Generator) -> Augmentations:
    """The identity and up to num_aug random augmentations, which give different puzzles.

    Puzzles are equal if they have the same pairs in any order; a 64-bit hash compares them. At most TRIALS *
    num_aug are drawn, so a task with few different puzzles gets fewer.
    """
    count = TRIALS * num_aug
    # Draw one row of numbers per augmentation, so that a larger num_aug begins with the same augmentations.
    numbers = rng.random((count, COLOURS))
    turns = np.concatenate([[0], (numbers[:, 0] * len(TURNS)).astype(int)])
    colours = np.tile(np.arange(COLOURS, dtype=np.uint8), (count + 1, 1))
    colours[1:, 1:] = numbers[:, 1:].argsort(axis=1) + 1
    first = np.unique(_hashes(pairs, turns, colours), return_index=True)[1]
    kept = np.sort(first)[: num_aug + 1]
    return Augmentations(turns[kept], colours[kept])


def token_arrays(
    pairs: Sequence[Pair], made: Augmentations, rng: np.random.Generator | None, side: int = SIDE
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels (N * E, side * side) uint8 of a task's E pairs under N symmetries, by puzzle.

    rng: places both grids of a pair at the same random place, except one random pair of every puzzle, which
    stays in the upper left corner. None: all pairs stay there. Labels of a pair without an output are
    padding.
    """
    count, slots = len(made.turns), len(pairs)
    places = np.zeros((count, slots, 2), np.int64)
    if rng is not None:
        sizes = np.array([np.max([grid.shape for grid in pair.grids], axis=0) for pair in pairs])
        # Whether each turn exchanges rows and columns.
        turned = np.stack([sizes[:, ::-1] if _swaps(turn) else sizes for turn in range(len(TURNS))])
        places = rng.integers(side - turned[made.turns] + 1)
        places[np.arange(count), rng.integers(slots, size=count)] = 0
    table = np.zeros((count, VOCAB_SIZE), np.uint8)
    table[:, END], table[:, FIRST_COLOUR:] = END, made.colours + FIRST_COLOUR
    columns = np.arange(count)[:, None]
    both = np.zeros((2, count, slots, side * side), np.uint8)
    for slot, pair in enumerate(pairs):
        for result, grid in zip(both, pair.grids, strict=False):
            # Put each turned grid on a larger canvas; a window on it is a placement.
            wide = np.stack([_placed(turn(grid), side - 1, side - 1, 2 * side - 1) for turn in TURNS])
            windows = np.lib.stride_tricks.sliding_window_view(wide, (side, side), axis=(1, 2))
            rows, cols = (side - 1 - places[:, slot]).T
            boards = windows[made.turns, rows, cols].reshape(count, -1)
            result[:, slot] = table[columns, boards]
    inputs, labels = both.reshape(2, count * slots, side * side)
    return inputs, labels


def _placed(grid: np.ndarray, row: int, col: int, side: int) -> np.ndarray:
    # One extra row and column for end marks beyond the canvas.
    board = np.zeros((side + 1, side + 1), np.uint8)
    bottom, right = row + grid.shape[0], col + grid.shape[1]
    board[row:bottom, col:right] = grid + FIRST_COLOUR
    board[bottom, col:right] = END
    board[row:bottom, right] = END
    return board[:side, :side]


def _swaps(turn: int) -> bool:
    return TURNS[turn](np.zeros((1, 2))).shape == (2, 1)


def _hashes(pairs: Sequence[Pair], turns: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """A hash of every augmented task (N,) uint64, independent of the order of pairs."""
    # The summed weight of each colour's cells for every turn and pair; black counts, so that shapes matter.
    weights = np.zeros((len(TURNS), len(pairs), COLOURS), np.uint64)
    for number, turn in enumerate(TURNS):
        for slot, pair in enumerate(pairs):
            for side, grid in enumerate(map(turn, pair.grids)):
                rows, cols = grid.shape
                np.add.at(weights[number, slot], grid, _CELLS[side, :rows, :cols])
    keys = np.einsum("nec,nc->ne", weights[turns], _COLOURS[colours])
    # A plain sum would mix the cells of different pairs.
    for factor in _MIX:
        keys = (keys ^ (keys >> np.uint64(31))) * factor
    return (keys ^ (keys >> np.uint64(31))).sum(axis=1)
