"""Muon over flat parameters: the blocks' matrices by orthogonalised momentum, all others by AdamW."""

import math
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hrm.config.schema import Config
from hrm.distributed import World
from hrm.engine.optim import ALIGNMENT, Adam, FlatParameters, load_moments
from kernels import adam_atan2, adamw, muon_momentum, muon_update
from kernels.muon import orthogonalize

UPDATES: dict[str, Callable[..., None]] = {"adam_atan2": adam_atan2, "adamw": adamw}


class Stack(NamedTuple):
    """Consecutive matrices of the same shape in flat parameters.

    start, end: their range. weights: number of weights, each of `parts` matrices of (rows, columns).
    """

    start: int
    end: int
    weights: int
    parts: int
    rows: int
    columns: int

    def of(self, flat: Tensor) -> Tensor:
        """The matrices (weights, parts, rows, columns), a view."""
        each = self.parts * self.rows * self.columns
        whole = flat[self.start : self.end].view(self.weights, -1)[:, :each]
        return whole.unflatten(1, (self.parts, self.rows, self.columns))

    def share(self, rank: int, ranks: int) -> slice:
        """The indices, among weights * parts matrices, that a rank orthogonalises."""
        matrices = self.weights * self.parts
        return slice(rank * matrices // ranks, (rank + 1) * matrices // ranks)


class Muon:
    """Muon for the first weights of flat parameters and AdamW for the others; see `kernels.muon`.

    Each rank orthogonalises its share of the matrices, and `exchange` distributes them to all ranks, so that
    ranks stay bit-identical. The products run in the dtype that the model computes in. Source: Jordan et al.
    2024; the recipe of arXiv 2601.19085.
    """

    def __init__(
        self,
        parameters: FlatParameters,
        parts: Mapping[str, int],
        *,
        lr: Tensor,
        momentum: float,
        steps: int,
        weight_decay: float,
        world: World,
        adam: Mapping[str, float],
    ) -> None:
        """parts: number of matrices along the rows of each weight, in the order of the buffers.

        lr: () float32 on the device, the learning rate of the matrices. steps: of Newton-Schulz. adam: beta1,
        beta2 and weight_decay of AdamW.
        """
        self.parameters, self.lr, self.world = parameters, lr, world
        self.mu, self.steps, self.weight_decay = momentum, steps, weight_decay
        shapes = dict(zip(parameters.names, parameters.shapes, strict=True))
        assert [*parts] == parameters.names[: len(parts)], "the matrices come first in the buffers"
        self.stacks: list[Stack] = []
        start = 0
        for (shape, number), names in groupby(parts, lambda name: (shapes[name], parts[name])):
            count, size = len(list(names)), -(-shape.numel() // ALIGNMENT) * ALIGNMENT
            end = start + count * size
            self.stacks.append(Stack(start, end, count, number, shape[0] // number, shape[1]))
            start = end
        data = parameters.data[:start]
        self.momentum = torch.zeros_like(data)
        self.update = torch.zeros_like(data if parameters.copy is None else parameters.copy[:start])
        self.adam = Adam(parameters, update=adamw, start=start, **adam)
        self.exchanges = world.size > 1

    @property
    def count(self) -> Tensor:
        """Updates so far: () int64 on the device."""
        return self.adam.count

    @torch.no_grad()
    def propose(self, skip: Tensor | None = None) -> None:
        """Computes the momentum of all matrices and the orthogonal update of this rank's share."""
        grad = self.parameters.grad[: len(self.momentum)]
        muon_momentum(grad, self.momentum, self.update, mu=self.mu, skip=skip)
        for index, stack in enumerate(self.stacks):
            # Start each stack at another rank, as some stacks have fewer matrices than there are ranks.
            rank = (self.world.rank + index) % self.world.size
            mine, updates = stack.share(rank, self.world.size), stack.of(self.update)
            proposed = orthogonalize(updates.flatten(0, 1)[mine], self.steps)
            if self.exchanges:
                whole = torch.zeros_like(updates).flatten(0, 1)
                whole[mine] = proposed
                proposed = whole
            updates.copy_(proposed.unflatten(0, (stack.weights, stack.parts)))

    def exchange(self) -> None:
        """Sums the updates over the ranks: each is zero on all ranks but one."""
        self.world.all_reduce(self.update)

    @torch.no_grad()
    def step(self, lr: Tensor, skip: Tensor | None = None) -> None:
        """Updates all parameters after `propose`; see `Adam.step`. lr: of AdamW."""
        data, copy = self.parameters.data, self.parameters.copy
        for stack in self.stacks:
            place = slice(stack.start, stack.end)
            muon_update(
                data[place],
                self.update[place],
                lr=self.lr,
                scale=math.sqrt(max(1, stack.rows / stack.columns)),
                weight_decay=self.weight_decay,
                copy=None if copy is None else copy[place],
                skip=skip,
            )
        self.adam.step(lr, skip)

    def buffers(self) -> dict[str, Tensor]:
        """The momentum of the matrices and AdamW's moments, by kind."""
        return {"momentum": self.momentum, **self.adam.buffers()}

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """The same as views, by kind and by parameter name."""
        return {"momentum": self.parameters.views(self.momentum), **self.adam.moments()}

    def state_dict(self) -> dict[str, Any]:
        """The step count, and the moments."""
        return {"count": self.count.item(), **self.moments()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a `state_dict` of the same parameters; see `load_moments`."""
        self.count.fill_(state["count"])
        load_moments(self.moments(), state)


def in_stacks(parts: Mapping[str, int], shapes: Mapping[str, torch.Size]) -> dict[str, int]:
    """The number of matrices in each weight, ordered so that weights of the same shape are consecutive."""
    order = sorted(parts, key=lambda name: (shapes[name], parts[name]))
    return {name: parts[name] for name in order}


def make_optimizer(
    config: Config, parameters: FlatParameters, parts: Mapping[str, int], muon_lr: Tensor, world: World
) -> Adam | Muon:
    """The optimiser of a configuration. parts, muon_lr: only for `Muon`."""
    adam = {"beta1": config.beta1, "beta2": config.beta2, "weight_decay": config.weight_decay}
    if config.optimizer != "muon":
        return Adam(parameters, update=UPDATES[config.optimizer], start=0, **adam)
    return Muon(
        parameters,
        parts,
        lr=muon_lr,
        momentum=config.muon_momentum,
        steps=config.muon_steps,
        weight_decay=config.muon_weight_decay,
        world=world,
        adam=adam,
    )
