"""The life of an engine: it opens, closes, is dropped or forked, and leaves nothing behind."""

import gc
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from tiny import PATIENCE, SIZE, Clock, Driven, Gate, Tiny, assert_sound, bon, engine, rbf

from rollflow import Cancelled, Engine, EngineClosed
from rollflow.models import Capabilities


@pytest.fixture
def gate():
    made = Gate()
    yield made
    made.open.set()


def own_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("rollflow")]


def assert_over(made):
    """A closed engine holds no thread and no memory, and takes no work."""
    assert not any(thread.is_alive() for thread in [*made.lanes.alive, made._host._thread] if thread is not None)
    assert made.stats().healthy is False
    for door in (made.submit, made.generate, lambda request: next(made.map([request]))):
        with pytest.raises(EngineClosed, match="the engine was closed: make a new one"):
            door(bon())
    with pytest.raises(EngineClosed):
        made.encode(["something else"])
    assert made.stats().live == made.stats().promised == made.stats().rows == made.stats().free == 0
    assert not made._host.runner._storage


def test_the_end_of_a_block_finishes_what_is_there():
    with engine() as made:
        assert made.stats().healthy
        jobs = [made.submit(rbf(seed=seed)) for seed in range(4)]
    assert [job.status for job in jobs] == ["done"] * 4
    assert_over(made)


def test_an_error_in_a_block_cancels_what_is_there(gate):
    with pytest.raises(KeyError), engine() as made:
        job = made.submit(rbf(reward=gate))
        assert gate.called.wait(PATIENCE)
        gate.open.set()
        raise KeyError
    assert job.status in ("cancelled", "done") and job.done()
    assert_over(made)


def test_close_cancels_what_is_there_unless_it_drains(gate):
    made = engine(slots=8)
    running, queued = made.submit(bon(8, reward=gate)), made.submit(bon(8))
    assert gate.called.wait(PATIENCE)
    closing = threading.Thread(target=made.close, args=[False])
    closing.start()
    with pytest.raises(Cancelled, match="closed"):
        queued.result(PATIENCE)  # at once, while the other's reward is still being waited for
    gate.open.set()
    with pytest.raises(Cancelled):
        running.result(PATIENCE)
    closing.join(PATIENCE)
    assert_over(made)


def test_a_drain_may_be_cut_short(gate):
    made = engine(slots=8)
    running, queued = made.submit(bon(8, reward=gate)), made.submit(bon(8))
    assert gate.called.wait(PATIENCE)
    drains = threading.Thread(target=made.close, args=[True])
    drains.start()
    while made.stats().healthy:  # until it has begun to close
        pass
    assert not queued.done()
    cuts = threading.Thread(target=made.close, args=[False])
    cuts.start()
    with pytest.raises(Cancelled):
        queued.result(PATIENCE)
    gate.open.set()
    for thread in (drains, cuts):
        thread.join(PATIENCE)
    assert running.done()
    assert_over(made)


def test_close_is_idempotent_and_may_come_from_several_threads():
    made, ready = engine(), threading.Barrier(5)
    job = made.submit(rbf(20))

    def close():
        ready.wait(PATIENCE)
        made.close()

    threads = [threading.Thread(target=close) for _ in range(4)]
    for thread in threads:
        thread.start()
    ready.wait(PATIENCE)
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert job.status == "done"
    made.close()
    made.close(drain=False)
    assert_over(made)
    unused = engine()
    unused.close()
    unused.close()
    assert_over(unused)


def test_close_from_a_callback_or_a_reward_does_not_wait_for_itself():
    for drain in (True, False):
        made = engine()
        job = made.submit(bon())
        job.add_done_callback(lambda job, made=made, drain=drain: made.close(drain))
        assert job.result(PATIENCE).committed_nfe == 4
        made.close()
        assert_over(made)

    def closes(images, prompts):
        made.close()
        return images.mean((1, 2, 3))

    made = engine()
    assert made.generate(rbf(reward=closes)).committed_nfe == 12  # it drains
    made.close()
    assert_over(made)


def test_close_does_not_wait_for_a_reward_that_never_answers(gate, monkeypatch, caplog):
    monkeypatch.setattr("rollflow.host.CLOSING", 0.0)
    clock = Clock()
    made = engine(clock=clock)
    job = made.submit(bon(reward=gate))
    assert gate.called.wait(PATIENCE)
    closing = threading.Thread(target=made.close, args=[False])
    closing.start()
    while made.stats().healthy:
        pass
    clock.pass_in(made, 60.0)
    closing.join(PATIENCE)
    assert not closing.is_alive() and job.cancelled() and job.best(PATIENCE) is None
    assert "threads of a closed engine are still in calls" in caplog.text
    threads = made.lanes.alive
    gate.open.set()  # it comes back after all
    for thread in threads:
        thread.join(PATIENCE)
    assert_over(made)


