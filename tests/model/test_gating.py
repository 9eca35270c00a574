"""Gate networks against `straight_gating.py`, their losses and statistics against formulas written out."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hrm.config.schema import ArchConfig
from hrm.model.gating import (
    GATING_TYPES,
    GatingNetwork,
    entropy_loss,
    gate_loss_scale,
    gate_statistics,
    initial_biases,
    make_gating,
    mix,
    pack,
    saturation_loss,
    sources_of,
    stability_loss,
)
from tests.support.straight_gating import gated_sum, gates_of

B, T, D = 2, 3, 16
EXACT = {"rtol": 1e-9, "atol": 1e-12}
KINDS = sorted(GATING_TYPES)


def make(kind: Any, **changes) -> GatingNetwork:
    return make_gating(ArchConfig(hidden_size=D, use_gating=True, gating_type=kind, **changes))


def network(kind: str) -> GatingNetwork:
    """In float64, with every weight random and none zero, so that no term hides behind a zero."""
    gating = make(kind).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in gating.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    return gating


def states(n: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, D, generator=generator, dtype=torch.float64) for _ in range(n)]


def three(sources: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """The sources as arguments, None for an absent input."""
    return sources[0], sources[1], sources[2] if len(sources) == 3 else None


def random_gates(seed: int, width: int = 5) -> list[tuple[Tensor, ...]]:
    """Gates of L and of H, two sequences of three tokens, that can be differentiated."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(5, B, T, width, generator=generator, dtype=torch.float64)
    leaves = [value.requires_grad_() for value in values]
    return [tuple(leaves[:3]), tuple(leaves[3:])]


