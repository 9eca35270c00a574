"""Random starts, noise and damping: the straight line's numbers, and evaluation of any model by keys."""

from contextlib import nullcontext
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch

from hrm.common.errors import UserError
from hrm.config.load import parse_args, settings
from hrm.config.schema import LossConfig
from hrm.data.dataset import Batch
from hrm.engine.inference import Inference
from hrm.engine.modes import EAGER
from hrm.model.act import Randomness, Sequences, act_step, initial_carry, keys_of, replace_halted
from hrm.model.hrm import HRM
from kernels.noise import draws_reference
from tests.support import official_eqr, straight_noise, straight_trm
from tests.support import straight_line as plain
from tests.support.act_cases import B, S, V, make_arch, make_model, make_weights, random_batch

CPU = torch.device("cpu")
BOTH = Randomness(starts=True, noise=0.1)
TRM: dict[str, Any] = {"share_levels": True, "gradient": "last_cycle", "q_continue": False, "L_layers": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "v1": {"puzzle_emb_ndim": 32},
    "gated": {"use_gating": True},
    "trm": TRM,
    "mixer": {**TRM, "mlp_t": True},
    "grid": {**TRM, "pos_encodings": "rope2d", "puzzle_emb_ndim": 32},
}
pytestmark = pytest.mark.usefixtures("float64")


