"""The step and inference benchmarks without their timing: what runs, what is checked, what is counted."""

import math
import re
import subprocess
import sys
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import implementations, rows
from bench.ceilings import MACHINES
from bench.implementations import Plain, built, starting_weights
from bench.roofline import totals
from bench.rows import (
    BOUNDS,
    CODES,
    EVALUATION,
    INFERENCE,
    TRAINING,
    Code,
    check,
    counted,
    errors,
    figures,
    launches,
    missing,
    published,
    quick,
    setting,
    time_row,
)
from hrm.common.errors import UserError
from tests.support import official
from tests.support.paths import ROOT

PROGRAMS = (TRAINING, EVALUATION, INFERENCE)
CPU = torch.device("cpu")
PLAIN = Code("plain", "eager", "float32")
OURS = Code("ours", "eager", "float32")
needs_official = pytest.mark.skipif(official.missing() is not None, reason=str(official.missing()))


class Benchmark:
    """pytest-benchmark's fixture as a row sees it: every round takes `median` seconds."""

    def __init__(self, median: float = 0.5) -> None:
        self.median, self.stats, self.group = median, None, None
        self.extra_info: dict = {}
        self.calls = 0

    def pedantic(self, target, rounds, iterations):
        for _ in range(rounds * iterations):
            target()
        self.calls = rounds * iterations
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=self.median, mean=self.median))


@pytest.fixture
def cpu_alone(monkeypatch):
    """As on a machine without a GPU; few rounds."""
    monkeypatch.setattr(rows, "CUDA", False)
    for program in ("TRAINING", "EVALUATION", "INFERENCE"):
        monkeypatch.setattr(rows, program, getattr(rows, program)._replace(cpu=(2, 1)))


def results(program, model, code):
    config, data = setting(model, code)
    with built(code.implementation, config, data, CPU, getattr(torch, code.dtype)) as implementation:
        return program.results(implementation)


@cache
def plain_results(program, model):
    return results(program, model, PLAIN)


# --------------------------------------------------------------------------------------- what code computes


@pytest.mark.parametrize(
    ("arch", "code"),
    [
        ("v1", OURS),
        ("gated", OURS),
        ("gated", Code("reference", "eager", "float32")),
        ("v1", Code("ours", "eager", "bfloat16")),
    ],
)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_ours_is_within_the_bounds_of_the_straight_line_model(program, arch, code):
    model = quick(arch, 8)
    check(results(program, model, code), plain_results(program, model), code.dtype)


@needs_official
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_the_official_code_is_within_the_bounds_too(program):
    model = quick("v1", 8)
    truth = plain_results(program, model)
    for dtype in BOUNDS:
        check(results(program, model, Code("official", "eager", dtype)), truth, dtype)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_the_straight_line_model_gives_equal_results_in_parts(program):
    config, data = setting(quick("gated", 8), PLAIN)
    parts, whole = (program.results(Plain(config, data, CPU, part)) for part in (3, None))
    for name, error in errors(parts, whole).items():
        assert error < 2e-6, name


def test_losses_see_the_update_and_the_halting():
    model = quick("v1", 8)
    truth = plain_results(TRAINING, model)
    # Another learning rate shows from the second loss on.
    slower = results(TRAINING, model._replace(words=(*model.words, "lr=9e-4")), OURS)
    assert slower["losses"][0] == pytest.approx(truth["losses"][0], rel=1e-6)
    with pytest.raises(AssertionError, match="losses: off by"):
        check(slower, truth, "float32")
    for key in ("puzzle_emb_lr=9e-3", "puzzle_emb_weight_decay=30", "weight_decay=0.7"):
        with pytest.raises(AssertionError, match="losses: off by"):
            check(results(TRAINING, model._replace(words=(*model.words, key)), OURS), truth, "float32")
    # After a step some sequences are replaced and some go on.
    config, data = setting(quick("v1", 64), OURS)
    with built("ours", config, data, CPU, torch.float32) as ours:
        ours.train()
        assert 0 < ours.engine.carry.halted.sum() < 64


