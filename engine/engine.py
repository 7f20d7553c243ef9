"""The engine: requests in, results out."""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import torch
from diffusers import FluxPipeline

from rollflow import checks, methods, rewards
from rollflow.device import calibrate
from rollflow.device.runner import Runner, model_error
from rollflow.device.workers import Lanes
from rollflow.errors import FunctionError, RequestError, RollflowError, line, said, shown
from rollflow.host import Host
from rollflow.job import Job, Rendering, indexed
from rollflow.loop import Loop, promise
from rollflow.models import FlowModel, Geometry, Traits, acceleration, adapt
from rollflow.models import traits as built_in_traits
from rollflow.models.flux import FluxModel, load, load_light
from rollflow.plan import Plan, plan
from rollflow.preparing import Preparations
from rollflow.profile.ledger import Ledger
from rollflow.request import Request, Result
from rollflow.values import flag, number, whole

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # each of which is measured, and on a GPU has a graph of its own
CPU_BUCKETS = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
REPRODUCIBLE_BUCKET = 16
MOST_LANES = 4  # on a CPU, where nothing was measured
MOST_ROWS, MOST_SIZES = 4096, 256  # of a batch; of batch sizes
MOST_THREADS = 256  # lanes, and cores of a lane
POOL_SLOTS = 4096
POOL_BYTES = 2**30
_FIELDS = {field.name for field in fields(Request)}
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Progress:
    """What a progress callback is told when rewards have come: of the requests of one call, in their order."""

    committed_nfe: tuple[int, ...]
    best_reward: tuple[float, ...]


class Checked(NamedTuple):
    """A request that can be honoured; `resize` plans it anew, where its time decides the budget."""

    plan: Plan
    geometry: Geometry
    resize: Callable[[int], Plan] | None


@dataclass(frozen=True)
class Stats:
    """What an engine holds at a moment.

    Attributes:
        queued: requests that wait to be let in.
        running: requests that were let in and are not over.
        rows: rows and final images that are on the device or with a reward.
        live: slots of particles that are in use.
        promised: slots that running requests were promised or have taken beyond that.
        free: slots that are not in use.
        buckets: batch sizes by (height, width), of the image sizes that were used so far.
        nfe_per_second: evaluations a second over the last ten seconds, those that ran in vain included.
        abandoned: threads that were given up because a call of a reward did not come back within its timeout.
        healthy: whether it takes requests: it was not closed, and its device did not fail.
    """

    queued: int
    running: int
    rows: int
    live: int
    promised: int
    free: int
    buckets: Mapping[tuple[int, int], tuple[int, ...]]
    nfe_per_second: float
    abandoned: int
    healthy: bool


