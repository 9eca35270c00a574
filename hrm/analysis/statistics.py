"""Estimates with their 95 % intervals over puzzles, calibration, and principal components."""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from hrm.common.intervals import CONFIDENCE, t_margin
from hrm.evaluation.selection import share

# Number of bins of equal width for calibration.
BINS = 10
# Number of draws of a calibrated model's outcomes.
DRAWS = 2000
Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


class Estimate(NamedTuple):
    """A mean over n puzzles and its confidence interval of level CONFIDENCE; NaN without puzzles."""

    value: float
    low: float
    high: float
    n: int


def share_of(mask: np.ndarray) -> Estimate:
    """The share of puzzles under a mask (n,), or the mean of shares (n,); see `selection.share`."""
    return Estimate(*share(mask), len(mask))


def mean_of(values: np.ndarray, least: float = 0.0) -> Estimate:
    """The mean of values (n,) >= least, with Student's interval cut off there; none for one value."""
    values = np.asarray(values, np.float64)
    n = len(values)
    if n < 2:
        value = float(values[0]) if n else math.nan
        return Estimate(value, math.nan, math.nan, n)
    mean, half = float(values.mean()), t_margin(values)
    return Estimate(mean, max(least, mean - half), mean + half, n)


def change_of(before: np.ndarray, after: np.ndarray) -> Estimate:
    """The difference after - before of two shares of the same n puzzles, masks (n,).

    The interval is Wald's with half a puzzle added to either kind of change (Agresti and Min 2005), so it has
    a width even where nothing changed.
    """
    n = len(before)
    if not n:
        return Estimate(math.nan, math.nan, math.nan, 0)
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    middle = (gained - lost) / (n + 2)
    half = Z * math.sqrt(max(0.0, (gained + lost + 1) / (n + 2) - middle**2) / (n + 2))
    return Estimate((gained - lost) / n, max(-1.0, middle - half), min(1.0, middle + half), n)


class Calibration(NamedTuple):
    """Compares confidences (n,) with outcomes.

    counts, confidence, accuracy: by bin, (BINS,); means are NaN in an empty bin. error: the expected
    calibration error (ECE), the mean over puzzles of |accuracy - confidence| of their bin. by_chance: the
    mean ECE of a calibrated model with the same confidences. excess: error - by_chance, with an interval from
    the spread of that model's ECE, clipped at 0; it starts at 0 if the model may be calibrated.
    """

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    error: float
    by_chance: float
    excess: Estimate


def calibration(confidence: np.ndarray, right: np.ndarray, seed: int = 0) -> Calibration:
    """The calibration of confidences (n,) in [0, 1] for outcomes (n,) bool.

    Finite samples make the ECE of a calibrated model positive, so it is compared with DRAWS of outcomes that
    follow the confidences (consistency resampling: Bröcker and Smith 2007).
    """
    n = len(confidence)
    confidence = np.asarray(confidence, np.float64)
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    sums = np.bincount(place, weights=confidence, minlength=BINS)
    hits = np.bincount(place, weights=right, minlength=BINS)
    error = float(np.abs(hits - sums).sum() / n) if n else math.nan
    rng = np.random.default_rng(seed)
    null = np.zeros(DRAWS)
    for draw in range(DRAWS if n else 0):
        drawn = np.bincount(place, weights=rng.random(n) < confidence, minlength=BINS)
        null[draw] = np.abs(drawn - sums).sum() / n
    low, high = np.quantile(null, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    by_chance = float(null.mean())
    excess = Estimate(
        max(0.0, error - by_chance), max(0.0, error - float(high)), max(0.0, error - float(low)), n
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        return Calibration(counts, sums / counts, hits / counts, error, by_chance, excess)


def principal_plane(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The coordinates (n, 2) of points (n, F) on their first two principal components, and their shares (2,)
    of the variance. The sign of a component makes its largest coordinate positive. Missing components are 0.
    """
    centred = np.asarray(points, np.float64)
    centred = centred - centred.mean(axis=0)
    # n is small and F large, so the Gram matrix is the smaller one.
    values, vectors = np.linalg.eigh(centred @ centred.T)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    plane = np.zeros((len(points), 2))
    found = vectors[:, :2] * np.sqrt(values[:2])
    plane[:, : found.shape[1]] = found
    largest = np.take_along_axis(plane, np.abs(plane).argmax(axis=0)[None], axis=0)
    shares = np.zeros(2)
    if total := float(values.sum()):
        shares[: len(values)] = values[:2] / total
    return plane * np.where(largest < 0, -1.0, 1.0), shares


# --- as text


def percent(estimate: Estimate, digits: int = 1) -> str:
    """A share in percent with its interval: 93.1 % [90.2, 95.3]."""
    if math.isnan(estimate.value):
        return "-"
    value, low, high = (f"{100 * part:.{digits}f}" for part in estimate[:3])
    return f"{value} %" if math.isnan(estimate.low) else f"{value} % [{low}, {high}]"


def points(estimate: Estimate) -> str:
    """A difference of shares in percentage points with its interval: +0.4 [-0.2, +1.0]."""
    if math.isnan(estimate.value):
        return "-"
    value, low, high = (f"{100 * part + 0.0:+.1f}" for part in estimate[:3])
    return f"{value} [{low}, {high}]"


def number(estimate: Estimate) -> str:
    """A mean with its interval, to three digits: 0.123 [0.111, 0.135]."""
    if math.isnan(estimate.value):
        return "-"
    value, low, high = (f"{part:.3g}" for part in estimate[:3])
    return value if math.isnan(estimate.low) else f"{value} [{low}, {high}]"
