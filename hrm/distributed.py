"""The ranks of a run. torchrun starts, ends and restarts them; torch.distributed connects them.

A process without torchrun is rank 0 of 1 and uses neither.
"""

import faulthandler
import hashlib
import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from hrm.common.errors import ENDING, RankLost, UserError
from hrm.common.versions import differences

# Maximum seconds between the starts of ranks: importing torch from a slow disk takes long.
JOINING = 120.0
# Seconds within which a waiting rank answers the roll call after a collective timed out.
ROLL_CALL = 8.0
# Seconds after `rank_timeout` until a stuck rank ends itself; its peers report it before.
SPARE = 40.0
# Seconds that a rank may take to end after its peers are lost, while it writes its last checkpoint.
LAST = 60.0
REMEDY = "the same command continues from the last checkpoint"
# PyTorch 2.13 renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Place(NamedTuple):
    """A process's rank among `size`, and its rank on its node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def place() -> Place:
    """This process's ranks from torchrun's environment. Raises UserError for impossible values."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return Place()
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    values = [os.environ.get(name, "") for name in names]
    size, rank, local_rank = (int(value) if value.isdecimal() else -1 for value in values[:3])
    if not (0 <= rank < size and local_rank >= 0 and all(values)):
        given = " ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
        raise UserError(
            f"{given}: not as torchrun sets them; start the ranks with torchrun, or unset WORLD_SIZE for a "
            "single one"
        )
    return Place(rank, size, local_rank)


@dataclass
class _Peers:
    """This rank's connections to the others: CPU-side gloo groups, and the store of this attempt.

    side: for codes and barriers. roll_call: used only after another group failed, because a failure closes
    that group's connections. names: the number, host and process of each rank.
    """

    rank: int
    timeout: float
    store: dist.Store
    side: dist.ProcessGroup
    roll_call: dist.ProcessGroup
    names: list[str]
    sent: tuple[dist.Work, Tensor] | None = None
    checks: int = 0
    postponed: float = 0.0

    @contextmanager
    def collective(self) -> Iterator[None]:
        """A context around a collective. If the collective fails because of a missing rank, it raises
        RankLost."""
        # torchrun cannot end a stuck rank that is alone on its node, so the rank ends itself with a
        # traceback.
        if time.monotonic() - self.postponed > 1:
            self.postponed = time.monotonic()
            faulthandler.dump_traceback_later(self.timeout + SPARE, exit=True)
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # Nothing is left to save: let torchrun's signal end this rank immediately.
            with suppress(ValueError):
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            reason = self.told() or self._missing(str(error))
            if reason is None:
                raise
            reason = self.tell(reason)
            # If the missing rank ended on this node, torchrun prints the cause and ends this rank during this
            # wait.
            time.sleep(ENDING)
            raise RankLost(f"{reason}; {REMEDY}") from None

    def tell(self, reason: str) -> str:
        """Publishes why the job ends and gives this process LAST seconds; returns the first published
        reason."""
        faulthandler.dump_traceback_later(LAST, exit=True)
        with suppress(RuntimeError):
            return self.store.compare_set("reason", "", reason).decode()
        return reason

    def told(self, seconds: float = 0.0) -> str | None:
        """The published reason; None if none appears within `seconds`."""
        deadline = time.monotonic() + seconds
        with suppress(RuntimeError):
            while not (told := self.store.check(["reason"])) and time.monotonic() < deadline:
                time.sleep(0.1)
            return self.store.get("reason").decode() if told else None
        return None

    def _missing(self, error: str) -> str | None:
        """The ranks whose connections are closed, or a rank that does not answer; None if all answer."""
        others = (rank for rank in range(len(self.names)) if rank != self.rank)
        closed = [self.names[rank] for rank in others if not self._connected(rank)]
        if closed:
            return f"{', '.join(closed)}: connection closed, the process has ended"
        missing = re.search(_MISSING, error)
        if missing is None:
            try:
                dist.monitored_barrier(self.roll_call, timedelta(seconds=ROLL_CALL))
            except RuntimeError as silence:
                missing = re.search(_MISSING, str(silence))
                # Rank 0 collects the answers; if it reports nothing, rank 0 itself is stuck.
                if missing is None and (told := self.told(ENDING)):
                    return told
            else:
                return None
        name = self.names[int(missing[1]) if missing else 0]
        return f"rank_timeout={self.timeout:g}: no response from {name}"

    def _connected(self, rank: int) -> bool:
        try:
            # Posting a receive fails on a closed connection; no message has this tag.
            dist.irecv(torch.empty(1), rank, self.roll_call, tag=1 << 20)
        except RuntimeError:
            return False
        return True

    def answer(self) -> int:
        """The highest code of the previous call, 0 if there was none."""
        sent, self.sent = self.sent, None
        if sent is None:
            return 0
        sent[0].wait()
        return int(sent[1])


