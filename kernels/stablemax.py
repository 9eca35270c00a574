"""Cross-entropies over a small vocabulary: stablemax and softmax, with or without label smoothing.

Stablemax replaces exp by s(x) = x + 1 for x >= 0 and 1 / (1 - x) otherwise; p = s / sum(s). Its logarithm is
l(x) = log1p(x) for x >= 0 and -log1p(-x) below, so that p = softmax(l(x)): the loss is the softmax
cross-entropy of l(x), and l'(x) = 1 / (1 + |x|).

Label smoothing e spreads a share of the target over all V words: target = (1 - e) onehot(label) + e / V.

Forward:   loss = logsumexp(l) - sum(target * l);   an ignored label gives 0.
Backward:  dlogits = dloss * (p - target) * l'(x) for stablemax, without l' for softmax.

The stablemax kernel computes one logarithm per row: loss = log(sum(s) / s[label]), which needs no maximum,
because s grows only linearly; smoothing adds e times the mean of log(s[label] / s). Nothing is saved: the
backward reads whole rows of logits and sums them again. Bytes, for M rows of V logits of e bytes: M * (V * e
+ 4) and the labels read forward, as many backward, with M * V * e written. Rows of 11 or 12 logits are padded
to 16 in registers only, 128 rows per program.

Precision: float32 arithmetic for inputs of 32 bits and fewer (float64 for float64). For logits up to 1e4
in size l is at most 9.3 and a loss at most 23, with ulps of 1e-6 and 2e-6; the tested error against float64
is below 4e-6. The official code converts to float64 first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import jit, launch, tl, triton, use_triton, wide
from kernels.checks import accumulate_dtype, as_rows, check_floating, check_shape

MAX_VOCABULARY = 16384


def log_s(x: Tensor) -> Tensor:
    """The logarithm of stablemax's s, elementwise; its derivative is 1 / (1 + |x|) everywhere, 0 included."""
    return torch.where(x >= 0, torch.log1p(x.clamp(min=0)), -torch.log1p(-x.clamp(max=0)))


def softmax_cross_entropy_reference(
    logits: Tensor, labels: Tensor, ignore_index: int, smoothing: float = 0.0
) -> Tensor:
    """Softmax cross-entropy in plain PyTorch; see `softmax_cross_entropy`."""
    logits = logits.to(accumulate_dtype(logits.dtype))
    losses = F.cross_entropy(
        logits.flatten(0, -2),
        labels.flatten().long(),
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=smoothing,
    )
    return losses.view(labels.shape)


def stablemax_cross_entropy_reference(
    logits: Tensor, labels: Tensor, ignore_index: int, smoothing: float = 0.0
) -> Tensor:
    """Stablemax cross-entropy in plain PyTorch; see `stablemax_cross_entropy`."""
    return softmax_cross_entropy_reference(
        log_s(logits.to(accumulate_dtype(logits.dtype))), labels, ignore_index, smoothing
    )


