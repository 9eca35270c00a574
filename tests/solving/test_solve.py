"""Solving a puzzle as a user meets it: what is printed, what is refused, exit status, files."""

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import train
from hrm.checkpoint.read import load_checkpoint
from hrm.checkpoint.save import save_checkpoint
from hrm.config.load import load_config
from hrm.data.__main__ import main as build_data
from hrm.data.arc.augment import canvas
from hrm.data.format import PuzzleSet
from hrm.data.puzzle_kinds import Kind
from hrm.data.sudoku.build import builtin_sudoku
from hrm.data.writer import Shape, new_dataset
from hrm.evaluation.paths import differences
from hrm.solve import _result, main
from hrm.solving import player, prepare
from hrm.solving.read_puzzles import Puzzle, read_puzzles
from hrm.solving.trace import Step, Trace
from tests.support.paths import ROOT
from tests.support.trained_runs import as_official

TINY = ["arch.hidden_size=16", "arch.num_heads=2", "arch.H_layers=1", "arch.L_layers=1", "arch.expansion=1"]
TINY += [
    "arch.H_cycles=1",
    "arch.L_cycles=1",
    "arch.halt_max_steps=2",
    "device=cpu",
    "mode=eager",
    "lr_warmup_steps=1",
    "eval_interval=null",
]
SUDOKU = Kind("sudoku", 4, 4, 6)
# Proper puzzles: every blank is a 4; or not.
RIGHT = ("123.3.1221.3.321", "213.3.2112.3.312")
HARD = "1......2..3..4.."
MAZE = "#####\n#S..#\n#.#.#\n#..G#\n#####"


def trained(folder: Path, data: Path, *words: str) -> Path:
    """The folder of a run on a data set, in `folder`."""
    own = [f"data_path={data}", f"output_dir={folder}", "run_name=run"]
    assert train.main([*own, *TINY, *words]) == 0
    return folder / data.name / "run"


@pytest.fixture(scope="module")
def run_of_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose gated model leaves every clue as it is, writes 4 into every blank, and is sure of it."""
    folder = tmp_path_factory.mktemp("sudoku")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HRM_CACHE", str(folder / "cache"))
        data = builtin_sudoku(4, 2, 2, 0, 0)
    run = trained(folder, data, "--arch", "gated", "global_batch_size=2", "epochs=1", "max_steps=1")
    checkpoint = load_checkpoint(run)
    weights = checkpoint.weights
    # A channel for each token, which blocks that add nothing to a state of zeros and gates hand through.
    for name in weights:
        if name in ("H_init", "L_init") or name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name].zero_()
    for name in ("embed_tokens.embedding_weight", "lm_head.weight"):
        weights[name].copy_(torch.eye(6, 16))
    weights["lm_head.weight"][5] += weights["lm_head.weight"][1]
    weights["lm_head.weight"][1] = 0
    weights["q_head.weight"].zero_()
    weights["q_head.bias"].copy_(torch.tensor([2.0, 0.0]))
    manifest = checkpoint.manifest
    save_checkpoint(
        run, 2, weights=weights, training={}, run=manifest["run"], facts={"data": manifest["data"]}
    )
    return run


def a_set(boards: np.ndarray, identifier: int) -> PuzzleSet:
    """Puzzles of one example each, boards their own answers."""
    count = np.arange(len(boards) + 1, dtype=np.int32)
    return PuzzleSet(boards, boards, np.full(len(boards), identifier, np.int32), count, count)


@pytest.fixture(scope="module")
def arc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on a data set of ARC's shape, with the puzzles <blank>, known and 05269061."""
    folder = tmp_path_factory.mktemp("arc")
    boards = np.stack([canvas(np.full((2, 2), colour, np.uint8)) for colour in range(4)])
    with new_dataset(folder / "data") as data:
        for name in ("train", "test"):
            data.split(name, Shape(900, 12)).add("all", a_set(boards, 1))
        data.close(["<blank>", "known", "05269061"])
    return trained(folder, folder / "data", "global_batch_size=4", "epochs=1", "max_steps=1", "lr=1e-3")


