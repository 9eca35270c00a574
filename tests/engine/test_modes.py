"""Modes and dtypes: what auto stands for, what is measured, and what a compiled function refuses."""

import ast
from pathlib import Path

import pytest
import torch

import hrm.model
import kernels
from hrm.common.errors import UserError
from hrm.config.load import parse_args
from hrm.engine import modes
from hrm.engine.modes import (
    COMPILE,
    EAGER,
    Mode,
    compiled,
    compiler_fault,
    dtype_note,
    faster_mode,
    resolve_dtype,
    resolve_mode,
)

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


def test_modes_and_dtypes_resolve_by_machine(monkeypatch):
    monkeypatch.setattr(modes, "compiler_fault", lambda device: None)
    assert resolve_mode("auto", CUDA) == Mode("graph", compiled=True, captured=True)
    assert resolve_mode("graph", CUDA) == resolve_mode("auto", CUDA)
    assert resolve_mode("auto", CPU) is None and resolve_mode("auto", MPS) == EAGER
    assert resolve_mode("eager", CUDA) == EAGER and resolve_mode("compile", CPU) == COMPILE
    here = resolve_mode("graph", CPU)
    assert (
        here is not None
        and here.compiled
        and not here.captured
        and "nothing to capture on a CPU" in here.note
    )


@pytest.mark.parametrize(
    ("words", "device", "relative", "dtype", "note"),
    [
        ([], CUDA, 48.2, torch.bfloat16, ""),
        ([], MPS, 0.5, torch.float32, ""),
        ([], CPU, 1.1, torch.float32, ""),
        ([], CPU, 0.6, torch.float32, ""),
        ([], CPU, 0.5, torch.bfloat16, "takes 0.5 times as long as in float32 on this processor"),
        (["deterministic=true"], CPU, 0.5, torch.float32, ""),
        (["dtype=float32"], CUDA, 0.5, torch.float32, ""),
        (
            ["dtype=bfloat16"],
            CPU,
            48.2,
            torch.bfloat16,
            "takes 48 times as long as in float32 on this processor",
        ),
    ],
)
def test_the_dtype_follows_device_and_measurement_and_notes_bfloat16(
    monkeypatch, words, device, relative, dtype, note
):
    monkeypatch.setattr(modes, "bfloat16_time", lambda: relative)
    monkeypatch.setattr(modes, "multiplies_bfloat16", lambda: relative != 0.6)
    config = parse_args(["device=cpu", *words])
    assert resolve_dtype(config, device) == dtype
    line = dtype_note(config, device)
    assert note in line and bool(line) == bool(note)
    assert line.endswith("dtype=float32 is faster") == (bool(note) and relative > 1)


def test_the_time_of_a_product_is_measured_on_the_cpu():
    with torch.device("meta"):
        assert 0 < modes.bfloat16_time.__wrapped__() < float("inf")


def test_without_a_compiler_a_graph_holds_the_eager_step_and_compile_is_refused(monkeypatch):
    monkeypatch.setattr(modes, "compiler_fault", lambda device: "no compiler")
    assert resolve_mode("auto", CUDA) == Mode(
        "graph", compiled=False, captured=True, note="not compiled: no compiler"
    )
    with pytest.raises(
        UserError, match=r"^mode=compile: no compiler; use mode=eager, or install a C\+\+ compiler"
    ):
        resolve_mode("compile", CPU)


