"""The rewards `judge` and `http` against a local server, which answers as a test says."""

import base64
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load
from tiny import bon, engine

from rollflow import FunctionError, RequestError, RewardUnavailable, rewards
from rollflow.rewards import judge as judges
from rollflow.rewards.http import HttpReward
from rollflow.rewards.judge import Cost, JudgeReward

pytestmark = pytest.mark.usefixtures("one_thread")

KEY = "sk-very-secret"


class Server(ThreadingHTTPServer):
    """Keeps what it is sent; `answer(request)` gives status, headers and body."""

    daemon_threads = True

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.requests, self.over = answer, [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        """A client that gave up is no error of a test."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        request = SimpleNamespace(path=self.path, headers=self.headers, body=body)
        self.server.requests.append(request)
        status, headers, answer = self.server.answer(request)
        answer = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers, "Content-Length": len(answer)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """Starts servers, which end with the test."""
    servers = []

    def start(answer):
        servers.append(Server(answer))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.over.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def naps(monkeypatch):
    """The seconds that the client of the judge would have slept between tries."""
    base = pytest.importorskip("openai._base_client", reason="openai is not installed")
    slept = []
    monkeypatch.setattr(base, "time", SimpleNamespace(time=time.time, sleep=slept.append))
    return slept


def images(*shades, size=(8, 12)):
    return torch.stack([torch.full((3, *size), shade / 255) for shade in shades])


@contextmanager
def one_line(kind, *parts):
    with pytest.raises(kind) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text and len(text) <= 500 and KEY not in text
    for part in parts:
        assert part in text


# The judge
# ---------


def completion(content, prompt_tokens=100, completion_tokens=7):
    message = {"role": "assistant", "content": content}
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": 0}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    found = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return 200, {}, found


def grade(score):
    return completion(json.dumps({"score": score}))


def asked(request):
    """The prompt and the pixels of a call."""
    text, image = json.loads(request.body)["messages"][1]["content"]
    head, _, data = image["image_url"]["url"].partition(",")
    file = io.BytesIO(base64.b64decode(data))
    return text["text"].removeprefix("Prompt: "), head, np.array(Image.open(file))


def by_shade(request):
    """Grades the shade of an image, less the length of its prompt."""
    prompt, _, pixels = asked(request)
    return grade(pixels.mean() / 25.5 - len(prompt) / 10)


def judge(server, **options):
    return JudgeReward(**{"model": "m", "base_url": f"{server.url}/v1", **options})


def turns(*answers):
    """Each answer once, the last one for ever."""
    left = [*answers]
    return lambda request: left.pop(0) if len(left) > 1 else left[0]


@pytest.mark.parametrize("image", ["png", "jpeg"])
def test_what_the_judge_is_asked(serve, naps, image, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    server = serve(turns(grade(6.5)))
    reward = judge(server, image=image, key="MY_KEY", rubric="Only colour counts.")
    scores = reward(images(51, size=(16, 24)), ["a “gray” wall"])
    assert (scores.dtype, scores.tolist()) == (torch.float32, pytest.approx([0.65]))
    (request,) = server.requests
    prompt, head, pixels = asked(request)
    assert (prompt, head) == ("a “gray” wall", f"data:image/{image};base64")
    assert pixels.shape == (16, 24, 3) and (pixels == 51).all()
    body = json.loads(request.body)
    assert request.path == "/v1/chat/completions" and request.headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"]) == ("m", 0.0)
    assert body["messages"][0]["content"].startswith("Only colour counts.")
    form = body["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["strict"] is True
    assert form["json_schema"]["schema"] == judges.SCHEMA
    assert KEY not in f"{reward!r} {reward.name}" and KEY.encode() not in request.body


def test_mixed_prompts_are_judged_as_one_by_one(serve, naps):
    server = serve(by_shade)
    shown, prompts = images(250, 30, 120, 200, 30), ["a", "abc", "ab", "abcde", ""]
    together = judge(server)(shown, prompts)
    reward = judge(server, concurrency=1)
    alone = [reward(shown[i : i + 1], prompts[i : i + 1]).item() for i in range(5)]
    expected = [shade / 255 - len(prompt) / 100 for shade, prompt in zip((250, 30, 120, 200, 30), prompts, strict=True)]
    assert together.tolist() == alone == pytest.approx(expected, abs=1e-6)
    clips = shown[:4].view(2, 2, 3, 8, 12)
    assert judge(server, frames="min")(clips, ["", ""]).tolist() == pytest.approx([30 / 255, 120 / 255])


def test_nothing_is_paid_for_twice_and_the_cost_is_counted(serve, naps):
    server = serve(by_shade)
    reward = judge(server, prompt_price=2.0, completion_price=10.0)
    assert reward.cost() == Cost(0, 0, 0, 0.0)
    first = reward(images(100, 100, 50), ["a", "a", "a"])
    assert len(server.requests) == 2 and first[0] == first[1] != first[2]
    assert torch.equal(reward(images(50, 100), ["a", "a"]), first[[2, 0]])
    assert reward.cost() == Cost(2, 200, 14, pytest.approx((200 * 2 + 14 * 10) / 1e6))
    reward(images(50), ["b"])
    assert reward.cost()[:3] == (3, 300, 21)
    assert judge(server).cost() == Cost(0, 0, 0, None)


def test_what_the_judge_remembers_is_bounded(serve, naps, monkeypatch):
    monkeypatch.setattr(judges, "REMEMBERED", 2)
    server = serve(by_shade)
    reward = judge(server)
    for shade in (10, 20, 30, 30, 10):
        assert reward(images(shade), [""]).item() == pytest.approx(shade / 255)
    assert len(server.requests) == 4  # the last one, which was forgotten, again


MALFORMED = [
    "", "6", "null", "[6]", "good", '{"score": 6', '{"score": "6"}', '{"score": 11}', '{"score": -1}',
    '{"score": true}', '{"score": NaN}', '{"score": Infinity}', '{"score": 6, "why": "x"}', '{"grade": 6}',
    'Here: {"score": 6}',
]  # fmt: skip


@pytest.mark.parametrize("answer", MALFORMED)
def test_answers_of_another_form_are_no_scores(answer):
    assert judges.parse(answer) is None


@pytest.mark.parametrize(("answer", "score"), [('{"score": 0}', 0), (' {"score": 7.25}\n', 0.725), ('{"score":10}', 1)])
def test_answers_of_the_form_are_scores(answer, score):
    assert judges.parse(answer) == score


def test_a_malformed_answer_is_asked_for_again(serve, naps):
    server = serve(
        turns(completion("I like it"), completion(None), (200, {"Content-Type": "text/html"}, b"<p>"), grade(3))
    )
    reward = judge(server)
    assert reward(images(9), ["a"]).item() == pytest.approx(0.3)
    assert reward.cost()[:2] == (4, 300)

    server = serve(turns(completion('{"score": 99}')))
    with one_line(FunctionError, "m at http://127.0.0.1", "99", "3 times", "JSON schema"):
        judge(server, retries=2)(images(9), ["a"])
    assert len(server.requests) == 3


def test_too_many_requests_wait_as_the_endpoint_says(serve, naps):
    busy = {"error": {"message": "slow down"}}
    server = serve(turns((429, {"Retry-After": 7}, busy), (503, {}, busy), grade(8)))
    assert judge(server)(images(9), ["a"]).item() == pytest.approx(0.8)
    assert naps[0] == 7 and 0 < naps[1] <= 8 and len(server.requests) == 3

    server = serve(turns((429, {}, busy)))
    with one_line(FunctionError, "answered 429", "slow down"):
        judge(server, retries=2)(images(9), ["a"])
    assert len(server.requests) == 3 and naps[2] < naps[3]  # exponential


def test_an_answer_that_takes_too_long_is_given_up(serve, naps):
    first = threading.Event()

    def answer(request):
        if not first.is_set():
            first.set()
            server.over.wait()
        return grade(4)

    server = serve(answer)
    assert judge(server, seconds=0.3, retries=20)(images(9), ["a"]).item() == pytest.approx(0.4)
    assert len(server.requests) >= 2

    hangs = serve(lambda request: (hangs.over.wait(), grade(1))[1])
    with one_line(FunctionError, "no answer in 2 tries of 0.05 s", "Timeout"):
        judge(hangs, seconds=0.05, retries=1)(images(9), ["a"])


def test_nobody_there(serve, naps):
    server = serve(by_shade)
    server.shutdown()
    server.server_close()
    with one_line(FunctionError, "gave no answer", "Connection"):
        judge(server, retries=1)(images(9), ["a"])


def test_what_the_endpoint_refuses_is_not_asked_again(serve, naps, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    server = serve(turns((400, {}, {"error": {"message": f"no temperature\nfor {KEY}"}})))
    with one_line(RequestError, "answered 400", "no temperature"):
        judge(server, key="MY_KEY")(images(9), ["a"])
    assert len(server.requests) == 1 and not naps
    server = serve(turns((401, {}, {"error": {"message": f"wrong key {KEY[:6]}***"}})))
    with one_line(RequestError, "does not accept (401) the key in MY_KEY") as _:
        judge(server, key="MY_KEY")(images(9), ["a"])
    with one_line(RequestError, "does not accept (401) a call without a key: name its variable"):
        judge(server)(images(9), ["a"])


def test_calls_are_under_way_together_but_no_more_than_asked(serve, naps):
    both, lock, inside, most = threading.Barrier(2), threading.Lock(), [0], [0]

    def answer(request):
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        both.wait(60)  # until there are two
        with lock:
            inside[0] -= 1
        return by_shade(request)

    reward = judge(serve(answer), concurrency=2)
    assert rewards.concurrent(reward)
    with ThreadPoolExecutor(2) as callers:
        calls = [callers.submit(reward, images(*shades), ["", "", "", ""]) for shades in ((1, 2, 3, 4), (5, 6, 7, 8))]
        found = [call.result().tolist() for call in calls]
    assert found == [pytest.approx([n / 255 for n in ns]) for ns in ((1, 2, 3, 4), (5, 6, 7, 8))]
    assert most[0] == 2


def test_after_an_error_no_further_call_begins(serve, naps):
    server = serve(turns((400, {}, {"error": {"message": "no"}})))
    with one_line(RequestError, "answered 400"):
        judge(server, concurrency=1)(images(*range(50)), ["a"] * 50)
    assert len(server.requests) < 50


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"key": KEY}, ["the name of an environment variable", "not repeated"]),
        ({"base_url": f"http://me:{KEY}@host/v1"}, ["base_url holds a user or a password"]),
        ({"base_url": "ftp://host"}, ["'ftp://host'", "http://host"]),
        ({"base_url": "http://host:port/"}, ["'http://host:port/'"]),
        ({"image": "gif"}, ["'gif'", "png, jpeg"]),
        ({"concurrency": 0}, ["concurrency=0"]),
        ({"seconds": 0.0}, ["seconds=0"]),
        ({"prompt_price": 1.0}, ["both prompt_price and completion_price"]),
    ],
)
def test_options_of_the_judge_that_cannot_be(options, parts):
    with one_line(RequestError, *parts):
        JudgeReward(model="m", **options)


def test_what_the_judge_lacks_is_told_at_the_door(monkeypatch):
    for name in ("OPENAI_API_KEY", "MY_KEY"):
        monkeypatch.delenv(name, raising=False)
    with one_line(RequestError, "name its model", "judge:model="):
        rewards.make("judge").check("a")
    with one_line(RequestError, "environment variable OPENAI_API_KEY: set it"):
        rewards.make("judge:model=m").check("a")
    with one_line(RequestError, "environment variable MY_KEY: set it"):
        rewards.make("judge:model=m,base_url=http://host:1/v1,key=MY_KEY").check("a")
    rewards.make("judge:model=m,base_url=http://host:1/v1").check("a")
    reward = rewards.make("judge:model=m,base_url=http://host:1/v1,temperature=none,prompt_price=1,completion_price=2")
    assert (reward.temperature, reward.prompt_price) == (None, 1.0)


def test_the_key_of_openai_goes_to_no_other_address(serve, naps, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(turns(grade(1)))
    judge(server)(images(9), ["a"])
    assert KEY not in str(server.requests[0].headers)


# http
# ----


def read(request):
    """What a server reads: images as floats, prompts."""
    if request.headers["Content-Type"] == "application/json":
        body = json.loads(request.body)

        def pixels(image):
            if isinstance(image, list):
                return np.stack([pixels(frame) for frame in image])
            return np.array(Image.open(io.BytesIO(base64.b64decode(image)))).transpose(2, 0, 1) / 255

        return torch.tensor(np.stack([pixels(image) for image in body["images"]])).float(), body["prompts"]
    assert request.headers["Content-Type"] == "application/x-safetensors"
    length = int.from_bytes(request.body[:8], "little")
    prompts = json.loads(json.loads(request.body[8 : 8 + length])["__metadata__"]["prompts"])
    return load(request.body)["images"], prompts


def brightness(request):
    found, prompts = read(request)
    scores = found.flatten(1).mean(1) + torch.tensor([len(prompt) for prompt in prompts])
    return 200, {}, {"scores": scores.tolist()}


def noise(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("format", "exact"), [("png", 1 / 510), ("safetensors", 0)])
@pytest.mark.parametrize("shape", [(3, 3, 16, 24), (2, 4, 3, 9, 7)])
def test_images_and_clips_arrive_as_they_are(serve, format, exact, shape):
    server = serve(brightness)
    shown, prompts = noise(*shape), ["a", "“b”\n", ""][: shape[0]]
    reward = rewards.make(f"http:url={server.url}/score,format={format}")
    scores = reward(shown, prompts)
    arrived, named = read(server.requests[0])
    assert named == prompts and arrived.shape == shape
    assert (arrived - shown).abs().max() <= exact + 1e-7
    expected = arrived.flatten(1).mean(1) + torch.tensor([len(prompt) for prompt in prompts])
    torch.testing.assert_close(scores, expected)
    alone = torch.cat([reward(shown[i : i + 1], prompts[i : i + 1]) for i in range(len(prompts))])
    torch.testing.assert_close(scores, alone)


def error(status, message="no"):
    return status, {}, {"error": {"message": message}}


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_may_pass_is_called_again_later(serve, status):
    server = serve(turns(error(status, "busy\nnow")))
    with one_line(RewardUnavailable, f"answered {status} (busy now)"):
        HttpReward(server.url)(images(1), ["a"])


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        (error(400, "the prompt quotes no text"), ["answered 400", "the prompt quotes no text"]),
        ((404, {}, b"<html>"), ["answered 404 (Not Found)"]),
        ((302, {"Location": "http://127.0.0.1:9/"}, b""), ["answered 302"]),
        (error(403, f"not with {KEY}"), ["answered 403 (not with ***)"]),
    ],
)
def test_what_the_server_refuses(serve, monkeypatch, answer, parts):
    monkeypatch.setenv("MY_KEY", KEY)
    server = serve(turns(answer))
    with one_line(RequestError, *parts):
        HttpReward(f"{server.url}/score?x=1", key="MY_KEY")(images(1), ["a"])
    assert [one.headers["Authorization"] for one in server.requests] == [f"Bearer {KEY}"]


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"<html>", b"[1.0]", {"scores": [1.0]}, {"scores": [1.0, None]}, {"scores": [1.0, "2"]},
        {"score": [1, 2]}, {"scores": [1.0, True]}, {"scores": [1.0, float("nan")]}, {"scores": {"a": 1, "b": 2}},
        {"scores": [1, 10**400]},
        {"scores": [1, 2], "rest": "x" * 5000},
    ],
)  # fmt: skip
def test_answers_that_are_no_scores(serve, answer):
    server = serve(turns((200, {}, answer)))
    with one_line(FunctionError, "the reward http", server.url):
        HttpReward(server.url)(images(1, 2), ["a", "a"])


def test_no_connection_and_no_answer(serve):
    hangs = serve(lambda request: (hangs.over.wait(), brightness(request))[1])
    with one_line(RewardUnavailable, "did not answer within 0.05 s", "timed out"):
        HttpReward(hangs.url, seconds=0.05)(images(1), ["a"])
    server = serve(brightness)
    server.shutdown()
    server.server_close()
    with one_line(RewardUnavailable, "did not answer", "refused"):
        HttpReward(server.url)(images(1), ["a"])


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"url": "file:///etc/hosts"}, ["'file:///etc/hosts'"]),
        ({"url": f"http://{KEY}@host/"}, ["url holds a user or a password"]),
        ({"url": "http://a b/"}, ["'http://a b/'"]),
        ({"url": "http://a/", "format": "pickle"}, ["'pickle'", "png, safetensors"]),
        ({"url": "http://a/", "key": KEY}, ["the name of an environment variable"]),
        ({"url": "http://a/", "seconds": 0.0}, ["seconds=0"]),
    ],
)
def test_options_of_http_that_cannot_be(options, parts):
    with one_line(RequestError, *parts):
        HttpReward(**options)


def test_what_http_lacks_is_told_at_the_door(monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with one_line(RequestError, "name its server", "http:url=http://host:8000/score"):
        rewards.make("http").check("a")
    with one_line(RequestError, "MY_KEY: set it first"):
        rewards.make("http:url=http://a/,key=MY_KEY").check("a")


def test_an_engine_calls_again_and_judges_with_others(serve):
    server = serve(turns(error(503), error(429), None))
    refusals = server.answer
    server.answer = lambda request: refusals(request) or brightness(request)
    with engine() as made:
        reward = f"http:url={server.url}/score,format=safetensors"
        result = made.generate(bon(reward=reward))
        assert len(server.requests) > 2
        assert result.reward == pytest.approx(result.pixels.mean().item() + 1, abs=1 / 255)
        both = made.generate(bon(reward=f"{reward} + 0.1*jpeg"))
    assert both.reward == pytest.approx(both.terms["http"] + 0.1 * both.terms["jpeg"])
