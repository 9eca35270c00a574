"""The keys of a run's configuration: default, meaning and allowed values."""

import os
from dataclasses import field
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from hrm.config.keys import RULES, key, keys_of
from hrm.config.presets import folder_name

_UNPRINTABLE = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"
PATH: dict[str, Any] = {"pattern": rf"^(?=.*\S)[^{_UNPRINTABLE}]{{1,4000}}\Z", "form": "a path"}
DEVICE: dict[str, Any] = {
    "pattern": r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)\Z",
    "form": "auto, cpu, cuda, cuda:N or mps",
}
_RESUME = {**PATH, "form": "auto, none or a path"}
_NAME: dict[str, Any] = {
    "pattern": rf"^(?=.*\S)(?!\.{{1,2}}\Z)[^/\\{_UNPRINTABLE}]{{1,80}}\Z",
    "form": "a folder name of at most 80 characters without / or \\, other than . and ..",
}

# Step number of a sequence that never halts by choice: above every halt_max_steps.
NEVER = 1 << 30


@dataclass(config=RULES)
class SubgoalConfig:
    """The subgoal head of feudal HRM."""

    enabled: bool = key(False, "let the high-level state set goals for the next steps")
    manager_period: int = key(4, "ACT steps between two goals of a sequence", ge=1, le=4096)
    # None only until ArchConfig's __post_init__.
    goal_dim: int = key(None, "width of a goal", ge=1, le=65536, shown="arch.hidden_size")
    goal_scale: float = key(1.0, "length of a goal", gt=0, le=1000)
    gating: bool = key(True, "learn a gate for the weight of each goal; false gives full weight")
    temperature: float = key(1.0, "divisor of that gate's logit", gt=0, le=1000)


@dataclass(config=RULES)
class ArchConfig:
    """The model: its size, its recurrence, its halting and its variant. Defaults: HRM v1."""

    hidden_size: int = key(512, "width D of every state", ge=1, le=65536)
    num_heads: int = key(8, "attention heads; must divide hidden_size", ge=1, le=4096)
    expansion: float = key(4.0, "SwiGLU inner width over D, before the factor 2/3", gt=0, le=64)
    H_layers: int = key(4, "blocks of the high-level module", ge=1, le=1024)
    L_layers: int = key(4, "blocks of the low-level module", ge=1, le=1024)
    H_cycles: int = key(2, "high-level updates in one step", ge=1, le=1024)
    L_cycles: int = key(2, "low-level updates for each high-level one", ge=1, le=1024)
    halt_max_steps: int = key(16, "maximum number of ACT steps per sequence", ge=1, le=4096)
    halt_exploration_prob: float = key(
        0.1, "probability that a sequence gets a random minimum number of steps", ge=0, le=1
    )
    q_continue: bool = key(True, "learn q_continue from a second forward pass; false saves that pass")
    gradient: Literal["one_step", "last_cycle", "last_n"] = key(
        "one_step",
        "updates with gradient: the last update of each level, the whole last H-cycle, or "
        "the last gradient_updates",
    )
    gradient_updates: int = key(
        2, "updates of both levels, counted from the last, with gradient=last_n", ge=1, le=10**6
    )
    init: Literal["fixed", "random"] = key(
        "fixed", "initial states: H_init and L_init, or truncated normals drawn for every token"
    )
    noise: float = key(
        0.0, "standard deviation of the normal noise added to a state at every update", ge=0, le=100
    )
    damping: float = key(1.0, "share of the new state in an update; the rest is the old state", gt=0, le=1)
    chains: int = key(
        1,
        "states z_L per sequence in training; only that of lowest loss learns; evaluation uses one",
        ge=1,
        le=64,
    )
    share_levels: bool = key(False, "one stack of L_layers blocks for both levels; H_layers is not used")
    single_state: bool = key(
        False, "one state and one stack of L_layers, z = f(z + e) H_cycles * L_cycles times, without levels"
    )
    mlp_t: bool = key(False, "mix tokens by a SwiGLU over the tokens instead of attention")
    swiglu: Literal["plain", "normed", "conv"] = key(
        "plain",
        "normed: a norm before the gate, also in mlp_t; conv: a two-tap convolution over the tokens after",
    )
    head_bias: bool = key(False, "add a learnt bias to the answer's logits")
    register_tokens: int = key(
        0, "learnt tokens, the same for every puzzle, between its embedding and its cells", ge=0, le=4096
    )
    pos_encodings: Literal["rope", "rope2d", "learned", "none"] = key(
        "rope", "the encoding of positions; rope2d rotates by row and column of the data's grid"
    )
    rope_theta: float = key(10000.0, "base of the rotary embedding's frequencies", gt=0, le=1e9)
    rms_norm_eps: float = key(1e-5, "added to the mean square in the norms", gt=0, le=1)
    # None only until __post_init__.
    puzzle_emb_ndim: int = key(
        None, "width of a puzzle's embedding; 0 for none", ge=0, le=2**20, shown="arch.hidden_size"
    )
    puzzle_emb_len: int = key(
        0,
        "tokens reserved for a puzzle's embedding, padded with zeros; 0: as many as it fills",
        ge=0,
        le=4096,
    )
    use_gating: bool = key(False, "mix the sources of each module through learnt gates")
    gating_type: Literal["standard", "attention", "hierarchical"] = key(
        "standard", "gates by an MLP, by attention over the sources, or by a fast and a slow MLP"
    )
    gate_hidden_ratio: float = key(0.25, "width of the gate network over D", gt=0, le=16)
    gate_init_bias: float = key(
        -2.2, "initial bias of the gates; -2.2 opens them by about 0.1", ge=-100, le=100
    )
    gate_init_strategy: Literal["balanced", "input_focused", "hierarchy_focused"] | None = key(
        None, "initial bias of each source's gates, instead of gate_init_bias"
    )
    subgoal_head: SubgoalConfig = field(default_factory=SubgoalConfig)

    def __post_init__(self) -> None:
        if self.puzzle_emb_ndim is None:
            self.puzzle_emb_ndim = self.hidden_size
        if self.subgoal_head.goal_dim is None:
            self.subgoal_head.goal_dim = self.hidden_size


