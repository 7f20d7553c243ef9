"""What a caller asks for and what he gets back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from rollflow import interpolant as interpolants
from rollflow import methods
from rollflow.errors import RequestError, said, shown
from rollflow.profile.accounts import Cost


@dataclass(frozen=True)
class Request:
    """One search: the best image for `prompt` by `reward` within `nfe` function evaluations.

    Where `steps`, `interpolant`, `grid` or `diffusion` is None, it is what suits the method: the model's own ODE
    ("linear", 0, "uniform", and as many steps as suit the model) for methods that do not branch, and the paper's SDE
    ("vp", 3, "paper", 10 steps) for those that do; see `rollflow.methods.defaults`.

    Attributes:
        prompt: what the image should show.
        reward: a name (`rollflow.rewards.names()`) or an expression of names such as "0.7*vqa + 0.3*aesthetic" (see
            `rollflow.rewards.expression`), a `Reward`, or a function `f(images, prompts) -> scores` of images
            `[row, 3, height, width]` in [0, 1], or clips `[row, frame, 3, height, width]` of a model of video.
        method: a name of `rollflow.methods.names()`, or a function that makes a search, see `rollflow.methods.make`.
        nfe: the whole budget, finish included; an NFE is one velocity evaluation of one particle. None is 100, or with
            `seconds` or `deadline` as many as fit into that time by what batches were measured to cost.
        steps: points of the time grid that are evaluated.
        interpolant: the path that the particles follow, a name or an `Interpolant`.
        seed: of all noise of this request, any whole number of 64 bits.
        grid: kind of time grid, see `rollflow.sde.time_grid`; `shift` is for the kind "shifted". "model" is the grid of
            the model's own sampler, where it has one, at the same linear times on any interpolant.
        times: an explicit grid in place of `steps` and `grid`: decreasing times in (0, 1]; a last 0 may be left out.
            A search starts at the first from noise alone, so that a first time well below 1 is for given `latents`.
        diffusion: `g(t)` of the SDE: a `rollflow.sde` diffusion, a function of t, or a scale s for the paper's
            `g = s t^2`; 0 is the ODE.
        solver: "euler" (Euler-Maruyama) or "cps" (coefficient-preserving, arXiv 2509.05952).
        finish: deterministic steps from the chosen particle towards t = 0, paid out of `nfe`. Without one the image is
            the posterior mean at the last point of the grid (linear time 0.71 on the paper's VP grid), which is what
            the reward judged: sharp for a few-step model, blurred for others.
        finalists: how many particles compete in the end: the one that the method chose and the best others that were
            judged at any point of the grid, each finished at `finish` evaluations out of `nfe`; the best final reward
            wins, on ties the least noisy one. Only those count that were judged where rewards can be trusted, see
            `rollflow.models.Traits`. 1 takes the method's choice (as published). By default 2 without a finish, where
            it costs nothing (8 where particles are judged on previews, which the full decoder may correct), and 1 with
            one.
        stop_at: a reward that is good enough: the first particle that reaches it, where rewards can be trusted, ends
            the search, and the rest of the budget is not spent. A finish may still better it.
        judge_all: judge every particle that the method asks to be judged. By default those are left out on whose reward
            nothing depends, neither a decision nor the end of the search: their records have none (the last of an only
            finalist's finish has its image's), updates do not count it, and the image is the same.
        seconds: how long the search may take from when it is let in, above 0. When they are over it ends, within the
            batches that run already, with the best so far, finished; with nothing so far, with the first that comes.
        deadline: the same as a time of `time.monotonic()` (of the engine's `clock`), which waiting in the queue counts
            towards. Where it passes before the search could begin, as one in the past does, the request fails with
            `rollflow.errors.OutOfTime`.
        latents: initial noise of unit variance for the first samples of the prior, one or `[n, ...]`, each in the shape
            in which the model's pipeline carries it (for FLUX `[token, channel]`) or flat; further samples come from
            the seed.
        image: where the search starts from in place of noise alone: a PIL image or a tensor [3, height, width] in
            [0, 1], or for a model of video [frame, 3, height, width] or a list of PIL images, such as `Result.frames`,
            which becomes one; of the size that is asked for, by default its.
        strength: how much of the image is replaced, above 0 to 1, by default 0.6: the linear time at which the search
            starts, from `(1 - strength) x0 + strength noise`. The grid is shrunk to what lies below, with as many
            points; that of "model" is cut there. With `times` the first of them says where it starts.
        mask: of an image, where it is drawn anew: a PIL image (white) or a tensor [height, width] (at least 0.5). What
            lies outside stays as it was, at every point of the grid and in what the reward sees, as in pipelines of
            inpainting, whose mask is sampled at the latents' pixels, too.
        cache: evaluate candidates from a cache: the first block of the transformer runs, and what the later ones add is
            taken from their parent's evaluation. A candidate is one of several children that a step of the SDE or the
            ODE leads to; what the search goes on from or returns is evaluated anew, in full. Each of both costs one
            NFE: the budget pays for them, and what it keeps for them and they do not need stays unspent. A search that
            is cancelled shows its best as it is. Updates and `stop_at` take the rewards of candidates as they are: a
            search that ends by `stop_at` may give an image whose own reward is below it. It pays where steps add little
            noise, such as `diffusion=0.3` on the linear path, and misleads where they add much, as by default
            (`rollflow bench caching`). For models and methods that can do it, see `rollflow.models.Capabilities.caches`
            and `rollflow.methods.method`; not for guided searches.
        priority: requests of a higher one go first where they compete for the device; it changes no result.
        guidance: guidance scale, by default the model's own: an embedded one for guidance-distilled models
            (FLUX.1-dev), or that of classifier-free guidance, which takes two rows of the network an evaluation; at 1
            mostly one (for some families at 0, see `rollflow probe`). Models without guidance ignore it; below 0 it is
            refused.
        negative: what classifier-free guidance leads away from, where the model has it and the scale guides at all.
        height, width: image size in pixels; by default the model's own.
        frames: length of a clip, of a model of video; by default the model's own.
        options: the method's own options, such as `{"initial": 25}` for rbf.
        held_out: a second judge of the final image alone, which no search sees: a reward as above, in place of the one
            that the reward itself may name.

    Nothing is checked here, but when a request is handed in; see `rollflow.checks`. Numbers may be NumPy's, or tensors
    of no dimension: the request of a `Result` holds Python's.

    Raises:
        RequestError: an image of a list of frames cannot be read.
    """

    prompt: str
    reward: Any = "count"
    method: str | Callable[..., methods.Search] = "sprout"
    nfe: int | None = None
    steps: int | None = None
    interpolant: str | interpolants.Interpolant | None = None
    seed: int = 0
    grid: str | None = None
    shift: float = 3.0
    times: Sequence[float] | None = None
    diffusion: Any = None
    solver: str = "euler"
    finish: int = 0
    finalists: int | None = None
    stop_at: float | None = None
    judge_all: bool = False
    seconds: float | None = None
    deadline: float | None = None
    latents: torch.Tensor | None = None
    image: Image.Image | torch.Tensor | Sequence[Image.Image] | None = None
    strength: float | None = None
    mask: Image.Image | torch.Tensor | None = None
    cache: bool = False
    priority: int = 0
    guidance: float | None = None
    negative: str | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    held_out: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.image, list | tuple) and is_clip(self.image):
            object.__setattr__(self, "image", torch.stack([pixels_of(frame, "image") for frame in self.image]))


Kind = Literal["committed", "guided", "finish", "refresh"]


@dataclass(frozen=True, slots=True)
class Record:
    """One evaluated particle of a request's history.

    `level` is its point of the time grid (finish steps count on from the last), `time` the interpolant's time there,
    `parent` the index of its parent's record, `kind` why the row was run, `nfe` what it was charged. `reward` is None
    for a particle that was not judged; `terms` are the scores of a combined reward's terms, as they were given.
    `cached` says that it was evaluated from its parent's evaluation, see `Request.cache`; the same particle evaluated
    anew, in full, has a record of kind "refresh", whose parent is the record of before.
    """

    index: int
    level: int
    time: float
    reward: float | None
    parent: int | None
    kind: Kind
    nfe: int = 1
    terms: Mapping[str, float] | None = None
    cached: bool = False


@dataclass(frozen=True, repr=False)
class Result:
    """What a search found.

    Attributes:
        image: the chosen image, of a clip its middle frame; `reward` and `held_out` are its scores, as an 8-bit image.
        pixels: the same before rounding to 8 bits, float32 [3, height, width] in [0, 1], or [frame, 3, height, width]
            of a clip, on the CPU.
        reward: the reward's score.
        terms: of a combined reward, the scores of its terms by name, before they are normalised or weighted.
        held_out: the score of the held-out judge, which no search sees; None if there is none.
        committed_nfe: function evaluations that the algorithm was charged for: as many as asked, unless something else
            than the budget ended the search, see `stopped`.
        cached_nfe: those of them that were evaluated from a cache, see `Request.cache`: each is one NFE, and took a
            part of its work.
        executed_nfe: what the device ran for this request, its share of padding included; a row counts as much as it is
            charged.
        stopped: what ended the search: "budget" (all of it is spent, or the method had enough), "stop_at" (a reward was
            good enough), "seconds" or "deadline" (its time was over), or "cancelled" (of `Job.best` after `cancel`).
        invalid_rewards: how many particles had a reward that is no finite number, and count as worst, or a gradient
            that is none, and were not guided.
        network_rows: rows of the network that those took: two each with classifier-free guidance.
        notes: what the method noted on its way, such as effective sample sizes; see `rollflow.draw.Note`.
        history: a record for each evaluated particle, in the order of evaluation.
        seconds: wall time from admission to the end.
        request: what was asked.
        cost: NFE by kind, seconds by stage, and its share of each batch, as far as the ledger still keeps them; None
            where it keeps nothing or is off.
    """

    image: Image.Image
    pixels: torch.Tensor
    reward: float
    held_out: float | None
    committed_nfe: int
    executed_nfe: int
    invalid_rewards: int
    history: list[Record]
    seconds: float
    request: Request
    stopped: str = "budget"
    notes: list[Mapping[str, Any]] = field(default_factory=list)
    network_rows: int = 0
    terms: Mapping[str, float] | None = None
    cost: Cost | None = None
    cached_nfe: int = 0

    def __repr__(self) -> str:
        frames = f", frames={len(self.pixels)}" if self.pixels.ndim == 4 else ""
        height, width = self.pixels.shape[-2:]
        return (
            f"Result(prompt={shown(self.request.prompt)}, reward={self.reward:.4g}, nfe={self.committed_nfe}, "
            f"stopped={self.stopped!r}, size={height}x{width}{frames})"
        )

    @property
    def unspent_nfe(self) -> int:
        """What was saved of the budget."""
        return (self.request.nfe or 0) - self.committed_nfe

    @property
    def frames(self) -> list[Image.Image]:
        """The frames of a clip, in order; the one image where it is none."""
        pixels = self.pixels if self.pixels.ndim == 4 else self.pixels[None]
        return [picture(frame) for frame in (pixels.clamp(0, 1) * 255).round().to(torch.uint8)]

    def save(self, path: str | Path, fps: float = 16) -> Path:
        """Writes the image or the clip, in the format that the path's suffix says.

        Args:
            path: ends in .png, .jpg, .webp or another format of Pillow's; a clip in .gif, .webp or .mp4. Of a clip, a
                format of still images has its middle frame.
            fps: frames a second.

        Raises:
            RequestError: a suffix that is none of these, or a folder that is not there; for .mp4, that the packages
                imageio and imageio-ffmpeg are missing.
        """
        from rollflow import saving

        return saving.save(self.frames, self.image, Path(path), fps)


def is_clip(frames: Sequence[Any]) -> bool:
    """Whether these are PIL images of one size, at least one."""
    return all(isinstance(frame, Image.Image) for frame in frames) and len({frame.size for frame in frames}) == 1


def pixels_of(image: Image.Image, name: str) -> torch.Tensor:
    """An image as float32 [3, height, width] in [0, 1].

    Raises:
        RequestError: it cannot be read; the message calls it `name`.
    """
    try:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    except Exception as error:  # of a file that is read only now
        raise RequestError(f"{name}={shown(image)}: it cannot be read ({said(error)})") from error


def picture(pixels: torch.Tensor) -> Image.Image:
    """An image of 8-bit pixels [3, height, width]; of a clip [frame, 3, height, width] the middle frame."""
    frame = pixels[len(pixels) // 2] if pixels.ndim == 4 else pixels
    return Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())
