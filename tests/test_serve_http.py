"""The HTTP front end on a real engine: images, jobs, events, disconnects, refusals and errors."""

import asyncio
import base64
import io
import json
import logging
import re
import socket
import time
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import serving
import workers
from PIL import Image
from serving import Served
from tiny import PATIENCE

import rollflow
from rollflow.journal import Journal
from rollflow.serve import fields, images, sse
from rollflow.serve.desk import Desk
from rollflow.serve.limits import ServeSettings
from rollflow.serve.local import LocalChannel
from rollflow.serve.orders import Ordered, Progress

REWARDS = ("bright", "slow", "gated", "count")
ASK = {"prompt": "a", "reward": "bright", "method": "rbf", "steps": 4, "nfe": 12, "seed": 3}
IMAGES, SEARCHES = "/v1/images/generations", "/v1/searches"


@pytest.fixture(scope="module")
def engine():
    made = workers.engine()
    yield made
    made.close()


@pytest.fixture(scope="module")
def served(engine):
    settings = ServeSettings(model="tiny", rewards=REWARDS, heartbeat=0.05, max_body=20_000)
    with Served([LocalChannel(engine)], settings, max_queued=2, window=1) as found:
        yield found


@pytest.fixture(scope="module")
def http(served):
    with httpx.Client(base_url=served.url, timeout=PATIENCE) as client:
        yield client


@pytest.fixture
def gate():
    with serving.opened(workers.GATE) as found:
        yield found


def until(true):
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def events(text):
    """Name, id and data of each event."""
    found = []
    for part in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in part.split("\n") if not line.startswith(":") and line)
        if lines.get("data", "[DONE]") != "[DONE]":
            found.append((lines["event"], lines.get("id"), json.loads(lines["data"])))
    return found


def active(served):
    return served.call(_active, served.desk)


async def _active(desk):
    now = desk.stats()
    return now.queued + now.running, now.ended.get("cancelled", 0)


def wait_for(http, id, *status):
    until(lambda: http.get(f"{SEARCHES}/{id}").json()["status"] in status)


def pixels(file):
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).tolist()


def test_images_are_those_of_the_engine_and_seeds_count_on(http, engine):
    body = http.post(IMAGES, json={**ASK, "n": 2, "user": "somebody"}).raise_for_status().json()
    assert body["model"] == "tiny" and abs(body["created"] - time.time()) < 60 and body["size"] == "8x8"
    for i, one in enumerate(body["data"]):
        direct = engine.generate(workers.request({**ASK, "seed": 3 + i}))
        assert one["seed"] == 3 + i and one["reward"] == direct.reward and one["nfe"] == direct.committed_nfe == 12
        assert pixels(base64.b64decode(one["b64_json"])) == np.asarray(direct.image).tolist()


def test_an_address_in_place_of_the_image(http):
    one = http.post(IMAGES, json={**ASK, "response_format": "url"}).raise_for_status().json()["data"][0]
    assert "b64_json" not in one and one["url"].endswith(f"{SEARCHES}/{one['id']}/image")
    answer = http.get(one["url"])
    assert answer.headers["content-type"] == "image/png" and Image.open(io.BytesIO(answer.content)).size == (8, 8)


def test_a_stream_begins_early_and_tells_rewards_and_nfe(http, gate):
    body = {**ASK, "reward": "gated", "stream": True, "partial_images": 2, "progress": True, "n": 2}
    with http.stream("POST", IMAGES, json=body) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        parts, text = answer.iter_text(), ""
        while ": alive" not in text:  # before anything was judged
            text += next(parts)
        gate.set()
        text += "".join(parts)
    assert text.endswith("data: [DONE]\n\n")
    found = events(text)
    assert {name for name, *_ in found} >= {"image_generation.completed", "image_generation.progress"}
    done = [data for name, _, data in found if name == "image_generation.completed"]
    assert sorted(data["index"] for data in done) == [0, 1] and all(data["nfe"] == 12 for data in done)
    for name, _, data in found:
        assert data["type"] == name
        if "b64_json" in data:
            assert Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))).size == (8, 8)
    plain = http.post(IMAGES, json={**ASK, "stream": True}).text
    assert [name for name, *_ in events(plain)] == ["image_generation.completed"]


