"""Optimisers and the learning-rate schedule.

All dense parameters are in one flat float32 buffer and their gradients in another, so a step needs one
optimiser pass, one all-reduce and one norm, without a Python loop. The puzzle table has a separate optimiser,
which updates only the rows of the batch.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kernels import adam_atan2

# Align each parameter to 64 bytes, for vector loads and for kernels that assume alignment.
ALIGNMENT = 16


class FlatParameters:
    """Moves a module's parameters into one buffer, and allocates another for their gradients.

    data, grad: (N,) float32 (the parameters' dtype), N includes the zeros in alignment gaps. The
    module's parameters become views of `data`. Their `.grad` is not used: `collect` takes the results of
    `torch.autograd.grad` for `leaves`, so that no gradient is added to zeros.

    With a narrower `dtype` the module computes with copies instead: all its parameters except those named in
    `wide` become views of `copy` (N,), which an update writes together with `data`, so that no weight is cast
    at its use. The gradients of these parameters have that dtype.
    """

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype | None = None,
        wide: Sequence[str] = (),
        first: Sequence[str] = (),
    ) -> None:
        """first: the first parameters in the buffers, in this order."""
        named = dict(module.named_parameters())
        named = {name: named[name] for name in dict.fromkeys((*first, *named))}
        own = next(iter(named.values()))
        self.names, self.leaves = list(named), list(named.values())
        self.shapes = [leaf.shape for leaf in self.leaves]
        self.offsets, size = [], 0
        for leaf in self.leaves:
            self.offsets.append(size)
            size += -(-leaf.numel() // ALIGNMENT) * ALIGNMENT
        self.data = own.new_zeros(size)
        self.grad = torch.zeros_like(self.data)
        narrows = dtype is not None and dtype.itemsize < own.dtype.itemsize
        self.copy = torch.zeros_like(self.data, dtype=dtype) if narrows else None
        masters = self.views(self.data)
        for name, leaf in named.items():
            masters[name].copy_(leaf.detach())
        self.refresh_copy()
        used = masters if self.copy is None else self.views(self.copy)
        for name, leaf in named.items():
            leaf.data = masters[name] if name in wide else used[name]

    def views(self, flat: Tensor, start: int = 0) -> dict[str, Tensor]:
        """Each parameter's part of a buffer laid out like `data[start:]`, by name, in the parameter's shape.

        A shorter buffer holds only the first parameters from there.
        """
        return {
            name: flat[offset - start : offset - start + shape.numel()].view(shape)
            for name, offset, shape in zip(self.names, self.offsets, self.shapes, strict=True)
            if start <= offset < start + len(flat)
        }

    def refresh_copy(self) -> None:
        """Updates the copies after any write to `data` other than an optimiser step."""
        if self.copy is not None:
            self.copy.copy_(self.data)

    @torch.no_grad()
    def collect(self, grads: Sequence[Tensor | None], *, adds: bool = False) -> None:
        """Writes the gradients of `leaves` to `grad`, or adds them.

        grads: one for each leaf, in the leaf's shape and dtype; None for an unused leaf.
        """
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for view, grad in zip(self.views(self.grad).values(), grads, strict=True):
            if grad is not None:
                views, given = by_dtype.setdefault(grad.dtype, ([], []))
                views.append(view)
                given.append(grad)
            elif not adds:
                view.zero_()
        # One launch for many tensors, if all have the same dtype.
        for views, given in by_dtype.values():
            (torch._foreach_add_ if adds else torch._foreach_copy_)(views, given)


class MovingAverage:
    """An exponential moving average of flat parameters, in their own dtype: a = rate * a + (1 - rate) * p.

    data: (N,), laid out like the parameters'. Source: Jolicoeur-Martineau 2025 (arXiv 2510.04871).
    """

    def __init__(self, parameters: FlatParameters, rate: float, start: int = 0) -> None:
        """start: updates before the average starts; until then it equals the parameters."""
        self.parameters, self.rate, self.start = parameters, rate, start
        self.data = parameters.data.clone()

    def update(self, skip: Tensor | None = None, count: Tensor | None = None) -> None:
        """Call after each update of the parameters.

        skip: () bool; where True, the average stays. count: (), the updates so far; needed with `start`.
        """
        weight: Any = 1 - self.rate
        if self.start:
            assert count is not None
            weight = torch.where(count > self.start, weight, 1.0).to(self.data.dtype)
        self.data.lerp_(
            self.parameters.data, weight if skip is None else weight * (~skip).to(self.data.dtype)
        )

    def restart(self) -> None:
        """Sets the average to the current parameters."""
        self.data.copy_(self.parameters.data)

    def state_dict(self) -> dict[str, Tensor]:
        """The average of each parameter, by its name."""
        return self.parameters.views(self.data)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads a `state_dict`; missing parameters keep their average."""
        for name, view in self.state_dict().items():
            if name in state:
                view.copy_(state[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context, the module computes with the average instead of its parameters."""
        own = self.parameters.data.clone()
        try:
            self._set(self.data)
            yield
        finally:
            self._set(own)

    def _set(self, data: Tensor) -> None:
        self.parameters.data.copy_(data)
        self.parameters.refresh_copy()


class Adam:
    """AdamATan2 or AdamW over flat parameters from `start` on; see `kernels.adam_atan2`.

    Its step count lives on the device.
    """

    # Whether ranks exchange anything between `propose` and `step`.
    exchanges = False

    def __init__(
        self,
        parameters: FlatParameters,
        *,
        beta1: float,
        beta2: float,
        weight_decay: float,
        update: Callable[..., None] = adam_atan2,
        start: int = 0,
    ) -> None:
        self.parameters, self.start, self._update = parameters, start, update
        self.beta1, self.beta2, self.weight_decay = beta1, beta2, weight_decay
        self.exp_avg = torch.zeros_like(parameters.data[start:])
        self.exp_avg_sq = torch.zeros_like(parameters.data[start:])
        self.count = torch.zeros((), dtype=torch.int64, device=parameters.data.device)

    def propose(self, skip: Tensor | None = None) -> None:
        """Does the part of an update before `exchange`; this optimiser has none."""

    def exchange(self) -> None:
        """Exchanges parts of an update between ranks; this optimiser has none."""

    @torch.no_grad()
    def step(self, lr: Tensor, skip: Tensor | None = None) -> None:
        """Updates the parameters from the current gradients. lr: () float32, skip: () bool, both on the
        device.

        If skip is True, parameters, copies and moments do not change, and the step is not counted.
        """
        flat, start = self.parameters, self.start
        self.count += 1 if skip is None else ~skip
        self._update(
            flat.data[start:],
            flat.grad[start:],
            self.exp_avg,
            self.exp_avg_sq,
            lr=lr,
            step=self.count,
            beta1=self.beta1,
            beta2=self.beta2,
            weight_decay=self.weight_decay,
            copy=None if flat.copy is None else flat.copy[start:],
            skip=skip,
        )

    def buffers(self) -> dict[str, Tensor]:
        """The moments of all parameters, by kind."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """The moments as views, by kind and by parameter name."""
        return {kind: self.parameters.views(flat, self.start) for kind, flat in self.buffers().items()}

    def state_dict(self) -> dict[str, Any]:
        """The step count, and the moments."""
        return {"count": self.count.item(), **self.moments()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a `state_dict` of the same parameters; see `load_moments`."""
        self.count.fill_(state["count"])
        load_moments(self.moments(), state)


def load_moments(moments: dict[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Loads the moments of a `state_dict`. Missing ones, as in another optimiser's state, become 0."""
    for kind, views in moments.items():
        for parameter, view in views.items():
            if parameter in state.get(kind, {}):
                view.copy_(state[kind][parameter])
            else:
                view.zero_()


def learning_rate(
    step: int, *, base_lr: float, warmup_steps: int, total_steps: int, min_ratio: float
) -> float:
    """Linear warm-up from 0, then a cosine from base_lr to min_ratio * base_lr at total_steps.

    step counts from 1. min_ratio 1 keeps base_lr. Source: the official HRM code.
    """
    if step < warmup_steps:
        return base_lr * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return base_lr * (min_ratio + max(0.0, (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))))
