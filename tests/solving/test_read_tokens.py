"""Tasks that are no puzzles: the documented data set trains, is evaluated, and solves typed numbers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train
from hrm import evaluate, solve
from hrm.common.errors import UserError
from hrm.data.__main__ import main as data_main
from hrm.data.dataset import PuzzleDataset
from hrm.data.format import Metadata
from hrm.data.puzzle_kinds import Kind
from hrm.solving.read_tokens import may_be_tokens, read_tokens
from tests.support.paths import ROOT
from tests.support.runs import words

METADATA = Metadata(9, 0, 0, 10, 6, 1, 1, 1.0, ["all"], "tokens")
KIND = Kind("tokens", 1, 6, 10)


@pytest.fixture(scope="module")
def reverse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set that the example of docs/data.md writes."""
    folder = tmp_path_factory.mktemp("own")
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(example.splitlines()) <= 31
    subprocess.run([sys.executable, "-c", example], cwd=folder, check=True)
    return folder / "data" / "reverse"


@pytest.fixture(scope="module")
def run(reverse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    argv = words(reverse, out, "max_steps=2", "eval_interval=null", "epochs=1", "run_name=r")
    assert train.main(argv) == 0
    return out / "reverse" / "r"


def test_the_documented_example_reverses_and_is_intact(reverse, capsys):
    data = PuzzleDataset(reverse, "test")
    for question, answer in zip(data.sets["all"].inputs, data.sets["all"].labels, strict=True):
        kept = question[question > 0]
        assert np.array_equal(answer[answer > 0], kept[::-1]) and 4 <= len(kept) <= 12
    assert data_main(["inspect", str(reverse), "--samples", "1"]) == 0
    assert "tokens" in capsys.readouterr().out


def test_it_is_evaluated_on_its_own_test_split(run, capsys):
    assert evaluate.main([f"checkpoint={run}", "device=cpu", "mode=eager", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["all"]["count"] == 200


@pytest.mark.parametrize("given", [["--tokens", "3,5,1"], ["3 5 1"], ["--tokens", "FILE"]])
def test_numbers_are_solved_from_any_source(given, run, tmp_path, capsys):
    (tmp_path / "input.txt").write_text("3, 5, 1\n")
    given = [str(tmp_path / "input.txt") if word == "FILE" else word for word in given]
    assert solve.main([str(run), *given, "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "tokens"
    (puzzle,) = found["puzzles"]
    assert puzzle["question"] == [3, 5, 1] + [0] * 9
    assert puzzle["right"] is None and len(puzzle["board"]) == 12


def test_a_page_shows_the_tokens(run, tmp_path, capsys):
    page = tmp_path / "page.html"
    argv = ["--tokens", "3,5,1", "--html", str(page), "--device", "cpu"]
    assert solve.main([str(run), *argv]) == 0
    assert "no answer to compare with" in capsys.readouterr().out
    assert 'class="board tokens"' in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give either PUZZLE or --tokens"),
        (["1,2", "--tokens", "1,2"], "give either PUZZLE or --tokens"),
        (["--tokens", "1,2,10"], "number 3 is '10', expected 0 to 9"),
        (["--tokens", "1,-2"], "number 2 is '-2', expected 0 to 9"),
        (["--tokens", "1 " * 13], "13 numbers, expected at most 12"),
        (["--tokens", " "], "empty; expected whole numbers"),
        (["--tokens", "one"], "'one': no such file, nor numbers"),
        (["3.2.24....42.23."], "trained on a sequence of 12 tokens; give it 12 numbers by --tokens"),
    ],
)
def test_other_input_is_refused_in_one_line(argv, message, run, capsys):
    assert solve.main([str(run), *argv, "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_file_has_a_sequence_on_each_line(tmp_path):
    file = tmp_path / "input.txt"
    file.write_text("1 2 3\n\n4,5,6,7,8,9\n")
    found = read_tokens(str(file), KIND, METADATA)
    assert [puzzle.question.tolist() for puzzle in found.puzzles] == [[1, 2, 3, 9, 9, 9], [4, 5, 6, 7, 8, 9]]
    assert found.puzzles[1].title == f"{file}, line 3"
    file.write_text("1 2 3\n1 2 3 x\n")
    with pytest.raises(UserError, match="line 2: number 4 is 'x', expected 0 to 9"):
        read_tokens(str(file), KIND, METADATA)


def test_only_several_numbers_may_be_tokens():
    assert all(map(may_be_tokens, ("1 2 3", "3,5,1", "10, 20\n30,")))
    assert not any(map(may_be_tokens, ("123", "1.2", "53.7 ", "-", "file 3", "")))
