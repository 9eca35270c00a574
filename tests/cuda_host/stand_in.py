"""The stand-in CUDA library: how it is built, preloaded and controlled, and how its log is read.

README.md describes the library's limits and the log's format.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = Path(__file__).parent / "library"
# Its folder in the environment of a process that the library is preloaded into.
FOLDER = "CUDA_HOST_FOLDER"


# ------------------------------------------------------------------------------------- building, preloading


def folder() -> Path:
    """Where the library and the compilers' caches of this torch build lie, kept between runs."""
    import torch

    base = os.environ.get("CUDA_HOST_CACHE", str(ROOT / "build" / "cuda_host"))
    return Path(base) / f"torch-{torch.__version__}"


def fault() -> str | None:
    """The reason why this environment cannot run programs on the stand-in; None if it can."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is no CUDA build"
    return None


def include_folders() -> list[Path]:
    """CUDA's headers, from the packages that a CUDA build of torch brings along."""
    site = [Path(path) for path in sys.path if Path(path, "torch").is_dir()]
    # Those of the runtime's package first: Triton's may be of another version, and fill its gaps.
    patterns = ("nvidia/cu*/include", "nvidia/cuda_runtime/include", "triton/backends/nvidia/include")
    return [found for pattern in patterns for path in site for found in sorted(path.glob(pattern))]


def build(target: Path) -> Path:
    """Compiles the library into the folder `target` unless it is up to date; returns its path."""
    library, sources = target / "libcuda.so.1", sorted(SOURCES.glob("*.[ch]"))
    if library.exists() and library.stat().st_mtime > max(path.stat().st_mtime for path in sources):
        return library
    target.mkdir(parents=True, exist_ok=True)
    part = target / f"libcuda.{os.getpid()}"
    flags = ["-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unused-variable"]
    includes = [f"-I{path}" for path in include_folders()]
    inputs = [str(path) for path in sources if path.suffix == ".c"]
    linking = ["-Wl,-soname,libcuda.so.1", "-ldl", "-lpthread"]
    subprocess.run(["gcc", *flags, *includes, "-o", str(part), *inputs, *linking], check=True)
    part.replace(library)
    link = target / "libcuda.so"
    if not link.is_symlink():
        link.symlink_to("libcuda.so.1")
    return library


def environment(**more: str) -> dict[str, str]:
    """The variables of a process that runs on the stand-in. more: further ones, such as STANDIN_DEVICES."""
    target = folder()
    library = build(target)
    return {
        **os.environ,
        "LD_PRELOAD": str(library),
        # Triton links its launcher with it.
        "TRITON_LIBCUDA_PATH": str(target),
        "LD_LIBRARY_PATH": str(target),
        "PYTHONPATH": str(ROOT),
        "TORCHINDUCTOR_CACHE_DIR": str(target / "inductor"),
        "TRITON_CACHE_DIR": str(target / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        FOLDER: str(target),
        **more,
    }


# -------------------------------------------------------------------------------------------------- control


class StandIn:
    """Controls the library from the process that it is preloaded into."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.standin_last_violation.restype = ctypes.c_char_p

    @property
    def violations(self) -> int:
        """The number of broken rules so far."""
        return self._library.standin_violations()

    @property
    def last_violation(self) -> str:
        return self._library.standin_last_violation().decode()

    @contextmanager
    def log(self, path: Path) -> Iterator[None]:
        """Meanwhile each call is written to the file at `path`, which is replaced."""
        if not self._library.standin_open(os.fsencode(path)):
            raise OSError(f"{path} cannot be written")
        try:
            yield
        finally:
            self._library.standin_close()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Meanwhile records carry `name` as the innermost of their parts. It fits `profiling.opened_by`."""
        self._library.standin_begin(name.encode())
        try:
            yield
        finally:
            self._library.standin_end()


def active() -> StandIn | None:
    """The library that is preloaded into this process, None if there is none."""
    return StandIn() if FOLDER in os.environ and hasattr(ctypes.CDLL(None), "standin_open") else None


# ------------------------------------------------------------------------------------------------------ log


@dataclass(frozen=True)
class Record:
    """One line of the log; README.md lists the kinds and the facts of each.

    part: the innermost named range, "" outside of all; parts: all that are open, outermost first. stream: its
    number, 0 for the legacy stream, -1 where none is concerned. graph: the number of the graph that the call
    becomes a node of, 0 where it runs at once.
    """

    kind: str
    name: str
    parts: tuple[str, ...]
    stream: int
    graph: int
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def part(self) -> str:
        return self.parts[-1] if self.parts else ""

    @property
    def origin(self) -> str:
        """Where a kernel comes from: inductor, custom (this project's), aten, library or nccl."""
        source = self.facts["source"]
        if source != "triton":
            return source
        return "inductor" if self.name.startswith("triton_") else "custom"


def read_log(path: Path) -> list[Record]:
    """The records of a log in their order."""
    return [_record(json.loads(line)) for line in path.read_text().splitlines()]


def _record(line: dict[str, Any]) -> Record:
    kind, name, parts, stream, graph = (line.pop(key) for key in ("kind", "name", "part", "stream", "graph"))
    return Record(kind, name, tuple(parts.split("/")) if parts else (), stream, graph, line)
