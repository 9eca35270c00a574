"""Symmetric views of a puzzle, one per path, and the inverse maps for answers.

The view of a path is a function of only (seed, example, path). Path 0 has the original puzzle.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hrm.common.errors import UserError
from hrm.data.arc.augment import COLOURS, TURNS, canvas, grid_of, inverse, symmetry_of
from hrm.data.maze.search import SYMMETRIES, symmetric
from hrm.data.puzzle_kinds import Kind
from hrm.data.sudoku.symmetry import random_symmetries

# Kinds with symmetric views.
SYMMETRIC = ("sudoku", "maze", "arc")
# Number of views drawn together; constant, so that views do not depend on the number of paths.
BLOCK = 16


class View(ABC):
    """The views of K paths: inputs (K, S), and identifiers (K,) of the puzzle embeddings to use."""

    inputs: np.ndarray
    identifiers: np.ndarray

    @abstractmethod
    def answers(self, predictions: np.ndarray, paths: np.ndarray) -> np.ndarray:
        """Maps predictions (n, S) of the paths (n,) back to answers (n, S) to the original puzzle."""


class Plain(View):
    """The original puzzle for every path."""

    def __init__(self, inputs: np.ndarray, identifier: int, paths: int) -> None:
        self.inputs = np.broadcast_to(inputs, (paths, len(inputs)))
        self.identifiers = np.full(paths, identifier, np.int32)

    def answers(self, predictions: np.ndarray, paths: np.ndarray) -> np.ndarray:
        return predictions


class Rearranged(View):
    """Cell i of path k's view is cell cells[k, i] of the puzzle, with token t replaced by tokens[k, t]."""

    def __init__(self, inputs: np.ndarray, identifier: int, cells: np.ndarray, tokens: np.ndarray) -> None:
        self.inputs = np.take_along_axis(tokens, inputs[cells], axis=1).astype(inputs.dtype)
        self.identifiers = np.full(len(cells), identifier, np.int32)
        self.cells, self._back = cells, np.argsort(tokens, axis=1)

    def answers(self, predictions: np.ndarray, paths: np.ndarray) -> np.ndarray:
        found = np.empty_like(predictions)
        own = np.take_along_axis(self._back[paths], predictions, axis=1)
        np.put_along_axis(found, self.cells[paths], own.astype(predictions.dtype), axis=1)
        return found


class Turned(View):
    """Transforms and recolours ARC grids; maps an answer's grid back and restores its end marks.

    An answer without a grid becomes an empty canvas. Path 0 is unchanged.
    """

    def __init__(self, inputs: np.ndarray, ways: Sequence["Way"]) -> None:
        asked = grid_of(inputs)
        assert asked is not None
        side = math.isqrt(len(inputs))
        turned = [
            inputs if number == 0 else canvas(way.there(asked), side=side) for number, way in enumerate(ways)
        ]
        self.inputs = np.stack(turned).astype(inputs.dtype)
        self.identifiers = np.array([way.identifier for way in ways], np.int32)
        self._ways = ways

    def answers(self, predictions: np.ndarray, paths: np.ndarray) -> np.ndarray:
        found = predictions.copy()
        for answer, path in zip(found, paths.tolist(), strict=True):
            if path:
                grid = grid_of(answer)
                side = math.isqrt(len(answer))
                answer[:] = 0 if grid is None else canvas(self._ways[path].back(grid), side=side)
        return found


@dataclass(frozen=True)
class Way:
    """A symmetry of ARC grids, its inverse, and the puzzle identifier of the symmetric puzzle."""

    there: Callable[[np.ndarray], np.ndarray]
    back: Callable[[np.ndarray], np.ndarray]
    identifier: int