class Engine:
    """Runs searches of many requests in shared forwards of one model.

    Requests come and go at any time and from any thread: `submit` returns a `Job` at once, `generate` waits. A thread
    of the engine's own does the work; it starts with the first request and ends with `close`, at the end of a `with`
    block, when the engine is dropped, or with the interpreter.

    Args:
        model: a diffusers `FluxPipeline`, or any `rollflow.models.FlowModel`.
        buckets: the batch sizes of a forward, ascending; a batch is padded up to the next. By default those of
            `BUCKETS` that pay on this model and device, as measured before the first request. With a single bucket, a
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
        max_queued: how many requests may wait to be let in; `submit` raises `EngineBusy` for more. None: any number.

    Attributes:
        ledger: rows by kind and seconds by span since the engine was made.
    """

    def __init__(
        self,
        model: FluxPipeline | FlowModel,
        *,
        buckets: Sequence[int] | None = None,
        slots: int | None = None,
        traits: Traits | None = None,
        lanes: int | None = None,
        threads: int | None = None,
        preview: bool = False,
        reproducible: bool = False,
        graphs: bool = True,
        max_queued: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        preview, reproducible = flag("preview", preview), flag("reproducible", reproducible)
        graphs, traits = flag("graphs", graphs), _checked_traits(traits)
        slots = None if slots is None else whole("slots", slots, 1)
        most = None if max_queued is None else whole("max_queued", max_queued, 1)
        if not callable(clock):
            raise RequestError(f"clock={shown(clock)}: it must be a function that returns seconds")
        if buckets is not None:
            buckets = _checked_buckets(buckets, reproducible)
        self.model = adapt(model)
        if preview and not self.model.capabilities.preview:
            raise RequestError("preview=True: this model has no light decoder to judge particles by; leave it out")
        on_cpu = self.model.device.type == "cpu"
        if on_cpu:
            _keep_pages()
        self.ledger, self.traits, self.preview, self.clock = Ledger(), traits, preview, clock
        self._slots_of = partial(_slots_of, slots)
        usual = CPU_BUCKETS if on_cpu else BUCKETS
        sizes = tuple(buckets) if buckets is not None else (REPRODUCIBLE_BUCKET,) if reproducible else usual
        count, each = _lanes(self.model.device, lanes, threads)
        able = self.model.capabilities
        runner = Runner(self.model, sizes, self.ledger, Lanes(self.model.device, count, each), preview)
        preparations = Preparations(
            runner,
            self._slots_of,
            measure=able.signature is not None,
            keep_buckets=reproducible or buckets is not None,
            choose_lanes=lanes is None and threads is None and not reproducible and on_cpu,
            graphs=graphs and able.graphable and not on_cpu,
        )
        loop = Loop(runner, preparations, self.ledger, self._slots_of, most, clock)
        self._host, self._render = Host(loop, runner, preparations), Rendering()
        weakref.finalize(self, self._host.close, False).atexit = False  # the host sees to that

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = "shapes",
        device: str | torch.device | None = None,
        dtype: torch.dtype | Literal["auto"] | None = None,
        preview: bool | str | Path = False,
        compile: str | None = None,
        attention: str | None = None,
        quantize: str | None = None,
        **options: Any,
    ) -> Engine:
        """An engine on a built-in model ("shapes", "shapes-base"), a local FluxPipeline folder, or a hub id.

        Args:
            name_or_path: which model.
            device: by default CUDA where there is one.
            dtype: of the networks; by default bfloat16 on CUDA and float32 elsewhere; "auto" is float32 or bfloat16,
                whichever measures faster on this device. Particles are float32 always.
            preview: judge particles on a light decoder: True for the model's own (the built-in ones have one), or the
                folder or hub id of an `AutoencoderTiny`; see `Engine`.
            compile: "regional" compiles the transformer's repeated blocks (`torch.compile`), once for each batch size.
            attention: pins the backend of torch's attention on a GPU: "flash", "efficient", "cudnn" or "math".
            quantize: "fp8" keeps the transformer's large matrices in 8-bit floats; takes torchao and a recent GPU.
            options: see `Engine`.

        Raises:
            ModelError: there is no such model, or it is no FluxPipeline.
            RequestError: a device that is neither cpu nor cuda.
        """
        if not (device is None or isinstance(device, str | torch.device)):
            raise RequestError(f"device {shown(device)}: choose cpu, cuda or cuda:N")
        try:
            device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise RequestError(f"device {shown(device)}: choose cpu, cuda or cuda:N") from error
        if device.type not in ("cpu", "cuda"):
            raise RequestError(f"device {str(device)!r}: choose cpu, cuda or cuda:N")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RequestError(f"device {str(device)!r}: torch finds no CUDA device here; choose cpu")
        if not (dtype is None or (isinstance(dtype, str) and dtype == "auto") or _is_floating(dtype)):
            raise RequestError(
                f"dtype={shown(dtype)}: it must be a torch.dtype of floats, such as torch.bfloat16, or 'auto'"
            )
        for name, given in (("name_or_path", name_or_path), ("preview", preview)):
            if not isinstance(given, str | Path) and not (name == "preview" and isinstance(given, bool)):
                raise RequestError(f"{name}={shown(given)}: it must be the name or the folder of a model")
            if not str(given).isprintable():
                raise RequestError(f"{name}={shown(str(given))}: there is no folder of such a name")
        if isinstance(dtype, str):
            dtype = calibrate.best_dtype(lambda kind: FluxModel(load(name_or_path, device, kind)))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        options.setdefault("traits", built_in_traits(name_or_path))
        pipeline = load(name_or_path, device, dtype)
        acceleration.quantize(pipeline.transformer, quantize)
        acceleration.compile_blocks(pipeline.transformer, compile)
        light = load_light("" if preview is True else preview, name_or_path, device, dtype) if preview else None
        return cls(FluxModel(pipeline, light, attention), preview=light is not None, **options)

    # Requests.

    def submit(self, request: str | Request, *, id: Any = None, **options: Any) -> Job:
        """Hands in a request, from any thread, at any time, and returns at once.

        Args:
            request: a prompt or a `Request`.
            id: what the job is called in messages, anything; by default a number. Nothing looks at it.
            options: as of `generate`, with a prompt.

        Raises:
            RequestError: a request that cannot be honoured.
            EngineBusy: `max_queued` requests wait already; its `seconds` say when to come again.
            EngineClosed, EngineDead: the engine takes no more requests.
        """
        return self._submit(self._check(_request(request, options)), id)

    def _submit(self, checked: Checked, id: Any = None, force: bool = False) -> Job:
        self._host.start()
        job = Job(next(_NUMBERS) if id is None else id, checked.plan.request, self._host, self._render, self)
        loop = self._host.loop
        job.begin(lambda tell: loop.submit(checked.plan, checked.geometry, tell, force, checked.resize))
        return job

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
            _follow(jobs, on_progress)
        except BaseException:
            for job in jobs:
                if isinstance(job, Job):
                    job.cancel()
            raise
        return _collected(jobs, return_exceptions)

    async def generate_async(
        self,
        requests: str | Request | Sequence[str | Request],
        *,
        return_exceptions: bool = False,
        **options: Any,
    ) -> Any:
        """`generate` for asyncio. A task that is cancelled cancels its requests."""
        if isinstance(requests, str | Request):
            return (await self.generate_async([requests], return_exceptions=return_exceptions, **options))[0]
        jobs = self._submit_all(requests, options, return_exceptions)
        try:
            for job in jobs:
                if isinstance(job, Job):
                    await job.over()
        except BaseException:
            for job in jobs:
                if isinstance(job, Job):
                    job.cancel()
            raise
        return _collected(jobs, return_exceptions)

    def map(
        self,
        requests: Iterable[str | Request],
        *,
        concurrency: int = 64,
        return_exceptions: bool = False,
        **options: Any,
    ) -> Iterator[tuple[int, Any]]:
        """Yields `(index, Result)` of requests as they finish; takes from the iterable only as many as run.

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
        return self._mapped(_each(requests), concurrency, return_exceptions, options)

    def _mapped(
        self, requests: Iterator[str | Request], most: int, return_exceptions: bool, options: dict[str, Any]
    ) -> Iterator[tuple[int, Any]]:
        running: dict[concurrent.futures.Future, tuple[int, Job]] = {}
        numbered = enumerate(requests)
        try:
            while True:
                while len(running) < most and (one := next(numbered, None)) is not None:
                    try:
                        job = self._submit(self._check(_request(one[1], options)), force=True)
                    except RollflowError as error:
                        if not return_exceptions:
                            raise indexed(error, one[0], 2) from error.__cause__
                        yield one[0], error
                    else:
                        running[job.future] = one[0], job
                if not running:
                    return
                for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done:
                    index, job = running.pop(future)
                    error = job.exception()
                    if error is not None and not return_exceptions:
                        raise indexed(error, index, 2) from error.__cause__
                    yield index, job.result() if error is None else error
        finally:
            for _, job in running.values():
                job.cancel()

    def _submit_all(
        self, requests: Sequence[str | Request], options: dict[str, Any], return_exceptions: bool
    ) -> list[Job | RollflowError]:
        """A job for each request; errors of requests in their places, or the first of them before anything runs."""
        self._host.start()
        asked: list[Checked | RollflowError] = []
        given = checks.listed(requests, "requests")
        for i, request in enumerate(given):
            try:
                asked.append(self._check(_request(request, options)))
            except RollflowError as error:
                if not return_exceptions:
                    raise indexed(error, i, len(given)) from error.__cause__
                asked.append(error)
        return [self._submit(one, force=True) if isinstance(one, Checked) else one for one in asked]

    def _check(self, request: Request) -> Checked:
        """A request that can be honoured, with all that this takes."""
        timed = request.nfe is None and (request.seconds is not None or request.deadline is not None)

        def for_budget(nfe: int | None) -> Plan:
            try:
                return plan(replace(request, nfe=nfe), self.traits, self.preview)
            except RequestError as error:
                smallest = getattr(error, "smallest", None)
                if smallest is None or not timed:
                    raise
                return plan(replace(request, nfe=smallest), self.traits, self.preview)

        checked = for_budget(request.nfe)
        self._check_prompt(checked.request.prompt)
        rewards.check(checked.reward, checked.request.prompt)
        geometry = self._geometry(checked.request.height, checked.request.width)
        size = rewards.size(checked.reward)
        if size is not None and (geometry.height, geometry.width) != size:
            raise RequestError(
                f"size {geometry.height}x{geometry.width}: the reward {checked.reward.name} judges images of "
                f"{size[0]}x{size[1]} only"
            )
        if checked.latents is not None and checked.latents.shape[1:] != (geometry.token, geometry.channel):
            raise RequestError(
                f"latents of shape {list(checked.latents.shape[1:])}: this model and size need [token, channel] = "
                f"[{geometry.token}, {geometry.channel}]"
            )
        slots, needed = self._slots_of(geometry), promise(checked)
        if needed > slots:
            raise RequestError(
                f"nfe={checked.request.nfe}: the method {methods.title(checked.request.method)} may hold {needed} "
                f"particles at once then, and this engine holds {slots} of this size; lower it, or make the engine "
                "with Engine(slots=...)"
            )
        return Checked(checked, geometry, (lambda nfe: for_budget(min(nfe, slots))) if timed else None)

    def _check_prompt(self, prompt: str) -> None:
        if prompt not in self._host.preparations.conditioning:
            try:
                self.model.check_prompt(prompt)
            except RollflowError:
                raise
            except Exception as error:
                raise model_error(error) from error

    def _geometry(self, height: object, width: object) -> Geometry:
        try:
            return self.model.geometry(*checks.size(height, width))
        except RollflowError:
            raise
        except Exception as error:
            raise model_error(error) from error

    # What is prepared ahead.

    def encode(self, prompts: str | Sequence[str]) -> None:
        """Encodes prompts that requests will come for, each distinct one once.

        Raises:
            RequestError: a prompt that the model cannot read.
        """
        checked = checks.prompts(prompts)
        for prompt in checked:
            self._check_prompt(prompt)
        self._host.prepare(checked, None)

    def warm_up(self, height: int | None = None, width: int | None = None) -> None:
        """Measures what batches of this image size cost, so that the first request does not have to wait for it.

        The measured batch sizes, and on a CPU the numbers of lanes and threads, hold for the engine from then on.
        Requests of other sizes go on meanwhile.
        """
        self._host.prepare([], self._geometry(height, width))

    def buckets(self, height: int | None = None, width: int | None = None) -> Mapping[int, float]:
        """The batch sizes for an image size, and the seconds that a batch of each was measured to take."""
        self.warm_up(height, width)
        return self._host.preparations.cost(self._geometry(height, width)).seconds

    def release_text_encoders(self) -> None:
        """Frees the memory of the text encoders. From then on only prompts that were encoded before are accepted.

        Raises:
            RequestError: the model cannot do without them.
        """
        if not self.model.capabilities.releases_text:
            raise RequestError(f"a {type(self.model).__name__} has no text encoders that could be released")
        self.model.release_text_encoders()
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
        buckets = {(g.height, g.width): sizes for g, sizes in [*host.runner.buckets.items()]}
        return Stats(
            queued=found.queued,
            running=found.running,
            rows=found.rows,
            live=found.live,
            promised=found.promised,
            free=found.free,
            buckets=buckets,
            nfe_per_second=found.nfe_per_second,
            abandoned=host.runner.threads.abandoned,
            healthy=found.dead is None and not host.closed,
        )

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


def _checked_traits(traits: Traits | None) -> Traits:
    if traits is None:
        return Traits()
    if not isinstance(traits, Traits):
        raise RequestError(f"traits={shown(traits)}: they must be rollflow.models.Traits")
    trusted = number("traits.trusted_from", traits.trusted_from, 1)
    return Traits(whole("traits.steps", traits.steps, 1, checks.MOST_STEPS), trusted)


def _checked_buckets(buckets: Any, reproducible: bool) -> list[int]:
    if not isinstance(buckets, Iterable) or isinstance(buckets, str | bytes | bytearray | Mapping):
        raise RequestError(f"buckets={shown(buckets)}: they must be a list of ascending batch sizes of at least 1")
    given = checks.listed(itertools.islice(buckets, MOST_SIZES + 1), "buckets")
    sizes = [whole("each of the buckets", bucket, 1, MOST_ROWS) for bucket in given]
    if not sizes or len(sizes) > MOST_SIZES or sizes != sorted(set(sizes)):
        raise RequestError(
            f"buckets={shown(sizes)}: they must be ascending batch sizes of at least 1, at most {MOST_SIZES} of them"
        )
    if reproducible and (len(sizes) > 1 or sizes[0] % 8):
        raise RequestError(f"buckets={shown(sizes)}: a reproducible engine has a single batch size, a multiple of 8")
    return sizes


def _is_floating(dtype: object) -> bool:
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _lanes(device: torch.device, lanes: int | None, threads: int | None) -> tuple[int, int]:
    """Lanes and threads of each: on a CPU all cores, on a GPU two cohorts that alternate."""
    if device.type != "cpu":
        return whole("lanes", 2 if lanes is None else lanes, 1, MOST_THREADS), 1
    cores = torch.get_num_threads()
    if lanes is None:
        lanes = min(
            MOST_LANES, cores if threads is None else max(1, cores // whole("threads", threads, 1, MOST_THREADS))
        )
    lanes = whole("lanes", lanes, 1, MOST_THREADS)
    return lanes, max(1, cores // lanes) if threads is None else whole("threads", threads, 1, MOST_THREADS)


def _keep_pages() -> None:
    """Makes glibc keep freed activations instead of giving their pages back at every batch.

    Freeing a block of nearly 32 MiB raises malloc's thresholds for good: smaller blocks then come from the heap, which
    is trimmed above 64 MiB only (mallopt(3), M_MMAP_THRESHOLD). Elsewhere it does nothing.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


