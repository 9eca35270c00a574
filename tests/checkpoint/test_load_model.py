"""Trained models from their folders: ours, of every kind of run, and the official code's; and refusals."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml  # type: ignore[import-untyped]
from safetensors.torch import load_file, save_file

from hrm.checkpoint.load_model import find_trained, load_trained
from hrm.checkpoint.read import CheckpointError
from hrm.common.errors import UserError
from hrm.config.messages import ConfigError
from hrm.config.schema import ArchConfig, Config, LossConfig, StageConfig
from hrm.data.dataset import Batch
from hrm.data.format import DatasetError
from hrm.engine.engine import Engine
from hrm.engine.inference import Inference
from hrm.engine.modes import EAGER
from hrm.model.hrm import HRM
from tests.support.checkpoints import reseal, write_manifest
from tests.support.trained_runs import METADATA, PUZZLES, S, V, make_config, make_model, make_run

OFFICIAL: dict[str, Any] = {
    "arch": {
        "name": "hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1",
        "loss": {"name": "losses@ACTLossHead", "loss_type": "softmax_cross_entropy"},
        "hidden_size": 32,
        "num_heads": 4,
        "expansion": 2,
        "H_layers": 1,
        "L_layers": 2,
        "H_cycles": 2,
        "L_cycles": 3,
        "halt_max_steps": 7,
        "halt_exploration_prob": 0.2,
        "puzzle_emb_ndim": 48,
        "pos_encodings": "rope",
    },
    "data_path": "data/sudoku",
    "global_batch_size": 12,
    "lr": 1e-05,
    "seed": 3,
    "eval_save_outputs": [],
    "project_name": None,
}


def describe_data(checkpoint: Path, data: Any) -> None:
    """Puts the description of the data into a checkpoint's manifest."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    write_manifest(checkpoint, {**manifest, "data": data})


