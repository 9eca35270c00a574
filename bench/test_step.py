"""Training steps on a CPU, side by side: compiled, eager, the plain model, and the official one.

`pytest bench/ --benchmark-only --benchmark-json=FILE`; HRM_REPO=PATH of a checkout of sapientinc/HRM adds the
official model. Every implementation starts from the same weights, and its first loss is compared before it
is timed. Rows of one group are one model, timed one after the other in one process.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import pytest
import torch

from bench.implementations import Step, metadata, official_step, ours, peak_memory, plain, processor
from hrm.config import Config, parse_args
from tests import official

SMALL = [
    "arch.hidden_size=128",
    "arch.num_heads=2",
    "arch.H_layers=2",
    "arch.L_layers=2",
    "global_batch_size=32",
]
# Model name: architecture, words of its configuration, cells, vocabulary.
MODELS = {
    "v1, D=128, 2+2 layers, B=32, S=81": ("v1", ["preset=full", *SMALL], 81, 11),
    "gated, D=128, 2+2 layers, B=32, S=81": ("gated", ["preset=full", *SMALL], 81, 11),
    "gated, quick preset": ("gated", ["preset=quick"], 16, 6),
}
IMPLEMENTATIONS: dict[str, Callable[..., AbstractContextManager[Step]]] = {
    "ours, compile": ours,
    "ours, eager": ours,
    "plain PyTorch, eager": plain,
    "official, compile": partial(official_step, compiled=True),
    "official, eager": partial(official_step, compiled=False),
}
# First losses by model, from whichever implementation came first.
first_losses: dict[str, float] = {}


def configuration(model: str, implementation: str) -> Config:
    arch, words, _, _ = MODELS[model]
    mode = "compile" if implementation == "ours, compile" else "eager"
    return parse_args(["--arch", arch, *words, "device=cpu", f"mode={mode}"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("model", MODELS)
def test_training_step(benchmark, model, implementation):
    if implementation.startswith("official"):
        if not model.startswith("v1"):
            pytest.skip("the official code has no gated model")
        if reason := official.missing():
            pytest.skip(reason)
    config, data = configuration(model, implementation), metadata(*MODELS[model][2:])
    torch.manual_seed(0)
    with IMPLEMENTATIONS[implementation](config, data) as step:
        loss = step()
        assert loss == pytest.approx(first_losses.setdefault(model, loss), rel=1e-4)
        benchmark.group = f"training step: {model}"
        benchmark.extra_info |= {
            "model": model,
            "implementation": implementation,
            "dtype": "float32",
            "batch_size": config.global_batch_size,
            "tokens": data.seq_len,
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        benchmark.pedantic(step, rounds=30, warmup_rounds=5)
        benchmark.extra_info["peak_memory_mib"] = round(peak_memory(step) / 2**20, 1)
