"""Sections on the same puzzles under other conditions: other paths, fewer blanks, other identifiers."""

from typing import Any

import numpy as np

from hrm.analysis import figures
from hrm.analysis.finding import Finding
from hrm.analysis.statistics import Estimate, change_of, percent, points, share_of
from hrm.analysis.study import Study
from hrm.common.tables import Table
from hrm.evaluation.selection import pass_at
from hrm.evaluation.views import SYMMETRIC

WAYS = {"init": "another start", "symmetry": "another symmetry"}


def own_answers(study: Study) -> np.ndarray:
    """Which puzzles the model solves as training evaluates it, (N,) bool."""
    return study.examples.right(study.record("deep")["predictions"][:, study.steps - 1])


# --- selection


def ways(study: Study) -> list[str]:
    """The differences between paths that the puzzles allow."""
    return ["init", *["symmetry"] * (study.kind.name in SYMMETRIC)]


def selection(study: Study) -> Finding:
    """How many failures another start or another symmetry of the puzzle solves."""
    own, K = own_answers(study), study.paths
    wrong = ~own
    rows, numbers, shown = [], dict[str, Any](), {"plain path": share_of(own)}
    told = []
    for by in ways(study):
        record = study.record(by)
        right = study.examples.right(record["predictions"])
        others = right[:, 1:]
        rescued = share_of(np.asarray(others.any(axis=1))[wrong])
        alone, single = (share_of(part.mean(axis=1)) for part in (others, others[wrong]))
        kept = share_of(others[own].mean(axis=1))
        chosen = np.take_along_axis(right, record["q_halt"].argmax(axis=1)[:, None], 1)[:, 0]
        by_q, ceiling = share_of(chosen), share_of(pass_at(right, K))
        gain, missed = change_of(own, chosen), int((right.any(axis=1) & ~chosen).sum())
        name = WAYS[by]
        rows.append([name, *map(percent, (rescued, single, kept, by_q)), points(gain), percent(ceiling)])
        shown |= {f"{name}, by q_halt": by_q, f"{name}, any of {K}": ceiling}
        numbers[by] = {
            "failures_solved": rescued._asdict(),
            "of_one_other_path": {
                "all": alone._asdict(),
                "wrong": single._asdict(),
                "right": kept._asdict(),
            },
            "missed_by_q_halt": missed,
            "chosen_by_q_halt": by_q._asdict(),
            "gain": gain._asdict(),
            "any": ceiling._asdict(),
        }
        told.append(
            f"With {name} one path solves {percent(alone)} of the puzzles"
            + (f", and any of {K - 1} paths solves {percent(rescued)} of the failures" if wrong.any() else "")
            + f". q_halt's choice among {K} paths changes the accuracy by "
            f"{points(gain)} points; it picks a wrong answer beside a right one {missed:,} times."
        )
    sentence = " ".join([f"The plain path fails on {int(wrong.sum()):,} of {len(own):,} puzzles.", *told])
    table = Table(
        "Failures on other paths",
        [
            "other paths",
            "failures solved by any",
            "failures solved by one",
            "successes kept by one",
            "chosen by q_halt",
            "gain in points",
            f"any of {K} paths",
        ],
        rows,
        f"Of {K} paths one is the plain path; the others start at random states, or see the puzzle under a "
        "symmetry of its kind with the answer mapped back. By one: the mean over the other paths.",
    )
    numbers |= {"failures": int(wrong.sum()), "puzzles": len(own)}
    return Finding(sentence, table, [figures.bars("Puzzles solved", shown)], numbers)


def no_paths(study: Study) -> str:
    """Why other paths are not run."""
    return "paths=1 leaves no other path" if study.paths < 2 else ""


# --- easy puzzles


