"""`python -m hrm.evaluate`: training's own numbers, parts of a set, files it writes, and its refusals."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train
from hrm import evaluate
from hrm.checkpoint.load_model import load_trained
from hrm.common.errors import UserError
from hrm.common.files import new_file
from hrm.config.schema import ArchConfig
from hrm.data.arc.build import write_arc
from hrm.data.arc.files import read_source
from hrm.data.dataset import PuzzleDataset
from hrm.data.format import IGNORE_LABEL, Metadata, PuzzleSet
from hrm.data.sudoku.solver import solutions
from hrm.data.writer import Shape, new_dataset
from hrm.engine.inference import Answers, EarlyExit, Inference
from hrm.engine.modes import EAGER
from hrm.evaluation.metrics import Scores, Voting, degrees, difficulty, taken_of
from tests.support.arc_tasks import random_task, write_tasks
from tests.support.paths import ROOT
from tests.support.runs import words
from tests.support.trained_runs import make_config, make_run

OURS = ("accuracy", "count", "exact_accuracy", "lm_loss", "q_halt_accuracy", "q_halt_loss", "steps")

TINY = {"hidden_size": 16, "num_heads": 2, "H_cycles": 1, "L_cycles": 1}


def run_evaluate(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = evaluate.main([*argv, "device=cpu", "mode=eager"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def numbers(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    status, out, err = run_evaluate(capsys, *argv, "--json")
    assert status == 0, err
    results: dict[str, Any] = json.loads(out)
    return results


@pytest.fixture(scope="module")
def runs(tiny_sudoku: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A short run of each architecture, with averaged weights; 20 test puzzles in batches of 8."""
    out = tmp_path_factory.mktemp("runs")
    for arch in ("v1", "gated"):
        short = ["epochs=2", "eval_interval=1", "ema=true", "ema_rate=0.9", f"run_name={arch}"]
        assert train.main(["--arch", arch, *words(tiny_sudoku, out, *short)]) == 0
    return {arch: out / tiny_sudoku.name / arch for arch in ("v1", "gated")}


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, np.ndarray]:
    """A data set with difficulty, a run of random weights on it, and the difficulty of its 50 examples."""
    folder = tmp_path_factory.mktemp("rated")
    rng = np.random.default_rng(0)
    inputs = rng.integers(1, 6, (50, 16)).astype(np.uint8)
    labels = np.where(rng.random((50, 16)) < 0.2, 0, rng.integers(1, 6, (50, 16))).astype(np.uint8)
    # Of some examples nothing is known.
    labels[[4, 9]] = 0
    hard = np.repeat([3, 0, 7, 12, 12], 10)
    part = PuzzleSet(
        inputs=inputs,
        labels=labels,
        puzzle_identifiers=np.arange(50, dtype=np.int32) % 3,
        puzzle_indices=np.arange(51, dtype=np.int32),
        group_indices=np.arange(51, dtype=np.int32),
    )
    with new_dataset(folder / "data") as writer:
        for split in ("train", "test"):
            writer.split(split, Shape(seq_len=16, vocab_size=6)).add("all", part, hard)
        writer.close(["a", "b", "c"])
    metadata = Metadata(0, 0, 0, 6, 16, 3, 50, 1.0, ["all"])
    config = make_config(TINY, data_path=str(folder / "data"), global_batch_size=16)
    make_run(folder / "run", config, metadata)
    return folder / "data", folder / "run", hard


@pytest.mark.parametrize("arch", ["v1", "gated"])
@pytest.mark.parametrize("ema", [False, True])
def test_evaluation_equals_logged_metrics(arch, ema, runs, capsys):
    for line in map(json.loads, (runs[arch] / "metrics.jsonl").read_text().splitlines()):
        prefix = f"eval{'_ema' * ema}/all/"
        logged = {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)}
        if logged:
            assert sorted(logged) == sorted(OURS)
            path = runs[arch] / f"step_{line['step']}"
            found = numbers(capsys, f"checkpoint={path}", f"ema={str(ema).lower()}")["all"]
            assert {key: found[key] for key in logged} == pytest.approx(logged, rel=1e-6, abs=1e-7)
    assert logged["count"] == 20


