"""Trains the held-out judge: `python -m rollflow.bench.train_classifier`, less than ten minutes of one CPU core.

Scenes are rendered as training goes, none is seen twice. Half of them hold *distractors*, which the network must put
into its 13th class: objects of two colours, scraps, ghosts, rings, halves, ellipses, melted outlines and objects that
are grown together. All are blurred, shifted in colour, warped and made noisy at random, as an autoencoder may do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from rollflow.models import world
from rollflow.rewards.classifier import CHANNELS, STRIDE, WEIGHTS, CountNet

CELLS = world.SIZE // STRIDE
OTHER = CHANNELS - 1
_Y, _X = np.mgrid[: world.SIZE, : world.SIZE].astype(np.float32) + 0.5
_COLORS = np.array([world.PALETTE[color] for color in world.COLORS], np.float32)

Rng = np.random.Generator


@dataclass(frozen=True)
class Recipe:
    """Settings of the training run."""

    out: Path = WEIGHTS
    """Where the weights (float16) go."""
    steps: int = 2_000
    batch: int = 64
    rate: float = 4e-3
    seed: int = 0
    test: int = 2_000
    """Fresh scenes that the accuracy is measured on."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def random_scene(rng: Rng) -> world.Scene:
    """One to nine objects in one to three classes, every number equally often."""
    total = int(rng.integers(1, world.MAX_OBJECTS + 1))
    return world.random_scene(rng, world.random_groups(rng, total, int(rng.integers(1, min(3, total) + 1))))


# Distractors: each draws something of radius about r at offsets (dx, dy) of its centre: ink [64, 64], colour [..., 3].
Drawing = tuple[np.ndarray, np.ndarray]


def _any(rng: Rng) -> str:
    return world.SHAPES[rng.integers(len(world.SHAPES))]


def _color(rng: Rng) -> np.ndarray:
    return _COLORS[rng.integers(len(_COLORS))]


