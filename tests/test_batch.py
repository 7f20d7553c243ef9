"""`rollflow batch`: every line once, in bounded memory, whatever ends the process."""

import asyncio
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
from tiny import PATIENCE

from rollflow.cli import batch as command
from rollflow.cli import main
from rollflow.errors import EngineBusy, EngineClosed, EngineDead, FunctionError, RequestError, RewardUnavailable, told
from rollflow.serve import batch as running
from rollflow.serve import lines as reading
from rollflow.serve.batch import State, run
from rollflow.serve.formats import COLUMNS, WRITERS
from rollflow.serve.shards import Counts, Shards

parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")


# of searches that fail: how their prompts begin
ENDS = {"fails": "FunctionError", "deadly": "EngineDead", "left": "EngineClosed", "waits": "RewardUnavailable"}


class Search:
    """A search that is over when the test says so; its image and its reward are made of the request."""

    def __init__(self, request):
        self.request, self.ended = request, asyncio.Event()
        self.status, self.error, self.result = "running", None, None

    def end(self):
        prompt = self.request["prompt"]
        if error := next((ENDS[word] for word in ENDS if prompt.startswith(word)), None):
            self.status, self.error = "failed", {"type": error, "message": "the reward raised"}
        else:
            self.status = "done"
            self.result = {
                "reward": len(prompt) / 7, "terms": {"a": 1.5}, "held_out": None, "nfe": 3, "seed": 0, "method": "bon",
                "stopped": "budget", "seconds": 0.1, "width": 8, "height": 8, "frames": None, "format": "png",
            }  # fmt: skip
        self.ended.set()

    async def over(self):
        await self.ended.wait()

    async def image(self):
        return f"image of {self.request['prompt']}".encode()


class Desk:
    """Ends searches the last first, when `most` of them are there or a moment is over."""

    def __init__(self, most=3, busy=0, moment=0.005):
        self.most, self.busy, self.moment, self.there, self.asked, self.peak = most, busy, moment, [], [], 0

    async def submit(self, request):
        if self.busy:
            self.busy -= 1
            raise EngineBusy("too many", 0.0)
        if request["prompt"] == "dies":
            raise EngineDead("no worker is left")
        if "nfee" in request or not isinstance(request["prompt"], str):
            raise RequestError("nfee: there is no such field")
        search = Search(request)
        self.there.append(search)
        self.asked.append(request)
        self.peak = max(self.peak, len(self.there))
        asyncio.get_running_loop().call_later(0.0 if len(self.there) >= self.most else self.moment, self.end)
        return search

    def end(self):
        while self.there:
            self.there.pop().end()


LINES = "\n".join(
    [
        "two red circles", "", json.dumps({"prompt": "one blue square", "id": "mine", "nfe": 5}), "fails here",
        '{"prompt": "a", "nfee": 1}', "{broken", "   ", "sieben grüne Kreise", '{"prompt": 3}', "last",
        *(f"number {i}" for i in range(13)),
    ]
)  # fmt: skip


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(LINES, encoding="utf-8")
    return file


def batch(file, out, kind="parquet", shard=4, desk=None, options=None, again=False, **given):
    """Runs a batch, and lets the folder go however it ends."""
    shards = Shards(out, reading.source(file, shard), options or {}, kind, again)
    try:
        work = run(desk or Desk(), shards, {"nfe": 2}, **{"window": 3, "pauses": (), **given})
        return asyncio.run(asyncio.wait_for(work, PATIENCE))
    finally:
        shards.close()


