"""`rollflow reward-server`: rewards over HTTP, for the reward `http` of engines on other machines.

    POST /score/{name}   a call in the wire format of `rollflow.rewards.http`; /score is the first reward's
    GET  /health         200 while calls of the rewards come back, else 503
    GET  /ready          200 until it drains, then 503
    GET  /metrics        for Prometheus
    GET  /openapi.json   OpenAPI

Rewards are those of the command line alone: a caller names one, and sends neither code nor paths.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch

from rollflow import __version__, rewards
from rollflow.errors import RequestError, said, shown
from rollflow.rewards import Reward
from rollflow.serve.keys import Keys
from rollflow.serve.reward_bodies import SCHEMA, Limits, Refused, Sent, cost, look
from rollflow.serve.scoring import ENDED, Scorer

READERS = 4  # threads that unpack bodies
HURRIED = 401, 408  # statuses after which a body is not waited for, but the connection closed
LITTLE = 1 << 20, 1.0  # bytes and seconds that it is read on nevertheless: a small one's sender sees the answer
try:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response
    from starlette.exceptions import HTTPException

    from rollflow.serve.reward_gate import LocalOnly
    from rollflow.serve.reward_metrics import RewardMetrics
    from rollflow.serve.uploads import Upload, gone
except ImportError as error:
    raise RequestError(f"the reward server takes more packages ({error}): pip install 'rollflow[serve]'") from error


@dataclass(frozen=True)
class RewardSettings:
    """How a reward server works.

    Attributes:
        keys: one of them must come along as `Authorization: Bearer KEY`, if there are any.
        limits: of one call.
        queued: calls that are there at a time, being read included; more are refused with 503.
        memory: bytes that bodies and images take at a time, known before they are unpacked; a call beyond is refused
            with 503, unless it is the only one.
        batch: the most images of a call of a reward.
        wait: seconds that a call waits for others to be judged with it, where its reward is idle.
        patience: seconds without a byte of a body after which it is given up (408).
        upload: seconds after which a body that is not there as a whole is given up (408).
        stuck: seconds of one call of a reward after which the server is not healthy.
        device: where the images are judged; None: on the CPU, or where a reward itself says.
    """

    keys: Keys = field(default_factory=Keys)
    limits: Limits = field(default_factory=Limits)
    queued: int = 256
    memory: int = 4 << 30
    batch: int = 64
    wait: float = 0.005
    patience: float = 30.0
    upload: float = 300.0
    stuck: float = 600.0
    device: torch.device | None = None


class RewardServer:
    """The rewards of one server, and how a call comes to its scores.

    Args:
        named: the rewards by the names that callers use; the first is that of /score.
        settings: see `RewardSettings`.

    Attributes:
        draining: whether new calls are refused.
    """

    def __init__(self, named: Mapping[str, Reward], settings: RewardSettings):
        self.settings, self.draining, self._ended = settings, False, False
        self.metrics, self._open, self._held = RewardMetrics(), 0, 0
        self._closed = asyncio.Event()  # whenever the last open call is over
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="reward bodies")
        turns: dict[int, Lock] = {}  # of what two names may call
        self.scorers: dict[str, Scorer] = {}
        for name, reward in named.items():
            alone = {id(term) for term in rewards.terms_of(reward) if not rewards.concurrent(term)}
            self.scorers[name] = Scorer(
                reward,
                name,
                device=settings.device,
                batch=settings.batch,
                wait=settings.wait,
                turns=[turns.setdefault(one, Lock()) for one in sorted(alone)],
                told=self.metrics.judged(name),
            )
        self.metrics.watch(self.scorers)

    @property
    def healthy(self) -> bool:
        """Whether calls of the rewards come back."""
        return all(scorer.busy_seconds < self.settings.stuck for scorer in self.scorers.values())

    @property
    def hangs(self) -> bool:
        """Whether a call of a reward has not come back, also after the end."""
        return any(scorer.hangs for scorer in self.scorers.values())

    def start(self) -> None:
        """Begins, on the running loop."""
        for scorer in self.scorers.values():
            scorer.start()

    async def drain(self, grace: float) -> None:
        """Refuses new calls, and waits until those that are there are answered, at most `grace` seconds."""
        self.draining = True
        if self._open:
            self._closed.clear()
            await asyncio.wait([asyncio.ensure_future(self._closed.wait())], timeout=grace)

    async def close(self) -> None:
        """Ends; what is left is refused with 503."""
        self.draining = self._ended = True
        for scorer in self.scorers.values():
            await scorer.close()
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _scorer(self, name: str | None) -> Scorer:
        if name is None:
            return next(iter(self.scorers.values()))
        if name not in self.scorers:
            raise Refused(404, f"there is no reward {shown(name)} here: it has {', '.join(self.scorers)}")
        return self.scorers[name]

    async def answer(self, request: Request, name: str | None) -> list[float]:
        """The scores of a call to the reward of a name.

        Raises:
            Refused: it cannot be answered.
        """
        limits, patience = self.settings.limits, self.settings.patience
        body = Upload(request, limits.body, patience, self.settings.upload)
        try:
            return await self._answer(request, body, name)
        except Refused as refused:
            await body.discard(*(LITTLE if refused.status in HURRIED else (4 * limits.body, patience)))
            raise

    async def _answer(self, request: Request, body: Upload, name: str | None) -> list[float]:
        if self.settings.keys.owner(request.headers.get("Authorization")) is None:
            raise Refused(401, "this server takes a key: send it as Authorization: Bearer KEY")
        scorer = self._scorer(name)
        if self.draining:
            raise Refused(503, "the server is about to end: call again", max(1.0, scorer.seconds))
        if self._open >= self.settings.queued:
            raise Refused(503, f"{self._open} calls wait already: call again", max(1.0, scorer.seconds))
        self._open += 1
        own, jobs, loop = 0, list[Future[Any]](), asyncio.get_running_loop()

        def hold(size: int) -> None:
            nonlocal own
            own, self._held = own + size, self._held + size
            if self._held > max(own, self.settings.memory):
                raise Refused(503, f"calls of {self._held} bytes wait already: call again", max(1.0, scorer.seconds))

        try:
            kind, content = request.headers.get("Content-Type", ""), await body.read(hold)
            scoring = asyncio.ensure_future(self._scores(scorer, kind, content, hold, jobs))
            leaving = asyncio.ensure_future(gone(request))
            try:
                await asyncio.wait([scoring, leaving], return_when=asyncio.FIRST_COMPLETED)
                if not scoring.done():
                    raise Refused(499, "the caller is gone")
                return scoring.result()
            finally:
                scoring.cancel()
                leaving.cancel()
        finally:
            self._open -= 1
            if not self._open:
                self._closed.set()

            def free(*_: object) -> None:
                self._held -= own

            def over(job: Future[Any]) -> None:
                with suppress(RuntimeError):  # the loop was closed: nobody counts any more
                    loop.call_soon_threadsafe(free)

            if jobs and not jobs[-1].done():  # a thread still unpacks for a caller who is gone
                jobs[-1].add_done_callback(over)
            else:
                free()

    async def _scores(
        self, scorer: Scorer, kind: str, body: bytes, hold: Callable[[int], None], jobs: list[Future[Any]]
    ) -> list[float]:
        def looked() -> Sent:
            sent = look(kind, body, self.settings.limits)
            scorer.check(sent.prompts, sent.size)
            return sent

        hold(cost(kind, body))
        sent = await self._read(looked, jobs)
        hold(sent.bytes)
        return await scorer.score(await self._read(sent.unpack, jobs))

    async def _read(self, work: Callable[[], Any], jobs: list[Future[Any]]) -> Any:
        """What `work` returns, on a thread that unpacks bodies."""
        if self._ended:
            raise Refused(503, ENDED, 1.0)
        jobs.append(self._readers.submit(work))
        try:
            return await asyncio.wrap_future(jobs[-1])
        except asyncio.CancelledError:
            if self._ended:  # it never began
                raise Refused(503, ENDED, 1.0) from None
            raise


def create_app(server: RewardServer) -> FastAPI:
    """The server as an ASGI application; the caller starts and closes the server, on the same loop."""
    app = FastAPI(title="rollflow reward-server", version=__version__, redoc_url=None, docs_url=None)
    if not server.settings.keys:
        app.add_middleware(LocalOnly)

    async def score(request: Request, name: str | None) -> JSONResponse:
        start, status = time.monotonic(), 500
        known = next(iter(server.scorers)) if name is None else name if name in server.scorers else ""
        try:
            scores = await server.answer(request, name)
            status = 200
            return JSONResponse({"scores": scores})
        except Refused as refused:
            status = refused.status
            return _refusal(refused)
        except Exception as error:
            return _refusal(Refused(500, f"an error of the server ({said(error)})"))
        finally:
            server.metrics.answers.labels(known, status).inc()
            server.metrics.seconds.labels(known).observe(time.monotonic() - start)

    @app.post("/score", openapi_extra=SCHEMA, summary="Scores of the first reward")
    async def first(request: Request) -> JSONResponse:
        return await score(request, None)

    @app.post("/score/{name:path}", openapi_extra=SCHEMA, summary="Scores of a reward by its name")
    async def by_name(name: str, request: Request) -> JSONResponse:
        return await score(request, name)

    @app.get("/health")
    async def health() -> JSONResponse:
        busy = {name: round(scorer.busy_seconds, 3) for name, scorer in server.scorers.items()}
        state = {"status": "ok" if server.healthy else "stuck", "rewards": [*busy], "busy_seconds": busy}
        return JSONResponse(state, 200 if server.healthy else 503)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        return JSONResponse({"ready": not server.draining}, 503 if server.draining else 200)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type=server.metrics.KIND)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {shown(request.url.path)}: {error.detail}: POST /score/NAME gives scores"
        return _refusal(Refused(error.status_code, message), error.headers)

    return app


def _refusal(refused: Refused, headers: Mapping[str, str] | None = None) -> JSONResponse:
    given = {**(headers or {})}
    if refused.seconds is not None:
        given["Retry-After"] = str(math.ceil(min(60.0, refused.seconds)))
    if refused.status == 401:
        given["WWW-Authenticate"] = "Bearer"
    if refused.status in HURRIED:
        given["Connection"] = "close"
    return JSONResponse({"error": {"message": str(refused)}}, refused.status, given)
