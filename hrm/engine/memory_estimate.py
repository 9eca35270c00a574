"""Estimates the memory of a training step on a device, without that device.

A dry run tracks every tensor from its allocation to its release, including workspaces of this project's
kernels. It omits the memory of libraries and of the CUDA context, rounding and fragmentation of the
allocator, and evaluation. The step is that of mode=eager; a compiled step creates fewer tensors.
"""

import math
import os
import resource
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hrm.common.errors import UserError
from hrm.common.text import size_text
from hrm.config.load import Config
from hrm.data.dataset import Batch
from hrm.data.format import Metadata
from hrm.engine.dry_run import Observer, Rehearsal, rehearsed
from hrm.engine.inference import EarlyExit, Inference
from hrm.engine.modes import EAGER, resolve_dtype
from hrm.model.hrm import HRM

# Share of a device's memory that is reserved for uncounted memory.
RESERVE = 0.05
# Number of sequences from which memory grows linearly, despite small tensors and kernel tiles.
_FAR = 512


class StepMemory(NamedTuple):
    """Bytes of one device. fixed: of tensors that live between steps. step: the peak of a step on top."""

    fixed: int
    step: int

    @property
    def peak(self) -> int:
        return self.fixed + self.step


class _Storages(Observer):
    """Bytes of the live storages, and their maximum so far."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._follow(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)

    def _follow(self, storage: torch.UntypedStorage) -> None:
        # Views and in-place outputs share a storage that is known already.
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._released, storage._cdata)

    def _released(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def step_memory(config: Config, metadata: Metadata, rows: int, device: torch.device) -> StepMemory:
    """The memory of a training step of `rows` sequences on `device`, which may be missing here.

    config: model, dtype, optimiser, and gradient_accumulation, which must divide rows. Takes about a second
    at any size.
    """
    storages = _Storages()
    rehearsal = Rehearsal(replace(config, global_batch_size=rows), metadata, device, storages)
    storages.peak = fixed = storages.live
    rehearsal.step()
    return StepMemory(fixed, storages.peak - fixed)


def largest_batch(
    config: Config, metadata: Metadata, budget_bytes: int, device: torch.device, *, multiple: int = 1
) -> int:
    """The most sequences whose training step fits into a device's `budget_bytes`, 0 if not even one does.

    The result is a multiple of `multiple` and of gradient_accumulation. The peak is a maximum of linear
    functions and therefore convex. So the step fits at the size where the line between a fitting and a too
    large size meets the budget.
    """
    unit = math.lcm(multiple, config.gradient_accumulation)

    def peak(units: int) -> int:
        return step_memory(config, metadata, units * unit, device).peak

    fits, far = 1, _FAR
    if (low := peak(fits)) > budget_bytes:
        return 0
    while (high := peak(far)) <= budget_bytes:
        fits, low, far = far, high, 4 * far
    while more := (budget_bytes - low) * (far - fits) // (high - low):
        fits += more
        low = peak(fits)
    return unit * fits


def check_inference(
    config: Config,
    metadata: Metadata,
    rows: int,
    device: torch.device,
    *,
    early: bool = False,
    sharing: int = 1,
) -> None:
    """Raises UserError if solving `rows` sequences at a time needs more memory than there is.

    This is checked in advance, because a system that overcommits memory would kill the process. Arguments:
    see `inference_does_not_fit`.
    """
    if lack := inference_does_not_fit(config, metadata, rows, device, early=early, sharing=sharing):
        raise UserError(lack)


def inference_does_not_fit(
    config: Config,
    metadata: Metadata,
    rows: int,
    device: torch.device,
    *,
    early: bool = False,
    sharing: int = 1,
    always: bool = False,
) -> str:
    """The error message if `rows` sequences at a time do not fit; empty if they fit.

    early: also with early halting. sharing: number of processes that share the device's memory. always:
    memory has run out, so report that it does not fit, whatever the estimate.
    """
    least, far = (_inference_peak(config, metadata, count, device, early) for count in (1, _FAR))
    each, available = (far - least) / (_FAR - 1), available_bytes(device) // sharing
    needed = least + (rows - 1) * each
    if needed <= available and not always:
        return ""
    # Suggest half of the memory, as fragmentation is not counted.
    fitting = min(rows // 2, max(0, int((available / 2 - least) // each) + 1))
    remedy = f"batch_size={fitting} would fit" if fitting else "not even one sequence fits"
    each_has = f"each of {sharing} processes on {device}" if sharing > 1 else str(device)
    return (
        f"batch_size={rows} needs about {size_text(needed)} and {each_has} has {size_text(available)}: "
        + remedy
    )


def _inference_peak(
    config: Config, metadata: Metadata, rows: int, device: torch.device, early: bool = False
) -> int:
    storages = _Storages()
    cells = np.zeros((rows, metadata.seq_len), np.int32)
    # Memory does not grow after the second step.
    arch = replace(config.arch, halt_max_steps=min(2, config.arch.halt_max_steps))
    with rehearsed(device, storages):
        with torch.device("meta"):
            dtype = resolve_dtype(config, device)
            model = HRM.from_config(replace(config, arch=arch), metadata, dtype)
            inference = Inference(model, rows, metadata.seq_len, mode=EAGER, loss=config.loss)
            exits = EarlyExit(model, rows, metadata.seq_len, mode=EAGER) if early else None
        inference.run(Batch(cells, cells, np.zeros(rows, np.int32)))
        if exits is not None:
            exits.take_turn()
    return storages.peak


def fewest_parts(
    config: Config, metadata: Metadata, rows: int, budget_bytes: int, device: torch.device
) -> int | None:
    """The smallest gradient_accumulation whose step of `rows` sequences fits, None if none does."""
    fixed = step_memory(replace(config, gradient_accumulation=1), metadata, rows, device).fixed

    def fits(parts: int) -> bool:
        # Every further part needs the memory of the second part.
        some = min(parts, 2)
        part = replace(config, gradient_accumulation=some)
        return fixed + step_memory(part, metadata, some * rows // parts, device).step <= budget_bytes

    choices = [parts for parts in range(1, rows + 1) if rows % parts == 0]
    found = bisect_left(choices, True, key=fits)
    return choices[found] if found < len(choices) else None


def available_bytes(device: torch.device) -> int:
    """Bytes available to this process: on CUDA its own and the free memory, else the machine's memory or its
    limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return machine if limit == resource.RLIM_INFINITY else min(machine, limit)


