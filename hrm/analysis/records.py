"""The records of an analysis: a model's predictions under each condition, stored in files.

Shapes: N puzzles, T ACT steps, S cells, K paths. Files are .npz archives without pickles.
"""

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hrm.analysis.variants import Before, steps_of
from hrm.common.files import new_file
from hrm.data.dataset import Batch, PuzzleDataset
from hrm.data.format import IGNORE_LABEL
from hrm.engine.inference import Ends, StepByStep
from hrm.engine.modes import Mode
from hrm.evaluation.metrics import batches_of, progress_bar
from hrm.model.hrm import HRM

Record = dict[str, np.ndarray]


@dataclass(frozen=True)
class Examples:
    """N puzzles with known answers from all sets of a split, in the order of the sets.

    taken: their ascending indices, by set. inputs, labels: (N, S) int32, labels -100 where unknown.
    identifiers: (N,) int32.
    """

    taken: dict[str, np.ndarray]
    inputs: np.ndarray
    labels: np.ndarray
    identifiers: np.ndarray

    def __len__(self) -> int:
        return len(self.inputs)

    def right(self, predictions: np.ndarray) -> np.ndarray:
        """A mask of the answers (N, ..., S) that are right in every cell with a label, (N, ...) bool."""
        return np.asarray(self.cells_right(predictions).all(axis=-1))

    def cells_right(self, predictions: np.ndarray) -> np.ndarray:
        """A mask of the right cells of answers (N, ..., S); a cell without a label counts as right."""
        shape = (len(self), *[1] * (predictions.ndim - 2), -1)
        labels = self.labels.reshape(shape)
        return np.asarray((predictions == labels) | (labels == IGNORE_LABEL))


def read_examples(dataset: PuzzleDataset, taken: Mapping[str, np.ndarray]) -> Examples:
    """The examples at these indices that have at least one label."""
    kept: dict[str, np.ndarray] = {}
    parts: list[tuple[np.ndarray, ...]] = []
    for name, numbers in taken.items():
        known = []
        for batch, count in batches_of(dataset, name, numbers, 1024):
            has_label = (batch.labels[:count] != IGNORE_LABEL).any(axis=1)
            known.append(has_label)
            arrays = (batch.inputs, batch.labels, batch.puzzle_identifiers)
            parts.append(tuple(array[:count][has_label] for array in arrays))
        kept[name] = numbers[np.concatenate(known)] if known else numbers
    S = dataset.metadata.seq_len
    empty = np.zeros((0, S), np.int32), np.zeros((0, S), np.int32), np.zeros(0, np.int32)
    inputs, labels, identifiers = (np.concatenate(arrays) for arrays in zip(empty, *parts, strict=True))
    return Examples(kept, inputs, labels, identifiers)