def test_other_batches_give_the_same(rated, capsys):
    _, run, _ = rated
    whole = numbers(capsys, f"checkpoint={run}")["all"]
    assert whole["count"] == 48 and whole["steps"] == 3 and 0 < whole["accuracy"] < 1
    other = numbers(capsys, f"checkpoint={run}", "batch_size=7")["all"]
    # Only q_halt_loss knows what fills up the last batch.
    for name in ("count", "accuracy", "exact_accuracy", "q_halt_accuracy", "lm_loss", "steps"):
        assert other[name] == pytest.approx(whole[name], rel=1e-5), name
    assert other["difficulty"] == whole["difficulty"]


def test_degrees_of_difficulty(rated, capsys, tmp_path):
    data, run, hard = rated
    saved = tmp_path / "all.npz"
    found = numbers(capsys, f"checkpoint={run}", f"save_predictions={saved}")["all"]
    labels, predictions = np.load(data / "test" / "all__labels.npy"), np.load(saved)["all__predictions"]
    expected = {}
    for label, chosen in (("0", hard == 0), ("3", hard == 3), ("7", hard == 7), ("12", hard == 12)):
        asked = chosen & (labels > 0).any(axis=1)
        shares = [np.mean((p == y)[y > 0]) for p, y in zip(predictions[asked], labels[asked], strict=True)]
        expected[label] = {"count": int(asked.sum()), "accuracy": np.mean(shares)}
    assert list(found["difficulty"]) == list(expected)
    for label, values in expected.items():
        assert {k: found["difficulty"][label][k] for k in values} == pytest.approx(values, rel=1e-6)
    status, out, _ = run_evaluate(capsys, f"checkpoint={run}")
    assert status == 0 and out.count("  difficulty") == 4
    row = next(line.split() for line in out.splitlines() if line.startswith("  difficulty 12"))
    assert row[:3] == ["difficulty", "12", "20"] and row[5] == f"{100 * expected['12']['accuracy']:.2f}"


def test_degrees_hold_about_as_many_each():
    values = np.random.default_rng(0).integers(0, 100, 1000)
    found = dict(degrees(values))
    assert [len(chosen) for chosen in found.values()] == pytest.approx([200] * 5, abs=20)
    assert np.array_equal(np.sort(np.concatenate(list(found.values()))), np.arange(1000))
    for label, chosen in found.items():
        assert label == f"{values[chosen].min()} to {values[chosen].max()}"
    # Equal values stay together, and one degree is none.
    assert {label: len(chosen) for label, chosen in degrees(np.array([0] * 90 + [5] * 10))} == {
        "0": 90,
        "5": 10,
    }
    assert dict(degrees(np.full(10, 4))) == {} == dict(degrees(np.zeros(0)))


def test_the_solver_rates_unrated_sudoku(tiny_sudoku, monkeypatch):
    dataset = PuzzleDataset(tiny_sudoku, "test")
    monkeypatch.setattr("hrm.evaluation.metrics.read_difficulty", lambda *_: None)
    taken = np.array([1, 4, 6, 19])
    values, places = difficulty(dataset, "all", taken)
    grids = dataset.sets["all"].inputs[taken] - 1
    assert values.tolist() == [solutions(grid)[1] for grid in grids] and places.tolist() == [0, 1, 2, 3]
    monkeypatch.setattr("hrm.evaluation.metrics.RATED", 3)
    values, places = difficulty(dataset, "all", taken)
    assert len(places) == 3 and values.tolist() == [solutions(grids[place])[1] for place in places]


