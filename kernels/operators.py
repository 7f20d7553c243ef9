"""The operators of the device hot path: their contract, their checks, their registration with torch.

Each is one `torch.library` operator of the namespace `rollflow`, so `torch.compile` and CUDA graphs see one node. A CPU
runs `rollflow.kernels.reference`; a CUDA device runs the Triton kernel in the file of the operator's name, which
registers itself here. None of them synchronises with the host. Indices are not
checked (that would cost a synchronisation): a slot must be -1 or lie inside the pool.
"""

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from . import reference

HALF_OR_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
MOST_ROWS = 65535  # of a batch: the second and third sides of a grid
PATCH_SIDES = (1, 2, 4, 8)  # of the tiles that the kernel of `finish` turns, whose sides are powers of two


def _check(name: str, value: Tensor, like: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    if value.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {value.dtype}; allowed: {', '.join(map(str, dtypes))}")
    if value.shape != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {tuple(shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}; expected {like.device}, like the other arguments")
    if not value.is_contiguous():
        raise ValueError(f"{name} has strides {value.stride()}; expected a contiguous tensor (call .contiguous())")


def _check_row(token: int, channel: int) -> None:
    if not 0 < token * channel < 2**31:
        raise ValueError(f"a row of {token} tokens x {channel} channels; allowed: 1 to 2^31 - 1 elements")


def _check_pools(x_pool: Tensor, u_pool: Tensor) -> None:
    if x_pool.ndim != 3:
        raise ValueError(f"x_pool has shape {tuple(x_pool.shape)}; expected (slot, token, channel)")
    _check_row(x_pool.shape[1], x_pool.shape[2])
    _check("x_pool", x_pool, x_pool, (torch.float32,), x_pool.shape)
    _check("u_pool", u_pool, x_pool, HALF_OR_SINGLE, x_pool.shape)


def _check_batch(rows: int) -> None:
    if rows > MOST_ROWS:
        raise ValueError(f"a batch of {rows} rows; allowed: at most {MOST_ROWS}")


def _check_rows(u: Tensor, x_pool: Tensor, u_pool: Tensor, slot: Tensor, coefficients: Tensor) -> None:
    rows = slot.numel()
    _check_batch(rows)
    _check("u", u, x_pool, (u_pool.dtype,), (rows, *x_pool.shape[1:]))
    _check("slot", slot, x_pool, (torch.int64,), (rows,))
    _check("coefficients", coefficients, x_pool, (torch.float32,), (rows, 2))


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in HALF_OR_SINGLE:
        raise ValueError(f"dtype is {dtype}; allowed: {', '.join(map(str, HALF_OR_SINGLE))}")


def noise(
    seed: Int64[Tensor, " row"], key: Int64[Tensor, " row"], token: int, channel: int
) -> Float32[Tensor, "row token channel"]:
    """Standard normal noise that depends on `(seed, key, element within the row)` alone.

    The same on CPU and GPU up to the rounding of `log`, `cos` and `sin` (about 1e-6), and the same bits on one device
    whatever the other rows are. Philox4x32-10 (Salmon et al. 2011) and Box-Muller: `rollflow.kernels.reference` has the
    exact definition.

    Args:
        seed: one a row; a request's seed, all 64 bits count.
        key: one a row; a particle's noise key, all 64 bits count.
        token: tokens of a row.
        channel: channels of a token.

    Raises:
        ValueError: a shape, dtype, device or memory layout is not the one above.
    """
    _check_row(token, channel)
    _check_batch(seed.numel())
    _check("seed", seed, seed, (torch.int64,), (seed.numel(),))
    _check("key", key, seed, (torch.int64,), (seed.numel(),))
    return torch.ops.rollflow.noise(seed, key, token, channel)


def propose(
    x_pool: Float32[Tensor, "slot token channel"],
    u_pool: Float[Tensor, "slot token channel"],
    parent: Int64[Tensor, " row"],
    child: Int64[Tensor, " row"],
    coefficients: Float32[Tensor, "row 4"],
    seed: Int64[Tensor, " row"],
    key: Int64[Tensor, " row"],
    dtype: torch.dtype,
) -> Float[Tensor, "row token channel"]:
    """Step every row's parent to its child, each row at its own time, and return the model's input for the children.

    With `(a, b, k, inverse_scale)` the row's coefficients and `z` the `noise` of its seed and key, in float32:

        x_pool[child] = a x_pool[parent] + b u_pool[parent] + k z
        returned      = x_pool[child] inverse_scale, rounded to `dtype`

    which is one step of any solver on any interpolant (arXiv 2503.19385; `rollflow.sde` has the coefficients).
    A term whose coefficient is 0 is absent: its memory is not read, so a slot that holds no velocity yet may hold
    anything in `u_pool`, and a deterministic row draws no noise.

    Args:
        x_pool: particle states; rows `child` are overwritten.
        u_pool: the velocities that the model gave for them, float32, bfloat16 or float16.
        parent: slot read; -1 for none (a sample of the prior: only the noise term counts).
        child: slot written; may be the row's own parent. -1 marks a padding row: it writes no slot and returns zeros.
        coefficients: `(a, b, k, inverse_scale)` a row.
        seed: see `noise`.
        key: see `noise`.
        dtype: of the model's input: float32, bfloat16 or float16.

    Rows run at the same time: no slot may be the child of two rows, nor the child of one and the parent of another.

    Raises:
        ValueError: a shape, dtype, device or memory layout is not the one above.
    """
    _check_pools(x_pool, u_pool)
    _check_dtype(dtype)
    rows = parent.numel()
    _check_batch(rows)
    for name, value in (("parent", parent), ("child", child), ("seed", seed), ("key", key)):
        _check(name, value, x_pool, (torch.int64,), (rows,))
    _check("coefficients", coefficients, x_pool, (torch.float32,), (rows, 4))
    return torch.ops.rollflow.propose(x_pool, u_pool, parent, child, coefficients, seed, key, dtype)


def finish(
    u: Float[Tensor, "row token channel"],
    x_pool: Float32[Tensor, "slot token channel"],
    u_pool: Float[Tensor, "slot token channel"],
    slot: Int64[Tensor, " row"],
    coefficients: Float32[Tensor, "row 2"],
    height: int,
    width: int,
    patch_y: int,
    patch_x: int,
    inverse_scaling: Float32[Tensor, " number"],
    shift: Float32[Tensor, " number"],
    dtype: torch.dtype,
) -> Float[Tensor, "row latent height width"]:
    """Keep the velocities that the model returned and give the decoder the posterior means.

    With `(p, q)` the row's coefficients, in float32:

        u_pool[slot] = u
        x0_hat       = p x_pool[slot] + q u        (Tweedie; arXiv 2503.19385)
        returned     = x0_hat inverse_scaling + shift, rounded to `dtype`

    A token is a patch of `patch_y` x `patch_x` latent pixels, its channels ordered (latent channel, dy, dx) as
    `FluxPipeline._pack_latents` of diffusers orders them; what is returned is unpacked, ready for the decoder.

    Args:
        u: the model's output, in the dtype of `u_pool`, so that nothing is lost in it.
        x_pool: particle states.
        u_pool: velocities, float32, bfloat16 or float16; rows `slot` are overwritten.
        slot: the row's particle, each at most once. -1 marks a padding row: it stores nothing and returns zeros.
        coefficients: `(p, q)` a row.
        height: of the latents, in latent pixels; a multiple of `patch_y`.
        width: of the latents, in latent pixels; a multiple of `patch_x`.
        patch_y: latent pixels that a token covers from top to bottom: 1, 2, 4 or 8.
        patch_x: latent pixels that a token covers from left to right: 1, 2, 4 or 8.
        inverse_scaling: 1 / the autoencoder's scaling factor, one a latent channel or one a channel of a token (FLUX.2
            normalises patches); finite. The inverse, because it is computed once, in double precision.
        shift: the autoencoder's shift, as many numbers.
        dtype: of the latents: float32, bfloat16 or float16.

    Raises:
        ValueError: a shape, dtype, device or memory layout is not the one above.
    """
    _check_pools(x_pool, u_pool)
    _check_dtype(dtype)
    token, channel = x_pool.shape[1:]
    patch = f"{patch_y}x{patch_x}"
    if patch_y not in PATCH_SIDES or patch_x not in PATCH_SIDES:
        raise ValueError(f"a patch of {patch}; allowed sides: {', '.join(map(str, PATCH_SIDES))}")
    if channel % (patch_y * patch_x):
        raise ValueError(f"{channel} channels; a token is a {patch} patch: expected a multiple of {patch_y * patch_x}")
    if min(height, width) < 1 or height % patch_y or width % patch_x or height * width != patch_y * patch_x * token:
        raise ValueError(
            f"height {height} and width {width} with {token} tokens; expected {token} patches of {patch} latent pixels"
        )
    _check_rows(u, x_pool, u_pool, slot, coefficients)
    latent = channel // (patch_y * patch_x)
    numbers = channel if inverse_scaling.numel() == channel else latent
    _check("inverse_scaling", inverse_scaling, x_pool, (torch.float32,), (numbers,))
    _check("shift", shift, x_pool, (torch.float32,), (numbers,))
    return torch.ops.rollflow.finish(
        u, x_pool, u_pool, slot, coefficients, height, width, patch_y, patch_x, inverse_scaling, shift, dtype
    )


def finish_flat(
    u: Float[Tensor, "row token channel"],
    x_pool: Float32[Tensor, "slot token channel"],
    u_pool: Float[Tensor, "slot token channel"],
    slot: Int64[Tensor, " row"],
    coefficients: Float32[Tensor, "row 2"],
    scale: Float32[Tensor, " number"],
    offset: Float32[Tensor, " number"],
    dtype: torch.dtype,
) -> Float[Tensor, "row element"]:
    """`finish` of states whose elements lie as those of latents do, of any number of dimensions.

    With `x0_hat` as in `finish` and `e` an element of a row:

        returned[e] = x0_hat[e] scale[c] + offset[c],  c = e // (elements / numbers), rounded to `dtype`

    so that tables of one number stand for all elements, of a number a channel for latents [channel, ...], and of one an
    element for any.

    Args:
        u, x_pool, u_pool, slot, coefficients, dtype: see `finish`.
        scale: each number for as many consecutive elements; finite.
        offset: as many numbers.

    Raises:
        ValueError: a shape, dtype, device or memory layout is not the one above.
    """
    _check_pools(x_pool, u_pool)
    _check_dtype(dtype)
    _check_rows(u, x_pool, u_pool, slot, coefficients)
    elements, numbers = x_pool.shape[1] * x_pool.shape[2], scale.numel()
    if not numbers or elements % numbers:
        raise ValueError(f"scale has {numbers} numbers; expected a divisor of {elements} elements")
    _check("scale", scale, x_pool, (torch.float32,), (numbers,))
    _check("offset", offset, x_pool, (torch.float32,), (numbers,))
    return torch.ops.rollflow.finish_flat(u, x_pool, u_pool, slot, coefficients, scale, offset, dtype)


noise_operator = torch.library.custom_op(
    "rollflow::noise",
    reference.noise,
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor seed, Tensor key, SymInt token, SymInt channel) -> Tensor",
)
propose_operator = torch.library.custom_op(
    "rollflow::propose",
    reference.propose,
    mutates_args=("x_pool",),
    device_types="cpu",
    schema="(Tensor(a!) x_pool, Tensor u_pool, Tensor parent, Tensor child, Tensor coefficients, Tensor seed, "
    "Tensor key, ScalarType dtype) -> Tensor",
)
finish_operator = torch.library.custom_op(
    "rollflow::finish",
    reference.finish,
    mutates_args=("u_pool",),
    device_types="cpu",
    schema="(Tensor u, Tensor x_pool, Tensor(a!) u_pool, Tensor slot, Tensor coefficients, SymInt height, "
    "SymInt width, int patch_y, int patch_x, Tensor inverse_scaling, Tensor shift, ScalarType dtype) -> Tensor",
)
finish_flat_operator = torch.library.custom_op(
    "rollflow::finish_flat",
    reference.finish_flat,
    mutates_args=("u_pool",),
    device_types="cpu",
    schema="(Tensor u, Tensor x_pool, Tensor(a!) u_pool, Tensor slot, Tensor coefficients, Tensor scale, "
    "Tensor offset, ScalarType dtype) -> Tensor",
)


@noise_operator.register_fake
def _(seed: Tensor, key: Tensor, token: int, channel: int) -> Tensor:
    return seed.new_empty(seed.shape[0], token, channel, dtype=torch.float32)


@propose_operator.register_fake
def _(
    x_pool: Tensor, u_pool: Tensor, parent: Tensor, child: Tensor, coefficients: Tensor, seed: Tensor, key: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return x_pool.new_empty(parent.shape[0], *x_pool.shape[1:], dtype=dtype)


@finish_operator.register_fake
def _(
    u: Tensor, x_pool: Tensor, u_pool: Tensor, slot: Tensor, coefficients: Tensor, height: int, width: int,
    patch_y: int, patch_x: int, inverse_scaling: Tensor, shift: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return u.new_empty(u.shape[0], u.shape[2] // (patch_y * patch_x), height, width, dtype=dtype)


@finish_flat_operator.register_fake
def _(
    u: Tensor, x_pool: Tensor, u_pool: Tensor, slot: Tensor, coefficients: Tensor, scale: Tensor, offset: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return u.new_empty(u.shape[0], u.shape[1] * u.shape[2], dtype=dtype)
