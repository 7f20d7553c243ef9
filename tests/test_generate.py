"""Many requests in one call: `generate`, its errors and interruptions, and `map` over requests without end."""

import itertools
import signal
import sys
import threading
import weakref

import pytest
from tiny import PATIENCE, Gate, assert_sound, bon, engine, fingerprint, rbf

from rollflow import FunctionError, RequestError, Result, RollflowError


@pytest.fixture(scope="module")
def shared():
    with engine() as made:
        yield made


@pytest.fixture
def gate():
    made = Gate()
    yield made
    made.open.set()


def ill(images, prompts):
    raise ValueError("the judge is ill")


def test_results_come_in_the_order_of_the_requests(shared):
    found = shared.generate([rbf(nfe, seed=nfe) for nfe in (30, 8, 20)])
    assert [result.request.seed for result in found] == [30, 8, 20]
    assert [fingerprint(result) for result in found] == [
        fingerprint(shared.generate(rbf(nfe, seed=nfe))) for nfe in (30, 8, 20)
    ]
    assert shared.generate([]) == []


def test_a_result_holds_its_own_image_alone(shared):
    """And not the batch in which the images of several requests were made."""
    for result in shared.generate([bon(seed=seed) for seed in range(8)]):
        assert result.pixels.untyped_storage().nbytes() == result.pixels.nbytes == 3 * 8 * 8 * 4


def test_the_first_error_is_raised_with_its_place_when_the_others_have_finished(shared):
    spent = []
    requests = [rbf(20), bon(reward=ill), rbf(30, seed=2), bon(reward=lambda images, prompts: 1 / 0)]
    with pytest.raises(FunctionError, match=r"^request 1: the reward ill raised ValueError for . images") as found:
        shared.generate(requests, on_progress=lambda state: spent.append(state.committed_nfe))
    assert isinstance(found.value.__cause__, ValueError)
    assert spent[-1][0] == 20 and spent[-1][2] == 30
    with pytest.raises(FunctionError, match=r"^the reward ill raised"):  # of one request there is no place to tell
        shared.generate(bon(reward=ill))
    assert_sound(shared)


def test_errors_come_back_in_their_places(shared):
    requests = [bon(), bon(reward=ill), bon(nfe=0), bon(seed=3)]
    found = shared.generate(requests, return_exceptions=True)
    assert [type(one) for one in found] == [Result, FunctionError, RequestError, Result]
    assert fingerprint(found[3]) == fingerprint(shared.generate(bon(seed=3)))
    assert isinstance(shared.generate(bon(reward=ill), return_exceptions=True), FunctionError)


def test_a_bad_request_stops_the_call_before_anything_runs(shared):
    calls = []

    def counting(images, prompts):
        calls.append(len(images))
        return images.mean((1, 2, 3))

    with pytest.raises(RequestError, match=r"^request 1: "):
        shared.generate([bon(reward=counting), bon(nfe=0, reward=counting)])
    assert calls == [] and shared.stats().running == shared.stats().queued == 0


def test_a_progress_callback_that_raises_ends_its_own_call_alone(shared, gate):
    other = shared.submit(bon(reward=gate))
    told = []

    def breaks(state):
        told.append(state)
        raise KeyError("lost")

    with pytest.raises(FunctionError, match="the progress callback raised KeyError: 'lost'") as found:
        shared.generate([rbf(30), rbf(30, seed=1)], on_progress=breaks)
    assert isinstance(found.value.__cause__, KeyError) and len(told) == 1
    gate.open.set()
    assert other.result(PATIENCE).committed_nfe == 4
    shared.generate(bon())
    assert_sound_soon(shared)


def assert_sound_soon(made):
    """As `assert_sound`, once the rows of cancelled requests are back from the device."""
    while made.stats().running:
        pass
    assert_sound(made)


def test_progress_may_ask_for_more(shared):
    """It is called on the caller's thread, where waiting is allowed."""
    inner = []

    def asks(state):
        if not inner:
            inner.append(shared.generate(bon()))

    shared.generate(rbf(20), on_progress=asks)
    assert inner[0].committed_nfe == 4


