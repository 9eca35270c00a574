"""The finding of a section of an analysis: a sentence, a table, figures, and its numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hrm.analysis.study import Study
from hrm.common.tables import Table
from hrm.study.plots import Drawing


@dataclass(frozen=True)
class Finding:
    """The result of a section.

    sentence: the finding, with numbers and intervals. table: its numbers. numbers: the same, as JSON values.
    """

    sentence: str
    table: Table
    figures: list[Drawing]
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A section: a question about a model.

    reason: why it does not apply to a study; empty if it applies.
    """

    name: str
    title: str
    question: str
    find: Callable[[Study], Finding]
    reason: Callable[[Study], str] = lambda study: ""
