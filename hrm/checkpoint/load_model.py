"""Loads a trained model from a run's folder, of this trainer or the official one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor

from hrm.checkpoint.foreign import OFFICIAL_CONFIG, OWN_CONFIG
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
from hrm.common.hub import is_remote
from hrm.common.text import one_line, with_sources
from hrm.config.load import KEYS, config_of, load_config, validate
from hrm.config.messages import ConfigError
from hrm.config.official import read_official
from hrm.config.read import compose, read_yaml
from hrm.config.schedule import interval_epochs, stage_arch
from hrm.config.schema import ArchConfig, Config
from hrm.data.format import Metadata, read_metadata
from hrm.distributed import World
from hrm.engine.kernel_choice import take_measured
from hrm.engine.modes import dtype_note, resolve_dtype
from hrm.model.hrm import HRM

_CONFIG_LIMIT = 1 << 20
_MOST_CELLS = 1 << 20
_TOKENS = "embed_tokens.embedding_weight"

# Keys of an official configuration that evaluation uses, besides arch and the data.
_TAKEN = ("global_batch_size", "seed")
# Placeholder for an unknown data path; no such folder exists.
NO_DATA = "(data set not named)"


@dataclass(frozen=True)
class Found:
    """A checkpoint and its run's configuration, read and checked, before a model is built.

    file: the weights file; weights: its contents. config: arch is that of the checkpoint's stage. metadata:
    of the training data, if the checkpoint has it. notes: lines for the user. average: the averaged weights,
    if the file has them.
    """

    file: Path
    weights: dict[str, Tensor]
    config: Config
    metadata: Metadata | None
    notes: list[str]
    average: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class Trained:
    """A model with a checkpoint's weights, without gradient.

    config: of its run. metadata: of the data to use it on. notes: lines for the user. path: the checkpoint's
    folder, another trainer's file, or the hub address. names: of the puzzle table's rows.
    """

    model: HRM
    config: Config
    metadata: Metadata
    notes: list[str]
    path: Path
    names: Identifiers


def find_trained(path: str | Path, world: World | None = None) -> Found:
    """The checkpoint at a path, with the configuration next to it.

    path: a run's folder (its newest good checkpoint), a `step_<N>` folder, a weights file of another trainer
    or the folder that holds it, or `hub:OWNER/NAME`. world: the ranks that call this together.
    Raises CheckpointError, ConfigError or HubError naming the file and the remedy.
    """
    file, weights, notes, average, inside = read_weights(path, world)
    folder = file.parent
    # A run's configuration is next to its checkpoint folders; EqR's is next to the folder of its files.
    places = [folder, folder.parent] if STEP_NAME.fullmatch(folder.name) else [folder]
    beside = [place / name for place in places for name in (OWN_CONFIG, OFFICIAL_CONFIG)]
    beside += [folder.parent / OFFICIAL_CONFIG] if inside is None else []
    config_file = next((each for each in beside if each.is_file()), None)
    if config_file is None and inside is None:
        its = f"{path if is_remote(path) else file}: its run's configuration is missing, expected"
        if is_remote(path):
            raise CheckpointError(
                f"{its} {OFFICIAL_CONFIG} next to {file.name}; give a folder with both files"
            )
        raise CheckpointError(f"{its} {OWN_CONFIG} or {OFFICIAL_CONFIG} in {places[-1]}; copy it there")
    if config_file is not None and config_file.stat().st_size > _CONFIG_LIMIT:
        raise ConfigError(f"{config_file}: too large, expected the configuration that a run saves")
    if config_file is None:
        config, unknown = _official_config(_as_yaml(inside, file), f"{file}")
        notes = [*notes, *unknown]
    elif config_file.name == OFFICIAL_CONFIG:
        config, unknown = _official_config(read_yaml(str(config_file)), str(config_file))
        notes = [*notes, *unknown]
    else:
        config = load_config(config_file)
    metadata = None
    if (folder / MANIFEST).is_file():
        config = replace(config, arch=_arch_of_stage(config, folder / TRAINING))
        metadata = _metadata_of(read_manifest(folder).get("data"), folder / MANIFEST)
    return Found(file, weights, config, metadata, notes, average)


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
    """The model of a checkpoint, on `device`, for data of the kind that it was trained on.

    path: an argument or result of `find_trained`. dtype: auto, float32 or bfloat16; auto is the run's
    configured dtype. metadata: of the data to use the model on; by default that of the training data. data:
    the folder of that data, whose puzzles keep their embeddings by name; None keeps the row numbers.
    reset_puzzle_emb: use a new table of puzzle embeddings, of the size in metadata. ema: use the averaged
    weights. Raises CheckpointError, ConfigError or DatasetError: for a damaged checkpoint, missing averaged
    weights, data with another vocabulary, a puzzle table of another size or other puzzles, an unknown shape.
    """
    found = path if isinstance(path, Found) else find_trained(path)
    place = torch.device(device)
    take_measured(place)
    config = found.config if dtype == "auto" else replace(found.config, dtype=_dtype(dtype))
    metadata = _checked(metadata, found) if metadata is not None else _shape(found)
    build = partial(HRM.from_config, config, metadata, resolve_dtype(config, place))
    # Build on meta first: a damaged configuration may describe a far larger model than its weights.
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build().state_dict().items()}
    rows = metadata.num_puzzle_identifiers
    names = None if data is None else identifiers_of_data(data, rows)
    weights, notes = load_weights(found.file, shapes, reset_puzzle_emb, names)
    model = build()
    if ema:
        weights = {**weights, **_average(found, weights)}
    model.load_state_dict(weights, strict=False)
    if model.dtype.itemsize < 4:
        # Cast the weights once, as training does.
        for name, parameter in model.named_parameters():
            if name not in model.wide:
                parameter.data = parameter.data.to(model.dtype)
    model = model.to(place).requires_grad_(False).eval()
    path = Path(with_sources(str(found.file.parent if found.file.name == WEIGHTS else found.file)))
    slow = dtype_note(config, place)
    told = [*map(with_sources, found.notes), *notes, *([slow] if slow else [])]
    return Trained(model, config, metadata, told, path, names or _names(found, rows))


def _dtype(name: str) -> Any:
    return KEYS["dtype"].parse(name)


def _arch_of_stage(config: Config, training: Path) -> ArchConfig:
    """The architecture that the checkpoint was evaluated with; in a staged run, that of its last epoch."""
    if config.stages is None:
        return config.arch
    position = read_training(training).get("position")
    if not (isinstance(position, list) and len(position) == 2 and all(type(n) is int for n in position)):
        raise CheckpointError(f"{training} does not hold the position in the data; use another checkpoint")
    iteration, batch = position
    return stage_arch(config, max(0, iteration * interval_epochs(config) - (batch == 0)))


def _names(found: Found, rows: int) -> Identifiers:
    """The names of the puzzle table's rows, from the checkpoint, else from its training data."""
    names = identifiers_of_checkpoint(found.file, rows)
    if names.hashes is None and found.config.data_path is not None:
        return identifiers_of_data(found.config.data_path, rows)
    return names


