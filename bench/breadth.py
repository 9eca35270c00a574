"""Compares depth and breadth: plain TRM and Equilibrium Reasoners, by ACT steps and number of paths, over
seeds.

    python -m bench.breadth bench/results/breadth_cpu.json 0 1 2 3 4

Trains each model with each seed and evaluates it on test puzzles. The file is written after every run, and
the same command continues with the missing runs. At the end it prints the tables of the file; without seeds
it only prints them. `--most N` stops after N runs.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.seeds import run, setting
from hrm.checkpoint.load_model import load_trained
from hrm.common.errors import run_command
from hrm.common.files import check_file, read_json, write_whole
from hrm.common.tables import Table
from hrm.data.dataset import PuzzleDataset, subset
from hrm.data.puzzle_kinds import kind_of
from hrm.data.sudoku.build import data_folder
from hrm.engine.modes import EAGER
from hrm.evaluation.paths import Plan, differences, evaluate_paths
from hrm.study.statistics import Summary, paired_difference, summarise

# The quick preset with two cycles of two updates, so that a run takes minutes on one thread, and half of its
# steps, so that a single path fails on some puzzles. The accuracy of a single path of plain TRM decided this
# choice before any comparison.
TASK = [
    "preset=quick",
    "epochs=1",
    "arch.H_cycles=2",
    "arch.L_cycles=2",
    "mode=eager",
    "device=cpu",
    "eval_interval=null",
]
MODELS = ("trm", "eqr")
SOURCES = ("init", "noise", "symmetry")
PATHS, SAMPLES = 8, 200
# Depths, as multiples of the training steps, equal to the compared numbers of paths.
DEPTHS = (8, 16, 32, 64)
Runs = Sequence[dict[str, Any]]


def judge(folder: Path) -> dict[str, Any]:
    """The shares of solved puzzles by source of the paths, rule and number of paths, and by depth of a single
    path."""
    trained = load_trained(folder, device="cpu")
    dataset = PuzzleDataset(data_folder(trained.config), "test")
    examples, kind = subset(dataset, SAMPLES, 0), kind_of(dataset.metadata, dataset.sets)

    def evaluated(by: Sequence[str], paths: int, depths: tuple[int, ...]) -> dict[str, Any]:
        views, randomness = differences(by, kind, trained.model, seed=0)
        trained.model.arch = replace(trained.model.arch, halt_max_steps=depths[-1])
        plan = Plan(paths, "q", depths, views, randomness)
        results = evaluate_paths(trained, dataset, plan, batch_size=64, mode=EAGER, examples=examples)
        found: dict[str, Any] = results["all"]["paths"]
        return found

    sources = {}
    for source in SOURCES:
        paths = evaluated([source], PATHS, DEPTHS[:1])
        rules = {rule: _means(shares) for rule, shares in paths["rules"].items()}
        sources[source] = {"rules": rules, "pass_at": _means(paths["pass_at"]), "failures": paths["failures"]}
    by_depth = evaluated([], 1, DEPTHS)["depths"]
    return {"sources": sources, "depths": {n: of_rule["q"]["1"]["mean"] for n, of_rule in by_depth.items()}}


def _means(shares: dict[str, dict[str, float]]) -> dict[str, float]:
    return {count: share["mean"] for count, share in shares.items()}


# ------------------------------------------------------------------------------------------------- the tables


def tables(found: dict[str, Any]) -> Iterator[Table]:
    """Tables by rule and number of paths, of selection failures, of depth against breadth, and of the
    models."""
    by_model: dict[str, Runs] = {
        model: [each for each in found["runs"] if each["model"] == model] for model in MODELS
    }
    for model, runs in by_model.items():
        for source in SOURCES if runs else ():
            yield _rules(model, source, runs)
    yield _failures(by_model)
    yield _ways(by_model)
    yield _models(by_model)


def _rules(model: str, source: str, runs: Runs) -> Table:
    first = runs[0]["sources"][source]["rules"]
    rows = []
    for count in first["q"]:
        shares = [[each["sources"][source]["rules"][rule][count] for each in runs] for rule in first]
        pass_at = [each["sources"][source]["pass_at"][count] for each in runs]
        rows.append([count, *map(_percent, [*shares, pass_at])])
    note = f"% of {SAMPLES} puzzles solved: mean over {len(runs)} seeds, 95 % t interval"
    return Table(f"{model}, paths by {source}", ["K", *first, "pass@K"], rows, note)


def _failures(by_model: dict[str, Runs]) -> Table:
    """The share of failures with a right answer on another path; seeds without failures are left out."""
    rows = []
    for model, runs in by_model.items():
        for source in SOURCES:
            cells: list[str] = []
            for rule in ("q", "vote", "rules"):
                counts = [each["sources"][source]["failures"][rule] for each in runs]
                cells.append(_percent([n["another_right"] / n["wrong"] for n in counts if n["wrong"]]))
            rows.append([model, source, *cells])
    title = f"Failures of selection: % of the puzzles failed with {PATHS} paths that another path solves"
    return Table(title, ["model", "paths by", "q", "vote", "rules"], rows)


def _ways(by_model: dict[str, Runs]) -> Table:
    """Accuracy by depth and by breadth at equal numbers of ACT steps, and the difference paired by seed."""
    rows = []
    for model, runs in by_model.items():
        for times, depth in enumerate(DEPTHS):
            count = str(2**times)
            deep = {each["seed"]: each["depths"][str(depth)] for each in runs}
            cells = [_percent(list(deep.values()))]
            for source in SOURCES:
                wide = {each["seed"]: each["sources"][source]["rules"]["q"][count] for each in runs}
                cells.append(_difference(wide, deep))
            rows.append([model, str(depth), count, *cells])
    columns = ["model", "ACT steps", "or paths", "deeper", *(f"wider by {source}" for source in SOURCES)]
    note = "deeper: % solved by one path; wider: gain in points of several paths chosen by q"
    return Table("Deeper or wider at equal compute", columns, rows, note)


def _models(by_model: dict[str, Runs]) -> Table:
    """The second model's gain over the first, paired by seed."""
    measures: dict[str, Callable[[dict[str, Any]], float]] = {"one path": lambda each: each["depths"]["8"]}
    for source in SOURCES:
        for rule in ("q", "vote", "rules", "oracle"):
            measures[f"{PATHS} paths by {source}, {rule}"] = partial(_last, source=source, rule=rule)
    rows = []
    for name, measure in measures.items():
        plain, other = ({each["seed"]: measure(each) for each in by_model[model]} for model in MODELS)
        cells = [_percent(list(shares.values())) for shares in (plain, other)]
        rows.append([name, *cells, _difference(other, plain)])
    return Table("The models compared", ["", *MODELS, "difference in points"], rows)


