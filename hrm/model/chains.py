"""Winner-takes-all training: a sequence has several latent states z_L, and only the best one learns.

The chains of a sequence share z_H. An ACT step runs every chain without gradient, then the chain with the
lowest token loss again with gradient. The sequence takes the winner's z_H; each chain keeps its z_L.
Evaluation has one chain, which starts at L_init like the first chain. Source: arXiv 2601.19085.

Shapes: K chains; B, T and D as in `hrm.model.hrm`.
"""

import torch
from torch import Tensor

from hrm.common.regions import region
from hrm.config.schema import LossConfig
from hrm.model.act import Carry, Outputs, Randomness, act_step
from hrm.model.hrm import HRM
from hrm.model.losses import token_losses


def chains_step(
    model: HRM,
    loss: LossConfig,
    carry: Carry,
    puzzle_rows: Tensor | None,
    min_halt_steps: Tensor,
    *,
    sees_gates: bool,
    randomness: Randomness,
) -> tuple[Carry, Outputs, Tensor]:
    """One training step of a carry with z_L (B, K, T, D): the carry after it, the winners' outputs, winners.

    winners: (B,) int64, the chain of each sequence that carries the gradient. A chain whose loss is NaN wins,
    so that the update is skipped. Gates and subgoals are those of the winners. For other arguments see
    `act_step`.
    """
    K = carry.z_L.shape[1]
    with region("chains"), torch.no_grad():
        rows = None if puzzle_rows is None else puzzle_rows.repeat_interleave(K, dim=0)
        every = _of_every_chain(carry)
        after, outputs = act_step(model, every, rows, None, randomness=randomness)
        losses = token_losses(loss, model.lm_head, outputs.answer, every.labels).loss
        winners = losses.view(-1, K).argmin(dim=1)
        states, place = after.z_L.unflatten(0, (-1, K)), _place(winners, carry.z_L)
        z_L, keys = carry.z_L.gather(1, place)[:, 0], _keys(carry.keys, winners)
    won = with_states(carry, z_L, keys)
    won, outputs = act_step(
        model, won, puzzle_rows, min_halt_steps, sees_gates=sees_gates, randomness=randomness
    )
    with torch.no_grad():
        states = states.scatter(1, place, won.z_L[:, None])
    return with_states(won, states, carry.keys), outputs, winners


def with_states(carry: Carry, z_L: Tensor, keys: Tensor) -> Carry:
    """The carry with other states z_L and their keys."""
    # By keyword: Dynamo of torch 2.11 traces `_replace` to an empty tuple.
    return Carry(**{**dict(zip(Carry._fields, carry, strict=True)), "z_L": z_L, "keys": keys})


def _of_every_chain(carry: Carry) -> Carry:
    """The carry as B * K sequences, one per chain."""
    K = carry.z_L.shape[1]
    # Only the winner uses the gates of the previous step.
    fields = {"z_L": carry.z_L.flatten(0, 1), "gates": carry.gates[:0]}
    for name, value in zip(Carry._fields, carry, strict=True):
        if name not in fields:
            fields[name] = value.repeat_interleave(K, dim=0)
    chains = torch.arange(K, device=carry.keys.device).repeat(len(carry.keys))
    fields["keys"] = _keys(fields["keys"], chains)
    return Carry(**fields)


def _keys(keys: Tensor, chains: Tensor) -> Tensor:
    """The keys (n, 3) of chains (n,): each chain has its own path number."""
    if not keys.shape[1]:
        return keys
    return torch.cat([keys[:, :2], keys[:, 2:] + chains[:, None].to(keys.dtype)], dim=1)


def _place(chains: Tensor, states: Tensor) -> Tensor:
    """The index (B, 1, T, D) of one chain (B,) of each sequence in states (B, K, T, D)."""
    return chains[:, None, None, None].expand(-1, 1, *states.shape[2:])
