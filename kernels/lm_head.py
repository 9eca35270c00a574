"""The head of a small vocabulary fused with its loss: logits, cross-entropy, predictions and counts.

Forward, per cell of a sequence (see stablemax.py for the cross-entropies):
    logits = z_H @ weight^T + bias;   token loss = cross_entropy(logits, label);   prediction = argmax(logits)
and per sequence: loss = sum of token losses over valid cells / max(valid_count, 1), right_count.
Backward:
    dlogits = dloss / max(valid_count, 1) * (p - target(label)) * l'(logits), 0 where ignored
    dz_H = dlogits @ weight;   dweight = dlogits^T @ z_H;   dbias = sum of dlogits over the cells

Saved: z_H, weight, labels, which exist anyway, and valid_count. Logits and dlogits are computed in registers,
in float32, and never written to memory: the backward recomputes them. Bytes, for B * S cells of width D in
elements of e bytes: z_H once forward, B * S * D * e; z_H read and dz_H written backward, and 8 * programs * V
* D for the partial sums of dweight. A bias costs V elements here; added outside, it would write all logits to
memory.

Forward, a program processes a sequence (or some of its cells if there are few sequences) and loops over D in
chunks. Backward, a program processes a range of cells and a chunk of D for which registers can hold the sum
of dweight (V rows of float32), so that each program writes its sum once and torch.sum adds the programs in a
fixed order: no atomics, and identical results in every run. Up to V = 16 and D = 512 there is one chunk (16
bits), and each cell is read once. Above that, the programs of all chunks recompute the same logits and read
all of z_H, mostly from the L2 cache, because they run at the same time. This is cheaper than sums in memory,
which would be read and written for each tile: 8 * V * D bytes against the 32 * D of 16 cells.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import dot, jit, launch, tl, triton, use_triton, wide
from kernels.checks import accumulate_dtype, check_floating, check_shape
from kernels.linear import linear
from kernels.stablemax import (
    check_labels,
    check_smoothing,
    softmax_cross_entropy_reference,
    stablemax_cross_entropy_reference,
    token_gradients,
    token_losses,
)

MAX_VOCABULARY, MAX_WIDTH = 64, 4096
# Number of programs that fill a large GPU, two per multiprocessor of 132; fixed, to fix the order of sums.
PROGRAMS = 264


class HeadLoss(NamedTuple):
    """The head's results per sequence; only loss has a gradient."""

    loss: Tensor  # (B,) float32, mean token loss over valid cells, 0 without any
    valid_count: Tensor  # (B,) int32
    right_count: Tensor  # (B,) int32, valid cells whose prediction is the label
    predictions: Tensor  # (B, S) int32


def lm_head_reference(
    z_H: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    stablemax: bool,
    bias: Tensor | None = None,
    smoothing: float = 0.0,
) -> HeadLoss:
    """Head and loss in plain PyTorch; see `lm_head_stablemax`."""
    cross_entropy = stablemax_cross_entropy_reference if stablemax else softmax_cross_entropy_reference
    logits = linear(z_H, weight, bias)
    token_losses = cross_entropy(logits, labels, ignore_index, smoothing)
    valid = labels != ignore_index
    valid_count = valid.sum(-1)
    predictions = logits.argmax(-1)
    return HeadLoss(
        token_losses.sum(-1) / valid_count.clamp(min=1).to(token_losses.dtype),
        valid_count.int(),
        (valid & (predictions == labels)).sum(-1).int(),
        predictions.int(),
    )


