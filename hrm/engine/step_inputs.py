"""The inputs of a step from the host: one buffer at a fixed address, filled by one copy per step."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hrm.data.dataset import Batch
from hrm.model.act import Sequences

# Scalars in front of the data.
_NUMBERS = 4
# Alignment of each tensor in int32 words, 64 bytes, for vector loads in generated code. The scalars fit into
# the first 64 bytes, also as float64.
_ALIGNMENT = 16


@dataclass(frozen=True)
class _Slot:
    """A batch in transfer to a CUDA device: pinned on the host, then staged on the device."""

    host: Tensor
    staged: Tensor
    arrived: torch.cuda.Event
    taken: torch.cuda.Event


class Feed:
    """New sequences, minimum ACT steps and learning rates, at the addresses that a replayed program reads.

    fresh: inputs, labels (B, S), puzzle_identifiers (B,) and keys (B, key_words); min_halt_steps: (B,); all
    int32. lr, puzzle_emb_lr, gate_loss_scale, muon_lr: () in rate_dtype. On CUDA a batch is copied from
    pinned memory on a separate stream during the previous step; the host waits only if it is two batches
    ahead.
    """

    def __init__(
        self,
        rows: int,
        seq_len: int,
        device: torch.device,
        rate_dtype: torch.dtype = torch.float32,
        key_words: int = 0,
    ) -> None:
        self.rows, self.seq_len, self.key_words = rows, seq_len, key_words
        self._sizes = [rows * seq_len, rows * seq_len, rows, rows, rows * key_words]
        words = _ALIGNMENT + sum(map(_aligned, self._sizes))
        self._buffer = torch.zeros(words, dtype=torch.int32, device=device)
        numbers = self._buffer[:_ALIGNMENT].view(rate_dtype)[:_NUMBERS]
        self.lr, self.puzzle_emb_lr, self.gate_loss_scale, self.muon_lr = numbers
        inputs, labels, identifiers, self.min_halt_steps, keys = self._split(self._buffer)
        self.fresh = Sequences(inputs, labels, identifiers, keys)
        self._rate_dtype = rate_dtype
        self._slots: list[_Slot] = []
        self._turn = 0
        if device.type == "cuda":
            self._side = torch.cuda.Stream(device)
            for _ in range(2):
                staged = torch.empty_like(self._buffer)
                host = torch.zeros(self._buffer.shape, dtype=torch.int32, pin_memory=True)
                self._slots.append(_Slot(host, staged, torch.cuda.Event(), torch.cuda.Event()))
        # On a CPU the host writes to the buffer directly.
        self._host = self._buffer if device.type == "cpu" else torch.zeros_like(self._buffer, device="cpu")

    def push(
        self,
        batch: Batch,
        min_halt_steps: np.ndarray | int = 0,
        lr: float = 0.0,
        puzzle_emb_lr: float = 0.0,
        gate_loss_scale: float = 0.0,
        keys: np.ndarray | int = 0,
        muon_lr: float = 0.0,
    ) -> None:
        """Writes the values of the next step, ordered with the work of the current stream.

        batch: B rows of S cells. min_halt_steps: (B,), or one number for all. keys: (B, key_words) int32, see
        `Carry`; 0 is path 0 for every row, which is deterministic.
        """
        numbers = lr, puzzle_emb_lr, gate_loss_scale, muon_lr
        if not self._slots:
            self._write(self._host, batch, min_halt_steps, keys, numbers)
            if self._host is not self._buffer:
                self._buffer.copy_(self._host)
            return
        slot = self._slots[self._turn]
        self._turn = 1 - self._turn
        slot.arrived.synchronize()
        self._write(slot.host, batch, min_halt_steps, keys, numbers)
        with torch.cuda.stream(self._side):
            self._side.wait_event(slot.taken)
            slot.staged.copy_(slot.host, non_blocking=True)
            slot.arrived.record()
        current = torch.cuda.current_stream(self._buffer.device)
        current.wait_event(slot.arrived)
        self._buffer.copy_(slot.staged)
        slot.taken.record(current)

    def _write(
        self,
        host: Tensor,
        batch: Batch,
        min_halt_steps: np.ndarray | int,
        keys: np.ndarray | int,
        numbers: tuple[float, ...],
    ) -> None:
        host[:_ALIGNMENT].view(self._rate_dtype)[:_NUMBERS].numpy()[:] = numbers
        values = (batch.inputs, batch.labels, batch.puzzle_identifiers, min_halt_steps, keys)
        for target, value in zip(self._split(host), values, strict=True):
            np.copyto(target.numpy(), value)

    def _split(self, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Views of a buffer: inputs, labels, puzzle identifiers, minimum steps and keys."""
        padded = buffer[_ALIGNMENT:].split([_aligned(size) for size in self._sizes])
        inputs, labels, identifiers, steps, keys = (
            part[:size] for part, size in zip(padded, self._sizes, strict=True)
        )
        cells = (part.view(self.rows, -1) for part in (inputs, labels))
        return *cells, identifiers, steps, keys.view(self.rows, self.key_words)


def _aligned(words: int) -> int:
    """Rounds a number of words up to the next boundary."""
    return -(-words // _ALIGNMENT) * _ALIGNMENT
