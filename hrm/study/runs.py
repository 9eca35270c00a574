"""A campaign: many runs of the trainer, which can be interrupted at any time and continued.

Its folder:

    plan.json         every candidate's whole configuration, and the seeds
    NAME.yaml         a candidate's configuration, as its runs read it
    NAME-seedN/       a run's folder; a finished.json in it marks a run that ended well
    NAME-seedN.log    the output of that run
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hrm.common.errors import UserError, interrupted_by_sigterm
from hrm.common.files import open_own, read_json, to_json, write_whole
from hrm.common.machine import processor
from hrm.common.text import one_line
from hrm.common.threads import threads_of_each, usable_cpus
from hrm.config.load import KEYS, Config, parse_args, to_yaml
from hrm.config.load import settings as config_values
from hrm.data.dataset import PuzzleDataset, steps_in
from hrm.data.order import held_out
from hrm.data.sudoku.build import data_folder
from hrm.study.history import History, read_history
from hrm.training.run_folder import METRICS, run_lock

# The train.py next to this package, in a checkout or an installation, not in the current folder.
TRAINER = Path(__file__).resolve().parents[2] / "train.py"
PLAN, FINISHED = "plan.json", "finished.json"
# Maximum bytes of either file; a thousand candidates need a quarter.
RECORD_LIMIT = 1 << 24

# Keys that a campaign sets for each run, and the remedy for the user.
OWN = {
    "seed": "give --seeds N, or --seeds 0,1,2",
    "output_dir": "give --output DIR",
    "project_name": "give --output DIR, whose name is used",
    "run_name": "leave it out; a run is named by candidate and seed",
    "resume": "leave it out; the same command continues unfinished runs",
    "max_seconds": "leave it out; a signal ends all runs, and the same command continues",
}


@dataclass(frozen=True)
class Candidate:
    """A configuration to run with every seed, and the trainer's arguments for it."""

    name: str
    words: tuple[str, ...]
    config: Config


