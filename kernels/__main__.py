"""Prints versions, devices, and each operation's implementation for given shapes with the reason.

`python -m kernels` calls the operations with tensors without data, so the answer comes from the code that
decides in a real run. `--device cuda` works on a machine without a GPU. `--measure` times every
implementation on this GPU and stores the fastest for later runs.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

import kernels
from hrm.common.errors import run_command
from kernels import backend, fastest, measured
from kernels.attention import attention_backend
from kernels.cases import NOT_MEASURED, Sizes, cases
from kernels.library_attention import FLASH2, FLASH3, has_flash

# Operations whose kernels run only if a gradient is required.
TRAINING = ("swiglu_mlp",)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def calls(dtype: torch.dtype, sizes: Sizes) -> dict[str, Callable[[], object]]:
    """Calls to every public operation, as in the model, on tensors without data."""
    made = {name: case() for name, case in cases(sizes, dtype, "meta").items()}
    own = {name: case for name, case in made.items() if name in kernels.__all__}
    found: dict[str, Callable[[], object]] = {
        name: partial(case.call, **case.inputs) for name, case in own.items()
    }
    return found | {name: partial(_with_gradient, own[name].call, own[name].inputs) for name in TRAINING}


def _with_gradient(call: Callable[..., object], inputs: Mapping[str, torch.Tensor]) -> object:
    """Calls an operation as a training step does, even if gradients are disabled."""
    with torch.enable_grad():
        return call(**{name: tensor.detach().requires_grad_() for name, tensor in inputs.items()})


def decision(op: str, call: Callable[[], object], device: torch.device) -> backend.Choice:
    """The operation's implementation on that device, and its reason."""
    with backend.explained(device) as choices, torch.no_grad():
        try:
            call()
        except backend.BackendError as error:
            return backend.Choice("none", str(error))
    return choices[op]


def attention_decision(
    call: Callable[[], object], device: torch.device, dtype: torch.dtype, length: int, head_dim: int
) -> backend.Choice:
    """The implementation of attention, which chooses among libraries if its kernel does not run."""
    if backend.get_backend() == "reference":
        return backend.decide(device, dtype)
    choice = decision("attention", call, device)
    if choice.implementation != "reference":
        return choice
    taken = attention_backend(length, head_dim, dtype, device.type, triton=False, flash_attn=has_flash())
    return backend.Choice(taken, choice.reason)