def rows(out):
    """All rows of Parquet shards, in the order in which they lie there; without their times."""
    files = sorted((out / "shards").glob("*.parquet"))
    found = [row for file in files for row in parquet.read_table(file).to_pylist()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


def everything(out):
    """The files of a batch that is over, and their bytes; of Parquet files the rows."""
    found = {
        str(file.relative_to(out)): file.read_bytes()
        for file in out.rglob("*")
        if file.is_file() and file.suffix != ".parquet"
    }
    return found, rows(out)


# What is written
# ---------------


def test_a_row_a_line_in_order(source, tmp_path):
    desk, out = Desk(), tmp_path / "out"
    assert batch(source, out, desk=desk) == Counts(21, 4, 3 * 17)
    found = rows(out)
    numbers = [i for i, line in enumerate(LINES.split("\n"), 1) if line.strip()]
    assert [row["line"] for row in found] == numbers and [*found[0]] == [one for one in COLUMNS if one != "seconds"]
    first, mine, fails, field, broken, german, none = found[:7]
    assert (first["id"], first["prompt"], first["reward"], first["nfe"]) == ("1", "two red circles", 15 / 7, 3)
    assert first["image"] == "images/000000/000000001.png" and json.loads(first["terms"]) == {"a": 1.5}
    assert (out / first["image"]).read_bytes() == b"image of two red circles"
    assert (mine["id"], mine["error"]) == ("mine", None) and german["prompt"] == "sieben grüne Kreise"
    assert (fails["error_type"], fails["error"], fails["image"]) == ("FunctionError", "the reward raised", None)
    assert "no such field" in field["error"] and "cannot be read" in broken["error"]
    assert none["error"] is not None and none["prompt"] is None
    assert desk.asked[:2] == [
        {"nfe": 2, "prompt": "two red circles"}, {"nfe": 5, "prompt": "one blue square"}
    ]  # fmt: skip
    assert {file.name for file in (out / "state").iterdir()} == {"lock", *(f"{i:06d}.json" for i in range(6))}


def test_images_inside_of_parquet(source, tmp_path):
    batch(source, tmp_path / "out", "embedded")
    found = rows(tmp_path / "out")
    assert found[0]["image"] == b"image of two red circles" and found[2]["image"] is None
    assert not (tmp_path / "out" / "images").exists() and not [*(tmp_path / "out" / "state").glob("*/")]


def test_tar_files_of_web_dataset(source, tmp_path):
    out = tmp_path / "out"
    batch(source, out, "webdataset")
    with tarfile.open(out / "shards" / "000000.tar") as tar:
        assert tar.getnames() == [f"00000000{i}.{end}" for i in (1, 3) for end in ("png", "json", "txt")]
        assert tar.extractfile("000000003.png").read() == b"image of one blue square"
        assert json.load(tar.extractfile("000000003.json"))["id"] == "mine"
        assert tar.extractfile("000000003.txt").read() == b"one blue square"
    failed = [json.loads(line) for file in sorted((out / "errors").iterdir()) for line in file.open()]
    assert [row["line"] for row in failed] == [4, 5, 6, 9]


def test_a_line_that_is_too_long_is_one_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LONGEST", 20)
    file = tmp_path / "lines"
    file.write_bytes(b"\xef\xbb\xbffirst\r\n" + b"x" * 75 + b"\n\xff\xfe\nlast")
    batch(file, tmp_path / "out")
    first, long, bytes_, last = rows(tmp_path / "out")
    assert (first["prompt"], last["prompt"], last["line"]) == ("first", "last", 4)
    assert "more than 20 bytes" in long["error"] and "cannot be read" in bytes_["error"]


def test_options_of_a_method_are_for_lines_of_that_method():
    def asked(**line):
        text = json.dumps({"prompt": "a", **line}).encode()
        return reading.asked(reading.Line(7, text), {"method": "rbf", "options": {"initial": 4, "b": 1}}).request

    assert asked()["options"] == asked(method="rbf")["options"] == {"initial": 4, "b": 1}
    assert asked(options={"initial": 9})["options"] == {"initial": 9, "b": 1}
    assert "options" not in asked(method="bon")


# A window of searches
# --------------------


def test_no_more_searches_are_there_than_asked_for(tmp_path):
    file = tmp_path / "lines"
    file.write_text("\n".join(f"line {i}" for i in range(60)))
    states, ticks = [], iter(range(10**6))
    desk = Desk(most=5, busy=3, moment=PATIENCE)
    batch(file, tmp_path / "out", desk=desk, window=5, told=states.append, clock=lambda: float(next(ticks)))
    assert desk.peak == 5 and len(desk.asked) == len(states) == 60
    done = [state.counts.lines for state in states]
    assert done == sorted(done) and done[-1] == 60 and states[-1].left == 0
    assert states[-1].nfe_per_second == pytest.approx(3 * 60 / 60)  # three a line; the clock ticks once a line
    halfway = State(Counts(30, 2, 90), 60, 3.14159, 3725.4)
    assert command.told_text(halfway) == "2 failed, 3.14 NFE/s, 1:02:05 left"


def test_strict_ends_at_the_first_line_that_fails(source, tmp_path):
    with pytest.raises(RequestError, match="line 4: the reward raised: mend it"):
        batch(source, tmp_path / "out", strict=True, window=1)
    desk = Desk()
    assert batch(source, tmp_path / "out", desk=desk) == Counts(21, 4, 3 * 17)
    assert {"nfe": 2, "prompt": "fails here"} in desk.asked  # it did not count as done
    assert {"nfe": 2, "prompt": "two red circles"} not in desk.asked


@pytest.mark.parametrize(("prompt", "error"), [("dies", EngineDead), ("left", EngineClosed)])
def test_a_desk_that_ends_is_no_fault_of_a_line(tmp_path, prompt, error):
    file = tmp_path / "lines"
    file.write_text(f"a\nb\n{prompt}\nc")
    with pytest.raises(error):
        batch(file, tmp_path / "out", window=1)
    shards = Shards(tmp_path / "out", reading.source(file, 4), {}, "parquet")
    assert [shards.has(number) for number in range(1, 5)] == [True, True, False, False]
    shards.close()


def test_a_line_that_workers_die_of_fails_alone(tmp_path):
    file = tmp_path / "lines"
    file.write_text("a\ndeadly\nb")
    assert batch(file, tmp_path / "out") == Counts(3, 1, 6)
    assert [row["error_type"] for row in rows(tmp_path / "out")] == [None, "EngineDead", None]


# Lines that are done again
# -------------------------


def test_what_a_search_is_told_of_a_reward_that_may_come_back():
    error = FunctionError("the reward http raised RewardUnavailable for 3 images: busy")
    error.__cause__ = RewardUnavailable("busy")  # as the engine raises it
    assert told(error) == {"type": "RewardUnavailable", "message": str(error)}


def test_a_line_waits_for_its_reward(tmp_path, monkeypatch):
    class Mended(Desk):
        async def submit(self, request):
            if len(self.asked) == 3:
                monkeypatch.delitem(ENDS, "waits")
            return await super().submit(request)

    file, desk = tmp_path / "lines", Mended()
    file.write_text("waits\nb")
    assert batch(file, tmp_path / "out", desk=desk, window=1, pauses=[0.0] * 4) == Counts(2, 0, 6)
    assert [request["prompt"] for request in desk.asked] == ["waits"] * 4 + ["b"]


def test_an_outage_ends_the_batch_and_what_it_failed_is_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "UNAVAILABLE", 4)
    file, out, desk = tmp_path / "lines", tmp_path / "out", Desk()
    file.write_text("\n".join(["a", "b", "waits", "c", "d", *["waits"] * 9]))
    with pytest.raises(RewardUnavailable, match=r"4 lines in a row had no reward, the last, 9, since.*--retry-failed"):
        batch(file, out, window=1)
    monkeypatch.delitem(ENDS, "waits")
    assert batch(file, out, desk=desk, again=True) == Counts(14, 0, 42)
    assert [request["prompt"] for request in desk.asked] == ["waits"] * 10
    batch(file, tmp_path / "whole")
    assert everything(out) == everything(tmp_path / "whole")


