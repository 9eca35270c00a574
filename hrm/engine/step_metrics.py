"""The metrics of training steps: summed on the device, read once per log line.

The device decides whether to skip a step with a non-finite loss or gradient; the host finds out at the next
log line.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hrm.distributed import World

# Maximum number of steps whose individual loss and gradient norm are kept.
LONGEST = 4096
# Sums that are divided by the number of halted sequences; all others are divided by the number of sequences.
PER_HALTED = ("accuracy", "exact_accuracy", "q_halt_accuracy", "steps")
# Rows and columns of the gate statistics.
GATES = ("L/primary", "L/secondary", "L/input", "H/primary", "H/secondary")
GATE_STATISTICS = ("mean", "std", "low", "high", "contribution")


class Interval(NamedTuple):
    """The metrics between two log lines.

    metrics: by their names in the log. losses, norms: mean loss and gradient norm of each of the last steps,
    oldest first; for a skipped step at least one is not finite. skipped_in_a_row: number of skipped steps at
    the end.
    """

    metrics: dict[str, float]
    losses: list[float]
    norms: list[float]
    skipped_in_a_row: int


class Reading(NamedTuple):
    """The sums since the last reading.

    sums: over all ranks and all steps that were not skipped, including `grad_norm`. losses, norms: of each of
    the last steps, oldest first, including skipped ones; a loss is the sum over all ranks. in_a_row: number
    of skipped steps at the end.
    """

    steps: int
    skipped: int
    in_a_row: int
    sums: dict[str, float]
    losses: list[float]
    norms: list[float]


class Tally:
    """Sums of metrics, and the loss and gradient norm of each step, on the device.

    A step calls `begin`, `add` for each part of the batch, and `end`; none of them waits for the device.
    """

    def __init__(self, device: torch.device, steps: int) -> None:
        """steps: number of steps between two readings; the loss and norm of the last LONGEST are kept."""
        self._length = min(steps, LONGEST)
        self._names: list[str] = []
        self._step_sums: Tensor | None = None
        # This rank's sums; the norm is of the whole gradient, equal on all ranks.
        self._sums: Tensor | None = None
        self._loaded = False
        self._norm_sum = torch.zeros(1, dtype=torch.float32, device=device)
        # Ring buffers: step n since the last reading is at index n modulo the length.
        self._losses, self._norms = torch.zeros(2, self._length, dtype=torch.float32, device=device)
        self._slots = torch.arange(self._length, device=device)
        self._count, self._skipped, self._in_a_row = torch.zeros(3, 1, dtype=torch.int64, device=device)

    def begin(self) -> None:
        """Starts a step."""
        if self._step_sums is not None:
            self._step_sums.zero_()

    def add(self, sums: dict[str, Tensor]) -> None:
        """Adds the metric sums of a part, including `loss`; all parts have the same names."""
        vector = torch.stack([value.to(torch.float32) for value in sums.values()])
        if self._step_sums is None or self._names != list(sums):
            # A new stage may have other metrics; the earlier sums have been read.
            fits = self._loaded and self._sums is not None and self._sums.shape == vector.shape
            self._names, self._step_sums = list(sums), torch.zeros_like(vector)
            self._sums = self._sums if fits else torch.zeros_like(vector)
        self._step_sums.add_(vector)

    @property
    def loss(self) -> Tensor:
        """The loss of this step so far, summed over this rank's sequences: (1,)."""
        assert self._step_sums is not None, "no part of a step was added"
        index = self._names.index("loss")
        return self._step_sums[index : index + 1]

    @property
    def place(self) -> Tensor | None:
        """The tensor that steps add to; None before the first one."""
        return self._sums

    def keep(self) -> Callable[[], None]:
        """Saves all sums; returns a function that restores them, in place if possible."""
        fields = self._names, self._step_sums, self._sums, self._loaded
        tensors = [self._norm_sum, self._losses, self._norms, self._count, self._skipped, self._in_a_row]
        tensors += [] if self._sums is None else [self._sums]
        kept = [tensor.clone() for tensor in tensors]

        def put_back() -> None:
            for tensor, before in zip(tensors, kept, strict=True):
                tensor.copy_(before)
            if fields[2] is None and self._sums is not None:
                self._sums.zero_()
            elif self._sums is not fields[2]:
                self._names, self._step_sums, self._sums, self._loaded = fields

        return put_back

    def end(self, norm: Tensor, skip: Tensor) -> None:
        """Ends a step. norm: (), of the whole gradient. skip: () bool, whether the step is skipped."""
        assert self._step_sums is not None and self._sums is not None
        norm = norm.to(torch.float32).reshape(1)
        # A deterministic indexed write may wait for the device.
        here = self._slots == self._count % self._length
        self._losses.copy_(torch.where(here, self.loss, self._losses))
        self._norms.copy_(torch.where(here, norm, self._norms))
        self._sums.add_(torch.where(skip, 0, self._step_sums))
        self._norm_sum.add_(torch.where(skip, 0, norm))
        self._count += 1
        self._skipped += skip
        self._in_a_row.add_(1).mul_(skip)

    def read(self, world: World) -> Reading:
        """Reads and clears the sums of all ranks, which call it together. Waits for the device."""
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
        """The indices of the last steps in the ring buffers, oldest first."""
        steps = int(self._count.item())
        return self._slots.roll(-steps) if steps > self._length else self._slots[:steps]

    def state_dict(self, world: World) -> dict[str, Any]:
        """The sums of all ranks since the last reading, as tensors and numbers; all ranks call it
        together."""
        places = self._places()
        return {
            "sums": None if self._sums is None else world.all_gather(self._sums[None]),
            "losses": world.all_gather(self._losses[places][None]),
            "norm_sum": self._norm_sum,
            "norms": self._norms[places],
            "counts": torch.cat([self._count, self._skipped, self._in_a_row]).tolist(),
        }

    def load_state_dict(self, state: dict[str, Any], world: World) -> None:
        """Continues from a `state_dict`; if the number of ranks differs, rank 0 gets the sums of all."""

        def mine(gathered: Tensor) -> Tensor:
            if len(gathered) == world.size:
                return gathered[world.rank]
            return gathered.sum(dim=0) if world.is_main else torch.zeros_like(gathered[0])

        for counter, count in zip((self._count, self._skipped, self._in_a_row), state["counts"], strict=True):
            counter.fill_(count)
        gathered, self._loaded = state["sums"], True
        if self._sums is not None and (gathered is None or gathered.shape[1:] == self._sums.shape):
            # Write in place, because a captured step adds to this address.
            self._sums.copy_(torch.zeros_like(self._sums) if gathered is None else mine(gathered))
        elif gathered is not None:
            self._sums = mine(gathered).to(self._count.device, copy=True)
        self._norm_sum.copy_(state["norm_sum"])
        places = self._places()
        for target, kept in ((self._losses, mine(state["losses"])), (self._norms, state["norms"])):
            last = min(len(kept), len(places))
            target[places[len(places) - last :]] = kept[len(kept) - last :].to(target.device)


def means(sums: dict[str, float], sequences: float) -> dict[str, float]:
    """Means from sums: PER_HALTED over halted sequences, if there are any, and the others over `sequences`.

    A sum of squares `NAME_square` becomes the standard deviation `NAME_std`, around `NAME_mean`.
    """
    halted = sums["count"]
    found = {name: sums[name] / halted for name in PER_HALTED if halted}
    for name, value in sums.items():
        if name not in PER_HALTED and name != "count":
            found[name] = value / max(sequences, 1)
    for name in [name for name in found if name.endswith("_square")]:
        kind = name.removesuffix("_square")
        found[f"{kind}_std"] = math.sqrt(max(found.pop(name) - found[f"{kind}_mean"] ** 2, 0.0))
    return {"count": halted, **found}


def gate_metrics(table: Tensor) -> dict[str, float]:
    """The gate statistics (5, 5), rows as in GATES, by their names in the log."""
    return {
        f"gates/{gate}/{statistic}": value
        for gate, row in zip(GATES, table.tolist(), strict=True)
        for statistic, value in zip(GATE_STATISTICS, row, strict=True)
    }
