"""The package and the straight-line implementation against the official HRM code, with the same weights.

On the CPU. Needs a checkout of the official code, named by HRM_REPO, and is skipped without one.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from hrm.config.load import ArchConfig, LossConfig
from hrm.model.act import Sequences, act_step, initial_carry, replace_halted
from hrm.model.losses import act_loss
from kernels import sign_sgd
from tests.support import official
from tests.support import straight_line as plain
from tests.support.act_cases import (
    PUZZLES,
    SOFTMAX,
    STABLEMAX,
    B,
    D,
    S,
    make_arch,
    make_model,
    make_weights,
    package_step,
    random_batch,
    straight_line_run,
    table_gradient,
)

REASON = official.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make_head(code: Any, arch: ArchConfig, weights: plain.Weights, loss_type: str) -> Any:
    """The official model in its loss head, in the weights' dtype; every sequence explores."""
    return official.official_model(
        code,
        arch,
        weights,
        batch_size=B,
        seq_len=S,
        dtype=weights["H_init"].dtype,
        loss_type=loss_type,
        halt_exploration_prob=1.0,
    )


def official_step(
    head: Any, arch: ArchConfig, carry: Any, batch: plain.Batch, least: Tensor, patch: pytest.MonkeyPatch
) -> tuple[Any, dict[str, Any]]:
    """One training step of the official model, which explores always: the test draws in place of torch.

    Returns the new carry, and what `straight_line.act_training_step` returns, with puzzle_rows of the table.
    """
    head.zero_grad()
    names = ["logits", "q_halt_logits", "q_continue_logits", "target_q_continue"]
    with patch.context() as drawn:
        drawn.setattr(torch, "randint_like", lambda *_, **__: least)
        carry, loss, metrics, outputs, _ = head(return_keys=names, carry=carry, batch=batch)
    (loss / B).backward()
    rows = None
    if arch.puzzle_emb_ndim:
        local = head.model.inner.puzzle_emb.local_weights
        rows, local.grad = local.grad, None
    data = carry.current_data
    return carry, {
        "outputs": {name.removesuffix("_logits"): outputs[name] for name in names},
        "loss": loss.detach(),
        "metrics": metrics,
        "gradients": official.gradients(head),
        "puzzle_rows": table_gradient(arch, data["puzzle_identifiers"], rows),
        "carry": {**data, **vars(carry.inner_carry), "steps": carry.steps, "halted": carry.halted},
    }


