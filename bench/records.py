"""Trains a published recipe to a target accuracy and keeps the record: time, steps and FLOP to each accuracy.

    python -m bench.records sic data_path=data/sudoku --until 0.85 --seconds 600

Training time is the sum of step times in the run's log; it excludes evaluation, compilation, saving and
start-up. A run ends at the first evaluation that reaches --until, or after --seconds of this process; the
same command continues it. key=value arguments override the recipe's arguments for train.py. Each call writes
the recipe's row to --out, together with the published row, which is reported by its authors and not measured
here. `python -m bench.records` prints the table.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.launches import Launches
from hrm.common.errors import UserError, run_command
from hrm.common.files import check_file, read_json, write_whole
from hrm.config.load import parse_args
from hrm.config.schedule import stage_arch, stage_ends
from hrm.config.schema import Config
from hrm.data.format import Metadata
from hrm.engine.dry_run import Rehearsal
from hrm.study.runs import surroundings
from hrm.training.data import TrainingData
from hrm.training.run_folder import folder_of
from hrm.training.signals import REASONS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "records.json"
# Seconds between reads of a run's log, and seconds that a run has to save itself.
LOOK, GRACE = 1.0, 300.0


class Recipe(NamedTuple):
    """Arguments for train.py, and the published row: exact accuracy on Sudoku-Extreme, time, GPU, source."""

    words: tuple[str, ...]
    accuracy: float | None
    hours: float | None
    gpu: str
    source: str


# TRM's official recipe for Sudoku-Extreme, the base of other recipes.
_SUDOKU = ("global_batch_size=768", "epochs=50000", "eval_interval=5000", "lr=1e-4", "weight_decay=1.0")
_TABLE = ("puzzle_emb_lr=1e-4", "puzzle_emb_weight_decay=1.0")
_MIXER = ("arch.mlp_t=true", "arch.pos_encodings=none")
RECIPES = {
    "hrm": Recipe(
        (
            *("--arch", "v1", "preset=full", "global_batch_size=384", "epochs=20000", "eval_interval=2000"),
            *("lr=7e-5", "weight_decay=1.0", "puzzle_emb_lr=7e-5", "puzzle_emb_weight_decay=1.0"),
        ),
        0.55,
        None,
        "",
        "arXiv 2506.21734",
    ),
    "trm": Recipe(
        ("--arch", "trm", "preset=full", *_MIXER, *_SUDOKU, *_TABLE),
        0.874,
        20.0,
        "L40S",
        "arXiv 2510.04871; the time from arXiv 2601.19085",
    ),
    "sic": Recipe(("preset=record",), 0.855, 0.8, "RTX 5090", "arXiv 2601.19085"),
    # Its authors publish 53.8 % of ARC-AGI-1; the recipe here is TRM's with their model.
    "urm": Recipe(("--arch", "urm", "preset=full", *_SUDOKU, *_TABLE), None, None, "", "arXiv 2512.14693"),
    "eqr": Recipe(
        ("--arch", "eqr", "preset=full", *_MIXER, *_SUDOKU),
        0.998,
        None,
        "",
        "arXiv 2605.21488",
    ),
    "cgar": Recipe(("preset=cgar",), 0.8602, 6.38, "A100", "arXiv 2511.08653"),
}


class Point(NamedTuple):
    """An evaluation: updates so far, training seconds, exact accuracy of the weights or their average."""

    step: int
    train_s: float
    accuracy: float


def points(lines: Sequence[dict[str, Any]], metric: str = "exact_accuracy") -> list[Point]:
    """The evaluations in a run's log, each with the better of the weights and their average.

    It uses the test split or a sample of it, not `valid`, whose best score is biased. lines: of
    metrics.jsonl.
    """
    found, seconds, last = [], 0.0, 0
    for line in lines:
        if (pace := line.get("train/seconds_per_step")) is not None:
            seconds, last = seconds + pace * (line["step"] - last), line["step"]
        accuracies = [
            value
            for name, value in line.items()
            if name.startswith(("eval/", "eval_ema/"))
            and name.endswith(f"/{metric}")
            and "/valid" not in name
        ]
        if accuracies:
            found.append(Point(line["step"], seconds, max(accuracies)))
    return found


def reached(found: Sequence[Point], target: float | None) -> Point | None:
    """The first evaluation that reaches the target; None without a target."""
    if target is None:
        return None
    return next((point for point in found if point.accuracy >= target), None)


def log_of(config: Config) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics.jsonl; empty before the first."""
    path = folder_of(config) / "metrics.jsonl"
    if not path.is_file():
        return []
    # The last line may be incomplete.
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def flop_per_step(config: Config, metadata: Metadata) -> int:
    """Matrix product FLOP of a training step, counted for one CUDA device in bfloat16."""
    launches = Launches()
    rehearsal = Rehearsal(replace(config, dtype="bfloat16"), metadata, torch.device("cuda"), launches)
    # The first step also creates persistent tensors.
    rehearsal.step()
    launches.works.clear()
    rehearsal.step()
    return sum(work.flop for works in launches.works.values() for work in works)


