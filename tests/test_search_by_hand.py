"""A search alone, fed by hand: what it shows where rows are not judged or their rewards are of a cache."""

from dataclasses import replace

import pytest
import torch
from tiny import SIZE

from rollflow.plan import plan
from rollflow.profile.ledger import Ledger
from rollflow.request import Request
from rollflow.row import Brief, Outcome
from rollflow.schedule.odds import Odds
from rollflow.schedule.pool import Pool
from rollflow.search.search import Search


def bright(images, prompts):
    return images.mean((1, 2, 3))


def make(**options):
    checked = plan(Request("a", bright, **options))
    size = replace(SIZE, kept=3) if options.get("cache") else SIZE
    return Search(checked, Brief(0, "a", size, 0, 0.0, None, checked.reward), Pool(256).lease(64), Ledger(), Odds())


def step(search, score):
    """One row goes and comes back with a score, if it is still wanted."""
    apart = not search.waiting(False)
    assert search.waiting(apart)
    row = search.take(apart)
    search.deliver(row, score(row) if row.wanted else None)
    return row


def test_a_reward_of_a_cache_chooses_no_image():
    """Level 2 scores 10 from the cache, and all evaluations in full about 1: the method draws from one of them."""
    search = make(method="svdd", cache=True, nfe=60, steps=5, finalists=2)
    seen = []
    while not search.done:
        row = step(search, lambda row: 10.0 if row.cached and row.level == 2 else 1.0 + row.level / 10)
        seen.append((row.cached, row.level))
    assert (True, 2) in seen
    assert all(final.particle.reward < 2 for final in search._finals)
    assert search.show(False).candidates[0].level == 4


@pytest.mark.parametrize("every", [False, True])
def test_the_best_so_far_is_where_the_search_is(every):
    """Only children lead from level to level, and nobody judges them: what a cancelled search shows is the last."""
    search = make(method="rbf", nfe=20, steps=10, finish=2, judge_all=every)
    while search.history.committed < 8:
        step(search, lambda row: float(row.level))
    assert search.best.step == search.history.level > 1
    assert search.stop("cancelled", False)
    assert search.show(False).candidates[0].level == search.history.level


def test_an_image_of_a_finish_that_was_cut_short_changes_no_other_record():
    search = make(method="rbf", nfe=20, steps=5, finish=2)
    while not search.ending:
        step(search, lambda row: -1.0)
    step(search, lambda row: -1.0)
    before = [(one.kind, one.level, one.reward) for one in search.history.records]
    search.cut()
    search.show(False)
    search.shown(Outcome(torch.zeros(3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8), 123.0, None))
    assert [(one.kind, one.level, one.reward) for one in search.history.records] == before
