"""Reports on runs: what is drawn of which runs, what the page says, and the command around them."""

import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrm import report
from hrm.common.errors import UserError
from hrm.common.figures import figures
from hrm.common.tables import Table
from hrm.report import differences, main, summary, symptoms, write_report
from hrm.study import html as page
from hrm.study import panels, plots
from hrm.study.history import History, read_history
from hrm.study.panels import Curve, Panel, description, mean_and_range, sections, thinned, value_text

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
GATES = {f"train/gates/H/{source}/mean": 0.1 for source in ("primary", "secondary")} | {
    f"train/gates/L/{source}/{name}": 0.2
    for source in ("input", "primary", "secondary")
    for name in ("mean", "low", "high", "contribution")
}


def run(folder: Path, *lines: dict[str, Any], config: str | None = "seed: 0\n") -> History:
    """A run's folder with these lines, read back; without lines, with two training lines and evaluations."""
    folder.mkdir(parents=True)
    lines = lines or (
        {"step": 0, "model/parameters": 28_000_000},
        {"step": 10, "train/loss": 2.0, "train/steps": 8.0, "train/seconds_per_step": 0.5},
        {"step": 10, "eval/all/exact_accuracy": 0.5, "eval/all/accuracy": 0.75, "eval/all/count": 4},
        {"step": 20, "train/loss": 1.0, "train/steps": 6.0, "train/seconds_per_step": 0.5},
        {"step": 20, "eval/all/exact_accuracy": 0.25, "eval/all/accuracy": 0.8, "eval/all/count": 4},
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return read_history(folder)


def titles(groups: dict[str, list[History]]) -> dict[str, list[str]]:
    return {section.title: [panel.title for panel in section.panels] for section in sections(groups)}


def panel(groups: dict[str, list[History]], title: str) -> Panel:
    (found,) = [panel for section in sections(groups) for panel in section.panels if panel.title == title]
    return found


# --- what there is to draw


def test_a_plain_run_has_no_panels_without_data(tmp_path):
    assert titles({"v1": [run(tmp_path / "v1")]}) == {
        "Learning": [
            "Exact accuracy by step",
            "Exact accuracy by training time",
            "Tokens right by step",
            "Training loss",
        ],
        "Computation": ["ACT steps used", "Time per step", "Parameters"],
    }
    assert titles({"new": [run(tmp_path / "new", {"step": 0})]}) == {}


def test_gates_have_a_panel_for_each_module_and_source(tmp_path):
    found = titles({"g": [run(tmp_path / "g", {"step": 1, **GATES, "train/gate_entropy_loss": 1})]})
    of_L = ["L module, primary", "L module, secondary", "L module, input"]
    assert found == {
        "Gate activity": [*of_L, "H module, primary", "H module, secondary"],
        "Gate saturation": of_L,
        "Gate contribution": of_L,
        "Gate losses": ["Gate entropy"],
    }


def test_saturation_shows_both_ends(tmp_path):
    key = "train/gates/L/input"
    groups = {"g": [run(tmp_path / "g", {"step": 1, f"{key}/low": 0.6, f"{key}/high": 0.1})]}
    found = panel(groups, "L module, input")
    assert found.kinds == ("below 0.1", "above 0.9")
    assert [(curve.dashed, curve.runs[0][1].tolist()) for curve in found.curves] == [
        (False, [0.6]),
        (True, [0.1]),
    ]


def test_subgoals_have_their_section(tmp_path):
    keys = ("feudal_loss", "goal_alignment", "goal_updates", "goal_gate_mean", "goal_gate_std", "goal_norm")
    found = titles({"f": [run(tmp_path / "f", {"step": 1, **{f"train/{key}": 0.5 for key in keys}})]})
    assert list(found) == ["Subgoals"] and len(found["Subgoals"]) == 6


def test_averaged_weights_are_drawn_with_raw_weights(tmp_path):
    raw = {"step": 5, "eval/all/exact_accuracy": 0.25, "eval/all/count": 4}
    both = {**raw, "eval_ema/all/exact_accuracy": 0.75, "eval_ema/all/count": 4}
    groups = {"v1": [run(tmp_path / "v1", raw)], "trm": [run(tmp_path / "trm", both)]}
    found = panel(groups, "Exact accuracy, raw and averaged")
    assert [(curve.group, curve.dashed, curve.runs[0][1].tolist()) for curve in found.curves] == [
        ("trm", False, [0.25]),
        ("trm", True, [0.75]),
    ]
    assert [curve.group for curve in panel(groups, "Exact accuracy by step").curves] == ["v1", "trm"]


def test_training_time_is_steps_times_the_median_step(tmp_path):
    seconds, exact = (
        panel({"v1": [run(tmp_path / "v1")]}, "Exact accuracy by training time").curves[0].runs[0]
    )
    assert (seconds.tolist(), exact.tolist()) == ([5.0, 10.0], [0.5, 0.25])


def test_non_finite_values_are_not_drawn(tmp_path):
    lines = [{"step": step, "train/loss": value} for step, value in enumerate([1.0, None, 10**400, 4.0])]
    groups = {"a": [run(tmp_path / "a", *lines)], "b": [run(tmp_path / "b", {"step": 1, "train/loss": None})]}
    (curve,) = panel(groups, "Training loss").curves
    assert curve.group == "a" and [part.tolist() for part in curve.runs[0]] == [[0, 3], [1.0, 4.0]]


def test_the_mean_of_runs_ends_where_the_first_of_them_ends():
    long = np.array([0, 10, 20, 30]), np.array([0.0, 1.0, 2.0, 3.0])
    short = np.array([5, 15]), np.array([4.0, 4.0])
    x, mean, least, most = mean_and_range([long, short])
    assert x.tolist() == [5, 10, 15]
    assert mean.tolist() == [2.25, 2.5, 2.75]
    assert (least.tolist(), most.tolist()) == ([0.5, 1.0, 1.5], [4.0, 4.0, 4.0])
    assert mean_and_range([long, (short[0] + 100, short[1])])[0].tolist() == []


def test_a_long_curve_becomes_means_of_neighbours(monkeypatch):
    monkeypatch.setattr(panels, "MOST_DRAWN", 2)
    short = np.arange(2), np.array([5.0, 6.0])
    assert thinned(short) is short
    x, y = thinned((np.arange(5), np.array([1.0, 3.0, 5.0, 6.0, 10.0])))
    assert (x.tolist(), y.tolist()) == ([0.5, 3.0], [2.0, 7.0])


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.9312, "share", "93.1 %"),
        (0.1052, "seconds", "105 ms"),
        (12.34, "seconds", "12.3 s"),
        (119.6, "seconds", "120 s"),
        (210, "seconds", "3.5 min"),
        (7200, "seconds", "2.0 h"),
        (27_300_000, "number", "27.3 M"),
        (284_000, "number", "284 k"),
        (1234, "number", "1,234"),
        (0.12345, "fraction", "0.123"),
        (math.nan, "share", "-"),
        (math.nan, "seconds", "-"),
    ],
)
def test_values_in_words(value, unit, text):
    assert value_text(value, unit) == text


