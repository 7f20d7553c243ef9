"""Rewards that stand in for others of the same cost, by name, for measurements in several processes."""

from __future__ import annotations

from functools import cache

import torch

from rollflow import rewards
from rollflow.bench.pipelines import brightness
from rollflow.rewards import Reward

NAMES = ("count", "brightness", "clip-sized")


@cache
def reward_named(name: str, device: str, dtype: torch.dtype, shrink: int = 1) -> Reward:
    """One of `NAMES`, one object a process.

    Args:
        name: "count", of the built-in models; "brightness", which costs nothing; "clip-sized", a random image encoder
            of the size of CLIP's ViT-L/14.
        device: of a network.
        dtype: of a network.
        shrink: divides the layers and heads of a network.
    """
    if name == "clip-sized":
        from rollflow.bench import geometries

        return geometries.clip_reward(device, dtype, shrink)
    return rewards.make(brightness if name == "brightness" else name)
