"""The model of one ACT step: embeddings, the H/L recurrence with its one-step gradient, the heads.

Shapes: B batch, S cells of the puzzle, P tokens before them (puzzle embedding, registers), T = P + S,
D hidden size, V vocabulary.
Source: Wang et al. 2025, Hierarchical Reasoning Model (arXiv 2506.21734) and its official code.
"""

import math
from itertools import count
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrm.common.errors import UserError
from hrm.common.regions import region
from hrm.config.schema import ArchConfig, Config
from hrm.data.format import Metadata
from hrm.model.gating import Gates, GatingNetwork, make_gating, mix, sources_of
from hrm.model.layers import (
    ROTARY,
    Block,
    Embedding,
    Linear,
    PuzzleEmbedding,
    TokenConv,
    chain_starts,
    truncated_normal_,
)
from hrm.model.subgoal import SubgoalHead
from kernels import noisy_update
from kernels.matmul import DEFERRED, rstd_of, use_fused
from kernels.rope import rope_tables, rope_tables_2d

# Sum the parts of a bfloat16 product in float32, in the whole process. By default PyTorch lets cuBLAS round
# each part to bfloat16 where it splits a long sum, and a weight's gradient is a sum over all tokens. PyTorch
# applies the setting to no batched product.
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


# Random-number calls 0 and 1 draw the initial z_H and z_L; updates use calls from here on.
FIRST_CALL = 2


class Gated(NamedTuple):
    """A module's gates, one (B, T, D) or (B, T, 1) per source, and the sources, each (B, T, D)."""

    gates: Gates
    sources: tuple[Tensor, ...]


class Noise(NamedTuple):
    """The noise of an ACT step: its standard deviation and the keys of its random numbers.

    keys: (B, 3) int32, the seed, example and path of each sequence; path 0 has no noise. steps: (B,) int32,
    the ACT steps it has taken.
    """

    deviation: float
    keys: Tensor
    steps: Tensor


class ReasoningModule(nn.Module):
    """A stack of blocks over its combined sources: their sum, or their gated sum with a gate network.

    With damping the new state is (1 - damping) z + damping f, where f is the blocks' result, plus noise.
    """

    def __init__(self, arch: ArchConfig, num_layers: int, length: int, attention_backend: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(arch, length, attention_backend) for _ in range(num_layers))
        self.gating_network = make_gating(arch) if arch.use_gating else None
        self.damping = arch.damping
        # A factor per token commutes neither with a product over the tokens nor with a norm inside SwiGLU.
        self.may_defer = not arch.mlp_t and arch.swiglu != "normed"

    def hold(self, z: Tensor, o: Tensor, x: Tensor | None) -> Tensor | None:
        """The values that hierarchical gates hold for an H-cycle; None for other gates."""
        return None if self.gating_network is None else self.gating_network.hold(z, o, x)

    def combine(
        self, z: Tensor, o: Tensor, x: Tensor | None, held: Tensor | None, seen: list[Gated] | None
    ) -> Tensor:
        """The blocks' input from primary state, secondary state and, for L, the input embedding."""
        if self.gating_network is None:
            return z + (o if x is None else o + x)
        if seen is None:
            return self.gating_network(z, o, x, held)
        gated = Gated(self.gating_network.gates(z, o, x, held), sources_of(z, o, x))
        seen.append(gated)
        return mix(*gated)

    def forward(
        self,
        z: Tensor,
        o: Tensor,
        x: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        queries: int | None = None,
        *,
        bias: Tensor | None = None,
        held: Tensor | None = None,
        seen: list[Gated] | None = None,
        noise: Noise | None = None,
        call: int = 0,
    ) -> Tensor:
        """z, o, x: (B, T, D). Returns the new primary state (B, T, D).

        With `queries` the last block computes only its first positions. This is exact, because no later layer
        reads the others. bias: (B, 1, D), added to the combined sources. held: the result of `hold`.
        seen: a list that receives the gates and their sources. call: the number of this update within the ACT
        step, for its noise.
        """
        h, mean_square = self.combine(z, o, x, held, seen), None
        if bias is not None:
            h = h + bias
        last = len(self.layers) - 1
        defers = self.may_defer and use_fused("linear_rms", h, measured_as=DEFERRED)
        # Drop the reference for deferred blocks: it would keep the sources' sum in memory.
        residual = None if defers else h
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Block)
            asked = queries if index == last else None
            if defers:
                h, mean_square = layer.deferred(h, mean_square, cos, sin, asked)
            else:
                assert residual is not None
                h, residual = layer(h, residual, cos, sin, asked)
        rstd = None if mean_square is None else rstd_of(mean_square)
        if noise is None and self.damping == 1:
            return h if rstd is None else (h * rstd[..., None]).to(h.dtype)
        deviation, keys, steps = noise or (0.0, None, None)
        z, damping = z[:, :queries], self.damping
        return noisy_update(
            h, z, damping=damping, noise=deviation, keys=keys, steps=steps, call=call, rstd=rstd
        )


