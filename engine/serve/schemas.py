"""What the server answers, as JSON Schema: `components/schemas` of /openapi.json, and what streams of events say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from rollflow.serve.counter import FORMATS
from rollflow.serve.orders import Status

END = "data: [DONE]"
SEARCH_EVENTS = (
    "Improvements as they come and the end, as server-sent events.\n\n"
    "search.improved: a better image was found; data is a SearchProgress. "
    "search.progress: how far it is in between, with ?every=1 alone; data is a SearchProgress. "
    "search.done, search.failed, search.cancelled: the last event; data is the whole Search.\n\n"
    "The id of an event is its NFE; search.progress has none. A client that comes again with it as Last-Event-ID gets "
    "what followed. A stream that ends without one of the last three was cut off by a restart: come again. Comments "
    "(lines that begin with a colon) keep the connection open."
)
IMAGE_EVENTS = (
    "Searches for images and answers with them, or with stream=true with server-sent events until they are there. A "
    "client that goes cancels its searches. An Idempotency-Key is refused: hand in a job at POST /v1/searches.\n\n"
    "image_generation.partial_image: the best so far, at most partial_images times an image; data is a PartialImage. "
    "image_generation.progress: how far it is, with progress=true alone; data is an ImageProgress. "
    "image_generation.completed: an image is there; data is a CompletedImage. "
    "error: an image could not be made; data is an Error, and with n above 1 the other images go on.\n\n"
    f"The stream ends with the line {END}."
)


def _of(kind: str, about: str, *, null: bool = False, **more: Any) -> dict[str, Any]:
    """One value."""
    return {"type": [kind, "null"] if null else kind, "description": about, **more}


def _one_of(about: str, *values: str) -> dict[str, Any]:
    return _of("string", about, enum=[*values])


def _object(about: str, fields: Mapping[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    required = [name for name in fields if name not in optional]
    return {"type": "object", "description": about, "required": required, "properties": {**fields}}


def _list(name: str) -> dict[str, Any]:
    return {"type": "array", "items": ref(name)}


def ref(name: str) -> dict[str, Any]:
    """Where a schema of `ALL` is to be found."""
    return {"$ref": f"#/components/schemas/{name}"}


_ID = _of("string", "of the search, as in GET /v1/searches/{id}")
_STATUS = _one_of(
    "queued until an engine has let it in, then running; done, failed and cancelled are the end", *get_args(Status)
)
_SPENT = _of("integer", "function evaluations that were charged to the search so far")
_BEST = _of("number", "the best reward so far, null before the first", null=True)
_SECONDS = _of("number", "since the search began, without the time in the queue")
_CREATED = _of("integer", "seconds since 1970")
_SHAPE = {
    "size": _of("string", "width by height, as in 64x64"),
    "output_format": _one_of("the file's", *FORMATS),
    "quality": _one_of("there is one", "auto"),
    "background": _one_of("there is one", "opaque"),
}
_RESULT = {
    "reward": _of("number", "score of the image by the search's reward; GET /v1/options says what it means", null=True),
    "terms": _of(
        "object",
        "of a combined reward the scores of its terms by name, else null",
        null=True,
        additionalProperties={"type": ["number", "null"]},
    ),
    "held_out": _of("number", "score by the second judge, which the search does not see; null without one", null=True),
    "nfe": _of("integer", "function evaluations that were charged, at most those that were asked for"),
    "cached_nfe": _of("integer", "those of them that took a part of the work, with cache"),
    "executed_nfe": _of(
        "integer", "function evaluations that the device ran: those that were charged and their share of padding"
    ),
    "invalid_rewards": _of("integer", "candidates whose reward was no finite number; they count as worst"),
    "stopped": _one_of(
        "what ended the search: budget (all is spent, or the method had enough), stop_at (the reward was good enough), "
        "seconds or deadline (its time was over), cancelled",
        *("budget", "stop_at", "seconds", "deadline", "cancelled"),
    ),
    "seconds": _SECONDS,
    "width": _of("integer", "of the image in pixels"),
    "height": _of("integer", "of the image in pixels"),
    "frames": _of("integer", "of a clip, else null", null=True),
    "format": _one_of("of the file", *FORMATS),
    "prompt": _of("string", "as it was asked for"),
    "method": _of("string", "as it was asked for"),
    "seed": _of("integer", "of this image"),
}
_IMAGE = {
    "b64_json": _of("string", "the file in base64, with response_format b64_json"),
    "url": _of("string", "where the file is for some time, with response_format url"),
    "id": _ID,
    **_RESULT,
}
_INDEX = _of("integer", "which of the n images, from 0")
_MODEL = {
    "id": _of("string", "the name that requests give as model"),
    "object": _one_of("", "model"),
    "created": _of("integer", "always 0"),
    "owned_by": _of("string", ""),
}
_FAULT = {
    "message": _of("string", "what was given, what is allowed, and what to do"),
    "type": _one_of(
        "OpenAI's word for the status",
        *("invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error"),
    ),
    "param": _of("string", "the field at fault, null where it is none", null=True),
    "code": _of("string", "a word for programs, as in unknown_field, queue_full or reward_failed", null=True),
}
_LIMITS = {
    "n": _of("integer", "images of a request"),
    "nfe": _of("integer", "function evaluations of a search"),
    "seconds": _of("number", "of a search"),
    "pixels": _of("integer", "of an image, or of all frames of a clip together"),
    "priority": _of("integer", "the highest"),
    "prompt": _of("integer", "characters"),
    "body": _of("integer", "bytes of a request"),
    "requests_per_minute": _of("integer", "of a client, null where any number is", null=True),
}
_OPTION = {"default": {"description": "what it is where it is left out"}, "help": _of("string", "what it does")}
_WORKER = {
    "name": _of("string", "its number and kind"),
    "alive": _of("boolean", "whether it runs"),
    "age": _of("number", "seconds since its engine's loop was last heard of", null=True),
    "running": _of("integer", "searches that it has"),
}
ALL: dict[str, dict[str, Any]] = {
    "Search": _object(
        "A search as a job. Ask again until status is done, failed or cancelled.",
        {
            "id": _ID,
            "object": _one_of("", "search"),
            "status": _STATUS,
            "created_at": _CREATED,
            "request": _of("object", "the fields that were asked for"),
            "budget": _of("integer", "function evaluations that it may take; null while its time decides", null=True),
            "progress": _object(
                "How far it is.",
                {
                    "nfe": _SPENT,
                    "best_reward": _BEST,
                    "level": _of("integer", "point of the time grid that was last evaluated"),
                    "seconds": _SECONDS,
                },
            ),
            "improvements": {
                "type": "array",
                "description": "every evaluation that was better than all before it",
                "items": _object(
                    "",
                    {"nfe": _SPENT, "reward": _of("number", "the best until then", null=True), "seconds": _SECONDS},
                ),
            },
            "result": {
                "anyOf": [ref("Result"), {"type": "null"}],
                "description": "what it found: of one that is done, and of a cancelled one the best until then, if any",
            },
            "error": {
                "anyOf": [ref("SearchError"), {"type": "null"}],
                "description": "why there is no result, null before the end and where there is one",
            },
            "image": _of(
                "string", "address of the result's file, null without a result; with API keys it is signed", null=True
            ),
        },
    ),
    "Searches": _object(
        "The latest searches, the newest first.", {"object": _one_of("", "list"), "data": _list("Search")}
    ),
    "Result": _object("What a search found.", _RESULT),
    "SearchError": _object(
        "Why a search has no result.",
        {
            "type": _of("string", "as in FunctionError (the reward raised), OutOfTime or Cancelled"),
            "message": _of("string", "what happened"),
            "seconds": _of("number", "after which to ask again, where that is known"),
        },
        optional=("seconds",),
    ),
    "SearchProgress": _object(
        "The data of the events search.improved and search.progress.",
        {
            "nfe": _SPENT,
            "best_reward": _BEST,
            "level": _of("integer", "point of the time grid that was last evaluated"),
            "seconds": _SECONDS,
            "id": _ID,
            "status": _STATUS,
        },
    ),
    "Images": _object(
        "Images in OpenAI's shape.",
        {"created": _CREATED, "data": _list("Image"), **_SHAPE, "model": _of("string", "the model that is served")},
    ),
    "Image": _object("An image, and what was found of it.", _IMAGE, optional=("b64_json", "url")),
    "ImageProgress": _object(
        "The data of the event image_generation.progress.",
        {
            "type": _one_of("", "image_generation.progress"),
            "id": _ID,
            "index": _INDEX,
            "nfe": _SPENT,
            "reward": _BEST,
        },
    ),
    "PartialImage": _object(
        "The data of the event image_generation.partial_image.",
        {
            "type": _one_of("", "image_generation.partial_image"),
            "b64_json": _of("string", "a PNG of the best so far, in base64"),
            "partial_image_index": _of("integer", "which look at this image, from 0"),
            "id": _ID,
            "index": _INDEX,
            "nfe": _SPENT,
            "reward": _BEST,
            "created_at": _CREATED,
            **_SHAPE,
        },
    ),
    "CompletedImage": _object(
        "The data of the event image_generation.completed.",
        {
            "type": _one_of("", "image_generation.completed"),
            **_IMAGE,
            "index": _INDEX,
            "created_at": _CREATED,
            **_SHAPE,
            "usage": _of("object", "tokens, which OpenAI's client reads: all 0; see nfe"),
        },
        optional=("b64_json", "url"),
    ),
    "Error": _object("An error in OpenAI's shape.", {"error": _object("", _FAULT)}),
    "Models": _object("The one model that is served.", {"object": _one_of("", "list"), "data": _list("Model")}),
    "Model": _object("A model in OpenAI's shape.", _MODEL),
    "Options": _object(
        "What requests may name.",
        {
            "model": _of("string", "the model that is served"),
            "rewards": _of("array", "names that reward and held_out take", items={"type": "string"}),
            "meanings": _of(
                "object", "what each reward measures, by its name", additionalProperties={"type": "string"}
            ),
            "methods": _of(
                "object",
                "the own options of each method, by its name; they are fields of a request, too",
                additionalProperties={"type": "object", "additionalProperties": _object("", _OPTION)},
            ),
            "defaults": _object(
                "What is taken where a request says nothing.",
                {
                    "reward": _of("string", "one of rewards"),
                    "method": _of("string", "one of methods"),
                    "nfe": _of("integer", "function evaluations"),
                },
            ),
            "limits": _object("The most that a request may ask for.", _LIMITS),
        },
    ),
    "Stats": _object(
        "What the machine does now.",
        {
            "running": _of("integer", "searches that an engine has let in"),
            "waiting": _of("integer", "searches in the queue"),
            "outstanding_nfe": _of("integer", "function evaluations that they have left"),
            "nfe_per_second": _of("number", "of all workers, over the last ten seconds", null=True),
            "occupancy": _of("number", "how full batches were, 0 to 1"),
            "free_slots": _of("integer", "places for candidates that are not in use"),
            "slots": _of("integer", "all places for candidates that there are, 0 before a size is first used"),
            "workers": {"type": "array", "description": "each worker", "items": _object("", _WORKER)},
            "nfe": _of(
                "object",
                "function evaluations since the start, by kind, padding included",
                additionalProperties={"type": "integer"},
            ),
            "ready": _of("boolean", "whether it has warmed up"),
            "draining": _of("boolean", "whether it is closing"),
        },
    ),
    "Health": _object(
        "Whether it lives.",
        {
            "status": _one_of("", "ok", "dead"),
            "last_tick_seconds": _of(
                "array", "since each worker's loop was last heard of", items={"type": ["number", "null"]}
            ),
        },
    ),
    "Ready": _object(
        "Whether it takes requests.",
        {"status": _one_of("warming up and draining are a 503", "ready", "warming up", "draining")},
    ),
}
ANSWERS: dict[str, str] = {  # of each endpoint that answers with JSON
    "POST /v1/images/generations": "Images",
    "POST /v1/searches": "Search",
    "GET /v1/searches": "Searches",
    "GET /v1/searches/{id}": "Search",
    "DELETE /v1/searches/{id}": "Search",
    "GET /v1/models": "Models",
    "GET /v1/models/{id:path}": "Model",
    "GET /v1/options": "Options",
    "GET /v1/stats": "Stats",
    "GET /health": "Health",
    "GET /ready": "Ready",
}
DESCRIPTIONS = {  # of endpoints of which there is more to say than in a line
    "POST /v1/images/generations": IMAGE_EVENTS,
    "POST /v1/searches": (
        "Hands in a search and answers at once, 202, with its id. Ask GET /v1/searches/{id} until status is done, "
        "failed or cancelled, or follow /v1/searches/{id}/events. The same Idempotency-Key gives the same search."
    ),
    "GET /v1/searches/{id}/events": SEARCH_EVENTS,
}
