"""The engine: its state, metrics, evaluation and modes. One step is compared in test_straight_line.py."""

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hrm.common.errors import UserError
from hrm.config.load import AttentionConfig
from hrm.engine import engine as engine_module
from hrm.engine.engine import Engine
from hrm.engine.modes import COMPILE, EAGER
from hrm.model.act import Carry
from kernels import backend
from tests.support.engines import B, all_state, assert_same_state, batches, make_config, make_engine


def test_training_learns_and_replaces_sequences():
    engine, source = make_engine(), batches()
    losses, halted = [], 0.0
    for _ in range(40):
        engine.train_step(next(source))
        metrics = engine.pop().metrics
        losses.append(metrics["lm_loss"])
        halted += metrics["count"]
    # Labels are a fixed map of the inputs, so the loss must fall far below log(V) = 1.8.
    assert losses[0] > 1.5 and losses[-1] < 0.5 * losses[0]
    assert halted > B


@pytest.mark.parametrize(
    "arch",
    [{}, {"init": "random", "noise": 0.05, "damping": 0.9}, {"chains": 3, "noise": 0.05}],
    ids=["plain", "random", "chains"],
)
def test_a_restored_engine_continues_bit_for_bit(arch):
    straight = make_engine(make_config(arch))
    source = list(zip(range(20), batches(), strict=False))
    for i, batch in source:
        straight.train_step(batch)
        if i == 9:
            saved = copy.deepcopy((straight.weights(), straight.training_state()))
    # Another seed's model: nothing may survive from the fresh initialisation but the exploration's seed.
    resumed = make_engine(make_config(arch))
    with torch.no_grad():
        resumed.parameters.data.normal_()
        resumed.model.H_init.normal_()
        if resumed.model.L_chains is not None:
            resumed.model.L_chains.normal_()
    resumed.load_weights(saved[0])
    resumed.load_training_state(saved[1])
    for _, batch in source[10:]:
        resumed.train_step(batch)
    assert_same_state(resumed, straight)
    assert resumed.pop() == straight.pop() and resumed.step == 20


def test_metrics_are_means_over_the_interval():
    engine, reference = make_engine(), make_engine()
    source = [batch for _, batch in zip(range(6), batches(), strict=False)]
    singles = []
    for batch in source:
        engine.train_step(batch)
        reference.train_step(batch)
        singles.append(reference.pop().metrics)
    together = engine.pop().metrics
    assert together["lm_loss"] == pytest.approx(np.mean([m["lm_loss"] for m in singles]), rel=1e-5)
    assert together["grad_norm"] == pytest.approx(np.mean([m["grad_norm"] for m in singles]), rel=1e-5)
    counts = [m["count"] for m in singles]
    assert together["count"] == sum(counts) > 0
    steps = sum(m.get("steps", 0) * m["count"] for m in singles) / sum(counts)
    assert together["steps"] == pytest.approx(steps, rel=1e-5)
    expected = together["lm_loss"] + 0.5 * (together["q_halt_loss"] + together["q_continue_loss"])
    assert together["loss"] == pytest.approx(expected, rel=1e-5)
    assert together["lr"] == 1e-2 and singles[0]["lr"] == pytest.approx(1e-2 / 3)


def test_metrics_of_halted_sequences_are_absent_without_any():
    engine = make_engine()
    engine.train_step(next(batches()))
    metrics = engine.pop().metrics
    assert metrics["count"] == 0 and "exact_accuracy" not in metrics and metrics["lm_loss"] > 0


def poison(engine: Engine, *steps: int, name: str = "lm_head.weight", value: float = math.nan) -> None:
    """Puts a value into one parameter's gradient in the steps given."""
    compute = engine.program.compute

    def poisoned(forward):
        compute(forward)
        if engine.step in steps:
            engine.parameters.views(engine.parameters.grad)[name].view(-1)[3] = value

    setattr(engine.program, "compute", poisoned)  # noqa: B010


