"""The code of "Speed is Confidence" (jvdillon/sic) from a checkout, for tests that compare with it.

The environment variable SIC_REPO is the path of the checkout; none of its code is part of this project.
"""

import importlib
import importlib.util
import os
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

MODEL_FILE = "code/model.py"


def missing() -> str | None:
    """The reason why the code cannot be loaded here, with a remedy; None if it can."""
    repo = os.environ.get("SIC_REPO")
    if not repo:
        return "SIC_REPO is not set; set it to a checkout of https://github.com/jvdillon/sic"
    if not (Path(repo) / MODEL_FILE).is_file():
        return f"SIC_REPO={repo} holds no {MODEL_FILE}; it should be a checkout of jvdillon/sic"
    if importlib.util.find_spec("configgle") is None:
        return "the code of sic needs configgle; pip install configgle"
    return None


@contextmanager
def official_model(arch: Any, vocab_size: int, side: int) -> Iterator[Any]:
    """The official model with one chain in float64, for grids of side * side cells; usable only within the
    `with` block."""
    names = ("model", "util")
    shelved = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(os.environ["SIC_REPO"]) / "code"))
        try:
            # It does not exist before Python 3.12.
            patch.setattr(typing, "override", lambda method: method, raising=False)
            code: Any = importlib.import_module("model")
            # Its check rejects registers with a mixer whose length includes them.
            patch.setattr(code, "_block_is_mlp_mixer", lambda block: False)
            swiglu = code.SwiGLU.Config(expansion=arch.expansion)
            tokens = side * side + arch.register_tokens
            block = code.MLPMixerBlock.Config(seq_len=tokens, attn=swiglu, ffn=swiglu)
            yield code.TRM3.Config(
                vocab_size=vocab_size,
                puzzle_grid_shape=(side, side),
                hidden_size=arch.hidden_size,
                num_layers=arch.L_layers,
                H_cycles=arch.H_cycles,
                L_cycles=arch.L_cycles,
                num_register_tokens=arch.register_tokens,
                head_bias=arch.head_bias,
                dtype=torch.float64,
                device="cpu",
                block=block,
                compile_core=False,
                K_L=1,
            ).make()
        finally:
            for name in names:
                sys.modules.pop(name, None)
            sys.modules.update(shelved)


def their_name(name: str) -> str:
    """The official name of one of this project's weights."""
    for ours, theirs in {
        "embed_tokens.embedding_weight": "embed_tokens.weight",
        "register_tokens.embedding_weight": "register_tokens",
        "lm_head.": "head.",
        "L_level.layers.": "reasoning.",
        ".mlp_t.": ".attn.",
        ".gate_up_proj.": ".up_proj.",
    }.items():
        name = name.replace(ours, theirs)
    return name


def load(model: Any, weights: dict[str, Tensor]) -> None:
    """Loads this project's weights into the official model; its Q head has no row for q_continue."""
    state = {their_name(name): weight for name, weight in weights.items()}
    state |= {name: state[name][None] for name in ("H_init", "L_init")}
    state |= {name: state[name][:1] for name in ("q_head.weight", "q_head.bias")}
    unused = model.load_state_dict(state, strict=False)
    assert not unused.unexpected_keys and unused.missing_keys == ["_dummy"]
