"""Builds Sudoku data sets, generated or from files (`python -m hrm.data sudoku`).

Tokens: 0 is padding, 1 a blank cell, digit d is d + 1. A group is the original puzzle and its
augmentations; every puzzle is one example. Training and test share no solution grid, augmentations included:
no label row of one is in the other. A test grid may still equal a training grid up to symmetry. The summary
counts such leaks, and `--drop-leaks` removes them from training.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hrm.common.hub import fetch_files, is_remote
from hrm.common.threads import usable_cpus
from hrm.config.schema import Config
from hrm.data.format import PuzzleSet
from hrm.data.options import add_shared, refuse_idle
from hrm.data.sudoku.files import Puzzles, hold_out, prove_proper, read_puzzles, row_keys
from hrm.data.sudoku.solver import BOXES, SudokuError, random_grid, random_puzzle, solutions
from hrm.data.sudoku.summary import summary
from hrm.data.sudoku.symmetry import leaks, random_symmetries
from hrm.data.tables import file_of
from hrm.data.writer import Shape, cached, check_output, new_dataset

# Part of the name of cached data sets; increase it if equal parameters give other arrays. Runs resume on
# cached data of earlier versions, whose dataset.json has no kind.
FORMAT = 2
# Default number of clues for a size whose search for few clues would not end.
FEWEST = {16: 110}
# Maximum number of draws for one puzzle of the requested difficulty.
ATTEMPTS = 10_000
# Maximum number of redraws of augmentations that duplicate a puzzle of their group.
REDRAWS = 32
# Rows per augmentation chunk, which limits the memory of index arrays.
CHUNK_ROWS = 1 << 15
# Multiplier that makes equal puzzles of different groups differ: an arbitrary odd number.
GROUP_KEY = np.uint64(0x9E3779B97F4A7C15)


def builtin_sudoku(
    size: int,
    num_train: int,
    num_test: int,
    num_aug: int,
    seed: int,
    min_difficulty: int = 0,
    clues: int = 0,
) -> Path:
    """The folder of a generated data set, built on first use and cached (see `writer.cached`).

    size: 4, 6 or 9 cells per side; num_train, num_test: puzzles; num_aug: augmentations of each training
    puzzle; min_difficulty, clues: see `generate`. Raises SudokuError or DatasetError.
    """
    _check_request(size, num_train, num_test, num_aug, seed)
    name = (
        f"sudoku-{size}x{size}-v{FORMAT}-train{num_train}-test{num_test}-aug{num_aug}"
        f"-clues{clues}-difficulty{min_difficulty}-seed{seed}"
    )

    def build(folder: Path) -> None:
        train, test = generate(size, num_train, num_test, seed, min_difficulty, clues)
        write_sudoku(folder, train, test, num_aug, seed)

    return cached(name, build)


def data_folder(config: Config) -> Path:
    """A run's data set: the folder of data_path, or the built-in Sudoku, generated on first use."""
    if config.data_path is not None:
        return Path(config.data_path)
    return builtin_sudoku(**asdict(config.sudoku))


