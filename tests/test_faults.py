"""Faults at every point of a search's life fail their own request alone: slots come back, survivors are unharmed."""

import threading
import warnings

import pytest
import torch
from tiny import PATIENCE, Lockstep, Tiny, assert_sound, bon, brightness, ended, engine, fingerprint, rbf

from rollflow import Draw, EngineDead, FunctionError, ModelError, RollflowError, interpolant, sde
from rollflow.models import Capabilities

SURVIVORS = [rbf(12, seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def alone():
    with engine() as made:
        return [fingerprint(result) for result in made.generate(SURVIVORS)]


class Faulty:
    """Counts calls, and raises at the k-th of them."""

    def __init__(self, k=0):
        self.calls, self.k = 0, k

    def call(self):
        self.calls += 1
        if self.calls == self.k:
            raise ValueError("ill")


def outlive(made, alone, request, expected=FunctionError):
    """A request fails, or not; those that run beside it get what they get alone."""
    jobs = [made.submit(one) for one in (SURVIVORS[0], request, SURVIVORS[1])]
    assert [fingerprint(job.result(PATIENCE)) for job in jobs[::2]] == alone
    error = ended(jobs[1]).exception()
    assert error is None or isinstance(error, expected), error
    assert_sound(made, threads=len(made.lanes.alive))
    return error


def every(made, alone, request_of, expected=FunctionError, cause=ValueError):
    """Raises at call 1, 2 ... until a search ends before the next call; returns how many calls that were."""
    for k in range(1, 100):
        fault = Faulty(k)
        error = outlive(made, alone, request_of(fault), expected)
        if fault.calls < k:
            assert error is None
            return k - 1
        assert error is not None and isinstance(error.__cause__, cause), k
    raise AssertionError("it never ends")


def test_a_reward_that_raises_at_any_call(alone):
    def request_of(fault):
        return rbf(8, reward=lambda images, prompts: (fault.call(), images.mean((1, 2, 3)))[1])

    with engine() as made:
        assert every(made, alone, request_of) >= 4  # three of the search at least, and one of the final image


def test_a_held_out_judge_that_raises(alone):
    class Judged:
        name, differentiable = "judged", False

        def __init__(self, fault):
            self.held_out = HeldOut(fault)

        def check(self, prompt):
            pass

        def __call__(self, images, prompts):
            return images.mean((1, 2, 3))

    class HeldOut:
        name = "second"

        def __init__(self, fault):
            self.fault = fault

        def check(self, prompt):
            pass

        def __call__(self, images, prompts):
            self.fault.call()
            return images.mean((1, 2, 3))

    with engine() as made:
        assert every(made, alone, lambda fault: bon(reward=Judged(fault))) == 1


def test_a_method_that_raises_at_any_yield(alone):
    def request_of(fault, error=None):
        def own(nfe, steps):
            left, children = nfe, None
            while left:
                if left < nfe:
                    fault.call()
                (children,) = yield [Draw(None, 2)]
                left -= 2
            fault.call()
            return children[0]

        return bon(6, method=own)

    with engine() as made:
        assert every(made, alone, request_of) == 3


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), StopIteration()])
def test_a_method_or_reward_that_raises_what_is_no_exception_ends_no_thread(alone, error):
    def exits(nfe, steps):
        (children,) = yield [Draw(None, 2)]
        if nfe > 0:
            raise error
        return children[0]

    def reward(images, prompts):
        raise error

    with engine() as made:
        assert outlive(made, alone, bon(method=exits), RollflowError) is not None
        assert outlive(made, alone, bon(reward=reward), RollflowError) is not None


def test_a_method_that_does_not_take_its_end_well(alone):
    def clings(nfe, steps):
        try:
            while True:
                yield [Draw(None, 2)]
        finally:
            raise ValueError("not yet")

    with engine() as made:
        assert outlive(made, alone, bon(8, method=clings, stop_at=-1.0), RollflowError) is not None
        job = made.submit(bon(4000, method=clings))
        next(iter(job))
        job.cancel()
        ended(job)
        assert_sound(made)


class Poisoned(Tiny):
    """A model whose parts raise at the k-th call for a batch with a poisoned prompt in it; it is unknown to others."""

    def __init__(self, part):
        self.part, self.fault = part, Faulty()

    def encode(self, prompts):
        if self.part == "encode" and "poison" in prompts:
            self.fault.call()
        return [torch.tensor(float(prompt == "poison")) for prompt in prompts]

    def velocity(self, x, tau, conditioning, guidance, geometry):
        self.poisoned = any(bool(one) for one in conditioning)
        if self.part == "velocity" and self.poisoned:
            self.fault.call()
        return super().velocity(x, tau, conditioning, guidance, geometry)

    def decode(self, latents):
        if self.part == "decode" and self.poisoned:
            self.fault.call()
        return super().decode(latents)


