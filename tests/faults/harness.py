"""A trainer in a process of its own that a test watches and stops, and what its run's folder shows."""

import json
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from hrm.checkpoint.read import latest_checkpoint
from tests.support.forked import start

# A bound on hangs only: nothing here takes a fraction of it, even on a busy machine.
PATIENCE = 1800.0
# Behind the code that runs before a program.
AFTERWARDS = "\nimport sys; from tests.support import forked; forked.run(sys.argv[1:])"
Found = TypeVar("Found")


class Trainer:
    """`python train.py WORD...` in a process of its own; as a context, none is left behind."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        program: Sequence[str] = ("train.py",),
        before: str = "",
        hold: int | str | None = None,
        fork: bool = True,
        **streams: Any,
    ) -> None:
        """program: what to run in place of the trainer. before: code that its process runs first.

        hold: where the trainer waits until `release`, as tests/faults/held_program.py has it. streams: those
        that Popen takes; without any, `out` and `err` are read from files. fork: whether a
        process that has imported it may be forked.
        """
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err = Path(self._folder.name) / "out", Path(self._folder.name) / "err"
        self._gate = Path(self._folder.name) / "gate"
        if hold is not None:
            program = ("-m", "tests.faults.held_program", str(hold), str(self._gate))
        words = [*program, *argv]
        if before:
            words = ["-c", before + AFTERWARDS, *words]
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            streams = streams or {"stdout": out, "stderr": err}
            self.process = start(words, fork=fork, **streams)

    def wait_until_held(self) -> None:
        self.wait_for(self._gate.with_suffix(".held").exists)

    def release(self) -> None:
        """Lets a held trainer continue."""
        self._gate.touch()

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        self._folder.cleanup()

    @property
    def out(self) -> str:
        """What it has printed so far."""
        return self._out.read_text()

    @property
    def err(self) -> str:
        """What it has printed to stderr so far."""
        return self._err.read_text()

    def wait_for(self, look: Callable[[], Found]) -> Found:
        """Looks every millisecond until there is something to see, and returns it."""
        deadline = time.monotonic() + PATIENCE
        while not (found := look()):
            assert self.process.poll() is None, f"over before it happened\n{self.out}\n{self.err}"
            assert time.monotonic() < deadline, f"did not happen in {PATIENCE:g} s\n{self.out}\n{self.err}"
            time.sleep(0.001)
        return found

    def signal(self, number: int) -> int:
        """Sends a signal to it while it runs; returns its exit status."""
        assert self.process.poll() is None, f"over before it was stopped\n{self.out}\n{self.err}"
        self.process.send_signal(number)
        self.release()
        return self.end()

    def end(self) -> int:
        """Waits for its end; returns its exit status."""
        return self.process.wait(PATIENCE)


def run_to_end(argv: Sequence[str], **options: Any) -> tuple[int, str, str]:
    """A trainer left alone: its exit status, its output, its errors."""
    with Trainer(argv, **options) as trainer:
        return trainer.end(), trainer.out, trainer.err


def last_step(run: Path) -> int:
    """The step of the last whole line of a run's metrics, 0 before there is one."""
    try:
        text = (run / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return 0
    lines = text[: text.rfind("\n") + 1].splitlines()
    return json.loads(lines[-1])["step"] if lines else 0


def saving(run: Path) -> list[Path]:
    """The unfinished checkpoints in a run's folder: one while a save is going on, or was killed."""
    return [path for path in run.glob(".tmp_step_*") if not path.name.startswith(".tmp_step_gone_")]


def newest(run: Path) -> int:
    """The step of the newest complete checkpoint, 0 without one; fails if a damaged one is there."""
    path, notes = latest_checkpoint(run)
    assert not notes, notes
    return int(path.name.removeprefix("step_")) if path else 0


def resumed_step(out: str) -> int:
    """The step that a trainer said it went on from, 0 if it started anew."""
    found = re.search(r"resuming .* at step (\d+)", out)
    return int(found[1]) if found else 0
