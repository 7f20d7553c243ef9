"""Networks that authors publish as one file, with names of their own: the file, and classes of transformers filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rollflow.errors import ModelError, RequestError, shown
from rollflow.rewards import known, weights
from rollflow.rewards.weights import FOLDERS, Wanted

TOKENIZER = ("tokenizer*.json", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")


def file(reward: str, folder: Path, stem: str, suffixes: tuple[str, ...] = (".safetensors", ".pt")) -> Path:
    """A checkpoint in a folder by its name without the suffix, safetensors first; raises `RequestError` if none is."""
    for suffix in suffixes:
        if (path := folder / f"{stem}{suffix}").is_file():
            return path
    raise RequestError(
        f"the reward {reward} finds no {' or '.join(stem + suffix for suffix in suffixes)} in {shown(str(folder))}: "
        f"put it there, or run `rollflow fetch {reward} --to DIR` where there is a network and set {FOLDERS}=DIR"
    )


def has_vocabulary(model: str | Path) -> bool:
    """Whether a model is a folder that holds a tokenizer, beside whatever else is in it."""
    return any((Path(model).expanduser() / name).is_file() for name in _VOCABULARIES)


def with_vocabulary(own: tuple[Wanted, ...], model: str, tokenizer: str) -> tuple[Wanted, ...]:
    """What a reward loads, with the tokenizer from elsewhere where the folder `model` holds none."""
    return own if has_vocabulary(model) else (*own, Wanted(tokenizer, known.revision(tokenizer), TOKENIZER))


def vocabulary(reward: str, wanted: Wanted) -> Path:
    """The folder of a tokenizer. Raises `RequestError` if it cannot be had, or is not in its folder."""
    if not has_vocabulary(folder := weights.folder(reward, *wanted)):
        raise RequestError(
            f"the reward {reward} finds no tokenizer ({', '.join(_VOCABULARIES)}) in {shown(str(folder))}: put that of "
            f"{wanted.model} there, or run `rollflow fetch {reward} --to DIR` where there is a network"
        )
    return folder


def filled(reward: str, kind: Any, config: Any, tensors: Mapping[str, Tensor], **options: Any) -> Any:
    """A network of transformers with these weights, no more and no fewer, in the widest of their dtypes.

    Args:
        reward: for whom, in messages.
        kind: its class.
        config: its configuration.
        tensors: by the names of that class.
        options: of its constructor.

    Raises:
        ModelError: a weight is missing, unknown or of another shape.
    """
    dtype = reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values()})
    report = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    given = {"config": config, "state_dict": dict(tensors), "dtype": dtype}
    network, found = kind.from_pretrained(None, **given, **report, **options)
    wrong = [f"{what.removesuffix('_keys')} {names}" for what, one in found.items() if (names := _some(one))]
    if wrong:
        raise ModelError(
            f"the checkpoint of the reward {reward} does not fit {kind.__name__}: {'; '.join(wrong)}; fetch it anew"
        )
    return network


def head(reward: str, tensors: Mapping[str, Tensor], layers: Sequence[nn.Module | None]) -> nn.Module:
    """Layers one after the other; each None is a linear one, whose shape is that of its tensors.

    Args:
        reward: for whom, in messages.
        tensors: `weight` and `bias` of the linear layers, by their places.
        layers: in order.

    Raises:
        ModelError: a tensor is missing, unknown or of another shape.
    """
    named = {f"{place}.{part}" for place, layer in enumerate(layers) if layer is None for part in ("weight", "bias")}
    if wrong := named ^ set(tensors):
        raise ModelError(
            f"the head of the reward {reward} has other tensors: {_some(wrong)}; fetch its checkpoint anew"
        )
    linear = [tensors[f"{place}.weight"] for place, layer in enumerate(layers) if layer is None]
    if any(one.shape[0] != next_.shape[1] for one, next_ in pairwise(linear)):
        shapes = ", ".join("x".join(map(str, one.shape)) for one in linear)
        raise ModelError(f"the head of the reward {reward} has layers of {shapes}; fetch its checkpoint anew")
    made = iter(nn.Linear(*one.T.shape) for one in linear)
    sequence = nn.Sequential(*(next(made) if layer is None else layer for layer in layers))
    sequence.load_state_dict(dict(tensors))
    return sequence


def _some(names: Any) -> str:
    """The first of some names, and how many there are."""
    names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in names)
    return f"{', '.join(names[:2])}{f' and {len(names) - 2} more' if len(names) > 2 else ''}"
