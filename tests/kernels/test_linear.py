"""The fused products against their references, and blocks in deferred form against those with norms."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import backend, matmul, rms_norm, swiglu
from kernels.checks import accumulate_dtype
from kernels.library_attention import attention_reference
from kernels.linear_rms import linear_rms, linear_scaled
from kernels.linear_swiglu import linear_swiglu
from kernels.matmul import launch_choice, rstd_of
from kernels.normed_swiglu_mlp import normed_swiglu_mlp
from kernels.swiglu_mlp import swiglu_mlp
from tests.kernels.compare import DEVICE, DTYPES, agree, agree_in_every_tile, compiles, in_dtypes, randn

# Rows, K, and half of the weight's rows: SwiGLU's width.
SHAPES = [((1,), 64, 40), ((17,), 100, 96), ((2, 41), 96, 256), ((70,), 256, 96)]
CASES = in_dtypes(SHAPES)


def tensors(rows: tuple[int, ...], K: int, N: int) -> dict[str, Tensor]:
    """Inputs whose products have unit variance."""
    return {
        "x": randn(*rows, K, seed=K),
        "weight": randn(N, K, seed=N, scale=K**-0.5),
        "mean_square": randn(*rows, 3, seed=7).abs() + 0.2,
    }


def with_residual(rows: tuple[int, ...], K: int, N: int) -> dict[str, Tensor]:
    return {**tensors(rows, K, N), "residual": randn(*rows, N, seed=N + 1)}


def parts(x: Tensor, mean_square: Tensor | None) -> Tensor | None:
    """As the operations take them: in the dtype of sums, whatever the others have."""
    return None if mean_square is None else mean_square.to(accumulate_dtype(x.dtype))


def call_swiglu(x, weight, mean_square=None):
    return linear_swiglu(x, weight, parts(x, mean_square))


def call_scaled(x, weight, mean_square):
    return linear_scaled(x, weight, parts(x, mean_square))


def call_rms(x, weight, residual, mean_square=None, eps=1e-5):
    # Kernel and reference leave their mean squares in different numbers of parts.
    h, left = linear_rms(x, weight, residual, parts(x, mean_square), eps)
    return h, rstd_of(left)


def without(inputs: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in inputs.items() if key != name}


CALLS = [(call_swiglu, tensors), (call_scaled, tensors), (call_rms, with_residual)]


@pytest.mark.parametrize(("call", "make"), CALLS)
def test_every_tile_that_a_measurement_may_choose(call, make):
    inputs = make((130,), 144, 288)
    assert agree_in_every_tile(call, inputs, torch.bfloat16, gradients=()) == 4


@pytest.mark.parametrize(("shape", "dtype"), CASES)
@pytest.mark.parametrize(("call", "make"), CALLS)
def test_outputs(call, make, shape, dtype):
    rows, K, width = shape
    inputs = make(rows, K, 2 * width)
    agree(call, inputs, dtype, gradients=[])
    if call is not call_scaled:
        agree(call, without(inputs, "mean_square"), dtype, gradients=[])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("call", "make"), CALLS)
def test_gradients_only_if_required(call, make, dtype):
    agree(call, make((2, 17), 96, 80), dtype)
    agree(call, make((17,), 64, 80), dtype, gradients=["weight"])


def feed_forward(rows: tuple[int, ...], K: int, width: int) -> dict[str, Tensor]:
    x, weight = (tensors(rows, K, 2 * width)[name] for name in ("x", "weight"))
    return {"x": x, "gate_up_weight": weight, "down_weight": tensors(rows, width, K)["weight"]}


# float16 has no normed kernel.
FEED_FORWARDS = [(swiglu_mlp, dtype) for dtype in DTYPES]
FEED_FORWARDS += [(normed_swiglu_mlp, dtype) for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(
    ("shape", "dtype", "call"),
    [(*case, call) for case in CASES for call, dtype in FEED_FORWARDS if dtype == case[1]],
)
def test_a_feed_forward_with_its_gradients(shape, call, dtype):
    agree(call, feed_forward(*shape), dtype)


@pytest.mark.parametrize(("call", "dtype"), FEED_FORWARDS)
def test_a_feed_forward_with_the_gradients_that_are_wanted(call, dtype):
    inputs = feed_forward((17,), 40, 24)
    for names in (*([name] for name in inputs), []):
        agree(call, inputs, dtype, gradients=names)


def test_every_tile_of_a_feed_forward():
    """Four of the first product, three of the backward's, and with the norm four of the second."""
    inputs = feed_forward((130,), 144, 144)
    assert agree_in_every_tile(swiglu_mlp, inputs, torch.bfloat16) == 7
    assert agree_in_every_tile(normed_swiglu_mlp, inputs, torch.bfloat16) == 11


