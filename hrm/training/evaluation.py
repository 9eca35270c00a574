"""Evaluation within a run, of the weights and their average, on valid, a sample or the whole test split."""

from collections.abc import Callable, Iterator

from hrm.config.load import Config
from hrm.data.dataset import Batch
from hrm.distributed import World
from hrm.engine.engine import Engine
from hrm.training.checkpointer import Checkpointer
from hrm.training.data import TrainingData
from hrm.training.early_stopping import score
from hrm.training.logging import MetricsLog
from hrm.training.progress import Evaluations, Progress
from hrm.training.signals import HANG_UP, StopSignals

Draw = Callable[[World], Iterator[tuple[str, Batch, int]]]


class Evaluator:
    """Evaluates a run, logs the results and saves the resulting checkpoints.

    All ranks call its methods together. After a signal they raise Stopped at the next batch.
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
        """Runs the due evaluation; at the end also evaluates the whole test split."""
        config, is_whole = self.config, self.data.is_ranked_by_all_tests
        progress.results = self.measure(progress, self.data.ranking_batches)
        # The score always uses the same examples, so that evaluations are comparable.
        progress.score = score(progress.results["eval_ema" if config.ema else "eval"], config.best_metric)
        # Without known answers there is no score.
        is_scored = any(metrics["count"] for metrics in progress.results["eval"].values())
        is_better = is_scored and progress.best.update(progress.step, progress.score)
        if progress.at_end and not is_whole:
            self._measure_tests(progress)
        self._log(progress, is_whole=is_whole or progress.at_end)
        progress.evaluation_due = False
        asked = config.checkpoint_every_eval or progress.at_end or (is_better and config.keep_best)
        if asked or progress.checkpoint_due:
            self.checkpoints.save(progress)
        self.engine.enter(progress.arch)
        self.log.resume_clock()

    def finish(self, progress: Progress) -> None:
        """Ensures that the run ends with an evaluation of the whole test split.

        It may be missing: the data may end a few steps before the schedule, and a resumed run that was
        complete has no results in memory.
        """
        if not (progress.is_whole and progress.results):
            self._measure_tests(progress)
        if not progress.is_whole:
            self._log(progress, is_whole=True)

    def measure(self, progress: Progress, draw: Draw) -> Evaluations:
        """The metrics by set under `eval`, and with ema=true those of the average under `eval_ema`.

        draw: returns the batches for a World.
        """
        engine = self.engine
        engine.world.barrier()
        results = {"eval": engine.evaluate(self._batches(progress, draw))}
        if engine.average is not None:
            with engine.average.in_place():
                results["eval_ema"] = engine.evaluate(self._batches(progress, draw))
        return results

    def _measure_tests(self, progress: Progress) -> None:
        """Evaluates the whole test split, and keeps the results of `valid` if there are any."""
        valid = progress.results if self.data.valid is not None else {}
        found = self.measure(progress, self.data.test_batches)
        progress.results = {kind: {**valid.get(kind, {}), **sets} for kind, sets in found.items()}

    def _batches(self, progress: Progress, draw: Draw) -> Iterator[tuple[str, Batch, int]]:
        for batch in draw(self.engine.world):
            self.checkpoints.raise_if_failed()
            # max_seconds does not interrupt an evaluation: a longer evaluation would never end.
            progress.save_due |= self.stop.check(self.engine.world, HANG_UP)
            yield batch

    def _log(self, progress: Progress, *, is_whole: bool) -> None:
        self.log.evaluation(progress.step, progress.results)
        progress.evaluations = 1 + (progress.evaluations or 0)
        progress.is_whole, progress.unsaved = is_whole, True
