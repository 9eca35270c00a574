"""ARC data sets: canvases, symmetries and their names, what trains and what tests, bytes, the command."""

import argparse
import filecmp
import json
import os
import signal
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrm.common.errors import run_command
from hrm.data.__main__ import main
from hrm.data.arc import build as arc
from hrm.data.arc.augment import (
    INVERSE_TURNS,
    TURNS,
    Augmentations,
    Pair,
    canvas,
    draw,
    grid_of,
    inverse,
    task_of,
    token_arrays,
)
from hrm.data.arc.files import read_source
from hrm.data.dataset import PuzzleDataset
from hrm.data.format import DatasetError, read_difficulty
from tests.support.arc_tasks import held_pairs, key, random_task, write_kaggle, write_tasks


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def grid(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.uint8)


def build(*words: str) -> int:
    parser = argparse.ArgumentParser()
    arc.add_arguments(parser)
    args = parser.parse_args(words)
    return run_command(lambda: args.run(args), "the data set is not finished")


def make(folder: Path, *sources: str | Path, num_aug: int = 0, seed: int = 0, workers: int = 1) -> Path:
    words = ["--num-aug", str(num_aug), "--seed", str(seed), "--workers", str(workers)]
    assert build("--output-dir", str(folder), "--source", *map(str, sources), *words) == 0
    return folder


# Grids of every size that a canvas treats in its own way: one cell, lines, all of it.
SHAPES = [(1, 1), (1, 30), (30, 1), (30, 30), (29, 30), (7, 4)]


def test_a_canvas_by_hand() -> None:
    board = canvas(grid([3, 0, 9], [1, 1, 1]), 1, 2).reshape(30, 30)
    expected = np.zeros((30, 30), int)
    expected[1:4, 2:6] = [[5, 2, 11, 1], [3, 3, 3, 1], [1, 1, 1, 0], [0, 0, 0, 0]][:3]
    np.testing.assert_array_equal(board, expected)
    assert board.dtype == np.uint8
    # At the edges the end lines fall off.
    assert (canvas(np.full((30, 30), 9, np.uint8)) == 11).all()
    corner = canvas(grid([0]), 29, 29)
    assert corner[-1] == 2 and not corner[:-1].any()
    low = canvas(grid([0]), 29, 28).reshape(30, 30)
    assert low[29, 28:].tolist() == [2, 1] and not low[:29].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_canvas_gives_its_grid_back(shape: tuple[int, int]) -> None:
    one = rng().integers(10, size=shape, dtype=np.uint8)
    found = grid_of(canvas(one))
    assert found is not None and found.dtype == np.uint8
    np.testing.assert_array_equal(found, one)


def by_hand(board: list[list[int]]) -> np.ndarray | None:
    """The largest rectangle of colours from the corner on: all of them tried, fewest rows first."""
    best = None
    for rows in range(1, 31):
        for cols in range(1, 31):
            cut = np.array(board)[:rows, :cols]
            if ((cut >= 2) & (cut <= 11)).all() and (best is None or cut.size > best.size):
                best = cut - 2
    return best


def test_the_grid_of_a_damaged_canvas_is_the_largest_rectangle() -> None:
    draw_from = rng(1)
    for _ in range(20):
        board = draw_from.integers(2, 12, size=(30, 30))
        # Few enough that rectangles of many shapes remain.
        holes = draw_from.integers(0, 30, size=(draw_from.integers(1, 12), 2))
        board[tuple(holes.T)] = draw_from.choice([0, 1, 12, 200], len(holes))
        expected, found = by_hand(board.tolist()), grid_of(board.ravel())
        assert (found is None) == (expected is None)
        if expected is not None:
            np.testing.assert_array_equal(found, expected)
    # Of equally large ones the flattest: one row of two rather than two rows of one.
    board = np.zeros((30, 30), int)
    board[0, :2] = board[:2, 0] = 5
    flattest = grid_of(board.ravel())
    assert flattest is not None and flattest.shape == (1, 2)
    assert grid_of(np.zeros(900, int)) is None
    assert grid_of(canvas(grid([1]), 0, 1)) is None


def test_turns_are_the_eight_symmetries_in_the_official_order() -> None:
    letters = [["a", "b", "c"], ["d", "e", "f"]]
    turned = ["".join(map("".join, turn(np.array(letters)).tolist())) for turn in TURNS]
    # Rotations against the clock, mirrored left to right, upside down, and at both diagonals.
    assert turned == ["abcdef", "cfbead", "fedcba", "daebfc", "cbafed", "defabc", "adbecf", "fcebda"]
    for number, back in enumerate(INVERSE_TURNS):
        np.testing.assert_array_equal(TURNS[back](TURNS[number](np.array(letters))), letters)


