"""The fused head's kernels against its reference."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.lm_head import (
    MAX_VOCABULARY,
    MAX_WIDTH,
    PROGRAMS,
    launch_choice,
    lm_head_reference,
    lm_head_softmax,
    lm_head_stablemax,
)
from kernels.stablemax import stablemax_cross_entropy_reference
from tests.kernels.compare import DEVICE, DTYPES, agree, compiles, in_dtypes, randn

HEADS = [lm_head_stablemax, lm_head_softmax]


def some_labels(B: int, S: int, V: int, seed: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
    """Random labels, a quarter of them ignored, and all of the last sequence where there are several."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, (B, S), generator=generator)
    labels = labels.where(torch.rand(B, S, generator=generator) > 0.25, -100)
    if B > 1:
        labels[-1] = -100
    return labels.to(dtype).to(DEVICE)


def some_inputs(B: int, S: int, D: int, V: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Cells behind one puzzle token, as a view, and a head whose logits are of the size of `scale`."""
    return {"z_H": randn(B, S + 1, D, seed=0)[:, 1:], "weight": randn(V, D, seed=1, scale=scale * D**-0.5)}


def taught(
    head: Callable, labels: Tensor, ignore_index: int = -100, smoothing: float = 0.0
) -> Callable[..., tuple[Tensor, ...]]:
    call = partial(head, labels=labels, ignore_index=ignore_index, smoothing=smoothing)
    return lambda z_H, weight, bias=None: tuple(call(z_H, weight, bias=bias))


@pytest.mark.parametrize(("head", "has_bias"), [(lm_head_stablemax, False), (lm_head_softmax, True)])
@pytest.mark.parametrize(
    ("shape", "dtype"), in_dtypes([(2, 17, 64, 2), (3, 81, 96, 12), (1, 17, 512, 64), (3, 1, 96, 33)])
)
def test_outputs_and_gradients(shape, dtype, head, has_bias):
    B, S, D, V = shape
    labels = some_labels(B, S, V)
    inputs = some_inputs(B, S, D, V) | ({"bias": randn(V, seed=2)} if has_bias else {})
    results = agree(taught(head, labels), inputs, dtype)
    assert all(results[name].dtype == torch.int32 for name in "123")
    assert results["dz_H"].is_contiguous()


@given(
    B=st.integers(1, 4),
    S=st.integers(1, 50),
    D=st.integers(1, 100),
    V=st.integers(2, MAX_VOCABULARY),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    ignore_index=st.sampled_from([-100, 0, 1]),
    head=st.sampled_from(HEADS),
    smoothing=st.sampled_from([0.0, 0.2]),
)
@settings(max_examples=15, deadline=None)
def test_any_shape(B, S, D, V, dtype, ignore_index, head, smoothing):
    labels = some_labels(B, S, V, seed=S, dtype=dtype)
    labels = labels.where(labels >= 0, ignore_index)
    agree(taught(head, labels, ignore_index, smoothing), some_inputs(B, S, D, V), torch.float64)


@pytest.mark.parametrize("head", HEADS)
def test_long_sequences_of_a_small_batch_are_split(head):
    labels = some_labels(2, 300, 11)
    labels[0, 150:] = -100  # One split without a valid cell.
    agree(taught(head, labels), some_inputs(2, 300, 32, 11), torch.float32)


def test_spans_of_several_tiles_add_up():
    B, S = 2, PROGRAMS * 8 + 40  # Backward, two tiles of 16 cells for most programs.
    agree(taught(lm_head_stablemax, some_labels(B, S, 5)), some_inputs(B, S, 16, 5), torch.bfloat16)


def test_the_reference_is_the_loss_of_the_official_code():
    inputs, labels = some_inputs(3, 17, 32, 11), some_labels(3, 17, 11)
    ours = lm_head_reference(**inputs, labels=labels, ignore_index=-100, stablemax=True)
    logits = F.linear(inputs["z_H"], inputs["weight"])
    losses = stablemax_cross_entropy_reference(logits, labels, -100)
    for b in range(3):
        valid = labels[b] != -100
        right = (logits[b].argmax(-1) == labels[b])[valid]
        assert ours.valid_count[b] == valid.sum() and ours.right_count[b] == right.sum()
        torch.testing.assert_close(ours.loss[b], losses[b][valid].sum() / max(1, int(valid.sum())))
    assert ours.valid_count[2] == 0 and ours.loss[2] == 0 and ours.right_count.sum() > 0


@pytest.mark.parametrize(("V", "scale"), [(11, 1.0), (11, 1e2), (11, 1e4), (2, 1e4), (64, 1e4)])
def test_the_stated_precision_at_large_logits(V, scale):
    inputs = {name: value.float() for name, value in some_inputs(4, 81, 64, V, scale).items()}
    labels = some_labels(4, 81, V)
    ours = lm_head_stablemax(**inputs, labels=labels)
    exact = {name: value.double() for name, value in inputs.items()}
    truth = lm_head_reference(**exact, labels=labels, ignore_index=-100, stablemax=True)
    assert (ours.loss.double() - truth.loss).abs().max() < 4e-6
    assert torch.equal(ours.predictions, truth.predictions) and torch.equal(
        ours.right_count, truth.right_count
    )


@pytest.mark.parametrize("head", HEADS)
def test_sequences_without_labels_give_exact_zeros(head):
    inputs = {name: value.float().requires_grad_() for name, value in some_inputs(3, 20, 32, 11).items()}
    labels = torch.full((3, 20), -100, device=DEVICE)
    result = head(**inputs, labels=labels)
    result.loss.sum().backward()
    assert not result.loss.any() and not result.valid_count.any() and not result.right_count.any()
    assert not any(value.grad.any() for value in inputs.values())
    labels[1, 5] = 3
    assert head(**inputs, labels=labels).loss.ne(0).tolist() == [False, True, False]


def test_the_first_of_equal_logits_is_predicted():
    # Small integers, whose sums are exact in any order.
    z_H, row = randn(2, 20, 32, seed=0).float().round(), randn(1, 32, seed=1).float().round()
    labels = torch.zeros(2, 20, dtype=torch.int32, device=DEVICE)
    for V in (2, 11, 40):
        result = lm_head_stablemax(z_H, row.expand(V, 32), labels)
        assert not result.predictions.any() and result.right_count.tolist() == [20, 20]


def test_a_label_out_of_range_is_not_taken_for_a_loss():
    inputs = {name: value.float() for name, value in some_inputs(2, 5, 32, 11).items()}
    labels = torch.zeros(2, 5, dtype=torch.int32, device=DEVICE)
    labels[1, 2] = 11
    assert lm_head_stablemax(**inputs, labels=labels).loss.isnan().tolist() == [False, True]


@pytest.mark.parametrize("head", HEADS)
def test_strided_inputs_and_upstream_gradients(head):
    labels = some_labels(3, 18, 11)[:, ::2]
    # Views are made inside the call: a change of dtype would close their gaps.
    call = taught(head, labels)
    turned = {"z_H": randn(48, 9, 3, seed=0), "weight": randn(48, 11, seed=1)}
    agree(lambda z_H, weight: call(z_H.permute(2, 1, 0), weight.T), turned, torch.float32)
    cut = {"z_H": randn(3, 11, 60, seed=2), "weight": randn(11, 60, seed=3)}
    agree(lambda z_H, weight: call(z_H[:, 2:, 5:53], weight[:, :48]), cut, torch.bfloat16)
    x, weight = randn(3, 9, 16, seed=4).float().requires_grad_(), randn(11, 16, seed=5).float()
    head(x, weight, labels).loss.sum().backward()  # An expanded scalar: the gradient's stride is 0.
    y = x.detach().requires_grad_()
    head(y, weight, labels).loss.backward(torch.ones(3, device=DEVICE))
    assert torch.equal(x.grad, y.grad)


def test_only_required_gradients_are_computed():
    inputs, labels = some_inputs(2, 9, 32, 11), some_labels(2, 9, 11)
    agree(
        taught(lm_head_stablemax, labels),
        {**inputs, "bias": randn(11, seed=2)},
        torch.float32,
        gradients=["bias"],
    )
    for name in inputs:
        agree(taught(lm_head_stablemax, labels), inputs, torch.float32, gradients=[name])
    result = lm_head_stablemax(**inputs, labels=labels)
    assert not result.loss.requires_grad


@pytest.mark.parametrize("head", HEADS)
def test_gradcheck(head):
    inputs = [value.requires_grad_() for value in some_inputs(2, 3, 6, 3).values()]
    labels = some_labels(2, 3, 3)
    assert torch.autograd.gradcheck(
        lambda z_H, weight: head(z_H, weight, labels).loss, inputs, fast_mode=True
    )


def test_the_same_bits_in_every_run():
    inputs, labels = some_inputs(2, 200, 64, 11), some_labels(2, 200, 11)
    first, second = (agree(taught(lm_head_stablemax, labels), inputs, torch.float16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("head", "has_bias"), [(lm_head_stablemax, False), (lm_head_softmax, True)])
def test_operator_contract_and_compile(head, has_bias):
    inputs = {name: value.float() for name, value in some_inputs(2, 5, 32, 11).items()}
    labels = some_labels(2, 5, 11)
    leaves = [value.clone().requires_grad_() for value in inputs.values()]
    bias = torch.randn(11, device=DEVICE).requires_grad_() if has_bias else None
    arguments = (*leaves, bias, labels, -100, head is lm_head_stablemax, 0.2)
    torch.library.opcheck(torch.ops.hrm_kernels.lm_head.default, arguments)
    compiles(taught(head, labels), inputs if bias is None else {**inputs, "bias": bias.detach()})


@pytest.mark.parametrize(
    ("V", "D", "message"),
    [
        (MAX_VOCABULARY + 1, 16, f"vocabularies of at most {MAX_VOCABULARY}, got {MAX_VOCABULARY + 1}"),
        (2, MAX_WIDTH + 1, f"width at most {MAX_WIDTH}, got {MAX_WIDTH + 1}"),
    ],
)
def test_heads_beyond_the_kernel_are_refused(V, D, message):
    labels = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE)
    with pytest.raises(RuntimeError, match=f"{message}; use 'auto'"):
        lm_head_stablemax(torch.zeros(1, 2, D, device=DEVICE), torch.zeros(V, D, device=DEVICE), labels)


def test_bad_arguments_are_named():
    z_H, weight = torch.zeros(2, 3, 4), torch.zeros(5, 4)
    labels = torch.zeros(2, 3, dtype=torch.int32)
    for call, error, message in (
        (
            lambda: lm_head_stablemax(z_H[0], weight, labels),
            ValueError,
            r"z_H must be \(B, S, D\), got \(3, 4\)",
        ),
        (
            lambda: lm_head_stablemax(z_H, weight.T, labels),
            ValueError,
            r"weight must be \(V, 4\), got \(4, 5\)",
        ),
        (
            lambda: lm_head_softmax(z_H, weight, labels, bias=weight),
            ValueError,
            r"bias must have shape \(5,\), got \(5, 4\)",
        ),
        (lambda: lm_head_softmax(z_H, weight.double(), labels), TypeError, "weight must match z_H"),
        (lambda: lm_head_softmax(z_H, weight, labels[0]), ValueError, r"labels must have shape \(2, 3\)"),
        (lambda: lm_head_softmax(z_H, weight, labels.float()), TypeError, "labels must be int32 or int64"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_launches_cover_every_head():
    for vocabulary in (2, 11, 12, 33, MAX_VOCABULARY):
        for width in (1, 64, 96, 512, MAX_WIDTH):
            for dtype in DTYPES:
                for choice in launch_choice(vocabulary, width, dtype).values():
                    assert vocabulary <= choice["BLOCK_V"] <= MAX_VOCABULARY and choice["BLOCK_D"] >= 16
