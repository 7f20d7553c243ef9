"""Whether a device computes what it should: kernels against float64, graphs against eager steps and searches.

A kernel's largest error against its definition in float64 may be twice that of plain torch in the same dtype, plus a
floor for functions that libraries round differently. A replay and an eager step run the same kernels on the same
shapes: bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from rollflow import kernels
from rollflow.bench.gpu_parts import Deadline, Row, capture
from rollflow.device.runner import Runner
from rollflow.device.workers import Lanes
from rollflow.engine import Engine
from rollflow.kernels import reference
from rollflow.models.flux import FluxModel
from rollflow.models.layout import Layout
from rollflow.models.loading import load
from rollflow.profile.ledger import Ledger
from rollflow.request import Request
from rollflow.row import NONE

FLOOR = 4e-6
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (  # rows, tokens, channels: FLUX at 1024 x 1024 pixels, built-in, odd, tokens of one and of 16 latent pixels
    (8, 4096, 64),
    (8, 16, 32),
    (4, 6, 12),
    (4, 64, 16),
    (4, 60, 48),
)
# The patch, and the height of the latents, by tokens.
LATENTS = {4096: ((1, 2, 2), 128), 16: ((1, 2, 2), 8), 6: ((1, 2, 2), 2), 64: ((1, 1, 1), 8), 60: ((1, 4, 4), 40)}
SCALING, SHIFT = 0.3611, 0.1159  # of FLUX's autoencoder; a channel's differ a little from the next one's
SLOTS, BUCKETS, PROMPT = 32, (1, 8), "two red circles"


def correctness(device: torch.device, quick: bool, deadline: Deadline) -> Iterator[Row]:
    """Rows of name, error, allowed error and whether it passed: kernels, then graphs in each dtype of a model."""
    for size in SIZES[1:] if quick else SIZES:
        yield from kernel_rows(device, *size)
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
        if not deadline.allows(5.0):
            return
        model = FluxModel(load("shapes", device, dtype))
        yield from replay_rows(model)
        yield search_row(model)


def _checked(name: str, error: float, allowed: float) -> Row:
    return {"name": name, "passed": error <= allowed, "error": error, "allowed": allowed}


def _against(name: str, actual: Tensor, plain: Tensor, exact: Tensor) -> Row:
    """`plain` is what torch makes in the dtype of `actual`; an error that is no number fails."""
    ours, theirs = ((value.cpu().double() - exact).abs().max().item() for value in (actual, plain))
    return _checked(f"{name}, {_name(actual.dtype)}", ours, 2 * theirs + FLOOR)


def kernel_rows(device: torch.device, rows: int, token: int, channel: int) -> Iterator[Row]:
    """Every kernel at one size, in each dtype: stochastic, deterministic, prior and padding rows in turn."""
    size, generator, row = f"{rows}x{token}x{channel}", torch.Generator().manual_seed(rows * token), torch.arange(rows)
    x, u = torch.randn(2, 2 * rows, token, channel, generator=generator).unbind(0)
    seed, key = torch.randint(-(2**63), 2**63 - 1, (2, rows), generator=generator).unbind(0)
    parent, child = torch.where(row % 4 == 2, NONE, row), torch.where(row % 4 == 3, NONE, row + rows)
    step = torch.tensor([0.9, -0.2, 0.4, 1.1]).repeat(rows, 1)
    step[1::4, 2] = 0
    z = exact_noise(seed, key, token, channel)
    plain = reference.noise(seed, key, token, channel)
    yield _against(f"noise {size}", kernels.noise(seed.to(device), key.to(device), token, channel), plain, z)
    mean, (patch, height) = torch.rand(rows, 2, generator=generator), LATENTS[token]
    layout, pixels = _layout(patch, channel), token * math.prod(patch)
    shape = (height, pixels // height, *patch[1:])
    tables = flat_tables(token * channel)
    operators: tuple[tuple[torch.device, Any], ...] = ((device, kernels), (torch.device("cpu"), reference))
    for dtype in DTYPES:
        kept = u.to(dtype)
        velocity, velocities = kept[:rows], kept.double()
        velocities[child[child >= 0]] = velocity[child >= 0].double()
        states, exact_input = exact_propose(x, kept, parent, child, step, z)
        means = exact_means(velocity, x, child, mean)
        exact = {
            f"propose {size}": exact_input,
            f"propose {size}, states beside {_name(dtype)}": states,
            f"finish {size}": exact_finish(means, child, layout, *shape[:2]),
            f"finish {size}, velocities": velocities,
        }
        for numbers, (scale, offset) in tables.items():
            exact[f"finish_flat {size}, {numbers} numbers"] = exact_flat(means, child, scale, offset)
            exact[f"finish_flat {size}, {numbers} numbers, velocities"] = velocities
        made: list[list[Tensor]] = []
        for where, on in operators:
            states_there, u_there, slot, means_there = (value.to(where) for value in (x, kept, child, mean))
            moves = [value.to(where) for value in (parent, child, step, seed, key)]
            pools = [value.clone() for value in (states_there, *[u_there] * (1 + len(tables)))]
            own = [on.propose(pools[0], u_there, *moves, dtype), pools[0]]
            given = u_there[:rows], states_there
            rest = slot, means_there
            own += [on.finish(*given, pools[1], *rest, *shape, *layout.affine(where), dtype), pools[1]]
            for pool, two in zip(pools[2:], tables.values(), strict=True):
                own += [on.finish_flat(*given, pool, *rest, *(one.to(where) for one in two), dtype), pool]
            made.append(own)
        for name, actual, plain in zip(exact, *made, strict=True):
            yield _against(name, actual, plain, exact[name])


def exact_noise(
    seed: Int64[Tensor, " row"], key: Int64[Tensor, " row"], token: int, channel: int
) -> Float64[Tensor, "row token channel"]:
    """The stream that `rollflow.kernels.reference` defines, its logarithm, root, sine and cosine in float64."""
    elements = token * channel
    seeds, keys = (value.numpy().astype(np.uint64)[:, None] for value in (seed, key))
    quad, zero = np.arange(-(-elements // 4), dtype=np.uint64), np.zeros((1,), np.uint64)
    counter = (quad, keys & reference.WORD, keys >> reference.SHIFT, zero)
    words = reference.philox4x32(counter, (seeds & reference.WORD, seeds >> reference.SHIFT))
    normals = []
    for radius_word, angle_word in (words[:2], words[2:]):
        uniform = radius_word.astype(np.float32) * reference.UNIT + reference.HALF_UNIT  # float32 by definition
        radius = np.sqrt(-2 * np.log(uniform.astype(np.float64)))
        angle = np.pi * 2.0**-31 * angle_word.astype(np.uint32).view(np.int32).astype(np.float64)
        normals += [radius * np.cos(angle), radius * np.sin(angle)]
    rows = np.stack(normals, axis=-1).reshape(len(seeds), -1)[:, :elements]
    return torch.from_numpy(np.ascontiguousarray(rows)).view(len(seeds), token, channel)


def exact_propose(
    x: Tensor, u: Tensor, parent: Tensor, child: Tensor, coefficients: Tensor, z: Tensor
) -> tuple[Tensor, Tensor]:
    """The pool of states after `rollflow.kernels.propose`, and the model's input, in float64."""
    a, b, k, inverse_scale = coefficients.double()[:, :, None, None].unbind(1)
    related, live = (parent >= 0)[:, None, None], child >= 0
    from_parent = a * x.double()[parent.clamp(min=0)] + b * u.double()[parent.clamp(min=0)]
    state = torch.where(live[:, None, None], torch.where(related, from_parent, 0.0) + k * z, 0.0)
    pool = x.double()
    pool[child[live]] = state[live]
    return pool, state * inverse_scale


