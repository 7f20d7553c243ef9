"""Search methods, driven with made-up rewards: no model, no tensors."""

import itertools
import math
import pickle
from dataclasses import dataclass
from importlib import import_module
from inspect import signature

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollflow import methods
from rollflow.draw import Draw, Note
from rollflow.errors import BudgetError, RequestError

# the modules, not the functions of the same names
evosearch, paths, sop = (import_module(f"rollflow.methods.{name}") for name in ("evosearch", "paths", "sop"))


@dataclass(eq=False)
class Fake:
    reward: float
    step: int
    parent: object = None
    nfe: int = 1
    root: int = -1


def drive(search, reward_of, log=None, spare=False):
    """Plays the engine's part: sequential draws with `until`; returns the chosen particle and all that were drawn.

    With `spare`, what decides nothing is not judged, but for guided draws.
    """
    everything, reply = [], None
    try:
        while True:
            draws = search.send(reply)
            while isinstance(draws, Note):
                draws = search.send(None)
            assert draws
            reply = []
            for draw in draws:
                children = []
                for _ in range(draw.count):
                    judged = draw.scored and (draw.decides or draw.guide is not None or not spare)
                    reward = reward_of(draw.arrives, len(everything)) if judged else None
                    children.append(Fake(reward, draw.arrives, draw.parent, draw.nfe))
                    everything.append(children[-1])
                    if judged and children[-1].reward > draw.until:
                        break
                reply.append(children)
            if log is not None:
                log.append((draws, reply))
    except StopIteration as stop:
        return stop.value, everything


def hashed(step, n):
    return math.sin(12.9898 * n + 78.233 * step) * 43758.5453 % 1.0


VARIANTS = [
    *((name, {}) for name in methods.names()),
    ("rbf", {"gradient": 1.0}),
    ("svdd", {"gradient": 1.0}),
    ("beam", {"lookahead": 2}),
    ("threshold", {"bar": 2.0}),  # out of reach
]


def smallest(name, steps, gradient=0.0, lookahead=0, **_):
    """The smallest budget: one evaluation a point of the grid, but for methods that walk some points more than once."""
    if name == "sop":
        return sum(1 + len(points) for _, points in sop.stations(steps, 1, 2))
    if name == "dps" or gradient:
        return 2 * steps - 1
    return steps + sum(min(lookahead, steps - 1 - level) for level in range(steps))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 1000), st.integers(1, 50), st.integers(0, 4), st.sampled_from(VARIANTS))
def test_budget_is_spent_to_the_last_evaluation(nfe, steps, finish, variant):
    name, options = variant
    least = smallest(name, steps, **options) + finish
    for budget in (least, max(nfe, least)):
        chosen, everything = drive(methods.make(name, budget, steps, finish, **options), hashed)
        assert sum(particle.nfe for particle in everything) == budget - finish
        assert chosen in everything and chosen.reward is not None
    if least == 1:
        with pytest.raises(RequestError, match="nfe=0: it must be"):
            methods.make(name, 0, steps, finish, **options)
        return
    for short in {1, least - 1}:
        with pytest.raises(
            BudgetError, match=rf"{name} cannot work with nfe={short}: the smallest budget is {least} "
        ) as e:
            methods.make(name, short, steps, finish, **options)
        assert e.value.smallest == least and pickle.loads(pickle.dumps(e.value)).smallest == least


@settings(max_examples=200, deadline=None)
@given(st.integers(60, 300), st.integers(1, 12), st.sampled_from(VARIANTS))
def test_rewards_that_are_no_numbers_are_never_chosen(nfe, steps, variant):
    name, options = variant
    odd = itertools.cycle([math.nan, -1.0, math.inf, 0.5, -math.inf])
    chosen, everything = drive(methods.make(name, nfe, steps, **options), lambda step, n: next(odd))
    assert math.isfinite(chosen.reward) or not any(
        math.isfinite(p.reward) for p in everything if p.reward is not None and p.step == steps - 1
    )


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
        assert draw.parent is current and draw.count == quota
        assert draw.until == (bar if each > 1 else math.inf) and draw.decides == (each > 1)
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


def test_bon_spends_the_remainder_on_a_sample_of_longer_steps():
    log = []
    drive(methods.bon(28, 5), hashed, log)
    visited = [[(d.arrives, d.move, d.scored) for d in draws[5:]] for draws, _ in log[1:]]
    assert visited == [[(2, "ode", False)], [(4, "ode", True)], [], []]
    assert [d.count for d in log[0][0]] == [5, 1]


