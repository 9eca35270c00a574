"""Keys and architectures of the official HRM code, TRM and their forks, with their equivalents here."""

from collections.abc import Container
from typing import Any

from hrm.common.text import one_line
from hrm.config.messages import ConfigError

# The same values under another name.
_RENAMED = {
    "arch.forward_dtype": "dtype",
    "forward_dtype": "dtype",
    "load_checkpoint": "checkpoint_path",
    "resume_from": "resume",
    "resume_from_checkpoint": "resume",
    "learning_rate": "lr",
    "warmup_steps": "lr_warmup_steps",
    "subsample_size": "sudoku.num_train",
    "arch.loss.loss_type": "loss.loss_type",
    "data_paths": "data_path",
    # An earlier name of this key in hrm.evaluate.
    "halt_max_steps": "depth",
    "dataset.data_path": "data_path",
    "grad_accum_steps": "gradient_accumulation",
    "gradient_accumulation_steps": "gradient_accumulation",
    "grad_clip_norm": "grad_clip",
    "train_epochs_per_iter": "eval_interval",
    "checkpoint_interval_steps": "checkpoint_interval",
    # URM has one stack of blocks, and its loops are ACT steps.
    "arch.num_layers": "arch.L_layers",
    "arch.loops": "arch.halt_max_steps",
    "arch.lambda_": "arch.damping",
    "arch.noise_scale": "arch.noise",
}

# The key here, its value for true, its value for false.
_TRACKER, _EAGER, _Q = ("tracker", "wandb", "none"), ("mode", "eager", "auto"), "arch.q_continue"
_SWITCHES = {
    "enable_wandb": _TRACKER,
    "use_wandb": _TRACKER,
    "DISABLE_COMPILE": _EAGER,
    "disable_compile": _EAGER,
    "compile": ("mode", "auto", "eager"),
    "arch.no_ACT_continue": (_Q, "false", "true"),
    "no_ACT_continue": (_Q, "false", "true"),
}
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")

# Keys without an equivalent, each with the values that have no effect here.
_NONE = ("null", "~")
_IDLE: dict[str, tuple[str, ...]] = {
    "evaluators": ("[]",),
    "dataset.evaluators": ("[]",),
    "data_paths_test": ("[]",),
    "eval_save_outputs": ("[]",),
    "min_eval_interval": ("0", *_NONE),
    "freeze_weights": _FALSE,
    "use_muon": _FALSE,
    "load_weights_only": _FALSE,
    "gradient_checkpoint": _FALSE,
    "optimizer_kwargs": ("{}", *_NONE),
    "eval_interval_steps": _NONE,
    "resume": _FALSE,
    "arch.attn_dropout": ("0", "0.0"),
    "arch.mlp_dropout": ("0", "0.0"),
    "arch.disable_act_halt": _FALSE,
    "arch.act_inference": _FALSE,
    "arch.halt_threshold": ("0", "0.0"),
    "arch.halt_confirm_steps": ("0",),
    "arch.board_height": _NONE,
    "arch.board_width": _NONE,
    "arch.H_init_std": ("1", "1.0"),
    "arch.L_init_std": ("1", "1.0"),
}