def test_a_fixed_part(rated, capsys, tmp_path):
    data, run, hard = rated
    part, again, other = (tmp_path / f"{name}.npz" for name in ("part", "again", "other"))
    for file, seed in ((part, 1), (again, 1), (other, 2)):
        argv = [f"checkpoint={run}", "samples=10", f"seed={seed}", f"save_predictions={file}"]
        numbers(capsys, *argv)
    held, same, different = np.load(part), np.load(again), np.load(other)
    examples = held["all__examples"]
    assert np.array_equal(difficulty(PuzzleDataset(data, "test"), "all", examples)[0], hard[examples])
    assert len(examples) == 10 and np.array_equal(examples, same["all__examples"])
    assert not np.array_equal(examples, different["all__examples"])
    numbers(capsys, f"checkpoint={run}", f"save_predictions={other}", f"data_path={data}")
    whole = np.load(other)
    for name in ("predictions", "q_halt", "steps", "puzzle_identifiers"):
        of_part, of_all = held[f"all__{name}"], whole[f"all__{name}"][examples]
        np.testing.assert_allclose(of_part, of_all, rtol=1e-5, atol=1e-6)
    assert np.array_equal(whole["all__puzzle_identifiers"], np.arange(50) % 3)
    assert whole["all__predictions"].dtype == np.uint8


def test_another_depth(rated, capsys, tmp_path):
    data, run, _ = rated
    saved = tmp_path / "deep.npz"
    found = numbers(capsys, f"checkpoint={run}", "halt_max_steps=6", f"save_predictions={saved}")["all"]
    assert found["steps"] == 6
    dataset = PuzzleDataset(data, "test")
    trained = load_trained(run, device="cpu", metadata=dataset.metadata)
    trained.model.arch = ArchConfig(**{**vars(trained.model.arch), "halt_max_steps": 6})
    part = dataset.sets["all"]
    solver = Inference(trained.model, 50, 16, mode=EAGER, loss=trained.config.loss)
    expected, q_halt = solver.solve(part.inputs.astype(np.int32), part.puzzle_identifiers.astype(np.int32))
    held = np.load(saved)
    assert np.array_equal(held["all__predictions"], expected)
    np.testing.assert_allclose(held["all__q_halt"], q_halt, rtol=1e-5, atol=1e-6)


def test_halting_by_choice_beside_the_full_steps(rated, capsys):
    data, run, _ = rated
    found = numbers(capsys, f"checkpoint={run}", "eval_act=true", "halt_max_steps=6", "batch_size=7")["all"]
    early = found["eval_act"]
    dataset = PuzzleDataset(data, "test")
    trained = load_trained(run, device="cpu", metadata=dataset.metadata)
    trained.model.arch = ArchConfig(**{**vars(trained.model.arch), "halt_max_steps": 6})
    scores = Scores(50)
    source = [(batch, count) for _, batch, count in evaluate_batches(dataset)]
    for answers in EarlyExit(trained.model, 10, 16, mode=EAGER).answers(source):
        scores.add(answers)
    assert early["steps_histogram"] == scores.histogram(6) and sum(early["steps_histogram"]) == 48
    assert len(np.flatnonzero(early["steps_histogram"])) > 1
    mean = np.dot(early["steps_histogram"], np.arange(1, 7)) / 48
    assert early["steps"] == pytest.approx(mean) and early["steps_saved"] == pytest.approx(1 - mean / 6)
    assert early["accuracy"] == pytest.approx(scores.metrics()["accuracy"]) != found["accuracy"]
    status, out, _ = run_evaluate(capsys, f"checkpoint={run}", "eval_act=true", "halt_max_steps=6")
    assert status == 0 and f"eval_act: {100 * early['steps_saved']:.1f} % of the steps saved" in out


def evaluate_batches(dataset: PuzzleDataset) -> Any:
    from hrm.data.dataset import test_batches as batches

    return batches(dataset, global_batch_size=10)


