"""Solves batches of fixed size: each sequence for halt_max_steps ACT steps, or until it halts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hrm.config.schema import NEVER, LossConfig
from hrm.data.dataset import Batch
from hrm.data.format import IGNORE_LABEL
from hrm.engine.compilation import Compilation
from hrm.engine.cuda_graph import Program, aside
from hrm.engine.modes import Mode, compiled
from hrm.engine.step_inputs import Feed
from hrm.model.act import PLAIN, Carry, Outputs, Randomness, act_step, initial_carry, replace_halted
from hrm.model.hrm import HRM
from hrm.model.losses import act_loss


class Answers(NamedTuple):
    """The answers to n sequences.

    places: (n,) int64, indices in the order of input. labels, predictions: (n, S) int32. q_halt: (n,)
    float32. steps: (n,) int32, ACT steps taken.
    """

    places: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    q_halt: np.ndarray
    steps: np.ndarray


class Inference:
    """Runs the model at one batch size, without gradient: eager, compiled or captured, by mode.

    `run` and `solve` set predictions (B, S) int32 and q_halt (B,); `run` also sets sums, the metric sums of
    `act_loss` in float32 in the order of `names`. Weights are read in place, so each call uses the current
    weights.
    """

    def __init__(
        self,
        model: HRM,
        batch_size: int,
        seq_len: int,
        *,
        mode: Mode,
        loss: LossConfig,
        randomness: Randomness = PLAIN,
    ) -> None:
        """randomness: differences between the paths of a puzzle; any model supports any; PLAIN has none."""
        device = model.H_init.device
        self.model, self.loss, self.randomness = model, loss, randomness
        self._feed = Feed(batch_size, seq_len, device, key_words=randomness.key_words)
        # All sequences are halted; the first step replaces them.
        self._blank = initial_carry(model, batch_size, seq_len, device, randomness=randomness)
        self.predictions = torch.zeros(batch_size, seq_len, dtype=torch.int32, device=device)
        self.q_halt = torch.zeros(batch_size, dtype=torch.float32, device=device)
        self.names: list[str] = []
        self.sums = torch.zeros(0, device=device)
        self._step = compiled(self._act_step) if mode.compiled else self._act_step
        self._mode = mode
        self._judging = Program(self._judge, device, captured=mode.captured)
        # An answer needs no loss, whose many small operations would add to the latency of a single sequence.
        self._solving = Program(self._answer, device, captured=mode.captured)

    def _act_step(self, carry: Carry, puzzle_rows: Tensor | None) -> tuple[Carry, Outputs]:
        return act_step(self.model, carry, puzzle_rows, None, randomness=self.randomness)

    def prepare(self, compilation: Compilation) -> None:
        """Compiles the step if its mode requires it; otherwise the first run would compile without notice."""
        _prepare(
            lambda: self._step(*self._start()),
            "the evaluation",
            self.model,
            self._feed,
            self._mode,
            compilation,
        )

    def _start(self) -> tuple[Carry, Tensor | None]:
        """Carry and puzzle rows of the sequences in the feed, before the first step."""
        fresh, table = self._feed.fresh, self.model.puzzle_emb
        carry = replace_halted(self.model, self._blank, fresh, randomness=self.randomness)
        return carry, None if table is None else table(carry.puzzle_identifiers)

    def _solve(self) -> tuple[Carry, Outputs]:
        model = self.model
        carry, puzzle_rows = self._start()
        for _ in range(model.arch.halt_max_steps):
            carry, outputs = self._step(carry, puzzle_rows)
        self.predictions.copy_(model.lm_head(outputs.answer).argmax(-1))
        self.q_halt.copy_(outputs.q_halt_logits)
        return carry, outputs

    def _answer(self) -> None:
        self._solve()

    def _judge(self) -> None:
        carry, outputs = self._solve()
        _, sums = act_loss(self.loss, self.model.lm_head, carry, outputs)
        vector = torch.stack([value.to(torch.float32) for value in sums.values()])
        if not self.names:
            # An inference tensor could not be changed outside of inference mode.
            with torch.inference_mode(mode=False):
                self.names, self.sums = list(sums), torch.zeros_like(vector)
        self.sums.copy_(vector)

    @torch.inference_mode()
    def run(self, batch: Batch, keys: np.ndarray | int = 0) -> None:
        """Solves a batch and sums its metrics; does not wait for the device.

        keys: for a program with randomness, (B, 3) int32, the seed, example and path of each row, see
        `keys_of`; 0 is path 0 for every row.
        """
        self._feed.push(batch, keys=keys)
        self._judging()

    @torch.inference_mode()
    def solve(self, inputs: np.ndarray, puzzle_identifiers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The answers to inputs (B, S) of puzzles (B,), int32: predictions (B, S) int32, q_halt (B,) float32.

        Waits for the device. Raises ValueError for arrays of other shapes.
        """
        inputs, puzzle_identifiers = np.asarray(inputs), np.asarray(puzzle_identifiers)
        # The feed would broadcast other shapes.
        B, S = self.predictions.shape
        if inputs.shape != (B, S) or puzzle_identifiers.shape != (B,):
            raise ValueError(
                f"solve: inputs must be {(B, S)} and puzzle_identifiers {(B,)}, "
                f"got {inputs.shape} and {puzzle_identifiers.shape}"
            )
        self._feed.push(Batch(inputs, np.full_like(inputs, IGNORE_LABEL), puzzle_identifiers))
        self._solving()
        return self.predictions.cpu().numpy().copy(), self.q_halt.cpu().numpy().copy()

    def answers(self, batches: Iterable[tuple[Batch, int]]) -> Iterator[Answers]:
        """The answers to the first `count` rows of each (batch, count), batch by batch."""
        first = 0
        for batch, count in batches:
            self.run(batch)
            places = np.arange(first, first + count)
            steps = np.full(count, self.model.arch.halt_max_steps, np.int32)
            predictions, q_halt = (of[:count].cpu().numpy().copy() for of in (self.predictions, self.q_halt))
            yield Answers(places, batch.labels[:count], predictions, q_halt, steps)
            first += count


