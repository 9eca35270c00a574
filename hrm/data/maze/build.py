"""Builds maze data sets, generated or from files (`python -m hrm.data maze`).

Tokens: 0 is padding, 1 to 5 are the characters of "# SGo"; labels are the mazes with a shortest path marked.
A group is one maze and its turned and mirrored copies; every maze is one example, and its difficulty is the
length of its path. Mazes that are symmetric to each other count as equal: apart from augmentations a data set
has each of them once, and training and test share none. Mazes pass through memory in chunks; about a hundred
bytes of each stay.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from hrm.common.threads import usable_cpus
from hrm.data.format import PuzzleSet
from hrm.data.hub import PREFIX, fetch
from hrm.data.inspect.histogram import histogram
from hrm.data.maze.files import SMALLEST_SIDE, MazeError, Mazes, keys, read_mazes
from hrm.data.maze.search import SYMMETRIES, random_mazes, symmetric
from hrm.data.workers import over_rows
from hrm.data.writer import Shape, check_output, new_dataset

VOCABULARY = 6
GENERATED = "generated"
DEFAULTS = {"size": 30, "kind": "perfect", "min_length": 0, "num_train": 1000, "num_test": 1000}
# Draws for one maze before its length of path, or a new maze, counts as out of reach.
ATTEMPTS = 10_000
# Cells, roughly, in a chunk of generated mazes.
CHUNK_CELLS = 1 << 22
# Streams of random numbers: mazes of each split, augmentations, selection.
STREAMS = {"test": 1, "train": 2}
AUGMENTING, CHOOSING = 3, 4


@dataclass(frozen=True)
class Request:
    """The mazes to generate: side x side cells, with a path of at least min_length steps.

    braided: without dead ends, so with loops; see `search.random_mazes`.
    """

    side: int = 30
    braided: bool = False
    min_length: int = 0
    seed: int = 0


def generate(
    request: Request, split: str, count: int, taken: set[bytes], workers: int = 1
) -> Iterator[Mazes]:
    """Yields `count` random mazes in chunks, none of them in `taken`, and adds them to `taken`.

    split: "test" or "train", which have their own random numbers. taken: see `files.keys`. workers: threads;
    mazes do not depend on their number. Raises MazeError if such mazes are out of reach.
    """
    cells = request.side**2
    size = max(1, CHUNK_CELLS // cells)
    rng = np.random.default_rng([request.seed, STREAMS[split]])
    for first in range(0, count, size):
        rows = min(size, count - first)
        questions, answers = np.empty((2, rows, cells), np.uint8)
        mazes = Mazes(questions, answers, np.empty(rows, np.int32))
        states = rng.integers(1, 1 << 63, rows, np.uint64)
        found = np.empty(rows, "S16")
        draw = partial(_draw, request, mazes, states, found)
        over_rows(draw, rows, workers, f"{split} mazes from {first + 1} of {count}")
        for row in range(rows):
            attempts = 1
            while found[row] in taken:
                if attempts == ATTEMPTS:
                    raise _out_of_reach(request)
                attempts += 1
                draw(slice(row, row + 1))
            taken.add(bytes(found[row]))
        yield mazes


def _draw(request: Request, mazes: Mazes, states: np.ndarray, found: np.ndarray, rows: slice) -> None:
    """New mazes in these rows, and their keys."""
    part = Mazes(mazes.questions[rows], mazes.answers[rows], mazes.lengths[rows])
    random_mazes(
        request.braided,
        request.min_length,
        ATTEMPTS,
        states[rows],
        part.questions,
        part.answers,
        part.lengths,
    )
    if not part.lengths.all():
        raise _out_of_reach(request)
    found[rows] = keys(part.questions)


def _out_of_reach(request: Request) -> MazeError:
    return MazeError(
        f"size={request.side} min_length={request.min_length}: none of {ATTEMPTS} random mazes has a path "
        "that long and is not there yet; lower --min-length, --num-train or --num-test, or raise --size"
    )


@dataclass(frozen=True)
class Selection:
    """The mazes of a file for a split: a bool for each; the numbers of repetitions and of test mazes."""

    path: Path
    kept: np.ndarray
    repeated: int
    in_test: int = 0

    def mazes(self) -> Iterator[Mazes]:
        """Reads them, in chunks."""
        first = 0
        for chunk in read_mazes(self.path, check=False):
            yield chunk.take(np.nonzero(self.kept[first : first + len(chunk.lengths)])[0])
            first += len(chunk.lengths)


def select(train: Path, test: Path) -> dict[str, Selection]:
    """Reads and checks two files; keeps the first of equal mazes, and no test maze for training.

    Mazes that are symmetric to each other are equal. Raises MazeError.
    """
    classes, sides = {}, {}
    for split, path in (("test", test), ("train", train)):
        classes[split], sides[split] = _classes(path)
    if sides["test"] != sides["train"]:
        raise MazeError(
            f"{train}: mazes of side {sides['train']}, but {sides['test']} in {test}; expected one size"
        )
    first_of_train, first_of_test = _first_of_each(classes["train"]), _first_of_each(classes["test"])
    in_test = np.isin(classes["train"], classes["test"])
    kept = first_of_train & ~in_test
    if not kept.any():
        raise MazeError(f"{train}: every maze is one of the test {test}; expected others")
    return {
        "train": Selection(train, kept, int((~first_of_train & ~in_test).sum()), int(in_test.sum())),
        "test": Selection(test, first_of_test, int((~first_of_test).sum())),
    }


def hold_out(path: Path, test_size: float, rng: np.random.Generator) -> dict[str, Selection]:
    """Reads and checks one file, and takes about `test_size` of its mazes for the test. Raises MazeError."""
    if not 0 < test_size < 1:
        raise MazeError(f"test_size={test_size:g}: expected a part of the mazes, between 0 and 1")
    classes, _ = _classes(path)
    first = _first_of_each(classes)
    rows = np.nonzero(first)[0]
    if len(rows) < 2:
        raise MazeError(f"{path}: {len(rows)} maze, expected 2 or more to hold out a test")
    number = min(max(round(test_size * len(rows)), 1), len(rows) - 1)
    held = np.zeros(len(classes), bool)
    held[rng.choice(rows, number, replace=False)] = True
    return {
        "train": Selection(path, first & ~held, int((~first).sum())),
        "test": Selection(path, held, 0),
    }


def _classes(path: Path) -> tuple[np.ndarray, int]:
    """The key of every maze of a file, and the side of all."""
    found: list[np.ndarray] = []
    for mazes in read_mazes(path):
        found.append(keys(mazes.questions))
        side = mazes.side
    return np.concatenate(found), side


def _first_of_each(classes: np.ndarray) -> np.ndarray:
    first = np.zeros(len(classes), bool)
    first[np.unique(classes, return_index=True)[1]] = True
    return first


def augment(mazes: Mazes, num_aug: int, rng: np.random.Generator) -> Mazes:
    """Every maze, followed by `num_aug` random ones of its seven symmetric mazes in the order of
    `search.symmetric`."""
    count, side = len(mazes.lengths), mazes.side
    symmetries = np.zeros((count, 1 + num_aug), np.int64)
    others = rng.random((count, SYMMETRIES - 1)).argsort(axis=1)[:, :num_aug] + 1
    symmetries[:, 1:] = np.sort(others, axis=1)

    def turn(originals: np.ndarray) -> np.ndarray:
        turned = np.empty((*symmetries.shape, side, side), np.uint8)
        for symmetry in range(SYMMETRIES):
            rows, places = np.nonzero(symmetries == symmetry)
            turned[rows, places] = symmetric(originals.reshape(-1, side, side)[rows], symmetry)
        return turned.reshape(-1, side * side)

    return Mazes(turn(mazes.questions), turn(mazes.answers), np.repeat(mazes.lengths, 1 + num_aug))


def write_mazes(
    folder: str | Path, splits: Mapping[str, Iterable[Mazes]], num_aug: int, seed: int
) -> dict[str, np.ndarray]:
    """Writes a data set with augmented training mazes; returns the lengths of paths of every split.

    splits: name to chunks of mazes, all of one side. Raises DatasetError; see `writer.new_dataset`.
    """
    rng = np.random.default_rng([seed, AUGMENTING])
    lengths: dict[str, list[np.ndarray]] = {split: [] for split in splits}
    with new_dataset(folder) as data:
        for split, chunks in splits.items():
            writer = None
            rows = 1 + num_aug if split == "train" else 1
            for mazes in chunks:
                if not len(mazes.lengths):
                    continue
                writer = writer or data.split(split, Shape(mazes.side**2, VOCABULARY, kind="maze"))
                lengths[split].append(mazes.lengths)
                mazes = augment(mazes, rows - 1, rng)
                count = len(mazes.lengths)
                part = PuzzleSet(
                    inputs=mazes.questions,
                    labels=mazes.answers,
                    puzzle_identifiers=np.zeros(count, np.int32),
                    puzzle_indices=np.arange(count + 1, dtype=np.int32),
                    group_indices=np.arange(0, count + 1, rows, dtype=np.int32),
                )
                writer.add("all", part, mazes.lengths)
        data.close(["<blank>"])
    return {split: np.concatenate(parts) for split, parts in lengths.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m hrm.data maze`."""
    add = parser.add_argument
    add(
        "--output-dir", type=Path, required=True, help="folder of the data set; one already there is replaced"
    )
    add(
        "--source",
        default=GENERATED,
        help="'generated' (default); a folder with train.csv and test.csv; one .csv file, of which a part is "
        "held out for the test; hub:NAME, a data set of the Hugging Face hub. Columns: "
        "source,question,answer,rating",
    )
    add("--size", type=int, help=f"side of generated mazes in cells, {SMALLEST_SIDE} or more (default 30)")
    add("--kind", choices=("perfect", "braided"), help="one way between any two cells (default), or loops")
    add("--min-length", type=int, help="least steps from start to goal of generated mazes (default: any)")
    add("--num-train", type=int, help="training mazes to generate (default 1000)")
    add("--num-test", type=int, help="test mazes to generate (default 1000)")
    add(
        "--num-aug", type=int, default=0, help="of every training maze, turned and mirrored: 0 (default) to 7"
    )
    add("--subsample-size", type=int, help="keep this many training mazes, chosen at random")
    add("--test-size", type=float, help="part of a single file that is held out for the test (default 0.1)")
    add("--seed", type=int, default=0, help="same seed, same bytes (default 0)")
    add("--workers", type=int, help="threads that generate; changes no byte (default: one per core)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Builds a data set from the options and prints a summary. Raises MazeError or DatasetError."""
    check_output(args.output_dir)
    _complete(args)
    splits, notes = _generated(args) if args.source == GENERATED else _from_files(args)
    lengths = write_mazes(args.output_dir, splits, args.num_aug, args.seed)
    head = f"{args.output_dir}: mazes, seed {args.seed}"
    print("\n".join([head, *_summary(lengths, args.num_aug), *notes]))


def _complete(args: argparse.Namespace) -> None:
    """Refuses options that are out of range or have no effect, and fills in defaults."""
    generated = args.source == GENERATED
    for name, default in {**DEFAULTS, "workers": usable_cpus(), "test_size": 0.1}.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif generated == (name == "test_size") or (name == "test_size" and not _is_one_file(args.source)):
            option = "--" + name.replace("_", "-")
            raise MazeError(f"{option} has no meaning for --source {args.source}; leave it out")
    at_least = {"size": SMALLEST_SIDE, "num_train": 1, "num_test": 1, "workers": 1, "subsample_size": 1}
    for name in (*at_least, "min_length", "seed"):
        value, low = getattr(args, name), at_least.get(name, 0)
        if value is not None and value < low:
            raise MazeError(f"{name}={value}: expected at least {low}")
    if not 0 <= args.num_aug < SYMMETRIES:
        raise MazeError(f"num_aug={args.num_aug}: expected 0 to {SYMMETRIES - 1}, the symmetries of a square")


def _is_one_file(source: str) -> bool:
    return not source.startswith(PREFIX) and not Path(source).is_dir()


def _generated(args: argparse.Namespace) -> tuple[dict[str, Iterable[Mazes]], list[str]]:
    request = Request(args.size, args.kind == "braided", args.min_length, args.seed)
    # The first mazes of a larger draw are a draw themselves.
    counts = {"test": args.num_test, "train": min(args.num_train, args.subsample_size or args.num_train)}
    taken: set[bytes] = set()
    return {name: generate(request, name, count, taken, args.workers) for name, count in counts.items()}, []


def _from_files(args: argparse.Namespace) -> tuple[dict[str, Iterable[Mazes]], list[str]]:
    rng = np.random.default_rng([args.seed, CHOOSING])
    if _is_one_file(args.source):
        selections = hold_out(Path(args.source), args.test_size, rng)
    else:
        names = ("train.csv", "test.csv")
        folder = fetch(args.source, names) if args.source.startswith(PREFIX) else Path(args.source)
        selections = select(*(folder / name for name in names))
    train = selections["train"]
    rows = np.nonzero(train.kept)[0]
    if args.subsample_size is not None and args.subsample_size < len(rows):
        train.kept[:] = False
        train.kept[rng.choice(rows, args.subsample_size, replace=False)] = True
    notes = [
        f"  left out of {name}: {selection.repeated} that repeat another one, turned or mirrored"
        for name, selection in selections.items()
        if selection.repeated
    ]
    if train.in_test:
        notes.append(f"  left out of train: {train.in_test} that are in the test, turned or mirrored")
    return {name: selection.mazes() for name, selection in selections.items()}, notes


def _summary(lengths: dict[str, np.ndarray], num_aug: int) -> Iterator[str]:
    for split, rows in (("train", 1 + num_aug), ("test", 1)):
        steps = lengths[split]
        yield f"  {split}: {len(steps) * rows} examples of {len(steps)} mazes, steps of the shortest path:"
        yield from (f"    {line}" for line in histogram(steps))
