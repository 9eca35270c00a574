"""What each operation and the whole training step must move and multiply, and the time that takes at best.

`python -m bench.roofline` prints predictions, per operation and per step, for a machine by its ceilings;
`--machine here` measures those of this GPU first; `--write` keeps the H200's as bench/results/roofline.json.

Nothing here is a measurement, except the ceilings marked so. A launch takes the longer of its bytes at full
bandwidth and its FLOP at full rate; launches follow one another; starting them is free. So small batches are
predicted too fast: the number of launches stands beside the time, some microseconds each without a CUDA
graph. The full rate is that of a large cube, and no product of this model is one: a second table has the time
at published rates of narrow products (bench/ceilings.py). bench/counts.py says what counts as bytes and FLOP.
Three ways to the same step:

- `eager`: PyTorch's own kernels, one per ATen call of the references;
- `compiled`: every chain of elementwise calls is one kernel, products and attention are kernels of their own,
  which is what Inductor makes;
- `kernels`: this project's, with the norm, SwiGLU and the rotation inside products and attention (the
  rotation apart where sequences are longer than attention's own kernel takes).
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import kernels
from bench.ceilings import LIBRARY, MACHINES, OVERLAPPED, OWN, Ceilings, measure, published, roofline_time
from bench.counts import (
    OPERATIONS,
    Shape,
    Work,
    adam_atan2,
    attention,
    eager,
    library_attention,
    linear_rms,
    linear_scaled,
    linear_swiglu,
    lm_head,
    meta,
    product,
    rope,
    sign_sgd,
    swiglu_mlp_launches,
    traced,
)
from hrm.common.errors import run_command
from kernels.attention import MAX_LENGTH

RESULTS = Path(__file__).parent / "results" / "roofline.json"
BATCHES, LENGTHS = (1, 96, 384, 768), (82, 901)
# Steps as Inductor compiles them and a graph holds them, recorded by bench/captured.py.
CAPTURED = RESULTS.with_name("captured.json")
VARIANTS = ("eager", "compiled", "kernels")


# ----------------------------------------------------------------------------------------- the training step


Works = tuple[Work, ...]


@dataclass(frozen=True)
class Row:
    """Launches that a step repeats. part: forward, target, backward or update."""

    part: str
    name: str
    count: int
    works: Works

    def time(self, ceilings: Ceilings) -> float:
        return self.count * sum(roofline_time(work.bytes, work.flop, ceilings) for work in self.works)

    def narrow_time(self, ceilings: Ceilings, own: float = OWN) -> float:
        """Seconds with products at published rates of narrow ones; own: the rate of products in Triton."""
        triton = self.name.startswith(("linear_", "swiglu_mlp"))
        return self.time(published(ceilings, own if triton else LIBRARY))

    def total(self, quantity: str) -> int:
        """The sum of its works' bytes, flop or launches."""
        return self.count * sum(getattr(work, quantity) for work in self.works)


def _operation(op: str, s: Shape, direction: str, variant: str) -> Works:
    return tuple(eager(op, s)[direction]) if variant == "eager" else (OPERATIONS[op](s)[direction],)


def _pass(s: Shape, reads: int, writes: int = 1) -> Works:
    """An elementwise kernel over (B, T, D)."""
    return (Work((reads + writes) * s.tokens * s.D * s.dtype.itemsize),)


def _attention(s: Shape, variant: str, queries: int | None = None) -> dict[str, Works]:
    if variant == "kernels" and s.T <= MAX_LENGTH:
        return {direction: (work,) for direction, work in attention(s, queries).items()}
    core = library_attention(s, queries)
    if variant == "eager":
        whole = eager("attention", s)
        return {direction: (*whole[direction][:-1], core[direction]) for direction in whole}
    turn = rope(s)["forward"]
    # Backward, dq and dk are turned back and laid beside dv: one kernel of the compiler's, or rope's own
    # between two that lay tensors side by side.
    back = _pass(s, 3, 3) if variant == "compiled" else (*_pass(s, 2, 2), turn, *_pass(s, 3, 3))
    return {"forward": (turn, core["forward"]), "backward": (core["backward"], *back)}


