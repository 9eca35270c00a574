"""Destinations of metrics: metrics.jsonl, an optional tracker, a bar or lines on the terminal."""

import importlib
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from hrm.common.errors import UserError
from hrm.common.files import new_file, open_bounded, open_own, read_text, to_json, write_whole
from hrm.config.load import Config
from hrm.training.health import Symptoms
from hrm.training.progress import Progress
from hrm.training.run_folder import LONGEST_LINE, METRICS


class MetricsFile:
    """The run's metrics.jsonl: one JSON object per line, `{"step": n, "train/loss": ..., ...}`.

    run_dir: created if missing. resume_step: None starts an empty file; n keeps the lines up to step n and
    removes later and partial ones, so that a resumed run ends with the same file as an uninterrupted run.
    evaluations: number of evaluations of step n to keep; None keeps all. Every line is strict JSON; a value
    that is not finite is written as null. Raises UserError if the file cannot be written.
    """

    def __init__(
        self, run_dir: str | Path, resume_step: int | None = None, evaluations: int | None = None
    ) -> None:
        self.path = Path(run_dir) / METRICS
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if resume_step is not None and self.path.exists():
                self._cut(resume_step, evaluations)
            self._file = open_own(self.path, "w" if resume_step is None else "a")
        except OSError as error:
            raise self._failure(error) from error

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Appends a line and flushes it, so that a killed process loses no line."""
        try:
            self._file.write(to_json({"step": step, **metrics}) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Closes the file."""
        # `log` has already reported a full disk.
        with suppress(OSError):
            self._file.close()

    def _cut(self, last_step: int, evaluations: int | None) -> None:
        judged = 0
        with new_file(self.path) as cut, open_bounded(self.path) as old, open(cut, "wb") as new:
            # An overlong line is read in pieces without a step.
            while line := old.readline(LONGEST_LINE):
                step = _step_of(line)
                is_judged = step == last_step and b'"eval' in line
                judged += is_judged
                is_later = is_judged and evaluations is not None and judged > evaluations
                if step <= last_step and not is_later:
                    new.write(line)
            new.flush()
            os.fsync(new.fileno())

    def _failure(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write {self.path}: {error.strerror or error}; free space or choose another folder with "
            "output_dir=, and continue with resume="
        )


def _step_of(line: bytes) -> float:
    """The step of a line of metrics; infinity for a partial or damaged line."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError, RecursionError):
        step = None
    return step if type(step) is int else float("inf")


class Tracker(Protocol):
    """An additional destination of metrics."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None: ...

    def close(self) -> None: ...


def make_tracker(
    name: str,
    run_dir: str | Path,
    *,
    project: str = "hrm",
    run: str | None = None,
    config: Mapping[str, Any] | None = None,
    resume_step: int | None = None,
) -> Tracker:
    """The tracker `none`, `tensorboard` or `wandb`, with its files under run_dir.

    project, run, config: shown by wandb. resume_step: None for a new run, else the last step to keep. Raises
    UserError if its package is missing or it cannot start.
    """
    run_dir = Path(run_dir)
    if name == "none":
        return _NoTracker()
    if name == "tensorboard":
        return _TensorBoard(run_dir, resume_step)
    if name == "wandb":
        return _Wandb(run_dir, project, run, config, resume_step)
    raise UserError(f"tracker={name}: expected none, tensorboard or wandb")


class _NoTracker:
    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        pass

    def close(self) -> None:
        pass


