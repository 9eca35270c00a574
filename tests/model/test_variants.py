"""Whole ACT steps of gated and feudal models against the straight-line variants, in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from hrm.config.schema import LossConfig, SubgoalConfig
from hrm.model.act import Sequences, act_step, initial_carry, replace_halted
from hrm.model.gating import GatingNetwork
from hrm.model.hrm import HRM
from hrm.model.losses import act_loss
from tests.support import straight_line as plain
from tests.support import straight_variants as variants
from tests.support.act_cases import (
    PUZZLES,
    STABLEMAX,
    B,
    D,
    S,
    V,
    assert_all_close,
    draw_often,
    make_arch,
    random_batch,
)

FEUDAL = SubgoalConfig(enabled=True, manager_period=2, goal_dim=D // 2, goal_scale=1.5, temperature=0.7)
GATE_LOSSES: dict[str, Any] = {
    "gate_saturation_weight": 0.3,
    "gate_entropy_weight": 0.2,
    "gate_stability_weight": 5.0,
}
pytestmark = pytest.mark.usefixtures("float64")


def make_variant(arch, seed=0):
    """A model with no weight at zero, whose q values let about half of the sequences halt."""
    model = HRM(arch, vocab_size=V, seq_len=S, num_puzzle_identifiers=PUZZLES, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            std = 0.5 if tensor.dim() == 1 else tensor.shape[-1] ** -0.5
            tensor.copy_(std * torch.randn(tensor.shape, generator=generator))
        for name, tensor in model.named_parameters():
            # The gates' own, near where training starts them.
            if ".gating_network." in name and name.endswith("2.bias"):
                tensor.sub_(1.0)
    return model, generator


@pytest.mark.parametrize(
    ("changes", "loss"),
    [
        ({"use_gating": True}, LossConfig(STABLEMAX, **GATE_LOSSES)),
        ({"use_gating": True, "gating_type": "attention"}, LossConfig(STABLEMAX, **GATE_LOSSES)),
        ({"use_gating": True, "gating_type": "hierarchical"}, LossConfig(STABLEMAX, **GATE_LOSSES)),
        ({"use_gating": True, "gating_type": "hierarchical"}, LossConfig(STABLEMAX)),
        ({"subgoal_head": FEUDAL}, LossConfig(STABLEMAX, feudal_loss_weight=0.4)),
        (
            {"use_gating": True, "gating_type": "attention", "subgoal_head": FEUDAL},
            LossConfig(STABLEMAX, feudal_loss_weight=0.4, **GATE_LOSSES),
        ),
    ],
    ids=["gates", "attention", "hierarchical", "hierarchical-fused-loss", "feudal", "all"],
)
def test_training_steps(changes, loss):
    arch = make_arch(puzzle_emb_ndim=D, halt_max_steps=5, **changes)
    model, generator = make_variant(arch)
    carry = initial_carry(model, B, S, torch.device("cpu"), keeps_gates=loss.gate_stability_weight > 0)
    expected: Any = None
    kept = renewed = 0
    for step in range(8):
        batch, least = random_batch(generator), draw_often(arch, generator)
        scale = torch.tensor(0.25 * (step % 5))
        model.zero_grad()
        carry = replace_halted(model, carry, Sequences(**batch))
        if expected is None:
            fields = carry._asdict()
            widths = [(3, D), (2, D)] if arch.gating_type != "attention" else [(3, 1), (2, 1)]
            T = model.length
            expected = {name: fields[name] for name in fields if name != "gates"}
            expected["previous"] = [[torch.zeros(B, T, W)] * n for n, W in widths]
        else:
            extras = {name: expected[name] for name in ("goal", "goal_gate", "previous")}
            halted = expected["halted"]
            expected = plain.replace_halted(model.state_dict(), expected, batch) | extras
            expected["goal"] = torch.where(halted[:, None], 0, extras["goal"])
            expected["goal_gate"] = torch.where(halted, 0, extras["goal_gate"])
        ids = carry.puzzle_identifiers.long()
        table = model.state_dict()[plain.PUZZLE_TABLE]
        rows, plain_rows = (table[ids].detach().requires_grad_() for _ in range(2))
        before = carry.gates
        carry, outputs = act_step(model, carry, rows, least, sees_gates=loss.uses_gates)
        total, sums = act_loss(loss, model.lm_head, carry, outputs, before, scale)
        total.backward()

        leaves = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
        weights = {**model.state_dict(), **leaves}
        expected_loss, metrics, expected = variants.training_step(
            weights, arch, loss, expected, plain_rows, least, scale.item()
        )
        expected_loss.backward()

        assert_all_close(total, expected_loss)
        assert metrics.keys() <= sums.keys()
        for name, value in metrics.items():
            assert_all_close(sums[name], value)
        for name, parameter in model.named_parameters():
            assert_all_close(parameter.grad, leaves[name].grad)
        assert_all_close(rows.grad, plain_rows.grad)
        for name in ("z_H", "z_L", "steps", "halted", "goal", "goal_gate"):
            assert_all_close(getattr(carry, name), expected[name])
        if loss.gate_stability_weight:
            assert_all_close(
                carry.gates, torch.stack([g for module in expected["previous"] for g in module], 2)
            )
        if outputs.subgoal is not None:
            renewed += int(outputs.subgoal.renewed.sum())
            kept += int((~outputs.subgoal.renewed).sum())
    if arch.subgoal_head.enabled:
        assert kept > 10 and renewed > 10


def test_evaluation_sets_goals_too():
    model, generator = make_variant(make_arch(halt_max_steps=3, subgoal_head=FEUDAL))
    carry = initial_carry(model, B, S, torch.device("cpu"))
    carry = replace_halted(model, carry, Sequences(**random_batch(generator)))
    goals = []
    with torch.no_grad():
        for _ in range(3):
            carry, _ = act_step(model, carry, None, None)
            goals.append(carry.goal)
    assert_all_close(goals[0].norm(dim=1), torch.full((B,), 1.5))
    assert not goals[1].equal(goals[0])
    assert_all_close(goals[2], goals[1])


def test_without_a_weight_the_head_changes_nothing_but_the_input():
    """A head whose V_L is zero leaves v1 as it is, loss and gradients, when its own loss has no weight."""
    arch = make_arch()
    plain_model, generator = make_variant(arch)
    model, _ = make_variant(replace(arch, subgoal_head=FEUDAL))
    model.load_state_dict(plain_model.state_dict(), strict=False)
    assert model.subgoal_head is not None
    torch.nn.init.zeros_(model.subgoal_head.input_proj.weight)
    batch, results = random_batch(generator), []
    for each in (plain_model, model):
        carry = replace_halted(each, initial_carry(each, B, S, torch.device("cpu")), Sequences(**batch))
        carry, outputs = act_step(each, carry, None, torch.zeros(B, dtype=torch.int32))
        loss, _ = act_loss(LossConfig(), each.lm_head, carry, outputs)
        loss.backward()
        results.append((loss, each.L_level.layers[0].mlp.down_proj.weight.grad))
    assert_all_close(results[0], results[1])


@pytest.mark.parametrize("changes", [{"use_gating": True}, {"subgoal_head": FEUDAL}])
def test_a_variant_and_v1_of_one_seed_share_their_weights(changes):
    sizes: Any = {"vocab_size": V, "seq_len": S, "num_puzzle_identifiers": PUZZLES, "seed": 3}
    v1, variant = HRM(make_arch(), **sizes), HRM(make_arch(**changes), **sizes)
    own = variant.state_dict()
    for name, tensor in v1.state_dict().items():
        assert torch.equal(own[name], tensor), name
    assert len(own) > len(v1.state_dict())


def test_gates_are_drawn_by_their_strategy():
    arch = make_arch(use_gating=True, gate_init_strategy="input_focused")
    model = HRM(arch, vocab_size=V, seq_len=S, num_puzzle_identifiers=PUZZLES)
    for module in model.modules():
        if isinstance(module, GatingNetwork):
            bias = module.gate_proj[2].bias.view(3, D)
            assert bias.unique(dim=1).flatten().tolist() == [-3.0, -3.0, -1.0]
