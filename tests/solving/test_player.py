"""The page that plays a trace: its contents, and what a browser shows of them."""

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hrm.data.arc.augment import canvas
from hrm.data.puzzle_kinds import Kind
from hrm.data.sudoku.solver import random_grid, random_puzzle
from hrm.evaluation.selection import same_answers, unfinished
from hrm.solving.player import page
from hrm.solving.trace import Gate, Recorded, Step, Trace
from tests.support.browser import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

SOURCES = [("L", "primary"), ("L", "secondary"), ("L", "input"), ("H", "primary"), ("H", "secondary")]
HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='hacked = 1'>\"'`&amp;\u2028\u2029<!--${1}"
)


# --- traces


def gates(step: int, cells: int) -> dict[str, dict[str, Gate]]:
    """Gates that differ by module, source, step and cell."""
    made: dict[str, dict[str, Gate]] = {"L": {}, "H": {}}
    for number, (module, source) in enumerate(SOURCES):
        values = [round(0.05 + 0.04 * number + 0.02 * step + 0.001 * cell, 3) for cell in range(cells)]
        made[module][source] = Gate(math.fsum(values) / cells, values)
    return made


def sudoku(size: int, count: int, gated: bool = True) -> Trace:
    """Blank cells are guessed in the first step, and a part of them is corrected in each later one."""
    rng = np.random.default_rng(0)
    answer = random_grid(size, rng)
    question = random_puzzle(answer, rng)
    blank = rng.permutation(np.nonzero(question == 0)[0])
    board = answer.copy()
    board[blank] = rng.integers(1, size + 1, len(blank))
    kind, steps = Kind("sudoku", size, size, size + 2), []
    for number in range(count):
        right = blank[: math.ceil(len(blank) * min(1.0, number / max(1, count - 3)) ** 0.6)]
        board[right] = answer[right]
        q_halt = 1 / (1 + math.exp(-9 * (number / max(1, count - 1) - 0.62)))
        problems = kind.problems(question + 1, board + 1)
        found = gates(number, size * size) if gated else {}
        steps.append(Step((board + 1).tolist(), q_halt, 0.9 - 0.6 * q_halt, q_halt > 0.5, problems, found))
    return Trace("sudoku", size, size, (question + 1).tolist(), (answer + 1).tolist(), steps, "gated", "S")


def small(**changed: Any) -> Trace:
    """4x4: a wrong digit in row 1 is corrected in the second of three steps; the third changes nothing."""
    question = [1 if c == "." else int(c) + 1 for c in "1..4..1..3..4..1"]
    answer = [int(c) + 1 for c in "1324241313424231"]
    wrong = [*answer[:1], 2, *answer[2:]]
    problems = ["row 1 holds 1 twice, at row 1, column 1 and row 1, column 2"]
    steps = [
        Step(wrong, 0.0004, 0.8, False, problems, gates(0, 16)),
        Step(answer, 0.625, 0.5, True, [], gates(1, 16)),
        Step(answer, 0.99961, 0.25, True, [], gates(2, 16)),
    ]
    return replace(Trace("sudoku", 4, 4, question, answer, steps, "tiny", "Small"), **changed)


def one_step(board: list[int], problems: list[str], **changed: Any) -> Trace:
    return small(steps=[Step(board, 0.5, None, False, problems)], **changed)


def arc() -> Trace:
    """A 2x3 grid becomes a 3x2 one; the first board is too wide, the last has colours beyond its grid."""
    question, answer, first = (
        canvas(np.array([[int(c) for c in row] for row in rows.split()], np.uint8))
        for rows in ("012 345", "30 41 59", "307 417 587")
    )
    last = answer.copy()
    last[20 * 30 :] = 6
    boards = ((first, 0.1), (last, 0.5))
    steps = [Step(board.tolist(), q_halt, None, False, [], gates(0, 900)) for board, q_halt in boards]
    return Trace("arc", 30, 30, question.tolist(), answer.tolist(), steps, "gated", "Task")


def recorded(count: int = 3) -> Recorded:
    """Paths of `small`: the last one stays wrong after one step, the others solve it in three."""
    trace = small()
    traces = [*[trace] * (count - 1), replace(trace, steps=trace.steps[:1])]
    outcomes = unfinished(1, count, True)
    outcomes.answer[0] = same_answers(np.array([each.steps[-1].board for each in traces]))
    return Recorded(traces, outcomes)


