"""Many paths of each puzzle: views and the way back, path 0 as alone, early halting, options refused."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hrm import evaluate
from hrm.config.schema import SubgoalConfig
from hrm.data.arc.augment import canvas
from hrm.data.dataset import PuzzleDataset
from hrm.data.format import PuzzleSet
from hrm.data.inspect.rules import broken
from hrm.data.puzzle_kinds import Kind
from hrm.data.writer import Shape, new_dataset
from hrm.engine.inference import Ends
from hrm.evaluation.paths import group_size
from hrm.evaluation.race import RULED, Judge, Race, compared
from hrm.evaluation.selection import RULES
from hrm.evaluation.views import ArcViews, Plain, Views, views_for
from tests.support.trained_runs import as_official, make_config, make_run

PATHS = 5
ARCHS: dict[str, dict[str, Any]] = {
    "v1": {},
    "gated": {"use_gating": True},
    "feudal": {"subgoal_head": SubgoalConfig(enabled=True, manager_period=2, goal_dim=8)},
    "trm": {"share_levels": True, "gradient": "last_cycle", "q_continue": False},
}


@pytest.fixture(scope="module")
def runs(tiny_sudoku: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each architecture with random weights, on Sudokus of which one cell has a label."""
    folder, given = tmp_path_factory.mktemp("paths"), PuzzleDataset(tiny_sudoku, "test").sets["all"]
    count = len(given.inputs)
    labelled = np.arange(16) == np.arange(count)[:, None] % 16
    labels = np.where(labelled, given.labels, 0).astype(np.uint8)
    one = np.arange(count + 1, dtype=np.int32)
    part = PuzzleSet(np.asarray(given.inputs), labels, np.zeros(count, np.int32), one, one)
    with new_dataset(folder / "data") as writer:
        for split in ("train", "test"):
            writer.split(split, Shape(16, 6, kind="sudoku")).add("all", part, np.arange(count) % 2)
        writer.close(["blank"])
    metadata = PuzzleDataset(folder / "data", "test").metadata
    for name, arch in ARCHS.items():
        config = make_config(arch, data_path=str(folder / "data"), global_batch_size=16)
        make_run(folder / name, config, metadata)
    return {name: folder / name for name in ARCHS}


@pytest.fixture
def run(runs: dict[str, Path]) -> Path:
    return runs["v1"]


