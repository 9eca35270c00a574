"""Writes data sets atomically, and caches them for all processes."""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hrm.common.errors import UserError
from hrm.common.files import read_json
from hrm.data.checksums import CHECKSUMS, write_checksums
from hrm.data.dataset import PuzzleDataset, fingerprint
from hrm.data.format import (
    ARRAYS,
    DIFFICULTY,
    MAX_DESCRIPTION_BYTES,
    DatasetError,
    Metadata,
    PuzzleSet,
    array_path,
)

# The file of a cached data set that holds its fingerprints.
STAMP = "fingerprints.json"


@dataclass(frozen=True)
class Shape:
    """The common properties of a split's examples; see `format.Metadata`."""

    seq_len: int
    vocab_size: int
    pad_id: int = 0
    ignore_label_id: int | None = 0
    blank_identifier_id: int = 0
    kind: str | None = None
    columns: int | None = None


class SplitWriter:
    """A split written group by group, in constant memory.

    `close` completes the split: it writes dataset.json and checksums.json. Sets are in the order of their
    first example.
    """

    def __init__(self, folder: Path, shape: Shape) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._shape = folder, shape
        self._files: dict[str, dict[str, _GrowingArray]] = {}
        self.groups = self.puzzles = self.examples = 0

    def add(self, set_name: str, part: PuzzleSet, difficulty: np.ndarray | None = None) -> None:
        """Appends the groups of `part`, whose indices begin at 0, to a set.

        difficulty: (N,) integers; give it for every part of a set or for none.
        """
        arrays = {array: getattr(part, array) for array in ARRAYS}
        if difficulty is not None:
            if difficulty.shape != (len(part.inputs),):
                raise ValueError(f"difficulty of shape {difficulty.shape} for {len(part.inputs)} examples")
            arrays[DIFFICULTY] = difficulty.astype(np.int32)
        files = self._files.get(set_name)
        if files is None:
            files = {array: _GrowingArray(array_path(self._folder, set_name, array)) for array in arrays}
            self._files[set_name] = files
        if files.keys() != arrays.keys():
            raise ValueError(f"set {set_name}: difficulty is given for some parts of it and not for others")
        for array, counted in (("puzzle_indices", "inputs"), ("group_indices", "puzzle_identifiers")):
            # Indices continue from earlier parts; only the first part keeps its leading 0.
            offset, indices = len(files[counted]), arrays[array]
            if offset + int(indices[-1]) > np.iinfo(indices.dtype).max:
                raise DatasetError(f"set {set_name}: more than {np.iinfo(indices.dtype).max} {counted}")
            arrays[array] = (indices + offset if offset else indices)[bool(offset) :]
        for array, rows in arrays.items():
            files[array].append(rows)
        self.groups += len(part.group_indices) - 1
        self.puzzles += len(part.puzzle_identifiers)
        self.examples += len(part.inputs)

    def close(self, num_puzzle_identifiers: int) -> Metadata:
        """Writes the split's description and checksums, and closes its files."""
        paths = [self._folder / "dataset.json"]
        for name, files in self._files.items():
            for array, file in files.items():
                file.finish()
                paths.append(array_path(self._folder, name, array))
        metadata = Metadata(
            **asdict(self._shape),
            num_puzzle_identifiers=num_puzzle_identifiers,
            total_groups=self.groups,
            mean_puzzle_examples=self.examples / max(1, self.puzzles),
            sets=list(self._files),
        )
        values = asdict(metadata)
        # Leave out fields that the official format lacks, unless they are set.
        for key in ("kind", "columns"):
            if values[key] is None:
                del values[key]
        text = json.dumps(values) + "\n"
        paths[0].write_text(text, encoding="utf-8")
        write_checksums(self._folder, paths)
        return metadata

    def abandon(self) -> None:
        """Closes the files of an unfinished split; does nothing after `close`."""
        for files in self._files.values():
            for file in files.values():
                file.abandon()


