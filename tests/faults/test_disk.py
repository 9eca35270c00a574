"""A disk that fills up for real: a small file system of its own, or a limit where none may be mounted."""

import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import train
from hrm.checkpoint.read import load_checkpoint
from tests.faults.harness import Trainer, last_step, newest, resumed_step, run_to_end, saving
from tests.support.runs import assert_same_run, words

# 36 steps, with a checkpoint every 12.
LONG = "epochs=6"

# Joins the namespaces of a process.
ENTER = """
import ctypes, os
library, here = ctypes.CDLL(None, use_errno=True), os.getcwd()
for space in ("user", "mnt"):
    if library.setns(os.open(f"/proc/{}/ns/{{space}}", os.O_RDONLY), 0):
        raise OSError(ctypes.get_errno(), "setns")
os.chdir(here)
"""


@dataclass
class Disk:
    """A file system of 32 MiB in a mount namespace of its own.

    path: where a process that has run `enter` sees it. view: where this one does.
    """

    path: Path
    view: Path
    enter: str

    def fill(self, free: int) -> None:
        """Leaves `free` bytes."""
        ballast = self.view / "ballast"
        ballast.unlink(missing_ok=True)
        size = shutil.disk_usage(self.view).free - free
        ballast.write_bytes(bytes(size))

    def clear(self) -> None:
        """Frees what `fill` took."""
        (self.view / "ballast").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A small disk; the namespace, and so the disk, lives as long as a process that waits in it."""
    path = tmp_path / "disk"
    path.mkdir()
    script = 'mount -t tmpfs -o size=32m none "$1" && echo mounted && exec cat'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", str(path)]
    if shutil.which("unshare") is None:
        pytest.skip("no namespaces here: the limit on the size of files stands in for the disk's end")
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        try:
            if holder.stdout.readline() != b"mounted\n":
                pytest.skip("mounting is not permitted: the limit on the size of files stands in")
            yield Disk(path, Path(f"/proc/{holder.pid}/root{path}"), ENTER.format(holder.pid))
        finally:
            holder.stdin.close()


def only_error(err: str) -> str:
    """The one line that begins with `error: `, and no traceback beside it."""
    assert "Traceback" not in err, err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


def refused_for_space(err: str, run: Path, cause: str) -> None:
    """The message of a checkpoint that did not fit: cause, needed, free, what is kept, what to do."""
    line = only_error(err)
    told = r" \(([\d.]+) ([KM]iB) needed, [\d.]+ (bytes|[KMG]iB) free\); "
    assert re.match(re.escape(f"error: cannot save a checkpoint in {run}: {cause}") + told, line), line
    assert "earlier checkpoints are kept; free space or raise the quota" in line and "output_dir=" in line


def whole(data: Path, folder: Path, *more: str) -> Path:
    """The run of a test, left alone."""
    assert train.main(words(data, folder, "run_name=whole", *more)) == 0
    return folder / data.name / "whole"


def wait_between_saves(trainer: Trainer, run: Path) -> None:
    """Waits until the trainer is held and its first save has ended, whose end would free space."""
    trainer.wait_until_held()
    trainer.wait_for(lambda: newest(run) and not list(run.glob(".tmp_*")))


def test_a_full_disk_ends_the_run_and_free_space_continues_it(tiny_sudoku, tmp_path, disk):
    """Under a checkpoint, then under the metrics, then from the start."""
    argv = words(tiny_sudoku, disk.path, "run_name=full", LONG, "log_interval=1")
    run, seen = (root / tiny_sudoku.name / "full" for root in (disk.path, disk.view))
    with Trainer(argv, before=disk.enter, hold=14) as trainer:
        wait_between_saves(trainer, seen)
        # Weights fit, the training state does not.
        size = sum(path.stat().st_size for path in (seen / f"step_{newest(seen)}").iterdir())
        disk.fill(int(0.6 * size))
        before = {path: path.read_bytes() for path in seen.glob("step_*/*")}
        trainer.release()
        assert trainer.end() == 2
        refused_for_space(trainer.err, run, "No space left on device")
    assert {path: path.read_bytes() for path in seen.glob("*step_*/*")} == before and before
    disk.clear()
    with Trainer(argv, before=disk.enter, hold=14) as trainer:
        wait_between_saves(trainer, seen)
        disk.fill(0)
        trainer.release()
        assert trainer.end() == 2
        line = only_error(trainer.err)
    assert line.startswith(f"error: cannot write {run}/metrics.jsonl: No space left on device; free space")
    kept = newest(seen)
    assert 12 <= kept <= last_step(seen)
    # Nor does it start while nothing can be written, and what is there stays.
    config = (seen / "config.yaml").read_bytes()
    status, _, err = run_to_end(argv, before=disk.enter)
    assert status == 2 and "No space left on device" in only_error(err)
    assert (seen / "config.yaml").read_bytes() == config and newest(seen) == kept
    disk.clear()
    status, out, err = run_to_end(argv, before=disk.enter)
    assert status == 0 and resumed_step(out) == kept, err
    assert_same_run(whole(tiny_sudoku, tmp_path, LONG, "log_interval=1"), seen)


def test_a_file_size_limit_ends_the_run_and_a_higher_limit_continues_it(tiny_sudoku, tmp_path):
    argv = words(tiny_sudoku, tmp_path, "run_name=full")
    run = tmp_path / tiny_sudoku.name / "full"
    assert train.main([*argv, "max_steps=12"]) == 0
    size = (run / "step_12" / "training.pt").stat().st_size
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    limited = f"import resource, sys, train; resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {hard}))"
    status, _, err = run_to_end(argv, program=["-c", f"{limited}; sys.exit(train.main())"])
    assert status == 2
    refused_for_space(err, run, "File too large")
    assert load_checkpoint(run).step == 12 and not saving(run)
    assert train.main(argv) == 0
    whole(tiny_sudoku, tmp_path, "max_steps=12")
    assert_same_run(whole(tiny_sudoku, tmp_path), run)
