"""Means, deviations and t intervals, against printed tables, a numerical integral and sums done by hand."""

import math

import numpy as np
import pytest

from hrm.common.intervals import t_quantile
from hrm.study.statistics import paired_difference, summarise

# Two-sided 95 % and 99 %, as tables of Student's distribution print them.
TABLE = {
    1: (12.706, 63.657),
    2: (4.303, 9.925),
    3: (3.182, 5.841),
    4: (2.776, 4.604),
    5: (2.571, 4.032),
    9: (2.262, 3.250),
    10: (2.228, 3.169),
    29: (2.045, 2.756),
    30: (2.042, 2.750),
    120: (1.980, 2.617),
}


@pytest.mark.parametrize("freedom", TABLE)
def test_quantiles_are_those_of_the_tables(freedom):
    for confidence, printed in zip((0.95, 0.99), TABLE[freedom], strict=True):
        assert t_quantile(confidence, freedom) == pytest.approx(printed, abs=5.1e-4)


@pytest.mark.parametrize("freedom", [1, 2, 3, 8, 15])
@pytest.mark.parametrize("confidence", [0.1, 0.5, 0.95])
def test_the_density_between_the_quantiles_is_the_confidence(freedom, confidence):
    t, step = np.linspace(0, t_quantile(confidence, freedom), 200_001, retstep=True)
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    density = scale * (1 + t * t / freedom) ** (-(freedom + 1) / 2)
    integral = step * (density.sum() - (density[0] + density[-1]) / 2)
    assert 2 * integral == pytest.approx(confidence, abs=1e-8)


def test_closed_forms():
    # One degree: t = tan(pi p / 2). Two: t^2 = 2 p^2 / (1 - p^2).
    assert t_quantile(0.5, 1) == pytest.approx(1, rel=1e-12)
    assert t_quantile(0.95, 1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-12)
    assert t_quantile(0.95, 2) == pytest.approx(math.sqrt(2 * 0.9025 / 0.0975), rel=1e-12)
    # Towards the normal distribution's.
    assert t_quantile(0.95, 100_000) == pytest.approx(1.959964, abs=3e-5)


def test_invalid_confidence_or_freedom_is_refused():
    for confidence, freedom in ((0.0, 1), (1.0, 1), (0.95, 0)):
        with pytest.raises(ValueError, match=str(confidence)):
            t_quantile(confidence, freedom)


def test_a_summary_by_hand():
    # Mean 5; squares 9 + 1 + 16 = 26, over 2 is 13; margin 4.302653 * sqrt(13 / 3).
    found = summarise([2.0, 4.0, 9.0])
    assert (found.n, found.mean) == (3, 5.0)
    assert found.deviation == pytest.approx(math.sqrt(13), rel=1e-12)
    margin = 4.302653 * math.sqrt(13 / 3)
    assert found.interval == pytest.approx((5 - margin, 5 + margin), abs=1e-5)
    assert not found.clear


def test_an_interval_on_one_side_of_zero_is_clear_and_one_that_touches_it_is_not():
    assert summarise([1.0, 1.1, 0.9]).clear and summarise([-1.0, -1.1, -0.9]).clear
    assert not summarise([-0.1, 0.1]).clear
    assert not summarise([0.0, 0.0]).clear


def test_one_value_has_no_spread_and_none_no_summary():
    found = summarise([0.7])
    assert (found.n, found.mean, found.deviation, found.interval) == (1, 0.7, None, None)
    assert not found.clear
    with pytest.raises(ValueError, match="no values"):
        summarise([])


def test_differences_are_paired_by_seed_over_those_that_both_have():
    found = paired_difference({2: 0.9, 0: 0.5, 7: 9.0}, {0: 0.4, 2: 0.5, 1: 5.0})
    # 0.4 and 0.1: mean 0.25, deviation 0.3 / sqrt(2), margin 12.7062 * 0.15.
    assert found is not None and found.n == 2 and found.mean == pytest.approx(0.25)
    assert found.deviation == pytest.approx(0.3 / math.sqrt(2))
    assert found.interval == pytest.approx((0.25 - 1.905931, 0.25 + 1.905931), abs=1e-5)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_pairing_removes_the_seeds_common_effect():
    base = {0: 0.2, 1: 0.5, 2: 0.8}
    found = paired_difference({seed: score + 0.1 + 0.01 * seed for seed, score in base.items()}, base)
    assert found is not None and found.clear and found.mean == pytest.approx(0.11)
