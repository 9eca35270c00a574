"""Trains the architectures and recipes that docs/results.md compares, over seeds.

    python -m bench.studies architectures --seeds 10 --jobs 2 --output DIR

The studies share small 4x4 puzzles: `architectures` compares gates, subgoals and TRM with v1; `ingredients`
takes single ingredients of the record recipe away; `record` compares that recipe with TRM at D=128. The same
command continues with the missing runs. The output folder is that of `hrm.compare`.

Parallel runs slow each other down. Times are therefore those of all candidates' steps side by side in one
process, measured at the first report and stored in the folder's paces.json.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench.implementations import random_batches
from hrm.common.errors import UserError, run_command
from hrm.common.files import read_json, write_whole
from hrm.config import presets
from hrm.data.dataset import PuzzleDataset
from hrm.data.sudoku.build import data_folder
from hrm.engine.engine import Engine
from hrm.study.comparison import conduct, seeds
from hrm.study.history import History
from hrm.study.options import INTERRUPTED, add_options, parse
from hrm.study.runs import Campaign, Candidate

# The quick preset with 1,000 puzzles, as many as the published recipes use. The learning rate is constant, so
# that the score at a step is also that of a shorter run. Eager steps suffice for runs of a minute.
TASK = (
    "preset=quick",
    "sudoku.num_train=1000",
    "sudoku.num_test=128",
    "sudoku.clues=10",
    "augment=true",
    "lr_warmup_steps=50",
    "lr_min_ratio=1.0",
    "mode=eager",
    "device=cpu",
)
# Two cycles of two updates, as v1 has, in place of TRM's 3 x 6 and the recipe's 6 x 9.
TRM = ("--arch=trm", "arch.H_cycles=2", "arch.L_cycles=2")
# preset=record without the keys of its data and length; its average starts after 5/8 of the steps.
INGREDIENTS = ("grad_clip", "loss.loss_type", "loss.label_smoothing", "loss.q_halt_weight", "ema_rate")
RECORD = ("--arch=sic", *TRM[1:], *(f"{key}={presets.RECORD[key]}" for key in INGREDIENTS))


def changed(words: tuple[str, ...], *changes: str) -> tuple[str, ...]:
    """The words with other values for the keys of `changes`."""
    keys = {change.partition("=")[0] for change in changes}
    return (*(word for word in words if word.partition("=")[0] not in keys), *changes)


STUDIES: dict[str, dict[str, tuple[str, ...]]] = {
    "architectures": {
        "v1": ("--arch=v1",),
        "gated": ("--arch=gated",),
        "gated-bias-0": ("--arch=gated", "arch.gate_init_bias=0"),
        "gated-bias-2": ("--arch=gated", "arch.gate_init_bias=2"),
        "gated-balanced": ("--arch=gated", "arch.gate_init_strategy=balanced"),
        "gated-input": ("--arch=gated", "arch.gate_init_strategy=input_focused"),
        "gated-hierarchy": ("--arch=gated", "arch.gate_init_strategy=hierarchy_focused"),
        "feudal": ("--arch=feudal",),
        "feudal-ungated": ("--arch=feudal", "arch.subgoal_head.gating=false"),
        "trm": TRM,
    },
    "ingredients": {
        "sic": RECORD,
        "adam-atan2": changed(RECORD, "optimizer=adam_atan2"),
        "plain-swiglu": changed(RECORD, "arch.swiglu=plain"),
        "no-smoothing": changed(RECORD, "loss.label_smoothing=0"),
        "no-symmetries": changed(RECORD, "augment=false"),
        "attention": changed(RECORD, "arch.mlp_t=false", "arch.pos_encodings=learned"),
        "no-register": changed(RECORD, "arch.register_tokens=0"),
        "no-head-bias": changed(RECORD, "arch.head_bias=false"),
        "no-clipping": changed(RECORD, "grad_clip=null"),
        "q-weight-0.5": changed(RECORD, "loss.q_halt_weight=0.5"),
    },
    "record": {"trm": TRM, "sic": RECORD},
}
# Lengths. Equal time gives TRM more steps than the recipe, whose steps take longer.
LENGTHS: dict[str, dict[str, tuple[str, ...]]] = {
    "architectures": {name: ("epochs=13", "eval_interval=3") for name in STUDIES["architectures"]},
    "ingredients": {name: ("epochs=4", "eval_interval=2", "ema_start=38") for name in STUDIES["ingredients"]},
    "record": {
        "trm": ("epochs=9", "eval_interval=3", "arch.hidden_size=128"),
        "sic": ("epochs=4", "eval_interval=1", "ema_start=38", "arch.hidden_size=128"),
    },
}
LENGTH_KEYS = ("epochs", "eval_interval")
ROUNDS = 24


def arguments(study: str) -> dict[str, list[str]]:
    """The trainer's arguments for each candidate of a study."""
    lengths = LENGTHS[study]
    return {name: [*changed((*TASK, *lengths[name]), *own)] for name, own in STUDIES[study].items()}


class Study(Campaign):
    """A campaign whose step times are measured side by side."""

    pace_note = "Times per step: processor time with one thread, of all candidates side by side."

    def histories(self) -> dict[str, dict[int, History]]:
        """The finished runs, with the measured time of a step in place of the logged ones."""
        paces = self._paces()
        return {
            name: {
                seed: replace(run, metrics={**run.metrics, "train/seconds_per_step": paces[name]})
                for seed, run in runs.items()
            }
            for name, runs in super().histories().items()
        }

    def _paces(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        file = self.folder / "paces.json"
        if not file.exists():
            write_whole(file, json.dumps(paces(self.candidates), indent=1) + "\n")
        expected = "the seconds of a step by candidate; rename the file to measure them again"
        found = read_json(file, 2**16, expected)
        names = {candidate.name for candidate in self.candidates}
        if not isinstance(found, dict) or found.keys() != names or {*map(type, found.values())} != {float}:
            raise UserError(f"{file}: expected {expected}")
        return {name: (np.array([1]), np.array([seconds])) for name, seconds in found.items()}


def paces(candidates: Sequence[Candidate]) -> dict[str, float]:
    """Processor seconds of a training step by candidate.

    Each is the minimum over ROUNDS rounds of all candidates, because other processes only lengthen a step.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    steps = {}
    for candidate in candidates:
        data = PuzzleDataset(data_folder(candidate.config), "train").metadata
        engine = Engine(candidate.config, data, total_steps=1000, device=torch.device("cpu"))
        steps[candidate.name] = engine, random_batches(candidate.config, data)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, (engine, batches) in steps.items():
            batch, start = next(batches), time.process_time()
            engine.train_step(batch)
            seconds[name].append(time.process_time() - start)
    torch.set_num_threads(threads)
    return {name: min(each) for name, each in seconds.items()}


def main(argv: Sequence[str]) -> int:
    """Runs the command line. Returns 1 if a run failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies", description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    add_options(parser, "the first candidate")
    args = parse(parser, argv)
    folder = Path(args.output or f"checkpoints/study-{args.study}")
    campaign = Study(folder, arguments(args.study), seeds(args.seeds))
    return int(bool(conduct(campaign, args, f"Study: {args.study}", LENGTH_KEYS)))


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:]), INTERRUPTED))