def test_a_panel_in_words(tmp_path):
    groups = {"v1": [run(tmp_path / "a"), run(tmp_path / "b")], "none": [run(tmp_path / "c", {"step": 1})]}
    assert description(panel(groups, "Exact accuracy by step")) == (
        "Exact accuracy by step: v1 from 50.0 % to 25.0 % at step 20."
    )
    assert description(panel(groups, "Exact accuracy by training time")).endswith("25.0 % at 10 s.")
    assert description(panel(groups, "Parameters")) == "Parameters: v1 28 M."


# --- the drawing


def test_no_two_groups_look_alike_and_a_group_keeps_its_look():
    look = plots.styles([f"group {i}" for i in range(30)])
    assert len({(style.colour, style.marker) for style in look.values()}) == 30
    assert len({style.colour for style in list(look.values())[: len(plots.COLOURS)]}) == len(plots.COLOURS)
    assert plots.styles(["group 0"])["group 0"] == look["group 0"]


# What an eye without one kind of cone sees, in linear RGB (Machado, Oliveira and Fernandes 2009).
EYES = {
    "all": np.eye(3),
    "no L": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "no M": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "no S": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def luminance(colour: str) -> float:
    return float(linear(colour) @ [0.2126, 0.7152, 0.0722])


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear sRGB."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.maximum(to_xyz @ np.clip(rgb, 0, 1) / [0.9505, 1, 1.089], 0.008856))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eye", EYES)
@pytest.mark.parametrize("place", [0, 1])
def test_colours_are_distinct_for_colour_blind_readers(place, eye):
    seen = [lab(np.array(EYES[eye]) @ linear(pair[place])) for pair in plots.COLOURS]
    for i, one in enumerate(seen):
        for other in seen[:i]:
            assert np.linalg.norm(one - other) > 20, (plots.COLOURS[i], other)