def test_bon_judges_only_whole_samples_and_the_best_wins():
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


def test_beam_judges_candidates_ahead_of_where_they_are():
    log = []
    chosen, everything = drive(methods.beam(40, 3, survivors=2, lookahead=1), hashed, log)
    moves = [[(d.move, d.arrives, d.scored, d.count) for d in draws[:1]] for draws, _ in log]
    assert moves[:4] == [[("sde", 0, False, 8)], [("ode", 1, True, 1)], [("sde", 1, False, 4)], [("ode", 2, True, 1)]]
    fronts = [child for (child,) in log[1][1]]
    order = sorted(range(8), key=lambda i: fronts[i].reward, reverse=True)[:2]
    assert [d.parent for d in log[2][0]] == [log[0][1][0][i] for i in order]  # they live on from where they were
    assert sum(p.nfe for p in everything) == 40 and chosen.step == 2


def test_sop_goes_back_into_the_noise_and_down_again():
    assert sop.stations(6, 1, 2) == [(0, [1, 2]), (1, [2, 3]), (2, [3, 4]), (3, [4, 5])]
    assert sop.stations(5, 2, 4) == [(0, [1, 2, 3, 4])] and sop.stations(1, 1, 2) == [(0, [])]
    log = []
    chosen, _ = drive(methods.sop(62, 4, survivors=2), hashed, log)
    judged = [(draws[0].move, draws[0].arrives, draws[0].scored) for draws, _ in log]
    assert judged[:3] == [("sde", 0, True), ("sde", 1, False), ("sde", 2, True)]
    assert judged[3:] == [("renoise", 1, False), ("sde", 2, False), ("sde", 3, True)]
    ends = [child for (child,) in log[2][1]]
    assert {d.parent for d in log[3][0]} == set(sorted(ends, key=lambda p: p.reward, reverse=True)[:2])
    assert chosen is max((child for (child,) in log[-1][1]), key=lambda p: p.reward)


def test_zo_moves_the_pivot_to_what_is_better():
    log = []
    chosen, everything = drive(methods.zo(36, 3, neighbours=3), hashed, log)
    pivot, value = log[0][1][0][0], log[2][1][0][0].reward
    for i in range(3, len(log) - 2, 3):
        (draw,), (near,) = log[i]
        assert draw.parent is pivot and draw.move == "rotate" and draw.angle == pytest.approx(0.15 * math.pi)
        ends = [child.reward for (child,) in log[i + 2][1]]
        if max(ends) > value:
            pivot, value = near[ends.index(max(ends))], max(ends)
    assert chosen.reward == max(p.reward for p in everything if p.reward is not None) >= value


def test_ses_draws_around_the_sum_of_its_elites():
    log = []
    chosen, _ = drive(methods.ses(39, 3, generations=3, elites=2), hashed, log)
    starts = [draws[0] for draws, _ in log[::3]]
    assert [d.move for d in starts] == ["sde", "rotate", "rotate", "rotate"] and all(d.coarse for d in starts[1:])
    assert [round(d.angle / math.pi, 3) for d in starts[1:]] == [0.5, 0.333, 0.167]
    assert [d.count for d in starts[1:]] == [4] * 3
    found = [(log[0][1][0][0], log[2][1][0][0])]
    for i in (3, 6):
        found += zip(log[i][1][0], [child for (child,) in log[i + 2][1]], strict=True)
        found.sort(key=lambda pair: pair[1].reward, reverse=True)
        draw = log[i + 3][0][0]
        assert draw.parent is found[0][0] and draw.mix == (found[1][0],)
    assert chosen.reward >= found[0][1].reward


@given(st.integers(1, 400), st.integers(1, 12), st.integers(0, 4), st.integers(1, 5))
def test_evosearch_fits_the_largest_population(budget, steps, points, elites):
    if budget < steps:
        return
    count, kept = evosearch.population(budget, steps, points, elites)

    def cost(n):
        return n * steps + points * (n - min(elites, n))

    assert cost(count) <= budget < cost(count + 1) and kept == min(elites, count)


def test_evosearch_mutates_noise_by_turning_and_later_particles_by_their_parent():
    log = []
    drive(methods.evosearch(60, 4, generations=2, elites=1), hashed, log)
    (first, _), (second, _) = log[1], log[3]
    assert {d.move for d in first} == {"rotate"} and {d.move for d in second} == {"sde"}
    population = log[0][1][0]
    assert max(population, key=lambda p: p.reward) not in [p for d in log[2][0][1:] for p in [d.parent]]
    assert all(d.parent.step == 0 and d.arrives == 1 for d in second)