def grid_of(seq_len: int, columns: int | None) -> tuple[int, int]:
    """Rows and columns of the data's grid: a square, unless `columns` is given. Raises UserError."""
    rows = seq_len // columns if columns else math.isqrt(seq_len)
    if rows * (columns or rows) != seq_len:
        raise UserError(
            f"arch.pos_encodings=rope2d: the data's {seq_len} cells are not a square, and its dataset.json "
            "has no fitting columns; set arch.pos_encodings=rope"
        )
    return rows, columns or rows


class HRM(nn.Module):
    """HRM v1 and its variants, as defined by `arch`; parameters in float32, states in `dtype`.

    A parameter not in `wide` is only used in `dtype` and may be replaced by a copy in it.

    All parameters are drawn from `seed` on the CPU, so that all devices start with equal weights. A variant's
    own parameters are drawn last, so that v1, gated and feudal models of the same seed share all other
    weights.
    """

    H_init: Tensor
    L_init: Tensor | None
    L_chains: Tensor | None
    cos: Tensor | None
    sin: Tensor | None

    @classmethod
    def from_config(cls, config: Config, metadata: Metadata, dtype: torch.dtype) -> "HRM":
        """The model of a run's configuration, with the sizes of its data.

        Raises UserError for rope2d without a grid.
        """
        return cls(
            config.arch,
            vocab_size=metadata.vocab_size,
            seq_len=metadata.seq_len,
            columns=metadata.columns,
            num_puzzle_identifiers=metadata.num_puzzle_identifiers,
            dtype=dtype,
            seed=config.seed,
            attention_backend=config.attention.backend,
        )

    def __init__(
        self,
        arch: ArchConfig,
        *,
        vocab_size: int,
        seq_len: int,
        columns: int | None = None,
        num_puzzle_identifiers: int,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__()
        D, ndim = arch.hidden_size, arch.puzzle_emb_ndim
        self.arch, self.dtype = arch, dtype
        self.embed_scale = math.sqrt(D)
        self.puzzle_emb_len = (arch.puzzle_emb_len or -(-ndim // D)) if ndim else 0
        # Number of positions before the cells; the Q head reads the first.
        self.prefix_len = self.puzzle_emb_len + arch.register_tokens
        self.length = self.prefix_len + seq_len

        self.embed_tokens = Embedding(vocab_size, D)
        self.puzzle_emb = PuzzleEmbedding(num_puzzle_identifiers, ndim) if ndim else None
        self.register_tokens = Embedding(arch.register_tokens, D) if arch.register_tokens else None
        self.embed_pos = Embedding(self.length, D) if arch.pos_encodings == "learned" else None
        self.lm_head = Linear(D, vocab_size, bias=arch.head_bias)
        self.q_head = Linear(D, 2, bias=True)
        self.H_level: ReasoningModule | None = None
        if not (arch.share_levels or arch.single_state):
            self.H_level = ReasoningModule(arch, arch.H_layers, self.length, attention_backend)
        self.L_level = ReasoningModule(arch, arch.L_layers, self.length, attention_backend)
        self.subgoal_head = SubgoalHead(arch) if arch.subgoal_head.enabled else None
        self.register_buffer("H_init", torch.empty(D))
        self.register_buffer("L_init", None if arch.single_state else torch.empty(D))
        # Initial states of further chains, used only in training.
        self.register_buffer("L_chains", torch.empty(arch.chains - 1, D) if arch.chains > 1 else None)
        cos, sin = None, None
        if arch.pos_encodings in ROTARY and not arch.mlp_t:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            head_dim, theta = D // arch.num_heads, arch.rope_theta
            if arch.pos_encodings == "rope":
                cos, sin = rope_tables(self.length, head_dim, theta, wide)
            else:
                grid = grid_of(seq_len, columns)
                cos, sin = rope_tables_2d(*grid, head_dim, theta, wide, before=self.prefix_len)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        # Parameters that compute in float32 for any dtype of the states.
        self.wide = ["q_head.weight", "q_head.bias"]
        if self.subgoal_head is not None:
            self.wide += [f"subgoal_head.{name}" for name in self.subgoal_head.wide]
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draws all weights again; the Q head starts at 0 with bias -5. The puzzle table does not change."""
        generator = torch.Generator().manual_seed(seed)
        truncated_normal_(self.H_init, 1.0, generator)
        if self.L_init is not None:
            truncated_normal_(self.L_init, 1.0, generator)
        added = [
            m
            for m in self.modules()
            if isinstance(m, GatingNetwork | SubgoalHead | TokenConv) or m is self.register_tokens
        ]
        theirs = {layer for module in added for layer in module.modules()}
        for module in self.modules():
            if isinstance(module, Linear | Embedding) and module not in theirs:
                module.reset_parameters(generator)
        for module in added:
            module.reset_parameters(generator)
        if self.L_chains is not None and self.L_init is not None:
            first = self.L_level.layers[0]
            assert isinstance(first, Block)
            weight = first.mlp.gate_up_proj.weight
            self.L_chains.copy_(chain_starts(self.L_init, weight, len(self.L_chains), generator))
        nn.init.zeros_(self.q_head.weight)
        assert self.q_head.bias is not None
        nn.init.constant_(self.q_head.bias, -5.0)

    def chain_starts(self) -> Tensor:
        """The initial states of a sequence's chains, (K, D)."""
        assert self.L_init is not None
        first = self.L_init[None]
        return first if self.L_chains is None else torch.cat([first, self.L_chains])

    def matrices(self) -> dict[str, int]:
        """The weights of the blocks' matrix products, each with its number of matrices along the rows.

        A packed projection to queries, keys and values counts as one matrix per head and kind; gate and up
        count as one.
        Source: the code of arXiv 2601.19085.
        """
        found = {}
        for name, module in self.named_modules():
            if isinstance(module, Linear) and ".layers." in name:
                is_packed = name.endswith(".qkv_proj")
                found[f"{name}.weight"] = 3 * self.arch.num_heads if is_packed else 1
        return found

    def embed(self, inputs: Tensor, puzzle_rows: Tensor | None) -> Tensor:
        """The scaled input embedding e.

        inputs: (B, S) integer tokens. puzzle_rows: (B, puzzle_emb_ndim), the batch's rows of the puzzle
        table, None without one. Returns (B, T, D) in the model's dtype.
        """
        D, rows = self.arch.hidden_size, len(inputs)
        if puzzle_rows is None:
            before = self.embed_tokens.embedding_weight.new_empty(rows, 0, D, dtype=self.dtype)
        else:
            padding = self.puzzle_emb_len * D - puzzle_rows.shape[-1]
            before = F.pad(puzzle_rows.to(self.dtype), (0, padding)).view(-1, self.puzzle_emb_len, D)
        if self.register_tokens is not None:
            registers = self.register_tokens.embedding_weight.to(self.dtype).expand(rows, -1, -1)
            before = registers if puzzle_rows is None else torch.cat((before, registers), dim=1)
        if self.embed_pos is None:
            return self.embed_tokens(inputs, before, self.embed_scale)
        e = self.embed_tokens(inputs, before)
        e = math.sqrt(0.5) * (e + self.embed_pos.embedding_weight.to(self.dtype))
        return self.embed_scale * e

    @property
    def taught_updates(self) -> int:
        """The number of last updates with gradient in an ACT step; an H-update follows L_cycles L-updates."""
        arch, of_H = self.arch, 0 if self.arch.single_state else 1
        if arch.gradient == "last_n":
            return arch.gradient_updates
        return of_H + (arch.L_cycles if arch.gradient == "last_cycle" else 1)

    def recur(
        self,
        z_H: Tensor,
        z_L: Tensor,
        e: Tensor,
        queries: int | None = None,
        *,
        bias: Tensor | None = None,
        seen: list[Gated] | None = None,
        noise: Noise | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One ACT step of the recurrence: H_cycles of L_cycles L-updates and one H-update.

        z_H, z_L, e: (B, T, D). Returns the new (z_H, z_L). Gradient flows only through the last L-update and
        the last H-update; with arch.gradient=last_cycle through all updates of the last H-cycle, and with
        last_n through the last arch.gradient_updates of both levels. With `queries` the new z_H holds only
        its first positions. bias: (B, 1, D), of the subgoal, added to both levels' input. seen: a list that
        receives the gates of the last L-update and the last H-update. noise: added to every new state;
        updates have the call numbers FIRST_CALL, FIRST_CALL + 1, ...
        """
        arch, rope = self.arch, (self.cos, self.sin)
        if arch.single_state:
            return self.iterate(z_H, e, queries, noise), z_L
        L_level, H_level = self.L_level, self.H_level or self.L_level
        taught, calls = torch.is_grad_enabled(), count(FIRST_CALL)
        # Index of the first update with gradient.
        first = FIRST_CALL + arch.H_cycles * (arch.L_cycles + 1) - self.taught_updates
        for i in range(arch.H_cycles):
            last = i == arch.H_cycles - 1
            # Index of the cycle's last update.
            end = FIRST_CALL + (i + 1) * (arch.L_cycles + 1) - 1
            with torch.set_grad_enabled(taught and end >= first):
                held_L, held_H = L_level.hold(z_L, z_H, e), H_level.hold(z_H, z_L, None)
            for j in range(arch.L_cycles):
                ends, call = last and j == arch.L_cycles - 1, next(calls)
                with region(f"H cycle {i}, L cycle {j}"), torch.set_grad_enabled(taught and call >= first):
                    kept = seen if ends else None
                    z_L = L_level(
                        z_L, z_H, e, *rope, bias=bias, held=held_L, seen=kept, noise=noise, call=call
                    )
            with region(f"H cycle {i}"), torch.set_grad_enabled(taught and end >= first):
                z_H = H_level(
                    z_H,
                    z_L,
                    None,
                    *rope,
                    queries if last else None,
                    bias=bias,
                    held=held_H,
                    seen=seen if last else None,
                    noise=noise,
                    call=next(calls),
                )
        return z_H, z_L

    def iterate(self, z: Tensor, e: Tensor, queries: int | None, noise: Noise | None) -> Tensor:
        """One ACT step of a single state: H_cycles * L_cycles updates z = f(z + e); for the arguments see
        `recur`.

        Gradient flows through the last `taught_updates`.
        Source: Gao et al. 2025, Universal Reasoning Model (arXiv 2512.14693).
        """
        arch, taught = self.arch, torch.is_grad_enabled()
        updates = arch.H_cycles * arch.L_cycles
        for update in range(updates):
            teaches = update >= updates - self.taught_updates
            with region(f"update {update}"), torch.set_grad_enabled(taught and teaches):
                asked = queries if update == updates - 1 else None
                z = self.L_level(z, e, None, self.cos, self.sin, asked, noise=noise, call=FIRST_CALL + update)
        return z

    def logits(self, z_H: Tensor) -> Tensor:
        """The answer's logits (B, S, V) from z_H (B, T, D), in the model's dtype."""
        return self.lm_head(z_H)[:, self.prefix_len :]

    def q_values(self, z_H: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (q_halt, q_continue), each (B,), of z_H's first position, computed in float32 (float64)."""
        first = z_H[:, 0]
        q = self.q_head(first if first.dtype == torch.float64 else first.float())
        return q[:, 0], q[:, 1]
