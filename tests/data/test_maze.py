"""Mazes: paths and mazes against an independent solver, symmetries, files and their faults, data sets."""

import argparse
import csv
import importlib
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrm.common.errors import run_command
from hrm.data.dataset import PuzzleDataset
from hrm.data.format import read_difficulty
from hrm.data.inspect.histogram import histogram
from hrm.data.maze import build as maze
from hrm.data.maze.build import Request, augment, generate
from hrm.data.maze.files import MazeError, Mazes, keys, read_mazes
from hrm.data.maze.search import SYMMETRIES, distances, random_mazes, solve, solved, symmetric
from hrm.data.puzzle_kinds import Kind
from tests.support.puzzle_sets import digest

# It comes with PyTorch, and without types.
networkx: Any = importlib.import_module("networkx")
HRM_REPO = os.environ.get("HRM_REPO")


def command(*words: object) -> int:
    """`python -m hrm.data maze` with these words; its exit status."""
    parser = argparse.ArgumentParser()
    maze.add_arguments(parser)
    args = parser.parse_args([str(word) for word in words])
    return run_command(lambda: args.run(args), "")


def some(count: int, side: int = 9, braided: bool = True, min_length: int = 0, seed: int = 1) -> Mazes:
    states = np.random.default_rng(seed).integers(1, 1 << 63, count, np.uint64)
    questions, answers = np.zeros((2, count, side * side), np.uint8)
    mazes = Mazes(questions, answers, np.zeros(count, np.int32))
    random_mazes((side, side), braided, min_length, 100, states, questions, answers, mazes.lengths)
    return mazes


