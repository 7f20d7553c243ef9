"""Runs the lines of a file through a desk, a window of them at a time, and writes what becomes of each."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

from rollflow.errors import EngineBusy, EngineClosed, EngineDead, RequestError, RewardUnavailable, RollflowError, raised
from rollflow.serve.dispatcher import Unready
from rollflow.serve.formats import COLUMNS
from rollflow.serve.lines import Line, asked, lines
from rollflow.serve.shards import Counts, Shards

LEAVES = 1000  # finished lines that are passed over before the loop may do something else
FOUND = ("reward", "held_out", "nfe", "seed", "method", "stopped", "seconds", "width", "height", "frames")
FINISHING = 2  # shards that are written at a time while searches go on
PAUSES = (1.0, 5.0, 30.0, 60.0)  # seconds before a line whose reward was not available is tried again
UNAVAILABLE = 100  # lines in a row without their reward, after which there is no use in going on
WITHOUT = 20  # times that no worker was ready for a line, after which it fails


@runtime_checkable
class Search(Protocol):
    """One search at a desk, see `rollflow.serve.desk`."""

    status: Any
    result: dict[str, Any] | None
    error: dict[str, Any] | None

    async def over(self) -> None:
        """Waits for its end."""
        ...

    async def image(self) -> bytes | None:
        """The file of its image."""
        ...


@runtime_checkable
class Desk(Protocol):
    """What runs searches, see `rollflow.serve.desk`."""

    async def submit(self, request: dict[str, Any]) -> Any:
        """Takes a request, and returns a `Search`."""
        ...


class State(NamedTuple):
    """How far a batch is.

    Attributes:
        counts: of all lines that are over, also those of before.
        total: lines of the batch.
        nfe_per_second, left: since this process began; NFE/s, and the seconds that the rest will take; None: not known.
    """

    counts: Counts
    total: int
    nfe_per_second: float | None
    left: float | None


async def run(
    desk: Desk,
    shards: Shards,
    defaults: Mapping[str, Any],
    *,
    window: int = 64,
    strict: bool = False,
    told: Callable[[State], None] = lambda state: None,
    clock: Callable[[], float] = time.monotonic,
    pauses: Sequence[float] = PAUSES,
) -> Counts:
    """Does every line of the shards' source that is not done, and returns the counts of all.

    A line whose reward is not available keeps its place in the window while it is tried again, so that an outage stops
    the batch in place of failing lines; one that gets through to `UNAVAILABLE` lines in a row ends it.

    Args:
        desk: runs the searches.
        shards: what is done, and what becomes of the rest.
        defaults: fields of requests that lines leave out.
        window: searches that are there at a time.
        strict: the first line that fails ends the batch; it does not count as done.
        told: is called when a line is over.
        clock: seconds.
        pauses: see `PAUSES`.

    Raises:
        RequestError: a line failed, and it is `strict`.
        RewardUnavailable: see above; what failed of it counts as done, see `Shards`.
        EngineClosed, EngineDead: the desk takes no more searches; what was done until then is kept.
        OSError: a file cannot be written.
    """
    disk, packing = ThreadPoolExecutor(1, "batch-disk"), ThreadPoolExecutor(FINISHING, "batch-shards")
    loop, start, before = asyncio.get_running_loop(), clock(), shards.counts
    finishing, outage = asyncio.Semaphore(FINISHING), Outage()

    async def one(line: Line) -> None:
        row, image, kind = await _tried(desk, line, defaults, pauses)
        if strict and row["error"] is not None:
            raise RequestError(f"line {line.number}: {row['error']}: mend it, or leave --strict out")
        place = await loop.run_in_executor(disk, shards.put, row, image, kind)
        outage.count(line, row)
        seconds, new = clock() - start, shards.counts.lines - before.lines
        total = shards.source.total
        rate = (shards.counts.nfe - before.nfe) / seconds if seconds > 0 else None
        left = seconds * (total - shards.counts.lines) / new if new else None
        told(State(shards.counts, total, rate, left))
        if place is not None:
            async with finishing:  # the disk does not keep up: fewer searches go on meanwhile
                await loop.run_in_executor(packing, shards.finish, place)

    pending = set[asyncio.Task[None]]()
    try:
        async for line in _missing(shards):
            pending.add(asyncio.ensure_future(one(line)))
            while len(pending) >= window:
                pending = await _some(pending)
        while pending:
            pending = await _some(pending)
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for threads in (disk, packing):  # what is being written is whole before the folder is anybody else's
            await asyncio.to_thread(threads.shutdown)
    return shards.counts


class Outage:
    """Counts lines in a row that had no reward, for as often as they were tried."""

    def __init__(self) -> None:
        self._lines = 0

    def count(self, line: Line, row: Mapping[str, Any]) -> None:
        """A line is over; raises `RewardUnavailable` where there is no use in going on."""
        if _unavailable(row):
            self._lines += 1
        elif row["error"] is None:
            self._lines = 0
        if self._lines >= UNAVAILABLE:
            raise RewardUnavailable(
                f"{self._lines} lines in a row had no reward, the last, {line.number}, since {row['error']}: when it "
                "is there again, give the same command with --retry-failed"
            )


async def _tried(
    desk: Desk, line: Line, defaults: Mapping[str, Any], pauses: Sequence[float]
) -> tuple[dict[str, Any], bytes | None, str | None]:
    """What a line gives, tried again after each pause while its reward is not available."""
    found = await _done(desk, line, defaults)
    for pause in pauses:
        if not _unavailable(found[0]):
            break
        await asyncio.sleep(pause)
        found = await _done(desk, line, defaults)
    return found


def _unavailable(row: Mapping[str, Any]) -> bool:
    return row["error_type"] == RewardUnavailable.__name__


async def _missing(shards: Shards) -> AsyncIterator[Line]:
    """The lines that are not done."""
    for i, line in enumerate(lines(shards.source.path)):
        if i % LEAVES == 0:
            await asyncio.sleep(0)
        if not shards.has(line.number):
            yield line


async def _some(pending: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    """Waits until one is over; returns the others, and raises what one raised."""
    done, others = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    return others


async def _done(desk: Desk, line: Line, defaults: Mapping[str, Any]) -> tuple[dict[str, Any], bytes | None, str | None]:
    """The row of a line, its image and what kind of file that is."""
    row = dict[str, Any].fromkeys(COLUMNS) | {"line": line.number, "id": str(line.number)}
    try:
        row["id"], request = asked(line, defaults)
        row["prompt"], row["seed"] = _text(request.get("prompt")), _seed(request.get("seed", 0))
        search = await _submitted(desk, request)
        await search.over()
        if search.status == "done" and search.result is not None:
            found = search.result
            image = await search.image()
            row |= {name: found.get(name) for name in FOUND}
            terms = found.get("terms")
            row["terms"] = None if terms is None else json.dumps(terms)
            return row, image, found.get("format", "png")
        error = raised(search.error or {"type": "EngineClosed", "message": f"the search was {search.status}"})
        if isinstance(error, EngineClosed):
            raise error
    except (EngineClosed, EngineDead):
        raise  # no fault of the line's; a search that workers died of ends with an EngineDead, too: that is one
    except RollflowError as refused:
        error = refused
    row |= {"error_type": type(error).__name__, "error": str(error)}
    return row, None, None


async def _submitted(desk: Desk, request: dict[str, Any]) -> Any:
    """Hands in a request, as often as the desk says that it is to come again; not so often where workers die of it."""
    without = 0
    while True:
        try:
            return await desk.submit(request)
        except EngineBusy as busy:
            without += isinstance(busy, Unready)
            if without > WITHOUT:
                raise
            await asyncio.sleep(min(10.0, max(0.05, busy.seconds)))


def _text(prompt: object) -> str | None:
    return prompt.encode(errors="replace").decode() if isinstance(prompt, str) else None


def _seed(seed: object) -> int | None:
    return seed if isinstance(seed, int) and not isinstance(seed, bool) and -(2**63) <= seed < 2**63 else None
