"""The feed-forward half of a block with gradient: both products and the SwiGLU between them.

Forward:    [g | u] = x @ gate_up_weight^T;  y = silu(g) * u;  out = y @ down_weight^T
Backward:   dy = dout @ down_weight;  du = dy * silu(g);  dg = dy * u * s * (1 + g * (1 - s)), s = sigmoid(g)
            dx = [dg | du] @ gate_up_weight;  dgate_up_weight = [dg | du]^T @ x;  ddown_weight = dout^T @ y

Saved: x, the weights, [g | u] and y. Only the sigmoid is recomputed. `kernels.linear_swiglu` computes the
activation in the epilogue of the first product. dy is used in the epilogue of its product and never stored.
The library computes the other products. Bytes of the backward's kernel, in elements for M rows: MK + KI + 2MI
read, 2MI written; a stored dy would add 2MI.

The epilogue processes a tile's columns in four pieces: gate, up and both gradients of a whole tile would
spill. With at most 128 registers per thread two programs share a multiprocessor, and one multiplies while the
other runs its epilogue.
"""

import torch
from torch import Tensor

from kernels.backend import Tile, dot, jit, launch, tl, triton, tunable, wide
from kernels.checks import as_rows, check_floating
from kernels.linear import checked_linear
from kernels.linear_swiglu import checked_linear_swiglu, forward_packed, linear_swiglu_reference
from kernels.matmul import check_product, fitted, place, takes_kernel, wants_gradient


def swiglu_mlp_reference(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor) -> Tensor:
    """The three operations in plain PyTorch; see `swiglu_mlp`."""
    return checked_linear(linear_swiglu_reference(x, gate_up_weight, None), down_weight)


def launch_variants(dtype: torch.dtype, N: int, K: int) -> list[Tile]:
    """Variants with fewer warps and smaller tiles, and with more stages."""
    if dtype.itemsize > 2 or K % 16 or N % 16:
        return []
    names = "BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"
    tried = ((128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (64, 128, 64, 4, 3))
    return [fitted(dict(zip(names, sizes, strict=True)), N, K) for sizes in tried]


@tunable(launch_variants)
def launch_choice(dtype: torch.dtype, N: int, K: int) -> Tile:
    """Tiles of the backward's product (M, K) x (K, N), two of which share a multiprocessor."""
    if dtype.itemsize > 2 or K % 16 or N % 16:
        choice: Tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 3}
    else:
        choice = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    return fitted(choice, N, K)


@jit
def _halves(x, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    # The left and the right half of a tile's columns.
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, WIDTH // 2)), (0, 2, 1)))


@jit
def _differentiate_piece(
    dy,
    gate_up_ptr, dgate_up_ptr, slope_ptr,
    rows, cols, rows_left, cols_left, N,
    gate_up_stride_m, dgate_up_stride_m,
    WIDE: tl.constexpr,
):  # fmt: skip
    mask = (rows < rows_left)[:, None] & (cols < cols_left)[None, :]
    gate_ptrs = gate_up_ptr + (rows[:, None] * gate_up_stride_m + cols[None, :])
    dgate_ptrs = dgate_up_ptr + (rows[:, None] * dgate_up_stride_m + cols[None, :])
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(WIDE)
    up = tl.load(gate_ptrs + N, mask=mask, other=0.0).to(WIDE)
    dy = dy.to(WIDE)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dup = dy * gate * sigmoid
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + rows, mask=rows < rows_left, other=0.0)[:, None]
        normed = slope * gate * up
        dgate += normed * up
        dup += normed * gate
    tl.store(dgate_ptrs, dgate.to(dgate_up_ptr.dtype.element_ty), mask=mask)
    tl.store(dgate_ptrs + N, dup.to(dgate_up_ptr.dtype.element_ty), mask=mask)