def test_dts_returns_to_the_branch_whose_leaves_are_good():
    """Rewards depend on the first particle alone: most walks must leave from below the best one."""
    log, roots = [], {}

    def root(particle):
        while particle.parent is not None:
            particle = particle.parent
        return roots.setdefault(id(particle), (particle, hashed(3, len(roots))))

    search, reply, leaves = methods.dts(600, 4, walks=2, exploration=0.2), None, []
    try:
        while True:
            draws = search.send(reply)
            log.append(draws)
            reply = []
            for d in draws:
                child = Fake(None, d.arrives, d.parent)
                if d.scored:
                    child.reward = root(child)[1]
                    leaves.append(child)
                reply.append([child])
    except StopIteration as stop:
        assert stop.value.reward == max(leaf.reward for leaf in leaves)
    counts = sorted(sum(root(leaf)[0] is particle for leaf in leaves) for particle, _ in roots.values())
    best = max(roots.values(), key=lambda pair: pair[1])[0]
    assert sum(root(leaf)[0] is best for leaf in leaves) == counts[-1] > 2 * np.mean(counts)
    assert len(roots) > 3  # and new branches are still opened


def test_dts_leaves_a_branch_whose_rewards_are_no_numbers():
    """All below the first root is NaN: few walks may go there."""
    search, reply, roots, leaves = methods.dts(300, 4, walks=2), None, [], []
    try:
        while True:
            draws = search.send(reply)
            reply = []
            for draw in draws:
                child = Fake(None, draw.arrives, draw.parent)
                child.root = len(roots) if draw.parent is None else draw.parent.root
                roots += [child] * (draw.parent is None)
                if draw.scored:
                    child.reward = math.nan if child.root == 0 else hashed(1, child.root)
                    leaves.append(child)
                reply.append([child])
    except StopIteration as stop:
        assert math.isfinite(stop.value.reward)
    assert sum(leaf.root == 0 for leaf in leaves) < len(leaves) / len(roots)


@pytest.mark.parametrize("name", ["smc", "fk", "das"])
def test_particles_select_again_after_a_level_without_numbers(name):
    log = []
    drive(methods.make(name, 200, 10, temperature=0.05), lambda step, n: hashed(step, n) if step else math.nan, log)
    parents = [len({id(d.parent) for d in draws}) for draws, _ in log[1:]]
    assert parents[0] == 20 and max(parents[2:]) < 20


@given(st.integers(10, 400), st.integers(2, 12), st.integers(0, 11), st.floats(1, 4))
def test_nothing_is_judged_where_rewards_are_not_to_be_trusted(nfe, steps, first, factor):
    first = min(first, steps - 1)
    for name in ("psp", "sprout"):
        log = []
        if nfe >= steps:
            drive(methods.make(name, nfe, steps, factor=factor, first=first), hashed, log)
            assert all(d.arrives >= first for draws, _ in log for d in draws if d.scored)


def test_of_equal_noises_sprout_takes_the_one_that_went_furthest():
    chosen, _ = drive(methods.sprout(100, 5), lambda step, n: 1.0)
    assert chosen.step == 4


def test_threshold_goes_on_at_once_and_starts_again():
    log = []
    drive(methods.threshold(40, 4, bar=0.0, initial=5, children=3), lambda step, n: 1.0, log)
    assert [len(reply[0]) for _, reply in log] == [5, 1, 1, 1] * 3 + [5, 1, 1, 9]
    log = []
    drive(methods.threshold(40, 4, bar=2.0, initial=5, children=3), hashed, log)
    assert [len(reply[0]) for _, reply in log] == [5, 3, 3, 3] * 2 + [5, 3, 3, 1]


def test_routes_are_even_and_arrive():
    assert paths.route(9, 10) == list(range(1, 10)) and paths.route(2, 10) == [4, 9] and paths.route(0, 10) == []
    assert paths.route(2, 10, start=5) == [7, 9] and paths.shared(8, 3) == [3, 3, 2]


