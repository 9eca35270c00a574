"""Small ACT training runs that cover every event, for tests that compare implementations."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hrm.config.load import ArchConfig, LossConfig
from hrm.model.act import Carry, Sequences, act_step, replace_halted
from hrm.model.hrm import HRM
from hrm.model.losses import act_loss
from tests.support import straight_line as plain

B, S, V, PUZZLES, D = 12, 9, 5, 8, 32
VARIANTS = ("goal", "goal_gate", "gates", "keys")
STABLEMAX: Any = "stablemax_cross_entropy"
SOFTMAX: Any = "softmax_cross_entropy"


def make_arch(**changes: Any) -> ArchConfig:
    """A small v1 architecture with odd sizes, rotary positions and no puzzle table."""
    fields: dict[str, Any] = {
        "hidden_size": D,
        "num_heads": 4,
        "expansion": 2.0,
        "H_layers": 2,
        "L_layers": 1,
        "H_cycles": 2,
        "L_cycles": 3,
        "halt_max_steps": 3,
        "puzzle_emb_ndim": 0,
        "pos_encodings": "rope",
    }
    return ArchConfig(**{**fields, **changes})


def make_weights(arch: ArchConfig, generator: torch.Generator, dtype: torch.dtype) -> plain.Weights:
    """Random weights; the bias of the Q head makes about half of the sequences halt."""
    weights = plain.random_weights(arch, V, S, PUZZLES, generator, dtype)
    batch = random_batch(generator)
    leads = []
    for steps in range(1, arch.halt_max_steps + 1):
        outputs = plain.evaluation(weights, replace(arch, halt_max_steps=steps), batch, STABLEMAX)["outputs"]
        leads.append(outputs["q_halt"] - (outputs["q_continue"] if arch.q_continue else 0))
    weights["q_head.bias"][0] -= torch.cat(leads).median()
    return weights


def make_model(arch: ArchConfig, weights: plain.Weights) -> HRM:
    """The package's model in the weights' dtype, which must be torch's default; all names must exist."""
    dtype = weights["H_init"].dtype
    model = HRM(arch, vocab_size=V, seq_len=S, num_puzzle_identifiers=PUZZLES, dtype=dtype)
    model.load_state_dict({name: weight.clone() for name, weight in weights.items()})
    return model


def random_batch(generator: torch.Generator) -> plain.Batch:
    """Random inputs and labels (B, S) and puzzle identifiers (B,), int32; a quarter of the labels ignored."""

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.int32)

    inputs, labels = draw(V, B, S), draw(V, B, S)
    labels = torch.where(draw(4, B, S) == 0, plain.IGNORE, labels)
    return {"inputs": inputs, "labels": labels, "puzzle_identifiers": draw(PUZZLES, B)}


def make_batch(
    arch: ArchConfig, weights: plain.Weights, carry: plain.Carry, generator: torch.Generator
) -> plain.Batch:
    """The next batch, with labels that make some sequences right.

    Sequence 0 has only ignored labels, 1 to 4 have the model's first predictions as labels, 5 to 9 have one
    such label.
    """
    batch = random_batch(generator)
    anything = torch.zeros(B, dtype=torch.int32)
    dry_run = plain.act_training_step(weights, arch, carry, batch, anything, STABLEMAX, B)
    batch["labels"][0] = plain.IGNORE
    batch["labels"][1:5] = dry_run["outputs"]["logits"][1:5].argmax(-1).int()
    batch["labels"][5:10, 1:] = plain.IGNORE
    return batch


def draw_often(arch: ArchConfig, generator: torch.Generator) -> Tensor:
    """The minimum steps of each sequence (B,) if half of them explore."""
    least = torch.randint(2, max(2, arch.halt_max_steps) + 1, (B,), generator=generator, dtype=torch.int32)
    return torch.where(torch.rand(B, generator=generator) < 0.5, least, 0)


