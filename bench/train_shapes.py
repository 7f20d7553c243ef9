"""Trains the built-in model: `python -m rollflow.bench.train_shapes --work DIR`.

Stages, each resumable and skipped when its result exists:

- `data`: scenes of the procedural world, rendered, with their prompts;
- `autoencoder`: AutoencoderKL on the images, then latents scaled to unit variance;
- `flow`: FluxTransformer2DModel with its text encoders on the latents, plain flow matching;
- `rectify`: reflow (Liu et al. 2023, arXiv 2209.03003) on noise-image pairs of the flow, which makes a few-step model;
- `save`: the two FluxPipeline folders, `shapes` (rectified) and `shapes-base`.

Flow and rectify also run as two single-threaded ranks (`torchrun --nproc-per-node 2 -m rollflow.bench.train_shapes`),
which on a two-core CPU is faster than one process with two threads.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor, nn

from rollflow import shapes
from rollflow.bench import shapes_networks as networks
from rollflow.rewards.count import CountReward

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
    flow_steps: int = 12_000
    pairs: int = 49_152
    pair_steps: int = 12
    rectify_steps: int = 5_000
    batch: int = 96
    """Rows of a flow or rectify step, over all ranks."""


class Run:
    """One stage's bookkeeping: ranks, log, checkpoint, optimisation step."""

    def __init__(self, recipe: Recipe, stage: str):
        self.recipe, self.stage = recipe, stage
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.rng = torch.Generator().manual_seed(recipe.seed * 1000 + 100 * STAGES.index(stage) + self.rank)
        self.path = recipe.work / f"{stage}.pt"
        self.checkpoint = recipe.work / f"{stage}.rank{self.rank}.checkpoint.pt"
        self.start = time.time()

    def log(self, **record) -> None:
        if self.rank == 0:
            record = {"stage": self.stage, "seconds": round(time.time() - self.start, 1), **record}
            print(json.dumps(record), flush=True)
            with open(self.recipe.work / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    def average(self, parameters: list[nn.Parameter]) -> None:
        """Averages gradients over the ranks."""
        if self.ranks > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters])
            torch.distributed.all_reduce(flat)
            for p, g in zip(parameters, flat.div_(self.ranks).split([p.numel() for p in parameters]), strict=True):
                p.grad.copy_(g.view_as(p))

    def train(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        steps: int,
        loss: Callable[[], Tensor],
        evaluate: Callable[[nn.Module], dict] | None = None,
        every: int = 1000,
        decay: float = 0.999,
    ) -> nn.Module:
        """Minimises `loss` with warm-up and linear decay; returns the exponential moving average of the weights."""
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay), use_buffers=True
        )
        parameters = [p for p in model.parameters() if p.requires_grad]
        schedules = [
            torch.optim.lr_scheduler.LambdaLR(o, lambda i: min(1.0, (i + 1) / 200, (steps - i) / (0.5 * steps)))
            for o in optimizers
        ]
        state = {"model": model, "average": average}
        state |= {f"optimizer{i}": o for i, o in enumerate(optimizers)} | {f"schedule{i}": s for i, s in enumerate(schedules)}
        done = self._resume(state)
        recent: list[Tensor] = []
        for step in range(done, steps):
            value = loss()
            value.backward()
            self.average(parameters)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if step > 200:
                average.update_parameters(model)
            elif step == 200:
                average.module.load_state_dict(model.state_dict())
            recent.append(value.detach())
            if (step + 1) % 100 == 0:
                self.log(step=step + 1, loss=round(torch.stack(recent).mean().item(), 5))
                recent.clear()
            if (step + 1) % every == 0 or step + 1 == steps:
                torch.save({"step": step + 1, "rng": self.rng.get_state()} | {k: v.state_dict() for k, v in state.items()}, self.checkpoint)
                if evaluate and self.rank == 0:
                    self.log(step=step + 1, **evaluate(average.module))
        return average.module

    def _resume(self, state: dict) -> int:
        if not self.checkpoint.exists():
            return 0
        saved = torch.load(self.checkpoint, weights_only=True)
        for name, part in state.items():
            part.load_state_dict(saved[name])
        self.rng.set_state(saved["rng"])
        self.log(resumed=saved["step"])
        return saved["step"]


def random_request(rng: np.random.Generator) -> tuple[list[shapes.Group], str]:
    """Groups and a prompt as the training set has them."""
    total = 1 + int(rng.choice(len(OBJECTS), p=OBJECTS / OBJECTS.sum()))
    groups = shapes.random_groups(rng, total, int(rng.integers(1, min(3, total) + 1)))
    return groups, shapes.prompt(groups, int(rng.integers(len(shapes.WORDINGS))))


