"""What runs here: versions and devices, and for given shapes each operation's implementation and why.

`python -m kernels` asks the operations themselves, with tensors that have a shape and no data, so the answer
comes from the code that decides when a model runs. `--device cuda` asks on a machine without a GPU what one
would run.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels import backend
from kernels.attention import FLASH2, FLASH3, attention_backend, triton_limit

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(
    *, batch_size: int, length: int, hidden_size: int, num_heads: int, vocab_size: int, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    """Every operation that chooses, called as the model does: SwiGLU 3 D wide inside, gates D / 4."""
    B, T, D, heads, V = batch_size, length, hidden_size, num_heads, vocab_size
    x, wide = meta(B, T, D, dtype=dtype), torch.float32
    inner, R, rstd = 3 * D, max(1, D // 4), meta(B, T, dtype=wide)
    qkv, cos, sin = meta(B, T, 3 * D, dtype=dtype), *(meta(T, D // heads, dtype=wide) for _ in range(2))
    weights = [meta(*shape, dtype=dtype) for shape in ((R, 3 * D), (R,), (3 * D, R), (3 * D,))]
    logits, labels = meta(B, T, V, dtype=dtype), meta(B, T, dtype=torch.int32)
    head = meta(V, D, dtype=dtype)
    flat, lr, step = meta(1024, dtype=wide), meta(dtype=wide), meta(dtype=torch.int64)
    identifiers, rows = meta(B, dtype=torch.int32), meta(B, D, dtype=wide)
    down, packed, qkv_weight = (
        meta(*shape, dtype=dtype) for shape in ((D, inner), (2 * inner, D), (3 * D, D))
    )
    adam = partial(kernels.adam_atan2, lr=lr, step=step, beta1=0.9, beta2=0.95, weight_decay=0.1)
    return {
        "attention": partial(kernels.attention, qkv, heads, cos, sin),
        "rope": partial(kernels.rope, qkv.view(B, T, 3 * heads, -1)[:, :, : 2 * heads], cos, sin),
        "rms_norm": partial(kernels.rms_norm, x, x),
        "swiglu": partial(kernels.swiglu, meta(B, T, 2 * inner, dtype=dtype)),
        "linear": partial(kernels.linear, x, qkv_weight),
        "linear_scaled": partial(kernels.linear_scaled, x, qkv_weight, rstd),
        "linear_rms": partial(kernels.linear_rms, meta(B, T, inner, dtype=dtype), down, x, rstd),
        "linear_swiglu": partial(kernels.linear_swiglu, x, packed, rstd),
        "gate_mix": partial(kernels.gate_mix, x, x, x, *weights),
        "stablemax_cross_entropy": partial(kernels.stablemax_cross_entropy, logits, labels),
        "softmax_cross_entropy": partial(kernels.softmax_cross_entropy, logits, labels),
        "lm_head_stablemax": partial(kernels.lm_head_stablemax, x, head, labels),
        "lm_head_softmax": partial(kernels.lm_head_softmax, x, head, labels),
        "adam_atan2": partial(adam, flat, flat, flat, flat),
        "sign_sgd": partial(kernels.sign_sgd, rows, identifiers, rows, lr, 0.1),
    }


def decision(op: str, call: Callable[[], object], device: torch.device) -> backend.Choice:
    """The operation's implementation on that device, and why, in its own words."""
    with backend.explained(device) as choices, torch.no_grad():
        try:
            call()
        except backend.BackendError as error:
            return backend.Choice("none", str(error))
    return choices[op]


def attention_decision(
    call: Callable[[], object], device: torch.device, dtype: torch.dtype, length: int, head_dim: int
) -> backend.Choice:
    """Attention's, which chooses among libraries where its kernel does not run."""
    if backend.get_backend() == "reference":
        return backend.decide(device, dtype)
    choice = decision("attention", call, device)
    if choice.implementation == "none":
        return choice
    runs, flash = choice.implementation == "triton", FLASH2 is not None or FLASH3 is not None
    taken = attention_backend(length, head_dim, dtype, device.type, triton=runs, flash=flash)
    limit = triton_limit(length, head_dim) if runs else None
    return backend.Choice(taken, limit or choice.reason)


def version(module: str) -> str | None:
    """An installed module's version, `present` if it has none, None if it is not there."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return "present"


def surroundings() -> dict[str, Any]:
    """What is installed and set here."""
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return {
        "torch": torch.__version__,
        "triton": None if backend.triton is None else backend.triton.__version__,
        "devices": devices,
        # What attention uses, which may be less than what is installed.
        "flash_attn_2": FLASH2 and version("flash_attn"),
        "flash_attn_3": FLASH3 and version("flash_attn_interface"),
        "interpreter": backend.INTERPRETED,
        "backend": backend.get_backend(),
        "HRM_KERNELS": os.environ.get("HRM_KERNELS"),
    }


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shapes = {"hidden-size": 512, "num-heads": 8, "length": 82, "batch-size": 768, "vocab-size": 11}
    for name, default in shapes.items():
        parser.add_argument(f"--{name}", type=positive, default=default, help=f"default {default}")
    parser.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="of the forward; auto, the default: bfloat16 on CUDA, float32 elsewhere",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto, the default: CUDA if it is here",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    options = parser.parse_args(argv)
    if options.hidden_size % (2 * options.num_heads):
        parser.error(
            f"argument --hidden-size: expected an even multiple of --num-heads {options.num_heads}, "
            f"got {options.hidden_size}"
        )
    try:
        backend.get_backend()
    except ValueError as error:
        parser.error(str(error))
    return options


def main(argv: list[str] | None = None) -> int:
    options = parsed(argv)
    device, dtype = options.device, options.dtype
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    shape = {
        "batch_size": options.batch_size,
        "length": options.length,
        "hidden_size": options.hidden_size,
        "num_heads": options.num_heads,
        "vocab_size": options.vocab_size,
    }
    here = surroundings()
    where, kind = torch.device(device), DTYPES[dtype]
    asked = calls(dtype=kind, **shape)
    head_dim = options.hidden_size // options.num_heads
    attends = attention_decision(asked.pop("attention"), where, kind, options.length, head_dim)
    choices = {"attention": attends} | {op: decision(op, call, where) for op, call in asked.items()}
    operations = [
        {"op": op, "implementation": choice.implementation, "why": choice.reason}
        for op, choice in choices.items()
    ]
    if options.json:
        print(
            json.dumps(here | {"device": device, "dtype": dtype, **shape, "operations": operations}, indent=1)
        )
        return 0
    for name in ("torch", "triton", "flash_attn_2", "flash_attn_3"):
        print(f"{name:<14}{here[name] or 'not installed'}")
    for each in here["devices"] or [{"name": "no CUDA device", "capability": "", "memory_gib": ""}]:
        found = f"{each['name']}, capability {each['capability']}, {each['memory_gib']} GiB"
        print(f"{'device':<14}{found if each['capability'] else each['name']}")
    print(f"{'interpreter':<14}{'on (TRITON_INTERPRET=1)' if here['interpreter'] else 'off'}")
    print(f"{'backend':<14}{here['backend']} (HRM_KERNELS: {here['HRM_KERNELS'] or 'not set'})")
    sizes = ", ".join(f"{name} {value}" for name, value in shape.items())
    print(f"\nOn {device} in {dtype}, with {sizes}:")
    for row in operations:
        print(f"  {row['op']:<25}{row['implementation']:<11}{row['why']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
