"""Whose turn it is at a reward: what hangs or is away holds up nobody else, on judges' threads and on lanes."""

import threading
from dataclasses import replace

import pytest
import torch
from test_retries import Hanging, at_rest
from tiny import PATIENCE, Clock, Gate, Tiny, assert_sound, bon, ended, engine, fingerprint, rbf

from rollflow import FunctionError, RewardUnavailable
from rollflow.device.judges import CONCURRENT, JUDGES, Judges
from rollflow.device.workers import Lanes
from rollflow.rewards import FunctionReward


class Waiting(Tiny):
    """A model of which a batch waits until it is let go, so that what is submitted meanwhile shares the next."""

    def __init__(self):
        self.entered, self.let_go, self.waits = threading.Event(), threading.Event(), False

    def velocity(self, *args):
        if self.waits:
            self.waits = False
            self.entered.set()
            assert self.let_go.wait(PATIENCE)
        return super().velocity(*args)


def together(made, requests):
    """Submits requests of one kind whose first rows share a batch; returns their jobs."""
    made.encode([request.prompt for request in requests])
    made.model.waits = True
    made.model.first = made.submit(bon(1))
    assert made.model.entered.wait(PATIENCE)
    jobs = [made.submit(request) for request in requests]
    made.stats()  # the loop has let them in
    made.model.let_go.set()
    return jobs


def assert_all_sound(made, threads=None):
    ended(made.model.first)
    assert_sound(made, threads)


def dps(nfe=8, **options):
    return rbf(nfe, method="dps", **options)


def smooth(images, prompts):
    return images.square().mean((1, 2, 3))


smooth.differentiable = True


class AwayFor:
    """A reward that is never there for one prompt."""

    def __init__(self, **attributes):
        self.prompts, self.called, self.__name__ = [], threading.Semaphore(0), "away"
        self.__dict__.update(attributes)

    def __call__(self, images, prompts):
        self.prompts.append(set(prompts))
        self.called.release()
        if "away" in prompts:
            raise RewardUnavailable("busy")
        return images.mean((1, 2, 3))

    def wait(self):
        assert self.called.acquire(timeout=PATIENCE)


def test_retries_that_are_used_up_fail_only_the_request_whose_prompt_is_the_reason():
    clock, reward = Clock(), AwayFor(retries=1)
    with engine(Waiting(), clock=clock) as made:
        here, away = together(made, [bon(2, reward=reward), replace(bon(2, reward=reward), prompt="away")])
        reward.wait()
        at_rest(made)
        clock.pass_in(made, 1.0)
        with pytest.raises(FunctionError, match="the reward away raised RewardUnavailable for 2 images: busy"):
            away.result(PATIENCE)
        assert here.result(PATIENCE).committed_nfe == 2
        assert reward.prompts[:2] == [{"a", "away"}] * 2 and reward.prompts.count({"away"}) == 1
        assert_all_sound(made)


def test_a_guided_request_waits_for_its_reward_alone():
    """Another request of the same batch goes on at once, whose own reward may be called as often as it says."""
    clock, reward = Clock(), AwayFor(retries=12, differentiable=True)
    with engine(Waiting(), clock=clock) as made:
        here, away = together(made, [dps(reward=reward), replace(dps(reward=reward), prompt="away")])
        assert here.result(PATIENCE).committed_nfe == 8  # no time has passed
        assert reward.prompts[0] == {"a", "away"}
        for _ in range(12):
            at_rest(made)
            assert not away.done()
            clock.pass_in(made, 30.1)  # the longest that is waited
        with pytest.raises(FunctionError, match="RewardUnavailable"):
            away.result(PATIENCE)
        assert reward.prompts.count({"away"}) == 13
        assert_all_sound(made)


class Scorer:
    """Two judges in one object, as methods; one call at a time for both."""

    def __init__(self):
        self.calls, self.gate = 0, Gate()

    def score(self, images, prompts):
        self.calls += 1
        return images.mean((1, 2, 3))

    def slow(self, images, prompts):
        return self.gate(images, prompts)

    def quick(self, images, prompts):
        return images.mean((1, 2, 3))

    quick.timeout = 5.0


