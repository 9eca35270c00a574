"""The lines that a run prints at its start and at its end."""

import sys
from pathlib import Path

import torch

from hrm.common.threads import threads_note
from hrm.config.load import Config
from hrm.config.schema import ArchConfig
from hrm.engine.engine import Engine
from hrm.training.data import TrainingData
from hrm.training.logging import evaluation_line
from hrm.training.progress import Progress
from hrm.training.signals import REASONS


def parameter_count(engine: Engine) -> int:
    """The number of the model's parameters, without the puzzle table."""
    return sum(parameter.numel() for parameter in engine.model.parameters())


def start_line(engine: Engine, data: TrainingData) -> str:
    """A line with the model, the device, the data and the length of the run."""
    config, world = engine.config, engine.world
    ranks = f" x {world.size} ranks" if world.size > 1 else ""
    threads = f", {threads_note(torch.get_num_threads())}" if engine.device.type == "cpu" else ""
    note = f" ({engine.mode.note})" if engine.mode.note else ""
    splits = {"training": data.train_set, "test": data.test_set}
    examples = " and ".join(
        f"{sum(len(part.inputs) for part in split.sets.values()) if split else 0:,} {name}"
        for name, split in splits.items()
    )
    return (
        f"{model_name(config.arch)}, {parameter_count(engine):,} parameters, "
        f"{engine.device}{ranks}{threads}, {str(engine.model.dtype).removeprefix('torch.')}, "
        f"mode {engine.mode.name}{note}; "
        f"{data.source['path']}: {examples} examples; "
        f"{engine.total_steps:,} step{'s' * (engine.total_steps != 1)} of {config.global_batch_size}"
    )


def model_name(arch: ArchConfig) -> str:
    """A description of the kind of model."""
    kinds = ["gated"] * arch.use_gating + ["feudal"] * arch.subgoal_head.enabled
    if arch.single_state:
        return "URM"
    return " ".join([*kinds, "TRM" if arch.share_levels else "HRM" if kinds else "HRM v1"])


def compiling_ended_line(ended_by: int) -> str:
    """The last line of a run that was stopped before its first step. ended_by: a key of REASONS."""
    return (
        f"{REASONS[ended_by][0]}: stopped before the first step, so nothing had to be saved; the same "
        "command starts or continues the run"
    )


def end_lines(config: Config, progress: Progress, run_dir: Path, ended_by: int) -> str:
    """The last lines of a run. ended_by: the key of REASONS that ended it early, or CONTINUE."""
    if ended_by:
        return (
            f"{REASONS[ended_by][0]}: stopped after step {progress.step} of {progress.total_steps}, saved in "
            f"{progress.checkpoint}; the same command continues from there"
        )
    lines = []
    if progress.stopped_early and progress.step < progress.total_steps:
        best = progress.best
        lines.append(f"stopped early: no improvement over step {best.step} in the last {best.stale}")
    elif progress.step < progress.total_steps:
        lines.append(
            f"step {progress.step:,} is the last: the schedule counts {progress.total_steps:,} steps, but "
            "incomplete batches before an evaluation are left out"
        )
    return "\n".join([*lines, *_summary(config, progress, run_dir)])


def _summary(config: Config, progress: Progress, run_dir: Path) -> list[str]:
    """The result of a finished run, the paths of its files, and commands to continue with."""
    lines = ["", evaluation_line(progress.step, progress.results)]
    has_test = config.data_path is None or (Path(config.data_path) / "test").exists()
    options = "eval_act=true" if has_test else "split=train"
    if config.data_path is None:
        lines.append("none of their solution grids was in training, augmentations included")
    python = Path(sys.executable)
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else Path("python")
    again, checkpoint = (
        f"  {python} train.py --config {run_dir / 'config.yaml'}",
        run_dir / f"step_{progress.step}",
    )
    return [
        *lines,
        f"checkpoint: {checkpoint}",
        f"metrics:    {run_dir / 'metrics.jsonl'}",
        "next:",
        # A staged run's epochs are determined by its stages.
        *([] if config.stages else [f"{again} epochs={2 * config.epochs}   train twice as long in total"]),
        f"{again} checkpoint_path={checkpoint} run_name={config.run_name}-next   start from its weights",
        f"  {python} -m hrm.solve {run_dir} PUZZLE --trace   watch it solve a puzzle of yours",
        f"  {python} -m hrm.evaluate checkpoint={run_dir} {options}   evaluate it",
        f"  {python} -m hrm.report {run_dir}   plot this run",
        f"  {python} -m hrm.compare --arch v1 gated   compare architectures, over seeds",
        f"  {python} train.py --help   every option; preset=full is the full-size model",
    ]
