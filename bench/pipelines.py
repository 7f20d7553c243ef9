"""Best-of-N by any pipeline's own `__call__`, as its users run it, and a reward for models that draw no scenes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow.bench.baselines import Baseline
from rollflow.methods.budget import whole
from rollflow.models.text import Size
from rollflow.rewards import Reward


def brightness(images: Float[Tensor, "row *frame 3 height width"], prompts: Sequence[str]) -> Float[Tensor, " row"]:
    """The mean of all pixels: a reward that costs next to nothing."""
    return images.flatten(1).mean(1)


@torch.no_grad()
def pipeline_bon(
    pipeline: Any, prompts: Sequence[str], reward: Reward, nfe: int, steps: int, each: int, size: Size, seed: int = 0
) -> Baseline:
    """Best of `nfe // steps` samples a prompt, on the pipeline's own schedule and with its own guidance.

    One prompt a call, `each` samples at a time. Each is decoded and judged once; the best is judged again at 8 bits.

    Args:
        pipeline: a complete pipeline; no engine should hold it.
        prompts: what the images should show.
        reward: what chooses.
        nfe: budget of a prompt; what does not make a whole sample is not spent.
        steps: evaluations of a sample.
        each: samples of a call.
        size: of the images or clips; None where it is the pipeline's own.
        seed: of the generator that all calls share.

    Raises:
        RequestError: a budget below one sample, or `steps` or `each` below 1.
    """
    samples, each = whole("nfe", nfe, whole("steps", steps, 1)) // steps, whole("each", each, 1)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    asked = {"height": size.height, "width": size.width, "num_frames": size.frames, "frames": size.frames}
    known = inspect.signature(type(pipeline).__call__).parameters
    asked = {name: value for name, value in asked.items() if name in known and value is not None}
    final: list[float] = []
    for prompt in prompts:
        best, most = None, -math.inf
        for start in range(0, samples, each):
            count = min(each, samples - start)
            made = pipeline(
                prompt=[prompt] * count, num_inference_steps=steps, generator=generator, output_type="pt", **asked
            )
            images = torch.as_tensor(made[0]).float()
            for image, score in zip(images, reward(images, [prompt] * count).tolist(), strict=True):
                if best is None or score > most:
                    best, most = image, score
        assert best is not None, "there is at least one sample"
        final.append(reward((best[None].clamp(0, 1) * 255).round() / 255, [prompt]).item())
    return Baseline(len(prompts) * samples * steps, len(prompts), len(prompts) * samples, tuple(final))
