"""Keys and architectures of the official HRM code, of TRM and of their forks, and how to write them here."""

from collections.abc import Container

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
    # Of hrm.evaluate, which called it so at first.
    "halt_max_steps": "depth",
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

# Keys without a counterpart: the values that change nothing here.
_IDLE = {
    "evaluators": ["[]"],
    "data_paths_test": ["[]"],
    "eval_save_outputs": ["[]"],
    "min_eval_interval": ["0", "null"],
    "freeze_weights": _FALSE,
}

_JUDGE = "python -m hrm.evaluate checkpoint=RUN"
_LOSS = "choose the loss by loss.loss_type=NAME"
_RANKS = "start `torchrun --nproc_per_node=N train.py` for N GPUs"
_REMEDIES = {
    "evaluators": f"leave it out; {_JUDGE} lets ARC's augmentations vote",
    "data_paths_test": f"leave it out; {_JUDGE} data_path=DIR evaluates on other data",
    "eval_save_outputs": f"leave it out; {_JUDGE} save_predictions=FILE.npz saves predictions",
    "save_outputs": f"leave it out; {_JUDGE} save_predictions=FILE.npz saves predictions",
    "min_eval_interval": "leave it out; the first evaluation follows eval_interval epochs",
    "freeze_weights": "write lr=0 puzzle_emb_lr=VALUE, which trains the puzzle embeddings alone",
    "arch.name": "choose the architecture by --arch NAME",
    "arch.loss": _LOSS,
    "arch.loss.name": _LOSS,
    "loss.name": _LOSS,
    "cuda": "write device=cuda",
    "cpu": "write device=cpu",
    "gpus": _RANKS,
    "num_gpus": _RANKS,
    "config_name": "write --config FILE.yaml, or --arch NAME",
    "hydra.run.dir": "write output_dir=DIR project_name=NAME run_name=NAME",
}

# Architectures of TRM's code that do not exist here; the nearest name is another model.
ARCHITECTURES = ("trm_hier6", "trm_singlez", "transformers_baseline")


def translate(name: str, text: str, keys: Container[str]) -> tuple[str | None, str, str]:
    """The word `name=text` in the spelling used here: key, value and a note, empty if nothing changes.

    The key is None for a word that has no effect here. A word whose meaning is unclear stays as it is.
    """
    bare, value = name.lstrip("+"), text.strip().lower()
    given = f"{name}={one_line(text)}"
    if value in _IDLE.get(bare, []):
        return None, text, f"{given} is left out: it changes nothing here"
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
    """The words that replace a foreign key; None for an unknown one."""
    key, true, false = _SWITCHES.get(name, ("", "", ""))
    if key in keys:
        return f"write {key}={true} for true, {key}={false} for false"
    return f"write {_RENAMED[name]}=VALUE" if _RENAMED.get(name) in keys else _REMEDIES.get(name)
