"""Modes against each other over whole runs, and programs that are captured: warm-up, capture, replay."""

from dataclasses import replace
from importlib import import_module
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from hrm.common.errors import UserError
from hrm.config.schema import LossConfig, SubgoalConfig
from hrm.engine import cuda_graph as program_module
from hrm.engine import engine as engine_module
from hrm.engine.cuda_graph import WARM_UP, Program
from hrm.engine.engine import Engine
from hrm.engine.modes import COMPILE, EAGER, Mode
from hrm.engine.step_inputs import Feed
from tests.support import graph_stand_in
from tests.support.engines import METADATA, B, S, all_state, assert_same_state, batches, make_config

CPU = torch.device("cpu")
CAPTURED = Mode("graph", compiled=False, captured=True)
STEPS = 16
FEUDAL = SubgoalConfig(enabled=True, manager_period=2, goal_dim=16)
EXTRA_LOSSES = LossConfig(
    feudal_loss_weight=0.1,
    gate_saturation_weight=0.1,
    gate_entropy_weight=0.1,
    gate_stability_weight=0.1,
    gate_loss_warmup_steps=4,
    gate_loss_ramp_steps=8,
)
SMOOTHED = LossConfig(label_smoothing=0.2, q_halt_weight=0.05)
TRM = {
    "use_gating": False,
    "share_levels": True,
    "gradient": "last_cycle",
    "q_continue": False,
    "puzzle_emb_len": 3,
    "H_cycles": 2,
}
# Architecture and options of a run; `all` has every part that v1 has not, but for those of `trm`.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "v1": ({"use_gating": False, "H_cycles": 2}, {}),
    "gated": ({"use_gating": True, "puzzle_emb_ndim": 0, "L_cycles": 2}, {}),
    "all": (
        {"gating_type": "hierarchical", "subgoal_head": FEUDAL},
        {"loss": EXTRA_LOSSES, "ema": True, "ema_rate": 0.9, "grad_clip": 1.0},
    ),
    "trm": (TRM, {"ema": True}),
    "trm mixer": ({**TRM, "mlp_t": True}, {}),
    "muon": (
        {"use_gating": True},
        {"optimizer": "muon", "ema": True, "ema_start": 8, "grad_clip": 1.0, "loss": SMOOTHED},
    ),
    "random": ({"init": "random", "noise": 0.05, "damping": 0.9}, {}),
    "chains": ({"chains": 3, "noise": 0.05}, {}),
}


@pytest.fixture
def captures_on_cpu(monkeypatch):
    """Captures that were made, each by the stand-in; `Program` otherwise does what it does on CUDA."""
    made: list[Any] = []

    def capture(body, device):
        made.append(body)
        return graph_stand_in.capture(body, device)

    monkeypatch.setattr(program_module, "capture", capture)
    monkeypatch.setattr(program_module, "aside", lambda body, device: body())
    # Otherwise the update would look at its flag, as it may on a CPU.
    for module in ("kernels.adam_atan2", "kernels.muon"):
        monkeypatch.setattr(import_module(module), "device_of", lambda _: torch.device("cuda"))
    return made


def engine_in(mode: Mode, arch: dict[str, Any] | None = None, **changes: Any) -> Engine:
    engine = Engine(make_config(arch, **changes), METADATA, total_steps=STEPS)
    engine._mode = mode
    # A new model would end no sequence early.
    q_head = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) / 3
    engine.load_weights({"q_head.weight": q_head, "q_head.bias": torch.zeros(2)})
    return engine


