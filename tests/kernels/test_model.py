"""Whole models on the Triton kernels: the training of the reference, step by step."""

from dataclasses import replace

import pytest
import torch

import kernels
from hrm.config.load import ArchConfig
from hrm.data.dataset import Batch
from hrm.engine.engine import Engine
from hrm.model.layers import Block, Linear
from kernels.matmul import rstd_of
from kernels.rope import rope_tables
from tests.kernels.compare import DEVICE, randn
from tests.support.engines import METADATA, batches, make_config

# Every sequence is replaced once.
STEPS, ROWS = 3, 3
SMALL = {"halt_max_steps": 2, "num_heads": 2, "H_cycles": 1, "L_cycles": 1, "H_layers": 1, "L_layers": 1}


def some(batch: Batch) -> Batch:
    """As many sequences as the interpreter has patience for."""
    return replace(batch, **{name: array[:ROWS] for name, array in vars(batch).items()})


def train(backend: str, config) -> tuple[list[float], dict[str, float], torch.Tensor, torch.Tensor]:
    """The losses of each step, the evaluation after the last, all weights, and how far they went."""
    kernels.set_backend(backend)
    engine = Engine(config, METADATA, total_steps=STEPS, device=DEVICE)
    losses, start = [], engine.parameters.data.clone()
    for batch, _ in zip(batches(), range(STEPS), strict=False):
        engine.train_step(some(batch))
        losses.append(engine.pop().metrics["loss"])
    evaluation = engine.evaluate([("all", some(next(batches(1))), ROWS)])["all"]
    return losses, evaluation, engine.parameters.data, engine.parameters.data - start


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ({"use_gating": False}, {}),
        ({"pos_encodings": "learned", "puzzle_emb_ndim": 0}, {"softmax": True}),
    ],
    ids=["v1", "gated, learned positions and softmax"],
)
def test_training_follows_the_reference(arch, changes):
    """Losses to 1e-5, weights to 1e-4 of the way they went: float32 sums in another order."""
    config = make_config({**SMALL, **arch}, dtype="float32", lr=3e-3, global_batch_size=ROWS)
    if changes:
        config.loss.loss_type = "softmax_cross_entropy"
    losses, evaluation, weights, _ = train("triton", config)
    expected_losses, expected_evaluation, expected_weights, way = train("reference", config)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert (weights - expected_weights).norm() < 1e-4 * way.norm()
    assert evaluation["count"] == expected_evaluation["count"] == ROWS
    assert evaluation["lm_loss"] == pytest.approx(expected_evaluation["lm_loss"], rel=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("queries", [None, 1])
def test_a_deferred_block_is_the_block(scaled, queries):
    block = Block(ArchConfig(hidden_size=32, num_heads=2, expansion=2.0), 10, "auto")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in block.modules():
            if isinstance(layer, Linear):
                layer.reset_parameters(generator)
        block.to(DEVICE)
        h, (cos, sin) = randn(2, 10, 32, seed=0).float(), (t.to(DEVICE) for t in rope_tables(10, 16))
        mean_square = 0.2 + randn(2, 10, 3, seed=1).float().abs() if scaled else None
        y, y_mean_square = block.deferred(h, mean_square, cos, sin, queries)
        kernels.set_backend("reference")
        x = h if mean_square is None else h * rstd_of(mean_square)[..., None]
        expected, _ = block(x, x, cos, sin, queries)
    assert y.shape == (2, queries or 10, 32) and y_mean_square.shape[:2] == y.shape[:2]
    torch.testing.assert_close(y * rstd_of(y_mean_square)[..., None], expected, rtol=1e-5, atol=1e-5)
