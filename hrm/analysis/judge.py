"""Sections on q_halt as a judge of its own answers, and on votes of augmented ARC puzzles."""

from typing import Any

import numpy as np

from hrm.analysis import figures
from hrm.analysis.finding import Finding
from hrm.analysis.statistics import (
    BINS,
    Estimate,
    calibration,
    change_of,
    mean_of,
    number,
    percent,
    points,
    share_of,
)
from hrm.analysis.study import Study
from hrm.common.tables import Table
from hrm.common.text import counted
from hrm.data.arc.augment import task_of
from hrm.data.format import read_names
from hrm.evaluation.arc_voting import Votes, read_tests

# Augmentations that vote on a test.
VOTERS = (1, 10, 100, 1000)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) in float64, without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * np.asarray(logits, np.float64))))


def q_halt(study: Study) -> Finding:
    """Whether q_halt knows when an answer is right, and what halting by it saves and costs."""
    deep, M = study.record("deep"), study.steps
    right = study.examples.right(deep["predictions"])
    trained = right[:, M - 1]
    sure = sigmoid(deep["q_halt"][:, M - 1])
    found = calibration(sure, trained, study.seed)
    rank = ranking(deep["q_halt"][:, M - 1], trained)
    steps = np.minimum(deep["halts_at"], M)
    halted = np.take_along_axis(right, steps[:, None] - 1, axis=1)[:, 0]
    cost, taken = change_of(trained, halted), mean_of(steps)
    saved = 1 - taken.value / M
    believed = deep["q_halt"][:, M - 1] >= 0
    false_trust = share_of(~trained[believed])
    excess = found.excess
    too_sure = mean_of(sure - trained, least=-1.0)
    trust = f"It judges {counted(int(believed.sum()), 'answer')} right; {percent(false_trust)} are wrong."
    if not believed.any():
        trust = "It judges no answer right."
    judged = (
        f"not significantly more than the {100 * found.by_chance:.1f} % of a calibrated judge by chance"
        if excess.low == 0
        else f"{percent(excess)} more than a calibrated judge shows by chance"
    )
    sentence = (
        f"On the plain path q_halt's mean confidence after {M} steps is {100 * sure.mean():.1f} %, and "
        f"{100 * trained.mean():.1f} % are right, a difference of {points(too_sure)} points. "
        f"Its calibration error (ECE) is {100 * found.error:.1f} %, {judged}. {trust} Halting by it takes "
        f"{number(taken)} of {M} steps, which saves {100 * saved:.0f} %, and changes the accuracy by "
        f"{points(cost)} points."
    )
    rows = []
    for place in np.flatnonzero(found.counts):
        own = np.minimum((sure * BINS).astype(int), BINS - 1) == place
        span = f"{100 * place / BINS:.0f} to {100 * (place + 1) / BINS:.0f} %"
        rows.append(
            [
                span,
                f"{found.counts[place]:,}",
                f"{100 * found.confidence[place]:.1f} %",
                percent(share_of(trained[own])),
            ]
        )
    note = (
        f"ECE {100 * found.error:.2f} %; a calibrated judge with the same confidences shows "
        f"{100 * found.by_chance:.2f} % by chance; beyond chance {percent(excess, 2)}. A right answer ranks "
        f"above a wrong one in {'-' if np.isnan(rank) else f'{100 * rank:.1f} %'} of the pairs (AUROC, over "
        f"{int((~trained).sum()):,} wrong answers). It judges answers of 50 % or more right."
    )
    table = Table("Confidence and accuracy", ["sigmoid(q_halt)", "puzzles", "mean", "right"], rows, note)
    shares = {"all steps": share_of(trained), "halting by q_halt": share_of(halted)}
    drawings = [figures.reliability("Reliability of q_halt", found), figures.bars("Puzzles solved", shares)]
    numbers = {
        "ece": found.error,
        "ece_by_chance": found.by_chance,
        "ece_beyond_chance": excess._asdict(),
        "confidence_above_accuracy": too_sure._asdict(),
        "auroc": rank,
        "believed_and_wrong": false_trust._asdict(),
        "mean_confidence": float(sure.mean()),
        "halting": {
            "steps": taken._asdict(),
            "saved": saved,
            "exact": share_of(halted)._asdict(),
            "change": cost._asdict(),
        },
        "bins": {
            "puzzles": found.counts.tolist(),
            "confidence": found.confidence.tolist(),
            "accuracy": found.accuracy.tolist(),
        },
    }
    return Finding(sentence, table, drawings, numbers)


def ranking(scores: np.ndarray, right: np.ndarray) -> float:
    """The share of pairs in which a right answer scores above a wrong one, ties by half, or NaN."""
    good, bad = np.sort(scores[right]), np.sort(scores[~right])
    if not len(good) or not len(bad):
        return float("nan")
    below, not_above = (np.searchsorted(bad, good, side=side).sum() for side in ("left", "right"))
    return float((below + not_above) / 2 / (len(good) * len(bad)))


# --- votes


def votes(study: Study) -> Finding:
    """Whether more augmentations of an ARC task, each with one vote, find more answers."""
    record = study.record("votes")
    names = read_names(study.dataset.folder.parent)
    tests = read_tests(study.dataset, names)
    own = [names[identifier] for identifier in record["identifiers"].tolist()]
    tasks = {task_of(name): tests[task_of(name)] for name in own}
    sure = sigmoid(record["q_halt"])
    # The votes of each task's augmentations come in a random order, the same for all counts.
    order = np.random.default_rng(study.seed).permutation(len(own)).tolist()
    rows, numbers = [], dict[str, Any]()
    curves: dict[str, list[Estimate]] = {"1 answer": [], "2 answers": []}
    most = max(len({name for name in own if task_of(name) == task}) for task in tasks)
    counts = [count for count in VOTERS if count < most] + [most]
    for count in counts:
        cast, seen = Votes(tasks), dict[str, set[str]]()
        for place in order:
            voters = seen.setdefault(task_of(own[place]), set())
            if own[place] in voters or len(voters) < count:
                voters.add(own[place])
                cast.add(
                    own[place], record["inputs"][place], record["predictions"][place], float(sure[place])
                )
        solved = {k: share_of(np.array(list(cast.solved(k).values()))) for k in (1, 2)}
        rows.append([f"{count}", f"{len(tasks):,}", *(percent(each) for each in solved.values())])
        numbers[f"{count}"] = {f"pass_at_{k}": each._asdict() for k, each in solved.items()}
        for curve, each in zip(curves.values(), solved.values(), strict=True):
            curve.append(each)
    first, last = curves["2 answers"][0], curves["2 answers"][-1]
    sentence = (
        f"One augmentation solves {percent(first)} of {len(tasks):,} tasks with two answers, {counts[-1]} "
        f"augmentations solve {percent(last)}."
    )
    note = (
        "A task counts by its share of solved tests. The augmentations are drawn at random, and each has one "
        "vote."
    )
    table = Table("Votes", ["augmentations", "tasks", "pass@1", "pass@2"], rows, note)
    drawing = figures.curves(
        "Tasks solved by votes", counts, curves, is_share=True, x_label="augmentations that vote"
    )
    return Finding(sentence, table, [drawing], numbers)


def no_votes(study: Study) -> str:
    """Why there are no votes."""
    if study.kind.name != "arc":
        return "only augmented ARC tasks vote"
    names = read_names(study.dataset.folder.parent)
    return "" if any(task_of(name) != name for name in names) else "the tasks have no augmentations"
