"""Trains the built-in video model: `python -m rollflow.bench.train_video --work DIR`.

Stages, each resumable and skipped when its result exists:

- `autoencoder`: AutoencoderKLWan on rendered clips of the moving world;
- `latents`: clips as latents of unit variance a channel, with their prompts;
- `flow`: WanTransformer3DModel with its text encoder on the latents, plain flow matching; one prompt in ten is empty,
  which classifier-free guidance needs;
- `save`: the WanPipeline folder `shapes-video`.

All of it also runs as two single-threaded ranks: `torchrun --nproc-per-node 2 -m rollflow.bench.train_video`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from rollflow.bench import video_networks as networks
from rollflow.bench.environment import environment
from rollflow.bench.training import Run, muon, wait
from rollflow.models import moving, world
from rollflow.rewards.motion import MotionReward

STAGES = ("autoencoder", "latents", "flow", "save")


@dataclass(frozen=True)
class Recipe:
    """Settings of the training run."""

    work: Path = Path("build/video")
    """Where data, checkpoints and the log go."""
    stage: Literal["all", "autoencoder", "latents", "flow", "save"] = "all"
    """Which stage to run."""
    out: Path = Path("engine/models")
    """Where `save` writes the pipeline folder."""
    seed: int = 0
    autoencoder_steps: int = 900
    autoencoder_batch: int = 8
    """Clips of an autoencoder step, over all ranks."""
    clips: int = 24_576
    flow_steps: int = 4_500
    batch: int = 64
    """Rows of a flow step, over all ranks."""


def clips(rng: np.random.Generator, size: int) -> tuple[Tensor, list[str]]:
    """Random clips as the autoencoder takes them, [size, 3, 9, 32, 32] in [-1, 1], and their prompts."""
    prompts = [moving.random_prompt(rng) for _ in range(size)]
    frames = np.stack([moving.render(moving.random_clip(rng, moving.parse_prompt(prompt))) for prompt in prompts])
    return torch.from_numpy(frames).transpose(1, 2) * 2 - 1, prompts


class ConvMuon(torch.optim.Muon):
    """Muon for the kernels of convolutions, each as a matrix with a row for each output channel."""

    def __init__(self, kernels: Sequence[nn.Parameter], **options: Any):
        self.kernels = list(kernels)
        super().__init__([nn.Parameter(kernel.data.flatten(1)) for kernel in kernels], **options)  # the same memory

    def step(self, closure: Any = None) -> Any:
        """One step, from the gradients of the kernels."""
        for matrix, kernel in zip(self.param_groups[0]["params"], self.kernels, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of the kernels."""
        super().zero_grad(set_to_none)
        for kernel in self.kernels:
            kernel.grad = None


