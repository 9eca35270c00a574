"""Muon: momentum whose matrices are nearly orthogonalised before the step.

For a stack of matrices (out, in) with gradient g, momentum m and weights p, at learning rate lr:

    m = lerp(m, g, 1 - mu);   u = lerp(g, m, mu)                               (Nesterov)
    x = u / max(|u|, 1e-7), |u| the Frobenius norm of a matrix
    n times:  A = x x^T;   x = a x + (b A + c A A) x          (on x^T where out > in, whose A is smaller)
    p = p (1 - lr wd) - lr sqrt(max(1, out / in)) x

The polynomial a s + b s^3 + c s^5 moves each singular value s towards 1. A flag on the device decides whether
the step is skipped.

There is no backward; nothing is saved. It has three parts, so that ranks can share the products:
`muon_momentum` and `muon_update`, elementwise over flat buffers, and `orthogonalize`, PyTorch's batched
products over matrices of equal shape. Bytes per element, in float32 with u in e bytes: m read and written, g
read, u written, 12 + e; then p read and written, u read, 8 + e, and 2 for the copy.
"""

import torch
from torch import Tensor

from kernels.backend import device_of, jit, launch, tl, triton, use_triton
from kernels.checks import accumulate_dtype, check_flag, check_floating, check_shape

# Coefficients of the quintic of Keller Jordan's Muon, steep at 0.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SMALLEST_NORM = 1e-7


def _skips(skip: Tensor | None) -> bool:
    """Whether to skip the work on the host: on a CPU, reading the flag costs nothing."""
    if skip is None or skip.is_meta or torch.compiler.is_compiling():
        return False
    return device_of(skip).type == "cpu" and bool(skip)


def muon_momentum_reference(
    grad: Tensor, momentum: Tensor, update: Tensor, mu: float, skip: Tensor | None = None
) -> None:
    """The momentum in plain PyTorch, in place; see `muon_momentum`."""
    if _skips(skip):
        return
    new = torch.lerp(momentum, grad, 1 - mu)
    update.copy_(torch.lerp(grad, new, mu))
    momentum.copy_(new if skip is None else torch.where(skip, momentum, new))