@settings(max_examples=8, deadline=None)
@given(M=st.integers(1, 150), K=st.integers(1, 150), inner=st.integers(1, 150))
def test_a_feed_forward_of_any_shape(M, K, inner):
    for call in (swiglu_mlp, normed_swiglu_mlp):
        agree(call, feed_forward((M,), K, inner), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_feed_forward_of_views(dtype):
    inputs = feed_forward((6, 5), 96, 80)
    turned = {name: tensor.transpose(0, 1).contiguous().transpose(0, 1) for name, tensor in inputs.items()}
    for call in (swiglu_mlp, normed_swiglu_mlp):
        agree(call, turned, dtype)
        expanded = torch.zeros((), dtype=dtype, device=DEVICE, requires_grad=True)
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs.values()]
        # The gradient of a sum has strides of 0.
        (call(*leaves) + expanded).sum().backward()
        assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


def test_a_norm_inside_swiglu_equals_its_formula():
    x, gate_up_weight, down_weight = feed_forward((7,), 6, 5).values()
    gate, up = (x @ gate_up_weight.T).chunk(2, dim=-1)
    normed = F.rms_norm(gate * up, (5,), eps=1e-2)
    expected = (torch.sigmoid(gate) * normed) @ down_weight.T
    for backend_name in ("triton", "reference"):
        backend.set_backend(backend_name)
        actual = normed_swiglu_mlp(x, gate_up_weight, down_weight, 1e-2)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_float16_has_no_room_for_a_product_before_its_norm():
    inputs = [tensor.half() * 100 for tensor in feed_forward((3,), 16, 16).values()]
    with pytest.raises(backend.BackendError, match="may overflow in float16 before the norm"):
        normed_swiglu_mlp(*inputs)
    backend.set_backend("auto")
    assert torch.isfinite(normed_swiglu_mlp(*inputs)).all()


@settings(max_examples=8, deadline=None)
@given(M=st.integers(1, 150), K=st.integers(1, 150), N=st.integers(1, 150), eps=st.sampled_from([1e-6, 1e-2]))
def test_any_shape(M, K, N, eps):
    agree(call_swiglu, tensors((M,), K, 2 * N), torch.float64, gradients=[])
    agree(call_scaled, tensors((M,), K, N), torch.float64, gradients=[])
    inputs = with_residual((M,), K, N)
    agree(lambda **tensors: call_rms(**tensors, eps=eps), inputs, torch.float64, gradients=[])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_strided_inputs(dtype):
    """Views into wider tensors that hold NaN everywhere else."""

    def inside(tensor: Tensor, *before: int) -> Tensor:
        wide = torch.full([size + 2 * pad for size, pad in zip(tensor.shape, before, strict=True)], torch.nan)
        view = wide.to(tensor).to(dtype)[tuple(slice(pad, -pad or None) for pad in before)]
        return view.copy_(tensor)

    inputs = with_residual((85,), 100, 80)
    views = {
        "x": inside(inputs["x"], 2, 5),
        "weight": inside(inputs["weight"], 1, 3),
        "residual": inside(inputs["residual"], 1, 7),
        "mean_square": inside(inputs["mean_square"], 1, 2),
    }
    agree(call_rms, views, dtype, gradients=[])
    agree(call_swiglu, without(views, "residual"), dtype, gradients=[])
    agree(call_scaled, without(views, "residual"), dtype, gradients=[])
    turned = with_residual((7, 5), 40, 64) | {
        "x": randn(40, 5, 7, seed=0).to(dtype).permute(2, 1, 0),
        "weight": randn(40, 64, seed=1, scale=0.2).to(dtype).t(),
        "residual": randn(5, 7, 64, seed=2).to(dtype).transpose(0, 1),
        "mean_square": (randn(2, 5, 7, seed=3).abs() + 0.2).to(dtype).permute(2, 1, 0),
    }
    agree(call_rms, turned, dtype, gradients=[])
    agree(call_swiglu, without(turned, "residual"), dtype, gradients=[])


