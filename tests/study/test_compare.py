"""Comparisons: what the numbers say, what is refused, and runs that are cut off, lost, or fail."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from hrm import compare
from hrm.common.threads import usable_cpus
from hrm.study import comparison
from hrm.study import runs as campaigns
from hrm.study.history import History, read_history
from hrm.study.results import cautions, compare_runs, first_reaching, score_at, tables
from hrm.study.runs import Campaign, slots
from hrm.training.run_folder import run_lock
from tests.support.forked import start
from tests.support.studies import STAND_IN, TINY, history, started

# --- what the numbers say


def test_scores_between_evaluations_are_on_straight_lines():
    series = (np.array([10, 20, 40]), np.array([0.0, 0.5, 0.1]))
    assert [score_at(series, x) for x in (10, 15, 20, 30, 40)] == pytest.approx([0, 0.25, 0.5, 0.3, 0.1])
    assert np.isnan(score_at(series, 9)) and np.isnan(score_at(series, 41))
    assert first_reaching(series, 0.1) == pytest.approx(12)
    assert first_reaching(series, 0.5) == 20 and first_reaching(series, 0.0) == 10
    assert np.isnan(first_reaching(series, 0.51))


def test_equal_steps_are_the_last_that_every_run_reached():
    results = compare_runs(
        {
            "v1": {0: history({10: 0.2, 20: 0.6}), 1: history({10: 0.1, 20: 0.4})},
            "gated": {0: history({10: 0.5, 20: 0.8, 30: 1}), 1: history({10: 0.3, 20: 0.5, 30: 1})},
        },
        "v1",
    )
    assert results["equal_steps"] == 20
    v1, gated = (results["entries"][name]["equal_steps"]["exact_accuracy"] for name in ("v1", "gated"))
    assert v1["scores"] == {"0": 0.6, "1": 0.4} and v1["mean"] == pytest.approx(0.5)
    assert v1["deviation"] == pytest.approx(0.2 / 2**0.5) and v1["difference"] is None
    # 0.2 and 0.1: mean 0.15, margin 12.7062 * 0.05.
    assert gated["difference"]["mean"] == pytest.approx(0.15)
    assert gated["difference"]["interval"] == pytest.approx([0.15 - 0.63531, 0.15 + 0.63531], abs=1e-5)
    assert not gated["difference"]["clear"]
    text = tables(results)[0].text()
    assert "+15.0 [-48.5, +78.5], no clear difference" in text and "65.0 % ± 21.2" in text


def test_equal_time_is_that_of_the_run_that_took_least():
    # The slow one needs 2 s a step: within the fast one's 20 s it does 10 steps of its 20.
    results = compare_runs(
        {"fast": {0: history({10: 0.2, 20: 0.6})}, "slow": {0: history({8: 0.1, 16: 0.5, 20: 0.9}, pace=2)}},
        "fast",
    )
    assert results["equal_seconds"] == pytest.approx(20)
    slow = results["entries"]["slow"]["equal_time"]
    assert slow["steps"]["mean"] == pytest.approx(10)
    assert slow["exact_accuracy"]["mean"] == pytest.approx(0.2)
    assert slow["exact_accuracy"]["difference"]["mean"] == pytest.approx(-0.4)
    assert results["entries"]["slow"]["equal_steps"]["exact_accuracy"]["difference"]["mean"] == pytest.approx(
        0.3
    )
    _, at_time, pace, *_ = (table.text() for table in tables(results))
    assert "20 s" in at_time and "-40.0 (one seed)" in at_time
    assert "2.00" in pace and "2 s" in pace


def test_a_run_that_was_not_tested_by_then_has_no_score_at_that_time():
    results = compare_runs({"fast": {0: history({10: 0.2})}, "slow": {0: history({10: 0.3}, pace=3)}}, "fast")
    entry = results["entries"]["slow"]["equal_time"]["exact_accuracy"]
    assert entry["scores"] == {"0": None} and entry["mean"] is None and entry["difference"] is None


def test_steps_and_time_to_shares_of_the_baselines_last_score():
    # Half of 0.8 is 0.4: the baseline is there after 20 and 30 steps, the other one after 16 and never.
    results = compare_runs(
        {
            "v1": {0: history({20: 0.4, 40: 0.8}), 1: history({20: 0.0, 40: 0.8})},
            "gated": {0: history({16: 0.4, 40: 0.8}, pace=2), 1: history({20: 0.1, 40: 0.2}, pace=2)},
        },
        "v1",
    )
    assert results["aims"] == pytest.approx({"half": 0.4, "90 %": 0.72})
    v1, gated = (results["entries"][name]["reached"]["half"] for name in ("v1", "gated"))
    assert v1["steps"]["scores"] == {"0": 20, "1": 30}
    assert gated["steps"]["scores"] == {"0": 16, "1": None} and gated["seconds"]["scores"]["0"] == 32
    assert gated["steps"]["difference"]["mean"] == -4 and gated["seconds"]["difference"]["mean"] == 12
    row = next(table for table in tables(results) if "40.0 %" in table.title).rows[1]
    # In percent of the baseline's mean, 25.
    assert row == ["gated", "1 of 2", "16", "-16.0 % (one seed)", "32 s", "+48.0 % (one seed)"]


def test_averaged_weights_are_compared_with_averaged_weights():
    runs = {"v1": {0: history({10: 0.2})}, "trm": {0: history({10: 0.5}, ema={10: 0.7})}}
    results = compare_runs(runs, "v1")
    ema = results["entries"]["trm (EMA)"]["equal_steps"]["exact_accuracy"]
    assert list(results["entries"]) == ["v1", "trm", "trm (EMA)"] and ema["mean"] == 0.7
    assert ema["difference"]["mean"] == pytest.approx(0.5)
    runs["v1"] = {0: history({10: 0.2}, ema={10: 0.6})}
    entries = compare_runs(runs, "v1")["entries"]
    assert entries["trm (EMA)"]["equal_steps"]["exact_accuracy"]["difference"]["mean"] == pytest.approx(0.1)
    assert entries["v1 (EMA)"]["equal_steps"]["exact_accuracy"]["difference"]["mean"] == pytest.approx(0.4)
    assert any("moving average" in note for note in cautions(results))


def test_sizes_and_act_steps_are_reported():
    more = {"model/parameters": {0: 1234567}, "train/steps": {5: 4.0, 10: 3.5, 15: np.nan, 30: 1.0}}
    results = compare_runs({"v1": {0: history({20: 0.5}, **more)}, "b": {0: history({20: 0.5})}}, "v1")
    assert results["entries"]["v1"]["parameters"] == 1234567
    assert results["entries"]["v1"]["act_steps"]["mean"] == 3.5
    assert any("1,234,567" in table.text() for table in tables(results))


def test_the_report_notes_limits_of_the_data():
    def said(**candidates: dict[int, History]) -> str:
        return " ".join(cautions(compare_runs(candidates, next(iter(candidates)))))

    two = {seed: history({10: 0.5}) for seed in (0, 1)}
    assert said(v1=two, gated=two) == ""
    assert "With one seed" in said(v1={0: two[0]}, gated={0: two[0]})
    assert "2 comparisons" in said(v1=two, gated=two, feudal=two)
    assert "solves no test puzzle" in said(v1={s: history({10: 0.0}) for s in two}, gated=two)
    # A candidate without a finished run has no score, and its table still stands.
    results = compare_runs({"v1": two, "gated": {}}, "v1")
    assert results["entries"]["gated"]["equal_steps"]["exact_accuracy"]["mean"] is None
    assert all(table.text() for table in tables(results)) and all(
        map(len, tables(compare_runs({"v1": {}}, "v1"))[0].rows)
    )


# --- what is refused


def run_main(*argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = compare.main(list(argv))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_mistakes_are_reported_in_one_line_before_files_are_written(
    tiny_sudoku, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    data = f"data_path={tiny_sudoku}"
    saved = tmp_path / "saved.yaml"
    saved.write_text(f"arch:\n  halt_max_steps: 3\nepochs: 7\neval_interval: 1\ndata_path: {tiny_sudoku}\n")

    def refused(*argv: str, parts: tuple[str, ...]) -> None:
        status, out, err = run_main(*argv, capsys=capsys)
        assert status == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
        for part in parts:
            assert part in err
        assert [path.name for path in tmp_path.iterdir()] == ["saved.yaml"]

    refused("v1", parts=("two candidates",))
    refused("v1", "hrm_v1", parts=("hrm_v1", "given twice"))
    refused("v1", "gated", "seed=1", parts=("seed", "--seeds"))
    refused("v1", "gated", "run_name=x", parts=("run_name", "leave it out"))
    refused("v1", "gated", "output_dir=x", parts=("output_dir", "--output"))
    refused("v1", "gated", "resume=none", parts=("resume", "same command"))
    refused("v1", "gatd", parts=("gatd", "gated"))
    refused("v1", "gated", "lrr=1", parts=("lrr",))
    refused("v1", "nowhere.yaml", parts=("nowhere.yaml", "cannot read"))
    refused("v1", "gated", "--seeds", "0", parts=("--seeds 0",))
    refused("v1", "gated", "--seeds", "1,1", parts=("--seeds 1,1",))
    refused("v1", "gated", "--seeds", "99999999999", parts=("--seeds",))
    refused("v1", "gated", "--jobs", "0", parts=("--jobs 0",))
    refused("v1", "gated", "--baseline", "v2", parts=("--baseline v2", "v1, gated"))
    refused("v1", "gated", "arch.use_gating=true", parts=("v1 and gated are the same",))
    refused("v1", str(saved), data, "global_batch_size=8", parts=("epochs is 100000 for v1 and 7 for saved",))
    saved.write_text("sudoku:\n  size: 9\n")
    refused("v1", str(saved), "preset=quick", parts=("sudoku.size is 4 for v1 and 9 for saved",))


def test_candidates_differ_by_their_keys(tmp_path):
    architecture, bare = tmp_path / "mine.yaml", tmp_path / "bare.yaml"
    architecture.write_text("defaults: [gated]\nhalt_max_steps: 3\n")
    bare.write_text("hidden_size: 64\n")
    run = tmp_path / "long-run"
    run.mkdir()
    (run / "config.yaml").write_text("arch:\n  halt_max_steps: 3\n")
    (tmp_path / "other.yaml").write_text("lr: 0.1\n")
    given = ["v1", "hrm_v1_gated", str(architecture), str(bare), str(run), str(tmp_path / "other.yaml")]
    assert comparison.named(given) == {
        "v1": ["--arch=v1"],
        "gated": ["--arch=gated"],
        "mine": [f"--arch={architecture}"],
        "bare": [f"--arch={bare}"],
        "long-run": [f"--config={run / 'config.yaml'}"],
        "other": [f"--config={tmp_path / 'other.yaml'}"],
    }
    # Two files of one name are two candidates.
    twin = tmp_path / "long-run" / "mine.yaml"
    twin.write_text("halt_max_steps: 4\n")
    assert list(comparison.named([str(architecture), str(twin)])) == ["mine", "mine-2"]


def test_seeds():
    assert comparison.seeds("3") == [0, 1, 2] and comparison.seeds("4,7") == [4, 7]


def test_each_gpu_gets_a_run_and_a_shared_cpu_is_divided(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("hrm.common.threads.usable_cpus", lambda: 8)
    assert slots("cpu", None) == [{}] and slots("cpu", 3) == [{"OMP_NUM_THREADS": "2"}] * 3
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert slots("auto", None) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    assert slots("cuda:1", None) == [{}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    names = [slot["CUDA_VISIBLE_DEVICES"] for slot in slots("cuda", 3)]
    assert names == ["3", "5", "3"]


# --- the runs, by a trainer that only pretends to train


@pytest.fixture
def pretend(tiny_sudoku, tmp_path, monkeypatch, capsys):
    """The command with a trainer that takes no time and a report that is not drawn."""
    trainer = tmp_path / "stand_in.py"
    trainer.write_text(STAND_IN)
    monkeypatch.setattr(campaigns, "TRAINER", trainer)
    monkeypatch.setattr(comparison, "write_report", lambda folder, *_: (folder / "page", folder / "image"))

    def run(*argv: str) -> tuple[int, str, str]:
        words = ["v1", "gated", *TINY, f"data_path={tiny_sudoku}", "--output", str(tmp_path / "out")]
        return run_main(*words, *argv, capsys=capsys)

    return run


ALL = ["v1 seed 0", "gated seed 0", "v1 seed 1", "gated seed 1"]


def test_a_comparison_without_matplotlib_does_not_train(pretend, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, error = pretend("--seeds", "2")
    assert status == 2 and "pip install -c constraints.txt -e '.[plots]'" in error
    assert started(out) == [] and not (tmp_path / "out" / "results.json").exists()


def test_seeds_take_turns_and_the_results_are_kept(pretend, tmp_path):
    status, out, _ = pretend("--seeds", "2")
    assert status == 0 and started(out) == ALL
    assert "2 candidates x 2 seeds = 4 runs of 12 steps, 1 at once" in out
    assert (
        "gated seed 1: 60.0% exact at step 12, 1 s/step; 4 of 4 runs are finished" in out and " left" in out
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["seeds"] == [0, 1] and results["missing"] == [] and results["baseline"] == "v1"
    assert results["command"].startswith("python -m hrm.compare v1 gated")
    assert results["made_by"]["versions"]["torch"] and results["made_by"]["cores"] == usable_cpus()
    gated = results["entries"]["gated"]["equal_steps"]["exact_accuracy"]
    assert gated["scores"] == pytest.approx({"0": 0.5, "1": 0.6})
    assert gated["difference"]["mean"] == pytest.approx(0.2)
    assert "arch.use_gating  false   true" in out
    # The words of a run: a configuration that is frozen, and the campaign's own.
    log = (tmp_path / "out" / "gated-seed1.log").read_text()
    assert f"--config={tmp_path / 'out' / 'gated.yaml'} seed=1 output_dir={tmp_path} project_name=out" in log
    assert "run_name=gated-seed1 resume=auto" in log
    shutil.rmtree(tmp_path / "out" / "gated-seed1")
    status, out, _ = pretend("--seeds", "2")
    assert status == 0 and started(out) == ["gated seed 1"] and "3 of the 4 runs are finished" in out
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["entries"] == results["entries"]
    status, out, _ = pretend("--seeds", "2", "--baseline", "gated")
    assert status == 0 and started(out) == [] and "4 of the 4 runs are finished" in out and "-20.0 [" in out


def test_another_plan_is_refused(pretend, tmp_path):
    assert pretend("--seeds", "1")[0] == 0
    for words, said in {
        ("--seeds", "2"): "with seeds 0 and not 0,1",
        ("--seeds", "1", "weight_decay=0.5"): "weight_decay of v1 is 0.1 and not 0.5",
        ("--seeds", "1", "feudal"): "of v1, gated and not of v1, gated, feudal",
    }.items():
        status, out, err = pretend(*words)
        assert status == 2 and said in err and "--output" in err and not started(out), err
    (tmp_path / "out" / "plan.json").write_text("{}")
    assert "plan.json is damaged" in pretend("--seeds", "1")[2]
    (tmp_path / "out" / "plan.json").unlink()
    assert "is not empty" in pretend("--seeds", "1")[2]
    with run_lock(tmp_path / "out"):
        assert "another process uses it" in pretend("--seeds", "1")[2]


def test_a_failed_run_is_shown_and_missing_and_tried_again(pretend, tmp_path):
    mark = tmp_path / "fail-v1-seed1"
    mark.touch()
    status, out, err = pretend("--seeds", "2")
    assert status == 1 and started(out) == ALL
    assert "v1 seed 1 failed with exit status 1" in err and "  error: as it was told" in err
    assert "Not finished: v1 seed 1." in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["missing"] == ["v1 seed 1"]
    gated = results["entries"]["gated"]["equal_steps"]["exact_accuracy"]
    assert gated["difference"]["n"] == 1 and gated["difference"]["interval"] is None
    mark.unlink()
    status, out, _ = pretend("--seeds", "2")
    assert status == 0 and started(out) == ["v1 seed 1"] and "Missing" not in out


def test_a_stop_ends_the_runs_and_prints_how_to_continue(pretend, tmp_path, monkeypatch):
    (tmp_path / "wait").touch()
    processes: list[subprocess.Popen] = []
    start, sleep, handler = Campaign._start, time.sleep, signal.getsignal(signal.SIGTERM)

    def spy(self, run, extra):
        processes.append((job := start(self, run, extra)).process)
        return job

    def once(seconds: float) -> None:
        monkeypatch.setattr(time, "sleep", sleep)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Campaign, "_start", spy)
    monkeypatch.setattr(time, "sleep", once)
    status, out, err = pretend("--seeds", "2", "--jobs", "2")
    assert status == 143 and "the same command continues" in err and started(out) == ALL[:2]
    assert [process.returncode for process in processes] == [-signal.SIGTERM] * 2
    assert signal.getsignal(signal.SIGTERM) == handler
    status, out, err = pretend("--seeds", "2", "--report-only")
    assert status == 2 and "no run is finished" in err and started(out) == []


def test_a_run_of_another_process_is_awaited(pretend, tmp_path):
    """What a command that was killed outright has left behind."""
    with run_lock(tmp_path / "out" / "v1-seed0"):
        # Beside the folder, so that the lock's own file is not in the way of a new campaign.
        shutil.move(tmp_path / "out" / ".v1-seed0.lock", tmp_path / "lock")
        (tmp_path / "out").rmdir()
    held = threading.Event()

    def hold() -> None:
        while not (tmp_path / "out" / "gated.yaml").exists():
            time.sleep(0.001)
        with run_lock(tmp_path / "out" / "v1-seed0"):
            held.set()
            while not (tmp_path / "out" / "gated-seed0" / "finished.json").exists():
                time.sleep(0.01)
            time.sleep(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    status, out, _ = pretend("--seeds", "1")
    thread.join()
    assert status == 0 and held.is_set() and started(out) == ["gated seed 0", "v1 seed 0"]
    assert out.count("v1 seed 0: waiting for the process that trains it") == 1


def test_parallel_runs_share_the_cpu_and_the_report_notes_it(pretend, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("hrm.common.threads.usable_cpus", lambda: 4)
    status, out, _ = pretend("--seeds", "1", "--jobs", "2")
    assert status == 0 and "Runs shared a device" in out
    assert (tmp_path / "out" / "v1-seed0.log").read_text().endswith(" 2\n")


# --- the real trainer


def test_a_killed_comparison_can_be_completed(tiny_sudoku, tmp_path):
    """kill -9 while the first run trains, then the same command."""
    out = tmp_path / "out"
    words = ["v1", "gated", *TINY, f"data_path={tiny_sudoku}", "--seeds", "1", "--output", str(out)]
    command = ["-m", "hrm.compare", *words]
    first = start(command)
    while not (out / "v1-seed0" / "metrics.jsonl").exists():
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.wait()
    assert not (out / "v1-seed0" / "finished.json").exists()

    with open(tmp_path / "said", "w") as said:
        status = start([*command, "--jobs", "2"], stdout=said).wait()
    # The first run's trainer may have outlived the command, and is then waited for.
    assert status == 0 and sorted(started((tmp_path / "said").read_text())) == sorted(ALL[:2])
    results = json.loads((out / "results.json").read_text())
    assert results["equal_steps"] == 12 and results["missing"] == []
    for name, entry in results["entries"].items():
        run = read_history(out / f"{name}-seed0")
        for metric in ("exact_accuracy", "accuracy", "q_halt_accuracy"):
            assert entry["equal_steps"][metric]["scores"] == {"0": run.evaluation(metric)[1][-1]}
        assert entry["seconds_per_step"]["scores"] == {"0": run.seconds_per_step}
        assert run.config is not None and run.config["seed"] == 0
        assert run.config["arch"]["use_gating"] == (name == "gated")
    assert "<svg" in (out / "report.html").read_text() and (out / "report.png").stat().st_size > 10_000
