"""The configuration of a run, as `hrm.config.schema` declares it, from the command line that makes one.

`parse_args` builds a `Config` from layers, each beating those before it: the defaults below, the preset, the
architecture (a name, or the user's YAML file), a file given by --config, and the key=value words.
"""

import math
import os
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from omegaconf import OmegaConf

from hrm.common.text import one_line
from hrm.config.cli import (
    Arguments,
    ConfigError,
    help_lines,
    keys_of,
    read_keys,
    read_yaml,
    split_arguments,
)
from hrm.config.presets import (
    ARCHITECTURES,
    DEFAULT_ARCHITECTURE,
    FULL_SUDOKU,
    QUICK,
    QUICK_ARCHITECTURES,
    architecture,
    presets_help,
)
from hrm.config.schema import (
    ArchConfig,
    AttentionConfig,
    Config,
    LossConfig,
    SubgoalConfig,
    SudokuConfig,
    project_name,
    stage_ends,
)

KEYS = keys_of(Config)

_USAGE = """\
usage: python train.py [--arch NAME|FILE.yaml] [--config FILE.yaml] [--print-config] [key=value ...]

Trains on built-in Sudoku, or on the data set in data_path.

  --arch NAME|FILE.yaml  the architecture; arch=NAME is the same. A file holds arch.* keys without the prefix
                         and, in `defaults: [NAME]`, what it starts from (else v1)
  --config FILE.yaml     start from a saved configuration; key=value words beat it
  --print-config         print the resulting configuration as YAML, and exit
"""


def parse_args(argv: Sequence[str]) -> Config:
    """The configuration of the command line `argv` (without the program's name), checked and resolved.

    After it, `preset` is quick or full, and `notes` says in one line each what was chosen for the user. With
    preset=auto: full if data_path is given, on any machine, so that the same command trains the same model
    everywhere; else full on a CUDA device and quick elsewhere. PyTorch is imported only to look for one.
    --help and --print-config print, then exit with status 0. Raises ConfigError for anything wrong.
    """
    args = split_arguments(argv, KEYS)
    if args.help:
        print(help_text())
        raise SystemExit(0)
    config = _resolve(args)
    if args.print_config:
        print("".join(f"# {note}\n" for note in config.notes) + to_yaml(config), end="")
        raise SystemExit(0)
    return config


