"""A pipeline's networks, borrowed: in eval mode, without gradients of weights; and given back as they were.

Those of diffusers mark their blocks for `rollflow.models.recompute` meanwhile, by their own gradient checkpointing.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rollflow.models import recompute


class Removable(Protocol):
    """A handle of what is done to a network."""

    def remove(self) -> None:
        """Undoes it."""
        ...


Hooks = Callable[[], Sequence[Removable]]


def networks_of(pipeline: Any) -> dict[str, nn.Module]:
    """The parts of a pipeline that are networks, by name."""
    return {name: part for name, part in vars(pipeline).items() if isinstance(part, nn.Module)}


@dataclass
class _Lent:
    """What was changed of one network, and how many hold it.

    Modules are referred to weakly: this is kept by the network, which is one of them.
    """

    holders: int = 0
    trained: list[weakref.ref[nn.Module]] = field(default_factory=list)
    differentiable: list[nn.Parameter] = field(default_factory=list)
    strides: list[tuple[Tensor, tuple[int, ...]]] = field(default_factory=list)
    marked: list[tuple[weakref.ref[nn.Module], dict[str, Any]]] = field(default_factory=list)

    def take(self, network: nn.Module, channels_last: bool) -> None:
        """Changes what is not yet as a model needs it."""
        self.holders += 1
        self.trained += [weakref.ref(module) for module in network.modules() if module.training]
        network.eval()
        for parameter in network.parameters():
            if parameter.requires_grad:
                self.differentiable.append(parameter)
                parameter.requires_grad_(False)
        if getattr(network, "_supports_gradient_checkpointing", False):  # diffusers' declaration
            for module in network.modules():
                if getattr(module, "gradient_checkpointing", None) is False:  # True: somebody's own
                    own_marks = {name: value for name, value in vars(module).items() if name in _MARKS}
                    self.marked.append((weakref.ref(module), own_marks))
                    vars(module).update(zip(_MARKS, (recompute.WANTED, recompute.region), strict=True))
        if channels_last:
            known = {id(tensor) for tensor, _ in self.strides}
            before = [(tensor, tensor.stride()) for tensor in _tensors(network) if tensor.ndim == 4]
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.strides += [(t, own) for t, own in before if t.stride() != own and id(t) not in known]

    def give_back(self) -> bool:
        """Undoes that once nobody holds the network; says whether it did."""
        self.holders -= 1
        if self.holders:
            return False
        for reference in self.trained:
            if (module := reference()) is not None:
                module.training = True
        for parameter in self.differentiable:
            parameter.requires_grad_(True)
        for reference, own_marks in self.marked:
            if (module := reference()) is not None and vars(module).get(_MARKS[0]) is recompute.WANTED:
                vars(module).update(own_marks)
                for name in {*_MARKS} - {*own_marks}:
                    vars(module).pop(name, None)
        for tensor, own in self.strides:
            if tensor.ndim == len(own) and tensor.stride() != own:
                data = tensor.data
                tensor.data = torch.empty_strided(data.shape, own, dtype=data.dtype, device=data.device).copy_(data)
        return True


class Borrowed:
    """Networks that a model works with while engines run on it.

    They are in eval mode and their weights have no gradients; some have their weights laid out channels last. What was
    changed goes back when the last who holds a network gives it back, of all models and engines of the process; what
    others changed meanwhile stays.

    A model borrows when it is made. `borrow` and `give_back` are for the capability `returns` of a model, one pair an
    engine; with the last engine everything goes back, and at the latest when the model is collected.

    Args:
        owner: the model.
        networks: what it works with; not kept alive.
        channels_last: those of them whose weights are laid out channels last.
        hooks: registers hooks and returns their handles; it must not refer to the model.

    Attributes:
        held: whether they are borrowed.
    """

    def __init__(
        self,
        owner: object,
        networks: Iterable[nn.Module],
        channels_last: Iterable[nn.Module] = (),
        hooks: Hooks | None = None,
    ):
        laid_out = {id(network) for network in channels_last}
        self._networks = [(weakref.ref(one), id(one) in laid_out) for one in dict.fromkeys(networks)]
        self._hooks, self._handles, self._engines = hooks, list[Removable](), 0
        self.held = False
        self._take()
        weakref.finalize(owner, self._return).atexit = False

    def borrow(self) -> None:
        """An engine begins to work with them."""
        with _LOCK:
            self._take()
            self._engines += 1

    def give_back(self) -> None:
        """An engine is done with them, or whoever made the model."""
        with _LOCK:
            self._engines = max(0, self._engines - 1)
            if not self._engines:
                self._return()

    def lent(self) -> AbstractContextManager[None]:
        """Holds them for a call of the model by others than engines, after the last engine gave them back."""
        return nullcontext() if self.held else self

    def __enter__(self) -> None:
        self.borrow()

    def __exit__(self, *_: object) -> None:
        self.give_back()

    def _take(self) -> None:
        with _LOCK, torch.inference_mode(False):
            if self.held:
                return
            self.held = True
            for reference, laid_out in self._networks:
                if (network := reference()) is not None:
                    _LENT.setdefault(network, _Lent()).take(network, laid_out)
            try:
                self._handles = [] if self._hooks is None else list(self._hooks())
            except BaseException:
                self._return()
                raise

    def _return(self) -> None:
        with _LOCK, torch.inference_mode(False):  # a model may be collected anywhere
            if not self.held:
                return
            self.held = False
            for handle in self._handles:
                handle.remove()
            self._handles = []
            for reference, _ in self._networks:
                network = reference()
                if network is not None and network in _LENT and _LENT[network].give_back():
                    del _LENT[network]


_MARKS = ("gradient_checkpointing", "_gradient_checkpointing_func")  # what diffusers' networks call their blocks by
_LENT: weakref.WeakKeyDictionary[nn.Module, _Lent] = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()  # of a thread that may collect a model while it holds it


def _tensors(network: nn.Module) -> list[Tensor]:
    """Those whose memory format `Module.to` changes."""
    parameters = list(network.parameters())
    return [*parameters, *(p.grad for p in parameters if p.grad is not None), *network.buffers()]
