"""The choice between Triton and the reference, and the one place of launches."""

import os
import subprocess
import sys

import pytest
import torch

import kernels
from kernels import backend, rms_norm
from tests.kernels.compare import DEVICE


def launches(call) -> int:
    """The number of kernels that a call launches."""
    count = 0
    run = backend.launch

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return run(*args, **kwargs)

    module = sys.modules["kernels.rms_norm"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "launch", counted)
        call()
    return count


X, WEIGHT, QKV, TABLE = torch.ones(1, 4, 8), torch.ones(8, 8), torch.ones(1, 4, 24), torch.ones(4, 4)


@pytest.mark.parametrize(
    ("most", "call"),
    [
        (5, lambda: kernels.linear(X, WEIGHT)),
        (11, lambda: kernels.rms_norm_pair(X, X)),
        (23, lambda: kernels.swiglu_mlp(X, WEIGHT, WEIGHT[:, :4])),
        (30, lambda: kernels.attention(QKV, 2, TABLE, TABLE)),
    ],
    ids=["linear", "rms_norm_pair", "swiglu_mlp", "attention"],
)
def test_an_operation_on_a_cpu_makes_few_calls(most, call):
    """Python's calls take longer than the operation if it is of a single sequence."""
    kernels.set_backend("auto")
    made = []

    def count(frame, event, _):
        made.append(event == "call" and frame.f_globals["__name__"].startswith("kernels."))

    before = sys.getprofile()
    with torch.no_grad():
        sys.setprofile(count)
        try:
            call()
        finally:
            sys.setprofile(before)
    assert 0 < sum(made) <= most


def test_each_backend_takes_its_own_path():
    x = torch.ones(2, 32, device=DEVICE)
    expected = {"triton": 1, "reference": 0, "auto": int(DEVICE.type == "cuda")}
    for name, count in expected.items():
        kernels.set_backend(name)
        assert kernels.get_backend() == name
        assert launches(lambda: rms_norm(x, x)) == count, name


def test_auto_leaves_float64_and_other_devices_to_the_reference():
    kernels.set_backend("auto")
    assert not backend.use_triton("op", torch.zeros(1))
    assert not backend.use_triton("op", torch.zeros(1, device=DEVICE, dtype=torch.float64))
    assert not backend.use_triton("op", torch.zeros(1, device=DEVICE), "it is Tuesday")


def test_a_selected_backend_reports_its_obstacle(monkeypatch):
    x = torch.zeros(1, device=DEVICE)
    with pytest.raises(RuntimeError, match="op: backend 'triton' was requested, but it is Tuesday"):
        backend.use_triton("op", x, "it is Tuesday")
    monkeypatch.setattr(backend, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match=r"a tensor on cpu needs Triton's interpreter \(TRITON_INTERPRET"):
        backend.use_triton("op", torch.zeros(1))
    monkeypatch.setattr(backend, "triton", None)
    with pytest.raises(RuntimeError, match=r"Triton is not installed \(pip install triton\)"):
        backend.use_triton("op", x)
    kernels.set_backend("auto")
    assert not backend.use_triton("op", x)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="set_backend: expected one of auto, triton, reference, got 'fast'"):
        kernels.set_backend("fast")
    assert kernels.get_backend() == "triton"


def in_process(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_the_environment_makes_the_first_choice():
    code = "import kernels; print(kernels.get_backend())"
    assert in_process(code, HRM_KERNELS="reference").stdout == "reference\n"


def test_without_triton_everything_imports_and_runs_its_reference():
    code = """
import sys
sys.modules["triton"] = None
import torch, kernels
x = torch.ones(2, 4)
assert torch.equal(kernels.rms_norm(x, x, 0.0), x) and kernels.backend.triton is None
"""
    done = in_process(code, HRM_KERNELS="auto")
    assert done.returncode == 0, done.stderr


def test_recorded_launches_are_not_run():
    x = torch.empty(5, 32, device="meta")
    module = sys.modules["kernels.rms_norm"]
    with backend.recorded() as recorded:
        module._forward(x, x, 1e-5)
    assert [launch.kernel for launch in recorded] == [module._rms_norm_forward_kernel]
    assert recorded[0].grid == (1,) and recorded[0].args[4:6] == (5, 32)
    assert recorded[0].constants["BLOCK_N"] == 32
