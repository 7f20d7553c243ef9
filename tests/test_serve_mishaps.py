"""What goes wrong around a desk, and what must go on nevertheless."""

import asyncio
import concurrent.futures
import logging
import threading
import time
from queue import SimpleQueue

import pytest
import workers
from desks import opened, over, run, settled
from tiny import PATIENCE
from workers import Told, ask

from rollflow.errors import EngineBusy, RollflowError
from rollflow.journal import Journal
from rollflow.serve import dispatcher, ended, failures, station
from rollflow.serve.desk import Desk
from rollflow.serve.dispatcher import Unready
from rollflow.serve.local import LocalChannel
from rollflow.serve.messages import Message, pack
from rollflow.serve.pool import Pool
from rollflow.serve.previews import FRESH
from rollflow.serve.ray_actor import Actor

CANCELLED = {"type": "Cancelled", "message": "the search was cancelled"}


@pytest.fixture(scope="module")
def shared():
    made = workers.engine()
    yield made
    workers.GATE.set()
    made.close()


@pytest.fixture
def gate():
    workers.GATE.clear()
    yield workers.GATE
    workers.GATE.set()


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path) as made:
        yield made


async def until(true):
    while not true():
        await asyncio.sleep(0.01)


# Stations.


async def hanging(desk, channel):
    """A search that was cancelled while its reward hangs, and the task that waits for its end."""
    while True:  # what is cancelled before its reward was called ends at once
        order = await desk.submit(ask(reward="gated", nfe=400))
        while order.status != "running":
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        leaving = asyncio.ensure_future(order.cancel())
        while not order.done and order.id not in channel._station._parting:
            await asyncio.sleep(0.01)
        if not order.done:
            return order, leaving


def test_cancelled_searches_whose_reward_hangs_hold_up_nobody_s_result(shared, gate, monkeypatch):
    monkeypatch.setattr(station, "PATIENCE", 1e6)

    async def main():
        channel = LocalChannel(shared)
        desk = Desk([channel])
        await desk.start()
        cancelled = []
        while sum(not order.done for order, _ in cancelled) < 3:  # one whose rows were in no call ends soon
            cancelled.append(await hanging(desk, channel))
            await asyncio.sleep(0.2)
        other = await desk.submit(ask())
        await other.over()
        assert other.status == "done" and sum(not order.done for order, _ in cancelled) >= 2
        gate.set()
        assert all(await asyncio.gather(*(leaving for _, leaving in cancelled)))
        await desk.close()

    run(main())


def test_a_cancelled_search_ends_without_its_image_where_that_does_not_come(shared, gate):
    async def main():
        channel = LocalChannel(shared)
        desk = Desk([channel], hung=1e15)
        await desk.start()
        order, leaving = await hanging(desk, channel)
        channel._station._clock = lambda: 1e12
        assert await leaving and order.result is None and order.error["type"] == "Cancelled"
        await desk.close()

    run(main())


def test_a_cancel_may_overtake_its_search(shared, gate):
    heard, channel = SimpleQueue(), LocalChannel(shared)
    channel.start(heard.put, heard.put)
    while heard.get(timeout=PATIENCE).header["op"] != "ready":
        pass
    channel.send(Message({"op": "cancel", "id": "a"}))
    channel.send(Message({"op": "run", "id": "a", "request": ask(reward="gated")}))
    while (message := heard.get(timeout=PATIENCE)).header["op"] != "over":
        pass
    assert message.header["id"] == "a" and message.header["status"] == "cancelled"
    channel.close()


def test_frames_that_ray_swaps_are_put_in_order():
    taken, actor = [], Actor({})
    actor._station = type("Station", (), {"take": lambda _, message: taken.append(message.header["n"])})()
    frames = [[pack(Message({"n": 2 * n})), pack(Message({"n": 2 * n + 1}))] for n in range(3)]

    async def main():
        for number in (1, 2, 0):
            await actor.take(number, frames[number])

    run(main())
    assert taken == [*range(6)]


def test_threads_that_hang_do_not_hold_up_the_end_of_a_process():
    begun, go, done = threading.Event(), threading.Event(), []
    pool = Pool(1, "pooled")
    pool.submit(lambda: (begun.set(), go.wait(PATIENCE)))
    pool.submit(lambda: done.append(1))
    assert begun.wait(PATIENCE)
    (thread,) = [one for one in threading.enumerate() if one.name == "pooled"]
    assert thread.daemon
    pool.close()
    pool.submit(lambda: done.append(2))
    go.set()
    thread.join(PATIENCE)
    assert not thread.is_alive() and not done