@dataclass(config=RULES)
class LossConfig:
    """The loss."""

    loss_type: Literal["stablemax_cross_entropy", "softmax_cross_entropy"] = key(
        "stablemax_cross_entropy", "cross-entropy of the token predictions"
    )
    label_smoothing: float = key(0.0, "share of a token's target spread over the vocabulary", ge=0, lt=1)
    step_decay: float = key(
        1.0,
        "ratio of an ACT step's token loss weight to the previous step's; the first weight is 1",
        gt=0,
        le=1,
    )
    q_halt_weight: float = key(0.5, "weight of the q_halt loss", ge=0, le=1000)
    feudal_loss_weight: float = key(
        0.0, "weight of the loss for following the subgoal; needs arch.subgoal_head.enabled", ge=0, le=1000
    )
    gate_saturation_weight: float = key(0.0, "weight of the penalty on gates near 0 and 1", ge=0, le=1000)
    gate_entropy_weight: float = key(0.0, "weight of the loss for using all sources equally", ge=0, le=1000)
    gate_stability_weight: float = key(
        0.0, "weight of the penalty on changes of the gates between steps", ge=0, le=1000
    )
    gate_loss_warmup_steps: int = key(1000, "steps before the gate losses start", ge=0, le=10**9)
    gate_loss_ramp_steps: int = key(1000, "steps over which they grow to their full weight", ge=0, le=10**9)

    @property
    def uses_gates(self) -> bool:
        """Whether a gate loss is on."""
        return max(self.gate_saturation_weight, self.gate_entropy_weight, self.gate_stability_weight) > 0


@dataclass(config=RULES)
class StageConfig:
    """One stage of a staged run; missing keys have the values in arch."""

    epochs: int = key(..., "epochs of this stage", ge=1, le=10**9)
    halt_max_steps: int | None = key(None, "maximum number of ACT steps in this stage", ge=1, le=4096)
    H_cycles: int | None = key(None, "high-level updates in this stage", ge=1, le=1024)
    L_cycles: int | None = key(None, "low-level updates in this stage", ge=1, le=1024)


@dataclass(config=RULES)
class AttentionConfig:
    """The implementation of attention; the model stays the same."""

    backend: Literal["auto", "triton", "flash", "sdpa"] = key(
        "auto", "auto chooses by sequence length; a named backend is used or is an error"
    )