class _TensorBoard:
    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        module = _import("torch.utils.tensorboard", "tensorboard")
        # Steps after resume_step are logged again; purge_step hides the earlier versions.
        purge = None if resume_step is None else resume_step + 1
        self._writer = module.SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(
        self,
        run_dir: Path,
        project: str,
        run: str | None,
        config: Mapping[str, Any] | None,
        resume_step: int | None,
    ) -> None:
        wandb = _import("wandb", "wandb")
        id_file = run_dir / "wandb_id.txt"
        run_id = secrets.token_hex(4)
        if resume_step is not None and id_file.is_file():
            with suppress(UserError):
                known = read_text(id_file, 100, "wandb's id of the run").strip()
                run_id = known if re.fullmatch(r"\w{1,64}", known) else run_id
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_whole(id_file, run_id + "\n")
            # Never prompt: without a login wandb records offline.
            mode = os.environ.get("WANDB_MODE") or (
                "online" if wandb.login(prompt=False, verify=False) else "offline"
            )
            self._run = wandb.init(
                project=project,
                name=run,
                id=run_id,
                resume="allow",
                mode=mode,
                dir=str(run_dir),
                config=dict(config or {}),
            )
        # wandb's errors share no base class.
        except Exception as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"tracker=wandb cannot start: {why}; set WANDB_MODE=offline, or use tracker=none"
            ) from error

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def _import(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"tracker={extra} needs a package that is missing: pip install -e '.[{extra}]' here"
        ) from error


def _can_draw(file: TextIO) -> bool:
    if not file.isatty():
        return False
    try:
        # tqdm draws nothing on a terminal that reports no columns, as in some containers.
        return os.get_terminal_size(file.fileno()).columns > 0
    except OSError:
        return True


# Metrics on the terminal and their formats.
_SHOWN = (
    ("train/loss", "loss {:.4f}"),
    ("train/accuracy", "token {:.1%}"),
    ("train/exact_accuracy", "exact {:.1%}"),
    ("train/steps", "ACT steps {:.1f}"),
    ("train/samples_per_second", "{:.0f} samples/s"),
)