def graph_of(question: np.ndarray, side: int) -> Any:
    graph = networkx.grid_2d_graph(side, side)
    graph.remove_nodes_from([(c // side, c % side) for c in np.nonzero(question == 1)[0].tolist()])
    return graph


def ends(question: np.ndarray, side: int) -> list[tuple[int, int]]:
    return [divmod(int((question == token).argmax()), side) for token in (3, 4)]


def write_csv(
    path: Path, mazes: Mazes, *extra: list[str], header: str = "source,question,answer,rating"
) -> Path:
    characters = np.array(list("_# SGo"))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        for question, answer in zip(mazes.questions, mazes.answers, strict=True):
            row = ["made", "".join(characters[question]), "".join(characters[answer]), "0"]
            writer.writerow(row[: header.count(",") + 1])
        writer.writerows(extra)
    return path


# --- paths and random mazes


def test_paths_are_those_of_an_independent_solver() -> None:
    draw = np.random.default_rng(2)
    reached = 0
    for side in (5, 8, 13):
        for _ in range(20):
            question = np.where(draw.random(side * side) < 0.35, 1, 2).astype(np.uint8)
            question[draw.choice(side * side, 2, replace=False)] = 3, 4
            graph, (start, goal) = graph_of(question, side), ends(question, side)
            lengths = networkx.single_source_shortest_path_length(graph, start)
            steps = distances(question != 1, side, start[0] * side + start[1])
            assert steps.tolist() == [lengths.get(divmod(cell, side), -1) for cell in range(side * side)]
            answer, length = solve(question, side)
            assert length == lengths.get(goal, 0)
            # The path, followed back from the goal: the first of above, left, right, below that is nearer.
            cell, way = goal, []
            while length and lengths[cell] > 1:
                around = [(cell[0] + r, cell[1] + c) for r, c in ((-1, 0), (0, -1), (0, 1), (1, 0))]
                cell = next(near for near in around if lengths.get(near, -1) == lengths[cell] - 1)
                way.append(cell[0] * side + cell[1])
            assert np.nonzero(answer == 5)[0].tolist() == sorted(way)
            assert bool(solved(question[None], answer[None], side)[0]) == (length > 0)
            reached += length > 0
    assert 20 < reached < 60


@pytest.mark.parametrize("side", [5, 6, 9, 14, 30, 31])
def test_perfect_mazes_are_trees_and_braided_ones_have_no_dead_end(side: int) -> None:
    for braided in (False, True):
        mazes = some(8, side, braided)
        assert solved(mazes.questions, mazes.answers, side).all()
        assert mazes.lengths.tolist() == ((mazes.answers == 5).sum(axis=1) + 1).tolist()
        grids = mazes.questions.reshape(-1, side, side)
        frame = np.ones((side, side), bool)
        frame[1:-1, 1:-1] = False
        assert (grids[:, frame] == 1).all()
        # Corridors are one cell wide.
        walls = grids == 1
        assert (walls[:, 1:, 1:] | walls[:, 1:, :-1] | walls[:, :-1, 1:] | walls[:, :-1, :-1]).all()
        for question in mazes.questions:
            graph = graph_of(question, side)
            assert networkx.is_connected(graph) and graph.number_of_nodes() > side * side / 4
            if braided:
                assert min(dict(graph.degree).values()) >= 2
            else:
                assert networkx.is_tree(graph)
        assert len(np.unique(mazes.questions, axis=0)) > 1


def test_paths_have_the_requested_length() -> None:
    assert some(50, 30, False, 110).lengths.min() >= 110
    # No corridor of a 5 x 5 maze is longer than 6 steps.
    assert some(5, 5, False, 7).lengths.tolist() == [0] * 5
    lengths = some(400, 7).lengths
    assert lengths.min() == 1 and len(np.unique(lengths)) > 5


def test_the_symmetries_are_those_of_the_square() -> None:
    grid = np.arange(9).reshape(3, 3)
    expected = [
        "012345678",
        "258147036",
        "876543210",
        "630741852",
        "210543876",
        "678345012",
        "036147258",
        "852741630",
    ]
    assert ["".join(map(str, symmetric(grid, k).ravel())) for k in range(SYMMETRIES)] == expected
    np.testing.assert_array_equal(symmetric(np.stack([grid, grid + 9]), 7)[1], symmetric(grid, 7) + 9)


def test_keys_tell_mazes_apart_up_to_symmetry() -> None:
    mazes = some(40, 7)
    found = keys(mazes.questions)
    grids = mazes.questions.reshape(-1, 7, 7)
    for symmetry in range(SYMMETRIES):
        assert keys(symmetric(grids, symmetry).reshape(-1, 49)).tolist() == found.tolist()
    classes = [min(symmetric(grid, k).tobytes() for k in range(SYMMETRIES)) for grid in grids]
    assert len(set(found.tolist())) == len(set(classes)) > 30


# --- generated data sets


@pytest.mark.parametrize("side", [5, 7])
def test_no_generated_maze_is_there_twice(side: int) -> None:
    taken: set[bytes] = set()
    # There are 21 perfect mazes of 5 x 5 cells.
    count = 8 if side == 5 else 300
    parts = [
        chunk
        for split in ("test", "train")
        for chunk in generate(Request(side, side, seed=3), split, count, taken)
    ]
    grids = np.concatenate([part.questions for part in parts]).reshape(-1, side, side)
    classes = {min(symmetric(grid, k).tobytes() for k in range(SYMMETRIES)) for grid in grids}
    assert len(classes) == len(taken) == 2 * count
    for part in parts:
        assert solved(part.questions, part.answers, side).all()
        assert part.lengths.tolist() == ((part.answers == 5).sum(axis=1) + 1).tolist()


def test_threads_and_chunks_change_no_maze(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(workers: int) -> list[np.ndarray]:
        chunks = list(generate(Request(8, 8, True, 2, seed=5), "train", 600, set(), workers))
        return [
            np.concatenate([getattr(c, name) for c in chunks]) for name in ("questions", "answers", "lengths")
        ]

    first = made(1)
    for workers, cells in ((3, 1 << 22), (1, 64 * 50)):
        monkeypatch.setattr(maze, "CHUNK_CELLS", cells)
        for here, there in zip(first, made(workers), strict=True):
            np.testing.assert_array_equal(here, there)


def test_augmentations_turn_question_and_answer_together() -> None:
    mazes = some(30)
    every = augment(mazes, 7, np.random.default_rng(0))
    for array, originals in ((every.questions, mazes.questions), (every.answers, mazes.answers)):
        grids = originals.reshape(-1, 9, 9)
        expected = np.stack([symmetric(grids, k) for k in range(SYMMETRIES)], axis=1)
        np.testing.assert_array_equal(array.reshape(expected.shape), expected)
    two = augment(mazes, 2, np.random.default_rng(0))
    assert solved(two.questions, two.answers, 9).all()
    assert two.lengths.tolist() == np.repeat(mazes.lengths, 3).tolist()
    groups = two.questions.reshape(30, 3, 81)
    np.testing.assert_array_equal(groups[:, 0], mazes.questions)
    turns = every.questions.reshape(30, 8, 81)
    chosen = [[int((turns[i] == g).all(axis=1).argmax()) for g in groups[i, 1:]] for i in range(30)]
    assert all(0 < a < b for a, b in chosen) and len({k for pair in chosen for k in pair}) == 7


def test_a_generated_data_set_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "--size 7 --num-train 20 --num-test 10 --num-aug 3 --min-length 4 --kind braided"
    words = text.split()
    assert command("--output-dir", tmp_path / "a", *words) == 0
    out = capsys.readouterr().out
    assert "train: 80 examples of 20 mazes, steps of the shortest path:" in out
    assert "test: 10 examples of 10 mazes" in out
    for split, rows, groups in (("train", 80, 20), ("test", 10, 10)):
        data = PuzzleDataset(tmp_path / "a", split)
        meta, part = data.metadata, data.sets["all"]
        assert (meta.vocab_size, meta.seq_len, meta.pad_id, meta.ignore_label_id) == (6, 49, 0, 0)
        assert (meta.blank_identifier_id, meta.num_puzzle_identifiers, meta.mean_puzzle_examples) == (
            0,
            1,
            1.0,
        )
        assert (meta.total_groups, len(part.inputs)) == (groups, rows)
        assert part.inputs.dtype == part.labels.dtype == np.uint8
        assert part.group_indices.tolist() == list(range(0, rows + 1, rows // groups))
        assert not part.puzzle_identifiers.any()
        assert solved(np.asarray(part.inputs), np.asarray(part.labels), 7).all()
        difficulty = read_difficulty(tmp_path / "a" / split, "all", rows)
        assert difficulty is not None
        assert difficulty.tolist() == ((part.labels == 5).sum(axis=1) + 1).tolist() and difficulty.min() >= 4
    assert json.loads((tmp_path / "a" / "identifiers.json").read_text()) == ["<blank>"]
    assert command("--output-dir", tmp_path / "b", *words, "--workers", 2) == 0
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert command("--output-dir", tmp_path / "b", *words, "--seed", 1) == 0
    assert digest(tmp_path / "a") != digest(tmp_path / "b")
    assert command("--output-dir", tmp_path / "c", *words, "--subsample-size", 5) == 0
    fewer = PuzzleDataset(tmp_path / "c", "train").sets["all"].inputs
    np.testing.assert_array_equal(
        fewer[::4], PuzzleDataset(tmp_path / "a", "train").sets["all"].inputs[:20:4]
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", 4), "error: size=4: expected at least 5"),
        (("--num-train", 0), "error: num_train=0: expected at least 1"),
        (("--num-aug", 8), "error: num_aug=8: expected 0 to 7, the other symmetries of a square"),
        (("--num-aug", -1), "error: num_aug=-1: expected 0 to 7"),
        (("--seed", -1), "error: seed=-1: expected at least 0"),
        (("--workers", 0), "error: workers=0: expected at least 1"),
        (("--subsample-size", 0), "error: subsample_size=0: expected at least 1"),
        (("--test-size", 0.1), "error: --test-size has no meaning for --source generated; leave it out"),
        (("--source", "nowhere.csv", "--size", 9), "error: --size has no meaning for --source nowhere.csv"),
        (("--source", "nowhere.csv"), "error: nowhere.csv: cannot be read ("),
        (
            ("--source", "hub:x/y", "--test-size", 0.5),
            "error: --test-size has no meaning for --source hub:x/y",
        ),
        (
            ("--size", 5, "--num-train", 400),
            "error: size=5 min_length=0: none of 500 random mazes has a path",
        ),
        (("--size", 5, "--min-length", 30), "error: size=5 min_length=30: none of 500 random mazes"),
    ],
)
def test_requests_that_cannot_be_met(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[object, ...],
    message: str,
) -> None:
    monkeypatch.setattr(maze, "ATTEMPTS", 500)
    assert command("--output-dir", tmp_path / "data", *words) == 2
    error = capsys.readouterr().err
    # Behind the bars that were shown and taken away.
    assert message in error and error.count("error:") == 1 and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_histograms_count_everything() -> None:
    assert histogram(np.array([3])) == [f"3  {'█' * 40}  1"]
    lines = histogram(np.array([12, 15, 19, 20, 45, 1, *[33] * 4]), buckets=5)
    assert [line.strip().split("  ")[0] for line in lines] == [
        "1 to 9",
        "10 to 19",
        "20 to 29",
        "30 to 39",
        "40 to 45",
    ]
    assert [int(line.split()[-1]) for line in lines] == [1, 3, 1, 4, 1]
    assert [line.count("█") for line in lines] == [10, 30, 10, 40, 10]
    assert len(histogram(np.arange(10_000))) <= 9


# --- files


def test_a_file_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mazes = some(25)
    for header in ("source,question,answer,rating", "source,question"):
        path = write_csv(tmp_path / "mazes.csv", mazes, header=header)
        monkeypatch.setattr("hrm.data.maze.files.CHUNK_ROWS", 10)
        parts = list(read_mazes(path))
        assert [len(part.lengths) for part in parts] == [10, 10, 5]
        for name in ("questions", "answers", "lengths"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(mazes, name))


QUESTION = "######S..##.#.##..G######"
ANSWER = "######Soo##.#o##..G######"


def spaced(text: str) -> str:
    return text.replace(".", " ")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            [QUESTION.replace("G", "g"), ANSWER],
            "line 3: question: row 4, column 4 is 'g', expected one of '#', ' ',",
        ),
        (
            [QUESTION, ANSWER.replace("oo", "o\u00e9")],
            "line 3: answer: row 2, column 4 is 'é', expected one of",
        ),
        (
            [QUESTION[:-1], ANSWER],
            "line 3: question of 24 characters, expected 25 as in the first row of the file",
        ),
        ([QUESTION, ANSWER + "#"], "line 3: answer of 26 characters, expected 25"),
        # The rules themselves have tests in test_puzzle_kinds.py.
        ([ANSWER, ANSWER], "line 3: question: row 2, column 3 is 'o', a path, and so are 2 more"),
        ([QUESTION, QUESTION], "line 3: answer: the path from S ends at row 2, column 2 and does not reach"),
        (["S.G##.#.##...##" + "#" * 10, "SoG##.#.##...##" + "#" * 10], ""),
        ([QUESTION], "line 3: 3 fields, expected 4 as in the header"),
    ],
)
def test_every_fault_of_a_file_is_named(tmp_path: Path, row: list[str], message: str) -> None:
    path = tmp_path / "mazes.csv"
    lines = [["source", "question", "answer", "rating"], ["a", spaced(QUESTION), spaced(ANSWER), "4"]]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([*lines, ["b", *map(spaced, row), "0"]])
    if not message:
        assert sum(len(part.lengths) for part in read_mazes(path)) == 2
        return
    with pytest.raises(MazeError) as error:
        list(read_mazes(path))
    assert str(error.value).startswith(f"{path}: {message}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it holds no maze; expected mazes, or rows of question,answer"),
        (b"source,question,answer,rating\n", "it holds no maze; expected mazes, or rows of question,answer"),
        (b"question\n####\n", "line 2: question of 4 characters, expected a square of at least 5 a side"),
        (b"question\n######\n", "line 2: question of 6 characters, expected a square of at least 5 a side"),
        # Five rows of seven cells, or seven rows of five.
        (b"question\n" + b"#" * 35, "line 2: question of 35 characters, expected a square of at least 5 a"),
        (
            b"question\n" + spaced(QUESTION.replace("G", ".")).encode(),
            "line 2: question: there is no G, expected one",
        ),
        (b"question\n" + b"#" * 200_000, "cannot be read (field larger than field limit (131072))"),
    ],
)
def test_files_that_hold_no_mazes(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "mazes.csv").write_bytes(content)
    with pytest.raises(MazeError) as error:
        list(read_mazes(tmp_path / "mazes.csv"))
    assert str(error.value).startswith(f"{tmp_path / 'mazes.csv'}: {message}")


