"""The forms in which collections write Sudokus: builder and solver read the same puzzles from all of them."""

import gzip
import re
from pathlib import Path

import numpy as np
import pytest

from hrm.common.errors import UserError
from hrm.data.__main__ import main
from hrm.data.dataset import PuzzleDataset
from hrm.data.puzzle_kinds import kind_of
from hrm.data.sudoku.build import generate
from hrm.data.sudoku.files import read_puzzles
from hrm.data.sudoku.solver import SudokuError, solutions
from hrm.solving.read_puzzles import read_puzzles as read_to_solve

# Two puzzles of 4x4 with one solution each.
P, A = "1.3.34122.43..2.", "1234341221434321"
Q, B = "3..121.3..121..4", "3421214343121234"
ZEROS = P.replace(".", "0")
GRID = [P[first : first + 4] for first in range(0, 16, 4)]
RULED = "+--+--+\n" + "".join(
    f"|{row[:2]}|{row[2:]}|\n" + ("+--+--+\n" if n % 2 else "") for n, row in enumerate(GRID)
)


def digits(text: str) -> list[int]:
    return [0 if cell in ".0*_" else int(cell) for cell in text]


@pytest.mark.parametrize(
    ("name", "text", "difficulty"),
    [
        ("quizzes.csv", f"quizzes,solutions\n{ZEROS},{A}\n", None),
        ("kaggle.csv", f"id,puzzle,solution,clues,difficulty\n1,{P},{A},11,1.5\n", 1),
        ("official.csv", f"source,question,answer,rating\ng,{P},{A},7\n", 7),
        ("spaces.csv", f"source, question, answer, rating\ng, {P}, {A}, 1.0\n", 1),
        ("semicolons.csv", f"source;question;answer;rating\ng;{P};{A};3\n", 3),
        ("tabs.tsv", f"Puzzle\tSolution\tRating\n{P}\t{A}\t2.9\n", 2),
        ("words.txt", f"puzzle  rating\n{P}  4\n", 4),
        ("quoted.csv", f'"puzzle","solution"\n"{P}","{A}"\n', None),
        ("lines in a field.csv", "puzzle,solution\n" + '"{}",{}\n'.format("\n".join(GRID), A), None),
        ("empty.csv", f"question,answer,rating\n{P},{A},\n", None),
        ("unsolved.csv", f"question,answer,rating\n{P},,5\n", 5),
        ("bare.csv", f"{P},{A}\n", None),
        ("pipes.csv", f"puzzle|solution\n{P}|{A}\n", None),
        ("unnamed.csv", f"sudoku,key\n{P},{A}\n", None),
        ("colon.txt", f"// from somewhere\n{P}:{A}\n", None),
        ("comma.csv", f"puzzle;solution;difficulty\n{P};{A};1,5\n", 1),
        ("nan.csv", f",puzzle,solution,difficulty\n0,{P},{A},nan\n", None),
        ("lists.csv", f'quizzes,solutions\n"{list(map(int, ZEROS))}","{list(map(int, A))}"\n', None),
        ("bank.txt", f"0123456789ab {ZEROS}  1.2\n", 1),
        ("comment.txt", f"# two\n\n{P} # easy\n", None),
        ("stars.txt", P.replace(".", "*") + "\n", None),
        ("underscores.txt", P.replace(".", "_") + "\r\n", None),
        ("lines.sdm", ZEROS + "\n", None),
        ("grid.sdk", "#A somebody\n[Puzzle]\n" + "\n".join(GRID) + f"\n[State]\n{A[:4]}\n", None),
        ("ruled.ss", RULED, None),
        ("stars.ss", RULED.replace("+--+--+", "*-----*", 1), None),
        ("spaced.txt", "\n".join(f"{' '.join(row[:2])} | {' '.join(row[2:])}" for row in GRID), None),
        ("pairs.txt", "\n".join(f"{row[:2]} {row[2:]}" for row in GRID), None),
    ],
)
def test_every_form_gives_the_puzzle(tmp_path: Path, name: str, text: str, difficulty: int | None) -> None:
    path = tmp_path / name
    path.write_text(text)
    read = read_puzzles(path, 4)
    assert read.questions.tolist() == [digits(P)] and read.answers.tolist() == [digits(A)]
    guesses = solutions(np.array(digits(P), np.uint8))[1]
    assert read.difficulty.tolist() == [guesses if difficulty is None else difficulty]
    solved = read_to_solve(str(path))
    assert (solved.kind.name, solved.kind.rows) == ("sudoku", 4)
    assert [(puzzle.question - 1).tolist() for puzzle in solved.puzzles] == [digits(P)]
    assert solved.puzzles[0].answer is not None and (solved.puzzles[0].answer - 1).tolist() == digits(A)


def test_an_unclosed_quote_affects_only_its_line(tmp_path: Path) -> None:
    path = tmp_path / "open.csv"
    path.write_text(f'puzzle,solution\n"{P},{A}\n' + f"{Q},{B}\n" * 100)
    with pytest.raises(SudokuError, match="line 2: 1 field, expected 2 as in the header") as caught:
        read_puzzles(path, 4)
    assert "line 3" not in str(caught.value)


def test_several_grids_with_titles(tmp_path: Path) -> None:
    other = [Q[first : first + 4] for first in range(0, 16, 4)]
    path = tmp_path / "grids.txt"
    path.write_text("\n".join(["Grid 01", *GRID, "Grid 02", *other]))
    assert read_puzzles(path, 4).questions.tolist() == [digits(P), digits(Q)]
    assert len(read_to_solve(str(path)).puzzles) == 2
    path.write_text("\n".join(["Grid 01", *GRID[:3], "Grid 02", *other]))
    with pytest.raises(SudokuError, match="line 2: question of 12 characters, expected 16"):
        read_puzzles(path, 4)


