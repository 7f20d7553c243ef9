"""Loads, without accelerate, the networks that diffusers loads with it alone: those that keep parts in float32.

In float32 nothing is to be kept, so that a plain loading of the weights is the same. That is what the built-in video
model needs on a machine that has no accelerate.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import is_accelerate_available
from safetensors.torch import load_file

WEIGHTS = "diffusion_pytorch_model.safetensors"


def networks(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Module]:
    """Those networks of a saved pipeline, by name, as `from_pretrained` of its class takes them.

    Empty where accelerate is there, `path` is no folder of a pipeline, or `dtype` is not float32.
    """
    index = path / "model_index.json"
    if is_accelerate_available() or dtype != torch.float32 or not index.is_file():
        return {}
    loaded = {}
    for name, entry in json.loads(index.read_text()).items():
        of_diffusers = isinstance(entry, list) and entry[0] == "diffusers"
        kind: Any = getattr(diffusers, str(entry[1]), None) if of_diffusers else None
        weights = path / name / WEIGHTS
        if getattr(kind, "_keep_in_fp32_modules", None) and weights.is_file():
            network = kind.from_config(kind.load_config(path / name))
            network.load_state_dict(load_file(weights))
            loaded[name] = network.eval()
    return loaded
