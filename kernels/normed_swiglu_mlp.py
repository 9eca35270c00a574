"""The feed-forward half of a block whose SwiGLU normalises its product before the gate.

Forward, per row with I inner columns:
    [g | u] = x @ gate_up_weight^T;  p = g * u;  r = 1 / sqrt(mean(p^2) + eps)
    y = sigmoid(g) * r * p;  out = y @ down_weight^T
The factor r is one number per row, so it commutes with the second product. With a = silu(g) * u = y / r:
    out = r * (a @ down_weight^T)
Backward:
    da = (r * dout) @ down_weight;  t = -r^2 / I * (dout . out), since dy . y = dout . out
    dg = da * u * s * (1 + g * (1 - s)) + t * p * u;  du = da * g * s + t * p * g, s = sigmoid(g)
    dx = [dg | du] @ gate_up_weight;  dgate_up_weight = [dg | du]^T @ x;  ddown_weight = (r * dout)^T @ a

The epilogue of the first product computes the activation and sums p^2 over its columns; the second product
adds these parts and scales (`kernels.linear_rms`). The norm needs no separate pass over memory. Backward, a
kernel over rows computes r * dout and t, and the kernel of `kernels.swiglu_mlp` computes the gradient in the
epilogue of its product.

Saved: x, the weights, [g | u], a, out and the parts. Recomputed: the sigmoid.
Bytes beyond those of `swiglu_mlp`, in elements for M rows: forward 4 Q bytes per row for Q parts, I / 128
with the largest tiles; backward 2MN read and MN written for r * dout.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.backend import dot, jit, launch, tl, triton, wide
from kernels.checks import accumulate_dtype, as_rows, check_floating
from kernels.linear import linear
from kernels.linear_rms import scaled_product
from kernels.matmul import (
    check_product,
    deferred_rstd,
    launch_choice,
    place,
    product,
    takes_kernel,
    wants_gradient,
)
from kernels.swiglu_mlp import activation_gradient


def normed_swiglu_mlp_reference(
    x: Tensor, gate_up_weight: Tensor, down_weight: Tensor, eps: float = 1e-5
) -> Tensor:
    """The operations in plain PyTorch; see `normed_swiglu_mlp`."""
    gate_up = linear(x, gate_up_weight)
    gate, up = gate_up.to(accumulate_dtype(x.dtype)).chunk(2, dim=-1)
    p = gate * up
    y = torch.sigmoid(gate) * p * torch.rsqrt(p.square().mean(-1, keepdim=True) + eps)
    return linear(y.to(x.dtype), down_weight)


@jit
def _normed_swiglu_forward_kernel(
    x_ptr, weight_ptr, a_ptr, mean_square_ptr, gate_up_ptr,
    M, N, K,
    x_stride_m, weight_stride_n, a_stride_m, gate_up_stride_m,
    part_eps,
    WIDE: tl.constexpr, DOT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # As in `linear_swiglu`, columns 2c and 2c + 1 are gate c and up c.
    row, col, rows_left, cols_left = place(M, N, BLOCK_M, BLOCK_N // 2)
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N // 2)
    near_rows = tl.minimum(rows, rows_left - 1)
    pairs = tl.arange(0, BLOCK_N)
    outs = (pairs % 2).to(tl.int64) * N + tl.minimum(pairs // 2, cols_left - 1)
    acc = product(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=WIDE),
        x_ptr + row * x_stride_m, weight_ptr + col * weight_stride_n,
        near_rows, outs,
        K,
        x_stride_m, weight_stride_n,
        DOT, EVEN_K, BLOCK_K,
    )  # fmt: skip
    gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2)))
    mask = (rows < rows_left)[:, None] & (cols < cols_left)[None, :]
    if gate_up_ptr is not None:
        gate_ptrs = gate_up_ptr + row * gate_up_stride_m + col
        gate_ptrs += rows[:, None] * gate_up_stride_m + cols[None, :]
        # Round them, so that the backward uses the same values as the activation.
        gate, up = gate.to(gate_up_ptr.dtype.element_ty), up.to(gate_up_ptr.dtype.element_ty)
        tl.store(gate_ptrs, gate, mask=mask)
        tl.store(gate_ptrs + N, up, mask=mask)
        gate, up = gate.to(WIDE), up.to(WIDE)
    p = gate * up
    squares = tl.sum(tl.where((cols < cols_left)[None, :], p * p, 0.0), axis=1)
    mean_square_ptrs = mean_square_ptr + (row + rows) * tl.cdiv(N, BLOCK_N // 2) + col // (BLOCK_N // 2)
    tl.store(mean_square_ptrs, squares / N + part_eps, mask=rows < rows_left)
    a = (p / (1.0 + tl.exp(-gate))).to(a_ptr.dtype.element_ty)
    tl.store(a_ptr + row * a_stride_m + col + rows[:, None] * a_stride_m + cols[None, :], a, mask=mask)


def rows_choice(width: int) -> dict[str, int]:
    """Rows per program, for 2048 numbers per 128 threads, and columns per iteration."""
    BLOCK_N = min(512, max(16, triton.next_power_of_2(width)))
    return {"BLOCK_M": 2048 // BLOCK_N, "BLOCK_N": BLOCK_N, "num_warps": 4}


@jit
def _normed_swiglu_scale_kernel(
    dout_ptr, out_ptr, mean_square_ptr, scaled_ptr, slope_ptr,
    M, N, inner,
    dout_stride_m, out_stride_m,
    WIDE: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rstd = deferred_rstd(mean_square_ptr, tl.minimum(rows, M - 1), PARTS)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=WIDE)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        dout = tl.load(dout_ptr + rows[:, None] * dout_stride_m + cols[None, :], mask=mask, other=0.0)
        out = tl.load(out_ptr + rows[:, None] * out_stride_m + cols[None, :], mask=mask, other=0.0)
        dout = dout.to(WIDE)
        sums += dout * out.to(WIDE)
        scaled = (dout * rstd[:, None]).to(scaled_ptr.dtype.element_ty)
        tl.store(scaled_ptr + rows[:, None] * N + cols[None, :], scaled, mask=mask)
    tl.store(slope_ptr + rows, -rstd * rstd * tl.sum(sums, axis=1) / inner, mask=rows < M)


def _parts(x: Tensor, inner: int) -> Tensor:
    """Allocates the mean squares, with a part for every column tile."""
    parts = triton.cdiv(2 * inner, launch_choice(x.dtype, 2 * inner, x.shape[-1])["BLOCK_N"])
    return x.new_empty(*x.shape[:-1], parts, dtype=accumulate_dtype(x.dtype))


def _activate(x: Tensor, weight: Tensor, eps: float, *, packed: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """a: (..., I), the parts of the mean square, and with `packed` the product (..., 2*I) too."""
    x_rows, weight_rows = as_rows(x), as_rows(weight)
    (M, K), N = x_rows.shape, weight.shape[0] // 2
    a, mean_square = x.new_empty(*x.shape[:-1], N), _parts(x, N)
    gate_up = x.new_empty(*x.shape[:-1], 2 * N) if packed else None
    choice = launch_choice(x.dtype, 2 * N, K)
    launch(
        _normed_swiglu_forward_kernel,
        (triton.cdiv(M, choice["BLOCK_M"]) * triton.cdiv(2 * N, choice["BLOCK_N"]),),
        x_rows, weight_rows, a, mean_square, gate_up,
        M, N, K,
        x_rows.stride(0), weight_rows.stride(0), N, 2 * N,
        eps / mean_square.shape[-1],
        WIDE=wide(x.dtype), DOT=dot(x.dtype), **choice,
    )  # fmt: skip
    return a, mean_square, gate_up


def _scale(dout: Tensor, out: Tensor, mean_square: Tensor, inner: int) -> tuple[Tensor, Tensor]:
    """r * dout, shaped like dout, and the slope t of every row, (M,)."""
    dout_rows, out_rows = as_rows(dout), as_rows(out)
    M, N = dout_rows.shape
    scaled = torch.empty_like(dout, memory_format=torch.contiguous_format)
    slope = mean_square.new_empty(M)
    choice = rows_choice(N)
    launch(
        _normed_swiglu_scale_kernel,
        (triton.cdiv(M, choice["BLOCK_M"]),),
        dout_rows, out_rows, mean_square, scaled, slope,
        M, N, inner,
        dout_rows.stride(0), out_rows.stride(0),
        WIDE=wide(dout.dtype), PARTS=mean_square.shape[-1], **choice,
    )  # fmt: skip
    return scaled, slope


def _forward(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor, eps: float) -> Tensor:
    a, mean_square, _ = _activate(x, gate_up_weight, eps, packed=False)
    return scaled_product(a, down_weight, mean_square)


def _forward_packed(
    x: Tensor, gate_up_weight: Tensor, down_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, and the saved tensors: a, the packed product and the parts of its mean square."""
    a, mean_square, gate_up = _activate(x, gate_up_weight, eps, packed=True)
    assert gate_up is not None
    return scaled_product(a, down_weight, mean_square), a, gate_up, mean_square