def test_a_method_of_ones_own():
    def mine(nfe, steps, width=2):
        (particles,) = yield [Draw(None, nfe - width)]
        (children,) = yield [Draw(particles[0], width)]
        return children[-1]

    chosen, everything = drive(methods.make(mine, 10, 2, finish=3, width=3), hashed)
    assert len(everything) == 7 and chosen is everything[-1]
    assert methods.title(mine) == "mine" and methods.options_of(mine) == ["width"] and not methods.branches(mine)
    with pytest.raises(RequestError, match="the method mine has no option 'depth': its options are width"):
        methods.make(mine, 10, 2, depth=1)
    with pytest.raises(RequestError, match="method=3: it must be a name"):
        methods.make(3, 10, 2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dps", {"gradient": -1.0}, "a guide of scale -1.0"),
        ("dps", {"clip": 0.0}, "clipped at 0.0"),
        ("zo", {"angle": 0.0}, "angle=0.0: the turn of a noise"),
        ("evosearch", {"angle": 1.5}, "angle=1.5"),
        ("sop", {"ahead": 1}, "ahead=1: it must be a whole number of at least 2"),
        ("das", {"threshold": 1.0}, "threshold within"),
        ("dts", {"temperature": 0}, "a temperature is above 0"),
        ("threshold", {"bar": math.nan}, "bar=nan"),
        ("beam", {"lookahead": -1}, "lookahead=-1"),
        ("ses", {"generations": 0}, "generations=0"),
    ],
)
def test_options_out_of_range(name, options, message):
    with pytest.raises(RequestError, match=message):
        methods.make(name, 100, 4, **options)


def test_make_refuses_by_name():
    with pytest.raises(RequestError, match="unknown method 'rbff': choose one of beam, bon, code, das, dps, dts"):
        methods.make("rbff", 10, 2)
    with pytest.raises(RequestError, match=r"rbf has no option 'children': its options are initial, gradient, clip"):
        methods.make("rbf", 10, 2, children=3)
    with pytest.raises(RequestError, match="bon has no option 'initial': it has none"):
        methods.make("bon", 10, 2, initial=3)
    with pytest.raises(RequestError, match="initial=0"):
        methods.rbf(100, 10, initial=0)
    with pytest.raises(RequestError, match="smallest budget is 34"):
        methods.rbf(33, 10, initial=25)
    with pytest.raises(RequestError, match="nfe=0"):
        methods.bon(0, 1)
    assert set(methods.names()) >= {"bon", "smc", "code", "svdd", "sop", "rbf", "dps", "fk", "das", "psp", "threshold"}
    assert set(methods.names()) >= {"evosearch", "ses", "zo", "beam", "dts"}


def test_budgets_of_ones_own_methods_count_the_finish_too():
    def mine(nfe, steps):
        yield [Draw(None, nfe)]

    def costly(nfe, steps):
        if nfe < 5:
            raise BudgetError("too little", 5, "five of them")
        return mine(nfe, steps)

    with pytest.raises(BudgetError, match=r"nfe=2: the smallest budget is 3 \(one evaluation, and a finish of 2\)"):
        methods.make(mine, 2, 4, finish=2)
    with pytest.raises(BudgetError, match=r"costly .* is 7 \(five of them, and a finish of 2\)"):
        methods.make(costly, 2, 4, finish=2)
    assert next(methods.make(costly, 7, 4, finish=2))[0].count == 5


def test_what_the_built_in_methods_declare():
    branching = {name for name in methods.names() if methods.branches(name)}
    assert branching == {"beam", "code", "das", "dts", "evosearch", "fk", "rbf", "smc", "svdd", "threshold"}
    assert {name: methods.trusts(name) for name in methods.names() if methods.trusts(name)} == {
        "psp": "first", "sprout": "first"
    }  # fmt: skip
    assert {name for name in methods.names() if methods.guided(name, {})} == {"dps"}
    assert {name for name in methods.names() if "gradient" in methods.options_of(name)} == {"dps", "rbf", "svdd"}
    assert methods.guided("rbf", {"gradient": 0.5}) and not methods.guided("rbf", {"gradient": 0.0})
    for name in methods.names():
        assert methods.defaults(name)["interpolant"] == ("vp" if name in branching else "linear")
        assert "finish" not in signature(getattr(methods, name)).parameters
        for option in methods.options(name):
            assert len(option.help) > 8 and (option.default is None or isinstance(option.default, option.kind))


