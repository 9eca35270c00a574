"""The launches of every kernel at the shapes of the published model.

The launchers are called with meta tensors, so no GPU is needed: `kernels.backend.recorded` collects the
launches.
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hrm.model.layers import swiglu_width

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
}
# The published model: hidden size, heads, batch; for Sudoku and ARC, length with the puzzle token, and
# vocabulary.
D, HEADS, B = 512, 8, 768
VOCABULARY = {82: 11, 901: 12}


class Case(NamedTuple):
    """A call of launchers with meta tensors. matrix: its kernels multiply matrices in 16 bits."""

    op: str
    label: str
    call: Callable[[], object]
    matrix: bool


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def rms_norm(T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.rms_norm")
    for dtype in (torch.bfloat16, torch.float32):
        x = meta(B, T, D, dtype=dtype)
        rstd = meta(B, T, dtype=torch.float32)
        yield Case("rms_norm", f"forward {TYPES[dtype]}", partial(op._forward, x, x, 1e-5), False)
        for label, dy_residual in (("backward", None), ("backward of a pair", x)):
            call = partial(op._backward, x, dy_residual, x, rstd)
            yield Case("rms_norm", f"{label} {TYPES[dtype]}", call, False)


def rope(T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.rope")
    tables = [meta(T, D // HEADS, dtype=torch.float32)] * 2
    # Queries and keys as views of packed projections; their gradient is contiguous.
    qk = meta(B, T, 3 * HEADS, D // HEADS)[:, :, : 2 * HEADS]
    dy = meta(B, T, 2 * HEADS, D // HEADS)
    yield Case("rope", "forward bf16", partial(op._rotated, qk, *tables, False), False)
    yield Case("rope", "backward bf16", partial(op._rotated, dy, *tables, True), False)


def attention(T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.attention")
    if T > op.MAX_LENGTH:
        return
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        qkv, matrix, name = meta(B, T, 3 * D, dtype=dtype), dtype.itemsize == 2, TYPES[dtype]
        tables = [meta(T, D // HEADS, dtype=torch.float32)] * 2
        dy = meta(B, T, D, dtype=dtype)
        yield Case("attention", f"forward {name}", partial(op._forward, qkv, HEADS, *tables, T), matrix)
        yield Case("attention", f"one query {name}", partial(op._forward, qkv, HEADS, *tables, 1), matrix)
        yield Case("attention", f"backward {name}", partial(op._backward, dy, qkv, HEADS, *tables), matrix)


def cross_entropy(T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.stablemax")
    tokens, labels = meta(B, T - 1, dtype=torch.float32), meta(B, T - 1, dtype=torch.int32)
    for vocabulary, dtype, stablemax in (
        (11, torch.bfloat16, True),
        (11, torch.float32, True),
        (11, torch.bfloat16, False),
        (op.MAX_VOCABULARY, torch.float32, True),
        (op.MAX_VOCABULARY, torch.float32, False),
    ):
        logits = meta(B, T - 1, vocabulary, dtype=dtype)
        name = f"{'stablemax' if stablemax else 'softmax'} {vocabulary} {TYPES[dtype]}"
        forward = partial(op._forward, logits, labels, -100, stablemax, 0.0)
        backward = partial(op._backward, tokens, logits, labels, -100, stablemax, 0.0)
        yield Case("cross_entropy", f"forward {name}", forward, False)
        yield Case("cross_entropy", f"backward {name}", backward, False)


# The inner width of the published model's SwiGLU.
INNER = 1536


def swiglu(T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.swiglu")
    for dtype in (torch.bfloat16, torch.float32):
        gate_up, dy = meta(B, T, 2 * INNER, dtype=dtype), meta(B, T, INNER, dtype=dtype)
        yield Case("swiglu", f"forward {TYPES[dtype]}", partial(op._forward, gate_up), False)
        yield Case("swiglu", f"backward {TYPES[dtype]}", partial(op._backward, dy, gate_up), False)


def linear_swiglu(T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.linear_swiglu")
    mean_square = meta(B, T, 2, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = meta(B, T, D, dtype=dtype), meta(2 * INNER, D, dtype=dtype)
        matrix = dtype == torch.bfloat16
        for label, factor, packed in (
            ("plain", None, False),
            ("scaled", mean_square, False),
            ("with gradient", None, True),
        ):
            call = partial(op._forward, x, weight, factor, packed=packed)
            yield Case("linear_swiglu", f"{label} {TYPES[dtype]}", call, matrix)


def swiglu_mlp(T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.swiglu_mlp")
    for dtype in (torch.bfloat16, torch.float32):
        dout, gate_up = meta(B, T, D, dtype=dtype), meta(B, T, 2 * INNER, dtype=dtype)
        call = partial(op.activation_gradient, dout, meta(D, INNER, dtype=dtype), gate_up)
        yield Case("swiglu_mlp", f"backward {TYPES[dtype]}", call, dtype == torch.bfloat16)


def normed_swiglu_mlp(T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.normed_swiglu_mlp")
    for place, rows, width, inner, dtype in (
        ("channels", (B, T), D, INNER, torch.bfloat16),
        ("channels", (B, T), D, INNER, torch.float32),
        # A product over the tokens for every channel.
        ("tokens", (B, D), T, swiglu_width(T, 4.0), torch.bfloat16),
    ):
        name, matrix = f"{place} {TYPES[dtype]}", dtype == torch.bfloat16
        x, gate_up = (meta(*rows, size, dtype=dtype) for size in (width, 2 * inner))
        weights = meta(2 * inner, width, dtype=dtype), meta(width, inner, dtype=dtype)
        parts, slope = op._parts(x, inner), meta(rows[0] * rows[1], dtype=torch.float32)
        forward = partial(op._forward, x, *weights, 1e-5)
        taught = partial(op._activate, x, weights[0], 1e-5, packed=True)
        backward = partial(op.activation_gradient, x, weights[1], gate_up, slope)
        yield Case("normed_swiglu_mlp", f"forward, {name}", forward, matrix)
        yield Case("normed_swiglu_mlp", f"with gradient, {name}", taught, matrix)
        yield Case("normed_swiglu_mlp", f"scale, {name}", partial(op._scale, x, x, parts, inner), False)
        yield Case("normed_swiglu_mlp", f"backward, {name}", backward, matrix)


def conv_swiglu(T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.conv_swiglu")
    for dtype in (torch.bfloat16, torch.float32):
        gate_up, dy = meta(B, T, 2 * INNER, dtype=dtype), meta(B, T, INNER, dtype=dtype)
        taps = meta(INNER, 2, dtype=dtype), meta(INNER, dtype=dtype)
        yield Case("conv_swiglu", f"forward {TYPES[dtype]}", partial(op._forward, gate_up, *taps), False)
        yield Case(
            "conv_swiglu", f"backward {TYPES[dtype]}", partial(op._backward, dy, gate_up, *taps), False
        )


def linear_rms(T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.linear_rms")
    mean_square = meta(B, T, 2, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        x, y = meta(B, T, D, dtype=dtype), meta(B, T, INNER, dtype=dtype)
        out, down, qkv = (meta(*shape, dtype=dtype) for shape in ((D, D), (D, INNER), (3 * D, D)))
        kind, matrix = TYPES[dtype], dtype == torch.bfloat16
        yield Case("linear_rms", f"out {kind}", partial(op._sum, x, out, x, None, 1e-5), matrix)
        yield Case("linear_rms", f"down {kind}", partial(op._sum, y, down, x, mean_square, 1e-5), matrix)
        yield Case("linear_rms", f"qkv {kind}", partial(op.scaled_product, x, qkv, mean_square), matrix)


# Number of the published model's parameters, including alignment gaps, rounded up to a multiple of 16.
PARAMETERS = 27_275_280


def adam_atan2(_T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.adam_atan2")
    buffers = [meta(PARAMETERS, dtype=torch.float32)] * 4
    lr, step = meta(1, dtype=torch.float32)[0], meta(1, dtype=torch.int64)[0]
    scalars, skip = (lr, step, 0.9, 0.95, 0.1), meta(1, dtype=torch.bool)[0]
    for label, copy in (("update", None), ("update and bf16 copy", meta(PARAMETERS))):
        yield Case("adam_atan2", label, partial(op._update, *buffers, *scalars, copy, skip), False)
    yield Case("adamw", label, partial(op._update, *buffers, *scalars, copy, skip, False), False)


def muon(_T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.muon")
    wide, narrow = meta(PARAMETERS, dtype=torch.float32), meta(PARAMETERS)
    lr, skip = meta(1, dtype=torch.float32)[0], meta(1, dtype=torch.bool)[0]
    yield Case("muon", "momentum", partial(op._launch_momentum, wide, wide, narrow, 0.6, skip), False)
    update = partial(op._launch_update, wide, narrow, lr, 2.0, 5e-3, narrow, skip)
    yield Case("muon", "update and bf16 copy", update, False)


def sign_sgd(_T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.sign_sgd")
    table, grad = meta(1_000_000, D, dtype=torch.float32), meta(B, D, dtype=torch.float32)
    identifiers, lr = meta(B, dtype=torch.int32), meta(1, dtype=torch.float32)[0]
    skip = meta(1, dtype=torch.bool)[0]
    yield Case("sign_sgd", "update", partial(op._update, table, identifiers, grad, lr, 0.1, skip), False)


def gate_mix(T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.gate_mix")
    for dtype, R in ((torch.bfloat16, D // 4), (torch.bfloat16, op.MAX_HIDDEN), (torch.float32, D // 4)):
        s = meta(B, T, D, dtype=dtype)
        w1, b1 = meta(R, 3 * D, dtype=dtype), meta(R, dtype=dtype)
        w2, b2 = meta(3 * D, R, dtype=dtype), meta(3 * D, dtype=dtype)
        published = R == D // 4 and dtype == torch.bfloat16
        # Only x of L and the secondary state of H require a gradient.
        for x, wanted in ((s, "x"), (None, "o"), (s, "zox")) if published else ((s, "zox"),):
            inputs = (s, s, x, w1, b1, w2, b2)
            needs = [name in wanted for name in "zox"] + [True] * 4
            calls = {f"backward d{wanted}": partial(op._backward, s, *inputs, needs)}
            if wanted != "zox" or not published:
                calls["forward"] = partial(op._forward, *inputs)
            for label, call in calls.items():
                name = f"{label}, {'z, o' if x is None else 'z, o, x'}, R={R} {TYPES[dtype]}"
                yield Case("gate_mix", name, call, dtype == torch.bfloat16)


def lm_head(T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.lm_head")
    dloss, valid_count = meta(B, dtype=torch.float32), meta(B, dtype=torch.int32)
    labels = meta(B, T - 1, dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float32):
        # The head reads the cells after the puzzle token.
        z_H, weight = meta(B, T, D, dtype=dtype)[:, 1:], meta(VOCABULARY[T], D, dtype=dtype)
        bias = meta(VOCABULARY[T], dtype=dtype)
        for loss, stablemax, added, smoothing in (
            ("stablemax", True, None, 0.0),
            ("softmax", False, None, 0.0),
            ("softmax with bias, smoothed", False, bias, 0.2),
        ):
            label, matrix = f"{loss} {TYPES[dtype]}", dtype == torch.bfloat16
            inputs, chosen = (z_H, weight, added, labels), (-100, stablemax, smoothing)
            call = partial(op._forward, *inputs, *chosen)
            yield Case("lm_head", f"forward {label}", call, matrix)
            call = partial(op._backward, dloss, *inputs, valid_count, *chosen, True, True)
            yield Case("lm_head", f"backward {label}", call, matrix)


def noise(T: int) -> Iterator[Case]:
    op: Any = import_module("kernels.noise")
    keys, steps = meta(B, op.KEY_WORDS, dtype=torch.int32), meta(B, dtype=torch.int32)
    begins, init = meta(B, dtype=torch.bool), meta(D, dtype=torch.float32)
    z, rstd = meta(B, T, D), meta(B, T, dtype=torch.float32)
    for label, factor, given, deviation in (
        ("noise and damping", None, (keys, steps), 0.01),
        ("noise and damping of a deferred norm", rstd, (keys, steps), 0.01),
        ("damping", None, (None, None), 0.0),
    ):
        call = partial(op._update, z, factor, z, *given, 3, 0.95, deviation)
        yield Case("noisy_update", f"{label} bf16", call, False)
    yield Case("random_start", "bf16", partial(op._start, z, begins, init, keys, 1), False)


# Each yields the launches of one file of kernels/ at a length.
LAUNCHES = (
    rms_norm,
    rope,
    attention,
    cross_entropy,
    swiglu,
    linear_swiglu,
    swiglu_mlp,
    normed_swiglu_mlp,
    conv_swiglu,
    linear_rms,
    adam_atan2,
    muon,
    sign_sgd,
    gate_mix,
    lm_head,
    noise,
)


def cases() -> dict[tuple[str, str], dict[int, Case]]:
    """Every case by operation and label, at each of its lengths."""
    found: dict[tuple[str, str], dict[int, Case]] = {}
    for T in VOCABULARY:
        for family in LAUNCHES:
            for case in family(T):
                found.setdefault((case.op, case.label), {})[T] = case
    return found
