"""The gated activation's kernels against its reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import swiglu
from kernels.swiglu import launch_choice
from tests.kernels.compare import DEVICE, DTYPES, agree, compiles, in_dtypes, randn

SHAPES = [(1, 1), (3, 17, 40), (2, 82, 96), (100, 256), (7, 1536)]


@pytest.mark.parametrize(("shape", "dtype"), in_dtypes(SHAPES))
def test_outputs_and_gradients(shape, dtype):
    *rows, width = shape
    agree(swiglu, {"gate_up": randn(*rows, 2 * width, seed=0, scale=2.0)}, dtype)


@settings(max_examples=15, deadline=None)
@given(M=st.integers(1, 60), N=st.integers(1, 700))
def test_any_shape(M, N):
    agree(swiglu, {"gate_up": randn(M, 2 * N, seed=M + N)}, torch.float64)


@pytest.mark.filterwarnings("ignore:overflow")  # numpy tells of the exponential that becomes infinite.
def test_gates_of_any_size():
    # exp overflows at -89 in float32, and the sigmoid is 1 from 17 on.
    gate = torch.tensor([-1e4, -100.0, -89.0, -20.0, 0.0, 20.0, 100.0, 1e4]).double().to(DEVICE)
    agree(swiglu, {"gate_up": torch.cat([gate, randn(8, seed=1)])[None]}, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_and_upstream_gradients(dtype):
    agree(lambda wide: swiglu(wide[:, :, 3:67]), {"wide": randn(4, 9, 200, seed=0)}, dtype)
    agree(lambda turned: swiglu(turned.permute(2, 1, 0)), {"turned": randn(80, 5, 6, seed=1)}, dtype)
    agree(lambda gate_up: swiglu(gate_up).transpose(0, 1), {"gate_up": randn(5, 6, 80, seed=2)}, dtype)
    # Of a concatenation, dy is a view of wider rows.
    agree(lambda x: torch.cat([x, swiglu(x), x], dim=-1), {"x": randn(5, 80, seed=4)}, dtype)
    x = randn(3, 16, seed=3).to(dtype).requires_grad_()
    y = x.detach().clone().requires_grad_()
    swiglu(x).sum().backward()  # An expanded scalar: every stride of dy is 0.
    swiglu(y).backward(torch.ones(3, 8, dtype=dtype, device=DEVICE))
    assert torch.equal(x.grad, y.grad)


def test_gradcheck():
    assert torch.autograd.gradcheck(swiglu, [randn(3, 20, seed=0).requires_grad_()])


def test_operator_contract_and_compile():
    gate_up = randn(2, 5, 32, seed=0).float()
    torch.library.opcheck(torch.ops.hrm_kernels.swiglu.default, (gate_up.clone().requires_grad_(),))
    dy = randn(2, 5, 16, seed=1).float()
    torch.library.opcheck(torch.ops.hrm_kernels.swiglu_backward.default, (dy, gate_up))
    compiles(swiglu, {"gate_up": gate_up})


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match=r"swiglu: gate_up must have an even last dimension, got \(2, 5\)"):
        swiglu(torch.zeros(2, 5, device=DEVICE))


def test_launches_cover_every_width():
    for width in (1, 40, 96, 256, 1536, 10000):
        choice = launch_choice(width)
        assert choice["BLOCK_M"] * choice["BLOCK_N"] == 2048
        assert choice["BLOCK_N"] == 512 or width <= choice["BLOCK_N"] < max(17, 2 * width)
