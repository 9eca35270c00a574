"""The ranks that train one run together, as torchrun starts them; one rank needs nothing of it."""

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist
from torch import Tensor

from hrm.errors import UserError
from hrm.heartbeat import JOINING, SILENCE, Heartbeat, meet
from hrm.ranks import place

# The longest wait in a collective. One rank may compile for minutes while the others wait for it; a rank that
# is gone is found by its heartbeat, long before.
PATIENCE = timedelta(hours=2)
# PyTorch 2.13 renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_heartbeat: Heartbeat | None = None


@dataclass(frozen=True)
class World:
    """This process among those that share every global batch: its rank in 0..size-1.

    Every method but `rows` and `is_main` is for all ranks to call together; where one of them is gone, it
    raises UserError naming it.
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
        """Raises UserError on every rank unless all gave the same names with the same (short) values."""
        if self.size == 1:
            return
        given: list[dict[str, str]] = [{}] * self.size
        with _together():
            dist.all_gather_object(given, dict(what))
        names = dict.fromkeys(name for values in given for name in values)
        found = [
            f"{name} ({difference})"
            for name in names
            if (difference := _difference([values.get(name, "nothing") for values in given]))
        ]
        if found:
            raise UserError(
                f"the ranks differ in {', '.join(found)}: start all of them from the same code, "
                "configuration, data and output_dir"
            )


def _difference(values: list[str]) -> str:
    """Which ranks hold which value, the commonest last; empty if all hold the same."""
    holders: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        holders.setdefault(value, []).append(rank)
    if len(holders) == 1:
        return ""
    groups = sorted(holders.items(), key=lambda group: len(group[1]))
    (common, ranks), rare = groups[-1], groups[:-1]
    told = [f"{_ranks(held)} {value}" for value, held in rare]
    others = "the others have" if len(ranks) > 1 else _ranks(ranks)
    return f"{', '.join(told)}, {others} {common}"


def _ranks(ranks: list[int]) -> str:
    many = len(ranks) > 1
    return f"rank{'s' if many else ''} {', '.join(map(str, ranks))} {'have' if many else 'has'}"


def _on_the_wire(tensor: Tensor) -> Tensor:
    # gloo knows no bool
    return tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous()


@contextmanager
def _together() -> Iterator[None]:
    """Around a collective: one that breaks because a rank is gone raises UserError naming the rank."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        reason = _heartbeat.why_broken() if _heartbeat else None
        if reason is None:
            raise
        raise UserError(reason) from None


def digest(tensor: Tensor) -> str:
    """16 hexadecimal digits of the sha256 of a tensor's bytes, for `World.check_equal`."""
    flat = tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu()
    return hashlib.sha256(flat.numpy().data).hexdigest()[:16]


def versions() -> dict[str, str]:
    """What this rank computes with, for `World.check_equal`."""
    return {"Python": platform.python_version(), "torch": torch.__version__, "triton": _version("triton")}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


@contextmanager
def joined(
    device: str, global_batch_size: int, silence: float = SILENCE
) -> Iterator[tuple[World, torch.device]]:
    """`start`, then `stop` when the block ends: where it raises, the other ranks are told why."""
    try:
        yield start(device, global_batch_size, silence)
    except BaseException as error:
        stop(error)
        raise
    stop()


def start(device: str, global_batch_size: int, silence: float = SILENCE) -> tuple[World, torch.device]:
    """Joins the ranks that torchrun started, if it did, and picks this rank's device.

    device: cpu, cuda, cuda:N or mps. Under torchrun each rank takes the GPU of its LOCAL_RANK and they talk
    by nccl, on a CPU by gloo. silence: seconds after which a rank without a sign of life ends the job.
    Raises UserError for a device or a batch that the ranks cannot share, and for ranks that do not come.
    """
    global _heartbeat
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

    _heartbeat = Heartbeat(connect, f"{host}:{port}", here, silence)
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
            timeout=PATIENCE,
            device_id=target if device == "cuda" else None,
        )
    return World(here.rank, here.size), target


def stop(error: BaseException | None = None) -> None:
    """Leaves the ranks again; error: what ended this rank, for the others to name."""
    global _heartbeat
    if _heartbeat is None:
        return
    if error is None:
        _heartbeat.leave()
        dist.destroy_process_group()
    else:
        text = (str(error).splitlines() or [""])[0]
        _heartbeat.leave(text if isinstance(error, UserError) else f"{type(error).__name__}: {text}")
    _heartbeat = None
