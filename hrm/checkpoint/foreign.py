"""Checkpoints of other trainers: which file of a folder to read, and how the file wraps its weights.

HRM and TRM write a state dict `step_<N>`; HRM's file on the hub is `checkpoint`; URM writes
`step_<N>.pt` with `model_state_dict`, EqR `step_<N>_<id>.pth` with `model`, `ema` and `config`, Lightning
`.ckpt` with `state_dict` and `hyper_parameters`.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from hrm.checkpoint.identifiers import IDENTIFIERS
from hrm.checkpoint.read import AVERAGE, TRAINING
from hrm.checkpoint.safe_io import CheckpointError, read_safetensors, read_torch

# The configuration file of a run: this trainer's, the official trainer's.
OWN_CONFIG, OFFICIAL_CONFIG = CONFIG_FILES = "config.yaml", "all_config.yaml"

File = TypeVar("File", bound=PurePath)

_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
_STEP_FILE = re.compile(r"step_(\d{1,18})(?:_(?!all_preds)[\w-]+)?(?:\.(?:safetensors|pt|pth|ckpt|bin))?")
_HUB_FILE = "checkpoint"
# Prefixes that compiling, parallel training and wrapping modules put before a name, in any order.
_PREFIX = re.compile(r"(?:(?:module|_orig_mod|model|inner)\.)+")
# Buffers determined by batch size and sequence length.
_DERIVED = re.compile(r"(?:.*\.)?(?:puzzle_emb\.local_(?:weights|ids)|rotary_emb\.(?:cos|sin)_cached)")
# URM has one stack of blocks and one initial state.
_URM = re.compile(r"\A(?:layers(?=\.\d)|init_hidden\Z)")
_WEIGHTS = ("model_state_dict", "state_dict", "model", "module", "net")
_AVERAGES = ("ema", "ema_state_dict", "model_ema", "ema_model", "shadow")
_CONFIGS = ("config", "hyper_parameters", "cfg")
_DEEPEST = 3


class Contents(NamedTuple):
    """The contents of a weights file, under this project's names.

    file: the file. notes: lines for the user. average: the averaged weights, config: the run's configuration,
    each None if the file lacks it.
    """

    file: Path
    weights: dict[str, Tensor]
    notes: list[str]
    average: dict[str, Tensor] | None = None
    config: Mapping[str, Any] | None = None


def weights_file(folder: Path) -> Path | None:
    """The newest or only weights file of a folder, else of its subfolders; None without one.

    Raises CheckpointError that names the files where there are several.
    """
    paths = [path for depth in ("*", "*/*") for path in folder.glob(depth) if path.is_file()]
    found = choose_file([path.relative_to(folder) for path in paths], str(folder), 2)
    return None if found is None else folder / found


def choose_file(files: Iterable[File], place: str, deepest: int) -> File | None:
    """The newest or only weights file among relative paths, in the uppermost folder that has one.

    deepest: the maximum number of path components. Raises CheckpointError that names the files where there
    are several.
    """
    # Hidden folders hold saves that did not finish, and caches.
    ordered = sorted(path for path in files if not any(part[0] == "." for part in path.parts))
    for depth in range(1, deepest + 1):
        level = [path for path in ordered if len(path.parts) == depth]
        steps = [(int(match[1]), path) for path in level if (match := _STEP_FILE.fullmatch(path.name))]
        found = [max(steps)[1]] if steps and depth == 1 else [path for path in level if _may_hold(path)]
        if len(found) > 1:
            names = ", ".join(map(str, found[:8]))
            raise CheckpointError(
                f"{place} holds several checkpoints: {names}; give one of them, such as {place}/{found[0]}"
            )
        if found:
            return found[0]
    return None


def _may_hold(path: PurePath) -> bool:
    known = path.suffix in _SUFFIXES and path.name not in (AVERAGE, IDENTIFIERS, TRAINING)
    return known or path.name == _HUB_FILE or _STEP_FILE.fullmatch(path.name) is not None


def read_file(path: Path) -> Contents:
    """Reads a weights file of any trainer. Raises CheckpointError."""
    state = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path, foreign=True)
    average: Any = None
    config: Any = None
    for _ in range(_DEEPEST):
        if not isinstance(state, dict) or _is_flat(state):
            break
        config = config or next((state[key] for key in _CONFIGS if isinstance(state.get(key), dict)), None)
        average = average or next((state[key] for key in _AVERAGES if isinstance(state.get(key), dict)), None)
        state = next((state[key] for key in _WEIGHTS if isinstance(state.get(key), dict)), None)
    weights = _named(path, state)
    if average is not None:
        shadow = average.get("shadow", average)
        average = _named(path, shadow) if isinstance(shadow, dict) and _is_flat(shadow) else None
    return Contents(path, weights, [], average or None, config)


def _is_flat(state: dict[Any, Any]) -> bool:
    return bool(state) and all(isinstance(value, Tensor) for value in state.values())


def _named(path: Path, state: Any) -> dict[str, Tensor]:
    """A state dict under this project's names."""
    weights: dict[str, Tensor] = {}
    if not isinstance(state, dict):
        state = {"": None}
    for name, tensor in state.items():
        if isinstance(name, str) and _DERIVED.fullmatch(name):
            continue
        if not _is_weight(name, tensor):
            raise CheckpointError(f"{path} is not a state dict; expected names with tensors of floats only")
        name = _PREFIX.sub("", name, count=1) if _PREFIX.match(name) else name
        name = _URM.sub(_renamed, name)
        if name in weights:
            raise CheckpointError(f"{path} holds {name} twice, under two prefixes; save it with only one")
        weights[name] = tensor
    return weights


def _renamed(match: re.Match[str]) -> str:
    return {"layers": "L_level.layers", "init_hidden": "H_init"}[match[0]]


def _is_weight(name: Any, tensor: Any) -> bool:
    return (
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and (tensor.layout, tensor.device.type) == (torch.strided, "cpu")
        # Reject expanded tensors: a tiny file could claim a huge table, and so a huge model.
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )
