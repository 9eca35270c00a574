"""Trains a configuration with several seeds and stores the results as JSON.

    python -m bench.seeds bench/results/quick_cpu.json 0 1 2 -- preset=quick

Each seed is a run of train.py in a separate process and folder, from a cold start: its seconds include
imports, compilation, evaluation and saving, but not the installation.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.beside import Beside
from hrm.common.errors import UserError, run_command
from hrm.common.files import check_file
from hrm.common.machine import processor

ROOT = Path(__file__).parents[1]


def run(
    seed: int, words: list[str], judge: Callable[[Path], dict[str, Any]] = lambda folder: {}
) -> dict[str, Any]:
    """A run: its last evaluation, its seconds and the CPUs used by others, its steps, the size of its data.

    judge: computes further results from the run's folder before it is removed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", *words, f"seed={seed}", f"output_dir={folder}"]
        # Inductor stores its precompiled headers in the temporary folder.
        cold = {**os.environ, "TMPDIR": folder, "HRM_CACHE": f"{folder}/cache"}
        cold.pop("TORCHINDUCTOR_CACHE_DIR", None)
        with Beside() as beside:
            subprocess.run(command, cwd=ROOT, env=cold, check=True)
        (log,) = Path(folder).glob("*/*/metrics.jsonl")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        data_bytes = sum(file.stat().st_size for file in Path(folder, "cache").rglob("*.npy"))
        judged = judge(log.parent)
    last = next(line for line in reversed(lines) if "eval/all/exact_accuracy" in line)
    results = {name: value for name, value in last.items() if name.startswith("eval/")}
    others = None if beside.others is None else round(beside.others, 2)
    facts = {"seed": seed, "seconds": round(beside.seconds, 1), "other_cpus": others, "step": last["step"]}
    return {**facts, "data_bytes": data_bytes, **results, **judged}


def setting() -> dict[str, Any]:
    """The commit, the machine and the versions of a measurement."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {
        "commit": commit.stdout.strip(),
        "processor": processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def main(argv: list[str]) -> None:
    """argv: the output file, the seeds, `--`, arguments for train.py."""
    split = argv.index("--") if "--" in argv else 0
    if split < 2 or not all(seed.isdecimal() for seed in argv[1:split]):
        raise UserError("usage: python -m bench.seeds FILE SEED ... -- [arguments for train.py]")
    output, seeds, words = Path(argv[0]), [int(seed) for seed in argv[1:split]], argv[split + 1 :]
    check_file(output)
    results = {
        "command": " ".join(["python train.py", *words]),
        **setting(),
        "runs": [run(seed, words) for seed in seeds],
    }
    output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:]), "no file was written"))
