"""Workers die, and nothing is lost: each search ends once, with the result that one engine gives."""

import asyncio
import os
import signal
from collections import Counter
from pathlib import Path

import workers
from workers import ask

from rollflow.serve.desk import Desk
from rollflow.serve.local import LocalChannel
from rollflow.serve.messages import Message, pack, read, unpack
from rollflow.serve.process import ProcessChannel

PATIENCE = 120  # seconds that a process may take to import torch on a busy machine


def process():
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return ProcessChannel(engine="workers:engine", environment={"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})


def of(order):
    """What a search's result must always be, whoever computed it."""
    result = {name: value for name, value in order.result.items() if name not in ("seconds", "executed_nfe")}
    return result, [(nfe, reward) for nfe, reward, _ in order.improvements]


async def all_ready(desk):
    while not all(worker.alive for worker in desk.stats().workers):
        await asyncio.sleep(0.02)


def test_kill_9_under_load_loses_nothing_and_answers_nothing_twice(monkeypatch):
    """200 searches on a process and an engine here; the process is killed while it runs some of them."""
    ends = Counter()
    before = Desk._over
    monkeypatch.setattr(Desk, "_over", lambda self, order, *rest: (ends.update([order.id]), before(self, order, *rest)))

    async def main():
        away, made = process(), workers.engine()
        desk = Desk([away, LocalChannel(made)], pause=0.0)
        await desk.start()
        await all_ready(desk)
        first = away.pid
        orders = [await desk.submit(ask(seed, reward="slow" if seed % 2 else "bright")) for seed in range(200)]
        there = [order for order in orders if desk._dispatcher._at.get(order.id) is desk._dispatcher.workers[0]]
        while not any(order.progress.nfe and not order.done for order in there):
            await asyncio.sleep(0)
        os.kill(first, signal.SIGKILL)
        for order in orders:
            await order.over()
        assert [order.status for order in orders] == ["done"] * 200
        assert ends == Counter(order.id for order in orders)  # each once
        assert sum(order.deaths for order in orders) > 0, "it was killed with nothing to do"
        assert desk.stats().workers[0].deaths == 1
        images = [await order.image() for order in orders]
        await desk.close()

        desk = Desk([LocalChannel(made)])
        await desk.start()
        alone = [await desk.submit(order.request) for order in orders]
        for order, image, one in zip(orders, images, alone, strict=True):
            await one.over()
            assert of(order) == of(one) and await one.image() == image
        await desk.close()
        made.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


def test_frames_are_what_they_were():
    message = Message({"op": "news", "best": float("inf"), "text": "ä\n"}, bytes(range(256)))
    assert unpack(pack(message)) == message

    class Pieces:
        """A pipe that ends in the middle of the second message."""

        def __init__(self):
            self.left = pack(message) + pack(message)[:-1]

        def read(self, count):
            found, self.left = self.left[:count], self.left[count:]
            return found

    pipe = Pieces()
    assert read(pipe) == message and read(pipe) is None