def muon_update_reference(
    param: Tensor,
    update: Tensor,
    lr: Tensor,
    scale: float,
    weight_decay: float,
    copy: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """The step in plain PyTorch, in place; see `muon_update`."""
    if _skips(skip):
        return
    new = param * (1 - lr * weight_decay) - (lr * scale) * update.to(param.dtype)
    param.copy_(new if skip is None else torch.where(skip, param, new))
    if copy is not None:
        copy.copy_(param)


@torch.no_grad()
def orthogonalize(x: Tensor, steps: int) -> Tensor:
    """Each matrix with its singular values moved towards 1 by Newton-Schulz steps.

    x: (n, out, in), with products in its dtype and norms in float32 (float64 for float64). Returns the
    same shape and dtype. A zero matrix stays zero. Source: Jordan et al. 2024
    (kellerjordan.github.io/posts/muon).
    """
    a, b, c = COEFFICIENTS
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=accumulate_dtype(x.dtype))
    x = (x / norm.clamp(min=SMALLEST_NORM)).to(x.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def launch_choice() -> dict[str, int]:
    """Two 16-byte vectors of each buffer per thread."""
    return {"BLOCK": 2048, "num_warps": 8}


@jit
def _muon_momentum_kernel(
    grad_ptr, momentum_ptr, update_ptr, skip_ptr,
    N,
    mu, weight,
    BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < N
    g = tl.load(grad_ptr + index, mask=mask, other=0.0)
    m = tl.load(momentum_ptr + index, mask=mask, other=0.0)
    # torch.lerp has two forms, each exact at one end.
    m = tl.where(weight < 0.5, m, g) + tl.where(weight < 0.5, weight, weight - 1.0) * (g - m)
    u = tl.where(mu < 0.5, g, m) + tl.where(mu < 0.5, mu, mu - 1.0) * (m - g)
    tl.store(update_ptr + index, u.to(update_ptr.dtype.element_ty), mask=mask)
    if skip_ptr is not None:
        mask = mask & (tl.load(skip_ptr) == 0)
    tl.store(momentum_ptr + index, m, mask=mask)


@jit
def _muon_update_kernel(
    param_ptr, update_ptr, copy_ptr, lr_ptr, skip_ptr,
    N,
    scale, weight_decay,
    BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < N
    u = tl.load(update_ptr + index, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(param_ptr + index, mask=mask, other=0.0)
    lr = tl.load(lr_ptr)
    if skip_ptr is not None:
        mask = mask & (tl.load(skip_ptr) == 0)
    p = p * (1.0 - lr * weight_decay) - (lr * scale) * u
    tl.store(param_ptr + index, p, mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + index, p.to(copy_ptr.dtype.element_ty), mask=mask)


def _launch_momentum(grad: Tensor, momentum: Tensor, update: Tensor, mu: float, skip: Tensor | None) -> None:
    choice = launch_choice()
    launch(
        _muon_momentum_kernel,
        (triton.cdiv(grad.numel(), choice["BLOCK"]),),
        grad, momentum, update, skip,
        grad.numel(),
        mu, 1 - mu,
        **choice,
    )  # fmt: skip


def _launch_update(
    param: Tensor,
    update: Tensor,
    lr: Tensor,
    scale: float,
    weight_decay: float,
    copy: Tensor | None,
    skip: Tensor | None,
) -> None:
    choice = launch_choice()
    launch(
        _muon_update_kernel,
        (triton.cdiv(param.numel(), choice["BLOCK"]),),
        param, update, copy, lr, skip,
        param.numel(),
        scale, weight_decay,
        **choice,
    )  # fmt: skip


_muon_momentum = torch.library.custom_op(
    "hrm_kernels::muon_momentum", _launch_momentum, mutates_args=("momentum", "update")
)
_muon_update = torch.library.custom_op(
    "hrm_kernels::muon_update", _launch_update, mutates_args=("param", "copy")
)


@_muon_momentum.register_fake
def _(grad, momentum, update, mu, skip) -> None:
    return None


@_muon_update.register_fake
def _(param, update, lr, scale, weight_decay, copy, skip) -> None:
    return None


def _check_narrow(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    """Checks that the tensor has the shape and device of `like`, and its dtype or a narrower one."""
    check_shape(op, name, tensor, tuple(like.shape))
    if tensor.dtype not in (like.dtype, torch.bfloat16, torch.float16) or tensor.device != like.device:
        raise TypeError(
            f"{op}: {name} must be {like.dtype}, bfloat16 or float16 on {like.device}, "
            f"got {tensor.dtype} on {tensor.device}"
        )


def _obstacle(wide: Tensor, *buffers: Tensor | None) -> str | None:
    """The reason why a kernel does not support the buffers; None if it does."""
    if wide.dtype != torch.float32:
        return f"its kernel takes float32, got {wide.dtype}"
    if not all(buffer.is_contiguous() for buffer in (wide, *buffers) if buffer is not None):
        return "its kernel needs contiguous buffers"
    return None


@torch.no_grad()
def muon_momentum(
    grad: Tensor, momentum: Tensor, update: Tensor, *, mu: float, skip: Tensor | None = None
) -> None:
    """One momentum step: m = lerp(m, g, 1 - mu) in place, and the Nesterov update lerp(g, m, mu).

    grad, momentum: one shape and dtype (float32 in training; its kernel takes no other). update: the same
    shape in that dtype, bfloat16 or float16; overwritten. mu: the decay of the momentum. skip:
    None, or () bool on the device: if True, momentum does not change and update is undefined. Raises
    ValueError or TypeError naming the argument. Source: see `orthogonalize`.
    """
    check_floating("muon_momentum", grad=grad, momentum=momentum)
    check_shape("muon_momentum", "momentum", momentum, tuple(grad.shape))
    _check_narrow("muon_momentum", "update", update, grad)
    check_flag("muon_momentum", "skip", skip, grad.device)
    is_triton = use_triton("muon_momentum", grad, _obstacle(grad, momentum, update))
    (_muon_momentum if is_triton else muon_momentum_reference)(grad, momentum, update, mu, skip)


@torch.no_grad()
def muon_update(
    param: Tensor,
    update: Tensor,
    *,
    lr: Tensor,
    scale: float,
    weight_decay: float,
    copy: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """One step along an orthogonalised update with decoupled weight decay, in place on param.

    p = p (1 - lr wd) - lr scale update. param: any shape (float32 in training; its kernel takes no other);
    update: that shape, in its dtype, bfloat16 or float16. lr: () in param's dtype and on its device. copy:
    None, or bfloat16 or float16 of that shape, to receive the new weights. skip: None, or () bool on the
    device: if True, param and copy do not change. Raises ValueError or TypeError naming the argument. Source:
    see `orthogonalize`.
    """
    check_floating("muon_update", param=param, lr=lr)
    check_shape("muon_update", "lr", lr, ())
    _check_narrow("muon_update", "update", update, param)
    if copy is not None:
        _check_narrow("muon_update", "copy", copy, param)
    check_flag("muon_update", "skip", skip, param.device)
    is_triton = use_triton("muon_update", param, _obstacle(param, update, copy))
    step = _muon_update if is_triton else muon_update_reference
    step(param, update, lr, scale, weight_decay, copy, skip)
