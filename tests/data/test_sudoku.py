"""Sudoku: the solver against brute force, puzzles and symmetries that keep the rules, files and faults."""

import itertools
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrm.common.threads import usable_cpus
from hrm.data.__main__ import main
from hrm.data.dataset import PuzzleDataset
from hrm.data.format import read_difficulty
from hrm.data.inspect.histogram import shares
from hrm.data.sudoku import build as sudoku
from hrm.data.sudoku import files as sudoku_files
from hrm.data.sudoku.build import builtin_sudoku, generate, write_sudoku
from hrm.data.sudoku.files import Puzzles, hold_out, read_puzzles
from hrm.data.sudoku.solver import BOXES, SudokuError, random_grid, random_puzzle, solutions
from hrm.data.workers import SHARE, over_rows
from tests.support.paths import ROOT
from tests.support.puzzle_sets import digest


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def is_solved(grid: np.ndarray) -> bool:
    """Every row, column and box holds every digit once; written out apart from the solver's tables."""
    size = int(len(grid) ** 0.5)
    height, width = BOXES[size]
    square = grid.reshape(size, size)
    boxes = square.reshape(size // height, height, size // width, width).swapaxes(1, 2).reshape(size, size)
    digits = list(range(1, size + 1))
    return all(sorted(unit) == digits for unit in (*square.tolist(), *square.T.tolist(), *boxes.tolist()))


def all_4x4() -> set[bytes]:
    rows = list(itertools.permutations(range(1, 5)))
    # Bands of two rows first: most products fail there.
    pairs = [
        np.array(pair, np.uint8)
        for pair in itertools.product(rows, repeat=2)
        if len({*pair[0][:2], *pair[1][:2]}) == 4 and len({*pair[0][2:], *pair[1][2:]}) == 4
    ]
    grids = (np.concatenate([a, b]).ravel() for a in pairs for b in pairs)
    return {grid.tobytes() for grid in grids if is_solved(grid)}


def as_text(grid: Iterable[int]) -> str:
    return "".join(map(str, grid))


def augment(*arguments: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """All the groups at once."""
    inputs, labels = zip(*sudoku.augment(*arguments, **options), strict=True)
    return np.concatenate(inputs), np.concatenate(labels)


# --- solver and generator


def test_the_solver_finds_exactly_the_solutions_there_are() -> None:
    every = all_4x4()
    found, _ = solutions(np.zeros(16, np.uint8), limit=1000)
    assert len(found) == len(every) == 288
    assert {grid.tobytes() for grid in found} == every
    grids = np.array([np.frombuffer(grid, np.uint8) for grid in sorted(every)])
    draw = rng()
    counts = set()
    for _ in range(300):
        # Clues of a random grid, one of them sometimes wrong, against a filter over all grids.
        question = np.where(draw.random(16) < draw.uniform(0.1, 0.5), grids[draw.integers(288)], 0).astype(
            np.uint8
        )
        question[draw.integers(16)] *= draw.integers(0, 2, dtype=np.uint8)
        if draw.random() < 0.3:
            question[draw.integers(16)] = draw.integers(1, 5)
        matches = grids[((question == 0) | (question == grids)).all(axis=1)]
        found, guesses = solutions(question, limit=1000)
        assert {grid.tobytes() for grid in found} == {grid.tobytes() for grid in matches}
        assert len(found) == len(matches)
        # Each guess chooses one of several ways; the leaves of that tree are at least the solutions.
        assert guesses >= len(found) - 1
        assert len(solutions(question)[0]) == min(2, len(matches))
        counts.add(min(3, len(matches)))
    assert counts == {0, 1, 2, 3}


@pytest.mark.parametrize("size", [4, 6, 9])
def test_random_grids_are_solved_and_differ(size: int) -> None:
    draw = rng()
    grids = [random_grid(size, draw) for _ in range(100)]
    assert all(is_solved(grid) for grid in grids)
    assert len({grid.tobytes() for grid in grids}) >= (75 if size == 4 else 100)
    # Every digit turns up in every cell.
    assert all(len(set(cell)) == size for cell in np.array(grids).T.tolist())


@pytest.mark.parametrize("size", [4, 6, 9])
def test_puzzles_are_proper_and_irreducible(size: int) -> None:
    draw = rng(1)
    for _ in range(5):
        answer = random_grid(size, draw)
        question = random_puzzle(answer, draw)
        found, _ = solutions(question)
        assert [grid.tobytes() for grid in found] == [answer.tobytes()]
        for cell in np.nonzero(question)[0]:
            fewer = question.copy()
            fewer[cell] = 0
            assert len(solutions(fewer)[0]) == 2
    clues = {4: 8, 6: 20, 9: 40}[size]
    question = random_puzzle(answer, draw, clues=clues)
    assert (question > 0).sum() == clues and len(solutions(question)[0]) == 1
    assert ((question == 0) | (question == answer)).all()


def test_difficulty_is_the_search_and_not_the_names_of_the_digits() -> None:
    draw = rng(2)
    ratings = []
    for _ in range(30):
        question = random_puzzle(random_grid(9, draw), draw)
        found, guesses = solutions(question)
        names = np.concatenate([[0], draw.permutation(9) + 1]).astype(np.uint8)
        renamed, again = solutions(names[question])
        assert again == guesses and (renamed[0] == names[found[0]]).all()
        ratings.append(guesses)
    assert min(ratings) == 0 and max(ratings) >= 3


def test_a_digit_without_a_cell_is_found_without_guessing() -> None:
    # Row 1 has no cell left for 1, though each of its blank cells has two candidates.
    grid = np.array([[0, 0, 0, 2], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], np.uint8)
    found, guesses = solutions(grid.ravel())
    assert len(found) == 0 and guesses == 0


def test_a_puzzle_of_two_solutions_and_one_guess() -> None:
    # Rows 1 and 2 of two boxes swap 1 and 2 freely; nothing else is open.
    grid = np.array([[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]], np.uint8)
    grid[[0, 2], :2] = 0
    found, guesses = solutions(grid.ravel())
    assert len(found) == 2 and guesses == 1
    assert all(is_solved(solution) for solution in found)


# --- generated sets


@pytest.mark.parametrize(("size", "train", "test", "aug"), [(4, 150, 40, 12), (6, 30, 20, 5), (9, 25, 15, 5)])
def test_a_data_set_satisfies_all_invariants(
    tmp_path: Path, size: int, train: int, test: int, aug: int
) -> None:
    write_sudoku(tmp_path / "d", *generate(size, train, test, seed=3), num_aug=aug, seed=3)
    splits = {split: PuzzleDataset(tmp_path / "d", split) for split in ("train", "test")}
    rows = {}
    for split, data in splits.items():
        part = data.sets["all"]
        groups = {"train": train, "test": test}[split]
        per_group = aug + 1 if split == "train" else 1
        meta = data.metadata
        assert (meta.vocab_size, meta.seq_len, meta.pad_id, meta.ignore_label_id) == (size + 2, size**2, 0, 0)
        assert (meta.num_puzzle_identifiers, meta.total_groups, meta.mean_puzzle_examples) == (1, groups, 1.0)
        assert part.inputs.dtype == part.labels.dtype == np.uint8
        assert part.group_indices.tolist() == list(range(0, groups * per_group + 1, per_group))
        assert part.puzzle_indices.tolist() == list(range(groups * per_group + 1))
        assert not part.puzzle_identifiers.any()
        difficulty = read_difficulty(data.folder, "all", len(part.inputs))
        assert difficulty is not None
        guesses = [solutions(row - np.uint8(1))[1] for row in part.inputs[::per_group]]
        assert difficulty.tolist() == [number for number in guesses for _ in range(per_group)]
        assert part.inputs.min() == 1 and part.labels.min() == 2 and part.labels.max() == size + 1
        for question, answer in zip(part.inputs - np.uint8(1), part.labels - np.uint8(1), strict=True):
            found, _ = solutions(question)
            assert len(found) == 1 and (found[0] == answer).all() and is_solved(answer)
        for group in range(groups):
            members = part.inputs[group * per_group : (group + 1) * per_group]
            assert len({row.tobytes() for row in members}) == len(members)
            assert len({int((row > 1).sum()) for row in members}) == 1
        originals = {row.tobytes() for row in part.inputs[::per_group]}
        assert len(originals) == groups
        rows[split] = {row.tobytes() for row in part.labels}
    assert rows["train"] and rows["test"] and not rows["train"] & rows["test"]


def test_augmentations_that_would_leak_are_redrawn_not_dropped() -> None:
    # Half of all 4x4 grids are the test: nearly every second symmetry of a puzzle is one of them.
    grids = solutions(np.zeros(16, np.uint8), 288)[0]
    train, test = grids[::2], grids[1::2]
    inputs, labels = augment(train, train, 20, test, seed=0)
    assert len(inputs) == len(labels) == 21 * 144
    held = {grid.tobytes() for grid in test}
    assert not {row.tobytes() for row in labels} & held
    # Without the test there is no such gap.
    free = augment(train, train, 20, test[:0], seed=0)[1]
    assert {row.tobytes() for row in free} & held


def test_a_group_with_few_symmetries_keeps_some_repetitions() -> None:
    # A solved grid as its own question: the symmetries of a 4x4 grid give 96 or 192 grids, not 301.
    grid = solutions(np.zeros(16, np.uint8), 1)[0]
    inputs, _ = augment(grid, grid, 300, grid[:0], seed=0)
    assert len(inputs) == 301 and len({row.tobytes() for row in inputs}) in (96, 192)
    # Another group may have the same puzzles.
    inputs, _ = augment(np.tile(grid, (2, 1)), np.tile(grid, (2, 1)), 40, grid[:0], seed=0)
    first, second = ({row.tobytes() for row in part} for part in (inputs[:41], inputs[41:]))
    assert len(first) == len(second) == 41 and len(first & second) > 1


def test_the_symmetries_are_all_of_the_group_and_nothing_else() -> None:
    # 4x4: 24 namings of the digits, 8 orders of rows, 8 of columns, 2 transpositions; none but the identity
    # leaves this puzzle as it is.
    answer = np.array([[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]], np.uint8).ravel()
    question = answer * np.array([1, 1, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1], np.uint8)
    count = 40_000
    questions, answers = sudoku._transform(
        np.tile(question, (count, 1)), np.tile(answer, (count, 1)), 4, rng()
    )
    assert len({row.tobytes() for row in questions}) == 24 * 8 * 8 * 2
    assert all(is_solved(np.frombuffer(row, np.uint8)) for row in {row.tobytes() for row in answers})
    # 6x6: no transposition, rows stay in bands of 2 and columns in stacks of 3.
    answer = random_grid(6, rng())
    answers = sudoku._transform(np.tile(answer, (2000, 1)), np.tile(answer, (2000, 1)), 6, rng())[1]
    assert all(is_solved(row) for row in answers)


def test_4x4_grids_are_divided_and_each_serves_in_turn() -> None:
    train, test = generate(4, num_train=600, num_test=100, seed=0)
    train_grids, counts = np.unique(train.answers, axis=0, return_counts=True)
    test_grids = np.unique(test.answers, axis=0)
    assert len(train_grids) + len(test_grids) == 288 and len(test_grids) == round(288 / 7)
    assert counts.min() >= 1 and counts.max() <= 4
    assert len({row.tobytes() for row in train.questions}) == 600


def test_a_spent_supply_repeats_puzzles_rather_than_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sudoku, "ATTEMPTS", 40)

    def two_grids(grid: np.ndarray, limit: int = 2) -> tuple[np.ndarray, int]:
        found, guesses = solutions(grid, limit)
        return found[:2], guesses

    # In a world of two grids the test has one, and 16 puzzles with one blank.
    monkeypatch.setattr(sudoku, "solutions", two_grids)
    _, test = generate(4, num_train=1, num_test=40, seed=0, clues=15)
    questions, counts = np.unique(test.questions, axis=0, return_counts=True)
    assert len(questions) == 16 and counts.sum() == 40 and counts.max() <= 4


def test_grids_are_new_for_every_puzzle(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [random_grid(6, rng(seed)) for seed in range(12)]
    monkeypatch.setattr(sudoku, "random_grid", lambda size, draw: few[draw.integers(12)])
    train, test = generate(6, num_train=6, num_test=6, seed=0)
    grids = [grid.tobytes() for grid in (*train.answers, *test.answers)]
    assert sorted(grids) == sorted(grid.tobytes() for grid in few)


def test_minimum_difficulty_is_met_or_refused() -> None:
    train, test = generate(9, num_train=6, num_test=4, seed=5, min_difficulty=4)
    for puzzles in (train, test):
        assert puzzles.difficulty.min() >= 4
        assert puzzles.difficulty.tolist() == [solutions(question)[1] for question in puzzles.questions]
    with pytest.raises(SudokuError, match=r"min_difficulty=50: none of \d+ random 4x4 puzzles"):
        generate(4, num_train=2, num_test=2, seed=0, min_difficulty=50)


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    def build(name: str, seed: int, size: int = 9) -> dict[str, str]:
        write_sudoku(tmp_path / name, *generate(size, 12, 8, seed), num_aug=3, seed=seed)
        return digest(tmp_path / name)

    first = build("a", 7)
    assert len(first) == 17
    # Whatever state other generators and threads are in.
    np.random.seed(123)
    with ThreadPoolExecutor(3) as pool:
        others = list(pool.map(lambda name: build(name, 7), "bcd"))
    assert others == [first] * 3
    changed = build("e", 8)
    assert [
        path for path in first if path.endswith(("inputs.npy", "labels.npy")) and first[path] == changed[path]
    ] == []


# --- the cache


def test_the_builtin_set_is_built_once_and_again_when_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HRM_CACHE", str(tmp_path))
    builds = []
    write = sudoku.write_sudoku

    def counted(*args: Any) -> None:
        builds.append(args)
        write(*args)

    monkeypatch.setattr(sudoku, "write_sudoku", counted)
    path = builtin_sudoku(4, 20, 10, 2, 0)
    before = digest(path)
    assert path.parent == tmp_path and len(builds) == 1
    assert builtin_sudoku(4, 20, 10, 2, 0) == path and len(builds) == 1
    others = {
        builtin_sudoku(*args)
        for args in ((4, 21, 10, 2, 0), (4, 20, 11, 2, 0), (4, 20, 10, 1, 0), (4, 20, 10, 2, 1))
    }
    assert len(others | {path}) == 5 and len(builds) == 5

    labels = path / "train/all__labels.npy"
    flipped = bytearray(labels.read_bytes())
    # Another digit, in range: only the fingerprint can tell.
    flipped[-1] = flipped[-2]
    flipped[-2] = 2 if flipped[-2] != 2 else 3
    for damage in (
        lambda: os.truncate(labels, 200),
        lambda: labels.write_bytes(flipped),
        lambda: (path / "test/dataset.json").unlink(),
        lambda: (path / "fingerprints.json").write_text("{"),
    ):
        damage()
        number = len(builds)
        assert builtin_sudoku(4, 20, 10, 2, 0) == path
        assert len(builds) == number + 1 and digest(path) == before
    assert not [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")]


# --- threads


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    """Not the solutions, the ratings and the bytes, nor which fault is told: the first in the file."""
    questions, answers = some_puzzles(9, 40)
    questions = sudoku._transform(np.tile(questions, (20, 1)), np.tile(answers, (20, 1)), 9, rng())[0]
    source = tmp_path / "puzzles.txt"
    lines = list(map(as_text, questions))
    source.write_text("\n".join(lines))
    command = ["sudoku", "--source", str(source), "--num-aug", "1", "--output-dir"]
    digests = []
    for workers in ("1", "2", "5"):
        assert main([*command, str(tmp_path / workers), "--workers", workers]) == 0
        digests.append(digest(tmp_path / workers))
    assert digests[0] == digests[1] == digests[2]
    # The search of the first fault takes longer than that of the second, in another share.
    lines[100], lines[700] = "1" + "." * 80, "12345678.........9" + "." * 63
    source.write_text("\n".join(lines))
    for threads in (1, 2, 5):
        with pytest.raises(SudokuError, match="line 101: the puzzle has several solutions"):
            read_puzzles(source, 9, workers=threads)


def test_shares_cover_all_rows_and_report_the_first_fault() -> None:
    seen = np.zeros(3 * SHARE + 7, int)
    broken = range(0)

    def work(part: slice) -> None:
        seen[part] += 1
        if part.stop > len(seen) or part.start // SHARE in broken:
            raise SudokuError(f"share {part.start // SHARE}")

    over_rows(work, len(seen), 3, "rows")
    over_rows(work, 0, 3, "no rows")
    assert (seen == 1).all() and usable_cpus() >= 1
    broken = range(1, 4)
    for _ in range(20):
        with pytest.raises(SudokuError, match="share 1"):
            over_rows(work, len(seen), 3, "rows")


# --- files


def some_puzzles(size: int, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = rng(seed)
    answers = np.array([random_grid(size, draw) for _ in range(count)])
    return np.array([random_puzzle(answer, draw) for answer in answers]), answers


def csv_file(path: Path, questions: np.ndarray, answers: np.ndarray, ratings: Iterable[int]) -> Path:
    lines = ["source,question,answer,rating"]
    for question, answer, rating in zip(questions, answers, ratings, strict=True):
        lines.append(f"made,{as_text(question).replace('0', '.')},{as_text(answer)},{rating}")
    path.parent.mkdir(exist_ok=True)
    path.write_text("\r\n".join(lines) + "\r\n")
    return path


def tokens(data: PuzzleDataset) -> tuple[np.ndarray, np.ndarray]:
    return np.array(data.sets["all"].inputs), np.array(data.sets["all"].labels)


def test_a_folder_of_csv_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = some_puzzles(9, 30, 1), some_puzzles(9, 9, 2)
    csv_file(tmp_path / "in/train.csv", *train, range(30))
    csv_file(tmp_path / "in/test.csv", *test, range(20, 29))
    options = ["sudoku", "--source", str(tmp_path / "in"), "--output-dir", str(tmp_path / "out")]
    assert main(options) == 0
    for split, (questions, answers) in (("train", train), ("test", test)):
        inputs, labels = tokens(PuzzleDataset(tmp_path / "out", split))
        np.testing.assert_array_equal(inputs, questions + 1)
        np.testing.assert_array_equal(labels, answers + 1)
    text = capsys.readouterr()
    assert "train: 30 examples of 30 puzzles" in text.out and "difficulty 20 to 28" in text.out
    assert "solving train.csv" in text.err

    assert main([*options, "--min-difficulty", "22", "--subsample-size", "5", "--num-aug", "3"]) == 0
    inputs, labels = tokens(PuzzleDataset(tmp_path / "out", "train"))
    originals = {as_text(row - 1) for row in inputs[::4]}
    assert len(inputs) == 20 and len(originals) == 5
    assert originals <= {as_text(row) for row in train[0][22:]}
    assert len(tokens(PuzzleDataset(tmp_path / "out", "test"))[0]) == 7


def test_training_puzzles_with_a_test_solution_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions, answers = some_puzzles(9, 10)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/train.txt").write_text("\n".join(map(as_text, questions)))
    csv_file(tmp_path / "in/test.csv", questions[3:5], answers[3:5], [0] * 2)
    assert main(["sudoku", "--source", str(tmp_path / "in"), "--output-dir", str(tmp_path / "out")]) == 0
    assert "left out of train: 2 with" in capsys.readouterr().out
    labels = tokens(PuzzleDataset(tmp_path / "out", "train"))[1]
    np.testing.assert_array_equal(labels, np.delete(answers, [3, 4], axis=0) + 1)


@pytest.mark.parametrize("kind", ["lines", "csv", "csv without answers"])
def test_a_single_file_is_solved_rated_and_held_out(tmp_path: Path, kind: str) -> None:
    questions, answers = some_puzzles(9, 20)
    # Two puzzles with one solution must not be divided.
    questions[7], answers[7] = random_puzzle(answers[8], rng(9)), answers[8]
    if kind == "csv":
        source = csv_file(tmp_path / "puzzles.csv", questions, answers, range(20))
    elif kind == "lines":
        source = tmp_path / "puzzles.txt"
        source.write_text("# a comment\n\n" + "\n".join(map(as_text, questions)) + "  \n")
    else:
        source = tmp_path / "puzzles.csv"
        source.write_text("question\n" + "\n".join(map(as_text, questions)) + "\n")
    read = read_puzzles(source, 9)
    np.testing.assert_array_equal(read.questions, questions)
    np.testing.assert_array_equal(read.answers, answers)
    guesses = [solutions(question)[1] for question in questions]
    assert read.difficulty.tolist() == (list(range(20)) if kind == "csv" else guesses)
    options = ["sudoku", "--source", str(source), "--output-dir", str(tmp_path / "out")]
    for share, least in ((None, 2), (0.4, 8)):
        assert main([*options, *([] if share is None else ["--test-size", str(share)])]) == 0
        parts = [tokens(PuzzleDataset(tmp_path / "out", split)) for split in ("train", "test")]
        assert least <= len(parts[1][0]) <= least + 1
        assert {as_text(row - 1) for part in parts for row in part[0]} == {as_text(row) for row in questions}
        grids = [{row.tobytes() for row in part[1]} for part in parts]
        assert not grids[0] & grids[1]


def test_holding_out_keeps_puzzles_of_one_grid_together() -> None:
    _, grids = some_puzzles(4, 6)
    answers = np.repeat(np.unique(grids, axis=0), 3, axis=0)
    puzzles = Puzzles(answers, answers, np.zeros(len(answers), np.int64))
    for seed in range(20):
        train, test = hold_out(puzzles, 0.3, rng(seed))
        assert not {row.tobytes() for row in train.answers} & {row.tobytes() for row in test.answers}
        assert len(train.answers) + len(test.answers) == len(answers) and len(test.answers) % 3 == 0
    with pytest.raises(SudokuError, match="test_size=1: expected a part"):
        hold_out(puzzles, 1, rng())
    with pytest.raises(SudokuError, match="1 solution grid, expected 2 grids or more"):
        hold_out(puzzles.take(np.arange(3)), 0.5, rng())


GOOD_ANSWER = "1234341221434321"
GOOD = "1..434.2.1434.21"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{'.' * 81},{GOOD_ANSWER},0", "question of 81 characters, expected 16 for size 4; give --size 9"),
        ("1..434.2.1434.2,1234341221434321,0", "question of 15 characters, expected 16 for size 4"),
        (f"{GOOD},12343412214343211,0", "answer of 17 characters, expected 16"),
        (
            f"1..x34.2.1434.21,{GOOD_ANSWER},0",
            r"character 'x' at place 4 of the question, expected '\.' or 0 to 4",
        ),
        (f"1..5{GOOD[4:]},{GOOD_ANSWER},0", "character '5' at place 4 of the question"),
        (f"1..é{GOOD[4:]},{GOOD_ANSWER},0", "character 'é' at place 4 of the question"),
        (f"1..1{GOOD[4:]},{GOOD_ANSWER},0", "a digit repeats in row 1 of the question"),
        (f"1.......1.......,{GOOD_ANSWER},0", "a digit repeats in column 1 of the question"),
        (f"1....1..........,{GOOD_ANSWER},0", "a digit repeats in box 1 of the question"),
        (f"{GOOD},1234341221434322,0", "a digit repeats in row 4 of the answer"),
        (f"{GOOD},{GOOD},0", "the answer does not solve the question"),
        (f"2...............,{GOOD_ANSWER},0", "the answer does not solve the question"),
        (f"{GOOD},{GOOD_ANSWER},hard", "rating 'hard', expected a whole number"),
        (f"{GOOD},{GOOD_ANSWER},-1", "rating '-1', expected a whole number from 0 to 2147483647"),
        (f"{GOOD},{GOOD_ANSWER},2147483648", "rating '2147483648', expected a whole number from 0"),
        (f"{GOOD},{GOOD_ANSWER}", "2 fields, expected 3"),
        (f"1...............,{GOOD_ANSWER},0", "the puzzle has several solutions"),
    ],
)
def test_bad_csv_lines_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    rows = ["question,answer,rating", f"{GOOD},{GOOD_ANSWER},3", f"{GOOD},{GOOD_ANSWER},4", line]
    (tmp_path / "train.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    answers = solutions(np.zeros(16, np.uint8), 5)[0][4:]
    csv_file(tmp_path / "test.csv", answers, answers, [0])
    options = ["sudoku", "--size", "4", "--source", str(tmp_path), "--output-dir", str(tmp_path / "out")]
    assert main(options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    assert re.search(rf"error: {tmp_path}/train\.csv: line 4: {message}", error), error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("12..............1", "line 3: question of 17 characters"),
        ("123....4........", "line 3: the puzzle has no solution"),
        ("1...............", "line 3: the puzzle has several solutions"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "puzzles.txt"
    path.write_text(f"# good, then one to test\n{GOOD}\n{line}\n")
    with pytest.raises(SudokuError, match=message):
        read_puzzles(path, 4)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "it holds no puzzle"),
        (
            "a.csv",
            "name,board\nx,y\n",
            "line 1: no column 'question' among 'name', 'board'; rename one: puzzles",
        ),
        ("a.csv", "question,answer\n", "it holds no puzzle"),
        ("a.txt", "# nothing\n", "it holds no puzzle"),
        ("a.txt", None, "cannot be read"),
        ("a.csv", None, "cannot be read"),
    ],
)
def test_useless_files_are_named(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SudokuError, match=message):
        read_puzzles(tmp_path / name, 4)


def test_repetitions_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, answers = some_puzzles(9, 12)
    repeated = [0, 1, 2, 1, 3, 2, 1, 4, 5, 6, 7]
    csv_file(tmp_path / "in/train.csv", questions[repeated], answers[repeated], range(11))
    # One as in training, another of a grid of training, one that is only there, twice.
    questions[1] = random_puzzle(answers[1], rng(5), 40)
    tested = [4, 1, 9, 9]
    csv_file(tmp_path / "in/test.csv", questions[tested], answers[tested], [3, 2, 0, 7])
    assert main(["sudoku", "--source", str(tmp_path / "in"), "--output-dir", str(tmp_path / "out")]) == 0
    data = {split: PuzzleDataset(tmp_path / "out", split) for split in ("train", "test")}
    np.testing.assert_array_equal(tokens(data["train"])[1], answers[[0, 2, 3, 5, 6, 7]] + 1)
    np.testing.assert_array_equal(tokens(data["test"])[0], questions[tested[:3]] + 1)
    for split, ratings in (("train", [0, 2, 4, 8, 9, 10]), ("test", [3, 2, 0])):
        stored = read_difficulty(data[split].folder, "all", len(ratings))
        assert stored is not None and stored.tolist() == ratings
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4:] == [
        "  0 of 3 test puzzles have a solution grid equivalent to a training one up to symmetry, 0 are "
        "equivalent to a training puzzle themselves",
        "  train.csv: left out 3 with the question of an earlier line",
        "  test.csv: left out 1 with the question of an earlier line",
        "  left out of train: 2 with the solution of a test puzzle, 1 of them the same puzzle",
    ]


def test_symmetric_puzzles_are_counted_or_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, answers = some_puzzles(9, 12)
    csv_file(tmp_path / "in/train.csv", questions, answers, range(12))
    moved = sudoku._transform(questions[[3, 8]], answers[[3, 8]], 9, rng())
    moved[0][1] = random_puzzle(moved[1][1], rng(1), 33)
    others = some_puzzles(9, 1, 7)
    test = [np.vstack(pair) for pair in zip(moved, others, strict=True)]
    csv_file(tmp_path / "in/test.csv", test[0], test[1], range(3))
    command = ["sudoku", "--source", str(tmp_path / "in"), "--output-dir", str(tmp_path / "out")]
    assert main(command) == 0
    assert len(tokens(PuzzleDataset(tmp_path / "out", "train"))[0]) == 12
    assert "  2 of 3 test puzzles have a solution grid" in (told := capsys.readouterr().out)
    assert "symmetry, 1 are equivalent to a training puzzle themselves" in told
    assert main([*command, "--drop-leaks", "--subsample-size", "10"]) == 0
    inputs, _ = tokens(PuzzleDataset(tmp_path / "out", "train"))
    kept = np.delete(questions, [3, 8], axis=0) + 1
    assert {row.tobytes() for row in inputs} == {row.tobytes() for row in kept}
    told = capsys.readouterr().out
    assert "left out of train: 2 with a solution equivalent to that of a test puzzle" in told
    csv_file(tmp_path / "in/train.csv", questions[[3, 8]], answers[[3, 8]], range(2))
    assert main([*command, "--drop-leaks"]) == 2
    assert "every training puzzle has the solution of a test puzzle" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["lines", "csv"])
