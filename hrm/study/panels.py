"""The panels of reports, their curves, and a text description of each."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hrm.study.history import History, Series

Groups = Mapping[str, Sequence[History]]
Read = Callable[[History], Series]
# share: percent. fraction: 0 to 1, with an axis from 0. log: positive, on a logarithmic axis for wide ranges.
Unit = Literal["number", "share", "fraction", "seconds", "log"]

# Maximum number of points in a curve; longer curves show means of neighbours.
MOST_DRAWN = 400


@dataclass(frozen=True)
class Curve:
    """The runs of a group in a panel: (steps or seconds, values) of each. dashed: the panel's second kind."""

    group: str
    runs: list[Series]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """A plot. x: the horizontal axis of its curves; None for a bar chart of single values.

    kinds: names of the solid and the dashed curves.
    """

    title: str
    curves: list[Curve]
    unit: Unit = "number"
    x: Literal["steps", "seconds"] | None = "steps"
    kinds: tuple[str, str] | None = None


@dataclass(frozen=True)
class Section:
    """Panels under one heading."""

    title: str
    text: str
    panels: list[Panel]


# ------------------------------------------------------------------------------------- what there is to draw


def sections(groups: Groups) -> list[Section]:
    """All sections and panels with data."""
    found = [
        Section(
            "Learning",
            "Test puzzles solved exactly, and tokens right. Training time is steps times the "
            "median time per step, without evaluation and saving.",
            _learning(groups),
        ),
        Section(
            "Computation",
            "ACT steps taken until a sequence halts, in training; seconds per training step, the median of "
            "each run as a point and their mean as a bar.",
            _computation(groups),
        ),
        Section(
            "Gate activity",
            "Mean gate values by module and source: 0 blocks a source, 1 passes it unchanged.",
            _gates(groups, "fraction", "mean"),
        ),
        Section(
            "Gate saturation",
            "Share of saturated gates, nearly closed or open, whose gradient vanishes.",
            _gates(groups, "share", "low", "high", ("below 0.1", "above 0.9")),
        ),
        Section(
            "Gate contribution",
            "Each source's share, by magnitude, of its module's input after gating.",
            _gates(groups, "share", "contribution"),
        ),
        Section(
            "Gate losses",
            "The auxiliary gate losses, before weighting.",
            _plain(groups, {f"train/gate_{name}_loss": f"Gate {name}" for name in _GATE_LOSSES}),
        ),
        Section(
            "Subgoals",
            "The manager's goals, and how closely the worker follows them.",
            _plain(groups, _FEUDAL),
        ),
    ]
    return [section for section in found if section.panels]


_GATE_LOSSES = ("saturation", "entropy", "stability")
_FEUDAL = {
    "train/feudal_loss": "Feudal loss",
    "train/goal_alignment": "Worker and goal: cosine",
    "train/goal_updates": "Goal updates",
    "train/goal_gate_mean": "Goal gate, mean",
    "train/goal_gate_std": "Goal gate, deviation",
    "train/goal_norm": "Goal norm",
}
_SOURCES = ("primary", "secondary", "input")


def _learning(groups: Groups) -> list[Panel]:
    exact: Read = History.evaluation
    panels = [
        Panel("Exact accuracy by step", _curves(groups, exact), "share"),
        Panel("Exact accuracy by training time", _curves(groups, _timed(exact)), "share", "seconds"),
        Panel("Tokens right by step", _curves(groups, lambda run: run.evaluation("accuracy")), "share"),
        Panel("Training loss", _curves(groups, _key("train/loss")), "log"),
        Panel("Gradient norm", _curves(groups, _key("train/grad_norm")), "log"),
    ]
    if averaged := _curves(groups, lambda run: run.evaluation(ema=True), dashed=True):
        names = {curve.group for curve in averaged}
        raw = [curve for curve in panels[0].curves if curve.group in names]
        kinds = ("weights", "averaged weights (EMA)")
        panels.insert(2, Panel("Exact accuracy, raw and averaged", raw + averaged, "share", kinds=kinds))
    return _with_data(panels)


def _computation(groups: Groups) -> list[Panel]:
    return _with_data(
        [
            Panel("ACT steps used", _curves(groups, _key("train/steps"))),
            Panel(
                "Time per step", _curves(groups, _single(lambda run: run.seconds_per_step)), "seconds", None
            ),
            Panel("Parameters", _curves(groups, _single(lambda run: run.parameters)), "number", None),
        ]
    )


