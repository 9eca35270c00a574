"""Data sets of the Hugging Face hub: what is asked of its package, and its faults in one line each."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from hrm.data import hub
from hrm.data.__main__ import main
from hrm.data.dataset import PuzzleDataset
from hrm.data.format import DatasetError

NAMES = (
    "EntryNotFoundError",
    "RepositoryNotFoundError",
    "HFValidationError",
    "OfflineModeIsEnabled",
)


class FakeHub(ModuleType):
    """A hub that gives files of a folder, or raises what it is told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__("huggingface_hub")
        self.folder = folder
        self.error: Exception | None = None
        self.asked: list[tuple[str, str, str]] = []
        self.utils = ModuleType("huggingface_hub.utils")
        for name in NAMES:
            setattr(self.utils, name, type(name, (Exception,), {}))
        # As there: an absent file of the cache is an absent file, a gated data set one that is not found.
        for name, base in (
            ("LocalEntryNotFoundError", "EntryNotFoundError"),
            ("GatedRepoError", "RepositoryNotFoundError"),
        ):
            setattr(self.utils, name, type(name, (getattr(self.utils, base),), {}))

    def hf_hub_download(self, *, repo_id: str, filename: str, repo_type: str) -> str:
        self.asked.append((repo_id, filename, repo_type))
        if self.error is not None:
            raise self.error
        return str(self.folder / filename)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    module = FakeHub(tmp_path / "snapshots/abc")
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", module.utils)
    return module


def test_the_folder_of_the_files_is_given(fake: FakeHub) -> None:
    assert hub.fetch("hub:someone/puzzles", ["train.csv", "more/test.csv"]) == fake.folder
    assert fake.asked == [
        ("someone/puzzles", "train.csv", "dataset"),
        ("someone/puzzles", "more/test.csv", "dataset"),
    ]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("LocalEntryNotFoundError", r"a\.csv is not in the cache and the hub cannot be reached"),
        ("OfflineModeIsEnabled", r"a\.csv is not in the cache and the hub cannot be reached"),
        ("EntryNotFoundError", r"no file a\.csv in this data set"),
        ("GatedRepoError", "access has to be asked for"),
        ("RepositoryNotFoundError", "no such data set on the hub, or a private one"),
        ("HFValidationError", "no such data set on the hub"),
    ],
)
def test_the_hubs_faults_are_told(fake: FakeHub, error: str, message: str) -> None:
    fake.error = getattr(fake.utils, error)("a long\nstory")
    with pytest.raises(DatasetError, match=rf"^hub:someone/puzzles: {message}[^\n]*$"):
        hub.fetch("hub:someone/puzzles", ["a.csv"])


def test_other_faults_are_told_in_a_line(fake: FakeHub) -> None:
    for error, reason in ((OSError("disk\nfull"), "disk full"), (TimeoutError(), "TimeoutError")):
        fake.error = error
        with pytest.raises(DatasetError, match=rf"a\.csv cannot be fetched \({reason}\); try again[^\n]*$"):
            hub.fetch("hub:someone/puzzles", ["a.csv"])


def test_a_version_that_changes_meanwhile_is_told(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(**asked: Any) -> str:
        return str(fake.folder.with_name(asked["filename"][0]) / asked["filename"])

    monkeypatch.setattr(fake, "hf_hub_download", download)
    with pytest.raises(DatasetError, match="changed during the download"):
        hub.fetch("hub:someone/puzzles", ["a.csv", "b.csv"])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DatasetError, match=r"needs the package huggingface_hub; pip install -e '\.\[hub\]'"):
        hub.fetch("hub:someone/puzzles", ["a.csv"])


@pytest.mark.parametrize("name", ["hub:", "hub:puzzles", "hub:/puzzles", "hub:a/b/c", "hub:a/"])
def test_a_name_that_is_none_is_refused_before_anything(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DatasetError, match=rf"{name}: expected hub:OWNER/NAME"):
        hub.fetch(name, ["a.csv"])


def test_sudoku_comes_from_the_hub(fake: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake.folder.mkdir(parents=True)
    for split, answer in (("train", "1234341221434321"), ("test", "1234341243212143")):
        (fake.folder / f"{split}.csv").write_text(f"question,answer,rating\n{answer[:-1]}.,{answer},7\n")
    command = ["sudoku", "--size", "4", "--output-dir", str(tmp_path / "out"), "--source", "hub:a/b"]
    assert main(command) == 0
    assert [name for _, name, _ in fake.asked] == ["train.csv", "test.csv"]
    labels = PuzzleDataset(tmp_path / "out", "test").sets["all"].labels
    np.testing.assert_array_equal(labels[0], [int(digit) + 1 for digit in "1234341243212143"])
    fake.error = fake.utils.RepositoryNotFoundError()
    assert main(command) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: hub:a/b: no such data set on the hub")
