"""Metrics: every line valid, a resumed file like a whole one, trackers that never ask, quiet logs."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hrm.common.errors import UserError
from hrm.training import logging as trackers
from hrm.training.logging import MetricsFile, ProgressBar, make_tracker
from tests.support.fake_wandb import FakeWandb
from tests.support.paths import ROOT


def strict(constant: str) -> None:
    raise ValueError(constant)


def lines(run: Path) -> list[dict[str, Any]]:
    text = (run / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=strict) for line in text.splitlines()]


# --- metrics.jsonl


def test_each_line_is_strict_json(tmp_path: Path) -> None:
    log = MetricsFile(tmp_path / "project" / "run")
    log.log({"train/loss": 0.1, "train/count": 3}, 1)
    # read before the file is closed: a line is out as soon as it is logged
    assert lines(tmp_path / "project" / "run") == [{"step": 1, "train/loss": 0.1, "train/count": 3}]
    log.log({"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": True, "e": "text", "f": None}, 2)
    log.log({"a": np.float32(0.5), "b": torch.tensor(2.5), "c": np.int64(3), "d": torch.tensor(torch.nan)}, 3)
    log.close()
    assert lines(tmp_path / "project" / "run")[1:] == [
        {"step": 2, "a": None, "b": None, "c": None, "d": True, "e": "text", "f": None},
        {"step": 3, "a": 0.5, "b": 2.5, "c": 3, "d": None},
    ]


def test_a_fresh_run_starts_a_fresh_file(tmp_path: Path) -> None:
    for value in (1, 2):
        log = MetricsFile(tmp_path)
        log.log({"value": value}, 1)
        log.close()
    assert lines(tmp_path) == [{"step": 1, "value": 2}]


@pytest.mark.parametrize(
    "tail",
    [
        b"",
        b'{"step": 7, "train/lo',
        b'{"step": 3, "train/loss": 3}',
        b"\xff\xfe\n",
        b"3\n",
        b'{"step": "3"}\n',
    ],
)
def test_a_resumed_file_equals_the_uninterrupted_one(tmp_path: Path, tail: bytes) -> None:
    def run(folder: Path, first: int, last: int, resume_step: int | None) -> None:
        log = MetricsFile(folder, resume_step)
        for step in range(first, last + 1):
            log.log({"train/loss": step / 7}, step)
            if step % 3 == 0:
                log.log({"eval/test/accuracy": step / 3}, step)
        log.close()

    run(tmp_path / "whole", 1, 9, None)
    run(tmp_path / "cut", 1, 6, None)
    with open(tmp_path / "cut" / "metrics.jsonl", "ab") as file:
        file.write(tail)
    run(tmp_path / "cut", 4, 9, 3)
    whole, cut = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut"))
    assert whole.count(b"\n") == 12 and cut == whole
    assert os.listdir(tmp_path / "cut") == ["metrics.jsonl"]


def test_a_run_resumed_without_its_metrics_starts_them(tmp_path: Path) -> None:
    log = MetricsFile(tmp_path, 5)
    log.log({"a": 1}, 6)
    log.close()
    assert lines(tmp_path) == [{"step": 6, "a": 1}]


@pytest.mark.slow
def test_a_killed_process_loses_no_logged_line(tmp_path: Path) -> None:
    script = (
        "import os, sys; from hrm.training.logging import MetricsFile; log = MetricsFile(sys.argv[1])\n"
        "for step in range(5): log.log({'a': step}, step)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -9
    assert lines(tmp_path) == [{"step": step, "a": step} for step in range(5)]


def test_metrics_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write \S+/file/run/metrics\.jsonl: .*output_dir="):
        MetricsFile(tmp_path / "file" / "run")
    log = MetricsFile(tmp_path)
    # a device that is always full
    if Path("/dev/full").exists():
        log._file = open("/dev/full", "w")  # noqa: SIM115
        with pytest.raises(UserError, match=r"metrics\.jsonl: No space left on device; free space"):
            log.log({"a": 1}, 1)
        log.close()


# --- trackers


def test_no_tracker(tmp_path: Path) -> None:
    tracker = make_tracker("none", tmp_path / "run")
    tracker.log({"a": 1.0}, 1)
    tracker.close()
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="tracker=mlflow: expected none, tensorboard or wandb"):
        make_tracker("mlflow", tmp_path)


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    # None in sys.modules makes the import fail
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as caught:
        make_tracker(name, tmp_path)
    assert f"pip install -e '.[{name}]'" in str(caught.value)


def test_tensorboard_holds_the_scalars_and_hides_what_a_resume_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def run(steps: range, value: float, resume_step: int | None) -> None:
        tracker = make_tracker("tensorboard", tmp_path, resume_step=resume_step)
        for step in steps:
            tracker.log({"train/loss": value, "train/count": torch.tensor(step)}, step)
        tracker.close()

    run(range(1, 6), 1.5, None)
    run(range(4, 8), 2.5, 3)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    loss = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert loss == [(1, 1.5), (2, 1.5), (3, 1.5), (4, 2.5), (5, 2.5), (6, 2.5), (7, 2.5)]
    assert [event.value for event in events.Scalars("train/count")] == [1, 2, 3, 4, 5, 6, 7]


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb(logged_in=False))
    return fake


def test_wandb_is_offline_without_a_login(
    tmp_path: Path, fake_wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tracker("wandb", tmp_path)
    fake_wandb.logged_in = True
    make_tracker("wandb", tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    make_tracker("wandb", tmp_path)
    assert [call["mode"] for call in fake_wandb.calls] == ["offline", "online", "disabled"]


def test_wandb_logs_and_resumes_the_same_run(tmp_path: Path, fake_wandb: FakeWandb) -> None:
    run = tmp_path / "project" / "run"
    tracker = make_tracker("wandb", run, project="sudoku", run="gated", config={"lr": 0.1})
    tracker.log({"train/loss": 0.5}, 1)
    tracker.log({"train/loss": 0.25}, 2)
    tracker.close()
    first = fake_wandb.calls[0]
    assert (first["project"], first["name"], first["config"]) == ("sudoku", "gated", {"lr": 0.1})
    assert (first["dir"], first["resume"]) == (str(run), "allow")
    assert fake_wandb.logged == [(1, {"train/loss": 0.5}), (2, {"train/loss": 0.25})]
    assert fake_wandb.finished == 1
    make_tracker("wandb", run, resume_step=2)
    make_tracker("wandb", run, resume_step=None)
    make_tracker("wandb", run, resume_step=3)
    (run / "wandb_id.txt").write_text("../not an id\n")
    make_tracker("wandb", run, resume_step=4)
    ids = [call["id"] for call in fake_wandb.calls]
    # resumed; a new run; that one resumed; a new one for want of an id
    assert ids[0] == ids[1] and ids[2] == ids[3] and len({ids[0], ids[2], ids[4]}) == 3
    assert all(re.fullmatch(r"[0-9a-f]{8}", id) for id in ids)


def test_wandb_that_cannot_start(tmp_path: Path, fake_wandb: FakeWandb) -> None:
    fake_wandb.fails = "no network\nand a long story"
    with pytest.raises(UserError) as caught:
        make_tracker("wandb", tmp_path)
    message = "tracker=wandb cannot start: no network; set WANDB_MODE=offline, or use tracker=none"
    assert str(caught.value) == message


# --- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


METRICS = {
    "train/loss": 1.23456,
    "train/accuracy": 0.5,
    "train/exact_accuracy": 0.125,
    "train/steps": 3.25,
    "train/samples_per_second": 1234.4,
    "train/lr": 0.1,
}
SHOWN = "loss 1.2346  token 50.0%  exact 12.5%  ACT steps 3.2  1234 samples/s"


def test_plain_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, file = SimpleNamespace(now=100.0), io.StringIO()
    monkeypatch.setattr(trackers.time, "monotonic", lambda: clock.now)
    progress = ProgressBar(40, 10, file=file)
    for step in range(11, 41):
        clock.now += 1.0
        progress.update(step, METRICS if step < 20 else None)
    progress.close()
    assert file.getvalue().splitlines() == [
        f"step 11/40  {SHOWN}  00:29 left",
        f"step 21/40  {SHOWN}  00:19 left",
        "step 31/40  00:09 left",
        f"step 40/40  {SHOWN}",
    ]


def test_the_time_left_counts_no_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, file = SimpleNamespace(now=100.0), io.StringIO()
    monkeypatch.setattr(trackers.time, "monotonic", lambda: clock.now)
    progress = ProgressBar(40, file=file)
    for step in range(1, 31):
        clock.now += 1.0
        progress.update(step)
        if step == 15:
            clock.now += 1000.0
            progress.resume_clock()
    assert file.getvalue().splitlines() == [
        "step 1/40  00:39 left",
        "step 11/40  00:29 left",
        "step 16/40  00:24 left",
        "step 26/40  00:14 left",
    ]


def test_plain_lines_of_few_or_bad_metrics() -> None:
    file = io.StringIO()
    progress = ProgressBar(2, file=file, seconds=0)
    progress.update(1, {"train/lr": 1.0})
    progress.write("an evaluation")
    progress.update(2, {"train/loss": float("nan"), "train/accuracy": torch.tensor(1.0)})
    first, second, third = file.getvalue().splitlines()
    assert first.startswith("step 1/2") and "left" in first and "loss" not in first
    assert (second, third) == ("an evaluation", "step 2/2  loss nan  token 100.0%")


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    # else cut to this width
    monkeypatch.delenv("COLUMNS", raising=False)
    file = Terminal()
    progress = ProgressBar(40, 10, file=file)
    for step in range(11, 41):
        progress.update(step, METRICS)
    progress.write("an evaluation")
    progress.close()
    text = file.getvalue()
    assert "25%" in text and "an evaluation\n" in text
    last = text.rstrip().split("\r")[-1]
    assert "40/40" in last and SHOWN in last and "100%" in last and "00:00 left" in last


def test_a_terminal_without_columns_gets_plain_lines() -> None:
    # a new pseudo-terminal has 0 columns
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as file:
        ProgressBar(5, file=file).update(5, {"train/loss": 2.0})
        assert os.read(ours, 1000).decode() == "step 5/5  loss 2.0000\r\n"
    os.close(ours)


def test_standard_error_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressBar(5).update(5, {"train/loss": 2.0})
    out, err = capsys.readouterr()
    assert (out, err) == ("", "step 5/5  loss 2.0000\n")