@pytest.mark.parametrize("form", ["{}_t{}_{}", "{}|||t{}|||{}"])
@pytest.mark.parametrize("task", ["007bbfb7", "a_b", "x_t1_y", "Center1"])
def test_names_map_back(form: str, task: str) -> None:
    one = rng(2).integers(10, size=(3, 5), dtype=np.uint8)
    for turn in range(8):
        colours = np.concatenate([[0], rng(turn).permutation(9) + 1]).astype(np.uint8)
        name = form.format(task, turn, "".join(map(str, colours)))
        assert task_of(name) == task
        np.testing.assert_array_equal(inverse(name)(TURNS[turn](colours[one])), one)


@pytest.mark.parametrize(
    "name", ["t1_0123456789", "a_t8_0123456789", "a_t1_1023456789", "a_t1|||0123456789", "a"]
)
def test_other_names_are_those_of_tasks(name: str) -> None:
    assert task_of(name) == name
    np.testing.assert_array_equal(inverse(name)(grid([4, 5])), [[4, 5]])


def test_a_name_without_a_permutation_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"'a_t1_0113456789': 0113456789 holds a colour twice"):
        inverse("a_t1_0113456789")


# Tasks whose symmetries coincide in different ways: by shape, by colours, by exchanged pairs or sides.
COINCIDENT = {
    "one cell": [([[1]], [[1]])],
    "black": [([[0]], [[0]])],
    "sides exchanged": [([[1]], [[2]])],
    "pairs exchanged by a mirror": [([[1, 0]], [[1]]), ([[0, 1]], [[1]])],
    "pairs exchanged by colours": [([[1]], [[2]]), ([[3]], [[4]])],
    "the same pair twice": [([[1, 2]], [[3]]), ([[1, 2]], [[3]])],
    "shapes alone": [([[0, 0, 0]], [[0], [0]])],
    "two colours": [([[1, 2, 0], [0, 0, 1]], [[2, 2], [0, 1]])],
}


@pytest.mark.parametrize("pairs", COINCIDENT.values(), ids=COINCIDENT)
def test_augmentations_are_all_that_differ(pairs: Any) -> None:
    def as_value(turn: int, colours: Any) -> Any:
        made = [key(tuple(TURNS[turn](colours[np.array(side)]) for side in pair)) for pair in pairs]
        return tuple(sorted(made))

    used = sorted({cell for pair in pairs for side in pair for row in side for cell in row} - {0})
    images = set()
    for turn in range(8):
        for new in permutations(range(1, 10), len(used)):
            colours = np.arange(10)
            colours[used] = new
            images.add(as_value(turn, colours))
    task = [Pair(*(np.array(side, np.uint8) for side in pair)) for pair in pairs]
    made = draw(task, 4000, rng())
    drawn = [as_value(turn, colours) for turn, colours in zip(made.turns, made.colours, strict=True)]
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) == images
    # The task itself comes first, unchanged.
    assert made.turns[0] == 0 and made.colours[0].tolist() == list(range(10))


def test_no_more_augmentations_than_asked_for() -> None:
    task = [Pair(rng(1).integers(10, size=(4, 3), dtype=np.uint8), grid([1]))]
    made = draw(task, 50, rng())
    assert len(made.turns) == 51
    assert made.names("x")[0] == "x" and len(set(made.names("x"))) == 51
    # Every turn and every new colour turns up; black stays.
    many = draw(task, 1000, rng())
    assert Counter(many.turns.tolist()).keys() == set(range(8))
    assert (np.sort(many.colours, axis=1) == np.arange(10)).all() and not many.colours[:, 0].any()
    assert all(len(set(column)) == 9 for column in many.colours[:, 1:].T.tolist())


