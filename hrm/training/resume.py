"""Where a run starts: its own last checkpoint, another run's weights, or nothing."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from hrm.checkpoint.read import AVERAGE, Checkpoint, differences, latest_checkpoint, load_checkpoint
from hrm.checkpoint.safe_io import CheckpointError
from hrm.checkpoint.weights import load_weights
from hrm.common.errors import UserError
from hrm.config.load import Config
from hrm.config.schema import ArchConfig, LossConfig, SubgoalConfig
from hrm.data.checksums import changed_files
from hrm.engine.engine import Engine

# What the order of the batches depends on, and what makes evaluations comparable.
ORDER = ("data_fingerprint", "seed", "global_batch_size", "eval_interval", "epochs")
RANKING = ("data_fingerprint", "best_metric", "eval_samples", "seed")


class Start(NamedTuple):
    """Where a run starts: place in the data, checkpoint resumed, identity, and what it says of the loop."""

    position: tuple[int, int]
    checkpoint: Path | None
    identity: dict[str, Any]
    loop: dict[str, Any]


def run_identity(config: Config, data_fingerprint: str) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes it; anything else may change on the way."""
    names = ("seed", "global_batch_size", "eval_interval", "best_metric", "eval_samples")
    same = {name: getattr(config, name) for name in names}
    # A last interval that is shorter than the others has an order of its own.
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


def find_start(
    config: Config,
    engine: Engine,
    run_dir: Path,
    identity: dict[str, Any],
    dataset: Mapping[str, Any],
    say: Callable[[str], None],
) -> Start:
    """Loads what the run starts from.

    dataset: the training data's `path`, and the digest of each of its `files`, as checkpoints keep them.
    Raises UserError naming what does not fit.
    """
    source: Path | None = None
    if config.resume == "auto":
        source, notes = latest_checkpoint(run_dir)
        if source is None and notes:
            raise UserError(f"{notes[0]}; resume=none starts anew and keeps what is there")
        for note in notes:
            say(note)
    elif config.resume != "none":
        source = Path(config.resume)

    if source is not None:
        checkpoint = load_checkpoint(source)
        for note in checkpoint.notes:
            say(note)
        return _resumed(config, engine, checkpoint, identity, dataset, say)

    if config.checkpoint_path is not None:
        shapes = {name: tensor.shape for name, tensor in engine.weights().items()}
        weights, notes = load_weights(config.checkpoint_path, shapes, config.reset_puzzle_emb)
        engine.load_weights(weights)
        for note in [f"starting from the weights of {config.checkpoint_path}", *notes]:
            say(note)
    return Start((0, 0), None, identity, {})


def restore(engine: Engine, checkpoint: Checkpoint, **parts: bool) -> None:
    """Puts a checkpoint's whole state into the engine. parts: as `Engine.load_training_state` takes them."""
    engine.load_weights(checkpoint.weights)
    if engine.average is not None:
        # Without one in the checkpoint it goes on from the weights.
        engine.average.load_state_dict(checkpoint.extra.get(AVERAGE, {}))
    engine.load_training_state(checkpoint.training, **parts)


def _resumed(
    config: Config,
    engine: Engine,
    checkpoint: Checkpoint,
    identity: dict[str, Any],
    dataset: Mapping[str, Any],
    say: Callable[[str], None],
) -> Start:
    saved = with_defaults(checkpoint.manifest["run"])
    if config.checkpoint_path is None:
        # Where the run once started from need not be said again, and stays on record.
        identity = {**identity, "checkpoint_path": saved.get("checkpoint_path")}
    manifest = {**checkpoint.manifest, "run": saved}
    found = [line for line in differences(manifest, identity) if not line.startswith("data_fingerprint ")]
    if saved.get("data_fingerprint") != identity["data_fingerprint"]:
        found.insert(0, _other_data(checkpoint.manifest.get("dataset"), saved, dataset, identity))
    if found and not config.resume_force:
        raise CheckpointError(
            f"cannot resume from {checkpoint.path}: {'; '.join(found)}; give the options and data it was "
            "trained with, another run_name, resume=none, or resume_force=true to go on all the same"
        )
    _check_shapes(engine, checkpoint)

    def differs(*names: str) -> bool:
        return any(saved.get(name) != identity.get(name) for name in names)

    # Sequences in flight are of the old data, in batches of the old size.
    same_carry = not differs("data_fingerprint", "global_batch_size", "arch", "loss")
    restore(engine, checkpoint, carry=same_carry)
    say(f"resuming {checkpoint.path} at step {checkpoint.step}; resume=none or a run_name starts anew")
    for line in found:
        say(f"resume_force=true: {line}")
    iteration, index = checkpoint.training["position"]
    position = (iteration, index)
    if differs(*ORDER):
        position = (_epochs_done(saved, iteration) // (config.eval_interval or config.epochs), 0)
        say(f"resume_force=true: batches in another order, from the start of interval {position[0]} on")
    outdated = ["best"] * differs(*RANKING) + ["incidents", "evaluation_due"] * differs(*ORDER)
    loop = {name: value for name, value in checkpoint.training.items() if name not in outdated}
    return Start(position, checkpoint.path, identity, loop)


def _other_data(
    old: Any, saved: Mapping[str, Any], dataset: Mapping[str, Any], identity: Mapping[str, Any]
) -> str:
    """One line that names the data of a checkpoint, those of now, and the files in which they differ."""
    prints = [str(run.get("data_fingerprint"))[:12] for run in (saved, identity)]
    old = old if isinstance(old, dict) else {}
    files = old.get("files")
    changed = changed_files(files, dataset["files"]) if isinstance(files, dict) else []
    which = f": {', '.join(changed[:3])}" if changed else ""
    return (
        f"the training data were {old.get('path', 'another data set')} (fingerprint {prints[0]}) and are now "
        f"{dataset['path']} (fingerprint {prints[1]}{which})"
    )


def _check_shapes(engine: Engine, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError unless the checkpoint's weights are those of this model, by name and shape."""
    own = {name: tuple(tensor.shape) for name, tensor in engine.weights().items()}
    there = {name: tuple(tensor.shape) for name, tensor in checkpoint.weights.items()}
    differing = [name for name in own | there if own.get(name) != there.get(name)]
    if differing:
        name = differing[0]
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise CheckpointError(
            f"{checkpoint.path} is of a model of other tensors: {name} is {there.get(name, 'missing')} there "
            f"and {own.get(name, 'missing')} here{more}; resume_force=true cannot make it fit, "
            "checkpoint_path= starts a new run from its weights"
        )


def _epochs_done(saved: Mapping[str, Any], iteration: int) -> int:
    return int(iteration * (saved.get("eval_interval") or saved.get("epochs") or 1))


def with_defaults(run: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's identity with the options that did not exist when it was saved, at their defaults."""
    try:
        arch = dict(run["arch"])
        arch["subgoal_head"] = SubgoalConfig(**arch.get("subgoal_head", {}))
        known = {"arch": asdict(ArchConfig(**arch)), "loss": asdict(LossConfig(**run["loss"]))}
        added = {name: getattr(Config, name) for name in ("best_metric", "eval_samples")}
        return {**added, **run, **known}
    # Of a later version, or none of this trainer: the comparison names what differs.
    except (KeyError, TypeError, ValueError):
        return run
