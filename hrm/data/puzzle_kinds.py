"""What the tokens of a data set mean: Sudoku, maze or ARC boards read, written and judged by their rules.

A board is S = rows * cols tokens, row by row; 0 is padding. Sudoku: 1 blank, digit d is d + 1. Maze: 1 to 5
are the characters of "# SGo". ARC: 1 ends the grid, colour c is c + 2, on a canvas of 30 x 30. Rows, columns
and boxes are counted from 1 in what is said about a board.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hrm.common.errors import UserError
from hrm.data.arc.augment import canvas, grid_of
from hrm.data.format import Metadata

Tokens = Sequence[int] | np.ndarray

# Vocabulary and cells of the sizes of Sudoku.
SUDOKU = {(n + 2, n * n) for n in (4, 6, 9)}
ARC = (12, 900)
MAZE_VOCABULARY = 6
# How a terminal shows a cell that was filled in, and one that was to stay as it is.
FILLED, CHANGED, PLAIN = "\x1b[1;36m", "\x1b[1;31m", "\x1b[0m"
# Each of ARC's colours as one of a terminal's 256.
ARC_TERMINAL = (16, 27, 160, 34, 220, 244, 199, 208, 117, 88)


@dataclass(frozen=True)
class Kind:
    """A kind of puzzle on boards of rows x cols cells.

    name: "sudoku", "maze", "arc" or "other". Its methods take tokens as sequences of rows * cols integers,
    whatever they hold: a model's prediction is one.
    """

    name: str
    rows: int
    cols: int
    vocab_size: int = 256

    def parse(self, text: str) -> np.ndarray:
        """Tokens (S,) uint8 of a puzzle that somebody typed: in one line, or a line for each row.

        Sudoku: `.` or `0` is blank, and lines between boxes are passed over. Maze: `#`, `S`, `G` and `o`,
        with a space or `.` for an open cell. ARC: rows of digits, a grid of up to 30 x 30. Other: numbers.
        Raises UserError with row, column and what stands there.
        """
        return _RULES[self.name].parse(self, text)

    def text(self, tokens: Tokens, question: Tokens | None = None, color: bool = False) -> str:
        """A board for a terminal, without a newline at its end; `parse` reads it again.

        color: by ANSI codes, what the question did not hold stands out; ARC shows its colours.
        """
        asked = None if question is None else self.board(question)
        return _RULES[self.name].text(self, self.board(tokens), asked, color)

    def problems(self, question: Tokens, answer: Tokens) -> list[str]:
        """The rules that an answer breaks, with row, column or box; none when it is right.

        Sudoku: clues kept, every digit once in each unit. Maze: cells kept, a shortest path marked from S to
        G and nothing beside it. ARC: a grid in the upper left corner. Other: tokens of the vocabulary.
        """
        return list(_RULES[self.name].problems(self, self.board(question), self.board(answer)))

    def impossible(self, question: Tokens) -> list[str]:
        """What is wrong with a question; nothing when it has an answer, for Sudoku exactly one."""
        return list(_RULES[self.name].impossible(self, self.board(question)))

    def symbol(self, token: int) -> str:
        """The character of a token, "?" for one that the kind has none of; a number for other kinds."""
        return _RULES[self.name].symbol(token)

    def board(self, tokens: Tokens) -> np.ndarray:
        """The tokens as (S,) int64; raises ValueError when there are not S."""
        board = np.asarray(tokens)
        if board.shape != (self.rows * self.cols,):
            raise ValueError(f"tokens of shape {board.shape}, expected ({self.rows * self.cols},)")
        return board.astype(np.int64)

    def at(self, cell: int) -> str:
        """Where a cell is, in words."""
        return f"row {cell // self.cols + 1}, column {cell % self.cols + 1}"


def kind_of(metadata: Metadata) -> Kind:
    """The kind of a data set's puzzles, told by its vocabulary and its number of cells."""
    return kind_for(metadata.vocab_size, metadata.seq_len)


