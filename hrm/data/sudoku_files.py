"""Sudoku puzzles from files: CSV of the Sudoku-Extreme layout, or a puzzle a line; every line is checked."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hrm.data.solver import SudokuError, solutions, units

# Lines that are checked at a time: bounds the memory of the checks.
CHUNK_LINES = 20_000


@dataclass(frozen=True)
class Puzzles:
    """Puzzles before augmentation: questions and answers (N, n*n) uint8 digits, 0 blank; difficulty (N,).

    From a file, `path` and `lines` (N,) say where each comes from, `solved` whether the solver has seen it.
    """

    questions: np.ndarray
    answers: np.ndarray
    difficulty: np.ndarray
    path: Path | None = None
    lines: np.ndarray | None = None
    solved: bool = True

    def take(self, rows: np.ndarray) -> "Puzzles":
        """The puzzles of these rows, in this order."""
        return replace(
            self,
            questions=self.questions[rows],
            answers=self.answers[rows],
            difficulty=self.difficulty[rows],
            lines=None if self.lines is None else self.lines[rows],
        )


def read_puzzles(path: Path, size: int, min_difficulty: int = 0) -> Puzzles:
    """Read and check a file of puzzles, and keep those of at least min_difficulty.

    A `.csv` file has a header with `question`, and `answer` and `rating` where it knows them; any other file
    has a puzzle a line, with empty lines and lines that begin with # left out. Blank cells are `.` or `0`.
    Missing answers are solved; the difficulty is the rating, else the solver's guesses. Raises SudokuError
    with file, line and fault.
    """
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _line_rows(path)
    chunks = []
    try:
        while chunk := list(islice(rows, CHUNK_LINES)):
            chunks.append(_check(path, size, chunk))
    except (OSError, csv.Error) as error:
        raise SudokuError(
            f"{path}: cannot be read ({error}); expected a .csv file or a puzzle a line"
        ) from None
    if not chunks:
        raise SudokuError(f"{path}: no puzzle in it, expected puzzles of {size * size} characters")
    lines, questions, answers, ratings = (_joined(parts) for parts in zip(*chunks, strict=True))
    known = answers is not None and ratings is not None
    puzzles = Puzzles(
        questions,
        questions if answers is None else answers,
        np.zeros(len(lines), np.int64) if ratings is None else ratings,
        path,
        lines,
        solved=known,
    )
    if not known:
        solved, guesses = _solve(puzzles)
        puzzles = replace(puzzles, answers=solved, difficulty=guesses if ratings is None else ratings)
    kept = np.nonzero(puzzles.difficulty >= min_difficulty)[0]
    if not len(kept):
        raise SudokuError(
            f"{path}: no puzzle of difficulty {min_difficulty} or more, the hardest has "
            f"{puzzles.difficulty.max()}; lower --min-difficulty"
        )
    return replace(puzzles.take(kept), solved=not known)


def prove_proper(puzzles: Puzzles) -> None:
    """Raise SudokuError for a puzzle that has several solutions, of those the solver has not seen yet."""
    if not puzzles.solved:
        _solve(puzzles)


def hold_out(puzzles: Puzzles, test_size: float, rng: np.random.Generator) -> tuple[Puzzles, Puzzles]:
    """Divide puzzles into training and test, about `test_size` of them, with no solution grid in both.

    Puzzles with the same solution stay together. Raises SudokuError when there is nothing to divide.
    """
    if not 0 < test_size < 1:
        raise SudokuError(f"test_size={test_size:g}: expected a part of the puzzles, between 0 and 1")
    _, grid, counts = np.unique(puzzles.answers, axis=0, return_inverse=True, return_counts=True)
    if len(counts) < 2:
        raise SudokuError(
            f"{puzzles.path}: {len(counts)} solution grid, expected 2 or more to hold out a test"
        )
    order = rng.permutation(len(counts))
    wanted = test_size * len(puzzles.questions)
    number = min(int(np.searchsorted(np.cumsum(counts[order]), wanted)) + 1, len(counts) - 1)
    held = np.isin(grid.ravel(), order[:number])
    return puzzles.take(np.nonzero(~held)[0]), puzzles.take(np.nonzero(held)[0])


# One puzzle of a file: line number, question, answer, rating; the last two None where the file has none.
Row = tuple[int, str, str | None, str | None]


def _csv_rows(path: Path) -> Iterator[Row]:
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.reader(file)
        header = [name.strip().lower() for name in next(reader, [])]
        if "question" not in header:
            raise SudokuError(f"{path}: line 1: no column 'question', expected source,question,answer,rating")
        columns = [
            header.index(name) if name in header else None for name in ("question", "answer", "rating")
        ]
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise _bad(
                    path, reader.line_num, f"{len(fields)} fields, expected {len(header)} as in the header"
                )
            question, answer, rating = (None if column is None else fields[column] for column in columns)
            yield reader.line_num, question or "", answer, rating


def _line_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            text = line.strip()
            if text and not text.startswith("#"):
                yield number, text, None, None


def _bad(path: Path | None, line: int, what: str) -> SudokuError:
    return SudokuError(f"{path}: line {line}: {what}")


def _check(
    path: Path, size: int, rows: list[Row]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Line numbers, questions, answers and ratings of some rows, every rule checked but the solver's."""
    numbers, texts, answer_texts, rating_texts = zip(*rows, strict=True)
    questions = _grids(path, size, numbers, texts, "question")
    answers = ratings = None
    if answer_texts[0] is not None:
        answers = _grids(path, size, numbers, answer_texts, "answer")
        wrong = ((answers == 0) | ((questions > 0) & (questions != answers))).any(axis=1)
        if wrong.any():
            raise _bad(path, numbers[int(wrong.argmax())], "the answer does not solve the question")
    if rating_texts[0] is not None:
        ratings = np.zeros(len(rows), np.int64)
        for row, text in enumerate(rating_texts):
            try:
                ratings[row] = int(text)
            except (ValueError, OverflowError):
                raise _bad(path, numbers[row], f"rating {text!r}, expected a whole number") from None
    return np.array(numbers), questions, answers, ratings


