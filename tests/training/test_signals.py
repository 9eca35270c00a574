"""Requests to end a run: what they are when, and what a signal does the second time."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from hrm.common.errors import Stopped
from hrm.training import signals as interruption
from hrm.training.signals import (
    CONTINUE,
    HANG_UP,
    INTERRUPT,
    REASONS,
    SAVE,
    TERMINATE,
    TIME_OVER,
    UNREAD,
    StopSignals,
)
from tests.support.paths import ROOT


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_checkpoint_is_due_by_time_and_the_end_goes_before_it(clock):
    asked = StopSignals(max_seconds=60, save_seconds=10)
    assert asked.ask() == CONTINUE
    clock[0] += 9.9
    assert asked.ask() == CONTINUE
    clock[0] += 0.1
    assert asked.ask() == SAVE
    # Once: by the time that all ranks have heard it another call has been made.
    assert asked.ask() == CONTINUE
    asked.saved()
    assert asked.ask() == CONTINUE
    clock[0] = 159.9
    assert asked.ask() == SAVE
    clock[0] = 160
    assert asked.ask() == TIME_OVER
    never = StopSignals(None, None)
    clock[0] += 1e9
    assert never.ask() == CONTINUE


def test_exit_statuses_match_the_documents():
    assert {code: status for code, (_, status) in REASONS.items()} == {
        TIME_OVER: 75,
        UNREAD: 141,
        HANG_UP: 129,
        INTERRUPT: 130,
        TERMINATE: 143,
    }
    document = (ROOT / "docs" / "fault_tolerance.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in document.splitlines() if re.match(r"\| \d[\d, ]* \|", line)]
    for name, status in REASONS.values():
        [(_, meaning, _)] = [row for row in rows if str(status) in row[0].strip("| ").split(", ")]
        assert name in meaning


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, INTERRUPT), (signal.SIGTERM, TERMINATE)])
def test_a_signal_is_noted_and_goes_before_the_time(number, code, capfd):
    before = {other: signal.getsignal(other) for other in (signal.SIGINT, signal.SIGTERM)}
    with StopSignals(max_seconds=1e-9, save_seconds=None) as asked:
        os.kill(os.getpid(), number)
        assert asked.ask() == code
        # From now on a signal is what it is to any process.
        assert {signal.getsignal(other) for other in before} == {signal.SIG_DFL}
    assert {other: signal.getsignal(other) for other in before} == before
    assert capfd.readouterr().err.strip() == (
        f"{signal.Signals(number).name}: saves and ends after this step; a second signal ends at once"
    )


def test_a_rank_that_does_not_speak_is_silent(capfd):
    with StopSignals(None, None, speaks=False) as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.ask() == TERMINATE
    assert capfd.readouterr().err == ""


def test_in_another_thread_signals_are_left_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        with StopSignals(1e-9, None) as asked:
            seen.extend([signal.getsignal(signal.SIGTERM), asked.ask()])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before, TIME_OVER]


TWICE = """
import time
from hrm.training.signals import StopSignals
with StopSignals(None, None):
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
"""


@pytest.mark.slow
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(second):
    with subprocess.Popen(
        [sys.executable, "-c", TWICE], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGTERM)
            while "a second signal" not in (line := process.stderr.readline()):
                assert line, "ended without a word"
            # An echo of it, as of a launcher, changes nothing.
            process.send_signal(signal.SIGTERM)
            time.sleep(interruption.ECHO + 0.5)
            assert process.poll() is None
            process.send_signal(second)
            assert process.wait(30) == -second
        finally:
            process.kill()


def test_an_ignored_signal_stays_ignored():
    """As nohup leaves SIGHUP, and a shell script SIGINT for what it starts in the background."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals(None, None) as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert asked.ask() == CONTINUE
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, INTERRUPT), (signal.SIGTERM, TERMINATE)])
def test_a_signal_ends_code_that_catches_every_exception(number, code, monkeypatch, capfd):
    monkeypatch.setattr(interruption, "ECHO", 0.0)
    reached: list[int] = []
    with StopSignals(None, None) as asked, pytest.raises(Stopped) as stopped, asked.at_once():
        try:
            os.kill(os.getpid(), number)
            reached.append(number)
        except Exception as error:
            raise RuntimeError("a fault of the compiler") from error
    assert stopped.value.code == code and reached == []
    assert capfd.readouterr().err.strip() == (
        f"{signal.Signals(number).name}: ends now, before this step; a second signal ends at once"
    )


def test_the_time_limit_applies_only_within_at_once():
    with StopSignals(0.05, None) as asked:
        with pytest.raises(Stopped) as stopped, asked.at_once():
            time.sleep(60)
        assert stopped.value.code == TIME_OVER
        with pytest.raises(Stopped), asked.at_once():
            raise AssertionError("begun after the limit")
    before = signal.getsignal(signal.SIGALRM)
    with StopSignals(0.2, None) as asked:
        with asked.at_once():
            pass
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0) and signal.getsignal(signal.SIGALRM) == before


def test_a_failure_after_a_request_counts_as_the_stop(monkeypatch):
    """The signal may have ended the compiler as well; without one, a failure stays what it is."""
    monkeypatch.setattr(interruption, "ECHO", 0.0)
    with StopSignals(None, None) as asked:
        with pytest.raises(ValueError), asked.at_once():
            raise ValueError
        with pytest.raises(Stopped) as stopped, asked.at_once():
            with pytest.raises(Stopped):
                os.kill(os.getpid(), signal.SIGTERM)
            raise ValueError
        assert stopped.value.code == TERMINATE
        # Swallowed by the work, it still ends it.
        with pytest.raises(Stopped), asked.at_once():
            raise AssertionError("begun after the request")
    # After the context of `at_once` a signal is a request again.
    with StopSignals(None, None) as asked:
        with asked.at_once():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.ask() == TERMINATE
