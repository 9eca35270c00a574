"""Statistics of a few seeds: means, sample deviations, paired differences with 95 % t intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """n >= 1 values in their own unit: their mean, deviation (divided by n - 1) and the mean's interval.

    deviation and interval are None for one value, which says nothing about the spread.
    """

    n: int
    mean: float
    deviation: float | None
    interval: tuple[float, float] | None

    @property
    def clear(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def summarise(values: Sequence[float]) -> Summary:
    """Mean, sample deviation and 95 % t interval of finite values, taken as independent and normal.

    Raises ValueError for no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no values to summarise")
    mean = math.fsum(values) / n
    if n == 1:
        return Summary(n, mean, None, None)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    margin = t_quantile(CONFIDENCE, n - 1) * deviation / math.sqrt(n)
    return Summary(n, mean, deviation, (mean - margin, mean + margin))


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Summary | None:
    """Summary of value - baseline over the seeds that both have; None where they share none.

    A seed sets the weights' draws and the data's order of both, so that what it does to both falls out.
    """
    differences = [value - baseline[seed] for seed, value in values.items() if seed in baseline]
    return summarise(differences) if differences else None


def t_quantile(confidence: float, freedom: int) -> float:
    """The t that Student's distribution stays within, either side of 0, with probability `confidence`.

    confidence: in (0, 1). freedom: degrees, a whole number >= 1. By bisection of the distribution's finite
    series, to twelve digits. Raises ValueError for other arguments.
    """
    if not 0 < confidence < 1 or freedom < 1:
        raise ValueError(f"confidence={confidence} must lie in (0, 1), and freedom={freedom} be at least 1")
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _within(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(high)


def _within(angle: float, freedom: int) -> float:
    """P(|T| <= t) with t = sqrt(freedom) tan(angle): Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    # odd: cos + 2/3 cos^3 + 2*4/(3*5) cos^5 + ...;  even: 1 + 1/2 cos^2 + 1*3/(2*4) cos^4 + ...
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(odd, freedom, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
