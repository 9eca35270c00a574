"""Generates the measured numbers of README.md and docs/results.md from bench/results/.

`python -m bench.report` prints the tables. `--write` inserts them into both documents, and writes the plot to
bench/results/.
"""

import json
import statistics
import sys
from html import escape
from pathlib import Path
from typing import Any

from bench.beside import IDLE_CPUS
from hrm.common.errors import run_command
from hrm.common.text import counted
from hrm.study.results import tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
README, DOCUMENT = ROOT / "README.md", ROOT / "docs" / "results.md"
PLOT = RESULTS / "steps.svg"
# Folders of `bench.studies`, each with the text of its plot.
STUDIES = {
    "architectures_cpu": "The architectures compared",
    "ingredients_cpu": "The ingredients of the record recipe",
    "record_cpu": "The record recipe and TRM",
}
SHARED = {
    "quick_busy_cpu.json": "with one busy process on 2 cores",
    "quick_quota_cpu.json": "in a container of 1.5 CPUs",
}
BEGIN, END = "<!-- measured: made by bench/report.py -->", "<!-- end of measured -->"
PROGRAMS = ("training step", "evaluation of a batch", "solving a batch")
Rows = list[dict[str, Any]]


# ----------------------------------------------------------------------------------------- what was measured


def quick_rows(results: Path) -> list[tuple[str, str, str]]:
    """Accuracy and time of the quick preset over its seeds."""
    file = results / "quick_cpu.json"
    found = json.loads(file.read_text())
    exact = [100 * run["eval/all/exact_accuracy"] for run in found["runs"]]
    seconds = [run["seconds"] for run in found["runs"]]
    each = ", ".join(f"{value:.1f}" for value in exact)
    others = max((run.get("other_cpus") or 0 for run in found["runs"]), default=0)
    beside = f", while other processes used up to {others:.1f} CPUs" if others > IDLE_CPUS else ""
    return [
        (
            f"`make train`: unseen grids solved exactly, {len(exact)} seeds",
            f"{statistics.mean(exact):.1f} % ± {statistics.stdev(exact):.1f} ({each})",
            file.name,
        ),
        (
            f"`make train`: from start to end on {found['cores']} cores",
            f"{min(seconds):.0f} to {max(seconds):.0f} s{beside}",
            file.name,
        ),
    ]


def shared_rows(results: Path) -> list[tuple[str, str, str]]:
    """Time and accuracy of the quick preset on a CPU that other processes use too."""
    rows = []
    for name, condition in SHARED.items():
        if (results / name).exists():
            runs = json.loads((results / name).read_text())["runs"]
            seconds = _span([f"{run['seconds']:.0f}" for run in runs])
            exact = _span([f"{100 * run['eval/all/exact_accuracy']:.1f}" for run in runs])
            measured = f"{seconds} s; {exact} % solved"
            rows.append((f"`make train` {condition}, {counted(len(runs), 'seed')}", measured, name))
    return rows


def _span(values: list[str]) -> str:
    """The minimum and the maximum of some numbers, or the number if they are equal."""
    least, greatest = min(values, key=float), max(values, key=float)
    return least if least == greatest else f"{least} to {greatest}"


def data_rows(results: Path) -> list[tuple[str, str, str]]:
    """Building a data set."""
    file = results / "cpu.json"
    what = "`python -m hrm.data sudoku`: 1,000 generated 9x9 puzzles with 1,000 augmentations each"
    return [
        (what, f"{row['stats']['median']:.1f} s; {row['extra_info']['peak_memory_mib']} MiB", file.name)
        for row in json.loads(file.read_text())["benchmarks"]
        if row["name"] == "test_build_sudoku"
    ]


def gate_rows(results: Path) -> list[tuple[str, str, str]]:
    """The cost of gate statistics."""
    found = []
    for file in sorted(results.glob("gates_*.json")):
        for row in json.loads(file.read_text())["benchmarks"]:
            info = row["extra_info"]
            what = f"gate statistics in the log of `{info['model']}`, as a share of step time"
            found.append((what, f"{100 * info['share']:.2f} %", file.name))
    return found


def saving_rows(results: Path) -> list[tuple[str, str, str]]:
    """The cost of background checkpoints."""
    rows = []
    for file in sorted(results.glob("saving_*.json")):
        for benchmark in json.loads(file.read_text())["benchmarks"]:
            info = benchmark["extra_info"]
            what = (
                f"a checkpoint every {info['interval']} steps of `{info['model']}`, as a share of step time"
            )
            stall, foreground = (1000 * info[f"{name}_seconds"] for name in ("stall", "foreground"))
            share = f"{100 * info['share']:.1f} %"
            measured = f"{share}; stops for {stall:.0f} ms, or {foreground:.0f} ms without a thread"
            rows.append((what, measured, file.name))
    return rows