def load_config(path: str | os.PathLike[str]) -> Config:
    """The configuration in a YAML file, such as the config.yaml that a run saves. Raises ConfigError."""
    return _resolve(Arguments(None, os.fspath(path), False, False, {}))


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML (write it as UTF-8); `--config` reads it back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def validate(config: Config) -> None:
    """Check every key, and the keys against each other. Raises ConfigError for the first fault."""
    for name, k in KEYS.items():
        value = attrgetter(name)(config)
        if not k.accepts(value):
            raise ConfigError(f"{name}={one_line(str(value))} is not allowed: give {k.allowed}")
    arch = config.arch
    if arch.hidden_size % arch.num_heads:
        raise ConfigError(
            f"arch.hidden_size={arch.hidden_size} is not a multiple of "
            f"arch.num_heads={arch.num_heads}: change one"
        )
    if arch.pos_encodings == "rope" and not arch.mlp_t and arch.hidden_size // arch.num_heads % 2:
        raise ConfigError(
            f"arch.hidden_size={arch.hidden_size} over arch.num_heads={arch.num_heads} gives heads "
            "of odd width, which rope cannot rotate: change one, or set arch.pos_encodings=learned"
        )
    if arch.use_gating and int(arch.gate_hidden_ratio * arch.hidden_size) < 1:
        raise ConfigError(
            f"arch.gate_hidden_ratio={arch.gate_hidden_ratio} of arch.hidden_size={arch.hidden_size} "
            "leaves the gate network no units: raise one"
        )
    if arch.gate_init_strategy is not None and arch.gate_init_bias != ArchConfig.gate_init_bias:
        raise ConfigError(
            f"arch.gate_init_strategy={arch.gate_init_strategy} sets the biases that "
            f"arch.gate_init_bias={arch.gate_init_bias:g} would: leave one out"
        )
    if config.loss.uses_gates and not arch.use_gating:
        raise ConfigError(
            "loss.gate_saturation_weight, gate_entropy_weight and gate_stability_weight are for a gated "
            "model: give --arch gated, or leave them out"
        )
    filled = -(-arch.puzzle_emb_ndim // arch.hidden_size)
    if 0 < arch.puzzle_emb_len < filled:
        raise ConfigError(
            f"arch.puzzle_emb_ndim={arch.puzzle_emb_ndim} fills {filled} tokens of "
            f"arch.hidden_size={arch.hidden_size}, more than arch.puzzle_emb_len={arch.puzzle_emb_len}: "
            "change one"
        )
    goal = arch.subgoal_head
    if config.loss.feudal_loss_weight > 0 and not goal.enabled:
        raise ConfigError(
            f"loss.feudal_loss_weight={config.loss.feudal_loss_weight:g} needs a subgoal head: give "
            "--arch feudal or arch.subgoal_head.enabled=true, or set it to 0"
        )
    if goal.enabled and goal.goal_dim > arch.hidden_size:
        raise ConfigError(
            f"arch.subgoal_head.goal_dim={goal.goal_dim} is more than arch.hidden_size={arch.hidden_size}, "
            "the width of the states that follow the goal: lower it, or leave it out"
        )
    _check_stages(config)
    if config.eval_interval is not None and config.eval_interval > config.epochs:
        raise ConfigError(
            f"eval_interval={config.eval_interval} is more than epochs={config.epochs}: "
            "lower it, or set it to null"
        )
    if config.checkpoint_path is not None and config.resume not in ("auto", "none"):
        raise ConfigError(
            "resume=PATH continues a run, checkpoint_path=PATH starts a new one from its weights: "
            "leave one out"
        )


def _check_stages(config: Config) -> None:
    ends = stage_ends(config)[:-1]
    if config.stages is not None and sum(stage.epochs for stage in config.stages) != config.epochs:
        raise ConfigError(
            f"epochs={config.epochs} is not the sum of the stages' epochs: leave epochs out, it follows "
            "from them"
        )
    interval = config.eval_interval or config.epochs
    for end in ends:
        if end % interval:
            raise ConfigError(
                f"stages: one ends after {end} epochs, which eval_interval={config.eval_interval} does not "
                "divide: a stage ends with an evaluation, change one"
            )


def resolve_device(name: str) -> str:
    """The device that `device=name` stands for on this machine: cpu, cuda, cuda:N or mps.

    auto is cuda where there is one and cpu elsewhere; mps runs only when it is named. Raises ConfigError for
    a device that is not there. Imports PyTorch unless the name is cpu.
    """
    if name == "cpu":
        return name
    import torch

    remedy = "use device=cpu, or device=auto to take what there is"
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if found else "cpu"
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError(f"device=mps: PyTorch finds no Apple GPU on this machine: {remedy}")
    elif not found:
        raise ConfigError(f"device={name}: PyTorch finds no CUDA GPU on this machine: {remedy}")
    elif name != "cuda" and int(name.removeprefix("cuda:")) >= found:
        raise ConfigError(f"device={name}: the last CUDA GPU on this machine is cuda:{found - 1}: {remedy}")
    return name


def help_text() -> str:
    """The help page: usage, architectures, presets and every key, made from the declarations."""
    headings = {
        "": Config,
        "arch": ArchConfig,
        "arch.subgoal_head": SubgoalConfig,
        "loss": LossConfig,
        "attention": AttentionConfig,
        "sudoku": SudokuConfig,
    }
    keys = help_lines(KEYS, {group: str(cls.__doc__) for group, cls in headings.items()})
    return "\n".join([_USAGE, *presets_help(), *keys])


def _resolve(args: Arguments) -> Config:
    overrides = {name: KEYS[name].parse(text) for name, text in args.overrides.items()}
    saved = read_keys(read_yaml(args.config), args.config, KEYS) if args.config is not None else {}
    if args.arch is not None and any(name.startswith("arch.") for name in saved):
        raise ConfigError(
            f"{one_line(str(args.config))} already describes the architecture: leave --arch out, or change "
            "single fields with arch.KEY=VALUE"
        )
    if "preset" in overrides and saved.get("preset", "auto") != "auto":
        raise ConfigError(
            f"{one_line(str(args.config))} already holds the values of preset={saved['preset']}: "
            "leave preset= out"
        )
    given = {**saved, **overrides}
    idle = [name for name in overrides if name.startswith("sudoku.")]
    if given.get("data_path") is not None and idle:
        raise ConfigError(f"{idle[0]} is for the built-in data, which data_path replaces: leave one out")

    preset, note = _preset(given)
    known = QUICK_ARCHITECTURES if preset is QUICK else ARCHITECTURES
    arch_name, arch_fields = architecture(args.arch or DEFAULT_ARCHITECTURE, KEYS, known)
    layers = {
        "run_name": arch_name,
        "arch.puzzle_emb_ndim": "${.hidden_size}",
        "arch.subgoal_head.goal_dim": "${..hidden_size}",
    }
    layers |= {**preset, **arch_fields, **given, "preset": "quick" if preset is QUICK else "full"}
    tree = OmegaConf.structured(Config())
    for name, value in layers.items():
        OmegaConf.update(tree, name, value)
    if "project_name" not in given:
        tree.project_name = project_name(tree.data_path, tree.sudoku.size)
    config = OmegaConf.to_object(tree)
    assert isinstance(config, Config)
    config.notes.append(f"configuration from {one_line(args.config)}" if args.config is not None else note)

    if config.stages is not None and "epochs" not in overrides:
        config.epochs = stage_ends(config)[-1]
    if "eval_interval" not in overrides and config.eval_interval is not None:
        fitting = _fitting_interval(config, config.eval_interval)
        if fitting != config.eval_interval:
            why = "the stages" if config.stages else f"epochs={config.epochs}"
            config.notes.append(
                f"eval_interval lowered from {config.eval_interval} to {fitting}, to fit {why}"
            )
            config.eval_interval = fitting
    validate(config)
    return config


def _fitting_interval(config: Config, asked: int) -> int:
    """The longest interval, no longer than `asked`, that a short run holds and that every stage ends with."""
    common = math.gcd(*stage_ends(config)[:-1])
    if not common:
        return min(asked, config.epochs)
    small = [number for number in range(1, math.isqrt(common) + 1) if common % number == 0]
    return max(epochs for number in small for epochs in (number, common // number) if epochs <= asked)


def _preset(given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The preset's values, and a line that says which one and why."""
    device, data_path = given.get("device", "auto"), given.get("data_path")
    asked = given.get("preset", "auto")
    if asked == "auto" and data_path is None:
        place = resolve_device(device)
        asked, why = (
            ("full", f"on {place}") if place.startswith("cuda") else ("quick", f"on {place}, without CUDA")
        )
    elif asked == "auto":
        asked, why = "full", "as data_path is given"
    else:
        why = "as asked"
    if asked == "quick":
        return QUICK, f"preset quick ({why}): a small model and a short run; preset=full is the full one"
    if data_path is None:
        return FULL_SUDOKU, f"preset full ({why}): the published Sudoku recipe for one GPU"
    return {}, f"preset full ({why}): the published defaults"
