"""What the gated architecture adds: one gate network per reasoning module."""

import torch
from torch import Tensor, nn

from hrm.layers import Linear
from kernels import gate_mix


class GatingNetwork(nn.Module):
    """Replaces the sum of a reasoning module's sources by a gated sum; see `kernels.gate_mix`.

    gate_proj: Linear(3D, R), SiLU, Linear(R, 3D) with R = gate_hidden_ratio * D, under the names of the gated
    fork's checkpoints. The last bias starts at gate_init_bias: -2.2 opens every gate by a tenth.
    """

    def __init__(self, hidden_size: int, gate_hidden_ratio: float, gate_init_bias: float) -> None:
        super().__init__()
        hidden = int(gate_hidden_ratio * hidden_size)
        self.gate_init_bias = gate_init_bias
        # The kernel applies the activation between them; it stands here to give the layers their names.
        self.gate_proj = nn.Sequential(
            Linear(3 * hidden_size, hidden, bias=True), nn.SiLU(), Linear(hidden, 3 * hidden_size, bias=True)
        )

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Truncated LeCun normal weights; zero biases, but for the last, which opens the gates."""
        for layer in self.gate_proj:
            if isinstance(layer, Linear):
                layer.reset_parameters(generator)
        *_, last_bias = self.gate_proj.parameters()
        nn.init.constant_(last_bias, self.gate_init_bias)

    def forward(self, z: Tensor, o: Tensor, x: Tensor | None) -> Tensor:
        """z, o, x: (B, T, D) primary state, secondary state, input or None. Returns (B, T, D)."""
        w1, b1, w2, b2 = (p.to(z.dtype) for p in self.gate_proj.parameters())
        return gate_mix(z, o, x, w1, b1, w2, b2)
