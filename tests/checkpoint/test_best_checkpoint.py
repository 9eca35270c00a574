"""The best checkpoint stays and is found; further tensors are saved, checked and read like the weights."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hrm.checkpoint.read import (
    CheckpointError,
    best_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    read_manifest,
)
from hrm.checkpoint.save import save_checkpoint
from tests.support.checkpoints import names, refused, reseal, save, write_manifest

EMA = "ema.safetensors"


def save_scored(folder: Path, *scores: float | None, keep: int | None = 1) -> None:
    """Checkpoints of the steps 1, 2, ... with these scores, the best kept."""
    for step, score in enumerate(scores, start=1):
        save(folder, step, step, score=score, keep=keep, keep_best=True)


def save_extra(folder: Path, step: int, value: float) -> Path:
    return save(folder, step, value, extra={EMA: {"w": torch.full((3, 4), -value)}})


# --- further tensors


def test_further_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    flat = torch.randn(100)
    extra = {
        EMA: {"view": flat[:6].view(2, 3), "half": torch.randn(4).bfloat16(), "same": flat[:6]},
        "a-b.c.safetensors": {"x": torch.nn.Parameter(torch.randn(2, 5)).t()},
        "none.safetensors": {},
    }
    path = save(tmp_path, 4, 1.5, extra=extra)
    assert names(path) == sorted(["manifest.json", "model.safetensors", "training.pt", *extra])
    read = load_checkpoint(path)
    assert read.extra.keys() == extra.keys()
    for name, tensors in extra.items():
        assert read.extra[name].keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert read.extra[name][key].dtype == tensor.dtype
            assert torch.equal(read.extra[name][key], tensor)
        assert read.manifest["files"][name]["size"] == (path / name).stat().st_size
    # The others are as they would be without.
    assert read.weights.keys() == {"w", "b"} and read.training["value"] == 1.5
    assert load_checkpoint(save(tmp_path, 5)).extra == {}


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "training.pt", "ema.pt", "../ema.safetensors", ".safetensors", "a/b.safetensors"],
)
def test_names_that_further_tensors_cannot_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a further"):
        save(tmp_path / "run", 1, extra={name: {}})
    assert names(tmp_path) == []


def test_a_damaged_extra_file_is_reported_and_the_previous_checkpoint_is_used(tmp_path: Path) -> None:
    save_extra(tmp_path, 1, 1.0)
    damaged = save_extra(tmp_path, 2, 2.0) / EMA
    data, choose = damaged.read_bytes(), random.Random(0)
    cases = [data[:-1], data + b"\0", b""]
    for position in [0, len(data) - 1, *(choose.randrange(len(data)) for _ in range(10))]:
        flipped = bytes([data[position] ^ (1 << choose.randrange(8))])
        cases.append(data[:position] + flipped + data[position + 1 :])
    for case in cases:
        damaged.write_bytes(case)
        refused(tmp_path / "step_2", str(damaged), "is damaged")
        read = load_checkpoint(tmp_path)
        assert read.step == 1 and read.extra[EMA]["w"].eq(-1).all()
        assert len(read.notes) == 1 and str(damaged) in read.notes[0]
    damaged.unlink()
    refused(tmp_path / "step_2", str(damaged), "is missing")
    damaged.write_bytes(data)
    assert load_checkpoint(tmp_path).extra[EMA]["w"].eq(-2).all()


def test_an_extra_file_that_is_not_safetensors(tmp_path: Path) -> None:
    path = save_extra(tmp_path, 1, 1.0)
    (path / EMA).write_bytes(b"PK not tensors")
    reseal(path)
    refused(path, str(path / EMA), "cannot be read as safetensors")
    # Nor is a file of another kind read because a manifest lists it.
    (path / "ema.pt").write_bytes(b"")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["ema.pt"] = {"size": 0, "sha256": ""}
    write_manifest(path, manifest)
    refused(path, "manifest.json is damaged (wrong digest or fields)")


def test_the_space_that_further_tensors_need_is_counted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="8 MiB needed"):
        save(tmp_path / "file" / "run", 1, extra={EMA: {"w": torch.zeros(2 << 20)}})


# --- the best


def test_the_best_survives_pruning(tmp_path: Path) -> None:
    save_scored(tmp_path, 0.1, 0.9, 0.5, 0.6, 0.7, keep=2)
    assert names(tmp_path) == ["step_2", "step_4", "step_5"]
    assert best_checkpoint(tmp_path) == tmp_path / "step_2"
    assert latest_checkpoint(tmp_path) == (tmp_path / "step_5", [])
    assert load_checkpoint(tmp_path).step == 5
    assert read_manifest(tmp_path / "step_2")["score"] == 0.9


def test_a_better_checkpoint_replaces_the_best(tmp_path: Path) -> None:
    save_scored(tmp_path, 0.3, 0.2, -0.1)
    assert names(tmp_path) == ["step_1", "step_3"]
    save(tmp_path, 4, score=0.4, keep=1, keep_best=True)
    assert names(tmp_path) == ["step_4"] and best_checkpoint(tmp_path) == tmp_path / "step_4"
    save(tmp_path, 5, score=0.1, keep=1, keep_best=True)
    assert names(tmp_path) == ["step_4", "step_5"]


def test_the_first_of_equal_scores_is_the_best(tmp_path: Path) -> None:
    save_scored(tmp_path, 0.2, 0.5, 0.5, 0.5)
    assert names(tmp_path) == ["step_2", "step_4"]
    assert best_checkpoint(tmp_path) == tmp_path / "step_2"
    # By when it was saved, not by its number: a run that went back.
    save(tmp_path, 1, score=0.5, keep=None)
    assert best_checkpoint(tmp_path) == tmp_path / "step_2"


def test_negated_losses_are_scores(tmp_path: Path) -> None:
    save_scored(tmp_path, -3.0, -1.0, -2.0)
    assert names(tmp_path) == ["step_2", "step_3"]


def test_the_best_is_kept_only_on_request(tmp_path: Path) -> None:
    for step, score in ((1, 0.9), (2, 0.1)):
        save(tmp_path, step, score=score, keep=1)
    assert names(tmp_path) == ["step_2"]
    assert best_checkpoint(tmp_path) == tmp_path / "step_2"


def test_checkpoints_without_a_score_cannot_be_the_best(tmp_path: Path) -> None:
    save_scored(tmp_path, None, float("nan"), -5.0, float("inf"), None, keep=2)
    assert names(tmp_path) == ["step_3", "step_4", "step_5"]
    assert best_checkpoint(tmp_path) == tmp_path / "step_3"
    assert read_manifest(tmp_path / "step_4")["score"] is None
    shutil.rmtree(tmp_path / "step_3")
    assert best_checkpoint(tmp_path) is None
    save(tmp_path, 6, keep=1, keep_best=True)
    assert names(tmp_path) == ["step_6"]


def test_scores_of_numpy_and_torch(tmp_path: Path) -> None:
    scores: list[Any] = [np.float32(0.25), torch.tensor(0.5), 0]
    save_scored(tmp_path, *scores)
    assert names(tmp_path) == ["step_2", "step_3"]
    assert read_manifest(tmp_path / "step_2")["score"] == 0.5


def test_manifests_from_before_there_were_scores(tmp_path: Path) -> None:
    path = save(tmp_path, 1, 1.0)
    manifest = read_manifest(path)
    del manifest["score"]
    write_manifest(path, manifest)
    read = load_checkpoint(path)
    assert (read.step, read.extra, best_checkpoint(tmp_path)) == (1, {}, None)
    save(tmp_path, 2, 2.0, score=0.0, keep=2, keep_best=True)
    assert names(tmp_path) == ["step_1", "step_2"] and best_checkpoint(tmp_path) == tmp_path / "step_2"


@pytest.mark.parametrize("score", ["0.5", True, [], float("nan"), float("inf"), 10**400])
def test_forged_scores(tmp_path: Path, score: Any) -> None:
    path = save(tmp_path, 1, score=0.5)
    write_manifest(path, read_manifest(path) | {"score": score})
    refused(path, "manifest.json", "damaged", "use an earlier checkpoint")
    assert best_checkpoint(tmp_path) is None


def test_a_damaged_best_checkpoint_is_skipped(tmp_path: Path) -> None:
    save_scored(tmp_path, 0.9, 0.7, 0.8, keep=None)
    (tmp_path / "step_1" / "training.pt").write_bytes(b"")
    assert best_checkpoint(tmp_path) == tmp_path / "step_3"
    (tmp_path / "step_3" / "manifest.json").unlink()
    assert best_checkpoint(tmp_path) == tmp_path / "step_2"
    shutil.rmtree(tmp_path / "step_2")
    assert best_checkpoint(tmp_path) is None and best_checkpoint(tmp_path / "missing") is None


def test_a_save_that_fails_prunes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_scored(tmp_path, 0.9, 0.1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hrm.checkpoint.save.save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(tmp_path, 3, weights={}, training={}, run={}, score=1.0, keep=1, keep_best=True)
    assert names(tmp_path) == ["step_1", "step_2"] and best_checkpoint(tmp_path) == tmp_path / "step_1"
