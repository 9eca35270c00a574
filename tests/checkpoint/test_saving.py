"""Checkpoints written behind the back of training: one step's state, one at a time, errors told in time."""

import threading
from pathlib import Path

import pytest
import torch

from hrm.checkpoint import save as saving
from hrm.checkpoint.read import load_checkpoint
from hrm.checkpoint.safe_io import CheckpointError
from hrm.checkpoint.save import Saver


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing waits for it."""
    event, swap_in = threading.Event(), saving._swap_in

    def held(temp: Path, final: Path) -> None:
        assert event.wait(30)
        swap_in(temp, final)

    monkeypatch.setattr(saving, "_swap_in", held)
    return event


def begin(saver: Saver, step: int, weights: torch.Tensor, moments: torch.Tensor) -> Path:
    return saver.save(step, weights={"w": weights}, training={"m": [moments, step]}, run={})


def test_a_save_has_the_state_at_its_call(tmp_path, gate):
    weights, moments = torch.zeros(1000), torch.zeros(10)
    with Saver(tmp_path) as saver:
        folder = begin(saver, 3, weights, moments)
        # Training goes on before anything is on the disk.
        weights.fill_(7.0)
        moments.fill_(7.0)
        assert folder == tmp_path / "step_3" and not folder.exists()
        gate.set()
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.step == 3 and not checkpoint.weights["w"].any()
    assert not checkpoint.training["m"][0].any() and checkpoint.training["m"][1] == 3


def test_one_is_written_at_a_time_and_in_order(tmp_path, gate):
    with Saver(tmp_path, keep=2) as saver:
        begin(saver, 1, torch.ones(2), torch.ones(2))
        assert not (tmp_path / "step_1").exists()
        threading.Timer(0.2, gate.set).start()
        begin(saver, 2, torch.ones(2), torch.ones(2))
        # The second had to wait for the first.
        assert (tmp_path / "step_1").exists()
        begin(saver, 3, torch.ones(2), torch.ones(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_2", "step_3"]
    assert load_checkpoint(tmp_path).step == 3


def test_write_errors_are_reported_at_the_next_check(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    saver = Saver(tmp_path)
    begin(saver, 1, torch.ones(2), torch.ones(2))
    saver.wait()
    saver.check()
    monkeypatch.setattr(saving, "save_file", full)
    begin(saver, 2, torch.ones(2), torch.ones(2))
    with pytest.raises(CheckpointError, match=r"No space left on device .* free space"):
        for _ in range(10_000):
            saver.check()
            threading.Event().wait(0.001)
    # Once, and the next one may succeed.
    saver.check()
    monkeypatch.undo()
    begin(saver, 3, torch.ones(2), torch.ones(2))
    saver.wait()
    assert load_checkpoint(tmp_path).step == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_3"]


def test_an_earlier_error_hides_that_of_a_save(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_file", full)
    with pytest.raises(KeyError, match="first"), Saver(tmp_path) as saver:
        begin(saver, 1, torch.ones(2), torch.ones(2))
        raise KeyError("first")
    with pytest.raises(CheckpointError), Saver(tmp_path) as saver:
        begin(saver, 1, torch.ones(2), torch.ones(2))
