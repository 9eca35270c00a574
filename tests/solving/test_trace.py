"""A model watched while it solves one puzzle, against the model itself."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hrm.common.errors import UserError
from hrm.config.load import ArchConfig, LossConfig
from hrm.data.dataset import Batch
from hrm.data.format import Metadata
from hrm.data.puzzle_kinds import kind_of
from hrm.engine.inference import EarlyExit, Inference
from hrm.engine.modes import EAGER
from hrm.evaluation.selection import NEVER
from hrm.evaluation.views import views_for
from hrm.model.act import Randomness, Sequences, act_step, initial_carry, keys_of, replace_halted
from hrm.model.hrm import HRM
from hrm.solving.trace import Paths, puzzle_row, record_paths, record_trace

S, V, PUZZLES, STEPS = 16, 6, 3, 4
METADATA = Metadata(0, 0, 0, V, S, PUZZLES, 1, 1.0, ["all"])
QUESTION = np.array([1, 2, 3, 4, 5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2], np.uint8)
VARIANTS: dict[str, dict[str, Any]] = {
    "v1": {},
    "bare": {"puzzle_emb_ndim": 0, "pos_encodings": "learned"},
    "gated": {"use_gating": True, "puzzle_emb_ndim": 24},
    "attention gates": {"use_gating": True, "gating_type": "attention"},
    "held gates": {"use_gating": True, "gating_type": "hierarchical"},
    "trm": {"share_levels": True, "q_continue": False, "puzzle_emb_len": 3},
    "trm, gated": {"share_levels": True, "use_gating": True},
}


def make(halts_at: float = 0.0, **changes: Any) -> HRM:
    """A small random model with a table of three random rows; halts_at: added to q_halt's bias."""
    sizes = {"hidden_size": 16, "num_heads": 2, "expansion": 1.0, "H_layers": 1, "L_layers": 1}
    arch = ArchConfig(**{**sizes, "halt_max_steps": STEPS, **changes})
    model = HRM(arch, vocab_size=V, seq_len=S, num_puzzle_identifiers=PUZZLES)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.q_head.weight.normal_(generator=generator)
        model.q_head.get_parameter("bias").copy_(torch.tensor([halts_at, 0.0]))
        if model.puzzle_emb is not None:
            model.puzzle_emb.weights.normal_(generator=generator)
    return model


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("identifier", [0, 2])
def test_the_last_step_is_what_inference_predicts(changes, identifier):
    model = make(**changes)
    inference = Inference(model, 1, S, mode=EAGER, loss=LossConfig())
    predictions, q_halt = inference.solve(QUESTION[None].astype(np.int32), np.array([identifier]))
    found = record_trace(model, METADATA, QUESTION, identifier, name="m", title="t")
    assert len(found.steps) == STEPS and found.steps[-1].board == predictions[0].tolist()
    expected = torch.sigmoid(torch.tensor(q_halt[0])).item()
    assert found.steps[-1].q_halt == pytest.approx(expected, abs=1e-6)
    assert (found.kind, found.rows, found.cols) == ("sudoku", 4, 4)
    assert (found.model, found.title, found.answer) == ("m", "t", None)
    assert found.question == QUESTION.tolist()


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_step_is_that_of_training(changes):
    """Boards, both Q values, halting, gates and broken rules, against the carry of training by hand."""
    model = make(**changes)
    inputs = torch.from_numpy(QUESTION).int()[None]
    fresh = Sequences(inputs, torch.full_like(inputs, -100), torch.tensor([1], dtype=torch.int32))
    carry = replace_halted(model, initial_carry(model, 1, S, torch.device("cpu")), fresh)
    row = None if model.puzzle_emb is None else model.puzzle_emb.weights[1:2]
    kind = kind_of(METADATA)
    for step in record_trace(model, METADATA, QUESTION, 1).steps:
        with torch.no_grad():
            zeros = torch.zeros(1, dtype=torch.int32)
            carry, outputs = act_step(model, carry, row, zeros, sees_gates=model.arch.use_gating)
            board = model.logits(carry.z_H).argmax(-1)[0].tolist()
        assert step.board == board and step.problems == kind.problems(QUESTION, board)
        assert step.q_halt == pytest.approx(outputs.q_halt_logits.sigmoid().item(), abs=1e-6)
        if model.arch.q_continue:
            assert step.q_continue == pytest.approx(outputs.q_continue_logits.sigmoid().item(), abs=1e-6)
        else:
            assert step.q_continue is None
        assert step.halts == carry.halted.item()
        if not model.arch.use_gating:
            assert step.gates == {}
            continue
        levels = {level: list(sources) for level, sources in step.gates.items()}
        assert levels == {"L": ["primary", "secondary", "input"], "H": ["primary", "secondary"]}
        for gated, sources in zip(outputs.gated, step.gates.values(), strict=True):
            for tensor, gate in zip(gated.gates, sources.values(), strict=True):
                assert gate.mean == pytest.approx(tensor.mean().item(), abs=1e-6)
                # Without the tokens of the puzzle embedding, which stand in front.
                np.testing.assert_allclose(gate.cells, tensor[0, -S:].mean(-1).numpy(), rtol=0, atol=1e-6)


