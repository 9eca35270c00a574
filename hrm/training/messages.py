"""What a run tells of itself when it begins and when it ends."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hrm.common.threads import threads_note
from hrm.config.schema import ArchConfig, Config

if TYPE_CHECKING:
    from hrm.data.dataset import PuzzleDataset
    from hrm.engine.engine import Engine

# Metrics by kind of weights, eval or eval_ema, by test set, by name.
Evaluations = dict[str, dict[str, dict[str, float]]]


def parameter_count(engine: "Engine") -> int:
    """The parameters of the model, the puzzle table aside."""
    return sum(p.numel() for p in engine.model.parameters())


def describe(engine: "Engine", train_set: "PuzzleDataset", test_set: "PuzzleDataset") -> str:
    """One line on what is about to train."""
    import torch

    config, world = engine.config, engine.world
    ranks = f" x {world.size} ranks" if world.size > 1 else ""
    threads = f", {threads_note(torch.get_num_threads())}" if engine.device.type == "cpu" else ""
    note = f" ({engine.mode.note})" if engine.mode.note else ""
    examples = [sum(len(part.inputs) for part in split.sets.values()) for split in (train_set, test_set)]
    return (
        f"{model_name(config.arch)}, {parameter_count(engine):,} parameters, "
        f"{engine.device}{ranks}{threads}, {str(engine.model.dtype).removeprefix('torch.')}, "
        f"mode {engine.mode.name}{note}; "
        f"{train_set.folder.parent}: {examples[0]:,} training and {examples[1]:,} test examples; "
        f"{engine.total_steps:,} steps of {config.global_batch_size}"
    )


def model_name(arch: ArchConfig) -> str:
    """The kind of model, in words."""
    kinds = ["gated"] * arch.use_gating + ["feudal"] * arch.subgoal_head.enabled
    return " ".join([*kinds, "TRM" if arch.share_levels else "HRM" if kinds else "HRM v1"])


def summary(config: Config, results: Evaluations, step: int, checkpoint: Path) -> str:
    """The last lines: the result, where it lies, what to type next."""
    from hrm.training.logging import evaluation_line

    lines = ["", evaluation_line(step, results)]
    if config.data_path is None:
        lines.append("none of their solution grids was in training, augmentations included")
    python = Path(sys.executable)
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else Path("python")
    again = f"  {python} train.py --config {checkpoint.parent / 'config.yaml'}"
    lines += [
        f"checkpoint: {checkpoint}",
        f"metrics:    {checkpoint.parent / 'metrics.jsonl'}",
        "next:",
        # With stages the epochs follow from them.
        *([] if config.stages else [f"{again} epochs={2 * config.epochs}   train on, twice as long in all"]),
        f"{again} checkpoint_path={checkpoint} run_name={config.run_name}-next   start from its weights",
        f"  {python} -m hrm.solve {checkpoint.parent} PUZZLE --trace   watch it solve a puzzle of yours",
        f"  {python} -m hrm.evaluate checkpoint={checkpoint.parent} eval_act=true   judge it",
        f"  {python} -m hrm.report {checkpoint.parent}   draw this run",
        f"  {python} -m hrm.compare --arch v1 gated   compare architectures, over seeds",
        f"  {python} train.py --help   every option; preset=full is the full-size model",
    ]
    return "\n".join(lines)
