"""Runs that are reproducible bit for bit on one machine: `deterministic=true`.

Weights, batches and exploration are always functions of the seed and the step. This project's kernels sum in
a fixed order, without atomics, with blocks chosen by shape, not by measurement. On a GPU, PyTorch and its
libraries are not deterministic by default: cuBLAS splits sums by workspace, some backward passes add
atomically, and the compiler chooses kernels by timing them. PyTorch's deterministic mode makes these
deterministic or raises an error.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hrm.common.errors import UserError
from hrm.config.load import Config

# Settings of cuBLAS that PyTorch accepts as deterministic, the faster one first.
WORKSPACE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


@contextmanager
def deterministic(config: Config, device: torch.device) -> Iterator[list[str]]:
    """Makes PyTorch deterministic within the context, if `deterministic=true`; yields notes for the user.

    Enter it before the first matrix product on a CUDA device, which makes cuBLAS read its setting. Raises
    UserError for settings that contradict it, and for a PyTorch operation without a deterministic version.
    """
    if not config.deterministic:
        yield []
        return
    notes = _require(config, device)
    memory: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled = memory.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        # Filling every new tensor costs time and only helps to find uninitialised reads.
        memory.fill_uninitialized_memory = False
        yield notes
    except RuntimeError as error:
        operation, is_that, _ = str(error).partition(" does not have a deterministic implementation")
        if not is_that:
            raise
        raise UserError(
            f"deterministic=true: PyTorch's {operation} is not deterministic on {device}; "
            "set deterministic=false or disable the option that uses it"
        ) from error
    finally:
        memory.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _require(config: Config, device: torch.device) -> list[str]:
    """Checks the configuration, sets environment variables of libraries, and returns notes."""
    if config.spike_rewinds:
        raise UserError(
            f"deterministic=true conflicts with spike_rewinds={config.spike_rewinds}: a rewind returns to a "
            "checkpoint, and these are saved by the clock; set spike_rewinds=0"
        )
    if device.type not in ("cpu", "cuda"):
        raise UserError(
            f"deterministic=true: PyTorch is deterministic on cpu and cuda, not on {device}; "
            "set device=cpu or deterministic=false"
        )
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return [f"deterministic: repeat it with OMP_NUM_THREADS={threads} for the same bits"]
    chosen = os.environ.setdefault(WORKSPACE, WORKSPACES[0])
    if chosen not in WORKSPACES:
        raise UserError(
            f"deterministic=true: environment variable {WORKSPACE}={chosen} lets cuBLAS sum in any order; "
            f"unset it or set it to {' or '.join(WORKSPACES)}"
        )
    return []
