"""Writes small data sets with given groups for tests."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from hrm.data.dataset import PuzzleDataset
from hrm.data.format import PuzzleSet
from hrm.data.writer import Shape, new_dataset

CELLS = 5
VOCAB = 9
# The examples of each puzzle of each group.
MIXED = [[1, 1], [3], [2, 4, 1], [7], [1], [2, 2], [5, 1], [1, 1, 1]]


def a_set(groups: list[list[int]], seed: int = 0) -> PuzzleSet:
    """A set with the given number of examples of every puzzle of every group; each input row encodes its
    example."""
    sizes = [size for group in groups for size in group]
    examples = sum(sizes)
    rng = np.random.default_rng(seed)
    inputs = rng.integers(0, VOCAB, (examples, CELLS), dtype=np.uint8)
    # The example's index in base 8, to identify the rows of a batch.
    for place in range(3):
        inputs[:, place] = np.arange(examples) // 8**place % 8
    return PuzzleSet(
        inputs=inputs,
        labels=rng.integers(0, VOCAB, (examples, CELLS), dtype=np.uint8),
        puzzle_identifiers=np.arange(1, len(sizes) + 1, dtype=np.int32),
        puzzle_indices=np.cumsum([0, *sizes]).astype(np.int32),
        group_indices=np.cumsum([0, *map(len, groups)]).astype(np.int32),
    )


def digest(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a folder by relative path."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def written(
    folder: Path, *sets: list[list[int]], split: str = "train", identifiers: int = 200, **shape: Any
) -> PuzzleDataset:
    """Writes a data set with one split and the sets set0, set1, ..."""
    with new_dataset(folder) as data:
        part = data.split(split, Shape(**{"seq_len": CELLS, "vocab_size": VOCAB} | shape))
        for number, groups in enumerate(sets):
            part.add(f"set{number}", a_set(groups, number))
        data.close([str(number) for number in range(identifiers)])
    return PuzzleDataset(folder, split)
