"""Standard streams without a reader or without space: how every command ends."""

import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from hrm.common.errors import UserError, run_command
from hrm.common.streams import on_failure, watched
from tests.support.forked import start

FULL = Path("/dev/full")
COMMANDS = [
    ["train.py", "--help"],
    ["train.py", "--print-config", "device=cpu"],
    *(["-m", f"hrm.{name}", "--help"] for name in ("evaluate", "solve", "compare", "sweep", "report")),
    *(["-m", "hrm.data", name, "--help"] for name in ("sudoku", "maze", "arc", "inspect")),
    ["-m", "kernels", "--help"],
    ["-m", "bench.versions", "--help"],
    ["-m", "bench.roofline", "--help"],
]


def run(words: list[str], stdout: int, fork: bool = False) -> SimpleNamespace:
    """The program's exit status and errors."""
    with tempfile.TemporaryFile("w+") as errors:
        process = start(words, fork=fork, stdout=stdout, stderr=errors)
        process.wait(300)
        errors.seek(0)
        return SimpleNamespace(returncode=process.returncode, stderr=errors.read())


@pytest.fixture
def unread():
    """The writing end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_closed_pipe_ends_every_command_quietly(words, unread):
    done = run(words, unread, fork=words != COMMANDS[0])
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", COMMANDS[:3], ids=" ".join)
def test_output_that_does_not_fit_is_one_line(words):
    with FULL.open("w") as full:
        done = run(words, full.fileno(), fork=words != COMMANDS[1])
    line = "error: standard output: No space left on device; free space, or write elsewhere\n"
    assert (done.returncode, done.stderr) == (2, line)


def test_violations_and_a_closed_pipe_have_different_statuses(tiny_sudoku, unread):
    assert run(["-m", "hrm.data", "inspect", str(tiny_sudoku)], unread, fork=True).returncode == 141


def program(body: str) -> list[str]:
    return ["-c", f"import sys; from hrm.common.errors import *; {body}"]


@pytest.mark.parametrize(
    "body",
    [
        "sys.exit(run_command(lambda: print('text'), ''))",
        "sys.exit(run_command(lambda: print('text', flush=True), ''))",
        "sys.exit(run_command(lambda: sys.stdout.write('text') and 1, ''))",
    ],
)
def test_buffered_output_counts(body, unread):
    done = run(program(body), unread)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_command_without_standard_output_runs():
    body = "sys.stdout = None; sys.exit(run_command(lambda: print('text') or sys.stdout.isatty() or 7, ''))"
    with open(os.devnull, "w") as nothing:
        assert run(program(body), nothing.fileno()).returncode == 7


def test_a_lost_terminal_counts_as_closed():
    ours, its = os.openpty()
    os.close(ours)
    try:
        done = run(program("sys.exit(run_command(lambda: print('text'), ''))"), its)
    finally:
        os.close(its)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_callback_reports_a_failed_stream_once(unread):
    told: list[str] = []
    stream = os.fdopen(os.dup(unread), "w")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with watched(), on_failure(told.append):
            print("a", flush=True)
            print("b", flush=True)
        stream.close()
    assert told == ["standard output: nobody reads it any more"]


@pytest.mark.parametrize("number", [28, 30])
def test_a_file_that_does_not_fit_is_one_line(number, capsys):
    def command() -> None:
        raise OSError(number, os.strerror(number))

    assert run_command(command, "") == 2
    expected = f"error: cannot write: {os.strerror(number)}; free space, or give another folder\n"
    assert capsys.readouterr().err == expected


def test_a_mistake_keeps_its_status_when_only_output_is_closed(unread):
    done = run(program("sys.exit(run_command(lambda: [][0].x if 0 else (_ for _ in ()).throw(UserError('no'))"
                       ", ''))"), unread)  # fmt: skip
    assert (done.returncode, done.stderr) == (UserError.status, "error: no\n")
