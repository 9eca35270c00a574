"""Puzzles as somebody gives them to be solved: typed, in a file, or an ARC task; each one that has an answer.

Nothing here needs PyTorch, which takes seconds to import: what is wrong with a puzzle is told without it.
"""

import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hrm.common.errors import UserError
from hrm.common.files import read_text
from hrm.data.arc.augment import canvas
from hrm.data.arc.files import Task, read_task
from hrm.data.puzzle_kinds import ARC, MAZE_VOCABULARY, SUDOKU, Kind
from hrm.data.sudoku.solver import solutions

MAX_TEXT_BYTES = 16 << 20
EXPECTED = "puzzles, one a line"
# Cells along a maze, far more than any model was trained for.
MOST_SIDE = 1024
# Of what is wrong with a puzzle or a board, how much is said.
MOST_TOLD = 5
# What stands between the cells of a Sudoku that somebody typed.
_RULERS = str.maketrans("", "", "|+- \t")
_CELLS = frozenset("#SGo0123456789.|+- \t\r\n")


@dataclass(frozen=True)
class Puzzle:
    """What is to be solved. question, answer: (S) tokens, None where not known. title: a name."""

    question: np.ndarray
    answer: np.ndarray | None
    title: str


@dataclass(frozen=True)
class Puzzles:
    """The puzzles of one file or argument, all of one kind; task: of ARC, what they are the tests of."""

    kind: Kind
    puzzles: Sequence[Puzzle]
    task: Task | None = None


def read_puzzles(source: str) -> Puzzles:
    """The puzzles that an argument is or names: cells, a file, `-` for standard input, an ARC task's .json.

    Raises UserError for what has no answer, with row and column, or file and cell.
    """
    if source != "-" and not os.path.isfile(source):
        # A few wrong characters do not make a file of it: they are told with row and column.
        strange = sum(character not in _CELLS for character in source)
        if os.sep in source or 4 * strange > len(source):
            raise UserError(
                f"{source[:100]!r}: no such file, nor a puzzle; expected a file, or the 16, 36 or 81 cells "
                "of a Sudoku ('.' or 0 is blank), or those of a square maze ('#', 'S', 'G', '.')"
            )
        return _boards(source, "the puzzle")
    if source.endswith(".json"):
        return _arc_task(Path(source))
    if source != "-":
        return _boards(read_text(source, MAX_TEXT_BYTES, EXPECTED), source)
    where, text = "standard input", sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
    if len(text) > MAX_TEXT_BYTES:
        raise UserError(f"{where}: more than {MAX_TEXT_BYTES >> 20} MiB, expected {EXPECTED}")
    try:
        return _boards(text.decode("utf-8-sig"), where)
    except UnicodeDecodeError:
        raise UserError(f"{where}: not text in UTF-8, expected {EXPECTED}") from None


def _arc_task(path: Path) -> Puzzles:
    # As a task of evaluation, whose tests need no output.
    task = read_task(path)
    tests = [
        Puzzle(
            canvas(pair.input),
            None if pair.output is None else canvas(pair.output),
            f"{task.name}, test {number + 1}",
        )
        for number, pair in enumerate(task.test)
    ]
    return Puzzles(Kind("arc", 30, 30, ARC[0]), tests, task)


def _boards(text: str, where: str) -> Puzzles:
    """Puzzles of Sudoku or mazes: one board over several lines, or one puzzle in each line."""
    is_maze = bool(set(text) & set("#SG"))
    lines = [line for line in text.splitlines() if (line if is_maze else line.translate(_RULERS))]
    if not lines:
        raise UserError(f"{where}: empty; expected a puzzle")
    cells = [len(line if is_maze else line.translate(_RULERS)) for line in lines]
    sides = [math.isqrt(count) for count in cells]
    sizes = [math.isqrt(size) for _, size in SUDOKU]
    is_side = range(2, MOST_SIDE + 1).__contains__ if is_maze else sizes.__contains__
    # One board, even if some rows of it are too long or too short: which, the kind tells.
    if is_side(len(lines)) and len(lines) in cells:
        side, boards = len(lines), ["\n".join(lines)]
    elif is_side(sides[0]) and all(count == sides[0] ** 2 for count in cells):
        side, boards = sides[0], lines
    else:
        line = 0 if len(lines) == 1 else next((n for n, count in enumerate(cells) if count != cells[0]), 0)
        place = where if len(lines) == 1 else f"{where}, line {line + 1}"
        expected = "16, 36 or 81 cells, '.' or 0 for a blank"
        if is_maze:
            expected = f"as many rows as columns, {MOST_SIDE} at most"
        raise UserError(
            f"{place}: {cells[line]} cells in one line of {len(lines)}; expected {expected}, in one line or "
            "in a line for each row"
        )
    kind = Kind("maze" if is_maze else "sudoku", side, side, MAZE_VOCABULARY if is_maze else side + 2)
    return Puzzles(kind, list(_questions(kind, boards, where)))


def _questions(kind: Kind, boards: Sequence[str], where: str) -> Iterator[Puzzle]:
    for number, board in enumerate(boards):
        place = where if len(boards) == 1 else f"{where}, puzzle {number + 1}"
        try:
            question = kind.parse(board)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        if wrong := kind.impossible(question):
            raise UserError(f"{place}: {shortened(wrong)}; correct it, for no answer can be right")
        yield Puzzle(question, _only_answer(kind, question), place)


def _only_answer(kind: Kind, question: np.ndarray) -> np.ndarray | None:
    """The answer where there is but one: shortest paths may be several."""
    if kind.name != "sudoku":
        return None
    return solutions((question - 1).astype(np.uint8))[0][0] + 1


def shortened(problems: Sequence[str]) -> str:
    """The first of some problems in one line, and how many more there are."""
    more = len(problems) - MOST_TOLD
    return "; ".join(problems[:MOST_TOLD]) + (f"; and {more} more" if more > 0 else "")
