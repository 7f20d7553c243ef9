"""A job: its states, its result, its updates and its end, for threads."""

import concurrent.futures
import gc
import itertools
import logging
import pickle
import queue
import threading
import weakref

import pytest
import torch
from tiny import PATIENCE, Clock, Gate, Lockstep, Tiny, assert_sound, bon, brightness, ended, engine, fingerprint, rbf

import rollflow
from rollflow import Cancelled, Draw, EngineBusy, FunctionError, Job, RollflowError
from rollflow.callbacks import MOST


@pytest.fixture(scope="module")
def shared():
    with engine() as made:
        yield made


@pytest.fixture
def gate():
    """A reward that every test lets go in the end, so that none keeps the engine busy."""
    made = Gate(closed=True)
    yield made
    made.open.set()


def test_submit_returns_while_the_request_waits_and_the_job_says_how_it_is(shared, gate):
    job = shared.submit(rbf(reward=gate), id="mine")
    assert isinstance(job, Job) and job.id == "mine" and job.request.nfe == 12
    assert gate.called.wait(PATIENCE)
    assert job.status == "running" and job.running() and not job.done() and not job.cancelled()
    gate.open.set()
    assert job.result().committed_nfe == 12
    assert job.status == "done" and job.done() and not job.running() and not job.cancelled()
    assert job.result() is job.result() is job.best()
    assert job.exception() is None


def test_jobs_have_numbers_of_their_own_and_take_a_prompt_with_options(shared):
    jobs = [shared.submit("a", reward=brightness, method="bon", steps=1, nfe=4, seed=i) for i in range(2)]
    assert jobs[0].id != jobs[1].id
    assert [job.result().request.seed for job in jobs] == [0, 1]


def test_a_job_that_waits_for_a_slot_is_queued(gate):
    with engine(slots=8) as small:
        first = small.submit(bon(8, reward=gate))
        assert gate.called.wait(PATIENCE)
        second = small.submit(bon(8))
        assert small.stats().queued == 1 and second.status == "queued" and second.update is None
        gate.open.set()
        assert first.result().committed_nfe == second.result().committed_nfe == 8


def test_a_timeout_is_an_error_of_the_wait_and_the_job_goes_on(shared, gate):
    job = shared.submit(bon(reward=gate))
    for wait in (job.result, job.exception, job.best):
        with pytest.raises(TimeoutError, match="it goes on"):
            wait(timeout=0)
    gate.open.set()
    assert job.result(PATIENCE).committed_nfe == 4


def test_result_raises_the_requests_own_error_with_its_cause(shared):
    def ill(images, prompts):
        raise ValueError("the judge is ill")

    job = shared.submit(bon(reward=ill))
    with pytest.raises(FunctionError, match="the reward ill raised ValueError for 4 images: the judge is ill") as found:
        job.result()
    assert isinstance(found.value.__cause__, ValueError)
    assert job.exception() is found.value and job.status == "failed" and job.done() and not job.cancelled()
    with pytest.raises(FunctionError):
        job.best()
    assert not job.cancel()
    assert_sound(shared)


def test_cancel_says_whether_it_came_in_time(shared, gate):
    job = shared.submit(rbf(reward=gate))
    assert gate.called.wait(PATIENCE)
    assert job.cancel() is True
    assert job.status == "cancelled" and job.cancelled() and job.done()
    assert job.cancel() is False
    with pytest.raises(Cancelled, match="was cancelled"):
        job.result()
    with pytest.raises(concurrent.futures.CancelledError):  # as of a future
        job.result()
    gate.open.set()
    ended(job)
    assert_sound(shared)
    over = shared.submit(bon())
    over.result()
    assert over.cancel() is False and over.status == "done" and over.result().committed_nfe == 4


def test_what_a_job_waits_with_cannot_be_ended_by_others(shared, gate):
    """Only `Job.cancel` ends a job: else the loop could not tell it its result."""
    job, early = shared.submit(bon(reward=gate)), shared.submit(bon(reward=gate, seed=1))
    assert not hasattr(job, "future")
    assert job._future.cancel() is False and not job.done()
    early._future.set_exception(ValueError("from elsewhere"))
    gate.open.set()
    assert job.result(PATIENCE).committed_nfe == early.best(PATIENCE).committed_nfe == 4
    assert_sound(shared)


def test_the_seconds_of_a_cancelled_job_stand_when_it_is_over_before_its_cancel_returns(gate, monkeypatch):
    clock = Clock()
    with engine(clock=clock) as made:
        job = made.submit(rbf(reward=gate))
        assert gate.called.wait(PATIENCE)
        clock.pass_in(made, 5.0)
        cancel = made._host.cancel

        def cancel_and_wait(ticket):
            cancel(ticket)
            gate.open.set()
            ended(job)
            made.stats()  # by now nothing of it is left

        monkeypatch.setattr(made._host, "cancel", cancel_and_wait)
        assert job.cancel() and job.update.seconds == 5.0


