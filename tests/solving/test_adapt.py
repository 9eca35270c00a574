"""A row of the puzzle table, learnt for a task that the model was not trained on."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from hrm.common.errors import UserError
from hrm.config.load import ArchConfig, Config, LossConfig
from hrm.data.dataset import Batch
from hrm.data.format import Metadata
from hrm.engine.engine import Engine
from hrm.model.act import Sequences, act_step, initial_carry, replace_halted
from hrm.model.hrm import HRM
from hrm.model.losses import act_loss
from hrm.solving.adapt import learn_embedding

S, V, D, HELD_OUT, PUZZLE_LR = 8, 5, 32, 2, 1e-2
# A task renames the four digits in its own way, which the cells of a question do not tell.
TASKS = np.random.default_rng(0).permutation(np.array(list(itertools.permutations(range(1, V)))))
KNOWN = len(TASKS) - HELD_OUT
LOSS = LossConfig("softmax_cross_entropy")


def small(**changes) -> ArchConfig:
    sizes = {"hidden_size": D, "num_heads": 2, "expansion": 1.0, "H_layers": 1, "L_layers": 1}
    return ArchConfig(**{**sizes, "H_cycles": 1, "L_cycles": 1, "halt_max_steps": 2, **changes})


def examples(tasks: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One random question and its answer for each task, (B, S) each."""
    questions = rng.integers(1, V, (len(tasks), S))
    return questions, np.take_along_axis(tasks, questions - 1, 1)


@pytest.fixture(scope="module")
def trained() -> HRM:
    """A model that renames rightly by the identifier, 1 + its place in TASKS, for all but the last tasks."""
    metadata = Metadata(0, None, 0, V, S, KNOWN + 1, 1, 1.0, ["all"])
    config = Config(arch=small(q_continue=False), loss=LOSS, global_batch_size=64, lr=3e-3, device="cpu")
    config.lr_warmup_steps, config.puzzle_emb_lr, config.mode = 0, PUZZLE_LR, "eager"
    engine, rng = Engine(config, metadata, total_steps=150), np.random.default_rng(1)
    for _ in range(150):
        places = rng.integers(0, KNOWN, 64)
        engine.train_step(Batch(*examples(TASKS[places], rng), places + 1))
    return engine.model


@torch.no_grad()
def cells_right(model: HRM, row: Tensor, task: np.ndarray) -> float:
    """The share of cells right on questions of a task that nothing was learnt from."""
    questions, answers = map(torch.from_numpy, examples(np.tile(task, (64, 1)), np.random.default_rng(9)))
    fresh = Sequences(questions.int(), answers.int(), torch.zeros(64, dtype=torch.int32))
    carry = replace_halted(model, initial_carry(model, 64, S, torch.device("cpu")), fresh)
    for _ in range(model.arch.halt_max_steps):
        carry, outputs = act_step(model, carry, row.expand(64, -1), None)
    return (model.lm_head(outputs.answer).argmax(-1) == answers).double().mean().item()


def test_demonstrations_teach_a_task_that_training_did_not_have(trained):
    """Held-out questions: all but solved with the row, guessed without; and not a bit of the model moves."""
    table = trained.puzzle_emb.weights
    for place in range(2):
        assert cells_right(trained, table[place + 1], TASKS[place]) > 0.97
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    gains = []
    for task in TASKS[KNOWN:]:
        demonstrations = map(torch.from_numpy, examples(np.tile(task, (6, 1)), np.random.default_rng(2)))
        told: list[tuple[int, float]] = []
        row = learn_embedding(
            trained,
            *demonstrations,
            steps=150,
            lr=PUZZLE_LR,
            loss=LOSS,
            report=lambda step, loss, told=told: told.append((step, loss)),
        )
        assert row.shape == (D,) and row.dtype == table.dtype and not row.requires_grad
        assert [step for step, _ in told] == list(range(1, 151))
        losses = [loss for _, loss in told]
        assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
        assert cells_right(trained, row, task) > cells_right(trained, torch.zeros(D), task) + 0.2
        gains.append((cells_right(trained, torch.zeros(D), task), cells_right(trained, row, task)))
    without, learnt = np.mean(gains, axis=0)
    assert without < 0.4 and learnt > 0.9
    after = trained.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(parameter.requires_grad for parameter in trained.parameters())


def test_a_learnt_row_moves_like_table_rows():
    """Two updates written out: sign-SGD with decay, halted demonstrations anew, loss of each ACT step."""
    model, lr, decay = HRM(small(), vocab_size=V, seq_len=S, num_puzzle_identifiers=2), 0.5, 0.25
    questions, answers = map(torch.from_numpy, examples(TASKS[:3], np.random.default_rng(3)))
    losses: list[float] = []
    row = learn_embedding(
        model,
        questions,
        answers,
        steps=2,
        lr=lr,
        loss=LOSS,
        weight_decay=decay,
        seed=7,
        report=lambda _, loss: losses.append(loss),
    )
    fresh = Sequences(questions.int(), answers.int(), torch.zeros(3, dtype=torch.int32))
    carry = initial_carry(model, 3, S, torch.device("cpu"))
    expected = torch.zeros(D)
    for step in range(2):
        leaf = expected.clone().requires_grad_()
        carry = replace_halted(model, carry, fresh)
        # The Q head begins sure of nothing and equal for both, so none halts before the second step.
        carry, outputs = act_step(model, carry, leaf.expand(3, -1), torch.zeros(3, dtype=torch.int32))
        total, _ = act_loss(LOSS, model.lm_head, carry, outputs)
        total.backward()
        expected = expected * (1 - lr * decay) - lr * leaf.grad.sign()
        assert losses[step] == pytest.approx(total.item() / 3, rel=1e-6)
    torch.testing.assert_close(row, expected, rtol=0, atol=1e-6)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_ignored_labels_have_no_effect():
    """Without a label that counts, nothing moves the row away from zero; with labels it moves."""
    model = HRM(small(q_continue=False), vocab_size=V, seq_len=S, num_puzzle_identifiers=1)
    questions, answers = map(torch.from_numpy, examples(TASKS[:2], np.random.default_rng(4)))
    hidden = torch.full_like(answers, -100)
    row = learn_embedding(model, questions, hidden, steps=3, lr=0.1, loss=LOSS)
    # The Q head's weight is zero in a fresh model, so nothing but the answer could have moved it.
    assert torch.equal(row, torch.zeros(D))
    assert learn_embedding(model, questions, answers, steps=3, lr=0.1, loss=LOSS).abs().max() > 0.09


def test_unlearnable_tasks_are_reported():
    bare = HRM(small(puzzle_emb_ndim=0), vocab_size=V, seq_len=S, num_puzzle_identifiers=1)
    questions = torch.ones(1, S)
    with pytest.raises(UserError, match=r"no puzzle embeddings \(arch.puzzle_emb_ndim=0\)"):
        learn_embedding(bare, questions, questions, steps=1, lr=0.1, loss=LOSS)
    model = HRM(small(), vocab_size=V, seq_len=S, num_puzzle_identifiers=1)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"not finite after 1 steps of adapting: lower lr=0\.1"):
        learn_embedding(model, questions, questions, steps=1, lr=0.1, loss=LOSS)
    assert all(parameter.requires_grad for parameter in model.parameters())
