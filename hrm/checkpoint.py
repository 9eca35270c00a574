"""Checkpoints: saved whole or not at all, checked before they are believed, read without running anything.

A run's folder holds one folder `step_<N>` for each checkpoint:

    model.safetensors   the weights
    training.pt         optimiser, carry, place in the data: nested dicts, lists, tensors, numbers
    *.safetensors       more tensors of the same step, such as an average of the weights
    manifest.json       format, step, serial, size and sha256 of each file, run, data, versions, metrics,
                        score

A save writes into `.tmp_step_*` beside them, syncs, and renames; so whatever has the name `step_<N>` is
complete, and a process killed at any moment leaves the earlier checkpoints as they were. "Newest" is the one
saved last (the manifest's serial): not the largest step, once a run went back to an earlier checkpoint.
"Best" is the one with the highest score, of equal ones the first.
"""

import errno
import hashlib
import importlib.metadata
import json
import math
import platform
import re
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hrm.storage import (
    CheckpointError,
    brief,
    compact,
    nbytes,
    os_error,
    plain,
    read_safetensors,
    read_training,
    sha256,
    size_text,
    sync,
    to_json,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "best_checkpoint",
    "check_same_run",
    "latest_checkpoint",
    "load_checkpoint",
    "read_manifest",
    "save_checkpoint",
]

FORMAT = 1
WEIGHTS, TRAINING, MANIFEST = "model.safetensors", "training.pt", "manifest.json"
# The moving average of the weights, beside a checkpoint's own where training keeps one.
AVERAGE = "ema.safetensors"

