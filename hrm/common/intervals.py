"""The confidence level of every interval, and Student's interval of a mean."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95


def t_margin(values: Sequence[float] | np.ndarray) -> float:
    """Half the width of the interval of CONFIDENCE around the mean of n >= 2 independent normal values."""
    n = len(values)
    return float(stdtrit(n - 1, (1 + CONFIDENCE) / 2) * np.std(values, ddof=1) / math.sqrt(n))