def test_improper_puzzles_are_left_out_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    questions, answers = some_puzzles(4, 30)
    bad = questions.copy()[:9]
    # Of several solutions, of none that a digit twice in a row tells, and of none that only the search tells.
    bad[0], bad[1] = 0, [4, 4, *[0] * 14]
    bad[2] = [1, 2, 3, 0, 0, 0, 0, 4, *[0] * 8]
    for row in range(3, 9):
        bad[row] = 0
        bad[row, row] = 1
    every = np.vstack([questions[:20], bad, questions[20:]])
    command = ["sudoku", "--size", "4", "--output-dir", str(tmp_path / "out"), "--source"]
    if kind == "csv":
        solved = np.vstack([answers[:20], answers[:9], answers[20:]])
        for row in (20, *range(22, 29)):
            full = solutions(every[row])[0]
            solved[row] = full[0] if len(full) else solved[row]
        # The answer of a puzzle without a solution cannot be one; such a line is a wrong answer.
        every[22] = [2, 2, *[0] * 14]
        source = csv_file(tmp_path / "puzzles.csv", every, solved, range(len(every)))
    else:
        source = tmp_path / "puzzles.txt"
        source.write_text("\n".join(["# header", *map(as_text, every)]))
    assert main([*command, str(source)]) == 2
    assert "line 23: a digit repeats in row 1 of the question" in capsys.readouterr().err.splitlines()[-1]
    read = read_puzzles(source, 4, skip_improper=True)
    first = np.sort(np.unique(np.vstack([questions[:20], questions[20:]]), axis=0, return_index=True)[1])
    np.testing.assert_array_equal(read.questions, questions[first])
    np.testing.assert_array_equal(read.answers, answers[first])
    assert main([*command, str(source), "--skip-improper"]) == 0
    assert (
        f"  {source.name}: left out 9 improper, 2 with no solution and 7 with several: lines 22, 23, 24, 25, "
        "26 and 4 more"
    ) in capsys.readouterr().out.splitlines()
    source.write_text("question\n" * (kind == "csv") + "1" + "." * 15)
    with pytest.raises(SudokuError, match="no puzzle has exactly one solution"):
        read_puzzles(source, 4, skip_improper=True)


