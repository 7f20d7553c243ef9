"""What a method declares that it holds is what it holds, and a pool of that many slots is enough for any mix."""

import gc
import importlib.util
import math
import random
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rollflow import methods, rewards
from rollflow.admission import promise
from rollflow.draw import Draw, Note
from rollflow.errors import BudgetError, RequestError, RollflowError
from rollflow.methods.budget import worth
from rollflow.plan import plan
from rollflow.request import Request

# The device without a model is that of the scheduler's tests; test modules have no name to import them by.
spec = importlib.util.spec_from_file_location("scripted", Path(__file__).with_name("test_scheduler.py"))
scripted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scripted)

BRIGHTNESS = rewards.FunctionReward(scripted.brightness)
BRIGHTNESS.differentiable = True

OPTIONS = {
    "beam": {"survivors": st.integers(1, 5), "lookahead": st.integers(0, 3)},
    "code": {"block": st.integers(1, 4)},
    "das": {"temperature": st.sampled_from([0.1, 1.0]), "threshold": st.sampled_from([0.3, 0.9])},
    "dts": {"walks": st.integers(1, 5)},
    "evosearch": {"generations": st.integers(1, 5), "elites": st.integers(1, 4)},
    "fk": {"threshold": st.sampled_from([0.0, 0.5, 1.0]), "potential": st.sampled_from(["max", "sum", "difference"])},
    "psp": {"factor": st.sampled_from([1.0, 1.3, 2.0, 5.0]), "first": st.integers(0, 5)},
    "rbf": {"initial": st.none() | st.integers(1, 6), "gradient": st.sampled_from([0.0, 1.0])},
    "ses": {"generations": st.integers(1, 5), "elites": st.integers(1, 4)},
    "smc": {"threshold": st.sampled_from([0.0, 0.5, 1.0]), "temperature": st.sampled_from([0.1, 1.0])},
    "sop": {"survivors": st.integers(1, 4), "back": st.integers(1, 3), "ahead": st.integers(4, 6)},
    "sprout": {
        "explore": st.sampled_from([0.2, 0.5, 1.0]), "rounds": st.integers(0, 4), "elites": st.integers(1, 5),
        "factor": st.sampled_from([1.0, 1.5, 3.0]), "first": st.integers(0, 4),
    },
    "svdd": {"children": st.none() | st.integers(1, 3), "gradient": st.sampled_from([0.0, 1.0])},
    "threshold": {
        "bar": st.sampled_from([None, 1.0, 9.0]), "initial": st.none() | st.integers(1, 5),
        "children": st.integers(1, 5),
    },
    "zo": {"neighbours": st.integers(1, 6)},
}  # fmt: skip
VARIANTS = st.sampled_from(methods.names()).flatmap(
    lambda name: st.tuples(st.just(name), st.fixed_dictionaries({}, optional=OPTIONS.get(name, {})))
)


class Held:
    """A particle that is alive while its method refers to it or may still draw from it."""

    def __init__(self, reward, step):
        self.reward, self.step = reward, step


def most_held(search, reward_of):
    """Drives a search one child at a time; returns the most particles that it held at once."""
    alive, dismissed = weakref.WeakSet(), weakref.WeakSet()
    reply, most = None, 0
    while True:
        try:
            draws = search.send(reply)
        except StopIteration:
            return most
        if isinstance(draws, Note):
            reply = None
            continue
        reply = []
        for draw in draws:
            assert not any(p in dismissed for p in (draw.parent, *draw.mix) if p is not None)
        for draw in draws:
            children, kept = [], []
            for _ in range(draw.count):
                children.append(Held(reward_of() if draw.scored else None, draw.arrives))
                kept = sorted([*kept, children[-1]], key=worth, reverse=True)
                if draw.keep is not None:
                    dismissed.update(kept[draw.keep :])
                    del kept[draw.keep :]
                alive.add(children[-1])
                most = max(most, len(alive) - len(dismissed))
                if draw.scored and children[-1].reward > draw.until:
                    break
            reply.append(children)
        del draws, draw, children, kept


