"""The best evaluation so far, and the decision to stop a run early."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Metrics that are better when lower.
LOSSES = ("lm_loss",)


def score(results: Mapping[str, Mapping[str, float]], metric: str) -> float:
    """The score of an evaluation by one metric; higher is better, so a loss is negated.

    results: metrics by set, as `Engine.evaluate` returns them. Returns the mean over all sequences of all
    sets; NaN without sequences.
    """
    counted = [found for found in results.values() if found["count"]]
    if not counted:
        return math.nan
    mean = sum(found["count"] * found[metric] for found in counted) / sum(found["count"] for found in counted)
    return -mean if metric in LOSSES else mean


@dataclass
class Best:
    """The best score so far, its step, and the number of evaluations since (`stale`).

    A finite score is the new best if it is the first one or exceeds the best by more than `min_delta`.
    """

    min_delta: float = 0.0
    score: float | None = None
    step: int | None = None
    stale: int = 0

    def update(self, step: int, score: float) -> bool:
        """Records the evaluation of `step`; returns whether it is the new best."""
        improved = math.isfinite(score) and (self.score is None or score > self.score + self.min_delta)
        if improved:
            self.score, self.step, self.stale = score, step, 0
        else:
            self.stale += 1
        return improved

    def should_stop(self, patience: int | None) -> bool:
        """Whether the last `patience` evaluations had no new best; never if patience is None."""
        return patience is not None and self.stale >= patience

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {"score": self.score, "step": self.step, "stale": self.stale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`; keeps the current `min_delta`."""
        self.score, self.step, self.stale = state["score"], state["step"], state["stale"]
