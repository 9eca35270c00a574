"""Chooses the implementation of an operation, and launches all kernels.

On CUDA `auto` uses the fastest implementation by measurement (`kernels.measured`), or Triton without a
measurement; elsewhere it uses the reference, without a message. A selected backend is used or raises.
Triton's interpreter (TRITON_INTERPRET=1, set before this package is imported) runs the kernels on CPU
tensors: slowly, for tests.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
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
    except ImportError:  # Triton is not available on every system; the reference does not need it.
        from types import SimpleNamespace

        triton, tl = None, SimpleNamespace(constexpr=int)

        def jit(function: Callable) -> Callable:
            return function


__all__ = [
    "BACKENDS",
    "BackendError",
    "choose",
    "get_backend",
    "jit",
    "launch",
    "set_backend",
    "tl",
    "triton",
    "tunable",
    "use_triton",
]

BACKENDS = ("auto", "triton", "reference")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class BackendError(RuntimeError):
    """A requested implementation cannot run here."""


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


# Validate at the first use, so that a wrong value is an error of the call, not of the import.
_backend = os.environ.get("HRM_KERNELS", "auto")


def set_backend(name: str) -> None:
    """Selects the implementation of all operations: auto, triton or reference.

    The environment variable HRM_KERNELS sets the initial value. Raises ValueError for another name. Each call
    checks whether the selected backend supports its tensors.
    """
    global _backend
    _backend = _checked(name, "set_backend")


def get_backend() -> str:
    """The last value of `set_backend`, else that of HRM_KERNELS, else auto."""
    return _checked(_backend, "environment variable HRM_KERNELS")


class Choice(NamedTuple):
    """An operation's implementation (triton, reference, or a library's name), and the reason."""

    implementation: str
    reason: str


def absence(device: torch.device) -> str | None:
    """The reason why Triton cannot run on a device here; None if it can."""
    if triton is None:
        return "Triton is not installed (pip install triton)"
    if device.type != "cuda" and not INTERPRETED:
        return f"a tensor on {device} needs Triton's interpreter (TRITON_INTERPRET=1, slow, for tests)"
    return None


def decide(
    device: torch.device,
    dtype: torch.dtype,
    obstacle: str | None = None,
    slower: str | None = None,
    fastest: str | None = None,
) -> Choice:
    """The implementation for a tensor of that device and dtype; `choose` uses it.

    fastest: the fastest implementation by measurement, None without a measurement.
    """
    name = get_backend()
    if name == "reference":
        return Choice("reference", "backend 'reference' was requested")
    missing = absence(device)
    may_run = missing is None and not (fastest == "triton" and obstacle)
    if fastest is not None and name == "auto" and device.type == "cuda" and may_run:
        return Choice(fastest, "the fastest by measurement on this GPU")
    obstacle = missing or obstacle
    if obstacle is not None:
        return Choice("reference", obstacle)
    if name == "triton":
        return Choice("triton", "backend 'triton' was requested")
    if device.type != "cuda":
        return Choice(
            "reference", "the interpreter is slow, so it runs only if backend 'triton' is requested"
        )
    if dtype == torch.float64:
        return Choice("reference", "float64 is for tests against the reference")
    if slower is not None:
        return Choice("reference", slower)
    return Choice("triton", "a tensor on CUDA")


Tile = dict[str, int | bool]


class Table(NamedTuple):
    """The results of a measurement.

    choices: by shape class (`shape_class`), the fastest implementation inside a compiled function
    ("compiled") and outside ("eager"). tiles: the result of each launch choice, by its name and arguments.
    """

    choices: dict[str, dict[str, str]]
    tiles: dict[str, Tile]


class Asked(NamedTuple):
    """Records the queries of operations. classes: operations by shape class. tiles: all variants."""

    classes: dict[str, str]
    tiles: dict[str, list[Tile]]


_table = Table({}, {})
_asked: Asked | None = None


def install(table: Table) -> Table:
    """Installs a table for all choices; returns the previous one.

    Call it before a function is compiled or captured, because these keep their choices.
    """
    global _table
    before, _table = _table, table
    return before


def installed() -> Table:
    """The current table of choices; empty without a measurement."""
    return _table


@contextmanager
def asking() -> Iterator[Asked]:
    """Collects the shape classes and launch choices that operations query, in order."""
    global _asked
    before, _asked = _asked, Asked({}, {})
    try:
        yield _asked
    finally:
        _asked = before


def shape_class(op: str, tensor: Tensor, sizes: tuple[int, ...] = (), weight: Tensor | None = None) -> str:
    """The key of a measurement of `op`.

    Rows of `tensor` count as the power of two that covers them. The key also has its width, its dtype,
    `sizes`, and whether it or `weight` requires a gradient.
    """
    width = tensor.shape[-1] if tensor.dim() else 1
    rows, covered = tensor.numel() // max(width, 1), 1
    while covered < rows:
        covered *= 2
    dtype = str(tensor.dtype).removeprefix("torch.")
    learns = tensor.requires_grad or (weight is not None and weight.requires_grad)
    gradient = torch.is_grad_enabled() and learns
    return " ".join([op, dtype, *map(str, (covered, width, *sizes)), "gradient" if gradient else "forward"])


def _fastest(op: str, tensor: Tensor, sizes: tuple[int, ...], weight: Tensor | None) -> str | None:
    """The table's implementation for these arguments; None if there is none."""
    if _asked is not None:
        _asked.classes[shape_class(op, tensor, sizes, weight)] = op
    # Skip the lookup without a table, because compiled functions are guarded by it.
    if not _table.choices or tensor.dtype == torch.float64:
        return None
    entry = _table.choices.get(shape_class(op, tensor, sizes, weight))
    return None if entry is None else entry.get("compiled" if torch.compiler.is_compiling() else "eager")


