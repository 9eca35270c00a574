"""Damping, noise and random initial states as plain functions around the straight-line modules."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.noise import draws_reference
from tests.support import straight_line as plain
from tests.support import straight_trm


def random_start(init: Tensor, keys: Tensor, call: int, length: int) -> Tensor:
    """(B, T, D): truncated normals of standard deviation 1, and init on path 0; call 0 is for z_H, call 1 for
    z_L."""
    drawn = draws_reference(keys, 0, call, length, len(init), truncated=True).to(init.dtype)
    return torch.where(keys[:, 2, None, None] == 0, init, drawn)


@contextmanager
def in_place(damping: float, deviation: float, keys: Tensor, steps: Tensor) -> Iterator[None]:
    """Within this context an ACT step of the straight-line code uses z' = (1 - damping) z + damping f +
    deviation eps.

    keys: (B, 3); path 0 has no noise. steps: (B,), the number of earlier steps. Calls count from 2.
    """
    calls = count(2)

    def updated(old: Tensor, new: Tensor) -> Tensor:
        eps = draws_reference(keys, steps, next(calls), *new.shape[1:], truncated=False).to(new.dtype)
        return (1 - damping) * old + damping * new + deviation * (keys[:, 2, None, None] != 0) * eps

    of_level, of_stack = plain.reasoning, straight_trm.reasoning

    def level(w: Any, cfg: Any, name: str, z: Tensor, o: Tensor, x: Tensor, angles: Any) -> Tensor:
        return updated(z, of_level(w, cfg, name, z, o, x, angles))

    def stack(w: Any, cfg: Any, z: Tensor, o: Tensor, angles: Any) -> Tensor:
        return updated(z, of_stack(w, cfg, z, o, angles))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "reasoning", level)
        patch.setattr(straight_trm, "reasoning", stack)
        yield