def version(module: str) -> str | None:
    """An installed module's version, `present` without a version, None if it is not installed."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return "present"


def surroundings() -> dict[str, Any]:
    """The installed packages and the settings."""
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
        # The packages that attention uses, which may be fewer than the installed ones.
        "flash_attn_2": FLASH2 and version("flash_attn"),
        "flash_attn_3": FLASH3 and version("flash_attn_interface"),
        "interpreter": backend.INTERPRETED,
        "backend": backend.get_backend(),
        "HRM_KERNELS": os.environ.get("HRM_KERNELS"),
    }


def not_negative(text: str) -> int:
    return 0 if text == "0" else positive(text)


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
    derived = {"cells": "all positions but one", "inner_size": "3 times the hidden size"}
    derived["gate_size"] = "a quarter of the hidden size"
    for name, default in Sizes()._asdict().items():
        flag, usual = f"--{name.replace('_', '-')}", derived.get(name, default)
        number = not_negative if name in derived else positive
        parser.add_argument(flag, type=number, default=default, help=f"default {usual}")
    parser.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="dtype of the forward; auto (default) is bfloat16 on CUDA and float32 elsewhere",
    )
    parser.add_argument(
        "--device",
        type=device_name,
        default="auto",
        help="cpu, cuda, cuda:N or auto (default), which is CUDA if there is a GPU",
    )
    measuring = parser.add_argument_group("measurement, on a CUDA device")
    measuring.add_argument(
        "--measure", action="store_true", help="time every implementation and store the fastest"
    )
    measuring.add_argument(
        "--missing", action="store_true", help="measure only cases without an earlier measurement"
    )
    measurable = [
        name for name in cases(Sizes(1, 2, 2, 1, 2), torch.float32, "meta") if name not in NOT_MEASURED
    ]
    measuring.add_argument(
        "--only", nargs="+", choices=measurable, metavar="CASE", help=f"of {', '.join(measurable)}"
    )
    measuring.add_argument(
        "--seconds",
        type=positive,
        default=10 * measured.SECONDS,
        help="start no measurement after this time; default %(default)s",
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
    on_cpu = options.device == "cpu" or not torch.cuda.is_available()
    if options.measure and on_cpu:
        parser.error("argument --measure: needs a CUDA device; without one shapes and dtypes choose")
    return options


def device_name(text: str) -> str:
    if text not in ("auto", "cpu", "cuda") and not (text.startswith("cuda:") and text[5:].isdecimal()):
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda or cuda:N, got {text!r}")
    return text


def measure(sizes: Sizes, dtype: torch.dtype, device: torch.device, options: argparse.Namespace) -> int:
    """Measures each case, stores and prints the result."""
    if device.index is not None:
        torch.cuda.set_device(device)
    backend.set_backend("auto")
    maker, only = measured.made_by(device), options.only or []
    before = measured.load(maker) or measured.Kept(maker, backend.Table({}, {}), [], [])
    # Measure again, or keep the earlier results with --missing.
    table = backend.Table({}, {})
    if options.missing:
        table.choices.update(before.table.choices)
        table.tiles.update(before.table.tiles)
    problem: str | None = None
    kept = before

    def keep(rows: list[fastest.Row]) -> None:
        nonlocal kept, problem
        whole = backend.Table(before.table.choices | table.choices, before.table.tiles | table.tiles)
        found = [row._asdict() for row in rows if row.seconds or row.tiles]
        classes = {row["shape_class"] for row in found}
        older = [row for row in before.rows if row["shape_class"] not in classes]
        kept = before._replace(table=whole, rows=older + found)
        problem = measured.save(kept)
        if not options.json:
            print(shown(rows[-1]), flush=True)

    timer, seconds = fastest.on_device, options.seconds
    fastest.measure(sizes, dtype, device, table=table, timer=timer, only=only, seconds=seconds, keep=keep)
    kept = kept._replace(done=sorted({*before.done, measured.request(sizes, dtype, only)}))
    problem = measured.save(kept)
    if options.json:
        print(measured.to_text(kept))
    else:
        print(problem or f"kept in {measured.cache_file(maker)}")
    return 0


def shown(row: fastest.Row) -> str:
    """A line for the choice of a case, then one line per candidate."""
    lines = [
        f"{row.case}: {', '.join(f'{where} {name}' for where, name in row.choice.items()) or 'no choice'}"
    ]
    for found in (row.seconds, *row.tiles.values()):
        for name, value in found.items():
            lines.append(f"  {f'{1e6 * value:.1f} us' if isinstance(value, float) else value:<14}{name}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    options = parsed(argv)
    device, dtype = options.device, options.dtype
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    cuda = device.startswith("cuda")
    if dtype == "auto":
        dtype = "bfloat16" if cuda else "float32"
    shape = {name: getattr(options, name) for name in Sizes._fields}
    where, kind, sizes = torch.device(device), DTYPES[dtype], Sizes(**shape)
    if options.measure:
        return measure(sizes, kind, where, options)
    here = surroundings()
    if where.type == "cuda" and torch.cuda.is_available():
        kept = measured.load(measured.made_by(where))
        backend.install(backend.Table({}, {}) if kept is None else kept.table)
        here["measured"] = None if kept is None else str(measured.cache_file(kept.maker))
    shape = {name: value for name, value in shape.items() if value and name != "parameters"}
    asked = calls(kind, sizes)
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
    if "measured" in here:
        print(f"{'measured':<14}{here['measured'] or 'nothing yet (--measure)'}")
    said = ", ".join(f"{name} {value}" for name, value in shape.items())
    print(f"\nOn {device} in {dtype}, with {said}:")
    for row in operations:
        print(f"  {row['op']:<25}{row['implementation']:<11}{row['why']}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
