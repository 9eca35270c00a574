"""A model under analysis: its puzzles, its options, and its records, measured once and then read from
files."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hrm.analysis.records import Examples, Record, Runs, joined, read_record, write_record
from hrm.analysis.variants import removable, steps_of, without
from hrm.checkpoint.load_model import Trained
from hrm.data.arc.augment import task_of
from hrm.data.dataset import PuzzleDataset, fingerprint
from hrm.data.format import read_names
from hrm.data.puzzle_kinds import Kind
from hrm.engine.inference import Answers
from hrm.engine.modes import EAGER, Mode
from hrm.evaluation.paths import Plan, differences, evaluate_paths
from hrm.evaluation.selection import Rule

# Default and minimum number of puzzles.
MOST_SAMPLES, LEAST_SAMPLES = 500, 16
# Number of timed ACT steps.
TIMED_STEPS = 2
# Number of trajectories in the principal plane, half right and half wrong, and the memory limit of their
# states.
SHOWN = 12
STATE_BYTES = 1 << 28
# Numbers of blank cells in the easiest puzzles.
FEW_BLANKS = (1, 2, 4, 8)
# The measurements, as their progress lines describe them.
MEASURED = {
    "deep": "long trajectories",
    "init": "paths from other initial states",
    "symmetry": "paths from symmetries",
    "easy": "easy puzzles",
    "identifiers": "other identifiers",
    "parts": "the model without each part",
    "states": "trajectories of z_H",
    "votes": "votes of ARC tasks",
}
# Number of augmented puzzles for voting, as a multiple of the puzzles of other sections.
VOTES = 20


@dataclass
class Study:
    """A model with the puzzles and options of its analysis.

    trained, dataset, kind: as in evaluation. examples: the puzzles. steps: ACT steps in training. depth:
    length of the longest trajectories, in multiples of steps. paths: number of paths per puzzle. folder: of
    the records. identity: everything that a record depends on except its own options.
    """

    name: str
    trained: Trained
    dataset: PuzzleDataset
    kind: Kind
    examples: Examples
    steps: int
    depth: int
    paths: int
    seed: int
    batch_size: int
    mode: Mode
    folder: Path
    identity: str
    say: Callable[[str], None] = print
    _records: dict[str, Record] = field(default_factory=dict)

    @property
    def runs(self) -> Runs:
        """The model, ready to run."""
        return self._runs(self.mode)

    def _runs(self, mode: Mode) -> Runs:
        kind = np.min_scalar_type(self.dataset.metadata.vocab_size - 1)
        return Runs(self.trained.model, self.batch_size, mode, kind)

    # --- records

    def record(self, name: str) -> Record:
        """The record of this name, read from its file, or measured and written."""
        if name in self._records:
            return self._records[name]
        options = [self.identity, self._chosen(), name, self.steps, self.depth, self.paths, self.seed]
        key = hashlib.sha256(json.dumps(options).encode()).hexdigest()
        path = self.folder / f"{name}.npz"
        found = read_record(path, key)
        if found is None:
            start = time.perf_counter()
            found = getattr(self, f"_measure_{name}")()
            self.folder.mkdir(parents=True, exist_ok=True)
            write_record(path, found, key)
            self.say(f"{self.name}: {MEASURED[name]} measured in {time.perf_counter() - start:.1f} s")
        self._records[name] = found
        return found

    def _chosen(self) -> str:
        """The digest of the puzzles' indices."""
        numbers = [(name, own.tolist()) for name, own in self.examples.taken.items()]
        return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()

    def forget(self) -> None:
        """Frees all records except the trajectories, which comparisons need."""
        self._records = {name: own for name, own in self._records.items() if name == "deep"}

    def _measure_deep(self) -> Record:
        """Every step of every puzzle, for depth times the number of steps in training."""
        examples = self.examples
        gates = self.trained.model.arch.use_gating
        found = self.runs.trajectories(
            "deep", examples.inputs, examples.identifiers, self.depth * self.steps, gates=gates
        )
        own = {"inputs": examples.inputs, "labels": examples.labels, "identifiers": examples.identifiers}
        return {**found, **own}

    def _measure_init(self) -> Record:
        return self._paths("init")

    def _measure_symmetry(self) -> Record:
        return self._paths("symmetry")

    def _paths(self, by: str) -> Record:
        """Paths of each puzzle that differ by starts or symmetries: predictions (N, K, S), q_halt (N, K)."""
        model, K = self.trained.model, self.paths
        embeds = self.kind.name == "arc" and model.puzzle_emb is not None
        names = read_names(self.dataset.folder.parent) if embeds and by == "symmetry" else None
        views, randomness = differences([by], self.kind, model, seed=self.seed, names=names)
        select: Rule = "q"
        plan = Plan(K, select, (self.steps,), views, randomness, self.seed)
        N, S = self.examples.inputs.shape
        kind = np.min_scalar_type(self.dataset.metadata.vocab_size - 1)
        found = {"predictions": np.zeros((N, K, S), kind), "q_halt": np.zeros((N, K), np.float32)}
        offsets = dict(zip(self.examples.taken, self._offsets(), strict=True))
        seen: dict[tuple[str, int], int] = {}

        def listen(name: str, answers: Answers) -> None:
            # Answers to a group of puzzles are ordered by path.
            first = int(answers.places[0])
            path = seen[name, first] = seen.get((name, first), -1) + 1
            places = offsets[name] + answers.places
            found["predictions"][places, path] = answers.predictions
            found["q_halt"][places, path] = answers.q_halt

        with steps_of(model, self.steps):
            evaluate_paths(
                self.trained,
                self.dataset,
                plan,
                batch_size=self.batch_size,
                mode=self.mode,
                examples=self.examples.taken,
                of_every_path=[listen],
            )
        return found

    def _offsets(self) -> list[int]:
        """The index of each set's first example."""
        sizes = [len(numbers) for numbers in self.examples.taken.values()]
        return [0, *np.cumsum(sizes)[:-1].tolist()]

    def _measure_easy(self) -> Record:
        """The puzzles with all but a few blanks filled in from their answers: (levels, N, S)."""
        examples = self.examples
        blank, order = self.blanks(), np.random.default_rng(self.seed).random(examples.inputs.shape)
        # A random order of the blank cells of each puzzle, the same at every level.
        rank = np.where(blank, order, 2.0).argsort(axis=1, kind="stable").argsort(axis=1)
        levels = [few for few in FEW_BLANKS if few < blank.sum(axis=1).max()]
        found = []
        for few in levels:
            filled = np.where(blank & (rank >= few), examples.labels, examples.inputs)
            answers = self.runs.answers(f"{few} blank", filled, examples.identifiers, self.steps)
            found.append({**answers, "inputs": filled.astype(answers["predictions"].dtype)})
        return {**joined(found), "blanks": np.array(levels)}

    def blanks(self) -> np.ndarray:
        """The blank cells of Sudokus, (N, S) bool."""
        return np.asarray(self.examples.inputs == 1)

    def _measure_identifiers(self) -> Record:
        """The answers under the blank identifier and under another puzzle's: (2, N, S)."""
        examples = self.examples
        blank = np.full(len(examples), self.dataset.metadata.blank_identifier_id, np.int32)
        kinds = {"blank": blank, "another's": self.foreign_identifiers()}
        found = [
            {**self.runs.answers(name, examples.inputs, used, self.steps), "identifiers": used}
            for name, used in kinds.items()
        ]
        return {**joined(found), "names": np.array(list(kinds))}

    def foreign_identifiers(self) -> np.ndarray:
        """For each puzzle the identifier of another puzzle (for ARC, of another task), (N,) int32."""
        own = self.examples.identifiers
        groups = own.astype(np.int64)
        if self.kind.name == "arc":
            tasks = [task_of(name) for name in read_names(self.dataset.folder.parent)]
            groups = np.unique(tasks, return_inverse=True)[1][own]
        # In an order sorted by group, a shift by the size of the largest group reaches another group, unless
        # one group is the majority.
        shift = int(np.unique(groups, return_counts=True)[1].max())
        if 2 * shift <= len(own):
            order = np.argsort(groups, kind="stable")
            other = np.empty_like(own)
            other[order] = np.roll(own[order], -shift)
            return other
        values, first = np.unique(groups, return_index=True)
        following = first[(np.searchsorted(values, groups) + 1) % len(values)]
        return np.asarray(own[following])

    def _measure_parts(self) -> Record:
        """The answers of the model with each part removed: (parts, N, S)."""
        model, examples, found = self.trained.model, self.examples, []
        parts = removable(model)
        for part in parts:
            with without(model, part) as before:
                # A graph cannot capture a level that counts its calls.
                runs = self._runs(EAGER)
                answers = runs.answers(part, examples.inputs, examples.identifiers, self.steps, before=before)
            found.append(answers)
        return {**joined(found), "names": np.array(parts)}

    def _measure_states(self) -> Record:
        """z_H of a few puzzles, half of them right at the end if possible."""
        deep = self.record("deep")
        right = self.examples.right(deep["predictions"][:, self.steps - 1])
        steps = 2 * self.steps
        model = self.trained.model
        each = (steps + 1) * model.length * model.arch.hidden_size * 8
        count = max(2, min(SHOWN, STATE_BYTES // each))
        wrong_ones, right_ones = np.flatnonzero(~right), np.flatnonzero(right)
        few = min(len(wrong_ones), max(count // 2, count - len(right_ones)))
        shown = np.concatenate([wrong_ones[:few], right_ones[: count - few]])
        z_H = self.runs.states("states", self.examples.inputs[shown], self.examples.identifiers[shown], steps)
        return {"z_H": z_H, "puzzles": shown, "right": right[shown]}

    def _measure_votes(self) -> Record:
        """The answers to all augmentations of some ARC tests; see `judge.votes`."""
        numbers = self.voters()
        parts = []
        for name, own in numbers.items():
            part = self.dataset.sets[name]
            self.dataset.check_unchanged(name)
            puzzles = np.searchsorted(part.puzzle_indices, own, side="right") - 1
            parts.append((part.inputs[own].astype(np.int32), part.puzzle_identifiers[puzzles]))
        inputs, identifiers = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        identifiers = identifiers.astype(np.int32)
        found = self.runs.answers("votes", inputs, identifiers, self.steps)
        return {**found, "inputs": inputs, "identifiers": identifiers}

    def voters(self) -> dict[str, np.ndarray]:
        """The examples of whole ARC tasks, drawn by the seed, by set: VOTES times as many as puzzles."""
        names = read_names(self.dataset.folder.parent)
        budget, chosen = VOTES * len(self.examples), set[str]()
        by_task: dict[str, int] = {}
        owners: dict[str, np.ndarray] = {}
        for name, part in self.dataset.sets.items():
            tasks = np.array([task_of(names[i]) for i in part.puzzle_identifiers.tolist()])
            owners[name] = np.repeat(tasks, np.diff(part.puzzle_indices))
            for task, count in zip(*np.unique(owners[name], return_counts=True), strict=True):
                by_task[str(task)] = by_task.get(str(task), 0) + int(count)
        for task in np.random.default_rng(self.seed).permutation(sorted(by_task)).tolist():
            if chosen and by_task[task] > budget:
                continue
            budget -= by_task[task]
            chosen.add(task)
        return {name: np.flatnonzero(np.isin(owner, sorted(chosen))) for name, owner in owners.items()}


# --- what records depend on, and how much time they take


def identity_of(weights: Path, dataset: PuzzleDataset, options: dict[str, Any]) -> str:
    """The identity of records as text: the digests of the weights and the data, and the options."""
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return json.dumps([digest, fingerprint(dataset), options], sort_keys=True)


def affordable(study: Study, seconds: float) -> int:
    """The number of puzzles, at least LEAST_SAMPLES, whose records take at most the given time.

    It is estimated from two ACT steps and stored, so that the same command uses the same puzzles.
    """
    path = study.folder / "samples.npz"
    key = hashlib.sha256(json.dumps([study.identity, seconds, study.depth, study.paths]).encode()).hexdigest()
    if (kept := read_record(path, key)) is not None:
        return int(kept["samples"])
    inputs, identifiers = (of[:LEAST_SAMPLES] for of in (study.examples.inputs, study.examples.identifiers))
    # A whole batch of a large model would take minutes on a CPU.
    runs = study.runs.of_size(len(inputs))
    taken = []
    # The first of two runs warms up.
    for _ in range(2):
        start = time.perf_counter()
        runs.answers("timing", inputs, identifiers, TIMED_STEPS)
        taken.append(time.perf_counter() - start)
    each_step = taken[-1] / (TIMED_STEPS * len(inputs))
    # Trajectories, other initial states and symmetries, few blanks, identifiers, parts, votes.
    steps = study.depth + 2 * study.paths + len(FEW_BLANKS) + 2 + 5 + VOTES * (study.kind.name == "arc")
    samples = max(LEAST_SAMPLES, int(seconds / (each_step * study.steps * steps)))
    study.folder.mkdir(parents=True, exist_ok=True)
    write_record(path, {"samples": np.array(samples)}, key)
    return samples
