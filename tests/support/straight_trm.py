"""The changes of TRM to HRM as plain functions over a dict of named tensors.

Both levels share one stack of blocks, the gradient flows through the whole last H-cycle, and a puzzle's row
may have more tokens than it fills. The rest of a training step, from halting (q_halt > 0, no second pass) to
the loss lm + 0.5 q_halt, is in `straight_line` with q_continue=false; `in_place` replaces its functions.

Source: Jolicoeur-Martineau 2025, Less is More: Recursive Reasoning with Tiny Networks (arXiv 2510.04871),
and its official code. Shapes and names as in `straight_line`; `cfg` has puzzle_emb_len and mlp_t besides.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import straight_line as plain
from tests.support.straight_line import Angles, Weights


def puzzle_tokens(cfg: Any) -> int:
    """P: the number of tokens of a puzzle's row in front of the cells, padded with zeros."""
    if cfg.puzzle_emb_ndim == 0:
        return 0
    return cfg.puzzle_emb_len or math.ceil(cfg.puzzle_emb_ndim / cfg.hidden_size)


def weight_shapes(cfg: Any, vocab_size: int, seq_len: int, num_puzzles: int) -> dict[str, tuple[int, ...]]:
    """The shape of every weight and buffer by its name."""
    D, T = cfg.hidden_size, puzzle_tokens(cfg) + seq_len
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.embedding_weight": (vocab_size, D)}
    if cfg.pos_encodings == "learned":
        shapes["embed_pos.embedding_weight"] = (T, D)
    if cfg.puzzle_emb_ndim > 0:
        shapes[plain.PUZZLE_TABLE] = (num_puzzles, cfg.puzzle_emb_ndim)
    shapes |= {"lm_head.weight": (vocab_size, D), "q_head.weight": (2, D), "q_head.bias": (2,)}
    shapes |= {"H_init": (D,), "L_init": (D,)}
    for i in range(cfg.L_layers):
        block = f"L_level.layers.{i}"
        if cfg.mlp_t:
            shapes |= swiglu_shapes(f"{block}.mlp_t", T, cfg.expansion)
        else:
            shapes[f"{block}.self_attn.qkv_proj.weight"] = (3 * D, D)
            shapes[f"{block}.self_attn.o_proj.weight"] = (D, D)
        shapes |= swiglu_shapes(f"{block}.mlp", D, cfg.expansion)
    return shapes


def swiglu_shapes(name: str, width: int, expansion: float) -> dict[str, tuple[int, ...]]:
    """The shapes of a SwiGLU over `width` channels or tokens."""
    inner = math.ceil(round(expansion * width * 2 / 3) / 256) * 256
    return {f"{name}.gate_up_proj.weight": (2 * inner, width), f"{name}.down_proj.weight": (width, inner)}


def reasoning(w: Weights, cfg: Any, z: Tensor, o: Tensor, angles: Angles) -> Tensor:
    """A call of the shared stack: z + o through its blocks."""
    z = z + o
    for i in range(cfg.L_layers):
        block = f"L_level.layers.{i}"
        if cfg.mlp_t:
            # Mix and normalise the T tokens of each channel separately.
            columns = z.transpose(1, 2)
            columns = plain.rms_norm(columns + plain.swiglu(w, f"{block}.mlp_t", columns), cfg.rms_norm_eps)
            z = columns.transpose(1, 2)
        else:
            attended = plain.attention(w, f"{block}.self_attn", cfg, z, angles)
            z = plain.rms_norm(z + attended, cfg.rms_norm_eps)
        z = plain.rms_norm(z + plain.swiglu(w, f"{block}.mlp", z), cfg.rms_norm_eps)
    return z


def forward(
    w: Weights, cfg: Any, z_H: Tensor, z_L: Tensor, tokens: Tensor, puzzle_rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One ACT step, gradient through its last H-cycle: z_H, z_L, logits (B, S, V), both q (B).

    In the paper, z_L is the latent z, z_H is the answer y, and e is the question x.
    """
    e = plain.embed(w, cfg, tokens, puzzle_rows)
    angles = plain.rope_angles(cfg, e) if cfg.pos_encodings.startswith("rope") else None
    with torch.no_grad():
        for _ in range(cfg.H_cycles - 1):
            for _ in range(cfg.L_cycles):
                z_L = reasoning(w, cfg, z_L, z_H + e, angles)
            z_H = reasoning(w, cfg, z_H, z_L, angles)
    for _ in range(cfg.L_cycles):
        z_L = reasoning(w, cfg, z_L, z_H + e, angles)
    z_H = reasoning(w, cfg, z_H, z_L, angles)
    logits = z_H[:, puzzle_tokens(cfg) :] @ w["lm_head.weight"].T
    first = plain.wide(z_H[:, 0])
    q_halt, q_continue = (first @ plain.wide(w["q_head.weight"]).T + plain.wide(w["q_head.bias"])).unbind(-1)
    return z_H, z_L, logits, q_halt, q_continue


@contextmanager
def in_place() -> Iterator[None]:
    """Within this context `straight_line` trains and evaluates TRM with the functions above."""
    with pytest.MonkeyPatch.context() as patch:
        for function in (puzzle_tokens, weight_shapes, forward):
            patch.setattr(plain, function.__name__, function)
        yield
