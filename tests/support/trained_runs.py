"""Folders of trained runs, written without training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hrm.checkpoint.save import save_checkpoint
from hrm.config.load import to_yaml
from hrm.config.schema import ArchConfig, Config
from hrm.data.format import Metadata
from hrm.model.hrm import HRM

S, V, PUZZLES = 9, 6, 5
METADATA = Metadata(0, 0, 0, V, S, PUZZLES, 3, 1.0, ["all"])


def make_config(arch: Mapping[str, Any] | None = None, **changes: Any) -> Config:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_heads": 4,
        "expansion": 2.0,
        "H_layers": 1,
        "L_layers": 1,
    }
    fixed: dict[str, Any] = {"global_batch_size": 4, "mode": "eager", "data_path": "nowhere", "epochs": 10}
    return Config(
        arch=ArchConfig(**{**sizes, "halt_max_steps": 3, **(arch or {})}),
        **{**fixed, "eval_interval": None, **changes},
    )


def make_model(config: Config, metadata: Metadata = METADATA, seed: int = 0) -> HRM:
    """A model whose every weight is random."""
    model = HRM(
        config.arch,
        vocab_size=metadata.vocab_size,
        seq_len=metadata.seq_len,
        num_puzzle_identifiers=metadata.num_puzzle_identifiers,
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)
    for tensor in (model.q_head.weight, model.puzzle_emb.weights if model.puzzle_emb else model.H_init):
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
    return model.requires_grad_(False)


def make_run(
    folder: Path, config: Config | None = None, metadata: Metadata = METADATA, step: int = 7, **options: Any
) -> Path:
    """The folder of a run with one checkpoint, as training leaves it; returns the checkpoint."""
    config = config or make_config()
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return save_checkpoint(
        folder,
        step,
        weights=make_model(config, metadata, step).state_dict(),
        **{"training": {"position": [1, 0]}, "run": {}, **options},
    )
