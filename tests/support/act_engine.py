"""The package's engine in float64, with the weights of a straight-line model."""

import pytest
import torch

from hrm.config.load import Config
from hrm.data.dataset import Batch
from hrm.data.format import Metadata
from hrm.engine.engine import Engine
from tests.support import straight_line as plain
from tests.support.act_cases import PUZZLES, S, V


def make_engine(
    monkeypatch: pytest.MonkeyPatch, config: Config, weights: plain.Weights, total_steps: int
) -> Engine:
    """The package's engine in float64, with these weights."""
    monkeypatch.setattr("hrm.engine.engine.resolve_dtype", lambda config, device: torch.float64)
    metadata = Metadata(
        pad_id=0,
        ignore_label_id=0,
        blank_identifier_id=0,
        vocab_size=V,
        seq_len=S,
        num_puzzle_identifiers=PUZZLES,
        total_groups=PUZZLES,
        mean_puzzle_examples=1.0,
        sets=["all"],
    )
    engine = Engine(config, metadata, total_steps=total_steps)
    engine.load_weights(weights)
    return engine


def as_arrays(batch: plain.Batch) -> Batch:
    return Batch(**{name: tensor.numpy() for name, tensor in batch.items()})
