"""Small training runs, their output files, and a bitwise comparison of two runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from hrm.checkpoint.read import load_checkpoint

SMALL = ["arch.hidden_size=32", "arch.num_heads=2", "arch.H_layers=1", "arch.L_layers=1"]
SMALL += ["arch.expansion=1", "arch.halt_max_steps=3", "global_batch_size=8", "mode=eager", "device=cpu"]
SMALL += ["arch.H_cycles=1", "arch.L_cycles=1"]
SMALL += ["lr=1e-3", "lr_warmup_steps=5", "log_interval=2", "epochs=8", "eval_interval=2"]
WALL_CLOCK = ("train/seconds_per_step", "train/samples_per_second")


def words(data: Path, out: Path, *more: str) -> list[str]:
    """A run of 8 epochs, 6 steps each, with a checkpoint every 12 steps."""
    given = {word.split("=")[0] for word in more}
    return [
        *(
            word
            for word in [f"data_path={data}", f"output_dir={out}", *SMALL]
            if word.split("=")[0] not in given
        ),
        *more,
    ]


def run_main(*argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = train.main(list(argv))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def metrics_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in lines]


def tensors(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a nested state by path."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    leaves: dict[str, Any] = {}
    for key, item in items:
        nested = isinstance(item, dict | list | tuple)
        leaves |= tensors(item, f"{prefix}{key}.") if nested else {f"{prefix}{key}": item}
    return leaves


def assert_same_run(one: Path, other: Path) -> None:
    """Asserts that weights, optimiser, carry, position and all metrics except times are bit-identical."""
    a, b = (load_checkpoint(run) for run in (one, other))
    assert a.step == b.step
    for mine, theirs in ((a.weights, b.weights), (tensors(a.training), tensors(b.training))):
        assert mine.keys() == theirs.keys() and mine
        for name, value in mine.items():
            same = torch.equal(value, theirs[name]) if torch.is_tensor(value) else value == theirs[name]
            assert same, name
    assert metrics_of(one) == metrics_of(other)
