"""Counter-based random numbers, fused into the two operations of a recurrence that use them.

    update:  y = (1 - damping) z + damping f + noise eps          eps normal
    start: y = eps where a sequence begins, else z eps truncated normal of deviation 1

eps of an element is a function of seven integers: Philox 4x32-10 (Salmon et al. 2011) under the key
(seed, example) at the counter (element, call, ACT step, path). One counter gives elements q, Q + q, 2Q + q
and 3Q + q of a token, Q = ceil(D / 4); counters of consecutive tokens are consecutive. So the generator is
stateless, and numbers depend neither on the batch nor on the launch. Path 0 has no noise and the given
initial state.

A word gives a sign and the probability of a smaller magnitude, 23 bits; a polynomial in sqrt(-log(1 - x^2))
inverts the normal distribution (relative error below 6e-6; the largest magnitude is 5.4). It takes only
operations that IEEE 754 rounds correctly: +, *, sqrt, conversion and the exponent's bits. Kernels compile
without fused multiply-add, so their numbers are identical to those of the reference, eager or compiled for a
CPU. A reference compiled for CUDA may use fused multiply-add.

Backward of the update: df = damping dy, dz = (1 - damping) dy. Nothing is saved.
Bytes, in elements for N = B * T * D: 2N read and N written; with damping 1, N read.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from kernels.backend import jit, launch, tl, triton, use_triton, wide
from kernels.checks import accumulate_dtype, check_floating, check_shape

# Number of words in a sequence's key: seed, example, path.
KEY_WORDS = 3
_ROUNDS, _WORD = 10, 0xFFFFFFFF
_MULTIPLIERS, _INCREMENTS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
# log(1 + x) / x between sqrt(1/2) and sqrt(2), and z / x by sqrt(-log(1 - x^2)) - 2 for x = erf(z / sqrt(2)),
# fitted in float64 for a uniform relative error.
_LOG = (
    1.0, -0.49999988079071045, 0.3333418667316437, -0.25002071261405945, 0.19956830143928528,
    -0.16562429070472717, 0.14952333271503448, -0.14366620779037476, 0.08721901476383209,
)  # fmt: skip
_INVERSE = (
    2.6286988258361816, 1.2917826747894287, 0.1598508507013321, -0.10019790381193161, 0.017725186422467232,
    0.01710359938442707, -0.007398262619972229, -0.002991052344441414, 0.0017132197972387075,
    0.0003633027372416109, -0.00021774055494461209, -2.1481408111867495e-05, 1.1705411452567205e-05,
)  # fmt: skip
# Probability within two standard deviations, and the factor that rescales the truncated normal to 1.
_WITHIN = math.erf(math.sqrt(2))
_WIDEN = 1 / math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / _WITHIN)


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product, computed in half words to stay within int64."""
    low = (word & 0xFFFF) * multiplier
    high = (word >> 16) * multiplier + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) + (low & 0xFFFF)


