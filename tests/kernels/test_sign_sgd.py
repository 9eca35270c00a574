"""Sign-SGD's kernel against its reference."""

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import backend, sign_sgd
from kernels.fastest import ABSOLUTE
from kernels.sign_sgd import launch_choice
from tests.kernels.compare import DEVICE, distance, randn

MODULE = import_module("kernels.sign_sgd")


def integers(*shape: int, low: int, high: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).to(DEVICE)


def updated(table: Tensor, identifiers: Tensor, grad: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The table in `dtype` after one step under a backend."""
    backend.set_backend(name)
    try:
        result = table.to(dtype, copy=True)
        lr = torch.tensor(0.1, device=DEVICE).to(dtype)
        sign_sgd(result, identifiers, grad.to(dtype), lr, 0.25)
    finally:
        backend.set_backend("triton")
    return result


def agree(table: Tensor, identifiers: Tensor, grad: Tensor) -> Tensor:
    """Asserts that the kernel errs at most twice as much as the reference, and elsewhere not at all.

    grad: small whole numbers, whose sums are exact in any order, so that the signs must agree.
    """
    table = table.float()
    ours = updated(table, identifiers, grad, torch.float32, "triton")
    eager = updated(table, identifiers, grad, torch.float32, "reference")
    truth = updated(table, identifiers, grad, torch.float64, "reference")
    bound = 2 * distance(eager, truth) + ABSOLUTE[torch.float32] * truth.abs().max().item()
    assert distance(ours, truth) <= bound
    untouched = torch.ones(len(table), dtype=torch.bool, device=DEVICE).index_fill_(
        0, identifiers.long(), False
    )
    assert torch.equal(ours[untouched], table[untouched])
    assert torch.isfinite(ours).all() and not torch.equal(ours, table)
    return ours


@pytest.mark.parametrize(
    ("B", "N", "E", "dtype"),
    [
        (1, 1, 1, torch.int64),
        (5, 40, 17, torch.int32),
        (5, 40, 17, torch.int64),
        (130, 20, 32, torch.int64),
        (40, 60, 70, torch.int32),
    ],
)
def test_touched_rows_move_once_by_the_sign_of_their_sum(B, N, E, dtype):
    identifiers = integers(B, low=0, high=N, seed=B).to(dtype)
    agree(randn(N, E, seed=0), identifiers, integers(B, E, low=-3, high=4, seed=1))


@settings(max_examples=20, deadline=None)
@given(
    B=st.integers(1, 12),
    N=st.integers(1, 20),
    E=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_any_shape(B, N, E, seed):
    grad = integers(B, E, low=-2, high=3, seed=seed + 1)
    agree(1 + randn(N, E, seed=seed), integers(B, low=0, high=N, seed=seed), grad)


def test_a_whole_batch_of_one_identifier():
    """Sudoku without puzzle identifiers: the first program of a chunk sums several blocks of rows."""
    B = 2 * launch_choice(768)["BLOCK_B"] + 7
    grad = integers(B, 40, low=-3, high=4, seed=0)
    # The sign hangs on the last row alone.
    grad[-1] = torch.where(torch.arange(40, device=DEVICE) % 2 == 0, 1, -1) - grad[:-1].sum(0)
    ours = agree(torch.zeros(3, 40, device=DEVICE), torch.zeros(B, dtype=torch.int32, device=DEVICE), grad)
    assert torch.equal(ours[0].sign(), -torch.where(torch.arange(40, device=DEVICE) % 2 == 0, 1.0, -1.0))


def test_identifiers_far_apart_in_a_long_batch(monkeypatch):
    """More than one look at the identifiers and more than one block of rows lie between the two."""
    monkeypatch.setattr(MODULE, "launch_choice", lambda _: {"BLOCK_B": 16, "BLOCK_E": 32, "SCAN": 64})
    B = 104
    identifiers = torch.arange(B, device=DEVICE)
    identifiers[-1] = 0
    identifiers[80] = 3
    grad = torch.ones(B, 2, device=DEVICE)
    # Row 0's and row 3's later gradients outweigh their first.
    grad[-1] = grad[80] = -2
    ours = agree(torch.zeros(B, 2, device=DEVICE), identifiers, grad)
    assert (ours[[0, 3]] > 0).all() and (ours[1] < 0).all()


def test_opposite_gradients_cancel_and_the_row_decays():
    table = torch.ones(4, 3, device=DEVICE)
    identifiers = torch.tensor([2, 1, 2], device=DEVICE)
    grad = torch.tensor([[1.0], [5.0], [-1.0]], device=DEVICE).expand(3, 3)
    ours = updated(table, identifiers, grad, torch.float32, "triton")
    expected = torch.tensor([1.0, 0.875, 0.975, 1.0], device=DEVICE)[:, None].expand(4, 3)
    torch.testing.assert_close(ours, expected)


def test_gradients_that_are_not_finite_stay_with_their_identifier():
    """The sign of NaN is 0, as torch has it, and infinities have theirs."""
    inf, nan = float("inf"), float("nan")
    grad = torch.tensor([[nan], [1.0], [inf], [-inf], [-1.0]], device=DEVICE)
    identifiers = torch.tensor([0, 1, 2, 3, 0], device=DEVICE)
    ours = updated(torch.zeros(5, 1, device=DEVICE), identifiers, grad, torch.float32, "triton")
    torch.testing.assert_close(ours.flatten(), torch.tensor([0.0, -0.1, -0.1, 0.1, 0.0], device=DEVICE))


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_a_skipped_step_leaves_every_bit(name):
    """Whatever is in gradient and table; a step that is not skipped is as one without a flag."""
    odd = torch.tensor([float("nan"), float("inf"), -0.0], device=DEVICE)
    before, grad = randn(9, 40, seed=0).float(), integers(6, 40, low=-3, high=4, seed=1).float()
    before[4, :3], grad[2, 5:8], grad[0, 9] = odd, odd, float("nan")
    identifiers, lr = torch.tensor([4, 1, 4, 0, 4, 8], device=DEVICE), torch.tensor(0.1, device=DEVICE)
    backend.set_backend(name)
    after = {}
    for flag in (None, False, True):
        after[flag] = before.clone()
        skip = None if flag is None else torch.tensor(flag, device=DEVICE)
        sign_sgd(after[flag], identifiers, grad, lr, 0.25, skip=skip)
    bits = {flag: table.view(torch.int32) for flag, table in after.items()}
    assert torch.equal(bits[True], before.view(torch.int32))
    assert torch.equal(bits[False], bits[None]) and not torch.equal(bits[None], bits[True])


def test_views_of_larger_tensors_and_what_lies_around_them():
    wide, grads = randn(9, 50, seed=0).float(), integers(20, 7, low=-3, high=4, seed=1).float()
    identifiers = integers(14, low=0, high=9, seed=2)
    before, part = wide.clone(), wide[:, 5:15]
    # Rows of the gradient turned and every second identifier: each stride another than the dense one.
    grad, chosen = grads.mT.repeat(1, 2)[:, :10], identifiers[::2]
    expected = updated(part, chosen, grad, torch.float32, "reference")
    sign_sgd(part, chosen, grad, torch.tensor(0.1, device=DEVICE), 0.25)
    torch.testing.assert_close(part, expected)
    assert torch.equal(wide[:, :5], before[:, :5]) and torch.equal(wide[:, 15:], before[:, 15:])


def test_identifiers_outside_the_table_write_nothing():
    whole = torch.ones(6, 4, device=DEVICE)
    table = whole[2:4]
    identifiers = torch.tensor([-1, 2, 1, -2], device=DEVICE)
    sign_sgd(table, identifiers, torch.ones(4, 4, device=DEVICE), torch.tensor(0.5, device=DEVICE), 0.0)
    assert torch.equal(whole[:, 0], torch.tensor([1.0, 1.0, 1.0, 0.5, 1.0, 1.0], device=DEVICE))


def test_operator_contract_and_compile():
    table, identifiers = randn(6, 20, seed=0).float(), torch.tensor([4, 1, 4], device=DEVICE)
    grad, lr = randn(3, 20, seed=1).float(), torch.tensor(0.1, device=DEVICE)
    no = torch.tensor(False, device=DEVICE)
    for skip in (None, no):
        arguments = (table.clone(), identifiers, grad, lr, 0.5, skip)
        torch.library.opcheck(torch.ops.hrm_kernels.sign_sgd.default, arguments)

    def twice(table: Tensor) -> Tensor:
        sign_sgd(table, identifiers, grad, lr, 0.5)
        sign_sgd(table, identifiers, grad, lr, 0.5, skip=no)
        return table * 2

    torch._dynamo.reset()
    eager, compiled = table.clone(), table.clone()
    doubled = torch.compile(twice, fullgraph=True, backend="aot_eager")(compiled)
    assert torch.equal(doubled, twice(eager)) and torch.equal(compiled, eager)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"table": torch.zeros(6)}, ValueError, r"table must be \(N, E\), got \(6,\)"),
        ({"identifiers": torch.zeros(1, 3).int()}, ValueError, r"identifiers must be \(B,\), got \(1, 3\)"),
        ({"identifiers": torch.zeros(3)}, TypeError, "identifiers must be int32 or int64 on .*float32"),
        ({"grad": torch.zeros(3, 5)}, ValueError, r"grad must have shape \(3, 4\), got \(3, 5\)"),
        ({"grad": torch.zeros(3, 4).half()}, TypeError, "grad must match table"),
        ({"lr": torch.zeros(1)}, ValueError, r"lr must have shape \(\), got \(1,\)"),
        ({"skip": torch.tensor(0.0)}, TypeError, "skip must be bool on .*, got torch.float32"),
        ({"skip": torch.zeros(3).bool()}, ValueError, r"skip must have shape \(\), got \(3,\)"),
        ({"skip": torch.tensor(True, device="meta")}, TypeError, "skip must be bool on .*, got .* on meta"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"table": torch.zeros(6, 4), "identifiers": torch.zeros(3).int(), "grad": torch.zeros(3, 4)}
    arguments = arguments | {"lr": torch.tensor(0.1)} | change
    with pytest.raises(error, match=f"sign_sgd: {message}"):
        sign_sgd(
            **{name: value if value.is_meta else value.to(DEVICE) for name, value in arguments.items()},
            weight_decay=0.1,
        )


def test_unsupported_arguments_of_the_kernel():
    table, identifiers = torch.zeros(6, 4, device=DEVICE), torch.zeros(3, dtype=torch.int32, device=DEVICE)
    lr = torch.tensor(0.1, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"takes float32, got torch\.float64; use 'auto'"):
        sign_sgd(table.double(), identifiers, torch.zeros(3, 4).to(DEVICE).double(), lr.double(), 0.1)
    with pytest.raises(RuntimeError, match="rows are contiguous; use 'auto'"):
        sign_sgd(table.mT, identifiers, torch.zeros(3, 6, device=DEVICE), lr, 0.1)
