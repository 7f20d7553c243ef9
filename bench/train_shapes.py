"""Trains the built-in model: `python -m rollflow.bench.train_shapes --work DIR`.

Stages, each resumable and skipped when its result exists:

- `data`: scenes of the procedural world, rendered, with their prompts;
- `autoencoder`: AutoencoderKL on the images, then latents scaled to unit variance;
- `flow`: FluxTransformer2DModel with its text encoders on the latents, plain flow matching;
- `rectify`: reflow (Liu et al. 2023, arXiv 2209.03003) on noise-image pairs, which makes a few-step model; a first time
  on pairs of the flow, with guidance, then twice on those of the model that came out, which are cheaper and straighter;
- `save`: the two FluxPipeline folders, `shapes` (rectified) and `shapes-base`.

All of it also runs as two single-threaded ranks, which on a two-core CPU is faster than one process with two threads:
`torchrun --nproc-per-node 2 -m rollflow.bench.train_shapes`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor, nn

from rollflow.bench import shapes_networks as networks
from rollflow.bench.training import Run, muon, wait
from rollflow.models import world
from rollflow.rewards.count import CountReward, parse

STAGES = ("data", "autoencoder", "flow", "rectify", "save")
# How often a training scene has 1, 2, ... 9 objects: all are learned, the large ones remain hard.
OBJECTS = np.array([0.13, 0.15, 0.15, 0.14, 0.13, 0.10, 0.08, 0.07, 0.05])


@dataclass(frozen=True)
class Recipe:
    """Settings of the training run."""

    work: Path = Path("build/shapes")
    """Where data, checkpoints and the log go."""
    stage: Literal["all", "data", "autoencoder", "flow", "rectify", "save"] = "all"
    """Which stage to run."""
    out: Path = Path("engine/models")
    """Where `save` writes the two pipeline folders."""
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    scenes: int = 98_304
    autoencoder_steps: int = 2_600
    flow_steps: int = 7_400
    pairs: int = 32_768
    pair_steps: int = 12
    pair_guidance: float = 1.75
    """Classifier-free guidance of the flow that makes the pairs: it draws cleaner scenes with it."""
    rectify_steps: int = 3_000
    again_pairs: int = 65_536
    again_pair_steps: int = 4
    again_steps: int = 3_000
    """The second and third rectification, on pairs of the model before them without guidance."""
    batch: int = 96
    """Rows of a flow or rectify step, over all ranks."""


def random_request(rng: np.random.Generator) -> tuple[list[world.Group], str]:
    """Groups and a prompt as the training set has them."""
    total = 1 + int(rng.choice(len(OBJECTS), p=OBJECTS / OBJECTS.sum()))
    groups = world.random_groups(rng, total, int(rng.integers(1, min(3, total) + 1)))
    return groups, world.prompt(groups, int(rng.integers(len(world.WORDINGS))))


def data(recipe: Recipe) -> None:
    """Renders the scenes: images.npy (uint8 [scene, 3, 64, 64]) and prompts.json."""
    run, rng = Run(recipe.work, "data", recipe.seed), np.random.default_rng(recipe.seed)
    images = np.lib.format.open_memmap(
        recipe.work / "images.npy", "w+", dtype=np.uint8, shape=(recipe.scenes, 3, world.SIZE, world.SIZE)
    )
    prompts = []
    for i in range(recipe.scenes):
        groups, prompt = random_request(rng)
        images[i] = (world.render(world.random_scene(rng, groups)).transpose(2, 0, 1) * 255).round().astype(np.uint8)
        prompts.append(prompt)
    (recipe.work / "prompts.json").write_text(json.dumps(prompts))
    run.log(scenes=recipe.scenes)


def batches(recipe: Recipe, rng: torch.Generator, size: int) -> Iterator[Tensor]:
    """Random images as the autoencoder takes them, [size, 3, 64, 64] in [-1, 1], for ever."""
    images = np.load(recipe.work / "images.npy", mmap_mode="r")
    while True:
        rows = torch.randint(len(images), (size,), generator=rng).sort().values.numpy()
        yield (torch.from_numpy(images[rows]).float() / 127.5 - 1).to(recipe.device)


def autoencoder(recipe: Recipe) -> None:
    """Trains the autoencoder and records the latents' mean and deviation as shift and scaling factor."""
    run = Run(recipe.work, "autoencoder", recipe.seed)
    torch.manual_seed(recipe.seed)
    vae = networks.autoencoder().to(recipe.device)
    source = batches(recipe, run.rng, 32)
    canvas = torch.tensor(world.CANVAS, device=recipe.device).view(1, 3, 1, 1) * 2 - 1

    def loss() -> Tensor:
        images = next(source)
        latent = vae.encode(images).latent_dist
        noise = torch.randn(latent.mean.shape, generator=run.rng).to(recipe.device)
        restored = vae.decode(latent.mean + latent.std * noise).sample
        weight = 1 + 3 * ((images - canvas).abs().amax(1, keepdim=True) > 0.1)
        return (weight * (restored - images).abs()).mean() + 1e-3 * latent.kl().mean() / latent.mean[0].numel()

    held = batches(recipe, torch.Generator().manual_seed(recipe.seed + 77), 32)

    @torch.no_grad()
    def evaluate(model: AutoencoderKL) -> dict:
        images = next(held)
        restored = model.decode(model.encode(images).latent_dist.mode()).sample
        return {"l1": round((restored - images).abs().mean().item(), 5)}

    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    vae = run.train(vae, [optimizer], recipe.autoencoder_steps, loss, evaluate, every=400, decay=0.995)
    with torch.no_grad():
        latents = torch.cat([vae.encode(next(source)).latent_dist.mode() for _ in range(64)])
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    run.log(scaling_factor=vae.config.scaling_factor, shift_factor=vae.config.shift_factor)
    deviations = latents.std((0, 2, 3)) * vae.config.scaling_factor
    run.log(channel_deviations=[round(d, 3) for d in deviations.tolist()])
    affine = {"scaling": vae.config.scaling_factor, "shift": vae.config.shift_factor}
    if run.rank == 0:
        torch.save({"weights": vae.state_dict(), **affine}, run.path)
    wait()


