"""Learnt puzzle embeddings follow the names of their puzzles to other data sets."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import train
from hrm.checkpoint.identifiers import (
    IDENTIFIERS,
    Identifiers,
    follow_names,
    hashes_of,
    identifiers_of_checkpoint,
)
from hrm.checkpoint.read import CheckpointError, load_checkpoint
from hrm.checkpoint.save import save_checkpoint
from hrm.checkpoint.weights import PUZZLE_TABLE
from hrm.data.arc.build import write_arc
from hrm.data.arc.files import read_source
from hrm.data.dataset import PuzzleDataset
from hrm.evaluate import main as evaluate
from tests.support.arc_tasks import random_task, write_tasks
from tests.support.runs import run_main, words

TINY = ["--arch=v1", "arch.H_cycles=1", "arch.L_cycles=1", "arch.halt_max_steps=1", "arch.q_continue=false"]
TINY += ["arch.hidden_size=16", "global_batch_size=3", "epochs=100", "eval_interval=null"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ARC data sets: three tasks with two augmentations, with three, with another seed, and other tasks."""
    folder = tmp_path_factory.mktemp("named")
    for tasks, first in (("own", 1), ("foreign", 11)):
        made = {f"{tasks}{n}": random_task(n, largest=4) for n in range(first, first + 3)}
        write_tasks(folder / tasks / "evaluation", made)
    for name, tasks, num_aug, seed in (
        ("two", "own", 2, 0),
        ("three", "own", 3, 0),
        ("seed", "own", 2, 5),
        ("other", "foreign", 2, 0),
    ):
        write_arc(folder / name, list(read_source(str(folder / tasks))), num_aug, seed)
    return folder


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    """A run on `two` whose steps teach most embeddings."""
    argv = words(data / "two", data, "project_name=p", "run_name=r", *TINY, "puzzle_emb_lr=0.3")
    assert train.main([*argv, "max_steps=8"]) == 0
    return data / "p" / "r"


def names_in(folder: Path) -> list[str]:
    return json.loads((folder / "identifiers.json").read_text())


def by_name(run: Path, folder: Path) -> dict[str, list[float]]:
    """Each learnt embedding of a run on a data set."""
    return dict(zip(names_in(folder), load_checkpoint(run).weights[PUZZLE_TABLE].tolist(), strict=True))


def predictions(run: Path, folder: Path, file: Path) -> dict[tuple[str, bytes], bytes]:
    """The predictions of a run for every test example, by puzzle and input."""
    assert evaluate([f"checkpoint={run}", f"data_path={folder}", f"save_predictions={file}"]) == 0
    inputs, names, found = PuzzleDataset(folder, "test").sets["all"].inputs, names_in(folder), np.load(file)
    rows = zip(found["all__puzzle_identifiers"], inputs, found["all__predictions"], strict=True)
    return {(names[number], bytes(asked)): bytes(told) for number, asked, told in rows}


def test_an_augmentation_more_costs_no_learnt_embedding(data, trained, tmp_path, capsys):
    before = predictions(trained, data / "two", tmp_path / "two.npz")
    assert "by name" not in capsys.readouterr().out
    after = predictions(trained, data / "three", tmp_path / "three.npz")
    line = "9 of 12 puzzles are known by name and keep their embeddings; 3 new ones start fresh"
    assert line in capsys.readouterr().out
    assert len(before) == 9 and len(after) == 12 and before.items() <= after.items()


@pytest.mark.parametrize("way", ["resume", "checkpoint_path"])
@pytest.mark.parametrize(("name", "known", "line"), [("three", 10, "9 of 12"), ("seed", 4, "3 of 9")])
def test_training_matches_embeddings_by_name(way, name, known, line, data, trained, tmp_path, capsys):
    old = by_name(trained, data / "two")
    assert len({tuple(row) for row in old.values()}) >= 6
    source = f"{way}={trained}"
    argv = words(data / name, tmp_path, "project_name=p", "run_name=r", *TINY, "lr=0", "puzzle_emb_lr=0")
    argv += [source, "resume_force=true", "max_steps=9"]
    status, out, err = run_main(*argv, capsys=capsys)
    assert status == 0, err
    assert f"{line} puzzles are known by name" in out
    assert ("6 of the checkpoint's are not in this data" in out) == (name == "seed")
    new = by_name(tmp_path / "p" / "r", data / name)
    for puzzle, row in new.items():
        assert row == old.get(puzzle, [0.0] * len(row)), puzzle
    assert len(new.keys() & old.keys()) == known


