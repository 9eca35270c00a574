"""The cross-entropies' kernels against their references."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import backend, softmax_cross_entropy, stablemax_cross_entropy
from kernels.stablemax import MAX_VOCABULARY, launch_choice, stablemax_cross_entropy_reference
from tests.kernels.compare import DEVICE, agree, compiles, in_dtypes, randn

LOSSES = [stablemax_cross_entropy, softmax_cross_entropy]


def some_labels(*shape: int, V: int, seed: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
    """Random labels, a quarter of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, shape, generator=generator)
    return labels.where(torch.rand(shape, generator=generator) > 0.25, -100).to(dtype).to(DEVICE)


def taught(
    loss: Callable, labels: Tensor, ignore_index: int = -100, smoothing: float = 0.0
) -> Callable[..., Tensor]:
    return lambda logits: loss(logits, labels, ignore_index, smoothing=smoothing)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("shape", "dtype"), in_dtypes([(1, 1, 2), (3, 17, 11), (2, 100, 12), (5, 64), (2, 3, 1000)])
)
def test_losses_and_gradients(shape, dtype, loss):
    labels = some_labels(*shape[:-1], V=shape[-1])
    agree(taught(loss, labels), {"logits": randn(*shape, seed=0, scale=3)}, dtype)


def straight_line(logits: Tensor, label: int, smoothing: float, is_stablemax: bool) -> Tensor:
    """The smoothed loss of one token."""
    s = torch.where(logits >= 0, logits + 1, 1 / (1 - logits)) if is_stablemax else logits.exp()
    log_p = (s / s.sum()).log()
    target = torch.full_like(logits, smoothing / len(logits))
    target[label] += 1 - smoothing
    return -(target * log_p).sum()


@pytest.mark.parametrize("backend_name", ["triton", "reference"])
@pytest.mark.parametrize("loss", LOSSES)
def test_smoothed_losses_are_the_formula(loss, backend_name):
    labels = some_labels(40, V=11)
    logits, expected = (randn(40, 11, seed=0, scale=3).requires_grad_() for _ in range(2))
    backend.set_backend(backend_name)
    try:
        ours = loss(logits, labels, smoothing=0.2)
        ours.sum().backward()
    finally:
        backend.set_backend("triton")
    truth = torch.stack(
        [
            straight_line(row, int(label), 0.2, loss is stablemax_cross_entropy)
            if label >= 0
            else row.sum() * 0
            for row, label in zip(expected, labels, strict=True)
        ]
    )
    truth.sum().backward()
    assert expected.grad is not None
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits.grad, expected.grad, rtol=1e-9, atol=1e-9)


