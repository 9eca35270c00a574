"""Builds ARC data sets: reads, augments, splits and writes tasks (`python -m hrm.data arc`).

A group is a task: the original puzzle, then its augmentations, each with its own identifier and name
(see `augment`). The pairs of training tasks, demonstrations and tests, train; of evaluation tasks the
demonstrations train and the tests test, under the same identifiers. In training, every pair but one of each
puzzle stands at a random place on its canvas; in the test all stand in the upper left corner. Labels carry no
loss at padding, and a test whose answer is not known has padding for labels: it is not counted. Both splits
have one set, `all`. The layout is the official builder's, of HRM; `test_puzzles.json` beside it, the
evaluation tasks by name as they came, is that of TRM's.
"""

import argparse
import hashlib
import json
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from hrm.common.threads import usable_cpus
from hrm.data.arc.augment import COLOURS, SIDE, TURNS, VOCAB_SIZE, Pair, draw, token_arrays
from hrm.data.arc.files import BLANK, Task, read_source
from hrm.data.format import DatasetError, PuzzleSet
from hrm.data.writer import Shape, check_output, new_dataset

SET = "all"
TEST_PUZZLES = "test_puzzles.json"
# Most task names in a line of the summary.
NAMED = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Group:
    """A task ready to be written: the names of its N puzzles and, by split, inputs and labels (N * E, 900)
    and difficulty (N * E,): the cells of the output, 0 where it is not known."""

    names: list[str]
    splits: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]


def build_group(task: Task, num_aug: int, seed: int) -> Group:
    """A task and up to num_aug augmentations, which depend on seed, name and pairs of the task alone."""
    digest = hashlib.sha256(task.name.encode()).digest()
    rng = np.random.default_rng([seed, *np.frombuffer(digest, "<u4").tolist()])
    made = draw(task.pairs, num_aug, rng)
    parts = {"train": task.train, "test": task.test} if task.evaluation else {"train": task.pairs}
    splits = {}
    for split, pairs in parts.items():
        inputs, labels = token_arrays(pairs, made, rng if split == "train" else None)
        cells = [0 if pair.output is None else pair.output.size for pair in pairs]
        splits[split] = inputs, labels, np.tile(np.array(cells, np.int32), len(made.turns))
    return Group(made.names(task.name), splits)


