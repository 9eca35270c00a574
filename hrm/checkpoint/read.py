"""Checkpoints, verified before use and read without running code from them.

A run's folder holds one folder `step_<N>` for each checkpoint:

    model.safetensors   the weights
    training.pt         optimiser, carry, position in the data: nested dicts, lists, tensors, numbers
    *.safetensors       more tensors of the same step, such as an average of the weights
    manifest.json       format, step, serial, size and sha256 of each file, run, configuration, data,
                        versions, metrics, score

`hrm.checkpoint.save` writes them. The newest checkpoint has the highest serial in its manifest; after a
rewind that is not the largest step. The best is the first with the highest score.
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrm.checkpoint.safe_io import CheckpointError, read_safetensors, read_training, sha256
from hrm.common.files import read_json, to_json
from hrm.common.text import one_line

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "best_checkpoint",
    "checkpoint_before",
    "differences",
    "latest_checkpoint",
    "load_checkpoint",
    "read_manifest",
]

FORMAT = 1
WEIGHTS, TRAINING, MANIFEST = "model.safetensors", "training.pt", "manifest.json"
# The moving average of the weights, if training keeps one.
AVERAGE = "ema.safetensors"

STEP_NAME = re.compile(r"step_(\d{1,18})(\.old)?")
_MANIFEST_LIMIT = 1 << 20
# A plain file name, which cannot lead out of the folder.
TENSORS_NAME = re.compile(r"\w[\w.-]*\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    extra: further tensors by file name. notes: one line for each newer checkpoint skipped as damaged.
    """

    step: int
    weights: dict[str, Tensor]
    training: dict[str, Any]
    manifest: dict[str, Any]
    path: Path
    extra: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Reads a checkpoint after verifying every file against the manifest's hashes.

    path: a `step_<N>` folder, or a run's folder for its newest undamaged checkpoint. Weights and extra
    tensors are on `device`; `training` stays on the CPU, as memory maps where possible, for the caller to
    copy. Raises CheckpointError with the damaged file; never constructs a pickled object.
    """
    folder, manifest, notes = choose(Path(path))
    extra = sorted(manifest["files"].keys() - {WEIGHTS, TRAINING})
    return Checkpoint(
        step=manifest["step"],
        weights=read_safetensors(folder / WEIGHTS, device),
        training=read_training(folder / TRAINING),
        manifest=manifest,
        path=folder,
        extra={name: read_safetensors(folder / name, device) for name in extra},
        notes=notes,
    )


def latest_checkpoint(run_dir: str | Path) -> tuple[Path | None, list[str]]:
    """The run's newest undamaged checkpoint, or None, and a line for each damaged one that was skipped."""
    folder, _, notes = _newest(Path(run_dir))
    return folder, notes


def checkpoint_before(run_dir: str | Path, step: int, run: Mapping[str, Any]) -> Checkpoint | None:
    """The newest undamaged checkpoint of an earlier step that matches `run`, or None."""
    for folder, manifest in folders(Path(run_dir)):
        if manifest and manifest["step"] < step and not differences(manifest, run):
            with suppress(CheckpointError):
                return load_checkpoint(folder)
    return None


def best_checkpoint(run_dir: str | Path) -> Path | None:
    """The run's undamaged checkpoint with the best score, the first among equals; None without scores."""
    for folder in by_score(Path(run_dir)):
        with suppress(CheckpointError):
            _verified(folder)
            return folder
    return None


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder; its own digest is verified, the files are not."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: not a complete checkpoint; use another one")
    expected = "the manifest of a checkpoint; it is damaged, use an earlier checkpoint"
    try:
        manifest = read_json(path, _MANIFEST_LIMIT, expected, CheckpointError)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; use another checkpoint") from error
    if not isinstance(manifest, dict) or not _intact(manifest):
        raise CheckpointError(f"{path} is damaged (wrong digest or fields); use an earlier checkpoint")
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {manifest['format']}, this version reads {FORMAT}; "
            "use the version that wrote it"
        )
    match = STEP_NAME.fullmatch(path.parent.name)
    if match and int(match[1]) != manifest["step"]:
        step = manifest["step"]
        raise CheckpointError(f"{path} belongs to step {step}; rename its folder to step_{step}")
    return manifest