def numbers(capsys: pytest.CaptureFixture[str], run: Path, *argv: str, mode: str = "eager") -> dict[str, Any]:
    assert evaluate.main([f"checkpoint={run}", "device=cpu", f"mode={mode}", *argv, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["all"]
    return found


def maze() -> tuple[np.ndarray, np.ndarray]:
    """A maze of 3 x 4 cells and its answer."""
    return np.array([4, 2, 2, 1, 1, 1, 2, 1, 3, 2, 2, 2]), np.array([4, 5, 5, 1, 1, 1, 5, 1, 3, 5, 5, 2])


@pytest.mark.parametrize("name", RULED)
def test_a_view_keeps_the_rules_and_maps_answers_back(name, tiny_sudoku):
    if name == "sudoku":
        kind, part = Kind("sudoku", 4, 4, 6), PuzzleDataset(tiny_sudoku, "test").sets["all"]
        question, answer = (np.asarray(array[3], np.int32) for array in (part.inputs, part.labels))
    else:
        kind, (question, answer) = Kind("maze", 3, 4, 6), maze()
    view = views_for(kind, 1, None).of(question, 7, 2, 20)
    assert np.array_equal(view.inputs[0], question) and view.identifiers.tolist() == [7] * 20
    assert len(np.unique(view.inputs, axis=0)) == (20 if name == "sudoku" else 4)
    # The same view of the answer solves the view of the question.
    seen = views_for(kind, 1, None).of(answer, 7, 2, 20).inputs
    assert not broken(kind, view.inputs, seen).any()
    assert (view.answers(seen, np.arange(20)) == answer).all()
    assert np.array_equal(view.answers(seen[[4, 9]], np.array([4, 9])), np.stack([answer, answer]))
    fewer = views_for(kind, 1, None).of(question, 7, 2, 6)
    assert np.array_equal(fewer.inputs, view.inputs[:6])
    for views, example in ((views_for(kind, 2, None), 2), (views_for(kind, 1, None), 3)):
        assert not np.array_equal(views.of(question, 7, example, 20).inputs, view.inputs)


@pytest.mark.parametrize("named", [False, True])
def test_arc_views(named):
    names = ["u", "t", "t_t3_0213456789", "t_t6_0987654321", "u_t1_0123456798"]
    grid = np.array([[1, 2, 3], [0, 5, 9]], np.uint8)
    views: Views = ArcViews(0, names if named else None)
    view = views.of(canvas(grid), 1, 0, 30)
    assert np.array_equal(view.inputs[0], canvas(grid))
    assert (view.answers(view.inputs, np.arange(30)) == canvas(grid)).all()
    different = len(np.unique(view.inputs, axis=0))
    if named:
        assert set(view.identifiers.tolist()) == {1, 2, 3} and different == 3
        # Turn 3 is a quarter turn to the right; colours 1 and 2 change places.
        turned = np.array([[0, 2], [5, 1], [9, 3]], np.uint8)
        assert (view.inputs[view.identifiers == 2] == canvas(turned)).all()
        # An augmented puzzle sees the others of its task too, and answers as itself.
        other = views.of(canvas(turned), 2, 0, 30)
        assert (other.inputs[other.identifiers == 1] == canvas(grid)).all()
        assert (other.answers(other.inputs, np.arange(30)) == canvas(turned)).all()
    else:
        assert set(view.identifiers.tolist()) == {1} and different > 20
    empty = np.zeros(900, np.uint8)
    assert (views.of(empty, 1, 0, 4).inputs == 0).all()


def test_arc_votes_compare_only_grids():
    """Tokens outside the grid differ by chance; two of three equal grids decide a vote."""
    kind, grid = Kind("arc", 4, 4, 12), np.array([[3, 0]], np.uint8)
    boards = np.stack([canvas(grid, side=4)] * 3).astype(np.int32)
    boards[0, -1], boards[1, -2] = 5, 7
    question = canvas(grid, side=4)
    race = Race("vote", Judge(kind), Plain(question, 0, 3), question, boards[2])
    for path in range(2):
        assert race.goes_on(path, 0)
        none = np.zeros(1, np.int32)
        race.end(path, Ends(none, none, boards[[path]], none, none + 1, none + 1, none), 0)
    assert not race.goes_on(2, 0) and race.open == 0
    assert (compared(kind, boards) == boards[2]).all()
    assert not compared(kind, np.ones((1, 16), np.int32)).any()
    assert compared(Kind("sudoku", 4, 4, 6), boards) is boards


def test_groups_fill_their_batches():
    assert group_size(768, 64) == 12 and group_size(8, 3) == 8 and group_size(4, 64) == 1
    for batch_size, paths in ((767, 64), (5, 4096), (20, 16)):
        rows = group_size(batch_size, paths) * paths
        assert -(-rows // batch_size) * batch_size <= rows * 1.07 or rows >= 15 * batch_size


@pytest.mark.parametrize("arch", ARCHS)
def test_path_0_is_the_evaluation_of_one_path(arch, runs, capsys, tmp_path):
    run = runs[arch]
    files = [tmp_path / f"{name}.npz" for name in ("one", "many")]
    one = numbers(capsys, run, "batch_size=20", f"save_predictions={files[0]}")
    assert numbers(capsys, run, "batch_size=20", "paths=1") | {"seconds": 0} == one | {"seconds": 0}
    depth = one["steps"]
    same = numbers(capsys, run, "batch_size=20", f"depths={depth:.0f}", f"save_predictions={files[1]}")
    for name in ("count", "exact_accuracy", "accuracy", "q_halt_accuracy", "steps", "difficulty"):
        assert same[name] == one[name], name
    expected, found = (np.load(file) for file in files)
    for name in expected.files:
        assert np.array_equal(expected[name], found[name]), name
    many = numbers(capsys, run, f"paths={PATHS}", "by=symmetry")["paths"]["rules"]
    exact = one["exact_accuracy"]
    assert {rule: part["1"]["mean"] for rule, part in many.items()} == dict.fromkeys(RULES, exact)
    assert 0 < exact < many["oracle"][str(PATHS)]["mean"] < 1


def test_an_official_checkpoint_takes_paths(run, runs, capsys, tmp_path):
    argv = [f"paths={PATHS}", "by=init,noise,symmetry", "batch_size=16"]
    own = numbers(capsys, run, *argv)["paths"]
    data = run.parent / "data"
    official = numbers(capsys, as_official(run, tmp_path, "gone"), *argv, f"data_path={data}")["paths"]
    assert official == own and own["pass_at"]["1"]["mean"] < own["pass_at"][str(PATHS)]["mean"]


@pytest.mark.slow
def test_a_compiled_evaluation_equals_the_eager_one(runs, capsys, tmp_path, monkeypatch):
    """Traced as Inductor would trace it, whose code generation takes half a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    argv = [f"paths={PATHS}", "by=init,noise", "batch_size=16", "eval_act=true"]
    found = []
    for mode in ("eager", "compile"):
        file = tmp_path / f"{mode}.npz"
        result = numbers(capsys, runs["trm"], *argv, f"save_predictions={file}", mode=mode)
        found.append((result["paths"]["rules"], result["eval_act"]["exact_accuracy"], np.load(file)))
    (rules, early, one), (fused_rules, fused_early, other) = found
    assert rules == fused_rules and early == fused_early
    assert np.array_equal(one["all__predictions"], other["all__predictions"])


@pytest.mark.parametrize("select", RULES)
def test_other_batches_give_the_same_answers(select, run, capsys, tmp_path):
    by = "init,noise,symmetry" if select == "q" else "init" if select == "vote" else "symmetry"
    argv = [f"paths={PATHS}", f"select={select}", "depth=4", "eval_act=true", "samples=10", f"by={by}"]
    found = []
    for batch_size in (4, 15):
        file = tmp_path / f"{batch_size}.npz"
        result = numbers(capsys, run, *argv, f"batch_size={batch_size}", f"save_predictions={file}")
        found.append((result, np.load(file)))
    (one, saved), (other, again) = found
    assert one["paths"] == other["paths"]
    assert np.array_equal(saved["all__predictions"], again["all__predictions"])
    for name in ("count", "exact_accuracy", "accuracy"):
        assert one["eval_act"][name] == other["eval_act"][name]
    ceiling = one["paths"]["rules"]["oracle"]
    assert ceiling["1"]["mean"] < ceiling[str(PATHS)]["mean"]
    assert one["steps"] == PATHS * 4 and one["eval_act"]["steps"] <= PATHS * 4
    assert one["exact_accuracy"] == one["paths"]["rules"][select][str(PATHS)]["mean"]


def test_options_that_do_not_fit_are_refused_in_one_line(run, capsys):
    for argv, text in (
        (["paths=2", "by=colour"], "by=colour is not allowed: give init, noise, symmetry"),
        (["depths=4,2"], "depths=4,2 is not allowed: give increasing"),
        (["depths=4", "depth=4"], "leave one out"),
        (["paths=2", "noise=0.1"], "add by=noise"),
        (["by=noise", "depths=2"], "by=noise has no effect on one path: add paths=16"),
        (["select=vote"], "select=vote has no effect on one path"),
        (["report=x"], "add depths=8,16 or paths=8"),
    ):
        assert evaluate.main([f"checkpoint={run}", *argv]) == 2
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1


def test_the_table_of_depth_and_breadth_is_drawn(run, capsys, tmp_path):
    found = numbers(capsys, run, "paths=3", "depths=1,4", f"report={tmp_path}", "select=vote")["paths"]
    text = (tmp_path / "paths.html").read_text()
    for rule in RULES:
        assert f"all, {rule}: % of the puzzles solved" in text
    for depth in ("1", "4"):
        for k in ("1", "2", "3"):
            mean = found["depths"][depth]["vote"][k]["mean"]
            assert f"{100 * mean:.2f} ±" in text and f">{100 * mean:.1f}<" in text
    assert (tmp_path / "paths.png").read_bytes().startswith(b"\x89PNG")