def _side(rng: Rng, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Signed distance from a line through the centre, in a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    return dx * np.cos(angle) + dy * np.sin(angle)


def two_colors(rng: Rng, dx: np.ndarray, dy: np.ndarray, r: float) -> Drawing:
    """A shape that is half of one colour and half of another, with a sharp or a soft border."""
    first, second = _COLORS[rng.permutation(len(_COLORS))[:2]]
    share = np.clip(0.5 + rng.choice([0.1, 1.0]) * (_side(rng, dx, dy) + rng.uniform(-0.35, 0.35) * r), 0, 1)[..., None]
    return world.coverage(_any(rng), dx, dy, r), share * first + (1 - share) * second


def scrap(rng: Rng, dx: np.ndarray, dy: np.ndarray, r: float) -> Drawing:
    """A shape that is too small."""
    return world.coverage(_any(rng), dx, dy, rng.uniform(1.5, 3.2)), _color(rng)


def ghost(rng: Rng, dx: np.ndarray, dy: np.ndarray, r: float) -> Drawing:
    """A shape that is hardly there."""
    return rng.uniform(0.25, 0.55) * world.coverage(_any(rng), dx, dy, r), _color(rng)


def ring(rng: Rng, dx: np.ndarray, dy: np.ndarray, r: float) -> Drawing:
    """A shape with a hole."""
    shape = _any(rng)
    inner = world.coverage(shape, dx, dy, rng.uniform(0.35, 0.7) * r)
    return world.coverage(shape, dx, dy, r) - inner, _color(rng)


def half(rng: Rng, dx: np.ndarray, dy: np.ndarray, r: float) -> Drawing:
    """Half a disc."""
    return np.minimum(world.coverage("circle", dx, dy, r), np.clip(0.5 - _side(rng, dx, dy), 0, 1)), _color(rng)


def ellipse(rng: Rng, dx: np.ndarray, dy: np.ndarray, r: float) -> Drawing:
    """A disc or a square that is clearly stretched along a random direction."""
    stretch, angle = rng.uniform(1.4, 2.2) ** 0.5, rng.uniform(0, np.pi)
    u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    return world.coverage(rng.choice(["circle", "square"]), u / stretch, v * stretch, r / 1.2), _color(rng)


def melted(rng: Rng, dx: np.ndarray, dy: np.ndarray, r: float) -> Drawing:
    """A blob whose outline wanders: radius r (1 + sum of a few harmonics)."""
    angle, waves = np.arctan2(dy, dx), 0.0
    for harmonic in (2, 3, 4):
        waves = waves + rng.uniform(0.05, 0.2) * np.cos(harmonic * angle + rng.uniform(0, 2 * np.pi))
    wobble = waves / max(1e-3, np.abs(waves).max()) * rng.uniform(0.28, 0.45)
    return np.clip(0.5 - (np.hypot(dx, dy) - 0.8 * r * (1 + wobble)), 0, 1), _color(rng)


DISTRACTORS: tuple[Callable[..., Drawing], ...] = (two_colors, scrap, ghost, ring, half, ellipse, melted)


def _merge(rng: Rng, scene: world.Scene, image: np.ndarray) -> tuple[float, float] | None:
    """Grows a second object onto the first one of the scene, if there is room; returns the centre of the pair."""
    r, angle = rng.uniform(5.0, 8.0), rng.uniform(0, 2 * np.pi)
    away = rng.uniform(0.75, 0.95) * (r + scene.radius[0])
    x, y = scene.x[0] + away * np.cos(angle), scene.y[0] + away * np.sin(angle)
    free = np.hypot(scene.x[1:] - x, scene.y[1:] - y) > 1.35 * (scene.radius[1:] + r) + 2
    if not (free.all() and 10 < x < world.SIZE - 10 and 10 < y < world.SIZE - 10):
        return None
    color = _COLORS[scene.kind[0] // len(world.SHAPES)] if rng.random() < 0.6 else _color(rng)
    ink = world.coverage(_any(rng), _X - x, _Y - y, r)[..., None]
    image[:] = (1 - ink) * image + ink * color
    return (scene.x[0] + x) / 2, (scene.y[0] + y) / 2


def sample(rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """An image [64, 64, 3] and its heat map [13, 16, 16]."""
    scene = random_scene(rng)
    mixed = rng.random() < 0.5
    odd = rng.random(len(scene.kind)) < (0.3 if mixed else 0.0)
    kept = [v[~odd] for v in (scene.kind, scene.x, scene.y, scene.radius)]
    image = world.render(world.Scene(*kept))
    kind, x, y = (list(v) for v in kept[:3])
    reach = scene.radius * [world.EXTENT[world.CLASSES[k][1]] for k in scene.kind]  # a distractor keeps within it
    for cx, cy, r in zip(scene.x[odd], scene.y[odd], np.maximum(reach[odd] / 1.35, 4.5), strict=True):
        ink, color = DISTRACTORS[rng.integers(len(DISTRACTORS))](rng, _X - cx, _Y - cy, r)
        image = (1 - ink[..., None]) * image + ink[..., None] * color
        kind, x, y = [*kind, OTHER], [*x, cx], [*y, cy]
    if mixed and 0 < len(kept[0]) <= 5 and not odd.any() and (pair := _merge(rng, scene, image)):
        kind[0], (x[0], y[0]) = OTHER, pair
    return image.astype(np.float32), heat_map(np.array(kind, int), np.array(x), np.array(y))


def heat_map(kind: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Objects of class `kind` at (x, y) [object], shared bilinearly among the nearest cells: [13, 16, 16]."""
    heat = np.zeros((CHANNELS, CELLS, CELLS), np.float32)
    u, v = (np.clip(c / STRIDE - 0.5, 0, CELLS - 1.001) for c in (x, y))
    column, row = u.astype(int), v.astype(int)
    u, v = u - column, v - row
    for i, j, share in ((0, 0, (1 - u) * (1 - v)), (0, 1, u * (1 - v)), (1, 0, (1 - u) * v), (1, 1, u * v)):
        np.add.at(heat, (kind, row + i, column + j), share)
    return heat


def _blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, one standard deviation (pixels) an image, as a product with two banded matrices."""
    grid = torch.arange(world.SIZE, device=images.device, dtype=torch.float32)
    kernel = torch.exp(-((grid[:, None] - grid) ** 2) / (2 * sigma.clamp_min(0.05).view(-1, 1, 1) ** 2))
    kernel = (kernel / kernel.sum(2, keepdim=True)).unsqueeze(1)
    return kernel @ images @ kernel.mT


def perturb(images: Float[Tensor, "image 3 64 64"], rng: torch.Generator, strength: float = 1.0) -> Tensor:
    """Warps, tints, blurs and adds noise, each by a random amount an image; some images stay as they are."""
    n = len(images)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        draw = torch.rand(n, *shape, generator=rng).to(images.device)
        return strength * (low + (high - low) * draw)

    coarse = uniform(2, 9, 9, low=-0.7, high=0.7) * (2 / world.SIZE) * (uniform(1, 1, 1) > 0.5)
    shift = F.interpolate(coarse, size=world.SIZE, mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    grid = F.affine_grid(torch.eye(2, 3, device=images.device).expand(n, 2, 3), list(images.shape), align_corners=False)
    warped = F.grid_sample(images, grid + shift, padding_mode="border", align_corners=False)
    tinted = warped * (1 + uniform(3, 1, 1, low=-0.05, high=0.05)) + uniform(3, 1, 1, low=-0.02, high=0.02)
    blurred = _blur(tinted, uniform(low=-0.4, high=1.0).clamp_min(0))
    noise = torch.randn(images.shape, generator=rng).to(images.device)
    return (blurred + uniform(1, 1, 1, low=-0.01, high=0.04).clamp_min(0) * noise).clamp(0, 1)


def batch(rng: Rng, noise: torch.Generator, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Perturbed images and their heat maps."""
    images, heat = (np.stack(part) for part in zip(*(sample(rng) for _ in range(recipe.batch)), strict=True))
    rendered = torch.from_numpy(images).permute(0, 3, 1, 2).to(recipe.device)
    return perturb(rendered, noise), torch.from_numpy(heat).to(recipe.device)


def loss(logits: Tensor, heat: Tensor) -> Tensor:
    """Cross-entropy of the cells, an object a unit, and the error of the counts."""
    cells = F.binary_cross_entropy_with_logits(logits, heat, reduction="sum") / heat.sum().clamp_min(1)
    counts = F.smooth_l1_loss(logits.sigmoid().sum((2, 3)), heat.sum((2, 3)), reduction="sum") / len(heat)
    return cells + 0.5 * counts


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, counts: Tensor) -> float:
    """Share of images whose every count is right."""
    found = torch.cat([net(part).sigmoid().sum((2, 3)) for part in images.split(128)]).round().cpu()
    return (found == counts).all(1).float().mean().item()


def train(recipe: Recipe) -> CountNet:
    """Minimises `loss` with AdamW and a one-cycle rate; returns the network with its final weights."""
    torch.manual_seed(recipe.seed)
    rng, noise = np.random.default_rng(recipe.seed), torch.Generator().manual_seed(recipe.seed)
    net = CountNet().to(recipe.device)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it; 1.3x on a CPU
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=recipe.steps, pct_start=0.15)
    start, recent = time.time(), []
    for step in range(1, recipe.steps + 1):
        images, heat = batch(rng, noise, recipe)
        value = loss(net(images.contiguous(memory_format=torch.channels_last)), heat)
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recent.append(value.item())
        if step % 100 == 0 or step == recipe.steps:
            print(f"step {step}  loss {np.mean(recent):.4f}  {time.time() - start:.0f} s", flush=True)
            recent.clear()
    return net.eval()


def main() -> None:
    """Trains, writes the weights and prints the accuracy of what was written."""
    recipe = tyro.cli(Recipe, description=__doc__)
    net = train(recipe)
    net.half()
    save_file({name: value.contiguous().cpu() for name, value in net.state_dict().items()}, recipe.out)
    net.float()
    rng, noise = np.random.default_rng(recipe.seed + 1_000_003), torch.Generator().manual_seed(recipe.seed + 1)
    scenes = [random_scene(rng) for _ in range(recipe.test)]
    counts = torch.tensor(np.array([[*scene.counts(), 0] for scene in scenes]))
    images = world.render_batch(scenes).to(recipe.device)
    print(f"exact counts, clean: {accuracy(net, images, counts):.4f}")
    print(f"exact counts, perturbed: {accuracy(net, perturb(images, noise), counts):.4f}")
    samples = batch(rng, noise, replace(recipe, batch=recipe.test))
    print(f"exact counts, with distractors: {accuracy(net, samples[0], samples[1].sum((2, 3)).round().cpu()):.4f}")


if __name__ == "__main__":
    main()
