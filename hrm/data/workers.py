"""Compiled functions, and threads that divide their work; results do not depend on the number of threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
from tqdm import tqdm

# Rows per work item: few, so that the bar moves; enough to hide the overhead.
SHARE = 256


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as machine code, cached on disk; it releases Python's lock while it runs."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    # numba found no writable folder for its cache.
    except RuntimeError:
        return numba.njit(nogil=True)(function)


def over_rows(work: Callable[[slice], None], rows: int, workers: int, what: str) -> None:
    """Calls work(slice) for all rows, in parts, on `workers` threads, with a progress bar titled `what`.

    `work` fills its own rows of the caller's arrays and must release Python's lock, as `compiled` functions
    do. Raises the error of the first rows that have one.
    """
    parts = [slice(first, min(first + SHARE, rows)) for first in range(0, rows, SHARE)]
    # Close the bar before an error is printed.
    with tqdm(total=rows, desc=what, leave=False) as bar, ThreadPoolExecutor(workers) as pool:
        try:
            for part, future in [(part, pool.submit(work, part)) for part in parts]:
                future.result()
                bar.update(part.stop - part.start)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