@pytest.mark.parametrize(("place", "grounds"), [(0, ("#ffffff", "#f6f8fa")), (1, ("#14181d", "#1b2027"))])
def test_every_colour_has_enough_contrast(place, grounds):
    for pair in plots.COLOURS:
        for ground in grounds:
            assert re.search(rf"--(page|card): ({ground}|{ground[:4]});", page._PAGE.template)
            dark, light = sorted((luminance(pair[place]), luminance(ground)))
            assert (light + 0.05) / (dark + 0.05) >= 3, (pair, ground)


def test_a_panel_takes_its_colours_from_the_page():
    curves = [
        Curve("a", [(np.arange(3), np.array([0.0, 0.5, 1.0])), (np.arange(3), np.array([0.0, 0.25, 0.5]))]),
        Curve("b", [(np.arange(3), np.array([0.0, 0.25, 0.5]))], dashed=True),
    ]
    look = plots.styles(["a", "b", "unused"])
    text = plots.svg(Panel("Title <&> $x$", curves, "share", kinds=("one", "two")), look, "p1")
    root = ElementTree.fromstring(text)
    assert root.get("aria-hidden") == "true"
    words = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("}text")]
    assert {"Title <&> $x$", "step", "one", "two", "100 %"} <= set(words)
    assert {"var(--c0)", "var(--c1)", "var(--grid)", "currentColor"} <= set(
        re.findall(r"(?:fill|stroke): ([^;\"]+)", text)
    )
    assert "var(--c2)" not in text and not re.search(r"#[0-9a-f]{6}", text)
    identifiers = re.findall(r'\bid="([^"]*)"', text)
    assert identifiers and all(name.startswith("p1-") for name in identifiers)
    assert set(re.findall(r'(?:url\(#|href="#)([^")]*)', text)) <= set(identifiers)
    assert plots.svg(Panel("Title <&> $x$", curves, "share", kinds=("one", "two")), look, "p1") == text


def drawn(one: Panel, look: dict[str, plots.Style]) -> Any:
    """The axes that a panel was drawn into."""
    with figures() as figure:
        axes = figure(figsize=plots.PANEL_SIZE).subplots()
        plots._draw(axes, one, look)
    return axes


def test_seeds_are_drawn_as_mean_range_and_lines():
    x = np.array([1, 2])
    runs = [(x, np.array([0.0, 0.2])), (x, np.array([0.4, 0.6]))]
    axes = drawn(Panel("", [Curve("a", runs)]), plots.styles(["a"]))
    *thin, mean = [(line.get_linewidth(), line.get_ydata().tolist()) for line in axes.lines]
    assert thin == [(0.7, [0.0, 0.2]), (0.7, [0.4, 0.6])]
    assert mean[0] == 1.8 and mean[1] == pytest.approx([0.2, 0.4], abs=1e-15)
    (band,) = axes.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert corners == {(1.0, 0.0), (2.0, 0.2), (1.0, 0.4), (2.0, 0.6)}
    assert [line.get_color() for line in axes.lines] == [plots.COLOURS[0][0]] * 3
    single = drawn(Panel("", [Curve("a", runs[:1])]), plots.styles(["a"]))
    assert len(single.lines) == 1 and len(single.collections) == 0


