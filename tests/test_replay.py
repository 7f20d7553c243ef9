"""A search goes on where another process has left it, and its result is what it would have been."""

import random
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import PATIENCE, SIZE, Clock, Gate, bon, brightness, engine, fingerprint, rbf

import rollflow
from rollflow import Engine, Request, methods, rewards
from rollflow.entries import Entry, Replay, read, written
from rollflow.errors import OutOfTime, RequestError
from rollflow.journal import Journal
from rollflow.pictures import described
from rollflow.pictures import written as written_file
from rollflow.row import Brief, Row
from rollflow.schedule.pool import Pool
from rollflow.sde import Step
from rollflow.search.particle import Particle
from rollflow.search.replay import Absent, Restoring, Unfit, room


def slope(images, prompts):
    """A reward with a gradient."""
    return images.mean((1, 2, 3)) - images[:, 0].mean((1, 2))


slope.differentiable = True
METHODS = {name: {"method": name} for name in methods.names() if name != "dps"}
GUIDED = {"method": "rbf", "options": {"gradient": 0.1}, "reward": slope}
CASES = {
    **METHODS,
    "dps": {"method": "dps", "reward": slope},
    "guided rbf": GUIDED,
    "finish": {"method": "rbf", "finish": 2, "finalists": 2},
    "normalised": {"method": "rbf", "reward": "z(jpeg)"},
    "combined": {"method": "svdd", "reward": "0.1*jpeg + z(jpeg)"},
    "stop_at": {"method": "rbf", "stop_at": 0.52, "nfe": 200},
    "held back": {"method": "bon", "judge_all": True},
}


