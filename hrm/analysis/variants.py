"""Contexts that remove a part of a model, and restore it at their end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hrm.engine.inference import StepByStep
from hrm.model.hrm import HRM

# Changes a runner's carry before an ACT step.
Before = Callable[[StepByStep], None]


@contextmanager
def changed(model: HRM, **parts: Any) -> Iterator[None]:
    """Within this context the model has other attributes: an architecture, levels or a subgoal head."""
    held = {name: getattr(model, name) for name in parts}
    try:
        for name, part in parts.items():
            setattr(model, name, part)
        yield
    finally:
        for name, part in held.items():
            setattr(model, name, part)


@contextmanager
def steps_of(model: HRM, steps: int) -> Iterator[None]:
    """Within this context halt_max_steps is `steps`."""
    with changed(model, arch=replace(model.arch, halt_max_steps=steps)):
        yield


class Frozen(nn.Module):
    """A level whose state does not change. With `level`, the last of its `calls` in an ACT step updates."""

    def __init__(self, level: nn.Module | None = None, calls: int = 1) -> None:
        super().__init__()
        # A list hides the level from PyTorch, so that the model's parameters do not change.
        self._level, self._calls, self._made = [level], calls, 0

    def hold(self, z: Tensor, o: Tensor, x: Tensor | None) -> Any:
        """The gate values that `level` holds for an H-cycle; None without a level."""
        level = self._level[0]
        return None if level is None else level.hold(z, o, x)  # type: ignore[operator]

    def forward(
        self, z: Tensor, o: Tensor, x: Tensor | None, cos: Any, sin: Any, queries: Any = None, **options: Any
    ) -> Tensor:
        self._made += 1
        level = self._level[0]
        if level is not None and self._made % self._calls == 0:
            updated: Tensor = level(z, o, x, cos, sin, queries, **options)
            return updated
        return z[:, :queries]


@torch.no_grad()
def _forget_H(runner: StepByStep) -> None:
    runner.carry.z_H.copy_(runner.model.H_init.to(runner.carry.z_H.dtype))


@contextmanager
def without(model: HRM, part: str) -> Iterator[Before | None]:
    """The model without a part, and what to do before each ACT step.

    part: "1 H-cycle", "1 L-cycle"; "H frozen": every update sees H_init as z_H, and only the last H-update of
    an ACT step, which the answer is read from, is made; "L frozen": z_L stays L_init; "no goals".
    Raises ValueError for another part.
    """
    arch, H_level = model.arch, model.H_level or model.L_level
    if part in ("1 H-cycle", "1 L-cycle"):
        cycles = {f"{part[2]}_cycles": 1}
        with changed(model, arch=replace(arch, **cycles)):  # type: ignore[arg-type]
            yield None
    elif part == "H frozen":
        with changed(model, H_level=Frozen(H_level, arch.H_cycles)):
            yield _forget_H
    elif part == "L frozen":
        with changed(model, H_level=H_level, L_level=Frozen()):
            yield None
    elif part == "no goals":
        with changed(model, subgoal_head=None):
            yield None
    else:
        raise ValueError(f"no part of a model is called {part}")


def removable(model: HRM) -> list[str]:
    """The parts that `without` can take away from a model."""
    arch = model.arch
    parts = ["1 H-cycle"] * (arch.H_cycles > 1) + ["1 L-cycle"] * (arch.L_cycles > 1)
    if arch.single_state:
        return parts
    return [*parts, "H frozen", "L frozen", *["no goals"] * (model.subgoal_head is not None)]
