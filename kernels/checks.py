"""Argument checks of the public functions: each error gives the argument, the expected and the actual value.

They use only shapes, dtypes and devices, so they need no synchronisation and disappear under torch.compile.
"""

import torch
from torch import Tensor

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_floating(op: str, **tensors: Tensor) -> None:
    """Checks that all tensors have the same supported floating-point dtype and the same device."""
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
    """Checks that the tensor has exactly the expected shape."""
    if tensor.shape != expected:
        raise ValueError(f"{op}: {name} must have shape {tuple(expected)}, got {tuple(tensor.shape)}")


def check_flag(op: str, name: str, flag: Tensor | None, device: torch.device) -> None:
    """Checks that the flag, if any, is a single bool on the device of its tensors."""
    if flag is None:
        return
    if flag.dtype != torch.bool or flag.device != device:
        raise TypeError(f"{op}: {name} must be bool on {device}, got {flag.dtype} on {flag.device}")
    check_shape(op, name, flag, ())


def as_rows(tensor: Tensor) -> Tensor:
    """(..., N) as (M, N) with unit stride in N, as kernels require; copies only if a view is impossible."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`. If it has this dtype, the test takes a tenth of the time of `Tensor.to`."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
