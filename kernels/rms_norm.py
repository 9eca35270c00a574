"""Root-mean-square norm of a residual sum, without a weight.

Forward, per row of D elements:   h = x + residual;  rstd = 1 / sqrt(mean(h^2) + eps);  y = h * rstd
Backward, the same for both terms:   dx = rstd * (dy - y * mean(y * dy))

In a residual network the next branch and the next residual sum both read y. `rms_norm_pair` returns y twice,
so dy has two parts, which the backward adds as it reads them.

Saved: y, which the next operation saves anyway, and rstd. Nothing is recomputed.
Bytes, in elements of x's dtype for N = rows * D: 2N read and N written forward; 2N read and N written
backward, N more with a second part of dy (a separate sum would read 2N and write N); and 4 bytes of rstd per
row.
"""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels.backend import Tile, choose, jit, launch, tl, triton, tunable, wide
from kernels.checks import accumulate_dtype, as_rows, cast, check_floating, check_shape

MAX_WIDTH = 16384


def rms_norm_reference(x: Tensor, residual: Tensor, eps: float) -> Tensor:
    """The norm in plain PyTorch; see `rms_norm`."""
    dtype = accumulate_dtype(x.dtype)
    h = cast(x, dtype) + cast(residual, dtype)
    return cast(h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps), x.dtype)