def turned(mazes: Mazes, symmetry: int) -> Mazes:
    def turn(array: np.ndarray) -> np.ndarray:
        side = mazes.shape[0]
        return symmetric(array.reshape(-1, side, side), symmetry).reshape(len(array), -1)

    return Mazes(turn(mazes.questions), turn(mazes.answers), mazes.lengths)


def joined(*parts: Mazes) -> Mazes:
    arrays = ((part.questions, part.answers, part.lengths) for part in parts)
    questions, answers, lengths = (np.concatenate(group) for group in zip(*arrays, strict=True))
    return Mazes(questions, answers, lengths)


def test_two_files_become_a_data_set_without_repetitions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hrm.data.maze.files.CHUNK_ROWS", 8)
    every = some(40)
    train, test = every.take(np.arange(25)), every.take(np.arange(25, 40))
    (tmp_path / "in").mkdir()
    write_csv(
        tmp_path / "in" / "train.csv",
        joined(train, turned(train.take(np.arange(3)), 5), turned(test.take(np.arange(4)), 1)),
    )
    write_csv(tmp_path / "in" / "test.csv", joined(test, turned(test.take(np.arange(2)), 6)))
    assert command("--output-dir", tmp_path / "out", "--source", tmp_path / "in") == 0
    for split, kept in (("train", train), ("test", test)):
        part = PuzzleDataset(tmp_path / "out", split).sets["all"]
        np.testing.assert_array_equal(part.inputs, kept.questions)
        np.testing.assert_array_equal(part.labels, kept.answers)
    out = capsys.readouterr().out
    assert "left out of train: 3 duplicates, up to rotation and reflection" in out
    assert "left out of test: 2 duplicates, up to rotation and reflection" in out
    assert "left out of train: 4 test mazes, up to rotation and reflection" in out

    fetched = []

    def fetch(*asked: object) -> Path:
        fetched.append(asked)
        return tmp_path / "in"

    monkeypatch.setattr(maze, "fetch_files", fetch)
    assert command("--output-dir", tmp_path / "hub", "--source", "hub:owner/name") == 0
    assert fetched == [("hub:owner/name", ("train.csv", "test.csv"))]
    assert digest(tmp_path / "hub") == digest(tmp_path / "out")

    assert command("--output-dir", tmp_path / "few", "--source", tmp_path / "in", "--subsample-size", 6) == 0
    few = PuzzleDataset(tmp_path / "few", "train").sets["all"].inputs
    rows = [int((train.questions == question).all(axis=1).argmax()) for question in few]
    assert len(set(rows)) == 6 and rows == sorted(rows)
    np.testing.assert_array_equal(few, train.questions[rows])


