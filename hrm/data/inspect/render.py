"""Draws boards with matplotlib: Sudoku grids, mazes and ARC grids, side by side in one PNG."""

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hrm.common.figures import GRID, INK, figures
from hrm.data.arc.rules import arc_grid
from hrm.data.boards import Tokens
from hrm.data.puzzle_kinds import Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Size of a board and of its title in inches; number of boards in a row.
BOARD, TITLE = 3.4, 0.35
COLUMNS = 4
FILLED, CHANGED = "#115193", "#c83404"
# Colours of padding, wall, open, start, goal, path.
MAZE_COLOURS = ("#ff00ff", INK, "#ffffff", "#0ca167", "#c83404", "#f2b632")
MAZE_NAMES = ("padding", "wall", "open", "start", "goal", "path")
# Colours of padding, the end of the grid, and ARC's ten colours, from black to maroon.
ARC_COLOURS = (
    *("#ffffff", "#e8d9ff"),
    *("#000000", "#0074d9", "#ff4136", "#2ecc40", "#ffdc00"),
    *("#aaaaaa", "#f012be", "#ff851b", "#7fdbff", "#870c25"),
)


def png(kind: Kind, boards: Sequence[tuple[str, Tokens, Tokens | None]]) -> bytes:
    """A PNG of boards, four in a row, each with its title.

    boards: title, tokens, and the question that the tokens answer (None for a question). Sudoku: clues are
    bold, filled-in digits blue, changed clues red. Maze: coloured cells. ARC: the cropped grid, or the whole
    canvas if it is damaged. Raises UserError if matplotlib is missing.
    """
    columns = min(COLUMNS, len(boards))
    rows = math.ceil(len(boards) / columns)
    with figures() as figure:
        size = (columns * BOARD, rows * (BOARD + TITLE))
        canvas = figure(figsize=size, layout="constrained", dpi=110)
        axes = canvas.subplots(rows, columns, squeeze=False).ravel()
        for ax, (title, tokens, question) in zip(axes, boards, strict=False):
            ax.set_title(title)
            asked = None if question is None else kind.board(question)
            DRAW.get(kind.name, _numbers)(ax, kind, kind.board(tokens), asked)
            ax.grid(visible=False)
            ax.set_xticks([])
            ax.set_yticks([])
        for ax in axes[len(boards) :]:
            ax.remove()
        if kind.name == "maze":
            _legend(canvas)
        file = io.BytesIO()
        canvas.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _sudoku(ax: "Axes", kind: Kind, board: np.ndarray, question: np.ndarray | None) -> None:
    height = math.isqrt(kind.rows)
    _frame(ax, kind.rows, kind.cols)
    for draw, step in ((ax.axhline, height), (ax.axvline, kind.cols // height)):
        for place in range(kind.rows + 1):
            draw(place, color=INK, linewidth=1.8 if place % step == 0 else 0.5, clip_on=False)
    clues = board if question is None else question
    for cell, token in enumerate(board.tolist()):
        if token == 1:
            continue
        row, column = divmod(cell, kind.cols)
        clue = clues[cell] > 1
        colour = (INK if token == clues[cell] else CHANGED) if clue else FILLED
        ax.text(
            column + 0.5,
            row + 0.5,
            str(token - 1) if 1 < token <= kind.rows + 1 else "?",
            color=colour,
            fontsize=130 / kind.rows,
            fontweight="bold" if clue else "normal",
            ha="center",
            va="center_baseline",
        )


def _maze(ax: "Axes", kind: Kind, board: np.ndarray, question: np.ndarray | None) -> None:
    _cells(ax, board.reshape(kind.rows, kind.cols), MAZE_COLOURS, None)


def _arc(ax: "Axes", kind: Kind, board: np.ndarray, question: np.ndarray | None) -> None:
    cells = board.reshape(kind.rows, kind.cols)
    if not kind.problems(board, board):
        cells = cells[arc_grid(board)]
    _cells(ax, cells, ARC_COLOURS, "#808080")
    ax.set_xlabel(f"{cells.shape[0]} x {cells.shape[1]}")


def _numbers(ax: "Axes", kind: Kind, board: np.ndarray, question: np.ndarray | None) -> None:
    ax.imshow(
        board.reshape(kind.rows, kind.cols), cmap="viridis", vmin=0, vmax=kind.vocab_size - 1, aspect="auto"
    )


DRAW = {"sudoku": _sudoku, "maze": _maze, "arc": _arc}


def _frame(ax: "Axes", rows: int, columns: int) -> None:
    """Axes with square cells, the first row at the top, without spines."""
    ax.set_xlim(0, columns)
    ax.set_ylim(rows, 0)
    ax.set_aspect("equal")
    ax.spines[:].set_visible(False)


def _cells(ax: "Axes", tokens: np.ndarray, colours: Sequence[str], lines: str | None) -> None:
    """Draws a coloured square for every token, pink for unknown tokens; optional lines between cells."""
    from matplotlib.colors import ListedColormap

    rows, columns = tokens.shape
    _frame(ax, rows, columns)
    palette = ListedColormap([*colours, "#ff9ecb"])
    known = np.where((tokens >= 0) & (tokens < len(colours)), tokens, len(colours))
    ax.pcolormesh(known, cmap=palette, vmin=-0.5, vmax=len(colours) + 0.5, edgecolors=lines, linewidth=0.4)


def _legend(canvas: Any) -> None:
    from matplotlib.patches import Patch

    names = dict(zip(MAZE_NAMES, MAZE_COLOURS, strict=True))
    handles = [Patch(facecolor=names[name], edgecolor=GRID, label=name) for name in MAZE_NAMES[1:]]
    canvas.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
