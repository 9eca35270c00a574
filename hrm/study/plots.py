"""Draws panels with matplotlib: each as SVG with the page's colours, and all as one PNG."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from hrm.common.figures import GRID, INK, figures
from hrm.study.panels import Panel, Section, mean_and_range, single_values, thinned, value_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# For light and dark backgrounds: contrast of at least 3:1, and distinct under any colour blindness.
COLOURS = (
    ("#115193", "#cfe3fd"),
    ("#d97502", "#c83404"),
    ("#0ca167", "#62fea8"),
    ("#2e0f28", "#ca45cb"),
    ("#6d4701", "#fbcb23"),
    ("#9584a4", "#6d6a6a"),
)
# Markers; with six colours they distinguish thirty groups.
MARKERS = "os^Dv"
# Inches.
PANEL_SIZE = (4.2, 2.7)
COLUMNS = 3
LONGEST_LABEL = 22
# Tick distances are these values times a power of ten.
ROUND = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Style:
    """A group's marker and colour (an index in COLOURS) in all panels."""

    colour: int
    marker: str

    @property
    def ink(self) -> str:
        return COLOURS[self.colour][0]


@dataclass(frozen=True)
class HeatMap:
    """A heat map of shares, values (rows, columns) from 0 to 1; labels are those of the axes and their
    ticks."""

    title: str
    row_label: str
    rows: Sequence[str]
    column_label: str
    columns: Sequence[str]
    values: np.ndarray


@dataclass(frozen=True)
class Drawing:
    """A custom plot: `draw` fills the axes. words: its text description. size: in inches."""

    title: str
    draw: Callable[["Axes"], None]
    words: str
    size: tuple[float, float] = PANEL_SIZE


def styles(groups: Sequence[str]) -> dict[str, Style]:
    """The style of each group by its position."""
    pairs = zip(cycle(range(len(COLOURS))), cycle(MARKERS), strict=False)
    return {group: Style(*pair) for group, pair in zip(groups, pairs, strict=False)}


def svg(panel: Panel, look: Mapping[str, Style], prefix: str) -> str:
    """A panel as an `<svg>` element. It is hidden from screen readers, so add a text description.

    prefix: of its identifiers; must be unique within a page. Text is `currentColor`; the page defines
    `--grid` and the groups' `--c0`, `--c1`, ... Raises UserError if matplotlib is missing.
    """
    return drawing_svg(Drawing(panel.title, lambda ax: _draw(ax, panel, look), ""), prefix)


def heat_map_svg(heat_map: HeatMap, prefix: str) -> str:
    """A heat map as an `<svg>` element; see `svg`."""
    drawing = Drawing(heat_map.title, lambda ax: _heat(ax, heat_map), "", _heat_map_size([heat_map]))
    return drawing_svg(drawing, prefix)


def drawing_svg(drawing: Drawing, prefix: str) -> str:
    """A drawing as an `<svg>` element; see `svg`."""
    with figures(svg_salt=prefix) as figure:
        canvas = figure(figsize=drawing.size, layout="constrained")
        drawing.draw(canvas.subplots())
        file = io.StringIO()
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _embedded(file.getvalue(), prefix)


def drawings_png(title: str, drawings: Sequence[Drawing]) -> bytes:
    """Drawings side by side as one PNG on white. Raises UserError as `svg`."""
    with figures() as figure:
        widths, heights = zip(*(drawing.size for drawing in drawings), strict=True)
        canvas = figure(figsize=(sum(widths), max(heights) + 0.4), layout="constrained", dpi=110)
        canvas.suptitle(title, fontsize=13, fontweight="bold", wrap=True)
        axes = canvas.subplots(1, len(drawings), squeeze=False, width_ratios=widths).flat
        for ax, drawing in zip(axes, drawings, strict=True):
            drawing.draw(ax)
        file = io.BytesIO()
        canvas.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def heat_maps_png(title: str, heat_maps: Sequence[HeatMap]) -> bytes:
    """Heat maps in a column as one PNG on white. Raises UserError as `svg`."""
    with figures() as figure:
        width, height = _heat_map_size(heat_maps)
        canvas = figure(figsize=(width, height * len(heat_maps) + 0.4), layout="constrained", dpi=110)
        canvas.suptitle(title, fontsize=14, fontweight="bold")
        axes = canvas.subplots(len(heat_maps), 1, squeeze=False).flat
        for ax, heat_map in zip(axes, heat_maps, strict=True):
            _heat(ax, heat_map)
        file = io.BytesIO()
        canvas.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _heat_map_size(heat_maps: Sequence[HeatMap]) -> tuple[float, float]:
    rows, columns = (max(len(getattr(each, axis)) for each in heat_maps) for axis in ("rows", "columns"))
    return max(PANEL_SIZE[0], 1.2 + 0.75 * columns), max(PANEL_SIZE[1], 1.0 + 0.42 * rows)


