"""A trained model, ready for use, from the folder that its training left: this trainer's or the official."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor

from hrm.checkpoint.identifiers import Identifiers, identifiers_of_checkpoint, identifiers_of_data
from hrm.checkpoint.read import (
    AVERAGE,
    MANIFEST,
    STEP_NAME,
    TRAINING,
    WEIGHTS,
    CheckpointError,
    read_manifest,
)
from hrm.checkpoint.safe_io import read_safetensors, read_training
from hrm.checkpoint.weights import PUZZLE_TABLE, load_weights, read_weights
from hrm.common.text import one_line
from hrm.config import foreign
from hrm.config.load import KEYS, config_of, load_config, validate
from hrm.config.messages import ConfigError, nearest
from hrm.config.read import Reader, mapping_items, read_yaml, scalar
from hrm.config.schedule import interval_epochs, stage_arch
from hrm.config.schema import ArchConfig, Config
from hrm.data.format import Metadata, read_metadata
from hrm.engine.kernel_choice import take_measured
from hrm.engine.modes import dtype_note, resolve_dtype
from hrm.model.hrm import HRM

# The configuration that a run leaves: this trainer's, the official one's.
OWN_CONFIG, OFFICIAL_CONFIG = "config.yaml", "all_config.yaml"

_CONFIG_LIMIT = 1 << 20
_MOST_CELLS = 1 << 20
_TOKENS = "embed_tokens.embedding_weight"

# The official models by class, and what makes them of the defaults.
_CLASSES: dict[str, dict[str, Any]] = {
    "HierarchicalReasoningModel_ACTV1": {},
    "TinyRecursiveReasoningModel_ACTV1": {"arch.share_levels": True, "arch.gradient": "last_cycle"},
}
_GROUPS = ("arch", "arch.loss", "arch.subgoal_head")
# Keys of an official configuration that evaluation uses, beside arch, and those that it does not.
_TAKEN = ("data_path", "data_paths", "global_batch_size", "seed")
_IDLE = {
    *("epochs", "lr", "lr_min_ratio", "lr_warmup_steps", "weight_decay", "beta1", "beta2", "puzzle_emb_lr"),
    *("puzzle_emb_weight_decay", "project_name", "run_name", "checkpoint_path", "checkpoint_every_eval"),
    *("eval_interval", "eval_save_outputs", "data_paths_test", "evaluators", "min_eval_interval", "ema"),
    *("ema_rate", "freeze_weights", "load_checkpoint", "arch.loss.name"),
}


@dataclass(frozen=True)
class Found:
    """A checkpoint and its run's configuration, read and checked; no model is built yet.

    file: the weights' file; weights: what it holds. config: arch as of the stage that the checkpoint is of.
    metadata: of the data it was trained on, where the checkpoint tells. notes: a line for each thing to know.
    """

    file: Path
    weights: dict[str, Tensor]
    config: Config
    metadata: Metadata | None
    notes: list[str]


@dataclass(frozen=True)
class Trained:
    """A model with a checkpoint's weights, without gradient.

    config: of its run, metadata: of the data it is for. notes: a line for each thing that a user should know.
    path: the checkpoint's folder, or the file of the official code. names: of the puzzle table's rows.
    """

    model: HRM
    config: Config
    metadata: Metadata
    notes: list[str]
    path: Path
    names: Identifiers


def find_trained(path: str | Path) -> Found:
    """The checkpoint that a path names, with the configuration beside it.

    path: a run's folder (its newest good checkpoint), a `step_<N>` folder, or of the official code a `step_N`
    file or the folder that holds some. Raises CheckpointError or ConfigError naming the file and the remedy.
    """
    file, weights, notes = read_weights(Path(path))
    folder = file.parent
    # A run keeps its configuration beside its checkpoints' folders.
    places = [folder, folder.parent] if STEP_NAME.fullmatch(folder.name) else [folder]
    beside = [place / name for place in places for name in (OWN_CONFIG, OFFICIAL_CONFIG)]
    config_file = next((each for each in beside if each.is_file()), None)
    if config_file is None:
        raise CheckpointError(
            f"{file}: its run's configuration is missing, expected {OWN_CONFIG} or {OFFICIAL_CONFIG} in "
            f"{places[-1]}; copy it there"
        )
    if config_file.stat().st_size > _CONFIG_LIMIT:
        raise ConfigError(f"{config_file}: too large, expected the configuration that a run saves")
    if config_file.name == OFFICIAL_CONFIG:
        config, unknown = _official_config(config_file)
        notes = [*notes, *unknown]
    else:
        config = load_config(config_file)
    metadata = None
    if (folder / MANIFEST).is_file():
        config = replace(config, arch=_arch_of_stage(config, folder / TRAINING))
        metadata = _metadata_of(read_manifest(folder).get("data"), folder / MANIFEST)
    return Found(file, weights, config, metadata, notes)


def load_trained(
    path: str | Path | Found,
    *,
    device: str | torch.device,
    dtype: str = "auto",
    metadata: Metadata | None = None,
    data: str | Path | None = None,
    reset_puzzle_emb: bool = False,
    ema: bool | None = None,
) -> Trained:
    """The model of a checkpoint, on `device`, for data of the kind it was trained on.

    path: as `find_trained` takes it, or what it returned. dtype: auto, float32 or bfloat16; auto is what the
    run was configured with. metadata: of the data to use it on; without it, of the data it was trained on.
    data: the folder of that data, whose puzzles keep their embeddings by name; None leaves each its number.
    reset_puzzle_emb: with a fresh table of puzzle embeddings, of the size that metadata asks for. ema: the
    averaged weights in place of the last.
    Raises CheckpointError, ConfigError or DatasetError: for a damaged checkpoint, one without averaged
    weights, data of other tokens, a puzzle table of another size or of other puzzles, a shape that nothing
    tells.
    """
    found = path if isinstance(path, Found) else find_trained(path)
    place = torch.device(device)
    take_measured(place)
    config = found.config if dtype == "auto" else replace(found.config, dtype=_dtype(dtype))
    metadata = _checked(metadata, found) if metadata is not None else _shape(found)
    build = partial(HRM.from_config, config, metadata, resolve_dtype(config, place))
    # First without memory: a configuration may ask for far more than the weights beside it have.
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build().state_dict().items()}
    rows = metadata.num_puzzle_identifiers
    names = None if data is None else identifiers_of_data(data, rows)
    weights, notes = load_weights(found.file, shapes, reset_puzzle_emb, names)
    model = build()
    if ema:
        weights = {**weights, **_average(found.file, weights)}
    model.load_state_dict(weights, strict=False)
    if model.dtype.itemsize < 4:
        # As training uses them, so that no weight is cast each time.
        for name, parameter in model.named_parameters():
            if name not in model.wide:
                parameter.data = parameter.data.to(model.dtype)
    model = model.to(place).requires_grad_(False).eval()
    path = found.file.parent if found.file.name == WEIGHTS else found.file
    slow = dtype_note(config, place)
    told = [*found.notes, *notes, *([slow] if slow else [])]
    return Trained(model, config, metadata, told, path, names or _names(found, rows))


def _dtype(name: str) -> Any:
    return KEYS["dtype"].parse(name)


def _arch_of_stage(config: Config, training: Path) -> ArchConfig:
    """The architecture that the checkpoint was evaluated with: in a run of stages, that of its last epoch."""
    if config.stages is None:
        return config.arch
    position = read_training(training).get("position")
    if not (isinstance(position, list) and len(position) == 2 and all(type(n) is int for n in position)):
        raise CheckpointError(f"{training} does not tell the place in the data; use another checkpoint")
    iteration, batch = position
    return stage_arch(config, max(0, iteration * interval_epochs(config) - (batch == 0)))


def _names(found: Found, rows: int) -> Identifiers:
    """The names of the puzzle table's rows, from the checkpoint or else the data it was trained on."""
    names = identifiers_of_checkpoint(found.file, rows)
    if names.hashes is None and found.config.data_path is not None:
        return identifiers_of_data(found.config.data_path, rows)
    return names