def test_two_threads_generate_at_once(shared):
    alone = [fingerprint(shared.generate(rbf(20, seed=seed))) for seed in range(6)]
    found, ready = {}, threading.Barrier(2)

    def generates(mine):
        ready.wait(PATIENCE)
        found[mine[0]] = [fingerprint(r) for r in shared.generate([rbf(20, seed=seed) for seed in mine])]

    threads = [threading.Thread(target=generates, args=[mine]) for mine in ([0, 2, 4], [1, 3, 5])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert found == {0: alone[0::2], 1: alone[1::2]}
    assert_sound(shared)


# Waiting inside the engine.


def test_submit_works_from_a_reward_and_waiting_there_is_a_clear_error(shared):
    jobs, refused, running = [], [], shared.map([bon()])

    def asks(images, prompts):
        if not jobs:
            jobs.append(shared.submit(bon(seed=1)))
            doors = (
                lambda: shared.generate(bon()), jobs[0].result, jobs[0].best, lambda: list(jobs[0]),
                lambda: shared.encode("b"), shared.warm_up, lambda: next(running), lambda: shared.map([]),
            )  # fmt: skip
            for door in doors:
                try:
                    door()
                except RollflowError as error:
                    refused.append(str(error))
        return images.mean((1, 2, 3))

    assert shared.generate(bon(reward=asks)).committed_nfe == 4
    assert jobs[0].result(PATIENCE).committed_nfe == 4
    assert len(refused) == 8 and all("hand requests in by `submit`" in message for message in refused)
    assert_sound(shared)


def test_submit_works_from_a_callback_a_method_and_a_model(shared):
    jobs, refused, done = [], [], threading.Event()

    def again(job):
        jobs.append(shared.submit(bon(seed=9)))
        try:
            shared.generate(bon())
        except RollflowError as error:
            refused.append(error)
        assert job.result().committed_nfe == shared.stats().buckets.get((8, 8), 4)
        done.set()

    def asks(nfe, steps):
        search = yield from first_of(nfe)
        jobs.append(shared.submit(bon(seed=10)))
        return search

    shared.submit(bon()).add_done_callback(again)
    assert done.wait(PATIENCE) and len(refused) == 1
    assert shared.generate(bon(method=asks)).committed_nfe == 4
    assert [job.result(PATIENCE).request.seed for job in jobs] == [9, 10]


def first_of(nfe):
    from rollflow import Draw

    (particles,) = yield [Draw(None, nfe)]
    return particles[0]


# Interruptions.


class Interrupting(Gate):
    """A reward that interrupts the main thread where that waits in a function of the given name, once."""

    def __init__(self, name):
        super().__init__()
        self.name, self.sent = name, False

    def __call__(self, images, prompts):
        if not self.sent:
            self.sent = True
            while self.name not in self.stack():
                pass
            # One that comes just before the thread begins to wait is seen only when the wait is over: again, then.
            while not self.open.is_set() and self.name in self.stack():
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                self.open.wait(0.05)
                place = self.place()
                self.open.wait(1.0)
                if self.place() != place:  # it has gone on
                    break
        return super().__call__(images, prompts)

    @staticmethod
    def place():
        """Where the main thread is."""
        frame = sys._current_frames()[threading.main_thread().ident]
        return id(frame), frame.f_lasti

    @staticmethod
    def stack():
        frame, names = sys._current_frames()[threading.main_thread().ident], []
        while frame is not None:
            names.append(frame.f_code.co_name)
            frame = frame.f_back
        return names


needs_signals = pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals to threads here")


@pytest.fixture
def interrupts():
    """Ctrl-C interrupts, also where the shell started us with interrupts ignored, as it does in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@needs_signals
def test_an_interrupted_wait_leaves_the_job_and_the_engine_as_they_were(shared, interrupts):
    reward = Interrupting("_wait")
    job = shared.submit(rbf(20, reward=reward))
    with pytest.raises(KeyboardInterrupt):
        job.result()
    assert not job.done()
    reward.open.set()
    assert job.result(PATIENCE).committed_nfe == 20
    assert_sound(shared)


@needs_signals
@pytest.mark.parametrize("on_progress", [None, lambda state: None])
def test_an_interrupted_generate_cancels_its_requests_and_no_others(shared, interrupts, on_progress):
    reward = Interrupting("follow")
    other = shared.submit(rbf(20, seed=1))
    with pytest.raises(KeyboardInterrupt):
        shared.generate([rbf(400, reward=reward), rbf(400, reward=reward, seed=1)], on_progress=on_progress)
    reward.open.set()
    assert other.result(PATIENCE).committed_nfe == 20
    assert_sound_soon(shared)


# Without end.


def test_map_takes_no_more_from_its_iterator_than_run_and_yields_as_they_finish(shared, gate):
    taken = []

    def requests():
        for i in itertools.count():
            taken.append(i)
            yield bon(seed=i, reward=gate) if i == 1 else bon(seed=i)

    running, found = shared.map(requests(), concurrency=3), []
    assert taken == []  # nothing before it is asked
    for index, result in running:
        assert result.request.seed == index
        found.append(index)
        assert len(taken) <= len(found) + 3
        if len(found) == 10:
            gate.open.set()
        if 1 in found:
            break
    assert len(found) > 10 and found.index(1) >= 10  # the others were not held up
    running.close()
    assert_sound_soon(shared)


def test_map_yields_what_is_done_before_it_takes_more(shared):
    found = []

    def requests():
        yield bon()
        while shared.stats().queued or shared.stats().running:  # until the first is done
            pass
        yield bon(seed=1)
        assert found[:1] == [0]
        yield bon(seed=2)

    for index, _ in shared.map(requests(), concurrency=3):
        found.append(index)
    assert sorted(found) == [0, 1, 2]


def test_map_holds_no_result_that_was_taken(shared):
    held, most = weakref.WeakSet(), 0
    for _, result in shared.map((bon(seed=i) for i in range(30)), concurrency=2):
        held.add(result.pixels)
        most = max(most, len(held))
    assert most <= 4


def test_map_raises_the_first_error_with_its_place_and_cancels_the_rest(shared, gate):
    requests = [bon(reward=gate), bon(seed=1), bon(reward=ill)]
    found = []
    with pytest.raises(FunctionError, match=r"^request 2: the reward ill raised") as raised:
        for one in shared.map(requests, concurrency=3):
            found.append(one)
    assert isinstance(raised.value.__cause__, ValueError) and [index for index, _ in found] in ([], [1])
    gate.open.set()
    with pytest.raises(RequestError, match=r"^request 1: "):
        list(shared.map([bon(), bon(nfe=0)]))
    assert_sound_soon(shared)


def test_map_yields_errors_in_place_of_results_where_it_is_asked(shared):
    requests = [bon(), bon(reward=ill), bon(nfe=0), bon(seed=3)]
    found = dict(shared.map(requests, concurrency=2, return_exceptions=True))
    assert [type(found[i]) for i in range(4)] == [Result, FunctionError, RequestError, Result]
    prompts = dict(shared.map(["a", "b"], nfe=4, method="bon", steps=1, reward=lambda x, prompts: x.mean((1, 2, 3))))
    assert [prompts[i].request.prompt for i in range(2)] == ["a", "b"]
    with pytest.raises(RequestError, match="concurrency"):
        shared.map([], concurrency=0)


def test_an_error_of_the_iterator_is_its_own_and_cancels_what_runs(shared):
    def breaks():
        yield rbf(40)
        raise KeyError("no more")

    with pytest.raises(FunctionError, match="the iterable of requests raised KeyError: 'no more'") as found:
        list(shared.map(breaks()))
    assert isinstance(found.value.__cause__, KeyError)
    assert_sound_soon(shared)