@pytest.mark.parametrize("kind", [*WRITERS])
def test_lines_that_failed_are_done_again_wherever_it_ends(source, tmp_path, kind, crash, monkeypatch):
    batch(source, tmp_path / "first", kind)
    assert batch(source, tmp_path / "first", kind, again=True).failed == 4
    monkeypatch.delitem(ENDS, "fails")
    batch(source, tmp_path / "mended", kind)
    expected, end, changes = everything(tmp_path / "mended"), [*WRITERS].index(kind), math.inf
    while end < changes:
        out, desk = tmp_path / f"ends-{end}", Desk()
        shutil.copytree(tmp_path / "first", out)
        state = crash(end)
        with suppress(Crash):
            batch(source, out, kind, again=True)
            changes = state["count"]
        monkeypatch.undo()
        monkeypatch.delitem(ENDS, "fails")
        assert batch(source, out, kind, desk=desk, again=True) == Counts(21, 3, 3 * 18)
        assert {request["prompt"] for request in desk.asked} <= {"fails here"}
        assert everything(out) == expected, end
        end += 19
    assert changes > 20


@pytest.mark.parametrize("kind", [*WRITERS])
def test_counts_that_are_lost_and_shards_that_are_broken(source, tmp_path, kind):
    out = tmp_path / "out"
    batch(source, out, kind)
    (out / "state" / "000000.json").unlink()
    (out / "state" / "000001.json").write_bytes(b"{")
    assert batch(source, out, kind) == Counts(21, 4, 3 * 17)
    WRITERS[kind].file(out, 0).write_bytes(b"broken")
    with pytest.raises(RequestError, match=r"shards/000000.* cannot be read .*: delete it"):
        batch(source, out, kind)


