"""Ranks that share a batch train what one rank trains."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from hrm import distributed
from hrm.checkpoint import load_checkpoint
from hrm.distributed import World
from hrm.errors import UserError
from tests.test_train import metrics_of, words

ROOT = Path(train.__file__).parent


def test_one_rank_needs_no_process_group():
    world = World()
    x = torch.tensor([[1.0], [2.0]])
    assert world.is_main and world.all_gather(x) is x and world.all_reduce(x) is x
    assert world.rows(8) == slice(0, 8) and World(2, 4).rows(8) == slice(4, 6)
    assert distributed.start("cpu", 8) == (World(), torch.device("cpu"))


def test_ranks_cannot_share_one_named_device(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"device=cuda:1 under torchrun: ranks need device=cuda"):
        distributed.start("cuda:1", 8)


@pytest.mark.parametrize("ranks", [2])
def test_ranks_train_what_one_rank_trains(tiny_sudoku, tmp_path, ranks):
    """The same losses and weights to rounding (sums in another order). Saved by 2, resumed by 1."""
    argv = words(tiny_sudoku, tmp_path, "max_steps=24", "log_interval=1")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    torchrun += ["--master_addr=127.0.0.1", f"--master_port={port}", "train.py"]
    for command, name in (([sys.executable, "train.py"], "one"), (torchrun, "many")):
        done = subprocess.run(
            [*command, *argv, f"run_name={name}"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    runs = [tmp_path / tiny_sudoku.name / name for name in ("one", "many")]
    one, many = (load_checkpoint(run) for run in runs)
    for name, tensor in one.weights.items():
        torch.testing.assert_close(many.weights[name], tensor, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(metrics_of(runs[0]), metrics_of(runs[1]), strict=True):
        assert theirs == pytest.approx(mine, rel=1e-5, abs=1e-7)
    assert torch.equal(many.training["carry"]["inputs"], one.training["carry"]["inputs"])
    assert torch.equal(many.training["carry"]["steps"], one.training["carry"]["steps"])

    more = [sys.executable, "train.py", *argv[:-2], "max_steps=36", "log_interval=1"]
    for name in ("one", "many"):
        subprocess.run(
            [*more, f"run_name={name}"], cwd=ROOT, env=environment, capture_output=True, check=True
        )
    one, many = (load_checkpoint(run) for run in runs)
    assert one.step == many.step == 36
    torch.testing.assert_close(
        many.weights["lm_head.weight"], one.weights["lm_head.weight"], rtol=1e-4, atol=1e-5
    )
