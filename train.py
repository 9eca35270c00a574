"""Trains a hierarchical reasoning model: `python train.py --arch gated key=value ...`; see `--help`.

Reads top to bottom: configuration, data, model, where to start from, the loop, the end. No mathematics here.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hrm.config import KEYS, data_folder, parse_args, resolve_device, to_yaml
from hrm.errors import UserError, run_command
from hrm.ranks import one_voice
from hrm.schema import ArchConfig, Config, LossConfig, SubgoalConfig, stage_arch

# PyTorch takes seconds to import: --help and a mistyped key are answered without it.
if TYPE_CHECKING:
    import numpy as np
    import torch

    from hrm.data.dataset import PuzzleDataset
    from hrm.distributed import World
    from hrm.engine import Engine
    from hrm.stopping import Best

Say = Callable[[str], None]
# Metrics by kind of weights, eval or eval_ema, by test set, by name.
Evaluations = dict[str, dict[str, dict[str, float]]]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status; see `run_command`."""
    words = sys.argv[1:] if argv is None else argv
    return run_command(
        lambda: one_voice(lambda: train(parse_args(words))),
        "resume=auto goes on from the last checkpoint, if one was saved",
    )


def train(config: Config) -> None:
    """One run, alone or with the ranks that torchrun started. Raises UserError for what the user can mend."""
    from hrm import distributed

    with distributed.joined(resolve_device(config.device), config.global_batch_size) as (world, device):
        world.check_equal({**shared_keys(config), **distributed.versions()})
        run(config, world, device)


def run(config: Config, world: "World", device: "torch.device") -> None:
    """One rank's part of a run, from its data to its last checkpoint."""
    from hrm.data.dataset import PuzzleDataset, check_same_task, fingerprint, steps_in, subset, train_batches
    from hrm.engine import Engine
    from hrm.profiling import Profile
    from hrm.stopping import Best, score
    from hrm.storage import run_lock
    from hrm.trackers import Report

    run_dir = Path(config.output_dir) / config.project_name / config.run_name
    say: Say = partial(print, flush=True) if world.is_main else lambda _: None
    for note in config.notes:
        say(note)

    # Data.
    folder = data_folder(config)
    train_set, test_set = PuzzleDataset(folder, "train"), PuzzleDataset(folder, "test")
    check_same_task(train_set, test_set)
    identity = run_identity(config, fingerprint(train_set))
    world.check_equal({"training data": identity["data_fingerprint"]})
    total_steps = steps_in(train_set, config.epochs, config.global_batch_size)
    if config.max_steps is not None:
        total_steps = min(total_steps, config.max_steps)

    epochs_per_iter = config.eval_interval or config.epochs
    sample = None if config.eval_samples is None else subset(test_set, config.eval_samples, config.seed)

    # Model, optimisers and carry; then this run's last checkpoint, another run's weights, or nothing.
    engine = Engine(config, train_set.metadata, total_steps=total_steps, device=device, world=world)
    start = find_start(config, engine, run_dir, identity, say)
    position, checkpoint, identity = start.position, start.checkpoint, start.identity
    best = Best(config.early_stop_min_delta)
    if start.best is not None:
        best.load_state_dict(start.best)
    engine.enter(stage_arch(config, position[0] * epochs_per_iter))
    world.check_equal({"checkpoint": f"{checkpoint}, step {engine.step}"})
    engine.agree()
    profile = Profile(config, run_dir, device, say, captured=engine.mode.captured)
    batches = train_batches(
        train_set,
        seed=config.seed,
        epochs=config.epochs,
        epochs_per_iter=epochs_per_iter,
        global_batch_size=config.global_batch_size,
        rank=world.rank,
        world_size=world.size,
        start=position,
    )
    say(describe(engine, train_set, test_set))

    # The run's folder: this process's alone, and no earlier run in it but the one that goes on.
    with ExitStack() as stack:
        if world.is_main:
            stack.enter_context(run_lock(run_dir))
        world.barrier()
        goes_on = checkpoint is not None and checkpoint.parent.resolve() == run_dir.resolve()
        if world.is_main:
            if not goes_on and (run_dir / "config.yaml").exists() and config.resume != "auto":
                say(f"the earlier run in {run_dir} is kept as {set_aside(run_dir)}")
            write_config(run_dir, config)

        # The loop.
        results: Evaluations = {}
        is_whole = False
        resume_step = None if checkpoint is None else engine.step
        stack.enter_context(profile)
        report = stack.enter_context(
            Report(config, run_dir, total_steps, resume_step, mute=not world.is_main)
        )
        if resume_step is None:
            report.start({"model/parameters": parameter_count(engine), "run/total_steps": total_steps})
        for batch in batches:
            if engine.step >= total_steps or best.should_stop(config.early_stop_patience):
                break
            profile.before_step()
            engine.train_step(batch)
            profile.after_step()
            at_end = engine.step == total_steps
            at_evaluation = batch.position[1] == 0 or at_end
            if engine.step % config.log_interval == 0 or at_evaluation:
                report.training(engine.step, engine.pop_metrics())
            if at_evaluation:
                position, results = batch.position, evaluate(engine, test_set, sample)
                # Ranked by the same examples at every evaluation; the last one tells of all.
                rank = score(results["eval_ema" if config.ema else "eval"], config.best_metric)
                is_better = best.update(engine.step, rank)
                is_whole = sample is None or at_end
                if at_end and sample is not None:
                    results = evaluate(engine, test_set)
                report.evaluation(engine.step, results)
                if config.checkpoint_every_eval or at_end or (is_better and config.keep_best):
                    checkpoint = save(run_dir, engine, position, identity, results, best, rank)
                engine.enter(stage_arch(config, position[0] * epochs_per_iter))
                report.resume_clock()

        # The end. The data may end a few steps before the estimate, at an evaluation.
        if not is_whole:
            only_sampled, results = bool(results), evaluate(engine, test_set)
            if only_sampled:
                report.evaluation(engine.step, results)
        if checkpoint is None or checkpoint.name != f"step_{engine.step}":
            checkpoint = save(run_dir, engine, position, identity, results, best, None)
    if best.should_stop(config.early_stop_patience) and engine.step < total_steps:
        say(f"stopped early: no evaluation better than that of step {best.step} in the last {best.stale}")
    say(summary(config, results, engine.step, checkpoint))