def run(engine: Engine, steps: int = STEPS) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Each step's metrics, and an evaluation's in the end."""
    metrics = []
    for batch, _ in zip(batches(), range(steps), strict=False):
        engine.train_step(batch)
        metrics.append(engine.pop().metrics)
    return metrics, engine.evaluate([("all", next(batches(1)), B)])["all"]


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        *product(("v1", "muon"), ("float32", "bfloat16")),
        ("gated", "bfloat16"),
        ("trm mixer", "bfloat16"),
        *product(("all", "trm", "random", "chains"), ("float32",)),
    ],
)
def test_a_replayed_run_equals_the_eager_one_bit_for_bit(captures_on_cpu, variant, dtype):
    arch, options = VARIANTS[variant]
    options = {**options, "dtype": dtype, "lr_min_ratio": 0.1}
    eager, captured = (engine_in(mode, arch, **options) for mode in (EAGER, CAPTURED))
    expected, actual = run(eager), run(captured)
    assert actual == expected
    # One graph for the step, and the evaluation's comes after its own warm-up.
    assert len(captures_on_cpu) == 1
    assert_same_state(captured, eager)
    # Everything happened that makes one step unlike another.
    metrics = expected[0]
    assert (
        sum(m["count"] for m in metrics) > 3 * B and metrics[0]["lr"] < metrics[2]["lr"] > metrics[-1]["lr"]
    )
    assert len({m["steps"] for m in metrics if m["count"]}) > 1


def test_stages_that_were_captured_before_are_replayed_bit_for_bit(captures_on_cpu):
    options: dict[str, Any] = {"optimizer": "muon", "ema": True}
    eager, captured = (engine_in(mode, {"halt_max_steps": 4}, **options) for mode in (EAGER, CAPTURED))
    first = captured.config.arch
    # The last stage has another metric, so its buffers are made anew.
    stages = [first, replace(first, H_cycles=2), replace(first, q_continue=False)]
    before = {name: tensor.clone() for name, tensor in all_state(captured).items()}
    captured.prepare(stages[1:])
    assert captured.config.arch == first and len(captures_on_cpu) == 3
    assert [
        name for name, tensor in all_state(captured).items() if not torch.equal(tensor, before[name])
    ] == []
    for made, arch in zip((3, 3, 4), stages, strict=True):
        for engine in (eager, captured):
            engine.enter(arch)
        assert run(captured, 5) == run(eager, 5)
        assert len(captures_on_cpu) == made
        assert_same_state(captured, eager)


def test_a_replayed_evaluation_equals_the_eager_one(captures_on_cpu):
    eager, captured = engine_in(EAGER), engine_in(CAPTURED)
    source = [("all", batch, B) for batch, _ in zip(batches(), range(WARM_UP + 3), strict=False)]
    assert captured.evaluate(source) == eager.evaluate(source)
    assert len(captures_on_cpu) == 1
    sums = captured.inference(B).sums.clone()
    for _ in range(WARM_UP + 1):
        answers = [
            engine.inference(B).solve(source[0][1].inputs, source[0][1].puzzle_identifiers)
            for engine in (eager, captured)
        ]
    # Answers alone have a graph of their own, which computes no loss.
    assert len(captures_on_cpu) == 2 and torch.equal(captured.inference(B).sums, sums)
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(*answers, strict=True))
    assert answers[0][0].shape == (B, S) and answers[0][1].shape == (B,)


def test_a_solve_of_another_shape_is_refused():
    inputs, identifiers = next(batches()).inputs, next(batches()).puzzle_identifiers
    inference = engine_in(EAGER).inference(B)
    for wrong in ((inputs[:1], identifiers), (inputs[0], identifiers), (inputs, identifiers[:1])):
        with pytest.raises(ValueError, match=r"inputs must be \(8, 9\) and puzzle_identifiers \(8,\), got"):
            inference.solve(*wrong)


@pytest.fixture
def in_float64(monkeypatch):
    """Weights, states and arithmetic of engines in float64, which training has no option for."""
    monkeypatch.setattr(engine_module, "resolve_dtype", lambda *_: torch.float64)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_compiled_follows_eager(variant: str, metrics: float, loss: float, weights: float) -> None:
    """Within bounds relative to the first ten steps' metrics, to the first loss, to the weights' way."""
    arch, options = VARIANTS[variant]
    eager, fused = (engine_in(mode, arch, lr=1e-3, **options) for mode in (EAGER, COMPILE))
    start = eager.parameters.data.clone()
    (expected, evaluation), (actual, fused_evaluation) = run(eager), run(fused)
    for mine, theirs in zip(actual[:10], expected[:10], strict=True):
        # Absolutely where a deviation is the small difference of larger numbers.
        shares = {name for name in theirs if name.endswith(("/low", "/high"))}
        parts = [{name: of[name] for name in of if name not in shares} for of in (mine, theirs)]
        assert parts[0] == pytest.approx(parts[1], rel=metrics, abs=metrics / 10)
        # Shares of gates beyond a bound: rounding may move a gate across it.
        gate = 1.01 / eager.program.carry.z_H.numel()
        assert all(abs(mine[name] - theirs[name]) < gate for name in shares), (mine, theirs)
    first = expected[0]["loss"]
    assert max(abs(a["loss"] - e["loss"]) for a, e in zip(actual, expected, strict=True)) < loss * first
    way = (eager.parameters.data - start).norm()
    assert (fused.parameters.data - eager.parameters.data).norm() < weights * way
    assert fused_evaluation["lm_loss"] == pytest.approx(evaluation["lm_loss"], rel=1e-3)
    assert fused_evaluation["count"] == evaluation["count"] == B
    assert sum(m["count"] for m in expected) > 3 * B


def test_a_compiled_run_follows_the_eager_one():
    """Fused kernels round differently; over the same batches a run may drift from it only slowly.

    Measured: the losses stay within 2e-7 of the first, the weights within 3e-6 of their way.
    """
    assert_compiled_follows_eager("all", metrics=1e-5, loss=1e-5, weights=1e-4)


def test_a_compiled_trm_follows_the_eager_one(in_float64):
    """A gradient through a whole cycle enlarges differences, so these runs are compared in float64."""
    assert_compiled_follows_eager("trm mixer", metrics=1e-9, loss=1e-9, weights=1e-9)


def test_a_program_runs_warms_up_and_replays(captures_on_cpu):
    runs, total, step = [], torch.zeros(()), torch.tensor(1.0)

    def body() -> None:
        runs.append(1)
        total.add_(step)

    program = Program(body, CPU, captured=True)
    for number in range(1, WARM_UP + 4):
        program()
        assert total.item() == number
    # Its Python ran for the warm-up and the capture, then no more.
    assert len(runs) == WARM_UP + 1 and len(captures_on_cpu) == 1
    direct = Program(body, CPU, captured=False)
    for _ in range(WARM_UP + 3):
        direct()
    assert total.item() == 2 * (WARM_UP + 3) and len(captures_on_cpu) == 1


def test_the_stand_in_detects_unreplayable_code(captures_on_cpu):
    """It is worth what it finds: a number from the host stays as it was, and reading one back is refused."""
    rate, total = [1.0], torch.zeros(())

    def takes_a_number() -> None:
        total.add_(rate[0])

    def reads_one_back() -> None:
        total.add_(total.item())

    stale = Program(takes_a_number, CPU, captured=True)
    for _ in range(WARM_UP + 1):
        stale()
    rate[0] = 100.0
    stale()
    assert total.item() == WARM_UP + 2
    waits = Program(reads_one_back, CPU, captured=True)
    with pytest.raises(RuntimeError, match="_local_scalar_dense would make a capture fail"):
        for _ in range(WARM_UP + 1):
            waits()


@pytest.mark.parametrize("use_gating", [False, True])
def test_weights_cast_once_per_step_equal_casts_at_every_use(use_gating):
    copies, casts = (engine_in(EAGER, {"use_gating": use_gating}, dtype="bfloat16") for _ in range(2))
    # The second computes with the float32 weights themselves, which every layer then casts for itself.
    flat = casts.parameters
    flat.copy = None
    for name, parameter in casts.model.named_parameters():
        parameter.data = flat.views(flat.data)[name]
    engines = [copies, casts]
    dtypes = [{p.dtype for p in engine.model.H_level.parameters()} for engine in engines]
    assert dtypes == [{torch.bfloat16}, {torch.float32}]
    assert copies.model.q_head.weight.dtype == torch.float32
    assert run(copies, 12) == run(casts, 12)
    assert all(tensor.dtype != torch.bfloat16 for tensor in copies.weights().values())
    assert_same_state(copies, casts)


def test_loaded_weights_reach_the_copies():
    engine, other = engine_in(EAGER, dtype="bfloat16"), engine_in(EAGER, dtype="bfloat16", seed=1)
    batch = next(batches())
    expected = other.evaluate([("all", batch, B)])
    assert engine.evaluate([("all", batch, B)]) != expected
    engine.load_weights(other.weights())
    assert engine.evaluate([("all", batch, B)]) == expected


def test_parts_of_a_batch_give_the_whole_batch_s_step():
    """Sums in another order, so equal to rounding; the carry and what is counted exactly."""
    whole, parts = engine_in(EAGER), engine_in(EAGER, gradient_accumulation=4)
    for batch, _ in zip(batches(), range(10), strict=False):
        for engine in (whole, parts):
            engine.train_step(batch)
    expected, actual = whole.pop().metrics, parts.pop().metrics
    assert actual == pytest.approx(expected, rel=1e-4) and actual["count"] == expected["count"] > B
    torch.testing.assert_close(parts.parameters.data, whole.parameters.data, rtol=1e-3, atol=1e-4)
    batch = next(batches(1))
    padded = replace(batch, labels=np.where(np.arange(B)[:, None] < 5, batch.labels, -100).astype(np.int32))
    results = [engine.evaluate([("all", padded, 5)])["all"] for engine in (whole, parts)]
    assert results[1]["count"] == 5 and results[1]["lm_loss"] == pytest.approx(
        results[0]["lm_loss"], rel=1e-2
    )


def test_parts_share_one_batch_evenly_or_are_refused():
    with pytest.raises(
        UserError,
        match=r"^gradient_accumulation=3 does not divide the 8 sequences of each device",
    ):
        engine_in(EAGER, gradient_accumulation=3)


@pytest.mark.parametrize("rate_dtype", [torch.float32, torch.float64])
def test_a_feed_holds_what_was_pushed_last(rate_dtype):
    feed = Feed(B, S, CPU, rate_dtype)
    addresses = [tensor.data_ptr() for tensor in (*feed.fresh, feed.min_halt_steps, feed.lr)]
    source = batches()
    for number in (1, 2):
        batch = next(source)
        steps = np.arange(B, dtype=np.int32) * number
        feed.push(batch, steps, 0.1 * number, 0.01 * number)
        for tensor, array in zip(
            (*feed.fresh[:3], feed.min_halt_steps),
            (batch.inputs, batch.labels, batch.puzzle_identifiers, steps),
            strict=True,
        ):
            assert np.array_equal(tensor.numpy(), array) and tensor.dtype == torch.int32
        assert feed.lr.dtype == rate_dtype and feed.lr.shape == ()
        assert feed.lr == torch.tensor(0.1 * number, dtype=rate_dtype)
        assert feed.puzzle_emb_lr == torch.tensor(0.01 * number, dtype=rate_dtype)
    assert addresses == [tensor.data_ptr() for tensor in (*feed.fresh, feed.min_halt_steps, feed.lr)]


def test_a_feeds_tensors_start_on_boundaries_of_64_bytes():
    feed = Feed(3, 7, CPU, torch.float64)
    tensors = (*feed.fresh[:3], feed.min_halt_steps, feed.fresh.keys)
    assert [tensor.storage_offset() * 4 for tensor in tensors] == [64, 192, 320, 384, 448]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures need a CUDA GPU")
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_on_cuda_a_replayed_run_equals_the_compiled_one_bit_for_bit(variant):
    arch, options = VARIANTS[variant]
    config = make_config({**arch, "hidden_size": 64}, **options)
    fused, captured = (
        Engine(replace(config, mode=mode), METADATA, total_steps=STEPS, device="cuda")
        for mode in ("compile", "graph")
    )
    expected, actual = run(fused), run(captured)
    assert actual == expected and sum(m["count"] for m in expected[0]) > 3 * B
    assert_same_state(captured, fused)
    # A replay takes no memory: all of it lies in the graph's pool.
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for batch, _ in zip(batches(), range(10), strict=False):
        captured.train_step(batch)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
