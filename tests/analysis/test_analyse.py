"""`python -m hrm.analyse`: every number of the page from the saved predictions, models of known answers."""

import html
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from hrm import analyse
from hrm.analysis import judge
from hrm.analysis.records import Examples
from hrm.analysis.variants import steps_of, without
from hrm.checkpoint.save import save_checkpoint
from hrm.common.intervals import t_margin
from hrm.config.load import to_yaml
from hrm.config.schema import Config, SubgoalConfig
from hrm.data.arc.build import write_arc
from hrm.data.arc.files import read_source
from hrm.data.dataset import PuzzleDataset
from hrm.data.format import Metadata, PuzzleSet
from hrm.data.writer import Shape, new_dataset
from hrm.engine.inference import Inference
from hrm.engine.modes import EAGER
from hrm.model.hrm import HRM
from tests.support.arc_tasks import random_task, write_tasks
from tests.support.browser import chromium
from tests.support.trained_runs import as_official, make_config, make_model, make_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser

Z = 1.959963984540054
DEPTH, PATHS, N, CELLS = 3, 3, 20, 16
CYCLES = {"H_cycles": 2, "L_cycles": 2}
SUBGOALS = SubgoalConfig(enabled=True, manager_period=2, goal_dim=8)
OWN_ARCH = {**CYCLES, "use_gating": True, "subgoal_head": SUBGOALS}


def save_run(folder: Path, config: Config, model: HRM) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    save_checkpoint(folder, 1, weights=model.state_dict(), training={"position": [1, 0]}, run={})
    return folder


def write_data(folder: Path, inputs: np.ndarray, labels: np.ndarray, ids: np.ndarray, shape: Shape) -> None:
    one = np.arange(len(inputs) + 1, dtype=np.int32)
    part = PuzzleSet(inputs.astype(np.uint8), labels.astype(np.uint8), ids.astype(np.int32), one, one)
    with new_dataset(folder) as writer:
        for split in ("train", "test"):
            writer.split(split, shape).add("all", part, np.zeros(len(inputs), int))
        writer.close([f"puzzle {number}" for number in range(int(ids.max()) + 1)])


