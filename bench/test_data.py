"""Times the build of the full data set in a separate process: 1,000 9x9 puzzles, 1,000 augmentations each."""

import resource
import subprocess
import sys
from pathlib import Path

from hrm.common.machine import processor

ROOT = Path(__file__).parents[1]


def test_build_sudoku(benchmark, tmp_path):
    command = [sys.executable, "-m", "hrm.data", "sudoku", "--num-train", "1000", "--num-aug", "1000"]
    command += ["--output-dir", str(tmp_path / "data")]
    benchmark.group = "building a data set"
    benchmark.pedantic(
        subprocess.run, (command,), {"cwd": ROOT, "check": True, "capture_output": True}, rounds=1
    )
    assert (tmp_path / "data" / "train" / "all__inputs.npy").stat().st_size == 128 + 1_001_000 * 81
    # Peak memory of the largest child so far; other benchmarks can only increase it.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    benchmark.extra_info |= {"peak_memory_mib": round(peak / 2**20), "processor": processor()}
