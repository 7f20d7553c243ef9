"""Pipelines of true sizes with random weights: counted on the meta device, run here in small."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from rollflow import rewards
from rollflow.bench import geometries, prompt_sets
from rollflow.bench.geometries import GEOMETRIES
from rollflow.engine import Engine
from rollflow.errors import ModelError, RequestError
from rollflow.models import world
from rollflow.models.flux import FluxModel

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "two red circles and three blue squares"
SHRINK = 16
# As deep as the true models, but narrow: what a chain of blocks does to activations shows here.
DEEP = {
    name: replace(GEOMETRIES[name].shrunk(24), layers=GEOMETRIES[name].layers, single_layers=of.single_layers)
    for name, of in GEOMETRIES.items()
    if not of.built_in
}


@pytest.fixture(scope="module", params=GEOMETRIES)
def built(request):
    of = GEOMETRIES[request.param].shrunk(SHRINK)
    return of, geometries.pipeline(request.param, "cpu", torch.float32, shrink=SHRINK)


def test_parameters_are_those_of_the_models_that_the_names_promise():
    assert geometries.parameters("flux") == 11_891_178_560  # FLUX.1-schnell's transformer
    assert geometries.parameters("sd3") == 2_059_020_352
    assert geometries.parameters("shapes") == 2_547_680


def test_a_built_pipeline_has_the_geometry_it_is_named_for(built):
    of, pipeline = built
    model = FluxModel(pipeline)
    assert sum(p.numel() for p in pipeline.transformer.parameters()) == geometries.parameters(of)
    with torch.device("meta"):
        expected = geometries.transformer(of).config
    same = [key for key in expected if not key.startswith("_")]
    assert {k: _plain(pipeline.transformer.config[k]) for k in same} == {k: _plain(expected[k]) for k in same}
    assert tuple(pipeline.vae.config.block_out_channels) == of.decoder
    own = model.geometry()
    assert (own.height, own.width, own.token) == (of.height, of.width, of.image_tokens)
    (conditioning,) = model.encode([PROMPT])
    assert conditioning.sequence.shape == (of.text_tokens, of.text_width)
    assert conditioning.pooled.shape == (of.pooled_width,)
    assert conditioning.sequence.isfinite().all() and conditioning.pooled.isfinite().all()


def _plain(value):
    return list(value) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("name", GEOMETRIES)
def test_flops_are_what_the_counter_counts(name):
    """At the true sizes, on the meta device; attention as two matrix products, so that it is counted."""
    of = GEOMETRIES[name]
    with torch.device("meta"):
        model = geometries.transformer(of)
        inputs = {
            "hidden_states": torch.empty(1, of.image_tokens, 4 * of.latent_channels),
            "timestep": torch.empty(1),
            "pooled_projections": torch.empty(1, of.pooled_width),
            "encoder_hidden_states": torch.empty(1, of.text_tokens, of.text_width),
            "txt_ids": torch.empty(of.text_tokens, 3),
            "img_ids": torch.empty(of.image_tokens, 3),
        }
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(**inputs)
    assert geometries.flops(name) == counter.get_total_flops()


@pytest.mark.parametrize(("make", "teraflops"), [("_autoencoder", 10.47), ("_tiny_autoencoder", 0.566)])
def test_flops_of_the_decoders(make, teraflops):
    """At 1024^2: FLUX.1's own, and TAEF1."""
    with torch.device("meta"):
        decoder = getattr(geometries, make)(GEOMETRIES["flux"])
        latents = torch.empty(1, 16, 128, 128)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        images = decoder.decode(latents).sample
    assert images.shape == (1, 3, 1024, 1024)
    assert counter.get_total_flops() / 1e12 == pytest.approx(teraflops, rel=1e-3)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_light_decoder_reads_the_same_latents(name):
    of = GEOMETRIES[name].shrunk(SHRINK)
    light = geometries.light_decoder(name, "cpu", torch.float32, SHRINK)
    model = FluxModel(geometries.pipeline(name, "cpu", torch.float32, SHRINK), light)
    latents = torch.randn(2, of.latent_channels, of.height // 8, of.width // 8)
    with torch.no_grad():
        images = model.preview(latents)
        assert images.shape == (2, 3, of.height, of.width) == model.decode(latents).shape
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 1e-3


def test_a_search_runs_through_the_engine(built):
    of, pipeline = built
    result = Engine(pipeline, lanes=1, threads=1, buckets=(1, 2)).generate(
        PROMPT,
        reward=geometries.clip_reward("cpu", torch.float32, shrink=24),
        nfe=4,
        steps=2,
        method="bon",
        height=of.height,
        width=of.width,
    )
    assert result.committed_nfe == 4 and result.pixels.shape == (3, of.height, of.width)
    assert result.pixels.isfinite().all() and result.pixels.std() > 0.02
    assert -1 <= result.reward <= 1 and result.invalid_rewards == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DEEP)
