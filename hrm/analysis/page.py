"""The page of an analysis, of one model or of two side by side, and its figures as PNG files."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from hrm.analysis.finding import Finding, Section
from hrm.common.tables import Table
from hrm.study.html import filled, table_html, write_files
from hrm.study.plots import Drawing, drawing_svg, drawings_png

PAGE = "analysis.html"

_READING = (
    "Values in brackets are 95 % intervals over the puzzles, not over other seeds of training: Wilson's for "
    "shares, Student's for means, Agresti and Min's for differences. A step of adaptive computation time "
    "(ACT) is one round of thinking, after which the model shows an answer; within it the high and the low "
    "level update their states z_H and z_L in cycles. A puzzle is solved when every cell is right. q_halt is "
    "the model's own estimate that its answer is right. The plain path is the run of the model that training "
    "evaluates; other paths start from random states, or see the puzzle under a symmetry."
)


@dataclass
class Result:
    """The findings of an analysis on one model.

    facts: lines on what was analysed. findings, left_out: by section; left_out gives the reason.
    """

    name: str
    facts: list[str]
    findings: dict[str, Finding] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def as_numbers(self) -> dict[str, Any]:
        """The result for programs: facts, findings with sentence, numbers and table, reasons."""
        sections = {
            name: {"sentence": found.sentence, "numbers": found.numbers, "table": asdict(found.table)}
            for name, found in self.findings.items()
        }
        return {"facts": self.facts, "sections": sections, "left_out": self.left_out}


def write_page(
    folder: Path, title: str, sections: Sequence[Section], results: Sequence[Result], tables: Sequence[Table]
) -> list[Path]:
    """Writes analysis.html and a PNG for each section with figures; returns their paths.

    tables: above the sections. Files are written atomically. Raises UserError if matplotlib is missing.
    """
    shown = [section for section in sections if any(section.name in each.findings for each in results)]
    files = {folder / PAGE: _page(title, shown, sections, results, tables).encode("utf-8")}
    for section in shown:
        drawings = [drawing for each in results for drawing in _figures(each, section)]
        if drawings:
            files[folder / f"{section.name}.png"] = drawings_png(f"{title}: {section.title}", drawings)
    write_files(files)
    return list(files)


def _figures(result: Result, section: Section) -> list[Drawing]:
    found = result.findings.get(section.name)
    return [] if found is None else found.figures


def _page(
    title: str,
    shown: Sequence[Section],
    sections: Sequence[Section],
    results: Sequence[Result],
    tables: Sequence[Table],
) -> str:
    several = len(results) > 1
    parts = []
    for result in results:
        heading = f"<strong>{escape(result.name)}</strong>: " if several else ""
        parts.append(f"<p>{heading}{escape('; '.join(result.facts))}.</p>")
    parts.append(f"<p>{escape(_READING)}</p>")
    parts.append(_overview(shown, results))
    parts += [table_html(table, f"overview-{i}") for i, table in enumerate(tables)]
    parts += [_section(section, results) for section in shown]
    parts.append(_left_out(sections, results))
    return filled(title, parts)


def _sentences(section: Section, results: Sequence[Result]) -> list[str]:
    """The sentence of each model that has one, escaped, after its name if there are several."""
    several = len(results) > 1
    return [
        (f"<strong>{escape(each.name)}</strong>: " if several else "") + escape(found.sentence)
        for each in results
        if (found := each.findings.get(section.name))
    ]


def _overview(shown: Sequence[Section], results: Sequence[Result]) -> str:
    items = "".join(
        f'<li><a href="#{section.name}">{escape(section.title)}</a>. '
        f"{' '.join(_sentences(section, results))}</li>\n"
        for section in shown
    )
    return f'<nav aria-label="Findings"><h2>Findings</h2>\n<ol class="findings">{items}</ol></nav>'


def _section(section: Section, results: Sequence[Result]) -> str:
    several = len(results) > 1
    figures, tables = [], []
    for place, result in enumerate(results):
        found = result.findings.get(section.name)
        if found is None:
            continue
        for number, drawing in enumerate(found.figures):
            caption = f"<figcaption>{escape(result.name)}</figcaption>" if several else ""
            words = escape(f"{result.name}: {drawing.words}" if several else drawing.words)
            image = drawing_svg(drawing, f"{section.name}-{place}-{number}")
            figures.append(f'<figure>{caption}<div role="img" aria-label="{words}">{image}</div></figure>\n')
        table = found.table
        if several:
            table = Table(f"{result.name}: {table.title}", table.columns, table.rows, table.note)
        tables.append(table_html(table, f"{section.name}-table-{place}"))
    sentences = "".join(f'<p class="finding">{each}</p>\n' for each in _sentences(section, results))
    return (
        f'<section id="{section.name}"><h2>{escape(section.title)}</h2>\n<p>{escape(section.question)}</p>\n'
        f'{sentences}<div class="panels">\n{"".join(figures)}</div>{"".join(tables)}</section>'
    )


def _left_out(sections: Sequence[Section], results: Sequence[Result]) -> str:
    titles = {section.name: section.title for section in sections}
    several = len(results) > 1
    items = [
        f"<li>{escape((f'{result.name}, ' if several else '') + titles[name])}: {escape(reason)}.</li>"
        for result in results
        for name, reason in result.left_out.items()
    ]
    if not items:
        return ""
    return f'<section id="left-out"><h2>Left out</h2>\n<ul class="notes">{"".join(items)}</ul></section>'