CARRY = Carry._fields


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"ema": True, "grad_clip": 1.0, "gradient_accumulation": 2}])
def test_a_non_finite_gradient_changes_no_persistent_state(value, options):
    engine, source = make_engine(make_config(**options)), batches()
    poison(engine, 3, 5, value=value)
    untouched = make_engine(make_config(**options))
    for step in range(1, 8):
        kept = {name: tensor.clone() for name, tensor in all_state(engine).items() if name not in CARRY}
        batch = next(source)
        engine.train_step(batch)
        lasting = {name: tensor for name, tensor in all_state(engine).items() if name not in CARRY}
        same = [name for name, value in kept.items() if torch.equal(value, lasting[name])]
        if step in (3, 5):
            assert len(same) == len(kept) > 10 and engine.carry.halted.all()
        else:
            assert len(same) < len(kept) / 2
        assert all(torch.isfinite(v).all() for v in lasting.values() if v.is_floating_point())
        # Up to the first bad step all is as without the watch, the carry included.
        if step <= 2:
            untouched.train_step(batch)
            for name, tensor in all_state(untouched).items():
                assert torch.equal(tensor, all_state(engine)[name]), name
    interval = engine.pop()
    assert interval.metrics["skipped"] == 2 and interval.skipped_in_a_row == 0
    assert [math.isfinite(norm) for norm in interval.norms] == [True, True, False, True, False, True, True]
    assert all(map(math.isfinite, interval.losses)) and len(interval.losses) == 7
    finite = [loss for loss, norm in zip(interval.losses, interval.norms, strict=True) if math.isfinite(norm)]
    assert interval.metrics["loss"] == pytest.approx(sum(finite) / 5, rel=1e-6)
    assert engine.optimizer.count.item() == 5
    assert "skipped" not in engine_after(engine, source).metrics


def engine_after(engine: Engine, source: Any) -> Any:
    engine.train_step(next(source))
    return engine.pop()


def test_a_non_finite_loss_is_skipped_and_reported():
    engine, source = make_engine(), batches()
    engine.train_step(next(source))
    assert engine.pop().skipped_in_a_row == 0
    before = engine.parameters.data.clone()
    before_head = engine.model.lm_head.weight.detach().clone()
    with torch.no_grad():
        engine.model.lm_head.weight.fill_(math.nan)
    spoilt = engine.parameters.data.clone()
    for _ in range(3):
        engine.train_step(next(source))
    assert torch.equal(engine.parameters.data.nan_to_num(nan=7.0), spoilt.nan_to_num(nan=7.0))
    interval = engine.pop()
    assert interval.metrics == {"skipped": 3} and interval.skipped_in_a_row == 3
    assert all(map(math.isnan, interval.losses))
    assert engine.diagnosis().startswith("the loss and the gradient of ")
    with torch.no_grad():
        engine.model.lm_head.weight.copy_(before_head)
    assert torch.equal(engine.parameters.data, before)
    interval = engine_after(engine, source)
    assert interval.skipped_in_a_row == 0 and math.isfinite(interval.metrics["loss"])


@pytest.mark.parametrize("grad_clip", [None, 1.0])
def test_non_finite_tensors_are_reported(grad_clip):
    engine, source = make_engine(make_config(grad_clip=grad_clip)), batches()
    poison(engine, 1, name="H_level.layers.0.self_attn.qkv_proj.weight", value=math.inf)
    engine.train_step(next(source))
    found = engine.diagnosis()
    assert "the loss" not in found and "more tensors" not in found
    assert found.startswith(
        "the gradient of H_level.layers.0.self_attn.qkv_proj.weight is not finite; the largest weight"
    )


