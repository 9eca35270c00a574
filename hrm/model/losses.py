"""The loss of an ACT step and its metric sums."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm.config.schema import LossConfig
from hrm.data.format import IGNORE_LABEL
from hrm.model.act import Carry, Outputs, Subgoal
from hrm.model.gating import Gates, entropy_loss, saturation_loss, stability_loss
from hrm.model.layers import Linear
from hrm.model.subgoal import feudal_loss
from kernels import lm_head_softmax, lm_head_stablemax
from kernels.lm_head import HeadLoss

LOSSES = {"stablemax_cross_entropy": lm_head_stablemax, "softmax_cross_entropy": lm_head_softmax}


def token_losses(config: LossConfig, head: Linear, answer: Tensor, labels: Tensor) -> HeadLoss:
    """The token loss of each sequence with lm_head, predictions and counts; see `lm_head_stablemax`.

    answer: (B, S, D), the input of the head. labels: (B, S).
    """
    weight, cross_entropy = head.weight.to(answer.dtype), LOSSES[config.loss_type]
    bias = None if head.bias is None else head.bias.to(answer.dtype)
    return cross_entropy(answer, weight, labels, IGNORE_LABEL, bias, smoothing=config.label_smoothing)


def act_loss(
    config: LossConfig,
    head: Linear,
    carry: Carry,
    outputs: Outputs,
    previous_gates: Tensor | None = None,
    gate_loss_scale: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """lm + w * q_halt + 0.5 * q_continue + extras, summed over the batch, and the metric sums.

    head: lm_head. carry: after the step. previous_gates: from the carry before the step, for the stability
    loss. gate_loss_scale: (), scale of the gate losses; None disables them. lm is a sequence's mean token
    loss over its valid tokens, with config.label_smoothing. At ACT step t its weight is config.step_decay^(t
    - 1), which the metric lm_loss leaves out. Qasim and Zhang 2025 (arXiv 2511.08653) also divide by the sum
    of the weights. w is config.q_halt_weight. The target of q_halt is whether every valid token is right;
    q_continue has its own target; both have a binary cross-entropy loss with logits. The extras are the
    weighted feudal loss and gate losses. Returns the loss () and sums (), over sequences that halted at this
    step: count, accuracy, exact_accuracy, q_halt_accuracy, steps; over the batch: lm_loss, q_halt_loss and,
    with a target, q_continue_loss; the losses and metrics of what a variant adds. A sequence without labels,
    such as padding, counts as right in q_halt_loss. Float32 (float64 for float64 states). Source: the
    official HRM code.
    """
    answer, q_halt, q_continue, target, subgoal, gated = outputs
    lm = token_losses(config, head, answer, carry.labels)
    lm_loss = taught_lm_loss = lm.loss.sum()
    if config.step_decay != 1:
        taught_lm_loss = (lm.loss * config.step_decay ** (carry.steps - 1).to(lm.loss.dtype)).sum()

    with torch.no_grad():
        is_exact = lm.right_count == lm.valid_count
        counted = carry.halted & (lm.valid_count > 0)
        accuracy = lm.right_count / lm.valid_count.clamp(min=1).to(lm.loss.dtype)
        sums = {
            "count": counted.sum(),
            "accuracy": torch.where(counted, accuracy, 0).sum(),
            "exact_accuracy": (counted & is_exact).sum(),
            "q_halt_accuracy": (counted & ((q_halt >= 0) == is_exact)).sum(),
            "steps": torch.where(counted, carry.steps, 0).sum(),
        }

    q_halt_loss = F.binary_cross_entropy_with_logits(q_halt, is_exact.to(q_halt.dtype), reduction="sum")
    loss = taught_lm_loss + config.q_halt_weight * q_halt_loss
    sums |= {"lm_loss": lm_loss.detach(), "q_halt_loss": q_halt_loss.detach()}
    if target is not None:
        q_continue_loss = F.binary_cross_entropy_with_logits(q_continue, target, reduction="sum")
        loss = loss + 0.5 * q_continue_loss
        sums["q_continue_loss"] = q_continue_loss.detach()
    if subgoal is not None:
        added, metrics = _subgoal_loss(subgoal, lm.valid_count > 0)
        loss, sums = loss + config.feudal_loss_weight * added, sums | metrics
    if gated is not None and gate_loss_scale is not None:
        # New sequences have no gates of a previous step.
        losses = _gate_losses(config, [module.gates for module in gated], previous_gates, carry.steps == 1)
        for name, (weight, added) in losses.items():
            loss = loss + gate_loss_scale * weight * added
            sums[name] = added.detach()
    return loss, sums


def _subgoal_loss(subgoal: Subgoal, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The feudal loss summed over all sequences except padding, and the subgoal metrics."""
    loss, alignment = feudal_loss(subgoal.z_L, subgoal.goal, subgoal.gate)
    loss = torch.where(real, loss, 0).sum()
    with torch.no_grad():
        of_each = {
            "goal_updates": subgoal.renewed.to(loss.dtype),
            "goal_gate_mean": subgoal.gate,
            "goal_gate_square": subgoal.gate.square(),
            "goal_norm": subgoal.goal.norm(dim=-1),
            "goal_alignment": alignment,
        }
        metrics = {name: torch.where(real, value, 0).sum() for name, value in of_each.items()}
    return loss, {"feudal_loss": loss.detach(), **metrics}


def _gate_losses(
    config: LossConfig, gates: list[Gates], previous: Tensor | None, fresh: Tensor
) -> dict[str, tuple[float, Tensor]]:
    """The gate losses with nonzero weight, by name: the weight and the sum over the batch."""
    losses = {}
    if config.gate_saturation_weight:
        losses["gate_saturation_loss"] = config.gate_saturation_weight, saturation_loss(gates).sum()
    if config.gate_entropy_weight:
        losses["gate_entropy_loss"] = config.gate_entropy_weight, entropy_loss(gates).sum()
    if config.gate_stability_weight:
        assert previous is not None
        change = stability_loss(gates, previous, fresh)
        losses["gate_stability_loss"] = config.gate_stability_weight, change.sum()
    return losses
