"""Packing: speculation decides as the sequential algorithm does, lanes share the work, and the cost model chooses."""

import math
import random
import threading
from collections import Counter, defaultdict, deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollflow import methods, rewards
from rollflow.admission import promise
from rollflow.draw import Draw
from rollflow.engine import Engine
from rollflow.errors import FunctionError, ModelError
from rollflow.loop import Loop
from rollflow.models import FlowModel, Geometry, Traits
from rollflow.models.layout import Layout
from rollflow.plan import plan
from rollflow.preparing import Preparations
from rollflow.profile.ledger import Ledger
from rollflow.profile.records import KINDS, STATES
from rollflow.request import Request
from rollflow.row import Done, Failed, Free, Landed, Outcome, Shown
from rollflow.schedule.cost import CostModel
from rollflow.schedule.odds import Odds
from rollflow.ticket import Finished, Refused

SIZE = Geometry(8, 8, 8, 8, 16, 12)


def brightness(images, prompts):
    return images.mean((1, 2, 3))


class Prepared(Preparations):
    """Every prompt is encoded and every size measured."""

    def __init__(self, cost):
        self.conditioning, self.costs, self.chores = defaultdict(lambda: None), {}, deque()
        self.cost = lambda geometry, guided=False: cost

    def want(self, text, geometry, then):
        then(None)

    def known(self, text, geometry):
        return self.conditioning[text]

    def company(self, conditioning, guidance, *given):
        return conditioning, *given


class Scripted:
    """A device without a model: a row's reward is a function of its request, noise key and time, and batches come back
    in any order. An eager one lets rows run ahead as far as they may; another runs one row at a time."""

    judge, preview = None, False

    def __init__(self, script, lanes=2, parallel=True, seed=0, buckets=(1, 2, 4, 8, 16, 64), eager=True):
        self.lanes, self.parallel, self.script, self.eager = lanes, parallel, script, eager
        self.random = random.Random(seed)
        self.held, self.batches, self.ledger = [], [], Ledger()
        self.judged = Counter()  # rows that were, and that were to be
        self.whose, self.chosen = {}, {}  # what is in each slot; the candidates of each request, by its seed
        flat = dict.fromkeys(buckets, 1.0)  # a batch costs the same whatever its size: run ahead all the way
        linear = {bucket: float(bucket) for bucket in range(1, max(buckets) + 1)}  # to run ahead never pays
        self.cost = CostModel(flat if eager else linear)

    def bucket(self, rows, geometry, guided=False):
        return self.cost.bucket(rows)

    def allocate(self, geometry, slots):
        pass

    def peek(self, candidate, geometry):
        return None

    def submit(self, rows, report, attempt=0):
        assert len({(row.brief.geometry, row.kind == "guided") for row in rows}) == 1
        self.batches.append([(row.brief.seed, row.kind, row.ahead) for row in rows])
        self.ledger.rows(rows, self.bucket(len(rows), SIZE))
        for row in rows:
            origin = self.whose.get((row.brief.seed, row.parent)) if row.kind == "finish" else None
            self.whose[row.brief.seed, row.slot] = (row.key, row.step.time, origin)
        report(Free())  # as if rewards took for ever: the lane is free at once
        self.held.append(rows)
        self.report = report
        while self.held and (not self.eager or len(self.held) > 3 or self.random.random() < 0.5):
            self.release()

    def release(self):
        rows = self.held.pop(self.random.randrange(len(self.held)))
        scores = [self.script(row) if row.wanted else None for row in rows]
        self.judged.update(scored=sum(row.scored for row in rows), judged=sum(row.wanted for row in rows))
        for row, score in zip(rows, scores, strict=True):
            failed = isinstance(score, Exception)
            self.report(Failed([row], score) if failed else Landed([row], [score]))

    def submit_images(self, shows, report):
        report(Free())
        for show in shows:
            self.chosen[show.brief.seed] = [self.whose[show.brief.seed, c.slot] for c in show.candidates]
        pixels = torch.zeros(3, 8, 8)
        outcomes = [Outcome(pixels, pixels.to(torch.uint8), float(s.candidates[0].level), None) for s in shows]
        report(Shown(shows, outcomes))

    def submit_work(self, work, then, report, kind="other"):
        report(Done(then, work()))
        report(Free())


