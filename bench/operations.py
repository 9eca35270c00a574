"""The benchmarked operations: their inputs at the published model's sizes, and other implementations.

`OPS` defines for each operation how its inputs are drawn, which inputs have gradients or are overwritten, and
which libraries provide it. bench/counts.py counts bytes and FLOP under the same names.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernels
from bench.counts import OPERATIONS, Shape
from kernels.checks import accumulate_dtype
from kernels.muon import orthogonalize
from kernels.rope import rope_tables
from tests.kernels.compare import DEVICE, Outputs, randn

CUDA = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if CUDA else torch.float32

Call = Callable[..., Outputs]
Inputs = dict[str, Tensor]


class Op(NamedTuple):
    """A row of `OPS`.

    make: the floating-point inputs of a shape, and a function of these names. gradients: names of the inputs
    with gradients; empty for forward only. changed: the overwritten inputs. others: other libraries'
    functions for a shape.
    """

    make: Callable[[Shape], tuple[Inputs, Call]]
    gradients: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    dtype: torch.dtype = DTYPE


# -------------------------------------------------------------------------------- inputs, by operation


def tokens(s: Shape, width: int, seed: int) -> Tensor:
    return randn(s.B, s.T, width, seed=seed)


def weight(rows: int, columns: int, seed: int) -> Tensor:
    return randn(rows, columns, seed=seed, scale=columns**-0.5)


def norm(s: Shape) -> tuple[Inputs, Call]:
    return {"x": tokens(s, s.D, 0), "residual": tokens(s, s.D, 1)}, kernels.rms_norm


def activation(s: Shape) -> tuple[Inputs, Call]:
    return {"gate_up": tokens(s, 2 * s.inner, 0)}, kernels.swiglu


def mean_square(s: Shape) -> Tensor:
    """The two parts of each row's mean square, as `kernels.linear_rms` leaves them."""
    return (0.2 + randn(s.B, s.T, 2, seed=9).abs()).float()


def scaled(s: Shape) -> tuple[Inputs, Call]:
    parts, inputs = mean_square(s), {"x": tokens(s, s.D, 0), "weight": weight(3 * s.D, s.D, 1)}
    return inputs, lambda x, weight: kernels.linear_scaled(x, weight, parts.to(accumulate_dtype(x.dtype)))


def gated_product(s: Shape) -> tuple[Inputs, Call]:
    parts, inputs = mean_square(s), {"x": tokens(s, s.D, 0), "weight": weight(2 * s.inner, s.D, 1)}
    return inputs, lambda x, weight: kernels.linear_swiglu(x, weight, parts.to(accumulate_dtype(x.dtype)))


def feed_forward(s: Shape) -> tuple[Inputs, Call]:
    weights = {"gate_up_weight": weight(2 * s.inner, s.D, 1), "down_weight": weight(s.D, s.inner, 2)}
    return {"x": tokens(s, s.D, 0), **weights}, kernels.swiglu_mlp


def normed_feed_forward(s: Shape) -> tuple[Inputs, Call]:
    return feed_forward(s)[0], kernels.normed_swiglu_mlp


def convolution(s: Shape) -> tuple[Inputs, Call]:
    taps = {"weight": randn(s.inner, 2, seed=1), "bias": randn(s.inner, seed=2)}
    return {"gate_up": tokens(s, 2 * s.inner, 0), **taps}, kernels.conv_swiglu