def fault_rows(results: Path) -> list[tuple[str, str, str]]:
    """The results of kills and hostile input."""
    rows = []
    if (file := results / "soak.json").exists():
        found = json.loads(file.read_text())
        same = "identical bits" if found["identical"] else "OTHER BITS"
        lost = f"{found['steps_lost_beyond_the_last_checkpoint']} steps lost beyond the last checkpoint"
        measured = f"{lost}; {same} after {found['steps']:,} steps"
        kills = f"killed {found['kills']} times ({found['kills_in_a_save']} during a save)"
        what = f"`make soak`: a run {kills}, compared with an uninterrupted run"
        rows.append((what, measured, file.name))
    if (file := results / "fuzz.json").exists():
        found = json.loads(file.read_text())
        places = sum(target["places"] for target in found["targets"].values())
        what = f"`make fuzz`: {found['inputs']:,} malicious inputs to {len(found['targets'])} readers"
        rows.append((what, f"{found['findings']} tracebacks; rejected in {places} places", file.name))
    return rows


def step_files(results: Path) -> list[tuple[str, dict[str, Any]]]:
    """Files with rows of `bench.rows`, by name, GPUs first."""
    paths = [*sorted(results.glob("cuda_*.json")), results / "cpu.json"]
    files = [(path.name, json.loads(path.read_text())) for path in paths]
    return [(name, file) for name, file in files if groups(file)]


def groups(file: dict[str, Any]) -> dict[tuple[str, str], Rows]:
    """A file's rows by program and model, in the order of PROGRAMS; our fastest row comes first."""
    found: dict[tuple[str, str], Rows] = {}
    for program in PROGRAMS:
        for row in file["benchmarks"]:
            if row["extra_info"].get("program") == program:
                found.setdefault((program, row["extra_info"]["model"]), []).append(row)
    return {key: rows for key, rows in found.items() if rows[0]["extra_info"]["implementation"] == "ours"}


def label(row: dict[str, Any], base: dict[str, Any]) -> str:
    """A row's implementation and mode, and its dtype if it differs from that of the baseline row."""
    info, usual = row["extra_info"], base["extra_info"]["dtype"]
    parts = [info["implementation"], info["mode"]] + [info["dtype"]] * (info["dtype"] != usual)
    return ", ".join(parts)


def ratio(row: dict[str, Any], base: dict[str, Any]) -> float:
    return row["stats"]["median"] / base["stats"]["median"]


# ------------------------------------------------------------------------------------------------- the tables


def milliseconds(row: dict[str, Any]) -> str:
    value = 1000 * row["stats"]["median"]
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def rate(info: dict[str, Any]) -> str:
    """TFLOP/s, or GFLOP/s below one; with the share of the roofline if measured."""
    flops = info["TFLOP/s"]
    text = f"{flops:.0f} TFLOP/s" if flops >= 1 else f"{1000 * flops:.0f} GFLOP/s"
    return text + (f", {info['roofline_share']:.0%} of the roofline" if "roofline_share" in info else "")


def step_table(name: str, file: dict[str, Any]) -> str:
    """A table of a file's programs and models: our times, and for other code the time relative to ours."""
    found = groups(file)
    first = next(iter(found.values()))[0]["extra_info"]
    # Other implementations, in the order of the model with most of them.
    place = {label(row, rows[0]): i for rows in sorted(found.values(), key=len) for i, row in enumerate(rows)}
    compared = {label(row, rows[0]) for rows in found.values() for row in rows[1:]}
    others = sorted(compared, key=place.__getitem__)
    columns = ["model", "ours", "samples/s", "rate", "memory"]
    columns += ["launches"] * ("launches" in first) + ["host"] * ("host_share" in first)
    lines = [f"| {' | '.join([*columns, *others])} |", "|---" * (len(columns) + len(others)) + "|"]
    for (program, model), rows in found.items():
        base, by_label = rows[0], {label(row, rows[0]): row for row in rows[1:]}
        info = base["extra_info"]
        cells = [
            f"{program}, `{model}`",
            f"{milliseconds(base)} ({info['mode']})",
            f"{info['samples/s']:,.0f}",
        ]
        memory = info["peak_memory_mib"]
        cells += [rate(info), f"{memory:,.{int(memory < 10)}f} MiB"]
        if "launches" in first:
            cells.append(f"{info['launches']} for {info['kernels']} kernels")
        if "host_share" in first:
            cells.append(f"{info['host_share']:.0%}" if "host_share" in info else "")
        cells += [f"{ratio(by_label[other], base):.2f}x" if other in by_label else "" for other in others]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([where(name, file, first), "", *lines])


def study_parts(results: Path) -> list[str]:
    """For each study: the command that trained it, a table, and the plot."""
    return [
        part
        for name, title in STUDIES.items()
        if (file := results / name / "results.json").is_file()
        for part in study_table(name, title, json.loads(file.read_text()))
    ]


