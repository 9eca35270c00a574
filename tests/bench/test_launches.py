"""The launches of a step: counted one by one, against the roofline's count by hand, and as they are kept."""

import json
from functools import cache
from importlib import import_module

import pytest
import torch

from bench import launches, roofline
from bench.ceilings import MACHINES, Ceilings
from bench.counts import OPERATIONS, Shape, Work, adam_atan2, swiglu_mlp_launches
from bench.launches import LENGTHS, PARTS, Launches, main, predictions, step, totals, work_of_launch
from kernels.backend import recorded

H200 = MACHINES["H200"]


@cache
def counted(arch: str = "v1", length: int = 81, batch: int = 768) -> dict[tuple[str, str], launches.Row]:
    return {(row.part, row.kernel): row for row in step(arch, batch, length, H200)}


def by_hand(arch: str, length: int) -> dict[str, dict[str, float]]:
    """Of each part and of the whole step, what the roofline counts for the kernels."""
    rows = roofline.step(Shape(768, length + 1), "kernels", gated=arch == "gated")
    parts = {part: [row for row in rows if row.part == part] for part in PARTS} | {"step": rows}
    return {part: roofline.totals(some, H200) for part, some in parts.items()}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("arch", ["v1", "gated"])
def test_the_step_is_the_one_counted_by_hand(arch, length):
    """FLOP to 1e-5 (the Q head). Bytes 2 to 5 % above: what PyTorch runs one by one, the roofline takes
    fused: three sources summed in one pass, a module's last norm, slices of the states' gradients.
    180 to 205 launches more: these, and those of few bytes for the losses and for skipped steps.
    """
    hand, rows = by_hand(arch, length), list(counted(arch, length).values())
    # By hand all sources of a gate have gradients. Those of the states are wanted by nobody: of L's three
    # sources two, of H's one.
    unasked = 2 * 3 * 768 * (length + 1) * 128 * 512 if arch == "gated" else 0
    for part in PARTS:
        flop = hand[part]["flop"] - (unasked if part == "backward" else 0)
        assert totals([row for row in rows if row.part == part])["flop"] == pytest.approx(flop, rel=1e-5)
    assert 1.02 < totals(rows)["bytes"] / hand["step"]["bytes"] < 1.05
    assert 180 < totals(rows)["launches"] - hand["step"]["launches"] < 205
    assert totals(rows)["ideal_s"] == pytest.approx(hand["step"]["predicted_s"], rel=0.03)


@pytest.mark.parametrize(
    ("part", "kernel", "op", "direction", "calls"),
    [
        ("forward", "_rms_norm_forward_kernel", "rms_norm", "forward", 16),
        ("forward", "_attention_forward_kernel", "attention", "forward", 24),
        ("backward", "_attention_backward_kernel", "attention", "backward", 8),
        ("forward", "_linear_scaled_forward_kernel", "linear_scaled", "forward", 12),
        ("forward", "_lm_head_forward_kernel", "lm_head_stablemax", "forward", 1),
        ("backward", "_lm_head_backward_kernel", "lm_head_stablemax", "backward", 1),
        ("update", "_sign_sgd_kernel", "sign_sgd", "update", 1),
    ],
)
def test_a_kernel_moves_what_is_counted_by_hand(part, kernel, op, direction, calls):
    row, work = counted()[part, kernel], OPERATIONS[op](Shape(768))[direction]
    assert (row.launches, row.flop) == (calls, calls * work.flop)
    # Beside it the factors of rows still to be normalised, and the head's sums of each program.
    assert row.bytes == pytest.approx(calls * work.bytes, rel=0.06 if "lm_head_backward" in kernel else 5e-3)


def test_the_norms_add_the_gradient_of_the_residual():
    """The backward of 14 of 16 norms reads a second gradient; the last norm of each module has none."""
    row, shape = counted()["backward", "_rms_norm_backward_kernel"], Shape(768)
    work = OPERATIONS["rms_norm"](shape)["backward"]
    second = shape.tokens * shape.D * shape.dtype.itemsize
    assert (row.launches, row.flop) == (16, 16 * work.flop)
    assert row.bytes == pytest.approx(16 * work.bytes + 14 * second, rel=5e-3)


