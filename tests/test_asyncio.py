"""Jobs in asyncio: they are awaited, streamed and cancelled as asyncio's own futures are, in any number of loops."""

import asyncio
import threading

import pytest
from tiny import PATIENCE, Gate, Lockstep, Tiny, assert_sound, bon, ended, engine, fingerprint, rbf

from rollflow import Cancelled, FunctionError, RequestError, RollflowError


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


def test_a_job_is_awaited(shared):
    async def main():
        job = shared.submit(bon(seed=5))
        result = await job
        assert result is await job is job.result()  # as often as one likes
        return result

    assert fingerprint(asyncio.run(main())) == fingerprint(shared.generate(bon(seed=5)))


def test_an_awaited_job_raises_its_error(shared):
    async def main():
        with pytest.raises(FunctionError, match="the judge is ill"):
            await shared.submit(bon(reward=ill))
        job = shared.submit(rbf())
        job.cancel()
        with pytest.raises(Cancelled):
            await job

    asyncio.run(main())
    assert_sound(shared)


def test_updates_are_streamed_and_the_last_is_delivered(shared):
    async def main():
        reward, spent = Lockstep(), []
        job = shared.submit(rbf(30, reward=reward))
        async for update in job:
            spent.append(update.committed_nfe)
            reward.read.release()
        assert spent == sorted(spent) and spent[-1] == 30 and len({*spent}) > 2
        assert [update.committed_nfe async for update in job] == [30]
        image = await asyncio.to_thread(job.update.image)
        assert image == (await job).image

    asyncio.run(main())


def test_a_reader_that_leaves_or_sleeps_holds_up_nobody(shared, gate):
    async def main():
        job = shared.submit(rbf(40, reward=gate))
        async for _ in job:
            break
        slow = aiter(job)
        await anext(slow)
        gate.open.set()
        await job
        assert [update.committed_nfe async for update in slow] == [40]

    asyncio.run(main())
    assert_sound(shared)


def test_a_task_that_is_cancelled_cancels_the_job_it_awaits(shared, gate):
    async def main():
        job = shared.submit(rbf(reward=gate))

        async def wait():
            await job

        task = asyncio.create_task(wait())
        await asyncio.to_thread(gate.called.wait, PATIENCE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return job

    job = asyncio.run(main())
    assert job.status == "cancelled"
    gate.open.set()
    ended(job)
    assert_sound(shared)


def test_shield_protects_a_job(shared, gate):
    async def main():
        job = shared.submit(bon(reward=gate))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(job), 0.01)
        assert not job.done()
        gate.open.set()
        assert (await job).committed_nfe == 4

    asyncio.run(main())


def test_wait_for_cancels_what_takes_too_long(shared, gate):
    async def main():
        job = shared.submit(bon(reward=gate))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(job, 0.01)
        assert job.cancelled()
        gate.open.set()
        assert (await asyncio.wait_for(shared.submit(bon()), PATIENCE)).committed_nfe == 4
        return job

    ended(asyncio.run(main()))
    assert_sound(shared)


def test_gather_collects_results_and_errors(shared):
    async def main():
        jobs = [shared.submit(bon(seed=0)), shared.submit(bon(reward=ill)), shared.submit(bon(seed=2))]
        first, error, last = await asyncio.gather(*jobs, return_exceptions=True)
        assert (first.request.seed, last.request.seed) == (0, 2) and isinstance(error, FunctionError)

    asyncio.run(main())


def test_one_job_serves_several_loops_and_threads(shared, gate):
    job, found = shared.submit(rbf(20, reward=gate)), []
    ready = threading.Barrier(4)

    def waits():
        ready.wait(PATIENCE)
        found.append(job.result())

    async def awaits():
        ready.wait(PATIENCE)
        found.append(await job)

    async def streams():
        ready.wait(PATIENCE)
        found.append([update async for update in job][-1].job.result())

    runs = (waits, lambda: asyncio.run(awaits()), lambda: asyncio.run(streams()))
    threads = [threading.Thread(target=run) for run in runs]
    for thread in threads:
        thread.start()
    ready.wait(PATIENCE)
    gate.open.set()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert found == [job.result()] * 3


