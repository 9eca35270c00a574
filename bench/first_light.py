"""The first minutes on a GPU: runs everything that needs a GPU, most informative first.

`python -m bench.first_light` (or `make gpu`) runs each stage in a separate process, with a time limit in
seconds, and writes its result before the next stage starts, so that a crash, a hang or an interruption costs
one stage. The same command continues: stages in the file with the same commit, GPU and versions are not
repeated. On a machine without a GPU, stages run at a small size or report why they are skipped. `--only`
selects stages, `--out` the file. The last output is the table of goals, with predictions and measurements.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import rows
from bench.ceilings import measure
from bench.goals import goals, table
from bench.implementations import built, traced
from bench.rows import Code, machine, published, quick, setting
from hrm.common.errors import run_command
from hrm.common.files import write_whole
from kernels import measured
from tests.support import official

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
SHOWN_LINES = 30
Result = dict[str, Any]


class Skipped(Exception):
    """A stage cannot run here; the text is the reason."""


class Failed(Exception):
    """A stage failed. result: its results so far."""

    def __init__(self, reason: str, result: Result) -> None:
        super().__init__(reason)
        self.result = result


def cuda() -> bool:
    return torch.cuda.is_available()


@cache
def computes() -> bool:
    """Whether the CUDA device computes values; a stand-in device does not."""
    return torch.ones(3, device="cuda").mul(2).sum().item() == 6


def needs_values() -> None:
    if not cuda():
        raise Skipped("needs a CUDA device; this machine has none")
    if not computes():
        raise Skipped("needs a CUDA device that computes values; this one computes none")


def skips_stand_in() -> None:
    """On a CPU a stage runs at a small size."""
    if cuda():
        needs_values()


# ---------------------------------------------------------------------------------------------------- stages


def ceilings() -> Result:
    """Measures peak copy bandwidth and product rate."""
    if cuda():
        found = measure()
        return {"copy_gb_s": found.bytes_per_s / 1e9, "bf16_tflop_s": found.flop_per_s / 1e12}
    n, a = 1024, torch.randn(1024, 1024)
    source, times = torch.empty(2**26, dtype=torch.uint8), {"copy": 1e9, "product": 1e9}
    target = torch.empty_like(source)
    for _ in range(5):
        for name, call in (("copy", lambda: target.copy_(source)), ("product", lambda: a @ a)):
            start = time.perf_counter()
            call()
            times[name] = min(times[name], time.perf_counter() - start)
    return {"copy_gb_s": 2 * 2**26 / times["copy"] / 1e9, "fp32_tflop_s": 2 * n**3 / times["product"] / 1e12}


def kernels_against_float64() -> Result:
    """Runs tests/kernels with memory filled with NaN; on a CPU one kernel in the interpreter."""
    one = ["tests/kernels/test_rms_norm.py", "-k", "test_outputs_and_gradients and shape1"]
    return tested(["tests/kernels"] if cuda() else one)


def tested(words: list[str], before: tuple[str, ...] = ()) -> Result:
    """The counts of a run of pytest; raises Failed with the names of tests that fail."""
    done = subprocess.run(
        [*before, sys.executable, "-m", "pytest", "-q", "-rf", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    text = done.stdout + done.stderr
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|skipped|error)", text)}
    # If pytest's options suppress the counts, it prints a dot per test.
    counts = counts or {"passed": sum(map(len, re.findall(r"^(\.+)", text, re.M)))}
    result: Result = {**counts, "failures": re.findall(r"^FAILED (.+)", text, re.M)[:SHOWN_LINES]}
    if (errors := re.search(r"ERROR SUMMARY: (\d+) error", text)) is not None:
        result["sanitizer_errors"] = int(errors[1])
    if done.returncode or result.get("sanitizer_errors"):
        tail = text.splitlines()[-SHOWN_LINES:]
        raise Failed(f"pytest ends with status {done.returncode}", {**result, "tail": tail})
    return result


def capture() -> Result:
    """Compares losses of replayed and eager steps, for v1 and gated."""
    found: Result = {}
    for arch in ("v1", "gated"):
        losses = {mode: losses_of(Code("ours", mode, "bfloat16"), published(arch, 96, 81)) for mode in MODES}
        off = [abs(a / b - 1) for a, b in zip(losses["graph"], losses["eager"], strict=True)]
        found[arch] = {**losses, "largest_difference": max(off)}
        # This comparison is also False for NaN.
        if not max(off) <= rows.BOUNDS["bfloat16"]["losses"]:
            raise Failed(f"{arch}: replayed losses differ by {max(off):.3g}", found)
    return found


MODES = ("graph", "eager")


def losses_of(code: Code, model: rows.Model, steps: int = 8) -> list[float]:
    """The losses of warm-up steps, the capture, and replays."""
    config, data = setting(model, code)
    torch._dynamo.reset()
    with built(code.implementation, config, data, torch.device(model.device), torch.bfloat16) as ours:
        losses = []
        for _ in range(steps):
            ours.train()
            losses.append(ours.loss())
    return losses


def sanitizer() -> Result:
    """Runs compute-sanitizer on one launch of each kernel."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        raise Skipped("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    chosen = [
        "bench/test_kernels.py",
        "--benchmark-disable",
        "-k",
        "B1-forward-ours or B1-backward-ours or B1-update-ours",
    ]
    return tested(chosen, (tool, "--tool", "memcheck"))


