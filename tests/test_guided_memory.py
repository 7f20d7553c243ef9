"""Guided rows have batch sizes of their own, by what the gradient of one keeps; what is kept can be computed again."""

import warnings
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from test_memory import Card
from tiny import SIZE, Tiny, assert_sound, bon, engine, rbf
from tiny_image import IMAGE
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rollflow import ModelError
from rollflow.device import calibrate
from rollflow.device.memory import SHARE, Guidance, Room, guidance
from rollflow.models import Capabilities, folder, loaded, recompute
from rollflow.models.flux import Conditioning, FluxModel
from rollflow.models.pipeline import PipelineModel
from rollflow.models.pipeline.families import Family
from rollflow.models.recompute import Saved

pytestmark = pytest.mark.usefixtures("one_thread")

GIB = 2**30
DEPTH = 19, 38  # blocks of FLUX.1


def flux_on_meta(double, single):
    """FLUX.1-dev with so many blocks of each kind, in bfloat16, without data."""
    built = FluxPipeline.from_pretrained(folder("shapes"))
    with torch.device("meta"):
        built.transformer = FluxTransformer2DModel(
            num_layers=double, num_single_layers=single, guidance_embeds=True
        ).bfloat16()
        built.vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=16, sample_size=1024,
            scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
        ).bfloat16()  # fmt: skip
    return FluxModel(built)


def flash(query, key, value, **_):
    """What a GPU takes for FLUX's attention; on meta, torch would take the one that keeps all products."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


@pytest.fixture(scope="module")
def flux_saved():
    """What one guided row of FLUX.1 keeps at 1024 x 1024 with 512 text tokens, extrapolated by kinds of block."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", flash)
        patch.setattr(loaded, "_check_devices", lambda *_: None)  # which refuses networks without data
        for depth in ((1, 1), (2, 1), (1, 2)):
            model = flux_on_meta(*depth)
            empty = partial(torch.zeros, dtype=torch.bfloat16, device="meta")
            text = Conditioning(empty(768), empty(512, 4096))
            found.append(calibrate.guided(model, model.geometry(1024, 1024), text, Card(0))[0])
    one, double, single = found
    assert one.region == double.region == single.region
    more = [base + (DEPTH[0] - 1) * (d - base) + (DEPTH[1] - 1) * (s - base) for base, d, s in zip(*found, strict=True)]
    return Saved(more[0], more[1], one.region)


def test_what_a_guided_row_of_flux_keeps(flux_saved):
    whole, kept, region = (size / GIB for size in flux_saved)
    tokens, width = 4096 + 512, 3072
    inputs = 57 * tokens * width * 2 / GIB  # of the blocks
    assert 30 < whole < 36 and inputs + 1.5 < kept < 4 and region < 6
    assert whole > 3 * (kept + region)


@pytest.mark.parametrize(
    ("free", "lanes", "expected"),
    [
        (100, 1, Guidance((1, 2), False)),
        (45, 1, Guidance((1,), False)),
        (45, 2, Guidance((1, 2), True)),
        (20, 2, Guidance((1,), True)),
        (4, 2, Guidance((1,), True)),  # tried all the same: it may be less than was foretold
    ],
)
def test_batches_of_flux_by_free_memory(flux_saved, free, lanes, expected):
    found = guidance(flux_saved, GIB, (1, 2, 4, 8), Room(Card(free * GIB), lanes))
    assert found == expected
    each = flux_saved.kept + flux_saved.region if found.recomputed else flux_saved.whole
    assert free == 4 or lanes * found.sizes[-1] * (each + GIB) <= SHARE * free * GIB


def test_batches_smaller_than_all_that_were_asked_for():
    room = Room(Card(1000), 1, lambda: 100)  # 810 to be had
    assert guidance(Saved(100, 10, 10), 1, (8,), room) == Guidance((8,), False)
    assert guidance(Saved(200, 10, 10), 1, (8, 16, 32, 64), room) == Guidance((8, 16, 32), True)
    assert guidance(Saved(300, 190, 10), 1, (8,), room) == Guidance((4,), True)
    assert guidance(Saved(300, 300, 0), 1, (8,), room) == Guidance((2,), False)  # a model that marks no regions


# For real.


