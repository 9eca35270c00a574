"""Evaluates a trained model on a data set: `python -m hrm.evaluate checkpoint=RUN [key=value ...]`."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic.dataclasses import dataclass

from hrm.common.errors import UserError, run_command
from hrm.common.figures import require_matplotlib
from hrm.common.files import check_file, to_json
from hrm.common.tables import Table
from hrm.common.threads import THREADS_HELP
from hrm.config.keys import RULES, help_keys, key, keys_of
from hrm.config.load import resolve_device
from hrm.config.messages import ConfigError
from hrm.config.read import split_arguments
from hrm.config.schema import DEVICE, PATH
from hrm.evaluation.selection import Rule

# Import PyTorch late: it takes seconds, and --help and mistyped keys do not need it.
if TYPE_CHECKING:
    import torch

    from hrm.checkpoint.load_model import Trained
    from hrm.data.dataset import PuzzleDataset
    from hrm.distributed import World
    from hrm.evaluation.paths import Plan

JSON_FLAG = "--json"


@dataclass(config=RULES)
class EvaluateConfig:
    """The model, the examples and the options of an evaluation."""

    checkpoint: str | None = key(
        None,
        "a run's folder or checkpoint, a step_N file of the official code, or hub:OWNER/NAME",
        **PATH,
    )
    data_path: str | None = key(
        None, "folder of a data set; null is the one that the run was trained on", **PATH
    )
    split: str = key(
        "test", "split of the data set", pattern=r"^[\w-]{1,80}\Z", form="a split's name, such as test"
    )
    ema: bool = key(False, "evaluate the averaged weights instead of the last ones")
    eval_act: bool = key(
        False, "also evaluate with early halting, and print the steps saved and the accuracy"
    )
    depth: int | None = key(
        None, "ACT steps per sequence, possibly more than in training; null is as in training", ge=1, le=4096
    )
    samples: int | None = key(None, "evaluate a fixed random sample of this many examples", ge=1, le=10**9)
    seed: int = key(0, "seed of the sample and of the paths", ge=0, le=2**32 - 1)
    paths: int = key(
        1,
        "runs of the model on each puzzle, which differ by `by`; `select` chooses one",
        ge=1,
        le=4096,
    )
    by: str = key(
        "init",
        "differences between paths: random initial states, noise on every state, a random symmetry of the "
        "puzzle, or several of them. Path 0 has none",
        pattern=r"^(init|noise|symmetry)(,(init|noise|symmetry))*\Z",
        form="init, noise, symmetry, or several with commas between them",
    )
    noise: float | None = key(
        None,
        "standard deviation of the noise; null is arch.noise of the run, 0.01 if that is 0",
        gt=0,
        le=100,
    )
    select: Rule = key(
        "q",
        "the chosen path: highest q_halt, first to halt, most common "
        "answer, smallest change, puzzle's rules satisfied, right by the labels. The "
        "accuracy is printed for all of them",
    )
    depths: str | None = key(
        None,
        "print the accuracy by depth and number of paths, at these ACT steps, such as 8,16,32",
        pattern=r"^[1-9]\d{0,3}(,[1-9]\d{0,3}){0,31}\Z",
        form="increasing whole numbers up to 4096, with commas between them",
    )
    report: str | None = key(
        None, "folder for that table (paths.html) and its heat map (paths.png); needs matplotlib", **PATH
    )
    batch_size: int | None = key(
        None,
        "sequences per batch, on each GPU; null is the run's global_batch_size, or samples times paths if "
        "that is less. As in training, q_halt_loss counts the padding of the last batch",
        ge=1,
        le=2**20,
    )
    reset_puzzle_emb: bool = key(False, "use a new table of puzzle embeddings, for data with other puzzles")
    device: str = key("auto", "where to run; auto is cuda where there is one, else cpu", **DEVICE)
    dtype: Literal["auto", "float32", "bfloat16"] = key(
        "auto", "precision of the forward pass; auto is that of training"
    )
    mode: Literal["auto", "eager", "compile", "graph"] = key(
        "auto", "how a step is run; auto is graph on cuda, else eager"
    )
    save_predictions: str | None = key(None, "write every prediction to this .npz file", **PATH)
    submission: str | None = key(
        None, "ARC: write the two best answers to this file in Kaggle's format", **PATH
    )

    @property
    def depth_list(self) -> list[int]:
        """The ACT steps in `depths`; empty if it is null."""
        return [int(word) for word in self.depths.split(",")] if self.depths else []

    @property
    def has_paths(self) -> bool:
        """Whether to evaluate several paths or several depths."""
        return self.paths > 1 or self.depths is not None


KEYS = keys_of(EvaluateConfig)

_USAGE = f"""\
usage: python -m hrm.evaluate checkpoint=PATH [{JSON_FLAG}] [key=value ...]

