"""The journal: what a commit has returned from is there, whatever happens to the process."""

import math
import os
import signal
import subprocess
import sys

import pytest
import torch

from rollflow import Request
from rollflow.entries import Entry, Replay, read, written
from rollflow.errors import EngineClosed, RequestError, RollflowError
from rollflow.journal import Journal, KeyTaken
from rollflow.wire import from_json, to_json

SCORES = Replay((Entry("committed", 0, 0.1 + 0.2), Entry("guided", 3, (math.nan, -math.inf), True)), ((0.5, 1.5),))


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path / "journal") as journal:
        yield journal


class TestEntries:
    def test_scores_survive_to_the_last_bit(self):
        found = read(written(SCORES))
        assert found.scales == SCORES.scales and found.entries[0] == SCORES.entries[0]
        assert math.isnan(found.entries[1].score[0]) and found.entries[1].score[1] == -math.inf
        assert found.entries[1].invalid

    @pytest.mark.parametrize("text", ["", "[]", "[[], [[1]]]", '[[], [["a", "b", 1, 0]]]'])
    def test_what_is_none_is_refused(self, text):
        with pytest.raises(RequestError, match="rollflow did not write it"):
            read(text)


class TestWire:
    @pytest.mark.parametrize(
        "request_",
        [
            Request("two red circles"),
            Request("a", method="rbf", nfe=50, seed=-3, options={"initial": 5}, stop_at=0.5, times=(0.9, 0.5)),
            Request("a", reward="0.7*count + 0.3*count", interpolant="linear", finish=2, priority=-1, cache=True),
        ],
    )
    def test_there_and_back(self, request_):
        there = to_json(request_)
        assert from_json({**there}) == request_ or there["times"] == [0.9, 0.5]
        assert to_json(from_json(there)) == there

    def test_tensors_survive_to_the_last_bit(self):
        latents = torch.randn(2, 3, 4, dtype=torch.float64)
        assert torch.equal(from_json(to_json(Request("a", latents=latents))).latents, latents)

    def test_a_deadline_counts_on(self):
        there = to_json(Request("a", deadline=107.0), clock=lambda: 100.0)
        assert from_json(there, clock=lambda: 1000.0).deadline == pytest.approx(1007.0, abs=1.0)

    @pytest.mark.parametrize(
        ("found", "match"),
        [
            ({}, "at least a"),
            ({"prompt": 3}, "at least a"),
            ({"prompt": "a", "nfee": 3}, "nfee: there is no such field; did you mean 'nfe'"),
            ({"prompt": "a", "method": "rbf", "initil": 3}, "did you mean 'initial'"),
            ({"prompt": "a", "deadline": 3.0}, "did you mean 'deadline_at'"),
            ({"prompt": "a", "deadline_at": "x"}, "seconds since 1970"),
            ({"prompt": "a", "reward": {"code": "x"}}, "give names"),
            ({"prompt": "a", "latents": [1, 2]}, "safetensors"),
            ({"prompt": "a", "latents": {"safetensors": "AAAA"}}, "these are not safetensors"),
            ({"prompt": "a", "options": 3, "initial": 5, "method": "rbf"}, "must be an object"),
        ],
    )
    def test_one_clear_error(self, found, match):
        with pytest.raises(RequestError, match=match):
            from_json(found)

    def test_own_options_may_stand_beside_fields(self):
        assert from_json({"prompt": "a", "method": "rbf", "initial": 5}).options == {"initial": 5}

    @pytest.mark.parametrize("name", ["reward", "method", "diffusion", "held_out"])
    def test_an_object_is_refused_by_name(self, name):
        with pytest.raises(RequestError, match=f"^{name}=.*names and numbers alone"):
            to_json(Request("a", **{name: len}))


