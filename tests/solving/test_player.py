"""The page that plays a model's thinking: what it holds, and what a browser shows of it."""

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hrm.data.arc.augment import canvas
from hrm.data.puzzle_kinds import Kind
from hrm.data.sudoku.solver import random_grid, random_puzzle
from hrm.solving.player import page
from hrm.solving.trace import Gate, Step, Trace
from tests.support.browser import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

SOURCES = {"L": ("primary", "secondary", "input"), "H": ("primary", "secondary")}
HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='hacked = 1'>\"'`&amp;\u2028\u2029<!--${1}"
)


# --- traces


def gates(step: int, cells: int) -> dict[str, dict[str, Gate]]:
    """Gates that open from step to step, of each cell by another amount."""
    made: dict[str, dict[str, Gate]] = {module: {} for module in SOURCES}
    names = [(module, source) for module, sources in SOURCES.items() for source in sources]
    for number, (module, source) in enumerate(names):
        values = [round(0.05 + 0.04 * number + 0.02 * step + 0.001 * cell, 3) for cell in range(cells)]
        made[module][source] = Gate(math.fsum(values) / cells, values)
    return made


def sudoku(size: int, count: int, gated: bool = True) -> Trace:
    """A puzzle whose blank cells are first guessed and then corrected, a part of them in each step."""
    rng = np.random.default_rng(0)
    answer = random_grid(size, rng)
    question = random_puzzle(answer, rng)
    blank = rng.permutation(np.nonzero(question == 0)[0])
    board = answer.copy()
    board[blank] = rng.integers(1, size + 1, len(blank))
    kind = Kind("sudoku", size, size, size + 2)
    steps = []
    for number in range(count):
        right = blank[: math.ceil(len(blank) * min(1.0, number / max(1, count - 3)) ** 0.6)]
        board[right] = answer[right]
        q_halt = 1 / (1 + math.exp(-9 * (number / max(1, count - 1) - 0.62)))
        problems = kind.problems(question + 1, board + 1)
        found = gates(number, size * size) if gated else {}
        steps.append(Step((board + 1).tolist(), q_halt, 0.9 - 0.6 * q_halt, q_halt > 0.5, problems, found))
    title, model = f"Sudoku {size}x{size}", "gated, 28 million parameters"
    return Trace("sudoku", size, size, (question + 1).tolist(), (answer + 1).tolist(), steps, model, title)


def small(**changed: Any) -> Trace:
    """4x4: a wrong digit in row 1 is corrected in the second of three steps; the third changes nothing."""
    question = tokens("1..4 ..1. .3.. 4..1")
    answer = tokens("1324 2413 1342 4231")
    answer[5:7] = tokens("41")
    wrong = list(answer)
    wrong[1] = 1 + 1
    problems = ["row 1 holds 1 twice, at row 1, column 1 and row 1, column 2"]
    steps = [
        Step(wrong, 0.0004, 0.8, False, problems, gates(0, 16)),
        Step(answer, 0.625, 0.5, True, [], gates(1, 16)),
        Step(answer, 0.99961, 0.25, True, [], gates(2, 16)),
    ]
    trace = Trace("sudoku", 4, 4, question, answer, steps, "tiny", "Small")
    return replace(trace, **changed)


def tokens(text: str) -> list[int]:
    """Digits of a Sudoku, '.' blank, as tokens."""
    return [1 if c == "." else int(c) + 1 for c in text.replace(" ", "")]


def arc() -> Trace:
    """A 2x3 grid that becomes a 3x2 one, first too wide; in the end colours lie beyond it, unasked for."""
    question = canvas(np.array([[0, 1, 2], [3, 4, 5]], np.uint8))
    answer = canvas(np.array([[3, 0], [4, 1], [5, 9]], np.uint8))
    first = canvas(np.array([[3, 0, 7], [4, 1, 7], [5, 8, 7]], np.uint8))
    last = answer.copy()
    last[20 * 30 :] = 6
    steps = [
        Step(board.tolist(), q_halt, None, False, [], gates(0, 900))
        for board, q_halt in ((first, 0.1), (last, 0.5))
    ]
    return Trace("arc", 30, 30, question.tolist(), answer.tolist(), steps, "gated", "Task")


