"""Desks on channels that a test works by hand."""

import asyncio

from tiny import PATIENCE

from rollflow.serve.desk import Desk


def run(main, timeout=PATIENCE):
    asyncio.run(asyncio.wait_for(main, timeout))


async def opened(*channels, **options):
    """A desk on channels worked by hand, all ready."""
    desk = Desk(channels, **options)
    starting = asyncio.ensure_future(desk.start())
    await asyncio.sleep(0)
    for channel in channels:
        channel.say(op="ready", stats={"nfe_per_second": 10.0, "free": 7})
    await starting
    await settled()
    return desk


async def settled():
    """Until what was said by hand has been heard."""
    for _ in range(5):
        await asyncio.sleep(0)


def over(channel, id, reward=1.0, status="done", **more):
    found = {"result": {"reward": reward, "format": "png"}, "better": [[2, reward, 0, 0.1]]}
    far = {"nfe": 12, "best": reward, "level": 3, "seconds": 1.0}
    channel.say(b"image", op="over", id=id, status=status, **found, **far, **more)
