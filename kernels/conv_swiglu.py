"""SwiGLU's elementwise half followed by a short convolution over the tokens, as in URM.

Forward, per channel, for the tokens t of a sequence:
    s_t = silu(gate_t) * up_t;  c_t = w_0 * s_(t-1) + w_1 * s_t + b, with s_(-1) = 0;  y_t = silu(c_t)
Backward:
    dc_t = dy_t * silu'(c_t);  ds_t = w_1 * dc_t + w_0 * dc_(t+1), with dc_T = 0
    dup_t = ds_t * silu(gate_t);  dgate_t = ds_t * up_t * silu'(gate_t)
    dw_0 = sum of dc_t * s_(t-1);  dw_1 = sum of dc_t * s_t;  db = sum of dc_t, over all tokens
with silu'(x) = sigmoid(x) * (1 + x * (1 - sigmoid(x))).

Saved: the packed input, weight and bias; everything else is recomputed.
Bytes, in elements for N outputs: 2N read and N written forward; 3N read and 2N written backward. A token's
neighbours are read again, from the cache. A program processes a range of rows, so that it writes its sums of
the weights' gradients once, and torch.sum adds the programs in a fixed order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Tile, jit, launch, tl, triton, tunable, use_triton, wide
from kernels.checks import accumulate_dtype, as_rows, check_floating, check_shape

# Number of programs that fill a large GPU, eight per multiprocessor of 132; fixed, to fix the order of sums.
PROGRAMS = 1056


def conv_swiglu_reference(gate_up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The operations in plain PyTorch; see `conv_swiglu`."""
    wide = accumulate_dtype(gate_up.dtype)
    gate, up = gate_up.to(wide).chunk(2, dim=-1)
    s, (w_0, w_1) = F.silu(gate) * up, weight.to(wide).unbind(1)
    before = F.pad(s[..., :-1, :], (0, 0, 1, 0))
    return F.silu(w_0 * before + w_1 * s + bias.to(wide)).to(gate_up.dtype)


