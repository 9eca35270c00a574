"""Versions of packages and a rank's software and hardware, which must be equal on all ranks.

Each rank updates its own copy of the weights, and the copies are never synchronised, so a single rounding
difference makes them diverge unnoticed. Sources, libraries, the processor type and settings can cause one; a
driver's version, a GPU's name and the memory size cannot.
"""

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

# The folder that contains `hrm` and `kernels`, in a checkout or installed.
ROOT = Path(__file__).parents[2]
# Environment variables that choose between implementations or precisions.
SETTINGS = (
    "HRM_KERNELS",
    "TRITON_INTERPRET",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


# Maximum number of differing names, and of characters per value, in one message.
NAMES, CHARACTERS = 5, 60


def versions(device: torch.device | str = "cpu") -> dict[str, str]:
    """This rank's software and device by name, as short values for `World.check_equal`.

    Each source file has its own entry, so that a message can name the file that differs.
    """
    target = torch.device(device)
    libraries = {name: installed(name) for name in ("numpy", "triton", "numba")}
    return {
        "Python": platform.python_version(),
        "torch": f"{torch.__version__} {torch.version.git_version or ''}"[: len(torch.__version__) + 9],
        **libraries,
        **(_cuda(target) if target.type == "cuda" else _processor()),
        **{name: os.environ.get(name, "unset") for name in SETTINGS},
        **dict(_sources()),
    }


def _cuda(device: torch.device) -> dict[str, str]:
    here = torch.cuda.get_device_properties(device)
    return {
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "GPU": f"compute capability {here.major}.{here.minor}, {here.multi_processor_count} multiprocessors",
    }


def _processor() -> dict[str, str]:
    # The number of threads determines how sums are split.
    return {
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads (OMP_NUM_THREADS)": str(torch.get_num_threads()),
    }


def _sources() -> Iterator[tuple[str, str]]:
    """This project's source files, from where they were imported, each with 12 digits of its sha256."""
    for path in sorted([*ROOT.glob("hrm/**/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("train.py")]):
        yield path.relative_to(ROOT).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def package_versions(*packages: str) -> dict[str, str]:
    """Versions of torch and of the installed ones among these packages."""
    found = {name: installed(name) for name in packages}
    return {"torch": str(torch.__version__)} | {
        name: found[name] for name in packages if found[name] != "none"
    }


def installed(package: str) -> str:
    """The version of a package; "none" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def differences(given: Sequence[Mapping[str, str]]) -> str:
    """The names whose values differ between ranks, each with the values by rank; empty if all are equal.

    given: each rank's values by name. Long values are shortened; at most NAMES names are listed.
    """
    names = dict.fromkeys(name for values in given for name in values)
    found = [
        f"{name} ({difference})"
        for name in names
        if (difference := _difference([values.get(name, "nothing") for values in given]))
    ]
    return ", ".join(found[:NAMES]) + (f" and {len(found) - NAMES} more" if len(found) > NAMES else "")


def _difference(values: list[str]) -> str:
    """The values by rank, the most common last; empty if all are equal."""
    holders: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        holders.setdefault(value, []).append(rank)
    if len(holders) == 1:
        return ""
    *rare, (common, ranks) = sorted(holders.items(), key=lambda held: len(held[1]))
    told = [f"{_have(held)} {_short(value)}" for value, held in rare]
    return ", ".join([*told, f"{'the others have' if len(ranks) > 1 else _have(ranks)} {_short(common)}"])


def _have(ranks: list[int]) -> str:
    return f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} have"


def _short(value: str) -> str:
    if len(value) <= CHARACTERS:
        return value
    # The digest distinguishes long values with the same beginning.
    return f"{value[: CHARACTERS - 12]}… ({hashlib.sha256(value.encode()).hexdigest()[:8]})"