def maze() -> Trace:
    question = [1, 1, 1, 1, 1, 3, 2, 1, 1, 2, 2, 1, 1, 1, 4, 1]
    answer = [1, 1, 1, 1, 1, 3, 5, 1, 1, 2, 5, 1, 1, 1, 4, 1]
    first = [1, 1, 1, 1, 1, 3, 2, 1, 1, 5, 5, 1, 1, 1, 4, 0]
    problems = [Kind("maze", 4, 4, 6).problems(question, board) for board in (first, answer)]
    steps = [Step(b, 0.5, 0.5, False, p) for b, p in zip((first, answer), problems, strict=True)]
    return Trace("maze", 4, 4, question, answer, steps, "v1", "Maze")


def other(count: int = 2) -> Trace:
    steps = [Step([k, 7, 300, -1, 5, 6], 0.5, None, False, []) for k in range(count)]
    return Trace("other", 2, 3, [1, 2, 3, 4, 5, 6], None, steps, "v1", "Numbers")


# --- what the page holds


class Read(HTMLParser):
    """The page's elements: names with attributes, and the texts of those asked for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.handle_starttag("", [])

    def handle_data(self, data: str) -> None:
        if self.texts:
            self.texts[-1] += data

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(a, text) for (name, a), text in zip(self.found, self.texts, strict=True) if name == tag]


def data_of(trace: Trace) -> dict[str, Any]:
    scripts = Read(page(trace)).all("script")
    return json.loads(next(text for attributes, text in scripts if attributes.get("id") == "trace"))


def board_of(text: str, name: str) -> list[list[tuple[str, str]]]:
    """Class and text of every cell of one of the page's boards, by rows."""
    (table,) = re.findall(rf'id="{name}"><table.*?</table>', text, re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [re.findall(r'<td class="([^"]*)"[^>]*>([^<]*)</td>', row) for row in rows]


def findings(trace: Trace) -> tuple[str, list[str]]:
    text = page(trace)
    (headline,) = re.findall(r"<strong>(.*?)</strong>", text)
    return headline, re.findall(r"<li>(.*?)</li>", text)


def test_only_the_pages_own_style_and_script_may_run():
    text = page(small())
    read = Read(text)
    (policy,) = (
        a["content"] for a, _ in read.all("meta") if a.get("http-equiv") == "Content-Security-Policy"
    )
    ((_, style),) = read.all("style")
    data, (_, script) = read.all("script")

    def known(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert policy == (
        f"default-src 'none'; style-src {known(style)}; script-src {known(script)}; base-uri 'none'; "
        "form-action 'none'"
    )
    assert data[0] == {"type": "application/json", "id": "trace"}
    assert not any({"src", "href", "style"} & set(attributes) for _, attributes in read.found)
    assert "url(" not in style and "@import" not in style


def test_the_page_shows_the_question_the_last_board_and_the_answer_by_itself():
    text = page(small())
    assert [[cell for _, cell in row] for row in board_of(text, "puzzle")] == [
        ["1", "", "", "4"],
        ["", "", "1", ""],
        ["", "3", "", ""],
        ["4", "", "", "1"],
    ]
    last = board_of(text, "last")
    assert "".join(cell for row in last for _, cell in row) == "1324241313424231"
    assert last[0] == [("digit given", "1"), ("digit", "3"), ("digit x", "2"), ("digit given", "4")]
    assert last[2][2] == ("digit x y", "4")
    assert [[cell for _, cell in row] for row in board_of(text, "answer")] == [
        [cell for _, cell in row] for row in last
    ]


@pytest.mark.parametrize(("size", "height", "width"), [(4, 2, 2), (6, 2, 3), (9, 3, 3)])
def test_boxes_are_drawn_by_their_rows_and_columns(size, height, width):
    rows = board_of(page(sudoku(size, 3)), "puzzle")
    for r, row in enumerate(rows):
        for c, (names, _) in enumerate(row):
            assert ("x" in names.split()) == (c in range(width, size, width))
            assert ("y" in names.split()) == (r in range(height, size, height))


def test_what_a_step_changed_broke_and_got_wrong():
    first, second, third = data_of(small())["steps"]
    blank = [i for i, token in enumerate(small().question) if token == 1]
    assert [first["changed"], second["changed"], third["changed"]] == [blank, [1], []]
    assert [first["marked"], second["marked"], third["marked"]] == [[0, 1], [], []]
    assert [first["wrong"], second["wrong"], third["wrong"]] == [1, 0, 0]
    assert [step["sure"] for step in (first, second, third)] == ["below 0.1 %", "62.5 %", "over 99.9 %"]
    assert [step["halts"] for step in (first, second, third)] == [False, True, True]


def test_places_beyond_the_board_are_not_marked():
    problems = [
        "row 5, column 1 and row 0, column 2 and row 2, column 6 and row 2, column 99999",
        "row 4, column 4 has no digit",
    ]
    steps = [Step(small().question, 0.5, None, False, problems)]
    assert data_of(small(steps=steps))["steps"][0]["marked"] == [15]


def test_gates_over_the_steps_and_their_range_over_the_cells():
    found = data_of(small())["gates"]
    assert [gate["name"] for gate in found] == [
        "L · primary",
        "L · secondary",
        "L · input",
        "H · primary",
        "H · secondary",
    ]
    gate = found[2]
    assert gate["cells"][1] == [round(0.05 + 0.08 + 0.02 + 0.001 * cell, 3) for cell in range(16)]
    assert gate["means"] == pytest.approx([0.1375, 0.1575, 0.1775], abs=1e-9)
    assert (gate["least"], gate["most"]) == (0.13, 0.185)
    assert data_of(sudoku(4, 3, gated=False))["gates"] == []


@pytest.mark.parametrize(
    ("trace", "headline", "said"),
    [
        (
            small(),
            "Solved",
            [
                "every cell right",
                "no rule broken",
                "over 99.9 % sure",
                "would stop after step 2 of 3",
                "unchanged since step 2",
            ],
        ),
        (
            small(steps=small().steps[:1]),
            "Not solved",
            [
                "1 of 16 cells wrong",
                "1 rule broken",
                "below 0.1 % sure",
                "would not stop by itself in 1 step",
            ],
        ),
        # Another answer than the known one, which breaks no rule.
        (
            small(answer=tokens("1" * 16)),
            "Solved",
            [
                "12 of 16 cells wrong",
                "no rule broken",
                "over 99.9 % sure",
                "would stop after step 2 of 3",
                "unchanged since step 2",
            ],
        ),
        (
            small(answer=None, steps=small().steps[:1]),
            "Not solved",
            ["1 rule broken", "below 0.1 % sure", "would not stop by itself in 1 step"],
        ),
        (
            other(),
            "Answered",
            ["no answer is known to compare with", "50.0 % sure", "would not stop by itself in 2 steps"],
        ),
        # Padding of the answer is not asked for.
        (
            Trace("other", 1, 3, [1, 2, 3], [5, 0, -1], [Step([5, 7, 7], 1.0, None, True, [])], "", ""),
            "Solved",
            ["every cell right", "100.0 % sure", "would stop after step 1 of 1"],
        ),
        (arc(), "Solved", ["every cell right", "50.0 % sure", "would not stop by itself in 2 steps"]),
    ],
)
def test_the_verdict(trace, headline, said):
    assert findings(trace) == (headline, said)


def test_of_an_arc_canvas_the_grid_is_shown_and_what_lies_beyond_counts_for_nothing():
    text, data = page(arc()), data_of(arc())
    assert [[cell for _, cell in row] for row in board_of(text, "puzzle")] == [list("012"), list("345")]
    assert [[cell for _, cell in row] for row in board_of(text, "last")] == [
        list("30"),
        list("41"),
        list("59"),
    ]
    # Wide enough for the widest board; of the others, the cells beyond their grids are none.
    assert [len(row) for row in board_of(text, "live")] == [3, 3, 3]
    first, last = data["steps"]
    assert first["board"] == [5, 2, 9, 6, 3, 9, 7, 10, 9]
    assert last["board"] == [5, 2, 0, 6, 3, 0, 7, 11, 0]
    assert (first["changed"], last["changed"]) == (None, [2, 5, 7, 8])
    # One colour is another, three cells are too many.
    assert (first["wrong"], last["wrong"]) == (4, 0)
    assert data["places"][-1] == [3, 3]
    assert data["gates"][0]["cells"][0][3] == round(0.05 + 0.001 * 30, 3)


def test_a_canvas_without_a_grid_is_shown_whole():
    steps = [Step([0] * 900, 0.5, None, False, ["there is no grid: no cell holds a colour"])]
    trace = Trace("arc", 30, 30, arc().question, None, steps, "", "")
    assert [len(row) for row in board_of(page(trace), "last")] == [30] * 30
    assert findings(trace)[0] == "Not solved"


def test_numbers_that_are_none_are_called_so():
    nan = math.nan
    found = {"L": {"input": Gate(nan, [nan, *[0.5] * 15])}}
    steps = [Step(small().answer or [], nan, math.inf, False, [], found)]
    text = page(small(steps=steps))
    assert "NaN" not in text and "not a number sure" in text
    data = data_of(small(steps=steps))
    assert data["steps"][0]["q_halt"] is None and data["gates"][0]["means"] == [None]
    assert (data["gates"][0]["least"], data["gates"][0]["most"]) == (0.5, 0.5)


def test_texts_are_escaped_and_the_data_stays_in_its_element():
    steps = [Step(small().question, 0.5, None, False, [HOSTILE])]
    trace = small(title=HOSTILE + "\udcff", model=HOSTILE, steps=steps, kind="sudoku")
    text = page(trace)
    assert len(re.findall("<script", text)) == 2 and "<img" not in text
    assert data_of(trace)["steps"][0]["problems"] == [HOSTILE]
    assert text.encode("utf-8").count(b"\xe2\x80\xa8") == 3


def test_a_trace_that_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match="at least one step, and boards of 4 x 4 cells"):
        page(small(steps=[]))
    with pytest.raises(ValueError, match="boards of 4 x 4 cells"):
        page(small(answer=[1] * 15))


# --- what a browser shows


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with chromium() as found:
        yield found


Open = Callable[..., "Page"]


@pytest.fixture
def opened(browser: "Browser", tmp_path: Path) -> Iterator[Open]:
    """Opens a page that logs nothing (blocked handlers, if allowed), fails nowhere, requests nothing."""
    said: list[str] = []
    contexts: list[BrowserContext] = []

    def open_page(trace: Trace, *, blocks_handlers: bool = False, **options: Any) -> "Page":
        def log(text: str) -> None:
            # Chromium 156 logs each inline handler that the page's policy blocks; earlier ones do not.
            if not (blocks_handlers and "inline event handler" in text and "Content Security Policy" in text):
                said.append(text)

        file = tmp_path / f"{len(contexts)}.html"
        file.write_text(page(trace), encoding="utf-8")
        contexts.append(browser.new_context(**({"reduced_motion": "reduce"} | options)))
        shown = contexts[-1].new_page()
        shown.on("console", lambda message: log(message.text))
        shown.on("pageerror", lambda error: said.append(str(error)))
        shown.on("dialog", lambda dialog: said.append(dialog.message))
        shown.on("request", lambda request: asked.append(request.url))
        shown.goto(file.as_uri())
        pages.append(file.as_uri())
        return shown

    asked: list[str] = []
    pages: list[str] = []
    yield open_page
    for context in contexts:
        context.close()
    assert said == [] and asked == pages


def texts(shown: "Page") -> list[str]:
    return shown.locator("#live td").all_inner_texts()


def having(shown: "Page", name: str) -> list[int]:
    """Which cells of the board have a class."""
    classes = shown.locator("#live td").evaluate_all("cells => cells.map(cell => cell.className.split(' '))")
    return [i for i, names in enumerate(classes) if name in names]


def step_of(shown: "Page") -> int:
    """The step that is shown, the same in heading and slider."""
    number = int(shown.input_value("#step"))
    count = shown.get_attribute("#step", "max")
    assert shown.inner_text("#now") == f"Step {number} of {count}"
    assert shown.get_attribute("#step", "aria-valuetext") == f"step {number} of {count}"
    return number


def values(shown: "Page") -> list[str]:
    return shown.locator(".value").all_inner_texts()


def test_going_through_the_steps(opened):
    trace = sudoku(9, 6)
    shown = opened(trace)
    assert step_of(shown) == 6
    assert shown.get_by_role("button", name="Next step").is_disabled()
    shown.locator("#step").fill("1")
    assert shown.get_by_role("button", name="Previous step").is_disabled()
    before = trace.question
    for number, step in enumerate(trace.steps, 1):
        assert step_of(shown) == number
        assert texts(shown) == [str(token - 1) for token in step.board]
        new = [i for i, (a, b) in enumerate(zip(before, step.board, strict=True)) if a != b]
        wrong = sum(a != b for a, b in zip(step.board, trace.answer or [], strict=True))
        assert having(shown, "new") == new
        assert bool(having(shown, "bad")) == bool(step.problems)
        assert having(shown, "given") == [i for i, token in enumerate(trace.question) if token > 1]
        assert values(shown)[:4] == [
            f"{100 * step.q_halt:.1f} %",
            str(len(new)),
            str(wrong),
            str(len(step.problems)),
        ]
        assert shown.locator("#problems li").all_inner_texts() == step.problems
        would = "stop here" if step.halts else "go on"
        assert shown.inner_text("#said").endswith(f"% sure. The model would {would}.")
        assert shown.locator(".bars.tall i.here").count() == 1
        if number < len(trace.steps):
            shown.get_by_role("button", name="Next step").click()
        before = step.board
    shown.get_by_role("button", name="Previous step").click()
    assert step_of(shown) == 5


def test_a_step_in_words(opened):
    shown = opened(small())
    shown.press("body", "Home")
    assert shown.inner_text("#said") == (
        "10 cells changed, 1 cell wrong, 1 rule broken, below 0.1 % sure. The model would go on."
    )
    assert shown.inner_text("#broken") == "Rules broken: 1"
    assert shown.locator("#live td").nth(1).get_attribute("title") == (
        "row 1, column 2: 1, was blank, breaks a rule"
    )
    shown.press("body", "ArrowRight")
    assert shown.locator("#live td").nth(1).get_attribute("title") == "row 1, column 2: 3, was 1"
    assert shown.inner_text("#said") == (
        "1 cell changed, every cell right, no rule broken, 62.5 % sure. The model would stop here."
    )
    assert not shown.is_visible("#problems")


def test_confidence_is_drawn_over_the_steps(opened):
    shown = opened(small())
    points = shown.locator("#tracks polyline").evaluate_all(
        "lines => lines.map(line => [...line.points].map(point => [point.x, point.y]))"
    )
    assert points[0] == [[0.5, pytest.approx(0.2)], [1.5, 0.5], [2.5, 0.75]]
    assert points[1] == [[0.5, pytest.approx(0.9996)], [1.5, 0.375], [2.5, pytest.approx(0.0004)]]
    assert shown.locator(".tall b").evaluate_all("dots => dots.map(dot => dot.className)") == [
        "",
        "halts",
        "halts",
    ]
    # A dot lies where the line has its point.
    chart, dot = (shown.locator(name).bounding_box() for name in (".bars.tall", ".tall i:nth-of-type(2) b"))
    assert dot["y"] + dot["height"] / 2 == pytest.approx(chart["y"] + 0.375 * chart["height"], abs=2)


def test_keys(opened):
    shown = opened(sudoku(4, 5))
    for key, number in (
        ("Home", 1),
        ("ArrowRight", 2),
        ("ArrowRight", 3),
        ("ArrowLeft", 2),
        ("End", 5),
        ("ArrowRight", 5),
        ("Home", 1),
        ("ArrowLeft", 1),
        ("Control+ArrowRight", 1),
    ):
        shown.keyboard.press(key)
        assert step_of(shown) == number
    # The slider's own keys, which move it once.
    shown.focus("#step")
    shown.keyboard.press("Home")
    shown.keyboard.press("ArrowLeft")
    assert step_of(shown) == 1
    shown.keyboard.press("ArrowRight")
    assert step_of(shown) == 2
    # Arrows choose another gate, and leave the step alone.
    shown.focus("input[name=gate]:checked")
    shown.keyboard.press("ArrowRight")
    assert shown.is_checked("input[name=gate][value='0']") and step_of(shown) == 2


def test_everything_is_reached_by_the_tab_key_and_seen_to_be(opened):
    shown = opened(small())
    shown.keyboard.press("Home")
    reached = []
    for _ in range(7):
        shown.keyboard.press("Tab")
        reached.append(
            shown.evaluate(
                "() => [document.activeElement.id || document.activeElement.name,"
                " getComputedStyle(document.activeElement).outlineStyle]"
            )
        )
    # At the first step there is none before it.
    assert reached[:6] == [[name, "solid"] for name in ("play", "step", "next", "speed", "gate", "problems")]


def test_playing(opened):
    shown = opened(sudoku(4, 4))
    shown.clock.install(time=0)
    shown.clock.pause_at(1000)
    shown.get_by_role("button", name="Play").click()
    assert step_of(shown) == 1
    assert shown.get_attribute("#said", "aria-live") == "off"
    shown.clock.run_for(999)
    assert step_of(shown) == 1
    shown.clock.run_for(1)
    assert step_of(shown) == 2
    shown.get_by_role("button", name="Pause").click()
    shown.clock.run_for(5000)
    assert step_of(shown) == 2
    assert shown.get_attribute("#said", "aria-live") is None
    # From where it is, four steps a second; at the end it stops.
    shown.select_option("#speed", "4")
    shown.evaluate("() => document.activeElement.blur()")
    shown.keyboard.press("Space")
    shown.clock.run_for(250)
    assert step_of(shown) == 3 and shown.inner_text("#play") == "Pause"
    shown.clock.run_for(250)
    assert step_of(shown) == 4 and shown.inner_text("#play") == "Play"
    # The space bar on the button presses it once; a step by hand stops.
    shown.focus("#play")
    shown.keyboard.press("Space")
    assert step_of(shown) == 1 and shown.inner_text("#play") == "Pause"
    shown.keyboard.press("ArrowRight")
    assert step_of(shown) == 2 and shown.inner_text("#play") == "Play"


def test_bars_are_pressed_and_the_board_is_swiped(opened):
    shown = opened(sudoku(4, 5))
    shown.locator(".bars.changed i").nth(1).click()
    assert step_of(shown) == 2
    bars = shown.locator(".bars.tall").bounding_box()
    shown.mouse.move(bars["x"] + 0.1 * bars["width"], bars["y"] + 20)
    shown.mouse.down()
    assert step_of(shown) == 1
    shown.mouse.move(bars["x"] + 0.7 * bars["width"], bars["y"] + 20)
    assert step_of(shown) == 4
    shown.mouse.move(bars["x"] + 2 * bars["width"], bars["y"] + 20)
    shown.mouse.up()
    shown.mouse.move(bars["x"] + 0.3 * bars["width"], bars["y"] + 20)
    assert step_of(shown) == 5


def test_the_board_is_swiped(opened):
    shown = opened(sudoku(4, 5), has_touch=True)
    board = shown.locator("#frame").bounding_box()
    x, y = board["x"] + board["width"] / 2, board["y"] + board["height"] / 2
    finger = shown.context.new_cdp_session(shown)

    def touch(kind: str, *points: tuple[float, float]) -> None:
        where = [{"x": x + right, "y": y + down} for right, down in points]
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": where})

    # To the right, mostly down, hardly at all, to the left.
    for right, down, number in ((120, 20, 4), (60, 100, 4), (30, 0, 4), (-120, 20, 5)):
        touch("touchStart", (0, 0))
        for part in range(1, 5):
            touch("touchMove", (right * part / 4, down * part / 4))
        touch("touchEnd")
        assert step_of(shown) == number
    # A mouse marks text instead.
    shown.mouse.move(x, y)
    shown.mouse.down()
    shown.mouse.move(x + 120, y)
    shown.mouse.up()
    assert step_of(shown) == 5


def test_a_gate_is_laid_over_the_board(opened):
    trace = small()
    shown = opened(trace)
    shown.press("body", "ArrowLeft")
    assert values(shown)[4:] == ["0.077", "0.117", "0.158", "0.198", "0.237"]
    assert not having(shown, "hot") and not shown.is_visible("#scale")
    shown.get_by_role("radio", name="L · input").check()
    assert "hot" in (shown.get_attribute("#live", "class") or "").split()
    cells = trace.steps[1].gates["L"]["input"].cells
    shares = shown.locator("#live td").evaluate_all(
        "cells => cells.map(c => +c.style.getPropertyValue('--g'))"
    )
    # The range is of all steps: 0.13 in the first one, 0.185 in the last.
    assert shares == pytest.approx([(cell - 0.13) / 0.055 for cell in cells], abs=1e-9)
    assert shown.inner_text("#least") == "L · input 0.130" and shown.inner_text("#most") == "0.185"
    assert shown.locator("#live td").first.get_attribute("title") == "row 1, column 1: 1, gate 0.150"
    ground = "cell => getComputedStyle(cell).backgroundColor"
    assert shown.locator("#live td").first.evaluate(ground) != shown.locator("#live td").last.evaluate(ground)
    assert "".join(texts(shown)) == "1324241313424231"
    shown.get_by_role("radio", name="None over the board").check()
    assert not shown.is_visible("#scale") and shown.locator("#live.hot").count() == 0


def test_a_plain_model_has_no_gates(opened):
    shown = opened(sudoku(6, 3, gated=False))
    assert not shown.is_visible("#gates") and len(values(shown)) == 4


def test_a_maze_in_colours(opened):
    shown = opened(maze())
    shown.press("body", "Home")
    assert having(shown, "new") == [9, 10, 15] and having(shown, "pad") == [15]
    assert (having(shown, "start"), having(shown, "goal"), having(shown, "path")) == ([5], [14], [9, 10])
    assert "no rule broken" not in shown.inner_text("#said") and shown.locator("#problems li").count()
    grounds = shown.locator("#live td").evaluate_all(
        "cells => cells.map(c => getComputedStyle(c).backgroundColor)"
    )
    assert grounds[0] == "rgb(74, 84, 95)" and grounds[9] == "rgb(143, 192, 245)"
    shown.press("body", "ArrowRight")
    assert shown.locator("#live td").nth(6).get_attribute("title") == "row 2, column 3: path, was open"
    assert having(shown, "bad") == []


def test_arc_in_ten_colours(opened):
    shown = opened(arc())
    assert texts(shown) == ["3", "0", "", "4", "1", "", "5", "9", ""]
    assert shown.locator("#live td").first.get_attribute("title") == "row 1, column 1: green"
    assert shown.locator("#live td").nth(2).get_attribute("title") == ("row 1, column 3: no cell, was orange")
    shown.press("body", "Home")
    assert shown.inner_text("#said") == "First board, 4 cells wrong, 10.0 % sure. The model would go on."
    assert values(shown)[1] == "-"
    colours = shown.evaluate(
        "() => { const cell = document.querySelector('#live td'); return [...Array(10).keys()].map(i => {"
        " cell.className = 'c' + i; return getComputedStyle(cell).backgroundColor; }) }"
    )
    rgb = np.array([list(map(int, re.findall(r"\d+", colour))) for colour in colours])
    apart = np.abs(rgb[:, None] - rgb[None]).sum(-1) + 1000 * np.eye(10, dtype=int)
    assert apart.min() > 100


def test_other_tokens_are_numbers(opened):
    shown = opened(other(50))
    shown.press("body", "ArrowLeft")
    assert texts(shown) == ["48", "7", "300", "-1", "5", "6"] and having(shown, "new") == [0]
    # Dots would lie upon each other.
    assert shown.locator(".tall b").first.is_hidden()


def test_hostile_texts_are_shown_and_do_nothing(opened):
    steps = [Step(small().question, 0.5, None, False, [HOSTILE], {HOSTILE: {HOSTILE: Gate(0.5, [0.5] * 16)}})]
    shown = opened(small(title=HOSTILE, model=HOSTILE, steps=steps), blocks_handlers=True)
    assert shown.evaluate("() => [typeof hacked, document.scripts.length, document.images.length]") == [
        "undefined",
        2,
        0,
    ]
    assert shown.title() == HOSTILE
    assert shown.text_content("h1") == HOSTILE and shown.text_content("#problems li") == HOSTILE
    assert shown.text_content("#gates .name") == f"{HOSTILE} · {HOSTILE}"
    # An inline handler that finds its way in does not run either.
    shown.evaluate("() => document.body.setAttribute('onclick', 'hacked = 1')")
    shown.evaluate("() => document.body.click()")
    assert shown.evaluate("() => typeof hacked") == "undefined"


def test_it_fits_a_phone_and_a_desk(opened):
    long = "row 1, column 1 " + "x" * 200
    wordy = small(title=long, model=long, steps=[Step([9] * 16, 0.5, None, False, [long])])
    for trace in (sudoku(9, 12), wordy, arc()):
        shown = opened(trace)
        shown.press("body", "Home")
        if shown.is_visible("#gates"):
            shown.check("input[name=gate][value='1']")
        for width in (360, 1280):
            shown.set_viewport_size({"width": width, "height": 800})
            assert shown.evaluate("() => document.documentElement.scrollWidth") <= width
            boxes = [shown.locator(name).first.bounding_box() for name in ("#live td", ".bars", "#play")]
            assert boxes[0]["width"] == pytest.approx(boxes[0]["height"], abs=1.5)
            assert boxes[1]["width"] > 250 and boxes[2]["height"] > 36


def test_it_is_readable_on_light_and_on_dark_ground(opened):
    shown = opened(sudoku(9, 12))
    for scheme, ground in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 24, 29)")):
        shown.emulate_media(color_scheme=scheme)
        assert shown.evaluate("() => getComputedStyle(document.body).backgroundColor") == ground
        # Without a gate, and with one where it is shut the most and the least.
        for gate, step, names in (
            ("-1", "2", ("given", "new", "bad", "digit")),
            ("0", "1", ("given", "digit")),
            ("0", "12", ("given", "digit")),
        ):
            shown.check(f"input[name=gate][value='{gate}']")
            shown.fill("#step", step)
            for name in names:
                assert contrast(shown, f"#live td.{name}", ground) >= 4.5
        for name in ("#said", "#now", ".verdict li", ".verdict strong", "#play", ".hint", ".name small"):
            assert contrast(shown, name, ground) >= 4.5


