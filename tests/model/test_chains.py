"""Several chains of a sequence against the straight line: the best one learns, each keeps its z_L."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from hrm.config.load import parse_args
from hrm.config.messages import ConfigError
from hrm.config.schema import LossConfig
from hrm.model.act import PLAIN, Randomness, Sequences, initial_carry, keys_of, replace_halted
from hrm.model.chains import chains_step
from hrm.model.hrm import HRM
from hrm.model.losses import act_loss
from tests.support import straight_line as plain
from tests.support import straight_noise, straight_trm
from tests.support.act_cases import PUZZLES, SOFTMAX, B, S, V, draw_often, make_arch, make_model, make_weights
from tests.support.act_cases import random_batch as batch_of

CPU, K = torch.device("cpu"), 3
TRM: dict[str, Any] = {"share_levels": True, "gradient": "last_cycle", "q_continue": False, "L_layers": 2}
# Architecture and noise. Exploration ends no sequence before its second step.
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "v1": ({"puzzle_emb_ndim": 32}, 0.0),
    "trm, noise and damping": ({**TRM, "damping": 0.8}, 0.1),
}
pytestmark = pytest.mark.usefixtures("float64")


def straight_step(
    w: plain.Weights, arch: Any, carry: plain.Carry, batch: plain.Batch, least: torch.Tensor, noise: float
) -> tuple[dict[str, Any], torch.Tensor]:
    """One training step of K chains, written plainly; z_L is (B, K, T, D). Returns the winners too."""
    w = dict(w)
    starts = torch.stack([w["L_init"], *w.pop("L_chains")])
    z_L = torch.where(carry["halted"][:, None, None, None], starts[:, None], carry["z_L"])
    keys = torch.where(carry["halted"][:, None], batch["keys"], carry["keys"])
    batch = {name: batch[name] for name in ("inputs", "labels", "puzzle_identifiers")}
    carry = plain.replace_halted(w, {**carry, "z_L": carry["z_H"]}, batch)
    rows = w[plain.PUZZLE_TABLE][carry["puzzle_identifiers"].long()] if arch.puzzle_emb_ndim else None

    def random(chain: Any) -> Any:
        chosen = torch.cat([keys[:, :2], keys[:, 2:] + torch.as_tensor(chain).view(-1, 1)], 1).int()
        if not noise and arch.damping == 1:
            return nullcontext()
        return straight_noise.in_place(arch.damping, noise, chosen, carry["steps"])

    losses, states = [], []
    for k in range(K):
        with torch.no_grad(), random(k):
            _, state, logits, *_ = plain.forward(w, arch, carry["z_H"], z_L[:, k], carry["inputs"], rows)
        valid = (carry["labels"] != plain.IGNORE).sum(-1).clamp(min=1)
        losses.append(plain.cross_entropy(logits, carry["labels"], SOFTMAX).sum(-1) / valid)
        states.append(state)
    winners, each = torch.stack(losses).argmin(0), torch.arange(B)
    with random(winners):
        won = {**carry, "z_L": z_L[each, winners]}
        result = plain.act_training_step(w, arch, won, batch, least, SOFTMAX, B)
    kept = torch.stack(states, 1)
    kept[each, winners] = result["carry"]["z_L"]
    result["carry"] |= {"z_L": kept, "keys": keys}
    return result, winners


@pytest.mark.parametrize("case", CASES)
def test_steps_equal_the_straight_lines(case):
    changes, noise = CASES[case]
    arch, generator = make_arch(chains=K, **changes), torch.Generator().manual_seed(0)
    randomness = Randomness(noise=noise) if noise else PLAIN
    with straight_trm.in_place() if arch.share_levels else nullcontext():
        weights = make_weights(arch, generator, torch.float64)
        weights["L_chains"] = torch.randn(K - 1, arch.hidden_size, generator=generator)
        model = make_model(arch, weights)
        carry = initial_carry(model, B, S, CPU, randomness=randomness, chains=K)
        assert carry.z_L.shape == (B, K, model.length, arch.hidden_size)
        theirs = {**carry._asdict(), "keys": torch.zeros(B, 3, dtype=torch.int32)}
        seen = set[int]()
        for step in range(5):
            keys = torch.from_numpy(keys_of(7, step * B + np.arange(B), 1))
            batch, least = {**batch_of(generator), "keys": keys}, draw_often(arch, generator)
            result, winners = straight_step(weights, arch, theirs, batch, least, noise)
            theirs = result["carry"]
            model.zero_grad()
            carry = replace_halted(model, carry, Sequences(**batch), randomness=randomness)
            rows = None
            if model.puzzle_emb is not None:
                rows = model.puzzle_emb(carry.puzzle_identifiers).requires_grad_()
            carry, outputs, ours = chains_step(
                model, LossConfig(SOFTMAX), carry, rows, least, sees_gates=False, randomness=randomness
            )
            loss, metrics = act_loss(LossConfig(SOFTMAX), model.lm_head, carry, outputs)
            (loss / B).backward()
            assert torch.equal(ours, winners)
            seen |= set(winners.tolist())
            torch.testing.assert_close(loss.detach(), result["loss"], rtol=1e-9, atol=1e-9)
            for name in ("z_H", "z_L", "steps", "halted", "labels"):
                torch.testing.assert_close(getattr(carry, name), theirs[name], rtol=1e-9, atol=1e-9)
            for name, grad in result["gradients"].items():
                if name in dict(model.named_parameters()):
                    bound = 1e-9 * grad.abs().max().item()
                    torch.testing.assert_close(model.get_parameter(name).grad, grad, rtol=0, atol=bound)
            assert metrics["count"] == result["metrics"]["count"]
    assert seen == set(range(K))
    assert 0 < theirs["halted"].sum() < B


def test_no_chain_has_an_advantage_at_the_start():
    sizes: dict[str, Any] = {"vocab_size": V, "seq_len": S, "num_puzzle_identifiers": PUZZLES}
    one, many = (HRM(make_arch(chains=chains), **sizes) for chains in (1, 5))
    for name, tensor in one.state_dict().items():
        assert torch.equal(many.state_dict()[name], tensor), name
    starts = many.chain_starts()
    assert torch.equal(starts[0], one.L_init) and starts.shape == (5, 32)
    _, _, right = torch.linalg.svd(many.L_level.layers[0].mlp.gate_up_proj.weight.detach())
    lengths = (starts @ right[:10].T).norm(dim=1)
    torch.testing.assert_close(lengths, lengths[:1].expand(5))
    # Rotations keep the norms of what was drawn, which differ.
    assert starts.norm(dim=1).std() > 0.01
    assert len(starts.unique(dim=0)) == 5


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["arch.init=random"], "arch.chains=2 gives each chain its own initial state"),
        (
            ["arch.hidden_size=8", "arch.num_heads=1"],
            "arch.hidden_size=8 is too narrow for the initial states",
        ),
    ],
)
def test_invalid_chains_are_refused(words, text):
    with pytest.raises(ConfigError, match=text):
        parse_args(["data_path=x", "arch.chains=2", *words])
