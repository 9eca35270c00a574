"""`deterministic=true`: the same bits in two runs, what it refuses, and what it leaves behind."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.implementations import metadata
from hrm.common.errors import UserError
from hrm.config.load import Config, parse_args
from hrm.data.dataset import Batch
from hrm.distributed import digest
from hrm.engine.dry_run import Observer, Rehearsal
from hrm.engine.engine import Engine
from hrm.training.determinism import WORKSPACE, deterministic
from kernels import backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
B, S, V = 8, 9, 6
SMALL = {
    "preset": "quick",
    "device": "cpu",
    "mode": "eager",
    "deterministic": True,
    "global_batch_size": B,
    "arch.hidden_size": 32,
    "arch.num_heads": 4,
    "arch.expansion": 2,
    "arch.H_layers": 1,
    "arch.L_layers": 1,
    "arch.H_cycles": 1,
    "arch.L_cycles": 1,
    "arch.halt_max_steps": 4,
    "lr": 0.01,
    "lr_warmup_steps": 3,
}
# PyTorch's own list of what raises on CUDA while the switch is on, as ATen names it.
RAISING = {
    "adaptive_avg_pool", "adaptive_max_pool", "avg_pool3d_backward", "bincount", "ctc_loss", "cumsum",
    "embedding_bag", "fractional_max_pool", "grid_sampler", "histc", "kthvalue", "max_unpool", "median",
    "nll_loss2d", "put", "put_", "reflection_pad", "scatter_reduce", "upsample",
}  # fmt: skip


def make_config(arch: str = "v1", **changes: Any) -> Config:
    """SMALL and changes; dots in the names of keys as two underscores."""
    keys = SMALL | {name.replace("__", "."): value for name, value in changes.items()}
    return parse_args(["--arch", arch, *(f"{name}={value}" for name, value in keys.items())])


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Every test leaves PyTorch's switch where it was, whatever becomes of it."""
    yield
    memory: Any = torch.utils.deterministic
    assert not torch.are_deterministic_algorithms_enabled() and memory.fill_uninitialized_memory


def batches() -> Iterator[Batch]:
    rng = np.random.default_rng(0)
    while True:
        inputs = rng.integers(1, V, (B, S), dtype=np.int32)
        yield Batch(inputs, 1 + inputs % (V - 1), rng.integers(0, 5, B, dtype=np.int32))


def trained(config: Config, steps: int = 12) -> dict[str, Tensor]:
    """All that a run leaves: weights, moments, carry, average."""
    with deterministic(config, CPU):
        engine = Engine(config, replace(metadata(S, V), num_puzzle_identifiers=5), total_steps=steps)
        for _, batch in zip(range(steps), batches(), strict=False):
            engine.train_step(batch)
        state = engine.training_state()
    moments = {f"{k}.{n}": t for k in ("exp_avg", "exp_avg_sq") for n, t in state["optimizer"][k].items()}
    average = {} if engine.average is None else engine.average.state_dict()
    return {**engine.weights(), **state["carry"], **moments, **{f"ema.{n}": t for n, t in average.items()}}


def trained_digests(config: Config) -> list[str]:
    """A digest of the bits of each tensor after a run of three steps."""
    return [str(digest(tensor)) for _, tensor in sorted(trained(config, 3).items())]


