"""The roofline's counts: against sizes worked out by hand, against each other, and as they are kept."""

import json

import pytest
import torch

from bench import ceilings, roofline
from bench.ceilings import MACHINES, Ceilings, roofline_time
from bench.counts import OPERATIONS, Shape, Work, eager, product, traced
from bench.roofline import VARIANTS, main, predictions, step, totals
from hrm.config.load import parse_args
from hrm.model.hrm import HRM

H200 = MACHINES["H200"]
# The published Sudoku run on one GPU: 768 sequences of 81 cells and a puzzle token.
FULL = Shape(768)


def test_a_step_of_the_published_model_in_numbers():
    rows = step(FULL, "compiled", whole_target=True)
    parts = ("forward", "target", "backward")
    flop = {part: sum(row.total("flop") for row in rows if row.part == part) for part in parts}
    total = sum(flop.values())
    assert total == pytest.approx(28.2e12, rel=2e-3)
    assert [flop[part] / total for part in flop] == pytest.approx([0.37, 0.37, 0.25], abs=0.006)
    sums = totals(rows, H200)
    assert sums["arithmetic_floor_s"] == pytest.approx(35.7e-3, rel=2e-3)
    # A perfect serial roofline of what the compiler fuses was estimated as 56 ms.
    assert sums["predicted_s"] == pytest.approx(56e-3, rel=0.03)


def test_fusion_gains_equal_the_omitted_kernels():
    # Forty blocks have no gradient; every one of 48 has two norms and one rotation.
    for op, count, saved in (("swiglu", 40, 5.4e-3), ("rms_norm", 96, 4.3e-3), ("rope", 48, 2.9e-3)):
        work = OPERATIONS[op](FULL)["forward"]
        assert count * roofline_time(work.bytes, work.flop, H200) == pytest.approx(saved, rel=0.01)


def test_forward_flop_of_a_token_and_a_block():
    works = [work for works in roofline.block(Shape(1), "kernels").values() for work in works]
    attention = 4 * 82 * 512
    assert sum(work.flop for work in works) / 82 == 6_815_744 + attention


@pytest.mark.parametrize("arch", ["v1", "gated"])
def test_parameters_are_those_of_the_model(arch):
    config = parse_args(["--arch", arch, "preset=full"])
    with torch.device("meta"):
        model = HRM(config.arch, vocab_size=11, seq_len=81, num_puzzle_identifiers=1)
    shape, a = Shape(1), config.arch
    assert (shape.D, shape.heads, shape.layers, shape.H_cycles, shape.L_cycles) == (
        a.hidden_size, a.num_heads, a.H_layers, a.H_cycles, a.L_cycles,
    )  # fmt: skip
    assert shape.parameters(arch == "gated") == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("op", OPERATIONS)
def test_bytes_grow_with_the_batch_and_the_dtype(op):
    small, large, wide = (OPERATIONS[op](s) for s in (Shape(8), Shape(16), Shape(8, dtype=torch.float32)))
    for direction, work in small.items():
        assert work.bytes > 0 and work.launches >= 1
        if op not in ("adam_atan2", "adamw", "muon"):
            assert work.bytes < large[direction].bytes <= 2 * work.bytes
            assert work.bytes <= wide[direction].bytes <= 2 * work.bytes
            assert work.flop <= large[direction].flop == 2 * work.flop


def test_counts_by_hand():
    s = Shape(B=2, T=3, D=256, heads=4, P=1)
    rows, item = 6, 2
    assert OPERATIONS["rms_norm"](s)["forward"] == Work(3 * rows * 256 * item + 4 * rows)
    assert s.inner == 768 and OPERATIONS["swiglu"](s)["backward"] == Work(5 * rows * 768 * item)
    assert product(s, 256, 768)["forward"] == Work((rows * 1024 + 256 * 768) * item, 2 * rows * 256 * 768)
    assert OPERATIONS["attention"](s)["forward"].flop == 2 * 2 * (2 * 4 * 3 * 3 * 64)
    assert OPERATIONS["attention"](s)["backward"].bytes == 7 * rows * 256 * item + 2 * 3 * 64 * 4
    assert OPERATIONS["sign_sgd"](s)["update"].bytes == 2 * (3 * 256 * 4 + 4)
    machine = Ceilings(10.0, 5.0, "")
    assert roofline_time(100, 10, machine) == 10 and roofline_time(1, 10, machine) == 2