def flop_until(config: Config, metadata: Metadata, step: int, total_steps: int) -> int:
    """FLOP of the first steps of a run, stage by stage."""
    flop, done, start = 0, 0, 0
    for end in stage_ends(config):
        stage = replace(config, arch=stage_arch(config, start))
        until = min(step, round(total_steps * end / config.epochs))
        if until > done:
            flop, done = flop + (until - done) * flop_per_step(stage, metadata), until
        start = end
    return flop


def train(config: Config, words: Sequence[str], target: float | None, seconds: float | None) -> None:
    """Trains until an evaluation reaches the target, the time limit passes or the run ends.

    A run that is stopped saves itself; the next call continues it. Raises UserError if it fails.
    """
    limit = [] if seconds is None else [f"max_seconds={seconds:g}"]
    trainer = subprocess.Popen([sys.executable, "train.py", *words, *limit], cwd=ROOT)
    try:
        while trainer.poll() is None:
            time.sleep(LOOK)
            if reached(points(log_of(config)), target):
                break
    finally:
        if trainer.poll() is None:
            trainer.terminate()
            try:
                trainer.wait(GRACE)
            except subprocess.TimeoutExpired:
                trainer.kill()
                raise UserError(f"train.py did not end within {GRACE:g} s of a SIGTERM") from None
    # A run that ends at a request has saved itself.
    if trainer.returncode not in (0, *(status for _, status in REASONS.values())):
        raise UserError(f"train.py ended with status {trainer.returncode}: see its lines above")


def row_of(name: str, config: Config, target: float | None, words: Sequence[str]) -> dict[str, Any]:
    """A recipe's row: evaluations, the first that reaches the target, the machine, the published row."""
    found = points(log_of(config))
    data = TrainingData.open(config)
    first = reached(found, target)
    evaluations = [
        {**point._asdict(), "flop": flop_until(config, data.metadata, point.step, data.total_steps)}
        for point in found
    ]
    recipe = RECIPES[name]
    return {
        "command": f"python -m bench.records {name} " + " ".join(words),
        "target": target,
        "reached": None if first is None else evaluations[found.index(first)],
        "evaluations": evaluations,
        "total_steps": data.total_steps,
        **surroundings(),
        "published": {
            "exact_accuracy": recipe.accuracy,
            "hours": recipe.hours,
            "gpu": recipe.gpu,
            "source": f"reported by its authors: {recipe.source}",
        },
    }


def table(rows: dict[str, Any]) -> str:
    """The rows as Markdown, each with its authors' figures."""
    lines = [
        "| recipe | exact | training time | steps | FLOP | machine | commit | authors' figures |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        said = row["published"]
        parts = [
            f"{said['exact_accuracy']:.1%}" if said["exact_accuracy"] else "",
            f"{said['hours']:g} h" if said["hours"] else "",
            said["gpu"],
            f"({said['source'].removeprefix('reported by its authors: ')})",
        ]
        best = row["reached"] or max(row["evaluations"], key=lambda point: point["accuracy"], default=None)
        measured = ["", "", "", ""]
        if best is not None:
            minutes, mark = best["train_s"] / 60, "" if row["reached"] else " (best so far)"
            measured = [f"{best['accuracy']:.1%}{mark}", f"{minutes:.1f} min", f"{best['step']:,}"]
            measured += [f"{best['flop']:.2g}"]
        machine = ", ".join(row["gpus"]) or row["processor"]
        cells = [name, *measured, machine, (row["commit"] or "")[:12], " ".join(filter(None, parts))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.records", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("recipe", nargs="?", choices=[*RECIPES], help="print the table if there is none")
    parser.add_argument(
        "words", nargs="*", metavar="KEY=VALUE", help="arguments for train.py, which override the recipe's"
    )
    parser.add_argument("--until", type=float, help="exact accuracy at which the run ends, such as 0.85")
    parser.add_argument(
        "--seconds", type=float, help="save and end after this time; the same command continues"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of rows")
    options = parser.parse_intermixed_args(argv)
    if options.until is not None and not 0 < options.until <= 1:
        raise UserError(f"--until {options.until:g}: give a share above 0, up to 1, such as 0.85")
    check_file(options.out)
    rows: dict[str, Any] = {}
    if options.out.exists():
        rows = read_json(options.out, 2**24, "rows written by this command")
    if options.recipe is not None:
        given = [*options.words]
        if not any(word.startswith("project_name=") for word in given):
            given.append("project_name=records")
        words = [*RECIPES[options.recipe].words, *given]
        config = parse_args(words)
        if not reached(points(log_of(config)), options.until):
            train(config, words, options.until, options.seconds)
        rows[options.recipe] = row_of(options.recipe, config, options.until, options.words)
        write_whole(options.out, json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:]), "the same command continues the run"))
