"""Flat parameters, the optimisers on them, and the schedule."""

import math

import pytest
import torch
from torch import nn

from hrm.engine.optim import ALIGNMENT, Adam, FlatParameters, MovingAverage, learning_rate
from kernels import adamw, sign_sgd


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, bias=False))


def test_parameters_are_aligned_views_of_one_buffer():
    module, untouched = model(), model()
    flat = FlatParameters(module)
    for (name, parameter), expected in zip(module.named_parameters(), untouched.parameters(), strict=True):
        assert torch.equal(parameter, expected)
        assert parameter.untyped_storage().data_ptr() == flat.data.untyped_storage().data_ptr()
        assert parameter.storage_offset() % ALIGNMENT == 0
        assert torch.equal(parameter, flat.views(flat.data)[name])
    flat.data.zero_()
    assert not module(torch.randn(4, 3)).any()


@pytest.mark.parametrize("narrow", [None, torch.bfloat16])
def test_gradients_are_collected_in_one_buffer(narrow):
    module, untouched = model(), model()
    flat = FlatParameters(module, narrow, wide=["1.weight"])
    assert [leaf.dtype for leaf in flat.leaves] == [narrow or torch.float32] * 2 + [torch.float32]
    x = torch.randn(4, 3)
    grads = torch.autograd.grad(untouched(x).square().sum(), list(untouched.parameters()))
    # A gradient may come transposed.
    given = [grad.t().clone().t().to(leaf.dtype) for grad, leaf in zip(grads, flat.leaves, strict=True)]
    flat.grad.fill_(float("nan"))
    for adds, times in ((False, 1), (True, 2), (False, 1)):
        flat.collect(given, adds=adds)
        for view, grad in zip(flat.views(flat.grad).values(), given, strict=True):
            assert view.dtype == torch.float32 and torch.equal(view, times * grad.float())
    weight, bias, last = flat.views(flat.grad).values()
    flat.collect([None, None, given[2]], adds=True)
    assert torch.equal(weight, given[0].float()) and torch.equal(last, 2 * given[2])
    flat.collect([None, given[1], None])
    assert not weight.any() and not last.any() and torch.equal(bias, given[1].float())


def test_adam_atan2_updates_every_parameter_by_the_formula():
    module = model().double()
    flat = FlatParameters(module)
    optimizer = Adam(flat, beta1=0.8, beta2=0.9, weight_decay=0.5)
    lr = torch.tensor(0.1, dtype=torch.float64)
    for t in (1, 2, 3):
        before = [p.detach().clone() for p in module.parameters()]
        moments = {
            k: {n: v.clone() for n, v in optimizer.state_dict()[k].items()} for k in ("exp_avg", "exp_avg_sq")
        }
        loss = module(torch.ones(1, 3, dtype=torch.float64) * t).sum()
        grads = torch.autograd.grad(loss, flat.leaves)
        flat.collect(grads)
        optimizer.step(lr)
        for (name, parameter), grad, old in zip(module.named_parameters(), grads, before, strict=True):
            m = 0.8 * moments["exp_avg"][name] + 0.2 * grad
            v = 0.9 * moments["exp_avg_sq"][name] + 0.1 * grad**2
            angle = torch.atan2(m, v.sqrt() / math.sqrt(1 - 0.9**t))
            torch.testing.assert_close(
                parameter.detach(), old * (1 - 0.05) - 0.1 / (1 - 0.8**t) * angle, rtol=1e-12, atol=1e-12
            )


def test_adamw_agrees_with_pytorch():
    module, theirs = model().double(), model().double()
    flat = FlatParameters(module)
    optimizer = Adam(flat, beta1=0.8, beta2=0.9, weight_decay=0.5, update=adamw)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.1, betas=(0.8, 0.9), weight_decay=0.5)
    for t in range(3):
        for leaf, parameter in zip(flat.views(flat.grad).values(), theirs.parameters(), strict=True):
            parameter.grad = torch.sin(parameter.detach() * 5 + t)
            leaf.copy_(parameter.grad)
        optimizer.step(torch.tensor(0.1, dtype=torch.float64))
        reference.step()
    for parameter, expected in zip(module.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-12, atol=1e-12)


def test_optimizer_state_survives_a_round_trip():
    runs = []
    for interrupted in (False, True):
        module = model()
        optimizer = Adam(FlatParameters(module), beta1=0.9, beta2=0.95, weight_decay=0.1)
        for t in range(6):
            if interrupted and t == 3:
                weights = {n: p.detach().clone() for n, p in module.named_parameters()}
                state = optimizer.state_dict()
                module = model()
                optimizer = Adam(FlatParameters(module), beta1=0.9, beta2=0.95, weight_decay=0.1)
                module.load_state_dict(weights)
                optimizer.load_state_dict(state)
            loss = module(torch.full((1, 3), float(t))).sum()
            optimizer.parameters.collect(torch.autograd.grad(loss, optimizer.parameters.leaves))
            optimizer.step(torch.tensor(1e-2))
        runs.append(optimizer.parameters.data)
    assert torch.equal(*runs)