def test_a_model_halts_as_its_q_values_say():
    """By choice when q_halt is the greater, at the limit anyway; act stops there, and steps goes beyond."""
    eager, timid = make(halts_at=50.0), make(halts_at=-50.0)
    assert [step.halts for step in record_trace(eager, METADATA, QUESTION).steps] == [True] * STEPS
    assert [step.halts for step in record_trace(timid, METADATA, QUESTION).steps] == [False] * 3 + [True]
    whole = record_trace(eager, METADATA, QUESTION)
    assert record_trace(eager, METADATA, QUESTION, act=True).steps == whole.steps[:1]
    assert len(record_trace(timid, METADATA, QUESTION, act=True).steps) == STEPS
    longer = record_trace(eager, METADATA, QUESTION, steps=6)
    assert len(longer.steps) == 6 and longer.steps[:STEPS] == whole.steps
    assert record_trace(eager, METADATA, QUESTION, steps=2).steps == whole.steps[:2]


def test_a_row_equals_its_identifiers_embedding():
    model = make()
    row = model.puzzle_emb.weights[2].clone()
    assert (
        record_trace(model, METADATA, QUESTION, row).steps == record_trace(model, METADATA, QUESTION, 2).steps
    )
    assert record_trace(model, METADATA, QUESTION).steps == record_trace(model, METADATA, QUESTION, 0).steps
    assert (
        record_trace(model, METADATA, QUESTION, 1).steps != record_trace(model, METADATA, QUESTION, 2).steps
    )
    assert torch.equal(puzzle_row(model, 2), row[None]) and puzzle_row(make(puzzle_emb_ndim=0), 2) is None


def test_untraceable_puzzles_are_reported():
    with pytest.raises(UserError, match=r"puzzle identifier 3: the model has rows 0 to 2"):
        record_trace(make(), METADATA, QUESTION, 3)
    with pytest.raises(UserError, match=r"puzzle identifier -1"):
        record_trace(make(), METADATA, QUESTION, -1)
    with pytest.raises(ValueError, match=r"tokens must be \(16,\), got \(15,\)"):
        record_trace(make(), METADATA, QUESTION[:15])


def test_the_answer_goes_with_the_trace_and_in_bfloat16_too():
    model = make(use_gating=True)
    answer = np.arange(16) % 4 + 2
    found = record_trace(model, METADATA, QUESTION, answer=answer)
    assert found.answer == answer.tolist()
    narrow = HRM(model.arch, vocab_size=V, seq_len=S, num_puzzle_identifiers=PUZZLES, dtype=torch.bfloat16)
    narrow.load_state_dict(model.state_dict())
    gate = record_trace(narrow, METADATA, QUESTION).steps[0].gates["L"]["input"]
    assert gate.mean == pytest.approx(found.steps[0].gates["L"]["input"].mean, abs=5e-3)


@pytest.mark.parametrize("name", ["v1", "gated", "trm"])
def test_paths_of_one_puzzle(name):
    model, kind = make(**VARIANTS[name]), kind_of(METADATA)
    paths = Paths(5, views_for(kind, 3, None), Randomness(starts=True, noise=0.1), 3, 1)
    found = record_paths(model, METADATA, QUESTION, paths=paths)
    alone = record_trace(model, METADATA, QUESTION)
    assert [step.board for step in found.traces[0].steps] == [step.board for step in alone.steps]
    ends = [trace.steps[-1].board for trace in found.traces]
    assert len({tuple(board) for board in ends}) > 1
    assert found.outcomes.answer[0].tolist() == [ends.index(board) for board in ends]
    sure = [trace.steps[-1].q_halt for trace in found.traces]
    np.testing.assert_allclose(1 / (1 + np.exp(-found.outcomes.q_halt[0])), sure, rtol=1e-5)
    # The first paths do not depend on the number of paths.
    fewer = record_paths(model, METADATA, QUESTION, paths=replace(paths, paths=3))
    assert [trace.steps[-1].board for trace in fewer.traces] == ends[:3]
    early = record_paths(model, METADATA, QUESTION, paths=paths, act=True)
    for whole, cut in zip(found.traces, early.traces, strict=True):
        halts = next((n for n, step in enumerate(whole.steps, 1) if step.halts), STEPS)
        assert [step.board for step in cut.steps] == [step.board for step in whole.steps[:halts]]


@pytest.mark.parametrize("halts_at", [0.0, -1e4])
def test_outcomes_equal_those_of_an_evaluation(halts_at):
    """A path that never wishes to halt comes last, although halt_max_steps ends it."""
    model, random = make(halts_at), Randomness(starts=True)
    found = record_paths(model, METADATA, QUESTION, paths=Paths(5, randomness=random, seed=3), steps=STEPS)
    whole = np.tile(np.asarray(QUESTION, np.int32), (5, 1))
    batch = Batch(whole, np.full_like(whole, -100), np.zeros(5, np.int32))
    runner = EarlyExit(model, 5, S, mode=EAGER, randomness=random)
    (ends,) = runner.at_depths(batch, [STEPS], keys_of(3, np.zeros(5, int), np.arange(5)))
    assert np.minimum(found.outcomes.halts_at[0], NEVER).tolist() == ends.halts_at.tolist()
    assert (ends.halts_at == NEVER).all() == (halts_at < 0)
    np.testing.assert_allclose(found.outcomes.residual[0], ends.residual, rtol=1e-4)
    np.testing.assert_allclose(found.outcomes.q_halt[0], ends.q_halt, rtol=1e-4)