@pytest.fixture(scope="module")
def shared():
    with engine() as made:
        yield made


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_search_is_the_unbroken_one(shared, case):
    request = Request("a", **{"reward": brightness, "nfe": 48, "steps": 4, "seed": 5, **CASES[case]})
    job = shared.submit(request)
    whole, kept = fingerprint(job.result(PATIENCE)), job.entries()
    count = len(kept.entries)
    for cut in {0, 1, count // 2, count - 1, count, random.Random(case).randrange(count)}:
        replay = read(written(kept._replace(entries=kept.entries[:cut])))
        again = shared.submit(request, replay=replay)
        assert fingerprint(again.result(PATIENCE)) == whole, cut
        assert cut == count or again.resumed == cut or case == "finish"
        assert again.result().notes == job.result().notes
        if cut == 1:  # it was not evaluated again for nothing
            assert again.result().executed_nfe <= job.result().executed_nfe + 8 * 2
    assert shared.stats().live == shared.stats().promised == 0


def test_a_search_with_a_cache_is_resumed():
    request = Request(
        "two red circles", method="svdd", nfe=30, steps=5, cache=True, interpolant="linear", diffusion=0.3
    )
    with Engine.from_pretrained("shapes", buckets=(8,), lanes=1, threads=1) as made:
        job = made.submit(request)
        whole, kept = fingerprint(job.result(PATIENCE)), job.entries()
        for cut in (11, 12, 20):
            replay = kept._replace(entries=kept.entries[:cut])
            again = made.submit(request, replay=replay)
            assert fingerprint(again.result(PATIENCE)) == whole and again.resumed in (cut, cut - 1)


def test_entries_are_there_while_it_runs(shared):
    gate = Gate(closed=True)
    job = shared.submit(rbf(reward=gate))
    assert gate.called.wait(PATIENCE) and job.entries()[:3] == ((), (), 12)
    gate.open.set()
    job.result(PATIENCE)
    assert len(job.entries().entries) == 12 and job.entries(10).entries == job.entries().entries[10:]


@pytest.mark.parametrize(
    "replay",
    [
        Replay((Entry("committed", 3, 0.5),)),
        Replay((Entry("guided", 0, 0.5),)),
        Replay((Entry("committed", 0, (0.5, 0.5)),)),
        Replay((Entry("committed", 0, None),)),
        Replay((Entry("committed", 0, 0.5),), ((0.0, 1.0),)),
        Replay(tuple(Entry("committed", 0, 0.5) for _ in range(12))),
    ],
)
def test_scores_of_another_search_are_left_aside(shared, replay, caplog):
    whole = fingerprint(shared.generate(rbf()))
    job = shared.submit(rbf(), replay=replay)
    assert fingerprint(job.result(PATIENCE)) == whole and job.resumed == 0
    assert "begins anew" in caplog.text


def test_slots_are_enough_wherever_it_is_resumed():
    request = Request("a", reward=brightness, method="evosearch", nfe=48, steps=4)
    with engine() as made:
        job = made.submit(request)
        whole, kept = fingerprint(job.result(PATIENCE)), job.entries()
        plan = made.check(request)
    with engine(slots=rollflow.admission.promise(plan)) as small:
        for cut in range(1, 48, 5):
            again = small.submit(request, replay=kept._replace(entries=kept.entries[:cut]))
            assert fingerprint(again.result(PATIENCE)) == whole and again.resumed == cut
        assert small.stats().live == small.stats().promised == 0


class Gated:
    """A reward with a gradient that waits at a gate: states of guided searches are made again with it."""

    differentiable, concurrent = True, True

    def __init__(self):
        self.gate = Gate(closed=False)

    def __call__(self, images, prompts):
        self.gate.called.set()
        assert self.gate.open.wait(PATIENCE), "nobody opened the gate"
        return slope(images, prompts)


@pytest.fixture
def held():
    """An engine with a clock, a guided request, its whole result, its entries, and the gate of its reward, closed."""
    reward, clock = Gated(), Clock()
    request = Request("a", reward, "rbf", 48, steps=6, options={"gradient": 0.1}, seconds=1000.0)
    with engine(clock=clock) as made:
        job = made.submit(request)
        whole = fingerprint(job.result(PATIENCE))
        reward.gate.called.clear()
        reward.gate.open.clear()
        yield made, request, whole, job.entries(), reward.gate
        reward.gate.open.set()


def test_it_is_cancelled_while_states_are_made_again(held):
    made, request, _, kept, gate = held
    job = made.submit(request, replay=kept._replace(entries=kept.entries[:20]))
    assert gate.called.wait(PATIENCE) and job.resumed == 20  # for the gradient of a state that is made again
    job.cancel()
    gate.open.set()
    assert job.best(PATIENCE) is None and job.cancelled()
    assert made.generate(bon()).committed_nfe == 4 and made.stats().live == 0


def test_its_time_ends_while_states_are_made_again(held):
    made, request, _, kept, gate = held
    job = made.submit(request, replay=kept._replace(entries=kept.entries[:20]))
    assert gate.called.wait(PATIENCE)
    made.clock.pass_in(made, 2000.0)
    gate.open.set()
    result = job.result(PATIENCE)
    assert result.stopped == "seconds" and job.resumed == 20 and 40 > result.committed_nfe >= 20


@pytest.mark.parametrize("method", ["rbf", "svdd", "smc", "sop"])
def test_of_a_limited_time_what_was_used_is_gone(shared, method):
    request = Request("a", brightness, method, 48, steps=6, seconds=1000.0)
    job = shared.submit(request)
    job.result(PATIENCE)
    kept = job.entries()._replace(seconds=999.9999)
    again = shared.submit(request, replay=kept._replace(entries=kept.entries[:30]))
    result = again.result(PATIENCE)
    assert again.resumed == 30 and result.stopped in ("seconds", "budget") and result.committed_nfe >= 30
    assert again.entries().seconds >= 999.0  # should it be resumed once more


def test_what_was_over_in_time_stays_so(shared):
    """Its time had ended it, and it died while its finalist was finished."""
    request = Request("a", brightness, "rbf", 48, steps=6, seconds=1000.0, finish=2)
    gate = Gate(closed=True)
    clock = Clock()
    with engine(clock=clock) as made:
        first = made.submit(replace(request, reward=gate))
        assert gate.called.wait(PATIENCE)
        clock.pass_in(made, 2000.0)
        gate.open.set()
        whole = first.result(PATIENCE)
        kept = first.entries()
    assert whole.stopped == "seconds" and [entry.kind for entry in kept.entries[-2:]] == ["finish"] * 2
    again = shared.submit(request, replay=kept)
    result = again.result(PATIENCE)
    assert again.resumed == len(kept.entries) - 2 and fingerprint(result) == fingerprint(whole)


def test_a_deadline_that_passed_meanwhile_ends_it_with_what_it_had(shared):
    request = Request("a", brightness, "svdd", 48, steps=6)
    job = shared.submit(request)
    job.result(PATIENCE)
    kept = job.entries()
    late = replace(request, deadline=shared.clock() - 10.0)
    again = shared.submit(late, replay=kept._replace(entries=kept.entries[:20]))
    result = again.result(PATIENCE)
    assert result.stopped == "deadline" and again.resumed == 20
    with pytest.raises(OutOfTime):
        shared.submit(late).result(PATIENCE)


def test_scores_of_another_kind_of_engine_are_left_aside(shared, caplog):
    job = shared.submit(rbf())
    whole, kept = fingerprint(job.result(PATIENCE)), job.entries()
    with engine(name="another") as other:
        again = other.submit(rbf(), replay=kept)
        assert fingerprint(again.result(PATIENCE)) == whole and again.resumed == 0
    assert "begins anew" in caplog.text


def test_room_is_promised_or_refused():
    pool, step = Pool(6), Step(*[0.0] * 8)
    lease, other = pool.lease(2), pool.lease(2)
    places = [Absent() for _ in range(5)]
    for i, one in enumerate(places):
        one.row = Row(Brief(0, "a", SIZE, 0, 0.0, None, rewards.make(brightness)), i, i, -1, -1, step)
    living = [Particle(0, step, one) for one in places]
    with pytest.raises(Unfit, match="5 slots"):
        room(lease, Restoring(living))
    room(lease, Restoring(living[:4]))
    assert lease.promise == 4 and pool.promised == 6
    lease.close()
    other.close()
    assert pool.promised == 0


def test_slots_of_ancestors_are_counted():
    """A chain takes two at a time; what lives stays."""
    step = Step(*[0.0] * 8)
    brief = Brief(0, "a", SIZE, 0, 0.0, None, rewards.make(brightness))
    chain = [Absent() for _ in range(10)]
    for i, one in enumerate(chain):
        one.row, one.parents = Row(brief, i, i, -1, -1, step), tuple(chain[i - 1 : i] if i else ())
    living = [Particle(0, step, one) for one in chain]
    assert Restoring(living[9:]).slots == 2
    assert Restoring(living[9:]).left == 10
    assert Restoring([living[0], living[9]]).slots == 3


class TestJournal:
    def test_what_an_engine_leaves_open_another_resumes(self, tmp_path):
        requests = {f"job {i}": rbf(reward="jpeg", seed=i, nfe=24) for i in range(6)}
        with engine() as made:
            whole = {name: fingerprint(made.generate(request)) for name, request in requests.items()}
        first = engine(journal=tmp_path)
        jobs = {name: first.submit(request, id=name) for name, request in requests.items()}
        jobs["job 0"].result(PATIENCE)
        cancelled = jobs["job 1"].cancel()
        first.close(drain=False)
        with Journal(tmp_path, reading=True) as kept:
            states = {one.id: one.status for one in kept.jobs()}
        assert states["job 0"] == "done" and states["job 1"] == ("cancelled" if cancelled else "done")
        assert all(states[name] == ("accepted" if jobs[name].cancelled() else "done") for name in [*jobs][2:])
        with engine(journal=tmp_path) as second:
            found = {job.id: fingerprint(job.result(PATIENCE)) for job in second.resume()}
            assert not second.resume()
        assert found == {name: whole[name] for name, state in states.items() if state == "accepted"}
        with Journal(tmp_path, reading=True) as kept:
            done = kept.get("job 5")
            assert done.status == "done" and done.result["nfe"] == 24 and kept.image("job 5").startswith(b"\x89PNG")
            assert not kept.unfinished() and kept.evaluated("job 5") == 0

    def test_ends_are_written_however_long_that_takes(self, tmp_path, monkeypatch):
        slow = threading.Event()
        monkeypatch.setattr("rollflow.host.CLOSING", 0.0)
        monkeypatch.setattr("rollflow.journaling.written", lambda result: slow.wait(PATIENCE) and ("png", b"file"))
        made = engine(journal=tmp_path)
        made.generate(rbf(reward="jpeg"))
        closing = threading.Thread(target=made.close)
        closing.start()
        slow.set()
        closing.join(PATIENCE)
        with Journal(tmp_path, reading=True) as kept:
            assert [one.status for one in kept.jobs()] == ["done"]

    def test_what_cannot_be_written_is_a_failure(self, tmp_path, monkeypatch):
        monkeypatch.setattr("rollflow.journaling.written", lambda result: 1 / 0)
        with engine(journal=tmp_path) as made:
            made.generate(rbf(reward="jpeg"))
        with Journal(tmp_path, reading=True) as kept:
            assert [(one.status, one.error["type"]) for one in kept.jobs()] == [("failed", "RollflowError")]

    def test_one_that_cannot_be_read_harms_no_other(self, tmp_path):
        with Journal(tmp_path) as journal:
            journal.accept("old", {"prompt": "a", "gone": 1}).result(PATIENCE)
            journal.accept("good", {"prompt": "a", "reward": "jpeg", "nfe": 12}).result(PATIENCE)
        with engine(journal=tmp_path) as made:
            (job,) = made.resume()
            assert job.id == "good" and job.result(PATIENCE).committed_nfe == 12
        with Journal(tmp_path, reading=True) as kept:
            assert {one.id: one.status for one in kept.jobs()} == {"old": "failed", "good": "done"}

    def test_only_names_can_be_kept(self, tmp_path):
        with engine(journal=tmp_path) as made:
            with pytest.raises(RequestError, match=r"reward=.*names and numbers alone"):
                made.submit(rbf())
            made.generate(rbf(reward="jpeg"))
            assert made.stats().running == 0

    def test_an_id_is_taken_once(self, tmp_path):
        with engine(journal=tmp_path) as made:
            first = made.submit(rbf(reward="jpeg"), id="a")
            with pytest.raises(RequestError, match="id='a'"):
                made.submit(rbf(reward="jpeg"), id="a")
            first.result(PATIENCE)
        with Journal(tmp_path, reading=True) as kept:
            assert [one.status for one in kept.jobs()] == ["done"]

    def test_a_failure_is_kept_and_a_request_that_no_longer_fits_is_told(self, tmp_path):
        with Journal(tmp_path) as journal:
            journal.accept("old", {"prompt": "a", "method": "rbf", "reward": "jpeg", "nfe": -1}).result(PATIENCE)
        with engine(journal=tmp_path) as made:
            assert made.resume() == []
        with Journal(tmp_path, reading=True) as kept:
            assert kept.get("old").status == "failed" and "nfe=-1" in kept.get("old").error["message"]

    def test_resume_needs_one(self, shared):
        with pytest.raises(RequestError, match="no journal"):
            shared.resume()

    def test_killed_at_20_random_moments(self, tmp_path):
        """Each life of the process is a child of one that has imported everything; it is killed whenever it may be."""
        here = Path(__file__).parent
        lives = subprocess.run(
            [sys.executable, str(here / "killed.py"), str(tmp_path)], capture_output=True, text=True, timeout=300
        )
        assert lives.returncode == 0, lives.stderr[-2000:]
        killed, resumed, last = map(int, lives.stdout.split())
        assert killed == 20 and resumed > 10 and last > 0
        with engine() as made:
            whole = [made.generate(request) for request in killed_requests()]
        with Journal(tmp_path, reading=True) as kept:
            results = {one.id: one for one in kept.jobs()}
            images = {name: kept.image(name) for name in results}
        assert len(results) == len(whole)
        for i, result in enumerate(whole):
            one = results[f"job {i}"]
            assert one.status == "done" and images[f"job {i}"] == written_file(result)[1]
            wanted = described(result, "png")
            same = one.result.keys() - {"seconds", "executed_nfe"}
            assert {name: one.result[name] for name in same} == {name: wanted[name] for name in same}


def killed_requests():
    """What runs while its process is killed again and again: searches of some hundred batches."""
    names = ("rbf", "svdd", "smc", "zo", "sop", "beam")
    return [
        Request("a", reward="z(jpeg) + 0.5*jpeg" if name == "smc" else "jpeg", method=name, nfe=160, steps=8, seed=i)
        for i, name in enumerate(names)
    ]
