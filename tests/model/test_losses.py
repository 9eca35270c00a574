"""The loss and the metric sums on a batch small enough to do by hand."""

import math

import pytest
import torch

from hrm.config.load import LossConfig
from hrm.model.act import Carry, Outputs
from hrm.model.layers import Linear
from hrm.model.losses import act_loss

HEAD = Linear(3, 3)
HEAD.weight = torch.nn.Parameter(torch.eye(3, dtype=torch.float64))


def example() -> tuple[Carry, Outputs]:
    """Four sequences of two cells, three words: right, half right, unlabelled, right but still thinking."""
    # The head is the identity, so that these states are the logits.
    answer = torch.tensor(
        [
            [[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]],
            [[9.0, 0.0, 0.0], [9.0, 0.0, 0.0]],
            [[9.0, 0.0, 0.0], [9.0, 0.0, 0.0]],
            [[0.0, 0.0, 9.0], [0.0, 0.0, 9.0]],
        ],
        dtype=torch.float64,
        requires_grad=True,
    )
    labels = torch.tensor([[0, 1], [0, 2], [-100, -100], [2, -100]], dtype=torch.int32)
    zeros = torch.zeros(4, 1, 1)
    carry = Carry(
        zeros,
        zeros,
        torch.tensor([3, 5, 7, 2], dtype=torch.int32),
        torch.tensor([True, True, True, False]),
        labels,
        labels,
        torch.zeros(4, dtype=torch.int32),
        goal=torch.zeros(4, 0),
        goal_gate=torch.zeros(4),
        gates=torch.zeros(4, 0),
        keys=torch.zeros(4, 0, dtype=torch.int32),
    )
    q = torch.tensor([[0.0, 2.0, -1.0, 1.0], [0.5, -0.5, 0.0, 3.0]], dtype=torch.float64)
    return carry, Outputs(answer, q[0], q[1], torch.tensor([0.2, 0.9, 0.5, 1.0], dtype=torch.float64))


def bce(x: float, target: float) -> float:
    p = 1 / (1 + math.exp(-x))
    return -target * math.log(p) - (1 - target) * math.log(1 - p)


# A token that is right has p = 10/12 by stablemax, one that is wrong 1/12.
RIGHT, WRONG = -math.log(10 / 12), -math.log(1 / 12)
LM = RIGHT + (RIGHT + WRONG) / 2 + 0 + RIGHT
# A sequence without a label counts as right, as in the official code.
Q_HALT = bce(0, 1) + bce(2, 0) + bce(-1, 1) + bce(1, 1)
Q_CONTINUE = bce(0.5, 0.2) + bce(-0.5, 0.9) + bce(0, 0.5) + bce(3, 1)


def test_loss_and_sums_by_hand():
    carry, outputs = example()
    loss, sums = act_loss(LossConfig("stablemax_cross_entropy"), HEAD, carry, outputs)
    assert loss.item() == pytest.approx(LM + 0.5 * (Q_HALT + Q_CONTINUE), rel=1e-12)
    assert {name: value.item() for name, value in sums.items()} == pytest.approx(
        {
            # Halted and labelled: the first two.
            "count": 2,
            "accuracy": 1.5,
            "exact_accuracy": 1,
            # The first says 0, right by its >= 0; the second says 2, wrong.
            "q_halt_accuracy": 1,
            "steps": 8,
            "lm_loss": LM,
            "q_halt_loss": Q_HALT,
            "q_continue_loss": Q_CONTINUE,
        },
        rel=1e-6,
    )


def test_without_a_target_there_is_no_continue_loss():
    carry, outputs = example()
    outputs = outputs._replace(target_q_continue=None)
    loss, sums = act_loss(LossConfig("stablemax_cross_entropy"), HEAD, carry, outputs)
    assert loss.item() == pytest.approx(LM + 0.5 * Q_HALT, rel=1e-12)
    assert "q_continue_loss" not in sums


def test_softmax_is_the_other_choice():
    carry, outputs = example()
    _, sums = act_loss(LossConfig("softmax_cross_entropy"), HEAD, carry, outputs)
    right = math.log(1 + 2 * math.exp(-9))
    assert sums["lm_loss"].item() == pytest.approx(3 * right + 4.5, rel=1e-9)


def test_labels_are_smoothed_and_q_halt_weighed_as_configured():
    carry, outputs = example()
    config = LossConfig("stablemax_cross_entropy", label_smoothing=0.3, q_halt_weight=0.05)
    loss, sums = act_loss(config, HEAD, carry, outputs)
    # The label keeps 0.8 of its target: 0.7 and a third of the 0.3 that all three words share.
    right = -(0.8 * math.log(10 / 12) + 0.2 * math.log(1 / 12))
    wrong = -(0.8 * math.log(1 / 12) + 0.1 * math.log(10 / 12) + 0.1 * math.log(1 / 12))
    assert sums["lm_loss"].item() == pytest.approx(right + (right + wrong) / 2 + right, rel=1e-9)
    assert loss.item() == pytest.approx(sums["lm_loss"].item() + 0.05 * Q_HALT + 0.5 * Q_CONTINUE, rel=1e-9)


def test_later_steps_weigh_less():
    carry, outputs = example()
    loss, sums = act_loss(LossConfig("stablemax_cross_entropy", step_decay=0.7), HEAD, carry, outputs)
    lm = 0.7**2 * RIGHT + 0.7**4 * (RIGHT + WRONG) / 2 + 0.7 * RIGHT
    assert loss.item() == pytest.approx(lm + 0.5 * (Q_HALT + Q_CONTINUE), rel=1e-9)
    assert sums["lm_loss"].item() == pytest.approx(LM, rel=1e-9)


def test_ignored_tokens_send_no_gradient():
    carry, outputs = example()
    act_loss(LossConfig("stablemax_cross_entropy"), HEAD, carry, outputs)[0].backward()
    gradient = outputs.answer.grad
    assert gradient is not None
    assert not gradient[2].any() and not gradient[3, 1].any()
    # -(1 - p) * l'(9) with l' = 1 / (1 + 9), not divided as it is the only valid token of its sequence
    assert gradient[3, 0, 2].item() == pytest.approx(-(1 - 10 / 12) / 10, rel=1e-12)
