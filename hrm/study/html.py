"""A report as one self-contained HTML page, and its plots as a PNG."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from hrm.common.files import new_file
from hrm.common.tables import Table
from hrm.study import plots
from hrm.study.history import History
from hrm.study.panels import Panel, Section, description, sections

HTML, PNG = "report.html", "report.png"

_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
  base-uri 'none'; form-action 'none'">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { color-scheme: light dark; --page: #fff; --ink: #24292f; --soft: #57606a; --grid: #d8dee4;
  --card: #f6f8fa; $light }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181d; --ink: #e6e9ed; --soft: #a3abb6; --grid: #333b45; --card: #1b2027; $dark }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 84rem; padding: 1.5rem 1rem 4rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .25rem }
p, .notes { color: var(--soft); margin: .25rem 0 1rem; max-width: 48rem }
.notes { padding-left: 1.2rem }
.legend { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .15rem 1.25rem;
  margin: 1.5rem 0 0; padding: .5rem 0; max-height: 5.5rem; overflow: auto; list-style: none;
  background: var(--page); border-bottom: 1px solid var(--grid); font-size: .9rem }
.legend li { overflow-wrap: anywhere }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem }
figure { margin: 0; padding: .5rem; background: var(--card); border-radius: .5rem }
figure svg { display: block; width: 100%; height: auto; stroke-linejoin: round }
figure svg text { font-family: inherit !important }
.table { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; font-size: 1.05rem; padding: 1.25rem 0 .4rem }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--grid); text-align: right;
  vertical-align: top }
thead th { color: var(--soft); font-weight: 600 }
th:first-child { text-align: left }
tbody th { font-weight: 500 }
:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px }
.findings { padding-left: 1.4rem; max-width: 60rem } .findings li { margin: .4rem 0 }
.finding { color: var(--ink); font-size: 1.08rem; max-width: 60rem }
a { color: inherit } figcaption { font-weight: 600; padding: 0 .25rem .25rem; overflow-wrap: anywhere }
@media print { .legend { position: static } figure { break-inside: avoid } }
</style>
</head>
<body>
<header><h1>$title</h1></header>
<main>
$body
</main>
</body>
</html>
""")
_GLYPHS = dict(zip(plots.MARKERS, "●■▲◆▼", strict=True))


def write_report(
    folder: Path,
    title: str,
    groups: Mapping[str, Sequence[History]],
    tables: Sequence[Table] = (),
    notes: Sequence[str] = (),
) -> tuple[Path, Path]:
    """Writes report.html and report.png into `folder`, created if missing; returns their paths.

    groups: by name, runs that are plotted together, such as the seeds of a configuration, as mean, range and
    thin lines. Panels without data are omitted. tables, notes: shown above the plots. Files are written
    atomically. Raises UserError if matplotlib is missing.
    """
    look = plots.styles(list(groups))
    found = sections(groups)
    text = page(title, groups, found, look, tables, notes)
    image = plots.png(title, found, look)
    write_files({folder / HTML: text.encode("utf-8"), folder / PNG: image})
    return folder / HTML, folder / PNG


def write_heat_maps(
    folder: Path, name: str, title: str, heat_maps: Sequence[plots.HeatMap], tables: Sequence[Table]
) -> tuple[Path, Path]:
    """Writes heat maps and tables as name.html, and the heat maps as name.png; returns their paths.

    Folder and errors: see `write_report`.
    """
    image = plots.heat_maps_png(title, heat_maps)
    parts = [table_html(table, f"table-{i}") for i, table in enumerate(tables)]
    for i, each in enumerate(heat_maps):
        words = escape(f"{each.title}: the values of the table as a heat map")
        drawing = plots.heat_map_svg(each, f"h{i}")
        parts.append(f'<figure role="img" aria-label="{words}">{drawing}</figure>')
    text = filled(title, parts)
    files = folder / f"{name}.html", folder / f"{name}.png"
    write_files(dict(zip(files, (text.encode("utf-8"), image), strict=True)))
    return files


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Writes each file atomically, into a folder that is created if missing. Raises UserError, OSError."""
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file:
            file.write_bytes(content)


def page(
    title: str,
    groups: Mapping[str, Sequence[History]],
    found: Sequence[Section],
    look: Mapping[str, plots.Style],
    tables: Sequence[Table],
    notes: Sequence[str],
) -> str:
    """The page as HTML: notes, tables and plots, with all text escaped. Raises UserError like `plots.svg`."""
    parts = [_list("notes", [escape(note) for note in notes])] if notes else []
    parts += [table_html(table, f"table-{i}") for i, table in enumerate(tables)]
    if found:
        parts.append(_legend(groups, look))
    if any(len(runs) > 1 for runs in groups.values()):
        parts.append(
            "<p>Thick lines are means over the runs of a group, bands are their range, "
            "and thin lines are single runs. A mean ends where the first of its runs ends.</p>"
        )
    for i, section in enumerate(found):
        figures = [_figure(panel, look, f"s{i}p{j}") for j, panel in enumerate(section.panels)]
        parts.append(
            f"<section><h2>{escape(section.title)}</h2>\n<p>{escape(section.text)}</p>\n"
            f'<div class="panels">\n{"".join(figures)}</div></section>'
        )
    return filled(title, parts)


def filled(title: str, parts: Sequence[str]) -> str:
    """A page with this title and body."""
    themes = (
        " ".join(f"--c{i}: {pair[ground]};" for i, pair in enumerate(plots.COLOURS)) for ground in (0, 1)
    )
    light, dark = themes
    return _PAGE.substitute(title=escape(title), light=light, dark=dark, body="\n".join(parts))


def _figure(panel: Panel, look: Mapping[str, plots.Style], prefix: str) -> str:
    words = escape(description(panel))
    return f'<figure role="img" aria-label="{words}">{plots.svg(panel, look, prefix)}</figure>\n'


def _legend(groups: Mapping[str, Sequence[History]], look: Mapping[str, plots.Style]) -> str:
    items = []
    for group, runs in groups.items():
        style = look[group]
        count = f" ({len(runs)} runs)" if len(runs) > 1 else ""
        key = (
            f'<span style="color: var(--c{style.colour})" aria-hidden="true">━{_GLYPHS[style.marker]}━</span>'
        )
        items.append(f"{key} {escape(group)}{count}")
    return _list("legend", items)


def _list(name: str, items: Sequence[str]) -> str:
    return f'<ul class="{name}">{"".join(f"<li>{item}</li>" for item in items)}</ul>'


def table_html(table: Table, name: str) -> str:
    """An HTML table that scrolls on a narrow screen, also by keyboard."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    body = "".join(
        f"<tr>{''.join(_cell(i, cell) for i, cell in enumerate(row))}</tr>\n" for row in table.rows
    )
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    return (
        f'<div class="table" role="region" tabindex="0" aria-labelledby="{name}"><table>\n'
        f'<caption id="{name}">{escape(table.title)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>{note}"
    )


def _cell(place: int, text: str) -> str:
    if place == 0:
        return f'<th scope="row">{escape(text)}</th>'
    return f"<td>{escape(text)}</td>"
