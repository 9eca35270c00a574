"""Writing data sets: whole or not at all, and once into a cache that several processes may share."""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from hrm.data.dataset import PuzzleDataset, fingerprint
from hrm.data.layout import ARRAYS, DatasetError, Metadata, PuzzleSet, array_path

# In a cached data set, the fingerprints it was written with.
STAMP = "fingerprints.json"


def write_split(folder: str | Path, sets: Mapping[str, PuzzleSet], metadata: Metadata) -> None:
    """Write one split, `folder` = <data>/<split>: its dataset.json and the arrays of its sets.

    The files appear all at once, a split already there is replaced. Raises DatasetError when the folder holds
    anything else, or cannot be written.
    """
    if metadata.sets != list(sets):
        raise ValueError(f"metadata.sets is {metadata.sets}, expected the names of the sets, {list(sets)}")
    with _new_folder(Path(folder), _is_split) as new:
        (new / "dataset.json").write_text(json.dumps(asdict(metadata)) + "\n", encoding="utf-8")
        for name, part in sets.items():
            for array in ARRAYS:
                np.save(array_path(new, name, array), getattr(part, array), allow_pickle=False)


def write_dataset(
    folder: str | Path,
    splits: Mapping[str, tuple[Mapping[str, PuzzleSet], Metadata]],
    identifiers: list[str],
) -> None:
    """Write a whole data set: its splits, by name, and identifiers.json, the name of every puzzle identifier.

    It appears all at once, a data set already there is replaced. Raises DatasetError as write_split does.
    """
    with _new_folder(Path(folder), _is_dataset) as new:
        for name, (sets, metadata) in splits.items():
            write_split(new / name, sets, metadata)
        (new / "identifiers.json").write_text(json.dumps(identifiers) + "\n", encoding="utf-8")


def check_output(folder: str | Path) -> None:
    """Raise DatasetError when write_dataset would refuse the folder: to know before hours of building."""
    _check_replaceable(Path(folder), _is_dataset)


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """Folder of a data set that `build(folder)` writes, built on first use and found again afterwards.

    It lies in $HRM_CACHE, else $XDG_CACHE_HOME/hrm, else ~/.cache/hrm, or in `data/` of the working directory
    where that cannot be written. `name` must tell apart all data sets. Processes may ask for it at once: one
    gets its data set in, the others drop theirs. One that is cut or altered is built again.
    """
    roots = [*_cache_root(), Path("data").absolute()]
    for root in roots:
        if _is_intact(root / name):
            return root / name
    for root in roots:
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(root, os.W_OK | os.X_OK):
            return _build_into(root / name, build)
    raise DatasetError(
        f"{roots[0]}: no folder to keep data sets in can be written; set HRM_CACHE to one that can"
    )


def _cache_root() -> list[Path]:
    if chosen := os.environ.get("HRM_CACHE"):
        return [Path(chosen).expanduser()]
    if base := os.environ.get("XDG_CACHE_HOME"):
        return [Path(base) / "hrm"]
    try:
        return [Path.home() / ".cache" / "hrm"]
    # No home directory is known.
    except RuntimeError:
        return []


def _is_intact(folder: Path) -> bool:
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        return bool(stamp) and all(
            fingerprint(PuzzleDataset(folder, split)) == value for split, value in stamp.items()
        )
    except (OSError, ValueError, AttributeError, DatasetError):
        return False


def _build_into(folder: Path, build: Callable[[Path], None]) -> Path:
    new = _beside(folder)
    try:
        build(new)
        splits = sorted(path.name for path in new.iterdir() if path.is_dir())
        stamp = {split: fingerprint(PuzzleDataset(new, split)) for split in splits}
        (new / STAMP).write_text(json.dumps(stamp) + "\n", encoding="utf-8")
        # Another process may have put its own there since; only what is damaged gives way.
        if folder.exists() and not _is_intact(folder):
            _discard(folder)
        try:
            new.rename(folder)
        except OSError:
            if not _is_intact(folder):
                raise
    except OSError as error:
        raise _unwritable(folder, error) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


@contextmanager
def _new_folder(folder: Path, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder to fill, beside `folder`, that takes its place when the block ends well, else is gone."""
    # The folder itself, not a link to it, is what gets replaced.
    folder = folder.resolve()
    _check_replaceable(folder, replaceable)
    new = _beside(folder)
    try:
        new.mkdir(parents=True)
        yield new
        if folder.exists():
            _discard(folder)
        new.rename(folder)
    except OSError as error:
        raise _unwritable(folder, error) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _check_replaceable(folder: Path, replaceable: Callable[[Path], bool]) -> None:
    if folder.exists() and not (folder.is_dir() and (replaceable(folder) or not any(folder.iterdir()))):
        raise DatasetError(f"{folder}: exists and is not a data set to replace; choose another folder")


def _is_split(folder: Path) -> bool:
    return (folder / "dataset.json").is_file() and all(
        path.name == "dataset.json" or path.suffix == ".npy" for path in folder.iterdir()
    )


def _is_dataset(folder: Path) -> bool:
    others = {"identifiers.json", STAMP}
    return all(path.name in others or (path.is_dir() and _is_split(path)) for path in folder.iterdir())


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")


def _discard(folder: Path) -> None:
    # Out of the way first: its name is free at once, and half of it never stands under that name.
    aside = folder.rename(_beside(folder))
    shutil.rmtree(aside) if aside.is_dir() else aside.unlink()


def _unwritable(folder: Path, error: OSError) -> DatasetError:
    return DatasetError(
        f"{folder}: cannot be written ({error.strerror or error}); free space there or choose another folder"
    )
