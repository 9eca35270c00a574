"""Checks whole arrays against the rules of their puzzles: finds faults fast, then describes them."""

import numpy as np

from hrm.common.threads import usable_cpus
from hrm.data.format import array_path
from hrm.data.inspect.invariants import Findings, Split, chunks
from hrm.data.maze.search import solved
from hrm.data.puzzle_kinds import Kind
from hrm.data.sudoku.solver import GAVE_UP, UNDECIDED, solve_each, units
from hrm.data.workers import compiled, over_rows


def broken(kind: Kind, inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A mask of the labels that break a rule of `kind.problems`, (N,) bool.

    inputs, labels: (N, S) integers.
    """
    # 255 is not a token of any kind.
    questions, answers = (np.clip(array, 0, 255).astype(np.uint8) for array in (inputs, labels))
    if kind.name == "sudoku":
        return _broken_sudoku(kind, questions, answers)
    if kind.name == "maze":
        return ~solved(questions, answers, kind.cols)
    if kind.name == "arc":
        right = np.zeros(len(answers), np.bool_)
        _judge_canvases(answers.reshape(-1, kind.rows, kind.cols), right)
        return ~right
    return np.zeros(len(answers), bool)


def check_rules(split: Split, findings: Findings) -> None:
    """Checks that the labels of a split solve its inputs, by the rules of its kind of puzzle.

    A cell without loss gets the input's value; examples without loss are skipped.
    """
    kind = split.kind
    for name in split.sets:
        examples = split.examples(name)
        if kind is None or examples is None:
            continue
        for rows in chunks(examples[0]):
            inputs, labels = (np.asarray(array[rows], np.int64) for array in examples)
            ignored = np.isin(labels, split.ignored)
            judged = {"labels": split.answers(inputs, labels)}
            if kind.name == "arc":
                judged = {"inputs": inputs, **judged}
            for array, boards in judged.items():
                wrong = broken(kind, inputs, boards)
                if array == "labels":
                    wrong &= ~ignored.all(axis=1)

                def tell(
                    row: int, first: int = rows.start, q: np.ndarray = inputs, a: np.ndarray = boards
                ) -> str:
                    # ARC has the same rule for questions and labels.
                    is_arc = kind.name == "arc"
                    problems = kind.impossible(a[row]) if is_arc else kind.problems(q[row], a[row])
                    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
                    return f"row {first + row}: {problems[0]}{more}"

                findings.add_rows(array_path(split.folder, name, array), np.nonzero(wrong)[0], tell)


def check_unique(split: Split, findings: Findings) -> None:
    """Checks that the first example of every group of a Sudoku split has one solution, on all cores."""
    kind = split.kind
    for name in split.sets:
        examples = split.examples(name)
        if kind is None or kind.name != "sudoku" or examples is None:
            continue
        firsts = _firsts(split, name, len(examples[0]))
        questions = np.asarray(examples[0][firsts], np.int64) - 1
        # Another check reports tokens that are not digits.
        questions = np.where((questions >= 0) & (questions <= kind.rows), questions, 0).astype(np.uint8)
        found = _solutions(questions, f"solving {split.folder.name}")
        path = array_path(split.folder, name, "inputs")
        undecided = f"no known number of solutions ({GAVE_UP})"
        for count, told in ((0, "no solution"), (2, "several solutions"), (UNDECIDED, undecided)):
            findings.add_rows(
                path, firsts[found == count], f"row {{}}: the puzzle has {told}, expected one".format
            )


def _firsts(split: Split, name: str, examples: int) -> np.ndarray:
    """The first example of every group, or every example if the groups are damaged."""
    arrays = split.sets[name]
    puzzles, groups = (arrays.get(array) for array in ("puzzle_indices", "group_indices"))
    if puzzles is not None and groups is not None and groups.min() >= 0 and groups.max() < len(puzzles):
        firsts = puzzles[groups[:-1]]
        if len(firsts) and firsts.min() >= 0 and firsts.max() < examples:
            return firsts
    return np.arange(examples)


def _solutions(questions: np.ndarray, what: str) -> np.ndarray:
    """The number of solutions of each grid, 2 for several, (N,) uint8."""
    found = np.empty(len(questions), np.uint8)
    answers, guesses = np.empty_like(questions), np.empty(len(questions), np.int32)

    def solve(rows: slice) -> None:
        solve_each(questions[rows], answers[rows], guesses[rows], found[rows])

    over_rows(solve, len(questions), usable_cpus(), what)
    return found


def _broken_sudoku(kind: Kind, questions: np.ndarray, answers: np.ndarray) -> np.ndarray:
    # A unit with all digits has each digit once.
    bits = np.left_shift(1, np.minimum(answers, 31), dtype=np.int64)
    held = np.bitwise_or.reduce(bits[:, units(kind.rows)[0]], axis=2)
    every = sum(1 << token for token in range(2, kind.rows + 2))
    return (held != every).any(axis=1) | ((questions > 1) & (questions != answers)).any(axis=1)


@compiled
def _judge_canvases(canvases, right):
    """A mask of the canvases with one grid of colours, end marks to its right and below, and padding."""
    rows, columns = canvases.shape[1:]
    for number in range(len(canvases)):
        canvas = canvases[number]
        top, left, bottom, end = rows, columns, 0, 0
        for row in range(rows):
            for column in range(columns):
                if 2 <= canvas[row, column] < 12:
                    top, left = min(top, row), min(left, column)
                    bottom, end = max(bottom, row + 1), max(end, column + 1)
        good = bottom > 0
        for row in range(rows):
            for column in range(columns):
                inside = top <= row <= bottom and left <= column <= end
                mark = inside and (row == bottom) != (column == end)
                if inside and row < bottom and column < end:
                    good &= 2 <= canvas[row, column] < 12
                else:
                    good &= canvas[row, column] == mark
        right[number] = good
