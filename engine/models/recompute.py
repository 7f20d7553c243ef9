"""Gradient checkpointing by thread: what a guided evaluation keeps for its backward pass, and what it computes again.

A network marks its blocks as regions: `region(block, *inputs)` calls the block. On a thread that is within
`recomputing()`, only the inputs of a region are kept, and the backward pass evaluates it once more (Chen et al.,
1604.06174): the gradients are the same, and a forward is added to each backward pass. Elsewhere it is a plain call.

Networks of diffusers mark theirs by themselves; a model of one's own may call `region` in its `velocity` and `decode`.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint


class Saved(NamedTuple):
    """Bytes that an evaluation keeps for its backward pass.

    Attributes:
        whole: with everything that its operations save.
        kept: where regions are computed again: their inputs, and what is saved outside of them.
        region: what the largest region saves besides, while its turn in the backward pass lasts.
    """

    whole: int
    kept: int
    region: int


class _Mode(threading.local):
    on = False
    count: _Count | None = None


_MODE = _Mode()


class _Wanted:
    """True on threads for which a network's regions mean something: what diffusers' own switch is set to."""

    def __bool__(self) -> bool:
        return _MODE.count is not None or active()


WANTED = _Wanted()


@contextmanager
def recomputing() -> Iterator[None]:
    """Within it, evaluations by this thread keep only the inputs of their regions."""
    before, _MODE.on = _MODE.on, True
    try:
        yield
    finally:
        _MODE.on = before


def active() -> bool:
    """Whether this thread's gradients are to take little memory."""
    return _MODE.on and torch.is_grad_enabled()


def region(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """What `function` gives; a part that the backward pass may compute again, and must then find the same."""
    if _MODE.count is not None:
        return _MODE.count.region(function, inputs, options)
    if not active():
        return function(*inputs, **options)
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=_same_attention, **options)


def saved(evaluate: Callable[[], object]) -> Saved:
    """Counts what an evaluation would keep, each storage once, and keeps nothing: it takes a plain forward's memory.

    What lives on after it, such as weights, does not count. It works on every device, also on `meta`, where no forward
    is computed. What `evaluate` gives is dropped.
    """
    count = _MODE.count = _Count()
    try:
        with torch.enable_grad(), saved_tensors_hooks(count.outside.add, _never):
            evaluate()
    finally:
        _MODE.count = None
    gc.collect()  # a graph that a circle of references keeps would pass for weights
    return count.found()


class _Storages:
    """The storages of tensors, which are not kept alive."""

    def __init__(self) -> None:
        self.bytes: dict[int, tuple[StorageWeakRef, int]] = {}  # a weak reference keeps its number from being reused

    def add(self, tensor: Tensor) -> None:
        """A tensor is saved."""
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            self.bytes.setdefault(reference.cdata, (reference, storage.nbytes()))


class _Count:
    """What a graph saves, region by region."""

    def __init__(self) -> None:
        self.outside, self._inputs = _Storages(), _Storages()
        self._inside, self._within = list[_Storages](), False

    def region(self, function: Callable[..., Any], inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if self._within or not torch.is_grad_enabled():  # a region's own regions are part of it
            return function(*inputs, **options)
        for value in tree_leaves((inputs, options)):
            if isinstance(value, Tensor):
                self._inputs.add(value)
        self._inside.append(own := _Storages())
        self._within = True
        try:
            with saved_tensors_hooks(own.add, _never):
                return function(*inputs, **options)
        finally:
            self._within = False

    def found(self) -> Saved:
        kept = _gone(self.outside, self._inputs)
        inside = [_gone(one) for one in self._inside]
        besides = [sum(size for key, size in one.items() if key not in kept) for one in inside]
        whole = _gone(self.outside, *self._inside)
        return Saved(sum(whole.values()), sum(kept.values()), max(besides, default=0))


def _gone(*groups: _Storages) -> dict[int, int]:
    """The bytes of storages that are no longer there: what lives on does so without the graph."""
    both = {key: found for group in groups for key, found in group.bytes.items()}
    return {key: size for key, (reference, size) in both.items() if reference.expired()}


def _never(_: Any) -> Tensor:
    raise AssertionError("nothing was kept for this backward pass: its graph was only counted")


def _same_attention() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For the forward, and for its repetition: attention by the backends that it may choose from now.

    Another backend saves other tensors, and on a GPU the backward pass runs on a thread and at a time of its own.
    """
    return nullcontext(), _attention_of(_backends())


@contextmanager
def _attention_of(wanted: list[SDPBackend]) -> Iterator[None]:
    with nullcontext() if _backends() == wanted else sdpa_kernel(wanted):
        yield


def _backends() -> list[SDPBackend]:
    allowed = torch.backends.cuda
    switches = {
        SDPBackend.FLASH_ATTENTION: allowed.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: allowed.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: allowed.math_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: allowed.cudnn_sdp_enabled(),
    }
    return [backend for backend, on in switches.items() if on]
