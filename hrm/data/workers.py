"""Compiled work on the rows of arrays, shared among threads; what comes out does not depend on how many."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

# Rows of a share of the work: few enough for a bar that moves, many enough to hide the cost of handing over.
SHARE = 256


def over_rows(work: Callable[[slice], None], rows: int, workers: int, what: str) -> None:
    """Calls work(slice) for all rows, a share at a time, on `workers` threads, under a bar that says `what`.

    `work` fills its own rows of arrays that the caller keeps, and lets go of Python's lock while it does, as
    compiled functions here do: threads share the arrays, where processes would have to send them. The fault
    that is raised is that of the first rows that have one.
    """
    parts = [slice(first, min(first + SHARE, rows)) for first in range(0, rows, SHARE)]
    # A bar that an error passes through must be gone before the error is printed.
    with tqdm(total=rows, desc=what, leave=False) as bar, ThreadPoolExecutor(workers) as pool:
        try:
            for part, future in [(part, pool.submit(work, part)) for part in parts]:
                future.result()
                bar.update(part.stop - part.start)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
