"""Sudoku data sets: generated or from files, split, augmented, written (`python -m hrm.data sudoku`).

Tokens: 0 is padding, 1 a blank cell, digit d is d + 1. A group is one puzzle, first as it came, then its
augmentations; every puzzle is one example. Training and test are disjoint in solution grids as they are
written, every augmentation included: no label row of one is in the other. They are not disjoint up to
symmetry: a test grid may be a relabelled or rearranged training grid.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hrm.data.layout import Metadata, PuzzleSet
from hrm.data.solver import BOXES, SudokuError, random_grid, random_puzzle, solutions
from hrm.data.sudoku_files import Puzzles, hold_out, prove_proper, read_puzzles
from hrm.data.writer import cached, check_output, write_dataset

# Part of the name of cached data sets: raise it when the same parameters give other bytes.
FORMAT = 1
# Draws for one puzzle before its difficulty, or a new one, counts as out of reach.
ATTEMPTS = 10_000
# Redraws of augmentations that repeat a puzzle of their group, before the repetitions stay.
REDRAWS = 32
# Rows that are augmented at a time: bounds the memory of the index arrays.
CHUNK_ROWS = 1 << 15


def builtin_sudoku(
    size: int,
    num_train: int,
    num_test: int,
    num_aug: int,
    seed: int,
    min_difficulty: int = 0,
    clues: int = 0,
) -> Path:
    """Folder of a generated data set, built on first use and kept in the cache (see `writer.cached`).

    size: 4, 6 or 9 cells a side; num_train, num_test: puzzles; num_aug: augmentations of each training
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


def generate(
    size: int, num_train: int, num_test: int, seed: int, min_difficulty: int = 0, clues: int = 0
) -> tuple[Puzzles, Puzzles]:
    """Random training and test puzzles with one solution each, no solution grid in both.

    Puzzles are irreducible, or have `clues` clues where that many are left. Grids are new for each puzzle;
    there are only 288 of 4x4 cells, so those are divided between the splits first, and each gives puzzles in
    turn. No puzzle is twice in a split unless there are no others. Raises SudokuError when puzzles of
    min_difficulty guesses are not to be had.
    """
    _check_request(size, num_train, num_test, 0, seed)
    if not 0 <= clues < size * size:
        raise SudokuError(f"clues={clues}: expected 0 (as few as possible) to {size * size - 1}")
    counts = {"test": num_test, "train": num_train}
    pools: dict[str, np.ndarray] = {}
    if size == 4:
        grids = np.random.default_rng([seed, 0]).permutation(solutions(np.zeros(16, np.uint8), 288)[0])
        # In proportion, but at least a tenth of the grids for the test where it has that many puzzles.
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
        # The supply is spent: start over, so that none comes a third time before nearly all came twice.
        seen.clear()
        return repeated

    questions = np.zeros((count, size * size), np.uint8)
    answers = np.zeros_like(questions)
    difficulty = np.zeros(count, np.int64)
    # A bar that an error passes through must be gone before the error is printed.
    with tqdm(range(count), desc=f"{split} puzzles", leave=False) as numbers:
        for number in numbers:
            questions[number], answers[number], difficulty[number] = one(number)
            seen.add(questions[number].tobytes())
            if pool is None:
                taken.add(answers[number].tobytes())
    return Puzzles(questions, answers, difficulty)