def drive(requests, device, slots=4096, traits=None):
    """Runs requests to the end; returns each one's history and the point of the grid of its choice."""
    ledger, found = device.ledger, {}
    loop = Loop(device, Prepared(device.cost), ledger, lambda geometry: slots)
    for i, request in enumerate(requests):
        loop.submit(plan(request, traits), SIZE, lambda news, i=i: found.__setitem__(i, news))
    while not all(isinstance(found.get(i), Finished) for i in range(len(requests))):
        assert not any(isinstance(news, Refused) for news in found.values()), found
        if loop.inbox.empty() and device.held:
            device.release()
        assert not loop.inbox.empty(), "the loop waits for nothing"
        loop.step(0)
    assert loop.snapshot().live == loop.snapshot().promised == 0
    return [(found[i].history.records, found[i].outcome.reward) for i in range(len(requests))], ledger


def script_of(seed, success):
    """Rewards that depend on who asks and on the noise, not on the packing: ties, NaNs, now and then a new best."""

    def reward(row):
        dice = random.Random(f"{seed} {row.brief.seed} {row.key} {row.step.time}")
        if dice.random() < 0.05:
            return math.nan
        return float(dice.randrange(3)) + (round(40 * (1 - row.step.time)) if dice.random() < success else 0)

    return reward


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**20),
    success=st.floats(0, 1),
    lanes=st.integers(1, 3),
    nfe=st.integers(12, 60),
    steps=st.integers(2, 6),
    method=st.sampled_from(["rbf", "threshold", "svdd", "bon", "sprout", "smc"]),
    stop_at=st.sampled_from([None, 3.0, 9.0]),
    finish=st.sampled_from([0, 0, 2]),
)
def test_decisions_are_the_same_however_far_rows_run_ahead(seed, success, lanes, nfe, steps, method, stop_at, finish):
    options = {"steps": steps, "stop_at": stop_at, "finish": finish, "finalists": 2 if finish else None}
    requests = [
        Request("a", reward=brightness, method=method, nfe=nfe + 2 * finish + i, seed=i, **options) for i in range(3)
    ]
    reward = script_of(seed, success)
    sequential, _ = drive(requests, Scripted(reward, lanes=1, buckets=(1,), eager=False))
    ahead, _ = drive(requests, Scripted(reward, lanes=lanes, seed=seed))
    together, _ = drive(requests, Scripted(reward, lanes=lanes, seed=seed + 1, parallel=False))
    assert repr(sequential) == repr(ahead) == repr(together)  # repr, so that NaN equals NaN


def smooth(images, prompts):
    return images.mean((1, 2, 3))