def philox_reference(
    counter: tuple[Tensor, Any, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10: the four output words of each counter. Words are int64 below 2^32."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(_ROUNDS):
        (high0, low0), (high1, low1) = _product(c0, _MULTIPLIERS[0]), _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ (c1 ^ k0), low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _INCREMENTS[0]) & _WORD, (k1 + _INCREMENTS[1]) & _WORD
    return c0, c1, c2, c3


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient
    return value


def normal_reference(words: Tensor, truncated: bool) -> Tensor:
    """Normal values in float32 from words; truncated: at two standard deviations, then rescaled to one."""
    u = (((words >> 8) & 0x7FFFFF).to(torch.float32) + 0.5) * 2.0**-23
    x = u * _WITHIN if truncated else 1.0 - u
    t = 1.0 - x if truncated else u
    y = t * (2.0 - t)
    bits = y.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    w = -(exponent.to(torch.float32) * math.log(2) + f * _polynomial(_LOG, f))
    # On a CPU PyTorch uses MKL's float32 square roots, which may be wrong in the last bit; rounded float64
    # roots are not. Apple GPUs have no float64.
    exact = torch.float32 if w.device.type == "mps" else torch.float64
    root = w.clamp(min=0.0).to(exact).sqrt().to(torch.float32)
    z = x * _polynomial(_INVERSE, root - 2.0)
    if truncated:
        z = z * _WIDEN
    return torch.where(words > 0x7FFFFFFF, -z, z)


def draws_reference(
    keys: Tensor, steps: Tensor | int, call: int, length: int, width: int, *, truncated: bool
) -> Tensor:
    """The normal values of a call, (B, length, width) float32.

    keys: (B, 3) int32, the bits of seed, example and path. steps: (B,) integers, ACT steps.
    """
    quarter = -(-width // 4)
    seed, example, path = ((keys[:, word].long() & _WORD)[:, None] for word in range(KEY_WORDS))
    element = torch.arange(length * quarter, device=keys.device)[None]
    step = steps.long()[:, None] if isinstance(steps, Tensor) else torch.full_like(seed, steps)
    words = philox_reference((element, call, step, path), (seed, example))
    of_token = [word.unflatten(1, (length, quarter)) for word in words]
    return normal_reference(torch.cat(of_token, dim=-1)[..., :width], truncated)


def noisy_update_reference(
    f: Tensor,
    rstd: Tensor | None,
    z: Tensor,
    keys: Tensor | None,
    steps: Tensor | None,
    call: int,
    damping: float,
    noise: float,
) -> Tensor:
    """The update in plain PyTorch; see `noisy_update`."""
    dtype = accumulate_dtype(f.dtype)
    y = f.to(dtype) if rstd is None else f.to(dtype) * rstd[..., None].to(dtype)
    if damping != 1:
        y = (1 - damping) * z.to(dtype) + damping * y
    if keys is not None and steps is not None:
        eps = draws_reference(keys, steps, call, f.shape[1], f.shape[2], truncated=False)
        y = torch.where(keys[:, 2, None, None] != 0, y + noise * eps.to(dtype), y)
    return y.to(f.dtype)


def random_start_reference(z: Tensor, begins: Tensor, init: Tensor, keys: Tensor, call: int) -> Tensor:
    """The start in plain PyTorch; see `random_start`."""
    if z.device.type == "cpu" and not (torch.compiler.is_compiling() or is_in_torch_dispatch_mode()):
        # Draw only for sequences that begin, because drawing dominates the time. The number of rows depends
        # on values, which neither a compiler nor a recorder of operations supports.
        rows = begins.nonzero()[:, 0]
        if len(rows) < len(z):
            y = z.clone()
            if len(rows):
                y[rows] = random_start_reference(z[rows], begins[rows], init, keys[rows], call)
            return y
    eps = draws_reference(keys, 0, call, z.shape[1], z.shape[2], truncated=True).to(z.dtype)
    start = torch.where(keys[:, 2, None, None] != 0, eps, init.to(z.dtype))
    return torch.where(begins[:, None, None], start, z)


def launch_choice(width: int) -> dict[str, int]:
    """About 256 counters per tile, 2 per thread, because a counter's four values take many registers."""
    BLOCK_Q = max(16, min(256, triton.next_power_of_2(-(-width // 4))))
    return {"BLOCK_M": max(1, 256 // BLOCK_Q), "BLOCK_Q": BLOCK_Q, "num_warps": 4}


@jit
def _polynomial_at(x, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    value = tl.full(x.shape, COEFFICIENTS[DEGREE], tl.float32)
    for i in tl.static_range(1, DEGREE + 1):
        value = value * x + COEFFICIENTS[DEGREE - i]
    return value


@jit
def _normal(
    words,
    LOG: tl.constexpr, INVERSE: tl.constexpr, WITHIN: tl.constexpr, WIDEN: tl.constexpr,
    TRUNCATED: tl.constexpr,
):  # fmt: skip
    u = (((words >> 8) & 0x7FFFFF).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    if TRUNCATED:
        x = u * WITHIN
        t = 1.0 - x
    else:
        x = 1.0 - u
        t = u
    y = t * (2.0 - t)
    bits = y.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    w = -(exponent.to(tl.float32) * 0.6931471805599453 + f * _polynomial_at(f, LOG, 8))
    z = x * _polynomial_at(tl.sqrt_rn(tl.maximum(w, 0.0)) - 2.0, INVERSE, 12)
    if TRUNCATED:
        z = z * WIDEN
    return tl.where(words > 0x7FFFFFFF, -z, z)


@jit
def _words(keys_ptr, batch, element, step, call, mask):
    """The four words of each counter, and whether the row uses them."""
    seed = tl.load(keys_ptr + batch * 3, mask=mask, other=0).to(tl.uint32, bitcast=True)
    example = tl.load(keys_ptr + batch * 3 + 1, mask=mask, other=0).to(tl.uint32, bitcast=True)
    path = tl.load(keys_ptr + batch * 3 + 2, mask=mask, other=0).to(tl.uint32, bitcast=True)
    zero = element * 0
    # Triton passes a call number of 1 as a Python int.
    words = tl.random.philox_impl(
        element, zero + tl.full([], call, tl.uint32), zero + step.to(tl.uint32)[:, None],
        zero + path[:, None], zero + seed[:, None], zero + example[:, None],
    )  # fmt: skip
    return words, (path != 0)[:, None]


@jit
def _update_quarter(
    f_ptr, z_ptr, y_ptr, z_at, y_at, mask, rstd, words, takes,
    LOG: tl.constexpr, INVERSE: tl.constexpr, WIDE: tl.constexpr,
    DAMPING: tl.constexpr, NOISE: tl.constexpr, HAS_NOISE: tl.constexpr,
):  # fmt: skip
    y = tl.load(f_ptr + y_at, mask=mask, other=0.0).to(WIDE) * rstd
    if DAMPING != 1.0:
        z = tl.load(z_ptr + z_at, mask=mask, other=0.0).to(WIDE)
        y = tl.full([], 1.0 - DAMPING, WIDE) * z + tl.full([], DAMPING, WIDE) * y
    if HAS_NOISE:
        eps = _normal(words, LOG, INVERSE, 1.0, 1.0, False)
        y = tl.where(takes, y + tl.full([], NOISE, WIDE) * eps.to(WIDE), y)
    tl.store(y_ptr + y_at, y.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _noisy_update_kernel(
    f_ptr, rstd_ptr, z_ptr, keys_ptr, steps_ptr, y_ptr,
    M, N, T, call,
    z_stride_b, z_stride_t,
    WIDE: tl.constexpr, LOG: tl.constexpr, INVERSE: tl.constexpr,
    DAMPING: tl.constexpr, NOISE: tl.constexpr, HAS_NOISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    Q = (N + 3) // 4
    batch, token = rows // T, rows % T
    real = rows < M
    rstd = tl.full([BLOCK_M, 1], 1.0, WIDE)
    if rstd_ptr is not None:
        rstd = tl.load(rstd_ptr + rows, mask=real, other=0.0).to(WIDE)[:, None]
    element = (token[:, None] * Q + cols[None, :]).to(tl.uint32)
    a, b, c, d, takes = element, element, element, element, real[:, None]
    if HAS_NOISE:
        step = tl.load(steps_ptr + batch, mask=real, other=0)
        words, takes = _words(keys_ptr, batch, element, step, call, real)
        a, b, c, d = words
    z_at = (batch * z_stride_b + token * z_stride_t)[:, None] + cols[None, :]
    y_at = rows[:, None] * N + cols[None, :]
    inside = real[:, None] & (cols < Q)[None, :]
    for w in tl.static_range(4):
        mask = inside & (cols + w * Q < N)[None, :]
        word = a if w == 0 else (b if w == 1 else (c if w == 2 else d))
        _update_quarter(
            f_ptr, z_ptr, y_ptr, z_at + w * Q, y_at + w * Q, mask, rstd, word, takes,
            LOG, INVERSE, WIDE, DAMPING, NOISE, HAS_NOISE,
        )  # fmt: skip


@jit
def _random_start_kernel(
    z_ptr, begins_ptr, init_ptr, keys_ptr, y_ptr,
    M, N, T, call,
    LOG: tl.constexpr, INVERSE: tl.constexpr, WITHIN: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    Q = (N + 3) // 4
    batch, token = rows // T, rows % T
    real = rows < M
    begins = tl.load(begins_ptr + batch, mask=real, other=0).to(tl.int32)[:, None] != 0
    element = (token[:, None] * Q + cols[None, :]).to(tl.uint32)
    words, takes = _words(keys_ptr, batch, element, batch * 0, call, real)
    a, b, c, d = words
    at = rows[:, None] * N + cols[None, :]
    inside = real[:, None] & (cols < Q)[None, :]
    for w in tl.static_range(4):
        mask = inside & (cols + w * Q < N)[None, :]
        word = a if w == 0 else (b if w == 1 else (c if w == 2 else d))
        eps = _normal(word, LOG, INVERSE, WITHIN, WIDEN, True)
        init = tl.load(init_ptr + cols + w * Q, mask=cols + w * Q < N, other=0.0).to(y_ptr.dtype.element_ty)
        z = tl.load(z_ptr + at + w * Q, mask=mask, other=0.0)
        start = tl.where(takes, eps.to(y_ptr.dtype.element_ty), init[None, :])
        tl.store(y_ptr + at + w * Q, tl.where(begins, start, z), mask=mask)


def _grid(rows: int, width: int, choice: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(rows, choice["BLOCK_M"]), triton.cdiv(-(-width // 4), choice["BLOCK_Q"])


def _update(
    f: Tensor, rstd: Tensor | None, z: Tensor, keys: Tensor | None, steps: Tensor | None,
    call: int, damping: float, noise: float,
) -> Tensor:  # fmt: skip
    f = f.contiguous()
    B, T, D = f.shape
    z = z if z.stride(2) == 1 else z.contiguous()
    y, choice = torch.empty_like(f), launch_choice(D)
    launch(
        _noisy_update_kernel, _grid(B * T, D, choice),
        f, rstd if rstd is None else rstd.contiguous(), z, keys, steps, y,
        B * T, D, T, call,
        z.stride(0), z.stride(1),
        WIDE=wide(f.dtype), LOG=_LOG, INVERSE=_INVERSE,
        DAMPING=damping, NOISE=noise, HAS_NOISE=keys is not None,
        enable_fp_fusion=False, **choice,
    )  # fmt: skip
    return y


def _start(z: Tensor, begins: Tensor, init: Tensor, keys: Tensor, call: int) -> Tensor:
    z = z.contiguous()
    B, T, D = z.shape
    y, choice = torch.empty_like(z), launch_choice(D)
    launch(
        _random_start_kernel, _grid(B * T, D, choice),
        z, begins, init.contiguous(), keys, y,
        B * T, D, T, call,
        LOG=_LOG, INVERSE=_INVERSE, WITHIN=_WITHIN, WIDEN=_WIDEN,
        enable_fp_fusion=False, **choice,
    )  # fmt: skip
    return y


_noisy_update = torch.library.custom_op("hrm_kernels::noisy_update", _update, mutates_args=())


@_noisy_update.register_fake
def _(f, rstd, z, keys, steps, call, damping, noise) -> Tensor:
    return torch.empty_like(f, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.damping = inputs[6]


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dtype = accumulate_dtype(dy.dtype)
    needs_f, _, needs_z, *_ = ctx.needs_input_grad
    df = (ctx.damping * dy.to(dtype)).to(dy.dtype) if needs_f else None
    dz = ((1 - ctx.damping) * dy.to(dtype)).to(dy.dtype) if needs_z else None
    return df, None, dz, None, None, None, None, None


_noisy_update.register_autograd(_differentiate, setup_context=_save)

_random_start = torch.library.custom_op("hrm_kernels::random_start", _start, mutates_args=())


@_random_start.register_fake
def _(z: Tensor, begins: Tensor, init: Tensor, keys: Tensor, call: int) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _check_states(op: str, z: Tensor, keys: Tensor | None) -> None:
    check_floating(op, z=z)
    if z.dim() != 3:
        raise ValueError(f"{op}: z must be (B, T, D), got {tuple(z.shape)}")
    if keys is not None:
        check_shape(op, "keys", keys, (z.shape[0], KEY_WORDS))
        if keys.dtype != torch.int32 or keys.device != z.device or not keys.is_contiguous():
            raise TypeError(f"{op}: keys must be contiguous int32 on {z.device}, got {keys.dtype}")


def noisy_update(
    f: Tensor,
    z: Tensor,
    *,
    damping: float = 1.0,
    noise: float = 0.0,
    keys: Tensor | None = None,
    steps: Tensor | None = None,
    call: int = 0,
    rstd: Tensor | None = None,
) -> Tensor:
    """A module's new state: (1 - damping) z + damping f + noise eps.

    f, z: (B, T, D), same dtype; the module's result and its previous state. keys: (B, 3) int32, seed, example
    and path of each sequence; steps: (B,) int32, its ACT steps; call: the number of this call within the
    step. There is no noise without keys, and none on path 0. rstd: (B, T) float32 (float64), the factor of
    f's deferred norm, without gradient. Returns (B, T, D) in f's dtype, computed in float32 (float64) and
    rounded once. eps is the float32 value defined in this file's docstring. Raises ValueError or TypeError
    naming the argument. Source: Equilibrium Reasoners (arXiv 2605.21488).
    """
    check_floating("noisy_update", f=f, z=z)
    check_shape("noisy_update", "z", z, tuple(f.shape))
    _check_states("noisy_update", z, keys)
    if not noise or keys is None:
        keys = steps = None
    elif steps is None:
        raise ValueError("noisy_update: keys without steps; give the ACT steps of each sequence")
    else:
        check_shape("noisy_update", "steps", steps, (f.shape[0],))
    if use_triton("noisy_update", f):
        return _noisy_update(f, rstd, z, keys, steps, call, damping, noise)
    return noisy_update_reference(f, rstd, z, keys, steps, call, damping, noise)


def random_start(z: Tensor, begins: Tensor, init: Tensor, keys: Tensor, call: int) -> Tensor:
    """Random initial states for sequences that begin: truncated normals of standard deviation 1.

    z: (B, T, D). begins: (B,) bool. init: (D,), the initial state of path 0. keys, call: as in
    `noisy_update`, at step 0. Returns (B, T, D) in z's dtype; takes no gradient. Raises ValueError or
    TypeError naming the argument.
    """
    _check_states("random_start", z, keys)
    check_shape("random_start", "begins", begins, (z.shape[0],))
    check_shape("random_start", "init", init, (z.shape[2],))
    if use_triton("random_start", z):
        return _random_start(z, begins, init, keys, call)
    return random_start_reference(z, begins, init, keys, call)
