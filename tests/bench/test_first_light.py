"""The stages of `make gpu`, without a GPU: their order, their budgets, what is kept, what is repeated."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import first_light, test_inference, test_step
from bench.first_light import STAGES, Failed, Skipped, Stage, outcome, read, run_all
from bench.goals import GOALS, goals, measurements, table
from tests.support.paths import ROOT

NOW = {"commit": "a", "gpu": None}


class Runner:
    """Stages that end as they are told."""

    def __init__(self, **ends: str) -> None:
        self.ends, self.ran = ends, list[str]()

    def __call__(self, name: str, budget: float) -> dict:
        self.ran.append(name)
        assert budget == STAGES[name].budget
        return {"status": self.ends.get(name, "done"), "seconds": 1.0}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "results" / "first.json"


def test_a_cut_costs_one_stage(path):
    class Cut(Runner):
        def __call__(self, name: str, budget: float) -> dict:
            if name == "sanitizer":
                raise KeyboardInterrupt
            return super().__call__(name, budget)

    with pytest.raises(KeyboardInterrupt):
        run_all(path, list(STAGES), NOW, Cut(capture="skipped", kernels="crashed"))
    assert list(json.loads(path.read_text())["stages"]) == ["ceilings", "kernels", "capture"]
    again = Runner()
    stages = run_all(path, list(STAGES), NOW, again)
    # What crashed is tried again; what is done or does not run here is not.
    assert again.ran == ["kernels", *list(STAGES)[3:]]
    assert set(stages) == set(STAGES) and read(path, NOW) == stages


def test_other_code_or_another_gpu_starts_again(path):
    run_all(path, ["ceilings"], NOW, Runner())
    assert (
        read(path, NOW) and not read(path, {**NOW, "commit": "b"}) and not read(path, {**NOW, "gpu": "H100"})
    )
    path.write_text(path.read_text()[:-9])
    assert read(path, NOW) == {}


def test_a_stage_that_hangs_or_dies_does_not_affect_others(monkeypatch, tmp_path):
    children = tmp_path / "children"
    program = f"""
