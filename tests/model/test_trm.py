"""TRM, the model of one shared stack: against its straight line and the official code, trained and saved.

What compares with the official code needs a checkout of SamsungSAILMontreal/TinyRecursiveModels, named by
TRM_REPO, and is skipped without one.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor

from hrm.checkpoint.read import load_checkpoint
from hrm.checkpoint.weights import load_weights
from hrm.config.load import ArchConfig, Config, LossConfig, load_config, parse_args
from hrm.model.act import Sequences, act_step, draw_min_halt_steps, initial_carry, replace_halted
from hrm.model.hrm import HRM
from hrm.model.losses import act_loss
from tests.support import official_trm, straight_trm
from tests.support import straight_line as plain
from tests.support.act_cases import (
    PUZZLES,
    SOFTMAX,
    STABLEMAX,
    B,
    D,
    S,
    V,
    assert_same,
    make_arch,
    make_batch,
    make_model,
    make_weights,
    package_step,
    random_batch,
    straight_line_run,
    table_gradient,
)
from tests.support.act_engine import as_arrays, make_engine
from tests.support.runs import metrics_of, run_main

REASON = official_trm.missing()
with_official_code = pytest.mark.skipif(REASON is not None, reason=str(REASON))
# The forms of the block that the official recipes train, and the other positions.
FORMS = [(False, "rope"), (True, "none"), (False, "learned"), (False, "none")]
forms = pytest.mark.parametrize(("mlp_t", "pos_encodings"), FORMS)
TRM = {"share_levels": True, "gradient": "last_cycle", "q_continue": False, "L_layers": 2}


@pytest.fixture
def straight_line(float64: None) -> Iterator[None]:
    """The straight line's training step is TRM's."""
    with straight_trm.in_place():
        yield


def make_trm(**changes: Any) -> ArchConfig:
    """A small TRM: a puzzle's row that fills one and a half of its four tokens."""
    return make_arch(**{**TRM, "puzzle_emb_ndim": 3 * D // 2, "puzzle_emb_len": 4, **changes})


# --------------------------------------------------------------------------- against the straight line


@pytest.mark.parametrize(
    ("mlp_t", "pos_encodings", "puzzle_emb_ndim", "puzzle_emb_len"),
    [
        (False, "rope", 0, 4),
        (True, "none", 3 * D // 2, 4),
        (False, "learned", 3 * D // 2, 0),
        (False, "none", 3 * D // 2, 4),
    ],
)
@pytest.mark.usefixtures("straight_line")
def test_training_steps(mlp_t, pos_encodings, puzzle_emb_ndim, puzzle_emb_len):
    arch = make_trm(
        mlp_t=mlp_t,
        pos_encodings=pos_encodings,
        puzzle_emb_ndim=puzzle_emb_ndim,
        puzzle_emb_len=puzzle_emb_len,
    )
    loss_type = STABLEMAX if puzzle_emb_len else SOFTMAX
    generator = torch.Generator().manual_seed(0)
    weights = make_weights(arch, generator, torch.float64)
    model = make_model(arch, weights)
    carry = initial_carry(model, B, S, torch.device("cpu"))
    assert carry.z_H.shape[1] == S + {(48, 4): 4, (48, 0): 2, (0, 4): 0}[puzzle_emb_ndim, puzzle_emb_len]
    for batch, least, expected in straight_line_run(arch, weights, loss_type, 10, generator):
        carry, actual = package_step(model, carry, batch, least, loss_type)
        assert_same(actual, expected, "package")
        assert "target_q_continue" not in actual["outputs"]
        # The second output of the Q head is not taught.
        assert not actual["gradients"]["q_head.weight"][1].any()


@pytest.mark.parametrize("mlp_t", [False, True])
@pytest.mark.usefixtures("straight_line")
def test_evaluation(mlp_t):
    arch = make_trm(mlp_t=mlp_t)
    generator = torch.Generator().manual_seed(1)
    weights = make_weights(arch, generator, torch.float64)
    model = make_model(arch, weights)
    batch = random_batch(generator)
    expected = plain.evaluation(weights, arch, batch, STABLEMAX)
    with torch.no_grad():
        carry = initial_carry(model, B, S, torch.device("cpu"))
        carry = replace_halted(model, carry, Sequences(**batch))
        rows = weights[plain.PUZZLE_TABLE][carry.puzzle_identifiers]
        for _ in range(arch.halt_max_steps):
            assert not carry.halted.any()
            carry, outputs = act_step(model, carry, rows, None)
        loss, metrics = act_loss(LossConfig(), model.lm_head, carry, outputs)
    logits = {"logits": model.logits(carry.z_H), "q_halt": outputs.q_halt_logits}
    logits |= {"q_continue": outputs.q_continue_logits}
    actual = {"loss": loss, "metrics": metrics, "outputs": logits, "carry": carry._asdict()}
    assert_same(actual, expected, "package")


@pytest.mark.parametrize("mlp_t", [False, True])
@pytest.mark.usefixtures("straight_line")
def test_whole_training_steps_and_their_moving_average(mlp_t, monkeypatch):
    steps, rate = 8, 0.8
    arch = make_trm(mlp_t=mlp_t, halt_exploration_prob=0.5)
    config = Config(
        arch=arch,
        global_batch_size=B,
        lr=1e-2,
        lr_warmup_steps=3,
        lr_min_ratio=0.1,
        weight_decay=0.5,
        puzzle_emb_lr=3e-2,
        seed=5,
        mode="eager",
        ema=True,
        ema_rate=rate,
    )
    recipe = SimpleNamespace(**vars(config), total_steps=steps, loss_type=STABLEMAX)
    generator = torch.Generator().manual_seed(2)
    weights = make_weights(arch, generator, torch.float64)
    engine = make_engine(monkeypatch, config, weights, steps)
    # As the official code does: from the weights at the start, of the dense weights alone.
    average = {name: w.clone() for name, w in weights.items() if name in engine.average.state_dict()}
    assert weights.keys() - average.keys() == {plain.PUZZLE_TABLE, *plain.BUFFERS}
    state: dict[str, Any] = {}
    carry = plain.initial_carry(weights, arch, random_batch(generator))
    for step in range(1, steps + 1):
        batch = make_batch(arch, weights, carry, generator)
        least = torch.from_numpy(draw_min_halt_steps(arch, config.seed, step, B))
        carry = plain.train_step(weights, arch, recipe, state, carry, batch, least)["carry"]
        average = {name: rate * a + (1 - rate) * weights[name] for name, a in average.items()}
        engine.train_step(as_arrays(batch))
        assert_same(engine.carry._asdict(), carry, "engine.carry")
        assert_same(engine.weights(), weights, "weights")
        assert_same(engine.average.state_dict(), average, "average")

    batch = random_batch(generator)
    for own in (weights, {**weights, **average}):
        expected = plain.evaluation(own, arch, batch, STABLEMAX)["metrics"]
        if own is weights:
            result = engine.evaluate([("all", as_arrays(batch), B)])["all"]
        else:
            with engine.average.in_place():
                result = engine.evaluate([("all", as_arrays(batch), B)])["all"]
        # Metrics leave the engine in float32.
        assert result["lm_loss"] == pytest.approx(expected["lm_loss"].item() / B, rel=1e-6)
    assert_same(engine.weights(), weights, "weights")


# ------------------------------------------------------------------------------------- the options alone


def gradients_of_a_step(model: HRM, batch: plain.Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one step of fresh sequences, and each parameter's gradient."""
    model.zero_grad()
    carry = replace_halted(model, initial_carry(model, B, S, torch.device("cpu")), Sequences(**batch))
    carry, outputs = act_step(model, carry, None, torch.zeros(B, dtype=torch.int32))
    loss, _ = act_loss(LossConfig(), model.lm_head, carry, outputs)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("gradient", ["one_step", "last_cycle"])
@pytest.mark.usefixtures("straight_line")
def test_a_shared_stack_sums_the_gradients_of_two_equal_stacks(gradient):
    shared_arch = make_trm(puzzle_emb_ndim=0, gradient=gradient)
    weights = make_weights(make_trm(puzzle_emb_ndim=0), torch.Generator().manual_seed(3), torch.float64)
    shared = make_model(shared_arch, weights)
    copies = {"H" + name[1:]: w for name, w in weights.items() if name.startswith("L_level")}
    apart = make_model(replace(shared_arch, share_levels=False, H_layers=2), {**weights, **copies})
    batch = random_batch(torch.Generator().manual_seed(4))
    (loss, actual), (expected_loss, summed) = (gradients_of_a_step(m, batch) for m in (shared, apart))
    for name in copies:
        summed["L" + name[1:]] = summed["L" + name[1:]] + summed.pop(name)
    assert_same(actual, summed, "gradients")
    assert_same(loss, expected_loss, "loss")


@pytest.mark.usefixtures("straight_line")
def test_last_cycle_differs_from_one_step_only_in_the_gradient():
    weights = make_weights(make_trm(puzzle_emb_ndim=0), torch.Generator().manual_seed(5), torch.float64)
    batch = random_batch(torch.Generator().manual_seed(6))

    def both(**changes: Any) -> list[tuple[Tensor, dict[str, Tensor]]]:
        archs = [make_trm(puzzle_emb_ndim=0, **changes, gradient=g) for g in ("one_step", "last_cycle")]
        return [gradients_of_a_step(make_model(arch, weights), batch) for arch in archs]

    (loss, short), (same_loss, whole) = both()
    assert torch.equal(loss, same_loss)
    assert (short["lm_head.weight"] == whole["lm_head.weight"]).all()
    stack = [name for name in short if name.startswith(("L_level", "embed"))]
    assert len(stack) == 9 and not any(torch.allclose(short[name], whole[name], rtol=1e-2) for name in stack)
    # A last H-cycle of one L-update is the one step.
    (_, short), (_, whole) = both(L_cycles=1)
    assert_same(whole, short, "gradients")


# ------------------------------------------------------------------------------ against the official code


@forms
@with_official_code
@pytest.mark.usefixtures("straight_line")
def test_training_steps_of_the_official_code(mlp_t, pos_encodings, tmp_path):
    arch = make_trm(mlp_t=mlp_t, pos_encodings=pos_encodings, puzzle_emb_ndim=D if mlp_t else 3 * D // 2)
    # The official code writes the 1/sqrt(2) of learned positions with nine digits.
    tolerance = 1e-7 if pos_encodings == "learned" else 1e-9
    generator = torch.Generator().manual_seed(7)
    sizes = {"seq_len": S, "vocab_size": V, "num_puzzle_identifiers": PUZZLES, "dtype": torch.float64}
    with official_trm.official_code(in_float64=True) as code:
        head: Any = official_trm.official_model(code, arch, batch_size=B, **sizes)
        # Of its own weights some start at zero, and none would let a sequence halt.
        weights = make_weights(arch, generator, torch.float64)
        head.load_state_dict({f"model.inner.{name}": weight for name, weight in weights.items()})
        # As torch.compile names what the official trainer saves.
        torch.save({f"_orig_mod.{name}": w for name, w in head.state_dict().items()}, tmp_path / "step_12")
        model = HRM(arch, **sizes)
        shapes = {name: weight.shape for name, weight in model.state_dict().items()}
        read, notes = load_weights(tmp_path, shapes)
        model.load_state_dict(read)
        assert notes == []
        assert_same(read, weights, "read")

        carry = initial_carry(model, B, S, torch.device("cpu"))
        official_carry = head.initial_carry(random_batch(generator))
        for batch, least, straight in straight_line_run(arch, read, STABLEMAX, 10, generator):
            carry, actual = package_step(model, carry, batch, least, STABLEMAX)
            official_carry, expected = official_trm.step(head, official_carry, batch, least)
            identifiers = official_carry.current_data["puzzle_identifiers"]
            expected["puzzle_rows"] = table_gradient(arch, identifiers, expected["puzzle_rows"])
            assert_same(actual, expected, "package", tolerance)
            assert_same(straight, expected, "straight line", tolerance)


@with_official_code
@pytest.mark.usefixtures("straight_line")
def test_moving_average_of_the_official_code(monkeypatch):
    arch = make_trm()
    config = Config(arch=arch, global_batch_size=B, lr=1e-2, lr_warmup_steps=0, mode="eager", ema=True)
    generator = torch.Generator().manual_seed(8)
    weights = make_weights(arch, generator, torch.float64)
    engine = make_engine(monkeypatch, config, weights, 4)
    with official_trm.official_code() as code:
        helper = code.ema.EMAHelper(mu=config.ema_rate)
        helper.register(engine.model)
        for _ in range(4):
            engine.train_step(as_arrays(random_batch(generator)))
            helper.update(engine.model)
    assert_same(engine.average.state_dict(), helper.shadow, "average")


def full_size(words: list[str]) -> tuple[Config, HRM]:
    """The model that a command line trains on the Sudoku of 81 cells."""
    config = parse_args([*words, "preset=full", "device=cpu"])
    return config, HRM(config.arch, vocab_size=11, seq_len=81, num_puzzle_identifiers=1)


@pytest.mark.parametrize(
    ("words", "millions"),
    [
        (["--arch", "trm"], 6.829),
        (["--arch", "trm", "arch.mlp_t=true", "arch.pos_encodings=none"], 5.029),
    ],
)
def test_full_size(words, millions):
    config, model = full_size(words)
    assert config.ema and config.ema_rate == 0.999 and config.run_name == "trm"
    with straight_trm.in_place():
        shapes = plain.weight_shapes(config.arch, 11, 81, 1)
    assert {name: tuple(w.shape) for name, w in model.state_dict().items()} == shapes
    # The paper's 7M and 5M.
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1e-3)
    if REASON is None:
        with official_trm.official_code() as code:
            head = official_trm.official_model(
                code,
                config.arch,
                batch_size=1,
                seq_len=81,
                vocab_size=11,
                num_puzzle_identifiers=1,
                dtype=torch.float32,
            )
        theirs = {f"model.inner.{name}": w.shape for name, w in model.state_dict().items()}
        assert {name: w.shape for name, w in head.state_dict().items()} == theirs


@with_official_code
def test_the_architecture_is_that_of_the_official_configuration():
    text = (Path(os.environ["TRM_REPO"]) / "config" / "arch" / "trm.yaml").read_text()
    theirs = yaml.safe_load(text)
    config, _ = full_size(["--arch", "trm"])
    assert theirs.pop("puzzle_emb_ndim") == "${.hidden_size}" and config.arch.puzzle_emb_ndim == 512
    assert theirs.pop("no_ACT_continue") is not config.arch.q_continue
    assert theirs.pop("loss") == {"name": "losses@ACTLossHead", "loss_type": config.loss.loss_type}
    for ours_elsewhere in ("name", "forward_dtype", "H_layers"):
        theirs.pop(ours_elsewhere)
    assert theirs == {name: getattr(config.arch, name) for name in theirs} and len(theirs) == 11


# ------------------------------------------------------------------------------------------------- a run


def test_names_of_the_weights():
    for mlp_t, mixer in ((False, ["self_attn.o_proj", "self_attn.qkv_proj"]), (True, None)):
        arch = make_trm(L_layers=1, mlp_t=mlp_t)
        model = HRM(arch, vocab_size=V, seq_len=S, num_puzzle_identifiers=PUZZLES)
        inside = ["mlp.down_proj", "mlp.gate_up_proj", *(mixer or ["mlp_t.down_proj", "mlp_t.gate_up_proj"])]
        assert sorted(model.state_dict()) == [
            "H_init",
            "L_init",
            *(f"L_level.layers.0.{name}.weight" for name in inside),
            "embed_tokens.embedding_weight",
            "lm_head.weight",
            "puzzle_emb.weights",
            "q_head.bias",
            "q_head.weight",
        ]


def test_a_short_run_trains_and_resumes(tiny_sudoku, tmp_path, capsys):
    words = ["--arch", "trm", "preset=quick", f"data_path={tiny_sudoku}", f"output_dir={tmp_path}"]
    words += ["arch.hidden_size=16", "arch.num_heads=2", "global_batch_size=16", "mode=eager", "device=cpu"]
    words += ["log_interval=1", "epochs=4", "eval_interval=2", "lr_warmup_steps=0"]
    # From the architecture, with the preset's number of steps.
    arch = parse_args(words).arch
    assert (arch.H_cycles, arch.L_cycles, arch.L_layers, arch.halt_max_steps) == (3, 6, 2, 8)
    words += ["arch.H_cycles=2", "arch.L_cycles=1", "arch.L_layers=1", "arch.halt_max_steps=3"]
    assert run_main(*words, "max_steps=6", capsys=capsys)[0] == 0
    run = tmp_path / tiny_sudoku.name / "trm"
    arch = load_config(run / "config.yaml").arch
    assert (arch.share_levels, arch.gradient, arch.q_continue) == (True, "last_cycle", False)
    lines = metrics_of(run)
    logged = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, 6]
    assert not any("train/q_continue_loss" in line for line in logged)
    expected = logged[-1]["train/lm_loss"] + 0.5 * logged[-1]["train/q_halt_loss"]
    assert logged[-1]["train/loss"] == pytest.approx(expected, rel=1e-5)
    evaluations = [line for line in lines if "eval/all/lm_loss" in line]
    assert [line["step"] for line in evaluations] == [6]
    assert evaluations[0]["eval_ema/all/count"] == 20
    # After six steps an average of 0.999 is still nearly the weights at the start.
    assert evaluations[0]["eval_ema/all/lm_loss"] > evaluations[0]["eval/all/lm_loss"]
    names = load_checkpoint(run).weights.keys()
    assert not any(name.startswith("H_level") for name in names)
    status, out, _ = run_main(*words, "max_steps=8", capsys=capsys)
    assert status == 0 and "at step 6" in out and load_checkpoint(run).step == 8
