"""Targets that read what runs leave: checkpoints, official ones, metrics, configurations, plans."""

import hashlib
import io
import json
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

from tests.fuzz.configurations import YAML_WORDS, yaml_changed, yaml_seeds
from tests.fuzz.datasets import METADATA
from tests.fuzz.judge import Target, files_of, given, put
from tests.fuzz.mutations import PICKLE, json_changed, safetensors_changed, zip_changed


@cache
def checkpoint_files() -> dict[str, bytes]:
    """A checkpoint, and the folder of an official one beside its configuration."""
    import torch
    from safetensors.torch import save

    weights = {"H_init": torch.arange(4.0), "blocks.0.weight": torch.ones(2, 3)}
    state = {"optimizer": {"step": 3, "moments": [torch.zeros(4)]}, "position": [0, 1], "note": "a"}
    torch.save(state, training := io.BytesIO())
    files = {"model.safetensors": save(weights), "training.pt": training.getvalue()}
    manifest: dict[str, Any] = {"format": 1, "step": 3, "serial": 1, "score": 0.5, "run": RUN, "metrics": {}}
    manifest |= {"versions": {}, "config": None, "data": METADATA}
    manifest["files"] = {name: _entry(data) for name, data in files.items()}
    files["manifest.json"] = signed(manifest)
    named = {f"_orig_mod.model.inner.{name}": tensor for name, tensor in weights.items()}
    torch.save(named, file := io.BytesIO())
    return {
        **{f"step_3/{name}": data for name, data in files.items()},
        "official/step_7": file.getvalue(),
        "official/all_config.yaml": json.dumps(OFFICIAL).encode(),
    }


RUN = {"arch": {"H_layers": 1}, "seed": 0}
OFFICIAL = {
    "arch": {
        "name": "hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1",
        "loss": {"name": "losses@ACTLossHead", "loss_type": "stablemax_cross_entropy"},
        "hidden_size": 64,
        "num_heads": 4,
        "puzzle_emb_ndim": 64,
        "forward_dtype": "bfloat16",
    },
    "data_path": "data/sudoku",
    "global_batch_size": 96,
    "seed": 0,
    "lr": 7e-5,
}


def _entry(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _checkpoint(name: str, data: bytes, resign: bool) -> None:
    """Loads a checkpoint of which one file is another; resign: by somebody who knows how hashes are made."""
    from hrm.checkpoint.read import (
        best_checkpoint,
        differences,
        latest_checkpoint,
        load_checkpoint,
        read_manifest,
    )

    files = files_of("run", checkpoint_files)
    run = put(f"run/step_3/{name}", data).parents[1]
    try:
        if resign:
            manifest = json.loads(files["step_3/manifest.json"])
            manifest["files"] |= {name: _entry(data)}
            put("run/step_3/manifest.json", signed(manifest))
        _, notes = latest_checkpoint(run)
        best_checkpoint(run)
        if not all(note.isprintable() for note in notes):
            raise AssertionError("a note that is not one line")
        differences(read_manifest(run / "step_3"), RUN)
        load_checkpoint(run / "step_3")
    finally:
        put(f"run/step_3/{name}", files[f"step_3/{name}"])
        put("run/step_3/manifest.json", files["step_3/manifest.json"])


def signed(manifest: dict[str, Any]) -> bytes:
    """A manifest that vouches for itself."""
    manifest.pop("digest", None)
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "digest": digest}).encode()


def read_manifest_file(data: bytes) -> None:
    _checkpoint("manifest.json", data, resign=False)


def manifest_changed(random: Random, data: bytes) -> bytes:
    """A change that the digest does not tell."""
    changed = json_changed(random, data)
    try:
        return signed(json.loads(changed))
    except (ValueError, RecursionError, AttributeError, TypeError):
        return changed


def read_tensors(data: bytes) -> None:
    _checkpoint("model.safetensors", data, resign=True)


def read_training_file(data: bytes) -> None:
    _checkpoint("training.pt", data, resign=True)


def _official(name: str, data: bytes) -> None:
    from hrm.checkpoint.load_model import find_trained

    files = files_of("downloaded", checkpoint_files)
    folder = put(f"downloaded/official/{name}", data).parent
    try:
        find_trained(folder)
    finally:
        put(f"downloaded/official/{name}", files[f"official/{name}"])


def read_official(data: bytes) -> None:
    _official("step_7", data)


def read_official_config(data: bytes) -> None:
    _official("all_config.yaml", data)


def _seed(name: str) -> Callable[[], tuple[bytes, ...]]:
    return lambda: (checkpoint_files()[name],)


LINE = {
    "step": 1,
    "train/lm_loss": 1.5,
    "eval/all/exact_accuracy": None,
    "eval/all/count": 20,
    "model/parameters": 9,
}


def read_metrics(data: bytes) -> None:
    from hrm.study.history import read_history

    history = read_history(put("history/metrics.jsonl", data).parent)
    history.evaluation()
    _ = (history.seconds_per_step, history.parameters, history.total_steps, history.keys())


def read_run_config(data: bytes) -> None:
    from hrm.study.history import read_history

    put("history2/metrics.jsonl", json.dumps(LINE).encode() + b"\n")
    read_history(put("history2/config.yaml", data).parent)


@cache
def campaign() -> Any:
    from hrm.study.runs import Campaign

    return Campaign(put("campaign/plan.json", b"").parent, {"v1": ["preset=quick", "device=cpu"]}, [0])


def read_plan(data: bytes) -> None:
    campaign()
    put("campaign/plan.json", data)
    with campaign().opened():
        pass


@cache
def plan_seeds() -> tuple[bytes, ...]:
    from hrm.study.runs import settings

    values = {candidate.name: settings(candidate.config) for candidate in campaign().candidates}
    return (json.dumps({"seeds": [0], "candidates": values}).encode(),)


def metrics_changed(random: Random, data: bytes) -> bytes:
    lines = data.splitlines()
    number = random.randrange(len(lines))
    lines[number] = json_changed(random, lines[number])
    return b"\n".join(lines) + b"\n"


_LINES = b"".join(json.dumps({**LINE, "step": step}).encode() + b"\n" for step in (1, 2, 2, 3))
_CONFIG = "official/all_config.yaml"
TARGETS = (
    Target("manifest", read_manifest_file, _seed("step_3/manifest.json"), manifest_changed),
    Target("tensors", read_tensors, _seed("step_3/model.safetensors"), safetensors_changed),
    Target("training", read_training_file, _seed("step_3/training.pt"), zip_changed, PICKLE),
    Target("official", read_official, _seed("official/step_7"), zip_changed, PICKLE),
    Target("official_config", read_official_config, _seed(_CONFIG), json_changed, YAML_WORDS),
    Target("metrics", read_metrics, given(_LINES), metrics_changed),
    Target("run_config", read_run_config, yaml_seeds, yaml_changed, YAML_WORDS),
    Target("plan", read_plan, plan_seeds, json_changed),
)