class Views(ABC):
    """Draws views of puzzles of one kind."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    @abstractmethod
    def of(self, inputs: np.ndarray, identifier: int, example: int, paths: int) -> View:
        """The views (paths, S) of a puzzle's tokens (S,). example: the number that identifies the puzzle."""

    def _drawn(
        self, example: int, paths: int, draw: Callable[[np.random.Generator], tuple[np.ndarray, ...]]
    ) -> tuple[np.ndarray, ...]:
        """The first `paths` rows drawn by `draw`, which draws blocks of BLOCK rows."""
        blocks = [
            draw(np.random.default_rng([self._seed, example, block])) for block in range(-(-paths // BLOCK))
        ]
        return tuple(np.concatenate(arrays)[:paths] for arrays in zip(*blocks, strict=True))


class PlainViews(Views):
    """Always the original puzzle."""

    def of(self, inputs: np.ndarray, identifier: int, example: int, paths: int) -> View:
        return Plain(inputs, identifier, paths)


class SudokuViews(Views):
    """Permutes digits, bands, rows, stacks and columns, and transposes grids with square boxes."""

    def __init__(self, seed: int, kind: Kind) -> None:
        super().__init__(seed)
        self._kind = kind

    def of(self, inputs: np.ndarray, identifier: int, example: int, paths: int) -> View:
        size = self._kind.rows
        cells, digits = self._drawn(example, paths, lambda rng: random_symmetries(BLOCK, size, rng))
        cells[0], digits[0] = np.arange(size * size), np.arange(size + 1)
        tokens = np.tile(np.arange(self._kind.vocab_size), (paths, 1))
        tokens[:, 2 : size + 2] = digits[:, 1:] + 1
        return Rearranged(inputs, identifier, cells, tokens)


class MazeViews(Views):
    """The eight symmetries of a square, or the four of a rectangle."""

    def __init__(self, seed: int, kind: Kind) -> None:
        super().__init__(seed)
        board = np.arange(kind.rows * kind.cols).reshape(kind.rows, kind.cols)
        turned = [symmetric(board, number) for number in range(SYMMETRIES)]
        self._cells = np.stack([cells.ravel() for cells in turned if cells.shape == board.shape])
        self._tokens = np.arange(kind.vocab_size)

    def of(self, inputs: np.ndarray, identifier: int, example: int, paths: int) -> View:
        (number,) = self._drawn(example, paths, lambda rng: (rng.integers(len(self._cells), size=BLOCK),))
        number[0] = 0
        return Rearranged(inputs, identifier, self._cells[number], np.tile(self._tokens, (paths, 1)))


class ArcViews(Views):
    """Turns and colours of an ARC task.

    names: of the puzzles by identifier. A puzzle embedding belongs to one turn and one colour permutation, so
    a model with embeddings gets only symmetries among the names of the task. None: any symmetry.
    """

    def __init__(self, seed: int, names: Sequence[str] | None) -> None:
        super().__init__(seed)
        self._names = names
        self._of_task: dict[str, list[int]] = {}
        for identifier, name in enumerate(names or ()):
            self._of_task.setdefault(symmetry_of(name)[0], []).append(identifier)

    def of(self, inputs: np.ndarray, identifier: int, example: int, paths: int) -> View:
        if grid_of(inputs) is None:
            return Plain(inputs, identifier, paths)

        def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
            return rng.random(BLOCK), rng.integers(len(TURNS), size=BLOCK), rng.random((BLOCK, COLOURS - 1))

        number, turns, order = self._drawn(example, paths, draw)
        colours = np.zeros((paths, COLOURS), int)
        colours[:, 1:] = order.argsort(axis=1) + 1
        if self._names is None:
            codes = ["".join(map(str, row)) for row in colours.tolist()]
            ways = [
                _way("task", f"task_t{turn}_{code}", identifier)
                for turn, code in zip(turns.tolist(), codes, strict=True)
            ]
        else:
            own = self._names[identifier]
            others = self._of_task[symmetry_of(own)[0]]
            chosen = [others[int(share * len(others))] for share in number.tolist()]
            ways = [_way(own, self._names[other], other) for other in chosen]
        ways[0] = Way(lambda grid: grid, lambda grid: grid, identifier)
        return Turned(inputs, ways)


def _way(own: str, other: str, identifier: int) -> Way:
    """The symmetry that maps the puzzle of one name to the puzzle of another name of its task."""
    home, away = inverse(own), inverse(other)
    return Way(lambda grid: _applied(other, home(grid)), lambda grid: _applied(own, away(grid)), identifier)


def _applied(name: str, grid: np.ndarray) -> np.ndarray:
    """Transforms a task's grid to that of the puzzle of this name."""
    _, turn, colours = symmetry_of(name)
    return np.array([int(digit) for digit in colours], np.uint8)[TURNS[turn](grid)]


def views_for(kind: Kind, seed: int, names: Sequence[str] | None) -> Views:
    """The symmetric views of a kind. names: see ArcViews. Raises UserError for a kind without symmetries."""
    made: Mapping[str, Callable[[], Views]] = {
        "sudoku": lambda: SudokuViews(seed, kind),
        "maze": lambda: MazeViews(seed, kind),
        "arc": lambda: ArcViews(seed, names),
    }
    if kind.name not in made:
        raise UserError(
            f"by=symmetry: puzzles of kind {kind.name} have no known symmetries; write by=init, by=noise"
        )
    return made[kind.name]()