def data(recipe: Recipe) -> None:
    """Renders the scenes: images.npy (uint8 [scene, 3, 64, 64]) and prompts.json."""
    run, rng = Run(recipe, "data"), np.random.default_rng(recipe.seed)
    images = np.lib.format.open_memmap(
        recipe.work / "images.npy", "w+", dtype=np.uint8, shape=(recipe.scenes, 3, shapes.SIZE, shapes.SIZE)
    )
    prompts = []
    for i in range(recipe.scenes):
        groups, prompt = random_request(rng)
        images[i] = (shapes.render(shapes.random_scene(rng, groups)).transpose(2, 0, 1) * 255).round().astype(np.uint8)
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
    run = Run(recipe, "autoencoder")
    torch.manual_seed(recipe.seed)
    vae = networks.autoencoder().to(recipe.device)
    source = batches(recipe, run.rng, 32)
    canvas = torch.tensor(shapes.CANVAS, device=recipe.device).view(1, 3, 1, 1) * 2 - 1

    def loss() -> Tensor:
        images = next(source)
        latent = vae.encode(images).latent_dist
        noise = torch.randn(latent.mean.shape, generator=run.rng).to(recipe.device)
        restored = vae.decode(latent.mean + latent.std * noise).sample
        weight = 1 + 3 * ((images - canvas).abs().amax(1, keepdim=True) > 0.1)
        return (weight * (restored - images).abs()).mean() + 1e-3 * latent.kl().mean() / latent.mean[0].numel()

    @torch.no_grad()
    def evaluate(model: AutoencoderKL) -> dict:
        images = next(source)
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
    torch.save({"weights": vae.state_dict(), "scaling": vae.config.scaling_factor, "shift": vae.config.shift_factor}, run.path)


