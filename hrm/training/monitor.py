"""Checks the steps of each log line for skipped updates and loss spikes, and rewinds the run."""

import math
from pathlib import Path
from typing import Any

from hrm.common.errors import UserError
from hrm.common.files import open_own, to_json
from hrm.config.load import Config
from hrm.engine.engine import Engine
from hrm.engine.step_metrics import Interval
from hrm.training.checkpointer import Checkpointer
from hrm.training.data import TrainingData
from hrm.training.health import rates
from hrm.training.logging import MetricsLog
from hrm.training.progress import Progress
from hrm.training.resume import restore
from hrm.training.run_folder import INCIDENTS
from hrm.training.spikes import Spike


class Monitor:
    """Logs training, and records and handles incidents in single steps.

    The main rank appends one line to incidents.jsonl for each incident: its step, its `kind` (skipped, spike
    or rewind), and the batch of that step: `iteration` and `batch` number, `set`, and the `examples` as rows
    of the arrays. A skipped update and a spike have `loss` and `grad_norm`; a rewind has `to_step`. A resumed
    run that repeats a step may record it again.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        data: TrainingData,
        run_dir: Path,
        log: MetricsLog,
        checkpoints: Checkpointer,
    ) -> None:
        self.config, self.engine, self.data = config, engine, data
        self.log, self.checkpoints = log, checkpoints
        self.path = run_dir / INCIDENTS

    def check(self, progress: Progress) -> None:
        """Logs the steps since the last call, warns of incidents in them, and may rewind after a spike.

        All ranks call it together. Raises UserError after `max_skipped_steps` skipped updates in a row, and
        if a file cannot be written.
        """
        config, engine = self.config, self.engine
        engine.world.barrier()
        interval = engine.pop()
        self.log.training(progress.step, interval.metrics)
        spike = self._record(progress, interval)
        if interval.skipped_in_a_row >= config.max_skipped_steps:
            self.checkpoints.save(progress)
            # A rank that raised earlier would end the job while the main rank still writes.
            self.checkpoints.wait_for_all()
            raise UserError(
                f"{interval.skipped_in_a_row} updates in a row were skipped up to step {progress.step}: "
                f"{engine.diagnosis()}; {progress.checkpoint} holds the state before them; lower "
                f"{rates(config, 1)}, or set grad_clip or dtype=float32, and run the same command again"
            )
        if spike is not None and progress.rewinds < config.spike_rewinds:
            self.rewind(progress, spike)

    def rewind(self, progress: Progress, spike: Spike) -> None:
        """Restores the last checkpoint before a loss spike; training continues with the next batches.

        Without such a checkpoint it only warns.
        """
        engine = self.engine
        checkpoint = self.checkpoints.before(spike.step, progress)
        if checkpoint is None:
            self.log.warn(f"no checkpoint before step {spike.step} to go back to")
            return
        restore(engine, checkpoint)
        self._write(progress, "rewind", spike.step, to_step=checkpoint.step)
        self.log.warn(f"went back to step {checkpoint.step}; training continues after the batch of the spike")
        progress.rewind(checkpoint)
        self.log.rewind(progress)
        engine.enter(progress.arch)
        # A run killed from here on must not resume from a checkpoint after the spike.
        self.checkpoints.save(progress)
        self.checkpoints.wait()

    def _record(self, progress: Progress, interval: Interval) -> Spike | None:
        """Records and warns of skipped updates and of a spike in an interval; returns the spike."""
        losses, norms = interval.losses, interval.norms
        first = progress.step - len(losses) + 1
        steps = range(first, progress.step + 1)
        skipped = [at for at, norm in zip(steps, norms, strict=True) if not math.isfinite(norm)]
        for at in skipped:
            self._write(progress, "skipped", at, loss=losses[at - first], grad_norm=norms[at - first])
        if skipped:
            self.log.warn(
                f"{len(skipped)} updates up to step {skipped[-1]} were skipped, as their loss or gradient is "
                f"not finite; {self.path} lists their batches"
            )
        spike = progress.watch.check(steps, losses)
        if spike is not None:
            norm = norms[spike.step - first]
            self._write(progress, "spike", spike.step, loss=spike.loss, grad_norm=norm)
            self.log.warn(f"{spike}; {self.path} lists its batch")
        return spike

    def _write(self, progress: Progress, kind: str, step: int, **facts: Any) -> None:
        """Appends an incident to the file."""
        if not self.engine.world.is_main:
            return
        line = to_json({"step": step, "kind": kind, **facts, **self._batch(progress, step)}) + "\n"
        try:
            with open_own(self.path, "ab") as file:
                file.write(line.encode())
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror or error}; free space or choose another folder "
                "with output_dir="
            ) from error

    def _batch(self, progress: Progress, step: int) -> dict[str, Any]:
        """The batch of a step, drawn again from the seed; empty for a step that is no longer remembered."""
        index = next(((it, number) for at, it, number in progress.batches if at == step), None)
        if index is None:
            return {}
        members = self.data.members(index)
        return {
            "iteration": index[0],
            "batch": index[1],
            "set": members.set_name,
            "examples": members.examples.tolist(),
        }
