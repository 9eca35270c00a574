"""A self-contained page that plays the solution of a puzzle on any of its paths.

This module computes the contents; the script (player.js) shows the steps. Without the script the page shows
the puzzle, the last board and the verdict.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from importlib.resources import files
from string import Template

import numpy as np

from hrm.common.text import counted
from hrm.data.arc.augment import canvas, grid_of
from hrm.data.sudoku.solver import BOXES
from hrm.solving.trace import Recorded, Step, Trace

# The display of a token: its CSS class in player.css, its text, and its name.
Symbol = tuple[str, str, str]

_COLOURS = ("black", "blue", "red", "green", "yellow", "grey", "pink", "orange", "light blue", "maroon")
_PAD, _FIRST_GIVEN = 0, 2
# Tokens that are not listed are shown as numbers.
_SYMBOLS: Mapping[str, Sequence[Symbol]] = {
    "sudoku": [
        ("pad", "pad", "padding"),
        ("blank", "", "blank"),
        *(("digit", str(digit), str(digit)) for digit in range(1, max(BOXES) + 1)),
    ],
    "maze": [
        ("pad", "", "padding"),
        ("wall", "", "wall"),
        ("open", "", "open"),
        ("start", "S", "start"),
        ("goal", "G", "goal"),
        ("path", "•", "path"),
    ],
    "arc": [
        ("pad", "", "no cell"),
        ("end", "", "end of the grid"),
        *((f"c{number}", str(number), name) for number, name in enumerate(_COLOURS)),
    ],
}
# Kinds whose answers extend the question and whose rules decide whether an answer is right.
_RULED = ("sudoku", "maze")
# Maximum number of playable paths, each of up to 100 kB, and of unfolded answers.
MOST_PLAYED, MOST_OPEN = 64, 8
# Descriptions of a level's gate sources.
_SOURCES = {"primary": "its own state", "secondary": "the other level", "input": "the puzzle"}


def page(solved: Trace | Recorded, chosen: int = 0) -> str:
    """A trace, or the traces of all paths, as one self-contained HTML page, with all text escaped.

    The page shows path `chosen` and its verdict. For several paths it also shows the votes, and plays the
    first MOST_PLAYED and the chosen one. Padding in the answer (0 or less) counts neither as right nor as
    wrong; an ARC canvas is cropped to its grid as in the evaluation. Raises ValueError for a trace without
    steps, or boards of another size than rows * cols.
    """
    traces = [solved] if isinstance(solved, Trace) else solved.traces
    for each in traces:
        _check(each)
    view = _View(traces[chosen])
    trace = view.trace
    others = {path: _View(each) for path, each in enumerate(traces[:MOST_PLAYED]) if path != chosen}
    outcome, headline, findings = _verdict(view)
    figures = [
        ("Puzzle", view.question, "puzzle"),
        (f"After step {len(view.boards)}", view.boards[-1], "last"),
    ]
    if view.answer is not None:
        figures.append(("Known answer", view.answer, "answer"))
    style, script = _part("player.css"), _part("player.js")
    shown_live = [*view.boards, *(board for other in others.values() for board in other.boards)]
    live = _window(view, [*shown_live, *([] if view.answer is None else [view.answer])])
    style += _size("live", live)
    shown = []
    for title, board, name in figures:
        window = _window(view, [board])
        style += _size(name, window)
        table = _board(view, board, window, name, title)
        shown.append(f'<figure class="{name}"><figcaption>{title}</figcaption>{table}</figure>')
    return Template(_part("player.html")).substitute(
        title=_text(trace.title),
        model=_text(trace.model),
        outcome=outcome,
        headline=headline,
        findings="".join(f"<li>{finding}</li>" for finding in findings),
        count=len(trace.steps),
        live=_board(view, view.boards[-1], live, "live", "Board"),
        boards="\n".join(shown),
        votes="" if isinstance(solved, Trace) or len(traces) == 1 else _votes(solved, view, chosen, others),
        data=_data(view, live, chosen, others),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def _check(trace: Trace) -> None:
    cells = trace.rows * trace.cols
    boards = [
        trace.question,
        *(step.board for step in trace.steps),
        *([trace.answer] if trace.answer else []),
    ]
    if not trace.steps or any(len(board) != cells for board in boards):
        raise ValueError(f"expected at least one step, and boards of {trace.rows} x {trace.cols} cells")


@dataclass(frozen=True)
class _View:
    """A trace with its boards for display, arrays (S,); for ARC only the grid of a canvas."""

    trace: Trace

    @cached_property
    def question(self) -> np.ndarray:
        return self._shown(self.trace.question)

    @cached_property
    def answer(self) -> np.ndarray | None:
        return None if self.trace.answer is None else self._shown(self.trace.answer)

    @cached_property
    def boards(self) -> list[np.ndarray]:
        return [self._shown(step.board) for step in self.trace.steps]

    @property
    def ruled(self) -> bool:
        return self.trace.kind in _RULED

    @property
    def compared(self) -> int:
        """The number of cells that are compared with the answer."""
        return 0 if self.answer is None else int((self.answer > _PAD).sum())

    def wrong(self, index: int) -> int | None:
        """The number of wrong cells of a step's board; None without an answer."""
        if self.answer is None:
            return None
        differ = self.boards[index] != self.answer
        # ARC boards are already cropped; in other kinds padding does not count.
        return int((differ if self.trace.kind == "arc" else differ & (self.answer > _PAD)).sum())

    def before(self, index: int) -> np.ndarray | None:
        """The board to compare a step's board with: the previous board, or the question for the first
        step."""
        return self.boards[index - 1] if index else self.question if self.ruled else None

    def changed(self, index: int) -> np.ndarray | None:
        """The changed cells of a step's board, (S,) bool."""
        before = self.before(index)
        return None if before is None else self.boards[index] != before

    def _shown(self, board: Sequence[int]) -> np.ndarray:
        tokens = np.asarray(board, np.int64)
        if self.trace.kind != "arc":
            return tokens
        grid = grid_of(tokens)
        if grid is None:
            return np.zeros_like(tokens)
        return np.where(canvas(grid, side=self.trace.rows) >= _FIRST_GIVEN, tokens, _PAD)


