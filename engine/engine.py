"""The engine: requests in, results out."""

from __future__ import annotations

import itertools
import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import torch
from diffusers import DiffusionPipeline

from rollflow import calls, checks
from rollflow.calls import Progress, left_of
from rollflow.device import calibrate
from rollflow.device.memory import CudaMemory
from rollflow.device.runner import Runner
from rollflow.device.workers import Lanes
from rollflow.door import Checked, Door, as_request
from rollflow.entries import Replay
from rollflow.errors import EngineClosed, EngineDead, RequestError, RollflowError, shown, told
from rollflow.host import Host
from rollflow.job import Job
from rollflow.journal import Journal, Kept
from rollflow.journaling import Journaling
from rollflow.loop import Loop
from rollflow.models import FlowModel, Geometry, Traits, acceleration, adapt, loading, own_size, velocity_dtype
from rollflow.models import traits as built_in_traits
from rollflow.models.text import Text
from rollflow.plan import Plan
from rollflow.preparing import Preparations
from rollflow.profile.ledger import Ledger
from rollflow.profiling import Profiling, about, check_installed, write
from rollflow.rendering import Rendering
from rollflow.request import Request, Result
from rollflow.settings import batch_sizes, checked_traits, floats, keep_pages, lanes_and_threads, on_device, slots_of
from rollflow.stats import Stats
from rollflow.values import flag, whole

_NUMBERS = itertools.count()
LOG = logging.getLogger("rollflow")
T = TypeVar("T")


