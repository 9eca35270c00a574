"""The model of one ACT step: embeddings, the H/L recurrence with its one-step gradient, the heads.

Shapes: B batch, S cells of the puzzle, P puzzle-embedding tokens, T = P + S, D hidden size, V vocabulary.
Source: Wang et al. 2025, Hierarchical Reasoning Model (arXiv 2506.21734) and its official code.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrm.config import ArchConfig
from hrm.gating import GatingNetwork
from hrm.layers import Block, Embedding, Linear, PuzzleEmbedding, truncated_normal_
from hrm.profiling import region
from kernels.matmul import use_fused
from kernels.rope import rope_tables


class ReasoningModule(nn.Module):
    """A stack of blocks over its combined sources: the sum, or the gated sum where the gate network is."""

    def __init__(self, arch: ArchConfig, num_layers: int, attention_backend: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Block(arch.hidden_size, arch.num_heads, arch.expansion, arch.rms_norm_eps, attention_backend)
            for _ in range(num_layers)
        )
        self.gating_network = (
            GatingNetwork(arch.hidden_size, arch.gate_hidden_ratio, arch.gate_init_bias)
            if arch.use_gating
            else None
        )

    def combine(self, z: Tensor, o: Tensor, x: Tensor | None) -> Tensor:
        """The blocks' input from primary state, secondary state and, for L, the input embedding."""
        if self.gating_network is not None:
            return self.gating_network(z, o, x)
        return z + (o if x is None else o + x)

    def forward(
        self,
        z: Tensor,
        o: Tensor,
        x: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        queries: int | None = None,
    ) -> Tensor:
        """z, o, x: (B, T, D). Returns the new primary state (B, T, D).

        With `queries` the last block computes its first positions only: exact, since nothing after it
        looks at the others.
        """
        h, rstd = self.combine(z, o, x), None
        last = len(self.layers) - 1
        defers = use_fused("linear_rms", h)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Block)
            asked = queries if index == last else None
            if defers:
                h, rstd = layer.deferred(h, rstd, cos, sin, asked)
            else:
                h = layer(h, cos, sin, asked)
        return h if rstd is None else (h * rstd[..., None]).to(h.dtype)


class HRM(nn.Module):
    """HRM v1, or gated HRM when `arch.use_gating`: parameters in float32, states in `dtype`.

    A parameter not in `wide` may be replaced by a copy in `dtype`, as which it is used.

    Every parameter is drawn from `seed` on the CPU, the same on every device; gate networks are drawn last,
    so v1 and a gated model of one seed share all other weights.
    """

    H_init: Tensor
    L_init: Tensor
    cos: Tensor | None
    sin: Tensor | None
    # The parameters that compute in float32 whatever the dtype of the states.
    wide = ("q_head.weight", "q_head.bias")

    def __init__(
        self,
        arch: ArchConfig,
        *,
        vocab_size: int,
        seq_len: int,
        num_puzzle_identifiers: int,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__()
        D, ndim = arch.hidden_size, arch.puzzle_emb_ndim
        self.arch, self.dtype = arch, dtype
        self.embed_scale = math.sqrt(D)
        self.puzzle_emb_len = -(-ndim // D)
        self.length = self.puzzle_emb_len + seq_len

        self.embed_tokens = Embedding(vocab_size, D)
        self.puzzle_emb = PuzzleEmbedding(num_puzzle_identifiers, ndim) if ndim else None
        self.embed_pos = Embedding(self.length, D) if arch.pos_encodings == "learned" else None
        self.lm_head = Linear(D, vocab_size)
        self.q_head = Linear(D, 2, bias=True)
        self.H_level = ReasoningModule(arch, arch.H_layers, attention_backend)
        self.L_level = ReasoningModule(arch, arch.L_layers, attention_backend)
        self.register_buffer("H_init", torch.empty(D))
        self.register_buffer("L_init", torch.empty(D))
        cos, sin = None, None
        if arch.pos_encodings == "rope":
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            cos, sin = rope_tables(self.length, D // arch.num_heads, arch.rope_theta, wide)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draws every weight afresh; the Q head starts at 0 with bias -5. The puzzle table stays."""
        generator = torch.Generator().manual_seed(seed)
        truncated_normal_(self.H_init, 1.0, generator)
        truncated_normal_(self.L_init, 1.0, generator)
        gates = [m for m in self.modules() if isinstance(m, GatingNetwork)]
        gate_layers = {layer for gate in gates for layer in gate.modules()}
        for module in self.modules():
            if isinstance(module, Linear | Embedding) and module not in gate_layers:
                module.reset_parameters(generator)
        for gate in gates:
            gate.reset_parameters(generator)
        nn.init.zeros_(self.q_head.weight)
        assert self.q_head.bias is not None
        nn.init.constant_(self.q_head.bias, -5.0)

    def embed(self, inputs: Tensor, puzzle_rows: Tensor | None) -> Tensor:
        """The scaled input embedding e.

        inputs: (B, S) integer tokens. puzzle_rows: (B, puzzle_emb_ndim), the batch's rows of the puzzle
        table, None without one. Returns (B, T, D) in the model's dtype.
        """
        e = self.embed_tokens(inputs, self.dtype)
        if puzzle_rows is not None:
            padding = self.puzzle_emb_len * e.shape[-1] - puzzle_rows.shape[-1]
            rows = F.pad(puzzle_rows.to(self.dtype), (0, padding))
            e = torch.cat((rows.view(-1, self.puzzle_emb_len, e.shape[-1]), e), dim=1)
        if self.embed_pos is not None:
            e = math.sqrt(0.5) * (e + self.embed_pos.embedding_weight.to(self.dtype))
        return self.embed_scale * e

    def recur(self, z_H: Tensor, z_L: Tensor, e: Tensor, queries: int | None = None) -> tuple[Tensor, Tensor]:
        """One ACT step of the recurrence: H_cycles of L_cycles L-updates and one H-update.

        z_H, z_L, e: (B, T, D). Returns the new (z_H, z_L); gradient flows through the last L-update and
        the last H-update alone. With `queries` the new z_H holds its first positions only.
        """
        H_cycles, L_cycles = self.arch.H_cycles, self.arch.L_cycles
        rope = (self.cos, self.sin)
        taught = torch.is_grad_enabled()
        for i in range(H_cycles):
            last = i == H_cycles - 1
            for j in range(L_cycles):
                with (
                    region(f"H cycle {i}, L cycle {j}"),
                    torch.set_grad_enabled(taught and last and j == L_cycles - 1),
                ):
                    z_L = self.L_level(z_L, z_H, e, *rope)
            with region(f"H cycle {i}"), torch.set_grad_enabled(taught and last):
                z_H = self.H_level(z_H, z_L, None, *rope, queries if last else None)
        return z_H, z_L

    def logits(self, z_H: Tensor) -> Tensor:
        """The answer's logits (B, S, V) from z_H (B, T, D), in the model's dtype."""
        return self.lm_head(z_H)[:, self.puzzle_emb_len :]

    def q_values(self, z_H: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (q_halt, q_continue), each (B,), of z_H's first position, computed in float32 (float64)."""
        first = z_H[:, 0]
        q = self.q_head(first if first.dtype == torch.float64 else first.float())
        return q[:, 0], q[:, 1]
