"""Every command of docs/migrating.md's table is run, shortened, in one folder.

Shortened means a small model, a small data set and a few steps; all else is as typed, and what a run leaves
must say so.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from hrm.checkpoint.read import load_checkpoint
from hrm.compare import main as compare
from hrm.config.load import KEYS, Config, load_config, parse_args
from hrm.data.__main__ import main as build
from hrm.data.sudoku.build import builtin_sudoku
from hrm.model.hrm import HRM
from hrm.sweep import main as sweep
from tests.support.fake_wandb import FakeWandb
from tests.support.forked import popen
from tests.support.paths import ROOT
from tests.support.torchrun import torchrun

SECTION = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")

# The values of a shortened run: 48 puzzles in batches of 16 make 3 steps an epoch.
SMALL = {"arch.hidden_size": "16", "arch.num_heads": "2", "arch.expansion": "1", "arch.H_layers": "1"}
SMALL |= {"arch.L_layers": "1", "global_batch_size": "16", "eval_interval": "1", "mode": "eager"}
SMALL |= {"device": "cpu", "log_interval": "1"}
EPOCHS, STEPS_PER_EPOCH, MAX_STEPS = 2, 3, 2
# The built-in data of that size, with one batch of test puzzles.
# The presets differ in their positions, which a checkpoint of one must share with a run of the other.
BUILT_IN = {
    "arch.pos_encodings": "rope",
    "sudoku.size": "4",
    "sudoku.num_train": "48",
    "sudoku.num_test": "16",
}
BUILT_IN |= {"sudoku.num_aug": "0", "sudoku.clues": "0"}
# What a shortened run does not have as typed, or has according to its size.
CHANGED = {*SMALL, *BUILT_IN, "epochs", "max_steps", "stages", "output_dir", "project_name"}
CHANGED |= {"arch.puzzle_emb_ndim", "arch.subgoal_head.goal_dim", "preset"}


def guide_commands() -> list[str]:
    """The right-hand commands of the first table."""
    rows = re.search(r"(?:^\|.+\|\n)+", SECTION, flags=re.MULTILINE)
    assert rows is not None
    cells = [line.rsplit("|", 2)[1].strip() for line in rows[0].splitlines()[2:]]
    assert all(cell.count("`") == 2 and cell[0] == cell[-1] == "`" for cell in cells)
    return [cell.strip("`") for cell in cells]


COMMANDS = guide_commands()
TRAINING = [command for command in COMMANDS if "train.py" in command or command == "make train"]
CAMPAIGNS = {"hrm.compare": compare, "hrm.sweep": sweep}


def words_of(command: str) -> list[str]:
    """What the command gives its program: the words after train.py, or after the module's name."""
    words = shlex.split(command)
    starts = [i for i, word in enumerate(words) if word == "train.py" or word.startswith("hrm.")]
    return words[starts[0] + 1 :] if starts else []


def shortened(words: list[str]) -> list[str]:
    """The words of a training command with its sizes replaced; an axis of a sweep keeps two values."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    small = dict(SMALL) if "data_path" in given else {**SMALL, **BUILT_IN}
    if "stages" in given:
        small["stages"] = re.sub(r"epochs: \d+", "epochs: 1", given["stages"])
    else:
        small["epochs"] = str(EPOCHS)
    if "max_steps" in given:
        small["max_steps"] = str(MAX_STEPS)
    kept = [word for word in words if word.split("=")[0] not in small]
    kept = [re.sub(r"^([\w.]+=[^,\[]+,[^,]+),.*", r"\1", word) for word in kept]
    return [*kept, *(f"{key}={value}" for key, value in small.items())]


def steps_of(config: Config) -> int:
    """The last step of a shortened run."""
    epochs = sum(stage.epochs for stage in config.stages) if config.stages else EPOCHS
    return config.max_steps or epochs * STEPS_PER_EPOCH


class Workplace:
    """The folder in which all commands are typed, and the runs they have left so far."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self.runs: dict[str, Path] = {}

    def typed(self, command: str) -> list[str]:
        """The words as a user types them, with the folders that DATA and RUN stand for."""
        words = [word.replace("=DATA", f"={self.data}") for word in words_of(command)]
        if not any(word.endswith("=RUN") for word in words):
            return words
        above = self.run(TRAINING[TRAINING.index(command) - 1])
        return [word.replace("=RUN", f"={above}") for word in words]

    def run(self, command: str) -> Path:
        """The folder of the shortened command's run, which is made when it is first asked for."""
        if command not in self.runs:
            words = shortened(self.typed(command))
            if command.startswith("torchrun"):
                out = self.folder / "checkpoints"
                program = [str(ROOT / "train.py"), *words, f"output_dir={out}"]
                (ended,) = torchrun(2, *program)
                assert ended.status == 0, ended.text
            else:
                assert train.main(words) == 0
            config = parse_args(words)
            self.runs[command] = self.folder / "checkpoints" / config.project_name / config.run_name
        return self.runs[command]


