"""Solving a batch of fixed size: every sequence for halt_max_steps ACT steps, as one program."""

import numpy as np
import torch
from torch import Tensor

from hrm.act import Carry, Outputs, act_step, initial_carry, replace_halted
from hrm.data.dataset import IGNORE_LABEL, Batch
from hrm.feed import Feed
from hrm.losses import act_loss
from hrm.model import HRM
from hrm.modes import Mode, compiled
from hrm.program import Program
from hrm.schema import LossConfig


class Inference:
    """The model at one batch size, without gradient: eager, compiled or captured as a mode says.

    After `run` or `solve`, until the next: predictions (B, S) int32, q_halt (B,), and sums, the metric sums
    of `hrm.losses.act_loss` in float32 in the order of `names`. Weights are read where they are, so what
    training does to them counts at the next call.
    """

    def __init__(self, model: HRM, batch_size: int, seq_len: int, *, mode: Mode, loss: LossConfig) -> None:
        device = model.H_init.device
        self.model, self.loss = model, loss
        self._feed = Feed(batch_size, seq_len, device)
        # All halted, which the first step replaces.
        self._blank = initial_carry(model, batch_size, seq_len, device)
        self.predictions = torch.zeros(batch_size, seq_len, dtype=torch.int32, device=device)
        self.q_halt = torch.zeros(batch_size, dtype=torch.float32, device=device)
        self.names: list[str] = []
        self.sums = torch.zeros(0, device=device)
        self._step = compiled(self._act_step) if mode.compiled else self._act_step
        self._program = Program(self._solve, device, captured=mode.captured)

    def _act_step(self, carry: Carry, puzzle_rows: Tensor | None) -> tuple[Carry, Outputs]:
        return act_step(self.model, carry, puzzle_rows, None)

    def _solve(self) -> None:
        model = self.model
        carry = replace_halted(model, self._blank, self._feed.fresh)
        puzzle_rows = None
        if model.puzzle_emb is not None:
            puzzle_rows = model.puzzle_emb(carry.puzzle_identifiers)
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
    def run(self, batch: Batch) -> None:
        """Solves a batch's sequences and counts their metrics; does not wait for the device."""
        self._feed.push(batch)
        self._program()

    def solve(self, inputs: np.ndarray, puzzle_identifiers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The answers to inputs (B, S) of puzzles (B,), int32: predictions (B, S) int32, q_halt (B,) float32.

        Waits for the device. Raises ValueError for arrays of other shapes.
        """
        inputs, puzzle_identifiers = np.asarray(inputs), np.asarray(puzzle_identifiers)
        # They would be repeated to fill the batch.
        B, S = self.predictions.shape
        if inputs.shape != (B, S) or puzzle_identifiers.shape != (B,):
            raise ValueError(
                f"solve: inputs must be {(B, S)} and puzzle_identifiers {(B,)}, "
                f"got {inputs.shape} and {puzzle_identifiers.shape}"
            )
        self.run(Batch(inputs, np.full_like(inputs, IGNORE_LABEL), puzzle_identifiers))
        return self.predictions.cpu().numpy().copy(), self.q_halt.cpu().numpy().copy()
