"""Trains a hierarchical reasoning model: `python train.py --arch gated key=value ...`; see `--help`."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING

from hrm.common.errors import run_command
from hrm.config.load import KEYS, parse_args, resolve_device
from hrm.config.schema import Config
from hrm.training.signals import CONTINUE, REASONS, Stopped, StopSignals

if TYPE_CHECKING:
    import torch

    from hrm.distributed import World


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, 2 for a user's mistake, or one of `REASONS`."""
    words = sys.argv[1:] if argv is None else argv
    return run_command(
        lambda: train(parse_args(words)),
        "resume=auto continues from the last checkpoint, if one was saved",
    )


def train(config: Config) -> int:
    """Trains in one process or as a torchrun rank; returns the exit status. Raises UserError."""
    # Import PyTorch late: it takes seconds, and --help and mistyped keys do not need it.
    from hrm.common.versions import versions
    from hrm.distributed import joined, place
    from hrm.training.determinism import deterministic
    from hrm.training.messages import compiling_ended_line

    is_main = place().rank == 0
    save_seconds = config.checkpoint_seconds if is_main else None
    stop = StopSignals(config.max_seconds, save_seconds, speaks=is_main)
    name = resolve_device(config.device)
    with joined(name, config.global_batch_size, config.rank_timeout) as (ranks, device):
        # Nodes may keep the data in different folders.
        shared = {key: str(attrgetter(key)(config)) for key in KEYS if key != "data_path"}
        ranks.check_equal({**shared, **versions(device)})
        with deterministic(config, device) as notes:
            config.notes.extend(notes)
            try:
                ended_by = run(config, ranks, device, stop)
            except Stopped as stopped:
                ended_by = stopped.code
                if is_main:
                    print(compiling_ended_line(ended_by), flush=True)
    # torchrun treats any other status as a failure and may restart the ranks.
    return REASONS[ended_by][1] if ended_by and ranks.size == 1 else 0


def run(config: Config, ranks: "World", device: "torch.device", stop: StopSignals) -> int:
    """Trains on this rank; returns the key of `REASONS` that ended the run early, else CONTINUE.

    Raises Stopped if a stop is requested during compilation, before the first step.
    """
    from hrm.data.format import DatasetError
    from hrm.engine.compilation import Compilation
    from hrm.engine.device_choice import faster_device
    from hrm.engine.engine import Engine
    from hrm.engine.memory_estimate import does_not_fit, enough_memory
    from hrm.engine.modes import dtype_note, resolve_dtype
    from hrm.engine.profiling import Profile
    from hrm.training.checkpointer import Checkpointer
    from hrm.training.data import TrainingData
    from hrm.training.evaluation import Evaluator
    from hrm.training.logging import MetricsLog
    from hrm.training.messages import end_lines, parameter_count, start_line
    from hrm.training.monitor import Monitor
    from hrm.training.resume import restore_or_start
    from hrm.training.run_folder import folder_of, run_folder

    say: Callable[[str], None] = partial(print, flush=True) if ranks.is_main else lambda _: None
    for note in config.notes:
        say(note)
    data, run_dir, ended_by = TrainingData.open(config), folder_of(config), CONTINUE
    for note in data.notes:
        say(f"note: {note}")
    ranks.check_equal({"training data": data.fingerprint, "dtype": str(resolve_dtype(config, device))})
    if ranks.size == 1:
        device, choice = faster_device(config, data.metadata, device)
        if choice:
            say(choice)
    if note := dtype_note(config, device):
        say(note)
    with enough_memory(lambda: does_not_fit(config, data.metadata, device, ranks=ranks.size)):
        compilation = Compilation(say, stop.at_once)
        engine = Engine(config, data.metadata, data.total_steps, device, ranks, compilation)
    progress = restore_or_start(config, engine, data, run_dir, say)
    # engine.config is the configuration of the current stage.
    with stop, enough_memory(lambda: does_not_fit(engine.config, data.metadata, device, ranks=ranks.size)):
        # Run all checks that can reject the run before touching its folder.
        profile = Profile(config, run_dir, device, say, captured=engine.mode.captured)
        batches = data.batches(progress.position, ranks)
        say(start_line(engine, data))
        if not progress.is_over:
            engine.prepare(progress.later_archs)
        with (
            run_folder(config, progress.checkpoint, ranks, say),
            Checkpointer(config, engine, data, run_dir, stop) as checkpoints,
            profile,
            MetricsLog(config, run_dir, progress, mute=not ranks.is_main) as log,
        ):
            if progress.checkpoint is None:
                log.facts({"model/parameters": parameter_count(engine), "run/total_steps": data.total_steps})
            monitor = Monitor(config, engine, data, run_dir, log, checkpoints)
            evaluator = Evaluator(config, engine, data, log, checkpoints, stop)
            try:
                if progress.evaluation_due:
                    evaluator.evaluate(progress)
                while not progress.is_over and (batch := next(batches, None)) is not None:
                    profile.before_step()
                    engine.train_step(batch)
                    profile.after_step()
                    progress.advance(batch)
                    log.advance(progress.step)
                    if progress.log_due:
                        monitor.check(progress)
                    if progress.evaluation_due:
                        evaluator.evaluate(progress)
                    else:
                        progress.save_due |= stop.check(ranks)
                        checkpoints.save_if_due(progress)
                evaluator.finish(progress)
                checkpoints.save_if_unsaved(progress)
            except Stopped as stopped:
                ended_by = stopped.code
                checkpoints.save_if_unsaved(progress)
            except DatasetError:
                # With several ranks, only this one knows of the fault, and a save needs all of them.
                if ranks.size == 1:
                    checkpoints.save_if_unsaved(progress)
                raise
            checkpoints.wait()
    say(end_lines(config, progress, run_dir, ended_by))
    return ended_by


if __name__ == "__main__":
    sys.exit(main())
