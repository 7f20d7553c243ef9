"""Rewards that are not available are called again, and those that hang are given up; others go on meanwhile."""

import threading

import pytest
from tiny import PATIENCE, Clock, assert_sound, bon, brightness, ended, engine, fingerprint, rbf

from rollflow import FunctionError, RequestError, RewardUnavailable
from rollflow.rewards import FunctionReward


class Unavailable:
    """A reward that is not there for its first calls, and says when it was called; one call at a time."""

    def __init__(self, times, error=None, **attributes):
        self.left, self.calls, self.error = times, 0, error or RewardUnavailable("busy")
        self.called = threading.Semaphore(0)
        self.__dict__.update(attributes)
        self.__name__ = "away"

    def __call__(self, images, prompts):
        self.calls += 1
        self.left -= 1
        try:
            if self.left >= 0:
                raise self.error
            return images.mean((1, 2, 3))
        finally:
            self.called.release()

    def wait(self):
        assert self.called.acquire(timeout=PATIENCE)


def at_rest(made):
    """Waits until the loop has set a timer for what is to be called again."""
    loop = made._host.loop
    while not any(timer.call not in (None, loop._dispatch._abandon) for *_, timer in [*loop._timers._heap]):
        made.stats()


def test_a_reward_is_called_again_later_and_later_while_others_run():
    clock, reward = Clock(), Unavailable(3)
    with engine(clock=clock) as made:
        job, waits = made.submit(bon(reward=reward, seed=4)), []
        for seconds in (0.2, 0.4, 0.8):  # exponential back-off
            reward.wait()
            at_rest(made)
            clock.pass_in(made, 0.9 * seconds)
            assert made.generate(rbf()).committed_nfe == 12  # another request, from beginning to end
            assert not job.done() and made._host.loop._timers
            waits.append(reward.calls)
            clock.pass_in(made, 0.11 * seconds)
        result = job.result(PATIENCE)
        assert waits == [1, 2, 3] and reward.calls == 5  # the fourth judged the search, the fifth its image
        assert fingerprint(result) == fingerprint(made.generate(bon(seed=4)))
        assert_sound(made)


@pytest.mark.parametrize("retries", [None, 0, 1])
def test_a_reward_that_stays_away_fails_its_request_after_its_retries(retries):
    attributes = {} if retries is None else {"retries": retries}
    clock, reward = Clock(), Unavailable(10**6, **attributes)
    with engine(clock=clock) as made:
        job, other = made.submit(bon(reward=reward)), made.submit(rbf(30, seed=1))
        for _ in range(3 if retries is None else retries):
            reward.wait()
            at_rest(made)
            clock.pass_in(made, 60.0)
        with pytest.raises(FunctionError, match="the reward away raised RewardUnavailable for 4 images: busy") as found:
            job.result(PATIENCE)
        assert isinstance(found.value.__cause__, RewardUnavailable)
        assert reward.calls == 1 + (3 if retries is None else retries)
        assert other.result(PATIENCE).committed_nfe == 30
        assert_sound(made)


def test_a_reward_names_the_errors_after_which_it_is_called_again():
    clock = Clock()
    with engine(clock=clock) as made:
        again = Unavailable(1, ConnectionError("reset"), retry_on=(ConnectionError,))
        job = made.submit(bon(reward=again))
        again.wait()
        at_rest(made)
        clock.pass_in(made, 1.0)
        assert job.result(PATIENCE).committed_nfe == 4
        never = Unavailable(1, ConnectionError("reset"))
        with pytest.raises(FunctionError, match="ConnectionError"):
            made.generate(bon(reward=never))
        assert never.calls == 1
        assert_sound(made)


def test_a_guided_search_waits_for_its_reward_too():
    clock, reward = Clock(), Unavailable(2, differentiable=True)
    with engine(clock=clock) as made:
        job = made.submit(rbf(12, method="dps", reward=reward))
        for _ in range(2):
            reward.wait()
            at_rest(made)
            assert made.generate(bon()).committed_nfe == 4
            clock.pass_in(made, 2.0)
        assert job.result(PATIENCE).committed_nfe == 12
        assert_sound(made)


def test_a_request_that_is_cancelled_while_its_reward_is_away():
    clock, reward = Clock(), Unavailable(2)
    with engine(clock=clock) as made:
        job = made.submit(bon(reward=reward))
        reward.wait()
        at_rest(made)
        assert job.cancel()
        clock.pass_in(made, 60.0)
        assert job.best(PATIENCE) is None and reward.calls == 1
        assert_sound(made)


