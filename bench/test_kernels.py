"""Times every operation: this project's kernel, the eager and compiled reference, and other libraries'
kernels.

`pytest bench/test_kernels.py --benchmark-only`; groups are an operation, a direction and a batch, at the
sizes of the published model. A row is timed only after a check of its outputs and gradients: its error
against the float64 reference may be twice that of the eager reference in the same dtype, plus a small share
of the largest value. For other libraries' kernels, which round more often, the limit is ten times higher.
Each row has its error relative to the limit.

On CUDA a round is the mean of several launches, each timed between two CUDA events with a cold L2 cache:
before every launch a buffer much larger than the cache is overwritten. This takes the device longer than
Python needs for the next launch, so the device never waits for Python and only its work is measured. The
forward of an operation with a backward includes saving tensors. On a CPU the reference runs in float32 on a
small batch, eager and compiled, and the other rows report why they are skipped.
"""

import gc
import importlib.util
import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
import torch._functorch.config
from torch import Tensor

import kernels
from bench.ceilings import measure, roofline_time
from bench.counts import OPERATIONS, Shape, Work
from bench.implementations import peak_memory
from bench.operations import CUDA, DTYPE, OPS, Call, Inputs, library_attention, liger
from hrm.common.machine import processor
from hrm.common.versions import package_versions
from hrm.engine.modes import compiler_fault
from kernels.library_attention import has_flash
from tests.kernels.compare import DEVICE, Outputs, allowed_error, distance, randn, run

BATCHES = (1, 96, 384, 768) if CUDA else (2,)
ROUNDS, LAUNCHES = (20, 10) if CUDA else (50, 1)
# Larger than any L2 cache, and large enough that Python prepares the next launch while it is overwritten.
FLUSHED_BYTES = 2**30
INTEGERS_THAT_MAY_DIFFER = 1e-4


# ------------------------------------------------------------------------------------- implementations


def missing(implementation: str) -> str | None:
    """The reason why an implementation does not run here; None if it does."""
    if implementation == "reference, eager":
        return None
    if implementation == "reference, compile":
        return compiler_fault(DEVICE)
    if not CUDA:
        return f"{implementation}: Triton kernels and GPU libraries need a CUDA device; this machine has none"
    if implementation == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return "liger: liger_kernel is not installed (pip install liger-kernel)"
    if implementation == "flash-attn" and not has_flash():
        return "flash-attn: version 2.6 or later is not installed (pip install flash-attn)"
    return None


@lru_cache(maxsize=1)
def made(op: str, B: int) -> tuple[Inputs, Call]:
    """An operation's inputs, rounded to its dtype, and its call by the public function."""
    inputs, call = OPS[op].make(Shape(B))
    return {name: tensor.to(OPS[op].dtype) for name, tensor in inputs.items()}, call


def implemented(op: str, implementation: str, B: int) -> Call:
    if implementation == "liger":
        return liger(op, Shape(B))
    if implementation in ("flash-attn", "SDPA"):
        return library_attention({"flash-attn": "flash", "SDPA": "sdpa"}[implementation], Shape(B))
    call = made(op, B)[1]
    if implementation == "reference, compile":
        torch._dynamo.reset()
        # The backward is repeated after one forward, so it must not reuse its buffers.
        with torch._functorch.config.patch(donated_buffer=False):
            return torch.compile(call, fullgraph=True, dynamic=False)
    return call


@contextmanager
def chosen_backend(implementation: str):
    """Selects Triton for ours and the reference for the reference; libraries' attention uses auto for its
    rotation."""
    names = {"ours": "triton", "flash-attn": "auto", "SDPA": "auto"}
    before = kernels.get_backend()
    kernels.set_backend(names.get(implementation, "reference"))
    try:
        with torch._functorch.config.patch(donated_buffer=False):
            yield
    finally:
        kernels.set_backend(before)


# ------------------------------------------------------------------------------------------- the check


def outcome(op: str, call: Call, inputs: Inputs) -> Inputs:
    """A call's outputs, changed inputs and gradients; works on copies of the inputs."""
    entry = OPS[op]

    def whole(**leaves: Tensor) -> Outputs:
        own = {name: leaf.clone() for name, leaf in leaves.items()}
        outputs = call(**own)
        if op == "rope" and isinstance(outputs, tuple):
            return torch.cat(outputs, dim=2)
        if entry.changed:
            return (*(own[name] for name in entry.changed), *outputs)
        return outputs

    return run(whole, inputs, entry.gradients, seed=0)


@lru_cache(maxsize=1)
def measures(op: str, B: int) -> tuple[Inputs, Inputs]:
    """The eager reference's results in the operation's dtype and in float64."""
    inputs, call = made(op, B)
    exact = {name: tensor.double() for name, tensor in inputs.items()}
    with chosen_backend("reference, eager"):
        return outcome(op, call, inputs), outcome(op, call, exact)


