"""Builds ARC data sets: reads, augments, splits and writes tasks (`python -m hrm.data arc`).

A group is a task: the original puzzle, then its augmentations, each with its own identifier and name
(see `augment`). All pairs of training tasks are training data. The demonstrations of evaluation tasks are
training data and their tests are test data, under the same identifiers. In training, every pair but one of
each puzzle is at a random place on its canvas; in the test split all are in the upper left corner. Padding
labels carry no loss; a test without a known answer has only padding labels and is not scored. Both splits
have one set, `all`. The format is that of the official HRM builder; `test_puzzles.json`, the original
evaluation tasks by name, follows TRM's builder.
"""

import argparse
import hashlib
import json
import signal
from collections import deque
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
from hrm.data.arc.augment import LARGEST_SIDE, SIDE, VOCAB_SIZE, draw, token_arrays
from hrm.data.arc.files import BLANK, Reader, Task
from hrm.data.arc.selection import distinct, hold_out, leaks, of_different_names
from hrm.data.faults import Faults
from hrm.data.format import DatasetError, PuzzleSet
from hrm.data.options import add_shared
from hrm.data.writer import Shape, check_output, new_dataset

SET = "all"
# Random stream of the choice of evaluation tasks.
HOLDING_OUT = 1
TEST_PUZZLES = "test_puzzles.json"
# Maximum number of task names in a line of the summary.
NAMED = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Group:
    """A task ready to be written: the names of its N puzzles and, by split, inputs and labels (N * E, S) and
    difficulty (N * E,), the number of output cells, 0 if unknown."""

    names: list[str]
    splits: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]


def build_group(task: Task, num_aug: int, seed: int, side: int = SIDE, *, plain: bool = False) -> Group:
    """A task and up to num_aug augmentations, which depend only on seed, name and pairs of the task.

    side: of the canvas. plain: store only the original task for training, in the corner, under all names.
    """
    digest = hashlib.sha256(task.name.encode()).digest()
    rng = np.random.default_rng([seed, *np.frombuffer(digest, "<u4").tolist()])
    made = draw(task.pairs, num_aug, rng)
    parts = {"train": task.train, "test": task.test} if task.evaluation else {"train": task.pairs}
    splits = {}
    for split, pairs in parts.items():
        held = made.first(1) if plain and split == "train" else made
        inputs, labels = token_arrays(pairs, held, rng if split == "train" and not plain else None, side)
        cells = [0 if pair.output is None else pair.output.size for pair in pairs]
        splits[split] = inputs, labels, np.tile(np.array(cells, np.int32), len(held.turns))
    return Group(made.names(task.name), splits)


