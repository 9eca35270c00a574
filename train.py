"""Trains a hierarchical reasoning model: `python train.py --arch gated key=value ...`; see `--help`.

Reads top to bottom: configuration, data, model, where to start from, the loop, the end. No mathematics here.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from hrm.common.errors import UserError, run_command
from hrm.config.load import KEYS, data_folder, parse_args, resolve_device, to_yaml
from hrm.config.schema import Config, stage_arch
from hrm.ranks import one_voice, place
from hrm.training.messages import Evaluations, describe, parameter_count, summary
from hrm.training.signals import GO_ON, HANG_UP, REASONS, SAVE, TIME_OVER, Interruption, Stopped

# PyTorch takes seconds to import: --help and a mistyped key are answered without it.
if TYPE_CHECKING:
    import numpy as np
    import torch

    from hrm.data.dataset import Batch, TrainBatch
    from hrm.distributed import World
    from hrm.training.logging import Report
    from hrm.training.spikes import Spike

Say = Callable[[str], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, 2 for a mistake, or what `REASONS` says."""
    words = sys.argv[1:] if argv is None else argv
    return run_command(
        lambda: one_voice(lambda: train(parse_args(words))),
        "resume=auto goes on from the last checkpoint, if one was saved",
    )


def train(config: Config) -> int:
    """One run, alone or with the ranks that torchrun started; returns the process's exit status.

    Raises UserError for what the user can mend.
    """
    from hrm import distributed
    from hrm.software import versions
    from hrm.training.determinism import deterministic

    is_main = place().rank == 0
    save_seconds = config.checkpoint_seconds if is_main else None
    interruption = Interruption(config.max_seconds, save_seconds, speaks=is_main)
    name, batch_size = resolve_device(config.device), config.global_batch_size
    with distributed.joined(name, batch_size, config.rank_timeout) as (world, device):
        world.check_equal({**shared_keys(config), **versions(device)})
        with deterministic(config, device) as notes:
            config.notes.extend(notes)
            ended_by = Run(config, world, device, interruption).go()
    # To torchrun any other status is a failure, after which it may start the ranks again.
    return REASONS[ended_by][1] if ended_by and world.size == 1 else 0


