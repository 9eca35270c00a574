"""`python -m kernels` says what would run, and bench/README.md which kernels there are."""

import json
import re
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from bench.counts import OPERATIONS, Shape
from bench.operations import OPS
from kernels import backend
from kernels.__main__ import DTYPES, calls, main
from kernels.cases import Sizes
from kernels.linear import linear_choice
from tests.support.forked import start
from tests.support.paths import ROOT

# As the model calls them, but small.
SIZES = Sizes(batch_size=2, length=17, hidden_size=64, num_heads=2, parameters=64)


class Custom(TorchDispatchMode):
    """The names of this package's own operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "hrm_kernels":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def auto_backend():
    before = kernels.get_backend()
    kernels.set_backend("auto")
    yield
    kernels.set_backend(before)


def told(capsys, *words: str) -> dict:
    assert main(["--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def by_name(answer: dict) -> dict[str, tuple[str, str]]:
    return {row["op"]: (row["implementation"], row["why"]) for row in answer["operations"]}


def test_every_operation_is_queried():
    public = set(kernels.__all__) - {"get_backend", "set_backend"}
    assert public <= calls(torch.float32, SIZES).keys()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_explained_choices_match_real_calls(device, dtype):
    own = {"stablemax_cross_entropy": "cross_entropy", "softmax_cross_entropy": "cross_entropy"}
    own |= {"rms_norm_pair": "rms_norm", "lm_head_stablemax": "lm_head", "lm_head_softmax": "lm_head"}
    own |= {"adamw": "adam_atan2"}
    for op, call in calls(DTYPES[dtype], SIZES).items():
        with backend.explained(torch.device(device)) as choices, Custom() as custom, torch.no_grad():
            call()
        called = f"hrm_kernels::{own.get(op, op)}" in custom.names
        # The operation of the package itself in both cases: the references, and PyTorch's own, call none.
        assert (choices[op].implementation in ("triton", "onednn")) == called, op


def test_attention_names_the_library_that_it_leaves_long_sequences_to(capsys, monkeypatch):
    def attention(*words: str) -> dict:
        return told(capsys, *words)["operations"][0]

    short, long = attention("--device", "cuda"), attention("--device", "cuda", "--length", "901")
    assert short == {"op": "attention", "implementation": "triton", "why": "a tensor on CUDA"}
    assert long["implementation"] == "sdpa" and "at most 128 positions, got 901" in long["why"]
    monkeypatch.setattr("kernels.library_attention.FLASH2", object())
    assert attention("--device", "cuda", "--length", "901")["implementation"] == "flash"
    in_float32 = attention("--device", "cuda", "--length", "901", "--dtype", "float32")
    assert in_float32["implementation"] == "sdpa"


def test_auto_on_a_gpu_uses_a_faster_reference():
    gpu = torch.device("cuda")
    assert backend.decide(gpu, torch.float32) == ("triton", "a tensor on CUDA")
    assert backend.decide(gpu, torch.float32, slower="it rains") == ("reference", "it rains")
    assert backend.decide(gpu, torch.float32, obstacle="it is Tuesday") == ("reference", "it is Tuesday")
    assert backend.decide(gpu, torch.float64).implementation == "reference"
    kernels.set_backend("triton")
    assert backend.decide(gpu, torch.float64, slower="it rains").implementation == "triton"


def test_a_gpu_uses_kernels_and_a_cpu_uses_references(capsys):
    on_gpu, on_cpu = told(capsys, "--device", "cuda"), told(capsys, "--device", "cpu")
    assert on_gpu["dtype"] == "bfloat16" and on_cpu["dtype"] == "float32"
    gpu, cpu = (by_name(told_) for told_ in (on_gpu, on_cpu))
    product = cpu.pop("linear")
    assert gpu.pop("linear") == ("reference", "products on cuda use its library")
    large = torch.zeros(1).expand(10_000, 512)
    assert product == linear_choice(large, large)
    assert {taken for taken, _ in gpu.values()} == {"triton"}
    assert {taken for taken, _ in cpu.values()} == {"reference", "sdpa"}
    assert all("interpreter" in why for _, why in cpu.values())
    assert on_cpu["torch"] == torch.__version__ and len(on_cpu["devices"]) == torch.cuda.device_count()


def test_the_reason_is_the_operations_own(capsys):
    rows = told(capsys, "--device", "cuda", "--vocab-size", "20000", "--hidden-size", "4096")["operations"]
    why = {row["op"]: row["why"] for row in rows if row["implementation"] != "triton"}
    assert "vocabularies of at most 16384, got 20000" in why["stablemax_cross_entropy"]
    assert "hidden layers of at most 256, got 1024" in why["gate_mix"]
    assert "rms_norm" not in why


def test_a_selected_backend_is_reported(capsys, monkeypatch):
    kernels.set_backend("reference")
    rows = told(capsys, "--device", "cuda")["operations"]
    assert {row["why"] for row in rows} == {"backend 'reference' was requested"}
    kernels.set_backend("triton")
    monkeypatch.setattr(backend, "INTERPRETED", False)
    rows = told(capsys, "--device", "cpu")["operations"]
    kernels_alone = [row for row in rows if row["op"] != "linear"]
    assert {row["implementation"] for row in kernels_alone} == {"none"}
    assert all("needs Triton's interpreter" in row["why"] for row in kernels_alone)


def test_the_text_describes_everything(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    for word in (
        "torch",
        "triton",
        "flash_attn_2",
        "flash_attn_3",
        "device",
        "interpreter",
        "HRM_KERNELS",
        *OPS,
    ):
        assert word.removesuffix("_two") in out, word
    assert "batch_size 768, length 82, hidden_size 512, num_heads 8, vocab_size 11" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-size", "0"], "argument --batch-size: expected a positive integer, got '0'"),
        (["--length", "many"], "argument --length: expected a positive integer, got 'many'"),
        (
            ["--hidden-size", "500"],
            "argument --hidden-size: expected an even multiple of --num-heads 8, got 500",
        ),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_mistakes_name_the_flag(words, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_a_wrong_environment_is_named():
    code = "import sys; from kernels.__main__ import main; sys.exit(main([]))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"HRM_KERNELS": "fast"}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "HRM_KERNELS: expected one of auto, triton, reference, got 'fast'" in done.stderr


@pytest.mark.slow
def test_the_module_runs(tmp_path):
    with open(tmp_path / "said", "w") as said:
        assert start(["-m", "kernels", "--json"], stdout=said).wait() == 0
    assert json.loads((tmp_path / "said").read_text())["operations"]


# --------------------------------------------------------------------------- bench/README.md's table


def table() -> list[tuple[str, str]]:
    text = (ROOT / "bench" / "README.md").read_text()
    return re.findall(r"^\| `(\w+)` \| `test_operation\[(.+)\]` \|$", text, flags=re.MULTILINE)


def test_every_kernel_is_in_the_table_of_profiles():
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    defined = re.findall(r"^@jit\ndef (\w+_kernel)\(", sources, flags=re.MULTILINE)
    launched = re.findall(r"\blaunch\(\s+(\w+),", sources)
    assert set(launched) == set(defined) and defined
    assert sorted(name for name, _ in table()) == sorted(defined)


def test_every_profile_names_a_benchmark():
    known = {f"{op}-B768-{direction}-ours" for op in OPS for direction in OPERATIONS[op](Shape(768))}
    assert {test for _, test in table()} <= known


def test_every_file_of_the_suite_is_described():
    text = (ROOT / "bench" / "README.md").read_text()
    helpers = {"conftest.py", "implementations.py", "seeds.py"}
    files = {path.name for path in (ROOT / "bench").glob("*.py")} - helpers
    assert files == set(re.findall(r"^\| `(\w+\.py)` \|", text, flags=re.MULTILINE))