def choice() -> Result:
    """Runs `python -m kernels --measure` at the published sizes."""
    done = subprocess.run(
        [sys.executable, "-m", "kernels", "--measure", "--json"], cwd=ROOT, capture_output=True, text=True
    )
    kept = measured.from_text(done.stdout, measured.made_by(torch.device("cuda")))
    if kept is None:
        raise Failed("the measurement fails", {"tail": done.stderr.splitlines()[-SHOWN_LINES:]})
    return {"choices": kept.table.choices, "tiles": kept.table.tiles, "rows": kept.rows}


def benchmarks(file: str, chosen: str) -> Result:
    """Times rows of the suite in one process: the description, median and figures of each."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        words = [f"bench/{file}", "--benchmark-only", f"--benchmark-json={out}", "-k", chosen]
        try:
            result = tested(words)
        except Failed as error:
            result = {**error.result, "failure": str(error)}
        found = json.loads(out.read_text())["benchmarks"] if out.exists() and out.stat().st_size else []
    result["rows"] = [
        {"median_s": row["stats"]["median"], "iqr_s": row["stats"]["iqr"], **row["extra_info"]}
        for row in found
    ]
    if "failure" in result or not found:
        raise Failed(result.get("failure", "no row was timed"), result)
    return result


def training_step() -> Result:
    """Times v1 at B=768 and 96 and the official compiled step, or without HRM_REPO this project's without
    kernels."""
    if not cuda():
        return benchmarks("test_step.py", "training_step and quick and eager and (ours or plain)")
    rival = "official-compile" if official.missing() is None else "reference-compile"
    return benchmarks(
        "test_step.py", f"training_step and v1 and S81 and (B768 or B96) and (ours-graph or {rival})"
    )


def solve() -> Result:
    """Times the solution of one puzzle with all steps."""
    small = "v1 and quick and B1 and ours and eager"
    return benchmarks("test_inference.py", "v1 and B1-S81 and ours-graph" if cuda() else small)


def profile() -> Result:
    """Profiles the kernels of a training step, the slowest first."""
    model, mode = (published("v1", 768, 81), "graph") if cuda() else (quick("v1", 8), "eager")
    code = Code("ours", mode, "bfloat16" if cuda() else "float32")
    config, data = setting(model, code)
    device, kind = torch.device(model.device), "kernel" if cuda() else "cpu_op"
    with built("ours", config, data, device, getattr(torch, code.dtype)) as ours:
        for _ in range(6):
            ours.train()
        events = [event for event in traced(ours.train, device) if event.get("cat") == kind]
    by_name: dict[str, list[float]] = {}
    for event in events:
        by_name.setdefault(event["name"][:120], []).append(event["dur"])
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:SHOWN_LINES]
    top = [{"name": name, "calls": len(each), "us": round(sum(each), 1)} for name, each in longest]
    return {"launches": len(events), "top": top}


def training() -> Result:
    """Trains for a minute after compilation and measurement; the loss must fall."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["preset=quick", f"output_dir={folder}", "project_name=p", "run_name=r", "log_interval=10"]
        words += ["max_seconds=180"] if cuda() else ["max_steps=40", "mode=eager", "eval_samples=8"]
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, capture_output=True, text=True)
        seconds, log = time.perf_counter() - start, Path(folder, "p", "r", "metrics.jsonl")
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    said = (done.stdout + done.stderr).splitlines()
    result: Result = {"seconds": round(seconds, 1), "losses": losses, "said": said[-SHOWN_LINES:]}
    if len(losses) < 2 or not losses[-1] < losses[0]:
        raise Failed("the loss does not fall", result)
    return result


class Stage(NamedTuple):
    """A stage: a function, its time limit in seconds, and a check that raises Skipped if it cannot run."""

    run: Callable[[], Result]
    budget: int
    needs: Callable[[], None] = skips_stand_in


