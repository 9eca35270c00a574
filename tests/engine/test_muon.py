"""Muon on flat parameters: against a straight line, torch.optim.Muon, other ranks, and an interruption."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hrm.distributed import World
from hrm.engine.engine import Engine
from hrm.engine.muon import Muon
from hrm.engine.optim import FlatParameters
from hrm.engine.step_program import in_stacks
from kernels.muon import orthogonalize
from tests.support.engines import METADATA, all_state, assert_same_state, batches, make_config, make_engine

LR, MU, STEPS, DECAY = 0.02, 0.6, 3, 5e-3
ADAM = {"beta1": 0.9, "beta2": 0.95, "weight_decay": 1.0}


def straight_line(w: Tensor, g: Tensor, m: Tensor, parts: int) -> None:
    """One update in place, each matrix by itself."""
    m.copy_(MU * m + (1 - MU) * g)
    u = (1 - MU) * g + MU * m
    for weight, update in zip(w.chunk(parts), u.chunk(parts), strict=True):
        x = update / update.square().sum().sqrt()
        for _ in range(STEPS):
            x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
        rows, columns = weight.shape
        weight.mul_(1 - LR * DECAY).sub_(LR * max(1, rows / columns) ** 0.5 * x)


class Example:
    """A model's flat parameters with Muon, and gradients that depend on the step alone."""

    def __init__(self, dtype: torch.dtype = torch.float64, world: Any = None, **arch: Any) -> None:
        self.module = Engine(make_config(arch), METADATA, total_steps=1).model.to(dtype)
        shapes = {name: p.shape for name, p in self.module.named_parameters()}
        self.parts = in_stacks(self.module.matrices(), shapes)
        # The engine's buffers share these weights.
        for parameter in self.module.parameters():
            parameter.data = parameter.detach().clone()
        self.flat = FlatParameters(self.module, first=[*self.parts])
        self.optimizer = Muon(
            self.flat,
            self.parts,
            lr=torch.tensor(LR, dtype=dtype),
            momentum=MU,
            steps=STEPS,
            weight_decay=DECAY,
            world=world or World(),
            adam=ADAM,
        )

    def propose(self, t: int, skip: Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(t)
        for view in self.flat.views(self.flat.grad).values():
            view.copy_(torch.randn(view.shape, generator=generator))
        self.optimizer.propose(skip)

    def step(self, t: int, skip: Tensor | None = None) -> None:
        self.propose(t, skip)
        self.optimizer.step(self.optimizer.lr * 0.1, skip)


@pytest.mark.parametrize("arch", [{}, {"mlp_t": True, "use_gating": False, "share_levels": True}])
def test_every_parameter_follows_the_formulas(arch):
    example = Example(**arch)
    assert example.parts and all(name.endswith("_proj.weight") for name in example.parts)
    views = example.flat.views(example.flat.data)
    expected = {name: view.clone() for name, view in views.items()}
    momenta = {name: torch.zeros_like(expected[name]) for name in example.parts}
    others = [name for name in views if name not in example.parts]
    adamw = torch.optim.AdamW(
        [expected[name].requires_grad_() for name in others], lr=0.1 * LR, betas=(0.9, 0.95), weight_decay=1.0
    )
    assert {"embed_tokens.embedding_weight", "lm_head.weight", "q_head.bias"} < {*others}
    for t in range(3):
        example.step(t)
        grads = example.flat.views(example.flat.grad)
        for name, number in example.parts.items():
            straight_line(expected[name], grads[name], momenta[name], number)
        for name in others:
            expected[name].grad = grads[name].clone()
        adamw.step()
    for name, view in views.items():
        torch.testing.assert_close(view, expected[name].detach(), rtol=1e-9, atol=1e-9, msg=name)


def test_matrices_are_those_of_the_blocks_and_heads_are_apart():
    example, heads = Example(use_gating=True), make_config().arch.num_heads
    assert {name.split(".")[-2] for name in example.parts} == {
        "qkv_proj", "o_proj", "gate_up_proj", "down_proj"
    }  # fmt: skip
    for name, number in example.parts.items():
        assert number == (3 * heads if "qkv" in name else 1)
    shapes = [stack.of(example.flat.data).shape[1:] for stack in example.optimizer.stacks]
    assert len({*shapes}) == len(shapes) == 4


def test_the_update_agrees_with_pytorch():
    """Its products are in bfloat16, with norms rounded to it: a relative deviation of some percent."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((24, 40), (40, 24)):
        weight = torch.nn.Parameter(torch.randn(rows, columns, generator=generator))
        weight.grad = torch.randn(rows, columns, generator=generator)
        before = weight.detach().clone()
        torch.optim.Muon([weight], lr=LR, momentum=MU, ns_steps=STEPS, weight_decay=DECAY).step()
        expected = before * (1 - LR * DECAY) - weight.detach()
        update = torch.lerp(weight.grad, (1 - MU) * weight.grad, MU)
        x = orthogonalize(update.bfloat16()[None], STEPS)[0].float()
        ours = LR * max(1, rows / columns) ** 0.5 * x
        assert (ours - expected).norm() / expected.norm() < 0.02
        # Nearly orthogonal: singular values around 1.
        values = torch.linalg.svdvals(x)
        assert values[-1] > 0.3 and values[0] < 1.3


@pytest.mark.parametrize("ranks", [2, 5])
def test_ranks_share_the_matrices_and_stay_equal(ranks):
    alone = Example(torch.float32)

    def world(rank: int) -> Any:
        return SimpleNamespace(rank=rank, size=ranks)

    group = [Example(torch.float32, world(rank)) for rank in range(ranks)]
    for t in range(3):
        alone.step(t)
        for member in group:
            member.propose(t)
        totals = sum(member.optimizer.update for member in group)
        owners = sum((member.optimizer.update != 0).int() for member in group)
        assert owners.max() == 1
        for member in group:
            member.optimizer.update.copy_(totals)
            member.optimizer.step(member.optimizer.lr * 0.1)
    for member in group:
        assert torch.equal(member.flat.data, group[0].flat.data)
        torch.testing.assert_close(member.flat.data, alone.flat.data, rtol=1e-6, atol=1e-7)


def test_a_skipped_update_changes_no_bit():
    example = Example(torch.float32)
    example.step(0)
    before = {"data": example.flat.data, "count": example.optimizer.count, **example.optimizer.buffers()}
    before = {name: tensor.clone() for name, tensor in before.items()}
    example.step(1, torch.tensor(True))
    after = {"data": example.flat.data, "count": example.optimizer.count, **example.optimizer.buffers()}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_interrupted_run_continues_bit_for_bit():
    config = make_config(optimizer="muon", lr_min_ratio=0.1, ema=True, ema_start=3)
    source = batches()
    given = [next(source) for _ in range(6)]
    whole, first, second = make_engine(config), make_engine(config), make_engine(config)
    for batch in given:
        whole.train_step(batch)
    for batch in given[:3]:
        first.train_step(batch)
    second.load_weights(first.weights())
    second.load_training_state(first.training_state())
    for batch in given[3:]:
        second.train_step(batch)
    assert any(name.startswith("momentum.") for name in all_state(whole))
    assert_same_state(second, whole)
    assert whole.pop().metrics["muon_lr"] == pytest.approx(whole.learning_rate(0.02))
