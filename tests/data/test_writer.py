"""Writing data sets: part by part, whole or not at all, and once into a cache that processes share."""

import json
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrm.data import writer
from hrm.data.dataset import PuzzleDataset
from hrm.data.format import ARRAYS, DatasetError, Metadata, PuzzleSet, read_difficulty
from hrm.data.writer import Shape, new_dataset
from tests.support.paths import ROOT
from tests.support.puzzle_sets import CELLS, MIXED, VOCAB, digest

SHAPE = Shape(seq_len=CELLS, vocab_size=VOCAB)


def a_set(groups: list[list[int]], seed: int = 0) -> PuzzleSet:
    """A set from the number of examples of every puzzle of every group, with random cells."""
    sizes = [size for group in groups for size in group]
    rng = np.random.default_rng(seed)
    inputs, labels = rng.integers(0, VOCAB, (2, sum(sizes), CELLS), dtype=np.uint8)
    return PuzzleSet(
        inputs=inputs,
        labels=labels,
        puzzle_identifiers=rng.integers(0, 2, len(sizes), dtype=np.int32),
        puzzle_indices=np.cumsum([0, *sizes]).astype(np.int32),
        group_indices=np.cumsum([0, *map(len, groups)]).astype(np.int32),
    )


def write(folder: Path, *groups: list[list[int]]) -> None:
    with new_dataset(folder) as data:
        split = data.split("train", SHAPE)
        for number, part in enumerate(groups):
            split.add("all", a_set(part, number))
        data.close(["<blank>", "a"])


# --- part by part


def test_written_files_are_read_back(tmp_path: Path) -> None:
    parts = {"all": a_set(MIXED), "more": a_set([[1], [2]], 1)}
    shape = Shape(CELLS, VOCAB, pad_id=3, ignore_label_id=None, blank_identifier_id=1)
    with new_dataset(tmp_path / "data") as data:
        split, test = data.split("train", shape), data.split("test", SHAPE)
        for name, part in parts.items():
            split.add(name, part)
        test.add("all", parts["more"])
        assert not (tmp_path / "data").exists()
        assert (split.groups, split.puzzles, split.examples) == (10, 17, 36)
        data.close(["<blank>", "ä"])
    read = PuzzleDataset(tmp_path / "data", "train")
    assert read.metadata == Metadata(3, None, 1, VOCAB, CELLS, 2, 10, 36 / 17, ["all", "more"])
    assert PuzzleDataset(tmp_path / "data", "test").metadata == Metadata(0, 0, 0, 9, 5, 2, 2, 1.5, ["all"])
    for name, part in read.sets.items():
        for array in ARRAYS:
            np.testing.assert_array_equal(getattr(part, array), getattr(parts[name], array))
        assert isinstance(part.inputs.base, np.memmap) and isinstance(part.labels.base, np.memmap)
        assert read_difficulty(read.folder, name, len(part.inputs)) is None
    assert json.loads((tmp_path / "data/identifiers.json").read_text()) == ["<blank>", "ä"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_parts_give_the_bytes_of_the_whole(tmp_path: Path) -> None:
    """Of np.save, too: index and row arrays of one part, of parts of one group, of two sets in turn."""
    whole, other = a_set(MIXED), a_set([[2], [3, 1]], 1)
    difficulty = np.arange(len(whole.inputs))

    def groups(part: PuzzleSet, first: int, last: int) -> PuzzleSet:
        puzzles = part.group_indices[first : last + 1]
        examples = part.puzzle_indices[puzzles[0] : puzzles[-1] + 1]
        return PuzzleSet(
            part.inputs[examples[0] : examples[-1]],
            part.labels[examples[0] : examples[-1]],
            part.puzzle_identifiers[puzzles[0] : puzzles[-1]],
            examples - examples[0],
            puzzles - puzzles[0],
        )

    for name, cuts in {"one": [0, 8], "two": [0, 3, 8], "each": list(range(9))}.items():
        with new_dataset(tmp_path / name) as data:
            split, row = data.split("train", SHAPE), 0
            for first, last in pairwise(cuts):
                part = groups(whole, first, last)
                split.add("all", part, difficulty[row : row + len(part.inputs)])
                row += len(part.inputs)
                if first == 0:
                    split.add("other", other)
            data.close(["<blank>", "a"])
        assert digest(tmp_path / name) == digest(tmp_path / "one")
    for array in ARRAYS:
        np.save(tmp_path / "saved.npy", getattr(whole, array))
        saved = (tmp_path / "saved.npy").read_bytes()
        assert (tmp_path / f"each/train/all__{array}.npy").read_bytes() == saved
    read = read_difficulty(tmp_path / "each/train", "all", 33)
    assert read is not None and read.tolist() == list(range(33))


def test_memory_does_not_grow(tmp_path: Path) -> None:
    part = a_set([[1]] * 2000)

    def peak(parts: int) -> int:
        tracemalloc.start()
        try:
            with new_dataset(tmp_path / str(parts)) as data:
                split = data.split("train", SHAPE)
                for _ in range(parts):
                    split.add("all", part, np.zeros(2000, np.int32))
                data.close(["<blank>", "a"])
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)
    assert peak(200) < peak(2) + 100_000
    assert len(PuzzleDataset(tmp_path / "200", "train").sets["all"].inputs) == 400_000


