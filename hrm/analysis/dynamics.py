"""Sections on the course of a model's answers and states over ACT steps."""

from typing import Any

import numpy as np

from hrm.analysis import figures
from hrm.analysis.finding import Finding
from hrm.analysis.statistics import (
    change_of,
    mean_of,
    number,
    percent,
    points,
    principal_plane,
    share_of,
)
from hrm.analysis.study import Study
from hrm.common.tables import Table
from hrm.data.format import IGNORE_LABEL

# Points of a curve.
DRAWN = 64
# A state that changes by less in a step has settled; 1 is the size of a state.
SETTLED = 0.01


def milestones(study: Study) -> list[int]:
    """The ACT steps in tables: 1, 2, 4, ... up to training's number, and its multiples."""
    M = study.steps
    steps = {1 << power for power in range(M.bit_length()) if 1 << power <= M}
    last = study.depth * M
    return sorted(steps | {M << power for power in range(last.bit_length()) if M << power <= last} | {last})


def drawn_steps(last: int) -> list[int]:
    """The ACT steps in a curve, at most DRAWN and denser at first."""
    return sorted({round(step) for step in np.geomspace(1, last, DRAWN)} | {1, last})


def depth(study: Study) -> Finding:
    """Accuracy by ACT step, also far beyond training's number of them."""
    deep, M = study.record("deep"), study.steps
    right = study.examples.right(deep["predictions"])
    last = right.shape[1]
    trained, end = right[:, M - 1], right[:, -1]
    change = change_of(trained, end)
    first = change_of(right[:, 0], trained)
    ever = share_of(np.asarray(right.any(axis=1)))
    if change.low > 0:
        verdict = "It gains from further steps"
    elif change.high < 0:
        verdict = "It loses with further steps"
    else:
        verdict = "Further steps make no significant difference"
    sentence = (
        f"The model solves {percent(share_of(trained))} of {len(right):,} puzzles after the {M} ACT steps of "
        f"training and {percent(share_of(end))} after {last}. {verdict}: {points(change)} percentage points. "
        f"One step alone solves {percent(share_of(right[:, 0]))}."
    )
    rows, numbers = [], dict[str, Any]()
    for step in milestones(study):
        cells = study.examples.cells_right(deep["predictions"][:, step - 1]).mean(axis=1)
        exact, own = share_of(right[:, step - 1]), change_of(trained, right[:, step - 1])
        against = "-" if step == M else points(own)
        rows.append([f"{step}", percent(exact), percent(share_of(cells)), against])
        numbers[f"{step}"] = {"exact": exact._asdict(), "cells": share_of(cells)._asdict()}
    table = Table(
        "Accuracy by ACT steps",
        ["ACT steps", "puzzles solved", "cells right, clues too", f"points against {M} steps"],
        rows,
        f"Solved at one of the {last} steps or more: {percent(ever)}.",
    )
    x = drawn_steps(last)
    shares = [share_of(right[:, step - 1]) for step in x]
    drawing = figures.curves("Puzzles solved", x, {"solved": shares}, mark=M, is_share=True)
    numbers |= {"gain_beyond": change._asdict(), "gain_within": first._asdict(), "ever": ever._asdict()}
    return Finding(sentence, table, [drawing], numbers)


def settling(study: Study) -> Finding:
    """How much states move in a step, for right and wrong answers, and whether answers still change."""
    deep, M = study.record("deep"), study.steps
    predictions = deep["predictions"]
    right = study.examples.right(predictions[:, M - 1])
    last = predictions.shape[1]
    levels = [level for level in "HL" if f"drift_{level}" in deep]
    groups = {name: mask for name, mask in (("right", right), ("wrong", ~right)) if mask.any()}
    kept = (predictions[:, M - 1 :] == predictions[:, M - 1 : M]).all(axis=(1, 2))
    at_end = deep["drift_H"][:, -1]
    rows, numbers = [], dict[str, Any]()
    for name, mask in groups.items():
        of_group = {}
        for step in milestones(study):
            moved = [mean_of(deep[f"drift_{level}"][mask, step - 1]) for level in levels]
            rows.append([f"{name}, step {step}", f"{int(mask.sum()):,}", *map(number, moved)])
            of_group[f"{step}"] = {level: each._asdict() for level, each in zip(levels, moved, strict=True)}
        numbers[name] = {
            "steps": of_group,
            "answer_kept": share_of(kept[mask])._asdict(),
            "moving": int((at_end[mask] > SETTLED).sum()),
        }
    held = ", ".join(f"{percent(share_of(kept[mask]))} of the {name} ones" for name, mask in groups.items())
    moves = " and ".join(
        f"{number(mean_of(deep['drift_H'][mask, M - 1]))} in the {int(mask.sum()):,} {name} puzzles"
        for name, mask in groups.items()
    )
    moving = " and ".join(
        f"{numbers[name]['moving']:,} of the {int(mask.sum()):,} {name} ones" for name, mask in groups.items()
    )
    sentence = (
        f"In step {M} the state z_H moves by {moves} (1 is the size of a state). "
        f"From step {M} to {last} the answer never changes for {held}. "
        f"In step {last} z_H still moves by more than {SETTLED:g} for {moving}."
    )
    note = (
        "Root mean square over tokens and channels of the change in one ACT step. Right and wrong: the "
        f"answer after {M} steps."
    )
    table = Table("Drift", ["answer", "puzzles", *(f"z_{level} moves" for level in levels)], rows, note)
    x = drawn_steps(last)
    drawings = [
        figures.curves(
            f"Change of z_{level} in a step",
            x,
            {
                name: [mean_of(deep[f"drift_{level}"][mask, s - 1]) for s in x]
                for name, mask in groups.items()
            },
            mark=M,
            logarithmic=True,
        )
        for level in levels
    ]
    numbers["median_drift_end"] = float(np.median(at_end))
    return Finding(sentence, table, drawings, numbers)


