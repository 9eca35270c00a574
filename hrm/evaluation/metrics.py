"""Evaluation of a model on a data set: metrics by set and difficulty, early halting, voting, predictions."""

import json
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hrm.checkpoint.load_model import Found, Trained
from hrm.common.errors import UserError
from hrm.common.files import new_file, write_whole
from hrm.data.dataset import Batch, PuzzleDataset, test_batches
from hrm.data.format import IGNORE_LABEL, PuzzleSet, read_difficulty, read_names
from hrm.data.puzzle_kinds import kind_of
from hrm.data.sudoku.build import data_folder
from hrm.data.sudoku.solver import solutions
from hrm.distributed import World
from hrm.engine.compilation import Compilation
from hrm.engine.inference import Answers, EarlyExit, Inference
from hrm.engine.memory_estimate import enough_memory, inference_does_not_fit
from hrm.engine.modes import Mode
from hrm.engine.step_metrics import PER_HALTED, means
from hrm.evaluation.arc_voting import Votes, read_tests, submission
from hrm.evaluation.ranks import answers_in_order, own_early_answers

# Number of difficulty levels in a set, with about equal numbers of examples.
BUCKETS = 5
# Number of examples to rate by a solver if the data set has no difficulty.
RATED = 10_000
# Numbers of answers per ARC test, as in the official evaluations.
ATTEMPTS = (1, 2, 5, 10, 100, 1000)

# Metrics by name; "difficulty" and "eval_act" hold metrics of parts and of early halting.
Metrics = dict[str, Any]
# Receives the answers of a set, batch by batch.
Listener = Callable[[str, Answers], None]


class Scores:
    """The results of `count` sequences by place, reduced to the bytes that metrics need."""

    def __init__(self, count: int) -> None:
        self.exact, self.q_right, self.counted = (np.zeros(count, bool) for _ in range(3))
        self.accuracy, self.steps = np.zeros(count, np.float32), np.zeros(count, np.int32)

    def add(self, answers: Answers) -> None:
        """Adds the results of some sequences."""
        places, valid = answers.places, answers.labels != IGNORE_LABEL
        right = ((answers.predictions == answers.labels) & valid).sum(axis=1)
        cells = valid.sum(axis=1)
        self.exact[places] = right == cells
        self.q_right[places] = (answers.q_halt >= 0) == (right == cells)
        self.accuracy[places] = right / np.maximum(cells, 1)
        self.steps[places] = answers.steps
        self.counted[places] = cells > 0

    def share(self, world: World, device: torch.device) -> None:
        """Adds the results of all ranks, whose sequences differ."""
        held: list[np.ndarray] = [self.exact, self.q_right, self.counted, self.accuracy, self.steps]
        # float32 is exact here, and each place has a value on only one rank.
        sums = torch.from_numpy(np.stack([values.astype(np.float32) for values in held])).to(device)
        for values, total in zip(held, world.all_reduce(sums).cpu().numpy(), strict=True):
            values[:] = total

    def metrics(self, chosen: np.ndarray | None = None) -> Metrics:
        """Means over the sequences at the places `chosen`, or over all; ignores sequences without labels."""
        places = np.flatnonzero(self.counted)
        if chosen is not None:
            places = chosen[self.counted[chosen]]
        of_each: tuple[np.ndarray, ...] = (self.accuracy, self.exact, self.q_right, self.steps)
        sums = {
            name: float(values[places].sum(dtype=np.float64))
            for name, values in zip(PER_HALTED, of_each, strict=True)
        }
        return means({"count": len(places), **sums}, len(places))

    def histogram(self, halt_max_steps: int) -> list[int]:
        """The number of sequences that took 1, 2, ... halt_max_steps steps."""
        counts: list[int] = np.bincount(self.steps[self.counted], minlength=halt_max_steps + 1).tolist()
        return counts[1:]


