"""Reads ARC tasks from folders of JSON files, or Kaggle's challenges and solutions, and checks every cell.

A task is `{"train": [pair, ...], "test": [pair, ...]}`, a pair `{"input": grid, "output": grid}`, a grid a
list of 1 to 30 rows (or up to the side of the canvas) of equal length with colours 0 to 9. A list of pairs,
as in re-arc, is a task whose last pair is the test. A task may have a `name`; the default is its file's name.
Other keys are ignored. A source is one of

- a folder with sub-folders of task files, as ARC-AGI (training/, evaluation/) and ConceptARC (one per
  concept);
- a folder of task files;
- the prefix of Kaggle's files, `<prefix>_challenges.json` and, if answers are known,
  `<prefix>_solutions.json`: a list of the tests' outputs for each task.

Tasks are evaluation tasks if their folder, or the last part of the prefix, begins with `evaluation` or `test`
(or is one of `Reader.test_sets`), else training tasks. Only tests of evaluation tasks may lack an output.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hrm.common.files import read_json
from hrm.common.text import counted, literal
from hrm.data.arc.augment import COLOURS, LARGEST_SIDE, SIDE, Pair, task_of
from hrm.data.faults import Faults
from hrm.data.format import DatasetError

# Limits far above real tasks that keep the reading of JSON harmless.
MAX_TASK_BYTES = 16 << 20
MAX_KAGGLE_BYTES = 32 << 20
MAX_PAIRS = 10_000
MAX_NAME = 200
# The name of identifier 0, which has no puzzle.
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


def read_source(source: str) -> list[Task]:
    """The tasks of a source, for the official canvas. Raises DatasetError with file, task, pair and cell."""
    reader = Reader()
    tasks = reader.read(source)
    reader.faults.check()
    return tasks


def read_task(path: Path, side: int = SIDE) -> Task:
    """The task in a file; its tests may lack an output. Raises DatasetError."""
    return Reader(side)._task(_read(path, MAX_TASK_BYTES), path.stem, str(path), True)


class Reader:
    """Reads sources and collects the faults of all tasks.

    side: of the canvas, the maximum number of rows and columns of a grid. test_sets: the names or paths of
    the folders and prefixes with evaluation tasks; by default the beginning of the name decides. faults:
    collects invalid tasks. notes: lines about files that are not tasks. largest: the largest number of rows
    or columns of a grid beyond the canvas, 0 without any.
    """

    def __init__(self, side: int = SIDE, test_sets: Sequence[str] = (), faults: Faults | None = None) -> None:
        self.side, self.test_sets = side, test_sets
        self.faults = faults or Faults(skip=False, error=DatasetError)
        self.notes: list[str] = []
        self.largest = 0
        # The names of folders and prefixes that were read.
        self._places: set[str] = set()
        self._used: set[str] = set()

    def read(self, source: str) -> list[Task]:
        """The valid tasks of a source, by sub-folder and name. Raises DatasetError for an invalid source."""
        folder = Path(source)
        if folder.is_dir():
            return self._folder(folder)
        prefix = source.removesuffix("_challenges.json")
        challenges = Path(f"{prefix}_challenges.json")
        if not challenges.is_file():
            remedy = "expected a folder of task JSON, or the prefix of Kaggle's files, such as "
            remedy += "path/arc-agi_training"
            near = sorted(folder.parent.glob("*_challenges.json"))
            if near:
                prefixes = (path.as_posix().removesuffix("_challenges.json") for path in near)
                remedy = f"give --source {' '.join(prefixes)}"
            elif folder.is_file():
                remedy = f"give the folder of the task, --source {folder.parent}"
            raise DatasetError(f"{source}: no such folder, and no {challenges.name}; {remedy}")
        return self._kaggle(challenges, Path(f"{prefix}_solutions.json"))

    def check_test_sets(self) -> None:
        """Raises DatasetError for a test set that none of the sources read has."""
        for name in self.test_sets:
            if name not in self._used:
                raise DatasetError(
                    f"--test-set {name}: no such folder or prefix among {', '.join(sorted(self._places))}"
                )

    def _folder(self, folder: Path) -> list[Task]:
        kaggle = sorted(folder.glob("*_challenges.json"))
        if kaggle:
            raise DatasetError(
                f"{kaggle[0]}: a file of many tasks; give its prefix instead of the folder: "
                f"--source {kaggle[0].as_posix().removesuffix('_challenges.json')}"
            )
        subfolders = sorted(path for path in folder.iterdir() if path.is_dir())
        files = {
            part: [path for path in sorted(part.glob("*.json")) if path.name[0] != "." and path.is_file()]
            for part in (folder, *subfolders)
        }
        if not any(files.values()):
            raise DatasetError(
                f"{folder}: no .json file in it or its sub-folders; expected a folder with training/ and "
                "evaluation/, or of task files"
            )
        tasks = []
        for part, paths in files.items():
            if not paths:
                continue
            place = part.resolve()
            evaluation = self._is_evaluation(place.name, place)
            for path in paths:
                with self.faults.item():
                    value = read_json(path, MAX_TASK_BYTES, "a file of ARC tasks", DatasetError)
                    # re-arc has a file that describes its folder of tasks.
                    if part == folder and any(files[each] for each in subfolders) and _is_no_task(value):
                        self.notes.append(f"skipped {path}: not a task, and there are sub-folders of tasks")
                        continue
                    name = value.get("name", path.stem) if isinstance(value, dict) else path.stem
                    tasks.append(self._task(value, name, str(path), evaluation))
        return tasks

    def _kaggle(self, challenges: Path, solutions: Path) -> list[Task]:
        values = _read(challenges, MAX_KAGGLE_BYTES)
        answers = _read(solutions, MAX_KAGGLE_BYTES) if solutions.is_file() else None
        if not values:
            raise DatasetError(f"{challenges}: no task in it, expected an object of tasks by name")
        prefix = challenges.with_name(challenges.name.removesuffix("_challenges.json"))
        evaluation = self._is_evaluation(prefix.name.rpartition("_")[2], prefix.resolve())
        tasks = []
        for name in sorted(values):
            with self.faults.item():
                where = f"{challenges}: task {literal(name)}"
                value = _object(values[name], where)
                if answers is not None:
                    value = self._answered(value, name, where, challenges, solutions, answers)
                tasks.append(self._task(value, name, where, evaluation))
        return tasks

    def _answered(
        self,
        value: dict[str, Any],
        name: str,
        where: str,
        challenges: Path,
        solutions: Path,
        answers: dict[str, Any],
    ) -> dict[str, Any]:
        """A task from Kaggle's files, with the outputs of its tests."""
        tests = _list(value.get("test"), f"{where}: test", MAX_PAIRS)
        there = f"{solutions}: task {literal(name)}"
        if name not in answers:
            raise DatasetError(
                f"{there}: missing, but in {challenges.name}; use both files from the same version"
            )
        outputs = _list(answers[name], there, MAX_PAIRS)
        if len(outputs) != len(tests):
            raise DatasetError(
                f"{there}: {len(outputs)} outputs, expected {len(tests)} as {challenges.name} has tests"
            )
        self._note_sides(value)
        for grid in outputs:
            self._note_grid(grid)
        # Check here, so that messages name the right file.
        for number, grid in enumerate(outputs):
            self._grid(grid, f"{there}: output {number}")
        tests = [
            {**_object(test, f"{where}: test pair {number}"), "output": output}
            for number, (test, output) in enumerate(zip(tests, outputs, strict=True))
        ]
        return {**value, "test": tests}

    def _is_evaluation(self, name: str, place: Path) -> bool:
        """Whether tasks there are evaluation tasks. place: the folder or prefix, resolved."""
        self._places.add(name)
        if not self.test_sets:
            return name.startswith(("evaluation", "test"))
        chosen = {
            each for each in self.test_sets if each == name or place.is_relative_to(Path(each).resolve())
        }
        self._used |= chosen
        return bool(chosen)

    def _task(self, value: Any, name: Any, where: str, evaluation: bool) -> Task:
        if isinstance(value, list) and len(value) > 1 and all(map(_has_grids, value)):
            value = {"train": value[:-1], "test": value[-1:]}
        value = _object(value, where)
        plain = isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable()
        if not plain or name == BLANK:
            raise DatasetError(
                f"{where}: the name is {literal(name)}, expected 1 to {MAX_NAME} plain characters"
            )
        if task_of(name) != name:
            raise DatasetError(
                f"{where}: the name {name} looks like an augmented puzzle's; rename the task, or take the "
                "original"
            )
        self._note_sides(value)
        pairs: dict[str, tuple[Pair, ...]] = {}
        for role in ("train", "test"):
            if role not in value:
                raise DatasetError(f"{where}: no {role}, expected an object with train and test")
            items = _list(value[role], f"{where}: {role}", MAX_PAIRS)
            hidden = evaluation and role == "test"
            pairs[role] = tuple(
                self._pair(item, f"{where}: {role} pair {number}", hidden)
                for number, item in enumerate(items)
            )
        return Task(name, where, pairs["train"], pairs["test"], evaluation)

    def _pair(self, value: Any, where: str, hidden: bool) -> Pair:
        item = _object(value, where)
        if "input" not in item:
            raise DatasetError(f"{where}: no input, expected an object with input and output")
        if "output" not in item and not hidden:
            raise DatasetError(
                f"{where}: no output; only tests of evaluation tasks may lack it, others need their solutions"
            )
        asked = self._grid(item["input"], f"{where}, input")
        return Pair(asked, self._grid(item["output"], f"{where}, output") if "output" in item else None)

    def _grid(self, value: Any, where: str) -> np.ndarray:
        rows = _list(value, where, self.side, "rows")
        width = len(_list(rows[0], f"{where}, row 0", self.side, "cells"))
        for number, row in enumerate(rows):
            if not isinstance(row, list) or len(row) != width:
                length = counted(len(row), "cell") if isinstance(row, list) else literal(row)
                raise DatasetError(f"{where}, row {number}: {length}, expected {width} cells as in row 0")
            for column, colour in enumerate(row):
                # bool is a subclass of int.
                if type(colour) is not int or not 0 <= colour < COLOURS:
                    raise DatasetError(
                        f"{where}, row {number}, column {column}: {literal(colour)}, expected a colour 0 to 9"
                    )
        return np.array(rows, np.uint8)

    def _note_sides(self, task: dict[str, Any]) -> None:
        """Updates `largest` from all grids, because reading a task ends at its first fault."""
        for pairs in (task.get("train"), task.get("test")):
            for pair in pairs if isinstance(pairs, list) else ():
                if isinstance(pair, dict):
                    self._note_grid(pair.get("input"))
                    self._note_grid(pair.get("output"))

    def _note_grid(self, grid: Any) -> None:
        for lines in (grid, *grid) if isinstance(grid, list) else ():
            if isinstance(lines, list) and self.side < len(lines) <= LARGEST_SIDE:
                self.largest = max(self.largest, len(lines))


def _has_grids(value: Any) -> bool:
    return isinstance(value, dict) and {"input", "output"} <= value.keys()


def _is_no_task(value: Any) -> bool:
    return isinstance(value, dict) and not {"train", "test"} & value.keys()


def _read(path: Path, limit: int) -> dict[str, Any]:
    return _object(read_json(path, limit, "a file of ARC tasks", DatasetError), str(path))


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
