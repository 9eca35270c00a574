"""Records the training step that Inductor generates for a CUDA device, without a GPU.

`python -m bench.captured` runs in an environment with a CUDA build of torch (`make cuda-host` makes one). It
compiles and captures a published model's step on the stand-in library of tests/cuda_host, with empty caches.
It prints the graph's nodes, launches and bytes by part, registers and spills of the generated kernels, and
compile times by phase. `--write after` stores the row in bench/results/captured.json; `before` is the
baseline.

Only the compile times are measurements. Sources of the byte counts:

- generated kernels: Inductor's own estimate;
- this project's kernels: the counts of bench/launches.py;
- products: operands and result once each; copies: twice their size; memsets: once;
- ATen's kernels: for the update, those of bench/launches.py. Others are not counted; the row gives their
  number.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench import launches
from bench.ceilings import MACHINES
from bench.implementations import metadata, random_batches
from bench.machine_code import registers_and_stack
from bench.roofline import CAPTURED as RESULTS
from hrm.common.errors import run_command
from hrm.common.machine import processor
from hrm.config.load import parse_args
from hrm.engine.cuda_graph import WARM_UP
from hrm.engine.profiling import opened_by
from kernels.__main__ import positive
from tests.cuda_host.stand_in import Record, active, environment, fault, read_log

LABELS = ("before", "after")
PARTS = ("forward", "backward", "update")
NODES = ("kernel", "memcpy", "memset", "host")
# Length to which Triton shortens file names.
NAME_LENGTH = 150
# Bytes per number, by cuBLAS' type code.
ITEMSIZE = {0: 4, 1: 8, 14: 2}
# Bytes of one launch, by part and kernel.
Bytes = dict[tuple[str, str], float]


def part_of(record: Record) -> str:
    """The part of the step that contains a record; the compiled forward includes the target pass."""
    return next((part for part in reversed(record.parts) if part in ("forward", "backward")), "update")


def bytes_of(record: Record, counted: Bytes) -> float | None:
    """Bytes that a graph node moves; None if unknown."""
    if record.kind == "memset":
        return record.facts["bytes"]
    if record.kind == "memcpy":
        return 2 * record.facts["bytes"]
    if record.kind == "host":
        return 0
    if "m" in record.facts:
        m, n, k = (record.facts[name] for name in ("m", "n", "k"))
        return (m * k + k * n + m * n) * record.facts["batch"] * ITEMSIZE[record.facts["type"]]
    return counted.get((part_of(record), record.name))


def account(records: list[Record], counted: Bytes) -> dict[str, Any]:
    """Nodes, launches and bytes of a captured step, by part and origin.

    records: the log of the step that is captured. counted: bytes of one launch of a generated kernel, of one
    of this project's kernels, and under ("update", "aten") of all of ATen's in the update.
    """
    nodes = [record for record in records if record.graph and record.kind in NODES]
    empty = {"launches": 0, "bytes": 0, "uncounted": 0}
    parts: dict[str, dict[str, dict[str, int]]] = {part: {} for part in PARTS}
    for node in nodes:
        part, origin = part_of(node), node.origin if node.kind == "kernel" else node.kind
        cell = parts[part].setdefault(origin, dict(empty))
        moved = bytes_of(node, counted)
        cell["launches"] += 1
        cell["bytes"] += round(moved or 0)
        cell["uncounted"] += moved is None
    if "aten" in parts["update"] and ("update", "aten") in counted:
        parts["update"]["aten"] |= {"bytes": round(counted["update", "aten"]), "uncounted": 0}
    cells = [cell for part in parts.values() for cell in part.values()]
    totals = {name: sum(cell[name] for cell in cells) for name in empty}
    return {"nodes": len(nodes), **totals, "parts": parts}


def launches_by_kernel(records: list[Record]) -> dict[tuple[str, str, str], int]:
    """Number of launches of each kernel, by part, origin and name."""
    found: dict[tuple[str, str, str], int] = {}
    for node in records:
        if node.graph and node.kind == "kernel":
            key = part_of(node), node.origin, node.name
            found[key] = found.get(key, 0) + 1
    return found


def predicted(arch: str, batch: int, length: int) -> Bytes:
    """Bytes of one launch of this project's kernels, and of all of ATen's in the update."""
    sums: dict[tuple[str, str], list[float]] = {}
    for row in launches.step(arch, batch, length, MACHINES["H200"]):
        part = "forward" if row.part == "target" else row.part
        if row.kernel.endswith("_kernel"):
            total = sums.setdefault((part, row.kernel), [0, 0])
            total[0] += row.bytes
            total[1] += row.launches
        elif part == "update":
            sums.setdefault((part, "aten"), [0, 1])[0] += row.bytes
    return {key: moved / count for key, (moved, count) in sums.items()}


@contextmanager
def estimates(found: Bytes) -> Iterator[None]:
    """A context that collects Inductor's byte estimate for each kernel that it generates."""
    from torch._inductor.codegen.triton import TritonScheduling
    from torch._inductor.virtualized import V

    scheduling: Any = TritonScheduling
    define = scheduling.define_kernel

    def defined(self: Any, src_code: Any, node_schedule: Any, kernel: Any, *more: Any) -> str:
        name = define(self, src_code, node_schedule, kernel, *more)
        part = "backward" if V.graph.is_backward else "forward"
        found.setdefault((part, name), kernel.estimate_kernel_num_bytes())
        return name

    scheduling.define_kernel = defined
    try:
        yield
    finally:
        scheduling.define_kernel = define