class TestJournal:
    def test_what_was_accepted_is_there_again(self, tmp_path):
        with Journal(tmp_path) as journal:
            journal.accept("a", {"prompt": "x"}, key="k", owner="me").result(10)
            journal.accept("b", {"prompt": "y"}).result(10)
            journal.log("a", 0, SCORES)
            journal.log("a", 1, SCORES)  # the first of them is there
            journal.finish("b", {"reward": 1.0}, b"png").result(10)
        with Journal(tmp_path) as journal:
            (kept,) = journal.unfinished()
            assert (kept.id, kept.key, kept.owner, kept.request) == ("a", "k", "me", {"prompt": "x"})
            assert [entry.kind for entry in kept.replay.entries] == ["committed", "guided", "guided"]
            assert kept.replay.scales == SCORES.scales
            done = journal.get("b")
            assert done.status == "done" and done.result == {"reward": 1.0} and journal.image("b") == b"png"
            assert [one.id for one in journal.jobs()] == ["b", "a"] and journal.evaluated("a") == 3
            assert [one.id for one in journal.jobs(status="done")] == ["b"]
            journal.log("a", 3, SCORES)  # it goes on where it was
            journal.flush(10)
            assert journal.evaluated("a") == 5

    def test_a_key_is_taken_once_for_each_owner(self, journal):
        journal.accept("a", {}, key="k", owner="me").result(10)
        journal.accept("b", {}, key="k", owner="you").result(10)
        journal.accept("c", {}).result(10)
        journal.accept("d", {}).result(10)  # none at all is not a key
        with pytest.raises(KeyTaken) as error:
            journal.accept("e", {}, key="k", owner="me").result(10)
        assert error.value.id == "a" and journal.by_key("me", "k") == "a" and journal.get("e") is None

    def test_one_that_is_refused_harms_no_other_of_its_commit(self, journal):
        futures = [journal.accept("same" if i % 2 else f"id{i}", {}) for i in range(40)]
        failed = [future.exception(10) is not None for future in futures]
        assert failed == [i % 2 == 1 and i > 1 for i in range(40)] and len(journal.unfinished()) == 21

    def test_the_first_end_counts(self, journal):
        journal.accept("a", {}).result(10)
        journal.finish("a", {"reward": 1.0}, b"1").result(10)
        journal.fail("a", "cancelled", {"message": "late"}).result(10)
        assert journal.get("a").status == "done" and journal.get("a").error is None

    def test_missing_scores_are_an_error_and_a_restart_drops_them(self, journal):
        journal.accept("a", {}).result(10)
        with pytest.raises(Exception, match="those between are missing"):
            journal.log("a", 5, SCORES)
        journal.log("a", 0, SCORES)
        journal.restart("a")
        journal.log("a", 0, Replay(SCORES.entries[:1]))
        journal.flush(10)
        assert len(journal.get("a").replay.entries) == 1

    def test_old_ends_are_forgotten(self, tmp_path):
        now = [1000.0]
        with Journal(tmp_path, clock=lambda: now[0]) as journal:
            for name in ("a", "b", "c"):
                journal.accept(name, {}, key=name).result(10)
            journal.finish("a", {}, b"1").result(10)
            now[0] = 1100.0
            journal.finish("b", {}, b"2").result(10)
            journal.prune(50.0)
            journal.flush(10)
            assert [one.id for one in journal.jobs()] == ["c", "b"] and journal.image("a") is None
            journal.accept("d", {}, key="a").result(10)  # its key is free again

    def test_one_process_has_it(self, tmp_path, journal):
        with pytest.raises(RequestError, match="a process has it open"):
            Journal(journal.folder)
        journal.accept("a", {}).result(10)
        with Journal(journal.folder, reading=True) as looking:
            assert [one.id for one in looking.jobs()] == ["a"]
            with pytest.raises(EngineClosed):
                looking.accept("b", {})
        with pytest.raises(RequestError, match="cannot be used as a journal"):
            Journal(tmp_path / "nothing", reading=True)

    def test_a_file_is_no_folder(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(RequestError, match="cannot be used as a journal"):
            Journal(tmp_path / "file")

    def test_after_a_commit_that_failed_scores_are_kept_anew(self, tmp_path):
        entries = tuple(Entry("committed", 0, float(i)) for i in range(4))
        with Journal(tmp_path) as journal:
            journal.accept("a", {}).result(10)
            journal.log("a", 0, Replay(entries[:1]))
            journal.flush(10)
            journal._writer.execute("PRAGMA max_page_count = 1")  # the disk is full
            journal.log("a", 1, Replay((Entry("x" * 100_000, 0, 1.0),)))
            with pytest.raises(RollflowError, match="cannot be written"):
                journal.accept("b", {}).result(10)
            assert journal.failure is not None
            journal._writer.execute("PRAGMA max_page_count = 1000000")
            with pytest.raises(RollflowError, match="are missing"):
                journal.log("a", 2, Replay(entries[2:3]))
            journal.restart("a")
            journal.log("a", 0, Replay(entries))
            journal.flush(10)
            assert journal.get("a").replay.entries == entries and journal.failure is None

    def test_a_promise_that_nobody_waits_for_any_more(self, journal):
        for i in range(20):
            journal.accept(str(i), {}).cancel()
        journal.accept("last", {}).result(10)
        assert "last" in {one.id for one in journal.unfinished()}

    def test_an_odd_value_harms_no_other_of_its_commit(self, journal):
        odd, good = journal.accept("\ud800", {}), journal.accept("good", {})
        assert isinstance(odd.exception(10), UnicodeEncodeError) and good.exception(10) is None

    def test_scores_of_what_is_over_are_not_kept(self, journal):
        journal.accept("a", {}).result(10)
        journal.finish("a", {"reward": 1.0}, b"1").result(10)
        journal.log("a", 0, SCORES)
        journal.finish("a", {"reward": 2.0}, b"2").result(10)
        journal.fail("a", "cancelled", {}).result(10)
        assert journal.evaluated("a") == 0 and journal.image("a") == b"1" and journal.get("a").result == {"reward": 1.0}

    def test_what_was_promised_survives_kill_9(self, tmp_path):
        writer = (
            "import sys; from rollflow.journal import Journal; journal = Journal(sys.argv[1]); i = 0\n"
            "while True:\n"
            "    journal.accept(str(i), {'i': i}).result(); print(i, flush=True); i += 1\n"
        )
        process = subprocess.Popen([sys.executable, "-c", writer, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        promised = [int(process.stdout.readline()) for _ in range(50)]
        os.kill(process.pid, signal.SIGKILL)
        promised += [int(line) for line in process.stdout.read().split()]
        process.wait()
        with Journal(tmp_path) as journal:
            there = {one.id: one.request["i"] for one in journal.unfinished()}
        assert [there[str(i)] for i in promised] == promised
        assert promised == sorted(promised)
