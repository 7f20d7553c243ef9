"""`rollflow bench soak`: what its books find, against a server that searches nothing and makes mistakes on demand."""

import asyncio
import json
import random
import subprocess
import sys

import httpx
import pytest
from stand_in_server import StandIn, running

from rollflow.bench import soak_garbage
from rollflow.bench.__main__ import main
from rollflow.bench.process_memory import family, processor_seconds, sample, trend
from rollflow.bench.soak import settle, still_busy
from rollflow.bench.soak_books import Books
from rollflow.bench.soak_clients import SCENARIOS, Customer
from rollflow.bench.soak_garbage import BAD_CALLS, KINDS, NOISE, check, send

SHORT = ["--minutes", "0.02", "--clients", "16", "--patience", "60", "--every", "0.2"]


def soak(stand_in, file, *options):
    with running(stand_in) as url:
        code = main(["soak", "--url", url, *SHORT, *options, "--json", str(file)])
    return code, json.loads(file.read_text())


def visited(stand_in, work, visits=6):
    """The books after some visits of a client, and after they were settled."""

    async def visit():
        books = Books()
        transport = httpx.ASGITransport(stand_in.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://stand-in") as client:
            customer = Customer(client, books, random.Random(0), 60.0)
            for _ in range(visits):
                await work(customer)
            await settle(client, books, 0.1)
        return books

    return asyncio.run(visit())


def test_a_server_without_mistakes_passes(tmp_path, capsys):
    code, report = soak(StandIn(), tmp_path / "soak.json")
    shown = capsys.readouterr()
    assert code == 0, shown.err
    sums = report["sums"]
    assert sums["lost"] == sums["answered_twice_differently"] == sums["faults"] == 0
    assert sums["accepted"] == sums["done"] + sums["cancelled"] > 0 and report["visits"] >= 16
    assert "visits in 0.02 minutes" in shown.out
    assert report["trends"]["rss_bytes"] is None and report["samples"] == []  # of a server that others started


def test_mistakes_fail_the_command(tmp_path, capsys):
    code, report = soak(StandIn(drops=1), tmp_path / "soak.json")
    assert code != 0 and report["sums"]["lost"] > 0 and report["examples"]["lost"]
    assert "such as" in capsys.readouterr().err


@pytest.mark.parametrize("scenario", [*SCENARIOS])
def test_no_scenario_finds_fault_with_a_good_server(scenario):
    books = visited(StandIn(0.005), SCENARIOS[scenario][1], 3)
    assert not (books.lost or books.differing or books.faults)
    assert bool(books.accounts) == (scenario in ("search", "watch", "resume", "cancel", "again"))
    assert all(account.status in ("done", "cancelled") for account in books.accounts.values())


@pytest.mark.parametrize(
    ("wrong", "scenario", "found", "told"),
    [
        ({"drops": 2}, "image", "lost", "without an image"),
        ({"changes": True}, "search", "differing", "gave two results"),
        ({"forgets_keys": True}, "again", "differing", "one key, several searches"),
        ({"forgets_keys": True}, "again", "faults", "202 for another search with a key that is taken"),
        ({"repeats": True}, "resume", "faults", "came again after"),
    ],
)
def test_mistakes_are_found(wrong, scenario, found, told):
    books = visited(StandIn(0.005, **wrong), SCENARIOS[scenario][1])
    assert any(told in example for example in getattr(books, found))


def test_a_stream_that_ends_early_is_an_error():
    with pytest.raises(ValueError, match=r"ended with image_generation\.partial_image"):
        visited(StandIn(0.005, breaks=True), SCENARIOS["stream"][1], 1)


def test_a_search_that_never_ends_is_lost():
    async def order(customer):
        await customer.accepted("search", customer.body())

    books = visited(StandIn(0.005, loses=3), order)
    assert len(books.accounts) == 6 and len(books.lost) == 2 and "(search) in the end: TimeoutError" in books.lost[0]
    assert [account.status for account in books.accounts.values()].count("done") == 4


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in NOISE])
def test_garbage_is_refused_and_a_traceback_is_found(kind, monkeypatch):
    class Chosen(random.Random):
        def choice(self, of):
            return kind if of is KINDS else of[0]

    async def garbage(customer):
        await send(customer.client, customer.books, Chosen(0))

    monkeypatch.setattr(soak_garbage, "HUGE", 200_000)
    assert not visited(StandIn(), garbage, 1).faults
    found = visited(StandIn(breaks=True), garbage, 1).faults
    fine = kind in (*BAD_CALLS, "a huge body", "a long prompt")  # which the stand-in refuses in any case
    assert fine if not found else "500" in found[0] and kind in found[0]


