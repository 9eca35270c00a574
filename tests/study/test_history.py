"""Reading runs back: exact series, half-written files, damaged ones, names that tell runs apart."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrm.common.errors import UserError
from hrm.study import history
from hrm.study.history import History, read_histories, read_history


def write(folder: Path, *lines: dict[str, Any], tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + tail, encoding="utf-8")
    return folder


def points(found: History, key: str) -> list[tuple[int, float]]:
    steps, values = found.series(key)
    assert (steps.dtype, values.dtype) == (np.int64, np.float64)
    return list(zip(steps.tolist(), values.tolist(), strict=True))


def test_logged_metrics_are_read_back(tmp_path):
    from hrm.training.logging import MetricsFile

    log = MetricsFile(tmp_path / "run")
    log.log({"model/parameters": 1234, "run/total_steps": 400}, 0)
    log.log({"train/loss": 0.5, "train/seconds_per_step": 9.0}, 10)
    log.log({"train/loss": math.nan, "train/seconds_per_step": 0.25}, 20)
    log.log({"eval/all/exact_accuracy": 0.75, "eval/all/count": 8}, 20)
    log.log({"train/loss": 0.25, "train/seconds_per_step": 0.5}, 30)
    log.close()
    found = read_history(tmp_path / "run")
    assert (found.name, found.folder, found.config) == ("run", tmp_path / "run", None)
    assert (found.last_step, found.parameters, found.total_steps) == (30, 1234, 400)
    assert found.seconds_per_step == 0.5  # of 9, 0.25 and 0.5: what compiles does not count
    steps, values = found.series("train/loss")
    assert steps.tolist() == [10, 20, 30]
    np.testing.assert_array_equal(values, [0.5, np.nan, 0.25])
    assert points(found, "eval/all/exact_accuracy") == [(20, 0.75)]
    assert len(found.keys()) == 6 and found.keys() == sorted(found.metrics)


def test_missing_metrics_are_empty(tmp_path):
    found = read_history(write(tmp_path, {"step": 3, "train/loss": 1, "note": "text", "list": [1]}))
    assert found.keys() == ["train/loss"]
    assert points(found, "train/steps") == []
    assert [part.tolist() for part in found.evaluation()] == [[], []]
    assert math.isnan(found.seconds_per_step)
    assert (found.parameters, found.total_steps, found.eval_sets) == (None, None, [])


def test_a_run_without_a_log(tmp_path):
    found = read_history(write(tmp_path))
    assert (found.last_step, found.keys()) == (0, [])


@pytest.mark.parametrize("tail", ['{"step": 7, "a": 2', '{"step": 7, "a": 2}', '{"step": 7,\xff', "{"])
def test_an_unterminated_line_is_skipped(tmp_path, tail):
    found = read_history(write(tmp_path, {"step": 5, "a": 1}, tail=tail))
    assert (points(found, "a"), found.last_step) == ([(5, 1.0)], 5)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{half", "is not JSON"),
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "is not a JSON object"),
        ("3", "is not a JSON object"),
        ('{"a": 1}', "has no step"),
        ('{"step": "3"}', "has no step"),
        ('{"step": true}', "has no step"),
        ('{"step": -1}', "has no step"),
        ('{"step": 9223372036854775808}', "has no step"),
        ('{"step": 1, "a": "' + "x" * 2**20 + '"}', "is too long"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, what):
    write(tmp_path, {"step": 1, "a": 1}, tail=f'{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=rf"metrics\.jsonl line 2 {what}.*; give another run"):
        read_history(tmp_path)


def test_numbers_too_large_for_a_double_are_infinite(tmp_path):
    found = read_history(write(tmp_path, {"step": 1, "a": 10**400, "b": -1e308}))
    assert points(found, "a") == [(1, math.inf)]
    assert points(found, "b") == [(1, -1e308)]


def test_the_later_of_two_lines_at_a_step_counts_and_steps_ascend(tmp_path):
    lines = [{"step": s, "a": v} for s, v in [(10, 1), (20, 2), (30, 3), (20, 5), (20, 6), (40, 7)]]
    assert points(read_history(write(tmp_path, *lines)), "a") == [(10, 1), (20, 6), (30, 3), (40, 7)]


@pytest.mark.parametrize(("count", "kept"), [(4, [0, 1, 2, 3]), (5, [0, 2, 4]), (6, [0, 2, 4, 5])])
def test_a_long_series_is_thinned_and_keeps_its_last_point(tmp_path, monkeypatch, count, kept):
    monkeypatch.setattr(history, "MOST_POINTS", 4)
    lines = [{"step": s, "a": s / 2} for s in range(count)]
    assert points(read_history(write(tmp_path, *lines)), "a") == [(s, s / 2) for s in kept]


def test_a_very_long_series_needs_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "MOST_POINTS", 16)
    steps, values = read_history(write(tmp_path, *({"step": s, "a": -s} for s in range(1000)))).series("a")
    assert len(steps) <= 17 + 1 and (steps[0], steps[-1]) == (0, 999)
    assert set(np.diff(steps[:-1])) == {64}
    np.testing.assert_array_equal(values, -steps)


@pytest.mark.filterwarnings("error")
def test_an_evaluation_is_weighted_by_the_sets_counts(tmp_path):
    found = read_history(
        write(
            tmp_path,
            {"step": 10, "eval/a/exact_accuracy": 0.5, "eval/a/count": 30},
            {"step": 10, "eval/b/c/exact_accuracy": 1.0, "eval/b/c/count": 10},
            {"step": 20, "eval/a/exact_accuracy": 0.25, "eval/a/count": 30},
            {"step": 30, "eval/a/exact_accuracy": 0.5, "eval/b/c/exact_accuracy": 0.0},
            {"step": 40, "eval/a/exact_accuracy": 0.5, "eval/a/count": 0},
            {"step": 20, "eval_ema/a/exact_accuracy": 0.75, "eval_ema/a/count": 30},
            {"step": 20, "eval/a/steps": 3.5, "eval/a/count": 30},
        )
    )
    assert found.eval_sets == ["a", "b/c"]
    steps, values = found.evaluation()
    assert steps.tolist() == [10, 20, 30, 40]
    # (0.5 * 30 + 1 * 10) / 40; one set alone; two sets of which no counts are known; a set of nothing
    np.testing.assert_array_equal(values, [0.625, 0.25, 0.25, np.nan])
    assert [part.tolist() for part in found.evaluation(ema=True)] == [[20], [0.75]]
    assert [part.tolist() for part in found.evaluation("steps")] == [[20], [3.5]]


def test_the_configuration_is_read_as_plain_values(tmp_path):
    write(tmp_path, {"step": 1})
    (tmp_path / "config.yaml").write_text("lr: 0.001\narch:\n  use_gating: true\nrun_name: g\n")
    assert read_history(tmp_path).config == {"lr": 0.001, "arch": {"use_gating": True}, "run_name": "g"}


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "a: !!python/object/apply:os.getcwd []", "\xff"])
def test_another_file_in_the_configurations_place_is_refused(tmp_path, text):
    write(tmp_path, {"step": 1})
    (tmp_path / "config.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"config\.yaml: not.* a run's configuration.*; restore it"):
        read_history(tmp_path)


def test_a_nearby_run_is_suggested(tmp_path):
    for missing in (tmp_path / "none", write(tmp_path / "deep" / "er" / "run") / "metrics.jsonl"):
        with pytest.raises(UserError, match=r"no metrics\.jsonl there; give the folder of a run"):
            read_history(missing)
    with pytest.raises(UserError, match=rf"{tmp_path}/deep: no .* such as {tmp_path}/deep/er/run$"):
        read_history(tmp_path / "deep")


def test_runs_of_equal_name_get_unique_names(tmp_path, monkeypatch):
    folders = [write(tmp_path / name, {"step": 1}) for name in ("a/x/run", "b/x/run", "a/other", "c/y/run")]
    # the same folder again, however it is written, is no other run
    monkeypatch.chdir(folders[2])
    found = read_histories([*folders, tmp_path / "a" / ".." / "a" / "other", "."])
    assert [run.name for run in found] == ["a/x/run", "b/x/run", "other", "y/run"]
    assert read_history(".").name == "other"
    assert read_history(".", "mine").name == "mine"