# --- the shape of the data


def _table_rows(found: Found) -> dict[str, Any]:
    """The data's sizes, as the weights' shapes show them, by metadata name."""
    tables = {"vocab_size": _TOKENS, "num_puzzle_identifiers": PUZZLE_TABLE}
    return {key: len(found.weights[name]) for key, name in tables.items() if name in found.weights}


def _checked(metadata: Metadata, found: Found) -> Metadata:
    """Checks and returns the given metadata. `load_weights` checks the size of the puzzle table."""
    there = _table_rows(found).get("vocab_size", metadata.vocab_size)
    if there != metadata.vocab_size:
        raise CheckpointError(
            f"{found.file} was trained on vocab_size {there}, but the data has {metadata.vocab_size}; use it "
            "on data of the kind it was trained on"
        )
    return metadata


def _shape(found: Found) -> Metadata:
    """The metadata of the training data, from the manifest, the data or the weights."""
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
    """The metadata in a manifest; None if it has none."""
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


def _average(found: Found, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    file, average = found.file, found.average
    path = file if average is not None else file.parent / AVERAGE
    if average is None and (file.name != WEIGHTS or not path.is_file()):
        raise CheckpointError(
            f"{file.parent} has no averaged weights ({AVERAGE}); leave ema out, or train with ema=true"
        )
    average = read_safetensors(path) if average is None else average
    # The table is not averaged, and its rows may be in the order of other data.
    average = {name: tensor for name, tensor in average.items() if name != PUZZLE_TABLE}
    for name, tensor in average.items():
        if name not in weights or weights[name].shape != tensor.shape:
            raise CheckpointError(f"{path} does not fit the weights next to it: {name} differs")
    return average


# --- the official configuration


def _official_config(node: yaml.Node | None, path: str) -> tuple[Config, list[str]]:
    """The configuration that an official run saved, and notes for the user."""
    official = read_official(node, path, KEYS, _TAKEN)
    values, notes = official.values, official.notes
    if values.get("loss.loss_type") is None:
        raise ConfigError(
            f"{path}: no arch.loss.loss_type; put the {OFFICIAL_CONFIG} that an official run saves next to "
            "the weights"
        )
    values["data_path"] = next(iter(official.data_paths), NO_DATA)
    if len(official.data_paths) > 1:
        shown = ", ".join(map(one_line, official.data_paths))
        notes = [*notes, f"{path}: trained on several data sets ({shown}); the first is taken"]
    config = config_of(values)
    try:
        validate(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config, notes


def _as_yaml(config: Any, file: Path) -> yaml.Node | None:
    """The configuration in a weights file, as a node tree."""
    for key in ("config", "cfg"):
        if isinstance(config.get(key), dict) and "arch" in config[key]:
            config = config[key]
    try:
        return compose(yaml.safe_dump(_plain(config)), f"{file}")
    except (yaml.YAMLError, RecursionError) as error:
        raise CheckpointError(f"{file}: its configuration cannot be read ({one_line(error)})") from None


def _plain(value: Any) -> Any:
    """A configuration as plain containers, without values that YAML cannot hold."""
    if isinstance(value, dict):
        kept = {str(name): _plain(item) for name, item in value.items()}
        return {name: item for name, item in kept.items() if item is not _OTHER}
    if isinstance(value, list | tuple):
        return [item for item in map(_plain, value) if item is not _OTHER]
    return value if value is None or type(value) in (bool, int, float, str) else _OTHER


_OTHER = object()
