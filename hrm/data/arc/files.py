"""Reads ARC tasks from folders of JSON files, or Kaggle's challenges and solutions, and checks every cell.

A task is `{"train": [pair, ...], "test": [pair, ...]}`, a pair `{"input": grid, "output": grid}`, a grid a
list of 1 to 30 rows of as many colours 0 to 9. A task may have a `name`; without it, its file's name counts.
Other keys are ignored. A source is one of

- a folder with sub-folders of task files, as ARC-AGI (training/, evaluation/) and ConceptARC (one a concept);
- a folder of task files;
- the prefix of Kaggle's files, `<prefix>_challenges.json` and, if answers are known,
  `<prefix>_solutions.json`: a list of the tests' outputs for each task.

Tasks are evaluation tasks if their folder, or the last word of the prefix, begins with `evaluation` or
`test`, else training tasks. Only tests of evaluation tasks may lack an output.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hrm.common.files import read_json
from hrm.common.text import literal
from hrm.data.arc.augment import COLOURS, SIDE, Pair, task_of
from hrm.data.format import DatasetError

# Limits far above real tasks, at which reading JSON is still harmless.
MAX_TASK_BYTES = 4 << 20
MAX_KAGGLE_BYTES = 32 << 20
MAX_PAIRS = 100
MAX_NAME = 200
# The name of identifier 0, which belongs to no puzzle.
BLANK = "<blank>"


@dataclass(frozen=True)
class Task:
    """A task: demonstrations (`train`), tests, and whether its tests are excluded from training."""

    name: str
    where: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]
    evaluation: bool

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return self.train + self.test


def read_source(source: str) -> Iterator[Task]:
    """The tasks of a source, by sub-folder and name. Raises DatasetError with file, task, pair and cell."""
    folder = Path(source)
    if folder.is_dir():
        yield from _read_folder(folder)
        return
    prefix = source.removesuffix("_challenges.json")
    challenges = Path(f"{prefix}_challenges.json")
    if not challenges.is_file():
        raise DatasetError(
            f"{source}: no such folder, and no {challenges.name}; expected a folder of task JSON, or the "
            "prefix of Kaggle's files, such as path/arc-agi_training"
        )
    yield from _read_kaggle(challenges, Path(f"{prefix}_solutions.json"))


def _read_folder(folder: Path) -> Iterator[Task]:
    kaggle = sorted(folder.glob("*_challenges.json"))
    if kaggle:
        raise DatasetError(
            f"{kaggle[0]}: a file of many tasks; give its prefix instead of the folder: "
            f"--source {kaggle[0].as_posix().removesuffix('_challenges.json')}"
        )
    subfolders = sorted(path for path in folder.iterdir() if path.is_dir())
    found = False
    for part in (folder, *subfolders):
        for path in sorted(part.glob("*.json")):
            if path.name.startswith(".") or not path.is_file():
                continue
            found = True
            value = _read(path, MAX_TASK_BYTES)
            name = value.get("name", path.stem)
            yield _task(value, name, str(path), _is_evaluation(part.resolve().name))
    if not found:
        raise DatasetError(
            f"{folder}: no .json file in it or its sub-folders; expected a folder with training/ and "
            "evaluation/, or of task files"
        )


def _read_kaggle(challenges: Path, solutions: Path) -> Iterator[Task]:
    tasks = _read(challenges, MAX_KAGGLE_BYTES)
    answers = None
    if solutions.is_file():
        answers = _read(solutions, MAX_KAGGLE_BYTES)
    if not tasks:
        raise DatasetError(f"{challenges}: no task in it, expected an object of tasks by name")
    evaluation = _is_evaluation(challenges.name.removesuffix("_challenges.json").rpartition("_")[2])
    for name in sorted(tasks):
        where = f"{challenges}: task {literal(name)}"
        value = _object(tasks[name], where)
        if answers is not None:
            tests = _list(value.get("test"), f"{where}: test", MAX_PAIRS)
            there = f"{solutions}: task {literal(name)}"
            if name not in answers:
                raise DatasetError(f"{there}: not there, but in {challenges.name}; take both of one version")
            outputs = _list(answers[name], there, MAX_PAIRS)
            if len(outputs) != len(tests):
                raise DatasetError(
                    f"{there}: {len(outputs)} outputs, expected {len(tests)} as {challenges.name} has tests"
                )
            # Checked here, so that messages give the right file.
            for number, grid in enumerate(outputs):
                _grid(grid, f"{there}: output {number}")
            tests = [
                {**_object(test, f"{where}: test pair {number}"), "output": output}
                for number, (test, output) in enumerate(zip(tests, outputs, strict=True))
            ]
            value = {**value, "test": tests}
        yield _task(value, name, where, evaluation)


def _is_evaluation(name: str) -> bool:
    return name.startswith(("evaluation", "test"))


def read_task(path: Path) -> Task:
    """The task in one file, whose tests may lack an output. Raises DatasetError."""
    return _task(_read(path, MAX_TASK_BYTES), path.stem, str(path), True)


def _read(path: Path, limit: int) -> dict[str, Any]:
    return _object(read_json(path, limit, "a file of ARC tasks", DatasetError), str(path))


def _task(value: dict[str, Any], name: Any, where: str, evaluation: bool) -> Task:
    plain = isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable()
    if not plain or name == BLANK:
        raise DatasetError(f"{where}: the name is {literal(name)}, expected 1 to {MAX_NAME} plain characters")
    if task_of(name) != name:
        raise DatasetError(
            f"{where}: the name {name} is that of an augmented puzzle; rename the task, or take the original"
        )
    pairs: dict[str, tuple[Pair, ...]] = {}
    for role in ("train", "test"):
        if role not in value:
            raise DatasetError(f"{where}: no {role}, expected an object with train and test")
        items = _list(value[role], f"{where}: {role}", MAX_PAIRS)
        hidden = evaluation and role == "test"
        pairs[role] = tuple(
            _pair(item, f"{where}: {role} pair {number}", hidden) for number, item in enumerate(items)
        )
    return Task(name, where, pairs["train"], pairs["test"], evaluation)


def _pair(value: Any, where: str, hidden: bool) -> Pair:
    item = _object(value, where)
    if "input" not in item:
        raise DatasetError(f"{where}: no input, expected an object with input and output")
    if "output" not in item and not hidden:
        raise DatasetError(
            f"{where}: no output; only tests of evaluation tasks may lack it, others need their solutions"
        )
    output = _grid(item["output"], f"{where}, output") if "output" in item else None
    return Pair(_grid(item["input"], f"{where}, input"), output)


def _grid(value: Any, where: str) -> np.ndarray:
    rows = _list(value, where, SIDE, "rows")
    width = len(_list(rows[0], f"{where}, row 0", SIDE, "cells"))
    for number, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != width:
            length = f"{len(row)} cells" if isinstance(row, list) else literal(row)
            raise DatasetError(f"{where}, row {number}: {length}, expected {width} cells as in row 0")
        for column, colour in enumerate(row):
            # bool is a subclass of int.
            if type(colour) is not int or not 0 <= colour < COLOURS:
                raise DatasetError(
                    f"{where}, row {number}, column {column}: {literal(colour)}, expected a colour 0 to 9"
                )
    return np.array(rows, np.uint8)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DatasetError(f"{where}: {literal(value)}, expected a JSON object")
    return value


def _list(value: Any, where: str, most: int, of_what: str = "entries") -> list[Any]:
    if not isinstance(value, list):
        raise DatasetError(f"{where}: {literal(value)}, expected a list of 1 to {most} {of_what}")
    if not 0 < len(value) <= most:
        raise DatasetError(f"{where}: {len(value)} {of_what}, expected 1 to {most}")
    return value
