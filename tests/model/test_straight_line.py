"""The whole training step and the evaluation against the straight-line implementation, in float64."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hrm.config.load import Config, LossConfig
from hrm.model.act import Sequences, act_step, draw_min_halt_steps, initial_carry, replace_halted
from hrm.model.losses import act_loss
from tests.support import straight_line as plain
from tests.support.act_cases import (
    PUZZLES,
    SOFTMAX,
    STABLEMAX,
    B,
    D,
    S,
    assert_all_close,
    make_arch,
    make_batch,
    make_model,
    make_weights,
    package_step,
    random_batch,
    straight_line_run,
    v1_carry,
)
from tests.support.act_engine import as_arrays, make_engine

pytestmark = pytest.mark.usefixtures("float64")


# Every two of the values together.
@pytest.mark.parametrize(
    ("use_gating", "q_continue", "loss_type", "pos_encodings", "puzzle_emb_ndim"),
    [
        (False, True, STABLEMAX, "rope", 0),
        (True, False, SOFTMAX, "learned", 0),
        (False, False, SOFTMAX, "rope", D),
        (True, True, STABLEMAX, "learned", D),
        (False, True, SOFTMAX, "learned", 5 * D // 2),
        (True, False, STABLEMAX, "rope", 5 * D // 2),
    ],
)
def test_training_steps(use_gating, q_continue, loss_type, pos_encodings, puzzle_emb_ndim):
    arch = make_arch(
        use_gating=use_gating,
        pos_encodings=pos_encodings,
        puzzle_emb_ndim=puzzle_emb_ndim,
        q_continue=q_continue,
    )
    generator = torch.Generator().manual_seed(0)
    weights = make_weights(arch, generator, torch.float64)
    model = make_model(arch, weights)
    carry = initial_carry(model, B, S, torch.device("cpu"))
    for batch, least, expected in straight_line_run(arch, weights, loss_type, 10, generator):
        carry, actual = package_step(model, carry, batch, least, loss_type)
        for name in expected:
            assert_all_close(actual[name], expected[name])


def test_single_act_step_has_no_target():
    arch = make_arch(halt_max_steps=1, H_layers=1, H_cycles=1, L_cycles=1)
    generator = torch.Generator().manual_seed(4)
    weights = make_weights(arch, generator, torch.float64)
    model = make_model(arch, weights)
    batch, least = random_batch(generator), torch.zeros(B, dtype=torch.int32)
    before = plain.initial_carry(weights, arch, batch)
    expected = plain.act_training_step(weights, arch, before, batch, least, STABLEMAX, B)
    carry = initial_carry(model, B, S, torch.device("cpu"))
    carry, actual = package_step(model, carry, batch, least, STABLEMAX)
    assert carry.halted.all()
    assert "target_q_continue" not in actual["outputs"] and "q_continue_loss" not in actual["metrics"]
    for name in ("outputs", "loss", "metrics", "gradients", "carry"):
        assert_all_close(actual[name], expected[name])


@pytest.mark.parametrize("use_gating", [False, True])
@pytest.mark.parametrize("loss_type", [STABLEMAX, SOFTMAX])
def test_evaluation(use_gating, loss_type):
    arch = make_arch(use_gating=use_gating, puzzle_emb_ndim=D)
    generator = torch.Generator().manual_seed(1)
    weights = make_weights(arch, generator, torch.float64)
    model = make_model(arch, weights)
    batch = random_batch(generator)
    expected = plain.evaluation(weights, arch, batch, loss_type)
    with torch.no_grad():
        carry = initial_carry(model, B, S, torch.device("cpu"))
        carry = replace_halted(model, carry, Sequences(**batch))
        rows = weights[plain.PUZZLE_TABLE][carry.puzzle_identifiers]
        for step in range(arch.halt_max_steps):
            assert not carry.halted.any(), f"halted before step {step}"
            carry, outputs = act_step(model, carry, rows, None)
        loss, metrics = act_loss(LossConfig(loss_type), model.lm_head, carry, outputs)
    assert outputs.target_q_continue is None
    assert_all_close(model.logits(carry.z_H), expected["outputs"]["logits"])
    assert_all_close(v1_carry(carry), expected["carry"])
    assert_all_close(loss, expected["loss"])
    assert_all_close(metrics, expected["metrics"])
    assert carry.halted.all()


@pytest.mark.parametrize("use_gating", [False, True])
def test_whole_training_steps(use_gating, monkeypatch):
    steps = 8
    arch = make_arch(use_gating=use_gating, puzzle_emb_ndim=3 * D // 2, halt_exploration_prob=0.5)
    config = Config(
        arch=arch,
        loss=LossConfig(),
        global_batch_size=B,
        lr=1e-2,
        lr_warmup_steps=3,
        lr_min_ratio=0.1,
        weight_decay=0.5,
        puzzle_emb_lr=3e-2,
        puzzle_emb_weight_decay=0.2,
        seed=5,
        mode="eager",
    )
    fields = vars(config) | {"total_steps": steps, "loss_type": config.loss.loss_type}
    recipe = SimpleNamespace(**fields)
    generator = torch.Generator().manual_seed(2)
    weights = make_weights(arch, generator, torch.float64)
    engine = make_engine(monkeypatch, config, weights, steps)
    first = {name: weight.clone() for name, weight in weights.items()}
    state: dict[str, Any] = {}
    carry = plain.initial_carry(weights, arch, random_batch(generator))
    for step in range(1, steps + 1):
        batch = make_batch(arch, weights, carry, generator)
        # One puzzle is in no batch, so its row has to stay where it is.
        batch["puzzle_identifiers"].clamp_(max=PUZZLES - 2)
        least = torch.from_numpy(draw_min_halt_steps(arch, config.seed, step, B))
        expected = plain.train_step(weights, arch, recipe, state, carry, batch, least)
        engine.train_step(as_arrays(batch))

        carry = expected["carry"]
        # What variants carry besides stays empty.
        kept = engine.carry._asdict()
        assert sum(kept.pop(name).count_nonzero() for name in ("goal", "goal_gate", "gates", "keys")) == 0
        assert_all_close(kept, carry)
        assert_all_close(engine.weights(), weights)
        # Metrics leave the engine in float32.
        metrics, sums = engine.pop().metrics, expected["metrics"]
        assert metrics["loss"] == pytest.approx(expected["loss"].item() / B, rel=1e-6)
        assert metrics["q_continue_loss"] == pytest.approx(sums["q_continue_loss"].item() / B, rel=1e-6)
        if sums["count"]:
            assert metrics["accuracy"] == pytest.approx((sums["accuracy"] / sums["count"]).item(), rel=1e-6)
            assert metrics["steps"] == pytest.approx((sums["steps"] / sums["count"]).item(), rel=1e-6)
        norm = torch.cat([gradient.flatten() for gradient in expected["gradients"].values()]).norm()
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)

    moments = engine.optimizer.state_dict()
    assert_all_close(moments["exp_avg"], {name: state[name][0] for name in moments["exp_avg"]})
    assert_all_close(moments["exp_avg_sq"], {name: state[name][1] for name in moments["exp_avg_sq"]})
    moved = {name: not torch.equal(weights[name], before) for name, before in first.items()}
    assert moved == {name: name not in plain.BUFFERS for name in first}
    assert torch.equal(weights[plain.PUZZLE_TABLE][-1], first[plain.PUZZLE_TABLE][-1])


def test_engine_evaluation(monkeypatch):
    arch = make_arch(puzzle_emb_ndim=D)
    generator = torch.Generator().manual_seed(3)
    weights = make_weights(arch, generator, torch.float64)
    engine = make_engine(monkeypatch, Config(arch=arch, global_batch_size=B, mode="eager"), weights, 1)
    batches = [random_batch(generator) for _ in range(2)]
    sums = [plain.evaluation(weights, arch, batch, STABLEMAX)["metrics"] for batch in batches]
    result = engine.evaluate(("all", as_arrays(batch), B) for batch in batches)["all"]
    assert result.pop("count") == 2 * B
    expected = {name: (sums[0][name] + sums[1][name]).item() / (2 * B) for name in sums[0] if name != "count"}
    # Metrics leave the engine in float32.
    assert result == pytest.approx(expected, rel=1e-6)
    assert result["steps"] == arch.halt_max_steps
