"""Non-causal softmax attention over packed projections, with rotary embedding in its prologue.

Forward, per batch and head, with q, k, v of shape (T, d) cut from one packed row [q | k | v]:

    q, k = rope(q), rope(k);   P = softmax(q k^T / sqrt(d));   o = P v

Backward:

    dv = P^T do;   dP = do v^T;   dS = P * (dP - rowsum(P * dP)) / sqrt(d);   dq = dS k;   dk = dS^T q

and dq, dk rotated back by rope's inverse.

The kernel takes one batch and head per program: all of its keys and values are one block on chip, so the
softmax sees whole rows and needs no running maximum; queries are processed in tiles. A vector is kept as two
halves x = [x1, x2], as rope requires: q k^T = q1 k1^T + q2 k2^T.

Saved: only qkv. The backward recomputes the rotation, the scores and P, which never leave the chip.
Bytes, in elements for N = B * T * D: 3N read and N written forward, 4N read and 3N written backward; the
tables come from the cache. FLOP: 4 B h T^2 d forward and 10 B h T^2 d backward. At T = 82 tiles pad T^2 to
128 x 128 forward and 128 x 96 backward. At B = 768, D = 512 in 16 bits this is 26 GFLOP and 0.26 GB forward,
and 48 GFLOP and 0.45 GB backward. On a GPU of 790 TFLOP/s and 4.3 TB/s the arithmetic takes 0.03 and 0.06 ms,
the bytes take 0.06 and 0.11 ms, so both directions are bound by bytes. Splitting 82 keys into blocks of 64
and 32 would save a quarter of the arithmetic but no bytes, for twice the code.

Longer sequences go to flash-attn or to PyTorch's scaled_dot_product_attention, after the rope kernel: there
is no tiled kernel here, because those two are fastest for long sequences. PyTorch's is FlashAttention 2 in 16
bits (`SDPA_BACKENDS`); on Hopper flash-attn 3, if installed, is faster.
"""

import math

import torch
from torch import Tensor

from kernels import library_attention as library
from kernels.backend import (
    BackendError,
    Choice,
    Tile,
    absence,
    choose,
    dot,
    explain,
    get_backend,
    jit,
    launch,
    tl,
    triton,
    tunable,
    wide,
)
from kernels.checks import check_floating
from kernels.rope import check_tables, checked_rope, rotate

ATTENTION_BACKENDS = ("auto", "triton", "flash", "sdpa")
# Limits of the Triton kernel: one block of keys and values, and two halves of 64.
MAX_LENGTH, MAX_HEAD_DIM = 128, 128


