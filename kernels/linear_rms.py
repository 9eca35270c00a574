"""The deferred norm: a product that adds the residual, and leaves the norm's factor to whoever reads it.

The norm has no weight, so rms_norm(h) @ W^T = rstd * (h @ W^T): h is stored as it is, with rstd beside it,
and nobody reads h only to scale it. A post-norm block without gradient then is, with z = rstd * h:

    qkv = linear_scaled(h, W_qkv, rstd);                    a = attention(qkv)
    h', rstd' = linear_rms(a, W_o, h, rstd);                y = linear_swiglu(h', W_gate_up, rstd')
    h'', rstd'' = linear_rms(y, W_down, h', rstd')

linear_rms:      h = x @ weight^T + rstd * residual;  rstd_out = 1 / sqrt(mean(h^2) + eps)
linear_scaled:   y = rstd * (x @ weight^T)

There is no backward: where a gradient is wanted, the plain operations are composed. The mean is of h before
rounding, as in `rms_norm`; rounding h shifts it by next to nothing and to neither side.

Bytes, in elements: MK + NK + MN read, MN written, and 4 bytes a row of rstd. Unfused, another MN are
written and read again. A row of h spans several tiles: each stores its sum of squares, 4 bytes a row, and a
second launch adds them up in a fixed order. Both together move 20 bytes a row at N = 512, where h and the
residual move 2 KiB; without the launch every consumer would take sums, N and eps in place of one factor.
"""

import torch
from torch import Tensor

from kernels.backend import dot, jit, launch, tl, triton, wide
from kernels.checks import accumulate_dtype, as_rows, check_floating, check_shape
from kernels.linear import linear
from kernels.matmul import DEFERRED, check_product, check_rstd, launch_choice, place, product, use_fused

ROWS_A_PROGRAM = 512


def linear_scaled_reference(x: Tensor, weight: Tensor, rstd: Tensor | None) -> Tensor:
    """The scaled product in plain PyTorch; see `linear_scaled`. rstd may be None, for one."""
    y = linear(x, weight)
    return y if rstd is None else (y * rstd[..., None]).to(x.dtype)