def launch_variants(width: int) -> list[Tile]:
    """Variants with half and twice as many elements per tile, and four or eight warps."""
    BLOCK_N = max(16, triton.next_power_of_2(width))
    tried = ((2048, 4), (4096, 8), (8192, 8))
    return [{"BLOCK_M": max(1, size // BLOCK_N), "BLOCK_N": BLOCK_N, "num_warps": w} for size, w in tried]


@tunable(launch_variants)
def launch_choice(width: int) -> Tile:
    """Tiles of whole rows with about 4096 elements, 16 per thread for vector loads."""
    BLOCK_N = max(16, triton.next_power_of_2(width))
    BLOCK_M = max(1, 4096 // BLOCK_N)
    return {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "num_warps": 8 if BLOCK_M * BLOCK_N > 4096 else 4}


@jit
def _rms_norm_forward_kernel(
    x_ptr, residual_ptr, y_ptr, rstd_ptr,
    M, N,
    x_stride_m, residual_stride_m, y_stride_m,
    eps,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride_m + cols[None, :], mask=mask, other=0.0).to(WIDE)
    residual = tl.load(
        residual_ptr + rows[:, None] * residual_stride_m + cols[None, :], mask=mask, other=0.0
    ).to(WIDE)
    h = x + residual
    rstd = 1.0 / tl.sqrt(tl.sum(h * h, axis=1) / N + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)
    y = (h * rstd[:, None]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * y_stride_m + cols[None, :], y, mask=mask)


@jit
def _rms_norm_backward_kernel(
    dy_ptr, dy_residual_ptr, y_ptr, rstd_ptr, dx_ptr,
    M, N,
    dy_stride_m, dy_residual_stride_m, y_stride_m, dx_stride_m,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    dy = tl.load(dy_ptr + rows[:, None] * dy_stride_m + cols[None, :], mask=mask, other=0.0).to(WIDE)
    if dy_residual_ptr is not None:
        dy_residual_ptrs = dy_residual_ptr + rows[:, None] * dy_residual_stride_m + cols[None, :]
        dy += tl.load(dy_residual_ptrs, mask=mask, other=0.0).to(WIDE)
    y = tl.load(y_ptr + rows[:, None] * y_stride_m + cols[None, :], mask=mask, other=0.0).to(WIDE)
    rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
    dx = rstd[:, None] * (dy - y * (tl.sum(y * dy, axis=1) / N)[:, None])
    tl.store(dx_ptr + rows[:, None] * dx_stride_m + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _forward(x: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x_rows, residual_rows = as_rows(x), as_rows(residual)
    M, N = x_rows.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = torch.empty(x.shape[:-1], dtype=accumulate_dtype(x.dtype), device=x.device)
    choice = launch_choice(N)
    launch(
        _rms_norm_forward_kernel,
        (triton.cdiv(M, choice["BLOCK_M"]),),
        x_rows, residual_rows, y, rstd,
        M, N,
        x_rows.stride(0), residual_rows.stride(0), N,
        eps,
        WIDE=wide(x.dtype), **choice,
    )  # fmt: skip
    return y, rstd


def _backward(dy: Tensor, dy_residual: Tensor | None, y: Tensor, rstd: Tensor) -> Tensor:
    dy_rows = as_rows(dy)
    dy_residual_rows = None if dy_residual is None else as_rows(dy_residual)
    M, N = dy_rows.shape
    dx = torch.empty_like(y)
    choice = launch_choice(N)
    launch(
        _rms_norm_backward_kernel,
        (triton.cdiv(M, choice["BLOCK_M"]),),
        dy_rows, dy_residual_rows, y, rstd, dx,
        M, N,
        dy_rows.stride(0), 0 if dy_residual_rows is None else dy_residual_rows.stride(0), N, N,
        WIDE=wide(y.dtype), **choice,
    )  # fmt: skip
    return dx


@torch.library.custom_op("hrm_kernels::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _forward(x, residual, eps)


@_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(x.shape[:-1], dtype=accumulate_dtype(x.dtype))


@torch.library.custom_op("hrm_kernels::rms_norm_backward", mutates_args=())
def _rms_norm_backward(dy: Tensor, dy_residual: Tensor | None, y: Tensor, rstd: Tensor) -> Tensor:
    return _backward(dy, dy_residual, y, rstd)


@_rms_norm_backward.register_fake
def _(dy: Tensor, dy_residual: Tensor | None, y: Tensor, rstd: Tensor) -> Tensor:
    return torch.empty_like(y)


def _save(ctx, inputs, output) -> None:
    y, rstd = output
    ctx.mark_non_differentiable(rstd)
    # Otherwise autograd would write a zero gradient for rstd.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y, rstd)


def _differentiate(ctx, dy: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None]:
    if dy is None:
        return None, None, None
    dx = _rms_norm_backward(dy, None, *ctx.saved_tensors)
    return dx if ctx.needs_input_grad[0] else None, dx if ctx.needs_input_grad[1] else None, None


_rms_norm.register_autograd(_differentiate, setup_context=_save)


@cache
def find_quack() -> Callable[..., Tensor]:
    """QuACK's norm. It is imported only for a measurement, because the import takes seconds."""
    return importlib.import_module("quack").rmsnorm


class _Pair(torch.autograd.Function):
    """Returns two outputs that share memory, which an operator may not return."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, rstd = _rms_norm(x, residual, eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, rstd)
        return y, y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        given = [dy for dy in grads if dy is not None]
        if not given:
            return None, None, None
        dx = _rms_norm_backward(given[0], given[1] if given[1:] else None, *ctx.saved_tensors)
        return dx if ctx.needs_input_grad[0] else None, dx if ctx.needs_input_grad[1] else None, None


def _choice(op: str, x: Tensor, residual: Tensor) -> str:
    """Checks the arguments; returns the implementation."""
    check_floating(op, x=x, residual=residual)
    check_shape(op, "residual", residual, x.shape)
    width = x.shape[-1]
    too_wide = f"its kernel holds rows of at most {MAX_WIDTH}, got {width}" if width > MAX_WIDTH else None
    return choose(op, x, too_wide, measured_as="rms_norm")


def _normalised(implementation: str, x: Tensor, residual: Tensor, eps: float) -> Tensor:
    if implementation == "triton":
        return _rms_norm(x, residual, eps)[0]
    if implementation == "quack":
        return find_quack()(x, residual=residual, eps=eps)
    return rms_norm_reference(x, residual, eps)


def rms_norm(x: Tensor, residual: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalised sum of a block's input and output: h / sqrt(mean(h^2) + eps), h = x + residual.

    x, residual: (..., D), same dtype and shape. Returns (..., D) in that dtype. Sums and reduces in
    float32 (float64 for float64) and rounds once, on store. Raises ValueError or TypeError naming the
    argument. Source: Zhang and Sennrich 2019 (arXiv 1910.07467).
    """
    return _normalised(_choice("rms_norm", x, residual), x, residual, eps)


def rms_norm_pair(x: Tensor, residual: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """`rms_norm` for two readers: y, and y again for the next residual sum.

    Arguments, precision and errors are those of `rms_norm`. Both outputs share one tensor (..., D); neither
    may be changed in place. The backward adds their gradients in float32 (float64) without writing the sum.
    """
    taken = _choice("rms_norm_pair", x, residual)
    if taken == "triton" and torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad):
        return _Pair.apply(x, residual, eps)
    y = _normalised(taken, x, residual, eps)
    return y, y
