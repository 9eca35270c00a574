"""What a rank computes with: all ranks need the same, for each updates its own copy of the weights.

Nothing brings the copies together again, so a difference of one rounding lets them drift apart unseen.
Compared is what can make one: the sources, the libraries, the kind of processor and the settings. Not
compared is what does not: a driver's version, the name of a GPU, the amount of memory.
"""

import hashlib
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

# What is imported together also lies together, in a checkout and installed.
ROOT = Path(__file__).parent.parent
# Environment variables that choose between implementations or precisions.
SETTINGS = (
    "HRM_KERNELS",
    "TRITON_INTERPRET",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


def versions(device: torch.device | str = "cpu") -> dict[str, str]:
    """What this rank computes with on this device, by name, for `World.check_equal`: short values.

    The sources are one entry a file, so that the file which differs is the one that is named.
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


def installed(package: str) -> str:
    """The version of a package, "none" where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