def easy(study: Study) -> Finding:
    """Accuracy on puzzles in which all but a few blanks are filled in."""
    record, own = study.record("easy"), own_answers(study)
    blank = study.blanks()
    rows, numbers, shown = [], dict[str, Any](), {}

    def add(name: str, predictions: np.ndarray, inputs: np.ndarray) -> Estimate:
        right = study.examples.right(predictions)
        good = study.examples.cells_right(predictions)
        open_cells, shows = inputs == 1, inputs != 1
        filled = share_of((good | shows).all(axis=1))
        copied = share_of((good | open_cells).all(axis=1))
        exact = share_of(right)
        rows.append([name, f"{len(right):,}", percent(exact), percent(filled), percent(copied)])
        numbers[name] = {
            "exact": exact._asdict(),
            "blanks_right": filled._asdict(),
            "clues_kept": copied._asdict(),
        }
        shown[name] = exact
        return exact

    for level, count in enumerate(record["blanks"].tolist()):
        add(f"{count} blank{'s' * (count > 1)}", record["predictions"][level], record["inputs"][level])
    deep = study.record("deep")
    mean = blank.sum(axis=1).mean()
    add(f"own blanks ({mean:.1f} on average)", deep["predictions"][:, study.steps - 1], study.examples.inputs)
    single = study.examples.right(record["predictions"][0])
    name = rows[0][0]
    change = change_of(own, single)
    verdict = "not significantly easier or harder for it"
    if change.low > 0 or change.high < 0:
        verdict = f"{'easier' if change.low > 0 else 'harder'} for it than its test puzzles"
    sentence = (
        f"With {name} left the model solves {percent(share_of(single))} of the puzzles, against "
        f"{percent(share_of(own))} with their own {mean:.1f} blanks: {points(change)} points, so nearly full "
        f"boards are {verdict}."
    )
    table = Table(
        "Easy puzzles",
        ["left blank", "puzzles", "solved", "blanks right", "clues kept"],
        rows,
        "The other blanks of each test puzzle, drawn at random, are filled in from its answer. Solved: every "
        "cell right. Blanks right: every blank right. Clues kept: every clue unchanged.",
    )
    numbers["change"] = change._asdict()
    return Finding(sentence, table, [figures.bars("Puzzles solved by blanks left", shown)], numbers)


def no_blanks(study: Study) -> str:
    """Why there are no easy puzzles."""
    if study.kind.name != "sudoku":
        return f"puzzles of kind {study.kind.name} have no blank cells to fill in"
    if study.blanks().sum(axis=1).max(initial=0) < 2:
        return "no puzzle has two blank cells"
    # A blank cell without a label cannot be filled in.
    if (study.blanks() & (study.examples.labels < 0)).any():
        return "some blank cells have no known answer to fill in"
    return ""


# --- identifiers


def identifiers(study: Study) -> Finding:
    """Accuracy under the puzzle's own identifier, the blank one and another puzzle's."""
    record, own = study.record("identifiers"), own_answers(study)
    shares = {"own": own}
    shares |= {
        str(name): study.examples.right(predictions)
        for name, predictions in zip(record["names"], record["predictions"], strict=True)
    }
    deep = study.record("deep")["predictions"][:, study.steps - 1]
    rows, numbers = [], dict[str, Any]()
    for place, (name, right) in enumerate(shares.items()):
        predictions = deep if place == 0 else record["predictions"][place - 1]
        same = share_of((predictions == deep).all(axis=1))
        change = change_of(own, right)
        rows.append([name, percent(share_of(right)), points(change), percent(same)])
        numbers[name] = {
            "exact": share_of(right)._asdict(),
            "change": change._asdict(),
            "same_answer": same._asdict(),
        }
    of_blank, of_other = shares["blank"], shares["another's"]
    sentence = (
        f"With its own identifier the model solves {percent(share_of(own))} of the puzzles, with the blank "
        f"one {percent(share_of(of_blank))} ({points(change_of(own, of_blank))} points) and with another "
        f"puzzle's {percent(share_of(of_other))} ({points(change_of(own, of_other))} points)."
    )
    table = Table(
        "Puzzle identifiers",
        ["identifier", "solved", "change in points", "same answer as with its own"],
        rows,
        "The identifier picks the puzzle's row in the table of puzzle embeddings. Another's: of ARC, another "
        "task's.",
    )
    drawing = figures.bars("Puzzles solved by identifier", {name: share_of(r) for name, r in shares.items()})
    return Finding(sentence, table, [drawing], numbers)


def no_identifiers(study: Study) -> str:
    """Why identifiers carry nothing."""
    if study.trained.model.puzzle_emb is None:
        return "the model has no puzzle embeddings"
    if len(np.unique(study.examples.identifiers)) < 2:
        return "all puzzles have the same identifier"
    return ""
