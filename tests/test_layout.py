"""Layouts: packing as diffusers packs, other patches, a scaling for each channel, and both through the whole engine."""

import inspect
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from tiny_image import IMAGE
from tiny_video import VIDEO

from rollflow import kernels
from rollflow.device.finish import Finish
from rollflow.device.storage import Storage
from rollflow.engine import Engine
from rollflow.errors import ModelError, RequestError
from rollflow.models import FlowModel, Geometry
from rollflow.models.layout import SIDES, FusedMap, LatentMap, Layout, patch_of
from rollflow.models.pipeline import PipelineModel
from rollflow.models.pipeline.families import family
from rollflow.request import Request

PATCHES = [(1, 1, 1), (1, 2, 2), (1, 1, 2), (1, 4, 4), (1, 8, 1)]


def layout_of(patch, channels=3):
    return Layout(patch, tuple(0.5 + 0.25 * c for c in range(channels)), tuple(0.1 - 0.2 * c for c in range(channels)))


def numbered(*shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


@pytest.mark.parametrize(("channels", "height", "width"), [(16, 8, 8), (3, 4, 10), (1, 2, 2)])
def test_patches_of_2x2_are_packed_as_diffusers_packs_them(channels, height, width):
    layout, latents = layout_of((1, 2, 2), channels), numbered(2, channels, height, width)
    tokens = FluxPipeline._pack_latents(latents, 2, channels, height, width)
    assert torch.equal(layout.pack(latents), tokens)
    assert torch.equal(layout.unpack(tokens, height, width), latents)
    assert torch.equal(FluxPipeline._unpack_latents(tokens, 8 * height, 8 * width, 8), latents)
    assert tokens.shape[1:] == (layout.tokens(height, width), layout.token_channels)


@pytest.mark.parametrize("patch", PATCHES)
def test_any_patch_is_packed_channel_by_channel_and_line_by_line(patch):
    """What `unfold` calls blocks: ordered (channel, dy, dx), and the blocks row by row."""
    layout, latents = layout_of(patch), numbered(2, 3, 16, 8)
    tokens = layout.pack(latents)
    assert torch.equal(tokens, F.unfold(latents, patch[1:], stride=patch[1:]).mT)
    assert torch.equal(layout.unpack(tokens, 16, 8), latents)
    assert layout.channels == 3 and tokens.shape[1:] == (layout.tokens(16, 8), layout.token_channels)


@pytest.mark.parametrize("patch", PATCHES)
def test_patch_means(patch):
    layout, latents = layout_of(patch), torch.randn(1, 3, 16, 8, generator=torch.Generator().manual_seed(0))
    means = layout.unpack(layout.patch_means(layout.pack(latents)[0])[None], 16, 8)
    expected = F.interpolate(F.avg_pool2d(latents, patch[1:]), scale_factor=tuple(map(float, patch[1:])))
    torch.testing.assert_close(means, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_decoder_takes(dtype):
    layout, latents = layout_of((1, 2, 2)), torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    taken = layout.denormalise(latents.to(dtype))
    assert taken.dtype == dtype
    expected = torch.stack([latents[:, c] / (0.5 + 0.25 * c) + 0.1 - 0.2 * c for c in range(3)], dim=1)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(taken.float(), expected, **tolerance)
    torch.testing.assert_close(layout.normalise(taken).float(), latents, **tolerance)


def test_one_number_for_all_channels_rounds_as_a_number():
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    layout = Layout((1, 2, 2), (0.3611,) * 4, (0.1159,) * 4)
    for dtype in (torch.float32, torch.bfloat16):
        own = latents.to(dtype)
        assert torch.equal(layout.denormalise(own), own / 0.3611 + 0.1159)
        assert torch.equal(layout.normalise(own), (own - 0.1159) * 0.3611)
    inverse_scaling, shift = layout.affine(torch.device("cpu"))
    assert torch.equal(latents * (1.0 / 0.3611) + 0.1159, latents * inverse_scaling[0] + shift[0])


def test_gradients_flow_through_vectors_that_were_made_without_them():
    layout, latents = Layout((1, 1, 1), (0.3, 0.7), (0.0, 0.9)), torch.ones(1, 2, 2, 2)
    with torch.inference_mode():
        layout.denormalise(latents)
    latents.requires_grad_(True)
    layout.denormalise(latents).sum().backward()
    torch.testing.assert_close(latents.grad[0, :, 0, 0], torch.tensor([1 / 0.3, 1 / 0.7]))


def test_a_layout_is_a_value():
    one, other = layout_of((1, 2, 2)), layout_of((1, 2, 2))
    assert one == other and hash(one) == hash(other) and one != layout_of((1, 2, 1))
    assert Layout((1, 2, 2), (1, 2), (0, 0.5)) == Layout((1, 2, 2), (1.0, 2.0), (0.0, 0.5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (((2, 2), (1.0,), (0.0,)), r"patch=\(2, 2\)\): it must be three numbers, \(t, y, x\)"),
        (((4, 2, 2), (1.0,), (0.0,)), r"patch=\(4, 2, 2\)\): t must be 1; a model of clips has a LatentMap"),
        (((1, 3, 2), (1.0,), (0.0,)), "y and x must each be one of 1, 2, 4, 8"),
        (((1, 2.0, 2), (1.0,), (0.0,)), "y and x must each be one of 1, 2, 4, 8"),
        ((2, (1.0,), (0.0,)), "patch=2\\): it must be a tuple of numbers"),
        (((1, 2, 2), 0.3611, (0.0,)), "scaling=0.3611\\): it must be a tuple of numbers"),
        (((1, 2, 2), (1.0, None), (0.0,) * 2), "scaling=.*it must be a tuple of numbers"),
        (((1, 2, 2), (1.0, 1.0), (0.0,)), "2 numbers in scaling and 1 in shift: each must hold one number a latent"),
        (((1, 2, 2), (), ()), "0 numbers in scaling and 0 in shift"),
        (((1, 2, 2), (1.0, 0.0), (0.0, 0.0)), "its numbers must not be 0"),
        (((1, 2, 2), (1.0, 1.0), (0.0, float("nan"))), "shift=.*its numbers must be finite"),
    ],
)
def test_layouts_that_cannot_be(fields, message):
    layout = object.__new__(Layout)
    for name, value in zip(("patch", "scaling", "shift"), fields, strict=True):
        object.__setattr__(layout, name, value)
    with pytest.raises(ModelError, match=message):
        inspect.unwrap(Layout.__post_init__)(layout)


def test_sizes_that_no_tokens_cover():
    layout = layout_of((1, 2, 4))
    assert layout.tokens(6, 8) == 6
    for size in ((5, 8), (6, 6), (0, 4)):
        with pytest.raises(RequestError, match="height must be a multiple of 2, width one of 4"):
            layout.tokens(*size)
    with pytest.raises(RequestError):
        layout.pack(torch.zeros(1, 3, 4, 6))


def test_the_kernel_turns_what_a_layout_may_have():
    from rollflow.kernels.operators import PATCH_SIDES

    assert SIDES == PATCH_SIDES


class Certain(FlowModel):
    """Knows the clean latents whatever it is asked, and decodes by the identity."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, layout):
        self.layout, self.clean = layout, torch.randn(1, 3, 16, 8, generator=torch.Generator().manual_seed(0))

    def geometry(self, height=None, width=None):
        return Geometry(16, 8, 16, 8, self.layout.tokens(16, 8), self.layout.token_channels)

    def check_prompt(self, prompt):
        pass

    def encode(self, prompts):
        return [None for _ in prompts]

    def velocity(self, x, tau, conditioning, guidance, geometry):
        return (x - self.layout.pack(self.clean)) / tau[:, None, None]

    def decode(self, latents):
        return latents


class Brightness:
    differentiable = True

    def __call__(self, images, prompts):
        return images.flatten(1).mean(1)


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize(
    "options",
    [{"method": "bon", "nfe": 6, "steps": 3}, {"method": "dps", "nfe": 7, "steps": 4}, {"method": "ses", "nfe": 12}],
)
def test_the_engine_decodes_what_the_model_knows(patch, options):
    """Plain, guided (through `unpack` and `denormalise`) and coarse moves (through `patch_means`)."""
    model = Certain(layout_of(patch))
    result = Engine(model, lanes=1, threads=1).generate(Request("a", reward=Brightness(), seed=1, **options))
    torch.testing.assert_close(result.pixels, model.layout.denormalise(model.clean)[0], atol=1e-4, rtol=1e-4)


# What the kernels go by themselves.


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("shape", [(3, 16, 8), (5, 2, 8, 24), (2, 8)])
def test_a_patch_is_known_by_where_it_moves_elements(patch, shape):
    """Those of clips too, frame by frame; a single line has no patches of many."""
    height, width = math.prod(shape[1:-1]), shape[-1]
    if height % patch[1]:
        return
    layout = layout_of(patch, shape[0])
    tokens = numbered(1, math.prod(shape) // layout.token_channels, layout.token_channels)
    source = layout.unpack(tokens, height, width).flatten().long()
    assert patch_of(source, shape) == patch[1:]
    assert patch_of(source[:-1], shape) is None
    swapped = source.clone()
    swapped[-2:] = source[-2:].flip(0)
    assert patch_of(swapped, shape) is None


def test_channels_in_another_order_are_no_patch():
    """(dy, dx, channel) as some pipelines pack them, in place of (channel, dy, dx)."""
    source = torch.arange(96).view(4, 2, 2, 2, 3).permute(4, 0, 2, 1, 3).flatten()
    assert sorted(source.tolist()) == [*range(96)] and patch_of(source, (3, 8, 4)) is None


@cache
def model_of(name):
    tiny = {**IMAGE, **VIDEO}[name]
    pipeline = tiny.build()
    known = family(pipeline)
    model = PipelineModel(pipeline, replace(known, fixed={**known.fixed, **tiny.call}))
    return model, {"height": tiny.height, "width": tiny.width, "frames": tiny.frames}


@pytest.fixture
def finished(monkeypatch):
    """Of every batch: the operators that finished it, its rows' u, x, p and q, and their latents."""
    calls, inside = [], []
    usual = {name: getattr(kernels, name) for name in ("finish", "finish_flat")}
    whole = Finish.__call__

    def patches(*args):
        inside.append(("finish", args[7:9], len(args[9])))
        return usual["finish"](*args)

    def flat(*args):
        inside.append(("finish_flat", len(args[5])))
        return usual["finish_flat"](*args)

    def finish(self, u, storage, slots, posterior):
        live = slots >= 0
        x = storage.x[slots[live]]
        latents = whole(self, u, storage, slots, posterior)
        assert torch.equal(storage.u[slots[live]], u[live].float())
        calls.append(([*inside], u[live], x, posterior[live], latents[live]))
        inside.clear()
        return latents

    monkeypatch.setattr(Finish, "__call__", finish)
    monkeypatch.setattr(kernels, "finish", patches)
    monkeypatch.setattr(kernels, "finish_flat", flat)
    return calls


@pytest.mark.parametrize(
    ("name", "operator", "fused"),
    [
        ("StableDiffusion3Pipeline", ("finish_flat", 1), True),
        ("WanPipeline 2.1", ("finish_flat", 16), True),
        ("QwenImagePipeline", ("finish", (2, 2), 4), True),
        ("Flux2KleinPipeline", ("finish", (2, 2), 16), True),
        ("LTXPipeline", ("finish", (1, 1), 8), True),
        ("LTXPipeline", ("finish_flat", 1), False),  # and then by torch
    ],
)
def test_a_pipeline_is_finished_in_one_pass(name, operator, fused, finished, monkeypatch):
    """Each batch by one operator; what is decoded is what `Decoding.latents` gives of the posterior means."""
    model, size = model_of(name)
    decoding = model.layout.of[model.geometry(**size)]
    if not fused:
        monkeypatch.setattr(type(model.layout), "fused", lambda self, geometry, device: None)
    asked = {"method": "bon", "nfe": 4, "steps": 2, "seed": 1, "guidance": 1.0}
    with Engine(model, buckets=[4], lanes=1, threads=1) as engine:
        engine.generate(Request("a cat", Brightness(), **asked, **size))
    assert finished
    for used, u, x, posterior, latents in finished:
        assert used == [operator]
        p, q = posterior[:, :, None, None].unbind(1)
        expected = decoding.latents(p * x + q * u)
        assert latents.dtype == expected.dtype == torch.float32 and len(latents)
        torch.testing.assert_close(latents, expected, rtol=1e-6, atol=1e-6)


class Mirrored:
    """A way to latents that no kernel knows."""

    def shape(self, geometry):
        return 3, 4, 2

    def decodable(self, states, geometry):
        return states.view(-1, 3, 4, 2).flip(3) * 2 + 1

    def stated(self, latents, geometry):
        return latents

    def coarse(self, x, geometry):
        return x


@pytest.fixture
def mirrored():
    """A model under it, and a batch of two rows with padding between: NaN wherever nothing may be read."""
    model, generator = Certain(layout_of((1, 1, 1))), torch.Generator().manual_seed(0)
    model.layout = Mirrored()
    storage, slots = Storage(5, 8, 3, model.device), torch.tensor([4, -1, 0, -1])
    u, posterior = torch.full((4, 8, 3), math.nan), torch.full((4, 2), math.nan)
    storage.x.fill_(math.nan), storage.u.fill_(math.nan)
    storage.x[[4, 0]], u[[0, 2]] = torch.randn(2, 2, 8, 3, generator=generator).unbind(0)
    posterior[[0, 2]] = torch.tensor([[1.0, -0.9], [0.8, 0.1]])
    return model, storage, u, slots, posterior


def test_any_latent_map_is_finished(mirrored):
    model, storage, u, slots, posterior = mirrored
    assert isinstance(model.layout, LatentMap) and not isinstance(model.layout, FusedMap)
    geometry = Geometry(4, 2, 4, 2, 8, 3)
    finish = Finish(model, geometry)
    latents = finish(u, storage, slots, posterior)
    p, q = posterior[[0, 2], :, None, None].unbind(1)
    expected = model.layout.decodable(p * storage.x[[4, 0]] + q * u[[0, 2]], geometry)
    torch.testing.assert_close(latents[[0, 2]], expected)
    assert latents.isfinite().all() and torch.equal(storage.u[[4, 0]], u[[0, 2]])
    assert storage.u[[1, 2, 3]].isnan().all()
    other = u.double().mT.contiguous().mT  # whatever a model gives
    assert torch.equal(finish(other, storage, slots, posterior), latents)


@pytest.mark.parametrize("layout", [Mirrored(), layout_of((1, 1, 1))])
def test_finishing_waits_for_no_device(layout, mirrored):
    """On a device that has no data, whatever must know some raises."""
    model, _, *batch = mirrored
    model.layout, model.device = layout, torch.device("meta")
    u, slots, posterior = (value.to("meta") for value in batch)
    finish, storage = Finish(model, Geometry(4, 2, 4, 2, 8, 3)), Storage(5, 8, 3, model.device)
    assert finish(u, storage, slots, posterior).shape == (4, 3, 4, 2)
    with pytest.raises(NotImplementedError):
        u[slots >= 0]