def test_books_know_what_became_of_a_search():
    books = Books()
    books.accept("a", "search")
    assert books.accept("a", "again").scenario == "search"
    books.see("a", "done", {"reward": 1.0}, b"image")
    books.see("a", "done", {"reward": 1.0}, b"image")
    assert not (books.lost or books.differing or books.faults)
    books.see("a", "done", {"reward": 1.0}, b"another")
    assert books.differing == ["a (search) gave two results"]
    books.accept("b", "search")
    books.see("b", "cancelled")
    assert books.faults == ["b (search) is cancelled, and nobody did"]
    books.accept("c", "cancel").cancelled = True
    books.see("c", "cancelled")
    books.see("c", "done", {}, b"")
    assert len(books.faults) == 1 and books.differing[1:] == ["c (cancel) was cancelled and is done"]
    books.accept("d", "search")
    books.see("d", "failed")
    assert books.lost == ["d (search) failed"]
    assert books.sums["accepted"] == 4 and books.sums["failed"] == 1


def test_the_same_seed_asks_for_the_same():
    first, second, other = (Customer(httpx.AsyncClient(), Books(), random.Random(seed), 1.0) for seed in "112")
    assert [first.body() for _ in range(5)] == [second.body() for _ in range(5)] and first.key() == second.key()
    assert first.body() != other.body()


@pytest.mark.parametrize(
    ("status", "content", "fine"),
    [
        (400, b'{"error": {"message": "no"}}', True),
        (200, b'{"data": []}', False),
        (500, b'{"error": {}}', False),
        (400, b'{"error": "Traceback (most recent call last)"}', False),
        (404, b"Not Found", False),
    ],
)
def test_what_a_server_may_answer_to_garbage(status, content, fine):
    books = Books()
    check(books, "noise", status, content)
    assert (not books.faults) == fine


def test_metrics_of_a_server_that_rests():
    text = '# TYPE rollflow_requests_running gauge\nrollflow_requests_running{worker="0"} 2.0\nother 3\n'
    assert still_busy(text) == ['rollflow_requests_running{worker="0"} 2.0']
    assert still_busy("rollflow_requests_running 0.0\nrollflow_requests_waiting 0\n") == []


def test_a_process_is_sampled_with_its_children():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        while len(found := family(process.pid)) < 2:
            assert process.poll() is None
        both = sample(process.pid, 3.0)
        assert found[0] == process.pid and both.processes == 2 and both.threads >= 2 and both.seconds == 3.0
        process.stdin.close()
    assert sample(process.pid, 0.0).processes == 0


@pytest.fixture
def worker():
    """A process that says how much it has computed, and on each line that it is sent takes memory and computes."""
    code = (
        "import sys, time; held = []\n"
        "for line in sys.stdin:\n"
        "    held.append(bytes([1]) * (64 << 20)); until = time.process_time() + 0.3\n"
        "    while time.process_time() < until: pass\n"
        "    print(time.process_time(), flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process
        process.stdin.close()


def test_memory_and_processor_time_are_what_was_taken(worker):
    seen = []
    for _ in range(2):
        worker.stdin.write(b"\n")
        worker.stdin.flush()
        said = float(worker.stdout.readline())
        seen.append((sample(worker.pid, 0.0).rss_bytes, processor_seconds(worker.pid), said))
    (rss, spent, said), (more, later, finally_said) = seen
    assert 60 << 20 < more - rss < 70 << 20
    assert later - spent == pytest.approx(finally_said - said, abs=0.05) and later - spent > 0.25


def test_a_line_through_samples_tells_growth_from_noise():
    dice, seconds = random.Random(0), [10.0 * i for i in range(200)]
    noise = [1e9 + dice.gauss(0, 5e6) for _ in seconds]
    flat = trend(seconds, noise, 0.02)
    assert flat["flat"] and abs(flat["growth"]) < 0.01 and flat["per_hour_95"][0] < 0 < flat["per_hour_95"][1]
    leak = trend(seconds, [value + 3e4 * second for value, second in zip(noise, seconds, strict=True)], 0.02)
    assert not leak["flat"] and leak["per_hour"] == pytest.approx(3600 * 3e4, rel=0.05)
    jump = [*noise[:-3], *[2e9] * 3]  # a few far out are no trend
    assert trend(seconds, jump, 0.02)["flat"]
    assert trend(seconds[:19], noise[:19], 0.02) is None