def test_partial_images_come_at_shares_of_the_budget(http):
    found = events(
        http.post(IMAGES, json={**ASK, "reward": "slow", "nfe": 240, "stream": True, "partial_images": 3}).text
    )
    partial = [data for name, _, data in found if name == "image_generation.partial_image"]
    assert [data["partial_image_index"] for data in partial] == [*range(len(partial))] and 1 <= len(partial) <= 3
    assert all(data["nfe"] >= 60 * (i + 1) for i, data in enumerate(partial))
    rewards = [data["reward"] for data in partial]
    assert rewards == sorted(rewards) and found[-1][0] == "image_generation.completed"


def test_a_search_is_a_job_with_events_that_go_on_where_the_client_was(http):
    answer = http.post(SEARCHES, json=ASK)
    made = answer.json()
    assert answer.status_code == 202 and answer.headers["location"] == f"{SEARCHES}/{made['id']}"
    assert made["request"] == ASK and made["budget"] == 12
    found = events(http.get(f"{SEARCHES}/{made['id']}/events").text)
    assert [name for name, *_ in found] == ["search.improved"] * (len(found) - 1) + ["search.done"]
    assert [int(id) for _, id, _ in found] == sorted(int(id) for _, id, _ in found)
    rewards = [data["best_reward"] for _, _, data in found[:-1]]
    assert rewards == sorted({*rewards}) and len(rewards) >= 2 and found[-1][2]["result"]["nfe"] == 12
    again = events(http.get(f"{SEARCHES}/{made['id']}/events", headers={"Last-Event-ID": found[0][1]}).text)
    assert [one[:2] for one in again] == [one[:2] for one in found[1:]]
    shown = http.get(f"{SEARCHES}/{made['id']}").json()
    assert shown["status"] == "done" and [one["reward"] for one in shown["improvements"]] == rewards
    assert made["id"] in [one["id"] for one in http.get(SEARCHES).json()["data"]]
    assert len(http.get(SEARCHES, params={"limit": 1}).json()["data"]) == 1


def test_a_running_search_shows_its_best_and_can_be_ended_with_it(http, gate):
    id = http.post(SEARCHES, json={**ASK, "reward": "gated"}).json()["id"]
    wait_for(http, id, "running")
    answer = http.get(f"{SEARCHES}/{id}/image")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "no_image"
    gate.set()
    id = http.post(SEARCHES, json={**ASK, "reward": "slow", "nfe": 3000}).json()["id"]
    until(lambda: http.get(f"{SEARCHES}/{id}").json()["improvements"])
    answer = http.get(f"{SEARCHES}/{id}/image")
    assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"
    ended = http.delete(f"{SEARCHES}/{id}").json()
    assert (
        ended["status"] == "cancelled" and ended["result"]["nfe"] < 3000 and ended["result"]["stopped"] == "cancelled"
    )
    assert http.get(f"{SEARCHES}/{id}/image").headers["cache-control"] != "no-store"
    assert http.delete(f"{SEARCHES}/{id}").json()["status"] == "cancelled"


def test_the_same_key_is_the_same_search(http):
    header = {"Idempotency-Key": "one"}
    first, second = (http.post(SEARCHES, json=ASK, headers=header).json() for _ in range(2))
    assert first["id"] == second["id"]
    other = http.post(SEARCHES, json={**ASK, "seed": 9}, headers=header)
    assert other.status_code == 422 and other.json()["error"]["code"] == "idempotency_key_reused"
    assert http.post(SEARCHES, json=ASK, headers={"Idempotency-Key": "x" * 256}).status_code == 400
    images = http.post(IMAGES, json=ASK, headers=header)
    assert images.status_code == 400 and "POST /v1/searches" in images.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_cancels_its_search(http, served, gate, stream):
    _, before = active(served)
    body = json.dumps({**ASK, "reward": "gated", "stream": stream, "n": 2}).encode()
    where = urlsplit(served.url)
    with socket.create_connection((where.hostname, where.port)) as client:
        head = f"POST {IMAGES} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: active(served)[0] == 2)
    gate.set()
    until(lambda: active(served) == (0, before + 2))


def test_a_client_that_goes_before_the_first_event_is_heard_of():
    sent, heard = [], []

    async def never():
        await asyncio.Event().wait()
        yield b""

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    async def closed():
        heard.append(True)

    asyncio.run(asyncio.wait_for(sse.EventStream(never(), 60, closed)({}, receive, send), PATIENCE))
    assert heard == [True] and len(sent) <= 2