_JUDGE = "python -m hrm.evaluate checkpoint=RUN"
_SAVE = f"leave it out; {_JUDGE} save_predictions=FILE.npz saves predictions"
_LOSS = "choose the loss by loss.loss_type=NAME"
_RANKS = "start `torchrun --nproc_per_node=N train.py` for N GPUs"
_LOGGED = "leave it out; log_interval=STEPS sets how often metrics are logged"
_RANK_WAIT = "leave it out; rank_timeout=SECONDS bounds how long ranks wait"
_WANDB = "write tracker=wandb; the package reads WANDB_ENTITY and WANDB_MODE"
_PATHS = f"leave it out; {_JUDGE} paths=K evaluates many paths of a puzzle"
_HALTING = "leave it out; evaluation runs every step, and eval_act=true also stops early"
_BOARD = "leave it out; the shape of a board is the data set's"
# Keys that do not affect the weights: a file's value is ignored with a note.
_ASIDE = {
    "evaluators": f"leave it out; {_JUDGE} lets ARC's augmentations vote",
    "data_paths_test": f"leave it out; {_JUDGE} data_path=DIR evaluates on other data",
    "eval_save_outputs": _SAVE,
    "save_outputs": _SAVE,
    "min_eval_interval": "leave it out; the first evaluation follows eval_interval epochs",
    "eval_interval_steps": "write eval_interval=EPOCHS, between evaluations",
    "load_strict": "leave it out; every tensor of a checkpoint must fit",
    "load_optimizer_state": "leave it out; resume= loads the whole state, checkpoint_path= only the weights",
    "load_weights_only": "write checkpoint_path=PATH, which loads only the weights",
    "gradient_checkpoint": "leave it out; gradient_accumulation=PARTS saves memory",
    "checkpoint": "write checkpoint_path=PATH, which starts from its weights",
    "retain_graph": "leave it out; no graph is kept here",
    "dataset.name": "write project_name=NAME",
    "arch.short_name": "write run_name=NAME",
    "arch.loop_deltas": f"leave it out; {_JUDGE} depth=STEPS evaluates at another depth",
    "loop_deltas": f"leave it out; {_JUDGE} depth=STEPS evaluates at another depth",
    "arch.profile": "write profile=torch",
    "target_q_update_every": "leave it out; the target of q_continue follows every step",
    "debug": "write mode=eager",
    "debug_trace_steps": "write profile=torch profile_steps=STEPS",
    "steps_hist_plotly": "leave it out; python -m hrm.report RUN plots a run",
    "eval_description": "write run_name=NAME",
    "eval_dir": _SAVE,
    "force_rerun": _PATHS,
    "param_iter": f"leave it out; {_JUDGE} depth=STEPS evaluates at another depth",
    "suffix": _PATHS,
    "wandb_run_name": "write run_name=NAME",
    "max_eval_steps": f"leave it out; {_JUDGE} samples=N evaluates a part",
    **dict.fromkeys(("different_init", "different_init_reset_std"), _PATHS),
    **dict.fromkeys(("enable_different_init_core_metrics", "report_conv_acc_stats"), _PATHS),
    **dict.fromkeys(("convergence_window", "convergence_top_k", "convergence_vis_plots"), _PATHS),
    **dict.fromkeys(("heavy_metrics_log_interval", "steps_hist_log_interval_steps"), _LOGGED),
    **dict.fromkeys(("grad_norm_log_interval_steps", "hidden_state_log_interval_steps"), _LOGGED),
    **dict.fromkeys(("eval_sync_max_wait_time", "eval_sync_poll_interval"), _RANK_WAIT),
    "eval_sync_status_log_interval": _RANK_WAIT,
    **dict.fromkeys(("entity", "wandb_mode", "wandb.entity"), _WANDB),
    "wandb.project": "write project_name=NAME",
    **dict.fromkeys(("arch.disable_act_halt", "arch.act_inference", "arch.halt_threshold"), _HALTING),
    **dict.fromkeys(("arch.halt_confirm_steps", "arch.halt_confirm_mode"), _HALTING),
    **dict.fromkeys(("arch.board_height", "arch.board_width"), _BOARD),
    **dict.fromkeys(("arch.loss", "arch.loss.name", "loss.name"), _LOSS),
}
HARMLESS = frozenset(_ASIDE)
_REMEDIES = {
    **_ASIDE,
    "dataset.evaluators": _ASIDE["evaluators"],
    "freeze_weights": "write optimizer=adam_atan2 lr=0 puzzle_emb_lr=VALUE, which trains only the puzzle "
    "embeddings",
    "use_muon": "write optimizer=muon",
    "optimizer_kwargs": "leave it out; set beta1, beta2 and weight_decay instead",
    "arch.attn_dropout": "models have no dropout here",
    "arch.mlp_dropout": "models have no dropout here",
    "arch.H_init_std": "initial states have a standard deviation of 1 here",
    "arch.L_init_std": "initial states have a standard deviation of 1 here",
    "arch.name": "choose the architecture by --arch NAME",
    "cuda": "write device=cuda",
    "cpu": "write device=cpu",
    "gpus": _RANKS,
    "num_gpus": _RANKS,
    "config_name": "write --config FILE.yaml, or --arch NAME",
    "hydra.run.dir": "write output_dir=DIR project_name=NAME run_name=NAME",
    "hydra.output_subdir": "write output_dir=DIR project_name=NAME run_name=NAME",
}

# Official models by class, with the options that turn the defaults into them.
_TRM = {"arch.share_levels": True, "arch.gradient": "last_cycle"}
_EQR = {**_TRM, "arch.q_continue": False, "arch.puzzle_emb_ndim": 0}
CLASSES: dict[str, dict[str, Any]] = {
    "HierarchicalReasoningModel_ACTV1": {},
    "TinyRecursiveReasoningModel_ACTV1": _TRM,
    # The copies of TRM in URM and in EqR, which has no puzzle embeddings.
    "TRM": _TRM,
    "TRMModel": _EQR,
    "URM": {
        "arch.single_state": True,
        "arch.swiglu": "conv",
        "arch.gradient": "last_cycle",
        "arch.q_continue": False,
    },
    "EqRModel": {**_EQR, "arch.init": "random"},
}

# Architectures of TRM's code that do not exist here; a similar name means another model.
ARCHITECTURES = ("trm_hier6", "trm_singlez", "transformers_baseline")


def translate(name: str, text: str, keys: Container[str]) -> tuple[str | None, str, str]:
    """The argument `name=text` in this project's spelling: key, value and a note, empty if nothing changes.

    The key is None for an argument without effect here. An unknown argument is returned unchanged.
    """
    bare, value = name.lstrip("+"), text.strip().lower()
    given = f"{name}={one_line(text)}"
    if value in _IDLE.get(bare, ()):
        return None, text, f"{given} is ignored: it has no effect here"
    key, true, false = _SWITCHES.get(bare, ("", "", ""))
    if key in keys and value in _TRUE + _FALSE:
        value = true if value in _TRUE else false
        return key, value, f"{given} is read as {key}={value}"
    key = _RENAMED.get(bare, bare)
    if bare == "data_paths":
        items = [item.strip(" '\"") for item in text.strip(" []").split(",")]
        if len(items) > 1:
            raise ConfigError(f"{given}: a run trains on one data set, write data_path=DIR")
        return key, items[0], f"{given} is read as {key}={one_line(items[0])}"
    return (key, text, f"{name} is read as {key}") if key in keys and key != name else (bare, text, "")


def remedy(name: str, keys: Container[str]) -> str | None:
    """The arguments that replace a foreign key; None for an unknown key."""
    key, true, false = _SWITCHES.get(name, ("", "", ""))
    if key in keys:
        return f"write {key}={true} for true, {key}={false} for false"
    return f"write {_RENAMED[name]}=VALUE" if _RENAMED.get(name) in keys else _REMEDIES.get(name)


def is_known(name: str) -> bool:
    """Whether a key is one of the foreign keys."""
    return any(name in table for table in (_RENAMED, _SWITCHES, _IDLE, _REMEDIES))
