"""Keeps pages of others from a server without keys: their names may be made to lead to this machine."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from rollflow.errors import shown
from rollflow.serve.keys import local


class LocalOnly:
    """Refuses what was sent to another name than one of this machine's own.

    Plain ASGI: a middleware that wraps responses would hide from them that the client has gone.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        host = Headers(scope=scope).get("host", "") if scope["type"] == "http" else "localhost"
        name = host[: host.rfind("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if local(name.strip("[]")):
            await self._app(scope, receive, send)
            return
        text = f"Host {shown(host)}: a server without API keys answers to localhost only; give it --api-key-file"
        await JSONResponse({"error": {"message": text}}, 421)(scope, receive, send)
