"""Random starts, noise and damping: the straight line's numbers, and evaluation of any model by keys."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from hrm.config.schema import LossConfig
from hrm.data.dataset import Batch
from hrm.engine.inference import Inference
from hrm.engine.modes import EAGER
from hrm.model.act import Randomness, Sequences, act_step, initial_carry, keys_of, replace_halted
from tests.support import straight_line as plain
from tests.support import straight_noise, straight_trm
from tests.support.act_cases import B, S, make_arch, make_model, make_weights, random_batch

CPU = torch.device("cpu")
BOTH = Randomness(starts=True, noise=0.1)
TRM: dict[str, Any] = {"share_levels": True, "gradient": "last_cycle", "q_continue": False, "L_layers": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "v1": {"puzzle_emb_ndim": 32},
    "gated": {"use_gating": True},
    "trm": TRM,
    "mixer": {**TRM, "mlp_t": True},
}


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def make(variant: str, **changes: Any) -> tuple[Any, plain.Weights, dict[str, torch.Tensor], torch.Tensor]:
    """A model with its weights, a batch, and keys of which every third is on path 0."""
    arch, generator = make_arch(**VARIANTS[variant], **changes), torch.Generator().manual_seed(0)
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
