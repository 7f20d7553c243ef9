"""The baselines do the engine's work: the same decisions one at a time, the same images by diffusers."""

import pytest
import torch
from diffusers import FluxPipeline

from rollflow import kernels, rewards
from rollflow.bench import baselines, prompt_sets
from rollflow.engine import Engine
from rollflow.errors import RequestError
from rollflow.models import folder, traits
from rollflow.models.flux import FluxModel
from rollflow.request import Request

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = prompt_sets.load("medium", 4)


def load():
    return FluxPipeline.from_pretrained(folder("shapes"), dtype=torch.float32)


@pytest.fixture(scope="module")
def pipeline():
    """What no engine holds."""
    return load()


@pytest.fixture(scope="module")
def engine():
    return Engine(load(), buckets=(8,), lanes=1, threads=1, traits=traits("shapes"))


def of_the_engine(request):
    """The noise that the engine draws for this request, by key."""
    return lambda key: kernels.noise(torch.tensor([request.seed]), torch.tensor([key]), 16, 32)[0]


def check(pipeline, engine, requests):
    for request, ours in zip(requests, engine.generate(requests), strict=True):
        alone = baselines.sequential_rbf(pipeline, request, engine.traits, of_the_engine(request))
        assert list(alone.history) == ours.history  # levels, parents, times and rewards
        assert alone.committed_nfe == ours.committed_nfe == request.nfe
        assert alone.rewards == (ours.reward,)
        assert (alone.images, alone.decodes) == (1, request.nfe + 1)


@pytest.mark.parametrize("path", ["vp", "linear"])
def test_the_sequential_loop_decides_as_the_engine_does(pipeline, engine, path):
    check(pipeline, engine, [Request(p, "count", "rbf", 30, 5, path, seed=i) for i, p in enumerate(PROMPTS)])


def test_the_corners_of_the_loop(pipeline, engine):
    check(
        pipeline,
        engine,
        [
            Request(PROMPTS[0], "count", "rbf", 5, 1, seed=1),
            Request(PROMPTS[1], "count", "rbf", 6, 2, seed=2, options={"initial": 3}),
            Request(PROMPTS[2], "count", "rbf", 4, 4, seed=-3),
            Request(PROMPTS[3], "count", "rbf", 20, 5, seed=4, finalists=1),
            Request(PROMPTS[0], "count", "rbf", 20, 5, seed=5, finalists=3, times=[1.0, 0.8, 0.6, 0.4, 0.2]),
        ],
    )


@pytest.mark.filterwarnings("ignore:the reward dull gave")
def test_trust_and_scores_that_are_no_numbers(pipeline):
    """By this reward the first particles would win, were they trusted; some of its scores count as worst."""

    def dull(images, prompts):
        mean = images.mean((1, 2, 3))
        return torch.where((mean * 1000).int() % 2 == 0, torch.nan, -mean)

    careful = Engine(load(), buckets=(1,), lanes=1, threads=1, traits=traits("shapes-base"))
    request = Request(PROMPTS[0], dull, "rbf", 16, interpolant="linear", seed=3, times=[1.0, 0.8, 0.6, 0.4, 0.2])
    ours = careful.generate(request)
    alone = baselines.sequential_rbf(pipeline, request, careful.traits, of_the_engine(request))
    assert [(r.level, r.parent) for r in alone.history] == [(r.level, r.parent) for r in ours.history]
    expected = torch.tensor([r.reward for r in ours.history])
    assert 0 < expected.isnan().sum() < 16 and alone.rewards[0] < expected[~expected.isnan()].max() - 5e-4
    torch.testing.assert_close(torch.tensor([r.reward for r in alone.history]), expected, equal_nan=True)
    assert alone.rewards[0] == pytest.approx(ours.reward, abs=1e-5)


def test_torchs_noise_by_default(pipeline):
    request = Request(PROMPTS[0], "count", "rbf", 12, 3, seed=7)
    first, again = (baselines.sequential_rbf(pipeline, request) for _ in range(2))
    assert first == again and first.committed_nfe == 12
    assert first.history != baselines.sequential_rbf(pipeline, Request(PROMPTS[0], "count", "rbf", 12, 3)).history


@pytest.mark.parametrize("asked", [{"method": "svdd"}, {"finish": 1}, {"stop_at": 0.0}, {"options": {"gradient": 1.0}}])
def test_what_is_not_in_the_loop(pipeline, asked):
    with pytest.raises(RequestError, match="the sequential loop"):
        baselines.sequential_rbf(pipeline, Request(PROMPTS[0], **{"method": "rbf", **asked}))


class Watching(rewards.FunctionReward):
    """Brightness, and all images that it was shown."""

    def __init__(self):
        super().__init__(lambda images, prompts: images.mean((1, 2, 3)))
        self.shown = []

    def __call__(self, images, prompts):
        self.shown.append((images.clone(), list(prompts)))
        return super().__call__(images, prompts)


def test_best_of_n_by_diffusers(pipeline, engine):
    watching, steps = Watching(), 3
    found = baselines.diffusers_bon(pipeline, PROMPTS[:2], watching, 16, steps, 3, seed=0)
    assert (found.committed_nfe, found.images, found.decodes) == (2 * 15, 2, 2 * 5)
    assert [len(images) for images, _ in watching.shown] == [3, 2, 1] * 2
    generator = torch.Generator().manual_seed(0)
    for i, prompt in enumerate(PROMPTS[:2]):
        noises = [torch.randn(count, 8, 8, 8, generator=generator) for count in (3, 2)]
        latents = torch.cat([FluxPipeline._pack_latents(noise, len(noise), 8, 8, 8) for noise in noises])
        (*sampled, (best, _)) = watching.shown[3 * i : 3 * i + 3]
        assert all(prompts == [prompt] * len(images) for images, prompts in sampled)
        images = torch.cat([images for images, _ in sampled])
        alone = [Request(prompt, watching.function, "bon", steps, steps, "linear", latents=z) for z in latents]
        torch.testing.assert_close(images, torch.stack([r.pixels for r in engine.generate(alone)]), atol=1e-4, rtol=0)
        winner = images[images.mean((1, 2, 3)).argmax()]
        torch.testing.assert_close(best[0], (winner * 255).round() / 255)
        assert found.rewards[i] == pytest.approx(best.mean().item())
    with pytest.raises(RequestError, match="nfe=2"):
        baselines.diffusers_bon(pipeline, PROMPTS, watching, 2, 3, 1)


def test_the_bare_parts():
    model, reward = FluxModel(load()), Watching()  # of which nothing is recorded, so that hooks see it
    rows = []
    hooks = [
        model.transformer.register_forward_hook(lambda module, args, out: rows.append(len(out[0]))),
        model.vae.decoder.register_forward_hook(lambda module, args, out: rows.append(tuple(out.shape))),
    ]
    baselines.bare_forward(model, 3)()
    baselines.bare_decode(model, 2)()
    baselines.bare_decode(model, 1, height=32, width=96)()
    for hook in hooks:
        hook.remove()
    assert rows == [3, (2, 3, 64, 64), (1, 3, 32, 96)]
    baselines.bare_reward(reward, torch.rand(2, 3, 64, 64), PROMPTS[:2])()
    assert reward.shown[0][1] == PROMPTS[:2]
    with pytest.raises(RequestError, match="no light decoder"):
        baselines.bare_decode(model, 1, preview=True)
    with pytest.raises(RequestError, match="bucket=0"):
        baselines.bare_forward(model, 0)
