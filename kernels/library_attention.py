"""Library attention: PyTorch's scaled_dot_product_attention, and flash-attn 3 or 2 if installed.

Source: Dao 2023 (arXiv 2307.08691), Shah et al. 2024 (arXiv 2407.08608).
"""

import importlib
from collections.abc import Callable
from contextlib import nullcontext, suppress

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.backend import device_of
from kernels.checks import accumulate_dtype, cast
from kernels.rope import rope_reference

# PyTorch uses the first backend that supports the tensors. cuDNN is excluded: PyTorch prefers it on sm_90 for
# some lengths, and its plans, workspaces and sums change with its version.
SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def split_heads(
    qkv: Tensor, num_heads: int, cos: Tensor | None, sin: Tensor | None, queries: int | None, rotate: Callable
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries, rotated keys and values, each (B, T or queries, num_heads, d)."""
    heads = qkv.unflatten(2, (3 * num_heads, -1))
    # Use splits instead of slices: the gradient of a split is one concatenation.
    if cos is None or sin is None:
        q, k, v = heads.chunk(3, dim=2)
    else:
        qk, v = heads.split_with_sizes([2 * num_heads, num_heads], dim=2)
        q, k = rotate(qk, cos, sin).chunk(2, dim=2)
    return q if queries is None else q[:, :queries], k, v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention of q (B, queries, heads, d) to k, v (B, T, heads, d): (B, queries, heads * d)."""
    dtype, on_cpu = q.dtype, device_of(q).type == "cpu"
    if on_cpu:
        # On CPUs PyTorch's fused attention is several times slower in 16 bits than in float32.
        wide = accumulate_dtype(dtype)
        q, k, v = cast(q, wide), cast(k, wide), cast(v, wide)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    # A CPU has a single fused attention; for one sequence it takes no longer than this context.
    with nullcontext() if on_cpu else sdpa_kernel(SDPA_BACKENDS):
        o = F.scaled_dot_product_attention(q, k, v)
    return cast(o.transpose(1, 2).flatten(2), dtype)


def attention_reference(
    qkv: Tensor, num_heads: int, cos: Tensor | None, sin: Tensor | None, queries: int | None
) -> Tensor:
    """Attention through PyTorch's own scaled_dot_product_attention; see `attention`."""
    return sdpa(*split_heads(qkv, num_heads, cos, sin, queries, rope_reference))


def _find() -> tuple[Callable | None, Callable | None]:
    """The functions of flash-attn 3 and of flash-attn 2 (2.6 or later), None if not installed."""
    flash3 = flash2 = None
    with suppress(ImportError):
        flash3 = importlib.import_module("flash_attn_interface").flash_attn_func
    with suppress(ImportError):
        package = importlib.import_module("flash_attn")
        if tuple(int(part) for part in package.__version__.split(".")[:2]) >= (2, 6):
            flash2 = package.flash_attn_func
    return flash3, flash2


FLASH3, FLASH2 = _find()


def _function(device: torch.device) -> Callable | None:
    """flash-attn 3 on the GPU generation that it supports, else flash-attn 2."""
    if FLASH3 is not None and (FLASH2 is None or torch.cuda.get_device_capability(device)[0] == 9):
        return FLASH3
    return FLASH2


def has_flash() -> bool:
    """Whether `flash` is available."""
    return FLASH2 is not None or FLASH3 is not None


def flash_limit(head_dim: int, dtype: torch.dtype, device: str) -> str | None:
    """The reason why flash-attn does not support these tensors; None if it does."""
    if device != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16 on CUDA, got {dtype} on {device}"
    if head_dim > 256 or head_dim % 8:
        return f"it takes a head_dim of at most 256 in steps of 8, got {head_dim}"
    return None


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by flash-attn in 16 bits; for the arguments see `sdpa`."""
    function = _function(q.device)
    assert function is not None
    # PyTorch's own attention checks this setting itself.
    o = function(q, k, v, causal=False, deterministic=torch.are_deterministic_algorithms_enabled())
    # The first releases of flash-attn 3 return the softmax's normaliser too.
    return (o[0] if isinstance(o, tuple) else o).flatten(2)
