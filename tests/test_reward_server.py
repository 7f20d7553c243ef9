"""`rollflow reward-server` against the real client, the reward `http`, and against callers that send anything."""

import asyncio
import base64
import http.client
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest
import torch
from PIL import Image
from safetensors.torch import save
from tiny import PATIENCE, engine, rbf

from rollflow import RequestError, RewardUnavailable, rewards
from rollflow.rewards.http import HttpReward, written

pytest.importorskip("fastapi")
from rollflow.cli import main
from rollflow.cli.serving import listening, quiet
from rollflow.serve import reward_bodies
from rollflow.serve.keys import Keys
from rollflow.serve.reward_bodies import Limits
from rollflow.serve.reward_server import READERS, RewardServer, RewardSettings, create_app

pytestmark = pytest.mark.usefixtures("one_thread")


class Gate:
    """A reward, brightness, that keeps its calls, and waits before it answers until a test lets it."""

    name = "gate"

    def __init__(self):
        self.calls, self.open, self.began = [], threading.Event(), threading.Event()
        self.open.set()

    def check(self, prompt):
        if "forbidden" in prompt:
            raise RequestError("this prompt cannot be judged")

    def __call__(self, images, prompts):
        self.calls.append((len(images), [*prompts]))
        self.began.set()
        assert self.open.wait(PATIENCE)
        if "fails" in prompts:
            raise RuntimeError("broken\nby a prompt")
        if "later" in prompts:
            raise RewardUnavailable("its own service is busy")
        scores = images.mean((*range(1, images.ndim),))
        return torch.where(torch.tensor([prompt == "nan" for prompt in prompts]), torch.nan, scores)


