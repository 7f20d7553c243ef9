"""`rollflow bench latency`: the arrivals, the loops and the percentiles against closed forms, on a virtual clock."""

import heapq
import itertools
import json
import math
from functools import partialmethod

import numpy as np
import pytest

from rollflow.bench import intervals
from rollflow.bench.__main__ import main
from rollflow.bench.compare import Compare
from rollflow.bench.latency import LATENCIES, Latency
from rollflow.bench.loads import Clock, closed_loop, open_loop, poisson
from rollflow.bench.overhead import Free, first_pixel
from rollflow.engine import Engine
from rollflow.errors import FunctionError, RequestError
from rollflow.job import Job
from rollflow.request import Request
from rollflow.search.record import History
from rollflow.ticket import Evaluated, Finished, Refused, Started

SERVICE = 2.0  # seconds
BATCHES = 20  # of neighbours, whose means are nearly independent


class Virtual(Clock):
    """A clock that jumps from event to event."""

    def __init__(self):
        self.time, self.events, self.numbers = 0.0, [], itertools.count()

    def now(self):
        return self.time

    def at(self, time, function, *arguments):
        heapq.heappush(self.events, (time, next(self.numbers), function, arguments))

    def sleep(self, seconds):
        until = self.time + seconds
        while self.events and self.events[0][0] <= until:
            self.step()
        self.time = until

    def acquire(self, over):
        while not over.acquire(blocking=False):
            self.step()

    def step(self):
        time, _, function, arguments = heapq.heappop(self.events)
        self.time = max(self.time, time)
        function(*arguments)


class Server:
    """Serves one job after another, `SERVICE` seconds each, with a first update after a quarter of them."""

    def __init__(self, clock, fails=()):
        self.virtual, self.fails, self.free = clock, fails, 0.0
        self.inside = self.most = 0

    def cancel(self, ticket): ...

    def peek(self, ticket): ...

    def check_waiting(self): ...

    def call_back(self, job, call):
        call()

    def clock(self):
        return self.virtual.now()

    def submit(self, i):
        job, history = Job(i, Request("a"), self, lambda finished: None), History()
        self.inside += 1
        self.most = max(self.most, self.inside)
        start = max(self.virtual.now(), self.free)
        self.free = start + SERVICE
        self.virtual.at(start, job.tell, Started(history, start))
        self.virtual.at(start + SERVICE / 4, self.evaluate, job, history)
        self.virtual.at(self.free, self.end, job, history)
        return job

    def evaluate(self, job, history):
        history.committed += 1
        job.tell(Evaluated())

    def end(self, job, history):
        self.inside -= 1
        if job.id in self.fails:
            job.tell(Refused(FunctionError(f"no score for {job.id}"), True))
        else:
            job.tell(Finished(None, history, "budget", SERVICE, None))


def waits(passages):
    return np.array([LATENCIES["queued"](one) for one in passages])