@dataclass(frozen=True)
class Run:
    """A run of a candidate with a seed, in its own folder."""

    candidate: str
    seed: int
    folder: Path

    @property
    def title(self) -> str:
        """The name in messages and reports."""
        return f"{self.candidate} seed {self.seed}"

    @property
    def log(self) -> Path:
        """The file of its output."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def finished(self) -> bool:
        """Whether its trainer succeeded and its metrics exist."""
        return (self.folder / FINISHED).is_file() and (self.folder / METRICS).is_file()

    def made_by(self) -> dict[str, Any]:
        """The `surroundings` of the run, and whether it shared its device with other runs."""
        path, expected = self.folder / FINISHED, "the record of a finished run; give another --output"
        found = read_json(path, RECORD_LIMIT, expected)
        if not isinstance(found, dict) or not isinstance(found.get("shared_device"), bool):
            raise UserError(f"{path}: expected {expected}")
        return found


@dataclass
class _Active:
    run: Run
    process: subprocess.Popen[bytes]
    start: float


class Campaign:
    """Candidates and seeds, their runs, and the folder that keeps them.

    pace_note: how steps were timed if not in the runs; empty otherwise.
    """

    pace_note = ""

    def __init__(self, folder: str | Path, candidates: Mapping[str, Sequence[str]], seeds: Sequence[int]):
        """candidates: the trainer's arguments by name. Raises UserError for arguments that the trainer
        rejects."""
        self.folder = Path(os.path.abspath(folder))
        self.seeds = list(seeds)
        place = [f"output_dir={self.folder.parent}", f"project_name={self.folder.name}"]
        self.candidates = []
        for name, words in candidates.items():
            own = [*place, f"run_name={name}-seed{max(seeds)}", f"seed={max(seeds)}"]
            self.candidates.append(Candidate(name, tuple(words), parse_args([*words, *own])))
        # Order by seed, so that an interrupted campaign has equally many runs of each candidate.
        self.runs = [
            Run(candidate.name, seed, self.folder / f"{candidate.name}-seed{seed}")
            for seed in seeds
            for candidate in self.candidates
        ]

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Locks the folder and writes the plan. Raises UserError if the folder holds another plan."""

        plan = {"seeds": self.seeds, "candidates": {c.name: settings(c.config) for c in self.candidates}}
        if _held(self.folder):
            raise UserError(f"{self.folder}: another process uses it; wait for it, or give another --output")
        with run_lock(self.folder):
            path = self.folder / PLAN
            if path.exists():
                difference = _difference(_read_plan(path), plan)
                if difference:
                    raise UserError(
                        f"{self.folder} holds another plan, {difference}: give another --output, "
                        "or the arguments of that plan"
                    )
            elif self.folder.is_dir() and any(self.folder.iterdir()):
                raise UserError(f"{self.folder} is not empty and holds no {PLAN}: give another --output")
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, to_json(plan) + "\n")
            for candidate in self.candidates:
                write_whole(self.folder / f"{candidate.name}.yaml", to_yaml(candidate.config))
            yield

    def carry_out(self, slots: Sequence[Mapping[str, str]]) -> list[Run]:
        """Trains the unfinished runs, one per slot at a time; returns the failed runs.

        slots: environment variables of each slot. Prints when a run starts and ends, and the remaining time.
        If this process is killed, its runs continue; the next call waits for them.
        """
        pending = [run for run in self.runs if not run.finished]
        active: dict[int, _Active] = {}
        failed: list[Run] = []
        seconds: dict[str, list[float]] = {}
        waited = False
        places = {slot.get("CUDA_VISIBLE_DEVICES") for slot in slots}
        made_by = json.dumps({**surroundings(), "shared_device": len(slots) > len(places)}, indent=1)
        with interrupted_by_sigterm():
            try:
                while pending or active:
                    for slot in set(range(len(slots))) - active.keys():
                        if run := next((run for run in pending if not _held(run.folder)), None):
                            pending.remove(run)
                            active[slot] = self._start(run, slots[slot])
                    if pending and not active and not waited:
                        waited = True
                        print(f"{pending[0].title}: waiting for the process that trains it", flush=True)
                    time.sleep(0.1)
                    ended = [slot for slot, job in active.items() if job.process.poll() is not None]
                    for job in map(active.pop, ended):
                        if _check(job, made_by):
                            seconds.setdefault(job.run.candidate, []).append(time.monotonic() - job.start)
                        else:
                            failed.append(job.run)
                        ahead = [*pending, *(other.run for other in active.values())]
                        print(f"{self._outcome(job.run)}{_left(ahead, seconds, len(slots))}", flush=True)
            finally:
                _end([job.process for job in active.values()])
        return failed

    def histories(self) -> dict[str, dict[int, History]]:
        """The finished runs by candidate and seed, in the plan's order."""
        found: dict[str, dict[int, History]] = {candidate.name: {} for candidate in self.candidates}
        for run in self.runs:
            if run.finished:
                found[run.candidate][run.seed] = read_history(run.folder, run.title)
        return found

    def _start(self, run: Run, extra: Mapping[str, str]) -> _Active:
        words = [
            f"--config={self.folder / f'{run.candidate}.yaml'}",
            f"seed={run.seed}",
            f"output_dir={self.folder.parent}",
            f"project_name={self.folder.name}",
            f"run_name={run.folder.name}",
            "resume=auto",
        ]
        print(f"{run.title}: started, its output goes to {run.log}", flush=True)
        with open_own(run.log, "ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(TRAINER), *words],
                env={**os.environ, **extra},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return _Active(run, process, time.monotonic())

    def _outcome(self, run: Run) -> str:
        done = sum(run.finished for run in self.runs)
        if not run.finished:
            return f"{run.title}: failed; {done} of {len(self.runs)} runs are finished"
        history = read_history(run.folder)
        steps, scores = history.evaluation()
        score = f"{scores[-1]:.1%} exact at step {steps[-1]}, " if len(steps) else ""
        pace = f"{history.seconds_per_step:.3g} s/step"
        return f"{run.title}: {score}{pace}; {done} of {len(self.runs)} runs are finished"


def settings(config: Config) -> dict[str, Any]:
    """The values of all keys as JSON values, except the keys that a campaign sets."""
    values = config_values(config)
    return {name: values[name] for name in sorted(KEYS.keys() - OWN.keys())}


def planned_steps(config: Config) -> int:
    """The number of steps of a run; builds the built-in data if the run uses it."""
    data, groups = PuzzleDataset(data_folder(config), "train"), None
    if config.valid_fraction:
        groups, _ = held_out(data.folder, data.sets, config.valid_fraction, config.seed)
    steps = steps_in(data, config.epochs, config.global_batch_size, groups)
    return steps if config.max_steps is None else min(steps, config.max_steps)


def slots(device: str, jobs: int | None) -> list[dict[str, str]]:
    """Environment variables that assign a GPU or a share of the CPU to each parallel run.

    device: see the key. jobs: number of parallel runs; None for one per GPU, or one without a GPU.
    """
    gpus: list[str] = []
    if device in ("auto", "cuda"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
        gpus = names if torch.cuda.is_available() else []
    count = jobs or len(gpus) or 1
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} for slot in range(count)]
    return [threads_of_each(count)] * count


