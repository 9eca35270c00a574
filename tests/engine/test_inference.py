"""Halting by choice: each sequence stops as it would alone, and the next takes its row."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from hrm.config.schema import LossConfig, SubgoalConfig
from hrm.data.dataset import Batch
from hrm.data.format import IGNORE_LABEL
from hrm.engine import cuda_graph as program
from hrm.engine.inference import Answers, EarlyExit, Inference
from hrm.engine.modes import COMPILE, EAGER, Mode
from hrm.model.act import Sequences, act_step, initial_carry, replace_halted
from hrm.model.hrm import HRM
from tests.support import graph_stand_in
from tests.support.act_cases import PUZZLES, D, S, V, make_arch, make_weights

ARCHS: dict[str, dict[str, Any]] = {
    "v1": {"puzzle_emb_ndim": D},
    "no q_continue": {"q_continue": False},
    "gated": {"use_gating": True, "puzzle_emb_ndim": D},
    "feudal": {"subgoal_head": SubgoalConfig(enabled=True, manager_period=2, goal_dim=8)},
    "one step": {"halt_max_steps": 1},
}


def halting_model(dtype: torch.dtype = torch.float64, **changes: Any) -> HRM:
    """A model of which about half of the sequences wish to halt at a step."""
    arch = make_arch(**{"halt_max_steps": 5, **changes})
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        weights = make_weights(arch, torch.Generator().manual_seed(0), dtype)
        model = HRM(arch, vocab_size=V, seq_len=S, num_puzzle_identifiers=PUZZLES, dtype=dtype)
    finally:
        torch.set_default_dtype(before)
    # A subgoal head keeps its own.
    model.load_state_dict(weights, strict=False)
    return model.requires_grad_(False)


def random_rows(count: int) -> Batch:
    rng = np.random.default_rng(1)
    inputs, labels = rng.integers(0, V, (2, count, S), dtype=np.int32)
    return Batch(inputs, labels, rng.integers(0, PUZZLES, count, dtype=np.int32))


def in_batches(rows: Batch, size: int) -> Iterator[tuple[Batch, int]]:
    """The rows in batches of `size`, the last one filled up."""
    count = len(rows.inputs)
    for first in range(0, count, size):
        short = max(0, first + size - count)
        own = rows.rows(first, first + size)
        yield (
            Batch(
                np.pad(own.inputs, ((0, short), (0, 0))),
                np.pad(own.labels, ((0, short), (0, 0)), constant_values=IGNORE_LABEL),
                np.pad(own.puzzle_identifiers, (0, short)),
            ),
            size - short,
        )


def in_order(answers: Iterator[Answers]) -> Answers:
    """All answers as one, by place."""
    joined = [np.concatenate(parts) for parts in zip(*answers, strict=True)]
    order = np.argsort(joined[0], kind="stable")
    return Answers(*(values[order] for values in joined))


@torch.no_grad()
def alone(model: HRM, rows: Batch) -> Answers:
    """Each sequence by itself, stopped after the first step at which it wishes to halt."""
    found: list[tuple[np.ndarray, float, int]] = []
    for i in range(len(rows.inputs)):
        own = rows.rows(i, i + 1)
        fresh = Sequences(*(torch.from_numpy(array) for array in vars(own).values()))
        carry = replace_halted(model, initial_carry(model, 1, S, torch.device("cpu")), fresh)
        table = None if model.puzzle_emb is None else model.puzzle_emb(carry.puzzle_identifiers)
        wishes = False
        while not (wishes or carry.steps.item() == model.arch.halt_max_steps):
            carry, outputs = act_step(model, carry, table, None)
            q_continue = outputs.q_continue_logits if model.arch.q_continue else torch.zeros(1)
            wishes = bool(outputs.q_halt_logits > q_continue)
        prediction = model.lm_head(outputs.answer)[0].argmax(-1).numpy()
        found.append((prediction, outputs.q_halt_logits.item(), int(carry.steps.item())))
    predictions, q_halt, steps = (np.array(values) for values in zip(*found, strict=True))
    return Answers(np.arange(len(found)), rows.labels, predictions, q_halt, steps)


def assert_same(ours: Answers, expected: Answers, tolerance: float = 1e-6) -> None:
    for name in ("places", "labels", "predictions", "steps"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(ours.q_halt, expected.q_halt, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ARCHS)
def test_paths_in_a_batch_equal_single_paths(name):
    model, rows = halting_model(**ARCHS[name]), random_rows(23)
    expected = alone(model, rows)
    if name != "one step":
        assert len(set(expected.steps.tolist())) > 2
    for batch_size in (1, 7, 40) if name == "v1" else (5,):
        early = EarlyExit(model, batch_size, S, mode=EAGER)
        assert_same(in_order(early.answers(in_batches(rows, 4))), expected)
        # Another set after the first finds nothing of it left.
        again = in_order(early.answers(in_batches(rows, batch_size)))
        assert_same(again, expected)


def test_no_more_steps_are_run_than_are_needed(monkeypatch):
    model, rows = halting_model(), random_rows(11)
    steps = int(alone(model, rows).steps.sum())
    calls = []
    recur = model.recur
    monkeypatch.setattr(model, "recur", lambda *args, **kwargs: calls.append(1) or recur(*args, **kwargs))
    early = EarlyExit(model, 1, S, mode=EAGER)
    in_order(early.answers(in_batches(rows, 4)))
    # One recurrence a step: the target of q_continue, which would be a second, is not computed.
    assert len(calls) == steps
    calls.clear()
    early = EarlyExit(model, 4, S, mode=EAGER)
    in_order(early.answers(in_batches(rows, 4)))
    # Rows are taken over at once: only at the end do some stand idle, for fewer steps than a sequence takes.
    assert steps <= 4 * len(calls) < steps + 4 * model.arch.halt_max_steps


def test_nothing_to_answer():
    early = EarlyExit(halting_model(), 3, S, mode=EAGER)
    assert list(early.answers(iter([]))) == []


def test_a_model_that_never_halts_gives_the_full_steps():
    model, rows = halting_model(torch.float32), random_rows(10)
    with torch.no_grad():
        model.q_head.bias[0] -= 1e6
    full = Inference(model, 4, S, mode=EAGER, loss=LossConfig())
    early = EarlyExit(model, 4, S, mode=EAGER)
    expected = in_order(full.answers(in_batches(rows, 4)))
    assert expected.steps.tolist() == [5] * 10
    # Its results may be changed in place, as ranks do.
    assert not any(result.is_inference() for result in (full.predictions, full.q_halt, full.sums))
    assert_same(in_order(early.answers(in_batches(rows, 4))), expected)


def test_training_still_has_its_target():
    model, rows = halting_model(), random_rows(4)
    fresh = Sequences(*(torch.from_numpy(array) for array in vars(rows).values()))
    carry = replace_halted(model, initial_carry(model, 4, S, torch.device("cpu")), fresh)
    least = torch.zeros(4, dtype=torch.int32)
    after, outputs = act_step(model, carry, None, least)
    without, other = act_step(model, carry, None, least, with_target=False)
    assert outputs.target_q_continue is not None and other.target_q_continue is None
    assert torch.equal(after.halted, without.halted) and torch.equal(after.z_H, without.z_H)


def test_captured(monkeypatch):
    made: list[Any] = []

    def capture(body: Any, device: torch.device) -> Any:
        made.append(body)
        return graph_stand_in.capture(body, device)

    monkeypatch.setattr(program, "capture", capture)
    monkeypatch.setattr(program, "aside", lambda body, device: body())
    model, rows = halting_model(puzzle_emb_ndim=D), random_rows(11)
    early = EarlyExit(model, 5, S, mode=Mode("graph", compiled=False, captured=True))
    assert_same(in_order(early.answers(in_batches(rows, 4))), alone(model, rows))
    assert sorted(body.__name__ for body in made) == ["_replace", "_turn"]


def test_compiled(monkeypatch):
    """Traced as Inductor would trace it, whose code generation takes half a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model, rows = halting_model(torch.float32, puzzle_emb_ndim=D), random_rows(11)
    model.arch = replace(model.arch, H_cycles=1, L_cycles=1)
    expected = in_order(EarlyExit(model, 3, S, mode=EAGER).answers(in_batches(rows, 3)))
    ours = in_order(EarlyExit(model, 3, S, mode=COMPILE).answers(in_batches(rows, 3)))
    assert_same(ours, expected, 1e-5)
