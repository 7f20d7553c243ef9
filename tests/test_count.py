"""The scene parser against the renderer that it inverts, and against images that are made to fool it."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from count_reference import parsed
from scipy import ndimage
from torch import Tensor

import rollflow
from rollflow import rewards
from rollflow.errors import RequestError
from rollflow.models import world
from rollflow.rewards import count
from rollflow.rewards.count import CountReward, parse

Y, X = np.mgrid[: world.SIZE, : world.SIZE] + 0.5
COLORS = [np.array(world.PALETTE[color]) for color in world.COLORS]
Rng = np.random.Generator


def scenes(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Rendered scenes and their true counts, [scene, 13]."""
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(count):
        total = int(rng.integers(1, world.MAX_OBJECTS + 1))
        groups = world.random_groups(rng, total, int(rng.integers(1, min(3, total) + 1)))
        drawn.append(world.random_scene(rng, groups))
    return world.render_batch(drawn), torch.tensor(np.array([[*scene.counts(), 0] for scene in drawn]))


def exact(images: Tensor, counts: Tensor) -> float:
    return (parse(images) == counts).all(1).float().mean().item()


def perturbed(images: Tensor, blur: float, noise: float) -> Tensor:
    blurred = ndimage.gaussian_filter(images.numpy(), (0, 0, blur, blur))
    return torch.from_numpy(blurred) + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


def as_batch(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images).astype(np.float32)).permute(0, 3, 1, 2)


def canvas() -> np.ndarray:
    return np.broadcast_to(np.array(world.CANVAS), (*X.shape, 3)).copy()


def paint(ink: np.ndarray, color: np.ndarray, on: np.ndarray | None = None) -> np.ndarray:
    on = canvas() if on is None else on
    return (1 - ink[..., None]) * on + ink[..., None] * color


# -- what it must read -------------------------------------------------------------------------------------------------


def test_rendered_scenes_are_read_back():
    assert exact(*scenes(20_001, 2_000)) >= 0.99


@pytest.mark.parametrize(("blur", "noise"), [(0.6, 0.02), (0.7, 0.03), (0.8, 0.03), (0.0, 0.05)])
def test_small_perturbations_change_nothing(blur: float, noise: float):
    images, counts = scenes(20_002, 500)
    assert exact(perturbed(images, blur, noise), counts) >= 0.98


def test_reconstructions_of_the_built_in_autoencoder():
    folder = Path(rollflow.__file__).parent / "models" / "shapes" / "vae"
    if not (folder / "config.json").exists():
        pytest.skip("the built-in checkpoint is not part of this installation")
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    images, counts = scenes(20_003, 256)
    with torch.no_grad():
        restored = vae.decode(vae.encode(2 * images - 1).latent_dist.mode()).sample / 2 + 0.5
    assert exact(restored, counts) >= 0.97


def test_a_batch_is_read_like_its_images():
    images, _ = scenes(20_004, 70)  # more than a chunk
    images[3], images[40] = torch.rand(3, 64, 64), images[0, 0, 0, 0]
    assert torch.equal(parse(images), torch.cat([parse(image[None]) for image in images]))


