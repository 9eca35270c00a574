"""Fresh symmetries of ARC examples: transforms canvases when a batch is made.

A puzzle embedding belongs to one puzzle: a task under one turn (`augment.TURNS`) and one colour permutation.
A draw therefore picks a name of the task in the data set (`<task>_t<k>_<perm>`) and uses its symmetry and
identifier. For a task without augmented names, only the place of the grid is drawn.
"""

from collections.abc import Sequence

import numpy as np

from hrm.data.arc.augment import COLOURS, END, FIRST_COLOUR, VOCAB_SIZE, symmetry_of
from hrm.data.workers import compiled

# For each of `augment.TURNS`, from the new grid to the old: transpose, flip rows, flip columns.
_SOURCES = np.array(
    [(0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 1)], np.uint8
)


class Names:
    """The symmetries in a data set's names, by identifier.

    turns: (P,) uint8. colours: (P, 10) uint8. Raises DatasetError for a name whose last part is not a
    permutation.
    """

    def __init__(self, names: Sequence[str]) -> None:
        parts = [symmetry_of(name) for name in names]
        numbers: dict[str, int] = {}
        tasks = np.array([numbers.setdefault(task, len(numbers)) for task, _, _ in parts])
        self.turns = np.array([turn for _, turn, _ in parts], np.uint8)
        digits = "".join(colours for _, _, colours in parts)
        self.colours = np.frombuffer(digits.encode("ascii"), np.uint8).reshape(-1, COLOURS) - ord("0")
        is_plain = np.array([name == task for name, (task, _, _) in zip(names, parts, strict=True)])
        # The identifiers, grouped by task.
        self._members = np.argsort(tasks, kind="stable")
        counts = np.bincount(tasks)
        self._first, self._count = (np.cumsum(counts) - counts)[tasks], np.where(is_plain, counts[tasks], 1)
        self._is_plain = is_plain

    def draw(self, identifiers: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """A random identifier of each puzzle's task, (b,), from random numbers (b,) in [0, 1).

        A stored augmentation keeps its identifier.
        """
        chosen = self._first[identifiers] + (numbers * self._count[identifiers]).astype(np.int64)
        return np.where(self._is_plain[identifiers], self._members[chosen], identifiers)

    def symmetries(self, before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Turns (b,) and colours (b, 10) that map the puzzles `before` to the puzzles `after` of `draw`."""
        same = before == after
        turns = np.where(same, np.uint8(0), self.turns[after])
        return turns, np.where(same[:, None], np.arange(COLOURS, dtype=np.uint8), self.colours[after])


def boxes(canvases: np.ndarray) -> np.ndarray:
    """The grid of each canvas (b, n, n): its top, left, rows and columns, (b, 4); 0 rows without a grid."""
    found = np.empty((len(canvases), 4), np.int64)
    _find(canvases, found)
    return found


def placed(
    canvases: np.ndarray, box: np.ndarray, turns: np.ndarray, colours: np.ndarray, places: np.ndarray
) -> np.ndarray:
    """The transformed grid of each canvas at its new place on an empty canvas.

    canvases: (b, n, n) int32, negative labels without loss. box: see `boxes`. turns: (b,). colours: (b, 10).
    places: row and column (b, 2) of the new upper left corner. Labels around the grid carry no loss if any
    label of the canvas carries none. A canvas without a grid does not change.
    """
    made = np.empty_like(canvases)
    _place(canvases, box, turns, colours, places, made)
    return made


def turned_sizes(box: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """Rows and columns (b, 2) of the grids of `boxes` after their symmetries."""
    return np.where(_SOURCES[turns, :1], box[:, [3, 2]], box[:, [2, 3]])


@compiled
def _find(canvases, found):
    side = canvases.shape[1]
    for number in range(len(canvases)):
        top, left, bottom, end = side, side, 0, 0
        for row in range(side):
            for col in range(side):
                if FIRST_COLOUR <= canvases[number, row, col] < VOCAB_SIZE:
                    top, left = min(top, row), min(left, col)
                    bottom, end = max(bottom, row + 1), max(end, col + 1)
        found[number] = top, left, max(bottom - top, 0), max(end - left, 0)


@compiled
def _place(canvases, box, turns, colours, places, made):
    side = canvases.shape[1]
    for number in range(len(canvases)):
        top, left, rows, cols = box[number]
        if rows == 0:
            made[number] = canvases[number]
            continue
        swaps, reverses_rows, reverses_cols = _SOURCES[turns[number]]
        height, width = (cols, rows) if swaps else (rows, cols)
        around = min(canvases[number].min(), 0)
        first_row, first_col = places[number]
        for row in range(side):
            for col in range(side):
                y, x = row - first_row, col - first_col
                token = around
                if 0 <= y < height and 0 <= x < width:
                    down, right = (x, y) if swaps else (y, x)
                    down = rows - 1 - down if reverses_rows else down
                    right = cols - 1 - right if reverses_cols else right
                    token = canvases[number, top + down, left + right]
                    if token >= FIRST_COLOUR:
                        token = colours[number, token - FIRST_COLOUR] + FIRST_COLOUR
                elif (y == height and 0 <= x < width) or (x == width and 0 <= y < height):
                    token = END
                made[number, row, col] = token
