"""AdamATan2 and AdamW over one flat buffer.

At step t (the first is 1), elementwise:

    p *= 1 - lr wd;   m = lerp(m, g, 1 - b1);   v = lerp(v, g^2, 1 - b2);   d = sqrt(v) / sqrt(1 - b2^t)
    p -= lr / (1 - b1^t) * atan2(m, d)            AdamATan2
    p -= lr / (1 - b1^t) * m / (d + 1e-8)         AdamW

atan2 is bounded and scale-free, so it needs no epsilon. The same pass can also write the new p in 16 bits for
the forward. A flag on the device decides whether the step is skipped, so that the host does not wait for it.

There is no backward; nothing is saved. Bytes per element, in float32: p, m, v read and written, g read, 28 in
total, and 2 for the copy.
"""

import math

import torch
from torch import Tensor

from kernels.backend import device_of, jit, launch, tl, triton, use_triton
from kernels.checks import check_flag, check_floating, check_shape

# AdamW's epsilon, which keeps the quotient finite.
EPSILON = 1e-8


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def adam_atan2_reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    copy: Tensor | None = None,
    skip: Tensor | None = None,
    atan2: bool = True,
) -> None:
    """The update in plain PyTorch, in place; see `adam_atan2`, or without atan2 `adamw`."""
    if skip is not None and device_of(skip).type == "cpu" and not torch.compiler.is_compiling():
        # The host reads it at no cost. In a dry run it has no value; assume that the step is not skipped.
        if not skip.is_meta and skip:
            return
        skip = None
    buffers = [param, exp_avg, exp_avg_sq] + ([] if copy is None else [copy])
    before = [] if skip is None else [buffer.clone() for buffer in buffers]
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    # 1 - beta^t by expm1, which is accurate if beta^t is close to 1.
    t = step.to(param.dtype)
    correction1 = -torch.expm1(t * _log(beta1))
    correction2 = torch.sqrt(-torch.expm1(t * _log(beta2)))
    # Reuse one buffer: on a CPU, allocating memory costs more than the arithmetic.
    step_size = torch.sqrt(exp_avg_sq).div_(correction2)
    if atan2:
        torch.atan2(exp_avg, step_size, out=step_size)
    else:
        torch.div(exp_avg, step_size.add_(EPSILON), out=step_size)
    param.mul_(1 - lr * weight_decay).sub_(step_size.mul_(lr / correction1))
    if copy is not None:
        copy.copy_(param)
    if skip is not None:
        for buffer, old in zip(buffers, before, strict=True):
            torch.where(skip, old, buffer, out=buffer)


def launch_choice() -> dict[str, int]:
    """Two 16-byte vectors of each buffer per thread, which leaves registers for four blocks per
    multiprocessor.

    A block needs about 90 instructions per element: with four blocks, one computes while the others wait for
    memory.
    """
    return {"BLOCK": 2048, "num_warps": 8}


@jit
def _one_minus_exp(x):
    """1 - e^x for a scalar x <= 0; near 0 by its series, because the difference would lose precision."""
    series = 1.0
    for k in tl.static_range(12, 1, -1):
        series = 1.0 + series * x * (1.0 / k)
    return tl.where(x > -1.0, -x * series, 1.0 - tl.exp(x))


@jit
def _atan2(m, d):
    """atan2(m, d) for d >= 0 in float32, in [-pi/2, pi/2]; infinities and NaN as in torch.

    The angle is atan(lo / hi) or its complement, so the polynomial is needed only on [0, 1]. Its relative
    error there is 1.7e-8, the minimum for eight coefficients (a minimax fit); evaluated in float32, atan is
    within 1.3 ulp at every q from 2^-13 to 1. A GPU's quotient is within 2 ulp, so the angle is within 2e-7.
    """
    size = tl.abs(m)
    steep = size > d
    lo = tl.where(steep, d, size)
    hi = tl.where(steep, size, d)
    # Equal operands are a special case: 0 / 0 is the angle 0, and infinity / infinity that of the diagonal.
    q = tl.where(lo == hi, tl.where(hi > 0.0, 1.0, 0.0), lo / hi)
    z = q * q
    r = z * 0.002920693019 - 0.01636793092
    r = r * z + 0.04321186617
    r = r * z - 0.07552214712
    r = r * z + 0.1066600457
    r = r * z - 0.1421105564
    r = r * z + 0.199937731
    r = r * z - 0.3333315253
    angle = q + q * z * r
    angle = tl.where(steep, 1.5707963267948966 - angle, angle)
    return tl.where(m < 0.0, -angle, angle)