def test_other_tasks_in_equal_number_are_refused(data, trained, tmp_path, capsys):
    refusal = "knows none of the 9 puzzles named in "
    assert evaluate([f"checkpoint={trained}", f"data_path={data / 'other'}"]) == 2
    err = capsys.readouterr().err
    assert refusal in err and err.rstrip().endswith("or reset_puzzle_emb=true for a fresh table")
    argv = words(data / "other", tmp_path, *TINY, "resume_force=true")
    for way in ("resume", "checkpoint_path"):
        status, _, err = run_main(*argv, f"{way}={trained}", capsys=capsys)
        assert status == 2 and refusal in err and "reset_puzzle_emb=true" in err and err.count("\n") == 1


def test_rows_without_names_are_taken_by_number_with_a_warning(data, trained, tmp_path, capsys):
    """As in checkpoints of older versions and of the official code."""
    weights = load_checkpoint(trained).weights
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.yaml").write_bytes((trained / "config.yaml").read_bytes())
    command = [f"checkpoint={tmp_path / 'model.safetensors'}", f"data_path={data / 'other'}", "samples=2"]
    assert evaluate(command) == 0
    assert f"copy the identifiers.json of that data to {tmp_path}/identifiers.json" in capsys.readouterr().out
    # The remedy.
    (tmp_path / "identifiers.json").write_bytes((data / "two" / "identifiers.json").read_bytes())
    assert evaluate(command) == 2 and "knows none of the 9 puzzles" in capsys.readouterr().err
    command[1] = f"data_path={data / 'three'}"
    assert evaluate(command) == 0 and "9 of 12 puzzles are known by name" in capsys.readouterr().out


def test_a_forced_resumption_reads_names_next_to_an_older_checkpoint(data, trained, tmp_path, capsys):
    saved = load_checkpoint(trained)
    path = save_checkpoint(
        tmp_path / "old",
        saved.step,
        **{"weights": saved.weights, "training": saved.training, "run": saved.manifest["run"]},
        facts={name: saved.manifest[name] for name in ("config", "data", "dataset")},
    )
    argv = words(data / "three", tmp_path, "project_name=p", "run_name=r", *TINY, "max_steps=9")
    argv += [f"resume={path}", "resume_force=true"]
    status, _, err = run_main(*argv, capsys=capsys)
    assert status == 2 and "puzzle_emb.weights is (10, 16) there and (13, 16) here" in err
    (path / "identifiers.json").write_bytes((data / "two" / "identifiers.json").read_bytes())
    status, out, err = run_main(*argv, capsys=capsys)
    assert status == 0 and "9 of 12 puzzles are known by name" in out, err


def test_names_of_all_builders_have_one_hash():
    ours, trm = "a_t3_0123456789", "a|||t3|||0123456789"
    assert hashes_of([ours]).tolist() == hashes_of([trm]).tolist() == [1467927082001018953]
    assert len(set(hashes_of(["a", "b", "a_t3_0123456798", ours]).tolist())) == 4


def test_a_table_follows_its_names(tmp_path):
    table = torch.arange(8.0).view(4, 2)
    there = Identifiers(tmp_path / "there", hashes_of(["<blank>", "c", "a", "b"]))

    def followed(*names: str) -> tuple[list[list[float]], str]:
        here = Identifiers(tmp_path / "here", hashes_of(names))
        moved, notes = follow_names(table, there, here, len(names), tmp_path, "go away")
        return moved.tolist(), " ".join(notes)

    assert followed("<blank>", "c", "a", "b") == (table.tolist(), "")
    rows, note = followed("<blank>", "b", "x", "y", "c")
    assert rows == [[0, 1], [6, 7], [0, 0], [0, 0], [2, 3]]
    assert "2 of 4 puzzles" in note and "2 new ones" in note and "1 of the checkpoint's" in note
    # TRM's data sets name every number below their first one <blank>.
    assert followed("<blank>", "<blank>", "a")[0] == [[0, 1], [0, 1], [4, 5]]
    assert followed("<blank>")[0] == [[0, 1]]
    with pytest.raises(CheckpointError, match=r"knows none of the 2 puzzles named in \S+here, .*; go away$"):
        followed("<blank>", "x", "y")


@pytest.mark.parametrize("hashes", [torch.zeros(3, dtype=torch.int64), torch.zeros(4), None])
def test_damaged_names_are_refused(hashes, tmp_path):
    save_file({"other": torch.zeros(4)} if hashes is None else {"hashes": hashes}, tmp_path / IDENTIFIERS)
    with pytest.raises(CheckpointError, match=r"identifiers\.safetensors does not hold a hash for each of 4"):
        identifiers_of_checkpoint(tmp_path / "model.safetensors", 4)
