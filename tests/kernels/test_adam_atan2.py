"""AdamATan2's kernel against its reference, which float64 judges."""

import math
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hrm.engine.optim import ALIGNMENT
from kernels import adam_atan2, adamw, backend
from kernels.adam_atan2 import launch_choice
from kernels.fastest import ABSOLUTE
from tests.kernels.compare import DEVICE, distance, randn

# The interpreter's numpy warns of 0 / 0, which the kernel selects away, and of what is not finite on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

adam_atan2_module = import_module("kernels.adam_atan2")
BUFFERS = ("param", "grad", "exp_avg", "exp_avg_sq")


def state(N: int, seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    """The buffers of a run that has gone on for a while, in float32."""
    values = [randn(N, seed=10 * seed + i).float() for i in range(4)]
    buffers = dict(zip(BUFFERS, values, strict=True))
    return {**buffers, "grad": values[1] * scale, "exp_avg_sq": values[3].square()}


def scalar(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def steps(
    buffers: dict[str, Tensor],
    dtype: torch.dtype,
    *,
    lr: float = 0.01,
    first: int = 1,
    count: int = 1,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.1,
    update: Callable[..., None] = adam_atan2,
) -> dict[str, Tensor]:
    """The buffers after some updates in `dtype` under the present backend."""
    values = {name: tensor.to(dtype, copy=True) for name, tensor in buffers.items()}
    for t in range(first, first + count):
        values["grad"] = (buffers["grad"] * (1 + 0.5 * math.sin(t))).float().to(dtype)
        update(
            *(values[name] for name in BUFFERS),
            lr=scalar(scalar(lr).item(), dtype),
            step=torch.tensor(t, device=DEVICE),
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
        )
    return values


def agree(buffers: dict[str, Tensor], **options) -> None:
    """Asserts that the kernel errs at most twice as much as the reference does, as `compare.agree` has it."""
    ours = steps(buffers, torch.float32, **options)
    backend.set_backend("reference")
    try:
        eager, truth = steps(buffers, torch.float32, **options), steps(buffers, torch.float64, **options)
    finally:
        backend.set_backend("triton")
    for name, value in ours.items():
        assert value.dtype == eager[name].dtype and value.shape == eager[name].shape, name
        assert torch.isfinite(value).all(), name
        error, allowed = distance(value, truth[name]), distance(eager[name], truth[name])
        bound = 2 * allowed + ABSOLUTE[torch.float32] * truth[name].abs().max().item()
        assert error <= bound, f"{name}: error {error:.3g}, reference {allowed:.3g}, bound {bound:.3g}"


@pytest.mark.parametrize("update", [adam_atan2, adamw])
@pytest.mark.parametrize("N", [1, 17, 2048, 4097])
def test_several_steps(N, update):
    agree(state(N), count=5, update=update)


def test_from_the_first_step_of_fresh_moments():
    zero = torch.zeros(300, device=DEVICE)
    # Weights of 0 too, so that nothing covers an error of the step.
    agree({"param": zero, "grad": state(300)["grad"], "exp_avg": zero, "exp_avg_sq": zero}, count=3, lr=1.0)


@settings(max_examples=20, deadline=None)
@given(
    N=st.integers(1, 300),
    step=st.sampled_from([1, 2, 10, 1000, 100_000, 2**24]),
    betas=st.sampled_from([(0.9, 0.95), (0.0, 0.0), (0.3, 0.999), (0.9, 0.999999), (0.999, 0.9999)]),
    scale=st.sampled_from([1e-15, 1e-6, 1.0, 1e15]),
    weight_decay=st.sampled_from([0.0, 1.0]),
)
def test_any_configuration(N, step, betas, scale, weight_decay):
    agree(state(N, seed=N, scale=scale), first=step, betas=betas, weight_decay=weight_decay, lr=0.5)


def angles(m: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """atan2(m, d) from a kernel that halves both on the way, and by torch in float64 from its moments."""
    exp_avg, exp_avg_sq = 2 * m, 2 * d.square()
    param = torch.zeros_like(m)
    adam_atan2(
        param,
        torch.zeros_like(m),
        exp_avg,
        exp_avg_sq,
        lr=scalar(1.0),
        # So late that both corrections are 1.
        step=torch.tensor(10_000, device=DEVICE),
        beta1=0.5,
        beta2=0.5,
        weight_decay=0.0,
    )
    return -param, torch.atan2(exp_avg.double(), exp_avg_sq.double().sqrt())


def test_angle_is_precise_in_every_direction():
    ratio = torch.logspace(-6, 6, 20_000, dtype=torch.float64, device=DEVICE).float()
    for size in (1e-10, 1.0, 1e10):
        d = torch.full_like(ratio, size)
        for sign in (1.0, -1.0):
            ours, truth = angles(sign * ratio * size, d)
            assert distance(ours, truth) <= 2e-7
            # Small angles keep their digits.
            assert ((ours.double() - truth) / truth).abs().max().item() <= 4e-7


def test_angle_at_the_edges():
    inf = float("inf")
    pairs = [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (-1.0, 0.0), (2.0, 2.0), (inf, inf), (-inf, inf), (1.0, inf)]
    m, d = (torch.tensor(values, device=DEVICE) for values in zip(*pairs, strict=True))
    assert distance(*angles(m, d)) <= 1e-7


def test_a_parameter_without_gradient_converges():
    """Its moments decay to the last numbers above 0, where rounding keeps them; it must not move for ever."""
    zero = torch.zeros(64, device=DEVICE)
    param, exp_avg, exp_avg_sq = zero + 1.0, zero + 5.6e-45, zero + 1.4e-44
    constants = {"lr": scalar(1.0), "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.0}
    adam_atan2(param, zero, exp_avg, exp_avg_sq, step=torch.tensor(5000, device=DEVICE), **constants)
    assert exp_avg_sq.all() and torch.equal(param, zero + 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copy_is_the_new_weights_rounded(dtype):
    buffers = state(4097)
    copy = torch.full((4097,), float("nan"), dtype=dtype, device=DEVICE)
    constants = {"lr": scalar(0.1), "step": torch.tensor(3, device=DEVICE), "weight_decay": 0.1}
    adam_atan2(*buffers.values(), beta1=0.9, beta2=0.95, copy=copy, **constants)
    assert torch.equal(copy, buffers["param"].to(dtype))
    alone = state(4097)
    adam_atan2(*alone.values(), beta1=0.9, beta2=0.95, **constants)
    assert all(torch.equal(alone[name], buffers[name]) for name in BUFFERS)


def update(buffers: dict[str, Tensor], dtype: torch.dtype = torch.int64, **others) -> None:
    adam_atan2(
        *(buffers[name] for name in BUFFERS),
        lr=scalar(0.1),
        step=torch.tensor(2, dtype=dtype, device=DEVICE),
        beta1=0.9,
        beta2=0.95,
        weight_decay=0.1,
        **others,
    )


def test_non_finite_gradients_spread_as_in_the_reference():
    bad = {5: float("nan"), 2047: float("inf"), 2048: -float("inf"), 4096: float("nan")}
    results = []
    for name in ("triton", "reference"):
        backend.set_backend(name)
        buffers = state(4097)
        for index, value in bad.items():
            buffers["grad"][index] = value
        update(buffers)
        # A second step takes infinity from infinity.
        assert not buffers["exp_avg"][[2047, 2048]].isnan().any()
        update(buffers)
        results.append(buffers)
    for name in BUFFERS:
        # NaN at the same places, the same infinities, and the rest close.
        torch.testing.assert_close(*(each[name] for each in results), rtol=1e-5, atol=1e-6, equal_nan=True)
    assert results[0]["exp_avg"].isnan().nonzero().flatten().tolist() == sorted(bad)


def bits(tensor: Tensor) -> Tensor:
    """As integers, of which zeros of either sign and every NaN are told apart."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])


@pytest.mark.parametrize("name", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_skipped_step_leaves_every_bit(name, dtype):
    """Whatever is in gradient and buffers; a step that is not skipped is as one without a flag."""
    backend.set_backend(name)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 3e38], device=DEVICE)

    def make() -> dict[str, Tensor]:
        buffers = state(4097)
        for name in BUFFERS:
            buffers[name][2045:2050] = odd.abs() if name == "exp_avg_sq" else odd
        buffers["grad"][::7] = float("nan")
        copy = (
            {} if dtype is None else {"copy": torch.full((4097,), float("nan"), dtype=dtype, device=DEVICE)}
        )
        return {**buffers, **copy}

    after, before = {}, make()
    for flag in (None, False, True):
        buffers = make()
        skip = None if flag is None else torch.tensor(flag, device=DEVICE)
        update(buffers, copy=buffers.get("copy"), skip=skip)
        after[flag] = buffers
    for key, start in before.items():
        assert torch.equal(bits(after[True][key]), bits(start)), key
        assert torch.equal(bits(after[False][key]), bits(after[None][key])), key
        assert torch.equal(bits(after[False][key]), bits(start)) == (key == "grad"), key


@pytest.mark.skipif(DEVICE.type != "cpu", reason="there the reference takes this way by itself")
@pytest.mark.parametrize("flag", [False, True])
def test_a_flag_on_a_device_is_not_read(flag, monkeypatch):
    """A CPU reads its flag; here the reference goes the way of a device, where that would wait."""
    backend.set_backend("reference")
    monkeypatch.setattr(adam_atan2_module, "device_of", lambda tensor: torch.device("cuda"))
    monkeypatch.setattr(Tensor, "__bool__", lambda tensor: pytest.fail("waited for the device"))
    ours, expected = ({**state(40), "copy": torch.zeros(40).bfloat16()} for _ in range(2))
    update(ours, copy=ours["copy"], skip=torch.tensor(flag))
    if not flag:
        update(expected, copy=expected["copy"])
    monkeypatch.undo()
    assert all(torch.equal(bits(ours[key]), bits(expected[key])) for key in ours)


def test_parts_of_a_buffer_and_what_lies_around_them():
    """Views at a parameter's alignment and at none: the neighbours keep their bits."""
    for offset, N in ((ALIGNMENT, 2 * ALIGNMENT), (3, 2050), (1, 1)):
        whole = state(2100)
        before = {name: tensor.clone() for name, tensor in whole.items()}
        part = {name: tensor[offset : offset + N] for name, tensor in whole.items()}
        expected = {name: tensor.clone() for name, tensor in part.items()}
        update(part)
        update(expected)
        assert torch.equal(whole["grad"], before["grad"])
        for name, tensor in whole.items():
            assert torch.equal(part[name], expected[name]), name
            around = torch.cat((tensor[:offset], tensor[offset + N :]))
            assert torch.equal(around, torch.cat((before[name][:offset], before[name][offset + N :]))), name


def test_step_in_either_integer_type_and_buffers_in_any_shape():
    results = []
    for dtype, shape in ((torch.int64, (60,)), (torch.int32, (3, 4, 5))):
        buffers = {name: tensor.view(shape) for name, tensor in state(60).items()}
        update(buffers, dtype)
        results.append([tensor.flatten() for tensor in buffers.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_operator_contract_and_compile():
    scalars = (scalar(0.1), torch.tensor(2, device=DEVICE), 0.9, 0.95, 0.1)
    for copy, skip in ((None, None), (torch.zeros(50).bfloat16(), torch.tensor(False))):
        others = (None if each is None else each.to(DEVICE) for each in (copy, skip))
        arguments = (*state(50).values(), *scalars, *others, True)
        torch.library.opcheck(torch.ops.hrm_kernels.adam_atan2.default, arguments)

    def twice(buffers: dict[str, Tensor], skip: Tensor) -> None:
        update(buffers)
        update(buffers, skip=skip)

    # Traced, the reference rounds once less in a product and a sum.
    for name, error in (("triton", 0.0), ("reference", 1e-7)):
        backend.set_backend(name)
        torch._dynamo.reset()
        compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
        results = []
        for flag in (False, True):
            ours, expected = state(50), state(50)
            compiled(ours, torch.tensor(flag, device=DEVICE))
            twice(expected, torch.tensor(flag, device=DEVICE))
            torch.testing.assert_close(ours, expected, rtol=error, atol=error)
            results.append(ours["param"])
        assert not torch.equal(*results)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"step": torch.tensor(1.0)}, TypeError, "step must be int32 or int64 on .*, got torch.float32"),
        ({"copy": torch.zeros(4)}, TypeError, "copy must be bfloat16 or float16 on .*, got torch.float32"),
        ({"copy": torch.zeros(3).half()}, ValueError, r"copy must have shape \(4,\), got \(3,\)"),
        ({"lr": torch.zeros(1)}, ValueError, r"lr must have shape \(\), got \(1,\)"),
        ({"skip": torch.tensor(0)}, TypeError, "skip must be bool on .*, got torch.int64"),
        ({"skip": torch.zeros(4).bool()}, ValueError, r"skip must have shape \(\), got \(4,\)"),
        ({"skip": torch.tensor(True, device="meta")}, TypeError, "skip must be bool on .*, got .* on meta"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"lr": scalar(0.1), "step": torch.tensor(1, device=DEVICE)}
    arguments |= {name: value if value.is_meta else value.to(DEVICE) for name, value in change.items()}
    with pytest.raises(error, match=f"adam_atan2: {message}"):
        adam_atan2(*state(4).values(), beta1=0.9, beta2=0.95, weight_decay=0.1, **arguments)


def test_unsupported_arguments_of_the_kernel():
    constants = {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "step": torch.tensor(1, device=DEVICE)}
    double = [tensor.double() for tensor in state(4).values()]
    with pytest.raises(RuntimeError, match=r"takes float32, got torch\.float64; use 'auto'"):
        adam_atan2(*double, lr=scalar(0.1, torch.float64), **constants)
    strided = [tensor[::2] for tensor in state(8).values()]
    with pytest.raises(RuntimeError, match="contiguous buffers; use 'auto'"):
        adam_atan2(*strided, lr=scalar(0.1), **constants)


def test_launch_is_a_power_of_two():
    choice = launch_choice()
    assert choice["BLOCK"] % (32 * choice["num_warps"]) == 0
