"""The memory of a step: against what the profiler sees on this machine, and against sizes by hand."""

import re
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

import kernels
import train
from bench.implementations import metadata, peak_memory, random_batches
from hrm.common.errors import UserError
from hrm.common.text import size_text
from hrm.config.load import Config, parse_args
from hrm.data.format import Metadata
from hrm.engine.engine import Engine
from hrm.engine.memory_estimate import (
    RESERVE,
    StepMemory,
    _Storages,
    available_bytes,
    does_not_fit,
    enough_memory,
    fewest_parts,
    largest_batch,
    step_memory,
)
from kernels import backend
from kernels.backend import Launch
from tests.support.forked import start
from tests.support.runs import words

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SUDOKU, MAZE = metadata(81, 11), metadata(900, 12)
GIB = 2**30
# Cycles before the last keep nothing, and take as long as it.
ONE_CYCLE = {"arch.H_cycles": 1, "arch.L_cycles": 1}
SMALL: dict[str, Any] = {"hidden_size": 64, "num_heads": 2, "H_layers": 2, "L_layers": 1}
SMALL |= {"H_cycles": 1, "L_cycles": 2}


def full(arch: str, **changes: Any) -> Config:
    """The published model in bfloat16, or what the changes make of it."""
    words = {"preset": "full", "device": "cpu", "mode": "eager", "dtype": "bfloat16", **changes}
    return parse_args(["--arch", arch, *(f"{key}={value}" for key, value in words.items())])


def shallow(**changes: Any) -> Config:
    """The published width with one layer and one cycle a level: searches take a tenth of the time."""
    return full("v1", **ONE_CYCLE, **{"arch.H_layers": 1, "arch.L_layers": 1}, **changes)


def small(arch: str, *, puzzle_emb_ndim: int = 64, **changes: Any) -> Config:
    config = full(arch, **changes)
    return replace(config, arch=replace(config.arch, **SMALL, puzzle_emb_ndim=puzzle_emb_ndim))


def measured(config: Config, data: Metadata) -> int:
    """What the profiler sees a step take on this machine, once an earlier one has made what stays."""
    engine, batch = Engine(config, data, total_steps=10), next(random_batches(config, data))

    def step() -> float:
        engine.train_step(batch)
        return 0.0

    step()
    return peak_memory(step)


def compare(config: Config, tolerance: float) -> None:
    predicted = step_memory(config, SUDOKU, config.global_batch_size, CPU)
    assert predicted.step == pytest.approx(measured(config, SUDOKU), rel=tolerance)


# Every two of the values together; a puzzle table has 64 columns or is not there.
@pytest.mark.parametrize(
    ("dtype", "batch", "puzzle"),
    [("float32", 4, 64), ("float32", 8, 0), ("bfloat16", 8, 64), ("bfloat16", 4, 0)],
)
@pytest.mark.parametrize("arch", ["v1", "gated"])
def test_the_memory_of_a_step_equals_the_profilers(arch, dtype, batch, puzzle):
    compare(small(arch, dtype=dtype, global_batch_size=batch, puzzle_emb_ndim=puzzle), 0.002)


def test_the_memory_of_batch_parts_equals_the_profilers():
    compare(small("v1", dtype="float32", global_batch_size=12, gradient_accumulation=3), 0.002)


@pytest.mark.parametrize("arch", ["v1", "gated"])
def test_the_memory_of_kernels_equals_the_profilers(arch, monkeypatch):
    """Launched on nothing, for what the kernels compute is not asked here."""

    class Dropped(list):
        def append(self, launch: Launch) -> None:
            pass

    monkeypatch.setattr(backend, "_backend", "triton")
    monkeypatch.setattr(backend, "INTERPRETED", True)
    monkeypatch.setattr(backend, "_record", Dropped())
    compare(small(arch, global_batch_size=4), 0.002)


# --------------------------------------------------------------------------------------------- on a GPU


def test_the_workspace_of_a_kernel_is_counted():
    """100 x 512 sums and, for each row, its sums of squares over two tiles of columns."""
    kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
    shapes = ((100, 32), (512, 32), (100, 512))
    with backend.explained(CUDA), _Storages() as storages:
        inputs = [torch.empty(shape, **kind) for shape in shapes]
        before = storages.live
        kept = kernels.linear_rms(*inputs)
    assert before == sum(tensor.nbytes for tensor in inputs)
    assert storages.live - before == sum(tensor.nbytes for tensor in kept) == 100 * (512 * 2 + 2 * 4)
    assert storages.peak == storages.live