def maze() -> Trace:
    question = [1, 1, 1, 1, 1, 3, 2, 1, 1, 2, 2, 1, 1, 1, 4, 1]
    answer = [1, 1, 1, 1, 1, 3, 5, 1, 1, 2, 5, 1, 1, 1, 4, 1]
    first = [1, 1, 1, 1, 1, 3, 2, 1, 1, 5, 5, 1, 1, 1, 4, 0]
    kind = Kind("maze", 4, 4, 6)
    steps = [Step(board, 0.5, 0.5, False, kind.problems(question, board)) for board in (first, answer)]
    return Trace("maze", 4, 4, question, answer, steps, "v1", "Maze")


def other(count: int = 2) -> Trace:
    steps = [Step([k, 7, 300, -1, 5, 6], 0.5, None, False, []) for k in range(count)]
    return Trace("tokens", 2, 3, [1, 2, 3, 4, 5, 6], None, steps, "v1", "Numbers")


# --- contents


def data_of(trace: Trace) -> dict[str, Any]:
    (data,) = re.findall(r'<script type="application/json" id="trace">(.*?)</script>', page(trace), re.DOTALL)
    return json.loads(data)


def board_of(trace: Trace, name: str) -> list[list[tuple[str, str]]]:
    """Class and text of each cell of one of the page's boards, by rows."""
    (table,) = re.findall(rf'id="{name}"><table.*?</table>', page(trace), re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [re.findall(r'<td class="([^"]*)"[^>]*>([^<]*)</td>', row) for row in rows]


def rows_of(trace: Trace, name: str) -> list[str]:
    return ["".join(text or "." for _, text in row) for row in board_of(trace, name)]


def test_only_the_pages_own_style_and_script_may_run():
    text = page(small())
    (style,), (script,) = (
        re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL) for tag in ("style", "script")
    )
    digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (style, script)]
    policy = (
        f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in text
    assert not re.search(r"<[^>]*\s(src|href|style)\s*=|url\(|@import", text.replace(script, ""))


def test_the_boards_without_a_script():
    assert rows_of(small(), "puzzle") == ["1..4", "..1.", ".3..", "4..1"]
    assert rows_of(small(), "last") == rows_of(small(), "answer") == ["1324", "2413", "1342", "4231"]
    last = [[names for names, _ in row] for row in board_of(small(), "last")]
    assert last[0] == ["digit given", "digit", "digit x", "digit given"] and last[2][2] == "digit x y"
    assert (rows_of(arc(), "puzzle"), rows_of(arc(), "last")) == (["012", "345"], ["30", "41", "59"])
    # Wide enough for the widest board.
    assert [len(row) for row in board_of(arc(), "live")] == [3, 3, 3]
    # A canvas without a grid is shown whole.
    steps = [Step([0] * 900, 0.5, None, False, ["there is no grid: no cell holds a colour"])]
    trace = replace(arc(), answer=None, steps=steps)
    assert [len(row) for row in board_of(trace, "last")] == [30] * 30 and "Not solved" in page(trace)


@pytest.mark.parametrize(("size", "height", "width"), [(4, 2, 2), (6, 2, 3), (9, 3, 3)])
def test_boxes_are_drawn_by_their_rows_and_columns(size, height, width):
    for r, row in enumerate(board_of(sudoku(size, 3), "puzzle")):
        for c, (names, _) in enumerate(row):
            edges = {"x"} & set(names.split()), {"y"} & set(names.split())
            assert [bool(e) for e in edges] == [
                c in range(width, size, width),
                r in range(height, size, height),
            ]


def test_the_data_of_each_step():
    steps = data_of(small())["steps"]
    blank = [i for i, token in enumerate(small().question) if token == 1]
    assert [(s["changed"], s["marked"], s["wrong"], s["sure"], s["halts"]) for s in steps] == [
        (blank, [0, 1], 1, "below 0.1 %", False),
        ([1], [], 0, "62.5 %", True),
        ([], [], 0, "over 99.9 %", True),
    ]
    beyond = [f"row {r}, column {c}" for r, c in ((5, 1), (0, 2), (2, 6), (2, 99999))]
    trace = one_step(small().question, [*beyond, "row 4, column 4 has no digit"])
    assert data_of(trace)["steps"][0]["marked"] == [15]
    # Cells beyond an ARC grid count for nothing: one colour is another one, three cells are too many.
    data = data_of(arc())
    assert [(s["board"], s["changed"], s["wrong"]) for s in data["steps"]] == [
        ([5, 2, 9, 6, 3, 9, 7, 10, 9], None, 4),
        ([5, 2, 0, 6, 3, 0, 7, 11, 0], [2, 5, 7, 8], 0),
    ]
    assert data["places"][-1] == [3, 3] and data["gates"][0]["cells"][0][3] == round(0.05 + 0.001 * 30, 3)


def test_the_votes_of_paths_and_what_is_played(monkeypatch):
    text = page(recorded(), 1)
    assert "3 paths gave 2 answers, path 1 was chosen" in text
    right, wrong = re.findall(r'<div class="answer (\w+)"><p>(.*?)</p>', text)
    assert right == (
        "good",
        "<strong>2 paths</strong>: this answer. Solved, every cell right, up to over 99.9 % sure.",
    )
    assert wrong[0] == "bad" and wrong[1].startswith(
        "<strong>1 path</strong>: differs in 1 cell. Not solved,"
    )
    (data,) = re.findall(r'id="trace">(.*?)</script>', text, re.DOTALL)
    found = json.loads(data)
    assert found["path"] == 1 and [len(each["steps"]) for each in found["others"]] == [3, 1]
    assert [each["path"] for each in found["others"]] == [0, 2]
    monkeypatch.setattr("hrm.solving.player.MOST_OPEN", 1)
    assert '<summary>1 further answer</summary><div class="answer bad">' in page(recorded(), 1)
    monkeypatch.setattr("hrm.solving.player.MOST_PLAYED", 1)
    text = page(recorded(), 1)
    assert re.findall(r'name="path" value="(\d)"', text) == ["0", "1"]
    assert "1 further path cannot be played here" in text
    for alone in (small(), Recorded([small()], recorded(1).outcomes)):
        assert 'id="paths"' not in page(alone)


def test_gates_over_the_steps_and_their_range_over_the_cells():
    found = data_of(small())["gates"]
    assert [gate["name"] for gate in found] == [f"{module} · {source}" for module, source in SOURCES]
    assert found[2]["cells"][1] == [round(0.15 + 0.001 * cell, 3) for cell in range(16)]
    assert found[2]["means"] == pytest.approx([0.1375, 0.1575, 0.1775], abs=1e-9)
    assert (found[2]["least"], found[2]["most"]) == (0.13, 0.185)
    assert data_of(sudoku(4, 3, gated=False))["gates"] == []


ENDS = ["over 99.9 % sure", "would stop after step 2 of 3", "unchanged since step 2"]
BROKEN = ["1 rule broken", "below 0.1 % sure", "would not stop by itself in 1 step"]
PADDED = Trace("tokens", 1, 3, [1, 2, 3], [5, 0, -1], [Step([5, 7, 7], 1.0, None, True, [])], "", "")


@pytest.mark.parametrize(
    ("trace", "headline", "said"),
    [
        (small(), "Solved", ["every cell right", "no rule broken", *ENDS]),
        (small(steps=small().steps[:1]), "Not solved", ["1 of 16 cells wrong", *BROKEN]),
        # Another answer than the known one, which breaks no rule.
        (small(answer=[2] * 16), "Solved", ["12 of 16 cells wrong", "no rule broken", *ENDS]),
        (small(answer=None, steps=small().steps[:1]), "Not solved", BROKEN),
        (
            other(),
            "Answered",
            ["the right answer is unknown", "50.0 % sure", "would not stop by itself in 2 steps"],
        ),
        # Padding of the answer is not compared.
        (PADDED, "Solved", ["every cell right", "100.0 % sure", "would stop after step 1 of 1"]),
        (arc(), "Solved", ["every cell right", "50.0 % sure", "would not stop by itself in 2 steps"]),
    ],
)
def test_the_verdict(trace, headline, said):
    text = page(trace)
    assert re.findall(r"<strong>(.*?)</strong>", text) == [headline]
    assert re.findall(r"<li>(.*?)</li>", text) == said


def test_values_that_are_not_finite():
    found = {"L": {"input": Gate(math.nan, [math.nan, *[0.5] * 15])}}
    trace = small(steps=[Step(small().answer or [], math.nan, math.inf, False, [], found)])
    assert "NaN" not in page(trace) and "not a number sure" in page(trace)
    data = data_of(trace)
    assert data["steps"][0]["q_halt"] is None and data["gates"][0]["means"] == [None]
    assert (data["gates"][0]["least"], data["gates"][0]["most"]) == (0.5, 0.5)


def test_texts_are_escaped_and_the_data_stays_in_its_element():
    trace = one_step(small().question, [HOSTILE], title=HOSTILE + "\udcff", model=HOSTILE)
    text = page(trace)
    assert len(re.findall("<script", text)) == 2 and "<img" not in text
    assert data_of(trace)["steps"][0]["problems"] == [HOSTILE]
    assert text.encode("utf-8").count(b"\xe2\x80\xa8") == 3


def test_a_trace_that_cannot_be_shown_is_refused():
    for changed in ({"steps": []}, {"answer": [1] * 15}):
        with pytest.raises(ValueError, match="at least one step, and boards of 4 x 4 cells"):
            page(small(**changed))


# --- what a browser shows


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with chromium() as found:
        yield found


@pytest.fixture
def opened(browser: "Browser", tmp_path: Path) -> Iterator[Callable[..., "Page"]]:
    """Opens pages; at the end none has logged anything (unless allowed), failed or requested a file."""
    said: list[str] = []
    asked: list[str] = []
    contexts: list[BrowserContext] = []

    def open_page(trace: Trace | Recorded, *, blocks_handlers: bool = False, **options: Any) -> "Page":
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
        return shown

    yield open_page
    for context in contexts:
        context.close()
    assert said == [] and asked == [(tmp_path / f"{n}.html").as_uri() for n in range(len(contexts))]


def each(shown: "Page", name: str, expression: str) -> list[Any]:
    """A JavaScript expression of each element `e` of a selector."""
    return shown.locator(name).evaluate_all(f"elements => elements.map(e => {expression})")


def texts(shown: "Page", name: str = "#live td") -> list[str]:
    return shown.locator(name).all_inner_texts()


def title(shown: "Page", cell: int) -> str:
    return shown.locator("#live td").nth(cell).get_attribute("title") or ""


def having(shown: "Page", name: str) -> list[int]:
    """The cells of the board with a class."""
    return [i for i, names in enumerate(each(shown, "#live td", "e.className.split(' ')")) if name in names]


def step_of(shown: "Page") -> int:
    """The step that is shown, the same in heading and slider."""
    number, count = int(shown.input_value("#step")), shown.get_attribute("#step", "max")
    assert shown.inner_text("#now") == f"Step {number} of {count}"
    assert shown.get_attribute("#step", "aria-valuetext") == f"step {number} of {count}"
    return number


def test_stepping_through(opened):
    trace = sudoku(9, 6)
    shown = opened(trace)
    assert step_of(shown) == 6 and shown.get_by_role("button", name="Next step").is_disabled()
    shown.locator("#step").fill("1")
    assert shown.get_by_role("button", name="Previous step").is_disabled()
    before = trace.question
    for number, step in enumerate(trace.steps, 1):
        assert step_of(shown) == number and texts(shown) == [str(token - 1) for token in step.board]
        new = [i for i, (a, b) in enumerate(zip(before, step.board, strict=True)) if a != b]
        wrong = sum(a != b for a, b in zip(step.board, trace.answer or [], strict=True))
        assert having(shown, "new") == new and bool(having(shown, "bad")) == bool(step.problems)
        assert having(shown, "given") == [i for i, token in enumerate(trace.question) if token > 1]
        counts = [str(len(new)), str(wrong), str(len(step.problems))]
        assert texts(shown, ".value")[:4] == [f"{100 * step.q_halt:.1f} %", *counts]
        assert texts(shown, "#problems li") == step.problems
        assert shown.locator(".bars.tall i.here").count() == 1
        if number < len(trace.steps):
            shown.get_by_role("button", name="Next step").click()
        before = step.board
    shown.get_by_role("button", name="Previous step").click()
    assert step_of(shown) == 5


def test_a_step_in_words_and_its_confidence_drawn(opened):
    shown = opened(small())
    points = each(shown, "#tracks polyline", "[...e.points].map(point => [point.x, point.y])")
    assert points[0] == [[0.5, pytest.approx(0.2)], [1.5, 0.5], [2.5, 0.75]]
    assert points[1] == [[0.5, pytest.approx(0.9996)], [1.5, 0.375], [2.5, pytest.approx(0.0004)]]
    assert each(shown, ".tall b", "e.className") == ["", "halts", "halts"]
    # A dot lies where the line has its point.
    chart, dot = (shown.locator(name).bounding_box() for name in (".bars.tall", ".tall i:nth-of-type(2) b"))
    assert dot["y"] + dot["height"] / 2 == pytest.approx(chart["y"] + 0.375 * chart["height"], abs=2)
    shown.press("body", "Home")
    assert shown.inner_text("#said") == (
        "10 cells changed, 1 cell wrong, 1 rule broken, below 0.1 % sure. The model would continue."
    )
    assert shown.inner_text("#broken") == "Rules broken: 1"
    assert title(shown, 1) == "row 1, column 2: 1, was blank, breaks a rule"
    shown.press("body", "ArrowRight")
    assert title(shown, 1) == "row 1, column 2: 3, was 1" and not shown.is_visible("#problems")
    assert shown.inner_text("#said") == (
        "1 cell changed, every cell right, no rule broken, 62.5 % sure. The model would stop here."
    )


def test_keys(opened):
    shown = opened(sudoku(4, 5))
    keys = ("Home1", "ArrowRight2", "ArrowRight3", "ArrowLeft2", "End5", "ArrowRight5", "Home1", "ArrowLeft1")
    for key in (*keys, "Control+ArrowRight1"):
        shown.keyboard.press(key[:-1])
        assert step_of(shown) == int(key[-1])
    # The slider's own keys, which move it once.
    shown.focus("#step")
    for key, number in (("Home", 1), ("ArrowLeft", 1), ("ArrowRight", 2)):
        shown.keyboard.press(key)
        assert step_of(shown) == number
    # Arrows choose another gate, and leave the step alone.
    shown.focus("input[name=gate]:checked")
    shown.keyboard.press("ArrowRight")
    assert shown.is_checked("input[name=gate][value='0']") and step_of(shown) == 2


def test_every_control_is_reached_by_tab_and_visibly_focused(opened):
    shown = opened(small())
    shown.keyboard.press("Home")
    # The first step has none before it, so `previous` is disabled.
    for name in ("play", "step", "next", "speed", "gate", "problems"):
        shown.keyboard.press("Tab")
        assert each(shown, ":focus", "[e.id || e.name, getComputedStyle(e).outlineStyle]") == [
            [name, "solid"]
        ]


def test_playing(opened):
    shown = opened(sudoku(4, 4))
    shown.clock.install(time=0)
    shown.clock.pause_at(1000)

    def after(milliseconds: int, step: int, button: str) -> None:
        shown.clock.run_for(milliseconds)
        assert (step_of(shown), shown.inner_text("#play")) == (step, button)
        # A screen reader would read every step aloud.
        assert shown.get_attribute("#said", "aria-live") == ("off" if button == "Pause" else None)

    shown.get_by_role("button", name="Play").click()
    after(999, 1, "Pause")
    after(1, 2, "Pause")
    shown.get_by_role("button", name="Pause").click()
    after(5000, 2, "Play")
    # From where it is, four steps a second; at the end it stops.
    shown.select_option("#speed", "4")
    shown.evaluate("() => document.activeElement.blur()")
    shown.keyboard.press("Space")
    after(250, 3, "Pause")
    after(250, 4, "Play")
    # The space bar on the button presses it once; a step by hand stops.
    shown.focus("#play")
    shown.keyboard.press("Space")
    after(0, 1, "Pause")
    shown.keyboard.press("ArrowRight")
    after(0, 2, "Play")


def test_bars_are_pressed_and_dragged_over(opened):
    shown = opened(sudoku(4, 5))
    shown.locator(".bars.changed i").nth(1).click()
    assert step_of(shown) == 2
    bars = shown.locator(".bars.tall").bounding_box()
    for share, press, number in ((0.1, "down", 1), (0.7, "", 4), (2, "up", 5), (0.3, "", 5)):
        shown.mouse.move(bars["x"] + share * bars["width"], bars["y"] + 20)
        if press:
            getattr(shown.mouse, press)()
        assert step_of(shown) == number


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


def test_any_path_is_played(opened):
    shown = opened(recorded())
    assert texts(shown, "#now") == ["Step 3 of 3, path 0"]
    shown.check("input[name=gate][value='1']")
    assert shown.locator(".hot").count() == 1
    shown.check("input[name=path][value='2']")
    assert texts(shown, "#now") == ["Step 1 of 1, path 2"] and shown.locator("#next").is_disabled()
    assert texts(shown, "#live td")[1] == "1" and not shown.locator(".hot").count()
    assert shown.locator("#tracks .bars").first.locator("i").count() == 1
    assert shown.is_checked("input[name=gate][value='-1']")
    shown.check("input[name=path][value='1']")
    shown.click("#previous")
    assert texts(shown, "#now") == ["Step 2 of 3, path 1"] and texts(shown, "#live td")[1] == "3"
    assert shown.locator("#gates .bars").count() == 5


def test_a_gate_is_laid_over_the_board(opened):
    shown = opened(small())
    shown.press("body", "ArrowLeft")
    assert texts(shown, ".value")[4:] == ["0.077", "0.117", "0.158", "0.198", "0.237"]
    assert shown.locator("#live.hot").count() == 0 and not shown.is_visible("#scale")
    shown.get_by_role("radio", name="L · input").check()
    assert shown.locator("#live.hot").count() == 1
    # The range is of all steps: 0.13 in the first one, 0.185 in the last.
    cells = small().steps[1].gates["L"]["input"].cells
    shares = each(shown, "#live td", "+e.style.getPropertyValue('--g')")
    assert shares == pytest.approx([(cell - 0.13) / 0.055 for cell in cells], abs=1e-9)
    assert texts(shown, "#scale span") == ["L · input 0.130", "0.185"]
    assert title(shown, 0) == "row 1, column 1: 1, gate 0.150"
    grounds = each(shown, "#live td", "getComputedStyle(e).backgroundColor")
    assert grounds[0] != grounds[-1] and "".join(texts(shown)) == "1324241313424231"
    shown.get_by_role("radio", name="None over the board").check()
    assert not shown.is_visible("#scale") and shown.locator("#live.hot").count() == 0
    plain = opened(sudoku(6, 3, gated=False))
    assert not plain.is_visible("#gates") and len(texts(plain, ".value")) == 4


def test_a_maze_in_colours(opened):
    shown = opened(maze())
    shown.press("body", "Home")
    marks = [having(shown, name) for name in ("new", "pad", "start", "goal", "path")]
    assert marks == [[9, 10, 15], [15], [5], [14], [9, 10]]
    assert "no rule broken" not in shown.inner_text("#said") and shown.locator("#problems li").count()
    grounds = each(shown, "#live td", "getComputedStyle(e).backgroundColor")
    assert (grounds[0], grounds[9]) == ("rgb(74, 84, 95)", "rgb(143, 192, 245)")
    shown.press("body", "ArrowRight")
    assert title(shown, 6) == "row 2, column 3: path, was open" and having(shown, "bad") == []


def test_arc_in_ten_colours(opened):
    shown = opened(arc())
    assert texts(shown) == ["3", "0", "", "4", "1", "", "5", "9", ""]
    assert title(shown, 0) == "row 1, column 1: green"
    assert title(shown, 2) == "row 1, column 3: no cell, was orange"
    shown.press("body", "Home")
    assert shown.inner_text("#said") == "First board, 4 cells wrong, 10.0 % sure. The model would continue."
    assert texts(shown, ".value")[1] == "-"
    colours = shown.evaluate(
        "() => { const cell = document.querySelector('#live td'); return [...Array(10).keys()].map(i => {"
        " cell.className = 'c' + i; return getComputedStyle(cell).backgroundColor; }) }"
    )
    rgb = np.array([list(map(int, re.findall(r"\d+", colour))) for colour in colours])
    assert (np.abs(rgb[:, None] - rgb[None]).sum(-1) + 1000 * np.eye(10, dtype=int)).min() > 100


def test_other_tokens_are_numbers(opened):
    shown = opened(other(50))
    shown.press("body", "ArrowLeft")
    assert texts(shown) == ["48", "7", "300", "-1", "5", "6"] and having(shown, "new") == [0]
    # Dots would lie upon each other.
    assert shown.locator(".tall b").first.is_hidden()


def test_hostile_texts_are_shown_and_do_nothing(opened):
    steps = [Step(small().question, 0.5, None, False, [HOSTILE], {HOSTILE: {HOSTILE: Gate(0.5, [0.5] * 16)}})]
    shown = opened(small(title=HOSTILE, model=HOSTILE, steps=steps), blocks_handlers=True)
    found = shown.evaluate("() => [typeof hacked, document.scripts.length, document.images.length]")
    assert found == ["undefined", 2, 0]
    assert {shown.title(), shown.text_content("h1"), shown.text_content("#problems li")} == {HOSTILE}
    assert shown.text_content("#gates .name") == f"{HOSTILE} · {HOSTILE}"
    # An inline handler that finds its way in does not run either.
    shown.evaluate("() => document.body.setAttribute('onclick', 'hacked = 1')")
    shown.evaluate("() => document.body.click()")
    assert shown.evaluate("() => typeof hacked") == "undefined"


def test_it_fits_a_phone_and_a_desk(opened):
    long = "row 1, column 1 " + "x" * 200
    for trace in (sudoku(9, 12), one_step([9] * 16, [long], title=long, model=long), arc()):
        shown = opened(trace)
        shown.press("body", "Home")
        if shown.is_visible("#gates"):
            shown.check("input[name=gate][value='1']")
        for width in (360, 1280):
            shown.set_viewport_size({"width": width, "height": 800})
            assert shown.evaluate("() => document.documentElement.scrollWidth") <= width
            cell, bars, play = (
                shown.locator(name).first.bounding_box() for name in ("#live td", ".bars", "#play")
            )
            assert cell["width"] == pytest.approx(cell["height"], abs=1.5)
            assert bars["width"] > 250 and play["height"] > 36


def test_it_is_readable_on_light_and_on_dark_ground(opened):
    shown = opened(sudoku(9, 12))
    for scheme, ground in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 24, 29)")):
        shown.emulate_media(color_scheme=scheme)
        assert each(shown, "body", "getComputedStyle(e).backgroundColor") == [ground]
        # Without a gate, and with one where it is shut the most and the least.
        for gate, step in (("-1", "2"), ("0", "1"), ("0", "12")):
            shown.check(f"input[name=gate][value='{gate}']")
            shown.fill("#step", step)
            for name in ("given", "digit", *(("new", "bad") if gate == "-1" else ())):
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
    share = np.array(pairs) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    luminance = np.sort(linear @ [0.2126, 0.7152, 0.0722], axis=1) + 0.05
    return (luminance[:, 1] / luminance[:, 0]).min()