@pytest.mark.parametrize(("part", "least"), [("encode", 1), ("velocity", 3), ("decode", 3)])
@pytest.mark.filterwarnings("ignore:a batch of")
def test_a_model_that_raises_at_any_call(alone, part, least):
    """A batch that fails is run again request by request, so a fault of one call harms nobody else."""
    for k in range(1, 100):
        model = Poisoned(part)
        with engine(model) as made:
            model.fault.k = k
            request = rbf(8, seed=3)
            job = made.submit("poison", method="rbf", reward=brightness, nfe=8, steps=4)
            others = [made.submit(one) for one in SURVIVORS]
            assert [fingerprint(other.result(PATIENCE)) for other in others] == alone or part == "decode"
            error = ended(job).exception()
            assert error is None or (isinstance(error, ModelError) and isinstance(error.__cause__, ValueError))
            model.fault.k = 0
            assert made.generate(request).committed_nfe == 8
            assert_sound(made)
        if model.fault.calls < k:
            break
    assert k > least


def test_an_interpolant_and_a_diffusion_that_raise_at_any_call(alone):
    class Path(interpolant.Linear):
        def __init__(self, fault):
            self.fault = fault

        def alpha(self, t):
            self.fault.call()
            return super().alpha(t)

    class Noise(sde.Diffusion):
        def __init__(self, fault):
            self.fault, self.usual = fault, sde.diffusion(3.0)

        def g(self, t, interpolant=None):
            self.fault.call()
            return self.usual.g(t, interpolant)

    with engine() as made:
        for options_of in (lambda fault: {"interpolant": Path(fault)}, lambda fault: {"diffusion": Noise(fault)}):
            for k in (1, 2, 3, 5, 8, 13, 21, 34, 55):
                fault = Faulty(k)
                jobs = [made.submit(one) for one in SURVIVORS]
                try:
                    own = made.submit(rbf(8, finish=2, **options_of(fault)))
                except Exception as error:  # at the door, where the coefficients of the grid are made
                    assert "ill" in f"{error} {error.__cause__}"
                else:
                    error = ended(own).exception()
                    assert error is None or "ill" in f"{error} {error.__cause__}"
                assert [fingerprint(job.result(PATIENCE)) for job in jobs] == alone
                assert_sound(made)


def test_cancel_at_every_update(alone):
    with engine() as made:
        for k in range(9):
            reward = Lockstep()
            jobs = [made.submit(one) for one in (SURVIVORS[0], rbf(8, reward=reward), SURVIVORS[1])]
            for update in reward.follow(jobs[1]):
                if update.committed_nfe >= k:
                    jobs[1].cancel()
            assert [fingerprint(job.result(PATIENCE)) for job in jobs[::2]] == alone
            ended(jobs[1])
            assert_sound(made)
            assert jobs[1].status == "cancelled" or k == 8


@pytest.mark.parametrize("buckets", [None, (1, 2, 4, 8, 16), (16,)])
@pytest.mark.parametrize("lanes", [1, 2])
def test_a_device_out_of_memory(buckets, lanes):
    """Batches that do not fit are split; the result is that of a device on which they do, with one warning."""

    class Small(Tiny):
        most = 5

        def __init__(self):
            self.failed = []

        def velocity(self, x, tau, conditioning, guidance, geometry):
            if len(x) > self.most:
                self.failed.append(len(x))
                raise torch.OutOfMemoryError(f"{len(x)} rows do not fit")
            return super().velocity(x, tau, conditioning, guidance, geometry)

    requests = [bon(40, seed=seed) for seed in range(3)]
    with engine(buckets=buckets, lanes=lanes) as large:
        expected = [(repr(r.history), r.reward) for r in large.generate(requests)]
    with engine(Small(), buckets=buckets, lanes=lanes) as small, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [(repr(r.history), r.reward) for r in small.generate(requests)]
        memory = [str(one.message) for one in caught if "did not fit into the device's memory" in str(one.message)]
        assert found == expected and len(memory) == 1 and "of 8x8" in memory[0]
        smallest = min(small.model.failed)
        assert max(small.stats().buckets[8, 8]) < smallest
        small.model.failed.clear()
        small.generate(requests)
        assert not any(size >= smallest for size in small.model.failed)  # none is tried that is known not to fit
        small.model.most = 0
        with pytest.raises(ModelError, match="raised OutOfMemoryError"):
            small.generate(bon())
        small.model.most = 5
        assert_sound(small)


@pytest.mark.parametrize("fits", [7, 3, 1])
def test_a_row_whose_padding_does_not_fit_is_padded_less(fits):
    class Small(Tiny):
        def __init__(self):
            self.sizes = []

        def velocity(self, x, tau, conditioning, guidance, geometry):
            self.sizes.append(len(x))
            if len(x) > fits:
                raise torch.OutOfMemoryError(f"{len(x)} rows do not fit")
            return super().velocity(x, tau, conditioning, guidance, geometry)

    with engine(Small(), buckets=(16,)) as made:
        with pytest.warns(RuntimeWarning, match="did not fit into the device's memory"):
            assert made.generate(bon(1)).committed_nfe == 1
        sizes = made.model.sizes
        assert sizes == sorted(sizes, reverse=True) and sizes[0] == 16 and 0 < sizes[-1] <= fits < sizes[-2]
        assert_sound(made)