def test_difficulty_covers_all_examples_or_none(tmp_path: Path) -> None:
    part = a_set([[1], [2]])

    def two(first: np.ndarray | None, second: np.ndarray | None) -> None:
        with new_dataset(tmp_path / "data") as data:
            split = data.split("test", SHAPE)
            split.add("all", part, first)
            split.add("all", part, second)
            data.close(["<blank>", "a"])

    for first, second, message in (
        (None, np.zeros(3, int), "given for some parts of it and not for others"),
        (np.zeros(3, int), None, "given for some parts of it and not for others"),
        (np.zeros(2, int), np.zeros(3, int), r"difficulty of shape \(2,\) for 3 examples"),
    ):
        with pytest.raises(ValueError, match=message):
            two(first, second)
        assert not any(tmp_path.iterdir())
    two(np.array([7, 0, 300]), np.array([1, 2, 3]))
    path = tmp_path / "data/test/all__difficulty.npy"
    assert np.load(path).dtype == np.int32
    assert np.load(path).tolist() == [7, 0, 300, 1, 2, 3]
    with pytest.raises(DatasetError, match=r"all__difficulty\.npy: shape \(6,\), expected .* each of 5"):
        read_difficulty(path.parent, "all", 5)
    np.save(path, np.zeros(6))
    with pytest.raises(DatasetError, match=r"all__difficulty\.npy: numbers of type float64"):
        read_difficulty(path.parent, "all", 6)


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    part = a_set([[1], [2]])
    cells = np.zeros((1, CELLS + 1), np.uint8)
    index = np.arange(2, dtype=np.int32)
    wide = PuzzleSet(cells, cells, np.zeros(1, np.int32), index, index)
    with pytest.raises(ValueError, match="rows of"), new_dataset(tmp_path / "data") as data:
        split = data.split("train", SHAPE)
        split.add("all", part)
        split.add("all", wide)
    assert not any(tmp_path.iterdir())


def test_indices_that_overflow_are_refused(tmp_path: Path) -> None:
    part = a_set([[60], [60]])
    narrow = {name: getattr(part, name).astype(np.int8) for name in ("puzzle_indices", "group_indices")}
    small = replace(part, **narrow)
    with (
        pytest.raises(DatasetError, match="set all: more than 127 inputs"),
        new_dataset(tmp_path / "d") as data,
    ):
        split = data.split("train", SHAPE)
        split.add("all", small)
        split.add("all", small)


# --- whole or not at all


