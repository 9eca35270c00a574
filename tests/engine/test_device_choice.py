"""device=auto beside an Apple GPU, and whether PyTorch has what a run needs there; no such GPU is needed."""

from pathlib import Path

import pytest
import torch
import torchgen  # type: ignore[import-untyped]
import yaml  # type: ignore[import-untyped]
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from bench.implementations import metadata, random_batches
from hrm.config.load import parse_args
from hrm.engine import device_choice
from hrm.engine.device_choice import MPS, faster_device
from hrm.engine.engine import Engine
from hrm.engine.inference import EarlyExit
from hrm.engine.modes import EAGER

CPU = torch.device("cpu")
DATA = metadata(cells=4, vocab_size=5)
SMALL = ["preset=quick", "mode=eager", "arch.hidden_size=16", "arch.num_heads=2", "global_batch_size=3"]
# Kernels of PyTorch that run for any device, by other operators.
SHARED = ("CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")


@pytest.fixture
def apple(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


@pytest.mark.parametrize(
    ("mps", "words", "chosen", "note"),
    [
        (0.2, [], MPS, "device=auto takes mps: 0.200 s per step on mps, 1.000 on the CPU"),
        (0.9, [], CPU, "device=auto takes cpu: 0.900 s per step on mps, 1.000 on the CPU"),
        (None, [], CPU, "device=auto takes cpu: a step on the Apple GPU fails (no kernel for it)"),
        (0.2, ["device=cpu"], CPU, ""),
        (0.2, ["deterministic=true"], CPU, ""),
    ],
)
def test_auto_uses_the_apple_gpu_if_it_measures_faster(apple, monkeypatch, mps, words, chosen, note):
    def seconds(config, data, device):
        if device == MPS and mps is None:
            raise NotImplementedError("no kernel for it\nand more")
        return mps if device == MPS else 1.0

    monkeypatch.setattr(device_choice, "step_seconds", seconds)
    found = faster_device(parse_args([*SMALL, *words]), DATA, CPU)
    assert found == (chosen, note)


def test_without_an_apple_gpu_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(device_choice, "step_seconds", None)
    assert faster_device(parse_args(SMALL), DATA, CPU) == (CPU, "")
    assert faster_device(parse_args(SMALL), DATA, torch.device("cuda")) == (torch.device("cuda"), "")


def test_a_step_is_measured_and_a_device_that_fails_is_not_taken(apple):
    config = parse_args(SMALL)
    assert device_choice.step_seconds(config, DATA, CPU) > 0
    # This PyTorch is built without MPS, which is the refusal of a driver.
    if not torch.backends.mps.is_built():
        assert "the Apple GPU fails" in faster_device(config, DATA, CPU)[1]


class Operators(TorchDispatchMode):
    """The names of all operators that run; an operator with a result in float64 raises, as MPS does."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.name())
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(out)):
            raise TypeError(f"{func.name()}: MPS has no float64")
        return out


@pytest.fixture(scope="module")
def has_kernel():
    """Whether an operator runs on MPS, by PyTorch's own table of kernels."""
    table = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    entries = {entry["func"].partition("(")[0]: entry for entry in yaml.load(table.read_text(), loader)}

    def find(name: str) -> bool:
        entry = entries[name]
        if "structured_delegate" in entry:
            return find(entry["structured_delegate"])
        # Without a table an operator is made of others.
        keys = entry.get("dispatch", {"CompositeImplicitAutograd": ""})
        return any(key.strip() in ("MPS", *SHARED) for group in keys for key in group.split(","))

    return find


@pytest.mark.parametrize(
    "words",
    [
        ["--arch", "gated", "arch.pos_encodings=rope"],
        ["--arch", "feudal", "ema=true", "grad_clip=1", "loss.loss_type=softmax_cross_entropy"],
        ["--arch", "trm", "arch.mlp_t=true"],
    ],
)
def test_a_run_uses_only_operations_of_mps(words, has_kernel):
    config = parse_args([*words, *SMALL, "device=cpu", "arch.halt_max_steps=2"])
    before = kernels.get_backend()
    # oneDNN is a CPU's; so is PyTorch's fused attention, which is made of other operators on MPS.
    kernels.set_backend("reference")
    try:
        with sdpa_kernel(SDPBackend.MATH), Operators() as operators:
            engine, batches = Engine(config, DATA, 10, CPU), random_batches(config, DATA)
            for _ in range(2):
                engine.train_step(next(batches))
            engine.pop()
            engine.inference(3).run(next(batches))
            list(EarlyExit(engine.model, 3, 4, mode=EAGER).answers([(next(batches), 3)]))
    finally:
        kernels.set_backend(before)
    used = {name.removeprefix("aten::") for name in operators.names if "flash_attention_for_cpu" not in name}
    assert len(used) > 50 and not has_kernel("_scaled_dot_product_flash_attention_for_cpu")
    assert sorted(name for name in used if not has_kernel(name)) == []
