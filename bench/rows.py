"""The rows of the step and inference benchmarks: models, implementations, checks and timing.

A row is a model, an implementation, a mode and a dtype. Before timing, its results are compared with those of
the straight-line model in float32 (`Plain`), within the bounds below. On CUDA a round is several calls and
one synchronisation at the end, so that an idle device increases the time.
"""

import gc
import os
import time
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from bench.ceilings import MACHINES, measure
from bench.counts import Shape
from bench.implementations import (
    CERTAIN,
    Implementation,
    Plain,
    adam_atan2_package,
    built,
    metadata,
    peak_memory,
    traced,
)
from bench.roofline import Row, step, totals
from hrm.common.machine import processor
from hrm.common.versions import package_versions
from hrm.config.load import Config, parse_args
from hrm.data.format import Metadata
from hrm.engine.modes import compiler_fault
from tests.support import official

CUDA = torch.cuda.is_available()


class Model(NamedTuple):
    """A model, its batch and data, and its device. words: command-line arguments."""

    device: str
    arch: str
    words: tuple[str, ...]
    cells: int
    vocab_size: int


class Code(NamedTuple):
    """An implementation (see `bench.implementations.built`) in a mode and a dtype."""

    implementation: str
    mode: str
    dtype: str


SMALL = ("arch.hidden_size=128", "arch.num_heads=2", "arch.H_layers=2", "arch.L_layers=2")
CODES = {
    "cpu": (
        Code("ours", "compile", "float32"),
        Code("ours", "eager", "float32"),
        Code("plain", "eager", "float32"),
        Code("official", "compile", "float32"),
        Code("official", "eager", "float32"),
        Code("ours", "compile", "bfloat16"),
    ),
    "cuda": tuple(
        Code(implementation, mode, "bfloat16")
        for implementation, modes in (
            ("ours", ("graph", "compile", "eager")),
            ("reference", ("graph", "compile", "eager")),
            ("official", ("compile", "eager")),
        )
        for mode in modes
    ),
}


def published(arch: str, B: int, S: int) -> Model:
    """The published model on CUDA; 900 cells are ARC's, with its vocabulary."""
    return Model("cuda", arch, ("preset=full", f"global_batch_size={B}"), S, 11 if S == 81 else 12)


def quick(arch: str, B: int) -> Model:
    """The quick preset on a CPU, with the optimiser of the official code."""
    return Model("cpu", arch, ("preset=quick", "optimizer=adam_atan2", f"global_batch_size={B}"), 16, 6)


def small(arch: str) -> Model:
    """The published recipe on a CPU, with a quarter of the width and half of the depth."""
    return Model("cpu", arch, ("preset=full", *SMALL, "global_batch_size=32"), 81, 11)


class Program(NamedTuple):
    """A timed program. results: the checked results; call: the timed call; CPU and CUDA: (rounds, calls)."""

    name: str
    results: Callable[[Implementation], dict[str, np.ndarray]]
    call: Callable[[Implementation], Callable[[], object]]
    cpu: tuple[int, int]
    cuda: tuple[int, int]


def _training_results(code: Implementation) -> dict[str, np.ndarray]:
    losses = []
    for _ in range(3):
        code.train()
        losses.append(code.loss())
    return {"losses": np.array(losses)}


TRAINING = Program("training step", _training_results, lambda code: code.train, (20, 1), (10, 20))
EVALUATION = Program(
    "evaluation of a batch",
    lambda code: {"means": np.array(list(code.evaluate().values()))},
    lambda code: code.evaluate,
    (3, 1),
    (5, 1),
)
INFERENCE = Program(
    "solving a batch",
    lambda code: dict(zip(("predictions", "q_halt"), code.solve(), strict=True)),
    lambda code: code.solve,
    (20, 1),
    (30, 1),
)
# Maximum differences from the straight-line model in float32: relative for the losses of three training steps
# and the means of an evaluation, root mean square for q_halt, share of differing cells for predictions (about
# 0.9 for unrelated ones).
BOUNDS = {
    "float32": {"losses": 1e-5, "means": 1e-5, "q_halt": 1e-4, "predictions": 1e-3},
    "bfloat16": {"losses": 2e-2, "means": 5e-2, "q_halt": 0.5, "predictions": 0.2},
}