def _verdict(view: _View) -> tuple[str, str, list[str]]:
    """The verdict: its class, headline and findings."""
    steps, last = view.trace.steps, len(view.trace.steps) - 1
    wrong, problems = view.wrong(last), steps[last].problems
    if wrong == 0 or (view.ruled and not problems):
        outcome, headline = "good", "Solved"
    elif wrong is None and not problems:
        outcome, headline = "open", "Answered"
    else:
        outcome, headline = "bad", "Not solved"
    findings = []
    if wrong is None:
        findings += [] if view.ruled else ["the right answer is unknown"]
    else:
        differ = f"{wrong} of {view.compared} cells wrong"
        findings.append(differ if wrong else "every cell right")
    if view.ruled or problems:
        findings.append(f"{counted(len(problems), 'rule')} broken" if problems else "no rule broken")
    findings.append(f"{_percent(steps[last].q_halt)} sure")
    halts = next((number for number, step in enumerate(steps, 1) if step.halts), None)
    findings.append(
        f"would stop after step {halts} of {len(steps)}"
        if halts
        else f"would not stop by itself in {counted(len(steps), 'step')}"
    )
    moved = [index for index in range(1, len(steps)) if (view.boards[index] != view.boards[index - 1]).any()]
    settled = moved[-1] + 1 if moved else 1
    if settled < len(steps):
        findings.append(f"unchanged since step {settled}")
    return outcome, headline, findings


