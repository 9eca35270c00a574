"""Voting on ARC tests: maps predictions for augmentations of a task back and counts them.

Every augmentation of a test votes for one grid. As in the official evaluations of HRM and TRM, grids are
ranked by votes and then by mean q_halt; a prediction without a grid votes for the empty grid. A test is
solved at k if its answer is among the first k.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hrm.data.arc.augment import Pair, grid_of, inverse, task_of
from hrm.data.dataset import PuzzleDataset
from hrm.data.format import DatasetError

# Sort keys of a grid, from its votes and the sum of their q_halt.
RANKINGS = {
    "votes": lambda votes, q_halt: (votes, q_halt / votes),
    "q_halt": lambda votes, q_halt: (q_halt, votes),
}


@dataclass(frozen=True)
class Answer:
    """A grid (rows, columns) uint8, its votes, and the mean of their q_halt."""

    grid: np.ndarray
    votes: int
    q_halt: float


class Votes:
    """The votes for every task's tests; memory grows with the number of different grids.

    tests: test pairs by task, as `read_tests` returns them; tests with the same input share their votes.
    ranking: "votes" (official), or "q_halt", which weights each vote by its q_halt. Grids of equal rank are
    ordered by shape and cells, independently of the order of votes.
    """

    def __init__(self, tests: Mapping[str, Sequence[Pair]], ranking: str = "votes") -> None:
        self.tests = tests
        self._rank = RANKINGS[ranking]
        # Votes and sum of q_halt by task, input and grid.
        self._votes: dict[str, dict[bytes, dict[bytes, tuple[int, float]]]] = {
            task: {_key(pair.input): {} for pair in pairs} for task, pairs in tests.items()
        }

    def add(self, name: str, inputs: np.ndarray, prediction: np.ndarray, q_halt: float) -> None:
        """Counts the vote of one example.

        name: the puzzle's name in identifiers.json. inputs, prediction: tokens (900,). q_halt: probability, 0
        to
        1. Raises DatasetError for an input that is not a test, ValueError for q_halt out of range.
        """
        if not 0 <= q_halt <= 1:
            raise ValueError(f"q_halt is {q_halt}, expected a probability")
        task, back = task_of(name), inverse(name)
        asked = grid_of(inputs)
        of_task = self._votes.get(task)
        counts = None if asked is None or of_task is None else of_task.get(_key(back(asked)))
        if counts is None:
            raise DatasetError(
                f"puzzle {name!r}: its input is not a test of task {task!r}; take the identifiers and the "
                "examples of one data set"
            )
        grid = grid_of(prediction)
        key = _key(np.zeros((0, 0), np.uint8) if grid is None else back(grid))
        votes, total = counts.get(key, (0, 0.0))
        counts[key] = votes + 1, total + float(q_halt)

    def ranked(self, task: str, test: int) -> list[Answer]:
        """The answers to a task's test (counted from 0), best first; empty without votes."""
        # Sorted by grid first; the stable sort by rank then keeps ties independent of the votes' order.
        counts = sorted(self._votes[task][_key(self.tests[task][test].input)].items())
        counts.sort(key=lambda item: self._rank(*item[1]), reverse=True)
        return [Answer(_grid(key), votes, total / votes) for key, (votes, total) in counts]

    def pass_at(self, ks: Sequence[int], whole_tasks: bool = False) -> dict[int, float]:
        """The share of tasks solved with k answers per test, by k; empty if no answer is known.

        A task counts as its share of solved tests, as in ARC Prize and TRM's evaluation. whole_tasks: a task
        counts only if all its tests are solved, as in HRM's. Tests without a known answer are ignored; tests
        without votes are unsolved.
        """
        places = self._places()
        found = {k: _solved(places, k, whole_tasks) for k in ks}
        return {k: sum(parts.values()) / len(parts) for k, parts in found.items() if parts}

    def solved(self, k: int) -> dict[str, float]:
        """The share of tests that k answers solve, by task; see `pass_at`."""
        return _solved(self._places(), k, False)

    def _places(self) -> dict[str, list[int | None]]:
        """By task, the rank of the right answer to each test with a known answer."""
        found = {
            task: [self._place(task, number) for number, pair in enumerate(pairs) if pair.output is not None]
            for task, pairs in self.tests.items()
        }
        return {task: places for task, places in found.items() if places}

    def _place(self, task: str, test: int) -> int | None:
        """The number of answers before the right one; None if it is not among them."""
        output = self.tests[task][test].output
        assert output is not None
        found = (
            place
            for place, answer in enumerate(self.ranked(task, test))
            if np.array_equal(answer.grid, output)
        )
        return next(found, None)


def _solved(places: Mapping[str, Sequence[int | None]], k: int, whole_tasks: bool) -> dict[str, float]:
    shares = dict[str, float]()
    for task, own in places.items():
        hits = [place is not None and place < k for place in own]
        shares[task] = float(all(hits)) if whole_tasks else sum(hits) / len(hits)
    return shares


def submission(votes: Votes) -> dict[str, list[dict[str, list[list[int]]]]]:
    """The two best answers to every test, in the format of submission.json in Kaggle's ARC Prize
    competitions.

    Repeats the best answer if there is no second, gives a black cell if there is none, skips empty grids.
    """
    result: dict[str, list[dict[str, list[list[int]]]]] = {}
    for task, pairs in votes.tests.items():
        result[task] = []
        for number in range(len(pairs)):
            grids = [answer.grid.tolist() for answer in votes.ranked(task, number) if answer.grid.size]
            first, second = [*grids, *(grids[:1] or [[[0]]]) * 2][:2]
            result[task].append({"attempt_1": first, "attempt_2": second})
    return result


def read_tests(dataset: PuzzleDataset, names: Sequence[str]) -> dict[str, list[Pair]]:
    """The tests of every task of an ARC test split, in its order, from puzzles that are not augmented.

    names: see `format.read_names`. Supports data sets of this project, HRM and TRM. Raises DatasetError.
    """
    where = dataset.folder
    if len(names) != dataset.metadata.num_puzzle_identifiers:
        raise DatasetError(
            f"{where.parent / 'identifiers.json'}: {len(names)} names, expected "
            f"{dataset.metadata.num_puzzle_identifiers} as {where / 'dataset.json'} says; build both together"
        )
    tests: dict[str, list[Pair]] = {}
    for set_name, part in dataset.sets.items():
        dataset.check_unchanged(set_name)
        for puzzle, identifier in enumerate(part.puzzle_identifiers.tolist()):
            name = names[identifier]
            if task_of(name) != name:
                continue
            first, last = part.puzzle_indices[puzzle : puzzle + 2].tolist()
            for example in range(first, last):
                asked = grid_of(part.inputs[example])
                if asked is None:
                    raise DatasetError(
                        f"{where}: example {example} of {name!r} shows no grid, expected ARC tasks"
                    )
                tests.setdefault(name, []).append(Pair(asked, grid_of(part.labels[example])))
    return tests


def _key(grid: np.ndarray) -> bytes:
    return bytes(grid.shape) + np.ascontiguousarray(grid).tobytes()


def _grid(key: bytes) -> np.ndarray:
    return np.frombuffer(key[2:], np.uint8).reshape(key[0], key[1])
