"""Going on with other data or options than a checkpoint's: refused with both named, unless it is forced."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train
from hrm.checkpoint.read import load_checkpoint
from hrm.data.sudoku.build import builtin_sudoku
from hrm.training.monitor import Monitor
from hrm.training.spikes import LossWatch, Spike
from tests.support.runs import metrics_of, run_main, words


@pytest.fixture
def other_sudoku(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tiny_sudoku, with other puzzles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HRM_CACHE", str(tmp_path_factory.mktemp("other")))
        return builtin_sudoku(4, 48, 20, 0, 1)


@pytest.fixture
def half(tiny_sudoku, tmp_path) -> list[str]:
    """The words of a run that has made 14 of its 48 steps, as the folder `p/r`."""
    argv = words(tiny_sudoku, tmp_path, "project_name=p", "run_name=r")
    assert train.main([*argv, "max_steps=14"]) == 0
    return argv


def changed(argv: list[str], *more: str) -> list[str]:
    names = {word.split("=")[0] for word in more}
    return [*(word for word in argv if word.split("=")[0] not in names), *more]


def manifest(tmp_path: Path) -> dict[str, Any]:
    return load_checkpoint(tmp_path / "p" / "r").manifest


def test_other_data_are_refused_with_both_values(half, tiny_sudoku, other_sudoku, tmp_path, capsys):
    argv = changed(half, f"data_path={other_sudoku}")
    status, _, err = run_main(*argv, capsys=capsys)
    assert status == 2 and err.count("\n") == 1
    for part in (str(tiny_sudoku), str(other_sudoku), "all__inputs.npy changed", "resume_force=true"):
        assert part in err
    saved = manifest(tmp_path)
    assert saved["dataset"]["path"] == str(tiny_sudoku) and saved["run"]["data_fingerprint"][:12] in err
    assert saved["config"]["arch"]["hidden_size"] == 32 and saved["versions"]["torch"] == torch.__version__


def test_forced_resumption_accepts_other_data(half, other_sudoku, tmp_path, capsys):
    status, out, err = run_main(
        *changed(half, f"data_path={other_sudoku}", "resume_force=true"), capsys=capsys
    )
    assert status == 0, err
    assert "resume_force=true: the training data were" in out and "at step 14" in out
    # Its interval of two epochs begins anew, twelve batches of two: 14 = 12 + 2 were done of it.
    assert "from the start of interval 1 on" in out
    checkpoint = load_checkpoint(tmp_path / "p" / "r")
    assert checkpoint.step == 48 and checkpoint.manifest["dataset"]["path"] == str(other_sudoku)
    steps = [line["step"] for line in metrics_of(tmp_path / "p" / "r") if "eval/all/count" in line]
    assert steps == [12, 14, 26, 38, 48] and checkpoint.training["best"]["step"] >= 26
    # And it is that data's from now on.
    assert run_main(*changed(half, f"data_path={other_sudoku}"), capsys=capsys)[0] == 0


def test_forced_resumption_accepts_other_options_and_keeps_weights(half, tmp_path, capsys):
    before = load_checkpoint(tmp_path / "p" / "r").weights
    still = ["lr=0", "puzzle_emb_lr=0", "max_steps=16"]
    other = changed(half, "arch.halt_max_steps=4", "seed=5", *still)
    status, _, err = run_main(*other, capsys=capsys)
    assert (
        status == 2 and "arch.halt_max_steps was 3 and is now 4" in err and "seed was 0 and is now 5" in err
    )
    status, out, err = run_main(*other, "resume_force=true", capsys=capsys)
    assert status == 0, err
    assert "resume_force=true: arch.halt_max_steps was 3 and is now 4" in out
    after = load_checkpoint(tmp_path / "p" / "r")
    assert after.step == 16 and after.manifest["run"]["seed"] == 5
    assert all(torch.equal(before[name], after.weights[name]) for name in before)
    # Sequences of two steps' age at most: those in flight were given up.
    assert int(after.training["carry"]["steps"].max()) <= 2


def test_another_architectures_tensors_are_refused_even_if_forced(half, tmp_path, capsys):
    kept = json.loads(json.dumps(manifest(tmp_path)))
    for option, name in (("arch.hidden_size=64", "H_init"), ("arch.use_gating=false", "gating_network")):
        status, _, err = run_main(*changed(half, option), "resume_force=true", capsys=capsys)
        assert status == 2 and err.count("\n") == 1
        assert name in err and "resume_force=true cannot make it fit" in err and "checkpoint_path=" in err
    assert manifest(tmp_path) == kept


def test_another_interval_continues_after_the_finished_epochs(half, tmp_path, capsys):
    """14 steps of 6 an epoch: one interval of two epochs is done, which is two of one epoch."""
    status, out, err = run_main(*changed(half, "eval_interval=1", "resume_force=true"), capsys=capsys)
    assert status == 0, err
    assert "from the start of interval 2 on" in out
    lines = metrics_of(tmp_path / "p" / "r")
    evaluated = [line["step"] for line in lines if "eval/all/count" in line]
    assert evaluated == [12, 14, 20, 26, 32, 38, 44, 48]
    assert np.isfinite([line["train/loss"] for line in lines if "train/loss" in line]).all()


def test_a_run_killed_after_a_rewind_continues_from_it(tiny_sudoku, tmp_path, capsys, monkeypatch):
    """The state before the spike is the newest one, though later steps were saved before it."""

    class Killed(Exception):
        pass

    def check(watch, steps, losses):
        return Spike(23, 9.0, 1.0, 0.1) if 24 in steps else None

    monkeypatch.setattr(LossWatch, "check", check)
    argv = words(tiny_sudoku, tmp_path, "project_name=p", "run_name=r", "checkpoint_interval=5")
    argv.append("spike_rewinds=1")
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "rewind", killed_after(Monitor.rewind, Killed))
        with pytest.raises(Killed):
            train.main(argv)
    checkpoint = load_checkpoint(tmp_path / "p" / "r")
    assert checkpoint.step == 20 and checkpoint.training["position"] == [2, 0]
    assert checkpoint.training["incidents"]["rewinds"] == 1
    status, out, err = run_main(*argv, capsys=capsys)
    assert status == 0 and "at step 20;" in out, err
    # Once is enough: the next spike is told, and the run ends with the data.
    steps = [line["step"] for line in metrics_of(tmp_path / "p" / "r") if "train/loss" in line]
    assert steps[-1] == 44 and len(steps) == len(set(steps))


def killed_after(method: Any, error: type[Exception]) -> Any:
    def killed(*args: Any) -> None:
        method(*args)
        raise error

    return killed
