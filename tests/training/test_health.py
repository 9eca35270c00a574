"""Each symptom is told once, with its numbers and remedies, and a healthy run hears of none."""

import math
from collections.abc import Iterable, Mapping

import numpy as np
import pytest

from hrm.config.load import parse_args
from hrm.config.schema import Config
from hrm.training.health import LINES, Symptoms

TOTAL, LOG = 3750, 50
GATES = ("L/primary", "L/secondary", "L/input", "H/primary", "H/secondary")
# A gated run of preset=quick with rotary positions: the step, then steps, exact_accuracy, accuracy,
# puzzle_emb_norm and its gradient's, then mean, std and low of the gates L/primary, L/input and H/secondary.
QUICK_RUN = [
    (50, 7.865, 0.0, 0.26, 0.0345, 0.00227, 0.109, 0.052, 0.493, 0.114, 0.055, 0.472, 0.117, 0.05, 0.431),
    (100, 8.0, 0.0, 0.665, 0.0622, 0.0015, 0.12, 0.066, 0.44, 0.133, 0.084, 0.4, 0.123, 0.045, 0.323),
    (200, 8.0, 0.0, 0.755, 0.2, 0.00178, 0.142, 0.074, 0.312, 0.154, 0.087, 0.264, 0.154, 0.056, 0.169),
    (250, 5.361, 0.005, 0.766, 0.286, 0.00819, 0.154, 0.081, 0.26, 0.168, 0.097, 0.22, 0.162, 0.057, 0.126),
    (500, 5.467, 0.039, 0.821, 0.396, 0.00411, 0.21, 0.107, 0.11, 0.233, 0.122, 0.086, 0.229, 0.078, 0.029),
    (1000, 4.46, 0.34, 0.905, 0.506, 0.00568, 0.306, 0.101, 0.004, 0.329, 0.114, 0.003, 0.345, 0.095, 0.0),
    (1500, 4.989, 0.946, 0.99, 0.571, 0.0151, 0.386, 0.102, 0.0, 0.395, 0.111, 0.0, 0.594, 0.162, 0.0),
    (2000, 3.822, 0.98, 0.996, 0.581, 0.0258, 0.427, 0.101, 0.0, 0.43, 0.104, 0.0, 0.747, 0.152, 0.0),
    (2750, 3.113, 0.997, 0.999, 0.602, 0.0137, 0.494, 0.121, 0.0, 0.466, 0.108, 0.0, 0.875, 0.128, 0.0),
]
EVALUATIONS = {937: 0.172, 1874: 0.908, 2811: 0.982, 3748: 0.99}
PUZZLE = ("train/puzzle_emb_norm", "train/puzzle_emb_grad_norm")

Lines = list[tuple[int, dict[str, float]]]


def configured(*words: str) -> Config:
    """The configuration of that run with other words."""
    given = {word.partition("=")[0] for word in words}
    fixed = {"preset": "quick", "device": "cpu", "optimizer": "adam_atan2"} | (
        {} if "stages" in given else {"epochs": "4"}
    )
    return parse_args([*(f"{name}={value}" for name, value in fixed.items() if name not in given), *words])


def quick_run(every: int = LOG) -> Lines:
    """The lines of a healthy run: the points above, joined."""
    points = np.array(QUICK_RUN)
    names = ["steps", "exact_accuracy", "accuracy", "puzzle_emb_norm", "puzzle_emb_grad_norm"]
    for gate in ("L/primary", "L/input", "H/secondary"):
        names += [f"gates/{gate}/{name}" for name in ("mean", "std", "low")]
    lines: Lines = []
    for step in range(every, TOTAL, every):
        values = [float(np.interp(step, points[:, 0], column)) for column in points[:, 1:].T]
        line = {f"train/{name}": value for name, value in zip(names, values, strict=True)}
        line |= {name.replace("mean", "high"): 0.0 for name in line if name.endswith("/mean")}
        lines.append((step, line))
    lines += [(step, {"eval/all/exact_accuracy": value}) for step, value in EVALUATIONS.items()]
    return sorted(lines, key=lambda line: line[0])


def changed(values: Mapping[str, float], since: int = 0, every: int = LOG) -> Lines:
    """The healthy run with other values from a step on."""
    return [
        (step, {name: values.get(name, value) if step >= since else value for name, value in line.items()})
        for step, line in quick_run(every)
    ]


def told(
    config: Config, lines: Iterable[tuple[int, Mapping[str, float]]], total: int = TOTAL
) -> list[tuple[int, str]]:
    """Steps and texts of what is told."""
    symptoms = Symptoms(config, total)
    return [(step, text) for step, line in lines for text in symptoms.check(step, line)]


