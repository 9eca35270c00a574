"""Lists every kernel launch of the engine's training step with its bytes and FLOP, without a GPU.

`python -m bench.launches` does a dry run of a step with the operations of a CUDA device, and prints its
launches by part and kernel with their minimum time on a machine; `--write` stores those of the published
models in bench/results/launches.json.

Nothing here is a measurement. The step is that of mode=eager; a compiler fuses a chain of elementwise kernels
into one launch. Bytes and FLOP are counted as in bench/counts.py: a launch's tensors once each, updated
tensors twice, and products without the padding of tiles. An ATen call counts as one launch, although a few
small calls launch more (the backward of an embedding or of a slice, a binary cross-entropy).
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from bench.ceilings import MACHINES, Ceilings, roofline_time
from bench.counts import Traffic, Work, stored, tensors_in
from bench.implementations import metadata
from bench.roofline import captured
from hrm.common.errors import run_command
from hrm.config.load import parse_args
from hrm.engine.dry_run import Observer, Rehearsal
from kernels.__main__ import positive
from kernels.backend import Launch

RESULTS = Path(__file__).parent / "results" / "launches.json"
ARCHITECTURES, BATCH, LENGTHS = ("v1", "gated"), 768, (81, 900)
# The fastest published recipe for 85 % on Sudoku-Extreme: its batch, the machines here, and its author's
# seconds per step: 8,000 steps with evaluations in 48 minutes on an RTX 5090 (arXiv 2601.19085).
RECORD, RECORD_BATCH, RECORD_MACHINES, RECORD_S = "sic", 384, ("H200", "H100", "RTX 5090"), 0.35
PARTS = ("forward", "target", "backward", "update")
# Part of the step for each named range; work outside all ranges belongs to the update: zeroing gradients and
# casting them to float32, writing the carry back, metric sums.
REGIONS = {"forward": "forward", "target pass": "target", "backward": "backward"}
# Calls that overwrite their first tensor.
OVERWRITES = ("aten::copy_", "aten::fill_", "aten::zero_")

Arguments = dict[str, Any]


def _gate_mix_backward(a: Arguments) -> int:
    """Recomputed hidden units and gates, then the gradients of the units and the required sources."""
    sources = 2 if a["x_ptr"] is None else 3
    asking = sum(a[name] is not None for name in ("dz_ptr", "do_ptr", "dx_ptr"))
    return 2 * a["M"] * a["R"] * a["D"] * (3 * sources + asking)


def _gate_mix(a: Arguments) -> int:
    """One forward and one backward product of all rows with each source's columns."""
    return 4 * a["M"] * a["R"] * a["D"] * (2 if a["x_ptr"] is None else 3)


def _product(a: Arguments) -> int:
    return 2 * a["M"] * a["N"] * a["K"]


def _scores(a: Arguments) -> int:
    """One product of queries and keys, over all heads."""
    return 2 * a["qkv_ptr"].shape[0] * a["queries"] * a["T"] * a["num_heads"] * 2 * a["HALF"]


# FLOP of the kernels that multiply matrices, from their named arguments.
FLOP: dict[str, Callable[[Arguments], int]] = {
    "_linear_scaled_forward_kernel": _product,
    "_linear_rms_forward_kernel": _product,
    "_linear_swiglu_forward_kernel": lambda a: 2 * _product(a),
    "_swiglu_mlp_backward_kernel": _product,
    "_normed_swiglu_forward_kernel": lambda a: 2 * _product(a),
    "_attention_forward_kernel": lambda a: 2 * _scores(a),
    "_attention_backward_kernel": lambda a: 5 * _scores(a),
    "_gate_mix_forward_kernel": _gate_mix,
    "_gate_mix_backward_kernel": _gate_mix_backward,
    "_gate_mix_weights_kernel": _gate_mix,
    "_lm_head_forward_kernel": lambda a: 2 * a["z_ptr"].shape[0] * a["S"] * a["D"] * a["V"],
    "_lm_head_backward_kernel": lambda a: 6 * a["M"] * a["D"] * a["V"],
}
# Arguments that are both read and written.
UPDATED = {
    "_adam_atan2_kernel": ("param_ptr", "exp_avg_ptr", "exp_avg_sq_ptr"),
    "_muon_momentum_kernel": ("momentum_ptr",),
    "_muon_update_kernel": ("param_ptr",),
}


def work_of_launch(launch: Launch) -> Work:
    """Bytes and FLOP of one launch of this project's kernels."""
    name = launch.kernel.__name__
    a = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.constants
    if name == "_sign_sgd_kernel":
        # Count no more rows of the table than there are gradients.
        a["table_ptr"] = a["grad_ptr"]
    updated = UPDATED.get(name, ("table_ptr",))
    moved = sum(stored(x) * (2 if key in updated else 1) for key, x in a.items() if isinstance(x, Tensor))
    return Work(moved, FLOP[name](a) if name in FLOP else 0)


class Row(NamedTuple):
    """Launches of a kernel in a part of a step. ideal_s: the sum of their minimum times."""

    part: str
    kernel: str
    launches: int
    bytes: int
    flop: int
    ideal_s: float


