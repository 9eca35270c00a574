"""Muon's kernels against their references, which float64 judges."""

import pytest
import torch
from torch import Tensor

from kernels import backend, muon_momentum, muon_update
from kernels.fastest import ABSOLUTE
from tests.kernels.compare import DEVICE, distance, randn

NAMES = ("grad", "momentum", "param")


def after(N: int, dtype: torch.dtype, mu: float, skip: Tensor | None = None) -> dict[str, Tensor]:
    """Momentum, proposed update and weights after one update in `dtype` under the present backend."""
    values = {name: randn(N, seed=seed).float().to(dtype) for seed, name in enumerate(NAMES)}
    update = torch.full((N,), float("nan"), dtype=dtype, device=DEVICE)
    muon_momentum(values["grad"], values["momentum"], update, mu=mu, skip=skip)
    lr = torch.tensor(0.02, dtype=torch.float32, device=DEVICE).to(dtype)
    muon_update(values["param"], update, lr=lr, scale=1.5, weight_decay=0.1, skip=skip)
    return {"update": update, "momentum": values["momentum"], "param": values["param"]}


@pytest.mark.parametrize("mu", [0.0, 0.4, 0.6, 0.95])
@pytest.mark.parametrize("N", [1, 17, 4097])
def test_one_update(N, mu):
    ours = after(N, torch.float32, mu)
    backend.set_backend("reference")
    try:
        eager, truth = after(N, torch.float32, mu), after(N, torch.float64, mu)
    finally:
        backend.set_backend("triton")
    for name, value in ours.items():
        error, allowed = distance(value, truth[name]), distance(eager[name], truth[name])
        assert error <= 2 * allowed + ABSOLUTE[torch.float32] * truth[name].abs().max().item(), name


def test_a_skipped_update_changes_no_bit():
    before = {name: randn(100, seed=seed).float() for seed, name in enumerate(NAMES)}
    skipped = after(100, torch.float32, 0.6, torch.tensor(True, device=DEVICE))
    made = after(100, torch.float32, 0.6, torch.tensor(False, device=DEVICE))
    plain = after(100, torch.float32, 0.6)
    for name in ("momentum", "param"):
        assert torch.equal(skipped[name], before[name]) and torch.equal(made[name], plain[name])


def test_copies_are_the_new_weights_rounded():
    param, update = randn(300, seed=0).float(), randn(300, seed=1).bfloat16()
    copy = torch.full((300,), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    lr = torch.tensor(0.02, device=DEVICE)
    muon_update(param, update, lr=lr, scale=1.0, weight_decay=0.1, copy=copy)
    assert torch.equal(copy, param.bfloat16())


def test_wrong_arguments_are_refused():
    buffer, half = torch.zeros(8, device=DEVICE), torch.zeros(4, device=DEVICE)
    with pytest.raises(ValueError, match=r"muon_momentum: update must have shape \(8,\), got \(4,\)"):
        muon_momentum(buffer, buffer.clone(), half, mu=0.6)
    with pytest.raises(
        TypeError, match=r"muon_update: update must be torch\.float32, bfloat16 or float16 on"
    ):
        muon_update(buffer, buffer.int(), lr=torch.tensor(0.1, device=DEVICE), scale=1.0, weight_decay=0.0)