def _votes(recorded: Recorded, view: _View, chosen: int, others: Mapping[int, _View]) -> str:
    """The answers of the paths, the most common first, each with its votes and a choice of its paths."""
    answer = recorded.outcomes.answer[0]
    firsts, counts = np.unique(answer, return_counts=True)
    rows = []
    for first, count in sorted(zip(firsts, counts, strict=True), key=lambda each: (-each[1], each[0])):
        paths = np.flatnonzero(answer == first).tolist()
        own = _View(recorded.traces[chosen if chosen in paths else paths[0]])
        differ = int((own.boards[-1] != view.boards[-1]).sum())
        same = "this answer" if chosen in paths else f"differs in {counted(differ, 'cell')}"
        outcome, headline, findings = _verdict(own)
        sure = _percent(max(recorded.traces[path].steps[-1].q_halt for path in paths))
        picks = "".join(
            f'<label class="pick"><input type="radio" name="path" value="{path}"'
            f"{' checked' if path == chosen else ''}> {path}</label>"
            for path in paths
            if path == chosen or path in others
        )
        rows.append(
            f'<div class="answer {outcome}"><p><strong>{counted(int(count), "path")}</strong>: {same}. '
            f"{headline}, {findings[0]}, up to {sure} sure.</p>"
            f'<meter value="{count}" max="{len(answer)}" aria-label="votes"></meter>'
            f"<div>{picks}</div></div>"
        )
    legend = (
        f"{len(answer)} paths gave {counted(len(rows), 'answer')}, path {chosen} was chosen. Choose a path "
        "to play it; path 0 is the deterministic one"
    )
    if folded := rows[MOST_OPEN:]:
        summary = f"<summary>{counted(len(folded), 'further answer')}</summary>"
        rows[MOST_OPEN:] = [f"<details>{summary}{''.join(folded)}</details>"]
    unplayed = len(answer) - len(others) - 1
    more = f"<p>{counted(unplayed, 'further path')} cannot be played here.</p>" if unplayed else ""
    return f'<fieldset class="paths" id="paths"><legend>{legend}</legend>{"".join(rows)}{more}</fieldset>'


def _window(view: _View, boards: Sequence[np.ndarray]) -> np.ndarray:
    """The cells (rows, cols) to show: all, or for ARC the corner that contains all grids."""
    trace = view.trace
    cells = np.arange(trace.rows * trace.cols).reshape(trace.rows, trace.cols)
    used = np.any([board >= _FIRST_GIVEN for board in boards], axis=0).reshape(cells.shape)
    if trace.kind != "arc" or not used.any():
        return cells
    rows, cols = (np.nonzero(used.any(axis=axis))[0] for axis in (1, 0))
    return cells[: rows[-1] + 1, : cols[-1] + 1]


def _size(name: str, window: np.ndarray) -> str:
    rows, cols = window.shape
    return f"#{name} {{ --rows: {rows}; --cols: {cols} }}\n"


def _board(view: _View, board: np.ndarray, window: np.ndarray, name: str, title: str) -> str:
    """A board as a table; class `given` marks the puzzle's cells, x and y mark the first cells of a box."""
    kind = view.trace.kind
    box = BOXES[view.trace.rows] if kind == "sudoku" else None
    marked = _told(view.trace.steps[-1], view.trace) if name == "last" else set()
    lines = []
    for row in window.tolist():
        line = []
        for cell in row:
            style, text, words = _symbol(kind, int(board[cell]))
            names = [style]
            if kind == "sudoku" and view.question[cell] >= _FIRST_GIVEN:
                names.append("given")
            if box and cell % view.trace.cols and cell % view.trace.cols % box[1] == 0:
                names.append("x")
            if box and cell // view.trace.cols and cell // view.trace.cols % box[0] == 0:
                names.append("y")
            if cell in marked:
                names.append("bad")
            line.append(f'<td class="{" ".join(names)}" title="{words}">{text}</td>')
        lines.append(f"<tr>{''.join(line)}</tr>\n")
    known = kind if kind in _SYMBOLS else "tokens"
    return (
        f'<div class="board {known}" id="{name}"><table aria-label="{title}">\n<tbody>'
        f"{''.join(lines)}</tbody></table></div>"
    )


