"""Non-causal softmax attention over packed projections, with rotary embedding in its prologue.

Forward, per batch and head, with q, k, v of shape (T, d) cut from one packed row [q | k | v]:

    q, k = rope(q), rope(k)
    o = softmax(q k^T / sqrt(d)) v

Backward: the usual softmax attention gradient; rope's is the inverse rotation.
Bytes: qkv is read once and o written once; at T of about 100 scores and probabilities fit on chip.
"""

import torch.nn.functional as F
from torch import Tensor

from kernels.checks import check_floating, check_shape
from kernels.rope import rope_reference


def attention_reference(
    qkv: Tensor, num_heads: int, cos: Tensor | None, sin: Tensor | None, queries: int | None
) -> Tensor:
    """Attention through PyTorch's own scaled_dot_product_attention; see `attention`."""
    batch, length, _ = qkv.shape
    heads = qkv.view(batch, length, 3 * num_heads, -1)
    qk, v = heads[:, :, : 2 * num_heads], heads[:, :, 2 * num_heads :]
    if cos is not None and sin is not None:
        qk = rope_reference(qk, cos, sin)
    q, k = qk[:, :queries, :num_heads], qk[:, :, num_heads:]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def attention(
    qkv: Tensor,
    num_heads: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    queries: int | None = None,
) -> Tensor:
    """Attends every position to every position, heads side by side.

    qkv: (B, T, 3*D), each row [q heads | k heads | v heads]. cos, sin: (T, D/num_heads) to rotate q and
    k, or None for no rotation. queries: only the first this many positions ask (all of them by default).
    Returns (B, T or queries, D) in qkv's dtype; the softmax is taken in float32 for narrower inputs.
    Raises ValueError or TypeError naming the argument.
    """
    check_floating("attention", qkv=qkv)
    if qkv.dim() != 3 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"attention: qkv must be (B, T, 3*D) with D a multiple of num_heads={num_heads}, "
            f"got {tuple(qkv.shape)}"
        )
    if (cos is None) != (sin is None):
        raise ValueError("attention: cos and sin go together; got only one of them")
    if cos is not None and sin is not None:
        expected = (qkv.shape[1], qkv.shape[2] // (3 * num_heads))
        check_shape("attention", "cos", cos, expected)
        check_shape("attention", "sin", sin, expected)
    if queries is not None and not 1 <= queries <= qkv.shape[1]:
        raise ValueError(f"attention: queries must be in 1..{qkv.shape[1]}, got {queries}")
    return attention_reference(qkv, num_heads, cos, sin, queries)