class Serving:
    """A server on a thread."""

    def __init__(self, named, **settings):
        self.server = RewardServer(named, RewardSettings(**settings))
        self.listening = listening("127.0.0.1", 0)
        at = self.listening.__enter__()
        self.port = at.getsockname()[1]
        self.http = quiet(create_app(self.server))
        self.thread = threading.Thread(target=asyncio.run, args=(self.run(at),), daemon=True)
        self.thread.start()

    async def run(self, at):
        self.loop = asyncio.get_running_loop()
        self.server.start()
        await self.http.serve([at])
        await self.server.close()

    def close(self):
        self.http.should_exit = True
        self.thread.join(PATIENCE)
        self.listening.__exit__(None, None, None)

    def url(self, name=""):
        return f"http://127.0.0.1:{self.port}/score{name and '/' + name}"

    def ask(self, path="/score", body=b"", kind="application/json", method="POST", **headers):
        """Status, headers and the JSON of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, body, {"Content-Type": kind, **headers})
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, answer.headers, json.loads(text) if path != "/metrics" else text.decode()
        finally:
            connection.close()


@pytest.fixture
def serve():
    """Starts servers, which end with the test."""
    servers = []

    def start(reward=None, **settings):
        named = reward if isinstance(reward, dict) else {"gate": reward or Gate()}
        servers.append(Serving(named, **settings))
        return servers[-1]

    yield start
    for server in servers:
        for scorer in server.server.scorers.values():
            getattr(scorer.reward, "open", threading.Event()).set()
        server.close()


def images(*shades, size=(8, 12)):
    return torch.stack([torch.full((3, *size), shade / 255) for shade in shades])


def call(*prompts, size=(8, 12)):
    return written(images(*[100] * len(prompts), size=size), prompts, "png")[1]


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


# With the reward `http`
# ----------------------


@pytest.mark.parametrize("format", ["png", "safetensors"])
def test_a_search_over_http_finds_what_one_beside_it_does(serve, format):
    server = serve({"jpeg": rewards.make("jpeg")})
    size = {"height": 64, "width": 64}
    with engine() as own:
        there = own.generate(rbf(reward=f"http:url={server.url('jpeg')},format={format}", **size))
        here = own.generate(rbf(reward="jpeg", **size))
    assert there.reward == here.reward
    assert [record.reward for record in there.history] == [record.reward for record in here.history]
    assert len({record.reward for record in here.history}) > 1


def test_scores_keep_their_order_and_their_digits(serve):
    server, shades = serve(), torch.rand(20, 3, 4, 6)
    client = HttpReward(server.url(), format="safetensors")
    assert torch.equal(client(shades, ["a"] * 20), shades.mean((1, 2, 3)))


@pytest.mark.parametrize("format", ["png", "safetensors"])
def test_clips(serve, format):
    seen = []

    def last(clips, prompts):
        seen.append(clips.shape)
        return clips[:, -1].mean((1, 2, 3))

    server = serve({"last": rewards.make(last)})
    clips = torch.stack([images(0, 51), images(0, 204)])
    scores = HttpReward(server.url(), format=format)(clips, ["a", "b"])
    assert torch.allclose(scores, torch.tensor([0.2, 0.8])) and seen == [(2, 2, 3, 8, 12)]


@pytest.mark.parametrize(
    ("prompt", "kind", "part"),
    [
        ("forbidden", RequestError, "answered 422 (this prompt cannot be judged)"),
        ("nan", RequestError, "answered 422 (the reward gate gave nan for images[0]: a score must be finite)"),
        ("fails", RewardUnavailable, "answered 500 (the reward gate raised RuntimeError: broken by a prompt)"),
        ("later", RewardUnavailable, "answered 503 (its own service is busy)"),
    ],
)
def test_what_the_client_is_told(serve, prompt, kind, part):
    with pytest.raises(kind) as caught:
        HttpReward(serve().url())(images(1), [prompt])
    assert part in str(caught.value)


# Calls that are judged together
# ------------------------------


@contextmanager
def held(server, gate, *bodies):
    """Answers of calls that come while the reward is busy, in their order; inside of the block it still is."""
    gate.open.clear()
    with ThreadPoolExecutor(len(bodies) + 1) as pool:
        first = pool.submit(server.ask, body=call("first"))
        assert gate.began.wait(PATIENCE)
        answers, scorer, rows = [], server.server.scorers["gate"], 0
        for body in bodies:
            answers.append(pool.submit(server.ask, body=body))
            rows += len(json.loads(body)["prompts"])
            until(lambda rows=rows: scorer.waiting == rows)
        try:
            yield answers
        finally:
            gate.open.set()
        assert first.result()[0] == 200


def test_calls_that_wait_are_judged_together_by_size(serve):
    gate = Gate()
    server = serve(gate, batch=5)
    bodies = call("a", "b"), call("c", size=(4, 4)), call("d"), call("e", "f", "g"), call("h")
    with held(server, gate, *bodies) as answers:
        pass
    assert [len(answer.result()[2]["scores"]) for answer in answers] == [2, 1, 1, 3, 1]
    assert gate.calls == [(1, ["first"]), (3, [*"abd"]), (1, ["c"]), (4, [*"efgh"])]


def test_an_error_harms_its_own_caller_alone(serve):
    gate = Gate()
    server = serve(gate)
    with held(server, gate, call("a"), call("b", "fails"), call("nan"), call("c", "d")) as answers:
        pass
    found = [answer.result() for answer in answers]
    assert [status for status, _, _ in found] == [200, 500, 422, 200]
    assert found[3][2]["scores"] == pytest.approx([100 / 255] * 2)
    assert gate.calls[1] == (6, ["a", "b", "fails", "nan", "c", "d"])


def test_an_error_that_may_pass_is_nobody_s_own(serve):
    gate = Gate()
    server = serve(gate)
    with held(server, gate, call("a"), call("later"), call("b")) as answers:
        pass
    assert [answer.result()[0] for answer in answers] == [503] * 3 and len(gate.calls) == 2


def test_who_went_meanwhile_is_not_judged_by_himself(serve):
    class Slow(Gate):
        def __call__(self, images, prompts):
            if "fails" in prompts and len(prompts) > 1:
                self.together.set()
                assert self.on.wait(PATIENCE)
            return super().__call__(images, prompts)

    gate = Slow()
    gate.together, gate.on = threading.Event(), threading.Event()
    server = serve(gate)
    with held(server, gate, call("a"), call("fails")) as answers:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("POST", "/score", call("vanishes"), {"Content-Type": "application/json"})
        until(lambda: server.server.scorers["gate"].waiting == 3)
        gate.open.set()
        assert gate.together.wait(PATIENCE)
        connection.close()
        until(lambda: server.server._open == 2)
        gate.on.set()
    assert [answer.result()[0] for answer in answers] == [200, 500]
    assert [prompts for _, prompts in gate.calls[2:]] == [["a"], ["fails"]]


def test_memory_that_runs_out_is_a_limit_of_one_size(serve):
    class Small(Gate):
        def __call__(self, images, prompts):
            if images.numel() > 2 * 3 * 64 * 64:
                raise torch.OutOfMemoryError
            return super().__call__(images, prompts)

    gate = Small()
    server = serve(gate)
    for size in ((64, 64), (8, 8), (64, 64)):
        assert server.ask(body=call(*"abcd", size=size))[0] == 200
    assert [rows for rows, _ in gate.calls] == [2, 2, 4, 2, 2]


def test_a_call_of_more_images_than_a_batch_is_cut(serve):
    gate = Gate()
    server = serve(gate, batch=2)
    assert len(server.ask(body=call(*"abcde"))[2]["scores"]) == 5
    assert [rows for rows, _ in gate.calls] == [2, 2, 1]


def test_a_caller_that_is_gone_is_not_judged(serve):
    gate = Gate()
    server = serve(gate)
    with held(server, gate, call("a")) as answers:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("POST", "/score", call("vanishes"), {"Content-Type": "application/json"})
        scorer = server.server.scorers["gate"]
        until(lambda: scorer.waiting == 2)
        connection.close()
        until(lambda: scorer.waiting == 1)
    assert answers[0].result()[0] == 200
    assert [prompts for _, prompts in gate.calls] == [["first"], ["a"]]


def test_a_full_queue_and_a_server_that_drains(serve):
    gate = Gate()
    server = serve(gate, queued=2, stuck=0.0)
    assert server.ask("/ready", method="GET")[0] == 200
    with held(server, gate, call("a")) as answers:
        status, headers, found = server.ask(body=call("b"))
        assert status == 503 and int(headers["Retry-After"]) >= 1 and "2 calls wait" in found["error"]["message"]
        assert server.ask("/health", method="GET")[0] == 503  # a call that runs for longer than it may
        server.server.draining = True
        status, headers, found = server.ask(body=call("c"))
        assert status == 503 and int(headers["Retry-After"]) >= 1 and "about to end" in found["error"]["message"]
        assert server.ask("/ready", method="GET")[0] == 503
    assert answers[0].result()[0] == 200  # what was there before is answered


def test_calls_that_would_fill_the_memory_come_again(serve, monkeypatch):
    unpacked, picture = [], reward_bodies._picture
    monkeypatch.setattr(reward_bodies, "_picture", lambda *of: (unpacked.append(of), picture(*of))[1])
    gate = Gate()
    server = serve(gate, memory=5 * reward_bodies.PIXEL * 64 * 64 // 2)
    assert len(server.ask(body=call(*"abcd", size=(64, 64)))[2]["scores"]) == 4  # the only one may be larger
    gate.began.clear()
    with held(server, gate, call("a", size=(64, 64)), call("b", size=(64, 64))) as answers:
        status, headers, found = server.ask(body=call("c", size=(64, 64)))
        assert status == 503 and int(headers["Retry-After"]) >= 1 and "bytes wait" in found["error"]["message"]
        assert len(unpacked) == 4 + 3
    assert [answer.result()[0] for answer in answers] == [200, 200]
    assert server.ask(body=call("c", size=(64, 64)))[0] == 200 and server.server._held == 0


def test_what_is_left_at_the_end_comes_again(serve):
    gate = Gate()
    server, stop = serve(gate), threading.Event()
    readers = server.server._readers
    busy = [readers.submit(stop.wait, PATIENCE) for _ in range(READERS)]  # bodies of others
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.ask, body=call("a"))
        until(lambda: readers._work_queue.qsize() == 1)
        asyncio.run_coroutine_threadsafe(server.server.close(), server.loop).result(PATIENCE)
        status, _, found = answer.result()
        stop.set()
    assert status == 503 and "the server ended" in found["error"]["message"] and len(busy) == READERS
    assert gate.calls == [] and server.server._held == 0


# What anybody may send
# ---------------------


def png(mode="RGB", size=(12, 8)):
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def jpeg():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


def texts(prompts, images):
    return json.dumps({"prompts": prompts, "images": images}).encode()


def safe(images, prompts='["a"]', name="images"):
    return save({name: images}, None if prompts is None else {"prompts": prompts})


def bomb(side):
    """A file of a few bytes whose head promises a large image."""
    head = b"IHDR" + struct.pack(">II5B", side, side, 8, 2, 0, 0, 0)
    parts = [(13, head), (0, b"IDAT"), (0, b"IEND")]
    chunks = [struct.pack(">I", length) + part + struct.pack(">I", zlib.crc32(part)) for length, part in parts]
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


TORN = base64.b64encode(base64.b64decode(png(size=(64, 64)))[:60]).decode()
TENSORS = "application/x-safetensors"
GARBAGE = [
    ("application/json", b"", 400, "no JSON"),
    ("application/json", b"\xff\xfe\x00", 400, "no JSON"),
    ("application/json", b"[" * 10_000, 400, "no JSON"),
    ("application/json", b"[" + b"[]," * 60_000 + b"[]]", 413, "lists, objects and commas"),
    ("application/json", texts(["a"], [["x"] * 20_001]), 413, "20001 frames: at most 20000"),
    ("application/json", b"[1]", 400, "the body is [1]"),
    ("application/json", b'{"prompts": ["a"]}', 400, "the body is"),
    ("application/json", texts([], []), 400, "at least one"),
    ("application/json", texts("ab", [png(), png()]), 400, "a list of texts"),
    ("application/json", texts(["a", 1], [png(), png()]), 400, "a list of texts"),
    ("application/json", texts(["\ud800"], [png()]), 400, "half of a character"),
    ("application/json", texts(["a"], [png(), png()]), 400, "one for each"),
    ("application/json", texts(["a"], [{"file": "/etc/passwd"}]), 400, "base64 text"),
    ("application/json", texts(["a"], ["%%%"]), 400, "no base64"),
    ("application/json", texts(["a"], ["aGVsbG8="]), 400, "no PNG"),
    ("application/json", texts(["a"], [jpeg()]), 400, "no PNG"),
    ("application/json", texts(["a"], [TORN]), 400, "no PNG"),
    ("application/json", texts(["a"], [bomb(2000)]), 413, "pixels"),
    ("application/json", texts(["a"], [bomb(60_000)]), 413, "pixels"),
    ("application/json", texts(["a"], [png("I;16")]), 422, "8 bits"),
    ("application/json", texts(["a"], [[]]), 400, "empty list"),
    ("application/json", texts(["a"], [[png(), png(size=(8, 8))]]), 422, "of one"),
    ("application/json", texts(["a", "b"], [png(), png(size=(8, 8))]), 422, "of one size"),
    ("application/json", texts(["a", "b"], [png(), [png()]]), 422, "of one size"),
    ("application/json", texts(["a" * 101], [png()]), 413, "101 characters"),
    ("application/json", texts(["a"] * 9, [png()] * 9), 413, "9 prompts"),
    ("application/json", texts(["a"], [png(size=(400, 300))]), 413, "pixels"),
    ("application/json", b"x" * 300_000, 413, "bytes"),
    ("text/plain", texts(["a"], [png()]), 415, "text/plain"),
    ("application/x-pickle", b"\x80\x04N.", 415, "Content-Type"),
    (TENSORS, b"", 400, "no safetensors"),
    (TENSORS, b"\xff" * 64, 400, "no safetensors"),
    (TENSORS, safe(torch.zeros(1, 3, 4, 4))[:-9], 400, "no safetensors"),
    (TENSORS, safe(torch.zeros(1, 3, 4, 4), None), 400, "metadata"),
    (TENSORS, safe(torch.zeros(1, 3, 4, 4), "a"), 400, "no JSON"),
    (TENSORS, safe(torch.zeros(1, 3, 4, 4), name="image"), 400, "one tensor"),
    (TENSORS, safe(torch.zeros(2, 3, 4, 4)), 400, "1 prompts and 2 images"),
    (TENSORS, safe(torch.zeros(1, 3, 4, 4, dtype=torch.uint8)), 422, "floating"),
    (TENSORS, safe(torch.zeros(1, 4, 4, 4)), 422, "[row, 3, height, width]"),
    (TENSORS, safe(torch.zeros(1, 3, 0, 4)), 422, "[row, 3, height, width]"),
    (TENSORS, safe(torch.full((1, 3, 4, 4), 1.5)), 422, "outside of [0, 1]"),
    (TENSORS, safe(torch.full((1, 3, 4, 4), torch.nan)), 422, "outside of [0, 1]"),
]


def test_garbage_gets_a_clean_error_and_harms_nobody(serve):
    gate = Gate()
    server = serve(gate, limits=Limits(body=200_000, rows=8, prompt=100, pixels=100_000, frames=20_000))
    for kind, body, status, part in GARBAGE:
        found, _, answer = server.ask(body=body, kind=kind)
        message = answer["error"]["message"]
        assert (found, [*answer]) == (status, ["error"]) and part in message, (body[:50], found, message)
        assert "\n" not in message and "Traceback" not in message and len(message) <= 500
    assert gate.calls == []
    assert server.ask(body=call("a"))[0] == 200
    text = server.ask("/metrics", method="GET")[2]
    assert 'rollflow_reward_server_requests_total{reward="gate",status="200"} 1.0' in text
    assert 'rollflow_reward_server_images_total{reward="gate"} 1.0' in text


def test_addresses_and_methods(serve):
    server = serve({"gate": Gate(), "other": Gate()})
    status, _, found = server.ask("/score/vqa", call("a"))
    assert status == 404 and "there is no reward 'vqa' here: it has gate, other" in found["error"]["message"]
    assert server.ask("/nothing", call("a"))[0] == 404
    assert server.ask("/score", method="GET")[0] == 405
    assert server.ask("/score/other", call("a"))[0] == 200
    status, _, found = server.ask("/health", method="GET")
    assert (status, found["status"], found["rewards"]) == (200, "ok", ["gate", "other"])
    assert "/score/{name}" in server.ask("/openapi.json", method="GET")[2]["paths"]


def test_a_body_that_takes_its_time(serve):
    server = serve(upload=0.2, patience=PATIENCE)
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as client:
        client.sendall(b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
        client.settimeout(0.01)
        answer, end = b"", time.monotonic() + PATIENCE
        while not answer and time.monotonic() < end:
            client.sendall(b"x")
            with suppress(TimeoutError):
                answer = client.recv(1000)
    assert b"408" in answer.partition(b"\r\n")[0]


def test_names_of_others_lead_nowhere(serve, tmp_path):
    (tmp_path / "keys").write_text("one-key-of-some-length\n")
    for path, method in (("/score", "POST"), ("/health", "GET")):
        status, _, found = serve().ask(path, call("a"), method=method, Host="evil.example:9000")
        assert status == 421 and "Host 'evil.example:9000'" in found["error"]["message"]
    for host in ("localhost", "[::1]:9000", "127.0.0.1:80"):
        assert serve().ask(body=call("a"), Host=host)[0] == 200
    guarded = serve(keys=Keys(tmp_path / "keys"))
    assert guarded.ask(body=call("a"), Host="a.example", Authorization="Bearer one-key-of-some-length")[0] == 200


def test_a_stranger_s_body_is_not_read(serve, tmp_path):
    (tmp_path / "keys").write_text("one-key-of-some-length\n")
    server = serve(keys=Keys(tmp_path / "keys"))
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as client:
        client.sendall(b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 60000000\r\n\r\n")
        with suppress(OSError):  # it hangs up
            for _ in range(600):
                client.sendall(bytes(100_000))
            pytest.fail("all of it was taken")


def test_keys(serve, monkeypatch, tmp_path):
    (tmp_path / "keys").write_text("one-key-of-some-length\nsomebody another-key-of-some-length\n")
    server = serve(keys=Keys(tmp_path / "keys"))
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic one-key-of-some-length"}):
        status, headers, found = server.ask(body=call("a"), **header)
        assert (status, headers["WWW-Authenticate"]) == (401, "Bearer") and "takes a key" in found["error"]["message"]
    monkeypatch.setenv("MY_KEY", "another-key-of-some-length")
    assert len(HttpReward(server.url(), key="MY_KEY")(images(1), ["a"])) == 1
    assert server.ask("/health", method="GET")[0] == 200


# The command
# -----------


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "name at least one reward"),
        (["jpeg", "--host", "0.0.0.0"], "without API keys"),
        (["jpeg", "--host", "example.org"], "without API keys"),
        (["jpeg", "--api-key-file", "/nowhere"], "'/nowhere' cannot be read"),
        (["no-such-reward"], "no-such-reward"),
        (["jpeg", "jpeg"], "two rewards are called 'jpeg'"),
        (["z(jpeg) + z(count)"], "serve its terms"),
        (["jpeg", "--batch", "0"], "--batch 0"),
    ],
)
def test_what_the_command_refuses(capsys, arguments, part):
    assert main(["reward-server", *arguments, "--port", "0"]) == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1


def test_the_command_serves_and_drains(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import pathlib, time\n"
        "def slow(images, prompts):\n"
        "    pathlib.Path('began').touch()\n"
        "    while not pathlib.Path('go').exists(): time.sleep(0.01)\n"
        "    return images.mean((1, 2, 3))\n"
        "def stuck(images, prompts):\n"
        "    pathlib.Path('stuck').touch()\n"
        "    while True: time.sleep(0.01)\n"
    )
    command = [
        sys.executable,
        "-m",
        "rollflow",
        "reward-server",
        "mine.py:slow",
        "small=jpeg:quality=50",
        "mine.py:stuck",
        "--port",
        "0",
    ]
    process = subprocess.Popen(
        [*command, "--device", "cpu"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        slow, small, stuck = (process.stdout.readline().split()[-1] for _ in range(3))
        assert slow.endswith("/score/slow") and small.endswith("/score/small")
        assert torch.equal(HttpReward(small)(images(7), ["a"]), rewards.make("jpeg:quality=50")(images(7), ["a"]))
        with ThreadPoolExecutor(2) as pool:
            answer, lost = (pool.submit(HttpReward(one), images(51), ["a"]) for one in (slow, stuck))
            until((tmp_path / "began").exists)
            until((tmp_path / "stuck").exists)
            process.send_signal(signal.SIGTERM)

            def refused():
                try:
                    HttpReward(small)(images(1), ["a"])
                except RewardUnavailable as error:
                    return "about to end" in str(error)

            until(refused)
            (tmp_path / "go").touch()
            assert answer.result() == pytest.approx([0.2])
            process.send_signal(signal.SIGTERM)  # the second: what still runs is not waited for
            with pytest.raises(RewardUnavailable, match="the server ended"):
                lost.result()
        assert process.wait(PATIENCE) == 0 and process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