def kind_for(vocab_size: int, seq_len: int) -> Kind:
    """The kind of puzzles of seq_len cells over so many tokens."""
    side = math.isqrt(seq_len)
    square = side * side == seq_len
    if (vocab_size, seq_len) in SUDOKU:
        name = "sudoku"
    elif (vocab_size, seq_len) == ARC:
        name = "arc"
    else:
        name = "maze" if vocab_size == MAZE_VOCABULARY and square else "other"
    return Kind(name, side if square else 1, side if square else seq_len, vocab_size)


def arc_grid(tokens: Tokens) -> tuple[slice, slice]:
    """Rows and columns of ARC's canvas that hold colours, from the first to the last; (0, 0) when none do."""
    colours = _coloured(np.asarray(tokens).reshape(30, 30))
    rows, columns = (np.nonzero(colours.any(axis=axis))[0] for axis in (1, 0))
    if not len(rows):
        return slice(0, 0), slice(0, 0)
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _coloured(tokens: np.ndarray) -> np.ndarray:
    return (tokens >= 2) & (tokens < ARC[0])


class _Rules(ABC):
    """The characters of one kind's tokens, and its rules."""

    symbols: ClassVar[str] = ""
    # Other ways to write a character.
    also: ClassVar[Mapping[str, str]] = {}
    # The token of a cell that an answer fills in.
    blank: ClassVar[int] = -1

    @abstractmethod
    def expected(self, kind: Kind) -> str:
        """What a cell may be, in words."""

    def parse(self, kind: Kind, text: str) -> np.ndarray:
        return self.read(kind, [line for line in text.splitlines() if line])

    def text(self, kind: Kind, board: np.ndarray, question: np.ndarray | None, color: bool) -> str:
        return "\n".join("".join(row) for row in self.shown(kind, board, question, color))

    @abstractmethod
    def problems(self, kind: Kind, question: np.ndarray, answer: np.ndarray) -> Iterator[str]: ...

    @abstractmethod
    def impossible(self, kind: Kind, question: np.ndarray) -> Iterator[str]: ...

    def shown(
        self, kind: Kind, board: np.ndarray, question: np.ndarray | None, color: bool
    ) -> list[list[str]]:
        """The character of every cell, by rows; in colour where the question holds something else."""
        cells = [self.symbol(token) for token in board.tolist()]
        if color and question is not None:
            for cell in np.nonzero(board != question)[0]:
                paint = FILLED if question[cell] == self.blank else CHANGED
                cells[cell] = f"{paint}{cells[cell]}{PLAIN}"
        return [cells[first : first + kind.cols] for first in range(0, len(cells), kind.cols)]

    def symbol(self, token: int) -> str:
        return self.symbols[token] if 0 <= token < len(self.symbols) else "?"

    def read(self, kind: Kind, lines: Sequence[str]) -> np.ndarray:
        """Tokens of one line with all the cells, or of a line for each row."""
        cells = kind.rows * kind.cols
        if len(lines) == 1 and len(lines[0]) == cells:
            lines = [lines[0][first : first + kind.cols] for first in range(0, cells, kind.cols)]
        if len(lines) != kind.rows:
            there = f"{len(lines[0])} cells in one line" if len(lines) == 1 else f"{len(lines)} lines"
            raise UserError(
                f"{there}, expected {cells} cells in one line or {kind.rows} lines of {kind.cols}; a cell is "
                + self.expected(kind)
            )
        tokens = np.zeros(cells, np.uint8)
        for row, line in enumerate(lines):
            for column, character in enumerate(line[: kind.cols]):
                cell = row * kind.cols + column
                token = self.symbols.find(self.also.get(character, character))
                # Padding is shown, but nobody writes it.
                if not 1 <= token < self.vocabulary(kind):
                    raise UserError(f"{kind.at(cell)} is {character!r}, expected {self.expected(kind)}")
                tokens[cell] = token
            if len(line) != kind.cols:
                raise UserError(
                    f"row {row + 1} has {len(line)} cells, expected {kind.cols}; a cell is "
                    + self.expected(kind)
                )
        return tokens

    def vocabulary(self, kind: Kind) -> int:
        return len(self.symbols)


