"""Analyses a trained model: `python -m hrm.analyse RUN [RUN] [key=value ...]`."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic.dataclasses import dataclass

from hrm.common.errors import UserError, run_command
from hrm.common.figures import require_matplotlib
from hrm.common.files import to_json
from hrm.common.text import one_line
from hrm.common.threads import THREADS_HELP
from hrm.config.keys import RULES, help_keys, key, keys_of
from hrm.config.load import resolve_device
from hrm.config.messages import ConfigError, nearest
from hrm.config.read import split_arguments
from hrm.config.schema import DEVICE, PATH

# Import PyTorch late: it takes seconds, and --help and mistyped keys do not need it.
if TYPE_CHECKING:
    from hrm.analysis.study import Study

JSON_FLAG = "--json"
# Puzzles per batch. On two cores a small model takes 30 % less time than with 64.
BATCH = 256
# The names of `hrm.analysis.sections`, which imports PyTorch.
SECTION_NAMES = (
    "depth",
    "drift",
    "cells",
    "selection",
    "easy",
    "identifiers",
    "contributions",
    "gates",
    "goals",
    "q_halt",
    "votes",
    "trajectories",
)


@dataclass(config=RULES)
class AnalyseConfig:
    """The examples and the options of an analysis."""

    data_path: str | None = key(
        None, "folder of a data set; null is the one that the run was trained on", **PATH
    )
    split: str = key(
        "test", "split of the data set", pattern=r"^[\w-]{1,80}\Z", form="a split's name, such as test"
    )
    sections: str | None = key(
        None,
        "sections of the page, with commas between them; null is all that apply",
        pattern=r"^[a-z_]+(,[a-z_]+)*\Z",
        form=", ".join(SECTION_NAMES),
    )
    samples: int | None = key(
        None,
        "analyse a fixed random sample of this many puzzles; null is 500, or fewer within max_seconds",
        ge=1,
        le=10**7,
    )
    max_seconds: float = key(
        1800.0, "with samples=null: reduce the number of puzzles to fit this time, at least 16", gt=0, le=1e7
    )
    depth: int = key(8, "length of the longest trajectories, in multiples of halt_max_steps", ge=1, le=64)
    paths: int = key(
        4, "runs of the model on each puzzle, from other initial states and symmetries", ge=1, le=4096
    )
    seed: int = key(0, "seed of the sample, the initial states and the symmetries", ge=0, le=2**32 - 1)
    ema: bool = key(False, "analyse the averaged weights instead of the last ones")
    output: str | None = key(
        None, "folder of the page; null is RUN/analysis, or ./analysis for two runs", **PATH
    )
    batch_size: int | None = key(
        None, f"puzzles per batch; null is the run's global_batch_size, at least {BATCH}", ge=1, le=2**20
    )
    reset_puzzle_emb: bool = key(False, "use a new table of puzzle embeddings, for data with other puzzles")
    device: str = key("auto", "where to run; auto is cuda where there is one, else cpu", **DEVICE)
    dtype: Literal["auto", "float32", "bfloat16"] = key(
        "auto", "precision of the forward pass; auto is that of training"
    )
    mode: Literal["auto", "eager", "compile", "graph"] = key(
        "auto", "how a step is run; auto is graph on cuda, else eager"
    )

    @property
    def section_list(self) -> list[str]:
        """The section names in `sections`; all sections if it is null."""
        return self.sections.split(",") if self.sections else list(SECTION_NAMES)


KEYS = keys_of(AnalyseConfig)

_USAGE = f"""\
usage: python -m hrm.analyse RUN [RUN] [{JSON_FLAG}] [key=value ...]

Measures what a trained model does on its test puzzles and writes a page, analysis.html, with figures. With
two runs it compares them. RUN is a run's folder or one of its checkpoints, a step_N file of the official
code, or hub:OWNER/NAME. The same command continues after an interruption: it reads the measurements stored
in RUN/analysis/records, or for a checkpoint in analysis/step_N/records next to it.

  {JSON_FLAG}                 print the findings as JSON, and everything else to standard error"""


def parse_args(argv: Sequence[str]) -> tuple[list[str], AnalyseConfig]:
    """The runs and the configuration of the command line `argv`, without its flag --json.

    --help prints, then exits with status 0. Raises ConfigError for any mistake.
    """
    runs = [word for word in argv if "=" not in word and not word.startswith("-")]
    args = split_arguments([word for word in argv if word not in runs], KEYS, [JSON_FLAG, "--help"])
    if "--help" in args.flags:
        print("\n".join([_USAGE, *help_keys(KEYS, {"": AnalyseConfig}), THREADS_HELP]))
        raise SystemExit(0)
    if not 1 <= len(runs) <= 2:
        raise ConfigError(f"{len(runs)} runs are given: give one, or two to compare them")
    config = AnalyseConfig(**args.values)
    for name in config.section_list:
        if name not in SECTION_NAMES:
            near = nearest(name, SECTION_NAMES)
            hint = f"did you mean {near}?" if near else f"give some of {', '.join(SECTION_NAMES)}"
            raise ConfigError(f"sections={one_line(name)}: no such section; {hint}")
    return runs, config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status; see `run_command`."""
    words = list(sys.argv[1:] if argv is None else argv)
    as_json = JSON_FLAG in words
    words = [word for word in words if word != JSON_FLAG]
    return run_command(
        lambda: analyse(*parse_args(words), as_json),
        "the measurements so far are kept; the same command continues",
    )


