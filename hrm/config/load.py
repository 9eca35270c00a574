"""Loads a run's configuration from layers: defaults, preset, architecture, --config file, key=value
arguments.

Each layer overrides those before it. `hrm.config.schema` declares the keys.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from operator import attrgetter
from typing import Any

from omegaconf import OmegaConf
from pydantic import TypeAdapter

from hrm.common.hub import is_remote
from hrm.common.text import one_line
from hrm.common.threads import THREADS_HELP
from hrm.config.keys import help_keys
from hrm.config.messages import ConfigError, Faults
from hrm.config.official import Official, is_official, read_official
from hrm.config.presets import (
    ARCHITECTURES,
    DEFAULT_ARCHITECTURE,
    PRESET_ARCHITECTURES,
    PRESETS,
    QUICK_ARCHITECTURES,
    architecture,
    cgar_stages,
    presets_help,
)
from hrm.config.read import Arguments, read_file, read_yaml, split_arguments
from hrm.config.schedule import fitting_interval, interval_epochs, stage_ends
from hrm.config.schema import (
    KEYS,
    ArchConfig,
    AttentionConfig,
    Config,
    LossConfig,
    StageConfig,
    SubgoalConfig,
    SudokuConfig,
    project_name,
)

_USAGE = """\
usage: python train.py [--arch NAME|FILE.yaml] [--config FILE.yaml] [--print-config] [key=value ...]

Trains on built-in Sudoku, or on the data set in data_path.

  --arch NAME|FILE.yaml  the architecture; arch=NAME is the same. A file holds arch.* keys without the prefix
                         and, in `defaults: [NAME]`, its base (else v1)
  --config FILE.yaml     start from a saved configuration or one of the official code; key=value arguments
                         override it. FILE.yaml without --config is the same
  --print-config         print the resulting configuration as YAML, and exit
