"""Random numbers by counter: the generator, the distributions, and kernels that draw the reference's bits."""

import math

import pytest
import torch

from kernels import noisy_update, random_start
from kernels.noise import (
    draws_reference,
    launch_choice,
    noisy_update_reference,
    normal_reference,
    philox_reference,
    random_start_reference,
)
from tests.kernels.compare import DEVICE, DTYPES, agree, compiles, in_dtypes, randn

CASES = [
    *in_dtypes([(1, 1, 4), (3, 7, 32), (2, 5, 33), (2, 3, 1), (1, 2, 1100)]),
    ((3, 7, 32), torch.float64),
]


def keys_of(B: int, paths: int = 3) -> torch.Tensor:
    """Keys with all bits in use; every third sequence is on path 0."""
    words = torch.arange(B)[:, None] * torch.tensor([0x9E3779B9, 0x85EBCA6B, 1])
    words = words % torch.tensor([2**32, 2**32, paths]) + torch.tensor([0xDEADBEEF, 0xFFFFFFF0, 0])
    return (words % 2**32).to(torch.uint32).view(torch.int32).contiguous().to(DEVICE)


def steps_of(B: int) -> torch.Tensor:
    return torch.arange(B, dtype=torch.int32, device=DEVICE) * 5


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_words_of_philox(counter, key, expected):
    """The published vectors of Random123."""
    words = philox_reference(
        tuple(torch.tensor([word]) for word in counter), (torch.tensor([key[0]]), torch.tensor([key[1]]))
    )
    assert " ".join(f"{word.item():08x}" for word in words) == expected


@pytest.mark.parametrize("truncated", [False, True])
def test_every_probability_gets_its_quantile(truncated):
    magnitudes = torch.cat([torch.arange(5000), torch.arange(0, 2**23, 997), 2**23 - 1 - torch.arange(5000)])
    z = normal_reference(magnitudes << 8, truncated).double()
    u = (magnitudes.double() + 0.5) * 2.0**-23
    if truncated:
        within = math.erf(math.sqrt(2))
        expected = torch.special.ndtri(0.5 + 0.5 * u * within)
        variance = 1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / within
        expected = expected / math.sqrt(variance)
    else:
        expected = -torch.special.ndtri(0.5 * u)
    torch.testing.assert_close(z, expected, rtol=6e-6, atol=1e-7)
    assert torch.equal(normal_reference((magnitudes << 8) + 2**31, truncated).double(), -z)


@pytest.mark.parametrize("truncated", [False, True])
def test_draws_are_normal_and_independent(truncated):
    keys = torch.stack([torch.full((64,), 7), torch.arange(64), torch.ones(64)], dim=1).int()
    draws = [draws_reference(keys, 0, call, 64, 64, truncated=truncated).double() for call in (0, 1)]
    n = draws[0].numel()
    for x in draws:
        assert abs(x.mean().item()) < 4 / math.sqrt(n)
        assert abs(x.square().mean().item() - 1) < 4 * math.sqrt(2 / n)
        kurtosis = x.pow(4).mean().item()
        expected = 3.0 if not truncated else 2.366
        assert abs(kurtosis - expected) < 0.05
    pairs = [(draws[0], draws[1]), (draws[0][1:], draws[0][:-1]), (draws[0][:, 1:], draws[0][:, :-1])]
    pairs += [(draws[0][..., 16:], draws[0][..., :-16]), (draws[0][..., 1:], draws[0][..., :-1])]
    for x, y in pairs:
        assert abs((x * y).mean().item()) < 4 / math.sqrt(x.numel())


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_the_update_draws_the_bits_of_the_reference(shape, dtype):
    f, z = (randn(*shape, seed=seed).to(dtype) for seed in (0, 1))
    keys, steps = keys_of(shape[0]), steps_of(shape[0])
    rstd = randn(*shape[:2], seed=2).abs().to(torch.promote_types(dtype, torch.float32))
    for damping, noise, factor in ((0.95, 0.01, None), (1.0, 0.5, None), (0.3, 0.0, rstd), (1.0, 2.0, rstd)):
        used = (keys, steps) if noise else (None, None)
        ours = noisy_update(f, z, damping=damping, noise=noise, keys=keys, steps=steps, call=9, rstd=factor)
        expected = noisy_update_reference(f, factor, z, *used, 9, damping, noise)
        assert torch.equal(ours, expected), (damping, noise)
        plain = noisy_update_reference(f, factor, z, None, None, 9, damping, 0.0)
        assert torch.equal(ours[0], plain[0]) and (
            not noise or len(f) == 1 or not torch.equal(ours[1], plain[1])
        )


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_the_start_draws_the_bits_of_the_reference(shape, dtype):
    z, init = randn(*shape, seed=0).to(dtype), randn(shape[2], seed=1).float()
    keys, begins = keys_of(shape[0]), torch.arange(shape[0], device=DEVICE) < 2
    ours = random_start(z, begins, init, keys, 1)
    assert torch.equal(ours, random_start_reference(z, begins, init, keys, 1))
    assert torch.equal(ours[0], init.to(dtype).expand(shape[1:]))
    assert torch.equal(ours[2:], z[2:])


