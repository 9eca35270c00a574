"""Reads mazes in any format of `maze.text`, and checks each."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from math import isqrt
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hrm.common.errors import UserError
from hrm.common.files import numbered_lines
from hrm.common.text import counted
from hrm.data.faults import Faults
from hrm.data.maze.search import PATH, solve, solved, symmetric, symmetries_of
from hrm.data.maze.text import SMALLEST_SIDE, read_rows
from hrm.data.puzzle_kinds import Kind
from hrm.data.tables import Row

# Maximum number of rows in memory.
CHUNK_ROWS = 1000
# Maximum characters of a line: two fields of the csv module's limit.
LINE_LIMIT = 2 * csv.field_size_limit() + (1 << 12)
# The token of every character; 0 for an invalid character.
TOKENS = np.zeros(256, np.uint8)
TOKENS[np.frombuffer(b"# SGo.EX", np.uint8)] = (1, 2, 3, 4, 5, 2, 4, 5)


class MazeError(UserError):
    """A maze, file or request that does not allow a maze data set."""


@dataclass(frozen=True)
class Mazes:
    """Mazes before augmentation: questions and answers (N, S) uint8 tokens, steps of the paths (N,) int32.

    columns: cells in a row; None for squares.
    """

    questions: np.ndarray
    answers: np.ndarray
    lengths: np.ndarray
    columns: int | None = None

    def take(self, rows: np.ndarray) -> "Mazes":
        """The mazes of these rows, in this order."""
        return Mazes(self.questions[rows], self.answers[rows], self.lengths[rows], self.columns)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of each maze."""
        return shape_of(self.questions.shape[1], self.columns)


def shape_of(cells: int, columns: int | None) -> tuple[int, int]:
    """Rows and columns of a maze with this number of cells. columns: cells in a row; None for a square."""
    columns = columns or isqrt(cells)
    return cells // columns, columns


def keys(questions: np.ndarray, columns: int | None = None) -> np.ndarray:
    """A key of 16 bytes for each maze (N, S), (N,) S16, equal exactly for symmetric mazes.

    columns: cells in a row; None for squares.
    """
    shape = shape_of(questions.shape[1], columns)
    grids = questions.reshape(-1, *shape)
    turned = (np.ascontiguousarray(symmetric(grids, symmetry)) for symmetry in symmetries_of(shape))
    digests = ([blake2b(grid, digest_size=16).digest() for grid in grids] for grids in turned)
    return np.array([min(of_one) for of_one in zip(*digests, strict=True)], "S16")


def read_mazes(
    path: Path, *, columns: int | None = None, check: bool = True, faults: Faults | None = None
) -> Iterator[Mazes]:
    """The valid mazes of a file in order, in chunks of up to CHUNK_ROWS, all of one shape.

    Their characters are "# SGo" or "# SEX", or "." for an open cell; missing answers are computed. columns:
    cells in a row of a maze in one line; None for a square. faults: collects invalid mazes, by file, line,
    row and column; unless they are skipped, MazeError is raised at the end. check=False skips the rules, to
    read a checked file again.
    """
    faults = faults or Faults(skip=False, error=MazeError)
    kind, any_row = None, False
    try:
        with tqdm(desc=f"reading {path.name}", unit=" mazes", leave=False) as bar:
            lines = numbered_lines(path, LINE_LIMIT, "a maze a line", MazeError)
            rows = _sound(lines, path, faults)
            while chunk := list(islice(rows, CHUNK_ROWS)):
                any_row = True
                while kind is None and chunk:
                    with faults.item():
                        kind = _kind(path, chunk[0], columns)
                    if kind is None:
                        chunk.pop(0)
                if kind is not None and len((mazes := _mazes(path, kind, chunk, check, faults)).lengths):
                    yield mazes
                bar.update(len(chunk))
    except (OSError, csv.Error) as error:
        raise MazeError(
            f"{path}: cannot be read ({error}); expected mazes, or a .csv file of question,answer"
        ) from None
    faults.check()
    if not any_row:
        raise MazeError(f"{path}: it holds no maze; expected mazes, or rows of question,answer")


