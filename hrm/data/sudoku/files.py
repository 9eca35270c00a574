"""Reads Sudoku puzzles in any format of `sudoku.text`, and checks each."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hrm.common.files import numbered_lines
from hrm.common.text import counted
from hrm.data.faults import Faults
from hrm.data.sudoku.solver import BOXES, GAVE_UP, UNDECIDED, SudokuError, solve_each, units
from hrm.data.sudoku.text import FOREIGN, cells_of, digit_table, expected, read_rows
from hrm.data.tables import Row
from hrm.data.workers import over_rows

# Lines per chunk, which limits memory.
CHUNK_LINES = 20_000
# Maximum characters of a line, more than any puzzle needs; a whole chunk of lines is in memory.
LINE_LIMIT = 1 << 12
# Maximum number of line numbers in a message about skipped lines.
NAMED_LINES = 5
# Spellings of a missing rating.
MISSING = ("nan", "na", "n/a", "null", "none", "-")
# Ratings are stored as int32.
MOST_RATING = 2**31 - 1


@dataclass(frozen=True)
class Puzzles:
    """Puzzles before augmentation: questions and answers (N, n*n) uint8 digits, 0 blank; difficulty (N,).

    For a file, `path` and `lines` (N,) give the origin, `solved` whether the solver has checked each puzzle,
    and `notes` describe skipped lines. A 9x9 puzzle takes 174 bytes, and twice that while a file is read.
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
    """A hash of every row, the sum of cells with random weights: (N, n*n) to (N,) uint64.

    Different rows collide with probability 2^-60.
    """
    weights = np.random.default_rng(0).integers(1, 1 << 63, grids.shape[1], dtype=np.uint64)
    keys = np.empty(len(grids), np.uint64)
    for first in range(0, len(grids), CHUNK_LINES):
        part = slice(first, first + CHUNK_LINES)
        keys[part] = grids[part].astype(np.uint64) @ weights
    return keys


def read_puzzles(
    path: Path,
    size: int,
    min_difficulty: int = 0,
    *,
    skip_improper: bool = False,
    skip_bad: bool = False,
    workers: int = 1,
) -> Puzzles:
    """Reads and checks a file of puzzles; keeps puzzles of at least min_difficulty, each question once.

    Missing answers are computed on `workers` threads; the difficulty is the rating, rounded down, else the
    solver's guesses. skip_improper skips puzzles with no or several solutions, and skip_bad skips all other
    invalid ones; else they are an error with the first faults, by file and line. Raises SudokuError.
    """
    faults = Faults(skip=skip_bad, error=SudokuError)
    puzzles, answered, rated, hardest = _read(path, size, min_difficulty, skip_improper, faults)
    notes = [f"{path.name}: {note}" for note in faults.notes()]
    if len(puzzles.questions):
        first = np.zeros(len(puzzles.questions), bool)
        first[np.unique(row_keys(puzzles.questions), return_index=True)[1]] = True
        if repeated := len(first) - int(first.sum()):
            notes.append(f"{path.name}: left out {repeated} with the question of an earlier line")
        puzzles = puzzles.take(first)
        if skip_improper or skip_bad or not (answered and rated):
            solved, found = _solve(puzzles, workers, improper=skip_improper or skip_bad)
            proper = found == 1
            # The given answer of a puzzle with a unique solution equals the solver's, unless it is missing.
            if not proper.all():
                notes.append(f"{path.name}: {_improper(puzzles, found)}")
            difficulty = puzzles.difficulty if rated else solved.difficulty
            hardest = max(hardest, int(difficulty[proper].max(initial=0)))
            puzzles = replace(solved, difficulty=difficulty).take(proper)
            if not len(puzzles.questions):
                raise SudokuError(f"{path}: no puzzle has exactly one solution; expected at least one")
            puzzles = puzzles.take(puzzles.difficulty >= min_difficulty)
    if not len(puzzles.questions):
        raise SudokuError(
            f"{path}: no puzzle of difficulty {min_difficulty} or more, the hardest has {hardest}; "
            "lower --min-difficulty"
        )
    return replace(puzzles, notes=tuple(notes))


def prove_proper(puzzles: Puzzles, workers: int = 1) -> None:
    """Raises SudokuError for a puzzle with several solutions; checks puzzles that are not yet solved."""
    if not puzzles.solved:
        _solve(puzzles, workers, improper=False)


