"""The official URM code (UbiquantAI/URM) from a checkout, for tests that compare with it.

The environment variable URM_REPO is the path of the checkout; none of its code is part of this project.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.support.official import Float64Torch, flash_attn_func, official_modules

MODEL_FILE = "models/urm/urm.py"


def missing() -> str | None:
    """The reason why the official code cannot be loaded here, with a remedy; None if it can."""
    repo = os.environ.get("URM_REPO")
    if not repo:
        return "URM_REPO is not set; set it to a checkout of https://github.com/UbiquantAI/URM"
    if not (Path(repo) / MODEL_FILE).is_file():
        return f"URM_REPO={repo} holds no {MODEL_FILE}; it should be a checkout of UbiquantAI/URM"
    for package in ("pydantic", "einops"):
        if importlib.util.find_spec(package) is None:
            return f"the official URM code needs {package}; pip install {package}"
    return None


@contextmanager
def official_model(arch: Any, **sizes: int) -> Iterator[Any]:
    """The official model in float64, with PyTorch's attention instead of flash-attn; usable only within the
    `with` block.

    sizes: batch_size, seq_len, vocab_size, num_puzzle_identifiers.
    """
    flash = ModuleType("flash_attn")
    flash.__dict__["flash_attn_func"] = flash_attn_func
    shelved = {name: sys.modules.pop(name) for name in official_modules()}
    names = "hidden_size num_heads expansion H_cycles L_cycles puzzle_emb_ndim rms_norm_eps rope_theta"
    config = {name: getattr(arch, name) for name in f"{names} pos_encodings".split()} | sizes
    config |= {"num_layers": arch.L_layers, "loops": arch.halt_max_steps, "forward_dtype": "float64"}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(os.environ["URM_REPO"])
        patch.setitem(sys.modules, "flash_attn_interface", None)
        patch.setitem(sys.modules, "flash_attn", flash)
        try:
            model = importlib.import_module("models.urm.urm")
            for module in (model, sys.modules["models.layers"]):
                vars(module)["torch"] = Float64Torch("torch")
            yield model.URM(config).to(torch.float64)
        finally:
            for name in official_modules():
                del sys.modules[name]
            sys.modules.update(shelved)
