"""Stores the fastest implementations measured on this GPU (`kernels.fastest`) for later runs.

The key of a measurement is the GPU, versions and the sources of this package; without a measurement `backend`
decides by shape and dtype. A run measures in a separate process, so that a kernel that fails or hangs costs
at most the time limit.
"""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kernels.backend import Table
from kernels.cases import Sizes

# Seconds after which a measurement starts no further candidate, and after which its process is killed.
SECONDS, LIMIT = 60, 120
LARGEST_FILE = 1 << 20
IMPLEMENTATIONS = ("triton", "reference", "flash", "sdpa", "quack")
ROOT = Path(__file__).parent


# -------------------------------------------------------------------------------------- stored measurements


@cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def made_by(device: torch.device) -> dict[str, str]:
    """The conditions of a measurement: the GPU, its software, and the sources of this package."""
    sources = hashlib.sha256()
    for path in sorted(ROOT.glob("*.py")):
        sources.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    where = {"device": str(device.type)}
    if device.type == "cuda":
        here = torch.cuda.get_device_properties(device)
        where["device"] = f"{here.name}, {here.major}.{here.minor}, {here.multi_processor_count} processors"
    packages = ("triton", "flash-attn", "flash-attn-3", "quack-kernels")
    libraries = {name: version for name in packages if (version := _version(name))}
    torch_is = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    return {**where, **torch_is, **libraries, "kernels": sources.hexdigest()[:16]}


def cache_folder() -> Path:
    """The folder of measurements: $XDG_CACHE_HOME/hrm-kernels, else ~/.cache/hrm-kernels."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The specification requires relative paths to be ignored.
    return (given if given.is_absolute() else Path(os.path.expanduser("~/.cache"))) / "hrm-kernels"


def cache_file(maker: dict[str, str]) -> Path:
    digest = hashlib.sha256(json.dumps(maker, sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"measured-{digest[:16]}.json"


class Kept(NamedTuple):
    """A stored measurement. done: sizes that need not be measured again. rows: the results."""

    maker: dict[str, str]
    table: Table
    done: list[str]
    rows: list[dict[str, Any]]


def to_text(kept: Kept) -> str:
    """JSON with a digest of the contents."""
    table = {"choices": kept.table.choices, "tiles": kept.table.tiles}
    content = {"made_by": kept.maker, **table, "done": kept.done, "rows": kept.rows}
    return json.dumps({"sha256": _digest(content), **content}, indent=1)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def from_text(text: str, maker: dict[str, str]) -> Kept | None:
    """The table that `to_text` wrote for the same maker; None for any other text."""
    try:
        content = json.loads(text)
        if content.pop("sha256") != _digest(content) or content["made_by"] != maker:
            return None
        table = Table(content["choices"], content["tiles"])
        known = {name for choice in table.choices.values() for name in choice.values()}
        if not known <= set(IMPLEMENTATIONS) or not all(type(tile) is dict for tile in table.tiles.values()):
            return None
        return Kept(maker, table, list(content["done"]), list(content["rows"]))
    # A damaged file may raise any of these; deep nesting exhausts the parser's stack.
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def load(maker: dict[str, str], path: Path | None = None) -> Kept | None:
    """The stored measurement of a maker; None without a readable one."""
    path = path or cache_file(maker)
    try:
        if path.stat().st_size > LARGEST_FILE:
            return None
        return from_text(path.read_text(encoding="utf-8"), maker)
    except (OSError, ValueError):
        return None


def save(kept: Kept, path: Path | None = None) -> str | None:
    """Stores a measurement atomically; returns the reason if it fails, else None."""
    path = path or cache_file(kept.maker)
    written = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            written = Path(file.name)
            file.write(to_text(kept))
            file.flush()
            os.fsync(file.fileno())
        written.replace(path)
    except OSError as error:
        if written is not None:
            with suppress(OSError):
                written.unlink()
        return f"{path} cannot be written ({error.strerror})"
    return None


# ---------------------------------------------------------------------------------------- once for a run


def request(sizes: Sizes, dtype: torch.dtype, only: Sequence[str]) -> str:
    """The name of a measurement in `done`."""
    return f"{' '.join(map(str, sizes))} {str(dtype).removeprefix('torch.')} {' '.join(only)}"


def command(sizes: Sizes, dtype: torch.dtype, device: torch.device, only: Sequence[str]) -> list[str]:
    """The command that measures missing cases in a separate process."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in sizes._asdict().items()]
    words += [f"--dtype={str(dtype).removeprefix('torch.')}", f"--device={device}", f"--seconds={SECONDS}"]
    return [sys.executable, "-m", "kernels", "--measure", "--missing", "--json", *words, "--only", *only]


def _run(words: list[str]) -> str:
    """A command's output; empty if it fails or takes longer than LIMIT."""
    path = os.pathsep.join([str(ROOT.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            words,
            env=os.environ | {"PYTHONPATH": path, "HRM_KERNELS": "auto"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=LIMIT,
        ).stdout
    return ""


def once(
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    only: Sequence[str],
    *,
    run: Callable[[list[str]], str] = _run,
    say: Callable[[str], None] = print,
) -> Table:
    """The table for these sizes, stored or measured now; a measurement prints one line.

    A failed measurement is not repeated for the same sizes: missing choices are made without it.
    """
    maker, asked = made_by(device), request(sizes, dtype, only)
    kept = load(maker)
    if kept is not None and asked in kept.done:
        return kept.table
    start = time.monotonic()
    found = from_text(run(command(sizes, dtype, device, only)), maker)
    took, failed = time.monotonic() - start, found is None
    # A killed process has stored its results so far.
    found = found or load(maker) or Kept(maker, Table({}, {}), [], [])
    if asked not in found.done:
        found = found._replace(done=[*found.done, asked])
        problem = save(found)
    else:
        problem = None if load(maker) else save(found)
    of_these = [row for row in found.rows if row["case"] in only and row["choice"]]
    kernels = sum("triton" in row["choice"].values() for row in of_these)
    line = f"kernels: measured on this GPU in {took:.0f} s, {len(of_these)} operations, {kernels} by Triton"
    if failed:
        line = f"kernels: measuring them on this GPU failed after {took:.0f} s, so shapes decide"
    say(f"{line}; {problem or f'kept in {cache_file(maker)}'}")
    return found.table