@pytest.mark.parametrize(
    ("program", "name"),
    [
        (TRAINING, "puzzle_emb.weights"),
        (TRAINING, "q_head.weight"),
        (EVALUATION, "lm_head.weight"),
        (EVALUATION, "q_head.weight"),
        (INFERENCE, "puzzle_emb.weights"),
        (INFERENCE, "L_level.layers.1.mlp.down_proj.weight"),
    ],
)
def test_a_slightly_wrong_weight_is_detected(program, name, monkeypatch):
    model = quick("v1", 8)
    truth = plain_results(program, model)

    def off(config, data):
        weights = starting_weights(config, data)
        generator = torch.Generator().manual_seed(1)
        weights[name] += 0.1 * weights[name].std() * torch.randn(weights[name].shape, generator=generator)
        return weights

    monkeypatch.setattr(implementations, "starting_weights", off)
    with pytest.raises(AssertionError, match="off by"):
        check(results(program, model, OURS), truth, "float32")


def test_the_reference_row_runs_without_kernels_and_restores_the_choice():
    config, data = setting(quick("v1", 1), OURS)
    before = implementations.kernels.get_backend()
    for name, backend in (("reference", "reference"), ("ours", "auto")):
        with built(name, config, data, CPU, torch.float32):
            assert implementations.kernels.get_backend() == backend
        assert implementations.kernels.get_backend() == before


def test_errors_by_hand():
    truth = {
        "losses": np.array([2.0, 4.0]),
        "means": np.array([1.0, 2.0]),
        "q_halt": np.array([0.0, 1.0]),
        "predictions": np.array([[1, 2], [3, 4]]),
    }
    found = {
        "losses": np.array([2.0, 3.0]),
        "means": np.array([0.9, 2.0]),
        "q_halt": np.array([3.0, -3.0]),
        "predictions": np.array([[1, 2], [3, 5]]),
    }
    expected = {"losses": 0.25, "means": 0.1, "q_halt": math.sqrt(12.5), "predictions": 0.25}
    assert errors(found, truth) == pytest.approx(expected)
    assert check(truth, truth, "float32") == dict.fromkeys(truth, 0.0)
    for name, value in found.items():
        with pytest.raises(AssertionError, match=f"{name}: off by .* allowed {BOUNDS['bfloat16'][name]:g}"):
            check({**truth, name: value}, truth, "bfloat16")
    with pytest.raises(AssertionError, match="q_halt: off by nan"):
        check({**truth, "q_halt": np.array([np.nan, 1.0])}, truth, "bfloat16")


# ----------------------------------------------------------------------------------------- what is counted


def test_flop_of_a_solution_by_hand():
    model = published("v1", 8, 81)
    config, data = setting(model._replace(device="cpu"), OURS)
    tokens, D, inner = 8 * 82, 512, 1536
    block = 2 * tokens * (4 * D * D + 3 * D * inner) + 4 * tokens * 82 * D
    # Sixteen steps of four L and two H updates, each of four blocks; the head once.
    flop = 16 * 24 * block + 2 * 8 * 81 * D * 11
    for program in (EVALUATION, INFERENCE):
        assert totals(counted(program, config, data), MACHINES["H200"])["flop"] == flop
    # A training step goes forward and on to its target, and back through a third of that.
    training = totals(counted(TRAINING, config, data), MACHINES["H200"])["flop"]
    assert 64 * block - block < training < 64.1 * block


def test_gates_and_sizes_count():
    def flop(arch, B):
        config, data = setting(quick(arch, B), OURS)
        return totals(counted(INFERENCE, config, data), MACHINES["H200"])["flop"]

    assert flop("v1", 64) == 64 * flop("v1", 1)
    tokens, D, R, steps = 64 * 17, 64, 16, 8
    assert flop("gated", 64) - flop("v1", 64) == steps * 4 * tokens * R * D * (4 * 3 + 2 * 2)


def test_figures_by_hand(monkeypatch):
    config, data = setting(quick("v1", 64), OURS)
    steps = counted(INFERENCE, config, data)
    sums = totals(steps, MACHINES["H200"])
    found = figures(steps, 64, 0.25)
    assert found == {"samples/s": 256, "TFLOP/s": pytest.approx(4 * sums["flop"] / 1e12, rel=1e-3)}
    monkeypatch.setattr(rows, "CUDA", True)
    monkeypatch.setattr(rows, "measure", lambda: MACHINES["H100"])
    best = totals(steps, MACHINES["H100"])["predicted_s"]
    assert figures(steps, 64, 4 * best)["roofline_share"] == pytest.approx(0.25)


