"""A stand-in for a CUDA graph on the CPU: records the operations of a function with their tensors.

Replaying runs these operations again on the same memory, without the function's Python. Host values (numbers,
shapes, branches, tensors from NumPy) keep their recorded values, and reading a value on the host is an error.
So a function that replays correctly here depends only on its tensors, as a CUDA capture requires.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

Body = Callable[[], None]
# Operations that wait for the device, or have a shape that depends on values.
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
    """Records (operation, arguments, results) of every call."""

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
        """Runs every call again, and writes each result to the memory of the recorded result."""
        with torch.no_grad():
            for func, leaves, spec, outputs in self.calls:
                args, kwargs = tree_unflatten(leaves, spec)
                again = tree_flatten(func(*args, **kwargs))[0]
                for old, new in zip(outputs, again, strict=True):
                    # The result of a view or an in-place operation is already the same memory.
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def capture(body: Body, device: torch.device) -> Body:
    """Replaces `hrm.engine.cuda_graph.capture`; the first call of the returned function does nothing.

    Recording here runs the function, unlike a capture, so it already is the first replay.
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
