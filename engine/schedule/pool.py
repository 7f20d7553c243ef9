"""The slots of one image size: how many there are, who was promised how many, and who holds which.

A request is admitted when the pool can promise it as many slots as its method needs to go on. It may hold more while
nobody else is promised them. So memory is bounded, and every request that was admitted can always take its next step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial


class Pool:
    """At most `slots` particles of one geometry; the storage itself is the device's.

    The loop's thread owns it. A slot whose last reference is dropped may be on any thread (the garbage collector runs
    wherever it likes): such slots only join a queue, and the loop's thread takes them back when it next looks.
    """

    def __init__(self, slots: int):
        self.slots, self.promised = slots, 0
        self._free = list(range(slots - 1, -1, -1))
        self.dropped: deque[tuple[Lease, int]] = deque()

    @property
    def live(self) -> int:
        """How many slots are in use."""
        self.collect()
        return self.slots - len(self._free)

    def drop(self, lease: Lease, index: int) -> None:
        """Nobody refers to a slot any more; of any thread."""
        self.dropped.append((lease, index))

    def collect(self) -> None:
        """Takes back the slots that were dropped."""
        while self.dropped:
            lease, index = self.dropped.popleft()
            lease.give_back(index)

    def lease(self, promise: int) -> Lease | None:
        """A lease with a promise of that many slots, or None while they are promised to others."""
        return Lease(self, promise) if self.reserve(promise) else None

    def reserve(self, count: int) -> bool:
        """Promises `count` slots, if that many are not promised yet; says whether it did."""
        self.collect()
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

    __slots__ = ("_extra", "_held", "_late", "_pins", "_pool", "promise")

    def __init__(self, pool: Pool, promise: int):
        self._pool, self.promise = pool, promise
        self._held, self._extra = set[int](), 0  # slots beyond the promise, each reserved by itself
        self._pins: dict[int, int] = {}  # slots that something else reads, and how often
        self._late: set[int] = set()  # those of them that are to go back

    @property
    def excess(self) -> int:
        """How many slots it holds beyond its promise; negative while it may take more."""
        self._pool.collect()
        return len(self._held) - self.promise

    def take(self, within: bool = True) -> Slot | None:
        """A slot, or None where it holds all it may and there is none to spare.

        Args:
            within: whether the slot may be one of the promised ones; rows that run ahead take spare slots alone.
        """
        if self._pool.dropped:
            self._pool.collect()
        if not (within and len(self._held) < self.promise + self._extra):
            if not self._pool.reserve(1):
                return None
            self._extra += 1
        index = self._pool.take()
        self._held.add(index)
        return Slot(self, index)

    def extend(self, promise: int) -> bool:
        """Raises its promise to at least that many slots; False where they are promised to others."""
        more = promise - self.promise
        if more > 0 and not self._pool.reserve(more):
            return False
        self.promise = max(self.promise, promise)
        return True

    def give_back(self, index: int) -> None:
        """Gives one slot back, unless all were given back before; a pinned one as soon as it is not pinned any more."""
        if index in self._pins:
            self._late.add(index)
        elif index in self._held:
            self._held.remove(index)
            self._pool.give_back(index)
            if self._extra:
                self._extra -= 1
                self._pool.unreserve(1)

    def drop(self, index: int) -> None:
        """Nobody refers to one of its slots any more; of any thread."""
        self._pool.drop(self, index)

    def pin(self, index: int) -> None:
        """Keeps a slot as it is while something else reads it."""
        self._pins[index] = self._pins.get(index, 0) + 1

    def unpin(self, index: int) -> None:
        """Ends what `pin` began; the slot goes back if it was given back meanwhile."""
        self._pins[index] -= 1
        if not self._pins[index]:
            del self._pins[index]
            if index in self._late:
                self._late.remove(index)
                self.give_back(index)

    def close(self) -> None:
        """Gives every slot and the promise back, whoever may still refer to them; pinned ones follow later."""
        self._pool.collect()
        for index in self._held - self._pins.keys():
            self._pool.give_back(index)
        self._held &= self._pins.keys()
        self._late = {*self._held}
        self._pool.unreserve(self.promise + self._extra - len(self._held))
        self.promise, self._extra = 0, len(self._held)


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

    def pin(self) -> Callable[[], None]:
        """Keeps the place as it is, whoever gives it back, until the function that it returns is called."""
        lease, index = self._lease, self.index
        if lease is None:
            return _nothing
        lease.pin(index)
        return partial(lease.unpin, index)

    def __del__(self) -> None:
        if self._lease is not None:
            self._lease.drop(self.index)


def _nothing() -> None:
    pass
