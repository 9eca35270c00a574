"""Reads, writes and checks ARC grids on a square canvas.

Tokens: 0 is padding, 1 the end of the grid, c + 2 the colour c.
"""

import math
from collections.abc import Iterator

import numpy as np

from hrm.common.errors import UserError
from hrm.common.text import counted
from hrm.data.arc.augment import VOCAB_SIZE, canvas, grid_of
from hrm.data.boards import PLAIN, Boards, Rules, Tokens

# Terminal colour (of 256) for each colour.
TERMINAL_COLOURS = (16, 27, 160, 34, 220, 244, 199, 208, 117, 88)


class ArcRules(Rules):
    """Checks that an answer has a grid of colours in the upper left corner of the canvas."""

    symbols = "_|0123456789"

    def expected(self, boards: Boards) -> str:
        return "a colour 0 to 9"

    def parse(self, boards: Boards, text: str) -> np.ndarray:
        kept = ("".join(line.split()) for line in text.splitlines())
        lines = [line for line in kept if line]
        if not lines or len(lines) > boards.rows or len(lines[0]) > boards.cols:
            there = counted(len(lines), "line") + (f" of {len(lines[0])}" if lines else "")
            raise UserError(
                f"{there}, expected a grid of 1 to {boards.rows} rows and 1 to {boards.cols} columns"
            )
        grid = Boards(boards.name, len(lines), len(lines[0]))
        tokens = self.read(grid, lines)
        if (tokens < 2).any():
            cell = int((tokens < 2).argmax())
            raise UserError(f"{grid.at(cell)} is '|', expected {self.expected(boards)}")
        return canvas(tokens.reshape(grid.rows, grid.cols) - 2, side=boards.rows)

    def text(self, boards: Boards, board: np.ndarray, question: np.ndarray | None, color: bool) -> str:
        grid = board.reshape(boards.rows, boards.cols)
        if (read := grid_of(board)) is not None:
            grid = grid[: read.shape[0], : read.shape[1]]
        # Training grids may be anywhere on the canvas; without a grid, show the whole canvas.
        elif not any(self.malformed(boards, board)):
            grid = grid[arc_grid(board)]
        lines = self.shown(Boards(boards.name, *grid.shape), grid.reshape(-1), None, False)
        if color:
            lines = [[_on_colour(cell) for cell in line] for line in lines]
        return "\n".join("".join(line) for line in lines)

    def problems(self, boards: Boards, question: np.ndarray, answer: np.ndarray) -> Iterator[str]:
        # Cells around the grid carry no loss, so a model may predict anything there.
        if grid_of(answer) is None:
            yield "there is no grid: the upper left corner holds no colour"

    def impossible(self, boards: Boards, question: np.ndarray) -> Iterator[str]:
        return self.malformed(boards, question)

    def malformed(self, boards: Boards, board: np.ndarray) -> Iterator[str]:
        """The differences of the canvas from one with a single grid and its end marks."""
        rows, cols = arc_grid(board)
        if not rows.stop:
            yield "there is no grid: no cell holds a colour"
            return
        cells = board.reshape(boards.rows, boards.cols)
        holes = np.nonzero(~_coloured(cells[rows, cols]).reshape(-1))[0]
        if len(holes):
            row, column = divmod(int(holes[0]), cols.stop - cols.start)
            cell = (rows.start + row) * boards.cols + cols.start + column
            yield f"the colours do not fill a rectangle: {boards.at(cell)} has none"
            return
        grid = (cells[rows, cols] - 2).astype(np.uint8)
        expected = canvas(grid, rows.start, cols.start, boards.rows)
        wrong = np.nonzero(expected != board)[0]
        if len(wrong):
            yield f"the grid is not surrounded by end marks and padding: {boards.at(int(wrong[0]))}"


def arc_grid(tokens: Tokens) -> tuple[slice, slice]:
    """The rows and columns from the first to the last colour of a canvas; empty slices for none."""
    side = math.isqrt(len(tokens))
    colours = _coloured(np.asarray(tokens).reshape(side, side))
    rows, columns = (np.nonzero(colours.any(axis=axis))[0] for axis in (1, 0))
    if not len(rows):
        return slice(0, 0), slice(0, 0)
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _coloured(tokens: np.ndarray) -> np.ndarray:
    return (tokens >= 2) & (tokens < VOCAB_SIZE)


def _on_colour(cell: str) -> str:
    if not cell.isdigit():
        return f"{cell} "
    ink = 97 if cell in "01239" else 30
    return f"\x1b[{ink};48;5;{TERMINAL_COLOURS[int(cell)]}m{cell} {PLAIN}"
