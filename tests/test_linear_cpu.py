"""The product by oneDNN against the one PyTorch chooses, and when it is taken."""

import importlib
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import backend
from tests.kernels.compare import allowed_error, distance

# The package's own attribute of this name is the function.
module = importlib.import_module("kernels.linear")
VENDOR = module.cpuinfo("vendor_id")


LEAST_FLOP = module.LEAST_FLOP


@pytest.fixture(autouse=True)
def auto_backend(monkeypatch):
    """Small products too, which these tests are made of."""
    monkeypatch.setattr(module, "LEAST_FLOP", 0)
    before = kernels.get_backend()
    kernels.set_backend("auto")
    yield
    kernels.set_backend(before)


@pytest.fixture
def onednn(monkeypatch):
    """Products by oneDNN, whichever library this machine would take."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch is built without oneDNN")
    monkeypatch.setattr(module, "machine_limit", lambda *_: None)


class Calls(TorchDispatchMode):
    """The number of calls of each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def results(call, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    """The output, and the gradient of each leaf that takes one."""
    y = call(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [y.detach(), *(torch.autograd.grad(y, wanted, dy.to(y)) if wanted else ())]


def agree(x: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[int, ...] = (0, 1, 2)) -> None:
    """Output and gradients err at most twice as much as F.linear's, plus rounding; inputs are untouched."""
    inputs = [x, weight] if bias is None else [x, weight, bias]
    dy = randn(*x.shape[:-1], weight.shape[0], seed=99)
    before = [tensor.clone() for tensor in inputs]

    def leaves(dtype: torch.dtype) -> list[Tensor]:
        # `to` the same dtype keeps strides; float64 need not.
        return [t.detach().to(dtype).requires_grad_(i in wanted) for i, t in enumerate(inputs)]

    with Calls() as calls:
        ours = results(kernels.linear, leaves(torch.float32), dy)
    assert calls.counts["hrm_kernels::linear"] == 1 + len({0, 1}.intersection(wanted))
    eager = results(F.linear, leaves(torch.float32), dy)
    truth = results(F.linear, leaves(torch.float64), dy)
    assert len(ours) == len(truth)
    for mine, its, exact in zip(ours, eager, truth, strict=True):
        assert mine.dtype == torch.float32 and mine.shape == exact.shape
        assert distance(mine, exact) <= allowed_error(its, exact, torch.float32)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before, strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "K", "N"),
    [((1,), 1, 1), ((1,), 64, 192), ((), 5, 3), ((17,), 33, 7), ((3, 17), 64, 130), ((2, 3, 5), 130, 64)],
)
def test_values_and_gradients(onednn, rows, K, N, bias):
    agree(randn(*rows, K, seed=0), randn(N, K, seed=1), randn(N, seed=2) if bias else None)


VIEWS = {
    "columns": lambda rows, columns: randn(rows, columns + 9, seed=3)[:, 4 : 4 + columns],
    "rows": lambda rows, columns: randn(rows + 5, columns, seed=4)[3 : 3 + rows],
    "every other row": lambda rows, columns: randn(2 * rows, columns, seed=5)[::2],
    "transposed": lambda rows, columns: randn(columns, rows, seed=6).t(),
    "part of a transposed one": lambda rows, columns: randn(columns + 3, rows + 2, seed=7)[1:-2, 2:].t(),
    "one row many times": lambda rows, columns: randn(1, columns, seed=8).expand(rows, columns),
}


@pytest.mark.parametrize("of_weight", VIEWS)
@pytest.mark.parametrize("of_x", VIEWS)
def test_views(onednn, of_x, of_weight):
    agree(VIEWS[of_x](20, 24), VIEWS[of_weight](40, 24), randn(80, seed=2)[::2])


def test_a_view_of_three_dimensions(onednn):
    agree(randn(4, 9, 24, seed=0)[:, 1:6], randn(16, 24, seed=1), None)
    agree(randn(24, 5, 4, seed=0).permute(2, 1, 0), randn(16, 24, seed=1), None)