@torch.inference_mode()
def _prepare(
    step: Callable[[], object], what: str, model: HRM, feed: Feed, mode: Mode, compilation: Compilation
) -> None:
    """Runs the first step if its mode compiles it."""
    if not mode.compiled:
        return
    inputs = feed.fresh.inputs
    with compilation.of(what, model.arch, tuple(inputs.shape), model.dtype, inputs.device.type):
        if mode.captured:
            aside(step, inputs.device)
        else:
            step()


class Waiting(NamedTuple):
    """A sequence that waits for a row.

    place: its index. inputs, labels: (S,). puzzle_identifier: (). key: (3,), see `Carry`; None on path 0.
    """

    place: int
    inputs: np.ndarray
    labels: np.ndarray
    puzzle_identifier: int
    key: np.ndarray | None = None


class Ends(NamedTuple):
    """The final states of n sequences: `Answers`, and arrays (n,) for the choice among paths.

    halts_at: int32, the first ACT step at which the sequence would halt by choice, at least NEVER if it would
    not. residual: float32, the change of the logits (norm over the vocabulary, averaged over the cells),
    averaged over at most the last three steps; infinite after one step.
    """

    places: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    q_halt: np.ndarray
    steps: np.ndarray
    halts_at: np.ndarray
    residual: np.ndarray


# Number of steps over which a residual is averaged.
_CHANGES = 3


