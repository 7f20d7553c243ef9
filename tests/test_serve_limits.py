"""What a server allows: keys and whose searches they are, rates, rewards by name, deadlines, and spans."""

import asyncio
import inspect
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rollflow import cli
from rollflow.cli import connections, serving
from rollflow.cli import workers as cli_workers
from rollflow.errors import EngineBusy, EngineDead, OutOfTime, RequestError
from rollflow.rewards import weights
from rollflow.serve import fields, worker
from rollflow.serve.allowed import check_reward, usual
from rollflow.serve.desk import Desk, RewardCounts
from rollflow.serve.failures import Failure, ended, refused
from rollflow.serve.keys import Keys, check_host, local
from rollflow.serve.limits import Rate, ServeSettings
from rollflow.serve.metrics import _by_name
from rollflow.serve.tracing import Tracing

ONE, TWO = "first-key-of-the-test", "other-key-of-the-test"


@pytest.fixture
def keys(tmp_path):
    (tmp_path / "keys").write_text(f"# a comment\n{ONE}\n\nsomebody {TWO}\n")
    return Keys(tmp_path / "keys")


def test_keys_have_owners(keys):
    assert keys.owner(f"Bearer {TWO}") == "somebody" and keys.owner(f"bearer {ONE}").startswith("key-")
    assert ONE not in keys.owner(f"Bearer {ONE}")
    wrong = (None, "", ONE, f"Basic {ONE}", f"Bearer {ONE}x", f"Bearer {ONE[:-1]}", "Bearer ", "Bearer ü")
    assert all(keys.owner(one) is None for one in wrong)
    assert Keys().owner(None) == "" and not Keys() and keys


def test_signatures_are_of_one_owner_and_one_search(keys):
    other = keys.owner(f"Bearer {ONE}")
    signature = keys.signature("somebody", "srch_1")
    assert keys.signed("somebody", "srch_1", signature)
    assert not keys.signed("somebody", "srch_2", signature) and not keys.signed(other, "srch_1", signature)
    assert not keys.signed("nobody", "srch_1", "") and keys.signature("nobody", "srch_1") == ""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# none\n",
        "short\n",
        f"a b {ONE}\n",
        f"a {ONE}\na {TWO}\n",
        f"{ONE}\nb {ONE}\n",
        f"clé-{ONE}\n",
        f"{ONE}\0\n",
    ],
)
def test_key_files_that_are_none(tmp_path, text):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(RequestError) as caught:
        Keys(tmp_path / "keys")
    assert ONE not in str(caught.value)
    with pytest.raises(RequestError, match="cannot be read"):
        Keys(tmp_path / "missing")


def test_the_mark_of_an_editor_makes_no_key_of_a_comment(tmp_path):
    (tmp_path / "keys").write_text(f"# one\nsomebody {ONE}\n", encoding="utf-8-sig")
    assert Keys(tmp_path / "keys").owner(f"Bearer {ONE}") == "somebody"
    (tmp_path / "keys").write_text(f"# a-comment-of-one-long-word\n{ONE}\n".replace("# ", "#"), encoding="utf-8-sig")
    assert Keys(tmp_path / "keys").owner("Bearer #a-comment-of-one-long-word") is None


def test_without_keys_only_this_machine_may_call():
    assert all(local(host) for host in ("127.0.0.1", "localhost", "::1", "127.3.2.1", "[::1]"))
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        with pytest.raises(RequestError, match="--api-key-file"):
            check_host(host, keys=False)
        check_host(host, keys=True)


def test_so_many_requests_a_minute_for_each_owner():
    now = 0.0
    rate = Rate(2, lambda: now)
    rate.take("a"), rate.take("a"), rate.take("b")
    with pytest.raises(Failure) as caught:
        rate.take("a")
    assert caught.value.status == 429 and caught.value.headers["Retry-After"] == "30"
    now = 29.9
    with pytest.raises(Failure):
        rate.take("a")
    now = 30.0
    rate.take("a")
    with pytest.raises(Failure):
        rate.take("a")
    for _ in range(1000):
        Rate(None).take("a")