@pytest.mark.parametrize(("arch", "gate"), [("v1", 0), ("gated", 2)])
@pytest.mark.parametrize(("data", "block"), [(SUDOKU, 15), (MAZE, 17)], ids=["S=81", "S=900"])
def test_the_published_model_by_hand(arch, gate, data, block):
    """Each of the 8 blocks with gradient keeps, a token, in widths D: q, k, v 3, what attention gives 1, the
    middle norm 1, gate and up 6, their product 3, the last norm 1, and where attention is PyTorch's the
    rotated q and k, 2. On top come at most 18: the target pass, which keeps nothing (its states and one
    block's), and gradients in flight.
    """
    row = 768 * (data.seq_len + 1) * 512 * 2
    memory = step_memory(full(arch), data, 768, CUDA)
    kept = 8 * block + gate
    assert kept < memory.step / row < kept + 18
    if data is SUDOKU:
        assert memory.peak < 24 * GIB


def test_persistent_memory_by_hand():
    """Weights, gradients, two moments in float32, weights in bfloat16; carry, batch, rows."""
    gaps, D, B, S = 27_275_280, 512, 768, 81
    carry = B * (2 * (S + 1) * D * 2 + 2 * S * 4 + 4 + 1 + 4)
    batch, rows = 4 * B * (2 * S + 2), 4 * B * D
    expected = gaps * (4 * 4 + 2) + carry + batch + rows
    assert step_memory(full("v1"), SUDOKU, B, CUDA).fixed == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("data", [SUDOKU, MAZE], ids=["S=81", "S=900"])
def test_references_take_more_than_kernels(data, monkeypatch):
    config = full("v1", **ONE_CYCLE)
    ours = step_memory(config, data, 96, CUDA)
    monkeypatch.setattr(backend, "_backend", "reference")
    reference = step_memory(config, data, 96, CUDA)
    assert reference.fixed == ours.fixed
    assert 1.9 * ours.step < reference.step < 2.3 * ours.step


def test_pytorchs_attention_does_not_store_scores():
    """They would be 19 GiB of the 8 blocks in float32."""
    narrow, wide = (
        step_memory(full("v1", dtype=dtype, **ONE_CYCLE), MAZE, 96, CUDA).step
        for dtype in ("bfloat16", "float32")
    )
    assert 1.9 * narrow < wide < 2.1 * narrow


def test_a_dry_run_uses_the_selected_attention(monkeypatch):
    def attends(name: Any, data: Metadata) -> StepMemory:
        config = shallow()
        return step_memory(replace(config, attention=replace(config.attention, backend=name)), data, 96, CUDA)

    assert attends("triton", SUDOKU) == attends("auto", SUDOKU)
    assert attends("flash", MAZE) == attends("sdpa", MAZE) == attends("auto", MAZE)
    assert attends("sdpa", SUDOKU).step > attends("auto", SUDOKU).step


# ----------------------------------------------------------------------------------------- what would fit


