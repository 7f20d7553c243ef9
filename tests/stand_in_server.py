"""A server in the shape of `rollflow serve` that searches nothing: an image after a while, and mistakes on demand."""

import asyncio
import base64
import contextlib
import hashlib
import json
import threading
import time

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

KNOWN = {"prompt", "reward", "method", "nfe", "seed", "response_format", "stream", "partial_images", "n", "size"}
METHODS = {"rbf", "bon", "smc"}
MOST = 100_000  # bytes of a body
EVENTS = 5  # improvements of a search


def picture(body):
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest()


class StandIn:
    """What it should do wrong is said by its attributes.

    Attributes:
        seconds: that a search takes, all at a time.
        drops: every so many-th image request gets an answer without an image.
        refuses: every so many-th is told to come again.
        loses: every so many-th search never ends.
        changes: whether a result that is read again is another one.
        breaks: whether bad input ends in a traceback.
        repeats: whether events are sent again after Last-Event-ID.
        forgets_keys: whether an idempotency key is honoured.
    """

    def __init__(self, seconds=0.02, **wrong):
        self.seconds = seconds
        self.drops = self.refuses = self.loses = 0
        self.changes = self.breaks = self.repeats = self.forgets_keys = False
        self.__dict__.update(wrong)
        self.images = self.inside = self.most = 0
        self.searches, self.keys, self.stopped = {}, {}, {}

    @property
    def app(self):
        return Starlette(
            routes=[
                Route("/ready", lambda request: JSONResponse({"ready": True})),
                Route("/health", lambda request: JSONResponse({"status": "ok"})),
                Route("/metrics", lambda request: Response("rollflow_requests_running 0\n")),
                Route("/v1/images/generations", self.generate, methods=["POST"]),
                Route("/v1/searches", self.accept, methods=["POST"]),
                Route("/v1/searches/{id}", self.status, methods=["GET"]),
                Route("/v1/searches/{id}", self.cancel, methods=["DELETE"]),
                Route("/v1/searches/{id}/events", self.events),
                Route("/v1/searches/{id}/image", self.image),
            ],
            exception_handlers={HTTPException: lambda request, error: self.error(error.status_code, error.detail)},
        )

    async def body(self, request):
        """The body, or an answer that says what is wrong with it."""
        raw = b""
        async for piece in request.stream():
            raw += piece
            if len(raw) > MOST:
                return None, self.error(413, "the body is too large")
        try:
            body = json.loads(raw)
            good = isinstance(body, dict) and {*body} <= KNOWN and isinstance(body["prompt"], str)
            good = good and 1 <= body.get("nfe", 1) <= 10_000
            good = good and body.get("method", "rbf") in METHODS and body.get("reward", "count") == "count"
            good = good and body.get("n", 1) <= 10
        except (ValueError, TypeError, KeyError, RecursionError):
            good = False
        if not good:
            return None, self.error(500 if self.breaks else 400, "this is no request")
        return body, None

    def error(self, status, message):
        content = "Traceback (most recent call last): ..." if status == 500 else message
        return JSONResponse({"error": {"message": content, "type": "invalid_request_error"}}, status)

    async def generate(self, request):
        body, wrong = await self.body(request)
        if wrong is not None:
            return wrong
        self.images += 1
        if self.refuses and self.images % self.refuses == 0:
            return JSONResponse({"error": {"message": "full"}}, 429, {"Retry-After": "1"})
        if self.drops and self.images % self.drops == 0:
            return JSONResponse({"data": []})
        image = base64.b64encode(picture(body)).decode()
        if body.get("stream"):
            return StreamingResponse(self.stream(image), media_type="text/event-stream")
        self.inside += 1
        self.most = max(self.most, self.inside)
        await asyncio.sleep(self.seconds)
        self.inside -= 1
        return JSONResponse({"created": 0, "data": [{"b64_json": image, "nfe": body.get("nfe"), "reward": 1.0}]})

    async def stream(self, image):
        for name in ("partial_image", "completed"):
            await asyncio.sleep(self.seconds / 2)
            yield f"event: image_generation.{name}\ndata: {json.dumps({'b64_json': image})}\n\n".encode()
            if self.breaks:
                return
        yield b"data: [DONE]\n\n"

    async def accept(self, request):
        body, wrong = await self.body(request)
        if wrong is not None:
            return wrong
        key = request.headers.get("idempotency-key")
        if key in self.keys and not self.forgets_keys:
            id = self.keys[key]
            same = self.searches[id][0] == body
            return JSONResponse({"id": id}, 202) if same else self.error(409, "the key belongs to another request")
        id = f"srch_{len(self.searches)}"
        self.keys[key] = id
        loses = self.loses and (len(self.searches) + 1) % self.loses == 0
        self.searches[id] = body, float("inf") if loses else time.monotonic() + self.seconds
        return JSONResponse({"id": id, "status": "queued"}, 202)

    def state(self, id):
        if id in self.stopped:
            return "cancelled"
        return "done" if time.monotonic() >= self.searches[id][1] else "running"

    async def status(self, request):
        id = request.path_params["id"]
        if id not in self.searches:
            return self.error(404, "there is no such search")
        reward = time.monotonic() if self.changes else 1.0
        result = {"reward": reward, "nfe": EVENTS} if self.state(id) == "done" else None
        return JSONResponse({"id": id, "status": self.state(id), "result": result})

    async def cancel(self, request):
        id = request.path_params["id"]
        if id not in self.searches:
            return self.error(404, "there is no such search")
        if self.state(id) == "running":
            self.stopped[id] = True
        return JSONResponse({"id": id, "status": self.state(id)})

    async def events(self, request):
        id = request.path_params["id"]
        if id not in self.searches:
            return self.error(404, "there is no such search")
        after = 0 if self.repeats else int(request.headers.get("last-event-id", 0))
        return StreamingResponse(self.improvements(id, after), media_type="text/event-stream")

    async def improvements(self, id, after):
        for nfe in range(after + 1, EVENTS + 1):
            await asyncio.sleep(self.seconds / EVENTS)
            yield f"id: {nfe}\nevent: progress\ndata: {json.dumps({'nfe': nfe, 'reward': nfe / 10})}\n\n".encode()
        while self.state(id) == "running":
            await asyncio.sleep(self.seconds / EVENTS)
        yield f"event: {self.state(id)}\ndata: {{}}\n\n".encode()

    async def image(self, request):
        id = request.path_params["id"]
        if id not in self.searches or self.state(id) != "done":
            return self.error(404, "there is no image")
        return Response(picture(self.searches[id][0]), media_type="image/png")


@contextlib.contextmanager
def running(stand_in):
    """The address of the stand-in, which answers on a thread of its own."""
    server = uvicorn.Server(uvicorn.Config(stand_in.app, port=0, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)
