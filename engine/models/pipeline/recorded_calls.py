"""Records calls of a pipeline's networks for a CPU, which then runs them without Python between their operations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from rollflow.models.pipeline.arguments import LIST
from rollflow.models.pipeline.decoding import Decoding, decoded
from rollflow.models.pipeline.drive import SCALES
from rollflow.models.pipeline.replay import Conditioning, Prompt, Replay, tensors_of
from rollflow.models.recorded import Function, traced


def record(replay: Replay, texts: Sequence[Conditioning]) -> None:
    """Records the calls of a size; see `rollflow.models.recorded`.

    Calls stay as they are where texts of other lengths give them another form, where lists have an entry a row, and
    where modules have hooks, which a recording would run once. Of hooks that come later, those of the network itself
    switch its recordings off, and those of its modules have no effect on them.

    Args:
        replay: whose calls they are.
        texts: any of its size, best of different lengths: recordings must be right for all of them.
    """
    if replay.ragged or any(argument.dim == LIST for argument in replay.learned.arguments):
        return
    parts = [[one.conditional for one in texts], [one.unconditional for one in texts if one.unconditional]]
    for i, prompts in product(range(len(replay.driver.networks)), parts):
        network = getattr(replay.driver.pipeline, replay.driver.networks[i])
        if prompts and (i, prompts[0].key) not in replay.recorded and not _hooked(network):
            alike = [one for one in prompts if one.key == prompts[0].key]
            replay.recorded[i, prompts[0].key] = _traced(replay, i, network, alike)


def _traced(replay: Replay, i: int, network: nn.Module, prompts: Sequence[Prompt]) -> Function:
    """`Replay.computed` of one network as a function of tensors, recorded."""
    generator, dtype = torch.Generator().manual_seed(0), next(network.parameters()).dtype
    given = replay.gathered(prompts[:1])
    paths, fixed = tensors_of(given).keys(), {path: one for path, one in given.items() if not isinstance(one, Tensor)}

    def function(x: Tensor, time: Tensor, scales: Tensor, *tensors: Tensor) -> Tensor:
        return replay.computed(i, {**fixed, **dict(zip(paths, tensors, strict=True))}, x, time, scales)

    def inputs(rows: int) -> tuple[Tensor, ...]:
        x = torch.randn(rows, *replay.learned.shape, generator=generator).to(dtype)
        time, scales = replay.learned.clock.time(torch.linspace(0.1, 1, rows)), torch.linspace(*SCALES, rows)
        chosen = [prompts[j % len(prompts)] for j in range(rows)]
        return x, time, scales, *tensors_of(replay.gathered(chosen)).values()

    further = [inputs(rows) for rows in (1, 2, 7)]
    return traced(function, network, inputs(3), inputs(5), replay.driver.networks[i], further)


def recorded_decoder(vae: Any, decoding: Decoding, dtype: torch.dtype) -> Function:
    """`decoded` of an autoencoder of images as a function of latents of this dtype, recorded."""
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(rows, *decoding.shape, generator=generator).to(dtype) for rows in (3, 5, 1, 2)]
    three, five, *further = [(laid_out(one),) for one in latents]
    return traced(partial(decoded, vae, decoding, clip=False), vae, three, five, "decoder", further)


def laid_out(latents: Tensor) -> Tensor:
    """Latents of images as a CPU convolves them fastest, whatever the layout of the weights."""
    fast = latents.device.type == "cpu" and latents.ndim == 4
    return latents.contiguous(memory_format=torch.channels_last) if fast else latents


def _hooked(network: nn.Module) -> bool:
    return any(one._forward_hooks or one._forward_pre_hooks or "forward" in vars(one) for one in network.modules())
