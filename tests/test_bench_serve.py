"""`rollflow bench serve`: the loops on a virtual clock, and the command against a server that searches nothing."""

import asyncio
import json
import os
import selectors
import statistics
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from stand_in_server import StandIn, running

from rollflow.bench.__main__ import main
from rollflow.bench.http_loads import (
    Answer,
    Sent,
    Unaccounted,
    answer_of,
    check_accounts,
    closed_loop,
    open_loop,
    rate,
)
from rollflow.bench.loads import poisson
from rollflow.bench.serve import Serve, Turn, latencies
from rollflow.bench.service import Service, served
from rollflow.cli import workers as cli_workers
from rollflow.cli.options import ModelOptions
from rollflow.engine import Engine
from rollflow.errors import RequestError

SERVED = Answer("served")
SMALL = ["--requests", "20", "--concurrency", "4", "--loads", "0.5", "--rounds", "1", "--workers", "1"]


class Jumping(selectors.DefaultSelector):
    """Instead of waiting, time passes."""

    time = 0.0

    def select(self, timeout=None):
        assert timeout is not None, "everything waits, and nothing is to come"
        self.time += timeout
        return super().select(0)


def virtual(work):
    """The result of a coroutine, on an event loop whose clock jumps from event to event; and what the clock says."""
    selector = Jumping()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.time
    try:
        return loop.run_until_complete(work), selector.time
    finally:
        loop.close()


class Line:
    """Serves one request after another, `seconds` each."""

    def __init__(self, seconds):
        self.seconds, self.free, self.inside, self.most, self.seen = seconds, 0.0, 0, 0, []

    async def __call__(self, i):
        now = asyncio.get_running_loop().time()
        self.seen.append(i)
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.free = max(now, self.free) + self.seconds
        await asyncio.sleep(self.free - now)
        self.inside -= 1
        return SERVED


def test_latencies_count_from_the_schedule():
    sent, _ = virtual(open_loop(Line(2.0), np.array([1.0, 1.5, 7.0])))
    assert [one.due for one in sent] == [1.0, 1.5, 7.0] and [one.sent for one in sent] == [1.0, 1.5, 7.0]
    assert [one.latency for one in sent] == pytest.approx([2.0, 3.5, 2.0])
    late = Sent(due=1.0, sent=4.0, ended=5.0, answer=SERVED)  # of a client that was kept from sending it
    assert late.latency == 4.0


def test_an_open_loop_does_not_wait_for_answers():
    line = Line(10.0)
    sent, _ = virtual(open_loop(line, np.arange(20.0)))
    assert line.most == 19 and [one.sent for one in sent] == [*np.arange(20.0)]
    assert [one.latency for one in sent] == pytest.approx([10.0 * (i + 1) - i for i in range(20)])


def test_the_same_seed_gives_the_same_load():
    first, second = (virtual(open_loop(Line(0.5), poisson(1.0, 50, [3, 1])))[0] for _ in range(2))
    assert first == second
    other, _ = virtual(open_loop(Line(0.5), poisson(1.0, 50, [3, 2])))
    assert [one.due for one in other] != [one.due for one in first]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_closed_loop_keeps_as_many_in_flight(concurrency):
    line = Line(2.0)
    sent, now = virtual(closed_loop(line, 21, concurrency, 1e9, first=5))
    assert line.most == concurrency and len(sent) == 21 and now == pytest.approx(42.0)
    assert line.seen == [*range(5, 26)]
    assert rate([one.ended for one in sent], concurrency) == pytest.approx(0.5)
    few, _ = virtual(closed_loop(Line(2.0), 1000, concurrency, 10.0))
    assert len(few) == 5 + concurrency - 1


def test_percentiles_and_goodput_of_known_latencies():
    """100 requests, one a second, of 0.01 to 1.00 seconds, between five at each end that take a year."""
    order = np.random.default_rng(0).permutation(np.arange(1, 101)) / 100
    taken = [1e7] * 5 + order.tolist() + [1e7] * 5
    requests = [Sent(float(i), i + 0.001, i + seconds, SERVED) for i, seconds in enumerate(taken)]
    row = latencies(requests, 5, 0.75)
    assert [row[f"seconds_p{p}"] for p in (50, 95, 99)] == pytest.approx([0.50, 0.95, 0.99])
    assert row["good"] == 0.75 and row["goodput_per_second"] == pytest.approx(0.75)
    assert row["arrivals_per_second"] == pytest.approx(1.0) and row["measured"] == row["served"] == 100
    assert row["seconds_mean"] == pytest.approx(statistics.fmean(order)) and row["late_seconds"] == pytest.approx(0.001)
    for one in requests[5:25]:
        one.answer = Answer("refused")
    again = latencies(requests, 5, 10.0)
    assert again["refused"] == 20 and again["served"] == 80 and again["good"] == 0.8
    assert again["goodput_per_second"] == pytest.approx(0.8)
    with pytest.raises(RequestError, match="too few to measure"):
        latencies(requests[:11], 5, 1.0)


def test_of_every_answer_it_is_known_what_it_is():
    image = json.dumps({"data": [{"b64_json": "abcd"}]}).encode()
    assert answer_of(200, {}, image).fate == "served"
    assert answer_of(429, {"Retry-After": "2"}, b"").fate == answer_of(503, {"retry-after": "2"}, b"").fate == "refused"
    for status, content in ((200, b'{"data": []}'), (200, b"not JSON"), (200, b"[]"), (200, b'{"data": [{}]}')):
        assert answer_of(status, {}, content).fate == "lost"
    for status in (400, 429, 500, 503):
        assert answer_of(status, {}, image).fate == "lost"
    requests = [Sent(0.0, answer=SERVED), Sent(0.0), Sent(0.0, answer=Answer("refused"))]
    with pytest.raises(Unaccounted, match=r"1 of 3 requests are unaccounted for \(here\), such as: no answer came"):
        check_accounts(requests, "here")
    check_accounts([requests[0], requests[2]], "here")