# --- the shape of the data


def _table_rows(found: Found) -> dict[str, Any]:
    """The data's sizes that the weights' tables give, by their names in the metadata."""
    tables = {"vocab_size": _TOKENS, "num_puzzle_identifiers": PUZZLE_TABLE}
    return {key: len(found.weights[name]) for key, name in tables.items() if name in found.weights}


def _checked(metadata: Metadata, found: Found) -> Metadata:
    """The given metadata. A puzzle table of another size is left for `load_weights` to answer."""
    there = _table_rows(found).get("vocab_size", metadata.vocab_size)
    if there != metadata.vocab_size:
        raise CheckpointError(
            f"{found.file} was trained on vocab_size {there}, but the data has {metadata.vocab_size}; use it "
            "on data of the kind it was trained on"
        )
    return metadata


def _shape(found: Found) -> Metadata:
    """The metadata of the data that the model was trained on, from whatever tells it."""
    metadata = found.metadata or _configured_metadata(found)
    return replace(metadata, **_table_rows(found))


def _configured_metadata(found: Found) -> Metadata:
    config = found.config
    if config.data_path is None:
        size = config.sudoku.size
        return Metadata(0, 0, 0, size + 2, size * size, 1, config.sudoku.num_test, 1.0, ["all"])
    for split in ("test", "train"):
        description = Path(config.data_path) / split / "dataset.json"
        if description.is_file():
            return read_metadata(description)
    raise CheckpointError(
        f"{found.file}: the data it was trained on is needed for its size, and "
        f"{one_line(config.data_path)} is not there; give the data set's folder"
    )


