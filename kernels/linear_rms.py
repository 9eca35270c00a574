"""The deferred norm: a product that adds the residual, and leaves the norm's factor to later products.

The norm has no weight, so rms_norm(h) @ W^T = rstd * (h @ W^T): h is stored unscaled together with its mean
square, and no pass over memory scales it. A post-norm block without gradient is then, with z = rstd * h:

    qkv = linear_scaled(h, W_qkv, m);                    a = attention(qkv)
    h', m' = linear_rms(a, W_o, h, m);                   y = linear_swiglu(h', W_gate_up, m')
    h'', m'' = linear_rms(y, W_down, h', m')

linear_rms:      h = x @ weight^T + rstd * residual;  m_p = sum over part p of h^2 / N + eps / P
linear_scaled:   y = rstd * (x @ weight^T)
in both:         rstd = 1 / sqrt(sum over p of m_p), the factor of the deferred norm of x or the residual

There is no backward: if a gradient is required, the plain operations are composed. The mean is of h before
rounding, as in `rms_norm`; rounding h changes it very little and without bias.

Bytes, in elements: MK + NK + MN read, MN written; unfused, another MN are written and read. A row of h spans
P tiles, and each tile's program stores its part of the mean square: 4 P bytes per row, written once and read
by each later product, which adds the parts in a fixed order. P = 2 at N = 512.
"""

import torch
from torch import Tensor

from kernels.backend import dot, jit, launch, tl, triton, wide
from kernels.checks import accumulate_dtype, as_rows, check_floating, check_shape
from kernels.linear import checked_linear
from kernels.matmul import (
    DEFERRED,
    check_mean_square,
    check_product,
    deferred_rstd,
    launch_choice,
    parts_of,
    place,
    product,
    rstd_of,
    use_fused,
)


def linear_scaled_reference(x: Tensor, weight: Tensor, mean_square: Tensor | None) -> Tensor:
    """The scaled product in plain PyTorch; see `linear_scaled`. Without mean_square the factor is 1."""
    y = checked_linear(x, weight)
    return y if mean_square is None else (y * rstd_of(mean_square)[..., None]).to(x.dtype)