class Hanging:
    """A reward whose k-th call hangs until it is let go, and then answers or raises."""

    timeout = 5.0

    def __init__(self, k=1, raises=False):
        self.k, self.raises, self.calls = k, raises, 0
        self.hangs, self.let_go, self.back = threading.Event(), threading.Event(), threading.Event()
        self.__name__ = "hanging"

    def __call__(self, images, prompts):
        self.calls += 1
        if self.calls == self.k:
            self.hangs.set()
            assert self.let_go.wait(PATIENCE)
            self.back.set()
            if self.raises:
                raise ValueError("too late")
        return images.mean((1, 2, 3))


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_call_that_hangs_fails_its_own_requests_and_its_thread_is_replaced(k, raises):
    clock, reward = Clock(), Hanging(k, raises)
    with engine(clock=clock) as made:
        threads = len(made.lanes.alive)
        jobs = [made.submit(rbf(12, reward=reward, seed=seed)) for seed in range(2)]
        assert reward.hangs.wait(PATIENCE)
        clock.pass_in(made, 4.9)
        assert not any(job.done() for job in jobs) and made.stats().abandoned == 0
        assert made.generate(rbf()).committed_nfe == 12  # others go on
        clock.pass_in(made, 0.2)
        errors = [ended(job).exception(PATIENCE) for job in jobs]
        failed = [error for error in errors if error is not None]
        assert failed and all("the reward hanging did not answer for" in str(error) for error in failed)
        assert all("within its timeout of 5 s" in str(e) and isinstance(e.__cause__, TimeoutError) for e in failed)
        assert made.stats().abandoned == 1
        assert_sound(made, threads)
        assert made.generate(bon(reward=reward)).committed_nfe == 4  # another thread calls it while the first hangs
        reward.let_go.set()
        assert reward.back.wait(PATIENCE)  # what it says by now is nobody's concern
        assert made.generate(bon(reward=reward)).committed_nfe == 4
        assert_sound(made, threads)


def test_what_waits_behind_a_call_that_hangs_is_judged_by_another_thread():
    clock, reward = Clock(), Hanging()
    with engine(clock=clock, lanes=1) as made:
        first = made.submit(bon(8, reward=reward))
        assert reward.hangs.wait(PATIENCE)
        second = made.submit(bon(8, reward=reward, seed=1))
        while made.stats().rows < 16:  # its batch has been run, and waits for the reward
            pass
        clock.pass_in(made, 6.0)
        with pytest.raises(FunctionError, match="did not answer"):
            first.result(PATIENCE)
        assert second.result(PATIENCE).committed_nfe == 8
        reward.let_go.set()
        assert_sound(made)


def test_each_attempt_has_the_whole_timeout():
    """The time of a call that failed and is made again does not count for the next."""

    class Both(Unavailable):
        timeout = 5.0

        def __init__(self):
            super().__init__(1)
            self.second, self.let_go = threading.Event(), threading.Event()

        def __call__(self, images, prompts):
            if self.calls == 1:
                self.second.set()
                assert self.let_go.wait(PATIENCE)
            return super().__call__(images, prompts)

    clock, reward = Clock(), Both()
    with engine(clock=clock) as made:
        job = made.submit(bon(reward=reward))
        reward.wait()
        at_rest(made)
        clock.pass_in(made, 1.0)
        assert reward.second.wait(PATIENCE)
        clock.pass_in(made, 4.5)  # past the first attempt's time, within the second's
        assert made.stats().abandoned == 0
        reward.let_go.set()
        assert job.result(PATIENCE).committed_nfe == 4
        assert_sound(made)


def test_a_reward_with_a_timeout_that_answers_is_not_given_up():
    clock, reward = Clock(), FunctionReward(brightness)
    reward.function.timeout = 5.0
    try:
        with engine(clock=clock) as made:
            jobs = [made.submit(rbf(12, reward=reward, seed=seed)) for seed in range(3)]
            for job in jobs:
                assert job.result(PATIENCE).committed_nfe == 12
            assert not made._host.loop._timers  # a call that is over takes its time limit along
            clock.pass_in(made, 60.0)
            assert made.stats().abandoned == 0
            assert_sound(made)
    finally:
        del reward.function.timeout


@pytest.mark.parametrize("attributes", [{"timeout": "soon"}, {"retry_on": "errors"}, {"retries": "often"}])
def test_a_reward_that_declares_what_cannot_be_used_is_refused_by_name(attributes):
    with engine() as made:
        with pytest.raises(RequestError, match="of the reward away="):
            made.submit(bon(reward=Unavailable(1, **attributes)))
        assert_sound(made)