def _heat(ax: "Axes", heat_map: HeatMap) -> None:
    """Draws a cell for each value, labelled with the value."""
    ax.set_title(heat_map.title, loc="left")
    ax.pcolormesh(heat_map.values, cmap="Blues", vmin=0, vmax=1, edgecolor="white", linewidth=0.5)
    for (row, column), value in np.ndenumerate(heat_map.values):
        # Use fixed text colours, because cell colours do not change on a dark page.
        ink = "#ffffff" if value > 0.6 else "#08306b"
        text = f"{100 * value:.1f}"
        ax.text(column + 0.5, row + 0.5, text, color=ink, ha="center", va="center", fontsize=8.5)
    ax.set_xlabel(heat_map.column_label)
    ax.set_ylabel(heat_map.row_label)
    ax.set_xticks(np.arange(len(heat_map.columns)) + 0.5, heat_map.columns)
    ax.set_yticks(np.arange(len(heat_map.rows)) + 0.5, heat_map.rows)
    ax.grid(visible=False)


def _embedded(text: str, prefix: str) -> str:
    """Converts matplotlib's SVG to an element of a page, with the page's colours and unique identifiers."""
    # Remove the file's prologue, metadata and style, which the page replaces.
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r'\b(?:d|x|y)="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m.group()), text)
    names = {INK: "currentColor", GRID: "var(--grid)"}
    names |= {light: f"var(--c{i})" for i, (light, _) in enumerate(COLOURS)}
    text = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", lambda m: f"{m[1]}: {names.get(m[2], m[2])}", text)
    return text.replace("<svg", '<svg aria-hidden="true"', 1).strip()


def png(title: str, sections: Sequence[Section], look: Mapping[str, Style]) -> bytes:
    """The sections as one PNG on white, under the title and the groups' legend. Raises UserError as `svg`."""
    with figures() as figure:
        rows = [-(-len(section.panels) // COLUMNS) for section in sections]
        # Height in inches of the title with the legend, and of a section heading.
        legend_rows = -(-len(look) // (2 * COLUMNS))
        heights = [0.5 + 0.25 * legend_rows, *(0.35 + PANEL_SIZE[1] * count for count in rows)]
        canvas = figure(figsize=(COLUMNS * PANEL_SIZE[0], sum(heights)), layout="constrained", dpi=110)
        parts = canvas.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        parts[0].suptitle(title, fontsize=14, fontweight="bold")
        if look:
            handles = [_handle(style) for style in look.values()]
            labels = [_label(name) for name in look]
            parts[0].legend(handles, labels, loc="lower center", ncols=2 * COLUMNS, frameon=False)
        for part, section, count in zip(parts[1:], sections, rows, strict=True):
            part.suptitle(section.title, fontsize=12, fontweight="bold", x=0.01, ha="left")
            axes = part.subplots(count, COLUMNS, squeeze=False).flat
            for panel in section.panels:
                _draw(next(axes), panel, look)
            for empty in axes:
                empty.remove()
        file = io.BytesIO()
        canvas.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _draw(ax: "Axes", panel: Panel, look: Mapping[str, Style]) -> None:
    ax.set_title(panel.title, loc="left")
    if panel.x is None:
        _bars(ax, panel, look)
    else:
        _lines(ax, panel, look)


def _lines(ax: "Axes", panel: Panel, look: Mapping[str, Style]) -> None:
    """Draws each group's mean as a thick line, the range of its runs as a band, and the runs as thin
    lines."""
    for curve in panel.curves:
        style = look[curve.group]
        line = "--" if curve.dashed else "-"
        if len(curve.runs) > 1:
            for run in curve.runs:
                ax.plot(*thinned(run), line, color=style.ink, linewidth=0.7, alpha=0.5)
        x, mean, least, most = mean_and_range([thinned(run) for run in curve.runs])
        if len(curve.runs) > 1:
            ax.fill_between(x, least, most, color=style.ink, alpha=0.15, linewidth=0)
        every = max(1, len(x) // 6)
        ax.plot(
            x, mean, line, color=style.ink, linewidth=1.8, marker=style.marker, markersize=4, markevery=every
        )
    values = [y for curve in panel.curves for _, y in curve.runs]
    _vertical_scale(ax, panel, min(y.min() for y in values), max(y.max() for y in values))
    _horizontal_scale(ax, panel, max(x[-1] for curve in panel.curves for x, _ in curve.runs))
    if panel.kinds:
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], color=INK, linestyle=line) for line in ("-", "--")]
        ax.legend(handles, panel.kinds, loc="best", fontsize=8.5)


def _vertical_scale(ax: "Axes", panel: Panel, least: float, most: float) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    if panel.unit in ("share", "fraction"):
        top = 1.05 * most or 0.01
        ax.set_ylim(min(1.05 * least, -0.02 * top), top)
    if panel.unit == "share":
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    elif panel.unit == "log" and least > 0 and most > 10 * least:
        ax.set_yscale("log")
        # Use plain numbers: the default labels are formulas, which these settings do not parse.
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())


