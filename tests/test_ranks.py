"""Ranks that torchrun starts: they train what one rank trains, and refuse to start unequal."""

from pathlib import Path

import pytest
import torch

import train
from hrm.checkpoint.read import load_checkpoint
from hrm.engine.engine import Engine
from tests.support.runs import metrics_of, words
from tests.support.torchrun import PROGRAM, torchrun

RUN = ["max_steps=24", "epochs=20", "log_interval=1"]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture
def trained(tiny_sudoku, out):
    """Trains RUN, once for each number of ranks, and returns the run's folder."""

    def run(ranks: int, *more: str) -> Path:
        name = f"{'variant' if more else 'run'}-of-{ranks}"
        folder = out / tiny_sudoku.name / name
        argv = words(tiny_sudoku, out, *RUN, f"run_name={name}", *more)
        if not folder.exists():
            if ranks == 1:
                assert train.main(argv) == 0
            else:
                # The variant starts new processes, each with its own hash seed.
                ended = torchrun(ranks, "train.py", *argv, fork=not more)[0]
                assert ended.status == 0, ended.text
        return folder

    return run


# Feudal and gated by Muon, with every loss, average and limit that a variant can have, and random throughout.
VARIANT = (
    "arch=feudal",
    "arch.use_gating=true",
    "arch.init=random",
    "arch.noise=0.05",
    "arch.damping=0.9",
    "loss.gate_saturation_weight=0.1",
    "loss.gate_stability_weight=0.1",
    "loss.gate_loss_warmup_steps=10",
    "loss.gate_loss_ramp_steps=10",
    "ema=true",
    "grad_clip=1",
    "optimizer=muon",
)


@pytest.mark.parametrize(("ranks", "more"), [(4, ()), (2, VARIANT)], ids=["4", "2-variant"])
def test_ranks_train_what_one_rank_trains(tiny_sudoku, out, trained, ranks, more):
    """Over 24 steps, to 1e-6: gradients are summed in another order, the batches are the same."""
    runs = [trained(1, *more), trained(ranks, *more)]
    for mine, theirs in zip(*map(metrics_of, runs), strict=True):
        losses = {name for name in mine if name.endswith("loss")}
        # Statistics of the gates are a sample: of the main rank's first sequences.
        gates = {name for name in mine if name.startswith("train/gates/")}
        assert gates == {name for name in theirs if name.startswith("train/gates/")}
        for name in gates:
            assert theirs[name] == pytest.approx(mine[name], abs=0.02), name
        mine, theirs = ({n: run[n] for n in run if n not in gates} for run in (mine, theirs))
        rounded = losses | {name for name in mine if name.startswith("train/grad_")}
        rounded |= {name for name in mine if name.startswith(("train/goal_", "train/puzzle_emb_"))}
        rounded |= {name for name in mine if "/goal_" in name}
        for name in rounded - losses:
            assert theirs[name] == pytest.approx(mine[name], rel=1e-4, abs=1e-6), name
        assert {n: theirs[n] for n in theirs if n not in rounded} == {
            n: mine[n] for n in mine if n not in rounded
        }
        # Absolutely where a loss is all but 0.
        assert {n: theirs[n] for n in losses} == pytest.approx(
            {n: mine[n] for n in losses}, rel=1e-6, abs=1e-7
        )
    one, many = map(load_checkpoint, runs)
    assert one.step == many.step == 24 and one.weights.keys() == many.weights.keys()
    for name, tensor in one.weights.items():
        torch.testing.assert_close(many.weights[name], tensor, rtol=1e-6, atol=1e-6)
    assert one.extra.keys() == many.extra.keys() == ({"ema.safetensors"} if more else set())
    for name, tensor in one.extra.get("ema.safetensors", {}).items():
        torch.testing.assert_close(many.extra["ema.safetensors"][name], tensor, rtol=1e-6, atol=1e-6)
    for name in ("inputs", "labels", "puzzle_identifiers", "steps", "halted"):
        assert torch.equal(many.training["carry"][name], one.training["carry"][name])


def batches_of(runs: list[list[list[torch.Tensor]]]) -> list[list[torch.Tensor]]:
    """The global batches, from what each rank was given."""
    return [[torch.cat(parts) for parts in zip(*ranks, strict=True)] for ranks in zip(*runs, strict=True)]