# Workers.


def test_a_question_that_two_workers_died_of_can_be_asked_again():
    async def main():
        a, b = Told(), Told()
        desk = await opened(a, b, pause=1e6)
        for one in (a, b):
            one.send = lambda message, one=one: one.on_death("kill -9")
        with pytest.raises(Unready) as error:
            await desk.submit(ask())
        told = failures.refused(error.value)
        assert (told.status, told.headers["Retry-After"]) == (503, "5")
        await desk.close()

    run(main())


def test_no_worker_is_no_full_queue_and_one_that_will_start_is_alive(monkeypatch):
    monkeypatch.setattr(dispatcher, "PATIENCE", -1.0)

    async def main():
        channel = Told()
        desk = await opened(channel, pause=1e6)
        channel.on_death("kill -9")
        await settled()
        assert not desk.ready and desk.alive
        with pytest.raises(Unready, match="no worker is ready"):
            await desk.submit(ask())
        await desk.close()
        assert not desk.alive

    run(main())


def test_a_start_that_hangs_is_ended_also_where_that_fails_at_first():
    async def main():
        killed, (good, slow) = [], (Told(), Told())
        kill = slow.kill

        def try_kill():
            killed.append(threading.current_thread() is threading.main_thread())
            if len(killed) == 1:
                raise OSError("it cannot be reached")
            kill()

        slow.kill = try_kill
        desk = Desk([good, slow], starting=-1.0, hung=0.04, pause=0.0)
        starting = asyncio.ensure_future(desk.start())
        await asyncio.sleep(0)
        good.say(op="ready", stats={})
        await starting
        while slow.starts < 2:
            good.say(op="news", age=0.0, searches={})
            await asyncio.sleep(0.01)
        assert killed[:2] == [False, False]
        slow.kill = lambda: None
        await desk.close()

    run(main())


def test_a_worker_that_could_not_be_made_at_first_is_tried_again(monkeypatch, caplog):
    monkeypatch.setattr(dispatcher, "LONGEST_PAUSE", 0.0)

    async def main():
        a, b = Told(), Told()
        desk = Desk([a, b])
        starting = asyncio.ensure_future(desk.start())
        await asyncio.sleep(0)
        b.say(op="ready", stats={})
        a.say(op="unfit", error={"type": "ModelError", "message": "no such model"})
        await starting
        await until(lambda: a.starts == 2)
        a.say(op="ready", stats={})
        await settled()
        assert [worker.state for worker in desk.stats().workers] == ["ready", "ready"]
        assert "no such model" in caplog.text
        await desk.close()

    run(main())


def test_a_worker_that_was_to_run_a_search_alone_takes_others_when_that_is_cancelled():
    async def main():
        a, b = Told(), Told()
        desk = await opened(a, b, pause=1e6)
        first, suspect = await desk.submit(ask(0)), await desk.submit(ask(1))
        assert b.ran() == [suspect.id]
        suspect.deaths = dispatcher.SHARED - 1
        b.on_death("kill -9")
        await settled()
        waiting = await desk.submit(ask(2))
        assert a.ran() == [first.id]  # it is to be empty first
        assert await suspect.cancel()
        assert a.ran() == [first.id, waiting.id]
        await desk.close()

    run(main())


# The desk.