def test_a_queued_job_is_cancelled_at_once(gate):
    with engine(slots=8) as small:
        first = small.submit(bon(8, reward=gate))
        second = small.submit(bon(8))
        assert gate.called.wait(PATIENCE)
        assert second.cancel() and second.best(PATIENCE) is None  # while the first still holds every slot
        assert small.stats().queued == 0
        gate.open.set()
        first.result()
        assert_sound(small)


def test_a_cancelled_job_hands_out_the_best_that_it_had(shared):
    alone = shared.generate(rbf(40)).history
    reward = Lockstep()
    for update in reward.follow(job := shared.submit(rbf(40, reward=reward))):
        if update.committed_nfe >= 8:
            job.cancel()
    with pytest.raises(Cancelled):
        job.result()
    best = job.best()
    assert best.stopped == "cancelled" and 8 <= best.committed_nfe < 40
    assert best.history == alone[: len(best.history)]
    assert best.reward == pytest.approx(max(record.reward for record in best.history), abs=1 / 255)
    assert job.update.image() == best.image
    assert_sound(shared)


def test_a_job_cancelled_before_its_first_reward_has_no_best(shared, gate):
    job = shared.submit(bon(reward=gate))
    assert gate.called.wait(PATIENCE) and job.cancel()
    gate.open.set()
    assert job.best() is None and job.update.image() is None
    assert_sound(shared)


def test_callbacks_are_called_once_whenever_they_were_added(shared, gate, caplog):
    called, all_called = [], threading.Event()

    def note(job):
        called.append((job.id, job.status, job.result().committed_nfe))

    def ill(job):
        raise ValueError("the callback is ill")

    job = shared.submit(bon(reward=gate), id=7)
    job.add_done_callback(note)
    job.add_done_callback(ill)
    job.add_done_callback(note)
    job.add_done_callback(lambda job: all_called.set())
    assert called == []
    with caplog.at_level(logging.ERROR, "rollflow"):
        gate.open.set()
        assert all_called.wait(PATIENCE)
        assert called == [(7, "done", 4)] * 2  # in the order in which they were added
        job.add_done_callback(ill)
        job.add_done_callback(note)  # of a job that is over: at once
    assert len(called) == 3
    assert [record.getMessage() for record in caplog.records] == ["a callback of the job 7 raised"] * 2
    assert_sound(shared)


def test_a_callback_that_exits_ends_neither_the_engine_nor_its_thread(shared, gate):
    after = threading.Event()
    job = shared.submit(bon(reward=gate))
    job.add_done_callback(lambda job: (_ for _ in ()).throw(SystemExit(1)))
    job.add_done_callback(lambda job: after.set())
    gate.open.set()
    assert after.wait(PATIENCE)
    assert_sound(shared)
    with pytest.raises(SystemExit):  # on the caller's own thread it is his
        job.add_done_callback(lambda job: (_ for _ in ()).throw(SystemExit(1)))


def test_callbacks_of_a_cancelled_and_of_a_failed_job(shared, gate):
    called = queue.SimpleQueue()

    def note(job):
        called.put((job.status, threading.current_thread()))

    cancelled = shared.submit(bon(reward=gate))
    cancelled.add_done_callback(note)
    cancelled.cancel()
    status, thread = called.get(timeout=PATIENCE)
    assert status == "cancelled" and thread is not threading.current_thread()  # who cancels waits for no callback
    gate.open.set()
    failed = shared.submit(bon(reward=lambda images, prompts: 1 / 0))
    failed.add_done_callback(note)
    assert called.get(timeout=PATIENCE)[0] == "failed"


def test_a_slow_callback_holds_up_those_of_its_own_job_alone(shared, gate):
    order, slow, others, last = [], threading.Event(), threading.Event(), threading.Event()

    def waits(job):
        slow.set()
        order.append(others.wait(PATIENCE))

    job = shared.submit(bon(reward=gate))
    job.add_done_callback(waits)
    job.add_done_callback(lambda job: (order.append(job.id), last.set()))
    gate.open.set()
    assert slow.wait(PATIENCE)
    for seed in range(3):
        over = threading.Event()
        shared.submit(bon(seed=seed)).add_done_callback(lambda job, over=over: over.set())
        assert over.wait(PATIENCE)
    assert order == []
    others.set()
    assert last.wait(PATIENCE) and order == [True, job.id]


def test_callbacks_that_hang_leave_no_more_threads_than_are_allowed(gate):
    called, over = [], threading.Event()

    def waits(job):
        called.append(job)
        assert gate.open.wait(PATIENCE)
        if len(called) == 12:
            over.set()

    with engine() as made:
        for seed in range(12):
            made.submit(bon(seed=seed)).add_done_callback(waits)
        while len(called) < MOST or made.stats().running or made.stats().queued:
            pass
        assert len(called) == MOST == len(made._host._callbacks.threads)
        gate.open.set()
        assert over.wait(PATIENCE)


