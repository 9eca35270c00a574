"""Data that are damaged before, between and during runs: the file is named, and nothing is lost."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train
from hrm.checkpoint.read import load_checkpoint
from tests.faults.harness import Trainer, last_step, newest
from tests.support.runs import words


@pytest.fixture
def data(tiny_sudoku, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_sudoku, tmp_path / "data"))


def flip(path: Path) -> None:
    """Changes the last bit of a file of tokens: a digit becomes another one."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line by which a run is refused."""
    capsys.readouterr()
    assert train.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_flipped_bit_is_found_before_the_first_step(data, tmp_path, capsys, split):
    flip(data / split / "all__labels.npy")
    told = refused(words(data, tmp_path / "out"), capsys)
    assert f"{data / split / 'all__labels.npy'}: its bytes are not those that checksums.json lists" in told
    assert not (tmp_path / "out").exists()


def cut(path: Path) -> None:
    os.truncate(path, 0)


def overwrite(path: Path) -> None:
    """A token that there is none of, in every row."""
    rows = path.stat().st_size - 128
    with path.open("r+b") as file:
        file.seek(128)
        file.write(bytes([99]) * rows)


@pytest.mark.parametrize(
    ("file", "damage", "what"),
    [
        ("train/all__inputs.npy", cut, "shrank from 896 to 0 bytes"),
        ("train/all__labels.npy", overwrite, "was written to"),
        ("test/all__labels.npy", Path.unlink, "was removed"),
    ],
)
def test_a_run_ends_before_it_uses_data_that_change(
    data: Path, tmp_path: Path, file: str, damage: Callable[[Path], Any], what: str
) -> None:
    argv = words(data, tmp_path, "run_name=r", "epochs=12", "eval_interval=4", "log_interval=1")
    path, run = data / file, tmp_path / "data" / "r"
    with Trainer(argv, hold=26) as trainer:
        trainer.wait_until_held()
        trainer.wait_for((run / "step_24").is_dir)
        kept = shutil.copy2(path, tmp_path / "kept")
        damage(path)
        trainer.release()
        # A mapping read behind the new end of its file would have ended it by SIGBUS.
        assert trainer.end() == 2, (trainer.out, trainer.err)
        told = trainer.err
    # Behind the progress, which goes there too.
    assert told.splitlines()[-1].startswith(f"error: {path}: {what} after it was opened; restore the file")
    assert told.count("error") == 1 and "Traceback" not in told
    assert 0 < load_checkpoint(run).step == newest(run) < 72
    if damage is cut:
        # The file as it was, under another number and with another time: the same command goes on.
        path.unlink()
        shutil.copyfile(kept, path)
        assert train.main(argv) == 0
        assert load_checkpoint(run).step == last_step(run) == 72
