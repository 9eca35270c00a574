"""Learns the puzzle embedding of a new task from its demonstrations."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hrm.common.errors import UserError
from hrm.config.schema import LossConfig
from hrm.model.act import Sequences, act_step, draw_min_halt_steps, initial_carry, replace_halted
from hrm.model.hrm import HRM
from hrm.model.losses import act_loss
from kernels import sign_sgd


def learn_embedding(
    model: HRM,
    inputs: Tensor,
    labels: Tensor,
    *,
    steps: int,
    lr: float,
    loss: LossConfig,
    weight_decay: float = 0.0,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> Tensor:
    """Learns a row of the puzzle table for a new task, (puzzle_emb_ndim) in the table's dtype; the model is
    frozen.

    inputs, labels: (N, S) integers, the task's demonstrations; label -100 carries no loss. Every batch
    contains all demonstrations, which take ACT steps as in training: halting and exploration by `seed`, a
    loss at each step (deep supervision), and a restart of halted demonstrations. steps: number of updates.
    The row starts at zero and is updated by the puzzle table's sign-SGD, so lr * steps must reach the size of
    trained entries. report: called with each step, from 1, and its mean loss over the demonstrations. Gate
    losses are omitted. Raises UserError for a model without a puzzle table or a loss that is not finite.
    """
    if model.puzzle_emb is None:
        raise UserError(
            "the model has no puzzle embeddings (arch.puzzle_emb_ndim=0), so none can be learnt for a task"
        )
    table, arch = model.puzzle_emb.weights, model.arch
    device, (N, S) = table.device, inputs.shape
    # All demonstrations belong to puzzle 0 of a table with one row.
    identifiers = torch.zeros(N, dtype=torch.int32, device=device)
    fresh = Sequences(inputs.to(device, torch.int32), labels.to(device, torch.int32), identifiers)
    row, rate = table.new_zeros(1, table.shape[1]), torch.tensor(lr, device=device)
    carry = initial_carry(model, N, S, device)
    with _frozen(model), torch.enable_grad():
        for step in range(1, steps + 1):
            rows = row[identifiers].requires_grad_()
            least = torch.from_numpy(draw_min_halt_steps(arch, seed, step, N)).to(device)
            carry = replace_halted(model, carry, fresh)
            carry, outputs = act_step(model, carry, rows, least)
            total, _ = act_loss(loss, model.lm_head, carry, outputs)
            (grad,) = torch.autograd.grad(total / N, rows)
            sign_sgd(row, identifiers, grad, rate, weight_decay)
            if not torch.isfinite(total):
                raise UserError(f"the loss is not finite after {step} steps of adapting: lower lr={lr:g}")
            if report is not None:
                report(step, total.item() / N)
    return row[0]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within this context no parameter requires a gradient."""
    taught = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in taught:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in taught:
            parameter.requires_grad_(True)