def test_a_compiler_that_fails_is_found_out(monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("Python.h: No such file\nand more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert compiler_fault(CPU) == "torch.compile fails here (Python.h: No such file)"


class Clock:
    """Stands for the module `time`: a step takes `seconds` of the clock, and of the processor."""

    def __init__(self) -> None:
        self.clock = self.processor = 0.0

    def perf_counter(self) -> float:
        return self.clock

    def process_time(self) -> float:
        return self.processor

    def pass_by(self, clock: float, processor: float) -> None:
        self.clock += clock
        self.processor += processor


@pytest.fixture
def clock(monkeypatch) -> Clock:
    stands = Clock()
    monkeypatch.setattr(modes, "time", stands)
    monkeypatch.setattr(modes, "compiler_fault", lambda device: None)
    return stands


@pytest.mark.parametrize(
    ("eager", "fused", "steps", "expected"),
    [
        ((0.01, 0.02), (0.002, 0.002), 50_000, "compile"),
        ((0.01, 0.02), (0.02, 0.02), 50_000, "eager"),
        ((0.01, 0.02), (0.002, 0.002), 40_000, "untried"),
        # Other processes lengthen the clock's time.
        ((0.08, 0.01), (0.002, 0.002), 40_000, "untried"),
    ],
)
def test_the_faster_mode_is_measured_for_the_steps_ahead(monkeypatch, clock, eager, fused, steps, expected):
    """Eager steps of 10 ms: 50,000 should save 200 s, 40,000 less than compiling takes."""
    made = []

    def whole() -> None:
        made.append(1)
        clock.pass_by(*fused)

    def measured() -> Mode:
        return faster_mode(lambda: clock.pass_by(*eager), whole, lambda function: function(), steps, CPU)

    mode = measured()
    assert mode.compiled == (expected == "compile") and bool(made) == (expected != "untried")
    start = {
        "compile": "0.002 s per step against 0.010 eager",
        "eager": "compiled it would take 0.020 s per step against 0.010",
        "untried": "",
    }[expected]
    assert mode.note.startswith(start)
    monkeypatch.setattr(modes, "compiler_fault", lambda device: "no compiler")
    assert measured().note == ("" if expected == "untried" else "slower: no compiler")


def test_long_steps_are_measured_once(clock):
    made = []

    def run(function) -> None:
        made.append(1)
        clock.pass_by(6.0, 6.0)

    assert faster_mode(run, run, run, 1, CPU) == EAGER and len(made) == 1

    def short(function) -> None:
        made.append(1)
        clock.pass_by(0.02, 0.02)

    assert faster_mode(run, run, short, 1, CPU) == EAGER and len(made) == 5


@pytest.mark.slow
def test_a_function_is_compiled_once_as_one_graph():
    double = compiled(lambda x: 2 * x)
    assert torch.equal(double(torch.ones(3)), torch.full((3,), 2.0))
    assert torch.equal(double(torch.arange(3.0)), torch.tensor([0.0, 2.0, 4.0]))
    with pytest.raises(
        UserError,
        match=r"would be recompiled \(.*'x' size mismatch.* expected 3, actual 4\); mode=e",
    ):
        double(torch.ones(4))

    def breaks(x):
        return x if x.sum().item() > 0 else -x

    with pytest.raises(
        UserError, match=r"^the step cannot be compiled as one graph \(.*\); mode=eager runs it$"
    ):
        compiled(breaks)(torch.ones(3))


@pytest.mark.slow
def test_lowering_a_new_operator_does_not_format_its_arguments(monkeypatch):
    """The text of an argument holds all that it was computed from, so it grows with each block of a model."""
    from torch._inductor.ir import TensorBox

    @torch.library.custom_op("modes_test::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    double.register_fake(torch.empty_like)
    formatted, text = [], TensorBox.__str__

    def counted(box):
        formatted.append(box)
        return text(box)

    monkeypatch.setattr(TensorBox, "__str__", counted)
    # A graph found in the cache is not lowered.
    with torch._inductor.config.patch(force_disable_caches=True):
        out = compiled(lambda x: double(x + 1))(torch.ones(3))
    assert torch.equal(out, torch.full((3,), 4.0))
    assert formatted == []


def test_compiled_code_does_not_use_tuple_replace():
    """Dynamo of torch 2.11 traces `_replace` to an empty tuple."""
    # These run on the host alone.
    host = {"__main__.py", "fastest.py", "measured.py"}
    sources = [*Path(hrm.model.__file__).parent.glob("*.py"), *Path(kernels.__file__).parent.glob("*.py")]
    sources = [path for path in sources if path.name not in host]
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text()))]
    assert not [node for node in nodes if isinstance(node, ast.Attribute) and node.attr == "_replace"]
    assert len([node for node in nodes if isinstance(node, ast.ClassDef)]) > 10
