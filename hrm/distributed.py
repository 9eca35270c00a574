"""The ranks that train one run together, as torchrun starts them; one rank needs nothing of it."""

import hashlib
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from hrm.agreement import Agreement
from hrm.common.errors import UserError
from hrm.heartbeat import JOINING, PATIENCE, SILENCE, Heartbeat, meet
from hrm.ranks import place

# How much longer than the ranks' patience a collective waits by itself: the heartbeats tell who is missing.
BEYOND = 300.0
# Names of what differs and digits of a value that are told.
TOLD, DIGITS = 5, 60
# PyTorch 2.13 renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_heartbeat: Heartbeat | None = None
_agreement: Agreement | None = None


@dataclass(frozen=True)
class World:
    """This process among those that share every global batch: its rank in 0..size-1.

    Every method but `rows`, `is_main` and `doing` is for all ranks to call together, in their main threads;
    where one of them is gone, it raises UserError naming it.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that prints, logs and saves."""
        return self.rank == 0

    def rows(self, global_rows: int) -> slice:
        """This rank's part of a global batch's rows."""
        local = global_rows // self.size
        return slice(self.rank * local, (self.rank + 1) * local)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the ranks, in place."""
        if self.size > 1:
            with _together():
                dist.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors of one shape (b, ...), in rank order: (size * b, ...)."""
        if self.size == 1:
            return tensor
        wire = _on_the_wire(tensor)
        gathered = wire.new_empty(self.size * len(wire), *wire.shape[1:])
        with _together():
            _all_gather(gathered, wire)
        return gathered.to(tensor.dtype)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Gives rank 0's tensor to every rank, in place."""
        if self.size == 1:
            return tensor
        wire = _on_the_wire(tensor.detach())
        with _together():
            dist.broadcast(wire, 0)
        with torch.no_grad():
            tensor.copy_(wire)
        return tensor

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.size > 1:
            with _together():
                dist.barrier()

    def check_equal(self, what: Mapping[str, str]) -> None:
        """Raises UserError on every rank unless all gave the same names with the same values.

        A long value is told by its first digits; of many names that differ the first few are told.
        """
        if _agreement is None:
            return
        with _together():
            given: list[dict[str, str]] = _agreement.all_gather(dict(what))
        names = dict.fromkeys(name for values in given for name in values)
        found = [
            f"{name} ({difference})"
            for name in names
            if (difference := _difference([values.get(name, "nothing") for values in given]))
        ]
        if found:
            more = f" and {len(found) - TOLD} more" if len(found) > TOLD else ""
            raise UserError(
                f"the ranks differ in {', '.join(found[:TOLD])}{more}: start all of them from the same code, "
                "configuration, data and output_dir"
            )

    def highest(self, code: int) -> int:
        """The highest code (0 or more) that any rank gave at its previous call: the same on every rank.

        Once a step, so that ranks agree where to stop: the answer is one call late, and 0 at the first, for
        nobody to wait while it travels. A rank alone is given its own code at once. Every rank must have made
        as many calls when it leaves the ranks.
        """
        if _agreement is None:
            return code
        with _together():
            return _agreement.highest(code)

    def stragglers(self, seconds: float) -> str | None:
        """A line that names ranks which have been slow for some calls in a row, each once; else None.

        seconds: this rank's own time for a step, without what it waited for others.
        """
        if _agreement is None:
            return None
        with _together():
            return _agreement.stragglers(seconds)

    def doing(self, what: str) -> None:
        """Notes what this rank is about to do ("step 120", "saving"), for the others to read if it lasts."""
        if _heartbeat is not None:
            _heartbeat.doing(what)


def _difference(values: list[str]) -> str:
    """Which ranks hold which value, the commonest last; empty if all hold the same."""
    holders: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        holders.setdefault(value, []).append(rank)
    if len(holders) == 1:
        return ""
    groups = sorted(((_short(value), ranks) for value, ranks in holders.items()), key=lambda g: len(g[1]))
    (common, ranks), rare = groups[-1], groups[:-1]
    told = [f"{_ranks(held)} {value}" for value, held in rare]
    others = "the others have" if len(ranks) > 1 else _ranks(ranks)
    return f"{', '.join(told)}, {others} {common}"


def _ranks(ranks: list[int]) -> str:
    many = len(ranks) > 1
    return f"rank{'s' if many else ''} {', '.join(map(str, ranks))} {'have' if many else 'has'}"


def _short(value: str) -> str:
    if len(value) <= DIGITS:
        return value
    # Long values that begin alike are told apart.
    return f"{value[: DIGITS - 12]}… ({hashlib.sha256(value.encode()).hexdigest()[:8]})"


def _on_the_wire(tensor: Tensor) -> Tensor:
    # gloo knows no bool
    return tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous()