def test_updates_come_as_rewards_do_and_end_with_the_last(shared):
    reward = Lockstep()
    job = shared.submit(rbf(30, reward=reward))
    updates = list(reward.follow(job))
    spent = [update.committed_nfe for update in updates]
    assert spent == sorted(spent) and spent[-1] == 30 and len({*spent}) > 3
    last, result = updates[-1], job.result()
    assert last.executed_nfe == result.executed_nfe and last.level == result.history[-1].level == 3
    assert last.best_reward == max(record.reward for record in result.history)
    assert 0 <= updates[0].seconds <= last.seconds and last.job is job
    assert all(a.best_reward <= b.best_reward for a, b in itertools.pairwise(updates))
    assert [update.committed_nfe for update in job] == [30]  # of a job that is over: the last


def test_updates_coalesce_and_a_slow_or_vanished_reader_holds_up_nobody(shared, gate):
    job = shared.submit(rbf(40, reward=gate))
    slow, vanished = iter(job), iter(job)
    next(slow), next(vanished)
    del vanished
    gate.open.set()
    assert job.result(PATIENCE).committed_nfe == 40  # nobody reads meanwhile
    left = [update.committed_nfe for update in slow]
    assert left == [40]


def test_the_last_update_is_delivered_however_the_job_ends(shared):
    calls = []

    def fails_later(images, prompts):
        calls.append(len(images))
        if len(calls) == 3:
            raise ValueError("ill")
        return images.mean((1, 2, 3))

    job = shared.submit(rbf(reward=fails_later))
    updates = list(job)
    assert job.status == "failed" and updates[-1] == job.update and updates[-1].committed_nfe >= 1
    cancelled = shared.submit(rbf(40))
    seen = [(update, cancelled.cancel())[0] for update in cancelled]
    assert cancelled.status == "cancelled" and seen[-1].seconds == cancelled.update.seconds


def plain(nfe, steps):
    """A method of two turns, none of whose rows runs ahead."""
    (first,) = yield [Draw(None, nfe // 2)]
    (second,) = yield [Draw(first[0], nfe - nfe // 2)]
    return max(first + second, key=lambda particle: particle.reward)


def test_an_update_decodes_the_best_so_far_when_it_is_asked(shared):
    decoded = []

    class Counting(Tiny):
        def decode(self, latents):
            decoded.append(len(latents))
            return super().decode(latents)

    gate, calls = Gate(), []

    def second_waits(images, prompts):
        calls.append(None)
        return gate(images, prompts) if len(calls) == 2 else brightness(images, prompts)

    with engine(Counting()) as own:
        job = own.submit(rbf(12, reward=second_waits, method=plain))
        assert gate.called.wait(PATIENCE)
        before, update = len(decoded), next(iter(job))
        image = update.image(PATIENCE)
        assert image.size == (8, 8) and len(decoded) == before + 1
        assert torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float().mean() / 255 == pytest.approx(
            update.best_reward, abs=1 / 255
        )
        gate.open.set()
        assert job.result().committed_nfe == 12
        assert_sound(own)


def test_streaming_changes_no_result(shared):
    alone = fingerprint(shared.generate(rbf(30, seed=3)))
    jobs = [shared.submit(rbf(30, seed=seed)) for seed in range(5)]
    readers = [threading.Thread(target=lambda job=job: [update.image() for update in job]) for job in jobs]
    for thread in readers:
        thread.start()
    assert fingerprint(jobs[3].result()) == alone
    for thread in readers:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert_sound(shared)


def test_a_job_that_is_over_keeps_no_engine_alive():
    made = engine()
    job = made.submit(bon())
    job.result()
    seen = weakref.ref(made)
    made.close()
    del made
    gc.collect()
    assert seen() is None and job.result().committed_nfe == 4 and job.update.image() == job.result().image


def test_a_job_keeps_its_engine_alive_until_it_is_over(gate):
    made = engine()
    job = made.submit(bon(reward=gate))
    assert gate.called.wait(PATIENCE)
    del made
    gc.collect()
    gate.open.set()
    assert job.result(PATIENCE).committed_nfe == 4


def test_a_busy_engine_says_how_long_to_wait_and_its_error_can_be_copied():
    error = EngineBusy("3 requests wait", 2.5)
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert str(one) == "3 requests wait" and one.seconds == 2.5
    assert isinstance(error, RollflowError) and EngineBusy("no idea").seconds == 0.0


def test_the_names_of_the_contract_are_exported():
    for name in rollflow.__all__:
        assert getattr(rollflow, name).__name__ == name
