"""Which implementation an operation takes, and the one place where kernels are launched.

`auto` takes Triton on CUDA and the reference elsewhere, silently; a named backend is taken or raises.
Triton's interpreter (TRITON_INTERPRET=1, set before this package is imported) runs the kernels on CPU
tensors: slowly, for tests.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    import triton
    import triton.language as tl
    from triton import jit
else:
    try:
        import triton
        import triton.language as tl
        from triton import jit
    except ImportError:  # Triton is not built for every system; the reference needs none of it.
        from types import SimpleNamespace

        triton, tl = None, SimpleNamespace(constexpr=int)

        def jit(function: Callable) -> Callable:
            return function


__all__ = [
    "BACKENDS",
    "BackendError",
    "get_backend",
    "jit",
    "launch",
    "set_backend",
    "tl",
    "triton",
    "use_triton",
]

BACKENDS = ("auto", "triton", "reference")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class BackendError(RuntimeError):
    """An implementation that was asked for by name cannot run here."""


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


# Judged when it is first used, so that a wrong word is an error of the call, not of the import.
_backend = os.environ.get("HRM_KERNELS", "auto")


def set_backend(name: str) -> None:
    """Chooses the implementation of every operation from now on: auto, triton or reference.

    The environment variable HRM_KERNELS sets the first choice. Raises ValueError for another name. Whether a
    named backend can run is judged at each call, by the tensors it is given.
    """
    global _backend
    _backend = _checked(name, "set_backend")


def get_backend() -> str:
    """The name last given to `set_backend`, or that of HRM_KERNELS, or auto."""
    return _checked(_backend, "environment variable HRM_KERNELS")


class Choice(NamedTuple):
    """What an operation takes (triton, reference, or a library's name), and why."""

    implementation: str
    reason: str


def absence(device: torch.device) -> str | None:
    """Why Triton cannot run on a device here, None if it can."""
    if triton is None:
        return "Triton is not installed (pip install triton)"
    if device.type != "cuda" and not INTERPRETED:
        return f"a tensor on {device} needs Triton's interpreter (TRITON_INTERPRET=1, slow, for tests)"
    return None


def decide(
    device: torch.device, dtype: torch.dtype, obstacle: str | None = None, slower: str | None = None
) -> Choice:
    """The implementation for a tensor of that device and dtype; see `use_triton`, which acts upon it."""
    name = get_backend()
    if name == "reference":
        return Choice("reference", "backend 'reference' was asked for")
    obstacle = absence(device) or obstacle
    if obstacle is not None:
        return Choice("reference", obstacle)
    if name == "triton":
        return Choice("triton", "backend 'triton' was asked for")
    if device.type != "cuda":
        return Choice(
            "reference", "the interpreter is slow, so it runs only where backend 'triton' is asked for"
        )
    if dtype == torch.float64:
        return Choice("reference", "float64 is for proofs, where the reference is the measure")
    if slower is not None:
        return Choice("reference", slower)
    return Choice("triton", "a tensor on CUDA")


# What `explained` collects, and the device that it has tensors stand for.
_choices: dict[str, Choice] | None = None
_stand_in: torch.device | None = None


@contextmanager
def explained(device: torch.device) -> Iterator[dict[str, Choice]]:
    """Collects what each operation takes, with every tensor standing for one on `device`.

    Called with meta tensors, operations so tell what they would run there, and run nothing.
    """
    global _choices, _stand_in
    before = _choices, _stand_in
    _choices, _stand_in = {}, device
    try:
        yield _choices
    finally:
        _choices, _stand_in = before


def device_of(tensor: Tensor) -> torch.device:
    """The device that decides for a tensor: its own, or under `explained` the one that it stands for."""
    return _stand_in or tensor.device


def explain(op: str, choice: Choice) -> None:
    """Tells `explained`, where it listens, what an operation takes."""
    if _choices is not None:
        _choices[op] = choice


def use_triton(op: str, tensor: Tensor, obstacle: str | None = None, slower: str | None = None) -> bool:
    """Whether `op` runs its Triton kernel for `tensor`.

    obstacle: why the kernel cannot take these arguments, None if it can. slower: why the reference is the
    faster one for them, None if it is not. Under `auto` either of them, a device other than CUDA, float64 or
    a missing Triton mean the reference. Under `triton` an obstacle, a device that Triton cannot use or a
    missing Triton raise BackendError.
    """
    choice = decide(device_of(tensor), tensor.dtype, obstacle, slower)
    explain(op, choice)
    takes = choice.implementation == "triton"
    if get_backend() == "triton" and not takes:
        raise BackendError(f"{op}: backend 'triton' was asked for, but {choice.reason}; use 'auto'")
    return takes


def wide(dtype: torch.dtype) -> "tl.constexpr":
    """The Triton type that sums over tensors of this dtype are taken in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dot(dtype: torch.dtype) -> "tl.constexpr":
    """The Triton type that operands of `tl.dot` are given in: their own, which the tensor cores multiply.

    The interpreter keeps bfloat16 as its bits and would multiply those, so there it is float32.
    """
    if dtype == torch.bfloat16:
        return tl.float32 if INTERPRETED else tl.bfloat16
    return {torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64}[dtype]


class Launch(NamedTuple):
    """One launch of a kernel: positional arguments, then constants by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


_record: list[Launch] | None = None


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collects launches instead of running them, so that launchers can be called with meta tensors."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any
) -> None:
    """Runs a kernel on its first tensor's device. args: by position; constants: tl.constexpr, by name."""
    if _record is not None:
        _record.append(Launch(kernel, grid, args, constants, num_warps, num_stages))
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)
    else:
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)
