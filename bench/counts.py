"""The minimum bytes and FLOP of each operation, counted, not measured.

Bytes count every tensor that a launch reads or writes once. FLOP count only matrix products, with two per
multiply-add, because elementwise arithmetic is limited by its bytes. `OPERATIONS` counts this project's fused
kernels; `eager` counts PyTorch's launches for their references without a compiler, by running these on
tensors without data.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import kernels
from hrm.model.layers import swiglu_width


@dataclass(frozen=True)
class Shape:
    """B sequences of T positions, P of them the puzzle's, in the published model's sizes; R: gate width."""

    B: int
    T: int = 82
    D: int = 512
    heads: int = 8
    R: int = 128
    V: int = 11
    P: int = 1
    layers: int = 4
    H_cycles: int = 2
    L_cycles: int = 2
    expansion: float = 4.0
    dtype: torch.dtype = torch.bfloat16

    @property
    def tokens(self) -> int:
        return self.B * self.T

    @property
    def cells(self) -> int:
        return self.B * (self.T - self.P)

    @property
    def inner(self) -> int:
        return swiglu_width(self.D, self.expansion)

    @property
    def head_dim(self) -> int:
        return self.D // self.heads

    @property
    def block_weights(self) -> int:
        return 4 * self.D**2 + 3 * self.D * self.inner

    def parameters(self, gated: bool = False) -> int:
        heads = 2 * self.V * self.D + 2 * self.D + 2
        gates = 2 * (6 * self.D * self.R + self.R + 3 * self.D) if gated else 0
        return 2 * self.layers * self.block_weights + heads + gates


@dataclass(frozen=True)
class Work:
    """The work of launches: bytes, FLOP of matrix products, number of launches."""

    bytes: int
    flop: int = 0
    launches: int = 1


# ------------------------------------------------------------------------------- operations, by direction
# Each counts what its own fused kernel must do: inputs read once, outputs written once. A backward reads the
# saved tensors and the upstream gradient. FLOP include specified recomputation.


def product(s: Shape, inner: int, outer: int) -> dict[str, Work]:
    """A linear layer (tokens, inner) to (tokens, outer); backward: its input's and its weight's gradient."""
    x, y, w = s.tokens * inner, s.tokens * outer, inner * outer
    flop, item = 2 * s.tokens * inner * outer, s.dtype.itemsize
    return {
        "forward": Work((x + y + w) * item, flop),
        "backward": Work(2 * (x + y + w) * item, 2 * flop, launches=2),
    }


def rms_norm(s: Shape) -> dict[str, Work]:
    moved = 3 * s.tokens * s.D * s.dtype.itemsize + 4 * s.tokens
    return {"forward": Work(moved), "backward": Work(moved)}


def swiglu(s: Shape) -> dict[str, Work]:
    one = s.tokens * s.inner * s.dtype.itemsize
    return {"forward": Work(3 * one), "backward": Work(5 * one)}


def mean_square(s: Shape) -> int:
    """Bytes of a deferred norm's parts: one float32 per 256 columns of a row."""
    return 4 * s.tokens * -(-s.D // 256)


def linear_scaled(s: Shape) -> dict[str, Work]:
    """The projection to q, k and v, with a deferred norm."""
    plain = product(s, s.D, 3 * s.D)["forward"]
    return {"forward": Work(plain.bytes + mean_square(s), plain.flop)}


def linear_swiglu(s: Shape) -> dict[str, Work]:
    """The projection to gate and up; only their product is written."""
    elements = s.tokens * (s.D + s.inner) + 2 * s.D * s.inner
    flop = 2 * s.tokens * s.D * 2 * s.inner
    return {"forward": Work(elements * s.dtype.itemsize + mean_square(s), flop)}


def swiglu_mlp_launches(s: Shape) -> dict[str, tuple[Work, ...]]:
    """The second half of a block with gradient: the work of this project's kernel, then of the library's
    products."""
    one = s.tokens * s.inner * s.dtype.itemsize
    plain, first, second = linear_swiglu(s)["forward"], product(s, s.D, 2 * s.inner), product(s, s.inner, s.D)
    down = second["forward"]
    return {
        # Gate and up are written as well, and no norm is deferred.
        "forward": (Work(plain.bytes - mean_square(s) + 2 * one, plain.flop), down),
        # The gradient of y is never stored: instead gate and up are read and their gradients written.
        "backward": (Work(down.bytes + 3 * one, down.flop), down, first["backward"]),
    }


def _summed(launches: dict[str, tuple[Work, ...]]) -> dict[str, Work]:
    return {
        direction: Work(
            sum(work.bytes for work in works),
            sum(work.flop for work in works),
            sum(work.launches for work in works),
        )
        for direction, works in launches.items()
    }


def swiglu_mlp(s: Shape) -> dict[str, Work]:
    return _summed(swiglu_mlp_launches(s))


def normed_swiglu_mlp(s: Shape) -> dict[str, Work]:
    return _summed(normed_swiglu_mlp_launches(s))


def normed_swiglu_mlp_launches(s: Shape) -> dict[str, tuple[Work, ...]]:
    """The feed-forward half with an inner norm; the library's products are the last ones of the backward."""
    parts, sums = 4 * s.tokens * -(-2 * s.inner // 256), 4 * s.tokens
    (activated, down), (dy, *products) = swiglu_mlp_launches(s).values()
    return {
        "forward": (
            Work(activated.bytes + parts, activated.flop),
            Work(down.bytes + parts, down.flop),
        ),
        # r * dout and the slope are computed in a separate pass.
        "backward": (
            Work(3 * s.tokens * s.D * s.dtype.itemsize + parts + sums),
            Work(dy.bytes + sums, dy.flop),
            *products,
        ),
    }


def conv_swiglu(s: Shape) -> dict[str, Work]:
    """SwiGLU and two taps over the tokens; a weight's gradient is summed on the chip."""
    return swiglu(s)


def linear_rms(s: Shape, inner: int | None = None) -> dict[str, Work]:
    """A projection back to D (SwiGLU's by default), with the residual sum and the mean square of its rows."""
    plain = product(s, s.inner if inner is None else inner, s.D)["forward"]
    residual = s.tokens * s.D * s.dtype.itemsize
    return {"forward": Work(plain.bytes + residual + 2 * mean_square(s), plain.flop)}


def gate_mix(s: Shape, sources: int = 3) -> dict[str, Work]:
    one, item = s.tokens * s.D, s.dtype.itemsize
    weights = 2 * s.R * sources * s.D + s.R + sources * s.D
    flop = 4 * s.tokens * s.R * sources * s.D
    return {
        "forward": Work(((sources + 1) * one + weights) * item, flop),
        # Sources and dy are read and a gradient per source is written; hidden and gates are recomputed.
        "backward": Work(((2 * sources + 1) * one + 2 * weights) * item, 3 * flop, launches=2),
    }


def gate_mix_two(s: Shape) -> dict[str, Work]:
    return gate_mix(s, sources=2)


def _tables(s: Shape) -> int:
    return 2 * 4 * s.T * s.head_dim


def rope(s: Shape) -> dict[str, Work]:
    """Queries and keys of every head."""
    moved = 4 * s.tokens * s.D * s.dtype.itemsize + _tables(s)
    return {"forward": Work(moved), "backward": Work(moved)}


def attention(s: Shape, queries: int | None = None) -> dict[str, Work]:
    """The rotation and both products of every head; backward five products, because scores are recomputed."""
    asked, one, item = s.B * (queries or s.T) * s.D, s.tokens * s.D, s.dtype.itemsize
    flop = 4 * asked * s.T
    return {
        "forward": Work((2 * one + 2 * asked) * item + _tables(s), flop),
        # qkv and do are read, dqkv is written.
        "backward": Work((6 * one + asked) * item + _tables(s), 5 * flop // 2),
    }


def library_attention(s: Shape, queries: int | None = None) -> dict[str, Work]:
    """Attention of PyTorch or flash-attn, of rotated queries and keys; o and one sum per row are kept."""
    asked, one, item = s.B * (queries or s.T) * s.D, s.tokens * s.D, s.dtype.itemsize
    flop, sums = 4 * asked * s.T, 4 * asked // s.head_dim
    return {
        "forward": Work((2 * one + 2 * asked) * item + sums, flop),
        # q, k, v, o and do are read, dq, dk and dv are written.
        "backward": Work((4 * one + 4 * asked) * item + sums, 5 * flop // 2),
    }


def cross_entropy(s: Shape) -> dict[str, Work]:
    """Either loss; labels and losses have 4 bytes per cell."""
    logits = s.cells * s.V * s.dtype.itemsize
    return {"forward": Work(logits + 8 * s.cells), "backward": Work(2 * logits + 8 * s.cells)}


def lm_head(s: Shape) -> dict[str, Work]:
    """Either loss from the states; the logits stay on chip and are recomputed in the backward."""
    z, w, flop = s.cells * s.D, s.V * s.D, 2 * s.cells * s.D * s.V
    item = s.dtype.itemsize
    return {
        "forward": Work((z + w) * item + 8 * s.cells, flop),
        "backward": Work(2 * (z + w) * item + 4 * s.cells, 3 * flop),
    }


def noisy_update(s: Shape) -> dict[str, Work]:
    """A module's result and previous state are read, its new state is written; keys and steps in int32."""
    return {"forward": Work(3 * s.tokens * s.D * s.dtype.itemsize + 16 * s.B)}


def random_start(s: Shape) -> dict[str, Work]:
    """The states are read and written, and each sequence's key and start flag are read."""
    return {"forward": Work(2 * s.tokens * s.D * s.dtype.itemsize + 13 * s.B)}


def adam_atan2(s: Shape, gated: bool = False) -> dict[str, Work]:
    """AdamATan2 or AdamW in float32: p, m, v read and written, g read, p's narrow copy written."""
    copy = s.dtype.itemsize if s.dtype.itemsize < 4 else 0
    return {"update": Work((28 + copy) * s.parameters(gated))}


def muon(s: Shape, steps: int = 3) -> dict[str, Work]:
    """The gate and up weights of all blocks: momentum, norms, the products of each step, the update.

    A step multiplies x x^T, its square and the polynomial with x: x is read twice and written, and each of
    the two square matrices written and read.
    """
    rows, columns, matrices, item = 2 * s.inner, s.D, 2 * s.layers, s.dtype.itemsize
    size, short = rows * columns, min(rows, columns)
    elementwise = 20 + 2 * item + (item if item < 4 else 0)
    products = item * (3 * size + 4 * short**2)
    flop = 4 * short * size + 2 * short**3
    moved = matrices * (elementwise * size + 3 * item * size + steps * products)
    return {"update": Work(moved, matrices * steps * flop, launches=5 + 3 * steps)}


def sign_sgd(s: Shape) -> dict[str, Work]:
    """The batch's rows of the table are read and written, their gradients are read."""
    return {"update": Work(s.B * s.P * s.D * 12 + 4 * s.B)}


OPERATIONS: dict[str, Callable[[Shape], dict[str, Work]]] = {
    "rms_norm": rms_norm,
    "swiglu": swiglu,
    "linear_scaled": linear_scaled,
    "linear_swiglu": linear_swiglu,
    "swiglu_mlp": swiglu_mlp,
    "normed_swiglu_mlp": normed_swiglu_mlp,
    "conv_swiglu": conv_swiglu,
    "linear_rms": linear_rms,
    "gate_mix": gate_mix,
    "gate_mix_two": gate_mix_two,
    "rope": rope,
    "attention": attention,
    "stablemax_cross_entropy": cross_entropy,
    "softmax_cross_entropy": cross_entropy,
    "lm_head_stablemax": lm_head,
    "lm_head_softmax": lm_head,
    "noisy_update": noisy_update,
    "random_start": random_start,
    "adam_atan2": adam_atan2,
    "adamw": adam_atan2,
    "muon": muon,
    "sign_sgd": sign_sgd,
}


# ---------------------------------------------------------------------- what PyTorch moves without a compiler


class Traffic(TorchDispatchMode):
    """Records the bytes and FLOP of each ATen call that launches a kernel."""

    FREE = ("aten::_unsafe_view", "aten::empty_like", "aten::empty", "aten::new_empty", "aten::detach")

    def __init__(self) -> None:
        super().__init__()
        self.works: list[Work] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func.name().split(".")[0] not in self.FREE:
            tensors = [*tensors_in((args, kwargs or {})), *tensors_in(out)]
            flop = (
                flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
                if (func.overloadpacket in flop_registry)
                else 0
            )
            self.works.append(Work(sum(map(stored, tensors)), flop))
        return out


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def stored(tensor: Tensor) -> int:
    """Bytes of a tensor's stored elements: an expanded dimension counts as one."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.dtype.itemsize


def traced(call: Callable[..., Any], *inputs: Tensor) -> dict[str, list[Work]]:
    """Every kernel that PyTorch launches for a call of this package's references, forward and backward.

    inputs: tensors on the meta device; gradients are computed for those that require them.
    """
    before = kernels.get_backend()
    kernels.set_backend("reference")
    try:
        with Traffic() as forward:
            out = call(*inputs)
        outputs, wanted = tensors_in(out), [tensor for tensor in inputs if tensor.requires_grad]
        if not wanted:
            return {"forward": forward.works}
        upstream = [torch.empty_like(output) for output in outputs]
        with Traffic() as backward:
            torch.autograd.grad(outputs, wanted, upstream)
    finally:
        kernels.set_backend(before)
    return {"forward": forward.works, "backward": backward.works}


def meta(*shape: int, dtype: torch.dtype, gradient: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=gradient)


@cache
def eager(op: str, s: Shape) -> dict[str, list[Work]]:
    """The launches of an operation's reference in eager PyTorch, whose attention is one kernel."""
    M, D, dtype = s.tokens, s.D, s.dtype
    x = meta(M, D, dtype=dtype, gradient=True)
    if op == "rms_norm":
        return traced(kernels.rms_norm, x, x.detach().requires_grad_())
    if op == "swiglu":
        return traced(kernels.swiglu, meta(M, 2 * s.inner, dtype=dtype, gradient=True))
    if op == "conv_swiglu":
        taps = meta(s.inner, 2, dtype=dtype, gradient=True), meta(s.inner, dtype=dtype, gradient=True)
        gate_up = meta(s.B, s.T, 2 * s.inner, dtype=dtype, gradient=True)
        return traced(kernels.conv_swiglu, gate_up, *taps)
    if op in ("noisy_update", "random_start"):
        z, keys = meta(s.B, s.T, D, dtype=dtype), meta(s.B, 3, dtype=torch.int32)
        if op == "noisy_update":
            steps = meta(s.B, dtype=torch.int32)
            noisy = partial(kernels.noisy_update, damping=0.95, noise=0.01, keys=keys, steps=steps)
            return traced(noisy, z, z)
        begins, init = meta(s.B, dtype=torch.bool), meta(D, dtype=torch.float32)
        return traced(lambda z: kernels.random_start(z, begins, init, keys, 0), z)
    if op.startswith("gate_mix"):
        shapes = ((s.R, 3 * D), (s.R,), (3 * D, s.R), (3 * D,))
        weights = [meta(*shape, dtype=dtype, gradient=True) for shape in shapes]
        two = op == "gate_mix_two"
        sources = [x.detach().requires_grad_() for _ in range(2 if two else 3)]
        if two:
            return traced(lambda z, o, *w: kernels.gate_mix(z, o, None, *w), *sources, *weights)
        return traced(kernels.gate_mix, *sources, *weights)
    cos, sin = (meta(s.T, s.head_dim, dtype=torch.float32) for _ in range(2))
    if op == "rope":
        heads = meta(s.B, s.T, 2 * s.heads, s.head_dim, dtype=dtype, gradient=True)
        return traced(lambda x: kernels.rope(x, cos, sin), heads)
    if op == "attention":

        def rotated(qkv: Tensor) -> tuple[Tensor, ...]:
            heads = qkv.view(s.B, s.T, 3 * s.heads, s.head_dim)
            q, k = kernels.rope(heads[:, :, : 2 * s.heads], cos, sin).chunk(2, dim=2)
            return q, k, heads[:, :, 2 * s.heads :]

        split = traced(rotated, meta(s.B, s.T, 3 * D, dtype=dtype, gradient=True))
        return {direction: [*works, library_attention(s)[direction]] for direction, works in split.items()}
    if op.endswith("cross_entropy"):
        labels = meta(s.cells, dtype=torch.int32)
        logits = meta(s.cells, s.V, dtype=dtype, gradient=True)
        return traced(lambda x: getattr(kernels, op)(x, labels), logits)
    if op.startswith("lm_head"):
        loss, head = eager(op.replace("lm_head_", "") + "_cross_entropy", s), product(s, D, s.V)
        return {direction: [head[direction], *works] for direction, works in loss.items()}
    raise KeyError(op)