def test_the_same_method_of_an_object_judges_requests_together():
    scorer = Scorer()
    with engine(Waiting()) as made:
        jobs = together(made, [bon(2, reward=scorer.score, seed=seed) for seed in range(3)])
        assert [job.result(PATIENCE).committed_nfe for job in jobs] == [2, 2, 2]
        assert scorer.calls < 6  # one for their rows; each image alone, or together
        assert_all_sound(made)


def test_the_time_limit_of_a_call_begins_with_its_turn():
    clock, scorer = Clock(), Scorer()
    with engine(clock=clock) as made:
        slow = made.submit(bon(8, reward=scorer.slow))
        assert scorer.gate.called.wait(PATIENCE)
        quick = made.submit(bon(8, reward=scorer.quick))
        while not any(line.waiting for line in [*made.lanes._judging._lines.values()]):
            made.stats()
        clock.pass_in(made, 60.0)
        assert not quick.done() and made.stats().abandoned == 0
        scorer.gate.open.set()
        assert slow.result(PATIENCE).committed_nfe == quick.result(PATIENCE).committed_nfe == 8
        assert_sound(made)


def test_rewards_that_hang_without_a_time_limit_hold_up_no_other():
    gates = [Gate() for _ in range(JUDGES + 2)]
    with engine() as made:
        jobs = [made.submit(bon(reward=gate)) for gate in gates]
        for gate in gates:
            assert gate.called.wait(PATIENCE)
        assert made.generate(bon()).committed_nfe == 4
        assert len(made.lanes.alive) >= JUDGES + 3 + 1
        for gate in gates:
            gate.open.set()
        assert [job.result(PATIENCE).committed_nfe for job in jobs] == [4] * len(jobs)
        assert_sound(made)
    assert not any(thread.is_alive() for thread in made.lanes.alive)


def test_one_slow_reward_that_is_concurrent_holds_up_no_other():
    class Slow(Gate):
        concurrent, timeout = True, None

        def __init__(self):
            super().__init__()
            self.lock, self.now, self.most, self.full = threading.Lock(), 0, 0, threading.Event()

        def __call__(self, images, prompts):
            with self.lock:
                self.now += 1
                self.most = max(self.most, self.now)
                if self.now == CONCURRENT:
                    self.full.set()
            try:
                return super().__call__(images, prompts)
            finally:
                with self.lock:
                    self.now -= 1

    slow = Slow()
    with engine() as made:
        jobs = [made.submit(bon(8, reward=slow, seed=seed)) for seed in range(CONCURRENT + 4)]
        assert slow.full.wait(PATIENCE)
        assert made.generate(bon()).committed_nfe == 4
        slow.open.set()
        assert [job.result(PATIENCE).committed_nfe for job in jobs] == [8] * len(jobs)
        assert slow.most == CONCURRENT
        assert_sound(made)


class Pool:
    """Threads that a test works by hand."""

    def __init__(self):
        self.threads, self.posted, self.given_up = [], [], []

    def post(self, work, *args):
        self.posted.append((work, args))

    def fill(self, count):
        pass

    def give_up(self, thread):
        self.given_up.append(thread)


def test_a_call_that_returns_when_its_time_is_up_is_over_or_given_up_but_never_both():
    for late in (False, True):
        pool = Pool()
        judges, turns = Judges(pool), []

        def work(turn, then, turns=turns, judges=judges):
            turns.append(turn)
            then(turn)

        def first(turn, judges=judges, late=late, pool=pool):
            assert not pool.posted  # the second waits for its turn
            if late:
                assert judges.abandon(turn) and len(pool.posted) == 1 and not judges.end(turn)
            else:
                assert judges.end(turn) and len(pool.posted) == 1 and not judges.abandon(turn)

        target = object()
        judges.post(target, False, work, first)
        judges.post(target, False, work, lambda turn: None)
        while pool.posted:
            done, args = pool.posted.pop(0)
            done(*args)
        assert len(turns) == 2 and len(pool.given_up) == late
        assert turns[1].state == "over" and not judges._lines and judges._busy == 0


def test_work_that_raises_does_not_keep_its_line_waiting(caplog):
    lanes, target, after = Lanes(torch.device("cpu"), 1, 1), object(), threading.Event()
    lanes.judge(target, False, lambda turn: 1 / 0)
    lanes.judge(target, False, lambda turn: after.set())
    assert after.wait(PATIENCE)
    assert not lanes.close(PATIENCE) and "should have reported" in caplog.text


