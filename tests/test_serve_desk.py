"""The desk: searches come, are given out, end once each, and are known afterwards; by hand and on a real engine."""

import asyncio
import io
import math

import pytest
import workers
from desks import opened, over, run, settled
from PIL import Image
from tiny import PATIENCE
from workers import Told, ask

from rollflow.entries import Entry, Replay, read, written
from rollflow.errors import EngineBusy, EngineClosed, ModelError, RequestError
from rollflow.journal import Journal
from rollflow.serve.desk import Desk, KeyReused
from rollflow.serve.local import LocalChannel


@pytest.fixture(scope="module")
def shared():
    made = workers.engine()
    yield made
    made.close()


def alike(order):
    """What a search's result must always be, whoever computed it."""
    result = {name: value for name, value in order.result.items() if name not in ("seconds", "executed_nfe")}
    return result, [(nfe, reward) for nfe, reward, _ in order.improvements]


# On an engine.


def test_a_search_is_followed_to_its_result(shared):
    async def main():
        desk = Desk([LocalChannel(shared)])
        await desk.start()
        assert desk.ready and desk.alive
        order = await desk.submit(ask(nfe=30))
        events = [event async for event in order.events()]
        assert events[-1] == "over" and order.status == "done" and order.error is None
        assert [(one.nfe, one.best_reward, one.seconds) for one in events[:-1]] == order.improvements
        rewards = [reward for _, reward, _ in order.improvements]
        assert rewards == sorted({*rewards}) and order.progress.best_reward == rewards[-1]
        assert order.progress.nfe == order.result["nfe"] == 30
        image = Image.open(io.BytesIO(await order.image()))
        assert image.size == (8, 8) and order.result["format"] == "png" == image.format.lower()
        direct = shared.generate(workers.request(ask(nfe=30)))
        assert order.result["reward"] == direct.reward and image.tobytes() == direct.image.tobytes()
        middle = order.improvements[1][0]  # where a reader broke off
        again = [event.nfe async for event in order.events(after=middle) if event != "over"]
        assert again == [nfe for nfe, _, _ in order.improvements if nfe > middle]
        assert desk.get(order.id) is order and desk.get("srch_none") is None and await desk.listed() == [order]
        while (stats := desk.stats()).nfe.get("committed", 0) < 30:  # which come some times a second
            await asyncio.sleep(0.01)
        assert stats.ended == {"done": 1} and 0 < stats.occupancy <= 1
        assert stats.rewards["bright"].images > 0 and stats.workers[0].alive and stats.free > 0
        await desk.close()

    run(main())


def test_a_bad_reward_fails_its_search_alone(shared):
    async def main():
        desk = Desk([LocalChannel(shared)])
        await desk.start()
        bad, good = await desk.submit(ask(prompt="broken")), await desk.submit(ask())
        await bad.over()
        await good.over()
        assert (bad.status, good.status) == ("failed", "done")
        assert bad.error["type"] == "FunctionError" and "the judge is ill" in bad.error["message"]
        assert await bad.image() is None and bad.result is None
        stats = desk.stats()
        assert stats.rewards["bright"].errors == 1 and stats.workers[0].deaths == 0
        await desk.close()

    run(main())


@pytest.mark.parametrize(
    ("field", "message"),
    [({"nfe": 0}, "nfe=0"), ({"nfee": 3}, "nfee"), ({"reward": "nice"}, "nice"), ({"method": "rfb"}, "rfb")],
)
def test_what_cannot_be_honoured_is_refused_at_the_door(shared, field, message):
    async def main():
        desk = Desk([LocalChannel(shared)])
        await desk.start()
        with pytest.raises(RequestError, match=message):
            await desk.submit(ask(**field))
        assert await desk.listed() == []
        await desk.close()

    run(main())