class Run:
    """One rank's part of a run: what it trains on, how far it is, and what takes it on from there."""

    def __init__(
        self, config: Config, world: "World", device: "torch.device", interruption: Interruption
    ) -> None:
        from hrm.checkpoint.save import Saver
        from hrm.data.dataset import PuzzleDataset, check_same_task, digests, fingerprint, steps_in, subset
        from hrm.engine.engine import Engine
        from hrm.training.early_stopping import Best
        from hrm.training.incidents import Incidents
        from hrm.training.resume import find_start, run_identity

        self.config, self.world, self.interruption = config, world, interruption
        self.run_dir = Path(config.output_dir) / config.project_name / config.run_name
        self.say: Say = partial(print, flush=True) if world.is_main else lambda _: None
        for note in config.notes:
            self.say(note)

        # Data.
        folder = data_folder(config)
        self.train_set, self.test_set = PuzzleDataset(folder, "train"), PuzzleDataset(folder, "test")
        check_same_task(self.train_set, self.test_set)
        self.dataset = {"path": str(folder), "files": digests(self.train_set)}
        identity = run_identity(config, fingerprint(self.train_set))
        world.check_equal({"training data": identity["data_fingerprint"]})
        self.sample = None
        if config.eval_samples is not None:
            self.sample = subset(self.test_set, config.eval_samples, config.seed)
        self.total_steps = steps_in(self.train_set, config.epochs, config.global_batch_size)
        if config.max_steps is not None:
            self.total_steps = min(self.total_steps, config.max_steps)
        self.epochs_per_iter = config.eval_interval or config.epochs

        # Model, optimisers and carry; then this run's last checkpoint, another run's weights, or nothing.
        self.engine = Engine(
            config, self.train_set.metadata, total_steps=self.total_steps, device=device, world=world
        )
        start = find_start(config, self.engine, self.run_dir, identity, self.dataset, self.say)
        self.position, self.checkpoint, self.identity = start.position, start.checkpoint, start.identity
        # Whether the run is further than its last checkpoint, which may be another folder's.
        self.unsaved = start.checkpoint is None or start.checkpoint.parent.resolve() != self.run_dir.resolve()
        self.best = Best(config.early_stop_min_delta)
        self.incidents = Incidents(config, self.train_set, self.run_dir, mute=not world.is_main)
        # Whether the last step ended an interval whose evaluation is still to come.
        self.evaluation_due = start.loop.get("evaluation_due", False)
        # Evaluations of this step in the log, and whether the last one saw the whole split.
        self.evaluations: int | None = start.loop.get("evaluations")
        self.is_whole = start.loop.get("is_whole", start.checkpoint is not None)
        if "best" in start.loop:
            self.best.load_state_dict(start.loop["best"])
        if "incidents" in start.loop:
            self.incidents.load_state_dict(start.loop["incidents"])
        self.enter_stage()
        world.check_equal({"checkpoint": f"{self.checkpoint}, step {self.engine.step}"})
        self.engine.agree()
        self.saver = Saver(self.run_dir, keep=config.keep_checkpoints, keep_best=config.keep_best)
        # Of an evaluation of this step, and how good it is.
        self.results: Evaluations = {}
        self.score: float | None = start.loop.get("score")
        # A checkpoint that the clock has asked for.
        self.save_due = False

    def go(self) -> int:
        """Trains to the end; returns GO_ON, or the request of `REASONS` that has ended it before."""
        from hrm.data.format import DatasetError
        from hrm.engine.profiling import Profile

        config, engine, ended_by = self.config, self.engine, GO_ON
        with self.interruption, ExitStack() as stack:
            captured = engine.mode.captured
            self.profile = Profile(config, self.run_dir, engine.device, self.say, captured=captured)
            # Before anything of an earlier run is touched: it raises for a batch that the data cannot fill.
            batches = self.batches()
            self.say(describe(engine, self.train_set, self.test_set))
            self.take_folder(stack)
            stack.enter_context(self.saver)
            stack.enter_context(self.profile)
            self.report = self.open_report(None if self.checkpoint is None else engine.step)
            # By name: a rewind opens another.
            stack.callback(lambda: self.report.close())
            if self.checkpoint is None:
                facts = {"model/parameters": parameter_count(engine), "run/total_steps": self.total_steps}
                self.report.start(facts)
            try:
                self.loop(batches)
            except Stopped as stopped:
                ended_by = stopped.code
                self.save_unless_saved()
            except DatasetError:
                # Found by one rank alone, the others cannot take part.
                if self.world.size == 1:
                    self.save_unless_saved()
                raise
            self.saver.wait()
        if ended_by:
            self.say(
                f"{REASONS[ended_by][0]}: stopped after step {engine.step} of {self.total_steps}, saved in "
                f"{self.checkpoint}; the same command goes on from there"
            )
            return ended_by
        if self.stale and engine.step < self.total_steps:
            best = self.best
            self.say(
                f"stopped early: no evaluation better than that of step {best.step} in the last {best.stale}"
            )
        self.say(summary(config, self.results, engine.step, self.run_dir / f"step_{engine.step}"))
        return ended_by

    def loop(self, batches: "Iterator[TrainBatch]") -> None:
        """Every step and evaluation that is left. Raises Stopped after the step that a request came in."""
        config, engine = self.config, self.engine
        while True:
            if self.evaluation_due:
                self.judge()
            if engine.step >= self.total_steps or self.stale or (batch := next(batches, None)) is None:
                break
            self.world.doing(f"step {engine.step + 1}")
            self.profile.before_step()
            engine.train_step(batch)
            self.profile.after_step()
            self.incidents.fed(engine.step, batch.index)
            self.position, self.unsaved = batch.position, True
            self.evaluations, self.is_whole, self.results, self.score = 0, False, {}, None
            at_end = engine.step == self.total_steps
            self.evaluation_due = batch.position[1] == 0 or at_end
            if engine.step % config.log_interval == 0 or self.evaluation_due:
                self.log()
            if not self.evaluation_due:
                self.heed()
                if self.checkpoint_due:
                    self.save_unless_saved()

        # The data may end a few steps before the estimate, at an evaluation of a part.
        if not (self.is_whole and self.results):
            self.results = self.evaluate()
        if not self.is_whole:
            self.report_evaluation(is_whole=True)
        self.save_unless_saved()

    def batches(self) -> "Iterator[TrainBatch]":
        """The training batches from where the run is, this rank's rows of each."""
        from hrm.data.dataset import train_batches

        config, world = self.config, self.world
        return train_batches(
            self.train_set,
            seed=config.seed,
            epochs=config.epochs,
            epochs_per_iter=self.epochs_per_iter,
            global_batch_size=config.global_batch_size,
            rank=world.rank,
            world_size=world.size,
            start=self.position,
        )

    @property
    def stale(self) -> bool:
        """Whether early stopping ends the run."""
        return self.best.should_stop(self.config.early_stop_patience)

    @property
    def checkpoint_due(self) -> bool:
        """Whether the clock or the step asks for a checkpoint."""
        interval = self.config.checkpoint_interval
        return self.save_due or (interval is not None and self.engine.step % interval == 0)

    def enter_stage(self) -> None:
        """Takes the architecture of the present stage, of which the evaluation that ends it is a part."""
        interval = self.position[0] - (self.evaluation_due and self.position[1] == 0)
        self.engine.enter(stage_arch(self.config, interval * self.epochs_per_iter))

    def log(self) -> None:
        """A line of the log; what went wrong in its steps is told, and met."""
        engine, interval = self.engine, self.engine.pop()
        self.report.training(engine.step, interval.metrics)
        slow = self.world.stragglers(engine.own_time.seconds())
        if slow is not None and self.world.is_main:
            self.report.warn(slow)
        found, spike = self.incidents.check(engine.step, interval)
        for line in found:
            self.report.warn(line)
        if interval.skipped_in_a_row >= self.config.max_skipped_steps:
            self.save()
            self.saver.wait()
            # Or the others' end would be taken for a failure, and end the one that still writes.
            self.world.barrier()
            raise UserError(
                f"{interval.skipped_in_a_row} updates in a row were skipped up to step {engine.step}: "
                f"{engine.diagnosis()}; what was learnt before is in {self.checkpoint}; lower "
                f"lr={self.config.lr:g}, or set grad_clip or dtype=float32, and the same command goes on"
            )
        if spike is not None and self.incidents.rewinds < self.config.spike_rewinds:
            self.go_back(spike)

    def go_back(self, spike: "Spike") -> None:
        """Goes on from the last checkpoint before a loss spike, but with the batches that come now."""
        from hrm.checkpoint.read import checkpoint_before
        from hrm.training.resume import restore

        self.saver.wait()
        self.world.barrier()
        checkpoint = checkpoint_before(self.run_dir, spike.step, self.identity)
        self.world.check_equal({"checkpoint": str(checkpoint and checkpoint.path)})
        if checkpoint is None:
            self.report.warn(f"no checkpoint before step {spike.step} to go back to")
            return
        restore(self.engine, checkpoint)
        self.incidents.rewind(spike, checkpoint.step, checkpoint.training.get("incidents"))
        self.report.warn(f"went back to step {checkpoint.step}, and goes on behind the batch of the spike")
        self.best.load_state_dict(checkpoint.training["best"])
        self.evaluations = checkpoint.training.get("evaluations")
        self.evaluation_due = self.is_whole = False
        self.report.close()
        self.report = self.open_report(checkpoint.step)
        self.enter_stage()
        self.results, self.score = checkpoint.manifest["metrics"], checkpoint.manifest["score"]
        # Or a run that is killed now would resume behind the spike.
        self.save()
        self.saver.wait()

    def judge(self) -> None:
        """The evaluation that is due, and the checkpoint that it calls for."""
        from hrm.training.early_stopping import score

        config, engine = self.config, self.engine
        at_end = engine.step == self.total_steps
        self.results = self.evaluate(self.sample)
        # Ranked by the same examples at every evaluation; the last one tells of all.
        self.score = score(self.results["eval_ema" if config.ema else "eval"], config.best_metric)
        if at_end and self.sample is not None:
            self.results = self.evaluate()
        is_better = self.best.update(engine.step, self.score)
        self.report_evaluation(is_whole=self.sample is None or at_end)
        self.evaluation_due = False
        asked = config.checkpoint_every_eval or at_end or (is_better and config.keep_best)
        if asked or self.checkpoint_due:
            self.save()
        self.enter_stage()
        self.report.resume_clock()

    def report_evaluation(self, *, is_whole: bool) -> None:
        """Puts the last results into the log. is_whole: they are of the whole split."""
        self.report.evaluation(self.engine.step, self.results)
        self.evaluations = 1 + (self.evaluations or 0)
        self.is_whole, self.unsaved = is_whole, True

    def evaluate(self, examples: "dict[str, np.ndarray] | None" = None) -> Evaluations:
        """The test split's metrics by set as `eval`; with ema=true the averaged weights' as `eval_ema`.

        examples: those of each set to look at; None for all. Raises Stopped after a signal.
        """
        from hrm.data.dataset import test_batches

        engine, world = self.engine, self.world

        def batches() -> "Iterator[tuple[str, Batch, int]]":
            for batch in test_batches(
                self.test_set,
                global_batch_size=self.config.global_batch_size,
                rank=world.rank,
                world_size=world.size,
                examples=examples,
            ):
                # A limit of time waits for its end: or one that is shorter would begin it for ever.
                self.heed(HANG_UP)
                yield batch

        world.doing(f"evaluating after step {engine.step}")
        results = {"eval": engine.evaluate(batches())}
        if engine.average is not None:
            with engine.average.in_place():
                results["eval_ema"] = engine.evaluate(batches())
        return results

    def heed(self, urgent: int = TIME_OVER) -> None:
        """Notes that a checkpoint is due by time; raises Stopped on all ranks where one is asked to end.

        urgent: the least urgent of `REASONS` that counts.
        """
        self.saver.check()
        code = self.world.highest(self.interruption.ask())
        if code >= urgent:
            raise Stopped(code)
        self.save_due = self.save_due or code == SAVE

    def save(self) -> None:
        """Begins to save a checkpoint of the whole state; every rank takes part, the main one writes."""
        from hrm.checkpoint.read import AVERAGE

        engine = self.engine
        self.world.doing(f"saving step {engine.step}")
        training = {
            **engine.training_state(),
            "position": list(self.position),
            "evaluation_due": self.evaluation_due,
            "evaluations": self.evaluations,
            "is_whole": self.is_whole,
            "score": None if self.score is None else float(self.score),
            "best": self.best.state_dict(),
            "incidents": self.incidents.state_dict(),
        }
        if self.world.is_main:
            self.saver.save(
                engine.step,
                weights=engine.weights(),
                training=training,
                run=self.identity,
                facts={
                    "metrics": self.results,
                    "config": asdict(self.config),
                    "data": asdict(engine.metadata),
                    "dataset": self.dataset,
                },
                extra={} if engine.average is None else {AVERAGE: engine.average.state_dict()},
                score=self.score,
            )
        self.checkpoint = self.run_dir / f"step_{engine.step}"
        self.interruption.saved()
        self.save_due = self.unsaved = False

    def save_unless_saved(self) -> None:
        """Saves the present state, if it was not."""
        if self.unsaved:
            self.save()

    def open_report(self, resume_step: int | None) -> "Report":
        """All the places that metrics go to, from a step on; None for a new run."""
        from hrm.training.logging import Report

        mute = not self.world.is_main
        return Report(
            self.config, self.run_dir, self.total_steps, resume_step, evaluations=self.evaluations, mute=mute
        )

    def take_folder(self, stack: ExitStack) -> None:
        """Makes the run's folder this process's alone, with no earlier run in it but the one that goes on."""
        from hrm.checkpoint.safe_io import run_lock, set_aside
        from hrm.common.files import write_whole

        if self.world.is_main:
            stack.enter_context(run_lock(self.run_dir))
        self.world.barrier()
        if not self.world.is_main:
            return
        goes_on = self.checkpoint is not None and self.checkpoint.parent.resolve() == self.run_dir.resolve()
        if not goes_on and (self.run_dir / "config.yaml").exists() and self.config.resume != "auto":
            self.say(f"the earlier run in {self.run_dir} is kept as {set_aside(self.run_dir)}")
        self.run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(self.run_dir / "config.yaml", to_yaml(self.config))


def shared_keys(config: Config) -> dict[str, str]:
    """The configuration as the ranks must share it, by key: data may lie elsewhere on each node."""
    return {key: str(attrgetter(key)(config)) for key in KEYS if key != "data_path"}


if __name__ == "__main__":
    sys.exit(main())
