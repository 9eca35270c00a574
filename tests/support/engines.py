"""Small engines, their batches and their whole state."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from hrm.config.load import ArchConfig, Config
from hrm.data.dataset import Batch
from hrm.data.format import Metadata
from hrm.engine.engine import Engine

B, S, V, PUZZLES = 8, 9, 6, 5
METADATA = Metadata(
    pad_id=0,
    ignore_label_id=0,
    blank_identifier_id=0,
    vocab_size=V,
    seq_len=S,
    num_puzzle_identifiers=PUZZLES,
    total_groups=100,
    mean_puzzle_examples=1.0,
    sets=["all"],
)


def make_config(arch: dict[str, Any] | None = None, **changes: Any) -> Config:
    fields: dict[str, Any] = {
        "hidden_size": 32,
        "num_heads": 4,
        "expansion": 2.0,
        "H_layers": 1,
        "L_layers": 1,
        "H_cycles": 1,
        "L_cycles": 1,
        "halt_max_steps": 4,
        "use_gating": True,
        **(arch or {}),
    }
    fixed: dict[str, Any] = {"global_batch_size": B, "lr": 1e-2, "lr_warmup_steps": 3, "mode": "eager"}
    return Config(arch=ArchConfig(**fields), **{**fixed, **changes})


def make_engine(config: Config | None = None) -> Engine:
    return Engine(config or make_config(), METADATA, total_steps=40)


def batches(seed: int = 0) -> Iterator[Batch]:
    rng = np.random.default_rng(seed)
    while True:
        inputs = rng.integers(1, V, (B, S), dtype=np.int32)
        labels = np.where(rng.random((B, S)) < 0.8, 1 + inputs % (V - 1), -100).astype(np.int32)
        yield Batch(inputs, labels, rng.integers(0, PUZZLES, B, dtype=np.int32))


def all_state(engine: Engine) -> dict[str, torch.Tensor]:
    state = engine.training_state()
    moments = {
        f"{k}.{n}": t for k, views in state["optimizer"].items() if k != "count" for n, t in views.items()
    }
    return {**engine.weights(), **state["carry"], **moments}


def assert_same_state(one: Engine, other: Engine) -> None:
    """Bit for bit."""
    ours, theirs = all_state(one), all_state(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