def test_a_cancelled_search_shows_its_best_and_leaves_the_others(shared):
    async def main():
        workers.GATE.clear()
        desk = Desk([LocalChannel(shared)])
        await desk.start()
        order = await desk.submit(ask(reward="gated", nfe=400))
        other = await desk.submit(ask(seed=1))
        await other.over()
        assert other.status == "done" and await order.preview() is None
        cancelled = asyncio.ensure_future(order.cancel())
        workers.GATE.set()
        assert await cancelled and order.status == "cancelled" and order.error["type"] == "Cancelled"
        assert not await order.cancel() and not await other.cancel()
        assert desk.stats().ended == {"done": 1, "cancelled": 1}
        await desk.close()

    run(main())


def test_the_best_so_far_can_be_seen_while_it_runs(shared):
    async def main():
        desk = Desk([LocalChannel(shared)])
        await desk.start()
        order = await desk.submit(ask(reward="slow", nfe=4000))
        first = await anext(order.events())
        assert first.nfe > 0 and order.status == "running"
        assert Image.open(io.BytesIO(await order.preview())).size == (8, 8)
        assert await order.cancel()
        assert order.result["stopped"] == "cancelled" and await order.image()
        await desk.close()

    run(main())


def test_an_engine_that_dies_is_made_again_and_nothing_is_lost():
    async def main():
        made = []

        def make():
            made.append(workers.engine())
            return made[-1]

        workers.GATE.clear()
        desk = Desk([LocalChannel(make)])
        await desk.start()
        orders = [await desk.submit(ask(reward="gated", seed=seed)) for seed in range(3)]
        while desk.stats().running < 3:
            await asyncio.sleep(0.01)
        made[0]._host.loop.call(made[0]._host.loop.fail, workers.EngineDead("the device is gone"))
        while len(made) < 2:
            await asyncio.sleep(0.01)
        workers.GATE.set()
        for order in orders:
            await order.over()
        assert [order.status for order in orders] == ["done"] * 3 and desk.stats().workers[0].deaths == 1
        await desk.close()

    run(main())


def test_a_model_that_is_not_there_is_said_at_the_start():
    def missing():
        raise ModelError("there is no model of this name: give another")

    async def main():
        with pytest.raises(ModelError, match="there is no model"):
            await Desk([LocalChannel(missing)]).start()

    run(main())


# By hand.


def test_searches_go_to_the_least_loaded_and_higher_priorities_first():
    async def main():
        a, b = Told(), Told()
        desk = await opened(a, b, window=2)
        orders = [await desk.submit(ask(seed, nfe=nfe)) for seed, nfe in enumerate((30, 10, 10, 10))]
        low, high = await desk.submit(ask(5)), await desk.submit(ask(6, priority=3))
        assert a.ran() == [orders[0].id, orders[3].id] and b.ran() == [orders[1].id, orders[2].id]
        over(b, orders[1].id)
        await settled()
        assert b.ran()[-1] == high.id and low.status == "queued"
        await desk.close()

    run(main())


def test_a_dead_worker_s_searches_go_on_elsewhere_and_late_answers_are_dropped():
    async def main():
        a, b = Told(), Told()
        desk = await opened(a, b)
        order = await desk.submit(ask())
        scores = Replay((Entry("committed", 0, 0.1), Entry("committed", 1, math.nan)), ())
        news = {"status": "running", "nfe": 2, "best": 0.1, "level": 0, "seconds": 0.1, "better": [[1, 0.1, 0, 0.1]]}
        late, die = a.on_message, a.on_death
        a.say(op="news", age=0.0, searches={order.id: {**news, "start": 0, "entries": written(scores)}})
        await settled()
        assert order.status == "running" and order.improvements == [(1, 0.1, 0.1)]
        die("kill -9")
        die("kill -9")  # said twice
        await settled()
        assert b.ran() == [order.id] and str(read(b.sent[-1].header["replay"])) == str(scores)
        late(workers.Message({"op": "over", "id": order.id, "status": "done", "result": {"reward": 7.0}}))
        await settled()
        assert order.status == "running"
        over(b, order.id, 2.0)
        over(b, order.id, 3.0)  # said twice
        await order.over()
        assert order.result["reward"] == 2.0 and desk.stats().ended == {"done": 1}
        await desk.close()

    run(main())


