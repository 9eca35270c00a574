"""Starting from other weights: another run's, official ones, and what does not fit is named."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hrm.checkpoint.read import (
    CheckpointError,
)
from hrm.checkpoint.save import save_checkpoint
from hrm.checkpoint.weights import load_weights
from tests.support.checkpoints import save


def state(gates: bool = False, rows: int = 6, width: int = 8, layers: int = 1) -> dict[str, Tensor]:
    """A state dict of the official names with random values."""
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.embedding_weight": (11, width),
        "lm_head.weight": (11, width),
        "q_head.weight": (2, width),
        "q_head.bias": (2,),
        "puzzle_emb.weights": (rows, width),
        "H_init": (width,),
        "L_init": (width,),
    }
    for level in ("H_level", "L_level"):
        for i in range(layers):
            shapes[f"{level}.layers.{i}.self_attn.qkv_proj.weight"] = (3 * width, width)
            shapes[f"{level}.layers.{i}.mlp.down_proj.weight"] = (width, 16)
        if gates:
            shapes[f"{level}.gating_network.gate_proj.0.weight"] = (2, 3 * width)
            shapes[f"{level}.gating_network.gate_proj.0.bias"] = (2,)
    generator = torch.Generator().manual_seed(rows + width)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def shapes_of(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_weights_from_every_kind_of_source(tmp_path: Path) -> None:
    weights = state()
    run = tmp_path / "run"
    save(run, 1)
    step = save_checkpoint(run, 2, weights=weights, training={}, run={})
    save_file(weights, tmp_path / "plain.safetensors")
    official = OrderedDict((f"_orig_mod.model.inner.{name}", tensor) for name, tensor in weights.items())
    (tmp_path / "official").mkdir()
    torch.save(official, tmp_path / "official" / "step_900")
    eager = {f"model.inner.{name}": tensor + 1 for name, tensor in weights.items()}
    torch.save(eager, tmp_path / "official" / "step_1000")
    (tmp_path / "official" / "step_1000_all_preds.0").write_bytes(b"")
    for source in (run, step, tmp_path / "plain.safetensors", tmp_path / "official" / "step_900"):
        read, notes = load_weights(source, shapes_of(weights))
        assert equal(read, weights) and notes == []
    # of a folder of the official code, the last step
    for source in (tmp_path / "official", tmp_path / "official" / "step_1000"):
        read, notes = load_weights(source, shapes_of(weights))
        assert equal(read, {name: tensor + 1 for name, tensor in weights.items()}) and notes == []


def test_initial_states_of_chains_are_omitted_or_new(tmp_path: Path) -> None:
    one = state()
    many = {**one, "L_chains": torch.zeros(2, 8)}
    for saved, wanted, text in (
        (many, one, "only the initial state of the first chain is used"),
        (one, many, "keep their initial"),
    ):
        step = save_checkpoint(tmp_path / text, 1, weights=saved, training={}, run={})
        read, notes = load_weights(step, shapes_of(wanted))
        assert equal(read, one) and len(notes) == 1 and text in notes[0]
    with pytest.raises(CheckpointError, match=r"L_chains is \(2, 8\) there, \(3, 8\) here"):
        load_weights(
            tmp_path / "only the initial state of the first chain is used",
            shapes_of({**one, "L_chains": torch.zeros(3, 8)}),
        )


def test_weights_of_a_run_whose_newest_is_damaged(tmp_path: Path) -> None:
    weights = state()
    save_checkpoint(tmp_path, 1, weights=weights, training={}, run={})
    (save(tmp_path, 2) / "model.safetensors").write_bytes(b"")
    read, notes = load_weights(tmp_path, shapes_of(weights))
    assert equal(read, weights) and len(notes) == 1 and "step_2" in notes[0]


def test_v1_weights_into_a_gated_model(tmp_path: Path) -> None:
    weights, gated = state(), state(gates=True)
    torch.save(weights, tmp_path / "step_3")
    read, notes = load_weights(tmp_path / "step_3", shapes_of(gated))
    assert equal(read, weights)
    assert len(notes) == 1 and "no gate networks" in notes[0] and "its 4 tensors keep" in notes[0]
    # a gated checkpoint fits itself without a note, but neither with a gate missing nor an ungated model
    torch.save(gated, tmp_path / "step_4")
    assert equal(load_weights(tmp_path / "step_4", shapes_of(gated))[0], gated)
    assert load_weights(tmp_path / "step_4", shapes_of(gated))[1] == []
    with pytest.raises(CheckpointError, match=r"another architecture: H_level\.gating\S+ is unknown here"):
        load_weights(tmp_path / "step_4", shapes_of(weights))
    del gated["L_level.gating_network.gate_proj.0.bias"]
    torch.save(gated, tmp_path / "step_5")
    with pytest.raises(
        CheckpointError, match=r"L_level\.gating_network\.gate_proj\.0\.bias is missing there"
    ):
        load_weights(tmp_path / "step_5", shapes_of(state(gates=True)))


def test_another_architecture_is_reported(tmp_path: Path) -> None:
    torch.save(state(width=8, layers=2), tmp_path / "step_1")
    with pytest.raises(CheckpointError) as caught:
        load_weights(tmp_path / "step_1", shapes_of(state(width=12)))
    message = str(caught.value)
    assert "step_1 is a checkpoint of another architecture" in message and "\n" not in message
    assert "embed_tokens.embedding_weight is (11, 8) there, (11, 12) here" in message
    assert "and 11 more" in message and "arch.*" in message
    torch.save(state(layers=2), tmp_path / "step_1")
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.qkv_proj\.weight is unknown here"):
        load_weights(tmp_path / "step_1", shapes_of(state()))
    # a wider puzzle table is another architecture, not another data set
    wide = state() | {"puzzle_emb.weights": torch.zeros(6, 16)}
    torch.save(wide, tmp_path / "step_1")
    for reset in (False, True):
        with pytest.raises(
            CheckpointError, match=r"another arch.*puzzle_emb\.weights is \(6, 16\) there, \(6, 8\)"
        ):
            load_weights(tmp_path / "step_1", shapes_of(state()), reset_puzzle_emb=reset)


def test_a_puzzle_table_of_another_length(tmp_path: Path) -> None:
    weights = state(rows=6)
    torch.save(weights, tmp_path / "step_1")
    expected = shapes_of(state(rows=40))
    with pytest.raises(CheckpointError) as caught:
        load_weights(tmp_path / "step_1", expected)
    for part in ("a puzzle table of 6 rows", "40 are needed here", "reset_puzzle_emb=true"):
        assert part in str(caught.value)
    without = {name: tensor for name, tensor in weights.items() if name != "puzzle_emb.weights"}
    for shapes in (expected, shapes_of(weights), shapes_of(state(rows=40, gates=True))):
        read, notes = load_weights(tmp_path / "step_1", shapes, reset_puzzle_emb=True)
        assert equal(read, without) and "6 rows" in notes[0]
    # a model without a table has none to reset
    with pytest.raises(CheckpointError, match=r"puzzle_emb\.weights is unknown here"):
        load_weights(tmp_path / "step_1", shapes_of(without), reset_puzzle_emb=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"w": 3}}, "not a state dict"),
        ({"w": 3}, "not a state dict"),
        ({3: torch.zeros(1)}, "not a state dict"),
        ({"w": torch.zeros(1, dtype=torch.int64)}, "not a state dict"),
        ({"w": torch.eye(2).to_sparse()}, "refers to torch._utils._rebuild_sparse_tensor, which was not run"),
        ({"w": torch.zeros(1).expand(9)}, "not a state dict"),
        ([torch.zeros(1)], "not a state dict"),
        ({"w": torch.zeros(1), "model.inner.w": torch.zeros(1)}, "holds w twice"),
    ],
)
def test_files_that_hold_no_weights(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "step_1")
    with pytest.raises(CheckpointError, match=message):
        load_weights(tmp_path / "step_1", {"w": torch.Size([1])})


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"PK\x03\x04", b"<html>", b"\x80\x02}q\0."])
def test_files_that_are_something_else(tmp_path: Path, data: bytes) -> None:
    for name in ("step_1", "weights.safetensors"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(
            CheckpointError, match=rf"{name} (is not a torch file|cannot be read as safetensors)"
        ):
            load_weights(tmp_path / name, {})
    with pytest.raises(CheckpointError, match="does not exist"):
        load_weights(tmp_path / "nowhere", {})