def test_reduced_motion_disables_animation(opened):
    for options, seconds in (({}, "0s"), ({"reduced_motion": "no-preference"}, "0.2s")):
        moves = each(opened(small(), **options), "#live td", "getComputedStyle(e).transitionDuration")
        assert moves[0] == seconds


def test_paper_shows_the_last_board(opened):
    shown = opened(small())
    assert not shown.is_visible("#last")
    shown.press("body", "Home")
    shown.emulate_media(media="print", color_scheme="dark")
    assert [shown.is_visible(name) for name in ("#last", "#puzzle", "#player")] == [True, True, False]
    assert "".join(texts(shown, "#last td")) == "1324241313424231"
    assert each(shown, "body", "getComputedStyle(e).color") == ["rgb(36, 41, 47)"]


def test_without_a_script_there_are_the_boards_and_the_verdict(opened):
    shown = opened(small(), java_script_enabled=False)
    names = ("#puzzle", "#last", "noscript p", "#player")
    assert [shown.is_visible(name) for name in names] == [True, True, True, False]
    assert shown.inner_text(".verdict strong") == "Solved"


def test_its_parts_have_names(opened):
    shown = opened(small())
    shown.press("body", "Home")
    for part in (
        *("region: The thinking, step by step", "group: Playing", "slider: Step", "combobox: Speed"),
        *("table: Board after step 1", "table: Puzzle", "radio: H · secondary", "heading: Step 1 of 3"),
        *("group: Gates: how far each level lets a source in", "list: Rules broken: 1"),
    ):
        role, _, name = part.partition(": ")
        assert shown.get_by_role(role, name=name).count() == 1, part