def hold_out(puzzles: Puzzles, test_size: float, rng: np.random.Generator) -> tuple[Puzzles, Puzzles]:
    """Splits puzzles into training and a share of about `test_size` for the test, without a common solution
    grid.

    Puzzles with the same solution stay together. Raises SudokuError if a split would be empty.
    """
    if not 0 < test_size < 1:
        raise SudokuError(f"test_size={test_size:g}: expected a part of the puzzles, between 0 and 1")
    # Byte strings sort fast, in the order of rows.
    texts = np.ascontiguousarray(puzzles.answers).view(f"S{puzzles.answers.shape[1]}").ravel()
    _, grid, counts = np.unique(texts, return_inverse=True, return_counts=True)
    if len(counts) < 2:
        raise SudokuError(
            f"{puzzles.path}: {counted(len(texts), 'puzzle')} of {len(counts)} solution grid, expected 2 "
            "grids or more to hold out a test; add puzzles, or give a folder with a train and a test file"
        )
    order = rng.permutation(len(counts))
    wanted = test_size * len(puzzles.questions)
    number = min(int(np.searchsorted(np.cumsum(counts[order]), wanted)) + 1, len(counts) - 1)
    held = np.isin(grid, order[:number])
    return puzzles.take(~held), puzzles.take(held)


def _read(
    path: Path, size: int, min_difficulty: int, skip_improper: bool, faults: Faults
) -> tuple[Puzzles, bool, bool, int]:
    """Reads a file without solving: its puzzles, whether all have answers, whether any has a rating, the
    highest rating.

    Puzzles rated too low are skipped at once, to save memory.
    """
    chunks: list[list[np.ndarray | None]] = []
    table, hardest, unanswered, rated = None, 0, False, False
    try:
        rows = read_rows(numbered_lines(path, LINE_LIMIT, "one puzzle a line", SudokuError), size)
        while chunk := list(islice(rows, CHUNK_LINES)):
            good = [row for row in chunk if isinstance(row, Row)]
            wrong = {row[0]: row[1] for row in chunk if not isinstance(row, Row)}
            if table is None:
                table = digit_table(size, [text for row in good for text in (row.question, row.answer or "")])
            arrays = _check(size, table, good, skip_improper or faults.skip, wrong)
            for line in sorted(wrong):
                faults.add(f"{path}: line {line}", wrong[line])
            unanswered |= not bool((arrays[2] > 0).all())
            rated |= bool((arrays[3] >= 0).any())
            hardest = max(hardest, int(arrays[3].max(initial=0)))
            # A puzzle without a rating among rated ones counts as the easiest.
            kept = np.maximum(arrays[3], 0) >= min_difficulty if rated else np.ones(len(arrays[0]), bool)
            chunks.append([array[kept] for array in arrays])
    except OSError as error:
        raise SudokuError(
            f"{path}: cannot be read ({error.strerror or error}); expected a file of puzzles"
        ) from None
    except ValueError as fault:
        raise SudokuError(f"{path}: line 1: {fault}") from None
    faults.check()
    if not chunks:
        raise SudokuError(f"{path}: it holds no puzzle; expected puzzles of {size * size} characters")
    lines, questions, answers, ratings = (_joined(chunks, field) for field in range(4))
    puzzles = Puzzles(questions, answers, np.maximum(ratings, 0), path, lines, solved=False)
    return puzzles, not unanswered, rated, hardest


def _joined(chunks: list[list[Any]], field: int) -> Any:
    """Joins one field of all chunks, and removes it from them to free memory."""
    parts = [chunk[field] for chunk in chunks]
    for chunk in chunks:
        chunk[field] = None
    return None if parts[0] is None else np.concatenate(parts)


def _check(
    size: int, table: np.ndarray, rows: list[Row], skip_improper: bool, wrong: dict[int, str]
) -> list[np.ndarray]:
    """Line numbers, questions, answers and ratings of the valid rows, before the solver's check.

    A missing answer is all 0, a missing rating -1. The first fault of every other row is added to `wrong`, by
    line.
    """

    def fault(row: int, what: str) -> None:
        wrong.setdefault(rows[row].line, what)

    questions = _digits(size, table, [row.question for row in rows], "question", fault)
    clash = _clashes(size, questions)
    if not skip_improper:
        _add_clashes(size, clash, "question", fault)
    given = np.array([row.answer is not None for row in rows], bool)
    blank = "." * (size * size)
    answers = _digits(size, table, [row.answer or blank for row in rows], "answer", fault)
    _add_clashes(size, _clashes(size, answers), "answer", fault)
    differs = ((answers == 0) | ((questions > 0) & (questions != answers))).any(axis=1) & given
    # The solver reports contradictory questions as puzzles without a solution.
    for row in np.nonzero(differs & ~clash.any(axis=1))[0].tolist():
        fault(row, "the answer does not solve the question")
    ratings = np.full(len(rows), -1, np.int32)
    for place, each in enumerate(rows):
        if each.rating is not None and each.rating.lower() not in MISSING:
            rating = _rating(each.rating)
            if rating is None:
                limits = f"a whole number from 0 to {MOST_RATING}, or a decimal one"
                fault(place, f"rating {each.rating[:40]!r}, expected {limits}")
            else:
                ratings[place] = rating
    kept = np.array([row.line not in wrong for row in rows], bool)
    return [
        array[kept] for array in (np.array([row.line for row in rows], np.int64), questions, answers, ratings)
    ]


