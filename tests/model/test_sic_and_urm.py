"""sic and urm: normed and convolved SwiGLU, register tokens, a bias of the head, a single state.

Comparisons with the authors' code need a checkout, in SIC_REPO and URM_REPO, and are skipped without one.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hrm.checkpoint.weights import load_weights
from hrm.config.load import ArchConfig, parse_args
from hrm.config.messages import ConfigError
from hrm.model.act import Sequences, act_step, initial_carry, replace_halted
from hrm.model.hrm import HRM
from tests.support import official_sic, official_urm, straight_sic
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
    make_model,
    make_weights,
    package_step,
    random_batch,
    straight_line_run,
)

CPU = torch.device("cpu")
TRM = {"share_levels": True, "gradient": "last_cycle", "q_continue": False, "L_layers": 2}
SIC = {**TRM, "mlp_t": True, "swiglu": "normed", "register_tokens": 1, "head_bias": True}
URM = {"single_state": True, "swiglu": "conv", "gradient": "last_cycle", "q_continue": False, "L_layers": 2}
PUZZLE = {"puzzle_emb_ndim": 3 * D // 2}
FORMS = {
    "sic": SIC,
    "sic of positions": {**SIC, "pos_encodings": "learned", "register_tokens": 2},
    "normed attention with registers behind a puzzle": {
        **SIC, **PUZZLE, "mlp_t": False, "pos_encodings": "rope2d", "register_tokens": 3,
    },
    "urm": {**URM, **PUZZLE},
    "urm of positions": {**URM, "pos_encodings": "learned", "head_bias": True},
    "TRM with a convolution": {**TRM, "swiglu": "conv"},
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("form", FORMS)
def test_training_steps(form):
    """Values and gradients of steps with every event, against the straight line."""
    arch = make_arch(**FORMS[form])
    loss_type = SOFTMAX if arch.head_bias else STABLEMAX
    generator = torch.Generator().manual_seed(0)
    with straight_sic.in_place(arch):
        weights = make_weights(arch, generator, torch.float64)
        model = make_model(arch, weights)
        assert {name for name, _ in model.named_parameters()} | {"H_init"} >= weights.keys() - {
            plain.PUZZLE_TABLE, "L_init",
        }  # fmt: skip
        carry = initial_carry(model, B, S, CPU)
        assert carry.z_L.shape[1] == (0 if arch.single_state else model.length)
        for batch, least, expected in straight_line_run(arch, weights, loss_type, 8, generator):
            carry, actual = package_step(model, carry, batch, least, loss_type)
            assert_same(actual, expected, "package")


def test_single_state_can_learn_through_only_the_last_update():
    batch = random_batch(torch.Generator().manual_seed(1))
    gradients = []
    for changes in ({"gradient": "one_step", "L_cycles": 3}, {"gradient": "last_cycle", "L_cycles": 1}):
        arch = make_arch(**{**URM, "H_cycles": 6 // changes["L_cycles"], **changes})
        model = HRM(arch, vocab_size=V, seq_len=S, num_puzzle_identifiers=1, dtype=torch.float64)
        carry = replace_halted(model, initial_carry(model, B, S, CPU), Sequences(**batch))
        _, outputs = act_step(model, carry, None, torch.zeros(B, dtype=torch.int32))
        model.lm_head(outputs.answer).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_same(gradients[0], gradients[1], "gradients")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("arch.use_gating=true", "arch.single_state=true has no second state to gate"),
        ("arch.subgoal_head.enabled=true", "arch.single_state=true has no worker"),
        ("arch.mlp_t=true", "arch.swiglu=conv"),
    ],
)
def test_conflicts_of_a_single_state_or_a_convolution(changes, message):
    with pytest.raises(ConfigError, match=message):
        parse_args(["--arch", "urm", "data_path=x", changes])


def full_size(name: str) -> tuple[ArchConfig, HRM]:
    config = parse_args(["--arch", name, "preset=full", "device=cpu"])
    with torch.device("meta"):
        return config.arch, HRM(config.arch, vocab_size=11, seq_len=81, num_puzzle_identifiers=1)


@pytest.mark.parametrize(("name", "parameters"), [("sic", 4_857_357), ("urm", 13_662_210)])
def test_full_size(name, parameters):
    arch, model = full_size(name)
    with straight_sic.in_place(arch):
        shapes = plain.weight_shapes(arch, 11, 81, 1)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes
    assert sum(p.numel() for p in model.parameters()) == parameters


# ------------------------------------------------------------------------------- against the authors' code


@pytest.mark.skipif(official_sic.missing() is not None, reason=str(official_sic.missing()))
def test_steps_of_the_code_of_sic():
    arch = make_arch(**SIC)
    generator = torch.Generator().manual_seed(2)
    with straight_sic.in_place(arch):
        weights = make_weights(arch, generator, torch.float64)
    model = make_model(arch, weights)
    batch = random_batch(generator)
    carry = replace_halted(model, initial_carry(model, B, S, CPU), Sequences(**batch))
    with official_sic.official_model(arch, V, 3) as theirs:
        official_sic.load(theirs, weights)
        z_H, z_L = (state.clone() for state in (carry.z_H, carry.z_L))
        for _ in range(3):
            model.zero_grad()
            theirs.zero_grad()
            out = theirs(batch["inputs"], z_H, z_L)
            carry, outputs = act_step(model, carry, None, torch.full((B,), 9, dtype=torch.int32))
            ours = {"logits": model.lm_head(outputs.answer), "q_halt": outputs.q_halt_logits}
            ours |= {"z_H": carry.z_H, "z_L": carry.z_L}
            assert_same(ours, {name: out[name] for name in ours}, "outputs")
            labels = batch["labels"].flatten().long()
            for each in (ours, out):
                loss = F.cross_entropy(each["logits"].flatten(0, 1), labels, label_smoothing=0.2)
                (loss + 0.05 * each["q_halt"].square().sum()).backward()
            for name, parameter in model.named_parameters():
                expected: Tensor = theirs.get_parameter(official_sic.their_name(name)).grad
                assert_same(parameter.grad[: len(expected)], expected, name)
            z_H, z_L = out["z_H"], out["z_L"]


@pytest.mark.skipif(official_urm.missing() is not None, reason=str(official_urm.missing()))
def test_steps_of_the_official_code_of_urm(tmp_path):
    arch = make_arch(**URM, **PUZZLE)
    generator = torch.Generator().manual_seed(3)
    with straight_sic.in_place(arch):
        weights = make_weights(arch, generator, torch.float64)
    sizes = {"seq_len": S, "vocab_size": V, "num_puzzle_identifiers": PUZZLES}
    batch = random_batch(generator)
    with official_urm.official_model(arch, batch_size=B, **sizes) as official:
        theirs = official.inner
        state = {
            name.removeprefix("L_level.").replace("H_init", "init_hidden"): w for name, w in weights.items()
        }
        assert not theirs.load_state_dict(state, strict=False).unexpected_keys
        # As its trainer saves it: compiled, in a loss head.
        saved = {f"_orig_mod.model.{name}": tensor for name, tensor in official.state_dict().items()}
        torch.save({"model_state_dict": saved}, tmp_path / "step_7.pt")
        model = HRM(arch, **sizes, dtype=torch.float64)
        read, notes = load_weights(tmp_path, {name: w.shape for name, w in model.state_dict().items()})
        model.load_state_dict(read)
        assert notes == []
        assert_same(read, weights, "read")

        official.eval()
        carry = replace_halted(model, initial_carry(model, B, S, CPU), Sequences(**batch))
        official_carry = official.initial_carry(batch)
        for step in range(3):
            model.zero_grad()
            theirs.zero_grad()
            rows = model.puzzle_emb(carry.puzzle_identifiers)
            carry, outputs = act_step(model, carry, rows, torch.full((B,), 9, dtype=torch.int32))
            official_carry, expected = official(official_carry, batch)
            ours = {"logits": model.lm_head(outputs.answer), "q_halt_logits": outputs.q_halt_logits}
            # Its Q head returns float32.
            assert_same(ours["q_halt_logits"], expected["q_halt_logits"].double(), "q_halt", 1e-6)
            assert_same(ours["logits"], expected["logits"], f"logits of step {step}")
            assert_same(carry.z_H, official_carry.current_hidden, "states")
            for each in (ours, expected):
                each["logits"].square().sum().backward()
            for name, parameter in model.named_parameters():
                if name.startswith("L_level.") or "embed" in name or name == "lm_head.weight":
                    wanted = theirs.get_parameter(name.removeprefix("L_level.")).grad
                    assert_same(parameter.grad, wanted, name)