def _symbol(kind: str, token: int) -> Symbol:
    known = _SYMBOLS.get(kind, ())
    if 0 <= token < len(known):
        return known[token]
    return ("alien" if known else "token", str(token), f"token {token}")


def _told(step: Step, trace: Trace) -> set[int]:
    """The cells in the text of a step's problems, which counts from 1 as in `hrm.data.puzzle_kinds`."""
    pairs = re.findall(r"\brow (\d{1,4}), column (\d{1,4})\b", "\n".join(step.problems))
    places = [(int(row) - 1, int(column) - 1) for row, column in pairs]
    return {
        row * trace.cols + column
        for row, column in places
        if 0 <= row < trace.rows and 0 <= column < trace.cols
    }


def _data(view: _View, window: np.ndarray, chosen: int, others: Mapping[int, _View]) -> str:
    """The script's data as JSON that is safe inside its HTML element. Cells are indices in the window."""
    trace, cells = view.trace, window.ravel()
    boards = [view.question, *(board for each in (view, *others.values()) for board in each.boards)]
    shown = {token for board in boards for token in board.tolist()}
    data = {
        "symbols": {token: _symbol(trace.kind, token) for token in sorted(shown)},
        "places": [[cell // trace.cols + 1, cell % trace.cols + 1] for cell in cells.tolist()],
        "start": view.question[cells].tolist(),
        "ruled": view.ruled,
        "answered": view.answer is not None,
        **_played(view, cells, chosen),
        "others": [_played(other, cells, path) for path, other in others.items()],
    }
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    # json.dumps escapes non-ASCII text; escape "<" too, which could close the element or open a comment.
    return text.replace("<", "\\u003c")


def _played(view: _View, cells: np.ndarray, path: int) -> dict[str, object]:
    """The steps and gates of one path. cells: the shown cells."""
    trace, place = view.trace, {cell: index for index, cell in enumerate(cells.tolist())}
    steps = []
    for index, step in enumerate(trace.steps):
        changed = view.changed(index)
        steps.append(
            {
                "board": view.boards[index][cells].tolist(),
                "q_halt": _number(step.q_halt),
                "q_continue": None if step.q_continue is None else _number(step.q_continue),
                "sure": _percent(step.q_halt),
                "halts": bool(step.halts),
                "problems": step.problems,
                "marked": sorted(place[cell] for cell in _told(step, trace) if cell in place),
                "changed": None if changed is None else np.nonzero(changed[cells])[0].tolist(),
                "wrong": view.wrong(index),
            }
        )
    return {"path": path, "steps": steps, "gates": list(_gates(trace, cells))}


def _gates(trace: Trace, cells: np.ndarray) -> Iterator[dict[str, object]]:
    """Each gate over the steps; least and most are the range of its heat map."""
    for module, sources in trace.steps[0].gates.items():
        for source in sources:
            gates = [step.gates[module][source] for step in trace.steps]
            values = [[_number(gate.cells[cell]) for cell in cells] for gate in gates]
            finite = [value for step in values for value in step if value is not None]
            yield {
                "name": f"{module} · {source}",
                "words": _SOURCES.get(source, ""),
                "means": [_number(gate.mean) for gate in gates],
                "cells": values,
                "least": min(finite, default=None),
                "most": max(finite, default=None),
            }


def _number(value: float) -> float | None:
    """A rounded number for JSON; None if it is not finite."""
    return round(float(value), 4) if math.isfinite(value) else None


def _percent(probability: float) -> str:
    if not math.isfinite(probability):
        return "not a number"
    # Do not round to 0 or 100 %, which would claim certainty.
    if 0 < probability < 0.001 or 0.999 < probability < 1:
        return "below 0.1 %" if probability < 0.5 else "over 99.9 %"
    return f"{100 * probability:.1f} %"


def _text(text: str) -> str:
    # File names may contain lone surrogates, which UTF-8 cannot encode.
    return escape(text.encode("utf-8", "replace").decode("utf-8"))


def _part(name: str) -> str:
    return files("hrm.solving").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The hash of an inline element, for the content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
