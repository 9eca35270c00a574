"""The additions of the gated architecture: a gate network per reasoning module, gate losses and statistics.

Shapes: B batch, T tokens, D hidden size, R = gate_hidden_ratio * D the width of a gate network, n the number
of sources: primary state z, secondary state o and, for L, the input x, in this order. W is D if every channel
has its own gate, 1 if a token's channels share a gate. Terms of an absent x are not computed, and its weights
get a zero gradient.

Source: the gated fork of HRM; its saturation loss with the opposite sign.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrm.config.schema import ArchConfig
from hrm.model.layers import Linear
from kernels import gate_mix, linear
from kernels.checks import accumulate_dtype

# Initial biases of the gates of z, o and x; -2.2 opens a gate by 0.1, -3 by 0.05, -1 by 0.27.
STRATEGIES = {
    "balanced": (-2.2, -2.2, -2.2),
    "input_focused": (-3.0, -3.0, -1.0),
    "hierarchy_focused": (-1.0, -1.0, -3.0),
}
# Lower bound for gates in the entropy, whose slope is infinite at zero.
LEAST_GATE = 1e-12

# Bounds beyond which the statistics count a gate as saturated.
LOW, HIGH = 0.1, 0.9

# The gates of one module, one (B, T, W) for each present source.
Gates = tuple[Tensor, ...]


def initial_biases(arch: ArchConfig) -> tuple[float, float, float]:
    """The initial biases of the gates of z, o and x: by gate_init_strategy, else gate_init_bias for all."""
    if arch.gate_init_strategy is None:
        return (arch.gate_init_bias,) * 3
    return STRATEGIES[arch.gate_init_strategy]


def sources_of(z: Tensor, o: Tensor, x: Tensor | None) -> tuple[Tensor, ...]:
    """The present sources, in the order of their gates."""
    return (z, o) if x is None else (z, o, x)


def mix(gates: Gates, sources: Sequence[Tensor]) -> Tensor:
    """The sum of gate * source: (B, T, D) in the sources' dtype, taken in float32 (float64 for float64)."""
    wide = accumulate_dtype(sources[0].dtype)
    parts = [gate.to(wide) * source.to(wide) for gate, source in zip(gates, sources, strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.to(sources[0].dtype)


class GatingNetwork(nn.Module):
    """A gate for every channel from an MLP over the sources (gating_type=standard); see `kernels.gate_mix`.

    It replaces the sum of a reasoning module's sources. gate_proj: Linear(3D, R), SiLU,
    Linear(R, 3D), under the names of the gated fork's checkpoints. Parameters are cast to z's dtype at use.
    """

    def __init__(self, arch: ArchConfig) -> None:
        super().__init__()
        self.biases = initial_biases(arch)
        self._build(arch.hidden_size, int(arch.gate_hidden_ratio * arch.hidden_size))

    def _build(self, D: int, R: int) -> None:
        """Creates the layers of this gate type."""
        self.gate_proj = _mlp(D, R)

    def _openers(self) -> list[nn.Module]:
        """The layers whose biases open the gates: a third of a layer, or one layer, per source."""
        return [self.gate_proj[2]]

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Truncated LeCun normal weights and zero biases, except the biases that open the gates."""
        for layer in self.modules():
            if isinstance(layer, Linear):
                layer.reset_parameters(generator)
        for layer in self._openers():
            for part, bias in zip(layer.get_parameter("bias").chunk(3), self.biases, strict=True):
                nn.init.constant_(part, bias)

    def hold(self, z: Tensor, o: Tensor, x: Tensor | None) -> Tensor | None:
        """Values computed once per H-cycle and passed as `held` to its calls: none here."""
        return None

    def gates(self, z: Tensor, o: Tensor, x: Tensor | None, held: Tensor | None = None) -> Gates:
        """z, o, x: (B, T, D), x may be None. Returns the gates used in `forward`, n times (B, T, W) in z's
        dtype.

        The fused kernel does not round its gates to that dtype.
        """
        sources = sources_of(z, o, x)
        return torch.sigmoid(_logits(self.gate_proj, sources)).chunk(len(sources), dim=-1)

    def forward(self, z: Tensor, o: Tensor, x: Tensor | None, held: Tensor | None = None) -> Tensor:
        """z, o, x: (B, T, D), x may be None. Returns their gated sum (B, T, D). held: from `hold`."""
        w1, b1, w2, b2 = (p.to(z.dtype) for p in self.gate_proj.parameters())
        return gate_mix(z, o, x, w1, b1, w2, b2)


class AttentionGating(GatingNetwork):
    """One gate per token and source, from the primary state's attention over the sources.

    With q = Wq z, k_i = Wk s_i, v_i = Wv s_i, all R wide, and a = softmax_i(q . k_i / sqrt(R)):
    g = sigmoid(Wg sum_i a_i v_i + b). q_proj: Wq; kv_proj: Wk, then Wv; out_proj: Wg and b. Scores, softmax
    and the weighted sum are taken in float32 (float64 for float64).
    """

    def _build(self, D: int, R: int) -> None:
        self.q_proj = Linear(D, R)
        self.kv_proj = Linear(D, 2 * R)
        self.out_proj = Linear(R, 3, bias=True)

    def _openers(self) -> list[nn.Module]:
        return [self.out_proj]

    def gates(self, z: Tensor, o: Tensor, x: Tensor | None, held: Tensor | None = None) -> Gates:
        sources, wide = sources_of(z, o, x), accumulate_dtype(z.dtype)
        q = self.q_proj(z).to(wide)
        kv = torch.stack([self.kv_proj(source) for source in sources], dim=-2)  # (B, T, n, 2R)
        k, v = kv.to(wide).chunk(2, dim=-1)
        scores = (q.unsqueeze(-2) * k).sum(-1, keepdim=True) / math.sqrt(q.shape[-1])
        seen = (scores.softmax(-2) * v).sum(-2).to(z.dtype)  # (B, T, R)
        weight, bias = (p[: len(sources)].to(z.dtype) for p in self.out_proj.parameters())
        return torch.sigmoid(linear(seen, weight, bias)).chunk(len(sources), dim=-1)

    def forward(self, z: Tensor, o: Tensor, x: Tensor | None, held: Tensor | None = None) -> Tensor:
        return mix(self.gates(z, o, x), sources_of(z, o, x))


class HierarchicalGating(GatingNetwork):
    """A gate per channel from two MLPs: one over the current sources, one over the sources at the start of
    the H-cycle.

    gate_proj and slow_proj: as gate_proj in GatingNetwork. combine: Linear(6, 3), shared by all channels,
    from a channel's six logits (z, o, x fast, then slow) to the logits of its three gates. It starts as the
    mean of fast and slow, so that the gates start as open as either.
    """

    def _build(self, D: int, R: int) -> None:
        self.gate_proj = _mlp(D, R)
        self.slow_proj = _mlp(D, R)
        self.combine = Linear(6, 3, bias=True)

    def _openers(self) -> list[nn.Module]:
        return [self.gate_proj[2], self.slow_proj[2]]

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        super().reset_parameters(generator)
        half = 0.5 * torch.eye(3)
        self.combine.weight.copy_(torch.cat((half, half), dim=1))

    def hold(self, z: Tensor, o: Tensor, x: Tensor | None) -> Tensor:
        """The slow logits (B, T, nD) for the calls of one H-cycle."""
        return _logits(self.slow_proj, sources_of(z, o, x))

    def gates(self, z: Tensor, o: Tensor, x: Tensor | None, held: Tensor | None = None) -> Gates:
        """As in GatingNetwork; without `held` the slow logits are computed from the same states."""
        sources = sources_of(z, o, x)
        n, slow = len(sources), self.hold(z, o, x) if held is None else held
        fast = _logits(self.gate_proj, sources)
        logits = torch.stack((*fast.chunk(n, dim=-1), *slow.chunk(n, dim=-1)))  # (2n, B, T, D)
        weight, bias = (p.to(z.dtype) for p in self.combine.parameters())
        weight = weight.view(3, 2, 3)[:n, :, :n].reshape(n, 2 * n)
        # Move the channels last, so that one product combines all of them.
        combined = torch.addmm(bias[:n, None], weight, logits.flatten(1))
        return torch.sigmoid(combined).view(n, *z.shape).unbind()

    def forward(self, z: Tensor, o: Tensor, x: Tensor | None, held: Tensor | None = None) -> Tensor:
        return mix(self.gates(z, o, x, held), sources_of(z, o, x))


GATING_TYPES: dict[str, type[GatingNetwork]] = {
    "standard": GatingNetwork,
    "attention": AttentionGating,
    "hierarchical": HierarchicalGating,
}


def make_gating(arch: ArchConfig) -> GatingNetwork:
    """The gate network of a reasoning module, by arch.gating_type, with uninitialised parameters."""
    return GATING_TYPES[arch.gating_type](arch)


def _mlp(D: int, R: int) -> nn.Sequential:
    # `_logits` or the kernel apply the activation; here it only determines the layers' names.
    return nn.Sequential(Linear(3 * D, R, bias=True), nn.SiLU(), Linear(R, 3 * D, bias=True))


def _logits(mlp: nn.Sequential, sources: tuple[Tensor, ...]) -> Tensor:
    """The MLP over the concatenated sources, (B, T, nD), with only the weights of present sources."""
    w1, b1, w2, b2 = (p.to(sources[0].dtype) for p in mlp.parameters())
    joined = torch.cat(sources, dim=-1)
    width = joined.shape[-1]
    return linear(F.silu(linear(joined, w1[:, :width], b1)), w2[:width], b2[:width])


def saturation_loss(gates: Sequence[Gates]) -> Tensor:
    """(2g - 1)^2 = 1 - 4g(1 - g): 1 for gates at 0 or 1, 0 for half-open ones.

    gates: for each module, n times (B, T, W). Returns (B,) in float32 (float64 for float64): the mean over
    tokens, channels and sources, then over the modules.
    """
    return _mean([(2 * module - 1).square() for module in _stacked(gates)])


def entropy_loss(gates: Sequence[Gates]) -> Tensor:
    """1 - H / log(n) with H the entropy of p_i = g_i / sum(g) over the n sources: 0 if all are equal.

    gates: of each module, n times (B, T, W). Returns (B,) in float32 (float64 for float64): the mean over
    tokens and channels, then over the modules.
    """
    losses = []
    for module in _stacked(gates):
        g = module.clamp(min=LEAST_GATE)
        p = g / g.sum(2, keepdim=True)
        losses.append(1 + (p * p.log()).sum(2) / math.log(g.shape[2]))
    return _mean(losses)


def stability_loss(gates: Sequence[Gates], previous: Tensor, fresh: Tensor) -> Tensor:
    """The squared change of the gates since the sequence's previous ACT step, 0 if there is none.

    gates: of each module, n times (B, T, W). previous: (B, T, K, W), that step's gates from `pack`, ignored
    where fresh: (B,) bool. Returns (B,) in float32 (float64 for float64): the mean over tokens, channels and
    sources, then over the modules.
    """
    earlier = previous.split([len(module) for module in gates], dim=2)
    first = fresh.view(-1, 1, 1, 1)
    changes = [torch.where(first, 0, now - then) for now, then in zip(_stacked(gates), earlier, strict=True)]
    return _mean([change.square() for change in changes])


def pack(gates: Sequence[Gates]) -> Tensor:
    """Packs all modules' gates for the carry, without gradient: (B, T, K, W), K = 5 for L's three and H's
    two."""
    return torch.stack([gate for module in gates for gate in module], dim=2).detach()


def gate_loss_scale(step: int, warmup_steps: int, ramp_steps: int) -> float:
    """The factor of the gate losses' weights at a step: 0 in the warm-up, then linear to 1."""
    if step < warmup_steps:
        return 0.0
    return min(1.0, (step - warmup_steps) / ramp_steps) if ramp_steps else 1.0


@torch.no_grad()
def gate_statistics(gates: Gates, sources: Sequence[Tensor]) -> Tensor:
    """Statistics of one module's gates, each of which scales one source.

    gates: n times (B, T, W). sources: n times (B, T, D). Returns (n, 5) float32, without gradient: mean,
    standard deviation of all gates, shares below 0.1 and above 0.9, and the mean contribution
    |g_i s_i| / sum_j |g_j s_j|, which is 0 where every term is 0. Sums are in float32 (float64 for float64).
    """
    dtype = accumulate_dtype(gates[0].dtype)
    each = [gate.expand_as(source) for gate, source in zip(gates, sources, strict=True)]
    g, s = (torch.stack(list(tensors)).to(dtype).flatten(1) for tensors in (each, sources))
    parts = (g * s).abs()
    total = parts.sum(0)
    shares = torch.where(total > 0, parts / total, 0.0)
    columns = (
        g.mean(1),
        g.std(1, correction=0),
        (g < LOW).to(dtype).mean(1),
        (g > HIGH).to(dtype).mean(1),
        shares.mean(1),
    )
    return torch.stack(columns, dim=1).float()


def _stacked(gates: Sequence[Gates]) -> list[Tensor]:
    """Each module's gates as (B, T, n, W), widened to the dtype of sums."""
    return [torch.stack(module, dim=2).to(accumulate_dtype(module[0].dtype)) for module in gates]


def _mean(losses: list[Tensor]) -> Tensor:
    """(B,): each module's mean over all but the batch, then the mean of the modules."""
    return torch.stack([loss.flatten(1).mean(1) for loss in losses]).mean(0)