def test_bars_show_the_mean_and_every_run():
    runs = [(np.zeros(1), np.array([value])) for value in (0.1, 0.3)]
    axes = drawn(Panel("", [Curve("a", runs), Curve("b", runs[:1])], "seconds", None), plots.styles("ab"))
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.2, 0.1], abs=1e-15)
    assert [line.get_xdata().tolist() for line in axes.lines] == [[0.1, 0.3]]
    assert [text.get_text().strip() for text in axes.texts] == ["200 ms", "100 ms"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


@pytest.mark.parametrize(
    ("values", "scale"), [([0.1, 2.0], "log"), ([0.5, 2.0], "linear"), ([0.0, 2.0], "linear")]
)
def test_a_loss_that_spans_much_is_on_a_logarithmic_axis(values, scale):
    axes = drawn(Panel("", [Curve("a", [(np.arange(2), np.array(values))])], "log"), plots.styles(["a"]))
    assert axes.get_yscale() == scale


def test_time_is_in_the_unit_that_suits_it():
    for seconds, unit, ticks in [(60, "seconds", 60), (600, "minutes", 600), (36_000, "hours", 36_000)]:
        curve = Curve("a", [(np.array([0, seconds]), np.zeros(2))])
        axes = drawn(Panel("", [curve], "share", "seconds"), plots.styles(["a"]))
        assert axes.get_xlabel() == f"training time, {unit}"
        assert ticks in axes.get_xticks()
        assert (
            axes.xaxis.get_major_formatter()(seconds)
            == {"seconds": "60", "minutes": "10", "hours": "10"}[unit]
        )


def test_the_users_own_style_changes_nothing():
    import matplotlib

    one, look = Panel("t", [Curve("a", [(np.arange(2), np.ones(2))])]), plots.styles(["a"])
    text = plots.svg(one, look, "p")
    with matplotlib.rc_context({"text.color": "red", "axes.labelsize": 30, "lines.solid_capstyle": "round"}):
        assert plots.svg(one, look, "p") == text
        assert matplotlib.rcParams["text.color"] == "red"


# --- the page


VOID = {"meta", "path", "use"}


class Reader(HTMLParser):
    """What a page holds: open tags, texts, attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_self_contained_and_escaped(tmp_path):
    name = "<script>alert('a & b')</script>"
    groups = {name: [run(tmp_path / "a"), run(tmp_path / "b")], '"v1"': [run(tmp_path / "c")]}
    tables = [Table("Table <i>", ["<b>", "n"], [["<u>", "1"]], "note <s>")]
    paths = write_report(tmp_path / "deep" / "out", "Title <h1>", groups, tables, ["remark <p>"])
    assert paths == (tmp_path / "deep/out/report.html", tmp_path / "deep/out/report.png")
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["report.html", "report.png"]
    assert paths[1].read_bytes().startswith(PNG_SIGNATURE)
    found = Reader(paths[0].read_text(encoding="utf-8"))
    assert found.stack == []
    tags = [tag for tag, _ in found.seen]
    assert not {"script", "i", "b", "u", "s", "link", "img", "iframe"} & set(tags)
    assert (tags.count("h1"), tags.count("figure"), tags.count("svg")) == (1, 7, 7)
    texts = {text.strip() for text in found.texts}
    assert {"Title <h1>", "Table <i>", "<b>", "<u>", "note <s>", "remark <p>"} <= texts
    assert {f"{name} (2 runs)", '"v1"', "Learning", "Computation"} <= texts
    labels = [attrs["aria-label"] for tag, attrs in found.seen if tag == "figure"]
    assert labels[
        0
    ] == f'Exact accuracy by step: {name} from 50.0 % to 25.0 % at step 20; "v1" from 50.0 % to ' + (
        "25.0 % at step 20."
    )
    identifiers = [attrs["id"] for _, attrs in found.seen if "id" in attrs]
    assert len(identifiers) == len(set(identifiers)) > 7
    scopes = [attrs.get("scope") for tag, attrs in found.seen if tag == "th"]
    assert scopes == ["col", "col", "row"]
    for _, attrs in found.seen:
        for attribute in ("src", "href", "xlink:href", "action"):
            assert (attrs.get(attribute) or "#").startswith("#")


def test_a_page_without_groups_of_several_runs_does_not_explain_bands(tmp_path):
    html, _ = write_report(tmp_path / "out", "one", {"a": [run(tmp_path / "a")]})
    assert "Thick lines" not in html.read_text(encoding="utf-8")


def test_an_empty_report_is_a_valid_page(tmp_path):
    html, image = write_report(tmp_path, "new", {"new": [run(tmp_path / "new", {"step": 0})]})
    assert "<figure" not in html.read_text(encoding="utf-8")
    assert image.read_bytes().startswith(PNG_SIGNATURE)


def test_a_failed_report_keeps_the_previous_one(tmp_path, monkeypatch):
    groups = {"a": [run(tmp_path / "a")]}
    html, _ = write_report(tmp_path / "out", "first", groups)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        UserError, match=r"needs matplotlib.*pip install -c constraints\.txt -e '\.\[plots\]'"
    ):
        write_report(tmp_path / "out", "second", groups)
    with pytest.raises(UserError, match="matplotlib"):
        write_report(tmp_path / "new", "second", groups)
    assert "first" in html.read_text(encoding="utf-8") and not (tmp_path / "new").exists()


def test_a_full_disk_leaves_no_half_written_file(tmp_path, monkeypatch):
    html, _ = write_report(tmp_path, "first", {})
    before = html.read_bytes()

    def fail(self: Path, content: bytes) -> None:
        self.touch()
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path, "second", {})
    assert html.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.png"]


# --- the command


def test_the_table_of_runs(tmp_path):
    lines = [{"step": 4, "eval_ema/all/exact_accuracy": 1.0, "eval/all/exact_accuracy": 0.5}]
    table = summary([run(tmp_path / "v1"), run(tmp_path / "trm", *lines)])
    assert table.columns == [
        *("run", "steps", "exact, last", "exact, best", "at step", "EMA, last", "EMA, best"),
        *("time per step", "training time", "parameters"),
    ]
    assert table.rows == [
        ["v1", "20", "25.0 %", "50.0 %", "10", "-", "-", "500 ms", "10 s", "28,000,000"],
        ["trm", "4", "50.0 %", "50.0 %", "4", "100.0 %", "100.0 %", "-", "-", "-"],
    ]
    assert "EMA, last" not in summary([run(tmp_path / "plain")]).columns


def test_a_table_on_a_terminal_is_aligned():
    table = Table("Runs", ["run", "n"], [["v1", "1,000"], ["gated", "1"]], "note")
    assert table.text() == "Runs\nrun        n\nv1     1,000\ngated      1\nnote"


def test_configurations_are_compared_by_their_differences(tmp_path):
    one = run(
        tmp_path / "a", config="lr: 0.1\nrun_name: a\narch:\n  use_gating: true\n  depth: 1\nnew: null\n"
    )
    two = run(tmp_path / "b", config="lr: 0.1\nrun_name: b\narch:\n  use_gating: false\n  depth: 1\n")
    table = differences([one, two])
    assert table is not None and table.columns == ["key", "a", "b"]
    assert table.rows == [["arch.use_gating", "true", "false"], ["new", "null", "-"]]
    assert differences([one]) is None
    assert differences([one, two, run(tmp_path / "c", config=None)]) is None


@pytest.mark.parametrize(
    ("config", "logged", "total"),
    [("{}", {}, 20), ("max_steps: 50", {}, 50), ("max_steps: 50", {"run/total_steps": 40}, 40)],
)
def test_symptoms_are_fed_every_line_in_order(tmp_path, monkeypatch, config, logged, total):
    fed = []

    class Symptoms:
        def __init__(self, config, total_steps):
            assert (config.seed, total_steps) == (7, total)

        def check(self, step, metrics):
            fed.append((step, metrics))
            return [f"seen {step}"] if step == 20 else []

    lines = [
        {"step": 10, "train/loss": 1.0, **logged},
        {"step": 10, "eval/all/count": 3},
        {"step": 20, "train/late": 0.5},
    ]
    monkeypatch.setattr("hrm.report.Symptoms", Symptoms)
    found = run(tmp_path / "a", *reversed(lines), config=f"{{seed: 7, {config.strip('{}')}}}")
    assert symptoms(found) == ["seen 20"]
    assert fed == [(10, {"train/loss": 1.0, "eval/all/count": 3, **logged}), (20, {"train/late": 0.5})]


def test_symptoms_need_a_configuration_that_is_understood(tmp_path):
    assert symptoms(run(tmp_path / "a", config=None)) == []
    (text,) = symptoms(run(tmp_path / "b", config="no_such_key: 1\n"))
    assert text.startswith("no check for symptoms: ") and "no_such_key" in text


def test_only_a_run_that_solves_nothing_has_a_symptom(tmp_path):
    config = "{epochs: 10, eval_interval: 1, max_steps: 1000}"
    for name, gain, count in (("a", 0.0, 1), ("b", 0.001, 0)):
        lines = [
            {"step": step, "eval/all/exact_accuracy": gain * step, "eval/all/count": 9}
            for step in range(100, 1100, 100)
        ]
        assert len(symptoms(run(tmp_path / name, *lines, config=config))) == count


def test_one_run_is_reported_in_its_folder(tmp_path, capsys):
    folder = run(tmp_path / "v1").folder
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Runs",
        "run  steps  exact, last  exact, best  at step  time per step  training time  parameters",
        "v1      20       25.0 %       50.0 %       10         500 ms           10 s  28,000,000",
        "Exact: test puzzles solved exactly. Training time: steps times the median time per step.",
        str(folder / "report.html"),
        str(folder / "report.png"),
    ]
    assert "<title>v1</title>" in (folder / "report.html").read_text(encoding="utf-8")


def test_several_runs_are_reported_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        report, "symptoms", lambda run: [f"{run.folder} is ill"] if run.name == "b/v1" else []
    )
    folders = [str(run(Path(name), config=f"seed: {i}\n").folder) for i, name in enumerate(("a/v1", "b/v1"))]
    assert main(folders) == 0
    assert "note: b/v1: b/v1 is ill" in capsys.readouterr().out.splitlines()
    text = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "<title>a/v1 and b/v1</title>" in text and "<li>b/v1: b/v1 is ill</li>" in text
    assert '<th scope="row">seed</th><td>0</td><td>1</td>' in text
    assert main([*folders, "--output", "elsewhere"]) == 0
    assert (tmp_path / "elsewhere" / "report.png").exists()


def test_a_folder_without_a_run_is_reported_in_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no metrics.jsonl there; give")
