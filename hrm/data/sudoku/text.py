"""Text formats of Sudokus, all read as rows of cells with one character per cell.

- tables with a header, whose columns are found by their names (`hrm.data.tables`);
- lines with a puzzle, optionally its solution and rating, optionally after an identifier as in exchange
  banks;
- grids over several lines, with or without rulers between the boxes: .sdk, .ss, or several per file.

A blank is one of `.0*_`. 16x16: digits are 1 to 9 and A to G, or 0 to 9 and A to F with a blank other than 0,
or numbers 1 to 16 (0 blank) or 0 to 15 (another blank) with spaces between them.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice

import numpy as np

from hrm.common.text import counted
from hrm.data.sudoku.solver import BOXES
from hrm.data.tables import Header, Row, content, header_of, unnamed

BLANKS = ".0*_"
SYMBOLS = "123456789ABCDEFG"
FOREIGN = 255
# Number of lines from which the format of a file is detected.
LOOKED_AT = 100

# Characters between cells: rulers, and the lists of numpy and Python.
_BETWEEN = str.maketrans("|,[]", "    ")
_NUMBERS = {str(number): f"0{SYMBOLS}"[number] for number in range(17)}
_RULER = re.compile(r"[-+=|*:\s]*[-=][-+=|*:\s]*")
_CELL = re.compile(r"[0-9A-Ga-g.*_]+")
# A header line, or a comment in another language's style.
_PREAMBLE = re.compile(r"(?=.*[A-Za-z]{3})[A-Za-z_ \"',;\t|-]+|\s*(?:;|//|%|--).*")


def cells_of(text: str, size: int) -> str:
    """The cells of a text, one character each, without rulers and spaces."""
    if len(text) == size * size and " " not in text and "|" not in text and "[" not in text:
        return text
    words = text.translate(_BETWEEN).split()
    # Two-digit numbers are separated by spaces; other groups of digits are rows of boxes.
    if len(words) in (size, size * size) and any(len(word) == 2 for word in words):
        return "".join(_NUMBERS.get(word.lstrip("0") or word[:1], word) for word in words)
    return "".join(words)


def read_rows(lines: Iterator[tuple[int, str]], size: int) -> Iterator[Row | tuple[int, str]]:
    """The puzzles of numbered lines; for an invalid line, its number and the fault.

    Raises ValueError for a header without a known column of puzzles.
    """
    held = content(lines, "#")
    first = list(islice(held, LOOKED_AT))
    if not first:
        return iter(())
    texts, everything = [text for _, text in first], chain(first, held)
    # Check this first, because the title of a grid may be the name of a column.
    if _grid_rows(texts, size) > _whole_puzzles(texts, size):
        return _grids(everything, size)
    if header := header_of(texts[0]):
        return _table(islice(everything, 1, None), header)
    wholes = _whole_puzzles(texts, size)
    if not wholes and re.search("[A-Za-z]{3}", texts[0]):
        raise ValueError(unnamed(texts[0]))
    # Columns of unknown names are found by their content.
    if wholes and _PREAMBLE.fullmatch(texts[0]):
        texts = texts[1:]
        next(everything)
    return _puzzle_lines(everything, texts, size)


def size_of(lines: Iterable[tuple[int, str]]) -> int | None:
    """The size of the Sudokus of some lines; None if they hold none."""
    texts = [text for _, text in islice(content(iter(lines), "#"), LOOKED_AT)]
    if not texts:
        return None
    # A row of 16 cells may also be a whole puzzle of 4x4, with digits up to 4.
    for size in sorted(BOXES, reverse=True):
        rows = _grid_rows(texts, size)
        if rows >= size and rows > _whole_puzzles(texts, size):
            small = all(set("".join(text.split())) <= set(BLANKS + "1234|") for text in texts)
            if size != 16 or not small:
                return size
    header = header_of(texts[0])
    if header is not None and len(texts) > 1:
        with suppress(ValueError):
            question = header.row(0, texts[1]).question
            return next((size for size in BOXES if len(cells_of(question, size)) == size * size), None)
    return next((size for size in BOXES if _whole_puzzles(texts, size)), None)


def _table(lines: Iterator[tuple[int, str]], header: Header) -> Iterator[Row | tuple[int, str]]:
    for number, text in lines:
        try:
            yield header.row(number, text)
        except ValueError as fault:
            yield number, str(fault)


def _grid_rows(texts: Sequence[str], size: int) -> int:
    return sum(len(cells) == size and bool(_CELL.fullmatch(cells)) for cells in _cells(texts, size))


def _whole_puzzles(texts: Sequence[str], size: int) -> int:
    return sum(any(len(field) == size * size for field in _fields(text, size)) for text in texts)


def _cells(texts: Sequence[str], size: int) -> Iterator[str]:
    return (cells_of(text, size) for text in texts if not _RULER.fullmatch(text))


def _fields(text: str, size: int) -> list[str]:
    """The fields of a line without a header: the whole line if it is one puzzle."""
    cells = cells_of(text.strip(), size)
    if len(cells) == size * size and _CELL.fullmatch(cells):
        return [cells]
    return re.split(r"\s*[,;\t|:]\s*|\s+", text.strip())


def _puzzle_lines(
    lines: Iterator[tuple[int, str]], texts: Sequence[str], size: int
) -> Iterator[Row | tuple[int, str]]:
    """One puzzle per line; the first puzzle line determines the columns of solution and rating."""
    cells = size * size
    fields = next(
        (found for found in (_fields(text, size) for text in texts) if cells in map(len, found)), [texts[0]]
    )
    question = next((place for place, field in enumerate(fields) if len(field) == cells), 0)
    behind = fields[question + 1 :]
    answer = question + 1 if behind and len(behind[0]) == cells else None
    rest = question + 1 + (answer is not None)
    rating = rest if len(fields) == rest + 1 and re.fullmatch(r"\d+(\.\d*)?", fields[rest]) else None
    for number, text in lines:
        found = _fields(text, size)
        if len(fields) == 1:
            yield Row(number, cells_of(text.strip(), size))
        elif len(found) != len(fields):
            yield number, f"{counted(len(found), 'field')}, expected {len(fields)} as in the lines before"
        else:
            yield Row(
                number,
                found[question],
                None if answer is None else found[answer],
                None if rating is None else found[rating],
            )


def _grids(lines: Iterator[tuple[int, str]], size: int) -> Iterator[Row]:
    """Grids of `size` lines each. Titles and sections other than [Puzzle] are skipped."""
    rows: list[str] = []
    start, counts = 0, True
    for number, text in lines:
        if text.strip().startswith("["):
            counts = text.strip().lower() == "[puzzle]"
            continue
        if not counts or _RULER.fullmatch(text):
            continue
        cells = cells_of(text, size)
        is_row = _CELL.fullmatch(cells) is not None and (len(cells) == size or rows)
        if is_row:
            start = start if rows else number
            rows.append(cells)
        if rows and (len(rows) == size or not is_row):
            yield Row(start, "".join(rows))
            rows = []
    if rows:
        yield Row(start, "".join(rows))


def digit_table(size: int, texts: Iterable[str]) -> np.ndarray:
    """The digit of every character code below 256 in the notation of these texts, uint8; 0 for a blank.

    Other characters are FOREIGN.
    """
    table = np.full(256, FOREIGN, np.uint8)
    symbols, blanks = SYMBOLS[:size], BLANKS
    if size > 9:
        seen = set().union(*texts)
        # If the blank is another character, 0 is a digit.
        if "0" in seen and seen & set(BLANKS[1:].replace("0", "") + ".") and not seen & set("Gg"):
            symbols, blanks = "0123456789ABCDEF", BLANKS.replace("0", "")
    for digit, symbol in enumerate(symbols, 1):
        table[[ord(symbol), ord(symbol.lower())]] = digit
    table[[ord(blank) for blank in blanks]] = 0
    return table


def expected(size: int) -> str:
    """A description of a cell's allowed values."""
    return f"'.' or 0 to {size}" if size < 10 else "'.', 1 to 9, A to G, or a number up to 16 between spaces"
