"""What every request passes: whose it is, whether it came from where it may, and the count of answers.

It is plain ASGI: a middleware that wraps responses would hide from them that the client has gone.
"""

from __future__ import annotations

import logging
import secrets
import time
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rollflow.errors import line, shown
from rollflow.serve.counter import Counter
from rollflow.serve.failures import INTERNAL, Failure
from rollflow.serve.keys import local

LOG = logging.getLogger("rollflow")
GUARDED = ("/v1/", "/metrics")  # what takes a key; /health and /ready, the page and what it says of the API take none
ASKING = (("POST", "/v1/searches"), ("POST", "/v1/images/generations"))  # for searches; refusals of others do not count
OTHER = "other"  # the route of a path that leads nowhere
POLICY = "default-src 'self'; img-src 'self' blob: data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
SAFE = ((b"x-content-type-options", b"nosniff"), (b"content-security-policy", POLICY.encode()))


class Gate:
    """Lets requests through with their owner in `scope["state"]["owner"]`.

    Args:
        app: what is behind it.
        counter: has the keys and the counts.
    """

    def __init__(self, app: ASGIApp, counter: Counter):
        self._app, self._counter = app, counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it; answers for what fails behind it, so that such an answer is as others."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, begun, where = 0, time.monotonic(), route(scope)
        number = f"req_{secrets.token_hex(8)}"  # OpenAI's client reads it

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._counter.metrics.answered(where, status)
                message["headers"] = [*message.get("headers", ()), *SAFE, (b"x-request-id", number.encode())]
            await send(message)

        try:
            await self._let_in(scope, receive, counted, where)
        except Exception:
            if status:  # the answer ends where it is, and the server's log says why
                raise
            LOG.exception("a request met a fault of rollflow")
            await INTERNAL.response()(scope, receive, counted)
        finally:
            taken = 1000 * (time.monotonic() - begun)
            LOG.debug("%s %s %s %.1f ms %s", line(scope["method"], 20), where, status or "no answer", taken, number)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send, where: str) -> None:
        try:
            scope.setdefault("state", {})["owner"] = self._owner(scope)
        except Failure as failure:
            if (scope["method"], where) in ASKING:
                self._counter.metrics.refused(failure.code)
            await failure.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _owner(self, scope: Scope) -> str:
        keys, headers = self._counter.keys, Headers(scope=scope)
        if not keys:
            self._check_host(headers.get("host", ""))
            return ""
        if not scope["path"].startswith(GUARDED):
            return ""
        owner = keys.owner(headers.get("authorization"))
        if owner is None:
            owner = self._signed(scope)
        if owner is None:
            raise Failure(
                "no API key, or none that is known here: send Authorization: Bearer KEY",
                401,
                None,
                "invalid_api_key",
                {"WWW-Authenticate": "Bearer"},
            )
        return owner

    def _check_host(self, host: str) -> None:
        """A page of somebody else's whose name leads here is no client of a server without keys."""
        name = host[: host.rfind("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if not local(name.strip("[]")) and name != self._counter.settings.host:
            raise Failure(
                f"Host {shown(host)}: a server without API keys answers to localhost only; give it --api-key-file",
                421,
                None,
                "misdirected_request",
            )

    def _signed(self, scope: Scope) -> str | None:
        """The owner of a search whose signed address this is."""
        parts = scope["path"].removeprefix("/v1/searches/").split("/")
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("signature", [""])[0]
        if scope["method"] != "GET" or len(parts) != 2 or parts[1] != "image" or not given:
            return None
        order = self._counter.desk.get(parts[0])
        if order is None or not self._counter.keys.signed(order.owner, order.id, given):
            return None
        return order.owner


def route(scope: Scope) -> str:
    """The template of the route that a request's path leads to, "other" where there is none: never what was asked."""
    routes = (one for one in scope["app"].routes if isinstance(one, Route))
    return next((one.path_format for one in routes if one.path_regex.match(scope["path"])), OTHER)
