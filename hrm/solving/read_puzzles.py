"""Reads puzzles to solve from the command line, a file or an ARC task, and checks that each has an answer.

This module does not import PyTorch, which takes seconds, so that mistakes are reported immediately.
"""

import csv
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hrm.common.errors import UserError
from hrm.common.files import read_text
from hrm.common.text import counted
from hrm.data.arc.augment import LARGEST_SIDE, SIDE, VOCAB_SIZE, canvas
from hrm.data.arc.files import Task, read_task
from hrm.data.maze.text import is_grid_row
from hrm.data.maze.text import read_rows as read_maze_rows
from hrm.data.puzzle_kinds import MAZE_VOCABULARY, Kind
from hrm.data.sudoku.solver import solutions
from hrm.data.sudoku.text import FOREIGN, SYMBOLS, cells_of, digit_table, read_rows, size_of
from hrm.data.tables import Row

MAX_TEXT_BYTES = 16 << 20
EXPECTED = "puzzles, one a line"
# Maximum side of a maze, far more than any model was trained for.
MOST_SIDE = 1024
# Maximum number of problems of a board in one message.
MOST_TOLD = 5
_CELLS = frozenset("#SGoEX0123456789.*_|+-= \t\r\n")
# A typed 16x16 Sudoku also has letters, and is longer than file names.
_LETTERS, _LONG = frozenset("ABCDEFGabcdefg"), 250


@dataclass(frozen=True)
class Puzzle:
    """A puzzle. question, answer: (S) tokens; an unknown answer is None. title: the puzzle's name."""

    question: np.ndarray
    answer: np.ndarray | None
    title: str


@dataclass(frozen=True)
class Puzzles:
    """The puzzles of one file or argument, all of one kind. task: their ARC task."""

    kind: Kind
    puzzles: Sequence[Puzzle]
    task: Task | None = None


def read_puzzles(source: str) -> Puzzles:
    """The puzzles in an argument: cells, a file, `-` for standard input, or an ARC task's .json.

    Raises UserError for a puzzle without an answer.
    """
    if source != "-" and not os.path.isfile(source):
        # Text with few other characters is a mistyped puzzle, not a file name.
        cells = _CELLS | (_LETTERS if len(source) > _LONG else frozenset())
        strange = sum(character not in cells for character in source)
        if os.sep in source or 4 * strange > len(source):
            raise UserError(
                f"{source[:100]!r}: no such file, nor a puzzle; expected a file, or the 16, 36, 81 or 256 "
                "cells of a Sudoku ('.' or 0 is blank), or those of a maze ('#', 'S', 'G', '.')"
            )
        return _boards(source, "the puzzle")
    if source.endswith(".json"):
        # The canvas depends on the model, which is unknown here.
        return arc_puzzles(read_task(Path(source), LARGEST_SIDE))
    if source != "-":
        return _boards(read_text(source, MAX_TEXT_BYTES, EXPECTED), source)
    where, text = "standard input", sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
    if len(text) > MAX_TEXT_BYTES:
        raise UserError(f"{where}: more than {MAX_TEXT_BYTES >> 20} MiB, expected {EXPECTED}")
    try:
        return _boards(text.decode("utf-8-sig"), where)
    except UnicodeDecodeError:
        raise UserError(f"{where}: not text in UTF-8, expected {EXPECTED}") from None


def arc_puzzles(task: Task, side: int | None = None) -> Puzzles:
    """The tests of an ARC task on canvases of this side; None: the official side, or larger if a grid needs
    it.

    Raises UserError for a grid larger than the canvas.
    """
    largest = max((grid for pair in task.pairs for grid in pair.grids), key=lambda grid: max(grid.shape))
    needed = max(largest.shape)
    side = side or max(SIDE, needed)
    if needed > side:
        rows, cols = largest.shape
        raise UserError(
            f"{task.where}: a grid of {rows} x {cols} cells, but the model was trained on canvases of "
            f"{side} x {side}; give a checkpoint trained on data built with --canvas {needed} or more"
        )
    tests = [
        Puzzle(
            canvas(pair.input, side=side),
            None if pair.output is None else canvas(pair.output, side=side),
            f"{task.name}, test {number + 1}",
        )
        for number, pair in enumerate(task.test)
    ]
    return Puzzles(Kind("arc", side, side, VOCAB_SIZE), tests, task)