smooth.differentiable = True


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**20),
    success=st.floats(0, 1),
    nfe=st.integers(24, 36),
    steps=st.integers(2, 6),
    method=st.sampled_from(methods.names()),
    stop_at=st.sampled_from([None, 3.0, 9.0]),
    seconds=st.sampled_from([None, 1e6]),
    finish=st.sampled_from([0, 2]),
    finalists=st.integers(1, 3),
    trusted=st.floats(0.3, 1.0),
)
def test_decisions_are_the_same_whether_all_is_judged(
    seed, success, nfe, steps, method, stop_at, seconds, finish, finalists, trusted
):
    given = {"steps": steps, "stop_at": stop_at, "seconds": seconds, "finish": finish, "finalists": finalists}
    script, traits = script_of(seed, success), Traits(trusted_from=trusted)

    def run(judge_all, **how):
        device = Scripted(script, seed=seed, **how)
        requests = [Request("a", smooth, method, nfe, judge_all=judge_all, **given)]
        found, ledger = drive(requests, device, traits=traits)
        assert device.judged["judged"] == np.count_nonzero(ledger.table("rows")["scored"])  # it counts what was done
        assert ledger.table("batches")["judged"].sum() == device.judged["judged"]
        return found, device

    whole, one = run(True, lanes=1, buckets=(1,), eager=False)
    sparing, two = run(False)
    plain, three = run(False, lanes=1, buckets=(1,), eager=False)
    assert one.chosen == two.chosen == three.chosen and repr(sparing) == repr(plain)
    assert three.judged["judged"] == three.judged["scored"] <= one.judged["judged"]
    for (records, _), (fewer, _) in zip(whole, sparing, strict=True):
        assert len(records) == len(fewer)
        for a, b in zip(records, fewer, strict=True):
            dropped = b.reward is None or (b.kind == "finish" and a.reward is not None)  # or its image's
            assert repr(replace(b, reward=a.reward) if dropped else b) == repr(a)


@pytest.mark.parametrize(
    ("given", "spared"),
    [
        ({"finalists": 1}, True),
        ({"finish": 2}, True),  # one finalist, too
        ({"finalists": 1, "reward": "z(soft_count) + count"}, True),  # all of the first turn is judged
        ({"finalists": 1, "stop_at": 1e9}, False),
        ({"finalists": 1, "seconds": 1e6}, False),
        ({"finalists": 1, "judge_all": True}, False),
        ({"finish": 2, "judge_all": True}, False),
        ({}, False),  # the best two are compared
    ],
)
def test_what_decides_nothing_is_judged_where_the_engine_compares_it(given, spared):
    """EvoSearch looks at no mutant's reward, nor anybody at that of an only finalist."""

    def script(row):
        return (0.5, 0.25) if given.get("reward") else script_of(1, 0.5)(row)

    asked = {"reward": smooth, "method": "evosearch", "nfe": 60, **given}
    ((records, _),), _ = drive([Request("a", **asked)], device := Scripted(script))
    ((every, _),), _ = drive([Request("a", **{**asked, "judge_all": True})], whole := Scripted(script))
    judged, all_judged = ([record.index for record in of if record.reward is not None] for of in (records, every))
    assert (device.judged["judged"] < whole.judged["judged"]) is spared and (len(judged) < len(all_judged)) is spared
    if given.get("finish"):
        assert records[-1].kind == "finish" and records[-1].reward is not None  # its image was judged


def test_rows_that_are_beaten_before_they_are_decoded_are_not_judged():
    """Of rows that ran ahead of an answer, those that come after it are decoded only if it leaves them needed."""
    requests = [Request("a", brightness, "threshold", 60, 6, seed=seed) for seed in range(4)]
    found, ledger = drive(requests, device := Scripted(script_of(5, 0.3)))
    expected, _ = drive(requests, Scripted(script_of(5, 0.3), lanes=1, buckets=(1,), eager=False))
    assert found == expected
    assert device.judged["judged"] < device.judged["scored"]
    rows = ledger.table("rows")
    beaten = rows[(rows["number"] >= 0) & ~rows["scored"] & (rows["kind"] == KINDS.index("committed"))]
    assert len(beaten) and (beaten["state"] == STATES.index("dropped")).all() and np.isnan(beaten["reward"]).all()


def test_an_error_of_a_row_that_is_not_needed_harms_nobody():
    """Rewards that fail for every image that the sequential search does not see change nothing of it."""
    script = script_of(5, 0.3)
    requests = [Request("a", brightness, "rbf", 60, 6, seed=seed) for seed in range(4)]
    expected, _ = drive(requests, Scripted(script, eager=False))
    seen = set()
    drive(requests, Scripted(lambda row: (seen.add((row.brief.seed, row.key)), script(row))[1], eager=False))
    failed = []

    def fragile(row):
        if (row.brief.seed, row.key) in seen:
            return script(row)
        failed.append(row)
        return FunctionError("the reward sees what it should not")

    found, _ = drive(requests, Scripted(fragile))
    assert found == expected and failed


