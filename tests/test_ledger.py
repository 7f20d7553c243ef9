"""The ledger: its rows and batches add up, for every method and however requests end."""

import dataclasses
import itertools
import math
import threading
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sums import assert_adds_up
from test_retries import Hanging, Unavailable, at_rest
from test_turns import Waiting, together
from tiny import PATIENCE, SIZE, Clock, Gate, Lockstep, Tiny, assert_sound, bon, brightness, ended, engine, rbf

from rollflow import Cancelled, EngineClosed, FunctionError, Request, methods, rewards
from rollflow.models import Capabilities
from rollflow.models.cfg import ClassifierFree
from rollflow.plan import plan
from rollflow.profile import records
from rollflow.profile.ledger import Ledger
from rollflow.profile.records import BATCH, FATES, KINDS, ROW, STATES, WORK, Ring
from rollflow.row import Brief, Done, Free, Row

pytestmark = pytest.mark.usefixtures("one_thread")


class Able(Tiny):
    """A model with a light decoder and an encoder of images."""

    capabilities = Capabilities(preview=True, images=True)

    def encode(self, prompts):
        return [*prompts]

    def preview(self, latents):
        return self.decode(latents)

    def state(self, image, geometry):
        return self.layout.pack(image[None])[0]


def smooth(images, prompts):
    return images.square().mean((1, 2, 3))


def contrast(images, prompts):
    return images.std((1, 2, 3))


def failing(images, prompts):
    raise ValueError("no")


smooth.differentiable = contrast.differentiable = True
BOTH = rewards.combine("a - 2*b", {"a": smooth, "b": contrast})
PICTURE = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(5))


def recorded(made, work):
    """What an engine did of work, to the last of its threads; the recording, and what the work returned."""
    with made.profile() as p:
        results = work(made)
        made.close()  # when it returns, every lane is free
    return p.recording, results


def fates(recording):
    return [FATES[code] for code in recording.requests["state"]]


@pytest.mark.parametrize("preview", [False, True])
@pytest.mark.parametrize("name", methods.names())
def test_sums_hold_for_every_method(name, preview):
    reward = smooth if methods.guided(name, {}) else brightness
    asked = [rbf(30, method=name, seed=seed, reward=reward, finish=2 * (seed % 2)) for seed in range(3)]
    with engine(Able(), lanes=2, buckets=(1, 2, 4, 8), preview=preview) as made:
        recording, results = recorded(made, lambda made: made.generate(asked))
        assert_adds_up(recording, results, made.ledger)
    assert (recording.batches["reward_seconds"].sum() > 0) and (recording.calls["failed"] == 0).all()


