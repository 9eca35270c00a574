"""Builds maze data sets, generated or from files (`python -m hrm.data maze`).

Tokens: 0 is padding, 1 to 5 are the characters of "# SGo"; labels are the mazes with a shortest path marked.
A group is one maze and its rotated and reflected copies; every maze is one example, and its difficulty is the
length of its path. Symmetric mazes count as equal: apart from augmentations each occurs once, and training
and test share none. Mazes are processed in chunks; memory keeps about a hundred bytes per maze.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from hrm.common.hub import fetch_files, is_remote
from hrm.common.threads import usable_cpus
from hrm.data.faults import Faults
from hrm.data.format import NUMBERS, PuzzleSet
from hrm.data.inspect.histogram import histogram
from hrm.data.maze.files import MazeError, Mazes, keys, read_mazes
from hrm.data.maze.search import random_mazes, symmetric, symmetries_of
from hrm.data.maze.text import SMALLEST_SIDE
from hrm.data.options import add_shared, refuse_idle
from hrm.data.tables import file_of
from hrm.data.workers import over_rows
from hrm.data.writer import Shape, check_output, new_dataset

VOCABULARY = 6
GENERATED = "generated"
DEFAULTS = {"size": (30, 30), "kind": "perfect", "min_length": 0, "num_train": 1000, "num_test": 1000}
# Maximum number of draws for one maze of the requested path length.
ATTEMPTS = 10_000
# Maximum number of cells in a maze, which is the sequence length.
MOST_CELLS = NUMBERS["seq_len"][1]
# Approximate number of cells in a chunk of generated mazes.
CHUNK_CELLS = 1 << 22
# Random streams: mazes of each split, augmentations, selection.
STREAMS = {"test": 1, "train": 2}
AUGMENTING, CHOOSING = 3, 4


@dataclass(frozen=True)
class Request:
    """The mazes to generate: rows x columns cells, with a path of at least min_length steps.

    braided: with loops instead of dead ends; see `search.random_mazes`.
    """

    rows: int = 30
    columns: int = 30
    braided: bool = False
    min_length: int = 0
    seed: int = 0

    @property
    def row_length(self) -> int | None:
        """See `Mazes.columns`."""
        return None if self.rows == self.columns else self.columns


def generate(
    request: Request, split: str, count: int, taken: set[bytes], workers: int = 1
) -> Iterator[Mazes]:
    """Yields `count` random mazes in chunks, none of them in `taken`, and adds them to `taken`.

    split: "test" or "train", which have separate random streams. taken: see `files.keys`. workers: threads;
    mazes do not depend on their number. Raises MazeError if it finds no such mazes.
    """
    cells = request.rows * request.columns
    size = max(1, CHUNK_CELLS // cells)
    rng = np.random.default_rng([request.seed, STREAMS[split]])
    for first in range(0, count, size):
        rows = min(size, count - first)
        questions, answers = np.empty((2, rows, cells), np.uint8)
        mazes = Mazes(questions, answers, np.empty(rows, np.int32), request.row_length)
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
        (request.rows, request.columns),
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
    found[rows] = keys(part.questions, request.row_length)


def _out_of_reach(request: Request) -> MazeError:
    size = f"{request.rows}" + f"x{request.columns}" * (request.rows != request.columns)
    return MazeError(
        f"size={size} min_length={request.min_length}: none of {ATTEMPTS} random "
        "mazes has a path that long and is new; lower --min-length, --num-train or --num-test, or "
        "raise --size"
    )


@dataclass(frozen=True)
class Form:
    """Options for reading maze files; see `files.read_mazes`. skip_bad: skip invalid mazes."""

    columns: int | None = None
    skip_bad: bool = False


@dataclass(frozen=True)
class Selection:
    """The selected mazes of a file, as a bool for each, and the numbers of duplicates and of test mazes.

    form: how the file is read. notes: lines about skipped mazes.
    """

    path: Path
    kept: np.ndarray
    repeated: int
    in_test: int = 0
    form: Form = Form()
    notes: tuple[str, ...] = ()

    def mazes(self) -> Iterator[Mazes]:
        """Reads the selected mazes, in chunks."""
        first = 0
        faults = Faults(skip=self.form.skip_bad, error=MazeError)
        for chunk in read_mazes(self.path, columns=self.form.columns, check=False, faults=faults):
            yield chunk.take(np.nonzero(self.kept[first : first + len(chunk.lengths)])[0])
            first += len(chunk.lengths)


def select(train: Path, test: Path, form: Form = Form()) -> dict[str, Selection]:
    """Reads and checks two files; removes duplicates, and test mazes from training.

    Symmetric mazes count as equal. Raises MazeError.
    """
    classes, shapes, notes = {}, {}, {}
    for split, path in (("test", test), ("train", train)):
        classes[split], (rows, cols), notes[split] = _classes(path, form)
        shapes[split] = f"{rows} x {cols}"
    if shapes["test"] != shapes["train"]:
        raise MazeError(
            f"{train}: mazes of {shapes['train']} cells, but {shapes['test']} in {test}; expected one size"
        )
    first_of_train, first_of_test = _first_of_each(classes["train"]), _first_of_each(classes["test"])
    in_test = np.isin(classes["train"], classes["test"])
    kept = first_of_train & ~in_test
    if not kept.any():
        raise MazeError(f"{train}: every maze is also in the test file {test}; expected other mazes")
    repeated = {"train": int((~first_of_train & ~in_test).sum()), "test": int((~first_of_test).sum())}
    return {
        "train": Selection(train, kept, repeated["train"], int(in_test.sum()), form, notes["train"]),
        "test": Selection(test, first_of_test, repeated["test"], 0, form, notes["test"]),
    }


def hold_out(
    path: Path, test_size: float, rng: np.random.Generator, form: Form = Form()
) -> dict[str, Selection]:
    """Reads and checks one file, and uses a share of about `test_size` for the test. Raises MazeError."""
    if not 0 < test_size < 1:
        raise MazeError(f"test_size={test_size:g}: expected a part of the mazes, between 0 and 1")
    classes, _, notes = _classes(path, form)
    first = _first_of_each(classes)
    rows = np.nonzero(first)[0]
    if len(rows) < 2:
        raise MazeError(
            f"{path}: {len(rows)} maze, expected 2 or more to hold out a test; add "
            "mazes, or give a folder with a train and a test file"
        )
    number = min(max(round(test_size * len(rows)), 1), len(rows) - 1)
    held = np.zeros(len(classes), bool)
    held[rng.choice(rows, number, replace=False)] = True
    return {
        "train": Selection(path, first & ~held, int((~first).sum()), 0, form, notes),
        "test": Selection(path, held, 0, 0, form),
    }


def _classes(path: Path, form: Form) -> tuple[np.ndarray, tuple[int, int], tuple[str, ...]]:
    """The key of every valid maze of a file, their common shape, and notes on skipped mazes."""
    faults = Faults(skip=form.skip_bad, error=MazeError)
    found: list[np.ndarray] = []
    for mazes in read_mazes(path, columns=form.columns, faults=faults):
        found.append(keys(mazes.questions, mazes.columns))
        shape = mazes.shape
    if not found:
        raise MazeError(f"{path}: it holds no valid maze; {faults.listed()}")
    return np.concatenate(found), shape, tuple(f"  {path.name}: {note}" for note in faults.notes())


def _first_of_each(classes: np.ndarray) -> np.ndarray:
    first = np.zeros(len(classes), bool)
    first[np.unique(classes, return_index=True)[1]] = True
    return first


def augment(mazes: Mazes, num_aug: int, rng: np.random.Generator) -> Mazes:
    """Every maze, followed by `num_aug` random symmetric copies in the order of `search.symmetric`; a square
    has seven, a rectangle three."""
    count, shape = len(mazes.lengths), mazes.shape
    keeping = np.array(symmetries_of(shape))
    _check_num_aug(num_aug, shape)
    symmetries = np.zeros((count, 1 + num_aug), np.int64)
    others = rng.random((count, len(keeping) - 1)).argsort(axis=1)[:, :num_aug] + 1
    symmetries[:, 1:] = keeping[np.sort(others, axis=1)]

    def turn(originals: np.ndarray) -> np.ndarray:
        turned = np.empty((*symmetries.shape, *shape), np.uint8)
        for symmetry in keeping.tolist():
            rows, places = np.nonzero(symmetries == symmetry)
            turned[rows, places] = symmetric(originals.reshape(-1, *shape)[rows], symmetry)
        return turned.reshape(-1, originals.shape[1])

    lengths = np.repeat(mazes.lengths, 1 + num_aug)
    return Mazes(turn(mazes.questions), turn(mazes.answers), lengths, mazes.columns)


def write_mazes(
    folder: str | Path, splits: Mapping[str, Iterable[Mazes]], num_aug: int, seed: int
) -> dict[str, np.ndarray]:
    """Writes a data set with augmented training mazes; returns the path lengths of every split.

    splits: chunks of mazes by name, all of one shape. Raises DatasetError; see `writer.new_dataset`.
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
                if writer is None:
                    cells = mazes.questions.shape[1]
                    writer = data.split(split, Shape(cells, VOCABULARY, kind="maze", columns=mazes.columns))
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
    add_shared(parser, "mazes", "--output-dir")
    add(
        "--source",
        default=GENERATED,
        help="'generated' (default); folder with train and test files; one file, a part of which is held out "
        "for the test; hub:NAME, a data set of the Hugging Face hub. A .csv has the columns "
        "question,answer; a .txt has a maze per line or grids; letters '# SGo' or maze-dataset's '# SEX'",
    )
    add("--columns", type=int, help="cells in a row of a file's mazes (default: square, or one line per row)")
    add(
        "--size",
        type=_size,
        help=f"sides of generated mazes in cells, such as 30 or 20x40, {SMALLEST_SIDE} or more (default 30)",
    )
    add("--kind", choices=("perfect", "braided"), help="one path between any two cells (default), or loops")
    add("--min-length", type=int, help="minimum steps from start to goal of generated mazes (default: any)")
    add_shared(parser, "mazes", "--num-train", "--num-test")
    add(
        "--num-aug",
        type=int,
        default=0,
        help="rotated and reflected copies of each training maze: 0 (default) to 7, or 3 if not square",
    )
    add_shared(parser, "mazes", "--subsample-size", "--test-size", "--skip-bad", "--seed", "--workers")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Builds a data set from the options and prints a summary. Raises MazeError or DatasetError."""
    check_output(args.output_dir)
    _complete(args)
    splits, notes = _generated(args) if args.source == GENERATED else _from_files(args)
    lengths = write_mazes(args.output_dir, splits, args.num_aug, args.seed)
    head = f"{args.output_dir}: mazes, seed {args.seed}"
    print("\n".join([head, *_summary(lengths, args.num_aug), *notes]))


def _size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and len(side) < 6 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a side, such as 30, nor two, such as 20x40")
    return int(sides[0]), int(sides[-1])


def _complete(args: argparse.Namespace) -> None:
    """Rejects options that are out of range or have no effect, and fills in defaults."""
    generated = args.source == GENERATED
    made = ("size", "kind", "min_length", "num_train", "num_test", "workers")
    refuse_idle(
        args,
        {
            **dict.fromkeys(made, generated),
            **dict.fromkeys(("columns", "skip_bad"), not generated),
            "test_size": not generated and _is_one_file(args.source),
        },
        f"--source {args.source}",
        MazeError,
    )
    for name, default in {**DEFAULTS, "workers": usable_cpus(), "test_size": 0.1}.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if min(args.size) < SMALLEST_SIDE:
        raise MazeError(f"size={min(args.size)}: expected at least {SMALLEST_SIDE}")
    if args.size[0] * args.size[1] > MOST_CELLS:
        raise MazeError(f"size={args.size[0]}x{args.size[1]}: expected at most {MOST_CELLS:,} cells")
    at_least = {"columns": SMALLEST_SIDE, "num_train": 1, "num_test": 1, "workers": 1, "subsample_size": 1}
    for name in (*at_least, "min_length", "seed"):
        value, low = getattr(args, name), at_least.get(name, 0)
        if value is not None and value < low:
            raise MazeError(f"{name}={value}: expected at least {low}")
    _check_num_aug(args.num_aug, args.size)


def _check_num_aug(num_aug: int, shape: tuple[int, int]) -> None:
    most = len(symmetries_of(shape)) - 1
    if not 0 <= num_aug <= most:
        of_what = "a square" if shape[0] == shape[1] else f"a rectangle of {shape[0]} x {shape[1]} cells"
        raise MazeError(f"num_aug={num_aug}: expected 0 to {most}, the other symmetries of {of_what}")


def _is_one_file(source: str) -> bool:
    return not is_remote(source) and not Path(source).is_dir()


def _generated(args: argparse.Namespace) -> tuple[dict[str, Iterable[Mazes]], list[str]]:
    rows, columns = args.size
    request = Request(rows, columns, args.kind == "braided", args.min_length, args.seed)
    # The first mazes of a random selection are a random selection too.
    counts = {"test": args.num_test, "train": min(args.num_train, args.subsample_size or args.num_train)}
    taken: set[bytes] = set()
    return {name: generate(request, name, count, taken, args.workers) for name, count in counts.items()}, []


def _from_files(args: argparse.Namespace) -> tuple[dict[str, Iterable[Mazes]], list[str]]:
    rng = np.random.default_rng([args.seed, CHOOSING])
    form = Form(args.columns, args.skip_bad)
    if _is_one_file(args.source):
        selections = hold_out(Path(args.source), args.test_size, rng, form)
    else:
        hub = is_remote(args.source)
        folder = fetch_files(args.source, ("train.csv", "test.csv")) if hub else Path(args.source)
        selections = select(file_of(folder, "train"), file_of(folder, "test"), form)
    train = selections["train"]
    rows = np.nonzero(train.kept)[0]
    if args.subsample_size is not None and args.subsample_size < len(rows):
        train.kept[:] = False
        train.kept[rng.choice(rows, args.subsample_size, replace=False)] = True
    notes = [
        f"  left out of {name}: {selection.repeated} duplicates, up to rotation and reflection"
        for name, selection in selections.items()
        if selection.repeated
    ]
    if train.in_test:
        notes.append(f"  left out of train: {train.in_test} test mazes, up to rotation and reflection")
    notes += [note for selection in selections.values() for note in selection.notes]
    return {name: selection.mazes() for name, selection in selections.items()}, notes


def _summary(lengths: dict[str, np.ndarray], num_aug: int) -> Iterator[str]:
    for split, rows in (("train", 1 + num_aug), ("test", 1)):
        steps = lengths[split]
        yield f"  {split}: {len(steps) * rows} examples of {len(steps)} mazes, steps of the shortest path:"
        yield from (f"    {line}" for line in histogram(steps))