def test_a_job_stays_when_who_watches_it_goes(http, gate):
    id = http.post(SEARCHES, json={**ASK, "reward": "gated"}).json()["id"]
    with http.stream("GET", f"{SEARCHES}/{id}/events") as answer:
        next(answer.iter_raw())
    gate.set()
    wait_for(http, id, "done")


def test_a_full_queue_is_told_before_a_stream_begins(http, served, gate):
    def submitted():
        return http.post(SEARCHES, json={**ASK, "reward": "gated"}).json()["id"]

    asked = [submitted()]
    until(lambda: http.get(f"{SEARCHES}/{asked[0]}").json()["status"] == "running")  # two more may wait
    asked += [submitted(), submitted()]
    assert served.call(_active, served.desk)[0] == 3
    for body in ({**ASK, "stream": True}, ASK):
        answer = http.post(IMAGES, json=body)
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error" and answer.json()["error"]["code"] == "queue_full"
    gate.set()
    for id in asked:
        wait_for(http, id, "done")
    assert http.post(IMAGES, json=ASK).status_code == 200


def test_a_search_that_fails_is_an_error_in_the_answer_and_in_a_stream(http):
    answer = http.post(IMAGES, json={**ASK, "prompt": "broken"})
    error = answer.json()["error"]
    assert answer.status_code == 500 and answer.headers["x-should-retry"] == "false"
    assert error["type"] == "server_error" and error["code"] == "reward_failed" and "\n" not in error["message"]
    ((name, _, data),) = events(http.post(IMAGES, json={**ASK, "prompt": "broken", "stream": True}).text)
    assert name == "error" and data["error"] == error
    id = http.post(SEARCHES, json={**ASK, "prompt": "broken"}).json()["id"]
    wait_for(http, id, "failed")
    assert http.get(f"{SEARCHES}/{id}").json()["error"]["type"] == "FunctionError"


WRONG = [  # a body beside ASK's fields, the status, the field at fault, and a word of the message
    ({"nff": 1}, 400, "nff", "'nfe'"),
    ({"methd": "rbf"}, 400, "methd", "'method'"),
    ({"initail": 2}, 400, "initail", "'initial'"),
    ({"latents": [1]}, 400, "latents", "is taken over HTTP"),
    ({"strength": 0.5}, 400, "strength", "is taken over HTTP"),
    ({"image": "a.png"}, 400, "image", "is taken over HTTP"),
    ({"mask": "a.png"}, 400, "mask", "is taken over HTTP"),
    ({"prompt": ""}, 400, "prompt", "prompt"),
    ({"prompt": 3}, 400, "prompt", "prompt"),
    ({"prompt": "a" * 4001}, 400, "prompt", "4000"),
    ({"n": 17}, 400, "n", "at most 16"),
    ({"n": True}, 400, "n", "whole number"),
    ({"nfe": 10_001}, 400, "nfe", "at most 10000"),
    ({"nfe": "many"}, 400, "nfe", "whole number"),
    ({"nfe": 1}, 400, "nfe", "nfe"),
    ({"seconds": 601}, 400, "seconds", "at most 600"),
    ({"seed": 1.5}, 400, "seed", "whole number"),
    ({"interpolant": "bent"}, 400, "interpolant", "bent"),
    ({"steps": 0}, 400, "steps", "at least 1"),
    ({"method": "magic"}, 400, "method", "sprout"),
    ({"times": [{"a": 1}]}, 400, "times", "list"),
    ({"initial": -4}, 400, "initial", "initial"),
    ({"size": "8"}, 400, "size", "512x512"),
    ({"size": "16384x16384"}, 400, "size", "at most 4194304 pixels"),
    ({"priority": 1}, 400, "priority", "at most 0"),
    ({"size": "8x8", "width": 8}, 400, "size", "one of both"),
    ({"response_format": "pickle"}, 400, "response_format", "b64_json"),
    ({"partial_images": 1}, 400, "partial_images", "stream"),
    ({"quality": "hd"}, 400, "quality", "auto"),
    ({"model": "dall-e-3"}, 404, "model", "tiny"),
    ({"reward": "brigt"}, 400, "reward", "'bright'"),
    ({"reward": 7}, 400, "reward", "name"),
    ({"reward": "scores.py:redness"}, 400, "reward", "scores.py"),
    ({"reward": "os:system"}, 400, "reward", "os"),
    ({"reward": "http:url=http://127.0.0.1:1/"}, 400, "reward", "no reward"),
    ({"reward": "judge:model=a,key=HOME"}, 400, "reward", "no reward"),
    ({"reward": "bright + 0.1*count:model=folder"}, 400, "reward", "the server's to set"),
    ({"held_out": "count:device=cuda"}, 400, "held_out", "the server's to set"),
]


