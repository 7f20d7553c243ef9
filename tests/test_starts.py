"""Searches that start from an image."""

import inspect

import jaxtyping
import pytest
import torch
from diffusers import (
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    StableDiffusion3Img2ImgPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from tiny_image import IMAGE

from rollflow import Engine, Request
from rollflow.errors import RequestError
from rollflow.interpolant import VP, Linear
from rollflow.plan import plan, time_of

IMG2IMG = {"FluxPipeline": FluxImg2ImgPipeline, "StableDiffusion3Pipeline": StableDiffusion3Img2ImgPipeline}
INPAINT = {"FluxPipeline": FluxInpaintPipeline}  # that of SD3 takes latents of 16 channels alone


def brightness(images, prompts):
    return images.flatten(1).mean(1)


@pytest.fixture(scope="module", params=IMG2IMG)
def pipeline(request):
    return IMAGE[request.param].build()


@pytest.fixture(scope="module")
def engine(pipeline):
    with Engine(pipeline, buckets=[1, 4], lanes=1, threads=1) as made:
        yield made


@pytest.fixture(scope="module")
def picture():
    return torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(5))


def ask(**fields):
    given = {"method": "bon", "nfe": 3, "steps": 3, "interpolant": "linear", "diffusion": 0, "guidance": 3.0}
    return Request("a cat", brightness, **{**given, **fields})


@pytest.fixture(scope="module")
def mask():
    drawn = torch.zeros(32, 48)
    drawn[:, :16] = 1.0
    return drawn


@pytest.mark.parametrize("inpaint", [False, True])
def test_the_picture_is_that_of_the_familys_own_pipeline(engine, pipeline, picture, mask, monkeypatch, inpaint):
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    kinds = INPAINT if inpaint else IMG2IMG
    if type(pipeline).__name__ not in kinds:
        pytest.skip("no pipeline of inpainting for a tiny one of this class")
    own = kinds[type(pipeline).__name__](**pipeline.components)
    own.set_progress_bar_config(disable=True)
    sizes = {"height": 32, "width": 48}
    masks = {"mask_image": mask[None, None]} if inpaint else {}
    call = {name: size for name, size in sizes.items() if name in inspect.signature(type(own).__call__).parameters}
    recorded, noised = [], own.scheduler.scale_noise

    def scale_noise(sample, timestep, noise=None):
        recorded.append((float(timestep[0]) / 1000, noise))
        return noised(sample, timestep, noise)

    monkeypatch.setattr(own.scheduler, "scale_noise", scale_noise)
    times, step = [], own.scheduler.step
    monkeypatch.setattr(own.scheduler, "step", lambda *a, **k: (times.append(float(a[1]) / 1000), step(*a, **k))[1])
    wanted = own(
        "a cat", image=picture[None], strength=0.6, num_inference_steps=5, guidance_scale=3.0, output_type="pt",
        generator=torch.Generator().manual_seed(1), **call, **masks,
    ).images[0]  # fmt: skip
    start, noise = recorded[0]
    latents = noise if noise.shape[1:] == engine.model.geometry(32, 48).state else engine.model.layout.pack(noise)
    assert times[0] == pytest.approx(start) and len(times) == 3
    masks = {"mask": mask} if inpaint else {}
    found = engine.generate(ask(image=picture, latents=latents, times=times, **masks))
    assert (found.pixels - wanted).abs().max() < 1e-4


def test_the_start_is_a_mixture_of_image_and_noise_at_the_linear_time_of_the_strength():
    for path in (Linear(), VP()):
        for strength in (0.2, 0.6, 1.0):
            made = plan(ask(image=torch.rand(3, 8, 8), strength=strength, interpolant=path, diffusion=1))
            first = made.steps[0]
            assert first.tau == pytest.approx(min(strength, path.linear_time(1.0)), abs=1e-9)
            assert first.k == pytest.approx(path.sigma(first.time))
            assert first.scale - first.k == pytest.approx(path.alpha(first.time))
    assert plan(ask(image=torch.rand(3, 8, 8))).steps[0].tau == pytest.approx(0.6)
    assert time_of(VP(), 0.3) == pytest.approx(time_of(VP(), 0.3, 0.9))


def test_little_strength_leaves_the_image_as_it_was(engine, picture):
    decoded = engine.generate(ask(image=picture, strength=1e-4)).pixels
    changes = []
    for strength in (1e-4, 0.3, 1.0):
        found = engine.generate(ask(image=picture, strength=strength, seed=3))
        changes.append(float((found.pixels - decoded).abs().mean()))
    assert changes[0] < 1e-3 < changes[1] < changes[2]


