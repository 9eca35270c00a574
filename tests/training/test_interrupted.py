"""Runs that end at the awkward moments around an evaluation go on as if they had not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train
from hrm.checkpoint.read import load_checkpoint, read_manifest
from hrm.training.checkpointer import Checkpointer
from hrm.training.evaluation import Evaluator
from hrm.training.monitor import Monitor
from hrm.training.signals import TERMINATE, Stopped
from hrm.training.spikes import LossWatch, Spike
from tests.support.runs import assert_same_run, metrics_of, words


class Killed(Exception):
    """In place of a SIGKILL."""


def struck(
    monkeypatch: pytest.MonkeyPatch, owner: type, method: str, strikes: Callable[[Any], Exception | None]
) -> None:
    """`owner.method` raises what `strikes` returns for the run's progress, if it is an error."""
    original = getattr(owner, method)

    def called(self, progress, *args, **kwargs):
        error = strikes(progress)
        if error is not None:
            raise error
        return original(self, progress, *args, **kwargs)

    monkeypatch.setattr(owner, method, called)


def folder(out: Path, name: str) -> Path:
    return out / "p" / name


def evaluated(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["eval/all/count"]) for line in metrics_of(run) if "eval/all/count" in line]


def test_an_evaluation_stopped_and_killed_is_logged_once(tiny_sudoku, tmp_path, monkeypatch):
    """In the stage it belongs to: of a run whose last step, 34, is inside of an interval."""
    stages = "stages=[{halt_max_steps: 1, epochs: 4}, {halt_max_steps: 3, epochs: 4}]"
    given = words(tiny_sudoku, tmp_path, "project_name=p", stages, "max_steps=34", "log_interval=5")
    argv = [word for word in given if not word.startswith("epochs=")]
    assert train.main([*argv, "run_name=whole"]) == 0
    for step in (24, 34):
        with monkeypatch.context() as patch:
            struck(
                patch,
                Evaluator,
                "measure",
                lambda progress, at=step: Stopped(TERMINATE) if progress.step == at else None,
            )
            assert train.main([*argv, "run_name=r"]) == 143
        saved = load_checkpoint(folder(tmp_path, "r"))
        assert saved.step == step and saved.training["evaluation_due"]
        with monkeypatch.context() as patch:
            # Logged, and not saved any more.
            struck(
                patch,
                Checkpointer,
                "save",
                lambda progress, at=step: Killed() if progress.step == at else None,
            )
            with pytest.raises(Killed):
                train.main([*argv, "run_name=r"])
        assert evaluated(folder(tmp_path, "r"))[-1] == (step, 20)
    assert train.main([*argv, "run_name=r"]) == 0
    assert evaluated(folder(tmp_path, "r")) == [(12, 20), (24, 20), (34, 20)]
    assert_same_run(folder(tmp_path, "whole"), folder(tmp_path, "r"))


def test_the_full_evaluation_after_a_sampled_one_is_not_lost(tiny_sudoku, tmp_path, monkeypatch):
    still = ["lr=0", "puzzle_emb_lr=0", "best_metric=lm_loss", "early_stop_patience=1", "eval_samples=7"]
    argv = words(tiny_sudoku, tmp_path, "project_name=p", "run_name=r", *still)
    with monkeypatch.context() as patch:
        # After the sampled evaluation's checkpoint.
        struck(
            patch,
            Evaluator,
            "measure",
            lambda progress: Killed() if progress.step == 24 and progress.evaluations else None,
        )
        with pytest.raises(Killed):
            train.main(argv)
    run = folder(tmp_path, "r")
    assert evaluated(run) == [(12, 7), (24, 7)]
    score = read_manifest(run / "step_24")["score"]
    for _ in range(2):
        assert train.main(argv) == 0
        assert evaluated(run) == [(12, 7), (24, 7), (24, 20)]
        manifest = read_manifest(run / "step_24")
        assert manifest["score"] == score and manifest["metrics"]["eval"]["all"]["count"] == 20


def test_checkpoints_by_step_are_made_at_evaluations_too(tiny_sudoku, tmp_path):
    options = [
        "checkpoint_every_eval=false",
        "keep_best=false",
        "keep_checkpoints=null",
        "checkpoint_seconds=null",
    ]
    argv = words(tiny_sudoku, tmp_path, "project_name=p", "run_name=r", "checkpoint_interval=12", *options)
    assert train.main(argv) == 0
    steps = {int(path.name.removeprefix("step_")) for path in folder(tmp_path, "r").glob("step_*")}
    assert steps == {12, 24, 36, 48}


def test_a_rewind_keeps_the_checkpoints_score(tiny_sudoku, tmp_path, monkeypatch):
    def check(watch, steps, losses):
        return Spike(27, 9.0, 1.0, 0.1) if 28 in steps else None

    monkeypatch.setattr(LossWatch, "check", check)
    argv = words(
        tiny_sudoku, tmp_path, "project_name=p", "run_name=r", "spike_rewinds=1", "keep_checkpoints=null"
    )
    seen: list[Any] = []
    struck(
        monkeypatch,
        Monitor,
        "rewind",
        lambda progress: seen.append((progress.checkpoint, read_manifest(progress.checkpoint))),
    )
    assert train.main(argv) == 0
    [(checkpoint, before)] = seen
    after = read_manifest(checkpoint)
    assert checkpoint.name == "step_24" and before["score"] is not None
    assert (after["score"], after["metrics"]) == (before["score"], before["metrics"])
    assert after["serial"] == before["serial"] + 1
    # The data ended four steps early, with an evaluation all the same.
    assert evaluated(folder(tmp_path, "r")) == [(12, 20), (24, 20), (32, 20), (44, 20)]


def test_a_run_stopped_during_compilation_starts_again(tiny_sudoku, tmp_path, monkeypatch, capsys):
    """It leaves no folder and no mode, and the same command is a run as if nothing had been."""
    argv = words(tiny_sudoku, tmp_path, "project_name=p", "run_name=r", "max_steps=4", "mode=auto")
    whole = words(tiny_sudoku, tmp_path, "project_name=p", "run_name=whole", "max_steps=4")

    def interrupted(*_):
        raise Stopped(TERMINATE)

    with monkeypatch.context() as patch:
        patch.setattr("hrm.engine.engine.faster_mode", interrupted)
        assert train.main(argv) == 143
    assert not folder(tmp_path, "r").exists()
    assert capsys.readouterr().out.splitlines()[-1] == (
        "SIGTERM: stopped before the first step, so nothing had to be saved; the same command starts or "
        "continues the run"
    )
    assert train.main(argv) == train.main(whole) == 0
    assert_same_run(folder(tmp_path, "whole"), folder(tmp_path, "r"))
