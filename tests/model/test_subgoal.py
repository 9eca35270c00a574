"""The subgoal head and its loss against formulas written out, and where their gradients go."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from hrm.config.schema import ArchConfig, SubgoalConfig
from hrm.model.subgoal import SubgoalHead, feudal_loss, refreshes

B, T, D = 6, 5, 16


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(dtype: torch.dtype = torch.float64, **fields: Any) -> SubgoalHead:
    """A head with random weights, biases too, so that none goes untested."""
    arch = ArchConfig(hidden_size=D, num_heads=2, subgoal_head=SubgoalConfig(enabled=True, **fields))
    head = SubgoalHead(arch).to(dtype)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator(parameter.numel()))
    return head


def states(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, T, D, generator=generator(seed), dtype=torch.float64).to(dtype)


def weights(head: SubgoalHead) -> dict[str, Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in head.named_parameters()}


def plain_head(w: dict[str, Tensor], z_H: Tensor, scale: float, temperature: float) -> tuple[Tensor, Tensor]:
    """Row by row and element by element, without a library's normalisation or sigmoid."""
    goals, gates = [], []
    for m in z_H[:, 0]:
        v = (w["goal_proj.weight"] * m).sum(1) + w["goal_proj.bias"]
        goals.append(scale * v / (v * v).sum().sqrt())
        if "gate_proj.weight" in w:
            logit = (w["gate_proj.weight"][0] * m).sum() + w["gate_proj.bias"][0]
            gates.append(1 / (1 + torch.exp(-logit / temperature)))
        else:
            gates.append(torch.tensor(1.0, dtype=m.dtype))
    return torch.stack(goals), torch.stack(gates)


def plain_loss(z_L: Tensor, goal: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    losses, cosines = [], []
    for z, g, open_by in zip(z_L, goal, gate, strict=True):
        mean = torch.stack([token[: len(g)] for token in z]).sum(0) / T
        cosine = (mean * g).sum() / ((mean * mean).sum() * (g * g).sum()).sqrt()
        losses.append(open_by * (1 - cosine))
        cosines.append(cosine)
    return torch.stack(losses), torch.stack(cosines)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"goal_dim": 5},
    {"gating": False},
    {"temperature": 0.5},
    {"goal_scale": 3.0},
    {"goal_dim": 7, "goal_scale": 0.25, "temperature": 4.0},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_goal_gate_bias_and_loss_with_every_gradient(fields):
    """Absolute and relative 1e-9 in float64, against the same formulas written out."""
    head, ours = make(**fields), [states(s).requires_grad_() for s in (1, 2)]
    w, theirs = weights(head), [states(s).requires_grad_() for s in (1, 2)]
    dy = torch.randn(B, 1, D, generator=generator(3), dtype=torch.float64)

    goal, gate = head(ours[0])
    loss, cosine = feudal_loss(ours[1], goal, gate)
    bias = head.bias(goal, gate, torch.float64)
    (loss.sum() + (bias * dy).sum()).backward()

    scale, temperature = fields.get("goal_scale", 1.0), fields.get("temperature", 1.0)
    plain_goal, plain_gate = plain_head(w, theirs[0], scale, temperature)
    expected_loss, expected_cosine = plain_loss(theirs[1], plain_goal, plain_gate)
    added = [
        (w["input_proj.weight"] * g).sum(1) * open_by
        for g, open_by in zip(plain_goal, plain_gate, strict=True)
    ]
    expected_bias = torch.stack(added)[:, None]
    (expected_loss.sum() + (expected_bias * dy).sum()).backward()

    same = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(goal, plain_goal, **same)
    torch.testing.assert_close(gate, plain_gate, **same)
    torch.testing.assert_close(loss, expected_loss, **same)
    torch.testing.assert_close(cosine, expected_cosine.detach(), **same)
    torch.testing.assert_close(bias, expected_bias, **same)
    assert goal.shape == (B, fields.get("goal_dim", D)) and bias.shape == (B, 1, D)
    assert not cosine.requires_grad
    for name, parameter in head.named_parameters():
        assert w[name].grad is not None and w[name].grad.abs().max() > 1e-3
        torch.testing.assert_close(parameter.grad, w[name].grad, **same)
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, plain.grad, **same)


