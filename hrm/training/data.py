"""The data of a run: both splits, their identity, and the batches that training and evaluation draw."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

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
from hrm.data.puzzle_kinds import kind_of
from hrm.data.sudoku.build import data_folder
from hrm.distributed import World


@dataclass(frozen=True)
class TrainingData:
    """The training and the test split of a run, and what follows from them.

    test_set: None for a data set without a test split, whose run is not evaluated. fingerprint: sha256 of the
    training split. source: its `path` and the digest of each of its `files`, as checkpoints record them.
    sample: the test examples of each set that evaluations use; None for all. total_steps: length of the run.
    epochs_per_iter: epochs between two evaluations. notes: what the data set does in its own way.
    """

    config: Config
    train_set: PuzzleDataset
    test_set: PuzzleDataset | None
    fingerprint: str
    source: dict[str, Any]
    sample: dict[str, np.ndarray] | None
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
        sample = None
        if test_set is None:
            notes.append(f"{folder}: there is no test split, so the run is not evaluated")
        else:
            check_same_task(train_set, test_set)
            notes += deviations(test_set)
        if test_set is not None and config.eval_samples is not None:
            sample = subset(test_set, config.eval_samples, config.seed)
        steps = steps_in(train_set, config.epochs, config.global_batch_size)
        return cls(
            config,
            train_set,
            test_set,
            fingerprint=fingerprint(train_set),
            source={"path": str(folder), "files": digests(train_set)},
            sample=sample,
            total_steps=steps if config.max_steps is None else min(steps, config.max_steps),
            epochs_per_iter=interval_epochs(config),
            notes=tuple(notes),
        )

    @property
    def metadata(self) -> Metadata:
        """The metadata of the training split, with its kind."""
        found = self.train_set.metadata
        return replace(found, kind=kind_of(found, self.train_set.sets).name)

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
        )

    def test_batches(self, world: World, *, sampled: bool) -> Iterator[tuple[str, Batch, int]]:
        """The test batches, this rank's rows of each; sampled: of `sample` alone.

        There are none without a test split.
        """
        if self.test_set is None:
            return iter(())
        return test_batches(
            self.test_set,
            global_batch_size=self.config.global_batch_size,
            rank=world.rank,
            world_size=world.size,
            examples=self.sample if sampled else None,
        )
