"""A fault of the engine's own on a lane, which nothing was made to expect: its requests fail, and the lane is free."""

import pytest
import torch
from test_streams import rows
from tiny import PATIENCE, assert_sound, ended, engine, rbf

from rollflow import Draw, EngineDead, Request, RollflowError
from rollflow.device.attempts import Attempts
from rollflow.row import Failed, Free, Landed


def brightness(images, prompts):
    return images.mean((1, 2, 3))


brightness.differentiable = True


def unjudged(nfe, steps):
    """A method whose first particle nobody judges."""
    ((first,),) = yield [Draw(None, scored=False)]
    ((second,),) = yield [Draw(first)]
    return second


REQUESTS = {
    "batches": rbf(8),
    "guided": Request("a", method="dps", nfe=6, steps=3, reward=brightness, interpolant="linear"),
    "unjudged": Request("a", method=unjudged, nfe=4, steps=2, reward=brightness, interpolant="linear"),
}


@pytest.mark.parametrize("name", ["batch", "freed"])  # which each lane calls around its work
@pytest.mark.parametrize("kind", REQUESTS)
def test_a_fault_of_the_ledger_leaves_nobody_waiting(kind, name):
    """At each of its calls in turn: the chores, the batches, the final image."""
    request = REQUESTS[kind]
    for k in range(1, 40):
        with engine() as made:
            calls, own = [], getattr(made.ledger, name)

            def fault(*args, calls=calls, own=own, k=k):
                calls.append(name)
                if len(calls) == k:
                    raise KeyError("ledger")
                return own(*args)

            setattr(made.ledger, name, fault)
            error = ended(made.submit(request)).exception(PATIENCE)
            assert error is None or isinstance(error, RollflowError), error
            assert error is None or isinstance(error.__cause__, KeyError), error
            if len(calls) < k:
                assert error is None and k > 2
                return
            assert_sound(made)
    raise AssertionError("it never ends")


def run(attempts, work, batch):
    events = []
    attempts.run(work, batch, events.append)
    return events


def answer(part, report):
    report(Landed(part, [None] * len(part)))


def faulty(*args):
    raise KeyError("ours")


def never(work):
    return False


def check(events, answered, failed):
    """Every row once, one free lane, which comes last."""
    assert sum(isinstance(event, Free) for event in events) == 1 and isinstance(events[-1], Free)
    landed = [row.slot for event in events if isinstance(event, Landed) for row in event.rows]
    ill = [row.slot for event in events if isinstance(event, Failed) for row in event.work]
    assert (landed, sorted(ill)) == (answered, failed)
    for event in events:
        if isinstance(event, Failed):
            assert str(event.error).startswith("the engine met a fault of its own") and "KeyError" in str(event.error)
            assert type(event.error) is RollflowError and isinstance(event.error.__cause__, KeyError)


def test_whatever_surrounds_a_batch_may_fail():
    check(run(Attempts(faulty, faulty, faulty), answer, rows(range(3))), [], [0, 1, 2])

    def full(part, report):
        raise torch.OutOfMemoryError

    check(run(Attempts(len, never, faulty), full, rows(range(3))), [], [0, 1, 2])


def test_what_was_answered_before_a_fault_is_answered_once():
    """A batch that was halved, and whose second half meets it."""
    sizes = []

    def size(part):
        sizes.append(len(part))
        return len(part) if len(sizes) < 3 else faulty()

    def halved(part, report):
        if len(part) == 4:
            raise torch.OutOfMemoryError
        answer(part, report)

    check(run(Attempts(size, never, lambda geometry, rows, guided: None), halved, rows(range(4))), [0, 1], [2, 3])


@pytest.mark.parametrize("early", [False, True])
def test_what_is_done_last_may_fail_before_or_after_it_freed_the_lane(early):
    def last(free):
        if early:
            free()
        faulty()

    events = run(Attempts(len, never, faulty), lambda part, report: last, rows(range(2)))
    check(events[::-1] if early else events, [], [0, 1])


def test_a_device_that_fails_at_the_end_is_dead():
    def last(free):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    failed, free = run(Attempts(len, never, faulty), lambda part, report: last, rows(range(2)))
    assert isinstance(failed.error, EngineDead) and isinstance(free, Free)