"""


def parse_args(argv: Sequence[str]) -> Config:
    """The checked and resolved configuration of the command line `argv` (without the program's name).

    Its `preset` is never auto; its `notes` describe each automatic choice in one line. preset=auto is full
    with data_path, on any machine, so that a command trains the same model everywhere; otherwise it is full
    on a CUDA device and quick elsewhere. PyTorch is imported only to find such a device. --help and
    --print-config print, then exit with status 0. Raises ConfigError for any mistake.
    """
    args = split_arguments(argv, KEYS)
    if "--help" in args.flags:
        print(help_text())
        raise SystemExit(0)
    config = _resolve(args)
    if "--print-config" in args.flags:
        print("".join(f"# {note}\n" for note in config.notes) + to_yaml(config), end="")
        raise SystemExit(0)
    return config


def load_config(path: str | os.PathLike[str]) -> Config:
    """The configuration in a YAML file, such as the config.yaml that a run saves. Raises ConfigError."""
    return _resolve(Arguments({"--config": os.fspath(path)}))


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML (write it as UTF-8); `--config` reads it back to an equal one."""
    values = asdict(config)
    del values["notes"]
    return OmegaConf.to_yaml(OmegaConf.create(values))


def settings(config: Config) -> dict[str, Any]:
    """The value of every key as a JSON value, by dotted name."""
    values = {name: attrgetter(name)(config) for name in KEYS}
    return {**values, "stages": asdict(config)["stages"]}


def validate(config: Config) -> None:
    """Checks combinations of keys; types and ranges are already checked.

    Raises ConfigError that reports every conflict.
    """
    faults = Faults(_conflicts(config.arch, config.loss))
    ends, interval = stage_ends(config), config.eval_interval
    if ends[-1] != config.epochs:
        faults.append(f"epochs={config.epochs} is not the sum of the stages' epochs: leave epochs out")
    for end in [end for end in ends[:-1] if end % interval_epochs(config)][:1]:
        faults.append(
            f"stages: one ends after {end} epochs, which eval_interval={interval} does not "
            "divide: change one, as each stage ends with an evaluation"
        )
    if interval is not None and interval > config.epochs:
        faults.append(
            f"eval_interval={interval} is more than epochs={config.epochs}: lower it, or set it to null"
        )
    for name in ("muon_lr", "muon_momentum", "muon_steps", "muon_weight_decay"):
        if config.optimizer != "muon" and getattr(config, name) != getattr(Config, name):
            faults.append(
                f"{name}={getattr(config, name):g} is for optimizer=muon, not for "
                f"optimizer={config.optimizer}: leave one out"
            )
    if config.checkpoint_path is not None and config.resume not in ("auto", "none"):
        faults.append(
            "resume=PATH continues a run, checkpoint_path=PATH starts a new one from its weights: "
            "leave one out"
        )
    if is_remote(config.resume):
        faults.append(
            f"resume={one_line(config.resume)}: a run resumes only from a local folder; "
            "checkpoint_path=hub:NAME starts a new run from the weights there"
        )
    faults.raise_any()


def _conflicts(arch: ArchConfig, loss: LossConfig) -> Iterator[str]:
    width, heads, goal = (
        f"arch.hidden_size={arch.hidden_size}",
        f"arch.num_heads={arch.num_heads}",
        arch.subgoal_head,
    )
    if arch.hidden_size % arch.num_heads:
        yield f"{width} is not a multiple of {heads}: change one"
    elif arch.pos_encodings == "rope2d" and not arch.mlp_t and arch.hidden_size // arch.num_heads % 4:
        yield (
            f"{width} over {heads} gives heads of a width not divisible by 4, which rope2d cannot rotate: "
            "change one, or set arch.pos_encodings=learned"
        )
    elif arch.pos_encodings == "rope" and not arch.mlp_t and arch.hidden_size // arch.num_heads % 2:
        yield (
            f"{width} over {heads} gives heads of odd width, which rope cannot rotate: change one, or set "
            "arch.pos_encodings=learned"
        )
    if arch.chains > 1 and arch.init == "random":
        yield (
            f"arch.chains={arch.chains} gives each chain its own initial state, which arch.init=random would "
            "replace: leave one out"
        )
    if arch.chains > 1 and arch.hidden_size <= 10:
        yield f"{width} is too narrow for the initial states of arch.chains={arch.chains}: raise it above 10"
    if arch.gradient != "last_n" and arch.gradient_updates != ArchConfig.gradient_updates:
        yield (
            f"arch.gradient_updates={arch.gradient_updates} is for arch.gradient=last_n, not for "
            f"arch.gradient={arch.gradient}: leave one out"
        )
    if arch.single_state and arch.use_gating:
        yield "arch.single_state=true has no second state to gate: set arch.use_gating=false"
    if arch.single_state and arch.chains > 1:
        yield f"arch.single_state=true has no z_L for arch.chains={arch.chains}: set arch.chains=1"
    if arch.single_state and goal.enabled:
        yield (
            "arch.single_state=true has no worker to follow a goal: set arch.subgoal_head.enabled=false and "
            "loss.feudal_loss_weight=0"
        )
    if arch.swiglu == "conv" and arch.mlp_t:
        yield "arch.swiglu=conv mixes neighbouring tokens, and arch.mlp_t=true mixes all tokens: change one"
    if arch.use_gating and int(arch.gate_hidden_ratio * arch.hidden_size) < 1:
        ratio = f"arch.gate_hidden_ratio={arch.gate_hidden_ratio}"
        yield f"{ratio} of {width} leaves the gate network no units: raise one"
    if arch.gate_init_strategy is not None and arch.gate_init_bias != ArchConfig.gate_init_bias:
        yield (
            f"arch.gate_init_strategy={arch.gate_init_strategy} sets the biases that "
            f"arch.gate_init_bias={arch.gate_init_bias:g} would: leave one out"
        )
    if loss.uses_gates and not arch.use_gating:
        yield (
            "loss.gate_saturation_weight, gate_entropy_weight and gate_stability_weight are for a gated "
            "model: give --arch gated, or leave them out"
        )
    filled = -(-arch.puzzle_emb_ndim // arch.hidden_size)
    if 0 < arch.puzzle_emb_len < filled:
        yield (
            f"arch.puzzle_emb_ndim={arch.puzzle_emb_ndim} fills {filled} tokens of {width}, more than "
            f"arch.puzzle_emb_len={arch.puzzle_emb_len}: change one"
        )
    if loss.feudal_loss_weight > 0 and not goal.enabled:
        yield (
            f"loss.feudal_loss_weight={loss.feudal_loss_weight:g} needs a subgoal head: give "
            "--arch feudal or arch.subgoal_head.enabled=true, or set it to 0"
        )
    if goal.enabled and goal.goal_dim > arch.hidden_size:
        yield (
            f"arch.subgoal_head.goal_dim={goal.goal_dim} is more than {width}, the width of the states that "
            "follow the goal: lower it, or leave it out"
        )


def resolve_device(name: str) -> str:
    """Resolves `device=name` on this machine to cpu, cuda, cuda:N or mps.

    auto is cuda if there is a CUDA GPU, else cpu; a run may replace cpu by mps (`hrm.engine.device_choice`).
    Raises ConfigError for a missing device. Imports PyTorch unless the name is cpu.
    """
    if name == "cpu":
        return name
    import torch

    remedy = "use device=cpu, or device=auto to use an available one"
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
    """The help page, generated from the declarations: usage, architectures, presets and every key."""
    groups = {
        "": Config,
        "arch": ArchConfig,
        "arch.subgoal_head": SubgoalConfig,
        "loss": LossConfig,
        "attention": AttentionConfig,
        "sudoku": SudokuConfig,
    }
    return "\n".join([_USAGE, *presets_help(), *help_keys(KEYS, groups), THREADS_HELP])


def _resolve(args: Arguments) -> Config:
    file, arch = args.flags.get("--config"), args.flags.get("--arch")
    saved, notes = {}, list(args.notes)
    if file is not None:
        node = read_yaml(file)
        if is_official(node):
            official = read_official(node, file, KEYS)
            saved, notes = _official_values(official, file, args), official.notes + notes
            # Official models have no gates unless the file sets them.
            arch = arch or _official_base(official.base, file) or "v1"
        else:
            saved = read_file(node, file, KEYS)
    if args.flags.get("--arch") is not None and any(name.startswith("arch.") for name in saved):
        raise ConfigError(
            f"{one_line(str(file))} already describes the architecture: leave --arch out, or change "
            "single fields with arch.KEY=VALUE"
        )
    if "preset" in args.values and saved.get("preset", "auto") != "auto":
        raise ConfigError(
            f"{one_line(str(file))} already holds the values of preset={saved['preset']}: leave preset= out"
        )
    given = {**saved, **args.values}
    unused = [name for name in args.values if name.startswith("sudoku.")]
    if given.get("data_path") is not None and unused:
        raise ConfigError(f"{unused[0]} is for the built-in data, which data_path replaces: leave one out")

    name, note = _preset(given)
    preset = PRESETS[name] if name != "full" or given.get("data_path") is None else {}
    known = QUICK_ARCHITECTURES if name == "quick" else ARCHITECTURES
    arch = arch or PRESET_ARCHITECTURES.get(name, DEFAULT_ARCHITECTURE)
    arch_name, arch_fields = architecture(arch, KEYS, known)
    if name in PRESET_ARCHITECTURES:
        # The preset's recipe includes its architecture's values and overrides some of them.
        values = {"run_name": name, **arch_fields, **preset, **given}
    else:
        values = {"run_name": arch_name, **preset, **arch_fields, **given}
    if name == "cgar" and "stages" not in given:
        values["stages"] = [StageConfig(**stage) for stage in cgar_stages(values["epochs"])]
    config = config_of({**values, "preset": name})
    config.notes.extend([f"configuration from {one_line(file)}" if file is not None else note, *notes])

    if config.stages is not None and "epochs" not in args.values:
        config.epochs = stage_ends(config)[-1]
    if "eval_interval" not in args.values and config.eval_interval is not None:
        fitting = fitting_interval(config, config.eval_interval)
        if fitting != config.eval_interval:
            why = "the stages" if config.stages else f"epochs={config.epochs}"
            config.notes.append(
                f"eval_interval lowered from {config.eval_interval} to {fitting}, to fit {why}"
            )
            config.eval_interval = fitting
    validate(config)
    return config


def _official_values(official: Official, file: str, args: Arguments) -> dict[str, Any]:
    """The values of an official file, with its data set unless the command line gives one."""
    if args.values.get("data_path") is not None:
        return official.values
    if len(official.data_paths) != 1:
        what = f"{len(official.data_paths)} data sets" if official.data_paths else "no data set"
        raise ConfigError(f"{one_line(file)} names {what}, and a run trains on one: write data_path=DIR")
    return {**official.values, "data_path": official.data_paths[0]}


def _official_base(base: str | None, file: str) -> str | None:
    """The base architecture of a file: Hydra's file, or the architecture of this name here."""
    folder = os.path.dirname(file)
    paths = [os.path.join(folder, *up, "arch", f"{base}.yaml") for up in ([], [os.pardir])]
    return next((path for path in paths if base is not None and os.path.isfile(path)), base)


def config_of(values: Mapping[str, Any]) -> Config:
    """The configuration with these values, by dotted name, and defaults for other keys.

    A value `${key}` follows that key.
    """
    tree = OmegaConf.create(asdict(Config()))
    follow = {"arch.puzzle_emb_ndim": "${.hidden_size}", "arch.subgoal_head.goal_dim": "${..hidden_size}"}
    for name, value in {**follow, **values}.items():
        OmegaConf.update(
            tree, name, [asdict(stage) for stage in value] if KEYS[name].items and value else value
        )
    # The command line and files are strict; here a mapping may give a group.
    config: Config = _CONFIG.validate_python(OmegaConf.to_container(tree, resolve=True), strict=False)
    if "project_name" not in values:
        config.project_name = project_name(config.data_path, config.sudoku.size)
    return config


_CONFIG = TypeAdapter(Config)


def _preset(given: Mapping[str, Any]) -> tuple[str, str]:
    """The preset's name, and a note with the reason."""
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
        return asked, f"preset quick ({why}): a small model and a short run; preset=full is full-size"
    if asked in PRESET_ARCHITECTURES:
        return asked, f"preset {asked} ({why}): a published Sudoku recipe"
    if data_path is None:
        return asked, f"preset full ({why}): the published Sudoku recipe for one GPU"
    return asked, f"preset full ({why}): the published defaults"