def contrast(shown: "Page", name: str, page_ground: str) -> float:
    """The least contrast of text on its ground among the elements (WCAG 2)."""
    pairs = shown.locator(name).evaluate_all(
        """(elements, page) => {
          const pen = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
          const rgb = (...colours) => {
            for (const colour of colours) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
            return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
          };
          return elements.map((element) => {
            const behind = [];
            for (let e = element; e; e = e.parentElement) behind.unshift(getComputedStyle(e).backgroundColor);
            return [rgb(page, ...behind), rgb(page, ...behind, getComputedStyle(element).color)];
          });
        }""",
        page_ground,
    )
    assert pairs

    def luminance(rgb: list[int]) -> float:
        parts = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in rgb)]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    def ratio(one: list[int], two: list[int]) -> float:
        low, high = sorted((luminance(one), luminance(two)))
        return (high + 0.05) / (low + 0.05)

    return min(ratio(*pair) for pair in pairs)


def test_nothing_moves_for_who_wants_no_motion(opened):
    duration = "cell => getComputedStyle(cell).transitionDuration"
    assert opened(small()).locator("#live td").first.evaluate(duration) == "0s"
    assert (
        opened(small(), reduced_motion="no-preference").locator("#live td").first.evaluate(duration) == "0.2s"
    )


