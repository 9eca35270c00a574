"""`device=auto` on a computer with an Apple GPU: that GPU or the CPU, whichever is faster for the model."""

import time
from dataclasses import replace

import torch

from hrm.config.schema import Config
from hrm.data.format import Metadata
from hrm.distributed import World
from hrm.engine.modes import COMPILE_SAVES
from hrm.engine.step_program import StepProgram
from hrm.model.hrm import HRM

# Most sequences of the step that is measured: enough to fill such a GPU, and soon done on a CPU.
MOST_ROWS = 64
MPS = torch.device("mps")


def faster_device(config: Config, metadata: Metadata, device: torch.device) -> tuple[torch.device, str]:
    """The device that a run takes, and a line for the user on a choice that was measured, or "".

    device: as `resolve_device` found it. With device=auto a CPU gives way to an Apple GPU on which an eager
    step takes less time than a compiled one would take on the CPU. deterministic=true keeps the CPU.
    """
    if config.device != "auto" or device.type != "cpu" or config.deterministic:
        return device, ""
    if not torch.backends.mps.is_available():
        return device, ""
    try:
        there = step_seconds(config, metadata, MPS)
    # A driver or an operation that fails raises nearly any exception; the CPU runs everything.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        return device, f"device=auto takes cpu: a step on the Apple GPU fails ({reason})"
    here = step_seconds(config, metadata, device)
    chosen = MPS if there < (1 - COMPILE_SAVES) * here else device
    return chosen, f"device=auto takes {chosen}: {there:.3f} s a step on mps, {here:.3f} on the CPU"


def step_seconds(config: Config, metadata: Metadata, device: torch.device) -> float:
    """Seconds of an eager step's forward and backward, at most MOST_ROWS sequences, the minimum of three."""
    rows = min(MOST_ROWS, config.global_batch_size)
    config = replace(config, global_batch_size=rows, gradient_accumulation=1)
    model = HRM.from_config(config, metadata, torch.float32).to(device)
    program = StepProgram(config, model, metadata.seq_len, device, World())
    times = []
    # The first step loads the kernels.
    for _ in range(4):
        start = time.perf_counter()
        program.rehearse(program.forward)
        if device.type == "mps":
            torch.mps.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
