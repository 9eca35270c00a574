"""The official EqR code (locuslab/EqR) from a checkout, for tests against it.

The environment variable EQR_REPO is the path of the checkout; none of its code is part of this project.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.official import Float64Torch, official_modules

MODEL_FILE = "models/eqr.py"


def missing() -> str | None:
    """The reason why the official code cannot be loaded here, with a remedy; None if it can."""
    repo = os.environ.get("EQR_REPO")
    if not repo:
        return "EQR_REPO is not set; set it to a checkout of https://github.com/locuslab/EqR"
    if not (Path(repo) / MODEL_FILE).is_file():
        return f"EQR_REPO={repo} holds no {MODEL_FILE}; it should be a checkout of locuslab/EqR"
    return None


@contextmanager
def official_model() -> Iterator[Any]:
    """The module `models.eqr`, importable only within the `with` block; casts to float32 become casts to
    float64."""
    # The model imports one function of this package, which colours an error.
    printing: Any = ModuleType("utils.printing")
    printing.colored_exception = None
    shelved = {name: sys.modules.pop(name) for name in official_modules()}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(os.environ["EQR_REPO"])
        patch.setitem(sys.modules, "utils", ModuleType("utils"))
        patch.setitem(sys.modules, "utils.printing", printing)
        try:
            layers, model = (importlib.import_module(f"models.{name}") for name in ("layers", "eqr"))
            for module in (layers, model):
                vars(module)["torch"] = Float64Torch("torch")
            yield model
        finally:
            for name in official_modules():
                del sys.modules[name]
            sys.modules.update(shelved)