def test_what_a_journal_has_left_shows_its_improvements_at_once(tmp_path):
    async def main(journal):
        kept = Replay(tuple(Entry(kind, 0, score) for kind, score in SCORES), seconds=3.0)
        journal.accept("srch_a", ask()).result(30)
        journal.log("srch_a", 0, kept)
        journal.flush(30)
        desk = await opened(Told(), journal=journal)
        order = desk.get("srch_a")
        assert order.improvements == [(1, 0.1, 3.0), (5, 0.4, 3.0)] and order.progress.nfe == 6
        assert order.progress.best_reward == 0.4
        await desk.close()

    SCORES = (("committed", 0.1), ("committed", math.nan), ("guided", 0.05), ("committed", 0.4), ("committed", None))
    with Journal(tmp_path) as journal:
        run(main(journal))


def test_a_search_that_kills_its_workers_is_given_up_and_its_neighbours_are_not():
    async def main():
        channel = Told()
        desk = await opened(channel, pause=0.0)
        deadly, good = await desk.submit(ask(0)), await desk.submit(ask(1))
        given = []
        for _ in range(20):
            running = [one for one in channel.ran()[len(given) :] if not desk.get(one).done]
            given += channel.ran()[len(given) :]
            if deadly.id in running:
                starts = channel.starts
                channel.on_death("kill -9")
                while channel.starts == starts and not deadly.done:
                    await asyncio.sleep(0.01)
                channel.say(op="ready")
            elif running:
                over(channel, running[0])
            await settled()
            if deadly.done and good.done:
                break
        assert (deadly.status, good.status) == ("failed", "done")
        assert deadly.error["type"] == "EngineDead" and "4 workers died" in deadly.error["message"]
        assert given.count(deadly.id) == 4 and given.count(good.id) <= 3
        await desk.close()

    run(main())


def test_a_worker_whose_loop_does_not_tick_is_ended():
    async def main():
        a, b = Told(), Told()
        desk = await opened(a, b, hung=0.2)
        order = await desk.submit(ask())
        assert a.ran() == [order.id]
        while not b.ran():
            b.say(op="news", age=0.0, searches={})
            a.say(op="news", age=100.0, searches={})  # the process is there, its engine is not
            await asyncio.sleep(0.01)
        assert b.ran() == [order.id] and desk.alive
        await desk.close()

    run(main())


def test_what_waits_is_bounded_in_searches_and_in_nfe():
    async def main():
        channel = Told()
        desk = await opened(channel, max_queued=3, max_queued_nfe=100)
        for seed in range(2):
            await desk.submit(ask(seed, nfe=40))
        with pytest.raises(EngineBusy, match="80 NFE wait already, and at most 100") as busy:
            await desk.submit(ask(nfe=40))
        assert busy.value.seconds == 8.0  # 80 NFE at 10 a second
        await desk.submit(ask(nfe=20))
        with pytest.raises(EngineBusy, match="3 searches wait already"):
            await desk.submit(ask(nfe=1))
        news = {"status": "running", "nfe": 1, "best": 0.1, "level": 0, "seconds": 0.1}
        channel.say(op="news", age=0.0, searches={channel.ran()[0]: news})
        await settled()
        await desk.submit(ask(nfe=1))
        await desk.close()

    run(main())


def test_images_of_one_request_do_not_stand_in_one_another_s_way():
    async def main():
        desk = await opened(Told(), max_queued_nfe=100)
        one, other = object(), object()
        await asyncio.gather(*(desk.submit(ask(seed, nfe=80), of=one) for seed in range(3)))
        with pytest.raises(EngineBusy, match=r"^searches of 240 NFE wait already"):
            await desk.submit(ask(nfe=1), of=other)
        with pytest.raises(EngineBusy, match="240 NFE wait already"):
            await desk.submit(ask(nfe=1))
        await desk.close()

    run(main())


