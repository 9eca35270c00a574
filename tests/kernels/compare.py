"""A kernel against its reference: outputs and gradients, in any dtype, judged by the reference in float64.

The kernel may err twice as much as the reference does in the same dtype, plus a small part of the largest
value, for sums taken in another order.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any, TypeVar

import torch
from torch import Tensor

from kernels import backend
from kernels.fastest import allowed_error, distance, forced

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Outputs = Tensor | tuple[Tensor, ...]
Shape = TypeVar("Shape")


def in_dtypes(shapes: Sequence[Shape]) -> list[tuple[Shape, torch.dtype]]:
    """Every shape in float32, and two of them in each 16-bit dtype."""
    return [*((shape, DTYPES[0]) for shape in shapes), *product(shapes[1:3], DTYPES[1:])]


def randn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Normal values in float64, to be rounded to the dtype under test by `agree`."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(DEVICE)


def run(
    call: Callable[..., Outputs], inputs: dict[str, Tensor], gradients: Iterable[str], seed: int
) -> dict[str, Tensor]:
    """The call's outputs by number and the gradients of `gradients`, as `d<name>`.

    Upstream gradients are drawn from a seed of their own; outputs that take no gradient get none.
    """
    leaves = {name: tensor.detach().requires_grad_(name in gradients) for name, tensor in inputs.items()}
    outputs = call(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {str(index): output.detach() for index, output in enumerate(outputs)}
    taught = [output for output in outputs if output.requires_grad]
    if taught:
        upstream = [
            randn(*output.shape, seed=1000 + seed + index).to(output.dtype)
            for index, output in enumerate(taught)
        ]
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        grads = torch.autograd.grad(taught, list(wanted.values()), upstream)
        results |= {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return results


def agree(
    call: Callable[..., Outputs],
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
    *,
    gradients: Iterable[str] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Asserts that `call` under the Triton backend is as good as under the reference; returns its results.

    inputs: floating tensors, rounded to `dtype` first; strides are kept. gradients: names of the inputs to
    differentiate by, all of them by default. Integer tensors and tables belong into the call itself.
    """
    gradients = list(inputs) if gradients is None else list(gradients)
    rounded = {name: cast(tensor, dtype) for name, tensor in inputs.items()}
    exact = {name: tensor.to(torch.float64) for name, tensor in rounded.items()}
    before = {name: tensor.clone() for name, tensor in rounded.items()}
    ours = run(call, rounded, gradients, seed)
    for name, tensor in rounded.items():
        assert torch.equal(tensor, before[name]), f"{name} was changed"
    backend.set_backend("reference")
    try:
        # Closed up: with some CPUs' 16-bit products PyTorch reads into the gaps of a view, NaN and all.
        closed = {name: tensor.contiguous() for name, tensor in rounded.items()}
        eager, truth = run(call, closed, gradients, seed), run(call, exact, gradients, seed)
    finally:
        backend.set_backend("triton")
    assert ours.keys() == truth.keys(), f"{ours.keys()} against {truth.keys()}"
    for name, value in ours.items():
        assert value.dtype == eager[name].dtype and value.shape == eager[name].shape, name
        if not value.is_floating_point():
            assert torch.equal(value, truth[name]), f"{name} differs"
            continue
        assert torch.isfinite(value).all(), f"{name} has values that are not finite"
        error, bound = distance(value, truth[name]), allowed_error(eager[name], truth[name], dtype)
        assert error <= bound, f"{name}: error {error:.3g} of {bound:.3g} allowed"
    return ours


def agree_in_every_tile(
    call: Callable[..., Outputs], inputs: dict[str, Tensor], dtype: torch.dtype, **options: Any
) -> int:
    """`agree` with each launch that a measurement may choose; returns how many there are."""
    with backend.asking() as asked:
        agree(call, inputs, dtype, **options)
    launches = [(key, tile) for key, tiles in asked.tiles.items() for tile in tiles[1:]]
    for key, tile in launches:
        with forced(backend.Table({}, {key: tile})):
            agree(call, inputs, dtype, **options)
    return len(launches)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype with its strides and offset, which `.to` would close the gaps of."""
    memory = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    return memory.to(dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def compiles(call: Callable[..., Outputs], inputs: dict[str, Tensor]) -> None:
    """Asserts that torch.compile takes the call as one graph, forward and backward, with the same results."""
    names = list(inputs)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    ours, eager = run(compiled, inputs, names, 0), run(call, inputs, names, 0)
    for name, value in eager.items():
        assert torch.equal(ours[name], value), name
