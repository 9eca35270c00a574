"""Whole models on the Triton kernels: the training of the reference, step by step."""

from dataclasses import replace

import pytest
import torch

import kernels
from hrm.data.dataset import Batch
from hrm.engine import Engine
from tests.kernels.compare import DEVICE
from tests.test_engine import METADATA, batches, make_config

STEPS, ROWS = 20, 3


def some(batch: Batch) -> Batch:
    """As many sequences as the interpreter has patience for."""
    return replace(batch, **{name: array[:ROWS] for name, array in vars(batch).items()})


def train(backend: str, config) -> tuple[list[float], dict[str, float], torch.Tensor]:
    """The losses of each step, the evaluation after the last, and all weights."""
    kernels.set_backend(backend)
    engine = Engine(config, METADATA, total_steps=STEPS, device=DEVICE)
    losses = []
    for batch, _ in zip(batches(), range(STEPS), strict=False):
        engine.train_step(some(batch))
        losses.append(engine.pop_metrics()["loss"])
    evaluation = engine.evaluate([("all", some(next(batches(1))), ROWS)])["all"]
    return losses, evaluation, engine.parameters.data


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ({"use_gating": False}, {}),
        ({"use_gating": True}, {}),
        ({"pos_encodings": "learned", "puzzle_emb_ndim": 0}, {"softmax": True}),
    ],
    ids=["v1", "gated", "learned positions and softmax"],
)
def test_twenty_steps_follow_the_reference(arch, changes):
    """Losses to 1e-4, weights to 1e-3 of their norm: float32 sums in another order, over twenty updates."""
    small = {"num_heads": 2, "L_cycles": 1, "H_layers": 1, "L_layers": 1}
    config = make_config({**small, **arch}, dtype="float32", lr=3e-3, global_batch_size=ROWS)
    if changes:
        config.loss.loss_type = "softmax_cross_entropy"
    losses, evaluation, weights = train("triton", config)
    expected_losses, expected_evaluation, expected_weights = train("reference", config)
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert expected_losses[-1] < 0.95 * expected_losses[0]
    assert (weights - expected_weights).norm() / expected_weights.norm() < 1e-3
    assert evaluation["count"] == expected_evaluation["count"] == ROWS
    assert evaluation["lm_loss"] == pytest.approx(expected_evaluation["lm_loss"], rel=1e-3)
