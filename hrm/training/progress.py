"""The state of the training loop, without the engine's tensors."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hrm.checkpoint.read import Checkpoint
from hrm.config.load import Config
from hrm.config.schedule import interval_epochs, later_archs, stage_arch
from hrm.config.schema import ArchConfig
from hrm.data.dataset import TrainBatch
from hrm.engine.step_metrics import LONGEST
from hrm.training.early_stopping import Best
from hrm.training.spikes import LossWatch

# Metrics by kind of weights (eval or eval_ema), by test set, by name.
Evaluations = dict[str, dict[str, dict[str, float]]]


@dataclass
class Progress:
    """The state of the training loop between two steps; `state_dict` is its part of a checkpoint.

    total_steps: length of the run. identity: settings that a checkpoint must share with the run that resumes
    it. step: updates so far. position: (iteration, batch) of the next batch. checkpoint: the newest one, or
    None;
    unsaved: whether the state differs from it, or it is in another run's folder. save_due: whether the clock
    requires a checkpoint. evaluation_due: whether the last step ended an interval that is not yet evaluated.
    evaluations: number of logged evaluations of this step, None if unknown; is_whole: whether the last
    evaluation used the whole test split. results, score: of this step's last evaluation. best: for early
    stopping.
    watch, batches, rewinds: losses so far, [step, iteration, batch] of the last steps, and the number of
    returns to an earlier checkpoint. kernels: the measured choice of implementations, as `choose_kernels`
    returns it.
    """

    config: Config
    total_steps: int
    identity: dict[str, Any]
    step: int = 0
    position: tuple[int, int] = (0, 0)
    checkpoint: Path | None = None
    unsaved: bool = True
    save_due: bool = False
    evaluation_due: bool = False
    evaluations: int | None = None
    is_whole: bool = False
    results: Evaluations = field(default_factory=dict)
    score: float | None = None
    best: Best = field(init=False)
    watch: LossWatch = field(init=False)
    batches: deque[list[int]] = field(init=False)
    rewinds: int = 0
    kernels: str = ""

    def __post_init__(self) -> None:
        self.best = Best(self.config.early_stop_min_delta)
        self.watch = LossWatch(self.config.spike_threshold)
        self.batches = deque(maxlen=min(self.config.log_interval, LONGEST))

    def advance(self, batch: TrainBatch) -> None:
        """Records that an update with `batch` is done."""
        self.step += 1
        self.batches.append([self.step, *batch.index])
        self.position, self.unsaved = batch.position, True
        self.evaluations, self.is_whole, self.results, self.score = 0, False, {}, None
        self.evaluation_due = batch.position[1] == 0 or self.at_end

    @property
    def at_end(self) -> bool:
        """Whether this is the last step of the schedule."""
        return self.step == self.total_steps

    @property
    def stopped_early(self) -> bool:
        """Whether early stopping ends the run."""
        return self.best.should_stop(self.config.early_stop_patience)

    @property
    def is_over(self) -> bool:
        """Whether no steps remain."""
        return self.step >= self.total_steps or self.stopped_early

    @property
    def log_due(self) -> bool:
        """Whether a log line is due after this step."""
        return self.step % self.config.log_interval == 0 or self.evaluation_due

    @property
    def checkpoint_due(self) -> bool:
        """Whether the clock or `checkpoint_interval` requires a checkpoint."""
        interval = self.config.checkpoint_interval
        return self.save_due or (interval is not None and self.step % interval == 0)

    @property
    def arch(self) -> ArchConfig:
        """The architecture of the current stage, which includes the evaluation at its end."""
        return stage_arch(self.config, self._epoch)

    @property
    def later_archs(self) -> list[ArchConfig]:
        """The architectures of later stages."""
        return later_archs(self.config, self._epoch)

    @property
    def _epoch(self) -> int:
        """The first epoch of the current interval."""
        iteration, batch = self.position
        if self.evaluation_due and batch == 0:
            iteration -= 1
        return iteration * interval_epochs(self.config)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts."""
        return {
            "step": self.step,
            "position": list(self.position),
            "evaluation_due": self.evaluation_due,
            "evaluations": self.evaluations,
            "is_whole": self.is_whole,
            "score": None if self.score is None else float(self.score),
            "best": self.best.state_dict(),
            "incidents": {
                "batches": list(self.batches),
                "watch": self.watch.state_dict(),
                "rewinds": self.rewinds,
            },
            "kernels": self.kernels,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`. Entries missing in older versions keep their defaults."""
        self.step = state["step"]
        iteration, batch = state["position"]
        self.position = (iteration, batch)
        self.evaluation_due = state.get("evaluation_due", False)
        self.evaluations = state.get("evaluations")
        # An older version saved nothing between the evaluations of a sample and of the whole split.
        self.is_whole = state.get("is_whole", True)
        self.score = state.get("score")
        self.kernels = state.get("kernels", "")
        if "best" in state:
            self.best.load_state_dict(state["best"])
        if "incidents" in state:
            incidents = state["incidents"]
            self.batches.clear()
            self.batches.extend(incidents["batches"])
            self.watch.load_state_dict(incidents["watch"])
            self.rewinds = incidents["rewinds"]

    def rewind(self, checkpoint: Checkpoint) -> None:
        """Returns to the state of a checkpoint, except the position: training continues with the next
        batches."""
        position, rewinds = self.position, self.rewinds + 1
        self.batches.clear()
        self.load_state_dict(checkpoint.training)
        self.position, self.rewinds = position, rewinds
        self.evaluation_due = self.is_whole = False
        self.results, self.score = checkpoint.manifest["metrics"], checkpoint.manifest.get("score")
