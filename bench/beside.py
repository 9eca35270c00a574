"""Measures how many CPUs other processes use during a measurement, from Linux's counters."""

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
# Above this many CPUs a time depends mostly on other processes.
IDLE_CPUS = 0.15


class Beside:
    """`with Beside() as beside: ...` measures the CPUs that other processes use during the block.

    seconds: duration of the block. others: mean number of CPUs, including steal time of a virtual machine;
    None without /proc/stat. Children that this process has waited for do not count.
    """

    seconds: float
    others: float | None

    def __enter__(self) -> "Beside":
        self._start = time.perf_counter(), _all_seconds(), _own_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        start, everything, own = self._start
        self.seconds, self.others, now = time.perf_counter() - start, None, _all_seconds()
        if everything is not None and now is not None:
            others = now - everything - (_own_seconds() - own)
            self.others = max(0.0, others / self.seconds)


def _own_seconds() -> float:
    return sum(os.times()[:4])


def _all_seconds() -> float | None:
    """CPU seconds of the machine, busy or stolen; None if unknown."""
    try:
        fields = STAT.read_text().partition("\n")[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _waiting, irq, softirq, stolen = map(int, fields)
    return (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")