def _boards(text: str, where: str) -> Puzzles:
    """Reads Sudokus in any format of `sudoku.text`, or mazes: one over several lines, or one per line."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{where}: empty; expected a puzzle")
    # A '#' may also start a comment in a Sudoku file, and a table of mazes may have ratings.
    digits = sum(map(text.count, "123456789"))
    if text.count("#") > digits or (not digits and set(text) & set("SGEX")):
        return _mazes(text, lines, where)
    return _sudokus(lines, where)


def _mazes(text: str, lines: Sequence[str], where: str) -> Puzzles:
    boards = _separate_mazes(text, where)
    if boards:
        return _mazes_of(boards, where)
    cells = [len(line) for line in lines]
    side = math.isqrt(cells[0])
    is_side = range(2, MOST_SIDE + 1).__contains__
    ends = [sum(line.count(mark) for mark in "SGE") for line in lines]
    is_many = len(lines) == 1 or all(count == 2 for count in ends)
    # A single board; its kind reports rows of wrong length.
    if is_side(len(lines)) and (len(lines) in cells or (not is_many and is_side(cells[0]))):
        rows, columns = len(lines), len(lines) if len(lines) in cells else cells[0]
        boards = ["\n".join(lines)]
    elif is_side(side) and all(count == side**2 for count in cells):
        rows, columns, boards = side, side, list(lines)
    else:
        expected = f"a square, or rows over several lines, {MOST_SIDE} at most"
        raise _unreadable(where, cells, expected)
    kind = Kind("maze", rows, columns, MAZE_VOCABULARY)
    return Puzzles(kind, list(_questions(kind, boards, where)))


def _separate_mazes(text: str, where: str) -> list[str]:
    """The mazes of a table, or of grids separated by blank lines or titles; empty for other text."""
    numbered = list(enumerate(text.splitlines(keepends=True), 1))
    try:
        rows = list(read_maze_rows(iter(numbered)))
    except (ValueError, csv.Error):
        return []
    boards = [row.question for row in rows if isinstance(row, Row)]
    if is_grid_row(numbered[0][1].rstrip("\r\n")) and not (len(rows) > 1 and "\n" in boards[0]):
        return []
    for row in rows:
        if not isinstance(row, Row):
            raise UserError(f"{where}, line {row[0]}: {row[1]}")
    return boards


def _mazes_of(boards: Sequence[str], where: str) -> Puzzles:
    lines = boards[0].splitlines() or [""]
    rows, columns = len(lines), len(lines[0])
    if rows == 1:
        rows = columns = math.isqrt(columns)
    if not (2 <= rows <= MOST_SIDE and 2 <= columns <= MOST_SIDE):
        raise _unreadable(where, [len(boards[0])], f"a maze of 2 to {MOST_SIDE} cells per side")
    kind = Kind("maze", rows, columns, MAZE_VOCABULARY)
    return Puzzles(kind, list(_questions(kind, boards, where)))


def _sudokus(lines: Sequence[str], where: str) -> Puzzles:
    numbered = list(enumerate(lines, 1))
    size = size_of(numbered)
    expected = "16, 36 or 81 cells, or 256 for 16x16, '.' or 0 for a blank"
    if size is None:
        raise _unreadable(where, [len(cells_of(line, 9)) for line in lines], expected)
    boards = []
    for row in read_rows(iter(numbered), size):
        if not isinstance(row, Row):
            raise UserError(f"{where}, line {row[0]}: {row[1]}")
        board = cells_of(row.question, size)
        if len(board) != size * size:
            raise _unreadable(where, [size * size] * (row.line - 1) + [len(board)], expected, len(lines))
        boards.append(board)
    if size > 9:
        table = digit_table(size, boards)
        spelled = {chr(code): f".{SYMBOLS}"[digit] for code, digit in enumerate(table) if digit != FOREIGN}
        boards = ["".join(spelled.get(cell, cell) for cell in board) for board in boards]
    kind = Kind("sudoku", size, size, size + 2)
    return Puzzles(kind, list(_questions(kind, boards, where)))


def _unreadable(where: str, cells: Sequence[int], expected: str, total: int = 0) -> UserError:
    """The error for the first line of another length. cells: number of cells in each line."""
    line = next((n for n, count in enumerate(cells) if count != cells[0]), 0)
    total = total or len(cells)
    place = where if total == 1 else f"{where}, line {line + 1}"
    there = f"{place}: {counted(cells[line], 'cell')} in one line of {total}"
    return UserError(f"{there}; expected {expected}, in one line or in a line for each row")


def _questions(kind: Kind, boards: Sequence[str], where: str) -> Iterator[Puzzle]:
    for number, board in enumerate(boards):
        place = where if len(boards) == 1 else f"{where}, puzzle {number + 1}"
        try:
            question = kind.parse(board)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        if wrong := kind.impossible(question):
            raise UserError(f"{place}: {shortened(wrong)}; correct it, because no single answer is right")
        yield Puzzle(question, _only_answer(kind, question), place)


def _only_answer(kind: Kind, question: np.ndarray) -> np.ndarray | None:
    """The unique answer of a Sudoku; None for mazes, which may have several."""
    if kind.name != "sudoku":
        return None
    return solutions((question - 1).astype(np.uint8))[0][0] + 1


def shortened(problems: Sequence[str]) -> str:
    """The first problems in one line, and the number of further ones."""
    more = len(problems) - MOST_TOLD
    return "; ".join(problems[:MOST_TOLD]) + (f"; and {more} more" if more > 0 else "")