def only(
    config: Config, lines: Iterable[tuple[int, Mapping[str, float]]], total: int = TOTAL
) -> tuple[int, str]:
    """The step and the text of the one thing told; a single line that ends in remedies."""
    found = told(config, lines, total)
    assert len(found) == 1, found
    step, text = found[0]
    seen, _, remedies = text.partition("; try ")
    assert seen and remedies and "\n" not in text and ", or ," not in text and not text.endswith(", or ")
    return step, text


# --- nothing to tell


@pytest.mark.parametrize("words", [(), ("--arch", "v1"), ("log_interval=10",), ("max_steps=3000",)], ids=str)
@pytest.mark.parametrize("every", [10, LOG])
def test_a_healthy_run_has_no_warnings(words, every):
    config = configured(*words)
    assert told(config, quick_run(every)) == []
    # Nor one that goes on from any step of it.
    for start in (500, 1900, 3000):
        assert told(config, [line for line in quick_run(every) if line[0] > start]) == []


def test_the_first_lines_of_a_run_are_never_a_symptom():
    """At its start a run has each symptom: nothing halts, nothing is solved, gates lie at the edge."""
    fresh = {"mean": 0.0998, "std": 0.03, "low": 0.55, "high": 0.0}
    line = {
        "train/steps": 8.0,
        "train/exact_accuracy": 0.0,
        "train/accuracy": 0.2,
        **dict.fromkeys(PUZZLE, 0.0),
    }
    for gate in GATES:
        line |= {f"train/gates/{gate}/{name}": value for name, value in fresh.items()}
    assert told(configured(), [(step, line) for step in range(1, 101)]) == []
    # Fresh gates stay silent for as long as they are fresh, those that a strategy opens by 0.05 too.
    gates = {name: value for name, value in line.items() if "gates" in name}
    assert told(configured(), [(step, gates) for step in range(1, TOTAL, LOG)]) == []
    for gate in GATES:
        gates |= {f"train/gates/{gate}/mean": 0.047, f"train/gates/{gate}/low": 1.0}
    assert told(configured(), [(step, gates) for step in range(1, TOTAL, LOG)]) == []


def test_a_smoke_run_has_no_warnings():
    unsolved = {"eval/all/exact_accuracy": 0.0, "train/exact_accuracy": 0.0, "train/steps": 8.0}
    for words in (("max_steps=10",), ("max_steps=10", "epochs=1")):
        assert told(configured(*words), [(10, unsolved)], total=10) == []


# --- puzzle embeddings