def normed_product(s: Shape) -> tuple[Inputs, Call]:
    parts = mean_square(s)
    inputs = {"x": tokens(s, s.inner, 0), "weight": weight(s.D, s.inner, 1), "residual": tokens(s, s.D, 2)}

    def call(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        h, left = kernels.linear_rms(x, weight, residual, parts.to(accumulate_dtype(x.dtype)))
        # Implementations return different numbers of parts.
        return h, left.sum(-1)

    return inputs, call


def gates(s: Shape, sources: str = "zox") -> tuple[Inputs, Call]:
    inputs = {name: tokens(s, s.D, seed) for seed, name in enumerate(sources)}
    inputs |= {"w1": weight(s.R, 3 * s.D, 3), "b1": randn(s.R, seed=4)}
    inputs |= {"w2": weight(3 * s.D, s.R, 5), "b2": randn(3 * s.D, seed=6)}
    return inputs, kernels.gate_mix if "x" in sources else partial(kernels.gate_mix, x=None)


def tables(s: Shape) -> tuple[Tensor, Tensor]:
    cos, sin = rope_tables(s.T, s.head_dim)
    return cos.to(DEVICE), sin.to(DEVICE)


def rotation(s: Shape) -> tuple[Inputs, Call]:
    cos, sin = tables(s)
    x = randn(s.B, s.T, 2 * s.heads, s.head_dim, seed=0)
    return {"x": x}, lambda x: kernels.rope(x, cos, sin)


def attending(s: Shape) -> tuple[Inputs, Call]:
    cos, sin = tables(s)
    return {"qkv": tokens(s, 3 * s.D, 0)}, lambda qkv: kernels.attention(qkv, s.heads, cos, sin)


def labels(s: Shape) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randint(0, s.V, (s.B, s.T - s.P), generator=generator, dtype=torch.int32)
    drawn[torch.rand(drawn.shape, generator=generator) < 0.1] = -100
    return drawn.to(DEVICE)


def losses(s: Shape, function: Callable[..., Tensor]) -> tuple[Inputs, Call]:
    drawn = labels(s)
    return {"logits": randn(*drawn.shape, s.V, seed=0)}, lambda logits: function(logits, drawn)


def head(s: Shape, function: Callable[..., Any]) -> tuple[Inputs, Call]:
    drawn = labels(s)
    inputs = {"z": tokens(s, s.D, 0), "weight": weight(s.V, s.D, 1)}
    return inputs, lambda z, weight: function(z[:, s.P :], weight, drawn)


def adam(s: Shape, function: Callable[..., None]) -> tuple[Inputs, Call]:
    # On a CPU use a part of the buffers, which already exceeds the caches.
    N = s.parameters() if CUDA else 2**20
    inputs = {name: randn(N, seed=seed) for seed, name in enumerate(("param", "grad", "exp_avg"))}
    inputs |= {"exp_avg_sq": randn(N, seed=3).square(), "lr": torch.tensor(1e-4, device=DEVICE).double()}
    step = torch.tensor(100, device=DEVICE)
    copy = torch.empty(N, dtype=torch.bfloat16, device=DEVICE) if CUDA else None
    recipe: dict[str, Any] = {"step": step, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "copy": copy}
    recipe["skip"] = torch.tensor(False, device=DEVICE)

    def call(**inputs: Any) -> tuple[Tensor, ...]:
        function(**inputs, **recipe)
        return ()

    return inputs, call


def muon(s: Shape) -> tuple[Inputs, Call]:
    # On a CPU use one matrix instead of those of all blocks.
    shape = (2 * s.layers if CUDA else 1, 2 * s.inner, s.D)
    inputs = {name: randn(*shape, seed=seed) for seed, name in enumerate(("param", "grad", "momentum"))}
    inputs["lr"] = torch.tensor(0.02, device=DEVICE).double()
    narrow = torch.empty(shape, dtype=DTYPE, device=DEVICE)
    skip = torch.tensor(False, device=DEVICE)

    def call(param: Tensor, grad: Tensor, momentum: Tensor, lr: Tensor) -> tuple[Tensor, ...]:
        # The float64 reference has no narrow tensor.
        update = torch.empty_like(param) if param.dtype == torch.float64 else narrow
        kernels.muon_momentum(grad, momentum, update, mu=0.6, skip=skip)
        update.copy_(orthogonalize(update, 3))
        copy = narrow if CUDA and param.dtype == torch.float32 else None
        kernels.muon_update(param, update, lr=lr, scale=2.0, weight_decay=5e-3, copy=copy, skip=skip)
        return ()

    return inputs, call


def rows_of_a_table(s: Shape) -> tuple[Inputs, Call]:
    table, batch = 1000, torch.Generator().manual_seed(5)
    identifiers = torch.randint(0, table, (s.B,), generator=batch, dtype=torch.int32).to(DEVICE)
    inputs = {"table": randn(table, s.D, seed=0), "grad": randn(s.B, s.D, seed=1)}
    inputs["lr"] = torch.tensor(1e-2, device=DEVICE).double()
    skip = torch.tensor(False, device=DEVICE)

    def call(table: Tensor, grad: Tensor, lr: Tensor) -> tuple[Tensor, ...]:
        kernels.sign_sgd(table, identifiers, grad, lr, 0.1, skip)
        return ()

    return inputs, call


def keys(s: Shape) -> Tensor:
    """Keys without path 0."""
    return torch.ones(s.B, 3, dtype=torch.int32, device=DEVICE)


def noise(s: Shape) -> tuple[Inputs, Call]:
    steps = torch.zeros(s.B, dtype=torch.int32, device=DEVICE)
    call = partial(kernels.noisy_update, damping=0.95, noise=0.01, keys=keys(s), steps=steps)
    return {"f": tokens(s, s.D, 0), "z": tokens(s, s.D, 1)}, call


def start(s: Shape) -> tuple[Inputs, Call]:
    begins = torch.ones(s.B, dtype=torch.bool, device=DEVICE)
    call = partial(kernels.random_start, begins=begins, keys=keys(s), call=0)
    return {"z": tokens(s, s.D, 0), "init": randn(s.D, seed=1)}, call


GATES = ("w1", "b1", "w2", "b2")
FLAT = ("param", "exp_avg", "exp_avg_sq")
OPS: dict[str, Op] = {
    "rms_norm": Op(norm, ("x", "residual"), others=("liger",)),
    "swiglu": Op(activation, ("gate_up",), others=("liger",)),
    "linear_scaled": Op(scaled),
    "linear_swiglu": Op(gated_product),
    "swiglu_mlp": Op(feed_forward, ("x", "gate_up_weight", "down_weight")),
    "normed_swiglu_mlp": Op(normed_feed_forward, ("x", "gate_up_weight", "down_weight")),
    "conv_swiglu": Op(convolution, ("gate_up", "weight", "bias")),
    "linear_rms": Op(normed_product),
    "gate_mix": Op(gates, ("z", "o", "x", *GATES)),
    "gate_mix_two": Op(partial(gates, sources="zo"), ("z", "o", *GATES)),
    "rope": Op(rotation, ("x",), others=("liger",)),
    "attention": Op(attending, ("qkv",), others=("flash-attn", "SDPA")),
    "stablemax_cross_entropy": Op(partial(losses, function=kernels.stablemax_cross_entropy), ("logits",)),
    "softmax_cross_entropy": Op(
        partial(losses, function=kernels.softmax_cross_entropy), ("logits",), others=("liger",)
    ),
    "lm_head_stablemax": Op(partial(head, function=kernels.lm_head_stablemax), ("z", "weight")),
    "lm_head_softmax": Op(partial(head, function=kernels.lm_head_softmax), ("z", "weight")),
    "noisy_update": Op(noise),
    "random_start": Op(start),
    "adam_atan2": Op(partial(adam, function=kernels.adam_atan2), changed=FLAT, dtype=torch.float32),
    "adamw": Op(partial(adam, function=kernels.adamw), changed=FLAT, dtype=torch.float32),
    "muon": Op(muon, changed=("param", "momentum"), dtype=torch.float32),
    "sign_sgd": Op(rows_of_a_table, changed=("table",), dtype=torch.float32),
}
assert OPS.keys() == OPERATIONS.keys(), "every operation must be counted and timed"


# ------------------------------------------------------------------------------------- other libraries


def liger(op: str, s: Shape) -> Call:
    """Liger's function of the same inputs. Partial results are concatenated only for the check."""
    functional: Any = import_module("liger_kernel.transformers.functional")
    if op == "rms_norm":
        ones = torch.ones(s.D, dtype=DTYPE, device=DEVICE)

        def fused_add(x: Tensor, residual: Tensor) -> Tensor:
            # Its second output, the sum, is unused and has zero gradient.
            return functional.liger_fused_add_rms_norm(x, residual, ones, 1e-5, 0.0, "gemma", False)[0]

        return fused_add
    if op == "swiglu":
        packed: Any = import_module("liger_kernel.ops.swiglu").LigerFusedGateUpSiLUMulFunction
        return lambda gate_up: packed.apply(gate_up.flatten(0, 1)).unflatten(0, (s.B, s.T))
    if op == "rope":
        cos, sin = (table[None] for table in tables(s))

        def rotate(x: Tensor) -> tuple[Tensor, ...]:
            q, k = (part.transpose(1, 2) for part in x.split(s.heads, dim=2))
            return tuple(part.transpose(1, 2) for part in functional.liger_rope(q, k, cos, sin))

        return rotate
    drawn = labels(s).flatten().long()

    def cross_entropy(logits: Tensor) -> Tensor:
        # It overwrites the logits with the gradient, so copy the caller's logits if they are needed.
        flat = functional.liger_cross_entropy(logits.flatten(0, 1), drawn, reduction="none")
        return flat.view(logits.shape[:-1])

    return cross_entropy


def library_attention(backend: str, s: Shape) -> Call:
    cos, sin = tables(s)
    return lambda qkv: kernels.attention(qkv, s.heads, cos, sin, backend=backend)