def test_launches_of_a_trace():
    events = [
        {"cat": "kernel", "name": "a"},
        {"cat": "kernel", "name": "b"},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD"},
        {"cat": "gpu_memset", "name": "Memset"},
        {"cat": "gpu_user_annotation", "name": "step"},
        {"cat": "cpu_op", "name": "aten::copy_"},
        {"cat": "cuda_runtime", "name": "cudaGraphLaunch"},
        {"cat": "cuda_runtime", "name": "cudaMemcpyAsync"},
        {"cat": "cuda_driver", "name": "cuLaunchKernelEx"},
        {"cat": "cuda_runtime", "name": "cudaStreamWaitEvent"},
        {"name": "[memory]"},
    ]
    assert launches(events) == {"kernels": 4, "launches": 3}


# ------------------------------------------------------------------------------------------- what runs where


def test_skipped_rows_report_the_reason(monkeypatch):
    cuda, small = published("v1", 96, 81), quick("gated", 64)
    monkeypatch.setattr(rows, "CUDA", False)
    monkeypatch.setattr(rows, "compiler", lambda: None)
    monkeypatch.setenv("HRM_REPO", "")
    assert "need a CUDA device" in missing(cuda, OURS)
    assert missing(small, OURS) is None
    assert missing(small, Code("official", "eager", "float32")) == "the official code has no gated model"
    assert "HRM_REPO" in missing(quick("v1", 1), Code("official", "eager", "float32"))
    assert missing(small, Code("ours", "compile", "bfloat16")) is None
    monkeypatch.setattr(rows, "compiler", lambda: "no compiler")
    assert missing(small, Code("ours", "compile", "float32")) == "no compiler"
    assert missing(small, OURS) is None
    monkeypatch.setattr(rows, "CUDA", True)
    assert missing(cuda, OURS) is None
    assert missing(cuda, Code("ours", "graph", "bfloat16")) == "no compiler"
    assert "CUDA_VISIBLE_DEVICES=" in missing(small, OURS)


def test_every_row_makes_a_configuration():
    modes = {"graph", "compile", "eager"}
    cuda = {(code, mode) for code in ("ours", "reference") for mode in modes}
    cuda |= {("official", mode) for mode in ("compile", "eager")}
    assert {code[:2] for code in CODES["cuda"]} == cuda and len(CODES["cuda"]) == len(cuda)
    assert {code.dtype for code in CODES["cuda"]} == {"bfloat16"}
    cpu = {(code, mode) for code in ("ours", "official") for mode in ("compile", "eager")}
    assert {code[:2] for code in CODES["cpu"] if code.dtype == "float32"} == cpu | {("plain", "eager")}
    assert [code for code in CODES["cpu"] if code.dtype == "bfloat16"] == [("ours", "compile", "bfloat16")]
    for model in (published("gated", 768, 900), quick("v1", 1)):
        for code in CODES[model.device]:
            config, data = setting(model._replace(device="cpu"), code)
            assert (config.global_batch_size, data.seq_len) in ((768, 900), (1, 16))
            assert (config.mode, config.dtype) == (code.mode, code.dtype)
            assert config.arch.halt_exploration_prob == config.lr_warmup_steps == 0


@pytest.mark.slow
def test_rows_are_selected_by_name_and_report_skips():
    command = [sys.executable, "-m", "pytest", "bench/test_step.py", "bench/test_inference.py"]
    chosen = "(v1 and B768 and graph) or (gated and quick and B1 and eager)"
    done = subprocess.run(
        [*command, "--benchmark-disable", "-vv", "-k", chosen], cwd=ROOT, capture_output=True, text=True
    )
    ids = re.findall(r"::\w+\[(\S+)\] (\w+)", done.stdout)
    names = [name for name, _ in ids]
    graphs = [f"v1-B768-S{S}-{code}-graph-bfloat16" for S in (81, 900) for code in ("ours", "reference")]
    own = [f"gated-quick-B1-S16-{code}-eager-float32" for code in ("ours", "plain", "official")]
    assert sorted(names) == sorted(2 * graphs + graphs[:2] + own)
    if not torch.cuda.is_available():
        passed = [name for name, outcome in ids if outcome == "PASSED"]
        assert passed == own[:2], done.stdout
        assert "need a CUDA device" in done.stdout and "has no gated model" in done.stdout


