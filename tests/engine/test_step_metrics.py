"""The sums of a run's log on the device: skipped steps are in none of them, and a restored one goes on."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from hrm.distributed import World
from hrm.engine import step_metrics
from hrm.engine.step_metrics import Tally

CPU, ALONE = torch.device("cpu"), World()


def step(tally: Tally, loss: float, norm: float, other: float = 1.0) -> None:
    tally.begin()
    # In two parts, as a batch that does not fit at once.
    for part in (0.25, 0.75):
        tally.add({"other": torch.tensor(part * other), "loss": torch.tensor(part * loss)})
    tally.end(torch.tensor(norm), ~torch.isfinite(torch.tensor(norm)))


def test_skipped_steps_are_counted_but_not_summed():
    found = Tally(CPU, 10)
    for loss, norm in ((1.0, 2.0), (math.nan, math.nan), (5.0, math.inf), (3.0, 4.0)):
        step(found, loss, norm)
    reading = found.read(ALONE)
    assert (reading.steps, reading.skipped, reading.in_a_row) == (4, 2, 0)
    assert reading.sums == {"other": 2.0, "loss": 4.0, "grad_norm": 6.0}
    assert reading.losses[0] == 1 and math.isnan(reading.losses[1]) and reading.losses[2:] == [5, 3]
    assert reading.norms[0] == 2 and math.isnan(reading.norms[1]) and reading.norms[2:] == [math.inf, 4]
    # The next one begins anew, but for the skipped ones in a row.
    step(found, 1.0, math.nan)
    step(found, 1.0, math.nan)
    reading = found.read(ALONE)
    assert (reading.steps, reading.skipped, reading.in_a_row, reading.sums["other"]) == (2, 2, 2, 0)
    step(found, 1.0, math.nan)
    assert found.read(ALONE).in_a_row == 3
    step(found, 1.0, 1.0)
    assert found.read(ALONE).in_a_row == 0


def test_only_the_last_steps_keep_their_loss(monkeypatch):
    monkeypatch.setattr(step_metrics, "LONGEST", 4)
    found = Tally(CPU, 1000)
    for n in range(11):
        step(found, float(n), 10.0 + n)
    reading = found.read(ALONE)
    assert reading.steps == 11 and reading.sums["loss"] == sum(range(11))
    assert reading.losses == [7, 8, 9, 10] and reading.norms == [17, 18, 19, 20]
    step(found, 3.0, 1.0)
    assert found.read(ALONE).losses == [3]


@pytest.mark.parametrize("length", [10, 3])
def test_a_restored_state_continues(length):
    straight, before = Tally(CPU, 10), Tally(CPU, 10)
    for n in range(5):
        for each in (straight, before):
            step(each, 0.1 * n, math.nan if n == 4 else 0.3 * n, 0.7)
    resumed = Tally(CPU, length)
    resumed.load_state_dict(before.state_dict(ALONE), ALONE)
    for each in (straight, resumed):
        step(each, 9.0, math.nan)
    one, other = straight.read(ALONE), resumed.read(ALONE)
    assert other.sums == one.sums and other.steps == 6 and other.skipped == 2 and other.in_a_row == 2
    assert other.losses == one.losses[-length:] and str(other.norms) == str(one.norms[-length:])


def test_other_ranks_share_what_all_had_gathered():
    parts = [Tally(CPU, 10) for _ in range(2)]
    for rank, part in enumerate(parts):
        step(part, 1.0 + rank, 5.0, 10.0 * (rank + 1))
    states = [part.state_dict(ALONE) for part in parts]
    both = {
        **states[0],
        **{name: torch.cat([state[name] for state in states]) for name in ("sums", "losses")},
    }
    alone = Tally(CPU, 10)
    alone.load_state_dict(both, ALONE)
    step(alone, 0.0, 1.0, 0.0)
    reading = alone.read(ALONE)
    assert reading.sums == {"other": 30.0, "loss": 3.0, "grad_norm": 6.0} and reading.losses == [3, 0]
    # Of three ranks the first has it all, and each the norm, which is the whole gradient's.
    for rank, expected in ((0, 30.0), (2, 0.0)):
        world = replace(ALONE, rank=rank, size=3)
        one = Tally(CPU, 10)
        one.load_state_dict(both, world)
        assert one.state_dict(ALONE)["sums"][0, 0] == expected and one.state_dict(ALONE)["norm_sum"] == 5
    for rank in range(2):
        one = Tally(CPU, 10)
        one.load_state_dict(both, replace(ALONE, rank=rank, size=2))
        assert one.state_dict(ALONE)["sums"].tolist() == [[10.0 * (rank + 1), 1.0 + rank]]


def test_loading_keeps_the_buffers_of_a_captured_step():
    found = Tally(CPU, 10)
    empty = copy.deepcopy(found.state_dict(ALONE))
    step(found, 1.0, 2.0)
    state = copy.deepcopy(found.state_dict(ALONE))
    step(found, 3.0, 4.0)
    kept = [tensor.data_ptr() for tensor in vars(found).values() if torch.is_tensor(tensor)]
    assert len(kept) == 9
    for saved, losses in ((state, [1, 5]), (empty, [5])):
        found.load_state_dict(saved, ALONE)
        step(found, 5.0, 6.0)
        assert [tensor.data_ptr() for tensor in vars(found).values() if torch.is_tensor(tensor)] == kept
        reading = found.read(ALONE)
        assert reading.losses == losses and reading.sums["loss"] == sum(losses)


def test_another_stages_metrics_are_loaded_over_those_of_this_one():
    def stage(found: Tally, *names: str) -> None:
        found.begin()
        found.add({name: torch.tensor(2.0) for name in (*names, "loss")})
        found.end(torch.tensor(1.0), torch.tensor(False))

    found = Tally(CPU, 10)
    stage(found, "first")
    state = copy.deepcopy(found.state_dict(ALONE))
    found.read(ALONE)
    stage(found, "first", "second")
    # The run goes back; its next step is again one of the first stage.
    found.load_state_dict(state, ALONE)
    stage(found, "first")
    assert found.read(ALONE).sums == {"first": 4.0, "loss": 4.0, "grad_norm": 2.0}
