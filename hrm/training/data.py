"""The data of a run: both splits, their identity, and the batches for training and evaluation."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from hrm.checkpoint.identifiers import Identifiers, identifiers_of_data
from hrm.config.load import Config
from hrm.config.schedule import interval_epochs
from hrm.data.dataset import (
    Batch,
    Members,
    PuzzleDataset,
    TrainBatch,
    batch_members,
    check_same_task,
    digests,
    fingerprint,
    steps_in,
    subset,
    test_batches,
    train_batches,
)
from hrm.data.deviations import deviations
from hrm.data.format import Metadata
from hrm.data.order import held_out
from hrm.data.puzzle_kinds import kind_of
from hrm.data.sudoku.build import data_folder
from hrm.data.symmetries import FreshSymmetries, Held
from hrm.distributed import World


@dataclass(frozen=True)
class TrainingData:
    """The training and the test split of a run, and properties derived from them.

    test_set: None for a data set without a test split. fingerprint: sha256 of the training split. source: its
    `path` and the digest of each of its `files`, as checkpoints record them. groups: the training groups of
    each training set; None for all. valid: the held-out examples, None without valid_fraction. sample: the
    valid or test examples of each set that evaluations before the last use; None for all. augment: see
    `dataset.train_batches`. total_steps: length of the run. epochs_per_iter: epochs between two evaluations.
    notes: lines about deviations of the data set and their consequences.
    """

    config: Config
    train_set: PuzzleDataset
    test_set: PuzzleDataset | None
    fingerprint: str
    source: dict[str, Any]
    groups: dict[str, np.ndarray] | None
    valid: dict[str, np.ndarray] | None
    sample: dict[str, np.ndarray] | None
    augment: FreshSymmetries | None
    total_steps: int
    epochs_per_iter: int
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, config: Config) -> "TrainingData":
        """Opens and checks the data set of a run. Raises DatasetError with the file and the fault."""
        folder = data_folder(config)
        train_set = PuzzleDataset(folder, "train")
        test_set = PuzzleDataset(folder, "test") if (folder / "test").exists() else None
        notes = list(deviations(train_set))
        if test_set is not None:
            check_same_task(train_set, test_set)
            notes += deviations(test_set)
        groups = valid = sample = augment = None
        if config.valid_fraction:
            groups, valid = held_out(train_set.folder, train_set.sets, config.valid_fraction, config.seed)
        if config.eval_samples is not None and valid is not None:
            sample = subset(train_set, config.eval_samples, config.seed, valid)
        elif config.eval_samples is not None and test_set is not None:
            sample = subset(test_set, config.eval_samples, config.seed)
        if config.augment:
            held = [Held(test_set)] if test_set is not None else []
            held += [Held(train_set, valid)] if valid is not None else []
            kind = kind_of(train_set.metadata, train_set.sets)
            augment = FreshSymmetries(train_set, kind, config.seed, held)
        elif idle := _idle_names(train_set):
            notes.append(
                f"{train_set.folder} stores every ARC task once, so {idle:,} puzzle embeddings "
                "of augmentations do not train; augment=true trains all"
            )
        notes += _notes_on_ranking(config, train_set, test_set, valid)
        steps = steps_in(train_set, config.epochs, config.global_batch_size, groups)
        return cls(
            config,
            train_set,
            test_set,
            fingerprint=fingerprint(train_set),
            source={"path": str(folder), "files": digests(train_set)},
            groups=groups,
            valid=valid,
            sample=sample,
            augment=augment,
            total_steps=steps if config.max_steps is None else min(steps, config.max_steps),
            epochs_per_iter=interval_epochs(config),
            notes=tuple(notes),
        )

    @property
    def metadata(self) -> Metadata:
        """The metadata of the training split, with its kind."""
        found = self.train_set.metadata
        return replace(found, kind=kind_of(found, self.train_set.sets).name)

    @cached_property
    def names(self) -> Identifiers:
        """The names of the puzzle table's rows."""
        return identifiers_of_data(self.train_set.folder.parent, self.metadata.num_puzzle_identifiers)

    def batches(self, position: tuple[int, int], world: World) -> Iterator[TrainBatch]:
        """The training batches from `position` on, this rank's rows of each.

        Raises DatasetError for a batch size that the data cannot fill.
        """
        config = self.config
        return train_batches(
            self.train_set,
            seed=config.seed,
            epochs=config.epochs,
            epochs_per_iter=self.epochs_per_iter,
            global_batch_size=config.global_batch_size,
            rank=world.rank,
            world_size=world.size,
            start=position,
            groups=self.groups,
            augment=self.augment,
        )

    def members(self, index: tuple[int, int]) -> Members:
        """The examples of the training batch at `index`, drawn again from the seed."""
        config = self.config
        return batch_members(
            self.train_set,
            seed=config.seed,
            epochs=config.epochs,
            epochs_per_iter=self.epochs_per_iter,
            global_batch_size=config.global_batch_size,
            position=index,
            groups=self.groups,
        )

    def ranking_batches(self, world: World) -> Iterator[tuple[str, Batch, int]]:
        """The batches that determine the score of an evaluation: of `sample`, else of `valid` or the test
        split.

        This rank's rows of each. A set of `valid` is called valid, followed by the training set's name if
        there are several.
        """
        if self.valid is None:
            return self.test_batches(world, self.sample)
        several = len(self.train_set.sets) > 1
        batches = test_batches(
            self.train_set,
            global_batch_size=self.config.global_batch_size,
            rank=world.rank,
            world_size=world.size,
            examples=self.valid if self.sample is None else self.sample,
        )
        return ((f"valid-{name}" if several else "valid", rows, count) for name, rows, count in batches)

    def test_batches(
        self, world: World, examples: dict[str, np.ndarray] | None = None
    ) -> Iterator[tuple[str, Batch, int]]:
        """The test batches, this rank's rows of each; none without a test split.

        examples: see `dataset.test_batches`.
        """
        if self.test_set is None:
            return iter(())
        return test_batches(
            self.test_set,
            global_batch_size=self.config.global_batch_size,
            rank=world.rank,
            world_size=world.size,
            examples=examples,
        )

    @property
    def is_ranked_by_all_tests(self) -> bool:
        """Whether every evaluation uses the whole test split."""
        return self.valid is None and self.sample is None


