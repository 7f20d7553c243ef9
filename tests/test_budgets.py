"""Budgets of time: what fits is spent, and a request ends on time with its best, by a clock that the test sets."""

import math

import pytest
from tiny import PATIENCE, SIZE, Clock, Driven, Gate, Hand, Lockstep, assert_sound, bon, brightness, ended, engine, rbf

from rollflow import Draw, OutOfTime, RequestError, methods
from rollflow.errors import BudgetError
from rollflow.methods.budget import best
from rollflow.plan import plan
from rollflow.rewards import FunctionReward
from rollflow.row import Free, Landed
from rollflow.timers import LONGEST, Timers


def stopped(told):
    assert told.error is None, told.error
    return told.finished.stopped, told.finished.history.committed


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"seconds": 5.0}, ("seconds", 5)),
        ({"deadline": 1005.0}, ("deadline", 5)),
        ({"seconds": 5.0, "deadline": 1003.0}, ("deadline", 3)),
        ({"seconds": 3.0, "deadline": 1005.0}, ("seconds", 3)),
        ({"seconds": 500.0, "deadline": 2000.0}, ("budget", 12)),
        ({"seconds": 500.0, "stop_at": 6.0}, ("stop_at", 7)),
        ({}, ("budget", 12)),
    ],
)
def test_a_request_ends_within_one_tick_of_its_time(options, expected):
    """A batch of one row takes a second; the end of a search takes none, as far as the loop knows."""
    driven = Driven(Hand(largest=1, seconds=1e-9))
    told = driven.submit(rbf(12, **options))
    driven.run(seconds=1.0)
    assert stopped(told) == expected
    driven.assert_empty()


def test_what_a_request_finds_until_its_time_is_what_it_would_find_in_any_case():
    histories = []
    for seconds in (None, 7.0):
        driven = Driven(Hand(lambda row: float(row.key % 7), largest=1, seconds=1e-9))
        told = driven.submit(rbf(20, seconds=seconds))
        driven.run(seconds=1.0)
        histories.append(told.finished.history.records)
    assert len(histories[1]) == 7 and histories[0][:7] == histories[1]


def test_the_best_so_far_is_finished_and_the_finish_is_in_time():
    """Two steps of the finish take two seconds, and its image two: the search ends four seconds before the deadline."""
    driven = Driven(Hand(largest=1, seconds=1.0))
    told = driven.submit(rbf(40, finish=2, finalists=1, deadline=driven.clock() + 14.0))
    driven.run(seconds=1.0)
    assert told.finished.stopped == "deadline" and driven.clock() <= 1014.0
    records = told.finished.history.records
    assert [record.kind for record in records].count("finish") == 2 and len(records) == 12
    best_record = max(records[:-2], key=lambda record: (record.reward, record.level))
    assert records[-2].parent == best_record.index
    driven.assert_empty()


def test_a_deadline_counts_the_queue_and_seconds_do_not():
    driven = Driven(Hand(largest=4, seconds=1e-9), slots=4)
    first = driven.submit(bon(4))
    by_deadline = driven.submit(bon(4, deadline=driven.clock() + 5.0, seed=1))
    by_seconds = driven.submit(bon(4, seconds=5.0, seed=2))
    driven.settle()
    assert first.began and not by_deadline.began and not by_seconds.began
    driven.clock.now += 6.0
    driven.settle()
    assert isinstance(by_deadline.error, OutOfTime) and isinstance(by_deadline.error, TimeoutError)
    assert "deadline" in str(by_deadline.error) and by_seconds.error is None
    driven.run()
    assert first.finished.stopped == "budget" == by_seconds.finished.stopped
    assert by_seconds.finished.history.committed == 4
    driven.assert_empty()


def test_a_deadline_that_has_passed_is_out_of_time_at_once():
    clock = Clock()
    with engine(clock=clock) as made:
        job = made.submit(bon(deadline=clock() - 1.0))
        with pytest.raises(OutOfTime, match="the deadline of the request passed before it could begin: give it more"):
            job.result(PATIENCE)
        assert job.status == "failed"
        assert_sound(made)


def test_a_request_whose_time_ends_before_its_first_reward_ends_with_that():
    driven = Driven(Hand(largest=1, seconds=1e-9))
    told = driven.submit(rbf(12, seconds=5.0))
    driven.settle()
    driven.clock.now += 20.0
    driven.settle()
    assert told.finished is None and told.error is None
    driven.tick()
    assert stopped(told) == ("seconds", 1)
    driven.assert_empty()