class Engine:
    """Runs searches of many requests in shared forwards of one model.

    Requests come and go at any time and from any thread: `submit` returns a `Job` at once, `generate` waits. A thread
    of the engine's own does the work; it starts with the first request and ends with `close`, at the end of a `with`
    block, when the engine is dropped, or with the interpreter.

    Args:
        model: a flow pipeline of diffusers (`rollflow probe` shows what is made of one), or any
            `rollflow.models.FlowModel`.
        buckets: the batch sizes of a forward, ascending; a batch is padded up to the next. By default those of
            `BUCKETS` that pay on this model and device, as measured before the first request, and on a GPU fit into its
            memory (`Stats.bounds` says which of the two was first). There, rows of guided methods have those of them
            that hold what their gradients keep; where none does, parts of the networks are computed again in the
            backward pass, which takes about one more forward and is not charged. With a single bucket, a
            multiple of 8, a request's result does not depend on what runs beside it, bit for bit (on one CPU; on a GPU
            as far as its libraries compute a row alike at every place of a batch).
        slots: how many particles of one image size can live at once, the bound of their memory: by default 4096, or
            what fits into 1 GiB. A request waits until the slots that its method needs are free.
        traits: what searches should know of the model, see `rollflow.models.Traits`.
        lanes: how many batches may be on the device at a time: cohorts of searches alternate, so that one is decoded,
            judged and decided on while another is in the transformer. On a CPU they run side by side, each on
            `threads` cores.
        threads: cores of a lane, on a CPU. By default lanes and threads are what measures fastest before the first
            request.
        preview: judge particles on the model's light decoder, and decode only finalists in full.
            Guided methods take their gradients through the full one.
        reproducible: one bucket, and lanes and threads that do not depend on a measurement: a request's result is the
            same, bit for bit, in every engine on this device and under any load. It costs time: a single request then
            runs padded batches.
        graphs: on a GPU, run each batch's forward as one CUDA graph, captured before the first request of an image
            size. It takes a model that declares itself graphable (`rollflow.models.Capabilities`); others run without.
        journal: a folder in which every request is durable before `submit` returns, and its rewards soon after: what is
            not over when the process dies, or when the engine is closed without `drain`, is gone on with by `resume` of
            an engine that is made with the same folder.
            Requests are then plain values: rewards and methods by name. One engine at a time has a folder; results stay
            there, see `rollflow.journal.Journal`.
        max_queued: how many requests may wait to be let in; `submit` raises `EngineBusy` for more. None: any number.
        name: what recordings call the model; by default the class of its adapter.

    Attributes:
        ledger: what ran since the engine was made: rows, batches, calls of rewards, requests; see
            `rollflow.profile.ledger`.
    """

    def __init__(
        self,
        model: DiffusionPipeline | FlowModel,
        *,
        buckets: Sequence[int] | None = None,
        slots: int | None = None,
        traits: Traits | None = None,
        lanes: int | None = None,
        threads: int | None = None,
        preview: bool = False,
        reproducible: bool = False,
        graphs: bool = True,
        journal: str | Path | None = None,
        max_queued: int | None = None,
        name: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        preview, reproducible = flag("preview", preview), flag("reproducible", reproducible)
        graphs, traits = flag("graphs", graphs), checked_traits(traits)
        slots = None if slots is None else whole("slots", slots, 1)
        most = None if max_queued is None else whole("max_queued", max_queued, 1)
        if not callable(clock):
            raise RequestError(f"clock={shown(clock)}: it must be a function that returns seconds")
        self.model = adapt(model)
        if preview and not self.model.capabilities.preview:
            raise RequestError("preview=True: this model has no light decoder to judge particles by; leave it out")
        on_cpu, able = self.model.device.type == "cpu", self.model.capabilities
        sizes = batch_sizes(buckets, reproducible, on_cpu)
        count, each = lanes_and_threads(self.model.device, lanes, threads)
        if on_cpu:
            keep_pages()
        self.ledger, self.traits, self.preview, self.clock = Ledger(), traits, preview, clock
        self.name = type(self.model).__name__ if name is None else str(name)
        self._slots_of = partial(slots_of, slots, velocity=velocity_dtype(self.model), dtype=self.model.dtype)
        runner = Runner(self.model, sizes, self.ledger, Lanes(self.model.device, count, each), preview)
        preparations = Preparations(
            runner,
            self._slots_of,
            measure=able.signature is not None,
            keep_buckets=reproducible or buckets is not None,
            choose_lanes=lanes is None and threads is None and not reproducible and on_cpu,
            graphs=graphs and able.graphable and not on_cpu,
            memory=None if on_cpu else CudaMemory(self.model.device),
        )
        self._door = Door(
            self.model,
            self.traits,
            preview,
            self._slots_of,
            preparations.encoded,
        )
        loop = Loop(runner, preparations, self.ledger, self._slots_of, most, clock)
        self._kind = f"{self.name}, {str(self.model.dtype).removeprefix('torch.')}{', preview' * preview}"
        self._keeping = None if journal is None else Journaling(Journal(journal), clock)
        try:
            self._host, self._render = Host(loop, runner, preparations, self._keeping), Rendering(self.ledger)
        except BaseException:
            if self._keeping is not None:
                self._keeping.close()
            raise
        weakref.finalize(self, self._host.close, False, False).atexit = False  # the host sees to that

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = "shapes",
        device: str | torch.device | None = None,
        dtype: torch.dtype | Literal["auto"] | None = None,
        preview: bool | str | Path = False,
        compile: str | None = None,
        attention: str | None = None,
        text_tokens: int | None = None,
        quantize: str | None = None,
        pipeline: str | None = None,
        **options: Any,
    ) -> Engine:
        """An engine on a built-in model ("shapes", "shapes-base", "shapes-video"), or any flow pipeline of diffusers.

        A FluxPipeline is run by `rollflow.models.flux.FluxModel`, others by `rollflow.models.pipeline.PipelineModel`,
        for which `dtype="auto"`, `compile="all"`, `preview`, `attention` and `text_tokens` are refused.

        Args:
            name_or_path: which model: a built-in name, a folder that `save_pretrained` wrote, a hub id, or a single
                `.safetensors` file.
            device: by default CUDA where there is one.
            dtype: of the networks; by default bfloat16 on CUDA and float32 elsewhere; "auto" is bfloat16 on a GPU
                made for it, elsewhere whichever measures faster, or the default where measuring takes long. Particles
                are float32 always.
            preview: judge particles on a light decoder: True for the model's own (the built-in ones have one), or the
                folder or hub id of an `AutoencoderTiny`; see `Engine`.
            compile: "regional" compiles the transformer's repeated blocks (`torch.compile`), once for each batch size
                that pays as measured without; "all" also the decoders.
            attention: pins the kernel of the transformer's attention on a GPU: "flash", "efficient", "cudnn" or "math".
            text_tokens: how many tokens of a prompt the transformer reads; by default as many as it was trained with.
            quantize: "fp8" keeps the transformer's large matrices in 8-bit floats; takes torchao and a recent GPU.
            pipeline: the name of the pipeline's class, which a single file does not say of itself; elsewhere it goes
                before what the folder says.
            options: see `Engine`.

        Raises:
            ModelError: there is no such model, or it is no flow pipeline.
            RequestError: a device that is neither cpu nor cuda, or an option that this model cannot honour.
        """
        device, floating = on_device(device), floats(dtype)
        for name, given in (("name_or_path", name_or_path), ("preview", preview)):
            if not isinstance(given, str | Path) and not (name == "preview" and isinstance(given, bool)):
                raise RequestError(f"{name}={shown(given)}: it must be the name or the folder of a model")
            if not str(given).isprintable():
                raise RequestError(f"{name}={shown(str(given))}: there is no folder of such a name")
        auto = isinstance(floating, str)
        asked: dict[str, Any] = {"preview": preview, "attention": attention, "text_tokens": text_tokens}
        if auto or preview or compile == "all" or attention is not None or text_tokens is not None:
            named = loading.class_of(name_or_path, pipeline)
            loading.check_options(named, auto=auto, compile=compile, **asked)
        load = partial(loading.load, name_or_path, device, pipeline=pipeline)
        usual = torch.bfloat16 if device.type == "cuda" else torch.float32
        kind = floating or usual
        if auto:
            kind = calibrate.best_dtype(lambda kind: loading.model(load(dtype=kind)), device)
        options.setdefault("traits", built_in_traits(name_or_path))
        options.setdefault("name", str(name_or_path))
        loaded = load(dtype=kind)
        loading.check_options(type(loaded).__name__, compile=compile)
        for network in loading.networks(loaded):
            acceleration.quantize(network, quantize)
            acceleration.compile_blocks(network, compile)
        light = None
        if preview:
            light = loading.load_light("" if preview is True else preview, name_or_path, device, kind)
        for autoencoder in (getattr(loaded, "vae", None), light):
            if autoencoder is not None:
                acceleration.compile_decoder(autoencoder, compile)
        model = loading.model(loaded, light, attention, own_size(name_or_path), text_tokens)
        return cls(model, preview=light is not None, **options)

    # Requests.

    def check(self, request: str | Request, **options: Any) -> Plan:
        """What `submit` would run: the request with what it leaves to the method and the model, and its coefficients.

        The first one of a size of a learned pipeline takes seconds.

        Raises:
            RequestError: a request that cannot be honoured.
        """
        return self._door.check(request, options).plan

    def submit(self, request: str | Request, *, id: Any = None, replay: Replay | None = None, **options: Any) -> Job:
        """Hands in a request, from any thread, at any time, and returns at once; with a journal, when it is on disk.

        The first request of a size of a learned pipeline waits until the size is learned, which may take seconds: on an
        event loop, use `generate_async`.

        Args:
            request: a prompt or a `Request`.
            id: what the job is called in messages, anything; by default a number. Nothing looks at it, but for a
                journal, where it is a text and no other's.
            replay: what `Job.entries` gave of the same request in an engine that is gone: the search goes on from
                there, after it has evaluated again what it still holds, and of a request without a time limit the
                result is the same (bit for bit, where both engines are `reproducible`). A replay that does not fit, or
                is of an engine of another `name`, dtype or preview, is left aside with a warning, and the search begins
                anew. Of a limited time what was used up is gone.
            options: as of `generate`, with a prompt.

        Raises:
            RequestError: a request that cannot be honoured.
            EngineBusy: `max_queued` requests wait already; its `seconds` say when to come again.
            EngineClosed, EngineDead: the engine takes no more requests.
        """
        asked = as_request(request, options)
        checked = self._door.check(left_of(asked, replay), {})._replace(asked=asked)
        job = self._submit(checked, id, replay=replay)
        self._acknowledged([job])
        return job

    def resume(self) -> list[Job]:
        """Goes on with what the journal holds of an engine that is gone: the jobs, with their ids of then.

        Where a request cannot be honoured any more, by another model for instance, the journal says so, and the others
        go on.

        Raises:
            RequestError: the engine has no journal.
        """
        keeping = self._keeping
        if keeping is None:
            raise RequestError("resume: this engine has no journal; make it with Engine(..., journal=FOLDER)")
        jobs: list[Job] = []
        for kept in keeping.claimed():
            try:
                checked = self._door.check(left_of(keeping.asked(kept), kept.replay), {})
                jobs.append(self._submit(checked, kept.id, True, kept.replay, kept))
            except (EngineClosed, EngineDead):  # the rest is for the next engine
                break
            except RollflowError as error:
                keeping.journal.fail(kept.id, "failed", told(error))
        return jobs

    def _submit(
        self,
        checked: Checked,
        id: Any = None,
        force: bool = False,
        replay: Replay | None = None,
        kept: Kept | None = None,
    ) -> Job:
        """Hands a request in; with a journal, `_acknowledged` waits for it, unless it is `kept` there already."""
        self._host.start()
        keeping, loop = self._keeping, self._host.loop
        values = {} if keeping is None or kept is not None else keeping.request(checked.asked)
        named = next(_NUMBERS) if id is None else id
        if keeping is not None and kept is None:
            named = keeping.named(id)
        spent = 0.0 if replay is None else replay.seconds
        if replay is not None and replay.of not in ("", self._kind):
            LOG.warning("a search of an engine %r begins anew: this one is %r", replay.of, self._kind)
            replay = None
        job = Job(named, checked.plan.request, self._host, self._render, self, spent, self._kind)
        job.begin(lambda tell: loop.submit(checked.plan, checked.geometry, tell, force, checked.resize, replay))
        if keeping is not None:
            try:
                keeping.accept(job, values) if kept is None else keeping.resume(job, kept)
            except BaseException:
                job.cancel()
                raise
        return job

    def _acknowledged(self, jobs: Sequence[Job | RollflowError]) -> None:
        """Waits until they are kept, where there is a journal; where one cannot be, none is run."""
        if self._keeping is not None:
            try:
                self._keeping.wait([job for job in jobs if isinstance(job, Job)])
            except BaseException:
                calls.cancel(jobs)
                raise

    @overload
    def generate(
        self, requests: str | Request, *, on_progress: Callable[[Progress], None] | None = None, **options: Any
    ) -> Result: ...

    @overload
    def generate(
        self,
        requests: Sequence[str | Request],
        *,
        return_exceptions: Literal[False] = False,
        on_progress: Callable[[Progress], None] | None = None,
        **options: Any,
    ) -> list[Result]: ...

    @overload
    def generate(
        self,
        requests: Sequence[str | Request],
        *,
        return_exceptions: bool,
        on_progress: Callable[[Progress], None] | None = None,
        **options: Any,
    ) -> list[Result | BaseException]: ...

    def generate(
        self,
        requests: str | Request | Sequence[str | Request],
        *,
        return_exceptions: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
        **options: Any,
    ) -> Any:
        """Runs one request, or many together; returns a result for each, in order.

        An interruption (Ctrl-C) cancels the requests of this call and leaves the engine as it was.

        Args:
            requests: prompts or `Request`s.
            return_exceptions: put the error of a request in its place among the results, as `asyncio.gather` does.
                Otherwise the others still finish, and then the first error is raised, with its place in the message.
            on_progress: called when rewards have come, on the caller's thread.
            options: fields of `Request` for every prompt given as a string; other names are the method's options.

        Raises:
            RequestError: a request that cannot be honoured, before anything runs; of several, it says which.
            RollflowError: what a request failed with; its cause is the original error.
        """
        return_exceptions = flag("return_exceptions", return_exceptions)
        if on_progress is not None and not callable(on_progress):
            raise RequestError(f"on_progress={shown(on_progress)}: it must be a function of a Progress, or None")
        if isinstance(requests, str | Request):
            found = self.generate([requests], return_exceptions=return_exceptions, on_progress=on_progress, **options)
            return found[0]
        self._host.check_waiting()
        jobs = self._submit_all(requests, options, return_exceptions)
        try:
            calls.follow(jobs, on_progress)
        except BaseException:
            calls.cancel(jobs)
            raise
        return calls.collected(jobs, return_exceptions)

    async def generate_async(
        self,
        requests: str | Request | Sequence[str | Request],
        *,
        return_exceptions: bool = False,
        **options: Any,
    ) -> Any:
        """`generate` for asyncio. A task that is cancelled cancels its requests.

        Requests are checked on a thread of asyncio's executor: learning a size of a pipeline takes seconds.
        """
        if isinstance(requests, str | Request):
            return (await self.generate_async([requests], return_exceptions=return_exceptions, **options))[0]
        self._host.check_waiting()
        jobs = await calls.on_a_thread(partial(self._submit_all, requests, options, return_exceptions))
        try:
            for job in jobs:
                if isinstance(job, Job):
                    await job.over()
        except BaseException:
            calls.cancel(jobs)
            raise
        return calls.collected(jobs, return_exceptions)

    def map(
        self,
        requests: Iterable[str | Request],
        *,
        concurrency: int = 64,
        return_exceptions: bool = False,
        **options: Any,
    ) -> Iterator[tuple[int, Any]]:
        """Yields `(index, Result)` of requests as they finish; takes from the iterable only as many as run.

        What is done is yielded before more is taken: the iterable must not wait for what was not yielded yet.

        Args:
            requests: prompts or `Request`s, also without end.
            concurrency: how many are in the engine at a time.
            return_exceptions: yield errors in place of results; otherwise the first is raised, and the rest cancelled.
            options: as of `generate`.
        """
        concurrency = whole("concurrency", concurrency, 1)
        return_exceptions = flag("return_exceptions", return_exceptions)
        if isinstance(requests, str | bytes | Request | Mapping) or not isinstance(requests, Iterable):
            raise RequestError(f"requests={shown(requests)}: they must be a list, or another iterable, of requests")
        self._host.check_waiting()

        def submit(request: Any) -> Job:
            job = self._submit(self._door.check(request, options), force=True)
            self._acknowledged([job])
            return job

        return calls.mapped(
            requests,
            submit,
            self._host.check_waiting,
            concurrency,
            return_exceptions,
        )

    def _submit_all(
        self, requests: Sequence[str | Request], options: dict[str, Any], return_exceptions: bool
    ) -> calls.Jobs:
        self._host.start()
        jobs = calls.submitted(
            requests,
            lambda request: self._door.check(request, options),
            partial(self._submit, force=True),
            return_exceptions,
        )
        self._acknowledged(jobs)
        return jobs

    # What is prepared ahead.

    def encode(
        self,
        prompts: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        negative: str | None = None,
    ) -> None:
        """Encodes prompts that requests will come for, each distinct one once.

        Args:
            prompts: a prompt, or several.
            height, width, frames: the size that they will come with, for models whose encodings depend on it.
            negative: the negative prompt that they will come with.

        Raises:
            RequestError: a prompt that the model cannot read.
        """
        checked = checks.prompts(prompts)
        texts = [Text(prompt, None if negative is None else checks.negative(negative)) for prompt in checked]
        for text in texts:
            self._door.check_text(text)
        geometry = self._door.geometry(height, width, frames) if self.model.capabilities.sized_text else None
        self._host.prepare(texts, geometry)

    def warm_up(self, height: int | None = None, width: int | None = None, frames: int | None = None) -> None:
        """Measures what batches of this image size cost, so that the first request does not have to wait for it.

        The measured batch sizes, and on a CPU the numbers of lanes and threads, hold for the engine from then on.
        Requests of other sizes go on meanwhile.
        """
        self._host.prepare([], self._door.geometry(height, width, frames), measure=True)

    def buckets(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> Mapping[int, float]:
        """The batch sizes for an image size, and the seconds that a batch of each was measured to take."""
        self.warm_up(height, width, frames)
        return self._host.preparations.cost(self._door.geometry(height, width, frames)).seconds

    def release_text_encoders(self) -> None:
        """Frees the memory of the text encoders. From then on only prompts that were encoded before are accepted.

        Raises:
            RequestError: the model cannot do without them.
        """
        if not self.model.capabilities.releases_text:
            raise RequestError(f"a {type(self.model).__name__} has no text encoders that could be released")
        self.model.release_text_encoders()  # type: ignore[attr-defined]
        self._host.preparations.pinned = True

    def forget_prompts(self) -> None:
        """Drops the encoded prompts that it keeps for later requests."""
        self._host.do(self._host.preparations.forget)

    # Its life.

    @property
    def lanes(self) -> Lanes:
        """The threads that run its batches."""
        return self._host.runner.threads

    def stats(self) -> Stats:
        """What it holds now; of any thread."""
        host = self._host
        found = host.do(host.loop.snapshot)
        counts = {name: getattr(found, name) for name in ("queued", "running", "rows", "live", "promised", "free")}
        return Stats(
            **counts,
            buckets=_by_size(host.runner.buckets),
            bounds=_by_size(host.preparations.bounds),
            graph_memory=_summed_by_size(host.preparations.graph_memory),
            nfe_per_second=found.nfe_per_second,
            abandoned=host.runner.threads.abandoned,
            healthy=found.dead is None and not host.closed,
            rewards=host.runner.judge.costs,
        )

    def profile(
        self, out: str | Path | None = None, usd_per_hour: float | None = None, kernels: bool = False
    ) -> Profiling:
        """Records what runs while its `with` block does: `with engine.profile("profile") as p: ...`.

        Args:
            out: a folder, which gets the ledger's tables as Parquet, `trace.json.gz` for Perfetto and `report.html`;
                None to have `p.recording` alone.
            usd_per_hour: what the device costs, for the report.
            kernels: record torch's operators and the GPU's kernels of the first seconds, too, for the trace; it slows
                them down.

        Raises:
            RequestError: what writes them is not installed (`pip install 'rollflow[profile]'`), `out` is a file, or a
                price that is none.
        """
        if usd_per_hour is not None and not usd_per_hour > 0:
            raise RequestError(f"usd_per_hour={shown(usd_per_hour)}: it must be above 0; leave it out for no dollars")
        if out is not None:
            check_installed()
            if Path(out).exists() and not Path(out).is_dir():
                raise RequestError(f"out={shown(str(out))}: it is a file; give a folder")
        host = self._host
        known = partial(about, self.name, host.runner, host.preparations, self.traits)
        writes = partial(write, usd_per_hour=usd_per_hour)
        return Profiling(self.ledger, known, None if out is None else Path(out), writes, kernels)

    def close(self, drain: bool = True) -> None:
        """Takes no more requests, ends what is there, and gives threads and memory back. Further calls do nothing.

        Args:
            drain: finish the requests that are there; otherwise they are cancelled.
        """
        self._host.close(drain)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(drain=kind is None)


def _summed_by_size(found: Mapping[Geometry, int]) -> dict[tuple[int, ...], int]:
    """The same of what requests with a cache and without have each of their own."""
    totals = dict[Geometry, int]()
    for one, value in found.items():
        totals[one.plain] = totals.get(one.plain, 0) + value
    return _by_size(totals)


def _by_size(found: Mapping[Geometry, T]) -> dict[tuple[int, ...], T]:
    """By (height, width), of clips (height, width, frames)."""
    return {
        (one.height, one.width) if one.frames is None else (one.height, one.width, one.frames): value
        for one, value in sorted(found.items(), key=lambda one: -one[0].kept)  # requests without a cache go before
    }