def tunable(variants: Callable[..., list[Tile]]) -> Callable[[Callable[..., Tile]], Callable[..., Tile]]:
    """Lets a measurement replace the result of a launch choice for the same arguments.

    variants: returns other launches to measure for the same arguments, with the same names.
    """

    def wrap(choice: Callable[..., Tile]) -> Callable[..., Tile]:
        @wraps(choice)
        def chosen(*args: Any, **kwargs: Any) -> Tile:
            usual = choice(*args, **kwargs)
            if _asked is None and not _table.tiles:
                return usual
            words = [*map(str, args), *(f"{name}={value}" for name, value in sorted(kwargs.items()))]
            key = f"{choice.__module__.rpartition('.')[2]}({', '.join(words)})"
            if _asked is not None:
                _asked.tiles[key] = [usual, *(each for each in variants(*args, **kwargs) if each != usual)]
            return {**usual, **_table.tiles.get(key, {})}

        return chosen

    return wrap


# The choices that `explained` collects, and the device that its tensors represent.
_choices: dict[str, Choice] | None = None
_stand_in: torch.device | None = None


@contextmanager
def explained(device: torch.device) -> Iterator[dict[str, Choice]]:
    """Collects the choice of each operation, with every tensor representing one on `device`.

    With meta tensors, operations report their choice there without running.
    """
    global _choices, _stand_in
    before = _choices, _stand_in
    _choices, _stand_in = {}, device
    try:
        yield _choices
    finally:
        _choices, _stand_in = before


def device_of(tensor: Tensor) -> torch.device:
    """The device that determines the choice for a tensor: its own, or the one it represents in
    `explained`."""
    return _stand_in or tensor.device


def explaining() -> bool:
    """Whether `explained` is active."""
    return _choices is not None


def explain(op: str, choice: Choice) -> None:
    """Reports the choice of an operation to `explained`, if active."""
    if _choices is not None:
        _choices[op] = choice


def choose(
    op: str,
    tensor: Tensor,
    obstacle: str | None = None,
    slower: str | None = None,
    sizes: tuple[int, ...] = (),
    weight: Tensor | None = None,
    measured_as: str | None = None,
) -> str:
    """The implementation that `op` runs for `tensor`: triton, reference or a measured library.

    obstacle: why the kernel does not support these arguments, None if it does. slower: why the reference is
    faster for them without a measurement, None if it is not. sizes, weight: further parts of the shape class.
    measured_as: the common name of operations that are measured together. With `auto`, an obstacle, a device
    other than CUDA, float64 or a missing Triton select the reference. With `triton`, an obstacle, an
    unsupported device or a missing Triton raise BackendError.
    """
    # The usual case on a CPU. Without this test the choices take as long as the products of one sequence.
    if (
        tensor.is_cpu
        and _backend in ("auto", "reference")
        and _choices is None
        and _asked is None
        and _stand_in is None
    ):
        return "reference"
    fastest = _fastest(measured_as or op, tensor, sizes, weight)
    choice = decide(device_of(tensor), tensor.dtype, obstacle, slower, fastest)
    explain(op, choice)
    if get_backend() == "triton" and choice.implementation != "triton":
        raise BackendError(f"{op}: backend 'triton' was requested, but {choice.reason}; use 'auto'")
    return choice.implementation


def use_triton(op: str, tensor: Tensor, obstacle: str | None = None, **others: Any) -> bool:
    """Whether `op` runs its Triton kernel for `tensor`; the arguments are those of `choose`."""
    return choose(op, tensor, obstacle, **others) == "triton"


def wide(dtype: torch.dtype) -> "tl.constexpr":
    """The Triton type of sums over tensors of this dtype."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dot(dtype: torch.dtype) -> "tl.constexpr":
    """The Triton type of operands of `tl.dot`: their own type, which the tensor cores multiply.

    The interpreter stores bfloat16 as raw bits and would multiply these, so there it is float32.
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
    enable_fp_fusion: int = True


_record: list[Launch] | None = None


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Records launches instead of running them, so that launchers accept meta tensors."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 3,
    enable_fp_fusion: int = True,
    **constants: Any,
) -> None:
    """Runs a kernel on its first tensor's device. args: by position; constants: tl.constexpr, by name.

    enable_fp_fusion: False rounds products and sums separately, as the reference does.
    """
    if _record is not None:
        _record.append(Launch(kernel, grid, args, constants, num_warps, num_stages, enable_fp_fusion))
        return
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **options, **constants)
    else:
        kernel[grid](*args, **options, **constants)
