"""A data set looked at: what is told of a good one, and every damage of a bad one, never a traceback."""

import argparse
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrm.common.errors import run_command
from hrm.data.arc.augment import canvas
from hrm.data.format import ARRAYS, PuzzleSet
from hrm.data.inspect import command as inspect
from hrm.data.maze.build import Request, generate, write_mazes
from hrm.data.writer import Shape, new_dataset


def command(*words: object) -> int:
    """`python -m hrm.data inspect` with these words; its exit status."""
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    args = parser.parse_args([str(word) for word in words])
    try:
        return run_command(lambda: args.run(args), "")
    except SystemExit as status:
        assert isinstance(status.code, int)
        return status.code


@pytest.fixture(scope="module")
def mazes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 training mazes with 3 augmentations each and 20 test mazes, of 7 x 7 cells."""
    folder = tmp_path_factory.mktemp("data") / "mazes"
    taken: set[bytes] = set()
    request = Request(7, 7, braided=True, min_length=3)
    splits = {"test": generate(request, "test", 20, taken), "train": generate(request, "train", 30, taken)}
    write_mazes(folder, splits, 3, 0)
    return folder


@pytest.fixture
def data(mazes: Path, tmp_path: Path) -> Path:
    """A copy to damage, without checksums, as the official data sets are."""
    skipped = shutil.ignore_patterns("checksums.json")
    return Path(shutil.copytree(mazes, tmp_path / "data", ignore=skipped))


def violations(folder: Path, capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    """The violations that are told; the exit status must say whether there are any."""
    status = command(folder, "--samples", 1, *words)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    *told, count = re.findall(r"^(?:\w*/)?(?:[\w.]+\.(?:npy|json)): .*|^violations: \d+", out, re.MULTILINE)
    number = int(count.removeprefix("violations: "))
    assert status == (1 if number else 0)
    extra = sum(
        int(line.split("and ")[1].split()[0]) - 1
        for line in told
        if line.endswith("more") and ": and " in line
    )
    assert len(told) + extra == number
    return told


def change(path: Path, edit: Callable[[np.ndarray], Any]) -> None:
    """Edits an array in place, or puts what `edit` returns in its place."""
    array = np.load(path)
    result = edit(array)
    np.save(path, array if result is None else result)


def put(*index: int, value: Any) -> Callable[[np.ndarray], None]:
    return lambda array: array.__setitem__(index if len(index) > 1 else index[0], value)


# --- what is told of good data sets


def test_a_good_data_set_passes_and_is_described(mazes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(mazes, "--samples", 2) == 0
    out = capsys.readouterr().out
    for line in (
        "train: maze, 7 x 7 cells, vocabulary 6",
        "  set all: 30 groups, 120 puzzles, 120 examples",
        "    puzzles per group: 4",
        "    examples per puzzle: 1",
        "    puzzle identifiers used: 1 of 1",
        "test: maze, 7 x 7 cells, vocabulary 6",
        "  set all: 20 groups, 20 puzzles, 20 examples",
        "violations: 0",
    ):
        assert line in out.splitlines()
    assert out.count(", and its label:") == 4 and "#######   #######" in out
    labels = np.load(mazes / "test" / "all__labels.npy")
    share = f"o {(labels == 5).mean():.1%}"
    assert share in next(line for line in out.split("test: ")[1].splitlines() if "labels:" in line)
    difficulty = np.load(mazes / "test" / "all__difficulty.npy")
    shown = out.split("test: ")[1].split("difficulty:\n")[1].split("  files:")[0].splitlines()
    assert sum(int(line.split()[-1]) for line in shown) == len(difficulty)
    size = (mazes / "test" / "all__inputs.npy").stat().st_size
    assert f"all__inputs.npy {size / 1024:.4g} KiB" in out

    assert command(mazes / "test") == command(mazes, "--split", "test") == 0
    assert capsys.readouterr().out.count("train: ") == 0


def test_samples_are_chosen_by_the_seed(mazes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def shown(seed: int) -> str:
        assert command(mazes, "--seed", seed, "--samples", 3) == 0
        return capsys.readouterr().out

    assert shown(0) == shown(0) != shown(1)
    row = int(re.findall(r"all, row (\d+), and its label", shown(0))[0])
    question = np.load(mazes / "train" / "all__inputs.npy")[row]
    first = "".join("_#.SGo"[token] for token in question[7:14])
    assert f"    {first}   " in shown(0)


def test_a_picture_of_the_samples(mazes: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    assert command(mazes, "--png", tmp_path / "samples.png") == 0
    height, width, _ = imread(io.BytesIO((tmp_path / "samples.png").read_bytes())).shape
    assert width == round(4 * 3.4 * 110) and height > width / 4


def test_inspection_reports_clues_and_solves_on_request(
    tiny_sudoku: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    skipped = shutil.ignore_patterns("checksums.json", "fingerprints.json")
    folder = Path(shutil.copytree(tiny_sudoku, tmp_path / "data", ignore=skipped))
    assert violations(folder, capsys, "--deep") == []
    clues = (np.load(folder / "test" / "all__inputs.npy") > 1).sum(axis=1)
    assert command(folder, "--samples", 0) == 0
    told = f"    clues: {clues.min()} to {clues.max()}, mean {clues.mean():.1f}"
    assert told in capsys.readouterr().out.split("test: ")[1]
    # Fewer clues, same answer: the rules are kept, but the answer is no longer the only one.
    change(folder / "test" / "all__inputs.npy", lambda array: array.__setitem__((3, slice(None)), 1))
    assert violations(folder, capsys) == []
    assert violations(folder, capsys, "--deep") == [
        "test/all__inputs.npy: row 3: the puzzle has several solutions, expected one"
    ]
    labels = np.load(folder / "train" / "all__labels.npy")
    change(folder / "train" / "all__labels.npy", put(2, 0, value=int(labels[2, 1])))
    (told,) = violations(folder, capsys)
    assert re.fullmatch(
        r"train/all__labels.npy: row 2: (row 1, column 1: the clue|row 1 holds) .* \(and \d more\)", told
    )


def arc(folder: Path) -> Path:
    """One task of ARC with two augmentations, several examples to a puzzle, and identifiers."""
    draw = np.random.default_rng(0)
    boards = np.array([canvas(draw.integers(0, 10, (3, 4)).astype(np.uint8), 2, 5) for _ in range(10)])
    part = PuzzleSet(
        inputs=boards[:5],
        labels=boards[5:],
        puzzle_identifiers=np.array([1, 2], np.int32),
        puzzle_indices=np.array([0, 3, 5], np.int32),
        group_indices=np.array([0, 2], np.int32),
    )
    with new_dataset(folder) as writer:
        for split in ("train", "test"):
            writer.split(split, Shape(900, 12)).add("all", part)
        writer.close(["<blank>", "task", "task_t1_0123456789"])
    for split in ("train", "test"):
        (folder / split / "checksums.json").unlink()
    return folder


def test_arc_labels_may_be_shared_and_canvases_are_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = arc(tmp_path / "arc")
    assert command(folder) == 0
    out = capsys.readouterr().out
    assert "5 training label rows are also in the test split" in out
    assert "examples per puzzle: 2 to 3, mean 2.5" in out and "puzzle identifiers used: 2 of 3" in out
    change(folder / "test" / "all__inputs.npy", put(1, 2 * 30 + 6, value=1))
    change(folder / "test" / "all__labels.npy", put(4, 0, value=1))
    # A hidden answer is no answer.
    change(folder / "test" / "all__labels.npy", lambda array: array.__setitem__(2, 0))
    assert violations(folder, capsys) == [
        "test/all__inputs.npy: row 1: the colours do not fill a rectangle: row 3, column 7 has none",
        "test/all__labels.npy: row 4: the grid is not surrounded by end marks and padding: row 1, column 1",
    ]


# --- damage


def cut(path: Path, count: int = 10) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def edit_json(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "missing"}))


def test_all_damages_are_reported_together(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = data / "train", data / "test"
    change(train / "all__inputs.npy", put(3, 5, value=9))
    change(train / "all__inputs.npy", put(70, 0, value=6))
    change(train / "all__puzzle_indices.npy", put(4, value=4000))
    change(train / "all__puzzle_identifiers.npy", put(2, value=-1))
    change(train / "all__difficulty.npy", lambda array: array[:-1])
    edit_json(train / "dataset.json", total_groups=31, mean_puzzle_examples=1.5, pad_id=6)
    cut(test / "all__inputs.npy")
    change(test / "all__labels.npy", lambda array: array.astype(np.float32))
    (test / "all__group_indices.npy").unlink()
    edit_json(data / "test" / "dataset.json", vocab_size=True, sets=["all", "more/../x"])
    (data / "identifiers.json").write_text('["<blank>", "<blank>"]')
    assert violations(data, capsys) == [
        "train/dataset.json: pad_id is 6, expected less than vocab_size 6",
        "train/dataset.json: total_groups is 31, but the arrays hold 30 groups",
        "train/dataset.json: mean_puzzle_examples is 1.5, but the arrays give 1",
        "train/all__difficulty.npy: 119 rows, expected 120, as the inputs are 120",
        "train/all__puzzle_indices.npy: row 5 holds 5 after 4000, expected more",
        "train/all__inputs.npy: row 3, cell 5, holds 9, expected 0 to 5 (vocab_size 6)",
        "train/all__inputs.npy: row 70, cell 0, holds 6, expected 0 to 5 (vocab_size 6)",
        "train/all__puzzle_identifiers.npy: row 2 holds -1, expected 0 to 0 (num_puzzle_identifiers 1)",
        "test/dataset.json: vocab_size is True, expected a whole number from 1 to 1048576",
        "test/dataset.json: sets is ['all', 'more/../x'], expected a list of different plain names, at least "
        "one and at most 1000",
        "test/all__inputs.npy: 1,098 bytes, expected 1,108 for its shape (20, 49)",
        "test/all__labels.npy: numbers of type float32, expected integers",
        "test/all__group_indices.npy: no such file",
        "identifiers.json: 2 names, but train/dataset.json says num_puzzle_identifiers 1",
        "identifiers.json: 2 names, but test/dataset.json says num_puzzle_identifiers 1",
        "identifiers.json: name 1, '<blank>', is also name 0",
        "train/all__labels.npy: row 3: row 1, column 6 is no cell of a maze; expected '#', '.', 'S' or 'G' "
        "(and 1 more)",
        "train/all__labels.npy: row 70: row 1, column 1 is no cell of a maze; expected '#', '.', 'S' or 'G' "
        "(and 1 more)",
    ]


def wrote(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def described(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "test/dataset.json", **changes)


def altered(array: str, edit: Callable[[np.ndarray], Any]) -> Callable[[Path], object]:
    return lambda folder: change(folder / f"test/all__{array}.npy", edit)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (wrote("train/dataset.json", "{"), ["train/dataset.json: not readable as JSON (Expecting"]),
        (wrote("train/dataset.json", "[1]"), ["train/dataset.json: holds list, expected a JSON"]),
        (wrote("train/dataset.json", "null"), ["train/dataset.json: holds null"]),
        (lambda d: (d / "train/dataset.json").unlink(), ["train/dataset.json: no such file"]),
        (lambda d: (d / "identifiers.json").unlink(), ["identifiers.json: no such file"]),
        (wrote("identifiers.json", "[1]"), ["identifiers.json: expected a list of names"]),
        (
            described(seq_len=50),
            [
                "test/all__inputs.npy: rows of 49 cells, dataset.json says seq_len 50",
                "test/all__labels.npy: rows of 49 cells, dataset.json says seq_len 50",
                "test/dataset.json: seq_len is 50, but 49 in train",
            ],
        ),
        (
            described(seq_len="missing", ignore_label_id=1.5),
            [
                "test/dataset.json: seq_len is missing, expected a whole number from 1 to 65536",
                "test/dataset.json: ignore_label_id is 1.5, expected a whole number of 32 bits or null",
            ],
        ),
        (
            described(blank_identifier_id=1, mean_puzzle_examples=0),
            [
                "test/dataset.json: mean_puzzle_examples is 0, expected a number above 0",
                "test/dataset.json: blank_identifier_id is 1, expected less than num_puzzle_identifiers 1",
            ],
        ),
        (
            described(sets=["none"]),
            [f"test/none__{array}.npy: no such file" for array in PuzzleSet.__annotations__],
        ),
        (
            lambda d: cut(d / "test/all__group_indices.npy"),
            ["test/all__group_indices.npy: 202 bytes, expected 212 for its shape (21,)"],
        ),
        (
            lambda d: (d / "test/all__labels.npy").write_bytes(b""),
            ["test/all__labels.npy: not a readable .npy array"],
        ),
        (
            altered("labels", lambda array: array[0]),
            ["test/all__labels.npy: shape (49,), expected rows of cells"],
        ),
        (
            altered("puzzle_identifiers", lambda array: array[:0]),
            ["test/all__puzzle_identifiers.npy: shape (0,), expected numbers"],
        ),
        (
            altered("labels", lambda array: array[:-2]),
            ["test/all__labels.npy: 18 rows, expected 20, as the inputs are 20"],
        ),
        (
            altered("puzzle_indices", lambda array: array[:-1]),
            [
                "test/all__puzzle_indices.npy: 20 rows, expected 21, as the puzzle_identifiers are 20",
                "test/all__puzzle_indices.npy: ends with 19, expected 20, the number of inputs",
            ],
        ),
        (
            altered("group_indices", lambda array: array + 1),
            [
                "test/all__group_indices.npy: row 0 holds 1, expected 0",
                "test/all__group_indices.npy: ends with 21, expected 20, the number of puzzle_identifiers",
            ],
        ),
        (
            altered("inputs", lambda array: array.astype(np.int64) - 300),
            [f"test/all__inputs.npy: row {row}, cell 0, holds -299, expected 0 to 5" for row in range(20)]
            + [f"test/all__labels.npy: row {row}: row 1, column 1 is no cell of a maze" for row in range(20)],
        ),
    ],
)
def test_every_damage_is_reported(
    data: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], expected: list[str]
) -> None:
    damage(data)
    told = violations(data, capsys)
    assert len(told) == len(expected)
    for line, beginning in zip(told, expected, strict=True):
        assert line.startswith(beginning)


def test_checksums_are_compared_with_the_files(
    mazes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(mazes, tmp_path / "data"))
    assert violations(data, capsys) == []
    # Difficulties are judged by nothing else, and nothing else misses one that is gone.
    change(data / "train/all__difficulty.npy", put(3, value=77))
    (data / "test/all__difficulty.npy").unlink()
    sums = json.loads((data / "test/checksums.json").read_text())
    edit_json(data / "test/checksums.json", **{"dataset.json": "missing", "../x": {}})
    assert sorted(sums) == ["all__difficulty.npy", *sorted(f"all__{a}.npy" for a in ARRAYS), "dataset.json"]
    assert violations(data, capsys) == [
        "train/all__difficulty.npy: its bytes are not those that checksums.json lists",
        "test/checksums.json: lists '../x', which is not a file of the split",
        "test/checksums.json: lists 'all__difficulty.npy', which is not a file of the split",
        "test/checksums.json: does not list dataset.json",
    ]
    for text, told in (
        ("[]", "holds list, expected a JSON object"),
        ("{", "not readable as JSON (Expecting"),
    ):
        (data / "test/checksums.json").write_text(text)
        assert violations(data, capsys)[1].startswith(f"test/checksums.json: {told}")


def test_many_violations_of_a_file_are_counted(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(data / "train" / "all__labels.npy", lambda array: array.__setitem__((slice(50), 0), 77))
    told = violations(data, capsys)
    assert len(told) == 21
    assert told[19] == "train/all__labels.npy: row 19, cell 0, holds 77, expected 0 to 5 (vocab_size 6)"
    # The rows' rules are broken as well.
    assert told[20] == "train/all__labels.npy: and 80 more"


def test_labels_that_do_not_solve_their_inputs(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = np.load(data / "test" / "all__labels.npy")
    change(data / "test" / "all__labels.npy", lambda array: np.where(array == 5, 2, array).astype(np.uint8))
    told = violations(data, capsys)
    assert len(told) == (labels == 5).any(axis=1).sum() == 20
    assert re.fullmatch(
        r"test/all__labels.npy: row 0: the path from S ends at row \d, column \d and does not reach G",
        told[0],
    )


def test_labels_without_loss_are_taken_from_the_inputs(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test"):
        inputs = np.load(data / split / "all__inputs.npy")
        labels = np.load(data / split / "all__labels.npy")
        np.save(data / split / "all__labels.npy", np.where(labels == inputs, 0, labels).astype(np.uint8))
    assert violations(data, capsys) == []


def test_training_labels_of_the_test_are_found(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for array in ("inputs", "labels"):
        row = np.load(data / "test" / f"all__{array}.npy")[7]
        change(data / "train" / f"all__{array}.npy", put(11, value=row))
        # Another type of number makes no other label.
        change(data / "test" / f"all__{array}.npy", lambda a: a.astype(np.int64))
    assert violations(data, capsys) == ["train/all__labels.npy: row 11 is also a label of the test split"]
    assert violations(data, capsys, "--split", "train") == []


def test_arrays_are_walked_in_chunks(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(data / "train" / "all__inputs.npy", put(100, 3, value=5))
    change(data / "train" / "all__labels.npy", put(119, 3, value=9))
    whole = violations(data, capsys)
    assert [line.split(":")[1] for line in whole] == [
        " row 119, cell 3, holds 9, expected 0 to 5 (vocab_size 6)",
        " row 100",
        " row 119",
    ]
    monkeypatch.setattr("hrm.data.inspect.invariants.CHUNK_BYTES", 49 * 7)
    assert violations(data, capsys) == whole


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere",), "error: nowhere: no such folder; give the folder of a data set"),
        (
            ("--split", "dev"),
            "no split 'dev' in it; give one of train, test",
        ),
        (("--samples", "-1"), "error: samples=-1: expected 0 to 100"),
        (("--seed", "-1"), "error: seed=-1: expected at least 0"),
        (("--samples", "0", "--png", "x.png"), "error: x.png: there is no sample to draw; raise --samples"),
    ],
)
def test_uninspectable_data(
    mazes: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert command(*words if words[0] == "nowhere" else (mazes, *words)) == 2
    assert message in capsys.readouterr().err


def test_an_empty_folder_is_no_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path) == 2
    assert ": not a data set; expected <split>/dataset.json" in capsys.readouterr().err