def test_places_are_uniform_and_one_pair_stays() -> None:
    task = [Pair(np.ones((28, 3), np.uint8), np.ones((2, 29), np.uint8)), *[Pair(grid([1]), grid([2]))] * 2]
    made = Augmentations(rng().integers(8, size=2000), np.tile(np.arange(10, dtype=np.uint8), (2000, 1)))
    inputs, _ = token_arrays(task, made, rng(1))
    boards = inputs.reshape(len(made.turns), 3, 30, 30) >= 2
    tops, lefts = boards.any(axis=3).argmax(axis=2), boards.any(axis=2).argmax(axis=2)
    still = (tops == 0) & (lefts == 0)
    assert still.any(axis=1).all()
    # The pair that stays is chosen evenly: each a third of the time, and rarely by chance besides.
    small = still[:, 1:].mean(axis=0)
    assert (abs(small - 1 / 3) < 0.04).all()
    # Sides of 28 and 29 leave room for places 0 to 2 and 0 to 1, exchanged by half of the turns.
    swapped = np.isin(made.turns, [1, 3, 6, 7])
    high, wide = np.where(swapped, lefts[:, 0], tops[:, 0]), np.where(swapped, tops[:, 0], lefts[:, 0])
    assert set(high.tolist()) == {0, 1, 2} and set(wide.tolist()) == {0, 1}
    moved = tops[:, 1][~still[:, 1]]
    assert set(moved.tolist()) == set(range(30))
    counts = np.bincount(moved, minlength=30)
    assert (abs(counts - counts.mean()) < 5 * counts.mean() ** 0.5).all()


