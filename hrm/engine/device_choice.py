"""`device=auto` on a computer with an Apple GPU: chooses the GPU or the CPU, whichever is faster for the
model."""

import time
from dataclasses import replace

import torch

from hrm.config.schema import Config
from hrm.data.format import Metadata
from hrm.distributed import World
from hrm.engine.modes import COMPILE_SAVES
from hrm.engine.step_program import StepProgram
from hrm.model.hrm import HRM

# Maximum number of sequences in the measured step: enough to fill such a GPU, and fast on a CPU.
MOST_ROWS = 64
MPS = torch.device("mps")


def faster_device(config: Config, metadata: Metadata, device: torch.device) -> tuple[torch.device, str]:
    """The device of a run, and a line for the user about a measured choice, or "".

    device: the result of `resolve_device`. With device=auto an Apple GPU replaces the CPU if an eager step on
    it takes less time than a compiled step would take on the CPU. deterministic=true keeps the CPU.
    """
    if config.device != "auto" or device.type != "cpu" or config.deterministic:
        return device, ""
    if not torch.backends.mps.is_available():
        return device, ""
    try:
        there = step_seconds(config, metadata, MPS)
    # A failing driver or operation may raise any exception; the CPU supports all operations.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        return device, f"device=auto takes cpu: a step on the Apple GPU fails ({reason})"
    here = step_seconds(config, metadata, device)
    chosen = MPS if there < (1 - COMPILE_SAVES) * here else device
    return chosen, f"device=auto takes {chosen}: {there:.3f} s per step on mps, {here:.3f} on the CPU"


def step_seconds(config: Config, metadata: Metadata, device: torch.device) -> float:
    """The minimum time in seconds of three eager forward and backward passes of at most MOST_ROWS
    sequences."""
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