Evaluates a trained model as training and the official code do: all sequences take equally many ACT steps.
`torchrun --nproc-per-node=N -m hrm.evaluate ...` divides the batches among N GPUs, with the same results.

  {JSON_FLAG}                 print the results as JSON, and everything else to standard error"""


def parse_args(argv: Sequence[str]) -> EvaluateConfig:
    """The configuration of the command line `argv`, without its flag --json.

    --help prints, then exits with status 0. Raises ConfigError for any mistake.
    """
    args = split_arguments(argv, KEYS, [JSON_FLAG, "--help"])
    if "--help" in args.flags:
        print("\n".join([_USAGE, *help_keys(KEYS, {"": EvaluateConfig}), THREADS_HELP]))
        raise SystemExit(0)
    if args.values.get("checkpoint") is None:
        raise ConfigError("checkpoint is not given: write checkpoint=PATH, a run's folder or a checkpoint")
    config = EvaluateConfig(**args.values)
    depths = config.depth_list
    if depths and config.depth is not None:
        raise ConfigError(f"depth={config.depth} and depths={config.depths}: leave one out")
    if depths != sorted(set(depths)) or max(depths, default=1) > 4096:
        raise ConfigError(f"depths={config.depths} is not allowed: give {KEYS['depths'].allowed}")
    if config.report is not None and not config.has_paths:
        raise ConfigError("report draws the accuracy by depth and paths: add depths=8,16 or paths=8")
    given = [name for name in ("by", "select") if name in args.values]
    if given and config.paths == 1:
        raise ConfigError(f"{given[0]}={args.values[given[0]]} has no effect on one path: add paths=16")
    if config.noise is not None and "noise" not in config.by.split(","):
        raise ConfigError(f"noise={config.noise:g} has no effect: add by=noise, or leave it out")
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status; see `run_command`."""
    words = list(sys.argv[1:] if argv is None else argv)
    as_json = JSON_FLAG in words
    words = [word for word in words if word != JSON_FLAG]
    return run_command(lambda: command(parse_args(words), as_json), "nothing was judged")


def command(config: EvaluateConfig, as_json: bool) -> None:
    """Runs the evaluation and prints the results. Raises UserError."""
    from hrm.common.versions import versions
    from hrm.distributed import joined, place

    # A rank computes whole batches, so the batch size need not be a multiple of the number of ranks.
    with joined(resolve_device(config.device), place().size) as (world, device):
        world.check_equal({"the command": repr(config), **versions(device)})
        judge(config, as_json, world, device)