def test_rewards_that_the_operator_allows():
    url = "http:url=http://judge:8000/score"
    for text in ("count", "0.7*count + 0.3*jpeg", "count:strict=true", "z(count) - jpeg:quality=50"):
        check_reward("reward", text, None)
    check_reward("reward", url, ("count", url))
    check_reward("reward", f"count + {url}", ("count", url))
    for text, allowed in ((url, None), (url, ("http", url + "2")), ("jpeg", ("count",)), ("a.py:b", None), ("", None)):
        with pytest.raises(Failure) as caught:
            check_reward("reward", text, allowed)
        assert caught.value.status == 400 and caught.value.param == "reward"


def test_rewards_that_have_to_be_fetched_take_the_operators_word(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "here", lambda *wanted: None)
    assert {"count", "jpeg"} <= {*usual()} and not {"http", "judge", "clip", "hps"} & {*usual()}
    with pytest.raises(Failure, match="no reward 'clip' here"):
        check_reward("reward", "clip", None)
    check_reward("reward", "clip", ("clip",))
    monkeypatch.setattr(weights, "here", lambda *wanted: tmp_path)
    assert "clip" in usual() and "http" not in usual()


def test_expressions_are_short():
    terms = [f"jpeg:quality={i}" for i in range(9)]
    check_reward("reward", " + ".join([*terms[:8], *terms[:8]]), None)
    for text in (" + ".join(terms), "jpeg" + " + 1" * 250):
        with pytest.raises(Failure, match=r"at most (8|1000)") as caught:
            check_reward("reward", text, None)
        assert caught.value.param == "reward"


def test_images_are_no_larger_than_allowed():
    settings = ServeSettings(max_pixels=64 * 64 * 4, own=(64, 64, 1))

    def asked(**more):
        return fields.search({"prompt": "a", **more}, settings).requests[0]

    assert asked(size="128x128")["width"] == 128 and asked(height=256)["height"] == 256 and asked(frames=4)
    for fault, more in (
        ("size", {"size": "129x128"}), ("width", {"width": 257}), ("height", {"height": 129, "width": 128}),
        ("frames", {"frames": 5}), ("frames", {"frames": 5, "size": "64x64"}), ("frames", {"frames": 0}),
    ):  # fmt: skip
        with pytest.raises(Failure) as caught:
            asked(**more)
        assert (caught.value.status, caught.value.param) == (400, fault)
    assert "width" not in fields.search({"prompt": "a"}, ServeSettings(max_pixels=1)).requests[0]


def test_what_names_no_reward_gets_one_that_it_may_name():
    def given(settings, **more):
        return fields.search({"prompt": "a", **more}, settings).requests[0].get("reward")

    assert given(ServeSettings()) is given(ServeSettings(rewards=("jpeg", "count"))) is None  # `Request.reward`
    assert given(ServeSettings(rewards=("jpeg", "brightness"))) == "jpeg"
    assert given(ServeSettings(rewards=("jpeg", "brightness")), reward="brightness") == "brightness"


def test_nobody_goes_first_unless_the_operator_lets_him():
    body = {"prompt": "a", "priority": 1}
    with pytest.raises(Failure, match="at most 0") as caught:
        fields.search(body, ServeSettings())
    assert caught.value.param == "priority"
    assert fields.search(body, ServeSettings(max_priority=1)).requests[0]["priority"] == 1
    assert fields.search({**body, "priority": -5}, ServeSettings()).requests[0]["priority"] == -5


def test_a_timeout_becomes_a_deadline_before_it():
    settings = ServeSettings()

    def seconds(timeout, **more):
        (found,) = fields.images({"prompt": "a", **more}, settings, timeout).requests
        assert found.get("seconds") or found["nfe"] == 100
        return found["deadline_at"] - time.time() if "deadline_at" in found else None

    assert 568 < seconds("600") <= 570 and 8.5 < seconds("10") <= 9 and 0.4 < seconds("1.0") <= 0.5
    assert [seconds(odd) for odd in (None, "", "nan", "inf", "-1", "soon")] == [None] * 6
    assert seconds("600", seconds=5) is None and seconds("600", stream=True) is None


