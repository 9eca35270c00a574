"""Intact data sets that other software wrote in its own way: accepted, and each deviation reported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train
from hrm.data import dataset as datasets
from hrm.data.__main__ import main
from hrm.data.dataset import PuzzleDataset
from hrm.data.deviations import deviations
from hrm.data.format import DatasetError
from hrm.data.puzzle_kinds import kind_of
from hrm.data.sudoku.build import generate
from hrm.evaluate import main as evaluate

CELLS, VOCABULARY, EXAMPLES = 12, 14, 40
SMALL = ["arch.hidden_size=32", "arch.num_heads=2", "arch.H_layers=1", "arch.L_layers=1"]
SMALL += ["arch.halt_max_steps=2", "mode=eager", "device=cpu", "lr=1e-3", "lr_warmup_steps=1"]
SMALL += ["global_batch_size=8", "epochs=4", "eval_interval=2", "max_steps=20", "log_interval=5"]


def foreign(folder: Path, split: str = "train", *, X: Any = None, Y: Any = None, **changes: Any) -> Path:
    """A split as a program that knows nothing of this project writes it: int64 arrays and dataset.json."""
    rng = np.random.default_rng(len(split))
    X = rng.integers(1, VOCABULARY, (EXAMPLES, CELLS)) if X is None else X
    Y = (X + 1) % VOCABULARY if Y is None else Y
    count = len(X)
    groups = changes.pop("groups", np.arange(count + 1))
    puzzles = changes.pop("puzzles", np.arange(count + 1))
    (folder / split).mkdir(parents=True)
    arrays = {"inputs": X, "labels": Y, "puzzle_identifiers": np.zeros(len(puzzles) - 1, np.int64)}
    for name, array in {**arrays, "puzzle_indices": puzzles, "group_indices": groups}.items():
        np.save(folder / split / f"all__{name}.npy", array)
    values = {
        "pad_id": 0,
        "ignore_label_id": -100,
        "blank_identifier_id": 0,
        "vocab_size": VOCABULARY,
        "seq_len": X.shape[1],
        "num_puzzle_identifiers": 1,
        "total_groups": len(groups) - 1,
        "mean_puzzle_examples": count / (len(puzzles) - 1),
        "total_puzzles": count,
        "sets": ["all"],
    }
    (folder / split / "dataset.json").write_text(json.dumps(values | changes))
    (folder / "identifiers.json").write_text('["<blank>"]')
    return folder


def notes(folder: Path, split: str = "train") -> list[str]:
    return list(deviations(PuzzleDataset(folder, split)))


def masked() -> tuple[np.ndarray, np.ndarray]:
    X = np.random.default_rng(3).integers(1, VOCABULARY, (EXAMPLES, CELLS))
    return X, np.where(np.arange(CELLS) < 6, -100, (X + 1) % VOCABULARY)


def test_an_ordinary_data_set_has_nothing_to_report(tmp_path: Path) -> None:
    assert notes(foreign(tmp_path)) == []


@pytest.mark.parametrize(("ignore", "more"), [(None, ""), (0, ", nor do labels 0")])
def test_labels_of_minus_100_carry_no_loss_under_any_ignore_label(
    tmp_path: Path, ignore: int | None, more: str
) -> None:
    X, Y = masked()
    foreign(tmp_path, X=X, Y=Y, ignore_label_id=ignore)
    dataset = PuzzleDataset(tmp_path, "train")
    _, batch, count = next(datasets.test_batches(dataset, global_batch_size=EXAMPLES))
    expected = Y if ignore is None else np.where(Y == 0, -100, Y)
    assert count == EXAMPLES
    np.testing.assert_array_equal(batch.labels, expected)
    (note,) = deviations(dataset)
    assert f"labels -100 carry no loss{more}: ignore_label_id is {'null' if ignore is None else 0}" in note


@pytest.mark.parametrize("value", [-99, -1, VOCABULARY])
def test_other_labels_outside_the_vocabulary_are_still_damage(tmp_path: Path, value: int) -> None:
    X, Y = masked()
    Y[7, 3] = value
    foreign(tmp_path, X=X, Y=Y, ignore_label_id=0)
    with pytest.raises(
        DatasetError, match=f"row 7 holds {value}, expected 0 <= value < {VOCABULARY}"
    ) as caught:
        PuzzleDataset(tmp_path, "train")
    assert ("set ignore_label_id to it" in str(caught.value)) == (value < 0)


def test_wrong_totals_are_taken_from_the_arrays(tmp_path: Path) -> None:
    foreign(tmp_path, total_groups=400, mean_puzzle_examples=4)
    dataset = PuzzleDataset(tmp_path, "train")
    assert (dataset.metadata.total_groups, dataset.metadata.mean_puzzle_examples) == (EXAMPLES, 1.0)
    groups, mean = deviations(dataset)
    assert "total_groups is 400, but the arrays hold 40 groups; it only sets the length" in groups
    assert "mean_puzzle_examples is 4, but the arrays give 1; it only sets the length" in mean


def test_puzzles_that_share_a_group_are_counted(tmp_path: Path) -> None:
    (note,) = notes(foreign(tmp_path / "group", groups=np.array([0, EXAMPLES])))
    assert "all 40 puzzles are in one group, so an epoch uses 1 puzzle" in note
    one, all_of_it = np.array([0, 1]), np.array([0, EXAMPLES])
    (note,) = notes(foreign(tmp_path / "puzzle", groups=one, puzzles=all_of_it))
    assert "all 40 examples are one puzzle" in note
    # Evaluation reads every example, whatever its group.
    assert notes(foreign(tmp_path / "test", "test", groups=np.array([0, EXAMPLES])), "test") == []


def test_labels_without_loss(tmp_path: Path) -> None:
    X, _ = masked()
    (note,) = notes(foreign(tmp_path / "copied", X=X, Y=X.copy()))
    assert "the labels equal the inputs in all 40 inspected examples" in note
    (note,) = notes(foreign(tmp_path / "unknown", Y=np.full((EXAMPLES, CELLS), -100)))
    assert "no label is known" in note


def sudokus() -> tuple[np.ndarray, np.ndarray]:
    train_set, _ = generate(9, EXAMPLES, 1, seed=1, clues=60)
    return train_set.questions.astype(np.int64) + 1, train_set.answers.astype(np.int64) + 1


def test_contents_must_confirm_an_undeclared_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    X, Y = sudokus()
    right = foreign(tmp_path / "right", X=X, Y=Y, vocab_size=11)
    other = foreign(tmp_path / "other", X=X, Y=X[:, ::-1].copy(), vocab_size=11)
    kinds = [kind_of(data.metadata, data.sets).name for data in map(split_of, (right, other))]
    assert kinds == ["sudoku", "tokens"]
    assert main(["inspect", str(right), "--samples", "0"]) == 0
    assert "train: sudoku, 9 x 9 cells" in capsys.readouterr().out
    assert main(["inspect", str(other), "--samples", "1"]) == 0
    told = capsys.readouterr().out
    assert "train: tokens, 9 x 9 cells" in told and "violations: 0" in told
    assert "its sizes fit sudoku, but most examples break the rules" in told
    # Asked for by the user, the rules hold.
    with pytest.raises(SystemExit, match="1"):
        main(["inspect", str(other), "--samples", "0", "--kind", "sudoku"])
    assert f"violations: {EXAMPLES}" in capsys.readouterr().out


def split_of(folder: Path) -> PuzzleDataset:
    return PuzzleDataset(folder, "train")


def test_a_few_bad_rows_leave_a_kind_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    X, Y = sudokus()
    Y[5] = np.roll(Y[5], 1)
    foreign(tmp_path, X=X, Y=Y, vocab_size=11)
    with pytest.raises(SystemExit, match="1"):
        main(["inspect", str(tmp_path), "--samples", "0"])
    assert "violations: 1\n" in capsys.readouterr().out


def test_a_declared_kind_must_fit_the_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign(tmp_path, kind="tokens")
    assert kind_of(split_of(tmp_path).metadata).name == "tokens"
    assert main(["inspect", str(tmp_path), "--kind", "maze"]) == 2
    assert "kind maze: 1 x 12 cells over 14 tokens do not fit this kind" in capsys.readouterr().err


def test_a_run_without_a_test_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign(tmp_path / "data")
    out = tmp_path / "runs"
    # Early stopping has nothing to compare and must not end the run.
    words = [f"data_path={tmp_path / 'data'}", f"output_dir={out}", "run_name=r", "project_name=p", *SMALL]
    assert train.main([*words, "early_stop_patience=1"]) == 0
    told = capsys.readouterr()
    assert "there is no test split, so the run is not evaluated" in told.out
    assert "r split=train   evaluate it" in told.out
    assert "40 training and 0 test examples; 20 steps of 8" in told.out
    assert "step 20: not evaluated, there is no test split" in told.out and "0.0%" not in told.out
    lines = [json.loads(line) for line in (out / "p" / "r" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 20 and not any("eval" in name for line in lines for name in line)
    assert train.main(words) == 0
    assert "resuming" in capsys.readouterr().out
    assert evaluate([f"checkpoint={out / 'p' / 'r'}"]) == 2
    assert "data has train" in capsys.readouterr().err
    assert evaluate([f"checkpoint={out / 'p' / 'r'}", "split=train"]) == 0


def test_unknown_answers_are_not_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign(tmp_path / "data")
    foreign(tmp_path / "data", "test", Y=np.full((EXAMPLES, CELLS), -100))
    run = tmp_path / "runs" / "p" / "r"
    words = [f"data_path={tmp_path / 'data'}", f"output_dir={tmp_path / 'runs'}", "run_name=r"]
    assert train.main([*words, "project_name=p", *SMALL]) == 0
    told = capsys.readouterr()
    assert "step 20: all: no known answers, nothing to score" in told.out and "0.0%" not in told.out
    assert evaluate([f"checkpoint={run}"]) == 0
    told = capsys.readouterr()
    assert "all: no known answers, nothing to score" in told.out and "0.00 %" not in told.out


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("data", r"data has train"),
        ("data/train", "a split, expected the folder of a whole data set; give"),
        (".", r"no such folder.* has no split"),
        ("data/train/dataset.json", r"a file, expected the folder of a data set; .*hrm.data sudoku --help"),
    ],
)
def test_no_remedy_overwrites_data(tmp_path: Path, path: str, message: str) -> None:
    foreign(tmp_path / "data")
    with pytest.raises(DatasetError, match=message) as raised:
        PuzzleDataset(tmp_path / path, "test")
    assert "--output-dir" not in str(raised.value)


def test_a_builder_does_not_replace_data_sets_of_other_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign(tmp_path / "mine")
    before = sorted((path, path.read_bytes()) for path in (tmp_path / "mine/train").iterdir())
    words = ["sudoku", "--size", "4", "--num-train", "2", "--num-test", "2", "--output-dir"]
    assert main([*words, str(tmp_path / "mine")]) == 2
    assert "mine: exists and is not a data set to replace; choose another folder" in capsys.readouterr().err
    assert sorted((path, path.read_bytes()) for path in (tmp_path / "mine/train").iterdir()) == before
