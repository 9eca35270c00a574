"""Solves batches of fixed size: every sequence for halt_max_steps ACT steps, or each until it halts."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hrm.config.schema import LossConfig
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
    """The model at one batch size, without gradient: eager, compiled or captured, by mode.

    `run` and `solve` set predictions (B, S) int32, q_halt (B,), and sums, the metric sums of `act_loss` in
    float32 in the order of `names`. Weights are read in place, so each call uses the present ones.
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
        """randomness: what differs between the paths of a puzzle; any model takes any, PLAIN has none."""
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
        self._program = Program(self._solve, device, captured=mode.captured)

    def _act_step(self, carry: Carry, puzzle_rows: Tensor | None) -> tuple[Carry, Outputs]:
        return act_step(self.model, carry, puzzle_rows, None, randomness=self.randomness)

    def prepare(self, compilation: Compilation) -> None:
        """Compiles the step, if its mode asks for it; the first run would do so unannounced."""
        _prepare(
            lambda: self._step(*self._start()),
            "the evaluation",
            self.model,
            self._feed,
            self._mode,
            compilation,
        )

    def _start(self) -> tuple[Carry, Tensor | None]:
        """Carry and puzzle rows of the sequences in the feed, before their first step."""
        fresh, table = self._feed.fresh, self.model.puzzle_emb
        carry = replace_halted(self.model, self._blank, fresh, randomness=self.randomness)
        return carry, None if table is None else table(carry.puzzle_identifiers)

    def _solve(self) -> None:
        model = self.model
        carry, puzzle_rows = self._start()
        for _ in range(model.arch.halt_max_steps):
            carry, outputs = self._step(carry, puzzle_rows)
        self.predictions.copy_(model.lm_head(outputs.answer).argmax(-1))
        self.q_halt.copy_(outputs.q_halt_logits)
        _, sums = act_loss(self.loss, model.lm_head.weight, carry, outputs)
        vector = torch.stack([value.to(torch.float32) for value in sums.values()])
        if not self.names:
            self.names, self.sums = list(sums), torch.zeros_like(vector)
        self.sums.copy_(vector)

    @torch.no_grad()
    def run(self, batch: Batch, keys: np.ndarray | int = 0) -> None:
        """Solves a batch and sums its metrics; does not wait for the device.

        keys: of a program with randomness, (B, 3) int32, the seed, example and path of each row, as `keys_of`
        makes them; 0 puts every row on path 0.
        """
        self._feed.push(batch, keys=keys)
        self._program()

    def solve(self, inputs: np.ndarray, puzzle_identifiers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The answers to inputs (B, S) of puzzles (B,), int32: predictions (B, S) int32, q_halt (B,) float32.

        Waits for the device. Raises ValueError for arrays of other shapes.
        """
        inputs, puzzle_identifiers = np.asarray(inputs), np.asarray(puzzle_identifiers)
        # Writing to the feed would broadcast other shapes.
        B, S = self.predictions.shape
        if inputs.shape != (B, S) or puzzle_identifiers.shape != (B,):
            raise ValueError(
                f"solve: inputs must be {(B, S)} and puzzle_identifiers {(B,)}, "
                f"got {inputs.shape} and {puzzle_identifiers.shape}"
            )
        self.run(Batch(inputs, np.full_like(inputs, IGNORE_LABEL), puzzle_identifiers))
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


@torch.no_grad()
def _prepare(
    step: Callable[[], object], what: str, model: HRM, feed: Feed, mode: Mode, compilation: Compilation
) -> None:
    """Takes a step for the first time, if its mode compiles it."""
    if not mode.compiled:
        return
    inputs = feed.fresh.inputs
    with compilation.of(what, model.arch, tuple(inputs.shape), model.dtype, inputs.device.type):
        if mode.captured:
            aside(step, inputs.device)
        else:
            step()


class EarlyExit:
    """The model at one batch size, without gradient; each sequence stops when it halts.

    A sequence halts as in training without exploration: when q_halt is above q_continue (above 0 without
    one), at the latest after halt_max_steps. Its row then takes the next sequence, so shapes and the cost of
    a step are those of `Inference`; rows without a sequence at the end give no answers. The host reads after
    every step which sequences have halted.
    """

    def __init__(self, model: HRM, batch_size: int, seq_len: int, *, mode: Mode) -> None:
        device = model.H_init.device
        self.model = model
        self._feed = Feed(batch_size, seq_len, device)
        self._carry = initial_carry(model, batch_size, seq_len, device)
        self._predictions = torch.zeros(batch_size, seq_len, dtype=torch.int32, device=device)
        self._q_halt = torch.zeros(batch_size, dtype=torch.float32, device=device)
        self._step = compiled(self._act_step) if mode.compiled else self._act_step
        self._mode = mode
        self._program = Program(self._turn, device, captured=mode.captured)

    def _act_step(self, carry: Carry, puzzle_rows: Tensor | None, least: Tensor) -> tuple[Carry, Outputs]:
        return act_step(self.model, carry, puzzle_rows, least, with_target=False)

    def prepare(self, compilation: Compilation) -> None:
        """Compiles the step, if its mode asks for it; the first answers would do so unannounced."""
        _prepare(self._take_step, "the early exit", self.model, self._feed, self._mode, compilation)

    def _take_step(self) -> tuple[Carry, Outputs]:
        carry, table = replace_halted(self.model, self._carry, self._feed.fresh), self.model.puzzle_emb
        puzzle_rows = None if table is None else table(carry.puzzle_identifiers)
        # The feed holds 0 as the minimum of steps.
        taken: tuple[Carry, Outputs] = self._step(carry, puzzle_rows, self._feed.min_halt_steps)
        return taken

    def _turn(self) -> None:
        model = self.model
        carry, outputs = self._take_step()
        self._predictions.copy_(model.lm_head(outputs.answer).argmax(-1))
        self._q_halt.copy_(outputs.q_halt_logits)
        for old, new in zip(self._carry, carry, strict=True):
            old.copy_(new)

    @torch.no_grad()
    def take_turn(self) -> None:
        """One ACT step of the sequences in the feed; does not wait for the device."""
        self._program()

    @torch.no_grad()
    def answers(self, batches: Iterable[tuple[Batch, int]]) -> Iterator[Answers]:
        """The answers to batches as in `Inference.answers`, in the order in which sequences halt."""
        B, S = self._predictions.shape
        held = Batch(
            np.zeros((B, S), np.int32), np.full((B, S), IGNORE_LABEL, np.int32), np.zeros(B, np.int32)
        )
        fields = [(getattr(held, name), name) for name in vars(held)]
        waiting = ((batch, row) for batch, count in batches for row in range(count))
        # The index of the sequence in each row, -1 for none.
        places, given = np.full(B, -1), 0
        halted = np.ones(B, bool)
        self._carry.halted.fill_(True)
        while True:
            places[halted] = -1
            for slot in np.flatnonzero(halted):
                following = next(waiting, None)
                if following is None:
                    break
                for array, name in fields:
                    array[slot] = getattr(following[0], name)[following[1]]
                places[slot], given = given, given + 1
            if (places < 0).all():
                return
            self._feed.push(held)
            self.take_turn()
            halted = self._carry.halted.cpu().numpy().copy()
            done = np.flatnonzero(halted & (places >= 0))
            if len(done):
                predictions, q_halt, steps = (
                    of.cpu().numpy()[done] for of in (self._predictions, self._q_halt, self._carry.steps)
                )
                yield Answers(places[done], held.labels[done], predictions, q_halt, steps)
