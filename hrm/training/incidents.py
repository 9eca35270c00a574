"""What goes wrong in single steps, skipped updates and loss spikes, written down with its batches."""

import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hrm.checkpoint.safe_io import to_json
from hrm.common.errors import UserError
from hrm.common.files import open_own
from hrm.config.load import Config
from hrm.data.dataset import PuzzleDataset, batch_members
from hrm.engine.engine import Interval
from hrm.engine.tally import LONGEST
from hrm.training.spikes import LossWatch, Spike

INCIDENTS = "incidents.jsonl"


class Incidents:
    """Looks through the steps of each line of the log, and writes down what it finds.

    A line of the file is one incident: its step, `kind`, and the batch that was fed then, which is iteration
    and number in it, set, and the examples' rows in the arrays. What was skipped and a spike have loss and
    gradient norm, a rewind the step that the run went back to.
    Lines are only ever added, so a step that a resumed run does again may be there twice.
    """

    def __init__(self, config: Config, dataset: PuzzleDataset, run_dir: Path, *, mute: bool) -> None:
        """mute: judges as the other ranks do, and writes nothing."""
        self._config, self._dataset, self._mute = config, dataset, mute
        self._path = run_dir / INCIDENTS
        self._watch = LossWatch(config.spike_threshold)
        self._batches: deque[list[int]] = deque(maxlen=min(config.log_interval, LONGEST))
        # How often the run has gone back to an earlier checkpoint.
        self.rewinds = 0

    def fed(self, step: int, index: tuple[int, int]) -> None:
        """Which batch a step was given."""
        self._batches.append([step, *index])

    def check(self, step: int, interval: Interval) -> tuple[list[str], Spike | None]:
        """Judges the steps up to `step`; returns a line for each finding, and the first that is a spike.

        Raises UserError where the file cannot be written.
        """
        found = []
        first = step - len(interval.losses) + 1
        steps = range(first, step + 1)
        skipped = [at for at, norm in zip(steps, interval.norms, strict=True) if not math.isfinite(norm)]
        for at in skipped:
            self._write("skipped", at, loss=interval.losses[at - first], grad_norm=interval.norms[at - first])
        if skipped:
            found.append(
                f"{len(skipped)} updates up to step {skipped[-1]} were skipped, for a loss or gradient that "
                f"is not finite; {self._path} names their batches"
            )
        spike = self._watch.check(steps, interval.losses)
        if spike is not None:
            self._write("spike", spike.step, loss=spike.loss, grad_norm=interval.norms[spike.step - first])
            found.append(f"{spike}; {self._path} names its batch")
        return found, spike

    def rewind(self, spike: Spike, step: int, state: Mapping[str, Any] | None) -> None:
        """The run goes back to the checkpoint of `step`, and to the `state_dict` in it, if there is one."""
        rewinds = self.rewinds + 1
        self._write("rewind", spike.step, to_step=step)
        self._batches.clear()
        if state is not None:
            self.load_state_dict(state)
        self.rewinds = rewinds

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {"batches": list(self._batches), "watch": self._watch.state_dict(), "rewinds": self.rewinds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`."""
        self._batches.clear()
        self._batches.extend(state["batches"])
        self._watch.load_state_dict(state["watch"])
        self.rewinds = state["rewinds"]

    def _write(self, kind: str, step: int, **facts: Any) -> None:
        """Adds an incident's line."""
        if self._mute:
            return
        line = to_json({"step": step, "kind": kind, **facts, **self._batch(step)}) + "\n"
        try:
            with open_own(self._path, "ab") as file:
                file.write(line.encode())
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {error.strerror or error}; free space or choose another folder "
                "with output_dir="
            ) from error

    def _batch(self, step: int) -> dict[str, Any]:
        """The batch of a step, drawn again from the seed; nothing where it is not remembered."""
        index = next(((it, number) for at, it, number in self._batches if at == step), None)
        if index is None:
            return {}
        config = self._config
        members = batch_members(
            self._dataset,
            seed=config.seed,
            epochs=config.epochs,
            epochs_per_iter=config.eval_interval or config.epochs,
            global_batch_size=config.global_batch_size,
            position=index,
        )
        return {
            "iteration": index[0],
            "batch": index[1],
            "set": members.set_name,
            "examples": members.examples.tolist(),
        }