def test_it_reads_what_its_first_version_read(monkeypatch):
    """All that is faster since gives the same bits, on scenes, blurred ones, noise and mess, however they are cut."""
    images, _ = scenes(20_006, 60)
    noise = torch.Generator().manual_seed(2)
    dim = 0.6 * images + 0.4 * torch.rand(images.shape, generator=noise)
    everything = [
        images,
        perturbed(images, 1.1, 0.06),
        dim,
        torch.rand(9, 3, 64, 64, generator=noise),
        *mess().values(),
    ]
    batch = torch.cat(everything)
    expected = parsed(batch.reshape(len(batch), 3, -1).numpy())
    assert len({*map(tuple, expected.tolist())}) > 60
    for threads, least in ((1, 8), (3, 8), (64, 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(count, "LEAST", least)
        assert parse(batch).numpy().tolist() == expected.tolist()


def test_a_batch_is_read_on_the_cores_that_torch_would_use(monkeypatch):
    """By parts that wait for one another, which a single thread could not."""
    together, read = threading.Barrier(2, timeout=20), count._parse

    def waiting(images):
        together.wait()
        return read(images)

    monkeypatch.setattr(count, "_parse", waiting)
    images, counts = scenes(20_007, 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert (parse(images) == counts).all(1).float().mean() >= 0.9
    monkeypatch.setattr(count, "_parse", lambda images: read(images) if len(images) == 16 else pytest.fail("in parts"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    parse(images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_dtype_and_layout(dtype: torch.dtype):
    images, counts = scenes(20_005, 20)
    assert exact(images.to(dtype).to(memory_format=torch.channels_last), counts) == 1


def test_nothing_is_nothing():
    assert parse(as_batch([canvas()])).sum() == 0
    assert parse(torch.zeros(0, 3, 64, 64)).shape == (0, 13)


# -- what must not fool it ---------------------------------------------------------------------------------------------


def place(rng: Rng) -> tuple[np.ndarray, np.ndarray, float, str, np.ndarray, np.ndarray]:
    """Offsets from a centre, a radius, a shape and two colours."""
    x, y = rng.uniform(20, 44, 2)
    first, second = rng.permutation(4)[:2]
    return X - x, Y - y, rng.uniform(5.5, 9), str(rng.choice(world.SHAPES)), COLORS[first], COLORS[second]


def turned(rng: Rng, dx: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    angle = rng.uniform(0, 2 * np.pi)
    return dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)


def two_colors(rng: Rng) -> np.ndarray:
    dx, dy, r, shape, first, second = place(rng)
    side = turned(rng, dx, dy)[0][..., None] > rng.uniform(-0.4, 0.4) * r
    return paint(world.coverage(shape, dx, dy, r), np.where(side, first, second))


def from_color_to_color(rng: Rng) -> np.ndarray:
    dx, dy, r, shape, first, second = place(rng)
    share = np.clip(0.5 + dx / (2 * r), 0, 1)[..., None]
    return paint(world.coverage(shape, dx, dy, r), share * first + (1 - share) * second)


def from_color_to_canvas(rng: Rng) -> np.ndarray:
    dx, dy, r, shape, color, _ = place(rng)
    return paint(world.coverage(shape, dx, dy, r) * np.clip(0.5 + dx / (2 * r), 0, 1), color)


def scrap(rng: Rng) -> np.ndarray:
    dx, dy, _, shape, color, _ = place(rng)
    return paint(world.coverage(shape, dx, dy, rng.uniform(1.8, 3.5)), color)


def giant(rng: Rng) -> np.ndarray:
    dx, dy, _, shape, color, _ = place(rng)
    return paint(world.coverage(shape, dx, dy, rng.uniform(12, 14)), color)


def ghost(rng: Rng) -> np.ndarray:
    dx, dy, r, shape, color, _ = place(rng)
    return paint(rng.uniform(0.25, 0.65) * world.coverage(shape, dx, dy, r), color)


def ring(rng: Rng) -> np.ndarray:
    dx, dy, r, shape, color, _ = place(rng)
    hole = world.coverage(shape, dx, dy, rng.uniform(0.3, 0.8) * r)
    return paint(world.coverage(shape, dx, dy, r) - hole, color)


def half(rng: Rng) -> np.ndarray:
    dx, dy, r, _, color, _ = place(rng)
    return paint(np.minimum(world.coverage("circle", dx, dy, r), np.clip(0.5 - turned(rng, dx, dy)[0], 0, 1)), color)


def ellipse(rng: Rng) -> np.ndarray:
    dx, dy, r, _, color, _ = place(rng)
    (u, v), stretch = turned(rng, dx, dy), rng.uniform(1.35, 2) ** 0.5
    return paint(np.clip(0.5 - (np.hypot(u / stretch, v * stretch) - r), 0, 1), color)


def rectangle(rng: Rng) -> np.ndarray:
    dx, dy, r, _, color, _ = place(rng)
    return paint(np.clip(0.5 - (np.maximum(abs(dx) / 1.2, abs(dy) * 1.2) - 0.886 * r), 0, 1), color)


def tilted_square(rng: Rng) -> np.ndarray:
    dx, dy, r, _, color, _ = place(rng)
    return paint(world.coverage("square", (dx + dy) / 2**0.5, (dx - dy) / 2**0.5, r), color)


def triangle_on_its_tip(rng: Rng) -> np.ndarray:
    dx, dy, r, _, color, _ = place(rng)
    return paint(world.coverage("triangle", dx, -dy, r), color)


def merged(rng: Rng) -> np.ndarray:
    dx, dy, r, shape, color, _ = place(rng)
    u, v = turned(rng, np.full_like(dx, 1.6 * r), np.zeros_like(dy))
    first = paint(world.coverage(shape, dx, dy, r), color)
    return paint(world.coverage(str(rng.choice(world.SHAPES)), dx - u, dy - v, r), color, on=first)


def foreign_color(rng: Rng) -> np.ndarray:
    dx, dy, r, shape, _, _ = place(rng)
    foreign = [(0, 0, 0), (0.5, 0.5, 0.5), (0.6, 0.1, 0.7), (0.1, 0.7, 0.8), (0.4, 0.25, 0.1), (0.45, 0.08, 0.08)]
    return paint(world.coverage(shape, dx, dy, r), np.array(foreign[rng.integers(6)]))


def melted(rng: Rng) -> np.ndarray:
    """A blob of smooth noise of an object's size."""
    while True:
        field = ndimage.gaussian_filter(rng.normal(size=X.shape), 3.0)
        ink = np.clip(0.5 + 4 * (field / field.std() - 1.6), 0, 1)
        labels, _ = ndimage.label(ink > 0.5)
        sizes = np.bincount(labels.reshape(-1))[1:]
        if len(sizes) and 80 < sizes.max() < 250:
            return paint(ink * ndimage.binary_dilation(labels == 1 + sizes.argmax()), COLORS[rng.integers(4)])


def cut_by_the_border(rng: Rng) -> np.ndarray:
    _, dy, r, shape, color, _ = place(rng)
    return paint(world.coverage(shape, X - rng.uniform(-0.3, 0.3) * r, dy, r), color)


FAKES = (two_colors, from_color_to_color, from_color_to_canvas, scrap, giant, ghost, ring, half, ellipse, rectangle)
FAKES += (tilted_square, triangle_on_its_tip, merged, foreign_color, melted, cut_by_the_border)


@pytest.mark.parametrize("fake", FAKES, ids=lambda f: f.__name__)
def test_fakes_are_unrecognised(fake: Callable[[Rng], np.ndarray]):
    rng = np.random.default_rng(7)
    counts = parse(as_batch([fake(rng) for _ in range(100)]))
    assert (counts[:, -1] >= 1).float().mean() >= 0.97
    assert (counts[:, :-1].sum(1) == 0).float().mean() >= 0.97


def test_a_halo_is_unrecognised_but_not_its_object():
    disc = [world.coverage("circle", X - 30, Y - 30, r) for r in (7.0, 12.0)]
    counts = parse(as_batch([paint(disc[0], COLORS[0], on=paint(0.3 * disc[1], COLORS[0]))]))[0]
    assert counts[world.CLASSES.index(("red", "circle"))] == 1
    assert counts[-1] == 1


def mess() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    empty = as_batch([canvas()])
    broken = empty.clone()
    broken[0, 0, 5, 5] = torch.nan
    return {
        "uniform noise": torch.rand(1, 3, 64, 64, generator=rng),
        "normal noise": (empty + 0.3 * torch.randn(1, 3, 64, 64, generator=rng)).clamp(0, 1),
        "grey": torch.full((1, 3, 64, 64), 0.5),
        "all red": torch.tensor(COLORS[0]).float().view(1, 3, 1, 1).expand(1, 3, 64, 64),
        "tinted": 0.7 * empty + 0.3 * torch.tensor(COLORS[1]).float().view(1, 3, 1, 1),
        "specks": as_batch([paint((np.random.default_rng(0).random(X.shape) < 0.03) * 1.0, COLORS[2])]),
        "not a number": broken,
        "infinite": torch.full((1, 3, 64, 64), torch.inf).mul(torch.tensor([-1.0, 1, 1]).view(1, 3, 1, 1)),
    }


@pytest.mark.parametrize("name", mess())
def test_mess_scores_below_an_empty_canvas(name: str):
    reward, prompt = CountReward(), ["two red circles"]
    assert (reward(mess()[name], prompt) < reward(as_batch([canvas()]), prompt)).all()


# -- the reward --------------------------------------------------------------------------------------------------------


def test_the_reward_is_minus_the_residual_sum_of_squares():
    scene = world.random_scene(np.random.default_rng(0), [(2, "red", "circle"), (1, "blue", "square")])
    image = world.render_batch([scene])
    prompts = ["two red circles and one blue square", "three red circles", "one yellow triangle"]
    reward = CountReward()
    assert reward(image.expand(3, -1, -1, -1), prompts).tolist() == [0, -2, -6]
    assert reward.exact(image.expand(3, -1, -1, -1), prompts).tolist() == [True, False, False]


def test_what_it_cannot_judge_is_refused_with_the_reason():
    reward = CountReward()
    with pytest.raises(RequestError, match="64 x 64"):
        reward(torch.zeros(1, 3, 32, 64), ["a red circle"])
    with pytest.raises(RequestError, match="two red circles"):
        reward.check("a cat")
    reward.check("a red circle")


def test_make():
    assert set(rewards.names()) >= {"count", "classifier"}
    made = rewards.make("count")
    assert isinstance(made, rewards.Reward) and rewards.make(made) is made
    assert rewards.held_out(made).name == "classifier"
    with pytest.raises(RequestError, match=r"beauty.*count, classifier"):
        rewards.make("beauty")
    with pytest.raises(RequestError, match="an instance"):
        rewards.make(CountReward)


def test_a_function_is_a_reward():
    def brightness(images, prompts):
        return images.mean((1, 2, 3))

    reward = rewards.make(brightness)
    assert reward.name == "brightness" and rewards.held_out(reward) is None
    reward.check("anything at all")
    assert reward(torch.ones(2, 3, 8, 8), ["", ""]).tolist() == [1, 1]
    with pytest.raises(RequestError, match=r"\[2, 3\]"):
        rewards.make(lambda images, prompts: images.mean((2, 3)))(torch.ones(2, 3, 8, 8), ["", ""])