def launch_choice(vocabulary: int) -> dict[str, int]:
    """Tiles of whole rows with about 2048 logits, 16 per thread; 8 warps for rows beyond 4096."""
    BLOCK_V = max(16, triton.next_power_of_2(vocabulary))
    BLOCK_M = max(1, 2048 // BLOCK_V)
    return {"BLOCK_M": BLOCK_M, "BLOCK_V": BLOCK_V, "num_warps": 8 if BLOCK_M * BLOCK_V > 4096 else 4}


@jit
def token_losses(logits, labels, V, STABLEMAX: tl.constexpr, SMOOTHING: tl.constexpr):
    """The losses (M,) of a tile of logits (M, BLOCK_V), V of its columns in use; NaN for unknown labels."""
    cols = tl.arange(0, logits.shape[1])[None, :]
    x = tl.sum(tl.where(cols == labels[:, None], logits, 0.0), axis=1)
    if STABLEMAX:
        s = tl.where(logits >= 0.0, 1.0 + logits, 1.0 / (1.0 + tl.abs(logits)))
        total = tl.sum(tl.where(cols < V, s, 0.0), axis=1)
        grown = 1.0 + tl.abs(x)
        losses = tl.log(tl.where(x >= 0.0, total / grown, total * grown))
        if SMOOTHING > 0:
            # The size of l is log(1 + |x|).
            of_label = tl.where(x >= 0.0, 1.0, -1.0) * tl.log(grown)
            of_all = tl.where(logits >= 0.0, 1.0, -1.0) * tl.log(1.0 + tl.abs(logits))
            spread = tl.sum(tl.where(cols < V, of_label[:, None] - of_all, 0.0), axis=1)
            losses += spread * SMOOTHING / V
    else:
        logits = tl.where(cols < V, logits, -float("inf"))
        largest = tl.max(logits, axis=1)
        losses = tl.log(tl.sum(tl.exp(logits - largest[:, None]), axis=1)) + (largest - x)
        if SMOOTHING > 0:
            spread = tl.sum(tl.where(cols < V, x[:, None] - logits, 0.0), axis=1)
            losses += spread * SMOOTHING / V
    return tl.where((labels >= 0) & (labels < V), losses, float("nan"))


@jit
def _without_target(p, cols, labels, V, SMOOTHING: tl.constexpr):
    """p minus the target, 0 beyond column V."""
    if SMOOTHING > 0:
        # Compute in p's dtype: a quotient of scalars would be float32.
        p = tl.where(cols < V, p - tl.full([1, 1], SMOOTHING, p.dtype) / V, 0.0)
    return tl.where(cols == labels[:, None], p - (1.0 - SMOOTHING), p)


@jit
def token_gradients(logits, labels, V, STABLEMAX: tl.constexpr, SMOOTHING: tl.constexpr):
    """The derivatives (M, BLOCK_V) of `token_losses` by the logits, 0 beyond column V."""
    cols = tl.arange(0, logits.shape[1])[None, :]
    if STABLEMAX:
        # l'(x), which is s(x) itself below 0.
        slope = 1.0 / (1.0 + tl.abs(logits))
        s = tl.where(cols < V, tl.where(logits >= 0.0, 1.0 + logits, slope), 0.0)
        p = s / tl.sum(s, axis=1)[:, None]
        return _without_target(p, cols, labels, V, SMOOTHING) * slope
    logits = tl.where(cols < V, logits, -float("inf"))
    s = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    p = s / tl.sum(s, axis=1)[:, None]
    return _without_target(p, cols, labels, V, SMOOTHING)


@jit
def _cross_entropy_forward_kernel(
    logits_ptr, labels_ptr, losses_ptr,
    M, V,
    logits_stride_m, labels_stride_m,
    ignore_index,
    STABLEMAX: tl.constexpr, SMOOTHING: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_V)
    mask = (rows < M)[:, None] & (cols < V)[None, :]
    logits = tl.load(logits_ptr + rows[:, None] * logits_stride_m + cols[None, :], mask=mask, other=0.0)
    labels = tl.load(labels_ptr + rows * labels_stride_m, mask=rows < M, other=0)
    losses = token_losses(logits.to(WIDE), labels, V, STABLEMAX, SMOOTHING)
    tl.store(losses_ptr + rows, tl.where(labels == ignore_index, 0.0, losses), mask=rows < M)


@jit
def _cross_entropy_backward_kernel(
    dlosses_ptr, logits_ptr, labels_ptr, dlogits_ptr,
    M, V,
    dlosses_stride_m, logits_stride_m, labels_stride_m, dlogits_stride_m,
    ignore_index,
    STABLEMAX: tl.constexpr, SMOOTHING: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_V)
    mask = (rows < M)[:, None] & (cols < V)[None, :]
    logits = tl.load(logits_ptr + rows[:, None] * logits_stride_m + cols[None, :], mask=mask, other=0.0)
    labels = tl.load(labels_ptr + rows * labels_stride_m, mask=rows < M, other=0)
    dlosses = tl.load(dlosses_ptr + rows * dlosses_stride_m, mask=rows < M, other=0.0)
    gradients = token_gradients(logits.to(WIDE), labels, V, STABLEMAX, SMOOTHING) * dlosses[:, None]
    # Select instead of multiplying by 0, so that ignored labels have no gradient even for non-finite logits.
    dlogits = tl.where((labels == ignore_index)[:, None], 0.0, gradients).to(dlogits_ptr.dtype.element_ty)
    tl.store(dlogits_ptr + rows[:, None] * dlogits_stride_m + cols[None, :], dlogits, mask=mask)


def _forward(logits: Tensor, labels: Tensor, ignore_index: int, stablemax: bool, smoothing: float) -> Tensor:
    logits_rows, labels_flat = as_rows(logits), labels.reshape(-1)
    M, V = logits_rows.shape
    losses = torch.empty(labels.shape, dtype=accumulate_dtype(logits.dtype), device=logits.device)
    choice = launch_choice(V)
    launch(
        _cross_entropy_forward_kernel,
        (triton.cdiv(M, choice["BLOCK_M"]),),
        logits_rows, labels_flat, losses,
        M, V,
        logits_rows.stride(0), labels_flat.stride(0),
        ignore_index,
        STABLEMAX=stablemax, SMOOTHING=smoothing, WIDE=wide(logits.dtype), **choice,
    )  # fmt: skip
    return losses


def _backward(
    dlosses: Tensor, logits: Tensor, labels: Tensor, ignore_index: int, stablemax: bool, smoothing: float
) -> Tensor:
    logits_rows, labels_flat, dlosses_flat = as_rows(logits), labels.reshape(-1), dlosses.reshape(-1)
    M, V = logits_rows.shape
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    choice = launch_choice(V)
    launch(
        _cross_entropy_backward_kernel,
        (triton.cdiv(M, choice["BLOCK_M"]),),
        dlosses_flat, logits_rows, labels_flat, dlogits,
        M, V,
        dlosses_flat.stride(0), logits_rows.stride(0), labels_flat.stride(0), V,
        ignore_index,
        STABLEMAX=stablemax, SMOOTHING=smoothing, WIDE=wide(logits.dtype), **choice,
    )  # fmt: skip
    return dlogits


@torch.library.custom_op("hrm_kernels::cross_entropy", mutates_args=())
def _cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int, stablemax: bool, smoothing: float
) -> Tensor:
    return _forward(logits, labels, ignore_index, stablemax, smoothing)


