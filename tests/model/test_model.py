"""Names, initial values and exact identities of the model; its mathematics is in test_straight_line.py."""

import pytest
import torch

from hrm.config.load import ArchConfig
from hrm.model.hrm import HRM

SMALL = {"hidden_size": 32, "num_heads": 4, "H_layers": 2, "L_layers": 3, "expansion": 2.0}


def make(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> HRM:
    arch = ArchConfig(**{**SMALL, **changes})
    return HRM(arch, vocab_size=6, seq_len=9, num_puzzle_identifiers=5, dtype=dtype, seed=seed)


def states(model: HRM, batch: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, model.length, model.arch.hidden_size)
    return [torch.randn(shape, generator=generator, dtype=model.dtype) for _ in range(3)]


def test_state_dict_has_the_official_names_and_shapes():
    shapes = {
        name: tuple(t.shape)
        for name, t in make(use_gating=True, pos_encodings="learned").state_dict().items()
    }
    expected = {
        "embed_tokens.embedding_weight": (6, 32),
        "embed_pos.embedding_weight": (10, 32),
        "puzzle_emb.weights": (5, 32),
        "lm_head.weight": (6, 32),
        "q_head.weight": (2, 32),
        "q_head.bias": (2,),
        "H_init": (32,),
        "L_init": (32,),
    }
    for level, layers in (("H", 2), ("L", 3)):
        for i in range(layers):
            block = f"{level}_level.layers.{i}"
            expected[f"{block}.self_attn.qkv_proj.weight"] = (96, 32)
            expected[f"{block}.self_attn.o_proj.weight"] = (32, 32)
            expected[f"{block}.mlp.gate_up_proj.weight"] = (512, 32)
            expected[f"{block}.mlp.down_proj.weight"] = (32, 256)
        gate = f"{level}_level.gating_network.gate_proj"
        expected |= {f"{gate}.0.weight": (8, 96), f"{gate}.0.bias": (8,)}
        expected |= {f"{gate}.2.weight": (96, 8), f"{gate}.2.bias": (96,)}
    assert shapes == expected


@pytest.mark.slow
def test_v1_of_the_published_size_has_27_million_parameters():
    model = HRM(ArchConfig(), vocab_size=11, seq_len=81, num_puzzle_identifiers=1)
    # Per block 3DD + DD + 2DI + ID with D = 512, I = 1536; eight blocks, embedding, two heads.
    assert sum(p.numel() for p in model.parameters()) == 8 * (4 * 512**2 + 3 * 512 * 1536) + 22 * 512 + 1026
    assert model.length == 82


def test_gated_and_v1_of_one_seed_share_all_other_weights():
    v1, gated, other = make().state_dict(), make(use_gating=True).state_dict(), make(seed=1).state_dict()
    assert all(torch.equal(v1[name], gated[name]) for name in v1)
    assert any(".gating_network." in name for name in gated.keys() - v1.keys())
    assert not torch.equal(v1["lm_head.weight"], other["lm_head.weight"])


def test_initial_values_of_heads_gates_and_states():
    model = make(use_gating=True)
    weights = model.state_dict()
    assert not weights["q_head.weight"].any() and not weights["puzzle_emb.weights"].any()
    assert torch.equal(weights["q_head.bias"], torch.tensor([-5.0, -5.0]))
    for level in "HL":
        gate = f"{level}_level.gating_network.gate_proj"
        assert torch.equal(weights[f"{gate}.2.bias"], torch.full((96,), -2.2))
        assert not weights[f"{gate}.0.bias"].any()
    assert 0.7 < weights["H_init"].std() < 1.3 and not torch.equal(weights["H_init"], weights["L_init"])
    halt, go_on = model.q_values(states(model)[0])
    assert torch.equal(halt, torch.full((3,), -5.0)) and torch.equal(go_on, halt)


def test_closed_gates_silence_and_open_gates_sum_the_sources():
    model = make(use_gating=True, dtype=torch.float64).double()
    z, o, x = states(model)
    with torch.no_grad():
        for bias, expected in ((-700.0, torch.zeros_like(z)), (700.0, z + o + x)):
            model.L_level.gating_network.gate_proj[2].bias.fill_(bias)
            combined = model.L_level.combine(z, o, x, None, None)
            torch.testing.assert_close(combined, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use_gating", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_first_position_equals_that_of_a_full_pass(use_gating, layers):
    model = make(use_gating=use_gating, H_layers=layers, dtype=torch.float64).double()
    z_H, z_L, e = states(model)
    with torch.no_grad():
        whole_H, whole_L = model.recur(z_H, z_L, e)
        first_H, first_L = model.recur(z_H, z_L, e, queries=1)
    assert first_H.shape == (3, 1, 32)
    torch.testing.assert_close(first_H, whole_H[:, :1], rtol=1e-12, atol=1e-12)
    assert torch.equal(first_L, whole_L)


def test_gradient_flows_through_the_last_updates_only():
    """With respect to e: the last L-update's alone, the earlier states taken as constants."""
    model = make(dtype=torch.float64).double()
    z_H, z_L, e = states(model)
    e.requires_grad_()
    model.recur(z_H, z_L, e)[0].sum().backward()
    with torch.no_grad():
        x = e.detach()
        for _ in range(2):
            z_L = model.L_level(z_L, z_H, x, model.cos, model.sin)
        z_H = model.H_level(z_H, z_L, None, model.cos, model.sin)
        z_L = model.L_level(z_L, z_H, x, model.cos, model.sin)
    x = e.detach().requires_grad_()
    z_L = model.L_level(z_L, z_H, x, model.cos, model.sin)
    model.H_level(z_H, z_L, None, model.cos, model.sin).sum().backward()
    assert e.grad.abs().max() > 1e-3
    torch.testing.assert_close(e.grad, x.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("ndim", "tokens"), [(0, 0), (32, 1), (20, 1), (80, 3)])
def test_puzzle_rows_come_first_padded_with_zeros(ndim, tokens):
    model = make(puzzle_emb_ndim=ndim)
    rows = torch.arange(1.0, 2 * ndim + 1).view(2, ndim) if ndim else None
    e = model.embed(torch.ones(2, 9, dtype=torch.int32), rows)
    assert e.shape == (2, tokens + 9, 32) and model.length == tokens + 9
    assert torch.equal(e[:, tokens:], (32**0.5 * model.embed_tokens.embedding_weight[1]).expand(2, 9, 32))
    if rows is not None:
        flat = e[:, :tokens].flatten(1)
        torch.testing.assert_close(flat[:, :ndim], 32**0.5 * rows)
        assert not flat[:, ndim:].any()


def test_learned_positions_keep_the_variance():
    model = make(pos_encodings="learned")
    e = model.embed(torch.zeros(1, 9, dtype=torch.int32), torch.zeros(1, 32))
    expected = (
        32**0.5 * 0.5**0.5 * (model.embed_tokens.embedding_weight[0] + model.embed_pos.embedding_weight[4])
    )
    torch.testing.assert_close(e[0, 4], expected)
    assert model.cos is None


def test_bfloat16_states_stay_close_to_float32():
    narrow, wide = make(dtype=torch.bfloat16, use_gating=True), make(use_gating=True)
    z_H, z_L, e = states(wide)
    with torch.no_grad():
        z, _ = narrow.recur(z_H.bfloat16(), z_L.bfloat16(), e.bfloat16())
        expected, _ = wide.recur(z_H, z_L, e)
        assert z.dtype == torch.bfloat16 and narrow.logits(z).dtype == torch.bfloat16
        assert narrow.q_values(z)[0].dtype == torch.float32
    error = (z.float() - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.05
