"""What tokens mean: boards read, written, drawn, and judged as brute force judges them."""

import importlib
import io
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrm.common.errors import UserError
from hrm.data.arc.augment import canvas
from hrm.data.arc.rules import arc_grid
from hrm.data.format import Metadata
from hrm.data.inspect import render
from hrm.data.inspect.rules import broken
from hrm.data.maze.search import solved
from hrm.data.puzzle_kinds import Kind, kind_for, kind_of
from hrm.data.sudoku.solver import BOXES, random_grid, random_puzzle

# It comes with PyTorch, and without types.
networkx: Any = importlib.import_module("networkx")
MAZE = Kind("maze", 5, 5)
ARC = Kind("arc", 30, 30)
QUESTION = """\
#####
#S..#
#.#.#
#..G#
#####"""


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def sudoku(size: int) -> Kind:
    return Kind("sudoku", size, size)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize(
    ("vocab_size", "seq_len", "name", "rows", "cols"),
    [
        (11, 81, "sudoku", 9, 9),
        (8, 36, "sudoku", 6, 6),
        (6, 16, "sudoku", 4, 4),
        (12, 900, "arc", 30, 30),
        (6, 900, "maze", 30, 30),
        (6, 25, "maze", 5, 5),
        (6, 24, "tokens", 1, 24),
        (11, 900, "tokens", 30, 30),
        (12, 81, "tokens", 9, 9),
    ],
)
def test_vocabulary_and_cells_determine_the_kind(
    vocab_size: int, seq_len: int, name: str, rows: int, cols: int
) -> None:
    metadata = Metadata(0, 0, 0, vocab_size, seq_len, 1, 1, 1.0, ["all"])
    assert kind_of(metadata) == kind_for(vocab_size, seq_len) == Kind(name, rows, cols, vocab_size)


# --- read and written


@pytest.mark.parametrize("size", [4, 6, 9])
def test_a_sudoku_is_read_in_every_form_and_as_it_was_written(size: int) -> None:
    kind, puzzle = sudoku(size), random_puzzle(random_grid(size, rng()), rng())
    digits = "".join(map(str, puzzle))
    rows = [digits[first : first + size] for first in range(0, size * size, size)]
    forms = [digits, digits.replace("0", "."), "\n".join(rows), "\n".join(map(" ".join, rows)) + "\n\n"]
    for text in [*forms, kind.text(puzzle + 1)]:
        tokens = kind.parse(text)
        assert tokens.dtype == np.uint8
        np.testing.assert_array_equal(tokens, puzzle + 1)


def test_a_sudoku_has_rules_between_its_boxes() -> None:
    text = sudoku(6).text(np.arange(36) % 7 + 1)
    assert text.splitlines()[:4] == [". 1 2 | 3 4 5", "6 . 1 | 2 3 4", "------+------", "5 6 . | 1 2 3"]
    assert sudoku(4).text([0, 1, 2, 3] + [5] * 12).splitlines()[0] == "_ . | 1 2"


def test_a_maze_is_read_and_written() -> None:
    tokens = MAZE.parse(QUESTION)
    assert tokens.tolist()[5:10] == [1, 3, 2, 2, 1]
    assert MAZE.text(tokens) == QUESTION
    for text in (QUESTION.replace(".", " "), QUESTION.replace("\n", ""), "\n" + QUESTION + "\n"):
        np.testing.assert_array_equal(MAZE.parse(text), tokens)


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (30, 30), (30, 4)])
def test_an_arc_grid_is_read_onto_its_canvas_and_cut_from_it(shape: tuple[int, int]) -> None:
    grid = rng().integers(0, 10, shape)
    lines = ["".join(map(str, row)) for row in grid]
    tokens = ARC.parse("\n".join(" ".join(line) for line in lines))
    np.testing.assert_array_equal(tokens, canvas(grid.astype(np.uint8)))
    assert ARC.text(tokens) == "\n".join(lines)
    moved = canvas(grid.astype(np.uint8), 30 - shape[0], 30 - shape[1])
    assert ARC.text(moved) == "\n".join(lines)
    assert arc_grid(moved) == (slice(30 - shape[0], 30), slice(30 - shape[1], 30))


