"""`rollflow fetch` against a local hub, where what it fetched is found again, and `rollflow rewards`."""

import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from tiny_image import IMAGE

from rollflow import ModelError, rewards
from rollflow.cli import commands as cli
from rollflow.cli import fetching, judging, reports
from rollflow.models import known as models
from rollflow.models import loading
from rollflow.names import FOLDERS
from rollflow.rewards import known, weights
from rollflow.rewards.network import NetworkReward

pytestmark = pytest.mark.usefixtures("one_thread")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = bytes(range(256)) * 40
CLIP = {"config.json": b"{}", "model.safetensors": bytes(5000), "pytorch_model.bin": b"pickle", "LICENSE": b"MIT"}


class Hub(ThreadingHTTPServer):
    """Models by id, each a dictionary of files, as the hub's API and downloads serve them.

    Attributes:
        got: the paths of downloads, with the revision and the byte that each began at.
        commit: the latest.
        short: files of which only half is sent, and how often.
        closed: models that ask for consent.
    """

    daemon_threads = True

    def __init__(self, models):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models, self.commit, self.got, self.short, self.closed = models, COMMIT, [], {}, set()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(\w+))?", path):
            self.listing(*found.groups())
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/\w+", path):
            files = self.server.models[found[1]].items()
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": _sha(content)} for name, content in files
            ]
            self.answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            self.download(*found.groups())
        else:
            self.answer(404, b"")

    def listing(self, model, revision):
        if model not in self.server.models:
            return self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        files = self.server.models[model]
        siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
        found = {"id": model, "sha": revision or self.server.commit, "siblings": siblings, "private": False, "tags": []}
        return self.answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def download(self, model, revision, name):
        content = self.server.models[model][name]
        headers = {"ETag": f'"{_sha(content)}"', "X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
        if model in self.server.closed:
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if self.command == "GET":
            self.server.got.append((f"{model}/{name}", revision, begin))
        part = {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"} if begin else {}
        sent = content[begin:]
        if self.command == "GET" and self.server.short.get(name, 0) > 0:
            self.server.short[name] -= 1
            sent = sent[: len(sent) // 2]
        return self.answer(206 if begin else 200, sent, {**headers, **part}, len(content) - begin)

    def answer(self, status, content, headers=None, length=None):
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": len(content) if length is None else length}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
        if length is not None and len(content) != length:
            self.close_connection = True

    def log_message(self, *_):
        pass


def _sha(content):
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub, and a client that knows no other."""
    server = Hub({"openai/clip": CLIP})
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    files = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.delenv(FOLDERS, raising=False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(capsys, tmp_path):
    """Runs `rollflow fetch`; returns its exit code, standard output and standard error."""

    def call(*names):
        code = cli.main(["fetch", *names, "--to", str(tmp_path / "models")])
        return (code, *capsys.readouterr())

    return call


def here(folder):
    """The files of a folder, without what the hub's client keeps beside them."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if _kept(folder, file)}


def _kept(folder, file):
    return file.is_file() and ".cache" not in file.relative_to(folder).parts


def one_line(outcome, *parts):
    code, _, complaint = outcome
    last = complaint.splitlines()[-1]
    assert code == 2 and last.startswith("rollflow: error: ") and len(last) < 530
    for part in parts:
        assert part in last


def test_a_model_is_fetched_without_pickles_and_found_again(hub, fetch, tmp_path, monkeypatch):
    code, printed, _ = fetch("openai/clip")
    folder = tmp_path / "models" / "openai" / "clip"
    assert code == 0
    assert here(folder) == {name: content for name, content in CLIP.items() if name != "pytorch_model.bin"}
    assert {revision for _, revision, _ in hub.got} == {COMMIT}
    assert f"openai/clip at {COMMIT[:12]}: 3 files, 0.005 MB, 0.005 MB missing" in printed
    assert str(folder) in printed and f"export {FOLDERS}={tmp_path / 'models'}" in printed
    assert not (tmp_path / "models" / fetching.PARTIAL).exists()

    assert weights.here("openai/clip") is None
    monkeypatch.setenv(FOLDERS, str(tmp_path / "models"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert weights.here("openai/clip") == weights.folder("a reward", "openai/clip") == folder


def test_what_is_there_is_not_fetched_again(hub, fetch, tmp_path):
    fetch("openai/clip")
    before = [*hub.got]
    code, printed, _ = fetch("openai/clip")
    assert code == 0 and hub.got == before and "none missing" in printed
    hub.commit = COMMIT[::-1]
    newer = {"vocab.json": b"[]", "model.safetensors": bytes([1] * 5000)}  # of the same size as it was
    hub.models["openai/clip"] = {**CLIP, **newer}
    assert fetch("openai/clip")[0] == 0
    assert {file for file, *_ in hub.got[len(before) :]} == {f"openai/clip/{name}" for name in newer}
    assert here(tmp_path / "models" / "openai" / "clip").items() >= newer.items()


def test_a_lost_connection_goes_on_within_the_file(hub, fetch, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(huggingface_hub.file_download, "time", SimpleNamespace(sleep=pauses.append, time=time.time))
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.models["openai/clip"] = {**CLIP, "model.safetensors": LARGE}
    hub.short["model.safetensors"] = 1
    assert fetch("openai/clip")[0] == 0
    begins = [begin for file, _, begin in hub.got if file == "openai/clip/model.safetensors"]
    assert begins[0] == 0 < begins[1] <= len(LARGE) // 2 and len(pauses) == 1
    assert here(tmp_path / "models" / "openai" / "clip")["model.safetensors"] == LARGE


def test_a_command_that_was_broken_off_goes_on_with_the_file_that_is_not_complete(hub, fetch, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.file_download, "time", SimpleNamespace(sleep=lambda _: None, time=time.time))
    hub.models["openai/clip"] = {**CLIP, "model.safetensors": LARGE}
    hub.short["model.safetensors"] = 1000
    one_line(fetch("openai/clip"), "could not be had: openai/clip", "goes on from")
    folder = tmp_path / "models" / "openai" / "clip"
    assert not folder.exists()  # nobody takes part of it for a model
    monkeypatch.setenv(FOLDERS, str(tmp_path / "models"))
    assert weights.here("openai/clip") is None

    hub.short, hub.got = {}, []
    fetch("openai/clip")
    assert [file for file, *_ in hub.got] == ["openai/clip/model.safetensors"]
    assert here(folder)["model.safetensors"] == LARGE and weights.here("openai/clip") == folder


def test_every_reward_is_fetched_with_what_it_loads(hub, fetch, tmp_path, monkeypatch):
    made = {name: rewards.make(name) for name in rewards.names()}
    wanted = {name: one.wanted() for name, one in made.items() if isinstance(one, NetworkReward)}
    assert wanted
    for one in (one for several in wanted.values() for one in several):
        files = {pattern.replace("*", "a"): pattern.encode() for pattern in one.patterns}
        hub.models[one.model] = {**hub.models.get(one.model, {"other.bin.index": b""}), **files}
    code, printed, _ = fetch(*made)
    assert code == 0 and "jpeg: it needs no weights" in printed
    monkeypatch.setenv(FOLDERS, str(tmp_path / "models"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name, several in wanted.items():
        for one in several:
            folder = weights.folder(name, *one)
            assert folder == tmp_path / "models" / one.model
            assert {pattern.replace("*", "a") for pattern in one.patterns} <= {*here(folder)}
            assert "other.bin.index" not in here(folder)
    pinned = {(one.model, one.revision) for several in wanted.values() for one in several if one.revision}
    taken = {(file.rpartition("/")[0].partition("/")[0], revision) for file, revision, _ in hub.got}
    assert {(model.partition("/")[0], revision) for model, revision in pinned} <= taken


def test_options_and_expressions_name_other_weights(hub, fetch, tmp_path):
    hub.models["me/other"] = CLIP
    assert fetch("0.5*clip:model=me/other - jpeg")[0] == 0
    assert {file.split("/")[1] for file, *_ in hub.got} == {"other"}
    code, printed, _ = fetch(f"clip:model={tmp_path}")
    assert code == 0 and "is none of the hub's" in printed


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The files of a pipeline, with what publishers lay beside them."""
    folder = tmp_path_factory.mktemp("pipeline")
    IMAGE["FluxPipeline"].build().save_pretrained(folder)
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    beside = (
        "flux1-tiny.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "transformer/model.bin",
        "a.png",
    )
    return files, dict.fromkeys(beside, b"beside")


def test_a_pipeline_by_its_short_name_and_as_a_model(hub, fetch, tmp_path, monkeypatch, pipeline):
    files, beside = pipeline
    hub.models["somebody/FLUX.1-tiny"] = {**files, **beside}
    monkeypatch.setitem(models.KNOWN, "somebody/FLUX.1-tiny", models.KNOWN["black-forest-labs/FLUX.1-schnell"])
    assert fetch("flux.1-TINY")[0] == 0
    folder = tmp_path / "models" / "somebody" / "FLUX.1-tiny"
    assert here(folder) == files

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv(FOLDERS, str(tmp_path / "models"))
    assert loading.place("somebody/FLUX.1-tiny") == folder
    assert loading.class_of("somebody/FLUX.1-tiny") == "FluxPipeline"
    loaded = loading.load("somebody/FLUX.1-tiny", torch.device("cpu"), torch.float32)
    assert type(loaded).__name__ == "FluxPipeline"
    with pytest.raises(ModelError, match="somebody/else"):
        loading.load("somebody/else", torch.device("cpu"), torch.float32)


def test_a_built_in_model_is_there(hub, fetch):
    code, printed, _ = fetch("shapes")
    assert code == 0 and "shapes: it is part of rollflow" in printed and not hub.got


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("pikscore", ["'pikscore'", "did you mean", "pickscore"]),
        ("FLUX.1-schnel", ["did you mean FLUX.1-schnell"]),
        ("qqqq", ["no reward 'qqqq'", "OWNER/NAME", "rollflow models"]),
        ("clip:modle=a", ["fetch 'clip:modle=a'"]),
    ],
)
def test_a_name_that_stands_for_nothing_stops_all(hub, fetch, name, parts, tmp_path):
    one_line(fetch("openai/clip", name), *parts)
    assert not hub.got and not (tmp_path / "models").exists()


def test_nothing_named(capsys, tmp_path):
    assert cli.main(["fetch", "--to", str(tmp_path)]) == 2
    assert "rollflow fetch pickscore FLUX.1-schnell --to DIR" in capsys.readouterr().err


def test_offline_says_in_one_line_what_could_not_be_had(hub, fetch, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    ids = [one.model for one in rewards.make("aesthetic").wanted()]
    one_line(fetch("aesthetic", "openai/clip"), "could not be had", *ids, "openai/clip (HF_HUB_OFFLINE is set)")
    assert not hub.got


def test_no_connection(hub, fetch, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    one_line(fetch("openai/clip"), "openai/clip (no connection to the hub")


def test_the_rest_is_had_and_the_reasons_are_told(hub, fetch, tmp_path):
    hub.models |= {"a/closed": CLIP, "a/pickle": {"model.bin": b"", "LICENSE": b"MIT"}}
    hub.closed = {"a/closed"}
    outcome = fetch("a/closed", "a/none", "a/pickle", "openai/clip")
    one_line(
        outcome,
        "a/closed (accept its terms at https://huggingface.co/a/closed",
        "a/none (the hub has no such model",
        "a/pickle (it has none of *.jinja, *.json",
    )
    assert [file.name for file in (tmp_path / "models").glob("[!.]*/*")] == ["clip"]


def test_a_full_disk_is_told_before_the_download(hub, fetch, monkeypatch):
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    one_line(fetch("openai/clip"), "0.005 MB, and 0.0001 MB are free in")
    assert not hub.got


# rollflow rewards.


def test_rewards_are_listed_with_their_weights(capsys, monkeypatch):
    monkeypatch.setattr(reports, "WIDTH", 300)
    entry = known.Known("openai/clip-vit-large-patch14", None, "the licence of a test", 12.3, "a test")
    monkeypatch.setattr(known, "WEIGHTS", (entry,))
    assert cli.main(["rewards"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in rewards.names():
        assert any(line.split()[:1] == [name] for line in lines)
        for one in getattr(rewards.make(name), "wanted", tuple)():
            assert any(line.split()[:2] == [name, one.model] for line in lines)
    (line,) = [line for line in lines if line.split()[:2] == ["clip", entry.model]]
    assert "the licence of a test" in line and line.split()[-2:] == ["12.3", "no"]
    assert any("pip install 'rollflow[rewards]'" in line for line in lines)
    (line,) = [line for line in lines if line.split()[:1] == ["movement"]]
    assert "low-passed luma" in line and line.split()[-2:] == ["yes", "yes"]


def test_what_a_reward_lacks_is_listed(monkeypatch, tmp_path):
    reward = rewards.make("ocr")
    monkeypatch.setattr(judging, "find_spec", lambda name: None if name == "rapidocr" else name)
    assert judging.here(reward) == "no rapidocr"
    assert judging.here(rewards.make("clip")) == "no weights"
    assert judging.here(rewards.make(f"clip:model={tmp_path}")) == judging.here(rewards.make("jpeg")) == "yes"
