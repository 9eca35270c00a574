"""Announces compilations with their expected time, and ends them within seconds of a stop."""

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from hrm.common.errors import UserError
from hrm.common.files import read_json, to_json, write_whole

# Seconds within which a signal arrives here after it killed the compiler: both belong to one stop.
GRACE = 0.3
# File of earlier compilation times in the compiler's cache, as they apply only with its cached code.
TIMES = "hrm_compile_seconds.json"
MOST_TIMES = 500


class Compilation:
    """Announces, times and interrupts compilations; by default it does nothing.

    say: prints a line. at_once: a context in which a stop raises, even within the compiler. Its exception
    must not be an Exception, or the compiler would report it as its own failure.
    """

    def __init__(
        self,
        say: Callable[[str], object] = lambda _: None,
        at_once: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._say, self._at_once = say, at_once

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A context for work of the compiler: a stop raises the exception of `at_once` and ends all compiler
        processes."""
        before = _descendants(os.getpid())
        try:
            with self._at_once():
                try:
                    yield
                except Exception:
                    time.sleep(GRACE)
                    raise
        except Exception:
            raise
        except BaseException:
            # At exit Python waits for threads, which wait for their compilers.
            for process in _descendants(os.getpid()) - before:
                with suppress(OSError):
                    os.kill(process, signal.SIGKILL)
            raise

    @contextmanager
    def of(self, what: str, *shape: object) -> Iterator[None]:
        """A context for the compilation of `what`, such as "the training step".

        shape: everything that the time depends on; its text identifies earlier compilations of the same code.
        """
        key = hashlib.sha256(repr((what, shape, torch.__version__)).encode()).hexdigest()[:16]
        took = _times().get(key)
        usual = f"took {took:.0f} s last time" if took else "about a minute on two slow cores, once"
        self._say(f"compiling {what} ({usual})")
        start = time.perf_counter()
        with self.interruptible():
            yield
        _keep(key, time.perf_counter() - start)


def _path() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / TIMES


def _times() -> dict[str, float]:
    """Seconds by key; empty without a valid file of `_keep`."""
    with suppress(OSError, UserError):
        times: Any = read_json(_path(), 2**16, "times of compilations")
        if isinstance(times, dict):
            return {key: value for key, value in times.items() if isinstance(value, float) and value > 0}
    return {}


def _keep(key: str, seconds: float) -> None:
    times = {name: value for name, value in _times().items() if name != key}
    kept = dict([*times.items(), (key, seconds)][-MOST_TIMES:])
    # Do not fail only because the times cannot be saved.
    with suppress(OSError, UserError):
        write_whole(_path(), to_json(kept))


def _descendants(root: int) -> set[int]:
    """The descendants of a process; empty without /proc."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            # The name in brackets may hold spaces and brackets; the parent is the second word after it.
            parent = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found: set[int] = set()
    waiting = [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        found.update(below)
        waiting.extend(below)
    return found
