"""A training step rehearsed: the engine's own, on tensors without data, by the operations a device would run.

What a step takes follows from shapes and from the implementations that operations choose, so neither the
device nor time is needed to know it. A rehearsal goes launch by launch, as mode=eager does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hrm.common.regions import opened_by
from hrm.config.load import Config
from hrm.data.dataset import Batch
from hrm.data.format import Metadata
from hrm.engine.engine import Engine
from hrm.engine.modes import resolve_dtype
from kernels.backend import Launch, explained, recorded

# Where the implementation of a custom operation is found, past the fake that stands in for it on meta, and
# which of PyTorch's operations are kernels of their own.
_CPU = torch._C.DispatchKey.CPU
_IMPLEMENTATION = torch._C.DispatchKeySet(_CPU)
# A library's attention takes what PyTorch's takes, and the named kernel is the one that auto would choose.
_ATTENTION = {"flash": "sdpa", "triton": "auto"}


class Observer(TorchDispatchMode):
    """Sees every operation of a rehearsal, those inside this project's kernels too.

    regions: the named ranges of the step that are open, outermost first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.regions: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            if func.namespace == "hrm_kernels":
                # Not its fake: what it allocates beside its outputs is to be seen, and what it launches.
                with recorded() as launches:
                    out = func.redispatch(_IMPLEMENTATION, *args, **kwargs)
                for launch in launches:
                    self.launched(launch)
                return out
            composed = not func.has_kernel_for_dispatch_key(_CPU)
            if composed and (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        self.called(func, args, kwargs, out)
        return out

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """After each ATen operation."""

    def launched(self, launch: Launch) -> None:
        """At each launch of one of this project's kernels."""

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        self.regions.append(name)
        try:
            yield
        finally:
            self.regions.pop()


class _LibraryAttention(TorchFunctionMode):
    """The attention that PyTorch takes on a device; without data it would take the one that keeps scores."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        if self.device.type == "cpu":
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        if args[0].dtype.itemsize == 2:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        keeps_sums = torch.is_grad_enabled()
        return torch.ops.aten._scaled_dot_product_efficient_attention(*args, None, keeps_sums)[0]


@contextmanager
def rehearsed(device: torch.device, observer: Observer) -> Iterator[None]:
    """What runs on tensors without data runs as it would on `device`, watched by the observer."""
    with explained(device), _LibraryAttention(device), opened_by(observer.region), observer:
        yield


class Rehearsal:
    """An engine on tensors without data that stand for tensors on `device`, watched by an observer.

    Only what the step computes is there: no other rank, no evaluation, no copy on its way from the host.
    """

    def __init__(self, config: Config, metadata: Metadata, device: torch.device, observer: Observer) -> None:
        """config: global_batch_size is this one device's; dtype=auto is what it stands for there."""
        dtype: Any = str(resolve_dtype(config.dtype, device)).removeprefix("torch.")
        backend: Any = _ATTENTION.get(config.attention.backend, config.attention.backend)
        attention = replace(config.attention, backend=backend)
        config = replace(config, mode="eager", dtype=dtype, attention=attention)
        self.device, self.observer = device, observer
        rows = config.global_batch_size
        cells = np.zeros((rows, metadata.seq_len), dtype=np.int32)
        self._batch = Batch(cells, cells, np.zeros(rows, dtype=np.int32))
        with rehearsed(device, observer), torch.device("meta"):
            self._engine = Engine(config, metadata, total_steps=1, device="meta")

    def step(self) -> None:
        """One training step."""
        with rehearsed(self.device, self.observer):
            self._engine.train_step(self._batch)
