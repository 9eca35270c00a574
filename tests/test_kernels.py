"""Each public operation against its definition, written out independently."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels.rope import rope_tables
from kernels.stablemax import log_s


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    ).to(dtype)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------- rope


def rotate_pairs(x: Tensor, theta: float) -> Tensor:
    """Rotation of the pairs (i, i + d/2) of a vector at position t by the angle t * theta^(-2i/d)."""
    out = torch.empty_like(x)
    _, T, _, d = x.shape
    for t in range(T):
        for i in range(d // 2):
            angle = t * theta ** (-2 * i / d)
            a, b = x[:, t, :, i], x[:, t, :, i + d // 2]
            out[:, t, :, i] = a * math.cos(angle) - b * math.sin(angle)
            out[:, t, :, i + d // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


@pytest.mark.parametrize(("T", "d", "theta"), [(1, 2, 10000.0), (17, 6, 10000.0), (9, 16, 500.0)])
def test_rope_rotates_each_pair_by_its_angle(T, d, theta):
    x = randn(2, T, 3, d, seed=0)
    cos, sin = rope_tables(T, d, theta, torch.float64)
    assert_close(kernels.rope(x, cos, sin), rotate_pairs(x, theta))


def test_rope_backward_is_the_inverse_rotation():
    x, dy = randn(2, 5, 3, 8, seed=0).requires_grad_(), randn(2, 5, 3, 8, seed=1)
    cos, sin = rope_tables(5, 8, dtype=torch.float64)
    kernels.rope(x, cos, sin).backward(dy)
    assert_close(x.grad, kernels.rope(dy, cos, -sin))


def test_rope_computes_in_float32_for_bfloat16():
    x = randn(2, 17, 3, 8, seed=0, dtype=torch.bfloat16)
    cos, sin = rope_tables(17, 8)
    y = kernels.rope(x, cos, sin)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, kernels.rope(x.float(), cos, sin).bfloat16())


# -------------------------------------------------------------------------------------------- attention


def plain_attention(qkv: Tensor, heads: int, theta: float | None) -> Tensor:
    D = qkv.shape[-1] // 3
    d = D // heads
    parts = []
    for h in range(heads):
        q, k, v = (qkv[:, :, i * D + h * d : i * D + (h + 1) * d] for i in range(3))
        if theta is not None:
            q, k = (rotate_pairs(x[:, :, None], theta)[:, :, 0] for x in (q, k))
        scores = (q[:, :, None, :] * k[:, None, :, :]).sum(-1) / math.sqrt(d)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        parts.append((weights[..., None] * v[:, None]).sum(2))
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize(("T", "heads", "d"), [(1, 1, 2), (17, 2, 4), (10, 3, 6)])
@pytest.mark.parametrize("rotated", [True, False])
def test_attention_and_its_gradient(T, heads, d, rotated):
    qkv, dy = randn(2, T, 3 * heads * d, seed=0), randn(2, T, heads * d, seed=1)
    tables = rope_tables(T, d, dtype=torch.float64) if rotated else (None, None)
    ours, plain = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    y = kernels.attention(ours, heads, *tables)
    expected = plain_attention(plain, heads, 10000.0 if rotated else None)
    assert_close(y, expected)
    y.backward(dy)
    expected.backward(dy)
    assert_close(ours.grad, plain.grad)


def test_attention_of_the_first_queries_is_a_part_of_the_whole():
    qkv, tables = randn(2, 17, 24, seed=0), rope_tables(17, 4, dtype=torch.float64)
    whole = kernels.attention(qkv, 2, *tables)
    assert_close(kernels.attention(qkv, 2, *tables, queries=1), whole[:, :1])
    assert_close(kernels.attention(qkv, 2, *tables, queries=5), whole[:, :5])


def test_attention_on_a_cpu_rounds_a_bfloat16_result_once():
    qkv = randn(2, 17, 24, seed=0, dtype=torch.bfloat16)
    y = kernels.attention(qkv, 2)
    assert y.dtype == torch.bfloat16 and torch.equal(y, kernels.attention(qkv.float(), 2).bfloat16())


# --------------------------------------------------------------------------------------- norm and swiglu


@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 17, 96), (3, 64)])
def test_rms_norm_and_the_gradient_of_its_docstring(shape):
    x, r, dy = randn(*shape, seed=0), randn(*shape, seed=1), randn(*shape, seed=2)
    x.requires_grad_()
    r.requires_grad_()
    y = kernels.rms_norm(x, r, 1e-5)
    h = (x + r).detach()
    rstd = 1 / (h.pow(2).sum(-1, keepdim=True) / shape[-1] + 1e-5).sqrt()
    assert_close(y, h * rstd)
    y.backward(dy)
    expected = rstd * (dy - h * rstd**2 * (h * dy).sum(-1, keepdim=True) / shape[-1])
    assert_close(x.grad, expected)
    assert_close(r.grad, expected)


def test_rms_norm_rounds_a_bfloat16_result_once():
    x, r = (randn(4, 64, seed=s, dtype=torch.bfloat16) for s in (0, 1))
    assert torch.equal(kernels.rms_norm(x, r), kernels.rms_norm(x.float(), r.float()).bfloat16())


def test_swiglu_and_the_gradient_of_its_docstring():
    packed, dy = randn(3, 5, 12, seed=0).requires_grad_(), randn(3, 5, 6, seed=1)
    gate, up = packed.detach()[..., :6], packed.detach()[..., 6:]
    sigmoid = 1 / (1 + (-gate).exp())
    y = kernels.swiglu(packed)
    assert_close(y, gate * sigmoid * up)
    y.backward(dy)
    dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    assert_close(packed.grad, torch.cat((dgate, dy * gate * sigmoid), dim=-1))


# --------------------------------------------------------------------------------------------- gate_mix


def gate_inputs(D: int, R: int) -> dict[str, Any]:
    shapes: dict[str, tuple[int, ...]] = {"z": (2, 3, D), "o": (2, 3, D), "x": (2, 3, D)}
    shapes |= {"w1": (R, 3 * D), "b1": (R,), "w2": (3 * D, R), "b2": (3 * D,)}
    return {name: randn(*shape, seed=i).requires_grad_() for i, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("sources", [2, 3])
def test_gate_mix_and_the_gradients_of_its_docstring(sources):
    D, R = 6, 4
    inputs = gate_inputs(D, R)
    dy = randn(2, 3, D, seed=99)
    named = dict(inputs) if sources == 3 else {**inputs, "x": None}
    y = kernels.gate_mix(**named)
    y.backward(dy)

    v = {name: tensor.detach() for name, tensor in inputs.items()}
    if sources == 2:
        v["x"] = torch.zeros_like(v["x"])
    s = torch.cat((v["z"], v["o"], v["x"]), dim=-1)
    pre = s @ v["w1"].T + v["b1"]
    hidden = pre * torch.sigmoid(pre)
    g = torch.sigmoid(hidden @ v["w2"].T + v["b2"])
    assert_close(y, (g * s).unflatten(-1, (3, D)).sum(-2))

    dg = torch.cat((dy, dy, dy), dim=-1) * s
    da = dg * g * (1 - g)
    sig = torch.sigmoid(pre)
    dp = (da @ v["w2"]) * sig * (1 + pre * (1 - sig))
    ds = g * torch.cat((dy, dy, dy), dim=-1) + dp @ v["w1"]
    rows = "bti,btj->ij"
    assert_close(inputs["w2"].grad, torch.einsum(rows, da, hidden))
    assert_close(inputs["b2"].grad, da.sum((0, 1)))
    assert_close(inputs["w1"].grad, torch.einsum(rows, dp, s))
    assert_close(inputs["b1"].grad, dp.sum((0, 1)))
    assert_close(inputs["z"].grad, ds[..., :D])
    assert_close(inputs["o"].grad, ds[..., D : 2 * D])
    if sources == 3:
        assert_close(inputs["x"].grad, ds[..., 2 * D :])
    else:
        assert inputs["x"].grad is None
        assert not inputs["w1"].grad[:, 2 * D :].any() and not inputs["b2"].grad[2 * D :].any()


# -------------------------------------------------------------------------------------------- stablemax


def stablemax_loss(logits: Tensor, labels: Tensor) -> Tensor:
    s = torch.where(logits >= 0, logits + 1, 1 / (1 - logits.clamp(max=0)))
    p = s / s.sum(-1, keepdim=True)
    loss = -p.gather(-1, labels.clamp(min=0).long()[..., None]).squeeze(-1).log()
    return torch.where(labels == -100, 0, loss)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_stablemax_cross_entropy_and_its_gradient(scale):
    logits, dy = randn(3, 7, 11, seed=0, scale=scale), randn(3, 7, seed=1)
    labels = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    labels[0, 3] = labels[2] = -100
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = kernels.stablemax_cross_entropy(ours, labels)
    expected = stablemax_loss(plain, labels)
    assert_close(loss, expected)
    assert not loss[2].any()
    loss.backward(dy)
    expected.backward(dy)
    assert_close(ours.grad, plain.grad)
    assert not ours.grad[0, 3].any()


def test_stablemax_gradient_at_zero_is_that_of_its_branches():
    logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    kernels.stablemax_cross_entropy(logits, torch.tensor([1])).sum().backward()
    assert_close(logits.grad, torch.tensor([[0.25, -0.75, 0.25, 0.25]], dtype=torch.float64))
    assert log_s(torch.zeros(())).item() == 0


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("V", [2, 11, 64])
def test_stablemax_in_float32_stays_within_the_stated_error(scale, V):
    logits = (torch.rand(4096, V, generator=torch.Generator().manual_seed(V)) * 2 - 1) * scale
    labels = torch.randint(0, V, (4096,), generator=torch.Generator().manual_seed(1))
    error = kernels.stablemax_cross_entropy(logits, labels).double() - stablemax_loss(logits.double(), labels)
    assert 0 < error.abs().max() < 4e-6


def test_softmax_cross_entropy_is_the_textbook_one():
    logits = randn(3, 7, 11, seed=0)
    labels = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(2))
    labels[1, 1] = -100
    expected = logits.exp().sum(-1).log() - logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    expected[1, 1] = 0
    assert_close(kernels.softmax_cross_entropy(logits, labels), expected)


# ------------------------------------------------------------------------------------------- adam_atan2


def test_adam_atan2_is_the_formula_over_several_steps():
    lr, beta1, beta2, decay = 0.1, 0.9, 0.95, 0.3
    p = [0.5, -2.0, 3.0]
    m, v = [0.0] * 3, [0.0] * 3
    param = torch.tensor(p, dtype=torch.float64)
    exp_avg, exp_avg_sq = torch.zeros_like(param), torch.zeros_like(param)
    for t in range(1, 6):
        g = [math.sin(t), 1e-6 * t, 0.0]
        for i in range(3):
            p[i] *= 1 - lr * decay
            m[i] = beta1 * m[i] + (1 - beta1) * g[i]
            v[i] = beta2 * v[i] + (1 - beta2) * g[i] ** 2
            p[i] -= lr / (1 - beta1**t) * math.atan2(m[i], math.sqrt(v[i]) / math.sqrt(1 - beta2**t))
        kernels.adam_atan2(
            param,
            torch.tensor(g, dtype=torch.float64),
            exp_avg,
            exp_avg_sq,
            lr=torch.tensor(lr, dtype=torch.float64),
            step=torch.tensor(t),
            beta1=beta1,
            beta2=beta2,
            weight_decay=decay,
        )
        assert_close(param, torch.tensor(p, dtype=torch.float64))
    assert_close(exp_avg_sq, torch.tensor(v, dtype=torch.float64))


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.9, 0.999999)])
def test_adam_atan2_first_step_depends_only_on_the_sign(betas):
    """At t = 1, m is (1 - b1) g and the corrected root of v is |g|, whatever the size of g and b2."""
    param, grad = torch.zeros(3), torch.tensor([5.0, -1e-8, 0.0])
    step, lr = torch.tensor(1), torch.tensor(0.1)
    kernels.adam_atan2(
        param,
        grad,
        torch.zeros(3),
        torch.zeros(3),
        lr=lr,
        step=step,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=0.0,
    )
    one = 1 - betas[0]
    assert_close(param, torch.tensor([-0.1, 0.1, 0.0]) / one * math.atan(one), 1e-6)


# --------------------------------------------------------------------------------------------- the door


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.rope(torch.zeros(2, 3, 4), *rope_tables(3, 4)), r"rope: x must be \(B, T, n, d\)"),
        (lambda: kernels.rope(torch.zeros(2, 3, 1, 4), *rope_tables(5, 4)), r"cos must have shape \(3, 4\)"),
        (lambda: kernels.attention(torch.zeros(2, 3, 10), 2), r"multiple of num_heads=2, got \(2, 3, 10\)"),
        (
            lambda: kernels.attention(torch.zeros(2, 3, 12), 2, torch.zeros(3, 2)),
            "cos and sin must both be given",
        ),
        (lambda: kernels.attention(torch.zeros(2, 3, 12), 2, queries=4), r"queries must be in 1\.\.3, got 4"),
        (lambda: kernels.rms_norm(torch.zeros(2, 3), torch.zeros(3)), r"residual must have shape \(2, 3\)"),
        (lambda: kernels.rms_norm(torch.zeros(2), torch.zeros(2).double()), "residual must match x"),
        (lambda: kernels.swiglu(torch.zeros(2, 3)), "even last dimension"),
        (lambda: kernels.swiglu(torch.zeros(2, 4, dtype=torch.int32)), "gate_up must be bfloat16"),
        (
            lambda: kernels.gate_mix(**{**gate_inputs(4, 2), "w1": torch.zeros(2, 8).double()}),
            r"w1 must have shape",
        ),
        (
            lambda: kernels.stablemax_cross_entropy(torch.zeros(2, 3), torch.zeros(3).long()),
            "labels must have",
        ),
        (lambda: kernels.softmax_cross_entropy(torch.zeros(2, 3), torch.zeros(2)), "labels must be int32"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


IN_PLACE = {"adam_atan2", "adamw", "muon_momentum", "muon_update", "sign_sgd"}
CHOICE = {"get_backend", "set_backend"}


@pytest.mark.parametrize("name", sorted(set(kernels.__all__) - IN_PLACE - CHOICE))
def test_operations_compile_without_a_graph_break_and_leave_their_inputs(name):
    tables = rope_tables(5, 4)
    arguments: dict[str, tuple] = {
        "rope": (torch.randn(2, 5, 3, 4), *tables),
        "attention": (torch.randn(2, 5, 24), 2, *tables),
        "rms_norm": (torch.randn(2, 5, 8), torch.randn(2, 5, 8)),
        "rms_norm_pair": (torch.randn(2, 5, 8), torch.randn(2, 5, 8)),
        "swiglu": (torch.randn(2, 5, 8),),
        "linear": (torch.randn(2, 5, 8), torch.randn(6, 8), torch.randn(6)),
        "linear_swiglu": (torch.randn(2, 5, 8), torch.randn(12, 8)),
        "swiglu_mlp": (torch.randn(2, 5, 8), torch.randn(12, 8), torch.randn(8, 6)),
        "normed_swiglu_mlp": (torch.randn(2, 5, 8), torch.randn(12, 8), torch.randn(8, 6)),
        "conv_swiglu": (torch.randn(2, 5, 8), torch.randn(4, 2), torch.randn(4)),
        "linear_scaled": (torch.randn(2, 5, 8), torch.randn(6, 8), torch.rand(2, 5, 3)),
        "linear_rms": (torch.randn(2, 5, 8), torch.randn(6, 8), torch.randn(2, 5, 6)),
        "lm_head_stablemax": (torch.randn(2, 5, 8), torch.randn(6, 8), torch.randint(0, 6, (2, 5))),
        "lm_head_softmax": (torch.randn(2, 5, 8), torch.randn(6, 8), torch.randint(0, 6, (2, 5))),
        "gate_mix": tuple(t.detach().float() for t in gate_inputs(8, 2).values()),
        "stablemax_cross_entropy": (torch.randn(2, 5, 8), torch.randint(0, 8, (2, 5))),
        "softmax_cross_entropy": (torch.randn(2, 5, 8), torch.randint(0, 8, (2, 5))),
        "noisy_update": (torch.randn(2, 5, 8), torch.randn(2, 5, 8)),
        "random_start": (
            torch.randn(2, 5, 8),
            torch.tensor([True, False]),
            torch.randn(8),
            torch.ones(2, 3, dtype=torch.int32),
            0,
        ),
    }
    before = [a.clone() if isinstance(a, Tensor) else a for a in arguments[name]]
    compiled = torch.compile(getattr(kernels, name), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments[name]), getattr(kernels, name)(*before))
    for argument, copy in zip(arguments[name], before, strict=True):
        assert torch.equal(argument, copy) if isinstance(argument, Tensor) else argument == copy
