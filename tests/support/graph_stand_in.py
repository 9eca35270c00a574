"""A CUDA graph's stand-in on the CPU: records the operations of a body with the tensors they touched.

Replaying runs those operations again on the same memory, without the body's Python: whatever the body took
from the host (a number, a shape, a branch, a tensor made from NumPy) stays as it was when it was recorded,
and a value that it read back to the host is refused. So a body that replays rightly here depends on its
tensors alone, which is what a capture on CUDA asks of it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

Body = Callable[[], None]
# What waits for the device, or has a shape that depends on values.
REFUSED = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::masked_select",
    "aten::equal",
    "aten::is_nonzero",
}


class Recorder(TorchDispatchMode):
    """Collects (operation, arguments, results) of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[Any], Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split(".")[0] in REFUSED:
            raise RuntimeError(f"{func.name()} would make a capture fail")
        out = func(*args, **(kwargs or {}))
        leaves, spec = tree_flatten((args, kwargs or {}))
        self.calls.append((func, leaves, spec, tree_flatten(out)[0]))
        return out

    def replay(self) -> None:
        """Runs every call again, each result into the memory of the recorded one."""
        with torch.no_grad():
            for func, leaves, spec, outputs in self.calls:
                args, kwargs = tree_unflatten(leaves, spec)
                again = tree_flatten(func(*args, **kwargs))[0]
                for old, new in zip(outputs, again, strict=True):
                    # A view, or what an operation in place returns, is the memory itself.
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def capture(body: Body, device: torch.device) -> Body:
    """In place of `hrm.engine.cuda_graph.capture`; what it returns does nothing at its first call.

    For recording here runs the body, and a capture does not: the first replay is the run that it was.
    """
    recorder, recorded = Recorder(), False
    with recorder:
        body()

    def replay() -> None:
        nonlocal recorded
        if recorded:
            recorder.replay()
        recorded = True

    return replay