def test_an_unclosed_data_set_is_not_created(tmp_path: Path) -> None:
    write(tmp_path / "data", MIXED)
    before = digest(tmp_path / "data")
    with (
        pytest.raises(ValueError, match="the data set was not closed"),
        new_dataset(tmp_path / "data") as data,
    ):
        data.split("train", SHAPE).add("all", a_set([[1]]))
    with pytest.raises(KeyboardInterrupt), new_dataset(tmp_path / "data") as data:
        data.split("train", SHAPE).add("all", a_set([[1]]))
        raise KeyboardInterrupt
    assert digest(tmp_path / "data") == before
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_folder_with_other_files_is_not_changed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    for folder in (home, home / "thesis.tex"):
        with pytest.raises(DatasetError, match="exists and is not a data set to replace"):
            writer.check_output(folder)
        with pytest.raises(DatasetError, match="exists and is not a data set to replace"):
            write(folder, MIXED)
    assert (home / "thesis.tex").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    (home / "thesis.tex").unlink()
    write(home, MIXED)
    writer.check_output(home)
    (home / "train/notes.txt").write_text("mine")
    with pytest.raises(DatasetError, match="exists and is not a data set to replace"):
        writer.check_output(home)


def test_a_failed_write_leaves_the_old_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data", MIXED)
    before = digest(tmp_path / "data")
    appended = writer._GrowingArray.append
    calls = []

    def fail_late(self: Any, rows: np.ndarray) -> None:
        calls.append(rows)
        if len(calls) == 9:
            raise OSError(28, "No space left on device")
        appended(self, rows)

    monkeypatch.setattr(writer._GrowingArray, "append", fail_late)
    with pytest.raises(DatasetError, match=r"cannot be written \(No space left on device\)"):
        write(tmp_path / "data", [[1]], [[1], [1]])
    assert digest(tmp_path / "data") == before
    monkeypatch.undo()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    write(tmp_path / "link", [[1], [1]])
    assert len(PuzzleDataset(tmp_path / "data", "train").sets["all"].inputs) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "link"]


# --- the cache


BUILD = """
import sys, time
import numpy as np
from hrm.data.format import PuzzleSet
from hrm.data.writer import Shape, cached, new_dataset

def build(folder):
    cells, index = np.ones((3, 2), np.uint8), np.arange(4, dtype=np.int32)
    print("builds", flush=True)
    # Until the others build too.
    while sum(1 for p in folder.parent.iterdir() if p.name.startswith("mark")) < int(sys.argv[1]):
        (folder.parent / f"mark{sys.argv[2]}").touch()
        time.sleep(0.01)
    with new_dataset(folder) as data:
        part = PuzzleSet(cells, cells, np.zeros(3, np.int32), index, index)
        data.split("train", Shape(2, 2)).add("all", part)
        data.close(["<blank>"])

print(cached("one", build))
"""


@pytest.mark.slow
def test_processes_that_build_at_once_end_with_one_data_set(tmp_path: Path) -> None:
    env = os.environ | {"HRM_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}

    def start(number: int, together: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", BUILD, str(together), str(number)]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)

    outputs = [process.communicate()[0] for process in [start(0, 2), start(1, 2)]]
    assert outputs == [f"builds\n{tmp_path / 'one'}\n"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mark0", "mark1", "one"]
    assert start(2, 1).communicate()[0] == f"{tmp_path / 'one'}\n"


def test_a_cache_that_cannot_be_written_gives_way_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = []

    def build(folder: Path) -> None:
        builds.append(folder)
        write(folder, MIXED)

    (tmp_path / "file").write_text("not a folder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HRM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert writer.cached("one", build) == tmp_path / "data/one"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert writer.cached("two", build) == tmp_path / "xdg/hrm/two"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert writer.cached("two", build) == tmp_path / "home/.cache/hrm/two"
    monkeypatch.setenv("HRM_CACHE", str(tmp_path / "chosen"))
    assert writer.cached("two", build) == tmp_path / "chosen/two"
    assert len(builds) == 4
    (tmp_path / "data").rename(tmp_path / "moved")
    (tmp_path / "data").write_text("not a folder either")
    monkeypatch.setenv("HRM_CACHE", str(tmp_path / "file"))
    with pytest.raises(DatasetError, match="no folder to keep data sets in can be written; set HRM_CACHE"):
        writer.cached("one", build)
