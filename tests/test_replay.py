"""A search goes on where another process has left it, and its result is what it would have been."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import PATIENCE, SIZE, Gate, bon, brightness, engine, fingerprint, rbf

import rollflow
from rollflow import Engine, Request, methods, rewards
from rollflow.entries import Entry, Replay, read, written
from rollflow.errors import RequestError
from rollflow.journal import Journal
from rollflow.pictures import described
from rollflow.pictures import written as written_file
from rollflow.row import Brief, Row
from rollflow.sde import Step
from rollflow.search.particle import Particle
from rollflow.search.replay import Absent, Restoring


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


def test_where_there_is_no_room_it_begins_anew(caplog):
    request = Request("a", reward=brightness, method="evosearch", nfe=48, steps=4)
    with engine() as made:
        job = made.submit(request)
        whole, kept = fingerprint(job.result(PATIENCE)), job.entries()
        plan = made.check(request)
    with engine(slots=rollflow.admission.promise(plan)) as small:
        for cut in range(1, 48, 5):
            again = small.submit(request, replay=kept._replace(entries=kept.entries[:cut]))
            assert fingerprint(again.result(PATIENCE)) == whole
        assert small.stats().live == small.stats().promised == 0


def test_it_is_cancelled_while_states_are_made_again(shared):
    gate = Gate(closed=True)
    request = rbf(method="svdd")
    job = shared.submit(request)
    job.result(PATIENCE)
    kept = job.entries()._replace(entries=job.entries().entries[:9])
    ahead = shared.submit(bon(reward=gate))
    again = shared.submit(request, replay=kept)
    again.cancel()
    gate.open.set()
    ahead.result(PATIENCE)
    assert again.cancelled() and shared.generate(bon()).committed_nfe == 4
    assert shared.stats().live == 0


def test_of_a_limited_time_what_was_used_is_gone(shared):
    request = rbf(nfe=None, seconds=1000.0)
    replay = Replay((), (), 12, 999.0)
    job = shared.submit(request, replay=replay)
    assert job.request.nfe == 12 and job.request.seconds == pytest.approx(1.0)
    assert job.result(PATIENCE).committed_nfe <= 12


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
        jobs["job 1"].cancel()
        first.close(drain=False)
        with Journal(tmp_path, reading=True) as kept:
            states = {one.id: one.status for one in kept.jobs()}
        with engine(journal=tmp_path) as second:
            found = {job.id: fingerprint(job.result(PATIENCE)) for job in second.resume()}
            assert not second.resume()
        for name, state in states.items():
            assert state == "accepted" if name in found else state in ("done", "cancelled")
        assert found == {name: whole[name] for name in found}
        with Journal(tmp_path, reading=True) as kept:
            done = kept.get("job 5")
            assert done.status == "done" and done.result["nfe"] == 24 and kept.image("job 5").startswith(b"\x89PNG")
            assert not kept.unfinished() and kept.evaluated("job 5") == 0

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
        assert lives.stdout.split() == ["20"]
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
