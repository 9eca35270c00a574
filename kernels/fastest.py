"""Times every implementation of each operation, and every tile size, and chooses the fastest.

A candidate is checked against the reference in float64 before it is timed; a candidate that is wrong, cannot
run or cannot be captured is left out. The reference is also a candidate, so no choice is slower than it at
the measured sizes. Cases, timer and time limit are arguments.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import backend
from kernels.backend import Table, Tile
from kernels.cases import NOT_MEASURED, Case, Sizes, cases

# Tolerance relative to the largest value: a few float32 ulp, or a quarter ulp of narrow types.
ABSOLUTE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2.5e-4, torch.bfloat16: 2e-3}
# Allowed share of differing integers, such as predictions of nearly equal logits.
INTEGERS_THAT_MAY_DIFFER = 1e-4
# Maximum number of float64 results per position, in multiples of the hidden size.
CHECKED_LAYERS = 64
# The modules of other libraries.
LIBRARIES = {"flash": ("flash_attn", "flash_attn_interface"), "quack": ("quack",)}

Call = Callable[[], object]
Timer = Callable[[Call], float]
Clock = Callable[[], float]


# -------------------------------------------------------------------------------- which is the fastest


class Unfit(Exception):
    """A candidate that must not be timed, with the reason."""


class Candidate(NamedTuple):
    """An implementation to time. prepare: checks it and returns the call to time, or raises."""

    name: str
    prepare: Callable[[], Call]


def timed(candidates: Sequence[Candidate], timer: Timer, left: Clock) -> dict[str, float | str]:
    """Each candidate's seconds, or the reason why it was left out. left: returns the remaining seconds."""
    found: dict[str, float | str] = {}
    for name, prepare in candidates:
        if left() <= 0:
            found[name] = "no time was left"
            continue
        try:
            found[name] = timer(prepare())
        # Compilers, launchers and libraries may raise any exception.
        except Exception as error:
            text = " ".join(str(error).split()) or "no reason given"
            found[name] = text[:200] if isinstance(error, Unfit) else f"{type(error).__name__}: {text}"[:200]
    return found


def fastest(found: dict[str, float | str], among: Sequence[str], baseline: str) -> str | None:
    """The fastest candidate, the first of equals; None if the baseline has no time."""
    seconds = {name: value for name in among if isinstance(value := found.get(name), float)}
    return min(seconds, key=lambda name: seconds[name]) if baseline in seconds else None


# ------------------------------------------------------------------------------------------------- the check