def tasks(first: int, count: int, test: int = 1, largest: int = 30) -> dict[str, Any]:
    return {f"task{n}": random_task(n, 2 + n % 3, test, largest) for n in range(first, first + count)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arc") / "data"
    write_tasks(folder / "training", tasks(0, 5))
    write_tasks(folder / "evaluation", tasks(5, 4, test=2))
    return folder


def check_data_set(folder: Path, *sources: str | Path) -> int:
    """Every puzzle of the data set is, mapped back, its task, and every pair is where it belongs."""
    checked = 0
    known = {task.name: task for source in sources for task in read_source(str(source))}
    train = held_pairs(folder, "train")
    test = held_pairs(folder, "test") if any(task.evaluation for task in known.values()) else {}
    assert {task_of(name) for name in train} == known.keys()
    assert {name for name in train if known[task_of(name)].evaluation} == test.keys()
    for split, puzzles in (("train", train), ("test", test)):
        for name, found in puzzles.items():
            task = known[task_of(name)]
            pairs = task.pairs if not task.evaluation else getattr(task, split)
            back = inverse(name)
            assert [key(tuple(map(back, grids))) for grids, _ in found] == [key(pair.grids) for pair in pairs]
            places = [place for _, place in found]
            assert (0, 0) in places
            assert split == "train" or set(places) == {(0, 0)}
            checked += len(found)
    # The originals are there, and no puzzle of a task is there twice.
    assert known.keys() <= train.keys()
    for one in known.values():
        made = [
            tuple(sorted(key(grids) for grids, _ in f)) for n, f in train.items() if task_of(n) == one.name
        ]
        assert len(set(made)) == len(made) or one.evaluation
    return checked


def test_a_data_set_is_its_tasks_mapped(source: Path, tmp_path: Path) -> None:
    folder = make(tmp_path / "out", source, num_aug=6)
    # 7 puzzles of each: 2, 3, 4, 2, 3 demonstrations and a test; 4, 2, 3, 4 demonstrations, 2 tests each.
    assert check_data_set(folder, source) == 7 * (14 + 5 + 13 + 8)
    train, test = PuzzleDataset(folder, "train"), PuzzleDataset(folder, "test")
    assert (train.metadata.seq_len, train.metadata.vocab_size) == (900, 12)
    assert (train.metadata.pad_id, train.metadata.ignore_label_id) == (0, 0)
    assert train.metadata.blank_identifier_id == 0 and train.metadata.sets == ["all"]
    assert train.metadata.num_puzzle_identifiers == test.metadata.num_puzzle_identifiers == 64
    assert train.sets["all"].group_indices.tolist() == list(range(0, 64, 7))
    assert test.sets["all"].group_indices.tolist() == list(range(0, 29, 7))
    for dataset in (train, test):
        part = dataset.sets["all"]
        cells = (np.asarray(part.labels) >= 2).sum(axis=1)
        np.testing.assert_array_equal(read_difficulty(dataset.folder, "all", len(part.inputs)), cells)
    puzzles = json.loads((folder / "test_puzzles.json").read_text())
    assert puzzles == tasks(5, 4, test=2)


def test_real_tasks_map_back(tmp_path: Path) -> None:
    if not (real := os.environ.get("HRM_PUZZLES")):
        pytest.skip("HRM_PUZZLES does not name a folder of puzzles")
    sources = [f"{real}/arc-agi", f"{real}/conceptarc", f"{real}/kaggle-arc/arc-agi_training"]
    folder = make(tmp_path / "out", *sources, num_aug=12)
    assert check_data_set(folder, *sources) > 108 * 13 * 3


def assert_same_bytes(one: Path, other: Path) -> None:
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    assert filecmp.cmpfiles(one, other, files, shallow=False)[1:] == ([], [])


def test_bytes_do_not_depend_on_workers_or_the_form_of_the_source(source: Path, tmp_path: Path) -> None:
    one = make(tmp_path / "one", source, num_aug=9)
    assert_same_bytes(one, make(tmp_path / "three", source, num_aug=9, workers=3))
    kaggle = [
        write_kaggle(tmp_path / "kaggle", "arc-agi_evaluation", tasks(5, 4, test=2)),
        write_kaggle(tmp_path / "kaggle", "arc-agi_training", tasks(0, 5)),
    ]
    assert_same_bytes(one, make(tmp_path / "kaggle-out", *kaggle, num_aug=9))
    flat = make(tmp_path / "flat", source / "evaluation", source / "training", num_aug=9)
    assert_same_bytes(one, flat)
    other = make(tmp_path / "seed", source, num_aug=9, seed=1)
    assert json.loads((one / "identifiers.json").read_text()) != json.loads(
        (other / "identifiers.json").read_text()
    )


def test_a_task_does_not_depend_on_other_tasks(source: Path, tmp_path: Path) -> None:
    whole = held_pairs(make(tmp_path / "whole", source, num_aug=4), "train")
    alone = write_tasks(tmp_path / "evaluation", {"task6": random_task(6, 2, 2)})
    part = held_pairs(make(tmp_path / "part", alone, num_aug=4), "train")
    assert len(part) == 5
    for name, found in part.items():
        assert [(key(grids), place) for grids, place in found] == [
            (key(grids), place) for grids, place in whole[name]
        ]


def test_repetitions_are_left_out_and_the_test_stays_unseen(tmp_path: Path, capsys: Any) -> None:
    shared, other = random_task(1, 3, 1, 5), random_task(2, 2, 1, 5)
    swapped = {"test": shared["test"], "train": shared["train"][::-1]}
    write_tasks(tmp_path / "a" / "training", {"shared": shared, "other": other})
    write_tasks(tmp_path / "b" / "evaluation", {"renamed": swapped})
    write_tasks(tmp_path / "c", {"other": other})
    folder = make(tmp_path / "out", tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert set(held_pairs(folder, "train")) == {"renamed", "other"}
    assert [key(pair) for pair, _ in held_pairs(folder, "test")["renamed"]] == [key(shared["test"][0])]
    assert len(held_pairs(folder, "train")["renamed"]) == 3
    printed = capsys.readouterr().out
    assert "a: 2 training and 0 evaluation tasks" in printed and "c: 1 training and 0 eval" in printed
    assert "left out, equal to another task: 2: shared, other" in printed
    assert "equal to a training task" not in printed


def test_different_tasks_of_one_name_are_refused(tmp_path: Path, capsys: Any) -> None:
    write_tasks(tmp_path / "a", {"same": random_task(1, largest=5)})
    write_tasks(tmp_path / "b", {"same": random_task(2, largest=5)})
    words = ["--source", str(tmp_path / "a"), str(tmp_path / "b"), "--output-dir", str(tmp_path / "out")]
    assert build(*words) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'b' / 'same.json'}: another task has the same name same" in error
    assert str(tmp_path / "a" / "same.json") in error
    assert not (tmp_path / "out").exists()


def test_tasks_of_the_same_cells_and_other_shapes_differ(tmp_path: Path) -> None:
    for name, one in (("wide", [[1, 2]]), ("high", [[1], [2]])):
        pair = {"input": one, "output": [[3]]}
        write_tasks(tmp_path / "source" / name, {name: {"train": [pair], "test": [pair]}})
    kept, left_out = arc.distinct(read_source(str(tmp_path / "source")))
    assert [task.name for task in kept] == ["high", "wide"] and not left_out


def test_leaks_are_reported(tmp_path: Path, capsys: Any) -> None:
    def turned(task: Any, turn: int, colours: Any) -> Any:
        def mapped(side: Any) -> Any:
            return TURNS[turn](np.array(colours)[np.array(side)]).tolist()

        return {
            role: [{side: mapped(one) for side, one in pair.items()} for pair in pairs]
            for role, pairs in task.items()
        }

    originals = [random_task(seed, 2, 1, 6) for seed in range(3)]
    write_tasks(tmp_path / "training", {f"one{n}": task for n, task in enumerate(originals)})
    # Black exchanged with a colour makes another task, and so does turning answers alone, or one pair alone.
    black = [1, 0, *range(2, 10)]
    answers = {
        role: [{**pair, "output": np.rot90(pair["output"]).tolist()} for pair in pairs]
        for role, pairs in originals[2].items()
    }
    held = {
        "leak": turned(originals[0], 7, [0, 3, 1, 2, 9, 8, 7, 6, 5, 4]),
        "black": turned(originals[1], 0, black),
        "answers": answers,
        "pair": {**originals[2], "test": turned(originals[2], 1, range(10))["test"]},
    }
    write_tasks(tmp_path / "evaluation", held)
    make(tmp_path / "out", tmp_path / "training", tmp_path / "evaluation")
    printed = capsys.readouterr().out
    assert "evaluation tasks equal to a training task up to symmetry and colours: 1: leak (one0)" in printed


def test_tests_without_an_answer(tmp_path: Path, capsys: Any) -> None:
    hidden = tasks(0, 2, test=2)
    prefix = write_kaggle(tmp_path, "arc-agi_test", hidden, solutions=False)
    folder = make(tmp_path / "out", prefix, num_aug=3)
    assert "4 tests without an answer" in capsys.readouterr().out
    part = PuzzleDataset(folder, "test").sets["all"]
    assert part.inputs.shape == (16, 900) and not np.asarray(part.labels).any()
    expected = [canvas(np.array(pair["input"], np.uint8)) for pair in hidden["task0"]["test"]]
    np.testing.assert_array_equal(part.inputs[:2], expected)
    np.testing.assert_array_equal(read_difficulty(folder / "test", "all", 16), [0] * 16)
    puzzles = json.loads((folder / "test_puzzles.json").read_text())
    assert [pair.keys() for pair in puzzles["task1"]["test"]] == [{"input"}, {"input"}]


def test_the_summary_counts(source: Path, tmp_path: Path, capsys: Any) -> None:
    make(tmp_path / "out", source / "training", num_aug=2)
    printed = capsys.readouterr().out
    assert "train: 57 examples of 15 puzzles of 5 tasks" in printed
    assert "no test split: there are no evaluation tasks" in printed
    assert not (tmp_path / "out" / "test").exists()
    plain = {"train": [{"input": [[1]], "output": [[1]]}], "test": [{"input": [[1]], "output": [[0]]}]}
    write_tasks(tmp_path / "plain", {"plain": plain})
    make(tmp_path / "few", tmp_path / "plain", num_aug=100)
    assert "fewer than 100 different augmentations: 1: plain (8)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-aug", "-1"], "--num-aug -1: expected at least 0"),
        (["--seed", "-1"], "--seed -1: expected at least 0"),
        (["--workers", "0"], "--workers 0: expected at least 1"),
    ],
)
def test_options_out_of_range(
    source: Path, tmp_path: Path, capsys: Any, words: list[str], message: str
) -> None:
    assert build("--source", str(source), "--output-dir", str(tmp_path / "out"), *words) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_data_set_is_replaced_and_other_folders_are_not(source: Path, tmp_path: Path, capsys: Any) -> None:
    folder = make(tmp_path / "out", source)
    make(folder, source, num_aug=1)
    assert len(held_pairs(folder, "train")) == 18
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("")
    assert build("--source", str(source), "--output-dir", str(tmp_path / "own")) == 2
    assert "exists and is not a data set to replace" in capsys.readouterr().err


def test_a_build_that_a_scheduler_ends_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def ended(*_: Any, **__: Any) -> None:
        assert list((tmp_path / "out").iterdir())
        os.kill(os.getpid(), signal.SIGTERM)

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(arc, "build_group", ended)
    words = ["--source", str(source), "--output-dir", str(tmp_path / "out" / "data"), "--workers", "1"]
    assert main(["arc", *words]) == 143
    assert "interrupted: no unfinished data set is left" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_dying_process_is_reported() -> None:
    with pytest.raises(DatasetError, match="--workers 2: a process was killed"):
        list(arc._in_order(os._exit, [3], 2))


def test_results_come_in_order_and_few_wait() -> None:
    taken = []

    def items() -> Any:
        for number in range(20):
            taken.append(number)
            yield number

    results = arc._in_order(abs, items(), 2)
    assert next(results) == 0 and len(taken) == 5
    assert list(results) == list(range(1, 20))
