"""A worker in this process: an engine of its own threads."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from rollflow.engine import Engine
from rollflow.errors import RollflowError, said, told
from rollflow.serve.messages import Message
from rollflow.serve.station import Station

GRACE = 10.0  # seconds that a closed engine has to end
LOG = logging.getLogger("rollflow")


class LocalChannel:
    """Runs searches on an engine in this process; a `Channel`.

    Args:
        engine: an engine, which stays the caller's to close, or a function that makes one, again after a death.
        warm_up: measure batches before the worker is ready.
    """

    def __init__(self, engine: Engine | Callable[[], Engine], warm_up: bool = True):
        self._given, self._warm_up = engine, warm_up
        self._station: Station | None = None
        self._on_death: Callable[[str], None] | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return "local"

    def start(self, on_message: Callable[[Message], None], on_death: Callable[[str], None]) -> None:
        """See `Channel`."""
        self._on_death = on_death
        threading.Thread(target=self._start, args=(on_message, on_death), name="rollflow-start", daemon=True).start()

    def _start(self, on_message: Callable[[Message], None], on_death: Callable[[str], None]) -> None:
        try:
            engine = self._given if isinstance(self._given, Engine) else self._given()
        except RollflowError as error:
            on_message(Message({"op": "unfit", "error": told(error)}))
            return
        except Exception as error:
            LOG.exception("a worker's engine could not be made")
            self._dead(said(error), on_death)
            return
        station = Station(engine, on_message, lambda reason: self._dead(reason, on_death))
        with self._lock:
            wanted = self._on_death is on_death
            if wanted:
                self._station = station
        if wanted:
            station.open(self._warm_up)
        else:
            self._end(station)

    def send(self, message: Message) -> None:
        """See `Channel`."""
        station = self._station
        if station is not None:
            station.take(message)

    def kill(self) -> None:
        """See `Channel`: the engine is given up; its threads end when what they wait for comes back."""
        if (on_death := self._on_death) is not None:
            self._dead("it did not answer", on_death)

    def close(self) -> None:
        """See `Channel`."""
        with self._lock:
            station, self._station, self._on_death = self._station, None, None
        if station is not None:
            self._ending(station).join(GRACE)

    def _dead(self, reason: str, on_death: Callable[[str], None]) -> None:
        with self._lock:
            if self._on_death is not on_death:
                return
            station, self._station, self._on_death = self._station, None, None
        if station is not None:
            self._ending(station)
        on_death(reason)

    def _ending(self, station: Station) -> threading.Thread:
        """Ends a station on a thread: a call of a reward or a method may not come back."""
        thread = threading.Thread(target=self._end, args=(station,), name="rollflow-end", daemon=True)
        thread.start()
        return thread

    def _end(self, station: Station) -> None:
        if isinstance(self._given, Engine):
            station.leave()
        else:
            station.close()
