"""Numbers that go wrong in a step: skipped, counted, written down; the run stops, or goes back if told to."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hrm.checkpoint.read import load_checkpoint
from tests.faults.harness import newest, run_to_end
from tests.support.runs import metrics_of, tensors, words
from tests.support.torchrun import torchrun

PROGRAM = str(Path(__file__).with_name("numeric_program.py"))
# Every step is logged and saved.
EACH = ["log_interval=1", "checkpoint_interval=1", "keep_checkpoints=null", "ema=true"]


def incidents(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "incidents.jsonl").read_text().splitlines()]


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    """What the updates of a step change: weights, their average, the moments."""
    found = load_checkpoint(run / f"step_{step}")
    leaves = {**found.weights, **tensors(found.extra), **tensors(found.training["optimizer"], "optimizer.")}
    return {name: value for name, value in leaves.items() if torch.is_tensor(value)}


def assert_finite(run: Path) -> None:
    """Every saved state, but for what sequences that were given up have left in the carry."""
    for folder in run.glob("step_*"):
        carry = load_checkpoint(folder).training["carry"]
        kept = {name: carry[name][~carry["halted"]] for name in ("z_H", "z_L")}
        for name, value in {**state(run, int(folder.name.removeprefix("step_"))), **kept}.items():
            assert torch.isfinite(value).all(), (folder.name, name)


@pytest.mark.parametrize("kind", ["gradient", "loss", "carry"])
def test_a_non_finite_step_is_skipped_and_reported(tiny_sudoku, tmp_path, kind):
    argv = words(tiny_sudoku, tmp_path, *EACH, "run_name=r", "max_steps=12")
    run = tmp_path / tiny_sudoku.name / "r"
    status, _, err = run_to_end([f"{kind}:8:8", *argv], program=[PROGRAM])
    assert status == 0, err
    assert_finite(run)
    before, skipped, after = state(run, 7), state(run, 8), state(run, 9)
    names = [name for name in before if name != "optimizer.step"]
    assert names and all(torch.equal(before[name], skipped[name]) for name in names)
    assert any(not torch.equal(skipped[name], after[name]) for name in names)
    counts = {line["step"]: line.get("train/skipped") for line in metrics_of(run) if line["step"]}
    assert counts[8] == 1 and not any(counts[step] for step in counts if step != 8)
    (told,) = incidents(run)
    assert (told["step"], told["kind"]) == (8, "skipped") and len(told["examples"]) == 8
    # A loss that is not finite makes a gradient that is not, and not the other way round.
    assert (told["loss"] is None) == (kind != "gradient") and told["grad_norm"] is None
    assert "step 8" in err and "incidents.jsonl" in err


def test_steps_that_are_never_finite_end_the_run_with_a_good_state(tiny_sudoku, tmp_path):
    argv = words(tiny_sudoku, tmp_path, *EACH, "run_name=r", "max_steps=14", "max_skipped_steps=3")
    run = tmp_path / tiny_sudoku.name / "r"
    status, _, err = run_to_end(["gradient:6:99", *argv], program=[PROGRAM])
    assert status == 2 and "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    for part in ("3 updates in a row", "step 8", "the gradient of lm_head.weight is not finite", "lr=0.001"):
        assert part in line, line
    assert newest(run) == 8
    assert_finite(run)
    assert all(torch.equal(a, state(run, 5)[name]) for name, a in state(run, 8).items() if "step" not in name)
    assert [(told["step"], told["kind"]) for told in incidents(run)] == [(n, "skipped") for n in (6, 7, 8)]
    # Where the cause is gone, the same command goes on.
    status, out, err = run_to_end(argv)
    assert status == 0 and "at step 8;" in out, err
    assert newest(run) == 14


def test_one_rank_makes_all_ranks_skip(tiny_sudoku, tmp_path):
    argv = words(tiny_sudoku, tmp_path, *EACH, "run_name=r", "max_steps=10")
    run = tmp_path / tiny_sudoku.name / "r"
    (ended,) = torchrun(2, PROGRAM, "gradient:5:5:1", *argv)
    assert ended.status == 0, ended.text
    assert_finite(run)
    assert all(torch.equal(a, state(run, 5)[name]) for name, a in state(run, 4).items() if "step" not in name)
    assert [(told["step"], len(told["examples"])) for told in incidents(run)] == [(5, 8)]


def test_a_spike_sends_the_run_back_and_on_behind_its_batch(tiny_sudoku, tmp_path):
    more = ["log_interval=1", "epochs=16", "checkpoint_interval=5", "spike_rewinds=1", "run_name=r"]
    run = tmp_path / tiny_sudoku.name / "r"
    status, _, err = run_to_end(
        ["weights:68:68", *words(tiny_sudoku, tmp_path, *more)],
        program=[PROGRAM],
    )
    assert status == 0, err
    spike, rewind = incidents(run)
    assert (spike["kind"], spike["step"], len(spike["examples"])) == ("spike", 68, 8)
    assert (rewind["kind"], rewind["to_step"]) == ("rewind", 65)
    assert "went back to step 65" in err
    # Steps 66 to 68 were done again with later batches, so the data end three steps early.
    lines = [line for line in metrics_of(run) if "train/loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 94))
    assert max(line["train/loss"] for line in lines[60:]) < 0.5 * spike["loss"]
    assert_finite(run)
