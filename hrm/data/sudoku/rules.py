"""Reads, writes and checks Sudoku boards. Tokens: 0 is padding, 1 a blank cell, d + 1 the digit d."""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from hrm.data.boards import Boards, Rules
from hrm.data.sudoku.solver import BOXES, GAVE_UP, MOST_GUESSES, solutions, units


class SudokuRules(Rules):
    """Checks that clues are unchanged and that every digit occurs once in each row, column and box."""

    symbols = "_.123456789ABCDEFG"
    also: ClassVar = {**dict.fromkeys("0*_", "."), **dict(zip("abcdefg", "ABCDEFG", strict=True))}
    blank = 1

    def expected(self, boards: Boards) -> str:
        digits = f"1 to {boards.rows}" if boards.rows < 10 else "1 to 9 or A to G"
        return f"a digit {digits}, or '.' or 0 for a blank"

    def vocabulary(self, boards: Boards) -> int:
        return boards.rows + 2

    def parse(self, boards: Boards, text: str) -> np.ndarray:
        kept = ("".join(c for c in line if c not in "|+-" and not c.isspace()) for line in text.splitlines())
        return self.read(boards, [line for line in kept if line])

    def text(self, boards: Boards, board: np.ndarray, question: np.ndarray | None, color: bool) -> str:
        height, width = BOXES[boards.rows]
        stacks = range(0, boards.cols, width)
        rule = "-+-".join("-" * (2 * width - 1) for _ in stacks)
        lines = []
        for number, row in enumerate(self.shown(boards, board, question, color)):
            if number and number % height == 0:
                lines.append(rule)
            lines.append(" | ".join(" ".join(row[first : first + width]) for first in stacks))
        return "\n".join(lines)

    def problems(self, boards: Boards, question: np.ndarray, answer: np.ndarray) -> Iterator[str]:
        clue = question > self.blank
        for cell in np.nonzero(clue & (answer != question))[0].tolist():
            yield f"{boards.at(cell)}: the clue {self.symbol(int(question[cell]))} was changed"
        for cell in np.nonzero(~clue & ~self.is_digit(boards, answer))[0].tolist():
            yield f"{boards.at(cell)} has no digit"
        yield from self.repetitions(boards, answer)

    def malformed(self, boards: Boards, question: np.ndarray) -> Iterator[str]:
        for cell in np.nonzero((question != self.blank) & ~self.is_digit(boards, question))[0].tolist():
            yield f"{boards.at(cell)} is neither a digit nor blank"
        yield from self.repetitions(boards, question)

    def impossible(self, boards: Boards, question: np.ndarray) -> Iterator[str]:
        wrong = list(self.malformed(boards, question))
        yield from wrong
        if not wrong:
            found, guesses = solutions((question - 1).astype(np.uint8))
            if guesses > MOST_GUESSES:
                yield f"{GAVE_UP}, so a unique solution is not proved"
            elif len(found) != 1:
                yield "the puzzle has several solutions" if len(found) else "the puzzle has no solution"

    def repetitions(self, boards: Boards, board: np.ndarray) -> Iterator[str]:
        """Every digit that occurs more than once in a row, column or box, and where."""
        size = boards.rows
        for number, unit in enumerate(units(size)[0]):
            held = board[unit]
            for token in range(2, size + 2):
                places = unit[held == token].tolist()
                if len(places) > 1:
                    where = [boards.at(cell) for cell in places]
                    cells = f"{'; '.join(where[:-1])} and {where[-1]}"
                    times = "twice" if len(places) == 2 else f"{len(places)} times"
                    name = f"{('row', 'column', 'box')[number // size]} {number % size + 1}"
                    yield f"{name} holds {self.symbol(token)} {times}, at {cells}"

    def is_digit(self, boards: Boards, board: np.ndarray) -> np.ndarray:
        return (board > self.blank) & (board <= boards.rows + 1)
