"""Sign-SGD with decoupled decay on the rows of a table that a batch used.

For every distinct identifier i of the batch:

    table[i] = table[i] (1 - lr wd) - lr sign(sum of grad[b] over all b with identifiers[b] = i)

There is no backward; nothing is saved. Bytes: grad read once, the touched rows read and written; the B
identifiers, which every program reads, stay in the cache. No shape depends on the data.
"""

import torch
from torch import Tensor

from kernels.backend import jit, launch, tl, triton, use_triton
from kernels.checks import as_rows, check_flag, check_floating, check_shape


def sign_sgd_reference(
    table: Tensor,
    identifiers: Tensor,
    grad: Tensor,
    lr: Tensor,
    weight_decay: float,
    skip: Tensor | None = None,
) -> None:
    """The update in plain PyTorch, in place; see `sign_sgd`."""
    # A product sums in a fixed order, equal on all ranks; every repeat gets the sum of the first occurrence.
    same = identifiers[:, None] == identifiers[None, :]
    slot = same.int().argmax(dim=1)
    summed = (same.to(grad.dtype) @ grad)[slot]
    before = table[identifiers]
    rows = before * (1 - lr * weight_decay) - lr * summed.sign()
    table[identifiers] = rows if skip is None else torch.where(skip, before, rows)


def launch_choice(batch: int) -> dict[str, int]:
    """Narrow chunks of many rows, and one block for all identifiers of a usual batch.

    If all rows have the same identifier, one program per chunk sums the whole batch: for 768 rows of 512,
    sixteen programs run six iterations of about a microsecond.
    """
    return {"BLOCK_B": 128, "BLOCK_E": 32, "SCAN": max(16, min(1024, triton.next_power_of_2(batch)))}


@jit
def _sign_sgd_kernel(
    table_ptr, identifiers_ptr, grad_ptr, lr_ptr, skip_ptr,
    N, B, E,
    table_stride_n, grad_stride_b,
    weight_decay,
    BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    row = tl.load(identifiers_ptr + b).to(tl.int64)
    first = B
    last = 0
    for start in range(0, B, SCAN):
        index = start + tl.arange(0, SCAN)
        same = (tl.load(identifiers_ptr + index, mask=index < B, other=0) == row) & (index < B)
        first = tl.minimum(first, tl.min(tl.where(same, index, B), axis=0))
        last = tl.maximum(last, tl.max(tl.where(same, index, 0), axis=0))
    # Only the first occurrence of an identifier sums and writes, so no two programs write the same row.
    if first < b:
        return

    cols = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_B, BLOCK_E), tl.float32)
    for start in range(b, last + 1, BLOCK_B):
        index = start + tl.arange(0, BLOCK_B)
        same = (tl.load(identifiers_ptr + index, mask=index < B, other=0) == row) & (index < B)
        total += tl.load(
            grad_ptr + index.to(tl.int64)[:, None] * grad_stride_b + cols[None, :],
            mask=same[:, None] & (cols < E)[None, :],
            other=0.0,
        )
    total = tl.sum(total, axis=0)
    sign = tl.where(total > 0.0, 1.0, 0.0) - tl.where(total < 0.0, 1.0, 0.0)

    lr = tl.load(lr_ptr)
    mask = (cols < E) & (row >= 0) & (row < N)
    if skip_ptr is not None:
        mask = mask & (tl.load(skip_ptr) == 0)
    p_ptr = table_ptr + row * table_stride_n + cols
    p = tl.load(p_ptr, mask=mask, other=0.0)
    tl.store(p_ptr, p * (1.0 - lr * weight_decay) - lr * sign, mask=mask)


def _update(
    table: Tensor, identifiers: Tensor, grad: Tensor, lr: Tensor, weight_decay: float, skip: Tensor | None
) -> None:
    rows = as_rows(grad)
    B, E = rows.shape
    choice = launch_choice(B)
    launch(
        _sign_sgd_kernel,
        (B, triton.cdiv(E, choice["BLOCK_E"])),
        table, identifiers.contiguous(), rows, lr, skip,
        table.shape[0], B, E,
        table.stride(0), rows.stride(0),
        weight_decay,
        **choice,
    )  # fmt: skip


@torch.library.custom_op("hrm_kernels::sign_sgd", mutates_args=("table",))
def _sign_sgd(
    table: Tensor, identifiers: Tensor, grad: Tensor, lr: Tensor, weight_decay: float, skip: Tensor | None
) -> None:
    _update(table, identifiers, grad, lr, weight_decay, skip)


@_sign_sgd.register_fake
def _(table, identifiers, grad, lr, weight_decay, skip) -> None:
    return None


@torch.no_grad()
def sign_sgd(
    table: Tensor,
    identifiers: Tensor,
    grad: Tensor,
    lr: Tensor,
    weight_decay: float,
    skip: Tensor | None = None,
) -> None:
    """One step of sign-SGD with decoupled decay, in place on the rows of a table that a batch used.

    table: (N, E), float32 in training (its kernel takes no other dtype). identifiers: (B,) int32 or int64
    rows in 0..N-1, repeats allowed; grad: (B, E), their gradients; lr: (); both in the table's dtype. The
    gradients of equal identifiers are summed first, in a fixed order, so each row moves once: p = p * (1 -
    lr wd) - lr sign(sum g), with 0 for the sign of 0 and of NaN. Other rows do not change. skip: None or ()
    bool on the table's device; if True, no row changes. No value is copied to the host. Raises ValueError or
    TypeError naming the argument. Source: the official HRM code.
    """
    check_floating("sign_sgd", table=table, grad=grad, lr=lr)
    if table.ndim != 2:
        raise ValueError(f"sign_sgd: table must be (N, E), got {tuple(table.shape)}")
    if identifiers.ndim != 1:
        raise ValueError(f"sign_sgd: identifiers must be (B,), got {tuple(identifiers.shape)}")
    if identifiers.dtype not in (torch.int32, torch.int64) or identifiers.device != table.device:
        raise TypeError(
            f"sign_sgd: identifiers must be int32 or int64 on {table.device}, "
            f"got {identifiers.dtype} on {identifiers.device}"
        )
    check_shape("sign_sgd", "grad", grad, (identifiers.shape[0], table.shape[1]))
    check_shape("sign_sgd", "lr", lr, ())
    check_flag("sign_sgd", "skip", skip, table.device)
    obstacle = None
    if table.dtype != torch.float32:
        obstacle = f"its kernel takes float32, got {table.dtype}"
    elif table.stride(1) != 1:
        obstacle = "its kernel reads tables whose rows are contiguous"
    update = _sign_sgd if use_triton("sign_sgd", grad, obstacle) else sign_sgd_reference
    update(table, identifiers, grad, lr, weight_decay, skip)
