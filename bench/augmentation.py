"""Compares fresh symmetries (augment=true) with stored augmentations: accuracy over seeds, and disk used.

    python -m bench.augmentation bench/results/augmentation_cpu.json

Both train the quick preset with a smaller model on the same 40 puzzles of 4x4 cells, for the same number of
steps. Model, steps, puzzles and seeds were fixed before the first accuracy was seen.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from bench.seeds import ROOT, run
from hrm.common.machine import processor

SEEDS = (0, 1, 2)
SHARED = ["--arch", "v1", "preset=quick", "sudoku.num_train=40", "max_steps=300", "eval_interval=null"]
SHARED += ["epochs=1000", "mode=eager", "device=cpu", "arch.hidden_size=32", "arch.num_heads=2"]
SHARED += ["arch.H_layers=1", "arch.L_layers=1", "arch.halt_max_steps=4"]
WAYS = {
    "stored": ["sudoku.num_aug=1000"],
    "fresh": ["sudoku.num_aug=0", "augment=true"],
}


def main(output: Path) -> None:
    """Runs every way with every seed and writes the results after each way."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    results = {
        "note": "width 32, 300 steps and 40 puzzles, in place of the quick preset's 64, 3,744 and 20,000",
        "command": " ".join(["python train.py", *SHARED]),
        "commit": commit.stdout.strip(),
        "processor": processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    ways = {}
    for way, words in WAYS.items():
        runs = [run(seed, [*SHARED, *words]) for seed in SEEDS]
        ways[way] = {"words": words, "runs": runs}
        output.write_text(json.dumps({**results, "ways": ways}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
