"""Depth against breadth: a run is judged, and the tables compare by seed."""

import pytest

from bench import breadth
from hrm.data.dataset import PuzzleDataset
from tests.support.trained_runs import make_config, make_run


def test_a_run_is_judged_and_the_tables_compare_by_seed(tiny_sudoku, tmp_path, monkeypatch):
    monkeypatch.setattr(breadth, "PATHS", 2)
    monkeypatch.setattr(breadth, "DEPTHS", (1, 2))
    make_run(tmp_path, make_config(data_path=str(tiny_sudoku)), PuzzleDataset(tiny_sudoku, "test").metadata)
    found = breadth.judge(tmp_path)
    assert list(found["depths"]) == ["1", "2"] and list(found["sources"]) == list(breadth.SOURCES)
    of_init = found["sources"]["init"]
    # One path is the same whatever the others would differ by.
    assert of_init["rules"]["q"]["1"] == found["depths"]["1"] and "oracle" in of_init["failures"]

    runs = []
    for seed, (plain, other) in enumerate(((0.5, 0.75), (0.25, 0.75))):
        for model, share in zip(breadth.MODELS, (plain, other), strict=True):
            sources = {
                source: {
                    "rules": {rule: {"1": plain, "2": share} for rule in ("q", "vote", "rules", "oracle")},
                    "pass_at": {"1": plain, "2": share},
                    "failures": {
                        rule: {"wrong": 4, "another_right": seed + 1} for rule in ("q", "vote", "rules")
                    },
                }
                for source in breadth.SOURCES
            }
            depths = {"1": plain, "2": 0.5, "8": share}
            runs.append({"model": model, "seed": seed, "sources": sources, "depths": depths})
    *_, failures, ways, models = breadth.tables({"runs": runs})
    # Shares of 1/4 and 1/2: a mean of 37.5, and half of the 95 % t interval of two values 25 apart.
    assert failures.rows[0][2:] == ["37.5 ±158.8"] * 3
    assert ways.rows[3] == ["eqr", "2", "2", "50.0 ±0.0", *["+25.0 ±0.0"] * 3]
    assert models.rows[0] == ["one path", "37.5 ±158.8", "75.0 ±0.0", "+37.5 ±158.8"]


def test_without_seeds_only_the_tables_are_printed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        breadth.main([])
    file = tmp_path / "none.json"
    breadth.main([str(file)])
    assert "Deeper or wider at equal compute" in capsys.readouterr().out and not file.exists()
