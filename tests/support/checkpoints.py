"""Small checkpoints, forged manifests, and errors of invalid checkpoints."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hrm.checkpoint.read import (
    CheckpointError,
    load_checkpoint,
)
from hrm.checkpoint.save import save_checkpoint
from hrm.common.errors import UserError


def save(folder: Path, step: int, value: float = 0.0, **options: Any) -> Path:
    """A small checkpoint whose contents all depend on `value`."""
    return save_checkpoint(
        folder,
        step,
        weights={"w": torch.full((3, 4), value), "b": torch.full((5,), value, dtype=torch.bfloat16)},
        training={"value": value, "moment": torch.full((7,), value)},
        **{"run": {"arch": {"hidden_size": 4}}, **options},
    )


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes a manifest with the right digest."""
    fields = {key: value for key, value in manifest.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(fields | {"digest": digest}))


def reseal(folder: Path) -> None:
    """Updates the manifest for changed files, like an attacker who forges a checkpoint."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_manifest(folder, manifest)


def refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert isinstance(caught.value, UserError)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
