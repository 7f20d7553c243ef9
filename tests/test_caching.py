"""Step caching: what is taken from a parent's evaluation, what is evaluated in full, and what both are charged."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from test_graphs import FakeCapture
from tiny import SIZE, Tiny, bon, brightness, engine, fingerprint

from rollflow import methods, rewards
from rollflow.admission import promise
from rollflow.bench import caching as bench
from rollflow.bench import geometries
from rollflow.device.batch import tables
from rollflow.device.storage import Storage
from rollflow.draw import Draw, Guide
from rollflow.engine import Engine
from rollflow.errors import BudgetError, RequestError
from rollflow.models import Capabilities, caching, folder
from rollflow.models.flux import FluxModel
from rollflow.plan import plan
from rollflow.profile import export
from rollflow.request import Request, Result
from rollflow.row import Brief, Row, Start
from rollflow.settings import KEPT_BYTES, slots_of
from rollflow.whatif.replay import Replay

ABLE = ("beam", "rbf", "svdd")


class Keeping(Tiny):
    """A model whose later blocks add what a test says: by default something of their own at every state.

    `ran` holds the rows of every batch, and whether they came from a cache.
    """

    capabilities, kept = Capabilities(caches=True), 12

    def __init__(self, rest=torch.cos):
        self.rest, self.ran = rest, []

    def collate(self, conditioning):
        return (torch.zeros(len(conditioning)),)

    def first(self, x, tau):
        return x * tau[:, None, None]

    def velocity(self, x, tau, conditioning, guidance, geometry):
        return self.first(x, tau) + self.rest(x)

    def forward_kept(self, x, tau, collated, guidance, geometry):
        self.ran.append((False, len(x)))
        return self.velocity(x, tau, collated, guidance, geometry), self.rest(x)

    def forward_cached(self, x, tau, collated, guidance, geometry, kept):
        self.ran.append((True, len(x)))
        return self.first(x, tau) + kept


def asked(method="rbf", nfe=40, **options):
    given = {"reward": brightness, "method": method, "steps": 5, "nfe": nfe, "cache": True, **options}
    return Request("a", **given)


def again(request):
    """What a request keeps back for evaluations in full."""
    return plan(request).again_nfe


@pytest.fixture(scope="module")
def flux():
    """The built-in model with three of its blocks, a conditioning, and inputs of its forward."""
    pipeline = FluxPipeline.from_pretrained(folder("shapes"), dtype=torch.float32)
    pipeline.transformer.single_transformer_blocks = pipeline.transformer.single_transformer_blocks[:1]
    model = FluxModel(pipeline)
    conditioning = model.encode(["two red circles and three blue squares"])[0]
    inputs = torch.randn(3, 16, 32), torch.tensor([1.0, 0.8, 0.3]), model.collate([conditioning] * 3), torch.zeros(3)
    return model, conditioning, inputs


@torch.no_grad()
def test_flux_from_a_cache_is_the_evaluation_that_it_was_kept_of(flux):
    model, _, (x, tau, collated, guidance) = flux
    plain, geometry = model.geometry(), replace(model.geometry(), kept=model.kept)
    u, kept = model.forward_kept(x, tau, collated, guidance, geometry)
    assert torch.equal(u, model.forward(x, tau, collated, guidance, plain))
    torch.testing.assert_close(
        model.forward_cached(x, tau, collated, guidance, geometry, kept), u, atol=1e-5, rtol=1e-5
    )
    other, _ = model.forward_kept(x + 1, tau, collated, guidance, geometry)
    found = model.forward_cached(x + 1, tau, collated, guidance, geometry, kept)
    assert 0.01 < (found - other).abs().mean() < (u - other).abs().mean(), "its own first block, and others' rest"


@torch.no_grad()
def test_embedded_guidance_and_bfloat16():
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    widths = {"in_channels": 8, "joint_attention_dim": 12, "pooled_projection_dim": 10, "axes_dims_rope": (4, 6, 6)}
    network = FluxTransformer2DModel(**sizes, **widths, guidance_embeds=True).bfloat16()
    x, sequence, pooled = (torch.randn(2, *shape).bfloat16() for shape in ((4, 8), (3, 12), (10,)))
    tau, guidance, positions = torch.tensor([0.5, 0.25]), torch.tensor([3.5, 1.0]), torch.rand(7, 3)  # no rounding
    first = caching.entered(network, x, tau, pooled, sequence, guidance, positions)
    u, kept = caching.whole(network, first)
    theirs = network(x, sequence, pooled, tau, positions[3:], positions[:3], guidance, return_dict=False)[0]
    assert torch.equal(u, theirs) and kept.dtype == torch.bfloat16 and kept.shape == (2, 4, caching.width(network))
    torch.testing.assert_close(caching.cached(network, first, kept), u, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_recordings_of_both_forms_compute_the_same(flux):
    model, conditioning, (x, tau, collated, guidance) = flux
    geometry = replace(model.geometry(), kept=model.kept)
    kept = torch.randn(3, 16, model.kept)
    before = (
        *model.forward_kept(x, tau, collated, guidance, geometry),
        model.forward_cached(x, tau, collated, guidance, geometry, kept),
    )
    model.record(geometry, conditioning)
    assert geometry in model._forms.recorded
    after = (
        *model.forward_kept(x, tau, collated, guidance, geometry),
        model.forward_cached(x, tau, collated, guidance, geometry, kept),
    )
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("method", ABLE)
def test_a_cache_that_is_exact_changes_no_decision(method):
    """Where later blocks always add the same, the search is that of the budget without what is kept back."""
    request = asked(method)
    with engine(Keeping(lambda x: torch.full_like(x, 0.25))) as made:
        cached = made.generate(request)
        full = made.generate(replace(request, cache=False, nfe=request.nfe - again(request)))
    own = [record for record in cached.history if record.kind != "refresh"]
    assert [(r.level, r.reward) for r in own] == [(r.level, r.reward) for r in full.history]
    assert torch.equal(cached.pixels, full.pixels) and cached.reward == full.reward
    assert cached.committed_nfe == full.committed_nfe + len(cached.history) - len(own) <= request.nfe
    assert cached.cached_nfe > 0 == full.cached_nfe


@pytest.mark.parametrize("method", ABLE)
@pytest.mark.parametrize("finish", [0, 2])
def test_what_a_search_goes_on_from_and_returns_is_evaluated_in_full(method, finish):
    with engine(Keeping()) as made:
        result = made.generate(asked(method, finish=finish))
    history = result.history
    assert any(record.cached for record in history)
    for record in history:
        parent = None if record.parent is None else history[record.parent]
        assert not record.cached or (record.kind == "committed" and parent is not None)
        assert parent is None or not parent.cached or record.kind == "refresh"
        if record.kind == "refresh":
            assert parent.cached and (parent.level, parent.time) == (record.level, record.time)
    last = [record for record in history if record.kind == ("finish" if finish else "refresh")]
    judged = [record.reward for record in last if record.reward is not None]
    assert max(judged, default=history[0].reward) == pytest.approx(result.reward, abs=0.01)
    assert result.committed_nfe == sum(record.nfe for record in history) <= 40
    assert result.cached_nfe == sum(record.cached for record in history)


def test_what_a_cache_gives_does_not_reach_the_image():
    """From a cache every particle looks alike and bright; the image is none of those."""
    model = Keeping()
    model.forward_cached = lambda x, *others: torch.full_like(x, -50.0)
    with engine(model) as made:
        result = made.generate(asked("svdd"))
    cached = [record.reward for record in result.history if record.cached]
    assert min(cached) > 0.99 and result.reward < 0.9


@pytest.mark.parametrize("method", ABLE)
def test_decisions_do_not_depend_on_packing(method):
    with engine(Keeping()) as made:
        alone = made.generate(asked(method))
    others = [asked(other, seed=i, priority=i % 3, cache=i % 4 > 0) for i, other in enumerate(ABLE * 2)]
    with engine(Keeping(), lanes=2) as made:
        together = made.generate([*others, asked(method)])[-1]
    with engine(Keeping(), buckets=(1,)) as made:  # where nothing runs ahead
        one = made.generate(asked(method))
    assert fingerprint(alone) == fingerprint(together)
    assert [(r.level, r.kind, r.cached) for r in one.history] == [(r.level, r.kind, r.cached) for r in alone.history]


def test_batches_are_of_one_kind_and_are_counted():
    model = Keeping()
    with engine(model) as made:
        result, plain = made.generate([asked(), asked(cache=False)])
        ledger, rows = made.ledger, made.ledger.table("rows")
    ran = sum(rows for from_cache, rows in model.ran if from_cache)
    assert ran == ledger.cached == int(rows["cached"].sum()) > 0
    assert result.cost.cached == ran and plain.cost.cached == plain.cached_nfe == 0
    assert result.cost.nfe["refresh"] == sum(record.kind == "refresh" for record in result.history)
    assert sum(result.cost.nfe.values()) == result.executed_nfe >= result.committed_nfe
    own = rows[(rows["number"] >= 0) & rows["cached"]]
    kinds = {bool(rows["cached"][rows["batch"] == batch].all()) for batch in own["batch"]}
    assert kinds == {True} and set(own["kind"]) == {0}


def test_without_a_cache_nothing_is_kept():
    model = Keeping()
    with engine(model) as made:
        found = fingerprint(made.generate(asked(cache=False)))
        assert not model.ran and made._host.runner.storage(SIZE).kept.numel() == 0
    model.capabilities = Capabilities()
    with engine(model) as made:
        assert fingerprint(made.generate(asked(cache=False))) == found


def test_both_kinds_of_batches_have_graphs(monkeypatch):
    monkeypatch.setattr("rollflow.device.decoder.GRAPHED_PIXELS", 0)
    model, request, capture = Keeping(), asked("svdd"), FakeCapture()
    geometry = replace(SIZE, kept=model.kept)
    with engine(model) as made:
        eager = fingerprint(made.generate(request))
        runner = made._host.runner
        runner.record(geometry, [8], None, capture)
        assert [*runner.graphs] == [*runner.cached_graphs] == [geometry] and capture.rows == [8, 8]
        before = len(model.ran)
        assert fingerprint(made.generate(request)) == eager
    assert capture.replays == len(model.ran) - before > 8


def test_a_good_enough_candidate_is_evaluated_in_full_before_it_ends_the_search():
    with engine(Keeping()) as made:
        whole = made.generate(asked("svdd"))
        before = max(record.reward for record in whole.history if record.level == 0)
        bar = next(record.reward for record in whole.history if record.cached and record.reward > before)
        result = made.generate(asked("svdd", stop_at=bar, finish=1, finalists=2, nfe=42))
    assert result.stopped == "stop_at"
    *_, stopped, refreshed, finished = result.history
    assert stopped.cached and stopped.reward >= bar
    assert (refreshed.kind, refreshed.parent) == ("refresh", stopped.index)
    assert (finished.kind, finished.parent) == ("finish", refreshed.index)


def test_refreshed_particles_take_turns_where_slots_are_few():
    request = asked("beam", options={"survivors": 4}, finalists=1)
    with engine(Keeping(), slots=promise(plan(request))) as made:
        few = made.generate(request)
    with engine(Keeping()) as made:
        assert fingerprint(made.generate(request)) == fingerprint(few)
        assert made.stats().live == 0


def test_what_is_kept_of_a_parent_follows_a_state_that_is_prepared():
    """Of an image with a mask the child's state is made before the batch, as its own parent."""
    storage = Storage(4, 2, 3, torch.device("cpu"), kept=5)
    storage.kept.normal_()
    keep = torch.ones(2, 3)
    start = Start(torch.zeros(2, 3), keep, torch.zeros(2, 3), keep)
    brief = Brief(0, "a", SIZE, 0, 0.0, None, rewards.make(brightness), start=start)
    step = plan(asked()).steps[1]
    (found, _) = tables([Row(brief, 0, 7, 1, 2, step, cached=True)], 1, storage, Tiny.layout, lambda value: value)
    assert found.integers[0].tolist() == [2] and torch.equal(storage.kept[2], storage.kept[1])