class Flow(nn.Module):
    """The transformer and its text encoders: velocity(x, t, token ids)."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = networks.transformer()
        self.clip, self.t5 = networks.text_encoders()
        side = networks.LATENT_SIZE // 2
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()
        self.register_buffer("image_ids", ids, persistent=False)
        self.register_buffer("text_ids", torch.zeros(networks.TEXT_TOKENS, 3), persistent=False)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """[row, 16, 32], [row], [row, text] to the velocity [row, 16, 32]."""
        pooled, sequence = networks.embed(self.clip, self.t5, ids)
        return self.transformer(
            hidden_states=x,
            timestep=t,
            pooled_projections=pooled,
            encoder_hidden_states=sequence,
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def solve(self, x: Tensor, ids: Tensor, steps: int) -> Tensor:
        """Euler steps of the ODE on a uniform grid from t = 1 to t = 0."""
        for i in range(steps):
            t = torch.full((len(x),), 1 - i / steps, device=x.device)
            x = x - self(x, t, ids) / steps
        return x


def token_ids(prompts: list[str]) -> Tensor:
    """Prompts to token ids, padded to [row, text]."""
    return networks.tokenizer()(
        prompts, padding="max_length", max_length=networks.TEXT_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


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
    latents = FluxPipeline._unpack_latents(tokens, shapes.SIZE, shapes.SIZE, 8)
    return (vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def encode_scenes(recipe: Recipe, vae: AutoencoderKL) -> Tensor:
    """All images of the data stage as packed, scaled latents [scene, 16, 32]; kept in latents.pt."""
    path = recipe.work / "latents.pt"
    if not path.exists():
        images = np.load(recipe.work / "images.npy", mmap_mode="r")
        parts = []
        for rows in np.array_split(np.arange(len(images)), len(images) // 256):
            batch = (torch.from_numpy(images[rows]).float() / 127.5 - 1).to(recipe.device)
            latents = (vae.encode(batch).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
            parts.append(pack(latents).cpu())
        torch.save(torch.cat(parts), path)
    return torch.load(path, weights_only=True)


def evaluator(recipe: Recipe, rows: int = 192) -> Callable[[Flow], dict]:
    """Exact-count accuracy of 1, 4 and 10 Euler steps by number of objects, on prompts of its own."""
    rng = np.random.default_rng(recipe.seed + 77)
    totals = [1 + i % shapes.MAX_OBJECTS for i in range(rows)]
    prompts = [
        shapes.prompt(shapes.random_groups(rng, n, int(rng.integers(1, min(3, n) + 1))), i % len(shapes.WORDINGS))
        for i, n in enumerate(totals)
    ]
    noise = torch.randn(rows, 16, 32, generator=torch.Generator().manual_seed(recipe.seed + 77)).to(recipe.device)
    ids, vae = token_ids(prompts).to(recipe.device), load_autoencoder(recipe)

    def evaluate(flow: Flow) -> dict:
        record = {}
        for steps in (1, 4, 10):
            exact = CountReward().exact(decode(vae, flow.solve(noise, ids, steps)), prompts).float()
            record[f"accuracy_{steps}"] = round(exact.mean().item(), 3)
            by_total = [exact[n :: shapes.MAX_OBJECTS].mean().item() for n in range(shapes.MAX_OBJECTS)]
            record[f"accuracy_{steps}_by_objects"] = [round(a, 2) for a in by_total]
        return record

    return evaluate


def optimizers(parts: list[nn.Module], scale: float = 1.0) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices of the blocks, AdamW for the rest (modulation, embeddings, norms, text, output)."""
    named = [(name, p) for part in parts for name, p in part.named_parameters() if p.requires_grad]
    hidden = [p for n, p in named if p.ndim == 2 and "transformer_blocks" in n and ".linear." not in n]
    rest = [p for _, p in named if not any(p is h for h in hidden)]
    return [
        torch.optim.Muon(hidden, lr=0.01 * scale, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=1e-3 * scale, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def flow(recipe: Recipe) -> None:
    """Flow matching from scratch; one prompt in ten is empty, so that guidance is possible."""
    run = Run(recipe, "flow")
    latents = encode_scenes(recipe, load_autoencoder(recipe))
    prompts = json.loads((recipe.work / "prompts.json").read_text())
    ids, empty = token_ids(prompts), token_ids([""])
    torch.manual_seed(recipe.seed)
    model = Flow().to(recipe.device)
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
    if run.rank == 0:
        torch.save(model.state_dict(), run.path)


@torch.no_grad()
def make_pairs(recipe: Recipe, run: Run, teacher: Flow) -> dict[str, Tensor]:
    """Noise, latents and token ids of the flow's own samples, only those that show exactly what their prompt asks for.

    Each rank makes its share. Wrong samples would teach the student the teacher's miscounts.
    """
    path = recipe.work / f"pairs.rank{run.rank}of{run.ranks}.pt"
    if not path.exists():
        rng = np.random.default_rng([recipe.seed, 5, run.rank])
        vae, kept = load_autoencoder(recipe), []
        for _ in range(recipe.pairs // run.ranks // 256):
            prompts = [random_request(rng)[1] for _ in range(256)]
            ids = token_ids(prompts)
            noise = torch.randn(256, 16, 32, generator=run.rng)
            x0 = teacher.solve(noise.to(recipe.device), ids.to(recipe.device), recipe.pair_steps)
            exact = CountReward().exact(decode(vae, x0), prompts)
            kept.append((noise[exact], x0.cpu()[exact], ids[exact]))
        noise, x0, ids = (torch.cat(column) for column in zip(*kept, strict=True))
        run.log(pairs=recipe.pairs // run.ranks, kept=len(ids))
        torch.save({"noise": noise, "x0": x0, "ids": ids}, path)
    return torch.load(path, weights_only=True)


def rectify(recipe: Recipe) -> None:
    """Reflow: the student learns straight lines between the flow's own noise and samples; text encoders stay."""
    run = Run(recipe, "rectify")
    model = Flow().to(recipe.device)
    model.load_state_dict(torch.load(recipe.work / "flow.pt", weights_only=True, map_location=recipe.device))
    pairs = make_pairs(recipe, run, model)
    model.clip.requires_grad_(False)
    model.t5.requires_grad_(False)
    rows = recipe.batch // run.ranks

    def loss() -> Tensor:
        pick = torch.randint(len(pairs["ids"]), (rows,), generator=run.rng)
        noise, x0, ids = (pairs[name][pick] for name in ("noise", "x0", "ids"))
        # More weight near t = 1, where one step must do all the work (Lee et al. 2024, arXiv 2405.20320).
        t = 1 - torch.rand(rows, generator=run.rng) ** 2 * (torch.rand(rows, generator=run.rng) > 0.2)
        x = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise
        velocity = model(x.to(recipe.device), t.to(recipe.device), ids.to(recipe.device))
        return F.mse_loss(velocity, (noise - x0).to(recipe.device))

    model = run.train(
        model, optimizers([model], 0.5), recipe.rectify_steps, loss, evaluator(recipe), every=500, decay=0.998
    )
    if run.rank == 0:
        torch.save(model.state_dict(), run.path)


def save(recipe: Recipe) -> None:
    """Writes both pipeline folders: networks in float16, the small text encoders in float32."""
    run, vae = Run(recipe, "save"), load_autoencoder(recipe)
    for name, stage in (("shapes", "rectify"), ("shapes-base", "flow")):
        model = Flow()
        model.load_state_dict(torch.load(recipe.work / f"{stage}.pt", weights_only=True, map_location="cpu"))
        folder = recipe.out / name
        networks.pipeline(vae.half(), model.transformer.half(), model.clip, model.t5).save_pretrained(folder)
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        run.log(folder=name, mebibytes=round(size / 2**20, 2))


def main() -> None:
    """Runs the stages that are asked for and not yet done."""
    recipe = tyro.cli(Recipe, description=__doc__)
    recipe.work.mkdir(parents=True, exist_ok=True)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo")
    done = {"data": "prompts.json"}
    for stage in STAGES if recipe.stage == "all" else (recipe.stage,):
        if not (recipe.work / done.get(stage, f"{stage}.pt")).exists():
            globals()[stage](recipe)


if __name__ == "__main__":
    main()