def _gates(
    groups: Groups, unit: Unit, value: str, second: str | None = None, kinds: tuple[str, str] | None = None
) -> list[Panel]:
    """A panel per module and source of the gated groups, L before H, in the order of the sources."""
    keys = {key for runs in groups.values() for run in runs for key in run.metrics}
    found = [m.groups() for key in keys if (m := re.fullmatch(rf"train/gates/([^/]+)/([^/]+)/{value}", key))]
    place = {name: i for i, name in enumerate(("L", "H", *_SOURCES))}
    panels = []
    for module, source in sorted(found, key=lambda pair: [(place.get(name, 9), name) for name in pair]):
        prefix = f"train/gates/{module}/{source}"
        curves = _curves(groups, _key(f"{prefix}/{value}"))
        if second is not None:
            curves += _curves(groups, _key(f"{prefix}/{second}"), dashed=True)
        panels.append(Panel(f"{module} module, {source}", curves, unit, kinds=kinds))
    return _with_data(panels)


def _plain(groups: Groups, keys: Mapping[str, str]) -> list[Panel]:
    return _with_data([Panel(title, _curves(groups, _key(key))) for key, title in keys.items()])


def _with_data(panels: Sequence[Panel]) -> list[Panel]:
    return [panel for panel in panels if panel.curves]


def _curves(groups: Groups, read: Read, dashed: bool = False) -> list[Curve]:
    """A curve per group with data: the finite points of its runs."""
    curves = []
    for group, runs in groups.items():
        series = [(x[finite], y[finite]) for x, y in map(read, runs) if (finite := np.isfinite(x + y)).any()]
        if series:
            curves.append(Curve(group, series, dashed))
    return curves


def _key(key: str) -> Read:
    return lambda run: run.series(key)


def _timed(read: Read) -> Read:
    def timed(run: History) -> Series:
        steps, values = read(run)
        return steps * run.seconds_per_step, values

    return timed


def _single(value: Callable[[History], float | None]) -> Read:
    def single(run: History) -> Series:
        found = value(run)
        return np.zeros(1), np.array([float("nan") if found is None else found], np.float64)

    return single


def mean_and_range(runs: Sequence[Series]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, mean, minimum and maximum over runs, each (n,), for the range in which all runs have data.

    x: the union of the runs' x from the latest start to the earliest end; runs are interpolated linearly.
    """
    first, last = max(x[0] for x, _ in runs), min(x[-1] for x, _ in runs)
    x = np.unique(np.concatenate([x for x, _ in runs]))
    x = x[(x >= first) & (x <= last)]
    values = np.stack([np.interp(x, *run) for run in runs])
    return x, values.mean(axis=0), values.min(axis=0), values.max(axis=0)


def single_values(curve: Curve) -> np.ndarray:
    """The values of the runs in a bar chart: (runs,)."""
    return np.array([values[0] for _, values in curve.runs])


def thinned(series: Series) -> Series:
    """Reduces a curve to at most MOST_DRAWN points, by means over equal numbers of neighbours."""
    x, y = series
    if len(x) <= MOST_DRAWN:
        return series
    parts = np.linspace(0, len(x), MOST_DRAWN + 1).astype(int)[:-1]
    sizes = np.diff(np.append(parts, len(x)))
    return np.add.reduceat(x, parts) / sizes, np.add.reduceat(y, parts) / sizes


# ------------------------------------------------------------------------------------------------- in words


def value_text(value: float, unit: Unit) -> str:
    """Formats a value in a readable unit: 93.1 %, 105 ms, 27.3 M."""
    if not np.isfinite(value):
        return "-"
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit == "seconds":
        return duration(value)
    for size, suffix in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{value / (1e3 if size == 1e4 else size):.3g}{suffix}"
    return f"{value:,.0f}" if value == int(value) else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Formats seconds in a readable unit."""
    if not np.isfinite(seconds):
        return "-"
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def description(panel: Panel) -> str:
    """Describes a panel for screen readers: start and end of each curve."""
    parts = []
    for curve in panel.curves:
        kind = f" ({panel.kinds[curve.dashed]})" if panel.kinds else ""
        if panel.x is None:
            words = value_text(float(single_values(curve).mean()), panel.unit)
        else:
            x, mean, *_ = mean_and_range(curve.runs)
            if not len(x):
                continue
            at = duration(float(x[-1])) if panel.x == "seconds" else f"step {x[-1]:,.0f}"
            words = f"from {value_text(mean[0], panel.unit)} to {value_text(mean[-1], panel.unit)} at {at}"
        parts.append(f"{curve.group}{kind} {words}")
    return f"{panel.title}: {'; '.join(parts)}."
