"""Reads a run's metrics, as series over steps, and its configuration from its folder."""

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]

from hrm.common.errors import UserError
from hrm.common.files import open_bounded, read_text
from hrm.common.text import printable
from hrm.training.run_folder import LONGEST_LINE, METRICS

# Memory limits: metrics per file, points per metric, bytes of a configuration (usually 3,000).
MOST_METRICS = 2**10
MOST_POINTS = 2**16
CONFIG_LIMIT = 2**17
LONGEST_NAME = 200

Series = tuple[np.ndarray, np.ndarray]
_EMPTY: Series = (np.empty(0, np.int64), np.empty(0))


@dataclass(frozen=True, eq=False)
class History:
    """The metrics and configuration of a run, finished or not.

    name: in reports. config: the nested values of config.yaml, or None. last_step: the last step in
    metrics.jsonl. metrics: ascending steps (n,) int64 and values (n,) float64 of each key.
    """

    name: str
    folder: Path
    config: dict[str, Any] | None
    last_step: int
    metrics: Mapping[str, Series] = field(repr=False)

    def keys(self) -> list[str]:
        """The metrics' names, in alphabetical order."""
        return sorted(self.metrics)

    def series(self, key: str) -> Series:
        """Steps (n,) int64, ascending, and values (n,) float64 of a metric; empty if it was never logged.

        null, which replaces a value that is not finite, becomes NaN.
        """
        return self.metrics.get(key, _EMPTY)

    @property
    def seconds_per_step(self) -> float:
        """Median of train/seconds_per_step, in seconds; NaN without a value. The first interval may include
        compilation."""
        values = self.series("train/seconds_per_step")[1]
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else float("nan")

    @property
    def parameters(self) -> int | None:
        """The number of the model's parameters; None if the run did not log it."""
        return self._count("model/parameters")

    @property
    def total_steps(self) -> int | None:
        """The planned number of steps; None if the run did not log it."""
        return self._count("run/total_steps")

    def _count(self, key: str) -> int | None:
        values = self.series(key)[1]
        return int(values[-1]) if len(values) and np.isfinite(values[-1]) else None

    @property
    def eval_sets(self) -> list[str]:
        """The test sets' names, in alphabetical order."""
        parts = [key.removeprefix("eval/").rpartition("/")[0] for key in self.metrics if _is_eval(key)]
        return sorted(set(parts))

    def evaluation(self, metric: str = "exact_accuracy", ema: bool = False) -> Series:
        """Steps (n,) and values (n,) of a test metric: its mean over the test sets, weighted by their counts.

        ema: of the averaged weights. A set without a count weighs 1. Empty if it was never logged.
        """
        prefix = "eval_ema" if ema else "eval"
        totals: dict[int, tuple[float, float]] = {}
        for name in self.eval_sets:
            counts = dict(zip(*self.series(f"{prefix}/{name}/count"), strict=True))
            for step, value in zip(*self.series(f"{prefix}/{name}/{metric}"), strict=True):
                # Python floats overflow without a warning.
                weight = float(counts.get(step, 1.0))
                total, weights = totals.get(int(step), (0.0, 0.0))
                totals[int(step)] = (total + weight * float(value), weights + weight)
        means = [total / weight if weight else float("nan") for total, weight in totals.values()]
        steps = np.array(list(totals), np.int64)
        order = np.argsort(steps)
        return steps[order], np.array(means, np.float64)[order]


def read_history(folder: str | Path, name: str | None = None) -> History:
    """The history of the run in `folder`, finished or not.

    name: in reports; None for the folder's name. Unprintable characters are escaped. A last line without a
    newline is incomplete and skipped. The later of two values for a key and step is used. Memory is limited:
    a metric with more than 65,536 points keeps every second, fourth, ... point and the last. Raises UserError
    if there is no run, or for invalid contents.
    """
    folder = Path(folder)
    path = folder / METRICS
    if not path.is_file():
        raise UserError(f"{folder}: no {METRICS} there; {_where_runs_are(folder)}")
    points: dict[str, _Points] = {}
    last_step = 0
    for number, line in _objects(path):
        step = line.pop("step")
        last_step = max(last_step, step)
        for key, value in line.items():
            if value is None or isinstance(value, int | float):
                if key not in points:
                    if len(points) == MOST_METRICS:
                        raise _damaged(path, number, f"is past {MOST_METRICS:,} metrics, more than a run has")
                    if len(key) > LONGEST_NAME or not key.isprintable():
                        raise _damaged(path, number, f"has no metric's name in {printable(key[:40])!r}")
                    points[key] = _Points()
                points[key].add(step, _number(value))
    metrics = {key: found.series() for key, found in points.items()}
    config = _config(folder / "config.yaml")
    return History(printable(name or folder.resolve().name), folder, config, last_step, metrics)


