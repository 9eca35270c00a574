"""Tracks the running paths of a puzzle until none can change the choice among them."""

import math

import numpy as np

from hrm.data.arc.augment import canvas, grid_of
from hrm.data.format import IGNORE_LABEL
from hrm.data.inspect.rules import broken
from hrm.data.puzzle_kinds import Kind
from hrm.engine.inference import Answers, Ends
from hrm.evaluation.selection import Rule, choose, unfinished, useful_steps
from hrm.evaluation.views import View

# Kinds whose rules identify right answers.
RULED = ("sudoku", "maze")


def compared(kind: Kind, answers: np.ndarray) -> np.ndarray:
    """Answers (n, S) in the form that votes compare: for ARC only the grid, because labels do not train the
    rest."""
    if kind.name != "arc":
        return answers
    found, side = np.zeros_like(answers), math.isqrt(answers.shape[1])
    for tokens, answer in zip(found, answers, strict=True):
        if (grid := grid_of(answer)) is not None:
            tokens[:] = canvas(grid, side=side)
    return found


class Judge:
    """Compares the answers of paths with labels, rules and each other."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.has_rules = kind.name in RULED

    def answers(self, answers: np.ndarray, inputs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
        """right, lawful (n,) bool for answers (n, S) to one puzzle, inputs and labels (S,)."""
        valid = labels != IGNORE_LABEL
        right = (answers == labels)[:, valid].all(axis=1)
        lawful = np.zeros(len(answers), bool)
        if self.has_rules:
            lawful = ~broken(self.kind, np.broadcast_to(inputs, answers.shape), answers)
        return right, lawful


class Race:
    """The running paths of a puzzle. open: number of paths that have neither ended nor been dropped."""

    def __init__(
        self, select: Rule, judge: Judge, view: View, inputs: np.ndarray, labels: np.ndarray
    ) -> None:
        """inputs, labels: (S,), of the puzzle itself."""
        self._select, self._judge, self._view = select, judge, view
        self._inputs, self._labels = inputs, labels
        paths = self._paths = self.open = len(view.inputs)
        self._outcomes = unfinished(1, paths, judge.has_rules)
        self._predictions = np.zeros((paths, len(inputs)), np.int32)
        self._compared = np.zeros_like(self._predictions)
        self._steps = np.zeros(paths, np.int64)
        self._ended = np.zeros(paths, bool)
        # Number of steps after which no path changes the choice.
        self._useful = useful_steps(select, self._outcomes.head(0), self._steps[:0], paths)

    def goes_on(self, path: int, steps: int) -> bool:
        """Whether a path after `steps` steps may still change the choice; if not, it is dropped."""
        self._steps[path] = steps
        if steps < self._useful:
            return True
        self.open -= 1
        return False

    def end(self, path: int, ends: Ends, index: int) -> None:
        """Records the end of a path."""
        outcomes, answer = self._outcomes, self._predictions[path]
        answer[:] = self._view.answers(ends.predictions[index][None], np.array([path]))[0]
        right, lawful = self._judge.answers(answer[None], self._inputs, self._labels)
        outcomes.right[0, path] = right[0]
        if outcomes.lawful is not None:
            outcomes.lawful[0, path] = lawful[0]
        self._ended[path], self._steps[path] = True, ends.steps[index]
        self._compared[path] = compared(self._judge.kind, answer[None])[0]
        same = self._ended & (self._compared == self._compared[path]).all(axis=1)
        outcomes.answer[0, same] = np.flatnonzero(same)[0]
        outcomes.q_halt[0, path], outcomes.halts_at[0, path] = ends.q_halt[index], ends.halts_at[index]
        outcomes.residual[0, path] = ends.residual[index]
        self.open -= 1
        ended = outcomes.of_paths(self._ended)
        running = self._paths - int(self._ended.sum())
        self._useful = useful_steps(self._select, ended, self._steps[self._ended], running)

    def answers(self, place: int) -> Answers:
        """The chosen answer, as the answer of the sequence at this place."""
        if self._outcomes.lawful is not None and self._select == "rules":
            # If all paths ran in parallel, a path that ends later would have been dropped.
            self._outcomes.lawful[0] &= self._steps <= self._useful
        path = int(choose(self._select, self._outcomes)[0])
        return Answers(
            np.array([place]),
            self._labels[None],
            self._predictions[path][None],
            self._outcomes.q_halt[0, path][None].astype(np.float32),
            self._steps.sum()[None].astype(np.int32),
        )
