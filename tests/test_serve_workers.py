"""Workers die, and nothing is lost: each search ends once, with the result that one engine gives."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import workers
from workers import ask

from rollflow.serve import worker
from rollflow.serve.desk import Desk
from rollflow.serve.local import LocalChannel
from rollflow.serve.messages import Message, pack, read, unpack
from rollflow.serve.process import ProcessChannel

PATIENCE = 300  # seconds that processes which import torch may take on a busy machine


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
        assert away._process.poll() is not None, "a worker outlived its desk"

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


@pytest.fixture
def pipes():
    """A worker's loop on a thread of this process; gives what sends, what hears, and its exit codes."""
    (there, to), (away, back) = os.pipe(), os.pipe()
    source, sink, put, get = (
        os.fdopen(end, mode) for end, mode in ((there, "rb"), (back, "wb"), (to, "wb"), (away, "rb"))
    )
    codes = []
    thread = threading.Thread(target=lambda: codes.append(worker.run(source, sink)))
    thread.start()

    def say(**header):
        put.write(pack(Message(header)))
        put.flush()

    def hear(op):
        while (message := read(get)) is not None and message.header["op"] != op:
            pass
        return message.header

    yield say, hear, codes
    put.close()
    thread.join(PATIENCE)
    assert not thread.is_alive() and codes  # it ends when its input does
    for end in (source, sink, get):
        end.close()


def test_a_worker_says_what_it_lacks(pipes):
    say, hear, _ = pipes
    say(op="start", engine="rollflow.serve.worker:pretrained", options={"dtype": "float3"})
    error = hear("unfit")["error"]
    assert error["type"] == "RequestError" and "float3" in error["message"]


def test_what_a_worker_process_logs_has_its_time():
    start = pack(Message({"op": "start", "engine": "nowhere:engine", "options": {}}))
    command = [sys.executable, "-m", "rollflow.serve.worker"]
    found = subprocess.run(command, input=start, capture_output=True, timeout=PATIENCE)
    assert found.returncode == worker.UNFIT and unpack(found.stdout).header["op"] == "unfit"
    line = r"\d{4}-\d\d-\d\dT[\d:]{8}[+-]\d{4} ERROR a worker's engine could not be made\n"
    assert re.search(line, found.stderr.decode())


def test_a_worker_whose_engine_is_dead_ends_its_process(pipes, monkeypatch):
    made, died = [], threading.Event()
    monkeypatch.setattr(workers, "engine", lambda build=workers.engine: made.append(build()) or made[0])
    monkeypatch.setattr(os, "_exit", lambda code: died.set() if code == worker.DEAD else None)
    say, hear, _ = pipes
    say(op="start", engine="workers:engine")
    assert hear("ready")["stats"]["free"] >= 0
    workers.GATE.clear()
    say(op="run", id="a", request=ask(reward="gated"))
    while not made[0].stats().running:
        time.sleep(0.01)
    loop = made[0]._host.loop
    loop.call(loop.fail, workers.EngineDead("the device is gone"))
    assert "the device is gone" in hear("dead")["reason"] and died.wait(PATIENCE)
    workers.GATE.set()
    made[0].close(drain=False)
