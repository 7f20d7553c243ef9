"""What an evaluation costs: operations and bytes against a count by hand, and under the roofline of this machine."""

import json

import pytest
import torch
from tiny import SIZE, Tiny
from torch import nn

from rollflow import Engine, RequestError
from rollflow.cli import measuring, memory, roofline, traffic
from rollflow.cli.options import ModelOptions, SearchOptions
from rollflow.cli.roofline import Rates, parts, placed, point, steps
from rollflow.models import Capabilities, loading

CPU = torch.device("cpu")
WIDTH, HEADS, TEXT = 12, 3, 5


class Hand(Tiny):
    """Two linear layers and an attention between them, and a decoder of one convolution."""

    capabilities = Capabilities(preview=True, signature="test_roofline")

    def __init__(self):
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(12, 3 * WIDTH), nn.Linear(WIDTH, 12)
        self.pixels = nn.Conv2d(3, 3, 3, padding=1)

    def velocity(self, x, tau, conditioning, guidance, geometry):
        rows, token, _ = x.shape
        q, k, v = self.first(x).view(rows, token, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.last(mixed.transpose(1, 2).reshape(rows, token, WIDTH))

    def decode(self, latents):
        return self.pixels(latents)

    def preview(self, latents):
        return latents.sigmoid()


def counted(rows):
    found = {}
    for one in parts(Hand(), SIZE, None, 1.0, [rows]):
        found[one["part"]] = one
    return found


@pytest.mark.parametrize("rows", [1, 6])
def test_operations_are_what_a_hand_counts(rows):
    found, token = counted(rows), SIZE.token
    linear = 2 * rows * token * 12 * 3 * WIDTH + 2 * rows * token * WIDTH * 12
    attention = 2 * (2 * rows * token * token * WIDTH)  # of queries with keys, and of weights with values
    assert found["forward"]["flops"] == linear + attention
    assert found["decode"]["flops"] == 2 * rows * 8 * 8 * 3 * 3 * 9
    assert found["preview"]["flops"] == 0


@pytest.mark.parametrize("rows", [1, 6])
def test_bytes_are_what_a_hand_counts(rows):
    found, state = counted(rows), 4 * rows * SIZE.token * 12
    image = 4 * rows * 3 * 8 * 8
    assert found["preview"]["least_bytes"] == found["preview"]["most_bytes"] == 2 * image
    weights = 4 * (3 * 3 * 9 + 3)
    assert found["decode"]["least_bytes"] == found["decode"]["most_bytes"] == weights + 2 * image
    weights = 4 * (12 * 3 * WIDTH + 3 * WIDTH + WIDTH * 12 + 12)
    assert found["forward"]["least_bytes"] == weights + 2 * state
    # the first layer's result is written and read, the attention's written, with a number a head and token, and read
    between = 3 * state + 3 * state + state + 4 * rows * HEADS * SIZE.token + state
    assert found["forward"]["most_bytes"] == weights + 2 * state + between


def bytes_of(work):
    with torch.no_grad():
        return traffic.bytes_of(work)


def test_views_are_free_and_parts_count_as_such():
    x = torch.randn(10, 10)
    assert bytes_of(lambda: x.t().reshape(100, 1)[:3]) == (400 + 12, 800)  # reshape copies the transpose
    assert bytes_of(lambda: x[:2] + x[2:4]) == (2 * 80 + 80,) * 2
    assert bytes_of(lambda: x + x.t()) == (400 + 400,) * 2  # it is read twice, and counts once
    assert bytes_of(lambda: x[:1].expand(10, 10) * 2) == (40 + 400,) * 2
    assert bytes_of(lambda: torch.empty(100)) == (400, 0)
    assert bytes_of(lambda: nn.functional.embedding(torch.tensor([1, 1]), x))[1] == 80 + 80 + 16
    assert bytes_of(lambda: x[torch.tensor([1, 2, 3])])[1] == 120 + 120 + 24


def test_what_is_written_in_place_is_read_unless_it_is_a_copy():
    x, y = torch.zeros(10), torch.zeros(10)
    assert bytes_of(lambda: x.add_(y)) == (80 + 40, 80 + 40)
    assert bytes_of(lambda: x.copy_(y)) == (40 + 40, 40 + 40)
    assert bytes_of(lambda: torch.add(x, 1, out=y)) == (40 + 40, 40 + 40)
    assert bytes_of(lambda: (x + 1).add_(y)) == (80 + 40, 80 + 40 + 40 + 40)  # made, then read and written


def test_a_point_lies_under_the_roofline():
    one = {"part": "forward", "rows": 1, "flops": 400, "least_bytes": 100, "most_bytes": 1000, "seconds": 8.0}
    found = placed(one, Rates(flops=100.0, bytes=50.0))
    assert (found["bound_seconds"], found["bound_by"], found["unfused_seconds"]) == (4.0, "operations", 20.0)
    assert (found["flops_per_byte"], found["flops_per_second"], found["share"]) == (4.0, 50.0, 0.5)
    found = placed(one, Rates(flops=1000.0, bytes=50.0))
    assert (found["bound_seconds"], found["bound_by"], found["share"]) == (2.0, "bytes", 0.25)
    assert placed({**one, "least_bytes": 0}, Rates(1.0, 1.0))["flops_per_byte"] is None


def test_a_step_has_the_counts_of_its_parts():
    model = Hand()
    points = parts(model, SIZE, None, 1.0, [1, 2])
    assert [(one["part"], one["rows"]) for one in points] == [
        (part, rows) for part in ("forward", "decode", "preview") for rows in (1, 2)
    ]
    two = steps(points, {1: 0.5, 2: 0.75}, "decode")[1]
    assert two["rows"] == 2 and two["seconds"] == 0.75
    assert two["flops"] == points[1]["flops"] + points[3]["flops"]
    assert two["most_bytes"] == points[1]["most_bytes"] + points[3]["most_bytes"]


def test_work_is_timed_at_its_fastest(monkeypatch):
    times = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(measuring, "seconds", lambda work, device: next(times))
    monkeypatch.setattr(roofline, "LONG", 5.0)
    assert point("encode", 1, lambda: torch.ones(2), CPU)["seconds"] == 1.0


def test_the_built_in_model_comes_near_what_the_machine_can_do(monkeypatch):
    """Its recorded form, which a CPU runs, has the same operations; others on the machine only slow it down."""
    monkeypatch.setattr(measuring, "SECONDS", 0.05)
    monkeypatch.setattr(measuring, "COPIED", {"cpu": 2**24})
    monkeypatch.setattr(roofline, "LONG", 0.05)
    model = loading.model(loading.load("shapes", CPU, torch.float32, None))
    geometry = model.geometry()
    conditioning, rows, scale = memory.conditioning_of(model, "shapes", geometry, memory.PROMPT, None)
    plain, plain_decode = parts(model, geometry, conditioning, scale, [4])
    model.record(geometry, conditioning)
    assert rows == 1
    best = Rates(0.0, 0.0)
    for _ in range(5):
        found = parts(model, geometry, conditioning, scale, [1, 4])
        best = Rates(*map(max, zip(best, Rates.measured(model), strict=True)))
        shares = [placed(one, best)["share"] for one in found]
        assert min(shares) > 0.001
        if max(shares) <= 1.2:
            break
    assert max(shares) <= 1.2
    (one, four), decodes = found[:2], found[2:]
    assert four["flops"] == plain["flops"] == 4 * one["flops"] and decodes[1]["flops"] == plain_decode["flops"]
    parameters = sum(parameter.nbytes for parameter in model.transformer.parameters())
    assert parameters < one["least_bytes"] < 1.1 * parameters and four["least_bytes"] < 1.1 * parameters
    assert four["most_bytes"] > 4 * (one["most_bytes"] - one["least_bytes"])


def test_the_command_prints_and_writes_what_it_found(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measuring, "SECONDS", 0.0)
    monkeypatch.setattr(measuring, "COPIED", {"cpu": 2**20})
    monkeypatch.setattr(roofline, "LONG", 0.0)
    monkeypatch.setattr(ModelOptions, "load", lambda self: Engine(Hand(), name="hand", lanes=1, threads=1))
    found = roofline.roofline(ModelOptions(), SearchOptions(), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "roofline.json").read_text()) == found
    assert (found["model"], found["size"], found["threads"], found["network_rows"]) == ("hand", "8x8", 1, 1)
    listed = {part: [one["rows"] for one in found["points"] if one["part"] == part] for part in roofline.PARTS}
    assert listed["forward"] == listed["decode"] == listed["preview"] == listed["step"] and listed["encode"] == [1]
    assert {1, 2, 4, 8} <= {*listed["step"]}
    told = capsys.readouterr().out
    assert "hand at 8x8 on" in told and "one lane alone, on 1 core" in told and max(map(len, told.splitlines())) <= 120
    with pytest.raises(RequestError, match="frames=3: this model makes images"):
        roofline.roofline(ModelOptions(), SearchOptions(frames=3))
    with pytest.raises(RequestError, match=r"--compile regional: .*leave it out"):
        roofline.roofline(ModelOptions(compile="regional"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_roofline_of_a_gpu(tmp_path):
    found = roofline.roofline(ModelOptions(device="cuda"), SearchOptions(), tmp_path)
    assert found["flops_per_second"] > 1e12 and found["bytes_per_second"] > 1e11
    assert all(0 < one["share"] <= 1.2 for one in found["points"] if one["part"] != "encode")
