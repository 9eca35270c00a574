"""Adaptive computation time: the carry between steps, halting, exploration, the target of q_continue.

Source: Wang et al. 2025 (arXiv 2506.21734), after Graves 2016 (arXiv 1603.08983).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hrm.config import ArchConfig
from hrm.model import HRM
from hrm.profiling import region


class Carry(NamedTuple):
    """What a batch of sequences takes from one ACT step to the next.

    z_H, z_L: (B, T, D) in the model's dtype. steps: (B,) int32, ACT steps taken. halted: (B,) bool, to be
    replaced at the next step. inputs, labels: (B, S) int32, the data being worked on, labels -100 where
    they do not count. puzzle_identifiers: (B,) int32.
    """

    z_H: Tensor
    z_L: Tensor
    steps: Tensor
    halted: Tensor
    inputs: Tensor
    labels: Tensor
    puzzle_identifiers: Tensor


class Sequences(NamedTuple):
    """Fresh sequences to work on. inputs, labels: (B, S) int32. puzzle_identifiers: (B,) int32."""

    inputs: Tensor
    labels: Tensor
    puzzle_identifiers: Tensor


class Outputs(NamedTuple):
    """What one ACT step computes.

    answer: (B, S, D), the states of z_H that the head reads; their logits are the loss's business, which
    does not keep them. The others: (B,), the target None when not asked for.
    """

    answer: Tensor
    q_halt_logits: Tensor
    q_continue_logits: Tensor
    target_q_continue: Tensor | None


def initial_carry(model: HRM, batch_size: int, seq_len: int, device: torch.device) -> Carry:
    """A carry whose sequences have all halted, so that the first step replaces every one of them."""
    state = torch.zeros(batch_size, model.length, model.arch.hidden_size, dtype=model.dtype, device=device)
    cells = torch.zeros(batch_size, seq_len, dtype=torch.int32, device=device)
    per_sequence = torch.zeros(batch_size, dtype=torch.int32, device=device)
    halted = torch.ones(batch_size, dtype=torch.bool, device=device)
    return Carry(state, state.clone(), per_sequence, halted, cells, cells.clone(), per_sequence.clone())


def replace_halted(model: HRM, carry: Carry, fresh: Sequences) -> Carry:
    """Puts fresh sequences where the carry's have halted, with initial states and steps 0."""
    halted = carry.halted
    per_cell, per_state = halted[:, None], halted[:, None, None]
    return Carry(
        z_H=torch.where(per_state, model.H_init.to(carry.z_H.dtype), carry.z_H),
        z_L=torch.where(per_state, model.L_init.to(carry.z_L.dtype), carry.z_L),
        steps=torch.where(halted, 0, carry.steps),
        halted=torch.zeros_like(halted),
        inputs=torch.where(per_cell, fresh.inputs, carry.inputs),
        labels=torch.where(per_cell, fresh.labels, carry.labels),
        puzzle_identifiers=torch.where(halted, fresh.puzzle_identifiers, carry.puzzle_identifiers),
    )


def draw_min_halt_steps(arch: ArchConfig, seed: int, step: int, batch_size: int) -> np.ndarray:
    """Exploration: the fewest steps each sequence must take before it may halt by choice, (B,) int32.

    Uniform in [2, halt_max_steps] with probability halt_exploration_prob, otherwise 0. Drawn for the whole
    global batch from (seed, step) alone, so it is the same however many ranks share the batch and needs no
    state to resume.
    """
    if arch.halt_max_steps < 2:
        return np.zeros(batch_size, dtype=np.int32)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, step])))
    explores = rng.random(batch_size) < arch.halt_exploration_prob
    return np.where(explores, rng.integers(2, arch.halt_max_steps + 1, batch_size), 0).astype(np.int32)


def act_step(
    model: HRM, carry: Carry, puzzle_rows: Tensor | None, min_halt_steps: Tensor | None
) -> tuple[Carry, Outputs]:
    """One ACT step on a carry without halted sequences.

    puzzle_rows: (B, puzzle_emb_ndim), the rows of carry.puzzle_identifiers, or None without a puzzle table.
    min_halt_steps: (B,) while training; None evaluates, where sequences halt at halt_max_steps only and no
    target is computed. The new carry is detached.
    """
    arch = model.arch
    e = model.embed(carry.inputs, puzzle_rows)
    z_H, z_L = model.recur(carry.z_H, carry.z_L, e)
    answer = z_H[:, model.puzzle_emb_len :]
    with region("Q head"):
        q_halt, q_continue = model.q_values(z_H)
    target = None
    with torch.no_grad():
        z_H, z_L = z_H.detach(), z_L.detach()
        steps = carry.steps + 1
        is_last = steps >= arch.halt_max_steps
        halted = is_last
        if min_halt_steps is not None and arch.halt_max_steps > 1:
            # Without a continue head in use, stopping is worth it when it is likelier right than wrong.
            wants_to_halt = q_halt > (q_continue if arch.q_continue else 0)
            halted = is_last | (wants_to_halt & (steps >= min_halt_steps))
            if arch.q_continue:
                with region("target pass"):
                    next_z_H, _ = model.recur(z_H, z_L, e.detach(), queries=1)
                    next_halt, next_continue = model.q_values(next_z_H)
                best = torch.where(is_last, next_halt, torch.maximum(next_halt, next_continue))
                target = torch.sigmoid(best)
    carry = carry._replace(z_H=z_H, z_L=z_L, steps=steps, halted=halted)
    return carry, Outputs(answer, q_halt, q_continue, target)
