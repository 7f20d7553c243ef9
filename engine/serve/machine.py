"""What a server says of itself: whether it lives and takes requests, what it serves, and what the machine does."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request as Call
from starlette.responses import JSONResponse, Response

from rollflow import methods
from rollflow.errors import shown
from rollflow.request import Request
from rollflow.serve import allowed, fields
from rollflow.serve import metrics as exposition
from rollflow.serve.counter import Counter, finite
from rollflow.serve.failures import Failure, later


async def health(call: Call, counter: Counter, owner: str) -> Response:
    """Whether it lives: 200 while the loop of at least one worker's engine goes round, else 503."""
    alive = counter.desk.alive
    ages = [round(one.age, 3) for one in counter.desk.stats().workers]
    return JSONResponse({"status": "ok" if alive else "dead", "last_tick_seconds": ages}, 200 if alive else 503)


async def ready(call: Call, counter: Counter, owner: str) -> Response:
    """Whether it takes requests: 200 when it has warmed up and until it drains, else 503."""
    desk = counter.desk
    status = "draining" if desk.draining else "ready" if desk.ready else "warming up"
    return JSONResponse({"status": status}, 200 if status == "ready" else 503, {} if status == "ready" else later(1))


async def metrics(call: Call, counter: Counter, owner: str) -> Response:
    """Metrics for Prometheus."""
    return Response(counter.metrics.text(), 200, {"Content-Type": exposition.CONTENT})


async def models(call: Call, counter: Counter, owner: str) -> Response:
    """The model that is served, in OpenAI's shape."""
    return JSONResponse({"object": "list", "data": [_model(counter)]})


async def model(call: Call, counter: Counter, owner: str) -> Response:
    """One model."""
    if call.path_params["id"] != counter.settings.model:
        what = f"model={shown(call.path_params['id'])}: this server has {shown(counter.settings.model)}"
        raise Failure(what, 404, "model", "model_not_found")
    return JSONResponse(_model(counter))


async def options(call: Call, counter: Counter, owner: str) -> Response:
    """What requests may name: rewards, methods with their own options, and the limits."""
    settings = counter.settings
    named = tuple(allowed.usual() if settings.rewards is None else settings.rewards)
    found = {
        "model": settings.model,
        "rewards": [*named],
        "meanings": allowed.meanings(named),
        "methods": {
            name: {option.name: {"default": _plain(option.default), "help": option.help} for option in own}
            for name in methods.names()
            for own in [methods.options(name)]
        },
        "defaults": {"reward": settings.reward, "method": Request.method, "nfe": fields.usual_nfe(settings)},
        "limits": {
            "n": settings.max_n,
            "nfe": settings.max_nfe,
            "seconds": settings.max_seconds,
            "pixels": settings.max_pixels,
            "priority": settings.max_priority,
            "prompt": settings.max_prompt,
            "body": settings.max_body,
            "requests_per_minute": settings.requests_per_minute,
        },
    }
    return JSONResponse(finite(found))


async def stats(call: Call, counter: Counter, owner: str) -> Response:
    """What the machine does now."""
    now = counter.desk.stats()
    return JSONResponse(
        finite(
            {
                "running": now.running,
                "waiting": now.queued,
                "outstanding_nfe": now.outstanding_nfe,
                "nfe_per_second": now.nfe_per_second,
                "occupancy": now.occupancy,
                "free_slots": now.free,
                "slots": now.pooled,
                "workers": [
                    {"name": one.name, "alive": one.alive, "age": one.age, "running": one.running}
                    for one in now.workers
                ],
                "nfe": dict(now.nfe),
                "ready": counter.desk.ready,
                "draining": counter.desk.draining,
            }
        )
    )


def _model(counter: Counter) -> dict[str, Any]:
    return {"id": counter.settings.model, "object": "model", "created": 0, "owned_by": "rollflow"}


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float) else str(value)