import pathlib, subprocess, time
child = subprocess.Popen(["sleep", "60"])
pathlib.Path({str(children)!r}).write_text(str(child.pid))
print("hangs", flush=True)
time.sleep(60)
"""
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda words, **o: popen([sys.executable, "-c", program], **o))
    found = first_light.in_a_process("ceilings", 5.0)
    assert found["status"] == "over budget" and "5 s" in found["reason"] and found["tail"] == ["hangs"]
    child = int(children.read_text())
    for _ in range(100):
        if not os.path.exists(f"/proc/{child}") or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            break
        time.sleep(0.05)
    else:
        pytest.fail("what the stage started lives on")
    program = "import os; os.abort()"
    found = first_light.in_a_process("ceilings", 60.0)
    assert found["status"] == "crashed" and found["reason"] == "exit status -6"


def test_a_stage_reports_its_outcome():
    def skip():
        raise Skipped("no GPU")

    def fail():
        raise Failed("wrong", {"rows": 1})

    assert outcome(Stage(lambda: {"x": 1}, 1)) == {"status": "done", "result": {"x": 1}}
    assert outcome(Stage(skip, 1)) == {"status": "skipped", "reason": "no GPU"}
    assert outcome(Stage(fail, 1)) == {"status": "failed", "reason": "wrong", "result": {"rows": 1}}


@pytest.mark.parametrize("name", ["capture", "sanitizer", "choice"])
def test_stages_that_need_a_gpu_report_it(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert outcome(STAGES[name]) == {
        "status": "skipped",
        "reason": "needs a CUDA device; this machine has none",
    }


@pytest.mark.parametrize("name", STAGES)
def test_a_device_that_computes_no_values_is_not_measured(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(first_light, "computes", lambda: False)
    # Without a process, which could only find the same.
    monkeypatch.setattr(subprocess, "Popen", None)
    found = first_light.in_a_process(name, 1.0)
    assert found == {**outcome(STAGES[name]), "seconds": 0}
    assert found["status"] == "skipped" and "computes none" in found["reason"]


def row(implementation: str, mode: str, B: int, median: float, gpu: str | None = "H200") -> dict:
    return {
        "implementation": implementation,
        "mode": mode,
        "batch_size": B,
        "median_s": median,
        "gpu": gpu,
    }


def test_goals_are_predicted_and_measured():
    step = [row("ours", "graph", 768, 0.044), row("official", "compile", 768, 0.066)]
    step += [row("ours", "graph", 96, 0.006), row("reference", "compile", 96, 0.018)]
    stages = {
        "ceilings": {"result": {"copy_gb_s": 4300.0, "bf16_tflop_s": 790.0}},
        "step": {"result": {"rows": step}},
        "solve": {"result": {"rows": [row("ours", "graph", 1, 0.004)]}},
    }
    found = measurements(stages)
    # Only the official step says whether its goal is met.
    assert found == pytest.approx(
        {"step_b768_ms": 44.0, "step_b768_ratio": 1.5, "step_b96_ms": 6.0, "solve_b1_ms": 4.0}
    )
    rows = goals(stages)
    assert [each["measured"] for each in rows] == pytest.approx([44.0, 1.5, None, 4.0])
    assert (
        35 < rows[0]["predicted"] < 50 and 1.1 < rows[1]["predicted"] < 1.6 and 0 < rows[3]["predicted"] < 10
    )
    on_a_cpu = {"step": {"result": {"rows": [row("ours", "graph", 768, 1.0, gpu=None)]}}}
    assert measurements(on_a_cpu) == {} and all(each["measured"] is None for each in goals(on_a_cpu))
    assert all(line in table(stages) for line in ("1.5", "44", "at most 45 ms"))


def test_the_readme_has_the_goals_and_the_stages():
    text = (ROOT / "bench" / "README.md").read_text()
    assert set(re.findall(r"^\| (.+?) \| (.+?) \|$", text, re.M)) >= set(GOALS.values())
    section = text.partition("## First light")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.M) == list(STAGES)


def names(test) -> list[str]:
    """A benchmark's tests as pytest names them."""
    (mark,) = [mark for mark in test.pytestmark if mark.name == "parametrize"]
    return [f"{test.__name__}[{parameters.id}]" for parameters in mark.args[1]]


@pytest.mark.parametrize(
    ("test", "stage", "on_cuda", "count"),
    [
        (test_step.test_training_step, "step", True, 4),
        (test_step.test_training_step, "step", False, 2),
        (test_inference.test_inference, "solve", True, 1),
        (test_inference.test_inference, "solve", False, 1),
    ],
)
def test_a_stage_chooses_rows_that_the_suite_has(test, stage, on_cuda, count, monkeypatch):
    """A selection that finds nothing would show on the GPU only."""
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_cuda)
    monkeypatch.setattr(first_light, "computes", lambda: True)
    monkeypatch.setattr(first_light, "benchmarks", lambda file, chosen: asked.append(chosen) or {})
    assert outcome(STAGES[stage])["status"] == "done"
    # As pytest -k reads it: each word is looked for in the name.
    condition = re.sub(
        r"[\w-]+", lambda m: m[0] if m[0] in ("and", "or") else f"({m[0]!r} in name)", asked[0]
    )
    assert sum(eval(condition, {"name": name}) for name in names(test)) == count


@pytest.mark.slow
def test_the_command_runs_a_stage_to_its_end(tmp_path):
    out = tmp_path / "first.json"
    words = [sys.executable, "-m", "bench.first_light", "--only", "ceilings", "choice", "--out", str(out)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    stages = json.loads(out.read_text())["stages"]
    if not torch.cuda.is_available():
        assert stages["ceilings"]["result"]["copy_gb_s"] > 0 and stages["choice"]["status"] == "skipped"
    assert "training step, v1" in done.stdout
