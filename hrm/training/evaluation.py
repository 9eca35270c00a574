"""Evaluation within a run: of a sample or the whole test split, of the weights and of their average."""

from collections.abc import Iterator

from hrm.config.load import Config
from hrm.data.dataset import Batch
from hrm.engine.engine import Engine
from hrm.training.checkpointer import Checkpointer
from hrm.training.data import TrainingData
from hrm.training.early_stopping import score
from hrm.training.logging import MetricsLog
from hrm.training.progress import Evaluations, Progress
from hrm.training.signals import HANG_UP, StopSignals


class Evaluator:
    """Evaluates a run on its test split, logs the results and saves the checkpoints that follow from them.

    All ranks call its methods together. They raise Stopped after a signal, at the next batch.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        data: TrainingData,
        log: MetricsLog,
        checkpoints: Checkpointer,
        stop: StopSignals,
    ) -> None:
        self.config, self.engine, self.data = config, engine, data
        self.log, self.checkpoints, self.stop = log, checkpoints, stop

    def evaluate(self, progress: Progress) -> None:
        """The evaluation that is due: of the sample, if there is one, and at the end also of all examples."""
        config, sampled = self.config, self.data.sample is not None
        progress.results = self.measure(progress, sampled=sampled)
        # The score is always that of the same examples, so that evaluations can be compared.
        progress.score = score(progress.results["eval_ema" if config.ema else "eval"], config.best_metric)
        if sampled and progress.at_end:
            progress.results = self.measure(progress, sampled=False)
        # Without a known answer there is nothing to compare, nor to stop early for.
        is_scored = any(metrics["count"] for metrics in progress.results["eval"].values())
        is_better = is_scored and progress.best.update(progress.step, progress.score)
        self._log(progress, is_whole=not sampled or progress.at_end)
        progress.evaluation_due = False
        asked = config.checkpoint_every_eval or progress.at_end or (is_better and config.keep_best)
        if asked or progress.checkpoint_due:
            self.checkpoints.save(progress)
        self.engine.enter(progress.arch)
        self.log.resume_clock()

    def finish(self, progress: Progress) -> None:
        """Makes sure that the run ends with an evaluation of the whole test split.

        One may be missing: the data can end a few steps before the schedule, and a resumed run that was over
        has no results in memory.
        """
        if not (progress.is_whole and progress.results):
            progress.results = self.measure(progress, sampled=False)
        if not progress.is_whole:
            self._log(progress, is_whole=True)

    def measure(self, progress: Progress, *, sampled: bool) -> Evaluations:
        """The test split's metrics by set under `eval`, and with ema=true the average's under `eval_ema`."""
        engine = self.engine
        engine.world.barrier()
        results = {"eval": engine.evaluate(self._batches(progress, sampled))}
        if engine.average is not None:
            with engine.average.in_place():
                results["eval_ema"] = engine.evaluate(self._batches(progress, sampled))
        return results

    def _batches(self, progress: Progress, sampled: bool) -> Iterator[tuple[str, Batch, int]]:
        for batch in self.data.test_batches(self.engine.world, sampled=sampled):
            self.checkpoints.raise_if_failed()
            # max_seconds does not interrupt an evaluation: one longer than that would never end.
            progress.save_due |= self.stop.check(self.engine.world, HANG_UP)
            yield batch

    def _log(self, progress: Progress, *, is_whole: bool) -> None:
        self.log.evaluation(progress.step, progress.results)
        progress.evaluations = 1 + (progress.evaluations or 0)
        progress.is_whole, progress.unsaved = is_whole, True
