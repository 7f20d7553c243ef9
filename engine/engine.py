"""The engine: requests in, results out."""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import torch
from diffusers import FluxPipeline
from PIL import Image

from rollflow import methods, rewards
from rollflow.device import calibrate
from rollflow.device.runner import Runner
from rollflow.device.workers import Lanes
from rollflow.errors import RequestError
from rollflow.methods.budget import whole
from rollflow.models import FlowModel, Geometry, Traits, acceleration, adapt
from rollflow.models import traits as built_in_traits
from rollflow.models.flux import FluxModel, load, load_light
from rollflow.plan import Plan, plan
from rollflow.profile.ledger import Ledger
from rollflow.request import Request, Result
from rollflow.schedule.odds import Odds
from rollflow.schedule.pool import ParticlePool
from rollflow.schedule.scheduler import Outcome, Scheduler
from rollflow.search.search import Search

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # each of which is measured, and on a GPU has a graph of its own
CPU_BUCKETS = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
REPRODUCIBLE_BUCKET = 16
MOST_LANES = 4  # on a CPU, where nothing was measured
POOL_SLOTS = 4096
POOL_BYTES = 2**30
ENCODED_PROMPTS = 256  # kept for later calls
_FIELDS = {field.name for field in fields(Request)}


@dataclass(frozen=True)
class Progress:
    """What a progress callback is told when rewards have come: of the requests of one call, in their order."""

    committed_nfe: tuple[int, ...]
    best_reward: tuple[float, ...]