def _request(asked: str | Request, options: dict[str, Any]) -> Request:
    if isinstance(asked, Request):
        if options:
            names = line(", ".join(options), 100)
            raise RequestError(f"options {names}: they go with prompts; a Request carries its own")
        return asked
    if not isinstance(asked, str):
        raise RequestError(f"a {line(type(asked).__name__, 60)} is no request: pass a prompt or a rollflow.Request")
    known = {name: value for name, value in options.items() if name in _FIELDS}
    own = {name: value for name, value in options.items() if name not in _FIELDS}
    if "prompt" in known:
        raise RequestError(f"the prompt {shown(asked)} and prompt={shown(known['prompt'])}: give one")
    method: Any = known.get("method", Request.method)
    taken = _options_of(method) if own else []
    for name in own:
        if name not in taken and (close := get_close_matches(name, _FIELDS, 1)):
            raise RequestError(f"there is no option {shown(name)}: did you mean {close[0]!r}?")
    return Request(asked, **{**known, "options": {**checks.options(known.get("options", {})), **own}})


def _options_of(method: Any) -> list[str]:
    """The options of a method of the user's own; none for what is none, which `plan` refuses."""
    try:
        return methods.options_of(method)
    except (TypeError, ValueError):
        return []


def _each(requests: Iterable[str | Request]) -> Iterator[str | Request]:
    """The members of the caller's iterable; what it raises is the cause of a `FunctionError`."""
    try:
        yield from requests
    except Exception as error:
        raise FunctionError(f"the iterable of requests raised {said(error)}") from error