def analyse(runs: Sequence[str], config: AnalyseConfig, as_json: bool) -> None:
    """Analyses the runs, writes the page and prints the findings. Raises UserError."""
    from hrm.analysis.page import Result, write_page
    from hrm.analysis.sections import SECTIONS
    from hrm.analysis.side_by_side import comparison
    from hrm.common.files import write_whole

    require_matplotlib()
    stream = sys.stderr if as_json else sys.stdout
    say: Callable[[str], None] = partial(print, file=stream, flush=True)
    chosen = [section for section in SECTIONS if section.name in config.section_list]
    results: list[Result] = []
    studies: list[Study] = []
    for run, name in zip(runs, _names(runs), strict=True):
        study, facts = opened(run, name, config, say)
        result = Result(name, facts)
        for section in chosen:
            if reason := section.reason(study):
                result.left_out[section.name] = reason
                continue
            try:
                found = section.find(study)
            # A section that fails does not affect the others.
            except UserError as error:
                result.left_out[section.name] = one_line(error, 400)
                continue
            result.findings[section.name] = found
            say(f"{name}, {section.title.lower()}: {found.sentence}")
        for section_name, reason in result.left_out.items():
            say(f"{name}: {section_name} is left out: {reason}")
        # Free the memory for the next model.
        study.forget()
        results.append(result)
        studies.append(study)
    folder = Path(config.output) if config.output else _folder(runs)
    title = f"Analysis of {' and '.join(result.name for result in results)}"
    tables = [comparison(results, studies)] if len(results) > 1 else []
    for path in write_page(folder, title, chosen, results, tables):
        say(str(path))
    told = to_json({result.name: result.as_numbers() for result in results})
    write_whole(folder / "analysis.json", told + "\n")
    if as_json:
        print(told)


def _names(runs: Sequence[str]) -> list[str]:
    """A unique name for each run: its folder, preceded by the parent folder for a checkpoint, and numbered if
    equal."""
    names = []
    for run in runs:
        path = Path(run if run.startswith("hub:") else Path(run).resolve())
        own = path.name
        names.append(f"{path.parent.name}/{own}" if own.startswith("step_") else own)
    return names if len(set(names)) == len(names) else [f"{name} ({i})" for i, name in enumerate(names, 1)]


def _folder(runs: Sequence[str]) -> Path:
    """The default folder of the page."""
    return Path("analysis") if len(runs) > 1 else _home(runs[0])


def _home(run: str) -> Path:
    """The analysis folder of a run."""
    path = Path(run)
    if run.startswith("hub:"):
        return Path("analysis") / path.name
    # Add no files to a checkpoint's folder.
    if path.name.startswith("step_"):
        return path.parent / "analysis" / path.name
    return (path if path.is_dir() else path.parent) / "analysis"


def opened(
    run: str, name: str, config: AnalyseConfig, say: Callable[[str], None]
) -> "tuple[Study, list[str]]":
    """The study of a run and the facts about it. Raises UserError."""
    import torch

    from hrm.analysis.records import read_examples
    from hrm.analysis.study import MOST_SAMPLES, Study, affordable, identity_of
    from hrm.checkpoint.load_model import find_trained, load_trained
    from hrm.data.dataset import subset
    from hrm.data.puzzle_kinds import kind_of
    from hrm.engine.memory_estimate import check_inference
    from hrm.engine.modes import EAGER, resolve_mode
    from hrm.evaluation.metrics import dataset_of, describe, taken_of

    device = torch.device(resolve_device(config.device))
    found = find_trained(run)
    dataset = dataset_of(found, config.data_path, config.split)
    trained = load_trained(
        found,
        device=device,
        dtype=config.dtype,
        metadata=dataset.metadata,
        data=dataset.folder.parent,
        reset_puzzle_emb=config.reset_puzzle_emb,
        ema=config.ema,
    )
    mode = resolve_mode(config.mode, device) or EAGER
    facts = [*trained.notes, describe(trained, mode.name, dataset)]
    for fact in facts:
        say(fact)
    samples = config.samples or MOST_SAMPLES
    taken = taken_of(dataset, subset(dataset, samples, config.seed))
    examples = read_examples(dataset, taken)
    if not len(examples):
        raise UserError(f"{dataset.folder}: no puzzle has a known answer; give a split or data with answers")
    batch_size = min(config.batch_size or max(found.config.global_batch_size, BATCH), len(examples))
    check_inference(trained.config, dataset.metadata, batch_size, device, early=True)
    options: dict[str, Any] = {
        "split": config.split,
        "ema": config.ema,
        "fresh": config.reset_puzzle_emb,
        "dtype": str(trained.model.dtype),
    }
    study = Study(
        name=name,
        trained=trained,
        dataset=dataset,
        kind=kind_of(dataset.metadata, dataset.sets),
        examples=examples,
        steps=trained.model.arch.halt_max_steps,
        depth=config.depth,
        paths=config.paths,
        seed=config.seed,
        batch_size=batch_size,
        mode=mode,
        folder=_home(run) / "records",
        identity=identity_of(found.file, dataset, options),
        say=say,
    )
    if config.samples is None and (fewer := affordable(study, config.max_seconds)) < len(examples):
        taken = taken_of(dataset, subset(dataset, fewer, config.seed))
        study.examples = read_examples(dataset, taken)
        study.batch_size = min(batch_size, len(study.examples))
        say(f"{len(study.examples)} puzzles fit into max_seconds={config.max_seconds:g}")
    facts.append(
        f"{len(study.examples):,} puzzles of the split {config.split}, of kind {study.kind.name}, "
        f"{study.kind.rows}x{study.kind.cols} cells; drawn by seed {config.seed}"
    )
    return study, facts


if __name__ == "__main__":
    sys.exit(main())