def _layout(patch: tuple[int, int, int], channel: int) -> Layout:
    channels = range(channel // math.prod(patch))
    return Layout(patch, tuple(SCALING + 0.01 * c for c in channels), tuple(SHIFT - 0.02 * c for c in channels))


def flat_tables(elements: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Tables of one number, of one for some elements and of one an element, by how many they hold."""
    counts = dict.fromkeys((1, math.gcd(elements, 6 if elements < 128 else 16), elements))
    return {n: (1 + torch.arange(n) % 7 / 4, torch.arange(n) % 5 / 8 - 0.25) for n in counts}


def exact_means(velocity: Tensor, x: Tensor, slot: Tensor, coefficients: Tensor) -> Tensor:
    """Posterior means of all rows, in float64; of padding, anything."""
    p, q = coefficients.double()[:, :, None, None].unbind(1)
    return p * x.double()[slot.clamp(min=0)] + q * velocity.double()


def exact_flat(means: Tensor, slot: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """What `rollflow.kernels.finish_flat` returns, in float64."""
    runs = means.reshape(len(means), len(scale), -1) * scale.double()[:, None] + offset.double()[:, None]
    return torch.where((slot >= 0)[:, None], runs.flatten(1), 0.0)


def exact_finish(means: Tensor, slot: Tensor, layout: Layout, height: int, width: int) -> Tensor:
    """The latents that `rollflow.kernels.finish` returns, in float64."""
    latents = layout.unpack(means, height, width)
    scaling, shift = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (layout.scaling, layout.shift))
    return torch.where((slot >= 0)[:, None, None, None], latents / scaling + shift, 0.0)


def replay_rows(model: FluxModel) -> Iterator[Row]:
    """The runner's step as a replay and eager, on the same tables: latents, states and velocities; on a lane."""
    lanes = Lanes(model.device, 1, 1)
    try:
        for bucket, error in lanes.run(_replays, model, lanes).result():
            yield _checked(f"a replay is the eager step, {bucket} rows, {_name(model.dtype)}", error, 0.0)
    finally:
        lanes.close()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def _replays(model: FluxModel, lanes: Lanes) -> list[tuple[int, float]]:
    """Buckets, and the largest difference of a replay from the eager step; infinite where one is not finite."""
    geometry, (conditioning,) = model.geometry(), model.encode([PROMPT])
    runner = Runner(model, BUCKETS, Ledger(), lanes)
    runner.allocate(geometry, SLOTS)
    pool = runner.storage(geometry)
    generator = torch.Generator().manual_seed(0)
    before = [torch.randn(pool.x.shape, generator=generator).to(model.device) for _ in range(2)]
    runner.record(geometry, BUCKETS, conditioning, capture(model.device))
    graphs = runner.graphs[geometry]

    def after(step: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
        pool.x.copy_(before[0])
        pool.u.copy_(before[1])
        return [value.clone() for value in (step(*inputs), pool.x, pool.u)]

    found = []
    for bucket in BUCKETS:
        inputs, others = (_inputs(model, conditioning, bucket, seed) for seed in (1, 2))
        expected = after(graphs.step, inputs)
        graphs.run(*others)  # or what an earlier run left would pass
        actual = after(graphs.run, inputs)
        errors = [(ours - theirs).abs().max().item() for ours, theirs in zip(actual, expected, strict=True)]
        finite = all(value.isfinite().all() for value in (*actual, *expected))
        found.append((bucket, max(errors) if finite else float("inf")))
    return found


def _inputs(model: FluxModel, conditioning: Any, bucket: int, seed: int) -> tuple[Tensor, ...]:
    """A batch whose children go to other slots than its parents; every third row is of the prior, the last padding."""
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(2**62, (4, bucket), generator=generator)
    integers[:2] = torch.randperm(SLOTS, generator=generator)[: 2 * bucket].view(2, bucket)
    integers[0, ::3] = NONE
    if bucket > 1:
        integers[:2, -1] = NONE
    floats = torch.rand(8 * bucket, generator=generator) + 0.01
    return integers.to(model.device), floats.to(model.device), *model.collate([conditioning] * bucket)


def one_pixel(images: Tensor, prompts: list[str]) -> Tensor:
    """A reward that stays on the device, and has no sum whose rounding would depend on a row's place in a batch."""
    return images[:, 1, images.shape[2] // 2, images.shape[3] // 2]


def search_row(model: FluxModel) -> Row:
    """Three searches by engines of one bucket with graphs and without: the same rewards, decisions and pixels."""
    options: dict[str, Any] = {"method": "rbf", "nfe": 24, "steps": 5, "reward": one_pixel}
    requests = [Request(PROMPT, seed=seed, **options) for seed in range(3)]
    with_graphs, eager = (Engine(model, buckets=(8,), lanes=1, graphs=on).generate(requests) for on in (True, False))
    pairs = list(zip(with_graphs, eager, strict=True))
    error = max((ours.pixels - theirs.pixels).abs().max().item() for ours, theirs in pairs)
    alike = all(ours.history == theirs.history for ours, theirs in pairs)
    name = f"a search decides alike with graphs and without, {_name(model.dtype)}"
    return _checked(name, error if alike else float("inf"), 0.0)
