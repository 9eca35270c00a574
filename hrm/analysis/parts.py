"""Sections on what the parts of a model contribute: cycles, levels, gates, goals."""

from typing import Any

import numpy as np

from hrm.analysis import figures
from hrm.analysis.finding import Finding
from hrm.analysis.robustness import own_answers
from hrm.analysis.statistics import change_of, mean_of, number, percent, points, share_of
from hrm.analysis.study import Study
from hrm.analysis.variants import removable
from hrm.common.tables import Table

# The gates in the order of a record's last axis.
GATES = tuple(f"{level}, {source}" for level in "LH" for source in ("primary", "secondary", "input"))[:5]

MEANINGS = {
    "1 H-cycle": "one H-update in an ACT step, after one round of L-updates",
    "1 L-cycle": "one L-update before each H-update",
    "H frozen": "L never sees a change of z_H; H only reads the answer out",
    "L frozen": "H works alone, and z_L stays where it starts",
    "no goals": "the subgoals bias nothing",
}


def contributions(study: Study) -> Finding:
    """Accuracy without some cycles, without a level, and in one ACT step."""
    record, own, arch = study.record("parts"), own_answers(study), study.trained.model.arch
    deep = study.record("deep")["predictions"]
    answers = {"as trained": own, "1 ACT step": study.examples.right(deep[:, 0])}
    meanings = {"as trained": "", "1 ACT step": "the first step's answer", **MEANINGS}
    for name, predictions in zip(record["names"].tolist(), record["predictions"], strict=True):
        answers[name] = study.examples.right(predictions)
    rows, numbers = [], dict[str, Any]()
    for name, right in answers.items():
        change = change_of(own, right)
        against = "-" if name == "as trained" else points(change)
        rows.append([name, percent(share_of(right)), against, meanings[name]])
        numbers[name] = {"exact": share_of(right)._asdict(), "change": change._asdict()}
    losses = {name: change_of(own, right) for name, right in answers.items() if name != "as trained"}
    ordered = sorted(losses, key=lambda name: losses[name].value)
    sentence = (
        f"The whole model, with {arch.H_cycles} H-cycles of {arch.L_cycles} L-cycles in an ACT step, solves "
        f"{percent(share_of(own))} of the puzzles. Change of the accuracy by each cut, in points: "
        f"{', '.join(f'{name} {points(losses[name])}' for name in ordered)}."
    )
    table = Table(
        "Removed parts",
        ["model", "solved", "change in points", "meaning"],
        rows,
        "The weights are those of training, which saw no such cut; a model trained without the part may do "
        f"better. All cuts except '1 ACT step' keep the {study.steps} ACT steps, which may replace a cycle.",
    )
    drawing = figures.bars("Puzzles solved without a part", {n: share_of(r) for n, r in answers.items()})
    return Finding(sentence, table, [drawing], numbers)


def no_parts(study: Study) -> str:
    """Why no part can be removed."""
    return "" if removable(study.trained.model) else "the model has one update in an ACT step"


def gates(study: Study) -> Finding:
    """How far the gates of each module and source are open, by ACT step."""
    openings, M = study.record("deep")["gates"], study.steps
    right = own_answers(study)
    rows, numbers = [], dict[str, Any]()
    for place, name in enumerate(GATES):
        first, last = (mean_of(openings[:, step, place]) for step in (0, M - 1))
        by_answer = [mean_of(openings[mask, M - 1, place]) for mask in (right, ~right)]
        rows.append([name, *map(number, (first, last, *by_answer))])
        numbers[name] = {"first": first._asdict(), "last": last._asdict()}
        numbers[name] |= {"right": by_answer[0]._asdict(), "wrong": by_answer[1]._asdict()}
    means = openings[:, M - 1].mean(axis=0)
    told = []
    for level, own in (("L", slice(0, 3)), ("H", slice(3, 5))):
        best = own.start + int(means[own].argmax())
        widest = number(mean_of(openings[:, M - 1, best]))
        told.append(f"{level} opens widest to its {GATES[best][3:]} source ({widest})")
    before = openings[:, 0].mean(axis=0)
    most = int(np.abs(means - before).argmax())
    sentence = (
        f"In step {M} {' and '.join(told)}, where 1 passes a source unchanged. The mean gate "
        f"of {GATES[most]}, changes most: {before[most]:.3f} in step 1, {means[most]:.3f} in step {M}."
    )
    table = Table(
        "Mean gates",
        ["module, source", "step 1", f"step {M}", "right answers", "wrong answers"],
        rows,
        "A gate is a factor from 0 to 1 on one source of a module; the mean is over tokens and channels, in "
        f"the last update of a step. Right and wrong answers: in step {M}, by the answer after it. "
        "Primary: the module's own state; secondary: the other one's.",
    )
    x = list(range(1, M + 1))
    curves = {name: [mean_of(openings[:, s - 1, i]) for s in x] for i, name in enumerate(GATES)}
    return Finding(sentence, table, [figures.curves("Mean gates by step", x, curves)], numbers)


def no_gates(study: Study) -> str:
    """Why there are no gates to look at."""
    return "" if study.trained.model.arch.use_gating else "the model has no gates"


def goals(study: Study) -> Finding:
    """How far the gate of the subgoals is open, and what the subgoals add."""
    openings, M = study.record("deep")["goal_gate"], study.steps
    record, own = study.record("parts"), own_answers(study)
    place = record["names"].tolist().index("no goals")
    without = study.examples.right(record["predictions"][place])
    change = change_of(own, without)
    rows, numbers = [], dict[str, Any]()
    for step in range(1, M + 1):
        opening = mean_of(openings[:, step - 1])
        rows.append([f"{step}", number(opening)])
        numbers[f"{step}"] = opening._asdict()
    last = mean_of(openings[:, M - 1])
    verdict = "matter" if change.high < 0 else "make no significant difference"
    sentence = (
        f"The gate of the subgoals is open by {number(last)} after step {M} (1 commits fully). Without "
        f"subgoals the accuracy changes by {points(change)} points, so they {verdict}."
    )
    table = Table("Gate of the subgoals", ["ACT step", "mean gate"], rows)
    x = list(range(1, M + 1))
    drawing = figures.curves("Gate of the subgoals", x, {"mean": [mean_of(openings[:, s - 1]) for s in x]})
    numbers["without"] = {"exact": share_of(without)._asdict(), "change": change._asdict()}
    return Finding(sentence, table, [drawing], numbers)


def no_subgoals(study: Study) -> str:
    """Why there are no subgoals to look at."""
    return "" if study.trained.model.subgoal_head is not None else "the model sets no subgoals"