def test_a_request_has_the_fields_that_were_given():
    body = {"prompt": "a", "size": "32x16", "method": "rbf", "initial": 4, "user": None, "seed": 7, "n": 3}
    asked = fields.images(body, ServeSettings(max_nfe=50))
    first = {"prompt": "a", "width": 32, "height": 16, "method": "rbf", "initial": 4, "seed": 7, "nfe": 50}
    assert asked.requests == [first, {**first, "seed": 8}, {**first, "seed": 9}]


def test_statuses_of_errors():
    busy = refused(EngineBusy("full", 7.2))
    assert (busy.status, busy.headers) == (429, {"Retry-After": "8"})
    assert (refused(EngineDead("dead")).status, refused(OutOfTime("late")).status) == (503, 504)
    named = refused(RequestError("steps=0: it must be a whole number of at least 1"), fields.names("rbf"))
    assert (named.status, named.param) == (400, "steps")
    quoted = refused(RequestError("the prompt 'seed' has no words"), fields.names())
    assert quoted.param == "prompt"
    unknown = RequestError("the model does not know cats in 'two red cats': its words are red, seed")
    assert refused(unknown, fields.names(), {"prompt": "two red cats"}).param == "prompt"
    assert refused(unknown, fields.names(), {"prompt": "a", "negative": "two red cats"}).param == "negative"
    assert refused(RequestError("steps=0 for 'a'"), fields.names(), {"prompt": "a"}).param == "steps"
    assert ended({"type": "FunctionError", "message": "ill\nTraceback"}).body["error"]["message"] == "ill Traceback"
    assert ended(None).status == 410 and ended(None).headers["x-should-retry"] == "false"


def test_labels_of_rewards_are_few():
    one = RewardCounts(2, 8, 0.5, 1)
    found = _by_name({"clip:prefix=a": one, "clip:prefix=b": one, "0.1*clip + count": one})
    assert found == {"clip": (4, 1.0, 2), "expression": (2, 0.5, 1)}


def test_spans_of_searches():
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    processors = pytest.importorskip("opentelemetry.sdk.trace.export")
    exporter, provider = export.InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(processors.SimpleSpanProcessor(exporter))
    tracing = Tracing(provider)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    span = tracing.begin({"prompt": "secret", "nfe": 12, "reward": "count"}, parent)
    tracing.end(span, "done", {"reward": 1.5, "executed_nfe": 16, "stopped": "budget"}, 0.25)
    tracing.end(tracing.begin({"prompt": "secret"}, None), "failed", None, None)
    first, second = exporter.get_finished_spans()
    assert f"{first.context.trace_id:032x}" == parent.split("-")[1] and first.parent.span_id == 0xB7AD6B7169203331
    assert first.attributes["rollflow.best_reward"] == 1.5 and first.attributes["rollflow.queue_seconds"] == 0.25
    assert "secret" not in f"{dict(first.attributes)}{first.name}"
    assert second.status.status_code.name == "ERROR" and second.parent is None