def test_goals_have_the_length_asked_for_and_gates_the_stated_limits():
    head = make(goal_scale=2.5)
    goal, gate = head(states())
    torch.testing.assert_close(goal.norm(dim=-1), torch.full((B,), 2.5, dtype=torch.float64))
    assert (gate > 0).all() and (gate < 1).all() and gate.std() > 0.01
    ones = make(gating=False)(states())[1]
    assert torch.equal(ones, torch.ones(B, dtype=torch.float64))


@pytest.mark.parametrize("fields", [{}, {"gating": False}], ids=str)
def test_parameters_names_and_initial_values(fields):
    head = make(torch.float32, goal_dim=8, **fields)
    head.reset_parameters(generator())
    named = dict(head.named_parameters())
    gates = {"gate_proj.weight": (1, D), "gate_proj.bias": (1,)} if not fields else {}
    goals = {"goal_proj.weight": (8, D), "goal_proj.bias": (8,)}
    assert {name: p.shape for name, p in named.items()} == {**goals, **gates, "input_proj.weight": (D, 8)}
    assert set(head.wide) == {*goals, *gates}
    for name, parameter in named.items():
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            # Truncated at two deviations of the normal that the cut leaves 1 / sqrt(fan_in) of.
            limit = 2 / 0.87962566 / parameter.shape[1] ** 0.5
            assert 0.5 * limit < parameter.abs().max() <= limit + 1e-6
    again = make(torch.float32, goal_dim=8, **fields)
    again.reset_parameters(generator())
    assert all(torch.equal(p, named[name]) for name, p in again.named_parameters())


def test_narrow_states_are_widened_once_and_the_bias_is_in_the_states_dtype():
    """Goal, gate and loss of bfloat16 states to 1e-6 of those of the same values in float64."""
    head, exact = make(torch.float32), make()
    exact.load_state_dict({name: value.double() for name, value in head.state_dict().items()})
    z_H, z_L = states(1, torch.bfloat16), states(2, torch.bfloat16)
    goal, gate = head(z_H)
    expected_goal, expected_gate = exact(z_H.double())
    loss, cosine = feudal_loss(z_L, goal, gate)
    expected_loss, expected_cosine = feudal_loss(z_L.double(), expected_goal, expected_gate)
    for value, expected in (
        (goal, expected_goal),
        (gate, expected_gate),
        (loss, expected_loss),
        (cosine, expected_cosine),
    ):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    bias = head.bias(goal, gate, torch.bfloat16)
    assert bias.dtype == torch.bfloat16 and bias.shape == (B, 1, D)
    expected_bias = exact.bias(expected_goal, expected_gate, torch.float64)
    torch.testing.assert_close(bias.double(), expected_bias, rtol=2e-2, atol=5e-3)


def test_a_fresh_sequence_has_no_goal_and_gives_no_nan():
    """Cosine 0, so the loss is the gate; the bias nothing; every gradient finite."""
    head = make()
    z_L = states(1).requires_grad_()
    goal = torch.zeros(B, D, dtype=torch.float64, requires_grad=True)
    gate = torch.linspace(0, 1, B, dtype=torch.float64).requires_grad_()
    loss, cosine = feudal_loss(z_L, goal, gate)
    bias = head.bias(goal, gate, torch.float64)
    (loss.sum() + bias.sum()).backward()
    assert torch.equal(cosine, torch.zeros(B, dtype=torch.float64)) and torch.equal(loss, gate)
    assert not bias.any()
    assert gate.grad is not None and torch.equal(gate.grad, torch.ones_like(gate))
    assert z_L.grad is not None and not z_L.grad.any()
    assert goal.grad is not None and goal.grad.isfinite().all()


def test_states_without_a_mean_and_a_manager_of_zero():
    head = make()
    with torch.no_grad():
        assert head.goal_proj.bias is not None
        head.goal_proj.bias.zero_()
    z_H = torch.zeros(B, T, D, dtype=torch.float64, requires_grad=True)
    z_L = torch.zeros(B, T, D, dtype=torch.float64, requires_grad=True)
    goal, gate = head(z_H)
    loss, cosine = feudal_loss(z_L, goal, gate)
    loss.sum().backward()
    assert not goal.any() and not cosine.any() and torch.equal(loss, gate)
    for gradient in (z_H.grad, z_L.grad, *(head.goal_proj.weight.grad, head.goal_proj.bias.grad)):
        assert gradient is not None and gradient.isfinite().all()