@lru_cache(maxsize=8)
def checked(op: str, implementation: str, B: int) -> tuple[Call, dict[str, float]]:
    """The implementation's call, and its largest error relative to the limit.

    Fails the test if the error of an output or gradient exceeds the limit.
    """
    dtype, (inputs, _), (eager, truth) = OPS[op].dtype, made(op, B), measures(op, B)
    with chosen_backend(implementation):
        call = implemented(op, implementation, B)
        found = outcome(op, call, inputs)
    patience = 1 if implementation in ("ours", "reference, eager", "reference, compile") else 10
    assert found.keys() == truth.keys()
    worst = 0.0
    for name, value in found.items():
        if not value.is_floating_point():
            wrong, expected = ((each != truth[name]).sum().item() for each in (value, eager[name]))
            allowed = 2 * expected + INTEGERS_THAT_MAY_DIFFER * value.numel()
        else:
            assert torch.isfinite(value).all(), f"{name} has values that are not finite"
            wrong = distance(value, truth[name])
            allowed = allowed_error(eager[name], truth[name], dtype)
        assert wrong <= patience * allowed, f"{name}: error {wrong:.3g}, allowed {allowed:.3g}"
        worst = max(worst, wrong / allowed if allowed else 0.0)
    return call, {"error_in_allowed": round(worst, 3)}


# ------------------------------------------------------------------------------------------ the timing

_device_time = 0.0


def device_clock() -> float:
    """A clock that sums the device time of timed launches."""
    return _device_time


@lru_cache(maxsize=1)
def flushed() -> Tensor:
    return torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=DEVICE)


def cold_launches(call: Callable[[], object]) -> None:
    """Advances the device clock by the mean of several launches, each with a cold L2 cache."""
    global _device_time
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(LAUNCHES)]
    for start, end in events:
        flushed().zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    _device_time += sum(start.elapsed_time(end) for start, end in events) / LAUNCHES / 1e3


def timed_call(op: str, direction: str, call: Call, B: int) -> Callable[[], object]:
    """The timed function: the call on its own inputs, or only its backward."""
    entry, (inputs, _) = OPS[op], made(op, B)
    leaves = {name: t.clone().requires_grad_(name in entry.gradients) for name, t in inputs.items()}
    if direction != "backward":
        return partial(call, **leaves)
    outputs = call(**leaves)
    taught = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
    upstream = [randn(*output.shape, seed=seed).to(output.dtype) for seed, output in enumerate(taught)]
    wanted = [leaves[name] for name in entry.gradients]
    return partial(torch.autograd.grad, taught, wanted, upstream, retain_graph=True)


def peak_bytes(call: Callable[[], object]) -> int:
    """The peak memory of a call in addition to memory allocated before."""
    if not CUDA:
        return peak_memory(call)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def figures(work: Work, seconds: float, dtype: torch.dtype) -> dict[str, float]:
    """The rates for a time; on CUDA in 16 bits also the share of the measured roofline."""
    rates = {"GB/s": round(work.bytes / seconds / 1e9, 1)}
    if work.flop:
        rates["TFLOP/s"] = round(work.flop / seconds / 1e12, 2)
    if CUDA and (dtype.itemsize == 2 or not work.flop):
        rates["roofline_share"] = round(roofline_time(work.bytes, work.flop, measure()) / seconds, 3)
    return rates


def rows() -> list[Any]:
    """Sort rows by operation and batch, so that inputs are drawn once."""
    return [
        pytest.param(op, B, direction, implementation, id=f"{op}-B{B}-{direction}-{implementation}")
        for op, entry in OPS.items()
        for B in BATCHES
        for direction in OPERATIONS[op](Shape(B))
        for implementation in ("ours", "reference, eager", "reference, compile", *entry.others)
    ]


@pytest.mark.benchmark(timer=device_clock if CUDA else time.perf_counter)
@pytest.mark.parametrize(("op", "B", "direction", "implementation"), rows())
def test_operation(benchmark, op, B, direction, implementation):
    if reason := missing(implementation):
        pytest.skip(reason)
    s, entry = Shape(B, dtype=DTYPE), OPS[op]
    call, errors = checked(op, implementation, B)
    work = OPERATIONS[op](s)[direction]
    benchmark.group = f"{op}, {direction}: B={B}, T={s.T}"
    benchmark.extra_info |= {
        "op": op,
        "direction": direction,
        "implementation": implementation,
        "shape": {"B": B, "T": s.T, "D": s.D, "heads": s.heads, "V": s.V, "R": s.R},
        "dtype": str(entry.dtype).removeprefix("torch."),
        "gpu": torch.cuda.get_device_name() if CUDA else None,
        "processor": processor(),
        "cores": os.cpu_count(),
        "versions": package_versions("triton", "liger_kernel", "flash_attn"),
        **errors,
    }
    with chosen_backend(implementation):
        timed = timed_call(op, direction, call, B)
        target = partial(cold_launches, timed) if CUDA else timed
        benchmark.pedantic(target, rounds=ROUNDS, warmup_rounds=3)
        benchmark.extra_info["peak_memory_mib"] = round(peak_bytes(timed) / 2**20, 1)
    if benchmark.stats is not None and (CUDA or op not in ("adam_atan2", "adamw", "muon")):
        benchmark.extra_info |= figures(work, benchmark.stats.stats.median, entry.dtype)