def cells(study: Study) -> Finding:
    """At which ACT steps, and in which cells, answers become right, and which are lost again."""
    deep, M, examples = study.record("deep"), study.steps, study.examples
    asked = examples.labels != IGNORE_LABEL
    # Leave out the clues, which the model only copies, unless every cell is one.
    open_cells = asked & (examples.inputs != examples.labels)
    if not open_cells.any():
        open_cells = asked
    good = examples.cells_right(deep["predictions"][:, :M])
    share = (good & open_cells[:, None]).sum(axis=(0, 2)) / open_cells.sum()
    solved = examples.right(deep["predictions"][:, :M])
    rows, numbers = [], dict[str, Any]()
    for step in range(1, M + 1):
        now = solved[:, step - 1]
        before = solved[:, step - 2] if step > 1 else np.zeros_like(now)
        gained, lost = share_of(now & ~before), share_of(before & ~now)
        rows.append(
            [
                f"{step}",
                f"{100 * share[step - 1]:.1f} %",
                percent(share_of(now)),
                percent(gained),
                percent(lost),
            ]
        )
        numbers[f"{step}"] = {
            "cells": float(share[step - 1]),
            "solved": share_of(now)._asdict(),
            "newly": gained._asdict(),
            "lost": lost._asdict(),
        }
    # The step from which a cell stays right, M + 1 if it is wrong in the end.
    since = 1 + M - np.cumprod(good[:, ::-1], axis=1).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        counts = open_cells.sum(axis=0)
        where = np.where(counts > 0, (since * open_cells).sum(axis=0) / counts, 0.0)
        wrong = np.where(counts > 0, (~good[:, -1] & open_cells).sum(axis=0) / counts, 0.0)
    shape = study.kind.rows, study.kind.cols
    when = mean_of(
        np.array([since[row, open_cells[row]].mean() for row in np.flatnonzero(open_cells.any(1))])
    )
    early = next(step for step in range(1, M + 1) if share[step - 1] >= 0.99 * share[-1])
    dropped = share_of(solved.any(axis=1) & ~solved[:, -1])
    sentence = (
        f"After step 1 {100 * share[0]:.1f} % of the open cells are right, and after step {M} "
        f"{100 * share[-1]:.1f} %; step {early} is the first to reach 99 % of that share. On average an open "
        f"cell stays right from step {number(when)} on. {percent(dropped)} of the puzzles are solved at some "
        f"step and wrong at step {M}."
    )
    note = (
        "Open cells: those whose answer the puzzle does not show. A cell that ends wrong counts as step "
        f"{M + 1}. Boards: each cell over the puzzles in which it is open."
    )
    table = Table(
        "Becoming right", ["ACT step", "open cells right", "solved", "newly solved", "lost"], rows, note
    )
    x = list(range(1, M + 1))
    per_puzzle = (good & open_cells[:, None]).sum(axis=2) / np.maximum(1, open_cells.sum(axis=1))[:, None]
    drawings = [
        figures.curves(
            "Right answers",
            x,
            {
                "open cells right": [share_of(per_puzzle[:, step - 1]) for step in x],
                "puzzles solved": [share_of(solved[:, step - 1]) for step in x],
            },
            is_share=True,
        ),
        figures.board("Step from which a cell is right", where.reshape(shape), M + 1, "mean step"),
        figures.board(
            "Wrong at the last step", 100 * wrong.reshape(shape), max(1.0, 100 * wrong.max()), "% of puzzles"
        ),
    ]
    numbers |= {"right_for_good_from": when._asdict(), "solved_and_lost": dropped._asdict()}
    return Finding(sentence, table, drawings, numbers)


def trajectories(study: Study) -> Finding:
    """The course of z_H of some puzzles in the plane of its first two principal components."""
    record, M = study.record("states"), study.steps
    z_H, right = record["z_H"].astype(np.float64), record["right"]
    n, points_each, F = z_H.shape
    plane, shares = principal_plane(z_H.reshape(n * points_each, F))
    paths = plane.reshape(n, points_each, 2)
    length = np.linalg.norm(np.diff(z_H, axis=1), axis=2).sum(axis=1)
    direct = np.linalg.norm(z_H[:, -1] - z_H[:, 0], axis=1)
    detour = length / np.maximum(direct, 1e-12)
    rows, numbers = [], dict[str, Any]()
    for name, mask in (("right", right), ("wrong", ~right)):
        if not mask.any():
            continue
        parts = {
            "length": mean_of(length[mask]),
            "direct": mean_of(direct[mask]),
            "detour": mean_of(detour[mask], least=1.0),
        }
        rows.append([name, f"{int(mask.sum())}", *(number(each) for each in parts.values())])
        numbers[name] = {key: each._asdict() for key, each in parts.items()}
    steps = points_each - 1
    told = " and ".join(f"{row[4]} times as long for {row[1]} {row[0]} answers" for row in rows)
    sentence = (
        f"Two components hold {100 * shares.sum():.0f} % of the variance of {n} trajectories of z_H over "
        f"{steps} steps. The path of a state is longer than the straight line between its ends: {told}."
    )
    note = (
        f"Distances in the {F:,} numbers of z_H. Detour: the path over the straight line. All start at one "
        "point. Up to half of the sample are wrong answers, which is more than their share of the puzzles."
    )
    table = Table("Trajectories", ["answer", "puzzles", "path", "straight line", "detour"], rows, note)
    drawing = figures.plane("z_H in its principal plane", paths, right, M, shares)
    numbers["variance"] = [float(each) for each in shares]
    return Finding(sentence, table, [drawing], numbers)