def differences(manifest: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    """Each field in which `run` differs from the checkpoint's run, with both values.

    run: the `run` of `save_checkpoint`: nested mappings of JSON values such as architecture, data and seed.
    """
    saved, now = _flat(manifest["run"]), _flat(json.loads(to_json(run)))

    def spelt(values: Mapping[str, Any], name: str) -> str:
        """A value as a command line has it: null, true, false."""
        value = values.get(name)
        plain = "unset" if name not in values else repr(value) if isinstance(value, str) else to_json(value)
        return one_line(plain)

    return [
        f"{one_line(name)} was {spelt(saved, name)} and is now {spelt(now, name)}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name, "unset") != now.get(name, "unset")
    ]


def choose(path: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The verified checkpoint folder at a path, its manifest, and a line for each one that was skipped.

    path: a checkpoint's folder, or a run's folder for its newest undamaged one. Raises CheckpointError.
    """
    if not path.is_dir():
        what = "is a file, not a checkpoint folder" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}; expected a step_<N> folder or a run's folder that holds some")
    if (path / MANIFEST).exists() or STEP_NAME.fullmatch(path.name):
        return path, _verified(path), []
    folder, manifest, notes = _newest(path)
    if folder is None:
        found = f"no undamaged checkpoint ({'; '.join(notes)})" if notes else "no step_<N> folder"
        raise CheckpointError(f"{path} holds {found}; expected a run's folder or one of its checkpoints")
    return folder, manifest, notes


def _newest(run_dir: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    notes: list[str] = []
    for folder, _ in folders(run_dir):
        try:
            return folder, _verified(folder), notes
        except CheckpointError as error:
            notes.append(str(error))
    return None, {}, notes


def folders(run_dir: Path) -> list[tuple[Path, dict[str, Any] | None]]:
    """Checkpoint folders with manifests, newest first; folders with an unreadable manifest (None) come
    before."""
    found: list[tuple[Path, dict[str, Any] | None]] = []
    for entry in run_dir.iterdir() if run_dir.is_dir() else ():
        match = STEP_NAME.fullmatch(entry.name)
        if not match or not entry.is_dir() or (match[2] and (run_dir / f"step_{match[1]}").is_dir()):
            continue
        try:
            found.append((entry, read_manifest(entry)))
        except CheckpointError:
            found.append((entry, None))
    return sorted(found, key=lambda item: item[1]["serial"] if item[1] else math.inf, reverse=True)


def by_score(run_dir: Path) -> list[Path]:
    """The checkpoints with a score, best first; among equal scores the oldest first."""
    scored = [
        (manifest["score"], -manifest["serial"], folder)
        for folder, manifest in folders(run_dir)
        if manifest and manifest.get("score") is not None
    ]
    return [folder for _, _, folder in sorted(scored, reverse=True)]


def _verified(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        try:
            if not path.is_file():
                raise CheckpointError(f"{path} is missing; use an earlier checkpoint")
            if (size := path.stat().st_size) != entry["size"]:
                what = f"{size} bytes instead of {entry['size']}"
                raise CheckpointError(f"{path} is damaged ({what}); use an earlier checkpoint")
            if sha256(path) != entry["sha256"]:
                raise CheckpointError(f"{path} is damaged (wrong sha256); use an earlier checkpoint")
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read: {error.strerror}; use another checkpoint"
            ) from error
    return manifest


def _intact(manifest: dict[str, Any]) -> bool:
    """Whether a manifest has every required field and the right digest, which is removed."""
    return manifest.pop("digest", None) == digest(manifest) and _well_formed(manifest)


def _well_formed(manifest: dict[str, Any]) -> bool:
    files = manifest.get("files")
    return (
        all(type(manifest.get(key)) is int and manifest[key] >= 0 for key in ("format", "step", "serial"))
        and isinstance(manifest.get("run"), dict)
        and isinstance(files, dict)
        and _is_score(manifest.get("score"))
        and {WEIGHTS, TRAINING} <= files.keys()
        and all(name == TRAINING or TENSORS_NAME.fullmatch(name) for name in files)
        and all(isinstance(entry, dict) and {"size", "sha256"} <= entry.keys() for entry in files.values())
        and all(type(entry["size"]) is int for entry in files.values())
    )


def _is_score(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) <= sys.float_info.max)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else key)
    return flat


def digest(manifest: dict[str, Any]) -> str:
    """The sha256 (hex) of a manifest without its digest."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
