"""Rules that choose one answer among the paths of a puzzle: rules without labels, and the oracle.

A path is one run of the model on a puzzle, with its own initial state, noise or symmetry; path 0 is
deterministic. Arrays are (N, K) for N puzzles of K paths each.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, NamedTuple, get_args

import numpy as np

from hrm.common.intervals import CONFIDENCE, t_margin
from hrm.config.schema import NEVER

Rule = Literal["q", "first", "vote", "residual", "rules", "oracle"]
RULES: tuple[Rule, ...] = get_args(Rule)


@dataclass(frozen=True)
class Outcomes:
    """The outcomes of paths, each array (N, K).

    right: bool, every cell with a label is right. answer: int, the first path with the same answer (for ARC,
    the same grid). q_halt: float, the logit at the end. halts_at: int, the first ACT step at which the path
    would halt, or NEVER. residual: float, the mean change of the logits over the last steps. lawful: bool,
    the answer satisfies the puzzle's rules; None for puzzles without rules.
    """

    right: np.ndarray
    answer: np.ndarray
    q_halt: np.ndarray
    halts_at: np.ndarray
    residual: np.ndarray
    lawful: np.ndarray | None = None

    def head(self, count: int) -> "Outcomes":
        """The first `count` paths of every puzzle."""
        return self._of_each(lambda array: array[:, :count])

    def of_paths(self, chosen: np.ndarray) -> "Outcomes":
        """The paths under the mask `chosen`, (K,), of every puzzle."""
        return self._of_each(lambda array: array[:, chosen])

    def puzzles(self, chosen: np.ndarray) -> "Outcomes":
        """All paths of the puzzles `chosen`, indices or a mask."""
        return self._of_each(lambda array: array[chosen])

    def _of_each(self, part: Callable[[np.ndarray], np.ndarray]) -> "Outcomes":
        lawful = None if self.lawful is None else part(self.lawful)
        right, answer, q_halt = part(self.right), part(self.answer), part(self.q_halt)
        return Outcomes(right, answer, q_halt, part(self.halts_at), part(self.residual), lawful)


def unfinished(puzzles: int, paths: int, has_rules: bool) -> Outcomes:
    """Placeholder outcomes of unfinished paths: every finished path is preferred to them."""
    shape = puzzles, paths
    wrong = np.zeros(shape, bool)
    return Outcomes(
        right=wrong,
        answer=np.tile(np.arange(paths), (puzzles, 1)),
        q_halt=np.full(shape, -np.inf),
        halts_at=np.full(shape, NEVER + 1),
        residual=np.full(shape, np.inf),
        lawful=wrong.copy() if has_rules else None,
    )


def rules_for(outcomes: Outcomes) -> list[Rule]:
    """The rules that can choose among these paths."""
    return [rule for rule in RULES if rule != "rules" or outcomes.lawful is not None]


def same_answers(predictions: np.ndarray) -> np.ndarray:
    """The first path with the same answer, (K,), for the answers (K, S) to one puzzle."""
    _, first, number = np.unique(predictions, axis=0, return_index=True, return_inverse=True)
    return np.asarray(first[number.reshape(-1)])


def choose(rule: Rule, outcomes: Outcomes) -> np.ndarray:
    """The number of the chosen path of each puzzle, (N,).

    q: the highest q_halt. first: the first path to halt. vote: the path of highest q_halt with the most
    common whole answer; the sum of sigmoid(q_halt) breaks ties. residual: the smallest residual. rules: a
    path whose answer satisfies the puzzle's rules, if there is one. oracle: a right path, if there is one.
    Ties go to the higher q_halt, then to the lower path number. NaN loses. Raises ValueError for puzzles
    without rules.
    """
    unsure = -np.nan_to_num(
        np.asarray(outcomes.q_halt, np.float64), nan=-np.inf, posinf=np.inf, neginf=-np.inf
    )
    # Criteria in order of priority; each is minimised.
    order: list[np.ndarray]
    if rule == "q":
        order = []
    elif rule == "first":
        order = [outcomes.halts_at]
    elif rule == "vote":
        order = [-votes for votes in _votes(outcomes.answer, unsure)]
    elif rule == "residual":
        order = [np.where(np.isnan(outcomes.residual), np.inf, outcomes.residual)]
    elif rule == "rules":
        if outcomes.lawful is None:
            raise ValueError("these puzzles have no rules")
        order = [~outcomes.lawful]
    else:
        order = [~outcomes.right]
    return np.asarray(np.lexsort([unsure, *reversed(order)], axis=-1)[:, 0])


def _votes(answer: np.ndarray, unsure: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The votes for each path's answer, and the sum of their sigmoid(q_halt)."""
    N, K = answer.shape
    place = answer + K * np.arange(N)[:, None]
    # A sigmoid without overflow.
    sure = 0.5 * (1 - np.tanh(0.5 * unsure))
    counts = np.bincount(place.ravel(), minlength=N * K)
    sums = np.bincount(place.ravel(), weights=sure.ravel(), minlength=N * K)
    return counts[place], sums[place]


