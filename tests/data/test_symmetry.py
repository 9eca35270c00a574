"""Canonical forms: the least of all equivalent grids, by brute force, and nothing that symmetry changes."""

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm.data.sudoku.build import _transform
from hrm.data.sudoku.files import Puzzles
from hrm.data.sudoku.solver import BOXES, random_grid, random_puzzle, solutions
from hrm.data.sudoku.symmetry import canonical_forms, leaks


def lines(size: int, inside: int) -> np.ndarray:
    """Every order of the rows, or columns, that keeps those of a band of `inside` together."""
    bands = [range(first, first + inside) for first in range(0, size, inside)]
    orders = [
        [line for band in chosen for line in band]
        for outer in permutations(bands)
        for chosen in product(*(permutations(band) for band in outer))
    ]
    return np.array(orders)


def least(grid: np.ndarray, question: np.ndarray) -> tuple[bytes, bytes]:
    """The least of all rearrangements, each renamed so that its first row is 1 to n, and its puzzle."""
    size = int(len(grid) ** 0.5)
    height, width = BOXES[size]
    columns, rows = lines(size, width), lines(size, height)
    forms = []
    for turned, first in product(range(2 if height == width else 1), range(size)):
        cells = np.arange(size * size).reshape(size, size)
        moved = (cells.T if turned else cells)[:, columns].swapaxes(0, 1)
        names = np.zeros((len(columns), size + 1), np.uint8)
        np.put_along_axis(names, grid[moved[:, first]], np.arange(1, size + 1, dtype=np.uint8)[None], axis=1)
        named = np.take_along_axis(names, grid[moved].reshape(len(columns), -1), axis=1).reshape(moved.shape)
        both = np.stack([named, np.where(question[moved] > 0, named, 0)])
        # Every order of the columns with every order of the rows that begins with this one, cell by cell.
        column, row = np.nonzero(np.ones((len(columns), 1), bool) & (rows[:, 0] == first))
        for layer, down, across in product(range(2), range(size), range(size)):
            values = both[layer, column, rows[row, down], across]
            column, row = (index[values == values.min()] for index in (column, row))
        forms.append(tuple(layer[column[0], rows[row[0]]].tobytes() for layer in both))
    return min(forms)


@pytest.mark.parametrize("size", [4, 6, 9])
def test_the_form_is_the_least_of_all(size: int) -> None:
    draw = np.random.default_rng(size)
    for _ in range({4: 40, 6: 8, 9: 2}[size]):
        grid = random_grid(size, draw)
        question = random_puzzle(grid, draw)
        form, puzzle = canonical_forms(grid[None], question[None])
        assert (form[0].tobytes(), puzzle[0].tobytes()) == least(grid, question)


@pytest.mark.parametrize(("size", "grids", "classes"), [(4, 288, 2), (6, 3000, 49)])
def test_there_are_as_many_forms_as_kinds_of_grids(size: int, grids: int, classes: int) -> None:
    """2 and 49 are known: Sudoku grids of 4x4 and of 6x6 cells that symmetry does not make equal."""
    draw = np.random.default_rng(0)
    if size == 4:
        drawn = solutions(np.zeros(16, np.uint8), grids)[0]
    else:
        drawn = np.array([random_grid(size, draw) for _ in range(grids)])
    forms, _ = canonical_forms(drawn, drawn)
    assert len(np.unique(forms, axis=0)) == classes
    again, _ = canonical_forms(forms, forms)
    np.testing.assert_array_equal(again, forms)


@pytest.mark.parametrize("size", [4, 6, 9])
def test_symmetries_change_nothing(size: int) -> None:
    draw = np.random.default_rng(1)
    for _ in range(5):
        grid = random_grid(size, draw)
        question = random_puzzle(grid, draw)
        questions, answers = _transform(np.tile(question, (60, 1)), np.tile(grid, (60, 1)), size, draw)
        forms, puzzles = canonical_forms(answers, questions)
        alone, puzzle = canonical_forms(grid[None], question[None])
        assert (forms == alone).all() and (puzzles == puzzle).all()
        # A clue more or less is another puzzle.
        question[np.argmax(question > 0)] = 0
        assert (canonical_forms(grid[None], question[None])[1] != puzzle).any()


def test_symmetries_change_nothing_of_many_grids() -> None:
    draw = np.random.default_rng(3)
    grids = np.array([random_grid(9, draw) for _ in range(1500)])
    questions = np.where(draw.random(grids.shape) < 0.3, grids, np.uint8(0))
    forms = canonical_forms(grids, questions)
    again = canonical_forms(*_transform(questions, grids, 9, draw)[::-1])
    for one, other in zip(forms, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(np.unique(forms[0], axis=0)) == 1500


# The grid that has the most symmetries of its own, 648 without the names of the digits; rows shift by blocks.
SHIFTS = [[(3 * (row % 3) + row // 3 + column) % 9 + 1 for column in range(9)] for row in range(9)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(0, 80), min_size=1, max_size=80))
def test_puzzles_of_a_symmetric_grid_stay_different(seed: int, blanks: list[int]) -> None:
    """Where many rearrangements take the solution to its form, the question's is still one."""
    grid = np.array(SHIFTS, np.uint8).ravel()
    question = grid.copy()
    question[blanks] = 0
    questions, answers = _transform(
        np.tile(question, (10, 1)), np.tile(grid, (10, 1)), 9, np.random.default_rng(seed)
    )
    forms, puzzles = canonical_forms(np.vstack([grid, answers]), np.vstack([question, questions]))
    assert (forms == forms[0]).all() and (puzzles == puzzles[0]).all()
    assert ((puzzles == 0) | (puzzles == forms)).all() and (puzzles[0] > 0).sum() == (question > 0).sum()


def test_overlap_of_splits_is_found() -> None:
    draw = np.random.default_rng(2)
    answers = np.array([random_grid(9, draw) for _ in range(600)])
    questions = np.array([random_puzzle(answer, draw, 30) for answer in answers])

    def puzzles(rows: list[int]) -> Puzzles:
        moved = _transform(questions[rows], answers[rows], 9, draw)
        return Puzzles(*moved, np.zeros(len(rows), np.int32))

    # More than one share of the work, with what is shared at its ends.
    train, test = puzzles(list(range(520))), puzzles([519, 550, 0, 551, 255, 256])
    # The same grid, another puzzle of it.
    test.questions[2] = random_puzzle(test.answers[2], draw, 29)
    for workers in (1, 3):
        found = leaks(train, test, workers)
        assert found.test_grids.tolist() == [True, False, True, False, True, True]
        assert found.test_puzzles.tolist() == [True, False, False, False, True, True]
        assert np.nonzero(found.train_grids)[0].tolist() == [0, 255, 256, 519]
