"""The record of a recipe: what its log amounts to, and the recipes' configurations."""

import subprocess
import sys

import pytest

from bench import records
from bench.implementations import metadata
from bench.records import RECIPES, flop_per_step, flop_until, points, reached, table
from hrm.common.errors import UserError
from hrm.config.load import parse_args

LOG = [
    {"step": 0, "model/parameters": 5.0},
    {"step": 50, "train/seconds_per_step": 0.1},
    {"step": 80, "train/seconds_per_step": 0.2},
    {"step": 80, "eval/all/exact_accuracy": 0.3, "eval_ema/all/exact_accuracy": 0.4},
    {"step": 100, "train/seconds_per_step": 0.5},
    {"step": 100, "eval/valid/exact_accuracy": 0.9, "eval/all/exact_accuracy": 0.6},
]


def test_training_time_counts_only_steps_until_the_target():
    found = points(LOG)
    assert [(point.step, point.accuracy) for point in found] == [(80, 0.4), (100, 0.6)]
    assert [point.train_s for point in found] == pytest.approx([50 * 0.1 + 30 * 0.2, 21.0])
    assert reached(found, 0.4) == found[0] and reached(found, 0.5) == found[1]
    assert reached(found, 0.7) is None and reached(found, None) is None


def test_flop_follow_the_stages():
    words = ["arch.hidden_size=64", "arch.num_heads=2", "global_batch_size=4", "epochs=10", "device=cpu"]
    config, data = parse_args(["preset=cgar", *words]), metadata(16, 6)
    shallow, deep = (
        flop_until(config, data, step, 100) - flop_until(config, data, step - 1, 100) for step in (30, 100)
    )
    # One cycle of two updates against three of six, of which one carries gradient.
    assert 0 < shallow < deep == flop_per_step(config, data)
    assert flop_until(config, data, 30, 100) == 30 * shallow


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_a_configuration(recipe):
    config = parse_args([*RECIPES[recipe].words, "device=cpu"])
    assert config.epochs % config.eval_interval == 0
    assert config.optimizer == ("muon" if recipe == "sic" else "adam_atan2")


def test_a_row_names_the_source_of_its_figures():
    row = {
        "reached": None,
        "evaluations": [{"step": 9, "train_s": 60.0, "accuracy": 0.5, "flop": 10**12}],
        "gpus": [],
        "processor": "P",
        "commit": "abc",
        "published": {
            "exact_accuracy": 0.855,
            "hours": 0.8,
            "gpu": "G",
            "source": "reported by its authors: X",
        },
    }
    *_, line = table({"sic": row}).splitlines()
    assert line == "| sic | 50.0% (best so far) | 1.0 min | 9 | 1e+12 | P | abc | 85.5% 0.8 h G (X) |"


@pytest.mark.parametrize(
    ("status", "accepted"), [(0, True), (75, True), (143, True), (1, False), (-9, False)]
)
def test_a_piece_that_saved_itself_is_continued_and_a_failure_is_reported(
    monkeypatch, tmp_path, status, accepted
):
    ended = [
        sys.executable,
        "-c",
        f"import os, signal; os.kill(os.getpid(), 9) if {status} < 0 else exit({status})",
    ]
    popen = subprocess.Popen
    monkeypatch.setattr(records.subprocess, "Popen", lambda command, cwd: popen(ended))
    monkeypatch.setattr(records, "LOOK", 0.01)
    config = parse_args(["preset=quick", "device=cpu", f"output_dir={tmp_path}"])
    if accepted:
        records.train(config, [], None, 600)
    else:
        with pytest.raises(UserError, match=f"train.py ended with status {status}: see its lines above"):
            records.train(config, [], None, 600)