def test_swiglu_is_fused_into_products_with_gradient():
    """Eight of the forward's blocks have one; the others write neither gate nor up."""
    rows, works = counted(), swiglu_mlp_launches(Shape(768))
    plain, taught = OPERATIONS["linear_swiglu"](Shape(768))["forward"], works["forward"][0]
    row = rows["forward", "_linear_swiglu_forward_kernel"]
    assert (row.launches, row.flop) == (24, 16 * plain.flop + 8 * taught.flop)
    assert row.bytes == pytest.approx(16 * plain.bytes + 8 * taught.bytes, rel=5e-3)
    row, work = rows["backward", "_swiglu_mlp_backward_kernel"], works["backward"][0]
    assert (row.launches, row.bytes, row.flop) == (8, 8 * work.bytes, 8 * work.flop)


def test_the_update_and_the_gates_move_what_is_counted_by_hand():
    rows = counted("gated")
    adam = rows["update", "_adam_atan2_kernel"]
    assert adam.bytes == pytest.approx(adam_atan2(Shape(768), gated=True)["update"].bytes, rel=1e-3)
    # Once, for clipping, the log and whether the update is made.
    norm = rows["update", "linalg_vector_norm"]
    assert norm.launches == 1 and norm.bytes == pytest.approx(4 / 30 * adam.bytes, rel=1e-3)
    gates = [OPERATIONS[op](Shape(768)) for op in ("gate_mix", "gate_mix_two")]
    forward = rows["forward", "_gate_mix_forward_kernel"]
    assert forward.flop == 4 * gates[0]["forward"].flop + 2 * gates[1]["forward"].flop
    # The weights' third for an absent source is not read, but comes along.
    moved = 4 * gates[0]["forward"].bytes + 2 * gates[1]["forward"].bytes
    assert forward.bytes == pytest.approx(moved, rel=1e-3)


def test_launches_of_the_model_by_hand():
    """6 calls of a module in each pass, 4 blocks each; two calls of the forward have a gradient."""
    rows = counted()
    for part, plain, taught in (("forward", 16, 8), ("target", 24, 0)):
        assert rows[part, "_attention_forward_kernel"].launches == plain + taught
        assert rows[part, "_linear_rms_forward_kernel"].launches == 2 * plain
        # The first block of a call has nothing deferred to scale by.
        assert rows[part, "_linear_scaled_forward_kernel"].launches == plain - plain // 4
        # The library makes q, k and v of a call's first block, and with gradient q, k, v, o and down.
        assert rows[part, "mm"].launches == plain // 4 + 3 * taught
    # Seven of each of eight blocks, for SwiGLU's kernel makes one; two of the Q head, one of the token table.
    assert rows["backward", "mm"].launches == 8 * 7 + 2 + 1
    longer = counted(length=900)
    assert longer["target", "_rope_kernel"].launches == 24
    assert longer["forward", "_scaled_dot_product_flash_attention"].launches == 24
    assert longer["backward", "_scaled_dot_product_flash_attention_backward"].launches == 8
    assert not any("attention" in kernel and kernel.endswith("_kernel") for _, kernel in longer)


