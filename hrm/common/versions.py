"""Versions of packages, and what a rank computes with: all ranks need the same.

Each rank updates its own copy of the weights and nothing brings the copies together again, so a difference of
one rounding lets them drift apart unseen. Sources, libraries, the kind of processor and settings can make
one; a driver's version, a GPU's name and the amount of memory cannot.
"""

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

# The folder of `hrm` and `kernels`, in a checkout and installed.
ROOT = Path(__file__).parents[2]
# Environment variables that choose between implementations or precisions.
SETTINGS = (
    "HRM_KERNELS",
    "TRITON_INTERPRET",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


# Differing names, and characters of a value, in one message.
NAMES, CHARACTERS = 5, 60


def versions(device: torch.device | str = "cpu") -> dict[str, str]:
    """This rank's software and device by name, as short values for `World.check_equal`.

    Each source file has an entry of its own, so that a message names the file that differs.
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
    # Sums are cut into as many parts as there are threads.
    return {
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads (OMP_NUM_THREADS)": str(torch.get_num_threads()),
    }


def _sources() -> Iterator[tuple[str, str]]:
    """The names of this project's sources, where they were imported from, with 12 digits of a sha256."""
    for path in sorted([*ROOT.glob("hrm/**/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("train.py")]):
        yield path.relative_to(ROOT).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def package_versions(*packages: str) -> dict[str, str]:
    """Versions of torch and of those of these packages that are installed."""
    found = {name: installed(name) for name in packages}
    return {"torch": str(torch.__version__)} | {
        name: found[name] for name in packages if found[name] != "none"
    }


def installed(package: str) -> str:
    """The version of a package, "none" where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def differences(given: Sequence[Mapping[str, str]]) -> str:
    """The names whose values differ between ranks, each with who holds what; empty if all are equal.

    given: each rank's values by name. Long values are shortened; of many names the first few are listed.
    """
    names = dict.fromkeys(name for values in given for name in values)
    found = [
        f"{name} ({difference})"
        for name in names
        if (difference := _difference([values.get(name, "nothing") for values in given]))
    ]
    return ", ".join(found[:NAMES]) + (f" and {len(found) - NAMES} more" if len(found) > NAMES else "")


def _difference(values: list[str]) -> str:
    """Which ranks hold which value, the commonest last; empty if all hold the same."""
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
    # The digest tells long values apart that begin alike.
    return f"{value[: CHARACTERS - 12]}… ({hashlib.sha256(value.encode()).hexdigest()[:8]})"