STEP_NAME = re.compile(r"step_(\d{1,18})(\.old)?")
_TEMP = ".tmp_step_"
_MANIFEST_LIMIT = 1 << 20
# A plain name, so that nothing outside the folder is read or written.
_TENSORS_NAME = re.compile(r"\w[\w.-]*\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` read.

    extra: further tensors by the name of their file. notes: names each newer checkpoint that was damaged and
    passed over.
    """

    step: int
    weights: dict[str, Tensor]
    training: dict[str, Any]
    manifest: dict[str, Any]
    path: Path
    extra: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


# --- saving


def save_checkpoint(
    run_dir: str | Path,
    step: int,
    *,
    weights: Mapping[str, Tensor],
    training: Mapping[str, Any],
    run: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
    score: float | None = None,
    keep: int | None = 3,
    keep_best: bool = False,
) -> Path:
    """Save `run_dir/step_<step>` whole or not at all, then remove all but the last `keep` (None: keep all).

    weights: tensors of any device and layout; views of one flat buffer are copied apart. training: nested
    dicts, lists and tuples of tensors, numbers, strings and None; anything else is a TypeError that names its
    place. run: what makes the run the one it is, for `check_same_run`. metrics: the results at this step,
    kept in the manifest, as is data, the description of the training data. extra: further tensors by the name
    of their file, as {"ema.safetensors": {...}}.
    score: how good the step is, higher being better; None or NaN is no score. keep_best: the checkpoint with
    the best score stays too, however old. An existing `step_<step>` is replaced. Returns the checkpoint's
    folder.
    Raises CheckpointError when it cannot be written; the earlier checkpoints stay and no partial one is left.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep is {keep}: at least one checkpoint must stay, or None for all")
    for name in extra or ():
        if not _TENSORS_NAME.fullmatch(name) or name == WEIGHTS:
            raise ValueError(f"extra: {name!r} is not the name of a further .safetensors file")
    run_dir, step = Path(run_dir), int(step)
    # a copy first: whatever training does next, what is written belongs to one step
    tensors = {
        name: {key: compact(tensor) for key, tensor in group.items()}
        for name, group in {WEIGHTS: weights, **(extra or {})}.items()
    }
    state = plain(training, "training")
    needed = nbytes(tensors) + nbytes(state)
    final, temp = run_dir / f"step_{step}", run_dir / f"{_TEMP}{step}_{secrets.token_hex(4)}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _clean(run_dir)
        serial = 1 + max((manifest["serial"] for _, manifest in _folders(run_dir) if manifest), default=0)
        fields = {"format": FORMAT, "step": step, "serial": serial, "run": run, "versions": _versions()}
        fields |= {"metrics": metrics or {}, "score": score, "data": data}
        temp.mkdir()
        _write(temp, tensors, state, fields)
        _swap_in(temp, final)
    except Exception as error:
        cause = os_error(error)
        if cause is None:
            raise
        # before the message looks at the free space
        shutil.rmtree(temp, ignore_errors=True)
        raise _save_error(run_dir, needed, cause) from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    if keep is not None:
        best = next(iter(_by_score(run_dir)), None) if keep_best else None
        for folder in [folder for folder, manifest in _folders(run_dir) if manifest][keep:]:
            if folder != best:
                _discard(folder)
    return final


def _write(
    folder: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], fields: dict[str, Any]
) -> None:
    for name, group in tensors.items():
        save_file(group, folder / name)
    with open(folder / TRAINING, "wb") as file:
        torch.save(state, file)
    files = {}
    for name in (*tensors, TRAINING):
        sync(folder / name)
        files[name] = {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    manifest = json.loads(to_json({**fields, "files": files}))
    manifest["digest"] = _digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def _swap_in(temp: Path, final: Path) -> None:
    # A folder cannot be renamed over another, so the one it replaces steps aside first: killed in between,
    # `step_<N>.old` is found by readers and put back by the next save.
    old = final.with_name(final.name + ".old")
    if final.is_dir():
        _discard(old)
        final.rename(old)
    temp.rename(final)
    sync(final.parent)
    _discard(old)


def _clean(run_dir: Path) -> None:
    """Remove what killed saves left behind, and put back a checkpoint whose replacement never arrived."""
    for entry in run_dir.iterdir():
        match = STEP_NAME.fullmatch(entry.name)
        if entry.name.startswith(_TEMP):
            shutil.rmtree(entry, ignore_errors=True)
        elif match and match[2]:
            current = run_dir / f"step_{match[1]}"
            if current.is_dir():
                _discard(entry)
            else:
                entry.rename(current)


def _discard(folder: Path) -> None:
    # Renamed first: a process killed during the removal leaves a leftover, not a damaged checkpoint.
    with suppress(OSError):
        folder.rename(gone := folder.with_name(f"{_TEMP}gone_{secrets.token_hex(4)}"))
        shutil.rmtree(gone, ignore_errors=True)


def _save_error(run_dir: Path, needed: int, cause: OSError) -> CheckpointError:
    existing = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    remedy = "choose a folder you may write to with output_dir="
    if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "free space or raise the quota, or choose another disk with output_dir="
    return CheckpointError(
        f"cannot save a checkpoint in {run_dir}: {cause.strerror or cause} "
        f"({size_text(needed)} needed, {size_text(free)} free); earlier checkpoints are kept; {remedy}"
    )


# --- loading


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint, every file checked against the manifest's hashes first.

    path: a `step_<N>` folder, or a run's folder, whose newest good one is taken. Weights and extra tensors
    come on `device`; `training` stays on the CPU, mapped from the file where possible, for the caller to copy
    from.
    Raises CheckpointError naming the damaged file; a pickled object in it is refused without being built.
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
    """The run's newest undamaged checkpoint (None without one), and a line for each damaged one passed."""
    folder, _, notes = _newest(Path(run_dir))
    return folder, notes


def best_checkpoint(run_dir: str | Path) -> Path | None:
    """The run's undamaged checkpoint with the best score, of equal ones the first; None if none has one."""
    for folder in _by_score(Path(run_dir)):
        with suppress(CheckpointError):
            _verified(folder)
            return folder
    return None


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of one checkpoint folder, checked in itself but not against the files it lists."""
    path = Path(folder) / MANIFEST
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: not a complete checkpoint; use another one")
        if path.stat().st_size > _MANIFEST_LIMIT:
            raise ValueError("too large")
        manifest = json.loads(path.read_bytes())
        intact = manifest.pop("digest") == _digest(manifest) and _well_formed(manifest)
    # what damaged text makes of the parser: deep nesting, huge numbers, no object at all
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged ({brief(error)}); use an earlier checkpoint") from error
    if not intact:
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


def check_same_run(manifest: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raise CheckpointError naming each field in which `run` differs from the one the checkpoint is of.

    run: as given to `save_checkpoint`, nested mappings of JSON values: architecture, data, seed and the like.
    """
    saved, now = _flat(manifest["run"]), _flat(json.loads(to_json(run)))
    differing = [
        f"{name} was {saved.get(name, 'unset')!r} and is now {now.get(name, 'unset')!r}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name, "unset") != now.get(name, "unset")
    ]
    if differing:
        raise CheckpointError(
            f"cannot resume from the checkpoint of step {manifest['step']}: {'; '.join(differing)}; give the "
            "options and data it was trained with, another run_name, or resume=none"
        )


def choose(path: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The checkpoint folder that a path names, verified, its manifest, and a line for each one passed over.

    path: a checkpoint's folder, or a run's, whose newest good one is taken. Raises CheckpointError.
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
    for folder, _ in _folders(run_dir):
        try:
            return folder, _verified(folder), notes
        except CheckpointError as error:
            notes.append(str(error))
    return None, {}, notes


def _folders(run_dir: Path) -> list[tuple[Path, dict[str, Any] | None]]:
    """Checkpoint folders and manifests: first those whose manifest cannot be read, then the newest first."""
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


def _by_score(run_dir: Path) -> list[Path]:
    """The checkpoints that have a score by their manifests: the best first, of equal ones the oldest."""
    scored = [
        (manifest["score"], -manifest["serial"], folder)
        for folder, manifest in _folders(run_dir)
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


def _well_formed(manifest: dict[str, Any]) -> bool:
    files = manifest.get("files")
    return (
        all(type(manifest.get(key)) is int and manifest[key] >= 0 for key in ("format", "step", "serial"))
        and isinstance(manifest.get("run"), dict)
        and isinstance(files, dict)
        and _is_score(manifest.get("score"))
        and {WEIGHTS, TRAINING} <= files.keys()
        and all(name == TRAINING or _TENSORS_NAME.fullmatch(name) for name in files)
        and all(isinstance(entry, dict) and {"size", "sha256"} <= entry.keys() for entry in files.values())
    )


def _is_score(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(value))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else key)
    return flat


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str]:
    project = "not installed"
    with suppress(importlib.metadata.PackageNotFoundError):
        project = importlib.metadata.version("hrm-kernels")
    return {"project": project, "torch": str(torch.__version__), "python": platform.python_version()}
