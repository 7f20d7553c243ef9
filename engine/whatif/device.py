"""A device without a model: what the loop sends it takes the time that was measured, on a simulated machine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from rollflow.models import Geometry
from rollflow.models.text import Text
from rollflow.preparing import Preparations
from rollflow.row import Brief, Candidate, Done, Free, Landed, Outcome, Report, Row, Show, Shown
from rollflow.schedule.cost import CostModel
from rollflow.whatif.machine import Machine, Task
from rollflow.whatif.measured import FULL, LIGHT, Measured, Size
from rollflow.whatif.scores import Scores

LOOP, FEEDER, STREAM, SIDE = "loop", "feeder", "stream", "side"  # lines of a machine
_PIXELS = torch.zeros(3, 1, 1)


class Prepared(Preparations):
    """Image sizes are measured; prompts are encoded where that was recorded to take time.

    Args:
        costs: of batches, by image size.
        encode: whether a prompt that is new takes a chore.
    """

    def __init__(self, costs: Mapping[Geometry, CostModel], encode: bool):
        self.costs, self.chores, self.conditioning = {**costs}, deque(), {}
        self.bounds, self.closing = {}, False
        self._takes_time, self._asked = encode, dict[str, list[Callable[[BaseException | None], None]]]()

    def cost(self, geometry: Geometry, guided: bool = False) -> CostModel:
        """What batches of a geometry cost."""
        return self.costs[geometry]

    def want(self, text: Text | None, geometry: Geometry | None, then: Callable[[BaseException | None], None]) -> None:
        """Calls `then` when a prompt is encoded."""
        prompt = "" if text is None else text.prompt
        if not self._takes_time or (prompt, None) in self.conditioning:
            then(None)
            return
        waiting = self._asked.setdefault(prompt, [])
        waiting.append(then)
        if len(waiting) == 1:
            self.chores.append((lambda: None, partial(self._encoded, prompt), "encode"))

    def _encoded(self, prompt: str, _: Any, error: BaseException | None) -> None:
        self.conditioning[prompt, None] = None  # type: ignore[index]
        for then in self._asked.pop(prompt, []):
            then(error)

    def known(self, text: Text, geometry: Geometry) -> Any:
        """Nothing is needed of it."""
        return None

    def company(self, conditioning: Any, guidance: float, *given: Any) -> tuple[Any, ...]:
        """Rows of all requests share batches."""
        return conditioning, *given


class Asked:
    """What the device has to know of a request.

    Attributes:
        kind: its method and its reward.
        terms: what judges its particles, and its final image besides.
    """

    def __init__(self, spec: Mapping[str, Any]):
        self.kind = spec["method"], spec["reward"]
        self.terms, self.held_out = tuple(spec["terms"]), tuple(spec["held_out"] or ())


class Simulated:
    """Answers batches when their time has come.

    Args:
        machine: where they take it.
        measured: what everything costs, alone.
        scores: the rewards.
        asked: what requests ask for, by their seeds, which are their numbers in the replay.
        lanes, parallel, preview, threads: as of an engine.
        gpu: whether batches run on a GPU, one after another, with decodes beside.

    Attributes:
        nfe: what ran.
        batches: how many batches did.
        rows: that ran, and `places`, with their padding.
    """

    judge = None

    def __init__(
        self,
        machine: Machine,
        measured: Measured,
        sizes: Mapping[Geometry, Size],
        costs: Mapping[Geometry, CostModel],
        scores: Scores,
        asked: Mapping[int, Asked],
        lanes: int,
        parallel: bool,
        preview: bool,
        threads: int,
        gpu: bool,
    ):
        self.machine, self._measured, self._sizes, self._costs = machine, measured, sizes, costs
        self._scores, self._asked = scores, asked
        self.lanes, self.parallel, self.preview = lanes, parallel, preview
        self._threads, self._gpu = float(threads), gpu
        self._known: dict[tuple[int, int], float] = {}  # rewards, by ticket and row
        self.nfe = self.batches = self.places = self.rows = 0

    def bucket(self, rows: int, geometry: Geometry, guided: bool = False) -> int:
        """The smallest batch size that holds `rows`."""
        cost = self._costs[geometry]
        return cost.bucket(rows) if rows <= cost.largest else rows

    def allocate(self, geometry: Geometry, slots: int) -> None:
        """Takes no memory."""

    def peek(self, candidate: Candidate, brief: Brief) -> Any:
        """Makes no image."""
        return None

    # What the loop asks for.

    def submit(self, rows: Sequence[Row], report: Report, attempt: int = 0) -> None:
        """Starts a batch."""
        geometry, size = rows[0].brief.geometry, self._sizes[rows[0].brief.geometry]
        bucket, guided = self.bucket(len(rows), geometry), rows[0].kind == "guided"
        self.batches, self.places, self.rows = self.batches + 1, self.places + bucket, self.rows + len(rows)
        self.nfe += bucket * rows[0].nfe
        if guided:
            self._submit_guided(size, bucket, rows, report)
            return
        judged: list[Row] = []

        def decode() -> float:
            judged[:] = [row for row in rows if row.wanted]  # as late as `Runner` does
            decoder = size.decode[LIGHT if self.preview else FULL]
            return decoder(self.bucket(len(judged), geometry)) if judged else 0.0

        def landed() -> None:
            report(Free())
            own = {id(row) for row in judged}
            if len(judged) < len(rows):
                self._decide(report, [row for row in rows if id(row) not in own], judged=False)
            if judged:
                self._judge(judged, [self._terms(row.brief) for row in judged], 1, partial(self._decide, report))

        self._on_lane(size.around(bucket), size.forward(bucket), decode, landed)

    def _submit_guided(self, size: Size, bucket: int, rows: Sequence[Row], report: Report) -> None:
        """Starts a batch whose rewards are called on the lane."""
        terms, waiting = [self._terms(row.brief) for row in rows], len(rows)

        def answered(own: Sequence[Row]) -> None:
            nonlocal waiting
            waiting -= len(own)
            if not waiting:
                report(Free())
                self._decide(report, rows)

        judge = partial(self._judge, rows, terms, 1, answered)
        self._on_lane(0.0, size.guided(bucket), lambda: size.guided_decode(bucket), judge)

    def submit_images(self, shows: Sequence[Show], report: Report) -> None:
        """Starts making images, which held-out judges see after the rewards."""
        size = self._sizes[shows[0].brief.geometry]
        count = sum(len(show.candidates) for show in shows)
        largest, decode, left = self._costs[shows[0].brief.geometry].largest, 0.0, count
        while left > 0:
            decode += size.decode[FULL](self.bucket(min(left, largest), shows[0].brief.geometry))
            left -= largest

        def held_out(judged: Sequence[Show]) -> None:
            terms = [self._asked[show.brief.seed].held_out for show in judged]
            self._judge(judged, terms, 1, partial(self._shown, report))

        def made() -> None:
            report(Free())
            terms = [self._terms(show.brief) for show in shows]
            self._judge(shows, terms, count / len(shows), held_out)

        self._on_lane(size.images, 0.0, lambda: decode, made)

    def submit_work(self, work: Callable[[], Any], then: Callable, report: Report, kind: str = "other") -> None:
        """Starts a chore."""

        def done() -> None:
            report(Free())
            report(Done(then, work()))

        seconds = self._measured.encode if kind == "encode" else 0.0
        self.machine.post(self._task(seconds, done, "encode"))

    # How it goes on.

    def _task(self, seconds: float, then: Callable[[], None], stage: str, **where: Any) -> Task:
        return Task(seconds, then, stage=stage, **{"demand": self._threads, **where})

    def _on_lane(self, around: float, forward: float, decode: Callable[[], float], then: Callable[[], None]) -> None:
        """The loop chooses it, a lane computes and decodes it, which takes as long as is known then."""
        post, measured = self.machine.post, self._measured

        def decoded(seconds: float | None = None) -> None:
            where = {"line": SIDE, "processor": "gpu", "demand": 1.0} if self._gpu else {}
            post(self._task(decode() if seconds is None else seconds, then, "decode", **where))

        def proposed() -> None:
            where = {"line": STREAM, "processor": "gpu", "demand": 1.0} if self._gpu else {}
            launched = partial(decoded, decode()) if self._gpu else decoded  # there, both are launched at once
            post(self._task(forward, launched, "forward", **where))

        def start() -> None:
            where = {"line": FEEDER, "demand": 1.0} if self._gpu else {}
            post(self._task(around, proposed, "host", **where))

        def chosen() -> None:
            post(Task(measured.turnaround, start, demand=0.0))

        post(Task(measured.choose, chosen, line=LOOP, stage="choose"))

    def _terms(self, brief: Brief) -> tuple[str, ...]:
        return self._asked[brief.seed].terms

    def _judge(
        self, work: Sequence[Any], terms: Sequence[Sequence[str]], images: float, then: Callable[[Sequence[Any]], None]
    ) -> None:
        """Each term judges what asks for it, in its own line; work goes on when all of its terms have answered."""
        missing = {id(one): len({*own}) for one, own in zip(work, terms, strict=True)}
        if unjudged := [one for one in work if not missing[id(one)]]:
            then(unjudged)
        groups: dict[str, list[Any]] = {}
        for one, own in zip(work, terms, strict=True):
            for term in dict.fromkeys(own):
                groups.setdefault(term, []).append(one)

        def answered(group: Sequence[Any]) -> None:
            for one in group:
                missing[id(one)] -= 1
            if whole := [one for one in group if not missing[id(one)]]:
                then(whole)

        for term, group in groups.items():
            call = self._measured.rewards.get(term)
            seconds = 0.0 if call is None else call(max(1, round(len(group) * images)))
            demand = 1.0 - self._measured.waiting.get(term, 0.0)
            where = {"processor": "gpu"} if self._gpu and demand > 0.5 else {}
            self.machine.post(
                Task(seconds, partial(answered, group), ("reward", term), demand=demand, stage="reward", **where)
            )

    def _decide(self, report: Report, rows: Sequence[Row], judged: bool = True) -> None:
        def taken() -> None:
            report(Landed(rows, [self._score(row) if judged else None for row in rows]))

        self.machine.post(Task(self._measured.decide * len(rows), taken, LOOP, stage="decide"))

    def _score(self, row: Row) -> float:
        ticket, asked = row.brief.ticket, self._asked[row.brief.seed]
        parent = self._known.get((ticket, row.origin))
        found = self._scores.of(
            asked.kind, row.level, parent, (row.brief.seed, row.key, row.level, row.number if row.key == 0 else 0)
        )
        self._known[ticket, row.number] = found
        return found

    def _shown(self, report: Report, shows: Sequence[Show]) -> None:
        outcomes = [Outcome(_PIXELS, _PIXELS.to(torch.uint8), 0.0, None) for _ in shows]

        def taken() -> None:
            report(Shown(shows, outcomes))

        self.machine.post(Task(self._measured.decide * len(shows), taken, LOOP, stage="decide"))
