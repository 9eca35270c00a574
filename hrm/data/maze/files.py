"""Reads mazes from CSV files with columns `source,question,answer,rating`, and checks every row."""

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
from hrm.data.maze.search import PATH, SYMMETRIES, solve, solved, symmetric
from hrm.data.puzzle_kinds import Kind

# Rows in memory at a time.
CHUNK_ROWS = 1000
SMALLEST_SIDE = 5
# Most characters of a line: two fields of the csv module's limit.
LINE_LIMIT = 2 * csv.field_size_limit() + (1 << 12)
# The token of every character; 0 for foreign ones.
TOKENS = np.zeros(256, np.uint8)
TOKENS[np.frombuffer(b"# SGo.", np.uint8)] = (1, 2, 3, 4, 5, 2)


class MazeError(UserError):
    """A maze, file or request that no maze data set can be built from."""


@dataclass(frozen=True)
class Mazes:
    """Mazes before augmentation: questions and answers (N, S) uint8 tokens, steps of the paths (N,) int32."""

    questions: np.ndarray
    answers: np.ndarray
    lengths: np.ndarray

    def take(self, rows: np.ndarray) -> "Mazes":
        """The mazes of these rows, in this order."""
        return Mazes(self.questions[rows], self.answers[rows], self.lengths[rows])

    @property
    def side(self) -> int:
        return isqrt(self.questions.shape[1])


def keys(questions: np.ndarray) -> np.ndarray:
    """A key of 16 bytes for each maze (N, S), (N,) S16, equal exactly for symmetric mazes."""
    side = isqrt(questions.shape[1])
    grids = questions.reshape(-1, side, side)
    turned = (np.ascontiguousarray(symmetric(grids, symmetry)) for symmetry in range(SYMMETRIES))
    digests = ([blake2b(grid, digest_size=16).digest() for grid in grids] for grids in turned)
    return np.array([min(of_one) for of_one in zip(*digests, strict=True)], "S16")


def read_mazes(path: Path, *, check: bool = True) -> Iterator[Mazes]:
    """The mazes of a file in order, CHUNK_ROWS at a time, all of one size.

    The columns `question` and `answer` hold square grids in a line, of the characters "# SGo" or "." for an
    open cell; missing answers are solved. Raises MazeError with file, line, row, column and fault;
    check=False skips the rules, for a second reading.
    """
    try:
        with tqdm(desc=f"reading {path.name}", unit=" mazes", leave=False) as bar:
            rows = _rows(path, numbered_lines(path, LINE_LIMIT, "a maze a line", MazeError))
            kind = None
            while chunk := list(islice(rows, CHUNK_ROWS)):
                kind = kind or _kind(path, chunk[0])
                yield _mazes(path, kind, chunk, check)
                bar.update(len(chunk))
    except (OSError, csv.Error) as error:
        raise MazeError(
            f"{path}: cannot be read ({error}); expected a .csv file of source,question,answer,rating"
        ) from None
    if kind is None:
        raise MazeError(f"{path}: no maze in it, expected rows of source,question,answer,rating")


# Line number, question, and answer or None.
Row = tuple[int, str, str | None]


def _rows(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[Row]:
    reader = csv.reader(line for _, line in lines)
    header = [name.strip().lower() for name in next(reader, [])]
    if "question" not in header:
        raise MazeError(f"{path}: line 1: no column 'question', expected source,question,answer,rating")
    question = header.index("question")
    answer = header.index("answer") if "answer" in header else None
    for fields in reader:
        if fields:
            if len(fields) != len(header):
                found = f"{len(fields)} fields, expected {len(header)} as in the header"
                raise _bad(path, reader.line_num, found)
            yield reader.line_num, fields[question], None if answer is None else fields[answer]


def _kind(path: Path, first: Row) -> Kind:
    side = isqrt(len(first[1]))
    if side * side != len(first[1]) or side < SMALLEST_SIDE:
        raise _bad(
            path,
            first[0],
            f"question of {len(first[1])} characters, expected a square of at least {SMALLEST_SIDE} a side",
        )
    return Kind("maze", side, side)


def _mazes(path: Path, kind: Kind, rows: list[Row], check: bool) -> Mazes:
    lines, question_texts, answer_texts = zip(*rows, strict=True)
    questions = _tokens(path, kind, lines, question_texts, "question")
    if answer_texts[0] is None:
        answers = questions.copy()
        for number, question in enumerate(questions):
            if wrong := kind.impossible(question):
                raise _bad(path, lines[number], f"question: {wrong[0]}")
            answers[number] = solve(question, kind.cols)[0]
    else:
        answers = _tokens(path, kind, lines, answer_texts, "answer")
    if check and not (right := solved(questions, answers, kind.cols)).all():
        number = int(right.argmin())
        wrong = kind.impossible(questions[number])
        what = "question" if wrong else "answer"
        first = (wrong or kind.problems(questions[number], answers[number]))[0]
        raise _bad(path, lines[number], f"{what}: {first}")
    return Mazes(questions, answers, ((answers == PATH).sum(axis=1) + 1).astype(np.int32))


def _tokens(path: Path, kind: Kind, lines: tuple[int, ...], texts: tuple[str, ...], what: str) -> np.ndarray:
    cells = kind.rows * kind.cols
    for line, text in zip(lines, texts, strict=True):
        if len(text) != cells:
            found = f"{what} of {len(text)} characters, expected {cells} as in the first row of the file"
            raise _bad(path, line, found)
    # One byte a character; non-ASCII ones become '?', which is foreign too.
    tokens = TOKENS[np.frombuffer("".join(texts).encode("ascii", "replace"), np.uint8)].reshape(-1, cells)
    foreign = (tokens == 0).any(axis=1)
    if foreign.any():
        number = int(foreign.argmax())
        cell = int((tokens[number] == 0).argmax())
        raise _bad(
            path,
            lines[number],
            f"{what}: {kind.at(cell)} is {texts[number][cell]!r}, expected one of '#', ' ', 'S', 'G', 'o'",
        )
    return tokens


def _bad(path: Path, line: int, what: str) -> MazeError:
    return MazeError(f"{path}: line {line}: {what}")