@contextmanager
def _together() -> Iterator[None]:
    """Around a collective: one that breaks because a rank is gone raises UserError naming the rank."""
    try:
        with nullcontext() if _heartbeat is None else _heartbeat.waiting():
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        # There is nothing left to save: torchrun's signal ends this rank at once.
        with suppress(ValueError):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        reason = _heartbeat.why_broken() if _heartbeat else None
        if reason is None:
            raise
        raise UserError(reason) from None


def digest(tensor: Tensor) -> str:
    """16 hexadecimal digits of the sha256 of a tensor's bytes, for `World.check_equal`."""
    flat = tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu()
    return hashlib.sha256(flat.numpy().data).hexdigest()[:16]


@contextmanager
def joined(
    device: str, global_batch_size: int, rank_timeout: float = PATIENCE, silence: float = SILENCE
) -> Iterator[tuple[World, torch.device]]:
    """`start`, then `stop` when the block ends: where it raises, the other ranks are told why."""
    try:
        yield start(device, global_batch_size, rank_timeout, silence)
    except BaseException as error:
        stop(error)
        raise
    stop()


def start(
    device: str, global_batch_size: int, rank_timeout: float = PATIENCE, silence: float = SILENCE
) -> tuple[World, torch.device]:
    """Joins the ranks that torchrun started, if it did, and picks this rank's device.

    device: cpu, cuda, cuda:N or mps. Under torchrun each rank takes the GPU of its LOCAL_RANK and they talk
    by nccl, on a CPU by gloo. rank_timeout: seconds that ranks wait in a collective for one that lives but
    does not come; silence: seconds after which a rank without a sign of life ends the job.
    Raises UserError for a device or a batch that the ranks cannot share, and for ranks that do not come.
    """
    global _heartbeat, _agreement
    here = place()
    if here.size == 1:
        alone = torch.device(device)
        if alone.index is not None and alone.type == "cuda":
            torch.cuda.set_device(alone)
        return World(), alone
    # Before the ranks meet: afterwards one that stops leaves the others waiting.
    if global_batch_size % here.size:
        raise UserError(
            f"global_batch_size={global_batch_size} cannot be shared by {here.size} ranks: it must be a "
            "multiple"
        )
    if device not in ("cpu", "cuda"):
        raise UserError(f"device={device} under torchrun: ranks need device=cuda or device=cpu")
    if device == "cuda" and here.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"device=cuda: LOCAL_RANK={here.local_rank} on a machine with {torch.cuda.device_count()} GPUs: "
            "lower torchrun's --nproc_per_node"
        )
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    waiting = timedelta(seconds=JOINING)
    try:
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=waiting)))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"MASTER_ADDR={host} MASTER_PORT={port}: the ranks cannot meet there ({reason}); start them with "
            "torchrun"
        ) from None
    attempt = meet(store, here)

    def connect() -> dist.Store:
        return dist.PrefixStore(attempt, dist.TCPStore(host, int(port), timeout=waiting))

    _heartbeat = Heartbeat(connect, f"{host}:{port}", here, silence, rank_timeout)
    patience = timedelta(seconds=rank_timeout + silence + BEYOND)
    store, target, backend = dist.PrefixStore(attempt, store), torch.device("cpu"), "gloo"
    if device == "cuda":
        target, backend = torch.device("cuda", here.local_rank), "nccl"
        torch.cuda.set_device(target)
    with _together():
        dist.init_process_group(
            backend,
            store=store,
            rank=here.rank,
            world_size=here.size,
            timeout=patience,
            device_id=target if device == "cuda" else None,
        )
    _agreement = Agreement(_processors(patience))
    return World(here.rank, here.size), target


def _processors(patience: timedelta) -> dist.ProcessGroup:
    """A gloo group of all ranks, whose devices may talk by nccl."""
    try:
        with _together():
            return dist.new_group(timeout=patience, backend="gloo")
    except RuntimeError as error:
        raise UserError(
            f"the ranks' processors cannot connect ({str(error).splitlines()[0][:200]}): name the network "
            "between the machines, as in GLOO_SOCKET_IFNAME=eth0"
        ) from None


def stop(error: BaseException | None = None) -> None:
    """Leaves the ranks again; error: what ended this rank, for the others to name."""
    global _heartbeat, _agreement
    if _heartbeat is None:
        return
    if error is None:
        if _agreement is not None:
            with _together():
                _agreement.finish()
        _heartbeat.leave()
        dist.destroy_process_group()
    else:
        text = (str(error).splitlines() or [""])[0]
        _heartbeat.leave(text if isinstance(error, UserError) else f"{type(error).__name__}: {text}")
    _heartbeat = _agreement = None
