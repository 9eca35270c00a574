"""The order of training: derives the examples of each global batch, and the held-out examples, from the
seed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hrm.common.text import counted
from hrm.data.format import DatasetError, PuzzleSet

# Random stream of the division of training groups.
_HELD_OUT = 5


@dataclass(frozen=True)
class Drawn:
    """A global batch before it is read: its set, and its examples and their puzzles, each (B,) int64.

    index: its position in the run, (iteration, batch in the iteration); position: that of the next batch.
    """

    set_name: str
    examples: np.ndarray
    puzzles: np.ndarray
    index: tuple[int, int]
    position: tuple[int, int]


def draw(
    folder: Path,
    sets: Mapping[str, PuzzleSet],
    *,
    seed: int,
    epochs: int,
    epochs_per_iter: int,
    global_batch_size: int,
    start: tuple[int, int],
    groups: Mapping[str, np.ndarray] | None = None,
) -> Iterator[Drawn]:
    """The global batches of a run from `start`, as `dataset.train_batches` describes; reads no example.

    folder: of the split, for messages. groups: the indices of the groups to draw from in each set, None for
    all. Raises DatasetError.
    """
    if epochs < 1 or epochs_per_iter < 1 or seed < 0:
        raise DatasetError(
            f"epochs={epochs}, epochs_per_iter={epochs_per_iter}, seed={seed}: expected at least 1, 1 and 0"
        )
    longest = min(epochs, epochs_per_iter)
    if groups is None:
        groups = {name: np.arange(len(part.group_indices) - 1) for name, part in sets.items()}
    most = max(longest * _most_examples(part, groups[name]) for name, part in sets.items())
    if most < global_batch_size:
        raise _too_small(folder, most, longest, global_batch_size)

    def walk() -> Iterator[Drawn]:
        for iteration in range(start[0], -(-epochs // epochs_per_iter)):
            span = min(epochs_per_iter, epochs - iteration * epochs_per_iter)
            plan: list[tuple[str, np.ndarray]] = []
            most = 0
            for number, (name, part) in enumerate(sets.items()):
                # The official reader counts one iteration per set.
                count = iteration * len(sets) + number + 1
                rng = np.random.Generator(np.random.Philox(seed=seed + count))
                puzzles = _draw_puzzles(part, groups[name], rng, span)
                ends = np.cumsum(part.puzzle_indices[puzzles + 1] - part.puzzle_indices[puzzles])
                most = max(most, int(ends[-1]))
                plan += [(name, puzzles[first:last]) for first, last in _pack(ends, global_batch_size)]
            first = start[1] if iteration == start[0] else 0
            if not plan and span == longest:
                raise _too_small(folder, most, span, global_batch_size)
            if first > len(plan):
                raise DatasetError(
                    f"{folder}: cannot continue at batch {first} of an iteration of {len(plan)}; "
                    "expected the data set, global_batch_size and eval_interval that the run started with"
                )
            for index in range(first, len(plan)):
                name, puzzles = plan[index]
                examples, owners = _draw_examples(sets[name], puzzles, (seed, iteration, index))
                position = (iteration, index + 1) if index + 1 < len(plan) else (iteration + 1, 0)
                whole = slice(global_batch_size)
                yield Drawn(name, examples[whole], owners[whole], (iteration, index), position)

    return walk()


def held_out(
    folder: Path, sets: Mapping[str, PuzzleSet], fraction: float, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Divides the groups of a split at random: the training groups and the validation examples, by set.

    About `fraction` of each set's groups are held out, at least one and not all; the seed fixes them.
    Validation uses only a group's first puzzle, as the others are its augmentations. folder: of the split,
    for messages. Raises DatasetError for a set of one group.
    """
    training: dict[str, np.ndarray] = {}
    examples: dict[str, np.ndarray] = {}
    for number, (name, part) in enumerate(sets.items()):
        count = len(part.group_indices) - 1
        if count < 2:
            raise DatasetError(
                f"{folder}: valid_fraction={fraction:g} holds out whole groups, and the set {name} is "
                "a single one; set valid_fraction=0"
            )
        order = np.random.default_rng([seed, number, _HELD_OUT]).permutation(count)
        held = min(max(round(fraction * count), 1), count - 1)
        training[name] = np.sort(order[held:])
        first = part.group_indices[np.sort(order[:held])]
        bounds = zip(part.puzzle_indices[first], part.puzzle_indices[first + 1], strict=True)
        examples[name] = np.concatenate([np.arange(*each) for each in bounds])
    return training, examples


def _draw_puzzles(part: PuzzleSet, groups: np.ndarray, rng: np.random.Generator, epochs: int) -> np.ndarray:
    """One puzzle per group and epoch, in training order, (epochs * groups,) int64."""
    order = np.concatenate([groups[rng.permutation(len(groups))] for _ in range(epochs)])
    # Array bounds draw the same numbers as one call per group; chunks limit the memory.
    for first in range(0, len(order), 1 << 20):
        piece = order[first : first + (1 << 20)]
        piece[:] = rng.integers(part.group_indices[piece], part.group_indices[piece + 1])
    return order


def _pack(ends: np.ndarray, global_batch_size: int) -> Iterator[tuple[int, int]]:
    """The first and last + 1 puzzle of every full batch. ends: cumulative number of the puzzles' examples.

    A puzzle that overfills its batch is truncated, and the next batch begins with the next puzzle.
    """
    first, taken = 0, 0
    while (last := int(np.searchsorted(ends, taken + global_batch_size))) < len(ends):
        yield first, last + 1
        first, taken = last + 1, int(ends[last])


def _draw_examples(
    part: PuzzleSet, puzzles: np.ndarray, key: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """All examples of the puzzles, shuffled within each puzzle, and each example's puzzle."""
    begins = part.puzzle_indices[puzzles].astype(np.int64)
    sizes = part.puzzle_indices[puzzles + 1] - begins
    if (sizes == 1).all():
        return begins, puzzles
    slots = np.repeat(np.arange(len(puzzles)), sizes)
    examples = np.arange(len(slots)) + np.repeat(begins - (np.cumsum(sizes) - sizes), sizes)
    shuffle = np.lexsort((np.random.default_rng(key).random(len(slots)), slots))
    return examples[shuffle], puzzles[slots]


def _most_examples(part: PuzzleSet, groups: np.ndarray) -> int:
    """The maximum number of examples in an epoch: the sum over groups of their largest puzzle."""
    return int(np.maximum.reduceat(np.diff(part.puzzle_indices), part.group_indices[:-1])[groups].sum())


def _too_small(folder: Path, examples: int, epochs: int, global_batch_size: int) -> DatasetError:
    return DatasetError(
        f"{folder}: the {counted(epochs, 'epoch')} between evaluations have {counted(examples, 'example')}, "
        f"fewer than one batch of global_batch_size={global_batch_size}; lower global_batch_size or raise "
        "eval_interval"
    )
