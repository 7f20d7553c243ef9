"""The world that moves, the reward that reads it back, and the built-in video model, with true guidance."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image
from scipy import ndimage

from rollflow import rewards
from rollflow.engine import Engine
from rollflow.errors import RequestError
from rollflow.models import adapt, folder, moving, unaided, world
from rollflow.request import Request
from rollflow.rewards.motion import MotionReward, read

PROMPT = "two red circles move left"
ODE = {"method": "bon", "interpolant": "linear", "diffusion": 0.0, "grid": "model", "steps": 6}
reward = MotionReward()


def clip(groups, seed=0):
    """A rendered clip [1, frame, 3, 32, 32]."""
    return torch.from_numpy(moving.render(moving.random_clip(np.random.default_rng(seed), groups)))[None]


# -- the world ---------------------------------------------------------------------------------------------------------


def test_a_prompt_is_read_as_it_was_written():
    groups = [(2, "red", "left"), (1, "blue", "up")]
    assert moving.prompt(groups) == "two red circles move left and one blue circle moves up"
    assert moving.parse_prompt(moving.prompt(groups)) == groups
    assert moving.parse_prompt("A green circle moves down") == [(1, "green", "down")]
    assert set(moving.prompt(groups).split()) <= set(moving.words())


@pytest.mark.parametrize(
    "prompt",
    [
        "two red circles",
        "a cat moves left",
        "two red squares move left",
        "two red circles move left and a blue circle",
        "two red circles move left or right",
        "three red circles move left and one blue circle moves up",
    ],
)
def test_a_prompt_that_is_none_of_this_world_is_refused_in_one_line(prompt):
    with pytest.raises(RequestError, match="prompt") as refused:
        reward.check(prompt)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_circles_keep_apart_and_inside():
    rng = np.random.default_rng(0)
    for _ in range(100):
        groups = moving.parse_prompt(moving.random_prompt(rng))
        x, y = moving.random_clip(rng, groups).paths()
        assert x.shape == (sum(group[0] for group in groups), moving.FRAMES)
        assert min(x.min(), y.min()) > moving.RADII[0] and max(x.max(), y.max()) < moving.SIZE - moving.RADII[0]
        apart = np.hypot(x[:, None] - x, y[:, None] - y) + 99 * np.eye(len(x))[:, :, None]
        assert apart.min() > 2 * moving.RADII[0]


# -- the reward --------------------------------------------------------------------------------------------------------


def test_rendered_clips_are_exactly_right():
    rng = np.random.default_rng(20_001)
    prompts = [moving.random_prompt(rng) for _ in range(200)]
    clips = torch.stack([clip(moving.parse_prompt(p), i)[0] for i, p in enumerate(prompts)])
    assert reward.exact(clips, prompts).float().mean() >= 0.99
    blurred = torch.from_numpy(ndimage.gaussian_filter(clips.numpy(), (0, 0, 0, 0.5, 0.5)))
    noise = 0.03 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    assert reward.exact((blurred + noise).clamp(0, 1), prompts).float().mean() >= 0.9
    assert reward(clips, prompts[1:] + prompts[:1]).mean() < -4  # of one another's prompts


def test_each_error_costs_what_the_formula_says():
    clips = clip([(2, "red", "left")])
    assert reward(clips, [PROMPT]) == 0
    assert reward(clips, ["one red circle moves left"]) == -2  # one too many, in the frames and on the move
    assert reward(clips, ["three red circles move left"]) == -2
    assert reward(clips, ["two red circles move right"]) == -8  # (0 - 2)^2 and (2 - 0)^2
    assert reward(clips.flip(1), [PROMPT]) == -8
    assert reward(clips[:, :1].expand(-1, moving.FRAMES, -1, -1, -1), [PROMPT]) == -8  # still
    assert reward(clips, ["two blue circles move left"]) == -16
    one = clip([(1, "green", "down")])
    assert reward(one, ["one green circle moves down"]) == 0
    assert reward(one, ["one green circle moves up"]) == -2
    gone = one.clone()
    gone[:, 6:] = torch.tensor(world.CANVAS).view(3, 1, 1)  # for 3 of 9 frames
    assert reward(gone, ["one green circle moves down"]).item() == pytest.approx(-1 - 3 / 9)
    both = clip([(1, "red", "left"), (2, "blue", "up")])
    assert reward(both, ["one red circle moves left and two blue circles move up"]) == 0
    assert reward(both, ["one red circle moves up and two blue circles move left"]) == -2 - 8


def test_mess_is_unrecognised():
    one = clip([(1, "red", "left")])
    canvas = torch.tensor(world.CANVAS).view(3, 1, 1)
    ghost = canvas + 0.4 * (one - canvas)
    scrap = one.clone()
    scrap[..., -3:, :2] = torch.tensor(world.PALETTE["blue"]).view(3, 1, 1)
    halves = torch.where(torch.arange(moving.SIZE) % 4 < 2, one, one.flip(2))  # stripes of two colours
    for mess in (ghost, scrap, halves):
        assert read(mess[0].numpy()).counts()[:, -1].min() >= 1
        assert reward(mess, ["one red circle moves left"]) <= -1


def test_what_is_no_clip_of_this_size_is_refused():
    for shape in ((1, 3, 32, 32), (1, 1, 3, 32, 32), (1, 9, 3, 64, 64)):
        with pytest.raises(RequestError, match=r"clips \[row, frame, 3, 32, 32\]") as refused:
            reward(torch.zeros(shape), [PROMPT])
        assert "\n" not in str(refused.value)
    assert isinstance(rewards.make("motion"), MotionReward)


# -- the model ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline():
    place = folder("shapes-video")
    pipeline = WanPipeline.from_pretrained(place, **unaided.networks(place))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained("shapes-video", buckets=(1, 8), lanes=1, threads=1) as engine:
        yield engine


def ask(engine, prompts=(PROMPT,), seed=0, **fields):
    requests = [Request(p, reward="motion", seed=seed + i, **fields) for i, p in enumerate(prompts)]
    return engine.generate(requests)


def test_the_folder_is_small_names_no_machine_and_loads_without_us(pipeline):
    files = [file for file in folder("shapes-video").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 3 * 2**20
    texts = [file.read_text() for file in files if file.suffix == ".json"]
    assert not any(place in text for text in texts for place in ("/tmp", "/home", "/work", "/root", "build/"))
    assert all("_name_or_path" not in json.loads(text) for text in texts)
    assert {pipeline.transformer.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    call = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": 3.0}
    assert pipeline(PROMPT, **call, output_type="np").frames.shape == (1, 9, 32, 32, 3)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("method", ["bon", "rbf"])
def test_a_search_runs_end_to_end_and_is_no_worse_than_its_first_sample(engine, method, guidance):
    fields = {**ODE, "method": method, "diffusion": 3.0 if method == "rbf" else 0.0, "nfe": 60}
    (result,) = ask(engine, guidance=guidance, **fields)
    assert result.pixels.shape == (9, 3, 32, 32) and len(result.frames) == 9
    assert result.committed_nfe == 60 and result.network_rows == result.executed_nfe * (2 if guidance > 1 else 1)
    assert result.reward == reward(result.pixels[None], [PROMPT]).item()
    (first,) = ask(engine, guidance=guidance, **ODE, nfe=6)
    assert result.reward >= first.reward


def test_a_clip_is_saved_frame_by_frame(engine, tmp_path):
    (result,) = ask(engine, **ODE, nfe=12, guidance=3.0)
    file = result.save(tmp_path / "clip.gif")
    with Image.open(file) as gif:
        assert gif.n_frames == 9 and gif.size == (32, 32)
        for i, frame in enumerate(result.frames):
            gif.seek(i)
            seen, made = (np.asarray(one.convert("RGB"), float) for one in (gif, frame))
            assert abs(seen - made).mean() < 4  # of 255: a GIF has 256 colours


def test_guidance_makes_samples_better(engine):
    prompts = [moving.random_prompt(np.random.default_rng(i)) for i in range(20)]
    found = {g: [r.reward for r in ask(engine, prompts, **ODE, nfe=6, guidance=g)] for g in (1.0, 3.0)}
    exact = {guidance: sum(reward == 0 for reward in rewards) for guidance, rewards in found.items()}
    assert exact[3.0] > exact[1.0] and np.mean(found[3.0]) > np.mean(found[1.0]), (exact, found)


def test_threads_do_not_disturb_one_another_in_the_autoencoder(pipeline):
    """Wan's keeps a cache of frames in its attributes while it works."""
    model = adapt(pipeline)
    geometry = model.geometry(32, 32, 9)
    latents = torch.randn(8, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    alone = model.decode(latents)
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(model.decode, [latents] * 4))
        states = list(threads.map(lambda clip: model.state(clip, geometry), alone))
    assert all(torch.equal(one, alone) for one in together)
    assert all(torch.equal(one, model.state(clip, geometry)) for one, clip in zip(states, alone, strict=True))


def test_sizes_that_are_not_named_are_the_models_own(engine):
    assert ask(engine, **ODE, nfe=6)[0].pixels.shape == (9, 3, 32, 32)
    assert ask(engine, **ODE, nfe=6, frames=5)[0].pixels.shape == (5, 3, 32, 32)