def judge(config: EvaluateConfig, as_json: bool, world: "World", device: "torch.device") -> None:
    """This rank's part of `command`; rank 0 prints and writes."""
    from hrm.checkpoint.load_model import find_trained, load_trained
    from hrm.data.dataset import subset
    from hrm.data.format import DatasetError
    from hrm.data.puzzle_kinds import kind_of
    from hrm.engine.compilation import Compilation
    from hrm.engine.memory_estimate import check_inference
    from hrm.engine.modes import EAGER, resolve_mode
    from hrm.evaluation.metrics import (
        Listener,
        Voting,
        dataset_of,
        describe,
        evaluate,
        predictions_file,
        taken_of,
    )
    from hrm.evaluation.paths import evaluate_paths

    found = find_trained(str(config.checkpoint), world)
    dataset = dataset_of(found, config.data_path, config.split)
    is_arc = kind_of(dataset.metadata, dataset.sets).name == "arc"
    if config.submission is not None:
        check_file(Path(config.submission))
        if not is_arc:
            raise UserError(
                f"submission={config.submission}: {dataset.folder} is not an ARC data set; leave it out"
            )
    trained = load_trained(
        found,
        device=device,
        dtype=config.dtype,
        metadata=dataset.metadata,
        data=dataset.folder.parent,
        reset_puzzle_emb=config.reset_puzzle_emb,
        ema=config.ema,
    )
    model = trained.model
    if deepest := max(config.depth_list, default=config.depth):
        model.arch = replace(model.arch, halt_max_steps=deepest)
    mode = resolve_mode(config.mode, model.H_init.device) or EAGER
    stream = sys.stderr if as_json else sys.stdout
    say: Callable[[str], None] = partial(print, file=stream, flush=True) if world.is_main else lambda _: None
    for note in [*trained.notes, describe(trained, mode.name, dataset)]:
        say(note)

    examples = None if config.samples is None else subset(dataset, config.samples, config.seed)
    taken = taken_of(dataset, examples)
    batch_size = config.batch_size or found.config.global_batch_size
    if config.batch_size is None and config.samples is not None:
        batch_size = min(batch_size, config.samples * config.paths)
    if device.type == "cpu":
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world.size > 1 else 1
        check_inference(
            trained.config,
            dataset.metadata,
            batch_size,
            device,
            early=config.eval_act or config.has_paths,
            sharing=sharing,
        )
    if config.report is not None:
        require_matplotlib()
    plan = path_plan(config, trained, dataset) if config.has_paths else None
    with ExitStack() as stack:
        listeners: list[Listener] = []
        of_every_path: list[Listener] = []
        voting = None
        try:
            if world.is_main and is_arc and (config.split == "test" or config.submission is not None):
                voting = Voting(dataset, taken)
                # With select=vote, all paths of all augmentations of a task vote together.
                (of_every_path if plan and config.select == "vote" else listeners).append(voting)
        except DatasetError as error:
            if config.submission is not None:
                raise
            say(f"no votes over the augmentations: {error}")
        if world.is_main and config.save_predictions is not None:
            file = Path(config.save_predictions)
            listeners.append(stack.enter_context(predictions_file(file, dataset, taken)))
        run = evaluate if plan is None else partial(evaluate_paths, plan=plan, of_every_path=of_every_path)
        results = run(
            trained,
            dataset,
            batch_size=batch_size,
            mode=mode,
            examples=examples,
            eval_act=config.eval_act,
            listeners=listeners,
            compilation=Compilation(say),
            world=world,
        )
    if voting is not None:
        # ARC data sets have one set.
        next(iter(results.values())).update(voting.metrics())
        if config.submission is not None:
            voting.write_submission(Path(config.submission))
    if world.is_main:
        if config.report is not None:
            for path in draw(Path(config.report), trained, results):
                say(str(path))
        print(to_json(results) if as_json else "\n".join(each.text() for each in tables(results)))


def path_plan(config: EvaluateConfig, trained: "Trained", dataset: "PuzzleDataset") -> "Plan":
    """The paths of the configuration. Raises UserError if the puzzles do not support them."""
    from hrm.data.format import read_names
    from hrm.data.puzzle_kinds import kind_of
    from hrm.evaluation.paths import Plan, check_rule, differences

    kind, model = kind_of(dataset.metadata, dataset.sets), trained.model
    check_rule(config.select, kind)
    by = config.by.split(",") if config.paths > 1 else []
    embeds = kind.name == "arc" and model.puzzle_emb is not None and "symmetry" in by
    names = read_names(dataset.folder.parent) if embeds else None
    views, randomness = differences(by, kind, model, seed=config.seed, noise=config.noise, names=names)
    depths = tuple(config.depth_list) or (model.arch.halt_max_steps,)
    return Plan(config.paths, config.select, depths, views, randomness, config.seed)


