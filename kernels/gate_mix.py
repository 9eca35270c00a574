"""Gated mixing of a reasoning module's sources.

Forward, per token, with the sources s = [z, o, x] side by side and D elements each:

    hidden = silu(W1 s + b1);   g = sigmoid(W2 hidden + b2) = [g_z, g_o, g_x];   y = g_z z + g_o o + g_x x

With two sources (x absent) the columns of W1 and the rows of W2 and b2 that belong to x contribute
exactly nothing, so they are not read and their gradient is zero.

Backward, recomputing hidden and g from the sources:
    dg = [dy z, dy o, dy x];   da = dg g (1 - g);   dhidden = W2^T da, through silu' to dp
    ds = [g_z dy, g_o dy, g_x dy] + W1^T dp;   dW2 = da hidden^T, db2 = sum da, dW1 = dp s^T, db1 = sum dp
Bytes: each source and the weights are read once, y is written once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import check_floating, check_shape


def gate_mix_reference(
    z: Tensor, o: Tensor, x: Tensor | None, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tensor:
    """The gate network and the mixing in plain PyTorch; see `gate_mix`."""
    sources = (z, o) if x is None else (z, o, x)
    width = sum(s.shape[-1] for s in sources)
    hidden = F.silu(F.linear(torch.cat(sources, dim=-1), w1[:, :width], b1))
    gates = torch.sigmoid(F.linear(hidden, w2[:width], b2[:width])).chunk(len(sources), dim=-1)
    mixed = gates[0] * sources[0]
    for gate, source in zip(gates[1:], sources[1:], strict=True):
        mixed = mixed + gate * source
    return mixed


def gate_mix(
    z: Tensor, o: Tensor, x: Tensor | None, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tensor:
    """Mixes two or three sources, each scaled per channel by a gate computed from all of them.

    z, o, x: (..., D), the primary state, the secondary state and the input (None: two sources).
    w1: (R, 3*D), b1: (R,), w2: (3*D, R), b2: (3*D,), with columns and rows in the order z, o, x.
    Returns (..., D) in z's dtype. Raises ValueError or TypeError naming the argument.
    Source: the gated fork of HRM; the gates are those of a mixture without normalisation.
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
    return gate_mix_reference(z, o, x, w1, b1, w2, b2)