mixes = st.lists(
    st.fixed_dictionaries(
        {
            "method": st.sampled_from(methods.names()),
            "reward": st.sampled_from([smooth, BOTH, failing]),
            "held_out": st.sampled_from([None, None, brightness]),
            "finish": st.sampled_from([0, 0, 3]),
            "finalists": st.sampled_from([None, 2]),
            "stop_at": st.sampled_from([None, None, 0.3]),
            "guidance": st.sampled_from([1.0, 3.0]),
            "image": st.sampled_from([False, False, True]),
            "nfe": st.integers(16, 40),
            "cancel": st.sampled_from([False, False, False, True]),
        }
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=20)
@given(asked=mixes, lanes=st.integers(1, 3), buckets=st.sampled_from([(8,), (1, 2, 4, 8)]), preview=st.booleans())
def test_sums_hold_for_any_mix_of_requests(asked, lanes, buckets, preview):
    def work(made):
        jobs = []
        for seed, fields in enumerate(asked):
            given = {**fields, "steps": 4, "seed": seed, "image": PICTURE if fields["image"] else None}
            cancel = given.pop("cancel")
            if given["reward"] is failing and methods.guided(given["method"], {}):
                given["reward"] = smooth  # a reward without a gradient is refused at the door
            jobs.append(made.submit(Request("a", **given)))
            if cancel:
                jobs[-1].cancel()
        return [None if ended(job).exception() is not None else job.result() for job in jobs]

    with engine(ClassifierFree(Able()), lanes=lanes, buckets=buckets, preview=preview) as made:
        recording, results = recorded(made, work)
        assert_adds_up(recording, results, made.ledger)
    assert len(recording.requests) == len(asked)


def test_rows_of_the_network_are_counted_for_guidance():
    with engine(ClassifierFree(Able())) as made:
        recording, _ = recorded(made, lambda made: made.generate([bon(guidance=1.0), bon(guidance=3.0)]))
    work = recording.batches[recording.batches["work"] == WORK.index("rows")]
    assert sorted(work["network_rows"].tolist()) == [8, 16] and work["bucket"].tolist() == [8, 8]
    assert recording.rows["nfe"].sum() == 16, "an evaluation is one, however many rows of the network it takes"


def test_guided_rows_count_as_much_as_they_are_charged():
    with engine() as made:
        recording, (result,) = recorded(made, lambda made: made.generate([rbf(30, method="dps", reward=smooth)]))
    guided = recording.rows[recording.rows["kind"] == KINDS.index("guided")]
    assert len(guided) and (guided["nfe"] == 2).all()
    work = recording.batches[recording.batches["work"] == WORK.index("guided")]
    assert (work["backward_seconds"] > 0).all() and (work["reward_seconds"] > 0).all()
    assert result.cost.nfe["guided"] == 2 * len(guided) and result.cost.seconds["backward"] > 0


def test_padding_is_charged_in_turns():
    with engine(Waiting()) as made:
        recording, _ = recorded(made, lambda made: [job.result() for job in together(made, [bon(3), bon(2)])])
        made.model.first.result()
    (shared,) = [b for b in recording.batches if WORK[b["work"]] == "rows" and b["rows"] == 5]
    own = recording.rows[recording.rows["batch"] == shared["batch"]]
    first = own["request"][0]
    assert (own["kind"][5:] == KINDS.index("padding")).all() and (own["number"][5:] == -1).all()
    assert own["request"][5:].tolist() == own["request"][:3].tolist() and first in own["request"]


def test_rows_and_requests_of_those_that_end_early():
    gate = Gate()

    def work(made):
        cancelled = made.submit(rbf(60, reward=gate, seed=1))
        assert gate.called.wait(PATIENCE)
        cancelled.cancel()
        bad = made.submit(rbf(60, reward=failing, seed=2))
        stopped = made.submit(rbf(60, stop_at=0.4, seed=3))
        assert stopped.result(PATIENCE).stopped == "stop_at"
        with pytest.raises(FunctionError, match="no"):
            bad.result(PATIENCE)
        gate.open.set()
        with pytest.raises(Cancelled):
            cancelled.result(PATIENCE)
        return [ended(cancelled) and None, ended(bad) and None, stopped.result()]

    with engine(lanes=2) as made:
        recording, results = recorded(made, work)
        assert_adds_up(recording, results, made.ledger)
        assert not made.ledger._open and not made.ledger._showing
    assert fates(recording) == ["cancelled", "failed", "done"]
    in_vain = recording.rows[(recording.rows["state"] == STATES.index("dropped")) & (recording.rows["number"] >= 0)]
    assert {*in_vain["request"]} >= {*recording.requests["request"][:2]} and recording.calls["failed"].any()
    assert recording.requests["stopped"].tolist() == ["", "", "stop_at"]


def test_a_search_that_is_cancelled_with_something_found():
    lockstep = Lockstep()

    def work(made):
        job = made.submit(rbf(60, reward=lockstep))
        for update in lockstep.follow(job):
            if update.committed_nfe:
                job.cancel()
        with pytest.raises(Cancelled):
            job.result()
        return [job.best(PATIENCE)]

    with engine() as made:
        recording, (best,) = recorded(made, work)
        assert_adds_up(recording, [best], made.ledger)
    assert fates(recording) == ["cancelled"] and recording.requests["stopped"][0] == best.stopped == "cancelled"
    assert recording.requests["score"][0] == best.reward and best.cost.nfe["committed"] == best.committed_nfe


def test_a_request_that_is_cancelled_before_it_is_let_in():
    class Slow(Tiny):
        called, let_go = threading.Event(), threading.Event()

        def encode(self, prompts):
            self.called.set()
            assert self.let_go.wait(PATIENCE)
            return super().encode(prompts)

    def work(made):
        job = made.submit(bon(4))
        assert made.model.called.wait(PATIENCE)
        job.cancel()
        made.model.let_go.set()
        with pytest.raises(Cancelled):
            job.result(PATIENCE)
        return [None]

    with engine(Slow()) as made:
        recording, results = recorded(made, work)
        assert_adds_up(recording, results, made.ledger)
    assert fates(recording) == ["cancelled"] and not len(recording.rows)
    (entry,) = recording.requests
    assert math.isnan(entry["started"]) and math.isnan(entry["searched"]) and entry["submitted"] < entry["ended"]
    assert (entry["committed"], entry["executed"]) == (-1, -1) and math.isnan(entry["score"])


def test_an_engine_that_is_closed_without_waiting():
    gate = Gate()
    with engine() as made, made.profile() as p:
        jobs = [made.submit(rbf(60, reward=gate, seed=seed)) for seed in range(2)]
        assert gate.called.wait(PATIENCE)
        closing = threading.Thread(target=made.close, args=(False,))
        closing.start()
        while made.ledger.table("requests")["executed"].max() < 0 and closing.is_alive():
            gate.open.set()
        closing.join()
        assert all(isinstance(job.exception(PATIENCE), Cancelled) for job in jobs)
    assert_adds_up(p.recording, [None, None], made.ledger)
    assert fates(p.recording) == ["cancelled", "cancelled"]


def test_a_request_that_comes_too_late_has_failed():
    gate = Gate()
    with engine() as made:
        first = made.submit(bon(reward=gate))
        assert gate.called.wait(PATIENCE)
        made._host.loop.close(True)  # its thread goes on with what is there
        late = made.submit(bon())
        assert isinstance(late.exception(PATIENCE), EngineClosed)
        gate.open.set()
        first.result(PATIENCE)
        made.close()
        done, refused = made.ledger.table("requests")
    assert (FATES[done["state"]], FATES[refused["state"]]) == ("done", "failed") and math.isnan(refused["started"])


def test_a_cancelled_request_whose_image_cannot_be_made_was_cancelled():
    lockstep = Lockstep()

    class Blind(Tiny):
        seen = False

        def decode(self, latents):
            if self.seen:
                raise ValueError("blind")
            return super().decode(latents)

    with engine(Blind()) as made:
        job = made.submit(rbf(60, reward=lockstep))
        for update in lockstep.follow(job):
            if update.committed_nfe:
                made.model.seen = True
                job.cancel()
        assert isinstance(job.exception(PATIENCE), Cancelled)
        made.close()
        (entry,) = made.ledger.table("requests")
        assert FATES[entry["state"]] == "cancelled" and not made.ledger._showing


def test_whatever_a_request_may_ask_for_fits_into_the_table():
    def huge(images, prompts):
        return torch.full((len(images),), 1e300, dtype=torch.float64)

    with engine() as made:
        asked = bon(reward=huge, priority=2**63), Request("é" * 500, smooth, "bon", 4, steps=1, priority=-(2**63))
        results = made.generate(asked)
        table = made.ledger.table("requests")
    assert table["priority"].tolist() == [2**63 - 1, -(2**63)] and table["prompt"][1] == "é" * 80
    assert table["score"].tolist() == [result.reward for result in results] and results[0].reward == 1e300
    assert made.ledger.specs[int(table["request"][1])]["prompt"] == "é" * 500


def test_a_call_that_fails_is_made_again_for_each_request():
    def strict(images, prompts):
        if len({*prompts}) > 1:
            raise ValueError("one prompt at a time")
        return images.mean((1, 2, 3))

    with engine(Waiting()) as made:
        with made.profile() as p:
            jobs = together(made, [bon(3, reward=strict), dataclasses.replace(bon(2, reward=strict), prompt="b")])
            results = [made.model.first.result(PATIENCE), *(job.result(PATIENCE) for job in jobs)]
            made.close()
        assert_adds_up(p.recording, results, made.ledger)
    calls = p.recording.calls
    shared = calls[calls["batch"] == calls["batch"][calls["images"] == 5][0]]
    assert shared["images"].tolist() == [5, 3, 2] and shared["failed"].tolist() == [True, False, False]
    assert (calls["started"] <= calls["ended"]).all() and {*calls["reward"].tolist()} == {"strict", "brightness"}


def test_calls_of_all_terms_and_of_the_held_out_judge():
    with engine() as made:
        recording, results = recorded(made, lambda made: made.generate([bon(4, reward=BOTH, held_out=brightness)]))
        assert_adds_up(recording, results, made.ledger)
    calls, kinds = recording.calls, {int(b["batch"]): WORK[b["work"]] for b in recording.batches}
    found = sorted((str(call["reward"]), kinds[int(call["batch"])], int(call["images"])) for call in calls)
    assert found == [
        ("brightness", "images", 1), ("contrast", "images", 1), ("contrast", "rows", 4), ("smooth", "images", 1),
        ("smooth", "rows", 4),
    ]  # fmt: skip
    assert recording.requests["held_out"][0] == results[0].held_out
    for batch in recording.batches[recording.batches["judged"] > 0]:
        own = calls[calls["batch"] == batch["batch"]]
        assert (own["ended"] - own["started"]).sum() <= batch["reward_seconds"] + 1e-9


def test_a_held_out_judge_of_the_rewards_own_is_known_and_one_that_cannot_be_read_harms_nobody():
    class Judged:
        name, held_out = "judged", staticmethod(contrast)

        def check(self, prompt):
            pass

        def __call__(self, images, prompts):
            return images.mean((1, 2, 3))

    class Fickle(Judged):
        name, reads = "fickle", 0

        @property
        def held_out(self):
            self.reads += 1
            if self.reads == 2:  # after the door
                raise OSError("gone")

    with engine() as made:
        made.generate([bon(reward=Judged()), bon(reward=Judged(), held_out=brightness), bon(reward=Fickle())])
        assert [spec["held_out"] for spec in made.ledger.specs.values()] == [["contrast"], ["brightness"], None]


def test_each_thread_that_judges_has_a_number():
    meeting = threading.Barrier(2)

    def one(images, prompts):
        meeting.wait(PATIENCE)
        return images.mean((1, 2, 3))

    def other(images, prompts):
        return one(images, prompts)

    with engine() as made:
        made.generate(bon(4, reward=rewards.combine("a + b", {"a": one, "b": other})))
        calls = made.ledger.table("calls")
    first = calls[calls["images"] == 4]
    assert sorted(first["reward"].tolist()) == ["one", "other"] and {*first["thread"].tolist()} == {0, 1}


def test_encodings_and_looks_are_chores():
    lockstep = Lockstep()

    def work(made):
        job = made.submit(rbf(30, reward=lockstep))
        pictures = [update.image(PATIENCE) for update in lockstep.follow(job) if update.committed_nfe]
        assert any(picture is not None for picture in pictures)
        return [job.result(PATIENCE)]

    with engine() as made:
        recording, results = recorded(made, work)
        assert_adds_up(recording, results, made.ledger)
    chores = recording.batches[recording.batches["bucket"] == 0]
    assert {WORK[code] for code in chores["work"]} == {"encode", "peek"} and (chores["host"] >= 0).all()
    peeks = chores[chores["work"] == WORK.index("peek")]
    assert (peeks["decode_seconds"] > 0).all() and not np.isin(recording.rows["batch"], chores["batch"]).any()


def test_a_start_from_an_image_is_a_chore():
    with engine(Able()) as made:
        recording, results = recorded(made, lambda made: made.generate([bon(image=PICTURE, strength=0.5)]))
        assert_adds_up(recording, results, made.ledger)
    assert [WORK[code] for code in recording.batches["work"]] == ["encode", "start", "rows", "images"]


def test_a_batch_that_runs_in_parts():
    class Picky(Waiting):
        def velocity(self, x, tau, conditioning, guidance, geometry):
            if len({*conditioning} - {""}) > 1:
                raise ValueError("one prompt at a time")
            return super().velocity(x, tau, conditioning, guidance, geometry)

        def encode(self, prompts):
            return [*prompts]

    with engine(Picky(), lanes=2) as made, pytest.warns(RuntimeWarning, match="runs again request by request"):
        with made.profile() as p:
            jobs = together(made, [bon(3), dataclasses.replace(bon(2), prompt="b")])
            results = [made.model.first.result(PATIENCE), *(job.result(PATIENCE) for job in jobs)]
            made.close()
        assert_adds_up(p.recording, results, made.ledger)


def test_batches_that_do_not_fit_into_the_memory_run_in_halves():
    class Small(Tiny):
        def velocity(self, x, tau, conditioning, guidance, geometry):
            if len(x) > 4:
                raise torch.OutOfMemoryError(f"{len(x)} rows do not fit")
            return super().velocity(x, tau, conditioning, guidance, geometry)

    with engine(Small(), lanes=2) as made, pytest.warns(RuntimeWarning, match="did not fit"):
        recording, results = recorded(made, lambda made: made.generate([bon(20, seed=seed) for seed in range(3)]))
        assert_adds_up(recording, results, made.ledger)
    assert recording.batches["bucket"].max() == 8, "what was tried is what was charged"


def test_guided_rows_that_wait_for_their_reward_run_again():
    clock, reward = Clock(), Unavailable(1, differentiable=True)

    def work(made):
        job = made.submit(rbf(12, method="dps", reward=reward))
        reward.wait()
        at_rest(made)
        clock.pass_in(made, 2.0)
        return [job.result(PATIENCE)]

    with engine(clock=clock) as made:
        recording, results = recorded(made, work)
        assert_adds_up(recording, results, made.ledger)
    cost = results[0].cost
    assert cost.nfe["speculative"] == 2 and recording.calls["failed"].tolist().count(True) == 1
    assert recording.batches["host"].min() >= 0


def test_a_lane_whose_reward_hangs_is_given_up():
    clock, reward = Clock(), Hanging()
    reward.differentiable = True

    def work(made):
        job = made.submit(rbf(12, method="dps", reward=reward))
        assert reward.hangs.wait(PATIENCE)
        clock.pass_in(made, 5.1)
        assert isinstance(job.exception(PATIENCE), FunctionError)
        result = made.generate(rbf(12))
        reward.let_go.set()
        assert reward.back.wait(PATIENCE)
        return [None, result]

    with engine(clock=clock) as made:
        recording, results = recorded(made, work)
    assert_adds_up(recording, results)
    assert fates(recording) == ["failed", "done"] and {*recording.batches["lane"]} == {0}


class Lines:
    """Rows of a batch as the ledger sees them."""

    def __init__(self, count, request=0, first=0):
        self.rows = [bare_row(request, first + i) for i in range(count)]

    def of(self, ledger, bucket=None):
        return ledger.rows(self.rows, bucket or len(self.rows))


def bare_row(request, number):
    asked = plan(bon())
    return Row(Brief(request, "a", SIZE, 0, 1.0, None, asked.reward), number, 0, 0, 0, asked.steps[0])


def counting():
    """A clock that says 1, 2, 3 ..."""
    return partial(next, map(float, itertools.count(1)))


def test_a_batch_keeps_its_lane_from_part_to_part():
    ledger = Ledger(counting())
    first, second, third = (Lines(2, request).of(ledger) for request in range(3))
    with ledger.batch(first):
        pass
    with ledger.batch(second):
        pass
    with ledger.batch(first), ledger.span("decode"):  # its other part
        pass
    ledger.freed(second)
    with ledger.batch(third):
        pass
    ledger.freed(first)
    ledger.freed(first)  # again
    table = ledger.table("batches")
    assert table["lane"].tolist() == [0, 1, 1] and np.isnan(table["ended"]).tolist() == [False, False, True]
    assert table["idle"][2] == table["started"][2] - table["ended"][1] and np.isnan(table["idle"][:2]).all()
    assert table["host"][0] == table["ended"][0] - table["started"][0] - table["decode_seconds"][0]


def test_what_a_thread_that_was_given_up_still_does_is_not_counted():
    ledger = Ledger(counting())
    number = Lines(2).of(ledger)
    with ledger.batch(number):
        with ledger.span("forward"):
            pass
        ledger.freed(number)
        with ledger.span("decode"):
            pass
        with ledger.span("reward"):  # of rows that are not guided it is another thread's
            pass
    with ledger.batch(number):  # nor does it take a lane
        pass
    (entry,) = ledger.table("batches")
    assert entry["decode_seconds"] == 0 and np.isnan(entry["decode_started"]) and entry["reward_seconds"] > 0
    with ledger.batch(Lines(2, 1).of(ledger)):
        assert ledger.table("batches")["lane"].tolist() == [0, 0]


def test_a_row_that_runs_again_ran_in_vain_before():
    ledger, lines = Ledger(), Lines(2)
    lines.of(ledger, 4)
    lines.of(ledger, 4)
    for number in range(2):
        ledger.settle(0, number, True, "committed", 0.5)
        ledger.settle(0, number, False, "committed")  # which is known by now
    assert {kind: count for kind, count in ledger.executed.items() if count} == {
        "committed": 2, "padding": 4, "speculative": 2,
    }  # fmt: skip
    rows = ledger.table("rows")
    own = rows[rows["kind"] == KINDS.index("committed")]
    assert [STATES[code] for code in own["state"]] == ["dropped", "dropped", "kept", "kept"]
    assert np.isnan(own["reward"][:2]).all() and (own["reward"][2:] == 0.5).all()


def test_a_ledger_that_is_off_counts_and_writes_nothing():
    with engine() as made:
        made.ledger.on = False
        result = made.generate(rbf(30))
        assert made.ledger.executed["committed"] == 30 and made.ledger.seconds["forward"] > 0
        assert all(len(made.ledger.table(name)) == 0 for name in records.TABLES) and result.cost is None
        made.ledger.on = True
        assert made.generate(rbf(30)).cost.nfe["committed"] == 30
        assert_sound(made)


def test_a_ledger_that_is_cleared_knows_nothing_of_what_was_on_its_way():
    gate = Gate()
    with engine() as made:
        job = made.submit(rbf(20, reward=gate))
        assert gate.called.wait(PATIENCE)
        made.ledger.clear()
        gate.open.set()
        assert job.result(PATIENCE).committed_nfe == 20
        assert min(made.ledger.executed.values()) >= 0 and len(made.ledger.table("requests")) == 0
        assert_sound(made)


def test_a_ring_keeps_the_latest():
    ring = Ring(ROW, 5)
    for i in range(4):
        entries = np.full(3, ring.fresh)
        entries["number"] = [3 * i, 3 * i + 1, 3 * i + 2]
        assert ring.add(entries) == 3 * i
    assert ring.copy()["number"].tolist() == [7, 8, 9, 10, 11] and ring.dropped == 7
    assert ring.copy(10)["number"].tolist() == [10, 11] and len(ring.copy(12)) == 0 == len(ring.copy(99))
    assert ring[6] is None and ring[12] is None and ring[-1] is None and ring[7]["number"] == 7
    assert ring.find("number", 11).tolist() == [11] and ring.find("number", 8, 9).tolist() == []
    assert ring.take(np.array([8, 11]))["number"].tolist() == [8, 11]
    many = np.full(12, ring.fresh)
    many["number"] = range(100, 112)
    ring.add(many)
    assert ring.copy()["number"].tolist() == [107, 108, 109, 110, 111]
    ring[ring.count - 1]["reward"] = 2.0
    assert ring.copy()["reward"][-1] == 2.0
    assert ring.new() == ring.count - 1 == 24 and ring[24]["number"] == -1 and np.isnan(ring[24]["reward"])
    ring.columns["number"][ring.place(24)] = 5
    assert ring[24]["number"] == 5 and np.isnan(Ring(BATCH, 1).fresh["started"])


def test_rings_that_wrap(monkeypatch):
    for name, capacity in {"rows": 64, "batches": 6, "calls": 3, "requests": 2}.items():
        monkeypatch.setitem(records.CAPACITY, name, capacity)
    with engine() as made:
        ledger = made.ledger
        for seed in range(5):
            with made.profile() as p:
                result = made.generate(rbf(40, reward=BOTH, seed=seed))
                made.stats()
            known = result.cost
            assert known is not None and sum(known.nfe.values()) < result.executed_nfe
            lost = {
                name: ledger.written[name] - p._since[name] - len(p.recording.__dict__[name]) for name in records.TABLES
            }
            assert p.recording.about["forgotten"] == lost and lost["rows"] > 0 and lost["requests"] == 0
            assert p.recording.costs.keys() == {int(p.recording.requests["request"][-1])}
            assert sum(p.recording.costs[seed].batches.values()) <= len(p.recording.batches)
        assert (
            ledger.forgotten == {name: ledger.written[name] - len(ledger.table(name)) for name in records.TABLES}
            and ledger.forgotten["requests"] == 3
        )
        assert len(ledger.specs) == 2 and ledger.cost(0) is None
        assert_sound(made)


def test_a_batch_that_is_larger_than_the_ring(monkeypatch):
    monkeypatch.setitem(records.CAPACITY, "rows", 5)
    monkeypatch.setitem(records.CAPACITY, "batches", 1)
    with engine(buckets=(16,), lanes=2) as made:
        assert made.generate(bon(16)).committed_nfe == 16
        assert_sound(made)


def test_nobody_sees_a_batch_without_its_rows(monkeypatch):
    ledger, adding, seen = Ledger(), threading.Event(), []
    added = Ring.add

    def slowly(ring, entries):
        adding.set()
        reader.join(0.05)  # it waits for the ledger
        return added(ring, entries)

    def read():
        assert adding.wait(PATIENCE)
        tables = ledger.snapshot(dict.fromkeys(records.TABLES, 0)).tables
        seen.append((len(tables["batches"]), len(tables["rows"])))

    monkeypatch.setattr(Ring, "add", slowly)
    reader = threading.Thread(target=read)
    reader.start()
    Lines(2).of(ledger)
    reader.join()
    assert seen == [(1, 2)]


def test_a_lane_is_free_in_the_ledger_when_the_loop_is_told_so():
    told, free = [], threading.Event()

    def report(event):
        told.append((type(event), bool(np.isnan(made.ledger.table("batches")["ended"][-1]))))
        if isinstance(event, Free):
            free.set()

    with engine() as made:
        made.generate(bon())
        made._host.runner.submit_work(lambda: None, lambda *_: None, report, "measure")
        assert free.wait(PATIENCE)
        assert told == [(Done, True), (Free, False)]
        assert WORK[made.ledger.table("batches")["work"][-1]] == "measure"


def test_readers_and_a_working_engine_do_not_disturb_one_another():
    over, found = threading.Event(), []

    def read(ledger, name):
        while not over.is_set():
            table = ledger.table(name)
            key = {"rows": "batch", "batches": "batch", "calls": "started", "requests": "request"}[name]
            assert (np.diff(table[key]) >= 0).all() if name != "calls" else not np.isnan(table["ended"]).any()
            snapshot = ledger.snapshot(dict.fromkeys(records.TABLES, 0))
            rows, batches = snapshot.tables["rows"], snapshot.tables["batches"]
            assert batches["bucket"].sum() == len(rows), "a batch and its rows are written at once"
            ledger.cost(0)
            found.append(name)

    failures = []

    def guarded(*args):
        try:
            read(*args)
        except BaseException as error:
            failures.append(error)

    with engine(lanes=2) as made:
        readers = [threading.Thread(target=guarded, args=(made.ledger, name)) for name in records.TABLES]
        for reader in readers:
            reader.start()
        results = made.generate([rbf(40, seed=seed, reward=BOTH) for seed in range(4)])
        made.stats()
        while {*found} != {*records.TABLES} and not failures:
            made.generate(bon())
        over.set()
        for reader in readers:
            reader.join()
    assert not failures, failures
    assert all(sum(result.cost.nfe.values()) == result.executed_nfe for result in results)


def test_a_stage_that_raises_takes_its_time_too():
    now = iter(range(100))
    ledger = Ledger(clock=lambda: float(next(now)))
    with pytest.raises(ValueError), ledger.span("decode"):
        raise ValueError
    assert ledger.seconds["decode"] == 1.0
