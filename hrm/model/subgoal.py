"""The addition of the feudal architecture: a head with which the high-level state sets goals for the next
steps.

Source: Vezhnevets et al. 2017, FeUdal Networks (arXiv 1703.01161), adapted to the states of an HRM.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrm.config.schema import ArchConfig
from hrm.model.layers import Linear
from kernels.checks import accumulate_dtype

# Minimum norm when a vector is normalised, so that 0 stays 0.
LEAST_LENGTH = 1e-6


class SubgoalHead(nn.Module):
    """Computes goals from z_H, a gate for each goal, and the bias of both modules' input.

    goal_proj: W_g (G, D) and b_g; gate_proj: w (1, D) and b, absent without gating; input_proj: V_L (D, G).
    G is goal_dim. `wide` names the parameters that compute in float32 for any dtype of the states.
    """

    def __init__(self, arch: ArchConfig) -> None:
        super().__init__()
        D, head = arch.hidden_size, arch.subgoal_head
        self.goal_scale, self.temperature = head.goal_scale, head.temperature
        self.goal_proj = Linear(D, head.goal_dim, bias=True)
        self.gate_proj = Linear(D, 1, bias=True) if head.gating else None
        self.input_proj = Linear(head.goal_dim, D)
        self.wide = tuple(name for name, _ in self.named_parameters() if not name.startswith("input_proj."))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Truncated LeCun normal weights, zero biases, so that a gate starts near one half."""
        for layer in self.children():
            assert isinstance(layer, Linear)
            layer.reset_parameters(generator)

    def forward(self, z_H: Tensor) -> tuple[Tensor, Tensor]:
        """Goals and gates of the current states.

        z_H: (B, T, D); the first token is the manager m. Returns, in float32 (float64 for float64),
        goal_scale * normalize(W_g m + b_g) as (B, G) and sigmoid((w m + b) / temperature) as (B,), ones
        without gating.
        """
        manager = z_H[:, 0].to(accumulate_dtype(z_H.dtype))
        goal = self.goal_scale * F.normalize(self.goal_proj(manager), dim=-1, eps=LEAST_LENGTH)
        if self.gate_proj is None:
            return goal, goal.new_ones(len(goal))
        return goal, torch.sigmoid(self.gate_proj(manager)[:, 0] / self.temperature)

    def bias(self, goal: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
        """gate * V_L goal, the input bias of both modules at every token.

        goal: (B, G), gate: (B,), as carried; zero for a fresh sequence. Returns (B, 1, D), computed in
        `dtype`.
        """
        return self.input_proj((gate[:, None] * goal).to(dtype))[:, None]


def refreshes(steps: Tensor, manager_period: int) -> Tensor:
    """Whether each sequence gets a new goal: (B,) bool. steps: (B,), ACT steps taken, including this one."""
    return (steps % manager_period == 0) | (steps == 1)


def feudal_loss(z_L: Tensor, goal: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """gate * (1 - cos(mean over the tokens of z_L, goal)) of each sequence.

    z_L: (B, T, D). goal: (B, G), gate: (B,), after the step. With G < D the mean's first G
    channels are compared. A goal of 0, which nothing can follow, has cosine 0.
    Returns the loss (B,) and, without gradient, the cosine (B,), in float32 (float64 for float64 states).

    Gradients: a goal refreshed in this step, and its gate, are computed from the current z_H with gradient,
    which reaches W_g, b_g, w and b, and through z_H the updates of this step. Otherwise goal and gate are
    carried over and detached, and the gradient flows only through z_L. V_L gets gradients from all losses of
    later steps, through the input of the updates with gradient. Closing the gate lowers the loss, as does
    following the goal.
    """
    worker = z_L.mean(1, dtype=accumulate_dtype(z_L.dtype))[:, : goal.shape[-1]]
    worker, goal = (F.normalize(v, dim=-1, eps=LEAST_LENGTH) for v in (worker, goal))
    cosine = (worker * goal).sum(-1)
    return gate * (1 - cosine), cosine.detach()