def study_table(name: str, title: str, found: dict[str, Any]) -> list[str]:
    """A study's conditions, table and plot. found: its results.json."""
    at_steps, at_time, pace, *aims = tables(found)
    against = f"to {found['baseline']}"
    columns = ["", "parameters", "a step", at_steps.title, against, at_time.title, against]
    by_name = [{row[0]: row for row in each.rows} for each in (at_steps, at_time, pace)]
    reached: dict[str, list[str]] = {}
    if aims:
        # The last aim is the largest share of the baseline's score.
        reached = {row[0]: row[2:4] for row in aims[-1].rows}
        columns += [f"steps until {100 * list(found['aims'].values())[-1]:.0f} % are solved", against]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for candidate in by_name[0]:
        steps, time, own = (rows.get(candidate, ["", "", "", ""]) for rows in by_name)
        cells = [candidate, own[1], own[2], steps[2], steps[3], time[2], time[3]]
        lines.append(f"| {' | '.join([*cells, *reached.get(candidate, [])])} |")
    machine = found["made_by"]
    conditions = (
        f"`{name}/results.json`: {machine['processor']}, {machine['cores']} cores, PyTorch "
        f"{machine['versions']['torch']}, commit {machine['commit'][:7]}; seeds "
        f"{', '.join(map(str, found['seeds']))}; `{found['command'].partition(' --output')[0]}`. Solved: "
        "test puzzles right in every cell, mean ± sample deviation; differences are paired by seed, with "
        "their 95 % t interval."
    )
    return [conditions, "\n".join(lines), f"![{title}](../bench/results/{name}/report.png)"]


def where(name: str, file: dict[str, Any], info: dict[str, Any]) -> str:
    """The machine and versions of a file."""
    machine = info["gpu"] or f"{info['processor']} ({info['threads']} of {info['cores']} cores)"
    commit = file["commit_info"]
    changes = ", with changes" if commit.get("dirty") else ""
    torch = f"PyTorch {info['versions']['torch']}"
    return f"`{name}`: {machine}, {info['dtype']}, {torch}, commit {commit['id'][:7]}{changes}."


def table(results: Path = RESULTS) -> str:
    """The tables of docs/results.md, and the plot if there are steps."""
    rows = [*quick_rows(results), *shared_rows(results), *data_rows(results), *gate_rows(results)]
    parts = [row_table([*rows, *saving_rows(results), *fault_rows(results)])]
    files = step_files(results)
    if files:
        parts.append(f"![Training steps: time over ours](../bench/results/{PLOT.name})")
        parts += [step_table(*each) for each in files]
    return "\n\n".join([*parts, *study_parts(results)])


def row_table(rows: list[tuple[str, str, str]]) -> str:
    return "\n".join(
        ["| what | measured | file |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    )


def summary(results: Path = RESULTS) -> str:
    """The README's table: training on a laptop, speed relative to the official code, fault tolerance."""
    rows = [*quick_rows(results)]
    for name, file in step_files(results):
        for (program, model), (base, *others) in groups(file).items():
            info = base["extra_info"]
            for row in others:
                if program == PROGRAMS[0] and label(row, base) == "official, compile":
                    what = f"{program} of `{model}`: speed relative to the official compiled step"
                    measured = f"{ratio(row, base):.2f}x ({info['gpu'] or info['processor']})"
                    rows.append((what, measured, name))
    return row_table([*rows, *fault_rows(results)])


def with_measured(text: str, measured: str) -> str:
    """Replaces the text between a document's markers."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{measured}\n{END}{rest.split(END)[1]}"


# --------------------------------------------------------------------------------------------------- the plot

WIDTH, LEFT, BAR, LINE = 720, 190, 380, 18
COLOURS = {"ours": "#2f6fb0", "official": "#c8772a"}


def plot(results: Path = RESULTS) -> str:
    """A bar chart of training steps as SVG: the time of each row relative to ours, by model."""
    shapes: list[str] = []
    y = 8

    def text(x: float, words: str, style: str = "") -> None:
        shapes.append(f'<text x="{x:.1f}" y="{y + 13}"{style}>{escape(words)}</text>')

    for name, file in step_files(results):
        training = {key: rows for key, rows in groups(file).items() if key[0] == PROGRAMS[0]}
        longest = max((ratio(row, rows[0]) for rows in training.values() for row in rows), default=1.0)
        for (program, model), rows in training.items():
            text(8, f"{program}, {model} ({name})", ' font-weight="bold"')
            y += LINE
            for row in rows:
                times = ratio(row, rows[0])
                length = BAR * times / longest
                colour = COLOURS.get(row["extra_info"]["implementation"], "#8a8a8a")
                text(LEFT - 8, label(row, rows[0]), ' text-anchor="end"')
                bar = f'x="{LEFT}" y="{y + 2}" width="{length:.1f}" height="{LINE - 4}"'
                shapes.append(f'<rect {bar} fill="{colour}"/>')
                text(LEFT + length + 6, f"{milliseconds(row)}, {times:.2f}x")
                y += LINE
            y += LINE // 2
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" '
    head += 'font-family="sans-serif" font-size="12">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{y}" fill="white"/>', *shapes, "</svg>"]) + "\n"


def main() -> None:
    if sys.argv[1:] == ["--write"]:
        for path, measured in ((README, summary()), (DOCUMENT, table())):
            text = path.read_text(encoding="utf-8")
            path.write_text(with_measured(text, measured), encoding="utf-8")
        PLOT.write_text(plot(), encoding="utf-8")
    else:
        print(table())


if __name__ == "__main__":
    sys.exit(run_command(main, "nothing more was written"))