def distance(actual: Tensor, expected: Tensor) -> float:
    """The largest difference."""
    return (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0


def allowed_error(eager: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """The allowed error: twice the eager reference's error plus a small share of the largest value."""
    largest = truth.abs().max().item() if truth.numel() else 0.0
    return 2 * distance(eager, truth) + ABSOLUTE[dtype] * largest


Results = dict[str, Tensor]


def results(case: Case, call: Callable[..., Any], dtype: torch.dtype | None = None) -> Results:
    """A call's outputs, overwritten inputs and gradients; the case's own inputs stay unchanged.

    dtype: of the inputs; by default unchanged.
    """
    leaves = {
        name: tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_(name in case.gradients)
        for name, tensor in case.inputs.items()
    }
    outputs = call(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    shown = case.finish(outputs)
    found = {str(i): output.detach() for i, output in enumerate(shown) if isinstance(output, Tensor)}
    found |= {name: leaves[name].detach() for name in case.changed}
    taught = [output for output in outputs if output.requires_grad]
    if taught:
        grads = torch.autograd.grad(taught, [leaves[name] for name in case.gradients], _upstream(taught))
        found |= {f"d{name}": grad for name, grad in zip(case.gradients, grads, strict=True)}
    return found


def _upstream(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of outputs: equal values for every dtype, independent of the outputs."""
    drawn = []
    for seed, output in enumerate(outputs):
        generator = torch.Generator(output.device).manual_seed(seed)
        whole = torch.randn(output.shape, generator=generator, device=output.device)
        drawn.append(whole.bfloat16().to(output.dtype))
    return drawn


def check(found: Results, eager: Results, truth: Results, dtype: torch.dtype) -> None:
    """Raises Unfit if the error of a result exceeds the allowed error."""
    for name, value in found.items():
        if value.is_floating_point():
            error, bound = distance(value, truth[name]), allowed_error(eager[name], truth[name], dtype)
        else:
            error, wrong = ((each != truth[name]).sum().item() for each in (value, eager[name]))
            bound = 2 * wrong + INTEGERS_THAT_MAY_DIFFER * value.numel()
        # This comparison is also False for NaN.
        if not error <= bound:
            raise Unfit(f"wrong: output {name} is off by {error:.3g}, allowed {bound:.3g}")


# ---------------------------------------------------------------------------- one operation's candidates


@contextmanager
def forced(table: Table) -> Iterator[None]:
    """A context that makes choices by a table."""
    before = backend.install(table)
    try:
        yield
    finally:
        backend.install(before)


class _Trial:
    """A case at full size and at the size of the check, with the expected results."""

    def __init__(self, full: Case, small: Case) -> None:
        self.full, self.small = full, small
        self.dtype = next(iter(full.inputs.values())).dtype
        classes, self.tiles = self._asked_for(full)
        self.shape_class = classes[0] if classes else None
        self.classes = classes if small is full else [*classes, *self._asked_for(small)[0]]
        with forced(self.choosing(full.baseline, Table({}, {}))):
            self.eager = results(small, small.call)
        self.truth = results(small, small.call, torch.float64)

    def _asked_for(self, case: Case) -> tuple[list[str], dict[str, list[Tile]]]:
        """The shape classes and launch choices that the operations of a case query."""
        # A kernel that cannot run makes its queries before it fails.
        with suppress(Exception), backend.asking() as asked, forced(Table({}, {})):
            results(case, case.call)
        name = case.measured_as or case.op
        return [key for key, op in asked.classes.items() if op == name], asked.tiles

    def choosing(self, implementation: str, table: Table) -> Table:
        """A table that selects an implementation for this case."""
        both = {"compiled": implementation, "eager": implementation}
        return table._replace(choices=table.choices | dict.fromkeys(self.classes, both))

    def candidate(self, name: str, implementation: str, table: Table, compiled: bool = False) -> Candidate:
        """Runs the case with one implementation, and other choices from a table."""

        def prepare() -> Call:
            forcing = self.choosing(implementation, table)
            with forced(forcing):
                if compiled:
                    torch._dynamo.reset()
                    small = full = torch.compile(self.small.call, fullgraph=True, dynamic=False)
                    if self.small is not self.full:
                        full = torch.compile(self.full.call, fullgraph=True, dynamic=False)
                    found = results(self.small, small)
                else:
                    small, full = self.small.call, self.full.call
                    device = backend.device_of(next(iter(self.full.inputs.values())))
                    with backend.explained(device) as taken:
                        found = results(self.small, small)
                    if taken[self.full.op].implementation != implementation:
                        raise Unfit(taken[self.full.op].reason)
                check(found, self.eager, self.truth, self.dtype)
            return _repeated(self.full, full, forcing)

        return Candidate(name, prepare)


def _repeated(case: Case, call: Callable[..., Any], table: Table) -> Call:
    """A repeatable call on separate inputs, including the backward if there is one."""
    leaves = {
        name: tensor.detach().clone().requires_grad_(name in case.gradients)
        for name, tensor in case.inputs.items()
    }
    wanted = [leaves[name] for name in case.gradients]
    upstream: list[Tensor] = []

    def repeated() -> object:
        with forced(table):
            outputs = call(**leaves)
            if not wanted:
                return outputs
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            taught = [output for output in outputs if output.requires_grad]
            if not upstream:
                upstream.extend(_upstream(taught))
            return torch.autograd.grad(taught, wanted, upstream)

    return repeated


class Row(NamedTuple):
    """The results for a case. seconds: by candidate, or the reason why it was left out."""

    case: str
    shape_class: str
    seconds: dict[str, float | str]
    choice: dict[str, str]
    tiles: dict[str, dict[str, float | str]]


def measure_case(name: str, full: Case, small: Case, table: Table, timer: Timer, left: Clock) -> Row:
    """Measures a case and adds its choices to the table, unless the table has them."""
    trial = _Trial(full, small)
    tiles: dict[str, dict[str, float | str]] = {}
    for key, variants in trial.tiles.items():
        if key in table.tiles or len(variants) == 1:
            continue
        by_name = {_text(tile): tile for tile in variants}
        candidates = [
            trial.candidate(text, "triton", Table(table.choices, table.tiles | {key: tile}))
            for text, tile in by_name.items()
        ]
        tiles[key] = timed(candidates, timer, left)
        best = fastest(tiles[key], list(by_name), _text(variants[0]))
        if best is not None:
            table.tiles[key] = by_name[best]
    found: dict[str, float | str] = {}
    choice: dict[str, str] = {}
    if trial.shape_class is not None and trial.shape_class not in table.choices:
        base = full.baseline
        kinds = [(each, each, False) for each in ("triton", *full.libraries, base)]
        kinds += [(f"{base}, compiled", base, True)] * full.compiles
        found = timed(
            [trial.candidate(*each[:2], table, each[2]) for each in kinds if not _absent(each[1])],
            timer,
            left,
        )
        found |= {each: reason for each in full.libraries if (reason := _absent(each))}
        own = ["triton", *full.libraries]
        eager, compiled = fastest(found, [*own, base], base), None
        if full.compiles:
            compiled = fastest(found, [*own, f"{base}, compiled"], f"{base}, compiled")
        choice = {
            where: best.removesuffix(", compiled")
            for where, best in (("compiled", compiled), ("eager", eager))
            if best is not None
        }
        if choice:
            table.choices[trial.shape_class] = choice
    return Row(name, trial.shape_class or "", found, choice, tiles)


def _text(tile: Tile) -> str:
    return " ".join(f"{name}={value}" for name, value in tile.items())


def _absent(library: str) -> str | None:
    """The reason why a library cannot be measured; None if it can, or if the name is not a library."""
    return None if library not in LIBRARIES or any(map(find_spec, LIBRARIES[library])) else "not installed"


def measure(
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    *,
    table: Table,
    timer: Timer,
    only: Sequence[str] = (),
    seconds: float,
    clock: Clock = time.monotonic,
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Measures every case, or the given ones, and adds the fastest implementations to the table.

    keep: called after each case with the rows so far. A case that cannot be created is left out.
    """
    end, rows, checked = clock() + seconds, list[Row](), _checked(sizes, device)
    full, small = (cases(each, dtype, device) for each in (sizes, checked))
    for name in only or [name for name in full if name not in NOT_MEASURED]:
        try:
            torch.manual_seed(0)
            whole = full[name]()
            part = whole if checked == sizes else small[name]()
            row = measure_case(name, whole, part, table, timer, lambda: end - clock())
        except Exception as error:
            text = " ".join(str(error).split())
            row = Row(name, "", {"all": f"{type(error).__name__}: {text}"[:200]}, {}, {})
        rows.append(row)
        keep(rows)
    return rows


def _checked(sizes: Sizes, device: torch.device) -> Sizes:
    """Sizes for the check, so that float64 results fit into half of the device's free memory."""
    if device.type != "cuda":
        return sizes
    position = CHECKED_LAYERS * 8 * sizes.hidden_size * sizes.length
    batch_size = torch.cuda.mem_get_info(device)[0] // 2 // position
    return sizes._replace(batch_size=max(1, min(sizes.batch_size, batch_size)))


def on_device(call: Call, launches: int = 15) -> float:
    """The time of a call on the current CUDA device: the median of replays with a cold cache.

    The call is captured in a CUDA graph, as a run captures its step, to exclude Python's time.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        outputs = call()
    flushed = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(launches)]
    for start, end in events:
        flushed.zero_()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    del outputs
    return statistics.median(start.elapsed_time(end) for start, end in events[3:]) / 1e3
