"""Rows of puzzle tables; the header determines delimiter and columns."""

import csv
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from hrm.common.text import counted, literal

# Column names by meaning, in lower case; the first one in the header is used.
QUESTIONS = (
    "question",
    "questions",
    "puzzle",
    "puzzles",
    "quiz",
    "quizzes",
    "maze",
    "problem",
    "input",
    "grid",
)
ANSWERS = ("answer", "answers", "solution", "solutions", "solved", "output", "target", "label")
RATINGS = ("rating", "difficulty", "score", "backtracks", "guesses")
DELIMITERS = (",", ";", "\t", "|", None)
# Lines after the first that a quoted field may have: a 16x16 grid with rulers, or a maze.
MOST_QUOTED = 64


class Row(NamedTuple):
    """One puzzle of a file: its line, question, and answer and rating if present."""

    line: int
    question: str
    answer: str | None = None
    rating: str | None = None


class Header(NamedTuple):
    """The columns of a table. delimiter: None for white space. places: of question, answer and rating."""

    delimiter: str | None
    width: int
    places: tuple[int | None, int | None, int | None]

    def row(self, line: int, text: str) -> Row:
        """The row of a line. Raises ValueError for another number of fields than in the header."""
        found = fields(text, self.delimiter)
        if len(found) != self.width:
            raise ValueError(f"{counted(len(found), 'field')}, expected {self.width} as in the header")
        question, answer, rating = (None if place is None else found[place] for place in self.places)
        return Row(line, question or "", answer or None, rating or None)


def header_of(text: str) -> Header | None:
    """The columns in a header; None if it has no column of questions."""
    for delimiter in DELIMITERS:
        names = [name.lower() for name in fields(text, delimiter)]
        places = [_place(names, known) for known in (QUESTIONS, ANSWERS, RATINGS)]
        if places[0] is not None:
            return Header(delimiter, len(names), (places[0], places[1], places[2]))
    return None


def fields(text: str, delimiter: str | None) -> list[str]:
    """The stripped fields of one row; a row that is not CSV is one field."""
    if delimiter is None:
        return text.split()
    # Parse each row by itself: an unclosed quote must not swallow the file.
    try:
        found = next(
            csv.reader(text.splitlines(keepends=True), delimiter=delimiter, skipinitialspace=True), []
        )
    except csv.Error:
        found = [text]
    return [field.strip() for field in found]


def _place(names: Sequence[str], known: Sequence[str]) -> int | None:
    return next((names.index(name) for name in known if name in names), None)


def unnamed(text: str) -> str:
    """The error message for a header without a column of questions."""
    if text.lstrip()[:1] in ("{", "["):
        return "JSON; write it as a .csv file with the columns question and answer"
    counts = [len(fields(text, delimiter)) for delimiter in DELIMITERS[:-1]]
    found = fields(text, DELIMITERS[counts.index(max(counts))])
    return (
        f"no column 'question' among {', '.join(literal(name, 30) for name in found[:10])}; rename one: "
        f"puzzles are in {', '.join(QUESTIONS[::2])}, answers in {', '.join(ANSWERS[:4:2])}, ratings in "
        f"{', '.join(RATINGS[:2])}"
    )


def content(lines: Iterator[tuple[int, str]], comment: str | None) -> Iterator[tuple[int, str]]:
    """The non-empty lines, without line ends; the lines of a quoted field are joined.

    comment: the start of a comment.
    """
    held = _without_comments(lines, comment)
    while (line := next(held, None)) is not None:
        number, text = line
        if text.count('"') % 2:
            quoted: list[tuple[int, str]] = []
            for following in islice(held, MOST_QUOTED):
                quoted.append(following)
                if following[1].count('"') % 2:
                    text = "\n".join([text, *(each for _, each in quoted)])
                    break
            else:
                # Never closed: each line stands for itself.
                held = chain(quoted, held)
        yield number, text


def _without_comments(lines: Iterator[tuple[int, str]], comment: str | None) -> Iterator[tuple[int, str]]:
    for number, line in lines:
        text = line.rstrip("\r\n")
        if comment is not None and comment in text:
            text = text[: text.index(comment)]
        if text.strip():
            yield number, text


def file_of(folder: Path, split: str) -> Path:
    """The file of a split in a folder of puzzles: a .csv file, else a file in another format."""
    names = [folder / f"{split}{suffix}" for suffix in (".csv", ".txt", ".tsv", ".sdm", ".sdk", ".ss")]
    return next((path for path in names if path.is_file()), names[0])
