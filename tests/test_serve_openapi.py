"""/openapi.json against what the server really answers: every field of an answer is described, and none beside them."""

import json
import re

import httpx
import pytest
import serving
import workers
from serving import Served
from test_serve_http import ASK, IMAGES, REWARDS, SEARCHES, events, until
from tiny import PATIENCE

from rollflow import interpolant
from rollflow.serve import fields, openapi, schemas
from rollflow.serve.desk import Desk
from rollflow.serve.limits import ServeSettings
from rollflow.serve.local import LocalChannel

KINDS = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}
WORDS = {"type", "null", "description", "enum", "required", "properties", "additionalProperties", "items", "anyOf"}
PYTHON = re.compile(r"`|rollflow\.|\b(None|True|False|tensor|PIL|Interpolant|latents|deadline|function f)\b")


@pytest.fixture(scope="module")
def http():
    engine = workers.engine()
    settings = ServeSettings(model="tiny", rewards=REWARDS)
    with Served([LocalChannel(engine)], settings, max_queued=4, window=1) as served:  # noqa: SIM117
        with httpx.Client(base_url=served.url, timeout=PATIENCE) as client:
            yield client
    engine.close()


@pytest.fixture(scope="module")
def told(http):
    return http.get("/openapi.json").json()


def faults(value, schema, known, place="answer"):
    """Where a value is not what a schema says; unlike in JSON Schema, a field that it does not name is a fault."""
    if "$ref" in schema:
        return faults(value, known[schema["$ref"].removeprefix("#/components/schemas/")], known, place)
    assert {*schema} <= WORDS | {"default"}, f"{place}: this check does not know {schema}"
    if "anyOf" in schema:
        tried = [faults(value, one, known, place) for one in schema["anyOf"]]
        return [] if [] in tried else max(tried, key=len)
    kinds = [schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type", ())
    if kinds and not any(fits(value, kind) for kind in kinds):
        return [f"{place} is {value!r}, not {kinds}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{place} is {value!r}, not one of {schema['enum']}"]
    if isinstance(value, list):
        items = schema["items"]
        return [fault for i, one in enumerate(value) for fault in faults(one, items, known, f"{place}[{i}]")]
    if not isinstance(value, dict) or not {"properties", "additionalProperties"} & {*schema}:
        return []
    named, other = schema.get("properties", {}), schema.get("additionalProperties")
    found = [f"{place} lacks {name}" for name in schema.get("required", ()) if name not in value]
    for name, one in value.items():
        if name not in named and other is None:
            found.append(f"{place} has {name}, which is not described")
        else:
            found += faults(one, named.get(name, other), known, f"{place}.{name}")
    return found


def fits(value, kind):
    if kind == "null" or value is None:
        return kind == "null" and value is None
    return isinstance(value, KINDS[kind]) and (kind == "boolean") == isinstance(value, bool)


def check(told, answer, status=200):
    """An answer of the server against what it says of the endpoint that gave it."""
    assert answer.status_code == status, answer.text
    path = answer.request.url.path
    templates = {re.sub(r"\{id(:path)?\}", r"[^/]+", one): one for one in told["paths"]}
    template = next(place for pattern, place in templates.items() if re.fullmatch(pattern, path))
    responses = told["paths"][template][answer.request.method.lower()]["responses"]
    schema = responses.get(str(status), responses["default"])["content"]["application/json"]["schema"]
    body = answer.json()
    assert faults(body, schema, told["components"]["schemas"]) == []
    return body


def wait_for(http, id, *status):
    until(lambda: http.get(f"{SEARCHES}/{id}").json()["status"] in status)


def test_the_check_finds_what_is_wrong(told):
    known = told["components"]["schemas"]
    right = {"error": {"message": "a", "type": "server_error", "param": None, "code": None}}
    assert faults(right, schemas.ref("Error"), known) == []
    for more in ({"message": 3}, {"type": "other"}, {"more": 1}):
        wrong = {"error": {**right["error"], **more}}
        assert len(faults(wrong, schemas.ref("Error"), known)) == 1
    assert faults({"error": {"message": "a", "type": "server_error", "param": None}}, schemas.ref("Error"), known)
    assert faults(True, {"type": "integer"}, known) and faults(None, {"type": "object"}, known)


def test_a_search_is_what_is_described_from_its_beginning_to_its_end(http, told):
    with serving.opened(workers.GATE) as gate:
        id = check(told, http.post(SEARCHES, json={**ASK, "reward": "gated", "held_out": "bright"}), 202)["id"]
        wait_for(http, id, "running")
        assert check(told, http.get(f"{SEARCHES}/{id}"))["result"] is None
        gate.set()
    wait_for(http, id, "done")
    done = check(told, http.get(f"{SEARCHES}/{id}"))
    assert done["result"]["held_out"] is not None and done["improvements"] and done["image"] and done["error"] is None
    timed = {**{name: value for name, value in ASK.items() if name != "nfe"}, "seconds": 0.2}
    id = check(told, http.post(SEARCHES, json={**timed, "reward": "bright + 0.5*bright"}), 202)["id"]
    wait_for(http, id, "done")
    assert check(told, http.get(f"{SEARCHES}/{id}"))["result"]["terms"]
    id = http.post(SEARCHES, json={**ASK, "prompt": "broken"}).json()["id"]
    wait_for(http, id, "failed")
    failed = check(told, http.get(f"{SEARCHES}/{id}"))
    assert failed["error"]["type"] == "FunctionError" and failed["result"] is None and failed["image"] is None
    id = http.post(SEARCHES, json={**ASK, "reward": "slow", "nfe": 3000}).json()["id"]
    until(lambda: http.get(f"{SEARCHES}/{id}").json()["improvements"])
    assert check(told, http.delete(f"{SEARCHES}/{id}"))["result"]["stopped"] == "cancelled"
    with serving.opened(workers.GATE) as gate:
        id = http.post(SEARCHES, json={**ASK, "reward": "gated"}).json()["id"]
        wait_for(http, id, "running")
        gate.set()
        assert check(told, http.delete(f"{SEARCHES}/{id}"))["status"] in ("done", "cancelled")
    assert {one["status"] for one in check(told, http.get(SEARCHES))["data"]} >= {"done", "failed", "cancelled"}


def test_images_and_errors_are_what_is_described(http, told):
    assert "b64_json" in check(told, http.post(IMAGES, json={**ASK, "n": 2}))["data"][1]
    assert "url" in check(told, http.post(IMAGES, json={**ASK, "response_format": "url"}))["data"][0]
    assert check(told, http.post(IMAGES, json={**ASK, "nff": 1}), 400)["error"]["param"] == "nff"
    check(told, http.post(IMAGES, json={**ASK, "prompt": "broken"}), 500)
    check(told, http.get(f"{SEARCHES}/srch_0"), 404)


def test_the_events_of_both_streams_are_what_is_described(http, told):
    known = told["components"]["schemas"]
    data = {
        "search.improved": "SearchProgress", "search.progress": "SearchProgress", "search.done": "Search",
        "search.cancelled": "Search", "search.failed": "Search", "error": "Error",
        "image_generation.progress": "ImageProgress", "image_generation.partial_image": "PartialImage",
        "image_generation.completed": "CompletedImage",
    }  # fmt: skip
    asked = {**ASK, "reward": "slow", "nfe": 240}
    id = http.post(SEARCHES, json=asked).json()["id"]
    found = events(http.get(f"{SEARCHES}/{id}/events", params={"every": 1}).text)
    streamed = {**asked, "stream": True, "partial_images": 2, "progress": True}
    found += events(http.post(IMAGES, json=streamed).text)
    found += events(http.post(IMAGES, json={**ASK, "stream": True, "prompt": "broken"}).text)
    id = http.post(SEARCHES, json={**ASK, "prompt": "broken"}).json()["id"]
    found += events(http.get(f"{SEARCHES}/{id}/events").text)
    for name, _, one in found:
        assert faults(one, schemas.ref(data[name]), known) == [], name
    assert {name for name, *_ in found} >= {*data} - {"search.progress", "search.cancelled"}
    streams = {
        f"{SEARCHES}/{{id}}/events": told["paths"][f"{SEARCHES}/{{id}}/events"]["get"]["description"],
        IMAGES: told["paths"][IMAGES]["post"]["description"],
    }
    for name, schema in data.items():
        assert re.search(rf"{name}\b.*?data is [a-z ]*{schema}", " ".join(streams.values())), name


def test_what_a_server_says_of_itself_is_what_is_described(http, told, monkeypatch):
    options = check(told, http.get("/v1/options"))
    assert options["rewards"] == [*REWARDS] and options["meanings"]["count"].endswith("0 is exactly what was asked for")
    for path in ("/v1/models", "/v1/models/tiny", "/v1/stats", "/health", "/ready"):
        check(told, http.get(path))
    check(told, http.get("/v1/models/other"), 404)
    monkeypatch.setattr(Desk, "alive", property(lambda self: False))
    monkeypatch.setattr(Desk, "ready", property(lambda self: False))
    check(told, http.get("/health"), 503)
    check(told, http.get("/ready"), 503)


def test_every_answer_is_described_and_every_description_is_used(told):
    text, used = str(told["paths"]) + str(told["components"]), {"SearchProgress", "ImageProgress", "PartialImage"}
    for name in re.findall(r"#/components/schemas/(\w+)", text):
        assert name in told["components"]["schemas"]
        used.add(name)
    assert used | {"CompletedImage"} == {*told["components"]["schemas"]}
    for path, methods in told["paths"].items():
        for method, about in methods.items():
            content = next(iter(about["responses"].values()))["content"]
            assert all("$ref" in one["schema"] for kind, one in content.items() if kind == "application/json")
            assert content, (method, path)


def test_fields_are_described_for_who_writes_json(told):
    for path in (IMAGES, SEARCHES):
        body = told["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
        assert {*fields.SEARCH, *fields.ASKED} <= {*body} and not {*fields.STARTS} & {*body}
        for name, field in body.items():
            assert field["description"] and not PYTHON.search(field["description"]), name
    assert {*fields.IMAGES, *fields.USUAL, fields.PROGRESS} <= {
        *told["paths"][IMAGES]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    }
    assert not re.search(r"`|rollflow\.|None", json.dumps(told["components"]))
    assert tuple(interpolant._NAMED) == openapi.PATHS
