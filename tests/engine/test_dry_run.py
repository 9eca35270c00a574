"""A rehearsed step: it sees what a device would run, waits for nothing, and leaves nothing behind."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.implementations import metadata
from hrm.common import regions
from hrm.config.load import Config, parse_args
from hrm.engine.dry_run import Observer, Rehearsal, _LibraryAttention
from kernels import backend, rms_norm
from kernels.backend import Launch, explained

CUDA = torch.device("cuda")
SUDOKU = metadata(81, 11)


class Calls(Observer):
    """Names of the operations and launches of a step, with the innermost range that they are in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []
        self.crossings: list[tuple[str, str]] = []

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.seen.append((self.regions[-1] if self.regions else "", func.name()))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
        if len({leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}) > 1:
            self.crossings.append(self.seen[-1])

    def launched(self, launch: Launch) -> None:
        self.seen.append((self.regions[-1] if self.regions else "", launch.kernel.__name__))


# Nothing here depends on how often a layer or a cycle is repeated.
FEW = dict.fromkeys(("arch.H_layers", "arch.L_layers", "arch.H_cycles", "arch.L_cycles"), 1)


def full(arch: str, **changes: Any) -> Config:
    words = {"preset": "full", "device": "cpu", "global_batch_size": 8, **FEW, **changes}
    return parse_args(["--arch", arch, *(f"{key}={value}" for key, value in words.items())])


def second_step(config: Config, device: torch.device = CUDA) -> Calls:
    calls = Calls()
    rehearsal = Rehearsal(config, SUDOKU, device, calls)
    rehearsal.step()
    calls.seen.clear()
    calls.crossings.clear()
    rehearsal.step()
    return calls


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("arch", ["v1", "gated"])
def test_a_step_never_waits_and_takes_one_copy_from_the_host(arch, name, monkeypatch):
    """What would read a value of the device raises without data, as the next test shows; this does not."""
    monkeypatch.setattr(backend, "_backend", name)
    calls = second_step(full(arch, gradient_accumulation=2))
    assert calls.crossings == [("data", "aten::copy_")]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
    ],
)
def test_synchronisation_fails_in_a_dry_run(call):
    with pytest.raises((RuntimeError, NotImplementedError)), Observer():
        call(torch.empty(4, device="meta"))


def test_a_step_runs_the_kernels_of_the_device_in_its_ranges():
    gated = second_step(full("gated", dtype="bfloat16")).seen
    assert ("head and loss", "_lm_head_forward_kernel") in gated
    assert ("backward", "_gate_mix_backward_kernel") in gated
    assert ("optimiser", "_adam_atan2_kernel") in gated and ("optimiser", "_sign_sgd_kernel") in gated
    # auto is bfloat16 on CUDA, where SwiGLU lies in its product in all 4 blocks.
    assert second_step(full("gated")).seen == gated
    names = [name for _, name in gated]
    assert names.count("_attention_backward_kernel") == 2
    assert names.count("_linear_swiglu_forward_kernel") == 4
    wide = [name for _, name in second_step(full("v1", dtype="float32")).seen]
    assert "_rms_norm_forward_kernel" in wide and "_linear_swiglu_forward_kernel" not in wide
    on_cpu = [name for _, name in second_step(full("v1"), torch.device("cpu")).seen]
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in on_cpu
    assert not any(name.endswith("_kernel") for name in on_cpu)


def test_an_observer_sees_operations_inside_kernels_and_composites():
    x, calls = torch.empty(3, 16, device="meta", dtype=torch.bfloat16), Calls()
    with explained(CUDA), calls:
        rms_norm(x, x)
    names = [name for _, name in calls.seen]
    assert "_rms_norm_forward_kernel" in names and names.count("aten::empty_like") == 1
    calls.seen.clear()
    with torch.inference_mode(), calls:
        # PyTorch has a kernel of its own for the second on every device, for the first on none.
        x.to(torch.float32)
        torch.ops.aten.silu_backward(x, x)
    assert [name for _, name in calls.seen] == ["aten::_to_copy", "aten::silu_backward"]


@pytest.mark.parametrize(
    ("device", "dtype", "taken"),
    [
        ("cuda", torch.bfloat16, "_scaled_dot_product_flash_attention"),
        ("cuda", torch.float32, "_scaled_dot_product_efficient_attention"),
        ("cpu", torch.float32, "_scaled_dot_product_flash_attention_for_cpu"),
    ],
)
def test_attention_of_pytorch_is_that_of_the_device(device, dtype, taken):
    q, k, v = (torch.empty(2, 4, 9, 16, device="meta", dtype=dtype, requires_grad=True) for _ in range(3))
    calls = Calls()
    with calls, _LibraryAttention(torch.device(device)):
        o = F.scaled_dot_product_attention(q, k, v)
        o.sum().backward()
    names = [name for _, name in calls.seen]
    assert o.shape == q.shape and names.count(f"aten::{taken}") == 1
    assert any(name.startswith(f"aten::{taken}_backward") for name in names)


def test_a_dry_run_leaves_no_state():
    before = regions._open, backend._stand_in, backend._record
    rehearsal = Rehearsal(full("v1"), SUDOKU, CUDA, observer := Observer())
    assert (regions._open, backend._stand_in, backend._record) == before
    rehearsal.step()
    assert (regions._open, backend._stand_in, backend._record) == before and not observer.regions
    assert torch.zeros(2).device.type == "cpu"