def test_what_is_kept_counts_where_slots_are_bounded():
    flux = replace(SIZE, token=4096, channel=64)
    kept = replace(flux, kept=3072)
    half, single = (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)  # velocities, and what is kept
    each = 4096 * (64 * 6 + 3072 * 2)
    assert slots_of(None, kept, *half) == KEPT_BYTES // each < slots_of(None, flux, *half)
    assert slots_of(None, kept, *single) < slots_of(None, kept, *half) and slots_of(7, kept, *half) == 7


@methods.method(guided=lambda options: False, parents=lambda nfe, steps, options: 0)
def guided_in_secret(nfe, steps):
    ((child,),) = yield [Draw(None, guide=Guide())]
    return child


def test_what_cannot_be_cached_is_refused():
    with engine() as made, pytest.raises(RequestError, match=r"Capabilities\.caches"):
        made.generate(asked())
    with engine(Keeping()) as made:
        with pytest.raises(RequestError, match=r"sprout does not say .* beam, rbf, svdd"):
            made.generate(asked("sprout"))
        with pytest.raises(RequestError, match="svdd is guided"):
            made.generate(asked("svdd", options={"gradient": 1.0}))
        with pytest.raises(RequestError, match="draws guided particles"):
            made.generate(asked(guided_in_secret))
        with pytest.raises(BudgetError, match="5 evaluated anew") as raised:
            made.generate(asked("svdd", nfe=9))
        assert made.generate(asked("svdd", nfe=raised.value.smallest)).cached_nfe == 0
        assert made.generate(bon()).committed_nfe == 4
    assert methods.caching() == [*ABLE]


