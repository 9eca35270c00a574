"""Runs the engine's training step on meta tensors, with the operations that a device would run.

Shapes and the choice of implementations determine the memory and the launches of a step, so finding them
needs neither the device nor much time. A dry run is eager.
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

# The dispatch key of a custom operation's implementation, which its fake hides on meta, and of PyTorch
# operations with their own kernel.
_CPU = torch._C.DispatchKey.CPU
_IMPLEMENTATION = torch._C.DispatchKeySet(_CPU)
# On meta, backends that need a device are replaced by a backend that allocates the same.
_ATTENTION = {"flash": "sdpa", "triton": "auto"}


class Observer(TorchDispatchMode):
    """Receives every operation of a dry run, including those inside this project's kernels.

    regions: the open named ranges of the step, outermost first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.regions: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            if func.namespace == "hrm_kernels":
                # Run the real implementation: the fake would hide workspaces and launches.
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
        """Called after each ATen operation."""

    def launched(self, launch: Launch) -> None:
        """Called at each launch of one of this project's kernels."""

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        self.regions.append(name)
        try:
            yield
        finally:
            self.regions.pop()


class _LibraryAttention(TorchFunctionMode):
    """PyTorch's choice of attention on a device; on meta it would choose the backend that stores all
    scores."""

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
    """Within this context, operations on meta tensors run as on `device` and are reported to the observer."""
    with explained(device), _LibraryAttention(device), opened_by(observer.region), observer:
        yield


class Rehearsal:
    """An engine on meta tensors that represent tensors on `device`, with an observer of its operations.

    It covers only the computation of a step: no other ranks, evaluation or copies from the host.
    """

    def __init__(self, config: Config, metadata: Metadata, device: torch.device, observer: Observer) -> None:
        """config: global_batch_size is that of this one device; dtype=auto resolves as on the device."""
        dtype: Any = str(resolve_dtype(config, device)).removeprefix("torch.")
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
        """Runs one training step."""
        with rehearsed(self.device, self.observer):
            self._engine.train_step(self._batch)