class StepByStep:
    """Runs the model step by step at one batch size, without gradient: eager, compiled or captured.

    A sequence halts by choice as in training without exploration: if q_halt is above q_continue (above 0
    without q_continue). Weights are read in place. carry: the state after the last step. gates: (B, 5)
    float32, the mean gates of that step, L before H; (B, 0) unless sees_gates.
    """

    def __init__(
        self,
        model: HRM,
        batch_size: int,
        seq_len: int,
        *,
        mode: Mode,
        randomness: Randomness = PLAIN,
        sees_gates: bool = False,
    ) -> None:
        device = model.H_init.device
        self.model, self.randomness = model, randomness
        self._feed = Feed(batch_size, seq_len, device, key_words=randomness.key_words)
        self.carry = initial_carry(model, batch_size, seq_len, device, randomness=randomness)
        self.gates = torch.zeros(batch_size, 5 if sees_gates else 0, device=device)
        self._predictions = torch.zeros(batch_size, seq_len, dtype=torch.int32, device=device)
        self._q_halt = torch.zeros(batch_size, dtype=torch.float32, device=device)
        self._halts_at = torch.zeros(batch_size, dtype=torch.int32, device=device)
        wide = torch.promote_types(model.dtype, torch.float32)
        vocab_size = len(model.lm_head.weight)
        self._logits = torch.zeros(batch_size, seq_len, vocab_size, dtype=wide, device=device)
        self._changes = torch.zeros(batch_size, _CHANGES, dtype=wide, device=device)
        self._step = compiled(self._act_step) if mode.compiled else self._act_step
        self._mode = mode
        # Drawing random initial states takes long, so start sequences only in steps after rows have changed.
        self._begin = Program(self._replace, device, captured=mode.captured)
        self._program = Program(self._turn, device, captured=mode.captured)

    def _act_step(self, carry: Carry, puzzle_rows: Tensor | None, least: Tensor) -> tuple[Carry, Outputs]:
        return act_step(
            self.model,
            carry,
            puzzle_rows,
            least,
            sees_gates=self.gates.shape[1] > 0,
            with_target=False,
            randomness=self.randomness,
        )

    def prepare(self, compilation: Compilation) -> None:
        """Compiles the step if its mode requires it; otherwise the first step would compile without
        notice."""
        _prepare(self._take_step, "the single step", self.model, self._feed, self._mode, compilation)

    def _replace(self) -> None:
        self._keep(replace_halted(self.model, self.carry, self._feed.fresh, randomness=self.randomness))

    def _keep(self, carry: Carry) -> None:
        for old, new in zip(self.carry, carry, strict=True):
            old.copy_(new)

    def _take_step(self) -> tuple[Carry, Outputs]:
        carry, table = self.carry, self.model.puzzle_emb
        puzzle_rows = None if table is None else table(carry.puzzle_identifiers)
        taken: tuple[Carry, Outputs] = self._step(carry, puzzle_rows, self._feed.min_halt_steps)
        return taken

    def _turn(self) -> None:
        model = self.model
        carry, outputs = self._take_step()
        logits = model.lm_head(outputs.answer)
        self._predictions.copy_(logits.argmax(-1))
        self._q_halt.copy_(outputs.q_halt_logits)
        begins = carry.steps == 1
        wishes = outputs.q_halt_logits > (outputs.q_continue_logits if model.arch.q_continue else 0)
        halts_at = torch.where(begins, NEVER, self._halts_at)
        self._halts_at.copy_(torch.where(wishes, halts_at.minimum(carry.steps), halts_at))
        wide = logits.to(self._logits.dtype)
        change = (wide - self._logits).norm(dim=-1).mean(-1)
        changes = torch.cat([self._changes[:, 1:], change[:, None]], dim=1)
        self._changes.copy_(torch.where(begins[:, None], 0, changes))
        self._logits.copy_(wide)
        if outputs.gated:
            gates = [gate.float().mean((1, 2)) for module in outputs.gated for gate in module.gates]
            self.gates.copy_(torch.stack(gates, dim=1))
        self._keep(carry)

    @torch.inference_mode()
    def take_turn(self) -> None:
        """Runs one ACT step; sequences from the feed replace halted ones. Does not wait for the device."""
        self._begin()
        self._program()

    def _ends(self, rows: np.ndarray, places: np.ndarray, labels: np.ndarray) -> Ends:
        """The current state of some rows. Waits for the device."""
        held = (self._predictions, self._q_halt, self.carry.steps, self._halts_at, self._changes.sum(dim=1))
        predictions, q_halt, steps, halts_at, changes = (of.cpu().numpy()[rows] for of in held)
        with np.errstate(divide="ignore", invalid="ignore"):
            counted = np.minimum(steps - 1, _CHANGES)
            residual = np.where(counted > 0, changes / counted, np.inf).astype(np.float32)
        return Ends(places, labels, predictions, q_halt, steps, halts_at, residual)

    @torch.inference_mode()
    def at_depths(self, batch: Batch, depths: Sequence[int], keys: np.ndarray | int = 0) -> Iterator[Ends]:
        """The state of all rows of a batch after each of `depths`, without early halting.

        depths: ascending numbers of ACT steps; the last is arch.halt_max_steps. keys: see `Inference.run`.
        """
        self._feed.push(batch, min_halt_steps=NEVER, keys=keys)
        self.carry.halted.fill_(True)
        rows = np.arange(len(batch.inputs))
        self._begin()
        for before, depth in pairwise([0, *depths]):
            for _ in range(before, depth):
                self._program()
            yield self._ends(rows, rows, batch.labels)

    @torch.inference_mode()
    def until_halted(
        self, waiting: Iterator[Waiting], goes_on: Callable[[int, int], bool] = lambda place, steps: True
    ) -> Iterator[Ends]:
        """The final states of sequences with early halting, in the order of halting.

        The next sequence takes the row of an ended one, so shapes and the cost of a step stay constant; at
        the end some rows are idle. goes_on: called after every step with the place and steps of each running
        sequence; False drops the sequence without a result. The host reads after every step which sequences
        have halted.
        """
        B, S = self._predictions.shape
        held = Batch(
            np.zeros((B, S), np.int32), np.full((B, S), IGNORE_LABEL, np.int32), np.zeros(B, np.int32)
        )
        keys = np.zeros((B, self._feed.key_words), np.int32)
        # Index of the sequence in each row, -1 for none.
        places = np.full(B, -1)
        free = np.ones(B, bool)
        while True:
            places[free] = -1
            for row, following in zip(np.flatnonzero(free), waiting, strict=False):
                places[row] = following.place
                held.inputs[row], held.labels[row] = following.inputs, following.labels
                held.puzzle_identifiers[row] = following.puzzle_identifier
                keys[row] = 0 if following.key is None else following.key
            if (places < 0).all():
                return
            if free.any():
                # Dropped sequences have not halted by choice.
                self.carry.halted.copy_(torch.from_numpy(free))
                self._feed.push(held, keys=keys)
                self._begin()
            self._program()
            free, steps = (of.cpu().numpy().copy() for of in (self.carry.halted, self.carry.steps))
            done = np.flatnonzero(free & (places >= 0))
            if len(done):
                yield self._ends(done, places[done], held.labels[done])
            for row in np.flatnonzero(~free & (places >= 0)):
                free[row] = not goes_on(int(places[row]), int(steps[row]))


class EarlyExit(StepByStep):
    """Solves batches with early halting, at the latest after halt_max_steps; see `until_halted`."""

    def answers(self, batches: Iterable[tuple[Batch, int]]) -> Iterator[Answers]:
        """The answers to batches, see `Inference.answers`, in the order of halting."""
        rows = ((batch, row) for batch, count in batches for row in range(count))
        waiting = (
            Waiting(place, batch.inputs[row], batch.labels[row], batch.puzzle_identifiers[row])
            for place, (batch, row) in enumerate(rows)
        )
        for ends in self.until_halted(waiting):
            yield Answers(*ends[: len(Answers._fields)])