STAGES = {
    "ceilings": Stage(ceilings, 90),
    "kernels": Stage(kernels_against_float64, 300),
    "capture": Stage(capture, 240, needs_values),
    "sanitizer": Stage(sanitizer, 180, needs_values),
    "choice": Stage(choice, 240, needs_values),
    "step": Stage(training_step, 420),
    "solve": Stage(solve, 180),
    "profile": Stage(profile, 180),
    "training": Stage(training, 300),
}


# --------------------------------------------------------------------------------------------------- the runs


def key() -> dict[str, Any]:
    """The conditions of results: commit, sources, GPU and versions."""
    git, sources = ["git", "-C", str(ROOT)], [":/", ":!/bench/results"]
    commit, changes = (
        subprocess.run([*git, *words], capture_output=True, text=True).stdout.strip()
        for words in (["rev-parse", "HEAD"], ["diff", "HEAD", "--", *sources])
    )
    digest = hashlib.sha256(changes.encode()).hexdigest()[:16]
    here = measured.made_by(torch.device("cuda" if cuda() else "cpu"))
    where = {name: machine()[name] for name in ("gpu", "processor", "versions")}
    return {"commit": commit or None, "changes": changes and digest, **where, "measured_by": here}


def in_a_process(name: str, budget: float) -> Result:
    """Runs a stage in a separate process, which is killed at the end with its children; returns its outcome.

    A stage that cannot run starts no process, because importing PyTorch takes long on a slow machine.
    """
    try:
        STAGES[name].needs()
    except Skipped as reason:
        return {"status": "skipped", "reason": str(reason), "seconds": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "outcome.json", Path(folder) / "log"
        words = [sys.executable, "-m", "bench.first_light", "--stage", name, "--out", str(out)]
        start = time.perf_counter()
        with log.open("w") as written:
            process = subprocess.Popen(
                words, cwd=ROOT, stdout=written, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status: int | None = process.wait(budget)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        seconds = round(time.perf_counter() - start, 1)
        tail = log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
        if status is None:
            return {
                "status": "over budget",
                "reason": f"took more than {budget:g} s",
                "seconds": seconds,
                "tail": tail,
            }
        try:
            return {**json.loads(out.read_text()), "seconds": seconds}
        except (OSError, ValueError):
            return {"status": "crashed", "reason": f"exit status {status}", "seconds": seconds, "tail": tail}


def outcome(stage: Stage) -> Result:
    """Runs a stage in this process; returns its status, and its result or the reason of the failure."""
    try:
        stage.needs()
        return {"status": "done", "result": stage.run()}
    except Skipped as reason:
        return {"status": "skipped", "reason": str(reason)}
    except Failed as error:
        return {"status": "failed", "reason": str(error), "result": error.result}


def read(path: Path, now: dict[str, Any]) -> dict[str, Result]:
    """The stages in a file for this commit, GPU and versions."""
    try:
        found = json.loads(path.read_text())
        return dict(found["stages"]) if found["key"] == now else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def run_all(
    path: Path,
    only: list[str],
    now: dict[str, Any],
    run: Callable[[str, float], Result] = in_a_process,
    say: Callable[[str], None] = print,
) -> dict[str, Result]:
    """Runs the unfinished stages, and writes the file after each."""
    stages = read(path, now)
    for name in only:
        if stages.get(name, {}).get("status") in ("done", "skipped"):
            say(f"{name:<10} {stages[name]['status']} before")
            continue
        stages[name] = run(name, STAGES[name].budget)
        content = {"what": "first light: see bench/first_light.py", "key": now, "stages": stages}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({**content, "goals": goals(stages)}, indent=1) + "\n")
        found = stages[name]
        reason = f": {found['reason']}" if "reason" in found else ""
        say(f"{name:<10} {found['status']} in {found.get('seconds', 0):.0f} s{reason}")
    return stages


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.first_light", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="the file; default bench/results/first_light_<device>.json")
    parser.add_argument("--only", nargs="+", choices=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.stage:
        options.out.write_text(json.dumps(outcome(STAGES[options.stage])))
        return 0
    now = key()
    name = re.sub(r"\W+", "_", (now["gpu"] or "cpu").lower().removeprefix("nvidia ")).strip("_")
    path = options.out or RESULTS / f"first_light_{name}.json"
    print(f"first light on {now['gpu'] or now['processor']}, results in {path}", flush=True)
    stages = run_all(path, options.only or list(STAGES), now, say=lambda line: print(line, flush=True))
    print(f"\n{table(stages)}")
    return int(any(stages[name]["status"] not in ("done", "skipped") for name in options.only or STAGES))


if __name__ == "__main__":
    sys.exit(run_command(main, "the finished stages are saved; the same command continues"))