def _backward(
    dout: Tensor, out: Tensor, down_weight: Tensor, gate_up: Tensor, mean_square: Tensor
) -> tuple[Tensor, Tensor]:
    """The packed product's gradient, (..., 2*I), and r * dout."""
    scaled, slope = _scale(dout, out, mean_square, down_weight.shape[1])
    return activation_gradient(scaled, down_weight, gate_up, slope), scaled


_op: Any = partial(torch.library.custom_op, mutates_args=())
_normed_swiglu_mlp = _op("hrm_kernels::normed_swiglu_mlp", _forward)
_normed_swiglu_mlp_with_gradient = _op("hrm_kernels::normed_swiglu_mlp_with_gradient", _forward_packed)
_normed_swiglu_mlp_backward = _op("hrm_kernels::normed_swiglu_mlp_backward", _backward)


@_normed_swiglu_mlp.register_fake
def _(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], down_weight.shape[0])


@_normed_swiglu_mlp_with_gradient.register_fake
def _(
    x: Tensor, gate_up_weight: Tensor, down_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    widths = down_weight.shape[0], down_weight.shape[1], gate_up_weight.shape[0]
    out, a, gate_up = (x.new_empty(*x.shape[:-1], width) for width in widths)
    return out, a, gate_up, _parts(x, down_weight.shape[1])


@_normed_swiglu_mlp_backward.register_fake
def _(
    dout: Tensor, out: Tensor, down_weight: Tensor, gate_up: Tensor, mean_square: Tensor
) -> tuple[Tensor, Tensor]:
    dgate_up, scaled = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (gate_up, dout)
    )
    return dgate_up, scaled


