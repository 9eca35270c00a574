"""Generated ARC tasks in their file format, and the pairs of each task in a built data set."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from hrm.data.arc.augment import canvas
from hrm.data.dataset import PuzzleDataset

Grid = list[list[int]]
Grids = tuple[np.ndarray, np.ndarray]


def random_grid(rng: np.random.Generator, largest: int = 30) -> Grid:
    return rng.integers(10, size=rng.integers(1, largest + 1, size=2)).tolist()


def random_task(seed: int, train: int = 3, test: int = 1, largest: int = 30) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def pairs(count: int) -> list[dict[str, Grid]]:
        return [
            {"input": random_grid(rng, largest), "output": random_grid(rng, largest)} for _ in range(count)
        ]

    return {"train": pairs(train), "test": pairs(test)}


def write_tasks(folder: Path, tasks: dict[str, Any]) -> Path:
    """A folder of task files."""
    folder.mkdir(parents=True)
    for name, task in tasks.items():
        (folder / f"{name}.json").write_text(json.dumps(task))
    return folder


def write_kaggle(folder: Path, name: str, tasks: dict[str, Any], solutions: bool = True) -> str:
    """Writes the same tasks in Kaggle's format; returns their prefix."""
    challenges = {
        task: {"train": value["train"], "test": [{"input": pair["input"]} for pair in value["test"]]}
        for task, value in tasks.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}_challenges.json").write_text(json.dumps(challenges))
    if solutions:
        answers = {task: [pair["output"] for pair in value["test"]] for task, value in tasks.items()}
        (folder / f"{name}_solutions.json").write_text(json.dumps(answers))
    return str(folder / name)


def framed(tokens: np.ndarray) -> tuple[np.ndarray, int, int]:
    """The grid on a canvas, at any place, and its place."""
    side = math.isqrt(len(tokens))
    rows, cols = np.nonzero(tokens.reshape(side, side) >= 2)
    top, left = rows.min(), cols.min()
    grid = tokens.reshape(side, side)[top : rows.max() + 1, left : cols.max() + 1] - 2
    # The rest of the canvas has the end lines and padding of `canvas`.
    np.testing.assert_array_equal(canvas(grid, top, left, side), tokens)
    return grid, int(top), int(left)


def held_pairs(folder: Path, split: str) -> dict[str, list[tuple[Grids, tuple[int, int]]]]:
    """By puzzle name: its pairs of grids and the place of each pair."""
    dataset = PuzzleDataset(folder, split)
    names = json.loads((folder / "identifiers.json").read_text())
    assert len(names) == dataset.metadata.num_puzzle_identifiers == len(set(names))
    result: dict[str, list[tuple[Grids, tuple[int, int]]]] = {}
    for part in dataset.sets.values():
        for puzzle, identifier in enumerate(part.puzzle_identifiers):
            assert names[identifier] not in result
            found = result[names[identifier]] = []
            for example in range(part.puzzle_indices[puzzle], part.puzzle_indices[puzzle + 1]):
                (one, *place), (other, *same) = framed(part.inputs[example]), framed(part.labels[example])
                assert place == same
                found.append(((one, other), (place[0], place[1])))
    return result


def key(pair: Any) -> Any:
    """A pair of grids from a file or a data set, as a comparable value."""
    grids = (pair["input"], pair["output"]) if isinstance(pair, dict) else pair
    return tuple(tuple(map(tuple, np.asarray(grid).tolist())) for grid in grids)
