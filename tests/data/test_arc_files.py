"""ARC sources: what is read of each form, and every fault told with file, task, pair and cell."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hrm.data.arc import files as arc_files
from hrm.data.arc.files import Task, read_source
from hrm.data.format import DatasetError
from tests.support.arc_tasks import key, random_task, write_kaggle, write_tasks


def read(source: str | Path) -> list[Task]:
    return list(read_source(str(source)))


def refusal(source: str | Path) -> str:
    with pytest.raises(DatasetError) as caught:
        read(source)
    text = str(caught.value)
    assert "\n" not in text
    return text


def tasks(*names: str) -> dict[str, Any]:
    return {name: random_task(number, 2, 1, 5) for number, name in enumerate(names)}


def test_folders_with_sub_folders(tmp_path: Path) -> None:
    known = tasks("b", "a", "c", "d")
    write_tasks(tmp_path / "training", {name: known[name] for name in "ba"})
    write_tasks(tmp_path / "evaluation", {"c": known["c"]})
    write_tasks(tmp_path / "AboveBelow", {"d": known["d"]})
    # Files that are no tasks, such as a licence or what some systems leave beside each file.
    (tmp_path / "LICENSE").write_text("")
    (tmp_path / "training" / "._a.json").write_bytes(b"\0\5\26\7")
    (tmp_path / "training" / "a folder.json").mkdir()
    found = read(tmp_path)
    assert [(task.name, task.evaluation) for task in found] == [
        ("d", False),
        ("c", True),
        ("a", False),
        ("b", False),
    ]
    for task in found:
        for role in ("train", "test"):
            expected = [key(pair) for pair in known[task.name][role]]
            assert [key(pair.grids) for pair in getattr(task, role)] == expected
        assert all(grid.dtype == "uint8" for pair in task.pairs for grid in pair.grids)
        assert task.pairs == task.train + task.test


@pytest.mark.parametrize(
    ("folder", "evaluation"),
    [("evaluation", True), ("test", True), ("evaluation2", True), ("training", False), ("corpus", False)],
)
def test_the_folder_or_prefix_determines_the_split_of_a_task(
    tmp_path: Path, folder: str, evaluation: bool
) -> None:
    flat = write_tasks(tmp_path / folder, tasks("a"))
    prefix = write_kaggle(tmp_path, f"arc-agi_{folder}", tasks("a"))
    for source in (flat, prefix, f"{prefix}_challenges.json"):
        (task,) = read(source)
        assert task.evaluation is evaluation
        assert [key(pair.grids) for pair in task.test] == [key(pair) for pair in tasks("a")["a"]["test"]]


def test_a_task_may_hold_its_name(tmp_path: Path) -> None:
    write_tasks(tmp_path / "a", {"file": {**tasks("x")["x"], "name": "05a7bcf2", "note": [1]}})
    assert [task.name for task in read(tmp_path / "a")] == ["05a7bcf2"]


def test_solutions_take_the_place_of_outputs(tmp_path: Path) -> None:
    known = tasks("a", "b")
    prefix = write_kaggle(tmp_path, "x_training", known)
    Path(f"{prefix}_challenges.json").write_text(json.dumps(known | {"b": tasks("c")["c"]}))
    found = {task.name: task for task in read(prefix)}
    assert key(found["b"].test[0].grids[1:] * 2) == key((known["b"]["test"][0]["output"],) * 2)
    assert key(found["b"].test[0].grids[:1] * 2) == key((tasks("c")["c"]["test"][0]["input"],) * 2)


def test_only_evaluation_tasks_may_lack_answers(tmp_path: Path) -> None:
    (task,) = read(write_kaggle(tmp_path, "x_test", tasks("a"), solutions=False))
    assert [pair.output for pair in task.test] == [None] and len(task.test[0].grids) == 1
    shown = {**TASK, "train": [{"input": GRID}]}
    assert "train pair 0: no output" in refusal(write_tasks(tmp_path / "evaluation", {"a": shown}))
    prefix = write_kaggle(tmp_path, "x_training", tasks("a"), solutions=False)
    assert refusal(prefix) == (
        f"{prefix}_challenges.json: task 'a': test pair 0: no output; only tests of evaluation tasks may "
        "lack it, others need their solutions; --skip-bad leaves it out"
    )


def changed(*path: Any, to: Any) -> Callable[[Any], Any]:
    def change(task: Any) -> Any:
        part = task
        for step in path[:-1]:
            part = part[step]
        part[path[-1]] = to
        return task

    return change


def without(*path: Any) -> Callable[[Any], Any]:
    def change(task: Any) -> Any:
        part = task
        for step in path[:-1]:
            part = part[step]
        del part[path[-1]]
        return task

    return change


GRID = [[1, 2, 3], [4, 5, 6]]
TASK = {
    "train": [{"input": GRID, "output": GRID}, {"input": GRID, "output": GRID}],
    "test": [{"input": GRID, "output": GRID}],
}
FAULTS: list[tuple[Callable[[Any], Any], str]] = [
    (
        lambda task: [task],
        "[{'train': [{'input': [[1, 2, 3], [4, 5, 6]], 'output': [..., expected a JSON object",
    ),
    (lambda task: None, "None, expected a JSON object"),
    (without("train"), "no train, expected an object with train and test"),
    (without("test"), "no test, expected an object with train and test"),
    (changed("train", to={}), "train: {}, expected a list of 1 to 10000 entries"),
    (changed("train", to=[]), "train: 0 entries, expected 1 to 10000"),
    (changed("test", to=[]), "test: 0 entries, expected 1 to 10000"),
    (changed("train", to=TASK["train"] * 5001), "train: 10002 entries, expected 1 to 10000"),
    (changed("train", 1, to=GRID), "train pair 1: [[1, 2, 3], [4, 5, 6]], expected a JSON object"),
    (without("train", 1, "input"), "train pair 1: no input, expected an object with input and output"),
    (without("train", 0, "output"), "train pair 0: no output; only tests of evaluation tasks may lack it"),
    (changed("train", 0, "input", to="1"), "train pair 0, input: '1', expected a list of 1 to 30 rows"),
    (changed("train", 0, "input", to=[]), "train pair 0, input: 0 rows, expected 1 to 30"),
    (changed("train", 0, "output", to=[[1]] * 31), "train pair 0, output: 31 rows, expected 1 to 30"),
    (changed("test", 0, "input", to=[[1] * 31]), "test pair 0, input, row 0: 31 cells, expected 1 to 30"),
    (changed("test", 0, "input", to=[[]]), "test pair 0, input, row 0: 0 cells, expected 1 to 30"),
    (
        changed("test", 0, "input", to=[1, 2]),
        "input, row 0: 1, expected a list of 1 to 30 cells",
    ),
    (changed("test", 0, "input", 1, to=[4, 5]), "input, row 1: 2 cells, expected 3 cells as in row 0"),
    (changed("test", 0, "input", 1, to=None), "input, row 1: None, expected 3 cells as in row 0"),
    (
        changed("train", 1, "output", 1, 2, to=10),
        "train pair 1, output, row 1, column 2: 10, expected",
    ),
    (changed("train", 1, "output", 0, 1, to=-1), "output, row 0, column 1: -1, expected a colour 0 to 9"),
    (changed("train", 1, "output", 0, 1, to=1.0), "column 1: 1.0, expected a colour 0 to 9"),
    (changed("train", 1, "output", 0, 1, to=True), "column 1: True, expected a colour 0 to 9"),
    (changed("train", 1, "output", 0, 1, to=float("nan")), "not readable as JSON (NaN is not a JSON number)"),
    (changed("train", 1, "output", 0, 1, to=[1]), "column 1: [1], expected a colour 0 to 9"),
    (
        changed("train", 1, "output", 0, 1, to="7" * 99),
        "column 1: '77777777777777777777777777777777777",
    ),
    (changed("train", 1, "output", 0, 1, to=10**400), "column 1: 1000000000000000000000000000000000000"),
    (changed("name", to=7), "the name is 7, expected 1 to 200 plain characters"),
    (changed("name", to=""), "the name is '', expected 1 to 200 plain characters"),
    (changed("name", to="<blank>"), "the name is '<blank>', expected"),
    (changed("name", to="a\nb"), r"the name is 'a\nb', expected"),
    (changed("name", to="\ud800"), "the name is '\\ud800', expected"),
    (changed("name", to="x" * 201), "the name is 'xxxxxxxxxxxxxxxx"),
    (changed("name", to="a_t3_0987654321"), "the name a_t3_0987654321 looks like an augmented puzzle's"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS, ids=[message[:50] for _, message in FAULTS])
def test_faults_of_a_task(tmp_path: Path, fault: Callable[[Any], Any], message: str) -> None:
    folder = write_tasks(tmp_path / "a", {"good": TASK, "bad": fault(json.loads(json.dumps(TASK)))})
    text = refusal(folder)
    assert text.startswith(f"{folder / 'bad.json'}: ") and message in text
    assert len(text) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not readable as JSON ("),
        (b'{"train": [', "not readable as JSON ("),
        (b"\xff\xfe{}", "not readable as JSON ("),
        (b'{"train": ' + b"9" * 5000 + b"}", "not readable as JSON ("),
        (b"[" * 100_000, "not readable as JSON (maximum recursion depth exceeded"),
        (b'{"train": [], "test": [], "train": []}', "'train' occurs twice in one object"),
        (b'{"train": [{"input": 1, "output": 2, "input": 3}]}', "'input' occurs twice in one object"),
    ],
)
def test_files_that_are_not_json(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(text)
    assert refusal(tmp_path).startswith(f"{path}: {message}")


def test_files_of_absurd_size_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "big.json"
    write_tasks(tmp_path / "a", {"big": TASK})
    # All zeros and mostly a hole: its size is known without reading it.
    with path.open("ab") as file:
        file.truncate(arc_files.MAX_TASK_BYTES + 1)
    assert refusal(tmp_path / "a") == (
        f"{path}: more than 16 MiB, expected a file of ARC tasks; --skip-bad leaves it out"
    )
    prefix = write_kaggle(tmp_path, "x_training", {"a": TASK})
    monkeypatch.setattr(arc_files, "MAX_KAGGLE_BYTES", 100)
    assert refusal(prefix).startswith(f"{prefix}_challenges.json: more than 100 bytes")


def test_invalid_sources(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none").startswith(
        f"{tmp_path / 'none'}: no such folder, and no none_challenges"
    )
    (tmp_path / "training").mkdir()
    assert refusal(tmp_path).startswith(f"{tmp_path}: no .json file in it or its sub-folders")
    prefix = write_kaggle(tmp_path, "arc-agi_training", {"a": TASK})
    assert f"give its prefix instead of the folder: --source {prefix}" in refusal(tmp_path)
    assert refusal(tmp_path / "arc-agi").endswith(f"; give --source {prefix}")
    write_tasks(tmp_path / "one", {"a": TASK})
    file = tmp_path / "one" / "a.json"
    assert refusal(file).endswith(f"give the folder of the task, --source {file.parent}")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("challenges", lambda value: {}, "no task in it"),
        ("challenges", lambda value: [], "[], expected a JSON object"),
        ("challenges", lambda value: value | {"b": []}, "task 'b': [], expected a JSON object"),
        ("challenges", lambda value: value | {"b": {"train": []}}, "task 'b': test: None, expected a list"),
        (
            "challenges",
            lambda value: {"a": {**TASK, "test": [GRID]}},
            "task 'a': test pair 0: [[1, 2, 3], [4, 5, 6]], expected",
        ),
        ("challenges", lambda value: {"": value["a"]}, "task '': the name is ''"),
        ("solutions", lambda value: [], "[], expected a JSON object"),
        ("solutions", lambda value: {}, "task 'a': missing, but in x_training_challenges.json"),
        (
            "solutions",
            lambda value: {"a": [GRID, GRID]},
            "task 'a': 2 outputs, expected 1 as x_training_chall",
        ),
        ("solutions", lambda value: {"a": GRID}, "task 'a': 2 outputs, expected 1"),
        ("solutions", lambda value: {"a": [[[11]]]}, "task 'a': output 0, row 0, column 0: 11, expected a"),
    ],
)
def test_faults_of_kaggle_files(tmp_path: Path, file: str, change: Any, message: str) -> None:
    prefix = write_kaggle(tmp_path, "x_training", {"a": TASK})
    path = Path(f"{prefix}_{file}.json")
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    if '""' in path.read_text():
        Path(f"{prefix}_solutions.json").write_text(json.dumps({"": [GRID]}))
    assert refusal(prefix).startswith(f"{path}: {message}")
