"""The summary of a built Sudoku data set: puzzles, difficulty, leaks between the splits."""

from collections.abc import Iterator

import numpy as np

from hrm.data.inspect.histogram import shares
from hrm.data.sudoku.files import Puzzles, row_keys
from hrm.data.sudoku.symmetry import Leaks


def summary(train: Puzzles, test: Puzzles, num_aug: int, found: Leaks | None) -> Iterator[str]:
    """Lines about the two splits, and about their overlap up to symmetry."""
    for split, puzzles, rows in (("train", train, num_aug + 1), ("test", test, 1)):
        clues = (puzzles.questions > 0).sum(axis=1)
        count = len(clues)
        yield (
            f"  {split}: {count * rows} examples of {count} puzzles, clues {clues.min()} to {clues.max()}, "
            f"difficulty {puzzles.difficulty.min()} to {puzzles.difficulty.max()}"
        )
        if repeated := count - len(np.unique(row_keys(puzzles.questions))):
            yield f"    {repeated} of the puzzles are duplicates"
    yield from shares({"train": train.difficulty, "test": test.difficulty})
    if found is not None:
        grids, themselves = int(found.test_grids.sum()), int(found.test_puzzles.sum())
        yield (
            f"  {grids} of {len(found.test_grids)} test puzzles have a solution grid equivalent to a "
            f"training one up to symmetry, {themselves} are equivalent to a training puzzle themselves"
        )