def test_euler_steps_at_full_depth_stay_of_moderate_size(name, dtype):
    model = FluxModel(geometries.pipeline(DEEP[name], "cpu", dtype))
    geometry, conditioning = model.geometry(), model.encode([PROMPT, "a blue triangle"])
    x = torch.randn(2, geometry.token, geometry.channel, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for step in range(4):
            tau = torch.full((2,), 1 - step / 4)
            velocity = model.velocity(x.to(dtype), tau, conditioning, torch.zeros(2), geometry)
            assert velocity.dtype == dtype and 0.3 < velocity.float().std() < 5
            x = x - velocity.float() / 4
        latents = model.pipeline._unpack_latents(x, geometry.height, geometry.width, 8)
        decoded = model.vae.decode(latents.to(dtype), return_dict=False)[0].float()
    assert 0.3 < x.std() < 5
    assert decoded.isfinite().all() and 0.1 < decoded.std() < 5


def test_the_velocity_depends_on_everything_that_goes_in():
    model = FluxModel(geometries.pipeline("flux", "cpu", torch.float32, shrink=24))
    geometry, (one, other) = model.geometry(), model.encode([PROMPT, "a blue triangle"])
    noise = torch.randn(2, geometry.token, geometry.channel, generator=torch.Generator().manual_seed(0))

    def velocity(x=noise[:1], tau=0.5, pooled=one.pooled, sequence=one.sequence):
        conditioning = [type(one)(pooled, sequence)]
        return model.velocity(x, torch.tensor([tau]), conditioning, torch.zeros(1), geometry)

    first = velocity()
    changes = ({"x": noise[1:]}, {"tau": 0.4}, {"pooled": other.pooled}, {"sequence": other.sequence})
    for change in changes:
        assert (velocity(**change) - first).abs().max() > 1e-3, change


def test_the_same_weights_every_time_and_no_parameter_left_unfilled():
    one, two = (geometries.pipeline("sd3", "cpu", torch.bfloat16, shrink=SHRINK) for _ in range(2))
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        first, second = getattr(one, part), getattr(two, part)
        state = second.state_dict()
        assert {p.dtype for p in first.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad or p.is_meta for p in first.parameters())
        for name, value in first.state_dict().items():
            assert torch.equal(value, state[name]), name
            constant = value.unique().numel() == 1
            assert constant == (value.ndim == 1), name  # norms and biases, and nothing else
    positions = dict(one.text_encoder.named_buffers())
    assert [p.tolist() for p in positions.values()] == [[list(range(geometries.POOLED_TOKENS))]]
    with pytest.raises(ModelError, match="running_mean"):
        geometries._made(lambda: nn.BatchNorm2d(2), torch.float32, torch.Generator())


def test_text_tokens_and_prompts():
    of = replace(GEOMETRIES["flux"].shrunk(24), text_tokens=48)
    model = FluxModel(geometries.pipeline(of, "cpu", torch.float32))
    assert model.encode([PROMPT])[0].sequence.shape[0] == 48
    for name in prompt_sets.SETS:
        for prompt in prompt_sets.load(name):
            model.check_prompt(prompt)
    model.check_prompt(" ".join(world.words()[:40]))
    with pytest.raises(RequestError, match="unicorn"):
        model.check_prompt("a unicorn")
    longer = replace(of, text_tokens=96)
    assert geometries.flops(longer) > geometries.flops(of) and geometries.parameters(longer) == geometries.parameters(
        of
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_clip_reward_scores_each_image_by_itself(dtype):
    reward = geometries.clip_reward("cpu", dtype, shrink=12)
    assert isinstance(reward, rewards.Reward) and rewards.make(reward) is reward
    reward.check("anything at all")
    images = torch.rand(3, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    images[1] = 0.5
    images.requires_grad_()
    scores = reward(images, ["a"] * 3)
    assert scores.shape == (3,) and scores.dtype == torch.float32
    assert (scores.abs() <= 1).all() and len(set(scores.tolist())) == 3
    torch.testing.assert_close(
        reward(images[1:2], ["b"]), scores[1:2], atol=1e-4 if dtype == torch.float32 else 0.02, rtol=0
    )
    scores.sum().backward()
    assert images.grad.isfinite().all() and images.grad.abs().max() > 0
    assert [b.tolist() for b in reward.encoder.buffers()] == [[list(range(257))]]


def test_the_clip_reward_is_as_large_as_vit_l_14(monkeypatch):
    made = []

    def count(build, dtype, generator):
        with torch.device("meta"):
            made.append(build())
        return made[0]

    monkeypatch.setattr(geometries, "_made", count)
    geometries.clip_reward("cpu", torch.bfloat16)
    assert sum(p.numel() for p in made[0].parameters()) == 303_966_208
    assert isinstance(made[0], CLIPVisionModelWithProjection) and isinstance(made[0].config, CLIPVisionConfig)


def test_what_cannot_be_built_is_refused():
    with pytest.raises(RequestError, match=r"'sdxl'.*shapes, sd3, flux"):
        geometries.pipeline("sdxl", "cpu", torch.float32)
    for by in (0, -1):
        with pytest.raises(RequestError, match="shrink"):
            geometries.pipeline("sd3", "cpu", torch.float32, shrink=by)
        with pytest.raises(RequestError, match="shrink"):
            geometries.clip_reward("cpu", torch.float32, shrink=by)
