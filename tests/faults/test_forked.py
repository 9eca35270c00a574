"""A forked program does what a new process does with the same words."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.forked import Forked, start

STATE = "import os, sys; print(sys.argv, __name__, os.environ['HRM_X'], os.getcwd(), sys.stdin.read())"


def ended(folder: Path, fork: bool, *words: str) -> tuple[int, str, str]:
    """A program's exit status, its output and the last line of its errors."""
    out, err, given = (folder / name for name in ("out", "err", "in"))
    given.write_text("given")
    with open(out, "w") as stdout, open(err, "w") as stderr, open(given) as stdin:
        environment = {**os.environ, "HRM_X": "x"}
        program = start(words, environment, fork=fork, stdin=stdin, stdout=stdout, stderr=stderr)
        assert isinstance(program, Forked if fork else subprocess.Popen)
        status = program.wait(60)
    return status, out.read_text(), (err.read_text().splitlines() or [""])[-1]


@pytest.mark.parametrize(
    "code",
    [
        STATE,
        "import atexit; atexit.register(print, 'bye'); raise SystemExit(3)",
        "raise SystemExit('said')",
        "1 / 0",
        "raise KeyboardInterrupt",
        "import os, signal; print('lost'); os.kill(os.getpid(), signal.SIGTERM)",
        "import signal; signal.raise_signal(signal.SIGINT)",
    ],
)
def test_it_ends_as_a_new_process_does(tmp_path, code):
    assert ended(tmp_path, True, "-c", code, "a") == ended(tmp_path, False, "-c", code, "a")


@pytest.mark.parametrize("words", [("{folder}/program.py",), ("-m", "tests.support.paths")])
def test_a_file_and_a_module(tmp_path, words):
    (tmp_path / "neighbour.py").write_text("X = 5\n")
    (tmp_path / "program.py").write_text(f"import neighbour; print(neighbour.X); {STATE}")
    found = [
        ended(tmp_path, fork, *(word.format(folder=tmp_path) for word in words)) for fork in (True, False)
    ]
    assert found[0] == found[1] and found[0][0] == 0


def test_variables_read_at_import_need_a_new_process():
    program = start(["-c", ""], {**os.environ, "OMP_NUM_THREADS": "7"})
    assert isinstance(program, subprocess.Popen) and program.wait(60) == 0