def test_the_command_against_a_server_that_runs(tmp_path, capsys):
    file, plot = tmp_path / "serve.json", tmp_path / "serve.png"
    server = StandIn(0.02)
    with running(server) as url:
        assert main(["serve", "--url", url, *SMALL, "--json", str(file), "--plot", str(plot)]) == 0
    report = json.loads(file.read_text())
    assert {"date", "commit", "device"} <= report["environment"].keys() and report["expected"]
    full, load = report["rows"]
    assert full["contender"] == "http" and full["nfe_per_second"] == pytest.approx(100 * full["requests_per_second"])
    assert 0 < full["requests_per_second"] <= 4 / 0.02 and server.most >= 4
    assert load["capacity"] == full["requests_per_second"] and load["measured"] == load["served"] == 20
    assert load["seconds_p50"] >= 0.02 and load["seconds_p99"] is None and load["good"] == 1.0
    assert server.images == 100 + (20 + 8) + (20 + 2 * 3)
    assert "0.5" in capsys.readouterr().out and plot.stat().st_size > 5_000


def test_servers_are_compared_with_an_engine_in_turns(monkeypatch):
    """What the engine would do is given: 100 requests a second; the server is the stand-in."""
    order, started = [], []

    class Known(Engine):
        lanes = SimpleNamespace(count=2)

        def stats(self):
            return SimpleNamespace(buckets={(64, 64): (4, 16)})

        def __init__(self):
            pass

        def warm_up(self):
            order.append("warm")

        def generate(self, requests):
            assert {request.nfe for request in requests} == {20}

        def __exit__(self, *_):
            pass

    @contextmanager
    def stand_in(url, arguments):
        started.append(arguments)
        with running(StandIn(0.001)) as found:
            yield Service(found, os.getpid())

    def alone(self, engine, turn):
        order.append(turn)
        return Turn(100.0, 1e-6, 0.0)

    monkeypatch.setattr(Engine, "from_pretrained", lambda model: Known())
    monkeypatch.setattr(Serve, "_alone", alone)
    monkeypatch.setattr("rollflow.bench.serve.served", stand_in)
    rows = Serve(workers=(1, 2), rounds=2, requests=12, concurrency=4, loads=()).measure()
    assert order == ["warm", 0, 1, 0, 1]
    assert [one[one.index("--workers") + 1] for one in started] == ["1", "2"]
    assert started[0][-5:] == ["--lanes", "2", "--buckets", "4", "16"] and "--lanes" not in started[1]
    for workers in (1, 2):
        own = [row for row in rows if row["workers"] == workers]
        assert [row["contender"] for row in own] == ["engine", "http", "http", "engine", "http over engine"]
        assert own[0]["nfe_per_second"] == 100 * 100.0
        shares = [row["requests_per_second"] / 100.0 for row in own if row["contender"] == "http"]
        assert own[-1]["ratios"] == shares and own[-1]["ratio"] == statistics.median(shares)
        spent = [row["cpu_seconds_per_nfe"] for row in own if row["contender"] == "http"]
        assert 0 < own[-1]["cpu_ratio"] == 1e-6 / statistics.median(spent) < 1
        assert own[-1]["met"] == (own[-1]["ratio"] >= 0.95)


def test_a_lost_request_fails_the_command(tmp_path, capsys):
    file = tmp_path / "serve.json"
    with running(StandIn(0.001, drops=120)) as url:
        assert main(["serve", "--url", url, *SMALL, "--json", str(file)]) != 0
    told = capsys.readouterr().err
    assert "1 of 28 requests are unaccounted for" in told and "without an image" in told
    assert file.read_text() == ""


def test_refused_requests_are_no_lost_ones(tmp_path):
    file = tmp_path / "serve.json"
    with running(StandIn(0.001, refuses=10)) as url:
        assert main(["serve", "--url", url, *SMALL, "--json", str(file)]) == 0
    load = json.loads(file.read_text())["rows"][-1]
    assert 1 <= load["refused"] <= 3 and load["served"] + load["refused"] == load["measured"] == 20


def test_servers_that_do_not_start_are_named(capsys):
    assert main(["serve", "--url", "http://127.0.0.1:9"]) == 2
    assert "no server answers at 'http://127.0.0.1:9'" in capsys.readouterr().err
    bad = [sys.executable, "-c", "import sys; sys.exit('this model is none')"]
    with pytest.raises(RequestError, match="the server ended: this model is none"), served(None, [], bad):
        pytest.fail("it did not start")


def test_servers_take_the_lanes_that_they_are_given():
    given = cli_workers._engine(ModelOptions(), 2, None, 4, 2)
    assert (given["lanes"], given["threads"]) == (2, 2)
    usual = cli_workers._engine(ModelOptions(), 2, None, 4, None)
    assert (usual["lanes"], usual["threads"]) == (1, 4)
    given = cli_workers._engine(ModelOptions(), 2, None, 4, 2, (1, 8))
    assert given["buckets"] == [1, 8] and "buckets" not in usual
    (channel,) = cli_workers.channels(ModelOptions(), 1, lanes=1, buckets=(4, 8))
    with channel._given() as made:
        assert made.lanes.count == 1 and made._host.runner.usual == (4, 8)


@pytest.mark.parametrize(
    "options", [["--workers", "0"], ["--rounds", "0"], ["--loads", "0"], ["--limit", "-1"], ["--nfe", "5"]]
)
def test_options_are_checked_before_anything_is_started(options, capsys):
    assert main(["serve", *options]) == 2
    assert options[0].strip("-") in capsys.readouterr().err
