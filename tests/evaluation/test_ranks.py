"""Evaluation shared by ranks: the same numbers, votes and predictions to the last digit as one process."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train
from hrm import evaluate
from hrm.data.arc.build import write_arc
from hrm.data.arc.files import read_source
from hrm.engine import memory_estimate
from tests.support.arc_tasks import random_task, write_tasks
from tests.support.paths import ROOT
from tests.support.runs import words
from tests.support.torchrun import torchrun


def without_time(results: dict[str, Any]) -> dict[str, Any]:
    """The results without seconds, which differ from run to run."""
    return {
        name: without_time(value) if isinstance(value, dict) else value
        for name, value in results.items()
        if name != "seconds"
    }


def alone(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert evaluate.main([*argv, "--json"]) == 0
    return without_time(json.loads(capsys.readouterr().out))


def shared(ranks: int, *argv: str) -> dict[str, Any]:
    (ended,) = torchrun(ranks, "-m", "hrm.evaluate", *argv, "--json")
    assert ended.status == 0, ended.text
    (line,) = ended.lines("{")
    return without_time(json.loads(line))


@pytest.fixture(scope="module")
def run(tiny_sudoku: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    assert train.main(words(tiny_sudoku, out, "epochs=2", "project_name=p", "run_name=r")) == 0
    return out / "p" / "r"


@pytest.mark.parametrize(
    ("ranks", "paths"), [(3, ()), (2, ("paths=2", "by=init,noise,symmetry", "depths=1,2"))]
)
def test_ranks_give_the_numbers_of_one_process(ranks, paths, run, tmp_path, capsys):
    # 20 puzzles in batches of 3: the last turn leaves ranks without a batch, and the last batch is padded.
    argv = [f"checkpoint={run}", "device=cpu", "mode=eager", "batch_size=3", "eval_act=true", *paths]
    files = [tmp_path / f"{name}.npz" for name in ("alone", "shared")]
    expected = alone(capsys, *argv, f"save_predictions={files[0]}")
    assert shared(ranks, *argv, f"save_predictions={files[1]}") == expected
    assert expected["all"]["count"] == 20 and expected["all"]["eval_act"]["count"] == 20
    one, other = (np.load(file) for file in files)
    assert one.files == other.files
    for name in one.files:
        assert np.array_equal(one[name], other[name]), name


@pytest.mark.parametrize("paths", [(), ("paths=3", "by=symmetry", "select=vote")])
def test_ranks_vote_as_one_process(paths, tmp_path, capsys):
    for part, first in (("training", 0), ("evaluation", 4)):
        write_tasks(
            tmp_path / "arc" / part, {f"t{n}": random_task(n, 2, 1, 6) for n in range(first, first + 2)}
        )
    write_arc(tmp_path / "data", list(read_source(str(tmp_path / "arc"))), 3, 0)
    small = [
        "arch.halt_max_steps=2",
        "max_steps=1",
        "epochs=4",
        "eval_interval=null",
        "project_name=p",
        "run_name=r",
    ]
    assert train.main(words(tmp_path / "data", tmp_path, *small)) == 0
    capsys.readouterr()
    argv = [f"checkpoint={tmp_path / 'p' / 'r'}", "device=cpu", "mode=eager", "batch_size=4", *paths]
    files = [tmp_path / f"{name}.json" for name in ("alone", "shared")]
    expected = alone(capsys, *argv, f"submission={files[0]}")
    assert "pass_at" in expected["all"]
    assert shared(2, *argv, f"submission={files[1]}") == expected
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_fault_of_one_rank_ends_all_ranks_with_one_line(run):
    argv = [f"checkpoint={run}", "device=cpu", "mode=eager", "submission=/nowhere/x.json"]
    (ended,) = torchrun(2, "-m", "hrm.evaluate", *argv)
    assert ended.status != 0
    assert len({line for line in ended.text.splitlines() if line.startswith("error: ")}) == 1


def test_the_rehearsal_counts_early_halting_and_the_processes_that_share(run, monkeypatch, capsys):
    argv = [f"checkpoint={run}", "device=cpu", "mode=eager", "batch_size=4096"]
    needed = []
    for early in ("false", "true"):
        monkeypatch.setattr(memory_estimate, "available_bytes", lambda _: 1 << 20)
        assert evaluate.main([*argv, f"eval_act={early}"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "batch_size=4096 needs about" in err
        needed.append(float(err.split("about ")[1].split(" ")[0]))
    assert needed[0] < needed[1]


# A hub whose downloads take a second and are counted in a file.
HUB = """\
import sys, time
from pathlib import Path
from tests.support.fake_hub import FakeHub

class Slow(FakeHub):
    def hf_hub_download(self, **asked):
        path = super().hf_hub_download(**asked)
        time.sleep(1)
        with (self.cache / "asked").open("a") as file:
            file.write(asked["filename"] + "\\n")
        return path

sys.modules.update(Slow(Path(__file__).parent).modules())
"""


def test_ranks_share_one_download(run, tiny_sudoku, tmp_path, capsys):
    (tmp_path / "huggingface_hub.py").write_text(HUB)
    shutil.copytree(run, tmp_path / "served" / "me" / "run")
    alone_argv = ["device=cpu", "mode=eager", "samples=6", "batch_size=3"]
    expected = alone(capsys, f"checkpoint={run}", *alone_argv)
    found = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    argv = ["-m", "hrm.evaluate", "checkpoint=hub:me/run", *alone_argv, "--json"]
    (ended,) = torchrun(2, *argv, environment=found)
    assert ended.status == 0, ended.text
    assert without_time(json.loads(ended.lines("{")[0])) == expected
    files = ["manifest.json", "model.safetensors", "training.pt"]
    asked = (tmp_path / "cache" / "asked").read_text().split()
    assert len(asked) == 4 and {Path(name).name for name in asked} == {*files, "config.yaml"}
    assert len(ended.lines("hub:me/run: downloading")) == 1
    # The model is named by its place on the hub, training too.
    assert re.search(r"^hub:me/run/step_\d+: ", ended.text, re.MULTILINE) and "snapshots" not in ended.text
    small = [*words(tiny_sudoku, tmp_path, "max_steps=1", "run_name=r"), "checkpoint_path=hub:me/run"]
    (ended,) = torchrun(2, "train.py", *small, environment=found)
    assert ended.status == 0 and "starting from the weights of hub:me/run" in ended.text, ended.text
    (ended,) = torchrun(2, *argv[:2], "checkpoint=hub:me/gone", environment=found)
    error = "error: hub:me/gone: no such model on the hub, or a private one"
    assert ended.status != 0 and len(ended.lines("error: ")) == len(ended.lines(error)) == 1, ended.text
