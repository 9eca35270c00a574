"""The attention kernel against its reference, and the choice between it, flash-attn and PyTorch's own."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import attention
from kernels import library_attention as library
from kernels.rope import rope_tables
from tests.kernels.compare import DEVICE, DTYPES, agree, agree_in_every_tile, compiles, in_dtypes, randn

module = sys.modules["kernels.attention"]

# (B, T, heads, d): one position, odd lengths, the published one, the longest; d below a tile and between two.
SHAPES = [(1, 1, 1, 64), (2, 17, 2, 32), (1, 82, 2, 64), (2, 100, 1, 96), (1, 128, 2, 16)]


def tables(length, head_dim, dtype=torch.float32):
    return tuple(table.to(DEVICE) for table in rope_tables(length, head_dim, dtype=dtype))


def packed(B, T, heads, d, seed=0, scale=1.0):
    return {"qkv": randn(B, T, 3 * heads * d, seed=seed, scale=scale)}


@pytest.mark.parametrize(
    ("shape", "rotated", "dtype"),
    [
        *((shape, True, dtype) for shape, dtype in in_dtypes(SHAPES)),
        *((SHAPES[1], False, dtype) for dtype in DTYPES),
    ],
)
def test_output_and_gradient(shape, rotated, dtype):
    _, T, heads, d = shape
    angles = tables(T, d) if rotated else (None, None)
    agree(lambda qkv: attention(qkv, heads, *angles), packed(*shape), dtype)


@pytest.mark.parametrize(
    ("shape", "queries", "dtype"),
    [
        ((2, 82, 1, 64), 1, torch.bfloat16),
        ((2, 82, 1, 64), 5, torch.float32),
        ((2, 82, 1, 64), 40, torch.float16),
        ((1, 128, 1, 32), 1, torch.float32),
        ((1, 128, 1, 32), 40, torch.bfloat16),
    ],
)
def test_first_queries(shape, queries, dtype):
    _, T, heads, d = shape
    angles = tables(T, d)
    results = agree(lambda qkv: attention(qkv, heads, *angles, queries=queries), packed(*shape), dtype)
    assert results["0"].shape == (shape[0], queries, heads * d)
    assert not results["dqkv"][:, queries:, : heads * d].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(dtype):
    angles = tables(82, 32)
    agree(lambda qkv: attention(qkv, 2, *angles), packed(1, 82, 2, 32, scale=30.0), dtype)


@settings(max_examples=8, deadline=None)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 128),
    heads=st.integers(1, 2),
    half=st.integers(1, 40),
    data=st.data(),
)
def test_any_shape(B, T, heads, half, data):
    queries = data.draw(st.none() | st.integers(1, T))
    angles = tables(T, 2 * half, torch.float64)
    call = lambda qkv: attention(qkv, heads, *angles, queries=queries)  # noqa: E731
    agree(call, packed(B, T, heads, 2 * half, seed=T), torch.float64)


def test_strided_projections_tables_and_upstream_gradients():
    cos, sin = tables(9, 16)
    wide, turned = {"x": randn(2, 20, 110, seed=0)}, {"x": randn(96, 9, 2, seed=1)}
    agree(lambda x: attention(x[:, 1:19:2, 3:99], 2, cos, sin), wide, torch.float32)
    agree(lambda x: attention(x.permute(2, 1, 0), 2, cos, sin), turned, torch.bfloat16)
    spread = [torch.stack((table, table), dim=-1)[..., 0] for table in (cos, sin)]
    x = packed(2, 9, 2, 16)["qkv"].float().requires_grad_()
    assert torch.equal(attention(x, 2, *spread), attention(x, 2, cos, sin))
    attention(x, 2, cos, sin).sum().backward()  # An expanded scalar: every stride of dy is 0.
    attention(y := x.detach().requires_grad_(), 2, cos, sin).backward(torch.ones(2, 9, 32, device=DEVICE))
    assert torch.equal(x.grad, y.grad)


def test_gradcheck():
    cos, sin = tables(4, 4, torch.float64)
    qkv = packed(1, 4, 2, 4)["qkv"].requires_grad_()
    assert torch.autograd.gradcheck(lambda qkv: attention(qkv, 2, cos, sin), qkv, fast_mode=True)
    assert torch.autograd.gradcheck(lambda qkv: attention(qkv, 2, queries=2), qkv, fast_mode=True)


def test_operator_contract_and_compile():
    cos, sin = tables(5, 8)
    qkv = packed(2, 5, 2, 8)["qkv"].float()
    dy = torch.ones(2, 3, 16, device=DEVICE)
    torch.library.opcheck(torch.ops.hrm_kernels.attention_backward.default, (dy, qkv, 2, cos, sin))
    for angles in ((cos, sin), (None, None)):
        arguments = (qkv.clone().requires_grad_(), 2, *angles, 3)
        torch.library.opcheck(torch.ops.hrm_kernels.attention.default, arguments)
        compiles(lambda qkv, angles=angles: attention(qkv, 2, *angles), {"qkv": qkv})


def test_every_tile_that_a_measurement_may_choose():
    qkv = randn(1, 82, 3 * 32, seed=0)
    assert agree_in_every_tile(lambda qkv: attention(qkv, 1), {"qkv": qkv}, torch.bfloat16) == 6


def test_launches_cover_every_size():
    for length in range(1, module.MAX_LENGTH + 1):
        for dtype in DTYPES:
            for queries in {1, (length + 1) // 2, length}:
                for backward in (False, True):
                    choice = module.launch_choice(length, queries, 96, dtype, backward)
                    tiles = choice["TILES"] * choice["BLOCK_M"]
                    assert length <= choice["BLOCK_N"] <= max(16, 2 * length)
                    # In float32 a second tile keeps the loop a loop.
                    spare = 1 if dtype.itemsize == 2 else 2
                    assert queries <= tiles < queries + spare * choice["BLOCK_M"]
    assert module.launch_choice(82, 1, 64, torch.bfloat16, False)["BLOCK_M"] == 16


# ------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    ("length", "head_dim", "dtype", "device", "triton", "flash", "expected"),
    [
        (82, 64, torch.bfloat16, "cuda", True, True, "triton"),
        (128, 128, torch.float32, "cuda", True, True, "triton"),
        (129, 64, torch.bfloat16, "cuda", True, True, "flash"),
        (901, 64, torch.float16, "cuda", True, True, "flash"),
        (82, 136, torch.bfloat16, "cuda", True, True, "flash"),
        (82, 64, torch.bfloat16, "cuda", False, True, "flash"),
        (82, 63, torch.bfloat16, "cuda", True, True, "sdpa"),
        (901, 64, torch.bfloat16, "cuda", True, False, "sdpa"),
        (901, 64, torch.float32, "cuda", True, True, "sdpa"),
        (901, 66, torch.bfloat16, "cuda", True, True, "sdpa"),
        (901, 264, torch.bfloat16, "cuda", True, True, "sdpa"),
        (82, 64, torch.bfloat16, "cpu", False, True, "sdpa"),
    ],
)
def test_choices_of_auto(length, head_dim, dtype, device, triton, flash, expected):
    chosen = module.attention_backend(length, head_dim, dtype, device, triton=triton, flash_attn=flash)
    assert chosen == expected


@pytest.fixture
def taken(monkeypatch):
    """The paths that calls take, in order."""
    calls = []
    for place, name in (
        (module, "_attention"),
        (library, "flash"),
        (library, "sdpa"),
        (module, "checked_rope"),
        (library, "rope_reference"),
    ):
        inner = getattr(place, name)

        def recording(*args, name=name, inner=inner):
            calls.append(name)
            return inner(*args)

        monkeypatch.setattr(place, name, recording)
    return calls


def test_the_choice_is_carried_out(taken, monkeypatch):
    monkeypatch.setattr(library, "FLASH2", None)
    monkeypatch.setattr(library, "FLASH3", None)
    short, long = packed(1, 17, 2, 8)["qkv"].float(), packed(1, 130, 2, 8)["qkv"].float()
    attention(short, 2, *tables(17, 8))
    attention(long, 2, *tables(130, 8))
    attention(short, 2, *tables(17, 8), backend="sdpa")
    kernels.set_backend("reference")
    attention(short, 2, *tables(17, 8))
    attention(short, 2, *tables(17, 8), backend="triton")
    rotated = "checked_rope"
    assert taken == [
        *("_attention", rotated, "sdpa", rotated, "sdpa"),
        *("rope_reference", "sdpa", "_attention"),
    ]


@pytest.mark.parametrize("queries", [None, 1])
def test_longer_sequences_rotate_in_the_kernel(queries):
    cos, sin = tables(130, 8)
    agree(lambda qkv: attention(qkv, 2, cos, sin, queries), packed(1, 130, 2, 8), torch.float32)


def stand_in(name, version, returned):
    """A module with flash-attn's function: it records its operands' shapes and computes with PyTorch."""
    package = ModuleType(name)
    package.__version__ = version
    package.calls, package.deterministic = [], []

    def flash_attn_func(q, k, v, *, causal, deterministic):
        assert causal is False
        package.deterministic.append(deterministic)
        package.calls.append(tuple(q.shape))
        o = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        return returned(o)

    package.flash_attn_func = flash_attn_func
    return package


@pytest.fixture
def installed(monkeypatch):
    """Puts stand-ins where the packages would be, and lets a CPU tensor pass for one they take."""

    def install(*packages):
        for name in ("flash_attn", "flash_attn_interface"):
            found = next((package for package in packages if package.__name__ == name), None)
            monkeypatch.setitem(sys.modules, name, found)
        monkeypatch.setattr(library, "FLASH3", library._find()[0])
        monkeypatch.setattr(library, "FLASH2", library._find()[1])

    monkeypatch.setattr(library, "flash_limit", lambda *_: None)
    return install


@pytest.mark.parametrize(
    ("package", "dtype"),
    [
        (("flash_attn", "2.6.3", lambda o: o), torch.float32),
        (("flash_attn_interface", "3.0.0", lambda o: o), torch.float16),
        (("flash_attn_interface", "3.0.0", lambda o: (o, None)), torch.bfloat16),
    ],
)
def test_flash_handles_longer_sequences(installed, package, dtype):
    flash = stand_in(*package)
    installed(flash)
    cos, sin = tables(130, 8)
    agree(lambda qkv: attention(qkv, 2, cos, sin, 5), packed(1, 130, 2, 8), dtype)
    assert flash.calls == [(1, 5, 2, 8)]
    agree(lambda qkv: attention(qkv, 2, cos, sin), packed(1, 130, 2, 8), dtype)
    assert flash.calls[1:] == [(1, 130, 2, 8)]
    kernels.set_backend("auto")
    short = packed(1, 17, 2, 8)["qkv"].to(dtype)
    named = attention(short, 2, backend="flash")
    assert flash.calls[2:] == [(1, 17, 2, 8)]
    # The stand-in rounds in between, PyTorch's own on a CPU once.
    torch.testing.assert_close(named, attention(short, 2, backend="sdpa"), rtol=0, atol=0.01)
    # As these tests run; without PyTorch's setting its backward may add in any order.
    assert flash.deterministic == [True] * 3
    torch.use_deterministic_algorithms(False)
    attention(short, 2, backend="flash")
    assert flash.deterministic[3:] == [False]


@pytest.mark.parametrize(("capability", "version"), [((9, 0), 3), ((8, 0), 2), ((12, 0), 2)])
def test_flash_of_the_gpu_at_hand(installed, monkeypatch, capability, version):
    second = stand_in("flash_attn", "2.8.1", lambda o: o)
    third = stand_in("flash_attn_interface", "3.0.0", lambda o: o)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    installed(second, third)
    attention(packed(1, 130, 2, 8)["qkv"].float(), 2)
    assert (len(third.calls), len(second.calls)) == ((1, 0) if version == 3 else (0, 1))


def test_old_flash_is_not_taken(installed):
    installed(stand_in("flash_attn", "2.5.9", lambda o: o))
    assert not library.has_flash()
    with pytest.raises(
        RuntimeError, match=r"'flash' was requested, but flash-attn 2\.6 or later is not inst"
    ):
        attention(torch.zeros(1, 9, 24, device=DEVICE), 1, backend="flash")


def test_a_selected_backend_reports_a_missing_package(monkeypatch):
    long = torch.zeros(1, 129, 24, device=DEVICE)
    with pytest.raises(
        RuntimeError, match=r"'triton' was requested, but .*at most 128 positions, got 129; use"
    ):
        attention(long, 1, backend="triton")
    with pytest.raises(RuntimeError, match=r"an even head_dim of at most 128, got 136; use 'auto'"):
        attention(torch.zeros(1, 9, 3 * 136, device=DEVICE), 1, backend="triton")
    with pytest.raises(RuntimeError, match=r"an even head_dim of at most 128, got 5; use 'auto'"):
        attention(torch.zeros(1, 9, 15, device=DEVICE), 1, backend="triton")
    monkeypatch.setattr(library, "FLASH2", lambda *_, **__: None)
    with pytest.raises(
        RuntimeError, match=r"'flash' was requested, but it takes float16 and bfloat16 on CUDA"
    ):
        attention(long, 1, backend="flash")
    assert "steps of 8, got 66" in library.flash_limit(66, torch.float16, "cuda")
    monkeypatch.setattr(kernels.backend, "INTERPRETED", False)
    monkeypatch.setattr(kernels.backend, "triton", None)
    with pytest.raises(RuntimeError, match=r"Triton is not installed \(pip install triton\); use 'auto'"):
        attention(long[:, :9], 1, backend="triton")
    with pytest.raises(ValueError, match=r"backend must be one of auto, triton, flash, sdpa, got 'cudnn'"):
        attention(long, 1, backend="cudnn")


def test_rotation_is_refused_where_it_cannot_be():
    qkv = torch.zeros(1, 3, 15, device=DEVICE)
    with pytest.raises(ValueError, match=r"attention: cos and sin need an even D/num_heads to rotate, got 5"):
        attention(qkv, 1, torch.zeros(3, 5, device=DEVICE), torch.zeros(3, 5, device=DEVICE))
    with pytest.raises(ValueError, match=r"attention: sin must have shape \(3, 4\), got \(2, 4\)"):
        attention(torch.zeros(1, 3, 12, device=DEVICE), 1, tables(3, 4)[0], tables(2, 4)[1])