def evaluate(
    trained: Trained,
    dataset: PuzzleDataset,
    *,
    batch_size: int,
    mode: Mode,
    examples: Mapping[str, np.ndarray] | None = None,
    eval_act: bool = False,
    listeners: Sequence[Listener] = (),
    compilation: Compilation | None = None,
    world: World | None = None,
) -> dict[str, Metrics]:
    """The metrics of every set as training computes them, with halt_max_steps steps for each sequence.

    examples: the examples of each set to evaluate, None for all. eval_act: add under "eval_act" the results
    with early halting: the same metrics, steps_histogram (sequences by steps, from 1), steps_saved (share).
    "difficulty" holds metrics by difficulty level, if known. seconds: time without compilation. compilation:
    announces and interrupts the compiler. listeners receive the answers after all steps; places are indices
    of the set's examples. world: the ranks that share the batches; all get the results. Memory grows by about
    ten bytes per example. Raises UserError if a batch does not fit into memory.
    """
    world = world or World()
    model, seq_len = trained.model, dataset.metadata.seq_len
    results: dict[str, Metrics] = {}
    compilation = compilation or Compilation()
    device = model.H_init.device
    with enough_memory(
        lambda: inference_does_not_fit(
            trained.config, dataset.metadata, batch_size, device, early=eval_act, always=True
        )
    ):
        full = Inference(model, batch_size, seq_len, mode=mode, loss=trained.config.loss)
        full.prepare(compilation)
        early = EarlyExit(model, batch_size, seq_len, mode=mode) if eval_act else None
        if early is not None:
            early.prepare(compilation)
        for name, taken in taken_of(dataset, examples).items():
            sums = np.zeros(0)
            scores = Scores(len(taken))
            start = time.perf_counter()
            batches = batches_of(dataset, name, taken, batch_size)
            with progress_bar(name, len(taken)) as bar:
                for answers, batch_sums in answers_in_order(full, batches, world):
                    scores.add(answers)
                    # float64, because sums over a large set exceed the integers of float32.
                    sums = batch_sums if not len(sums) else sums + batch_sums
                    for listener in listeners:
                        listener(name, answers)
                    bar.update(len(answers.places))
            named = dict(zip(full.names, sums.tolist(), strict=True))
            metrics: Metrics = means(named, named["count"])
            metrics |= {"count": int(metrics["count"]), "seconds": time.perf_counter() - start}
            if parts := by_difficulty(dataset, name, taken, scores):
                metrics["difficulty"] = parts
            if early is not None:
                scores, start = Scores(len(taken)), time.perf_counter()
                batches = batches_of(dataset, name, taken, batch_size)
                with progress_bar(f"{name}, eval_act", len(taken)) as bar:
                    for answers in own_early_answers(early, batches, batch_size, world):
                        scores.add(answers)
                        bar.update(len(answers.places))
                scores.share(world, device)
                most, own = model.arch.halt_max_steps, scores.metrics()
                own |= {"seconds": time.perf_counter() - start, "steps_histogram": scores.histogram(most)}
                own["steps_saved"] = 1 - own.get("steps", most) / most
                metrics["eval_act"] = own
            results[name] = metrics
    return results


