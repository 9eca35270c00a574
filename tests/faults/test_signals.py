"""Asked to end, by a signal or a limit of time: a step is finished, saved, and gone on from, bit for bit."""

import os
import signal
import time
from pathlib import Path

import pytest

import train
from hrm.checkpoint.read import load_checkpoint
from hrm.training.signals import ECHO
from tests.faults.harness import Trainer, last_step, newest, resumed_step, run_to_end, saving
from tests.support.runs import assert_same_run, metrics_of, words

# 24 steps, with an evaluation every 12.
LONG = ["epochs=4", "log_interval=1", "ema=true"]
# Two evaluations, after 12 steps and after 14.
SHORT = [*LONG, "max_steps=14"]


def folder(data: Path, out: Path, name: str) -> Path:
    return out / data.name / name


@pytest.fixture(scope="module")
def whole(tiny_sudoku, tmp_path_factory) -> Path:
    """The run left alone."""
    out = tmp_path_factory.mktemp("whole")
    assert train.main(words(tiny_sudoku, out, *LONG, "run_name=whole")) == 0
    return folder(tiny_sudoku, out, "whole")


@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_the_run_after_the_step_and_the_same_command_continues(
    tiny_sudoku, tmp_path, whole, name, status
):
    argv = words(tiny_sudoku, tmp_path, *LONG, "run_name=r")
    run = folder(tiny_sudoku, tmp_path, "r")
    with Trainer(argv, hold=4, fork=name != "SIGTERM") as trainer:
        trainer.wait_until_held()
        assert trainer.signal(getattr(signal, name)) == status
        out, err = trainer.out, trainer.err
    assert f"{name}: saves and ends after this step; a second signal ends at once\n" in err
    assert "Traceback" not in err and "error:" not in err
    step = newest(run)
    assert step == last_step(run) == 4 and not saving(run)
    assert f"{name}: stopped after step {step} of 24, saved in {run}/step_{step}; the same command" in out
    ended, out, err = run_to_end(argv)
    assert ended == 0 and resumed_step(out) == step, err
    assert_same_run(whole, run)


def test_a_limit_of_time_ends_the_run_again_and_again(tiny_sudoku, tmp_path, whole, capsys):
    argv = words(tiny_sudoku, tmp_path, *LONG, "run_name=r", "max_seconds=0.001")
    run = folder(tiny_sudoku, tmp_path, "r")
    steps: list[int] = []
    while (status := train.main(argv)) == 75:
        out = capsys.readouterr().out
        steps.append(newest(run))
        assert len(steps) < 2 or steps[-1] > steps[-2]
        assert f"max_seconds: stopped after step {steps[-1]} of 24" in out
        assert resumed_step(out) == (steps[-2] if len(steps) > 1 else 0)
    assert status == 0
    assert steps and steps[-1] < 24
    assert_same_run(whole, run)


def test_a_signal_interrupts_an_evaluation(tiny_sudoku, tmp_path):
    run = folder(tiny_sudoku, tmp_path, "r")
    argv = words(tiny_sudoku, tmp_path, *SHORT, "run_name=r")
    # The second process resumes at the evaluation.
    for _ in range(2):
        with Trainer(argv, hold="evaluation") as trainer:
            trainer.wait_until_held()
            assert trainer.signal(signal.SIGTERM) == 143, trainer.err
        assert newest(run) == 12 and "eval/all/count" not in metrics_of(run)[-1]
    assert run_to_end(argv)[0] == 0
    assert train.main(words(tiny_sudoku, tmp_path, *SHORT, "run_name=whole")) == 0
    evaluated = [line["step"] for line in metrics_of(run) if "eval/all/count" in line]
    assert evaluated == [12, 14]
    assert_same_run(folder(tiny_sudoku, tmp_path, "whole"), run)


def test_a_second_signal_ends_at_once(tiny_sudoku, tmp_path):
    argv = words(tiny_sudoku, tmp_path, "log_interval=1", "run_name=r")
    run = folder(tiny_sudoku, tmp_path, "r")
    with Trainer(argv, hold=1) as trainer:
        trainer.wait_until_held()
        trainer.process.send_signal(signal.SIGINT)
        trainer.wait_for(lambda: "a second signal ends at once" in trainer.err)
        # Not taken for an echo of the first.
        time.sleep(ECHO + 0.5)
        trainer.process.send_signal(signal.SIGTERM)
        assert trainer.end() == -signal.SIGTERM, trainer.err
        assert "Traceback" not in trainer.err
    assert newest(run) == 0 and last_step(run) == 0


def test_a_signal_after_the_last_step_has_no_effect(tiny_sudoku, tmp_path, whole):
    """The last step's checkpoint holds the whole run, whichever of them was met."""
    argv = words(tiny_sudoku, tmp_path, *LONG, "run_name=r")
    run = folder(tiny_sudoku, tmp_path, "r")
    with Trainer(argv, hold=24) as trainer:
        trainer.wait_until_held()
        status = trainer.signal(signal.SIGTERM)
    assert status in (0, 143)
    assert run_to_end(argv)[0] == 0
    assert load_checkpoint(run).step == 24
    assert_same_run(whole, run)


# The terminal on its standard input becomes its own, as a login's is.
LOGIN = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"


def test_a_terminal_that_closes_ends_the_run_with_a_checkpoint(tiny_sudoku, tmp_path, whole):
    run = folder(tiny_sudoku, tmp_path, "r")
    argv = words(tiny_sudoku, tmp_path, *LONG, "run_name=r")
    ours, its = os.openpty()
    streams = {"stdin": its, "stdout": its, "stderr": its, "start_new_session": True}
    with Trainer(argv, before=LOGIN, hold=4, **streams) as trainer:
        os.close(its)
        trainer.wait_until_held()
        os.close(ours)
        trainer.release()
        assert trainer.end() == 129
    assert newest(run) == last_step(run) == 4
    assert run_to_end(argv)[0] == 0
    assert_same_run(whole, run)


@pytest.mark.parametrize("signalled", [True, False])
def test_a_closed_pipe_does_not_lose_the_checkpoint(tiny_sudoku, tmp_path, whole, signalled):
    """In `train.py 2>&1 | tee log` Ctrl-C ends tee as well; in `train.py | head` no signal is sent."""
    run = folder(tiny_sudoku, tmp_path, "r")
    argv = words(tiny_sudoku, tmp_path, *LONG, "run_name=r")
    reader, writer = os.pipe()
    with Trainer(argv, hold=4, stdout=writer, stderr=writer) as trainer:
        os.close(writer)
        trainer.wait_until_held()
        os.close(reader)
        if signalled:
            assert trainer.signal(signal.SIGTERM) == 143
        else:
            trainer.release()
            assert trainer.end() == 141
    assert 4 <= newest(run) == last_step(run) < (5 if signalled else 24)
    assert run_to_end(argv)[0] == 0
    assert_same_run(whole, run)