def _rating(text: str) -> int | None:
    """A rating rounded down; None for an invalid rating."""
    try:
        # A comma may be the decimal point; before three digits it may also separate thousands.
        number = float(re.sub(r"^(\d+),(\d{1,2})$", r"\1.\2", text))
    except ValueError:
        return None
    return math.floor(number) if 0 <= number <= MOST_RATING else None


def _digits(
    size: int, table: np.ndarray, texts: list[str], what: str, fault: Callable[[int, str], None]
) -> np.ndarray:
    """Texts as grids (N, n*n) uint8; a row of wrong length or characters is a fault, and left blank."""
    cells = size * size
    texts = [cells_of(text, size) for text in texts]
    for row, text in enumerate(texts):
        if len(text) != cells:
            # Spreadsheets and pandas read the digits as a number and drop leading zeros.
            dropped = len(text) < cells and text.isdigit() and "0" in text
            hint = "; read the column as text, because leading zeros are missing" if dropped else ""
            if size != (side := math.isqrt(len(text))) and side in BOXES and side * side == len(text):
                hint = f"; give --size {side}"
            found = f"{what} of {counted(len(text), 'character')}, expected {cells} for size {size}"
            fault(row, found + hint)
            texts[row] = "." * cells
    # One byte per character; characters beyond Latin-1 become '?', which is not a cell.
    grids = table[np.frombuffer("".join(texts).encode("latin-1", "replace"), np.uint8)].reshape(-1, cells)
    foreign = grids == FOREIGN
    for row in np.nonzero(foreign.any(axis=1))[0].tolist():
        cell = int(foreign[row].argmax())
        character = f"character {texts[row][cell]!r} at place {cell + 1} of the {what}"
        fault(row, f"{character}, expected {expected(size)}")
        grids[row] = 0
    return grids


def _clashes(size: int, grids: np.ndarray) -> np.ndarray:
    """Whether a digit occurs twice in a unit, (N, 3n) bool."""
    # One bit per digit, none for a blank: without repetition, sum and union of a unit are equal.
    bits = (1 << grids.astype(np.int16)) & ~1
    digits = bits[:, units(size)[0]]
    return digits.sum(axis=2, dtype=np.int32) != np.bitwise_or.reduce(digits, axis=2)


def _add_clashes(size: int, clash: np.ndarray, what: str, fault: Callable[[int, str], None]) -> None:
    for row in np.nonzero(clash.any(axis=1))[0].tolist():
        unit = int(clash[row].argmax())
        fault(
            row,
            f"a digit repeats in {('row', 'column', 'box')[unit // size]} {unit % size + 1} of the {what}",
        )


def _solve(puzzles: Puzzles, workers: int, *, improper: bool) -> tuple[Puzzles, np.ndarray]:
    """The puzzles with the solver's answers and guesses, and the number of solutions of each.

    Without `improper`, puzzles with no or several solutions are an error.
    """
    answers = np.zeros_like(puzzles.questions)
    guesses = np.zeros(len(answers), np.int32)
    found = np.zeros(len(answers), np.uint8)

    def work(part: slice) -> None:
        solve_each(puzzles.questions[part], answers[part], guesses[part], found[part])

    over_rows(work, len(answers), workers, f"solving {puzzles.path.name if puzzles.path else 'puzzles'}")
    faults = Faults(skip=improper, error=SudokuError)
    for row in np.nonzero(found != 1)[0]:
        undecided = f"no known number of solutions ({GAVE_UP})"
        count = {0: "no solution", UNDECIDED: undecided}.get(int(found[row]), "several solutions")
        line = 0 if puzzles.lines is None else int(puzzles.lines[row])
        faults.add(f"{puzzles.path}: line {line}", f"the puzzle has {count}, expected one")
    faults.check("--skip-improper leaves them out")
    return replace(puzzles, answers=answers, difficulty=guesses, solved=True), found


def _improper(puzzles: Puzzles, found: np.ndarray) -> str:
    """The message about skipped puzzles."""
    wrong = np.nonzero(found != 1)[0]
    lines = (wrong if puzzles.lines is None else puzzles.lines[wrong]).tolist()
    named = ", ".join(map(str, lines[:NAMED_LINES]))
    more = f" and {len(lines) - NAMED_LINES} more" if len(lines) > NAMED_LINES else ""
    none, undecided = int((found == 0).sum()), int((found == UNDECIDED).sum())
    several = len(lines) - none - undecided
    gave_up = f", {undecided} on which the search gave up" if undecided else ""
    return (
        f"left out {len(lines)} improper, {none} with no solution and {several} with several{gave_up}: "
        f"line{'s' * (len(lines) > 1)} {named}{more}"
    )