def draw(folder: Path, trained: "Trained", results: Mapping[str, Mapping[str, Any]]) -> Iterator[Path]:
    """Writes the accuracy by depth and number of paths as tables and heat maps. Raises UserError."""
    from hrm.evaluation.path_tables import depth_tables
    from hrm.study.html import write_heat_maps
    from hrm.study.plots import HeatMap

    heat_maps, drawn = list[HeatMap](), list[Table]()
    for name, metrics in results.items():
        if not metrics["count"]:
            continue
        paths = metrics["paths"]
        drawn += depth_tables(name, paths)
        counts = list(paths["pass_at"])
        for rule in paths["rules"]:
            shares = [[of[rule][k]["mean"] for k in counts] for of in paths["depths"].values()]
            title = f"{name}, {rule}: % of the puzzles solved"
            axes = ("ACT steps", list(paths["depths"]), "paths", counts)
            heat_maps.append(HeatMap(title, *axes, np.array(shares)))
    if heat_maps:
        yield from write_heat_maps(folder, "paths", f"{trained.path}: depth and breadth", heat_maps, drawn)


def tables(results: Mapping[str, Mapping[str, Any]]) -> Iterator[Table]:
    """The results as tables: the overview and, for several paths, tables by rule and depth."""
    from hrm.evaluation.path_tables import depth_tables, rules_table

    yield table(results)
    for name, metrics in results.items():
        if (paths := metrics.get("paths")) and metrics["count"]:
            yield rules_table(name, paths)
            if len(paths["depths"]) > 1:
                yield from depth_tables(name, paths)


def table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """The metrics of `evaluate` or `evaluate_paths` as a table: one row for each set, part and method."""
    rows, notes = [], []
    for name, metrics in results.items():
        rows.append(_row(name, metrics))
        if not metrics["count"]:
            notes.append(f"{name}: no known answers, nothing to score")
        for degree, part in metrics.get("difficulty", {}).items():
            rows.append(_row(f"  difficulty {degree}", part))
        if solved := metrics.get("pass_at"):
            shares = ", ".join(f"{100 * solved[k]:.2f} % with {k}" for k in ("1", "2"))
            notes.append(f"{name}, tests solved by vote of the augmentations: {shares} answers")
        if early := metrics.get("eval_act"):
            rows.append(_row("  eval_act", early))
            histogram = early.get("steps_histogram", ())
            by_steps = [f"{count:,} after {i}" for i, count in enumerate(histogram, 1) if count]
            notes.append(
                f"{name}, eval_act: {100 * early['steps_saved']:.1f} % of the steps saved, "
                f"{early['seconds']:.1f} s instead of {metrics['seconds']:.1f}"
                + (f"; halted: {', '.join(by_steps)}" if by_steps else "")
            )
        if paths := metrics.get("paths"):
            notes.append(
                f"{name}: answers chosen by {paths['select']} from {paths['paths']} paths, whose ACT steps "
                f"are added up; {metrics['seconds']:.1f} s"
            )
    columns = ["set", "puzzles", "exact", "cells", "q_halt", "steps"]
    notes.append(
        "exact: right in every cell; cells: right cells; q_halt: correct predictions of q_halt; steps: "
        "ACT steps"
    )
    return Table("", columns, rows, "\n".join(notes))


def _row(name: str, metrics: Mapping[str, Any]) -> list[str]:
    shares = ("exact_accuracy", "accuracy", "q_halt_accuracy")
    cells = [f"{100 * metrics[share]:.2f} %" if share in metrics else "-" for share in shares]
    steps = f"{metrics['steps']:.2f}" if "steps" in metrics else "-"
    return [name, f"{metrics['count']:,}", *cells, steps]


if __name__ == "__main__":
    sys.exit(main())