def _launch(length: int, queries: int, head_dim: int, BLOCK_M: int, num_warps: int, fewest: int = 1) -> Tile:
    """A launch with queries in tiles of BLOCK_M rows."""
    return {
        "TILES": max(fewest, triton.cdiv(queries, BLOCK_M)),
        "HALF": head_dim // 2,
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": max(16, triton.next_power_of_2(length)),
        "BLOCK_H": max(16, triton.next_power_of_2(head_dim // 2)),
        "num_warps": num_warps,
    }


def launch_variants(
    length: int, queries: int, head_dim: int, dtype: torch.dtype, backward: bool
) -> list[Tile]:
    """Other query tiles that may fit into registers in 16 bits."""
    if dtype.itemsize != 2:
        return []
    tried = ((64, 8), (32, 4), (16, 8)) if backward else ((64, 8), (128, 8), (32, 4))
    covers = max(16, triton.next_power_of_2(queries))
    return [_launch(length, queries, head_dim, *each) for each in tried if each[0] <= covers]


@tunable(launch_variants)
def launch_choice(length: int, queries: int, head_dim: int, dtype: torch.dtype, backward: bool) -> Tile:
    """All keys in one block; query tiles as large as registers allow for the tensor cores.

    Forward, a tile's scores take 64 registers per thread of 4 warps. Backward, 8 warps hold the sums of dk
    and dv, so a tile is smaller. In float32, without tensor cores, operands take even more registers; a loop
    over a single tile would be unrolled and spill, so there are at least two tiles.
    """
    if dtype.itemsize == 2:
        BLOCK_M, num_warps, fewest = (32, 8, 1) if backward else (64, 4, 1)
        BLOCK_M = min(BLOCK_M, max(16, triton.next_power_of_2(queries)))
    else:
        BLOCK_M, num_warps, fewest = (16, 8, 2) if backward else (32, 8, 2)
    return _launch(length, queries, head_dim, BLOCK_M, num_warps, fewest)


@jit
def _load_halves(
    x_ptr, cos_ptr, sin_ptr, rows, M, x_stride_m,
    WIDE: tl.constexpr, DOT: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Rows of one head in two halves, rotated if there are tables, as operands of a product."""
    cols = tl.arange(0, BLOCK_H)
    mask = (rows < M)[:, None] & (cols < HALF)[None, :]
    at = x_ptr + rows[:, None] * x_stride_m + cols[None, :]
    x1 = tl.load(at, mask=mask, other=0.0).to(WIDE)
    x2 = tl.load(at + HALF, mask=mask, other=0.0).to(WIDE)
    if cos_ptr is not None:
        at = rows[:, None] * (2 * HALF) + cols[None, :]
        cos = tl.load(cos_ptr + at, mask=mask, other=0.0).to(WIDE)
        # The second mask changes no value. It prevents the compiler from rotating once per operand layout,
        # each time with both tables in registers.
        sin = tl.where(mask, tl.load(sin_ptr + at, mask=mask, other=0.0).to(WIDE), 0.0)
        x1, x2 = rotate(x1, x2, cos, sin)
    return x1.to(DOT), x2.to(DOT)


@jit
def _store_halves(
    dx1, dx2, dx_ptr, cos_ptr, sin_ptr, rows, M, dx_stride_m,
    WIDE: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of the input of `_load_halves`, given the gradient of its output."""
    cols = tl.arange(0, BLOCK_H)
    mask = (rows < M)[:, None] & (cols < HALF)[None, :]
    if cos_ptr is not None:
        at = rows[:, None] * (2 * HALF) + cols[None, :]
        cos = tl.load(cos_ptr + at, mask=mask, other=0.0).to(WIDE)
        sin = tl.load(sin_ptr + at, mask=mask, other=0.0).to(WIDE)
        dx1, dx2 = rotate(dx1, dx2, cos, -sin)
    at = dx_ptr + rows[:, None] * dx_stride_m + cols[None, :]
    tl.store(at, dx1.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(at + HALF, dx2.to(dx_ptr.dtype.element_ty), mask=mask)


@jit
def _product(a, b, acc, WIDE: tl.constexpr):
    """acc + a b."""
    return tl.dot(a, b, acc=acc, out_dtype=WIDE, input_precision="ieee")


@jit
def _attention_forward_kernel(
    qkv_ptr, cos_ptr, sin_ptr, o_ptr,
    T, num_heads, queries,
    qkv_stride_b, qkv_stride_t,
    SCALE: tl.constexpr, WIDE: tl.constexpr, DOT: tl.constexpr, TILES: tl.constexpr, HALF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(0) // num_heads).to(tl.int64), tl.program_id(0) % num_heads
    D = num_heads * 2 * HALF
    q_ptr = qkv_ptr + batch * qkv_stride_b + head * 2 * HALF
    o_ptr += batch * queries * D + head * 2 * HALF
    keys = tl.arange(0, BLOCK_N)
    k1, k2 = _load_halves(q_ptr + D, cos_ptr, sin_ptr, keys, T, qkv_stride_t, WIDE, DOT, HALF, BLOCK_H)
    v1, v2 = _load_halves(q_ptr + 2 * D, None, None, keys, T, qkv_stride_t, WIDE, DOT, HALF, BLOCK_H)
    # Compute exp(x) as exp2(x log2(e)), with the scale in the same factor.
    FACTOR: tl.constexpr = SCALE * 1.4426950408889634
    for tile in range(TILES):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        q1, q2 = _load_halves(q_ptr, cos_ptr, sin_ptr, rows, T, qkv_stride_t, WIDE, DOT, HALF, BLOCK_H)
        scores = _product(q2, tl.trans(k2), _product(q1, tl.trans(k1), None, WIDE), WIDE)
        scores = tl.where((keys < T)[None, :], scores, float("-inf"))
        p = tl.exp2(scores * FACTOR - (tl.max(scores, axis=1) * FACTOR)[:, None])
        norm = (1 / tl.sum(p, axis=1))[:, None]
        p = p.to(DOT)
        o1, o2 = _product(p, v1, None, WIDE) * norm, _product(p, v2, None, WIDE) * norm
        _store_halves(o1, o2, o_ptr, None, None, rows, queries, D, WIDE, HALF, BLOCK_H)


@jit
def _attention_backward_kernel(
    do_ptr, qkv_ptr, cos_ptr, sin_ptr, dqkv_ptr,
    T, num_heads, queries,
    do_stride_b, do_stride_t, qkv_stride_b, qkv_stride_t,
    SCALE: tl.constexpr, WIDE: tl.constexpr, DOT: tl.constexpr, TILES: tl.constexpr, HALF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(0) // num_heads).to(tl.int64), tl.program_id(0) % num_heads
    D = num_heads * 2 * HALF
    do_ptr += batch * do_stride_b + head * 2 * HALF
    q_ptr = qkv_ptr + batch * qkv_stride_b + head * 2 * HALF
    dq_ptr = dqkv_ptr + batch * T * 3 * D + head * 2 * HALF
    keys = tl.arange(0, BLOCK_N)
    k1, k2 = _load_halves(q_ptr + D, cos_ptr, sin_ptr, keys, T, qkv_stride_t, WIDE, DOT, HALF, BLOCK_H)
    v1, v2 = _load_halves(q_ptr + 2 * D, None, None, keys, T, qkv_stride_t, WIDE, DOT, HALF, BLOCK_H)
    zero = tl.zeros((BLOCK_N, BLOCK_H), WIDE)
    dk1, dk2, dv1, dv2 = zero, zero, zero, zero
    FACTOR: tl.constexpr = SCALE * 1.4426950408889634
    for tile in range(TILES):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        q1, q2 = _load_halves(q_ptr, cos_ptr, sin_ptr, rows, T, qkv_stride_t, WIDE, DOT, HALF, BLOCK_H)
        # Rows beyond `queries` have do = 0, so they add nothing to the sums and their dq is 0.
        do1, do2 = _load_halves(do_ptr, None, None, rows, queries, do_stride_t, WIDE, DOT, HALF, BLOCK_H)
        # Scores, P, dP and dS are transposed here, (keys, queries), so that they are left operands of dk and
        # dv without a layout change, and keys and values are their left operands, split between the warps.
        scores = _product(k2, tl.trans(q2), _product(k1, tl.trans(q1), None, WIDE), WIDE)
        scores = tl.where((keys < T)[:, None], scores, float("-inf"))
        p = tl.exp2(scores * FACTOR - (tl.max(scores, axis=0) * FACTOR)[None, :])
        p = p * (1 / tl.sum(p, axis=0))[None, :]
        dp = _product(v2, tl.trans(do2), _product(v1, tl.trans(do1), None, WIDE), WIDE)
        # Scale after the sums, so that small gradients do not underflow in 16 bits.
        ds = (p * (dp - tl.sum(p * dp, axis=0)[None, :])).to(DOT)
        dq1 = _product(tl.trans(ds), k1, None, WIDE) * SCALE
        dq2 = _product(tl.trans(ds), k2, None, WIDE) * SCALE
        _store_halves(dq1, dq2, dq_ptr, cos_ptr, sin_ptr, rows, T, 3 * D, WIDE, HALF, BLOCK_H)
        dv1, dv2 = _product(p.to(DOT), do1, dv1, WIDE), _product(p.to(DOT), do2, dv2, WIDE)
        dk1, dk2 = _product(ds, q1, dk1, WIDE), _product(ds, q2, dk2, WIDE)
    # Rows outside all tiles are beyond `queries` too.
    for tile in range(TILES, BLOCK_N // BLOCK_M):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        none = tl.zeros((BLOCK_M, BLOCK_H), WIDE)
        _store_halves(none, none, dq_ptr, None, None, rows, T, 3 * D, WIDE, HALF, BLOCK_H)
    _store_halves(dv1, dv2, dq_ptr + 2 * D, None, None, keys, T, 3 * D, WIDE, HALF, BLOCK_H)
    dk1, dk2 = dk1 * SCALE, dk2 * SCALE
    _store_halves(dk1, dk2, dq_ptr + D, cos_ptr, sin_ptr, keys, T, 3 * D, WIDE, HALF, BLOCK_H)


def _forward(qkv: Tensor, num_heads: int, cos: Tensor | None, sin: Tensor | None, queries: int) -> Tensor:
    qkv, cos, sin = _dense(qkv), _table(cos), _table(sin)
    B, T, width = qkv.shape
    d = width // (3 * num_heads)
    o = qkv.new_empty(B, queries, num_heads * d)
    choice = launch_choice(T, queries, d, qkv.dtype, backward=False)
    launch(
        _attention_forward_kernel,
        (B * num_heads,),
        qkv, cos, sin, o,
        T, num_heads, queries,
        qkv.stride(0), qkv.stride(1),
        SCALE=1 / math.sqrt(d), WIDE=wide(qkv.dtype), DOT=dot(qkv.dtype), **choice,
        num_stages=1,
    )  # fmt: skip
    return o


def _backward(do: Tensor, qkv: Tensor, num_heads: int, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    do, qkv, cos, sin = _dense(do), _dense(qkv), _table(cos), _table(sin)
    B, T, width = qkv.shape
    d, queries = width // (3 * num_heads), do.shape[1]
    dqkv = qkv.new_empty(B, T, width)
    choice = launch_choice(T, queries, d, qkv.dtype, backward=True)
    launch(
        _attention_backward_kernel,
        (B * num_heads,),
        do, qkv, cos, sin, dqkv,
        T, num_heads, queries,
        do.stride(0), do.stride(1), qkv.stride(0), qkv.stride(1),
        SCALE=1 / math.sqrt(d), WIDE=wide(qkv.dtype), DOT=dot(qkv.dtype), **choice,
        num_stages=1,
    )  # fmt: skip
    return dqkv


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _table(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.contiguous()


@torch.library.custom_op("hrm_kernels::attention", mutates_args=())
def _attention(qkv: Tensor, num_heads: int, cos: Tensor | None, sin: Tensor | None, queries: int) -> Tensor:
    return _forward(qkv, num_heads, cos, sin, queries)


@_attention.register_fake
def _(qkv: Tensor, num_heads: int, cos: Tensor | None, sin: Tensor | None, queries: int) -> Tensor:
    return qkv.new_empty(qkv.shape[0], queries, qkv.shape[2] // 3)


@torch.library.custom_op("hrm_kernels::attention_backward", mutates_args=())
def _attention_backward(
    do: Tensor, qkv: Tensor, num_heads: int, cos: Tensor | None, sin: Tensor | None
) -> Tensor:
    return _backward(do, qkv, num_heads, cos, sin)


@_attention_backward.register_fake
def _(do: Tensor, qkv: Tensor, num_heads: int, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output) -> None:
    qkv, ctx.num_heads, cos, sin, _ = inputs
    ctx.save_for_backward(qkv, cos, sin)


def _differentiate(ctx, do: Tensor) -> tuple[Tensor, None, None, None, None]:
    # qkv is the only input with a gradient, so the backward runs only if it is required.
    qkv, cos, sin = ctx.saved_tensors
    return _attention_backward(do, qkv, ctx.num_heads, cos, sin), None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)


def triton_limit(length: int, head_dim: int) -> str | None:
    """The reason why the Triton kernel does not support these sizes; None if it does."""
    if length > MAX_LENGTH:
        return f"its kernel takes at most {MAX_LENGTH} positions, got {length}"
    if head_dim > MAX_HEAD_DIM or head_dim % 2:
        return f"its kernel takes an even head_dim of at most {MAX_HEAD_DIM}, got {head_dim}"
    return None


def attention_backend(
    length: int, head_dim: int, dtype: torch.dtype, device: str, *, triton: bool, flash_attn: bool
) -> str:
    """The choice of `auto` among triton, flash and sdpa: the kernel if a head fits on chip, else the best
    library.

    device: the type, such as cuda. triton, flash_attn: whether they can run here (for Triton, the result of
    `use_triton` for the tensor: on CUDA and in the interpreter, for float64 only if selected).
    """
    if triton and triton_limit(length, head_dim) is None:
        return "triton"
    if flash_attn and library.flash_limit(head_dim, dtype, device) is None:
        return "flash"
    return "sdpa"


def _check_named(backend: str, length: int, head_dim: int, qkv: Tensor) -> None:
    """Raises BackendError if the selected backend does not support these tensors here."""
    obstacle = None
    if backend == "triton":
        obstacle = absence(qkv.device) or triton_limit(length, head_dim)
    elif backend == "flash":
        obstacle = library.flash_limit(head_dim, qkv.dtype, qkv.device.type)
        if not library.has_flash():
            obstacle = "flash-attn 2.6 or later is not installed (pip install flash-attn)"
    if obstacle is not None:
        raise BackendError(f"attention: backend {backend!r} was requested, but {obstacle}; use 'auto'")


def attention(
    qkv: Tensor,
    num_heads: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    queries: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Full self-attention over all positions, with concatenated heads.

    qkv: (B, T, 3*D), each row [q heads | k heads | v heads]. cos, sin: (T, D/num_heads) constant tables to
    rotate q and k, or None for no rotation. queries: number of first positions to compute (default: all).
    Returns (B, T or queries, D) in qkv's dtype; rotation, softmax and sums are computed in float32 for
    narrower inputs, products in qkv's dtype.

    backend: triton is the kernel of this file, for T <= 128 and an even head_dim <= 128. flash is flash-attn
    3 or 2 (2.6 or later), and sdpa is PyTorch's own attention, both after `rope`. auto is the fastest by
    measurement, else the choice of `attention_backend`. With `set_backend("triton")` auto still takes flash
    or sdpa for longer T; with `set_backend("reference")` it takes only sdpa. Raises ValueError or TypeError
    naming the argument, BackendError if a selected backend is missing or does not support the arguments.
    Source: Vaswani et al. 2017 (arXiv 1706.03762).
    """
    check_floating("attention", qkv=qkv)
    if qkv.dim() != 3 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"attention: qkv must be (B, T, 3*D) with D a multiple of num_heads={num_heads}, "
            f"got {tuple(qkv.shape)}"
        )
    length, head_dim = qkv.shape[1], qkv.shape[2] // (3 * num_heads)
    if (cos is None) != (sin is None):
        raise ValueError("attention: cos and sin must both be given; got only one of them")
    if cos is not None and sin is not None:
        if head_dim % 2:
            raise ValueError(f"attention: cos and sin need an even D/num_heads to rotate, got {head_dim}")
        check_tables("attention", cos, sin, length, head_dim, qkv.device)
    if queries is not None and not 1 <= queries <= length:
        raise ValueError(f"attention: queries must be in 1..{length}, got {queries}")
    if backend not in ATTENTION_BACKENDS:
        expected = ", ".join(ATTENTION_BACKENDS)
        raise ValueError(f"attention: backend must be one of {expected}, got {backend!r}")

    if backend != "auto":
        _check_named(backend, length, head_dim, qkv)
    elif get_backend() == "reference":
        return library.attention_reference(qkv, num_heads, cos, sin, queries)
    else:
        taken = choose("attention", qkv, sizes=(length, num_heads, queries or length))
        backend = taken
        if taken in ("triton", "reference"):
            runs, device = taken == "triton", qkv.device.type
            backend = attention_backend(
                length, head_dim, qkv.dtype, device, triton=runs, flash_attn=library.has_flash()
            )
            limit = triton_limit(length, head_dim)
            if runs and limit is not None:
                explain("attention", Choice("reference", limit))
    if backend == "triton":
        return _attention(qkv, num_heads, cos, sin, length if queries is None else queries)
    q, k, v = library.split_heads(qkv, num_heads, cos, sin, queries, checked_rope)
    return library.flash(q, k, v) if backend == "flash" else library.sdpa(q, k, v)
