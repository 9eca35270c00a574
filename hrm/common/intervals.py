"""Student's t, for intervals of means."""

import math
from functools import cache
from statistics import NormalDist

# Degrees of freedom whose t is within 3e-4 of the normal distribution's.
MOST_FREEDOM = 10_000


@cache
def t_quantile(confidence: float, freedom: int) -> float:
    """The two-sided quantile of Student's t distribution: |T| <= t with probability `confidence`.

    confidence: in (0, 1). freedom: degrees of freedom, an integer >= 1. Computed by bisection of the
    distribution's finite series, to twelve digits; above MOST_FREEDOM the normal distribution's. Raises
    ValueError for other arguments.
    """
    if not 0 < confidence < 1 or freedom < 1:
        raise ValueError(f"confidence={confidence} must lie in (0, 1), and freedom={freedom} be at least 1")
    if freedom > MOST_FREEDOM:
        return NormalDist().inv_cdf((1 + confidence) / 2)
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
