"""Statistics of a few seeds: means, sample deviations, paired differences with 95 % t intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hrm.common.intervals import t_margin


@dataclass(frozen=True)
class Summary:
    """A summary of n >= 1 values: their mean, sample deviation (divisor n - 1) and the mean's interval.

    deviation and interval are None for a single value.
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
    margin = t_margin(values)
    return Summary(n, mean, deviation, (mean - margin, mean + margin))


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Summary | None:
    """Summary of value - baseline over the common seeds; None without a common seed.

    Both runs of a seed share initial weights and data order, so pairing removes the seed's common effect.
    """
    differences = [value - baseline[seed] for seed, value in values.items() if seed in baseline]
    return summarise(differences) if differences else None
