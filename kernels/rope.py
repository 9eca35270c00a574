"""Rotary position embedding, half-split.

Forward, per head vector x = [x1, x2] (halves of length d/2) at position t, with angles a = t * theta^(-2i/d):

    y = [x1 cos a - x2 sin a,  x2 cos a + x1 sin a]

Backward: the rotation by -a of dy. Nothing but the angles is needed, so nothing is saved.
Bytes: each element of x is read once and written once; the tables (T, d) stay in cache.
"""

import torch
from torch import Tensor

from kernels.checks import accumulate_dtype, check_floating, check_shape


def rope_tables(
    length: int, head_dim: int, theta: float = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, each (length, head_dim), both halves alike.

    Source: Su et al. 2021 (arXiv 2104.09864), in the half-split layout of the official HRM code, which
    takes the angles in float32; a float64 table is made for tests in that precision.
    """
    inverse_frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=dtype) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=dtype), inverse_frequency)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation in plain PyTorch; see `rope`."""
    x1, x2 = x.to(accumulate_dtype(x.dtype)).chunk(2, dim=-1)
    half = x1.shape[-1]
    cos, sin = cos[:, None, :half].to(x1.dtype), sin[:, None, :half].to(x1.dtype)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates head vectors by their positions' angles.

    x: (B, T, n, d), d even; n counts every head to rotate, so queries and keys go in together.
    cos, sin: (T, d) from `rope_tables`. Returns (B, T, n, d) in x's dtype, computed in float32
    (float64 for float64). Raises ValueError or TypeError naming the argument.
    """
    check_floating("rope", x=x)
    if x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(f"rope: x must be (B, T, n, d) with d even, got {tuple(x.shape)}")
    check_shape("rope", "cos", cos, (x.shape[1], x.shape[3]))
    check_shape("rope", "sin", sin, (x.shape[1], x.shape[3]))
    return rope_reference(x, cos, sin)
