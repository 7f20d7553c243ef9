"""NVTX ranges: the names that Nsight shows, a colour each, the size of a tick, properly nested, none in a capture."""

import threading
from collections import Counter, defaultdict

import nvtx
import pytest
import torch
from tiny import PATIENCE, Tiny, engine, rbf

from rollflow.device.cuda_graphs import Captured
from rollflow.models import Capabilities
from rollflow.profile.ranges import COLORS
from rollflow.profile.records import WORK

DOCUMENTED = {"encode_prompt", "tick", "propose", "transformer_forward", "finish", "vae_decode", "reward", "decide"}


class Ranges:
    """Stands in for `nvtx.annotate`, and knows which ranges each thread is in."""

    def __init__(self):
        self.over, self.open, self.lock = [], defaultdict(list), threading.Lock()

    def __call__(self, message=None, color=None, domain=None, category=None, payload=None):
        assert domain == "rollflow" and category is None
        return Range(self, message, color, payload)

    @property
    def here(self):
        return self.open[threading.get_ident()]


class Range:
    def __init__(self, ranges, name, color, payload):
        self.ranges, self.name, self.color, self.payload = ranges, name, color, payload

    def __enter__(self):
        self.within = [one.name for one in self.ranges.here]
        self.ranges.here.append(self)

    def __exit__(self, *error):
        assert self.ranges.here.pop() is self, "ranges of a thread nest"
        with self.ranges.lock:
            self.ranges.over.append(self)


@pytest.fixture
def ranges(monkeypatch):
    made = Ranges()
    monkeypatch.setattr(nvtx, "annotate", made)
    return made


def smooth(images, prompts):
    return images.square().mean((1, 2, 3))


smooth.differentiable = True


def test_what_an_engine_does_is_marked(ranges):
    with engine(lanes=2) as made:
        made.generate([rbf(20, seed=1), rbf(20, method="dps", reward=smooth, seed=2)])
        made.close()
        batches = made.ledger.table("batches")
    found = Counter(one.name for one in ranges.over)
    assert found.keys() == DOCUMENTED | {"backward"}
    kinds = Counter(WORK[code] for code in batches["work"])
    assert found["encode_prompt"] == kinds["encode"] and found["backward"] == kinds["guided"]
    assert found["tick"] == kinds["rows"] + kinds["guided"] + kinds["images"]
    assert found["vae_decode"] == (batches["judged"] > 0).sum() > kinds["images"]
    assert found["propose"] == found["transformer_forward"] == kinds["rows"] + kinds["guided"]
    assert found["finish"] == kinds["rows"] and found["decide"] >= kinds["rows"]
    assert not any(ranges.open.values()), "every range has an end"
    colors = {one.name: one.color for one in ranges.over}
    assert colors == {name: COLORS[name] for name in found} and len({*colors.values()}) == len(colors)
    sizes = sorted((int(b["bucket"]), int(b["rows"])) for b in batches)
    named = [one for one in ranges.over if one.name in ("tick", "encode_prompt")]
    assert sorted(one.payload for one in named) == sizes
    assert all(one.payload is None for one in ranges.over if one not in named)
    for one in ranges.over:
        if one.name in ("propose", "transformer_forward", "finish", "vae_decode", "backward"):
            assert one.within[0] == "tick", one.name
        elif one.name in ("tick", "encode_prompt", "decide"):
            assert one.within == [], one.name
    rewards = [one.within for one in ranges.over if one.name == "reward"]
    assert [] in rewards and ["tick"] in rewards, "on a thread that judges, and of a guided batch on the lane"


def test_colours_are_known_to_nvtx():
    from nvtx.colors import color_to_hex

    assert len({color_to_hex(color) for color in COLORS.values()}) == len(COLORS) >= len(DOCUMENTED)


def test_the_range_is_there_where_what_it_marks_raises(ranges):
    def failing(images, prompts):
        raise ValueError("no")

    with engine() as made:
        job = made.submit(rbf(20, reward=failing))
        assert job.exception(PATIENCE) is not None
        made.close()
    assert "reward" in {one.name for one in ranges.over} and not any(ranges.open.values())


class Graphable(Tiny):
    """A model whose step can be captured, as a GPU's can."""

    capabilities = Capabilities(graphable=True)

    def collate(self, conditioning):
        return (torch.zeros(len(conditioning)),)

    def forward(self, x, tau, collated, guidance, geometry):
        self.seen.append([one.name for one in self.ranges.here])
        return x * tau[:, None, None]


def test_a_capture_has_no_ranges_and_a_replay_is_within_one(ranges):
    def capture(function, pool):
        before = len(ranges.over)
        output = function()
        assert len(ranges.over) == before and not ranges.here, "a range would be captured once, and not be replayed"
        return Captured(lambda: output.copy_(function()), output, None, 0)

    with engine(Graphable()) as made:
        made.model.seen, made.model.ranges = [], ranges
        runner, geometry = made._host.runner, made.model.geometry()
        runner.allocate(geometry, made._slots_of(geometry))
        made.lanes.run(runner.record, geometry, [8], None, capture).result(PATIENCE)
        recorded = len(made.model.seen)
        assert recorded and not any(made.model.seen)
        made.generate(rbf(20))
        replays = made.model.seen[recorded:]
        assert replays and all(names == ["tick", "transformer_forward"] for names in replays)
        made.close()
    assert not {"propose", "finish"} & {one.name for one in ranges.over if one.within == ["tick"]}
