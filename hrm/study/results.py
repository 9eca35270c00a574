"""Results of finished runs by candidate: scores at equal steps and at equal time, and speed.

Scores between two evaluations are interpolated linearly. Differences are paired: a run's score minus the
baseline's score with the same seed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hrm.common.tables import Table
from hrm.study.history import History, Series
from hrm.study.panels import duration
from hrm.study.statistics import paired_difference, summarise

Runs = Mapping[int, History]
Scores = dict[int, float]

MAIN = "exact_accuracy"
METRICS = (MAIN, "accuracy", "q_halt_accuracy")
# Shares of the baseline's last score, as targets for the speed of learning.
SHARES = {"half": 0.5, "90 %": 0.9}


@dataclass(frozen=True)
class Entry:
    """A candidate's runs by seed, with the scores of the last weights or, with ema, of their moving
    average."""

    candidate: str
    runs: Runs
    ema: bool = False

    @property
    def name(self) -> str:
        """The name in tables."""
        return f"{self.candidate} (EMA)" if self.ema else self.candidate

    @property
    def averages(self) -> bool:
        """Whether the runs also evaluated averaged weights."""
        return any(len(run.evaluation(MAIN, ema=True)[0]) for run in self.runs.values())

    def at_step(self, metric: str, step: float) -> Scores:
        """Scores by seed at a step."""
        return {seed: score_at(run.evaluation(metric, self.ema), step) for seed, run in self.runs.items()}

    def at_time(self, seconds: float) -> Scores:
        """Exact accuracy by seed after seconds of training."""
        return {seed: score_at(self._over_time(run), seconds) for seed, run in self.runs.items()}

    def steps_to(self, aim: float) -> Scores:
        """Steps by seed until the exact accuracy reaches `aim`."""
        return {seed: first_reaching(run.evaluation(MAIN, self.ema), aim) for seed, run in self.runs.items()}

    def seconds_to(self, aim: float) -> Scores:
        """Seconds of training by seed until the exact accuracy reaches `aim`."""
        return {seed: first_reaching(self._over_time(run), aim) for seed, run in self.runs.items()}

    def _over_time(self, run: History) -> Series:
        steps, values = run.evaluation(MAIN, self.ema)
        return steps * run.seconds_per_step, values


def compare_runs(candidates: Mapping[str, Runs], baseline: str) -> dict[str, Any]:
    """Results as JSON values from runs by candidate and seed, each evaluated at least once.

    equal_steps: the last step that the evaluations of every run reach. equal_seconds: the shortest training
    time of a run, in seconds; training time is steps times the median seconds per step, so it excludes
    evaluation, saving and compilation. Averaged weights have a separate entry, compared with the baseline's
    averaged weights if there are any. An entry without runs has no scores.
    """
    plain = [Entry(name, runs) for name, runs in candidates.items()]
    base = next(entry for entry in plain if entry.candidate == baseline)
    runs = [run for entry in plain for run in entry.runs.values()]
    step = min((int(run.evaluation()[0][-1]) for run in runs), default=0)
    times = [int(run.evaluation()[0][-1]) * run.seconds_per_step for run in runs]
    seconds = min(filter(math.isfinite, times), default=math.nan)
    last = base.at_step(MAIN, step)
    aims = {share: part * math.fsum(last.values()) / len(last) for share, part in SHARES.items() if last}
    entries = {}
    for entry in [*plain, *(Entry(e.candidate, e.runs, ema=True) for e in plain if e.averages)]:
        # The baseline has no difference; its average is compared with its last weights.
        other = Entry(baseline, base.runs if entry.name != baseline else {}, ema=False)
        if base.averages and entry.ema and entry.candidate != baseline:
            other = Entry(baseline, base.runs, ema=True)
        entries[entry.name] = {
            "candidate": entry.candidate,
            "ema": entry.ema,
            "seeds": list(entry.runs),
            "parameters": next((run.parameters for run in entry.runs.values()), None),
            "seconds_per_step": _stats({seed: run.seconds_per_step for seed, run in entry.runs.items()}),
            "act_steps": _stats(
                {seed: _last(run.series("train/steps"), step) for seed, run in entry.runs.items()}
            ),
            "equal_steps": {
                metric: _compared(entry.at_step(metric, step), other.at_step(metric, step))
                for metric in METRICS
            },
            "equal_time": {
                "steps": _stats({seed: seconds / run.seconds_per_step for seed, run in entry.runs.items()}),
                MAIN: _compared(entry.at_time(seconds), other.at_time(seconds)),
            },
            "reached": {
                share: {
                    "steps": _compared(entry.steps_to(aim), other.steps_to(aim)),
                    "seconds": _compared(entry.seconds_to(aim), other.seconds_to(aim)),
                }
                for share, aim in aims.items()
                if aim > 0
            },
        }
    return {
        "baseline": baseline,
        "equal_steps": step,
        "equal_seconds": seconds,
        "aims": {share: aim for share, aim in aims.items() if aim > 0},
        "entries": entries,
    }


def score_at(series: Series, where: float) -> float:
    """A score at a step or time, interpolated linearly between evaluations; NaN before the first.

    series: ascending steps or times (n,), and values (n,).
    """
    places, values = series
    return float(np.interp(where, places, values, left=math.nan, right=math.nan)) if len(places) else math.nan


def first_reaching(series: Series, aim: float) -> float:
    """The step or time at which a score first reaches `aim`, interpolated linearly; NaN if it never does.

    series: ascending steps or times (n,), and values (n,). Returns that of the first evaluation if it already
    reaches the aim.
    """
    places, values = series
    found = np.flatnonzero(values >= aim)
    if not len(found):
        return math.nan
    after = int(found[0])
    if after == 0 or not math.isfinite(values[after - 1]):
        return float(places[after])
    share = (aim - values[after - 1]) / (values[after] - values[after - 1])
    return float(places[after - 1] + share * (places[after] - places[after - 1]))


def tables(results: Mapping[str, Any]) -> list[Table]:
    """The results as tables: equal steps, equal time, pace, and the steps and time to each aim."""
    entries, against = results["entries"], f"to {results['baseline']}"
    at_steps = Table(
        f"Equal steps: after {results['equal_steps']:,}",
        ["", "seeds", "solved", against, "cells right", "halting right", "ACT steps"],
        [
            [
                name,
                str(len(entry["seeds"])),
                _percent(entry["equal_steps"][MAIN]),
                _points(entry["equal_steps"][MAIN]["difference"]),
                *(_percent(entry["equal_steps"][metric]) for metric in METRICS[1:]),
                _mean(entry["act_steps"], "{:.1f}"),
            ]
            for name, entry in entries.items()
        ],
        "Solved: test puzzles right in every cell, mean over the seeds ± sample deviation. Differences are "
        "in percentage points, paired by seed, with their 95 % t interval. ACT steps: in training.",
    )
    at_time = Table(
        f"Equal training time: {duration(results['equal_seconds'])}",
        ["", "steps by then", "solved", against],
        [
            [
                name,
                _mean(entry["equal_time"]["steps"], "{:,.0f}"),
                _percent(entry["equal_time"][MAIN]),
                _points(entry["equal_time"][MAIN]["difference"]),
            ]
            for name, entry in entries.items()
        ],
        "Training time: a run's steps times its median seconds per step, without evaluation, saving and "
        "compilation. The compared time is that of the fastest run. Scores are interpolated "
        "linearly.",
    )
    own = entries[results["baseline"]]["seconds_per_step"]["mean"]
    pace = Table(
        "Size and pace",
        ["", "parameters", "time per step", f"x {results['baseline']}"],
        [
            [
                name,
                "-" if entry["parameters"] is None else f"{entry['parameters']:,}",
                _time(entry["seconds_per_step"]["mean"]),
                _ratio(entry["seconds_per_step"]["mean"], own),
            ]
            for name, entry in entries.items()
            if not entry["ema"]
        ],
        "Time per step: the median of a run, its mean over the seeds.",
    )
    return [at_steps, at_time, pace, *(_to_aim(results, share) for share in results["aims"])]


def _to_aim(results: Mapping[str, Any], share: str) -> Table:
    entries, baseline = results["entries"], results["baseline"]
    own = entries[baseline]["reached"][share]
    rows = []
    for name, entry in entries.items():
        steps, seconds = entry["reached"][share]["steps"], entry["reached"][share]["seconds"]
        there = sum(score is not None for score in steps["scores"].values())
        rows.append(
            [
                name,
                f"{there} of {len(entry['seeds'])}",
                _mean(steps, "{:,.0f}"),
                _relative(steps["difference"], own["steps"]["mean"]),
                _time(seconds["mean"]),
                _relative(seconds["difference"], own["seconds"]["mean"]),
            ]
        )
    return Table(
        f"Until {100 * results['aims'][share]:.1f} % are solved: {share} of {baseline}'s at equal steps",
        ["", "seeds there", "steps", f"to {baseline}", "training time", f"to {baseline}"],
        rows,
        "Means over the seeds that reach it; differences over the seeds that reach it in both, in percent of "
        f"{baseline}'s mean. Interpolated linearly between evaluations, from the first on.",
    )


def cautions(results: Mapping[str, Any]) -> list[str]:
    """Notes of one or two sentences on the interpretation of the tables."""
    entries, baseline = results["entries"], results["baseline"]
    most = max(len(entry["seeds"]) for entry in entries.values())
    found = []
    if most == 1:
        found.append("With one seed, a difference may be chance, so there is no interval.")
    if most > 1 and len(entries) > 2:
        found.append(
            f"{len(entries) - 1} comparisons: a 95 % interval misses the true value once in twenty times, so "
            "a single clear difference among many may be chance."
        )
    if not results["aims"]:
        found.append(f"{baseline} solves no test puzzle, so the time to reach its score is unknown.")
    if any(entry["ema"] for entry in entries.values()):
        found.append("EMA: the same runs, evaluated with the moving average of their weights.")
    return found


def _last(series: Series, step: float) -> float:
    """The last finite value at or before a step."""
    values = series[1][(series[0] <= step) & np.isfinite(series[1])]
    return float(values[-1]) if len(values) else math.nan


def _stats(scores: Scores) -> dict[str, Any]:
    """Scores by seed (null if missing), their mean and sample deviation."""
    known = _finite(scores)
    summary = summarise(list(known.values())) if known else None
    return {
        "scores": {str(seed): known.get(seed) for seed in scores},
        "mean": summary.mean if summary else None,
        "deviation": summary.deviation if summary else None,
    }


def _compared(scores: Scores, other: Scores) -> dict[str, Any]:
    """`_stats` with the paired difference from the baseline; null without a common seed."""
    summary = paired_difference(_finite(scores), _finite(other))
    difference = None
    if summary is not None:
        difference = {
            "n": summary.n,
            "mean": summary.mean,
            "deviation": summary.deviation,
            "interval": None if summary.interval is None else list(summary.interval),
            "clear": summary.clear,
        }
    return {**_stats(scores), "difference": difference}


def _finite(scores: Scores) -> Scores:
    return {seed: score for seed, score in scores.items() if math.isfinite(score)}


def _points(difference: Mapping[str, Any] | None) -> str:
    return _difference(difference, 100, "")


def _relative(difference: Mapping[str, Any] | None, whole: float | None) -> str:
    return _difference(difference, 100 / whole, " %") if whole else "-"


def _difference(difference: Mapping[str, Any] | None, factor: float, unit: str) -> str:
    """Formats a paired difference: mean, interval, and whether the difference is clear."""
    if difference is None:
        return "-"
    mean = f"{factor * difference['mean']:+.1f}{unit}"
    if difference["interval"] is None:
        return f"{mean} (one seed)"
    low, high = (factor * end for end in difference["interval"])
    verdict = "" if difference["clear"] else ", no clear difference"
    return f"{mean} [{low:+.1f}, {high:+.1f}]{verdict}"


def _percent(stats: Mapping[str, Any]) -> str:
    if stats["mean"] is None:
        return "-"
    spread = "" if stats["deviation"] is None else f" ± {100 * stats['deviation']:.1f}"
    return f"{100 * stats['mean']:.1f} %{spread}"


def _mean(stats: Mapping[str, Any], form: str) -> str:
    return "-" if stats["mean"] is None else form.format(stats["mean"])


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else duration(seconds)


def _ratio(value: float | None, whole: float | None) -> str:
    return f"{value / whole:.2f}" if value is not None and whole else "-"