def test_a_line_is_done_also_while_its_shard_is_finished(tmp_path):
    class Late(bytearray):
        def __getitem__(self, place):
            found = super().__getitem__(place)
            shards.finish(place)  # as its thread does it, between two reads of another
            return found

    (tmp_path / "lines").write_text("a")
    shards = Shards(tmp_path / "out", reading.source(tmp_path / "lines", 4), {}, "parquet")
    assert shards.put(dict.fromkeys(COLUMNS) | {"line": 1}, None, None) == 0
    shards._whole = Late(1)
    assert shards.has(1)
    shards.close()


# Whatever ends the process
# -------------------------


class Crash(BaseException):
    """The process ends: nothing more is written."""


@pytest.fixture
def crash(monkeypatch):
    """Lets only so many changes of files happen; returns how many there were."""

    def after(changes):
        state = {"count": 0}

        def counted(function):
            def call(*arguments, **options):
                if function is opened and "ab" not in arguments:
                    return function(*arguments, **options)
                state["count"] += 1
                if state["count"] > changes:
                    raise Crash
                return function(*arguments, **options)

            return call

        opened = Path.open
        for name in ("open", "replace", "unlink", "write_bytes"):
            monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
        monkeypatch.setattr(os, "fsync", counted(os.fsync))
        return state

    return after


@pytest.mark.parametrize("kind", [*WRITERS])
def test_wherever_it_ends_it_goes_on(source, tmp_path, kind, crash, monkeypatch):
    whole = tmp_path / "whole"
    with monkeypatch.context():
        state = crash(math.inf)
        batch(source, whole, kind)
        monkeypatch.undo()
    expected, changes = everything(whole), state["count"]
    assert changes > 60
    for end in range([*WRITERS].index(kind), changes, 17):
        out = tmp_path / f"ends-{end}"
        crash(end)
        with pytest.raises(Crash):
            batch(source, out, kind)
        monkeypatch.undo()
        desk = Desk()
        assert batch(source, out, kind, desk=desk) == Counts(21, 4, 3 * 17)
        assert everything(out) == expected, end
        assert not [*out.rglob("*.part")] or end < changes
        again = Desk()
        assert batch(source, out, kind, desk=again).lines == 21 and again.asked == []


