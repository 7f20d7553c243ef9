"""What must be there before a request can run: its prompt's encoding, and the costs of batches of its image size.

Both are work for a lane, done in small pieces between the batches of the requests that run already.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import Any, Literal, NamedTuple

from torch import Tensor

from rollflow.device import calibrate, moves
from rollflow.device.attempts import model_error
from rollflow.device.memory import Memory, Room, guidance
from rollflow.device.runner import Runner
from rollflow.device.workers import Lanes
from rollflow.errors import EngineClosed
from rollflow.models import Geometry
from rollflow.models.text import Text
from rollflow.schedule.cost import CostModel

ENCODED_PROMPTS = 256  # kept for later requests
Wanted = tuple[Text, Geometry | None]  # a text, and where it matters the size that it is encoded for


class Guided(NamedTuple):
    """How many guided rows of an image size fit into the memory."""

    geometry: Geometry


Need = Wanted | Geometry | Guided
Bound = Literal["time", "memory", "sizes"]  # of batch sizes
# What to do on a lane, what with its result, and what the ledger calls it.
Chore = tuple[Callable[[], Any], Callable[[Any, BaseException | None], None], str]
Steps = Generator[Callable[[], Any], Any, None]


class Preparations:
    """Encodes prompts and measures image sizes, each once.

    Args:
        runner: whose model it is.
        slots: how many particles of a geometry can live at once.
        measure: whether models of this kind can be measured at all.
        keep_buckets: whether every batch size is kept, whatever it costs.
        choose_lanes: whether the first measurement also chooses the numbers of lanes and threads.
        graphs: whether to capture CUDA graphs.
        memory: what the device says of its memory; None on a CPU.

    Attributes:
        memory, slots: the same.
        conditioning: what the model made of texts.
        costs: what batches cost, by image size.
        guided: the same of guided rows, where they have batch sizes of their own.
        bounds: why batches are no larger, by image size; see `rollflow.stats.Stats`.
        chores: work for a lane.
        changed: called when the lanes were chosen.
        pinned: whether no encoding may be forgotten, because the encoders are gone.
        closing: whether nothing more is to be prepared; of any thread.
    """

    memory: Memory | None = None

    def __init__(
        self,
        runner: Runner,
        slots: Callable[[Geometry], int],
        measure: bool,
        keep_buckets: bool,
        choose_lanes: bool,
        graphs: bool,
        memory: Memory | None = None,
    ):
        self.memory, self.bounds = memory, dict[Geometry, Bound]()
        self.runner, self.slots = runner, slots
        self._measure, self._keep, self._choose, self._graphs = measure, keep_buckets, choose_lanes, graphs
        self.conditioning: dict[Wanted, Any] = {}
        self.costs: dict[Geometry, CostModel] = {}
        self.guided: dict[Geometry, CostModel] = {}
        self.chores: deque[Chore] = deque()
        self.changed: Callable[[], None] = lambda: None
        self.pinned = self.closing = False
        self._assumed = CostModel.assumed(runner.usual)
        self._waiting: dict[Need, list[Callable[[BaseException | None], None]]] = {}

    def cost(self, geometry: Geometry, guided: bool = False) -> CostModel:
        """What batches of a geometry cost, or what is assumed before a measurement.

        Guided ones are taken to cost in proportion to plain ones: which of their sizes are fastest is all that matters.
        """
        known = self.costs.get(geometry, self._assumed)
        return self.guided.get(geometry, known) if guided else known

    def shrink(self, geometry: Geometry, rows: int, guided: bool = False) -> bool:
        """Batches of this many rows, padding included, do not fit: takes their sizes away; says whether that is new."""
        known = self.cost(geometry, guided).seconds
        if rows > max(known):  # it was on its way when another did not fit
            return False
        fitting = _up_to(rows - 1, known)
        if not fitting:  # one batch size alone: from now on the rows of half of it
            fitting = _scaled(max(1, rows // 2), known)
        if max(fitting) >= max(known):
            return False
        if guided:
            self._set_guided(geometry, fitting)
        else:
            self._set(geometry, fitting, "memory")
        return True

    def wanted(self, text: Text, geometry: Geometry | None) -> Wanted:
        """By what a conditioning is known."""
        able = self.runner.model.capabilities
        text = text if able.negative else Text(text.prompt)
        return text, geometry if able.sized_text else None

    def encoded(self, text: Text) -> bool:
        """Whether a text is known, for any size; of any thread."""
        wanted, geometry = self.wanted(text, None)
        if not self.runner.model.capabilities.sized_text:
            return (wanted, geometry) in self.conditioning
        return any(wanted == known for known, _ in [*self.conditioning])

    def known(self, text: Text, geometry: Geometry) -> Any:
        """What the model made of a text; raises `KeyError` where it is not there (any more)."""
        return self.conditioning[self.wanted(text, geometry)]

    def start(
        self, image: Tensor, mask: Tensor | None, geometry: Geometry, then: Callable[[Any, BaseException | None], None]
    ) -> None:
        """Has what a search starts from made of an image, on a lane, for `then`."""

        def told(state: Any, error: BaseException | None) -> None:
            then(state, None if error is None else model_error(error))

        self.chores.append((partial(moves.started, self.runner.model, image, mask, geometry), told, "start"))

    def company(self, conditioning: Any, guidance: float, *given: Any) -> tuple[Any, ...]:
        """The last fields of a brief: conditioning, those given, company and network rows."""
        model: Any = self.runner.model
        if not model.capabilities.companies:
            return conditioning, *given
        own = model.for_request(conditioning, guidance)
        return own, *given, model.company(own), model.network_rows(own)

    def want(self, text: Text | None, geometry: Geometry | None, then: Callable[[BaseException | None], None]) -> None:
        """Calls `then` when a text is encoded and a geometry measured, or with the error that kept it from that."""
        missing: list[Need] = []
        wanted = None if text is None else self.wanted(text, geometry)
        if geometry is not None and self._measure and geometry not in self.costs:
            missing.append(geometry)
            wanted = wanted or self._any(geometry)
        if wanted is not None and wanted not in self.conditioning:
            missing.insert(0, wanted)  # the encoding first: measurements need one
        self._need(missing, then, wanted)

    def want_guided(self, text: Text | None, geometry: Geometry, then: Callable[[BaseException | None], None]) -> None:
        """`want`, and where the device says what memory it has, how many guided rows of the geometry fit into it."""

        def wanted(error: BaseException | None) -> None:
            if error is not None or self.memory is None or geometry in self.guided:
                then(error)
            else:
                self._need([Guided(geometry)], then, None if text is None else self.wanted(text, geometry))

        self.want(text, geometry, wanted)

    def _need(
        self, missing: Sequence[Need], then: Callable[[BaseException | None], None], wanted: Wanted | None
    ) -> None:
        """Calls `then` when all that is missing was prepared, with the encoding that is wanted where one is needed."""
        if not missing:
            then(None)
            return
        left, told = set(missing), list[bool]()

        def one(need: Need, error: BaseException | None) -> None:
            left.discard(need)
            if not told and (error is not None or not left):
                told.append(True)
                then(error)

        for need in missing:
            waiting = self._waiting.setdefault(need, [])
            waiting.append(partial(one, need))
            if len(waiting) == 1:
                if isinstance(need, Geometry):
                    steps = self._measuring(need, wanted or self._any(need))
                elif isinstance(need, Guided):
                    steps = self._counting(need.geometry, wanted or self._any(need.geometry))
                else:
                    steps = self._encoding(need)
                self._advance(need, steps, None, None)

    def _any(self, geometry: Geometry) -> Wanted:
        """Any text, if possible one that is known."""
        empty = self.wanted(Text(""), geometry)
        return next((one for one in self.conditioning if one[1] == empty[1]), empty)

    def forget(self, keep: int = 0) -> None:
        """Drops all but the last encodings."""
        if not self.pinned:
            for wanted in list(self.conditioning)[: max(0, len(self.conditioning) - keep)]:
                del self.conditioning[wanted]

    def end(self) -> None:
        """Prepares nothing more, and tells those who still wait."""
        self.closing = True
        for need in [*self._waiting]:
            self._tell(need, _closed())
        self.conditioning.clear()

    def _advance(self, need: Need, steps: Steps, value: Any, error: BaseException | None) -> None:
        if self.closing:
            error = error or _closed()
        try:
            work = steps.send(value) if error is None else steps.throw(error)
        except StopIteration:
            self._tell(need, None)
        except BaseException as raised:
            self._tell(need, model_error(raised))
        else:
            kind = "measure" if isinstance(need, Geometry | Guided) else "encode"
            self.chores.append((work, partial(self._advance, need, steps), kind))

    def _tell(self, need: Need, error: BaseException | None) -> None:
        for told in self._waiting.pop(need, []):
            told(error)

    def _encoding(self, wanted: Wanted) -> Steps:
        """A text is encoded alone, so that its bits do not depend on its company."""
        (self.conditioning[wanted],) = yield partial(self._encode, wanted)
        self.forget(ENCODED_PROMPTS)

    def _encode(self, wanted: Wanted) -> list[Any]:
        model: Any = self.runner.model
        text: Any = wanted[0] if model.capabilities.negative else wanted[0].prompt
        return model.encode([text], wanted[1]) if model.capabilities.sized_text else model.encode([text])

    def _measuring(self, geometry: Geometry, wanted: Wanted) -> Steps:
        runner, model = self.runner, self.runner.model
        conditioning = yield from self._conditioning(wanted)
        plain = geometry.plain  # of which evaluations in full take as long
        if model.device.type == "cpu" and model.capabilities.recordable:
            for one in dict.fromkeys((plain, geometry)):
                yield partial(model.record, one, conditioning)  # type: ignore[attr-defined]
        if self._choose:
            chosen = yield partial(self._best_lanes, plain, conditioning)
            self._choose_lanes(*chosen)
        if self.memory is not None or self._graphs:
            runner.allocate(geometry, self.slots(geometry))  # first, as batches have what the particles leave
        room = Room(self.memory, max(runner.lanes, 2 if self._graphs else 1), self._in_graphs)
        known = (model, plain, conditioning)
        seconds = yield from calibrate.measured(
            *known, runner.usual, runner.threads.threads, runner.preview, self._keep, room
        )
        if self._graphs:
            yield partial(runner.record, geometry, [*seconds], conditioning)
        if self._graphs or model.capabilities.compiled:
            replay = partial(runner.replay, geometry, conditioning) if self._graphs else None
            seconds = yield from calibrate.as_served([*seconds], *known, runner.preview, replay, room)
            seconds = seconds if self._keep else calibrate.earning(seconds)
        tried = max(room.peaks, default=0) <= max(seconds)  # nothing larger
        bound: Bound = "memory" if room.full is not None and tried else "time"
        bound = "sizes" if max(seconds) == runner.usual[-1] else bound
        if self._keep and bound == "memory":
            _warn_of_memory(geometry, [size for size in runner.usual if size > max(seconds)])
        self._set(geometry, seconds, bound)  # last: what failed is tried again, not skipped

    @property
    def graph_memory(self) -> dict[Geometry, int]:
        """Bytes of the device's memory that CUDA graphs hold, by image size; of any thread."""
        return self.runner.graph_memory

    def _in_graphs(self) -> int:
        """Bytes of CUDA graphs: torch counts them as reserved and mostly as unused, but nothing else can have them."""
        return sum(self.graph_memory.values())

    def _counting(self, geometry: Geometry, wanted: Wanted) -> Steps:
        """Finds the batch sizes of guided rows."""
        runner, memory = self.runner, self.memory
        assert memory is not None, "asked for only where it is known"
        conditioning = yield from self._conditioning(wanted)
        runner.allocate(geometry, self.slots(geometry))  # first, as batches have what the particles leave
        saved, working = yield partial(calibrate.guided, runner.model, geometry, conditioning, memory)
        known = self.cost(geometry).seconds
        found = guidance(saved, working, [*known], Room(memory, runner.lanes, self._in_graphs))
        if saved.kept + saved.region < saved.whole:
            runner.recomputable.add(geometry)
        if found.recomputed:
            runner.recomputed.add(geometry)
        self._set_guided(geometry, _up_to(max(found.sizes), known) or _scaled(found.sizes[0], known))

    def _conditioning(self, wanted: Wanted) -> Generator[Callable[[], Any], Any, Any]:
        if wanted not in self.conditioning:
            yield _nothing  # its encoding was asked for before this
        if wanted in self.conditioning:
            return self.conditioning[wanted]
        (conditioning,) = yield partial(self._encode, wanted)  # it was forgotten again
        return conditioning

    def _best_lanes(self, geometry: Geometry, conditioning: Any) -> tuple[int, int]:
        """How many lanes of how many threads are fastest; on a lane, before any batch runs.

        The lane waits for a thread that has all cores, as lanes have only theirs.
        """
        chosen: Future[tuple[int, int]] = Future()

        def check() -> None:
            if self.closing:
                raise _closed()

        def choose() -> None:
            try:
                model, preview = self.runner.model, self.runner.preview
                chosen.set_result(calibrate.best_lanes(model, geometry, conditioning, preview, check))
            except BaseException as error:
                chosen.set_exception(error)

        Thread(target=choose, name="rollflow-choice", daemon=True).start()
        return chosen.result()

    def _choose_lanes(self, count: int, threads: int) -> None:
        """Works on so many lanes from now on; nothing runs yet, and the lane that measured is at its end."""
        runner = self.runner
        if self._choose and (count, threads) != (runner.threads.count, runner.threads.threads):
            runner.threads.close()
            runner.use(Lanes(runner.model.device, count, threads))
            self.changed()
        self._choose = False

    def _set(self, geometry: Geometry, seconds: dict[int, float], bound: Bound) -> None:
        self.costs[geometry], self.bounds[geometry] = CostModel(seconds), bound
        self.runner.buckets[geometry] = tuple(sorted(seconds))

    def _set_guided(self, geometry: Geometry, seconds: dict[int, float]) -> None:
        self.guided[geometry], self.runner.guided[geometry] = CostModel(seconds), tuple(sorted(seconds))


def _up_to(rows: int, seconds: Mapping[int, float]) -> dict[int, float]:
    """The costs of batches of at most so many rows."""
    return {bucket: spent for bucket, spent in seconds.items() if bucket <= rows}


def _scaled(rows: int, seconds: Mapping[int, float]) -> dict[int, float]:
    """The cost of a batch smaller than all that were measured."""
    least = min(seconds)
    return {rows: seconds[least] * rows / least}


def _closed() -> EngineClosed:
    return EngineClosed("the engine was closed: make a new one")


def _warn_of_memory(geometry: Geometry, left_out: list[int]) -> None:
    """Batch sizes that the caller chose are not used."""
    with suppress(RuntimeWarning):  # where warnings are errors, this thread is nobody's to raise it to
        warnings.warn(
            f"batches of {left_out[0]} rows of {geometry} do not fit into the device's memory: the batch sizes "
            f"{', '.join(map(str, left_out))} are not used for this size, which may be slower",
            RuntimeWarning,
            stacklevel=2,
        )


def _nothing() -> None:
    pass