@pytest.mark.parametrize("interpolant", ["linear", "vp"])
def test_the_grid_of_the_model_is_cut_at_the_strength(engine, picture, interpolant):
    model = engine.model
    if not model.capabilities.schedule:
        pytest.skip("this adapter has no sampler of its own")
    own = model.times(6, model.geometry(32, 48))
    seen = []

    def velocity(x, tau, *rest):
        seen.append(float(tau[0]))
        return type(model).velocity(model, x, tau, *rest)

    model.velocity = velocity
    try:
        for strength, wanted in ((None, own), (0.6, [0.6, *(tau for tau in own if tau < 0.6 - 1e-6)])):
            fields = {} if strength is None else {"image": picture, "strength": strength}
            nfe = len(wanted)
            seen.clear()
            found = engine.generate(
                ask(grid="model", steps=6, nfe=nfe, height=32, width=48, interpolant=interpolant, **fields)
            )
            reached = [tau if interpolant == "linear" else min(tau, VP().linear_time(1.0)) for tau in wanted]
            assert seen == pytest.approx(reached, abs=1e-6)
            assert (found.request.grid, found.request.steps) == ("model", 6)
    finally:
        del model.velocity
    with pytest.raises(RequestError, match="give an image"):
        engine.generate(ask(grid="model", steps=6, height=32, width=48, strength=0.5))


@pytest.mark.parametrize("method", ["bon", "rbf", "sop"])
def test_what_a_mask_leaves_out_stays_as_it_was(engine, picture, mask, method, monkeypatch):
    seen, model = [], engine.model
    geometry = model.geometry(32, 48)
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda latents: (seen.append(latents.clone()), decode(latents))[1])
    fields = {"image": picture, "strength": 0.9, "method": method, "nfe": 30, "interpolant": "vp", "diffusion": 3.0}

    def latents(**more):
        seen.clear()
        pixels = engine.generate(ask(**fields, **more)).pixels
        return torch.cat(seen), pixels

    clean = latents(mask=torch.zeros(32, 48))[0][0]
    found, _ = latents(mask=mask)
    shift = model.layout.decodable(torch.zeros(1, geometry.token, geometry.channel), geometry)
    live = found[(found.flatten(1).any(1)) & ((found - shift).flatten(1).any(1))]  # without padding
    width = clean.shape[-1]
    assert len(live) > 4 and torch.equal(
        live[..., width // 3 :], clean[..., width // 3 :].expand_as(live[..., width // 3 :])
    )
    assert (live[..., : width // 3] - clean[..., : width // 3]).abs().mean() > 0.05
    assert torch.equal(latents(mask=mask + 1)[1], latents()[1])


def test_an_image_of_pillow_is_the_same_and_its_size_is_asked_for(engine, picture):
    eight_bit = (picture * 255).round() / 255
    image = Image.fromarray((eight_bit * 255).to(torch.uint8).permute(1, 2, 0).numpy())
    assert torch.equal(engine.generate(ask(image=image)).pixels, engine.generate(ask(image=eight_bit)).pixels)


def test_particles_of_one_start_differ_in_their_noise(engine, picture):
    found = engine.generate(ask(image=picture, nfe=12, method="bon"))
    assert len({round(record.reward, 7) for record in found.history if record.level == 2}) == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": torch.zeros(3, 32, 48, dtype=torch.uint8)}, "a tensor of floats"),
        ({"image": torch.full((3, 32, 48), 1.5)}, r"its numbers must be in \[0, 1\]"),
        ({"image": torch.full((3, 32, 48), float("nan"))}, r"its numbers must be in \[0, 1\]"),
        ({"image": torch.zeros(3, 32, 48), "height": 64, "width": 48}, "resize it, or ask for its size"),
        ({"image": torch.zeros(3, 32, 48), "strength": 0}, "strength=0: it must be above 0"),
        ({"image": torch.zeros(3, 32, 48), "strength": 1.1}, "strength=1.1: it must be"),
        ({"image": torch.zeros(3, 32, 48), "strength": 0.5, "times": [0.4, 0.2]}, "the first time is the start"),
        ({"strength": 0.5}, "give an image"),
        ({"mask": torch.ones(32, 48)}, "give an image"),
        (
            {"image": torch.zeros(3, 32, 48), "mask": torch.ones(16, 48)},
            r"mask of shape \[16, 48\]: this request makes",
        ),
        ({"image": torch.zeros(3, 32, 48), "mask": torch.ones(1, 32, 48)}, r"a tensor \[height, width\]"),
        ({"image": torch.zeros(2, 3, 32, 48)}, "resize it"),
    ],
)
def test_what_is_no_start_is_refused_in_a_line(engine, fields, message):
    with pytest.raises(RequestError, match=message) as caught:
        engine.generate(ask(**fields))
    assert "\n" not in str(caught.value)


def test_a_path_is_no_image(engine, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as a caller would do it
    with pytest.raises(RequestError, match="it must be a PIL image, or a tensor of floats"):
        engine.generate(ask(image="cat.png"))


def test_a_model_without_an_encoder_says_so():
    from tiny import Tiny

    with Engine(Tiny(), buckets=[1]) as made, pytest.raises(RequestError, match="no encoder of images"):
        made.generate(ask(image=torch.zeros(3, 8, 8)))
