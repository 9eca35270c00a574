"""Starts a run from its last checkpoint, from another run's weights, or from new weights."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hrm.checkpoint.identifiers import follow_names, identifiers_of_checkpoint
from hrm.checkpoint.read import (
    AVERAGE,
    WEIGHTS,
    Checkpoint,
    differences,
    latest_checkpoint,
    load_checkpoint,
)
from hrm.checkpoint.safe_io import CheckpointError
from hrm.checkpoint.weights import PUZZLE_TABLE, load_weights
from hrm.common.errors import UserError
from hrm.config.load import Config
from hrm.config.schedule import interval_epochs
from hrm.config.schema import ArchConfig, LossConfig, SubgoalConfig
from hrm.data.checksums import changed_files
from hrm.engine.engine import Engine
from hrm.engine.kernel_choice import choose_kernels
from hrm.training.data import TrainingData
from hrm.training.progress import Progress

# Entries of an identity that determine the order of batches, and the score of an evaluation.
ORDER = ("data_fingerprint", "seed", "global_batch_size", "eval_interval", "epochs", "valid_fraction")
# Entries that older checkpoints lack.
ADDED = ("best_metric", "eval_samples", "valid_fraction", "augment", "optimizer")
RANKING = ("data_fingerprint", "best_metric", "eval_samples", "valid_fraction", "seed")


def run_identity(config: Config, data_fingerprint: str) -> dict[str, Any]:
    """Settings that a checkpoint must share with the run that resumes it; all others may change."""
    names = ("seed", "global_batch_size", "eval_interval", *ADDED)
    same = {name: getattr(config, name) for name in names}
    # A shorter last interval has another order.
    if config.eval_interval is None or config.epochs % config.eval_interval:
        same["epochs"] = config.epochs
    if config.stages is not None:
        same["stages"] = [asdict(stage) for stage in config.stages]
    return {
        "arch": asdict(config.arch),
        "loss": asdict(config.loss),
        "data_fingerprint": data_fingerprint,
        "checkpoint_path": config.checkpoint_path,
        **same,
    }


def restore_or_start(
    config: Config, engine: Engine, data: TrainingData, run_dir: Path, say: Callable[[str], None]
) -> Progress:
    """Loads the run's initial state into the engine; returns the state of the loop.

    All ranks call it together. Raises UserError for a checkpoint that is damaged or does not fit, with the
    values that differ, and for ranks that start from different states.
    """
    progress = Progress(config, data.total_steps, run_identity(config, data.fingerprint))
    source = _checkpoint_to_resume(config, run_dir, say)
    if source is not None:
        checkpoint = load_checkpoint(source)
        for note in checkpoint.notes:
            say(note)
        _resume(config, engine, data, progress, checkpoint, say)
        # The checkpoint belongs to another run.
        progress.unsaved = checkpoint.path.parent.resolve() != run_dir.resolve()
    elif config.checkpoint_path is not None:
        shapes = {name: tensor.shape for name, tensor in engine.weights().items()}
        weights, notes = load_weights(
            config.checkpoint_path, shapes, config.reset_puzzle_emb, data.names, engine.world
        )
        engine.load_weights(weights)
        for note in [f"starting from the weights of {config.checkpoint_path}", *notes]:
            say(note)
    progress.kernels = choose_kernels(
        engine, recorded=progress.kernels, resumes=progress.checkpoint is not None, say=say
    )
    engine.enter(progress.arch)
    engine.world.check_equal({"checkpoint": f"{progress.checkpoint}, step {progress.step}"})
    engine.agree()
    return progress


def _checkpoint_to_resume(config: Config, run_dir: Path, say: Callable[[str], None]) -> Path | None:
    """The path of the checkpoint to resume; None for a new run."""
    if config.resume == "none":
        return None
    if config.resume != "auto":
        return Path(config.resume)
    source, notes = latest_checkpoint(run_dir)
    if source is None and notes:
        raise UserError(f"{notes[0]}; resume=none starts a new run and keeps the old one")
    for note in notes:
        say(note)
    return source


def restore(engine: Engine, checkpoint: Checkpoint, **parts: bool) -> None:
    """Loads a checkpoint's whole state into the engine. parts: arguments of `Engine.load_training_state`."""
    engine.load_weights(checkpoint.weights)
    if engine.average is not None:
        # If the checkpoint has no average, it stays equal to the weights.
        engine.average.load_state_dict(checkpoint.extra.get(AVERAGE, {}))
    engine.load_training_state(checkpoint.training, **parts)


