"""The gated mixing's kernels against its reference."""

import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import gate_mix
from kernels.backend import Launch, recorded
from tests.kernels.compare import DEVICE, DTYPES, agree, compiles, in_dtypes, randn

op = sys.modules["kernels.gate_mix"]

# Rows of the sources, D, R: one row, odd lengths, widths and hidden layers that fill no tile.
SHAPES = [((1, 1), 64, 16), ((1, 17), 96, 24), ((100,), 40, 10), ((1, 17), 144, 128)]


def inputs(rows: tuple[int, ...], D: int, R: int, sources: int = 3) -> dict[str, Tensor]:
    """Sources, and weights that spread the gates over all of (0, 1)."""
    named = {name: randn(*rows, D, seed=seed) for seed, name in enumerate("zox"[:sources])}
    return named | {
        "w1": randn(R, 3 * D, seed=4, scale=(3 * D) ** -0.5),
        "b1": randn(R, seed=5),
        "w2": randn(3 * D, R, seed=6, scale=4 * R**-0.5),
        "b2": randn(3 * D, seed=7) - 0.5,
    }


def mixed(x: Tensor | None = None, **named: Any) -> Tensor:
    return gate_mix(x=x, **named)


def arguments(named: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    given_or_none = (named.get(name) for name in ("z", "o", "x", "w1", "b1", "w2", "b2"))
    return [None if tensor is None else tensor.to(dtype) for tensor in given_or_none]


@pytest.mark.parametrize(
    ("shape", "sources", "dtype"),
    [
        *((shape, 3, dtype) for shape, dtype in in_dtypes(SHAPES)),
        *((SHAPES[1], 2, dtype) for dtype in DTYPES),
    ],
)
def test_outputs_and_gradients(shape, sources, dtype):
    rows, D, R = shape
    agree(mixed, inputs(rows, D, R, sources), dtype)


@settings(max_examples=8, deadline=None)
@given(M=st.integers(1, 40), D=st.integers(2, 70), R=st.integers(4, 40), sources=st.integers(2, 3))
def test_any_shape(M, D, R, sources):
    agree(mixed, inputs((M,), D, R, sources), torch.float64)


def test_strided_inputs_and_upstream_gradients():
    named = inputs((4, 9), 64, 16)
    wide = named | {
        "z": randn(4, 9, 200, seed=8),
        "o": randn(64, 9, 4, seed=9),
        "x": randn(4, 9, 100, seed=10),
        "w1": randn(16, 210, seed=11, scale=0.1),
        "w2": randn(192, 40, seed=12),
        "b2": randn(192, 2, seed=13),
    }

    # Views are taken inside the call: a change of dtype would lay a part of a tensor out anew.
    def views(z, o, x, w1, b1, w2, b2):
        z, o, x = z[:, :, 3:67], o.permute(2, 1, 0), x[:, :, 20:84]
        return gate_mix(z, o, x, w1[:, 9:201], b1, w2[:, 5:21], b2[:, 1])

    agree(views, wide, torch.float32)
    # One upstream number for all: every stride of dy is 0.
    leaves = [tensor.requires_grad_() for tensor in arguments(named)]
    expanded = torch.autograd.grad(gate_mix(*leaves).sum(), leaves)
    written_out = torch.autograd.grad(gate_mix(*leaves), leaves, torch.ones(4, 9, 64, device=DEVICE))
    turned = torch.ones(64, 9, 4, device=DEVICE).permute(2, 1, 0)
    sliced = torch.cat((torch.ones(4, 9, 64), torch.full((4, 9, 30), torch.nan)), dim=2).to(DEVICE)[:, :, :64]
    others = (torch.autograd.grad(gate_mix(*leaves), leaves, dy) for dy in (turned, sliced))
    for grads in (written_out, *others):
        assert all(torch.equal(a, b) for a, b in zip(expanded, grads, strict=True))


def test_one_tensor_as_two_sources():
    named = inputs((11,), 40, 16)
    del named["o"], named["x"]
    agree(lambda z, **rest: gate_mix(z, z, None, **rest), named, torch.float32)
    agree(lambda z, **rest: gate_mix(z, z, z, **rest), named, torch.float32)


@pytest.mark.parametrize("wanted", ["x w1 b1 w2 b2", "o w1 b1 w2 b2", "z x", "w1", "b1", "b2", "w2 z"])
def test_only_wanted_gradients(wanted):
    named = inputs((35,), 40, 16)
    agree(mixed, named, torch.float32, gradients=wanted.split())
    leaves = {name: tensor.float().requires_grad_(name in wanted.split()) for name, tensor in named.items()}
    mixed(**leaves).sum().backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(wanted.split())


def launched(wanted: str, sources: int = 3) -> list[dict[str, object]]:
    """The arguments, by name, of each kernel that the backward launches for these gradients."""
    names = ("z", "o", "x", "w1", "b1", "w2", "b2")
    tensors = [None if t is None else t.to("meta") for t in arguments(inputs((100,), 64, 16, sources))]
    needs = [name in wanted.split() for name in names]
    with recorded() as launches:
        grads = op._backward(torch.empty(100, 64, device="meta"), *tensors, needs)
    shapes = [t.shape for t, need in zip(tensors, needs, strict=True) if need and t is not None]
    assert [grad.shape for grad in grads] == shapes
    return [by_name(launch) for launch in launches]


def by_name(launch: Launch) -> dict[str, object]:
    named = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    return {"kernel": launch.kernel.__name__, **named}


def test_unwanted_gradients_are_neither_computed_nor_allocated():
    rows, weights = launched("x w1 b1 w2 b2")
    assert rows["dz_ptr"] is None and rows["do_ptr"] is None
    assert rows["dx_ptr"] is not None and rows["hidden_ptr"] is not None
    assert weights["kernel"] == "_gate_mix_weights_kernel"
    rows, weights = launched("o w1 b1 w2 b2", sources=2)
    assert rows["x_ptr"] is None and rows["dz_ptr"] is None and rows["dx_ptr"] is None
    assert rows["do_ptr"] is not None and weights["x_ptr"] is None
    # Two thirds of the columns of W1 are summed, the absent source's are not.
    assert weights["dw1_ptr"].shape[1:] == (2 * 64, 16)
    (rows,) = launched("z o x")
    assert rows["hidden_ptr"] is None and rows["dp_ptr"] is None and rows["db1_ptr"] is None
    rows, _ = launched("w2")
    assert rows["dz_ptr"] is None and rows["do_ptr"] is None and rows["dx_ptr"] is None


def test_two_sources_do_not_read_the_third():
    named = inputs((20,), 40, 16, sources=2)
    whole = [tensor for tensor in arguments(named) if tensor is not None]
    z, o, w1, b1, w2, b2 = whole
    clean = gate_mix(z, o, None, w1, b1, w2, b2)
    w1[:, 80:], w2[80:], b2[80:] = torch.nan, torch.nan, torch.nan
    leaves = [tensor.requires_grad_() for tensor in (w1, b1, w2, b2)]
    y = gate_mix(z, o, None, *leaves)
    y.sum().backward()
    assert torch.equal(y, clean)
    assert not w1.grad[:, 80:].any() and not w2.grad[80:].any() and not b2.grad[80:].any()
    assert all(torch.isfinite(leaf.grad).all() and leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_in_every_run(dtype):
    leaves = [tensor.requires_grad_() for tensor in arguments(inputs((100,), 64, 16), dtype)]
    dy = randn(100, 64, seed=20).to(dtype)
    first, second = ((y, *torch.autograd.grad(y, leaves, dy)) for y in (gate_mix(*leaves) for _ in range(2)))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("sources", [2, 3])
def test_gradcheck(sources):
    leaves = [
        None if tensor is None else tensor.requires_grad_()
        for tensor in arguments(inputs((3,), 5, 4, sources), torch.float64)
    ]
    assert torch.autograd.gradcheck(gate_mix, leaves, fast_mode=True)


@pytest.mark.parametrize("sources", [2, 3])
def test_operator_contract_and_compile(sources):
    named = {name: tensor.float() for name, tensor in inputs((2, 5), 32, 16, sources).items()}
    leaves = [None if tensor is None else tensor.requires_grad_() for tensor in arguments(named)]
    torch.library.opcheck(torch.ops.hrm_kernels.gate_mix.default, tuple(leaves))
    compiles(mixed, named)


def test_backward_operator_contract():
    tensors = arguments(inputs((2, 5), 32, 16, 2))
    needs = [False, True, False, True, True, True, True]
    dy = randn(2, 5, 32, seed=20).float()
    torch.library.opcheck(torch.ops.hrm_kernels.gate_mix_backward.default, (dy, *tensors, needs))


def test_hidden_layers_beyond_the_kernels_are_refused():
    R = op.MAX_HIDDEN + 1
    named = {name: tensor.float() for name, tensor in inputs((2,), 4, R).items()}
    with pytest.raises(RuntimeError, match=f"at most {R - 1}, got {R}; use 'auto'"):
        gate_mix(**named)
    agree(mixed, inputs((2,), 4, op.MAX_HIDDEN), torch.float32)


def test_launches_cover_every_hidden_layer():
    for dtype in DTYPES:
        for R in (1, 16, 24, 128, op.MAX_HIDDEN):
            for tile in op.launch_choice(R, dtype).values():
                assert R <= tile["BLOCK_R"] < max(17, 2 * R)
                # Smaller sides are no operands of a product.
                assert min(tile["BLOCK_M"], tile["BLOCK_N"], tile.get("BLOCK_K", 16)) >= 16


@given(M=st.integers(0, 10**6), chunks=st.integers(1, 600), BLOCK_M=st.sampled_from([16, 32, 64]))
def test_splits_take_every_row_once(M, chunks, BLOCK_M):
    splits, part = op.row_splits(M, chunks, BLOCK_M)
    assert splits * part >= M and (splits - 1) * part < max(M, 1)
    assert part % BLOCK_M == 0 and (splits == 1 or splits * chunks <= 264)
