"""The norm's kernels against its reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import backend, rms_norm, rms_norm_pair
from kernels.rms_norm import MAX_WIDTH, launch_choice
from tests.kernels.compare import DEVICE, agree, compiles, in_dtypes, randn

SHAPES = [(1, 1, 64), (1, 17, 96), (2, 82, 512), (3, 100, 64), (5, 40)]


@pytest.mark.parametrize(("shape", "dtype"), in_dtypes(SHAPES))
def test_outputs_and_gradients(shape, dtype):
    agree(rms_norm, {"x": randn(*shape, seed=0), "residual": randn(*shape, seed=1)}, dtype)


@pytest.mark.parametrize(("shape", "dtype"), in_dtypes(SHAPES))
def test_a_pair_for_two_readers(shape, dtype):
    """`agree` draws a gradient for each output, so the reference adds them outside of the norm."""
    inputs = {"x": randn(*shape, seed=0), "residual": randn(*shape, seed=1)}
    agree(rms_norm_pair, inputs, dtype)
    agree(lambda x, residual: rms_norm_pair(x, residual)[0], inputs, dtype)
    agree(lambda x, residual: rms_norm_pair(x, residual)[1], inputs, dtype, gradients=["residual"])


def test_the_backward_of_a_pair_is_one_launch():
    x, residual = (randn(3, 8, seed=seed).float().requires_grad_() for seed in (0, 1))
    first, second = rms_norm_pair(x, residual)
    assert first.data_ptr() == second.data_ptr()
    with backend.recorded() as launches:
        torch.autograd.grad((first, second), (x, residual), (first.detach(), second.detach().t().clone().t()))
    (launch,) = launches
    named = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    assert named["dy_residual_ptr"] is not None and named["dy_residual_ptr"].stride() == (8, 1)
    with torch.no_grad():
        assert not any(output.requires_grad for output in rms_norm_pair(x, residual))


@settings(max_examples=20, deadline=None)
@given(M=st.integers(1, 40), N=st.integers(2, 200), eps=st.sampled_from([1e-6, 1e-5, 1e-2]))
def test_any_shape(M, N, eps):
    inputs = {"x": randn(M, N, seed=M), "residual": randn(M, N, seed=N + 100)}
    agree(lambda x, residual: rms_norm(x, residual, eps), inputs, torch.float64)


def test_strided_inputs_and_upstream_gradients():
    wide, turned = randn(4, 9, 200, seed=0), randn(64, 9, 4, seed=1)
    agree(rms_norm, {"x": wide[:, :, 3:67], "residual": turned.permute(2, 1, 0)}, torch.float32)
    agree(rms_norm, {"x": wide[:, :1], "residual": wide[:, 1:2]}, torch.bfloat16)
    x, residual = randn(3, 8, seed=2).float().requires_grad_(), randn(3, 8, seed=3).float()
    rms_norm(x, residual).sum().backward()  # An expanded scalar: every stride of dy is 0.
    rms_norm(y := x.detach().requires_grad_(), residual).backward(torch.ones(3, 8, device=DEVICE))
    assert torch.equal(x.grad, y.grad)


def test_only_required_gradients_are_computed():
    x, residual = randn(3, 8, seed=0).float(), randn(3, 8, seed=1).float().requires_grad_()
    rms_norm(x, residual).sum().backward()
    assert x.grad is None and residual.grad.abs().sum() > 0


def test_gradcheck():
    inputs = [randn(3, 20, seed=seed).requires_grad_() for seed in (0, 1)]
    assert torch.autograd.gradcheck(rms_norm, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(rms_norm_pair, inputs, fast_mode=True)


def test_operator_contract_and_compile():
    inputs = {"x": randn(2, 5, 32, seed=0).float(), "residual": randn(2, 5, 32, seed=1).float()}
    leaves = [tensor.clone().requires_grad_() for tensor in inputs.values()]
    torch.library.opcheck(torch.ops.hrm_kernels.rms_norm.default, (*leaves, 1e-5))
    ops, rows = torch.ops.hrm_kernels, randn(2, 5, 32, seed=2).float()
    for dy_residual in (None, randn(2, 5, 32, seed=3).float()):
        torch.library.opcheck(ops.rms_norm_backward.default, (rows, dy_residual, rows, rows[..., 0].clone()))
    compiles(rms_norm, inputs)
    compiles(rms_norm_pair, inputs)


def test_rows_beyond_the_kernel_are_refused():
    x = torch.zeros(1, MAX_WIDTH + 1, device=DEVICE)
    with pytest.raises(RuntimeError, match=f"at most {MAX_WIDTH}, got {MAX_WIDTH + 1}; use 'auto'"):
        rms_norm(x, x)


def test_launches_cover_every_width():
    for width in (1, 64, 96, 512, 4096, MAX_WIDTH):
        choice = launch_choice(width)
        assert width <= choice["BLOCK_N"] < max(17, 2 * width) and choice["BLOCK_M"] >= 1
