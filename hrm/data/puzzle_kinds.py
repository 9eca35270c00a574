"""The kinds of puzzle with their rules. A data set declares its kind, or sizes and contents determine it.

A board is S = rows * cols tokens, row by row; each kind defines the meaning of its tokens.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from hrm.common.errors import UserError
from hrm.common.text import counted
from hrm.data.arc.rules import ArcRules
from hrm.data.boards import CHANGED, PLAIN, Boards, Rules, Tokens
from hrm.data.format import Metadata, PuzzleSet, ignored_labels
from hrm.data.maze.rules import MazeRules
from hrm.data.sudoku.rules import SudokuRules
from hrm.data.sudoku.solver import BOXES

# (vocab_size, seq_len) of each size of Sudoku, and of ARC.
SUDOKU = {(n + 2, n * n) for n in BOXES}
ARC = (12, 900)
MAZE_VOCABULARY = 6
# Number of sampled examples per set whose majority must satisfy a kind's rules.
LOOKED_AT = 32


@dataclass(frozen=True)
class Kind(Boards):
    """A kind of puzzle on boards of rows x cols cells.

    name: "sudoku", "maze", "arc" or "tokens". Its methods take any sequence of rows * cols integers as
    tokens, such as a model's prediction.
    """

    def parse(self, text: str) -> np.ndarray:
        """Tokens (S,) uint8 of a typed puzzle: in one line, or in one line per row.

        Sudoku: `.` or `0` is blank, and lines between boxes are skipped. Maze: `#`, `S`, `G` and `o`,
        with a space or `.` for an open cell. ARC: rows of digits, a grid that fits the canvas. Tokens:
        numbers.
        Raises UserError with row, column and the character.
        """
        return _RULES[self.name].parse(self, text)

    def text(self, tokens: Tokens, question: Tokens | None = None, color: bool = False) -> str:
        """A board for a terminal, without a newline at its end; `parse` reads it again.

        color: mark differences from the question with ANSI codes; ARC shows its colours.
        """
        asked = None if question is None else self.board(question)
        return _RULES[self.name].text(self, self.board(tokens), asked, color)

    def problems(self, question: Tokens, answer: Tokens) -> list[str]:
        """The rules that an answer breaks, with row, column or box; empty if it is right.

        Sudoku: clues are unchanged, and every digit occurs once in each unit. Maze: cells are unchanged, and
        exactly a shortest path from S to G is marked. ARC: there is a grid in the upper left corner. Tokens:
        all are in the vocabulary.
        """
        return list(_RULES[self.name].problems(self, self.board(question), self.board(answer)))

    def impossible(self, question: Tokens) -> list[str]:
        """The faults of a question; empty if it has an answer (for Sudoku, exactly one)."""
        return list(_RULES[self.name].impossible(self, self.board(question)))

    def symbol(self, token: int) -> str:
        """The character of a token, "?" for an unknown token; the kind tokens shows numbers."""
        return _RULES[self.name].symbol(token)


def kind_of(metadata: Metadata, sets: Mapping[str, PuzzleSet] | None = None) -> Kind:
    """The kind of a data set's puzzles.

    It is the declared kind, else the kind with these sizes if most examples of a sample of `sets` satisfy its
    rules. Without sets only the sizes decide. Raises UserError if the declared kind does not fit the sizes.
    """
    kind = kind_for(metadata.vocab_size, metadata.seq_len, metadata.columns)
    if metadata.kind is not None:
        return declared(kind, metadata.kind)
    if sets is None:
        return kind
    examples = [(part.inputs, part.labels) for part in sets.values()]
    return recognised(kind, examples, ignored_labels(metadata.ignore_label_id))


def declared(sizes: Kind, name: str) -> Kind:
    """The kind of this name on boards of these sizes. Raises UserError if there is none."""
    kind = replace(sizes, name=name)
    rows, columns, vocab_size = kind.rows, kind.cols, kind.vocab_size
    fits = {
        "sudoku": rows == columns and rows in BOXES and vocab_size >= rows + 2,
        "maze": min(rows, columns) > 1 and vocab_size >= MAZE_VOCABULARY,
        "arc": rows == columns and vocab_size >= ARC[0],
        "tokens": True,
    }
    if not fits[name]:
        raise UserError(
            f"kind {name}: {rows} x {columns} cells over {vocab_size} tokens do not fit this kind; the "
            "kind tokens fits every sequence task"
        )
    return kind


def kind_for(vocab_size: int, seq_len: int, columns: int | None = None) -> Kind:
    """The kind of puzzles of seq_len cells over vocab_size tokens. columns: cells in a row; None for a
    square."""
    side = math.isqrt(seq_len)
    if columns is None:
        columns = side if side * side == seq_len else seq_len
    if (vocab_size, seq_len) in SUDOKU and columns == side:
        name = "sudoku"
    elif (vocab_size, seq_len) == ARC and columns == side:
        name = "arc"
    else:
        name = "maze" if vocab_size == MAZE_VOCABULARY and columns < seq_len else "tokens"
    return Kind(name, seq_len // columns, columns, vocab_size)


def recognised(kind: Kind, sets: Iterable[tuple[np.ndarray, np.ndarray]], ignored: Sequence[int]) -> Kind:
    """The kind if most examples of a sample from each set satisfy its rules, else plain tokens.

    sets: inputs and labels (N, S) of each. ignored: the labels that carry no loss.
    """
    rules, kept, looked_at = _RULES[kind.name], 0, 0
    for inputs, labels in sets:
        for row in np.unique(np.linspace(0, len(inputs) - 1, LOOKED_AT).astype(np.int64)):
            question, label = inputs[row].astype(np.int64), labels[row].astype(np.int64)
            unknown = np.isin(label, ignored)
            faults = rules.malformed(kind, question)
            answer = np.where(unknown, question, label)
            # Labels equal to their inputs are no evidence.
            if not np.array_equal(answer, question):
                # ARC training grids may be anywhere on the canvas.
                is_arc = kind.name == "arc"
                right = rules.malformed(kind, label) if is_arc else rules.problems(kind, question, answer)
                faults = chain(faults, right)
            kept += next(faults, None) is None
            looked_at += 1
    return kind if 2 * kept > looked_at or not looked_at else replace(kind, name="tokens")


class TokenRules(Rules):
    """Accepts any board over the vocabulary."""

    def symbol(self, token: int) -> str:
        return str(token)

    def expected(self, boards: Boards) -> str:
        return f"a whole number from 0 to {boards.vocab_size - 1}"

    def parse(self, boards: Boards, text: str) -> np.ndarray:
        words = text.replace(",", " ").split()
        if len(words) != boards.rows * boards.cols:
            raise UserError(f"{counted(len(words), 'number')}, expected {boards.rows * boards.cols}")
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
    "tokens": TokenRules(),
}