class Launches(Observer):
    """Records each launch of a step: its part, the name of its kernel or ATen call, its work."""

    def __init__(self) -> None:
        super().__init__()
        self.works: dict[tuple[str, str], list[Work]] = {}

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        name = func.name().split(".")[0]
        if func.is_view or name in Traffic.FREE:
            return
        tensors = tensors_in((args, kwargs)) + ([] if name in OVERWRITES else tensors_in(out))
        count = flop_registry.get(func.overloadpacket)
        flop = 0 if count is None else count(*args, **kwargs, out_val=out)
        self._add(name.removeprefix("aten::"), Work(sum(map(stored, tensors)), flop))

    def launched(self, launch: Launch) -> None:
        self._add(launch.kernel.__name__, work_of_launch(launch))

    def _add(self, name: str, work: Work) -> None:
        part = next((REGIONS[region] for region in reversed(self.regions) if region in REGIONS), "update")
        self.works.setdefault((part, name), []).append(work)

    def rows(self, ceilings: Ceilings) -> list[Row]:
        """Rows by part, the slowest first."""
        rows = [
            Row(
                part,
                kernel,
                len(works),
                sum(work.bytes for work in works),
                sum(work.flop for work in works),
                sum(roofline_time(work.bytes, work.flop, ceilings) for work in works),
            )
            for (part, kernel), works in self.works.items()
        ]
        return sorted(rows, key=lambda row: (PARTS.index(row.part), -row.ideal_s, row.kernel))


def rehearsed(arch: str, batch: int, length: int, preset: str = "full") -> Launches:
    """The launches of a published model's training step in bfloat16 on a CUDA device."""
    words = [f"preset={preset}", "device=cpu", "dtype=bfloat16", f"global_batch_size={batch}"]
    config = parse_args(["--arch", arch, *words])
    launches = Launches()
    rehearsal = Rehearsal(config, metadata(length, 11), torch.device("cuda"), launches)
    # The first step also creates persistent tensors.
    rehearsal.step()
    launches.works.clear()
    rehearsal.step()
    return launches


def step(arch: str, batch: int, length: int, ceilings: Ceilings) -> list[Row]:
    """The launches of a step by part and kernel, with their minimum time."""
    return rehearsed(arch, batch, length).rows(ceilings)


def record() -> list[dict[str, Any]]:
    """The step of preset=record, Muon included, on each machine: launches, bytes, FLOP and minimum time."""
    launches = rehearsed(RECORD, RECORD_BATCH, LENGTHS[0], "record")
    return [
        {"arch": RECORD, "B": RECORD_BATCH, "machine": name, **totals(launches.rows(MACHINES[name]))}
        for name in RECORD_MACHINES
    ]


def totals(rows: list[Row]) -> dict[str, float]:
    """The sums of launches, bytes, FLOP and minimum time over rows."""
    return {name: sum(getattr(row, name) for row in rows) for name in Row._fields[2:]}


def predictions(machine: str, ceilings: Ceilings) -> dict[str, Any]:
    """The committed counts: the published models at both lengths."""
    steps = []
    for arch in ARCHITECTURES:
        for length in LENGTHS:
            rows = step(arch, BATCH, length, ceilings)
            parts = {part: totals([row for row in rows if row.part == part]) for part in PARTS}
            steps.append(
                {"arch": arch, "B": BATCH, "S": length, **totals(rows), "parts": parts}
                | {"kernels": [row._asdict() for row in rows]}
            )
    return {
        "what": "predictions of a step launch by launch, none of them measured",
        "machine": machine,
        "ceilings": ceilings._asdict(),
        "dtype": "bfloat16",
        "steps": steps,
        "record": {"published_s": RECORD_S, "steps": record()},
    }


def print_record() -> None:
    print(
        f"One step of {RECORD}, B={RECORD_BATCH}, bfloat16, minimum times by launch; only the author's "
        f"{RECORD_S} s are a measurement."
    )
    for row in record():
        print(
            f"{row['machine']:<10}{row['launches']:>6} launches{row['bytes'] / 1e9:>8.1f} GB"
            f"{row['flop'] / 1e12:>7.1f} TFLOP{row['ideal_s']:>8.3f} s"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.launches", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", choices=(*ARCHITECTURES, RECORD, "urm"), default=ARCHITECTURES[0])
    parser.add_argument("--batch", type=positive, default=BATCH, help="sequences; default %(default)s")
    parser.add_argument("--length", type=positive, default=LENGTHS[0], help="cells; default %(default)s")
    parser.add_argument("--machine", choices=MACHINES, default="H200", help="whose ceilings")
    parser.add_argument("--write", action="store_true", help=f"store the H200's rows in {RESULTS.name}")
    parser.add_argument(
        "--record", action="store_true", help=f"the step of {RECORD} on {len(RECORD_MACHINES)} machines"
    )
    options = parser.parse_args(argv)
    if options.record:
        print_record()
        return 0
    ceilings = MACHINES[options.machine]
    rows = step(options.arch, options.batch, options.length, ceilings)
    print(
        f"One step of {options.arch}, B={options.batch}, S={options.length}, bfloat16, launch by launch, "
        f"at best on {options.machine} ({ceilings.source}). No number is a measurement."
    )
    print(f"\n{'part':<10}{'kernel':<34}{'launches':>9}{'MB':>11}{'GFLOP':>10}{'us':>10}")

    def line(part: str, kernel: str, rows: list[Row]) -> None:
        launches, moved, flop, seconds = totals(rows).values()
        numbers = f"{launches:>9}{moved / 1e6:>11.1f}{flop / 1e9:>10.1f}{seconds * 1e6:>10.1f}"
        print(f"{part:<10}{kernel:<34}{numbers}")

    for row in rows:
        line(row.part, row.kernel, [row])
    print(f"\n{captured(options.arch, options.batch, options.length)}")
    for part in PARTS:
        line(part, "", [row for row in rows if row.part == part])
    line("step", "", rows)
    if options.write:
        RESULTS.write_text(json.dumps(predictions("H200", MACHINES["H200"]), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
