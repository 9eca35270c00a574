"""A training step of each kind, captured and replayed on the stand-in CUDA library."""

from collections import Counter

import pytest
import torch

from hrm.engine import cuda_graph
from hrm.engine.cuda_graph import WARM_UP, Program
from hrm.engine.engine import Engine
from hrm.engine.modes import Mode
from hrm.engine.step_program import StepProgram
from hrm.training.determinism import deterministic
from tests.cuda_host.stand_in import Record, active, read_log
from tests.cuda_host.steps import configuration, engine_of, rehearsed_launches, train, waits

pytestmark = pytest.mark.cuda_host

GATE_LOSSES = " ".join(f"loss.gate_{name}_weight=0.1" for name in ("saturation", "entropy", "stability"))
ONE_CYCLE = "arch.H_cycles=1 arch.L_cycles=1 arch.L_layers=1"
CASES = {
    "v1": "v1 arch.H_cycles=2",
    "gated": "gated",
    "attention gates, gate losses": f"gated arch.gating_type=attention {GATE_LOSSES}",
    "hierarchical gates, accumulation, clipping, average": (
        "gated arch.gating_type=hierarchical gradient_accumulation=2 grad_clip=1.0 ema=true"
    ),
    "quick, Muon": "gated arch.hidden_size=64 arch.num_heads=4 arch.pos_encodings=learned optimizer=muon",
    "feudal": "feudal",
    "trm, shared levels": "trm arch.H_cycles=2 arch.L_cycles=1 arch.L_layers=1",
    "mixer, shared levels": f"trm {ONE_CYCLE} arch.mlp_t=true",
    "eqr": f"eqr {ONE_CYCLE}",
    "sic": f"sic {ONE_CYCLE} optimizer=muon ema_start=5 loss.label_smoothing=0.2",
    "urm": "urm arch.L_cycles=2 arch.L_layers=1",
    "cgar, a stage": f"trm {ONE_CYCLE} arch.mlp_t=true loss.step_decay=0.7",
    "noise, grid": "v1 arch.noise=0.1 arch.init=random arch.damping=0.9 arch.pos_encodings=rope2d",
    "chains": f"trm {ONE_CYCLE} arch.chains=3 arch.noise=0.1",
    "chains, feudal": "feudal arch.chains=2 arch.use_gating=true",
    "balanced, float32, deterministic": "balanced dtype=float32 deterministic=true",
}
BFLOAT16 = 14


@pytest.fixture(autouse=True)
def compiled_anew():
    """Each case compiles the same function; torch.compile counts them together, up to a limit."""
    torch.compiler.reset()


def check(steps, config, engine: Engine, cells: int = 81) -> None:
    """What holds for every captured step."""
    begin, end = (r for r in steps.captured if r.kind == "capture")
    assert begin.facts["mode"] == "thread_local" and end.facts["streams"] == 1
    assert end.facts["hosts"] == 0

    assert not waits(steps.replayed)
    work = Counter(r.kind for r in steps.replayed if r.kind not in ("event", "sync"))
    # The batch's way to the device, and from there into the buffer that the graph reads.
    assert work == {"memcpy": 2, "graph": 1}
    assert [r.facts["replays"] for r in steps.replayed if r.kind == "graph"] == [begin.graph]

    assert steps.custom_launches() == rehearsed_launches(config, cells)
    products = [r for r in steps.nodes if r.kind == "kernel" and r.origin == "library"]
    inexact = [r for r in products if r.facts["type"] == BFLOAT16 and not r.facts["exact_sums"]]
    # PyTorch applies this rule to no batched product; only Newton-Schulz steps have some.
    assert all(r.part == "optimiser" and r.facts["batch"] > 1 for r in inexact)
    assert not misaligned(steps.nodes, engine)


def misaligned(nodes: list[Record], engine: Engine) -> list[tuple[str, int]]:
    """Generated kernels that read the batch from addresses which no vector load takes."""
    fresh = [tensor for tensor in engine.program.feed.fresh if tensor.numel() * tensor.element_size() >= 16]
    inside = [range(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in fresh]
    found = []
    for node in nodes:
        if node.kind == "kernel" and node.origin == "inductor":
            addresses = [value for size, value in node.facts["args"] if size == 8]
            found += [(node.name, a) for a in addresses if a % 16 and any(a in r for r in inside)]
    return found


# The cases without the compiler come first and take seconds.
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_a_step_is_captured_and_replayed(stand_in, tmp_path, compiled, case):
    config = configuration(CASES[case])
    with deterministic(config, torch.device("cuda")):
        engine, batches = engine_of(config)
        assert engine.mode == Mode("graph", compiled=True, captured=True)
        engine._mode = engine.mode._replace(compiled=compiled)
        steps = train(stand_in, tmp_path, engine, batches)
    check(steps, config, engine)


def test_a_long_sequence_uses_flash_attention(stand_in, tmp_path):
    config = configuration("v1 global_batch_size=8")
    engine, batches = engine_of(config, 900)
    engine._mode = engine.mode._replace(compiled=False)
    steps = train(stand_in, tmp_path, engine, batches)
    check(steps, config, engine, 900)
    kernels = [r.name for r in steps.nodes if r.kind == "kernel"]
    assert any("flash_fwd_kernel" in name for name in kernels)
    assert any("flash_bwd" in name for name in kernels)


def test_a_step_that_reads_a_value_cannot_be_captured(tmp_path, monkeypatch):
    stand_in = active()
    assert stand_in is not None
    update = StepProgram.update

    def reads(self: StepProgram) -> None:
        update(self)
        self.tally.loss.item()

    monkeypatch.setattr(StepProgram, "update", reads)
    # PyTorch 2.11 allows no second capture into the pool of one that failed.
    monkeypatch.setattr(cuda_graph, "_pools", {})
    engine, batches = engine_of(configuration("v1"))
    engine._mode = Mode("graph", compiled=False, captured=True)
    before = stand_in.violations
    with pytest.raises(RuntimeError):
        train(stand_in, tmp_path, engine, batches)
    assert stand_in.violations > before


def test_all_programs_of_a_device_share_a_stream_and_a_pool(stand_in, tmp_path):
    x = torch.zeros(8, device="cuda")
    pools = []
    with stand_in.log(tmp_path / "log"):
        for name in ("cuda", "cuda:0"):
            program = Program(lambda: x.add_(1), torch.device(name), captured=True)
            for _ in range(WARM_UP + 1):
                program()
            pools.append(program._replay.__self__.pool())
    begins = [r.stream for r in read_log(tmp_path / "log") if r.kind == "capture" and r.name == "begin"]
    assert len(begins) == 2 and len(set(begins)) == 1
    assert pools[0] == pools[1]
