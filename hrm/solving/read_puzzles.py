"""Reads puzzles to solve, typed, from a file, or from an ARC task, and checks that each has an answer.

Nothing here imports PyTorch, which takes seconds, so that mistakes are reported at once.
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
# Most problems of a board in one message.
MOST_TOLD = 5
# Characters between the cells of a typed Sudoku.
_RULERS = str.maketrans("", "", "|+- \t")
_CELLS = frozenset("#SGo0123456789.|+- \t\r\n")


@dataclass(frozen=True)
class Puzzle:
    """A puzzle. question, answer: (S) tokens; an unknown answer is None. title: a name."""

    question: np.ndarray
    answer: np.ndarray | None
    title: str


@dataclass(frozen=True)
class Puzzles:
    """The puzzles of one file or argument, all of one kind. task: the ARC task that they test."""

    kind: Kind
    puzzles: Sequence[Puzzle]
    task: Task | None = None


def read_puzzles(source: str) -> Puzzles:
    """The puzzles in an argument: cells, a file, `-` for standard input, or an ARC task's .json.

    Raises UserError for a puzzle without an answer, with row and column, or file and cell.
    """
    if source != "-" and not os.path.isfile(source):
        # Text with few foreign characters is a mistyped puzzle, not a file name.
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
    # Read as an evaluation task, whose tests need no output.
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
    """Sudokus or mazes: one board over several lines, or one puzzle on each line."""
    is_maze = bool(set(text) & set("#SG"))
    lines = [line for line in text.splitlines() if (line if is_maze else line.translate(_RULERS))]
    if not lines:
        raise UserError(f"{where}: empty; expected a puzzle")
    cells = [len(line if is_maze else line.translate(_RULERS)) for line in lines]
    sides = [math.isqrt(count) for count in cells]
    sizes = [math.isqrt(size) for _, size in SUDOKU]
    is_side = range(2, MOST_SIDE + 1).__contains__ if is_maze else sizes.__contains__
    # One board; its kind reports rows of wrong length.
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
    """The only answer of a Sudoku; None for mazes, which may have several."""
    if kind.name != "sudoku":
        return None
    return solutions((question - 1).astype(np.uint8))[0][0] + 1


def shortened(problems: Sequence[str]) -> str:
    """The first problems in one line, and the number of others."""
    more = len(problems) - MOST_TOLD
    return "; ".join(problems[:MOST_TOLD]) + (f"; and {more} more" if more > 0 else "")