def load_autoencoder(recipe: Recipe) -> AutoencoderKL:
    """The trained autoencoder."""
    saved = torch.load(recipe.work / "autoencoder.pt", weights_only=True, map_location=recipe.device)
    vae = networks.autoencoder().to(recipe.device).eval()
    vae.load_state_dict(saved["weights"])
    vae.register_to_config(scaling_factor=saved["scaling"], shift_factor=saved["shift"])
    return vae


def pack(latents: Tensor) -> Tensor:
    """[row, channel, h, w] to FLUX's tokens of 2 x 2 patches, [row, h/2 * w/2, 4 channel]."""
    n, c, h, w = latents.shape
    return FluxPipeline._pack_latents(latents, n, c, h, w)


@torch.no_grad()
def decode(vae: AutoencoderKL, tokens: Tensor) -> Tensor:
    """Tokens to images [row, 3, 64, 64] in [0, 1]."""
    latents = FluxPipeline._unpack_latents(tokens, world.SIZE, world.SIZE, 8)
    return (vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def encode_scenes(recipe: Recipe, vae: AutoencoderKL) -> Tensor:
    """All images of the data stage as packed, scaled latents [scene, 16, 32]; kept in latents.pt."""
    path = recipe.work / "latents.pt"
    if not path.exists() and int(os.environ.get("RANK", 0)) == 0:
        images = np.load(recipe.work / "images.npy", mmap_mode="r")
        parts = []
        for rows in np.array_split(np.arange(len(images)), len(images) // 256):
            batch = (torch.from_numpy(images[rows]).float() / 127.5 - 1).to(recipe.device)
            latents = (vae.encode(batch).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
            parts.append(pack(latents).cpu())
        torch.save(torch.cat(parts), path)
    wait()
    return torch.load(path, weights_only=True)


def evaluator(recipe: Recipe, rows: int = 192) -> Callable[[networks.Flow], dict]:
    """Exact-count accuracy of 1, 4 and 10 Euler steps by number of objects, on prompts of its own."""
    rng = np.random.default_rng(recipe.seed + 77)
    totals = [1 + i % world.MAX_OBJECTS for i in range(rows)]
    prompts = [
        world.prompt(world.random_groups(rng, n, int(rng.integers(1, min(3, n) + 1))), i % len(world.WORDINGS))
        for i, n in enumerate(totals)
    ]
    noise = torch.randn(rows, 16, 32, generator=torch.Generator().manual_seed(recipe.seed + 77)).to(recipe.device)
    ids, vae = networks.token_ids(prompts).to(recipe.device), load_autoencoder(recipe)

    def evaluate(flow: networks.Flow) -> dict:
        record: dict[str, Any] = {}
        for steps in (1, 4, 10):
            exact = CountReward().exact(decode(vae, flow.solve(noise, ids, steps)), prompts).float()
            record[f"accuracy_{steps}"] = round(exact.mean().item(), 3)
            by_total = [exact[n :: world.MAX_OBJECTS].mean().item() for n in range(world.MAX_OBJECTS)]
            record[f"accuracy_{steps}_by_objects"] = [round(a, 2) for a in by_total]
        return record

    return evaluate


def optimizers(parts: list[nn.Module], scale: float = 1.0) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices of the blocks, AdamW for the rest (modulation, embeddings, norms, text, output)."""
    return muon(parts, lambda name: "transformer_blocks" in name and ".linear." not in name, scale)


def flow(recipe: Recipe) -> None:
    """Flow matching from scratch; one prompt in ten is empty, so that guidance is possible."""
    run = Run(recipe.work, "flow", recipe.seed)
    latents = encode_scenes(recipe, load_autoencoder(recipe))
    prompts = json.loads((recipe.work / "prompts.json").read_text())
    ids, empty = networks.token_ids(prompts), networks.token_ids([""])
    torch.manual_seed(recipe.seed)
    model = networks.Flow().to(recipe.device)
    rows = recipe.batch // run.ranks

    def loss() -> Tensor:
        pick = torch.randint(len(latents), (rows,), generator=run.rng)
        x0, text = latents[pick], ids[pick]
        text = torch.where(torch.rand(rows, 1, generator=run.rng) < 0.1, empty, text)
        t = torch.sigmoid(torch.randn(rows, generator=run.rng) * 1.2 + 0.2)
        noise = torch.randn(x0.shape, generator=run.rng)
        x = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise
        velocity = model(x.to(recipe.device), t.to(recipe.device), text.to(recipe.device))
        return F.mse_loss(velocity, (noise - x0).to(recipe.device))

    model = run.train(model, optimizers([model]), recipe.flow_steps, loss, evaluator(recipe), every=1000)
    run.save(model)


def relabel(prompt: str, counts: np.ndarray, rng: np.random.Generator) -> str | None:
    """The prompt that a generated image truly shows, from its parsed counts [13]: `prompt` itself if it is right, one
    made for it if it is a clean scene of the world, None if it is not."""
    if counts[-1] == 0 and (counts[:-1] == world.target_counts(prompt)).all():
        return prompt
    present = np.flatnonzero(counts[:-1])
    if counts[-1] or not 1 <= len(present) <= 3 or counts.sum() > world.MAX_OBJECTS:
        return None
    groups = [(int(counts[k]), *world.CLASSES[k]) for k in rng.permutation(present)]
    return world.prompt(groups, int(rng.integers(len(world.WORDINGS))))


@torch.no_grad()
def make_pairs(
    recipe: Recipe, run: Run, teacher: networks.Flow, pairs: int, steps: int, guidance: float
) -> dict[str, Tensor]:
    """Noise, latents and token ids of the teacher's own samples, with the prompt that each sample truly shows.

    Each rank makes its share. Melted scenes are left out and miscounted ones relabelled, or the student would learn
    the teacher's mistakes.
    """
    path = recipe.work / f"{run.stage}.pairs.rank{run.rank}of{run.ranks}.pt"
    if not path.exists():
        rng = np.random.default_rng([recipe.seed, *run.stage.encode(), run.rank])
        draw = torch.Generator().manual_seed(int(rng.integers(2**62)))
        vae, kept, right = load_autoencoder(recipe), [], 0
        for _ in range(pairs // run.ranks // 128):
            prompts = [random_request(rng)[1] for _ in range(128)]
            noise = torch.randn(128, 16, 32, generator=draw)
            ids = networks.token_ids(prompts).to(recipe.device)
            x0 = teacher.solve(noise.to(recipe.device), ids, steps, guidance)
            counts = parse(decode(vae, x0)).cpu().numpy()
            true = [relabel(p, c, rng) for p, c in zip(prompts, counts, strict=True)]
            right += sum(a == b for a, b in zip(prompts, true, strict=True))
            clean = [i for i, prompt in enumerate(true) if prompt is not None]
            shown = [prompt for prompt in true if prompt is not None]
            kept.append((noise[clean], x0.cpu()[clean], networks.token_ids(shown)))
        noise, x0, ids = (torch.cat(column) for column in zip(*kept, strict=True))
        run.log(pairs=pairs // run.ranks, right=right, clean=len(ids))
        torch.save({"noise": noise, "x0": x0, "ids": ids}, path)
    return torch.load(path, weights_only=True)


def rectify(recipe: Recipe) -> None:
    """Reflow, three times: each round's student draws the next one's pairs."""
    rounds = (("rectify1", "flow"), ("rectify2", "rectify1"), ("rectify", "rectify2"))
    first = (recipe.rectify_steps, recipe.pairs, recipe.pair_steps, recipe.pair_guidance)
    again = (recipe.again_steps, recipe.again_pairs, recipe.again_pair_steps, 1.0)
    for i, (stage, teacher) in enumerate(rounds):
        if not (recipe.work / f"{stage}.pt").exists():
            reflow(recipe, stage, teacher, *(again if i else first))


def reflow(recipe: Recipe, stage: str, teacher: str, steps: int, count: int, pair_steps: int, guidance: float) -> None:
    """The student learns straight lines between the teacher's own noise and samples; text encoders stay."""
    run = Run(recipe.work, stage, recipe.seed)
    model = networks.Flow().to(recipe.device)
    model.load_state_dict(torch.load(recipe.work / f"{teacher}.pt", weights_only=True, map_location=recipe.device))
    pairs = make_pairs(recipe, run, model, count, pair_steps, guidance)
    model.clip.requires_grad_(False)
    model.t5.requires_grad_(False)
    rows = recipe.batch // run.ranks

    def loss() -> Tensor:
        pick = torch.randint(len(pairs["ids"]), (rows,), generator=run.rng)
        noise, x0, ids = (pairs[name][pick] for name in ("noise", "x0", "ids"))
        # More weight near t = 1, where one step must do all the work (Lee et al. 2024, arXiv 2405.20320).
        t = 1 - torch.rand(rows, generator=run.rng) ** 2 * (torch.rand(rows, generator=run.rng) > 0.35)
        x = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise
        velocity = model(x.to(recipe.device), t.to(recipe.device), ids.to(recipe.device))
        return F.mse_loss(velocity, (noise - x0).to(recipe.device))

    model = run.train(model, optimizers([model], 0.5), steps, loss, evaluator(recipe), every=500, decay=0.998)
    run.save(model)


def save(recipe: Recipe) -> None:
    """Writes both pipeline folders: networks in float16, the small text encoders in float32."""
    run, vae = Run(recipe.work, "save", recipe.seed), load_autoencoder(recipe)
    for name, stage in (("shapes", "rectify"), ("shapes-base", "flow")):
        model = networks.Flow()
        model.load_state_dict(torch.load(recipe.work / f"{stage}.pt", weights_only=True, map_location="cpu"))
        folder = recipe.out / name
        networks.pipeline(vae.half(), model.transformer.half(), model.clip, model.t5).save_pretrained(folder)
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        run.log(folder=name, mebibytes=round(size / 2**20, 2))


def main() -> None:
    """Runs the stages that are asked for and not yet done."""
    recipe = tyro.cli(Recipe, description=__doc__)
    recipe.work.mkdir(parents=True, exist_ok=True)
    rank = int(os.environ.get("RANK", 0))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", timeout=timedelta(hours=6))
    done = {"data": "prompts.json"}
    for stage in STAGES if recipe.stage == "all" else (recipe.stage,):
        if not (recipe.work / done.get(stage, f"{stage}.pt")).exists():
            if stage not in ("data", "save") or rank == 0:
                globals()[stage](recipe)
            wait()


if __name__ == "__main__":
    main()
