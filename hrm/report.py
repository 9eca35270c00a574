"""Reports on runs: `python -m hrm.report RUN... [--output DIR]` plots one run, or compares several.

A report is a self-contained page, report.html, and an image of the same plots, report.png.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from hrm.common.errors import run_command
from hrm.common.tables import Table
from hrm.common.text import printable
from hrm.config.load import load_config
from hrm.config.messages import ConfigError
from hrm.study.history import History, read_histories
from hrm.study.html import write_report
from hrm.study.panels import duration, value_text
from hrm.training.health import Symptoms

# Keys that differ between runs but do not affect training.
_ALONE = {"run_name", "project_name", "output_dir", "resume"}


def summary(runs: Sequence[History]) -> Table:
    """A row for each run: last and best evaluation, steps, time, parameters."""
    columns = ["run", "steps", "exact, last", "exact, best", "at step"]
    averaged = any(len(run.evaluation(ema=True)[0]) for run in runs)
    columns += ["EMA, last", "EMA, best"] * averaged
    columns += ["time per step", "training time", "parameters"]
    rows = []
    for run in runs:
        steps, values = run.evaluation()
        last, best, at = _last_and_best(steps, values)
        row = [run.name, f"{run.last_step:,}", last, best, at]
        row += list(_last_and_best(*run.evaluation(ema=True))[:2]) * averaged
        seconds = run.seconds_per_step
        parameters = "-" if run.parameters is None else f"{run.parameters:,}"
        rows.append([*row, duration(seconds), duration(seconds * run.last_step), parameters])
    note = "Exact: test puzzles solved exactly. Training time: steps times the median time per step."
    return Table("Runs", columns, rows, note)


def _last_and_best(steps: np.ndarray, values: np.ndarray) -> tuple[str, str, str]:
    if not np.isfinite(values).any():
        return "-", "-", "-"
    best = int(np.nanargmax(values))
    return value_text(values[-1], "share"), value_text(values[best], "share"), f"{steps[best]:,}"


def differences(runs: Sequence[History]) -> Table | None:
    """The keys in which the runs' configurations differ; None without differences."""
    flat = [dict(_flat(run.config)) for run in runs if run.config is not None]
    if len(flat) < len(runs):
        return None
    names = sorted({name for keys in flat for name in keys} - _ALONE)
    rows = [[name, *(keys.get(name, "-") for keys in flat)] for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return Table("What differs", ["key", *(run.name for run in runs)], rows) if rows else None


def _flat(config: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            # Format values as a user types them: null, true, 0.1.
            yield printable(prefix + name), printable(value if isinstance(value, str) else json.dumps(value))


def symptoms(run: History) -> list[str]:
    """Warnings about the run; empty for a run without a configuration."""
    if run.config is None:
        return []
    try:
        config = load_config(run.folder / "config.yaml")
    except ConfigError as error:
        return [f"no check for symptoms: {error}"]
    # Without a logged length, use the configured one, or assume that the run has ended.
    check = Symptoms(config, run.total_steps or config.max_steps or run.last_step).check
    lines: dict[int, dict[str, float]] = {}
    for key in run.metrics:
        for step, value in zip(*run.series(key), strict=True):
            lines.setdefault(int(step), {})[key] = float(value)
    return [text for step in sorted(lines) for text in check(step, lines[step])]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status; see `run_command`."""
    return run_command(lambda: report(*_parse(argv)), "no report was written")


def _parse(argv: Sequence[str] | None) -> tuple[list[str], Path | None]:
    parser = argparse.ArgumentParser(
        prog="python -m hrm.report", description="Plot one run, or compare several."
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's folder, finished or still in training"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="output folder (default: the run's folder, or ./report for several runs)",
    )
    args = parser.parse_args(argv)
    return args.runs, args.output


def report(folders: Sequence[str], output: Path | None) -> None:
    """Prints a table of the runs in these folders and writes the report to `output`."""
    runs = read_histories(folders)
    overview, differ = summary(runs), differences(runs)
    notes = [f"{run.name}: {text}" if len(runs) > 1 else text for run in runs for text in symptoms(run)]
    print(overview.text())
    for note in notes:
        print(f"note: {note}")
    folder = output or (runs[0].folder if len(runs) == 1 else Path("report"))
    title = " and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    tables = [overview, *([differ] if differ else [])]
    for path in write_report(folder, title, {run.name: [run] for run in runs}, tables, notes):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