def taken_of(
    dataset: PuzzleDataset, examples: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """The ascending indices of the evaluated examples, for each set that has any."""
    if examples is None:
        return {name: np.arange(len(part.inputs)) for name, part in dataset.sets.items()}
    return {name: examples[name] for name in dataset.sets if len(examples[name])}


def batches_of(
    dataset: PuzzleDataset, name: str, taken: np.ndarray, batch_size: int
) -> Iterator[tuple[Batch, int]]:
    none = np.zeros(0, np.int64)
    only = {**dict.fromkeys(dataset.sets, none), name: taken}
    for _, batch, count in test_batches(dataset, global_batch_size=batch_size, examples=only):
        yield batch, count


def progress_bar(name: str, total: int) -> tqdm:
    """A progress bar on a terminal."""
    return tqdm(total=total, desc=name, unit=" puzzles", leave=False, disable=None)


# --- difficulty


def difficulty(dataset: PuzzleDataset, name: str, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The difficulty of examples of a set, (n,) integers, and their places (n,) in `taken`; empty if unknown.

    It comes from the data set, or for Sudoku from the solver's guesses on a random sample of at most RATED.
    """
    known = read_difficulty(dataset.folder, name, len(dataset.sets[name].inputs))
    places = np.arange(len(taken))
    if known is not None:
        return known[taken], places
    unknown = np.zeros(0, np.int64), np.zeros(0, np.int64)
    if kind_of(dataset.metadata, dataset.sets).name != "sudoku":
        return unknown
    if len(taken) > RATED:
        places = np.sort(np.random.default_rng(0).choice(len(taken), RATED, replace=False))
    dataset.check_unchanged(name)
    tokens = dataset.sets[name].inputs[taken[places]]
    if tokens.min() < 1:
        return unknown
    return np.array([solutions(grid)[1] for grid in (tokens - 1).astype(np.uint8)]), places


def by_difficulty(dataset: PuzzleDataset, name: str, taken: np.ndarray, scores: Scores) -> dict[str, Metrics]:
    """The metrics of the scored sequences by difficulty level, from easy to hard; empty if unknown."""
    values, places = difficulty(dataset, name, taken)
    return {label: scores.metrics(places[chosen]) for label, chosen in degrees(values)}


def degrees(values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The difficulty levels of values (n,), from easy to hard: the range and indices of each.

    Levels have about equal numbers of values, and equal values share a level; yields nothing for a single
    level.
    """
    # The number of easier values, for each value.
    easier = np.searchsorted(np.sort(values), values)
    degree = BUCKETS * easier // max(1, len(values))
    numbers = np.unique(degree)
    for number in numbers if len(numbers) > 1 else ():
        chosen = np.flatnonzero(degree == number)
        low, high = values[chosen].min(), values[chosen].max()
        yield (f"{low}" if low == high else f"{low} to {high}"), chosen


# --- answers


class Voting:
    """A listener that counts the votes of ARC augmentations; see `hrm.evaluation.arc_voting`.

    taken: the evaluated examples of each set. Raises DatasetError for a data set without puzzle names.
    """

    def __init__(self, dataset: PuzzleDataset, taken: Mapping[str, np.ndarray]) -> None:
        self._dataset, self._taken = dataset, taken
        self._names = read_names(dataset.folder.parent)
        self._votes = Votes(read_tests(dataset, self._names))

    def __call__(self, name: str, answers: Answers) -> None:
        part = self._dataset.sets[name]
        self._dataset.check_unchanged(name)
        examples = self._taken[name][answers.places]
        identifiers = part.puzzle_identifiers[_puzzles(part, examples)]
        # A sigmoid without overflow.
        q_halt = 0.5 * (1 + np.tanh(0.5 * answers.q_halt.astype(np.float64)))
        for identifier, example, prediction, q in zip(
            identifiers, examples, answers.predictions, q_halt, strict=True
        ):
            self._votes.add(self._names[identifier], part.inputs[example], prediction, float(q))

    def metrics(self) -> Metrics:
        """pass@k by tests and by whole tasks; see `Votes.pass_at`."""
        ways = {"pass_at": False, "pass_at_whole_tasks": True}
        solved = {name: self._votes.pass_at(ATTEMPTS, whole) for name, whole in ways.items()}
        return {name: {str(k): part for k, part in parts.items()} for name, parts in solved.items()}

    def write_submission(self, path: Path) -> None:
        """Writes the two best answers to every test in Kaggle's format."""
        write_whole(path, json.dumps(submission(self._votes)) + "\n")


@contextmanager
def predictions_file(
    path: Path, dataset: PuzzleDataset, taken: Mapping[str, np.ndarray]
) -> Iterator[Listener]:
    """A listener whose answers become the .npz file `path` if the block succeeds.

    For every set it holds, named like the set's files: predictions (n, S), q_halt (n,), steps (n,),
    puzzle_identifiers (n,) and examples (n,), their indices in the set. The arrays grow on disk, not in
    memory. Raises UserError if the file cannot be written.
    """
    kind = np.min_scalar_type(dataset.metadata.vocab_size - 1)
    with new_file(path) as whole:
        arrays: dict[str, dict[str, np.memmap]] = {}

        def array(name: str, of: str, dtype: Any, *shape: int) -> np.memmap:
            file = whole.with_name(f"{name}__{of}.npy")
            return np.lib.format.open_memmap(file, "w+", dtype=dtype, shape=(len(taken[name]), *shape))

        def listen(name: str, answers: Answers) -> None:
            if name not in arrays:
                part = dataset.sets[name]
                array(name, "examples", np.int64)[:] = taken[name]
                of_examples = part.puzzle_identifiers[_puzzles(part, taken[name])]
                array(name, "puzzle_identifiers", np.int32)[:] = of_examples
                arrays[name] = {
                    "predictions": array(name, "predictions", kind, dataset.metadata.seq_len),
                    "q_halt": array(name, "q_halt", np.float32),
                    "steps": array(name, "steps", np.int32),
                }
            for of, values in arrays[name].items():
                values[answers.places] = getattr(answers, of)

        yield listen
        for held in arrays.values():
            for values in held.values():
                values.flush()
        with zipfile.ZipFile(whole, "w") as archive:
            for file in sorted(whole.parent.glob("*.npy")):
                archive.write(file, file.name)


def _puzzles(part: PuzzleSet, examples: np.ndarray) -> np.ndarray:
    return np.searchsorted(part.puzzle_indices, examples, side="right") - 1


def dataset_of(found: Found, data_path: str | None, split: str) -> PuzzleDataset:
    """A split of the data set in data_path, or of the one that the run was trained on if data_path is None.

    Raises UserError if there is none, and the errors of `PuzzleDataset`.
    """
    folder = data_folder(found.config) if data_path is None else Path(data_path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such data set; give data_path=DIR, the folder of one")
    return PuzzleDataset(folder, split)


def describe(trained: Trained, mode: str, dataset: PuzzleDataset) -> str:
    """One line that describes the model and the data."""
    model = trained.model
    count = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{trained.path}: {count:,} parameters, {model.arch.halt_max_steps} ACT steps, "
        f"{model.H_init.device}, {str(model.dtype).removeprefix('torch.')}, mode {mode}; {dataset.folder}"
    )