def usage(cache: Path) -> dict[str, dict[str, int]]:
    """The maximum registers and stack bytes over the variants of each generated kernel in a Triton cache."""
    found: dict[str, dict[str, int]] = {}
    for path in sorted(cache.rglob("triton_*.cubin")):
        registers, stack = registers_and_stack(path)
        row = found.setdefault(path.stem[:NAME_LENGTH], {"registers": 0, "stack": 0})
        found[path.stem[:NAME_LENGTH]] = {
            "registers": max(row["registers"], registers),
            "stack": max(row["stack"], stack),
        }
    return found


def phases(times: dict[str, list[float]]) -> dict[str, float]:
    """Seconds of compiler phases of at least one second; phases may be nested."""
    sums = {re.sub(r"\W+", "_", name): round(sum(each), 1) for name, each in times.items()}
    return dict(sorted(((n, s) for n, s in sums.items() if s >= 1), key=lambda item: -item[1]))


def record(arch: str, batch: int, length: int, caches: Path) -> dict[str, Any]:
    """Compiles and captures a step on the stand-in library, which is preloaded into this process."""
    from torch._dynamo.utils import compilation_time_metrics

    from hrm.engine.engine import Engine

    stand_in = active()
    assert stand_in is not None
    words = ["--arch", arch, "preset=full", "device=cuda", f"global_batch_size={batch}"]
    config, data = parse_args(words), metadata(length, 11 if length == 81 else 12)
    engine, batches = Engine(config, data, total_steps=1000, device="cuda"), random_batches(config, data)
    counted: Bytes = {}

    def busy() -> float:
        return sum(
            sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )

    with estimates(counted):
        start, used = time.perf_counter(), busy()
        engine.train_step(next(batches))
        first = {"wall": round(time.perf_counter() - start, 1), "processors": round(busy() - used, 1)}
    for _ in range(WARM_UP - 1):
        engine.train_step(next(batches))
    log = caches / "captured.log"
    with stand_in.log(log), opened_by(stand_in.part):
        engine.train_step(next(batches))
    records = read_log(log)
    counted |= predicted(arch, batch, length)
    used_by = usage(caches)
    generated = [
        {"part": part, "kernel": name, "launches": count, "bytes": counted.get((part, name))}
        | used_by.get(name[:NAME_LENGTH], {})
        for (part, origin, name), count in sorted(launches_by_kernel(records).items())
        if origin == "inductor"
    ]
    return {
        "arch": arch,
        "B": batch,
        "S": length,
        **account(records, counted),
        "violations": stand_in.violations,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "first_step_s": first,
        "compile_s": phases(compilation_time_metrics),
        "generated": generated,
        "commit": commit(),
        "torch": torch.__version__,
        "triton": sys.modules["triton"].__version__,
        "processor": processor(),
    }


def commit() -> str:
    """The commit of this checkout."""
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def keep(row: dict[str, Any], label: str) -> None:
    """Adds a row to RESULTS; it replaces the row of the same label, model, batch and length."""
    what = "a compiled step as captured, recorded without a GPU; only compile times are measured"
    document: dict[str, Any] = {"what": what, "steps": {}}
    if RESULTS.exists():
        document = json.loads(RESULTS.read_text())
    key = [row[name] for name in ("arch", "B", "S")]
    rows = document["steps"].setdefault(label, [])
    rows[:] = [old for old in rows if [old[name] for name in ("arch", "B", "S")] != key] + [row]
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


def table(row: dict[str, Any]) -> str:
    """A table of a recorded step by part and origin."""
    lines = [f"{'part':<10}{'kernels of':<12}{'launches':>9}{'MB':>10}{'uncounted':>11}"]
    for part, origins in row["parts"].items():
        for origin, cell in sorted(origins.items()):
            moved = f"{cell['bytes'] / 1e6:>10.1f}{cell['uncounted']:>11}"
            lines.append(f"{part:<10}{origin:<12}{cell['launches']:>9}{moved}")
    lines.append(f"{'step':<22}{row['launches']:>9}{row['bytes'] / 1e6:>10.1f}{row['uncounted']:>11}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.captured", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", choices=launches.ARCHITECTURES, default=launches.ARCHITECTURES[0])
    parser.add_argument("--batch", type=positive, default=launches.BATCH, help="default %(default)s")
    parser.add_argument("--length", type=positive, default=81, help="cells; default %(default)s")
    parser.add_argument("--write", choices=LABELS, help=f"store the row in {RESULTS.name}")
    options = parser.parse_args(argv)
    reason = fault()
    if reason is not None:
        parser.error(f"{reason}; make cuda-host creates an environment")
    if active() is None:
        with tempfile.TemporaryDirectory() as caches:
            names = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
            variables = {name: str(Path(caches) / folder) for name, folder in names.items()}
            words = ["-m", "bench.captured", *(sys.argv[1:] if argv is None else argv)]
            status = os.spawnve(os.P_WAIT, sys.executable, [sys.executable, *words], environment(**variables))  # noqa: S606
        return status
    caches_of_run = Path(os.environ["TRITON_CACHE_DIR"])
    caches_of_run.mkdir(parents=True, exist_ok=True)
    row = record(options.arch, options.batch, options.length, caches_of_run)
    spills = [kernel["kernel"] for kernel in row["generated"] if kernel.get("stack")]
    print(f"The captured step of {row['arch']}, B={row['B']}, S={row['S']}, {row['nodes']} nodes.")
    print(f"\n{table(row)}\n")
    print(f"generated kernels: {len(row['generated'])}; with spills: {', '.join(spills) or 'none'}")
    print(f"first step: {row['first_step_s']} s; phases of compiling, s: {row['compile_s']}")
    if options.write:
        keep(row, options.write)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
