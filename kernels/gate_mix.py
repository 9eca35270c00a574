"""Gated mixing of a reasoning module's sources.

Forward, per token, with the concatenated sources s = [z, o, x] of D elements each:

    p = W1 s + b1;   hidden = silu(p);   a = W2 hidden + b2;   g = sigmoid(a) = [g_z, g_o, g_x]
    y = g_z z + g_o o + g_x x

With two sources (x absent) the columns of W1 and the rows of W2 and b2 for x contribute nothing, so they are
not read and their gradient is zero.

Backward:
    dg = [dy z, dy o, dy x];   da = dg g (1 - g);   dhidden = W2^T da;   dp = dhidden silu'(p)
    ds = [g_z dy, g_o dy, g_x dy] + W1^T dp;   dW2 = da hidden^T, db2 = sum da, dW1 = dp s^T, db1 = sum dp

Saved: the inputs. Recomputed: p, hidden and the gates; a kernel over rows gives ds and, for a second kernel
over the columns of the weights, hidden and dp, which are narrow (R = D/4). Gates and their gradients, three
times as wide as a source, stay on chip. Unneeded gradients are not computed: each source of ds separately;
the weights all four or none. Without weight gradients the second kernel, hidden and dp are not needed.

Bytes, in elements of z's dtype for S sources of N = rows * D: forward S N read and N written; in pieces,
with [z, o, x], hidden and g in memory, 4 S N + 2 N and more. The sources of a tile of rows do not fit on chip
together with the products, so the mixing reads them again, from the last columns to the first: the last
columns are still in the L2 cache. Backward, over rows: S N read twice, dy once per source and per required
gradient, ds and N/2 of hidden and dp written; over columns: S N read, dy once per source, and hidden and dp
once per chunk of columns; repeated reads are mostly from the L2 cache.
Products: 4 S D R FLOP per token forward, 12 S D R backward with all gradients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import dot, jit, launch, tl, triton, use_triton, wide
from kernels.checks import accumulate_dtype, as_rows, check_floating, check_shape
from kernels.linear import linear

MAX_HIDDEN = 256


def gate_mix_reference(
    z: Tensor, o: Tensor, x: Tensor | None, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tensor:
    """The gate network and the mixing in plain PyTorch; see `gate_mix`."""
    sources = (z, o) if x is None else (z, o, x)
    width = sum(s.shape[-1] for s in sources)
    hidden = F.silu(linear(torch.cat(sources, dim=-1), w1[:, :width], b1))
    gates = torch.sigmoid(linear(hidden, w2[:width], b2[:width])).chunk(len(sources), dim=-1)
    mixed = gates[0] * sources[0]
    for gate, source in zip(gates[1:], sources[1:], strict=True):
        mixed = mixed + gate * source
    return mixed


def launch_choice(hidden: int, dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """Tiles of the three launches for a gate network `hidden` wide.

    Each program reads all weights, 6 D R elements, from the L2 cache, so a forward tile has many rows: as
    many as registers can hold of hidden in float32 (64 per thread). With R = 128 and D = 512, 128 rows read
    0.8 MB of weights and 0.8 MB of sources for 0.1 GFLOP; B = 768, T = 82 has 492 programs. Two buffers of a
    source and W1 keep copies in flight, because registers allow only one block per multiprocessor. The
    backward over rows holds both p and dhidden, so it has half the rows. Float32 products run outside the
    tensor cores with operands in registers, so their tiles are small.
    """
    BLOCK_R = max(16, triton.next_power_of_2(hidden))
    if dtype in (torch.float32, torch.float64):
        forward, rows, weights = (16, 16, 16, 2), (32, 16, 16, 2), (32, 32, 2)
    elif BLOCK_R <= 128:
        forward, rows, weights = (128, 64, 32, 2), (64, 64, 32, 2), (32, 64, 2)
    else:
        forward, rows, weights = (64, 64, 32, 2), (32, 64, 16, 2), (32, 32, 2)
    names = "BLOCK_M", "BLOCK_K", "BLOCK_N", "num_stages"
    shared = {"BLOCK_R": BLOCK_R, "num_warps": 8}
    return {
        "forward": dict(zip(names, forward, strict=True)) | shared,
        "rows": dict(zip(names, rows, strict=True)) | shared,
        "weights": dict(zip(("BLOCK_M", "BLOCK_N", "num_stages"), weights, strict=True)) | shared,
    }


def row_splits(M: int, chunks: int, BLOCK_M: int) -> tuple[int, int]:
    """The number and size of row ranges with separate sums of weight gradients, for `chunks` of columns.

    Two programs per multiprocessor of an H200 (132); whole tiles of rows, so that no row counts twice.
    """
    tiles = max(1, triton.cdiv(M, BLOCK_M))
    part = triton.cdiv(tiles, max(1, min(264 // chunks, tiles)))
    return triton.cdiv(tiles, part), part * BLOCK_M


@jit
def _load(ptr, stride, rows, cols, row_count, col_count):
    """A tile of a matrix with unit stride along its columns, zero beyond its edges."""
    mask = (rows < row_count)[:, None] & (cols < col_count)[None, :]
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@jit
def _project(
    p, s_ptr, s_stride_m, w1_ptr, w1_stride_r,
    M, D, R,
    rows, units,
    WIDE: tl.constexpr, DOT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """p + W1 s over the columns of one source."""
    for start in range(0, D, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        s = _load(s_ptr, s_stride_m, rows, cols, M, D).to(DOT)
        w1 = _load(w1_ptr, w1_stride_r, units, cols, R, D).to(DOT)
        p = tl.dot(s, tl.trans(w1), acc=p, input_precision="ieee", out_dtype=WIDE)
    return p


@jit
def _hidden_layer(
    z_ptr, o_ptr, x_ptr, w1_ptr, b1_ptr,
    M, D, R,
    z_stride_m, o_stride_m, x_stride_m, w1_stride_r,
    rows, units,
    WIDE: tl.constexpr, DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """p = W1 s + b1 of a tile of rows; units beyond R stay zero."""
    b1 = tl.load(b1_ptr + units, mask=units < R, other=0.0).to(WIDE)
    p = tl.zeros((BLOCK_M, BLOCK_R), WIDE) + b1[None, :]
    p = _project(p, z_ptr, z_stride_m, w1_ptr, w1_stride_r, M, D, R, rows, units, WIDE, DOT, BLOCK_K)
    p = _project(p, o_ptr, o_stride_m, w1_ptr + D, w1_stride_r, M, D, R, rows, units, WIDE, DOT, BLOCK_K)
    if x_ptr is not None:
        p = _project(
            p, x_ptr, x_stride_m, w1_ptr + 2 * D, w1_stride_r, M, D, R, rows, units, WIDE, DOT, BLOCK_K
        )
    return p


@jit
def _gate(hidden, w2, b2_ptr, cols, D, WIDE):
    """The gates of one source for a chunk of its columns."""
    b2 = tl.load(b2_ptr + cols, mask=cols < D, other=0.0).to(WIDE)
    return tl.sigmoid(tl.dot(hidden, tl.trans(w2), input_precision="ieee", out_dtype=WIDE) + b2[None, :])


@jit
def _gated(
    hidden, s_ptr, s_stride_m, w2_ptr, w2_stride_n, b2_ptr,
    M, D, R,
    rows, cols, units,
    WIDE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """g s, one source scaled by its gates, for a chunk of its columns."""
    s = _load(s_ptr, s_stride_m, rows, cols, M, D).to(WIDE)
    w2 = _load(w2_ptr, w2_stride_n, cols, units, D, R).to(DOT)
    return _gate(hidden, w2, b2_ptr, cols, D, WIDE) * s


@jit
def _gate_mix_forward_kernel(
    z_ptr, o_ptr, x_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, y_ptr,
    M, D, R,
    z_stride_m, o_stride_m, x_stride_m, w1_stride_r, w2_stride_n, y_stride_m,
    WIDE: tl.constexpr, DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    units = tl.arange(0, BLOCK_R)
    p = _hidden_layer(
        z_ptr, o_ptr, x_ptr, w1_ptr, b1_ptr,
        M, D, R,
        z_stride_m, o_stride_m, x_stride_m, w1_stride_r,
        rows, units,
        WIDE, DOT, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    hidden = (p * tl.sigmoid(p)).to(DOT)
    chunks = tl.cdiv(D, BLOCK_N)
    for step in range(chunks):
        # Go from the last columns to the first, because the last ones are still in the cache.
        chunk = chunks - 1 - step
        cols = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (rows < M)[:, None] & (cols < D)[None, :]
        y = _gated(
            hidden, z_ptr, z_stride_m, w2_ptr, w2_stride_n, b2_ptr,
            M, D, R, rows, cols, units, WIDE, DOT,
        )  # fmt: skip
        y += _gated(
            hidden, o_ptr, o_stride_m, w2_ptr + D * w2_stride_n, w2_stride_n, b2_ptr + D,
            M, D, R, rows, cols, units, WIDE, DOT,
        )  # fmt: skip
        if x_ptr is not None:
            y += _gated(
                hidden, x_ptr, x_stride_m, w2_ptr + 2 * D * w2_stride_n, w2_stride_n, b2_ptr + 2 * D,
                M, D, R, rows, cols, units, WIDE, DOT,
            )  # fmt: skip
        tl.store(y_ptr + rows[:, None] * y_stride_m + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _into_hidden(
    dhidden, hidden, dy_ptr, dy_stride_m, s_ptr, s_stride_m, w2_ptr, w2_stride_n, b2_ptr,
    M, D, R,
    rows, units,
    WIDE: tl.constexpr, DOT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dhidden + W2^T da over the columns of one source."""
    for start in range(0, D, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        dy = _load(dy_ptr, dy_stride_m, rows, cols, M, D).to(WIDE)
        s = _load(s_ptr, s_stride_m, rows, cols, M, D).to(WIDE)
        w2 = _load(w2_ptr, w2_stride_n, cols, units, D, R).to(DOT)
        g = _gate(hidden, w2, b2_ptr, cols, D, WIDE)
        da = (dy * s * g * (1.0 - g)).to(DOT)
        dhidden = tl.dot(da, w2, acc=dhidden, input_precision="ieee", out_dtype=WIDE)
    return dhidden


@jit
def _into_source(
    ds_ptr, ds_stride_m, hidden, dp, dy_ptr, dy_stride_m, w1_ptr, w1_stride_r, w2_ptr, w2_stride_n, b2_ptr,
    M, D, R,
    rows, units,
    WIDE: tl.constexpr, DOT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores g dy + W1^T dp, the gradient of one source."""
    for start in range(0, D, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = (rows < M)[:, None] & (cols < D)[None, :]
        dy = _load(dy_ptr, dy_stride_m, rows, cols, M, D).to(WIDE)
        w1 = _load(w1_ptr, w1_stride_r, units, cols, R, D).to(DOT)
        w2 = _load(w2_ptr, w2_stride_n, cols, units, D, R).to(DOT)
        ds = _gate(hidden, w2, b2_ptr, cols, D, WIDE) * dy
        ds = tl.dot(dp, w1, acc=ds, input_precision="ieee", out_dtype=WIDE).to(ds_ptr.dtype.element_ty)
        tl.store(ds_ptr + rows[:, None] * ds_stride_m + cols[None, :], ds, mask=mask)


@jit
def _gate_mix_backward_kernel(
    dy_ptr, z_ptr, o_ptr, x_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr,
    dz_ptr, do_ptr, dx_ptr, hidden_ptr, dp_ptr, db1_ptr,
    M, D, R,
    dy_stride_m, z_stride_m, o_stride_m, x_stride_m, w1_stride_r, w2_stride_n, ds_stride_m,
    WIDE: tl.constexpr, DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    units = tl.arange(0, BLOCK_R)
    p = _hidden_layer(
        z_ptr, o_ptr, x_ptr, w1_ptr, b1_ptr,
        M, D, R,
        z_stride_m, o_stride_m, x_stride_m, w1_stride_r,
        rows, units,
        WIDE, DOT, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    hidden = (p * tl.sigmoid(p)).to(DOT)
    dhidden = tl.zeros((BLOCK_M, BLOCK_R), WIDE)
    dhidden = _into_hidden(
        dhidden, hidden, dy_ptr, dy_stride_m, z_ptr, z_stride_m, w2_ptr, w2_stride_n, b2_ptr,
        M, D, R, rows, units, WIDE, DOT, BLOCK_N,
    )  # fmt: skip
    dhidden = _into_hidden(
        dhidden, hidden, dy_ptr, dy_stride_m, o_ptr, o_stride_m,
        w2_ptr + D * w2_stride_n, w2_stride_n, b2_ptr + D,
        M, D, R, rows, units, WIDE, DOT, BLOCK_N,
    )  # fmt: skip
    if x_ptr is not None:
        dhidden = _into_hidden(
            dhidden, hidden, dy_ptr, dy_stride_m, x_ptr, x_stride_m,
            w2_ptr + 2 * D * w2_stride_n, w2_stride_n, b2_ptr + 2 * D,
            M, D, R, rows, units, WIDE, DOT, BLOCK_N,
        )  # fmt: skip
    sigmoid = tl.sigmoid(p)
    dp = dhidden * sigmoid * (1.0 + p * (1.0 - sigmoid))
    if hidden_ptr is not None:
        mask = (rows < M)[:, None] & (units < R)[None, :]
        place = rows[:, None] * R + units[None, :]
        tl.store(hidden_ptr + place, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)
        tl.store(dp_ptr + place, dp.to(dp_ptr.dtype.element_ty), mask=mask)
        # Rows beyond M have dy = 0, so their dp is zero.
        tl.store(db1_ptr + tl.program_id(0) * R + units, tl.sum(dp, axis=0), mask=units < R)
    dp = dp.to(DOT)
    if dz_ptr is not None:
        _into_source(
            dz_ptr, ds_stride_m, hidden, dp, dy_ptr, dy_stride_m, w1_ptr, w1_stride_r,
            w2_ptr, w2_stride_n, b2_ptr,
            M, D, R, rows, units, WIDE, DOT, BLOCK_N,
        )  # fmt: skip
    if do_ptr is not None:
        _into_source(
            do_ptr, ds_stride_m, hidden, dp, dy_ptr, dy_stride_m, w1_ptr + D, w1_stride_r,
            w2_ptr + D * w2_stride_n, w2_stride_n, b2_ptr + D,
            M, D, R, rows, units, WIDE, DOT, BLOCK_N,
        )  # fmt: skip
    if dx_ptr is not None:
        _into_source(
            dx_ptr, ds_stride_m, hidden, dp, dy_ptr, dy_stride_m, w1_ptr + 2 * D, w1_stride_r,
            w2_ptr + 2 * D * w2_stride_n, w2_stride_n, b2_ptr + 2 * D,
            M, D, R, rows, units, WIDE, DOT, BLOCK_N,
        )  # fmt: skip


@jit
def _gate_mix_weights_kernel(
    dy_ptr, z_ptr, o_ptr, x_ptr, w2_ptr, b2_ptr, hidden_ptr, dp_ptr, dw1_ptr, dw2_ptr, db2_ptr,
    M, D, R, M_split,
    dy_stride_m, z_stride_m, o_stride_m, x_stride_m, w2_stride_n,
    WIDE: tl.constexpr, DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(D, BLOCK_N)
    source = tl.program_id(0) // chunks
    split = tl.program_id(1)
    cols = tl.program_id(0) % chunks * BLOCK_N + tl.arange(0, BLOCK_N)
    units = tl.arange(0, BLOCK_R)
    # Each program handles one source, so selecting the source costs nothing inside the loop.
    s_ptr, s_stride_m = z_ptr, z_stride_m
    if source == 1:
        s_ptr, s_stride_m = o_ptr, o_stride_m
    if x_ptr is not None and source == 2:
        s_ptr, s_stride_m = x_ptr, x_stride_m
    w2 = _load(w2_ptr + source * D * w2_stride_n, w2_stride_n, cols, units, D, R).to(DOT)
    b2 = tl.load(b2_ptr + source * D + cols, mask=cols < D, other=0.0).to(WIDE)
    dw1 = tl.zeros((BLOCK_N, BLOCK_R), WIDE)
    dw2 = tl.zeros((BLOCK_N, BLOCK_R), WIDE)
    db2 = tl.zeros((BLOCK_N, BLOCK_M), WIDE)
    for start in range(split * M_split, tl.minimum(M, (split + 1) * M_split), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (cols < D)[:, None] & (rows < M)[None, :]
        # Transposed, as the first operand of the products over rows.
        s = tl.load(s_ptr + rows[None, :] * s_stride_m + cols[:, None], mask=mask, other=0.0)
        dy = tl.load(dy_ptr + rows[None, :] * dy_stride_m + cols[:, None], mask=mask, other=0.0).to(WIDE)
        hidden = _load(hidden_ptr, R, rows, units, M, R).to(DOT)
        dp = _load(dp_ptr, R, rows, units, M, R).to(DOT)
        a = tl.dot(w2, tl.trans(hidden), input_precision="ieee", out_dtype=WIDE) + b2[:, None]
        g = tl.sigmoid(a)
        da = dy * s.to(WIDE) * g * (1.0 - g)
        db2 += da
        dw1 = tl.dot(s.to(DOT), dp, acc=dw1, input_precision="ieee", out_dtype=WIDE)
        dw2 = tl.dot(da.to(DOT), hidden, acc=dw2, input_precision="ieee", out_dtype=WIDE)
    mask = (cols < D)[:, None] & (units < R)[None, :]
    width = tl.num_programs(0) // chunks * D
    line = split * width + source * D + cols
    tl.store(dw1_ptr + line[:, None] * R + units[None, :], dw1, mask=mask)
    tl.store(dw2_ptr + line[:, None] * R + units[None, :], dw2, mask=mask)
    tl.store(db2_ptr + line, tl.sum(db2, axis=1), mask=cols < D)


def _forward(
    z: Tensor, o: Tensor, x: Tensor | None, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tensor:
    z_rows, o_rows, x_rows = as_rows(z), as_rows(o), None if x is None else as_rows(x)
    w1_rows, w2_rows = as_rows(w1), as_rows(w2)
    (M, D), R = z_rows.shape, w1.shape[0]
    y = torch.empty_like(z, memory_format=torch.contiguous_format)
    choice = launch_choice(R, z.dtype)["forward"]
    launch(
        _gate_mix_forward_kernel,
        (triton.cdiv(M, choice["BLOCK_M"]),),
        z_rows, o_rows, x_rows, w1_rows, b1.contiguous(), w2_rows, b2.contiguous(), y,
        M, D, R,
        z_rows.stride(0), o_rows.stride(0), 0 if x_rows is None else x_rows.stride(0),
        w1_rows.stride(0), w2_rows.stride(0), D,
        WIDE=wide(z.dtype), DOT=dot(z.dtype), **choice,
    )  # fmt: skip
    return y


def _backward(
    dy: Tensor, z: Tensor, o: Tensor, x: Tensor | None,
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    dy_rows, z_rows, o_rows = as_rows(dy), as_rows(z), as_rows(o)
    x_rows = None if x is None else as_rows(x)
    w1_rows, w2_rows, b2 = as_rows(w1), as_rows(w2), b2.contiguous()
    (M, D), R = z_rows.shape, w1.shape[0]
    dtypes = {"WIDE": wide(z.dtype), "DOT": dot(z.dtype)}
    strides = (
        dy_rows.stride(0), z_rows.stride(0), o_rows.stride(0), 0 if x_rows is None else x_rows.stride(0)
    )  # fmt: skip
    choice = launch_choice(R, z.dtype)
    programs = triton.cdiv(M, choice["rows"]["BLOCK_M"])
    partial = accumulate_dtype(z.dtype)
    dz, do, dx = (
        torch.empty_like(z, memory_format=torch.contiguous_format) if need else None for need in needs[:3]
    )
    hidden = dp = db1 = None
    if any(needs[3:]):
        hidden, dp = z.new_empty((M, R)), z.new_empty((M, R))
        db1 = z.new_empty((programs, R), dtype=partial)
    launch(
        _gate_mix_backward_kernel,
        (programs,),
        dy_rows, z_rows, o_rows, x_rows, w1_rows, b1.contiguous(), w2_rows, b2,
        dz, do, dx, hidden, dp, db1,
        M, D, R,
        *strides, w1_rows.stride(0), w2_rows.stride(0), D,
        **dtypes, **choice["rows"],
    )  # fmt: skip
    grads = [grad for grad in (dz, do, dx) if grad is not None]
    if db1 is None:
        return grads
    chunks = (2 if x is None else 3) * triton.cdiv(D, choice["weights"]["BLOCK_N"])
    splits, M_split = row_splits(M, chunks, choice["weights"]["BLOCK_M"])
    width = (2 if x is None else 3) * D
    dw1, dw2 = (z.new_empty((splits, width, R), dtype=partial) for _ in range(2))
    db2 = z.new_empty((splits, width), dtype=partial)
    launch(
        _gate_mix_weights_kernel,
        (chunks, splits),
        dy_rows, z_rows, o_rows, x_rows, w2_rows, b2, hidden, dp, dw1, dw2, db2,
        M, D, R, M_split,
        *strides, w2_rows.stride(0),
        **dtypes, **choice["weights"],
    )  # fmt: skip
    # Rows and columns of an absent x are zero.
    absent = 3 * D - width
    totals = (
        F.pad(dw1.sum(0).t(), (0, absent)),
        db1.sum(0),
        F.pad(dw2.sum(0), (0, 0, 0, absent)),
        F.pad(db2.sum(0), (0, absent)),
    )
    weights = [
        total.to(z.dtype, memory_format=torch.contiguous_format)
        for total, need in zip(totals, needs[3:], strict=True)
        if need
    ]
    return grads + weights


@torch.library.custom_op("hrm_kernels::gate_mix", mutates_args=())
def _gate_mix(
    z: Tensor, o: Tensor, x: Tensor | None, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tensor:
    return _forward(z, o, x, w1, b1, w2, b2)


@_gate_mix.register_fake
def _(z: Tensor, o: Tensor, x: Tensor | None, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


@torch.library.custom_op("hrm_kernels::gate_mix_backward", mutates_args=())
def _gate_mix_backward(
    dy: Tensor, z: Tensor, o: Tensor, x: Tensor | None,
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Only the gradients required by `needs`, in the order of the inputs."""
    return _backward(dy, z, o, x, w1, b1, w2, b2, needs)


@_gate_mix_backward.register_fake
def _(
    dy: Tensor, z: Tensor, o: Tensor, x: Tensor | None,
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, need in zip((z, o, x, w1, b1, w2, b2), needs, strict=True)
        if need and tensor is not None
    ]


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    grads = iter(_gate_mix_backward(dy, *ctx.saved_tensors, list(ctx.needs_input_grad)))
    return tuple(next(grads) if need else None for need in ctx.needs_input_grad)


_gate_mix.register_autograd(_differentiate, setup_context=_save)


def gate_mix(
    z: Tensor, o: Tensor, x: Tensor | None, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tensor:
    """Mixes two or three sources, each scaled per channel by a gate computed from all of them.

    z, o, x: (..., D), the primary state, the secondary state and the input (None: two sources).
    w1: (R, 3*D), b1: (R,), w2: (3*D, R), b2: (3*D,), with columns and rows in the order z, o, x.
    Returns (..., D) in z's dtype; sums, gates and the mixing are in float32 (float64 for float64), rounded
    on store, with hidden rounded to z's dtype between the two products.
    Raises ValueError or TypeError naming the argument.
    Source: the gated fork of HRM; the gates are not normalised over the sources.
    """
    tensors = {"z": z, "o": o, "w1": w1, "b1": b1, "w2": w2, "b2": b2} | ({} if x is None else {"x": x})
    check_floating("gate_mix", **tensors)
    width, hidden = z.shape[-1], w1.shape[0]
    check_shape("gate_mix", "o", o, tuple(z.shape))
    if x is not None:
        check_shape("gate_mix", "x", x, tuple(z.shape))
    check_shape("gate_mix", "w1", w1, (hidden, 3 * width))
    check_shape("gate_mix", "b1", b1, (hidden,))
    check_shape("gate_mix", "w2", w2, (3 * width, hidden))
    check_shape("gate_mix", "b2", b2, (3 * width,))
    too_wide = f"its kernels hold hidden layers of at most {MAX_HIDDEN}, got {hidden}"
    sizes = (2 if x is None else 3, hidden)
    if use_triton("gate_mix", z, too_wide if hidden > MAX_HIDDEN else None, sizes=sizes, weight=w1):
        return _gate_mix(z, o, x, w1, b1, w2, b2)
    return gate_mix_reference(z, o, x, w1, b1, w2, b2)