def test_chores_and_batches_take_turns():
    """On one lane, ten new prompts are no reason to let a search wait for all of them."""
    order = []

    class Logged(Scripted):
        def submit(self, rows, report, attempt=0):
            order.append("batch")
            super().submit(rows, report, attempt)

    device = Logged(script_of(1, 0.3), lanes=1, parallel=False, eager=False)
    loop = Loop(device, Prepared(device.cost), Ledger(), lambda geometry: 64)
    told = []
    loop.submit(plan(Request("a", brightness, "rbf", 12, 4)), SIZE, told.append)
    loop.preparations.chores += [(lambda: order.append("chore"), lambda value, error: None, "other")] * 10
    while not (told and isinstance(told[-1], Finished)):
        if loop.inbox.empty() and device.held:
            device.release()
        loop.step(0)
    while not loop.inbox.empty():
        loop.step(0)
    assert order[:8] == ["chore", "batch"] * 4  # further on the search waits for answers now and then


def test_rows_run_ahead_and_what_is_not_needed_is_wasted_and_counted():
    ledger_of = {}
    for eager in (True, False):
        runner = Scripted(script_of(1, 0.3), lanes=1, eager=eager)
        histories, ledger_of[eager] = drive([Request("a", reward=brightness, method="rbf", nfe=60, steps=6)], runner)
        assert len(histories[0][0]) == 60
        rows = Counter(ahead for batch in runner.batches for _, _, ahead in batch)
        assert (rows[True] > 0) is eager
        assert sum(rows.values()) == 60 + ledger_of[eager].executed["speculative"]
    assert ledger_of[True].executed["speculative"] > 0 == ledger_of[False].executed["speculative"]


def test_nobody_runs_ahead_on_slots_that_others_are_promised():
    runner = Scripted(script_of(1, 0.3), lanes=1)
    request = Request("a", reward=brightness, method="rbf", nfe=60, steps=6)
    drive([request], runner, slots=promise(plan(request)) + 3)
    assert 0 < max(sum(ahead for *_, ahead in batch) for batch in runner.batches) <= 3


def test_priorities_go_first_and_equals_take_turns():
    runner = Scripted(lambda row: 0.0, lanes=1, buckets=(1, 2, 4), eager=False)
    requests = [
        Request("a", reward=brightness, method="bon", nfe=4, steps=1, seed=i, priority=p)
        for i, p in enumerate([0, 0, 5, 0])
    ]
    drive(requests, runner)
    served = [seed for batch in runner.batches for seed, *_ in batch]
    assert served[:4] == [2, 2, 2, 2]
    assert sorted(served[4:7]) == [0, 1, 3] and sorted(served[7:10]) == [0, 1, 3]


def test_the_cost_model_chooses_the_batch_that_ends_soonest():
    launch_bound = CostModel({1: 1.0, 2: 1.0, 4: 1.0, 8: 1.1})
    compute_bound = CostModel({1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0})
    chances = [0.9**i for i in range(1, 20)]
    assert launch_bound.rows(1, chances) == 8
    assert compute_bound.rows(1, chances) == 1
    assert launch_bound.rows(5, []) == 5
    assert compute_bound.rows(5, []) == 4  # a row of its own costs one, padding to eight costs three
    assert launch_bound.rows(30, []) == 8 and launch_bound.rows(30, [], lanes=2) == 16
    assert launch_bound.rows(0, [0.9, 0.8]) == 2
    assert CostModel({1: 1.0, 4: 2.0, 8: 9.0}).rows(8, []) == 4  # twice four is sooner done than eight
    # Nine children of which the first success ends the draw: eight and then, most likely, one more, or all at once.
    steps = CostModel({1: 6.9, 2: 9.4, 3: 12.0, 4: 14.5, 5: 17.2, 6: 19.9, 7: 22.6, 8: 25.3})
    assert steps.rows(1, [0.95**i for i in range(1, 9)], lanes=2) == 9
    assert steps.rows(1, [0.3**i for i in range(1, 9)], lanes=2) == 2
    assert launch_bound.bucket(3) == 4


