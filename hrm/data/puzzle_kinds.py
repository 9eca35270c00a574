"""The kinds of puzzle, recognised by vocabulary and number of cells, each with its rules.

A board is S = rows * cols tokens, row by row; the rules of each kind say what its tokens mean.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from hrm.common.errors import UserError
from hrm.data.arc.rules import ArcRules
from hrm.data.boards import CHANGED, PLAIN, Boards, Rules, Tokens
from hrm.data.format import Metadata
from hrm.data.maze.rules import MazeRules
from hrm.data.sudoku.rules import SudokuRules

# (vocab_size, seq_len) of Sudokus of each size, and of ARC.
SUDOKU = {(n + 2, n * n) for n in (4, 6, 9)}
ARC = (12, 900)
MAZE_VOCABULARY = 6


@dataclass(frozen=True)
class Kind(Boards):
    """A kind of puzzle on boards of rows x cols cells.

    name: "sudoku", "maze", "arc" or "other". Its methods take tokens as sequences of rows * cols integers,
    whatever they hold: a model's prediction is one.
    """

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


class OtherRules(Rules):
    """Any board over the vocabulary."""

    def symbol(self, token: int) -> str:
        return str(token)

    def expected(self, boards: Boards) -> str:
        return f"a whole number from 0 to {boards.vocab_size - 1}"

    def parse(self, boards: Boards, text: str) -> np.ndarray:
        words = text.replace(",", " ").split()
        if len(words) != boards.rows * boards.cols:
            raise UserError(f"{len(words)} numbers, expected {boards.rows * boards.cols}")
        for cell, word in enumerate(words):
            if not (word.isascii() and word.isdigit() and len(word) < 10 and int(word) < boards.vocab_size):
                raise UserError(f"{boards.at(cell)} is {word[:20]!r}, expected {self.expected(boards)}")
        return np.array([int(word) for word in words], np.min_scalar_type(boards.vocab_size - 1))

    def shown(
        self, boards: Boards, board: np.ndarray, question: np.ndarray | None, color: bool
    ) -> list[list[str]]:
        width = len(str(boards.vocab_size - 1)) + 1
        cells = [f"{token:{width}d}" for token in board.tolist()]
        if color and question is not None:
            for cell in np.nonzero(board != question)[0]:
                cells[cell] = f"{CHANGED}{cells[cell]}{PLAIN}"
        return [cells[first : first + boards.cols] for first in range(0, len(cells), boards.cols)]

    def problems(self, boards: Boards, question: np.ndarray, answer: np.ndarray) -> Iterator[str]:
        return self.impossible(boards, answer)

    def impossible(self, boards: Boards, question: np.ndarray) -> Iterator[str]:
        for cell in np.nonzero((question < 0) | (question >= boards.vocab_size))[0].tolist():
            yield f"{boards.at(cell)} is {question[cell]}, expected {self.expected(boards)}"


_RULES: Mapping[str, Rules] = {
    "sudoku": SudokuRules(),
    "maze": MazeRules(),
    "arc": ArcRules(),
    "other": OtherRules(),
}
