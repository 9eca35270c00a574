"""The tasks of a source that are built, and their names, splits and canvases."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrm.config.schema import Config
from hrm.data.__main__ import main
from hrm.data.dataset import PuzzleDataset
from hrm.training.data import TrainingData
from tests.support.arc_tasks import held_pairs, key, random_task, write_kaggle, write_tasks


def lines(width: int, seed: int) -> dict[str, Any]:
    """A task of grids of one row."""
    rng = np.random.default_rng(seed)
    pairs = [
        {side: [rng.integers(10, size=width).tolist()] for side in ("input", "output")} for _ in range(3)
    ]
    return {"train": pairs[:2], "test": pairs[2:]}


def build(folder: Path, *words: str) -> tuple[int, Path]:
    out = folder / "out"
    return main(["arc", "--output-dir", str(out), "--num-aug", "0", "--workers", "1", *words]), out


@pytest.fixture
def mixed(tmp_path: Path) -> list[str]:
    """Two sources: one name with other pairs in both, and two tasks wider than 30."""
    write_tasks(tmp_path / "a" / "training", {"same": lines(3, 0), "fine": lines(9, 1)})
    second = {"same": lines(3, 2), "wide": lines(31, 3), "wider": lines(34, 4)}
    # The widest grid is behind the first fault of its task.
    second["wide"]["test"][0]["output"] = [[0] * 36]
    write_tasks(tmp_path / "b" / "evaluation", second)
    return ["--source", str(tmp_path / "a"), str(tmp_path / "b")]


def test_all_faults_of_all_sources_are_one_error(mixed: list[str], tmp_path: Path, capsys: Any) -> None:
    assert build(tmp_path, *mixed)[0] == 2
    where = tmp_path / "b" / "evaluation"
    assert capsys.readouterr().err == (
        f"error: {where / 'wide.json'}: train pair 0, input, row 0: 31 cells, expected 1 to 30; "
        f"{where / 'wider.json'}: train pair 0, input, row 0: 34 cells, expected 1 to 30; "
        f"{tmp_path / 'a' / 'training' / 'same.json'}: another task has the same name same "
        f"({where / 'same.json'}); 3 bad in all, --skip-bad leaves them out, --canvas 36 or more makes room, "
        "--rename-duplicates makes names unique\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "train", "test", "told"),
    [
        # The evaluation task keeps its name, whatever comes first.
        (["--skip-bad"], ["fine", "same"], ["same"], "left out 3 bad:"),
        (
            ["--rename-duplicates", "--canvas", "36"],
            ["fine", "same", "same-2", "wide", "wider"],
            ["same", "wide", "wider"],
            "renamed: 1: same-2 (",
        ),
        (
            ["--skip-bad", "--rename-duplicates"],
            ["fine", "same", "same-2"],
            ["same"],
            "left out 2 bad:",
        ),
    ],
)
def test_invalid_tasks_are_skipped_or_get_a_larger_canvas(
    mixed: list[str],
    tmp_path: Path,
    capsys: Any,
    words: list[str],
    train: list[str],
    test: list[str],
    told: str,
) -> None:
    status, out = build(tmp_path, *mixed, *words)
    assert status == 0 and told in capsys.readouterr().out
    found = [held_pairs(out, split) for split in ("train", "test")]
    assert [sorted(puzzles) for puzzles in found] == [train, test]
    assert key(found[1]["same"][0][0]) == key(lines(3, 2)["test"][0])
    if "same-2" in train:
        assert key(found[0]["same-2"][2][0]) == key(lines(3, 0)["test"][0])


def test_only_faulty_tasks_are_no_data_set(tmp_path: Path, capsys: Any) -> None:
    write_tasks(tmp_path / "a", {"wide": lines(31, 0)})
    assert build(tmp_path, "--source", str(tmp_path / "a"), "--skip-bad")[0] == 2
    assert "no sound task in it; " in capsys.readouterr().err


@pytest.fixture
def two_years(tmp_path: Path) -> Path:
    for year in (1, 2):
        for number, part in enumerate(("training", "evaluation")):
            write_tasks(tmp_path / f"arc{year}" / part, {f"{part}{year}": lines(5, 10 * year + number)})
    write_kaggle(tmp_path, "arc_extra", {"extra": lines(5, 30)})
    return tmp_path


@pytest.mark.parametrize(
    ("chosen", "test"),
    [
        ([], ["evaluation1", "evaluation2"]),
        (["evaluation"], ["evaluation1", "evaluation2"]),
        (["{}/arc2/evaluation"], ["evaluation2"]),
        (["{}/arc2"], ["evaluation2", "training2"]),
        (["extra", "training"], ["extra", "training1", "training2"]),
    ],
)
def test_the_test_set_is_chosen_by_name_or_path(two_years: Path, chosen: list[str], test: list[str]) -> None:
    sources = [str(two_years / name) for name in ("arc1", "arc2", "arc_extra")]
    words = ["--test-set", *(each.format(two_years) for each in chosen)] if chosen else []
    status, out = build(two_years, "--source", *sources, *words)
    assert status == 0 and sorted(held_pairs(out, "test")) == test
    # A task that does not test trains with its test pair.
    assert {name: len(pairs) for name, pairs in held_pairs(out, "train").items()} == {
        name: 2 if name in test else 3
        for name in ("training1", "evaluation1", "training2", "evaluation2", "extra")
    }


def test_a_share_of_the_tasks_is_held_out_by_the_seed(tmp_path: Path) -> None:
    write_tasks(tmp_path / "corpus", {f"t{n}": lines(4, n) for n in range(10)})
    words = ["--source", str(tmp_path / "corpus"), "--holdout", "0.3"]
    held = []
    for seed in "001":
        status, out = build(tmp_path, *words, "--seed", seed)
        assert status == 0 and len(held_pairs(out, "train")) == 10
        held.append(sorted(held_pairs(out, "test")))
    assert held[0] == held[1] != held[2] and list(map(len, held)) == [3, 3, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--test-set", "evalution"],
            "--test-set evalution: no such folder or prefix among evaluation, extra, train",
        ),
        (["--holdout", "0.1"], "evaluation1.json is an evaluation task already; leave --holdout out"),
        (["--test-set", "extra", "--holdout", "1"], "--holdout 1: expected a part of the tasks, between 0"),
        (["--canvas", "129"], "--canvas 129: expected at most 128"),
    ],
)
def test_requests_without_an_answer(two_years: Path, capsys: Any, words: list[str], message: str) -> None:
    sources = [str(two_years / name) for name in ("arc1", "arc_extra")]
    assert build(two_years, "--source", *sources, *words)[0] == 2
    assert message in capsys.readouterr().err


def test_lists_of_pairs_with_a_description_file(tmp_path: Path, capsys: Any) -> None:
    pairs = [*lines(4, 0)["train"], *lines(4, 1)["train"], *lines(4, 2)["test"]]
    write_tasks(tmp_path / "re_arc" / "tasks", {"a": pairs, "b": pairs[::2]})
    (tmp_path / "re_arc" / "metadata.json").write_text(json.dumps({"a": {"runtime": 1.0}}))
    status, out = build(tmp_path, "--source", str(tmp_path / "re_arc"), "--test-set", "tasks")
    assert status == 0 and "metadata.json: not a task" in capsys.readouterr().out
    train, test = (held_pairs(out, split) for split in ("train", "test"))
    assert [key(grids) for grids, _ in train["a"]] == [key(pair) for pair in pairs[:-1]]
    assert {name: [key(grids) for grids, _ in found] for name, found in test.items()} == {
        name: [key(pairs[-1])] for name in "ab"
    }


@pytest.mark.parametrize(("side", "largest"), [(5, 5), (34, 34)])
def test_other_canvases(tmp_path: Path, side: int, largest: int) -> None:
    write_tasks(tmp_path / "evaluation", {"a": random_task(0, 4, 2, largest)})
    status, out = build(tmp_path, "--source", str(tmp_path), "--canvas", str(side), "--num-aug", "7")
    assert status == 0
    dataset = PuzzleDataset(out, "train")
    assert (dataset.metadata.seq_len, dataset.metadata.kind) == (side * side, "arc")
    train, test = held_pairs(out, "train"), held_pairs(out, "test")
    assert len(train) == len(test) == 8
    assert [key(grids) for grids, _ in train["a"]] == [
        key(pair) for pair in random_task(0, 4, 2, largest)["train"]
    ]
    assert main(["inspect", str(out), "--samples", "0"]) == 0


def test_plain_training_tasks_have_all_names_and_the_same_test(tmp_path: Path, capsys: Any) -> None:
    write_tasks(tmp_path / "a" / "training", {"t": random_task(0, 2, 1, 5)})
    write_tasks(tmp_path / "a" / "evaluation", {"e": random_task(1, 2, 1, 5)})
    words = ["--source", str(tmp_path / "a"), "--num-aug", "4"]
    stored, plain = tmp_path / "stored", tmp_path / "plain"
    for folder in (stored, plain):
        folder.mkdir()
    assert build(stored, *words)[0] == build(plain, *words, "--plain")[0] == 0
    assert "10 names; train with augment=true" in capsys.readouterr().out
    names = [json.loads((each / "out" / "identifiers.json").read_text()) for each in (stored, plain)]
    assert names[0] == names[1] and len(names[0]) == 11
    held = held_pairs(plain / "out", "train")
    assert {name: len(pairs) for name, pairs in held.items()} == {"t": 3, "e": 2}
    assert all(place == (0, 0) for pairs in held.values() for _, place in pairs)
    tests = [PuzzleDataset(each / "out", "test").sets["all"] for each in (stored, plain)]
    np.testing.assert_array_equal(tests[0].inputs, tests[1].inputs)
    np.testing.assert_array_equal(tests[0].puzzle_identifiers, tests[1].puzzle_identifiers)
    assert main(["inspect", str(plain / "out"), "--samples", "0"]) == 0
    for folder, augment, warned in ((plain, False, True), (plain, True, False), (stored, False, False)):
        config = Config(data_path=str(folder / "out"), augment=augment)
        warnings = [note for note in TrainingData.open(config).notes if "every ARC task once" in note]
        assert len(warnings) == warned and all("so 8 puzzle embeddings" in note for note in warnings)