def test_vectors_below_the_minimum_norm_are_not_normalised():
    """Below 1e-6 a goal, or the mean state, is divided by that in place of its length."""
    goal = torch.zeros(3, D, dtype=torch.float64)
    goal[:, 0] = torch.tensor([1e-5, 1e-7, 1.0])
    z_L = torch.zeros(3, T, D, dtype=torch.float64)
    z_L[..., 0] = torch.tensor([3.0, 3.0, 3e-7])[:, None]
    loss, cosine = feudal_loss(z_L, goal, torch.ones(3, dtype=torch.float64))
    expected = torch.tensor([1.0, 0.1, 0.3], dtype=torch.float64)
    torch.testing.assert_close(cosine, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, 1 - expected, rtol=1e-6, atol=1e-12)


def test_no_direction_but_the_goals_own_counts():
    """Loss 0 for a worker along its goal however short, the gate across it, twice the gate against it."""
    goal = torch.zeros(3, 4)
    goal[:, 0] = 5
    z_L = torch.zeros(3, T, D)
    z_L[0, :, 0], z_L[1, :, 1], z_L[2, :, 0] = 0.3, 2, -7
    # Beyond the goal's width nothing is compared; deviations from the mean do not count either.
    z_L[..., 4:] = 9
    z_L[:, 0, 2], z_L[:, 1, 2] = 1, -1
    loss, cosine = feudal_loss(z_L, goal, torch.full((3,), 0.5))
    torch.testing.assert_close(cosine, torch.tensor([1.0, 0.0, -1.0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.5, 1.0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("period", "expected"),
    [
        (1, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (2, [1, 2, 4, 6, 8]),
        (4, [1, 4, 8]),
        (20, [1]),
    ],
)
def test_when_goals_are_refreshed(period, expected):
    steps = torch.arange(1, 10, dtype=torch.int32)
    found = refreshes(steps, period)
    assert found.dtype == torch.bool and steps[found].tolist() == expected


def step_loss(head: SubgoalHead, z_H: Tensor, z_L: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """The loss (B,) of a step as it is taken: refreshed goals with gradient, carried ones without."""
    carried_goal, carried_gate = (value.detach() for value in head(states(9)))
    new_goal, new_gate = head(z_H)
    renewed = refreshes(steps, 4)
    goal = torch.where(renewed[:, None], new_goal, carried_goal)
    return feudal_loss(z_L, goal, torch.where(renewed, new_gate, carried_gate))[0], renewed


def test_the_head_learns_only_from_refreshed_sequences():
    head, z_L = make(), states(2).requires_grad_()
    z_H = states(1).requires_grad_()
    steps = torch.tensor([1, 2, 3, 4, 5, 8], dtype=torch.int32)
    loss, renewed = step_loss(head, z_H, z_L, steps)
    assert renewed.tolist() == [True, False, False, True, False, True]
    taught = [head.get_parameter(name) for name in head.wide]
    for row, is_new in enumerate(renewed.tolist()):
        gradients = torch.autograd.grad(loss[row], [*taught, z_H, z_L], retain_graph=True)
        for gradient in gradients[:-1]:
            assert (gradient.abs().max() > 1e-4) == is_new, row
        manager, others = gradients[-2][row, 0], gradients[-2][row, 1:]
        assert bool(manager.any()) == is_new and not others.any()
        # L learns to follow in every step.
        assert gradients[-1][row].any()
        assert not gradients[-1][torch.arange(B) != row].any()


@pytest.mark.parametrize("gating", [False, True])
def test_descending_the_loss_aligns_goal_and_worker_or_closes_the_gate(gating):
    head, z_H, z_L = make(gating=gating), states(1), states(2)
    first = torch.ones(B, dtype=torch.int32)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    with torch.no_grad():
        gate_before, before = head(z_H)[1], feudal_loss(z_L, *head(z_H))[1]
    for _ in range(200):
        optimizer.zero_grad()
        step_loss(head, z_H, z_L, first)[0].sum().backward()
        optimizer.step()
    gate, cosine = head(z_H)[1], feudal_loss(z_L, *head(z_H))[1]
    assert before.mean() < 0
    if gating:
        assert cosine.mean() > before.mean() and (gate < 0.3 * gate_before).all()
    else:
        assert (cosine > 0.99).all()


def test_a_goal_as_wide_as_the_states_is_the_default():
    arch = ArchConfig(hidden_size=D, num_heads=2)
    assert SubgoalHead(arch).goal_proj.weight.shape == (D, D)
    narrow = dataclasses.replace(arch, subgoal_head=SubgoalConfig(goal_dim=3))
    assert SubgoalHead(narrow).input_proj.weight.shape == (D, 3)
