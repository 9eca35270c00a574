"""The named choices behind the configuration: architectures, the user's files of them, and presets.

A preset is written with the keys of the command line; `${lr}` follows that key.
"""

import os
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml  # type: ignore[import-untyped]

from hrm.common.text import one_line
from hrm.config.cli import (
    ConfigError,
    Key,
    mapping_items,
    nearest,
    read_keys,
    read_yaml,
    scalar,
    show_value,
)

# What each architecture changes in v1, whose values are the defaults of `hrm.config.load`.
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
ARCHITECTURE_ALIASES = {"hrm_v1": "v1", "hrm_v1_gated": "gated", "hrm_v1_balanced": "balanced"}
DEFAULT_ARCHITECTURE = "gated"

# A run that shows the whole system learning on a CPU within minutes.
QUICK: dict[str, object] = {
    "sudoku.size": 4,
    "sudoku.num_train": 20_000,
    "sudoku.num_test": 500,
    "sudoku.num_aug": 0,
    "sudoku.clues": 8,
    "arch.hidden_size": 64,
    "arch.num_heads": 4,
    "arch.H_layers": 2,
    "arch.L_layers": 2,
    "arch.halt_max_steps": 8,
    # A puzzle this small is solved in two steps; evaluation takes all eight, so training must know them too.
    "arch.halt_exploration_prob": 0.5,
    "global_batch_size": 64,
    "epochs": 12,
    "eval_interval": 3,
    "lr": 1e-3,
    "lr_warmup_steps": 100,
    "lr_min_ratio": 0.1,
    "weight_decay": 1.0,
    "puzzle_emb_lr": "${lr}",
}

# The same architectures beside those values: half of its thinking steps, and no 16 tokens for 16 cells.
QUICK_ARCHITECTURES: dict[str, dict[str, Any]] = {
    **ARCHITECTURES,
    "balanced": {"arch.halt_max_steps": 4},
    "trm": {**ARCHITECTURES["trm"], "arch.puzzle_emb_len": 0},
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


def architecture(
    name: str, keys: Mapping[str, Key], known: Mapping[str, Mapping[str, Any]], where: str = ""
) -> tuple[str, dict[str, Any]]:
    """The name of an architecture and the values that make it, from its name or the user's YAML file.

    known: the named architectures. A file's own fields, those of arch, beat those of its `defaults`. Raises
    ConfigError for an unknown name or a bad file.
    """
    named = ARCHITECTURE_ALIASES.get(name, name)
    if named in known:
        return named, dict(known[named])
    if where or not name.endswith((".yaml", ".yml")):
        names = [*known, *ARCHITECTURE_ALIASES]
        # Where Hydra would have looked for it.
        files = [path for path in (f"{name}.yaml", f"config/arch/{name}.yaml") if os.path.isfile(path)]
        guess = None if where else next(iter(files), None)
        guess = guess or nearest(name, names)
        hint = f"did you mean {guess}? " if guess else ""
        raise ConfigError(
            f"{where}unknown architecture {one_line(name)}: {hint}The names are {', '.join(names)}"
            + ("" if where else "; a file of your own ends in .yaml")
        )
    values: dict[str, Any] = {}
    node = read_yaml(name)
    own = set()
    for field, child, line in mapping_items(node, name):
        if field == "defaults":
            for base in _names(child, line):
                values |= architecture(base, keys, known, line)[1]
        elif field in keys or any(k.startswith(f"{field}.") for k in keys):
            raise ConfigError(f"{line}{field} is not a field of an architecture: give the file by --config")
        else:
            own.add(field)
    if isinstance(node, yaml.MappingNode):
        node.value = [(k, v) for k, v in node.value if k.value in own]
    values |= read_keys(node, name, keys, "arch.")
    return folder_name(os.path.splitext(os.path.basename(name))[0]), values


def _names(node: yaml.Node, where: str) -> list[str]:
    """The architectures in a file's `defaults`. Hydra's `_self_`, the file itself, goes without saying."""
    if not isinstance(node, yaml.SequenceNode):
        raise ConfigError(
            f"{where}defaults: expected a list of architectures, as in [{DEFAULT_ARCHITECTURE}]"
        )
    names = [scalar(child, "defaults", where) for child in node.value]
    return [name for name in names if name != "_self_"]


def folder_name(text: str) -> str:
    """`text` as it can name a run's folder."""
    return re.sub(r"[^\w .+=@,()-]", "-", text)[:80].strip(" .") or "run"


def words(values: Mapping[str, Any]) -> str:
    """Keys and values as they would be typed."""
    return ", ".join(
        f"{name}={'lr' if value == '${lr}' else show_value(value)}" for name, value in values.items()
    )


def presets_help() -> Iterator[str]:
    """The help's lines on architectures and presets."""
    yield "Architectures:"
    for name, changes in ARCHITECTURES.items():
        also = ", ".join(alias for alias, target in ARCHITECTURE_ALIASES.items() if target == name)
        default = ", the default" if name == DEFAULT_ARCHITECTURE else ""
        what = f"v1 with {words(changes)}" if changes else "the original model"
        yield _entry(name, f"{what}{default}" + (f" (also {also})" if also else ""))
    yield "\nPresets:"
    for name, what in {
        "auto": "full with a data_path, on any machine; else full on a CUDA GPU and quick elsewhere",
        "full": f"the defaults listed below; for the built-in Sudoku, with {words(FULL_SUDOKU)}",
        "quick": f"a small model and a short run for a CPU, with {words(QUICK)}",
    }.items():
        yield _entry(name, what)


def _entry(name: str, what: str) -> str:
    return textwrap.fill(
        f"  {name:<10} {what}",
        108,
        subsequent_indent=" " * 13,
        break_on_hyphens=False,
        break_long_words=False,
    )