def linear_rms_reference(
    x: Tensor, weight: Tensor, residual: Tensor, mean_square: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum and its mean square in plain PyTorch, in one part; see `linear_rms`."""
    scaled = residual.to(accumulate_dtype(x.dtype))
    if mean_square is not None:
        scaled = scaled * rstd_of(mean_square)[..., None]
    h = checked_linear(x, weight).to(scaled.dtype) + scaled
    return h.to(x.dtype), h.square().mean(-1, keepdim=True) + eps


@jit
def _linear_scaled_forward_kernel(
    x_ptr, weight_ptr, mean_square_ptr, y_ptr,
    M, N, K,
    x_stride_m, weight_stride_n, y_stride_m,
    WIDE: tl.constexpr, DOT: tl.constexpr, PARTS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, col, rows_left, cols_left = place(M, N, BLOCK_M, BLOCK_N)
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    near_rows, near_cols = tl.minimum(rows, rows_left - 1), tl.minimum(cols, cols_left - 1)
    acc = product(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=WIDE),
        x_ptr + row * x_stride_m, weight_ptr + col * weight_stride_n,
        near_rows, near_cols,
        K,
        x_stride_m, weight_stride_n,
        DOT, EVEN_K, BLOCK_K,
    )  # fmt: skip
    rstd = deferred_rstd(mean_square_ptr, row + near_rows, PARTS)
    y = (acc * rstd[:, None]).to(y_ptr.dtype.element_ty)
    mask = (rows < rows_left)[:, None] & (cols < cols_left)[None, :]
    tl.store(y_ptr + row * y_stride_m + col + rows[:, None] * y_stride_m + cols[None, :], y, mask=mask)


@jit
def _linear_rms_forward_kernel(
    x_ptr, weight_ptr, residual_ptr, mean_square_ptr, h_ptr, h_mean_square_ptr,
    M, N, K,
    x_stride_m, weight_stride_n, residual_stride_m, h_stride_m,
    part_eps,
    WIDE: tl.constexpr, DOT: tl.constexpr, PARTS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, col, rows_left, cols_left = place(M, N, BLOCK_M, BLOCK_N)
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    near_rows, near_cols = tl.minimum(rows, rows_left - 1), tl.minimum(cols, cols_left - 1)
    # Initialise the accumulator with the residual: adding it after the loop would need more registers.
    residual_ptrs = residual_ptr + row * residual_stride_m + col + near_rows[:, None] * residual_stride_m
    # Use a mask, because clamped columns would be loaded one by one.
    h = tl.load(residual_ptrs + cols[None, :], mask=(cols < cols_left)[None, :], other=0.0).to(WIDE)
    if mean_square_ptr is not None:
        h *= deferred_rstd(mean_square_ptr, row + near_rows, PARTS)[:, None]
    h = product(
        h,
        x_ptr + row * x_stride_m, weight_ptr + col * weight_stride_n,
        near_rows, near_cols,
        K,
        x_stride_m, weight_stride_n,
        DOT, EVEN_K, BLOCK_K,
    )  # fmt: skip
    squares = tl.sum(tl.where((cols < cols_left)[None, :], h * h, 0.0), axis=1)
    h_mean_square_ptrs = h_mean_square_ptr + (row + rows) * tl.cdiv(N, BLOCK_N) + col // BLOCK_N
    tl.store(h_mean_square_ptrs, squares / N + part_eps, mask=rows < rows_left)
    h = h.to(h_ptr.dtype.element_ty)
    mask = (rows < rows_left)[:, None] & (cols < cols_left)[None, :]
    tl.store(h_ptr + row * h_stride_m + col + rows[:, None] * h_stride_m + cols[None, :], h, mask=mask)


def scaled_product(x: Tensor, weight: Tensor, mean_square: Tensor) -> Tensor:
    x_rows, weight_rows = as_rows(x), as_rows(weight)
    (M, K), N = x_rows.shape, weight.shape[0]
    y = x.new_empty(*x.shape[:-1], N)
    choice = launch_choice(x.dtype, N, K)
    factors, PARTS = parts_of(mean_square)
    launch(
        _linear_scaled_forward_kernel,
        (triton.cdiv(M, choice["BLOCK_M"]) * triton.cdiv(N, choice["BLOCK_N"]),),
        x_rows, weight_rows, factors, y,
        M, N, K,
        x_rows.stride(0), weight_rows.stride(0), N,
        WIDE=wide(x.dtype), DOT=dot(x.dtype), PARTS=PARTS, **choice,
    )  # fmt: skip
    return y


def _outputs(x: Tensor, residual: Tensor, N: int, K: int) -> tuple[Tensor, Tensor]:
    """Allocates h and its mean square, with a part for every column tile."""
    parts = triton.cdiv(N, launch_choice(x.dtype, N, K)["BLOCK_N"])
    h = torch.empty_like(residual, memory_format=torch.contiguous_format)
    return h, x.new_empty(*x.shape[:-1], parts, dtype=accumulate_dtype(x.dtype))


def _sum(
    x: Tensor, weight: Tensor, residual: Tensor, mean_square: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    x_rows, weight_rows, residual_rows = as_rows(x), as_rows(weight), as_rows(residual)
    (M, K), N = x_rows.shape, weight.shape[0]
    choice = launch_choice(x.dtype, N, K)
    h, h_mean_square = _outputs(x, residual, N, K)
    factors, PARTS = parts_of(mean_square)
    launch(
        _linear_rms_forward_kernel,
        (triton.cdiv(M, choice["BLOCK_M"]) * triton.cdiv(N, choice["BLOCK_N"]),),
        x_rows, weight_rows, residual_rows, factors, h, h_mean_square,
        M, N, K,
        x_rows.stride(0), weight_rows.stride(0), residual_rows.stride(0), N,
        eps / h_mean_square.shape[-1],
        WIDE=wide(x.dtype), DOT=dot(x.dtype), PARTS=PARTS, **choice,
    )  # fmt: skip
    return h, h_mean_square


@torch.library.custom_op("hrm_kernels::linear_scaled", mutates_args=())
def _linear_scaled(x: Tensor, weight: Tensor, mean_square: Tensor) -> Tensor:
    return scaled_product(x, weight, mean_square)


@_linear_scaled.register_fake
def _(x: Tensor, weight: Tensor, mean_square: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("hrm_kernels::linear_rms", mutates_args=())
def _linear_rms(
    x: Tensor, weight: Tensor, residual: Tensor, mean_square: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return _sum(x, weight, residual, mean_square, eps)


@_linear_rms.register_fake
def _(
    x: Tensor, weight: Tensor, residual: Tensor, mean_square: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return _outputs(x, residual, *weight.shape)


def linear_scaled(x: Tensor, weight: Tensor, mean_square: Tensor) -> Tensor:
    """A projection of rows with a deferred norm: rstd * (x @ weight^T), rstd = 1 / sqrt(sum(mean_square)).

    x: (..., K); weight: (N, K), same dtype; mean_square: (..., P) float32 (float64 for float64), as
    `linear_rms` returns it. Returns (..., N) in x's dtype. Sums and scales in float32 and rounds once.
    Intended for use without gradient; with a gradient, the plain product is scaled. Raises ValueError or
    TypeError naming the argument.
    """
    check_product("linear_scaled", x, weight, mean_square)
    if use_fused("linear_scaled", x, weight, mean_square, measured_as=DEFERRED):
        return _linear_scaled(x, weight, mean_square)
    return linear_scaled_reference(x, weight, mean_square)


def linear_rms(
    x: Tensor, weight: Tensor, residual: Tensor, mean_square: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """A projection plus its residual, with the norm of the sum deferred: rms_norm(h) = h * rstd_of(parts).

    h = x @ weight^T + rstd * residual. x: (..., K); weight: (N, K) and residual: (..., N), same dtype;
    mean_square: (..., P) float32 (float64 for float64), of the residual's deferred norm, None if the residual
    is normalised. Returns h: (..., N) in x's dtype, rounded once, and its mean square (..., P) in float32
    (float64): parts whose sum is mean(h^2) + eps, where P depends on the tiles of the kernel. Intended for
    use without gradient; with a gradient, the plain operations are composed. Raises ValueError or TypeError
    naming the argument. Source: Zhang and Sennrich 2019 (arXiv 1910.07467), whose factor commutes with a
    product.
    """
    check_product("linear_rms", x, weight, None)
    check_floating("linear_rms", x=x, residual=residual)
    check_shape("linear_rms", "residual", residual, (*x.shape[:-1], weight.shape[0]))
    if mean_square is not None:
        check_mean_square("linear_rms", "mean_square", residual, mean_square)
    if use_fused("linear_rms", residual, x, weight, mean_square, measured_as=DEFERRED):
        return _linear_rms(x, weight, residual, mean_square, eps)
    return linear_rms_reference(x, weight, residual, mean_square, eps)
