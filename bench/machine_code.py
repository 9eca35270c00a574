"""The machine code of every kernel for every GPU generation in use, made and read without a GPU.

`python -m bench.machine_code` compiles each launch of `LAUNCHES` (the shapes of the published model, as the
launchers themselves ask for them) for each target, and reads registers, stack, shared memory and tensor-core
instructions from the result; `--write` keeps the table in bench/results/machine_code.json. A stack means
that registers spilled to memory; a matrix kernel without tensor-core instructions fell back to scalar code.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hrm.common.errors import run_command
from kernels.backend import Launch, recorded, triton

RESULTS = Path(__file__).parent / "results" / "machine_code.json"
# Compute capability: bytes of shared memory one block may have (CUDA programming guide, table of limits).
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448, 120: 101376}
# Warp-level, warpgroup-level and fifth-generation products, as the disassembler names them.
TENSOR_CORE = re.compile(r"\b([DH]MMA|HGMMA|UTC\w*MMA)\b")
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
}
# The published model: hidden size, heads, batch; lengths with the puzzle token, and vocabularies, of Sudoku
# and ARC.
D, HEADS, B = 512, 8, 768
VOCABULARY = {82: 11, 901: 12}


class Case(NamedTuple):
    """A call of launchers with meta tensors. matrix: its kernels multiply matrices in 16 bits."""

    op: str
    label: str
    call: Callable[[], object]
    matrix: bool


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def rms_norm(T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.rms_norm")
    for dtype in (torch.bfloat16, torch.float32):
        x = meta(B, T, D, dtype=dtype)
        rstd = meta(B, T, dtype=torch.float32)
        yield Case("rms_norm", f"forward {TYPES[dtype]}", partial(op._forward, x, x, 1e-5), False)
        for label, dy_residual in (("backward", None), ("backward of a pair", x)):
            call = partial(op._backward, x, dy_residual, x, rstd)
            yield Case("rms_norm", f"{label} {TYPES[dtype]}", call, False)


def rope(T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.rope")
    tables = [meta(T, D // HEADS, dtype=torch.float32)] * 2
    # Queries and keys as they lie in packed projections; their gradient comes contiguous.
    qk = meta(B, T, 3 * HEADS, D // HEADS)[:, :, : 2 * HEADS]
    dy = meta(B, T, 2 * HEADS, D // HEADS)
    yield Case("rope", "forward bf16", partial(op._rotated, qk, *tables, False), False)
    yield Case("rope", "backward bf16", partial(op._rotated, dy, *tables, True), False)


def attention(T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.attention")
    if T > op.MAX_LENGTH:
        return
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        qkv, matrix, name = meta(B, T, 3 * D, dtype=dtype), dtype.itemsize == 2, TYPES[dtype]
        tables = [meta(T, D // HEADS, dtype=torch.float32)] * 2
        dy = meta(B, T, D, dtype=dtype)
        yield Case("attention", f"forward {name}", partial(op._forward, qkv, HEADS, *tables, T), matrix)
        yield Case("attention", f"one query {name}", partial(op._forward, qkv, HEADS, *tables, 1), matrix)
        yield Case("attention", f"backward {name}", partial(op._backward, dy, qkv, HEADS, *tables), matrix)


def cross_entropy(T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.stablemax")
    tokens, labels = meta(B, T - 1, dtype=torch.float32), meta(B, T - 1, dtype=torch.int32)
    for vocabulary, dtype, stablemax in (
        (11, torch.bfloat16, True),
        (11, torch.float32, True),
        (11, torch.bfloat16, False),
        (op.MAX_VOCABULARY, torch.float32, True),
        (op.MAX_VOCABULARY, torch.float32, False),
    ):
        logits = meta(B, T - 1, vocabulary, dtype=dtype)
        name = f"{'stablemax' if stablemax else 'softmax'} {vocabulary} {TYPES[dtype]}"
        forward = partial(op._forward, logits, labels, -100, stablemax)
        backward = partial(op._backward, tokens, logits, labels, -100, stablemax)
        yield Case("cross_entropy", f"forward {name}", forward, False)
        yield Case("cross_entropy", f"backward {name}", backward, False)


# The inner width of the published model's SwiGLU.
INNER = 1536


def swiglu(T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.swiglu")
    for dtype in (torch.bfloat16, torch.float32):
        gate_up, dy = meta(B, T, 2 * INNER, dtype=dtype), meta(B, T, INNER, dtype=dtype)
        yield Case("swiglu", f"forward {TYPES[dtype]}", partial(op._forward, gate_up), False)
        yield Case("swiglu", f"backward {TYPES[dtype]}", partial(op._backward, dy, gate_up), False)


def linear_swiglu(T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.linear_swiglu")
    mean_square = meta(B, T, 2, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = meta(B, T, D, dtype=dtype), meta(2 * INNER, D, dtype=dtype)
        matrix = dtype == torch.bfloat16
        yield Case("linear_swiglu", f"plain {TYPES[dtype]}", partial(op._forward, x, weight, None), matrix)
        yield Case(
            "linear_swiglu", f"scaled {TYPES[dtype]}", partial(op._forward, x, weight, mean_square), matrix
        )


def linear_rms(T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.linear_rms")
    mean_square = meta(B, T, 2, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        x, y = meta(B, T, D, dtype=dtype), meta(B, T, INNER, dtype=dtype)
        out, down, qkv = (meta(*shape, dtype=dtype) for shape in ((D, D), (D, INNER), (3 * D, D)))
        kind, matrix = TYPES[dtype], dtype == torch.bfloat16
        yield Case("linear_rms", f"out {kind}", partial(op._sum, x, out, x, None, 1e-5), matrix)
        yield Case("linear_rms", f"down {kind}", partial(op._sum, y, down, x, mean_square, 1e-5), matrix)
        yield Case("linear_rms", f"qkv {kind}", partial(op._scaled, x, qkv, mean_square), matrix)


# The published model's parameters, gaps of the alignment included, to the next multiple of its 16.
PARAMETERS = 27_275_280


def adam_atan2(_T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.adam_atan2")
    buffers = [meta(PARAMETERS, dtype=torch.float32)] * 4
    lr, step = meta(1, dtype=torch.float32)[0], meta(1, dtype=torch.int64)[0]
    scalars, skip = (lr, step, 0.9, 0.95, 0.1), meta(1, dtype=torch.bool)[0]
    for label, copy in (("update", None), ("update and bf16 copy", meta(PARAMETERS))):
        yield Case("adam_atan2", label, partial(op._update, *buffers, *scalars, copy, skip), False)


def sign_sgd(_T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.sign_sgd")
    table, grad = meta(1_000_000, D, dtype=torch.float32), meta(B, D, dtype=torch.float32)
    identifiers, lr = meta(B, dtype=torch.int32), meta(1, dtype=torch.float32)[0]
    skip = meta(1, dtype=torch.bool)[0]
    yield Case("sign_sgd", "update", partial(op._update, table, identifiers, grad, lr, 0.1, skip), False)


def gate_mix(T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.gate_mix")
    for dtype, R in ((torch.bfloat16, D // 4), (torch.bfloat16, op.MAX_HIDDEN), (torch.float32, D // 4)):
        s = meta(B, T, D, dtype=dtype)
        w1, b1 = meta(R, 3 * D, dtype=dtype), meta(R, dtype=dtype)
        w2, b2 = meta(3 * D, R, dtype=dtype), meta(3 * D, dtype=dtype)
        published = R == D // 4 and dtype == torch.bfloat16
        # L learns through x and H through its secondary state: the others come without gradient.
        for x, wanted in ((s, "x"), (None, "o"), (s, "zox")) if published else ((s, "zox"),):
            inputs = (s, s, x, w1, b1, w2, b2)
            needs = [name in wanted for name in "zox"] + [True] * 4
            calls = {f"backward d{wanted}": partial(op._backward, s, *inputs, needs)}
            if wanted != "zox" or not published:
                calls["forward"] = partial(op._forward, *inputs)
            for label, call in calls.items():
                name = f"{label}, {'z, o' if x is None else 'z, o, x'}, R={R} {TYPES[dtype]}"
                yield Case("gate_mix", name, call, dtype == torch.bfloat16)


def lm_head(T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.lm_head")
    dloss, valid_count = meta(B, dtype=torch.float32), meta(B, dtype=torch.int32)
    labels = meta(B, T - 1, dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float32):
        # The head sees the cells behind the puzzle token.
        z_H, weight = meta(B, T, D, dtype=dtype)[:, 1:], meta(VOCABULARY[T], D, dtype=dtype)
        for loss, stablemax in (("stablemax", True), ("softmax", False)):
            label, matrix = f"{loss} {TYPES[dtype]}", dtype == torch.bfloat16
            call = partial(op._forward, z_H, weight, labels, -100, stablemax)
            yield Case("lm_head", f"forward {label}", call, matrix)
            call = partial(op._backward, dloss, z_H, weight, labels, valid_count, -100, stablemax, True, True)
            yield Case("lm_head", f"backward {label}", call, matrix)


# Each yields the launches of one file of kernels/ at a length.
LAUNCHES = (
    rms_norm,
    rope,
    attention,
    cross_entropy,
    swiglu,
    linear_swiglu,
    linear_rms,
    adam_atan2,
    sign_sgd,
    gate_mix,
    lm_head,
)


def cases() -> dict[tuple[str, str], dict[int, Case]]:
    """Every case by operation and label, at each length that it occurs at."""
    found: dict[tuple[str, str], dict[int, Case]] = {}
    for T in VOCABULARY:
        for family in LAUNCHES:
            for case in family(T):
                found.setdefault((case.op, case.label), {})[T] = case
    return found


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
    return Source(launch.kernel, signature, constants, attributes, options)


def compiled(source: Source, capability: int) -> dict[str, Any]:
    """Compiles a kernel for a target; returns what its machine code holds."""
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
    """Registers of a thread, and bytes of its stack, which holds what spills."""
    usage = _cuobjdump("-res-usage", str(cubin))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2])


def _cuobjdump(flag: str, path: str) -> str:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    # cuobjdump looks for nvdisasm beside the other programs of the search path.
    env = {**os.environ, "PATH": f"{tools}:{os.environ.get('PATH', '')}"}
    done = subprocess.run([tools / "cuobjdump", flag, path], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {flag}: {done.stderr.strip()}")
    return done.stdout


def rows_of(key: tuple[str, str]) -> list[dict[str, Any]]:
    """The table's rows of one case: each kernel it launches, for each target.

    Lengths that specialise a kernel alike share a row, which names them with the programs they launch.
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
            **compiled(source, capability),
        }
        for source, programs in sources
        for capability in SHARED_MEMORY
    ]


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row of the table."""
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
        help=f"keep the table in a file, {RESULTS.name} by default",
    )
    parser.add_argument("--op", default="", help="only cases of this operation")
    options = parser.parse_args()
    if options.op and options.write:
        parser.error("--write keeps the whole table: leave --op out")
    if triton is None or os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("this needs Triton's compiler: install triton and unset TRITON_INTERPRET")
    chosen = [key for key in cases() if options.op in ("", key[0])]
    if not chosen:
        ops = ", ".join(dict.fromkeys(op for op, _ in cases()))
        parser.error(f"argument --op: expected one of {ops}, got {options.op!r}")
    bad = 0
    table = []
    with ProcessPoolExecutor() as pool:
        for rows in pool.map(rows_of, chosen):
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
    sys.exit(run_command(main, "what was printed is all there is"))
