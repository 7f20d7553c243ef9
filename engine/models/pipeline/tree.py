"""Nested arguments as leaves with paths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Path = tuple[str | int, ...]


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Everything in nested dictionaries, lists and tuples that is none of them, with its path."""
    if type(value) is dict:
        for key, one in value.items():
            yield from leaves(one, (*path, key))
    elif type(value) in (list, tuple):
        for i, one in enumerate(value):
            yield from leaves(one, (*path, i))
    else:
        yield path, value


def built(found: dict[Path, Any], like: Any, path: Path = ()) -> Any:
    """What has the shape of `like`, with these leaves."""
    if path in found:
        return found[path]
    if type(like) is dict:
        return {key: built(found, one, (*path, key)) for key, one in like.items()}
    if type(like) in (list, tuple):
        return type(like)(built(found, one, (*path, i)) for i, one in enumerate(like))
    return like


def same(one: Any, other: Any) -> bool:
    """Whether two leaves, or nested values, are equal, bit for bit."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return (
            isinstance(one, Tensor)
            and isinstance(other, Tensor)
            and one.shape == other.shape
            and one.dtype == other.dtype
            and torch.equal(one, other)
        )
    if type(one) in (list, tuple) and type(one) is type(other):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if type(one) is dict and type(other) is dict:
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    try:
        return one is other or bool(one == other)
    except Exception:
        return False


def named(path: Path) -> str:
    """A path as a reader would write it: `added["ids"][0]`."""
    return "".join(str(part) if i == 0 else f"[{part!r}]" for i, part in enumerate(path))