def test_long_lines_and_open_quotes_do_not_swallow_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for name in ("a.csv", "a.txt"):
        path = tmp_path / name
        path.write_text(f"question\n{GOOD}\n" + "1" * (1 << 20))
        if name == "a.txt":
            path.write_text(f"#\n{GOOD}\n" + "1" * (1 << 20))
        with pytest.raises(SudokuError, match="line 3: longer than 4096 characters"):
            read_puzzles(path, 4)
    path = tmp_path / "a.csv"
    # A field of two lines.
    path.write_text(f'source,question\n"a,{GOOD}\nb",{GOOD}\n')
    assert len(read_puzzles(path, 4).questions) == 1


@pytest.mark.parametrize(("repeats", "share"), [(0, 1.5), (1, 2.0)])
def test_reading_takes_twice_the_puzzles_and_not_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repeats: int, share: float
) -> None:
    monkeypatch.setattr(sudoku_files, "CHUNK_LINES", 500)
    questions, answers = some_puzzles(9, 4)
    rows = 30_000
    path = tmp_path / "a.csv"
    line = f",{as_text(questions[0])[27:]},{as_text(answers[0])},1\n"
    digits = np.array(list(as_text(questions[0])[:27]))
    given = np.nonzero(digits != "0")[0]
    with path.open("w") as file:
        file.write("source,question,answer,rating\n")
        for row in range(rows):
            # No two questions alike: clues taken away as the bits of the number say.
            start = digits.copy()
            start[given[[place for place in range(len(given)) if row >> place & 1]]] = "0"
            file.write("made" + line[:1] + "".join(start) + line[1:])
        # One again: what is left out takes a copy of the rest.
        file.write(("made" + line[:1] + "".join(start) + line[1:]) * repeats)
    tracemalloc.start()
    try:
        read = read_puzzles(path, 9, min_difficulty=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    kept = len(read.questions)
    assert kept == min(rows, 2 ** len(given)) and peak < (share * 174 + 10) * rows + 2_000_000


def test_an_unreachable_difficulty_reports_the_hardest(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"question,answer,rating\n{GOOD},{GOOD_ANSWER},6\n")
    assert len(read_puzzles(path, 4, min_difficulty=6).lines or []) == 1
    with pytest.raises(SudokuError, match="no puzzle of difficulty 7 or more, the hardest has 6"):
        read_puzzles(path, 4, min_difficulty=7)


# --- the command


@pytest.mark.slow
def test_the_command_generates_and_sums_up(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "hrm.data",
        "sudoku",
        "--output-dir",
        str(tmp_path / "out"),
        "--size",
        "6",
    ]
    command += ["--num-train", "12", "--num-test", "5", "--num-aug", "2", "--seed", "4", "--clues", "14"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    head, train, test, *bars = done.stdout.splitlines()
    assert head == f"{tmp_path / 'out'}: 6x6 Sudoku, seed 4"
    assert train.startswith("  train: 36 examples of 12 puzzles, clues 14 to ")
    assert test.startswith("  test: 5 examples of 5 puzzles, clues 14 to ")
    assert bars[0].split() == ["difficulty", "train", "test"] and "symmetry" not in done.stdout
    assert len(tokens(PuzzleDataset(tmp_path / "out", "train"))[0]) == 36
    (tmp_path / "out/mine.txt").write_text("mine")
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == (
        f"error: {tmp_path / 'out'}: exists and is not a data set to replace; choose another folder\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-train", "0"], "num_train=0: expected at least 1"),
        (["--num-aug", "-1"], "num_aug=-1: expected at least 0"),
        (["--seed", "-1"], "seed=-1: expected at least 0"),
        (["--subsample-size", "0"], "subsample_size=0: expected at least 1"),
        (["--workers", "0"], "workers=0: expected at least 1"),
        (["--skip-improper"], "--skip-improper has no meaning for --source generated"),
        (["--drop-leaks", "--size", "6"], "--drop-leaks has no meaning for --size 6"),
        (["--test-size", "0.2"], "--test-size has no meaning for --source generated"),
        (["--clues", "81"], r"clues=81: expected 0 \(as few as possible\) to 80"),
        (["--source", "nowhere", "--clues", "0"], "--clues has no meaning for --source nowhere"),
        (["--source", "nowhere", "--num-train", "3"], "--num-train has no meaning for --source nowhere"),
        (["--source", "nowhere"], "nowhere: cannot be read"),
    ],
)
def test_the_command_refuses_nonsense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["sudoku", "--output-dir", str(tmp_path / "out"), *options]) == 2
    assert re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_the_bars_show_the_share_of_each_bucket() -> None:
    train, test = np.array([1, 2, 3, 4, 15, 16, 20, 70]), np.array([255, 256])
    assert list(shares({"train": train, "test": test})) == [
        "  difficulty  train                            test",
        "         1-3   37.5% #########                   0.0%",
        "        4-15   25.0% ######                      0.0%",
        "       16-63   25.0% ######                      0.0%",
        "      64-255   12.5% ###                        50.0% ############",
        "    256-1023    0.0%                            50.0% ############",
    ]
    assert list(shares({"test": np.zeros(3, np.int32)}))[1:] == [f"           0  100.0% {'#' * 24}"]


# --- real puzzles

PUZZLES = Path(os.environ.get("HRM_PUZZLES", ""))


@pytest.mark.skipif(not (PUZZLES / "sudoku").is_dir(), reason="HRM_PUZZLES names no folder with sudoku/")
def test_real_puzzles_are_proper() -> None:
    """Every puzzle of every file has one solution, which keeps its clues and the rules."""
    files = sorted((PUZZLES / "sudoku").glob("*.txt"))
    assert files
    for path in files:
        read = read_puzzles(path, 9, workers=2)
        lines = [line.replace(".", "0") for line in path.read_text().split()]
        assert [as_text(question) for question in read.questions] == list(dict.fromkeys(lines))
        assert all(map(is_solved, read.answers))
        assert ((read.questions == 0) | (read.questions == read.answers)).all()