def test_a_loop_that_was_closed_harms_nobody(shared, gate):
    job = shared.submit(rbf(20, reward=gate))
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # it would complain of tasks that never end
    stream = aiter(job)

    async def begin():
        await asyncio.to_thread(gate.called.wait, PATIENCE)
        task = asyncio.ensure_future(anext(stream)), asyncio.ensure_future(job.over())
        await asyncio.sleep(0)
        return task

    loop.run_until_complete(begin())
    loop.close()  # with tasks that wait for the job
    gate.open.set()
    assert job.result(PATIENCE).committed_nfe == 20
    assert_sound(shared)


def test_generate_async_runs_one_or_many(shared):
    async def main():
        alone = await shared.generate_async(bon(seed=1))
        many = await shared.generate_async([bon(seed=seed) for seed in range(3)])
        assert fingerprint(many[1]) == fingerprint(alone)
        with pytest.raises(FunctionError, match="request 1: the reward ill raised"):
            await shared.generate_async([bon(), bon(reward=ill), bon()])
        found = await shared.generate_async([bon(), bon(reward=ill), bon(nfe=0)], return_exceptions=True)
        assert [type(one).__name__ for one in found] == ["Result", "FunctionError", "RequestError"]
        with pytest.raises(RequestError, match="request 1: "):
            await shared.generate_async([bon(), bon(nfe=0)])
        single = await shared.generate_async(bon(reward=ill), return_exceptions=True)
        assert isinstance(single, FunctionError)

    asyncio.run(main())
    assert_sound(shared)


def test_a_cancelled_generate_async_cancels_its_requests(gate):
    async def main():
        task = asyncio.create_task(own.generate_async([rbf(reward=gate, seed=seed) for seed in range(3)]))
        await asyncio.to_thread(gate.called.wait, PATIENCE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with engine() as own:
        asyncio.run(main())
        gate.open.set()
    assert own.stats().promised == own.stats().live == 0  # it has drained, and the requests have ended as cancelled
    assert own.ledger.executed["committed"] + own.ledger.executed["speculative"] < 36


class Slow(Tiny):
    """A model whose door takes its time, as that of a pipeline does that learns a size."""

    def __init__(self):
        self.asked, self.open = threading.Event(), threading.Event()

    def check_prompt(self, prompt):
        self.asked.set()
        assert self.open.wait(PATIENCE), "nobody opened the door"


def test_the_door_does_not_hold_up_the_event_loop():
    async def main():
        task = asyncio.create_task(own.generate_async([bon(seed=1), bon(nfe=0)], return_exceptions=True))
        while not model.asked.is_set():
            await asyncio.sleep(0)
        model.open.set()  # which a loop that is held up never does
        result, error = await task
        assert result.committed_nfe == 4 and isinstance(error, RequestError)

    model = Slow()
    with engine(model) as own:
        asyncio.run(main())


@pytest.mark.parametrize("ends", ["task", "loop"])
def test_what_is_cancelled_at_the_door_is_cancelled_behind_it(gate, ends):
    async def main():
        task = asyncio.create_task(own.generate_async([rbf(reward=gate, seed=seed) for seed in range(3)]))
        while not model.asked.is_set():
            await asyncio.sleep(0)
        if ends == "task":
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        model.open.set()  # while the loop ends, which waits for the threads of its executor

    model = Slow()
    with engine(model) as own:
        asyncio.run(main())
        gate.open.set()
    assert own.stats().promised == own.stats().live == 0
    assert own.ledger.executed["committed"] + own.ledger.executed["speculative"] < 36


def test_awaiting_on_a_thread_of_the_engine_is_an_error_and_no_deadlock(shared):
    errors = []

    def waits_inside(images, prompts):
        async def stream(job):
            return [update async for update in job]

        async def wait(job):
            return await job

        for waiting in (stream, wait):
            job = shared.submit(rbf())
            with pytest.raises(RollflowError, match="waits for the engine that waits for it") as found:
                asyncio.run(waiting(job))
            errors.append(found.value)
        with pytest.raises(RollflowError, match="waits for the engine that waits for it"):
            asyncio.run(shared.generate_async(bon()))
        return images.mean((1, 2, 3))

    assert shared.generate(bon(reward=waits_inside)).committed_nfe == 4
    assert errors
