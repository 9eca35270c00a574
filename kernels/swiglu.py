"""SwiGLU's elementwise half.

Forward:    y = silu(gate) * up, with silu(g) = g * sigmoid(g)
Backward:   dup = dy * silu(gate);  dgate = dy * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))

Saved: the packed input alone. Bytes: 2N read, N written forward, for N outputs.
"""

import torch.nn.functional as F
from torch import Tensor

from kernels.checks import accumulate_dtype, check_floating


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The product in plain PyTorch; see `swiglu`."""
    gate, up = gate_up.to(accumulate_dtype(gate_up.dtype)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """Gated activation silu(gate) * up of one packed projection.

    gate_up: (..., 2*I), gate first. Returns (..., I) in the same dtype; computed in float32 (float64 for
    float64), rounded once. Raises ValueError or TypeError naming the argument. Source: Shazeer 2020
    (arXiv 2002.05202).
    """
    check_floating("swiglu", gate_up=gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: gate_up must have an even last dimension, got {tuple(gate_up.shape)}")
    return swiglu_reference(gate_up)
