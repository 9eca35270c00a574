"""Reads Sudoku puzzles from CSV files like Sudoku-Extreme's or from lines, and checks every line."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hrm.common.files import numbered_lines
from hrm.data.sudoku.solver import GAVE_UP, UNDECIDED, SudokuError, solve_each, units
from hrm.data.workers import over_rows

# Lines checked at a time, which bounds memory.
CHUNK_LINES = 20_000
# Most characters of a line, more than any puzzle takes; a whole chunk of lines is in memory.
LINE_LIMIT = 1 << 12
# Most line numbers in a message about skipped lines.
NAMED_LINES = 5
# Ratings are written as int32.
MOST_RATING = 2**31 - 1


@dataclass(frozen=True)
class Puzzles:
    """Puzzles before augmentation: questions and answers (N, n*n) uint8 digits, 0 blank; difficulty (N,).

    For a file, `path` and `lines` (N,) give the origin, `solved` whether the solver has checked each puzzle,
    and `notes` what was skipped. A 9x9 puzzle takes 174 bytes, and twice that while a file is read.
    """

    questions: np.ndarray
    answers: np.ndarray
    difficulty: np.ndarray
    path: Path | None = None
    lines: np.ndarray | None = None
    solved: bool = True
    notes: tuple[str, ...] = ()

    def take(self, rows: np.ndarray) -> "Puzzles":
        """The puzzles of these rows, in this order; rows: numbers, or (N,) bool."""
        if rows.dtype == bool and rows.all():
            return self
        return replace(
            self,
            questions=self.questions[rows],
            answers=self.answers[rows],
            difficulty=self.difficulty[rows],
            lines=None if self.lines is None else self.lines[rows],
        )


def row_keys(grids: np.ndarray) -> np.ndarray:
    """A hash of every row: sums of cells with random weights, (N, n*n) to (N,) uint64.

    Different rows collide once in 2^60.
    """
    weights = np.random.default_rng(0).integers(1, 1 << 63, grids.shape[1], dtype=np.uint64)
    keys = np.empty(len(grids), np.uint64)
    for first in range(0, len(grids), CHUNK_LINES):
        part = slice(first, first + CHUNK_LINES)
        keys[part] = grids[part].astype(np.uint64) @ weights
    return keys


def read_puzzles(
    path: Path, size: int, min_difficulty: int = 0, *, skip_improper: bool = False, workers: int = 1
) -> Puzzles:
    """Reads and checks a file of puzzles; keeps those of at least min_difficulty, each question once.

    A `.csv` file has a header with `question` and, optionally, `answer` and `rating`; any other file has a
    puzzle on each line, and empty lines and lines that begin with # are skipped. Blank cells are `.` or `0`.
    Missing answers are solved, on `workers` threads; the difficulty is the rating, else the solver's guesses.
    A puzzle with no or several solutions is skipped with skip_improper, else an error. Raises SudokuError
    with file, line and fault.
    """
    puzzles, answered, rated, hardest = _read(path, size, min_difficulty, skip_improper)
    notes = []
    if len(puzzles.questions):
        first = np.zeros(len(puzzles.questions), bool)
        first[np.unique(row_keys(puzzles.questions), return_index=True)[1]] = True
        if repeated := len(first) - int(first.sum()):
            notes.append(f"{path.name}: left out {repeated} that repeat the question of an earlier line")
        puzzles = puzzles.take(first)
        if skip_improper or not (answered and rated):
            solved, found = _solve(puzzles, workers, improper=skip_improper)
            proper = found == 1
            if not proper.all():
                notes.append(f"{path.name}: {_improper(puzzles, found)}")
            difficulty = puzzles.difficulty if rated else solved.difficulty
            hardest = max(hardest, int(difficulty[proper].max(initial=0)))
            puzzles = replace(solved, difficulty=difficulty).take(proper)
            if not len(puzzles.questions):
                raise SudokuError(f"{path}: no puzzle of one solution in it; expected at least one")
            puzzles = puzzles.take(puzzles.difficulty >= min_difficulty)
    if not len(puzzles.questions):
        raise SudokuError(
            f"{path}: no puzzle of difficulty {min_difficulty} or more, the hardest has {hardest}; "
            "lower --min-difficulty"
        )
    return replace(puzzles, notes=tuple(notes))


def prove_proper(puzzles: Puzzles, workers: int = 1) -> None:
    """Raises SudokuError for a puzzle with several solutions among those that the solver has not checked."""
    if not puzzles.solved:
        _solve(puzzles, workers, improper=False)


def hold_out(puzzles: Puzzles, test_size: float, rng: np.random.Generator) -> tuple[Puzzles, Puzzles]:
    """Splits puzzles into training and test, about `test_size` of them, without a common solution grid.

    Puzzles with the same solution stay together. Raises SudokuError if a split would be empty.
    """
    if not 0 < test_size < 1:
        raise SudokuError(f"test_size={test_size:g}: expected a part of the puzzles, between 0 and 1")
    # Rows as byte strings, which sort fast and in the order of rows.
    texts = np.ascontiguousarray(puzzles.answers).view(f"S{puzzles.answers.shape[1]}").ravel()
    _, grid, counts = np.unique(texts, return_inverse=True, return_counts=True)
    if len(counts) < 2:
        raise SudokuError(
            f"{puzzles.path}: {len(counts)} solution grid, expected 2 or more to hold out a test"
        )
    order = rng.permutation(len(counts))
    wanted = test_size * len(puzzles.questions)
    number = min(int(np.searchsorted(np.cumsum(counts[order]), wanted)) + 1, len(counts) - 1)
    held = np.isin(grid, order[:number])
    return puzzles.take(~held), puzzles.take(held)


# One puzzle of a file: line number, question, and answer and rating or None.
Row = tuple[int, str, str | None, str | None]


def _read(path: Path, size: int, min_difficulty: int, skip_improper: bool) -> tuple[Puzzles, bool, bool, int]:
    """A file's puzzles, unsolved; whether it has answers, and ratings; and the highest rating.

    Puzzles rated too low are skipped at once, to save memory.
    """
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _line_rows(path)
    chunks: list[list[np.ndarray | None]] = []
    hardest = 0
    try:
        while chunk := list(islice(rows, CHUNK_LINES)):
            arrays = _check(path, size, chunk, skip_improper)
            if (ratings := arrays[3]) is not None:
                hardest = max(hardest, int(ratings.max()))
                kept = ratings >= min_difficulty
                arrays = [None if array is None else array[kept] for array in arrays]
            chunks.append(arrays)
    except (OSError, csv.Error) as error:
        raise SudokuError(
            f"{path}: cannot be read ({error}); expected a .csv file or a puzzle a line"
        ) from None
    if not chunks:
        raise SudokuError(f"{path}: no puzzle in it, expected puzzles of {size * size} characters")
    lines, questions, answers, ratings = (_joined(chunks, field) for field in range(4))
    answered, rated = answers is not None, ratings is not None
    puzzles = Puzzles(
        questions,
        answers if answered else questions,
        ratings if rated else np.zeros(len(lines), np.int32),
        path,
        lines,
        solved=False,
    )
    return puzzles, answered, rated, hardest


def _joined(chunks: list[list[Any]], field: int) -> Any:
    """One field of all chunks, removed from them to free memory."""
    parts = [chunk[field] for chunk in chunks]
    for chunk in chunks:
        chunk[field] = None
    return None if parts[0] is None else np.concatenate(parts)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    return numbered_lines(path, LINE_LIMIT, "one puzzle a line", SudokuError)


def _csv_rows(path: Path) -> Iterator[Row]:
    lines = _lines(path)
    header = [name.strip().lower() for name in _fields(next(lines, (1, ""))[1])]
    if "question" not in header:
        raise SudokuError(f"{path}: line 1: no column 'question', expected source,question,answer,rating")
    columns = [header.index(name) if name in header else None for name in ("question", "answer", "rating")]
    for number, line in lines:
        fields = _fields(line)
        if not fields:
            continue
        if len(fields) != len(header):
            raise _bad(path, number, f"{len(fields)} fields, expected {len(header)} as in the header")
        question, answer, rating = (None if column is None else fields[column] for column in columns)
        yield number, question or "", answer, rating


def _fields(line: str) -> list[str]:
    # Parse each line by itself: an unclosed quote must not swallow the file.
    return next(csv.reader([line]), [])


def _line_rows(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        text = line.strip()
        if text and not text.startswith("#"):
            yield number, text, None, None


def _bad(path: Path | None, line: int, what: str) -> SudokuError:
    return SudokuError(f"{path}: line {line}: {what}")


def _check(path: Path, size: int, rows: list[Row], skip_improper: bool) -> list[np.ndarray | None]:
    """Line numbers, questions, answers and ratings of some rows, checked except by the solver."""
    numbers, texts, answer_texts, rating_texts = zip(*rows, strict=True)
    questions = _digits(path, size, numbers, texts, "question")
    clash = _clashes(size, questions)
    if not skip_improper:
        _refuse_clash(path, size, numbers, clash, "question")
    answers = ratings = None
    if answer_texts[0] is not None:
        answers = _digits(path, size, numbers, answer_texts, "answer")
        _refuse_clash(path, size, numbers, _clashes(size, answers), "answer")
        wrong = ((answers == 0) | ((questions > 0) & (questions != answers))).any(axis=1)
        # The solver reports contradictory questions as puzzles without a solution.
        wrong &= ~clash.any(axis=1)
        if wrong.any():
            raise _bad(path, numbers[int(wrong.argmax())], "the answer does not solve the question")
    if rating_texts[0] is not None:
        ratings = np.zeros(len(rows), np.int32)
        for row, text in enumerate(rating_texts):
            try:
                rating = int(text)
            except ValueError:
                rating = -1
            if not 0 <= rating <= MOST_RATING:
                what = f"rating {text[:40]!r}, expected a whole number from 0 to {MOST_RATING}"
                raise _bad(path, numbers[row], what)
            ratings[row] = rating
    return [np.array(numbers), questions, answers, ratings]


def _digits(path: Path, size: int, numbers: tuple[int, ...], texts: tuple[str, ...], what: str) -> np.ndarray:
    """Texts as grids (N, n*n), after checks of length and characters."""
    cells = size * size
    for number, text in zip(numbers, texts, strict=True):
        if len(text) != cells:
            raise _bad(path, number, f"{what} of {len(text)} characters, expected {cells} for size {size}")
    # One byte a character; non-ASCII ones become '?', which is no digit.
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
    return grids


def _clashes(size: int, grids: np.ndarray) -> np.ndarray:
    """Whether a digit is twice in a unit, (N, 3n) bool."""
    # One bit for each digit, none for a blank: without repetition, sum and union of a unit are equal.
    bits = (1 << grids.astype(np.int16)) & ~1
    digits = bits[:, units(size)[0]]
    return digits.sum(axis=2, dtype=np.int32) != np.bitwise_or.reduce(digits, axis=2)


def _refuse_clash(path: Path, size: int, numbers: tuple[int, ...], clash: np.ndarray, what: str) -> None:
    if clash.any():
        row, unit = (int(i) for i in np.unravel_index(clash.argmax(), clash.shape))
        kind, place = ("row", "column", "box")[unit // size], unit % size + 1
        raise _bad(path, numbers[row], f"a digit is twice in {kind} {place} of the {what}")


def _solve(puzzles: Puzzles, workers: int, *, improper: bool) -> tuple[Puzzles, np.ndarray]:
    """The puzzles with the solver's answers and guesses, and the number of solutions of each.

    Without `improper`, the first puzzle with no or several solutions is an error.
    """
    answers = np.zeros_like(puzzles.questions)
    guesses = np.zeros(len(answers), np.int32)
    found = np.zeros(len(answers), np.uint8)

    def work(part: slice) -> None:
        solve_each(puzzles.questions[part], answers[part], guesses[part], found[part])
        wrong = np.nonzero(found[part] != 1)[0]
        if len(wrong) and not improper:
            row = part.start + int(wrong[0])
            undecided = f"no known number of solutions ({GAVE_UP})"
            count = {0: "no solution", UNDECIDED: undecided}.get(int(found[row]), "several solutions")
            line = 0 if puzzles.lines is None else int(puzzles.lines[row])
            raise _bad(
                puzzles.path, line, f"the puzzle has {count}, expected one; --skip-improper leaves it out"
            )

    over_rows(work, len(answers), workers, f"solving {puzzles.path.name if puzzles.path else 'puzzles'}")
    return replace(puzzles, answers=answers, difficulty=guesses, solved=True), found


def _improper(puzzles: Puzzles, found: np.ndarray) -> str:
    """The message about skipped puzzles."""
    wrong = np.nonzero(found != 1)[0]
    lines = (wrong if puzzles.lines is None else puzzles.lines[wrong]).tolist()
    named = ", ".join(map(str, lines[:NAMED_LINES]))
    more = f" and {len(lines) - NAMED_LINES} more" if len(lines) > NAMED_LINES else ""
    none = int((found == 0).sum())
    return (
        f"left out {len(lines)} improper, {none} with no solution and {len(lines) - none} with several: "
        f"line{'s' * (len(lines) > 1)} {named}{more}"
    )
