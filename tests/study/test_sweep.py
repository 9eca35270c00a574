"""Sweeps: the grid and its names, what is refused, and what comes out."""

import json
from pathlib import Path

import pytest

from hrm import sweep
from hrm.common.errors import UserError
from hrm.study import comparison
from hrm.study import runs as campaigns
from tests.support.studies import STAND_IN, TINY, started


def test_values_with_commas_are_swept_and_the_rest_is_for_all():
    axes, fixed = sweep.split_axes(["lr=1e-3,1e-4", "epochs=2", "loss.feudal_loss_weight=0.01,0.1,0.5"])
    assert axes == {"lr": ["1e-3", "1e-4"], "loss.feudal_loss_weight": ["0.01", "0.1", "0.5"]}
    assert fixed == ["epochs=2"]
    # The commas of a list are its own.
    stages = "stages=[{halt_max_steps: 4, epochs: 2}, {halt_max_steps: 8, epochs: 2}]"
    assert sweep.split_axes(["lr=1,2", stages])[1] == [stages]


def test_the_grid_has_every_point_by_name_and_the_last_key_changes_fastest():
    points = sweep.grid({"arch.subgoal_head.manager_period": ["1", "2"], "lr": ["1e-3", "1e-4"]})
    assert list(points) == [
        "manager_period=1,lr=1e-3",
        "manager_period=1,lr=1e-4",
        "manager_period=2,lr=1e-3",
        "manager_period=2,lr=1e-4",
    ]
    assert points["manager_period=2,lr=1e-3"] == ["arch.subgoal_head.manager_period=2", "lr=1e-3"]


def test_too_many_points_or_names_that_are_the_same_are_refused():
    with pytest.raises(UserError, match="more than 1000 points"):
        sweep.grid({key: list("0123456789") for key in ("a", "b", "c", "d")})
    with pytest.raises(UserError, match="two points"):
        sweep.grid({"a.x": ["1"], "data_path": ["/a/b", "-a-b"]})


@pytest.fixture
def run(tiny_sudoku, tmp_path, monkeypatch, capsys):
    """The command in a folder of its own; its trainer takes no time, its report is not drawn."""
    trainer = tmp_path / "stand_in.py"
    trainer.write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(campaigns, "TRAINER", trainer)
    monkeypatch.setattr(comparison, "write_report", lambda folder, *_: (folder / "page", folder / "image"))
    words = [word for word in TINY if not word.startswith("lr=")]

    def main(*argv: str) -> tuple[int, str, str]:
        status = sweep.main([*argv, *words, f"data_path={tiny_sudoku}"])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return main


def test_a_sweep_trains_its_grid_and_compares_with_the_first_point(run):
    status, out, _ = run("arch.gate_init_bias=-3,-2", "lr=1e-3,1e-4", "--seeds", "5,7")
    assert status == 0
    folder = Path("checkpoints/sweep-gate_init_bias-lr")
    results = json.loads((folder / "results.json").read_text())
    names = [f"gate_init_bias={bias},lr={lr}" for bias in (-3, -2) for lr in ("1e-3", "1e-4")]
    assert list(results["entries"]) == names and results["baseline"] == names[0]
    assert started(out) == [f"{name} seed {seed}" for seed in (5, 7) for name in names]
    assert results["words"][names[1]][:2] == ["arch.gate_init_bias=-3", "lr=1e-4"]
    frozen = (folder / f"{names[3]}.yaml").read_text()
    assert "gate_init_bias: -2.0" in frozen and "lr: 0.0001" in frozen and "use_gating: true" in frozen
    assert "3 comparisons" in out
    # A baseline by its key's whole name, or by the point's.
    for baseline in ("arch.gate_init_bias=-2,lr=1e-4", names[3]):
        status, out, _ = run(
            "arch.gate_init_bias=-3,-2", "lr=1e-3,1e-4", "--seeds", "5,7", "--baseline", baseline
        )
        assert status == 0 and started(out) == [] and f"to {names[3]}" in out


def test_swept_keys_may_differ_where_candidates_may_not(run):
    status, out, _ = run("max_steps=6,12", "--arch", "v1", "--seeds", "1")
    assert status == 0 and "2 runs of 6 or 12 steps" in out
    assert "use_gating: false" in Path("checkpoints/sweep-max_steps/max_steps=6.yaml").read_text()


def test_mistakes_are_answered_by_one_line(run, tmp_path):
    for argv, said in {
        ("lr=1e-3",): "no key has several values",
        ("lr=1e-3,1e-3",): "given twice",
        ("lr=1,2", "lr=3,4"): "given twice",
        ("seed=0,1",): "--seeds",
        ("lr=1e-3,fast",): "lr=fast is not allowed",
        ("lr=1e-3,1e-4", "--baseline", "lr=1"): "--baseline lr=1 is not a candidate",
        ("lr=1e-3,0.001",): "lr=1e-3 and lr=0.001 are the same configuration",
    }.items():
        status, out, err = run(*argv)
        assert status == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
        assert said in err
    assert not (tmp_path / "checkpoints").exists()
