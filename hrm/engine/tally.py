"""What the log is made of, kept on the device between two looks at it, and whether each step was sound.

A step whose loss or gradient is not finite must change nothing that lasts. That is found out and acted on by
the device alone, inside the captured step; the host learns of it with the next line of the log.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hrm.distributed import World

# Steps whose own loss and gradient norm are kept, at the most.
LONGEST = 4096


class Reading(NamedTuple):
    """The steps since the last reading.

    sums: of the steps that were not skipped, over all ranks, `grad_norm` among them. losses, norms: of each
    of the last steps, the oldest first, skipped ones included; a loss is the sum over all ranks. in_a_row:
    the steps up to the last one that were skipped in a row.
    """

    steps: int
    skipped: int
    in_a_row: int
    sums: dict[str, float]
    losses: list[float]
    norms: list[float]


class Tally:
    """Sums of a run's metrics, and each step's loss and gradient norm, on the device.

    In a step: `begin`, `add` for each part of the batch, `end`; none of them waits for the device.
    """

    def __init__(self, device: torch.device, steps: int) -> None:
        """steps: between two readings; of more than LONGEST only the last have their own loss kept."""
        self._length = min(steps, LONGEST)
        self._names: list[str] = []
        self._step_sums: Tensor | None = None
        # This rank's; the norm is that of the whole gradient, on every rank the same.
        self._sums: Tensor | None = None
        self._loaded = False
        self._norm_sum = torch.zeros(1, dtype=torch.float32, device=device)
        # Of the step with the number n since the last reading, at n modulo the length.
        self._losses, self._norms = torch.zeros(2, self._length, dtype=torch.float32, device=device)
        self._slots = torch.arange(self._length, device=device)
        self._count, self._skipped, self._in_a_row = torch.zeros(3, 1, dtype=torch.int64, device=device)

    def begin(self) -> None:
        """Before the first part of a step."""
        if self._step_sums is not None:
            self._step_sums.zero_()

    def add(self, sums: dict[str, Tensor]) -> None:
        """The metric sums of a part, `loss` among them, of the same names in every part."""
        vector = torch.stack([value.to(torch.float32) for value in sums.values()])
        if self._step_sums is None or self._names != list(sums):
            # A stage may have other metrics than the one before; a reading lies between them.
            fits = self._loaded and self._sums is not None and self._sums.shape == vector.shape
            self._names, self._step_sums = list(sums), torch.zeros_like(vector)
            self._sums = self._sums if fits else torch.zeros_like(vector)
        self._step_sums.add_(vector)

    @property
    def loss(self) -> Tensor:
        """This step's loss so far, summed over this rank's sequences: (1,)."""
        assert self._step_sums is not None, "no part of a step was added"
        index = self._names.index("loss")
        return self._step_sums[index : index + 1]

    def end(self, norm: Tensor, skip: Tensor) -> None:
        """The end of a step. norm: (), of the whole gradient. skip: () bool, whether it is left out."""
        assert self._step_sums is not None and self._sums is not None
        norm = norm.to(torch.float32).reshape(1)
        # Not by an index: deterministic ways to write there may wait for the device.
        here = self._slots == self._count % self._length
        self._losses.copy_(torch.where(here, self.loss, self._losses))
        self._norms.copy_(torch.where(here, norm, self._norms))
        self._sums.add_(torch.where(skip, 0, self._step_sums))
        self._norm_sum.add_(torch.where(skip, 0, norm))
        self._count += 1
        self._skipped += skip
        self._in_a_row.add_(1).mul_(skip)

    def read(self, world: World) -> Reading:
        """What has gathered since the last reading, on all ranks, which all call it. Waits for the device."""
        assert self._sums is not None, "no step since the last reading"
        places = self._places()
        of_all = world.all_reduce(torch.cat([self._sums, self._losses[places]])).tolist()
        norm_sum, *norms = torch.cat([self._norm_sum, self._norms[places]]).tolist()
        steps, skipped, in_a_row = torch.cat([self._count, self._skipped, self._in_a_row]).tolist()
        for tensor in (self._sums, self._norm_sum, self._count, self._skipped):
            tensor.zero_()
        sums = dict(zip(self._names, of_all, strict=False))
        return Reading(steps, skipped, in_a_row, {**sums, "grad_norm": norm_sum}, of_all[len(sums) :], norms)

    def _places(self) -> Tensor:
        """Where the last steps' losses and norms lie, the oldest step's first."""
        steps = int(self._count.item())
        return self._slots.roll(-steps) if steps > self._length else self._slots[:steps]

    def state_dict(self, world: World) -> dict[str, Any]:
        """What has gathered since the last reading, on all ranks, which all call it: tensors and numbers."""
        places = self._places()
        return {
            "sums": None if self._sums is None else world.all_gather(self._sums[None]),
            "losses": world.all_gather(self._losses[places][None]),
            "norm_sum": self._norm_sum,
            "norms": self._norms[places],
            "counts": torch.cat([self._count, self._skipped, self._in_a_row]).tolist(),
        }

    def load_state_dict(self, state: dict[str, Any], world: World) -> None:
        """Goes on from a `state_dict`; of another number of ranks, the first takes what all had gathered."""

        def mine(gathered: Tensor) -> Tensor:
            if len(gathered) == world.size:
                return gathered[world.rank]
            return gathered.sum(dim=0) if world.is_main else torch.zeros_like(gathered[0])

        for counter, count in zip((self._count, self._skipped, self._in_a_row), state["counts"], strict=True):
            counter.fill_(count)
        gathered, self._loaded = state["sums"], True
        if self._sums is not None and (gathered is None or gathered.shape[1:] == self._sums.shape):
            # In place: a captured step goes on adding where it did.
            self._sums.copy_(torch.zeros_like(self._sums) if gathered is None else mine(gathered))
        elif gathered is not None:
            self._sums = mine(gathered).to(self._count.device, copy=True)
        self._norm_sum.copy_(state["norm_sum"])
        places = self._places()
        for target, kept in ((self._losses, mine(state["losses"])), (self._norms, state["norms"])):
            last = min(len(kept), len(places))
            target[places[len(places) - last :]] = kept[len(kept) - last :].to(target.device)