def sixteen() -> tuple[np.ndarray, np.ndarray]:
    puzzles, _ = generate(16, 3, 1, seed=2, clues=150)
    return puzzles.questions, puzzles.answers


HEX, TO_G = "0123456789ABCDEF", "123456789ABCDEFG"


def spelled(grid: np.ndarray, form: str) -> str:
    if form == "numbers":
        rows = [" ".join(map(str, row)) for row in grid.reshape(16, 16).tolist()]
        return "\n".join(rows)
    symbols, blank = {"hex": (HEX, "."), "to G": (TO_G, "."), "to g, 0": (TO_G.lower(), "0")}[form]
    return "".join(symbols[digit - 1] if digit else blank for digit in grid.tolist())


@pytest.mark.parametrize("form", ["hex", "to G", "to g, 0", "numbers"])
def test_16x16_in_every_spelling(tmp_path: Path, form: str) -> None:
    questions, answers = sixteen()
    path = tmp_path / "sixteen.txt"
    path.write_text("\n".join(spelled(question, form) for question in questions))
    read = read_puzzles(path, 16)
    np.testing.assert_array_equal(read.questions, questions)
    np.testing.assert_array_equal(read.answers, answers)
    solved = read_to_solve(str(path))
    assert solved.kind.rows == 16
    np.testing.assert_array_equal([puzzle.question - 1 for puzzle in solved.puzzles], questions)
    found = [puzzle.answer for puzzle in solved.puzzles]
    np.testing.assert_array_equal(np.array(found) - 1, answers)


def test_16x16_is_generated_and_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--size", "16", "--num-train", "4", "--num-test", "2", "--num-aug", "2"]
    assert main(["sudoku", *words, "--output-dir", str(tmp_path / "out")]) == 0
    data = PuzzleDataset(tmp_path / "out", "train")
    kind = kind_of(data.metadata, data.sets)
    assert (kind.name, kind.rows, data.metadata.vocab_size) == ("sudoku", 16, 18)
    # The tokens of a board, written and read again.
    board = data.sets["all"].inputs[1]
    np.testing.assert_array_equal(kind.parse(kind.text(board)), board)
    assert main(["inspect", str(tmp_path / "out"), "--deep"]) == 0
    assert "violations: 0" in capsys.readouterr().out
    clues = (np.array(data.sets["all"].inputs) > 1).sum(axis=1)
    assert clues.tolist() == [110] * 12


def test_all_faults_are_reported_together_or_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several, none = "1" + "." * 15, "123....4........"
    lines = [
        "question,answer",
        f"{P},{A}",
        f"{Q}x,{B}",
        f"{P[:3]}9{P[4:]},{A}",
        f"{Q},{B[::-1]}",
        f"{Q},{B}",
        "a",
    ]
    source, out = tmp_path / "bad.csv", tmp_path / "out"
    source.write_text("\n".join(lines))
    words = ["sudoku", "--size", "4", "--source", str(source), "--output-dir", str(out)]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert [int(line) for line in re.findall(r"bad\.csv: line (\d+)", error)] == [3, 4, 5, 7]
    assert "4 bad in all, --skip-bad leaves them out" in error and not out.exists()
    assert main([*words, "--skip-bad"]) == 0
    told = capsys.readouterr().out
    assert "bad.csv: left out 4 bad:" in told and "line 4: character '9' at place 4 of the question" in told
    rows = [PuzzleDataset(out, split).sets["all"].inputs for split in ("train", "test")]
    assert sorted((np.concatenate(rows) - 1).tolist()) == sorted([digits(P), digits(Q)])
    source.write_text("\n".join([P, several, none, Q]))
    assert main(words) == 2
    assert "line 2: the puzzle has several solutions" in (error := capsys.readouterr().err)
    assert "line 3: the puzzle has no solution" in error and "2 bad in all, --skip-improper" in error
    assert main([*words, "--skip-bad"]) == 0
    assert "left out 2 improper" in capsys.readouterr().out
    # However many faults there are, the report stays short.
    source.write_text("\n".join([P, *[several + "1"] * 5000]))
    assert main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "and 4,990 more; 5,000 bad in all" in error and len(error) < 2000


def test_columns_of_unknown_names_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "boards.csv"
    path.write_text("number;board;key\n1;x;y\n")
    with pytest.raises(SudokuError, match="no column 'question' among 'number', 'board', 'key'; rename one"):
        read_puzzles(path, 4)


def test_a_field_longer_than_the_csv_module_reads_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    path.write_text("1" * 200_000 + ",2\n")
    with pytest.raises(UserError, match=r"long\.csv: 200001 cells in one line of 1; expected 16, 36 or 81"):
        read_to_solve(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"puzzle\n", mtime=0), "bad.csv: packed by gzip; unpack it"),
        (f"puzzle\n{P}".encode("utf-16"), "bad.csv: text in UTF-16; save it in UTF-8"),
        (b'{"question": "1..."}\n', "bad.csv: line 1: JSON; write it as a .csv file with the columns"),
        (
            f"puzzle\n{ZEROS[1:]}".encode(),
            "expected 16 for size 4; read the column as text, because leading zeros are missing",
        ),
    ],
)
def test_files_without_puzzle_text_are_reported(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(SudokuError, match=message):
        read_puzzles(path, 4)