def solved(rule: Rule, outcomes: Outcomes) -> np.ndarray:
    """Whether the chosen path of each puzzle is right, (N,) bool."""
    return np.asarray(np.take_along_axis(outcomes.right, choose(rule, outcomes)[:, None], 1)[:, 0])


def useful_steps(rule: Rule, ended: Outcomes, steps: np.ndarray, running: int) -> int:
    """The number of ACT steps after which no unfinished path can change the answer, 0 if none can.

    ended: the paths of one puzzle that have ended, (1, E), after steps (E,). running: the paths that have not
    ended. The result equals that of all paths run in parallel: with `first` and `rules` it is final at the
    first step at which a path halts, or halts with rules satisfied; with `vote` when no vote can change the
    majority.
    """
    if not ended.right.size:
        return NEVER
    if rule == "first":
        halted = ended.halts_at[0] < NEVER
        return int(steps[halted].min()) if halted.any() else NEVER
    if rule == "rules" and ended.lawful is not None:
        return int(steps[ended.lawful[0]].min()) if ended.lawful.any() else NEVER
    if rule == "oracle":
        return 0 if ended.right.any() else NEVER
    if rule == "vote":
        second, most = np.sort(np.append(np.bincount(ended.answer[0]), 0))[-2:]
        return 0 if most > second + running else NEVER
    return NEVER


def pass_at(right: np.ndarray, k: int) -> np.ndarray:
    """The probability that k of a puzzle's K paths, drawn without replacement, include a right one, (N,).

    right: (N, K). Unbiased: 1 - C(K - c, k) / C(K, k) for c right paths (Chen et al. 2021, arXiv 2107.03374).
    Raises ValueError for k below 1 or above K.
    """
    K = right.shape[1]
    if not 1 <= k <= K:
        raise ValueError(f"pass@{k} of {K} paths: k must be from 1 to {K}")
    of_count = np.array([1 - math.comb(K - count, k) / math.comb(K, k) for count in range(K + 1)])
    return np.asarray(of_count[right.sum(axis=1)])


class Share(NamedTuple):
    """A mean over puzzles of values from 0 to 1, with its confidence interval of level CONFIDENCE."""

    mean: float
    low: float
    high: float


def share(values: np.ndarray) -> Share:
    """The mean of values (N,) from 0 to 1 and its interval; NaN without values.

    Wilson's score interval (1927) for values of 0 and 1 alone, else Student's, cut off at 0 and 1; all of
    [0, 1] for a single value between them.
    """
    n, values = len(values), np.asarray(values, np.float64)
    if not n:
        return Share(math.nan, math.nan, math.nan)
    mean, z = float(values.mean()), NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    if ((values == 0) | (values == 1)).all():
        middle = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + (z / (2 * n)) ** 2)
    elif n > 1:
        middle, half = mean, t_margin(values)
    else:
        middle, half = mean, 1.0
    return Share(mean, max(0.0, middle - half), min(1.0, middle + half))


def breadths(paths: int) -> list[int]:
    """The numbers of paths to compare: 1, 2, 4, ... and `paths`."""
    return sorted({1 << power for power in range(paths.bit_length())} | {paths})


def by_breadth(outcomes: Outcomes, rules: Sequence[Rule]) -> dict[Rule, dict[int, Share]]:
    """The accuracy by rule and number of paths; a smaller number uses the first paths."""
    K = outcomes.right.shape[1]
    heads = {count: outcomes.head(count) for count in breadths(K)}
    return {rule: {k: share(solved(rule, head)) for k, head in heads.items()} for rule in rules}


def selection_failures(rule: Rule, outcomes: Outcomes) -> tuple[int, int]:
    """The number of puzzles whose chosen answer is wrong, and the number of these with another, right
    path."""
    wrong = ~solved(rule, outcomes)
    return int(wrong.sum()), int((wrong & outcomes.right.any(axis=1)).sum())
