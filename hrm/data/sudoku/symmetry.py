"""Canonical forms of Sudoku grids and puzzles, which are equal exactly for equivalent ones.

Two solved grids are equivalent if one becomes the other by relabelling the digits, by permuting bands,
stacks, the rows in a band and the columns in a stack, and, with square boxes, by transposing. The canonical
form of a grid is the lexicographically smallest equivalent grid, read row by row. The form of a puzzle is the
smallest question among the rearrangements that map its solution to the canonical form.

The search: the first row of a form is 1 to n, so a choice of transposition, first row and column order
determines the digits; the first column then determines the order of the other rows. A 9x9 grid has 2 * 9 *
1296 such forms; the beginning of the second row excludes most of them before the columns of the last stack
are chosen.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product

import numpy as np

from hrm.data.sudoku.files import Puzzles, row_keys
from hrm.data.sudoku.solver import BOXES
from hrm.data.workers import compiled, over_rows


def canonical_forms(grids: np.ndarray, questions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Canonical forms of solved grids and of their puzzles, both (N, n*n) uint8.

    grids, questions: (N, n*n) uint8, questions have 0 for a blank cell, otherwise the digit of the grid.
    """
    size = int(grids.shape[1] ** 0.5)
    height, width = BOXES[size]
    forms = np.empty((len(grids), 2, size, size), np.uint8)
    _forms(grids, questions, _column_orders(size), height, 2 if height == width else 1, forms)
    flat = forms.reshape(len(grids), 2, -1)
    return flat[:, 0], flat[:, 0] * flat[:, 1]


def random_symmetries(count: int, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random symmetries of grids with n = `size`: cells (count, n*n) and digits (count, n + 1) uint8.

    Cell i of the symmetric grid holds digits[d], where d is the digit in cell cells[i]; a blank stays blank.
    They permute bands, rows in a band, stacks and columns in a stack, and transpose if boxes are square.
    """
    height, width = BOXES[size]

    def lines(inside: int) -> np.ndarray:
        outer = rng.random((count, size // inside)).argsort(axis=1)
        inner = rng.random((count, size // inside, inside)).argsort(axis=2)
        return (outer[:, :, None] * inside + inner).reshape(count, size)

    row, column = lines(height)[:, :, None], lines(width)[:, None, :]
    cells = row * size + column
    if height == width:
        cells = np.where(rng.random((count, 1, 1)) < 0.5, column * size + row, cells)
    digits = np.zeros((count, size + 1), np.uint8)
    digits[:, 1:] = rng.random((count, size)).argsort(axis=1) + 1
    return cells.reshape(count, -1), digits


@dataclass(frozen=True)
class Leaks:
    """The training and test puzzles that are equal up to symmetry; (N,) and (M,) bool."""

    train_grids: np.ndarray
    test_grids: np.ndarray
    test_puzzles: np.ndarray


def leaks(train: Puzzles, test: Puzzles, workers: int) -> Leaks:
    """Masks of the solutions equivalent to a solution of the other split, and of test puzzles to a training
    puzzle."""

    def keys(puzzles: Puzzles, name: str) -> np.ndarray:
        # Keep only a digest of each form, 16 bytes per puzzle.
        found = np.empty((2, len(puzzles.questions)), np.uint64)

        def work(part: slice) -> None:
            forms = canonical_forms(puzzles.answers[part], puzzles.questions[part])
            found[:, part] = [row_keys(form) for form in forms]

        over_rows(work, len(puzzles.questions), workers, f"symmetries of {name}")
        return found

    ours, theirs = keys(train, "train"), keys(test, "test")
    return Leaks(
        train_grids=np.isin(ours[0], theirs[0]),
        test_grids=np.isin(theirs[0], ours[0]),
        test_puzzles=np.isin(theirs[1], ours[1]),
    )


@lru_cache
def _column_orders(size: int) -> np.ndarray:
    """All column orders that keep stacks together; the order in the last stack varies fastest."""
    width = BOXES[size][1]
    stacks = [range(first, first + width) for first in range(0, size, width)]
    return np.array(
        [
            [column for stack in inside for column in stack]
            for outer in permutations(stacks)
            for inside in product(*map(permutations, outer))
        ],
        np.int64,
    )


@compiled
def _forms(grids, questions, orders, height, turns, forms):
    size = orders.shape[1]
    square = np.empty((2, size, size), np.uint8)
    for number in range(len(grids)):
        forms[number] = 255
        for turn in range(turns):
            for row in range(size):
                for column in range(size):
                    cell = column * size + row if turn else row * size + column
                    square[0, row, column] = grids[number, cell]
                    square[1, row, column] = questions[number, cell] > 0
            _lower(square, orders, height, forms[number])


@compiled
def _lower(square, orders, height, best):
    """Lowers `best` to the smallest form of a grid; layer 0 of both holds digits, layer 1 marks the clues."""
    size = orders.shape[1]
    width = size // height
    known = size - width
    # Number of consecutive orders that differ only in the last stack.
    block = 1
    for factor in range(2, width + 1):
        block *= factor
    label = np.empty(size + 1, np.uint8)
    rows = np.empty(size, np.int64)
    for first in range(size):
        band = first - first % height
        for second in range(band, band + height):
            if second == first:
                continue
            for begin in range(0, len(orders), block):
                for column in range(size):
                    # A lower bound for the digits that the last stack will define.
                    label[square[0, first, orders[begin, column]]] = min(column, known) + 1
                above = False
                for column in range(known):
                    digit = label[square[0, second, orders[begin, column]]]
                    if digit != best[0, 1, column]:
                        above = digit > best[0, 1, column]
                        break
                if above:
                    continue
                for order in orders[begin : begin + block]:
                    for column in range(known, size):
                        label[square[0, first, order[column]]] = column + 1
                    _least_rows(square, order, label, height, rows)
                    if rows[1] == second and _is_less(square, order, label, rows, best):
                        for row in range(size):
                            for column in range(size):
                                best[0, row, column] = label[square[0, rows[row], order[column]]]
                                best[1, row, column] = square[1, rows[row], order[column]]


@compiled
def _least_rows(square, order, label, height, rows):
    """The smallest order of the rows: by their first digit, within bands."""
    size = len(order)
    row_of = np.empty(size + 1, np.int64)
    for row in range(size):
        row_of[label[square[0, row, order[0]]]] = row
    place = 0
    placed = 0
    for digit in range(1, size + 1):
        band = row_of[digit] // height
        if placed >> band & 1:
            continue
        placed |= 1 << band
        for following in range(digit, size + 1):
            if row_of[following] // height == band:
                rows[place] = row_of[following]
                place += 1


@compiled
def _is_less(square, order, label, rows, best):
    for row in range(len(rows)):
        for column in range(len(order)):
            digit = label[square[0, rows[row], order[column]]]
            if digit != best[0, row, column]:
                return digit < best[0, row, column]
    for row in range(len(rows)):
        for column in range(len(order)):
            clue = square[1, rows[row], order[column]]
            if clue != best[1, row, column]:
                return clue < best[1, row, column]
    return False
