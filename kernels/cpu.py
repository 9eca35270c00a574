"""Reads Linux's description of the processor."""

from functools import cache


@cache
def cpuinfo(field: str) -> str | None:
    """A field of the first processor in /proc/cpuinfo, such as "model name"; None if missing."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), None)
    except OSError:
        return None


@cache
def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16 products; False if unknown."""
    flags = f"{cpuinfo('flags') or ''} {cpuinfo('Features') or ''}".split()
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)