# monitored_barrier's error on rank 0.
_MISSING = r"Rank (\d+) failed to pass monitoredBarrier"


@dataclass(frozen=True)
class World:
    """This process among the ranks that share every global batch: its rank is in 0..size-1.

    All ranks call every method except `rows` together, from their main threads. If a rank is missing, the
    call raises RankLost with its number on the others.
    """

    rank: int = 0
    size: int = 1
    _peers: _Peers | None = None

    @property
    def is_main(self) -> bool:
        """Whether this rank prints, logs and saves."""
        return self.rank == 0

    def rows(self, global_rows: int) -> slice:
        """This rank's part of a global batch's rows."""
        local = global_rows // self.size
        return slice(self.rank * local, (self.rank + 1) * local)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the ranks, in place."""
        if self._peers:
            with self._peers.collective():
                dist.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors of one shape (b, ...), in rank order: (size * b, ...)."""
        if not self._peers:
            return tensor
        wire = _on_the_wire(tensor)
        gathered = wire.new_empty(self.size * len(wire), *wire.shape[1:])
        with self._peers.collective():
            _all_gather(gathered, wire)
        return gathered.to(tensor.dtype)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Broadcasts rank 0's tensor to every rank, in place."""
        if not self._peers:
            return tensor
        wire = _on_the_wire(tensor.detach())
        with self._peers.collective():
            dist.broadcast(wire, 0)
        with torch.no_grad():
            tensor.copy_(wire)
        return tensor

    def barrier(self) -> None:
        """Waits on the CPU for every rank; rank 0 finds out which rank is missing."""
        if self._peers:
            with self._peers.collective():
                # Rank 0 times out before the others, which could not identify the rank.
                dist.monitored_barrier(self._peers.side, timedelta(seconds=0.9 * self._peers.timeout))

    def check_equal(self, what: Mapping[str, str]) -> None:
        """Raises UserError on every rank unless all pass the same names with the same values.

        The message shortens long values and lists the first few of many names that differ.
        """
        if not self._peers:
            return
        # Use JSON through the store: all_gather_object would unpickle data from peers.
        store, self._peers.checks = self._peers.store, self._peers.checks + 1
        key = f"check/{self._peers.checks}"
        store.set(f"{key}/{self.rank}", json.dumps(dict(what)))
        self.barrier()
        given = [json.loads(store.get(f"{key}/{rank}")) for rank in range(self.size)]
        if found := differences(given):
            raise UserError(
                f"the ranks differ in {found}: start all of them from the same code, configuration, data and "
                "output_dir"
            )

    def highest_now(self, code: int) -> int:
        """The highest code (0 or more) that any rank passes to this call; all ranks wait for each other."""
        if not self._peers:
            return code
        value = torch.tensor([code])
        with self._peers.collective():
            dist.all_reduce(value, dist.ReduceOp.MAX, self._peers.side)
        return int(value)

    def highest(self, code: int) -> int:
        """The highest code (0 or more) that any rank passed to its previous call, equal on every rank.

        Called once per step, so that ranks agree where to stop. The result is one call late, and 0 at the
        first call, so that no rank waits for the exchange; a single rank gets its own code without delay.
        """
        peers = self._peers
        if not peers:
            return code
        with peers.collective():
            answer, value = peers.answer(), torch.tensor([code])
            peers.sent = dist.all_reduce(value, dist.ReduceOp.MAX, peers.side, async_op=True), value
        return answer


