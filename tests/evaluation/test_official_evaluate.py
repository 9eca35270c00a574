"""A folder of the official trainer gives the official evaluator's numbers, both programs run as they stand.

On the CPU. Needs a checkout of the official code, named by HRM_REPO, and is skipped without one.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml  # type: ignore[import-untyped]

# Before the stand-ins of the official code's packages are there to be found.
import hrm.evaluation.metrics  # noqa: F401
from hrm import evaluate
from hrm.data.format import PuzzleSet
from hrm.data.writer import Shape, new_dataset
from tests.support import official

REASON = official.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

V, S, PUZZLES, BATCH = 7, 16, 6, 8
STEP = 120
# What the official programs import, and these tests do not use.
UNUSED = ("wandb", "coolname", "hydra", "adam_atan2")
THEIRS = ("pretrain", "evaluate", "puzzle_dataset", "utils", "dataset")


class OnCpu(ModuleType):
    """torch, except that "cuda" means the CPU."""

    def __getattr__(self, name: str) -> Any:
        if name == "device":
            return lambda _: torch.device("cpu")
        if name == "zeros":
            return lambda *args, **options: torch.zeros(*args, **{**options, "device": "cpu"})
        if name == "load":
            return lambda file, **_: torch.load(file, map_location="cpu")
        return getattr(torch, name)


class NoOptimizer:
    """Stands in for the official optimiser, which evaluation makes and does not use."""

    def __init__(self, *_: Any, **__: Any) -> None: ...


@contextmanager
def official_programs(patch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The official `pretrain` and `evaluate`, importable inside the `with` only, on the CPU."""
    with official.official_code(), patch.context() as inside:
        for name in UNUSED:
            stub = ModuleType(name)
            vars(stub).update(AdamATan2=NoOptimizer, main=lambda **_: lambda function: function)
            inside.setitem(sys.modules, name, stub)
        inside.setenv("DISABLE_COMPILE", "1")
        inside.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
        try:
            pretrain = importlib.import_module("pretrain")
            program = importlib.import_module("evaluate")
            for module in (pretrain, program):
                vars(module)["torch"] = OnCpu("torch")
            # Without workers; what they would load is what the data set yields.
            vars(pretrain)["DataLoader"] = lambda dataset, **_: dataset
            yield SimpleNamespace(pretrain=pretrain, program=program)
        finally:
            for name in [name for name in sys.modules if name.split(".")[0] in THEIRS]:
                del sys.modules[name]


