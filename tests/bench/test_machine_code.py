"""Every kernel compiled for every GPU generation, and the committed table of what came out."""

import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kernels
from bench.kernel_launches import cases
from bench.machine_code import RESULTS, SHARED_MEMORY, Source, digest, faults, kept_rows
from kernels.backend import recorded, triton

NEEDS_TRITON = pytest.mark.skipif(triton is None, reason="Triton is not installed")

ROW = {"target": "sm_90", "stack": 0, "shared_memory": 100, "matrix": True, "tensor_core": 8}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, []),
        ({"stack": 16}, ["16 bytes of stack: registers spill"]),
        ({"shared_memory": 300000}, ["300000 bytes of shared memory, of 232448"]),
        ({"target": "sm_120", "shared_memory": 110000}, ["110000 bytes of shared memory, of 101376"]),
        ({"tensor_core": 0}, ["no tensor-core instruction"]),
        ({"tensor_core": 0, "matrix": False}, []),
    ],
)
def test_faults(change, fault):
    assert faults(ROW | change) == fault


CODE = """
from kernels.backend import jit, tl

SCALE = tl.constexpr(2)

@jit
def _scaled(x):
    return x * SCALE

@jit
def _kernel(x, y, N: tl.constexpr):
    tl.store(y, _scaled(tl.load(x)) + N)
"""


def digest_of(folder: Path, code: str, **changes: Any) -> str:
    """The digest of a kernel whose module holds that code."""
    path = folder / f"kernel_{len(list(folder.iterdir()))}.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    source = Source(module._kernel, {"x": "*fp32", "N": "constexpr"}, {"N": 4}, {}, {"num_warps": 4})
    return digest(source._replace(**changes))


@NEEDS_TRITON
@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("", "", True),
        ("SCALE = tl", "# Twice.\n\nSCALE = tl", True),
        ("def _kernel(x, y, N: tl.constexpr):", 'def _kernel(x, y, N: tl.constexpr):\n    """Add."""', True),
        ("+ N", "- N", False),
        ("x * SCALE", "x + SCALE", False),
        ("constexpr(2)", "constexpr(3)", False),
    ],
)
def test_a_digest_changes_with_the_code_that_a_kernel_reaches(tmp_path, old, new, same):
    changed = CODE.replace(old, new, 1)
    assert (digest_of(tmp_path, CODE) == digest_of(tmp_path, changed)) is same


@NEEDS_TRITON
def test_a_digest_changes_with_the_launch(tmp_path, monkeypatch):
    changes: list[dict[str, Any]] = [{}, {"signature": {"x": "*bf16", "N": "constexpr"}}]
    changes += [{"constants": {"N": 8}}, {"attributes": {(0,): [["tt.divisibility", 16]]}}]
    changes += [{"options": {"num_warps": 8}}]
    found = {digest_of(tmp_path, CODE, **change) for change in changes}
    monkeypatch.setattr(triton, "__version__", "0")
    assert len(found | {digest_of(tmp_path, CODE)}) == len(changes) + 1


def test_a_row_of_each_operation_is_always_compiled():
    rows = json.loads(RESULTS.read_text())["rows"]
    kept = kept_rows()
    left_out = {row["op"]: row["target"] for row in rows if (row["digest"], row["target"]) not in kept}
    assert left_out.keys() == {row["op"] for row in rows}
    assert set(left_out.values()) == {f"sm_{capability}" for capability in SHARED_MEMORY}
    assert len(kept) > 4 * len(left_out)


def key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["op"], row["case"], row["kernel"], row["target"], *row["programs"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if triton is None:
        pytest.skip("Triton is not installed; it is not built for this system")
    path: Path = tmp_path_factory.mktemp("machine_code") / "table.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.machine_code", "--changed", "--write", path],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert path.exists(), done.stdout + done.stderr
    table = json.loads(path.read_text())
    assert done.returncode == any(faults(row) for row in table["rows"]), done.stderr
    return table


def test_no_launch_spills_or_outgrows_its_gpu_or_leaves_the_tensor_cores(compiled):
    wrong = [(key(row), faults(row)) for row in compiled["rows"] if faults(row)]
    assert not wrong
    assert {row["target"] for row in compiled["rows"]} == {f"sm_{capability}" for capability in SHARED_MEMORY}
    # A kernel that both lengths launch has them in one row, or a row for each.
    lengths = {row["op"]: set[str]() for row in compiled["rows"]}
    for row in compiled["rows"]:
        lengths[row["op"]] |= set(row["programs"])
    assert lengths.pop("attention") == {"T=82"} and all(
        found == {"T=82", "T=901"} for found in lengths.values()
    )


def test_every_kernel_is_inspected():
    launched = set()
    for by_length in cases().values():
        for case in by_length.values():
            with recorded() as launches:
                case.call()
            launched |= {launch.kernel.__name__ for launch in launches}
    modules = [importlib.import_module(f"kernels.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    defined = {
        name
        for module in modules
        for name in vars(module)
        if name.startswith("_") and name.endswith("_kernel")
    }
    assert launched == defined and len(defined) > 1


def test_the_committed_table_is_that_of_this_code(compiled):
    """`python -m bench.machine_code --changed --write` renews it after a kernel has changed."""
    committed = json.loads(RESULTS.read_text())
    assert sorted(map(key, committed["rows"])) == sorted(map(key, compiled["rows"]))
    if committed["triton"] == compiled["triton"]:
        assert {key(row): row for row in committed["rows"]} == {key(row): row for row in compiled["rows"]}