def _save(ctx, inputs, output) -> None:
    out, a, gate_up, mean_square = output
    ctx.mark_non_differentiable(a, gate_up, mean_square)
    # Otherwise autograd would write zero gradients for outputs without gradient.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], out, a, gate_up, mean_square)


def _differentiate(ctx, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None, None
    x, gate_up_weight, down_weight, out, a, gate_up, mean_square = ctx.saved_tensors
    wants_x, wants_gate_up, wants_down, _ = ctx.needs_input_grad
    dgate_up, scaled = _normed_swiglu_mlp_backward(dout, out, down_weight, gate_up, mean_square)
    # The library computes these products, visible to the compiler.
    dx = dgate_up @ gate_up_weight if wants_x else None
    dgate_up_weight = dgate_up.flatten(0, -2).t() @ x.flatten(0, -2) if wants_gate_up else None
    ddown_weight = scaled.flatten(0, -2).t() @ a.flatten(0, -2) if wants_down else None
    return dx, dgate_up_weight, ddown_weight, None


_normed_swiglu_mlp_with_gradient.register_autograd(_differentiate, setup_context=_save)


def normed_swiglu_mlp(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor, eps: float = 1e-5) -> Tensor:
    """SwiGLU whose product is normalised before its gate: (sigmoid(g) * rms_norm(g * u)) @ down_weight^T.

    x: (..., K); gate_up_weight: (2*I, K), gate first, so [g | u] = x @ gate_up_weight^T; down_weight: (N, I),
    all of one dtype. The norm is over the I columns: p / sqrt(mean(p^2) + eps). Returns (..., N) in x's
    dtype. Sums, activates and normalises in float32 (float64 for float64). With a gradient, the kernel rounds
    [g | u], silu(g) * u and r * dout once each. float16 uses the reference, because the product may overflow
    before the norm. Raises ValueError or TypeError naming the argument. Source: Dillon 2026 (arXiv
    2601.19085).
    """
    check_product("normed_swiglu_mlp", x, gate_up_weight, None)
    check_floating("normed_swiglu_mlp", x=x, down_weight=down_weight)
    inner = gate_up_weight.shape[0] // 2
    if gate_up_weight.shape[0] % 2 or down_weight.ndim != 2 or down_weight.shape[1] != inner:
        shapes = f"{tuple(gate_up_weight.shape)} and {tuple(down_weight.shape)}"
        raise ValueError(
            "normed_swiglu_mlp: gate_up_weight and down_weight must have shapes (2*I, K) and (N, I), got "
            + shapes
        )
    tensors = x, gate_up_weight, down_weight
    obstacle = "its product may overflow in float16 before the norm" if x.dtype == torch.float16 else None
    if not takes_kernel("normed_swiglu_mlp", x, down_weight, obstacle=obstacle, sizes=(inner,)):
        return normed_swiglu_mlp_reference(*tensors, eps)
    if wants_gradient(*tensors):
        return _normed_swiglu_mlp_with_gradient(*tensors, eps)[0]
    return _normed_swiglu_mlp(*tensors, eps)