class DatasetWriter:
    """A data set in a hidden folder until it is complete; see `new_dataset`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.closed = False
        self._splits: dict[str, SplitWriter] = {}

    def split(self, name: str, shape: Shape) -> SplitWriter:
        """Starts a split, "train" or "test"."""
        self._splits[name] = SplitWriter(self.folder / name, shape)
        return self._splits[name]

    def close(self, identifiers: Sequence[str]) -> None:
        """Closes the splits and writes the name of every puzzle identifier."""
        for split in self._splits.values():
            split.close(len(identifiers))
        with (self.folder / "identifiers.json").open("w", encoding="utf-8") as file:
            json.dump(list(identifiers), file)
            file.write("\n")
        self.closed = True

    def abandon(self) -> None:
        """Closes the files of an unfinished data set; does nothing after `close`."""
        for split in self._splits.values():
            split.abandon()


@contextmanager
def new_dataset(folder: str | Path) -> Iterator[DatasetWriter]:
    """A data set to fill and close; it appears in `folder` if the block succeeds, and is removed otherwise.

    Replaces a data set in `folder`. Raises DatasetError if the folder holds anything else or cannot be
    written.
    """
    with _new_folder(Path(folder), _is_dataset) as new:
        data = DatasetWriter(new)
        try:
            yield data
            if not data.closed:
                raise ValueError(f"{folder}: the data set was not closed")
        finally:
            data.abandon()


class _GrowingArray:
    """A .npy file that grows by rows; its header of fixed size is rewritten at the end."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._shape: tuple[int, ...] = ()
        self._dtype: np.dtype | None = None
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def append(self, rows: np.ndarray) -> None:
        if self._dtype is None:
            self._dtype, self._shape = rows.dtype, rows.shape[1:]
            self._write_header()
        if (rows.dtype, rows.shape[1:]) != (self._dtype, self._shape):
            raise ValueError(f"rows of {rows.dtype} {rows.shape[1:]} after {self._dtype} {self._shape}")
        self._file.write(np.ascontiguousarray(rows).data)
        self._rows += len(rows)

    def finish(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def abandon(self) -> None:
        # The disk may be full; the buffered data is not needed.
        with suppress(OSError):
            self._file.close()

    def _write_header(self) -> None:
        assert self._dtype is not None
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self._rows, *self._shape)}
        np.lib.format.write_array_header_1_0(self._file, header)


def check_output(folder: str | Path) -> None:
    """Raises DatasetError if new_dataset would refuse the folder; call it before a long build."""
    _check_replaceable(Path(folder), _is_dataset)


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """The cached folder of a data set, which `build(folder)` writes on first use.

    The cache is $HRM_CACHE, else $XDG_CACHE_HOME/hrm, else ~/.cache/hrm, or `data/` in the working directory
    if that is not writable. `name` must identify the data set. Processes may build it concurrently: the first
    to finish wins, the others discard theirs. A damaged data set is rebuilt.
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
        stamp = read_json(folder / STAMP, MAX_DESCRIPTION_BYTES, "fingerprints of splits")
        return bool(stamp) and all(
            PuzzleDataset(folder, split).has_fingerprint(value) for split, value in stamp.items()
        )
    except (OSError, AttributeError, UserError):
        return False


def _build_into(folder: Path, build: Callable[[Path], None]) -> Path:
    new = _beside(folder)
    try:
        build(new)
        splits = sorted(path.name for path in new.iterdir() if path.is_dir())
        stamp = {split: fingerprint(PuzzleDataset(new, split)) for split in splits}
        (new / STAMP).write_text(json.dumps(stamp) + "\n", encoding="utf-8")
        # Another process may have finished first; replace only a damaged data set.
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
    """A folder to fill next to `folder`; it replaces `folder` if the block succeeds, else it is removed."""
    # Replace the folder that a link points to, not the link.
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
    # Only builders write checksums; data sets of other programs must not be replaced.
    return all((folder / name).is_file() for name in ("dataset.json", CHECKSUMS)) and all(
        path.name in ("dataset.json", CHECKSUMS) or path.suffix == ".npy" for path in folder.iterdir()
    )


def _is_dataset(folder: Path) -> bool:
    # test_puzzles.json holds the answers of an ARC data set.
    others = {"identifiers.json", STAMP, "test_puzzles.json"}
    return all(path.name in others or (path.is_dir() and _is_split(path)) for path in folder.iterdir())


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")


def _discard(folder: Path) -> None:
    # Rename first: the name is free immediately and never holds half a data set.
    aside = folder.rename(_beside(folder))
    shutil.rmtree(aside) if aside.is_dir() else aside.unlink()


def _unwritable(folder: Path, error: OSError) -> DatasetError:
    return DatasetError(
        f"{folder}: cannot be written ({error.strerror or error}); free space there or choose another folder"
    )
