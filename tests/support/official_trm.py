"""The official TRM code (SamsungSAILMontreal/TinyRecursiveModels) from a checkout, for tests against it.

The environment variable TRM_REPO is the path of the checkout; none of its code is part of this project.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.official import Float64Torch, gradients, official_modules

MODEL_FILE = "models/recursive_reasoning/trm.py"


def missing() -> str | None:
    """The reason why the official code cannot be loaded here, with a remedy; None if it can."""
    repo = os.environ.get("TRM_REPO")
    if not repo:
        return (
            "TRM_REPO is not set; set it to a checkout of "
            "https://github.com/SamsungSAILMontreal/TinyRecursiveModels"
        )
    if not (Path(repo) / MODEL_FILE).is_file():
        return f"TRM_REPO={repo} holds no {MODEL_FILE}; it should be a checkout of TinyRecursiveModels"
    for package in ("pydantic", "einops"):
        if importlib.util.find_spec(package) is None:
            return f"the official TRM code needs {package}; pip install {package}"
    return None


@contextmanager
def official_code(in_float64: bool = False) -> Iterator[SimpleNamespace]:
    """The official modules `model`, `layers`, `losses` and `ema`; see `official.official_code`.

    Their package is importable only within the `with` block. in_float64: casts to float32 become casts to
    float64. Raises RuntimeError with `missing()` without a checkout.
    """
    reason = missing()
    if reason is not None:
        raise RuntimeError(reason)
    shelved = {name: sys.modules.pop(name) for name in official_modules()}
    path = list(sys.path)
    sys.path.insert(0, os.environ["TRM_REPO"])
    try:
        modules = {
            "model": importlib.import_module("models.recursive_reasoning.trm"),
            "layers": importlib.import_module("models.layers"),
            "losses": importlib.import_module("models.losses"),
            "ema": importlib.import_module("models.ema"),
        }
        if in_float64:
            for module in modules.values():
                vars(module)["torch"] = Float64Torch("torch")
        yield SimpleNamespace(**modules)
    finally:
        sys.path[:] = path
        for name in official_modules():
            del sys.modules[name]
        sys.modules.update(shelved)


def official_model(
    code: SimpleNamespace,
    arch: Any,
    *,
    batch_size: int,
    seq_len: int,
    vocab_size: int,
    num_puzzle_identifiers: int,
    dtype: torch.dtype,
) -> nn.Module:
    """The official model in its loss head (stablemax), in training mode, with its initial weights.

    arch: TRM as an architecture of this project. dtype: of the forward. Every sequence explores, see `step`.
    """
    names = (
        "puzzle_emb_ndim puzzle_emb_len H_cycles L_cycles H_layers L_layers hidden_size expansion num_heads "
        "pos_encodings mlp_t rms_norm_eps rope_theta halt_max_steps"
    )
    config = {name: getattr(arch, name) for name in names.split()} | {
        "batch_size": batch_size,
        "seq_len": seq_len,
        "vocab_size": vocab_size,
        "num_puzzle_identifiers": num_puzzle_identifiers,
        "forward_dtype": str(dtype).removeprefix("torch."),
        "halt_exploration_prob": 1.0,
        "no_ACT_continue": not arch.q_continue,
    }
    model = code.model.TinyRecursiveReasoningModel_ACTV1(config)
    head: nn.Module = code.losses.ACTLossHead(model, loss_type="stablemax_cross_entropy")
    return head.train()


def step(head: Any, carry: Any, batch: dict[str, Tensor], least: Tensor) -> tuple[Any, dict[str, Any]]:
    """Runs a training step with minimum steps `least` (B,); returns the new carry and the results.

    The results are those of `straight_line.act_training_step`, with gradients of the loss over the batch size
    and puzzle_rows (B, puzzle_emb_ndim), the gradient of each sequence's row, None without a table.
    """
    head.zero_grad()
    names = ["logits", "q_halt_logits", "q_continue_logits"]
    with pytest.MonkeyPatch.context() as drawn:
        drawn.setattr(torch, "randint_like", lambda *_, **__: least)
        carry, loss, metrics, outputs, _ = head(return_keys=names, carry=carry, batch=batch)
    (loss / len(least)).backward()
    rows = None
    if head.model.config.puzzle_emb_ndim:
        local = head.model.puzzle_emb.local_weights
        rows, local.grad = local.grad, None
    states = {**carry.current_data, **vars(carry.inner_carry)}
    return carry, {
        "outputs": {name.removesuffix("_logits"): outputs[name] for name in names},
        "loss": loss.detach(),
        "metrics": metrics,
        "gradients": gradients(head),
        "puzzle_rows": rows,
        "carry": {**states, "steps": carry.steps, "halted": carry.halted},
    }
