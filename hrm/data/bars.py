"""Histograms as text."""

import numpy as np

WIDTH = 40


def histogram(values: np.ndarray, buckets: int = 8) -> list[str]:
    """Counts of whole numbers in some `buckets` of one round width, a line for each: from, to, bar, count."""
    least, most = int(values.min()), int(values.max())
    width = _round_up(-(-(most - least + 1) // buckets))
    first = least // width
    counts = np.bincount(values.astype(np.int64) // width - first)
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


def _round_up(number: int) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    scale = 1
    while True:
        for digit in (1, 2, 5):
            if digit * scale >= number:
                return digit * scale
        scale *= 10
