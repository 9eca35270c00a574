"""The gate-up product with SwiGLU in its epilogue.

Forward:    [g | u] = rstd * (x @ weight^T);  y = silu(g) * u, with silu(g) = g * sigmoid(g)

There is no backward: if a gradient is required, the plain product and `swiglu` are composed, or
`kernels.swiglu_mlp` lets the kernel also write the (M, 2I) product. Otherwise the product stays in registers.
Bytes, in elements: MK + 2IK read, MI written; unfused, another 2MI are written and read.

A tile's columns alternate between gate and up, so that both halves of an output are in adjacent registers of
one thread, and one product of full width runs on the tensor cores.
"""

import torch
from torch import Tensor

from kernels.backend import dot, jit, launch, tl, triton, wide
from kernels.checks import as_rows
from kernels.linear_rms import linear_scaled_reference
from kernels.matmul import (
    check_product,
    deferred_rstd,
    launch_choice,
    parts_of,
    place,
    product,
    takes_kernel,
    wants_gradient,
)
from kernels.swiglu import checked_swiglu, swiglu_reference


def linear_swiglu_reference(x: Tensor, weight: Tensor, mean_square: Tensor | None) -> Tensor:
    """The product, then SwiGLU, in plain PyTorch; see `linear_swiglu`."""
    return swiglu_reference(linear_scaled_reference(x, weight, mean_square))


@jit
def _linear_swiglu_forward_kernel(
    x_ptr, weight_ptr, mean_square_ptr, y_ptr, gate_up_ptr,
    M, N, K,
    x_stride_m, weight_stride_n, y_stride_m, gate_up_stride_m,
    WIDE: tl.constexpr, DOT: tl.constexpr, PARTS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, col, rows_left, cols_left = place(M, N, BLOCK_M, BLOCK_N // 2)
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N // 2)
    near_rows = tl.minimum(rows, rows_left - 1)
    # Column 2c is gate c, column 2c + 1 is up c, which is N rows further in the weight.
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
    if mean_square_ptr is not None:
        acc *= deferred_rstd(mean_square_ptr, row + near_rows, PARTS)[:, None]
    gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2)))
    mask = (rows < rows_left)[:, None] & (cols < cols_left)[None, :]
    if gate_up_ptr is not None:
        gate_ptrs = gate_up_ptr + row * gate_up_stride_m + col
        gate_ptrs += rows[:, None] * gate_up_stride_m + cols[None, :]
        # Round them: they take half the registers, and the backward uses the same values as y.
        gate, up = gate.to(gate_up_ptr.dtype.element_ty), up.to(gate_up_ptr.dtype.element_ty)
        tl.store(gate_ptrs, gate, mask=mask)
        tl.store(gate_ptrs + N, up, mask=mask)
        gate, up = gate.to(WIDE), up.to(WIDE)
    y = (gate / (1.0 + tl.exp(-gate)) * up).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * y_stride_m + col + rows[:, None] * y_stride_m + cols[None, :], y, mask=mask)


def _forward(
    x: Tensor, weight: Tensor, mean_square: Tensor | None, *, packed: bool
) -> tuple[Tensor, Tensor | None]:
    """y: (..., I), and with `packed` the product (..., 2*I) too."""
    x_rows, weight_rows = as_rows(x), as_rows(weight)
    (M, K), N = x_rows.shape, weight.shape[0] // 2
    y = x.new_empty(*x.shape[:-1], N)
    gate_up = x.new_empty(*x.shape[:-1], 2 * N) if packed else None
    choice = launch_choice(x.dtype, 2 * N, K)
    factors, PARTS = parts_of(mean_square)
    launch(
        _linear_swiglu_forward_kernel,
        (triton.cdiv(M, choice["BLOCK_M"]) * triton.cdiv(2 * N, choice["BLOCK_N"]),),
        x_rows, weight_rows, factors, y, gate_up,
        M, N, K,
        x_rows.stride(0), weight_rows.stride(0), N, 2 * N,
        WIDE=wide(x.dtype), DOT=dot(x.dtype), PARTS=PARTS, **choice,
    )  # fmt: skip
    return y, gate_up


def forward_packed(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """y: (..., I), and the product (..., 2*I) from which it is computed, without a deferred norm."""
    y, gate_up = _forward(x, weight, None, packed=True)
    assert gate_up is not None
    return y, gate_up


@torch.library.custom_op("hrm_kernels::linear_swiglu", mutates_args=())
def _linear_swiglu(x: Tensor, weight: Tensor, mean_square: Tensor | None) -> Tensor:
    return _forward(x, weight, mean_square, packed=False)[0]


@_linear_swiglu.register_fake
def _(x: Tensor, weight: Tensor, mean_square: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)


def linear_swiglu(x: Tensor, weight: Tensor, mean_square: Tensor | None = None) -> Tensor:
    """SwiGLU of a packed projection: silu(g) * u with [g | u] = rstd * (x @ weight^T).

    x: (..., K); weight: (2*I, K), gate first, same dtype; mean_square: (..., P) float32 (float64 for
    float64), of x's deferred norm as `linear_rms` returns it, None for rstd = 1. Returns (..., I) in x's
    dtype. Sums and activates in float32 and rounds once. Intended for use without gradient; with a gradient,
    the product is rounded, saved and passed to `swiglu`. Raises ValueError or TypeError naming the argument.
    Source: Shazeer 2020 (arXiv 2002.05202).
    """
    check_product("linear_swiglu", x, weight, mean_square)
    if weight.shape[0] % 2:
        raise ValueError(f"linear_swiglu: weight must have an even number of rows, got {tuple(weight.shape)}")
    return checked_linear_swiglu(x, weight, mean_square)


def checked_linear_swiglu(x: Tensor, weight: Tensor, mean_square: Tensor | None = None) -> Tensor:
    """`linear_swiglu` of arguments that the caller has checked."""
    fused = takes_kernel("linear_swiglu", x, weight, sizes=(weight.shape[0],))
    if fused and not wants_gradient(x, weight, mean_square):
        return _linear_swiglu(x, weight, mean_square)
    return checked_swiglu(linear_scaled_reference(x, weight, mean_square))
