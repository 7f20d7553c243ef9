"""What the tests of workers share: an engine of almost no cost that any process can make, and rewards with names."""

import os
import signal
import threading
import time

from tiny import Tiny

from rollflow import wire
from rollflow.engine import Engine
from rollflow.errors import EngineDead as EngineDead
from rollflow.rewards import Reward, catalog
from rollflow.serve import station
from rollflow.serve.messages import Message


def _bright(pause):
    def bright(images, prompts):
        if any("deadly" in prompt for prompt in prompts):
            os.kill(os.getpid(), signal.SIGKILL)
        if any("broken" in prompt for prompt in prompts):
            raise ValueError("the judge is ill")
        time.sleep(pause)
        return images.mean((1, 2, 3))

    return bright


class Named(Reward):
    """A reward by name: `bright` is the mean of an image's pixels, `slow` the same some milliseconds later."""

    def __init__(self, name, pause=0.0):
        self.name, self._judge = name, _bright(pause)

    def __call__(self, images, prompts):
        return self._judge(images, prompts)


GATE = threading.Event()  # lets searches of the reward `gated` go on


def bright():
    return Named("bright")


def slow():
    return Named("slow", 0.005)


def gated():
    made = Named("gated")
    judge = made._judge

    def wait(images, prompts):
        assert GATE.wait(30), "nobody opened the gate"
        return judge(images, prompts)

    made._judge = wait
    return made


station.PACE = 0.02  # what tests wait for comes soon, however fast their searches are
for one in (bright, slow, gated):
    catalog._BUILT_IN.setdefault(one.__name__, ("workers", one.__name__))


def engine():
    """An engine whose results depend on no other request, bit for bit."""
    print("what is printed must not get between the frames")
    return Engine(Tiny(), lanes=1, threads=1, buckets=(8,))


def ask(seed=0, **options):
    """A request of many batches, as JSON."""
    return {"prompt": "a", "reward": "bright", "method": "rbf", "steps": 4, "nfe": 12, "seed": seed, **options}


def request(found):
    """The same as a `rollflow.Request`."""
    return wire.from_json(found)


class Told:
    """A channel that a test works by hand."""

    def __init__(self):
        self.sent, self.starts = [], 0

    def __repr__(self):
        return "told"

    def start(self, on_message, on_death):
        self.starts += 1
        self.on_message, self.on_death = on_message, on_death

    def send(self, message):
        self.sent.append(message)
        if message.header["op"] == "check":
            self.say(op="answer", call=message.header["call"], nfe=message.header["request"].get("nfe", 100))

    def say(self, payload=b"", **header):
        self.on_message(Message(header, payload))

    def ran(self):
        """The ids of searches that it was given."""
        return [message.header["id"] for message in self.sent if message.header["op"] == "run"]

    def kill(self):
        self.on_death("killed")

    def close(self):
        pass