@_cross_entropy.register_fake
def _(logits: Tensor, labels: Tensor, ignore_index: int, stablemax: bool, smoothing: float) -> Tensor:
    return logits.new_empty(labels.shape, dtype=accumulate_dtype(logits.dtype))


@torch.library.custom_op("hrm_kernels::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    dlosses: Tensor, logits: Tensor, labels: Tensor, ignore_index: int, stablemax: bool, smoothing: float
) -> Tensor:
    return _backward(dlosses, logits, labels, ignore_index, stablemax, smoothing)


@_cross_entropy_backward.register_fake
def _(
    dlosses: Tensor, logits: Tensor, labels: Tensor, ignore_index: int, stablemax: bool, smoothing: float
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    logits, labels, ctx.ignore_index, ctx.stablemax, ctx.smoothing = inputs
    ctx.save_for_backward(logits, labels)


def _differentiate(ctx, dlosses: Tensor) -> tuple[Tensor | None, ...]:
    scalars = ctx.ignore_index, ctx.stablemax, ctx.smoothing
    return _cross_entropy_backward(dlosses, *ctx.saved_tensors, *scalars), None, None, None, None


_cross_entropy.register_autograd(_differentiate, setup_context=_save)


def check_labels(op: str, labels: Tensor, shape: tuple[int, ...]) -> None:
    """Checks that the labels are integers of the expected shape."""
    if labels.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: labels must be int32 or int64, got {labels.dtype}")
    check_shape(op, "labels", labels, shape)


def check_smoothing(op: str, smoothing: float) -> None:
    """Checks that the smoothing is in [0, 1)."""
    if not 0 <= smoothing < 1:
        raise ValueError(f"{op}: smoothing must be at least 0 and less than 1, got {smoothing}")


def _fits(op: str, logits: Tensor, labels: Tensor, smoothing: float) -> bool:
    """Checks the arguments; returns whether the kernel runs."""
    check_floating(op, logits=logits)
    check_labels(op, labels, tuple(logits.shape[:-1]))
    check_smoothing(op, smoothing)
    V = logits.shape[-1]
    too_wide = f"its kernel holds vocabularies of at most {MAX_VOCABULARY}, got {V}"
    return use_triton(op, logits, too_wide if V > MAX_VOCABULARY else None)


def stablemax_cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int = -100, *, smoothing: float = 0.0
) -> Tensor:
    """Per-token stablemax cross-entropy.

    logits: (..., V); labels: (...), int32 or int64 in 0..V-1 or ignore_index. smoothing: in [0, 1), the share
    of the target that is spread over all V words, the label included. Returns (...), float32 (float64 for
    float64 logits), 0 where ignored. Raises ValueError or TypeError naming the argument. Any other label is
    an error in the reference and gives NaN in the kernel, which cannot raise. Precision: see the top of this
    file; the kernel requires logits below 1e18 in magnitude.
    Source: Prieto et al. 2025 (arXiv 2501.04697).
    """
    if _fits("stablemax_cross_entropy", logits, labels, smoothing):
        return _cross_entropy(logits, labels, ignore_index, True, smoothing)
    return stablemax_cross_entropy_reference(logits, labels, ignore_index, smoothing)


def softmax_cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int = -100, *, smoothing: float = 0.0
) -> Tensor:
    """Per-token softmax cross-entropy, with the shapes and errors of `stablemax_cross_entropy`.

    Precision: float32 arithmetic for inputs of 32 bits and fewer (float64 for float64).
    """
    if _fits("softmax_cross_entropy", logits, labels, smoothing):
        return _cross_entropy(logits, labels, ignore_index, False, smoothing)
    return softmax_cross_entropy_reference(logits, labels, ignore_index, smoothing)
