"""Checkpoints as other trainers and the hub leave them: found, unwrapped, read without their code."""

import argparse
import json
import random
import subprocess
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml  # type: ignore[import-untyped]
from safetensors.torch import save_file

import train
from hrm.checkpoint.load_model import find_trained, load_trained
from hrm.checkpoint.read import CheckpointError
from hrm.checkpoint.weights import load_weights, read_weights
from hrm.common.hub import HubError
from hrm.evaluate import main as evaluate
from hrm.solve import main as solve
from tests.support.trained_runs import METADATA, make_config, make_model, make_run

CONFIG: dict[str, Any] = {
    "arch": {
        "name": "hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1",
        "loss": {"name": "losses@ACTLossHead", "loss_type": "stablemax_cross_entropy"},
        **{"hidden_size": 32, "num_heads": 4, "expansion": 2.0, "H_layers": 1, "L_layers": 1},
        **{"H_cycles": 2, "L_cycles": 2, "halt_max_steps": 3, "halt_exploration_prob": 0.1},
        **{"puzzle_emb_ndim": 32, "pos_encodings": "rope"},
    },
    "data_path": "data/sudoku",
    "global_batch_size": 8,
    "lr_warmup_steps": 3,
}
SIZES = ("hidden_size", "num_heads", "expansion", "H_layers", "L_layers", "H_cycles", "L_cycles")
WEIGHTS = make_model(make_config(), seed=1).state_dict()
SHAPES = {name: tensor.shape for name, tensor in WEIGHTS.items()}


class AttributeDict(dict[str, Any]):
    """As Lightning wraps hyper-parameters."""


class Bomb:
    """Writes a file when it is trusted."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return subprocess.call, (["touch", str(self.trace)],)


def prefixed(prefix: str, scale: float = 1.0) -> dict[str, torch.Tensor]:
    return OrderedDict((prefix + name, scale * tensor) for name, tensor in WEIGHTS.items())


def eqr(**more: Any) -> dict[str, Any]:
    """As EqR's save_checkpoint: states of three generators, and a configuration."""
    return {
        "step": 3,
        "model": prefixed("model._orig_mod.inner."),
        "optimizers": [{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}],
        "rng": {"torch": torch.random.get_rng_state(), "cuda": None},
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "carry": argparse.Namespace(z_H=torch.zeros(2), steps=torch.zeros(1, dtype=torch.int32)),
        "config": {k: v for k, v in CONFIG.items() if k != "data_path"} | {"dataset": {"data_path": "d/e"}},
        "ema": {"mu": 0.9, "shadow": prefixed("model.inner.", 2.0)},
        **more,
    }


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".yaml"):
            path.write_text(yaml.safe_dump(content))
        elif name.endswith(".safetensors"):
            save_file(content, path)
        else:
            torch.save(content, path)
    return folder


