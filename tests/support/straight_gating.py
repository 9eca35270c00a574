"""The three gate networks as plain functions over a dict of named tensors; see `straight_line.py`.

Written from the specification, independently of the package: every source is present, an absent input is
zero, so its gate has no effect. Weights have the names of the gate network's state dict.

Shapes: B sequences, T tokens, D channels, R the width of a gate network, n sources.
"""

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """W x + b, or W x without a bias."""
    y = torch.einsum("oi,bti->bto", w[f"{name}.weight"], x)
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def mlp(w: Weights, name: str, sources: list[Tensor]) -> list[Tensor]:
    """W2 silu(W1 [z; o; x] + b1) + b2, a third for each source; an absent x is zero."""
    z = sources[0]
    side_by_side = torch.cat([*sources, torch.zeros_like(z)][:3], dim=-1)
    hidden = linear(w, f"{name}.0", side_by_side)
    logits = linear(w, f"{name}.2", hidden / (1 + torch.exp(-hidden)))
    D = z.shape[-1]
    return [logits[..., i * D : (i + 1) * D] for i in range(len(sources))]


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + torch.exp(-x))


def standard_gates(w: Weights, sources: list[Tensor]) -> list[Tensor]:
    """g = sigmoid(MLP): n times (B, T, D)."""
    return [sigmoid(logit) for logit in mlp(w, "gate_proj", sources)]


def attention_gates(w: Weights, sources: list[Tensor]) -> list[Tensor]:
    """Per token: the primary state attends to the sources; the result gives n times (B, T, 1)."""
    B, T, _ = sources[0].shape
    Wq, (Wk, Wv) = w["q_proj.weight"], w["kv_proj.weight"].chunk(2)
    rows = []
    for b in range(B):
        for t in range(T):
            q = Wq @ sources[0][b, t]
            e = [torch.exp(q @ (Wk @ s[b, t]) / math.sqrt(len(q))) for s in sources]
            c = torch.zeros_like(q)
            for e_i, s in zip(e, sources, strict=True):
                c = c + e_i / sum(e) * (Wv @ s[b, t])
            rows.append(sigmoid(w["out_proj.weight"] @ c + w["out_proj.bias"]))
    gates = torch.stack(rows).view(B, T, 3)
    return [gates[..., i : i + 1] for i in range(len(sources))]


def hierarchical_gates(w: Weights, sources: list[Tensor], start: list[Tensor]) -> list[Tensor]:
    """Gate i of a channel: sigmoid(sum_j A_ij fast_j + C_ij slow_j + b_i), with slow from the start of the
    H-cycle."""
    fast, slow = mlp(w, "gate_proj", sources), mlp(w, "slow_proj", start)
    weight, bias = w["combine.weight"], w["combine.bias"]
    gates = []
    for i in range(len(sources)):
        logit = torch.zeros_like(sources[0]) + bias[i]
        for j in range(len(sources)):
            logit = logit + weight[i, j] * fast[j] + weight[i, 3 + j] * slow[j]
        gates.append(sigmoid(logit))
    return gates


def gates_of(kind: str, w: Weights, sources: list[Tensor], start: list[Tensor]) -> list[Tensor]:
    """The gates of gating_type `kind`; start: the sources at the H-cycle's start, for hierarchical gates."""
    if kind == "hierarchical":
        return hierarchical_gates(w, sources, start)
    return attention_gates(w, sources) if kind == "attention" else standard_gates(w, sources)


def gated_sum(gates: list[Tensor], sources: list[Tensor]) -> Tensor:
    """g_z z + g_o o + g_x x."""
    total = torch.zeros_like(sources[0])
    for g, s in zip(gates, sources, strict=True):
        total = total + g * s
    return total