def test_a_part_of_one_file_is_held_out(tmp_path: Path) -> None:
    every = some(30)
    path = write_csv(tmp_path / "all.csv", joined(every, turned(every, 3)))
    assert command("--output-dir", tmp_path / "out", "--source", path, "--test-size", 0.2) == 0
    train, test = (PuzzleDataset(tmp_path / "out", split).sets["all"].inputs for split in ("train", "test"))
    assert (len(train), len(test)) == (24, 6)
    assert {row.tobytes() for row in (*train, *test)} == {row.tobytes() for row in every.questions}


def test_files_that_do_not_make_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = some(3)

    def refused(train: Mazes, test: Mazes) -> str:
        write_csv(tmp_path / "train.csv", train)
        write_csv(tmp_path / "test.csv", test)
        assert command("--output-dir", tmp_path / "out", "--source", tmp_path) == 2
        return capsys.readouterr().err

    assert "train.csv: every maze is also in the test file" in refused(every, turned(every, 2))
    assert "train.csv: mazes of 7 x 7 cells, but 9 x 9 in" in refused(some(3, 7), every)
    one = write_csv(
        tmp_path / "one.csv", joined(every.take(np.array([0])), turned(every.take(np.array([0])), 1))
    )
    assert command("--output-dir", tmp_path / "out", "--source", one) == 2
    assert "one.csv: 1 maze, expected 2 or more to hold out a test" in capsys.readouterr().err
    assert command("--output-dir", tmp_path / "out", "--source", one, "--test-size", 1) == 2
    assert "test_size=1: expected a part of the mazes, between 0 and 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not HRM_REPO, reason="HRM_REPO does not name a copy of the official code")
