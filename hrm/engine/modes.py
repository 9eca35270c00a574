"""Chooses how a step runs (eager, compiled, or captured in a CUDA graph) and its precision."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.torch_version import TorchVersion

from hrm.common.errors import UserError
from hrm.config.schema import Config
from hrm.engine.compilation import GRACE
from kernels import linear
from kernels.cpu import multiplies_bfloat16

# Seconds to compile the step and evaluation of a small model on two AVX2 cores, and the share of an eager
# step that this saved (bench/NOTES.md). A run that would not regain this time is not compiled.
COMPILE_SECONDS = 170.0
COMPILE_SAVES = 0.4
# Seconds after which no further step is measured: a step of a large model takes minutes on a CPU.
ENOUGH_SECONDS = 5.0
# Relative time of a bfloat16 product below which dtype=auto takes bfloat16 on a CPU with instructions for it,
# which usually need half of float32's time (bench/NOTES.md).
BFLOAT16_PAYS = 0.8


class Mode(NamedTuple):
    """A resolved `mode`.

    name: eager, compile or graph. compiled: forward and backward go through torch.compile. captured: the step
    is replayed from a CUDA graph. note: a line for the user about the choice, or empty.
    """

    name: str
    compiled: bool
    captured: bool
    note: str = ""


EAGER = Mode("eager", compiled=False, captured=False)
COMPILE = Mode("compile", compiled=True, captured=False)


def resolve_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype of the forward for the configuration's `dtype`.

    auto is bfloat16 on CUDA, float32 on other devices, and on a CPU with instructions for bfloat16 the one
    with the faster product. A run with `deterministic=true` measures nothing and takes float32 on a CPU.
    """
    if config.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    if device.type == "cpu":
        measured = multiplies_bfloat16() and not config.deterministic
        return torch.bfloat16 if measured and bfloat16_time() < BFLOAT16_PAYS else torch.float32
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def dtype_note(config: Config, device: torch.device) -> str:
    """A line for the user if a CPU computes in bfloat16; otherwise empty."""
    if device.type != "cpu" or resolve_dtype(config, device) != torch.bfloat16:
        return ""
    relative = bfloat16_time()
    return (
        f"dtype=bfloat16: a product takes {relative:.2g} times as long as in float32 on this processor"
        f"{'; dtype=float32 is faster' if relative > 1 else ''}"
    )


@cache
def bfloat16_time() -> float:
    """The time of a bfloat16 product relative to float32 on the CPU, each the minimum of five."""

    def seconds(dtype: torch.dtype) -> float:
        x, weight = (torch.ones(rows, 256, dtype=dtype, device="cpu") for rows in (512, 256))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            linear(x, weight)
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) / seconds(torch.float32)


def resolve_mode(name: str, device: torch.device) -> Mode | None:
    """The mode for `mode=name` on a device; None for auto on a CPU, which needs a measurement.

    Raises UserError for a mode that cannot run there.
    """
    cuda = device.type == "cuda"
    if name == "eager" or (name == "auto" and device.type not in ("cpu", "cuda")):
        return EAGER
    if name == "auto" and not cuda:
        return None
    fault = compiler_fault(device)
    if name == "compile":
        if fault is not None:
            raise UserError(
                f"mode=compile: {fault}; use mode=eager, or install a C++ compiler and Python's headers"
            )
        return COMPILE
    notes = [] if cuda else ["nothing to capture on a CPU, the same program runs directly"]
    if fault is not None:
        notes.append(f"not compiled: {fault}")
    return Mode("graph", compiled=fault is None, captured=cuda, note="; ".join(notes))


def compiler_fault(device: torch.device) -> str | None:
    """The reason why torch.compile fails on this machine for a simple operation; None if it works."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    # A missing compiler, header or library may raise any exception.
    except Exception as error:
        # A stop also kills the compiler, which is not a failure of compilation.
        time.sleep(GRACE)
        reason = str(error).strip() or type(error).__name__
        return f"torch.compile fails here ({reason.splitlines()[0][:120]})"
    return None


def faster_mode(
    function: Callable[..., Any],
    whole: Callable[..., Any],
    run: Callable[[Callable[..., Any]], None],
    steps: int,
    device: torch.device,
    compiling: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Mode:
    """Chooses eager or compiled, whichever takes less time for `steps` steps, including compilation.

    run: runs one step with `function` or with `whole`, its compiled version. Both are timed; compilation is
    skipped if it is unlikely to save time. compiling: the context of the compilation.
    """
    eager = _seconds(run, function)
    if steps * eager * COMPILE_SAVES < COMPILE_SECONDS:
        return EAGER
    start = time.perf_counter()
    with compiling():
        fault = compiler_fault(device)
        if fault is None:
            run(whole)
    if fault is not None:
        return EAGER._replace(note=f"slower: {fault}")
    spent, fused = time.perf_counter() - start, _seconds(run, whole)
    measured = f"{fused:.3f} s per step against {eager:.3f}"
    if fused >= eager:
        return EAGER._replace(note=f"compiled it would take {measured}")
    return COMPILE._replace(note=f"{measured} eager; compiling took {spent:.0f} s")


def _seconds(run: Callable[[Callable[..., Any]], None], function: Callable[..., Any]) -> float:
    """Seconds of a step: the minimum of four, or of fewer if they take long.

    The shorter of clock time and processor time counts: other processes lengthen the first, threads multiply
    the second.
    """
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 4 and time.perf_counter() - start < ENOUGH_SECONDS:
        clock, processor = time.perf_counter(), time.process_time()
        run(function)
        times.append(min(time.perf_counter() - clock, time.process_time() - processor))
    return min(times)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled as one graph, for one set of shapes.

    Raises UserError with the cause if the function cannot be traced at the first call, or would be recompiled
    at a later call. Both would silently make steps slow.
    """
    # The first call imports the compiler.
    whole: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal whole
        if whole is not None:
            try:
                with torch.compiler.set_stance("fail_on_recompile"):
                    return whole(*args)
            except RuntimeError as error:
                if "recompile" not in str(error):
                    raise
                raise UserError(
                    f"a compiled step would be recompiled ({_cause(error)}); mode=eager runs it"
                ) from error
        first = torch.compile(function, fullgraph=True, dynamic=False)
        _format_arguments_late()
        try:
            out = first(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UserError(
                f"the step cannot be compiled as one graph ({_cause(error)}); mode=eager runs it"
            ) from error
        whole = first
        return out

    return call


@cache
def _format_arguments_late() -> None:
    """Before torch 2.13: makes Inductor format an operator's arguments for the log only if logging is
    enabled.

    Inductor 2.10 to 2.12 formats the arguments of each operator that it lowers for the first time, including
    everything that they were computed from. This text grows twentyfold with each block of a model, so
    compilation does not end.
    """
    if TorchVersion(torch.__version__) >= "2.13":
        return
    from torch._inductor.exc import OperatorIssue
    from torch._logging import LazyString

    text: Any = OperatorIssue.operator_str
    late: Any = staticmethod(lambda *args: LazyString(text, *args))
    setattr(OperatorIssue, "operator_str", late)  # noqa: B010


def _cause(error: Exception) -> str:
    """The compiler's error on one line, without preamble and hints."""
    reason = str(error).split("guard failure(s):")[-1].split("Hint:")[0]
    return " ".join(reason.split()).removeprefix("- ")[:300]