@pytest.mark.parametrize(
    "changes",
    [
        {"ema": True, "grad_clip": 1},
        {"arch": "gated", "gradient_accumulation": 2, "loss__gate_stability_weight": 0.1},
        {"arch": "feudal", "dtype": "bfloat16", "loss__loss_type": "softmax_cross_entropy"},
    ],
)
def test_two_runs_are_bit_identical(changes):
    first, second, other = (trained(make_config(**changes, seed=seed)) for seed in (3, 3, 4))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items()) and len(first) > 20
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_runs_on_two_threads_are_bit_identical():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = (trained(make_config("gated"), steps=2) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.slow
def test_two_processes_are_bit_identical():
    """Nor does it hang on the order of sets, which Python seeds anew in each process."""
    code = (
        "from tests.training.test_determinism import make_config, trained_digests\n"
        "print(*trained_digests(make_config(seed=3, dtype='float32')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    own = trained_digests(make_config(seed=3, dtype="float32"))
    assert done.stdout.split() == own and len(set(own)) > 10, done.stderr


def test_a_nondeterministic_operation_is_reported():
    table = torch.zeros(4)

    def put() -> None:
        table.put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))

    with deterministic(make_config(deterministic=False), CPU) as notes:
        put()
    assert notes == [] and table[1]
    message = r"deterministic=true: PyTorch's put_ is not deterministic on cpu; set deterministic=false"
    with pytest.raises(UserError, match=message), deterministic(make_config(), CPU):
        put()
    # Another error stays what it is.
    with pytest.raises(RuntimeError, match="must match"), deterministic(make_config(), CPU):
        torch.zeros(2) + torch.zeros(3)


def test_settings_are_restored():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic(make_config(), CPU):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_threads_are_reported_on_a_cpu():
    with deterministic(make_config(), CPU) as notes:
        assert len(notes) == 1 and f"OMP_NUM_THREADS={torch.get_num_threads()}" in notes[0]


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({"spike_rewinds": 2}, "cpu", "conflicts with spike_rewinds=2: .* set spike_rewinds=0"),
        ({}, "mps", "not on mps; set device=cpu or deterministic=false"),
    ],
)
def test_invalid_settings_are_refused(changes, device, message):
    with pytest.raises(UserError, match=f"deterministic=true.*{message}"):
        deterministic(make_config(**changes), torch.device(device)).__enter__()
    freely = make_config(**changes, deterministic=False)
    with deterministic(freely, torch.device(device)) as notes:
        assert notes == [] and not torch.are_deterministic_algorithms_enabled()


def test_the_setting_of_cublas(monkeypatch):
    for before, after in ((None, ":4096:8"), (":16:8", ":16:8")):
        monkeypatch.setenv(WORKSPACE, before or "")
        if before is None:
            monkeypatch.delenv(WORKSPACE)
        with deterministic(make_config(), CUDA) as notes:
            assert os.environ[WORKSPACE] == after and notes == []
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(UserError, match=rf"{WORKSPACE}=:0:0 .* unset it or set it to :4096:8 or :16:8"):
        deterministic(make_config(), CUDA).__enter__()
    # It is nothing to a CPU.
    with deterministic(make_config(), CPU):
        pass


class Names(Observer):
    """Names of the operations of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.seen.add(func.name().removeprefix("aten::").split(".")[0])


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize(
    ("words", "length"),
    [
        (["--arch", "v1", "grad_clip=1", "ema=true"], 900),
        (["--arch", "gated", "loss.gate_stability_weight=0.1", "loss.gate_entropy_weight=0.1"], 81),
        (["--arch", "feudal", "arch.pos_encodings=learned", "loss.loss_type=softmax_cross_entropy"], 300),
        (["--arch", "trm", "arch.mlp_t=true", "gradient_accumulation=2"], 81),
    ],
)
def test_no_operation_of_a_step_on_a_gpu_raises(words, length, name, monkeypatch):
    """By the names that PyTorch lists: a step of every architecture, found without the device."""
    monkeypatch.setattr(backend, "_backend", name)
    names = Names()
    few = ["arch.L_layers=1", "arch.H_cycles=1", "arch.L_cycles=1", "global_batch_size=4"]
    config = parse_args([*words, "preset=full", "device=cpu", *few])
    rehearsal = Rehearsal(config, metadata(length, 11), CUDA, names)
    rehearsal.step()
    rehearsal.step()
    assert "mm" in names.seen and len(names.seen) > 30
    assert not {seen for seen in names.seen if seen in RAISING or seen.startswith(tuple(RAISING - {"put"}))}
