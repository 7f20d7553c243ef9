"""The slots of one image size: how many there are, who was promised how many, and who holds which.

A request is admitted when the pool can promise it as many slots as its method needs to go on. It may hold more while
nobody else is promised them. So memory is bounded, and every request that was admitted can always take its next step.
"""

from __future__ import annotations


class Pool:
    """At most `slots` particles of one geometry; the storage itself is the device's."""

    def __init__(self, slots: int):
        self.slots, self.promised = slots, 0
        self._free = list(range(slots - 1, -1, -1))

    @property
    def live(self) -> int:
        """How many slots are in use."""
        return self.slots - len(self._free)

    def lease(self, promise: int) -> Lease | None:
        """A lease with a promise of that many slots, or None while they are promised to others."""
        return Lease(self, promise) if self.reserve(promise) else None

    def reserve(self, count: int) -> bool:
        """Promises `count` slots, if that many are not promised yet; says whether it did."""
        if self.promised + count > self.slots:
            return False
        self.promised += count
        return True

    def unreserve(self, count: int) -> None:
        """Takes a promise back."""
        self.promised -= count

    def take(self) -> int:
        """A free slot. There is one for everybody who was promised one."""
        if not self._free:
            raise RuntimeError(f"all {self.slots} slots of the pool are in use: a fault of rollflow")
        return self._free.pop()

    def give_back(self, index: int) -> None:
        """Frees a slot."""
        self._free.append(index)


class Lease:
    """The slots that one request holds: as many as it was promised, and more while there are any to spare.

    Attributes:
        promise: how many it can always have.
    """

    __slots__ = ("_extra", "_held", "_pool", "promise")

    def __init__(self, pool: Pool, promise: int):
        self._pool, self.promise = pool, promise
        self._held, self._extra = set[int](), 0  # slots beyond the promise, each reserved by itself

    @property
    def held(self) -> int:
        """How many slots it holds."""
        return len(self._held)

    def take(self, within: bool = True) -> Slot | None:
        """A slot, or None where it holds all it may and there is none to spare.

        Args:
            within: whether the slot may be one of the promised ones; rows that run ahead take spare slots alone.
        """
        if not (within and len(self._held) < self.promise + self._extra):
            if not self._pool.reserve(1):
                return None
            self._extra += 1
        index = self._pool.take()
        self._held.add(index)
        return Slot(self, index)

    def give_back(self, index: int) -> None:
        """Gives one slot back, unless all were given back before."""
        if index in self._held:
            self._held.remove(index)
            self._pool.give_back(index)
            if self._extra:
                self._extra -= 1
                self._pool.unreserve(1)

    def close(self) -> None:
        """Gives every slot and the promise back, whoever may still refer to them."""
        held, self._held = self._held, set()  # first: a slot that the garbage collector drops meanwhile finds nothing
        for index in held:
            self._pool.give_back(index)
        self._pool.unreserve(self.promise + self._extra)
        self.promise = self._extra = 0


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