def test_the_odds_are_learned_by_method_and_level():
    odds = Odds()
    before = odds.success("rbf", 2)
    for _ in range(100):
        odds.observe("rbf", 2, True)
    assert odds.success("rbf", 2) > 0.9 and odds.success("rbf", 3) == before == odds.success("svdd", 2)


class Tiny(FlowModel):
    """A model of almost no cost, with as many latents as pixels."""

    device, dtype, layout = torch.device("cpu"), torch.float32, Layout((1, 2, 2), (1.0,) * 3, (0.0,) * 3)

    def geometry(self, height=None, width=None):
        return SIZE

    def check_prompt(self, prompt):
        pass

    def encode(self, prompts):
        return [None for _ in prompts]

    def velocity(self, x, tau, conditioning, guidance, geometry):
        return x * tau[:, None, None]

    def decode(self, latents):
        return latents.sigmoid()


def ask(**options):
    return Request("a", **{"reward": brightness, "nfe": 40, "steps": 5, "method": "rbf", **options})


def test_a_slow_reward_does_not_stall_the_others():
    """While one request waits for its reward, another runs from beginning to end."""
    gate, order = threading.Event(), []

    def slow(images, prompts):
        assert gate.wait(60), "the other request never ended"
        return images.mean((1, 2, 3))

    def quick(images, prompts):
        return images.mean((1, 2, 3))

    def progress(state):
        if state.committed_nfe[1] == 40:
            gate.set()
        order.append(state.committed_nfe)

    engine = Engine(Tiny(), lanes=1)
    results = engine.generate([ask(reward=slow), ask(reward=quick, seed=1)], on_progress=progress)
    assert [r.committed_nfe for r in results] == [40, 40]
    assert any(quick == 40 and slow < 40 for slow, quick in order)


def test_a_reward_is_called_by_one_thread_at_a_time_unless_it_says_so():
    def counting(concurrent):
        state = {"now": 0, "most": 0}
        lock, together = threading.Lock(), threading.Event()

        def reward(images, prompts):
            with lock:
                state["now"] += 1
                state["most"] = max(state["most"], state["now"])
                if state["now"] > 1:
                    together.set()
            assert not concurrent or together.wait(60), "no second call came while the first one waited"
            with lock:
                state["now"] -= 1
            return images.mean((1, 2, 3))

        reward.concurrent = concurrent
        Engine(Tiny(), lanes=2).generate([ask(reward=reward, seed=i, nfe=20) for i in range(12)])
        return state["most"]

    assert counting(False) == 1
    assert counting(True) > 1


@pytest.mark.parametrize("method", methods.names())
def test_every_method_decides_alike_on_any_number_of_lanes(method):
    reward = rewards.FunctionReward(brightness)
    reward.differentiable = True
    base = [ask(method=method, reward=reward, seed=i, nfe=36) for i in range(5)]
    found = []
    for options in ({"lanes": 1}, {"lanes": 3}):
        engine = Engine(Tiny(), buckets=(8,), **options)
        results = engine.generate(base)
        found.append([(r.reward, repr(r.history)) for r in results])
        assert engine.stats().live == engine.stats().promised == 0
    assert found[0] == found[1]


