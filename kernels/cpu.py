"""The processor as Linux describes it."""

from functools import cache


@cache
def cpuinfo(field: str) -> str | None:
    """A field of the first processor in /proc/cpuinfo, such as "model name"; None where there is none."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), None)
    except OSError:
        return None