def block(s: Shape, variant: str, *, gradient: bool = False, queries: int | None = None) -> dict[str, Works]:
    """The forward launches of one block by name. queries: it computes its first positions only."""
    rest = s if queries is None else replace(s, T=queries)
    attend = _attention(s, variant, queries)["forward"]
    if variant == "kernels" and not gradient:
        return {
            "linear_scaled: q, k, v": (linear_scaled(s)["forward"],),
            "attention": attend,
            "linear_rms: o": (linear_rms(rest, s.D)["forward"],),
            "linear_swiglu": (linear_swiglu(rest)["forward"],),
            "linear_rms: down": (linear_rms(rest)["forward"],),
        }
    feed_forward: dict[str, Works]
    if variant == "kernels":
        activated, down = swiglu_mlp_launches(rest)["forward"]
        feed_forward = {"swiglu_mlp": (activated,), "product: down": (down,)}
    else:
        feed_forward = {
            "product: gate, up": (product(rest, s.D, 2 * s.inner)["forward"],),
            "swiglu": _operation("swiglu", rest, "forward", variant),
            "product: down": (product(rest, s.inner, s.D)["forward"],),
        }
    return {
        "product: q, k, v": (product(s, s.D, 3 * s.D)["forward"],),
        "attention": attend,
        "product: o": (product(rest, s.D, s.D)["forward"],),
        "rms_norm": 2 * _operation("rms_norm", rest, "forward", variant),
        **feed_forward,
    }


def block_backward(s: Shape, variant: str) -> dict[str, Works]:
    """The backward launches of one block by name."""
    shapes = ((s.D, 3 * s.D), (s.D, s.D), (s.D, 2 * s.inner), (s.inner, s.D))
    norm = _operation("rms_norm", s, "backward", variant)
    # A residual has two gradients: the compiler and the kernels sum them where the norm reads them.
    norm = (*norm, *_pass(s, 2)) if variant == "eager" else (Work(norm[0].bytes + _pass(s, 1, 0)[0].bytes),)
    rows: dict[str, Works] = {
        "products": tuple(product(s, *shape)["backward"] for shape in shapes),
        "attention": _attention(s, variant)["backward"],
        "rms_norm, residual sums": 2 * norm,
        "swiglu": _operation("swiglu", s, "backward", variant),
    }
    if variant == "kernels":
        differentiated, *products = swiglu_mlp_launches(s)["backward"]
        rows["products"] = (*rows["products"][:2], *products)
        rows["swiglu_mlp"] = (differentiated,)
        del rows["swiglu"]
    return rows


def combine(s: Shape, variant: str, gated: bool, sources: int) -> dict[str, Works]:
    """A reasoning module's sources made one; a sum's gradient is handed on as it is."""
    if not gated:
        return {"forward": _pass(s, 2) * (sources - 1) if variant == "eager" else _pass(s, sources)}
    if variant != "compiled":
        op = "gate_mix" if sources == 3 else "gate_mix_two"
        return {direction: _operation(op, s, direction, variant) for direction in ("forward", "backward")}
    # Products apart; beside them the sources laid together, the activation and the mixing.
    wide, row = sources * s.D, s.tokens * s.dtype.itemsize
    first, second = product(s, wide, s.R), product(s, s.R, wide)
    return {
        "forward": (
            Work(2 * row * wide),
            first["forward"],
            Work(2 * row * s.R),
            second["forward"],
            Work(row * (2 * wide + s.D)),
        ),
        "backward": (
            Work(row * (3 * wide + s.D)),
            second["backward"],
            Work(3 * row * s.R),
            first["backward"],
            Work(3 * row * wide),
        ),
    }


def update(s: Shape, variant: str, gated: bool) -> dict[str, Works]:
    """The optimisers, the weights' way to the forward's dtype and their gradients' way back."""
    count, module_calls = s.parameters(gated), s.H_cycles * (s.L_cycles + 1)
    cast = (Work((4 + s.dtype.itemsize) * count),) if s.dtype.itemsize < 4 else ()
    # A linear layer casts its weight whenever it runs; each module holds about half of the weights and is
    # called in two passes. The compiler casts once, the kernels' optimiser writes the copies.
    casts = {"eager": module_calls, "compiled": 1, "kernels": 0}[variant]
    if variant == "eager":
        flat = [meta(count, dtype=torch.float32) for _ in range(4)]
        scalars: dict[str, Any] = {"lr": meta(dtype=torch.float32), "step": meta(dtype=torch.int64)}
        recipe: dict[str, Any] = scalars | {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}
        adam = tuple(traced(lambda *flat: kernels.adam_atan2(*flat, **recipe), *flat)["forward"])
    else:
        adam = (adam_atan2(s, gated)["update"] if variant == "kernels" else Work(28 * count),)
    return {
        "weights to the forward's dtype": casts * cast,
        "gradients to float32, summed, zeroed": (*cast, Work(12 * count), Work(4 * count)),
        # One for clipping, the log, and whether the update is made.
        "norm of the gradient": (Work(4 * count),),
        "adam_atan2": adam,
        "sign_sgd": (sign_sgd(s)["update"],),
    }