def test_the_engine_stops_on_time_by_its_clock():
    clock, gate, calls = Clock(), Gate(), []

    def third_waits(images, prompts):
        calls.append(None)
        return gate(images, prompts) if len(calls) == 3 else brightness(images, prompts)

    with engine(clock=clock) as made:
        job = made.submit(rbf(40, seconds=2.0, reward=third_waits))
        assert gate.called.wait(PATIENCE)
        clock.pass_in(made, 2.0)
        gate.open.set()
        result = job.result(PATIENCE)
        assert result.stopped == "seconds" and 0 < result.committed_nfe < 40
        assert result.unspent_nfe == 40 - result.committed_nfe
        assert result.seconds == 2.0 == job.update.seconds
        judged = max(record.reward for record in result.history)
        assert result.reward == pytest.approx(judged, abs=1 / 255)
        assert_sound(made)


def test_a_cancelled_request_says_so_and_hands_out_its_best():
    driven = Driven(Hand(largest=1, seconds=1e-9))
    told = driven.submit(rbf(12))
    for _ in range(5):
        driven.tick(1.0)
    driven.cancel(told)
    assert told.error is not None and told.finished is None  # a row is with the device
    driven.run()
    assert told.finished.stopped == "cancelled" and told.finished.history.committed == 5
    driven.assert_empty()


def test_cancel_while_the_image_is_made_and_while_finalists_are_finished():
    driven = Driven(Hand(largest=1, seconds=1e-9))
    driven.device.hold_images = True
    told = driven.submit(bon(2))
    driven.run()
    driven.cancel(told)
    driven.device.show()
    driven.settle()
    assert told.error is not None and told.finished.outcome is not None
    driven.device.hold_images = False
    finishing = driven.submit(bon(8, finish=4, finalists=1, seed=1))
    for _ in range(6):
        driven.tick()
    driven.cancel(finishing)
    driven.run()
    assert finishing.error is not None and finishing.finished.history.committed < 8
    driven.assert_empty()


def own(nfe, steps):
    """A method of one's own, which knows of no time."""
    (particles,) = yield [Draw(None, 2)]
    for _ in range(nfe - 2):
        (more,) = yield [Draw(None, 1)]
        particles += more
    return best(particles)


@pytest.mark.parametrize("method", [*methods.names(), own])
def test_every_method_is_stopped_and_none_is_told(method):
    reward = FunctionReward(brightness)
    reward.differentiable = True
    options = {"method": method, "reward": reward, "steps": 4}
    driven = Driven(Hand(largest=4, seconds=1e-9))
    whole, short = driven.submit(rbf(40, **options)), driven.submit(rbf(40, seconds=4.5, seed=1, **options))
    driven.run(seconds=1.0)
    assert stopped(whole) == ("budget", 40)
    assert short.finished.stopped == "seconds" and 0 < short.finished.history.committed < 40
    driven.assert_empty()


def test_a_budget_of_time_alone_becomes_one_of_evaluations_by_the_measured_costs():
    """Batches of 4 take 0.4 s, so ten rows a second, of which a search is assumed to reach half."""

    def resize(nfe):
        asked.append(nfe)
        return plan(bon(nfe, seconds=20.0))

    asked, device = [], Hand(largest=4, seconds=0.1)
    driven = Driven(device)
    told = driven.submit(bon(100, seconds=20.0), resize=resize)
    driven.run()
    image = 2 * 0.1  # what is kept for it, as long as none was made
    assert asked == [int((20.0 - image) * 5)] and told.finished.history.committed == asked[0]

    class Slow(Hand):
        def answer(self):
            driven.clock.now += 1.0
            super().answer()

    driven = Driven(Slow(largest=4, seconds=0.1))
    driven.submit(bon(40))
    driven.run()  # ten seconds: four evaluations a second, which are now known
    asked.clear()
    told = driven.submit(bon(100, seconds=20.0), resize=resize)
    beside = driven.submit(bon(100, seconds=20.0, seed=1), resize=resize)
    driven.run()
    assert asked == [80, 40]  # the second shares the device with the first
    assert told.finished and beside.finished


def test_time_alone_is_a_budget_of_a_request(monkeypatch):
    clock = Clock()
    with engine(clock=clock, slots=4096) as made:
        pace, asked = made._host.loop.pace, []
        monkeypatch.setattr(
            pace, "affordable", lambda method, geometry, seconds, finish, company: asked.append(seconds) or 37
        )
        result = made.generate(bon(None, seconds=3.0))
        assert result.committed_nfe == 37 == result.request.nfe and asked == [3.0]
        assert made.generate(bon(None, deadline=clock() + 5.0, seconds=8.0)).committed_nfe == 37
        assert asked == [3.0, 5.0]
        assert made.generate(bon(6, seconds=3.0)).committed_nfe == 6 and len(asked) == 2  # both: nfe is the most