def test_scores_count_as_the_loss_does():
    labels = np.array([[1, 2, IGNORE_LABEL], [1, 2, 3], [IGNORE_LABEL] * 3])
    predictions = np.array([[1, 2, 9], [1, 9, 9], [1, 2, 3]])
    scores = Scores(4)
    steps = np.array([3, 5, 16])
    scores.add(Answers(np.array([2, 0, 3]), labels, predictions, np.array([0.0, 0.5, -1]), steps))
    assert scores.metrics() == pytest.approx(
        {"count": 2, "exact_accuracy": 0.5, "accuracy": (1 + 1 / 3) / 2, "q_halt_accuracy": 0.5, "steps": 4}
    )
    assert scores.metrics(np.array([2, 3]))["steps"] == 3
    assert scores.metrics(np.array([1, 3])) == {"count": 0}
    assert scores.histogram(5) == [0, 0, 1, 0, 1]


# --- ARC


@pytest.fixture(scope="module")
def arc(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small ARC data set of two evaluation tasks with three augmentations, and a run on it."""
    folder = tmp_path_factory.mktemp("arc")
    tasks = {"one": random_task(1, largest=5), "two": random_task(2, test=2, largest=5)}
    write_tasks(folder / "source" / "evaluation", tasks)
    write_tasks(folder / "source" / "training", {"three": random_task(3, largest=5)})
    write_arc(folder / "data", list(read_source(str(folder / "source"))), num_aug=3, seed=0)
    metadata = PuzzleDataset(folder / "data", "test").metadata
    config = make_config({**TINY, "halt_max_steps": 1}, data_path=str(folder / "data"))
    make_run(folder / "run", config, metadata)
    return folder / "data", folder / "run"


def test_votes_of_right_answers_and_of_wrong_ones(arc):
    dataset = PuzzleDataset(arc[0], "test")
    taken = taken_of(dataset)
    labels = dataset.sets["all"].labels.astype(np.int32)
    assert len(labels) == 12
    places = np.arange(12)
    sure = np.linspace(-200, 200, 12)
    right = Voting(dataset, taken)
    right("all", Answers(places, labels, labels, sure, places))
    assert right.metrics()["pass_at"] == dict.fromkeys(("1", "2", "5", "10", "100", "1000"), 1.0)
    # The first task's test is missed by all, of the second one test of two.
    wrong = labels.copy()
    wrong[:8, 0] = 13 - wrong[:8, 0]
    missed = Voting(dataset, taken)
    missed("all", Answers(places[::-1], labels[::-1], wrong[::-1], sure, places))
    metrics = missed.metrics()
    order = [len(tests) for tests in missed._votes.tests.values()]
    assert order in ([1, 2], [2, 1])
    assert metrics["pass_at"]["2"] in (0.25, 0.5) and metrics["pass_at_whole_tasks"]["2"] in (0.0, 0.5)


def test_arc_is_judged_by_votes(arc, capsys, tmp_path):
    data, run = arc
    file = tmp_path / "submission.json"
    found = numbers(capsys, f"checkpoint={run}", f"submission={file}")["all"]
    assert found["count"] == 12 and found["pass_at"]["2"] == 0.0
    attempts = json.loads(file.read_text())
    assert {task: len(tests) for task, tests in attempts.items()} == {"one": 1, "two": 2}
    assert attempts["one"][0].keys() == {"attempt_1", "attempt_2"}
    status, out, _ = run_evaluate(capsys, f"checkpoint={run}", "samples=3")
    assert status == 0 and "solved by vote of the augmentations: 0.00 % with 1, 0.00 % with 2" in out
    (data / "identifiers.json").rename(data / "elsewhere.json")
    try:
        status, out, _ = run_evaluate(capsys, f"checkpoint={run}", "samples=3")
        assert status == 0 and "no votes over the augmentations: " in out
        status, _, err = run_evaluate(capsys, f"checkpoint={run}", f"submission={file}")
        assert status == 2 and "identifiers.json: no such file" in err
    finally:
        (data / "elsewhere.json").rename(data / "identifiers.json")


# --- files and refusals


def test_a_file_is_written_atomically(tmp_path):
    with new_file(tmp_path / "a.npz") as file:
        file.write_text("new")
        assert not (tmp_path / "a.npz").exists()
    assert (tmp_path / "a.npz").read_text() == "new"
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "a.npz") as file:
        file.write_text("half")
        raise KeyboardInterrupt
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.npz", "new")]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "checkpoint is not given: write checkpoint=PATH"),
        (["gated"], "gated: write key=value, such as checkpoint=gated"),
        (["checkpoint={run}", "split=dev"], "dev: no such folder, expected a data set's dev split"),
        (["checkpoint={run}", "data_path=nowhere"], "nowhere: no such data set; give data_path=DIR"),
        (["checkpoint={run}/none"], "does not exist"),
        (["checkpoint={run}", "ema=true"], "has no averaged weights"),
        (["checkpoint={run}", "ema=maybe"], "ema=maybe is not allowed: give true or false"),
        (["checkpoint={run}", "emma=true"], "unknown key emma: did you mean ema?"),
        (["checkpoint={run}", "--arch", "v1"], "unknown flag --arch: the flags are --json, --help"),
        (["checkpoint={run}", "samples=0"], "samples=0 is not allowed: give a whole number"),
        (["checkpoint={run}", "submission=out.json"], "is not an ARC data set; leave it out"),
        (["checkpoint={run}", "submission={run}"], "cannot be written; give a file in a folder that exists"),
        (["checkpoint={run}", "save_predictions=no/p.npz"], "cannot be written; give a file in a folder"),
        (["checkpoint={run}", "data_path={sudoku}"], "table of 3 rows, but 1 are needed here"),
        (["checkpoint={run}", "data_path={arc}"], "vocab_size 6, but the data has 12"),
    ],
)
def test_refusals(argv, message, rated, tiny_sudoku, arc, capsys):
    words = [word.format(run=rated[1], sudoku=tiny_sudoku, arc=arc[0]) for word in argv]
    status, out, err = run_evaluate(capsys, *words)
    assert status == 2 and message in err and err.count("\n") == 1 and "Traceback" not in err
    # The warning of a checkpoint without names, and what is evaluated.
    assert out.count("\n") <= 2


def test_another_puzzle_table_starts_fresh(rated, tiny_sudoku, capsys):
    argv = [f"checkpoint={rated[1]}", f"data_path={tiny_sudoku}", "reset_puzzle_emb=true"]
    status, out, _ = run_evaluate(capsys, *argv)
    assert status == 0 and "the table starts fresh" in out and "20" in out


def test_too_large_a_batch(rated, monkeypatch, capsys):
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    # Found out while it judges, not before.
    monkeypatch.setattr("hrm.engine.memory_estimate.check_inference", lambda *_, **__: None)
    monkeypatch.setattr("hrm.evaluation.metrics.answers_in_order", full)
    status, _, err = run_evaluate(capsys, f"checkpoint={rated[1]}")
    assert status == 2 and "batch_size=16 needs about" in err and "batch_size=8 would fit" in err
    monkeypatch.setattr(
        "hrm.evaluation.metrics.answers_in_order", lambda *_: (_ for _ in ()).throw(RuntimeError("ours"))
    )
    with pytest.raises(RuntimeError, match="ours"):
        run_evaluate(capsys, f"checkpoint={rated[1]}")
    assert issubclass(UserError, Exception)


def test_help_and_mistakes_need_no_torch():
    code = (
        "import sys; from hrm.evaluate import main\n"
        "assert main(['checkpoint=x', 'sampels=3']) == 2\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "did you mean samples?" in result.stderr
    for name in evaluate.KEYS:
        assert f"\n  {name}=" in result.stdout
