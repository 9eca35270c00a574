"""The official data reader (sapientinc/HRM) on our data sets: it loads them, and draws the batches we draw.

The environment variable HRM_REPO names a checkout of it; nothing of it is part of this project.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from hrm.data import dataset
from hrm.data.dataset import PuzzleDataset, train_batches
from hrm.data.format import PuzzleSet
from hrm.data.sudoku.build import generate, write_sudoku
from hrm.data.writer import Shape, new_dataset

REPO = os.environ.get("HRM_REPO", "")
# The names its files import each other by; too general to leave them in sys.modules.
PACKAGES = ("models", "dataset", "puzzle_dataset")

pytestmark = [
    pytest.mark.skipif(
        not (Path(REPO) / "puzzle_dataset.py").is_file(),
        reason="HRM_REPO does not name a checkout of https://github.com/sapientinc/HRM",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("pydantic") is None,
        reason="the official reader needs pydantic; pip install pydantic",
    ),
]


def loaded() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] in PACKAGES]


@pytest.fixture(scope="module")
def official() -> Iterator[ModuleType]:
    shelved = {name: sys.modules.pop(name) for name in loaded()}
    sys.path.insert(0, REPO)
    try:
        yield importlib.import_module("puzzle_dataset")
    finally:
        sys.path.remove(REPO)
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(shelved)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sudoku"
    train, test = generate(4, num_train=23, num_test=17, seed=1)
    write_sudoku(path, train, test, num_aug=3, seed=1)
    return path


def reader(official: ModuleType, folder: Path, split: str, **config: Any) -> Any:
    defaults = {
        "seed": 0,
        "dataset_path": str(folder),
        "test_set_mode": split == "test",
        "epochs_per_iter": 1,
    }
    return official.PuzzleDataset(official.PuzzleDatasetConfig(**defaults | config), split=split)


def assert_same(ours: dataset.Batch, theirs: dict[str, Any]) -> None:
    assert set(theirs) == {"inputs", "labels", "puzzle_identifiers"}
    for name, tensor in theirs.items():
        array = getattr(ours, name)
        assert array.dtype == tensor.numpy().dtype
        np.testing.assert_array_equal(array, tensor.numpy())


@pytest.mark.parametrize("epochs_per_iter", [1, 3])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("seed", [0, 5])
def test_training_batches_are_the_same(
    official: ModuleType, folder: Path, epochs_per_iter: int, rank: int, seed: int
) -> None:
    theirs = reader(
        official,
        folder,
        "train",
        seed=seed,
        epochs_per_iter=epochs_per_iter,
        global_batch_size=10,
        rank=rank,
        num_replicas=2,
    )
    ours = train_batches(
        PuzzleDataset(folder, "train"),
        seed=seed,
        epochs=3 * epochs_per_iter,
        epochs_per_iter=epochs_per_iter,
        global_batch_size=10,
        rank=rank,
        world_size=2,
    )
    count = 0
    for _iteration in range(3):
        for name, batch, size in theirs:
            assert (name, size) == ("all", 10)
            assert_same(next(ours), batch)
            count += 1
    assert count == 3 * (23 * epochs_per_iter // 10)
    assert next(ours, None) is None


@pytest.mark.parametrize("rank", [0, 1])
def test_test_batches_are_the_same(official: ModuleType, folder: Path, rank: int) -> None:
    theirs = list(reader(official, folder, "test", global_batch_size=8, rank=rank, num_replicas=2))
    ours = list(
        dataset.test_batches(PuzzleDataset(folder, "test"), global_batch_size=8, rank=rank, world_size=2)
    )
    assert [(name, size) for name, _, size in ours] == [(name, size) for name, _, size in theirs]
    assert [size for _, _, size in ours] == [8, 8, 1]
    for (_, batch, _), (_, official_batch, _) in zip(ours, theirs, strict=True):
        assert_same(batch, official_batch)


def test_several_sets_and_examples_give_the_same_puzzles(official: ModuleType, tmp_path: Path) -> None:
    # The examples inside a puzzle come from NumPy's global generator there, but not which puzzles come when.
    with new_dataset(tmp_path / "data") as data:
        split = data.split("train", Shape(seq_len=16, vocab_size=6))
        for name, sizes in {"small": [2, 1, 4, 3, 1, 5], "large": [3, 3, 1, 1, 6, 2, 4, 2]}.items():
            cells = np.ones((sum(sizes), 16), np.uint8)
            part = PuzzleSet(
                inputs=cells,
                labels=cells,
                puzzle_identifiers=np.arange(len(sizes), dtype=np.int32),
                puzzle_indices=np.cumsum([0, *sizes]).astype(np.int32),
                group_indices=np.array([0, 2, 3, 5, len(sizes)], np.int32),
            )
            split.add(name, part)
        data.close([str(number) for number in range(8)])
    options: dict[str, Any] = {"seed": 2, "epochs_per_iter": 4, "global_batch_size": 6}
    theirs = reader(official, tmp_path / "data", "train", rank=0, num_replicas=1, **options)
    ours = train_batches(PuzzleDataset(tmp_path / "data", "train"), epochs=12, **options)
    expected = [batch["puzzle_identifiers"].tolist() for _ in range(3) for _, batch, _ in theirs]
    assert len(expected) > 12
    assert [batch.puzzle_identifiers.tolist() for batch in ours] == expected
