"""Replays a recording with something changed: the real loop, searches and scheduler on a simulated device.

What a change does to the packing of batches, to speculation and to waiting is not estimated but happens: only the
device is a model, made of the recorded seconds. How far the replay of the recording itself is off is known, and every
prediction is corrected by it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from heapq import heappop, heappush
from math import inf, isfinite
from typing import Any

import numpy as np

from rollflow import methods
from rollflow.errors import OutOfTime, RequestError, RollflowError, shown
from rollflow.loop import Loop
from rollflow.models import Geometry, Traits
from rollflow.plan import Plan, plan
from rollflow.profile.ledger import Ledger
from rollflow.profile.recording import Recording
from rollflow.profile.records import FATES
from rollflow.request import Request
from rollflow.schedule.cost import CostModel
from rollflow.search.record import History
from rollflow.ticket import Finished, News, Refused, Started
from rollflow.whatif.changes import Change, Predicted, changed, changed_rest
from rollflow.whatif.device import Asked, Prepared, Simulated
from rollflow.whatif.dispatching import POLICIES
from rollflow.whatif.machine import Machine
from rollflow.whatif.measured import Size, measure
from rollflow.whatif.scores import Scores

ROUNDS, CLOSE = 6, 1e-3  # in which the correction is found; how near is near enough


class NamedReward:
    """A reward that only has a name; the replay draws its scores."""

    differentiable = True

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
        self.correction = 1.0
        table = recording.requests[np.argsort(recording.requests["submitted"], kind="stable")]
        self._specs, kept = list[Mapping[str, Any]](), list[Any]()
        reasons: list[str] = []
        for one in table:
            spec = self._spent(one, recording.specs.get(int(one["request"])))
            try:
                if spec is None:
                    raise RequestError("it never began, or was not over")
                self._job(0, spec, Change())
            except RollflowError as error:
                reasons.append(str(error))
                continue
            self._specs.append(spec)
            kept.append(one)
        if not kept:
            why = reasons[0] if reasons else "there is none"
            raise RequestError(f"no request of this recording can be replayed: {why}")
        if reasons:
            self.notes.append(f"{len(reasons)} requests are left out, the first because {reasons[0]}")
        if known := len(recording.specs.keys() - {*table["request"].tolist()}):
            self.notes.append(f"{known} requests came before the recording began: what they took is not replayed")
        first = min(float(one["submitted"]) for one in kept)
        self._offsets = [float(one["submitted"]) - first for one in kept]
        self.recorded = max(float(one["ended"]) for one in kept) - first
        for _ in range(ROUNDS):  # where requests come over time, how fast they run does not decide alone
            self.base = self.run(Change())
            off = self.recorded / self.base.seconds if self.base.seconds else 1.0
            if abs(off - 1) < CLOSE:
                break
            self.correction *= off
        else:
            self.base = self.run(Change())

    def _spent(self, entry: Any, spec: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """What a request asked for; of one that was ended by something else than its budget, what it spent."""
        if spec is None or entry["state"] < FATES.index("done") or np.isnan(entry["started"]):
            return None
        note = "paths and diffusions that are objects are replayed as the usual ones"
        if {"interpolant", "diffusion"} & {*spec["opaque"]} and note not in self.notes:
            self.notes.append(note)
        if entry["state"] == FATES.index("done") and entry["stopped"] in ("budget", "stop_at"):
            return {**spec, "nfe": int(entry["nfe"])}
        note = "requests that were cancelled, failed or ended by their time are replayed with what they had spent"
        if note not in self.notes:
            self.notes.append(note)
        return (
            {**spec, "nfe": int(entry["committed"]), "seconds": None, "stop_at": None} if entry["committed"] else None
        )

    def __len__(self) -> int:
        """How many of the recorded requests are replayed."""
        return len(self._specs)

    @property
    def alone(self) -> list[float]:
        """Seconds of each request if nothing else ran; of those alike, those of one."""
        known: dict[str, float] = {}
        found = []
        for spec in self._specs:
            key = repr([spec[name] for name in ("method", "nfe", "options", "grid_times", "finish", "height", "width")])
            if key not in known:
                known[key] = self._play([(0.0, spec)], Change()).scaled(self.correction).seconds
            found.append(known[key])
        return found

    def run(self, change: Change, coming: Sequence[tuple[float, Mapping[str, Any]]] | None = None) -> Predicted:
        """What the recorded requests would take with something changed.

        Args:
            change: what is different.
            coming: when requests come and what each asks for, ascending, instead of `arrivals(change)`.

        Raises:
            RequestError: a request cannot be made so, for example a budget that its method cannot spend.
        """
        coming = self.arrivals(change) if coming is None else coming
        arrivals = [(when / self.correction, spec) for when, spec in coming]
        return self._play(arrivals, change).scaled(self.correction)

    def _play(self, arrivals: Sequence[tuple[float, Mapping[str, Any]]], change: Change) -> Predicted:
        sizes = {size.geometry: changed(size, change) for size in self.measured.sizes.values()}
        ledger = Ledger()  # one for all: its tables take 36 MiB, and nothing is written to them
        ledger.on = False
        fleet = [_Engine(self, change, sizes, ledger) for _ in range(change.gpus)]
        jobs = [self._job(i, spec, change) for i, (_, spec) in enumerate(arrivals)]
        choose, due = POLICIES[change.dispatch](change.seed), list[tuple[float, int]]()
        coming, left = 0, len(jobs)
        while left:
            while due and due[0][0] != fleet[due[0][1]].next:
                heappop(due)  # it has been something else since
            now, soonest = due[0] if due else (inf, -1)
            if coming < len(jobs) and arrivals[coming][0] <= now:
                now, touched = arrivals[coming][0], set[int]()
                while coming < len(jobs) and arrivals[coming][0] <= now:
                    number = choose(coming, [one.outstanding for one in fleet])
                    fleet[number].advance(now)
                    fleet[number].submit(coming, *jobs[coming])
                    touched.add(number)
                    coming += 1
            elif soonest >= 0:
                touched = {soonest}
                fleet[soonest].advance(now)
            else:
                raise RequestError("the replay came to a stop: some request can never run with what it was given")
            for number in touched:
                engine = fleet[number]
                engine.settle()
                left -= engine.ended()
                if isfinite(engine.next):
                    heappush(due, (engine.next, number))
                if engine.error is not None:
                    raise RequestError(f"a request of the replay failed: {engine.error}")
        return self._summed(fleet, arrivals)

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
        if change.method is None and {"method", "options"} & {*spec["opaque"]}:
            raise RequestError(f"its method {method} or an option of it is an object, which no recording holds")
        if method not in methods.names():
            raise RequestError(f"method {shown(method)}: choose one of {', '.join(methods.names())}")
        if spec.get("cache"):
            raise RequestError(
                "it had a cache, and replays know what evaluations in full take alone: record requests without cache"
            )
        guided = methods.guided(method, spec["options"] if method == spec["method"] else {})
        if not (size.guided if guided else size.forward).known:
            raise RequestError(
                f"no {'guided' if guided else 'plain'} batch was recorded, such as the method {method} takes"
            )
        about = self.recording.about
        traits = Traits(**about["traits"])
        own: dict[str, Any] = {"times": tuple(spec["grid_times"]), "options": spec["options"]}
        for name in ("interpolant", "diffusion", "solver"):
            own |= {name: spec[name]} if name not in spec["opaque"] else {}
        if change.method is not None and change.method != spec["method"]:
            own = {}  # what suits the method
        nfe = spec["nfe"] if change.nfe is None else change.nfe
        seconds = None if spec["seconds"] is None else spec["seconds"] / self.correction
        request = Request(
            spec["prompt"], NamedReward(spec["reward"]), method, nfe, seed=number, finish=spec["finish"],
            finalists=spec["finalists"], stop_at=spec["stop_at"], priority=spec["priority"], seconds=seconds,
            judge_all=spec.get("judge_all", False),
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
        rows = sum(engine.device.rows for engine in fleet)
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

    def __init__(self, replay: Replay, change: Change, sizes: Mapping[Geometry, Size], ledger: Ledger):
        about, measured = replay.recording.about, changed_rest(replay.measured, change)
        self._now, self.next = 0.0, inf
        lanes = change.lanes or int(about["lanes"])
        gpu = not str(about["device"]).startswith("cpu")
        costs = {geometry: CostModel(size.warmed) for geometry, size in sizes.items()}
        self.machine = Machine({"cpu": float(about["cores"]), "gpu": 1.0})
        self._asked: dict[int, Asked] = {}
        threads = int(about["threads"])  # of each lane, however many there are
        self.device = Simulated(
            self.machine, measured, sizes, costs, replay._scores, self._asked, lanes, about["parallel"],
            about["preview"], threads, gpu,
        )  # fmt: skip
        slots = {geometry: size.slots for geometry, size in sizes.items()}
        self.loop = Loop(
            self.device, Prepared(costs, measured.encode > 0), ledger, lambda geometry: slots[geometry],
            clock=lambda: self._now,
        )  # fmt: skip
        self.ends: dict[int, float] = {}
        self.open = self.committed = self._ended = 0
        self._left: dict[int, tuple[int, History | None]] = {}  # budgets of open requests, and what of them is spent
        self.error: BaseException | None = None

    def advance(self, now: float) -> None:
        """Time passes, until `now`, which is not after `next`."""
        self.machine.advance(now - self._now)
        self._now = now

    def submit(self, number: int, asked: Asked, made: Plan, geometry: Geometry) -> None:
        """A request comes."""
        self._asked[number] = asked
        self.open += 1
        self._left[number] = made.nfe, None
        self.loop.submit(made, geometry, partial(self._told, number, made), force=True)

    def settle(self) -> None:
        """The loop does all it can for now; `next` is when there will be more to do."""
        self.loop.step(0)
        while not self.loop.inbox.empty():
            self.loop.step(0)
        due = self.loop.due if self.open else None
        self.next = min(self._now + self.machine.wait, inf if due is None else max(self._now, due))

    def ended(self) -> int:
        """How many requests have ended since it was asked last."""
        before, self._ended = self._ended, len(self.ends)
        return self._ended - before

    @property
    def outstanding(self) -> int:
        """Evaluations that its open requests have left to spend."""
        return sum(budget - (0 if spent is None else spent.committed) for budget, spent in self._left.values())

    def _told(self, number: int, made: Plan, news: News) -> None:
        if isinstance(news, Started) and number in self._left:
            self._left[number] = made.nfe, news.history
        if isinstance(news, Finished | Refused) and number not in self.ends:
            self.ends[number] = self._now
            self.open -= 1
            del self._left[number]
            if isinstance(news, Finished):
                self.committed += news.history.committed
            elif not isinstance(news.error, OutOfTime):
                self.error = news.error
