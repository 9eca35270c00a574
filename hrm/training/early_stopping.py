"""Which evaluation is the best so far, and when a run has gone on long enough without a better one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The metrics of which less is better.
LOSSES = ("lm_loss",)


def score(results: Mapping[str, Mapping[str, float]], metric: str) -> float:
    """How good an evaluation is by one metric, higher being better; a loss counts with its sign turned.

    results: metrics by set, as `Engine.evaluate` returns them. Returns the mean over the sets, weighted by
    their counts of sequences; NaN where there are none.
    """
    counted = [found for found in results.values() if found["count"]]
    if not counted:
        return math.nan
    mean = sum(found["count"] * found[metric] for found in counted) / sum(found["count"] for found in counted)
    return -mean if metric in LOSSES else mean


@dataclass
class Best:
    """The best score so far, the step it was reached at, and the evaluations since (`stale`).

    A score is better when it is above the best by more than `min_delta`; the first one is. A score that is
    not finite never is.
    """

    min_delta: float = 0.0
    score: float | None = None
    step: int | None = None
    stale: int = 0

    def update(self, step: int, score: float) -> bool:
        """Takes in the evaluation of `step`; returns whether it is the best."""
        improved = math.isfinite(score) and (self.score is None or score > self.score + self.min_delta)
        if improved:
            self.score, self.step, self.stale = score, step, 0
        else:
            self.stale += 1
        return improved

    def should_stop(self, patience: int | None) -> bool:
        """Whether `patience` evaluations in a row brought no better one; never where it is None."""
        return patience is not None and self.stale >= patience

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {"score": self.score, "step": self.step, "stale": self.stale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`; `min_delta` stays this run's own."""
        self.score, self.step, self.stale = state["score"], state["step"], state["stale"]
