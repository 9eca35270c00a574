"""Checkpoints damaged between two processes: named and passed over, or refused where none is left."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import train
from hrm.checkpoint.read import latest_checkpoint
from tests.faults.harness import resumed_step
from tests.support.runs import assert_same_run, run_main, words

STEPS = "max_steps=36"
FILES = ("model.safetensors", "ema.safetensors", "training.pt", "manifest.json")


def truncate(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path: Path) -> None:
    """One bit in the middle."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = (truncate, flip, empty, Path.unlink)


@pytest.fixture(scope="module")
def run(tiny_sudoku, tmp_path_factory) -> Path:
    """A run of 24 steps with checkpoints at 12 and 24."""
    folder = tmp_path_factory.mktemp("run")
    assert train.main(words(tiny_sudoku, folder, "run_name=r", "ema=true", "max_steps=24")) == 0
    return folder / tiny_sudoku.name / "r"


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory) -> Path:
    """The same, gone on to 36 steps."""
    folder = tmp_path_factory.mktemp("whole")
    copy = shutil.copytree(run, folder / run.parent.name / "r")
    assert train.main(resumption(copy)) == 0
    return copy


def resumption(run: Path) -> list[str]:
    """The command that goes on with a run until step 36, wherever its folder was copied to."""
    given = ["--config", str(run / "config.yaml"), f"output_dir={run.parents[1]}"]
    return [*given, STEPS]


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / run.parent.name / "r")


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_checkpoint_is_skipped(
    copy, whole, capsys, name: str, damage: Callable[[Path], None]
):
    damage(copy / "step_24" / name)
    found, notes = latest_checkpoint(copy)
    assert found == copy / "step_12"
    (told,) = [line for line in notes if str(copy / "step_24" / name) in line]
    assert "use a" in told and ("missing" if damage is Path.unlink else "damaged") in told, told
    # Every file and every damage once.
    if FILES.index(name) == DAMAGES.index(damage):
        status, out, err = run_main(*resumption(copy), capsys=capsys)
        assert status == 0 and resumed_step(out) == 12 and told in out, err
        assert_same_run(whole, copy)


def test_without_a_good_checkpoint_a_run_is_refused_and_left_as_it_is(copy, capsys):
    for step, name, damage in ((24, "training.pt", truncate), (12, "model.safetensors", flip)):
        damage(copy / f"step_{step}" / name)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    status, _, err = run_main(*resumption(copy), capsys=capsys)
    assert status == 2 and err.count("\n") == 1 and err.startswith(f"error: {copy}/step_24/training.pt")
    assert "resume=none starts a new run and keeps the old one" in err
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    # And the remedy is one.
    assert run_main(*resumption(copy)[:-1], "max_steps=1", "resume=none", capsys=capsys)[0] == 0
    kept = Path(f"{copy}.1")
    assert {path.relative_to(kept) for path in kept.rglob("*") if path.is_file()} >= {
        path.relative_to(copy) for path in before
    }


def test_a_line_of_metrics_that_was_cut_short_is_written_again(copy, whole, capsys):
    metrics = copy / "metrics.jsonl"
    with open(metrics, "ab") as file:
        file.write(b'{"step": 25, "train/lm_lo')
    status, out, err = run_main(*resumption(copy), capsys=capsys)
    assert status == 0 and resumed_step(out) == 24, err
    assert_same_run(whole, copy)