def test_what_is_being_written_to_the_journal_counts_as_waiting(journal):
    async def main():
        desk = await opened(Told(), max_queued_nfe=100, journal=journal)
        asked = [desk.submit(ask(seed, nfe=40)) for seed in range(4)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert [isinstance(one, EngineBusy) for one in found] == [False, False, True, True]
        await desk.close()

    run(main())


def test_a_search_of_a_time_counts_as_what_a_worker_does_in_it():
    async def main():
        desk = await opened(Told(), Told(), max_queued_nfe=250)
        timed = {name: value for name, value in ask(seconds=20.0).items() if name != "nfe"}
        assert (await desk.submit(timed)).budget == 200  # at 10 NFE a second
        with pytest.raises(EngineBusy, match="200 NFE wait"):
            await desk.submit(ask(nfe=60))
        await desk.close()

    run(main())


def test_looks_at_a_search_are_shared():
    async def main():
        now = [0.0]
        channel = Told()
        desk = await opened(channel, clock=lambda: now[0], hung=1e9)
        order = await desk.submit(ask())

        def peeks():
            return [message.header["call"] for message in channel.sent if message.header["op"] == "peek"]

        looks = [asyncio.ensure_future(order.preview()) for _ in range(5)]
        await settled()
        looks.pop().cancel()
        assert len(peeks()) == 1
        channel.say(b"png", op="answer", call=peeks()[0])
        assert await asyncio.gather(*looks) == [b"png"] * 4
        now[0] += FRESH / 2
        assert await order.preview() == b"png" and len(peeks()) == 1
        now[0] += FRESH
        again = asyncio.ensure_future(order.preview())
        await settled()
        channel.say(b"other", op="answer", call=peeks()[1])
        assert await again == b"other"
        await desk.close()

    run(main())


def test_failures_are_counted_by_names_that_clients_cannot_make_up():
    async def main():
        channel = Told()
        desk = await opened(channel)
        for reward in ("clip:model=a", "clip:model=b", "0.1*clip", "0.2*clip"):
            order = await desk.submit(ask(reward=reward))
            channel.say(op="over", id=order.id, status="failed", error={"type": "FunctionError", "message": "ill"})
            await order.over()
        assert {name: one.errors for name, one in desk.stats().rewards.items()} == {"clip": 2, "expression": 2}
        await desk.close()

    run(main())


def test_the_oldest_that_waits_and_how_many_may_run_are_known():
    async def main():
        a, b = Told(), Told()
        desk = await opened(a, b, window=1, pause=1e6)
        assert desk.stats().oldest == 0.0 and desk.stats().limit == 2
        first, *_ = orders = [await desk.submit(ask(seed)) for seed in range(3)]
        for order in orders:
            order.created = time.time() - 50
        orders[2].created -= 50
        assert 100 <= desk.stats().oldest < 110
        a.say(op="news", age=0.0, searches={first.id: {"status": "running"}})
        b.on_death("kill -9")
        await settled()
        assert desk.stats().limit == 1 and 100 <= desk.stats().oldest < 110
        await asyncio.gather(*(asyncio.wait_for(one.cancel(), PATIENCE) for one in orders[1:]))
        assert desk.stats().oldest == 0.0
        await desk.close()

    run(main())


def test_slots_that_were_never_made_are_told_from_those_in_use():
    async def main():
        channel = Told()
        desk = await opened(channel)
        channel.say(op="news", age=0.0, searches={}, stats={"free": 0, "live": 0})
        await settled()
        assert (desk.stats().free, desk.stats().pooled) == (0, 0)
        channel.say(op="news", age=0.0, searches={}, stats={"free": 0, "live": 9})
        await settled()
        assert (desk.stats().free, desk.stats().pooled) == (0, 9)
        await desk.close()

    run(main())


# What the log says.


def logged(caplog):
    """The level and text of each line so far."""
    return [f"{one.levelname} {one.getMessage()}" for one in caplog.records if one.name == "rollflow"]


def test_the_log_tells_of_workers(caplog):
    async def main():
        channel = Told()
        desk = await opened(channel, pause=0.0)
        channel.on_death("kill -9")
        await until(lambda: channel.starts == 2)
        channel.say(op="ready", stats={})
        await settled()
        await desk.close()

    with caplog.at_level(logging.INFO, "rollflow"):
        run(main())
    assert logged(caplog) == [
        "INFO the worker 0 (told) is ready",
        "WARNING the worker 0 (told) died (kill -9); its 0 searches go on elsewhere",
        "INFO the worker 0 is started again",
        "INFO the worker 0 (told) is ready",
        "INFO draining: searches that run: 0; that wait: 0; they have 0 s, and new ones are refused",
        "INFO closed: searches that were not over and have failed: 0",
    ]


def test_the_log_tells_of_the_journal_at_the_start_and_at_the_end(journal, caplog):
    async def main():
        before = await opened(Told(), journal=journal)
        await before.submit(ask(0), fleeting=True)
        goes_on = [await before.submit(ask(seed)) for seed in (1, 2)]
        channel = Told()
        with caplog.at_level(logging.INFO, "rollflow"):
            desk = await opened(channel, journal=journal)  # as after kill -9: the first did not close
            channel.say(op="news", age=0.0, searches={goes_on[0].id: {"status": "running"}})
            await settled()
            await desk.close(0.01)

    run(main())
    assert logged(caplog) == [
        "INFO the journal: searches that go on: 2; that are ended, as their clients have gone: 1",
        "INFO the worker 0 (told) is ready",
        "INFO draining: searches that run: 1; that wait: 1; they have 0.01 s, and new ones are refused",
        "INFO closed: searches that are left in the journal: 2",
    ]


SECRETS = [  # a prompt, and what a search that failed says
    ("a", "prompt='a': it is too short"),
    ("seven violet hippos", "the judge said: no seven violet hippos here"),
    ("seven violet hippos", "the judge said: no seven violet hip..."),
    ("seven violet hippos " * 20, f"prompt={failures.shown('seven violet hippos ' * 20)}: it is too long"),
]


@pytest.mark.parametrize(("prompt", "message"), SECRETS)
def test_a_search_that_failed_is_one_line_without_its_prompt(prompt, message, caplog):
    async def main():
        channel = Told()
        desk = await opened(channel)
        order = await desk.submit(ask(prompt=prompt))
        channel.say(op="over", id=order.id, status="failed", error={"type": "FunctionError", "message": message})
        await order.over()
        await desk.close()
        return order.id

    run(main())
    (line,) = logged(caplog)
    assert line.startswith("WARNING the search srch_") and "failed (FunctionError: " in line and "<prompt>" in line
    assert "\n" not in line and "hip" not in line and "'a'" not in line
    assert caplog.records[0].exc_info is None


# With a journal.


def test_what_a_cancelled_search_found_is_there_after_a_restart(journal):
    async def main():
        channel = Told()
        desk = await opened(channel, journal=journal)
        order = await desk.submit(ask())
        over(channel, order.id, status="cancelled", error=CANCELLED)
        await order.over()
        assert await order.image() == b"image"
        await desk.close()
        again = (await opened(Told(), journal=journal)).get(order.id)
        assert (again.status, again.error, again.result) == ("cancelled", CANCELLED, order.result)
        assert await again.image() == b"image" and again.improvements == order.improvements

    run(main())


def test_what_nobody_can_ask_for_does_not_go_on_after_a_restart(journal):
    async def main():
        before = await opened(Told(), journal=journal)
        gone, stays = await before.submit(ask(0), fleeting=True), await before.submit(ask(1))
        channel = Told()
        desk = await opened(channel, journal=journal)  # as after kill -9: the first did not close
        await until(lambda: journal.get(gone.id).status == "cancelled")
        assert channel.ran() == [stays.id] and desk.get(gone.id).request == ask(0)
        left = await desk.submit(ask(2), fleeting=True)
        await desk.close()
        assert (left.status, left.error["type"]) == ("cancelled", "EngineClosed")
        assert [kept.id for kept in journal.unfinished()] == [stays.id]

    run(main())


def test_an_end_that_cannot_be_written_is_written_again(journal, monkeypatch):
    monkeypatch.setattr(ended, "PAUSES", (0.0, 0.0))
    fails, finish = [2], journal.finish

    def full(*what):
        if fails[0]:
            fails[0] -= 1
            raise RollflowError("the disk is full")
        return finish(*what)

    monkeypatch.setattr(journal, "finish", full)

    async def main():
        channel = Told()
        desk = await opened(channel, journal=journal, keep=-1.0)  # it is forgotten at once
        first = await desk.submit(ask(0))
        over(channel, first.id)
        await first.over()
        assert desk.get(first.id).status == "done"
        fails[0] = 3
        lost = await desk.submit(ask(1))
        over(channel, lost.id)
        await lost.over()
        assert lost.status == "done" and await lost.image() == b"image"
        known = desk.get(lost.id)
        assert known.done and known.status == "failed" and "could not be written" in known.error["message"]
        await desk.close()

    run(main())


def test_what_is_accepted_while_the_desk_closes_is_let_go(journal, monkeypatch):
    async def main():
        desk = await opened(Told(), journal=journal)
        written = concurrent.futures.Future()
        monkeypatch.setattr(journal, "accept", lambda *_, **__: written)
        asked = asyncio.ensure_future(desk.submit(ask()))
        await settled()
        closing = asyncio.ensure_future(desk.close())
        await until(desk._pruning.done)
        written.set_result(None)
        await closing
        order = await asked
        assert order.done and order.error["type"] == "EngineClosed"

    run(main())


def test_the_searches_of_an_owner_are_found_among_those_of_others(journal):
    async def main():
        desk = await opened(Told(), journal=journal)
        for number in range(12):
            writing = journal.accept(f"old_{number}", ask(), owner="" if number else "me")
            journal.fail(f"old_{number}", "failed", CANCELLED)
        await asyncio.wrap_future(writing)
        assert [order.id for order in await desk.listed("me", limit=1)] == ["old_0"]
        await desk.close()

    run(main())