def step(s: Shape, variant: str, *, gated: bool = False, whole_target: bool = False) -> list[Row]:
    """Every launch of one training step of the model that counts, with the one-step gradient.

    whole_target: the target pass computes all of its last block, as the official code does; otherwise its
    first position alone, which is all that the Q head reads.
    """
    calls = {"L": s.H_cycles * s.L_cycles, "H": s.H_cycles}
    blocks, taught = s.layers * sum(calls.values()), 2 * s.layers
    rows: list[Row] = []

    def add(part: str, count: int, launches: dict[str, Works]) -> None:
        rows.extend(Row(part, name, count, works) for name, works in launches.items())

    add("forward", blocks - taught, block(s, variant))
    add("forward", taught, block(s, variant, gradient=True))
    add("target", blocks - 1, block(s, variant))
    add("target", 1, block(s, variant, queries=None if whole_target else 1))
    add("backward", taught, block_backward(s, variant))
    for module, sources in (("L", 3), ("H", 2)):
        mixed = combine(s, variant, gated, sources)
        for part in ("forward", "target"):
            add(part, calls[module], {f"combine: {module}": mixed["forward"]})
        if gated:
            add("backward", 1, {f"combine: {module}": mixed["backward"]})
    if variant == "kernels":
        # The norm that the last block of a call without gradient leaves to its reader.
        add("forward", sum(calls.values()) - 2, {"a module's last norm": _pass(s, 1)})
        add("target", sum(calls.values()), {"a module's last norm": _pass(s, 1)})

    head = product(replace(s, T=s.T - s.P), s.D, s.V)
    for direction in ("forward", "backward"):
        losses: Works = (lm_head(s)[direction],)
        if variant != "kernels":
            losses = (head[direction], *_operation("stablemax_cross_entropy", s, direction, variant))
        add(direction, 1, {"lm_head and loss": losses})
    # Halted sequences' states are set anew; the embedding is gathered, laid together and scaled.
    add("forward", 2, {"carry": _pass(s, 1)})
    add("forward", 1, {"embedding": _pass(s, 0) + (2 * _pass(s, 1) if variant == "eager" else ())})
    # The gradient of the token table is a product with the one-hot tokens.
    add("backward", 1, {"embedding": (Work(_pass(s, 1, 0)[0].bytes, 2 * s.cells * s.D * s.V),)})
    add("update", 1, update(s, variant, gated))
    return rows


def totals(rows: list[Row], ceilings: Ceilings) -> dict[str, float]:
    """The sums of a step: predicted seconds, FLOP, bytes, launches, and the floor that arithmetic sets.

    narrow_s: predicted seconds with products at published rates of narrow ones on Hopper.
    narrow_overlapped_s: the same if this project's products overlap the ends of their tiles.
    """
    flop = sum(row.total("flop") for row in rows)
    return {
        "predicted_s": sum(row.time(ceilings) for row in rows),
        "narrow_s": sum(row.narrow_time(ceilings) for row in rows),
        "narrow_overlapped_s": sum(row.narrow_time(ceilings, OVERLAPPED) for row in rows),
        "arithmetic_floor_s": flop / ceilings.flop_per_s,
        "flop": flop,
        "bytes": sum(row.total("bytes") for row in rows),
        "launches": sum(row.total("launches") for row in rows),
    }


# ------------------------------------------------------------------------------------------------ the command


def predictions(machine: str, ceilings: Ceilings) -> dict[str, Any]:
    """All that the command prints, for JSON."""
    operations: list[dict[str, Any]] = []
    for B in BATCHES:
        s = Shape(B)
        for op, count in OPERATIONS.items():
            for direction, work in count(s).items():
                row = {"op": op, "direction": direction, "B": B, "T": s.T}
                seconds = roofline_time(work.bytes, work.flop, ceilings)
                row |= {"bytes": work.bytes, "flop": work.flop, "predicted_s": seconds}
                operations.append(row)
    steps: list[dict[str, Any]] = [
        {"arch": "gated" if gated else "v1", "B": B, "T": T, "variant": variant}
        | totals(step(Shape(B, T), variant, gated=gated), ceilings)
        for gated in (False, True)
        for T in LENGTHS
        for B in BATCHES
        for variant in VARIANTS
    ]
    return {
        "what": "predictions by the roofline, none of them measured",
        "machine": machine,
        "ceilings": ceilings._asdict(),
        "dtype": "bfloat16",
        "operations": operations,
        "steps": steps,
    }