class Engine:
    """Runs searches of many requests in shared forwards of one model.

    Args:
        model: a diffusers `FluxPipeline`, or any `rollflow.models.FlowModel`.
        buckets: the batch sizes of a forward, ascending; a batch is padded up to the next. By default those of
            `BUCKETS` that pay on this model and device, as measured before the first request. With a single bucket, a
            multiple of 8, a request's result does not depend on what runs beside it, bit for bit (on one CPU; on a GPU
            as far as its libraries compute a row alike at every place of a batch).
        slots: how many particles of one image size can live at once, the bound of their memory. By default 4096, or
            what fits into 1 GiB. A request is promised as many as its nfe, and waits until they are free.
        traits: what searches should know of the model, see `rollflow.models.Traits`.
        lanes: how many batches may be on the device at a time: cohorts of searches alternate, so that one is decoded,
            judged and decided on while another is in the transformer. On a CPU they run side by side, each on
            `threads` cores.
        threads: cores of a lane, on a CPU. By default lanes and threads are what measures fastest before the first
            request.
        preview: judge particles on the model's light decoder (`FlowModel.preview`), and decode only finalists in full.
            Guided methods take their gradients through the full one.
        reproducible: one bucket, and lanes and threads that do not depend on a measurement: a request's result is the
            same, bit for bit, in every engine on this device and under any load. It costs time: a single request then
            runs padded batches.
        graphs: on a GPU, run each batch's forward as one CUDA graph, captured before the first request of an image
            size. It takes a model that declares itself graphable (`rollflow.models.Capabilities`); others run without.

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
    ):
        if buckets is not None:
            buckets = _checked_buckets(buckets, reproducible)
        self.model = adapt(model)
        if preview and not self.model.capabilities.preview:
            raise RequestError("preview=True: this model has no light decoder to judge particles by; leave it out")
        if self.model.device.type == "cpu":
            _keep_pages()
        self.ledger, self.traits, self.preview = Ledger(), traits or Traits(), preview
        self._slots = None if slots is None else whole("slots", slots, 1)
        self._keep_buckets = reproducible or buckets is not None
        usual = CPU_BUCKETS if self.model.device.type == "cpu" else BUCKETS
        sizes = tuple(buckets) if buckets is not None else (REPRODUCIBLE_BUCKET,) if reproducible else usual
        self._choose_lanes = lanes is None and threads is None and not reproducible and self.model.device.type == "cpu"
        count, each = _lanes(self.model.device, lanes, threads)
        self._runner = Runner(self.model, sizes, self.ledger, Lanes(self.model.device, count, each), preview)
        self._graphs = graphs and self.model.capabilities.graphable and self.model.device.type == "cuda"
        self._odds = Odds()
        self._pools: dict[Geometry, ParticlePool] = {}
        self._conditioning: dict[str, Any] = {}
        self._warned = self._released = False

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
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise RequestError(f"device {str(device)!r}: choose cpu, cuda or cuda:N")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RequestError(f"device {str(device)!r}: torch finds no CUDA device here; choose cpu")
        if not (dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype)):
            raise RequestError(f"dtype={dtype!r}: it must be a torch.dtype, such as torch.bfloat16, or 'auto'")
        if dtype == "auto":
            dtype = calibrate.best_dtype(lambda kind: FluxModel(load(name_or_path, device, kind)))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        options.setdefault("traits", built_in_traits(name_or_path))
        pipeline = load(name_or_path, device, dtype)
        acceleration.quantize(pipeline.transformer, quantize)
        acceleration.compile_blocks(pipeline.transformer, compile)
        light = load_light("" if preview is True else preview, name_or_path, device, dtype) if preview else None
        return cls(FluxModel(pipeline, light, attention), preview=light is not None, **options)

    @overload
    def generate(
        self, requests: str | Request, *, on_progress: Callable[[Progress], None] | None = None, **options: Any
    ) -> Result: ...

    @overload
    def generate(
        self,
        requests: Sequence[str | Request],
        *,
        on_progress: Callable[[Progress], None] | None = None,
        **options: Any,
    ) -> list[Result]: ...

    def generate(
        self,
        requests: str | Request | Sequence[str | Request],
        *,
        on_progress: Callable[[Progress], None] | None = None,
        **options: Any,
    ) -> Result | list[Result]:
        """Runs one request, or many together; returns a result for each, in order.

        Args:
            requests: prompts or `Request`s.
            on_progress: called after each batch.
            options: fields of `Request` for every prompt given as a string; other names are the method's options.

        Raises:
            RequestError: a request that cannot be honoured, before anything runs; of several, it says which.
        """
        if isinstance(requests, str | Request):
            return self.generate([requests], on_progress=on_progress, **options)[0]
        return self._run(self._prepare([_request(r, options) for r in requests]), on_progress)

    def _prepare(self, requests: list[Request]) -> list[tuple[Plan, Geometry]]:
        """Checks every request, and encodes the prompts that are new."""
        prepared = []
        for i, request in enumerate(requests):
            try:
                prepared.append(self._check(request))
            except RequestError as error:
                raise (error if len(requests) == 1 else RequestError(f"request {i}: {error}")) from None
        if not self._released:
            for prompt in list(self._conditioning)[: max(0, len(self._conditioning) - ENCODED_PROMPTS)]:
                del self._conditioning[prompt]
        self._encode(dict.fromkeys(r.prompt for r in requests))
        if self.model.capabilities.signature is not None:
            for geometry in dict.fromkeys(geometry for _, geometry in prepared):
                self.warm_up(geometry.height, geometry.width)
        return prepared

    def encode(self, prompts: str | Sequence[str]) -> None:
        """Encodes prompts that requests will come for, each distinct one once.

        Raises:
            RequestError: a prompt that the model cannot read.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        for prompt in prompts:
            if prompt not in self._conditioning:
                self.model.check_prompt(prompt)
        self._encode(prompts)

    def release_text_encoders(self) -> None:
        """Frees the memory of the text encoders. From then on only prompts that were encoded before are accepted.

        Raises:
            RequestError: the model cannot do without them.
        """
        if not self.model.capabilities.releases_text:
            raise RequestError(f"a {type(self.model).__name__} has no text encoders that could be released")
        self.model.release_text_encoders()  # type: ignore[attr-defined]
        self._released = True

    def forget_prompts(self) -> None:
        """Drops the encoded prompts that it keeps for later calls."""
        if not self._released:
            self._conditioning.clear()

    def _encode(self, prompts: Iterable[str]) -> None:
        for prompt in prompts:
            if prompt not in self._conditioning:  # encoded alone, so that its bits do not depend on its company
                (self._conditioning[prompt],) = self.model.encode([prompt])

    def _check(self, request: Request) -> tuple[Plan, Geometry]:
        checked = plan(request, self.traits, self.preview)
        if request.prompt not in self._conditioning:
            self.model.check_prompt(request.prompt)
        checked.reward.check(request.prompt)
        geometry = self.model.geometry(request.height, request.width)
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
        slots = self._slots_of(geometry)
        if request.nfe > slots:
            raise RequestError(
                f"nfe={request.nfe}: this engine holds {slots} particles of this size, and a request may need as many "
                "as its nfe; lower it, or make the engine with Engine(slots=...)"
            )
        return checked, geometry

    def _slots_of(self, geometry: Geometry) -> int:
        each = geometry.token * geometry.channel * 8
        return self._slots or max(64, min(POOL_SLOTS, POOL_BYTES // each))

    def _pool(self, geometry: Geometry) -> ParticlePool:
        if geometry not in self._pools:
            slots = self._slots_of(geometry)
            self._pools[geometry] = ParticlePool(slots, geometry.token, geometry.channel, self.model.device)
        return self._pools[geometry]

    @property
    def lanes(self) -> Lanes:
        """The threads that run its batches."""
        return self._runner.threads

    def buckets(self, height: int | None = None, width: int | None = None) -> Mapping[int, float]:
        """The batch sizes for an image size, and the seconds that a batch of each was measured to take."""
        self.warm_up(height, width)
        return self._runner.costs[self.model.geometry(height, width)].seconds

    def warm_up(self, height: int | None = None, width: int | None = None) -> None:
        """Measures what batches of this image size cost, so that the first request does not have to wait for it.

        The measured batch sizes, and on a CPU the numbers of lanes and threads, hold for the engine from then on.
        """
        geometry = self.model.geometry(height, width)
        if geometry in self._runner.costs:
            return
        conditioning = next(iter(self._conditioning.values()), None) or self.model.encode([""])[0]
        if self.model.device.type == "cpu" and self.model.capabilities.recordable:
            self.model.record(geometry, conditioning)  # type: ignore[attr-defined]
        if self._choose_lanes:
            count, threads = calibrate.best_lanes(self.model, geometry, conditioning, self.preview)
            if (count, threads) != (self._runner.threads.count, self._runner.threads.threads):
                self._runner.use(Lanes(self.model.device, count, threads))
            self._choose_lanes = False
        runner, lanes = self._runner, self._runner.threads
        known = (self.model, geometry, conditioning)
        costs = calibrate.cost_model(*known, runner.buckets, lanes, self.preview, self._keep_buckets)
        if self._graphs:
            lanes.run(runner.record, geometry, costs.seconds, self._pool(geometry), conditioning).result()
            costs = calibrate.replayed(
                costs, *known, lanes, self.preview, partial(runner.replay, geometry, conditioning)
            )
        runner.costs[geometry] = costs  # last: what failed is tried again, not skipped

    def _run(self, prepared: list[tuple[Plan, Geometry]], on_progress: Callable | None) -> list[Result]:
        order = sorted(range(len(prepared)), key=lambda i: -prepared[i][0].request.priority)
        scheduler, waiting = Scheduler(self._runner), deque(order)
        if self.model.device.type == "cuda":  # what the caller's stream encoded, lanes will read
            torch.cuda.current_stream(self.model.device).synchronize()
        searches: list[Search | None] = [None] * len(prepared)
        places: dict[Search, int] = {}
        results: dict[int, Result] = {}
        try:
            while waiting or scheduler.live:
                while waiting and (search := self._admit(*prepared[waiting[0]])) is not None:
                    places[search] = i = waiting.popleft()
                    searches[i] = search
                    scheduler.add(search)
                over = scheduler.tick()
                for search, outcome in over:
                    results[places[search]] = self._result(search, outcome)
                    self._release(search)
                if on_progress is not None and scheduler.news:
                    on_progress(_progress(searches))
        finally:  # after an error, in a reward say, give back what the searches hold
            scheduler.drain()
            for search in searches:
                if search is not None:
                    self._release(search)
        return [results[i] for i in range(len(prepared))]

    def _admit(self, checked: Plan, geometry: Geometry) -> Search | None:
        """A live search, or None while the pool has promised its slots to others."""
        pool = self._pool(geometry)
        if not pool.reserve(checked.request.nfe):
            return None
        conditioning = self._conditioning[checked.request.prompt]
        try:
            return Search(checked, geometry, conditioning, pool, self.ledger, self._odds)
        except BaseException:  # of a method of one's own, at its first step
            pool.unreserve(checked.request.nfe)
            raise

    def _release(self, search: Search) -> None:
        if not search.closed:
            search.close()
            search.pool.unreserve(search.plan.request.nfe)

    def _result(self, search: Search, outcome: Outcome) -> Result:
        plan, request = search.plan, search.plan.request
        if search.invalid and not self._warned:
            self._warned = True
            warnings.warn(
                f"the reward {plan.reward.name} gave {search.invalid} of {len(search._history)} particles of "
                f"{request.prompt!r} a score that is no finite number: these count as worst. Result.invalid_rewards "
                "counts them; this engine warns once",
                RuntimeWarning,
                stacklevel=5,
            )
        return Result(
            image=Image.fromarray(outcome.rounded.permute(1, 2, 0).numpy()),
            pixels=outcome.pixels,
            reward=outcome.reward,
            held_out=outcome.held_out,
            committed_nfe=search.committed,
            executed_nfe=search.executed,
            invalid_rewards=search.invalid,
            history=search.history,
            seconds=time.perf_counter() - search.start,
            request=request,
        )


def _checked_buckets(buckets: Any, reproducible: bool) -> list[int]:
    if not isinstance(buckets, Iterable) or isinstance(buckets, str):
        raise RequestError(f"buckets={buckets!r}: they must be a list of ascending batch sizes of at least 1")
    sizes = [whole("each of the buckets", bucket, 1) for bucket in buckets]
    if not sizes or sizes != sorted(set(sizes)):
        raise RequestError(f"buckets={sizes}: they must be ascending batch sizes of at least 1")
    if reproducible and (len(sizes) > 1 or sizes[0] % 8):
        raise RequestError(f"buckets={sizes}: a reproducible engine has a single batch size, a multiple of 8")
    return sizes


def _lanes(device: torch.device, lanes: int | None, threads: int | None) -> tuple[int, int]:
    """Lanes and threads of each: on a CPU all cores, on a GPU two cohorts that alternate."""
    if device.type != "cpu":
        return whole("lanes", 2 if lanes is None else lanes, 1), 1
    cores = torch.get_num_threads()
    if lanes is None:
        lanes = min(MOST_LANES, cores if threads is None else max(1, cores // whole("threads", threads, 1)))
    lanes = whole("lanes", lanes, 1)
    return lanes, max(1, cores // lanes) if threads is None else whole("threads", threads, 1)


def _keep_pages() -> None:
    """Makes glibc keep freed activations instead of giving their pages back at every batch.

    Freeing a block of nearly 32 MiB raises malloc's thresholds for good: smaller blocks then come from the heap, which
    is trimmed above 64 MiB only (mallopt(3), M_MMAP_THRESHOLD). Elsewhere it does nothing.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


def _request(asked: str | Request, options: dict[str, Any]) -> Request:
    if isinstance(asked, Request):
        if options:
            raise RequestError(f"options {', '.join(options)}: they go with prompts; a Request carries its own")
        return asked
    if not isinstance(asked, str):
        raise RequestError(f"a {type(asked).__name__} is no request: pass a prompt or a rollflow.Request")
    known = {name: value for name, value in options.items() if name in _FIELDS}
    own = {name: value for name, value in options.items() if name not in _FIELDS}
    if "prompt" in known:
        raise RequestError(f"the prompt {asked!r} and prompt={known['prompt']!r}: give one")
    method = known.get("method", Request.method)
    for name in own:
        if name not in methods.options_of(method) and (close := get_close_matches(name, _FIELDS, 1)):
            raise RequestError(f"there is no option {name!r}: did you mean {close[0]!r}?")
    return Request(asked, **{**known, "options": {**known.get("options", {}), **own}})


def _progress(searches: list[Search | None]) -> Progress:
    return Progress(
        tuple(0 if s is None else s.committed for s in searches),
        tuple(float("-inf") if s is None else s.best_reward for s in searches),
    )