@pytest.fixture(scope="module")
def run(tiny_sudoku: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gated model with subgoals that is right on 12 of 20 puzzles, for their labels are its answers."""
    folder = tmp_path_factory.mktemp("analyse")
    dataset = PuzzleDataset(tiny_sudoku, "test")
    config = make_config(OWN_ARCH, data_path=str(folder / "data"), global_batch_size=16)
    model = make_model(config, dataset.metadata)
    # Padding and blank are no answers.
    model.lm_head.weight[:2] = 0
    inputs = np.asarray(dataset.sets["all"].inputs, np.int32)
    solver = Inference(model, N, CELLS, mode=EAGER, loss=config.loss)
    labels = np.maximum(solver.solve(inputs, np.zeros(N, np.int32))[0], 2)
    labels[12:, 3] = 7 - labels[12:, 3]
    write_data(folder / "data", inputs, labels, np.zeros(N), Shape(CELLS, 6, kind="sudoku"))
    return save_run(folder / "own", config, model)


def look(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[dict[str, Any], str]:
    """The findings by run, and what was said."""
    words = [str(word) for word in argv]
    assert analyse.main([*words, f"depth={DEPTH}", f"paths={PATHS}", "device=cpu", "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


# --- the numbers once more, in plain code


def share(hits: list[float]) -> tuple[float, float, float]:
    n, mean = len(hits), math.fsum(hits) / len(hits)
    if set(hits) <= {0, 1}:
        middle, half = (
            (mean + Z * Z / (2 * n)) / (1 + Z * Z / n),
            Z / (1 + Z * Z / n) * math.sqrt(mean * (1 - mean) / n + Z * Z / (4 * n * n)),
        )
    elif n == 1:
        middle, half = mean, 1.0
    else:
        middle, half = mean, t_margin(hits)
    return mean, max(0.0, middle - half), min(1.0, middle + half)


def percent(hits: Any) -> str:
    hits = [float(hit) for hit in hits]
    if not hits:
        return "-"
    return "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * part for part in share(hits)))


def mean(values: Any, least: float = 0.0) -> str:
    values = [float(value) for value in values]
    if not values:
        return "-"
    centre = math.fsum(values) / len(values)
    if len(values) == 1:
        return f"{centre:.3g}"
    half = t_margin(values)
    return f"{centre:.3g} [{max(least, centre - half):.3g}, {centre + half:.3g}]"


def points(before: Any, after: Any) -> str:
    n = len(before)
    gained = sum(bool(b) and not a for a, b in zip(before, after, strict=True))
    lost = sum(bool(a) and not b for a, b in zip(before, after, strict=True))
    middle = (gained - lost) / (n + 2)
    half = Z * math.sqrt((gained + lost + 1) / (n + 2) - middle**2) / math.sqrt(n + 2)
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(
        *(100 * x + 0.0 for x in ((gained - lost) / n, middle - half, middle + half))
    )


def rows_of(records: dict[str, Any], M: int) -> dict[str, list[list[str]]]:
    """The tables of all sections, from the records alone."""
    deep = records["deep"]
    labels, inputs, last = deep["labels"], deep["inputs"], deep["predictions"].shape[1]
    right = [
        [bool((p == y).all()) for p in steps] for steps, y in zip(deep["predictions"], labels, strict=True)
    ]
    at = lambda step: [own[step - 1] for own in right]  # noqa: E731
    own, n = at(M), len(labels)
    solved = lambda answers: [bool((p == y).all()) for p, y in zip(answers, labels, strict=True)]  # noqa: E731
    steps = sorted({1, 2, M, 2 * M, last})
    found: dict[str, list[list[str]]] = {}
    cell_shares = {
        s: [(p[s - 1] == y).mean() for p, y in zip(deep["predictions"], labels, strict=True)]
        for s in range(1, last + 1)
    }
    found["depth"] = [
        [str(s), percent(at(s)), percent(cell_shares[s]), "-" if s == M else points(own, at(s))]
        for s in steps
    ]
    found["drift"] = [
        [f"{name}, step {s}", str(len(rows)), *(mean(deep[f"drift_{level}"][rows, s - 1]) for level in "HL")]
        for name, rows in (
            ("right", [i for i in range(n) if own[i]]),
            ("wrong", [i for i in range(n) if not own[i]]),
        )
        for s in steps
    ]
    open_cells = inputs != labels
    found["cells"] = []
    for s in range(1, M + 1):
        hits = sum(
            int(((p[s - 1] == y) & o).sum())
            for p, y, o in zip(deep["predictions"], labels, open_cells, strict=True)
        )
        before = at(s - 1) if s > 1 else [False] * n
        gained = [now and not then for now, then in zip(at(s), before, strict=True)]
        lost = [then and not now for now, then in zip(at(s), before, strict=True)]
        found["cells"].append(
            [str(s), f"{100 * hits / open_cells.sum():.1f} %", percent(at(s)), percent(gained), percent(lost)]
        )
    found["selection"] = []
    for by, name in (("init", "another start"), ("symmetry", "another symmetry")):
        record = records[by]
        paths = [solved(record["predictions"][:, k]) for k in range(PATHS)]
        assert paths[0] == own
        failed, passed = ([i for i in range(n) if own[i] == value] for value in (False, True))
        best = record["q_halt"].argmax(axis=1)
        chosen = [paths[best[i]][i] for i in range(n)]
        any_other = [any(path[i] for path in paths[1:]) for i in failed]
        single = [
            [sum(path[i] for path in paths[1:]) / (PATHS - 1) for i in rows] for rows in (failed, passed)
        ]
        some = [any(path[i] for path in paths) for i in range(n)]
        found["selection"].append(
            [
                name,
                percent(any_other),
                *map(percent, single),
                percent(chosen),
                points(own, chosen),
                percent(some),
            ]
        )
    found["easy"] = []
    asked = [
        (f"{b} blank{'s' * int(b > 1)}", p, q)
        for b, p, q in zip(*(records["easy"][k] for k in ("blanks", "predictions", "inputs")), strict=True)
    ]
    blanks = (inputs == 1).sum(axis=1)
    for few, (_, _, filled) in zip(records["easy"]["blanks"], asked, strict=True):
        assert ((filled == 1).sum(axis=1) == np.minimum(few, blanks)).all()
        assert (filled[filled != 1] == np.where(inputs != 1, inputs, labels)[filled != 1]).all()
    asked.append((f"own blanks ({blanks.mean():.1f} on average)", deep["predictions"][:, M - 1], inputs))
    for name, answers, shown in asked:
        parts = [
            [
                bool((p == y)[mask].all())
                for p, y, mask in zip(answers, labels, shown == 1 if blank else shown != 1, strict=True)
            ]
            for blank in (True, False)
        ]
        found["easy"].append([name, str(n), percent(solved(answers)), *map(percent, parts)])
    meanings = {"as trained": own, "1 ACT step": at(1)}
    names = records["parts"]["names"].tolist()
    meanings |= {name: solved(p) for name, p in zip(names, records["parts"]["predictions"], strict=True)}
    found["contributions"] = [
        [name, percent(hits), "-" if name == "as trained" else points(own, hits)]
        for name, hits in meanings.items()
    ]
    masks = [[True] * n, [True] * n, own, [not hit for hit in own]]
    gates = ["L, primary", "L, secondary", "L, input", "H, primary", "H, secondary"]
    found["gates"] = [
        [
            name,
            *(
                mean(deep["gates"][np.array(m), s, i])
                for m, s in zip(masks, (0, M - 1, M - 1, M - 1), strict=True)
            ),
        ]
        for i, name in enumerate(gates)
    ]
    found["goals"] = [[str(s), mean(deep["goal_gate"][:, s - 1])] for s in range(1, M + 1)]
    sure = [1 / (1 + math.exp(-q)) for q in deep["q_halt"][:, M - 1].astype(np.float64)]
    found["q_halt"] = []
    for place in range(10):
        inside = [i for i in range(n) if min(int(10 * sure[i]), 9) == place]
        if inside:
            average = 100 * math.fsum(sure[i] for i in inside) / len(inside)
            right_ones = [own[i] for i in inside]
            found["q_halt"].append(
                [
                    f"{10 * place} to {10 * place + 10} %",
                    str(len(inside)),
                    f"{average:.1f} %",
                    percent(right_ones),
                ]
            )
    found["trajectories"] = []
    ways = records["states"]["z_H"].astype(np.float64)
    for name, mask in (("right", records["states"]["right"]), ("wrong", ~records["states"]["right"])):
        lengths = [math.fsum(math.dist(a, b) for a, b in itertools.pairwise(way)) for way in ways[mask]]
        direct = [math.dist(way[0], way[-1]) for way in ways[mask]]
        detour = [a / b for a, b in zip(lengths, direct, strict=True)]
        row = [name, str(int(mask.sum())), mean(lengths), mean(direct), mean(detour, least=1.0)]
        found["trajectories"].append(row)
    return found


def sentences_of(records: dict[str, Any], M: int) -> dict[str, str]:
    """By section, the numbers of its sentence that its table does not have, from the records alone."""
    deep, states = records["deep"], records["states"]
    labels, inputs, answers = deep["labels"], deep["inputs"], deep["predictions"]
    right = (answers == labels[:, None]).all(axis=2)
    own, last = right[:, M - 1], answers.shape[1]
    kept = (answers[:, M - 1 :] == answers[:, M - 1 : M]).all(axis=(1, 2))
    since = []
    for i in range(N):
        steps = []
        for cell in np.flatnonzero(inputs[i] != labels[i]):
            wrong = [s for s in range(1, M + 1) if answers[i, s - 1, cell] != labels[i, cell]]
            steps.append(max(wrong, default=0) + 1)
        since.append(np.mean(steps))
    lost = percent(right[:, :M].any(axis=1) & ~own)
    shares = [
        ((answers[:, s] == labels) & (inputs != labels)).sum() / (inputs != labels).sum() for s in range(M)
    ]
    early = min(s for s in range(1, M + 1) if shares[s - 1] >= 0.99 * shares[-1])
    single = (records["easy"]["predictions"][0] == labels).all(axis=1)
    without = (records["parts"]["predictions"][-1] == labels).all(axis=1)
    sure = 1 / (1 + np.exp(-deep["q_halt"][:, M - 1].astype(np.float64)))
    place = np.minimum(np.floor(10 * sure), 9)
    gaps = [abs((own - sure)[place == b].sum()) for b in range(10)]
    taken = np.minimum(deep["halts_at"], M)
    halted = right[np.arange(N), taken - 1]
    ece = f"{100 * sure.mean():.1f} {100 * own.mean():.1f} {100 * sum(gaps) / N:.1f}"
    saved = f"{100 * (1 - taken.mean() / M):.0f} {mean(taken)} {points(own, halted)}"
    opened = deep["gates"][:, [0, M - 1]].mean(axis=0)
    most = np.abs(opened[1] - opened[0]).argmax()
    others = ""
    for by in ("init", "symmetry"):
        paths = (records[by]["predictions"] == labels[:, None]).all(axis=2)
        chosen = paths[np.arange(N), records[by]["q_halt"].argmax(axis=1)]
        others += f" {percent(paths[:, 1:].mean(axis=1))} {(paths.any(axis=1) & ~chosen).sum()}"
    bias = 100 * (sure - own)
    surplus = f"{bias.mean():.1f} {bias.mean() - t_margin(bias):.1f} {bias.mean() + t_margin(bias):.1f}"
    ways = states["z_H"].astype(np.float64).reshape(-1, states["z_H"].shape[2])
    power = np.linalg.svd(ways - ways.mean(axis=0), compute_uv=False) ** 2
    variance = 100 * power[:2].sum() / power.sum()
    moving = deep["drift_H"][:, -1] > 0.01
    shown = f"{moving[own].sum()} {moving[~own].sum()} 0.01"
    return {
        "depth": f"{N} {M} {last}",
        "drift": f"{M} {last} 1 {own.sum()} {(~own).sum()} {shown} "
        f"{percent(kept[own])} {percent(kept[~own])}",
        "cells": f"1 {M} {early} 99 {100 * shares[0]:.1f} {100 * shares[-1]:.1f} {mean(since)} {lost}",
        "selection": f"{(~own).sum()} {N} {PATHS - 1} {PATHS} {others}",
        "easy": f"{(inputs == 1).sum(axis=1).mean():.1f} {points(own, single)}",
        "contributions": "2",
        "gates": f"{M} 1 {opened[0][most]:.3f} {opened[1][most]:.3f}",
        "goals": f"{M} 1 {points(own, without)}",
        "q_halt": f"{M} {ece} {(sure >= 0.5).sum()} {surplus} {percent((~own)[sure >= 0.5])} {saved}",
        "trajectories": f"{variance:.0f} {len(states['right'])} {2 * M}",
    }


def tokens(text: str) -> set[str]:
    return set(re.findall(r"\d+(?:\.\d+)?", text))


def test_every_number_comes_from_the_saved_predictions(run, capsys, tmp_path):
    found, said = look(capsys, run, "seed=3", f"output={tmp_path}")
    (own,) = found.values()
    records = {file.stem: dict(np.load(file)) for file in (run / "analysis" / "records").glob("*.npz")}
    M = 3
    right = (records["deep"]["predictions"][:, M - 1] == records["deep"]["labels"]).all(axis=1)
    assert 0 < right.sum() < N, right
    expected = rows_of(records, M)
    page = html.unescape(
        re.sub(r"<svg.*?</svg>", "", (tmp_path / "analysis.html").read_text(), flags=re.DOTALL)
    )
    assert list(own["sections"]) == [name for name in analyse.SECTION_NAMES if name in expected]
    for name, rows in expected.items():
        section = own["sections"][name]
        shown = section["table"]["rows"]
        assert [row[: len(mine)] for row, mine in zip(shown, rows, strict=True)] == rows, name
        for row in rows:
            assert "".join(f"<td>{cell}</td>" for cell in row[1:]) in page, row
        assert page.count(section["sentence"]) == 2 and section["sentence"] in said
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert own["left_out"] == {
        "identifiers": "all puzzles have the same identifier",
        "votes": "only augmented ARC tasks vote",
    }
    # The chance of a calibrated judge is drawn, so its excess is checked by itself.
    q_halt, deep = own["sections"]["q_halt"], records["deep"]
    excess = [100 * q_halt["numbers"]["ece_beyond_chance"][key] for key in ("value", "low", "high")]
    extra = sentences_of(records, M)
    excess.append(100 * q_halt["numbers"]["ece_by_chance"])
    extra["q_halt"] += " ".join(f" {part:.1f}" for part in excess)
    for name, rows in expected.items():
        assert tokens(own["sections"][name]["sentence"]) <= tokens(f"{rows} {extra[name]}"), name
    pairs = [
        (a > b) + (a == b) / 2 for a in deep["q_halt"][right, M - 1] for b in deep["q_halt"][~right, M - 1]
    ]
    assert q_halt["numbers"]["auroc"] == pytest.approx(np.mean(pairs))


def test_what_is_measured_is_kept(run, capsys, tmp_path):
    options = (run, "sections=depth,easy", "samples=8", f"output={tmp_path}")
    first, said = look(capsys, *options)
    assert "long trajectories measured in" in said and "easy puzzles measured in" in said
    again, said = look(capsys, *options)
    assert again == first and " measured in " not in said
    (run / "analysis" / "records" / "easy.npz").write_bytes(b"cut off")
    again, said = look(capsys, *options)
    assert again == first and "easy puzzles measured in" in said and "long trajectories measured" not in said
    # Other puzzles are other records.
    _, said = look(capsys, *options, "seed=1")
    assert "long trajectories measured in" in said
    assert list(first["own"]["sections"]) == ["depth", "easy"]
    assert first["own"]["sections"]["depth"]["numbers"]["3"]["exact"]["n"] == 8


def test_two_runs_stand_side_by_side(run, capsys, tmp_path):
    other = tmp_path / "other"
    metadata = PuzzleDataset(run.parent / "data", "test").metadata
    make_run(other, make_config({"halt_max_steps": 2}, data_path=str(run.parent / "data")), metadata)
    found, _ = look(capsys, run, other, "sections=depth,gates", f"output={tmp_path}")
    assert found["other"]["left_out"] == {"gates": "the model has no gates"}
    page = (tmp_path / "analysis.html").read_text()
    assert (
        page.count("<figcaption>own</figcaption>") == 2 and page.count("<figcaption>other</figcaption>") == 1
    )
    deep = [dict(np.load(each / "analysis" / "records" / "deep.npz")) for each in (run, other)]
    solved = [
        (record["predictions"][:, M - 1] == record["labels"]).all(axis=1)
        for record, M in zip(deep, (3, 2), strict=True)
    ]
    assert f"other solves {points(*solved)} percentage points more than own" in page
    row = ["solved", *map(percent, solved)]
    assert f"{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}" in page


# --- models whose answers are known


def test_a_fixed_point_does_not_drift_and_gains_nothing(run, capsys, tmp_path):
    config = make_config({"puzzle_emb_ndim": 0}, data_path=str(run.parent / "data"))
    model = make_model(config, PuzzleDataset(run.parent / "data", "test").metadata)
    for name, parameter in model.named_parameters():
        if name != "lm_head.weight":
            parameter.data.zero_()
    # Blocks of zeros norm the sum of equal states, which is the state again.
    model.H_init.fill_(1.0)
    model.L_init.fill_(1.0)
    (own,) = look(capsys, save_run(tmp_path / "still", config, model), "sections=depth,drift")[0].values()
    depth, drift = (own["sections"][name] for name in ("depth", "drift"))
    assert depth["numbers"]["gain_beyond"]["value"] == depth["numbers"]["gain_within"]["value"] == 0
    assert "Further steps make no significant difference" in depth["sentence"]
    assert drift["numbers"]["median_drift_end"] < 1e-5 and "more than 0.01 for 0 of the" in drift["sentence"]
    moves = [each[level]["value"] for each in drift["numbers"]["wrong"]["steps"].values() for level in "HL"]
    assert max(moves) < 1e-5 and drift["numbers"]["wrong"]["answer_kept"]["value"] == 1


def test_a_model_that_reads_identifiers_loses_with_others(capsys, tmp_path):
    """Its answer to every cell is the number of the puzzle, which the uniform attention spreads."""
    D, S, V, K = 16, 8, 6, 5
    arch = {"hidden_size": D, "num_heads": 2, "puzzle_emb_ndim": D}
    config = make_config(arch, data_path=str(tmp_path / "data"))
    model = make_model(config, Metadata(0, 0, 0, V, S, K, 12, 1.0, ["all"]))
    for parameter in model.parameters():
        parameter.data.zero_()
    for level in (model.L_level, model.H_level):
        attention = level.layers[0].self_attn
        attention.qkv_proj.weight[2 * D :] = torch.eye(D)
        attention.o_proj.weight.copy_(torch.eye(D))
    model.H_init.zero_()
    model.L_init.zero_()
    model.puzzle_emb.weights.zero_()
    model.puzzle_emb.weights[1:] = torch.eye(D)[1:K]
    model.lm_head.weight[:V] = torch.eye(D)[:V]
    numbers = np.arange(12) % 4 + 1
    labels = numbers[:, None].repeat(S, axis=1)
    write_data(tmp_path / "data", np.full((12, S), 5), labels, numbers, Shape(S, V, kind="tokens"))
    (own,) = look(capsys, save_run(tmp_path / "reads", config, model), "sections=identifiers")[0].values()
    found = own["sections"]["identifiers"]["numbers"]
    assert [found[name]["exact"]["value"] for name in ("own", "blank", "another's")] == [1, 0, 0]
    assert found["another's"]["change"]["high"] < -0.5
    record = dict(np.load(tmp_path / "reads" / "analysis" / "records" / "identifiers.npz"))
    assert (record["identifiers"][0] == 0).all() and (record["identifiers"][1] != numbers).all()
    assert (record["predictions"][1] == record["identifiers"][1][:, None]).all()


@pytest.mark.parametrize(("factor", "is_calibrated"), [(1.0, True), (2.5, False)])
def test_a_calibrated_judge_has_no_calibration_error(factor, is_calibrated):
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 1.5, 3000)
    right = rng.random(3000) < judge.sigmoid(logits)
    labels = np.ones((3000, 1), np.int32)
    deep = {
        "predictions": right[:, None, None].astype(np.uint8),
        "q_halt": factor * logits[:, None],
        "halts_at": np.ones(3000, np.int32),
    }
    study: Any = SimpleNamespace(
        record=lambda _: deep, steps=1, seed=0, examples=Examples({}, labels, labels, labels[:, 0])
    )
    found = judge.q_halt(study)
    excess = found.numbers["ece_beyond_chance"]
    assert (excess["low"] == 0) == is_calibrated
    assert ("not significantly more than" in found.sentence) == is_calibrated
    gap = np.abs(judge.sigmoid(logits) - judge.sigmoid(factor * logits)).mean()
    assert found.numbers["ece"] == pytest.approx(gap, abs=0.025)


def test_a_part_taken_away(run, capsys, tmp_path):
    """The predictions without a part, computed by the levels themselves."""
    data = PuzzleDataset(run.parent / "data", "test")
    config = make_config({"H_cycles": 2, "L_cycles": 3}, data_path=str(run.parent / "data"))
    model = make_model(config, data.metadata)
    look(capsys, save_run(tmp_path / "v1", config, model), "sections=contributions")
    record = dict(np.load(tmp_path / "v1" / "analysis" / "records" / "parts.npz"))
    inputs = torch.from_numpy(np.asarray(data.sets["all"].inputs, np.int32))
    e, rope = model.embed(inputs, model.puzzle_emb.weights[:1].expand(N, -1)), (model.cos, model.sin)
    for part in ("1 H-cycle", "1 L-cycle", "H frozen", "L frozen"):
        found = record["predictions"][record["names"].tolist().index(part)]
        z_H, z_L = (start.expand_as(e) for start in (model.H_init, model.L_init))
        H_cycles, L_cycles = 1 if part == "1 H-cycle" else 2, 1 if part == "1 L-cycle" else 3
        for _ in range(3):
            if part == "H frozen":
                z_H = model.H_init.expand_as(e)
            for cycle in range(H_cycles):
                for _ in range(L_cycles):
                    z_L = z_L if part == "L frozen" else model.L_level(z_L, z_H, e, *rope)
                if part != "H frozen" or cycle == H_cycles - 1:
                    z_H = model.H_level(z_H, z_L, None, *rope)
        assert np.array_equal(found, model.logits(z_H).argmax(-1).numpy())
        # The model is whole again.
        with without(model, part), steps_of(model, 9):
            pass
        assert model.arch == config.arch and not [key for key in model.state_dict() if "_level._" in key]


# --- other checkpoints, other puzzles


def test_an_official_folder(run, capsys, tmp_path):
    rng = np.random.default_rng(0)
    inputs, labels = rng.integers(1, 6, (2, 12, 9))
    write_data(tmp_path / "data", inputs, labels, np.arange(12) % 5, Shape(9, 6, kind="tokens"))
    make_run(tmp_path / "own", make_config(CYCLES))
    folder = tmp_path / "official"
    folder.mkdir()
    as_official(tmp_path / "own", folder, str(tmp_path / "data"))
    found, _ = look(capsys, folder, "samples=10")
    own = found["official"]
    assert list(own["sections"]) == [
        *("depth", "drift", "cells", "selection", "identifiers", "contributions", "q_halt", "trajectories")
    ]
    assert [row[0] for row in own["sections"]["selection"]["table"]["rows"]] == ["another start"]
    assert own["left_out"]["easy"] == "puzzles of kind tokens have no blank cells to fill in"
    assert (folder / "analysis" / "analysis.html").is_file() and "10 puzzles" in str(own["facts"])


def test_a_single_state_has_no_low_level(run, capsys, tmp_path):
    metadata = PuzzleDataset(run.parent / "data", "test").metadata
    make_run(
        tmp_path / "urm",
        make_config({**CYCLES, "single_state": True}, data_path=str(run.parent / "data")),
        metadata,
    )
    (own,) = look(capsys, tmp_path / "urm", "sections=drift,contributions")[0].values()
    assert own["sections"]["drift"]["table"]["columns"] == ["answer", "puzzles", "z_H moves"]
    cuts = [row[0] for row in own["sections"]["contributions"]["table"]["rows"]]
    assert cuts == ["as trained", "1 ACT step", "1 H-cycle", "1 L-cycle"]


def test_augmented_tasks_vote(capsys, tmp_path):
    """A model that knows no answer, and one whose every vote is right but the votes of two augmentations."""
    tasks = {"one": random_task(1, largest=5), "two": random_task(2, test=2, largest=5)}
    write_tasks(tmp_path / "source" / "evaluation", tasks)
    write_arc(tmp_path / "data", list(read_source(str(tmp_path / "source"))), num_aug=3, seed=0)
    dataset = PuzzleDataset(tmp_path / "data", "test")
    arch = {"hidden_size": 16, "num_heads": 2, "H_cycles": 1, "L_cycles": 1, "halt_max_steps": 1}
    make_run(tmp_path / "run", make_config(arch, data_path=str(tmp_path / "data")), dataset.metadata)
    (own,) = look(capsys, tmp_path / "run", "sections=votes,selection")[0].values()
    assert [row[:2] for row in own["sections"]["votes"]["table"]["rows"]] == [["1", "2"], ["4", "2"]]
    assert own["sections"]["votes"]["numbers"]["4"]["pass_at_2"]["value"] == 0
    record = dict(np.load(tmp_path / "run" / "analysis" / "records" / "votes.npz"))
    part = dataset.sets["all"]
    assert np.array_equal(record["inputs"], part.inputs)
    answers = {**record, "predictions": np.array(part.labels)}
    study: Any = SimpleNamespace(record=lambda _: answers, dataset=dataset, seed=0)
    found = judge.votes(study).numbers
    assert found["1"]["pass_at_1"]["value"] == found["4"]["pass_at_1"]["value"] == 1
    # One voter of four is right: no answer of one vote, and some answer of two, or of all.
    wrong = answers["predictions"]
    wrong[record["identifiers"] != record["identifiers"][0], 0] ^= 1
    found = judge.votes(study).numbers
    assert found["4"]["pass_at_2"]["value"] <= 0.5 and found["4"]["pass_at_1"]["n"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "0 runs are given: give one, or two to compare them"),
        (["a", "b", "c"], "3 runs are given"),
        (["{run}", "sections=dept"], "sections=dept: no such section; did you mean depth?"),
        (["{run}", "depth=0"], "depth=0 is not allowed: give a whole number from 1 to 64"),
        (["{run}", "data_path={run}/none"], "none: no such data set; give data_path=DIR"),
    ],
)
def test_refusals(words, message, run, capsys):
    assert analyse.main([word.format(run=run) for word in words]) == 2
    assert message in capsys.readouterr().err


# --- what a browser shows


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with chromium() as found:
        yield found


def test_the_page_in_a_browser(run, browser, capsys, tmp_path):
    look(capsys, run, "sections=depth,drift,q_halt", f"output={tmp_path}")
    asked: list[str] = []
    said: list[str] = []
    for width in (360, 1280):
        shown = browser.new_page(viewport={"width": width, "height": 800})
        shown.on("request", lambda request: asked.append(request.url))
        shown.on("console", lambda message: said.append(message.text))
        address = (tmp_path / "analysis.html").as_uri()
        shown.goto(address)
        # Nothing but a table's own region is wider than the window.
        assert shown.evaluate("document.documentElement.scrollWidth") == width
        assert shown.locator("section h2").all_inner_texts()[:2] == ["Depth", "Drift and settling"]
        # By keyboard: the first link leads to its section, and every table can be reached.
        shown.keyboard.press("Tab")
        shown.keyboard.press("Enter")
        assert shown.url == f"{address}#depth"
        assert shown.evaluate("Math.abs(document.getElementById('depth').getBoundingClientRect().top) < 5")
        assert shown.locator("[role=region][tabindex='0']").count() == 3
        assert shown.locator("[role=img][aria-label]").count() == 5
        shown.close()
    assert asked == [address] * 2 and said == []