# ------------------------------------------------------------------------------------------ what runs here


def missing(model: Model, code: Code) -> str | None:
    """The reason why a row does not run here; None if it does."""
    if model.device == "cuda" and not CUDA:
        return "the published model's rows need a CUDA device; this machine has none"
    if model.device == "cpu" and CUDA:
        return "a CPU's rows are for a machine without a GPU; CUDA_VISIBLE_DEVICES= hides this one's"
    if code.implementation == "official":
        if model.arch != "v1":
            return "the official code has no gated model"
        if reason := official.missing():
            return reason
    if code.mode != "eager" and (fault := compiler()):
        return fault
    return None


@cache
def compiler() -> str | None:
    return compiler_fault(torch.device("cuda" if CUDA else "cpu"))


# ------------------------------------------------------------------------------------------------ the check


def setting(model: Model, code: Code) -> tuple[Config, Metadata]:
    mode = code.mode if code.implementation != "plain" else "eager"
    words = [*model.words, *CERTAIN, f"device={model.device}", f"mode={mode}", f"dtype={code.dtype}"]
    # Use several puzzles, so that sequences halt at different steps.
    return parse_args(["--arch", model.arch, *words]), metadata(model.cells, model.vocab_size, puzzles=16)


@lru_cache(maxsize=1)
def expected(program: Program, model: Model) -> dict[str, np.ndarray]:
    """The straight-line model's results in float32, computed in small parts, because it keeps all
    intermediate tensors."""
    config, data = setting(model, Code("plain", "eager", "float32"))
    part = max(1, 16_384 // (1 + model.cells))
    return program.results(Plain(config, data, torch.device(model.device), part))


def errors(found: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> dict[str, float]:
    """The errors of results, in the measures of BOUNDS."""
    off = {
        "losses": lambda a, b: np.abs(a / b - 1).max(),
        "means": lambda a, b: np.abs(a / b - 1).max(),
        "q_halt": lambda a, b: np.sqrt(((a - b) ** 2).mean()),
        "predictions": lambda a, b: (a != b).mean(),
    }
    return {name: float(off[name](found[name], truth[name])) for name in truth}


def check(found: dict[str, np.ndarray], truth: dict[str, np.ndarray], dtype: str) -> dict[str, float]:
    """The errors of results; fails if an error exceeds its bound or is NaN."""
    measured = errors(found, truth)
    for name, error in measured.items():
        assert error <= BOUNDS[dtype][name], f"{name}: off by {error:.3g}, allowed {BOUNDS[dtype][name]:g}"
    return {name: float(f"{error:.3g}") for name, error in measured.items()}


# ---------------------------------------------------------------------------------------------- the figures


def counted(program: Program, config: Config, data: Metadata) -> list[Row]:
    """The minimum launches of a program with this project's kernels."""
    arch = config.arch
    assert arch.H_layers == arch.L_layers and arch.puzzle_emb_ndim == arch.hidden_size
    shape = Shape(
        config.global_batch_size,
        T=data.seq_len + 1,
        D=arch.hidden_size,
        heads=arch.num_heads,
        R=int(arch.gate_hidden_ratio * arch.hidden_size),
        V=data.vocab_size,
        layers=arch.H_layers,
        H_cycles=arch.H_cycles,
        L_cycles=arch.L_cycles,
        expansion=arch.expansion,
        dtype=torch.float32 if config.dtype == "float32" else torch.bfloat16,
    )
    if program is TRAINING:
        return step(shape, "kernels", gated=arch.use_gating)
    # A step without gradient is the target pass with all positions; the input is embedded and the answer
    # computed once.
    rows = step(shape, "kernels", gated=arch.use_gating, whole_target=True)
    once = [row for row in rows if row.part == "forward" and row.name in ("embedding", "lm_head and loss")]
    return once + [row for row in rows if row.part == "target"] * arch.halt_max_steps


def figures(rows: list[Row], batch_size: int, seconds: float) -> dict[str, float]:
    """The rates for a time; on CUDA also the share of the measured roofline."""
    sums = totals(rows, measure() if CUDA else MACHINES["H200"])
    rates = {"samples/s": batch_size / seconds, "TFLOP/s": sums["flop"] / seconds / 1e12}
    if CUDA:
        rates["roofline_share"] = sums["predicted_s"] / seconds
    return {name: float(f"{rate:.4g}") for name, rate in rates.items()}


def launches(events: list[dict[str, Any]]) -> dict[str, int]:
    """The work of a traced call on a CUDA device, and the number of launches by the host.

    kernels: executed kernels, copies and fills, including those of a replayed graph; launches: the host's
    calls, one per replay.
    """
    work = ("kernel", "gpu_memcpy", "gpu_memset")
    calls = ("LaunchKernel", "GraphLaunch", "Memcpy", "Memset")
    runtime = [event["name"] for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    return {
        "kernels": sum(event.get("cat") in work for event in events),
        "launches": sum(any(call in name for call in calls) for name in runtime),
    }


def machine() -> dict[str, Any]:
    """The environment of the rows: device, processor, threads and versions."""
    return {
        "gpu": torch.cuda.get_device_name() if CUDA else None,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": package_versions("triton", "flash_attn", "adam_atan2"),
    }


def clock() -> float:
    """The time in seconds after synchronising the device."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def time_row(benchmark: Any, program: Program, name: str, model: Model, code: Code) -> None:
    """Checks and times a row; skips it with a reason if it cannot run or does not fit."""
    if reason := missing(model, code):
        pytest.skip(reason)
    try:
        _time_row(benchmark, program, name, model, code)
    except torch.OutOfMemoryError:
        pytest.skip(f"{code.implementation}, {code.mode}: does not fit into the GPU's memory")
    finally:
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


def _time_row(benchmark: Any, program: Program, name: str, model: Model, code: Code) -> None:
    (config, data), device, truth = setting(model, code), torch.device(model.device), expected(program, model)
    rounds, calls = program.cuda if CUDA else program.cpu
    benchmark.group = f"{program.name}: {name}"
    # Import before the official code installs a stand-in for a package.
    found = package_versions("triton", "flash_attn", "adam_atan2")
    # The models share a class, so reset the compiler for each row.
    torch._dynamo.reset()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with built(code.implementation, config, data, device, getattr(torch, code.dtype)) as implementation:
        error = check(program.results(implementation), truth, code.dtype)
        call, host = program.call(implementation), list[float]()

        def timed() -> None:
            start = time.perf_counter()
            call()
            host.append(time.perf_counter() - start)

        # The fourth call captures a graph.
        for _ in range(5 if CUDA or program is TRAINING else 1):
            timed()
        host.clear()
        benchmark.pedantic(timed, rounds=rounds, iterations=calls)
        benchmark.extra_info |= {
            "program": program.name,
            "model": name,
            **code._asdict(),
            "arch": model.arch,
            "batch_size": config.global_batch_size,
            "cells": data.seq_len,
            "halt_max_steps": config.arch.halt_max_steps,
            "error": error,
            **machine(),
            "versions": found,
        }
        if code.implementation == "official":
            benchmark.extra_info |= {
                "attention": "PyTorch" if implementation.code.stand_in else "flash-attn",  # type: ignore
                "update": "adam-atan2" if adam_atan2_package(device) else "ours, for each parameter",
            }
        if CUDA:
            peak = torch.cuda.max_memory_allocated() - before
            benchmark.extra_info |= launches(traced(call, device))
        else:
            peak = peak_memory(call)
        benchmark.extra_info["peak_memory_mib"] = round(peak / 2**20, 1)
    if benchmark.stats is not None:
        stats = benchmark.stats.stats
        rows = counted(program, config, data)
        benchmark.extra_info |= figures(rows, config.global_batch_size, stats.median)
        if CUDA and program is TRAINING:
            benchmark.extra_info["host_share"] = round(float(np.mean(host)) / stats.mean, 3)


def rows(*models: tuple[str, Model]) -> list[Any]:
    """The parameters of a test: all implementations of each model, model by model."""
    return [
        pytest.param(name, model, code, id="-".join((name, *code)))
        for name, model in models
        for code in CODES[model.device]
    ]
