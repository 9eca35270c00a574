"""Decides when a run saves; the main rank writes the whole state in the background."""

from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from hrm.checkpoint.identifiers import IDENTIFIERS
from hrm.checkpoint.read import AVERAGE, Checkpoint, checkpoint_before
from hrm.checkpoint.save import Saver
from hrm.config.load import Config
from hrm.engine.engine import Engine
from hrm.training.data import TrainingData
from hrm.training.progress import Progress
from hrm.training.signals import StopSignals


class Checkpointer:
    """Saves a run's checkpoints in `run_dir`; a context that waits at its end for the last one.

    All ranks call its methods together, except `raise_if_failed`.
    """

    def __init__(
        self, config: Config, engine: Engine, data: TrainingData, run_dir: Path, stop: StopSignals
    ) -> None:
        self.config, self.engine, self.data, self.run_dir, self.stop = config, engine, data, run_dir, stop
        self._saver = Saver(run_dir, keep=config.keep_checkpoints, keep_best=config.keep_best)

    def save(self, progress: Progress) -> None:
        """Starts to save the current state. Raises CheckpointError if the previous save failed."""
        engine = self.engine
        engine.world.barrier()
        # Every rank contributes its part of the state.
        training = {**engine.training_state(), **progress.state_dict()}
        if engine.world.is_main:
            self._saver.save(
                progress.step,
                weights=engine.weights(),
                training=training,
                run=progress.identity,
                facts={
                    "metrics": progress.results,
                    "config": asdict(self.config),
                    "data": asdict(engine.metadata),
                    "dataset": self.data.source,
                },
                extra=self._extra(),
                score=progress.score,
            )
        progress.checkpoint = self.run_dir / f"step_{progress.step}"
        progress.save_due = progress.unsaved = False
        self.stop.saved()

    def _extra(self) -> dict[str, dict[str, Tensor]]:
        """The average of the weights, and the names of the puzzle table's rows if there are several."""
        engine = self.engine
        extra = {} if engine.average is None else {AVERAGE: engine.average.state_dict()}
        table = engine.model.puzzle_emb
        if table is not None and len(table.weights) > 1 and self.data.names.hashes is not None:
            extra[IDENTIFIERS] = self.data.names.tensors()
        return extra

    def save_if_due(self, progress: Progress) -> None:
        """Saves an unsaved state if the clock or `checkpoint_interval` requires it.

        Raises CheckpointError if the previous save failed.
        """
        self.raise_if_failed()
        if progress.checkpoint_due:
            self.save_if_unsaved(progress)

    def save_if_unsaved(self, progress: Progress) -> None:
        """Saves an unsaved state."""
        if progress.unsaved:
            self.save(progress)

    def raise_if_failed(self) -> None:
        """Raises CheckpointError if the last save failed; does not wait for one in progress."""
        self._saver.check()

    def wait(self) -> None:
        """Waits until this rank's last save is on the disk. Raises CheckpointError if it failed."""
        self._saver.wait()

    def wait_for_all(self) -> None:
        """Waits on every rank until the last checkpoint is on the disk."""
        self.wait()
        self.engine.world.barrier()

    def before(self, step: int, progress: Progress) -> Checkpoint | None:
        """The newest checkpoint of this run before `step`, the same on every rank; None without one."""
        self.wait_for_all()
        checkpoint = checkpoint_before(self.run_dir, step, progress.identity)
        self.engine.world.check_equal({"checkpoint": str(checkpoint and checkpoint.path)})
        return checkpoint

    def __enter__(self) -> "Checkpointer":
        self._saver.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._saver.__exit__(*error)
