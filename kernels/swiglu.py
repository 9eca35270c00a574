"""SwiGLU's elementwise half.

Forward:    y = silu(gate) * up, with silu(g) = g * sigmoid(g)
Backward:   dup = dy * silu(gate);  dgate = dy * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))

Saved: only the packed input; the sigmoid is recomputed.
Bytes, in elements for N outputs: 2N read and N written forward; 3N read and 2N written backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Tile, jit, launch, tl, triton, tunable, use_triton, wide
from kernels.checks import accumulate_dtype, as_rows, cast, check_floating


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The product in plain PyTorch; see `swiglu`."""
    gate, up = cast(gate_up, accumulate_dtype(gate_up.dtype)).chunk(2, dim=-1)
    return cast(F.silu(gate) * up, gate_up.dtype)


def launch_variants(width: int) -> list[Tile]:
    """Variants with half and twice as many outputs per tile."""
    BLOCK_N = min(512, max(16, triton.next_power_of_2(width)))
    tried = ((1024, 4), (2048, 8), (4096, 8))
    return [{"BLOCK_M": size // BLOCK_N, "BLOCK_N": BLOCK_N, "num_warps": w} for size, w in tried]


@tunable(launch_variants)
def launch_choice(width: int) -> Tile:
    """Tiles of 2048 outputs, 16 per thread, at most 512 wide, so that 1536 columns fill whole tiles."""
    BLOCK_N = min(512, max(16, triton.next_power_of_2(width)))
    return {"BLOCK_M": 2048 // BLOCK_N, "BLOCK_N": BLOCK_N, "num_warps": 4}


@jit
def _swiglu_forward_kernel(
    gate_up_ptr, y_ptr,
    M, N,
    gate_up_stride_m, y_stride_m,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Tiles of the same rows are consecutive, so that memory is read in order.
    tile = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    rows = (tile // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    gate_ptrs = gate_up_ptr + rows[:, None] * gate_up_stride_m + cols[None, :]
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(WIDE)
    up = tl.load(gate_ptrs + N, mask=mask, other=0.0).to(WIDE)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + rows[:, None] * y_stride_m + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _swiglu_backward_kernel(
    dy_ptr, gate_up_ptr, dgate_up_ptr,
    M, N,
    dy_stride_m, gate_up_stride_m, dgate_up_stride_m,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    rows = (tile // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    gate_ptrs = gate_up_ptr + rows[:, None] * gate_up_stride_m + cols[None, :]
    dgate_ptrs = dgate_up_ptr + rows[:, None] * dgate_up_stride_m + cols[None, :]
    dy = tl.load(dy_ptr + rows[:, None] * dy_stride_m + cols[None, :], mask=mask, other=0.0).to(WIDE)
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(WIDE)
    up = tl.load(gate_ptrs + N, mask=mask, other=0.0).to(WIDE)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dup = dy * gate * sigmoid
    tl.store(dgate_ptrs, dgate.to(dgate_up_ptr.dtype.element_ty), mask=mask)
    tl.store(dgate_ptrs + N, dup.to(dgate_up_ptr.dtype.element_ty), mask=mask)


def _forward(gate_up: Tensor) -> Tensor:
    gate_up_rows = as_rows(gate_up)
    M, N = gate_up_rows.shape[0], gate_up_rows.shape[1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], N)
    choice = launch_choice(N)
    launch(
        _swiglu_forward_kernel,
        (triton.cdiv(M, choice["BLOCK_M"]) * triton.cdiv(N, choice["BLOCK_N"]),),
        gate_up_rows, y,
        M, N,
        gate_up_rows.stride(0), N,
        WIDE=wide(gate_up.dtype), **choice,
    )  # fmt: skip
    return y


def _backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    dy_rows, gate_up_rows = as_rows(dy), as_rows(gate_up)
    M, N = dy_rows.shape
    dgate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    choice = launch_choice(N)
    launch(
        _swiglu_backward_kernel,
        (triton.cdiv(M, choice["BLOCK_M"]) * triton.cdiv(N, choice["BLOCK_N"]),),
        dy_rows, gate_up_rows, dgate_up,
        M, N,
        dy_rows.stride(0), gate_up_rows.stride(0), 2 * N,
        WIDE=wide(gate_up.dtype), **choice,
    )  # fmt: skip
    return dgate_up


@torch.library.custom_op("hrm_kernels::swiglu", mutates_args=())
def _swiglu(gate_up: Tensor) -> Tensor:
    return _forward(gate_up)


@_swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("hrm_kernels::swiglu_backward", mutates_args=())
def _swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    return _backward(dy, gate_up)


@_swiglu_backward.register_fake
def _(dy: Tensor, gate_up: Tensor) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy: Tensor) -> Tensor:
    return _swiglu_backward(dy, *ctx.saved_tensors)


_swiglu.register_autograd(_differentiate, setup_context=_save)


def swiglu(gate_up: Tensor) -> Tensor:
    """Gated activation silu(gate) * up of one packed projection.

    gate_up: (..., 2*I), gate first. Returns (..., I) in the same dtype; computed in float32 (float64 for
    float64), rounded once. Raises ValueError or TypeError naming the argument. Source: Shazeer 2020
    (arXiv 2002.05202).
    """
    check_floating("swiglu", gate_up=gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: gate_up must have an even last dimension, got {tuple(gate_up.shape)}")
    return checked_swiglu(gate_up)


def checked_swiglu(gate_up: Tensor) -> Tensor:
    """`swiglu` of an argument that the caller has checked."""
    if use_triton("swiglu", gate_up):
        return _swiglu(gate_up)
    return swiglu_reference(gate_up)
