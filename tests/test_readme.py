"""The README says what is so: its numbers are the results', its commands run, its files exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import train
from bench import report
from hrm.checkpoint import load_checkpoint
from hrm.config import KEYS, parse_args

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Commands that a shortened run stands for: small, two steps, in a folder of its own.
SHORT = {"max_steps": "2", "arch.hidden_size": "16", "arch.num_heads": "2", "mode": "eager", "device": "cpu"}
SHORT |= {"global_batch_size": "8", "epochs": "8", "eval_interval": "8"}


def guide_commands() -> list[str]:
    """The right-hand commands of the table of other guides' commands."""
    section = README.split("### Commands of other HRM guides")[1].split("\n## ")[0]
    rows = re.findall(r"^\|(.+)\|(.+)\|$", section, flags=re.MULTILINE)[2:]
    cells = [right.strip() for _, right in rows]
    assert len(cells) >= 20 and sum("not yet" in cell for cell in cells) <= 2
    return [cell.strip("`") for cell in cells if "not yet" not in cell]


@pytest.fixture(scope="module")
def run(tiny_sudoku, tmp_path_factory) -> Path:
    """A finished run of the shortened size, for the commands that start from one."""
    out = tmp_path_factory.mktemp("run")
    words = [f"{key}={value}" for key, value in SHORT.items()]
    assert train.main([f"data_path={tiny_sudoku}", f"output_dir={out}", "run_name=r", *words]) == 0
    return out / tiny_sudoku.name / "r"


def test_the_measured_table_is_that_of_the_results():
    assert report.readme_with(README, report.table()) == README


@pytest.mark.parametrize("command", [c for c in guide_commands() if "train.py" in c])
def test_every_guides_command_trains(command, run, tiny_sudoku, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my_gated_config.yaml").write_text("defaults: [gated]\ngate_hidden_ratio: 0.3\n")
    words = shlex.split(command.replace("=DATA", f"={tiny_sudoku}").replace("=RUN", f"={run}"))
    words = words[words.index("train.py") + 1 :]
    # As typed it is accepted, whatever it would cost to run.
    typed = parse_args(words)
    # Shortened it trains.
    kept = [word for word in words if word.split("=")[0] not in SHORT and not word.startswith("tracker=")]
    if typed.data_path is None:
        kept.append(f"data_path={tiny_sudoku}")
    kept += [f"{key}={value}" for key, value in SHORT.items()]
    assert train.main([*kept, f"output_dir={tmp_path}"]) == 0, capsys.readouterr().err
    (saved,) = tmp_path.glob(f"*/{typed.run_name}")
    checkpoint = load_checkpoint(saved)
    assert checkpoint.step == 2
    gated = any("gating_network" in name for name in checkpoint.weights)
    assert gated == typed.arch.use_gating and checkpoint.manifest["run"]["arch"]["hidden_size"] == 16


def test_the_builders_command_builds(tmp_path):
    (typed,) = [c for c in guide_commands() if "hrm.data" in c]
    words = shlex.split(typed.replace("--num-train 1000 --num-aug 100", "--num-train 4 --num-aug 3"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words[1:], "--num-test", "2"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert (
        tmp_path / "data" / "sudoku-easy-1k" / "train" / "all__inputs.npy"
    ).stat().st_size == 128 + 16 * 81


def test_the_tree_names_what_is_there():
    tree = README.split("## The tree")[1].split("```")[1]
    for name in re.findall(r"\b[a-z_]+\.py\b", tree):
        assert any((ROOT / folder / name).is_file() for folder in ("", "kernels", "hrm", "bench", "tests")), (
            name
        )
    for folder in re.findall(r"^(\w+)/", tree, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder


def test_keys_and_targets_that_the_readme_names_exist():
    for key in re.findall(r"`(?:python train\.py )?([a-z_.]+)=", README):
        assert key in KEYS or key == "arch", key
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile
