"""HRM v1 and gated HRM as plain functions over a dict of named tensors.

Written from the papers, independently of the package. Tests compare the package with it in float64.
Benchmarks use it as a careful implementation in eager PyTorch, with an optimiser loop over the parameters.

Sources: Wang et al. 2025 (arXiv 2506.21734) and its official code; Prieto et al. 2025 (stablemax); Everett
et al. 2024 (Adam-atan2). The weights have the names of an official checkpoint; `cfg` is any object with the
fields of an architecture (hidden_size, num_heads, H_layers, ...).

Shapes: B sequences, S cells, P puzzle tokens, T = P + S, D channels, V tokens, h heads.
"""

import math
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Carry = dict[str, Tensor]
Batch = dict[str, Tensor]
Angles = tuple[Tensor, Tensor] | None
PUZZLE_TABLE = "puzzle_emb.weights"
BUFFERS = ("H_init", "L_init")
IGNORE = -100


def puzzle_tokens(cfg: Any) -> int:
    """P = ceil(puzzle_emb_ndim / D): the number of tokens of a puzzle's row in front of the cells."""
    return -(-cfg.puzzle_emb_ndim // cfg.hidden_size)


def weight_shapes(cfg: Any, vocab_size: int, seq_len: int, num_puzzles: int) -> dict[str, tuple[int, ...]]:
    """The shape of every weight and buffer by its name."""
    D = cfg.hidden_size
    inner = math.ceil(round(cfg.expansion * D * 2 / 3) / 256) * 256
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.embedding_weight": (vocab_size, D)}
    if cfg.pos_encodings == "learned":
        shapes["embed_pos.embedding_weight"] = (puzzle_tokens(cfg) + seq_len, D)
    if cfg.puzzle_emb_ndim > 0:
        shapes[PUZZLE_TABLE] = (num_puzzles, cfg.puzzle_emb_ndim)
    shapes |= {"lm_head.weight": (vocab_size, D), "q_head.weight": (2, D), "q_head.bias": (2,)}
    for level, layers in (("H", cfg.H_layers), ("L", cfg.L_layers)):
        shapes[f"{level}_init"] = (D,)
        for i in range(layers):
            block = f"{level}_level.layers.{i}"
            shapes[f"{block}.self_attn.qkv_proj.weight"] = (3 * D, D)
            shapes[f"{block}.self_attn.o_proj.weight"] = (D, D)
            shapes[f"{block}.mlp.gate_up_proj.weight"] = (2 * inner, D)
            shapes[f"{block}.mlp.down_proj.weight"] = (D, inner)
        if cfg.use_gating:
            gate, width = f"{level}_level.gating_network.gate_proj", int(cfg.gate_hidden_ratio * D)
            shapes |= {f"{gate}.0.weight": (width, 3 * D), f"{gate}.0.bias": (width,)}
            shapes |= {f"{gate}.2.weight": (3 * D, width), f"{gate}.2.bias": (3 * D,)}
    return shapes


def random_weights(
    cfg: Any, vocab_size: int, seq_len: int, num_puzzles: int, generator: torch.Generator, dtype: torch.dtype
) -> Weights:
    """Random nonzero weights, so that every term has an effect; not for training.

    Linear and table rows have std 1/sqrt(columns), biases 1/2, the initial states 1. Drawn in float64 on the
    generator's device and rounded to dtype.
    """
    weights = {}
    for name, shape in weight_shapes(cfg, vocab_size, seq_len, num_puzzles).items():
        std = 1.0 if name in BUFFERS else 0.5 if name.endswith("bias") else shape[-1] ** -0.5
        normal = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
        weights[name] = (std * normal).to(dtype)
    return weights


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    """The weights in the forward dtype, except the puzzle table, whose rows are cast when they are read."""
    return {name: w if name == PUZZLE_TABLE else w.to(dtype) for name, w in weights.items()}


def wide(x: Tensor) -> Tensor:
    """x in at least float32, for reductions, rotations and the Q head."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the channels, without a weight."""
    h = wide(x)
    return (h / torch.sqrt(h.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rope_angles(cfg: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2j / d), j < d/2: (T, d/2) each, for a (B, T, D)."""
    if cfg.pos_encodings == "rope2d":
        return grid_angles(cfg, like)
    d, T = cfg.hidden_size // cfg.num_heads, like.shape[1]
    kind: Any = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
    frequency = 1.0 / (cfg.rope_theta ** (torch.arange(0, d, 2, **kind) / d))
    angle = torch.outer(torch.arange(T, **kind), frequency)
    return angle.cos(), angle.sin()


def grid_angles(cfg: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """The same on a square grid after P tokens of angle 0: d/4 pairs rotate by row, d/4 by column."""
    d, P = cfg.hidden_size // cfg.num_heads, puzzle_tokens(cfg)
    side = math.isqrt(like.shape[1] - P)
    angle = like.new_zeros(like.shape[1], d // 2)
    for cell in range(side * side):
        for j in range(d // 4):
            frequency = cfg.rope_theta ** (-2 * j / (d // 2))
            angle[P + cell, j] = cell // side * frequency
            angle[P + cell, d // 4 + j] = cell % side * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (x_j, x_{j + d/2}) of a head by its angle; x (B, T, h, d), cos and sin (T, d/2)."""
    (first, second), cos, sin = wide(x).chunk(2, dim=-1), cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def attention(w: Weights, name: str, cfg: Any, z: Tensor, angles: Angles) -> Tensor:
    """Non-causal softmax attention over the T tokens; rows of qkv_proj: q heads, k heads, v heads."""
    B, T, D = z.shape
    h = cfg.num_heads
    q, k, v = (z @ w[f"{name}.qkv_proj.weight"].T).view(B, T, 3, h, D // h).unbind(2)
    if angles is not None:
        q, k = rotate(q, *angles), rotate(k, *angles)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(D // h)
    share = torch.softmax(wide(scores), dim=-1).to(z.dtype)
    mixed = torch.einsum("bhqk,bkhd->bqhd", share, v).reshape(B, T, D)
    return mixed @ w[f"{name}.o_proj.weight"].T


def swiglu(w: Weights, name: str, z: Tensor) -> Tensor:
    """down(silu(gate) * up), gate first in the packed projection."""
    gate, up = (z @ w[f"{name}.gate_up_proj.weight"].T).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up) @ w[f"{name}.down_proj.weight"].T


def gated_sum(w: Weights, name: str, z: Tensor, o: Tensor, x: Tensor) -> Tensor:
    """g_z z + g_o o + g_x x with g = sigmoid(W2 silu(W1 [z; o; x] + b1) + b2), a gate for every channel."""
    hidden = torch.cat([z, o, x], dim=-1) @ w[f"{name}.0.weight"].T + w[f"{name}.0.bias"]
    hidden = hidden * torch.sigmoid(hidden)
    gates = torch.sigmoid(hidden @ w[f"{name}.2.weight"].T + w[f"{name}.2.bias"])
    g_z, g_o, g_x = gates.chunk(3, dim=-1)
    return g_z * z + g_o * o + g_x * x


def reasoning(w: Weights, cfg: Any, level: str, z: Tensor, o: Tensor, x: Tensor, angles: Angles) -> Tensor:
    """A call of module "H" or "L": combines its state, the other state and the input, and runs its blocks."""
    gate = f"{level}_level.gating_network.gate_proj"
    z = gated_sum(w, gate, z, o, x) if cfg.use_gating else z + o + x
    for i in range(cfg.H_layers if level == "H" else cfg.L_layers):
        block = f"{level}_level.layers.{i}"
        z = rms_norm(z + attention(w, f"{block}.self_attn", cfg, z, angles), cfg.rms_norm_eps)
        z = rms_norm(z + swiglu(w, f"{block}.mlp", z), cfg.rms_norm_eps)
    return z


def embed(w: Weights, cfg: Any, tokens: Tensor, puzzle_rows: Tensor | None) -> Tensor:
    """sqrt(D) * [puzzle tokens | cell tokens], (B, T, D); puzzle_rows (B, puzzle_emb_ndim) or None."""
    D = cfg.hidden_size
    e = w["embed_tokens.embedding_weight"][tokens]
    if puzzle_rows is not None:
        P = puzzle_tokens(cfg)
        padding = puzzle_rows.new_zeros(len(puzzle_rows), P * D - cfg.puzzle_emb_ndim)
        e = torch.cat([torch.cat([puzzle_rows, padding], dim=1).view(-1, P, D).to(e.dtype), e], dim=1)
    if cfg.pos_encodings == "learned":
        e = (e + w["embed_pos.embedding_weight"]) / math.sqrt(2)
    return math.sqrt(D) * e


def forward(
    w: Weights, cfg: Any, z_H: Tensor, z_L: Tensor, tokens: Tensor, puzzle_rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """An ACT step with gradient through only its last two calls: z_H, z_L, logits (B, S, V), both q (B)."""
    e = embed(w, cfg, tokens, puzzle_rows)
    zero = torch.zeros_like(e)
    angles = rope_angles(cfg, e) if cfg.pos_encodings.startswith("rope") else None
    with torch.no_grad():
        for i in range(cfg.H_cycles):
            last = i == cfg.H_cycles - 1
            for _ in range(cfg.L_cycles - 1 if last else cfg.L_cycles):
                z_L = reasoning(w, cfg, "L", z_L, z_H, e, angles)
            if not last:
                z_H = reasoning(w, cfg, "H", z_H, z_L, zero, angles)
    z_L = reasoning(w, cfg, "L", z_L, z_H, e, angles)
    z_H = reasoning(w, cfg, "H", z_H, z_L, zero, angles)
    logits = z_H[:, puzzle_tokens(cfg) :] @ w["lm_head.weight"].T
    q_halt, q_continue = (wide(z_H[:, 0]) @ wide(w["q_head.weight"]).T + wide(w["q_head.bias"])).unbind(-1)
    return z_H, z_L, logits, q_halt, q_continue


def cross_entropy(logits: Tensor, labels: Tensor, loss_type: str) -> Tensor:
    """-log p of each label, 0 if ignored: (B, S). stablemax in float64, softmax in at least float32."""
    if loss_type == "stablemax_cross_entropy":
        x = logits.double()
        # The clamps keep the unused branch away from its pole: 0 * inf would be a NaN gradient.
        s = torch.where(x >= 0, x.clamp(min=0) + 1, 1 / (1 - x.clamp(max=0)))
        log_p = (s / s.sum(-1, keepdim=True)).log()
    else:
        log_p = torch.log_softmax(wide(logits), dim=-1)
    valid = labels != IGNORE
    of_label = log_p.gather(-1, torch.where(valid, labels, 0).long()[..., None])[..., 0]
    return torch.where(valid, -of_label, 0)


def binary_cross_entropy(logit: Tensor, target: Tensor) -> Tensor:
    """-(t log sigmoid(x) + (1 - t) log(1 - sigmoid(x))) of each element."""
    log_sigmoid = torch.nn.functional.logsigmoid
    return -(target * log_sigmoid(logit) + (1 - target) * log_sigmoid(-logit))


def initial_carry(weights: Weights, cfg: Any, batch: Batch) -> Carry:
    """All sequences are halted, so that the first step loads the whole batch; z (B, T, D) has H_init's dtype.

    Without L_init there is a single state and z_L is empty.
    """
    B, S = batch["inputs"].shape
    z = weights["H_init"].new_zeros(B, puzzle_tokens(cfg) + S, cfg.hidden_size)
    steps = torch.zeros(B, dtype=torch.int32, device=z.device)
    empty = {name: torch.zeros_like(batch[name]) for name in ("inputs", "labels", "puzzle_identifiers")}
    z_L = z if "L_init" in weights else z[:, :0]
    return {"z_H": z, "z_L": z_L, "steps": steps, "halted": torch.ones_like(steps, dtype=torch.bool), **empty}


def replace_halted(w: Weights, carry: Carry, batch: Batch) -> Carry:
    """Replaces each halted sequence by the batch's sequence of the same row: its data, z_init, step 0."""
    fresh = {
        "z_H": w["H_init"],
        "z_L": w.get("L_init", carry["z_L"]),
        "steps": torch.zeros_like(carry["steps"]),
        **batch,
    }
    new = {"halted": torch.zeros_like(carry["halted"])}
    for name in ("z_H", "z_L", "steps", "inputs", "labels", "puzzle_identifiers"):
        where = carry["halted"].view(-1, *[1] * (carry[name].dim() - 1))
        new[name] = torch.where(where, fresh[name], carry[name])
    return new


def act_step(
    w: Weights, cfg: Any, carry: Carry, rows: Tensor | None, min_halt_steps: Tensor | None, loss_type: str
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Carry]:
    """A step of a carry with halted sequences replaced; min_halt_steps=None means evaluation.

    Returns the loss summed over the batch, its metrics (sums), the outputs, and the new carry.
    """
    tokens, labels = carry["inputs"], carry["labels"]
    z_H, z_L, logits, q_halt, q_continue = forward(w, cfg, carry["z_H"], carry["z_L"], tokens, rows)
    outputs = {"logits": logits, "q_halt": q_halt, "q_continue": q_continue}

    with torch.no_grad():
        z_H, z_L = z_H.detach(), z_L.detach()
        steps = carry["steps"] + 1
        last = steps >= cfg.halt_max_steps
        halted = last
        if min_halt_steps is not None and cfg.halt_max_steps > 1:
            # Without q_continue (TRM) a sequence halts if it is more likely right than wrong.
            wants_to_halt = q_halt > (q_continue if cfg.q_continue else 0)
            halted = last | (wants_to_halt & (steps >= min_halt_steps))
            if cfg.q_continue:
                *_, next_halt, next_continue = forward(w, cfg, z_H, z_L, tokens, rows)
                best = torch.where(last, next_halt, torch.maximum(next_halt, next_continue))
                outputs["target_q_continue"] = torch.sigmoid(best)

        valid = labels != IGNORE
        lengths = valid.sum(-1)
        right = (valid & (logits.argmax(-1) == labels)).sum(-1)
        exact = right == lengths
        counted = halted & (lengths > 0)
        metrics = {
            "count": counted.sum(),
            "accuracy": (counted * (right / lengths.clamp(min=1).to(q_halt.dtype))).sum(),
            "exact_accuracy": (counted & exact).sum(),
            "q_halt_accuracy": (counted & ((q_halt >= 0) == exact)).sum(),
            "steps": (counted * steps).sum(),
        }

    lm_loss = (cross_entropy(logits, labels, loss_type).sum(-1) / lengths.clamp(min=1)).sum()
    q_halt_loss = binary_cross_entropy(q_halt, exact.to(q_halt.dtype)).sum()
    metrics |= {"lm_loss": lm_loss.detach(), "q_halt_loss": q_halt_loss.detach()}
    loss = lm_loss + 0.5 * q_halt_loss
    if "target_q_continue" in outputs:
        q_continue_loss = binary_cross_entropy(q_continue, outputs["target_q_continue"]).sum()
        metrics["q_continue_loss"] = q_continue_loss.detach()
        loss = loss + 0.5 * q_continue_loss
    return loss, metrics, outputs, {**carry, "z_H": z_H, "z_L": z_L, "steps": steps, "halted": halted}


def act_training_step(
    weights: Weights, cfg: Any, carry: Carry, batch: Batch, min_halt_steps: Tensor, loss_type: str, total: int
) -> dict[str, Any]:
    """Replacement, forward, halting, target, loss and gradients of a training step, without an update.

    batch: inputs, labels (B, S), puzzle_identifiers (B). min_halt_steps (B): 0 without exploration. The
    forward runs in the carry's dtype. Gradients are of loss / total, the global batch size. Returns loss,
    metrics, outputs, carry; gradients: of every dense weight by name; puzzle_rows: the distinct ids and the
    gradient of each row, summed over its sequences.
    """
    dense = [name for name in weights if name not in (*BUFFERS, PUZZLE_TABLE)]
    leaves = {name: weights[name].detach().requires_grad_() for name in dense}
    w = cast({**weights, **leaves}, carry["z_H"].dtype)
    carry = replace_halted(w, carry, batch)
    ids = carry["puzzle_identifiers"].long()
    rows = weights[PUZZLE_TABLE][ids].detach().requires_grad_() if cfg.puzzle_emb_ndim > 0 else None

    loss, metrics, outputs, new_carry = act_step(w, cfg, carry, rows, min_halt_steps, loss_type)
    (loss / total).backward()

    result = {"loss": loss.detach(), "metrics": metrics, "carry": new_carry, "puzzle_rows": None}
    result["outputs"] = {name: t.detach() for name, t in outputs.items()}
    result["gradients"] = {name: leaf.grad for name, leaf in leaves.items()}
    if rows is not None and rows.grad is not None:
        seen, place = ids.unique(return_inverse=True)
        summed = rows.grad.new_zeros(len(seen), cfg.puzzle_emb_ndim).index_add_(0, place, rows.grad)
        result["puzzle_rows"] = (seen, summed)
    return result


@torch.no_grad()
def evaluation(weights: Weights, cfg: Any, batch: Batch, loss_type: str) -> dict[str, Any]:
    """Runs every sequence for exactly halt_max_steps steps: loss, metrics, outputs and carry of the last
    step."""
    carry = replace_halted(weights, initial_carry(weights, cfg, batch), batch)
    rows = weights[PUZZLE_TABLE][carry["puzzle_identifiers"].long()] if cfg.puzzle_emb_ndim > 0 else None
    for _ in range(cfg.halt_max_steps):
        loss, metrics, outputs, carry = act_step(weights, cfg, carry, rows, None, loss_type)
    return {"loss": loss, "metrics": metrics, "outputs": outputs, "carry": carry}


def learning_rate(step: int, base: float, warmup_steps: int, total_steps: int, min_ratio: float) -> float:
    """Linear from 0 over the warm-up, then half a cosine down to base * min_ratio; step counts from 1."""
    if step < warmup_steps:
        return base * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return base * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def adam_atan2(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float, beta1: float, beta2: float, decay: float
) -> None:
    """Step t (from 1) of Adam with atan2 instead of the quotient, without an epsilon; in place."""
    p.mul_(1 - lr * decay)
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    p.sub_(torch.atan2(m, (v / (1 - beta2**t)).sqrt()), alpha=lr / (1 - beta1**t))


def sign_sgd(table: Tensor, ids: Tensor, g: Tensor, lr: float, decay: float) -> None:
    """p (1 - lr decay) - lr sign(g) for the rows of the distinct ids; other rows do not change."""
    table[ids] = table[ids] * (1 - lr * decay) - lr * g.sign()


def train_step(
    weights: Weights, cfg: Any, recipe: Any, state: dict, carry: Carry, batch: Batch, min_halt_steps: Tensor
) -> dict[str, Any]:
    """A whole training step: act_training_step, then both optimisers; changes weights and state in place.

    recipe: lr, lr_warmup_steps, lr_min_ratio, total_steps, beta1, beta2, weight_decay, puzzle_emb_lr,
    puzzle_emb_weight_decay, global_batch_size, loss_type. state: {} at first. Returns the result of
    act_training_step.
    """
    loss = recipe.loss_type, recipe.global_batch_size
    result = act_training_step(weights, cfg, carry, batch, min_halt_steps, *loss)
    state["step"] = t = state.get("step", 0) + 1
    schedule = (recipe.lr_warmup_steps, recipe.total_steps, recipe.lr_min_ratio)
    lr, puzzle_lr = (learning_rate(t, base, *schedule) for base in (recipe.lr, recipe.puzzle_emb_lr))
    for name, g in result["gradients"].items():
        p = weights[name]
        m, v = state.setdefault(name, (torch.zeros_like(p), torch.zeros_like(p)))
        adam_atan2(p, g, m, v, t, lr, recipe.beta1, recipe.beta2, recipe.weight_decay)
    if result["puzzle_rows"] is not None:
        ids, g = result["puzzle_rows"]
        sign_sgd(weights[PUZZLE_TABLE], ids, g, puzzle_lr, recipe.puzzle_emb_weight_decay)
    return result