def _resume(
    config: Config,
    engine: Engine,
    data: TrainingData,
    progress: Progress,
    checkpoint: Checkpoint,
    say: Callable[[str], None],
) -> None:
    """Loads a checkpoint into engine and progress, if it fits or resume_force=true."""
    identity = progress.identity
    saved = with_defaults(checkpoint.manifest["run"])
    if config.checkpoint_path is None:
        # Keep the path of the weights that the run started from.
        identity["checkpoint_path"] = saved.get("checkpoint_path")
    manifest = {**checkpoint.manifest, "run": saved}
    found = [line for line in differences(manifest, identity) if not line.startswith("data_fingerprint ")]
    before = saved.get("data_fingerprint")
    if before != identity["data_fingerprint"] and data.train_set.has_fingerprint(before):
        saved["data_fingerprint"] = before = identity["data_fingerprint"]
    if before != identity["data_fingerprint"]:
        found.insert(0, _other_data(checkpoint.manifest.get("dataset"), saved, data.source, identity))
    if found and not config.resume_force:
        raise CheckpointError(
            f"cannot resume from {checkpoint.path}: {'; '.join(found)}; give the options and data it was "
            "trained with, another run_name, resume=none, or resume_force=true to resume anyway"
        )
    notes = []
    if saved.get("data_fingerprint") != identity["data_fingerprint"]:
        notes = _follow_names(engine, data, checkpoint)
    _check_shapes(engine, checkpoint)

    def differs(*names: str) -> bool:
        return any(saved.get(name) != identity.get(name) for name in names)

    # The carry holds sequences of the old data and batch size.
    restore(engine, checkpoint, carry=not differs("data_fingerprint", "global_batch_size", "arch", "loss"))
    say(f"resuming {checkpoint.path} at step {checkpoint.step}; resume=none or a new run_name starts again")
    for line in [*(f"resume_force=true: {line}" for line in found), *notes]:
        say(line)
    outdated = ["best"] * differs(*RANKING) + ["incidents", "evaluation_due"] * differs(*ORDER)
    progress.load_state_dict(
        {name: value for name, value in checkpoint.training.items() if name not in outdated}
    )
    progress.checkpoint = checkpoint.path
    if differs(*ORDER):
        interval = _epochs_done(saved, progress.position[0]) // interval_epochs(config)
        progress.position = (interval, 0)
        say(f"resume_force=true: batches in another order, from the start of interval {interval} on")


def _other_data(
    old: Any, saved: Mapping[str, Any], dataset: Mapping[str, Any], identity: Mapping[str, Any]
) -> str:
    """A line with the data of a checkpoint, the current data, and the differing files."""
    prints = [str(run.get("data_fingerprint"))[:12] for run in (saved, identity)]
    old = old if isinstance(old, dict) else {}
    files = old.get("files")
    changed = changed_files(files, dataset["files"]) if isinstance(files, dict) else []
    which = f": {', '.join(changed[:3])}" if changed else ""
    return (
        f"the training data were {old.get('path', 'another data set')} (fingerprint {prints[0]}) and are now "
        f"{dataset['path']} (fingerprint {prints[1]}{which})"
    )


def _follow_names(engine: Engine, data: TrainingData, checkpoint: Checkpoint) -> list[str]:
    """Reorders the checkpoint's puzzle table by the names in other data; returns a note for the user.

    Raises CheckpointError if the data has none of its puzzles.
    """
    table, own = checkpoint.weights.get(PUZZLE_TABLE), engine.model.puzzle_emb
    if table is None or own is None or table.shape[1:] != own.weights.shape[1:]:
        return []
    there = identifiers_of_checkpoint(checkpoint.path / WEIGHTS, len(table))
    remedy = (
        "resume=none checkpoint_path=PATH reset_puzzle_emb=true starts a new run from its remaining weights"
    )
    checkpoint.weights[PUZZLE_TABLE], notes = follow_names(
        table, there, data.names, len(own.weights), checkpoint.path, remedy
    )
    return notes


def _check_shapes(engine: Engine, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError unless the checkpoint's weights have the names and shapes of this model's."""
    own = {name: tuple(tensor.shape) for name, tensor in engine.weights().items()}
    there = {name: tuple(tensor.shape) for name, tensor in checkpoint.weights.items()}
    differing = [name for name in own | there if own.get(name) != there.get(name)]
    if differing:
        name = differing[0]
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise CheckpointError(
            f"{checkpoint.path} holds another model's tensors: {name} is {there.get(name, 'missing')} there "
            f"and {own.get(name, 'missing')} here{more}; resume_force=true cannot make it fit, "
            "checkpoint_path= starts a new run from its weights"
        )


def _epochs_done(saved: Mapping[str, Any], iteration: int) -> int:
    """The number of epochs in the first `iteration` intervals of a saved run."""
    return int(iteration * (saved.get("eval_interval") or saved.get("epochs") or 1))


def with_defaults(run: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's identity, completed with defaults of newer options."""
    try:
        arch = dict(run["arch"])
        arch["subgoal_head"] = SubgoalConfig(**arch.get("subgoal_head", {}))
        known = {"arch": asdict(ArchConfig(**arch)), "loss": asdict(LossConfig(**run["loss"]))}
        added = {name: getattr(Config, name) for name in ADDED}
        return {**added, **run, **known}
    # If a later version or another program wrote it, comparing the identities reports the differences.
    except (KeyError, TypeError, ValueError):
        return run