class _Sudoku(_Rules):
    symbols = "_.123456789"
    also: ClassVar = {"0": "."}
    blank = 1

    def expected(self, kind: Kind) -> str:
        return f"a digit 1 to {kind.rows}, or '.' or 0 for a blank"

    def vocabulary(self, kind: Kind) -> int:
        return kind.rows + 2

    def parse(self, kind: Kind, text: str) -> np.ndarray:
        kept = ("".join(c for c in line if c not in "|+-" and not c.isspace()) for line in text.splitlines())
        return self.read(kind, [line for line in kept if line])

    def text(self, kind: Kind, board: np.ndarray, question: np.ndarray | None, color: bool) -> str:
        height, width = self.box(kind)
        stacks = range(0, kind.cols, width)
        rule = "-+-".join("-" * (2 * width - 1) for _ in stacks)
        lines = []
        for number, row in enumerate(self.shown(kind, board, question, color)):
            if number and number % height == 0:
                lines.append(rule)
            lines.append(" | ".join(" ".join(row[first : first + width]) for first in stacks))
        return "\n".join(lines)

    def problems(self, kind: Kind, question: np.ndarray, answer: np.ndarray) -> Iterator[str]:
        clue = question > self.blank
        for cell in np.nonzero(clue & (answer != question))[0].tolist():
            yield f"{kind.at(cell)}: the clue {question[cell] - 1} was changed"
        for cell in np.nonzero(~clue & ~self.is_digit(kind, answer))[0].tolist():
            yield f"{kind.at(cell)} has no digit"
        yield from self.repetitions(kind, answer)

    def impossible(self, kind: Kind, question: np.ndarray) -> Iterator[str]:
        foreign = np.nonzero((question != self.blank) & ~self.is_digit(kind, question))[0].tolist()
        for cell in foreign:
            yield f"{kind.at(cell)} is neither a digit nor blank"
        repetitions = list(self.repetitions(kind, question))
        yield from repetitions
        if not foreign and not repetitions:
            # Compiled code, which takes its time to load.
            from hrm.data.sudoku.solver import solutions

            found, _ = solutions((question - 1).astype(np.uint8))
            if len(found) != 1:
                yield "the puzzle has several solutions" if len(found) else "the puzzle has no solution"

    def repetitions(self, kind: Kind, board: np.ndarray) -> Iterator[str]:
        """The digits that are more than once in a row, column or box, and where."""
        size, cells = kind.rows, np.arange(kind.rows * kind.cols).reshape(kind.rows, kind.cols)
        height, width = self.box(kind)
        boxes = cells.reshape(size // height, height, size // width, width).swapaxes(1, 2)
        units = {"row": cells, "column": cells.T, "box": boxes.reshape(size, size)}
        for name, members in units.items():
            for number, unit in enumerate(members):
                held = board[unit]
                for token in range(2, size + 2):
                    places = unit[held == token].tolist()
                    if len(places) > 1:
                        where = [kind.at(cell) for cell in places]
                        told = f"{'; '.join(where[:-1])} and {where[-1]}"
                        times = "twice" if len(places) == 2 else f"{len(places)} times"
                        yield f"{name} {number + 1} holds {token - 1} {times}, at {told}"

    def box(self, kind: Kind) -> tuple[int, int]:
        """Rows and columns of a box."""
        height = math.isqrt(kind.rows)
        return height, kind.cols // height

    def is_digit(self, kind: Kind, board: np.ndarray) -> np.ndarray:
        return (board > self.blank) & (board <= kind.rows + 1)


class _Maze(_Rules):
    symbols = "_#.SGo"
    also: ClassVar = {" ": "."}
    wall, blank, start, goal, path = range(1, 6)

    def expected(self, kind: Kind) -> str:
        return "'#', 'S', 'G', 'o', or '.' or a space where it is open"

    def problems(self, kind: Kind, question: np.ndarray, answer: np.ndarray) -> Iterator[str]:
        wrong = list(self.impossible(kind, question))
        yield from wrong
        changed = np.nonzero((answer != question) & ((question != self.blank) | (answer != self.path)))[0]
        if len(changed):
            cell = int(changed[0])
            names = [self.symbol(int(board[cell])) for board in (question, answer)]
            count = "a cell was" if len(changed) == 1 else f"{len(changed)} cells were"
            yield f"{count} changed, the first at {kind.at(cell)}: {names[0]!r} became {names[1]!r}"
        if wrong:
            return
        from hrm.data.maze.search import distances

        start, goal = int((question == self.start).argmax()), int((question == self.goal).argmax())
        # Where the answer breaks a wall the path may not go.
        marked = (answer == self.path) & (question == self.blank)
        way = marked.copy()
        way[[start, goal]] = True
        steps = distances(way, kind.cols, start)
        shortest = int(distances(question != self.wall, kind.cols, start)[goal])
        if steps[goal] < 0:
            end = int(steps.argmax())
            yield f"the path from S ends at {kind.at(end)} and does not reach G"
            return
        if steps[goal] > shortest:
            yield f"the path takes {steps[goal]} steps, the shortest {shortest}"
        if beside := int(marked.sum()) - int(steps[goal]) + 1:
            cells = "cell is" if beside == 1 else "cells are"
            yield f"{beside} marked {cells} not on the way from S to G"

    def impossible(self, kind: Kind, question: np.ndarray) -> Iterator[str]:
        foreign = np.nonzero((question < self.wall) | (question > self.goal))[0].tolist()
        for cell in foreign[:1]:
            shown = "'o', a path" if question[cell] == self.path else "no cell of a maze"
            more = f", and so are {len(foreign) - 1} more" if len(foreign) > 1 else ""
            yield f"{kind.at(cell)} is {shown}{more}; expected '#', '.', 'S' or 'G'"
        counts = {name: np.nonzero(question == token)[0] for name, token in (("S", 3), ("G", 4))}
        for name, cells in counts.items():
            if len(cells) == 0:
                yield f"there is no {name}, expected one"
            elif len(cells) > 1:
                first, second = (kind.at(int(cell)) for cell in cells[:2])
                yield f"there are {len(cells)} {name}, expected one: {first}; {second}"
        if not foreign and all(len(cells) == 1 for cells in counts.values()):
            # Compiled code, which takes its time to load.
            from hrm.data.maze.search import distances

            steps = distances(question != self.wall, kind.cols, int(counts["S"][0]))
            if steps[counts["G"][0]] < 0:
                yield "no path leads from S to G"


class _Arc(_Rules):
    symbols = "_|0123456789"

    def expected(self, kind: Kind) -> str:
        return "a colour 0 to 9"

    def parse(self, kind: Kind, text: str) -> np.ndarray:
        kept = ("".join(line.split()) for line in text.splitlines())
        lines = [line for line in kept if line]
        if not lines or len(lines) > kind.rows or len(lines[0]) > kind.cols:
            there = f"{len(lines)} lines" + (f" of {len(lines[0])}" if lines else "")
            raise UserError(f"{there}, expected a grid of 1 to {kind.rows} rows and 1 to {kind.cols} columns")
        grid = Kind(kind.name, len(lines), len(lines[0]))
        tokens = self.read(grid, lines)
        if (tokens < 2).any():
            cell = int((tokens < 2).argmax())
            raise UserError(f"{grid.at(cell)} is '|', expected {self.expected(kind)}")
        return canvas(tokens.reshape(grid.rows, grid.cols) - 2)

    def text(self, kind: Kind, board: np.ndarray, question: np.ndarray | None, color: bool) -> str:
        grid = board.reshape(kind.rows, kind.cols)
        if (read := grid_of(board)) is not None:
            grid = grid[: read.shape[0], : read.shape[1]]
        # In training grids stand anywhere; a canvas without one is shown whole.
        elif not any(self.malformed(kind, board)):
            grid = grid[arc_grid(board)]
        lines = self.shown(Kind(kind.name, *grid.shape), grid.reshape(-1), None, False)
        if color:
            lines = [[_on_colour(cell) for cell in line] for line in lines]
        return "\n".join("".join(line) for line in lines)

    def problems(self, kind: Kind, question: np.ndarray, answer: np.ndarray) -> Iterator[str]:
        # What lies around the grid carries no loss: a model may put anything there.
        if grid_of(answer) is None:
            yield "there is no grid: the upper left corner holds no colour"

    def impossible(self, kind: Kind, question: np.ndarray) -> Iterator[str]:
        return self.malformed(kind, question)

    def malformed(self, kind: Kind, board: np.ndarray) -> Iterator[str]:
        """Where the canvas differs from one with a single grid, closed to the right and below."""
        rows, cols = arc_grid(board)
        if not rows.stop:
            yield "there is no grid: no cell holds a colour"
            return
        cells = board.reshape(kind.rows, kind.cols)
        holes = np.nonzero(~_coloured(cells[rows, cols]).reshape(-1))[0]
        if len(holes):
            row, column = divmod(int(holes[0]), cols.stop - cols.start)
            cell = (rows.start + row) * kind.cols + cols.start + column
            yield f"the colours fill no rectangle: {kind.at(cell)} has none"
            return
        expected = canvas((cells[rows, cols] - 2).astype(np.uint8), rows.start, cols.start)
        wrong = np.nonzero(expected != board)[0]
        if len(wrong):
            yield f"the grid is not closed by end marks and padding alone: {kind.at(int(wrong[0]))}"


class _Other(_Rules):
    def symbol(self, token: int) -> str:
        return str(token)

    def expected(self, kind: Kind) -> str:
        return f"a whole number from 0 to {kind.vocab_size - 1}"

    def parse(self, kind: Kind, text: str) -> np.ndarray:
        words = text.replace(",", " ").split()
        if len(words) != kind.rows * kind.cols:
            raise UserError(f"{len(words)} numbers, expected {kind.rows * kind.cols}")
        for cell, word in enumerate(words):
            if not (word.isascii() and word.isdigit() and len(word) < 10 and int(word) < kind.vocab_size):
                raise UserError(f"{kind.at(cell)} is {word[:20]!r}, expected {self.expected(kind)}")
        return np.array([int(word) for word in words], np.min_scalar_type(kind.vocab_size - 1))

    def shown(
        self, kind: Kind, board: np.ndarray, question: np.ndarray | None, color: bool
    ) -> list[list[str]]:
        width = len(str(kind.vocab_size - 1)) + 1
        cells = [f"{token:{width}d}" for token in board.tolist()]
        if color and question is not None:
            for cell in np.nonzero(board != question)[0]:
                cells[cell] = f"{CHANGED}{cells[cell]}{PLAIN}"
        return [cells[first : first + kind.cols] for first in range(0, len(cells), kind.cols)]

    def problems(self, kind: Kind, question: np.ndarray, answer: np.ndarray) -> Iterator[str]:
        return self.impossible(kind, answer)

    def impossible(self, kind: Kind, question: np.ndarray) -> Iterator[str]:
        for cell in np.nonzero((question < 0) | (question >= kind.vocab_size))[0].tolist():
            yield f"{kind.at(cell)} is {question[cell]}, expected {self.expected(kind)}"


_RULES: Mapping[str, _Rules] = {"sudoku": _Sudoku(), "maze": _Maze(), "arc": _Arc(), "other": _Other()}


def _on_colour(cell: str) -> str:
    if not cell.isdigit():
        return f"{cell} "
    ink = 97 if cell in "01239" else 30
    return f"\x1b[{ink};48;5;{ARC_TERMINAL[int(cell)]}m{cell} {PLAIN}"