def augment(
    questions: np.ndarray, answers: np.ndarray, num_aug: int, test_answers: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Every puzzle followed by `num_aug` random symmetric ones: two (N * (1 + num_aug), n*n) uint8 arrays.

    Symmetries: the digits, the bands and the rows in a band, the stacks and the columns in a stack, and where
    boxes are square rows against columns. One whose answer is in test_answers (M, n*n) is drawn again until
    it is in there no more. So is one that repeats a puzzle of its group, at most REDRAWS times, and not for
    9x9, which has too many symmetries to repeat itself; where there are few, some repetitions stay.
    """
    size = int(questions.shape[1] ** 0.5)
    rows = num_aug + 1
    inputs, labels = np.repeat(questions, rows, axis=0), np.repeat(answers, rows, axis=0)
    if not num_aug:
        return inputs, labels
    rng = np.random.default_rng([seed, 3])
    # Sums of cells with random weights: equal for equal rows, different for others but for one in 2^60.
    *weights, group_weight = np.random.default_rng(0).integers(1, 1 << 63, size * size + 1, dtype=np.uint64)
    forbidden = test_answers.astype(np.uint64) @ weights
    span = max(1, CHUNK_ROWS // rows) * rows
    for begin in tqdm(range(0, len(inputs), span), desc="augmentations", leave=False):
        x, y = inputs[begin : begin + span], labels[begin : begin + span]
        groups = np.arange(len(x)) // rows
        pending = np.nonzero(np.arange(len(x)) % rows)[0]
        redraws = 0
        while len(pending):
            originals = groups[pending] * rows
            x[pending], y[pending] = _transform(x[originals], y[originals], size, rng)
            again = np.zeros(len(x), bool)
            if size < 9 and redraws < REDRAWS:
                keys = x.astype(np.uint64) @ weights + groups.astype(np.uint64) * group_weight
                again[:] = True
                again[np.unique(keys, return_index=True)[1]] = False
            again[pending] |= np.isin(y[pending].astype(np.uint64) @ weights, forbidden)
            pending = np.nonzero(again)[0]
            redraws += 1
    return inputs, labels


def _transform(
    questions: np.ndarray, answers: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A random symmetry of its own for every puzzle, (M, n*n) each."""
    count = len(questions)
    height, width = BOXES[size]

    def lines(inside: int) -> np.ndarray:
        outer = rng.random((count, size // inside)).argsort(axis=1)
        inner = rng.random((count, size // inside, inside)).argsort(axis=2)
        return (outer[:, :, None] * inside + inner).reshape(count, size)

    row, column = lines(height)[:, :, None], lines(width)[:, None, :]
    cells = row * size + column
    if height == width:
        cells = np.where(rng.random((count, 1, 1)) < 0.5, column * size + row, cells)
    cells = cells.reshape(count, -1)
    digits = np.zeros((count, size + 1), np.uint8)
    digits[:, 1:] = rng.random((count, size)).argsort(axis=1) + 1
    new_answers = np.take_along_axis(digits, np.take_along_axis(answers, cells, axis=1), axis=1)
    return np.where(np.take_along_axis(questions, cells, axis=1) > 0, new_answers, np.uint8(0)), new_answers


def write_sudoku(folder: str | Path, train: Puzzles, test: Puzzles, num_aug: int, seed: int) -> None:
    """Augment the training puzzles and write the data set; no training answer may be a test answer."""
    inputs, labels = augment(train.questions, train.answers, num_aug, test.answers, seed)
    splits = {
        "train": _split(inputs, labels, len(train.questions)),
        "test": _split(test.questions.copy(), test.answers.copy(), len(test.questions)),
    }
    write_dataset(folder, splits, ["<blank>"])


def _split(inputs: np.ndarray, labels: np.ndarray, groups: int) -> tuple[dict[str, PuzzleSet], Metadata]:
    # In place, so that a million puzzles are in memory once.
    inputs += 1
    labels += 1
    count, cells = inputs.shape
    part = PuzzleSet(
        inputs=inputs,
        labels=labels,
        puzzle_identifiers=np.zeros(count, np.int32),
        puzzle_indices=np.arange(count + 1, dtype=np.int32),
        group_indices=np.arange(0, count + 1, count // groups, dtype=np.int32),
    )
    metadata = Metadata(
        pad_id=0,
        ignore_label_id=0,
        blank_identifier_id=0,
        vocab_size=int(cells**0.5) + 2,
        seq_len=cells,
        num_puzzle_identifiers=1,
        total_groups=groups,
        mean_puzzle_examples=1.0,
        sets=["all"],
    )
    return {"all": part}, metadata


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
    add(
        "--output-dir", type=Path, required=True, help="folder of the data set; one already there is replaced"
    )
    add(
        "--source",
        default="generated",
        help="'generated' (default); a folder with a train and a test file; one file, of which a part is "
        "held out for the test. A .csv has columns source,question,answer,rating, a .txt a puzzle a line",
    )
    add("--size", type=int, default=9, choices=list(BOXES), help="cells a side (default 9)")
    add("--num-train", type=int, help="training puzzles to generate (default 1000)")
    add("--num-test", type=int, help="test puzzles to generate (default 1000)")
    add("--clues", type=int, help="clues to leave in generated puzzles (default: as few as possible)")
    add("--num-aug", type=int, default=0, help="augmentations of every training puzzle (default 0)")
    add("--subsample-size", type=int, help="keep this many training puzzles, chosen at random")
    add(
        "--min-difficulty",
        type=int,
        default=0,
        help="least rating, or guesses of the solver where there is none",
    )
    add("--test-size", type=float, help="part of a single file that is held out for the test (default 0.1)")
    add("--seed", type=int, default=0, help="same seed, same bytes (default 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Build a data set as the options say, and print what is in it. Raises SudokuError or DatasetError."""
    check_output(args.output_dir)
    generated = args.source == "generated"
    folder = not generated and Path(args.source).is_dir()
    for option, belongs in (
        ("num_train", generated),
        ("num_test", generated),
        ("clues", generated),
        ("test_size", not generated and not folder),
    ):
        if getattr(args, option) is not None and not belongs:
            name = "--" + option.replace("_", "-")
            raise SudokuError(f"{name} has no meaning for --source {args.source}; leave it out")
    num_train, num_test = (1000 if n is None else n for n in (args.num_train, args.num_test))
    _check_request(args.size, num_train, num_test, args.num_aug, args.seed)
    if args.subsample_size is not None and args.subsample_size < 1:
        raise SudokuError(f"subsample_size={args.subsample_size}: expected at least 1")
    rng = np.random.default_rng([args.seed, 4])
    if generated:
        train, test = generate(
            args.size, num_train, num_test, args.seed, args.min_difficulty, args.clues or 0
        )
    elif folder:
        train, test = (
            read_puzzles(_file_of(Path(args.source), split), args.size, args.min_difficulty)
            for split in ("train", "test")
        )
    else:
        puzzles = read_puzzles(Path(args.source), args.size, args.min_difficulty)
        train, test = hold_out(puzzles, 0.1 if args.test_size is None else args.test_size, rng)
    shared = np.isin(_keys(train.answers), _keys(test.answers))
    if shared.all():
        raise SudokuError(
            f"{args.source}: every training puzzle has the solution of a test puzzle; nothing is left"
        )
    train = train.take(np.nonzero(~shared)[0])
    if args.subsample_size is not None and args.subsample_size < len(train.questions):
        train = train.take(rng.choice(len(train.questions), args.subsample_size, replace=False))
    if not generated:
        prove_proper(train)
        prove_proper(test)
    write_sudoku(args.output_dir, train, test, args.num_aug, args.seed)
    print("\n".join(_summary(args, train, test, int(shared.sum()))))


def _file_of(folder: Path, split: str) -> Path:
    lines = folder / f"{split}.txt"
    table = folder / f"{split}.csv"
    return lines if lines.is_file() and not table.is_file() else table


def _keys(grids: np.ndarray) -> np.ndarray:
    """Each row as one comparable value."""
    return np.ascontiguousarray(grids).view(f"S{grids.shape[1]}").ravel()


def _summary(args: argparse.Namespace, train: Puzzles, test: Puzzles, shared: int) -> Iterator[str]:
    yield f"{args.output_dir}: {args.size}x{args.size} Sudoku, seed {args.seed}"
    for split, puzzles, rows in (("train", train, args.num_aug + 1), ("test", test, 1)):
        clues = (puzzles.questions > 0).sum(axis=1)
        count = len(clues)
        yield (
            f"  {split}: {count * rows} examples of {count} puzzles, clues {clues.min()} to {clues.max()}, "
            f"difficulty {puzzles.difficulty.min()} to {puzzles.difficulty.max()}"
        )
        if repeated := count - len(np.unique(_keys(puzzles.questions))):
            yield f"    {repeated} of the puzzles repeat another one"
    if shared:
        yield f"  left out of train: {shared} with the solution of a test puzzle"
