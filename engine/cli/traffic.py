"""Counts the bytes that operators read and write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GATHERS = ("embedding", "index", "index_select", "gather")  # read as much of their first tensor as they give
ONLY_WRITE = ("copy_", "fill_", "zero_")  # what they change they do not read
NOT_WRITTEN = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")


class Traffic(TorchDispatchMode):
    """Counts, within it, what operators of torch take from memory and put there; views and empty tensors are free.

    Tensors that were there before, such as parameters and inputs, count once, however often they are read; so do parts
    of them. Those that are made within it count each time they are read or written: as much as moves where each
    operator runs by itself and no cache holds anything. A network that is fused, or fits a cache, moves less.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0  # bytes of tensors that are made within it
        self._there: dict[int, dict[tuple[int, int], int]] = {}  # by storage, bytes by place and number of elements
        self._sizes: dict[int, int] = {}  # of those storages
        self._made: set[int] = set()

    @property
    def there(self) -> int:
        """Bytes that are read of what was there before."""
        return sum(min(sum(parts.values()), self._sizes[key]) for key, parts in self._there.items())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator and counts what it moves."""
        made = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        places = {_place(tensor) for tensor in read}
        if func._schema.is_mutable:
            given = {**dict(enumerate(args)), **(kwargs or {})}
            changed = [
                given.get(argument.name, given.get(i))
                for i, argument in enumerate(func._schema.arguments)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            written = [leaf for leaf in tree_leaves(changed) if isinstance(leaf, Tensor)]
            if name in ONLY_WRITE or func._overloadname.endswith("out"):
                read = [tensor for tensor in read if all(tensor is not one for one in written)]
        elif written and all(_place(tensor) in places for tensor in written):
            return made  # a view
        for i, tensor in enumerate(read):
            self._read(tensor, sum(map(size_of, written)) if i == 0 and name in GATHERS else size_of(tensor))
        for tensor in written:
            if name not in NOT_WRITTEN:
                self.moved += size_of(tensor)
            if not func._schema.is_mutable:  # its address may be that of something which is gone
                self._made.add(_place(tensor))
        return made

    def _read(self, tensor: Tensor, size: int) -> None:
        place = _place(tensor)
        if place in self._made:
            self.moved += size
            return
        parts = self._there.setdefault(place, {})
        part = int(tensor.storage_offset()), tensor.numel()
        parts[part] = max(size, parts.get(part, 0))
        self._sizes[place] = tensor.untyped_storage().nbytes()


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; those that are one and the same in memory count once."""
    many = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        many *= size if stride or not size else 1
    return many


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def bytes_of(work: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that work moves at least, of what was there before and of its results, and at most, with all that operators
    hand to each other; see `Traffic`."""
    with Traffic() as traffic:
        made = work()
    results = sum(size_of(leaf) for leaf in tree_leaves(made) if isinstance(leaf, Tensor))
    return traffic.there + results, traffic.there + traffic.moved
