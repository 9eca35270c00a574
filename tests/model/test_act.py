"""The carry: replacement, halting, exploration. Whole steps are compared in test_straight_line.py."""

import numpy as np
import pytest
import torch

from hrm.config.load import ArchConfig
from hrm.model.act import Sequences, act_step, draw_min_halt_steps, initial_carry, replace_halted
from hrm.model.hrm import HRM

B, S = 4, 5


def make(**changes) -> HRM:
    arch = ArchConfig(
        hidden_size=16, num_heads=2, expansion=1.0, H_layers=1, L_layers=1, puzzle_emb_ndim=0, **changes
    )
    return HRM(arch, vocab_size=7, seq_len=S, num_puzzle_identifiers=3)


def fresh(start: int) -> Sequences:
    cells = torch.arange(start, start + B * S, dtype=torch.int32).view(B, S) % 7
    return Sequences(cells, cells + 1, torch.arange(start, start + B, dtype=torch.int32))


def test_first_step_replaces_every_sequence():
    model = make()
    carry = replace_halted(model, initial_carry(model, B, S, torch.device("cpu")), fresh(0))
    assert torch.equal(carry.z_H, model.H_init.expand(B, S, 16))
    assert torch.equal(carry.z_L, model.L_init.expand(B, S, 16))
    assert torch.equal(carry.inputs, fresh(0).inputs) and torch.equal(carry.labels, fresh(0).labels)
    assert carry.steps.tolist() == [0] * B and not carry.halted.any()


def test_only_halted_sequences_are_replaced():
    model = make()
    carry = replace_halted(model, initial_carry(model, B, S, torch.device("cpu")), fresh(0))
    carry = carry._replace(
        z_H=torch.full_like(carry.z_H, 3.0),
        steps=torch.tensor([1, 2, 3, 4], dtype=torch.int32),
        halted=torch.tensor([False, True, False, True]),
    )
    new = replace_halted(model, carry, fresh(50))
    assert new.steps.tolist() == [1, 0, 3, 0]
    assert new.puzzle_identifiers.tolist() == [0, 51, 2, 53]
    for row, replaced in enumerate([False, True, False, True]):
        source = fresh(50) if replaced else fresh(0)
        assert torch.equal(new.inputs[row], source.inputs[row])
        assert torch.equal(new.labels[row], source.labels[row])
        assert torch.equal(new.z_H[row], model.H_init.expand(S, 16) if replaced else torch.full((S, 16), 3.0))


@pytest.mark.parametrize(
    ("q_halt", "q_continue", "min_steps", "steps", "halts"),
    [
        (1.0, 0.0, 0, 0, True),  # wants to
        (0.0, 1.0, 0, 0, False),  # does not want to
        (0.0, 0.0, 0, 0, False),  # no strict preference
        (1.0, 0.0, 2, 0, False),  # explores: must take two steps
        (1.0, 0.0, 2, 1, True),  # has taken them
        (0.0, 1.0, 0, 3, True),  # the last step
        (0.0, 1.0, 9, 3, True),  # the last step ends exploration too
    ],
)
def test_when_a_sequence_halts(q_halt, q_continue, min_steps, steps, halts):
    model = make(halt_max_steps=4)
    with torch.no_grad():
        model.q_head.bias.copy_(torch.tensor([q_halt, q_continue]))
    carry = replace_halted(model, initial_carry(model, B, S, torch.device("cpu")), fresh(0))
    carry = carry._replace(steps=torch.full((B,), steps, dtype=torch.int32))
    new, outputs = act_step(model, carry, None, torch.full((B,), min_steps, dtype=torch.int32))
    assert new.halted.tolist() == [halts] * B and new.steps.tolist() == [steps + 1] * B
    # The Q head's weight is 0, so the next step's values are the same biases.
    best = q_halt if steps + 1 == 4 else max(q_halt, q_continue)
    torch.testing.assert_close(outputs.target_q_continue, torch.full((B,), best).sigmoid())


def test_without_a_continue_head_a_sequence_halts_when_likelier_right_than_wrong():
    model = make(q_continue=False)
    carry = replace_halted(model, initial_carry(model, B, S, torch.device("cpu")), fresh(0))
    for bias, halts in ((0.1, True), (-0.1, False)):
        with torch.no_grad():
            model.q_head.bias.copy_(torch.tensor([bias, -5.0]))
        new, outputs = act_step(model, carry, None, torch.zeros(B, dtype=torch.int32))
        assert new.halted.tolist() == [halts] * B and outputs.target_q_continue is None


def test_evaluation_takes_every_step_whatever_the_q_head_says():
    model = make(halt_max_steps=3)
    with torch.no_grad():
        model.q_head.bias.copy_(torch.tensor([9.0, -9.0]))
        carry = replace_halted(model, initial_carry(model, B, S, torch.device("cpu")), fresh(0))
        for step in (1, 2, 3):
            carry, outputs = act_step(model, carry, None, None)
            assert carry.halted.tolist() == [step == 3] * B and outputs.target_q_continue is None


def test_exploration_is_a_function_of_seed_and_step_with_the_stated_distribution():
    arch = ArchConfig(halt_max_steps=6, halt_exploration_prob=0.25)
    draws = draw_min_halt_steps(arch, 3, 17, 40_000)
    assert draws.dtype == np.int32
    assert np.array_equal(draws, draw_min_halt_steps(arch, 3, 17, 40_000))
    assert not np.array_equal(draws, draw_min_halt_steps(arch, 3, 18, 40_000))
    assert not np.array_equal(draws, draw_min_halt_steps(arch, 4, 17, 40_000))
    values, counts = np.unique(draws, return_counts=True)
    assert values.tolist() == [0, 2, 3, 4, 5, 6]
    assert counts[0] / 40_000 == pytest.approx(0.75, abs=0.01)
    assert counts[1:] / 40_000 == pytest.approx([0.05] * 5, abs=0.005)


def test_one_step_models_never_explore():
    assert not draw_min_halt_steps(ArchConfig(halt_max_steps=1), 0, 0, 8).any()