def launch_variants(width: int) -> list[Tile]:
    """Variants with half and twice as many outputs per tile."""
    BLOCK_N = min(256, max(16, triton.next_power_of_2(width)))
    return [{"BLOCK_M": size // BLOCK_N, "BLOCK_N": BLOCK_N, "num_warps": 4} for size in (512, 1024, 2048)]


@tunable(launch_variants)
def launch_choice(width: int) -> Tile:
    """Tiles of 1024 outputs, 8 per thread, because a thread keeps three neighbours and three sums for
    each."""
    BLOCK_N = min(256, max(16, triton.next_power_of_2(width)))
    return {"BLOCK_M": 1024 // BLOCK_N, "BLOCK_N": BLOCK_N, "num_warps": 4}


@jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@jit
def _silu_slope(x):
    sigmoid = _sigmoid(x)
    return sigmoid * (1.0 + x * (1.0 - sigmoid))


@jit
def _gate_up(gate_up_ptr, gate_up_stride_m, rows, cols, mask, N, WIDE: tl.constexpr):
    # Gate and up of some rows, 0 where masked.
    gate_ptrs = gate_up_ptr + rows[:, None] * gate_up_stride_m + cols[None, :]
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(WIDE)
    return gate, tl.load(gate_ptrs + N, mask=mask, other=0.0).to(WIDE)


@jit
def _conv_swiglu_forward_kernel(
    gate_up_ptr, weight_ptr, bias_ptr, y_ptr,
    M, T, N,
    gate_up_stride_m,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Tiles of the same rows are consecutive, so that memory is read in order.
    tile, tiles_n = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    rows = (tile // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    w_0 = tl.load(weight_ptr + 2 * cols, mask=cols < N, other=0.0).to(WIDE)[None, :]
    w_1 = tl.load(weight_ptr + 2 * cols + 1, mask=cols < N, other=0.0).to(WIDE)[None, :]
    bias = tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(WIDE)[None, :]
    gate, up = _gate_up(gate_up_ptr, gate_up_stride_m, rows, cols, mask, N, WIDE)
    follows = mask & (rows % T > 0)[:, None]
    gate_before, up_before = _gate_up(gate_up_ptr, gate_up_stride_m, rows - 1, cols, follows, N, WIDE)
    before = gate_before * _sigmoid(gate_before) * up_before
    c = w_0 * before + w_1 * gate * _sigmoid(gate) * up + bias
    y = (c * _sigmoid(c)).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y, mask=mask)


@jit
def _conv_swiglu_backward_kernel(
    dy_ptr, gate_up_ptr, weight_ptr, bias_ptr, dgate_up_ptr, sums_ptr,
    M, T, N, TILES,
    dy_stride_m, gate_up_stride_m,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    span = tl.program_id(0) // tiles_n
    cols = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    w_0 = tl.load(weight_ptr + 2 * cols, mask=cols < N, other=0.0).to(WIDE)[None, :]
    w_1 = tl.load(weight_ptr + 2 * cols + 1, mask=cols < N, other=0.0).to(WIDE)[None, :]
    bias = tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(WIDE)[None, :]
    dw_0 = tl.zeros((BLOCK_M, BLOCK_N), WIDE)
    dw_1 = tl.zeros((BLOCK_M, BLOCK_N), WIDE)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), WIDE)
    for tile in range(span * TILES, (span + 1) * TILES):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        follows, leads = mask & (rows % T > 0)[:, None], mask & (rows % T < T - 1)[:, None]
        gate, up = _gate_up(gate_up_ptr, gate_up_stride_m, rows, cols, mask, N, WIDE)
        s = gate * _sigmoid(gate) * up
        gate_near, up_near = _gate_up(gate_up_ptr, gate_up_stride_m, rows - 1, cols, follows, N, WIDE)
        before = gate_near * _sigmoid(gate_near) * up_near
        gate_near, up_near = _gate_up(gate_up_ptr, gate_up_stride_m, rows + 1, cols, leads, N, WIDE)
        after = gate_near * _sigmoid(gate_near) * up_near
        dy_ptrs = dy_ptr + rows[:, None] * dy_stride_m + cols[None, :]
        dc = tl.load(dy_ptrs, mask=mask, other=0.0).to(WIDE)
        dc *= _silu_slope(w_0 * before + w_1 * s + bias)
        dc_after = tl.load(dy_ptrs + dy_stride_m, mask=leads, other=0.0).to(WIDE)
        dc_after *= _silu_slope(w_0 * s + w_1 * after + bias)
        ds = w_1 * dc + w_0 * dc_after
        dgate_ptrs = dgate_up_ptr + rows[:, None] * (2 * N) + cols[None, :]
        dgate, dup = ds * up * _silu_slope(gate), ds * gate * _sigmoid(gate)
        tl.store(dgate_ptrs, dgate.to(dgate_up_ptr.dtype.element_ty), mask=mask)
        tl.store(dgate_ptrs + N, dup.to(dgate_up_ptr.dtype.element_ty), mask=mask)
        dw_0 += dc * before
        dw_1 += dc * s
        dbias += dc
    sums_ptrs = sums_ptr + span.to(tl.int64) * 3 * N + cols
    tl.store(sums_ptrs, tl.sum(dw_0, axis=0), mask=cols < N)
    tl.store(sums_ptrs + N, tl.sum(dw_1, axis=0), mask=cols < N)
    tl.store(sums_ptrs + 2 * N, tl.sum(dbias, axis=0), mask=cols < N)


def _forward(gate_up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    gate_up_rows = as_rows(gate_up)
    M, N = gate_up_rows.shape[0], gate_up_rows.shape[1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], N)
    choice = launch_choice(N)
    launch(
        _conv_swiglu_forward_kernel,
        (triton.cdiv(M, choice["BLOCK_M"]) * triton.cdiv(N, choice["BLOCK_N"]),),
        gate_up_rows, weight.contiguous(), bias.contiguous(), y,
        M, gate_up.shape[-2], N,
        gate_up_rows.stride(0),
        WIDE=wide(gate_up.dtype), **choice,
    )  # fmt: skip
    return y


def _backward(dy: Tensor, gate_up: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate_up, weight and bias."""
    dy_rows, gate_up_rows = as_rows(dy), as_rows(gate_up)
    M, N = dy_rows.shape
    dgate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    choice = launch_choice(N)
    tiles, tiles_n = triton.cdiv(M, choice["BLOCK_M"]), triton.cdiv(N, choice["BLOCK_N"])
    tiles_each = max(1, triton.cdiv(tiles, max(1, PROGRAMS // tiles_n)))
    spans = triton.cdiv(tiles, tiles_each)
    sums = gate_up.new_empty((spans, 3, N), dtype=accumulate_dtype(gate_up.dtype))
    launch(
        _conv_swiglu_backward_kernel,
        (spans * tiles_n,),
        dy_rows, gate_up_rows, weight.contiguous(), bias.contiguous(), dgate_up, sums,
        M, gate_up.shape[-2], N, tiles_each,
        dy_rows.stride(0), gate_up_rows.stride(0),
        WIDE=wide(gate_up.dtype), **choice,
    )  # fmt: skip
    dw_0, dw_1, dbias = sums.sum(0).to(gate_up.dtype).unbind(0)
    return dgate_up, torch.stack((dw_0, dw_1), dim=1), dbias.clone()


@torch.library.custom_op("hrm_kernels::conv_swiglu", mutates_args=())
def _conv_swiglu(gate_up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _forward(gate_up, weight, bias)


@_conv_swiglu.register_fake
def _(gate_up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("hrm_kernels::conv_swiglu_backward", mutates_args=())
def _conv_swiglu_backward(
    dy: Tensor, gate_up: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(dy, gate_up, weight, bias)


@_conv_swiglu_backward.register_fake
def _(dy: Tensor, gate_up: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dgate_up, dweight, dbias = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (gate_up, weight, bias)
    )
    return dgate_up, dweight, dbias


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _conv_swiglu_backward(dy, *ctx.saved_tensors)


_conv_swiglu.register_autograd(_differentiate, setup_context=_save)


def conv_swiglu(gate_up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu(conv(silu(gate) * up)), conv depthwise and causal over the tokens with two taps and a bias.

    gate_up: (..., T, 2*I), gate first; weight: (I, 2), the tap of the token before and of the token itself;
    bias: (I,), all of one dtype. The token before the first is 0. Returns (..., T, I) in that dtype; computed
    in float32 (float64 for float64), rounded once. Raises ValueError or TypeError naming the argument.
    Source: Gao et al. 2025, Universal Reasoning Model (arXiv 2512.14693) and its code.
    """
    check_floating("conv_swiglu", gate_up=gate_up, weight=weight, bias=bias)
    if gate_up.dim() < 2 or gate_up.shape[-1] % 2:
        raise ValueError(f"conv_swiglu: gate_up must have shape (..., T, 2*I), got {tuple(gate_up.shape)}")
    inner = gate_up.shape[-1] // 2
    check_shape("conv_swiglu", "weight", weight, (inner, 2))
    check_shape("conv_swiglu", "bias", bias, (inner,))
    if use_triton("conv_swiglu", gate_up, weight=weight):
        return _conv_swiglu(gate_up, weight, bias)
    return conv_swiglu_reference(gate_up, weight, bias)
