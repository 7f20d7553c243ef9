"""Recordings that the tests of the report share: what an engine did, and others."""

from dataclasses import replace
from functools import cache, partial

import synthetic
from tiny import PATIENCE, Gate, brightness, engine, rbf

from rollflow import methods

SCENARIOS = [
    {"name": "as recorded", "seconds": 4.0, "speedup": 1.0, "nfe_per_second": 200.0, "p95": 3.9},
    {"name": "forward 0.5x", "seconds": 3.2, "speedup": 1.25, "nfe_per_second": 250.0, "p95": None},
    {"name": "decode 0.5x", "seconds": 3.0, "speedup": 4 / 3, "nfe_per_second": 266.7},
]
USD = 2.49


def smooth(images, prompts):
    return images.square().mean((1, 2, 3))


smooth.differentiable = True


def failing(images, prompts):
    raise ValueError("no")


def recorded():
    """What an engine did: all methods, finishes, several rewards, a request that failed and one that was cancelled."""
    gate = Gate()
    with engine(lanes=2) as one:
        one.generate(rbf(8))
        with one.profile() as profile:
            cancelled = one.submit(rbf(60, reward=gate))
            assert gate.called.wait(PATIENCE)
            cancelled.cancel()
            gate.open.set()
            jobs = [
                one.submit(
                    rbf(24, method=name, reward=smooth if methods.guided(name, {}) else reward, finish=2, seed=1)
                )
                for name in methods.names()
                for reward in (brightness, "jpeg")
            ]
            bad = one.submit(rbf(24, reward=failing))
            for job in jobs:
                job.result()
            assert isinstance(bad.exception(), Exception) and cancelled.cancelled()
    return profile.recording


def forgetful():
    """The rings lost the first half."""
    whole = synthetic.busy(seed=3)
    rows, batches = whole.rows[len(whole.rows) // 2 :], whole.batches[10:]
    lost = {"rows": len(whole.rows) - len(rows), "batches": 10, "calls": 0, "requests": 0}
    return replace(whole, rows=rows, batches=batches, about={**whole.about, "forgotten": lost})


MAKERS = {
    "engine": recorded,
    "searches": synthetic.busy,
    "device": partial(synthetic.busy, seed=1, device=True, frames=9),
    "many": partial(synthetic.busy, seed=2, requests=150, batches=130, lanes=5),
    "forgotten": forgetful,
    "one lane": partial(synthetic.busy, seed=4, lanes=1, requests=3),
}


@cache
def recording_of(name):
    return MAKERS[name]()


def flat(value, path=""):
    """Figures by name, as `a.b.0.c`."""
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, (list, tuple)):
        pairs = enumerate(value)
    else:
        return {path: value}
    found = {}
    for name, one in pairs:
        found.update(flat(one, f"{path}.{name}" if path else str(name)))
    return found
