"""Initial distributions, widths and casts of the layers."""

import pytest
import torch

from hrm.model.layers import (
    ONE_HOT_ROWS,
    Embedding,
    Linear,
    PuzzleEmbedding,
    SwiGLU,
    swiglu_width,
    truncated_normal_,
)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_truncated_normal_has_exactly_the_deviation_asked_for():
    x = torch.empty(400_000)
    truncated_normal_(x, 0.5, generator())
    assert x.std().item() == pytest.approx(0.5, rel=5e-3)
    assert x.mean().item() == pytest.approx(0, abs=5e-3)
    # 0.8796 is the deviation of a unit normal cut off at 2, so the cut lies at 2 / 0.8796 deviations.
    assert x.abs().max().item() == pytest.approx(0.5 * 2 / 0.87962566, rel=1e-3)


def test_linear_weights_are_lecun_normal_and_biases_zero():
    layer = Linear(1024, 300, bias=True)
    with torch.no_grad():
        layer.reset_parameters(generator())
    assert layer.weight.std().item() == pytest.approx(1024**-0.5, rel=1e-2)
    assert layer.bias is not None and not layer.bias.any()


def test_embedding_deviation_is_that_of_its_width():
    table = Embedding(500, 256)
    with torch.no_grad():
        table.reset_parameters(generator())
    assert table.embedding_weight.std().item() == pytest.approx(1 / 16, rel=1e-2)
    before = torch.full((1, 2, 256), 3.0, dtype=torch.bfloat16)
    rows = table(torch.tensor([[3, 3, 7]]), before)
    assert torch.equal(rows, torch.cat((before, table.embedding_weight[None, [3, 3, 7]].bfloat16()), dim=1))
    assert torch.equal(table(torch.tensor([[3, 3, 7]]), before, 2.0), 2 * rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [5, ONE_HOT_ROWS + 1])
def test_embedding_gradient_sums_over_the_cells_of_a_row(rows, dtype):
    table = Embedding(rows, 8).double()
    with torch.no_grad():
        table.reset_parameters(generator())
    index = torch.randint(0, 5, (3, 40), generator=generator(), dtype=torch.int32)
    before = torch.zeros(3, 2, 8, dtype=dtype, requires_grad=True)
    dy = torch.randn(3, 42, 8, generator=generator(), dtype=torch.float64).to(dtype)
    table(index, before, 0.5).backward(dy)
    assert torch.equal(before.grad, 0.5 * dy[:, :2])
    expected = torch.zeros(rows, 8, dtype=torch.float64)
    for row, gradient in zip(index.flatten().tolist(), dy[:, 2:].double().flatten(0, 1), strict=True):
        expected[row] += 0.5 * gradient
    # One rounding of a sum in float32 where the table is narrow, and one for each cell where it is large.
    tolerance = 1e-12 if dtype == torch.float64 else 2**-8 if rows <= ONE_HOT_ROWS else 2**-4
    assert table.embedding_weight.grad is not None
    torch.testing.assert_close(table.embedding_weight.grad, expected, rtol=tolerance, atol=tolerance * 8)


def test_linear_computes_in_its_inputs_dtype_and_keeps_float32_gradients():
    layer = Linear(8, 4, bias=True)
    with torch.no_grad():
        layer.reset_parameters(generator())
        layer.bias.fill_(0.3)
    x = torch.randn(5, 8, generator=generator())
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), x @ layer.weight.T + 0.3, rtol=0, atol=0.03)
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(4, 8), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("hidden_size", "expansion", "width"),
    [(512, 4.0, 1536), (64, 4.0, 256), (128, 4.0, 512), (96, 4.0, 256), (100, 4.0, 512), (48, 8.0, 256)],
)
def test_swiglu_width_is_two_thirds_rounded_up_to_256(hidden_size, expansion, width):
    assert swiglu_width(hidden_size, expansion) == width
    assert SwiGLU(hidden_size, expansion).down_proj.weight.shape == (hidden_size, width)


def test_puzzle_table_starts_at_zero_and_is_no_parameter():
    table = PuzzleEmbedding(7, 12)
    assert table.weights.shape == (7, 12) and not table.weights.any()
    assert not list(table.parameters()) and list(table.state_dict()) == ["weights"]
    table.weights[4] = 2.0
    assert torch.equal(table(torch.tensor([4, 0])), torch.stack((torch.full((12,), 2.0), torch.zeros(12))))