LIGHTNING = {"state_dict": prefixed("model."), "hyper_parameters": AttributeDict(CONFIG), "epoch": 3}
FOLDERS: dict[str, tuple[dict[str, Any], str]] = {
    "HRM's on the hub": ({"checkpoint": prefixed("_orig_mod.model.inner.")}, "checkpoint"),
    "the same in safetensors": ({"m.safetensors": prefixed("_orig_mod.model.inner.")}, "m.safetensors"),
    "TRM's run": (
        {
            "step_90": prefixed("_orig_mod.model.inner.", 3.0),
            "step_100": prefixed("_orig_mod.model.inner."),
            "step_100_all_preds.0": {"preds": torch.zeros(3)},
        },
        "step_100",
    ),
    "URM's run": (
        {"step_9.pt": {"model_state_dict": prefixed("model.module.inner."), "optimizer_states": [{}]}},
        "step_9.pt",
    ),
    "EqR's run": ({"step_3_run1.pth": eqr()}, "step_3_run1.pth"),
    "a parallel run": ({"last.pt": {"state_dict": prefixed("module._orig_mod.")}}, "last.pt"),
    "Lightning's": ({"epoch=3.ckpt": LIGHTNING}, "epoch=3.ckpt"),
    "a folder below": ({"sudoku/eqr.pth": {"model": prefixed("model.inner.")}}, "sudoku/eqr.pth"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_as_users_have_them(name, tmp_path):
    files, file = FOLDERS[name]
    write(tmp_path, {**files, "all_config.yaml": CONFIG})
    for path in (tmp_path, tmp_path / file):
        weights, notes = load_weights(path, SHAPES)
        assert notes == [] and weights.keys() == WEIGHTS.keys()
        assert all(torch.equal(tensor, WEIGHTS[name]) for name, tensor in weights.items())
        trained = load_trained(path, device="cpu", metadata=METADATA)
        assert trained.path == tmp_path / file and trained.config.arch.halt_max_steps == 3


@pytest.mark.parametrize(
    ("content", "data_path"),
    [(eqr(), "d/e"), (LIGHTNING, "data/sudoku"), ({**LIGHTNING, "x": {1: 2}}, None)],
)
def test_the_configuration_in_a_file(content, data_path, tmp_path):
    write(tmp_path, {"a.pth": content})
    found = find_trained(tmp_path)
    assert found.config.arch.hidden_size == 32 and found.config.data_path == (data_path or "data/sudoku")
    # A file beside it is what the user can change.
    write(tmp_path, {"all_config.yaml": {**CONFIG, "data_path": "elsewhere"}})
    assert find_trained(tmp_path).config.data_path == "elsewhere"


def test_the_average_in_a_file(tmp_path):
    write(tmp_path, {"a.pth": eqr()})
    trained = load_trained(tmp_path, device="cpu", metadata=METADATA, ema=True)
    assert torch.equal(trained.model.lm_head.weight, 2 * WEIGHTS["lm_head.weight"])
    # The puzzle table is not averaged: its rows follow the data.
    assert torch.equal(trained.model.puzzle_emb.weights, WEIGHTS["puzzle_emb.weights"])
    load_trained(tmp_path, device="cpu", metadata=METADATA, ema=True, reset_puzzle_emb=True)
    write(tmp_path, {"a.pth": eqr(ema=None)})
    with pytest.raises(CheckpointError, match="has no averaged weights"):
        load_trained(tmp_path, device="cpu", metadata=METADATA, ema=True)


def test_no_object_of_a_file_is_constructed(tmp_path):
    bomb = Bomb(tmp_path / "ran")
    write(tmp_path, {"a.pth": eqr(python=bomb, extra={"b": bomb})})
    assert torch.equal(read_weights(tmp_path).weights["lm_head.weight"], WEIGHTS["lm_head.weight"])
    for content in (eqr(model=bomb), bomb, {"model": {"w": bomb}}, eqr(python={1}), eqr(python=bytearray)):
        write(tmp_path, {"a.pth": content})
        with pytest.raises(CheckpointError, match=r"is not a (state dict|torch file)"):
            read_weights(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_several_files_are_listed_in_the_error(tmp_path):
    write(tmp_path, {"a.pt": WEIGHTS, "b.safetensors": WEIGHTS, "ema.safetensors": WEIGHTS})
    with pytest.raises(
        CheckpointError, match=r"holds several checkpoints: a\.pt, b\.safetensors; give one of"
    ):
        read_weights(tmp_path)
    write(tmp_path / "below", {"one/eqr.pth": WEIGHTS, "two/eqr.pth": WEIGHTS})
    with pytest.raises(CheckpointError, match=r"several checkpoints: one/eqr\.pth, two/eqr"):
        read_weights(tmp_path / "below")
    # A first save that did not finish is none.
    write(tmp_path / "empty", {".tmp_step_9/model.safetensors": WEIGHTS})
    with pytest.raises(CheckpointError, match="holds no step_<N> folder"):
        read_weights(tmp_path / "empty")


def test_command_line_keys_override_the_file(tmp_path, tiny_sudoku, capsys):
    """Data that the configuration does not name, or names twice."""
    cells = make_model(make_config({"puzzle_emb_ndim": 0}), METADATA)
    assert cells.puzzle_emb is None
    write(tmp_path, {"checkpoint": {f"_orig_mod.model.inner.{n}": t for n, t in cells.state_dict().items()}})
    config = {**CONFIG, "arch": {**CONFIG["arch"], "puzzle_emb_ndim": 0}}
    for paths, note in ((["data/a", "data/b"], "trained on several data sets (data/a, data/b)"), (None, "")):
        write(tmp_path, {"all_config.yaml": {**config, "data_path": None, "data_paths": paths}})
        assert evaluate([f"checkpoint={tmp_path}", f"data_path={tiny_sudoku}", "samples=4"]) == 0
        assert note in capsys.readouterr().out
    assert evaluate([f"checkpoint={tmp_path}"]) == 2
    assert "(data set not named): no such data set; give data_path=DIR" in capsys.readouterr().err


# --- on the hub


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_on_the_hub(name, fake_hub):
    files, file = FOLDERS[name]
    write(fake_hub.served / "someone/model", {**files, "all_config.yaml": CONFIG})
    for other in ("README.md", "trm.py", "losses.py", "config.json"):
        (fake_hub.served / "someone/model" / other).write_text("raise SystemExit(1)")
    trained = load_trained("hub:someone/model", device="cpu", metadata=METADATA)
    assert torch.equal(trained.model.lm_head.weight, WEIGHTS["lm_head.weight"])
    assert trained.config.arch.halt_max_steps == 3
    assert [asked[-1] for asked in fake_hub.asked] == [file, "all_config.yaml"]


def test_one_of_several_on_the_hub(fake_hub):
    """A folder for each task, as EqR's and TRM's repositories have them; a configuration above."""
    served = write(
        fake_hub.served / "lab/all", {"maze/step_9": WEIGHTS, "runs/sudoku/step_9_a.pth": eqr(config=None)}
    )
    write(served, {"runs/sudoku/step_3_b.pth": eqr(model={}), "runs/all_config.yaml": CONFIG})
    write(served, {"arc/step_9": WEIGHTS})
    with pytest.raises(
        CheckpointError,
        match=r"several checkpoints: arc/step_9, maze/step_9; give .*, such as hub:lab/all/arc/step_9$",
    ):
        find_trained("hub:lab/all")
    assert fake_hub.asked == []
    for path in ("runs/sudoku", "runs/sudoku/step_9_a.pth"):
        assert find_trained(f"hub:lab/all@main/{path}").config.data_path == "data/sudoku"
        assert [asked[2:] for asked in fake_hub.asked[-2:]] == [
            ("main", "runs/sudoku/step_9_a.pth"),
            ("main", "runs/all_config.yaml"),
        ]
    with pytest.raises(CheckpointError, match="hub:lab/all/gone: no file of weights there"):
        find_trained("hub:lab/all/gone")
    with pytest.raises(
        CheckpointError, match=r"hub:lab/all/arc: .* expected all_config\.yaml next to step_9"
    ):
        find_trained("hub:lab/all/arc")
    fake_hub.error = fake_hub.utils.OfflineModeIsEnabled()
    assert find_trained("hub:lab/all/runs/sudoku").config.data_path == "data/sudoku"
    with pytest.raises(HubError, match="hub:lab/all/maze: it is not in the cache"):
        find_trained("hub:lab/all/maze")


def test_a_run_of_this_trainer_on_the_hub(fake_hub):
    run = fake_hub.served / "me/run"
    for step in (7, 10):
        make_run(run, step=step)
    (run / "metrics.jsonl").write_text("{}")
    assert find_trained("hub:me/run").file.parent.name == "step_10"
    names = ["manifest.json", "model.safetensors", "training.pt"]
    assert [asked[-1] for asked in fake_hub.asked] == [*(f"step_10/{name}" for name in names), "config.yaml"]
    assert find_trained("hub:me/run/step_7").file.parent.name == "step_7"


def test_commands_take_a_checkpoint_on_the_hub(fake_hub, tmp_path, tiny_sudoku, capsys):
    arch = {**CONFIG["arch"], "puzzle_emb_ndim": 0}
    model = make_model(make_config({"puzzle_emb_ndim": 0}), replace(METADATA, seq_len=16))
    weights = {f"_orig_mod.model.inner.{name}": tensor for name, tensor in model.state_dict().items()}
    write(fake_hub.served / "lab/hrm", {"checkpoint": weights, "all_config.yaml": {**CONFIG, "arch": arch}})
    assert evaluate(["checkpoint=hub:lab/hrm", f"data_path={tiny_sudoku}", "samples=4", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["all"]["count"] == 4 and "downloading 2 files" in told.err
    page = tmp_path / "page.html"
    assert solve(["hub:lab/hrm", "123.3.1221.3.321", "--html", str(page)]) in (0, 1)
    html = page.read_text(encoding="utf-8")
    assert "hub:lab/hrm/checkpoint, " in html
    assert str(fake_hub.cache) not in html + capsys.readouterr().out
    small = ["arch.puzzle_emb_ndim=0", *(f"arch.{key}={arch[key]}" for key in SIZES), "max_steps=1"]
    small += ["device=cpu", "mode=eager", f"output_dir={tmp_path}", f"data_path={tiny_sudoku}", "lr=0"]
    small += ["global_batch_size=8", "weight_decay=0", "run_name=run", "eval_interval=null"]
    assert train.main([*small, "checkpoint_path=hub:lab/hrm"]) == 0
    assert "starting from the weights of hub:lab/hrm" in capsys.readouterr().out
    started = read_weights(tmp_path / tiny_sudoku.name / "run").weights
    assert torch.equal(started["lm_head.weight"], model.lm_head.weight)