def test_no_spans_without_a_collector(monkeypatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    tracing = Tracing()
    assert tracing.begin({"prompt": "a"}, None) is None
    tracing.end(None, "done", None, None)
    tracing.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--api-key-file", "missing"], "cannot be read"),
        (["--rewards", "cuont"], "did you mean count"),
        (["--max-nfe", "0"], "max_nfe=0"),
        (["--workers", "0"], "--workers 0"),
        (["--buckets", "8", "4", "--model", "nowhere"], "--buckets 8 4: buckets=[8, 4]: they must be ascending"),
        (["--grace", "-1"], "--grace"),
        (["--keep", "0"], "--keep 0: it must be seconds, at least 1"),
        (["--max-priority", "-1"], "max_priority=-1"),
        (["--max-pixels", "0"], "max_pixels=0"),
        (["--rewards", "clip:model=/nowhere"], "there is no such folder"),
        (["--rewards", "count", "http:url=http://127.0.0.1:9/score,key=NO_SUCH_KEY"], "NO_SUCH_KEY: set it first"),
        (["--port", "70000"], "choose another"),
        (["--host", "::1", "--model", "nowhere"], "there is no model"),
    ],
)
def test_a_command_that_cannot_serve_says_why(words, said, capsys):
    assert cli.main(["serve", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_workers_get_their_options_after_the_collector_was_spared(monkeypatch):
    order, known = [], inspect.signature(cli_workers.channels)

    def channels(*given, **options):
        order.append(known.bind(*given, **options).arguments)
        raise RequestError("no workers today")

    monkeypatch.setattr(cli_workers, "channels", channels)
    monkeypatch.setattr(worker, "spare_the_collector", lambda: order.append("spared"))
    words = ["--workers", "2", "--cores", "3", "--lanes", "4", "--buckets", "4", "8", "--port", "0"]
    assert cli.main(["serve", *words]) == 2
    spared, given = order
    given.pop("runtime")
    assert spared == "spared" and given == {"workers": 2, "ray": False, "cores": 3, "lanes": 4, "buckets": (4, 8)}


def test_the_collector_leaves_alone_what_was_imported():
    code = "import gc; from rollflow.serve import worker; worker.spare_the_collector(); print(gc.get_freeze_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert int(done.stdout) > 100_000 and "leaked" not in done.stderr


def test_what_is_not_installed_is_told_with_its_extra(monkeypatch, capsys):
    monkeypatch.setattr(serving, "find_spec", lambda name: None if name == "uvicorn" else name)
    assert cli.main(["serve"]) == 2
    assert capsys.readouterr().err == "rollflow: error: a server takes uvicorn: pip install 'rollflow[serve]'\n"


def test_what_a_command_lets_in():
    settings = serving.Serve(max_queued=3)._settings()
    assert settings.max_n == 3 and settings.max_pixels == 4 * 64 * 64 and settings.own == (64, 64, 1)
    assert serving.most_pixels("shapes-video") == (4 * 32 * 32 * 9, (32, 32, 9))
    assert serving.most_pixels("owner/name") == (2048 * 2048, None)


def test_connections_are_as_many_as_files_may_be_open(monkeypatch):
    resource, limits, raised = pytest.importorskip("resource"), [1024, 4096], []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (*limits,))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, both: raised.append(both))
    assert [connections.most_connections(waiting) for waiting in (1, 50, 100, 1000)] == [64, 500, 1000, 4096 - 128]
    assert raised == [(1128, 4096), (4096, 4096)]
    limits[:] = [resource.RLIM_INFINITY] * 2
    assert connections.most_connections(1000) == 10_000


@pytest.mark.parametrize("daemon", [True, False])
def test_threads_that_hang_keep_no_process(monkeypatch, daemon):
    ends, release = [], threading.Event()
    hanging = threading.Thread(target=release.wait, daemon=daemon)
    monkeypatch.setattr(os, "_exit", ends.append)
    monkeypatch.setattr(threading, "enumerate", lambda: [threading.current_thread(), hanging])
    hanging.start()
    try:
        assert serving.left(3, patience=0) == 3 and ends == [3]
    finally:
        release.set()
        hanging.join()
    assert serving.left(0) == 0 and ends == [3]


class Slow(Desk):
    """It is told to end before it has started."""

    async def start(self):
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()

    async def close(self, grace=0.0):
        self.waited = grace


def test_a_signal_before_the_start_waits_for_nothing():
    desk, said = Slow([]), []
    with serving.listening("127.0.0.1", 0) as at:
        assert asyncio.run(serving.serve(desk, ServeSettings(), at, 60.0, "serving", said.append)) == 0
    assert desk.waited == 0 and said == []
