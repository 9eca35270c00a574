"""What ranks tell each other from processor to processor, beside what their devices exchange."""

import json
from collections.abc import Sequence
from statistics import median_low
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# A rank is slow that takes so many times the median, at so many calls in a row.
SLOW = 1.5
CALLS = 5


class Agreement:
    """The ranks' talk over a gloo group of its own, so that it never waits for a device.

    Every method but `finish` is for all ranks to call together.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._size = group, group.size()
        self._under_way: tuple[Any, Tensor] | None = None
        # Calls in a row at which each rank was slow; -1 once it has been told.
        self._slow = [0] * self._size

    def highest(self, code: int) -> int:
        """The highest code that any rank gave at the call before, 0 at the first; sends off this one's."""
        earlier = self._finished()
        value = torch.tensor([code])
        self._under_way = (dist.all_reduce(value, dist.ReduceOp.MAX, self._group, async_op=True), value)
        return earlier

    def _finished(self) -> int:
        if self._under_way is None:
            return 0
        work, value = self._under_way
        self._under_way = None
        work.wait()
        return int(value)

    def finish(self) -> None:
        """Waits for what the last call of `highest` sent: every rank must have made as many."""
        self._finished()

    def all_gather(self, value: object) -> list[Any]:
        """Every rank's value, in rank order, as JSON carries it: nothing of a peer's is unpickled."""
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self._size)]
        dist.all_gather(lengths, torch.tensor([len(mine)]), self._group)
        padded = mine.new_zeros(max(int(length) for length in lengths))
        padded[: len(mine)] = mine
        texts = [torch.empty_like(padded) for _ in range(self._size)]
        dist.all_gather(texts, padded, self._group)
        return [
            json.loads(bytes(text[: int(length)].numpy()))
            for text, length in zip(texts, lengths, strict=True)
        ]

    def stragglers(self, seconds: float) -> str | None:
        """A line on the ranks that have just been slow for CALLS calls; None if there are none."""
        times = self.all_gather(seconds)
        found = newly_slow(times, self._slow)
        if not found:
            return None
        told = ", ".join(f"rank {rank} takes {1000 * times[rank]:.3g} ms a step" for rank in found)
        return (
            f"{told}, half of the ranks at most {1000 * median_low(times):.3g} ms: all go at the pace of the "
            "slowest; look for other work or a throttled device there"
        )


def newly_slow(times: Sequence[float], slow: list[int]) -> list[int]:
    """The ranks that take over SLOW times the median for the CALLS-th time in a row, and were not told yet.

    slow: calls in a row at which each was slow, -1 once told; brought up to date in place.
    """
    limit = SLOW * median_low(times)
    for rank, seconds in enumerate(times):
        if slow[rank] >= 0:
            slow[rank] = slow[rank] + 1 if seconds > limit else 0
    found = [rank for rank, calls in enumerate(slow) if calls == CALLS]
    for rank in found:
        slow[rank] = -1
    return found
