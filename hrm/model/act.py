"""Adaptive computation time: the carry between steps, halting, exploration, the target of q_continue.

Source: Wang et al. 2025 (arXiv 2506.21734), after Graves 2016 (arXiv 1603.08983).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hrm.common.regions import region
from hrm.config.schema import ArchConfig
from hrm.model.gating import pack
from hrm.model.hrm import HRM, Gated, Noise
from hrm.model.subgoal import refreshes
from kernels import random_start
from kernels.noise import KEY_WORDS


class Carry(NamedTuple):
    """The state of a batch of sequences between two ACT steps.

    z_H, z_L: (B, T, D) in the model's dtype; with K chains z_L is (B, K, T, D), with a single state it is (B,
    0, D). steps: (B,) int32, ACT steps taken. halted: (B,) bool, to be replaced at the next step. inputs,
    labels: (B, S) int32, the current data; ignored labels are -100. puzzle_identifiers: (B,) int32. keys: (B,
    3) int32, the seed, example and path that determine random numbers; (B, 0) without randomness.
    """

    z_H: Tensor
    z_L: Tensor
    steps: Tensor
    halted: Tensor
    inputs: Tensor
    labels: Tensor
    puzzle_identifiers: Tensor
    goal: Tensor
    goal_gate: Tensor
    gates: Tensor
    keys: Tensor


class Sequences(NamedTuple):
    """New sequences. inputs, labels: (B, S) int32. puzzle_identifiers: (B,) int32.

    keys: (B, 3) int32, see `Carry`; read only with randomness.
    """

    inputs: Tensor
    labels: Tensor
    puzzle_identifiers: Tensor
    keys: Tensor = torch.zeros(0, 0, dtype=torch.int32)


class Randomness(NamedTuple):
    """The randomness of a recurrence; its random numbers are a function of the carry's keys.

    starts: z_H and z_L start at truncated normals of standard deviation 1, drawn for every token and channel,
    instead of H_init and L_init. noise: the standard deviation of the normal noise in every update. Neither
    applies to path 0, which is deterministic. Training uses `of` its architecture; evaluation may use another
    with any model.
    """

    starts: bool = False
    noise: float = 0.0

    @classmethod
    def of(cls, arch: ArchConfig) -> "Randomness":
        """The randomness that a model is trained with."""
        return cls(arch.init == "random", arch.noise)

    @property
    def key_words(self) -> int:
        """The width of the keys; 0 without randomness."""
        return KEY_WORDS if self.starts or self.noise else 0


PLAIN = Randomness()


class Subgoal(NamedTuple):
    """The inputs of the feudal loss, with gradient.

    z_L: (B, T, D). goal: (B, G), gate: (B,), computed from this step's z_H where `renewed` (B,), otherwise
    carried over.
    """

    z_L: Tensor
    goal: Tensor
    gate: Tensor
    renewed: Tensor


class Outputs(NamedTuple):
    """The outputs of one ACT step.

    answer: (B, S, D), the part of z_H that the head reads; the loss computes the logits and does not keep
    them. q_*: (B,), the target None if not requested. subgoal: None without a subgoal head. gated: the
    modules' gates, L first, if requested.
    """

    answer: Tensor
    q_halt_logits: Tensor
    q_continue_logits: Tensor
    target_q_continue: Tensor | None
    subgoal: Subgoal | None = None
    gated: tuple[Gated, ...] | None = None


def initial_carry(
    model: HRM,
    batch_size: int,
    seq_len: int,
    device: torch.device,
    *,
    keeps_gates: bool = False,
    randomness: Randomness = PLAIN,
    chains: int = 1,
) -> Carry:
    """A carry whose sequences have all halted, so that the first step replaces all of them.

    keeps_gates: allocate the gates of a step, for the stability loss. randomness: of later steps; allocates
    their keys. chains: number of states z_L per sequence, see `hrm.model.chains`.
    """
    arch = model.arch
    state = torch.zeros(batch_size, model.length, arch.hidden_size, dtype=model.dtype, device=device)
    cells = torch.zeros(batch_size, seq_len, dtype=torch.int32, device=device)
    per_sequence = torch.zeros(batch_size, dtype=torch.int32, device=device)
    halted = torch.ones(batch_size, dtype=torch.bool, device=device)
    wide = torch.promote_types(model.dtype, torch.float32)
    goal_dim = arch.subgoal_head.goal_dim if model.subgoal_head is not None else 0
    gates = state.new_zeros(batch_size, 0)
    if keeps_gates:
        # Three sources of L and two of H, with gates per channel or per token.
        width = 1 if arch.gating_type == "attention" else arch.hidden_size
        gates = state.new_zeros(batch_size, model.length, 5, width)
    if arch.single_state:
        z_L = state.new_zeros(batch_size, 0, arch.hidden_size)
    else:
        z_L = state.clone() if chains == 1 else state[:, None].repeat(1, chains, 1, 1)
    return Carry(
        z_H=state,
        z_L=z_L,
        steps=per_sequence,
        halted=halted,
        inputs=cells,
        labels=cells.clone(),
        puzzle_identifiers=per_sequence.clone(),
        goal=torch.zeros(batch_size, goal_dim, dtype=wide, device=device),
        goal_gate=torch.zeros(batch_size, dtype=wide, device=device),
        gates=gates,
        keys=per_sequence.new_zeros(batch_size, randomness.key_words),
    )


def replace_halted(model: HRM, carry: Carry, fresh: Sequences, *, randomness: Randomness = PLAIN) -> Carry:
    """Replaces halted sequences by new ones, with initial states, 0 steps and no subgoal.

    Chains start at the model's L_init and L_chains.
    """
    halted, keys, L_init = carry.halted, carry.keys, model.L_init
    per_cell, per_state = halted[:, None], halted[:, None, None]
    if randomness.key_words:
        keys = torch.where(per_cell, fresh.keys, keys)
    if randomness.starts:
        z_H = random_start(carry.z_H, halted, model.H_init, keys, 0)
        z_L = carry.z_L if L_init is None else random_start(carry.z_L, halted, L_init, keys, 1)
    elif carry.z_L.dim() == 4:
        z_H = torch.where(per_state, model.H_init.to(carry.z_H.dtype), carry.z_H)
        starts = model.chain_starts().to(carry.z_L.dtype)
        z_L = torch.where(per_state[..., None], starts[:, None], carry.z_L)
    else:
        z_H = torch.where(per_state, model.H_init.to(carry.z_H.dtype), carry.z_H)
        z_L = carry.z_L if L_init is None else torch.where(per_state, L_init.to(carry.z_L.dtype), carry.z_L)
    # Pass every field by keyword: Dynamo of torch 2.11 traces `_replace` to an empty tuple.
    return Carry(
        z_H=z_H,
        z_L=z_L,
        steps=torch.where(halted, 0, carry.steps),
        halted=torch.zeros_like(halted),
        inputs=torch.where(per_cell, fresh.inputs, carry.inputs),
        labels=torch.where(per_cell, fresh.labels, carry.labels),
        puzzle_identifiers=torch.where(halted, fresh.puzzle_identifiers, carry.puzzle_identifiers),
        goal=torch.where(per_cell, 0, carry.goal),
        goal_gate=torch.where(halted, 0, carry.goal_gate),
        gates=carry.gates,
        keys=keys,
    )


def draw_min_halt_steps(arch: ArchConfig, seed: int, step: int, batch_size: int) -> np.ndarray:
    """Exploration: the minimum number of steps before each sequence may halt by choice, (B,) int32.

    Uniform in [2, halt_max_steps] with probability halt_exploration_prob, otherwise 0. It is drawn for the
    whole global batch from (seed, step), so it does not depend on the number of ranks and needs no state for
    resumption.
    """
    if arch.halt_max_steps < 2:
        return np.zeros(batch_size, dtype=np.int32)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, step])))
    explores = rng.random(batch_size) < arch.halt_exploration_prob
    return np.where(explores, rng.integers(2, arch.halt_max_steps + 1, batch_size), 0).astype(np.int32)


def keys_of(seed: int, examples: np.ndarray, path: np.ndarray | int) -> np.ndarray:
    """The keys of sequences, (B, 3) int32: the low 32 bits of seed, example (B,) and path (B,) or ()."""
    columns = np.broadcast_arrays(np.uint64(seed), examples, path)
    words = np.stack([column.astype(np.uint64) for column in columns], axis=1)
    return (words & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.int32)


def training_keys(seed: int, step: int, batch_size: int) -> np.ndarray:
    """The keys of the rows of a step's global batch, (B, 3) int32; each row of the run is a separate
    example."""
    return keys_of(seed, step * batch_size + np.arange(batch_size), 1)


def act_step(
    model: HRM,
    carry: Carry,
    puzzle_rows: Tensor | None,
    min_halt_steps: Tensor | None,
    *,
    sees_gates: bool = False,
    with_target: bool = True,
    randomness: Randomness = PLAIN,
) -> tuple[Carry, Outputs]:
    """One ACT step on a carry without halted sequences.

    puzzle_rows: (B, puzzle_emb_ndim), the rows of carry.puzzle_identifiers, or None without a puzzle table.
    min_halt_steps: (B,) while training; None for evaluation: sequences halt only at halt_max_steps and no
    target is computed. sees_gates: include the gates in the outputs. with_target: False for halting by choice
    without training, which saves the target pass. randomness: of the noise, by the carry's keys; the target
    pass uses the random numbers of the next step. The new carry is detached.
    """
    arch, head = model.arch, model.subgoal_head
    noise = Noise(randomness.noise, carry.keys, carry.steps) if randomness.noise else None
    steps = carry.steps + 1
    e = model.embed(carry.inputs, puzzle_rows)
    seen: list[Gated] | None = [] if sees_gates else None
    bias = None if head is None else head.bias(carry.goal, carry.goal_gate, model.dtype)
    z_H, z_L = model.recur(carry.z_H, carry.z_L, e, bias=bias, seen=seen, noise=noise)
    answer = z_H[:, model.prefix_len :]
    with region("Q head"):
        q_halt, q_continue = model.q_values(z_H)
    goal, goal_gate, subgoal = carry.goal, carry.goal_gate, None
    if head is not None:
        with region("subgoal head"):
            new_goal, new_gate = head(z_H)
        renewed = refreshes(steps, arch.subgoal_head.manager_period)
        goal = torch.where(renewed[:, None], new_goal, goal)
        goal_gate = torch.where(renewed, new_gate, goal_gate)
        subgoal = Subgoal(z_L, goal, goal_gate, renewed)
    target = None
    with torch.no_grad():
        z_H, z_L = z_H.detach(), z_L.detach()
        goal, goal_gate = goal.detach(), goal_gate.detach()
        is_last = steps >= arch.halt_max_steps
        halted = is_last
        if min_halt_steps is not None and arch.halt_max_steps > 1:
            # Without q_continue, halt if the answer is more likely right than wrong.
            wants_to_halt = q_halt > (q_continue if arch.q_continue else 0)
            halted = is_last | (wants_to_halt & (steps >= min_halt_steps))
            if arch.q_continue and with_target:
                with region("target pass"):
                    bias = None if head is None else head.bias(goal, goal_gate, model.dtype)
                    noise = None if noise is None else Noise(noise.deviation, noise.keys, steps)
                    next_z_H, _ = model.recur(z_H, z_L, e.detach(), queries=1, bias=bias, noise=noise)
                    next_halt, next_continue = model.q_values(next_z_H)
                best = torch.where(is_last, next_halt, torch.maximum(next_halt, next_continue))
                target = torch.sigmoid(best)
        gates = carry.gates
        if seen and gates.shape[1:].numel():
            gates = pack([gated.gates for gated in seen])
    # Pass every field by keyword, as in `replace_halted`.
    carry = Carry(
        z_H=z_H,
        z_L=z_L,
        steps=steps,
        halted=halted,
        inputs=carry.inputs,
        labels=carry.labels,
        puzzle_identifiers=carry.puzzle_identifiers,
        goal=goal,
        goal_gate=goal_gate,
        gates=gates,
        keys=carry.keys,
    )
    return carry, Outputs(answer, q_halt, q_continue, target, subgoal, None if seen is None else tuple(seen))