@pytest.mark.parametrize(("data", "gib"), [(SUDOKU, 24), (MAZE, 24), (SUDOKU, 0.7)])
def test_the_largest_batch_fits_and_the_next_does_not(data, gib):
    config, budget = shallow(), int(gib * GIB)
    rows = largest_batch(config, data, budget, CUDA)
    assert step_memory(config, data, rows, CUDA).peak <= budget
    assert step_memory(config, data, rows + max(1, rows // 200), CUDA).peak > budget
    eights = largest_batch(config, data, budget, CUDA, multiple=8)
    assert eights % 8 == 0 and rows - 16 < eights <= rows
    assert largest_batch(config, data, GIB // 16, CUDA) == 0


def test_the_largest_batch_in_parts_is_larger_and_divides():
    config = shallow(gradient_accumulation=3, global_batch_size=3)
    rows = largest_batch(config, SUDOKU, 8 * GIB, CUDA)
    assert rows % 3 == 0 and step_memory(config, SUDOKU, rows, CUDA).peak <= 8 * GIB
    assert rows > 2.5 * largest_batch(shallow(), SUDOKU, 8 * GIB, CUDA)


def test_the_fewest_parts_fit_and_fewer_do_not():
    config, rows = shallow(), 768
    for parts in (2, 3):
        needed = step_memory(replace(config, gradient_accumulation=parts), MAZE, rows, CUDA).peak
        assert fewest_parts(config, MAZE, rows, needed, CUDA) == parts
        assert fewest_parts(config, MAZE, rows, needed - 1, CUDA) == parts + 1
    assert fewest_parts(config, MAZE, rows, 200 * GIB, CUDA) == 1
    assert fewest_parts(config, MAZE, rows, GIB, CUDA) is None


def test_the_error_gives_needed_available_and_fitting_sizes():
    config, device = shallow(global_batch_size=4608), torch.device("cuda:0")
    budget = 80 * GIB
    text = does_not_fit(config, MAZE, device, budget, ranks=2)
    batch = 2 * largest_batch(config, MAZE, int(budget * (1 - RESERVE)), CUDA)
    needed, alone = (size_text(step_memory(config, MAZE, rows, CUDA).peak) for rows in (2304, 4608))
    assert batch > 1000 and text == (
        f"global_batch_size=4608 needs about {needed} on each device and cuda:0 has 80 GiB: "
        f"global_batch_size={batch} or gradient_accumulation=2 would fit"
    )
    # Alone on its device, one rank has all of the sequences.
    assert f"needs about {alone} on" in does_not_fit(config, MAZE, device, budget)


def test_the_error_where_nothing_or_everything_would_fit():
    rows, device = {"global_batch_size": 768}, torch.device("cuda:1")
    nothing = does_not_fit(full("v1", **rows, **ONE_CYCLE), SUDOKU, device, GIB // 2)
    assert nothing.endswith(
        "cuda:1 has 512 MiB: lower arch.hidden_size or the layers, not even one sequence fits"
    )
    everything = does_not_fit(full("v1", **rows), SUDOKU, device, 80 * GIB)
    assert "needs about 8.816 GiB" in everything and "end other processes on it" in everything


def test_available_memory_is_free_memory_plus_the_processs_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70 * GIB)
    assert available_bytes(torch.device("cuda:3")) == 73 * GIB
    if sys.platform == "linux":
        with open("/proc/meminfo") as lines:
            total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))
        assert available_bytes(CPU) == total


def test_a_step_out_of_memory_suggests_a_fitting_size(monkeypatch):
    engine = Engine(small("v1", global_batch_size=8), SUDOKU, total_steps=10)

    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(engine.program, "compute", out_of_memory)
    monkeypatch.setattr("hrm.engine.memory_estimate.available_bytes", lambda device: 20 * 2**20)
    with (
        pytest.raises(
            UserError, match=r"^global_batch_size=8 needs about [\d.]+ MiB .* cpu has 20 MiB: .*fit$"
        ),
        enough_memory(lambda: does_not_fit(engine.config, SUDOKU, CPU)),
    ):
        engine.train_step(next(random_batches(engine.config, SUDOKU)))


@pytest.mark.parametrize("at", ["train_step", "evaluate"])
def test_the_trainer_suggests_a_fitting_size(tiny_sudoku, tmp_path, capsys, monkeypatch, at):
    def out_of_memory(engine: Engine, *_: Any) -> None:
        if engine.step == 12:
            raise torch.OutOfMemoryError
        return original(engine, *_)

    original = getattr(Engine, at)
    monkeypatch.setattr(Engine, at, out_of_memory)
    monkeypatch.setattr("hrm.engine.memory_estimate.available_bytes", lambda device: 20 * 2**20)
    assert train.main(words(tiny_sudoku, tmp_path, "run_name=r")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match(
        r"error: global_batch_size=8 needs about [\d.]+ [KM]iB on each device and cpu has 20", last
    )


def test_real_out_of_memory_suggests_a_fitting_size(tmp_path):
    """In a process of its own, limited to 4 GiB, which the carry alone of this batch exceeds."""
    script = """
import resource, sys
import torch
from bench.implementations import metadata
from hrm.config.load import parse_args
from hrm.engine.engine import Engine
from hrm.common.errors import UserError
from hrm.engine.memory_estimate import does_not_fit, enough_memory
torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
words = ["--arch", "v1", "preset=full", "device=cpu", "mode=eager", "global_batch_size=65536"]
words += ["arch.H_layers=1", "arch.L_layers=1", "arch.H_cycles=1", "arch.L_cycles=1"]
config, data = parse_args(words), metadata(81, 11)
try:
    with enough_memory(lambda: does_not_fit(config, data, torch.device("cpu"))):
        Engine(config, data, total_steps=1)
except UserError as error:
    print(error)
"""
    with open(tmp_path / "said", "w") as file:
        start(["-c", script], stdout=file).wait()
    said = (tmp_path / "said").read_text()
    match = re.fullmatch(
        r"global_batch_size=65536 needs about 67\d\.\d GiB on each device and cpu has 4 GiB: "
        r"global_batch_size=(\d+) would fit\n",
        said,
    )
    assert match, said
    config = shallow(dtype="float32", global_batch_size=int(match[1]))
    fitting = step_memory(config, SUDOKU, int(match[1]), CPU).peak
    assert 0.9 * (1 - RESERVE) * 4 * GIB < fitting <= (1 - RESERVE) * 4 * GIB