@pytest.fixture(scope="module")
def wandb() -> FakeWandb:
    return FakeWandb(logged_in=False)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, wandb) -> Iterator[Workplace]:
    folder = tmp_path_factory.mktemp("guides")
    (folder / "my_gated_config.yaml").write_text("defaults: [gated]\ngate_hidden_ratio: 0.3\n")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HRM_CACHE", str(folder / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("WANDB_MODE", "offline")
        patch.setitem(sys.modules, "wandb", wandb)
        yield Workplace(folder, builtin_sudoku(4, 48, 16, 0, 0))
    torch.set_num_threads(threads)


def parse_typed(words: list[str]) -> Config:
    """The configuration as typed on a machine without a GPU."""
    return parse_args([*(word for word in words if not word.startswith("device=")), "device=cpu"])


def assert_as_typed(saved: Config, typed: Config) -> None:
    """Every key but those that shortening replaces has the typed value."""
    for key in KEYS.keys() - CHANGED:
        assert attrgetter(key)(saved) == attrgetter(key)(typed), key


def test_every_row_is_a_command_that_is_run_here():
    others = [c for c in COMMANDS if c not in TRAINING and not any(name in c for name in CAMPAIGNS)]
    assert len(COMMANDS) == len(set(COMMANDS)) >= 34
    assert len(others) == 1 and others[0].startswith("python -m hrm.data sudoku ")


@pytest.mark.parametrize("command", TRAINING, ids=lambda command: command.split("run_name=")[-1])
def test_training(command, workplace, wandb):
    typed = parse_typed(workplace.typed(command))
    run = workplace.run(command)
    saved, checkpoint = load_config(run / "config.yaml"), load_checkpoint(run)
    assert run.name == typed.run_name
    assert_as_typed(saved, typed)
    assert checkpoint.step == steps_of(saved)
    sizes = {"vocab_size": 6, "seq_len": 16, "num_puzzle_identifiers": 1}
    assert checkpoint.weights.keys() == HRM(saved.arch, **sizes).state_dict().keys()
    assert checkpoint.weights["lm_head.weight"].shape[1] == 16
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = {line["step"]: line["eval/all/steps"] for line in lines if "eval/all/steps" in line}
    # One at the end of each epoch, of a stage with its own depth.
    stages = saved.stages or [saved.arch] * EPOCHS
    ends = [min(epoch * STEPS_PER_EPOCH, checkpoint.step) for epoch in range(1, len(stages) + 1)]
    assert evaluated == {end: of.halt_max_steps for end, of in zip(ends, stages, strict=True)}
    if typed.checkpoint_path is not None:
        assert checkpoint.manifest["run"]["checkpoint_path"] == typed.checkpoint_path
    if typed.tracker == "wandb":
        (call,) = wandb.calls
        assert (call["project"], call["name"], call["mode"]) == ("scout", "feudal_exp_1", "offline")
        assert [step for step, metrics in wandb.logged if "train/loss" in metrics] == list(range(1, 7))