def test_a_damaged_canvas_is_shown_completely() -> None:
    tokens = canvas(np.full((2, 3), 4, np.uint8))
    tokens[0] = 0
    assert ARC.text(tokens).splitlines()[:4] == [
        "_44|" + "_" * 26,
        "444|" + "_" * 26,
        "|||" + "_" * 27,
        "_" * 30,
    ]


def test_other_tokens_are_numbers() -> None:
    kind = Kind("tokens", 1, 3, 300)
    tokens = kind.parse("7, 299 0")
    assert tokens.tolist() == [7, 299, 0] and tokens.dtype == np.uint16
    assert kind.parse(kind.text(tokens)).tolist() == [7, 299, 0]
    assert Kind("tokens", 1, 1).parse("255").dtype == np.uint8


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (
            sudoku(4),
            "1234" * 3 + "12x4",
            "row 4, column 3 is 'x', expected a digit 1 to 4, or '.' or 0 for a blank",
        ),
        (sudoku(4), "1234\n1254\n1234\n1234", "row 2, column 3 is '5', expected a digit 1 to 4"),
        (sudoku(4), "12%4" * 4, "row 1, column 3 is '%', expected"),
        (sudoku(4), "1" * 15, "15 cells in one line, expected 16 cells in one line or 4 lines of 4"),
        (sudoku(4), "", "0 lines, expected 16 cells"),
        (sudoku(4), "1234\n123\n1234\n1234", "row 2 has 3 cells, expected 4"),
        (sudoku(4), "1234\n12345\n1234\n1234", "row 2 has 5 cells, expected 4"),
        (
            MAZE,
            QUESTION.replace("G", "g"),
            "row 4, column 4 is 'g', expected '#', 'S', 'G' (or E), 'o' (or X), or '.' or a space",
        ),
        (MAZE, QUESTION.replace("#S..#", "#S.."), "row 2 has 4 cells, expected 5; a cell is '#'"),
        (MAZE, QUESTION + "\n#####", "6 lines, expected 25 cells in one line or 5 lines of 5"),
        (ARC, "012\n34a", "row 2, column 3 is 'a', expected a colour 0 to 9"),
        (ARC, "012\n34|", "row 2, column 3 is '|', expected a colour 0 to 9"),
        (ARC, "012\n34", "row 2 has 2 cells, expected 3"),
        (ARC, "\n", "0 lines, expected a grid of 1 to 30 rows and 1 to 30 columns"),
        (ARC, "0" * 31, "1 line of 31, expected a grid of 1 to 30 rows"),
        (Kind("tokens", 1, 2, 5), "1 5", "row 1, column 2 is '5', expected a whole number from 0 to 4"),
        (Kind("tokens", 1, 2, 5), "1 ²", "row 1, column 2 is '²'"),
        (Kind("tokens", 1, 2, 5), "1", "1 number, expected 2"),
    ],
)
def test_unreadable_input_is_reported(kind: Kind, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        kind.parse(text)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_colours_mark_differences_from_the_question() -> None:
    question = sudoku(4).parse("1..." + "." * 12)
    answer = sudoku(4).parse("23.." + "." * 12)
    text = sudoku(4).text(answer, question, color=True)
    assert text.startswith("\x1b[1;31m2\x1b[0m \x1b[1;36m3\x1b[0m | . .\n")
    assert plain(text) == sudoku(4).text(answer) == sudoku(4).text(answer, question)
    # Without a question nothing is new.
    assert sudoku(4).text(answer, color=True) == plain(text)
    grid = canvas(np.arange(10, dtype=np.uint8).reshape(2, 5))
    assert plain(ARC.text(grid, color=True)).replace(" ", "") == ARC.text(grid) == "01234\n56789"
    assert len(set(re.findall(r"48;5;(\d+)m", ARC.text(grid, color=True)))) == 10


def test_boards_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(24,\), expected \(25,\)"):
        MAZE.text([1] * 24)


# --- Sudoku's rules


def test_sudoku_answers_are_judged_as_by_brute_force() -> None:
    draw, kinds = rng(3), 0
    for size in (4, 6, 9):
        kind, (height, width) = sudoku(size), BOXES[size]
        questions, answers, right = [], [], []
        for _ in range(150):
            answer = random_grid(size, draw).astype(np.int64)
            question = np.where(draw.random(size * size) < 0.4, answer, 0)
            for _ in range(draw.integers(0, 3)):
                answer[draw.integers(size * size)] = draw.integers(0, size + 2)
            square = answer.reshape(size, size)
            boxes = square.reshape(size // height, height, size // width, width).swapaxes(1, 2)
            lines = [*square, *square.T, *boxes.reshape(size, size)]
            solved_it = all(sorted(line) == list(range(1, size + 1)) for line in lines)
            right.append(solved_it and bool(((question == 0) | (question == answer)).all()))
            questions.append(question + 1)
            answers.append(answer + 1)
        assert [not kind.problems(q, a) for q, a in zip(questions, answers, strict=True)] == right
        assert (~broken(kind, np.array(questions), np.array(answers))).tolist() == right
        kinds += len(set(right))
    assert kinds == 6


def test_broken_sudoku_rules_are_named() -> None:
    kind = sudoku(4)
    answer = kind.parse("1234341221434321")
    assert kind.problems(kind.parse("1" + "." * 15), answer) == []
    wrong = answer.copy()
    wrong[[0, 5]] = 5, 1
    assert kind.problems(kind.parse("1" + "." * 15), wrong) == [
        "row 1, column 1: the clue 1 was changed",
        "row 2, column 2 has no digit",
        "row 1 holds 4 twice, at row 1, column 1 and row 1, column 4",
        "column 1 holds 4 twice, at row 1, column 1 and row 4, column 1",
    ]
    wrong[:] = 2
    assert (
        "box 4 holds 1 4 times, at row 3, column 3; row 3, column 4; row 4, column 3 and row 4, column 4"
        in (kind.problems(kind.parse("." * 16), wrong))
    )


def test_impossible_sudokus_are_explained() -> None:
    kind = sudoku(4)
    assert kind.impossible(kind.parse("1...............")) == ["the puzzle has several solutions"]
    assert kind.impossible(kind.parse("12..3.....4....2")) == []
    assert kind.impossible(kind.parse("1234" + "3412" + "2143" + "4321")) == []
    assert kind.impossible(kind.parse("1..1............")) == [
        "row 1 holds 1 twice, at row 1, column 1 and row 1, column 4"
    ]
    # The last cell of the first row has no digit left.
    assert kind.impossible(kind.parse("123....4........")) == ["the puzzle has no solution"]
    assert kind.impossible([0] + [1] * 14 + [6]) == [
        "row 1, column 1 is neither a digit nor blank",
        "row 4, column 4 is neither a digit nor blank",
    ]


# --- the rules of mazes


def graph_of(maze: np.ndarray, side: int) -> Any:
    graph = networkx.grid_2d_graph(side, side)
    graph.remove_nodes_from([(c // side, c % side) for c in np.nonzero(maze == 1)[0]])
    return networkx.relabel_nodes(graph, {(r, c): r * side + c for r, c in graph})


def marked(question: np.ndarray, path: list[int]) -> np.ndarray:
    answer = question.copy()
    answer[path[1:-1]] = 5
    return answer


def test_maze_answers_are_judged_as_by_an_independent_solver() -> None:
    draw = rng(5)
    seen: set[str] = set()
    for side in (5, 6, 7):
        kind, questions, answers, right = Kind("maze", side, side), [], [], []
        for _ in range(60):
            question = np.where(draw.random(side * side) < 0.3, 1, 2).astype(np.uint8)
            start, goal = draw.choice(side * side, 2, replace=False).tolist()
            question[[start, goal]] = 3, 4
            graph = graph_of(question, side)
            if not networkx.has_path(graph, start, goal):
                assert kind.impossible(question) == ["no path leads from S to G"]
                assert kind.problems(question, question) == ["no path leads from S to G"]
                continue
            assert kind.impossible(question) == []
            shortest = list(itertools.islice(networkx.all_shortest_paths(graph, start, goal), 4))
            others = list(
                itertools.islice(networkx.all_simple_paths(graph, start, goal, len(shortest[0]) + 3), 6)
            )
            good = {
                marked(question, path).tobytes() for path in networkx.all_shortest_paths(graph, start, goal)
            }
            for path in (*shortest, *others):
                answer = marked(question, path)
                for _ in range(draw.integers(0, 3)):
                    answer[draw.integers(side * side)] = draw.integers(0, 7)
                questions.append(question)
                answers.append(answer)
                right.append(answer.tobytes() in good)
                problems = kind.problems(question, answer)
                assert (problems == []) == right[-1]
                seen.update(re.sub(r"\d+|'.'", "N", problem).split(",")[0] for problem in problems)
        assert solved(np.array(questions), np.array(answers), side).tolist() == right
        assert broken(kind, np.array(questions), np.array(answers)).tolist() == np.logical_not(right).tolist()
    assert seen >= {
        "a cell was changed",
        "N cells were changed",
        "the path from S ends at row N",
        "the path takes N steps",
        "N marked cell is not on the way from S to G",
    }


def test_broken_maze_rules_are_named() -> None:
    question = MAZE.parse(QUESTION)

    def problems(answer: str) -> list[str]:
        return MAZE.problems(question, MAZE.parse(answer))

    assert problems("######Soo##.#o##..G######") == []
    assert problems("######S..##o#.##ooG######") == []
    assert problems("######S.o##.#o##..G######") == [
        "the path from S ends at row 2, column 2 and does not reach G"
    ]
    assert problems("######So.##.#o##..G######") == [
        "the path from S ends at row 2, column 3 and does not reach G"
    ]
    assert problems("######Soo##.#o##o.G######") == ["1 marked cell is not on the way from S to G"]
    assert problems("#####oSoo##.#o##..G######") == [
        "a cell was changed, the first at row 2, column 1: '#' became 'o'"
    ]
    assert problems("######.oo##.#o##..S######") == [
        "2 cells were changed, the first at row 2, column 2: 'S' became '.'"
    ]
    longer = Kind("maze", 5, 5).parse("S...." + "####." + "....." + ".####" + "....G")
    assert MAZE.problems(longer, longer)[0].startswith("the path from S ends at row 1, column 1")
    ring = MAZE.parse("S.G##" + ".#.##" + "...##" + "#####" + "#####")
    around = MAZE.parse("S.G##" + "o#o##" + "ooo##" + "#####" + "#####")
    assert MAZE.problems(ring, around) == ["the path takes 6 steps, the shortest 2"]


def test_impossible_mazes_are_explained() -> None:
    def impossible(text: str) -> list[str]:
        return MAZE.impossible(MAZE.parse(text))

    assert impossible(QUESTION) == []
    assert impossible(QUESTION.replace("S", ".")) == ["there is no S, expected one"]
    assert impossible(QUESTION.replace("S.", "SS")) == [
        "there are 2 S, expected one: row 2, column 2; row 2, column 3"
    ]
    assert impossible(QUESTION.replace("S..", "Soo")) == [
        "row 2, column 3 is 'o', a path, and so are 1 more; expected '#', '.', 'S' or 'G'"
    ]
    assert impossible(QUESTION.replace(".G", "#G").replace("#.#.#", "#.###")) == ["no path leads from S to G"]
    assert MAZE.impossible([0] * 25)[0].startswith("row 1, column 1 is no cell of a maze")


# --- ARC's canvas


def test_a_canvas_is_valid_only_if_unchanged() -> None:
    draw = rng(7)
    for _ in range(12):
        height, width = draw.integers(1, 31, 2)
        row, column = draw.integers(0, 31 - height), draw.integers(0, 31 - width)
        grid = draw.integers(0, 10, (height, width)).astype(np.uint8)
        tokens = canvas(grid, row, column)
        assert ARC.impossible(tokens) == []
        # Every cell once, by a mark or padding where neither can be.
        damaged = np.repeat(tokens[None], 900, axis=0)
        damaged[range(900), range(900)] = np.where(tokens == 0, 1, 0)
        wrong = broken(ARC, damaged, damaged)
        told = [bool(ARC.impossible(board)) for board in damaged[::7]]
        assert wrong.tolist()[::7] == told
        assert wrong.all()
        foreign = tokens.copy()
        foreign[int(draw.integers(900))] = 12
        assert broken(ARC, foreign[None], foreign[None]).tolist() == [bool(ARC.impossible(foreign))] == [True]


def test_a_malformed_canvas_is_explained() -> None:
    tokens = canvas(np.full((2, 3), 4, np.uint8), 1, 1)
    assert ARC.impossible(np.zeros(900, int)) == ["there is no grid: no cell holds a colour"]
    hole = tokens.copy()
    hole[2 * 30 + 2] = 1
    assert ARC.impossible(hole) == ["the colours do not fill a rectangle: row 3, column 3 has none"]
    open_end = tokens.copy()
    open_end[3 * 30 + 1] = 0
    assert ARC.impossible(open_end) == [
        "the grid is not surrounded by end marks and padding: row 4, column 2"
    ]


def test_only_the_grid_of_an_answer_counts() -> None:
    tokens = canvas(np.full((2, 3), 4, np.uint8))
    littered = np.where(tokens == 0, 7, tokens)
    assert ARC.problems(tokens, littered) == [] and ARC.text(littered) == "444\n444"
    elsewhere = canvas(np.full((2, 3), 4, np.uint8), 1, 1)
    assert ARC.problems(tokens, elsewhere) == ["there is no grid: the upper left corner holds no colour"]


# --- drawn


def pixels(kind: Kind, tokens: np.ndarray, question: np.ndarray | None = None, side: int = 20) -> np.ndarray:
    """A board drawn over a whole picture: by row and column a cell's side x side pixels, red, green, blue."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    figure = Figure(figsize=(kind.cols * side / 100, kind.rows * side / 100), dpi=100)
    render.DRAW[kind.name](figure.add_axes((0, 0, 1, 1)), kind, kind.board(tokens), question)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    file.seek(0)
    image = np.round(imread(file)[..., :3] * 255).astype(int)
    return image.reshape(kind.rows, side, kind.cols, side, 3).swapaxes(1, 2)


def rgb(colour: str) -> list[int]:
    return [int(colour[place : place + 2], 16) for place in (1, 3, 5)]


def test_a_maze_is_drawn_in_its_colours() -> None:
    tokens = MAZE.parse("######Soo##.#o##..G######")
    cells = pixels(MAZE, tokens)[:, :, 10, 10].reshape(-1, 3)
    assert cells.tolist() == [rgb(render.MAZE_COLOURS[token]) for token in tokens]


def test_an_arc_canvas_is_drawn_in_ten_colours() -> None:
    tokens = canvas(np.arange(900).reshape(30, 30).astype(np.uint8) % 10)
    cells = pixels(ARC, tokens)[:, :, 10, 10].reshape(-1, 3)
    assert cells.tolist() == [rgb(render.ARC_COLOURS[token]) for token in tokens]


def test_a_sudoku_is_drawn_with_its_clues_bold_and_answers_blue() -> None:
    kind = sudoku(4)
    question, answer = kind.parse("1..." + "." * 12), kind.parse("12.." + "." * 12)
    answer[4] = question[4] = 3
    answer[4] = 4
    cells = pixels(kind, answer, question, 80)[:, :, 4:-4, 4:-4]

    def nearest(cell: np.ndarray) -> str:
        colours = (render.INK, render.FILLED, render.CHANGED)
        darkest = cell.reshape(-1, 3)[cell.reshape(-1, 3).sum(axis=1).argmin()]
        return min(colours, key=lambda colour: np.abs(darkest - rgb(colour)).sum())

    assert [nearest(cells[0, 0]), nearest(cells[0, 1]), nearest(cells[1, 0])] == [
        render.INK,
        render.FILLED,
        render.CHANGED,
    ]
    assert (cells[2:] == 255).all()


@pytest.mark.parametrize("kind", [sudoku(4), MAZE, ARC, Kind("tokens", 1, 7, 30)])
def test_boards_are_drawn_as_png(kind: Kind, tmp_path: Path) -> None:
    from matplotlib.image import imread

    board = np.ones(kind.rows * kind.cols, int)
    image = render.png(kind, [("question", board, None), ("an answer with a $ in it", board, board)] * 3)
    assert image.startswith(b"\x89PNG\r\n")
    height, width, _ = imread(io.BytesIO(image)).shape
    assert width == round(4 * render.BOARD * 110) and height == round(2 * (render.BOARD + render.TITLE) * 110)
