"""Run by test_serve_ray.py in a network of its own: an actor is killed under load, and nothing is lost."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import ray

sys.path.insert(0, str(Path(__file__).parent))

import workers

from rollflow.serve.desk import Desk
from rollflow.serve.local import LocalChannel
from rollflow.serve.ray_actor import RayChannel


def of(order):
    """What a search's result must always be, whoever computed it."""
    result = {name: value for name, value in order.result.items() if name not in ("seconds", "executed_nfe")}
    return result, [(nfe, reward) for nfe, reward, _ in order.improvements]


async def main():
    made = workers.engine()
    away = RayChannel(engine="workers:engine", cpus=1)
    desk = Desk([away, LocalChannel(made)], pause=0.0)
    await desk.start()
    while not all(worker.alive for worker in desk.stats().workers):
        await asyncio.sleep(0.02)
    orders = [await desk.submit(workers.ask(seed, reward="slow")) for seed in range(60)]
    there = [order for order in orders if desk._dispatcher._at.get(order.id) is desk._dispatcher.workers[0]]
    while not any(order.progress.nfe and not order.done for order in there):
        await asyncio.sleep(0)
    os.kill(away.pid, signal.SIGKILL)
    for order in orders:
        await order.over()
    assert {order.status for order in orders} == {"done"} and desk.stats().workers[0].deaths == 1
    assert sum(order.deaths for order in orders) > 0
    alone = Desk([LocalChannel(made)])
    await alone.start()
    again = [await alone.submit(order.request) for order in orders]
    for order, one in zip(orders, again, strict=True):
        await one.over()
        assert of(order) == of(one) and await order.image() == await one.image()
    await desk.close()
    await alone.close()
    print(f"{len(orders)} searches, {sum(order.deaths for order in orders)} of them twice, 0 lost")


ray.init(num_cpus=1, include_dashboard=False, object_store_memory=80 << 20, configure_logging=False)
try:
    asyncio.run(asyncio.wait_for(main(), 120))
finally:
    ray.shutdown()