def test_recordings_and_replays(tmp_path):
    with engine(Keeping()) as made, made.profile() as profile:
        made.generate(asked())
    recording = profile.recording
    assert recording.costs[0].cached == int(recording.rows["cached"].sum()) > 0
    with pytest.raises(RequestError, match="it had a cache"):
        Replay(recording)
    import pyarrow.parquet as parquet

    file = export.save(recording.rows, tmp_path / "rows.parquet")
    parquet.write_table(parquet.read_table(file).drop_columns(["cached"]), file)
    assert not export.load(file, "rows")["cached"].any(), "of before there was a cache"


class Searching(Engine):
    """Of searches with a cache every other is right, of others those of 30 NFE."""

    def __init__(self):
        pass

    def generate(self, requests):
        return [
            self.result(request, i % 2 if request.cache else request.nfe != 30) for i, request in enumerate(requests)
        ]

    def result(self, request, wrong):
        made = object.__new__(Result)
        vars(made).update(reward=-float(wrong), committed_nfe=request.nfe, cached_nfe=20 * request.cache)
        return made


def test_the_bench_counts_and_compares(tmp_path, capsys, monkeypatch):
    counted = bench.operations("shapes")
    assert counted["full"] == geometries.flops("shapes") and 0.1 < counted["share"] < 0.2
    file = tmp_path / "caching.json"
    monkeypatch.setattr(bench, "SIZES", ("shapes",))
    monkeypatch.setattr(bench.Engine, "from_pretrained", lambda name: Searching())
    bench.Caching(methods=("svdd",), paths=("linear, g=t^2",), prompts=4, nfe=30, json=file)()
    (row,) = json.loads(file.read_text())["rows"]
    assert row["full"]["nfe"] == 30 and row["cached_nfe"] == 20
    assert row["equal_nfe"] == row["equal"]["nfe"] == round(10 + 20 * counted["share"])
    assert (row["cached"]["exact"], row["full"]["exact"], row["equal"]["exact"]) == (0.5, 1.0, 0.0)
    for name, difference in (("full", -0.5), ("equal", 0.5)):
        found, low, high = row[name]["exact_difference"]
        assert low <= found == difference <= high
    assert "svdd" in capsys.readouterr().out


def pixel(images, prompts):
    """Of the same bits at every place of a batch."""
    return images[:, 0, 32, 32]


@pytest.mark.gpu
def test_on_a_gpu_both_kinds_of_batches_are_graphs_and_decide_alike():
    found, given = [], {"method": "svdd", "nfe": 60, "cache": True, "interpolant": "linear", "diffusion": 0.3}
    for graphs in (True, False):
        with Engine.from_pretrained("shapes", "cuda", torch.float32, buckets=(8,), lanes=1, graphs=graphs) as made:
            found.append(made.generate([Request("two red circles", pixel, seed=i, **given) for i in range(2)]))
            runner = made._host.runner
            assert bool(runner.graphs) is bool(runner.cached_graphs) is graphs
    for one, other in zip(*found, strict=True):
        assert one.history == other.history and one.cached_nfe > 0
        torch.testing.assert_close(one.pixels, other.pixels, atol=1e-3, rtol=0.0)
