"""The rotation's kernel against its reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import rope
from kernels.rope import launch_choice, rope_tables
from tests.kernels.compare import DEVICE, DTYPES, agree, compiles, in_dtypes, randn

SHAPES = [(1, 1, 1, 64), (2, 17, 3, 96), (1, 82, 3, 64), (3, 5, 100, 32), (2, 3, 2, 2)]


def tables(length, head_dim, dtype=torch.float32):
    return tuple(table.to(DEVICE) for table in rope_tables(length, head_dim, dtype=dtype))


@pytest.mark.parametrize(("shape", "dtype"), in_dtypes(SHAPES))
def test_output_and_gradient(shape, dtype):
    cos, sin = tables(shape[1], shape[3])
    agree(lambda x: rope(x, cos, sin), {"x": randn(*shape, seed=0)}, dtype)


@settings(max_examples=12, deadline=None)
@given(B=st.integers(1, 2), T=st.integers(1, 9), n=st.integers(1, 70), half=st.integers(1, 70))
def test_any_shape(B, T, n, half):
    cos, sin = tables(T, 2 * half, torch.float64)
    agree(lambda x: rope(x, cos, sin), {"x": randn(B, T, n, 2 * half, seed=n)}, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_inside_packed_projections(dtype):
    cos, sin = tables(7, 32)
    heads = {"heads": randn(2, 7, 6, 32, seed=0)}
    results = agree(lambda heads: rope(heads[:, :, :4], cos, sin), heads, dtype)
    assert not results["dheads"][:, :, 4:].any()
    queries = {"heads": randn(2, 9, 6, 32, seed=1)}
    results = agree(lambda heads: rope(heads[:, 2:, 1::2], cos, sin), queries, dtype)
    assert results["0"].is_contiguous()


def test_strided_inputs_tables_and_upstream_gradients():
    cos, sin = tables(5, 16)
    turned = {"x": randn(16, 3, 5, 2, seed=0)}
    agree(lambda x: rope(x.permute(3, 2, 1, 0), cos, sin), turned, torch.float32)
    wide_cos, wide_sin = (torch.stack((table, table), dim=-1)[..., 0] for table in (cos, sin))
    x = randn(2, 5, 3, 16, seed=1).float().requires_grad_()
    assert torch.equal(rope(x, wide_cos, wide_sin), rope(x, cos, sin))
    rope(x, cos, sin).sum().backward()  # An expanded scalar: every stride of dy is 0.
    rope(y := x.detach().requires_grad_(), cos, sin).backward(torch.ones(2, 5, 3, 16, device=DEVICE))
    assert torch.equal(x.grad, y.grad)


def test_the_inverse_rotation_turns_back():
    cos, sin = tables(11, 64)
    x = randn(2, 11, 4, 64, seed=0).float()
    torch.testing.assert_close(rope(rope(x, cos, sin), cos, -sin), x, rtol=1e-6, atol=1e-6)


def test_gradients_of_first_and_second_order():
    cos, sin = tables(2, 4, torch.float64)
    x = randn(1, 2, 1, 4, seed=0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rope(x, cos, sin), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: rope(x, cos, sin), x, fast_mode=True)


def test_operator_contract_and_compile():
    cos, sin = tables(5, 8)
    x = randn(2, 5, 3, 8, seed=0).float()
    for inverse in (False, True):
        arguments = (x.clone().requires_grad_(), cos, sin, inverse)
        torch.library.opcheck(torch.ops.hrm_kernels.rope.default, arguments)
    compiles(lambda x: rope(x, cos, sin), {"x": x})


def test_tables_are_checked():
    x, (cos, sin) = torch.zeros(2, 3, 1, 4, device=DEVICE), tables(3, 4)
    with pytest.raises(ValueError, match=r"rope: sin must have shape \(3, 4\), got \(5, 4\)"):
        rope(x, cos, tables(5, 4)[1])
    with pytest.raises(ValueError, match=r"rope: cos is a constant table, but it requires a gradient"):
        rope(x, cos.clone().requires_grad_(), sin)
    with pytest.raises(ValueError, match=r"rope: sin must be on .*, got meta"):
        rope(x, cos, sin.to("meta"))
    with pytest.raises(TypeError, match=r"rope: cos must be bfloat16.*got torch.int64"):
        rope(x, cos.long(), sin)


def test_launches_cover_every_head_dim():
    for head_dim in (2, 32, 64, 96, 128, 256, 20000):
        choice = launch_choice(head_dim)
        assert 2 * choice["HALF"] == head_dim and choice["HALF"] <= choice["BLOCK_H"] < head_dim + 16
