"""Compiles every kernel for every GPU generation in use and inspects the machine code, without a GPU.

`python -m bench.machine_code` compiles each launch of bench/kernel_launches.py for each target, and reads
registers, stack, shared memory and tensor-core instructions from the result; `--write` stores the table in
bench/results/machine_code.json. A stack means that registers spilled to memory; a matrix kernel without
tensor-core instructions fell back to scalar code.

Each row has a digest of the compiler's inputs. `--changed` compiles only rows whose digest is not in the
stored table, and a sample of the stored rows as a check.
"""

import argparse
import hashlib
import inspect
import io
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import tokenize
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from bench.kernel_launches import TYPES, cases
from hrm.common.errors import run_command
from kernels.backend import Launch, recorded, tl, triton

RESULTS = Path(__file__).parent / "results" / "machine_code.json"
# Maximum bytes of shared memory per block by compute capability (CUDA programming guide, table of limits).
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448, 120: 101376}
# Warp-level, warpgroup-level and fifth-generation products, as the disassembler names them.
TENSOR_CORE = re.compile(r"\b([DH]MMA|HGMMA|UTC\w*MMA)\b")
MEASURED = ("registers", "stack", "shared_memory", "tensor_core")
# The stored table: the values of MEASURED by digest and target.
Kept = Mapping[tuple[str, str], dict[str, int]]


class Source(NamedTuple):
    """A kernel as Triton's own launcher would specialise it for a launch."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list[list[Any]]]
    options: dict[str, int]


def specialised(launch: Launch) -> Source:
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.args, strict=False)) | launch.constants
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(names):
        value = values[name]
        if name in launch.constants or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    if not launch.enable_fp_fusion:
        options["enable_fp_fusion"] = False
    return Source(launch.kernel, signature, constants, attributes, options)


def code_of(function: Callable) -> str:
    """A function's tokens, without comments, layout and docstring, which do not affect machine code."""
    text = textwrap.dedent(inspect.getsource(function))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in skipped]
    body = next(i for i, token in enumerate(tokens) if token.type == tokenize.INDENT) + 1
    if tokens[body].type == tokenize.STRING:
        del tokens[body]
    # Ignore the width of an indentation.
    return " ".join("" if token.type == tokenize.INDENT else token.string for token in tokens)


def code_with_callees(kernel: Any) -> dict[str, str]:
    """The code of a kernel and of its callees, and the constants that they read, by name."""
    found: dict[str, str] = {}
    waiting = [kernel.fn]
    while waiting:
        function = waiting.pop()
        if function.__qualname__ in found:
            continue
        found[function.__qualname__] = code_of(function)
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            if hasattr(value, "fn"):
                waiting.append(value.fn)
            elif isinstance(value, tl.constexpr):
                found[name] = repr(value)
    return found


def digest(source: Source) -> str:
    """A digest of everything that determines the machine code, except the target."""
    code = sorted(code_with_callees(source.kernel).items())
    parts = [triton.__version__, code, *(sorted(part.items()) for part in source[1:])]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def kept_rows(path: Path = RESULTS) -> Kept:
    """The values of the stored table without the sample: each operation's first kernel for one target."""
    rows = json.loads(path.read_text())["rows"]
    targets = [f"sm_{capability}" for capability in SHARED_MEMORY]
    sample = {}
    for number, op in enumerate(dict.fromkeys(row["op"] for row in rows)):
        target = targets[number % len(targets)]
        first = next(row for row in rows if (row["op"], row["target"]) == (op, target))
        sample[first["digest"]] = target
    return {
        (row["digest"], row["target"]): {name: row[name] for name in MEASURED}
        for row in rows
        if sample.get(row["digest"]) != row["target"]
    }