@pytest.mark.parametrize("wanted", [(), (0,), (1,), (2,), (0, 1), (1, 2)])
def test_only_wanted_gradients_are_computed(onednn, wanted):
    agree(randn(6, 24, seed=0), randn(16, 24, seed=1), randn(16, seed=2), wanted)


@pytest.mark.parametrize(("N", "K"), [(16, 24), (24, 16)])
def test_the_narrower_operand_of_the_weights_gradient_is_copied(onednn, N, K):
    """dweight^T = x^T dy where x is the narrower: so its strides tell."""
    weight = randn(N, K, seed=1).requires_grad_()
    (dweight,) = torch.autograd.grad(kernels.linear(randn(6, K, seed=0), weight).sum(), weight)
    assert dweight.is_contiguous() == (N <= K) and dweight.t().is_contiguous() == (N > K)


def test_no_rows(onednn):
    x, weight = torch.zeros(0, 8, requires_grad=True), torch.ones(4, 8, requires_grad=True)
    y = kernels.linear(x, weight, torch.ones(4))
    assert y.shape == (0, 4)
    y.sum().backward()
    assert x.grad.shape == (0, 8) and torch.equal(weight.grad, torch.zeros(4, 8))


def test_second_derivatives(onednn):
    x, weight = randn(6, 24, seed=0).requires_grad_(), randn(16, 24, seed=1).requires_grad_()

    def penalty(product) -> Tensor:
        (dx,) = torch.autograd.grad(product(x, weight).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), weight)[0]

    torch.testing.assert_close(penalty(kernels.linear), penalty(F.linear), rtol=1e-4, atol=1e-4)


def test_operator_contract(onednn):
    x, weight, bias = randn(2, 3, 24, seed=0), randn(16, 24, seed=1), randn(16, seed=2)
    for leaves in (
        (x, weight, bias),
        (x, weight, None),
        (x.transpose(0, 1), weight[:, :24:2].repeat(1, 2), bias),
    ):
        torch.library.opcheck(
            torch.ops.hrm_kernels.linear.default,
            [leaf if leaf is None else leaf.detach().requires_grad_() for leaf in leaves],
        )


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_one_graph_under_the_compiler(onednn, compiler):
    """Gradients of either shape of weight, of which one is computed as its transpose."""

    def network(x: Tensor, first: Tensor, second: Tensor, bias: Tensor) -> Tensor:
        return kernels.linear(kernels.linear(x, first, bias).sin(), second).square()

    inputs = randn(2, 5, 24, seed=0), randn(40, 24, seed=1), randn(8, 40, seed=2), randn(40, seed=3)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    dy = randn(2, 5, 8, seed=4)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, dynamic=False, backend=compiler)
    for ours, eager in zip(results(compiled, leaves, dy), results(network, leaves, dy), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves), network(*leaves), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------- the choice


def taken(x: Tensor) -> tuple[str, str]:
    with backend.explained(torch.device("cpu")) as choices:
        kernels.linear(x, torch.ones(3, x.shape[-1], dtype=x.dtype))
    return choices["linear"]


@pytest.mark.parametrize(
    ("vendor", "capability", "has_onednn", "limit"),
    [
        ("AuthenticAMD", "AVX512", True, None),
        ("HygonGenuine", "AVX512", True, None),
        ("AuthenticAMD", "AVX2", True, "not faster without AVX-512, and the processor has AVX2"),
        ("AuthenticAMD", "DEFAULT", True, "not faster without AVX-512"),
        ("GenuineIntel", "AVX512", True, "vendor is GenuineIntel"),
        (None, "AVX512", True, "vendor is unknown"),
        ("AuthenticAMD", "AVX512", False, "no product by oneDNN"),
    ],
)
def test_machines(vendor, capability, has_onednn, limit, monkeypatch):
    said = module.machine_limit(vendor, capability, has_onednn)
    assert said is None if limit is None else limit in said
    # And asked through the operation itself, on a machine with that processor.
    monkeypatch.setattr(module, "cpuinfo", lambda field: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_onednn)
    implementation, reason = taken(torch.ones(2, 4))
    assert implementation == ("onednn" if limit is None else "reference")
    assert limit is None or limit in reason


