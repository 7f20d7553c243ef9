"""The application: which address leads where, and what it tells of itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request as Call
from starlette.responses import Response

from rollflow import __version__
from rollflow.errors import RollflowError
from rollflow.serve import failures, images, machine, openapi, searches
from rollflow.serve.allowed import usual
from rollflow.serve.counter import Counter
from rollflow.serve.desk import Desk
from rollflow.serve.gate import Gate
from rollflow.serve.keys import Keys, check_host
from rollflow.serve.limits import ServeSettings

PAGE = Path(__file__).parent / "page"
PAGES = {  # what a browser is given, by its address
    "/": ("index.html", "text/html; charset=utf-8"),
    "/docs": ("docs.html", "text/html; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page/search.js": ("search.js", "text/javascript; charset=utf-8"),
    "/page/events.js": ("events.js", "text/javascript; charset=utf-8"),
    "/page/chart.js": ("chart.js", "text/javascript; charset=utf-8"),
    "/page/docs.js": ("docs.js", "text/javascript; charset=utf-8"),
}
PROBED = ("/health", "/ready", "/metrics")  # what takes HEAD, too, with which some load balancers ask
ABOUT = (
    "Where the server has API keys, /v1/... and /metrics take one, as Authorization: Bearer KEY; /health, /ready, "
    "/openapi.json, /docs and / are open: they say nothing of anybody's searches. The address of an image that an "
    "answer gives carries a signature in place of the key."
)
Endpoint = Callable[[Call, Counter, str], Awaitable[Response]]


def create_app(desk: Desk, settings: ServeSettings) -> FastAPI:
    """A server of a desk's searches, as an ASGI application.

    The desk is started and closed by the caller, on the loop that serves.

    Raises:
        RequestError: a key file that cannot be used, or none for a host that other machines reach.
    """
    if settings.rewards is None:  # once: it looks at the disk
        settings = replace(settings, rewards=usual())
    keys = Keys(settings.keys)
    check_host(settings.host, bool(keys))
    counter = Counter(desk, settings, keys)
    about: dict[str, Any] = {"title": "rollflow", "version": __version__, "description": ABOUT}
    app = openapi.Described(docs_url=None, redoc_url=None, openapi_url="/openapi.json", **about)
    app.state.counter = counter
    routes: list[tuple[str, str, Endpoint]] = [
        ("POST", "/v1/images/generations", images.generate),
        ("POST", "/v1/searches", searches.create),
        ("GET", "/v1/searches", searches.listed),
        ("GET", "/v1/searches/{id}", searches.show),
        ("DELETE", "/v1/searches/{id}", searches.delete),
        ("GET", "/v1/searches/{id}/events", searches.events),
        ("GET", "/v1/searches/{id}/image", searches.image),
        ("GET", "/v1/models", machine.models),
        ("GET", "/v1/models/{id:path}", machine.model),
        ("GET", "/v1/options", machine.options),
        ("GET", "/v1/stats", machine.stats),
        ("GET", "/health", machine.health),
        ("GET", "/ready", machine.ready),
        ("GET", "/metrics", machine.metrics),
    ]
    for method, path, endpoint in routes:
        told = openapi.about(method, path, settings)
        app.add_api_route(path, _bound(endpoint, counter), methods=[method], response_model=None, **told)
        if path in PROBED:
            hidden: dict[str, Any] = {"methods": ["HEAD"], "include_in_schema": False, "response_model": None}
            app.add_api_route(path, _bound(endpoint, counter), **hidden)
    for path, (file, kind) in PAGES.items():
        hidden = {"methods": ["GET", "HEAD"], "include_in_schema": False, "response_model": None}
        app.add_api_route(path, _page(file, kind), **hidden)
    handlers: dict[type[Exception], Any] = {
        HTTPException: failures.of_http,
        RollflowError: failures.of_rollflow,
    }
    for error, handler in handlers.items():
        app.add_exception_handler(error, handler)
    app.add_middleware(Gate, counter=counter)
    return app


def _bound(endpoint: Endpoint, counter: Counter) -> Callable[[Call], Awaitable[Response]]:
    """An endpoint as FastAPI calls it; the body is read by the endpoint itself, within its limit."""

    async def answer(call: Call) -> Response:
        return await endpoint(call, counter, call.state.owner)

    answer.__name__, answer.__doc__ = endpoint.__name__, endpoint.__doc__
    answer.__annotations__ = {"call": Call, "return": Response}  # FastAPI reads them where it was defined
    return answer


def _page(file: str, kind: str) -> Callable[[], Awaitable[Response]]:
    async def page() -> Response:
        return Response((PAGE / file).read_bytes(), 200, {"Cache-Control": "no-cache", "Content-Type": kind})

    page.__annotations__ = {"return": Response}
    return page
