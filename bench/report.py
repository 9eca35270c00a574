"""The README's table of measured numbers, made from bench/results/ and from nothing else.

`python -m bench.report` prints it, `python -m bench.report --write` puts it into the README.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- measured: made by bench/report.py -->", "<!-- end of measured -->"


def quick_rows() -> list[tuple[str, str, str]]:
    """Accuracy and time of the quick preset over its seeds."""
    file = RESULTS / "quick_cpu.json"
    results = json.loads(file.read_text())
    exact = [100 * run["eval/all/exact_accuracy"] for run in results["runs"]]
    seconds = [run["seconds"] for run in results["runs"]]
    each = ", ".join(f"{value:.1f}" for value in exact)
    return [
        (
            f"`make train`: unseen grids solved exactly, {len(exact)} seeds",
            f"{statistics.mean(exact):.1f} % ± {statistics.stdev(exact):.1f} ({each})",
            file.name,
        ),
        (
            f"`make train`: from start to end on {results['cores']} cores, compiling included",
            f"{min(seconds):.0f} to {max(seconds):.0f} s",
            file.name,
        ),
    ]


def benchmark_rows() -> list[tuple[str, str, str]]:
    """The benchmark suite's rows: training steps side by side as medians and ratios to ours compiled."""
    file = RESULTS / "cpu.json"
    rows, groups = [], dict[str, dict[str, Any]]()
    for row in json.loads(file.read_text())["benchmarks"]:
        info = row["extra_info"]
        if "model" in info:
            groups.setdefault(info["model"], {})[info["implementation"]] = row
        elif "op" not in info:
            what = "`python -m hrm.data sudoku`: 1,000 generated 9x9 puzzles with 1,000 augmentations each"
            rows.append((what, f"{row['stats']['median']:.1f} s; {info['peak_memory_mib']} MiB", file.name))
    for model, implementations in groups.items():
        best = implementations["ours, compile"]["stats"]["median"]
        for implementation, row in implementations.items():
            median, memory = row["stats"]["median"], row["extra_info"]["peak_memory_mib"]
            ratio = "" if implementation == "ours, compile" else f", {median / best:.2f}x ours"
            what = f"training step, {model}: {implementation}"
            rows.append((what, f"{1000 * median:.1f} ms{ratio}; {memory:.0f} MiB", file.name))
    return rows


def table() -> str:
    """The Markdown table."""
    lines = ["| what | measured | file |", "|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in [*quick_rows(), *benchmark_rows()]])


def readme_with(text: str, measured: str) -> str:
    """The README's text with the table between its markers replaced."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{measured}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        README.write_text(readme_with(README.read_text(), table()))
    else:
        print(table())
