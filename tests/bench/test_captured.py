"""The accounts of a captured step, from a recorded log, against sums worked out by hand."""

import json
from pathlib import Path

import pytest
import torch

from bench import captured, launches, roofline
from bench.captured import LABELS, account, keep, launches_by_kernel, main, phases, predicted, table
from bench.ceilings import MACHINES
from tests.cuda_host.stand_in import read_log


def line(kind: str, name: str, part: str, graph: int = 1, **facts: object) -> str:
    return json.dumps({"kind": kind, "name": name, "part": part, "stream": 1, "graph": graph, **facts})


LOG = (
    line("capture", "begin", "step", mode="global"),
    line("memset", "memset", "step", bytes=40),
    line("kernel", "triton_poi_fused_add_0", "step/forward", source="triton"),
    line("kernel", "triton_poi_fused_add_0", "step/forward", source="triton"),
    line("kernel", "_rms_norm_forward_kernel", "step/forward/L", source="triton"),
    line("kernel", "cublasGemmEx", "step/forward", source="library", m=4, n=6, k=2, batch=3, type=14),
    # The backward's kernels are numbered anew.
    line("kernel", "triton_poi_fused_add_0", "step/backward", source="triton"),
    line("kernel", "cublasSgemm", "step/backward", source="library", m=4, n=6, k=2, batch=1, type=0),
    line("kernel", "_ZN2at6native7reduce", "step/backward", source="aten"),
    line("event", "record", "step/backward", event=3),
    line("kernel", "_ZN2at6native7reduce", "step/optimiser", source="aten"),
    line("kernel", "_adam_atan2_kernel", "step/optimiser", source="triton"),
    line("memcpy", "memcpy", "step", graph=1, bytes=100, **{"from": "device", "to": "device"}),
    # What runs beside the graph is no node of it.
    line("memcpy", "memcpy", "step/data", graph=0, bytes=7, **{"from": "pinned", "to": "device"}),
    line("capture", "end", "step"),
)
COUNTED = {
    ("forward", "triton_poi_fused_add_0"): 1000.0,
    ("backward", "triton_poi_fused_add_0"): 30.0,
    ("forward", "_rms_norm_forward_kernel"): 500.0,
    ("update", "_adam_atan2_kernel"): 28.0,
    ("update", "aten"): 64.0,
}


@pytest.fixture
def records(tmp_path: Path):
    (tmp_path / "log").write_text("\n".join(LOG) + "\n")
    return read_log(tmp_path / "log")


def test_nodes_are_counted_by_part_and_origin(records):
    found = account(records, COUNTED)
    cell = dict(zip(("launches", "bytes", "uncounted"), (0, 0, 0), strict=True))
    assert found["parts"] == {
        "forward": {
            "inductor": {**cell, "launches": 2, "bytes": 2000},
            "custom": {**cell, "launches": 1, "bytes": 500},
            "library": {**cell, "launches": 1, "bytes": (8 + 12 + 24) * 3 * 2},
        },
        "backward": {
            "inductor": {**cell, "launches": 1, "bytes": 30},
            "library": {**cell, "launches": 1, "bytes": (8 + 12 + 24) * 4},
            "aten": {"launches": 1, "bytes": 0, "uncounted": 1},
        },
        "update": {
            "memset": {**cell, "launches": 1, "bytes": 40},
            "aten": {**cell, "launches": 1, "bytes": 64},
            "custom": {**cell, "launches": 1, "bytes": 28},
            "memcpy": {**cell, "launches": 1, "bytes": 200},
        },
    }
    assert found["nodes"] == found["launches"] == 11 and found["uncounted"] == 1
    assert found["bytes"] == 2000 + 500 + 264 + 30 + 176 + 40 + 64 + 28 + 200


def test_a_kernel_without_a_count_is_marked_uncounted(records):
    found = account(records, {})
    assert found["parts"]["forward"]["inductor"] == {"launches": 2, "bytes": 0, "uncounted": 2}
    assert found["parts"]["update"]["aten"] == {"launches": 1, "bytes": 0, "uncounted": 1}
    assert found["uncounted"] == 7


def test_kernels_are_counted_separately_by_part(records):
    found = launches_by_kernel(records)
    assert found["forward", "inductor", "triton_poi_fused_add_0"] == 2
    assert found["backward", "inductor", "triton_poi_fused_add_0"] == 1
    assert sum(found.values()) == 9


def test_this_projects_kernels_have_the_eager_counts():
    found = predicted("v1", 4, 81)
    rows = launches.step("v1", 4, 81, MACHINES["H200"])
    both = [row for row in rows if row.kernel == "_linear_swiglu_forward_kernel"]
    assert {row.part for row in both} == {"forward", "target"}
    mean = sum(row.bytes for row in both) / sum(row.launches for row in both)
    assert found["forward", "_linear_swiglu_forward_kernel"] == pytest.approx(mean)
    rest = [row for row in rows if row.part == "update" and not row.kernel.endswith("_kernel")]
    assert found["update", "aten"] == sum(row.bytes for row in rest) > 0


def test_phases_are_summed_and_short_ones_omitted():
    times = {"Scheduler.codegen": [1.0, 0.55], "bytecode_tracing": [20.0], "small": [0.5, 0.4]}
    assert list(phases(times).items()) == [("bytecode_tracing", 20.0), ("Scheduler_codegen", 1.6)]


def test_rows_are_kept_by_label_and_the_latest_is_shown(monkeypatch, tmp_path, records, capsys):
    monkeypatch.setattr(captured, "RESULTS", tmp_path / "captured.json")
    monkeypatch.setattr(roofline, "CAPTURED", tmp_path / "captured.json")
    assert roofline.captured("v1", 768, 81) == ""
    row = {"arch": "v1", "B": 768, "S": 81, **account(records, COUNTED)}
    for label, launched in (("after", 7), ("before", 12), ("after", 11)):
        keep({**row, "launches": launched}, label)
    keep({**row, "B": 96, "launches": 5}, "before")
    steps = json.loads((tmp_path / "captured.json").read_text())["steps"]
    assert [len(steps[label]) for label in LABELS] == [2, 1]
    assert "B=96, S=81, 5 launches, 0.0 MB" in roofline.captured("v1", 96, 81)
    assert launches.main(["--batch", "768"]) == 0
    assert "v1, B=768, S=81, 11 launches, 0.0 MB, without the bytes of 1 launches" in capsys.readouterr().out
    lines = table(row).splitlines()
    assert lines[-1].split() == ["step", "11", "0.0", "1"] and len(lines) == 12


@pytest.mark.skipif(torch.version.cuda is not None, reason="this is a CUDA build of torch")
def test_the_command_needs_a_cuda_build(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "is no CUDA build; make cuda-host creates an environment" in capsys.readouterr().err
