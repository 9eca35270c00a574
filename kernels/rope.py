"""Rotary position embedding, half-split.

Forward, per head vector x = [x1, x2] (halves of length d/2) at position t, with angles a = t * theta^(-2i/d):

    y = [x1 cos a - x2 sin a,  x2 cos a + x1 sin a]

Backward: the same rotation of dy by -a, by the same kernel with the sine negated. It needs only the tables:
nothing is saved or recomputed.

Bytes, in elements of x's dtype for N = B * T * n * d: N read and N written, forward and backward. A program
processes many rows of one position, so it reads the tables' row of that position once: T * d * 4 bytes per
program column, from cache.
"""

import torch
from torch import Tensor

from kernels.backend import jit, launch, tl, triton, use_triton, wide
from kernels.checks import accumulate_dtype, cast, check_floating, check_shape


def rope_tables(
    length: int, head_dim: int, theta: float = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, each (length, head_dim), with two equal halves.

    Source: Su et al. 2021 (arXiv 2104.09864), in the half-split layout of the official HRM code, which
    computes the angles in float32; float64 tables are for tests.
    """
    inverse_frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=dtype) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=dtype), inverse_frequency)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rope_tables_2d(
    rows: int,
    columns: int,
    head_dim: int,
    theta: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    before: int = 0,
) -> tuple[Tensor, Tensor]:
    """The tables of a grid in row-major order: half of a head's width rotates by row, half by column.

    Pair i of either half rotates by theta^(-2i / (head_dim / 2)) per row or column. The `before` positions in
    front of the grid do not rotate. Returns two tables (before + rows * columns, head_dim). head_dim is a
    multiple of 4. The first quarters of both halves rotate by row, the others by column. Code that pairs
    channels within one half for rows and within the other for columns has the same model with reordered
    channels.
    """
    frequency = 1.0 / theta ** (torch.arange(0, head_dim // 2, 2, dtype=dtype) / (head_dim // 2))
    row, column = torch.arange(rows, dtype=dtype), torch.arange(columns, dtype=dtype)
    of_cells = (row.repeat_interleave(columns), column.repeat(rows))
    angles = torch.cat([torch.outer(place, frequency) for place in of_cells] * 2, dim=-1)
    angles = torch.cat((angles.new_zeros(before, head_dim), angles))
    return angles.cos(), angles.sin()


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation in plain PyTorch; see `rope`."""
    x1, x2 = cast(x, accumulate_dtype(x.dtype)).chunk(2, dim=-1)
    half = x1.shape[-1]
    cos, sin = cast(cos[:, None, :half], x1.dtype), cast(sin[:, None, :half], x1.dtype)
    return cast(torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1), x.dtype)


def launch_choice(head_dim: int) -> dict[str, int]:
    """Rows of one position; each half is a tile of about 4096 elements: 32 per thread, loaded 8 at once."""
    BLOCK_H = max(16, triton.next_power_of_2(head_dim // 2))
    return {"HALF": head_dim // 2, "BLOCK_H": BLOCK_H, "BLOCK_M": max(1, 4096 // BLOCK_H), "num_warps": 4}


@jit
def rotate(x1, x2, cos, sin):
    """The halves (x1, x2) rotated by the angles of cos and sin; with -sin, rotated back."""
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin


@jit
def _rope_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr,
    B, T, n,
    x_stride_b, x_stride_t, x_stride_n,
    WIDE: tl.constexpr, INVERSE: tl.constexpr, HALF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    # Consecutive programs process consecutive positions, which are adjacent in memory.
    position = (tl.program_id(0) % T).to(tl.int64)
    rows = (tl.program_id(0) // T).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    batch, head = rows // n, rows % n
    cols = tl.arange(0, BLOCK_H)
    mask = (batch < B)[:, None] & (cols < HALF)[None, :]
    cos = tl.load(cos_ptr + position * 2 * HALF + cols, mask=cols < HALF, other=0.0).to(WIDE)
    sin = tl.load(sin_ptr + position * 2 * HALF + cols, mask=cols < HALF, other=0.0).to(WIDE)
    if INVERSE:
        sin = -sin
    x_at = x_ptr + (batch * x_stride_b + position * x_stride_t + head * x_stride_n)[:, None] + cols[None, :]
    x1 = tl.load(x_at, mask=mask, other=0.0).to(WIDE)
    x2 = tl.load(x_at + HALF, mask=mask, other=0.0).to(WIDE)
    y1, y2 = rotate(x1, x2, cos[None, :], sin[None, :])
    y_at = y_ptr + (((batch * T + position) * n + head) * 2 * HALF)[:, None] + cols[None, :]
    tl.store(y_at, y1.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_at + HALF, y2.to(y_ptr.dtype.element_ty), mask=mask)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    B, T, n, d = x.shape
    if x.stride(3) != 1:
        x = x.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    choice = launch_choice(d)
    launch(
        _rope_kernel,
        (T * triton.cdiv(B * n, choice["BLOCK_M"]),),
        x, cos.contiguous(), sin.contiguous(), y,
        B, T, n,
        x.stride(0), x.stride(1), x.stride(2),
        WIDE=wide(x.dtype), INVERSE=inverse, **choice,
    )  # fmt: skip
    return y


@torch.library.custom_op("hrm_kernels::rope", mutates_args=())
def _rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return _rotated(x, cos, sin, inverse)


@_rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx, dy: Tensor) -> tuple[Tensor, None, None, None]:
    # x is the only input with a gradient, so the backward runs only if it is required.
    return _rope(dy, *ctx.saved_tensors, not ctx.inverse), None, None, None


_rope.register_autograd(_differentiate, setup_context=_save)


def check_tables(op: str, cos: Tensor, sin: Tensor, length: int, head_dim: int, device: torch.device) -> None:
    """Checks that both tables are (length, head_dim), on the device, and without gradient."""
    check_floating(op, cos=cos)
    check_floating(op, sin=sin)
    for name, table in (("cos", cos), ("sin", sin)):
        check_shape(op, name, table, (length, head_dim))
        if table.device != device:
            raise ValueError(f"{op}: {name} must be on {device}, got {table.device}")
        if table.requires_grad:
            raise ValueError(f"{op}: {name} is a constant table, but it requires a gradient")


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates head vectors by the angles of their positions.

    x: (B, T, n, d), d even; n counts all heads to rotate, so queries and keys are passed together, possibly
    as a view of packed projections. cos, sin: (T, d) from `rope_tables`, constants. Returns (B, T, n, d),
    contiguous, in x's dtype, computed in float32 (float64 for float64) and rounded once. Raises ValueError or
    TypeError naming the argument. Source: Su et al. 2021 (arXiv 2104.09864).
    """
    check_floating("rope", x=x)
    if x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(f"rope: x must be (B, T, n, d) with d even, got {tuple(x.shape)}")
    check_tables("rope", cos, sin, x.shape[1], x.shape[3], x.device)
    return checked_rope(x, cos, sin)


def checked_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rope` of arguments that the caller has checked."""
    if use_triton("rope", x):
        return _rope(x, cos, sin, False)
    return rope_reference(x, cos, sin)
