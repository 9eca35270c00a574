"""The choice of the best evaluation, and early stopping."""

import math

import pytest
import torch

from hrm.training.early_stopping import Best, score

TWO_SETS = {
    "easy": {"count": 300.0, "accuracy": 0.9, "exact_accuracy": 0.5, "lm_loss": 0.2},
    "hard": {"count": 100.0, "accuracy": 0.5, "exact_accuracy": 0.1, "lm_loss": 1.0},
}


@pytest.mark.parametrize(
    ("metric", "expected"), [("exact_accuracy", 0.4), ("accuracy", 0.8), ("lm_loss", -0.4)]
)
def test_score_is_the_mean_over_sequences_higher_being_better(metric, expected):
    assert score(TWO_SETS, metric) == pytest.approx(expected, abs=1e-12)


def test_sets_without_sequences_do_not_count():
    # What is a mean over halted sequences is left out where there are none.
    empty = {"empty": {"count": 0.0, "lm_loss": 0.0}}
    assert score({**TWO_SETS, **empty}, "exact_accuracy") == pytest.approx(0.4, abs=1e-12)
    assert math.isnan(score(empty, "lm_loss")) and math.isnan(score({}, "accuracy"))
    with pytest.raises(KeyError, match="speed"):
        score(TWO_SETS, "speed")


def test_the_first_is_the_best_until_a_better_one_comes():
    best = Best()
    assert best.update(10, -2.5)
    assert (best.score, best.step, best.stale) == (-2.5, 10, 0)
    assert not best.update(20, -2.5) and not best.update(30, -3.0)
    assert (best.score, best.step, best.stale) == (-2.5, 10, 2)
    assert best.update(40, -2.4)
    assert (best.score, best.step, best.stale) == (-2.4, 40, 0)


def test_min_delta_is_how_much_better_a_score_must_be():
    best = Best(min_delta=0.25)
    assert [best.update(i, value) for i, value in enumerate([0.5, 0.75, 0.7, 0.76, 1.0])] == [
        True,
        False,
        False,
        True,
        False,
    ]
    assert (best.score, best.step, best.stale) == (0.76, 3, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_score_is_never_the_best(bad):
    best = Best()
    assert not best.update(1, bad)
    assert (best.score, best.step, best.stale) == (None, None, 1)
    assert best.update(2, 0.0) and not best.update(3, bad)
    assert (best.score, best.step, best.stale) == (0.0, 2, 1)
    assert best.update(4, 0.1)


def test_when_to_stop():
    best = Best()
    stops = []
    for step, value in enumerate([0.1, 0.3, 0.2, 0.3, 0.4, 0.0, 0.0, 0.0]):
        best.update(step, value)
        stops.append((best.should_stop(2), best.should_stop(3), best.should_stop(None)))
    assert [two for two, _, _ in stops] == [False, False, False, True, False, False, True, True]
    assert [three for _, three, _ in stops] == [False] * 7 + [True]
    assert not any(never for _, _, never in stops)
    assert not Best().should_stop(1)


def test_a_resumed_run_counts_on(tmp_path):
    best = Best(min_delta=0.1)
    for step, value in ((5, 0.5), (10, 0.4)):
        best.update(step, value)
    torch.save(best.state_dict(), tmp_path / "state")
    again = Best(min_delta=0.3)
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert again == Best(0.3, score=0.5, step=5, stale=1)
    assert not again.update(15, 0.7) and again.should_stop(2)
    fresh = Best()
    fresh.load_state_dict(Best().state_dict())
    assert fresh == Best()