@pytest.mark.parametrize("drain", [True, False])
def test_close_at_every_update(drain):
    """Whenever it comes, every request ends, and everything is given back."""
    count = len([None for _ in engine().submit(rbf(10))])
    for k in range(count + 1):
        made = engine()
        job, other = made.submit(rbf(10)), made.submit(rbf(30, seed=1))
        for i, _ in enumerate(job):
            if i == k:
                break
        made.close(drain)
        assert job.done() and other.done()
        assert {job.status, other.status} <= ({"done"} if drain else {"done", "cancelled"})
        assert_over(made)


def test_a_request_that_comes_while_the_engine_closes_is_served_or_refused():
    """It never waits for ever: the loop answers what came before its end, and refuses what comes after it."""
    driven = Driven()
    before = driven.submit(bon())
    driven.loop.close(drain=True)
    at_the_end = driven.submit(bon())
    driven.run()
    assert driven.loop.step(0) is False
    assert before.finished and isinstance(at_the_end.error, EngineClosed)
    with pytest.raises(EngineClosed):
        driven.submit(bon())
    assert driven.loop.snapshot().queued == 0
    peeked = []
    driven.loop.peek(driven.tickets[id(before)], lambda image, error: peeked.append((image, error)))
    assert peeked == [(None, None)]


def test_many_threads_that_submit_while_the_engine_closes():
    made, ready = engine(), threading.Barrier(4)
    jobs, refused = [], []

    def submits(seed):
        ready.wait(PATIENCE)
        try:
            while True:
                jobs.append(made.submit(bon(seed=seed)))
        except EngineClosed as error:
            refused.append(error)

    threads = [threading.Thread(target=submits, args=[seed]) for seed in range(3)]
    for thread in threads:
        thread.start()
    ready.wait(PATIENCE)
    while not jobs:
        pass
    made.close(drain=False)
    for thread in threads:
        thread.join(PATIENCE)
    assert len(refused) == 3
    for job in jobs:
        assert isinstance(job.exception(PATIENCE), EngineClosed | Cancelled | None)
    assert_over(made)


def open_files():
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def test_a_hundred_cycles_leave_no_threads_files_or_memory():
    gc.collect()
    threads, files, seen = threading.active_count(), open_files(), []
    for i in range(100):
        with engine() as made:
            result = made.generate(bon(seed=i))
            parts = (made, made._host.loop, made._host.runner, made.model, result, made._host.runner.storage(SIZE))
            seen += map(weakref.ref, parts)
        del made, result, parts
    gc.collect()
    assert threading.active_count() == threads
    assert open_files() <= files
    assert not [part for part in seen if part() is not None]


def test_an_engine_that_is_dropped_ends_its_threads():
    gc.collect()
    before = {*own_threads()}
    made = engine()
    made.generate(bon())
    unused = engine()
    threads = [thread for thread in own_threads() if thread not in before]
    assert len(threads) == len(made.lanes.alive) + 2 + len(unused.lanes.alive)
    del made, unused
    gc.collect()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_whoever_drops_an_engine_does_not_wait_for_its_threads(gate, monkeypatch):
    monkeypatch.setattr("rollflow.host.CLOSING", PATIENCE)
    made, called = engine(), threading.Event()
    job = made.submit(bon())
    assert job.result(PATIENCE).committed_nfe == 4

    def waits(job):
        called.set()
        gate.open.wait(PATIENCE)

    made.submit(bon()).add_done_callback(waits)
    assert called.wait(PATIENCE)
    made.stats()  # by now nothing of the request is left
    loop = made._host._thread
    del made, job
    gc.collect()
    assert loop.is_alive()  # it waits for the callback, and nobody for it
    gate.open.set()
    loop.join(PATIENCE)
    assert not loop.is_alive()


class Measured(Tiny):
    """A model that can be measured, and says when it is called first, and answers when it is let go."""

    def __init__(self, gate, signature):
        self.gate, self.capabilities, self.calls = gate, Capabilities(signature=signature), 0

    def velocity(self, x, tau, conditioning, guidance, geometry):
        self.calls += 1
        self.gate.called.set()
        assert self.gate.open.wait(PATIENCE)
        return super().velocity(x, tau, conditioning, guidance, geometry)


def test_while_lanes_are_chosen_the_engine_answers(gate):
    """The first measurement takes its time; meanwhile requests are cancelled, and `stats` and `close` are served."""
    made = Engine(Measured(gate, "answers"))
    job, other = made.submit(bon()), made.submit(bon())
    assert gate.called.wait(PATIENCE)
    found = []
    asks = threading.Thread(target=lambda: found.append(made.stats()), daemon=True)
    asks.start()
    asks.join(PATIENCE)
    assert found and found[0].queued == 2
    assert job.cancel() and job.best(PATIENCE) is None
    gate.open.set()
    assert other.result(PATIENCE).committed_nfe == 4
    assert made.buckets()
    made.close()
    assert_over(made)


def test_an_engine_that_closes_measures_no_more(gate):
    made = Engine(Measured(gate, "closes"))
    job = made.submit(bon())
    assert gate.called.wait(PATIENCE)
    closing = threading.Thread(target=made.close, args=[False])
    closing.start()
    with pytest.raises(Cancelled):
        job.result(PATIENCE)
    gate.open.set()
    closing.join(PATIENCE)
    assert_over(made)
    assert made.model.calls == 1


