"""Trains the light decoder of the built-in models: `python -m rollflow.bench.train_preview --work DIR`.

A search decodes once an evaluation, and with a small transformer a full decode costs more than the evaluation. The
*preview* is for the reward of particles on the way; what is returned is decoded in full. It is the full decoder without
its last stage, whose few channels at full size are what a CPU is slowest at: it stops at 32 x 32 cells of 2 x 2 pixels,
which `pixel_shuffle` spreads out. All that is left starts with the full decoder's weights.

It learns from what it will see: latents of rendered scenes, and posterior means of both built-in models at all times.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL
from torch import Tensor

from rollflow.bench.train_shapes import random_request
from rollflow.bench.training import Run
from rollflow.engine import Engine
from rollflow.models import world
from rollflow.models.flux import FluxModel
from rollflow.rewards.count import CountReward

MODELS = ("shapes", "shapes-base")
CELL = 2  # pixels a side that one cell of the decoder's last feature map becomes


@dataclass(frozen=True)
class Recipe:
    """Settings of the training run."""

    work: Path = Path("build/preview")
    """Where data, checkpoints and the log go."""
    out: Path = Path("engine/models")
    """Where the pipeline folders are that get the decoder."""
    seed: int = 0
    scenes: int = 24_576
    """How many latents each of three sources gives: scenes, posterior means of `shapes` and of `shapes-base`."""
    steps: int = 10_000
    batch: int = 32


def network(vae: AutoencoderKL) -> AutoencoderKL:
    """The full autoencoder without its last stage; its encoder is a stub that nobody uses."""
    model = AutoencoderKL.from_config(
        {
            **vae.config,
            "out_channels": 3 * CELL**2,
            "block_out_channels": vae.config.block_out_channels[1:],
            "down_block_types": vae.config.down_block_types[1:],
            "up_block_types": vae.config.up_block_types[1:],
        }
    )
    own = model.decoder.state_dict()
    kept = {name: value for name, value in vae.decoder.state_dict().items() if name in own}
    model.decoder.load_state_dict({**own, **{name: v for name, v in kept.items() if v.shape == own[name].shape}})
    return model


def spread(cells: Tensor) -> Tensor:
    """The decoder's output as images [row, 3, 64, 64] in [-1, 1]."""
    return F.pixel_shuffle(cells, CELL)


@torch.no_grad()
def latents(recipe: Recipe) -> tuple[Tensor, list[str]]:
    """What decoders are given in a search, [latent, 8, 8, 8], with the prompt of each."""
    rng, draw = np.random.default_rng([recipe.seed, 7]), torch.Generator().manual_seed(recipe.seed)
    engines = [Engine.from_pretrained(name, device="cpu") for name in MODELS]
    kept, said = [], []
    for source in range(1 + len(engines)):
        for _ in range(recipe.scenes // 64):
            wanted = [random_request(rng) for _ in range(64)]
            images = world.render_batch([world.random_scene(rng, groups) for groups, _ in wanted])
            model = engines[max(0, source - 1)].model
            assert isinstance(model, FluxModel)
            clean = model.vae.encode(images * 2 - 1).latent_dist.mode()
            prompts = [prompt for _, prompt in wanted]
            kept.append(_posterior_means(model, clean, prompts, draw) if source else clean)
            said += prompts
    return torch.cat(kept), said


def _posterior_means(model: FluxModel, clean: Tensor, prompts: list[str], draw: torch.Generator) -> Tensor:
    """Of scenes that are noised on the linear path, a third of them to pure noise, the rest to any time."""
    geometry = model.geometry()
    x0 = model.layout.pack(model.layout.normalise(clean))
    t = torch.rand(len(clean), generator=draw).clamp(min=0.02)
    t[torch.rand(len(clean), generator=draw) < 1 / 3] = 1.0
    x = (1 - t)[:, None, None] * x0 + t[:, None, None] * torch.randn(x0.shape, generator=draw)
    u = model.velocity(x, t, model.encode(prompts), torch.zeros(len(x)), geometry)
    mean = model.layout.unpack(x - t[:, None, None] * u, geometry.latent_height, geometry.latent_width)
    return model.layout.denormalise(mean)


@torch.no_grad()
def data(recipe: Recipe) -> dict[str, Any]:
    """Latents, what the full decoder makes of them (8 bits) and prompts; kept in `data.pt`."""
    path = recipe.work / "data.pt"
    if not path.exists():
        model = Engine.from_pretrained(MODELS[0], device="cpu").model
        given, prompts = latents(recipe)
        images = torch.cat([(model.decode(part) * 255).round().to(torch.uint8) for part in given.split(64)])
        torch.save({"latents": given, "images": images, "prompts": prompts}, path)
    return torch.load(path, weights_only=True)


def main() -> None:
    """Trains, compares its rewards with the full decoder's on latents of its own, and saves."""
    recipe = tyro.cli(Recipe, description=__doc__)
    recipe.work.mkdir(parents=True, exist_ok=True)
    run, known = Run(recipe.work, "preview", recipe.seed), data(recipe)
    total, held = len(known["latents"]), slice(None, None, 48)
    training = torch.ones(total, dtype=torch.bool)
    training[held] = False
    rows = training.nonzero().squeeze(1)
    torch.manual_seed(recipe.seed)
    full = Engine.from_pretrained(MODELS[0], device="cpu").model
    assert isinstance(full, FluxModel)
    model = network(full.vae).to(memory_format=torch.channels_last)
    model.encoder.requires_grad_(False)
    canvas = torch.tensor(world.CANVAS).view(1, 3, 1, 1) * 2 - 1

    def loss() -> Tensor:
        pick = rows[torch.randint(len(rows), (recipe.batch,), generator=run.rng)]
        images = known["images"][pick].float() / 127.5 - 1
        drawn = spread(model.decode(known["latents"][pick].to(memory_format=torch.channels_last)).sample)
        weight = 1 + 3 * ((images - canvas).abs().amax(1, keepdim=True) > 0.1)
        return (weight * (drawn - images).abs()).mean()

    prompts = known["prompts"][held]
    wanted = CountReward()(known["images"][held].float() / 255, prompts)

    @torch.no_grad()
    def evaluate(average: AutoencoderKL) -> dict:
        images = torch.cat([spread(average.decode(part).sample) for part in known["latents"][held].split(64)])
        given = CountReward()((images / 2 + 0.5).clamp(0, 1), prompts)
        third = len(given) // 3
        return {
            "l1": round((images - (known["images"][held].float() / 127.5 - 1)).abs().mean().item(), 5),
            "same_reward": [round(v, 3) for v in (given == wanted)[: 3 * third].view(3, -1).float().mean(1).tolist()],
            "correlation": round(torch.corrcoef(torch.stack([given, wanted]))[0, 1].item(), 4),
        }

    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    model = run.train(model, [optimizer], recipe.steps, loss, evaluate, every=500)
    run.save(model)
    for name in MODELS:
        model.half().save_pretrained(recipe.out / name / "preview")


if __name__ == "__main__":
    main()
