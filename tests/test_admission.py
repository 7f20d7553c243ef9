"""Who is let in, and when: promises of slots, the length of the queue, priorities, and no deadlock in any mix."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PATIENCE, Driven, Gate, Hand, Tiny, assert_sound, bon, brightness, engine, rbf

from rollflow import Draw, EngineBusy, RequestError, RollflowError, methods
from rollflow.admission import promise
from rollflow.plan import plan
from rollflow.schedule.scheduler import AGEING


def test_a_request_waits_until_its_promise_is_free_and_small_ones_run_together():
    driven = Driven(slots=12)
    first, second, third = (driven.submit(bon(6, seed=seed)) for seed in range(3))
    driven.settle()
    assert first.began and second.began and not third.began
    found = driven.loop.snapshot()
    assert (found.running, found.queued, found.promised) == (2, 1, 12)
    driven.run()
    assert all(told.finished for told in (first, second, third))
    driven.assert_empty()


def hoard(nfe, steps):
    """A method that keeps all it draws, and declares nothing."""
    (particles,) = yield [Draw(None, nfe)]
    return particles[0]


def test_a_promise_is_what_the_method_holds(monkeypatch):
    """An `nfe` of thousands waits for no more slots than its method can hold at once."""
    monkeypatch.setattr(methods, "holds", lambda method, nfe, steps, finish=0, **options: 5)
    request = plan(rbf(3_000))
    assert promise(request) == 5 + request.finalists + 1
    driven = Driven(slots=2 * promise(request))
    told = [driven.submit(rbf(3_000, seed=seed)) for seed in range(3)]
    driven.settle()
    assert [one.began for one in told] == [True, True, False]


def test_what_can_never_be_held_is_refused_at_the_door():
    with engine(slots=8) as made:
        with pytest.raises(RequestError, match="this engine holds 8 of this size; lower it, or make the engine with"):
            made.submit(bon(9, method=hoard))
        assert_sound(made)


def test_a_method_that_holds_more_than_it_declared_fails_alone_and_soon(monkeypatch):
    """It does not wait for a slot until its deadline, nor does anybody else."""

    def greedy(nfe, steps):
        (first,) = yield [Draw(None, nfe)]
        return first[0]

    monkeypatch.setattr(methods, "holds", lambda method, nfe, *_, **options: 1 if method is greedy else nfe)
    driven = Driven(slots=8)
    far = driven.clock() + 86_400
    told = driven.submit(bon(40, method=greedy, deadline=far))
    other = driven.submit(bon(2, seed=1, deadline=far))
    driven.run()
    assert isinstance(told.error, RollflowError) and "holds more particles than it declared" in str(told.error)
    assert other.finished
    driven.assert_empty()


def test_an_engine_with_a_full_queue_is_busy_and_says_for_how_long():
    driven = Driven(slots=4, max_queued=2)
    running = driven.submit(bon(4))
    driven.settle()
    queued = [driven.submit(bon(4, seed=seed)) for seed in (1, 2)]
    driven.settle()
    with pytest.raises(EngineBusy, match="2 requests wait already, as many as max_queued allows: come again") as found:
        driven.submit(bon(4))
    assert found.value.seconds == pytest.approx(12 / (0.5 * 1.0))  # one row a second, of which half is assumed
    driven.tick(4.0)
    driven.tick(4.0)  # two of three are over: one row a second, as was measured
    assert running.finished and queued[0].finished
    driven.submit(bon(4, seed=3)), driven.settle()
    driven.submit(bon(4, seed=4)), driven.settle()
    with pytest.raises(EngineBusy) as found:
        driven.submit(bon(4))
    assert found.value.seconds == pytest.approx(12 / (8 / 4.0), rel=0.01)
    driven.run()
    driven.assert_empty()


def test_submit_of_a_busy_engine_raises_and_generate_and_map_wait(monkeypatch):
    gate = Gate()
    with engine(slots=4, max_queued=1) as made:
        first = made.submit(bon(reward=gate))
        assert gate.called.wait(PATIENCE)
        second = made.submit(bon())
        with pytest.raises(EngineBusy) as found:
            made.submit(bon())
        assert found.value.seconds > 0 and str(found.value).startswith("1 requests wait already")
        second.cancel()
        assert second.best(PATIENCE) is None
        third = made.submit(bon(seed=3))  # the place of the second
        gate.open.set()
        assert [job.result(PATIENCE).committed_nfe for job in (first, third)] == [4, 4]
        assert len(made.generate([bon(seed=seed) for seed in range(5)])) == 5
        assert len([*made.map([bon(seed=seed) for seed in range(5)], concurrency=4)]) == 5
        assert_sound(made)


def test_a_higher_priority_goes_first_in_the_queue():
    driven = Driven(slots=4)
    told = [driven.submit(bon(4, seed=seed, priority=priority)) for seed, priority in enumerate([0, 0, 3, 1, 3])]
    driven.run()
    served = [driven.device.served[i] for i in range(0, 20, 4)]
    assert served == [2, 4, 3, 0, 1] and all(one.finished for one in told)


def test_a_higher_priority_goes_first_on_the_device():
    driven = Driven(Hand(largest=2))
    driven.submit(bon(4, seed=0)), driven.settle()
    driven.submit(bon(4, seed=1)), driven.submit(bon(4, seed=2, priority=1))
    driven.run()
    assert driven.device.served[:2] == [0, 0] and driven.device.served[2:6] == [2, 2, 2, 2]


def test_a_request_that_starves_ages():
    """Against a stream of requests of a higher priority, it waits `AGEING` seconds for each step of it, no longer."""
    driven = Driven(slots=4)
    low = driven.submit(bon(4, seed=99, priority=0))
    waited = 0.0
    driven.submit(bon(4, priority=3))
    driven.loop.step(0)
    while not low.finished and waited < 100 * AGEING:
        driven.submit(bon(4, priority=3))
        driven.tick(1.0)
        waited += 1.0
    assert 2 * AGEING < waited <= 3 * AGEING + 3


def test_a_request_that_waits_for_slots_is_not_overtaken_by_smaller_ones():
    driven = Driven(slots=8)
    small = driven.submit(bon(6, method=hoard))
    driven.settle()
    large = driven.submit(bon(8, seed=1, method=hoard))
    late = driven.submit(bon(2, seed=2, method=hoard))  # would fit beside the first, and would let the large one wait
    driven.settle()
    assert small.began and not large.began and not late.began
    driven.run()
    assert driven.device.served == [0] * 6 + [1] * 8 + [2] * 2


def test_who_is_cancelled_in_line_is_not_kept_while_its_head_waits():
    driven = Driven(slots=4)
    running, head, last = driven.submit(bon(4)), driven.submit(bon(4, seed=1)), driven.submit(bon(4, seed=2))
    driven.settle()
    for seed in range(100):
        driven.cancel(driven.submit(bon(4, seed=seed)))
        (line,) = driven.loop._admission._lines.values()
        assert len(line) <= 4  # the two that wait, and no more others than these
    driven.run()
    assert running.finished and head.finished and last.finished and driven.device.served[4::4] == [1, 2]
    driven.assert_empty()


def test_no_memory_for_the_pool_fails_the_request_alone():
    class Full(Hand):
        full = True

        def allocate(self, geometry, slots):
            if self.full:
                raise MemoryError("no more")

    driven = Driven(Full())
    told = driven.submit(bon(4))
    driven.run()
    assert isinstance(told.error, RollflowError) and isinstance(told.error.__cause__, MemoryError)
    assert "8x8" in str(told.error) and "Engine(slots=...)" in str(told.error)
    driven.device.full = False
    again = driven.submit(bon(4))
    driven.run()
    assert again.finished
    driven.assert_empty()


def test_a_prompt_that_was_forgotten_while_its_request_waited_is_encoded_again(monkeypatch):
    monkeypatch.setattr("rollflow.preparing.ENCODED_PROMPTS", 2)
    encoded = []

    class Listening(Tiny):
        def encode(self, prompts):
            encoded.extend(prompts)
            return super().encode(prompts)

    gate = Gate()
    with engine(Listening(), slots=4) as made:
        first = made.submit(bon(reward=gate))
        assert gate.called.wait(PATIENCE)
        jobs = [made.submit(f"prompt {i}", method="bon", steps=1, nfe=4, reward=gate) for i in range(8)]
        made.encode("the last")  # by now all of them are encoded, and wait for the slots of the first
        assert {*encoded} >= {f"prompt {i}" for i in range(8)}
        made.forget_prompts()
        gate.open.set()
        assert all(job.result(PATIENCE).committed_nfe == 4 for job in (first, *jobs))
        assert_sound(made)


def test_a_burst_of_prompts_leaves_no_more_encodings_than_are_kept(monkeypatch):
    monkeypatch.setattr("rollflow.preparing.ENCODED_PROMPTS", 2)
    gate = Gate()

    class Waiting(Tiny):
        def encode(self, prompts):
            gate.called.set()
            assert gate.open.wait(PATIENCE)
            return super().encode(prompts)

    with engine(Waiting()) as made:
        jobs = [made.submit(f"prompt {i}", method="bon", steps=1, nfe=4, reward=brightness) for i in range(8)]
        assert gate.called.wait(PATIENCE) and made.stats().queued == 8  # all have asked
        gate.open.set()
        assert all(job.result(PATIENCE).committed_nfe == 4 for job in jobs)
        assert len(made._host.preparations.conditioning) == 2
        assert_sound(made)


@settings(max_examples=25)
@given(
    requests=st.lists(
        st.tuples(
            st.sampled_from(["rbf", "bon", "svdd", "threshold", "sprout", "smc", "beam"]),
            st.integers(16, 40),
            st.integers(-2, 2),
            st.sampled_from([0, 0, 2]),
            st.sampled_from([None, None, 3.0, 30.0]),
            st.integers(-1, 6),
        ),
        min_size=1,
        max_size=6,
    ),
    spare=st.integers(0, 30),
    lanes=st.integers(1, 3),
)
def test_no_mix_deadlocks(requests, spare, lanes):
    """Whatever is asked, cancelled and timed, on a pool that just holds the largest: all end, and all comes back."""
    asked = [
        rbf(nfe, method=method, priority=priority, finish=finish, finalists=1, seconds=seconds, seed=i)
        for i, (method, nfe, priority, finish, seconds, _) in enumerate(requests)
    ]
    slots = max(promise(plan(request)) for request in asked) + spare
    driven = Driven(Hand(lanes=lanes, largest=8), slots=slots)
    told = [driven.submit(request) for request in asked]
    driven.settle()
    for tick in range(2_000):
        for one, (*_, cancelled) in zip(told, requests, strict=True):
            if cancelled == tick:
                driven.cancel(one)
        if not driven.device.held:
            break
        driven.tick(1.0)
    assert all(one.finished or one.error for one in told)
    driven.assert_empty()
