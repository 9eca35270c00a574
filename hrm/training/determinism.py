"""Runs that repeat themselves bit for bit on the same machine: `deterministic=true`.

Most of a run does so by itself. Weights, batches and exploration are functions of the seed and the step; this
project's kernels sum in a fixed order, without atomics, and none is chosen by a measurement. What is left is
PyTorch's and its libraries', on a GPU: products whose sums cuBLAS splits by the workspace it finds, backward
passes of attention for long sequences and of large tables that add atomically, kernels that the compiler
chooses by timing them. PyTorch's own switch settles all of these or raises; what it cannot settle is refused.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hrm.common.errors import UserError
from hrm.config.load import Config

# The settings of cuBLAS that PyTorch takes for deterministic; the first is the faster one.
WORKSPACE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


@contextmanager
def deterministic(config: Config, device: torch.device) -> Iterator[list[str]]:
    """Within it `deterministic=true` holds; without that key nothing changes.

    Yields notes for the user. To be entered before the first product on a CUDA device, when cuBLAS reads its
    setting. Raises UserError for what configuration or environment ask for and cannot be, and for an
    operation of PyTorch's that has no deterministic way.
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
        # It shows who reads memory that was never written, by a pass over every new tensor.
        memory.fill_uninitialized_memory = False
        yield notes
    except RuntimeError as error:
        operation, is_that, _ = str(error).partition(" does not have a deterministic implementation")
        if not is_that:
            raise
        raise UserError(
            f"deterministic=true: PyTorch's {operation} is not deterministic on {device}; "
            "set deterministic=false or another option than the one that calls it"
        ) from error
    finally:
        memory.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _require(config: Config, device: torch.device) -> list[str]:
    """Refuses what cannot repeat itself, sets what libraries read from the environment; returns notes."""
    if config.spike_rewinds:
        raise UserError(
            f"deterministic=true cannot go with spike_rewinds={config.spike_rewinds}: a rewind goes back to "
            "a checkpoint, and the clock decides when they are saved; set spike_rewinds=0"
        )
    if device.type not in ("cpu", "cuda"):
        raise UserError(
            f"deterministic=true: PyTorch promises the same bits on cpu and cuda, not on {device}; "
            "set device=cpu or deterministic=false"
        )
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return [f"deterministic: the same bits with as many threads, OMP_NUM_THREADS={threads}"]
    chosen = os.environ.setdefault(WORKSPACE, WORKSPACES[0])
    if chosen not in WORKSPACES:
        raise UserError(
            f"deterministic=true: environment variable {WORKSPACE}={chosen} lets cuBLAS sum in any order; "
            f"unset it or set it to {' or '.join(WORKSPACES)}"
        )
    return []
