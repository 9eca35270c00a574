"""The variants of `straight_line` in plain PyTorch: gate types, subgoals and their losses.

They cover an ACT step with halted sequences replaced, and use `straight_line` for the parts of v1. Source:
the gated and the feudal forks of HRM, and Vezhnevets et al. 2017 (arXiv 1703.01161).
"""

import math
from typing import Any

import torch
from torch import Tensor

from tests.support import straight_line as plain
from tests.support.straight_line import Carry, Weights, rms_norm


def mlp(w: Weights, name: str, sources: list[Tensor], D: int) -> list[Tensor]:
    """The gate logits of each source, without the weights of absent sources."""
    joined = torch.cat(sources, dim=-1)
    hidden = joined @ w[f"{name}.0.weight"][:, : joined.shape[-1]].T + w[f"{name}.0.bias"]
    hidden = hidden * torch.sigmoid(hidden)
    rows = [slice(i * D, (i + 1) * D) for i in range(len(sources))]
    return [hidden @ w[f"{name}.2.weight"][part].T + w[f"{name}.2.bias"][part] for part in rows]


def gates(w: Weights, cfg: Any, level: str, sources: list[Tensor], slow: list[Tensor] | None) -> list[Tensor]:
    """The gates of a call, one per source. slow: logits held since the start of the H-cycle."""
    name, D, n = f"{level}_level.gating_network", cfg.hidden_size, len(sources)
    if cfg.gating_type == "attention":
        R = int(cfg.gate_hidden_ratio * D)
        q = sources[0] @ w[f"{name}.q_proj.weight"].T
        keys = [s @ w[f"{name}.kv_proj.weight"][:R].T for s in sources]
        values = [s @ w[f"{name}.kv_proj.weight"][R:].T for s in sources]
        a = torch.stack([torch.exp((q * k).sum(-1) / math.sqrt(R)) for k in keys], -1)
        a = a / a.sum(-1, keepdim=True)
        context = (a[..., None] * torch.stack(values, -2)).sum(-2)
        out = context @ w[f"{name}.out_proj.weight"].T + w[f"{name}.out_proj.bias"]
        return [torch.sigmoid(out[..., i : i + 1]) for i in range(n)]
    logits = mlp(w, f"{name}.gate_proj", sources, D)
    if slow is not None:
        mixing, bias = w[f"{name}.combine.weight"], w[f"{name}.combine.bias"]
        logits = [
            sum(mixing[i, j] * logits[j] + mixing[i, 3 + j] * slow[j] for j in range(n)) + bias[i]
            for i in range(n)
        ]
    return [torch.sigmoid(logit) for logit in logits]


