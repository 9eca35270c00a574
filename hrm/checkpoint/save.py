"""Saves checkpoints atomically; `hrm.checkpoint.read` describes their contents.

A save writes into `.tmp_step_*`, syncs and renames. So a folder `step_<N>` is always complete, and a kill at
any moment leaves earlier checkpoints intact.
"""

import errno
import json
import platform
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hrm.checkpoint.read import (
    FORMAT,
    MANIFEST,
    STEP_NAME,
    TENSORS_NAME,
    TRAINING,
    WEIGHTS,
    by_score,
    digest,
    folders,
)
from hrm.checkpoint.safe_io import (
    CheckpointError,
    compact,
    nbytes,
    os_error,
    plain,
    sha256,
    sync,
)
from hrm.common.files import to_json
from hrm.common.text import size_text
from hrm.common.versions import installed

_TEMP = ".tmp_step_"


class Saver:
    """Saves a run's checkpoints in the background, one at a time; the context waits for the last one.

    A save copies its state at once; a thread hashes, writes and syncs it while training continues.
    """

    def __init__(self, run_dir: str | Path, *, keep: int | None = 3, keep_best: bool = False) -> None:
        """keep, keep_best: see `save_checkpoint`."""
        self.run_dir, self._keep, self._keep_best = Path(run_dir), keep, keep_best
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, **state: Any) -> Path:
        """Starts to save `step`; returns the folder that the checkpoint will have. state: see
        `save_checkpoint`.

        Waits for the previous save, so that memory holds one copy, and raises its CheckpointError.
        """
        self.wait()
        write = _prepared(self.run_dir, step, keep=self._keep, keep_best=self._keep_best, **state)
        # The thread is no daemon: a started save finishes even if the trainer ends.
        self._thread = Thread(target=self._run, args=(write,), name="checkpoint")
        self._thread.start()
        return self.run_dir / f"step_{step}"

    def check(self) -> None:
        """Raises CheckpointError if the last save failed; does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Waits until the last checkpoint is on the disk. Raises CheckpointError if its save failed."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def _run(self, write: Callable[[], Path]) -> None:
        try:
            write()
        # The training thread raises it.
        except BaseException as error:
            self._error = error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # Do not mask another error.
        with suppress(*[] if kind is None else [CheckpointError]):
            self.wait()


def save_checkpoint(run_dir: str | Path, step: int, **state: Any) -> Path:
    """Saves `run_dir/step_<step>` atomically, then removes all but the last `keep` (None: keep all).

    weights: tensors of any device and layout; views of one flat buffer are separated. training: nested dicts,
    lists and tuples of tensors, numbers, strings and None; anything else raises TypeError with its place.
    run: the identity of the run, for `differences`. facts: more fields of the manifest, such as results at
    this step (metrics), configuration (config) and training data (data). extra: further tensors by file name,
    as {"ema.safetensors": {...}}. score: higher is better; None or NaN is no score. keep_best: also keep the
    checkpoint with the best score. An existing `step_<step>` is replaced. Returns the checkpoint's folder.
    Raises CheckpointError if it cannot be written; earlier checkpoints stay, and no partial one remains.
    """
    return _prepared(Path(run_dir), step, **state)()


def _prepared(
    run_dir: Path,
    step: int,
    *,
    weights: Mapping[str, Tensor],
    training: Mapping[str, Any],
    run: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
    score: float | None = None,
    keep: int | None = 3,
    keep_best: bool = False,
) -> Callable[[], Path]:
    """Copies the arguments of `save_checkpoint`; returns a function that writes them in any thread, later."""
    if keep is not None and keep < 1:
        raise ValueError(f"keep is {keep}: at least one checkpoint must stay, or None for all")
    for name in extra or ():
        if not TENSORS_NAME.fullmatch(name) or name == WEIGHTS:
            raise ValueError(f"extra: {name!r} is not the name of a further .safetensors file")
    # Copy now: all files must belong to the same step.
    tensors = {
        name: {key: compact(tensor) for key, tensor in group.items()}
        for name, group in {WEIGHTS: weights, **(extra or {})}.items()
    }
    state = plain(training, "training")
    fields = {"metrics": {}, "config": None, "data": None, **(facts or {})}
    fields |= {"format": FORMAT, "step": step, "run": run, "versions": _versions(), "score": score}
    fields = json.loads(to_json(fields))

    def write() -> Path:
        folder = _write(run_dir, step, tensors, state, fields)
        if keep is not None:
            best = next(iter(by_score(run_dir)), None) if keep_best else None
            for old in [old for old, manifest in folders(run_dir) if manifest][keep:]:
                if old != best:
                    _discard(old)
        return folder

    return write


def _write(
    run_dir: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    fields: dict[str, Any],
) -> Path:
    final, temp = run_dir / f"step_{step}", run_dir / f"{_TEMP}{step}_{secrets.token_hex(4)}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _clean(run_dir)
        serial = 1 + max((manifest["serial"] for _, manifest in folders(run_dir) if manifest), default=0)
        temp.mkdir()
        _write_files(temp, tensors, state, {**fields, "serial": serial})
        _swap_in(temp, final)
    except Exception as error:
        cause = os_error(error)
        if cause is None:
            raise
        # Free the space before the message reports it.
        shutil.rmtree(temp, ignore_errors=True)
        raise _save_error(run_dir, nbytes(tensors) + nbytes(state), cause) from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return final


def _write_files(
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
    manifest = {**fields, "files": files}
    manifest["digest"] = digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def _swap_in(temp: Path, final: Path) -> None:
    # A rename cannot replace a folder, so move the old one aside. After a kill in between, readers find
    # `step_<N>.old` and the next save restores it.
    old = final.with_name(final.name + ".old")
    if final.is_dir():
        _discard(old)
        final.rename(old)
    temp.rename(final)
    sync(final.parent)
    _discard(old)


def _clean(run_dir: Path) -> None:
    """Removes the remains of killed saves, and restores a checkpoint whose replacement is missing."""
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
    # Rename first, so that a process killed in the removal leaves no damaged checkpoint.
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


def _versions() -> dict[str, str]:
    packages = {"project": "hrm-kernels", "triton": "triton", "numpy": "numpy"}
    found = {name: installed(package) for name, package in packages.items()}
    return {"python": platform.python_version(), "torch": str(torch.__version__), **found}
