"""The plain product; a CPU uses the faster of PyTorch's two libraries.

Forward:    y = x @ weight^T + bias
Backward:   dx = dy @ weight;  dweight = dy^T @ x;  dbias = sum over rows of dy

Saved: x and weight. Nothing is recomputed. Bytes, in elements for M rows: MK + NK read, MN written; the three
products of a training step are M N K multiply-adds each.

PyTorch computes float32 products with MKL, which uses its AVX2 kernels on processors of other vendors than
Intel. On these processors oneDNN, which only checks the instruction set, is about twice as fast: 380 to 430
GFLOP/s against 170 to 210 on two AMD EPYC cores with AVX-512. The choice is a fixed function of the machine,
without a measurement, so a resumed run sums in the same order.

On a CPU without instructions for bfloat16 the libraries multiply it in plain loops, 9 to 40 times slower than
float32. On such a CPU the operands are widened: the product of two bfloat16 numbers is exact in float32, the
sum is taken in float32 and rounded once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Choice, device_of, explain, explaining, get_backend
from kernels.checks import check_floating, check_shape
from kernels.cpu import cpuinfo, multiplies_bfloat16

INTEL = "GenuineIntel"
# FLOP below which a product stays with PyTorch: the savings would be less than the overhead of oneDNN's call.
LEAST_FLOP = 8_000_000


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product by PyTorch's own choice; see `linear`."""
    return F.linear(x, weight, bias)


def linear_widened(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product and its gradients computed in float32, each rounded once to x's dtype; see `linear`."""
    wide = None if bias is None else bias.float()
    return F.linear(x.float(), weight.float(), wide).to(x.dtype)


def machine_limit(vendor: str | None, capability: str, has_onednn: bool) -> str | None:
    """The reason why a given machine's products stay with PyTorch's choice; None if oneDNN is faster.

    vendor: as in /proc/cpuinfo, None if unknown. capability: the instruction set that PyTorch found.
    has_onednn: whether PyTorch was built with it and has its product as an operator.
    """
    if not has_onednn:
        return "this PyTorch has no product by oneDNN"
    if vendor is None or vendor == INTEL:
        return f"the processor's vendor is {vendor or 'unknown'}, and MKL is fast on Intel"
    if "AVX512" not in capability:
        return f"oneDNN is not faster without AVX-512, and the processor has {capability}"
    return None


def _widens() -> bool:
    return not multiplies_bfloat16()


def _here() -> str | None:
    """The reason why this machine's products stay with PyTorch's choice; None if oneDNN computes them."""
    if not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn.enabled is False"
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return machine_limit(cpuinfo("vendor_id"), torch.backends.cpu.get_cpu_capability(), has_onednn)


# The compiler treats these results as constants and does not trace the functions.
# torch.compiler.assume_constant_result sets the same attribute, but imports the compiler, which takes 2
# seconds.
for _answer in (_widens, _here):
    setattr(_answer, "_dynamo_marked_constant", True)  # noqa: B010


def is_small(x: Tensor, weight: Tensor) -> bool:
    """Whether a product in float32 stays with PyTorch for its size, on any device."""
    return x.dtype == torch.float32 and 2 * x.numel() * weight.shape[0] < LEAST_FLOP


# Constants, because a product of one sequence takes only a few times as long as building a choice.
_REQUESTED = Choice("reference", "backend 'reference' was requested")
_SMALL = Choice("reference", f"a product of less than {LEAST_FLOP / 1e6:g} MFLOP gains nothing from oneDNN")
_ONEDNN = Choice("onednn", "float32 on a processor with AVX-512 that MKL does not support")


def linear_choice(x: Tensor, weight: Tensor) -> Choice:
    """The implementation of `linear` and the reason: onednn, widened, or reference (PyTorch's choice)."""
    device = device_of(x)
    if get_backend() == "reference":
        return _REQUESTED
    if device.type != "cpu":
        return Choice("reference", f"products on {device.type} use its library")
    if torch.is_autocast_enabled("cpu"):
        return Choice("reference", "autocast chooses the dtype of products")
    if x.dtype == torch.bfloat16 and _widens():
        return Choice("widened", "bfloat16 on a processor without instructions for it")
    if x.dtype != torch.float32:
        return Choice("reference", f"oneDNN is used only for float32, got {x.dtype}")
    if is_small(x, weight):
        return _SMALL
    limit = _here()
    return _ONEDNN if limit is None else Choice("reference", limit)


def _dense(matrix: Tensor) -> Tensor:
    # oneDNN multiplies a matrix in slow loops unless it or its transpose is contiguous.
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


# Inductor supports oneDNN's operator only for constant weights, so this operator wraps it. It is defined
# without `custom_op`, whose checks cost 5 us per call, a tenth of a small product.
torch.library.define("hrm_kernels::linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl("hrm_kernels::linear", "CPU")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # oneDNN does not support empty products, such as the weight's gradient without rows.
    if not x.numel() or not weight.numel():
        return F.linear(x, weight, bias)
    # oneDNN would ignore the strides of a bias.
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise.default(x, _dense(weight), bias, "none", [], "")


@torch.library.register_fake("hrm_kernels::linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_linear = torch.ops.hrm_kernels.linear.default


def _save(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad
    dy_rows, x_rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dweight = None
    if wants_weight:
        # oneDNN needs a contiguous left operand, so copy the narrower operand.
        narrow = dy_rows.shape[1] <= x_rows.shape[1]
        dweight = (
            _linear(dy_rows.t(), x_rows.t(), None) if narrow else _linear(x_rows.t(), dy_rows.t(), None).t()
        )
    return (
        _linear(dy, weight.t(), None) if wants_x else None,
        dweight,
        dy_rows.sum(0) if wants_bias else None,
    )


torch.library.register_autograd("hrm_kernels::linear", _differentiate, setup_context=_save)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias.

    x: (..., K); weight: (N, K); bias: (N,) or None, all of one dtype. Returns (..., N) in that dtype, summed
    in float32 for narrower ones. On a CPU float32 products of at least LEAST_FLOP use oneDNN if
    `machine_limit` finds it faster and `torch.backends.mkldnn` is enabled, and bfloat16 is widened if the
    processor cannot multiply it. All other products, and all with `set_backend("reference")`, use
    `torch.nn.functional.linear`. Raises ValueError or TypeError naming the argument.
    """
    if bias is None:
        check_floating("linear", x=x, weight=weight)
    else:
        check_floating("linear", x=x, weight=weight, bias=bias)
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"linear: weight must have shape (N, {x.shape[-1]}), got {tuple(weight.shape)}")
    if bias is not None:
        check_shape("linear", "bias", bias, (weight.shape[0],))
    return checked_linear(x, weight, bias)


def checked_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` of arguments that the caller has checked."""
    if is_small(x, weight) and not explaining():
        return F.linear(x, weight, bias)
    choice = linear_choice(x, weight)
    explain("linear", choice)
    if choice.implementation == "onednn":
        return _linear(x, weight, bias)
    if choice.implementation == "widened":
        return linear_widened(x, weight, bias)
    return linear_reference(x, weight, bias)
