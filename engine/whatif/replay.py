"""Replays a recording with something changed: the real loop, searches and scheduler on a simulated device.

What a change does to the packing of batches, to speculation and to waiting is not estimated but happens: only the
device is a model, made of the recorded seconds. How far the replay of the recording itself is off is known, and every
prediction is corrected by it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from math import inf, isfinite
from typing import Any

import numpy as np

from rollflow import methods
from rollflow.errors import RequestError, shown
from rollflow.loop import Loop
from rollflow.models import Geometry, Traits
from rollflow.plan import Plan, plan
from rollflow.profile.ledger import Ledger
from rollflow.profile.recording import Recording
from rollflow.request import Request
from rollflow.schedule.cost import CostModel
from rollflow.ticket import Finished, News, Refused
from rollflow.whatif.changes import Change, Predicted, changed, changed_rest
from rollflow.whatif.device import Asked, Prepared, Simulated
from rollflow.whatif.machine import Machine
from rollflow.whatif.measured import Size, measure
from rollflow.whatif.scores import Scores


class Judge:
    """A reward that only has a name; the replay draws its scores."""

    differentiable = True
    concurrent = False

    def __init__(self, name: str):
        self.name = name

    def check(self, prompt: str) -> None:
        """Accepts every prompt."""

    def __call__(self, images: Any, prompts: Sequence[str]) -> Any:
        """Is never called."""
        raise RequestError(f"the reward {self.name} of a replay judges nothing")


class Replay:
    """Replays of one recording.

    Args:
        recording: what ran.

    Attributes:
        measured: what everything costs.
        recorded: the seconds that the recording took, from its first request's arrival to the last one's end.
        correction: `recorded` over what the replay of the recording itself took.
        notes: what of the recording could not be replayed as it was.

    Raises:
        RequestError: it has no request that could be replayed.
    """

    def __init__(self, recording: Recording):
        self.recording, self.measured = recording, measure(recording)
        self._scores, self.notes = Scores(recording), list[str]()
        table = recording.requests[np.argsort(recording.requests["submitted"], kind="stable")]
        done = table[(table["state"] >= 2) & ~np.isnan(table["started"])]
        specs = recording.specs
        left_out = len(table) - len(done)
        if left_out:
            self.notes.append(f"{left_out} requests that were not over, or never began, are left out")
        self._specs = [specs[int(one["request"])] for one in done if int(one["request"]) in specs]
        if not self._specs:
            raise RequestError("no request of this recording was over: record one from its start to its end")
        for name in {spec["method"] for spec in self._specs if "method" in spec["opaque"]}:
            raise RequestError(
                f"the method {name} is a function, which a recording does not hold: replay named methods"
            )
        if any(spec["opaque"] for spec in self._specs):
            self.notes.append("requests with a path or a diffusion of their own are replayed on the usual ones")
        first = float(done["submitted"].min())
        self._offsets = [float(one["submitted"]) - first for one in done]
        self.recorded = float(done["ended"].max()) - first
        self.correction = 1.0
        self.base = self.run(Change())
        self.correction = self.recorded / self.base.seconds if self.base.seconds else 1.0
        self.base = self.base.scaled(self.correction)

    def run(self, change: Change) -> Predicted:
        """What the recorded requests would take with something changed.

        Raises:
            RequestError: a request cannot be made so, for example a budget that its method cannot spend.
        """
        arrivals = self.arrivals(change)
        sizes = {size.geometry: changed(size, change) for size in self.measured.sizes.values()}
        fleet = [_Engine(self, change, sizes) for _ in range(change.gpus)]
        jobs = [self._job(i, spec, change) for i, (_, spec) in enumerate(arrivals)]
        coming = 0
        while coming < len(jobs) or any(engine.open for engine in fleet):
            soonest = min(fleet, key=lambda one: one.next)
            now = soonest.next
            if coming < len(jobs) and arrivals[coming][0] <= now:
                now, touched = arrivals[coming][0], set[_Engine]()
                while coming < len(jobs) and arrivals[coming][0] <= now:
                    least = min(fleet, key=lambda one: one.unspent)
                    least.advance(now)
                    least.submit(coming, *jobs[coming])
                    touched.add(least)
                    coming += 1
                for engine in touched:
                    engine.settle()
                continue
            if not isfinite(now):
                raise RequestError("the replay came to a stop: some request can never run with what it was given")
            soonest.advance(now)
            soonest.settle()
        return self._summed(fleet, arrivals).scaled(self.correction)

    def arrivals(self, change: Change) -> list[tuple[float, Mapping[str, Any]]]:
        """When requests come, and what each asks for."""
        count = len(self._specs) if change.prompts is None else change.prompts
        chosen = [self._specs[i % len(self._specs)] for i in range(count)]
        if change.rate is not None:
            dice, when, times = random.Random(change.seed), 0.0, []
            for _ in range(count):
                times.append(when)
                when += dice.expovariate(change.rate)
            return [*zip(times, chosen, strict=True)]
        if change.together:
            return [(0.0, spec) for spec in chosen]
        spread = self._offsets[-1] + (self._offsets[-1] / (len(self._offsets) - 1) if len(self._offsets) > 1 else 0.0)
        times = [self._offsets[i % len(self._offsets)] + i // len(self._offsets) * spread for i in range(count)]
        return [*zip(times, chosen, strict=True)]

    def _job(self, number: int, spec: Mapping[str, Any], change: Change) -> tuple[Asked, Plan, Geometry]:
        """A request of the replay; its seed is its number, by which the device knows it again."""
        size = self.measured.sizes.get((spec["height"], spec["width"], spec["frames"]))
        if size is None:
            raise RequestError(
                f"nothing of {spec['height']}x{spec['width']} ran in this recording: it cannot be replayed"
            )
        method = change.method or spec["method"]
        if method not in methods.names():
            raise RequestError(f"method {shown(method)}: choose one of {', '.join(methods.names())}")
        about = self.recording.about
        traits = Traits(**about["traits"])
        own: dict[str, Any] = {"times": tuple(spec["grid_times"]), "options": spec["options"]}
        for name in ("interpolant", "diffusion", "solver"):
            own |= {name: spec[name]} if name not in spec["opaque"] else {}
        if change.method is not None and change.method != spec["method"]:
            own = {}  # what suits the method
        nfe = spec["nfe"] if change.nfe is None else change.nfe
        request = Request(
            spec["prompt"], Judge(spec["reward"]), method, nfe, seed=number, finish=spec["finish"],
            finalists=spec["finalists"], stop_at=spec["stop_at"], priority=spec["priority"], seconds=spec["seconds"],
            **own,
        )  # fmt: skip
        made = plan(request, traits, about["preview"])
        return Asked({**spec, "method": method}), made, size.geometry

    def _summed(self, fleet: Sequence[_Engine], arrivals: Sequence[tuple[float, Any]]) -> Predicted:
        ends = {number: end for engine in fleet for number, end in engine.ends.items()}
        places = sum(engine.device.places for engine in fleet)
        busy: dict[str, float] = {}
        for engine in fleet:
            for stage, seconds in engine.machine.busy.items():
                busy[stage] = busy.get(stage, 0.0) + seconds
        rows = sum(engine.rows for engine in fleet)
        return Predicted(
            seconds=max(ends.values(), default=0.0) - arrivals[0][0],
            latencies=tuple(ends[i] - when for i, (when, _) in enumerate(arrivals)),
            committed=sum(engine.committed for engine in fleet),
            executed=sum(engine.device.nfe for engine in fleet),
            batches=sum(engine.device.batches for engine in fleet),
            occupancy=rows / places if places else 0.0,
            busy=busy,
        )


class _Engine:
    """One engine of a replay: a loop on a simulated device."""

    def __init__(self, replay: Replay, change: Change, sizes: Mapping[Geometry, Size]):
        about, measured = replay.recording.about, changed_rest(replay.measured, change)
        self._now, self.next = 0.0, inf
        lanes = change.lanes or int(about["lanes"])
        gpu = not str(about["device"]).startswith("cpu")
        costs = {geometry: CostModel(size.warmed) for geometry, size in sizes.items()}
        self.machine = Machine({"cpu": float(about["cores"]), "gpu": 1.0})
        self._asked: dict[int, Asked] = {}
        threads = int(
            about["threads"]
        )  # of each lane, however many there are: what others would bring was not measured
        self.device = Simulated(
            self.machine, measured, sizes, costs, replay._scores, self._asked, lanes, about["parallel"],
            about["preview"], threads, gpu,
        )  # fmt: skip
        ledger = Ledger()
        ledger.on = False
        slots = {geometry: size.slots for geometry, size in sizes.items()}
        self.loop = Loop(
            self.device, Prepared(costs, measured.encode > 0), ledger, lambda geometry: slots[geometry],
            clock=lambda: self._now,
        )  # fmt: skip
        self.ends: dict[int, float] = {}
        self.open = self.unspent = self.committed = self.rows = 0

    def advance(self, now: float) -> None:
        """Time passes, until `now`, which is not after `next`."""
        self.machine.advance(now - self._now)
        self._now = now

    def submit(self, number: int, asked: Asked, made: Plan, geometry: Geometry) -> None:
        """A request comes."""
        self._asked[number] = asked
        self.open += 1
        self.unspent += made.nfe
        self.loop.submit(made, geometry, partial(self._told, number, made), force=True)

    def settle(self) -> None:
        """The loop does all it can for now; `next` is when there will be more to do."""
        self.loop.step(0)
        while not self.loop.inbox.empty():
            self.loop.step(0)
        due = self.loop.due if self.open else None
        self.next = min(self._now + self.machine.wait, inf if due is None else max(self._now, due))

    def _told(self, number: int, made: Plan, news: News) -> None:
        if isinstance(news, Finished | Refused) and number not in self.ends:
            self.ends[number] = self._now
            self.open -= 1
            self.unspent -= made.nfe
            if isinstance(news, Finished):
                self.committed += news.history.committed
                self.rows += len(news.history)