def _metadata_of(value: Any, where: Path) -> Metadata | None:
    """The metadata in a manifest, None where it holds none."""
    if value is None:
        return None
    try:
        metadata = Metadata(**value)
        numbers = (metadata.seq_len, metadata.vocab_size, metadata.num_puzzle_identifiers)
        sound = all(type(number) is int and number > 0 for number in numbers)
        sound &= all(type(number) is int for number in (metadata.pad_id, metadata.blank_identifier_id))
        sound &= type(metadata.ignore_label_id) in (int, type(None)) and metadata.seq_len <= _MOST_CELLS
    except TypeError:
        sound = False
    if not sound:
        raise CheckpointError(f"{where} describes no data set under data; use another checkpoint")
    return metadata


def _average(file: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    path = file.parent / AVERAGE
    if file.name != WEIGHTS or not path.is_file():
        raise CheckpointError(
            f"{file.parent} has no averaged weights ({AVERAGE}); leave ema out, or train with ema=true"
        )
    average = read_safetensors(path)
    for name, tensor in average.items():
        if name not in weights or weights[name].shape != tensor.shape:
            raise CheckpointError(f"{path} is no average of the weights beside it: {name} differs")
    return average


# --- the official configuration


def _official_config(path: Path) -> tuple[Config, list[str]]:
    """The configuration that an official run saved, and a line for each key of it that is not known."""
    reader = Reader(KEYS)
    unknown: list[str] = []
    own: dict[str, Any] = {}
    for name, node, where in _leaves(read_yaml(str(path)), str(path)):
        if name in _IDLE or (name == "arch.H_layers" and scalar(node, name, where) == "0"):
            continue
        if name == "arch.name":
            own = _class_values(scalar(node, name, where), where)
        elif name.startswith("arch.") or name in _TAKEN:
            key, text, _ = foreign.translate(name, _text(node, name, where), KEYS)
            if key not in KEYS or key is None:
                near = nearest(name, KEYS)
                hint = f"; is it {near.removeprefix('arch.')}?" if near else ""
                raise ConfigError(f"{where}{one_line(name)} is not known here and changes the model{hint}")
            reader.add(key, text, where)
        else:
            unknown.append(f"{where}{one_line(name)} is not known here and changes nothing")
    values = {**own, **reader.result()}
    for key, what in {"loss.loss_type": "arch.loss.loss_type", "data_path": "data_path"}.items():
        if values.get(key) is None:
            raise ConfigError(f"{path}: no {what}, expected the configuration that an official run saves")
    config = config_of(values)
    try:
        validate(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config, unknown


def _class_values(text: str, where: str) -> dict[str, Any]:
    """The keys that an official model's class stands for."""
    name = text.rpartition("@")[2]
    if name not in _CLASSES:
        raise ConfigError(
            f"{where}arch.name ends in {one_line(name)}, expected one of {', '.join(_CLASSES)}: a model of "
            "another class cannot be evaluated here"
        )
    return _CLASSES[name]


def _leaves(node: yaml.Node | None, path: str, prefix: str = "") -> Iterator[tuple[str, yaml.Node, str]]:
    """Each value below a YAML mapping by dotted name, with its place."""
    for name, child, where in mapping_items(node, path):
        if prefix + name in _GROUPS:
            yield from _leaves(child, path, f"{prefix}{name}.")
        else:
            yield prefix + name, child, where


def _text(node: yaml.Node, name: str, where: str) -> str:
    if name == "data_paths" and isinstance(node, yaml.SequenceNode):
        return f"[{','.join(scalar(child, name, where) for child in node.value)}]"
    return scalar(node, name, where)
