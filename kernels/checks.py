"""Argument checks of the public functions: each error names the argument, what was expected, what came.

They look at shapes, dtypes and devices only, so they cost no synchronisation and vanish under torch.compile.
"""

import torch
from torch import Tensor

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_floating(op: str, **tensors: Tensor) -> None:
    """Each tensor has one of the supported floating dtypes; the first one sets dtype and device for all."""
    first: tuple[str, Tensor] | None = None
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{op}: {name} must be bfloat16, float16, float32 or float64, got {tensor.dtype}")
        if first is None:
            first = (name, tensor)
        elif tensor.dtype != first[1].dtype or tensor.device != first[1].device:
            raise TypeError(
                f"{op}: {name} must match {first[0]} ({first[1].dtype} on {first[1].device}), "
                f"got {tensor.dtype} on {tensor.device}"
            )


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """The tensor has exactly the expected shape."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} must have shape {tuple(expected)}, got {tuple(tensor.shape)}")


def check_flag(op: str, name: str, flag: Tensor | None, device: torch.device) -> None:
    """The flag, where there is one, is a single bool on the device of the tensors that it decides about."""
    if flag is None:
        return
    if flag.dtype != torch.bool or flag.device != device:
        raise TypeError(f"{op}: {name} must be bool on {device}, got {flag.dtype} on {flag.device}")
    check_shape(op, name, flag, ())


def as_rows(tensor: Tensor) -> Tensor:
    """(..., N) as (M, N) with unit stride in N, the form kernels read; a copy only where a view cannot be."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are taken in: float64 stays, everything else is widened to float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