class Runs:
    """Runs a model on puzzles step by step, in batches of one size, from the model's usual initial state."""

    def __init__(self, model: HRM, batch_size: int, mode: Mode, token_type: Any) -> None:
        """token_type: the integer type of stored predictions."""
        self.model, self.batch_size, self.mode, self._type = model, batch_size, mode, token_type

    def of_size(self, batch_size: int) -> "Runs":
        """A copy with another batch size."""
        return Runs(self.model, batch_size, self.mode, self._type)

    def trajectories(
        self, what: str, inputs: np.ndarray, identifiers: np.ndarray, steps: int, *, gates: bool = False
    ) -> Record:
        """Every ACT step of puzzles, inputs (N, S) of identifiers (N,).

        predictions: (N, T, S). q_halt: (N, T) logits. halts_at: (N,), see `Ends`. drift_H, drift_L: (N, T),
        the root mean square over tokens and channels of the state's change in a step; a state itself has
        about 1; a single state has no drift_L. gates: (N, T, 5), see `StepByStep`. goal_gate: (N, T), of
        models with subgoals.
        """
        N, S = inputs.shape
        found: Record = {
            "predictions": np.zeros((N, steps, S), self._type),
            "q_halt": np.zeros((N, steps), np.float32),
            "halts_at": np.zeros(N, np.int32),
        }
        levels = ("H",) if self.model.arch.single_state else ("H", "L")
        found |= {f"drift_{level}": np.zeros((N, steps), np.float32) for level in levels}
        if gates:
            found["gates"] = np.zeros((N, steps, 5), np.float32)
        if self.model.subgoal_head is not None:
            found["goal_gate"] = np.zeros((N, steps), np.float32)
        before: tuple[torch.Tensor, ...] = ()
        for rows, count, step, ends, runner in self._walk(what, inputs, identifiers, steps, gates=gates):
            own = slice(rows, rows + count)
            states = (runner.carry.z_H, runner.carry.z_L)[: len(levels)]
            if step == 0:
                starts = [z for z in (self.model.H_init, self.model.L_init) if z is not None]
                before = tuple(start.expand_as(z) for start, z in zip(starts, states, strict=True))
            for level, now, then in zip(levels, states, before, strict=True):
                change = (now.float() - then.float()).square().mean((1, 2)).sqrt()
                found[f"drift_{level}"][own, step] = change.cpu().numpy()[:count]
            before = tuple(state.clone() for state in states)
            found["predictions"][own, step] = ends.predictions[:count]
            found["q_halt"][own, step] = ends.q_halt[:count]
            if step == steps - 1:
                found["halts_at"][own] = ends.halts_at[:count]
            if gates:
                found["gates"][own, step] = runner.gates.cpu().numpy()[:count]
            if "goal_gate" in found:
                found["goal_gate"][own, step] = runner.carry.goal_gate.float().cpu().numpy()[:count]
        return found

    def answers(
        self,
        what: str,
        inputs: np.ndarray,
        identifiers: np.ndarray,
        steps: int,
        *,
        before: Before | None = None,
    ) -> Record:
        """The last step: predictions (N, S) and q_halt (N,). before: called before each ACT step."""
        N, S = inputs.shape
        found: Record = {"predictions": np.zeros((N, S), self._type), "q_halt": np.zeros(N, np.float32)}
        for rows, count, step, ends, runner in self._walk(
            what, inputs, identifiers, steps, each=before is not None
        ):
            if before is not None:
                before(runner)
            if step == steps - 1:
                found["predictions"][rows : rows + count] = ends.predictions[:count]
                found["q_halt"][rows : rows + count] = ends.q_halt[:count]
        return found

    def states(self, what: str, inputs: np.ndarray, identifiers: np.ndarray, steps: int) -> np.ndarray:
        """z_H after each ACT step and before the first, (N, T + 1, tokens * D) float16."""
        N, F = len(inputs), self.model.length * self.model.arch.hidden_size
        found = np.zeros((N, steps + 1, F), np.float16)
        found[:, 0] = self.model.H_init.float().cpu().numpy()[None].repeat(self.model.length, 0).ravel()
        for rows, count, step, _, runner in self._walk(what, inputs, identifiers, steps):
            z_H = runner.carry.z_H[:count].flatten(1).float().cpu().numpy()
            found[rows : rows + count, step + 1] = z_H
        return found

    def _walk(
        self,
        what: str,
        inputs: np.ndarray,
        identifiers: np.ndarray,
        steps: int,
        *,
        each: bool = True,
        gates: bool = False,
    ) -> Iterator[tuple[int, int, int, Ends, StepByStep]]:
        """Yields for each batch: first row, number of rows, step (from 0), the state after the step, and the
        runner.

        each: yield after every step, not only after the last.
        """
        N, S = inputs.shape
        B = self.batch_size
        depths = range(1, steps + 1) if each else [steps]
        with steps_of(self.model, steps), progress_bar(what, N) as bar:
            runner = StepByStep(self.model, B, S, mode=self.mode, sees_gates=gates)
            for first in range(0, N, B):
                count = min(B, N - first)
                # Pad the last batch with its first rows.
                rows = first + np.arange(B) % count
                batch = Batch(inputs[rows], np.full((B, S), IGNORE_LABEL), identifiers[rows])
                for depth, ends in zip(depths, runner.at_depths(batch, depths), strict=True):
                    yield first, count, depth - 1, ends, runner
                bar.update(count)


# --- files


def write_record(path: Path, record: Mapping[str, np.ndarray], key: str) -> None:
    """Writes a record atomically. key: everything that it depends on. Raises OSError."""
    with new_file(path) as file, open(file, "wb") as whole:
        arrays: dict[str, Any] = {**record, "key": np.array(key)}
        np.savez_compressed(whole, **arrays)


def read_record(path: Path, key: str) -> Record | None:
    """The record in a file; None if the file is missing, damaged or made for another key."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if str(archive["key"]) != key:
                return None
            return {name: archive[name] for name in archive.files if name != "key"}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def joined(records: Sequence[Record]) -> Record:
    """Records of the same arrays, stacked along a new first axis."""
    return {name: np.stack([record[name] for record in records]) for name in records[0]}