def assert_close(actual: Any, expected: Any, tolerance: float, name: str) -> None:
    """Integers and flags equal; real numbers to `tolerance` of the largest in their tensor."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), name
        for key, value in expected.items():
            assert_close(actual[key], value, tolerance, f"{name}.{key}")
    elif expected.is_floating_point() and expected.numel():
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=tolerance * scale, check_dtype=False, msg=lambda m: f"{name}: {m}"
        )
    else:
        assert torch.equal(actual, expected), name


def compare(
    arch: ArchConfig, dtype: torch.dtype, tolerance: float, loss_type: str, patch: pytest.MonkeyPatch
) -> None:
    """Runs all three for ten steps, each from its own carry."""
    generator = torch.Generator().manual_seed(0)
    with default_dtype(dtype), official.official_code(in_float64=dtype == torch.float64) as code:
        weights = make_weights(arch, generator, dtype)
        head: Any = make_head(code, arch, weights, loss_type)
        model = make_model(arch, weights)
        carry = initial_carry(model, B, S, torch.device("cpu"))
        official_carry = head.initial_carry(random_batch(generator))
        for batch, least, straight in straight_line_run(arch, weights, loss_type, 10, generator):
            carry, actual = package_step(model, carry, batch, least, loss_type)
            official_carry, expected = official_step(head, arch, official_carry, batch, least, patch)
            assert_close(actual, expected, tolerance, "package")
            assert_close(straight, expected, tolerance, "straight line")


@pytest.mark.parametrize("puzzle_emb_ndim", [0, D, 5 * D // 2])
@pytest.mark.parametrize("pos_encodings", ["rope", "learned"])
def test_training_steps_in_float64(pos_encodings, puzzle_emb_ndim, monkeypatch):
    arch = make_arch(pos_encodings=pos_encodings, puzzle_emb_ndim=puzzle_emb_ndim)
    # The official code writes the 1/sqrt(2) of learned positions with nine digits.
    compare(arch, torch.float64, 1e-9 if pos_encodings == "rope" else 1e-7, STABLEMAX, monkeypatch)


def test_softmax_cross_entropy_in_float64(monkeypatch):
    # Without a puzzle table: with one the official code views logits that are not contiguous, and fails.
    compare(make_arch(), torch.float64, 1e-9, SOFTMAX, monkeypatch)


@pytest.mark.parametrize("pos_encodings", ["rope", "learned"])
def test_training_steps_in_float32(pos_encodings, monkeypatch):
    arch = make_arch(pos_encodings=pos_encodings, puzzle_emb_ndim=D, L_cycles=2)
    compare(arch, torch.float32, 1e-5, STABLEMAX, monkeypatch)


def test_evaluation():
    arch = make_arch(puzzle_emb_ndim=D)
    generator = torch.Generator().manual_seed(1)
    with default_dtype(torch.float64), official.official_code(in_float64=True) as code, torch.no_grad():
        weights = make_weights(arch, generator, torch.float64)
        batch = random_batch(generator)
        head: Any = make_head(code, arch, weights, STABLEMAX).eval()
        official_carry, finished, steps = head.initial_carry(batch), False, 0
        while not finished:
            official_carry, loss, metrics, outputs, finished = head(
                return_keys=["logits", "q_halt_logits"], carry=official_carry, batch=batch
            )
            steps += 1
        assert steps == arch.halt_max_steps
        straight = plain.evaluation(weights, arch, batch, STABLEMAX)
        model = make_model(arch, weights)
        carry = replace_halted(model, initial_carry(model, B, S, torch.device("cpu")), Sequences(**batch))
        for _ in range(steps):
            carry, ours = act_step(model, carry, weights[plain.PUZZLE_TABLE][carry.puzzle_identifiers], None)
        our_loss, our_metrics = act_loss(LossConfig(STABLEMAX), model.lm_head, carry, ours)
        our_logits = model.logits(carry.z_H)
    expected = {
        "loss": loss,
        "metrics": metrics,
        "logits": outputs["logits"],
        "q_halt": outputs["q_halt_logits"],
    }
    package = {"loss": our_loss, "metrics": our_metrics, "logits": our_logits, "q_halt": ours.q_halt_logits}
    straight |= {name: straight["outputs"][name] for name in ("logits", "q_halt")}
    assert_close(package, expected, 1e-9, "package")
    assert_close({name: straight[name] for name in expected}, expected, 1e-9, "straight line")


def test_sign_sgd():
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(PUZZLES, D, generator=generator)
    identifiers = torch.tensor([3, 1, 3, 0, 3, 6, 1], dtype=torch.int32)
    gradient = torch.randn(len(identifiers), D, generator=generator)
    expected, package, straight = table.clone(), table.clone(), table.clone()
    with official.official_code() as code:
        step = code.sparse_embedding._sparse_emb_signsgd_dist
        step(gradient, identifiers, expected, lr=0.25, weight_decay=0.5, world_size=1)
    sign_sgd(package, identifiers, gradient, torch.tensor(0.25), 0.5)
    seen, place = identifiers.unique(return_inverse=True)
    summed = torch.zeros(len(seen), D).index_add_(0, place, gradient)
    plain.sign_sgd(straight, seen.long(), summed, 0.25, 0.5)
    torch.testing.assert_close(package, expected)
    torch.testing.assert_close(straight, expected)
    assert torch.equal(expected[[2, 4, 5, 7]], table[[2, 4, 5, 7]])


def test_official_modules_do_not_stay():
    known = set(sys.modules)
    with official.official_code():
        assert "models.losses" in sys.modules
    assert not {name for name in set(sys.modules) - known if name.split(".")[0] in ("models", "flash_attn")}
