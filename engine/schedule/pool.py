"""The slots of a particle pool, and who holds them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class Lease:
    """The places of a pool that one request holds."""

    def __init__(self, pool: ParticlePool):
        self._pool, self._held = pool, set[int]()

    def take(self) -> Slot:
        """A free place."""
        index = self._pool.take()
        self._held.add(index)
        return Slot(self, index)

    def give_back(self, index: int) -> None:
        """Gives one place back, unless all were given back before."""
        if index in self._held:
            self._held.remove(index)
            self._pool.give_back(index)

    def close(self) -> None:
        """Gives every place back, whoever may still refer to it."""
        while self._held:
            self._pool.give_back(self._held.pop())


class Slot:
    """Ownership of one place in a pool; dropping the last reference gives the place back."""

    __slots__ = ("_lease", "index")

    def __init__(self, lease: Lease, index: int):
        self._lease: Lease | None = lease
        self.index = index

    def release(self) -> None:
        """Gives the place back, whoever may still refer to it."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.give_back(self.index)

    __del__ = release


class ParticlePool:
    """Preallocated state of at most `slots` particles of one geometry.

    Args:
        slots: how many particles can live at once; the memory is `slots * token * channel * 8` bytes.
        token, channel: the shape of one latent.
        device: where the storage is.
    """

    def __init__(self, slots: int, token: int, channel: int, device: torch.device):
        self.slots = slots
        self.x: Float[Tensor, "slot token channel"] = torch.zeros(slots, token, channel, device=device)
        self.u: Float[Tensor, "slot token channel"] = torch.zeros(slots, token, channel, device=device)
        self._free = list(range(slots - 1, -1, -1))
        self._promised = 0

    @property
    def live(self) -> int:
        """How many slots are in use."""
        return self.slots - len(self._free)

    def take(self) -> int:
        """A free slot. Running out is an engine error: admission promises slots before they are needed."""
        if not self._free:
            raise RuntimeError(f"all {self.slots} slots of the particle pool are in use: admission promised too many")
        return self._free.pop()

    def give_back(self, index: int) -> None:
        """Frees a slot."""
        self._free.append(index)

    def reserve(self, count: int) -> bool:
        """Promises `count` slots to a request if that many are not promised yet; says whether it did."""
        if self._promised + count > self.slots:
            return False
        self._promised += count
        return True

    def unreserve(self, count: int) -> None:
        """Takes a promise back when its request is over."""
        self._promised -= count