def test_this_machine():
    """oneDNN really multiplies where this processor says so, and does not elsewhere."""
    vendors = []
    try:
        with open("/proc/cpuinfo") as lines:
            vendors = [line.split()[-1] for line in lines if line.startswith("vendor_id")]
    except OSError:
        pass
    expected = (
        bool(vendors) and vendors[0] != "GenuineIntel" and "AVX512" in torch.backends.cpu.get_cpu_capability()
    )
    assert (vendors[0] if vendors else None) == VENDOR
    assert (taken(torch.ones(2, 4))[0] == "onednn") == expected
    with torch.profiler.profile() as profile:
        kernels.linear(torch.ones(2, 4), torch.ones(3, 4))
    assert ("mkldnn::_linear_pointwise" in {event.name for event in profile.events()}) == expected


def test_conditions_for_pytorchs_product(onednn, monkeypatch):
    x = torch.ones(2, 4)
    assert taken(x)[0] == "onednn"
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda: True)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert taken(x.to(dtype)) == ("reference", f"oneDNN is used only for float32, got {dtype}")
    with torch.backends.mkldnn.flags(enabled=False):
        assert taken(x) == ("reference", "torch.backends.mkldnn.enabled is False")
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in taken(x)[1]
        assert kernels.linear(x, torch.ones(3, 4)).dtype == torch.bfloat16
    kernels.set_backend("reference")
    assert taken(x) == ("reference", "backend 'reference' was requested")
    kernels.set_backend("triton")
    assert taken(x)[0] == "onednn"
    assert kernels.linear(x.to("meta"), torch.ones(3, 4, device="meta")).shape == (2, 3)


def test_bfloat16_is_widened_where_the_processor_cannot_multiply_it(monkeypatch):
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda: False)
    shapes, dy = ((7, 40), (24, 40), (24,)), randn(7, 24, seed=3).bfloat16()
    inputs = [randn(*shape, seed=seed).bfloat16() for seed, shape in enumerate(shapes)]
    assert taken(inputs[0]) == ("widened", "bfloat16 on a processor without instructions for it")
    found = results(kernels.linear, [t.clone().requires_grad_() for t in inputs], dy)
    truth = results(F.linear, [t.double().requires_grad_() for t in inputs], dy)
    for ours, exact in zip(found, truth, strict=True):
        assert ours.dtype == torch.bfloat16
        # One rounding to eight bits, and what sums in float32 lose.
        assert ((ours - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda: True)
    assert taken(inputs[0])[0] == "reference"


def test_small_products_stay_with_pytorch(onednn, monkeypatch):
    monkeypatch.setattr(module, "LEAST_FLOP", LEAST_FLOP)
    rows = LEAST_FLOP // (2 * 3 * 500)
    x = torch.ones(rows + 1, 500)
    assert taken(x)[0] == "onednn"
    assert taken(x[:rows].unflatten(0, (1, rows)))[0] == "reference"
    assert taken(x[:3]) == ("reference", "a product of less than 8 MFLOP gains nothing from oneDNN")


def test_an_older_pytorch_without_the_operator(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    monkeypatch.setattr(module, "cpuinfo", lambda field: "AuthenticAMD")
    assert taken(torch.ones(2, 4)) == ("reference", "this PyTorch has no product by oneDNN")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: kernels.linear(x, w[:, :3]), r"linear: weight must have shape \(N, 4\), got \(3, 3\)"),
        (lambda x, w: kernels.linear(x, w[0]), r"linear: weight must have shape \(N, 4\), got \(4,\)"),
        (lambda x, w: kernels.linear(x, w, x[0]), r"linear: bias must have shape \(3,\), got \(4,\)"),
        (lambda x, w: kernels.linear(x, w.double()), "linear: weight must match x"),
        (lambda x, w: kernels.linear(x, w, torch.ones(3).int()), "linear: bias must be bfloat16"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(torch.ones(2, 4), torch.ones(3, 4))