def test_a_number_depends_only_on_key_and_position():
    keys, steps = keys_of(6, paths=4) + torch.tensor([0, 0, 1], dtype=torch.int32, device=DEVICE), steps_of(6)
    f = torch.zeros(6, 5, 12, device=DEVICE)
    whole = noisy_update(f, f, noise=1.0, keys=keys, steps=steps, call=3)
    some = torch.tensor([4, 1], device=DEVICE)
    part = noisy_update(
        f[some, :2], f[some, :2], noise=1.0, keys=keys[some].contiguous(), steps=steps[some], call=3
    )
    assert torch.equal(part, whole[some, :2])
    for word in range(3):
        other = keys.clone()
        other[:, word] += 1
        assert not (noisy_update(f, f, noise=1.0, keys=other, steps=steps, call=3) == whole).any()
    assert not (noisy_update(f, f, noise=1.0, keys=keys, steps=steps + 1, call=3) == whole).any()
    assert not (noisy_update(f, f, noise=1.0, keys=keys, steps=steps, call=4) == whole).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_and_gradients(dtype):
    keys, steps = keys_of(3), steps_of(3)
    inputs = {"f": randn(3, 4, 24, seed=0), "z": randn(3, 4, 24, seed=1)}
    agree(
        lambda f, z: noisy_update(f, z, damping=0.6, noise=0.2, keys=keys, steps=steps, call=2), inputs, dtype
    )
    sliced = {"f": randn(3, 2, 24, seed=0), "z": randn(3, 4, 24, seed=1)}
    agree(lambda f, z: noisy_update(f, z[:, :2], damping=0.6), sliced, dtype)


def test_operator_contract_and_compile():
    keys, steps = keys_of(3), steps_of(3)
    f, z = (randn(3, 2, 8, seed=seed).float() for seed in (0, 1))
    ops = torch.ops.hrm_kernels
    for rstd, noisy in ((None, True), (torch.ones(3, 2, device=DEVICE), False)):
        given = (keys, steps) if noisy else (None, None)
        arguments = (f.clone().requires_grad_(rstd is None), rstd, z.clone().requires_grad_(rstd is None))
        torch.library.opcheck(ops.noisy_update.default, (*arguments, *given, 1, 0.9, 0.1))
    begins = torch.tensor([True, False, True], device=DEVICE)
    torch.library.opcheck(ops.random_start.default, (z, begins, f[0, 0], keys, 0))
    compiles(
        lambda f, z: noisy_update(f, z, damping=0.9, noise=0.1, keys=keys, steps=steps), {"f": f, "z": z}
    )


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the bits are promised for a CPU")
def test_the_compiled_reference_draws_the_same_bits():
    keys, steps = keys_of(3), steps_of(3)
    f, z = (randn(3, 5, 40, seed=seed).float() for seed in (0, 1))
    torch._dynamo.reset()
    compiled = torch.compile(noisy_update_reference, fullgraph=True)
    start = torch.compile(random_start_reference, fullgraph=True)
    begins = torch.tensor([True, True, False])
    assert torch.equal(
        start(z, begins, f[0, 0], keys, 1), random_start_reference(z, begins, f[0, 0], keys, 1)
    )
    arguments = (f, None, z, keys, steps, 4, 0.95, 0.01)
    assert torch.equal(compiled(*arguments), noisy_update_reference(*arguments))


def test_arguments_are_checked():
    z = torch.zeros(2, 3, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"noisy_update: keys must have shape \(2, 3\), got \(2, 2\)"):
        noisy_update(z, z, noise=1.0, keys=keys_of(2)[:, :2], steps=steps_of(2))
    with pytest.raises(TypeError, match=r"noisy_update: keys must be contiguous int32 on"):
        noisy_update(z, z, noise=1.0, keys=keys_of(2).long(), steps=steps_of(2))
    with pytest.raises(ValueError, match=r"noisy_update: keys without steps"):
        noisy_update(z, z, noise=1.0, keys=keys_of(2))
    with pytest.raises(ValueError, match=r"noisy_update: z must have shape \(2, 3, 4\), got \(2, 2, 4\)"):
        noisy_update(z, z[:, :2])
    with pytest.raises(ValueError, match=r"random_start: begins must have shape \(2,\), got \(3,\)"):
        random_start(z, torch.zeros(3, dtype=torch.bool, device=DEVICE), z[0, 0], keys_of(2), 0)


def test_launches_cover_every_width():
    for width in (1, 4, 33, 512, 4096):
        choice = launch_choice(width)
        assert 64 <= choice["BLOCK_M"] * choice["BLOCK_Q"] <= 256
