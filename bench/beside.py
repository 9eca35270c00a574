"""Other processes beside a measurement: how many CPUs they took while it ran, as Linux counts them."""

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
# Above this many CPUs a time says more of the other processes than of what was timed.
IDLE_CPUS = 0.15


class Beside:
    """`with Beside() as beside: ...` counts the CPUs that other processes took meanwhile.

    seconds: how long it took. others: the mean number of CPUs, among them what a virtual machine's host took
    away; None where there is no /proc/stat. Children that this process waited for are no others.
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
    """Seconds that the machine's CPUs have worked or were taken away; None where Linux does not say."""
    try:
        fields = STAT.read_text().partition("\n")[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _waiting, irq, softirq, stolen = map(int, fields)
    return (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")
