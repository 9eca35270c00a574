"""Means, deviations and t intervals, against printed tables and sums done by hand."""

import math

import numpy as np
import pytest

from hrm.common.intervals import t_margin
from hrm.study.statistics import paired_difference, summarise

# Two-sided 95 %, as tables of Student's distribution print them.
TABLE = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    9: 2.262,
    10: 2.228,
    29: 2.045,
    30: 2.042,
    120: 1.980,
}


@pytest.mark.parametrize("freedom", TABLE)
def test_margins_are_those_of_the_tables(freedom):
    # Half of the values 1 above their mean and half 1 below, one at it where their number is odd.
    n = freedom + 1
    values = np.concatenate([np.ones(n // 2), -np.ones(n // 2), np.zeros(n % 2)])
    deviation = math.sqrt((n - n % 2) / freedom)
    assert t_margin(values) == pytest.approx(TABLE[freedom] * deviation / math.sqrt(n), rel=3e-4)


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
