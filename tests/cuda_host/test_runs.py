"""Whole runs of the trainer on the stand-in CUDA library: saved and resumed, profiled, on two ranks."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda_host.stand_in import ROOT, environment
from tests.support.torchrun import torchrun

pytestmark = pytest.mark.cuda_host

WORDS = (
    "device=cuda global_batch_size=16 arch.hidden_size=64 arch.num_heads=1 arch.H_layers=1 arch.L_layers=1 "
    "arch.H_cycles=1 arch.L_cycles=1 arch.halt_max_steps=2 epochs=1000 eval_interval=1000 eval_samples=16 "
    "log_interval=4 lr_warmup_steps=1"
)
# Kernels compute nothing: the counts that a step leaves are arbitrary, and ranks would part over them.
PROGRAM = """
import os
import sys
import train
from hrm.engine import modes
from hrm.training.monitor import Monitor

if os.environ["COMPILES"] == "no":
    modes.compiler_fault = lambda device: "left out"

def check(monitor, progress):
    monitor.engine.world.barrier()
    monitor.engine.pop()

Monitor.check = check
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def words(data: Path, folder: Path, more: str = "") -> list[str]:
    where = [f"data_path={data}", f"output_dir={folder}", "project_name=p", "run_name=r"]
    return ["--arch", "v1", *WORDS.split(), *where, *more.split()]


def train(program: Path, data: Path, folder: Path, more: str, compiles: str = "no") -> str:
    """Runs the trainer to its end; returns what it wrote. compiles: yes or no."""
    command = [sys.executable, str(program), *words(data, folder, more)]
    variables = environment(COMPILES=compiles)
    ended = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    text = ended.stdout + ended.stderr
    assert ended.returncode == 0 and "VIOLATION" not in text, text[-3000:]
    return text


def test_a_run_is_saved_and_resumed(tmp_path, tiny_sudoku, program):
    train(program, tiny_sudoku, tmp_path, "max_steps=6 checkpoint_interval=6", "yes")
    assert (tmp_path / "p/r/step_6").is_dir()
    text = train(program, tiny_sudoku, tmp_path, "max_steps=10 resume=auto", "yes")
    assert "step_6" in text and (tmp_path / "p/r/step_10").is_dir()


@pytest.mark.parametrize("kind", ["nsys", "ncu", "torch"])
def test_a_run_is_profiled(tmp_path, tiny_sudoku, program, kind):
    text = train(
        program, tiny_sudoku, tmp_path, f"max_steps=8 profile={kind} profile_after=5 profile_steps=2"
    )
    assert "profile" in text
    if kind == "torch":
        assert (tmp_path / "p/r/profile/table.txt").read_text()


def test_two_ranks_train_and_save(tmp_path, tiny_sudoku, program):
    (ended,) = torchrun(
        2,
        str(program),
        *words(tiny_sudoku, tmp_path, "max_steps=6"),
        environment=environment(STANDIN_DEVICES="2", COMPILES="no"),
        # A process that has imported PyTorch may have counted the devices already.
        fork=False,
    )
    assert ended.status == 0 and "VIOLATION" not in ended.text, ended.text[-3000:]
    assert (tmp_path / "p/r/step_6").is_dir()