def test_evaluation_counts_every_example_once_and_leaves_the_carry():
    engine, source = make_engine(), batches()
    for _ in range(30):
        engine.train_step(next(source))
    before = all_state(engine)
    batch = next(source)
    padded = replace(batch, labels=np.where(np.arange(B)[:, None] < 5, batch.labels, -100).astype(np.int32))
    results = engine.evaluate([("a", batch, B), ("b", batch, B), ("b", padded, 5)])
    assert set(results) == {"a", "b"}
    assert results["a"]["count"] == 8 and results["b"]["count"] == 13 and results["a"]["steps"] == 4
    half = engine.evaluate([("b", padded, 5)])["b"]
    expected = (8 * results["a"]["accuracy"] + 5 * half["accuracy"]) / 13
    assert results["b"]["accuracy"] == pytest.approx(expected, rel=1e-6)
    assert 0.3 < results["a"]["accuracy"] <= 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in all_state(engine).items())


def test_evaluation_adds_up_in_float64():
    engine = make_engine()
    parts = [("all", batch, B) for batch, _ in zip(batches(), range(9), strict=False)]
    losses = [engine.evaluate([part])["all"]["lm_loss"] for part in parts]
    assert engine.evaluate(parts)["all"]["lm_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-13)


def test_implementations_that_cannot_run_are_refused_before_the_first_step(monkeypatch):
    with pytest.raises(
        UserError, match=r"^attention: backend 'flash' was requested, but flash-attn 2\.6 or later"
    ):
        make_engine(make_config(attention=AttentionConfig("flash")))
    make_engine(make_config(attention=AttentionConfig("sdpa"))).train_step(next(batches()))
    # Whether interpreted or on a GPU, the gate's kernel holds fewer units than these 512.
    monkeypatch.setattr(backend, "INTERPRETED", True)
    monkeypatch.setattr(backend, "_backend", "triton")
    with pytest.raises(
        UserError, match=r"^gate_mix: backend 'triton' was requested, but its kernels hold hidden"
    ):
        make_engine(make_config({"gate_hidden_ratio": 16.0}))
    monkeypatch.setattr(backend, "_backend", "fast")
    with pytest.raises(UserError, match="HRM_KERNELS: expected one of auto, triton, reference, got 'fast'"):
        make_engine()


def test_measuring_a_mode_changes_nothing():
    measured, untouched = make_engine(make_config(mode="auto")), make_engine()
    assert measured.mode == EAGER
    assert_same_state(measured, untouched)
    assert not measured.parameters.grad.any() and measured.step == 0
    batch = next(batches())
    for engine in (measured, untouched):
        engine.train_step(batch)
    assert measured.pop().metrics == untouched.pop().metrics


@pytest.mark.slow
@pytest.mark.parametrize("mode", [EAGER, COMPILE])
def test_a_resumed_run_keeps_the_mode_that_was_measured(monkeypatch, mode):
    asked = []

    def measure(function, whole, run, steps, device, compiling):
        asked.append(steps)
        return mode

    monkeypatch.setattr(engine_module, "faster_mode", measure)
    engine = make_engine(make_config(mode="auto"))
    assert asked == [] and engine.mode == mode and engine.mode == mode and asked == [40]
    resumed = make_engine(make_config(mode="auto"))
    resumed.load_training_state(engine.training_state())
    assert resumed.mode == mode and asked == [40]
    # What is named is taken, whatever was measured.
    named = make_engine(make_config(mode="eager"))
    named.load_training_state(engine.training_state())
    assert named.mode == EAGER


@pytest.mark.slow
def test_the_measured_compiled_step_is_used(monkeypatch):
    """It takes the buffers themselves, so that the first step meets no reason to compile again."""
    compilations = []
    compiler = torch.compile

    def counted(function, **options):
        compilations.append(function)
        return compiler(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", counted)
    engine = make_engine(make_config({"use_gating": False}, mode="auto"))

    def measure(function, whole, run, steps, device, compiling):
        run(whole)
        return COMPILE

    monkeypatch.setattr(engine_module, "faster_mode", measure)
    source = batches()
    for _ in range(3):
        # A recompilation would be refused here, from the second call on.
        engine.train_step(next(source))
    assert compilations == [engine.program.forward]
