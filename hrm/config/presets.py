"""Architectures, architecture files and presets.

A preset is written with the keys of the command line; `${lr}` follows that key.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml  # type: ignore[import-untyped]

from hrm.common.text import one_line
from hrm.config import foreign
from hrm.config.keys import Key
from hrm.config.messages import ConfigError, help_entry, nearest, typed
from hrm.config.official import official_arch, read_official
from hrm.config.read import Reader, mapping_items, read_yaml, scalar

# The changes of each architecture to v1, whose values are the defaults of `hrm.config.schema`.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "v1": {},
    "gated": {"arch.use_gating": True},
    "balanced": {"arch.halt_max_steps": 8},
    "feudal": {"arch.subgoal_head.enabled": True, "loss.feudal_loss_weight": 0.1},
    "trm": {
        "arch.share_levels": True,
        "arch.L_layers": 2,
        "arch.H_cycles": 3,
        "arch.L_cycles": 6,
        "arch.gradient": "last_cycle",
        "arch.q_continue": False,
        "arch.puzzle_emb_len": 16,
        "ema": True,
    },
}
# Equilibrium Reasoners: TRM as a damped and noisy recurrence from random starts.
ARCHITECTURES["eqr"] = {
    **ARCHITECTURES["trm"],
    "arch.puzzle_emb_ndim": 0,
    "arch.puzzle_emb_len": 0,
    "arch.init": "random",
    "arch.noise": 0.01,
    "arch.damping": 0.95,
    "ema_rate": 0.999,
}
# The TRM of "Speed is Confidence": a token mixer of two layers and more cycles; preset=record trains it.
ARCHITECTURES["sic"] = {
    **ARCHITECTURES["trm"],
    "arch.mlp_t": True,
    "arch.swiglu": "normed",
    "arch.pos_encodings": "none",
    "arch.H_cycles": 6,
    "arch.L_cycles": 9,
    "arch.puzzle_emb_ndim": 0,
    "arch.puzzle_emb_len": 0,
    "arch.register_tokens": 1,
    "arch.head_bias": True,
}
# The Universal Reasoning Model, at its size for Sudoku.
ARCHITECTURES["urm"] = {
    "arch.single_state": True,
    "arch.swiglu": "conv",
    "arch.H_cycles": 2,
    "arch.L_cycles": 6,
    "arch.gradient": "last_cycle",
    "arch.q_continue": False,
    "ema": True,
}
ARCHITECTURE_ALIASES = {"hrm": "v1", "hrm_v1": "v1", "hrm_v1_gated": "gated", "hrm_v1_balanced": "balanced"}
DEFAULT_ARCHITECTURE = "gated"

# Trains a small model on a CPU within minutes.
QUICK: dict[str, Any] = {
    "sudoku.size": 4,
    "sudoku.num_train": 20_000,
    "sudoku.num_test": 500,
    "sudoku.num_aug": 0,
    "sudoku.clues": 8,
    "arch.hidden_size": 64,
    "arch.num_heads": 4,
    "arch.H_layers": 2,
    "arch.L_layers": 2,
    # Rotary encodings give the distance of two cells in reading order, but not their rows, columns and boxes.
    "arch.pos_encodings": "learned",
    "arch.halt_max_steps": 8,
    # Two steps solve such a small puzzle; more exploration trains the other six, which evaluation also runs.
    "arch.halt_exploration_prob": 0.5,
    "global_batch_size": 64,
    "epochs": 2,
    "eval_interval": 1,
    # Muon needs 2.5 times fewer steps than adam_atan2 for the same accuracy; see bench/NOTES.md.
    "optimizer": "muon",
    "lr": 1e-3,
    "lr_warmup_steps": 100,
    "lr_min_ratio": 0.0,
    "weight_decay": 1.0,
    "puzzle_emb_lr": "${lr}",
}

# Changes of the architectures to QUICK: balanced halves its eight steps; 16 puzzle tokens would be as many as
# the cells; an average of rate 0.999 would still contain a third of the initial weights at the end.
QUICK_ARCHITECTURES: dict[str, dict[str, Any]] = {
    **ARCHITECTURES,
    "balanced": {"arch.halt_max_steps": 4},
    "trm": {**ARCHITECTURES["trm"], "arch.puzzle_emb_len": 0, "ema_rate": 0.99},
    "sic": {**ARCHITECTURES["sic"], "ema_rate": 0.99},
    "urm": {**ARCHITECTURES["urm"], "ema_rate": 0.99},
}

# The published Sudoku-Extreme recipe for one GPU, for the built-in 9x9 data.
FULL_SUDOKU: dict[str, Any] = {
    "sudoku.size": 9,
    "sudoku.num_train": 1000,
    "sudoku.num_aug": 1000,
    "global_batch_size": 384,
    "epochs": 20_000,
    "eval_interval": 2000,
    "lr": 7e-5,
    "weight_decay": 1.0,
    "puzzle_emb_lr": "${lr}",
    "puzzle_emb_weight_decay": 1.0,
}


# The recipe of "Speed is Confidence" (arXiv 2601.19085) for one path: 8,000 steps of 384 on 1,000 puzzles.
RECORD: dict[str, Any] = {
    "sudoku.size": 9,
    "sudoku.num_train": 1000,
    "sudoku.num_aug": 0,
    "augment": True,
    "global_batch_size": 384,
    "epochs": 3072,
    "eval_interval": 384,
    "optimizer": "muon",
    "lr": 1e-4,
    "lr_warmup_steps": 0,
    "lr_min_ratio": 0.0,
    "weight_decay": 1.0,
    "grad_clip": 1.0,
    "loss.loss_type": "softmax_cross_entropy",
    "loss.label_smoothing": 0.2,
    "loss.q_halt_weight": 0.05,
    "ema_rate": 0.9,
    "ema_start": 5000,
}

# Curriculum-guided adaptive recursion (arXiv 2511.08653) on TRM's Sudoku recipe: a token loss that decays
# over the ACT steps, and a depth schedule: end as a share of the epochs, H_cycles, L_cycles.
CGAR_DEPTHS = ((0.3, 1, 2), (0.6, 2, 4), (1.0, 3, 6))
CGAR: dict[str, Any] = {
    "sudoku.size": 9,
    "sudoku.num_train": 1000,
    "sudoku.num_aug": 1000,
    "arch.mlp_t": True,
    "arch.pos_encodings": "none",
    "global_batch_size": 768,
    "epochs": 50_000,
    "eval_interval": 5000,
    "weight_decay": 1.0,
    "puzzle_emb_lr": "${lr}",
    "puzzle_emb_weight_decay": 1.0,
    "loss.step_decay": 0.7,
}

PRESETS: dict[str, dict[str, Any]] = {"quick": QUICK, "full": FULL_SUDOKU, "record": RECORD, "cgar": CGAR}
# The architecture of a preset without --arch.
PRESET_ARCHITECTURES = {"record": "sic", "cgar": "trm"}


def cgar_stages(epochs: int) -> list[dict[str, int]]:
    """The stages of preset=cgar for a number of epochs; a stage of less than one epoch is left out."""
    stages: list[dict[str, int]] = []
    start = 0
    for share, H_cycles, L_cycles in CGAR_DEPTHS:
        end = round(share * epochs)
        if end > start:
            stages.append({"epochs": end - start, "H_cycles": H_cycles, "L_cycles": L_cycles})
        start = end
    return stages


def architecture(
    name: str, keys: Mapping[str, Key], known: Mapping[str, Mapping[str, Any]], where: str = ""
) -> tuple[str, dict[str, Any]]:
    """The name and the values of an architecture, from its name or from a user's YAML file.

    known: the named architectures. A file's fields, which are keys of arch, override its `defaults`. where:
    start of the message for an unknown base. Raises ConfigError for an unknown name or a bad file.
    """
    named = ARCHITECTURE_ALIASES.get(name, name)
    if named in known:
        return named, dict(known[named])
    if where or not name.endswith((".yaml", ".yml")):
        raise ConfigError(f"{where}unknown architecture {one_line(name)}: {_names_known(name, known, where)}")
    values: dict[str, Any] = {}
    node, reader = read_yaml(name), Reader(keys)
    if (official := official_arch(node)) is not None:
        return _file_name(name), values | read_official(official, name, keys).values
    for field, child, line in mapping_items(node, name):
        if field == "defaults":
            for base in _bases(child, line):
                values |= architecture(base, keys, known, line)[1]
        elif field in keys or any(k.startswith(f"{field}.") for k in keys):
            raise ConfigError(f"{line}{field} is not a field of an architecture: give the file by --config")
    if isinstance(node, yaml.MappingNode):
        node.value = [(field, value) for field, value in node.value if field.value != "defaults"]
    reader.add_mapping(node, name, "arch.")
    return _file_name(name), values | reader.result()


def _file_name(path: str) -> str:
    return folder_name(os.path.splitext(os.path.basename(path))[0])


def _names_known(name: str, known: Mapping[str, Any], where: str) -> str:
    """The remedy for an unknown architecture."""
    names = [*known, *ARCHITECTURE_ALIASES]
    # Hydra looks in config/arch.
    files = [path for path in (f"{name}.yaml", f"config/arch/{name}.yaml") if os.path.isfile(path)]
    guess = files[0] if files and not where else nearest(name, names)
    text = f"did you mean {guess}? " if guess else ""
    if name in foreign.ARCHITECTURES and guess not in files:
        text = "that model of TRM's code does not exist here. "
    return f"{text}The names are {', '.join(names)}" + ("" if where else "; a file of your own ends in .yaml")


def _bases(node: yaml.Node, where: str) -> list[str]:
    """The architectures in a file's `defaults`, without Hydra's `_self_`, which means the file itself."""
    if not isinstance(node, yaml.SequenceNode):
        raise ConfigError(
            f"{where}defaults: expected a list of architectures, as in [{DEFAULT_ARCHITECTURE}]"
        )
    names = [scalar(child, "defaults", where) for child in node.value]
    return [name for name in names if name != "_self_"]


def folder_name(text: str) -> str:
    """The text as a valid folder name."""
    return re.sub(r"[^\w .+=@,()-]", "-", text)[:80].strip(" .") or "run"


def _words(values: Mapping[str, Any]) -> str:
    """Keys and values as a user types them."""
    return ", ".join(f"{name}={'lr' if value == '${lr}' else typed(value)}" for name, value in values.items())


def presets_help() -> Iterator[str]:
    """The help page's lines on architectures and presets."""
    yield "Architectures:"
    for name, changes in ARCHITECTURES.items():
        also = ", ".join(alias for alias, target in ARCHITECTURE_ALIASES.items() if target == name)
        default = ", the default" if name == DEFAULT_ARCHITECTURE else ""
        what = f"v1 with {_words(changes)}" if changes else "the original model"
        yield from _entry(name, f"{what}{default}" + (f" (also {also})" if also else ""))
    yield "\nPresets:"
    for name, what in {
        "auto": "full with a data_path, on any machine; else full on a CUDA GPU and quick elsewhere",
        "full": f"the defaults listed below; for the built-in Sudoku, with {_words(FULL_SUDOKU)}",
        "quick": f"a small model and a short run for a CPU, with {_words(QUICK)}",
        "record": f"the fastest published recipe for Sudoku, of --arch sic, with {_words(RECORD)}",
        "cgar": f"the depth curriculum on --arch trm, with {_words(CGAR)} and stages of 30, 30 and 40 % of "
        "the epochs with 1 and 2, 2 and 4, 3 and 6 H and L cycles",
    }.items():
        yield from _entry(name, what)


def _entry(name: str, text: str) -> Iterator[str]:
    return help_entry(f"  {name}", text, 12, 95)