def _last(each: dict[str, Any], source: str, rule: str) -> float:
    share: float = each["sources"][source]["rules"][rule][str(PATHS)]
    return share


def _percent(shares: Sequence[float]) -> str:
    return _cell(summarise([100 * share for share in shares])) if shares else "-"


def _difference(values: dict[int, float], baseline: dict[int, float]) -> str:
    points = [{seed: 100 * share for seed, share in each.items()} for each in (values, baseline)]
    found = paired_difference(*points)
    return "-" if found is None else _cell(found, sign="+")


def _cell(found: Summary, sign: str = "") -> str:
    if found.interval is None:
        return f"{found.mean:{sign}.1f}"
    return f"{found.mean:{sign}.1f} ±{found.interval[1] - found.mean:.1f}"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.breadth", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("seeds", type=int, nargs="*")
    parser.add_argument("--most", type=int, default=10**6)
    args = parser.parse_args(argv)
    found: dict[str, Any] = {"command": f"python train.py --arch MODEL {' '.join(TASK)}", **setting()}
    found |= {"samples": SAMPLES, "runs": []}
    check_file(args.file)
    if args.file.exists():
        found = read_json(args.file, 2**24, "the file that this command wrote")
    done = {(each["model"], each["seed"]) for each in found["runs"]}
    missing = [(model, seed) for seed in args.seeds for model in MODELS if (model, seed) not in done]
    for model, seed in missing[: args.most]:
        found["runs"].append({"model": model, **run(seed, [f"arch={model}", *TASK], judge)})
        write_whole(args.file, json.dumps(found, indent=1) + "\n")
    print("\n\n".join(each.text() for each in tables(found)))


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:]), "the file holds the finished runs"))