def _slots_of(slots: int | None, geometry: Geometry) -> int:
    """How many particles of a geometry can live at once: as asked, or what fits into the bound of their memory."""
    each = geometry.token * geometry.channel * 8
    return slots or max(64, min(POOL_SLOTS, POOL_BYTES // each))


def _follow(jobs: Sequence[Job | RollflowError], on_progress: Callable[[Progress], None] | None) -> None:
    """Waits for all jobs, and tells how far they are."""
    running = [job for job in jobs if isinstance(job, Job)]
    if on_progress is None:
        concurrent.futures.wait([job.future for job in running])
        return
    changed, told = threading.Event(), None
    with ExitStack() as watches:
        for job in running:
            watches.enter_context(job.watched(changed.set))
        over = False
        while not over:
            if not all(job.done() for job in running):
                changed.wait()
                changed.clear()
            over = all(job.done() for job in running)
            state = _progress(jobs)
            if state != told and any(state.committed_nfe):
                told = state
                try:
                    on_progress(state)
                except Exception as error:
                    raise FunctionError(f"the progress callback raised {said(error)}") from error


def _progress(jobs: Sequence[Job | RollflowError]) -> Progress:
    updates = [job.update if isinstance(job, Job) else None for job in jobs]
    return Progress(
        tuple(0 if update is None else update.committed_nfe for update in updates),
        tuple(float("-inf") if update is None else update.best_reward for update in updates),
    )


def _collected(jobs: Sequence[Job | RollflowError], return_exceptions: bool) -> list[Any]:
    """The results of jobs that are over, with errors in their places, or else the first of them."""
    found: list[Any] = []
    for i, job in enumerate(jobs):
        error = job.exception() if isinstance(job, Job) else job
        if error is not None and not return_exceptions:
            raise indexed(error, i, len(jobs)) from error.__cause__
        found.append(job.result() if isinstance(job, Job) and error is None else error)
    return found
