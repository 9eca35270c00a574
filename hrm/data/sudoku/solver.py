"""A Sudoku solver that rates and generates puzzles, for grids of 4x4, 6x6, 9x9 and 16x16 cells.

A grid is a uint8 array of n*n digits, row by row, 0 for a blank cell. One compiled search solves, counts
solutions, rates, and fills grids at random.
"""

from functools import lru_cache

import numpy as np

from hrm.common.errors import UserError
from hrm.data.workers import compiled

# Rows and columns of a box, for each size of grid.
BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3), 16: (4, 4)}
# Maximum number of guesses of a search; the hardest 9x9 puzzles need a few thousand.
MOST_GUESSES = 1_000_000
# Stands for the number of solutions in `solve_each` if the search gave up.
UNDECIDED = 255
GAVE_UP = f"the search for a solution gave up after {MOST_GUESSES:,} guesses"


class SudokuError(UserError):
    """A grid, file or request that does not allow a Sudoku data set."""


@lru_cache
def units(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cells of every row, column and box, (3n, n), and row, column and box of every cell, (n*n, 3); int32."""
    height, width = BOXES[size]
    row, column = np.divmod(np.arange(size * size), size)
    box = row // height * height + column // width
    members = np.stack([row, column + size, box + 2 * size], axis=1).astype(np.int32)
    cells = np.stack([np.nonzero((members == unit).any(axis=1))[0] for unit in range(3 * size)])
    return cells.astype(np.int32), members


def solutions(grid: np.ndarray, limit: int = 2) -> tuple[np.ndarray, int]:
    """Solves a grid: its first `limit` solutions, (found, n*n) uint8, and the number of guesses.

    grid: (n*n,) uint8. The solver fills naked and hidden singles and otherwise tries the values of a cell
    with the fewest candidates. Choosing one of several values is a guess; taking the last remaining value is
    not. The difficulty of a puzzle is the number of guesses with limit=2, which solves it and proves the
    solution unique; it does not depend on the labels of the digits. A search gives up after MOST_GUESSES and
    reports one guess more.
    """
    found, guesses = _solve(grid, limit, 0)
    return found, guesses


def solve_each(grids: np.ndarray, answers: np.ndarray, guesses: np.ndarray, found: np.ndarray) -> None:
    """Solves many grids like `solutions` with limit 2, and releases Python's lock.

    grids: (N, n*n) uint8. Writes the first solution, if any, to answers (N, n*n) uint8, the guesses to (N,)
    int32, and the number of solutions to found (N,) uint8: 2 for several, UNDECIDED if the search gave up.
    """
    cells, members = units(int(grids.shape[1] ** 0.5))
    _search_each(grids, cells, members, answers, guesses, found)


def random_grid(size: int, rng: np.random.Generator) -> np.ndarray:
    """A random solved grid, (n*n,) uint8, by backtracking with the values of a cell in random order."""
    # If a search gives up, another order of values soon finds a grid.
    while not len(found := _solve(np.zeros(size * size, np.uint8), 1, int(rng.integers(1, 1 << 63)))[0]):
        pass
    return found[0]


def random_puzzle(solution: np.ndarray, rng: np.random.Generator, clues: int = 0) -> np.ndarray:
    """Removes digits from a solved grid in random order while the solution stays unique, (n*n,) uint8.

    Stops when `clues` are left, or when every clue is necessary: such a puzzle is irreducible.
    """
    puzzle = solution.copy()
    left = len(puzzle)
    for cell in rng.permutation(len(puzzle)):
        if left <= clues:
            break
        puzzle[cell] = 0
        found, guesses = _solve(puzzle, 2, 0)
        if len(found) == 1 and guesses <= MOST_GUESSES:
            left -= 1
        else:
            puzzle[cell] = solution[cell]
    return puzzle


def _solve(grid: np.ndarray, limit: int, random: int) -> tuple[np.ndarray, int]:
    cells, members = units(int(len(grid) ** 0.5))
    found = np.empty((limit, len(grid)), np.uint8)
    count, guesses = _search(grid, cells, members, np.array([random], np.uint64), found)
    return found[:count], guesses


@compiled
def _search_each(grids, units, members, answers, guesses, found):
    in_order = np.zeros(1, np.uint64)
    both = np.empty((2, grids.shape[1]), np.uint8)
    for row in range(len(grids)):
        found[row], guesses[row] = _search(grids[row], units, members, in_order, both)
        if guesses[row] > MOST_GUESSES:
            found[row] = UNDECIDED
        elif found[row]:
            answers[row] = both[0]


@compiled
def _candidates(state, members, cell, full):
    """The candidates of a cell: digits absent from its row, column and box."""
    cells = len(members)
    used = state[cells + members[cell, 0]] | state[cells + members[cell, 1]] | state[cells + members[cell, 2]]
    return full & ~used


@compiled
def _place(state, members, cell, bit):
    state[cell] = bit
    for unit in members[cell]:
        state[len(members) + unit] |= bit


@compiled
def _search(grid, units, members, random, found):
    """Depth-first search for up to len(found) solutions; returns their number and the guesses made.

    A level of the search is a row of `stack`: the digit placed in every cell, then the digits used in every
    unit, as bits (digit 1 is bit 0). random[0] is the state of a xorshift generator; 0 tries values in order.
    """
    size = units.shape[1]
    cells = size * size
    full = (1 << size) - 1
    stack = np.zeros((cells + 1, cells + 3 * size), np.int32)
    branch = np.zeros(cells + 1, np.int32)
    left = np.zeros(cells + 1, np.int32)
    count = guesses = depth = 0
    state = stack[0]
    for cell in range(cells):
        if grid[cell]:
            bit = 1 << (int(grid[cell]) - 1)
            if not _candidates(state, members, cell, full) & bit:
                return 0, 0
            _place(state, members, cell, bit)

    while True:
        # Fills singles until there are none; then `best` is the blank cell with the fewest candidates.
        alive = progress = True
        best = -1
        while alive and progress:
            progress = False
            best, fewest = -1, size + 1
            for cell in range(cells):
                if state[cell]:
                    continue
                mask = _candidates(state, members, cell, full)
                number = 0
                rest = mask
                while rest:
                    rest &= rest - 1
                    number += 1
                if number == 1:
                    _place(state, members, cell, mask)
                    progress = True
                elif number < fewest:
                    best, fewest = cell, number
            if fewest == 0:
                alive = False
                break
            for unit in range(3 * size):
                once, twice = state[cells + unit], 0
                for cell in units[unit]:
                    if not state[cell]:
                        mask = _candidates(state, members, cell, full)
                        twice |= once & mask
                        once |= mask
                if once != full:
                    alive = False
                    break
                hidden = once & ~twice & ~state[cells + unit]
                for cell in units[unit]:
                    if hidden and not state[cell]:
                        mask = _candidates(state, members, cell, full) & hidden
                        # If two digits need the same cell, it takes one and the other is missing from its
                        # unit.
                        mask &= -mask
                        if mask:
                            _place(state, members, cell, mask)
                            progress = True

        if alive and best >= 0:
            branch[depth] = best
            left[depth] = _candidates(state, members, best, full)
        else:
            if alive:
                for cell in range(cells):
                    digit = 0
                    while state[cell] >> digit:
                        digit += 1
                    found[count, cell] = digit
                count += 1
                if count == len(found):
                    return count, guesses
            depth -= 1
            while depth >= 0 and left[depth] == 0:
                depth -= 1
            if depth < 0:
                return count, guesses

        number = 0
        rest = left[depth]
        while rest:
            rest &= rest - 1
            number += 1
        rest = left[depth]
        if number > 1:
            guesses += 1
            if guesses > MOST_GUESSES:
                return count, guesses
            if random[0]:
                random[0] ^= random[0] << np.uint64(13)
                random[0] ^= random[0] >> np.uint64(7)
                random[0] ^= random[0] << np.uint64(17)
                for _ in range(random[0] % np.uint64(number)):
                    rest &= rest - 1
        bit = rest & -rest
        left[depth] ^= bit
        stack[depth + 1] = stack[depth]
        depth += 1
        state = stack[depth]
        _place(state, members, branch[depth - 1], bit)