def test_the_step_of_the_record_by_hand():
    """60 calls of two blocks, ten with gradient; a block's two halves each multiply three matrices."""
    rows = {(row.part, row.kernel): row for row in step("sic", 384, 81, H200)}
    B, T, D, inner, token_inner = 384, 82, 512, 1536, 256
    block = 6 * B * T * D * (inner + token_inner)
    heads = 8 * B * 81 * D * 11 + 2 * B * T * D * 11
    assert totals(list(rows.values()))["flop"] == pytest.approx(block * (120 + 2 * 20) + heads, rel=1e-4)
    for kernel in ("_normed_swiglu_forward_kernel", "_linear_scaled_forward_kernel"):
        assert rows["forward", kernel].launches == 2 * 120
    # Channels and tokens: the parts of a mean square, one for each 256 columns of gate and up.
    forward = rows["forward", "_normed_swiglu_forward_kernel"]
    whole = sum(
        2 * rows_ * (width + inner_) + 4 * width * inner_ + 4 * rows_ * (2 * inner_ // tile)
        for rows_, width, inner_, tile in ((B * T, D, inner, 256), (B * D, T, token_inner, 64))
    )
    taught = sum(4 * rows_ * inner_ for rows_, inner_ in ((B * T, inner), (B * D, token_inner)))
    assert forward.bytes == 120 * whole + 20 * taught
    for kernel in ("_normed_swiglu_scale_kernel", "_swiglu_mlp_backward_kernel"):
        assert rows["backward", kernel].launches == 2 * 20


def test_bytes_of_a_call():
    x, y = (torch.empty(4, 8, device="meta") for _ in range(2))
    row = torch.empty(8, device="meta")
    with Launches() as seen:
        x.view(8, 4).t()
        x.zero_()
        x.copy_(y)
        x.add_(y)
        x * row.expand(4, 8)
        x @ y.t()
        torch.empty_like(x)
    assert seen.works == {
        ("update", "zero_"): [Work(128)],
        ("update", "copy_"): [Work(256)],
        ("update", "add_"): [Work(384)],
        ("update", "mul"): [Work(128 + 32 + 128)],
        ("update", "mm"): [Work(128 + 128 + 64, 2 * 4 * 8 * 4)],
    }
    (total,) = [row for row in seen.rows(Ceilings(100.0, 10.0, "")) if row.kernel == "mm"]
    assert total == launches.Row("update", "mm", 1, 320, 256, 25.6)


def test_a_launch_moves_the_rows_of_a_table_that_it_touches():
    table, grad = torch.empty(1000, 64, device="meta"), torch.empty(5, 64, device="meta")
    lr, identifiers = torch.empty((), device="meta"), torch.empty(5, device="meta", dtype=torch.int32)
    with recorded() as made:
        import_module("kernels.sign_sgd")._update(table, identifiers, grad, lr, 0.1, None)
    assert work_of_launch(made[0]) == Work(3 * 5 * 64 * 4 + 5 * 4 + 4)


def test_the_kept_predictions_are_those_of_the_code():
    kept, now = json.loads(launches.RESULTS.read_text()), json.loads(json.dumps(predictions("H200", H200)))
    for written, made in zip(kept.pop("steps"), now.pop("steps"), strict=True):
        assert [written[key] for key in ("arch", "B", "S")] == [made[key] for key in ("arch", "B", "S")]
        ours = [
            [row for row in each["kernels"] if row["kernel"].endswith("_kernel")] for each in (written, made)
        ]
        assert ours[0] == ours[1] and len(ours[0]) > 10
        # PyTorch's versions differ in a kernel here and there.
        for quantity in ("launches", "bytes", "flop", "ideal_s"):
            assert written[quantity] == pytest.approx(made[quantity], rel=0.05)
            assert made[quantity] == pytest.approx(sum(made["parts"][part][quantity] for part in PARTS))
    written, made = kept.pop("record"), now.pop("record")
    assert written["published_s"] == made["published_s"]
    for before, after in zip(written["steps"], made["steps"], strict=True):
        assert before.keys() == after.keys()
        for key, value in after.items():
            assert before[key] == (value if isinstance(value, str) else pytest.approx(value, rel=0.05)), key
    assert kept == now


@pytest.mark.slow
def test_the_command(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(launches, "RESULTS", tmp_path / "launches.json")
    assert main(["--arch", "gated", "--batch", "96", "--machine", "A100", "--write"]) == 0
    out = capsys.readouterr().out
    assert "One step of gated, B=96, S=81" in out and "A100" in out and "No number is a measurement" in out
    assert "_gate_mix_weights_kernel" in out
    *parts, whole = (line.split() for line in out.splitlines()[-5:])
    assert [line[0] for line in parts] == list(PARTS) and whole[0] == "step"
    assert int(whole[1]) == sum(int(line[1]) for line in parts)
    assert json.loads((tmp_path / "launches.json").read_text())["machine"] == "H200"
    with pytest.raises(SystemExit):
        main(["--batch", "0"])
    assert "expected a positive integer" in capsys.readouterr().err
