"""AdamATan2 over one flat buffer.

At step t (the first is 1), elementwise:

    p *= 1 - lr wd;   m = lerp(m, g, 1 - b1);   v = lerp(v, g^2, 1 - b2)
    p -= lr / (1 - b1^t) * atan2(m, sqrt(v) / sqrt(1 - b2^t))

atan2 is bounded and scale-free, so there is no epsilon. Bytes: p, m, v read and written, g read.
"""

import math

import torch
from torch import Tensor

from kernels.checks import check_floating, check_shape


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
) -> None:
    """The update in plain PyTorch, in place; see `adam_atan2`."""
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    # 1 - beta^t by expm1, which keeps its digits where beta^t is close to 1.
    t = step.to(param.dtype)
    correction1 = -torch.expm1(t * _log(beta1))
    correction2 = torch.sqrt(-torch.expm1(t * _log(beta2)))
    # One buffer for all that follows: on a CPU, fresh memory costs more than the arithmetic.
    angle = exp_avg_sq.sqrt().div_(correction2)
    torch.atan2(exp_avg, angle, out=angle)
    param.mul_(1 - lr * weight_decay).sub_(angle.mul_(lr / correction1))


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
) -> None:
    """One AdamATan2 step with decoupled weight decay, in place on param, exp_avg and exp_avg_sq.

    param, grad, exp_avg, exp_avg_sq: one shape, one dtype (float32 in training). lr: () in that dtype and
    step: () integer, both on the tensors' device so that no value crosses to the host. Raises ValueError
    or TypeError naming the argument. Source: Everett et al. 2024 (arXiv 2407.05872).
    """
    check_floating("adam_atan2", param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, lr=lr)
    for name, tensor in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        check_shape("adam_atan2", name, tensor, tuple(param.shape))
    check_shape("adam_atan2", "lr", lr, ())
    check_shape("adam_atan2", "step", step, ())
    adam_atan2_reference(param, grad, exp_avg, exp_avg_sq, lr, step, beta1, beta2, weight_decay)
