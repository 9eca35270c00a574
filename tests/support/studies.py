"""Runs for comparisons: explicit series, and a fake trainer."""

from pathlib import Path
from typing import Any

import numpy as np

from hrm.study.history import History
from tests.support.runs import SMALL

CHANGES = ["arch.hidden_size=16", "epochs=2", "eval_interval=1"]
TINY = list({word.split("=")[0]: word for word in [*SMALL, *CHANGES]}.values())


def history(scores: dict[int, float], pace: float = 1.0, ema: dict[int, float] | None = None, **more: Any):
    """A run with the given exact accuracies by step. pace: seconds per step."""

    def series(points: dict[int, float]):
        return np.array(list(points), np.int64), np.array(list(points.values()))

    metrics = {"eval/all/exact_accuracy": series(scores), "train/seconds_per_step": series({1: pace})}
    metrics |= {"eval_ema/all/exact_accuracy": series(ema)} if ema else {}
    metrics |= {key: series(points) for key, points in more.items()}
    return History("run", Path("run"), None, max(scores), metrics)


STAND_IN = """
import json, os, sys, time
from pathlib import Path

words = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:])
run = Path(words["output_dir"]) / words["project_name"] / words["run_name"]
run.mkdir(parents=True, exist_ok=True)
gated, seed = "use_gating: true" in Path(words["config"]).read_text(), int(words["seed"])
print("pretending", *sys.argv[1:], os.environ.get("OMP_NUM_THREADS"))
if (run.parent.parent / f"fail-{run.name}").exists():
    sys.exit("error: as it was told")
if (run.parent.parent / "wait").exists():
    time.sleep(60)
scores = [0.1, 0.3 + 0.2 * gated + 0.1 * seed]
with open(run / "metrics.jsonl", "w") as file:
    for step, score in zip((6, 12), scores):
        line = {"step": step, "eval/all/exact_accuracy": score, "train/seconds_per_step": 1}
        print(json.dumps(line), file=file)
"""


def started(out: str) -> list[str]:
    return [line.split(": started")[0] for line in out.splitlines() if ": started" in line]