def test_paper_shows_the_last_board(opened):
    shown = opened(small())
    assert not shown.is_visible("#last")
    shown.press("body", "Home")
    shown.emulate_media(media="print", color_scheme="dark")
    assert shown.is_visible("#last") and shown.is_visible("#puzzle") and not shown.is_visible("#player")
    assert "".join(shown.locator("#last td").all_inner_texts()) == "1324241313424231"
    assert shown.evaluate("() => getComputedStyle(document.body).color") == "rgb(36, 41, 47)"


def test_without_a_script_there_are_the_boards_and_the_verdict(opened):
    shown = opened(small(), java_script_enabled=False)
    assert shown.is_visible("#puzzle") and shown.is_visible("#last") and not shown.is_visible("#player")
    assert shown.is_visible("noscript p") and shown.inner_text(".verdict strong") == "Solved"


def test_its_parts_have_names(opened):
    shown = opened(small())
    shown.press("body", "Home")
    for role, name in (
        ("region", "The thinking, step by step"),
        ("group", "Playing"),
        ("slider", "Step"),
        ("combobox", "Speed"),
        ("table", "Board after step 1"),
        ("table", "Puzzle"),
        ("radio", "H · secondary"),
        ("group", "Gates: how far each level lets a source in"),
        ("list", "Rules broken: 1"),
        ("heading", "Step 1 of 3"),
    ):
        assert shown.get_by_role(role, name=name).count() == 1, (role, name)