@dataclass(config=RULES)
class SudokuConfig:
    """The built-in Sudoku data, made when data_path is not given."""

    size: Literal[4, 6, 9, 16] = key(9, "cells along a side")
    num_train: int = key(1000, "training puzzles before augmentation", ge=1, le=10**7)
    num_test: int = key(1000, "test puzzles", ge=1, le=10**7)
    num_aug: int = key(1000, "augmented copies of each training puzzle", ge=0, le=10**6)
    clues: int = key(0, "clues in a puzzle; 0 removes every clue that is not needed", ge=0, le=81)
    min_difficulty: int = key(0, "minimum number of guesses that a solver needs", ge=0, le=10**6)
    seed: int = key(0, "seed of the puzzles, independent of the run's seed", ge=0, le=2**32 - 1)


@dataclass(config=RULES)
class Config:
    """The run: data, optimiser, length, machine, files."""

    arch: ArchConfig = field(default_factory=ArchConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    sudoku: SudokuConfig = field(default_factory=SudokuConfig)
    preset: Literal["auto", "quick", "full", "record", "cgar"] = key("auto", "set of defaults, see Presets")
    data_path: str | None = key(None, "folder of a puzzle data set; null generates Sudoku", **PATH)
    global_batch_size: int = key(768, "sequences in a step, over all devices", ge=1, le=2**20)
    epochs: int = key(100_000, "number of epochs; an epoch draws one puzzle of every group", ge=1, le=10**9)
    eval_interval: int | None = key(
        10_000, "epochs between evaluations; null for one at the end", ge=1, le=10**9
    )
    eval_samples: int | None = key(
        None,
        "fixed random sample of examples for evaluations; null uses all, and so does the last evaluation",
        ge=1,
        le=10**9,
    )
    valid_fraction: float = key(
        0.0,
        "share of the training groups held out as the split valid, which best_metric then uses",
        ge=0,
        lt=1,
    )
    augment: bool = key(False, "draw every training example under a fresh random symmetry: Sudoku, maze, ARC")
    max_steps: int | None = key(None, "stop after this many training steps", ge=1, le=10**9)
    max_seconds: float | None = key(
        None, "save and end this process after this time; the same command continues", gt=0, le=1e9
    )
    optimizer: Literal["adam_atan2", "adamw", "muon"] = key(
        "adam_atan2", "optimiser of the weights; muon uses adamw for all but the blocks' matrices"
    )
    lr: float = key(1e-4, "learning rate", ge=0, le=10)
    lr_warmup_steps: int = key(2000, "steps of linear warm-up", ge=0, le=10**9)
    lr_min_ratio: float = key(
        1.0, "final value of the cosine schedule, as a share of lr; 1 is constant", ge=0, le=1
    )
    weight_decay: float = key(0.1, "decoupled weight decay", ge=0, le=1000)
    beta1: float = key(0.9, "decay of the first moment", ge=0, lt=1)
    beta2: float = key(0.95, "decay of the second moment", ge=0, lt=1)
    muon_lr: float = key(0.02, "learning rate of the matrices with optimizer=muon", ge=0, le=10)
    muon_momentum: float = key(0.6, "decay of their momentum", ge=0, lt=1)
    muon_steps: int = key(3, "Newton-Schulz steps that orthogonalise their update", ge=1, le=99)
    muon_weight_decay: float = key(5e-3, "decoupled weight decay of these matrices", ge=0, le=1000)
    grad_clip: float | None = key(None, "clip the gradient to this norm; null does not clip", gt=0, le=1e9)
    max_skipped_steps: int = key(
        10,
        "end the run after this many skipped updates in a row (loss or gradient not finite)",
        ge=1,
        le=10**9,
    )
    spike_threshold: float | None = key(
        10.0,
        "multiple of the usual spread above which a loss is a spike; null disables the check",
        ge=1,
        le=1e6,
    )
    spike_rewinds: int = key(
        0, "how often to return to the checkpoint before a spike and continue after its batch", ge=0, le=10**6
    )
    ema: bool = key(False, "keep a moving average of the weights and evaluate both")
    ema_rate: float = key(0.999, "decay of the average per step", ge=0, lt=1)
    ema_start: int = key(
        0, "updates before the average starts; until then it equals the weights", ge=0, le=10**9
    )
    stages: list[StageConfig] | None = key(
        None,
        "train by stages, such as '[{halt_max_steps: 4, epochs: 20}, {halt_max_steps: 8, epochs: 40}]'",
    )
    puzzle_emb_lr: float = key(1e-2, "learning rate of the puzzle embeddings", ge=0, le=10)
    puzzle_emb_weight_decay: float = key(0.1, "weight decay of the puzzle embeddings", ge=0, le=1000)
    seed: int = key(0, "seed of the weights, the batches and the exploration", ge=0, le=2**32 - 1)
    device: str = key(
        "auto",
        "device; auto is cuda if there is one, mps if a step measures faster there, else cpu",
        **DEVICE,
    )
    dtype: Literal["auto", "float32", "bfloat16"] = key(
        "auto",
        "precision of the forward pass; auto is bfloat16 on cuda, and on a CPU if its products are faster, "
        "else float32",
    )
    mode: Literal["auto", "eager", "compile", "graph"] = key(
        "auto", "how a step runs; auto is graph on cuda, and the faster mode by measurement on a CPU"
    )
    deterministic: bool = key(
        False,
        "bit-identical runs on the same machine; rejects operations that cannot be, and measures no mode",
    )
    rank_timeout: float = key(
        1800.0, "seconds that ranks wait for a missing rank before the job ends and reports it", ge=1, le=1e6
    )
    gradient_accumulation: int = key(
        1,
        "number of parts in which each device computes its sequences, to save memory",
        ge=1,
        le=2**20,
    )
    project_name: str = key(None, "folder of related runs", shown="(from the data)", **_NAME)
    run_name: str = key(None, "folder of this run", shown="(the architecture)", **_NAME)
    output_dir: str = key("checkpoints", "a run's files are in output_dir/project_name/run_name", **PATH)
    checkpoint_path: str | None = key(
        None, "start from the weights of this run, checkpoint or hub:NAME", **PATH
    )
    reset_puzzle_emb: bool = key(False, "with checkpoint_path: start with a new puzzle embedding table")
    resume: str = key(
        "auto", "continue a run: auto is the run in this run's folder, a path is another run", **_RESUME
    )
    resume_force: bool = key(False, "resume even if data or options differ")
    checkpoint_every_eval: bool = key(True, "save at every evaluation, not only at the end")
    checkpoint_interval: int | None = key(
        None, "steps between checkpoints, besides those at evaluations; null for none", ge=1, le=10**9
    )
    checkpoint_seconds: float | None = key(
        600.0, "seconds between checkpoints, besides those at evaluations; null for none", gt=0, le=1e9
    )
    keep_checkpoints: int | None = key(
        3, "number of newest checkpoints to keep; null keeps all", ge=1, le=10**9
    )
    best_metric: Literal["exact_accuracy", "accuracy", "lm_loss"] = key(
        "exact_accuracy",
        "metric that ranks evaluations: of the average with ema=true; on valid if there is one, else on test",
    )
    keep_best: bool = key(True, "never remove the checkpoint of the best evaluation")
    early_stop_patience: int | None = key(
        None, "stop after this many evaluations in a row without an improvement", ge=1, le=10**6
    )
    early_stop_min_delta: float = key(0.0, "minimum improvement that counts", ge=0, le=1000)
    tracker: Literal["none", "tensorboard", "wandb"] = key("none", "where to log metrics besides the files")
    log_interval: int = key(50, "steps between logged metrics", ge=1, le=10**9)
    profile: Literal["none", "torch", "nsys", "ncu"] = key(
        "none", "torch writes a trace and a table; nsys and ncu mark the steps for NVIDIA's profilers"
    )
    profile_steps: int = key(5, "steps in the profile", ge=1, le=1000)
    profile_after: int = key(20, "steps before the profile starts", ge=0, le=10**9)
    # A line for each automatic choice, for the caller to print; not a key, and not saved.
    notes: list[str] = field(default_factory=list, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.project_name is None:
            self.project_name = project_name(self.data_path, self.sudoku.size)
        if self.run_name is None:
            self.run_name = "gated" if self.arch.use_gating else "v1"


def project_name(data_path: str | None, size: int) -> str:
    """The default project name for a data set, or for the built-in Sudoku of `size` x `size` cells."""
    if data_path is None:
        return f"sudoku-{size}x{size}"
    return folder_name(os.path.basename(os.path.abspath(data_path)))


KEYS = keys_of(Config)