def compiled(source: Source, capability: int) -> dict[str, int]:
    """Compiles a kernel for a target; returns the properties of its machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = triton.compile(
        ASTSource(source.kernel, source.signature, source.constants, source.attributes),
        target=GPUTarget("cuda", capability, 32),
        options=source.options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        registers, stack = registers_and_stack(Path(file.name))
        code = _cuobjdump("-sass", file.name)
    return {
        "registers": registers,
        "stack": stack,
        "shared_memory": kernel.metadata.shared,
        "tensor_core": len(TENSOR_CORE.findall(code)),
    }


def registers_and_stack(cubin: Path) -> tuple[int, int]:
    """Registers per thread, and bytes of the stack, which holds spilled registers."""
    usage = _cuobjdump("-res-usage", str(cubin))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2])


def _cuobjdump(flag: str, path: str) -> str:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    # cuobjdump looks for nvdisasm on the search path.
    env = {**os.environ, "PATH": f"{tools}:{os.environ.get('PATH', '')}"}
    done = subprocess.run([tools / "cuobjdump", flag, path], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {flag}: {done.stderr.strip()}")
    return done.stdout


def rows_of(key: tuple[str, str], kept: Kept) -> list[dict[str, Any]]:
    """The table's rows of one case: each kernel it launches, for each target.

    Rows in `kept` are not compiled again. Lengths with the same specialisation share a row, which gives the
    number of programs for each length.
    """
    sources: list[tuple[Source, dict[int, int]]] = []
    for T, case in cases()[key].items():
        with recorded() as launches:
            case.call()
        for launch in launches:
            source = specialised(launch)
            programs = next((programs for known, programs in sources if known == source), None)
            if programs is None:
                sources.append((source, programs := {}))
            programs[T] = math.prod(launch.grid)
    return [
        {
            "op": key[0],
            "case": key[1],
            "kernel": source.kernel.__name__.strip("_"),
            "target": f"sm_{capability}",
            "programs": {f"T={T}": count for T, count in programs.items()},
            "warps": source.options["num_warps"],
            "matrix": case.matrix,
            "digest": code,
            **(kept.get((code, f"sm_{capability}")) or compiled(source, capability)),
        }
        for source, programs in sources
        for code in [digest(source)]
        for capability in SHARED_MEMORY
    ]


def faults(row: dict[str, Any]) -> list[str]:
    """The faults of a row of the table."""
    limit = SHARED_MEMORY[int(row["target"].removeprefix("sm_"))]
    found = []
    if row["stack"]:
        found.append(f"{row['stack']} bytes of stack: registers spill")
    if row["shared_memory"] > limit:
        found.append(f"{row['shared_memory']} bytes of shared memory, of {limit}")
    if row["matrix"] and not row["tensor_core"]:
        found.append("no tensor-core instruction")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.machine_code", description=__doc__)
    parser.add_argument(
        "--write",
        nargs="?",
        type=Path,
        const=RESULTS,
        help=f"store the table in a file, {RESULTS.name} by default",
    )
    parser.add_argument(
        "--changed", action="store_true", help=f"reuse rows of {RESULTS.name} with the same digest"
    )
    parser.add_argument("--op", default="", help="only cases of this operation")
    options = parser.parse_args()
    if options.op and options.write:
        parser.error("--write needs the whole table: leave --op out")
    if triton is None or os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("this needs Triton's compiler: install triton and unset TRITON_INTERPRET")
    chosen = [key for key in cases() if options.op in ("", key[0])]
    if not chosen:
        ops = ", ".join(dict.fromkeys(op for op, _ in cases()))
        parser.error(f"argument --op: expected one of {ops}, got {options.op!r}")
    bad = 0
    table = []
    with ProcessPoolExecutor() as pool:
        for rows in pool.map(partial(rows_of, kept=kept_rows() if options.changed else {}), chosen):
            for row in rows:
                wrong = faults(row)
                bad += bool(wrong)
                print(
                    f"{row['op']:>20} {row['case']:<28} {row['kernel']:<40} {row['target']:>7}"
                    f" {row['registers']:>4} registers {row['stack']:>5} stack"
                    f" {row['shared_memory']:>7} shared"
                    f" {row['tensor_core']:>5} tensor-core {'; '.join(wrong)}",
                    flush=True,
                )
                table.append(row)
    if options.write:
        options.write.write_text(json.dumps({"triton": triton.__version__, "rows": table}, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