def test_an_error_in_a_lane_leaves_the_engine_whole():
    engine = Engine(Tiny(), lanes=2)
    calls = []

    def breaks(images, prompts):
        calls.append(len(images))
        if len(calls) >= 3:  # not once: a row that ran ahead in vain may fail as it likes
            raise ValueError("the judge is ill")
        return images.mean((1, 2, 3))

    with pytest.raises(FunctionError, match="the judge is ill"):
        engine.generate(ask(reward=breaks))
    assert engine.stats().live == engine.stats().promised == 0
    assert engine.generate(ask()).committed_nfe == 40


def test_an_error_of_the_decoder_in_a_batch_of_judged_and_unjudged_rows_is_raised():
    class Broken(Tiny):
        decodes = 0

        def decode(self, latents):
            self.decodes += 1
            if self.decodes >= 3:
                raise RuntimeError("the decoder is ill")
            return latents.sigmoid()

    for lanes in (1, 2):
        engine = Engine(Broken(), lanes=lanes)
        with (
            pytest.warns(RuntimeWarning, match="runs again request by request"),
            pytest.raises(ModelError, match="the decoder is ill"),
        ):
            engine.generate([ask(method="bon", steps=1 + i % 4, seed=i) for i in range(9)])
        assert engine.stats().live == engine.stats().promised == 0


def test_a_method_that_fails_at_its_first_step_keeps_no_slots():
    def fails(nfe, steps):
        raise ValueError("no idea")
        yield

    engine = Engine(Tiny(), slots=50)
    for _ in range(3):
        with pytest.raises(FunctionError, match="the method fails raised ValueError: no idea"):
            engine.generate(ask(method=fails))
    assert engine.generate(ask()).committed_nfe == 40


def test_rows_that_ran_ahead_hold_promised_slots_until_they_are_known_to_be_needed():
    """Several sequential draws, whose counts together exceed the budget that early successes keep them within."""

    def greedy(nfe, steps):
        (first,) = yield [Draw(None, 4)]
        children = yield [Draw(p, 8, until=-1.0) for p in first]  # each succeeds at once
        return max((p for c in children for p in c), key=lambda p: p.reward)

    for seed in range(8):
        runner = Scripted(lambda row: 1.0, lanes=2, seed=seed)
        found, _ = drive([Request("a", reward=brightness, method=greedy, nfe=8, steps=2)], runner, slots=11)
        assert len(found[0][0]) == 8


def test_two_slow_rewards_do_not_stall_a_third_request():
    gate = threading.Event()

    def slow(images, prompts):
        assert gate.wait(60), "the quick request never ended"
        return images.mean((1, 2, 3))

    def quick(images, prompts):
        return images.mean((1, 2, 3))

    def progress(state):
        if state.committed_nfe[-1] == 40:
            gate.set()

    requests = [ask(reward=slow, seed=i, method="bon", steps=1) for i in range(12)]
    results = Engine(Tiny(), lanes=2, buckets=(1, 2)).generate([*requests, ask(reward=quick)], on_progress=progress)
    assert [r.committed_nfe for r in results] == [40] * 13


def test_a_method_of_ones_own_may_ask_for_several_sequential_draws_at_once():
    """Each chain goes on by itself: none waits for another's answer, and the order of the history is that of draws."""

    def chains(nfe, steps):
        def search():
            (first,) = yield [Draw(None, 3)]
            children = yield [Draw(p, (nfe - 3) // 3, until=p.reward) for p in first]
            while sum(map(len, children)) + 3 < nfe:
                more = yield [Draw(first[0], nfe - 3 - sum(map(len, children)))]
                return max((p for c in (*children, *more) for p in c), key=lambda p: p.reward)
            return max((p for c in children for p in c), key=lambda p: p.reward)

        return search()

    request = Request("a", reward=brightness, method=chains, nfe=33, steps=3)
    reward = script_of(5, 0.2)
    sequential, _ = drive([request], Scripted(reward, lanes=1, buckets=(1,), eager=False))
    for seed in range(5):
        assert repr(drive([request], Scripted(reward, seed=seed))[0]) == repr(sequential)
