"""Loss spikes: a step whose loss lies far above what is usual for the run, judged from the losses alone."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

# Losses that are usual are the last of so many steps, and none is judged by fewer than so many.
WINDOW, LEAST = 200, 50
# The standard deviation of a normal distribution over its median absolute deviation.
NORMAL = 1.4826
# No spread is taken for smaller than this share of the usual loss, nor than so many nats: the losses of a
# model that has all but learnt its task spread little, and jump by many times that at a hard batch.
SHARE, NATS = 0.05, 0.05
# Usual losses in a row after which a spike is over, and the next one is told.
CALM = 20


@dataclass(frozen=True)
class Spike:
    """A step's loss far above the `usual` one, the median of the steps before it, whose `spread` is given."""

    step: int
    loss: float
    usual: float
    spread: float

    def __str__(self) -> str:
        return (
            f"the loss of step {self.step} is {self.loss:.4g}, usual is {self.usual:.4g} ± {self.spread:.2g}"
        )


class LossWatch:
    """Tells the steps whose loss is a spike, each spike once.

    A loss is one when it lies above the median of the last WINDOW losses by more than `threshold` times their
    spread: their median absolute deviation, scaled to a normal distribution's standard deviation. Neither
    moves for a few outliers, so a spike does not make the next one usual, but a level that stays for half of
    the window is no spike any more. Losses that are not finite are passed over.
    On the losses of small v1, gated and TRM runs, in batches of 16 and 64, a healthy one strayed by 6.5
    spreads at the most, a batch with shuffled labels by 17.7 at the least, and runs at 30 times the learning
    rate by 11.8 and 14.3. In batches of 4 a single sequence can make 20.
    """

    def __init__(self, threshold: float | None) -> None:
        """threshold: in spreads; None for not looking."""
        self.threshold = threshold
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._calm = 0

    def check(self, steps: Sequence[int], losses: Sequence[float]) -> Spike | None:
        """Takes in the losses of steps that follow each other; returns the first that is a new spike.

        losses: a mean over the sequences of each step, in nats. The answers depend on the losses alone, not
        on how they are dealt out to calls.
        """
        if self.threshold is None:
            return None
        judged = [
            self._judge(step, loss, self.threshold)
            for step, loss in zip(steps, losses, strict=True)
            if math.isfinite(loss)
        ]
        return next(filter(None, judged), None)

    def _judge(self, step: int, loss: float, threshold: float) -> Spike | None:
        usual = spread = math.inf
        if len(self._losses) >= LEAST:
            usual = median(self._losses)
            deviation = NORMAL * median(abs(loss - usual) for loss in self._losses)
            spread = max(deviation, SHARE * abs(usual), NATS)
        self._losses.append(loss)
        if loss <= usual + threshold * spread:
            self._calm += 1
            return None
        is_new, self._calm = self._calm >= CALM, 0
        return Spike(step, loss, usual, spread) if is_new else None

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {"losses": list(self._losses), "calm": self._calm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict` and judges as its run did; `threshold` stays this run's own."""
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self._calm = state["calm"]
