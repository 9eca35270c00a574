"""Damping, noise and random starts as plain functions around the straight lines' modules."""

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
    """(B, T, D): truncated normals of deviation 1, on path 0 init; call 0 is z_H's, call 1 z_L's."""
    drawn = draws_reference(keys, 0, call, length, len(init), truncated=True).to(init.dtype)
    return torch.where(keys[:, 2, None, None] == 0, init, drawn)


@contextmanager
def in_place(damping: float, deviation: float, keys: Tensor, steps: Tensor) -> Iterator[None]:
    """Within it one ACT step of the straight lines takes z' = (1 - damping) z + damping f + deviation eps.

    keys: (B, 3), of which path 0 has no noise. steps: (B,), those before this one. Calls count from 2.
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
