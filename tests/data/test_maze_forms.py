"""Mazes in other forms than squares of "# SGo": letters of maze-dataset, rectangles, faulty rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train
from hrm.data.__main__ import main
from hrm.data.dataset import PuzzleDataset
from hrm.data.maze.build import Request, generate
from hrm.data.maze.files import keys
from hrm.data.maze.search import solved, symmetric
from hrm.data.puzzle_kinds import Kind, kind_of
from hrm.data.symmetries import MazeSymmetries
from hrm.evaluate import main as evaluate
from hrm.solve import main as solve
from hrm.solving.read_puzzles import read_puzzles as read_to_solve

LONG = "#########\n#S......#\n#.###.#.#\n#...#.#G#\n#########"
SOLVED = "#########\n#Soooooo#\n#.###.#o#\n#...#.#G#\n#########"
# The same walls turned by half with the ends where they were: another maze.
SWAPPED = LONG.replace("\n", "").replace("S", ".").replace("G", "S").replace("#...#", "#G..#")


def build(folder: Path, *words: str) -> tuple[int, Path]:
    out = folder / "out"
    return main(["maze", "--output-dir", str(out), *words]), out


def tokens(text: str) -> list[int]:
    return ["_# SGo".index(cell) for cell in text.replace("\n", "").replace(".", " ")]


FORMS = ["lines", "columns", "maze-dataset", "no answer", "empty answers", "semicolons"]


@pytest.mark.parametrize("form", [*FORMS, "grids", "titles", "stacked", "solved", "crlf"])
def test_rectangles_are_read_in_each_form(form: str, tmp_path: Path, capsys: Any) -> None:
    other = [text[::-1].replace("S", "x").replace("G", "S").replace("x", "G") for text in (LONG, SOLVED)]
    # The reversed maze is the same one turned by half, but with its ends exchanged.
    rows = [(LONG, SOLVED), (other[0], other[1])]
    words = ["--test-size", "0.5"]
    if form == "columns":
        words += ["--columns", "9"]
        rows = [(question.replace("\n", ""), answer.replace("\n", "")) for question, answer in rows]
    if form == "maze-dataset":
        letters = str.maketrans(".Go", " EX")
        rows = [(question.translate(letters), answer.translate(letters)) for question, answer in rows]
    if form == "empty answers":
        rows = [(question, "") for question, _ in rows]
    lines = [f'"{question}"' + (f',"{answer}"' if form != "no answer" else "") for question, answer in rows]
    head = "question" if form == "no answer" else "question,answer"
    text = "\n".join([head, *lines]) + "\n"
    if form == "semicolons":
        text = text.replace("question,answer", "Maze; Solution; steps").replace('","', '"; "')
        text = text.replace('"\n"', '"; 3\n"').rstrip() + "; 3\n"
    if form not in FORMS:
        grids = [answer if form == "solved" else question for question, answer in rows]
        title = {"titles": "Maze 1:\n", "stacked": ""}.get(form, "\n")
        text = "".join(f"{title}{grid}\n" for grid in grids).replace("\n", "\r\n" if form == "crlf" else "\n")
    path = tmp_path / ("mazes.csv" if form in FORMS else "mazes.txt")
    path.write_text(text, newline="")
    status, out = build(tmp_path, "--source", str(path), *words)
    assert status == 0
    found = []
    for split in ("train", "test"):
        dataset = PuzzleDataset(out, split)
        assert (dataset.metadata.seq_len, dataset.metadata.columns, dataset.metadata.kind) == (45, 9, "maze")
        assert kind_of(dataset.metadata) == Kind("maze", 5, 9, 6)
        part = dataset.sets["all"]
        found.append((part.inputs[0].tolist(), part.labels[0].tolist()))
    expected = [(tokens(LONG), tokens(SOLVED)), (tokens(other[0]), tokens(other[1]))]
    assert sorted(found) == sorted(expected)
    if form not in ("columns", "stacked"):
        solver = read_to_solve(str(path))
        assert (solver.kind.rows, solver.kind.cols) == (5, 9)
        assert [puzzle.question.tolist() for puzzle in solver.puzzles] == [first for first, _ in expected]


def test_generated_rectangles_train_and_solve(tmp_path: Path, capsys: Any) -> None:
    words = ["--size", "5x8", "--num-train", "20", "--num-test", "4", "--num-aug", "3"]
    status, out = build(tmp_path, *words)
    assert (
        status == 0 and main(["inspect", str(out), "--samples", "1", "--png", str(tmp_path / "a.png")]) == 0
    )
    dataset = PuzzleDataset(out, "train")
    part = dataset.sets["all"]
    assert solved(np.asarray(part.inputs), np.asarray(part.labels), 8).all() and len(part.inputs) == 80
    grids = np.asarray(part.inputs).reshape(-1, 4, 5, 8)
    # Each maze with its three others that keep the shape: half a turn and two reflections.
    for first, *others in grids:
        turned = [symmetric(first, number).tolist() for number in (2, 4, 5)]
        assert [each.tolist() for each in others] == turned
    cells = MazeSymmetries(kind_of(dataset.metadata))._cells
    assert cells.shape == (4, 40)
    tiny = ["arch.hidden_size=16", "arch.num_heads=2", "arch.H_layers=1", "arch.L_layers=1"]
    tiny += ["arch.H_cycles=1", "arch.L_cycles=1", "arch.halt_max_steps=2", "mode=eager", "device=cpu"]
    tiny += ["global_batch_size=4", "epochs=1", "eval_interval=null", "lr_warmup_steps=1", "augment=true"]
    assert (
        train.main([f"data_path={out}", f"output_dir={tmp_path}", "project_name=p", "run_name=r", *tiny]) == 0
    )
    assert evaluate([f"checkpoint={tmp_path}/p/r"]) == 0
    capsys.readouterr()
    (tmp_path / "maze.txt").write_text("########\n#S     #\n# #### #\n#     E#\n########\n")
    page = tmp_path / "page.html"
    assert solve([f"{tmp_path}/p/r", str(tmp_path / "maze.txt"), "--html", str(page)]) in (0, 1)
    assert "answer:\n" in capsys.readouterr().out and page.is_file()


def test_symmetric_rectangles_are_one_maze_and_none_is_there_twice() -> None:
    (mazes,) = generate(Request(6, 9, seed=2), "train", 200, set())
    found = keys(mazes.questions, 9)
    assert len(set(found.tolist())) == 200
    grids = mazes.questions.reshape(-1, 6, 9)
    for number in (2, 4, 5):
        turned = np.ascontiguousarray(symmetric(grids, number)).reshape(200, -1)
        assert keys(turned, 9).tolist() == found.tolist()


@pytest.fixture
def faulty(tmp_path: Path) -> str:
    plain = LONG.replace("\n", "")
    rows = [plain, plain[:-1], plain.replace("S", "?"), plain.replace("G", "."), SWAPPED]
    (tmp_path / "mazes.csv").write_text("\n".join(["question", *rows]) + "\n")
    return str(tmp_path / "mazes.csv")


def test_invalid_mazes_are_one_error_or_skipped(faulty: str, tmp_path: Path, capsys: Any) -> None:
    words = ["--source", faulty, "--columns", "9", "--test-size", "0.5"]
    assert build(tmp_path, *words)[0] == 2
    assert capsys.readouterr().err.rpartition("\r")[2].strip() == (
        f"error: {faulty}: line 3: question of 44 characters, expected 45 as in the first row of the file; "
        f"{faulty}: line 4: question: row 2, column 2 is '?', expected one of '#', ' ', 'S', 'G', 'o', 'E', "
        f"'X'; {faulty}: line 5: question: there is no G, expected one; 3 bad in all, --skip-bad leaves them "
        "out"
    )
    status, out = build(tmp_path, *words, "--skip-bad")
    printed = capsys.readouterr().out
    assert status == 0 and "mazes.csv: left out 3 bad:" in printed and "line 5: question: there" in printed
    assert [len(PuzzleDataset(out, split).sets["all"].inputs) for split in ("train", "test")] == [1, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--size", "5x8", "--num-aug", "4"],
            "num_aug=4: expected 0 to 3, the other symmetries of a rectangle of 5 x 8",
        ),
        (["--size", "4x9"], "size=4: expected at least 5"),
        (["--size", "400x200"], "size=400x200: expected at most 65,536 cells"),
        (["--columns", "9"], "--columns has no meaning for --source generated; leave it out"),
    ],
)
def test_requests_for_no_rectangle(tmp_path: Path, capsys: Any, words: list[str], message: str) -> None:
    assert build(tmp_path, *words)[0] == 2
    assert message in capsys.readouterr().err


def test_text_files_in_a_folder_and_their_faults(tmp_path: Path, capsys: Any) -> None:
    square = "#####\n#S  #\n# # #\n#  G#\n#####\n"
    turned = square.replace("S", "x").replace("G", "S").replace("x", "G")
    source = tmp_path / "source"
    source.mkdir()
    (source / "train.txt").write_text(square.replace("\n", "") + "\n" + turned.replace("\n", ""))
    (source / "test.txt").write_text(f"a title\n{square.replace('# # #', '#   #')}")
    status, out = build(tmp_path, "--source", str(source))
    assert status == 0
    assert [len(PuzzleDataset(out, split).sets["all"].inputs) for split in ("train", "test")] == [1, 1]
    # A row of the second grid is too short, and the third has a letter that no maze has.
    grids = [square, square.replace("#S  #", "#S #"), square.replace("S", "@")]
    (source / "test.txt").write_text("\n".join(grids))
    assert build(tmp_path, "--source", str(source))[0] == 2
    error = capsys.readouterr().err
    assert "test.txt: line 7: question with rows of other lengths than 5" in error
    assert "test.txt: line 13: question: row 2, column 2 is '@'" in error
    (source / "test.txt").write_text("name,board\na,b\n")
    assert build(tmp_path, "--source", str(source))[0] == 2
    assert "test.txt: line 1: no column 'question' among 'name', 'board'; rename" in capsys.readouterr().err
