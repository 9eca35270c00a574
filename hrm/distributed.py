"""The ranks that train one run together, as torchrun starts them; one rank needs nothing of it."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hrm.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among those that share every global batch: its rank in 0..size-1."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that prints, logs and saves."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors of one shape (b, ...), in rank order: (size * b, ...)."""
        if self.size == 1:
            return tensor
        # gloo knows no bool
        wire = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous()
        gathered = wire.new_empty(self.size * len(wire), *wire.shape[1:])
        dist.all_gather_into_tensor(gathered, wire)
        return gathered.to(tensor.dtype)

    def rows(self, global_rows: int) -> slice:
        """This rank's part of a global batch's rows."""
        local = global_rows // self.size
        return slice(self.rank * local, (self.rank + 1) * local)

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.size > 1:
            dist.barrier()


def start(device: str, global_batch_size: int) -> tuple[World, torch.device]:
    """Joins the ranks that torchrun started, if it did, and picks this rank's device.

    device: cpu, cuda, cuda:N or mps. Under torchrun each rank takes the GPU of its LOCAL_RANK and they talk
    by nccl, on a CPU by gloo. Raises UserError for a device or a batch that the ranks cannot share.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(), torch.device(device)
    # Before the ranks meet: afterwards one that stops leaves the others waiting.
    if global_batch_size % size:
        raise UserError(
            f"global_batch_size={global_batch_size} cannot be shared by {size} ranks: it must be a multiple"
        )
    if device not in ("cpu", "cuda"):
        raise UserError(f"device={device} under torchrun: ranks need device=cuda or device=cpu")
    if device == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(local)
        dist.init_process_group("nccl", device_id=torch.device("cuda", local))
        return World(dist.get_rank(), size), torch.device("cuda", local)
    dist.init_process_group("gloo")
    return World(dist.get_rank(), size), torch.device("cpu")


def stop() -> None:
    """Leaves the ranks again."""
    if dist.is_initialized():
        dist.destroy_process_group()
