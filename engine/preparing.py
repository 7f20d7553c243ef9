"""What must be there before a request can run: its prompt's encoding, and the costs of batches of its image size.

Both are work for a lane, done in small pieces between the batches of the requests that run already.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from functools import partial
from threading import Thread
from typing import Any

from rollflow.device import calibrate
from rollflow.device.attempts import model_error
from rollflow.device.runner import Runner
from rollflow.device.workers import Lanes
from rollflow.errors import EngineClosed
from rollflow.models import Geometry
from rollflow.schedule.cost import CostModel

ENCODED_PROMPTS = 256  # kept for later requests
Need = str | Geometry
Chore = tuple[
    Callable[[], Any], Callable[[Any, BaseException | None], None]
]  # what to do on a lane, and with its result
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

    Attributes:
        conditioning: what the model made of prompts.
        costs: what batches cost, by image size.
        chores: work for a lane.
        changed: called when the lanes were chosen.
        pinned: whether no encoding may be forgotten, because the encoders are gone.
        closing: whether nothing more is to be prepared; of any thread.
    """

    def __init__(
        self,
        runner: Runner,
        slots: Callable[[Geometry], int],
        measure: bool,
        keep_buckets: bool,
        choose_lanes: bool,
        graphs: bool,
    ):
        self.runner, self._slots = runner, slots
        self._measure, self._keep, self._choose, self._graphs = measure, keep_buckets, choose_lanes, graphs
        self.conditioning: dict[str, Any] = {}
        self.costs: dict[Geometry, CostModel] = {}
        self.chores: deque[Chore] = deque()
        self.changed: Callable[[], None] = lambda: None
        self.pinned = self.closing = False
        self._assumed = CostModel.assumed(runner.usual)
        self._waiting: dict[Need, list[Callable[[BaseException | None], None]]] = {}

    def cost(self, geometry: Geometry) -> CostModel:
        """What batches of a geometry cost, or what is assumed before a measurement."""
        return self.costs.get(geometry, self._assumed)

    def shrink(self, geometry: Geometry, rows: int) -> bool:
        """Batches of this many rows, padding included, do not fit: takes their sizes away; says whether that is new."""
        known = self.cost(geometry).seconds
        if rows > max(known):  # it was on its way when another did not fit
            return False
        fitting = {bucket: seconds for bucket, seconds in known.items() if bucket < rows}
        if not fitting:  # one batch size alone: from now on the rows of half of it
            half = max(1, rows // 2)
            fitting = {half: known[min(known)] * half / min(known)}
        if max(fitting) >= max(known):
            return False
        self._set(geometry, fitting)
        return True

    def want(self, prompt: str | None, geometry: Geometry | None, then: Callable[[BaseException | None], None]) -> None:
        """Calls `then` when a prompt is encoded and a geometry measured, or with the error that kept it from that."""
        missing: list[Need] = []
        if geometry is not None and self._measure and geometry not in self.costs:
            missing.append(geometry)
            prompt = next(iter(self.conditioning), "") if prompt is None else prompt
        if prompt is not None and prompt not in self.conditioning:
            missing.insert(0, prompt)  # the encoding first: measurements need one
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
                steps = self._encoding(need) if isinstance(need, str) else self._measuring(need, prompt or "")
                self._advance(need, steps, None, None)

    def forget(self, keep: int = 0) -> None:
        """Drops all but the last encodings."""
        if not self.pinned:
            for prompt in list(self.conditioning)[: max(0, len(self.conditioning) - keep)]:
                del self.conditioning[prompt]

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
            self.chores.append((work, partial(self._advance, need, steps)))

    def _tell(self, need: Need, error: BaseException | None) -> None:
        for told in self._waiting.pop(need, []):
            told(error)

    def _encoding(self, prompt: str) -> Steps:
        """A prompt is encoded alone, so that its bits do not depend on its company."""
        (self.conditioning[prompt],) = yield partial(self.runner.model.encode, [prompt])
        self.forget(ENCODED_PROMPTS)

    def _measuring(self, geometry: Geometry, prompt: str) -> Steps:
        runner, model = self.runner, self.runner.model
        if prompt not in self.conditioning:
            yield _nothing  # its encoding was asked for before this
        if prompt not in self.conditioning:  # and forgotten again
            (conditioning,) = yield partial(model.encode, [prompt])
        else:
            conditioning = self.conditioning[prompt]
        if model.device.type == "cpu" and model.capabilities.recordable:
            yield partial(model.record, geometry, conditioning)  # type: ignore[attr-defined]
        if self._choose:
            chosen = yield partial(self._best_lanes, geometry, conditioning)
            self._choose_lanes(*chosen)
        known = (model, geometry, conditioning)
        seconds = yield from calibrate.measured(
            *known, runner.usual, runner.threads.threads, runner.preview, self._keep
        )
        if self._graphs:
            runner.allocate(geometry, self._slots(geometry))
            yield partial(runner.record, geometry, [*seconds], conditioning)
            replay = partial(runner.replay, geometry, conditioning)
            seconds = yield from calibrate.replayed([*seconds], *known, runner.preview, replay)
        self._set(geometry, seconds)  # last: what failed is tried again, not skipped

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

    def _set(self, geometry: Geometry, seconds: dict[int, float]) -> None:
        self.costs[geometry] = CostModel(seconds)
        self.runner.buckets[geometry] = tuple(sorted(seconds))


def _closed() -> EngineClosed:
    return EngineClosed("the engine was closed: make a new one")


def _nothing() -> None:
    pass
