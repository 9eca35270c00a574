"""The trainer as a user meets it: its output, its files, interruption and resumption, and its refusals."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from hrm.checkpoint.read import load_checkpoint
from hrm.training.run_folder import run_lock
from tests.support.forked import start
from tests.support.paths import ROOT
from tests.support.runs import assert_same_run, metrics_of, run_main, words


def test_a_run_tells_its_story_and_leaves_its_files(tiny_sudoku, tmp_path, capsys):
    status, out, _ = run_main(
        "--arch", "gated", *words(tiny_sudoku, tmp_path, "run_name=first"), capsys=capsys
    )
    assert status == 0
    run = tmp_path / tiny_sudoku.name / "first"
    assert "gated HRM" in out and "48 training and 20 test examples" in out and "48 steps of 8" in out
    assert f"checkpoint: {run / 'step_48'}" in out and "next:" in out
    lines = metrics_of(run)
    assert [line["step"] for line in lines if "train/lm_loss" in line] == list(range(2, 49, 2))
    assert [line["step"] for line in lines if "eval/all/exact_accuracy" in line] == [12, 24, 36, 48]
    assert {line["eval/all/count"] for line in lines if "eval/all/count" in line} == {20}
    assert lines[1]["train/lr"] == pytest.approx(1e-3 * 2 / 5)
    checkpoint = load_checkpoint(run)
    assert checkpoint.step == 48 and checkpoint.training["carry"]["z_H"].shape == (8, 17, 32)
    assert set(load_file(run / "step_48" / "model.safetensors")) == set(checkpoint.weights)
    buffers = ("H_init", "L_init", "puzzle_emb.weights")
    sizes = [tensor.numel() for name, tensor in checkpoint.weights.items() if name not in buffers]
    assert lines[0] == {"step": 0, "model/parameters": sum(sizes), "run/total_steps": 48}
    # The saved configuration trains the same run again.
    status, out, _ = run_main("--config", str(run / "config.yaml"), "run_name=second", capsys=capsys)
    assert status == 0
    assert_same_run(run, tmp_path / tiny_sudoku.name / "second")


def test_a_finished_run_reports_again_instead_of_training(tiny_sudoku, tmp_path, capsys):
    argv = words(tiny_sudoku, tmp_path, "run_name=r", "max_steps=12")
    assert run_main(*argv, capsys=capsys)[0] == 0
    run = tmp_path / tiny_sudoku.name / "r"
    before = (run / "metrics.jsonl").read_bytes()
    status, out, _ = run_main(*argv, capsys=capsys)
    assert status == 0 and "resuming" in out and "at step 12" in out and "on 20 test puzzles" in out
    assert (run / "metrics.jsonl").read_bytes() == before
    # More steps go on from there.
    assert run_main(*argv[:-1], "max_steps=15", capsys=capsys)[0] == 0
    assert load_checkpoint(run).step == 15


def test_v1_weights_start_a_gated_run_with_a_note(tiny_sudoku, tmp_path, capsys):
    v1 = words(tiny_sudoku, tmp_path, "run_name=v1", "max_steps=12")
    assert run_main("--arch", "v1", *v1, capsys=capsys)[0] == 0
    source = tmp_path / tiny_sudoku.name / "v1"
    gated = words(tiny_sudoku, tmp_path, "run_name=g", "max_steps=1", "lr=0", "puzzle_emb_lr=0")
    status, out, _ = run_main("--arch", "gated", *gated, f"checkpoint_path={source}", capsys=capsys)
    assert status == 0 and "no gate networks" in out and "keep their initial values" in out
    old, new = load_checkpoint(source).weights, load_checkpoint(tmp_path / tiny_sudoku.name / "g").weights
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert len(new) == len(old) + 8


@pytest.fixture
def copy_of(tiny_sudoku, tmp_path):
    # Without the checksums, which would find every change first.
    ignored = shutil.ignore_patterns("checksums.json")
    return shutil.copytree(tiny_sudoku, tmp_path / "copy", ignore=ignored)


def edit_metadata(folder: Path, **changes: Any) -> None:
    path = folder / "train" / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_bad_data_is_answered_by_one_line(copy_of, tmp_path, capsys):
    def refused(*parts: str, data: Path = copy_of) -> None:
        status, _, err = run_main(*words(data, tmp_path / "out"), capsys=capsys)
        assert status == 2 and err.count("\n") == 1 and err.startswith("error: ")
        for part in parts:
            assert part in err

    refused("nowhere/train", "python -m hrm.data sudoku", data=tmp_path / "nowhere")
    edit_metadata(copy_of, num_puzzle_identifiers=2)
    refused("test/dataset.json: num_puzzle_identifiers is 1, but 2 in train")
    edit_metadata(copy_of, num_puzzle_identifiers=1)
    labels = copy_of / "train" / "all__labels.npy"
    array = np.load(labels)
    array[3, 5] = 77
    np.save(labels, array)
    refused("all__labels.npy", "77")
    assert not (tmp_path / "out").exists()


def test_other_bad_input_is_answered_by_one_line(tiny_sudoku, tmp_path, capsys):
    def refused(*more: str, parts: tuple[str, ...]) -> None:
        status, _, err = run_main(*words(tiny_sudoku, tmp_path, "max_steps=2", *more), capsys=capsys)
        assert status == 2, err
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in err
        for part in parts:
            assert part in lines[0]

    (tmp_path / "file").write_text("")
    refused(f"output_dir={tmp_path / 'file'}", parts=(str(tmp_path / "file"), "output_dir"))
    refused("global_batch_size=97", parts=("97", "batch"))
    refused("arch.hiden_size=32", parts=("arch.hiden_size", "arch.hidden_size"))
    refused("lr=nan", parts=("lr",))
    assert train.main(words(tiny_sudoku, tmp_path, "run_name=a", "max_steps=2")) == 0
    refused("run_name=a", "seed=1", parts=("seed was 0 and is now 1", "resume=none"))
    refused("run_name=a", "arch.halt_max_steps=4", parts=("halt_max_steps was 3 and is now 4",))
    other = words(tiny_sudoku, tmp_path, "run_name=b", "max_steps=2", "arch.hidden_size=64")
    assert train.main(other) == 0
    b = tmp_path / tiny_sudoku.name / "b"
    refused("run_name=c", f"checkpoint_path={b}", parts=(str(b), "another architecture", "64", "32"))
    refused("run_name=c", f"resume={b}", parts=("arch.hidden_size was 64 and is now 32",))
    refused("run_name=c", "resume=/nowhere", parts=("/nowhere",))
    a = tmp_path / tiny_sudoku.name / "a"
    from_a = words(tiny_sudoku, tmp_path, "run_name=d", "max_steps=2", f"checkpoint_path={a}")
    assert train.main(from_a) == 0
    refused("run_name=d", f"checkpoint_path={b}", parts=(f"checkpoint_path was '{a}' and is now '{b}'",))
    # The run itself goes on without being told again where it came from.
    assert train.main(words(tiny_sudoku, tmp_path, "run_name=d", "max_steps=3")) == 0
    assert load_checkpoint(tmp_path / tiny_sudoku.name / "d").manifest["run"]["checkpoint_path"] == str(a)


def test_all_checks_run_before_files_move(tiny_sudoku, tmp_path, capsys):
    argv = words(tiny_sudoku, tmp_path, "run_name=r", "max_steps=2")
    assert train.main(argv) == 0
    run = tmp_path / tiny_sudoku.name / "r"
    before = sorted(run.rglob("*"))
    for more in ("global_batch_size=97", "checkpoint_path=/nowhere"):
        other = words(tiny_sudoku, tmp_path, "run_name=r", "max_steps=2", more)
        assert run_main(*other, "resume=none", capsys=capsys)[0] == 2
        assert sorted(run.rglob("*")) == before and not Path(f"{run}.1").exists()
    # The run's own weights start it anew, from where they are kept.
    again = [*argv, "resume=none", f"checkpoint_path={run}"]
    assert run_main(*again, capsys=capsys)[0] == 0 and Path(f"{run}.1").is_dir()


def test_resuming_another_folders_run_keeps_the_one_that_was_here(tiny_sudoku, tmp_path, capsys):
    for name, seed in (("a", 1), ("b", 2)):
        assert (
            train.main(words(tiny_sudoku, tmp_path, f"run_name={name}", f"seed={seed}", "max_steps=2")) == 0
        )
    a, b = (tmp_path / tiny_sudoku.name / name for name in "ab")
    kept = (b / "metrics.jsonl").read_bytes()
    argv = words(tiny_sudoku, tmp_path, "run_name=b", "seed=1", "max_steps=3", f"resume={a}")
    status, out, _ = run_main(*argv, capsys=capsys)
    assert status == 0 and f"kept as {b}.1" in out
    assert load_checkpoint(b).step == 3 and load_checkpoint(b).manifest["run"]["seed"] == 1
    assert (Path(f"{b}.1") / "metrics.jsonl").read_bytes() == kept and load_checkpoint(a).step == 2


def test_a_run_belongs_to_one_process(tiny_sudoku, tmp_path, capsys):
    argv = words(tiny_sudoku, tmp_path, "run_name=r", "max_steps=2")
    run = tmp_path / tiny_sudoku.name / "r"
    with run_lock(run):
        status, _, err = run_main(*argv, capsys=capsys)
        assert (
            status == 2 and err == f"error: {run}: another process trains this run; give another run_name\n"
        )
    assert run_main(*argv, capsys=capsys)[0] == 0


def test_an_interval_that_does_not_divide_the_epochs_fixes_them(tiny_sudoku, tmp_path, capsys):
    argv = words(tiny_sudoku, tmp_path, "run_name=r", "epochs=3")
    assert train.main(argv) == 0
    status, _, err = run_main(*words(tiny_sudoku, tmp_path, "run_name=r", "epochs=5"), capsys=capsys)
    assert status == 2 and "epochs was 3 and is now 5" in err


def test_a_new_run_keeps_the_earlier_run(tiny_sudoku, tmp_path, capsys):
    argv = words(tiny_sudoku, tmp_path, "run_name=r", "max_steps=2")
    assert train.main(argv) == 0
    run = tmp_path / tiny_sudoku.name / "r"
    for number in (1, 2):
        status, out, _ = run_main(*argv, "resume=none", f"seed={number}", capsys=capsys)
        assert status == 0 and f"kept as {run}.{number}" in out
    seeds = [load_checkpoint(Path(f"{run}{end}")).manifest["run"]["seed"] for end in (".1", ".2", "")]
    assert seeds == [0, 1, 2]


@pytest.mark.slow
def test_a_batch_that_the_ranks_do_not_divide_is_refused(tiny_sudoku, tmp_path):
    environment = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with open(tmp_path / "err", "w") as err:
        argv = ["train.py", *words(tiny_sudoku, tmp_path)]
        assert start(argv, {**os.environ, **environment}, stderr=err).wait() == 2
    told = (tmp_path / "err").read_text()
    assert "Traceback" not in told and "global_batch_size=8" in told and "3 ranks" in told


@pytest.mark.slow
def test_an_eager_run_does_not_import_the_compiler(tiny_sudoku, tmp_path):
    """The import takes 2 seconds. Other tests have made it in this process, so a new one runs."""
    code = "import sys, train; sys.exit(train.main(sys.argv[1:]) or 'torch._dynamo' in sys.modules)"
    command = [sys.executable, "-c", code, *words(tiny_sudoku, tmp_path, "max_steps=1")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