def test_files_give_the_arrays_of_the_official_builder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = some(12)
    (tmp_path / "in").mkdir()
    write_csv(tmp_path / "in" / "train.csv", every.take(np.arange(8)))
    write_csv(tmp_path / "in" / "test.csv", every.take(np.arange(8, 12)))

    class Parser:
        def command(self, **_: Any) -> Any:
            return lambda function: function

    stubs: dict[str, dict[str, Any]] = {
        "argdantic": {"ArgParser": Parser},
        "huggingface_hub": {"hf_hub_download": lambda _, name, repo_type: str(tmp_path / "in" / name)},
    }
    for name, members in stubs.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(Path(str(HRM_REPO)) / "dataset"))
    monkeypatch.delitem(sys.modules, "common", raising=False)
    official = importlib.import_module("build_maze_dataset")
    official.preprocess_data(official.DataProcessConfig(output_dir=str(tmp_path / "theirs"), aug=True))
    assert command("--output-dir", tmp_path / "ours", "--source", tmp_path / "in", "--num-aug", 7) == 0
    for split in ("train", "test"):
        ours, theirs = (PuzzleDataset(tmp_path / name, split) for name in ("ours", "theirs"))
        assert ours.metadata == theirs.metadata
        for array, values in vars(ours.sets["all"]).items():
            np.testing.assert_array_equal(values, getattr(theirs.sets["all"], array), err_msg=array)
    for name in ("build_maze_dataset", "common"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_maze_of_a_file_is_one_that_can_be_read_back(tmp_path: Path) -> None:
    mazes = some(3)
    kind = Kind("maze", 9, 9)
    with write_csv(tmp_path / "mazes.csv", mazes).open() as file:
        for row, answer in zip(csv.DictReader(file), mazes.answers, strict=True):
            np.testing.assert_array_equal(kind.parse(row["answer"]), answer)