def shared_keys(config: Config) -> dict[str, str]:
    """The configuration as the ranks must share it, by key: data may lie elsewhere on each node."""
    return {key: str(attrgetter(key)(config)) for key in KEYS if key != "data_path"}


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


class Start(NamedTuple):
    """Where a run starts: place in the data, checkpoint resumed, identity, best evaluation so far."""

    position: tuple[int, int]
    checkpoint: Path | None
    identity: dict[str, Any]
    best: dict[str, Any] | None


def find_start(config: Config, engine: "Engine", run_dir: Path, identity: dict[str, Any], say: Say) -> Start:
    """Loads what the run starts from."""
    from hrm.checkpoint import AVERAGE, check_same_run, latest_checkpoint, load_checkpoint
    from hrm.weights import load_weights

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
        if config.checkpoint_path is None:
            # Where the run once started from need not be said again, and stays on record.
            origin = checkpoint.manifest["run"].get("checkpoint_path")
            identity = {**identity, "checkpoint_path": origin}
        check_same_run({**checkpoint.manifest, "run": with_defaults(checkpoint.manifest["run"])}, identity)
        engine.load_weights(checkpoint.weights)
        if engine.average is not None:
            # Without one in the checkpoint it goes on from the weights.
            engine.average.load_state_dict(checkpoint.extra.get(AVERAGE, {}))
        engine.load_training_state(checkpoint.training)
        say(f"resuming {checkpoint.path} at step {checkpoint.step}; resume=none or a run_name starts anew")
        iteration, index = checkpoint.training["position"]
        return Start((iteration, index), checkpoint.path, identity, checkpoint.training.get("best"))

    if config.checkpoint_path is not None:
        shapes = {name: tensor.shape for name, tensor in engine.weights().items()}
        weights, notes = load_weights(config.checkpoint_path, shapes, config.reset_puzzle_emb)
        engine.load_weights(weights)
        for note in [f"starting from the weights of {config.checkpoint_path}", *notes]:
            say(note)
    return Start((0, 0), None, identity, None)


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


