"""CPU threads: how many this process may use, and how they wait.

`configure` runs when `hrm` is imported, because OpenMP reads its environment once, when PyTorch loads.
"""

import math
import os
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path

THREADS_HELP = """
Environment:
  OMP_NUM_THREADS  threads on a CPU; unset, as many as this process may use: its affinity and its cgroup's
                   quota, shared among the ranks that torchrun starts on one machine
  OMP_WAIT_POLICY  PASSIVE if unset: threads sleep while they wait; ACTIVE lets them spin"""
_ROOT = Path("/")
# The OMP_NUM_THREADS that `configure` set; empty when it set none.
_configured = [""]


def usable_cpus(root: Path = _ROOT) -> int:
    """CPUs that this process may use: its affinity, or less under a cgroup's CPU quota, rounded up.

    root: where /proc and /sys are. A container with `--cpus=1.5` on a large host gives 2.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cpus, *map(math.ceil, _quotas(root))]))


def configure(environ: MutableMapping[str, str] = os.environ, root: Path = _ROOT) -> None:
    """Sets the environment variables of OpenMP and the compiler that the user has not set.

    Threads sleep at a barrier. If another process is busy, spinning threads take CPU time from the thread
    that all wait for, and steps become several times slower. The number of threads follows a cgroup's quota
    and, under torchrun, this rank's share of the machine; otherwise PyTorch chooses it.
    """
    environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    given = environ.get("LOCAL_WORLD_SIZE", "1")
    ranks = max(1, int(given)) if given.isdecimal() else 1
    if ranks > 1 and environ.get("OMP_NUM_THREADS") == "1" and not _launched_with_threads(root):
        # torchrun's default, which leaves most of a large machine idle.
        del environ["OMP_NUM_THREADS"]
    share = max(1, usable_cpus(root) // ranks)
    if share < (os.cpu_count() or 1) and (ranks > 1 or list(_quotas(root))):
        if "OMP_NUM_THREADS" not in environ:
            environ["OMP_NUM_THREADS"] = _configured[0] = str(share)
        environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(share))


def threads_of_each(processes: int) -> dict[str, str]:
    """Environment variables that divide the CPUs among processes; empty for one process or a user's
    choice."""
    if processes == 1 or os.environ.get("OMP_NUM_THREADS", "") != _configured[0]:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, usable_cpus() // processes))}


def threads_note(threads: int) -> str:
    """A text with this process's number of threads, and the reason if a setting or a limit reduced it."""
    cpus, present = usable_cpus(), os.cpu_count() or 1
    limit = f" ({cpus} of {present} CPUs may be used)" if cpus < present else ""
    return f"{threads} thread{'s' * (threads != 1)}{limit}"


def _launched_with_threads(root: Path) -> bool:
    """Whether the user set OMP_NUM_THREADS in the launcher's environment."""
    with suppress(OSError):
        return b"OMP_NUM_THREADS=" in (root / f"proc/{os.getppid()}/environ").read_bytes()
    return True


def _quotas(root: Path) -> Iterator[float]:
    """The CPU quotas of this process, in CPUs: cgroup v2's cpu.max, v1's cpu.cfs_quota_us."""
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            mount = root / "sys/fs/cgroup" / controllers
            # Inside a container the path may be the host's; the container's own group is then at the mount.
            inner = Path(path.lstrip("/"))
            for folder in (mount / inner, *(mount / parent for parent in inner.parents)):
                yield from _quota(folder)


def _quota(folder: Path) -> Iterator[float]:
    """Yields a cgroup's quota in CPUs, or nothing without a quota."""
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        if quota != "max":
            yield int(quota) / int(period)
    with suppress(OSError, ValueError):
        microseconds = int((folder / "cpu.cfs_quota_us").read_text())
        if microseconds > 0:
            yield microseconds / int((folder / "cpu.cfs_period_us").read_text())
