"""Named ranges in a training step, for profilers. Without a profiler, a range costs one comparison.

Compiled code opens no ranges; profiles show the compiler's kernels instead.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

Opener = Callable[[str], AbstractContextManager[Any]]
_open: Opener | None = None


def region(name: str) -> AbstractContextManager[Any]:
    """A range around a part of the step, shown by Nsight Systems and by torch.profiler."""
    # Ask the compiler first: compiled code must not depend on whether a profile is taken.
    if torch.compiler.is_compiling() or _open is None:
        return nullcontext()
    return _open(name)


@contextmanager
def opened_by(opener: Opener) -> Iterator[None]:
    """Ranges are opened by `opener` until the context ends."""
    global _open
    before, _open = _open, opener
    try:
        yield
    finally:
        _open = before
