"""Errors as clients of OpenAI's API read them: a status, and `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request as Call
from starlette.responses import JSONResponse
from starlette.routing import Route

from rollflow.errors import (
    LONGEST,
    Cancelled,
    EngineBusy,
    EngineClosed,
    EngineDead,
    FunctionError,
    OutOfTime,
    RequestError,
    RollflowError,
    line,
    shown,
)
from rollflow.serve.orders import quoted

SOON = 5.0  # seconds after which a client may ask again where nothing is known of the wait
_STATUS: Mapping[str, tuple[int, str]] = {  # by the type of an error: status and code
    RequestError.__name__: (400, "invalid_value"),
    "BudgetError": (400, "budget_too_small"),
    "KeyReused": (422, "idempotency_key_reused"),
    EngineBusy.__name__: (429, "queue_full"),
    "Unready": (503, "not_ready"),
    EngineClosed.__name__: (503, "draining"),
    EngineDead.__name__: (503, "engine_dead"),
    OutOfTime.__name__: (504, "out_of_time"),
    Cancelled.__name__: (410, "cancelled"),
    FunctionError.__name__: (500, "reward_failed"),
    "RewardUnavailable": (500, "reward_failed"),
}
_FIRST = re.compile(r"['\"]?([a-z_]+)['\"]?[=:]")  # the field that a message begins with


class Failure(RollflowError):
    """What a client is answered.

    Attributes:
        status: of HTTP.
        param: the field at fault, None where it is none.
        code: a word for programs.
        headers: of the answer, such as Retry-After.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        told = {"message": str(self), "type": kind(self.status), "param": self.param, "code": self.code}
        return {"error": told}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, self.status, self.headers)


INTERNAL = Failure("the server failed to answer; its log says why", 500, None, "internal_error")


def kind(status: int) -> str:
    """OpenAI's word for the errors of a status."""
    named = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return named.get(status, "invalid_request_error" if status < 500 else "server_error")


def later(seconds: float) -> dict[str, str]:
    """The header that says when to ask again: whole seconds, at least one."""
    return {"Retry-After": str(max(1, math.ceil(seconds)) if math.isfinite(seconds) else math.ceil(SOON))}


def wrong(name: str, value: object, what: str) -> Failure:
    """The answer to a field whose value cannot be; `what` says what can."""
    return Failure(f"{name}={shown(value)}: {what}", 400, name, "invalid_value")


def refused(error: RollflowError, fields: Collection[str] = (), request: Mapping[str, Any] | None = None) -> Failure:
    """The answer to a request that was not let in.

    Args:
        error: why.
        fields: names of fields, of which the message may name one.
        request: what was asked for, of whose texts the message may quote one.
    """
    if isinstance(error, Failure):
        return error
    status, code = next((_STATUS[k.__name__] for k in type(error).__mro__ if k.__name__ in _STATUS), (500, "failed"))
    headers = later(getattr(error, "seconds", SOON)) if status in (429, 503) else {}
    fault = param(str(error), fields, request) if status == 400 else None
    return Failure(str(error), status, fault, code, headers)


def ended(error: Mapping[str, Any] | None) -> Failure:
    """The answer to a request that was let in and failed: another try would fail alike, so clients are told not to."""
    found = error or {"type": Cancelled.__name__, "message": "the search was cancelled"}
    status, code = _STATUS.get(str(found.get("type")), (500, "failed"))
    message = line(str(found.get("message") or "the search failed"), LONGEST)
    again = {} if status == 503 else {"x-should-retry": "false"}
    return Failure(message, status, None, code, later(SOON) if status == 503 else again)


def param(message: str, fields: Collection[str], request: Mapping[str, Any] | None = None) -> str | None:
    """The field at fault: the one that a message begins with, the text that it quotes, or the first that it names.

    Of those that it names, one with a value comes first.
    """
    if (begin := _FIRST.match(message)) is not None and begin[1] in fields:
        return begin[1]
    for name, text in quoted(request or {}):
        if text in message:
            return name
    bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", message)
    words = re.findall(r"([a-z_]+)=", bare) + re.findall(r"[a-z_]+", bare)
    return next((word for word in words if word in fields and word != "model"), None)  # which many messages speak of


async def of_http(call: Call, error: Exception) -> JSONResponse:
    """The answer where no route fits."""
    assert isinstance(error, HTTPException)
    path, method, allowed = line(call.url.path, 100), line(call.method, 20), _allowed(call)
    said = {
        404: f"there is nothing at {path}: see /docs for what there is",
        405: f"{method} is not allowed at {path}: use {' or '.join(allowed) or 'another method'}; see /docs",
    }
    message = said.get(error.status_code) or f"{HTTPStatus(error.status_code).phrase}: {error.detail}"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    headers = {**(error.headers or {})}
    if error.status_code == 405:  # the error itself knows of one route alone
        headers["Allow"] = ", ".join(allowed)
    return Failure(message, error.status_code, None, code, headers).response()


async def of_rollflow(call: Call, error: Exception) -> JSONResponse:
    """The answer to what was raised on purpose."""
    assert isinstance(error, RollflowError)
    return refused(error).response()


def _allowed(call: Call) -> list[str]:
    """The methods of all routes that lead to a path."""
    routes = [route for route in call.app.routes if isinstance(route, Route) and route.path_regex.match(call.url.path)]
    return sorted({method for route in routes for method in route.methods or ()})
