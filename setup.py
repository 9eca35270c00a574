from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="hrm-kernels",
    version="0.1.0",
    description="Fast, verified training of hierarchical reasoning models (HRM)",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # `kernels` is also a package of others: name it, and search for nothing but hrm's own.
    packages=["kernels", *find_packages(include=["hrm", "hrm.*"])],
    package_data={"hrm.solving": ["player.html", "player.css", "player.js"]},
    py_modules=["train"],
    install_requires=[
        # Before 2.10 a crafted checkpoint could corrupt memory (CVE-2026-24747).
        "torch>=2.10",
        # The CUDA builds of torch bring their own; its interpreter and compiler also serve the tests.
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=1.26",
        "scipy>=1.12",
        "numba>=0.60",
        "omegaconf>=2.3",
        "pydantic>=2.10",
        "PyYAML>=6",
        "safetensors>=0.4.3",
        "tqdm>=4.60",
    ],
    extras_require={
        "flash": ["flash-attn>=2.6; platform_system == 'Linux'"],
        "wandb": ["wandb>=0.31"],
        "tensorboard": ["tensorboard>=2.14"],
        "profile": ["nvtx>=0.2.10"],
        "plots": ["matplotlib>=3.8"],
        "hub": ["huggingface_hub>=0.23"],
        "dev": [
            "hypothesis>=6.100",
            "matplotlib>=3.8",
            "mypy>=1.10",
            "nvtx>=0.2.10; platform_system == 'Linux'",
            "playwright>=1.40",
            "pytest>=8",
            "pytest-benchmark>=4",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
            "tensorboard>=2.14",
            "types-tqdm",
        ],
    },
)
