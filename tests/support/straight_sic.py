"""The changes of sic and urm to TRM as plain functions over a dict of named tensors.

A norm or a convolution inside SwiGLU, learnt register tokens after a puzzle's tokens, a head bias, and one
state instead of two. The rest is in `straight_trm`; `in_place` replaces its functions by these.

Sources: Dillon 2026 (arXiv 2601.19085), Gao et al. 2025, Universal Reasoning Model (arXiv
2512.14693), and their code. Shapes and names as in `straight_line`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import straight_line as plain
from tests.support import straight_trm as trm
from tests.support.straight_line import Weights

EPS = 1e-5


def tokens_before(cfg: Any) -> int:
    """P: the number of a puzzle's tokens and registers."""
    return PUZZLE_TOKENS(cfg) + cfg.register_tokens


def weight_shapes(cfg: Any, vocab_size: int, seq_len: int, num_puzzles: int) -> dict[str, tuple[int, ...]]:
    """The shape of every weight and buffer by its name."""
    D = cfg.hidden_size
    shapes = trm.weight_shapes(cfg, vocab_size, seq_len, num_puzzles)
    if cfg.register_tokens:
        shapes["register_tokens.embedding_weight"] = (cfg.register_tokens, D)
    if cfg.head_bias:
        shapes["lm_head.bias"] = (vocab_size,)
    if cfg.single_state:
        del shapes["L_init"]
    for name in [name for name in shapes if name.endswith(".mlp.down_proj.weight")]:
        if cfg.swiglu == "conv":
            inner, conv = shapes[name][1], name.replace("down_proj.weight", "dwconv")
            shapes |= {f"{conv}.weight": (inner, 1, 2), f"{conv}.bias": (inner,)}
    return shapes


def normed_swiglu(w: Weights, name: str, z: Tensor) -> Tensor:
    """down(sigmoid(gate) * rms_norm(gate * up))."""
    gate, up = (z @ w[f"{name}.gate_up_proj.weight"].T).chunk(2, dim=-1)
    return (torch.sigmoid(gate) * plain.rms_norm(gate * up, EPS)) @ w[f"{name}.down_proj.weight"].T


def conv_swiglu(w: Weights, name: str, z: Tensor) -> Tensor:
    """down(silu(conv(silu(gate) * up))), computed token by token; z (B, T, D)."""
    gate, up = (z @ w[f"{name}.gate_up_proj.weight"].T).chunk(2, dim=-1)
    s = gate * torch.sigmoid(gate) * up
    before, itself = w[f"{name}.dwconv.weight"][:, 0].unbind(1)
    rows = []
    for t in range(z.shape[1]):
        c = itself * s[:, t] + w[f"{name}.dwconv.bias"]
        rows.append(c if t == 0 else c + before * s[:, t - 1])
    c = torch.stack(rows, dim=1)
    return (c * torch.sigmoid(c)) @ w[f"{name}.down_proj.weight"].T


def embed(w: Weights, cfg: Any, tokens: Tensor, puzzle_rows: Tensor | None) -> Tensor:
    """sqrt(D) * [puzzle tokens | registers | cell tokens], (B, T, D)."""
    B, D = len(tokens), cfg.hidden_size
    parts = []
    if puzzle_rows is not None:
        P = PUZZLE_TOKENS(cfg)
        padding = puzzle_rows.new_zeros(B, P * D - cfg.puzzle_emb_ndim)
        parts.append(torch.cat([puzzle_rows, padding], dim=1).view(B, P, D))
    if cfg.register_tokens:
        parts.append(w["register_tokens.embedding_weight"].repeat(B, 1, 1))
    e = torch.cat([*parts, w["embed_tokens.embedding_weight"][tokens]], dim=1)
    if cfg.pos_encodings == "learned":
        e = (e + w["embed_pos.embedding_weight"]) / math.sqrt(2)
    return math.sqrt(D) * e


def forward(
    w: Weights, cfg: Any, z_H: Tensor, z_L: Tensor, tokens: Tensor, puzzle_rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """An ACT step with gradient through its last H-cycle: z_H, z_L, logits (B, S, V), both q (B)."""
    e = embed(w, cfg, tokens, puzzle_rows)
    angles = plain.rope_angles(cfg, e) if cfg.pos_encodings.startswith("rope") else None
    for cycle in range(cfg.H_cycles):
        with torch.set_grad_enabled(torch.is_grad_enabled() and cycle == cfg.H_cycles - 1):
            for _ in range(cfg.L_cycles):
                if cfg.single_state:
                    z_H = trm.reasoning(w, cfg, z_H, e, angles)
                else:
                    z_L = trm.reasoning(w, cfg, z_L, z_H + e, angles)
            if not cfg.single_state:
                z_H = trm.reasoning(w, cfg, z_H, z_L, angles)
    logits = z_H[:, tokens_before(cfg) :] @ w["lm_head.weight"].T + w.get("lm_head.bias", 0)
    first = plain.wide(z_H[:, 0])
    q_halt, q_continue = (first @ plain.wide(w["q_head.weight"]).T + plain.wide(w["q_head.bias"])).unbind(-1)
    return z_H, z_L, logits, q_halt, q_continue


PUZZLE_TOKENS = trm.puzzle_tokens
SWIGLU = {"plain": plain.swiglu, "normed": normed_swiglu, "conv": conv_swiglu}


@contextmanager
def in_place(cfg: Any) -> Iterator[None]:
    """Within this context `straight_line` trains and evaluates the architecture `cfg`."""
    with trm.in_place(), pytest.MonkeyPatch.context() as patch:
        for function in (weight_shapes, embed, forward):
            patch.setattr(plain, function.__name__, function)
        for module in (plain, trm):
            patch.setattr(module, "puzzle_tokens", tokens_before)
        patch.setattr(plain, "swiglu", SWIGLU[cfg.swiglu])
        yield
