"""Training groups held out as the split valid: what trains, what is evaluated when, what ranks the run."""

import shutil

import numpy as np
import pytest

import train
from hrm.checkpoint.read import load_checkpoint
from hrm.config.load import parse_args
from hrm.data.dataset import PuzzleDataset
from hrm.data.format import DatasetError
from hrm.data.order import held_out
from hrm.distributed import World
from hrm.training.data import TrainingData
from tests.support.puzzle_sets import written
from tests.support.runs import assert_same_run, metrics_of, run_main, words


def test_a_quarter_of_the_groups_is_held_out_and_never_trains(tiny_sudoku, tmp_path):
    config = parse_args(words(tiny_sudoku, tmp_path, "valid_fraction=0.25"))
    data = TrainingData.open(config)
    assert data.valid is not None and len(data.valid["all"]) == 12
    assert data.total_steps == 8 * 36 // 8
    held = {row.tobytes() for row in data.train_set.sets["all"].inputs[data.valid["all"]].astype(np.int32)}
    seen = {row.tobytes() for batch in data.batches((0, 0), World()) for row in batch.inputs}
    assert len(held) == 12 and len(seen) == 36 and not held & seen
    for index in ((0, 0), (1, 2)):
        assert not set(data.members(index).examples) & set(data.valid["all"])
    ranked = [(name, count) for name, _, count in data.ranking_batches(World())]
    assert ranked == [("valid", 8), ("valid", 4)]


def test_a_held_out_group_is_evaluated_by_its_first_puzzle(tmp_path):
    data = written(tmp_path / "data", [[1, 1], [3], [2, 4, 1], [7]], [[1], [2, 2]])
    training, examples = held_out(data.folder, data.sets, 0.5, 0)
    assert [len(training[name]) for name in data.sets] == [2, 1]
    for name, part in data.sets.items():
        others = np.setdiff1d(np.arange(len(part.group_indices) - 1), training[name])
        firsts = part.group_indices[others]
        expected = [np.arange(part.puzzle_indices[n], part.puzzle_indices[n + 1]) for n in firsts]
        assert np.array_equal(examples[name], np.concatenate(expected))
    assert held_out(data.folder, data.sets, 0.5, 1)[0]["set0"].tolist() != training["set0"].tolist()
    # At least one group, and never all.
    assert [len(held_out(data.folder, data.sets, 0.001, 0)[0][name]) for name in data.sets] == [3, 1]
    assert [len(held_out(data.folder, data.sets, 0.999, 0)[0][name]) for name in data.sets] == [1, 1]


def test_a_set_with_one_group_cannot_be_held_out(tmp_path):
    data = written(tmp_path / "data", [[1, 1, 1]])
    with pytest.raises(DatasetError, match=r"holds out whole groups.* set0 is a single one"):
        held_out(data.folder, data.sets, 0.1, 0)


def test_valid_ranks_the_run_and_test_is_only_at_the_end(tiny_sudoku, tmp_path, capsys):
    argv = words(tiny_sudoku, tmp_path, "valid_fraction=0.25", "project_name=p", "run_name=r")
    status, out, _ = run_main(*argv, capsys=capsys)
    assert status == 0
    assert "valid: 12 examples of training groups are held out" in out and "flatters" not in out
    lines = [line for line in metrics_of(tmp_path / "p" / "r") if any("eval/" in key for key in line)]
    assert [line["step"] for line in lines] == [9, 18, 27, 36]
    assert all(line["eval/valid/count"] == 12 for line in lines)
    assert ["eval/all/count" in line for line in lines] == [False] * 3 + [True]
    assert lines[-1]["eval/all/count"] == 20
    best = load_checkpoint(tmp_path / "p" / "r").training["best"]
    scores = [line["eval/valid/exact_accuracy"] for line in lines]
    assert best["score"] == max(scores)


def test_early_stopping_looks_at_valid_and_still_ends_with_the_test(tiny_sudoku, tmp_path, capsys):
    argv = words(tiny_sudoku, tmp_path, "valid_fraction=0.25", "project_name=p", "run_name=r")
    status, out, _ = run_main(*argv, "early_stop_patience=1", "early_stop_min_delta=1", capsys=capsys)
    assert status == 0 and "stopped early" in out
    lines = [line for line in metrics_of(tmp_path / "p" / "r") if any("eval/" in key for key in line)]
    assert [line["step"] for line in lines] == [9, 18, 18]
    assert "eval/all/count" not in lines[1] and lines[2]["eval/all/count"] == 20


def test_without_valid_the_log_warns_of_bias(tiny_sudoku, tmp_path, capsys):
    short = ["max_steps=2", "eval_interval=null"]
    argv = words(tiny_sudoku, tmp_path, "max_steps=7", "run_name=a")
    assert (
        run_main(*argv, capsys=capsys)[1].count("which biases its accuracy upwards; valid_fraction=0.1") == 1
    )
    # A run with one evaluation at its end chooses nothing.
    argv = words(tiny_sudoku, tmp_path, *short, "run_name=b")
    assert "flatters" not in run_main(*argv, capsys=capsys)[1]


def test_a_sample_of_valid_ranks_and_stays_the_same(tiny_sudoku, tmp_path):
    config = parse_args(words(tiny_sudoku, tmp_path, "valid_fraction=0.25", "eval_samples=5"))
    data = TrainingData.open(config)
    assert data.sample is not None and set(data.sample["all"]) < set(data.valid["all"])
    assert sum(count for _, _, count in data.ranking_batches(World())) == 5
    assert sum(count for _, _, count in data.test_batches(World())) == 20


def test_fresh_symmetries_resume_bit_for_bit(tiny_sudoku, tmp_path, capsys):
    options = ["valid_fraction=0.25", "augment=true", "checkpoint_interval=7", "keep_checkpoints=null"]
    argv = words(tiny_sudoku, tmp_path, *options, "project_name=p")
    assert train.main([*argv, "run_name=whole"]) == 0
    shutil.copytree(tmp_path / "p" / "whole", tmp_path / "p" / "parts")
    # As if the run had been cut off within its second interval.
    for checkpoint in (tmp_path / "p" / "parts").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > 14:
            shutil.rmtree(checkpoint)
    capsys.readouterr()
    status, out, _ = run_main(*argv, "run_name=parts", capsys=capsys)
    assert status == 0 and "step_14 at step 14" in out
    assert_same_run(tmp_path / "p" / "whole", tmp_path / "p" / "parts")
    status, _, err = run_main(*argv, "run_name=parts", "augment=false", capsys=capsys)
    assert status == 2 and "augment" in err and err.count("\n") == 1


def test_the_test_set_is_never_augmented(tiny_sudoku, tmp_path):
    config = parse_args(words(tiny_sudoku, tmp_path, "augment=true"))
    data, test = TrainingData.open(config), PuzzleDataset(tiny_sudoku, "test")
    rows = np.concatenate([batch.inputs[:count] for _, batch, count in data.test_batches(World())])
    assert np.array_equal(rows, test.sets["all"].inputs)