@pytest.fixture
def recorded(tiny_sudoku, out, tmp_path, monkeypatch):
    """Trains to a step by so many ranks; returns the run's folder and the global batches that it took."""

    def run(name: str, ranks: int, steps: int, *more: str) -> tuple[Path, list[list[torch.Tensor]]]:
        argv = words(tiny_sudoku, out, *RUN[1:], f"max_steps={steps}", f"run_name={name}", *more)
        kept: list[list[torch.Tensor]] = []
        if ranks == 1:
            train_step = Engine.train_step

            def keep(engine: Engine, batch) -> None:
                kept.append(
                    [torch.tensor(part) for part in (batch.inputs, batch.labels, batch.puzzle_identifiers)]
                )
                train_step(engine, batch)

            with monkeypatch.context() as patch:
                patch.setattr(Engine, "train_step", keep)
                assert train.main(argv) == 0
        else:
            program = [str(PROGRAM), "train", "none", "-", *argv]
            [ended] = torchrun(ranks, *program, environment={"BATCHES": str(tmp_path)})
            assert ended.status == 0, ended.text
            kept = batches_of([torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)])
        return out / tiny_sudoku.name / name, kept

    return run


def test_a_run_continues_on_any_number_of_ranks(recorded):
    """From 1 rank to 2, to 4, to 1, and from 2 to 1, against 1 throughout: the same batches bit for bit.

    The weights to 2e-6 after 24 steps, for gradients are summed in another order.
    """
    whole, batches = recorded("whole", 1, 24)
    passed: list[list[torch.Tensor]] = []
    for part, ranks in enumerate((1, 2, 4, 1), start=1):
        folder, more = recorded("handed-on", ranks, 6 * part)
        passed += more
    branch, more = recorded("branch", 1, 24, f"resume={folder}/step_12")
    for mine, theirs in [*zip(passed, batches, strict=True), *zip(more, batches[12:], strict=True)]:
        assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))
    one = load_checkpoint(whole)
    for many in map(load_checkpoint, (folder, branch)):
        assert one.step == many.step == 24
        for name, tensor in one.weights.items():
            torch.testing.assert_close(many.weights[name], tensor, rtol=2e-6, atol=2e-6)
        for name in ("inputs", "labels", "puzzle_identifiers", "steps", "halted"):
            assert torch.equal(many.training["carry"][name], one.training["carry"][name])


def test_ranks_with_different_data_are_refused(tiny_sudoku, out, tmp_path, monkeypatch):
    from hrm.data.sudoku.build import builtin_sudoku

    monkeypatch.setenv("HRM_CACHE", str(tmp_path))
    other = builtin_sudoku(4, 48, 20, 0, 1)
    argv = [word for word in words(tiny_sudoku, out, *RUN) if not word.startswith("data_path=")]
    argv += [f"0:data_path={tiny_sudoku}", f"1:data_path={other}", "project_name=p", "run_name=differ"]
    [ended] = torchrun(2, str(PROGRAM), "train", "none", "-", *argv)
    assert ended.status != 0
    [line] = ended.lines("error: ")
    assert "the ranks differ in training data (rank 0 has " in line


def test_collectives(tmp_path):
    [ended] = torchrun(3, str(PROGRAM), "collectives", str(tmp_path))
    # An error that every rank meets is told once.
    assert ended.status != 0 and ended.lines("error: ") == ["error: every rank meets this"]
    for rank in range(3):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert got["world"] == (rank, 3) and got["device"] == torch.device("cpu")
        assert got["rows"] == slice(2 * rank, 2 * rank + 2)
        assert got["reduced"].tolist() == [3, 3]
        assert got["gathered"].tolist() == [[0, 7], [1, 7], [2, 7]]
        assert got["bools"].tolist() == [False, True, True, True, False, True]
        assert got["bools"].dtype == torch.bool
        assert got["float64"].tolist() == [[1, 1]] * 3 and got["bfloat16"].tolist() == [1] * 4
        assert got["bool"].tolist() == [True, False] and got["parameter"].tolist() == [1]
        assert got["differ"].startswith(
            "the ranks differ in weights (rank 2 has b2, the others have a1): start"
        )
        assert got["all"].startswith(
            "the ranks differ in weights (rank 0 has w0, rank 1 has w1, rank 2 has w2), "
            "code (rank 0 has nothing, the others have c3): start"
        )
        assert "xxx… (" in got["many"] and " and 4 more: start" in got["many"] and len(got["many"]) < 1000
        # What any rank gave at the call before.
        assert got["highest"] == [0, 0, 0, 1, 0, 3, 2]
        assert got["highest now"] == [0, 0, 1, 0, 3, 2, 0]
