"""Text formats of mazes, all read as rows of a table.

- tables with a header, whose columns are found by their names (`hrm.data.tables`); fields in quotes may have
  several lines;
- one maze per line, optionally followed by a comma and its answer;
- grids over several lines, with blank lines or titles between them. A path in a grid is its answer.
"""

import csv
import re
from collections.abc import Iterator
from itertools import chain, islice

from hrm.common.text import counted
from hrm.data.tables import Header, Row, header_of, unnamed

SMALLEST_SIDE = 5
CHARACTERS = frozenset("# .SGoEX")
# Number of lines from which the format of a file is detected.
LOOKED_AT = 100
_WITHOUT_PATH = str.maketrans("oX", "  ")


def read_rows(lines: Iterator[tuple[int, str]]) -> Iterator[Row | tuple[int, str]]:
    """The mazes of numbered lines; for an invalid row, its line and the fault.

    A maze of several lines has "\\n" between them. Raises ValueError for lines of an unknown format,
    csv.Error for a field that the csv module rejects.
    """
    first = list(islice(lines, LOOKED_AT))
    texts, everything = [_bare(text) for _, text in first], chain(first, lines)
    if not any(texts):
        return iter(())
    header = header_of(texts[0])
    # Spaces do not separate columns: they are open cells.
    if header is not None and header.delimiter is not None:
        return _table(everything, header, f"{header.delimiter} " in texts[0])
    wholes = sum(_is_whole(text) for text in texts)
    if 2 * wholes > sum(map(bool, texts)):
        return _one_a_line(everything)
    if any(map(is_grid_row, texts)):
        return _grids(everything)
    raise ValueError(unnamed(texts[0]))


def _bare(line: str) -> str:
    return line.rstrip("\r\n")


def is_grid_row(text: str) -> bool:
    """Whether a line can be the first row of a grid, and not a title."""
    return len(text) >= SMALLEST_SIDE and set(text) <= CHARACTERS and not text.isspace()


def _is_whole(text: str) -> bool:
    maze = _fields(text)[0]
    return maze.count("S") == 1 == maze.count("G") + maze.count("E") and len(maze) >= SMALLEST_SIDE**2


def _fields(text: str) -> list[str]:
    return re.split("[,;\t]", text)


def _table(lines: Iterator[tuple[int, str]], header: Header, spaced: bool) -> Iterator[Row | tuple[int, str]]:
    reader = csv.reader(
        (line for _, line in lines), delimiter=header.delimiter or ",", skipinitialspace=spaced
    )
    next(reader)
    question, answer, _ = header.places
    for fields in reader:
        if fields and len(fields) != header.width:
            found = f"{counted(len(fields), 'field')}, expected {header.width} as in the header"
            yield reader.line_num, found
        elif fields:
            given = None if answer is None else fields[answer]
            yield Row(reader.line_num, fields[question or 0], given or None)


def _one_a_line(lines: Iterator[tuple[int, str]]) -> Iterator[Row]:
    for number, line in lines:
        maze, *rest = _fields(_bare(line))
        if maze.strip():
            yield _row(number, maze, rest[0] if rest and len(rest[0]) == len(maze) else None)


def _row(line: int, maze: str, answer: str | None = None) -> Row:
    """A maze row; a path in the maze becomes its answer."""
    bare = maze.translate(_WITHOUT_PATH)
    return Row(line, bare, maze if answer is None and bare != maze else answer)


def _grids(lines: Iterator[tuple[int, str]]) -> Iterator[Row]:
    rows: list[str] = []
    start = 0
    for number, line in chain(lines, [(0, "")]):
        text = _bare(line)
        # A row of wrong length is reported later; a title ends the grid.
        if rows and text and (len(text) == len(rows[0]) or set(text) <= CHARACTERS):
            rows.append(text)
            continue
        yield from _parts(start, rows)
        rows = [text] if is_grid_row(text) else []
        start = number


def _parts(start: int, rows: list[str]) -> Iterator[Row]:
    """The mazes in rows without separators: one per start, of equal height."""
    starts = "".join(rows).count("S")
    height = len(rows) // starts if starts and len(rows) % starts == 0 else len(rows)
    parts = [rows[first : first + height] for first in range(0, len(rows), height or 1)]
    if any("".join(part).count("S") != 1 for part in parts):
        parts = [rows] if rows else []
    for number, part in enumerate(parts):
        yield _row(start + number * height, "\n".join(part))
