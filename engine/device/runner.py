"""Runs packed batches on a model: propose, forward, finish and decode on a lane, rewards beside it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow import kernels, rewards
from rollflow.copies import Download, upload
from rollflow.device import batch, cached, guided, moves
from rollflow.device.attempts import After, Attempts, image_count, is_guided, out_of_memory
from rollflow.device.batch import Tables
from rollflow.device.cuda_graphs import Capture, Graphs
from rollflow.device.decoder import Decoder
from rollflow.device.finals import Finals, rounded
from rollflow.device.finish import Finish
from rollflow.device.judge import GivenUp, Judge, back_off
from rollflow.device.memory import warn_of_recomputing
from rollflow.device.storage import Storage
from rollflow.device.streams import Streams
from rollflow.device.terms import Judgement
from rollflow.device.workers import Lanes
from rollflow.models import FlowModel, Geometry, velocity_dtype
from rollflow.profile.ledger import Ledger, working_for
from rollflow.row import (
    NONE,
    Brief,
    Candidate,
    Done,
    Event,
    Free,
    Landed,
    Report,
    Rerun,
    Row,
    Score,
    Show,
)  # fmt: skip


class Runner:
    """Runs batches of rows on a model.

    Args:
        model: the flow model.
        buckets: the batch sizes of a forward, ascending; a batch is padded up to the next.
        ledger: where rows and times are written.
        lanes: the threads that work.
        preview: judge particles on the model's light decoder; what is returned is decoded in full.

    Attributes:
        lanes: how many batches may be on the device at a time.
        parallel: whether lanes compute side by side (threads of a CPU) or one after another (one GPU, where a second
            batch only keeps the device busy while the first is decided on).
        buckets: by geometry, where they are not the ones given.
        guided: those of guided rows, where they are not those of plain ones.
        recomputable: image sizes whose guided rows can keep less for the backward pass, by `rollflow.models.recompute`.
        recomputed: those whose guided rows do.
        streams: the order of what a GPU does.
        graphs, cached_graphs: CUDA graphs by geometry; those of rows that are evaluated from a cache.
    """

    def __init__(self, model: FlowModel, buckets: tuple[int, ...], ledger: Ledger, lanes: Lanes, preview: bool = False):
        self.model, self.ledger, self.preview = model, ledger, preview
        self.usual, self.buckets = buckets, dict[Geometry, tuple[int, ...]]()
        self.guided = dict[Geometry, tuple[int, ...]]()
        self.recomputable, self.recomputed = set[Geometry](), set[Geometry]()
        self.graphs: dict[Geometry, Graphs] = {}
        self.cached_graphs: dict[Geometry, Graphs] = {}
        self._storage: dict[Geometry, Storage] = {}
        self._zeroed: dict[Geometry, Any] = {}  # where the stream that filled it with zeros was done
        self._finish: dict[Geometry, Finish] = {}
        self._decoders: dict[Geometry, Decoder] = {}
        self.streams = Streams(model.device)
        # The smallest batch that did not fit into the memory, of plain and of guided rows.
        self._failed: dict[tuple[Geometry, bool], int] = {}
        self._attempts = Attempts(self._size, self._spares, self._shrink)
        self.use(lanes)

    def use(self, lanes: Lanes) -> None:
        """Works on these threads from now on; no batch may be on its way."""
        self.threads, self.lanes, self.parallel = lanes, lanes.count, lanes.parallel
        single = self.usual[-1] if len(self.usual) == 1 else None
        self.judge = Judge(lanes, self.ledger, single, self.model.device, self.streams.judging)

    def allocate(self, geometry: Geometry, slots: int) -> None:
        """Makes the storage of a geometry, once."""
        if geometry not in self._storage:
            self._finish[geometry] = Finish(self.model, geometry)
            model: Any = self.model
            pixels = geometry.height * geometry.width * (geometry.frames or 1)
            light = partial(_preview, model) if model.capabilities.preview else None
            self._decoders[geometry] = Decoder(partial(_decode, model), light, pixels)
            sizes, velocity = (slots, geometry.token, geometry.channel), velocity_dtype(model)
            storage = Storage(*sizes, model.device, velocity, geometry.kept, model.dtype)
            self._zeroed[geometry], self._storage[geometry] = self.streams.mark(), storage

    @property
    def geometries(self) -> list[Geometry]:
        """Those that have storage."""
        return [*self._storage]

    def storage(self, geometry: Geometry) -> Storage:
        """Where the particles of a geometry are; the current stream waits for the zeros that it was filled with."""
        self.streams.after(self._zeroed[geometry])
        return self._storage[geometry]

    def free(self) -> None:
        """Drops all storage and graphs."""
        self._storage.clear()
        self._zeroed.clear()
        self._finish.clear()
        self._decoders.clear()
        self.graphs.clear()
        self.cached_graphs.clear()

    @property
    def graph_memory(self) -> dict[Geometry, int]:
        """Bytes of device memory that CUDA graphs hold, by image size; of any thread."""
        found = dict[Geometry, int]()
        for graphs in (self.graphs, self.cached_graphs, self._decoders):
            for geometry, one in [*graphs.items()]:
                found[geometry] = found.get(geometry, 0) + one.total
        return {geometry: total for geometry, total in found.items() if total}

    def bucket(self, rows: int, geometry: Geometry, guided: bool = False) -> int:
        """The smallest batch size that holds `rows`; of more rows than there are sizes for by now, the one they had."""
        sizes = self._sizes(geometry, guided)
        if rows > sizes[-1]:  # they were on their way when another batch did not fit into the memory
            own = self._own(geometry, guided)
            sizes = own if rows <= own[-1] else self.usual
        return sizes[bisect_left(sizes, rows)]

    def _own(self, geometry: Geometry, guided: bool) -> tuple[int, ...]:
        sizes = self.buckets.get(geometry, self.usual)
        return self.guided.get(geometry, sizes) if guided else sizes

    def _sizes(self, geometry: Geometry, guided: bool = False) -> tuple[int, ...]:
        """The batch sizes that are used, but for those that did not fit into the memory."""
        sizes = self._own(geometry, guided)
        if (failed := self._failed.get((geometry, guided))) is not None:  # known here before the loop has heard of it
            sizes = tuple(size for size in sizes if size < failed) or (max(1, failed // 2),)
        return sizes

    def _size(self, work: Sequence[Row] | Sequence[Show]) -> int:
        """The size of the batch that rows make, or of the largest that the images of searches are made in."""
        geometry, rows = work[0].brief.geometry, len(work)
        if isinstance(work[0], Show):  # whose images are made in batches of at most the largest size
            rows = min(image_count(work), self._sizes(geometry)[-1])
        return self.bucket(rows, geometry, is_guided(work))

    def _spares(self, work: Sequence[Row] | Sequence[Show]) -> bool:
        """Whether a batch takes less memory the next time, as it is one of guided rows that kept all they saved."""
        return is_guided(work) and work[0].brief.geometry in self.recomputable - self.recomputed

    def _shrink(self, geometry: Geometry, size: int, guided: bool) -> None:
        """A batch of this size does not fit into the memory: it is not used again, or one guided row keeps less."""
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        if size == 1:
            self.recomputed.add(geometry)
            warn_of_recomputing(geometry)
            return
        key = geometry, guided
        self._failed[key] = min(size, self._failed.get(key, size))

    # CUDA graphs.

    def record(
        self, geometry: Geometry, buckets: Iterable[int], conditioning: Any, capture: Capture | None = None
    ) -> None:
        """Captures the steps and decodings of an image size as CUDA graphs, one a bucket; on a lane, before its first.

        Args:
            geometry: of the batches, whose storage was allocated.
            buckets: their sizes.
            conditioning: of any prompt.
            capture: see `Graphs`.
        """
        storage = self.storage(geometry)

        def step(from_cache: bool, integers: Tensor, floats: Tensor, *collated: Tensor) -> Tensor:
            tables = Tables(integers, floats)
            x = self.propose(tables, storage)
            u = self._forward(tables, x, collated, geometry, storage, from_cache)
            return self._finish[geometry](u, storage, integers[1], tables.posterior)

        sizes = [*buckets]
        for from_cache, known in ((False, self.graphs), (True, self.cached_graphs))[: 1 + bool(geometry.kept)]:
            graphs = Graphs(partial(step, from_cache), capture)
            graphs.record(sizes, partial(self._padding, conditioning))
            known[geometry] = graphs

        decoder, run = self._decoders[geometry], self.graphs[geometry].run
        latents = {size: run(*self._padding(conditioning, size)) for size in sizes if decoder.pays(size)}
        with self.streams.beside(*latents.values()):  # whose memory is what the replays read and write
            for light in (False, True) if self.preview else (False,):
                decoder.record(light, latents, capture)

    def replay(self, geometry: Geometry, conditioning: Any, bucket: int) -> Tensor:
        """Evaluates and decodes a batch of padding by the bucket's graphs, to time it; on a lane, between batches."""
        latents = self.graphs[geometry].run(*self._padding(conditioning, bucket))
        with torch.no_grad(), self.streams.beside(latents):
            return self._decoders[geometry](latents, self.preview)

    def _padding(self, conditioning: Any, bucket: int) -> tuple[Tensor, ...]:
        collated = self.model.collate([conditioning] * bucket)  # type: ignore[attr-defined]
        return *batch.padding(bucket, self.model.device), *collated

    # What the loop asks for.

    def submit(self, rows: Sequence[Row], report: Report, attempt: int = 0) -> None:
        """Starts a batch of one kind and returns; reports, from any thread, a free lane once, and every row once."""
        brief = rows[0].brief
        number = self.ledger.rows(rows, self._size(rows), brief.network_rows)
        report = partial(self._told, number, report)
        if rows[0].kind == "guided":
            report = guided.Answers(rows, report, attempt)
        self.threads.post(self._attempts.run, partial(self._run, number, attempt), rows, report)

    def submit_images(self, shows: Sequence[Show], report: Report) -> None:
        """Starts making images of searches of one geometry; reports a free lane once, and every search once."""
        number = self.ledger.images(shows)
        run, report = partial(self._run_images, number), partial(self._told, number, report)
        self.threads.post(self._attempts.run, run, shows, report)

    def submit_work(self, work: Callable[[], Any], then: Callable, report: Report, kind: str = "other") -> None:
        """Does something else on a lane, of a kind that the ledger knows; reports a free lane and a `Done`."""
        number = self.ledger.chore(kind)
        self.threads.post(self._do, number, kind, work, then, partial(self._told, number, report))

    def _told(self, number: int | None, report: Report, event: Event) -> None:
        """Reports what came of a batch, whose lane is free in the ledger from the moment that the loop is told so."""
        try:
            if isinstance(event, Free):
                self.ledger.freed(number)
        finally:  # whatever the ledger does, the loop must hear of it
            report(event)

    def peek(self, candidate: Candidate, brief: Brief) -> Tensor:
        """A particle as an 8-bit image [3, height, width], or clip; on a lane."""
        with torch.no_grad():
            images = self._images([(brief, candidate)])
            with self.streams.beside():
                seen = Download(rounded(images))
            return seen.wait()[0][0]

    # A batch of rows.

    def _run(self, number: int | None, attempt: int, rows: Sequence[Row], report: Report) -> After | None:
        """Evaluates rows, which are those of a batch of the ledger; returns what is to be done last."""
        with self.ledger.batch(number):
            after = self._run_rows(rows, report, attempt)
        return None if after is None else partial(_for_batch, number, after)

    def _run_rows(self, rows: Sequence[Row], report: Report, attempt: int) -> After | None:
        """Evaluates rows; returns what is to be done last, which frees the lane."""
        if rows[0].kind == "guided":
            self._run_guided(rows, report, attempt)
            return None
        geometry = rows[0].brief.geometry
        images = None
        with torch.no_grad():  # not inference mode: what a reward loads at its first call may later need gradients
            latents = moves.kept(self._evaluate(rows), [row.brief for row in rows])
            judged = [i for i, row in enumerate(rows) if row.wanted]  # by now: answers may have come meanwhile
            if judged:
                if len(judged) < len(rows):
                    latents = latents[self._upload(torch.tensor(judged))]
                with self.streams.beside(latents):
                    images = self.decode(latents, len(judged), geometry)
        kept = {*judged}
        unjudged = [row for i, row in enumerate(rows) if i not in kept]  # until here, an error is one of all rows
        if unjudged:
            report(Landed(unjudged, [None] * len(unjudged)))
        if images is not None:
            return partial(self._judge_rows, [rows[i] for i in judged], images, report)
        done = self.streams.mark()
        return None if done is None else partial(self._free_after, done)

    def _free_after(self, done: Any, free: Callable[[], None]) -> None:
        """Frees the lane of a batch without images when the device has done it: what comes next may be more urgent."""
        self.threads.watch(_when, done.synchronize, free)

    def _run_guided(self, rows: Sequence[Row], report: Report, attempt: int) -> None:
        assert isinstance(report, guided.Answers)
        if report.over:  # this thread was replaced
            return
        try:
            report(guided.run(self, rows, report))
        except GivenUp:
            report.over = True
        except Exception as error:  # of any type: a reward says itself which of them to try again
            if out_of_memory(error) or len({row.brief.ticket for row in rows}) > 1:
                raise  # each request then runs, and waits for its reward, by itself
            terms = report.failing or rewards.terms(rows[0].brief.reward)
            if attempt >= terms.retries or not isinstance(error.__cause__ or error, terms.retry_on):
                raise
            report(Rerun(rows, back_off(attempt + 1), attempt + 1))

    def _judge_rows(self, rows: Sequence[Row], images: Tensor, report: Report, free: Callable[[], None]) -> None:
        ready = self._hand_over(images, free)
        judges, places = [row.brief.reward for row in rows], [[i] for i in range(len(rows))]
        for call in Judgement(rows, judges, places, partial(_after, ready, images), _landed).calls():
            self.judge.post(call, report)

    def _hand_over(self, images: Tensor, free: Callable[[], None]) -> Callable[[], None]:
        """Frees the lane when the images are there; returns what waits for that on other threads."""
        wait = self.streams.to_judges(images)
        if wait is None:
            free()
            return _nothing
        self.threads.watch(_when, wait, free)
        return wait

    def _evaluate(self, rows: Sequence[Row]) -> Float[Tensor, "bucket ..."]:
        """Advances and evaluates the rows; returns their posterior means, padded to the bucket."""
        geometry = rows[0].brief.geometry
        storage = self.storage(geometry)
        tables, conditioning = self.tables(rows)
        from_cache = rows[0].cached
        if (graphs := (self.cached_graphs if from_cache else self.graphs).get(geometry)) is not None:
            with self.ledger.span("forward", self.model.device):  # and propose and finish, in the same launch
                return graphs.run(*tables, *self.model.collate(conditioning))  # type: ignore[attr-defined]
        with self.ledger.span("propose"):
            x = self.propose(tables, storage)
        with self.ledger.span("forward", self.model.device):
            if geometry.kept:
                collated = self.model.collate(conditioning)  # type: ignore[attr-defined]
                u = self._forward(tables, x, collated, geometry, storage, from_cache)
            else:
                u = self.model.velocity(x, tables.tau, conditioning, tables.guidance, geometry)
        with self.ledger.span("finish"):
            return self._finish[geometry](u, storage, tables.integers[1], tables.posterior)

    def _forward(
        self,
        tables: Tables,
        x: Tensor,
        collated: tuple[Tensor, ...],
        geometry: Geometry,
        storage: Storage,
        from_cache: bool,
    ) -> Tensor:
        if geometry.kept:
            return cached.forward(self.model, storage, tables, x, collated, geometry, from_cache)
        return self.model.forward(x, tables.tau, collated, tables.guidance, geometry)  # type: ignore[attr-defined]

    def tables(self, rows: Sequence[Row]) -> tuple[Tables, list[Any]]:
        """The batch's tables and conditionings."""
        geometry = rows[0].brief.geometry
        return batch.tables(rows, self._size(rows), self.storage(geometry), self.model.layout, self._upload)

    def propose(self, tables: Tables, storage: Storage) -> Float[Tensor, "bucket token channel"]:
        """Steps every row's parent to its child, and returns the model's input."""
        parent, child, seed, key = tables.integers.unbind(0)
        steps = tables.coefficients
        return kernels.propose(storage.x, storage.u, parent, child, steps, seed, key, self.model.dtype)

    def decode(
        self, latents: Tensor, count: int, geometry: Geometry, preview: bool | None = None, guided: bool = False
    ) -> Float[Tensor, "row *frame 3 height width"]:
        """The first `count` latents as images, padded to a bucket so that a row's pixels depend on the bucket alone."""
        bucket = self.bucket(count, geometry, guided)
        latents = latents[:bucket]
        if len(latents) < bucket:
            latents = torch.cat([latents, latents.new_zeros(bucket - len(latents), *latents.shape[1:])])
        light = self.preview if preview is None else preview
        self.ledger.decodes("preview" if light else "full", count)
        with self.ledger.span("decode", self.model.device):
            return self._decoders[geometry](latents, light)[:count]

    # Images of searches that are over.

    def _run_images(self, number: int | None, shows: Sequence[Show], report: Report) -> After:
        """Makes images, which are a batch of the ledger; returns what is to be done last."""
        with self.ledger.batch(number):
            return partial(_for_batch, number, self._run_shows(shows, report))

    @torch.no_grad()
    def _run_shows(self, shows: Sequence[Show], report: Report) -> After:
        """Decodes what the searches chose in full, and has the 8-bit images that are returned judged.

        Where particles were judged on previews, all finalists are decoded and the best of the images is returned.
        """
        images = self._images([(show.brief, candidate) for show in shows for candidate in show.candidates])

        def judge(free: Callable[[], None]) -> None:
            wait = self._hand_over(images, free)
            Finals(shows, images, wait, self.judge, report).post()

        return judge

    def _images(self, candidates: Sequence[tuple[Brief, Candidate]]) -> Float[Tensor, "row *frame 3 height width"]:
        geometry = candidates[0][0].geometry
        storage, decoded = self.storage(geometry), []
        size = self._sizes(geometry)[-1]
        for start in range(0, len(candidates), size):
            part = candidates[start : start + size]
            padding = self.bucket(len(part), geometry) - len(part)
            slot = self._upload(torch.tensor([c.slot for _, c in part] + [NONE] * padding))
            posterior = self._upload(torch.tensor([[c.p, c.q] for _, c in part] + [[0.0, 0.0]] * padding))
            latents = self._finish[geometry](storage.u[slot.clamp(min=0)], storage, slot, posterior)
            latents = moves.kept(latents, [brief for brief, _ in part])
            with self.streams.beside(latents):
                decoded.append(self.decode(latents, len(part), geometry, preview=False))
        with self.streams.beside():
            return torch.cat(decoded)

    def _do(self, number: int | None, kind: str, work: Callable[[], Any], then: Callable, report: Report) -> None:
        try:
            with self.ledger.batch(number, "encode_prompt" if kind == "encode" else "tick"):
                done = Done(then, work())
        except BaseException as error:
            done = Done(then, error=error)
        report(done)
        report(Free())

    def _upload(self, value: Tensor) -> Tensor:
        return upload(value, self.model.device)


def _for_batch(number: int | None, after: After, free: Callable[[], None]) -> None:
    """Does what is to be done last of a batch of the ledger."""
    with working_for(number):
        after(free)


def _landed(rows: Sequence[Row], scores: list[list[Score]]) -> Event:
    return Landed(rows, [score for (score,) in scores])


def _after(wait: Callable[[], None], images: Tensor) -> Tensor:
    wait()
    return images


def _when(wait: Callable[[], None], free: Callable[[], None]) -> None:
    """Frees a lane when a wait for the device is over, even if the device failed: the next batch will say so."""
    try:
        wait()
    finally:
        free()


def _decode(model: Any, latents: Tensor) -> Tensor:
    return model.decode(latents)


def _preview(model: Any, latents: Tensor) -> Tensor:
    return model.preview(latents)


def _nothing() -> None:
    pass