def make(variant: str, **changes: Any) -> tuple[Any, plain.Weights, dict[str, torch.Tensor], torch.Tensor]:
    """A model with its weights, a batch, and keys of which every third is on path 0."""
    arch, generator = make_arch(**{**VARIANTS[variant], **changes}), torch.Generator().manual_seed(0)
    with straight_trm.in_place() if arch.share_levels else nullcontext():
        weights = make_weights(arch, generator, torch.float64)
    keys = torch.from_numpy(keys_of(2**32 - 5, np.arange(B) * 2**30, np.arange(B) % 3))
    return make_model(arch, weights), weights, random_batch(generator), keys


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_steps_equal_the_straight_lines(variant):
    model, weights, batch, keys = make(variant, damping=0.7)
    carry = initial_carry(model, B, S, CPU, randomness=BOTH)
    carry = replace_halted(model, carry, Sequences(**batch, keys=keys), randomness=BOTH)
    z = [straight_noise.random_start(weights[f"{x}_init"], keys, i, model.length) for i, x in enumerate("HL")]
    assert torch.equal(carry.z_H, z[0]) and torch.equal(carry.z_L, z[1]) and torch.equal(carry.keys, keys)
    weights = {name: weight.requires_grad_() for name, weight in weights.items()}
    rows = None if model.puzzle_emb is None else model.puzzle_emb(batch["puzzle_identifiers"])
    module = straight_trm if model.arch.share_levels else plain
    for step in range(2):
        model.zero_grad()
        steps = carry.steps
        carry, outputs = act_step(model, carry, rows, None, randomness=BOTH)
        model.lm_head(outputs.answer).square().sum().backward()
        with straight_noise.in_place(0.7, 0.1, keys, steps):
            *z, logits, q_halt, _ = module.forward(weights, model.arch, *z, batch["inputs"], rows)
        torch.testing.assert_close(outputs.q_halt_logits, q_halt, rtol=1e-9, atol=1e-9)
        for ours, expected in zip((carry.z_H, carry.z_L), z, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
        names = [name for name, _ in model.named_parameters() if not name.startswith("q_head.")]
        leaves = [weights[name] for name in names]
        for name, grad in zip(names, torch.autograd.grad(logits.square().sum(), leaves), strict=True):
            ours = model.get_parameter(name).grad
            bound = 1e-9 * grad.abs().max().item()
            torch.testing.assert_close(ours, grad, rtol=0, atol=bound, msg=f"{step} {name}")
        z = [state.detach() for state in z]


def test_rope2d_takes_the_grid_of_the_data():
    arch = make_arch(pos_encodings="rope2d")
    sizes: dict[str, Any] = {"vocab_size": V, "num_puzzle_identifiers": 1, "dtype": torch.float64}
    model = HRM(arch, seq_len=8, columns=4, **sizes)
    # The second cell of the first row, and the first of the second.
    angles = torch.tensor([[0, 0, 1, 0.01], [1, 0.01, 0, 0]])
    assert model.sin is not None
    torch.testing.assert_close(model.sin[[1, 4]], angles.repeat(1, 2).sin())
    with pytest.raises(UserError, match=r"rope2d: the data's 8 cells are not a square"):
        HRM(arch, seq_len=8, **sizes)


def test_eqr_is_trm_with_noise_and_damping_from_random_starts():
    trm, eqr = (settings(parse_args(["--arch", name, "data_path=x"])) for name in ("trm", "eqr"))
    changed = {key: value for key, value in eqr.items() if value != trm[key]}
    assert changed == {
        "arch.puzzle_emb_ndim": 0,
        "arch.puzzle_emb_len": 0,
        "arch.init": "random",
        "arch.noise": 0.01,
        "arch.damping": 0.95,
        "run_name": "eqr",
    }
    assert eqr["ema"] and eqr["ema_rate"] == 0.999


@pytest.mark.skipif(official_eqr.missing() is not None, reason=str(official_eqr.missing()))
@pytest.mark.parametrize(("mlp_t", "pos_encodings"), [(True, "none"), (False, "rope"), (False, "rope2d")])
def test_an_act_step_equals_that_of_the_official_code(mlp_t, pos_encodings, monkeypatch):
    model, _, batch, _ = make("trm", damping=0.9, mlp_t=mlp_t, pos_encodings=pos_encodings)
    keys, random = torch.from_numpy(keys_of(3, np.arange(B), 1)), Randomness(noise=0.1)
    carry = initial_carry(model, B, S, CPU, randomness=random)
    carry = replace_halted(model, carry, Sequences(**batch, keys=keys), randomness=random)
    calls = count(2)

    def noise(like: torch.Tensor) -> torch.Tensor:
        drawn = draws_reference(keys, carry.steps, next(calls), *like.shape[1:], truncated=False)
        return drawn.to(like.dtype)

    monkeypatch.setattr(torch, "randn_like", noise)
    arch = model.arch
    names = "hidden_size num_heads expansion H_cycles L_cycles H_layers L_layers rms_norm_eps rope_theta"
    names += " pos_encodings mlp_t halt_max_steps halt_exploration_prob"
    config = {name: getattr(arch, name) for name in names.split()}
    config |= {"batch_size": B, "seq_len": S, "vocab_size": V, "lambda_": 0.9, "noise_scale": 0.1}
    weights = dict(model.state_dict())
    if pos_encodings == "rope2d":
        # Theirs pairs the channels of a head's first half for the row and of its second for the column.
        order = torch.arange(8).view(2, 2, 2).transpose(0, 1).reshape(8)
        for name in [name for name in weights if name.endswith("qkv_proj.weight")]:
            qkv = weights[name].view(3, 4, 8, 32).clone()
            qkv[:2] = qkv[:2][:, :, order]
            weights[name] = qkv.view(96, 32)
    with official_eqr.official_model() as official:
        inner = official.InnerNetwork(official.EqRConfig(**config, forward_dtype="float64"))
        inner.load_state_dict(weights, strict=False)
        theirs, logits, q_halt = inner(official.LatentCarry(carry.z_H, carry.z_L), batch)
        logits.square().sum().backward()
    after, outputs = act_step(model, carry, None, None, randomness=random)
    ours = model.lm_head(outputs.answer)
    ours.square().sum().backward()
    for actual, expected in ((after.z_H, theirs.z_H), (after.z_L, theirs.z_L), (ours, logits)):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(outputs.q_halt_logits, q_halt, rtol=1e-6, atol=1e-6)
    for name in ("L_level.layers.1.mlp.down_proj.weight", "embed_tokens.embedding_weight"):
        expected = inner.get_parameter(name).grad
        bound = 1e-9 * expected.abs().max().item()
        torch.testing.assert_close(model.get_parameter(name).grad, expected, rtol=0, atol=bound)


def test_the_targets_pass_is_the_step_after():
    """Its q values, and so its noise, are those that the next step comes to."""
    model, _, batch, keys = make("v1", damping=0.9)
    model.requires_grad_(False)
    carry = initial_carry(model, B, S, CPU, randomness=BOTH)
    carry = replace_halted(model, carry, Sequences(**batch, keys=keys), randomness=BOTH)
    rows, least = model.puzzle_emb(carry.puzzle_identifiers), torch.full((B,), 9, dtype=torch.int32)
    carry, first = act_step(model, carry, rows, least, randomness=BOTH)
    _, second = act_step(model, carry, rows, least, randomness=BOTH)
    best = torch.maximum(second.q_halt_logits, second.q_continue_logits)
    torch.testing.assert_close(first.target_q_continue, torch.sigmoid(best), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_of_any_model_takes_paths_by_their_keys(variant):
    model, _, batch, keys = make(variant)
    arrays = Batch(*(tensor.numpy() for tensor in batch.values()))

    def answers(rows: slice, keys: Any, randomness: Any) -> tuple[torch.Tensor, torch.Tensor]:
        part = Batch(*(value[rows] for value in vars(arrays).values()))
        inference = Inference(
            model, len(part.inputs), S, mode=EAGER, loss=LossConfig(), randomness=randomness
        )
        inference.run(part, keys)
        return inference.predictions, inference.q_halt

    whole, spare = slice(0, B), slice(4, 9)
    plain_answers = answers(whole, 0, Randomness())
    for kind in (BOTH, Randomness(starts=True), Randomness(noise=0.1)):
        assert all(map(torch.equal, answers(whole, 0, kind), plain_answers))
        predictions, q_halt = answers(whole, keys.numpy(), kind)
        is_plain = keys[:, 2] == 0
        assert torch.equal(q_halt == plain_answers[1], is_plain)
        some = answers(spare, keys.numpy()[spare], kind)
        assert torch.equal(some[0], predictions[spare])
        torch.testing.assert_close(some[1], q_halt[spare], rtol=1e-6, atol=1e-6)
