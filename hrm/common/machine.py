"""Describes the machine that produces results."""

import platform

from kernels.cpu import cpuinfo


def processor() -> str:
    """The processor's name, as the system reports it."""
    return cpuinfo("model name") or platform.processor()