def generate(
    size: int, num_train: int, num_test: int, seed: int, min_difficulty: int = 0, clues: int = 0
) -> tuple[Puzzles, Puzzles]:
    """Random training and test puzzles with unique solutions; the splits share no solution grid.

    Puzzles are irreducible, or keep at least `clues` clues; clues=0 means FEWEST[size] if it is given. Each
    puzzle has a new grid; the 288 grids of 4x4 cells are divided between the splits first and reused in turn.
    A split repeats a puzzle only if there is no other. Raises SudokuError if it finds no puzzles of
    min_difficulty guesses.
    """
    _check_request(size, num_train, num_test, 0, seed)
    clues = clues or FEWEST.get(size, 0)
    if not 0 <= clues < size * size:
        raise SudokuError(f"clues={clues}: expected 0 (as few as possible) to {size * size - 1}")
    counts = {"test": num_test, "train": num_train}
    pools: dict[str, np.ndarray] = {}
    if size == 4:
        grids = np.random.default_rng([seed, 0]).permutation(solutions(np.zeros(16, np.uint8), 288)[0])
        # Divide the grids in proportion; the test gets at least a tenth, or num_test if that is less.
        cut = max(round(len(grids) * num_test / (num_train + num_test)), min(num_test, len(grids) // 10))
        cut = min(max(cut, 1), len(grids) - 1)
        pools = {"test": grids[:cut], "train": grids[cut:]}
    taken: set[bytes] = set()
    drawn = {}
    for number, (split, count) in enumerate(counts.items(), start=1):
        rng = np.random.default_rng([seed, number])
        drawn[split] = _draw(split, count, size, rng, pools.get(split), taken, min_difficulty, clues)
    return drawn["train"], drawn["test"]


def _draw(
    split: str,
    count: int,
    size: int,
    rng: np.random.Generator,
    pool: np.ndarray | None,
    taken: set[bytes],
    min_difficulty: int,
    clues: int,
) -> Puzzles:
    seen: set[bytes] = set()

    def one(number: int) -> tuple[np.ndarray, np.ndarray, int]:
        repeated = None
        for attempt in range(ATTEMPTS):
            if pool is not None:
                answer = pool[(number + attempt) % len(pool)]
            elif (answer := random_grid(size, rng)).tobytes() in taken:
                continue
            question = random_puzzle(answer, rng, clues)
            guesses = solutions(question)[1]
            if guesses >= min_difficulty:
                if question.tobytes() not in seen:
                    return question, answer, guesses
                repeated = question, answer, guesses
        if repeated is None:
            raise SudokuError(
                f"min_difficulty={min_difficulty}: none of {ATTEMPTS} random {size}x{size} puzzles needs "
                "that many guesses; lower it"
            )
        # All puzzles are used: start again, so that few occur a third time before all occur twice.
        seen.clear()
        return repeated

    questions = np.zeros((count, size * size), np.uint8)
    answers = np.zeros_like(questions)
    difficulty = np.zeros(count, np.int32)
    # Close the bar before an error is printed.
    with tqdm(range(count), desc=f"{split} puzzles", leave=False) as numbers:
        for number in numbers:
            questions[number], answers[number], difficulty[number] = one(number)
            seen.add(questions[number].tobytes())
            if pool is None:
                taken.add(answers[number].tobytes())
    return Puzzles(questions, answers, difficulty)


def augment(
    questions: np.ndarray, answers: np.ndarray, num_aug: int, test_answers: np.ndarray, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every puzzle followed by `num_aug` random symmetric ones, in chunks of whole groups.

    questions, answers: (N, n*n) uint8. Yields pairs of (groups * (1 + num_aug), n*n) uint8 arrays, about
    CHUNK_ROWS rows or one group, so that memory does not grow with N.
    Symmetries permute digits, bands, rows in a band, stacks and columns in a stack, and transpose if boxes
    are square. A puzzle whose answer is in test_answers (M, n*n) is drawn again until it is not. A repetition
    within a group is drawn again up to REDRAWS times, except for 9x9, where repetitions hardly occur.
    """
    size = int(questions.shape[1] ** 0.5)
    rows = num_aug + 1
    rng = np.random.default_rng([seed, 3])
    forbidden = row_keys(test_answers)
    span = max(1, CHUNK_ROWS // rows)
    for begin in tqdm(range(0, len(questions), span), desc="augmentations", leave=False, disable=not num_aug):
        x, y = (np.repeat(part[begin : begin + span], rows, axis=0) for part in (questions, answers))
        groups = np.arange(len(x)) // rows
        pending = np.nonzero(np.arange(len(x)) % rows)[0]
        redraws = 0
        while len(pending):
            originals = groups[pending] * rows
            x[pending], y[pending] = _transform(x[originals], y[originals], size, rng)
            again = np.zeros(len(x), bool)
            if size < 9 and redraws < REDRAWS:
                keys = row_keys(x) + groups.astype(np.uint64) * GROUP_KEY
                again[:] = True
                again[np.unique(keys, return_index=True)[1]] = False
            again[pending] |= np.isin(row_keys(y[pending]), forbidden)
            pending = np.nonzero(again)[0]
            redraws += 1
        yield x, y


def _transform(
    questions: np.ndarray, answers: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Applies a random symmetry to every puzzle, (M, n*n) each."""
    cells, digits = random_symmetries(len(questions), size, rng)
    new_answers = np.take_along_axis(digits, np.take_along_axis(answers, cells, axis=1), axis=1)
    return np.where(np.take_along_axis(questions, cells, axis=1) > 0, new_answers, np.uint8(0)), new_answers


def write_sudoku(folder: str | Path, train: Puzzles, test: Puzzles, num_aug: int, seed: int) -> None:
    """Augments the training puzzles and writes the data set; no training answer may be a test answer."""
    size = int(train.questions.shape[1] ** 0.5)
    with new_dataset(folder) as data:
        for name, puzzles, copies in (("train", train, num_aug), ("test", test, 0)):
            split = data.split(name, Shape(size * size, size + 2, kind="sudoku"))
            for inputs, labels in augment(puzzles.questions, puzzles.answers, copies, test.answers, seed):
                part = _groups(inputs, labels, copies + 1)
                difficulty = puzzles.difficulty[split.groups :][: len(part.group_indices) - 1]
                split.add("all", part, np.repeat(difficulty, copies + 1))
        data.close(["<blank>"])


def _groups(questions: np.ndarray, answers: np.ndarray, rows: int) -> PuzzleSet:
    """Groups of `rows` puzzles each, as tokens; every puzzle is one example."""
    count = len(questions)
    return PuzzleSet(
        inputs=questions + np.uint8(1),
        labels=answers + np.uint8(1),
        puzzle_identifiers=np.zeros(count, np.int32),
        puzzle_indices=np.arange(count + 1, dtype=np.int32),
        group_indices=np.arange(0, count + 1, rows, dtype=np.int32),
    )


def _check_request(size: int, num_train: int, num_test: int, num_aug: int, seed: int) -> None:
    if size not in BOXES:
        raise SudokuError(f"size={size}: expected one of {', '.join(map(str, BOXES))}")
    for name, value, low in (
        ("num_train", num_train, 1),
        ("num_test", num_test, 1),
        ("num_aug", num_aug, 0),
        ("seed", seed, 0),
    ):
        if value < low:
            raise SudokuError(f"{name}={value}: expected at least {low}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m hrm.data sudoku`."""
    add = parser.add_argument
    add_shared(parser, "puzzles", "--output-dir")
    add(
        "--source",
        default="generated",
        help="'generated' (default); a folder with a train and a test file; hub:NAME, a data set of the "
        "Hugging Face hub with train.csv and test.csv, such as hub:sapientinc/sudoku-extreme; one file, of "
        "which a share is held out for the test. A file is a table (columns found by name: question, puzzle, "
        "quizzes; answer, solution; rating, difficulty), one puzzle per line, or grids (.sdk, .ss, .sdm)",
    )
    add("--size", type=int, default=9, choices=list(BOXES), help="cells along a side (default 9)")
    add_shared(parser, "puzzles", "--num-train", "--num-test")
    add(
        "--clues",
        type=int,
        help="clues to leave in generated puzzles (default: as few as possible, 110 for 16x16)",
    )
    add("--num-aug", type=int, default=0, help="augmentations of every training puzzle (default 0)")
    add_shared(parser, "puzzles", "--subsample-size")
    add(
        "--min-difficulty",
        type=int,
        default=0,
        help="minimum rating, or guesses of the solver without ratings",
    )
    add_shared(parser, "puzzles", "--test-size")
    add(
        "--skip-improper",
        action="store_true",
        help="skip puzzles with no or several solutions, and report how many; else they are an error",
    )
    add_shared(parser, "puzzles", "--skip-bad")
    add(
        "--drop-leaks",
        action="store_true",
        help="remove training puzzles whose solution grid equals a test grid up to symmetry (9x9)",
    )
    add_shared(parser, "puzzles", "--seed", "--workers")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Builds a data set from the options and prints a summary. Raises SudokuError or DatasetError."""
    check_output(args.output_dir)
    generated = args.source == "generated"
    hub = is_remote(args.source)
    folder = not generated and (hub or Path(args.source).is_dir())
    has_effect = {
        **dict.fromkeys(("num_train", "num_test", "clues"), generated),
        **dict.fromkeys(("skip_improper", "skip_bad"), not generated),
        "test_size": not generated and not folder,
    }
    refuse_idle(args, has_effect, f"--source {args.source}", SudokuError)
    num_train, num_test = (1000 if n is None else n for n in (args.num_train, args.num_test))
    workers = usable_cpus() if args.workers is None else args.workers
    _check_request(args.size, num_train, num_test, args.num_aug, args.seed)
    for option, value in (("workers", workers), ("subsample_size", args.subsample_size)):
        if value is not None and value < 1:
            raise SudokuError(f"{option}={value}: expected at least 1")
    # Smaller grids are nearly all equivalent: there are 2 classes of 4x4 and 49 of 6x6. Canonical forms of
    # larger grids take too long.
    if args.drop_leaks and args.size != 9:
        raise SudokuError(f"--drop-leaks has no meaning for --size {args.size}; leave it out")
    rng = np.random.default_rng([args.seed, 4])
    if generated:
        train, test = generate(
            args.size, num_train, num_test, args.seed, args.min_difficulty, args.clues or 0
        )
    else:
        train, test = _from_files(args, hub, folder, workers, rng)
    train, notes = _apart(args, train, test, workers)
    if args.subsample_size is not None and args.subsample_size < len(train.questions):
        train = train.take(rng.choice(len(train.questions), args.subsample_size, replace=False))
    if not generated:
        prove_proper(train, workers)
        prove_proper(test, workers)
    found = leaks(train, test, workers) if args.size == 9 and not args.drop_leaks else None
    write_sudoku(args.output_dir, train, test, args.num_aug, args.seed)
    print(f"{args.output_dir}: {args.size}x{args.size} Sudoku, seed {args.seed}")
    print("\n".join([*summary(train, test, args.num_aug, found), *(f"  {note}" for note in notes)]))


def _from_files(
    args: argparse.Namespace, hub: bool, folder: bool, workers: int, rng: np.random.Generator
) -> tuple[Puzzles, Puzzles]:
    def read(path: Path) -> Puzzles:
        return read_puzzles(
            path,
            args.size,
            args.min_difficulty,
            skip_improper=args.skip_improper,
            skip_bad=args.skip_bad,
            workers=workers,
        )

    if folder:
        source = fetch_files(args.source, ["train.csv", "test.csv"]) if hub else Path(args.source)
        return read(file_of(source, "train")), read(file_of(source, "test"))
    return hold_out(read(Path(args.source)), 0.1 if args.test_size is None else args.test_size, rng)


def _apart(
    args: argparse.Namespace, train: Puzzles, test: Puzzles, workers: int
) -> tuple[Puzzles, list[str]]:
    """The training puzzles without leaks, and a message about the removed ones."""
    notes = list(dict.fromkeys([*train.notes, *test.notes]))
    shared = np.isin(row_keys(train.answers), row_keys(test.answers))
    if count := int(shared.sum()):
        same = int(np.isin(row_keys(train.questions), row_keys(test.questions)).sum())
        notes.append(
            f"left out of train: {count} with the solution of a test puzzle, {same} of them the same puzzle"
        )
    train = _kept(args, train, ~shared)
    if args.drop_leaks:
        equivalent = leaks(train, test, workers).train_grids
        notes.append(
            f"left out of train: {equivalent.sum()} with a solution equivalent to that of a test puzzle"
        )
        train = _kept(args, train, ~equivalent)
    return train, notes


def _kept(args: argparse.Namespace, train: Puzzles, rows: np.ndarray) -> Puzzles:
    if not rows.any():
        raise SudokuError(
            f"{args.source}: every training puzzle has the solution of a test puzzle; none is left"
        )
    return train.take(rows)