def write_arc(
    folder: str | Path, tasks: Sequence[Task], num_aug: int, seed: int, workers: int = 1
) -> list[tuple[str, int]]:
    """Augments tasks and writes the data set; returns each task's name and number of puzzles.

    tasks: of different names. The bytes written do not depend on workers, the number of processes. There is
    no test split without evaluation tasks. Raises DatasetError.
    """
    made: list[tuple[str, int]] = []
    identifiers = [BLANK]
    with new_dataset(folder) as writer:
        shape = Shape(SIDE * SIDE, VOCAB_SIZE, kind="arc")
        splits = {name: writer.split(name, shape) for name in _splits(tasks)}
        groups = _in_order(partial(build_group, num_aug=num_aug, seed=seed), tasks, workers)
        # The bar closes before an error is printed.
        with tqdm(groups, desc="tasks", total=len(tasks), leave=False) as bar:
            for group in bar:
                count = len(group.names)
                ids = np.arange(len(identifiers), len(identifiers) + count, dtype=np.int32)
                for name, (inputs, labels, difficulty) in group.splits.items():
                    starts = np.arange(0, len(inputs) + 1, len(inputs) // count, dtype=np.int32)
                    part = PuzzleSet(inputs, labels, ids, starts, np.array([0, count], np.int32))
                    splits[name].add(SET, part, difficulty)
                identifiers += group.names
                made.append((group.names[0], count))
        with (writer.folder / TEST_PUZZLES).open("w", encoding="utf-8") as file:
            json.dump({task.name: _as_json(task) for task in tasks if task.evaluation}, file)
            file.write("\n")
        writer.close(identifiers)
    return made


def distinct(tasks: Iterable[Task]) -> tuple[list[Task], list[Task]]:
    """The different tasks, and the repetitions that were removed: tasks with the pairs of a kept one.

    Evaluation tasks are kept before training tasks. Raises DatasetError for two tasks of one name.
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
    named: dict[str, Task] = {}
    for task in kept.values():
        if named.setdefault(task.name, task) is not task:
            raise DatasetError(
                f"{task.where}: the name {task.name} is that of another task too ({named[task.name].where}); "
                "rename one of them, or leave out a source"
            )
    return list(named.values()), left_out


def leaks(tasks: Sequence[Task]) -> list[tuple[str, str]]:
    """Evaluation tasks that a training task reveals: the names of both.

    Their pairs are the same after one of the eight turns of all grids and a renaming of colours 1 to 9, which
    may differ from pair to pair.
    """
    training = {_likeness(task): task.name for task in tasks if not task.evaluation}
    alike = ((task.name, training.get(_likeness(task))) for task in tasks if task.evaluation)
    return [(name, other) for name, other in alike if other is not None]


def _splits(tasks: Sequence[Task]) -> list[str]:
    return ["train", "test"] if any(task.evaluation for task in tasks) else ["train"]


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


def _as_json(task: Task) -> dict[str, Any]:
    keys = ("input", "output")
    return {
        role: [
            {key: grid.tolist() for key, grid in zip(keys, pair.grids, strict=False)}
            for pair in getattr(task, role)
        ]
        for role in ("train", "test")
    }


def _in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """The results for the items in order, from several processes that work little ahead."""
    if workers == 1:
        yield from map(function, items)
        return
    waiting: deque[Future[Result]] = deque()
    # Spawn: forked processes would inherit locks of threads that they lack.
    pool = ProcessPoolExecutor(workers, get_context("spawn"))
    try:
        for item in items:
            with _uninterrupted():
                waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DatasetError(
            f"--workers {workers}: a process was ended from outside, mostly for want of memory; try fewer"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Processes started in the context ignore Ctrl-C; this process answers it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m hrm.data arc`."""
    add = parser.add_argument
    add(
        "--output-dir", type=Path, required=True, help="folder of the data set; one already there is replaced"
    )
    add(
        "--source",
        nargs="+",
        required=True,
        help="folders of task JSON, or with sub-folders of it (training, evaluation, ...); or prefixes of "
        "Kaggle's PREFIX_challenges.json and PREFIX_solutions.json",
    )
    add("--num-aug", type=int, default=1000, help="augmentations of every task (default 1000)")
    add("--seed", type=int, default=0, help="same seed, same bytes (default 0)")
    add("--workers", type=int, help="processes; the result does not depend on it (default: one a core)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Builds a data set from the options and prints a summary. Raises DatasetError."""
    check_output(args.output_dir)
    workers = usable_cpus() if args.workers is None else args.workers
    for name, value, low in (("num-aug", args.num_aug, 0), ("seed", args.seed, 0), ("workers", workers, 1)):
        if value < low:
            raise DatasetError(f"--{name} {value}: expected at least {low}")
    sources = {source: list(read_source(source)) for source in args.source}
    tasks, left_out = distinct(task for found in sources.values() for task in found)
    made = write_arc(args.output_dir, tasks, args.num_aug, args.seed, min(workers, len(tasks)))
    print(f"{args.output_dir}: ARC, {args.num_aug} augmentations, seed {args.seed}")
    for source, found in sources.items():
        evaluation = sum(task.evaluation for task in found)
        print(f"  {source}: {len(found) - evaluation} training and {evaluation} evaluation tasks")
    print("\n".join(_summary(tasks, dict(made), left_out, args.num_aug)))


def _summary(
    tasks: Sequence[Task], made: dict[str, int], left_out: Sequence[Task], num_aug: int
) -> Iterator[str]:
    for split in _splits(tasks):
        held = [task for task in tasks if split == "train" or task.evaluation]
        pairs = {task.name: task.pairs if not task.evaluation else getattr(task, split) for task in held}
        examples = sum(made[name] * len(part) for name, part in pairs.items())
        puzzles = sum(made[name] for name in pairs)
        yield f"  {split}: {examples} examples of {puzzles} puzzles of {len(held)} tasks"
    if len(_splits(tasks)) < 2:
        yield "    no test: none are evaluation tasks; training on it needs a --source with some"
    unknown = sum(pair.output is None for task in tasks for pair in task.test)
    if unknown:
        yield f"    {unknown} tests without an answer, which are not counted"
    fewer = [f"{name} ({count - 1})" for name, count in made.items() if count <= num_aug]
    if fewer:
        yield f"  fewer than {num_aug} different augmentations: {_some(fewer)}"
    if left_out:
        yield f"  left out, same as another task: {_some([task.name for task in left_out])}"
    found = [f"{name} ({other})" for name, other in leaks(tasks)]
    if found:
        yield f"  evaluation tasks like a training task but for turns and colours: {_some(found)}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)}: {', '.join(names[:NAMED])}{more}"