@jit
def _adam_atan2_kernel(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, copy_ptr, lr_ptr, step_ptr, skip_ptr,
    N,
    weight1, beta2, weight2, log_beta1, log_beta2, weight_decay, epsilon,
    ATAN2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < N
    g = tl.load(grad_ptr + index, mask=mask, other=0.0)
    m = tl.load(exp_avg_ptr + index, mask=mask, other=0.0)
    v = tl.load(exp_avg_sq_ptr + index, mask=mask, other=0.0)
    p = tl.load(param_ptr + index, mask=mask, other=0.0)
    lr = tl.load(lr_ptr)
    t = tl.load(step_ptr).to(tl.float32)

    # Load the flag together with the other data and do not branch on it, or a block would wait for the flag
    # first.
    if skip_ptr is not None:
        mask = mask & (tl.load(skip_ptr) == 0)

    # torch.lerp has two forms, each exact at one end.
    m = tl.where(weight1 < 0.5, m, g) + tl.where(weight1 < 0.5, weight1, weight1 - 1.0) * (g - m)
    v = v * beta2 + weight2 * (g * g)
    rate = lr / _one_minus_exp(t * log_beta1)
    # Do not use tl.sqrt, which treats numbers below 1.2e-38 as 0: the moments of a parameter without gradient
    # decay to such numbers, and an angle of pi / 2 would move the parameter for ever.
    scale = 1.0 / tl.sqrt_rn(_one_minus_exp(t * log_beta2))
    d = tl.sqrt_rn(v) * scale
    p = p * (1.0 - lr * weight_decay) - rate * (_atan2(m, d) if ATAN2 else m / (d + epsilon))
    tl.store(exp_avg_ptr + index, m, mask=mask)
    tl.store(exp_avg_sq_ptr + index, v, mask=mask)
    tl.store(param_ptr + index, p, mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + index, p.to(copy_ptr.dtype.element_ty), mask=mask)


def _update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    copy: Tensor | None,
    skip: Tensor | None,
    atan2: bool = True,
) -> None:
    N = param.numel()
    choice = launch_choice()
    launch(
        _adam_atan2_kernel,
        (triton.cdiv(N, choice["BLOCK"]),),
        param, grad, exp_avg, exp_avg_sq, copy, lr, step, skip,
        N,
        1 - beta1, beta2, 1 - beta2, _log(beta1), _log(beta2), weight_decay, EPSILON,
        ATAN2=atan2, **choice,
    )  # fmt: skip


@torch.library.custom_op("hrm_kernels::adam_atan2", mutates_args=("param", "exp_avg", "exp_avg_sq", "copy"))
def _adam(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    copy: Tensor | None,
    skip: Tensor | None,
    atan2: bool,
) -> None:
    _update(param, grad, exp_avg, exp_avg_sq, lr, step, beta1, beta2, weight_decay, copy, skip, atan2)


@_adam.register_fake
def _(param, grad, exp_avg, exp_avg_sq, lr, step, beta1, beta2, weight_decay, copy, skip, atan2) -> None:
    return None


def _checked(
    op: str,
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    copy: Tensor | None,
    skip: Tensor | None,
) -> None:
    check_floating(op, param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, lr=lr)
    for name, tensor in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        check_shape(op, name, tensor, tuple(param.shape))
    check_shape(op, "lr", lr, ())
    check_shape(op, "step", step, ())
    if step.dtype not in (torch.int32, torch.int64) or step.device != param.device:
        raise TypeError(
            f"{op}: step must be int32 or int64 on {param.device}, got {step.dtype} on {step.device}"
        )
    if copy is not None:
        check_shape(op, "copy", copy, tuple(param.shape))
        if copy.dtype not in (torch.bfloat16, torch.float16) or copy.device != param.device:
            raise TypeError(
                f"{op}: copy must be bfloat16 or float16 on {param.device}, got {copy.dtype} on {copy.device}"
            )
    check_flag(op, "skip", skip, param.device)
    obstacle = None
    if param.dtype != torch.float32:
        obstacle = f"its kernel takes float32, got {param.dtype}"
    buffers = [param, grad, exp_avg, exp_avg_sq] + ([] if copy is None else [copy])
    if not all(buffer.is_contiguous() for buffer in buffers):
        obstacle = "its kernel needs contiguous buffers"
    update = _adam if use_triton(op, param, obstacle) else adam_atan2_reference
    scalars = lr, step, beta1, beta2, weight_decay
    update(param, grad, exp_avg, exp_avg_sq, *scalars, copy, skip, op == "adam_atan2")


def adam_atan2(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    copy: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """One AdamATan2 step with decoupled weight decay, in place on param, exp_avg and exp_avg_sq.

    param, grad, exp_avg, exp_avg_sq: one shape, one dtype (float32 in training; its kernel takes no other).
    lr: () in that dtype and step: () int32 or int64, both on the tensors' device so that no value crosses to
    the host. copy: None, or bfloat16 or float16 of that shape, to receive the new weights. skip: None, or ()
    bool on that device: if True, no buffer changes, whatever grad contains. Otherwise a non-finite gradient
    enters the moments, and a NaN also the weights. Raises ValueError or TypeError naming the argument.
    Source: Everett et al. 2024 (arXiv 2407.05872).
    """
    scalars = lr, step, beta1, beta2, weight_decay
    _checked("adam_atan2", param, grad, exp_avg, exp_avg_sq, *scalars, copy, skip)


def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    copy: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """One AdamW step with epsilon 1e-8: the arguments, precision and errors of `adam_atan2`.

    Source: Loshchilov and Hutter 2017 (arXiv 1711.05101).
    """
    scalars = lr, step, beta1, beta2, weight_decay
    _checked("adamw", param, grad, exp_avg, exp_avg_sq, *scalars, copy, skip)
