"""Boards of puzzles, and the base class of puzzle rules, which reads and writes boards."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hrm.common.errors import UserError
from hrm.common.text import counted

Tokens = Sequence[int] | np.ndarray

# Terminal codes for a filled-in cell, for a changed cell, and to reset.
FILLED, CHANGED, PLAIN = "\x1b[1;36m", "\x1b[1;31m", "\x1b[0m"


@dataclass(frozen=True)
class Boards:
    """The shape and vocabulary of boards: rows x cols = S cells. name: the kind of puzzle."""

    name: str
    rows: int
    cols: int
    vocab_size: int = 256

    def board(self, tokens: Tokens) -> np.ndarray:
        """The tokens as (S,) int64. Raises ValueError for another number of tokens."""
        board = np.asarray(tokens)
        if board.shape != (self.rows * self.cols,):
            raise ValueError(f"tokens of shape {board.shape}, expected ({self.rows * self.cols},)")
        return board.astype(np.int64)

    def at(self, cell: int) -> str:
        """The row and column of a cell as text, counted from 1."""
        return f"row {cell // self.cols + 1}, column {cell % self.cols + 1}"


class Rules(ABC):
    """The characters and rules of one kind of puzzle. Tokens are arrays (S,) int64."""

    symbols: ClassVar[str] = ""
    # Further spellings of a character.
    also: ClassVar[Mapping[str, str]] = {}
    # The token of a cell that an answer fills in.
    blank: ClassVar[int] = -1

    @abstractmethod
    def expected(self, boards: Boards) -> str:
        """A description of a cell's allowed values."""

    def parse(self, boards: Boards, text: str) -> np.ndarray:
        """See `Kind.parse`; `Kind` also describes the methods below."""
        return self.read(boards, [line for line in text.splitlines() if line])

    def text(self, boards: Boards, board: np.ndarray, question: np.ndarray | None, color: bool) -> str:
        return "\n".join("".join(row) for row in self.shown(boards, board, question, color))

    @abstractmethod
    def problems(self, boards: Boards, question: np.ndarray, answer: np.ndarray) -> Iterator[str]: ...

    @abstractmethod
    def impossible(self, boards: Boards, question: np.ndarray) -> Iterator[str]: ...

    def malformed(self, boards: Boards, question: np.ndarray) -> Iterator[str]:
        """The faults of a question that can be found without solving it."""
        return self.impossible(boards, question)

    def shown(
        self, boards: Boards, board: np.ndarray, question: np.ndarray | None, color: bool
    ) -> list[list[str]]:
        """The characters of the cells, row by row; color marks changed cells."""
        cells = [self.symbol(token) for token in board.tolist()]
        if color and question is not None:
            for cell in np.nonzero(board != question)[0]:
                paint = FILLED if question[cell] == self.blank else CHANGED
                cells[cell] = f"{paint}{cells[cell]}{PLAIN}"
        return [cells[first : first + boards.cols] for first in range(0, len(cells), boards.cols)]

    def symbol(self, token: int) -> str:
        return self.symbols[token] if 0 <= token < len(self.symbols) else "?"

    def read(self, boards: Boards, lines: Sequence[str]) -> np.ndarray:
        """Tokens (S,) uint8 from one line with all cells, or from one line per row."""
        cells = boards.rows * boards.cols
        if len(lines) == 1 and len(lines[0]) == cells:
            lines = [lines[0][first : first + boards.cols] for first in range(0, cells, boards.cols)]
        if len(lines) != boards.rows:
            there = (
                f"{counted(len(lines[0]), 'cell')} in one line" if len(lines) == 1 else f"{len(lines)} lines"
            )
            raise UserError(
                f"{there}, expected {cells} cells in one line or {boards.rows} lines of {boards.cols}; "
                f"a cell is {self.expected(boards)}"
            )
        tokens = np.zeros(cells, np.uint8)
        for row, line in enumerate(lines):
            for column, character in enumerate(line[: boards.cols]):
                cell = row * boards.cols + column
                token = self.symbols.find(self.also.get(character, character))
                # Padding has a character for display only.
                if not 1 <= token < self.vocabulary(boards):
                    raise UserError(f"{boards.at(cell)} is {character!r}, expected {self.expected(boards)}")
                tokens[cell] = token
            if len(line) != boards.cols:
                raise UserError(
                    f"row {row + 1} has {counted(len(line), 'cell')}, expected {boards.cols}; a cell is "
                    + self.expected(boards)
                )
        return tokens

    def vocabulary(self, boards: Boards) -> int:
        return len(self.symbols)