def test_a_row_that_is_torn_and_an_image_that_is_lost_are_made_again(source, tmp_path):
    expected = (batch(source, tmp_path / "whole", shard=100), everything(tmp_path / "whole"))[1]
    half = tmp_path / "half"
    with pytest.raises(RequestError):
        batch(source, half, shard=100, strict=True, window=1)
    kept = half / "state" / "000000.jsonl"
    text = kept.read_bytes()
    assert text.count(b"\n") == 2
    for name, damage in {
        "torn": lambda out: (out / "state" / kept.name).write_bytes(text[:-9]),
        "torn at its end": lambda out: (out / "state" / kept.name).write_bytes(text[:-1]),
        "zeros": lambda out: (out / "state" / kept.name).write_bytes(text[:-9] + b"\0" * 9),
        "lost": lambda out: (out / "images" / "000000" / "000000003.png").unlink(),
        "changed": lambda out: (out / "images" / "000000" / "000000003.png").write_bytes(b"image of one blue squarE"),
    }.items():
        out = tmp_path / name
        shutil.copytree(half, out)
        damage(out)
        desk = Desk()
        batch(source, out, shard=100, desk=desk)
        assert everything(out) == expected, name
        assert len(desk.asked) == (16 if name == "torn at its end" else 17)


def test_another_batch_does_not_fit(source, tmp_path):
    out = tmp_path / "out"
    batch(source, out, options={"nfe": 4})
    with pytest.raises(RequestError, match="has a batch with nfe=4, and not 8"):
        batch(source, out, options={"nfe": 8})
    with pytest.raises(RequestError, match="has a batch with format='parquet', and not 'embedded'"):
        batch(source, out, "embedded", options={"nfe": 4})
    held = Shards(out, reading.source(source, 4), {"nfe": 4}, "parquet")
    with pytest.raises(RequestError, match="a process has it open"):
        batch(source, out, options={"nfe": 4})
    held.close()
    source.write_text(LINES.replace("last", "lost"))
    with pytest.raises(RequestError, match="other lines, or its file was changed"):
        batch(source, out, options={"nfe": 4})
    (out / "batch.json").unlink()
    with pytest.raises(RequestError, match="has shards of something else"):
        batch(source, out)


# The command
# -----------

KILLED = """
import os, signal, sys
from rollflow.serve.shards import Shards
put, calls = Shards.put, []
def killing(self, row, image, kind):
    calls.append(row)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return put(self, row, image, kind)
Shards.put = killing
from rollflow.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_kill_9_in_the_middle(tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    shapes = [f"{n} {colour} {shape}" for n in ("two", "three") for colour in ("red", "blue") for shape in
              ("circles", "squares", "triangles")]  # fmt: skip
    file.write_text("\n".join([*shapes, "a poem", *(json.dumps({"prompt": one, "seed": 7}) for one in shapes[:3])]))

    def arguments(name):
        options = "--method bon --steps 2 --nfe 4 --reproducible --device cpu --shard 5 --window 3"
        return ["batch", str(file), "--out", str(tmp_path / name), *options.split()]

    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments("killed")], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    out = tmp_path / "killed"
    # A shard may have been on its way when the process died.
    kept = sum(text.read_text().count("\n") for text in (out / "state").glob("*.jsonl"))
    whole = len(rows(out))
    assert 7 <= kept + whole <= 7 + 5 and not (out / "shards" / "000003.parquet").exists()
    assert main(arguments("killed")) == main(arguments("whole")) == 1  # "a poem" asks for nothing that can be counted
    assert "16 lines, 1 failed, 60 NFE" in capsys.readouterr().out
    assert everything(tmp_path / "killed") == everything(tmp_path / "whole")
    found = rows(out)
    assert [row["line"] for row in found] == [*range(1, 17)]
    assert [row["line"] for row in found if row["error"]] == [13] and found[13]["seed"] == 7
    assert found[0]["reward"] is not None and (out / found[0]["image"]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["/nowhere"], "'/nowhere' cannot be read"),
        (["EMPTY"], "has no lines"),
        (["FILE", "--format", "csv"], "'csv': choose one of parquet, embedded, webdataset"),
        (["FILE", "--shard", "0"], "--shard 0: it must be at least 1"),
        (["FILE", "--reward", "cuont"], "there is no reward 'cuont'"),
        (["FILE", "--method", "bonn"], "bonn"),
        (["FILE", "--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_what_the_command_refuses(tmp_path, capsys, arguments, part):
    files = {"FILE": "a prompt", "EMPTY": "\n \n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    given = [str(tmp_path / one) if one in files else one for one in arguments]
    assert main(["batch", *given, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1
