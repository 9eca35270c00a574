"""The loss of an ACT step and the sums its metrics are made of."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm.act import Carry, Outputs
from hrm.data.dataset import IGNORE_LABEL
from kernels import lm_head_softmax, lm_head_stablemax

LOSSES = {"stablemax_cross_entropy": lm_head_stablemax, "softmax_cross_entropy": lm_head_softmax}


def act_loss(
    loss_type: str, head: Tensor, carry: Carry, outputs: Outputs
) -> tuple[Tensor, dict[str, Tensor]]:
    """lm + 0.5 * (q_halt + q_continue), summed over the batch, and the metric sums.

    head: (V, D), the weight of lm_head. carry: after the step. lm is a sequence's mean token loss over its
    valid tokens; q_halt is taught whether every valid token is right, q_continue its target, both by binary
    cross-entropy with logits.
    Returns the loss () and sums (), over sequences that halted at this step: count, accuracy,
    exact_accuracy, q_halt_accuracy, steps; over the batch: lm_loss, q_halt_loss and, with a target,
    q_continue_loss. A sequence without labels, such as padding, counts as right in q_halt_loss. Float32
    (float64 for float64 states). Source: the official HRM code.
    """
    answer, q_halt, q_continue, target = outputs
    lm = LOSSES[loss_type](answer, head.to(answer.dtype), carry.labels, IGNORE_LABEL)
    lm_loss = lm.loss.sum()

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
    loss = lm_loss + 0.5 * q_halt_loss
    sums |= {"lm_loss": lm_loss.detach(), "q_halt_loss": q_halt_loss.detach()}
    if target is not None:
        q_continue_loss = F.binary_cross_entropy_with_logits(q_continue, target, reduction="sum")
        loss = loss + 0.5 * q_continue_loss
        sums["q_continue_loss"] = q_continue_loss.detach()
    return loss, sums