@pytest.mark.parametrize(("body", "status", "param", "word"), WRONG, ids=lambda one: str(one)[:30])
def test_what_cannot_be_honoured_names_the_field(http, body, status, param, word):
    answer = http.post(IMAGES, json={**ASK, **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert word in error["message"] and error["type"] == "invalid_request_error" and error["code"]
    if "stream" not in error["message"]:
        assert http.post(IMAGES, json={**ASK, **body, "stream": True}).status_code == status


BODIES = [  # a body, its headers, the status and a word of the message
    (b"{", {}, 400, "JSON"),
    (b"[1]", {}, 400, "object"),
    (b'{"prompt": "a", "nfe": NaN}', {}, 400, "NaN"),
    (b'{"prompt": "a", "stop_at": 1e999}', {}, 400, "too large"),
    (b'{"prompt": "a", "prompt": "b"}', {}, 400, "twice"),
    (b'{"prompt": "\\ud800"}', {}, 400, "UTF-8"),
    (b'"\xff"', {}, 400, "UTF-8"),
    (b"[" * 15_000, {}, 400, "JSON"),
    (b'{"prompt": "%s"}' % (b"a" * 20_000), {}, 413, "at most 20000"),
    (b"{}", {"Content-Type": "text/plain"}, 415, "application/json"),
]


@pytest.mark.parametrize(("body", "headers", "status", "word"), BODIES, ids=lambda one: str(one)[:20])
@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_that_are_none(http, body, headers, status, word, chunked):
    content = iter([body[:10], body[10:]]) if chunked else body
    answer = http.post(SEARCHES, content=content, headers={"Content-Type": "application/json", **headers})
    assert answer.status_code == status and word in answer.json()["error"]["message"]


def counted(http, name, **labels):
    """The sum of a metric's samples with these labels."""
    parser = pytest.importorskip("prometheus_client.parser")
    families = parser.text_string_to_metric_families(http.get("/metrics").text)
    found = [one for family in families for one in family.samples if one.name == name]
    return sum(one.value for one in found if labels.items() <= one.labels.items())


def answered(http, status, **labels):
    return counted(http, "rollflow_http_responses_total", status=str(status), **labels)


def refusals(http, reason=None):
    return counted(http, "rollflow_requests_refused_total", **({} if reason is None else {"reason": reason}))


REFUSALS = [  # what is sent, and the reason that it is counted by
    ({"json": {**ASK, "nonsense": 1}}, "unknown_field"),
    ({"json": {**ASK, "nfe": -1}}, "invalid_value"),
    ({"content": b"{", "headers": {"Content-Type": "application/json"}}, "invalid_json"),
    ({"content": b"{}", "headers": {"Content-Type": "text/plain"}}, "unsupported_type"),
    ({"json": {**ASK, "reward": "nowhere"}}, "unknown_reward"),
    ({"json": {**ASK, "nfe": 1}}, "budget_too_small"),  # refused by a worker
    ({"json": ASK, "headers": {"Host": "elsewhere.example"}}, "misdirected_request"),  # and by the gate
]


@pytest.mark.parametrize("path", [IMAGES, SEARCHES])
@pytest.mark.parametrize(("sent", "reason"), REFUSALS, ids=lambda one: one if isinstance(one, str) else "")
def test_every_refusal_of_a_search_is_counted_by_its_reason(http, path, sent, reason):
    before, of_it = refusals(http), refusals(http, reason)
    answer = http.post(path, **sent)
    assert answer.status_code >= 400 and answer.json()["error"]["code"] == reason
    assert refusals(http) - before == refusals(http, reason) - of_it == 1


def test_what_is_no_refusal_of_a_search_is_not_counted_as_one(http):
    before = refusals(http)
    for path in (f"{SEARCHES}/srch_0", "/nowhere", "/v1/models/x", f"{SEARCHES}?limit=x"):
        assert http.get(path).status_code >= 400
    assert http.put(SEARCHES).status_code == 405
    assert http.post(IMAGES, json={**ASK, "prompt": "broken"}).status_code == 500  # it was let in
    assert refusals(http) == before


def test_answers_are_counted_by_route(http):
    places = ((200, "/ready"), (404, "other"), (404, "/v1/searches/{id}"))
    before = [answered(http, status, route=route) for status, route in places]
    for path in ("/ready", "/nowhere-at-all", f"{SEARCHES}/srch_unmistakable"):
        http.get(path)
    assert [answered(http, status, route=route) for status, route in places] == [one + 1 for one in before]
    text = http.get("/metrics").text
    assert "unmistakable" not in text and "nowhere-at-all" not in text


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/", "/docs"])
def test_load_balancers_may_ask_with_head(http, path):
    answer, whole = http.head(path), http.get(path)
    assert answer.status_code == whole.status_code == 200 and answer.content == b""
    assert answer.headers["content-type"] == whole.headers["content-type"]
    refused = http.post(path)
    assert refused.status_code == 405 and refused.headers["allow"] == "GET, HEAD"


def test_what_is_not_allowed_names_all_that_is(http):
    assert http.put(SEARCHES).headers["allow"] == "GET, POST"
    assert http.head(f"{SEARCHES}/srch_0").headers["allow"] == "DELETE, GET"
    assert "head" not in http.get("/openapi.json").json()["paths"]["/health"]


def test_each_request_is_a_line_of_the_log_for_debugging(http, caplog):
    with caplog.at_level(logging.DEBUG, "rollflow"):
        answer = http.get(f"{SEARCHES}/srch_unmistakable")
        until(lambda: answer.headers["x-request-id"] in caplog.text)
    (line,) = [one.getMessage() for one in caplog.records if one.levelno == logging.DEBUG]
    assert re.fullmatch(rf"GET /v1/searches/{{id}} 404 [\d.]+ ms {answer.headers['x-request-id']}", line)


def test_errors_are_never_tracebacks(http, monkeypatch):
    failed = answered(http, 500)

    def broken(*_):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(Desk, "listed", broken)
    answers = [
        (http.get("/nowhere"), 404), (http.put(SEARCHES), 405), (http.get(f"{SEARCHES}/srch_0"), 404),
        (http.get(SEARCHES, params={"limit": "x"}), 400), (http.get(SEARCHES), 500), (http.get("/v1/models/x"), 404),
        (http.get(SEARCHES, headers={"Host": "elsewhere.example"}), 421),
    ]  # fmt: skip
    for answer, status in answers:
        assert answer.status_code == status and {*answer.json()["error"]} == {"message", "type", "param", "code"}
        assert "secret" not in answer.text and "Traceback" not in answer.text
        assert answer.headers["x-request-id"].startswith("req_")
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert answered(http, 500) == failed + 1


def test_what_a_server_says_of_itself(http, monkeypatch):
    assert http.get("/health").json()["status"] == "ok" and http.get("/ready").status_code == 200
    assert [one["id"] for one in http.get("/v1/models").json()["data"]] == ["tiny"]
    told = http.get("/v1/options").json()
    assert told["rewards"] == [*REWARDS] and told["limits"]["pixels"] == 2048 * 2048
    told = http.get("/openapi.json").json()["paths"]
    schema = told[IMAGES]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"prompt", "n", "reward", "stop_at", "interpolant", "partial_images"} <= {*schema}
    assert schema["nfe"]["type"] == "integer" and "budget" in schema["nfe"]["description"]
    for page in ("/", "/docs"):
        assert http.get(page).headers["content-type"].startswith("text/html")
    monkeypatch.setattr(Desk, "alive", property(lambda self: False))
    assert http.get("/health").status_code == 503
    monkeypatch.setattr(Desk, "ready", property(lambda self: False))
    assert http.get("/ready").status_code == 503


def test_what_a_server_adds_it_says_and_lets_in(engine):
    """Its own reward and budget, in all places alike; images of one request do not keep one another out."""
    settings = ServeSettings(model="tiny", rewards=("motion", "bright"), max_nfe=60)
    with Served([LocalChannel(engine)], settings, max_queued_nfe=30) as served:  # noqa: SIM117
        with httpx.Client(base_url=served.url, timeout=PATIENCE) as http:
            assert http.get("/v1/options").json()["defaults"] == {"reward": "motion", "method": "sprout", "nfe": 60}
            paths = http.get("/openapi.json").json()["paths"]
            for path in (IMAGES, SEARCHES):
                schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
                assert (schema["reward"]["default"], schema["nfe"]["default"]) == ("motion", 60)
            error = http.post(IMAGES, json={"prompt": "a", "steps": 2}).json()["error"]
            assert error["message"].endswith("('motion' judges requests that name no reward: name another one)")
            body = {**ASK, "reward": "bright"}
            assert len(http.post(IMAGES, json={**body, "n": 4, "nfe": 20}).json()["data"]) == 4
            timed = {name: value for name, value in body.items() if name != "nfe"}
            assert len(http.post(IMAGES, json={**timed, "n": 3, "seconds": 0.3}).json()["data"]) == 3


def test_metrics_are_as_prometheus_has_them(http):
    parser = pytest.importorskip("prometheus_client.parser")
    id = http.post(IMAGES, json={**ASK, "prompt": "unmistakable"}).json()["data"][0]["id"]
    until(lambda: 'rollflow_nfe_total{kind="committed"}' in http.get("/metrics").text)
    text = http.get("/metrics").text
    families = {one.name: one for one in parser.text_string_to_metric_families(text)}
    assert {
        "rollflow_requests_running", "rollflow_requests_waiting", "rollflow_nfe", "rollflow_nfe_per_second",
        "rollflow_batch_occupancy_ratio", "rollflow_request_seconds", "rollflow_request_queue_seconds",
        "rollflow_reward_call_seconds", "rollflow_reward_errors", "rollflow_slots_free",
        "rollflow_oldest_waiting_seconds", "rollflow_requests_running_limit", "process_resident_memory_bytes",
    } <= {*families}  # fmt: skip
    assert families["rollflow_request_seconds"].type == "histogram" and families["rollflow_nfe"].type == "counter"
    (build,) = families["rollflow_build_info"].samples
    assert (build.name, build.labels, build.value) == ("rollflow_build_info", {"version": rollflow.__version__}, 1)
    assert families["rollflow_requests_running_limit"].samples[0].value == 1  # of one worker with a window of 1
    labels = {str(value) for one in families.values() for sample in one.samples for value in sample.labels.values()}
    assert "bright" in labels and not any("unmistakable" in label or id in label for label in labels)


def test_a_server_that_drains_tells_new_requests_to_come_again(engine, gate):
    with Served([LocalChannel(engine)], ServeSettings(model="tiny", rewards=REWARDS)) as served:  # noqa: SIM117
        with httpx.Client(base_url=served.url, timeout=PATIENCE) as http:
            id = http.post(SEARCHES, json={**ASK, "reward": "gated"}).json()["id"]
            closing = asyncio.run_coroutine_threadsafe(served.desk.close(PATIENCE), served._loop)
            until(lambda: http.get("/ready").status_code == 503)
            answer = http.post(IMAGES, json={**ASK, "stream": True})
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "draining"
            gate.set()
            closing.result(PATIENCE)
            assert http.get(f"{SEARCHES}/{id}").json()["status"] == "done"


def test_what_a_restart_leaves_goes_on_for_those_who_come_again(engine, gate, tmp_path):
    settings, body = ServeSettings(model="tiny", rewards=REWARDS), {**ASK, "reward": "gated"}
    journal = Journal(tmp_path)
    with Served([LocalChannel(engine)], settings, journal=journal) as served:
        http = httpx.Client(base_url=served.url, timeout=PATIENCE)
        id = http.post(SEARCHES, json=body, headers={"Idempotency-Key": "k"}).json()["id"]
        with http.stream("GET", f"{SEARCHES}/{id}/events") as answer:
            served.call(served.desk.close, 0)
            assert events("".join(answer.iter_text())) == []  # it has not ended
        assert http.get(f"{SEARCHES}/{id}").json()["error"]["type"] == "EngineClosed"
    journal.close()
    gate.set()
    journal = Journal(tmp_path)
    with Served([LocalChannel(engine)], settings, journal=journal) as served:
        http = httpx.Client(base_url=served.url, timeout=PATIENCE)
        found = events(http.get(f"{SEARCHES}/{id}/events").text)
        assert found[-1][0] == "search.done" and found[-1][2]["result"]["nfe"] == 12
        assert http.post(SEARCHES, json=body, headers={"Idempotency-Key": "k"}).json()["id"] == id
        assert http.get(f"{SEARCHES}/{id}/image").headers["content-type"] == "image/png"
        assert counted(http, "rollflow_request_seconds_count") == counted(http, "rollflow_requests_total") == 1
        assert counted(http, "rollflow_request_seconds_sum") > served.desk.get(id).result["seconds"]
        assert counted(http, "rollflow_request_queue_seconds_count") == 0  # nobody knows when it first began
    journal.close()


def test_connections_without_a_request_end(engine, monkeypatch):
    usual = serving.quiet
    monkeypatch.setattr(serving, "quiet", lambda app: usual(app, headers=0.05))
    with Served([LocalChannel(engine)], ServeSettings(model="tiny", rewards=REWARDS, heartbeat=0.05)) as served:
        where = urlsplit(served.url)
        for head in (b"", b"GET /heal"):
            with socket.create_connection((where.hostname, where.port), PATIENCE) as client:
                client.sendall(head)
                assert client.recv(1000) == b""  # it was closed
        with httpx.Client(base_url=served.url, timeout=PATIENCE) as http, serving.opened(workers.GATE) as gate:
            id = http.post(SEARCHES, json={**ASK, "reward": "gated"}).json()["id"]
            with http.stream("GET", f"{SEARCHES}/{id}/events") as answer:
                parts = answer.iter_text()
                text = "".join(next(parts) for _ in range(6))  # longer than a connection may be without a request
                gate.set()
                assert "search.done" in text + "".join(parts)


def test_more_connections_than_there_may_be_are_told_to_come_again(engine, monkeypatch):
    usual = serving.quiet
    monkeypatch.setattr(serving, "quiet", lambda app: usual(app, 2))
    with Served([LocalChannel(engine)], ServeSettings(model="tiny", rewards=REWARDS)) as served:
        where = urlsplit(served.url)
        assert httpx.get(f"{served.url}/health").status_code == 200
        with socket.create_connection((where.hostname, where.port)):
            until(lambda: httpx.get(f"{served.url}/health").status_code == 503)
        until(lambda: httpx.get(f"{served.url}/health").status_code == 200)


def test_a_server_with_keys_says_nothing_to_others(engine, tmp_path):
    (tmp_path / "keys").write_text("the-key-of-this-test\n")
    settings = ServeSettings(model="tiny", rewards=REWARDS, keys=str(tmp_path / "keys"))
    key = {"Authorization": "Bearer the-key-of-this-test"}
    with Served([LocalChannel(engine)], settings) as served:
        for path, status in (("/metrics", 401), (SEARCHES, 401), ("/health", 200), ("/ready", 200), ("/docs", 200)):
            assert httpx.get(f"{served.url}{path}").status_code == status
            assert httpx.get(f"{served.url}{path}", headers=key).status_code == 200
        assert httpx.post(f"{served.url}{SEARCHES}", json=ASK).status_code == 401
        with httpx.Client(base_url=served.url, headers=key) as http:
            assert refusals(http) == refusals(http, "invalid_api_key") == 1


class Timed(Ordered):
    """A search of a limited time, whose budget is a guess until it begins."""

    async def events(self, after=-1, every=False):
        self.budget = 1000
        for nfe in range(100, 1100, 100):
            yield Progress(nfe, nfe / 1000)

    async def preview(self):
        return b"png"

    image = preview

    async def over(self):
        self.result = {"format": "png"}


def test_partial_images_of_a_limited_time_are_spread_over_it(served):
    order = Timed("srch_1", {}, "", None, served.desk, 100)

    async def told():
        asked = fields.Asked([{"seconds": 5}], stream=True, partial=3)
        return [one async for one in images._of_one(None, served.counter, asked, 0, order)]

    found = events("".join(one.decode() for one in asyncio.run(told())))
    assert [data["nfe"] for name, _, data in found if name == "image_generation.partial_image"] == [300, 500, 800]
