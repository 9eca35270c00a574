"""A search that cannot end in time gives up and says so: solver, typed puzzle, builder and inspection."""

from collections.abc import Callable

import numpy as np
import pytest

from hrm.data.inspect import rules
from hrm.data.puzzle_kinds import Kind
from hrm.data.sudoku import files, solver
from hrm.data.sudoku.files import SudokuError, prove_proper, read_puzzles
from hrm.data.sudoku.solver import MOST_GUESSES, UNDECIDED

# It has no solution, and its clues show that only after a search of many million grids.
ENDLESS = ".....5.8....6.1.43..........1.5........1.6...3.......553.....61........4........."
PROPER = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"


def grid(text: str) -> np.ndarray:
    return np.array([0 if cell == "." else int(cell) for cell in text], np.uint8)


@pytest.fixture(scope="module")
def search() -> Callable[..., None]:
    """`solve_each` for the two grids, which are searched once."""
    grids = np.stack([grid(PROPER), grid(ENDLESS)])
    kept: tuple[np.ndarray, ...] = (np.zeros_like(grids), np.zeros(2, np.int32), np.zeros(2, np.uint8))
    solver.solve_each(grids, *kept)
    assert kept[1][1] == MOST_GUESSES + 1 and kept[2].tolist() == [1, UNDECIDED]

    def remembered(asked: np.ndarray, *filled: np.ndarray) -> None:
        rows = [int((puzzle == grids[1]).all()) for puzzle in asked]
        for array, values in zip(filled, kept, strict=True):
            array[:] = values[rows]

    return remembered


def test_the_inspection_leaves_it_undecided(search, monkeypatch):
    monkeypatch.setattr(rules, "solve_each", search)
    assert rules._solutions(np.stack([grid(PROPER), grid(ENDLESS)]), "").tolist() == [1, UNDECIDED]


def test_a_typed_puzzle_is_refused_with_the_reason():
    kind = Kind("sudoku", 9, 9, 11)
    (problem,) = kind.impossible(kind.parse(ENDLESS))
    assert problem.startswith("the search for a solution gave up after 1,000,000 guesses")
    assert not kind.impossible(kind.parse(PROPER))


def test_the_builder_names_the_line_and_the_reason(search, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "solve_each", search)
    file = tmp_path / "puzzles.txt"
    file.write_text(f"{PROPER}\n{ENDLESS}\n")
    with pytest.raises(SudokuError, match=r"line 2.*gave up after 1,000,000 guesses.*--skip-improper"):
        prove_proper(read_puzzles(file, 9), 1)
    (note,) = read_puzzles(file, 9, skip_improper=True).notes
    counts = "1 improper, 0 with no solution and 0 with several, 1 on which the search gave up: line 2"
    assert note == f"puzzles.txt: left out {counts}"


def test_a_random_grid_is_found_after_a_failed_search(monkeypatch):
    tried = []

    def search(puzzle: np.ndarray, limit: int, random: int) -> tuple[np.ndarray, int]:
        tried.append(random)
        return np.ones((int(len(tried) > 2), 16), np.uint8), 0

    monkeypatch.setattr(solver, "_solve", search)
    assert len(solver.random_grid(4, np.random.default_rng(0))) == 16
    assert len(set(tried)) == 3