def test_a_time_that_pays_for_less_than_a_method_needs_gives_it_the_least_that_it_works_with(monkeypatch):
    def picky(nfe, steps):
        if nfe < 6:
            raise BudgetError(f"picky cannot work with nfe={nfe}: the smallest budget is 6", 6, "patience")
        return own(nfe, steps)

    with engine() as made:
        monkeypatch.setattr(made._host.loop.pace, "affordable", lambda *_: 1)
        assert made.generate(bon(None, seconds=3.0, method=picky)).committed_nfe == 6
        with pytest.raises(RequestError, match="the smallest budget is 6"):
            made.submit(bon(5, seconds=3.0, method=picky))


def frugal(nfe, steps):
    """Holds one particle of all that it draws."""
    ((kept,),) = yield [Draw(None)]
    for _ in range(nfe - 1):
        ((other,),) = yield [Draw(None)]
        kept = best([kept, other])
        del other
    return kept


def test_a_time_pays_for_more_evaluations_than_there_are_slots(monkeypatch):
    def holds(method, nfe, steps, finish=0, **options):
        return 2 if method is frugal else nfe

    monkeypatch.setattr(methods, "holds", holds)
    with engine(slots=32, clock=Clock()) as made:
        monkeypatch.setattr(made._host.loop.pace, "affordable", lambda *_: 50)
        assert made.generate(bon(None, seconds=3.0, method=frugal)).committed_nfe == 50
        assert made.generate(bon(None, seconds=3.0)).committed_nfe == 32  # which holds all that it draws
        assert_sound(made)


def test_a_request_that_is_over_is_not_kept_until_its_deadline():
    """Timers of a service's requests may lie hours ahead: they must hold none of them."""
    driven = Driven()
    told = driven.submit(bon(4, deadline=driven.clock() + 86_400, seconds=3_600.0))
    driven.run()
    assert told.finished
    held = [argument for *_, timer in driven.loop._timers._heap for argument in timer.args]
    assert not any(argument is driven.tickets[id(told)] for argument in held)


def test_rewards_that_arrive_after_the_end_are_dropped():
    driven = Driven(Hand(largest=1, lanes=2, seconds=1e-9))
    told = driven.submit(bon(12, seconds=3.0))
    driven.settle()
    assert len(driven.device.held) == 2
    driven.tick(1.0)
    rows, report = driven.device.held.pop()
    driven.clock.now += 3.0
    driven.settle()
    report(Free()), report(Landed(rows, [100.0] * len(rows)))
    driven.run()
    assert stopped(told) == ("seconds", 1)
    driven.assert_empty()


def test_all_ends_have_a_name():
    """The five values of `Result.stopped`, through the engine."""
    clock, ends = Clock(), {}
    with engine(clock=clock) as made:
        ends["budget"] = made.generate(rbf())
        ends["stop_at"] = made.generate(rbf(stop_at=-1.0))
        for name in ("seconds", "deadline", "cancelled"):
            options = {"seconds": {"seconds": 1.0}, "deadline": {"deadline": clock() + 1.0}}.get(name, {})
            reward = Lockstep()
            job = made.submit(rbf(400, reward=reward, **options))
            for update in reward.follow(job):
                if update.committed_nfe > 3 and name == "cancelled":
                    job.cancel()
                elif update.committed_nfe > 3:
                    clock.now += 1.0
            ends[name] = ended(job).best()
    assert {name: result.stopped for name, result in ends.items()} == {name: name for name in ends}
    assert SIZE.height == ends["cancelled"].image.height


def test_a_time_of_centuries_is_waited_for_in_pieces():
    with engine() as made:
        assert made.generate(rbf(seconds=1e9)).stopped == "budget"
        assert made.generate(rbf(deadline=1e12)).stopped == "budget"
        assert_sound(made)
    timers, called = Timers(), []
    for when in (math.inf, math.nan, 5.0, 1e30):
        timers.at(when, called.append, when)
    assert len(timers) == 2 and timers.wait(0.0, None) == 5.0 and timers.wait(0.0, 1.0) == 1.0
    timers.run(6.0)
    assert called == [5.0] and timers.wait(6.0, None) == LONGEST
