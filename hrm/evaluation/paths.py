"""Evaluation with many paths for each puzzle, and one answer chosen among them.

Every row of a batch is a path, so K paths of a puzzle run like K sequences, in one program. Ranks take turns
with whole groups of puzzles; a path depends on (seed, example, path), not on its row.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hrm.checkpoint.load_model import Trained
from hrm.common.errors import UserError
from hrm.data.dataset import Batch, PuzzleDataset
from hrm.data.format import IGNORE_LABEL
from hrm.data.puzzle_kinds import Kind, kind_of
from hrm.distributed import World
from hrm.engine.compilation import Compilation
from hrm.engine.inference import Answers, EarlyExit, Waiting
from hrm.engine.memory_estimate import enough_memory, inference_does_not_fit
from hrm.engine.modes import Mode
from hrm.evaluation.metrics import (
    Listener,
    Metrics,
    Scores,
    batches_of,
    by_difficulty,
    progress_bar,
    taken_of,
)
from hrm.evaluation.race import RULED, Judge, Race, compared
from hrm.evaluation.selection import (
    Outcomes,
    Rule,
    breadths,
    by_breadth,
    choose,
    pass_at,
    rules_for,
    same_answers,
    selection_failures,
    share,
    unfinished,
)
from hrm.evaluation.views import PlainViews, View, Views, views_for
from hrm.model.act import PLAIN, Randomness, keys_of
from hrm.model.hrm import HRM

# Standard deviation of the noise for a model trained without noise, from Equilibrium Reasoners (arXiv
# 2605.21488).
NOISE = 0.01
# Maximum number of batches per group of puzzles; more batches leave fewer idle rows.
MOST_BATCHES = 16


@dataclass(frozen=True)
class Plan:
    """The differences between paths, and the rule that chooses one.

    paths: number of paths per puzzle, K. select: the rule whose answer is scored. depths: ascending ACT steps
    at which answers are scored; the last is the model's halt_max_steps. views: transforms the puzzle for each
    path. randomness: of the recurrence, with its seed.
    """

    paths: int
    select: Rule
    depths: tuple[int, ...]
    views: Views
    randomness: Randomness = PLAIN
    seed: int = 0


def differences(
    by: Sequence[str],
    kind: Kind,
    model: HRM,
    *,
    seed: int,
    noise: float | None = None,
    names: Sequence[str] | None = None,
) -> tuple[Views, Randomness]:
    """The differences between the paths of puzzles of a kind: views and randomness.

    by: some of init, noise, symmetry. noise: the standard deviation, None for arch.noise or NOISE. names: of
    the puzzles by identifier. Raises UserError for puzzles without symmetries.
    """
    views: Views = PlainViews(seed)
    if "symmetry" in by:
        embeds = kind.name == "arc" and model.puzzle_emb is not None
        views = views_for(kind, seed, names if embeds else None)
    return views, Randomness("init" in by, (noise or model.arch.noise or NOISE) if "noise" in by else 0.0)


def check_rule(select: Rule, kind: Kind) -> None:
    """Raises UserError if a rule cannot choose among answers to puzzles of this kind."""
    if select == "rules" and kind.name not in RULED:
        raise UserError(
            f"select=rules: puzzles of kind {kind.name} have no rules that identify a right answer; write "
            "select=q or select=vote"
        )


def evaluate_paths(
    trained: Trained,
    dataset: PuzzleDataset,
    plan: Plan,
    *,
    batch_size: int,
    mode: Mode,
    examples: Mapping[str, np.ndarray] | None = None,
    eval_act: bool = False,
    listeners: Sequence[Listener] = (),
    of_every_path: Sequence[Listener] = (),
    compilation: Compilation | None = None,
    world: World | None = None,
) -> dict[str, Metrics]:
    """The metrics of every set for the answers chosen by plan.select, and those of all rules under "paths".

    "paths" has accuracies by rule and number of paths (`rules`, by depth `depths`), pass@k (`pass_at`), and
    by rule the numbers of wrong answers and of wrong answers with a right one on another path (`failures`).
    eval_act: add under "eval_act" the metrics with early halting: a path stops when it halts, a puzzle when
    its choice is final. steps: summed over a puzzle's paths. listeners receive the chosen answers,
    of_every_path the answers of all paths, in the order of the examples. Other arguments and errors: see
    `metrics.evaluate`.
    """
    world, compilation = world or World(), compilation or Compilation()
    model, seq_len = trained.model, dataset.metadata.seq_len
    device = model.H_init.device
    kind = kind_of(dataset.metadata, dataset.sets)
    results: dict[str, Metrics] = {}
    with enough_memory(
        lambda: inference_does_not_fit(
            trained.config, dataset.metadata, batch_size, device, early=True, always=True
        )
    ):
        runner = EarlyExit(model, batch_size, seq_len, mode=mode, randomness=plan.randomness)
        runner.prepare(compilation)
        numbered = 0
        for name, taken in taken_of(dataset, examples).items():
            run = _SetOfPaths(runner, dataset, name, taken, numbered, plan, Judge(kind), batch_size, world)
            numbered += len(dataset.sets[name].inputs)
            start = time.perf_counter()
            scores, found = run.all_steps(listeners, of_every_path)
            metrics = scores.metrics() | {"seconds": time.perf_counter() - start}
            if parts := by_difficulty(dataset, name, taken, scores):
                metrics["difficulty"] = parts
            known = [outcomes.puzzles(scores.counted) for outcomes in found]
            metrics["paths"] = _summary(plan, known)
            if eval_act:
                start = time.perf_counter()
                early = run.early()
                own = early.metrics() | {"seconds": time.perf_counter() - start}
                full = plan.paths * plan.depths[-1]
                own["steps_saved"] = 1 - own.get("steps", full) / full
                metrics["eval_act"] = own
            results[name] = metrics
    return results


def _summary(plan: Plan, found: Sequence[Outcomes]) -> Metrics:
    """The accuracy of each rule, from the outcomes at each depth."""
    rules, last = rules_for(found[-1]), found[-1]
    shares = [by_breadth(outcomes, rules) for outcomes in found]
    as_numbers = [
        {rule: {str(k): each._asdict() for k, each in parts.items()} for rule, parts in of_rule.items()}
        for of_rule in shares
    ]
    failures = {}
    for rule in rules:
        wrong, another_right = selection_failures(rule, last)
        failures[rule] = {"wrong": wrong, "another_right": another_right}
    return {
        "paths": plan.paths,
        "select": plan.select,
        "rules": as_numbers[-1],
        "pass_at": {str(k): share(pass_at(last.right, k))._asdict() for k in breadths(plan.paths)},
        "failures": failures,
        "depths": dict(zip(map(str, plan.depths), as_numbers, strict=True)),
    }


def group_size(batch_size: int, paths: int) -> int:
    """The number of puzzles per group that leaves the fewest idle rows in its batches."""
    most = max(1, MOST_BATCHES * batch_size // paths)
    return min(range(1, most + 1), key=lambda count: (-(-count * paths // batch_size) / count, count))


class _SetOfPaths:
    """The paths of one set's puzzles."""

    def __init__(
        self,
        runner: EarlyExit,
        dataset: PuzzleDataset,
        name: str,
        taken: np.ndarray,
        numbered: int,
        plan: Plan,
        judge: Judge,
        batch_size: int,
        world: World,
    ) -> None:
        """numbered: the number of examples in earlier sets, so that puzzle numbers are unique."""
        self._runner, self._dataset, self._name, self._taken = runner, dataset, name, taken
        self._numbered, self._plan, self._judge, self._world = numbered, plan, judge, world
        self._batch_size, self._group = batch_size, group_size(batch_size, plan.paths)
        self._device = runner.model.H_init.device

    def _views(self, batch: Batch, count: int, examples: np.ndarray) -> list[View]:
        """The views of the first `count` puzzles of a batch, whose indices in the set are `examples`."""
        views, paths = self._plan.views, self._plan.paths
        return [
            views.of(batch.inputs[row], int(batch.puzzle_identifiers[row]), self._numbered + example, paths)
            for row, example in zip(range(count), examples.tolist(), strict=True)
        ]

    def _keys(self, examples: np.ndarray) -> np.ndarray:
        """The keys of all paths of puzzles, (n * K, 3) int32, or (n * K, 0) without randomness."""
        paths, words = self._plan.paths, self._plan.randomness.key_words
        numbers = np.repeat(self._numbered + examples, paths)
        return keys_of(self._plan.seed, numbers, np.tile(np.arange(paths), len(examples)))[:, :words]

    # --- all steps of every path

    def all_steps(
        self, listeners: Sequence[Listener], of_every_path: Sequence[Listener]
    ) -> tuple[Scores, list[Outcomes]]:
        """The scores of the chosen answers, and the outcomes of all paths at each depth."""
        plan, judge, N = self._plan, self._judge, len(self._taken)
        scores = Scores(N)
        found = [unfinished(N, plan.paths, judge.has_rules) for _ in plan.depths]
        with progress_bar(self._name, N) as bar:
            for first, batch, count, predictions, numbers in self._groups():
                places = np.arange(first, first + count)
                for outcomes, of_depth in zip(found, numbers, strict=True):
                    _fill(outcomes, places, of_depth)
                last = found[-1].puzzles(places)
                chosen = choose(plan.select, last)[:, None]
                answers = Answers(
                    places,
                    batch.labels[:count],
                    np.take_along_axis(predictions, chosen[:, :, None], axis=1)[:, 0],
                    np.take_along_axis(last.q_halt, chosen, axis=1)[:, 0].astype(np.float32),
                    np.full(count, plan.paths * plan.depths[-1], np.int32),
                )
                scores.add(answers)
                for listener in listeners:
                    listener(self._name, answers)
                for listener in of_every_path:
                    for path in range(plan.paths):
                        q_halt = last.q_halt[:, path].astype(np.float32)
                        listener(
                            self._name, answers._replace(predictions=predictions[:, path], q_halt=q_halt)
                        )
                bar.update(count)
        return scores, found

    def _groups(self) -> Iterator[tuple[int, Batch, int, np.ndarray, np.ndarray]]:
        """The results of each group of puzzles, on every rank.

        Each result has the first place, the puzzles and their count, the answers of all paths at the last
        depth (count, K, S) and the fields of their outcomes (depths, 6, count, K).
        """
        world, paths, turn, first = self._world, self._plan.paths, [], 0
        groups = list(range(0, len(self._taken), self._group))
        source = batches_of(self._dataset, self._name, self._taken, self._group)
        for number, (batch, count) in enumerate(source):
            turn.append((batch, count))
            if len(turn) < world.size and number < len(groups) - 1:
                continue
            # In the last round, a rank without a group repeats one, because the others wait for it.
            mine = min(world.rank, len(turn) - 1)
            start = first + mine * self._group
            own = self._run(*turn[mine], self._taken[start : start + turn[mine][1]])
            gathered = [self._gather(array) for array in own]
            for rank, (batch, count) in enumerate(turn):
                predictions, numbers = (array[rank] for array in gathered)
                predictions = predictions.reshape(self._group, paths, -1)[:count]
                yield first, batch, count, predictions, numbers[:, :, :count]
                first += count
            turn = []

    def _gather(self, array: np.ndarray) -> np.ndarray:
        """Gathers the ranks' arrays of shape (...) as (ranks, ...)."""
        if self._world.size == 1:
            return array[None]
        return self._world.all_gather(torch.from_numpy(array[None]).to(self._device)).cpu().numpy()

    def _run(self, batch: Batch, count: int, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Runs all paths of a group: answers (group * K, S) int32 and numbers (depths, 6, group, K)."""
        plan, paths, B = self._plan, self._plan.paths, self._batch_size
        views = self._views(batch, count, examples)
        inputs = np.concatenate([view.inputs for view in views])
        identifiers = np.concatenate([view.identifiers for view in views])
        keys = self._keys(examples)
        seen = [np.zeros((len(inputs), inputs.shape[1]), np.int32) for _ in plan.depths]
        numbers = np.zeros((len(plan.depths), 6, self._group, paths), np.float32)
        flat = numbers.reshape(len(plan.depths), 6, -1)
        for start in range(0, len(inputs), B):
            # Pad the last batch with its first rows.
            rows = start + np.arange(B) % min(B, len(inputs) - start)
            part = Batch(inputs[rows], np.full((B, inputs.shape[1]), IGNORE_LABEL), identifiers[rows])
            valid = min(B, len(inputs) - start)
            own = slice(start, start + valid)
            for depth, ends in enumerate(self._runner.at_depths(part, plan.depths, keys[rows])):
                seen[depth][own] = ends.predictions[:valid]
                for index, values in enumerate((ends.q_halt, ends.halts_at, ends.residual)):
                    flat[depth, index, own] = values[:valid]
        every = np.arange(paths)
        for depth, predictions in enumerate(seen):
            for row, view in enumerate(views):
                own = slice(row * paths, (row + 1) * paths)
                answers = predictions[own] = view.answers(predictions[own], every)
                right, lawful = self._judge.answers(answers, batch.inputs[row], batch.labels[row])
                same = same_answers(compared(self._judge.kind, answers))
                numbers[depth, 3:, row] = right, same, lawful
        answers = np.zeros((self._group * paths, inputs.shape[1]), np.int32)
        answers[: len(inputs)] = seen[-1]
        return answers, numbers

    # --- early halting

    def early(self) -> Scores:
        """The scores with early halting: a path stops when it halts, a puzzle when its choice is final."""
        world, plan = self._world, self._plan
        scores, racing = Scores(len(self._taken)), dict[int, Race]()
        with progress_bar(f"{self._name}, eval_act", len(self._taken)) as bar:

            def finish(place: int) -> None:
                if racing[place].open == 0:
                    scores.add(racing.pop(place).answers(place))
                    bar.update(1)

            def waiting() -> Iterator[Waiting]:
                own = np.arange(world.rank, len(self._taken), world.size)
                first = 0
                for batch, count in batches_of(self._dataset, self._name, self._taken[own], self._group):
                    places = own[first : first + count]
                    views = self._views(batch, count, self._taken[places])
                    keys = self._keys(self._taken[places]).reshape(count, plan.paths, -1)
                    for row, (place, view) in enumerate(zip(places.tolist(), views, strict=True)):
                        race = Race(plan.select, self._judge, view, batch.inputs[row], batch.labels[row])
                        racing[place] = race
                        for path in range(plan.paths):
                            if race.goes_on(path, 0):
                                yield Waiting(
                                    place * plan.paths + path,
                                    view.inputs[path],
                                    np.full_like(batch.labels[row], IGNORE_LABEL),
                                    int(view.identifiers[path]),
                                    keys[row, path],
                                )
                            else:
                                finish(place)
                    first += count

            def goes_on(sequence: int, steps: int) -> bool:
                place, path = divmod(sequence, plan.paths)
                if racing[place].goes_on(path, steps):
                    return True
                finish(place)
                return False

            for ends in self._runner.until_halted(waiting(), goes_on):
                for index, sequence in enumerate(ends.places.tolist()):
                    place, path = divmod(sequence, plan.paths)
                    racing[place].end(path, ends, index)
                    finish(place)
        scores.share(world, self._device)
        return scores


def _fill(outcomes: Outcomes, places: np.ndarray, numbers: np.ndarray) -> None:
    """Writes the outcome fields (6, count, K) of a group into the outcomes of the whole set."""
    held = (outcomes.q_halt, outcomes.halts_at, outcomes.residual, outcomes.right, outcomes.answer)
    for array, values in zip(held, numbers[:5], strict=True):
        array[places] = values
    if outcomes.lawful is not None:
        outcomes.lawful[places] = numbers[5]
