"""How many searches may wait, how much work they may be, and how long that would take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rollflow.errors import EngineBusy
from rollflow.serve.orders import Ordered
from rollflow.serve.roster import WorkerState


class Room:
    """Counts the searches that wait and those that enter: that are being checked, or written to the journal.

    Args:
        most: searches that may wait.
        most_nfe: NFE of those that wait; None: any number. One request alone, of one image or several, may be more.
        active: searches that were accepted and are not over, by id.
        workers: who works on them.
        clock: seconds.
    """

    def __init__(
        self,
        most: int,
        most_nfe: int | None,
        active: Mapping[str, Ordered],
        workers: Sequence[WorkerState],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._most, self._most_nfe = most, most_nfe
        self._active, self._workers, self._clock = active, workers, clock
        self._entering: dict[str, tuple[int, object]] = {}  # NFE by id, 0 until it is known, and of what request
        self._rate = 0.0

    def __contains__(self, id: str) -> bool:
        """Whether a search is entering."""
        return id in self._entering

    def __len__(self) -> int:
        """How many are entering."""
        return len(self._entering)

    @contextmanager
    def entering(self, id: str, of: object = None) -> Iterator[None]:
        """Inside of the context a search counts although it was not accepted yet.

        Args:
            id: of the search.
            of: the request that it is of, with others; None: one of its own.

        Raises:
            EngineBusy: too many wait.
        """
        self.reserve(id, 0, of)
        try:
            yield
        finally:
            del self._entering[id]

    def reserve(self, id: str, nfe: int, of: object = None) -> None:
        """Counts the NFE of one that is entering; those of the same request are not in its way.

        Raises:
            EngineBusy: it would be one too many; its `seconds` say when to come again.
        """
        waiting = [order for order in self._active.values() if order.status == "queued"]
        others = [entering for one, entering in self._entering.items() if one != id]
        queued = len(waiting) + len(others)
        queued_nfe = sum(order.left for order in waiting if of is None or order.of is not of)
        queued_nfe += sum(count for count, its in others if of is None or its is not of)
        if queued >= self._most:
            raise EngineBusy(f"{queued} searches wait already, and at most {self._most} may: come again", self.wait())
        if self._most_nfe is not None and queued_nfe and queued_nfe + nfe > self._most_nfe:
            own = f"nfe={nfe}: " if nfe else ""
            raise EngineBusy(
                f"{own}searches of {queued_nfe} NFE wait already, and at most {self._most_nfe} may: come again",
                self.wait(),
            )
        self._entering[id] = nfe, of

    def expected(self, request: Mapping[str, Any], nfe: int) -> int:
        """NFE of a request; of one that names a time alone, what a worker does in it at the measured rate."""
        seconds = request.get("seconds")
        if seconds is None or request.get("nfe") is not None:
            return nfe
        rates = [rate for rate in self._rates() if rate]
        return max(1, round(seconds * sum(rates) / len(rates))) if rates else nfe

    def wait(self) -> float:
        """Seconds until all that is here is done, at the measured rate."""
        self._rate = sum(self._rates()) or self._rate
        left = sum(order.left for order in self._active.values())
        return max(1.0, left / self._rate) if self._rate else 1.0

    def _rates(self) -> list[float]:
        now = self._clock()
        return [worker.now(now).nfe_per_second for worker in self._workers]
