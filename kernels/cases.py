"""The calls of a model to the operations, with tensors of its sizes, to query and measure implementations.

On the meta device tensors have no data, so a query costs nothing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernels
from kernels.checks import accumulate_dtype
from kernels.matmul import DEFERRED, rstd_of, use_fused
from kernels.rope import rope_tables

Outputs = Tensor | tuple[Tensor, ...]


class Sizes(NamedTuple):
    """A model's sizes, by default the published ones.

    length: positions T; the head reads the last `cells`, 0 means all but one. inner_size, gate_size: 0 means
    3 D and D / 4. parameters: number of parameters, without the puzzle table.
    """

    batch_size: int = 768
    length: int = 82
    hidden_size: int = 512
    num_heads: int = 8
    vocab_size: int = 11
    cells: int = 0
    inner_size: int = 0
    gate_size: int = 0
    parameters: int = 27_000_000


def _as_they_are(outputs: Outputs) -> Outputs:
    return outputs


class Case(NamedTuple):
    """One operation with its arguments.

    inputs: floating-point tensors by argument name. gradients: the inputs with a gradient; empty without
    gradients. changed: the inputs that it overwrites. measured_as: the operation's name in a shape class, if
    different. libraries: other implementations. baseline: the implementation that the fastest must beat.
    compiles: whether a model's compiled step contains it. finish: converts the outputs of all implementations
    to the same form, for the check.
    """

    op: str
    inputs: dict[str, Tensor]
    call: Callable[..., Outputs]
    gradients: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    measured_as: str | None = None
    libraries: tuple[str, ...] = ()
    baseline: str = "reference"
    compiles: bool = True
    finish: Callable[[Outputs], Outputs] = _as_they_are


def cases(sizes: Sizes, dtype: torch.dtype, device: torch.device | str) -> dict[str, Callable[[], Case]]:
    """Every operation with a choice, by name; "forward" in a name means without gradient.

    Each value draws its own tensors. Together they cover a model's training step and inference.
    """
    device = torch.device(device)
    B, T, D, heads, V, S, inner, R, parameters = sizes
    S, inner, R = S or max(1, T - 1), inner or 3 * D, R or max(1, D // 4)

    def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device) * scale

    def weight(rows: int, columns: int) -> Tensor:
        return draw(rows, columns, scale=columns**-0.5)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, dtype=torch.int32, device=device)

    def tables() -> list[Tensor]:
        return [table.to(device) for table in rope_tables(T, D // heads)]

    def mean_square() -> Tensor:
        return 0.2 + torch.rand(B, T, 2, device=device)

    def rms_norm(gradients: tuple[str, ...]) -> Case:
        inputs = {"x": draw(B, T, D), "residual": draw(B, T, D)}
        return Case("rms_norm", inputs, kernels.rms_norm, gradients, libraries=("quack",))

    def rms_norm_pair() -> Case:
        inputs = {"x": draw(B, T, D), "residual": draw(B, T, D)}
        return Case("rms_norm_pair", inputs, kernels.rms_norm_pair, (*inputs,), measured_as="rms_norm")

    def rope() -> Case:
        cos, sin = tables()
        x = draw(B, T, 2 * heads, D // heads)
        return Case("rope", {"x": x}, lambda x: kernels.rope(x, cos, sin), ("x",))

    def attention(gradients: tuple[str, ...]) -> Case:
        cos, sin = tables()
        call = lambda qkv: kernels.attention(qkv, heads, cos, sin)  # noqa: E731
        libraries = {"libraries": ("flash",), "baseline": "sdpa"}
        return Case("attention", {"qkv": draw(B, T, 3 * D)}, call, gradients, **libraries)  # type: ignore

    def swiglu() -> Case:
        return Case("swiglu", {"gate_up": draw(B, T, 2 * inner)}, kernels.swiglu, ("gate_up",))

    def linear() -> Case:
        return Case("linear", {"x": draw(B, T, D), "weight": weight(3 * D, D)}, kernels.linear)

    def linear_scaled() -> Case:
        parts, inputs = mean_square(), {"x": draw(B, T, D), "weight": weight(3 * D, D)}
        call = lambda x, weight: kernels.linear_scaled(x, weight, parts.to(accumulate_dtype(x.dtype)))  # noqa: E731
        return Case("linear_scaled", inputs, call, measured_as=DEFERRED)

    def linear_rms() -> Case:
        parts = mean_square()
        inputs = {"x": draw(B, T, inner), "weight": weight(D, inner), "residual": draw(B, T, D)}

        def call(x: Tensor, weight: Tensor, residual: Tensor) -> Outputs:
            return kernels.linear_rms(x, weight, residual, parts.to(accumulate_dtype(x.dtype)))

        return Case("linear_rms", inputs, call, measured_as=DEFERRED)

    def deferred_norm() -> Case:
        """A block's products around its two norms, deferred or not, which the choice covers as a whole."""
        # x is exactly twice h, so that both variants start from equal values.
        x, parts = draw(B, T, D), torch.full((B, T, 2), 0.125, device=device)
        inputs = {"x": x, "h": x * 0.5, "attended": draw(B, T, D), "activated": draw(B, T, inner)}
        inputs |= {"qkv": weight(3 * D, D), "out": weight(D, D), "down": weight(D, inner)}

        def call(
            x: Tensor, h: Tensor, attended: Tensor, activated: Tensor, qkv: Tensor, out: Tensor, down: Tensor
        ) -> Outputs:
            if not use_fused("linear_rms", h, measured_as=DEFERRED):
                first = kernels.rms_norm(x, kernels.linear(attended, out))
                return kernels.linear(x, qkv), first, kernels.rms_norm(x, kernels.linear(activated, down))
            factor = parts.to(accumulate_dtype(h.dtype))
            sums = (kernels.linear_rms(*each, h, factor) for each in ((attended, out), (activated, down)))
            return (kernels.linear_scaled(h, qkv, factor), *(part for pair in sums for part in pair))

        def finish(outputs: Outputs) -> Outputs:
            projected, *rest = outputs
            if len(rest) == 2:
                return outputs
            norms = zip(rest[::2], rest[1::2], strict=True)
            return (projected, *((h * rstd_of(left)[..., None]).to(h.dtype) for h, left in norms))

        return Case("linear_rms", inputs, call, measured_as=DEFERRED, finish=finish)

    def swiglu_mlp() -> Case:
        inputs = {"x": draw(B, T, D), "gate_up_weight": weight(2 * inner, D), "down_weight": weight(D, inner)}
        return Case("swiglu_mlp", inputs, kernels.swiglu_mlp, (*inputs,))

    def normed_swiglu_mlp(gradients: bool) -> Case:
        inputs = swiglu_mlp().inputs
        return Case("normed_swiglu_mlp", inputs, kernels.normed_swiglu_mlp, (*inputs,) if gradients else ())

    def conv_swiglu(gradients: bool) -> Case:
        inputs = {"gate_up": draw(B, T, 2 * inner), "weight": draw(inner, 2), "bias": draw(inner)}
        return Case("conv_swiglu", inputs, kernels.conv_swiglu, (*inputs,) if gradients else ())

    def linear_swiglu() -> Case:
        parts, inputs = mean_square(), {"x": draw(B, T, D), "weight": weight(2 * inner, D)}
        call = lambda x, weight: kernels.linear_swiglu(x, weight, parts.to(accumulate_dtype(x.dtype)))  # noqa: E731
        return Case("linear_swiglu", inputs, call)

    def noisy_update() -> Case:
        keys, steps = integers(100, B, 3), integers(100, B)
        call = lambda f, z: kernels.noisy_update(f, z, damping=0.95, noise=0.01, keys=keys, steps=steps)  # noqa: E731
        return Case("noisy_update", {"f": draw(B, T, D), "z": draw(B, T, D)}, call, ("f", "z"))

    def random_start() -> Case:
        keys, begins = integers(100, B, 3), integers(2, B).bool()
        call = lambda z, init: kernels.random_start(z, begins, init, keys, 0)  # noqa: E731
        return Case("random_start", {"z": draw(B, T, D), "init": draw(D)}, call)

    def gate_mix(sources: str) -> Case:
        inputs = {name: draw(B, T, D) for name in sources}
        inputs |= {"w1": weight(R, 3 * D), "b1": draw(R), "w2": weight(3 * D, R), "b2": draw(3 * D)}
        call = kernels.gate_mix if "x" in sources else partial(kernels.gate_mix, x=None)
        return Case("gate_mix", inputs, call, (*inputs,))

    def cross_entropy(op: str) -> Case:
        labels, function = integers(V, B, T), getattr(kernels, op)
        return Case(op, {"logits": draw(B, T, V)}, lambda logits: function(logits, labels), ("logits",))

    def lm_head(op: str) -> Case:
        labels, function = integers(V, B, S), getattr(kernels, op)
        inputs = {"z_H": draw(B, T, D), "weight": weight(V, D)}
        call = lambda z_H, weight: (*function(z_H[:, T - S :], weight, labels),)  # noqa: E731
        return Case(op, inputs, call, (*inputs,))

    def adam(op: str) -> Case:
        wide, narrow = torch.float32, dtype if dtype.itemsize == 2 else None
        inputs = {name: draw(parameters, dtype=wide) for name in ("param", "grad", "exp_avg")}
        inputs |= {"exp_avg_sq": draw(parameters, dtype=wide).square(), "lr": draw(dtype=wide) * 0 + 1e-4}
        copy = None if narrow is None else torch.empty(parameters, dtype=narrow, device=device)
        recipe: dict[str, Any] = {"step": torch.full((), 100, device=device), "copy": copy}
        recipe |= {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}
        recipe["skip"] = torch.zeros((), dtype=torch.bool, device=device)

        def call(**inputs: Any) -> Outputs:
            getattr(kernels, op)(**inputs, **recipe)
            return ()

        return Case(op, inputs, call, changed=("param", "exp_avg", "exp_avg_sq"), compiles=False)

    def muon_momentum() -> Case:
        wide = torch.float32
        inputs = {name: draw(parameters, dtype=wide) for name in ("grad", "momentum")}
        inputs["update"] = torch.empty(parameters, dtype=dtype, device=device)
        skip = torch.zeros((), dtype=torch.bool, device=device)

        def call(**inputs: Tensor) -> Outputs:
            kernels.muon_momentum(**inputs, mu=0.6, skip=skip)
            return ()

        return Case("muon_momentum", inputs, call, changed=("momentum", "update"), compiles=False)

    def muon_update() -> Case:
        inputs = {"param": draw(parameters, dtype=torch.float32), "update": draw(parameters)}
        inputs["lr"] = draw(dtype=torch.float32) * 0 + 0.02
        copy = None
        if dtype.itemsize == 2:
            copy = torch.empty(parameters, dtype=dtype, device=device)
        skip = torch.zeros((), dtype=torch.bool, device=device)

        def call(**inputs: Tensor) -> Outputs:
            kernels.muon_update(**inputs, scale=1.0, weight_decay=5e-3, copy=copy, skip=skip)
            return ()

        return Case("muon_update", inputs, call, changed=("param",), compiles=False)

    def sign_sgd() -> Case:
        identifiers, skip = integers(1000, B), torch.zeros((), dtype=torch.bool, device=device)
        wide = torch.float32
        inputs = {"table": draw(1000, D, dtype=wide), "grad": draw(B, D, dtype=wide)}
        inputs["lr"] = draw(dtype=wide) * 0 + 1e-2

        def call(table: Tensor, grad: Tensor, lr: Tensor) -> Outputs:
            kernels.sign_sgd(table, identifiers, grad, lr, 0.1, skip)
            return ()

        return Case("sign_sgd", inputs, call, changed=("table",), compiles=False)

    # Operations that others depend on come first, then those that take most of a step.
    return {
        "rms_norm forward": partial(rms_norm, ()),
        "rope": rope,
        "attention forward": partial(attention, ()),
        DEFERRED: deferred_norm,
        "linear_swiglu": linear_swiglu,
        "attention": partial(attention, ("qkv",)),
        "rms_norm": partial(rms_norm, ("x", "residual")),
        "swiglu": swiglu,
        "swiglu_mlp": swiglu_mlp,
        "normed_swiglu_mlp forward": partial(normed_swiglu_mlp, False),
        "normed_swiglu_mlp": partial(normed_swiglu_mlp, True),
        "conv_swiglu forward": partial(conv_swiglu, False),
        "conv_swiglu": partial(conv_swiglu, True),
        "gate_mix": partial(gate_mix, "zox"),
        "gate_mix_two": partial(gate_mix, "zo"),
        "lm_head_stablemax": partial(lm_head, "lm_head_stablemax"),
        "lm_head_softmax": partial(lm_head, "lm_head_softmax"),
        "adam_atan2": partial(adam, "adam_atan2"),
        "adamw": partial(adam, "adamw"),
        "muon_momentum": muon_momentum,
        "muon_update": muon_update,
        "sign_sgd": sign_sgd,
        "linear": linear,
        "rms_norm_pair": rms_norm_pair,
        "linear_scaled": linear_scaled,
        "linear_rms": linear_rms,
        "stablemax_cross_entropy": partial(cross_entropy, "stablemax_cross_entropy"),
        "softmax_cross_entropy": partial(cross_entropy, "softmax_cross_entropy"),
        "noisy_update": noisy_update,
        "random_start": random_start,
    }


# Cases without their own choice or without a separate call in a model's step, and cases that draw random
# numbers, whose last bits may differ between a kernel and a compiled reference. Muon's operations have
# buffers of several sizes.
NOT_MEASURED = (
    *("linear", "rms_norm_pair", "linear_scaled", "linear_rms", "noisy_update", "random_start"),
    *("muon_momentum", "muon_update"),
)