# ------------------------------------------------------------------------------------ the gate networks


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_equal_those_of_the_specification(kind, n):
    """The gated sum, and the gradients of all sources, now and at the H-cycle's start, and all weights."""
    gating = network(kind)
    dy = states(1, seed=3)[0]
    results = []
    for straight in (False, True):
        sources, start = ([s.requires_grad_() for s in states(n, seed)] for seed in (1, 2))
        gating.zero_grad()
        if straight:
            w = dict(gating.named_parameters())
            gates = gates_of(kind, w, sources, start)
            y = gated_sum(gates, sources)
        else:
            gating_start = gating.hold(*three(start))
            gates = gating.gates(*three(sources), gating_start)
            y = gating(*three(sources), gating_start)
        (y * dy).sum().backward()
        gradients = {name: p.grad for name, p in gating.named_parameters()}
        gradients |= {f"source {i}": s.grad for i, s in enumerate(sources)}
        if kind == "hierarchical":
            gradients |= {f"start {i}": s.grad for i, s in enumerate(start)}
        results.append((y, list(gates), gradients))
    (y, gates, gradients), (expected_y, expected_gates, expected) = results
    assert len(gates) == n
    assert_close(gates, expected_gates, **EXACT)
    assert_close(y, expected_y, **EXACT)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.any(), name
        assert_close(gradient, expected[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_gates_are_those_that_forward_uses(kind, n):
    gating = network(kind)
    arguments = (*three(states(n, seed=1)), gating.hold(*three(states(n, seed=2))))
    gates = gating.gates(*arguments)
    assert [g.shape for g in gates] == n * [(B, T, 1 if kind == "attention" else D)]
    assert torch.equal(mix(gates, sources_of(*arguments[:3])), gating(*arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_an_absent_input_leaves_its_weights_without_gradient(kind):
    gating = network(kind)
    gating(*three(states(2, seed=1))).sum().backward()
    grads = {name: p.grad for name, p in gating.named_parameters()}
    if kind == "attention":
        assert not grads["out_proj.weight"][2].any() and not grads["out_proj.bias"][2]
    else:
        assert not grads["gate_proj.0.weight"][:, 2 * D :].any()
        assert not grads["gate_proj.2.weight"][2 * D :].any() and not grads["gate_proj.2.bias"][2 * D :].any()
    if kind == "hierarchical":
        combine = grads["combine.weight"]
        assert not combine[2].any() and not combine[:, [2, 5]].any() and not grads["combine.bias"][2]
        assert combine[:2][:, [0, 1, 3, 4]].all()


@pytest.mark.parametrize("n", [2, 3])
def test_slow_gates_are_held_and_by_default_taken_now(n):
    gating = network("hierarchical")
    now, start = states(n, seed=1), states(n, seed=2)
    held = gating.hold(*three(start))
    assert held.shape == (B, T, n * D)
    assert torch.equal(gating(*three(now)), gating(*three(now), gating.hold(*three(now))))
    assert not torch.allclose(gating(*three(now)), gating(*three(now), held))
    # With the fast part of combine at zero the gates no longer see the states of now.
    with torch.no_grad():
        gating.combine.weight[:, :3] = 0
    others = gating.gates(*three(states(n, seed=4)), held)
    assert_close(gating.gates(*three(now), held), others, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["standard", "attention"])
def test_other_types_hold_nothing(kind):
    assert network(kind).hold(*three(states(3, seed=1))) is None


@pytest.mark.parametrize(
    ("changes", "biases"),
    [
        ({}, (-2.2, -2.2, -2.2)),
        ({"gate_init_bias": -1.5}, (-1.5, -1.5, -1.5)),
        ({"gate_init_strategy": "balanced"}, (-2.2, -2.2, -2.2)),
        ({"gate_init_strategy": "input_focused"}, (-3.0, -3.0, -1.0)),
        ({"gate_init_strategy": "hierarchy_focused"}, (-1.0, -1.0, -3.0)),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_gates_start_at_the_biases_of_their_strategy(kind, changes, biases):
    gating = make(kind, **changes).double()
    gating.reset_parameters(torch.Generator().manual_seed(0))
    assert initial_biases(ArchConfig(**changes)) == biases
    # Of a state of nothing a gate network sees its biases alone.
    nothing = torch.zeros(1, 1, D, dtype=torch.float64)
    for n in (2, 3):
        for gate, bias in zip(gating.gates(*three(n * [nothing])), biases[:n], strict=True):
            # The biases are float32.
            assert_close(gate, torch.full_like(gate, 1 / (1 + math.exp(-bias))), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_names_shapes_and_first_weights(kind):
    gating = make(kind)
    gating.reset_parameters(torch.Generator().manual_seed(0))
    weights, R = gating.state_dict(), D // 4
    mlp = {"0.weight": (R, 3 * D), "0.bias": (R,), "2.weight": (3 * D, R), "2.bias": (3 * D,)}
    expected = {
        "standard": {f"gate_proj.{name}": shape for name, shape in mlp.items()},
        "attention": {
            "q_proj.weight": (R, D),
            "kv_proj.weight": (2 * R, D),
            "out_proj.weight": (3, R),
            "out_proj.bias": (3,),
        },
        "hierarchical": {f"{net}_proj.{name}": mlp[name] for net in ("gate", "slow") for name in mlp}
        | {"combine.weight": (3, 6), "combine.bias": (3,)},
    }
    assert {name: tuple(t.shape) for name, t in weights.items()} == expected[kind]
    for name, weight in weights.items():
        if name == "combine.weight":
            assert weight.tolist() == [[0.5 * (i == j % 3) for j in range(6)] for i in range(3)]
        elif name.endswith("weight"):
            assert 0.5 < weight.std() * weight.shape[1] ** 0.5 < 1.5, name
        elif name in ("gate_proj.0.bias", "slow_proj.0.bias", "combine.bias"):
            assert not weight.any(), name


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_states_give_bfloat16_close_to_float64(kind, n):
    gating = network(kind).float()
    sources = [s.bfloat16() for s in states(n, seed=1)]
    y, gates = gating(*three(sources)), gating.gates(*three(sources))
    assert y.dtype == torch.bfloat16 and {g.dtype for g in gates} == {torch.bfloat16}
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in gating.parameters())
    exact = network(kind)(*three([s.double() for s in sources]))
    error = (y.double() - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.01


@pytest.mark.slow
def test_compiled_gates_equal_eager_ones():
    """The types with plain forwards: one with the input and held gates, one without, in one graph."""
    attention, hierarchical = gatings = [network(kind) for kind in ("attention", "hierarchical")]
    (z, o, x), start = states(3, seed=1), states(3, seed=2)

    def mixed(z: Tensor, o: Tensor, x: Tensor, start: list[Tensor]) -> Tensor:
        return attention(z, o, None) * hierarchical(z, o, x, hierarchical.hold(*three(start)))

    results = []
    for function in (mixed, torch.compile(mixed, fullgraph=True)):
        for gating in gatings:
            gating.zero_grad()
        y = function(z, o, x, start)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for gating in gatings for p in gating.parameters())])
    assert_close(results[1], results[0], **EXACT)


# ------------------------------------------------------------------------------------------- the losses


def numbers(gates: tuple[Tensor, ...], b: int) -> list[list[float]]:
    """The gates of one sequence as a row of numbers for each source."""
    return [gate[b].flatten().tolist() for gate in gates]


def test_saturation_loss_and_its_gradient():
    gates = random_gates(seed=1)
    loss = saturation_loss(gates)
    for b in range(B):
        L, H = ([(2 * g - 1) ** 2 for row in numbers(module, b) for g in row] for module in gates)
        assert loss[b].item() == pytest.approx((sum(L) / len(L) + sum(H) / len(H)) / 2, rel=1e-12)
    loss.sum().backward()
    for module in gates:
        for gate in module:
            share = 2 * len(module) * T * gate.shape[-1]
            assert_close(gate.grad, 4 * (2 * gate.detach() - 1) / share, **EXACT)


def test_saturation_loss_at_the_edges_and_in_the_middle():
    def constant(value: float) -> list[tuple[Tensor, ...]]:
        return [(torch.full((B, T, 4), value),) * 3, (torch.full((B, T, 4), value),) * 2]

    for value, expected in ((0.0, 1.0), (1.0, 1.0), (0.5, 0.0), (0.25, 0.25)):
        assert saturation_loss(constant(value)).tolist() == [expected] * B


@pytest.mark.parametrize("bias", [-4.0, 4.0])
def test_descent_on_the_saturation_loss_moves_gates_off_the_edge(bias):
    gating = make("standard", gate_init_bias=bias).double()
    gating.reset_parameters(torch.Generator().manual_seed(0))
    z, o, x = states(3, seed=1)
    # Small enough that no step goes too far: with 5 the tenth does.
    optimiser = torch.optim.SGD(gating.parameters(), lr=2.0)
    losses, distances = [], []
    for _ in range(12):
        gates = gating.gates(z, o, x)
        loss = saturation_loss([gates]).mean()
        losses.append(loss.item())
        distances.append((torch.stack(gates) - 0.5).abs().mean().item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[0] > 0.9 and losses[-1] < 0.8
    assert all(later < earlier for values in (losses, distances) for earlier, later in pairwise(values))


def test_entropy_loss_and_its_gradient():
    gates = random_gates(seed=2)
    loss = entropy_loss(gates)
    for b in range(B):
        of_modules = []
        for module in gates:
            terms = []
            for column in zip(*numbers(module, b), strict=True):
                p = [g / sum(column) for g in column]
                terms.append(1 + sum(q * math.log(q) for q in p) / math.log(len(p)))
            of_modules.append(sum(terms) / len(terms))
        assert loss[b].item() == pytest.approx(sum(of_modules) / 2, rel=1e-12)
    loss.sum().backward()
    for module in gates:
        n, total = len(module), sum(g.detach() for g in module)
        entropy = -sum(g.detach() / total * (g.detach() / total).log() for g in module)
        for gate in module:
            # dH / dg_i = -(log p_i + H) / sum(g)
            slope = ((gate.detach() / total).log() + entropy) / (total * math.log(n))
            assert_close(gate.grad, slope / (2 * T * gate.shape[-1]), **EXACT)


def test_entropy_loss_of_equal_gates_of_one_gate_and_of_none():
    def constant(*values: float) -> tuple[Tensor, ...]:
        return tuple(torch.full((B, T, 4), value, requires_grad=True) for value in values)

    assert_close(
        entropy_loss([constant(0.3, 0.3, 0.3), constant(0.9, 0.9)]), torch.zeros(B), rtol=0, atol=1e-6
    )
    # A gate alone: no entropy. None at all: as if all were alike. Both without a gradient that is no number.
    for values, expected in (((0.5, 0.0, 0.0), 1.0), ((0.0, 0.0, 0.0), 0.0)):
        gates = constant(*values)
        loss = entropy_loss([gates])
        assert_close(loss, torch.full((B,), expected), rtol=0, atol=1e-6)
        loss.sum().backward()
        assert all(gate.grad.isfinite().all() for gate in gates)


def test_stability_loss_and_its_gradient_but_not_of_fresh_sequences():
    gates, before = random_gates(seed=3), random_gates(seed=4)
    packed = pack(before)
    # What a fresh sequence's place holds is another's and must not be read.
    packed[1] = float("nan")
    loss = stability_loss(gates, packed, torch.tensor([False, True]))
    means = []
    for module, earlier in zip(gates, before, strict=True):
        pairs = zip(numbers(module, 0), numbers(earlier, 0), strict=True)
        squares = [(a - b) ** 2 for now, then in pairs for a, b in zip(now, then, strict=True)]
        means.append(sum(squares) / len(squares))
    assert loss.tolist() == [pytest.approx(sum(means) / 2, rel=1e-12), 0.0]
    loss.sum().backward()
    for module, earlier in zip(gates, before, strict=True):
        for now, then in zip(module, earlier, strict=True):
            share = 2 * len(module) * T * now.shape[-1]
            assert_close(now.grad[0], 2 * (now - then)[0].detach() / share, **EXACT)
            assert not now.grad[1].any()


@pytest.mark.parametrize("width", [1, 5])
def test_packed_gates_lie_in_order_without_gradient(width):
    gates = random_gates(seed=5, width=width)
    packed = pack(gates)
    assert packed.shape == (B, T, 5, width) and not packed.requires_grad
    assert all(torch.equal(packed[:, :, k], gate) for k, gate in enumerate((*gates[0], *gates[1])))


def test_losses_of_bfloat16_gates_are_taken_in_float32():
    gates = [tuple(gate.detach().bfloat16() for gate in module) for module in random_gates(seed=6, width=64)]
    exact = [tuple(gate.double() for gate in module) for module in gates]
    before, fresh = pack(gates).flip(2), torch.tensor([False, False])
    for narrow, wide in (
        (saturation_loss(gates), saturation_loss(exact)),
        (entropy_loss(gates), entropy_loss(exact)),
        (stability_loss(gates, before, fresh), stability_loss(exact, before.double(), fresh)),
    ):
        assert narrow.dtype == torch.float32
        assert_close(narrow.double(), wide, rtol=1e-5, atol=0)


def test_the_losses_scale_is_zero_in_warm_up_then_linear_to_one():
    assert [gate_loss_scale(step, 10, 4) for step in (0, 9, 10, 11, 13, 14, 1000)] == [
        0,
        0,
        0,
        0.25,
        0.75,
        1,
        1,
    ]
    assert [gate_loss_scale(step, 10, 0) for step in (0, 9, 10, 11)] == [0, 0, 1, 1]
    assert gate_loss_scale(0, 0, 0) == 1 and gate_loss_scale(1, 0, 2) == 0.5


# --------------------------------------------------------------------------------------- the statistics


@pytest.mark.parametrize("width", [1, 4])
def test_statistics_by_hand(width):
    """Two tokens of four channels; gates below 0.1, between and above 0.9; one channel of nothing."""
    rows = [[0.05, 0.5], [0.95, 0.2], [0.099, 0.901]]
    gates = tuple(torch.tensor(row, dtype=torch.float64).view(1, 2, 1).expand(1, 2, width) for row in rows)
    sources = [s[:1, :2, :4].clone() for s in states(3, seed=8)]
    for source in sources:
        source[0, 1, 2] = 0
    expected = []
    for i, row in enumerate(rows):
        shares = []
        for t in range(2):
            for c in range(4):
                parts = [abs(rows[j][t] * sources[j][0, t, c].item()) for j in range(3)]
                shares.append(parts[i] / sum(parts) if sum(parts) else 0.0)
        low, high = (sum(map(test, row)) / 2 for test in (lambda g: g < 0.1, lambda g: g > 0.9))
        expected.append([sum(row) / 2, abs(row[0] - row[1]) / 2, low, high, sum(shares) / 8])
    statistics = gate_statistics(tuple(gate.requires_grad_() for gate in gates), sources)
    assert statistics.dtype == torch.float32 and not statistics.requires_grad
    assert_close(statistics, torch.tensor(expected), rtol=1e-6, atol=0)