def make_official(folder: Path, changes: Mapping[str, Any] | None = None, **arch: Any) -> Path:
    """A folder as the official trainer leaves it, with a v1 model's weights; returns the step's file."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**OFFICIAL, **(changes or {})}
    config["arch"] = {name: v for name, v in {**OFFICIAL["arch"], **arch}.items() if v is not None}
    (folder / "all_config.yaml").write_text(yaml.dump(config))
    own = ("hidden_size", "num_heads", "expansion", "H_layers", "L_layers", "puzzle_emb_ndim")
    model = make_model(Config(arch=ArchConfig(**{name: OFFICIAL["arch"][name] for name in own})))
    weights = {f"_orig_mod.model.inner.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(weights, folder / "step_50")
    return folder / "step_50"


def assert_weights(model: HRM, expected: Mapping[str, torch.Tensor]) -> None:
    own = model.state_dict()
    assert own.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(own[name], tensor), name


def test_a_run_of_ours_by_every_path(tmp_path):
    first, last = make_run(tmp_path / "run", step=3), make_run(tmp_path / "run", step=9)
    for path, checkpoint in ((tmp_path / "run", last), (last, last), (first, first), (str(first), first)):
        trained = load_trained(path, device="cpu", metadata=METADATA)
        assert trained.path == checkpoint and trained.notes == [] and trained.metadata == METADATA
        assert_weights(trained.model, load_file(checkpoint / "model.safetensors"))
    assert not any(parameter.requires_grad for parameter in trained.model.parameters())
    assert not trained.model.training
    # What was found once is not looked for again.
    found = find_trained(tmp_path / "run")
    assert load_trained(found, device="cpu", metadata=METADATA).path == last
    (last / "model.safetensors").write_bytes(b"")
    trained = load_trained(tmp_path / "run", device="cpu", metadata=METADATA)
    assert trained.path == first and len(trained.notes) == 1 and "damaged" in trained.notes[0]


def test_weights_next_to_a_configuration(tmp_path):
    checkpoint = make_run(tmp_path / "run")
    moved = tmp_path / "moved"
    moved.mkdir()
    for source in (checkpoint / "model.safetensors", tmp_path / "run" / "config.yaml"):
        (moved / source.name).write_bytes(source.read_bytes())
    trained = load_trained(moved / "model.safetensors", device="cpu", metadata=METADATA)
    assert_weights(trained.model, load_file(moved / "model.safetensors"))
    (moved / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"expected config.yaml or all_config.yaml in \S+/moved; copy"):
        find_trained(moved / "model.safetensors")


def test_the_average(tmp_path):
    averaged = {n: p + 1 for n, p in make_model(make_config()).named_parameters()}
    checkpoint = make_run(tmp_path, extra={"ema.safetensors": averaged})
    raw = load_file(checkpoint / "model.safetensors")
    assert_weights(load_trained(checkpoint, device="cpu", metadata=METADATA).model, raw)
    assert_weights(
        load_trained(checkpoint, device="cpu", metadata=METADATA, ema=True).model, {**raw, **averaged}
    )
    save_file({"q_head.bias": torch.zeros(3)}, checkpoint / "ema.safetensors")
    reseal(checkpoint)
    with pytest.raises(CheckpointError, match=r"does not fit the weights next to it: q_head\.bias differs"):
        load_trained(checkpoint, device="cpu", metadata=METADATA, ema=True)
    without = make_run(tmp_path, step=8)
    with pytest.raises(CheckpointError, match=r"has no averaged weights .* leave ema out"):
        load_trained(without, device="cpu", metadata=METADATA, ema=True)


def test_the_shape_comes_from_the_manifest_or_the_data_or_the_size(tmp_path, tiny_sudoku):
    checkpoint = make_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="is needed for its size, and nowhere is not there; give"):
        load_trained(checkpoint, device="cpu")
    describe_data(checkpoint, asdict(METADATA))
    assert load_trained(checkpoint, device="cpu").metadata == METADATA
    # The weights know best how many puzzles there were.
    describe_data(checkpoint, asdict(replace(METADATA, num_puzzle_identifiers=1, vocab_size=2)))
    assert load_trained(checkpoint, device="cpu").metadata == METADATA

    cells = replace(METADATA, seq_len=16, num_puzzle_identifiers=1)
    by_data = make_run(tmp_path / "data", make_config(data_path=str(tiny_sudoku)), cells)
    assert load_trained(by_data, device="cpu").metadata.seq_len == 16
    config = make_config(data_path=None)
    config.sudoku.size = 4
    by_size = make_run(tmp_path / "size", config, cells)
    trained = load_trained(by_size, device="cpu")
    assert (trained.metadata.seq_len, trained.metadata.vocab_size) == (16, 6)
    assert trained.model.length == 16 + trained.model.puzzle_emb_len


@pytest.mark.parametrize(
    "data",
    [
        [],
        {},
        {**asdict(METADATA), "seq_len": 1 << 40},
        {**asdict(METADATA), "seq_len": 0},
        {**asdict(METADATA), "pad_id": "0"},
        {**asdict(METADATA), "more": 1},
    ],
)
def test_a_manifest_that_describes_no_data(data, tmp_path):
    checkpoint = make_run(tmp_path)
    describe_data(checkpoint, data)
    with pytest.raises(CheckpointError, match="describes no data set under data; use another checkpoint"):
        load_trained(checkpoint, device="cpu")


def test_data_of_another_kind(tmp_path):
    checkpoint = make_run(tmp_path)
    with pytest.raises(CheckpointError, match="was trained on vocab_size 6, but the data has 7; use it on"):
        load_trained(checkpoint, device="cpu", metadata=replace(METADATA, vocab_size=7))
    more = replace(METADATA, num_puzzle_identifiers=8)
    with pytest.raises(CheckpointError, match=r"table of 5 rows, but 8 are needed .*reset_puzzle_emb=true"):
        load_trained(checkpoint, device="cpu", metadata=more)
    trained = load_trained(checkpoint, device="cpu", metadata=more, reset_puzzle_emb=True)
    assert trained.model.puzzle_emb is not None and torch.equal(
        trained.model.puzzle_emb.weights, torch.zeros(8, 32)
    )
    assert len(trained.notes) == 1 and "left out; the table starts fresh" in trained.notes[0]


@pytest.mark.parametrize(("position", "steps"), [([1, 0], 4), ([1, 3], 8), ([2, 0], 8), ([3, 0], 16)])
def test_a_run_of_stages_has_the_depth_of_its_last_epoch(position, steps, tmp_path):
    stages = [StageConfig(epochs=2, halt_max_steps=depth) for depth in (4, 8, 16)]
    config = make_config(stages=stages, epochs=6, eval_interval=2)
    checkpoint = make_run(tmp_path, config, training={"position": position})
    trained = load_trained(checkpoint, device="cpu", metadata=METADATA)
    assert trained.model.arch.halt_max_steps == trained.config.arch.halt_max_steps == steps
    broken = make_run(tmp_path, config, step=8, training={"position": "here"})
    with pytest.raises(CheckpointError, match="does not hold the position in the data"):
        load_trained(broken, device="cpu", metadata=METADATA)


def test_16_bits_are_those_of_training(tmp_path):
    config = make_config(dtype="bfloat16")
    make_run(tmp_path, config)
    trained = load_trained(tmp_path, device="cpu", metadata=METADATA)
    engine = Engine(config, METADATA, total_steps=1)
    engine.load_weights(load_file(trained.path / "model.safetensors"))
    rng = np.random.default_rng(0)
    inputs = rng.integers(1, V, (4, S), dtype=np.int32)
    batch = Batch(inputs, inputs, rng.integers(0, PUZZLES, 4, dtype=np.int32))
    ours = Inference(trained.model, 4, S, mode=EAGER, loss=LossConfig())
    theirs = engine.inference(4)
    for inference in (ours, theirs):
        inference.run(batch)
    assert torch.equal(ours.predictions, theirs.predictions) and torch.equal(ours.q_halt, theirs.q_halt)
    assert trained.model.lm_head.weight.dtype == torch.bfloat16
    assert trained.model.q_head.weight.dtype == torch.float32
    other = load_trained(tmp_path, device="cpu", metadata=METADATA, dtype="float32")
    assert other.model.lm_head.weight.dtype == torch.float32 == other.model.dtype
    with pytest.raises(ConfigError, match="dtype=half is not allowed: give auto, float32 or bfloat16"):
        load_trained(tmp_path, device="cpu", metadata=METADATA, dtype="half")


def test_an_official_folder(tmp_path):
    file = make_official(tmp_path)
    for path in (tmp_path, file):
        trained = load_trained(path, device="cpu", metadata=METADATA)
        assert trained.path == file and trained.notes == []
        weights = {n.removeprefix("_orig_mod.model.inner."): w for n, w in torch.load(file).items()}
        assert_weights(trained.model, weights)
    config = trained.config
    for name in set(OFFICIAL["arch"]) - {"name", "loss"}:
        assert getattr(config.arch, name) == OFFICIAL["arch"][name], name
    assert config.loss.loss_type == "softmax_cross_entropy"
    assert (config.data_path, config.global_batch_size, config.seed) == ("data/sudoku", 12, 3)
    assert not config.arch.use_gating and config.dtype == "auto"


def test_other_keys_of_an_official_configuration(tmp_path):
    make_official(
        tmp_path,
        {"new_option": [1, {"a": 2}], "seed": 4},
        forward_dtype="float32",
        puzzle_emb_ndim=48,
        use_gating=True,
        gate_init_bias=-1.5,
    )
    found = find_trained(tmp_path)
    assert found.config.dtype == "float32"
    assert found.config.arch.use_gating and found.config.arch.gate_init_bias == -1.5
    assert len(found.notes) == 1 and "new_option is unknown and has no effect here" in found.notes[0]
    trained = load_trained(found, device="cpu", metadata=METADATA)
    assert "it has no gate networks" in trained.notes[1]

    make_official(
        tmp_path / "trm",
        {"data_path": "elsewhere", "data_paths": ["data/maze"]},
        name="recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1",
        H_layers=0,
        puzzle_emb_len=16,
        no_ACT_continue=True,
        mlp_t=False,
    )
    text = (tmp_path / "trm" / "all_config.yaml").read_text().replace("data_path: elsewhere\n", "")
    (tmp_path / "trm" / "all_config.yaml").write_text(text)
    config = find_trained(tmp_path / "trm").config
    assert config.arch.share_levels and config.arch.gradient == "last_cycle" and not config.arch.q_continue
    assert (config.arch.puzzle_emb_len, config.data_path) == (16, "data/maze")


@pytest.mark.parametrize(
    ("changes", "arch", "message"),
    [
        ({}, {"hidden_sise": 64}, r"line \d+: arch\.hidden_sise is unknown.*is it hidden_size\?"),
        ({}, {"name": "other@Model"}, r"line \d+: arch\.name ends in Model, expected one of Hierarch"),
        ({}, {"hidden_size": "many"}, r"arch\.hidden_size=many is not allowed: give a whole number"),
        ({}, {"num_heads": 5}, r"all_config\.yaml: arch\.hidden_size=32 is not a multiple of"),
        ({}, {"loss": {"name": "x", "scale": 2}}, r"arch\.loss\.scale is unknown"),
        ({}, {"loss": None}, r"no arch\.loss\.loss_type"),
        ({"global_batch_size": 0}, {}, r"global_batch_size=0 is not allowed"),
    ],
)
def test_official_configurations_that_are_refused(changes, arch, message, tmp_path):
    make_official(tmp_path, changes, **arch)
    with pytest.raises(ConfigError, match=message):
        find_trained(tmp_path)


def test_hostile_configurations(tmp_path):
    make_official(tmp_path)
    path = tmp_path / "all_config.yaml"
    path.write_text("arch: !!python/object/apply:os.system ['false']\n")
    with pytest.raises(ConfigError, match="expected `key: value` lines"):
        find_trained(tmp_path)
    path.write_text("arch: &a\n  <<: *a\n  name: *a\n")
    with pytest.raises(UserError):
        find_trained(tmp_path)
    path.write_text("#" * (2 << 20))
    with pytest.raises(ConfigError, match="too large, expected the configuration that a run saves"):
        find_trained(tmp_path)


def test_the_data_of_a_run_may_be_damaged(tmp_path):
    (tmp_path / "data" / "test").mkdir(parents=True)
    (tmp_path / "data" / "test" / "dataset.json").write_text("{}")
    make_run(tmp_path / "run", make_config(data_path=str(tmp_path / "data")))
    with pytest.raises(DatasetError, match=r"dataset\.json: pad_id is missing"):
        load_trained(tmp_path / "run", device="cpu")
