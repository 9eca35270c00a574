"""Files that are not what was written, or no longer what was opened: named before they are used."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrm.data import checksums as integrity
from hrm.data import dataset
from hrm.data.checksums import changed_files
from hrm.data.dataset import PuzzleDataset, digests, fingerprint, train_batches
from hrm.data.format import ARRAYS, DatasetError, open_array, read_difficulty
from hrm.data.writer import Shape, new_dataset
from tests.support.puzzle_sets import CELLS, MIXED, VOCAB, a_set, written

NAMES = ["dataset.json", *(f"set0__{array}.npy" for array in ARRAYS)]
OPTIONS: dict[str, Any] = {"seed": 0, "epochs": 4, "epochs_per_iter": 2, "global_batch_size": 6}


def flip(path: Path, place: int = -1, bit: int = 1) -> None:
    """Changes one bit of a file, in place."""
    content = bytearray(path.read_bytes())
    content[place] ^= bit
    with path.open("r+b") as file:
        file.write(content)


# --- the headers of arrays


def header(text: str, version: int = 1, length: int | None = None) -> bytes:
    """The beginning of a .npy file."""
    count = len(text) if length is None else length
    return (
        b"\x93NUMPY"
        + bytes([version, 0])
        + struct.pack("<H" if version == 1 else "<I", count)
        + text.encode()
    )


def described(descr: str = "'<i4'", shape: str = "(2, 5)", fortran: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}}}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(described(shape="(1000000, 1000000)")), "expected 4,000,000,000,0"),
        (
            header(described(shape=f"({2**47}, {2**47})")) + b"0" * 40,
            "bytes, expected 79,228,162,514,264,337,593,543,950,432 for",
        ),
        (header(described(shape=f"({2**63}, {2**63})")), "shape .*, expected rows of cells"),
        (header(described(shape=f"(0x{'f' * 8000}, 5)")), "shape tuple, expected rows of cells"),
        (header(described(shape="(-2, -5)")) + b"0" * 40, r"shape \(-2, -5\), expected rows"),
        (header(described(shape="(2, True)")) + b"0" * 8, r"shape \(2, True\), expected rows"),
        (header(described(shape="(0, 5)")), r"shape \(0, 5\), expected rows"),
        (header(described(shape="(2.0, 5)")) + b"0" * 40, "not a readable .npy array .shape is not valid"),
        (header(described("'|O'")) + b"0" * 80, "numbers of type object"),
        (header(described("'<f8'")) + b"0" * 80, "numbers of type float64"),
        (header(described("[('a', '<i4')]")) + b"0" * 40, r"numbers of type \[\("),
        (header(described("('<i4', (3,))")) + b"0" * 120, r"numbers of type \('<i4', \(3,\)\)"),
        (header(described("'<i9'")) + b"0" * 90, "not a readable .npy array"),
        (header(described(), 2, 2**32 - 1), r"EOF: reading array header, expected 4294967295 bytes"),
        (header(" " * 60_000), "EOF: reading array header"),
        (header(described() + " " * 12_000), "not a readable .npy array .Header info length"),
        (header("(" * 9_000), "not a readable .npy array"),
        (header("[" * 90 + "]" * 90), "not a readable .npy array .Header is not a dictionary"),
        (header("__import__('os').abort()"), "not a readable .npy array"),
        (header(described()) + b"0" * 39, r"\d+ bytes, expected \d+ for its shape \(2, 5\)"),
        (header(described()) + b"0" * 41, r"\d+ bytes, expected \d+ for its shape \(2, 5\)"),
        (b"\x93NUMPY\x01", "not a readable .npy array .EOF"),
        (b"", "not a readable .npy array .EOF"),
    ],
)
def test_a_header_is_not_believed(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=message) as caught:
        open_array(path, 2)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and len(text) < len(str(path)) + 400


def test_arrays_that_numpy_writes_are_opened(tmp_path: Path) -> None:
    path, array = tmp_path / "x.npy", np.arange(40).reshape(8, 5)
    for written_as in (array.astype(np.uint8), array.astype(">i2"), np.asfortranarray(array)):
        np.save(path, written_as)
        np.testing.assert_array_equal(open_array(path, 2), array)
    for version in ((1, 0), (2, 0), (3, 0)):
        with path.open("wb") as file:
            np.lib.format.write_array(file, array, version=version)
        np.testing.assert_array_equal(open_array(path, 2), array)
    os.mkfifo(tmp_path / "pipe.npy")
    for name in ("pipe.npy", "none.npy"):
        with pytest.raises(DatasetError, match=rf"{name}: no such file"):
            open_array(tmp_path / name, 2)


# --- checksums


@pytest.mark.parametrize("name", [*NAMES, "set0__difficulty.npy"])
def test_a_flipped_bit_is_named_by_its_file(tmp_path: Path, name: str) -> None:
    with new_dataset(tmp_path) as data:
        part = a_set(MIXED)
        data.split("train", Shape(CELLS, VOCAB)).add("set0", part, np.arange(len(part.inputs)))
        data.close([str(number) for number in range(200)])
    path = tmp_path / "train" / name
    opened = PuzzleDataset(tmp_path, "train")
    # Where the reader passes over it: white space in the description, and in the headers of the arrays.
    flip(path, *(-1, ord("\n") ^ ord(" ")) if path.suffix == ".json" else (120, ord(" ") ^ ord("\t")))
    with pytest.raises(
        DatasetError, match=rf"{name}: its bytes are not those that checksums\.json lists"
    ) as told:
        PuzzleDataset(tmp_path, "train")
    assert "after an intended change, rename checksums.json" in str(told.value)
    (tmp_path / "train/checksums.json").unlink()
    now = PuzzleDataset(tmp_path, "train")
    expected = [] if name.endswith("difficulty.npy") else [f"{name} changed"]
    assert changed_files(digests(opened), digests(now)) == expected
    assert (fingerprint(opened) == fingerprint(now)) == (not expected)


def test_checksums_that_do_not_fit_are_named(tmp_path: Path) -> None:
    written(tmp_path, MIXED)
    path = tmp_path / "train/checksums.json"
    good = json.loads(path.read_text())
    for text, message in (
        ("[1]", r"checksums\.json: holds list, expected a JSON object"),
        ("{", r"checksums\.json: not readable as JSON"),
        (" " * (1 << 20) + "{}", r"checksums\.json: more than 1 MiB"),
        (json.dumps(good | {"dataset.json": 1}), r"dataset\.json: its bytes are not those"),
        (
            json.dumps(good | {"dataset.json": good["dataset.json"] | {"size": 7}}),
            r"dataset\.json: its bytes",
        ),
        (
            json.dumps(good | {"../x": {}}),
            r"checksums\.json: lists '\.\./x', which is not a file of the split",
        ),
        (json.dumps({n: good[n] for n in NAMES[1:]}), r"checksums\.json: does not list dataset\.json"),
    ):
        path.write_text(text)
        with pytest.raises(DatasetError, match=message):
            PuzzleDataset(tmp_path, "train")
    path.write_text(json.dumps(good))
    # The user's own links are followed.
    (tmp_path / "link").symlink_to(tmp_path / "train")
    assert digests(PuzzleDataset(tmp_path, "link")) == {name: good[name]["sha256"] for name in NAMES}


def test_a_file_is_read_once_for_both_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, MIXED, [[2]])
    reads: list[Any] = []

    def read(*paths: Any) -> integrity.Contents:
        reads.append(paths)
        return integrity.read_contents(*paths)

    monkeypatch.setattr(dataset, "read_contents", read)
    data = PuzzleDataset(tmp_path, "train")
    assert len(digests(data)) == 11 and len(fingerprint(data)) == 64 and len(reads) == 1
    # Without checksums nothing is read before it is asked for.
    (tmp_path / "train/checksums.json").unlink()
    data = PuzzleDataset(tmp_path, "train")
    assert len(reads) == 1 and digests(data) and len(reads) == 2


def test_differences_are_reported_by_file() -> None:
    old, new = {"a": "1", "b": "2", "c": "3"}, {"a": "1", "c": "4", "d": "5"}
    assert changed_files(old, new) == ["c changed", "b is gone", "d is new"]
    assert changed_files(old, dict(old)) == []


# --- files that change after they were opened


def rewritten(path: Path) -> None:
    flip(path)
    # A clock of coarse steps may give the moment at which it was written.
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def replaced(path: Path) -> None:
    """By a copy with the same time, as rsync would leave it."""
    shutil.copy2(path, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


CHANGES = [
    (lambda path: os.truncate(path, 200), "shrank from 293 to 200 bytes"),
    (lambda path: os.truncate(path, 0), "shrank from 293 to 0 bytes"),
    (lambda path: path.open("ab").write(b"00"), "grew from 293 to 295 bytes"),
    (Path.unlink, "was removed"),
    (lambda path: shutil.rmtree(path.parent), "was removed"),
    (rewritten, "was written to"),
    (replaced, "was replaced by another file"),
]


@pytest.mark.parametrize("array", ["inputs", "labels"])
@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_no_batch_is_taken_from_changed_files(
    tmp_path: Path, array: str, change: Callable[[Path], Any], message: str
) -> None:
    data = written(tmp_path, MIXED, [[1, 2]])
    path = tmp_path / f"train/set0__{array}.npy"
    training, testing = train_batches(data, **OPTIONS), dataset.test_batches(data, global_batch_size=6)
    next(training), next(testing)
    change(path)
    for batches in (training, testing):
        with pytest.raises(DatasetError, match=message) as told:
            next(batches)
        text = str(told.value)
        # Of two files that are gone the first is named.
        assert text.startswith(
            f"{path}: " if path.parent.exists() else f"{tmp_path}/train/set0__inputs.npy: "
        )
        assert "restore the file, and the same command continues from the last checkpoint" in text


def test_the_rest_of_a_folder_may_change(tmp_path: Path) -> None:
    data = written(tmp_path / "data", MIXED, [[1, 2]])
    batches = train_batches(data, **OPTIONS)
    next(batches)
    # What is in memory, and the other set; the folder itself is moved and put back.
    (tmp_path / "data/train/set0__group_indices.npy").unlink()
    (tmp_path / "data/train/dataset.json").write_text("{}")
    os.truncate(tmp_path / "data/train/set1__inputs.npy", 0)
    (tmp_path / "data").rename(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "data")
    (tmp_path / "data/train/set0__inputs.npy").chmod(0o400)
    next(batches)
    data.check_unchanged("set0")
    with pytest.raises(DatasetError, match=r"set1__inputs\.npy: shrank"):
        data.check_unchanged("set1")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stage", ["read_set", "read_contents"])
def test_changes_while_a_split_is_opened_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, name: str
) -> None:
    written(tmp_path, MIXED)
    if stage == "read_set":
        # Nothing is read a second time then.
        (tmp_path / "train/checksums.json").unlink()
    inner, path = getattr(dataset, stage), tmp_path / "train" / name
    changed: list[bool] = []

    def change_behind(*args: Any) -> Any:
        result = inner(*args)
        changed.append(True)
        os.utime(path, ns=(0, 1))
        return result

    monkeypatch.setattr(dataset, stage, change_behind)
    with pytest.raises(DatasetError, match=rf"{name}: was written to after it was opened"):
        PuzzleDataset(tmp_path, "train")
    assert changed


@pytest.mark.parametrize(("array", "value"), [("inputs", 200), ("labels", VOCAB)])
def test_values_are_checked_against_the_vocabulary_again(tmp_path: Path, array: str, value: int) -> None:
    """A disk that gives other bytes than it was given changes no time."""
    data = written(tmp_path, MIXED)
    path, row = tmp_path / f"train/set0__{array}.npy", 17
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(128 + row * CELLS + 2)
        file.write(bytes([value]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    expected = rf"{path.name}: row {row} holds {value}, expected 0 <= value < 9 \(vocab_size 9\)"
    with pytest.raises(DatasetError, match=expected):
        list(dataset.test_batches(data, global_batch_size=6))
    with pytest.raises(DatasetError, match=expected):
        list(train_batches(data, **OPTIONS | {"epochs": 40, "epochs_per_iter": 40}))
    # What a batch has not drawn is not looked at.
    taken = {"set0": np.delete(np.arange(33), row)}
    assert len(list(dataset.test_batches(data, global_batch_size=6, examples=taken))) == 6


def test_difficulty_is_checked_when_read(tmp_path: Path) -> None:
    written(tmp_path, MIXED)
    path = tmp_path / "train/set0__difficulty.npy"
    np.save(path, np.arange(34, dtype=np.uint8))
    with pytest.raises(DatasetError, match=r"set0__difficulty\.npy: shape \(34,\), expected .* each of 33"):
        read_difficulty(path.parent, "set0", 33)
    with pytest.raises(DatasetError, match=r"checksums\.json: does not list set0__difficulty\.npy"):
        PuzzleDataset(tmp_path, "train")
