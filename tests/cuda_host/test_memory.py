"""The memory estimate against what the caching allocator hands out on the stand-in CUDA library."""

import gc

import pytest
import torch

from hrm.engine.cuda_graph import WARM_UP
from hrm.engine.memory_estimate import step_memory
from hrm.engine.modes import Mode
from tests.cuda_host.steps import configuration, engine_of

pytestmark = pytest.mark.cuda_host

FULL = (
    "global_batch_size=768 arch.hidden_size=512 arch.num_heads=8 arch.H_layers=4 arch.L_layers=4 "
    "arch.H_cycles=2 arch.L_cycles=2 arch.halt_max_steps=16"
)
# Of cuBLAS and cuBLASLt, which the estimate leaves out by its definition.
WORKSPACES = 2 * 32 << 20


def peak(text: str, *, compiled: bool) -> tuple[int, int]:
    """The most memory that a captured step takes, and the estimate of it."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    config = configuration(text)
    engine, batches = engine_of(config)
    engine._mode = Mode("graph", compiled=compiled, captured=True)
    for _ in range(WARM_UP + 2):
        engine.train_step(next(batches))
    found = torch.cuda.max_memory_allocated() - before
    estimate = step_memory(config, engine.metadata, config.global_batch_size, torch.device("cuda")).peak
    return found, estimate


@pytest.mark.parametrize("words", ["v1", "gated", "v1 gradient_accumulation=2", "trm"])
def test_the_estimate_of_a_full_step_is_right(stand_in, words):
    found, estimate = peak(f"{words} {FULL}", compiled=False)
    assert abs(found - estimate) <= 0.05 * estimate


def test_the_estimate_bounds_the_compiled_step(stand_in):
    found, estimate = peak(f"v1 {FULL}", compiled=True)
    assert found <= 1.05 * estimate
