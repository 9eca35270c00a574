"""The main numbers of two analysed models beside each other."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hrm.analysis.page import Result
from hrm.analysis.robustness import own_answers
from hrm.analysis.statistics import Estimate, change_of, number, percent, points
from hrm.analysis.study import Study
from hrm.common.tables import Table

# A row: its name, its section, the keys that lead to its estimate, the function that formats it.
_ROWS = (
    ("gained by further steps, points", "depth", ("gain_beyond",), points),
    ("gained since step 1, points", "depth", ("gain_within",), points),
    ("failures that another start solves", "selection", ("init", "failures_solved"), percent),
    ("failures that another symmetry solves", "selection", ("symmetry", "failures_solved"), percent),
    ("calibration error beyond chance", "q_halt", ("ece_beyond_chance",), percent),
    ("ACT steps when halting by q_halt", "q_halt", ("halting", "steps"), number),
    ("halting changes the accuracy, points", "q_halt", ("halting", "change"), points),
)


def comparison(results: Sequence[Result], studies: Sequence[Study]) -> Table:
    """The main numbers of two models, and their difference where both saw the same puzzles."""
    rows = []
    if all("depth" in result.findings for result in results):
        solved = [
            result.findings["depth"].numbers[str(study.steps)]["exact"]
            for result, study in zip(results, studies, strict=True)
        ]
        rows.append(["solved", *(percent(Estimate(**each)) for each in solved)])
    for name, section, way, shown in _ROWS:
        cells = [_text(result, section, way, shown) for result in results]
        if cells != ["-"] * len(results):
            rows.append([name, *cells])
    note = "The models saw different puzzles, so their difference has no paired interval."
    first, second = studies
    if _same_puzzles(first, second) and rows:
        change = change_of(own_answers(first), own_answers(second))
        note = (
            f"On the same {len(first.examples):,} puzzles {second.name} solves {points(change)} percentage "
            f"points more than {first.name}."
        )
    return Table("Side by side", ["", *(result.name for result in results)], rows, note)


def _text(result: Result, section: str, way: Sequence[str], shown: Any) -> str:
    found = result.findings.get(section)
    value: Mapping[str, Any] | None = None if found is None else found.numbers
    for name in way:
        value = None if value is None else value.get(name)
    return "-" if value is None else str(shown(Estimate(**value)))


def _same_puzzles(first: Study, second: Study) -> bool:
    arrays = [(study.examples.inputs, study.examples.labels) for study in (first, second)]
    return all(np.array_equal(a, b) for a, b in zip(*arrays, strict=True))
