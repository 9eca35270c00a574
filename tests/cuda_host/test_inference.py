"""Evaluation, solving, early exit, adaptation and stages on the stand-in CUDA library."""

import ctypes
from dataclasses import replace

import numpy as np
import pytest
import torch

from hrm.engine.cuda_graph import WARM_UP
from hrm.engine.inference import EarlyExit
from hrm.engine.modes import Mode
from hrm.solving.adapt import learn_embedding
from tests.cuda_host.stand_in import read_log
from tests.cuda_host.steps import configuration, engine_of, logged, waits

pytestmark = pytest.mark.cuda_host

ROWS, CELLS = 32, 81


@pytest.fixture(scope="module")
def trained():
    """An engine after a step, and batches."""
    engine, batches = engine_of(configuration("v1"))
    engine.train_step(next(batches))
    return engine, batches


def test_evaluation_replays_a_graph_and_solving_works_beside_it(stand_in, tmp_path, trained):
    engine, batches = trained
    for _ in range(WARM_UP + 1):
        engine.evaluate([("all", next(batches), ROWS)])
    inference, batch = engine.inference(ROWS), next(batches)
    inference.run(batch)
    records = logged(stand_in, tmp_path / "run", lambda: inference.run(batch))
    assert not waits(records)
    assert [r.kind for r in records if r.kind not in ("event", "sync")] == ["memcpy", "memcpy", "graph"]
    records = logged(stand_in, tmp_path / "evaluate", lambda: engine.evaluate([("all", batch, ROWS)] * 2))
    # The host waits once, for the sums.
    assert [r.name for r in waits(records) if r.kind == "sync"] == ["cudaStreamSynchronize"]
    predictions, q_halt = inference.solve(batch.inputs, batch.puzzle_identifiers)
    assert predictions.shape == (ROWS, CELLS) and q_halt.shape == (ROWS,)
    # Training continues in graphs beside it.
    for _ in range(WARM_UP + 1):
        engine.train_step(next(batches))
    assert not waits(logged(stand_in, tmp_path / "train", lambda: engine.train_step(next(batches))))


def test_early_exit_drops_paths_that_cannot_change_the_choice(stand_in, tmp_path, trained):
    engine, batches = trained
    early = EarlyExit(engine.model, ROWS, CELLS, mode=engine.mode)
    program, halted = early._program, early.carry.halted

    def turn() -> None:
        program()
        # No kernel computes: every sequence halts at its first step.
        ctypes.memset(halted.data_ptr(), 1, halted.numel())

    early._program = turn
    count = 0

    def answer(times: int) -> None:
        nonlocal count
        count += sum(len(a.places) for a in early.answers([(next(batches), ROWS)] * times))

    answer(WARM_UP + 1)
    records = logged(stand_in, tmp_path / "log", lambda: answer(2))
    assert count == (WARM_UP + 3) * ROWS
    replays = [r.facts["replays"] for r in records if r.kind == "graph"]
    # Each turn begins the rows that halted, then steps all of them.
    assert len(set(replays)) == 2 and replays == replays[:2] * 2
    assert not [r for r in records if r.kind in ("malloc", "free") and r.name == "device"]


def test_a_solve_stores_no_gradients_and_a_task_is_learnt(stand_in, trained, monkeypatch):
    engine, batches = trained
    batch = next(batches)
    # No kernel computes, so no loss is finite.
    monkeypatch.setattr(torch, "isfinite", lambda tensor: torch.ones((), dtype=torch.bool))
    inputs, labels = (torch.from_numpy(x[:3]) for x in (batch.inputs, batch.labels))
    row = learn_embedding(engine.model, inputs, labels, steps=2, lr=0.1, loss=engine.config.loss)
    assert row.shape == (engine.config.arch.puzzle_emb_ndim,) and row.is_cuda


def test_state_is_saved_and_restored_between_replays(stand_in, tmp_path, trained):
    engine, batches = trained
    for _ in range(WARM_UP + 2):
        engine.train_step(next(batches))
    engine.pop()
    weights = {name: tensor.clone() for name, tensor in engine.weights().items()}
    state = engine.training_state()
    engine.load_weights(weights)
    engine.load_training_state(state)
    engine.diagnosis(), engine.gate_metrics()
    records = logged(stand_in, tmp_path / "log", lambda: engine.train_step(next(batches)))
    # The same graph continues on the same memory.
    assert len([r for r in records if r.kind == "graph"]) == 1


def test_stages_give_back_the_memory_of_their_graphs(stand_in, tmp_path):
    engine, batches = engine_of(configuration("v1 arch.H_cycles=2"))
    engine._mode = Mode("graph", compiled=False, captured=True)
    first = engine.config.arch
    allocated = []
    with stand_in.log(tmp_path / "log"):
        for arch in (first, replace(first, H_cycles=1), first, replace(first, H_cycles=1)):
            engine.enter(arch)
            for _ in range(WARM_UP + 2):
                engine.train_step(next(batches))
            engine.pop()
            allocated.append(torch.cuda.memory_allocated())
    begins = [r for r in read_log(tmp_path / "log") if r.kind == "capture" and r.name == "begin"]
    assert len(begins) == 4 and len({r.stream for r in begins}) == 1
    assert allocated[3] <= allocated[1] and allocated[2] <= allocated[0] * 1.01
    assert np.isfinite(allocated).all()