def read_histories(folders: Sequence[str | Path]) -> list[History]:
    """The different runs in these folders, with unique names.

    A run's name is the shortest unique end of its path.
    Raises UserError as `read_history` does.
    """
    paths = {Path(folder).resolve(): folder for folder in folders}
    return [
        read_history(folder, name)
        for folder, name in zip(paths.values(), _short_names(list(paths)), strict=True)
    ]


class _Points:
    """The points of a metric in arrays; beyond MOST_POINTS it drops every second point except the last."""

    def __init__(self) -> None:
        self.steps, self.values = array("q"), array("d")
        self.seen, self.stride = 0, 1
        self.left_out: tuple[int, float] | None = None

    def add(self, step: int, value: float) -> None:
        self.left_out = (step, value) if self.seen % self.stride else None
        self.seen += 1
        if self.left_out is not None:
            return
        self.steps.append(step)
        self.values.append(value)
        # MOST_POINTS is even, so the newest point stays.
        if len(self.steps) > MOST_POINTS:
            self.steps, self.values = self.steps[::2], self.values[::2]
            self.stride *= 2

    def series(self) -> Series:
        last = [] if self.left_out is None else [self.left_out]
        steps = np.array([*self.steps, *(step for step, _ in last)], np.int64)
        values = np.array([*self.values, *(value for _, value in last)], np.float64)
        # np.unique keeps the first of equal steps; in reverse order this is the last.
        steps, first = np.unique(steps[::-1], return_index=True)
        return steps, values[::-1][first]


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The numbered lines of a metrics file: JSON objects with a step."""
    with open_bounded(path) as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise _damaged(path, number, "is too long to be one of a run")
            if not line.endswith(b"\n"):
                return
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                raise _damaged(path, number, "is not JSON") from None
            if not isinstance(found, dict):
                raise _damaged(path, number, "is not a JSON object")
            step = found.get("step")
            if type(step) is not int or not 0 <= step < 2**63:
                raise _damaged(path, number, "has no step")
            yield number, found


def _number(value: float | None) -> float:
    try:
        return float("nan") if value is None else float(value)
    except OverflowError:
        return float("inf")


def _damaged(path: Path, number: int, what: str) -> UserError:
    return UserError(f"{path} line {number} {what}; give another run, or a copy of this one without the line")


def _config(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    text = read_text(path, CONFIG_LIMIT, "a run's configuration; restore it, or give another run")
    try:
        # A SafeLoader that also refuses aliases.
        found = yaml.load(text, _Loader)  # noqa: S506
    # Invalid numbers, tags and escapes raise errors of many types.
    except Exception:
        found = None
    if not isinstance(found, dict) or not _is_plain(found):
        raise UserError(f"{path}: not a run's configuration in YAML; restore it, or give another run")
    return found


class _Loader(yaml.SafeLoader):
    """A SafeLoader that rejects aliases, because nested aliases can exhaust memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def _is_plain(value: Any) -> bool:
    """Whether a value fits into JSON: keys are strings, integers have 64 bits."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 2**63)


def _where_runs_are(folder: Path) -> str:
    """The remedy for a folder without a run: a run in a subfolder, if there is one."""
    if not folder.is_dir():
        return "give the folder of a run, such as checkpoints/sudoku-4x4/gated"
    inside = next(
        (path.parent for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}/{METRICS}")), None
    )
    return f"give a run's folder, such as {inside or 'checkpoints/sudoku-4x4/gated'}"


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest end of each path that makes it unique."""
    lengths = [1] * len(paths)
    while True:
        names = ["/".join(path.parts[-length:]) for path, length in zip(paths, lengths, strict=True)]
        shared = [names.count(name) > 1 for name in names]
        if not any(shared):
            return names
        lengths = [length + more for length, more in zip(lengths, shared, strict=True)]


def _is_eval(key: str) -> bool:
    return key.startswith("eval/") and key.count("/") > 1