def _grids(path: Path, size: int, numbers: tuple[int, ...], texts: tuple[str, ...], what: str) -> np.ndarray:
    """Texts as grids (N, n*n), with their length, their characters and the rules of Sudoku checked."""
    cells = size * size
    for number, text in zip(numbers, texts, strict=True):
        if len(text) != cells:
            raise _bad(path, number, f"{what} of {len(text)} characters, expected {cells} for size {size}")
    # One byte a character: foreign ones become '?', which is none of the digits either.
    grids = np.frombuffer("".join(texts).replace(".", "0").encode("ascii", "replace"), np.uint8) - ord("0")
    grids = grids.reshape(-1, cells)
    foreign = grids > size
    if foreign.any():
        row, cell = (int(i) for i in np.unravel_index(foreign.argmax(), foreign.shape))
        raise _bad(
            path,
            numbers[row],
            f"character {texts[row][cell]!r} at place {cell + 1} of the {what}, expected '.' or 0 to {size}",
        )
    # A bit for every digit, none for a blank: in a unit without repetition the sum is the union.
    bits = (1 << grids.astype(np.int16)) & ~1
    digits = bits[:, units(size)[0]]
    clash = digits.sum(axis=2, dtype=np.int32) != np.bitwise_or.reduce(digits, axis=2)
    if clash.any():
        row, unit = (int(i) for i in np.unravel_index(clash.argmax(), clash.shape))
        kind, place = ("row", "column", "box")[unit // size], unit % size + 1
        raise _bad(path, numbers[row], f"a digit is twice in {kind} {place} of the {what}")
    return grids


def _joined(parts: Sequence[Any]) -> Any:
    return None if parts[0] is None else np.concatenate(parts)


def _solve(puzzles: Puzzles) -> tuple[np.ndarray, np.ndarray]:
    """The one solution of every puzzle and the guesses made."""
    answers = np.zeros_like(puzzles.questions)
    guesses = np.zeros(len(answers), np.int64)
    name = puzzles.path.name if puzzles.path else "puzzles"
    # A bar that an error passes through must be gone before the error is printed.
    with tqdm(puzzles.questions, desc=f"solving {name}", leave=False) as questions:
        for row, question in enumerate(questions):
            found, guesses[row] = solutions(question)
            if len(found) != 1:
                count = "several solutions" if len(found) else "no solution"
                line = 0 if puzzles.lines is None else int(puzzles.lines[row])
                raise _bad(puzzles.path, line, f"the puzzle has {count}, expected one")
            answers[row] = found[0]
    return answers, guesses