def test_a_key_finds_its_search_although_the_server_s_own_defaults_have_changed(tmp_path):
    async def main(journal):
        desk, sent = await opened(Told(), journal=journal), {"prompt": "a", "nfe": None}
        first = await desk.submit(ask(reward="bright"), key="k", sent=sent)
        await desk.close()
        desk = await opened(Told(), journal=journal)
        assert (await desk.submit(ask(reward="slow"), key="k", sent=sent)).id == first.id
        assert desk.get(first.id).request == ask(reward="bright")
        with pytest.raises(KeyReused):
            await desk.submit(ask(reward="slow"), key="k", sent={**sent, "prompt": "b"})
        with pytest.raises(KeyReused):
            await desk.submit(ask(reward="slow"), key="k")
        named = {**sent, "reward": "bright"}  # which it was given before
        assert (await desk.submit(ask(reward="bright"), key="k", sent=named)).id == first.id
        await desk.close()

    with Journal(tmp_path) as journal:
        run(main(journal))


def test_many_that_come_at_once_are_bounded_too():
    async def main():
        channel = Told()
        desk = await opened(channel, max_queued=3)
        found = await asyncio.gather(*(desk.submit(ask(seed)) for seed in range(9)), return_exceptions=True)
        assert sum(isinstance(one, EngineBusy) for one in found) == 6 and len(channel.ran()) == 3
        await desk.close()

    run(main())


def test_keys_give_the_same_search():
    async def main():
        channel = Told()
        desk = await opened(channel)
        first, again, other = await asyncio.gather(
            desk.submit(ask(), key="k", owner="me"),
            desk.submit(ask(), key="k", owner="me"),
            desk.submit(ask(), key="k", owner="you"),
        )
        assert first is again is not other and len(channel.ran()) == 2
        with pytest.raises(KeyReused, match="'k' came with another request"):
            await desk.submit(ask(seed=1), key="k", owner="me")
        assert await desk.listed("me") == [first]
        await desk.close()

    run(main())


def test_who_goes_away_while_he_hands_in_leaves_nothing():
    async def main():
        channel = Told()
        desk = await opened(channel)
        channel.send = channel.sent.append  # it does not answer yet
        asked = asyncio.ensure_future(desk.submit(ask()))
        await settled()
        asked.cancel()
        await settled()
        channel.say(op="answer", call=channel.sent[-1].header["call"], nfe=12)
        while channel.sent[-1].header["op"] != "cancel":
            await asyncio.sleep(0.01)
        assert channel.sent[-1].header["id"] == channel.ran()[0]
        await desk.close()

    run(main())


def test_what_is_over_is_forgotten_after_a_while():
    async def main():
        now = [0.0]
        channel = Told()
        desk = await opened(channel, keep=10.0, clock=lambda: now[0])
        first = await desk.submit(ask(0), key="k")
        over(channel, first.id)
        await first.over()
        now[0] = 11.0
        second = await desk.submit(ask(1))
        over(channel, second.id)
        await second.over()
        assert desk.get(first.id) is None and desk.get(second.id) is second
        assert await desk.submit(ask(0), key="k") is not first
        await desk.close()

    run(main())


def test_a_closing_desk_finishes_what_it_can_and_takes_nothing():
    async def main():
        channel = Told()
        desk = await opened(channel)
        done, left = await desk.submit(ask(0)), await desk.submit(ask(1))
        closing = asyncio.ensure_future(desk.close(grace=0.3))
        await settled()
        assert desk.draining and not desk.ready
        with pytest.raises(EngineClosed):
            await desk.submit(ask(2))
        over(channel, done.id)
        await closing
        assert (done.status, left.status) == ("done", "failed") and left.error["type"] == "EngineClosed"
        assert [event async for event in left.events()] == ["over"]

    run(main())