def surroundings() -> dict[str, Any]:
    """The conditions of a result besides its configuration: commit, versions, machine."""
    git = ["git", "-C", str(TRAINER.parent)]
    commit = None
    with suppress(OSError, subprocess.CalledProcessError):
        # Ignore an enclosing repository that does not track this code.
        tracked = [*git, "ls-files", "--error-unmatch", TRAINER.name]
        subprocess.run(tracked, check=True, capture_output=True)
        described = [*git, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
        commit = subprocess.run(described, check=True, capture_output=True, text=True).stdout.strip()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "commit": commit,
        "versions": {name: metadata.version(name) for name in ("hrm-kernels", "torch", "numpy")},
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": usable_cpus(),
        "gpus": gpus,
    }


def _held(folder: Path) -> bool:
    try:
        with run_lock(folder):
            return False
    except UserError:
        return True


def _read_plan(path: Path) -> dict[str, Any]:
    remedy = "give another --output"
    plan = read_json(path, RECORD_LIMIT, f"the plan of a comparison; {remedy}")
    candidates = plan.get("candidates") if isinstance(plan, dict) else None
    sound = isinstance(candidates, dict) and all(isinstance(each, dict) for each in candidates.values())
    seeds = plan.get("seeds") if sound else None
    if not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds):
        raise UserError(f"{path} is damaged: {remedy}")
    return dict(plan)


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Describes the first difference between two plans; empty for equal plans."""
    if old["candidates"].keys() != new["candidates"].keys():
        return f"of {one_line(', '.join(old['candidates']))} and not of {', '.join(new['candidates'])}"
    if old["seeds"] != new["seeds"]:
        return f"with seeds {one_line(_listed(old['seeds']))} and not {_listed(new['seeds'])}"
    for name, values in new["candidates"].items():
        there = old["candidates"][name]
        for key in sorted(values.keys() | there.keys()):
            before, now = (json.dumps(side.get(key), sort_keys=True) for side in (there, values))
            if before != now:
                return f"in which {one_line(key)} of {name} is {one_line(before)} and not {now}"
    return ""


def _listed(seeds: Sequence[int]) -> str:
    return ",".join(map(str, seeds))


def _check(job: _Active, made_by: str) -> bool:
    """Whether a process succeeded; records a success, and prints the last lines after a failure."""
    run, status = job.run, job.process.returncode
    problem = f"signal {-status}" if status < 0 else f"exit status {status}"
    if status == 0:
        try:
            evaluated = len(read_history(run.folder).evaluation()[0]) > 0
            problem = "" if evaluated else f"no evaluation in {run.folder / METRICS}; give another --output"
        except UserError as error:
            problem = str(error)
    if not problem:
        write_whole(run.folder / FINISHED, made_by + "\n")
        return True
    with open(run.log, "rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 8192))
        lines = log.read().decode(errors="replace").splitlines()[-10:]
    print(f"{run.title} failed with {problem}; the end of {run.log}:", file=sys.stderr)
    print("".join(f"  {line}\n" for line in lines), end="", file=sys.stderr, flush=True)
    return False


def _left(runs: Sequence[Run], seconds: Mapping[str, Sequence[float]], at_once: int) -> str:
    """The end of a message: the expected time for the remaining runs, from runs that this command
    finished."""
    known = [taken for of_candidate in seconds.values() for taken in of_candidate]
    if not runs or not known:
        return ""
    means = [seconds.get(run.candidate) or known for run in runs]
    total = sum(sum(mean) / len(mean) for mean in means) / min(at_once, len(runs))
    return f", about {tqdm.format_interval(total)} left"


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Terminates processes and waits for them; checkpoints are atomic, so none remains partial."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