def test_eager_counts_every_kernel_and_no_view():
    x = torch.empty(4, 8, device="meta", requires_grad=True)
    row = torch.empty(8, device="meta")
    works = traced(lambda x: (x.view(8, 4).t().contiguous() * row.expand(4, 8)).sum(-1), x)
    copy, product, sum_ = works["forward"]
    assert copy.bytes == 2 * 128 and product.bytes == 128 + 32 + 128 and sum_.bytes == 128 + 16
    weight = torch.empty(5, 8, device="meta")
    (one,) = traced(lambda x: torch.nn.functional.linear(x, weight), x.detach())["forward"]
    assert one == Work(4 * (32 + 40 + 20), 2 * 4 * 8 * 5)


# No reference is counted for these.
ALONE = ("linear", "swiglu_mlp", "normed", "adam", "muon", "sign")


@pytest.mark.parametrize("op", [op for op in OPERATIONS if not op.startswith(ALONE)])
def test_eager_moves_more_than_the_fused_kernel(op):
    for direction, works in eager(op, Shape(8)).items():
        fused = OPERATIONS[op](Shape(8))[direction]
        assert len(works) > fused.launches and sum(work.bytes for work in works) > fused.bytes


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [Shape(1), Shape(768), Shape(96, 901)])
def test_fusing_more_moves_less(shape, gated):
    sums = [totals(step(shape, variant, gated=gated), H200) for variant in VARIANTS]
    for quantity in ("predicted_s", "bytes", "launches"):
        values = [each[quantity] for each in sums]
        assert values == sorted(values, reverse=True) and values[0] > values[2]
    assert all(each["arithmetic_floor_s"] < each["predicted_s"] for each in sums)
    assert sums[1]["flop"] == pytest.approx(sums[0]["flop"], rel=1e-3)


def test_the_target_pass_saves_most_of_a_block():
    flop = [totals(step(FULL, "kernels", whole_target=whole), H200)["flop"] for whole in (True, False)]
    assert flop[0] - flop[1] == pytest.approx(0.77 * 6_815_744 * FULL.tokens, rel=0.05)


def test_the_kept_predictions_are_those_of_the_code():
    kept, now = json.loads(roofline.RESULTS.read_text()), json.loads(json.dumps(predictions("H200", H200)))
    for written, counted in zip(kept["steps"], now["steps"], strict=True):
        if counted["variant"] == "eager":
            # PyTorch's versions differ in a kernel here and there.
            assert written["bytes"] == pytest.approx(counted["bytes"], rel=0.05)
        else:
            assert written == counted
    assert {**kept, "steps": []} == {**now, "steps": []}


def test_the_command(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(roofline, "RESULTS", tmp_path / "roofline.json")
    assert main(["--machine", "RTX 4090", "--write"]) == 0
    out = capsys.readouterr().out
    assert "Predictions for RTX 4090" in out and "None is a measurement" in out and "datasheet" in out
    kept = json.loads((tmp_path / "roofline.json").read_text())
    assert kept["machine"] == "RTX 4090" and "predictions" in kept["what"]
    with pytest.raises(SystemExit):
        main(["--machine", "H300"])
    assert "invalid choice: 'H300'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            main(["--machine", "here"])
        assert "--machine here needs a CUDA device" in capsys.readouterr().err
        with pytest.raises(RuntimeError, match="needs a CUDA device"):
            ceilings.measure()