def autoencoder(recipe: Recipe) -> None:
    """Trains the autoencoder: weighted L1 and a little KL."""
    run = Run(recipe.work, "autoencoder", recipe.seed)
    torch.manual_seed(recipe.seed)
    vae = networks.autoencoder()
    canvas = torch.tensor(world.CANVAS).view(1, 3, 1, 1, 1) * 2 - 1

    def loss() -> Tensor:
        draw = int(torch.randint(2**62, (1,), generator=run.rng))  # of the generator that a checkpoint keeps
        frames, _ = clips(np.random.default_rng(draw), recipe.autoencoder_batch // run.ranks)
        latent = vae.encode(frames).latent_dist
        noise = torch.randn(latent.mean.shape, generator=run.rng)
        restored = networks.decode(vae, latent.mean + latent.std * noise)
        weight = 1 + 3 * ((frames - canvas).abs().amax(1, keepdim=True) > 0.1)
        return (weight * (restored - frames).abs()).mean() + 1e-3 * latent.kl().mean() / latent.mean[0].numel()

    held, _ = clips(np.random.default_rng(recipe.seed + 77), 64)

    @torch.no_grad()
    def evaluate(model: AutoencoderKLWan) -> dict:
        restored = model.decode(model.encode(held).latent_dist.mode()).sample
        return {"l1": round((restored - held).abs().mean().item(), 5)}

    kernels = [p for p in vae.parameters() if p.ndim > 3 and min(p.flatten(1).shape) > 4]
    rest = [p for p in vae.parameters() if not any(p is kernel for kernel in kernels)]
    optimizers: list[torch.optim.Optimizer] = [
        ConvMuon(kernels, lr=0.02, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=4e-3, betas=(0.9, 0.99), weight_decay=0.0),
    ]
    vae = run.train(vae, optimizers, recipe.autoencoder_steps, loss, evaluate, every=200, decay=0.99)
    run.save(vae)


def load_autoencoder(recipe: Recipe) -> AutoencoderKLWan:
    """The trained autoencoder."""
    vae = networks.autoencoder().eval()
    vae.load_state_dict(torch.load(recipe.work / "autoencoder.pt", weights_only=True))
    if (recipe.work / "statistics.json").exists():
        vae.register_to_config(**json.loads((recipe.work / "statistics.json").read_text()))
    return vae


@torch.no_grad()
def latents(recipe: Recipe) -> None:
    """Draws and encodes the clips, each rank its share; records the mean and the deviation of each latent channel."""
    run, vae = Run(recipe.work, "latents", recipe.seed), load_autoencoder(recipe)
    rng = np.random.default_rng([recipe.seed + 1, run.rank])
    encoded, prompts = [], []
    for _ in range(recipe.clips // run.ranks // 64):
        frames, asked = clips(rng, 64)
        encoded.append(vae.encode(frames).latent_dist.mode())
        prompts += asked
    parts = [recipe.work / f"latents.rank{rank}.pt" for rank in range(run.ranks)]
    torch.save({"x0": torch.cat(encoded), "ids": networks.token_ids(prompts)}, parts[run.rank])
    wait()
    if run.rank == 0:
        loaded = [torch.load(part, weights_only=True) for part in parts]
        x0, ids = (torch.cat([part[name] for part in loaded]) for name in ("x0", "ids"))
        mean, deviation = x0.mean((0, 2, 3, 4)), x0.std((0, 2, 3, 4))
        statistics = {"latents_mean": mean.tolist(), "latents_std": deviation.tolist()}
        (recipe.work / "statistics.json").write_text(json.dumps(statistics))
        run.log(clips=len(x0), channel_deviations=[round(d, 3) for d in deviation.tolist()])
        x0 = (x0 - mean.view(-1, 1, 1, 1)) / deviation.view(-1, 1, 1, 1)
        torch.save({"x0": x0, "ids": ids}, run.path)


@torch.no_grad()
def decode(vae: AutoencoderKLWan, x0: Tensor) -> Tensor:
    """Latents of unit variance to clips [row, 9, 3, 32, 32] in [0, 1]."""
    mean, deviation = (torch.tensor(vae.config[f"latents_{name}"]).view(-1, 1, 1, 1) for name in ("mean", "std"))
    frames = [vae.decode(part * deviation + mean).sample for part in x0.split(16)]
    return (torch.cat(frames) / 2 + 0.5).clamp(0, 1).transpose(1, 2)


def requests(seed: int, count: int) -> list[str]:
    """Prompts that the evaluation of a flow uses, as the training set has them."""
    rng = np.random.default_rng(seed)
    return [moving.random_prompt(rng) for _ in range(count)]


def evaluator(recipe: Recipe, rows: int = 96) -> Callable[[networks.Flow], dict]:
    """Mean reward, and the share of clips that are exactly right, of 10 Euler steps with and without guidance."""
    prompts = requests(recipe.seed + 77, rows)
    noise = torch.randn(rows, *networks.LATENT, generator=torch.Generator().manual_seed(recipe.seed + 77))
    ids, vae, reward = networks.token_ids(prompts), load_autoencoder(recipe), MotionReward()

    def evaluate(flow: networks.Flow) -> dict:
        record: dict[str, Any] = {}
        for guidance in (1, 3):
            scores = reward(decode(vae, flow.solve(noise, ids, 10, guidance)), prompts)
            record[f"reward_{guidance}"] = round(scores.mean().item(), 3)
            record[f"exact_{guidance}"] = round((scores == 0).float().mean().item(), 3)
        return record

    return evaluate


def optimizers(model: nn.Module, scale: float = 1.0) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, AdamW for the rest."""
    return muon([model], lambda name: ".blocks." in name, scale)


def flow(recipe: Recipe) -> None:
    """Flow matching from scratch; half of the steps see texts padded as WanPipeline does it, half to other lengths."""
    run = Run(recipe.work, "flow", recipe.seed)
    data = torch.load(recipe.work / "latents.pt", weights_only=True)
    empty = networks.token_ids([""])
    torch.manual_seed(recipe.seed)
    model, rows = networks.Flow(), recipe.batch // run.ranks

    def loss() -> Tensor:
        pick = torch.randint(len(data["ids"]), (rows,), generator=run.rng)
        x0, text = data["x0"][pick], data["ids"][pick]
        text = torch.where(torch.rand(rows, 1, generator=run.rng) < 0.1, empty, text)
        t = torch.sigmoid(torch.randn(rows, generator=run.rng) * 1.2 + 0.4)
        noise = torch.randn(x0.shape, generator=run.rng)
        x = torch.lerp(x0, noise, t.view(-1, 1, 1, 1, 1))
        other, u = torch.rand(2, generator=run.rng).tolist()
        tokens = networks.WAN_TOKENS if other < 0.5 else int(32 * (networks.WAN_TOKENS / 32) ** u)
        return F.mse_loss(model(x, t, text, tokens), noise - x0)

    model = run.train(model, optimizers(model), recipe.flow_steps, loss, evaluator(recipe), every=500)
    run.save(model)


def save(recipe: Recipe) -> None:
    """Writes the pipeline folder: the autoencoder and the transformer in float16, the small text encoder in float32."""
    run, vae, model = Run(recipe.work, "save", recipe.seed), load_autoencoder(recipe), networks.Flow()
    model.load_state_dict(torch.load(recipe.work / "flow.pt", weights_only=True))
    for block in model.transformer.blocks:
        block.attn2.set_processor(WanAttnProcessor())
    folder = recipe.out / "shapes-video"
    networks.pipeline(vae.half(), model.transformer.half(), model.text).save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    run.log(folder=folder.name, mebibytes=round(size / 2**20, 2), environment=environment())


def main() -> None:
    """Runs the stages that are asked for and not yet done."""
    recipe = tyro.cli(Recipe, description=__doc__)
    recipe.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", 0))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(hours=6))
    for stage in STAGES if recipe.stage == "all" else (recipe.stage,):
        if not (recipe.work / f"{stage}.pt").exists():
            if stage != "save" or rank == 0:
                globals()[stage](recipe)
            wait()


if __name__ == "__main__":
    main()
