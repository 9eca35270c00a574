"""Asked to end, by a signal or a limit of time: a step is finished, saved, and gone on from, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from hrm.checkpoint.read import load_checkpoint
from hrm.training.signals import ECHO
from tests.faults.harness import (
    PATIENCE,
    ROOT,
    Trainer,
    last_step,
    newest,
    resumed_step,
    run_to_end,
    saving,
    words,
)
from tests.test_train import assert_same_run, metrics_of

# 96 steps, with an evaluation every 12.
LONG = ["epochs=16", "log_interval=1", "ema=true"]
# An evaluation that takes a second or more, after 12 steps and after 14.
THINKING = [*LONG, "arch.halt_max_steps=300", "max_steps=14"]


def folder(data: Path, out: Path, name: str) -> Path:
    return out / data.name / name


@pytest.fixture(scope="module")
def whole(tiny_sudoku, tmp_path_factory) -> Path:
    """The run left alone."""
    out = tmp_path_factory.mktemp("whole")
    assert train.main(words(tiny_sudoku, out, *LONG, "run_name=whole")) == 0
    return folder(tiny_sudoku, out, "whole")


@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_the_run_after_the_step_and_the_same_command_goes_on(
    tiny_sudoku, tmp_path, whole, name, status
):
    argv = words(tiny_sudoku, tmp_path, *LONG, "run_name=r")
    run = folder(tiny_sudoku, tmp_path, "r")
    with Trainer(argv) as trainer:
        trainer.wait_for(lambda: last_step(run) >= 3)
        assert trainer.signal(getattr(signal, name)) == status
        out, err = trainer.out, trainer.err
    assert f"{name}: saves and ends after this step; a second signal ends at once\n" in err
    assert "Traceback" not in err and "error:" not in err
    step = newest(run)
    # Of the very step, at an evaluation or not, and with all that was logged.
    assert 3 <= step < 96 and step == last_step(run) and not saving(run)
    assert f"{name}: stopped after step {step} of 96, saved in {run}/step_{step}; the same command" in out
    ended, out, err = run_to_end(argv)
    assert ended == 0 and resumed_step(out) == step, err
    assert_same_run(whole, run)


def test_a_limit_of_time_ends_the_run_again_and_again(tiny_sudoku, tmp_path, whole, capsys):
    argv = words(tiny_sudoku, tmp_path, *LONG, "run_name=r", "max_seconds=0.3")
    run = folder(tiny_sudoku, tmp_path, "r")
    steps = []
    while (status := train.main(argv)) == 75:
        out = capsys.readouterr().out
        steps.append(newest(run))
        assert f"max_seconds: stopped after step {steps[-1]} of 96" in out
        assert resumed_step(out) == (steps[-2] if len(steps) > 1 else 0)
    assert status == 0
    # Each got somewhere, none to the end.
    assert steps and steps == sorted(set(steps)) and steps[-1] < 96
    assert_same_run(whole, run)


def test_a_signal_during_an_evaluation_is_met_before_its_end(tiny_sudoku, tmp_path):
    run = folder(tiny_sudoku, tmp_path, "r")
    argv = words(tiny_sudoku, tmp_path, *THINKING, "run_name=r")
    for _ in range(2):
        with Trainer(argv) as trainer:
            # The second process goes on with the evaluation.
            trainer.wait_for(lambda: last_step(run) == 12 and "steps of 8" in trainer.out)
            time.sleep(0.5)
            assert trainer.signal(signal.SIGTERM) == 143, trainer.err
        assert newest(run) == 12 and "eval/all/count" not in metrics_of(run)[-1]
    assert run_to_end(argv)[0] == 0
    assert train.main(words(tiny_sudoku, tmp_path, *THINKING, "run_name=whole")) == 0
    evaluated = [line["step"] for line in metrics_of(run) if "eval/all/count" in line]
    assert evaluated == [12, 14]
    assert_same_run(folder(tiny_sudoku, tmp_path, "whole"), run)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(tiny_sudoku, tmp_path, second):
    # Steps of many seconds: one is under way when the signals come.
    slow = ["arch.halt_max_steps=3", "arch.H_cycles=300", "arch.L_cycles=20", "log_interval=1"]
    argv = words(tiny_sudoku, tmp_path, *slow, "run_name=r")
    run = folder(tiny_sudoku, tmp_path, "r")
    with Trainer(argv) as trainer:
        trainer.wait_for(lambda: "steps of 8" in trainer.out and (run / "metrics.jsonl").exists())
        time.sleep(0.5)
        trainer.process.send_signal(signal.SIGINT)
        trainer.wait_for(lambda: "a second signal ends at once" in trainer.err)
        # Not taken for an echo of the first.
        time.sleep(ECHO + 0.5)
        assert trainer.signal(second) == -second, trainer.err
        assert "Traceback" not in trainer.err
    assert newest(run) == 0 and last_step(run) == 0


def test_a_signal_after_which_nothing_is_left_to_do_ends_as_if_none_had_come(tiny_sudoku, tmp_path, whole):
    """The last step's checkpoint holds the whole run, whichever of them was met."""
    argv = words(tiny_sudoku, tmp_path, *LONG, "run_name=r")
    run = folder(tiny_sudoku, tmp_path, "r")
    with Trainer(argv) as trainer:
        trainer.wait_for(lambda: last_step(run) >= 96)
        status = trainer.signal(signal.SIGTERM)
    assert status in (0, 143)
    assert run_to_end(argv)[0] == 0
    assert load_checkpoint(run).step == 96
    assert_same_run(whole, run)


# The terminal on its standard input becomes its own, as a login's is.
LOGIN = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_terminal_that_closes_ends_the_run_with_a_checkpoint(tiny_sudoku, tmp_path, whole):
    run = folder(tiny_sudoku, tmp_path, "r")
    argv = words(tiny_sudoku, tmp_path, *LONG, "run_name=r")
    ours, its = os.openpty()
    command = [sys.executable, "-c", LOGIN, sys.executable, "train.py", *argv]
    streams = {"stdin": its, "stdout": its, "stderr": its}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams) as process:
        os.close(its)
        try:
            deadline = time.monotonic() + PATIENCE
            while last_step(run) < 3 and time.monotonic() < deadline:
                os.read(ours, 1 << 16)
            os.close(ours)
            assert process.wait(PATIENCE) == 129
        finally:
            process.kill()
    step = newest(run)
    assert 3 <= step < 96 and step == last_step(run)
    assert run_to_end(argv)[0] == 0
    assert_same_run(whole, run)


def test_a_pipe_that_nobody_reads_any_more_does_not_cost_the_checkpoint(tiny_sudoku, tmp_path, whole):
    """As in `train.py 2>&1 | tee log`, where Ctrl-C ends tee as well."""
    run = folder(tiny_sudoku, tmp_path, "r")
    argv = words(tiny_sudoku, tmp_path, *LONG, "run_name=r")
    reader, writer = os.pipe()
    command = [sys.executable, "train.py", *argv]
    with subprocess.Popen(command, cwd=ROOT, stdout=writer, stderr=writer) as process:
        os.close(writer)
        try:
            deadline = time.monotonic() + PATIENCE
            while last_step(run) < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            os.close(reader)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 143
        finally:
            process.kill()
    step = newest(run)
    assert 3 <= step < 96 and step == last_step(run)
    assert run_to_end(argv)[0] == 0
    assert_same_run(whole, run)
