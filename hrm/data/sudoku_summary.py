"""What is said of a Sudoku data set that is built: its puzzles, how hard they are, what the splits share."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from hrm.data.canonical import Leaks
from hrm.data.sudoku_files import Puzzles, row_keys

# Each bucket of difficulty reaches up to four times as far as the one before.
FIRST_BUCKETS = (0, 1)
WIDEN = 4
BAR = 24


def summary(train: Puzzles, test: Puzzles, num_aug: int, found: Leaks | None) -> Iterator[str]:
    """Lines on the two splits as they are written, and on what was found that they share up to symmetry."""
    for split, puzzles, rows in (("train", train, num_aug + 1), ("test", test, 1)):
        clues = (puzzles.questions > 0).sum(axis=1)
        count = len(clues)
        yield (
            f"  {split}: {count * rows} examples of {count} puzzles, clues {clues.min()} to {clues.max()}, "
            f"difficulty {puzzles.difficulty.min()} to {puzzles.difficulty.max()}"
        )
        if repeated := count - len(np.unique(row_keys(puzzles.questions))):
            yield f"    {repeated} of the puzzles repeat another one"
    yield from histogram({"train": train.difficulty, "test": test.difficulty})
    if found is not None:
        grids, themselves = int(found.test_grids.sum()), int(found.test_puzzles.sum())
        yield (
            f"  {grids} of {len(found.test_grids)} test puzzles have a solution grid equivalent to a "
            f"training one up to symmetry, {themselves} are equivalent to a training puzzle themselves"
        )


def histogram(difficulty: dict[str, np.ndarray]) -> Iterator[str]:
    """Bars of the share of the puzzles in each bucket of difficulty, a column for each split."""
    everything = np.concatenate(list(difficulty.values()))
    edges = [*FIRST_BUCKETS]
    while edges[-1] <= everything.max():
        edges.append(edges[-1] * WIDEN)
    while edges[1] <= everything.min():
        edges.pop(0)
    names = [str(low) if high - low == 1 else f"{low}-{high - 1}" for low, high in pairwise(edges)]
    width = max(len("difficulty"), *map(len, names))
    yield f"  {'difficulty':>{width}}" + "".join(f"  {split:<{BAR + 7}}" for split in difficulty).rstrip()
    shares = [np.histogram(values, edges)[0] / len(values) for values in difficulty.values()]
    for name, *parts in zip(names, *shares, strict=True):
        columns = (f"  {part:6.1%} {'#' * round(part * BAR):<{BAR}}" for part in parts)
        yield f"  {name:>{width}}{''.join(columns)}".rstrip()