def _sound(lines: Iterator[tuple[int, str]], path: Path, faults: Faults) -> Iterator[Row]:
    try:
        rows = read_rows(lines)
    except ValueError as fault:
        raise MazeError(f"{path}: line 1: {fault}") from None
    for row in rows:
        if isinstance(row, Row):
            yield row
        else:
            faults.add(f"{path}: line {row[0]}", row[1])


def _kind(path: Path, first: Row, columns: int | None) -> Kind:
    """The shape of the first maze."""
    line, question = first.line, first.question
    lines = question.splitlines()
    if len(lines) > 1:
        if columns is not None:
            raise _bad(path, line, f"question of {len(lines)} lines; leave --columns out")
        rows, columns, expected = len(lines), len(lines[0]), "rows"
    elif columns is None:
        # Do not guess a shape: 35 cells may be 5 x 7 or 7 x 5.
        rows = columns = isqrt(len(question))
        expected = "a square"
    else:
        rows, expected = len(question) // columns, f"rows of {columns}"
    if rows * columns != len("".join(lines)) or min(rows, columns) < SMALLEST_SIDE:
        raise _bad(
            path,
            line,
            f"question of {counted(len(''.join(lines)), 'character')}, expected {expected} of at least "
            f"{SMALLEST_SIDE} a side; --columns N reads rows of N cells",
        )
    return Kind("maze", rows, columns)


def _mazes(path: Path, kind: Kind, rows: list[Row], check: bool, faults: Faults) -> Mazes:
    columns = None if kind.rows == kind.cols else kind.cols
    kept, boards = [], []
    for row in rows:
        with faults.item():
            given = [
                _tokens(path, kind, row.line, text, what)
                for text, what in ((row.question, "question"), (row.answer, "answer"))
                if text is not None
            ]
            if len(given) == 1:
                if wrong := kind.impossible(given[0]):
                    raise _bad(path, row.line, f"question: {wrong[0]}")
                given.append(solve(given[0], kind.cols)[0])
            kept.append(row.line)
            boards.append(given)
    questions, answers = np.array(boards, np.uint8).reshape(-1, 2, kind.rows * kind.cols).swapaxes(0, 1)
    right = np.ones(len(kept), bool)
    if check or faults.skip:
        right = solved(questions, answers, kind.cols)
        for number in np.nonzero(~right)[0].tolist():
            wrong = kind.impossible(questions[number])
            what = "question" if wrong else "answer"
            first = (wrong or kind.problems(questions[number], answers[number]))[0]
            faults.add(f"{path}: line {kept[number]}", f"{what}: {first}")
    lengths = ((answers == PATH).sum(axis=1) + 1).astype(np.int32)
    return Mazes(questions, answers, lengths, columns).take(np.nonzero(right)[0])


def _tokens(path: Path, kind: Kind, line: int, text: str, what: str) -> np.ndarray:
    """The tokens (S,) uint8 of one maze."""
    rows, cells = text.splitlines(), kind.rows * kind.cols
    if len(rows) > 1 and any(len(row) != kind.cols for row in rows):
        raise _bad(path, line, f"{what} with rows of other lengths than {kind.cols}, as in the first maze")
    text = "".join(rows)
    if len(text) != cells:
        found = f"{what} of {counted(len(text), 'character')}"
        raise _bad(path, line, f"{found}, expected {cells} as in the first row of the file")
    # One byte per character; non-ASCII ones become '?', which is invalid too.
    tokens = TOKENS[np.frombuffer(text.encode("ascii", "replace"), np.uint8)]
    if not tokens.all():
        cell = int((tokens == 0).argmax())
        known = "'#', ' ', 'S', 'G', 'o', 'E', 'X'"
        raise _bad(path, line, f"{what}: {kind.at(cell)} is {text[cell]!r}, expected one of {known}")
    return tokens


def _bad(path: Path, line: int, what: str) -> MazeError:
    return MazeError(f"{path}: line {line}: {what}")
