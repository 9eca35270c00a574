"""The cost of many paths: seconds a path takes, over those of a plain evaluation of one path.

    python -m bench.paths RUN --write bench/results/paths_cpu.json

All evaluations run in one process, at one batch size, in turn; each figure is the median of the rounds.
Building the puzzles' data set and starting the process are left out.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from bench.beside import Beside
from bench.seeds import setting
from hrm.checkpoint.load_model import find_trained, load_trained
from hrm.common.errors import run_command
from hrm.common.files import write_whole
from hrm.data.dataset import PuzzleDataset, subset
from hrm.data.puzzle_kinds import kind_of
from hrm.engine.modes import resolve_mode
from hrm.evaluation.metrics import evaluate
from hrm.evaluation.paths import Plan, differences, evaluate_paths
from hrm.evaluation.selection import Rule

BATCH, PATHS, PUZZLES, ROUNDS = 64, 64, 7, 5
# Sources of the paths and rule; the last two choose early.
PLANS: tuple[tuple[str, Rule], ...] = (
    ("init", "q"),
    ("noise", "q"),
    ("symmetry", "q"),
    ("init", "vote"),
    ("init", "rules"),
)


def measure(path: str, data: str, mode_name: str) -> dict[str, Any]:
    """Seconds of a path, alone and among many of each kind, with and without early exit."""
    trained = load_trained(find_trained(path), device="cpu", data=Path(data))
    dataset, mode = PuzzleDataset(Path(data), "test"), resolve_mode(mode_name, trained.model.H_init.device)
    assert mode is not None
    kind = kind_of(dataset.metadata, dataset.sets)
    depth = trained.model.arch.halt_max_steps
    # As many paths in all as there are puzzles on one path.
    alone, few = (subset(dataset, count, 0) for count in (PATHS * PUZZLES, PUZZLES))
    seconds: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        found = evaluate(trained, dataset, batch_size=BATCH, mode=mode, examples=alone)["all"]
        seconds.setdefault("alone", []).append(found["seconds"] / (PATHS * PUZZLES))
        for by, select in PLANS:
            views, randomness = differences([by], kind, trained.model, seed=0)
            plan = Plan(PATHS, select, (depth,), views, randomness)
            many = evaluate_paths(
                trained, dataset, plan, batch_size=BATCH, mode=mode, examples=few, eval_act=True
            )["all"]
            for name, each in ((f"{by}, {select}", many), (f"{by}, {select}, early", many["eval_act"])):
                seconds.setdefault(name, []).append(each["seconds"] / (PATHS * PUZZLES))
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    ratios = {name: value / medians["alone"] for name, value in medians.items()}
    return {"mode": mode.name, "seconds_per_path": seconds, "ratio": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.paths", description=__doc__)
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("data", help="its data set")
    parser.add_argument("--mode", default="eager")
    parser.add_argument("--write", type=Path, metavar="FILE")
    args = parser.parse_args()
    with Beside() as beside:
        found = measure(args.run, args.data, args.mode)
    result = {**setting(), "paths": PATHS, "batch_size": BATCH, "other_cpus": beside.others, **found}
    if args.write:
        write_whole(args.write, json.dumps(result, indent=1) + "\n")
    for name, ratio in found["ratio"].items():
        print(f"{name}: {ratio:.2f}")


if __name__ == "__main__":
    sys.exit(run_command(main, "nothing was written"))