def test_the_make_target_runs_the_trainer():
    # As from a shell of its own: a make that runs these tests would be heard in the output.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("M")}
    printed = subprocess.run(
        ["make", "-n", "train", "VENV=new", "ARGS=max_steps=2"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert printed[0].endswith("-m venv new") and "-c constraints.txt -e ." in printed[1]
    assert printed[-1] == "new/bin/python train.py max_steps=2"


@pytest.mark.parametrize("command", [c for c in COMMANDS if any(name in c for name in CAMPAIGNS)])
def test_comparisons_and_sweeps(command, workplace, capsys, monkeypatch):
    forking = SimpleNamespace(**{**vars(subprocess), "Popen": popen})
    monkeypatch.setattr("hrm.study.runs.subprocess", forking)
    (main,) = (main for name, main in CAMPAIGNS.items() if name in command)
    words = words_of(command)
    assert main([*shortened(words), "--seeds=1"]) == 0, capsys.readouterr().err
    swept = {word.split("=")[0]: word.split("=")[1].split(",") for word in words if "," in word}
    name = "-".join(["sweep", *(key.rpartition(".")[2] for key in swept)]) if swept else "compare-v1-gated"
    folder = workplace.folder / "checkpoints" / name
    results = json.loads((folder / "results.json").read_text())
    assert results["seeds"] == [0] and results["missing"] == [] and len(results["words"]) == 2
    assert (folder / "report.html").is_file()
    for position, candidate in enumerate(results["words"]):
        saved = load_config(folder / f"{candidate}-seed0" / "config.yaml")
        assert load_checkpoint(folder / f"{candidate}-seed0").step == steps_of(saved)
        if not swept:
            assert (candidate, saved.arch.use_gating) == (("v1", False), ("gated", True))[position]
        for key, values in swept.items():
            assert attrgetter(key)(saved) == float(values[position]) and saved.arch.subgoal_head.enabled
    # Every value as typed is one that the trainer takes.
    for key, values in swept.items():
        for value in values:
            assert attrgetter(key)(parse_args(["--arch", "feudal", f"{key}={value}"])) == float(value)


def test_the_builder_of_data(workplace):
    (command,) = (c for c in COMMANDS if "hrm.data" in c)
    small = command.replace("--num-train 1000 --num-aug 100", "--num-train 4 --num-aug 3")
    assert small != command and build([*words_of(small), "--num-test", "2"]) == 0
    cells = np.load(workplace.folder / "data" / "sudoku-easy-1k" / "train" / "all__inputs.npy")
    assert cells.shape == (4 * (1 + 3), 81)


def test_consecutive_commands_use_different_runs(workplace):
    configs: dict[tuple[str, str], Config] = {}
    for command in TRAINING:
        words = [word for word in workplace.typed(command) if not word.startswith("checkpoint_path=")]
        config = parse_typed(words)
        earlier = configs.setdefault((config.project_name, config.run_name), config)
        assert config == earlier, command
    # `make train` and `python train.py --arch gated` are the same.
    assert len(configs) == len(TRAINING) - 1


def test_the_metrics_and_keys_to_watch_are_there(workplace):
    rows = SECTION.split("## Metrics and options")[1]
    commands = [c for c in TRAINING if c.endswith(("--arch gated", "run_name=feudal-without-gate"))]
    assert len(commands) == 2
    logged: set[str] = set()
    for command in commands:
        for line in (workplace.run(command) / "metrics.jsonl").read_text().splitlines():
            logged |= json.loads(line).keys()
    named = re.findall(r"`((?:train|eval)/[\w/]+)`", rows)
    assert len(named) >= 15 and set(named) <= logged, set(named) - logged
    words = re.findall(r"`([a-z_.]+=[\w.]+)`", rows)
    assert len(words) == 5
    config = parse_args(["--arch", "gated", *words])
    for word in words:
        key, value = word.split("=")
        assert attrgetter(key)(config) == float(value)