def set_aside(run_dir: Path) -> Path:
    """Moves a run's folder to the first free name beside it, so that a new run loses nothing of it."""
    number = 1
    while (kept := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    try:
        return run_dir.rename(kept)
    except OSError as error:
        raise UserError(
            f"{run_dir}: cannot be moved aside ({error.strerror}); give another run_name"
        ) from None


def write_config(run_dir: Path, config: Config) -> None:
    """Saves the resolved configuration beside the run's checkpoints, for `--config` to read back."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")


def save(
    run_dir: Path,
    engine: "Engine",
    position: tuple[int, int],
    identity: dict[str, Any],
    results: Evaluations,
    best: "Best",
    score: float | None,
) -> Path:
    """Saves a checkpoint of the whole state; every rank takes part, the main one writes."""
    from hrm.checkpoint import AVERAGE, save_checkpoint

    training = {**engine.training_state(), "position": list(position), "best": best.state_dict()}
    average = {} if engine.average is None else {AVERAGE: engine.average.state_dict()}
    if engine.world.is_main:
        save_checkpoint(
            run_dir,
            engine.step,
            weights=engine.weights(),
            training=training,
            run=identity,
            metrics=results,
            data=asdict(engine.metadata),
            keep=engine.config.keep_checkpoints,
            extra=average,
            score=score,
            keep_best=engine.config.keep_best,
        )
    engine.world.barrier()
    return run_dir / f"step_{engine.step}"


def evaluate(
    engine: "Engine", test_set: "PuzzleDataset", examples: "dict[str, np.ndarray] | None" = None
) -> Evaluations:
    """The test split's metrics by set as `eval`; with ema=true the averaged weights' as `eval_ema`.

    examples: those of each set to look at; None for all.
    """
    from hrm.data.dataset import test_batches

    world = engine.world
    batches = partial(
        test_batches,
        test_set,
        global_batch_size=engine.config.global_batch_size,
        rank=world.rank,
        world_size=world.size,
        examples=examples,
    )
    results = {"eval": engine.evaluate(batches())}
    if engine.average is not None:
        with engine.average.in_place():
            results["eval_ema"] = engine.evaluate(batches())
    return results


def parameter_count(engine: "Engine") -> int:
    """The parameters of the model, the puzzle table aside."""
    return sum(p.numel() for p in engine.model.parameters())


def describe(engine: "Engine", train_set: "PuzzleDataset", test_set: "PuzzleDataset") -> str:
    """One line on what is about to train."""
    config, world = engine.config, engine.world
    ranks = f" x {world.size} ranks" if world.size > 1 else ""
    note = f" ({engine.mode.note})" if engine.mode.note else ""
    examples = [sum(len(part.inputs) for part in split.sets.values()) for split in (train_set, test_set)]
    return (
        f"{model_name(config.arch)}, {parameter_count(engine):,} parameters, "
        f"{engine.device}{ranks}, {str(engine.model.dtype).removeprefix('torch.')}, mode {engine.mode.name}"
        f"{note}; "
        f"{train_set.folder.parent}: {examples[0]:,} training and {examples[1]:,} test examples; "
        f"{engine.total_steps:,} steps of {config.global_batch_size}"
    )


def model_name(arch: ArchConfig) -> str:
    """The kind of model, in words."""
    kinds = ["gated"] * arch.use_gating + ["feudal"] * arch.subgoal_head.enabled
    return " ".join([*kinds, "TRM" if arch.share_levels else "HRM" if kinds else "HRM v1"])


def summary(config: Config, results: Evaluations, step: int, checkpoint: Path) -> str:
    """The last lines: the result, where it lies, what to type next."""
    from hrm.trackers import evaluation_line

    lines = ["", evaluation_line(step, results)]
    if config.data_path is None:
        lines.append("none of their solution grids was in training, augmentations included")
    python = Path(sys.executable)
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else Path("python")
    again = f"  {python} train.py --config {checkpoint.parent / 'config.yaml'}"
    lines += [
        f"checkpoint: {checkpoint}",
        f"metrics:    {checkpoint.parent / 'metrics.jsonl'}",
        "next:",
        # With stages the epochs follow from them.
        *([] if config.stages else [f"{again} epochs={2 * config.epochs}   train on, twice as long in all"]),
        f"{again} checkpoint_path={checkpoint} run_name={config.run_name}-next   start from its weights",
        f"  {python} -m hrm.solve {checkpoint.parent} PUZZLE --trace   watch it solve a puzzle of yours",
        f"  {python} -m hrm.evaluate checkpoint={checkpoint.parent} eval_act=true   judge it",
        f"  {python} -m hrm.report {checkpoint.parent}   draw this run",
        f"  {python} -m hrm.compare --arch v1 gated   compare architectures, over seeds",
        f"  {python} train.py --help   every option; preset=full is the full-size model",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