@pytest.mark.parametrize(
    ("words", "values", "parts"),
    [
        (
            ("puzzle_emb_lr=0",),
            {PUZZLE[0]: 0.3},
            ("puzzle_emb_lr=0;", "try puzzle_emb_lr=0.01", "puzzle_emb_lr=0.001 as for Sudoku"),
        ),
        (
            (),
            {PUZZLE[1]: 0.0},
            (
                "no gradient",
                "puzzle_emb_grad_norm=0 on 10 lines",
                "gate_init_strategy=input_focused",
                "lr=0.0005",
            ),
        ),
        (
            ("lr_warmup_steps=400",),
            {PUZZLE[0]: 0.0},
            ("still zero", "gradient is 0.0", "puzzle_emb_lr above 0.001"),
        ),
    ],
    ids=["lr", "gradient", "norm"],
)
def test_puzzle_embeddings_that_do_not_move(words, values, parts):
    config = configured(*words)
    step, text = only(config, changed(values))
    # A tenth of the run, or the warm-up if that is longer, and then ten lines.
    first = max(TOTAL // 10, config.lr_warmup_steps)
    assert step == (first // LOG + LINES) * LOG
    for part in parts:
        assert part in text, text


def test_an_occasional_zero_gradient_is_not_a_symptom():
    lines = [(step, line) for step, line in changed({PUZZLE[1]: 0.0}) if PUZZLE[1] in line]
    for _, line in lines[:: LINES - 1]:
        line[PUZZLE[1]] = 1e-9
    assert sum(line[PUZZLE[1]] == 0 for _, line in lines) > 4 * LINES
    assert told(configured(), lines) == []


def test_no_warning_without_a_puzzle_table():
    lines = [(step, {k: v for k, v in line.items() if k not in PUZZLE}) for step, line in quick_run()]
    assert told(configured("arch.puzzle_emb_ndim=0", "puzzle_emb_lr=0"), lines) == []


# --- halting


def test_every_step_is_taken_while_nothing_is_solved():
    values = {"train/steps": 8.0, "train/exact_accuracy": 0.0, "train/accuracy": 0.4123}
    config = configured()
    step, text = only(config, changed(values))
    assert step == TOTAL // 3 + LINES * LOG
    for part in (
        "all 8 ACT steps",
        "none is solved yet",
        "41.2% of cells",
        "sudoku.clues",
        "lr=0.0005",
        "stages",
    ):
        assert part in text, text
    assert "arch.halt_max_steps" not in text and "H_cycles" not in text and "balanced" not in text
    # It is not told while some are solved, nor while some halt.
    assert told(config, changed({**values, "train/exact_accuracy": 0.001})) == []
    assert told(config, changed({**values, "train/steps": 7.98})) == []


@pytest.mark.parametrize(
    ("words", "limit", "has", "lacks"),
    [
        (["arch.halt_max_steps=4"], 4, ["arch.halt_max_steps=8 or more"], ["stages", "balanced"]),
        (["arch.L_cycles=1"], 8, ["arch.H_cycles=2 arch.L_cycles=2"], []),
        (["arch.halt_max_steps=16"], 16, ["--arch balanced", "stages"], ["arch.halt_max_steps"]),
        (["lr_warmup_steps=900"], 8, ["lr_warmup_steps=1800"], []),
    ],
    ids=str,
)
def test_remedies_fit_the_configuration(words, limit, has, lacks):
    values = {"train/steps": float(limit), "train/exact_accuracy": 0.0}
    text = only(configured(*words), changed(values))[1]
    assert f"all {limit} ACT steps" in text
    assert all(part in text for part in has), text
    assert not any(part in text for part in lacks), text


def test_solved_sequences_that_never_halt():
    values = {"train/steps": 7.995, "train/exact_accuracy": 0.625}
    step, text = only(configured(), changed(values))
    assert step == (TOTAL // 10 // LOG + LINES) * LOG
    for part in ("62.5% of the sequences are solved", "take 8 steps", "halt_exploration_prob above 0.5"):
        assert part in text, text
    assert "arch.q_continue=false" in text
    assert "q_continue" not in only(configured("arch.q_continue=false"), changed(values))[1]
    assert told(configured(), changed({**values, "train/steps": 7.9})) == []
    assert told(configured(), changed({**values, "train/exact_accuracy": 0.19})) == []


def test_one_step_models_have_no_step_to_save():
    for exact in (0.0, 0.9):
        values = {"train/steps": 1.0, "train/exact_accuracy": exact}
        assert told(configured("arch.halt_max_steps=1"), changed(values)) == []


def test_the_steps_of_a_stage_are_a_limit_too():
    config = configured("stages=[{halt_max_steps: 4, epochs: 6}, {halt_max_steps: 8, epochs: 6}]")
    values = {"train/steps": 4.0, "train/exact_accuracy": 0.5}
    assert "take 4 steps" in only(config, changed(values))[1]
    assert told(configured(), changed(values)) == []


# --- gates


def gate(name: str, mean: float, std: float, low: float, high: float) -> dict[str, float]:
    values = {"mean": mean, "std": std, "low": low, "high": high}
    return {f"train/gates/{name}/{key}": value for key, value in values.items()}


def test_each_saturated_gate_is_reported_once():
    shut, wide = gate("L/input", 0.006, 0.01, 0.99, 0.0), gate("H/secondary", 0.991, 0.02, 0.01, 0.98)
    step, text = only(configured(), changed({**shut, **wide}))
    assert step == (TOTAL // 10 // LOG + LINES) * LOG
    for part in (
        "L/input shut (mean 0.006, 99% below",
        "H/secondary wide open (mean 0.991, 99% below",
        "lr=0.0005 or lr_warmup_steps=1000",
        "arch.gate_init_bias=-1.5",
        "loss.gate_saturation_weight above 0",
    ):
        assert part in text, text
    assert "L/primary" not in text
    # One that follows later is told of alone.
    later = changed({**shut, **wide}, since=2000)
    lines = [line for line in changed(shut) if line[0] < 2000] + [line for line in later if line[0] >= 2000]
    first, second = told(configured(), lines)
    assert "L/input" in first[1] and "H/secondary" not in first[1]
    assert "H/secondary" in second[1] and "L/input" not in second[1]
    assert second[0] == 2000 + (LINES - 1) * LOG


@pytest.mark.parametrize(
    ("mean", "low", "high"),
    [(0.03, 1.0, 0.0), (0.09, 0.95, 0.05), (0.5, 0.4, 0.4), (0.01, 0.9, 0.0)],
    ids=["nearly shut", "few open", "both ends but not all", "not all"],
)
def test_gates_that_are_not_saturated(mean, low, high):
    assert told(configured(), changed(gate("L/input", mean, 0.05, low, high))) == []


def test_gates_at_both_ends_are_saturated():
    _, text = only(configured(), changed(gate("L/input", 0.5, 0.49, 0.5, 0.48)))
    assert "L/input shut or wide open (mean 0.500, 98% below 0.1 or above 0.9)" in text


def test_uniform_gates():
    step, text = only(configured(), changed(gate("L/primary", 0.3, 0.004, 0.0, 0.0)))
    assert step == (TOTAL // 10 // LOG + LINES) * LOG
    for part in (
        "same everywhere",
        "L/primary (mean 0.300, std 0.0040)",
        "lr=0.002",
        "gate_hidden_ratio=0.5",
    ):
        assert part in text, text
    assert told(configured(), changed(gate("L/primary", 0.3, 0.006, 0.0, 0.0))) == []


# --- test sets


def evaluations(*exact: float, train: float | None = 0.0, name: str = "eval/all") -> Lines:
    lines: Lines = [] if train is None else [(100, {"train/exact_accuracy": train})]
    return lines + [(937 * (i + 1), {f"{name}/exact_accuracy": value}) for i, value in enumerate(exact)]


def test_no_test_puzzle_solved_after_half_of_the_evaluations():
    config = configured()
    step, text = only(config, evaluations(0, 0, 0, 0, train=0.01))
    assert step == 2 * 937
    for part in ("after 2 of 4 evaluations", "1.0% of the training sequences", "sudoku.clues", "lr=0.0005"):
        assert part in text, text
    assert told(config, evaluations(0)) == [] and told(config, evaluations(0, 0.002, 0, 0)) == []
    # Of ten it takes five, of one that one, but of two both.
    assert only(configured("epochs=10"), evaluations(*[0] * 10))[0] == 5 * 937
    assert only(configured("epochs=1"), evaluations(0))[0] == 937
    assert only(configured("epochs=2"), evaluations(0, 0))[0] == 2 * 937
    assert "training sequences" not in only(config, evaluations(0, 0, train=None))[1]
    muon = configured("optimizer=muon", "muon_lr=0.04")
    assert "muon_lr=0.02 lr=0.0005" in only(muon, evaluations(0, 0))[1]


def test_a_set_solved_by_the_average_or_in_part_is_not_a_symptom():
    config, unsolved = configured(), {"eval/hard/exact_accuracy": 0.0}
    for other in ("eval_ema/hard/exact_accuracy", "eval/easy/exact_accuracy"):
        lines = [(937 * i, {**unsolved, other: 0.01}) for i in range(1, 5)]
        assert told(config, lines) == []
    assert only(config, [(937 * i, unsolved) for i in range(1, 5)])[0] == 2 * 937


def test_training_puzzles_solved_and_no_test_puzzle():
    text = only(configured(), evaluations(0, 0, 0, train=0.8))[1]
    for part in (
        "80.0% of the training",
        "more sudoku.num_aug",
        "weight_decay above 1",
        "early_stop_patience=3",
    ):
        assert part in text, text
    assert "clues" not in text
    # As much where both are numbers of one line.
    merged = [(937 * i, {"train/exact_accuracy": 0.8, "eval/all/exact_accuracy": 0.0}) for i in (1, 2)]
    assert only(configured(), merged)[1] == text


# --- all of them


def test_several_symptoms_are_reported_once_and_reproducibly():
    values = {"train/steps": 8.0, "train/exact_accuracy": 0.0, **dict.fromkeys(PUZZLE, 0.0)}
    lines = changed({**values, "eval/all/exact_accuracy": 0.0, **gate("L/input", 0.001, 0.001, 1.0, 0.0)})
    found = told(configured(), lines)
    steps, texts = [step for step, _ in found], [text for _, text in found]
    assert len(found) == 4 and steps == sorted(steps)
    for part in ("no gradient", "saturated", "ACT steps", "no test puzzle"):
        assert sum(part in text for text in texts) == 1, texts
    assert told(configured(), lines) == found


def test_non_finite_numbers_are_skipped():
    lines = changed({"train/steps": 8.0, "train/exact_accuracy": 0.0})
    blanks = [(step, dict.fromkeys(line, math.nan)) for step, line in lines]
    assert told(configured(), blanks) == []
    mixed = [line for pair in zip(lines, blanks, strict=True) for line in pair]
    assert told(configured(), mixed) == told(configured(), lines) != []