def test_a_worker_that_cannot_be_made_leaves_the_others_to_work():
    async def main():
        a, b = Told(), Told()
        desk = Desk([a, b])
        starting = asyncio.ensure_future(desk.start())
        await asyncio.sleep(0)
        a.say(op="unfit", error={"type": "ModelError", "message": "no such model"})
        a.on_death("it ended with code 2")
        b.say(op="ready", stats={})
        await starting
        order = await desk.submit(ask())
        assert b.ran() == [order.id] and [worker.state for worker in desk.stats().workers] == ["unfit", "ready"]
        assert a.starts == 1
        await desk.close()

    run(main())


# With a journal.


def test_scores_that_another_worker_gives_otherwise_replace_those_before(tmp_path):
    """As of a replay that does not fit, or of engines that are not reproducible."""

    def scored(*scores):
        return written(Replay(tuple(Entry("committed", 0, score) for score in scores)))

    def news(start, scores):
        return {"status": "running", "start": start, "entries": scored(*scores)}

    async def main(journal):
        a, b = Told(), Told()
        desk = await opened(a, b, journal=journal)
        order = await desk.submit(ask())
        for start, scores in ((0, (0.1, math.nan)), (2, (0.3,))):
            a.say(op="news", age=0, searches={order.id: news(start, scores)})
        a.on_death("kill -9")
        await settled()
        kept = []
        for start, scores in ((0, (0.1, math.nan)), (2, (0.4, 0.5))):  # the same at first
            b.say(op="news", age=0, searches={order.id: news(start, scores)})
            await settled()
            await asyncio.to_thread(journal.flush, PATIENCE)
            kept.append(str([entry.score for entry in journal.get(order.id).replay.entries]))
        assert kept == ["[0.1, nan, 0.3]", "[0.1, nan, 0.4, 0.5]"]
        await desk.close()

    with Journal(tmp_path) as journal:
        run(main(journal))


def test_a_restart_goes_on_and_knows_what_was(shared, tmp_path):
    async def first(journal):
        desk = Desk([LocalChannel(shared)], journal=journal)
        await desk.start()
        done = await desk.submit(ask(seed=1), key="done")
        await done.over()
        slow = await desk.submit(ask(reward="slow", nfe=60), key="slow")
        async for event in slow.events():
            if event.nfe > 3:
                break
        await desk.close(grace=0)
        assert slow.status == "running" and slow.error["type"] == "EngineClosed" and slow.done
        return done, slow

    async def second(journal, done, slow, image):
        desk = Desk([LocalChannel(shared)], journal=journal)
        starting = asyncio.ensure_future(desk.start())
        await asyncio.sleep(0)
        assert desk.get(slow.id).status == "queued"  # it is known while workers are being started
        assert (await desk.submit(ask(seed=1), key="done")).id == done.id
        again = await desk.submit(ask(reward="slow", nfe=60), key="slow")
        assert again.id == slow.id
        with pytest.raises(KeyReused):
            await desk.submit(ask(seed=2), key="done")
        await starting
        await again.over()
        known = desk.get(done.id)
        assert alike(known) == alike(done) and await known.image() == image
        assert {one.id for one in await desk.listed()} == {done.id, slow.id}
        whole = await desk.submit(ask(reward="slow", nfe=60))
        await whole.over()
        assert alike(again) == alike(whole) and await again.image() == await whole.image()
        await desk.close()

    with Journal(tmp_path) as journal:
        done, slow = asyncio.run(first(journal))
        image = journal.image(done.id)
        journal.flush(PATIENCE)
        assert journal.evaluated(slow.id) > 0
    with Journal(tmp_path) as journal:
        run(second(journal, done, slow, image))
        assert not journal.unfinished()
