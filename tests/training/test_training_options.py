"""Options of a run: an average of the weights, clipping, stages, early stopping, the best checkpoint."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import train
from hrm.checkpoint.read import load_checkpoint
from hrm.engine.step_metrics import GATE_STATISTICS, GATES
from hrm.model.act import act_step, replace_halted
from hrm.model.gating import gate_statistics
from hrm.training import resume
from tests.support.engines import B, all_state, assert_same_state, batches, make_config, make_engine
from tests.support.runs import assert_same_run, metrics_of, run_main, words


def test_the_average_of_the_weights_is_kept_evaluated_and_saved():
    engine, reference = make_engine(make_config(ema=True, ema_rate=0.8)), make_engine()
    expected = {name: tensor.clone() for name, tensor in reference.weights().items()}
    for _, batch in zip(range(6), batches(), strict=False):
        engine.train_step(batch)
        reference.train_step(batch)
        for name, tensor in reference.weights().items():
            expected[name] = 0.8 * expected[name] + 0.2 * tensor
    averaged = engine.average.state_dict()
    assert averaged.keys() == dict(engine.model.named_parameters()).keys()
    for name, tensor in averaged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
    # The weights themselves are those of the run without.
    assert_same_state(engine, reference)

    source = [("all", next(batches(1)), B)]
    raw = engine.evaluate(source)
    with engine.average.in_place():
        of_average = engine.evaluate(source)
    own = {name: tensor.clone() for name, tensor in averaged.items()}
    assert engine.evaluate(source) == raw != of_average
    reference.load_weights(own)
    assert reference.evaluate(source) == of_average


def test_16_bit_weights_are_averaged_in_float32():
    engine = make_engine(make_config(ema=True, ema_rate=0.5, dtype="bfloat16"))
    engine.train_step(next(batches()))
    source = [("all", next(batches(1)), B)]
    raw = engine.evaluate(source)
    with engine.average.in_place():
        assert engine.evaluate(source) != raw
    assert engine.evaluate(source) == raw
    assert {tensor.dtype for tensor in engine.average.state_dict().values()} == {torch.float32}


def test_a_long_gradient_is_scaled_to_the_limit():
    source = [batch for _, batch in zip(range(4), batches(), strict=False)]
    free, loose, tight = (make_engine(make_config(grad_clip=limit)) for limit in (None, 1e6, 1e-2))
    for batch in source:
        norms = []
        for engine in (free, loose, tight):
            engine.train_step(batch)
            norms.append(engine.pop().metrics["grad_norm"])
        if batch is source[0]:
            # What is logged is the norm before.
            assert norms[2] == pytest.approx(norms[0], rel=1e-6) and norms[0] > 0.1
            assert tight.parameters.grad.norm() == pytest.approx(1e-2, rel=1e-5)
            # The update of the first step knows no scale, its second moment does.
            ratio = tight.optimizer.exp_avg_sq.sum() / free.optimizer.exp_avg_sq.sum()
            assert ratio == pytest.approx((1e-2 / norms[0]) ** 2, rel=1e-4)
    assert torch.equal(free.parameters.data, loose.parameters.data)
    assert not torch.equal(free.parameters.data, tight.parameters.data)


def test_gates_are_logged_as_a_step_has_them(monkeypatch):
    engine = make_engine(make_config({"H_cycles": 2, "L_cycles": 2, "halt_max_steps": 2}))
    for _, batch in zip(range(5), batches(), strict=False):
        engine.train_step(batch)
    state = {name: tensor.clone() for name, tensor in all_state(engine).items()}
    seen = []

    def watch(network, inputs, output):
        z, o, x, held = inputs
        sources = [source for source in (z, o, x) if source is not None]
        seen.append(gate_statistics(network.gates(z, o, x, held), sources))

    for level in (engine.model.L_level, engine.model.H_level):
        level.gating_network.register_forward_hook(watch)
    for level in (engine.model.L_level, engine.model.H_level):
        # Looked at through the fused way, which the log's step otherwise leaves for its last calls.
        monkeypatch.setattr(
            level, "combine", lambda z, o, x, held, seen, m=level: m.gating_network(z, o, x, held)
        )
    with torch.no_grad():
        carry, fresh, rows, *_ = engine.program.inputs(slice(B))
        act_step(engine.model, replace_halted(engine.model, carry, fresh), rows, None)
    # Two cycles of two L-updates and an H-update; the last of each is what counts.
    assert len(seen) == 6
    expected = torch.cat([seen[4], seen[5]])
    monkeypatch.undo()
    metrics = engine.pop().metrics
    actual = [[metrics[f"gates/{gate}/{name}"] for name in GATE_STATISTICS] for gate in GATES]
    torch.testing.assert_close(torch.tensor(actual), expected, rtol=1e-5, atol=1e-6)
    after = all_state(engine)
    assert [name for name in state if not torch.equal(after[name], state[name])] == []
    assert not any(name.startswith("gates/") for name in run_metrics(make_config({"use_gating": False})))


def run_metrics(config):
    engine = make_engine(config)
    engine.train_step(next(batches()))
    return engine.pop().metrics


def test_moving_puzzle_embeddings_are_logged():
    metrics = run_metrics(make_config(puzzle_emb_lr=1e-2, lr_warmup_steps=0))
    # From zero, sign-SGD moves every element by the learning rate.
    assert metrics["puzzle_emb_norm"] == pytest.approx(1e-2 * math.sqrt(32), rel=1e-5)
    assert metrics["puzzle_emb_grad_norm"] > 0
    assert "puzzle_emb_norm" not in run_metrics(make_config({"puzzle_emb_ndim": 0}))


STAGES = "stages=[{halt_max_steps: 2, epochs: 4}, {halt_max_steps: 3, H_cycles: 2, epochs: 2}, {epochs: 2}]"


@pytest.mark.slow
def test_a_run_in_stages_grows_its_steps_and_resumes_in_each(tiny_sudoku, tmp_path, capsys):
    """Stages end after 24, 36 and 48 steps; cut off within the first and within the second."""
    more = [STAGES, "arch.halt_max_steps=4", "arch=feudal", "ema=true"]
    argv = [word for word in words(tiny_sudoku, tmp_path, *more) if not word.startswith("epochs=")]
    status, out, error = run_main(*argv, "run_name=whole", capsys=capsys)
    assert status == 0, error
    # What is suggested next is what would be taken.
    assert "twice as long" not in out and "checkpoint_path=" in out
    whole = tmp_path / tiny_sudoku.name / "whole"
    steps = {line["step"]: line["eval/all/steps"] for line in metrics_of(whole) if "eval/all/steps" in line}
    assert steps == {12: 2, 24: 2, 36: 3, 48: 4}
    most = [line["train/steps"] for line in metrics_of(whole) if "train/steps" in line]
    assert max(most[:12]) <= 2 < max(most[12:])
    for cut in (20, 30):
        assert run_main(*argv, f"run_name=cut-{cut}", f"max_steps={cut}", capsys=capsys)[0] == 0
        status, out, _ = run_main(*argv, f"run_name=cut-{cut}", capsys=capsys)
        assert status == 0 and f"at step {cut}" in out
        cut_run, whole_run = load_checkpoint(whole.with_name(f"cut-{cut}")), load_checkpoint(whole)
        assert cut_run.step == whole_run.step == 48
        for name, tensor in whole_run.weights.items():
            assert torch.equal(cut_run.weights[name], tensor), name
        for name, tensor in whole_run.extra["ema.safetensors"].items():
            assert torch.equal(cut_run.extra["ema.safetensors"][name], tensor), name
    # Without stages it is another run.
    words_now = [word for word in argv if word != STAGES]
    status, _, error = run_main(*words_now, "epochs=8", "run_name=cut-20", capsys=capsys)
    assert status == 2 and "stages was" in error and "is now unset" in error


def test_an_average_is_evaluated_beside_the_weights_and_saved_with_them(tiny_sudoku, tmp_path, capsys):
    argv = words(tiny_sudoku, tmp_path, "run_name=r", "ema=true", "ema_rate=0.5", "epochs=2")
    status, out, _ = run_main(*argv, capsys=capsys)
    assert status == 0 and "all, averaged weights: " in out
    run = tmp_path / tiny_sudoku.name / "r"
    last = metrics_of(run)[-1]
    assert last["eval_ema/all/count"] == 20 and last["eval_ema/all/lm_loss"] != last["eval/all/lm_loss"]
    average = load_file(run / "step_12" / "ema.safetensors")
    weights = load_file(run / "step_12" / "model.safetensors")
    assert average.keys() == weights.keys() - {"H_init", "L_init", "puzzle_emb.weights"}
    assert not torch.equal(average["lm_head.weight"], weights["lm_head.weight"])


def test_a_run_stops_early_and_keeps_its_best(tiny_sudoku, tmp_path, capsys):
    """With lr=0 no evaluation is better than the first."""
    argv = words(tiny_sudoku, tmp_path, "run_name=r", "lr=0", "puzzle_emb_lr=0", "keep_checkpoints=1")
    argv += ["early_stop_patience=2", "best_metric=lm_loss"]
    status, out, _ = run_main(*argv, capsys=capsys)
    assert status == 0
    assert "stopped early: no improvement over step 12 in the last 2" in out
    run = tmp_path / tiny_sudoku.name / "r"
    assert sorted(folder.name for folder in run.glob("step_*")) == ["step_12", "step_36"]
    # The same command again finds that it has stopped, and no more steps are made.
    status, out, _ = run_main(*argv, capsys=capsys)
    assert status == 0 and "stopped early" in out
    assert load_checkpoint(run).step == 36
    # More patience goes on.
    argv = [word for word in argv if not word.startswith("early_stop")]
    assert run_main(*argv, capsys=capsys)[0] == 0
    assert load_checkpoint(run).step == 48
    manifest = json.loads((run / "step_12" / "manifest.json").read_text())
    logged = next(line for line in metrics_of(run) if "eval/all/lm_loss" in line)
    assert manifest["score"] == pytest.approx(-logged["eval/all/lm_loss"], rel=1e-6)


@pytest.mark.slow
def test_the_best_is_saved_without_checkpoint_every_eval(tiny_sudoku, tmp_path):
    argv = words(tiny_sudoku, tmp_path, "lr=0", "puzzle_emb_lr=0", "checkpoint_every_eval=false")
    for keep_best, steps in (("true", ["step_12", "step_48"]), ("false", ["step_48"])):
        assert train.main([*argv, f"run_name={keep_best}", f"keep_best={keep_best}"]) == 0
        folders = (tmp_path / tiny_sudoku.name / keep_best).glob("step_*")
        assert sorted(folder.name for folder in folders) == steps


def test_evaluations_look_at_a_sample_and_the_last_at_all(tiny_sudoku, tmp_path, capsys):
    """A run that ends, and one that stops early, of which lr=0 makes every evaluation of the sample alike."""
    still = ["lr=0", "puzzle_emb_lr=0", "best_metric=lm_loss"]
    for name, more, counts in (
        ("ends", still, {12: [7], 24: [7], 36: [7], 48: [20]}),
        ("stops", [*still, "early_stop_patience=1"], {12: [7], 24: [7, 20]}),
    ):
        argv = words(tiny_sudoku, tmp_path, f"run_name={name}", "eval_samples=7", *more)
        status, out, error = run_main(*argv, capsys=capsys)
        assert status == 0 and "on 20 test puzzles" in out.split("\n\n")[-1], error
        run = tmp_path / tiny_sudoku.name / name
        seen = {}
        for line in metrics_of(run):
            if "eval/all/count" in line:
                seen.setdefault(line["step"], []).append(line["eval/all/count"])
        assert seen == counts
        losses = {line["eval/all/lm_loss"] for line in metrics_of(run) if line.get("eval/all/count") == 7}
        assert len(losses) == 1
        # Told of all 20, ranked by the same 7 as the others: none is better than the first.
        manifest = json.loads((run / "step_12" / "manifest.json").read_text())
        assert manifest["score"] == -losses.pop() and manifest["data"]["seq_len"] == 16
        last = load_checkpoint(run).manifest
        assert last["score"] == manifest["score"] and last["step"] == max(counts)
        assert last["metrics"]["eval"]["all"]["count"] == counts[max(counts)][-1]
    argv = ["eval_samples=8" if word == "eval_samples=7" else word for word in argv]
    status, _, error = run_main(*argv, capsys=capsys)
    assert status == 2 and "eval_samples was 7 and is now 8" in error


@pytest.mark.slow
def test_a_checkpoint_from_before_an_option_existed_resumes(tiny_sudoku, tmp_path, capsys, monkeypatch):
    argv = words(tiny_sudoku, tmp_path, "epochs=4")
    identity = resume.run_identity

    def earlier(config, fingerprint):
        run = identity(config, fingerprint)
        for name in ("mlp_t", "subgoal_head", "gating_type"):
            del run["arch"][name]
        del run["loss"]["feudal_loss_weight"], run["best_metric"], run["eval_samples"]
        return run

    monkeypatch.setattr(resume, "run_identity", earlier)
    assert run_main(*argv, "run_name=r", "max_steps=12", capsys=capsys)[0] == 0
    monkeypatch.undo()
    status, out, error = run_main(*argv, "run_name=r", capsys=capsys)
    assert status == 0 and "at step 12" in out, error
    assert run_main(*argv, "run_name=whole", capsys=capsys)[0] == 0
    run = tmp_path / tiny_sudoku.name / "r"
    assert load_checkpoint(run).step == 24
    for name, tensor in load_checkpoint(run.with_name("whole")).weights.items():
        assert torch.equal(load_checkpoint(run).weights[name], tensor)


def test_a_symptom_is_reported_during_training(tiny_sudoku, tmp_path, capsys):
    argv = words(tiny_sudoku, tmp_path, "run_name=r", "puzzle_emb_lr=0", "log_interval=1")
    status, _, error = run_main(*argv, capsys=capsys)
    assert status == 0
    lines = [line for line in error.splitlines() if line.startswith("warning: ")]
    assert sum("the puzzle embeddings do not change: puzzle_emb_lr=0" in line for line in lines) == 1


@pytest.mark.slow
def test_deterministic_runs_are_the_same_bit_for_bit_and_measure_no_mode(tiny_sudoku, tmp_path, capsys):
    more = ["deterministic=true", "mode=auto", "ema=true", "grad_clip=1", "epochs=4"]
    argv = words(tiny_sudoku, tmp_path, *more)
    for name in ("a", "b"):
        status, out, err = run_main(*argv, f"run_name={name}", capsys=capsys)
        assert status == 0, err
        assert "mode eager (deterministic=true measures none)" in out
        assert "deterministic: repeat it with OMP_NUM_THREADS=" in out
    # In two parts as well.
    assert run_main(*argv, "run_name=c", "max_steps=12", capsys=capsys)[0] == 0
    status, out, _ = run_main(*argv, "run_name=c", capsys=capsys)
    assert status == 0 and "at step 12;" in out
    runs = tmp_path / tiny_sudoku.name
    assert_same_run(runs / "a", runs / "b")
    # But for the length that it was first given.
    assert metrics_of(runs / "c")[1:] == metrics_of(runs / "a")[1:]
    whole, parts = (load_checkpoint(runs / name).weights for name in "ac")
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    assert not torch.are_deterministic_algorithms_enabled()