@pytest.mark.parametrize("narrow", [None, torch.bfloat16])
def test_skipped_updates_have_no_effect(narrow):
    """Parameters, copies, moments, count and average; and updates that are not are as without a flag."""
    runs = []
    for spoilt in (False, True):
        module = model()
        flat = FlatParameters(module, narrow)
        optimizer = Adam(flat, beta1=0.9, beta2=0.95, weight_decay=0.1)
        average = MovingAverage(flat, 0.75)
        for t in range(6):
            if spoilt and t in (0, 3, 4):
                flat.grad.fill_(float("nan"))
                optimizer.step(torch.tensor(1e-2), torch.tensor(True))
                average.update(torch.tensor(True))
            flat.grad.copy_(torch.linspace(-1, 1, len(flat.grad)) * math.cos(t))
            skip = torch.tensor(False) if spoilt else None
            optimizer.step(torch.tensor(1e-2), skip)
            average.update(skip)
        assert optimizer.count == 6 and not torch.equal(average.data, flat.data)
        copies = [] if flat.copy is None else [flat.copy]
        runs.append([flat.data, optimizer.exp_avg, optimizer.exp_avg_sq, average.data, *copies])
    assert len(runs[0]) == 4 + (narrow is not None)
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_an_average_equals_the_weights_until_it_starts():
    flat = FlatParameters(model())
    average, count = MovingAverage(flat, 0.75, start=2), torch.tensor(0)
    for step in range(1, 5):
        before = average.data.clone()
        flat.data.add_(1)
        count += 1
        average.update(torch.tensor(False), count)
        assert torch.equal(average.data, flat.data if step <= 2 else before.lerp(flat.data, 0.25))


def test_a_round_trip_of_an_average_is_exact_in_either_precision():
    for dtype in (torch.float32, torch.float64):
        flat = FlatParameters(model().to(dtype))
        average = MovingAverage(flat, 0.999)
        flat.data.add_(1)
        before = average.data.clone()
        average.update(torch.tensor(True))
        assert torch.equal(average.data, before)
        average.update(torch.tensor(False))
        assert torch.equal(average.data, before.lerp(flat.data, 1 - 0.999))


@pytest.mark.parametrize("seed", range(5))
def test_sign_sgd_moves_each_touched_row_once_by_the_sign_of_its_sum(seed):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(20, 6, generator=generator)
    identifiers = torch.randint(0, 8, (16,), generator=generator, dtype=torch.int32)
    grad = torch.randn(16, 6, generator=generator)
    expected = table.clone()
    for row in set(identifiers.tolist()):
        total = sum(g for i, g in zip(identifiers.tolist(), grad, strict=True) if i == row)
        expected[row] = table[row] * (1 - 0.01 * 0.5) - 0.01 * torch.sign(total)
    untouched = sorted(set(range(20)) - set(identifiers.tolist()))
    before = table[untouched].clone()
    sign_sgd(table, identifiers, grad, torch.tensor(0.01), 0.5)
    torch.testing.assert_close(table, expected)
    assert len(untouched) >= 12 and torch.equal(table[untouched], before)


def test_opposite_gradients_of_one_identifier_cancel():
    table = torch.ones(2, 3)
    sign_sgd(table, torch.tensor([1, 1]), torch.tensor([[1.0], [-1.0]]).expand(2, 3), torch.tensor(0.1), 0.0)
    assert torch.equal(table, torch.ones(2, 3))


def test_a_million_rows_need_only_the_tables_memory():
    """Nothing of the table's length is allocated: only a batch's rows are."""
    table = torch.zeros(1_000_000, 8)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        sign_sgd(table, torch.arange(64) * 15_000, torch.ones(64, 8), torch.tensor(0.1), 0.0)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert 0 < allocated < 200_000
    assert table.sum().item() == pytest.approx(-0.1 * 64 * 8)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(1, 0.1), (5, 0.5), (10, 1.0), (20, 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4))), (50, 0.2)],
)
def test_schedule_warms_up_then_follows_a_cosine(step, expected):
    lr = learning_rate(step, base_lr=1.0, warmup_steps=10, total_steps=50, min_ratio=0.2)
    assert lr == pytest.approx(expected, rel=1e-12)


def test_schedule_of_ratio_one_is_constant_after_warm_up():
    rates = [
        learning_rate(t, base_lr=3e-4, warmup_steps=4, total_steps=20, min_ratio=1.0) for t in range(1, 21)
    ]
    assert rates == pytest.approx([3e-4 * min(t / 4, 1) for t in range(1, 21)], rel=1e-12)
    assert learning_rate(1, base_lr=1.0, warmup_steps=0, total_steps=1, min_ratio=1.0) == 1.0
