"""The layers of a hierarchical reasoning model: linear, embedding, attention, SwiGLU, block.

Parameters are kept in float32 and cast to their input's dtype at use. Parameters and buffers have the names
of official checkpoints.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrm.config.schema import ArchConfig
from kernels import (
    attention,
    conv_swiglu,
    linear,
    linear_rms,
    linear_scaled,
    linear_swiglu,
    normed_swiglu_mlp,
    rms_norm,
    rms_norm_pair,
    swiglu_mlp,
)
from kernels.checks import cast

# Standard deviation of a unit normal truncated at two standard deviations.
TRUNCATED_STD = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))


def truncated_normal_(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    """Fills with a normal truncated at two standard deviations and rescaled to the standard deviation std."""
    wide = std / TRUNCATED_STD
    nn.init.trunc_normal_(tensor, std=wide, a=-2 * wide, b=2 * wide, generator=generator)


def chain_starts(
    first: Tensor, weight: Tensor, count: int, generator: torch.Generator, leading: int = 10
) -> Tensor:
    """Initial states (count, D) of further chains, without an advantage over the first initial state (D,).

    Truncated normals of standard deviation 1, each rotated so that its projection on the `leading`
    right-singular vectors of weight (out, D) is as long as that of `first`, or as its own norm if that is
    less. Norms do not change. leading must be below D. Source: arXiv 2601.19085.
    """
    drawn = torch.empty(count, len(first))
    truncated_normal_(drawn, 1.0, generator)
    drawn, first, weight = drawn.double(), first.double(), weight.double()
    vectors = torch.linalg.eigh(weight.T @ weight).eigenvectors[:, -leading:]
    inside = drawn @ vectors @ vectors.T
    outside, norm = drawn - inside, drawn.norm(dim=1, keepdim=True)
    length = norm.minimum((first @ vectors).norm())
    others = (norm.square() - length.square()).sqrt()
    inside = inside * (length / inside.norm(dim=1, keepdim=True))
    return inside + outside * (others / outside.norm(dim=1, keepdim=True))


class Linear(nn.Module):
    """A linear map computed in its input's dtype. weight: (out, in); bias: (out,) or None."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Truncated LeCun normal weights, zero biases."""
        truncated_normal_(self.weight, 1 / math.sqrt(self.weight.shape[1]), generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        dtype, bias = x.dtype, self.bias
        return linear(x, cast(self.weight, dtype), None if bias is None else cast(bias, dtype))


# Maximum rows of a table whose gradient is computed as a product; in larger tables few cells share a row.
ONE_HOT_ROWS = 256


class _Lookup(torch.autograd.Function):
    """Appends rows of a small table to given rows, with the table's gradient as a one-hot product.

    Adding gradients by row would make thousands of cells of a batch wait for the same few rows; on a GPU this
    means atomic additions in random order and in the narrow dtype. The product includes the given rows, which
    match no row of the table, so that the gradient is read without a copy.
    """

    @staticmethod
    def forward(ctx: Any, index: Tensor, table: Tensor, before: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows, ctx.before = table.shape[0], before.shape[1]
        return torch.cat((before, F.embedding(index, table)), dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        (index,), (dy,) = ctx.saved_tensors, grads
        _, wants_table, wants_before = ctx.needs_input_grad
        dtable = None
        if wants_table:
            rows = torch.arange(ctx.rows, device=index.device, dtype=index.dtype)
            places = F.pad(index, (ctx.before, 0), value=-1)
            one_hot = (rows[:, None] == places.flatten()).to(dy.dtype)
            dtable = one_hot @ dy.flatten(0, -2)
        return None, dtable, dy[:, : ctx.before] if wants_before else None


class Embedding(nn.Module):
    """A dense table of vectors. embedding_weight: (rows, D), initial standard deviation 1/sqrt(D)."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_weight = nn.Parameter(torch.empty(rows, width))

    def reset_parameters(self, generator: torch.Generator) -> None:
        truncated_normal_(self.embedding_weight, 1 / math.sqrt(self.embedding_weight.shape[1]), generator)

    def forward(self, index: Tensor, before: Tensor, scale: float = 1.0) -> Tensor:
        """Concatenates the rows of `before` and of the table, times scale.

        index: (B, S) integers. before: (B, P, D), P may be 0. Returns (B, P + S, D) in before's dtype.
        """
        # Scale the table instead of the result: it has fewer rows, forward and backward.
        table, before = scale * self.embedding_weight.to(before.dtype), scale * before
        if len(table) <= ONE_HOT_ROWS:
            return _Lookup.apply(index, table, before)
        return torch.cat((before, F.embedding(index, table)), dim=1)


class PuzzleEmbedding(nn.Module):
    """One vector per puzzle identifier, initially zero.

    weights: (num_puzzle_identifiers, puzzle_emb_ndim), a buffer: autograd sees only the gathered rows of a
    batch, so a million rows need no memory besides the table, and its optimiser has no state.
    """

    weights: Tensor

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weights", torch.zeros(rows, width))

    def forward(self, puzzle_identifiers: Tensor) -> Tensor:
        return self.weights[puzzle_identifiers]


# Position encodings that rotate queries and keys.
ROTARY = ("rope", "rope2d")


class Attention(nn.Module):
    """Self-attention with a packed projection and no biases."""

    def __init__(self, hidden_size: int, num_heads: int, backend: str) -> None:
        super().__init__()
        self.num_heads, self.backend = num_heads, backend
        self.qkv_proj = Linear(hidden_size, 3 * hidden_size)
        self.o_proj = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, queries: int | None) -> Tensor:
        return self.o_proj(self.attend(self.qkv_proj(x), cos, sin, queries))

    def attend(self, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, queries: int | None) -> Tensor:
        """The attention between the projections. qkv: (B, T, 3D). Returns (B, T or queries, D)."""
        return attention(qkv, self.num_heads, cos, sin, queries, self.backend)


def swiglu_width(hidden_size: int, expansion: float) -> int:
    """The inner width of SwiGLU: two thirds of the expansion, rounded up to a multiple of 256."""
    return -(-round(expansion * hidden_size * 2 / 3) // 256) * 256


class SwiGLU(nn.Module):
    """The feed-forward half of a block: down(silu(gate) * up), with gate and up in one projection.

    With a norm it is down(sigmoid(gate) * rms_norm(gate * up)).
    """

    def __init__(self, hidden_size: int, expansion: float, norm_eps: float | None = None) -> None:
        """norm_eps: added to the mean square of the norm; None disables the norm."""
        super().__init__()
        self.norm_eps = norm_eps
        width = swiglu_width(hidden_size, expansion)
        self.gate_up_proj = Linear(hidden_size, 2 * width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate_up, down = cast(self.gate_up_proj.weight, x.dtype), cast(self.down_proj.weight, x.dtype)
        if self.norm_eps is None:
            return swiglu_mlp(x, gate_up, down)
        return normed_swiglu_mlp(x, gate_up, down, self.norm_eps)


class TokenConv(nn.Module):
    """A depthwise causal convolution of two taps over the tokens. weight: (D, 1, 2); bias: (D,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 1, 2))
        self.bias = nn.Parameter(torch.empty(width))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Uniform within 1 / sqrt(2), PyTorch's default for convolutions of two taps."""
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -math.sqrt(0.5), math.sqrt(0.5), generator=generator)

    def forward(self, gate_up: Tensor) -> Tensor:
        """silu(conv(silu(gate) * up)). gate_up: (B, T, 2D). Returns (B, T, D)."""
        dtype = gate_up.dtype
        return conv_swiglu(gate_up, self.weight.to(dtype).flatten(1), self.bias.to(dtype))


class ConvSwiGLU(nn.Module):
    """The feed-forward half of URM's block: down(silu(conv(silu(gate) * up)))."""

    def __init__(self, hidden_size: int, expansion: float) -> None:
        super().__init__()
        width = swiglu_width(hidden_size, expansion)
        self.gate_up_proj = Linear(hidden_size, 2 * width)
        self.dwconv = TokenConv(width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.dwconv(self.gate_up_proj(x)))


class Block(nn.Module):
    """A post-norm transformer block without norm weights; with mlp_t a SwiGLU over the tokens mixes them."""

    def __init__(self, arch: ArchConfig, length: int, attention_backend: str) -> None:
        """length: tokens T of its input."""
        super().__init__()
        self.eps = arch.rms_norm_eps
        self.self_attn: Attention | None = None
        self.mlp_t: SwiGLU | None = None
        norm_eps = arch.rms_norm_eps if arch.swiglu == "normed" else None
        if arch.mlp_t:
            self.mlp_t = SwiGLU(length, arch.expansion, norm_eps)
        else:
            self.self_attn = Attention(arch.hidden_size, arch.num_heads, attention_backend)
        self.mlp: SwiGLU | ConvSwiGLU
        if arch.swiglu == "conv":
            self.mlp = ConvSwiGLU(arch.hidden_size, arch.expansion)
        else:
            self.mlp = SwiGLU(arch.hidden_size, arch.expansion, norm_eps)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        queries: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x, residual: (B, T, D), twice the same tensor for two readers, from `kernels.rms_norm_pair`.

        Returns the block's output in the same form: (B, T, D), or (B, queries, D) for the first positions
        only.
        """
        if self.self_attn is not None:
            attended = self.self_attn(x, cos, sin, queries)
            residual = residual if queries is None else residual[:, :queries]
            x, residual = rms_norm_pair(residual, attended, self.eps)
        else:
            assert self.mlp_t is not None
            # This norm is also over the tokens.
            columns = x.transpose(1, 2).contiguous()
            columns = rms_norm(columns, self.mlp_t(columns), self.eps)
            x = residual = columns.transpose(1, 2)[:, :queries].contiguous()
        return rms_norm_pair(residual, self.mlp(x), self.eps)

    def deferred(
        self,
        h: Tensor,
        mean_square: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        queries: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Computes `forward` of x = rstd * h in four products, with deferred norm factors.

        h: (B, T, D). mean_square: (B, T, P), None if rstd is 1. Returns both for the next block. The norms
        have no weight, so their factor commutes with a product, and they need no pass over memory. It is for
        blocks without gradient; see `kernels.linear_rms`.
        """
        attn, mlp, dtype = self.self_attn, self.mlp, h.dtype
        assert attn is not None, "a token mixer does not commute with a factor per token"
        qkv_weight = attn.qkv_proj.weight.to(dtype)
        qkv = linear(h, qkv_weight) if mean_square is None else linear_scaled(h, qkv_weight, mean_square)
        attended = attn.attend(qkv, cos, sin, queries)
        h, mean_square = h[:, :queries], None if mean_square is None else mean_square[:, :queries]
        h, mean_square = linear_rms(attended, attn.o_proj.weight.to(dtype), h, mean_square, self.eps)
        gate_up_weight = mlp.gate_up_proj.weight.to(dtype)
        if isinstance(mlp, ConvSwiGLU):
            inner = mlp.dwconv(linear_scaled(h, gate_up_weight, mean_square))
        else:
            inner = linear_swiglu(h, gate_up_weight, mean_square)
        return linear_rms(inner, mlp.down_proj.weight.to(dtype), h, mean_square, self.eps)
