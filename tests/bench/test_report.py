"""The report of measured numbers: from files alone, GPUs first, ratios against this project's best."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from bench import report
from hrm.study.results import compare_runs
from tests.support.studies import history

CPU = {"gpu": None, "processor": "Chip & Co", "threads": 2, "cores": 4, "versions": {"torch": "2.13.0"}}
GPU = {**CPU, "gpu": "GPU X"}
COMMIT = {"id": "0123456789abcdef", "dirty": False}


def row(program, model, code, median, **info):
    implementation, mode, dtype = code.split()
    named = {
        "program": program,
        "model": model,
        "implementation": implementation,
        "mode": mode,
        "dtype": dtype,
    }
    figures = {"samples/s": 1234.5, "TFLOP/s": 0.0721, "peak_memory_mib": 34.4}
    return {
        "name": "test",
        "extra_info": {**CPU, **named, **figures, **info},
        "stats": {"median": median},
    }


def kept(folder: Path, name: str, rows: list, commit: dict = COMMIT) -> None:
    (folder / name).write_text(json.dumps({"benchmarks": rows, "commit_info": commit}))


@pytest.fixture
def results(tmp_path) -> Path:
    """What is always there: three seeds of the quick preset, a built data set, a row of an operation."""
    runs = [
        {"eval/all/exact_accuracy": a, "seconds": s} for a, s in ((0.99, 200.4), (0.97, 210.6), (0.95, 205))
    ]
    (tmp_path / "quick_cpu.json").write_text(json.dumps({"runs": runs, "cores": 2}))
    built = {"name": "test_build_sudoku", "extra_info": {"peak_memory_mib": 372}, "stats": {"median": 5.28}}
    operation = {"name": "test_operation[x]", "extra_info": {"op": "x"}, "stats": {"median": 1}}
    kept(tmp_path, "cpu.json", [operation, built])
    return tmp_path


def with_steps(folder: Path, *steps) -> Path:
    file = json.loads((folder / "cpu.json").read_text())
    kept(folder, "cpu.json", [*file["benchmarks"], *steps])
    return folder


def steps() -> list:
    return [
        row("solving a batch", "gated-B1", "ours compile float32", 0.0063, peak_memory_mib=0.14),
        row("training step", "gated-B2", "ours compile float32", 0.04),
        row("training step", "gated-B2", "plain eager float32", 0.1),
        row("training step", "gated-B2", "ours compile bfloat16", 0.02),
        row("training step", "v1-B2", "ours compile float32", 0.2),
        row("training step", "v1-B2", "ours eager float32", 0.25),
        row("training step", "v1-B2", "plain eager float32", 0.3),
        row("training step", "v1-B2", "official compile float32", 0.31),
        row("training step", "v1-B2", "ours compile bfloat16", 0.15),
    ]


def cells(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_without_steps_there_are_no_tables_of_them(results):
    text = report.table(results)
    assert cells(text) == [
        ["what", "measured", "file"],
        ["---"] * 3,
        [
            "`make train`: unseen grids solved exactly, 3 seeds",
            "97.0 % ± 2.0 (99.0, 97.0, 95.0)",
            "quick_cpu.json",
        ],
        [
            "`make train`: from start to end on 2 cores",
            "200 to 211 s",
            "quick_cpu.json",
        ],
        [
            "`python -m hrm.data sudoku`: 1,000 generated 9x9 puzzles with 1,000 augmentations each",
            "5.3 s; 372 MiB",
            "cpu.json",
        ],
    ]
    assert "svg" not in text and "GPU" not in text


def test_a_shared_cpu_has_rows_of_its_own(results):
    runs = [{"eval/all/exact_accuracy": a, "seconds": s} for a, s in ((0.99, 300.4), (0.98, 280.6))]
    (results / "quick_busy_cpu.json").write_text(json.dumps({"runs": runs}))
    rows = cells(report.table(results))
    what, measured = (
        "`make train` with one busy process on 2 cores, 2 seeds",
        "281 to 300 s; 98.0 to 99.0 % solved",
    )
    assert rows[4] == [what, measured, "quick_busy_cpu.json"]
    assert what not in report.summary(results)


def test_steps_are_grouped_by_program_and_compared_with_ours(results):
    text = report.table(with_steps(results, *steps()))
    assert "`cpu.json`: Chip & Co (2 of 4 cores), float32, PyTorch 2.13.0, commit 0123456.\n" in text
    assert "](../bench/results/steps.svg)" in text
    _, table = text.split("`cpu.json`:")
    head, rule, gated, v1, solving = cells(table)
    assert head == [
        *("model", "ours", "samples/s", "rate", "memory"),
        *("ours, eager", "plain, eager", "official, compile", "ours, compile, bfloat16"),
    ]
    assert rule == ["---"] * len(head)
    ours = ["1,234", "72 GFLOP/s", "34 MiB"]
    assert gated == ["training step, `gated-B2`", "40 ms (compile)", *ours, "", "2.50x", "", "0.50x"]
    assert v1 == ["training step, `v1-B2`", "200 ms (compile)", *ours, "1.25x", "1.50x", "1.55x", "0.75x"]
    assert solving[:2] == ["solving a batch, `gated-B1`", "6.3 ms (compile)"]
    assert solving[4:] == ["0.1 MiB", "", "", "", ""]


def test_gpus_come_first_with_their_additional_figures(results):
    base = {
        **{"gpu": "GPU X", "TFLOP/s": 512.4, "roofline_share": 0.654, "peak_memory_mib": 20480},
        **{"kernels": 650, "launches": 4},
    }
    kept(
        results,
        "cuda_x.json",
        [
            row("training step", "v1-B768", "ours graph bfloat16", 0.06, **base, host_share=0.034),
            row("training step", "v1-B768", "ours eager bfloat16", 0.09, **base, host_share=0.9),
            row("training step", "v1-B768", "official compile bfloat16", 0.078, **base),
            row("solving a batch", "v1-B768", "ours graph bfloat16", 0.3, **base),
        ],
        {**COMMIT, "dirty": True},
    )
    text = report.table(with_steps(results, *steps()))
    assert text.index("cuda_x.json") < text.index("`cpu.json`: ")
    assert "`cuda_x.json`: GPU X, bfloat16, PyTorch 2.13.0, commit 0123456, with changes.\n" in text
    head, _, training, solving = cells(text.split("`cuda_x.json`:")[1].split("`cpu.json`: ")[0])
    assert head[5:] == ["launches", "host", "ours, eager", "official, compile"]
    figures = ["60 ms (graph)", "1,234", "512 TFLOP/s, 65% of the roofline", "20,480 MiB"]
    assert training[1:] == [*figures, "4 for 650 kernels", "3%", "1.50x", "1.30x"]
    assert solving[5:] == ["4 for 650 kernels", "", "", ""]


def test_a_model_whose_own_row_is_missing_is_left_out(results):
    rows = [row("training step", "v1-B2", "official eager float32", 0.3)]
    assert report.table(with_steps(results, *rows)) == report.table(results)
    assert "v1-B2" not in report.table(results)


def test_the_plot_is_as_long_as_the_ratios(results):
    folder = with_steps(results, *steps())
    svg = report.plot(folder)
    assert svg == report.plot(folder)
    root = ElementTree.fromstring(svg)
    name = "{http://www.w3.org/2000/svg}"
    background, *bars = root.findall(f"{name}rect")
    texts = [text.text for text in root.findall(f"{name}text")]
    assert background.get("fill") == "white" and background.get("height") == root.get("height")
    ratios = [1, 2.5, 0.5, 1, 1.25, 1.5, 1.55, 0.75]
    widths = [float(bar.get("width", 0)) for bar in bars]
    assert max(widths) == report.BAR
    assert [width / widths[0] for width in widths] == pytest.approx(ratios, abs=1e-3)
    colours = [bar.get("fill") for bar in bars]
    assert colours[0] == colours[2] == colours[3] and len({*colours[:2], colours[6]}) == 3
    assert texts[0] == "training step, gated-B2 (cpu.json)" and "310 ms, 1.55x" in texts
    assert "ours, compile, bfloat16" in texts and not any("solving" in text for text in texts if text)
    # One line is under the other, and all are inside.
    heights = [float(bar.get("y", 0)) for bar in bars]
    assert heights == sorted(set(heights)) and heights[-1] + 14 <= float(root.get("height", 0))


def test_text_from_files_is_escaped(results):
    svg = report.plot(with_steps(results, row("training step", "a<b&c", "ours eager float32", 1.0)))
    texts = [element.text for element in ElementTree.fromstring(svg).iter() if element.text]
    assert any("a<b&c" in text for text in texts)


def test_the_stored_plot_matches_the_results():
    if report.step_files(report.RESULTS):
        assert report.PLOT.read_text(encoding="utf-8") == report.plot()
    else:
        assert not report.PLOT.exists()


def test_gate_statistics_are_reported_as_a_share(results):
    info = {**CPU, "model": "gated-B2", "share": 0.00314}
    kept(results, "gates_cpu.json", [{"extra_info": info, "stats": {"median": 1}}])
    line = "| gate statistics in the log of `gated-B2`, as a share of step time | 0.31 % |"
    assert f"{line} gates_cpu.json |" in report.table(results)


def test_a_study_has_a_row_for_each_candidate(results):
    v1 = {0: history({10: 0.2, 20: 0.8}, pace=0.02), 1: history({10: 0.4, 20: 0.6}, pace=0.02)}
    slow = {seed: history({10: 0.5, 20: 0.9}, pace=0.04, ema={10: 0, 20: 0.1}) for seed in (0, 1)}
    for run in (*v1.values(), *slow.values()):
        run.metrics["model/parameters"] = (np.array([0]), np.array([1234.0]))
    found = compare_runs({"v1": v1, "slow": slow}, "v1")
    made_by = {"processor": "Chip", "cores": 2, "versions": {"torch": "2.13.0"}, "commit": "0123456789"}
    command = "python -m hrm.compare v1 slow --output /somewhere"
    folder = results / "record_cpu"
    folder.mkdir()
    (folder / "results.json").write_text(
        json.dumps({**found, "made_by": made_by, "seeds": [0, 1], "command": command})
    )
    conditions, rows, image = report.study_parts(results)
    assert "Chip, 2 cores, PyTorch 2.13.0, commit 0123456; seeds 0, 1; " in conditions
    assert "`python -m hrm.compare v1 slow`." in conditions
    head, _, *lines = rows.splitlines()
    assert "Equal steps: after 20" in head and "steps until 63 % are solved" in head
    assert [line.split(" | ")[0] for line in lines] == ["| v1", "| slow", "| slow (EMA)"]
    assert lines[0].startswith("| v1 | 1,234 | 20 ms | 70.0 % ± 14.1 | - | 70.0 % ± 14.1 | - |")
    # In the 0.4 s that v1 takes, the slow one makes 10 of its 20 steps.
    assert lines[1].startswith("| slow | 1,234 | 40 ms | 90.0 % ± 0.0 | +20.0 [")
    assert "| 50.0 % ± 0.0 | -20.0 [" in lines[1]
    assert lines[2].startswith("| slow (EMA) |  |  | 10.0 % ± 0.0 |") and lines[2].endswith("| - | - |")
    assert "(../bench/results/record_cpu/report.png)" in image
    assert report.table(results).endswith(image)
    # A baseline that solves nothing has no share to reach.
    (folder / "results.json").write_text(
        json.dumps({**found, "aims": {}, "made_by": made_by, "seeds": [0, 1], "command": command})
    )
    head, _, first, *_ = report.study_parts(results)[1].splitlines()
    assert "are solved" not in head and first.count("|") == head.count("|")


def test_only_text_between_the_markers_is_replaced():
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    new = report.with_measured(text, "new | table")
    assert new == f"before\n{report.BEGIN}\nnew | table\n{report.END}\nafter\n"
    assert report.with_measured(new, "new | table") == new


def test_models_in_the_readme_can_be_chosen():
    """What a kept table calls a model is what -k takes."""
    for _, file in report.step_files(report.RESULTS):
        for (_, model), rows in report.groups(file).items():
            assert all(f"[{model}-" in row["name"] for row in rows)
            assert re.fullmatch(r"[\w-]+", model)


def test_fault_results_are_reported(results):
    soak = {"kills": 3, "kills_in_a_save": 2, "steps": 1234, "identical": True}
    whole = {**soak, "steps_lost_beyond_the_last_checkpoint": 0}
    (results / "soak.json").write_text(json.dumps(whole))
    fuzz = {"inputs": 2000, "findings": 1, "targets": {"a": {"places": 3}, "b": {"places": 4}}}
    (results / "fuzz.json").write_text(json.dumps(fuzz))
    table = report.table(results)
    assert (
        "| `make soak`: a run killed 3 times (2 during a save), compared with an uninterrupted run | "
        "0 steps lost beyond the last checkpoint; identical bits after 1,234 steps | soak.json |"
    ) in table
    assert (
        "| `make fuzz`: 2,000 malicious inputs to 2 readers | 1 tracebacks; "
        "rejected in 7 places | fuzz.json |"
    ) in table


def test_checkpoint_cost_is_reported_as_a_share(results):
    times = {"stall_seconds": 0.004, "foreground_seconds": 0.03}
    info = {**CPU, **times, "model": "gated-B2", "interval": 100, "share": 0.0043}
    kept(results, "saving_cpu.json", [{"extra_info": info, "stats": {"median": 1}}])
    assert (
        "| a checkpoint every 100 steps of `gated-B2`, as a share of step time | 0.4 %; "
        "stops for 4 ms, or 30 ms without a thread | saving_cpu.json |"
    ) in report.table(results)
