"""Folders of trained runs, written without training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hrm.checkpoint.read import load_checkpoint
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
        "H_cycles": 1,
        "L_cycles": 1,
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
    """Writes the folder of a run with one checkpoint, as training does; returns the checkpoint."""
    config = config or make_config()
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return save_checkpoint(
        folder,
        step,
        weights=make_model(config, metadata, step).state_dict(),
        **{"training": {"position": [1, 0]}, "run": {}, **options},
    )


def as_official(run: Path, folder: Path, data: str) -> Path:
    """Writes the folder of an official checkpoint with the weights of a run; returns it."""
    weights = load_checkpoint(run).weights
    torch.save({f"_orig_mod.model.inner.{name}": value for name, value in weights.items()}, folder / "step_9")
    lines = (run / "config.yaml").read_text(encoding="utf-8").splitlines()
    arch = dict(line.strip().split(": ") for line in lines if line.startswith("  ") and ": " in line)
    names: tuple[str, ...] = (
        "hidden_size",
        "num_heads",
        "expansion",
        "H_layers",
        "L_layers",
        "H_cycles",
        "L_cycles",
    )
    names += ("halt_max_steps", "halt_exploration_prob", "pos_encodings", "puzzle_emb_ndim", "use_gating")
    config = "".join(f"  {name}: {arch[name]}\n" for name in names)
    (folder / "all_config.yaml").write_text(
        "arch:\n  name: hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1\n"
        f"  loss:\n    name: losses@ACTLossHead\n    loss_type: stablemax_cross_entropy\n{config}"
        f"data_path: {data}\nglobal_batch_size: 2\nseed: 0\n",
        encoding="utf-8",
    )
    return folder
