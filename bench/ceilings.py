"""Performance ceilings of a machine: bandwidth, matrix product rate, and product rates for a narrow model."""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch

from bench.counts import Work


class Ceilings(NamedTuple):
    """A machine's limits. flop: of dense bfloat16 products. source: of both numbers."""

    bytes_per_s: float
    flop_per_s: float
    source: str


MACHINES = {
    "A100": Ceilings(2.039e12, 312e12, "datasheet, A100 SXM 80 GB"),
    "H100": Ceilings(3.35e12, 989e12, "datasheet, H100 SXM"),
    "H200": Ceilings(4.3e12, 790e12, "measured: a copy, and a large product"),
    "B200": Ceilings(8.0e12, 2250e12, "datasheet, HGX B200"),
    "RTX 5090": Ceilings(1.792e12, 209.5e12, "datasheet, sums in float32"),
    "RTX 4090": Ceilings(1.008e12, 165.2e12, "datasheet, sums in float32"),
}


def roofline_time(bytes: int, flop: int, ceilings: Ceilings) -> float:
    """Minimum seconds for a launch: the maximum of the times for its bytes and for its FLOP."""
    return max(bytes / ceilings.bytes_per_s, flop / ceilings.flop_per_s)


def share(work: Work, seconds: float, ceilings: Ceilings) -> float:
    """The ratio of the minimum time to a measured time; 1 is on the roofline."""
    return roofline_time(work.bytes, work.flop, ceilings) / seconds


# Published rates of 16-bit products on Hopper, in FLOP/s. PyTorch's library reaches 584 T for 65,536 x 1,024
# x 1,024 (github.com/facebookexperimental/triton, pull request 1038). For 8,192 x 8,192 x 512 the library
# reaches 285.4 T, and Triton's tutorial 217.5 T with a program for each tile and 262.3 T with programs that
# take several tiles and overlap their ends (github.com/triton-lang/triton, pull request 5726). That GPU's
# clock is unknown, so only ratios are used.
LIBRARY = 584e12
OWN, OVERLAPPED = 217.5 / 285.4 * LIBRARY, 262.3 / 285.4 * LIBRARY


def published(ceilings: Ceilings, rate: float) -> Ceilings:
    """A machine with a published rate of products."""
    return ceilings._replace(flop_per_s=min(rate, ceilings.flop_per_s))


@cache
def measure() -> Ceilings:
    """The ceilings of the current CUDA device: the fastest of several copies of 2 GiB and products of 8192^3.

    A copy counts its bytes twice, read and written. Timed with CUDA events after a warm-up.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("measuring ceilings needs a CUDA device; give a machine instead")

    def seconds(call: Callable[[], object]) -> float:
        times = []
        for _ in range(20):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return min(times[5:])

    source, target = (torch.empty(2**31, dtype=torch.uint8, device="cuda") for _ in range(2))
    copy = seconds(partial(target.copy_, source))
    del source, target
    n = 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    multiply = seconds(lambda: a @ b)
    return Ceilings(2 * 2**31 / copy, 2 * n**3 / multiply, f"measured on {torch.cuda.get_device_name()}")