class ProgressBar:
    """A progress bar on a terminal; in a file or a pipe, plain lines at the first step and at intervals.

    total, initial: steps of the whole run, and steps before this process. seconds: between plain lines; the
    last step always has one. file: None for standard error.
    """

    def __init__(
        self, total: int, initial: int = 0, *, seconds: float = 10.0, file: TextIO | None = None
    ) -> None:
        self._file = sys.stderr if file is None else file
        self._total, self._initial, self._step, self._seconds = total, initial, initial, seconds
        self._shown, self._repeated = "", False
        self._start, self._next = time.monotonic(), 0.0
        self._bar = None
        if _can_draw(self._file):
            # The bar fills the remaining columns.
            form = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} {remaining} left{postfix}"
            self._bar = tqdm(
                total=total, initial=initial, file=self._file, bar_format=form, dynamic_ncols=True
            )

    def update(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Shows that `step` is done, with the latest loss, accuracies, ACT steps and samples per second."""
        if metrics:
            known = [(form, metrics[name]) for name, form in _SHOWN if metrics.get(name) is not None]
            words = [form.format(float(value)) for form, value in known]
            self._shown, self._repeated = "  ".join(words) or self._shown, False
        done, self._step = step - self._step, step
        if self._bar is not None:
            self._bar.set_postfix_str(self._shown, refresh=False)
            self._bar.update(done)
            return
        now = time.monotonic()
        if now >= self._next or step == self._total:
            self._next = now + self._seconds
            print(self._line(now - self._start), file=self._file, flush=True)
            self._repeated = True

    def resume_clock(self) -> None:
        """Excludes the time so far, such as that of an evaluation, from the estimated remaining time."""
        self._initial, self._start = self._step, time.monotonic()

    def write(self, line: str) -> None:
        """Prints a line without breaking the bar."""
        if self._bar is not None:
            tqdm.write(line, file=self._file)
        else:
            print(line, file=self._file, flush=True)

    def close(self) -> None:
        """Finishes the bar and leaves it on the screen."""
        if self._bar is not None:
            self._bar.close()

    def _line(self, elapsed: float) -> str:
        # Repeated figures look like a run that is stuck.
        shown = self._shown if self._step == self._total or not self._repeated else ""
        parts = [f"step {self._step}/{self._total}", shown]
        if self._initial < self._step < self._total:
            left = elapsed * (self._total - self._step) / (self._step - self._initial)
            parts.append(f"{tqdm.format_interval(left)} left")
        return "  ".join(part for part in parts if part)


def evaluation_line(step: int, results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The results of an evaluation on one line. results: metrics by eval or eval_ema, then by set."""
    averaged = {"eval": "", "eval_ema": ", averaged weights"}
    lines = [
        f"{name}{averaged[kind]}: {metrics['exact_accuracy']:.1%} exact, {metrics['accuracy']:.1%} of cells "
        f"right, on {metrics['count']:.0f} {'held-out' if name.startswith('valid') else 'test'} puzzles"
        # Without scored sequences there are no shares.
        if metrics["count"]
        else f"{name}{averaged[kind]}: no known answers, nothing to score"
        for kind, sets in results.items()
        for name, metrics in sets.items()
    ]
    return f"step {step}: " + ("; ".join(lines) or "not evaluated, there is no test split")


class MetricsLog:
    """All destinations of a run's metrics; a context that closes them. A muted log only checks for symptoms.

    The speed is measured between log lines, or from the last `resume_clock`.
    """

    def __init__(self, config: Config, run_dir: Path, progress: Progress, *, mute: bool = False) -> None:
        """progress: a new run starts the log, a resumed run continues it after its step."""
        self._config, self._run_dir, self._total_steps = config, run_dir, progress.total_steps
        self._mute = mute
        self._open(None if progress.checkpoint is None else progress.step, progress.evaluations)

    def _open(self, resume_step: int | None, evaluations: int | None) -> None:
        config, run_dir = self._config, self._run_dir
        self._places: list[Tracker] = []
        self._bar: ProgressBar | None = None
        self._symptoms = Symptoms(config, self._total_steps)
        self._step, self._time = resume_step or 0, time.perf_counter()
        if self._mute:
            return
        self._places.append(MetricsFile(run_dir, resume_step, evaluations))
        self._places.append(
            make_tracker(
                config.tracker,
                run_dir,
                project=config.project_name,
                run=config.run_name,
                config=asdict(config),
                resume_step=resume_step,
            )
        )
        self._bar = ProgressBar(self._total_steps, self._step)

    def rewind(self, progress: Progress) -> None:
        """Drops the log after the step to which the run returned."""
        self.close()
        self._open(progress.step, progress.evaluations)

    def facts(self, facts: Mapping[str, float]) -> None:
        """Logs the constants of a run as a line of step 0."""
        self._log(facts, 0)

    def advance(self, step: int) -> None:
        """Shows that a step is done; the last step is shown with its metrics."""
        if self._bar is not None and step < self._total_steps:
            self._bar.update(step)

    def training(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs means over the steps since the last call, with their speed."""
        seconds = (time.perf_counter() - self._time) / (step - self._step)
        pace = {"seconds_per_step": seconds, "samples_per_second": self._config.global_batch_size / seconds}
        named = {f"train/{name}": value for name, value in {**metrics, **pace}.items()}
        self._log(named, step)
        if self._bar is not None:
            self._bar.update(step, named)
        self._step, self._time = step, time.perf_counter()

    def evaluation(self, step: int, results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
        """Logs metrics of the test split, given by eval or eval_ema, then by set."""
        flat = {
            f"{kind}/{name}/{metric}": value
            for kind, sets in results.items()
            for name, metrics in sets.items()
            for metric, value in metrics.items()
        }
        if flat:
            self._log(flat, step)
        if self._bar is not None and any(results.values()):
            self._bar.write(evaluation_line(step, results))

    def resume_clock(self) -> None:
        """Excludes the time since the last `training`, such as that of an evaluation, from the speed."""
        self._time = time.perf_counter()
        if self._bar is not None:
            self._bar.resume_clock()

    def warn(self, text: str) -> None:
        """Prints a warning for the user."""
        if self._bar is not None:
            self._bar.write(f"warning: {text}")

    def _log(self, metrics: Mapping[str, float], step: int) -> None:
        for place in self._places:
            place.log(metrics, step)
        for symptom in self._symptoms.check(step, metrics):
            self.warn(symptom)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes every destination; a second call has no effect."""
        for place in self._places:
            place.close()
        if self._bar is not None:
            self._bar.close()
