"""Targets that read puzzles: typed, in files, as ARC tasks; and those that judge and show boards."""

import json
from functools import cache
from random import Random
from typing import Any

import numpy as np

from hrm.common.errors import UserError
from tests.fuzz.judge import Target, given, put, text
from tests.fuzz.mutations import json_changed, lines_changed

# Two Sudokus of 4 x 4 cells with their solutions, and a maze.
SUDOKUS = (("12343412214343..", "1234341221434321"), ("1.3.341.2143..21", "1234341221434321"))
MAZE, PATH = "######S #### #### G######", "######So####o####oG######"
TASK = {
    "train": [{"input": [[0, 1], [2, 3]], "output": [[3, 2]]}],
    "test": [{"input": [[5]], "output": [[6]]}, {"input": [[7, 7], [8, 9]]}],
}


def read_puzzle(data: bytes) -> None:
    """As an argument, and as a file."""
    from hrm.solving.read_puzzles import read_puzzles

    refused = None
    try:
        read_puzzles(text(data))
    except UserError as error:
        refused = error
    read_puzzles(str(put("puzzles.txt", data)))
    if refused:
        raise refused


PUZZLES = (
    SUDOKUS[0][0].encode(),
    b"1 2 | 3 4\n3 4 | 1 2\n----+----\n2 1 | 4 3\n4 3 | . 1",
    "\n".join(question for question, _ in SUDOKUS).encode(),
    MAZE.encode(),
    b"53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79",
)


@cache
def kinds() -> tuple[Any, ...]:
    from hrm.data.puzzle_kinds import Kind

    return (
        *(Kind("sudoku", side, side, side + 2) for side in (4, 6, 9)),
        *(Kind("maze", side, side, 6) for side in (1, 2, 5)),
        Kind("arc", 30, 30, 12),
        Kind("tokens", 1, 3, 300),
    )


def read_board(data: bytes) -> None:
    """The first byte chooses the kind; what is read is shown, read again, and judged."""
    kind = kinds()[data[0] % len(kinds())] if data else kinds()[0]
    tokens = kind.parse(text(data[1:]))
    if tokens.max(initial=0) >= kind.vocab_size:
        raise AssertionError("a token beyond the vocabulary")
    if kind.name != "tokens":
        again = kind.parse(kind.text(tokens))
        if (again != tokens).any():
            raise AssertionError("a board that is shown is read as another one")
    judge_tokens(kind, tokens)


def board_changed(random: Random, data: bytes) -> bytes:
    kind = random.randrange(len(kinds())) if random.random() < 0.2 else data[0]
    return bytes([kind]) + lines_changed(random, data[1:])


def judge_board(data: bytes) -> None:
    """The first byte chooses the kind, the others are tokens: a model may predict anything."""
    kind = kinds()[data[0] % len(kinds())] if data else kinds()[0]
    cells = kind.rows * kind.cols
    tokens = np.frombuffer(data[1 : 1 + len(data[1:]) // 8 * 8], "<i8")
    judge_tokens(kind, np.resize(tokens, cells) if len(tokens) else np.zeros(cells, np.int64))


def judge_tokens(kind: Any, tokens: np.ndarray) -> None:
    other = tokens[::-1]
    problems = [*kind.impossible(tokens), *kind.problems(tokens, tokens), *kind.problems(tokens, other)]
    shown = [kind.text(tokens), kind.text(tokens, other, color=True).replace("\x1b", "")]
    if not all(line.isprintable() for line in (*problems, *"\n".join(shown).split("\n"))):
        raise AssertionError("control characters in what is said of a board")


BOARDS = (
    *(b"\0" + question.encode() for question, _ in SUDOKUS),
    bytes([5]) + MAZE.encode(),
    bytes([6]) + b"012\n345\n678",
    bytes([7]) + b"1 2 299",
)
TOKENS = (
    *(
        bytes([number]) + np.array(cells, "<i8").tobytes()
        for number in range(8)
        for cells in ([1], [2, 3, 4])
    ),
    bytes([6]) + np.array([2, 3, 1, *[0] * 27, 4, 5, 1, *[0] * 27, 1, 1, *[0] * 838], "<i8").tobytes(),
)


def read_task(data: bytes) -> None:
    """As a task to solve, and as a folder of tasks."""
    from hrm.data.arc.files import read_source
    from hrm.solving.read_puzzles import read_puzzles

    path = put("tasks/evaluation/task.json", data)
    found = read_puzzles(str(path))
    for puzzle in found.puzzles:
        found.kind.problems(puzzle.question, puzzle.question if puzzle.answer is None else puzzle.answer)
    list(read_source(str(path.parents[1])))


def read_kaggle(data: bytes) -> None:
    """Challenges and, behind a NUL, their solutions."""
    from hrm.data.arc.files import read_source

    challenges, _, solutions = data.partition(b"\0")
    put("kaggle/arc_training_solutions.json", solutions)
    list(read_source(str(put("kaggle/arc_training_challenges.json", challenges).with_name("arc_training"))))


def kaggle_changed(random: Random, data: bytes) -> bytes:
    parts = data.split(b"\0")
    number = random.randrange(2)
    return b"\0".join([*parts[:number], json_changed(random, parts[number]), *parts[number + 1 :]])


def read_sudokus(data: bytes) -> None:
    """As CSV, or as a puzzle a line."""
    from hrm.data.sudoku.files import read_puzzles

    read_puzzles(put("puzzles.csv" if b"," in data else "puzzles.txt", data), 4)


def read_mazes(data: bytes) -> None:
    from hrm.data.maze.files import read_mazes

    list(read_mazes(put("mazes.csv", data)))


SUDOKU_CSV = "source,question,answer,rating\n" + "".join(f"s,{q},{a},3\n" for q, a in SUDOKUS)
MAZE_CSV = f"source,question,answer,rating\ns,{MAZE},{PATH},3\n"
CSV_WORDS = (
    b",",
    b'"',
    b"\n",
    b"\r",
    b"\0",
    "é".encode(),
    b"9" * 5000,
    b"-1",
    b"3000000000",
    b"\xff",
    b"question",
)


_TASK = json.dumps(TASK).encode()
_KAGGLE = json.dumps({"t1": TASK}).encode() + b'\0{"t1": [[[6]], [[3, 2]]]}'
_WORDS = (b"\n", b"#", b"S", b"o", b"9", b"0", b".", b"|", b"\xff", "é".encode(), "\u2028".encode())
TARGETS = (
    Target("puzzle", read_puzzle, given(*PUZZLES), lines_changed, _WORDS),
    Target("board", read_board, given(*BOARDS), board_changed, _WORDS),
    Target("tokens", judge_board, given(*TOKENS), None, tuple(n.to_bytes(8, "little") for n in range(13))),
    Target("task", read_task, given(_TASK), json_changed),
    Target("kaggle", read_kaggle, given(_KAGGLE), kaggle_changed),
    Target("sudokus", read_sudokus, given(SUDOKU_CSV.encode(), PUZZLES[2]), lines_changed, CSV_WORDS),
    Target("mazes", read_mazes, given(MAZE_CSV.encode()), lines_changed, CSV_WORDS),
)