@pytest.mark.filterwarnings("ignore:overflow")  # numpy tells of the exponential that becomes infinite.
@torch.no_grad()
def test_large_gates_stay_finite():
    x = torch.tensor([[-1e4], [-89.0], [0.0], [1e4]], device=DEVICE)
    weight = torch.tensor([[1.0], [0.5]], device=DEVICE)
    torch.testing.assert_close(linear_swiglu(x, weight), F.silu(x) * (0.5 * x), rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------- whole blocks


def normed_block(x, qkv, out, gate_up, down, heads):
    x = rms_norm(x, F.linear(attention_reference(F.linear(x, qkv), heads, None, None, None), out))
    return rms_norm(x, F.linear(swiglu(F.linear(x, gate_up)), down))


def deferred_block(h, mean_square, qkv, out, gate_up, down, heads):
    packed = F.linear(h, qkv) if mean_square is None else linear_scaled(h, qkv, mean_square)
    attended = attention_reference(packed, heads, None, None, None)
    h, mean_square = linear_rms(attended, out, h, mean_square)
    return linear_rms(linear_swiglu(h, gate_up, mean_square), down, h, mean_square)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_blocks_in_deferred_form_equal_those_with_norms(dtype, gradients):
    D, width, heads = 64, 96, 2
    shapes = {"qkv": (3 * D, D), "out": (D, D), "gate_up": (2 * width, D), "down": (D, width)}
    weights = {
        name: randn(*shape, seed=seed, scale=shape[1] ** -0.5)
        for seed, (name, shape) in enumerate(shapes.items())
    }

    # `agree` judges the deferred form under Triton by the form with norms under the reference.
    def blocks(x, **weights):
        if backend.get_backend() == "reference":
            return normed_block(normed_block(x, **weights, heads=heads), **weights, heads=heads)
        h, mean_square = deferred_block(x, None, **weights, heads=heads)
        h, mean_square = deferred_block(h, mean_square, **weights, heads=heads)
        return (h * rstd_of(mean_square)[..., None]).to(h.dtype)

    agree(blocks, {"x": randn(2, 17, D, seed=9), **weights}, dtype, gradients=None if gradients else [])


# ----------------------------------------------------------------------------------------------- contract


def test_one_kernel_unless_a_gradient_is_wanted(monkeypatch):
    x, weight = randn(4, 64, seed=0).bfloat16(), randn(32, 64, seed=1).bfloat16().requires_grad_()
    mean_square = torch.ones(4, 1, device=DEVICE)

    def kernels() -> list[str]:
        with backend.recorded() as launches:
            linear_swiglu(x, weight, mean_square)
            linear_scaled(x, weight, mean_square)
            linear_rms(x, weight, x[:, :32])
        return [launch.kernel.__name__.strip("_") for launch in launches]

    assert kernels() == ["swiglu_forward_kernel"]
    with torch.no_grad():
        assert kernels() == [
            "linear_swiglu_forward_kernel", "linear_scaled_forward_kernel",
            "linear_rms_forward_kernel",
        ]  # fmt: skip
        monkeypatch.setattr(matmul, "use_triton", lambda op, tensor, slower, **_: slower is None)
        backend.set_backend("auto")
        assert matmul.use_fused("linear_swiglu", x, weight, None)
        assert not matmul.use_fused("linear_swiglu", x.float(), weight.float(), None)


def halved(rows: tuple[int, ...], K: int, N: int) -> dict[str, Tensor]:
    return feed_forward(rows, K, N // 2)


@pytest.mark.parametrize(
    ("call", "make"), [*CALLS, *((op, halved) for op in (swiglu_mlp, normed_swiglu_mlp))]
)
def test_gradcheck(call, make):
    inputs = make((3,), 8, 6)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    function = lambda *args: call(**dict(zip(inputs, args, strict=True)))  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_operator_contract_and_compile():
    x, weight, mean_square, residual = (tensor.float() for tensor in with_residual((2, 5), 32, 24).values())
    ops = torch.ops.hrm_kernels
    torch.library.opcheck(ops.linear_swiglu.default, (x, weight, mean_square))
    torch.library.opcheck(ops.linear_swiglu.default, (x, weight, None))
    down = torch.randn(weight.shape[1], weight.shape[0] // 2, device=DEVICE).to(weight)
    learning = [tensor.clone().requires_grad_() for tensor in (x, weight, down)]
    torch.library.opcheck(ops.swiglu_mlp.default, learning)
    torch.library.opcheck(ops.normed_swiglu_mlp_with_gradient.default, (*learning, 1e-5))
    torch.library.opcheck(ops.normed_swiglu_mlp.default, (x, weight, down, 1e-5))
    for call in (swiglu_mlp, normed_swiglu_mlp):
        compiles(call, {"x": x, "gate_up_weight": weight, "down_weight": down})
    torch.library.opcheck(ops.linear_scaled.default, (x, weight, mean_square))
    torch.library.opcheck(ops.linear_rms.default, (x, weight, residual, mean_square, 1e-5))
    inputs = {"x": x, "weight": weight, "residual": residual, "mean_square": mean_square}
    for call, taken in ((call_swiglu, without(inputs, "residual")), (call_rms, inputs)):
        compiles(call, taken)
        with torch.no_grad():
            compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(**taken)
            torch.testing.assert_close(compiled, call(**taken), rtol=0, atol=0)


def test_wrong_arguments_are_named():
    x, weight, mean_square = (
        torch.zeros(3, 8, device=DEVICE),
        torch.zeros(6, 8, device=DEVICE),
        torch.zeros(3, 2),
    )
    mean_square = mean_square.to(DEVICE)
    with pytest.raises(ValueError, match=r"linear_swiglu: weight must have shape \(N, 8\), got \(6, 7\)"):
        linear_swiglu(x, weight[:, :7])
    with pytest.raises(ValueError, match=r"weight must have an even number of rows, got \(5, 8\)"):
        linear_swiglu(x, weight[:5])
    with pytest.raises(
        ValueError, match=r"linear_scaled: mean_square must have shape \(3, P\), got \(2, 2\)"
    ):
        linear_scaled(x, weight, mean_square[:2])
    with pytest.raises(
        TypeError, match=r"linear_rms: mean_square must be torch.float32 on .*, got torch.float64"
    ):
        linear_rms(x, weight, x[:, :6], mean_square.double())
    with pytest.raises(ValueError, match=r"linear_rms: residual must have shape \(3, 6\), got \(3, 8\)"):
        linear_rms(x, weight, x)
    with pytest.raises(TypeError, match=r"linear_rms: weight must match x"):
        linear_rms(x, weight.double(), x[:, :6])


def test_launches_fit_small_products_and_large():
    for dtype in (torch.bfloat16, torch.float32):
        for N, K in ((1, 1), (80, 96), (512, 100), (3072, 512)):
            choice = launch_choice(dtype, N, K)
            assert choice["EVEN_K"] == (K % choice["BLOCK_K"] == 0)
            for block, size in (("BLOCK_N", N), ("BLOCK_K", K)):
                assert 16 <= choice[block] < max(17, 2 * size)
    assert launch_choice(torch.bfloat16, 3072, 512)["BLOCK_N"] == 256
    assert launch_choice(torch.bfloat16, 3072, 100)["BLOCK_N"] == 64
