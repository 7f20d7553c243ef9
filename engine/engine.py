"""The engine: requests in, results out."""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, overload

import torch
from diffusers import FluxPipeline
from PIL import Image

from rollflow import methods, rewards
from rollflow.errors import RequestError
from rollflow.methods.budget import whole
from rollflow.models import FlowModel, Geometry, Traits
from rollflow.models import traits as built_in_traits
from rollflow.models.flux import FluxModel, load
from rollflow.particle import ParticlePool
from rollflow.profile import Ledger
from rollflow.request import Plan, Request, Result, plan
from rollflow.runner import Runner
from rollflow.scheduler import Scheduler, Search

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
POOL_SLOTS = 4096
POOL_BYTES = 2**30
ENCODED_PROMPTS = 256  # kept for later calls
_FIELDS = {field.name for field in fields(Request)}


@dataclass(frozen=True)
class Progress:
    """What a progress callback is told after each batch: of the requests of one `generate` call, in their order."""

    committed_nfe: tuple[int, ...]
    best_reward: tuple[float, ...]


class Engine:
    """Runs searches of many requests in shared forwards of one model.

    Args:
        model: a diffusers `FluxPipeline`, or any `rollflow.models.FlowModel`.
        buckets: the batch sizes of a forward, ascending; a batch is padded up to the next. With a single bucket, a
            multiple of 8, a request's result does not depend on what runs beside it, bit for bit (on one CPU; on a GPU
            as far as its libraries compute a row alike at every place of a batch).
        slots: how many particles of one image size can live at once, the bound of their memory. By default 4096, or
            what fits into 1 GiB. A request is promised as many as its nfe, and waits until they are free.
        traits: what searches should know of the model, see `rollflow.models.Traits`.

    Attributes:
        ledger: rows by kind and seconds by span since the engine was made.
    """

    def __init__(
        self,
        model: FluxPipeline | FlowModel,
        *,
        buckets: Sequence[int] = BUCKETS,
        slots: int | None = None,
        traits: Traits | None = None,
    ):
        if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
            raise RequestError(f"buckets={buckets!r}: they must be ascending batch sizes of at least 1")
        self.model = FluxModel(model) if isinstance(model, FluxPipeline) or not hasattr(model, "velocity") else model
        if self.model.device.type == "cpu":
            _keep_pages()
        self.ledger, self.traits = Ledger(), traits or Traits()
        self._slots = None if slots is None else whole("slots", slots, 1)
        self._runner = Runner(self.model, tuple(buckets), self.ledger)
        self._pools: dict[Geometry, ParticlePool] = {}
        self._conditioning: dict[str, Any] = {}
        self._warned = False

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = "shapes",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Engine:
        """An engine on a built-in model ("shapes", "shapes-base"), a local FluxPipeline folder, or a hub id.

        Args:
            name_or_path: which model.
            device: by default CUDA where there is one.
            dtype: of the networks; by default bfloat16 on CUDA and float32 elsewhere. Particles are float32 always.
            options: see `Engine`.

        Raises:
            ModelError: there is no such model, or it is no FluxPipeline.
            RequestError: a device that is neither cpu nor cuda.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise RequestError(f"device {str(device)!r}: choose cpu, cuda or cuda:N")
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        options.setdefault("traits", built_in_traits(name_or_path))
        return cls(load(name_or_path, device, dtype), **options)

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
        for prompt in list(self._conditioning)[: max(0, len(self._conditioning) - ENCODED_PROMPTS)]:
            del self._conditioning[prompt]
        for prompt in dict.fromkeys(r.prompt for r in requests):
            if prompt not in self._conditioning:  # encoded alone, so that its bits do not depend on its company
                (self._conditioning[prompt],) = self.model.encode([prompt])
        return prepared

    def _check(self, request: Request) -> tuple[Plan, Geometry]:
        checked = plan(request, self.traits)
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

    def _run(self, prepared: list[tuple[Plan, Geometry]], on_progress: Callable | None) -> list[Result]:
        scheduler, waiting = Scheduler(self._runner), deque(range(len(prepared)))
        searches: list[Search | None] = [None] * len(prepared)
        results: dict[int, Result] = {}
        try:
            while waiting or scheduler.live:
                while waiting and (search := self._admit(*prepared[waiting[0]])) is not None:
                    searches[waiting.popleft()] = search
                    scheduler.live.append(search)
                over = scheduler.tick()
                if on_progress is not None:
                    on_progress(_progress(searches))
                for search in over:
                    results[searches.index(search)] = self._result(search)
                    self._release(search)
        finally:  # after an error, in a reward say, give back what the searches hold
            for search in searches:
                if search is not None:
                    self._release(search)
        return [results[i] for i in range(len(prepared))]

    def _admit(self, checked: Plan, geometry: Geometry) -> Search | None:
        """A live search, or None while the pool has promised its slots to others."""
        pool = self._pool(geometry)
        if not pool.reserve(checked.request.nfe):
            return None
        return Search(checked, geometry, self._conditioning[checked.request.prompt], pool)

    def _release(self, search: Search) -> None:
        if not search.closed:
            search.close()
            search.pool.unreserve(search.plan.request.nfe)

    def _result(self, search: Search) -> Result:
        """Decodes the chosen particle and judges the 8-bit image that is returned."""
        plan, request = search.plan, search.plan.request
        if search.invalid and not self._warned:
            self._warned = True
            warnings.warn(
                f"the reward {plan.reward.name} gave {search.invalid} of {len(search.history)} particles of "
                f"{request.prompt!r} a score that is no finite number: these count as worst. Result.invalid_rewards "
                "counts them; this engine warns once",
                RuntimeWarning,
                stacklevel=5,
            )
        pixels = self._runner.image(search.chosen, search)
        rounded = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
        judged = rounded[None].float() / 255
        held_out = rewards.held_out(plan.reward)
        return Result(
            image=Image.fromarray(rounded.permute(1, 2, 0).cpu().numpy()),
            pixels=pixels.cpu(),
            reward=plan.reward(judged, [request.prompt]).item(),
            held_out=None if held_out is None else held_out(judged, [request.prompt]).item(),
            committed_nfe=search.committed,
            executed_nfe=search.executed,
            invalid_rewards=search.invalid,
            history=search.history,
            seconds=time.perf_counter() - search.start,
            request=request,
        )


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
