"""The machine that results come from."""

import platform

from kernels.cpu import cpuinfo


def processor() -> str:
    """The processor's name as the system gives it."""
    return cpuinfo("model name") or platform.processor()
