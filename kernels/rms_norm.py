"""Root-mean-square norm of a residual sum, without a weight.

Forward, per row of D elements:   h = x + residual;  rstd = 1 / sqrt(mean(h^2) + eps);  y = h * rstd
Backward, the same for both terms:   dx = rstd * (dy - h * rstd^2 * mean(h * dy))

Bytes: two reads and one write forward; dy, h read and dx written backward.
"""

import torch
from torch import Tensor

from kernels.checks import accumulate_dtype, check_floating, check_shape


def rms_norm_reference(x: Tensor, residual: Tensor, eps: float) -> Tensor:
    """The norm in plain PyTorch; see `rms_norm`."""
    wide = accumulate_dtype(x.dtype)
    h = x.to(wide) + residual.to(wide)
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x: Tensor, residual: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalised sum of a block's input and output: h / sqrt(mean(h^2) + eps), h = x + residual.

    x, residual: (..., D), same dtype and shape. Returns (..., D) in that dtype. Sums and reduces in
    float32 (float64 for float64) and rounds once, on store. Raises ValueError or TypeError naming the
    argument. Source: Zhang and Sennrich 2019 (arXiv 1910.07467).
    """
    check_floating("rms_norm", x=x, residual=residual)
    check_shape("rms_norm", "residual", residual, tuple(x.shape))
    return rms_norm_reference(x, residual, eps)
