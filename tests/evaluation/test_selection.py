"""The choice among paths and pass@k, on values worked out by hand."""

import math
from itertools import combinations

import numpy as np
import pytest

from hrm.evaluation.selection import (
    NEVER,
    RULES,
    Outcomes,
    breadths,
    by_breadth,
    choose,
    pass_at,
    rules_for,
    same_answers,
    selection_failures,
    share,
    solved,
    unfinished,
    useful_steps,
)

# Four paths of three puzzles. Answers by letter: a a b c; a b b a; a b c d.
BY_HAND = Outcomes(
    right=np.array([[0, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]], bool),
    answer=np.array([[0, 0, 2, 3], [0, 1, 1, 0], [0, 1, 2, 3]]),
    q_halt=np.array([[1.0, -2.0, 3.0, 2.0], [0.5, 4.0, -6.0, 0.25], [np.nan, -1.0, -2.0, -3.0]]),
    halts_at=np.array([[3, 2, 5, 2], [NEVER, 4, NEVER, 4], [NEVER, NEVER, NEVER, NEVER]]),
    residual=np.array([[0.5, 0.1, 0.7, 0.3], [np.nan, np.inf, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]]),
    lawful=np.array([[0, 1, 0, 1], [1, 0, 0, 1], [0, 0, 0, 0]], bool),
)
CHOSEN = {
    "q": [2, 1, 1],
    # Two paths halt at step 2, then two at step 4: the surer one. None halts in the last puzzle.
    "first": [3, 1, 1],
    # Two votes of puzzle 0; in puzzle 1 a has sigmoids 0.622 + 0.562, b 0.982 + 0.002.
    "vote": [0, 0, 1],
    "residual": [1, 3, 1],
    "rules": [3, 0, 1],
    "oracle": [2, 0, 1],
}


@pytest.mark.parametrize("rule", RULES)
def test_the_chosen_path(rule):
    assert choose(rule, BY_HAND).tolist() == CHOSEN[rule]
    assert choose(rule, BY_HAND.head(1)).tolist() == [0, 0, 0]


def test_accuracy_by_rule_and_breadth():
    found = by_breadth(BY_HAND, RULES)
    assert {rule: {k: part.mean for k, part in parts.items()} for rule, parts in found.items()} == {
        "q": {1: pytest.approx(1 / 3), 2: 0, 4: pytest.approx(1 / 3)},
        "first": {1: pytest.approx(1 / 3), 2: 0, 4: 0},
        "vote": {1: pytest.approx(1 / 3), 2: 0, 4: pytest.approx(1 / 3)},
        "residual": {1: pytest.approx(1 / 3), 2: 0, 4: pytest.approx(1 / 3)},
        "rules": {1: pytest.approx(1 / 3), 2: pytest.approx(1 / 3), 4: pytest.approx(1 / 3)},
        "oracle": {1: pytest.approx(1 / 3), 2: pytest.approx(1 / 3), 4: pytest.approx(2 / 3)},
    }
    assert selection_failures("q", BY_HAND) == (2, 1) and breadths(6) == [1, 2, 4, 6]


def random_outcomes(rng: np.random.Generator) -> Outcomes:
    """Paths of 200 puzzles: few answers and steps, so that many tie."""
    shape = 200, 7
    letters = rng.integers(0, 4, shape)
    answer = np.stack([same_answers(row[:, None]) for row in letters])
    return Outcomes(
        right=letters == rng.integers(0, 4, (200, 1)),
        answer=answer,
        q_halt=rng.integers(-3, 4, shape).astype(np.float64),
        halts_at=rng.choice([1, 2, 3, NEVER], shape),
        residual=rng.integers(0, 3, shape).astype(np.float64),
        lawful=np.isin(letters, [1, 2]),
    )


def test_no_rule_beats_the_oracle_and_rules_keep_the_rules():
    outcomes = random_outcomes(np.random.default_rng(0))
    ceiling = solved("oracle", outcomes)
    assert np.array_equal(ceiling, outcomes.right.any(axis=1))
    for rule in RULES:
        assert (solved(rule, outcomes) <= ceiling).all()
    assert outcomes.lawful is not None
    kept = outcomes.lawful[np.arange(200), choose("rules", outcomes)]
    assert np.array_equal(kept, outcomes.lawful.any(axis=1)) and 0 < kept.sum() < 200


def test_puzzles_without_rules():
    plain = Outcomes(BY_HAND.right, BY_HAND.answer, BY_HAND.q_halt, BY_HAND.halts_at, BY_HAND.residual)
    assert rules_for(plain) == [rule for rule in RULES if rule != "rules"]
    with pytest.raises(ValueError, match="no rules"):
        choose("rules", plain)


def test_same_answers():
    answers = np.array([[5, 1], [2, 2], [5, 1], [0, 9], [2, 2]])
    assert same_answers(answers).tolist() == [0, 1, 0, 3, 1]


def test_pass_at_is_the_share_of_all_draws():
    right = np.array([[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 1, 1], [1, 1, 1, 1, 1]], bool)
    for k in range(1, 6):
        by_count = [np.mean([row[list(draw)].any() for draw in combinations(range(5), k)]) for row in right]
        np.testing.assert_allclose(pass_at(right, k), by_count, rtol=1e-12)
    with pytest.raises(ValueError, match="from 1 to 5"):
        pass_at(right, 6)


def test_intervals():
    # Newcombe 1998, table I: 81 of 263 by Wilson's score.
    found = share(np.repeat([1, 0], [81, 182]))
    assert [round(value, 4) for value in found] == [0.308, 0.2553, 0.3662]
    assert share(np.zeros(10)).low == pytest.approx(0, abs=1e-12) and 0.27 < share(np.zeros(10)).high < 0.28
    # Student's t of 2 degrees is 4.3027; the deviation of the sample is 0.1.
    mean, low, high = share(np.array([0.4, 0.5, 0.6]))
    assert (mean, low) == (0.5, pytest.approx(0.5 - 4.3027 * 0.1 / math.sqrt(3), abs=1e-5))
    assert high == pytest.approx(1 - low) and share(np.array([0.25]))[1:] == (0.0, 1.0)
    assert math.isnan(share(np.zeros(0)).mean)


@pytest.mark.parametrize(
    ("rule", "running", "steps"),
    [
        ("q", 2, NEVER),
        ("first", 2, 2),
        ("vote", 2, NEVER),
        ("vote", 0, 0),
        ("residual", 2, NEVER),
        ("rules", 2, 2),
        ("oracle", 2, 0),
    ],
)
def test_when_the_choice_is_decided(rule, running, steps):
    """Puzzle 0 by hand, its paths ended after steps 3, 2, 5, 2: two votes against one."""
    ended = BY_HAND.puzzles(np.array([0]))
    assert useful_steps(rule, ended, np.array([3, 2, 5, 2]), running) == steps
    nothing = unfinished(1, 4, True).head(0)
    assert useful_steps(rule, nothing, np.zeros(0, int), 4) == NEVER


def test_an_unfinished_path_is_never_chosen():
    for rule in RULES:
        outcomes = unfinished(1, 3, True)
        outcomes.q_halt[0, 1], outcomes.halts_at[0, 1], outcomes.residual[0, 1] = -50.0, NEVER, 9.0
        assert choose(rule, outcomes).tolist() == [1]
