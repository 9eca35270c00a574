"""The kernels of SwiGLU with a convolution over the tokens against their reference."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.conv_swiglu import conv_swiglu, conv_swiglu_reference
from tests.kernels.compare import DEVICE, agree, agree_in_every_tile, compiles, in_dtypes, randn


def some_inputs(*rows: int, width: int) -> dict[str, Tensor]:
    taps = {"weight": randn(width, 2, seed=1), "bias": randn(width, seed=2)}
    return {"gate_up": randn(*rows, 2 * width, seed=0), **taps}


@pytest.mark.parametrize(
    ("shape", "dtype"), in_dtypes([(1, 1, 1), (3, 17, 40), (2, 82, 96), (5, 3, 300), (9, 16)])
)
def test_outputs_and_gradients(shape, dtype):
    *rows, width = shape
    agree(conv_swiglu, some_inputs(*rows, width=width), dtype)


@settings(max_examples=10, deadline=None)
@given(B=st.integers(1, 4), T=st.integers(1, 24), N=st.integers(1, 300))
def test_any_shape(B, T, N):
    agree(conv_swiglu, some_inputs(B, T, width=N), torch.float64)


def test_every_tile_and_spans_of_several(monkeypatch):
    # Three spans of two row tiles for each of two column tiles.
    monkeypatch.setattr(import_module("kernels.conv_swiglu"), "PROGRAMS", 6)
    assert agree_in_every_tile(conv_swiglu, some_inputs(2, 12, width=512), torch.float32) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_strided_inputs_and_upstream_gradients(dtype):
    inputs = some_inputs(4, 9, width=24)
    turned = {**inputs, "weight": inputs["weight"].t().contiguous().t()}
    turned["gate_up"] = inputs["gate_up"].transpose(0, 1).contiguous().transpose(0, 1)
    agree(conv_swiglu, turned, dtype)
    agree(lambda **tensors: conv_swiglu(**tensors).transpose(1, 2), inputs, dtype)
    leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs.values()]
    conv_swiglu(*leaves).sum().backward()  # An expanded scalar: every stride of dy is 0.
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


def test_the_reference_is_a_causal_convolution_of_two_taps():
    inputs = some_inputs(2, 7, width=12)
    gate, up = inputs["gate_up"].chunk(2, dim=-1)
    s = F.pad((F.silu(gate) * up).transpose(1, 2), (1, 0))
    c = F.conv1d(s, inputs["weight"][:, None], inputs["bias"], groups=12)
    torch.testing.assert_close(conv_swiglu_reference(**inputs), F.silu(c).transpose(1, 2))


def test_gradcheck():
    leaves = [tensor.requires_grad_() for tensor in some_inputs(2, 3, width=5).values()]
    assert torch.autograd.gradcheck(conv_swiglu, leaves, fast_mode=True)


def test_operator_contract_and_compile():
    inputs = {name: tensor.float() for name, tensor in some_inputs(2, 5, width=16).items()}
    leaves = [tensor.clone().requires_grad_() for tensor in inputs.values()]
    torch.library.opcheck(torch.ops.hrm_kernels.conv_swiglu.default, leaves)
    compiles(conv_swiglu, inputs)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 5), (2, 2), (2,)), r"gate_up must have shape \(\.\.\., T, 2\*I\), got \(2, 5\)"),
        (((2, 4), (2, 1, 2), (2,)), r"weight must have shape \(2, 2\), got \(2, 1, 2\)"),
        (((2, 4), (2, 2), (3,)), r"bias must have shape \(2,\), got \(3,\)"),
    ],
)
def test_wrong_shapes_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        conv_swiglu(*(torch.zeros(shape, device=DEVICE) for shape in shapes))