def test_a_reward_that_cannot_say_its_name_any_more_fails_its_requests():
    class Nameless:
        door = True

        @property
        def name(self):
            if not self.door:
                raise ValueError("no name")
            return "named"

        def check(self, prompt):
            pass

        def __call__(self, images, prompts):
            self.door = False
            raise ValueError("ill")

    with engine() as made:
        job = made.submit(bon(reward=Nameless()))
        with pytest.raises(FunctionError, match="the reward Nameless raised ValueError for 4 images: ill"):
            job.result(PATIENCE)
        assert_sound(made)


class Hangs(Hanging):
    """The same for a guided search; says on which thread."""

    differentiable = True

    def __call__(self, images, prompts):
        if self.calls + 1 == self.k:
            self.thread = threading.current_thread()
        return super().__call__(images, prompts)


def test_a_guided_row_waits_no_longer_for_a_reward_that_a_call_was_given_up_of():
    clock, reward = Clock(), Hangs()
    with engine(clock=clock) as made:
        plain = made.submit(bon(reward=reward))
        assert reward.hangs.wait(PATIENCE)
        guided = made.submit(dps(reward=reward))
        while not any(line.waiting for line in [*made.lanes._judging._lines.values()]):
            made.stats()
        clock.pass_in(made, 5.1)
        with pytest.raises(FunctionError, match="did not answer for 4 images"):
            plain.result(PATIENCE)
        assert guided.result(PATIENCE).committed_nfe == 8
        reward.let_go.set()
        assert_sound(made)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_guided_call_that_hangs_fails_its_request_and_frees_its_lane(k, raises):
    """Rows of another reward in the same batch run again; the thread that comes back later writes nothing."""
    other = dps(12, reward=FunctionReward(smooth), seed=5)
    with engine() as made:
        alone = fingerprint(made.generate(other))
    clock, reward = Clock(), Hangs(k, raises)
    with engine(Waiting(), clock=clock) as made:
        threads = len(made.lanes.alive)
        own, shares = together(made, [dps(12, reward=reward), other])
        assert reward.hangs.wait(PATIENCE)
        clock.pass_in(made, 4.9)
        assert not own.done() and made.stats().abandoned == 0
        clock.pass_in(made, 0.2)
        assert "the reward hanging did not answer for" in str(ended(own).exception(PATIENCE))
        assert isinstance(own.exception().__cause__, TimeoutError) and made.stats().abandoned == 1
        assert fingerprint(shares.result(PATIENCE)) == alone
        assert_all_sound(made, threads)
        assert reward.thread not in made.lanes.alive and reward.thread.is_alive()
        (storage,) = made._host.runner._storage.values()
        before = [one.clone() for one in (storage.x, storage.u, storage.move)]
        reward.let_go.set()
        reward.thread.join(PATIENCE)
        assert not reward.thread.is_alive()
        assert all(map(torch.equal, before, (storage.x, storage.u, storage.move)))
        assert made.generate(dps(reward=reward)).committed_nfe == 8
        assert_all_sound(made, threads)


def test_a_guided_call_is_given_up_while_requests_run_apart():
    """A batch that another request's error split: the parts behind the one that hangs run on another lane's thread."""

    def ill(images, prompts):
        raise ValueError("ill")

    ill.differentiable = True
    clock, reward = Clock(), Hangs(2)  # the first call is that of the whole batch
    requests = [dps(reward=reward), dps(reward=ill, seed=1), dps(reward=FunctionReward(smooth), seed=2)]
    with engine(Waiting(), clock=clock) as made:
        alone = fingerprint(made.generate(requests[2]))
        jobs = together(made, requests)
        assert reward.hangs.wait(PATIENCE)
        clock.pass_in(made, 5.1)
        assert "did not answer" in str(ended(jobs[0]).exception(PATIENCE))
        assert "ill" in str(ended(jobs[1]).exception(PATIENCE))
        assert fingerprint(jobs[2].result(PATIENCE)) == alone
        reward.let_go.set()
        reward.thread.join(PATIENCE)
        assert made.stats().abandoned == 1 and not reward.thread.is_alive()
        assert_all_sound(made)
