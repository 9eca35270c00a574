"""The inner loop of the fused products x @ weight^T, their tiles, and the conditions for their use.

A program computes a tile of (BLOCK_M, BLOCK_N) outputs in registers; the calling kernel adds the epilogue.
Programs of the same rows are consecutive, so that a tile of x is read from memory once and then from the L2
cache, where the weights stay.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.backend import Tile, jit, tl, triton, tunable, use_triton
from kernels.checks import accumulate_dtype, check_floating


def fitted(choice: Tile, N: int, K: int) -> Tile:
    """A launch whose tile does not exceed the product, and whether K is a multiple of the tile."""
    # Use the power of two that covers a small N or K, at least the tensor cores' minimum.
    for block, size in (("BLOCK_N", N), ("BLOCK_K", K)):
        choice[block] = min(choice[block], max(16, triton.next_power_of_2(size)))
    return {**choice, "EVEN_K": K % choice["BLOCK_K"] == 0}


def launch_variants(dtype: torch.dtype, N: int, K: int) -> list[Tile]:
    """Variants with smaller tiles, so that two programs share a multiprocessor, and other depths, for tensor
    cores."""
    if dtype.itemsize > 2 or K % 16:
        return []
    names = "BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"
    tried = ((128, 256, 64, 8, 4), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (64, 256, 64, 4, 4))
    found: list[Tile] = []
    for each in (fitted(dict(zip(names, sizes, strict=True)), N, K) for sizes in tried):
        if each not in found:
            found.append(each)
    return found


@tunable(launch_variants)
def launch_choice(dtype: torch.dtype, N: int, K: int) -> Tile:
    """Tiles of a product (M, K) x (K, N): the largest whose sums fit into registers, for any M.

    A 128 x 256 tile has 128 sums per thread and 85 multiply-adds per element read from the L2 cache, whose
    bandwidth limits smaller tiles. A stage of 64 columns takes 48 KiB: Triton allocates two if products read
    registers (96 of the 99 KiB of sm_86, 89, 120) and three if they read shared memory.
    """
    if dtype.itemsize > 2 or K % 16:
        # Without tensor cores, or with rows too misaligned for asynchronous copies, registers also hold
        # operands.
        choice: Tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 3}
    elif N % 16:
        # The addresses of misaligned rows take additional registers.
        choice = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    else:
        choice = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    return fitted(choice, N, K)


@jit
def place(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    # The first row and column of this program's tile, and the number of rows and columns from there.
    tile, tiles_n = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    row, col = (tile // tiles_n).to(tl.int64) * BLOCK_M, (tile % tiles_n).to(tl.int64) * BLOCK_N
    return row, col, tl.minimum(M - row, BLOCK_M).to(tl.int32), tl.minimum(N - col, BLOCK_N).to(tl.int32)


@jit
def product(
    acc,
    x_ptr, weight_ptr,
    rows, outs,
    K,
    x_stride_m, weight_stride_n,
    DOT: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # acc + x[rows] @ weight[outs]^T. Rows and outs are clamped at the end, so that only the tail of K needs a
    # mask; x_ptr points to the tile's first row, so that offsets fit into 32 bits.
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows[:, None] * x_stride_m + k[None, :]
    weight_ptrs = weight_ptr + outs[None, :] * weight_stride_n + k[:, None]
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=k[None, :] < K - start, other=0.0)
            weight = tl.load(weight_ptrs, mask=k[:, None] < K - start, other=0.0)
        acc = tl.dot(x.to(DOT), weight.to(DOT), acc, input_precision="ieee", out_dtype=acc.dtype)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    return acc


@jit
def deferred_rstd(mean_square_ptr, rows, PARTS: tl.constexpr):
    # The factors of some rows with contiguous parts; see `rstd_of`.
    mean_square_ptrs = mean_square_ptr + rows * PARTS
    mean_square = tl.load(mean_square_ptrs)
    for part in tl.static_range(1, PARTS):
        mean_square += tl.load(mean_square_ptrs + part)
    return 1.0 / tl.sqrt(mean_square)


def rstd_of(mean_square: Tensor) -> Tensor:
    """The factor of a deferred norm, (...), from the parts (..., P) that `linear_rms` returns."""
    return torch.rsqrt(mean_square.sum(-1))


def check_product(op: str, x: Tensor, weight: Tensor, mean_square: Tensor | None) -> None:
    """x: (..., K); weight: (N, K), same dtype; mean_square: (..., P) in the dtype of sums, or None."""
    check_floating(op, x=x, weight=weight)
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"{op}: weight must have shape (N, {x.shape[-1]}), got {tuple(weight.shape)}")
    if mean_square is not None:
        check_mean_square(op, "mean_square", x, mean_square)


def check_mean_square(op: str, name: str, rows: Tensor, mean_square: Tensor) -> None:
    """Checks that there is at least one part per row, in the dtype of sums."""
    shape = tuple(rows.shape[:-1])
    if tuple(mean_square.shape[:-1]) != shape or not mean_square.shape[-1]:
        expected = f"({', '.join(map(str, (*shape, 'P')))})"
        raise ValueError(f"{op}: {name} must have shape {expected}, got {tuple(mean_square.shape)}")
    wanted = accumulate_dtype(rows.dtype)
    if mean_square.dtype != wanted or mean_square.device != rows.device:
        raise TypeError(
            f"{op}: {name} must be {wanted} on {rows.device}, got {mean_square.dtype} on {mean_square.device}"
        )


def parts_of(mean_square: Tensor | None) -> tuple[Tensor | None, int]:
    """`mean_square` in the kernel's form: contiguous rows, and the number of parts."""
    return (None, 0) if mean_square is None else (mean_square.contiguous(), mean_square.shape[-1])


# `linear_scaled` and `linear_rms` are measured together: one defers a factor that the other applies.
DEFERRED = "deferred_norm"


def takes_kernel(op: str, tensor: Tensor, weight: Tensor | None = None, **others: Any) -> bool:
    """Whether `op` runs its kernel for `tensor`; the arguments are those of `choose`.

    Without a measurement, float32 uses the kernel only if the backend is requested: without tensor cores the
    library's product is faster.
    """
    slower = "without tensor cores the library's product is faster" if tensor.dtype == torch.float32 else None
    return use_triton(op, tensor, slower=slower, weight=weight, **others)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def use_fused(op: str, *tensors: Tensor | None, measured_as: str | None = None) -> bool:
    """Whether `op`, which has no backward, runs as one kernel: see `takes_kernel` for the first tensor."""
    first = tensors[0]
    assert first is not None
    return takes_kernel(op, first, measured_as=measured_as) and not wants_gradient(*tensors)