def _horizontal_scale(ax: "Axes", panel: Panel, most: float) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    unit, divisor = "step", 1.0
    if panel.x == "seconds":
        steps = (("seconds", 1.0), ("minutes", 60.0), ("hours", 3600.0))
        unit, divisor = next((s for s in reversed(steps) if most >= 2 * s[1]), steps[0])
        unit = f"training time, {unit}"
    ax.set_xlabel(unit)
    right = 1.03 * most or 1.0
    ax.set_xlim(-0.02 * right, right)
    # Place ticks at round numbers of the unit.
    ticks = np.array(MaxNLocator(5, steps=ROUND).tick_values(0, right / divisor)) * divisor
    ax.set_xticks(ticks[ticks <= right])
    thousands = panel.x == "steps" and most >= 1e4
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x / 1000:g}k" if thousands else f"{x / divisor:,g}")
    )


def _bars(ax: "Axes", panel: Panel, look: Mapping[str, Style]) -> None:
    """Draws a bar for each group's mean over its runs, and a point for each run."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for place, curve in enumerate(panel.curves):
        style, values = look[curve.group], single_values(curve)
        ax.barh(place, values.mean(), height=0.62, color=style.ink, alpha=0.75)
        if len(values) > 1:
            ax.plot(
                values,
                [place] * len(values),
                style.marker,
                color=style.ink,
                markeredgecolor=INK,
                markersize=4.5,
            )
        text = " " + value_text(values.mean(), panel.unit)
        ax.annotate(text, (values.max(), place), xytext=(4, 0), textcoords="offset points", va="center")
    size = min(9.5, 95 / len(panel.curves))
    ax.set_yticks(range(len(panel.curves)), [_label(curve.group) for curve in panel.curves], fontsize=size)
    # Put the first bar at the top; a single bar must not fill the panel.
    middle, half = (len(panel.curves) - 1) / 2, max(3, len(panel.curves)) / 2
    ax.set_ylim(middle + half, middle - half)
    ax.set_xlim(0, 1.35 * max(single_values(curve).max() for curve in panel.curves) or 1)
    ax.xaxis.set_major_locator(MaxNLocator(4, steps=ROUND))
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: value_text(value, panel.unit) if value else "0")
    )
    ax.grid(axis="y", visible=False)


def _handle(style: Style) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=style.ink, marker=style.marker, linewidth=1.8, markersize=5)


def _label(name: str) -> str:
    """A name of at most LONGEST_LABEL characters; the middle of a longer one is removed."""
    half = LONGEST_LABEL // 2
    return name if len(name) <= LONGEST_LABEL else f"{name[:half]}…{name[1 - half :]}"
