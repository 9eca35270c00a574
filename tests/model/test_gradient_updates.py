"""arch.gradient=last_n: against the two other gradients, and against a recurrence that is all taught."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from hrm.model.act import Sequences, initial_carry, replace_halted
from hrm.model.hrm import HRM
from tests.support.act_cases import PUZZLES, B, S, V, make_arch, random_batch


def unrolled(model: HRM, z_H: Tensor, z_L: Tensor, e: Tensor) -> Tensor:
    """The z_H after an ACT step, every update with gradient."""
    assert model.H_level is not None
    for _ in range(model.arch.H_cycles):
        for _ in range(model.arch.L_cycles):
            z_L = model.L_level(z_L, z_H, e, model.cos, model.sin)
        z_H = model.H_level(z_H, z_L, None, model.cos, model.sin)
    return z_H


def gradients(whole: bool = False, **changes: Any) -> dict[str, Tensor]:
    """The gradients of every weight after one ACT step in float64. whole: through every update."""
    model = HRM(
        make_arch(**changes), vocab_size=V, seq_len=S, num_puzzle_identifiers=PUZZLES, dtype=torch.float64
    ).double()
    batch = Sequences(**random_batch(torch.Generator().manual_seed(0)))
    carry = replace_halted(model, initial_carry(model, B, S, torch.device("cpu")), batch)
    start = carry.z_H, carry.z_L, model.embed(batch.inputs, None)
    z_H = unrolled(model, *start) if whole else model.recur(*start)[0]
    weights = dict(model.named_parameters())
    ramp = torch.linspace(-1, 1, z_H[0].numel(), dtype=torch.float64).view(z_H[0].shape)
    found = torch.autograd.grad((z_H * ramp).sum(), [*weights.values()], allow_unused=True)
    return {name: grad for name, grad in zip(weights, found, strict=True) if grad is not None}


@pytest.mark.parametrize(
    ("updates", "same"),
    [(2, {"gradient": "one_step"}), (4, {"gradient": "last_cycle"})],
)
@pytest.mark.parametrize("variant", [{}, {"use_gating": True, "gating_type": "hierarchical"}])
def test_the_other_gradients_are_some_of_the_last_updates(variant, updates, same):
    ours = gradients(gradient="last_n", gradient_updates=updates, **variant)
    theirs = gradients(**same, **variant)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_more_updates_extend_the_gradient_to_all():
    # Two cycles of three L-updates and one H-update.
    all_of_them = gradients(gradient="last_n", gradient_updates=8)
    beyond = gradients(gradient="last_n", gradient_updates=99)
    assert all(torch.equal(beyond[name], grad) for name, grad in all_of_them.items())
    name = "L_level.layers.0.mlp.down_proj.weight"
    sizes = [gradients(gradient="last_n", gradient_updates=n).get(name) for n in range(1, 9)]
    # The last update is of H: no gradient reaches L.
    assert sizes[0] is None
    known = [grad for grad in sizes if grad is not None]
    # The fifth update from the end is of H: L learns nothing from it before the sixth.
    differ = [not torch.equal(a, b) for a, b in pairwise(known)]
    assert differ == [True, True, False, True, True, True]
    whole = gradients(whole=True)
    assert whole.keys() == all_of_them.keys()
    for weight, grad in whole.items():
        torch.testing.assert_close(all_of_them[weight], grad, rtol=1e-9, atol=1e-12)