def _idle_names(train_set: PuzzleDataset) -> int:
    """The number of names without a stored puzzle if ARC tasks are stored once (`--plain`); else 0."""
    parts = train_set.sets.values()
    once = all(len(part.group_indices) - 1 == len(part.puzzle_identifiers) for part in parts)
    if not once or kind_of(train_set.metadata, train_set.sets).name != "arc":
        return 0
    named = train_set.metadata.num_puzzle_identifiers - 1
    return max(0, named - sum(len(part.puzzle_identifiers) for part in parts))


def _notes_on_ranking(
    config: Config,
    train_set: PuzzleDataset,
    test_set: PuzzleDataset | None,
    valid: dict[str, np.ndarray] | None,
) -> Iterator[str]:
    """Notes on the examples that determine the score: their number, and whether the score is biased."""
    folder = train_set.folder.parent
    if valid is not None:
        yield f"valid: {sum(map(len, valid.values())):,} examples of training groups are held out"
        if any(len(np.unique(part.puzzle_identifiers)) > 1 for part in train_set.sets.values()):
            yield "valid: the puzzle embeddings of held-out groups do not train, which lowers their accuracy"
    elif test_set is None:
        yield f"{folder}: there is no test split, so the run is not evaluated"
    elif config.early_stop_patience is not None or (config.keep_best and config.eval_interval is not None):
        yield (
            "the test set selects the best checkpoint, which biases its accuracy upwards; valid_fraction=0.1 "
            "selects it by training groups that are held out"
        )