class Peak(TorchDispatchMode):
    """The most bytes that results of operations took at a time."""

    def __init__(self):
        super().__init__()
        self._alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, torch.Tensor):
                reference = StorageWeakRef(one.untyped_storage())
                self._alive[reference.cdata] = reference, one.untyped_storage().nbytes()
        self._alive = {key: known for key, known in self._alive.items() if not known[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return found


@pytest.fixture(scope="module")
def shapes():
    return FluxModel(FluxPipeline.from_pretrained(folder("shapes")))


def gradients(model, rows):
    """Of images of a few rows, and the most memory that they took."""
    geometry, text = model.geometry(), model.encode(["two red circles"])
    x = torch.randn(rows, geometry.token, geometry.channel, generator=torch.Generator().manual_seed(0))
    x.requires_grad_(True)
    scale = torch.linspace(1, 2, rows)
    with Peak() as forward, torch.no_grad():
        u = model.velocity(x, torch.linspace(0.5, 0.9, rows), text * rows, scale, geometry)
        model.decode(model.layout.decodable(x + u, geometry))
    with Peak() as peak:
        u = model.velocity(x, torch.linspace(0.5, 0.9, rows), text * rows, scale, geometry)
        images = model.decode(model.layout.decodable(x + u, geometry))
        (gradient,) = torch.autograd.grad((images.mean((1, 2, 3)) * scale).sum(), x)
    return u.detach(), images.detach(), gradient, peak.most, forward.most


def test_what_is_computed_again_has_the_same_gradients_and_takes_less(shapes):
    geometry, (text,) = shapes.geometry(), shapes.encode(["two red circles"])
    saved, _ = calibrate.guided(shapes, geometry, text, Card(0))
    u, images, gradient, most, forward = gradients(shapes, 4)
    with recompute.recomputing():
        again = gradients(shapes, 4)
    assert torch.equal(again[0], u)
    torch.testing.assert_close(again[1:3], (images, gradient), rtol=1e-4, atol=1e-7)
    assert gradient.abs().max() > 1e-5
    assert 4 * saved.whole < most < 4 * saved.whole + forward  # what `guidance` counts on
    assert again[3] < 4 * saved.kept + saved.region + forward  # the decoder, whose region is the largest, one by one
    assert again[3] < most / 2


def test_regions_are_plain_calls_elsewhere(shapes):
    calls = []

    def block(x):
        calls.append(torch.is_grad_enabled())
        return x.exp().exp()

    x = torch.ones(5, requires_grad=True)
    torch.autograd.grad(recompute.region(block, x).sum(), x)
    with recompute.recomputing():
        with torch.no_grad():
            recompute.region(block, x)
        assert calls == [True, False]
        (gradient,) = torch.autograd.grad(recompute.region(block, x).sum(), x)
    assert calls == [True, False, True, True]
    assert torch.equal(gradient, torch.autograd.grad(block(x).sum(), x)[0])
    assert not recompute.active() and not shapes.transformer.is_gradient_checkpointing


class Diverges(Tiny):
    """Computes something else where its block is to be computed again."""

    def velocity(self, x, tau, conditioning, guidance, geometry):
        return recompute.region(lambda x: x.sin().cos(), x) * (1.1 if recompute.WANTED else 1.0)


def test_a_network_that_computes_something_else_then_is_not_computed_again():
    saved, _ = calibrate.guided(Diverges(), SIZE, None, Card(0))
    assert saved.whole > 0 and saved == Saved(saved.whole, saved.whole, 0)
    one = IMAGE["ChromaPipeline"]  # without its mask, by diffusers' own gradient checkpointing
    model = PipelineModel(one.build(), Family(fixed=one.call))
    geometry = model.geometry(one.height, one.width)
    saved, _ = calibrate.guided(model, geometry, model.encode(["a cat"], geometry)[0], Card(0))
    assert saved == Saved(saved.whole, saved.whole, 0)


def test_a_storage_counts_once_and_weights_do_not():
    weight, x = torch.ones(1000), torch.ones(10, requires_grad=True)

    def evaluate():
        y = x * 2  # saves nothing of x
        z = y.exp()  # its result: 40 bytes
        z = z.view(2, 5) * z.view(2, 5)  # the same
        return recompute.region(lambda z: z.sin().cos(), z), (z.sum() * weight).sum()

    # Outside: exp's result, and the weight, which stays. Inside: the region's input, which sin saves, and cos's input.
    assert recompute.saved(evaluate) == Saved(120, 80, 40)


# Engines.


def bright(images, prompts):
    return images.mean((1, 2, 3))


bright.differentiable = True


def dps(**options):
    return rbf(24, **{"method": "dps", "reward": bright, **options})


class Guides(Tiny):
    """A model whose gradients are the larger part: it takes of a card what its operations save."""

    def __init__(self, card, signature, regions=True):
        self.card, self.regions, self.guided, self.plain = card, regions, [], []
        self.capabilities = Capabilities(signature=f"test_guided_memory: {signature}")

    def velocity(self, x, tau, conditioning, guidance, geometry):
        counted = recompute.WANTED and not recompute.active()
        if not torch.is_grad_enabled():
            self.plain.append(len(x))
            self.card.take(len(x))
        elif not counted:
            self.guided.append((len(x), recompute.active()))
            self.card.take(self.share(recompute.active()) * len(x))
        for _ in range(8):
            x = recompute.region(_block, x) if self.regions else _block(x)
        return x * tau[:, None, None]

    def share(self, recomputed):
        return 4 if recomputed and self.regions else 16


def _block(x):
    for _ in range(8):
        x = x.sin()
    return x


WHOLE = 65 * SIZE.token * SIZE.channel * 4  # bytes of what one row saves: the input of each sine


@pytest.mark.parametrize(
    ("rows", "sizes", "recomputed"), [(9, (1, 2, 4, 8), False), (3, (1, 2), False), (0.4, (1,), True)]
)
def test_guided_rows_have_batch_sizes_of_their_own(rows, sizes, recomputed):
    card = Card(10**9)
    model = Guides(card, f"own: {rows}")
    with engine(model, buckets=(1, 2, 4, 8, 16)) as made:
        made._host.preparations.memory = card
        made.warm_up()
        assert made.stats().buckets == {(8, 8): (1, 2, 4, 8, 16)} and not model.guided
        card.says, measured = int(rows * WHOLE / SHARE), len(model.plain)
        guided = made.submit(dps())
        others = [made.submit(dps(seed=seed)) for seed in range(3)]
        plain = made.submit(bon(32))
        assert [job.result().committed_nfe for job in (guided, *others, plain)] == [24] * 4 + [32]
        assert {size for size, _ in model.guided} <= set(sizes) and max(model.guided)[0] == sizes[-1]
        assert {again for _, again in model.guided} == {recomputed}
        assert 16 in model.plain[measured:]  # plain batches are as large as ever
        assert made.stats().buckets == {(8, 8): (1, 2, 4, 8, 16)}
        assert_sound(made)


@pytest.mark.parametrize("regions", [True, False])
def test_guided_rows_that_do_not_fit_leave_plain_ones_alone(regions):
    """They are halved down to one row, which is then computed again; where that does not help, it fails."""
    card = Card(10**9)
    model = Guides(card, f"short: {regions}", regions)
    with engine(model, buckets=(1, 2, 4)) as made, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made._host.preparations.memory = card  # which says that everything fits
        expected = made.generate(dps())
        card.has = 30 + 10 * 8  # of plain rows 8, of guided ones none, of those that are computed again 2
        model.guided.clear()
        if regions:
            found = made.generate(dps())
            assert (repr(found.history), found.reward) == (repr(expected.history), expected.reward)
        else:  # there is nothing that could be computed again
            with pytest.raises(ModelError, match="OutOfMemoryError"):
                made.generate(dps())
        told = [str(one.message) for one in caught]
        assert sum("guided rows of 8x8 did not fit" in one for one in told) == 1
        assert sum("a guided row of 8x8 did not fit" in one for one in told) == regions and len(told) == 1 + regions
        tried = [size for size, again in model.guided if not again]
        assert tried[0] == 4 and tried.count(4) == 1 and tried[-1] == 1
        assert model.guided[-1] == (1, regions)
        model.plain.clear()
        assert made.generate(bon(16)).committed_nfe == 16
        assert set(model.plain) == {4}
        assert made.stats().buckets.get((8, 8), (1, 2, 4)) == (1, 2, 4)
        assert_sound(made)


def test_a_reward_of_guided_rows_that_does_not_fit_makes_their_batches_smaller():
    sizes = []

    def large(images, prompts):
        if images.requires_grad:
            sizes.append(len(images))
            if len(images) > 1 or not recompute.active():
                raise torch.OutOfMemoryError("a reward's activations do not fit")
        return images.mean((1, 2, 3))

    large.differentiable = True
    with engine(Guides(Card(10**9), "reward"), buckets=(1, 2)) as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made._host.preparations.memory = made.model.card
        assert made.generate(dps(reward=large)).committed_nfe == 24
        assert sizes[-1] == 1
        assert_sound(made)
