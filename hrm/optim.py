"""Optimisers and the learning-rate schedule.

All dense parameters live in one flat float32 buffer, their gradients in another: one optimiser pass, one
all-reduce, one norm, and nothing to walk over in Python. The puzzle table has an optimiser of its own that
touches the rows of the batch alone.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from kernels import adam_atan2
from kernels.adam_atan2 import GradientStatistics

# Each parameter starts on a 64-byte boundary, for vector loads and for kernels that assume alignment.
ALIGNMENT = 16


class FlatParameters:
    """Moves a module's parameters into one buffer and gives each a gradient in another.

    data, grad: (N,) float32 (the parameters' dtype), N counting the zeros of the alignment gaps. The
    module's parameters and their .grad become views, so zeroing or reducing `grad` is one operation.
    """

    def __init__(self, module: nn.Module) -> None:
        self.names, parameters = zip(*module.named_parameters(), strict=True)
        self.shapes = [p.shape for p in parameters]
        self.offsets, size = [], 0
        for parameter in parameters:
            self.offsets.append(size)
            size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        self.data = parameters[0].new_zeros(size)
        self.grad = torch.zeros_like(self.data)
        for parameter, data, grad in zip(
            parameters, self.views(self.data).values(), self.views(self.grad).values(), strict=True
        ):
            data.copy_(parameter.detach())
            parameter.data, parameter.grad = data, grad

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Each parameter's part of a buffer laid out like `data`, by name, in the parameter's shape."""
        return {
            name: flat[offset : offset + shape.numel()].view(shape)
            for name, offset, shape in zip(self.names, self.offsets, self.shapes, strict=True)
        }


class AdamATan2:
    """AdamATan2 over flat parameters; see `kernels.adam_atan2`. Its step count lives on the device."""

    def __init__(
        self, parameters: FlatParameters, *, beta1: float, beta2: float, weight_decay: float
    ) -> None:
        self.parameters = parameters
        self.beta1, self.beta2, self.weight_decay = beta1, beta2, weight_decay
        self.exp_avg = torch.zeros_like(parameters.data)
        self.exp_avg_sq = torch.zeros_like(parameters.data)
        self.count = torch.zeros((), dtype=torch.int64, device=parameters.data.device)

    @torch.no_grad()
    def step(self, lr: Tensor) -> GradientStatistics:
        """One update from the gradients as they stand, and their statistics. lr: () float32 on the device."""
        self.count += 1
        return adam_atan2(
            self.parameters.data,
            self.parameters.grad,
            self.exp_avg,
            self.exp_avg_sq,
            lr=lr,
            step=self.count,
            beta1=self.beta1,
            beta2=self.beta2,
            weight_decay=self.weight_decay,
        )

    def state_dict(self) -> dict[str, Any]:
        """The step count, and the moments as views by parameter name."""
        moments = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        views = {name: self.parameters.views(flat) for name, flat in moments.items()}
        return {"count": self.count.item(), **views}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a `state_dict` of the same parameters."""
        self.count.fill_(state["count"])
        for name, flat in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            for parameter, view in self.parameters.views(flat).items():
                view.copy_(state[name][parameter])


def learning_rate(
    step: int, *, base_lr: float, warmup_steps: int, total_steps: int, min_ratio: float
) -> float:
    """Linear warm-up from 0, then a cosine from base_lr to min_ratio * base_lr at total_steps.

    step counts from 1. min_ratio 1 keeps base_lr. Source: the official HRM code.
    """
    if step < warmup_steps:
        return base_lr * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return base_lr * (min_ratio + max(0.0, (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))))