def test_a_device_out_of_memory_makes_the_images_of_one_search_fewer_at_a_time():
    class Small(Tiny):
        capabilities, most, failed = Capabilities(preview=True), 3, 0

        def preview(self, latents):
            return latents

        def decode(self, latents):
            if len(latents) > self.most:
                self.failed += 1
                raise torch.OutOfMemoryError(f"{len(latents)} images do not fit")
            return latents

    with engine(Small(), preview=True, buckets=(1, 2, 4, 8)) as made:
        with pytest.warns(RuntimeWarning, match="did not fit into the device's memory"):
            assert made.generate(bon(40, finalists=7)).committed_nfe == 40
        assert made.model.failed == 2  # 8 and 4; 2 go
        made.model.most = 0
        with pytest.raises(ModelError, match="raised OutOfMemoryError"):
            made.generate(bon(40, finalists=7))
        made.model.most = 3
        assert_sound(made)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), torch.AcceleratorError])
def test_an_error_of_the_device_itself_is_the_end(error):
    class Lost(Tiny):
        lost = False

        def __init__(self):
            self.ready = threading.Event()

        def velocity(self, x, tau, conditioning, guidance, geometry):
            if self.lost:
                assert self.ready.wait(PATIENCE)
                raise error if isinstance(error, Exception) else error("CUDA error: device-side assert triggered")
            return super().velocity(x, tau, conditioning, guidance, geometry)

    made = engine(Lost(), slots=40)
    before = made.submit(bon())
    before.result()
    made.model.lost = True
    jobs = [made.submit(rbf(12, seed=seed)) for seed in range(6)]  # some run, others are queued
    assert made.stats().queued > 0
    made.model.ready.set()
    for job in jobs:
        with pytest.raises(EngineDead, match="the device failed for good"):
            job.result(PATIENCE)
        assert job.status == "failed"
    assert made.stats().healthy is False and before.result().committed_nfe == 4
    for door in (made.submit, made.generate, lambda request: next(made.map([request]))):
        with pytest.raises(EngineDead, match="make a new engine") as found:
            door(bon())
        assert found.value.__cause__ is not None
    with pytest.raises(EngineDead):
        made.encode("a prompt that nobody has encoded")
    stats = made.stats()
    assert (stats.queued, stats.running, stats.live, stats.promised) == (0, 0, 0, 0)
    made.close()
    assert not any(thread.is_alive() for thread in made.lanes.alive)


def test_a_fault_of_the_loop_is_told_and_the_engine_can_be_closed(monkeypatch, caplog):
    made = engine()
    made.generate(bon())
    monkeypatch.setattr(made._host.loop._dispatch, "launch", lambda: 1 / 0)
    job = made.submit(bon())
    with pytest.raises(EngineDead, match="a fault of rollflow ended the engine"):
        job.result(PATIENCE)
    monkeypatch.undo()
    assert not made.stats().healthy
    made.close()


def test_two_threads_that_submit_two_hundred_requests_each_and_cancel_a_third():
    """After it nothing is promised or live, no thread is lost, and who survived got what he gets alone."""
    kinds = [bon(3, seed=seed, method=("bon", "rbf")[seed % 2], steps=1 + 2 * (seed % 2)) for seed in range(20)]
    requests = [kinds[i % 20] for i in range(200)]
    found = {}
    with engine(slots=64) as made:
        alone = {result.request.seed: fingerprint(result) for result in made.generate(kinds)}
        threads_before, ready = len(made.lanes.alive), threading.Barrier(2)

        def submits(which):
            ready.wait(PATIENCE)
            jobs = []
            for i, request in enumerate(requests):
                jobs.append(made.submit(request))
                if i % 3 == 2:
                    jobs[i - which].cancel()
            found[which] = jobs

        threads = [threading.Thread(target=submits, args=[which]) for which in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for which, jobs in found.items():
            for i, job in enumerate(jobs):
                ended(job)
                assert job.status in ("done", "cancelled") and (job.status == "done" or (i + which) % 3 == 2)
                if job.status == "done":
                    assert fingerprint(job.result()) == alone[job.request.seed]
        assert sum(job.status == "done" for jobs in found.values() for job in jobs) >= 266
        assert_sound(made, threads_before)


def test_what_cannot_be_printed_harms_nobody():
    class Unprintable:
        def __call__(self, t):
            return 3 * t * t

        def __repr__(self):
            raise ValueError("no")

    endless = []
    endless.append(endless)

    def own(nfe, steps, extra=None):
        children = yield [Draw(None, nfe)]
        return children[0][0]

    with engine() as made:
        made.generate(rbf(12, diffusion=Unprintable()))
        made.generate(bon(method=own, options={"extra": endless}))
        assert_sound(made)
        assert all("opaque" in spec for spec in made.ledger.specs.values())