@pytest.fixture(scope="module")
def maze(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on a data set of 5 x 5 mazes."""
    folder = tmp_path_factory.mktemp("maze")
    boards = np.tile(Kind("maze", 5, 5, 6).parse(MAZE), (2, 1))
    with new_dataset(folder / "data") as data:
        for name in ("train", "test"):
            data.split(name, Shape(25, 6)).add("all", a_set(boards, 0))
        data.close(["<blank>"])
    return trained(folder, folder / "data", "global_batch_size=2", "epochs=1", "max_steps=1")


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task that recolours a square, with one test whose output is known and one without."""
    grids = [np.full((2, 2), colour).tolist() for colour in range(4)]
    pairs = [{"input": grids[0], "output": grids[1]}, {"input": grids[2], "output": grids[3]}]
    path = tmp_path / "square.json"
    path.write_text(json.dumps({"train": pairs, "test": [pairs[0], {"input": grids[3]}]}))
    return path


def run(*words: Any, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def refused(*words: Any, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command is refused with."""
    status, out, err = run(*words, capsys=capsys)
    assert status == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err.removeprefix("error: ").rstrip("\n")


# --- answers


def test_a_right_answer(run_of_4, capsys):
    status, out, err = run(run_of_4, RIGHT[0], capsys=capsys)
    assert status == 0 and err == ""
    lines = out.splitlines()
    start = lines.index("answer:") + 1
    answer = SUDOKU.parse("\n".join(lines[start : start + 5]))
    assert SUDOKU.problems(SUDOKU.parse(RIGHT[0]), answer) == []
    assert answer.tolist() == [5 if cell == "." else int(cell) + 1 for cell in RIGHT[0]]
    assert lines[start + 6 :] == [
        "right",
        "confidence 88.1 % after 2 steps; with early halting the model halts at step 1",
        "",
    ]
    assert "\x1b" not in out


def test_a_wrong_answer_lists_broken_rules(run_of_4, maze, capsys):
    status, out, _ = run(run_of_4, HARD, capsys=capsys)
    told = next(line for line in out.splitlines() if line.startswith("wrong: "))
    assert (
        status == 1
        and "row 1 holds 4 3 times, at row 1, column 2; row 1, column 3 and row 1, column 4" in told
    )
    assert told.endswith("; and 7 more")
    status, out, _ = run(maze, MAZE.replace("\n", ""), capsys=capsys)
    told = next(line for line in out.splitlines() if line.startswith("wrong: "))
    assert status == 1 and "were changed, the first at row " in told


def test_many_puzzles(run_of_4, tmp_path, capsys, monkeypatch):
    """One a line, in a file or from standard input; one over several lines, with its boxes' rules."""
    path = tmp_path / "puzzles.txt"
    path.write_text("\n".join([*RIGHT, HARD]) + "\n")
    status, out, _ = run(run_of_4, path, capsys=capsys)
    assert status == 1 and out.count("answer:") == 3 and out.endswith("2 of 3 right\n")
    assert all(f"{path}, puzzle {number}:" in out for number in (1, 2, 3))
    content = "\r\n".join(RIGHT).replace(".", "0").encode()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    status, out, _ = run(run_of_4, "-", capsys=capsys)
    assert status == 0 and "2 of 2 right" in out and "standard input, puzzle 2:" in out
    path.write_text(SUDOKU.text(SUDOKU.parse(RIGHT[1])) + "\n")
    status, out, _ = run(run_of_4, path, capsys=capsys)
    assert status == 0 and out.count("answer:") == 1


def test_paths_vote(run_of_4, capsys, monkeypatch):
    words = [run_of_4, RIGHT[0], "--paths", 6, "--by", "init,symmetry", "--select", "vote"]
    status, out, _ = run(*words, capsys=capsys)
    assert status == 0 and "; the 6 paths gave" in out and ": this answer, right" in out
    _, out, _ = run(*words, "--json", capsys=capsys)
    (result,) = json.loads(out)["puzzles"]
    paths = [path for vote in result["votes"] for path in vote["paths"]]
    assert sorted(paths) == list(range(6)) and result["path"] in result["votes"][0]["paths"]
    assert result["votes"][0]["board"] == result["board"]
    assert "is not init, noise or symmetry" in refused(run_of_4, RIGHT[0], "--by", "colour", capsys=capsys)
    for option in (["--by", "init"], ["--select", "vote"], ["--noise", "0.1"]):
        assert "has no effect on one path: add --paths 16" in refused(
            run_of_4, RIGHT[0], *option, capsys=capsys
        )
    few = ["--paths", 2, "--noise", "0.5"]
    assert "--noise 0.5 has no effect: add --by noise" in refused(run_of_4, RIGHT[0], *few, capsys=capsys)
    asked = []

    def ask(*args: Any, noise: float | None, **options: Any) -> Any:
        asked.append(noise)
        return differences(*args, noise=noise, **options)

    monkeypatch.setattr(prepare, "differences", ask)
    for noise in (["--noise", "0.5"], []):
        assert run(run_of_4, RIGHT[0], "--paths", 2, "--by", "noise", *noise, capsys=capsys)[0] == 0
    assert asked == [0.5, None]
    with pytest.raises(SystemExit, match="2"):
        run(run_of_4, RIGHT[0], "--noise", "0", capsys=capsys)
    assert "'0' is not a number above 0" in capsys.readouterr().err
    for option in (["--seed", "-1"], ["--seed", str(2**32)], ["--paths", 0], ["--paths", 4097]):
        with pytest.raises(SystemExit, match="2"):
            run(run_of_4, RIGHT[0], *option, capsys=capsys)
        assert "is not a whole number from" in capsys.readouterr().err


def test_steps_and_act(run_of_4, capsys):
    """--steps takes as many as it says; --act stops where the longer run says that the model halts."""
    results = {}
    for words in ((), ("--steps", 5), ("--steps", 5, "--act")):
        out = run(run_of_4, RIGHT[0], *words, "--json", "--trace", capsys=capsys)[1]
        results[words] = json.loads(out)["puzzles"][0]
    plain, long, act = results.values()
    assert (plain["steps"], long["steps"]) == (2, 5) and long["trace"][:2] == plain["trace"]
    assert act["steps"] == long["halts_at"] <= 2 and act["trace"] == long["trace"][: act["steps"]]


def test_standard_output_is_only_json(run_of_4, capsys):
    status, out, err = run(run_of_4, RIGHT[0], "--json", "--identifier", 0, capsys=capsys)
    told = json.loads(out)
    (found,) = told["puzzles"]
    assert status == 0 and err == "" and told["kind"] == "sudoku" and told["adaptation"] == []
    assert found["right"] is True and found["problems"] == [] and found["board"] == found["answer"]
    assert found["question"] == SUDOKU.parse(RIGHT[0]).tolist() and 0 < found["q_halt"] < 1
    assert str(run_of_4) in told["model"] and "trace" not in found
    _, out, _ = run(run_of_4, HARD, "--json", "--trace", capsys=capsys)
    (found,) = json.loads(out)["puzzles"]
    assert found["right"] is False and found["problems"] == found["trace"][-1]["problems"] != []
    assert {*found["trace"][0]["gates"]} == {"L", "H"}


def test_the_trace_shows_what_changed(run_of_4, capsys, monkeypatch):
    """Counts and places in words; in colour on a terminal alone, and not where NO_COLOR is set."""
    _, out, _ = run(run_of_4, HARD, "--json", "--trace", "--steps", 3, capsys=capsys)
    (found,) = json.loads(out)["puzzles"]
    boards = [found["question"], *(step["board"] for step in found["trace"])]
    _, out, _ = run(run_of_4, HARD, "--trace", "--steps", 3, capsys=capsys)
    told = [line for line in out.splitlines() if line.startswith("step ")]
    assert len(told) == 3 and f"question:\n{SUDOKU.text(boards[0])}\n" in out
    for number, (line, before, after) in enumerate(zip(told, boards, boards[1:], strict=False), 1):
        places = [SUDOKU.at(n) for n in range(16) if before[n] != after[n]]
        step = found["trace"][number - 1]
        assert f"; {len(places)} cell{'s' * (len(places) != 1)} changed" in line
        assert f"confidence {100 * step['q_halt']:.1f} %, {'halts' if step['halts'] else 'continues'}" in line
        assert (f"{len(step['problems'])} fault" if step["problems"] else "no fault") in line
        assert f"{line}\n{SUDOKU.text(after)}\n" in out
        if number > 1:
            assert all(place in line for place in places[:5])

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for value, colored in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", value)
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        assert main([str(run_of_4), RIGHT[0], "--trace"]) == 0
        monkeypatch.undo()
        assert ("\x1b[1;36m" in terminal.getvalue()) == colored


def test_pages_are_written_atomically(run_of_4, tmp_path, capsys, monkeypatch):
    path, source = tmp_path / "a.html", tmp_path / "puzzles.txt"
    source.write_text("\n".join(RIGHT))
    status, out, _ = run(run_of_4, source, "--html", path, capsys=capsys)
    assert status == 0 and {each.name for each in tmp_path.glob("*.html")} == {"a.html", "a-2.html"}
    assert f"page is {path}" in out and f"page is {tmp_path / 'a-2.html'}" in out
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>") and "puzzle 1" in text and str(run_of_4) in text

    def breaks(recorded: object, chosen: int) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(player, "page", breaks)
    assert run(run_of_4, RIGHT[0], "--html", path, capsys=capsys)[0] == 130
    assert path.read_text(encoding="utf-8") == text
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a-2.html", "a.html", "puzzles.txt"]


# --- ARC and puzzle embeddings


def test_a_task_that_the_model_was_not_trained_on(arc, task, capsys):
    """It gets the blank row, which is said; nothing is told of a test without an output."""
    status, out, _ = run(arc, task, "--json", capsys=capsys)
    told = json.loads(out)
    assert status == 1 and "square was not trained on: it gets the blank identifier" in told["notes"][-1]
    assert [found["title"] for found in told["puzzles"]] == ["square, test 1", "square, test 2"]
    known, unknown = told["puzzles"]
    assert known["right"] is False and len(known["problems"]) == 1
    assert unknown["right"] is not True and unknown["answer"] is None
    assert known["answer"] == canvas(np.full((2, 2), 1, np.uint8)).tolist()
    task.rename(task.with_name("known.json"))
    _, out, _ = run(arc, task.with_name("known.json"), "--json", capsys=capsys)
    assert json.loads(out)["notes"] == []


def test_identifiers(arc, task, capsys):
    """A name, even one of digits, is looked up in the data set; another number is a row."""
    boards = {}
    folder = next(path for path in arc.iterdir() if path.name.startswith("step_"))
    table = load_checkpoint(folder).weights["puzzle_emb.weights"]
    assert table.shape == (3, 16) and table[1].abs().max() > 0 and not table[[0, 2]].any()
    for name in ("known", "1", "05269061", "2", "0"):
        _, out, _ = run(arc, task, "--identifier", name, "--json", capsys=capsys)
        boards[name] = [found["q_halt"] for found in json.loads(out)["puzzles"]]
    assert boards["known"] == boards["1"] and boards["05269061"] == boards["2"] == boards["0"]
    told = refused(arc, task, "--identifier", "unheard", capsys=capsys)
    assert told.startswith("--identifier unheard is unknown to ") and told.endswith(
        "step_1; give the number of a row, or leave it out"
    )
    told = refused(arc, task, "--identifier", "7", capsys=capsys)
    assert told.startswith("puzzle identifier 7: the model has rows 0 to 2")


def test_symmetries_need_the_names_that_the_model_knows(arc, task, capsys):
    words = [arc, task.rename(task.with_name("known.json")), "--paths", 2, "--by", "symmetry"]
    assert json.loads(run(*words, "--json", capsys=capsys)[1])["puzzles"][0]["path"] in (0, 1)
    names = Path(load_config(arc / "config.yaml").data_path) / "identifiers.json"
    before = names.read_text()
    names.write_text(json.dumps(["<blank>", "05269061", "known"]))
    told = run(*words, capsys=capsys)[2]
    names.write_text(before)
    assert "was rebuilt after" in told and told.count("\n") == 1


def test_adapting_to_a_task(arc, task, capsys):
    """The loss is told, the checkpoint's files stay, and the learnt row is what the tests are solved with."""
    before = {path: path.read_bytes() for path in arc.rglob("*") if path.is_file()}
    status, out, _ = run(arc, task, "--adapt-steps", 3, "--json", capsys=capsys)
    told = json.loads(out)
    assert status == 1 and len(told["adaptation"]) == 3
    assert f"adapting to 2 demonstrations: step 3 of 3, loss {told['adaptation'][2]:.4f}" == told["notes"][-1]
    _, out, _ = run(arc, task, "--json", capsys=capsys)
    assert [found["q_halt"] for found in told["puzzles"]] != [
        found["q_halt"] for found in json.loads(out)["puzzles"]
    ]
    assert before == {path: path.read_bytes() for path in arc.rglob("*") if path.is_file()}


def test_a_task_on_another_canvas(task, tmp_path, capsys):
    words = ["--output-dir", str(tmp_path / "data"), "--canvas", "4", "--num-aug", "0", "--workers", "1"]
    assert build_data(["arc", "--source", str(task.parent), *words, "--test-set", task.parent.name]) == 0
    small = trained(tmp_path, tmp_path / "data", "global_batch_size=2", "epochs=1", "max_steps=1")
    capsys.readouterr()
    page = tmp_path / "page.html"
    status, out, _ = run(small, task, "--json", "--adapt-steps", 2, "--html", page, capsys=capsys)
    solved = json.loads(out)["puzzles"]
    assert status in (0, 1) and [len(each["question"]) for each in solved] == [16, 16] and page.is_file()
    assert solved[0]["question"] == canvas(np.zeros((2, 2), np.uint8), side=4).tolist()
    wide = json.loads(task.read_text())
    wide["test"][0]["input"] = [[1] * 34]
    (tmp_path / "wide.json").write_text(json.dumps(wide))
    assert refused(small, tmp_path / "wide.json", capsys=capsys) == (
        f"{tmp_path / 'wide.json'}: a grid of 1 x 34 cells, but the model was trained on canvases of 4 x 4; "
        "give a checkpoint trained on data built with --canvas 34 or more"
    )


def arc_trace(board: np.ndarray, problems: list[str]) -> Trace:
    return Trace("arc", 30, 30, [0] * 900, None, [Step(board.tolist(), 0.5, 0.5, True, problems)], "", "")


def test_only_the_grid_of_a_canvas_is_compared():
    """Stray tokens beside a right grid do not make it wrong; without an answer nothing tells that it is."""
    right, other = (canvas(np.full((2, 3), colour, np.uint8)) for colour in (4, 5))
    stray = right.copy()
    stray[-1] = 1
    puzzle, unknown = Puzzle(other, right, "a"), Puzzle(other, None, "a")
    results = [_result(puzzle, arc_trace(board, ["x"]), whole=False) for board in (right, stray, other)]
    assert [found["right"] for found in results] == [True, True, False]
    assert [found["problems"] for found in results] == [[], [], ["x"]]
    (told,) = [_result(puzzle, arc_trace(other, []), whole=False)["problems"]]
    assert told == ["it is not the known answer"]
    assert _result(unknown, arc_trace(right, []), whole=False)["right"] is None
    assert _result(unknown, arc_trace(stray, ["x"]), whole=False)["right"] is False


# --- puzzles as they are given


def test_how_puzzles_are_read(tmp_path):
    path = tmp_path / "mazes.txt"
    side = MAZE.replace("\n", "")
    for content, count in ((MAZE, 1), (side, 1), (f"{side}\n{side}\n", 2), (MAZE.replace(".", " "), 1)):
        path.write_text(content)
        given = read_puzzles(str(path))
        assert (given.kind, len(given.puzzles), given.task) == (Kind("maze", 5, 5, 6), count, None)
        assert given.puzzles[0].question.tolist() == Kind("maze", 5, 5, 6).parse(MAZE).tolist()
        assert given.puzzles[0].answer is None
    path.write_text("\ufeff" + "\n".join([RIGHT[0]] * 3))
    given = read_puzzles(str(path))
    assert given.kind == SUDOKU and len(given.puzzles) == 3
    assert SUDOKU.problems(given.puzzles[2].question, given.puzzles[2].answer) == []
    # As many mazes as each has cells, and yet one board: rows and columns are the same.
    wide = ["#" * 25, *("#" + "." * 23 + "#" for _ in range(23)), "#" * 25]
    wide[1] = "#SG" + "." * 21 + "#"
    path.write_text("\n".join(wide))
    assert read_puzzles(str(path)).kind.rows == 25


def test_puzzle_errors_are_reported_before_importing_pytorch(tmp_path):
    """With row, column or line; the checkpoint is not even looked for."""
    many = tmp_path / "many.txt"
    many.write_text(f"{RIGHT[0]}\n{RIGHT[0][:-1]}\n")
    second = tmp_path / "second.txt"
    second.write_text(f"{RIGHT[0]}\n44{RIGHT[0][2:]}\n")
    ragged = tmp_path / "ragged.txt"
    ragged.write_text(MAZE.replace("#.#.#", "#.#.##"))
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    (tmp_path / "bad.json").write_text('{"train": [{"input": [[1, 12]], "output": [[0]]}], "test": []}')
    (tmp_path / "empty.txt").write_text("\n\n")
    cases = {
        "11" + "." * 14: "row 1 holds 1 twice, at row 1, column 1 and row 1, column 2",
        "." * 16: "the puzzle has several solutions",
        "12x4" + "." * 12: "row 1, column 3 is 'x', expected a digit 1 to 4",
        "123........4....": "the puzzle has no solution",
        "." * 80: "80 cells in one line of 1; expected 16, 36 or 81 cells",
        "": "the puzzle: empty",
        "nowhere.txt": "'nowhere.txt': no such file, nor a puzzle",
        "folder/12345678": "'folder/12345678': no such file, nor a puzzle",
        MAZE.replace("S", "#"): "there is no S",
        MAZE.replace("G", "#"): "there is no G",
        MAZE.replace("..G", "##G").replace("S..", "S.#"): "no path leads from S to G",
        str(many): f"{many}, line 2: 15 cells in one line of 2",
        str(second): f"{second}, puzzle 2: row 1 holds 4 twice",
        str(ragged): f"{ragged}: row 3 has 6 cells, expected 5",
        str(binary): f"{binary}: not text in UTF-8",
        str(tmp_path / "bad.json"): "train pair 0, input, row 0, column 1: 12, expected a colour 0 to 9",
        str(tmp_path / "empty.txt"): "empty.txt: empty",
    }
    script = (
        "import io, json, sys, contextlib\nfrom hrm.solve import main\nfound = []\n"
        "for puzzle in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as err:\n"
        "        found.append((main(['nowhere', puzzle]), err.getvalue()))\n"
        "assert 'torch' not in sys.modules\nprint(json.dumps(found))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps([*cases])], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    for (status, told), (puzzle, expected) in zip(json.loads(done.stdout), cases.items(), strict=True):
        assert status == 2 and told.startswith("error: ") and told.count("\n") == 1, (puzzle, told)
        assert expected in told, (puzzle, told)


# --- refusals


def test_conflicting_options_are_refused(run_of_4, arc, maze, task, tmp_path, capsys):
    assert "no such folder or file" in refused(tmp_path / "gone", RIGHT[0], capsys=capsys)
    assert f"is a maze of 5 x 5 cells, but {run_of_4} was trained on Sudoku of 4 x 4 cells" in refused(
        run_of_4, MAZE, capsys=capsys
    )
    assert "is ARC of 30 x 30 cells, but" in refused(maze, task, capsys=capsys)
    bigger = "." * 3 + "S" + "." * 30 + "G."
    assert "is a maze of 6 x 6 cells" in refused(maze, bigger, capsys=capsys)
    assert "--adapt-steps learns an ARC task's embedding" in refused(
        run_of_4, RIGHT[0], "--adapt-steps", 2, capsys=capsys
    )
    assert "leave one out" in refused(arc, task, "--adapt-steps", 2, "--identifier", "known", capsys=capsys)
    assert "give a file in a folder that exists" in refused(
        run_of_4, RIGHT[0], "--html", tmp_path / "gone" / "a.html", capsys=capsys
    )
    assert "has no averaged weights" in refused(run_of_4, RIGHT[0], "--ema", capsys=capsys)
    assert "device=cuda:99" in refused(run_of_4, RIGHT[0], "--device", "cuda:99", capsys=capsys)
    for steps in ("0", "x", "1" * 30):
        with pytest.raises(SystemExit) as exit:
            main([str(run_of_4), RIGHT[0], "--steps", steps])
        assert exit.value.code == 2 and "is not a whole number from 1 to" in capsys.readouterr().err


def test_an_official_checkpoint_without_its_data(run_of_4, tmp_path, capsys):
    """The size comes from the puzzle, which is said; the answer is that of the run's own checkpoint."""
    as_official(run_of_4, tmp_path, "data/gone")
    status, out, _ = run(tmp_path, RIGHT[0], "--json", capsys=capsys)
    told = json.loads(out)
    assert status == 0 and told["notes"] == [
        "data/gone is missing; the model is assumed to be trained on Sudoku of 4 x 4 cells"
    ]
    _, out, _ = run(run_of_4, RIGHT[0], "--json", capsys=capsys)
    assert told["puzzles"] == json.loads(out)["puzzles"]
    paths = [RIGHT[0], "--paths", 3, "--by", "init,noise,symmetry", "--json"]
    votes = [json.loads(run(model, *paths, capsys=capsys)[1])["puzzles"] for model in (tmp_path, run_of_4)]
    assert votes[0] == votes[1] and len(votes[0][0]["votes"]) > 0


def test_help_comes_without_pytorch():
    script = (
        "import sys\nfrom hrm.solve import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{script}assert 'torch' not in sys.modules\n"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "CHECKPOINT" in done.stdout and "--adapt-steps N" in done.stdout
