"""Search methods, driven with made-up rewards: no model, no tensors."""

import itertools
import math
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollflow import methods
from rollflow.errors import RequestError


@dataclass(eq=False)
class Fake:
    reward: float
    step: int
    parent: object = None


def drive(search, reward_of, log=None):
    """Plays the engine's part: sequential draws with `until`; returns the chosen particle and all that were drawn."""
    everything, reply = [], None
    try:
        while True:
            draws = search.send(reply)
            reply = []
            for draw in draws:
                children = []
                for _ in range(draw.count):
                    step = 0 if draw.parent is None else draw.parent.step + 1
                    children.append(Fake(reward_of(step, len(everything)), step, draw.parent))
                    everything.append(children[-1])
                    if children[-1].reward > draw.until:
                        break
                reply.append(children)
            if log is not None:
                log.append((draws, reply))
    except StopIteration as stop:
        return stop.value, everything


def hashed(step, n):
    return math.sin(12.9898 * n + 78.233 * step) * 43758.5453 % 1.0


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 1000), st.integers(1, 50), st.integers(0, 4), st.sampled_from(methods.names()))
def test_budget_is_spent_and_never_exceeded(nfe, steps, finish, name):
    try:
        search = methods.make(name, nfe, steps, finish)
    except RequestError as error:
        smallest = steps + finish
        assert nfe < smallest and f"smallest budget is {smallest}" in str(error)
        return
    chosen, everything = drive(search, hashed)
    left = (nfe - finish) % steps if name == "bon" else 0
    assert len(everything) == nfe - finish - left
    assert chosen in everything and chosen.step == steps - 1


