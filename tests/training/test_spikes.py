"""Loss spikes: what is told, once, and that a resumed run judges as one left alone."""

import json
import math
import random

import pytest

from hrm.checkpoint.safe_io import plain
from hrm.training.spikes import CALM, LEAST, WINDOW, LossWatch, Spike

THRESHOLD = 10.0


def told(losses: list[float], watch: LossWatch | None = None, first: int = 1) -> list[Spike]:
    """Every spike of a run whose losses are looked at one by one."""
    watch = watch or LossWatch(THRESHOLD)
    found = [watch.check([step], [loss]) for step, loss in enumerate(losses, first)]
    return [spike for spike in found if spike]


def learning(steps: int, seed: int = 0) -> list[float]:
    """Losses that fall from 2 to 0.6 and scatter as those of small batches do, some far up."""
    rng = random.Random(seed)
    return [
        0.6 + 1.4 * math.exp(-step / 150) + 0.05 * rng.gauss(0, 1) + rng.expovariate(20)
        for step in range(steps)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_a_learning_run_has_no_spikes(seed):
    assert told(learning(1500, seed)) == []


@pytest.mark.parametrize("at", [500, 1400])
def test_a_spike_is_reported_at_its_step(at):
    losses = learning(1500)
    losses[at - 1] += 2.0
    (spike,) = told(losses)
    assert spike.step == at and spike.loss == losses[at - 1]


def test_the_usual_loss_and_its_spread_are_the_median_and_its_scaled_deviation():
    # Half of the losses lie 0.2 from the median of 1, so the deviation is 0.2.
    losses = [0.8, 1.0, 1.2, 1.2, 0.8, 1.0, 0.8, 1.2] * 10
    spread = 1.4826 * 0.2
    below = 1.0 + THRESHOLD * spread - 1e-6
    assert told([*losses, below]) == []
    (spike,) = told([*losses, below + 2e-6])
    assert (spike.step, spike.usual) == (81, 1.0) and spike.spread == pytest.approx(spread)
    assert str(spike) == "the loss of step 81 is 3.965, usual is 1 ± 0.3"


@pytest.mark.parametrize("level, spread", [(4.0, 0.2), (0.01, 0.05), (-4.0, 0.2)])
def test_nearly_constant_losses_have_a_minimum_spread(level, spread):
    assert told([level] * LEAST + [level + 9.9 * spread]) == []
    assert told([level] * LEAST + [level + 10.1 * spread]) == [
        Spike(LEAST + 1, level + 10.1 * spread, level, spread)
    ]


def test_a_short_history_reports_no_spikes():
    assert told([1.0] * (LEAST - 1) + [50.0]) == []
    assert [spike.step for spike in told([1.0] * LEAST + [50.0])] == [LEAST + 1]


def test_the_history_has_only_the_last_steps():
    old, new = [3.0] * 500, [1.0] * WINDOW
    assert [spike.step for spike in told([*old, *new, 2.0])] == [701]


def test_a_falling_loss_is_not_a_spike():
    assert told([1.0] * 100 + [0.0, -50.0]) == []


def test_a_lasting_level_is_reported_once_and_becomes_usual():
    assert [spike.step for spike in told([1.0] * 300 + [5.0] * 700)] == [301]
    # And from the new level a spike is told again.
    again = told([1.0] * 300 + [5.0] * 300 + [20.0])
    assert [(spike.step, spike.usual) for spike in again] == [(301, 1.0), (601, 5.0)]


def test_oscillating_losses_are_reported_once_until_calm():
    jumps = [5.0, 1.0, 1.0, 1.0] * 25
    assert [spike.step for spike in told([1.0] * 200 + jumps)] == [201]
    for pause, steps in ((CALM - 1, [201]), (CALM, [201, 202 + CALM])):
        assert [spike.step for spike in told([1.0] * 200 + [5.0] + [1.0] * pause + [5.0])] == steps


def test_non_finite_losses_are_ignored():
    losses = [1.0] * 100
    for step in (10, 30, 50, 60, 70):
        losses[step] = (math.nan, math.inf, -math.inf)[step % 3]
    assert told([*losses, math.nan, math.inf, 1.2]) == []
    watch = LossWatch(THRESHOLD)
    assert [spike.step for spike in told([*losses, math.inf, 9.0], watch)] == [102]
    assert watch.state_dict()["losses"] == [loss for loss in [*losses, 9.0] if math.isfinite(loss)]
    assert told([1.0] * 60 + [1e308, 1e308, 1.0])[0].loss == 1e308


def test_the_first_of_several_spikes_is_returned():
    watch = LossWatch(THRESHOLD)
    losses = [1.0] * 100 + [9.0] + [1.0] * CALM + [7.0]
    spike = watch.check(range(1, len(losses) + 1), losses)
    assert spike is not None and (spike.step, spike.loss) == (101, 9.0)
    assert watch.state_dict() == {"losses": losses, "calm": 0}
    with pytest.raises(ValueError, match="zip"):
        watch.check([1, 2], [1.0])


def test_no_spikes_without_a_threshold():
    watch = LossWatch(None)
    assert told([1.0] * 100 + [1e9], watch) == [] and watch.state_dict()["losses"] == []


@pytest.mark.parametrize("cut", [1, 30, 400, 401, 402, 420, 500])
def test_a_resumed_run_finds_the_same_spikes(cut):
    losses = learning(600)
    for step in (401, 410, 440):
        losses[step - 1] = 5.0
    whole = told(losses)
    assert [spike.step for spike in whole] == [401, 440]
    for size in (1, 7, 50):
        watch, found = LossWatch(THRESHOLD), []
        for first in range(0, 600, size):
            if first // size == cut // size:
                # As a checkpoint keeps it.
                state = plain(json.loads(json.dumps(watch.state_dict())), "spikes")
                watch = LossWatch(THRESHOLD)
                watch.load_state_dict(state)
            steps = range(first + 1, min(first + size, 600) + 1)
            found.append(watch.check(steps, losses[first : first + size]))
        # A call tells the first of its spikes: those here are further apart than its steps.
        expected = whole if size < 39 else [spike for spike in whole if spike.step == 401]
        assert [spike for spike in found if spike] == expected


def test_a_rewound_run_does_not_remember_the_spike():
    watch = LossWatch(THRESHOLD)
    watch.check(range(1, 101), [1.0] * 100)
    before = watch.state_dict()
    assert watch.check([101], [9.0]) is not None
    watch.load_state_dict(before)
    assert watch.check([101], [1.0]) is None and watch.check([102], [9.0]) is not None
    # The checkpoint's own numbers stay as they were.
    assert before == {"losses": [1.0] * 100, "calm": before["calm"]}
