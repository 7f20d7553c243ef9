"""What /openapi.json says of each endpoint: the bodies that it takes, and by name the answers of `schemas`."""

from __future__ import annotations

import re
from dataclasses import MISSING
from dataclasses import fields as fields_of
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response

from rollflow import methods, sde
from rollflow.request import Request
from rollflow.serve import fields, schemas
from rollflow.serve.counter import FORMATS
from rollflow.serve.limits import ServeSettings

PARAMETERS: dict[str, dict[str, Any]] = {
    "Idempotency-Key": {"in": "header", "description": "the same key gives the same search, also after a restart"},
    "Last-Event-ID": {"in": "header", "description": "the last event that the client has; events after it follow"},
    "every": {"in": "query", "description": "1: also events search.progress between improvements"},
    "limit": {"in": "query", "description": "how many at most"},
}
TAKES = {
    "POST /v1/searches": ("Idempotency-Key",),
    "GET /v1/searches": ("limit",),
    "GET /v1/searches/{id}/events": ("Last-Event-ID", "every"),
}
ANSWERS = {  # beside JSON
    "POST /v1/images/generations": ("text/event-stream",),
    "GET /v1/searches/{id}/image": tuple(FORMATS.values()),
    "GET /v1/searches/{id}/events": ("text/event-stream",),
    "GET /metrics": ("text/plain",),
}
PATHS = ("linear", "vp", "cosine", "polynomial")
_NAME = {"type": "string"}
_MEANINGS: dict[
    str, tuple[str, dict[str, Any]]
] = {  # of a request's fields: what each is, and what its type leaves open
    "prompt": ("what the image should show", {}),
    "reward": (
        "what images are judged by: a name of GET /v1/options, or an expression of names such as "
        "0.7*vqa + 0.3*aesthetic",
        _NAME,
    ),
    "method": ("how candidates are searched; GET /v1/options lists each method's own options", _NAME),
    "nfe": ("the budget in function evaluations of the network; with seconds it may be left out", {"minimum": 1}),
    "steps": ("points of the time grid that are evaluated; by default what suits the method", {"minimum": 1}),
    "interpolant": ("the path that candidates follow; by default what suits the method", {"enum": [*PATHS]}),
    "seed": ("of all noise, a whole number of 64 bits: the same request gives the same image", {}),
    "grid": ("the kind of time grid; model is that of the model's own sampler", {"enum": [*sde.GRIDS, "model"]}),
    "shift": ("of the grid shifted, above 0", {}),
    "times": ("an explicit grid in place of steps and grid: decreasing times from 1 towards 0", {}),
    "diffusion": ("how much noise steps add: g(t) is this number times t squared; 0 adds none", {"type": "number"}),
    "solver": ("how steps are taken; cps is coefficient-preserving", {"enum": [*sde.SOLVERS]}),
    "finish": ("further steps without noise for the chosen candidate, paid from nfe", {"minimum": 0}),
    "finalists": ("how many candidates are finished and judged once more in the end", {"minimum": 1}),
    "stop_at": ("a reward that is good enough: the search ends when it is reached", {}),
    "judge_all": ("true: also judge candidates on whose reward nothing depends", {}),
    "seconds": ("how long the search may take once it has begun; it ends with the best so far", {}),
    "cache": ("true: evaluate candidates in part from a cache, for models and methods that can", {}),
    "priority": ("searches of a higher one go first", {}),
    "guidance": ("the guidance scale, at least 0; by default the model's own", {"minimum": 0}),
    "negative": ("what guidance leads away from, where the model has it", {}),
    "height": ("of the image in pixels; by default the model's own", {"minimum": 1}),
    "width": ("of the image in pixels; by default the model's own", {"minimum": 1}),
    "frames": ("length of a clip, of a model of video; by default the model's own", {"minimum": 1}),
    "options": ("the method's own options, by name; they may stand beside the other fields, too", {}),
    "held_out": ("a second judge of the final image, which the search does not see; written as reward is", _NAME),
}