@contextmanager
def joined(
    device: str, global_batch_size: int, rank_timeout: float = 1800.0
) -> Iterator[tuple[World, torch.device]]:
    """Joins torchrun's ranks, if any, and selects this rank's device.

    device: cpu, cuda, cuda:N or mps. Under torchrun each rank uses the GPU of its LOCAL_RANK and communicates
    by nccl, on a CPU by gloo. rank_timeout: seconds that ranks wait in a collective for a missing rank. If
    the block raises, the reason is published to the other ranks. Raises UserError for a device or a batch
    that the ranks cannot share, and for missing ranks.
    """
    here = place()
    if here.size == 1:
        alone = torch.device(device)
        if alone.index is not None and alone.type == "cuda":
            torch.cuda.set_device(alone)
        yield World(), alone
        return
    # Check before the ranks connect: later, a rank that stops would leave the others waiting.
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
    target = torch.device("cuda", here.local_rank) if device == "cuda" else torch.device("cpu")
    peers = _join(here, target, rank_timeout)
    try:
        yield World(here.rank, here.size, peers), target
    except BaseException as error:
        text = (str(error).splitlines() or [""])[0]
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        peers.tell(f"{peers.names[here.rank]} failed: {kind}{text}")
        raise
    with peers.collective():
        peers.answer()
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


def _join(here: Place, target: torch.device, rank_timeout: float) -> _Peers:
    """Connects this rank to the others."""
    timeout, joining = timedelta(seconds=rank_timeout), timedelta(seconds=JOINING)
    try:
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=joining)))
    except (RuntimeError, ValueError) as error:
        address = " ".join(f"{name}={os.environ[name]}" for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise UserError(
            f"{address}: the ranks cannot connect there ({_first_line(error)}); start them with torchrun"
        ) from None
    store = dist.PrefixStore(_attempt(store, here), store)
    is_gpu = target.type == "cuda"
    if is_gpu:
        torch.cuda.set_device(target)
    try:
        dist.init_process_group(
            "nccl" if is_gpu else "gloo",
            store=store,
            rank=here.rank,
            world_size=here.size,
            # The CPU-side groups time out first and report the rank, which NCCL's watchdog cannot.
            timeout=timeout + timedelta(seconds=SPARE) if is_gpu else timeout,
            device_id=target if is_gpu else None,
        )
        side = dist.new_group(timeout=timeout, backend="gloo")
        roll_call = dist.new_group(timeout=timedelta(seconds=1.5 * ROLL_CALL), backend="gloo")
        name = f"rank {here.rank} (host {socket.gethostname()}, pid {os.getpid()})"
        store.set(f"name/{here.rank}", name)
        names = [store.get(f"name/{rank}").decode() for rank in range(here.size)]
    except RuntimeError as error:
        raise UserError(
            f"the ranks cannot connect ({_first_line(error)}): set the network interface, as in "
            "GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0"
        ) from None
    return _Peers(here.rank, rank_timeout, store, side, roll_call, names)


def _attempt(store: dist.Store, here: Place) -> str:
    """The prefix of this attempt's keys in the store; every rank calls it once.

    The store and its keys outlive ranks that torchrun restarts, and torchrun's restart count differs between
    nodes. So rank 0 draws a name and sends it to each rank that asks with its own token, until every rank has
    confirmed. Raises UserError for missing ranks.
    """
    token, deadline = uuid4().hex, time.monotonic() + JOINING
    if here.rank > 0:
        store.set(f"asks/{here.rank}", token)
        try:
            store.wait([f"answer/{token}"], timedelta(seconds=JOINING))
        except RuntimeError:
            raise _absent([0], here.size) from None
        name = store.get(f"answer/{token}").decode()
        store.set(f"{name}/joined/{here.rank}", "")
        return name
    absent, asked = list(range(1, here.size)), set[bytes]()
    while absent:
        if time.monotonic() > deadline:
            raise _absent(absent, here.size)
        for rank in absent:
            if store.check([f"asks/{rank}"]) and (asks := store.get(f"asks/{rank}")) not in asked:
                asked.add(asks)
                store.set(f"answer/{asks.decode()}", token)
        time.sleep(0.05)
        absent = [rank for rank in absent if not store.check([f"{token}/joined/{rank}"])]
    return token


def _absent(ranks: list[int], size: int) -> UserError:
    return UserError(
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} of {size} did not join within "
        f"{JOINING:g} s: start all of them, and look for their own errors"
    )


def digest(tensor: Tensor) -> str:
    """The first 16 hexadecimal digits of the sha256 of a tensor's bytes, for `World.check_equal`."""
    flat = tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu()
    return hashlib.sha256(flat.numpy().data).hexdigest()[:16]


def _on_the_wire(tensor: Tensor) -> Tensor:
    # gloo has no bool.
    return tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
