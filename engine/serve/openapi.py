"""What /openapi.json says of each endpoint: bodies from the fields of `rollflow.Request`, and the shape of errors."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING
from dataclasses import fields as fields_of
from functools import lru_cache
from typing import Any

from rollflow import methods
from rollflow.request import Request
from rollflow.serve import fields
from rollflow.serve.limits import ServeSettings

ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "the field at fault"},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "Idempotency-Key": {"in": "header", "description": "the same key gives the same search, also after a restart"},
    "Last-Event-ID": {"in": "header", "description": "the last event that the client has; events after it follow"},
    "every": {"in": "query", "description": "1: also events search.progress between improvements"},
    "limit": {"in": "query", "description": "how many at most"},
}
NAMED = ("reward", "held_out", "method", "interpolant", "grid")  # fields that are names over the wire
TAKES = {
    "POST /v1/searches": ("Idempotency-Key",),
    "GET /v1/searches": ("limit",),
    "GET /v1/searches/{id}/events": ("Last-Event-ID", "every"),
}
ANSWERS = {  # beside JSON
    "GET /v1/searches/{id}/image": "image/png",
    "GET /v1/searches/{id}/events": "text/event-stream",
    "GET /metrics": "text/plain",
}
_ENTRY = re.compile(r"^    (\w+(?:, \w+)*): (.*(?:\n {8,}.*)*)", re.M)


def about(method: str, path: str, settings: ServeSettings) -> dict[str, Any]:
    """Arguments of a route that describe it."""
    place = f"{method} {path}"
    text = {"required": False, "schema": {"type": "string"}}
    takes = [{"name": name, **text, **PARAMETERS[name]} for name in TAKES.get(place, ())]
    extra: dict[str, Any] = {"parameters": takes + _in_path(path)}
    if method == "POST":
        schema = body(settings, images=path.endswith("generations"))
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    kind = ANSWERS.get(place, "application/json")
    good = "202" if place == "POST /v1/searches" else "200"
    content = {kind: {"schema": {"type": "object"} if kind == "application/json" else {"type": "string"}}}
    extra["responses"] = {
        good: {"description": "what was asked for", "content": content},
        "default": {"description": "an error", "content": {"application/json": {"schema": ERROR}}},
    }
    return {"openapi_extra": extra, "status_code": int(good), "tags": [_tag(path)]}


def body(settings: ServeSettings, images: bool) -> dict[str, Any]:
    """The schema of a request's body."""
    meanings, found = explained(), dict[str, Any]()
    for field in fields_of(Request):
        if field.name in fields.SEARCH:
            kind = {"type": "string"} if field.name in NAMED else kind_of(str(field.type))
            usual = None if field.default is MISSING else field.default
            told = {"description": meanings[field.name]} if field.name in meanings else {}
            found[field.name] = kind | told | ({"default": usual} if usual else {})
    found["method"]["enum"] = [*methods.names()]
    found["nfe"] |= {"maximum": settings.max_nfe, "default": fields.NFE}
    found["prompt"] |= {"maxLength": settings.max_prompt}
    drawn = f"at most {settings.max_pixels} pixels, those of all frames together"
    found["model"] = {"type": "string", "default": settings.model}
    found["size"] = {"type": "string", "default": "auto", "description": f"width by height, as in 512x512; {drawn}"}
    found["priority"] |= {"maximum": settings.max_priority}
    found["user"] = {"type": "string", "description": "who it is for; nothing looks at it"}
    if images:
        found["n"] = {"type": "integer", "default": 1, "maximum": settings.max_n, "description": "seeds count on"}
        found["response_format"] = {"enum": ["b64_json", "url"], "default": "b64_json"}
        found["stream"] = {"type": "boolean", "default": False}
        found["partial_images"] = {"type": "integer", "default": 0, "maximum": fields.MOST_PARTIAL}
        says = "events image_generation.progress, too, which OpenAI's client would take for partial images"
        found[fields.PROGRESS] = {"type": "boolean", "default": False, "description": says}
    return {
        "type": "object",
        "required": ["prompt"],
        "properties": found,
        "description": "A method's own options are fields, too: GET /v1/options lists them.",
    }


@lru_cache
def explained() -> dict[str, str]:
    """What each field of a request means, as its docstring says."""
    found = {}
    for entry in _ENTRY.finditer(inspect.getdoc(Request) or ""):
        for name in entry[1].split(", "):
            found[name] = " ".join(entry[2].split())
    return found


def kind_of(annotation: str) -> dict[str, Any]:
    """The type of a field in JSON."""
    kinds = {"int": "integer", "float": "number", "bool": "boolean", "Mapping": "object", "Sequence": "array"}
    kind = next((kinds[word] for word in re.findall(r"\w+", annotation) if word in kinds), "string")
    return {"type": kind, "items": {"type": "number"}} if kind == "array" else {"type": kind}


def _in_path(path: str) -> list[dict[str, Any]]:
    names = re.findall(r"\{(\w+)", path)
    return [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]


def _tag(path: str) -> str:
    return path.split("/")[2] if path.startswith("/v1/") else "server"