@given(
    M=st.integers(1, 140),
    V=st.integers(2, 70),
    scale=st.sampled_from([0.1, 1.0, 100.0]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    ignore_index=st.sampled_from([-100, 0, 1]),
    loss=st.sampled_from(LOSSES),
    smoothing=st.sampled_from([0.0, 0.2]),
)
@settings(max_examples=20, deadline=None)
def test_any_shape(M, V, scale, dtype, ignore_index, loss, smoothing):
    labels = some_labels(M, V=V, seed=M, dtype=dtype)
    labels = labels.where(labels >= 0, ignore_index)
    agree(
        taught(loss, labels, ignore_index, smoothing),
        {"logits": randn(M, V, seed=V, scale=scale)},
        torch.float64,
    )


@pytest.mark.parametrize(("V", "scale"), [(11, 1.0), (11, 1e2), (11, 1e4), (2, 1e4), (64, 1e4)])
def test_stablemax_in_float32_stays_within_the_stated_error(V, scale):
    generator = torch.Generator().manual_seed(V)
    logits = ((torch.rand(4096, V, generator=generator) * 2 - 1) * scale).to(DEVICE)
    labels = torch.randint(0, V, (4096,), generator=generator).to(DEVICE)
    truth = stablemax_cross_entropy_reference(logits.double(), labels, -100)
    assert 0 < (stablemax_cross_entropy(logits, labels).double() - truth).abs().max() < 4e-6


def test_far_logits_and_zero_follow_both_branches():
    values = torch.tensor([-1e12, -1e4, -1.0, -1e-6, -0.0, 0.0, 1e-6, 1.0, 1e4, 1e12])
    labels = torch.zeros(len(values), dtype=torch.int64, device=DEVICE)
    pairs = torch.stack((values, torch.zeros_like(values)), dim=-1).to(DEVICE)
    ours, exact = pairs.clone().requires_grad_(), pairs.double().requires_grad_()
    losses, truth = (
        stablemax_cross_entropy(ours, labels),
        stablemax_cross_entropy_reference(exact, labels, -100),
    )
    torch.testing.assert_close(losses.double(), truth, rtol=3e-7, atol=2e-7)
    losses.sum().backward()
    truth.sum().backward()
    # Of two logits the first one's gradient vanishes like 1 / x^2 above and like 1 / |x| below.
    torch.testing.assert_close(ours.grad[:8].double(), exact.grad[:8], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_ignored_label_gives_exact_zeros_whatever_its_logits(loss):
    logits = randn(4, 11, seed=0).float()
    logits[1, 0] = logits[2, 3] = torch.nan
    logits.requires_grad_()
    labels = torch.tensor([3, -100, -100, 5], dtype=torch.int32, device=DEVICE)
    losses = loss(logits, labels)
    losses.sum().backward()
    assert not losses[1:3].any() and not logits.grad[1:3].any()
    assert losses[0] > 0 and logits.grad[0].abs().sum() > 0
    everything = torch.full((4,), -100, device=DEVICE)
    assert not loss(logits, everything).any()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_label_out_of_range_is_not_taken_for_a_loss(loss):
    losses = loss(randn(3, 11, seed=0).float(), torch.tensor([11, -1, 4], device=DEVICE))
    assert losses.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("loss", LOSSES)
def test_strided_logits_labels_and_upstream_gradients(loss):
    labels = some_labels(4, 18, V=11)[:, ::2]
    # Views are made inside the call: a change of dtype would close their gaps.
    call = taught(loss, labels)
    agree(lambda logits: call(logits[:, :, 3:14]), {"logits": randn(4, 9, 40, seed=0)}, torch.float32)
    agree(lambda logits: call(logits.permute(2, 1, 0)), {"logits": randn(11, 9, 4, seed=1)}, torch.bfloat16)
    x = randn(4, 9, 11, seed=2).float().requires_grad_()
    loss(x, labels).sum().backward()  # An expanded scalar: every stride of the gradient is 0.
    loss(y := x.detach().requires_grad_(), labels).backward(torch.ones(4, 9, device=DEVICE))
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss):
    labels = some_labels(7, V=5)
    assert torch.autograd.gradcheck(taught(loss, labels), [randn(7, 5, seed=0).requires_grad_()])


@pytest.mark.parametrize("loss", LOSSES)
def test_operator_contract_and_compile(loss):
    logits, labels = randn(2, 5, 12, seed=0).float(), some_labels(2, 5, V=12)
    arguments = (labels, -100, loss is stablemax_cross_entropy, 0.2)
    torch.library.opcheck(
        torch.ops.hrm_kernels.cross_entropy.default, (logits.clone().requires_grad_(), *arguments)
    )
    compiles(taught(loss, labels), {"logits": logits})


def test_vocabularies_beyond_the_kernel_are_refused():
    logits, labels = torch.zeros(1, MAX_VOCABULARY + 1, device=DEVICE), torch.zeros(1, device=DEVICE).int()
    with pytest.raises(RuntimeError, match=f"at most {MAX_VOCABULARY}, got {MAX_VOCABULARY + 1}; use 'auto'"):
        stablemax_cross_entropy(logits, labels)


def test_launches_cover_every_vocabulary():
    for vocabulary in (2, 11, 12, 64, 1000, MAX_VOCABULARY):
        choice = launch_choice(vocabulary)
        assert vocabulary <= choice["BLOCK_V"] < max(17, 2 * vocabulary) and choice["BLOCK_M"] >= 1
