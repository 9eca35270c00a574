"""A run that is killed and resumed again and again against the same run left alone: the same bit for bit?

    python -m tests.faults.soak --kills 50 --seed 0 --write bench/results/soak.json

Each kill is a SIGKILL: at a step drawn by chance, in the middle of a save, or while the trainer starts. What
is compared in the end is the weights, their average, the optimiser, the carry, the place in the data and
every line of the metrics but the clock's; and at each kill, that the resumed process went on from the newest
checkpoint that was complete.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hrm.common.machine import processor
from hrm.data.sudoku.build import builtin_sudoku
from tests.faults.harness import Trainer, last_step, newest, resumed_step, run_to_end, saving
from tests.support.paths import ROOT
from tests.support.runs import assert_same_run, words

# Steps between checkpoints, and the most steps that a process is left to make before the next fault.
INTERVAL, STRETCH = 12, 20
# Wide enough that a save takes as long as some steps.
WIDE = ["arch.hidden_size=64", "arch.num_heads=4", "ema=true", "grad_clip=1", "log_interval=1"]
KINDS = ("step", "save", "start", "step")
STEPS_PER_EPOCH = 6


def soak(data: Path, folder: Path, kills: int, seed: int, *more: str) -> dict[str, Any]:
    """Trains both runs under `folder`, compares them, and returns the result of each kill.

    more: words for the trainer. Raises AssertionError where the killed run lost anything.
    """
    rng = np.random.default_rng(seed)
    # A save may let a process get an interval further, and a busy machine some steps.
    epochs = -(-(kills + 1) * (STRETCH + 2 * INTERVAL) // STEPS_PER_EPOCH)
    argv = words(data, folder, *WIDE, f"epochs={epochs}", *more)
    whole, run = folder / data.name / "whole", folder / data.name / "killed"
    status, _, err = run_to_end([*argv, "run_name=whole"])
    assert status == 0, err
    struck: list[dict[str, Any]] = []
    saved = lost = 0
    for kind in islice(cycle(KINDS), kills):
        with Trainer([*argv, "run_name=killed"], fork=kind != "start") as trainer:
            in_a_save = strike(trainer, run, kind, rng)
            goes_on_from = resumed_step(trainer.out)
        # One that was killed while it started may not have come so far as to say it.
        if goes_on_from or kind != "start":
            lost += saved - goes_on_from
            assert goes_on_from == saved, f"went on from step {goes_on_from}, saved was step {saved}"
        before, saved, reached = saved, newest(run), last_step(run)
        assert saved >= before, f"the checkpoint of step {before} is gone"
        # Of the two checkpoints before this step, the save of the later one may still have been going on.
        assert kind == "start" or saved >= reached - 2 * INTERVAL, f"step {reached} reached, {saved} saved"
        struck.append(
            {
                "kind": kind,
                "in_a_save": in_a_save,
                "step": reached,
                "newest_checkpoint": saved,
                "resumed_from": goes_on_from,
                # Killed while it started, it had made none.
                "steps_done_again": 0 if kind == "start" else reached - saved,
            }
        )
    status, out, err = run_to_end([*argv, "run_name=killed"])
    assert status == 0, err
    assert resumed_step(out) == saved
    assert_same_run(whole, run)
    assert not saving(run), "a killed save's folder was left"
    return {
        "kills": kills,
        "seed": seed,
        "steps": last_step(run),
        "kills_in_a_save": sum(kill["in_a_save"] for kill in struck),
        "steps_done_again": sum(kill["steps_done_again"] for kill in struck),
        "most_steps_done_again": max(kill["steps_done_again"] for kill in struck),
        "steps_lost_beyond_the_last_checkpoint": lost,
        "identical": True,
        "each": struck,
    }


def strike(trainer: Trainer, run: Path, kind: str, rng: np.random.Generator) -> bool:
    """Waits for the moment that `kind` names, one drawn by chance, and kills the trainer.

    Returns whether it died in a save of its own.
    """
    metrics, left = run / "metrics.jsonl", set(saving(run))
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    if kind == "start":
        time.sleep(rng.uniform(0.0, 2.5))
    else:
        stretch = int(rng.integers(1, STRETCH + 1))
        # Not by the lines of the process before: this one cuts off the last of them first.
        trainer.wait_for(lambda: metrics.exists() and metrics.stat().st_mtime_ns != before)
        start = last_step(run)
        trainer.wait_for(lambda: last_step(run) >= start + stretch)
    while kind == "save":
        trainer.wait_for(lambda: set(saving(run)) - left)
        trainer.process.send_signal(signal.SIGSTOP)
        if set(saving(run)) - left:
            break
        # It ended just before: the next one, then.
        trainer.process.send_signal(signal.SIGCONT)
    status = trainer.signal(signal.SIGKILL)
    assert status == -signal.SIGKILL, trainer.err
    return bool(set(saving(run)) - left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how often (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="the result, as JSON")
    args = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HRM_CACHE"] = f"{folder}/cache"
        found = soak(builtin_sudoku(4, 48, 20, 0, 0), Path(folder), args.kills, args.seed)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    result = {
        "commit": commit.stdout.strip(),
        "processor": processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seconds": round(time.perf_counter() - started, 1),
        **found,
    }
    if args.write:
        args.write.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for kill in result.pop("each"):
        print(json.dumps(kill))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