def launch_choice(vocabulary: int, width: int, dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """Tiles of cells and chunks of D for the forward and the backward kernel.

    Forward: three stages of 64 cells by 64 columns in shared memory allow 7 programs per multiprocessor, so
    132 multiprocessors process all sequences of batch 768 at once. Backward: 16 cells, the next 16 in flight,
    and a chunk whose sum of dweight takes 32 registers per thread allow two programs per multiprocessor.
    Products of 32 bits and more keep their operands in registers, outside the tensor cores, so their tiles
    are smaller.
    """
    BLOCK_V = max(16, triton.next_power_of_2(vocabulary))
    narrow = dtype.itemsize == 2
    return {
        "forward": {
            "BLOCK_V": BLOCK_V,
            "BLOCK_S": 64 if narrow else 32,
            "BLOCK_D": 64 if narrow else 32,
            "num_warps": 4,
            "num_stages": 3,
        },
        "backward": {
            "BLOCK_V": BLOCK_V,
            "BLOCK_M": 16,
            "BLOCK_D": min(8192 // BLOCK_V if narrow else 128, max(16, triton.next_power_of_2(width))),
            "num_warps": 8,
            "num_stages": 2 if narrow else 1,
        },
    }


@jit
def _bias(bias_ptr, vocabulary, V, WIDE: tl.constexpr):
    return tl.load(bias_ptr + vocabulary, mask=vocabulary < V, other=0.0).to(WIDE)[None, :]


@jit
def _lm_head_forward_kernel(
    z_ptr, weight_ptr, bias_ptr, labels_ptr, loss_ptr, valid_count_ptr, right_count_ptr, predictions_ptr,
    S, D, V, SPLITS, SPAN,
    z_stride_b, z_stride_s, weight_stride_v, labels_stride_b, labels_stride_s,
    ignore_index,
    STABLEMAX: tl.constexpr, SMOOTHING: tl.constexpr, WIDE: tl.constexpr, DOT: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sequence, split = (program // SPLITS).to(tl.int64), program % SPLITS
    z_ptr += sequence * z_stride_b
    labels_ptr += sequence * labels_stride_b
    vocabulary, lanes = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_S)

    # Every split divides by the count of the whole sequence, so that the splits' losses can be added.
    valid_counts = tl.zeros([BLOCK_S], dtype=tl.int32)
    for start in range(0, S, BLOCK_S):
        cells = start + lanes
        labels = tl.load(labels_ptr + cells * labels_stride_s, mask=cells < S, other=ignore_index)
        valid_counts += (labels != ignore_index).to(tl.int32)
    valid_count = tl.sum(valid_counts, axis=0)

    loss_sums = tl.zeros([BLOCK_S], dtype=WIDE)
    right_counts = tl.zeros([BLOCK_S], dtype=tl.int32)
    for start in range(split * SPAN, tl.minimum(S, (split + 1) * SPAN), BLOCK_S):
        cells = start + lanes
        labels = tl.load(labels_ptr + cells * labels_stride_s, mask=cells < S, other=ignore_index)
        z_rows = z_ptr + cells.to(tl.int64)[:, None] * z_stride_s
        logits = tl.zeros([BLOCK_S, BLOCK_V], dtype=WIDE)
        for column in range(0, D, BLOCK_D):
            cols = column + tl.arange(0, BLOCK_D)
            z_mask = (cells < S)[:, None] & (cols < D)[None, :]
            weight_mask = (vocabulary < V)[None, :] & (cols < D)[:, None]
            z = tl.load(z_rows + cols[None, :], mask=z_mask, other=0.0).to(DOT)
            weight_T = tl.load(
                weight_ptr + vocabulary[None, :] * weight_stride_v + cols[:, None],
                mask=weight_mask,
                other=0.0,
            ).to(DOT)
            logits = tl.dot(z, weight_T, acc=logits, input_precision="ieee", out_dtype=WIDE)
        if bias_ptr is not None:
            logits += _bias(bias_ptr, vocabulary, V, WIDE)
        valid = labels != ignore_index
        loss_sums += tl.where(valid, token_losses(logits, labels, V, STABLEMAX, SMOOTHING), 0.0)
        predictions = tl.argmax(tl.where((vocabulary < V)[None, :], logits, -float("inf")), axis=1)
        right_counts += (valid & (predictions == labels)).to(tl.int32)
        tl.store(predictions_ptr + sequence * S + cells, predictions, mask=cells < S)
    tl.store(loss_ptr + program, tl.sum(loss_sums, axis=0) / tl.maximum(valid_count, 1).to(WIDE))
    tl.store(right_count_ptr + program, tl.sum(right_counts, axis=0))
    tl.store(valid_count_ptr + sequence, valid_count, mask=split == 0)


@jit
def _lm_head_backward_kernel(
    dloss_ptr, z_ptr, weight_ptr, bias_ptr, labels_ptr, valid_count_ptr, dz_ptr, dweight_ptr, dbias_ptr,
    M, S, D, V, TILES,
    dloss_stride_b, z_stride_b, z_stride_s, weight_stride_v, labels_stride_b, labels_stride_s, dz_stride_m,
    ignore_index,
    STABLEMAX: tl.constexpr, SMOOTHING: tl.constexpr, WIDE: tl.constexpr, DOT: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Consecutive programs share a range of cells, so that they find it in the L2 cache.
    span, chunk = tl.program_id(0) // CHUNKS, tl.program_id(0) % CHUNKS
    vocabulary = tl.arange(0, BLOCK_V)
    cols = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    weight_rows = weight_ptr + vocabulary[:, None] * weight_stride_v
    weight_mask = (vocabulary < V)[:, None] & (cols < D)[None, :]
    weight = tl.load(weight_rows + cols[None, :], mask=weight_mask, other=0.0).to(DOT)
    dweight = tl.zeros([BLOCK_V, BLOCK_D], dtype=WIDE)
    dbias = tl.zeros([BLOCK_V], dtype=WIDE)
    for tile in range(span * TILES, (span + 1) * TILES):
        # Cells of all sequences are concatenated: a tile may span two sequences.
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        sequences, cells = (rows // S).to(tl.int64), (rows % S).to(tl.int64)
        labels = tl.load(
            labels_ptr + sequences * labels_stride_b + cells * labels_stride_s,
            mask=rows < M,
            other=ignore_index,
        )
        dloss = tl.load(dloss_ptr + sequences * dloss_stride_b, mask=rows < M, other=0.0)
        valid_count = tl.load(valid_count_ptr + sequences, mask=rows < M, other=1)
        z_rows = z_ptr + (sequences * z_stride_b + cells * z_stride_s)[:, None]
        z_mask = (rows < M)[:, None] & (cols < D)[None, :]
        z = tl.load(z_rows + cols[None, :], mask=z_mask, other=0.0).to(DOT)
        logits = tl.dot(z, tl.trans(weight), input_precision="ieee", out_dtype=WIDE)
        for step in range(1, CHUNKS):
            others = (chunk + step) % CHUNKS * BLOCK_D + tl.arange(0, BLOCK_D)
            others_mask = (rows < M)[:, None] & (others < D)[None, :]
            z_others = tl.load(z_rows + others[None, :], mask=others_mask, other=0.0).to(DOT)
            others_mask = (vocabulary < V)[:, None] & (others < D)[None, :]
            weight_others = tl.load(weight_rows + others[None, :], mask=others_mask, other=0.0).to(DOT)
            logits = tl.dot(
                z_others, tl.trans(weight_others), acc=logits, input_precision="ieee", out_dtype=WIDE
            )
        if bias_ptr is not None:
            logits += _bias(bias_ptr, vocabulary, V, WIDE)
        scale = dloss / tl.maximum(valid_count, 1).to(WIDE)
        dlogits = token_gradients(logits, labels, V, STABLEMAX, SMOOTHING) * scale[:, None]
        dlogits = tl.where((labels != ignore_index)[:, None], dlogits, 0.0)
        # As in the reference, cast dlogits to z_H's dtype for the products below.
        dlogits = dlogits.to(z_ptr.dtype.element_ty).to(DOT)
        if dz_ptr is not None:
            dz = tl.dot(dlogits, weight, input_precision="ieee", out_dtype=WIDE)
            dz_rows = dz_ptr + rows.to(tl.int64)[:, None] * dz_stride_m
            tl.store(dz_rows + cols[None, :], dz.to(dz_ptr.dtype.element_ty), mask=z_mask)
        if dweight_ptr is not None:
            dweight = tl.dot(tl.trans(dlogits), z, acc=dweight, input_precision="ieee", out_dtype=WIDE)
        if dbias_ptr is not None:
            dbias += tl.sum(dlogits.to(WIDE), axis=0)
    if dweight_ptr is not None:
        dweight_rows = dweight_ptr + (span.to(tl.int64) * V + vocabulary)[:, None] * D
        tl.store(dweight_rows + cols[None, :], dweight, mask=weight_mask)
    if dbias_ptr is not None:
        # The sums are equal in all chunks.
        first = (vocabulary < V) & (chunk == 0)
        tl.store(dbias_ptr + span.to(tl.int64) * V + vocabulary, dbias, mask=first)


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(
    z_H: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    stablemax: bool,
    smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z_H, weight = _with_unit_stride(z_H), _with_unit_stride(weight)
    (B, S, D), V = z_H.shape, weight.shape[0]
    choice = launch_choice(V, D, z_H.dtype)["forward"]
    tiles = triton.cdiv(S, choice["BLOCK_S"])
    # Split few long sequences, but into parts of at least four tiles: less would not pay for the final sums.
    splits = max(1, min(triton.cdiv(tiles, 4), triton.cdiv(PROGRAMS, max(B, 1))))
    loss = torch.empty(B, splits, dtype=accumulate_dtype(z_H.dtype), device=z_H.device)
    right_count = torch.empty(B, splits, dtype=torch.int32, device=z_H.device)
    valid_count = torch.empty(B, dtype=torch.int32, device=z_H.device)
    predictions = torch.empty(B, S, dtype=torch.int32, device=z_H.device)
    launch(
        _lm_head_forward_kernel,
        (B * splits,),
        z_H, weight, _contiguous(bias), labels, loss, valid_count, right_count, predictions,
        S, D, V, splits, triton.cdiv(tiles, splits) * choice["BLOCK_S"],
        z_H.stride(0), z_H.stride(1), weight.stride(0), *labels.stride(),
        ignore_index,
        STABLEMAX=stablemax, SMOOTHING=smoothing, WIDE=wide(z_H.dtype), DOT=dot(z_H.dtype), **choice,
    )  # fmt: skip
    if splits == 1:
        return loss.view(B), valid_count, right_count.view(B), predictions
    return loss.sum(1), valid_count, right_count.sum(1, dtype=torch.int32), predictions


def _backward(
    dloss: Tensor,
    z_H: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    valid_count: Tensor,
    ignore_index: int,
    stablemax: bool,
    smoothing: float,
    wants_z: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dz_H, dweight and dbias; unneeded ones are empty, and dbias is computed with dweight."""
    dtype, z_H, weight = z_H.dtype, _with_unit_stride(z_H), _with_unit_stride(weight)
    (B, S, D), V = z_H.shape, weight.shape[0]
    choice = launch_choice(V, D, dtype)["backward"]
    if bias is not None and dtype.itemsize > 2:
        # The sums of a bias need registers, so a tile has half the columns.
        choice["BLOCK_D"] = min(64, choice["BLOCK_D"])
    chunks, tiles = triton.cdiv(D, choice["BLOCK_D"]), triton.cdiv(B * S, choice["BLOCK_M"])
    tiles_each = triton.cdiv(tiles, max(1, PROGRAMS // chunks))
    spans = triton.cdiv(tiles, max(1, tiles_each))
    dz = z_H.new_empty(z_H.shape if wants_z else 0)
    dweights, dbiases = (
        z_H.new_empty(shape if wants else 0, dtype=accumulate_dtype(dtype))
        for shape, wants in (((spans, V, D), wants_weight), ((spans, V), wants_weight and bias is not None))
    )
    launch(
        _lm_head_backward_kernel,
        (spans * chunks,),
        dloss, z_H, weight, _contiguous(bias), labels, valid_count,
        dz if wants_z else None, dweights if wants_weight else None, dbiases if len(dbiases) else None,
        B * S, S, D, V, tiles_each,
        dloss.stride(0), z_H.stride(0), z_H.stride(1), weight.stride(0), *labels.stride(), D,
        ignore_index,
        STABLEMAX=stablemax, SMOOTHING=smoothing, WIDE=wide(dtype), DOT=dot(dtype), CHUNKS=chunks, **choice,
    )  # fmt: skip
    dweight, dbias = (
        sums.sum(0).to(dtype) if len(sums) else z_H.new_empty(0) for sums in (dweights, dbiases)
    )
    return dz, dweight, dbias


_lm_head = torch.library.custom_op("hrm_kernels::lm_head", _forward, mutates_args=())


@_lm_head.register_fake
def _(
    z_H: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    stablemax: bool,
    smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, S = labels.shape
    counts = [labels.new_empty(shape, dtype=torch.int32) for shape in ((B,), (B,), (B, S))]
    return z_H.new_empty(B, dtype=accumulate_dtype(z_H.dtype)), counts[0], counts[1], counts[2]


_lm_head_backward = torch.library.custom_op("hrm_kernels::lm_head_backward", _backward, mutates_args=())


@_lm_head_backward.register_fake
def _(
    dloss: Tensor,
    z_H: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    valid_count: Tensor,
    ignore_index: int,
    stablemax: bool,
    smoothing: float,
    wants_z: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wants_bias = wants_weight and bias is not None
    return (
        z_H.new_empty(z_H.shape if wants_z else 0),
        z_H.new_empty(weight.shape if wants_weight else 0),
        z_H.new_empty(len(weight) if wants_bias else 0),
    )


def _save(ctx, inputs, output) -> None:
    z_H, weight, bias, labels, ctx.ignore_index, ctx.stablemax, ctx.smoothing = inputs
    _, valid_count, right_count, predictions = output
    ctx.mark_non_differentiable(valid_count, right_count, predictions)
    ctx.save_for_backward(z_H, weight, bias, labels, valid_count)


def _differentiate(ctx, dloss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    wants_z, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    dz, dweight, dbias = _lm_head_backward(
        dloss,
        *ctx.saved_tensors,
        ctx.ignore_index,
        ctx.stablemax,
        ctx.smoothing,
        wants_z,
        wants_weight or wants_bias,
    )
    wanted = ((dz, wants_z), (dweight, wants_weight), (dbias, wants_bias))
    return *(grad if wants else None for grad, wants in wanted), None, None, None, None


_lm_head.register_autograd(_differentiate, setup_context=_save)


def _lm_head_loss(
    op: str,
    z_H: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    stablemax: bool,
    smoothing: float,
) -> HeadLoss:
    check_floating(op, z_H=z_H, weight=weight, **({} if bias is None else {"bias": bias}))
    if z_H.dim() != 3:
        raise ValueError(f"{op}: z_H must be (B, S, D), got {tuple(z_H.shape)}")
    if weight.dim() != 2 or weight.shape[1] != z_H.shape[2]:
        raise ValueError(f"{op}: weight must be (V, {z_H.shape[2]}), got {tuple(weight.shape)}")
    if bias is not None:
        check_shape(op, "bias", bias, (len(weight),))
    check_labels(op, labels, tuple(z_H.shape[:2]))
    check_smoothing(op, smoothing)
    obstacle = None
    if weight.shape[0] > MAX_VOCABULARY:
        obstacle = f"its kernel holds vocabularies of at most {MAX_VOCABULARY}, got {weight.shape[0]}"
    elif weight.shape[1] > MAX_WIDTH:
        obstacle = f"its kernel holds cells of width at most {MAX_WIDTH}, got {weight.shape[1]}"
    if use_triton(op, z_H, obstacle, sizes=(weight.shape[0],)):
        return HeadLoss(*_lm_head(z_H, weight, bias, labels, ignore_index, stablemax, smoothing))
    return lm_head_reference(z_H, weight, labels, ignore_index, stablemax, bias, smoothing)


def lm_head_stablemax(
    z_H: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    bias: Tensor | None = None,
    *,
    smoothing: float = 0.0,
) -> HeadLoss:
    """Mean stablemax cross-entropy of each sequence under the head `weight`, with predictions and counts.

    z_H: (B, S, D), any strides, such as z[:, P:]; weight: (V, D) and bias: (V,), None for 0, same dtype;
    labels: (B, S), int32 or int64 in 0..V-1 or ignore_index; smoothing: see `stablemax_cross_entropy`.
    Returns a HeadLoss: loss (B,), 0 for a sequence without valid cells, the only one with a gradient;
    valid_count (B,), right_count (B,) and predictions (B, S), the first of equal logits.
    Precision: the kernel keeps logits in float32 (float64 for float64), where the reference rounds them to
    z_H's dtype, and casts dlogits to it before the products of the gradients, as the reference does. For
    float32 inputs and logits up to 1e4 in size the tested error of the loss is below 4e-6.
    Raises ValueError or TypeError naming the argument; a label out of range is an error in the reference and
    gives NaN in the kernel. Source: the official HRM code; Prieto et al. 2025 (arXiv 2501.04697).
    """
    return _lm_head_loss("lm_head_stablemax", z_H, weight, bias, labels, ignore_index, True, smoothing)


def lm_head_softmax(
    z_H: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    bias: Tensor | None = None,
    *,
    smoothing: float = 0.0,
) -> HeadLoss:
    """`lm_head_stablemax` with the softmax cross-entropy: the same shapes, precision and errors."""
    return _lm_head_loss("lm_head_softmax", z_H, weight, bias, labels, ignore_index, False, smoothing)
