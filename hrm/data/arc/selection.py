"""Selects ARC tasks of several sources: removes duplicates, makes names unique, holds tasks out, finds
leaks."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from hrm.data.arc.augment import COLOURS, TURNS, Pair
from hrm.data.arc.files import Task
from hrm.data.faults import Faults
from hrm.data.format import DatasetError


def distinct(tasks: Iterable[Task]) -> tuple[list[Task], list[Task]]:
    """The different tasks, and the removed duplicates, which have the same pairs as a kept task.

    Evaluation tasks are kept before training tasks.
    """
    kept: dict[frozenset[tuple[bytes, int]], Task] = {}
    left_out = []
    for task in tasks:
        # The order of pairs and their role do not matter.
        pairs = Counter(_key(pair.grids) for pair in task.pairs)
        other = kept.setdefault(frozenset(pairs.items()), task)
        if task.evaluation and not other.evaluation:
            kept[frozenset(pairs.items())] = task
            left_out.append(other)
        elif other is not task:
            left_out.append(task)
    return list(kept.values()), left_out


def of_different_names(
    tasks: Sequence[Task], faults: Faults, *, rename: bool
) -> tuple[list[Task], list[tuple[str, str]]]:
    """The tasks with unique names, in the same order, and the file and new name of each renamed task.

    A name belongs to its first evaluation task, else to its first task. With `rename` the other tasks of that
    name get a number, `<name>-2`; else they are left out and added to `faults`.
    """
    owners: dict[str, Task] = {}
    for task in sorted(tasks, key=lambda task: not task.evaluation):
        owners.setdefault(task.name, task)
    taken, kept, renamed = set(owners), [], []
    for task in tasks:
        owner = owners[task.name]
        if owner is task:
            kept.append(task)
        elif rename:
            number = 2
            while f"{task.name}-{number}" in taken:
                number += 1
            new = replace(task, name=f"{task.name}-{number}")
            taken.add(new.name)
            kept.append(new)
            renamed.append((task.where, new.name))
        else:
            faults.add(task.where, f"another task has the same name {task.name} ({owner.where})")
    return kept, renamed


def hold_out(tasks: Sequence[Task], share: float, rng: np.random.Generator) -> list[Task]:
    """Makes a random `share` of the tasks evaluation tasks. Raises DatasetError."""
    if not 0 < share < 1:
        raise DatasetError(f"--holdout {share:g}: expected a part of the tasks, between 0 and 1")
    if found := next((task for task in tasks if task.evaluation), None):
        raise DatasetError(
            f"--holdout {share:g}: {found.where} is an evaluation task already; leave --holdout out, or give "
            "sources without evaluation tasks"
        )
    if len(tasks) < 2:
        raise DatasetError(f"--holdout {share:g}: {len(tasks)} task, expected 2 or more to hold one out")
    number = min(max(round(share * len(tasks)), 1), len(tasks) - 1)
    held = set(rng.choice(len(tasks), number, replace=False).tolist())
    return [replace(task, evaluation=True) if place in held else task for place, task in enumerate(tasks)]


def leaks(tasks: Sequence[Task]) -> list[tuple[str, str]]:
    """Evaluation tasks that a training task reveals: the names of both.

    Their pairs are equal up to one of the eight symmetries for all grids and a permutation of colours 1 to 9
    for each pair.
    """
    training = {_likeness(task): task.name for task in tasks if not task.evaluation}
    alike = ((task.name, training.get(_likeness(task))) for task in tasks if task.evaluation)
    return [(name, other) for name, other in alike if other is not None]


def _key(grids: Sequence[np.ndarray]) -> bytes:
    """Bytes that identify a grid: its shape, then its cells."""
    return b"".join(bytes(grid.shape) + np.ascontiguousarray(grid).tobytes() for grid in grids)


def _likeness(task: Task) -> tuple[bytes, ...]:
    def renamed(pair: Pair, turn: Callable[[np.ndarray], np.ndarray]) -> bytes:
        grids = [turn(grid) for grid in pair.grids]
        colours, first = np.unique(np.concatenate([grid.ravel() for grid in grids]), return_index=True)
        order = colours[np.argsort(first)]
        order = order[order > 0]
        names = np.zeros(COLOURS, np.uint8)
        names[order] = np.arange(1, len(order) + 1)
        return _key([names[grid] for grid in grids])

    return min(tuple(sorted(renamed(pair, turn) for pair in task.pairs)) for turn in TURNS)
