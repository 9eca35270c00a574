"""The official HRM code (sapientinc/HRM) from a checkout, for tests and benchmarks that compare with it.

The environment variable HRM_REPO is the path of the checkout; none of its code is part of this project.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODEL_FILE = "models/hrm/hrm_act_v1.py"


def missing() -> str | None:
    """The reason why the official code cannot be loaded here, with a remedy; None if it can."""
    repo = os.environ.get("HRM_REPO")
    if not repo:
        return "HRM_REPO is not set; set it to a checkout of https://github.com/sapientinc/HRM"
    if not (Path(repo) / MODEL_FILE).is_file():
        return f"HRM_REPO={repo} holds no {MODEL_FILE}; it should be a checkout of sapientinc/HRM"
    if importlib.util.find_spec("pydantic") is None:
        return "the official code needs pydantic; pip install pydantic"
    return None


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """flash-attn's function, computed by PyTorch's attention; q, k, v and the result are (B, T, h, d)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def official_modules() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] == "models"]


class Float64Torch(ModuleType):
    """The module torch, except that float32 means float64."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name == "float32" else getattr(torch, name)


@contextmanager
def official_code(in_float64: bool = False) -> Iterator[SimpleNamespace]:
    """The official modules `model`, `losses`, ...; `stand_in` tells whether they use PyTorch's attention.

    Their package `models` is importable only within the `with` block (torch.compile looks a module up by its
    name); another package `models` is restored afterwards. PyTorch's attention replaces a missing flash-attn.
    in_float64: casts to float32 become casts to float64, for tests in that precision. Raises RuntimeError
    with `missing()` without a checkout.
    """
    reason = missing()
    if reason is not None:
        raise RuntimeError(reason)
    shelved = {name: sys.modules.pop(name) for name in official_modules()}
    path = list(sys.path)
    stand_in = all(importlib.util.find_spec(name) is None for name in ("flash_attn_interface", "flash_attn"))
    if stand_in:
        stub = ModuleType("flash_attn")
        stub.__dict__["flash_attn_func"] = flash_attn_func
        sys.modules["flash_attn"] = stub
    sys.path.insert(0, os.environ["HRM_REPO"])
    try:
        modules = {
            "model": importlib.import_module("models.hrm.hrm_act_v1"),
            "layers": importlib.import_module("models.layers"),
            "losses": importlib.import_module("models.losses"),
            "sparse_embedding": importlib.import_module("models.sparse_embedding"),
        }
        if in_float64:
            for module in modules.values():
                vars(module)["torch"] = Float64Torch("torch")
        yield SimpleNamespace(**modules, stand_in=stand_in)
    finally:
        sys.path[:] = path
        for name in official_modules() + ["flash_attn"] * stand_in:
            del sys.modules[name]
        sys.modules.update(shelved)


def official_model(
    code: SimpleNamespace,
    arch: Any,
    weights: dict[str, Tensor],
    *,
    batch_size: int,
    seq_len: int,
    dtype: torch.dtype,
    loss_type: str,
    halt_exploration_prob: float,
) -> nn.Module:
    """The official model in its loss head, in training mode, with these weights, on their device.

    arch: an architecture of this project, v1 (no gates). weights: a state dict of this project, which has the
    official names; all are used. dtype: of the forward; parameters have torch's default.
    """
    names = (
        "puzzle_emb_ndim H_cycles L_cycles H_layers L_layers hidden_size expansion num_heads pos_encodings "
        "rms_norm_eps rope_theta halt_max_steps"
    )
    table = weights.get("puzzle_emb.weights")
    config = {name: getattr(arch, name) for name in names.split()} | {
        "batch_size": batch_size,
        "seq_len": seq_len,
        "vocab_size": len(weights["lm_head.weight"]),
        "num_puzzle_identifiers": 1 if table is None else len(table),
        "forward_dtype": str(dtype).removeprefix("torch."),
        "halt_exploration_prob": halt_exploration_prob,
    }
    with torch.device(weights["lm_head.weight"].device):
        model = code.model.HierarchicalReasoningModel_ACTV1(config)
        head = code.losses.ACTLossHead(model, loss_type=loss_type)
    head.load_state_dict({f"model.inner.{name}": weight for name, weight in weights.items()})
    return head.train()


def gradients(head: nn.Module) -> dict[str, Tensor]:
    """Gradients of the dense parameters by this project's names."""
    return {
        name.removeprefix("model.inner."): p.grad for name, p in head.named_parameters() if p.grad is not None
    }