class Described(FastAPI):
    """An application whose description has the schemas that its endpoints refer to."""

    def openapi(self) -> dict[str, Any]:
        """The description, as FastAPI makes it of the routes, and the schemas."""
        return {**super().openapi(), "components": {"schemas": schemas.ALL}}


def about(method: str, path: str, settings: ServeSettings) -> dict[str, Any]:
    """Arguments of a route that describe it."""
    place = f"{method} {path}"
    text = {"required": False, "schema": {"type": "string"}}
    takes = [{"name": name, **text, **PARAMETERS[name]} for name in TAKES.get(place, ())]
    extra: dict[str, Any] = {"parameters": takes + _in_path(path)}
    if place in schemas.DESCRIPTIONS:
        extra["description"] = schemas.DESCRIPTIONS[place]
    if method == "POST":
        schema = body(settings, images=path.endswith("generations"))
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    good = "202" if place == "POST /v1/searches" else "200"
    found = {"application/json": {"schema": schemas.ref(schemas.ANSWERS[place])}} if place in schemas.ANSWERS else {}
    found |= {kind: {"schema": {"type": "string"}} for kind in ANSWERS.get(place, ())}
    extra["responses"] = {
        good: {"description": "what was asked for", "content": found},
        "default": {"description": "an error", "content": {"application/json": {"schema": schemas.ref("Error")}}},
    }
    if path in ("/health", "/ready"):
        extra["responses"]["503"] = {"description": "it does not", "content": found}
    plain = {"response_class": Response, "status_code": int(good)}  # FastAPI would add an empty JSON to each answer
    return {"openapi_extra": extra, "tags": [_tag(path)], **plain}


def body(settings: ServeSettings, images: bool) -> dict[str, Any]:
    """The schema of a request's body."""
    found = dict[str, Any]()
    for field in fields_of(Request):
        if field.name in fields.SEARCH:
            about, more = _MEANINGS[field.name]
            usual = None if field.default is MISSING else field.default
            kind = kind_of(str(field.type)) | {"description": about} | more
            found[field.name] = kind | ({} if usual is None else {"default": usual})
    found["reward"]["default"] = settings.reward
    found["method"]["enum"] = [*methods.names()]
    found["nfe"] |= {"maximum": settings.max_nfe, "default": fields.usual_nfe(settings)}
    found["prompt"] |= {"maxLength": settings.max_prompt}
    drawn = f"at most {settings.max_pixels} pixels, those of all frames together"
    found["seconds"] |= {"exclusiveMinimum": 0, "maximum": settings.max_seconds}
    found["model"] = {"type": "string", "default": settings.model, "description": "the one that is served"}
    found["size"] = {"type": "string", "default": "auto", "description": f"width by height, as in 512x512; {drawn}"}
    found["priority"] |= {"maximum": settings.max_priority}
    found["user"] = {"type": "string", "description": "who it is for; nothing looks at it"}
    if images:
        found["n"] = {
            "type": "integer",
            "default": 1,
            "maximum": settings.max_n,
            "description": "how many images; their seeds count on",
        }
        told = "the file in base64, or the address where it is for some time"
        found["response_format"] = {"enum": ["b64_json", "url"], "default": "b64_json", "description": told}
        told = "answer with events as they come, see above"
        found["stream"] = {"type": "boolean", "default": False, "description": told}
        told = "events image_generation.partial_image of each image, with stream"
        looks = {"type": "integer", "default": 0, "minimum": 0, "maximum": fields.MOST_PARTIAL}
        found["partial_images"] = {**looks, "description": told}
        says = "events image_generation.progress, too, which OpenAI's client would take for partial images"
        found[fields.PROGRESS] = {"type": "boolean", "default": False, "description": says}
        for name, allowed in fields.USUAL.items():
            found[name] = {"enum": [*allowed], "description": "one of OpenAI's fields; there is one way here"}
    return {
        "type": "object",
        "required": ["prompt"],
        "properties": found,
        "description": "A method's own options are fields, too: GET /v1/options lists them.",
    }


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
