"""A station: one engine behind plain messages, in whatever process it is.

It takes `run` (a search), `cancel`, `check` (whether a request can be honoured, and its NFE) and `peek` (the best image
so far), and sends `ready`, `news` of all searches together some times a second, `over` once for each search, `answer`
to a check or a peek, and `dead` when the engine can do no more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from rollflow import entries, pictures, wire
from rollflow.engine import Engine
from rollflow.errors import Cancelled, EngineClosed, EngineDead, RollflowError, said, told
from rollflow.job import Job
from rollflow.serve.flight import Flight
from rollflow.serve.messages import Message
from rollflow.serve.pool import Pool

PACE = 0.1  # seconds between messages of news, at least
BEAT = 0.5  # seconds between messages of news, at most, and between looks at the engine
PATIENCE = 30.0  # seconds that an image may take
REMEMBERED = 4096  # cancels of searches that have not come yet
LOG = logging.getLogger("rollflow")


class Station:
    """Runs searches that messages ask for.

    Args:
        engine: its engine.
        send: takes its messages, on any thread but one at a time.
        on_dead: is called once, on any thread, when the engine can do no more, with the reason.
        clock: seconds.
    """

    def __init__(
        self,
        engine: Engine,
        send: Callable[[Message], None],
        on_dead: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.engine, self._send, self._on_dead, self._clock = engine, send, on_dead, clock
        self._flights: dict[str, Flight] = {}
        self._changed: dict[str, None] = {}
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._wake, self._stop = threading.Event(), threading.Event()
        self._ticked, self._stats, self._told_dead = clock(), dict[str, Any](), False
        self._parting: dict[str, tuple[Flight, Job, float]] = {}  # cancelled, with what is in flight; until when
        self._cancelled: dict[str, None] = {}  # of searches that are not known yet: calls may overtake one another
        self._doors = Pool(4, "rollflow-door")  # a check may take seconds
        self._encoders = Pool(2, "rollflow-encoder")
        self._looks = Pool(2, "rollflow-look")
        self._loops = [
            threading.Thread(target=run, name=f"rollflow-{run.__name__.strip('_')}", daemon=True)
            for run in (self._pump, self._tick)
        ]

    def open(self, warm_up: bool = True) -> None:
        """Warms the engine up and says `ready`, or with the reason `unfit`, on another thread; returns at once."""
        for loop in self._loops:
            loop.start()
        self._doors.submit(partial(self._guarded, self._open, warm_up))

    def take(self, message: Message) -> None:
        """Takes a message, on any thread; returns at once."""
        header = message.header
        id = str(header.get("id", ""))
        with self._lock:
            if self._stop.is_set():
                return
            if header["op"] == "run":
                flight = self._flights[id] = Flight(id)
                flight.cancelled = id in self._cancelled
                self._cancelled.pop(id, None)
                self._doors.submit(partial(self._guarded, self._run, flight, header))
            elif header["op"] == "cancel":
                if (known := self._flights.get(id)) is not None:
                    known.cancelled = True
                    self._doors.submit(partial(self._guarded, self._cancel, known))
                else:
                    self._cancelled[id] = None
                    if len(self._cancelled) > REMEMBERED:
                        del self._cancelled[next(iter(self._cancelled))]
            elif header["op"] == "check":
                self._doors.submit(partial(self._guarded, self._answer, header, partial(self._check, header)))
            elif header["op"] == "peek":
                self._looks.submit(partial(self._guarded, self._answer, header, partial(self._peek, id)))

    def leave(self) -> None:
        """Ends it, cancels its searches and leaves the engine; sends nothing from now on."""
        with self._lock:
            self._stop.set()
            flights = [*self._flights.values()]
        self._wake.set()
        for pool in (self._doors, self._encoders, self._looks):
            pool.close()
        for flight in flights:
            self._cancel(flight)

    def close(self) -> None:
        """`leave`, and closes the engine."""
        self.leave()
        self.engine.close(drain=False)

    # What it is asked for.

    def _open(self, warm_up: bool) -> None:
        try:
            if warm_up:
                self.engine.warm_up()
                self.engine.ledger.reserve()
        except (EngineDead, EngineClosed):
            raise
        except RollflowError as error:
            self._post({"op": "unfit", "error": told(error)})
            return
        self._post({"op": "ready", "stats": self._look()})

    def _check(self, header: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        checked = self.engine.check(wire.from_json(header["request"], self.engine.clock))
        return {"nfe": checked.nfe}, b""

    def _peek(self, id: str) -> tuple[dict[str, Any], bytes]:
        flight = self._flights.get(id)
        update = None if flight is None or flight.job is None else flight.job.update
        image = None if update is None else update.image(PATIENCE)
        return {}, b"" if image is None else pictures.png(image)

    def _answer(self, header: dict[str, Any], work: Callable[[], tuple[dict[str, Any], bytes]]) -> None:
        """Sends what a call gave or raised; a fault of the call is an answer, too."""
        try:
            found, payload = work()
        except (EngineDead, EngineClosed):
            raise
        except Exception as error:
            found, payload = {"error": told(error)}, b""
        self._post({"op": "answer", "call": header["call"], **found}, payload)

    def _run(self, flight: Flight, header: dict[str, Any]) -> None:
        try:
            request = wire.from_json(header["request"], self.engine.clock)
            replay = entries.read(header["replay"]) if header.get("replay") else None
            job = self.engine.submit(request, id=flight.id, replay=replay)
        except (EngineDead, EngineClosed):
            raise
        except Exception as error:
            self._end(flight, {"status": "failed", "error": told(error)})
            return
        flight.job = job
        flight.watched = job.watched(partial(self._touch, flight.id))
        flight.watched.__enter__()
        self._touch(flight.id)
        if flight.cancelled:
            job.cancel()
        job.add_done_callback(partial(self._done, flight))

    def _cancel(self, flight: Flight) -> None:
        if flight.job is not None:
            flight.job.cancel()

    def _done(self, flight: Flight, job: Job) -> None:
        """On the engine's thread for callbacks: the result is written elsewhere."""
        if flight.watched is not None:
            flight.watched.__exit__(None, None, None)
        if not job.cancelled():
            self._encoders.submit(partial(self._guarded, self._over, flight, job))
            return
        with self._lock:  # its best is known when the calls that it was in come back: no thread waits for them
            self._parting[flight.id] = flight, job, self._clock() + PATIENCE
        job._best.add_done_callback(lambda _: self._part(flight.id))

    def _part(self, id: str) -> None:
        """Ends a search that was cancelled, once: with its best, or without one where that did not come in time."""
        with self._lock:
            flight, job, _ = self._parting.pop(id, (None, None, 0.0))
        if flight is not None and job is not None:
            self._encoders.submit(partial(self._guarded, self._over, flight, job))

    def _part_late(self) -> None:
        now = self._clock()
        with self._lock:
            late = [id for id, (_, _, until) in self._parting.items() if now >= until]
        for id in late:
            self._part(id)

    def _over(self, flight: Flight, job: Job) -> None:
        error = job.exception()
        if isinstance(error, EngineDead | EngineClosed):  # the search has not failed: it is for another worker
            raise error
        outcome: dict[str, Any] = {"status": job.status}
        payload = b""
        if error is not None:
            outcome["error"] = told(error)
        try:
            result = job.best(0) if isinstance(error, Cancelled) else job.result() if error is None else None
            if result is not None:
                kind, payload = pictures.written(result)
                described = pictures.described(result, kind)
                outcome["result"] = {**described, "seconds": job.spent + described["seconds"]}
        except (EngineDead, EngineClosed):
            raise
        except Exception as fault:  # what a cancelled search has found, or an image that cannot be written
            outcome = {"status": job.status if error else "failed", "error": outcome.get("error", told(fault))}
        self._end(flight, outcome, payload)

    def _end(self, flight: Flight, outcome: dict[str, Any], payload: bytes = b"") -> None:
        """Sends the one end of a search, with all its improvements; no news of it come later."""
        with self._sending:
            with self._lock:
                self._flights.pop(flight.id, None)
            if flight.job is not None:
                found, update = flight.improvements(anew=True), flight.job.update
                seconds, level = (0.0, 0) if update is None else (flight.job.spent + update.seconds, update.level)
                outcome |= {"nfe": flight.nfe, "best": flight.best, "level": level, "seconds": seconds}
                outcome["better"] = [[*one, seconds] for one in found]
            self._out({"op": "over", "id": flight.id, **outcome}, payload)

    # News.

    def _touch(self, id: str) -> None:
        """On the engine's loop, for each reward."""
        with self._lock:
            self._changed[id] = None
        if not self._wake.is_set():
            self._wake.set()

    def _pump(self) -> None:
        """One thread sends what is new of all searches, so that messages are few however many rewards come."""
        last = self._clock()
        while not self._stop.is_set():
            self._wake.wait(BEAT)
            self._wake.clear()
            if self._parting:
                self._guarded(self._part_late)
            beats = self._clock() - last >= BEAT
            if self._changed or beats:
                last = self._clock() if beats else last
                self._guarded(self._tell, beats)
            self._stop.wait(PACE)

    def _tell(self, beats: bool) -> None:
        header: dict[str, Any] = {"op": "news", "age": self._clock() - self._ticked}
        if beats:
            header["stats"] = self._stats
        with self._sending:
            with self._lock:
                changed, self._changed = self._changed, {}
                flights = [self._flights.get(id) for id in changed]
            news = {flight.id: flight.news() for flight in flights if flight is not None and flight.job is not None}
            self._out({**header, "searches": news})

    def _tick(self) -> None:
        """Asks the engine's loop again and again: what is alive answers."""
        while not self._stop.is_set():
            self._guarded(self._look)
            self._stop.wait(BEAT)

    def _look(self) -> dict[str, Any]:
        stats = self.engine.stats()
        self._ticked = self._clock()
        ran = dict(self.engine.ledger.executed)
        rewards = {name: [cost.calls, cost.images, cost.seconds] for name, cost in stats.rewards.items()}
        self._stats = {
            "queued": stats.queued, "running": stats.running, "free": stats.free, "live": stats.live,
            "nfe_per_second": stats.nfe_per_second, "ran": ran, "rewards": rewards,
        }  # fmt: skip
        if not stats.healthy and not self._stop.is_set():
            raise EngineDead("the engine takes no more requests")
        return self._stats

    def _guarded(self, work: Callable[..., Any], *args: Any) -> None:
        """Does something on a thread of its own: the engine's death ends the station, a fault of ours is logged."""
        try:
            work(*args)
        except (EngineDead, EngineClosed) as error:
            self._die(str(error))
        except Exception as error:
            if not self._stop.is_set():
                LOG.exception("a worker met a fault of rollflow")
                self._die(said(error))

    def _die(self, reason: str) -> None:
        with self._lock:
            if self._told_dead or self._stop.is_set():
                return
            self._told_dead = True
        self._post({"op": "dead", "reason": reason})
        self._stop.set()
        self._on_dead(reason)

    def _post(self, header: dict[str, Any], payload: bytes = b"") -> None:
        with self._sending:
            self._out(header, payload)

    def _out(self, header: dict[str, Any], payload: bytes = b"") -> None:
        if not self._stop.is_set():
            self._send(Message(header, payload))