def what_happened(
    arch: ArchConfig, before: plain.Carry, result: dict[str, Any], least: Tensor
) -> dict[str, bool]:
    """For each event, whether it occurred for at least one sequence in this step.

    before: the carry before the step. result: of `straight_line.act_training_step`.
    """
    carry, outputs = result["carry"], result["outputs"]
    is_last = carry["steps"] == arch.halt_max_steps
    wants = outputs["q_halt"] > (outputs["q_continue"] if arch.q_continue else 0)
    right, counted = result["metrics"]["exact_accuracy"], result["metrics"]["count"]
    events = {
        "halted by choice": (carry["halted"] & ~is_last).any(),
        "halted at the last step": (is_last & ~wants).any(),
        "kept on by exploration": (wants & ~is_last & (carry["steps"] < least)).any(),
        "some replaced, some kept": before["halted"].any() and not before["halted"].all(),
        "some right, some wrong": 0 < right < counted,
        "halted without a label": (carry["halted"] & (carry["labels"] == plain.IGNORE).all(-1)).any(),
        "two sequences of one puzzle": len(carry["puzzle_identifiers"].unique()) < B,
    }
    return {name: bool(happened) for name, happened in events.items()}


def straight_line_run(
    arch: ArchConfig, weights: plain.Weights, loss_type: str, steps: int, generator: torch.Generator
) -> Iterator[tuple[plain.Batch, Tensor, dict[str, Any]]]:
    """Yields each step's batch, minimum steps, and the result of `straight_line.act_training_step`.

    puzzle_rows becomes the gradient of the whole table. Asserts at the end that every event has occurred.
    """
    carry = plain.initial_carry(weights, arch, random_batch(generator))
    events: dict[str, bool] = {}
    for _ in range(steps):
        batch, least = make_batch(arch, weights, carry, generator), draw_often(arch, generator)
        result = plain.act_training_step(weights, arch, carry, batch, least, loss_type, B)
        identifiers, rows = result["puzzle_rows"] or (None, None)
        yield batch, least, result | {"puzzle_rows": table_gradient(arch, identifiers, rows)}
        for event, happened in what_happened(arch, carry, result, least).items():
            events[event] = events.get(event, False) or happened
        carry = result["carry"]
    assert all(events.values()), f"never happened: {[event for event in events if not events[event]]}"


def assert_all_close(actual: Any, expected: Any) -> None:
    """Every tensor of the same dtype and equal to 1e-9, integers and flags exactly."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def assert_same(actual: Any, expected: Any, name: str = "", tolerance: float = 1e-9) -> None:
    """The same names, integers and flags as expected; real numbers to tolerance of the largest."""
    if isinstance(expected, dict):
        # A carry here holds what other architectures need besides.
        assert "carry" in name or actual.keys() == expected.keys(), name
        for key, value in expected.items():
            assert_same(actual[key], value, f"{name}.{key}", tolerance)
    elif expected.is_floating_point() and expected.numel():
        bound = tolerance * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=bound, msg=lambda text: f"{name}: {text}")
    else:
        assert torch.equal(actual, expected), name


def table_gradient(arch: ArchConfig, identifiers: Tensor | None, rows: Tensor | None) -> Tensor:
    """The puzzle table's gradient (PUZZLES, puzzle_emb_ndim) from the gradients of gathered rows, if there
    are any."""
    table = torch.zeros(PUZZLES, arch.puzzle_emb_ndim)
    if identifiers is not None and rows is not None:
        for identifier, row in zip(identifiers.tolist(), rows, strict=True):
            table[identifier] += row
    return table


def v1_carry(carry: Carry) -> plain.Carry:
    """The carry in the form of `straight_line`, without the fields of variants."""
    return {name: tensor for name, tensor in carry._asdict().items() if name not in VARIANTS}


def package_step(
    model: HRM, carry: Carry, batch: plain.Batch, min_halt_steps: Tensor, loss_type: Any
) -> tuple[Carry, dict[str, Any]]:
    """Runs the package's replacement, ACT step, loss and backward.

    Returns the new carry, and results in the form of `straight_line_run`.
    """
    model.zero_grad()
    carry = replace_halted(model, carry, Sequences(**batch))
    rows = None
    if model.puzzle_emb is not None:
        rows = model.puzzle_emb(carry.puzzle_identifiers).requires_grad_()
    carry, outputs = act_step(model, carry, rows, min_halt_steps)
    loss, metrics = act_loss(LossConfig(loss_type), model.lm_head, carry, outputs)
    (loss / B).backward()
    gradient = None if rows is None else rows.grad
    logits = model.lm_head(outputs.answer)
    named = zip(("logits", "q_halt", "q_continue", "target_q_continue"), (logits, *outputs[1:4]), strict=True)
    return carry, {
        "outputs": {name: output.detach() for name, output in named if output is not None},
        "loss": loss.detach(),
        "metrics": metrics,
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "puzzle_rows": table_gradient(model.arch, carry.puzzle_identifiers, gradient),
        "carry": v1_carry(carry),
    }