def test_arrivals_are_a_poisson_process():
    rate, n = 3.0, 20_000
    arrivals = poisson(rate, n, [0, 1])
    gaps = np.diff(arrivals, prepend=0)
    assert abs(gaps.mean() * rate - 1) < 5 / math.sqrt(n) and gaps.min() > 0
    assert abs(gaps.var() * rate**2 - 1) < 5 * math.sqrt(8 / n)  # the fourth central moment of an exponential is 9
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 5 / math.sqrt(n)
    for q in (0.5, 0.95, 0.99):
        error = math.sqrt(q * (1 - q) / n) / (1 - q)  # over the density at the quantile
        assert abs(intervals.quantile(gaps, q) * rate + math.log(1 - q)) < 5 * error
    counts = np.histogram(arrivals, np.arange(0, int(arrivals[-1])))[0]
    assert abs(counts.var() / counts.mean() - 1) < 5 * math.sqrt(2 / len(counts))
    assert np.array_equal(arrivals, poisson(rate, n, [0, 1])) and not np.array_equal(arrivals, poisson(rate, n, [0, 2]))


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_an_open_loop_meets_the_waits_of_its_queue(load):
    """Poisson arrivals, one server, constant service: the mean wait is `load / (2 (1 - load))` services (Khinchin)."""
    clock, n = Virtual(), 4000
    passages = open_loop(Server(clock).submit, poisson(load / SERVICE, n, [0, 0]), clock)
    found = waits(passages)[n // 10 :] / SERVICE
    means = found.reshape(BATCHES, -1).mean(1)
    assert abs(means.mean() - load / (2 * (1 - load))) < 5 * means.std(ddof=1) / math.sqrt(BATCHES)
    none = np.mean(found < 1e-9)  # who comes to an idle server does not wait: as often as it is idle
    idle = (found < 1e-9).reshape(BATCHES, -1).mean(1)
    assert abs(none - (1 - load)) < 5 * idle.std(ddof=1) / math.sqrt(BATCHES)
    for one in passages:
        assert one.updated - one.admitted == pytest.approx(SERVICE / 4) and one.submitted == pytest.approx(one.due)
        assert one.ended - one.admitted == pytest.approx(SERVICE)


def test_latencies_count_from_the_schedule_where_the_submitter_is_late():
    clock = Virtual()
    server = Server(clock)

    def slow(i):
        clock.sleep(3.0)
        return server.submit(i)

    passages = open_loop(slow, np.array([1.0, 2.0, 3.0]), clock)
    assert [one.due for one in passages] == [1.0, 2.0, 3.0] and [one.submitted for one in passages] == [4.0, 7.0, 10.0]
    assert [LATENCIES["to_result"](one) for one in passages] == [5.0, 7.0, 9.0]
    assert [LATENCIES["queued"](one) for one in passages] == [3.0, 5.0, 7.0]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_closed_loop_keeps_as_many_in_flight_and_no_more(concurrency):
    clock = Virtual()
    server = Server(clock)
    passages = closed_loop(server.submit, 20, concurrency, math.inf, clock)
    assert len(passages) == 20 and server.most == concurrency and server.inside == 0
    assert clock.now() == 20 * SERVICE
    assert all(one.ended - one.due == concurrency * SERVICE for one in passages[concurrency:])
    assert len(closed_loop(server.submit, 20, concurrency, 5 * SERVICE, clock)) == 5 + concurrency - 1


def test_the_error_of_a_request_is_raised():
    clock = Virtual()
    server = Server(clock, fails={3})
    with pytest.raises(FunctionError, match="no score for 3"):
        open_loop(server.submit, np.arange(6.0), clock)
    with pytest.raises(FunctionError, match="no score for 3"):
        closed_loop(server.submit, 6, 2, math.inf, clock)
    assert server.inside == 0


def test_percentiles_are_values_of_large_enough_samples():
    values = np.random.default_rng(0).permutation(np.arange(1, 101))
    assert [intervals.quantile(values, q) for q in (0.5, 0.95, 0.99)] == [50, 95, 99]
    assert intervals.quantile(values[:99], 0.99) is None and intervals.quantile(values[:19], 0.95) is None
    assert intervals.quantile(values[:20], 0.95) is not None and intervals.quantile([1.0], 0.5) is None
    assert intervals.quantile_interval(np.arange(367), 0.99)[1] is None  # 0.99^367 is above 2.5 %
    assert intervals.quantile_interval(np.arange(368), 0.99)[1] == 367
    assert intervals.quantile_interval([1.0, 2.0], 0.5) == (None, None)


@pytest.mark.parametrize("share", [0.5, 0.95, 0.99])
def test_intervals_of_percentiles_hold_as_often_as_they_say(share):
    rng, n, repetitions, truth = np.random.default_rng(1), 200, 1000, -math.log(1 - share)
    below = above = 0
    for _ in range(repetitions):
        low, high = intervals.quantile_interval(rng.exponential(size=n), share)
        below += high is not None and high < truth
        above += low is not None and low > truth
    limit = repetitions * 0.025 + 4 * math.sqrt(repetitions * 0.025 * 0.975)
    assert below < limit and 0 < above < limit and (share == 0.99 or below)


def test_the_command_on_a_virtual_server():
    """Rates and latencies of a server that is known: its capacity is `1 / SERVICE`."""
    clock = Virtual()
    server = Server(clock)

    class Served(Engine):
        def __init__(self):
            pass

        def submit(self, request):
            return server.submit(request.seed)

        def warm_up(self):
            clock.sleep(1000.0)

        def forget_prompts(self):
            pass

    command = Latency(concurrency=(1, 4), loads=(0.3, 0.9), requests=300, seconds=1e6)
    one, four, low, high = command.measure(Served(), "count", clock)
    for row, concurrency in ((one, 1), (four, 4)):
        assert row["requests_per_second"] == pytest.approx(1 / SERVICE) and row["measured"] == 300
        assert row["seconds_to_result_p50"] == pytest.approx(concurrency * SERVICE)
        assert row["nfe_per_second"] == pytest.approx(100 / SERVICE)
    for row, load in ((low, 0.3), (high, 0.9)):
        assert row["capacity"] == pytest.approx(1 / SERVICE) and row["measured"] == 300
        assert row["arrivals_per_second"] == pytest.approx(load / SERVICE, rel=5 / math.sqrt(300))
        assert row["seconds_queued_mean"] + SERVICE == pytest.approx(row["seconds_to_result_mean"])
        assert row["seconds_to_first_update_p99"] + 0.75 * SERVICE == pytest.approx(row["seconds_to_result_p99"])
        assert row["late_seconds"] == pytest.approx(0, abs=1e-9)
    assert low["seconds_queued_mean"] < high["seconds_queued_mean"]


def test_the_command_end_to_end(tmp_path, capsys, monkeypatch):
    engine = Engine(Free(), buckets=range(1, 17), lanes=1, threads=1)
    monkeypatch.setattr(Engine, "from_pretrained", lambda *arguments, **options: engine)
    monkeypatch.setattr(Latency, "measure", partialmethod(Latency.measure, reward=first_pixel))
    file, plot = tmp_path / "latency.json", tmp_path / "latency.png"
    sizes = ["--requests", "20", "--concurrency", "1", "4", "--loads", "0.3", "0.6", "--nfe", "20"]
    assert main(["latency", *sizes, "--json", str(file), "--plot", str(plot)]) == 0
    report = json.loads(file.read_text())
    assert {"date", "commit", "torch", "device"} <= report["environment"].keys()
    names = [(row["contender"], row.get("concurrency"), row.get("load")) for row in report["rows"]]
    assert names == [
        ("closed loop", 1, None), ("closed loop", 4, None), ("open loop", None, 0.3), ("open loop", None, 0.6)
    ]  # fmt: skip
    for row in report["rows"]:
        assert row["measured"] == 20 and row["late_seconds"] >= 0 and row["seconds_to_result_p99"] is None
        for p in (50, 95):
            assert -1e-3 < row[f"seconds_queued_p{p}"] <= row[f"seconds_to_first_update_p{p}"]
            assert row[f"seconds_to_first_update_p{p}"] <= row[f"seconds_to_result_p{p}"]
    shown = capsys.readouterr().out
    assert "4 in flight" in shown and "0.6 of capacity" in shown and plot.stat().st_size > 10_000
    Compare(file, file)()
    shown = capsys.readouterr().out
    assert "seconds_to_first_update_p95" in shown and "requests_per_second" in shown
    engine.close()


def test_as_many_as_come_in_the_time_are_measured():
    clock = Virtual()
    server = Server(clock)
    command = Latency(concurrency=(1,), loads=(0.5,), requests=200, seconds=100.0, capacity=1.0)
    passages = open_loop(server.submit, np.arange(1.0, 30.0), clock)
    assert command._row(passages, 5, contender="open loop", load=0.5)["measured"] == 19
    with pytest.raises(RequestError, match=r"seconds=100: only 29 requests came by then, too few"):
        command._row(passages, 15, contender="open loop", load=0.5)


@pytest.mark.parametrize(
    "options", [["--loads", "0"], ["--concurrency", "0"], ["--requests", "0"], ["--capacity", "0"], ["--seconds", "0"]]
)
def test_options_are_checked_before_anything_is_loaded(options, capsys, monkeypatch):
    monkeypatch.setattr(Engine, "from_pretrained", None)
    assert main(["latency", *options]) == 2
    assert "above 0" in capsys.readouterr().err


def test_files_that_cannot_be_written_are_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: pytest.fail("the work began"))
    for options, why in (({"json": tmp_path}, "cannot be written"), ({"plot": tmp_path / "a.txt"}, "must end in")):
        with pytest.raises(RequestError, match=why):
            Latency(**options)()
    assert not [*tmp_path.iterdir()]
