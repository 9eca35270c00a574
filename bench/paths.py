"""The cost of many paths: CPU seconds per path, relative to a plain evaluation with one path.

    python -m bench.paths RUN DATA --write bench/results/paths_cpu.json

All evaluations run in one process, at one batch size, in turn; each figure is the median of the rounds. It
measures CPU time instead of elapsed time, so other processes have little effect. The start of the process is
excluded.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from bench.seeds import setting
from hrm.checkpoint.load_model import find_trained, load_trained
from hrm.common.errors import run_command
from hrm.common.files import check_file, write_whole
from hrm.data.dataset import PuzzleDataset, subset
from hrm.data.puzzle_kinds import kind_of
from hrm.engine.modes import resolve_mode
from hrm.evaluation.metrics import evaluate
from hrm.evaluation.paths import Plan, differences, evaluate_paths
from hrm.evaluation.selection import Rule

BATCH, PATHS, PUZZLES = 64, 64, 3
# Sources of the paths, rule, and whether early exit is measured.
PLANS: tuple[tuple[str, Rule, bool], ...] = (
    ("init", "q", False),
    ("noise", "q", False),
    ("symmetry", "rules", True),
    ("symmetry", "vote", True),
)


def measure(path: str, data: str, mode_name: str, rounds: int) -> dict[str, Any]:
    """CPU seconds per path, for a single path and for many of each kind, with and without early exit."""
    trained = load_trained(find_trained(path), device="cpu", data=Path(data))
    dataset, mode = PuzzleDataset(Path(data), "test"), resolve_mode(mode_name, trained.model.H_init.device)
    assert mode is not None
    kind, depth = kind_of(dataset.metadata, dataset.sets), trained.model.arch.halt_max_steps
    # Keep the total number of paths equal to the number of single-path puzzles.
    alone, few = (subset(dataset, count, 0) for count in (PATHS * PUZZLES, PUZZLES))
    options: Any = {"batch_size": BATCH, "mode": mode}
    calls = {"alone": partial(evaluate, trained, dataset, examples=alone, **options)}
    for by, select, early in PLANS:
        views, randomness = differences([by], kind, trained.model, seed=0)
        plan = Plan(PATHS, select, (depth,), views, randomness)
        calls[f"{by}, {select}"] = partial(evaluate_paths, trained, dataset, plan, examples=few, **options)
        if early:
            calls[f"{by}, {select}, early"] = partial(calls[f"{by}, {select}"], eval_act=True)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            # The first round includes imports, compilation and allocation.
            if number:
                seconds[name].append((time.process_time() - start) / (PATHS * PUZZLES))
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    for name in [name for name in medians if name.endswith(", early")]:
        # Early exit follows the full evaluation in the same call.
        medians[name] -= medians[name.removesuffix(", early")]
    ratios = {name: value / medians["alone"] for name, value in medians.items()}
    return {"mode": mode.name, "cpu_seconds_per_path": seconds, "ratio": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.paths", description=__doc__)
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("data", help="its data set")
    parser.add_argument("--mode", default="eager")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--write", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.write:
        check_file(args.write)
    found = measure(args.run, args.data, args.mode, args.rounds)
    result = {**setting(), "paths": PATHS, "batch_size": BATCH, **found}
    if args.write:
        write_whole(args.write, json.dumps(result, indent=1) + "\n")
    for name, ratio in found["ratio"].items():
        print(f"{name}: {ratio:.2f}")


if __name__ == "__main__":
    sys.exit(run_command(main, "nothing was written"))