@jit
def _swiglu_mlp_backward_kernel(
    dout_ptr, weight_ptr, gate_up_ptr, dgate_up_ptr, slope_ptr,
    M, N, K,
    dout_stride_m, weight_stride_k, gate_up_stride_m, dgate_up_stride_m,
    WIDE: tl.constexpr, DOT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, col, rows_left, cols_left = place(M, N, BLOCK_M, BLOCK_N)
    rows, cols, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    near_rows = tl.minimum(rows, rows_left - 1)
    dout_ptrs = dout_ptr + row * dout_stride_m + (near_rows[:, None] * dout_stride_m + k[None, :])
    weight_ptrs = weight_ptr + col + (k[:, None] * weight_stride_k + cols[None, :])
    # Use a mask, because clamped columns would be loaded one by one.
    inside = (cols < cols_left)[None, :]
    dy = tl.zeros((BLOCK_M, BLOCK_N), dtype=WIDE)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            dout = tl.load(dout_ptrs)
            weight = tl.load(weight_ptrs, mask=inside, other=0.0)
        else:
            dout = tl.load(dout_ptrs, mask=k[None, :] < K - start, other=0.0)
            weight = tl.load(weight_ptrs, mask=inside & (k[:, None] < K - start), other=0.0)
        dy = tl.dot(dout.to(DOT), weight.to(DOT), dy, input_precision="ieee", out_dtype=dy.dtype)
        dout_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K * weight_stride_k
    # Round it as when it is stored; it takes half the registers.
    dy = dy.to(dgate_up_ptr.dtype.element_ty)
    gate_up_ptr += row * gate_up_stride_m + col
    dgate_up_ptr += row * dgate_up_stride_m + col
    if slope_ptr is not None:
        slope_ptr += row
    WIDTH: tl.constexpr = BLOCK_N // 4
    piece_cols = tl.arange(0, WIDTH)
    left, right = _halves(dy, BLOCK_M, BLOCK_N)
    first, second = _halves(left, BLOCK_M, BLOCK_N // 2)
    third, fourth = _halves(right, BLOCK_M, BLOCK_N // 2)
    _differentiate_piece(
        first, gate_up_ptr, dgate_up_ptr, slope_ptr, rows, piece_cols, rows_left, cols_left, N,
        gate_up_stride_m, dgate_up_stride_m, WIDE,
    )  # fmt: skip
    _differentiate_piece(
        second, gate_up_ptr, dgate_up_ptr, slope_ptr, rows, WIDTH + piece_cols, rows_left, cols_left, N,
        gate_up_stride_m, dgate_up_stride_m, WIDE,
    )  # fmt: skip
    _differentiate_piece(
        third, gate_up_ptr, dgate_up_ptr, slope_ptr, rows, 2 * WIDTH + piece_cols, rows_left, cols_left, N,
        gate_up_stride_m, dgate_up_stride_m, WIDE,
    )  # fmt: skip
    _differentiate_piece(
        fourth, gate_up_ptr, dgate_up_ptr, slope_ptr, rows, 3 * WIDTH + piece_cols, rows_left, cols_left, N,
        gate_up_stride_m, dgate_up_stride_m, WIDE,
    )  # fmt: skip


def activation_gradient(
    dout: Tensor, down_weight: Tensor, gate_up: Tensor, slope: Tensor | None = None
) -> Tensor:
    """The packed product's gradient, (..., 2*I).

    slope: (M,) in the dtype of sums, t of the norm in `kernels.normed_swiglu_mlp`; None without that norm.
    """
    dout_rows, weight_rows, gate_up_rows = as_rows(dout), as_rows(down_weight), as_rows(gate_up)
    (M, K), N = dout_rows.shape, down_weight.shape[1]
    dgate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    choice = launch_choice(dout.dtype, N, K)
    launch(
        _swiglu_mlp_backward_kernel,
        (triton.cdiv(M, choice["BLOCK_M"]) * triton.cdiv(N, choice["BLOCK_N"]),),
        dout_rows, weight_rows, gate_up_rows, dgate_up, slope,
        M, N, K,
        dout_rows.stride(0), weight_rows.stride(0), gate_up_rows.stride(0), 2 * N,
        WIDE=wide(dout.dtype), DOT=dot(dout.dtype), **choice,
    )  # fmt: skip
    return dgate_up


@torch.library.custom_op("hrm_kernels::swiglu_mlp", mutates_args=())
def _swiglu_mlp(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y, gate_up = forward_packed(x, gate_up_weight)
    return torch.nn.functional.linear(y, down_weight), y, gate_up


@_swiglu_mlp.register_fake
def _(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    widths = down_weight.shape[0], down_weight.shape[1], gate_up_weight.shape[0]
    out, y, gate_up = (x.new_empty(*x.shape[:-1], width) for width in widths)
    return out, y, gate_up


@torch.library.custom_op("hrm_kernels::swiglu_mlp_backward", mutates_args=())
def _swiglu_mlp_backward(dout: Tensor, down_weight: Tensor, gate_up: Tensor) -> Tensor:
    return activation_gradient(dout, down_weight, gate_up)


@_swiglu_mlp_backward.register_fake
def _(dout: Tensor, down_weight: Tensor, gate_up: Tensor) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    _, y, gate_up = output
    ctx.mark_non_differentiable(y, gate_up)
    # Otherwise autograd would write zero gradients for y and gate_up.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, y, gate_up)


def _differentiate(ctx, dout: Tensor | None, *_: None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if dout is None:
        return None, None, None
    x, gate_up_weight, down_weight, y, gate_up = ctx.saved_tensors
    wants_x, wants_gate_up, wants_down = ctx.needs_input_grad
    dx = dgate_up_weight = ddown_weight = None
    # The library computes these products, visible to the compiler.
    if wants_x or wants_gate_up:
        dgate_up = _swiglu_mlp_backward(dout, down_weight, gate_up)
        dx = dgate_up @ gate_up_weight if wants_x else None
        dgate_up_weight = dgate_up.flatten(0, -2).t() @ x.flatten(0, -2) if wants_gate_up else None
    if wants_down:
        ddown_weight = dout.flatten(0, -2).t() @ y.flatten(0, -2)
    return dx, dgate_up_weight, ddown_weight


_swiglu_mlp.register_autograd(_differentiate, setup_context=_save)


def swiglu_mlp(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor) -> Tensor:
    """SwiGLU between two products: (silu(g) * u) @ down_weight^T with [g | u] = x @ gate_up_weight^T.

    x: (..., K); gate_up_weight: (2*I, K), gate first; down_weight: (N, I), all of one dtype. Returns (..., N)
    in that dtype. Sums and activates in float32 and rounds [g | u], y, dy and [dg | du] once each. Without a
    gradient it is `linear_swiglu` and a product. Raises ValueError or TypeError naming the argument. Source:
    Shazeer 2020 (arXiv 2002.05202).
    """
    check_product("swiglu_mlp", x, gate_up_weight, None)
    check_floating("swiglu_mlp", x=x, down_weight=down_weight)
    inner = gate_up_weight.shape[0] // 2
    if gate_up_weight.shape[0] % 2 or down_weight.ndim != 2 or down_weight.shape[1] != inner:
        shapes = f"{tuple(gate_up_weight.shape)} and {tuple(down_weight.shape)}"
        raise ValueError(
            f"swiglu_mlp: gate_up_weight and down_weight must have shapes (2*I, K) and (N, I), got {shapes}"
        )
    tensors = x, gate_up_weight, down_weight
    if wants_gradient(*tensors) and takes_kernel("swiglu_mlp", x, down_weight, sizes=(inner,)):
        return _swiglu_mlp(*tensors)[0]
    return checked_linear(checked_linear_swiglu(x, gate_up_weight), down_weight)
