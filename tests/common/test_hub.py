"""Repositories of the Hugging Face hub: what is asked of its package, and its faults in one line each."""

import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hrm.common import hub
from hrm.common.hub import HubError
from hrm.data.__main__ import main
from hrm.data.dataset import PuzzleDataset
from tests.support.fake_hub import FakeHub

GB = 1 << 30


def serve(fake: FakeHub, *files: str, name: str = "someone/puzzles") -> None:
    for file in files:
        path = fake.served / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 1024)


def test_the_folder_of_the_files_is_given(fake_hub: FakeHub) -> None:
    serve(fake_hub, "a/train.csv", "a/more/test.csv", "README.md")
    folder = hub.fetch_files("hub:someone/puzzles@main/a", ["train.csv", "more/test.csv"])
    assert sorted(path.name for path in folder.rglob("*.*")) == ["test.csv", "train.csv"]
    assert (folder / "train.csv").is_file()
    asked = [("dataset", "someone/puzzles", "main", f"a/{name}") for name in ("train.csv", "more/test.csv")]
    assert fake_hub.asked == asked
    with pytest.raises(HubError, match=r"^hub:someone/puzzles: no file train\.csv in this data set"):
        hub.fetch_files("hub:someone/puzzles", ["train.csv"])


def test_the_size_is_printed_before_the_download(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(fake_hub, "a.csv", "b.csv", "c.csv")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1024))
    with pytest.raises(
        HubError,
        match=r"2 files of 2 KiB together do not fit into /.*, where 1 KiB are free; free space",
    ):
        hub.fetch_files("hub:someone/puzzles", ["a.csv", "b.csv"])
    assert fake_hub.asked == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * GB))
    hub.fetch_files("hub:someone/puzzles", ["a.csv", "b.csv"])
    line = f"downloading 2 files of 2 KiB together to {fake_hub.cache}, where 3 GiB are free"
    assert capsys.readouterr().err == f"hub:someone/puzzles: {line}\n"
    # Cached files need no space.
    hub.fetch_files("hub:someone/puzzles", ["a.csv", "c.csv"])
    assert "downloading 1 file of 1 KiB" in capsys.readouterr().err
    hub.fetch_files("hub:someone/puzzles", ["a.csv", "c.csv"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("OfflineModeIsEnabled", "it is not in the cache and the hub cannot be reached; try again online"),
        ("GatedRepoError", "request access on its page"),
        ("RepositoryNotFoundError", "no such data set on the hub, or a private one"),
        ("RevisionNotFoundError", "no revision v2 of this data set"),
        ("HFValidationError", "no such data set on the hub"),
        (OSError("no\nroute"), r"it is not in the cache and the hub cannot be reached \(no route\)"),
        (TimeoutError(), r"it is not in the cache and the hub cannot be reached \(TimeoutError\)"),
    ],
)
def test_errors_of_the_hub_are_reported(fake_hub: FakeHub, error: Any, message: str) -> None:
    fake_hub.error = getattr(fake_hub.utils, error)("a long\nstory") if isinstance(error, str) else error
    with pytest.raises(HubError, match=rf"^hub:someone/puzzles@v2: {message}[^\n]*$"):
        hub.fetch_files("hub:someone/puzzles@v2", ["a.csv"])


def test_without_a_network_the_cache_serves(fake_hub: FakeHub) -> None:
    serve(fake_hub, "a.csv", "b.csv")
    folder = hub.fetch_files("hub:someone/puzzles", ["a.csv"])
    fake_hub.error = fake_hub.utils.OfflineModeIsEnabled()
    assert hub.fetch_files("hub:someone/puzzles", ["a.csv"]) == folder
    with pytest.raises(HubError, match="it is not in the cache and the hub cannot be reached"):
        hub.fetch_files("hub:someone/puzzles", ["a.csv", "b.csv"])


def test_a_broken_download_is_reported_in_one_line(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(fake_hub, "a.csv", "b.csv")

    def broken(**_: Any) -> str:
        raise OSError("disk\nfull")

    def changing(**asked: Any) -> str:
        return str(fake_hub.cache / f"of {asked['filename']}" / asked["filename"])

    for download, message in (
        (broken, r"a\.csv cannot be fetched \(disk full\); try again[^\n]*$"),
        (changing, "changed during the download"),
    ):
        monkeypatch.setattr(fake_hub, "hf_hub_download", download)
        with pytest.raises(HubError, match=message):
            hub.fetch_files("hub:someone/puzzles", ["a.csv", "b.csv"])


def test_a_missing_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match=r"needs the package huggingface_hub; pip install -e '\.\[hub\]'"):
        hub.fetch_files("hub:someone/puzzles", ["a.csv"])


@pytest.mark.parametrize(
    "name", ["hub:", "hub:puzzles", "hub:/puzzles", "hub:a/", "hub:a/b/../c", "hub:a/b@..", "hub:a/b//c"]
)
def test_an_invalid_name_is_refused_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match=rf"{name}: expected hub:OWNER/NAME"):
        hub.fetch_files(name, ["a.csv"])


def test_names_that_lead_out_of_the_cache_are_not_listed(fake_hub: FakeHub) -> None:
    serve(fake_hub, "a.csv")
    fake_hub.files = ["../a.csv", "/a.csv", "b/../../a.csv", "..\\a.csv"]
    seen: list[str] = []

    def choose(names: Collection[str], path: str) -> list[str]:
        seen.extend(names)
        return [*names]

    hub.fetch("hub:someone/puzzles", "dataset", choose)
    assert seen == ["a.csv"]


def test_sudoku_comes_from_the_hub(
    fake_hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (fake_hub.served / "a/b").mkdir(parents=True)
    for split, answer in (("train", "1234341221434321"), ("test", "1234341243212143")):
        text = f"question,answer,rating\n{answer[:-1]}.,{answer},7\n"
        (fake_hub.served / "a/b" / f"{split}.csv").write_text(text)
    command = ["sudoku", "--size", "4", "--output-dir", str(tmp_path / "out"), "--source", "hub:a/b"]
    assert main(command) == 0
    assert [name for *_, name in fake_hub.asked] == ["train.csv", "test.csv"]
    labels = PuzzleDataset(tmp_path / "out", "test").sets["all"].labels
    np.testing.assert_array_equal(labels[0], [int(digit) + 1 for digit in "1234341243212143"])
    assert main([*command[:-1], "hub:a/c"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: hub:a/c: no such data set on the hub")