def captured(arch: str, batch: int, length: int) -> str:
    """One line on the latest recorded step of a model, batch and number of cells, "" if there is none."""
    steps = json.loads(CAPTURED.read_text())["steps"] if CAPTURED.exists() else {}
    wanted = (arch, batch, length)
    rows = [row for label in ("after", "before") for row in steps.get(label, [])]
    row = next((row for row in rows if (row["arch"], row["B"], row["S"]) == wanted), None)
    if row is None:
        return ""
    return (
        f"captured, as Inductor compiles it: {arch}, B={batch}, S={length}, {row['launches']} launches, "
        f"{row['bytes'] / 1e6:.1f} MB, without the bytes of {row['uncounted']} launches"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--machine",
        default="H200",
        choices=[*MACHINES, "here"],
        help="whose ceilings; here: measured on this GPU",
    )
    parser.add_argument("--write", action="store_true", help=f"keep the predictions as {RESULTS.name}")
    options = parser.parse_args(argv)
    if options.machine == "here" and not torch.cuda.is_available():
        parser.error(f"--machine here needs a CUDA device; name one of {', '.join(MACHINES)}")
    ceilings = measure() if options.machine == "here" else MACHINES[options.machine]
    result = predictions(options.machine, ceilings)
    print(
        f"Predictions for {options.machine}: {ceilings.bytes_per_s / 1e12:.2f} TB/s, "
        f"{ceilings.flop_per_s / 1e12:.0f} TFLOP/s bfloat16 ({ceilings.source}). None is a measurement."
    )
    print(f"\nOne call at B={BATCHES[-1]}, T={LENGTHS[0]}, bfloat16, at best")
    print(f"{'operation':<26}{'direction':<10}{'MB':>9}{'GFLOP':>9}{'us':>9}  bound by")
    for row in result["operations"]:
        if row["B"] == BATCHES[-1]:
            bound = "bytes" if row["bytes"] / ceilings.bytes_per_s >= row["predicted_s"] else "FLOP"
            print(
                f"{row['op']:<26}{row['direction']:<10}{row['bytes'] / 1e6:>9.1f}{row['flop'] / 1e9:>9.2f}"
                f"{row['predicted_s'] * 1e6:>9.2f}  {bound}"
            )
    print("\nA training step of the published model, ms (launches)")
    print(f"{'arch':<7}{'B':>5}{'T':>5}{'TFLOP':>9}{'floor':>9}" + "".join(f"{v:>18}" for v in VARIANTS))
    for first in range(0, len(result["steps"]), len(VARIANTS)):
        rows = result["steps"][first : first + len(VARIANTS)]
        head = rows[-1]
        cells = "".join(f"{row['predicted_s'] * 1e3:>11.2f} ({row['launches']})".rjust(18) for row in rows)
        print(
            f"{head['arch']:<7}{head['B']:>5}{head['T']:>5}{head['flop'] / 1e12:>9.2f}"
            f"{head['arithmetic_floor_s'] * 1e3:>9.2f}{cells}"
        )
    print("\nThe same at published rates of narrow products on Hopper, ms")
    print(f"{'arch':<7}{'B':>5}{'T':>5}" + "".join(f"{v:>18}" for v in (*VARIANTS, "tiles overlapped")))
    for first in range(0, len(result["steps"]), len(VARIANTS)):
        rows = result["steps"][first : first + len(VARIANTS)]
        times = [*(row["narrow_s"] for row in rows), rows[-1]["narrow_overlapped_s"]]
        cells = "".join(f"{seconds * 1e3:>18.2f}" for seconds in times)
        print(f"{rows[0]['arch']:<7}{rows[0]['B']:>5}{rows[0]['T']:>5}{cells}")
    lines = [captured(arch, batch, 81) for arch in ("v1", "gated") for batch in BATCHES]
    print(*filter(None, lines), sep="\n")
    if options.write:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