def test_a_method_of_ones_own_may_declare_what_it_is():
    @methods.method(
        branches=False, guided=lambda o: o.pull > 1, trusts="start", holds=lambda nfe, steps, o: min(nfe, o.width)
    )
    def mine(nfe, steps, seed=0, width: int = 2, pull: float = 0.5, start: int | None = None):
        """Mine.

        Args:
            width: how many. And more.
            pull: how
                hard: very.

        Returns:
            start: no option's entry
        """

    def plain(nfe, steps, gradient=0.0):
        yield

    assert methods.options_of(mine) == ["width", "pull", "start"] and methods.trusts(mine) == "start"
    assert [(o.name, o.kind, o.default, o.help) for o in methods.options(mine)] == [
        ("width", int, 2, "how many"), ("pull", float, 0.5, "how hard: very"), ("start", int, None, "")
    ]  # fmt: skip
    assert methods.guided(mine, {"pull": 2}) and not methods.guided(mine, {})
    assert methods.holds(mine, 50, 4) == 2 and methods.holds(mine, 50, 4, width=7) == 7
    assert methods.holds(mine, 5, 4, 3, width=7) == 2  # of the budget without the finish
    assert methods.defaults(mine)["diffusion"] == 0.0 and not methods.branches(mine)
    assert methods.defaults(plain)["diffusion"] == 3.0 and methods.trusts(plain) is None
    assert methods.holds(plain, 50, 4, 3) == 47 and not methods.branches(plain)
    assert methods.guided(plain, {"gradient": 1.0}) and not methods.guided(plain, {})
    with pytest.raises(RequestError, match=r"trusts='first': .* has no such option"):
        methods.method(trusts="first")(plain)


@pytest.mark.parametrize("keep", [0, -1])
def test_a_draw_keeps_whole_numbers_of_judged_children(keep):
    with pytest.raises(RequestError, match=f"a draw that keeps {keep} children"):
        Draw(None, 3, keep=keep)
    with pytest.raises(RequestError, match="a draw with `keep` must be scored"):
        Draw(None, 3, scored=False, keep=1)


def test_best_of_n_runs_in_parties(monkeypatch):
    for module in ("bon", "dps", "paths"):
        monkeypatch.setattr(import_module(f"rollflow.methods.{module}"), "SIDE_BY_SIDE", 4)
    for name, budget, counts in (("bon", 38, [4, 4, 4]), ("dps", 55, [4, 4, 3])):
        log = []
        chosen, everything = drive(methods.make(name, budget, 3), hashed, log)
        first = [draws[0].count for draws, _ in log if draws[0].parent is None]
        assert first == counts
        assert sum(particle.nfe for particle in everything) == budget
        assert chosen is max((p for p in everything if p.step == 2), key=lambda p: p.reward)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 120), st.integers(1, 12), st.integers(0, 2**20), st.sampled_from(VARIANTS))
def test_rewards_that_decide_nothing_may_be_missing(nfe, steps, seed, variant):
    name, options = variant
    budget = max(nfe, smallest(name, steps, **options))

    def judge(step, n):
        return round(2 * hashed(step, n + seed)) if n % 7 else math.nan  # ties, and what is no number

    def run(without):
        log = []
        chosen, everything = drive(methods.make(name, budget, steps, **options), judge, log, without)
        rank = {id(particle): i for i, particle in enumerate(everything)}
        asked = [
            (rank.get(id(d.parent)), d.count, d.move, d.arrives, [rank[id(one)] for one in d.mix], d.keep)
            for draws, _ in log
            for d in draws
        ]
        return rank[id(chosen)], asked

    assert run(without=True) == run(without=False)


@pytest.mark.parametrize(
    ("name", "nfe", "options", "expected"),
    [
        ("rbf", 20, {}, 8),  # one child a level: none of them is compared
        ("rbf", 100, {}, 0),
        ("svdd", 10, {}, 10),
        ("evosearch", 100, {}, 18),  # mutants
        ("threshold", 40, {"bar": -1.0, "initial": 1, "children": 1}, 36),
        ("psp", 10, {"factor": 8.0}, 1),
        ("code", 10, {}, 5),
        ("beam", 10, {}, 10),
        ("beam", 100, {}, 0),
    ],
)
def test_what_decides_nothing_is_said(name, nfe, options, expected):
    log = []
    drive(methods.make(name, nfe, 10, **options), hashed, log)
    drawn = [(d, own) for draws, reply in log for d, own in zip(draws, reply, strict=True)]
    assert sum(len(own) for d, own in drawn if d.scored and not d.decides) == expected


def test_a_draw_that_chooses_by_rewards_decides_by_them():
    for fields in ({"until": 1.0}, {"count": 3, "keep": 2}):
        with pytest.raises(RequestError, match="decides by their rewards"):
            Draw(None, decides=False, **fields)
    assert Draw(None, 3, keep=3, decides=False).scored