def linear_rms_reference(
    x: Tensor, weight: Tensor, residual: Tensor, rstd: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum and its factor in plain PyTorch; see `linear_rms`."""
    dtype = accumulate_dtype(x.dtype)
    scaled = residual.to(dtype) if rstd is None else residual.to(dtype) * rstd[..., None]
    h = linear(x, weight).to(dtype) + scaled
    return h.to(x.dtype), torch.rsqrt(h.square().mean(-1) + eps)


@jit
def _linear_scaled_forward_kernel(
    x_ptr, weight_ptr, rstd_ptr, y_ptr,
    M, N, K,
    x_stride_m, weight_stride_n, y_stride_m,
    WIDE: tl.constexpr, DOT: tl.constexpr, EVEN_K: tl.constexpr,
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
    y = (acc * tl.load(rstd_ptr + row + near_rows)[:, None]).to(y_ptr.dtype.element_ty)
    mask = (rows < rows_left)[:, None] & (cols < cols_left)[None, :]
    tl.store(y_ptr + row * y_stride_m + col + rows[:, None] * y_stride_m + cols[None, :], y, mask=mask)


@jit
def _linear_rms_forward_kernel(
    x_ptr, weight_ptr, residual_ptr, rstd_ptr, h_ptr, squares_ptr,
    M, N, K,
    x_stride_m, weight_stride_n, residual_stride_m, h_stride_m, squares_stride_n,
    WIDE: tl.constexpr, DOT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, col, rows_left, cols_left = place(M, N, BLOCK_M, BLOCK_N)
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    near_rows, near_cols = tl.minimum(rows, rows_left - 1), tl.minimum(cols, cols_left - 1)
    # The sum starts from the residual: added after the loop it would need registers beside the accumulator.
    residual_ptrs = residual_ptr + row * residual_stride_m + col + near_rows[:, None] * residual_stride_m
    h = tl.load(residual_ptrs + near_cols[None, :]).to(WIDE)
    if rstd_ptr is not None:
        h *= tl.load(rstd_ptr + row + near_rows)[:, None]
    h = product(
        h,
        x_ptr + row * x_stride_m, weight_ptr + col * weight_stride_n,
        near_rows, near_cols,
        K,
        x_stride_m, weight_stride_n,
        DOT, EVEN_K, BLOCK_K,
    )  # fmt: skip
    squares = tl.sum(tl.where((cols < cols_left)[None, :], h * h, 0.0), axis=1)
    tl.store(squares_ptr + col // BLOCK_N * squares_stride_n + row + rows, squares, mask=rows < rows_left)
    h = h.to(h_ptr.dtype.element_ty)
    mask = (rows < rows_left)[:, None] & (cols < cols_left)[None, :]
    tl.store(h_ptr + row * h_stride_m + col + rows[:, None] * h_stride_m + cols[None, :], h, mask=mask)


@jit
def _factor_kernel(
    squares_ptr, rstd_ptr,
    M, N,
    squares_stride_n,
    eps,
    WIDE: tl.constexpr, TILES_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    squares = tl.zeros((BLOCK_M,), dtype=WIDE)
    for tile in range(TILES_N):
        squares += tl.load(squares_ptr + tile * squares_stride_n + rows, mask=rows < M, other=0.0)
    tl.store(rstd_ptr + rows, 1.0 / tl.sqrt(squares / N + eps), mask=rows < M)


def _scaled(x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    x_rows, weight_rows = as_rows(x), as_rows(weight)
    (M, K), N = x_rows.shape, weight.shape[0]
    y = x.new_empty(*x.shape[:-1], N)
    choice = launch_choice(x.dtype, N, K)
    launch(
        _linear_scaled_forward_kernel,
        (triton.cdiv(M, choice["BLOCK_M"]) * triton.cdiv(N, choice["BLOCK_N"]),),
        x_rows, weight_rows, rstd.contiguous(), y,
        M, N, K,
        x_rows.stride(0), weight_rows.stride(0), N,
        WIDE=wide(x.dtype), DOT=dot(x.dtype), **choice,
    )  # fmt: skip
    return y


def _sum(x: Tensor, weight: Tensor, residual: Tensor, rstd: Tensor | None) -> tuple[Tensor, Tensor]:
    """h, and the sums of its squares: (tiles, M), so that both launches reach neighbouring rows together."""
    x_rows, weight_rows, residual_rows = as_rows(x), as_rows(weight), as_rows(residual)
    (M, K), N = x_rows.shape, weight.shape[0]
    choice = launch_choice(x.dtype, N, K)
    tiles_n = triton.cdiv(N, choice["BLOCK_N"])
    h = torch.empty_like(residual, memory_format=torch.contiguous_format)
    squares = x.new_empty(tiles_n, M, dtype=accumulate_dtype(x.dtype))
    launch(
        _linear_rms_forward_kernel,
        (triton.cdiv(M, choice["BLOCK_M"]) * tiles_n,),
        x_rows, weight_rows, residual_rows, None if rstd is None else rstd.contiguous(), h, squares,
        M, N, K,
        x_rows.stride(0), weight_rows.stride(0), residual_rows.stride(0), N, M,
        WIDE=wide(x.dtype), DOT=dot(x.dtype), **choice,
    )  # fmt: skip
    return h, squares


def _factor(squares: Tensor, N: int, eps: float) -> Tensor:
    """The factor of each row, (M,), of the sums over its tiles."""
    tiles_n, M = squares.shape
    rstd = squares.new_empty(M)
    launch(
        _factor_kernel,
        (triton.cdiv(M, ROWS_A_PROGRAM),),
        squares, rstd,
        M, N,
        M,
        eps,
        WIDE=wide(squares.dtype), TILES_N=tiles_n, BLOCK_M=ROWS_A_PROGRAM,
    )  # fmt: skip
    return rstd


@torch.library.custom_op("hrm_kernels::linear_scaled", mutates_args=())
def _linear_scaled(x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    return _scaled(x, weight, rstd)


@_linear_scaled.register_fake
def _(x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("hrm_kernels::linear_rms", mutates_args=())
def _linear_rms(
    x: Tensor, weight: Tensor, residual: Tensor, rstd: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    h, squares = _sum(x, weight, residual, rstd)
    return h, _factor(squares, h.shape[-1], eps).view(x.shape[:-1])


@_linear_rms.register_fake
def _(x: Tensor, weight: Tensor, residual: Tensor, rstd: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    h = torch.empty_like(residual, memory_format=torch.contiguous_format)
    return h, x.new_empty(x.shape[:-1], dtype=accumulate_dtype(x.dtype))


def linear_scaled(x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """A projection of normalised rows whose norm was deferred: rstd * (x @ weight^T).

    x: (..., K); weight: (N, K), same dtype; rstd: (...) float32 (float64 for float64), of `linear_rms`.
    Returns (..., N) in x's dtype. Sums and scales in float32 and rounds once. Meant for use without gradient;
    where one is wanted, the plain product is scaled. Raises ValueError or TypeError naming the argument.
    """
    check_product("linear_scaled", x, weight, rstd)
    if use_fused("linear_scaled", x, weight, rstd, measured_as=DEFERRED):
        return _linear_scaled(x, weight, rstd)
    return linear_scaled_reference(x, weight, rstd)


def linear_rms(
    x: Tensor, weight: Tensor, residual: Tensor, rstd: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """A projection plus its residual, with the norm of the sum deferred: rms_norm = h * rstd_out[..., None].

    h = x @ weight^T + rstd * residual and rstd_out = 1 / sqrt(mean(h^2) + eps). x: (..., K); weight: (N, K)
    and residual: (..., N), same dtype; rstd: (...) float32 (float64 for float64), of the residual's own
    deferred norm, None where the residual is normalised. Returns h: (..., N) in x's dtype, rounded once, and
    rstd_out: (...) in rstd's dtype. Meant for use without gradient; where one is wanted, the plain operations
    are composed. Raises ValueError or TypeError naming the argument. Source: Zhang and Sennrich 2019
    (arXiv 1910.07467), whose scale commutes with a product.
    """
    check_product("linear_rms", x, weight, None)
    check_floating("linear_rms", x=x, residual=residual)
    check_shape("linear_rms", "residual", residual, (*x.shape[:-1], weight.shape[0]))
    if rstd is not None:
        check_rstd("linear_rms", residual, rstd)
    if use_fused("linear_rms", residual, x, weight, rstd, measured_as=DEFERRED):
        return _linear_rms(x, weight, residual, rstd, eps)
    return linear_rms_reference(x, weight, residual, rstd, eps)