# -------------------------------------------------------------------------------------------- a row's timing


@pytest.mark.parametrize("program", ["TRAINING", "EVALUATION", "INFERENCE"])
def test_a_row_describes_itself(program, cpu_alone):
    benchmark = Benchmark()
    program = getattr(rows, program)
    time_row(benchmark, program, "small", quick("gated", 4), OURS)
    info = benchmark.extra_info
    assert benchmark.group == f"{program.name}: small" and benchmark.calls == 2
    assert (info["program"], info["model"], info["arch"]) == (program.name, "small", "gated")
    assert (info["implementation"], info["mode"], info["dtype"]) == OURS
    assert (info["batch_size"], info["cells"], info["halt_max_steps"]) == (4, 16, 8)
    assert info["samples/s"] == 8 and info["TFLOP/s"] > 0 and info["gpu"] is None
    assert info["peak_memory_mib"] > 0.01 and info["processor"] and info["versions"]["torch"]
    assert max(info["error"].values()) <= 1e-4
    assert not info.keys() & {"launches", "host_share", "roofline_share"}


def test_wrong_results_are_not_timed(cpu_alone, monkeypatch):
    monkeypatch.setattr(rows, "expected", lambda *_: {"losses": np.array([1.0, 1.0, 1.0])})
    benchmark = Benchmark()
    with pytest.raises(AssertionError, match="losses: off by"):
        time_row(benchmark, TRAINING, "small", quick("v1", 2), OURS)
    assert benchmark.calls == 0


def test_only_out_of_memory_rows_are_skipped(cpu_alone, monkeypatch):
    def failing(error):
        def fail(*_):
            raise error

        monkeypatch.setattr(rows, "_time_row", fail)
        time_row(Benchmark(), TRAINING, "small", quick("v1", 2), OURS)

    with pytest.raises(pytest.skip.Exception, match="ours, eager: does not fit"):
        failing(torch.OutOfMemoryError())
    # A skip would pass through where only the error is expected.
    with pytest.raises((UserError, pytest.skip.Exception)) as raised:
        failing(UserError("mode=graph: no compiler"))
    assert raised.type is UserError


def test_on_cuda_a_row_carries_the_devices_figures(monkeypatch):
    """The CUDA branches, with the device's answers put in their places."""
    waits = []
    for name, answer in {
        "synchronize": lambda: waits.append(1),
        "memory_allocated": lambda: 2**20,
        "max_memory_allocated": lambda: 4 * 2**20,
        "reset_peak_memory_stats": lambda: None,
        "empty_cache": lambda: None,
        "get_device_name": lambda: "GPU X",
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(rows, "CUDA", True)
    monkeypatch.setattr(rows, "missing", lambda *_: None)
    monkeypatch.setattr(rows, "measure", lambda: MACHINES["H200"])
    monkeypatch.setattr(rows, "traced", lambda call, device: [{"cat": "kernel"}, {"cat": "kernel"}])
    # A clock that each call of the host puts on by 20 ms.
    now = [0.0]
    monkeypatch.setattr(rows.time, "perf_counter", lambda: now[0])
    training = TRAINING._replace(cuda=(2, 3), call=lambda code: lambda: now.append(now.pop() + 0.02))
    monkeypatch.setattr(rows, "TRAINING", training)
    benchmark = Benchmark(median=0.1)
    time_row(benchmark, training, "small", quick("v1", 2), OURS)
    info = benchmark.extra_info
    assert benchmark.calls == 6 and info["gpu"] == "GPU X"
    assert (info["kernels"], info["launches"], info["peak_memory_mib"]) == (2, 0, 3.0)
    # Of each 0.1 s the host spends 0.02 in the call.
    assert info["host_share"] == 0.2 and 0 < info["roofline_share"] < 1e-3
    before = len(waits)
    assert rows.clock() <= rows.clock() and len(waits) == before + 2