def test_who_waits_for_an_encoding_that_never_comes_is_told_of_the_end(gate, monkeypatch):
    monkeypatch.setattr("rollflow.host.CLOSING", 0.0)

    class Hangs(Tiny):
        def encode(self, prompts):
            return [float(one) for one in gate(torch.zeros(len(prompts), 3, 1, 1), prompts)]

    clock, errors = Clock(), []
    made = engine(Hangs(), clock=clock)

    def encodes():
        try:
            made.encode("a")
        except EngineClosed as error:
            errors.append(error)

    waits, closing = threading.Thread(target=encodes, daemon=True), threading.Thread(target=made.close, args=[False])
    waits.start()
    assert gate.called.wait(PATIENCE)
    closing.start()
    while made.stats().healthy:
        pass
    clock.pass_in(made, 60.0)
    for thread in (closing, waits):
        thread.join(PATIENCE)
    assert len(errors) == 1


def test_a_callback_that_hangs_is_told_of_when_its_engine_closes(gate, monkeypatch, caplog):
    monkeypatch.setattr("rollflow.host.CLOSING", 0.2)
    called = threading.Event()
    with engine() as made:
        made.submit(bon()).add_done_callback(lambda job: (called.set(), gate.open.wait(PATIENCE)))
        assert called.wait(PATIENCE)
    assert "threads of a closed engine are still in calls" in caplog.text


def test_an_idle_engine_does_nothing():
    """Not one step of its loop, once it has answered: it waits for its inbox and for no time."""
    with engine() as made:
        made.generate([bon(), rbf(deadline=made.clock() + 10_000)])
        made.stats()
        loop, steps = made._host.loop, []
        receive = loop._receive
        loop._receive = lambda wait: (steps.append(wait), receive(wait))
        made.stats()  # wakes it once, to notice the above
        made.stats()
        here = len(steps)
        waited = threading.Event()
        waited.wait(0.3)
        assert len(steps) == here  # it is where it was
        made.stats()
        assert len(steps) == here + 1
        del loop._receive


def test_stats_tell_what_the_engine_holds(gate):
    with engine(slots=16) as made:
        empty = made.stats()
        assert (empty.queued, empty.running, empty.rows, empty.live, empty.promised, empty.free) == (0,) * 6
        assert empty.healthy and empty.abandoned == 0 and empty.nfe_per_second == 0
        jobs = [made.submit(bon(8, reward=gate, seed=seed)) for seed in range(3)]
        assert gate.called.wait(PATIENCE)
        while (now := made.stats()).rows < 16:  # the second batch is posted when the first has left the lane
            pass
        assert (now.queued, now.running, now.rows) == (1, 2, 16)
        assert (now.live, now.promised, now.free) == (16, 16, 0)
        gate.open.set()
        for job in jobs:
            job.result()
        after = made.stats()
        assert (after.queued, after.running, after.rows, after.live, after.promised, after.free) == (0, 0, 0, 0, 0, 16)
        assert after.nfe_per_second > 0 and after.buckets == {}
        assert_sound(made)
    assert not made.stats().healthy


def test_stats_of_the_rate_follow_the_clock():
    driven = Driven()
    driven.submit(bon(4))
    driven.settle()
    driven.clock.now += 2.0
    driven.run()
    assert driven.loop.snapshot().nfe_per_second == pytest.approx(4 / 1e-3)  # all of it in this instant
    driven.clock.now += 4.0
    assert driven.loop.snapshot().nfe_per_second == pytest.approx(1.0, rel=1e-2)
    driven.clock.now += 7.0
    assert driven.loop.snapshot().nfe_per_second == 0.0  # longer ago than the window


CHILD = """
import os, sys, threading
sys.path.insert(0, sys.argv[1])
from tiny import Gate, bon, engine, rbf
from rollflow import RollflowError

made, gate = engine(), Gate()
assert made.generate(bon()).committed_nfe == 4
job = made.submit(rbf(reward=gate))
assert gate.called.wait(30)
if hasattr(os, "fork"):
    child = os.fork()
    if child == 0:
        doors = [lambda: made.submit(bon()), lambda: made.generate(bon()), job.result, lambda: next(made.map(["a"])),
                 lambda: made.encode("b"), made.stats, lambda: list(job), lambda: job.best()]
        for i, door in enumerate(doors):
            try:
                door()
            except RollflowError as error:
                assert "after a fork" in str(error) and "make an engine in the child" in str(error), error
            else:
                os._exit(10 + i)
        made.close()
        os._exit(0)
    print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
made.submit(rbf(4_000, reward=gate))
gate.open.set()
print("end", len(threading.enumerate()) > 1)
"""


def test_the_end_of_the_interpreter_ends_running_requests_and_a_fork_is_told():
    """The script ends while two requests run; its fork is told at every door that the engine is not its own."""
    here = os.path.dirname(os.path.abspath(__file__))
    found = subprocess.run([sys.executable, "-c", CHILD, here], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split("\n")[-2] == "end True"
    assert not hasattr(os, "fork") or "child 0" in found.stdout, found.stdout + found.stderr
    assert "Traceback" not in found.stderr, found.stderr