def write_data(folder: Path, labels: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """A data set with two test sets, 21 and 9 examples of four puzzles; returns their inputs."""
    rng = np.random.default_rng(3)
    inputs = {name: rng.integers(1, V, (count, S)).astype(np.uint8) for name, count in (("a", 21), ("b", 9))}
    with new_dataset(folder) as writer:
        for split in ("train", "test"):
            shape = writer.split(split, Shape(seq_len=S, vocab_size=V))
            for name, rows in inputs.items():
                ends = np.array([0, 2, 3, len(rows) - 1, len(rows)], np.int32)
                answers = rows if labels is None else labels[name]
                part = PuzzleSet(
                    inputs=rows,
                    labels=answers,
                    puzzle_identifiers=np.array([1, 3, 2, 5], np.int32),
                    puzzle_indices=ends,
                    group_indices=np.arange(5, dtype=np.int32),
                )
                shape.add(name, part)
        writer.close([f"puzzle {i}" for i in range(PUZZLES)])
    return inputs


def official_config(pretrain: Any, data: Path, folder: Path, **arch: Any) -> Any:
    """A run's configuration, as Hydra would hand it to the official trainer."""
    sizes = {"hidden_size": 32, "num_heads": 4, "expansion": 2, "H_layers": 1, "L_layers": 2}
    cycles = {"H_cycles": 2, "L_cycles": 2, "halt_max_steps": 3, "halt_exploration_prob": 0.1}
    return pretrain.PretrainConfig(
        arch={
            "name": "hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1",
            "loss": {"name": "losses@ACTLossHead", "loss_type": "stablemax_cross_entropy"},
            **{**sizes, **cycles, "puzzle_emb_ndim": 32, "pos_encodings": "rope"},
            "forward_dtype": "float32",
            **arch,
        },
        data_path=str(data),
        global_batch_size=BATCH,
        epochs=100,
        eval_interval=10,
        lr=1e-4,
        lr_min_ratio=1.0,
        lr_warmup_steps=2000,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.95,
        puzzle_emb_lr=1e-2,
        puzzle_emb_weight_decay=0.1,
        project_name="Sudoku ACT-torch",
        run_name="HierarchicalReasoningModel_ACTV1 brave-heron",
        checkpoint_path=str(folder),
        checkpoint_every_eval=True,
    )


def write_official_run(pretrain: Any, config: Any, prefix: str) -> Path:
    """What the official trainer leaves: all_config.yaml and a step's state dict, here of random weights."""
    _, metadata = pretrain.create_dataloader(
        config, "train", 0, 1, test_set_mode=False, epochs_per_iter=1, global_batch_size=BATCH
    )
    torch.manual_seed(0)
    state = pretrain.init_train_state(config, metadata, world_size=1)
    state.step = STEP
    weights = state.model.state_dict()
    for name in ("q_head.weight", "q_head.bias", "puzzle_emb.weights"):
        weights[f"model.inner.{name}"].copy_(torch.randn_like(weights[f"model.inner.{name}"]))
    folder = Path(config.checkpoint_path)
    pretrain.save_train_state(config, state)
    if prefix:
        file = folder / f"step_{STEP}"
        torch.save({prefix + name: weight for name, weight in torch.load(file).items()}, file)
    with open(folder / "all_config.yaml", "w") as text:
        yaml.dump(config.model_dump(), text)
    return folder / f"step_{STEP}"


def official_numbers(programs: Any, file: Path, patch: pytest.MonkeyPatch) -> dict[str, dict[str, float]]:
    """What the official evaluate.py prints."""
    shown: list[Any] = []
    with patch.context() as inside:
        inside.setattr(sys, "argv", ["evaluate.py", f"checkpoint={file}"])
        vars(programs.program)["print"] = lambda *words: shown.extend(words)
        programs.program.launch()
    return {name: {k: float(v) for k, v in each.items()} for name, each in shown[-1].items()}


def our_numbers(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert evaluate.main([*words, "--json", "device=cpu"]) == 0
    numbers: dict[str, Any] = json.loads(capsys.readouterr().out)
    return numbers


@pytest.mark.parametrize(
    ("prefix", "arch"),
    [
        ("", {}),
        ("_orig_mod.", {"pos_encodings": "learned", "puzzle_emb_ndim": 48, "halt_max_steps": 2}),
        ("_orig_mod.", {"puzzle_emb_ndim": 20, "rope_theta": 500.0, "rms_norm_eps": 1e-3}),
    ],
)
def test_the_official_evaluators_numbers(prefix, arch, tmp_path, monkeypatch, capsys):
    data, run = tmp_path / "data", tmp_path / "run"
    inputs = write_data(data)
    with official_programs(monkeypatch) as programs:
        config = official_config(programs.pretrain, data, run, **arch)
        file = write_official_run(programs.pretrain, config, prefix)
        # The answers of half of the puzzles are the model's own, and of some cells no answer is known.
        saved = tmp_path / "predictions.npz"
        our_numbers(capsys, f"checkpoint={run}", f"save_predictions={saved}")
        predictions, labels = np.load(saved), {}
        for name, rows in inputs.items():
            labels[name] = np.where(
                np.arange(len(rows))[:, None] % 2, predictions[f"{name}__predictions"], rows
            )
            labels[name][:, ::5] = 0
        write_data(data, labels)
        expected = official_numbers(programs, file, monkeypatch)
    for checkpoint in (run, file):
        ours = our_numbers(capsys, f"checkpoint={checkpoint}")
        assert list(ours) == list(expected) == ["a", "b"]
        for name, metrics in expected.items():
            assert {key: ours[name][key] for key in metrics} == pytest.approx(metrics, rel=1e-6, abs=1e-7)
            # Where the model says 0 everywhere nothing is asked.
            assert ours[name]["count"] == (labels[name] > 0).any(axis=1).sum() > 5
            assert 0 < ours[name]["exact_accuracy"] < 1
    # The predictions, against the logits that the official evaluator saved, in batches filled up.
    logits = torch.load(run / f"step_{STEP}_all_preds.0")["logits"]
    for name, first in (("a", 0), ("b", 24)):
        ours = predictions[f"{name}__predictions"]
        assert np.array_equal(logits[first : first + len(ours)].argmax(-1).numpy(), ours)


def test_an_official_folder_is_read_as_one_of_ours(tmp_path, monkeypatch, capsys):
    data, run = tmp_path / "data", tmp_path / "run"
    write_data(data)
    with official_programs(monkeypatch) as programs:
        config = official_config(programs.pretrain, data, run)
        write_official_run(programs.pretrain, config, "")
    numbers = our_numbers(capsys, f"checkpoint={run}", "eval_act=true", "halt_max_steps=5", "batch_size=4")
    assert numbers["a"]["steps"] == 5 and len(numbers["a"]["eval_act"]["steps_histogram"]) == 5
    assert sum(numbers["a"]["eval_act"]["steps_histogram"]) == 21
