"""Loss spikes: steps with a loss far above the usual loss of the run."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

# The usual loss is the median of the last WINDOW steps; a spike needs at least LEAST earlier steps.
WINDOW, LEAST = 200, 50
# Ratio of a normal distribution's standard deviation to its median absolute deviation.
NORMAL = 1.4826
# Minimum spread, as a share of the usual loss and in nats: when a model has nearly learnt its task, losses
# hardly vary, and a hard batch would exceed them by many times their spread.
SHARE, NATS = 0.05, 0.05
# Number of consecutive usual losses that end a spike; the next high loss is a new spike.
CALM = 20


@dataclass(frozen=True)
class Spike:
    """A step whose loss exceeds `usual`, the median of earlier steps, by many times their `spread`."""

    step: int
    loss: float
    usual: float
    spread: float

    def __str__(self) -> str:
        return (
            f"the loss of step {self.step} is {self.loss:.4g}, usual is {self.usual:.4g} ± {self.spread:.2g}"
        )


class LossWatch:
    """Finds loss spikes and reports each once.

    A loss is a spike if it exceeds the median of the last WINDOW losses by more than `threshold` times their
    spread, the median absolute deviation scaled to a normal distribution's standard deviation. A few outliers
    change neither; a level that lasts for half of the window becomes the usual level. Losses that are not
    finite are ignored. Measured on small v1, gated and TRM runs with batches of 16 and 64: healthy losses
    deviate by at most 6.5 spreads, batches with shuffled labels by at least 17.7, runs at 30 times the
    learning rate by 11.8 and 14.3. In batches of 4, a single sequence can cause a deviation of 20.
    """

    def __init__(self, threshold: float | None) -> None:
        """threshold: in spreads; None disables the search."""
        self.threshold = threshold
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._calm = 0

    def check(self, steps: Sequence[int], losses: Sequence[float]) -> Spike | None:
        """Records the losses of consecutive steps; returns the first new spike among them.

        losses: mean over the sequences of each step, in nats. The result does not depend on the division into
        calls.
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
        """Continues from a `state_dict`; keeps the current `threshold`."""
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self._calm = state["calm"]