def dice(seed):
    """Rewards with ties and NaNs."""
    rng = random.Random(seed)
    return lambda: math.nan if rng.random() < 0.1 else float(rng.randrange(5))


@settings(max_examples=200)
@given(VARIANTS, st.integers(1, 250), st.integers(1, 12), st.integers(0, 2**20))
def test_no_method_holds_more_than_it_declares(variant, nfe, steps, seed):
    name, options = variant
    try:
        search = methods.make(name, nfe, steps, **options)
    except RequestError:
        return
    assert most_held(search, dice(seed)) <= methods.holds(name, nfe, steps, **options)


def greedy(nfe, steps, width=3):
    """A method of one's own that declares nothing, with several sequential draws at once."""
    width = min(width, nfe // 2)
    (first,) = yield [Draw(None, width)]
    each = (nfe - width) // width
    children = yield [Draw(p, each, until=p.reward) for p in first]
    return max((p for c in children for p in c), key=worth)


OWN = st.tuples(st.just(greedy), st.fixed_dictionaries({"width": st.integers(1, 4)}))


def asked(most):
    """Fields of a request, which its method may refuse."""
    fields = st.fixed_dictionaries(
        {
            "nfe": st.integers(20, most),
            "steps": st.integers(2, 7),
            "seed": st.integers(0, 99),
            "finish": st.sampled_from([0, 0, 1, 2]),
            "finalists": st.sampled_from([None, 1, 3]),
            "stop_at": st.sampled_from([None, None, 3.0]),
        }
    )
    return st.tuples(VARIANTS | OWN, fields)


def request_of(asked):
    """The request, and how many slots it is promised; a test does without one that cannot be honoured."""
    (method, options), fields = asked
    request = Request("a", BRIGHTNESS, method, options=options, **fields)
    try:
        return request, promise(plan(request))
    except RequestError:
        assume(False)


def histories(requests, seed, success, slots, **device):
    """What each search did, in a pool of that many slots."""
    runner = scripted.Scripted(scripted.script_of(seed, success), seed=seed, **device)
    return repr(scripted.drive(requests, runner, slots)[0])  # repr, so that NaN equals NaN


@settings(max_examples=60)
@given(asked(60), st.integers(0, 99), st.sampled_from([0.0, 0.1, 0.5]), st.integers(1, 3), st.booleans())
def test_a_request_needs_no_more_slots_than_it_is_promised(asked, seed, success, lanes, eager):
    request, promised = request_of(asked)
    tight = histories([request], seed, success, promised, lanes=lanes, eager=eager)
    assert tight == histories([request], seed, success, 4096)


@settings(max_examples=40)
@given(
    st.lists(asked(40), min_size=2, max_size=4), st.integers(0, 99), st.sampled_from([0.0, 0.1, 0.5]),
    st.integers(1, 3), st.integers(0, 5),
)  # fmt: skip
def test_a_mix_of_requests_needs_no_more_slots_than_the_largest(asked, seed, success, lanes, spare):
    requests, promised = zip(*map(request_of, asked), strict=True)
    tight = histories(requests, seed, success, max(promised) + spare, lanes=lanes)
    assert tight == histories(requests, seed, success, 4096)


def test_a_large_budget_takes_a_handful_of_slots():
    for method in ("rbf", "svdd", "threshold"):
        assert promise(plan(Request("a", BRIGHTNESS, method, nfe=100_000))) < 32
    assert promise(plan(Request("a", BRIGHTNESS, "bon", nfe=100_000, steps=10))) < 4096


@pytest.fixture
def no_collector():
    """Without Python's cyclic garbage collector, what a cycle of references holds stays."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("method", ["rbf", "threshold", "sprout", "zo"])
def test_slots_come_back_when_nobody_refers_to_their_particles(method, no_collector):
    """Many turns in a small pool, in which no slot may wait for the collector."""
    requests = [Request("a", BRIGHTNESS, method, nfe=120, steps=12, seed=seed) for seed in range(2)]
    slots = promise(plan(requests[0]))
    assert histories(requests, 1, 0.02, slots) == histories(requests, 1, 0.02, 4096)


def test_a_method_that_holds_more_than_it_declares_is_told_so():
    @methods.method(holds=lambda nfe, steps, options: 2)
    def hoarder(nfe, steps):
        (particles,) = yield [Draw(None, nfe)]
        return particles[0]

    request, news = Request("a", BRIGHTNESS, hoarder, nfe=40, steps=2), []
    device = scripted.Scripted(lambda row: 0.0)
    slots = promise(plan(request))
    loop = scripted.Loop(device, scripted.Prepared(device.cost), scripted.Ledger(), lambda geometry: slots)
    loop.submit(plan(request), scripted.SIZE, news.append)
    for _ in range(100):
        if loop.inbox.empty() and device.held:
            device.release()
        loop.step(0)
    assert isinstance(news[-1], scripted.Refused) and isinstance(news[-1].error, RollflowError)
    assert "hoarder holds more particles than it declared" in str(news[-1].error)
    assert loop.snapshot().live == loop.snapshot().promised == 0


@pytest.mark.parametrize("rubbish", [0, -3, 2.5, "many", None])
def test_what_is_declared_is_checked_at_the_door(rubbish):
    @methods.method(holds=lambda nfe, steps, options: rubbish)
    def mine(nfe, steps):
        (particles,) = yield [Draw(None, nfe)]
        return particles[0]

    with pytest.raises(RequestError, match="what the method mine declares that it holds"):
        plan(Request("a", BRIGHTNESS, mine))


def test_the_smallest_budget_serves_where_the_time_decides():
    """100 evaluations, the assumption before anything is measured, would not pay for one sample of 150 steps."""
    engine = scripted.Engine(scripted.Tiny())
    timed = Request("a", BRIGHTNESS, "bon", steps=150, finish=2, seconds=60.0)
    assert engine._door.check(timed, {}).plan.request.nfe == 152
    with pytest.raises(BudgetError, match=r"bon cannot work with nfe=100: the smallest budget is 152 \(one sample"):
        engine._door.check(replace(timed, seconds=None), {})


def test_a_time_pays_for_more_evaluations_than_there_are_slots_where_the_method_holds_few():
    engine = scripted.Engine(scripted.Tiny(), slots=128)
    for method, nfe in (("rbf", 5000), ("dts", 128)):
        checked = engine._door.check(Request("a", BRIGHTNESS, method, steps=5, seconds=60.0), {})
        assert checked.resize(5000).request.nfe == nfe


def test_an_image_that_is_being_made_keeps_its_slot():
    """Somebody looks at the best so far; meanwhile better ones come, and the search lets it go."""
    taken, works, seen, news = [], [], [], []

    def ever_better(row):
        taken.append(row.slot)
        return float(len(taken))

    device = scripted.Scripted(ever_better, lanes=2, parallel=False, buckets=(1,), eager=False)
    device.peek = lambda candidate, geometry: candidate.slot
    device.submit_work = lambda *work: works.append(work)
    request = Request("a", BRIGHTNESS, "svdd", nfe=40, steps=2, finalists=1)
    loop = scripted.Loop(device, scripted.Prepared(device.cost), scripted.Ledger(), lambda geometry: 8)
    ticket = loop.submit(plan(request), scripted.SIZE, news.append)

    def run(until):
        while not until():
            assert not loop.inbox.empty(), "the loop waits for nothing"
            loop.step(0)

    run(lambda: len(taken) >= 10)
    loop.peek(ticket, lambda image, error: seen.append(image))
    run(lambda: bool(works))
    before, looked_at = len(taken), works[0][0]()
    run(lambda: len(taken) >= before + 20)
    assert looked_at in taken[:before] and looked_at not in taken[before:]
    works[0][2](scripted.Done(works[0][1], looked_at))
    device.report(scripted.Free())
    run(lambda: isinstance(news[-1], scripted.Finished))
    assert seen == [looked_at]
    assert loop.snapshot().live == loop.snapshot().promised == 0
