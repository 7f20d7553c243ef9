"""The tensors of a small checkpoint that is no model of a library: safetensors, or a torch pickle of tensors alone."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from rollflow.errors import ModelError, RequestError, shown
from rollflow.rewards import weights
from rollflow.rewards.network import loading
from rollflow.rewards.weights import Wanted

PATTERNS = ("*.safetensors", "*.pth")
PICKLES = (".pth", ".pt", ".bin", ".ckpt")


def is_file(reward: str, given: str) -> bool:
    """Whether a text names a file, rather than a folder or a hub id; raises `RequestError` where that is not there."""
    path = Path(given).expanduser()
    if path.suffix in (".safetensors", *PICKLES) and not path.exists():
        raise RequestError(f"the reward {reward} finds no file {shown(given)}: give another, a folder or a hub id")
    return path.is_file()


def tensors(reward: str, wanted: Wanted) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, in the numeric order of their names.

    Args:
        reward: for whom, in messages.
        wanted: a file, or a folder or hub id with one such file; safetensors are preferred. Of a torch pickle tensors
            alone are read (`weights_only`), so that it cannot run code.

    Raises:
        RequestError: it cannot be had; see `rollflow.rewards.weights.folder`.
        ModelError: it holds no such file, several of them, or no tensors.
    """
    path = Path(wanted.model).expanduser()
    if not path.is_file():
        path = _only(reward, weights.folder(reward, *wanted))
    with loading(reward, path):
        if path.suffix in PICKLES:
            found = torch.load(path, map_location="cpu", weights_only=True)
            found = found.get("state_dict", found)
        else:
            found = load_file(path)
        return {name: found[name] for name in sorted(found, key=_numbers)}


def _only(reward: str, folder: Path) -> Path:
    for suffixes in ((".safetensors",), PICKLES):
        files = sorted(path for path in folder.iterdir() if path.suffix in suffixes)
        if len(files) == 1:
            return files[0]
        if files:
            raise ModelError(
                f"the reward {reward} takes one file of weights, and {shown(str(folder))} has "
                f"{', '.join(path.name for path in files)}: give the path of one"
            )
    raise ModelError(
        f"the reward {reward} finds neither .safetensors nor {', '.join(PICKLES)} in {shown(str(folder))}: put one in"
    )


def _numbers(name: str) -> tuple[list[int], str]:
    return [int(number) for number in re.findall(r"\d+", name)], name
