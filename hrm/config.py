"""The typed configuration of a run, and the command line that makes one.

`parse_args` builds a `Config` from layers, each beating those before it: the defaults below, the preset, the
architecture (a name, or the user's YAML file), a file given by --config, and the key=value words.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import OmegaConf

from hrm.cli import (
    Arguments,
    ConfigError,
    help_lines,
    key,
    keys_of,
    read_keys,
    read_yaml,
    show,
    split_arguments,
)
from hrm.presets import (
    DEFAULT_ARCHITECTURE,
    FULL_SUDOKU,
    QUICK,
    architecture,
    folder_name,
    presets_help,
    words,
)

_UNPRINTABLE = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"
_PATH: dict[str, Any] = {"pattern": rf"(?=.*\S)[^{_UNPRINTABLE}]{{1,4000}}", "form": "a path"}
_RESUME = {**_PATH, "form": "auto, none or a path"}
_NAME: dict[str, Any] = {
    "pattern": rf"(?=.*\S)(?!\.{{1,2}}$)[^/\\{_UNPRINTABLE}]{{1,80}}",
    "form": "a folder name of at most 80 characters without / or \\, other than . and ..",
}


@dataclass
class ArchConfig:
    """The model: its size, its recurrence, its halting and its variant. Defaults: HRM v1."""

    hidden_size: int = key(512, "width D of every state", ge=1, le=65536)
    num_heads: int = key(8, "attention heads; must divide hidden_size", ge=1, le=4096)
    expansion: float = key(4.0, "SwiGLU inner width over D, before the factor 2/3", gt=0, le=64)
    H_layers: int = key(4, "blocks of the high-level module", ge=1, le=1024)
    L_layers: int = key(4, "blocks of the low-level module", ge=1, le=1024)
    H_cycles: int = key(2, "high-level updates in one step", ge=1, le=1024)
    L_cycles: int = key(2, "low-level updates for each high-level one", ge=1, le=1024)
    halt_max_steps: int = key(16, "most ACT steps spent on one sequence", ge=1, le=4096)
    halt_exploration_prob: float = key(0.1, "how often a random minimum of steps is drawn", ge=0, le=1)
    q_continue: bool = key(True, "learn q_continue from a second forward pass; false saves that pass")
    pos_encodings: Literal["rope", "learned"] = key("rope", "how positions are told apart")
    rope_theta: float = key(10000.0, "base of the rotary frequencies", gt=0, le=1e9)
    rms_norm_eps: float = key(1e-5, "added to the mean square in the norms", gt=0, le=1)
    # None only until __post_init__.
    puzzle_emb_ndim: int = key(
        None, "width of a puzzle's embedding; 0 for none", ge=0, le=2**20, shown="arch.hidden_size"
    )
    use_gating: bool = key(False, "mix the sources of each module through learnt gates")
    gate_hidden_ratio: float = key(0.25, "width of the gate network over D", gt=0, le=16)
    gate_init_bias: float = key(-2.2, "first bias of the gates; -2.2 opens them about 0.1", ge=-100, le=100)

    def __post_init__(self) -> None:
        if self.puzzle_emb_ndim is None:
            self.puzzle_emb_ndim = self.hidden_size


@dataclass
class LossConfig:
    """The loss."""

    loss_type: Literal["stablemax_cross_entropy", "softmax_cross_entropy"] = key(
        "stablemax_cross_entropy", "cross-entropy of the token predictions"
    )


@dataclass
class AttentionConfig:
    """How attention is computed; the model stays the same."""

    backend: Literal["auto", "triton", "flash", "sdpa"] = key(
        "auto", "auto takes what suits the sequence's length; a named one is taken or refused"
    )


@dataclass
class SudokuConfig:
    """The built-in Sudoku data, made when data_path is not given."""

    size: Literal[4, 6, 9] = key(9, "cells along a side")
    num_train: int = key(1000, "training puzzles before augmentation", ge=1, le=10**7)
    num_test: int = key(1000, "test puzzles", ge=1, le=10**7)
    num_aug: int = key(1000, "augmented copies of each training puzzle", ge=0, le=10**6)
    clues: int = key(0, "clues left in a puzzle; 0 takes away every one that is not needed", ge=0, le=81)
    min_difficulty: int = key(0, "fewest guesses a solver must need", ge=0, le=10**6)
    seed: int = key(0, "seed of the puzzles, apart from the run's", ge=0, le=2**32 - 1)


@dataclass
class Config:
    """The run: data, optimiser, length, machine, files."""

    arch: ArchConfig = field(default_factory=ArchConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    sudoku: SudokuConfig = field(default_factory=SudokuConfig)
    preset: Literal["auto", "quick", "full"] = key("auto", "set of defaults, see Presets")
    data_path: str | None = key(None, "folder of a puzzle data set; null makes Sudoku", **_PATH)
    global_batch_size: int = key(768, "sequences in a step, over all devices", ge=1, le=2**20)
    epochs: int = key(100_000, "epochs, each drawing one puzzle of every group", ge=1, le=10**9)
    eval_interval: int | None = key(
        10_000, "epochs between evaluations; null for one at the end", ge=1, le=10**9
    )
    max_steps: int | None = key(None, "stop after this many training steps", ge=1, le=10**9)
    lr: float = key(1e-4, "learning rate", ge=0, le=10)
    lr_warmup_steps: int = key(2000, "steps of linear warm-up", ge=0, le=10**9)
    lr_min_ratio: float = key(1.0, "where the cosine ends, as a share of lr; 1 is constant", ge=0, le=1)
    weight_decay: float = key(0.1, "decoupled weight decay", ge=0, le=1000)
    beta1: float = key(0.9, "decay of the first moment", ge=0, lt=1)
    beta2: float = key(0.95, "decay of the second moment", ge=0, lt=1)
    puzzle_emb_lr: float = key(1e-2, "learning rate of the puzzle embeddings", ge=0, le=10)
    puzzle_emb_weight_decay: float = key(0.1, "weight decay of the puzzle embeddings", ge=0, le=1000)
    seed: int = key(0, "seed of the weights, the batches and the exploration", ge=0, le=2**32 - 1)
    device: str = key(
        "auto",
        "where to run; auto is cuda where there is one, else cpu",
        pattern=r"auto|cpu|mps|cuda(:[0-9]{1,3})?",
        form="auto, cpu, cuda, cuda:N or mps",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = key(
        "auto", "precision of the forward pass; auto is bfloat16 on cuda, else float32"
    )
    mode: Literal["auto", "eager", "compile", "graph"] = key(
        "auto", "how the step is run; auto is graph on cuda, and what measures faster on a CPU"
    )
    gradient_accumulation: int = key(
        1,
        "parts that each device's sequences are computed in, one after another, to save memory",
        ge=1,
        le=2**20,
    )
    project_name: str = key(None, "folder of related runs", shown="(from the data)", **_NAME)
    run_name: str = key(None, "folder of this run", shown="(the architecture)", **_NAME)
    output_dir: str = key("checkpoints", "a run's files go to output_dir/project_name/run_name", **_PATH)
    checkpoint_path: str | None = key(None, "start from the weights of this run or checkpoint", **_PATH)
    reset_puzzle_emb: bool = key(False, "with checkpoint_path: start a fresh puzzle embedding table")
    resume: str = key("auto", "continue a run: auto the one in this run's folder, a path another", **_RESUME)
    checkpoint_every_eval: bool = key(True, "save at every evaluation, not only at the end")
    keep_checkpoints: int | None = key(3, "newest checkpoints that stay; null keeps all", ge=1, le=10**9)
    tracker: Literal["none", "tensorboard", "wandb"] = key("none", "where metrics go besides the files")
    log_interval: int = key(50, "steps between logged metrics", ge=1, le=10**9)
    profile: Literal["none", "torch", "nsys", "ncu"] = key(
        "none", "torch writes a trace and a table; nsys and ncu mark the steps for NVIDIA's profilers"
    )
    profile_steps: int = key(5, "steps in the profile", ge=1, le=1000)
    profile_after: int = key(20, "steps of this process before the profile", ge=0, le=10**9)
    # What was chosen for the user, one line each, for the caller to show; neither a key nor saved.
    notes: list[str] = field(
        default_factory=list, compare=False, repr=False, metadata={"omegaconf_ignore": True}
    )

    def __post_init__(self) -> None:
        if self.project_name is None:
            self.project_name = _project_name(self.data_path, self.sudoku.size)
        if self.run_name is None:
            self.run_name = "gated" if self.arch.use_gating else "v1"


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
        group, _, leaf = name.rpartition(".")
        value = getattr(getattr(config, group) if group else config, leaf)
        if not k.accepts(value):
            raise ConfigError(f"{name}={show(str(value))} is not allowed: give {k.allowed}")
    arch = config.arch
    if arch.hidden_size % arch.num_heads:
        raise ConfigError(
            f"arch.hidden_size={arch.hidden_size} is not a multiple of "
            f"arch.num_heads={arch.num_heads}: change one"
        )
    if arch.pos_encodings == "rope" and arch.hidden_size // arch.num_heads % 2:
        raise ConfigError(
            f"arch.hidden_size={arch.hidden_size} over arch.num_heads={arch.num_heads} gives heads "
            "of odd width, which rope cannot rotate: change one, or set arch.pos_encodings=learned"
        )
    if arch.use_gating and int(arch.gate_hidden_ratio * arch.hidden_size) < 1:
        raise ConfigError(
            f"arch.gate_hidden_ratio={arch.gate_hidden_ratio} of arch.hidden_size={arch.hidden_size} "
            "leaves the gate network no units: raise one"
        )
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
            f"{show(str(args.config))} already describes the architecture: leave --arch out, or change "
            "single fields with arch.KEY=VALUE"
        )
    if "preset" in overrides and saved.get("preset", "auto") != "auto":
        raise ConfigError(
            f"{show(str(args.config))} already holds the values of preset={saved['preset']}: "
            "leave preset= out"
        )
    arch_name, arch_fields = architecture(args.arch or DEFAULT_ARCHITECTURE, KEYS)
    given = {**saved, **overrides}
    idle = [name for name in overrides if name.startswith("sudoku.")]
    if given.get("data_path") is not None and idle:
        raise ConfigError(f"{idle[0]} is for the built-in data, which data_path replaces: leave one out")

    preset, note = _preset(given)
    layers = {"run_name": arch_name, "arch.puzzle_emb_ndim": "${.hidden_size}"}
    layers |= {**preset, **arch_fields, **given, "preset": "quick" if preset is QUICK else "full"}
    tree = OmegaConf.structured(Config())
    for name, value in layers.items():
        OmegaConf.update(tree, name, value)
    if "project_name" not in given:
        tree.project_name = _project_name(tree.data_path, tree.sudoku.size)
    config = OmegaConf.to_object(tree)
    assert isinstance(config, Config)
    config.notes.append(f"configuration from {show(args.config)}" if args.config is not None else note)

    # A short run asks for few epochs and does not think of the preset's interval.
    if "eval_interval" not in overrides and (config.eval_interval or 0) > config.epochs:
        config.notes.append(f"eval_interval lowered from {config.eval_interval} to epochs={config.epochs}")
        config.eval_interval = config.epochs
    if preset is QUICK and arch_fields and arch_fields.items() <= QUICK.items():
        config.notes.append(
            f"{arch_name}: preset=quick sets {words(arch_fields)} by itself, so this equals v1"
        )
    validate(config)
    return config


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


def _project_name(data_path: str | None, size: int) -> str:
    if data_path is None:
        return f"sudoku-{size}x{size}"
    return folder_name(os.path.basename(os.path.abspath(data_path)))