@settings(max_examples=100, deadline=None)
@given(st.integers(20, 300), st.integers(2, 12), st.integers(1, 30))
def test_rbf_follows_the_rollover_rule(nfe, steps, initial):
    if nfe < initial + steps - 1:
        with pytest.raises(RequestError, match="smallest budget"):
            methods.rbf(nfe, steps, initial)
        return
    log = []
    chosen, _ = drive(methods.rbf(nfe, steps, initial), hashed, log)
    assert log[0][0][0].parent is None and log[0][0][0].count == initial
    each = max(1, (nfe - initial) // steps)
    current = max(log[0][1][0], key=lambda p: p.reward)
    bar, quota = current.reward, each
    for (draw,), (children,) in log[1:-1]:
        assert draw.parent is current and draw.until == bar and draw.count == quota
        if children[-1].reward > bar:
            current, bar, quota = children[-1], children[-1].reward, quota - len(children) + each
        else:
            assert len(children) == quota
            current, quota = max(children, key=lambda p: p.reward), each
    (draw,), (children,) = log[-1]
    assert draw.parent is current and draw.until == math.inf
    assert draw.count == nfe - sum(len(reply[0]) for _, reply in log[:-1])
    assert chosen is max(children, key=lambda p: p.reward)
    assert [d[0].parent.step for d, _ in log[1:]] == list(range(steps - 1))


@pytest.mark.parametrize(
    ("reward", "drawn_per_level"),
    [
        (lambda step, n: float(n), [10, 1, 1, 1, 87]),  # always better: one child a level, all the rest rolls over
        (lambda step, n: float(-n), [10, 18, 18, 18, 36]),  # never better: Q = 90 // 5 at each level
        (lambda step, n: 1.0, [10, 18, 18, 18, 36]),  # ties do not beat the bar
        (lambda step, n: math.nan, [10, 18, 18, 18, 36]),  # nothing is comparable, and nothing crashes
    ],
)
def test_rbf_with_scripted_rewards(reward, drawn_per_level):
    log = []
    drive(methods.rbf(100, 5), reward, log)
    assert [len(reply[0]) for _, reply in log] == drawn_per_level


def test_rbf_recovers_from_a_nan_bar_and_first_wins_ties():
    log = []
    chosen, _ = drive(methods.rbf(40, 3, initial=4), lambda step, n: math.nan if step == 0 else 1.0, log)
    _, (children,) = log[1]
    assert len(children) == 1 and children[0].reward == 1.0  # any number beats a bar that is none
    assert chosen is log[2][1][0][0]


def test_svdd_keeps_the_best_child_at_each_level():
    log = []
    chosen, _ = drive(methods.svdd(23, 4, children=5), hashed, log)
    assert [d[0].count for d, _ in log] == [5, 5, 5, 8]
    for before, after in itertools.pairwise(log):
        assert after[0][0].parent is max(before[1][0], key=lambda p: p.reward)
    assert chosen is max(log[-1][1][0], key=lambda p: p.reward)


def test_bon_judges_only_whole_samples():
    log = []
    chosen, everything = drive(methods.bon(25, 5), hashed, log)
    assert [[d.scored for d in draws] for draws, _ in log] == [[False]] + [[False] * 5] * 3 + [[True] * 5]
    assert chosen is max((p for p in everything if p.step == 4), key=lambda p: p.reward)
    assert all(draw.parent is parent for draws, _ in log[1:2] for draw, parent in zip(draws, log[0][1][0], strict=True))


def test_code_keeps_the_best_path_of_each_block():
    log = []
    chosen, _ = drive(methods.code(32, 5, block=2), hashed, log)
    counts = [sum(d.count for d in draws) for draws, _ in log]
    assert counts == [8, 6, 6, 6, 6]  # two more at first, of which the best six stay
    assert [draws[0].scored for draws, _ in log] == [True, True, False, True, True]
    first = sorted(log[0][1][0], key=lambda p: p.reward, reverse=True)[:6]
    assert [d.parent for d in log[1][0]] == first
    ends = [child for (child,) in log[1][1]]
    assert log[2][0][0].parent is max(ends, key=lambda p: p.reward)  # a new block starts from its best
    assert [d.parent for d in log[3][0]] == log[2][1][0]
    assert chosen is max(log[4][1][0], key=lambda p: p.reward)


def test_beam_shares_children_among_the_best():
    log = []
    chosen, _ = drive(methods.beam(33, 3, survivors=4), hashed, log)
    best = sorted(log[0][1][0], key=lambda p: p.reward, reverse=True)[:4]
    assert [d.parent for d in log[1][0]] == best and [d.count for d in log[1][0]] == [3, 3, 3, 2]
    assert [d.count for d in log[2][0]] == [3, 3, 3, 2]
    assert chosen is max((p for children in log[2][1] for p in children), key=lambda p: p.reward)


def test_psp_prunes_and_judges_only_where_it_prunes():
    log = []
    chosen, _ = drive(methods.psp(101, 6, factor=3.0), hashed, log)
    counts = [sum(d.count for d in draws) for draws, _ in log]
    assert sum(counts) == 101 and counts == sorted(counts, reverse=True) and counts[-2:] == [1, 1]
    assert [draws[0].scored for draws, _ in log] == [True, True, True, True, False, True]
    for (_, before), (draws, _) in itertools.pairwise(log[:5]):
        alive = [p for children in before for p in children]
        assert [d.parent for d in draws] == sorted(alive, key=lambda p: p.reward, reverse=True)[: len(draws)]
    assert chosen is log[-1][1][0][0]


def test_make_refuses_by_name():
    with pytest.raises(
        RequestError, match="unknown method 'rbff': choose one of beam, bon, code, fk, psp, rbf, smc, svdd"
    ):
        methods.make("rbff", 10, 2)
    with pytest.raises(RequestError, match=r"rbf has no option 'children': its options are initial"):
        methods.make("rbf", 10, 2, children=3)
    with pytest.raises(RequestError, match="bon has no option 'initial': it has none"):
        methods.make("bon", 10, 2, initial=3)
    with pytest.raises(RequestError, match="initial=0"):
        methods.rbf(100, 10, initial=0)
    with pytest.raises(RequestError, match="smallest budget is 34"):
        methods.rbf(33, 10, initial=25)
    with pytest.raises(RequestError, match="nfe=0"):
        methods.bon(0, 1)
    assert methods.names() == ["beam", "bon", "code", "fk", "psp", "rbf", "smc", "svdd"]