@contextmanager
def enough_memory(explanation: Callable[[], str]) -> Iterator[None]:
    """Converts out-of-memory errors of CUDA or a CPU into a UserError with the text of `explanation`."""
    try:
        yield
    except RuntimeError as error:
        # The CPU allocator has no error class.
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise UserError(explanation()) from None


def does_not_fit(
    config: Config, metadata: Metadata, device: torch.device, available: int | None = None, *, ranks: int = 1
) -> str:
    """The message for a training step that ran out of memory: required and available memory, and a remedy.

    available: bytes per device for its process, None to measure. The suggested size leaves RESERVE free.
    """
    available = available_bytes(device) if available is None else available
    rows, budget = config.global_batch_size // ranks, int(available * (1 - RESERVE))
    needed = step_memory(config, metadata, rows, device).peak
    text = (
        f"global_batch_size={config.global_batch_size} needs about {size_text(needed)} on each device "
        f"and {device} has {size_text(available)}: "
    )
    if needed <= budget:
        return text + "end other processes on it, lower global_batch_size or raise gradient_accumulation"
    fitting = {
        "global_batch_size": ranks * largest_batch(config, metadata, budget, device),
        "gradient_accumulation": fewest_parts(config, metadata, rows, budget, device),
    }
    remedies = [f"{key}={value}" for key, value in fitting.items() if value]
    if not remedies:
        return text + "lower arch.hidden_size or the layers, not even one sequence fits"
    return text + " or ".join(remedies) + " would fit"
