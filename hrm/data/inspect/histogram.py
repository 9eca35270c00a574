"""Histograms as text."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

WIDTH = 40
# Upper ends of the buckets of shares; each is four times the one before.
FIRST_BUCKETS = (0, 1)
WIDEN = 4
BAR = 24


def histogram(values: np.ndarray, buckets: int = 8) -> list[str]:
    """A histogram as text lines (from, to, bar, count), with about `buckets` buckets of equal, round
    width."""
    least, most = int(values.min()), int(values.max())
    width = _round_up(-(-(most - least + 1) // buckets))
    first = least // width
    # Unsigned numbers may exceed int64 before the division.
    wide = values if values.dtype == np.uint64 else values.astype(np.int64)
    counts = np.bincount((wide // width - first).astype(np.int64))
    names = []
    for bucket in range(len(counts)):
        low = max(least, (first + bucket) * width)
        high = min(most, (first + bucket + 1) * width - 1)
        names.append(f"{low}" if low == high else f"{low} to {high}")
    column = max(map(len, names))
    return [
        f"{name:>{column}}  {'█' * -(-int(count) * WIDTH // int(counts.max())):{WIDTH}}  {count:,}"
        for name, count in zip(names, counts, strict=True)
    ]


def shares(difficulty: dict[str, np.ndarray]) -> Iterator[str]:
    """Bars for the share of puzzles in each bucket of difficulty, with a column for each split."""
    everything = np.concatenate(list(difficulty.values()))
    edges = [*FIRST_BUCKETS]
    while edges[-1] <= everything.max():
        edges.append(edges[-1] * WIDEN)
    while edges[1] <= everything.min():
        edges.pop(0)
    names = [str(low) if high - low == 1 else f"{low}-{high - 1}" for low, high in pairwise(edges)]
    width = max(len("difficulty"), *map(len, names))
    yield f"  {'difficulty':>{width}}" + "".join(f"  {split:<{BAR + 7}}" for split in difficulty).rstrip()
    columns = [np.histogram(values, edges)[0] / len(values) for values in difficulty.values()]
    for name, *parts in zip(names, *columns, strict=True):
        bars = (f"  {part:6.1%} {'#' * round(part * BAR):<{BAR}}" for part in parts)
        yield f"  {name:>{width}}{''.join(bars)}".rstrip()


def _round_up(number: int) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    scale = 1
    while True:
        for digit in (1, 2, 5):
            if digit * scale >= number:
                return digit * scale
        scale *= 10