def forward(
    w: Weights, cfg: Any, z_H: Tensor, z_L: Tensor, tokens: Tensor, rows: Tensor | None, bias: Tensor
) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
    """z_H and z_L after an ACT step with gradient through the last two calls, and the gates of these calls, L
    first."""
    e = plain.embed(w, cfg, tokens, rows)
    angles = plain.rope_angles(cfg, e)

    def hold(level: str, sources: list[Tensor]) -> list[Tensor] | None:
        if not cfg.use_gating or cfg.gating_type != "hierarchical":
            return None
        return mlp(w, f"{level}_level.gating_network.slow_proj", sources, cfg.hidden_size)

    def call(level: str, sources: list[Tensor], slow: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        opened: list[Tensor] = [torch.ones(()) for _ in sources]
        if cfg.use_gating:
            opened = gates(w, cfg, level, sources, slow)
        z = sum(g * s for g, s in zip(opened, sources, strict=True)) + bias
        for i in range(cfg.H_layers if level == "H" else cfg.L_layers):
            block = f"{level}_level.layers.{i}"
            z = rms_norm(z + plain.attention(w, f"{block}.self_attn", cfg, z, angles), cfg.rms_norm_eps)
            z = rms_norm(z + plain.swiglu(w, f"{block}.mlp", z), cfg.rms_norm_eps)
        return z, opened

    for i in range(cfg.H_cycles):
        is_last = i == cfg.H_cycles - 1
        with torch.set_grad_enabled(is_last and torch.is_grad_enabled()):
            slow_L, slow_H = hold("L", [z_L, z_H, e]), hold("H", [z_H, z_L])
        with torch.no_grad():
            for _ in range(cfg.L_cycles - is_last):
                z_L, _ = call("L", [z_L, z_H, e], slow_L)
            if not is_last:
                z_H, _ = call("H", [z_H, z_L], slow_H)
    z_L, of_L = call("L", [z_L, z_H, e], slow_L)
    z_H, of_H = call("H", [z_H, z_L], slow_H)
    return z_H, z_L, [of_L, of_H]


def q_values(w: Weights, z_H: Tensor) -> tuple[Tensor, Tensor]:
    """q_halt and q_continue, (B,) each."""
    q_halt, q_continue = (z_H[:, 0] @ w["q_head.weight"].T + w["q_head.bias"]).unbind(-1)
    return q_halt, q_continue


def training_step(
    w: Weights, cfg: Any, loss_cfg: Any, carry: Carry, rows: Tensor | None, least: Tensor, scale: float
) -> tuple[Tensor, dict[str, Tensor], Carry]:
    """The loss summed over the batch, the variant's additional metrics (sums), and the new carry.

    carry: of `straight_line` with halted sequences replaced, plus goal, goal_gate and previous (the last
    gates of each module); if steps is 0, goal is zero and the gates are arbitrary. scale: of the gate losses.
    """
    head = cfg.subgoal_head

    def bias(goal: Tensor, gate: Tensor) -> Tensor:
        if not head.enabled:
            return torch.zeros(1, 1, 1)
        return ((gate[:, None] * goal) @ w["subgoal_head.input_proj.weight"].T)[:, None]

    tokens, goal, gate = carry["inputs"], carry["goal"], carry["goal_gate"]
    z_H, z_L, opened = forward(w, cfg, carry["z_H"], carry["z_L"], tokens, rows, bias(goal, gate))
    logits = z_H[:, plain.puzzle_tokens(cfg) :] @ w["lm_head.weight"].T
    q_halt, q_continue = q_values(w, z_H)
    steps = carry["steps"] + 1
    metrics: dict[str, Tensor] = {}
    extra = torch.zeros(())
    if head.enabled:
        goals, open_gates = [], []
        for b in range(len(steps)):
            if steps[b] == 1 or steps[b] % head.manager_period == 0:
                manager = z_H[b, 0]
                aim = w["subgoal_head.goal_proj.weight"] @ manager + w["subgoal_head.goal_proj.bias"]
                goals.append(head.goal_scale * aim / aim.norm())
                lean = w["subgoal_head.gate_proj.weight"][0] @ manager + w["subgoal_head.gate_proj.bias"][0]
                open_gates.append(torch.sigmoid(lean / head.temperature))
            else:
                goals.append(goal[b])
                open_gates.append(gate[b])
        goal, gate = torch.stack(goals), torch.stack(open_gates)
        worker = z_L.mean(1)[:, : head.goal_dim]
        cosine = torch.cosine_similarity(worker, goal, dim=-1)
        feudal = (gate * (1 - cosine)).sum()
        extra = extra + loss_cfg.feudal_loss_weight * feudal
        metrics["feudal_loss"] = feudal.detach()
        metrics["goal_alignment"] = cosine.sum().detach()
    if loss_cfg.uses_gates:
        fresh = carry["steps"] == 0
        per_module = {"saturation": [], "entropy": [], "stability": []}  # type: ignore[var-annotated]
        for module, before in zip(opened, carry["previous"], strict=True):
            g, old = torch.stack(module), torch.stack(list(before))
            p = g / g.sum(0)
            per_module["saturation"].append((2 * g - 1).square().mean((0, 2, 3)))
            entropy = -(p * p.log()).sum(0) / math.log(len(g))
            per_module["entropy"].append((1 - entropy).mean((1, 2)))
            changed = (g - old).square().mean((0, 2, 3))
            per_module["stability"].append(torch.where(fresh, 0, changed))
        for name, values in per_module.items():
            total = (sum(values) / len(values)).sum()
            extra = extra + scale * getattr(loss_cfg, f"gate_{name}_weight") * total
            metrics[f"gate_{name}_loss"] = total.detach()

    with torch.no_grad():
        is_last = steps >= cfg.halt_max_steps
        halted = is_last | ((q_halt > q_continue) & (steps >= least))
        next_z_H, _, _ = forward(w, cfg, z_H, z_L, tokens, rows, bias(goal, gate))
        next_halt, next_continue = q_values(w, next_z_H)
        target = torch.sigmoid(torch.where(is_last, next_halt, torch.maximum(next_halt, next_continue)))
    valid = carry["labels"] != plain.IGNORE
    lengths = valid.sum(-1)
    exact = (valid & (logits.argmax(-1) == carry["labels"])).sum(-1) == lengths
    losses = plain.cross_entropy(logits, carry["labels"], loss_cfg.loss_type)
    loss = (losses.sum(-1) / lengths.clamp(min=1)).sum()
    loss = loss + 0.5 * plain.binary_cross_entropy(q_halt, exact.to(q_halt.dtype)).sum()
    loss = loss + 0.5 * plain.binary_cross_entropy(q_continue, target).sum() + extra
    new = {**carry, "z_H": z_H.detach(), "z_L": z_L.detach(), "steps": steps, "halted": halted}
    new |= {"goal": goal.detach(), "goal_gate": gate.detach()}
    new["previous"] = [tuple(g.detach() for g in module) for module in opened]
    return loss, metrics, new