def write_arc(
    folder: str | Path,
    tasks: Sequence[Task],
    num_aug: int,
    seed: int,
    workers: int = 1,
    side: int = SIDE,
    *,
    plain: bool = False,
) -> list[tuple[str, int]]:
    """Augments tasks and writes the data set; returns each task's name and number of puzzles.

    tasks: with unique names. The bytes do not depend on workers, the number of processes. Without evaluation
    tasks there is no test split. Raises DatasetError.
    """
    made: list[tuple[str, int]] = []
    identifiers = [BLANK]
    with new_dataset(folder) as writer:
        shape = Shape(side * side, VOCAB_SIZE, kind="arc")
        splits = {name: writer.split(name, shape) for name in _splits(tasks)}
        groups = _in_order(
            partial(build_group, num_aug=num_aug, seed=seed, side=side, plain=plain), tasks, workers
        )
        # Close the bar before an error is printed.
        with tqdm(groups, desc="tasks", total=len(tasks), leave=False) as bar:
            for group in bar:
                count = len(group.names)
                ids = np.arange(len(identifiers), len(identifiers) + count, dtype=np.int32)
                for name, (inputs, labels, difficulty) in group.splits.items():
                    held = 1 if plain and name == "train" else count
                    starts = np.arange(0, len(inputs) + 1, len(inputs) // held, dtype=np.int32)
                    part = PuzzleSet(inputs, labels, ids[:held], starts, np.array([0, held], np.int32))
                    splits[name].add(SET, part, difficulty)
                identifiers += group.names
                made.append((group.names[0], count))
        with (writer.folder / TEST_PUZZLES).open("w", encoding="utf-8") as file:
            json.dump({task.name: _as_json(task) for task in tasks if task.evaluation}, file)
            file.write("\n")
        writer.close(identifiers)
    return made


def _splits(tasks: Sequence[Task]) -> list[str]:
    return ["train", "test"] if any(task.evaluation for task in tasks) else ["train"]


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
    """The results for the items in order, computed by several processes a few items ahead."""
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
            f"--workers {workers}: a process was killed, usually for lack of memory; try fewer"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Processes started in the context ignore Ctrl-C; only this process handles it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m hrm.data arc`."""
    add = parser.add_argument
    add_shared(parser, "tasks", "--output-dir")
    add(
        "--source",
        nargs="+",
        required=True,
        help="folders of task JSON, or of sub-folders of it (training, evaluation, ...); or prefixes of "
        "Kaggle's PREFIX_challenges.json and PREFIX_solutions.json",
    )
    add(
        "--test-set",
        nargs="+",
        default=(),
        metavar="NAME",
        help="folders (by name or path) or last parts of prefixes whose tests are the test set; other tasks "
        "are for training (default: names that begin with evaluation or test)",
    )
    add(
        "--holdout",
        type=float,
        metavar="SHARE",
        help="share of the tasks to make evaluation tasks, if no folder or prefix has any",
    )
    add(
        "--canvas",
        type=int,
        default=SIDE,
        metavar="SIDE",
        help=f"rows and columns of the canvas, up to {LARGEST_SIDE} (default {SIDE})",
    )
    add("--num-aug", type=int, default=1000, help="augmentations of every task (default 1000)")
    add(
        "--plain",
        action="store_true",
        help="store training tasks once, with the names of all augmentations: for augment=true, which draws "
        "them in training",
    )
    add_shared(parser, "tasks", "--skip-bad")
    add(
        "--rename-duplicates",
        action="store_true",
        help="rename a different task with the same name NAME-2; else it is an error",
    )
    add_shared(parser, "tasks", "--seed", "--workers")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Builds a data set from the options and prints a summary. Raises DatasetError."""
    check_output(args.output_dir)
    workers = usable_cpus() if args.workers is None else args.workers
    for name, value, low in (
        ("num-aug", args.num_aug, 0),
        ("seed", args.seed, 0),
        ("workers", workers, 1),
        ("canvas", args.canvas, 1),
    ):
        if value < low:
            raise DatasetError(f"--{name} {value}: expected at least {low}")
    if args.canvas > LARGEST_SIDE:
        raise DatasetError(f"--canvas {args.canvas}: expected at most {LARGEST_SIDE}")
    faults = Faults(skip=args.skip_bad, error=DatasetError)
    reader = Reader(args.canvas, args.test_set, faults)
    sources = {source: reader.read(source) for source in args.source}
    reader.check_test_sets()
    tasks, repeated = distinct(task for found in sources.values() for task in found)
    clashes = -faults.count
    tasks, renamed = of_different_names(tasks, faults, rename=args.rename_duplicates)
    clashes += faults.count
    faults.check(_remedy(reader, clashes))
    if not tasks:
        raise DatasetError(f"{' '.join(args.source)}: no sound task in it; {faults.listed()}")
    if args.holdout is not None:
        tasks = hold_out(tasks, args.holdout, np.random.default_rng([args.seed, HOLDING_OUT]))
    made = write_arc(
        args.output_dir,
        tasks,
        args.num_aug,
        args.seed,
        min(workers, len(tasks)),
        args.canvas,
        plain=args.plain,
    )
    print(f"{args.output_dir}: ARC, {args.num_aug} augmentations, canvas {args.canvas}, seed {args.seed}")
    for source, found in sources.items():
        evaluation = sum(task.evaluation for task in found)
        print(f"  {source}: {len(found) - evaluation} training and {evaluation} evaluation tasks")
    print("\n".join(_summary(tasks, dict(made), repeated, args.num_aug, args.plain)))
    if renamed:
        print(f"  renamed: {_some([f'{name} ({where})' for where, name in renamed])}")
    for note in (*reader.notes, *faults.notes()):
        print(f"  {note}")


def _remedy(reader: Reader, clashes: int) -> str:
    """The options with which an invalid source could be built. clashes: faults for duplicate names."""
    ways = ["--skip-bad leaves them out"]
    if reader.largest:
        ways.append(f"--canvas {reader.largest} or more makes room")
    if clashes:
        ways.append("--rename-duplicates makes names unique")
    return ", ".join(ways)


def _summary(
    tasks: Sequence[Task], made: dict[str, int], left_out: Sequence[Task], num_aug: int, plain: bool
) -> Iterator[str]:
    for split in _splits(tasks):
        held = [task for task in tasks if split == "train" or task.evaluation]
        pairs = {task.name: task.pairs if not task.evaluation else getattr(task, split) for task in held}
        copies = {name: 1 if plain and split == "train" else made[name] for name in pairs}
        examples = sum(copies[name] * len(part) for name, part in pairs.items())
        puzzles = sum(copies.values())
        yield f"  {split}: {examples} examples of {puzzles} puzzles of {len(held)} tasks"
    if plain:
        yield f"    {sum(made.values())} names; train with augment=true, which draws puzzles among them"
    if len(_splits(tasks)) < 2:
        yield "    no test split: there are no evaluation tasks; --holdout 0.1 or --test-set makes some"
    unknown = sum(pair.output is None for task in tasks for pair in task.test)
    if unknown:
        yield f"    {unknown} tests without an answer, which are not counted"
    fewer = [f"{name} ({count - 1})" for name, count in made.items() if count <= num_aug]
    if fewer:
        yield f"  fewer than {num_aug} different augmentations: {_some(fewer)}"
    if left_out:
        yield f"  left out, equal to another task: {_some([task.name for task in left_out])}"
    found = [f"{name} ({other})" for name, other in leaks(tasks)]
    if found:
        yield f"  evaluation tasks equal to a training task up to symmetry and colours: {_some(found)}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)}: {', '.join(names[:NAMED])}{more}"
