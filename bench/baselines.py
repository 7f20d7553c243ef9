"""What the engine is compared with: searches as they are published, and the bare networks.

`sequential_rbf` is the paper's loop, one prompt and one candidate at a time; `diffusers_bon` is best-of-N by diffusers'
own pipeline, as its users run it. Both are plain PyTorch on the modules of a `FluxPipeline`: nothing of the engine's
scheduler, runner, pool or kernels takes part. Give them a pipeline that no engine holds: an engine lays the
autoencoder's weights out channels last, and on a CPU the loops then profit from that. Neither scores a held-out judge.
The `bare_` functions time the parts of which a search consists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import torch
from diffusers import FluxPipeline
from jaxtyping import Float
from torch import Tensor

from rollflow.errors import RequestError
from rollflow.methods.budget import whole
from rollflow.models import FlowModel, Geometry, Traits
from rollflow.models.attention import pinned
from rollflow.models.flux import text_tokens_of
from rollflow.plan import Plan, plan
from rollflow.request import Record, Request
from rollflow.rewards import Reward
from rollflow.sde import Step

Noise = Callable[[int], Tensor]
Search = TypeVar("Search", bound=Callable[..., Any])
GUIDANCE = 3.5  # the engine's, of requests that name none
DRAWS = CHILDREN = 2**20  # of a turn and of a draw: how the engine counts its noise keys


@dataclass(frozen=True)
class Baseline:
    """What a baseline did.

    Attributes:
        committed_nfe: velocity evaluations of one sample each, over all prompts.
        images: final images, one a prompt.
        decodes: images that the autoencoder decoded, final ones included.
        rewards: of the final images, as 8-bit images, one a prompt.
        history: every judged candidate of `sequential_rbf`, in the order of evaluation; else empty.
    """

    committed_nfe: int
    images: int
    decodes: int
    rewards: tuple[float, ...]
    history: tuple[Record, ...] = ()


@dataclass(frozen=True, eq=False)
class _Candidate:
    """An evaluated sample: its state, the velocity there, and what it is worth."""

    index: int
    level: int
    x: Float[Tensor, "1 token channel"]
    u: Float[Tensor, "1 token channel"]
    worth: float

    @property
    def rank(self) -> tuple[float, int]:
        """Better rewards first; of equal ones the less noisy."""
        return self.worth, self.level


class _Loop:
    """Evaluates one candidate of one prompt at a time, and remembers the best `finalists` that can be trusted."""

    def __init__(self, pipeline: FluxPipeline, checked: Plan, noise: Noise | None):
        request, self.plan, self.pipeline = checked.request, checked, pipeline
        self.transformer, self.vae = pipeline.transformer, pipeline.vae
        self.device, self.dtype = self.transformer.device, self.transformer.dtype
        self.height, self.width = _size(pipeline, request.height, request.width)
        rows, columns = (side // (2 * pipeline.vae_scale_factor) for side in (self.height, self.width))
        self.sequence, self.pooled, self.text_ids = pipeline.encode_prompt(
            request.prompt, None, device=self.device, max_sequence_length=text_tokens_of(pipeline)
        )
        self.image_ids = FluxPipeline._prepare_latent_image_ids(1, rows, columns, self.device, self.dtype)
        self.guidance = None
        if self.transformer.config.guidance_embeds:
            scale = GUIDANCE if request.guidance is None else request.guidance
            self.guidance = torch.full((1,), float(scale), device=self.device)
        shape, generator = (rows * columns, self.transformer.config.in_channels), torch.Generator(self.device)
        generator.manual_seed(request.seed)
        self.noise = noise or (lambda key: torch.randn(shape, generator=generator, device=self.device))
        self.history: list[Record] = []
        self.best: list[_Candidate] = []

    def draw(self, parent: _Candidate | None, child: int) -> _Candidate:
        """The parent's next candidate, or a sample of the prior: proposed, evaluated, decoded, judged."""
        level = 0 if parent is None else parent.level + 1
        step = self.plan.steps[level]
        x = torch.zeros((), device=self.device) if parent is None else step.a * parent.x + step.b * parent.u
        if step.k:
            x = x + step.k * self.noise((level + 1) * DRAWS * CHILDREN + child)[None]
        u = self._velocity(x, step)
        reward = self.judge(self.image(x, u, step))
        candidate = _Candidate(len(self.history), level, x, u, _worth(reward))
        above = None if parent is None else parent.index
        self.history.append(Record(candidate.index, level, step.time, reward, above, "committed"))
        if step.tau <= self.plan.trusted_from + 1e-9:
            self.best = sorted([*self.best, candidate], key=lambda c: c.rank, reverse=True)[: self.plan.finalists]
        return candidate

    def _velocity(self, x: Float[Tensor, "1 token channel"], step: Step) -> Float[Tensor, "1 token channel"]:
        return self.transformer(
            hidden_states=(x * (1 / step.scale)).to(self.dtype),
            timestep=torch.full((1,), step.tau, device=self.device),
            guidance=self.guidance,
            pooled_projections=self.pooled,
            encoder_hidden_states=self.sequence,
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0].float()

    def image(
        self, x: Float[Tensor, "1 token channel"], u: Float[Tensor, "1 token channel"], step: Step
    ) -> Float[Tensor, "1 3 height width"]:
        """The posterior mean `p x + q u`, decoded, in [0, 1]."""
        latents = FluxPipeline._unpack_latents(
            step.p * x + step.q * u, self.height, self.width, self.pipeline.vae_scale_factor
        )
        latents = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        decoded = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    def judge(self, image: Float[Tensor, "1 3 height width"]) -> float:
        """The reward of one image; the host waits for it."""
        return self.plan.reward(image, [self.plan.request.prompt]).item()

    def end(self, choice: _Candidate) -> Baseline:
        """The better of the method's choice and the best seen: decoded again, rounded, judged."""
        others = [candidate for candidate in self.best if candidate is not choice]
        final = max([choice, *others][: self.plan.finalists], key=lambda c: c.rank)
        reward = self.judge(_rounded(self.image(final.x, final.u, self.plan.steps[final.level])))
        nfe = len(self.history)
        return Baseline(nfe, 1, nfe + 1, (reward,), tuple(self.history))


def _attending_alike(search: Search) -> Search:
    """With the attention that an engine would have; see `rollflow.models.attention.pin`."""

    @wraps(search)
    def attending(pipeline: FluxPipeline, *args: Any, **options: Any) -> Any:
        with pinned(pipeline.transformer):
            return search(pipeline, *args, **options)

    return attending  # type: ignore[return-value]


@torch.no_grad()
@_attending_alike
def sequential_rbf(
    pipeline: FluxPipeline, request: Request, traits: Traits | None = None, noise: Noise | None = None
) -> Baseline:
    """Rollover budget forcing as it is published: one prompt, one candidate at a time, eager.

    Kim et al. 2025, arXiv 2503.19385, algorithm 1, with the two changes of `rollflow.methods.rbf` (every level
    advances, the last one spends all that remains) and the engine's finalists. With the engine's noise it makes the
    engine's decisions: `lambda key: kernels.noise(torch.tensor([seed]), torch.tensor([key]), token, channel)[0]`.

    In bfloat16 the transformer rounds the time, as it does in any loop around it; the state is float32.

    Args:
        pipeline: a complete FluxPipeline; no engine should hold it.
        request: of the method "rbf", without finish, `stop_at`, given latents and gradient.
        traits: those of the model, as an engine would have them.
        noise: standard normal [token, channel] of a candidate's key, float32 on the pipeline's device; by default
            `torch.randn` with a generator of the request's seed.

    Raises:
        RequestError: the request is invalid, or asks for what is not in the loop.
    """
    if request.method != "rbf" or request.finish or request.stop_at is not None or request.latents is not None:
        raise RequestError("the sequential loop is rbf without finish, stop_at and latents: leave them out")
    if set(request.options) - {"initial"}:
        raise RequestError(f"options={dict(request.options)!r}: the sequential loop has the option initial alone")
    checked = plan(request, traits)
    checked.reward.check(request.prompt)
    nfe, steps = checked.nfe, len(checked.steps)
    initial = request.options.get("initial") or max(1, min(nfe // 10, nfe - (steps - 1)))
    loop = _Loop(pipeline, checked, noise)
    left = nfe - (initial := nfe if steps == 1 else initial)
    current = _best([loop.draw(None, child) for child in range(initial)])
    bar = current.worth
    quota = each = max(1, left // steps)
    for _ in range(1, steps - 1):
        drawn: list[_Candidate] = []
        while len(drawn) < quota and not (drawn and drawn[-1].worth > bar):
            drawn.append(loop.draw(current, len(drawn)))
        left -= len(drawn)
        if drawn[-1].worth > bar:
            current, bar = drawn[-1], drawn[-1].worth
            quota = quota - len(drawn) + each  # the rollover
        else:
            current, quota = _best(drawn), each
    if steps > 1:
        current = _best([loop.draw(current, child) for child in range(left)])
    return loop.end(current)


@torch.no_grad()
@_attending_alike
def diffusers_bon(
    pipeline: FluxPipeline,
    prompts: Sequence[str],
    reward: Reward,
    nfe: int,
    steps: int,
    images_per_prompt: int,
    seed: int = 0,
    *,
    guidance: float = 3.5,
    height: int | None = None,
    width: int | None = None,
) -> Baseline:
    """Best of `nfe // steps` samples a prompt, by diffusers' own `FluxPipeline.__call__`, its progress bar off.

    One prompt a call, tensors in place of PIL images, and a text no longer than the model's: the pipeline's default of
    512 tokens would attend to padding. Each sample is decoded and judged once; the best is judged again at 8 bits.

    Args:
        pipeline: a complete FluxPipeline; no engine should hold it.
        prompts: what the images should show.
        reward: what chooses.
        nfe: budget of a prompt; what does not make a whole sample is not spent.
        steps: evaluations of a sample, on the pipeline's own schedule.
        images_per_prompt: samples of a call, `num_images_per_prompt`; the last call takes what is left.
        seed: of the generator that all calls share.
        guidance: embedded guidance scale of guidance-distilled models; others ignore it.
        height, width: in pixels; by default the model's own.

    Raises:
        RequestError: a budget below one sample, or `steps` or `images_per_prompt` below 1.
    """
    samples = whole("nfe", nfe, whole("steps", steps, 1)) // steps
    whole("images_per_prompt", images_per_prompt, 1)
    height, width = _size(pipeline, height, width)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator(pipeline.transformer.device).manual_seed(seed)
    final = []
    for prompt in prompts:
        best, best_worth = None, -math.inf
        for start in range(0, samples, images_per_prompt):
            count = min(images_per_prompt, samples - start)
            images = pipeline(
                prompt,
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=float(guidance),
                num_images_per_prompt=count,
                max_sequence_length=text_tokens_of(pipeline),
                generator=generator,
                output_type="pt",
            ).images.float()
            for image, score in zip(images, reward(images, [prompt] * count).tolist(), strict=True):
                if best is None or _worth(score) > best_worth:
                    best, best_worth = image, _worth(score)
        assert best is not None
        final.append(reward(_rounded(best[None]), [prompt]).item())
    return Baseline(len(prompts) * samples * steps, len(prompts), len(prompts) * samples, tuple(final))


def _geometry(model: Any, height: int | None, width: int | None, frames: int | None) -> Geometry:
    return model.geometry(height, width, frames) if model.capabilities.frames else model.geometry(height, width)


def bare_forward(
    model: FlowModel, bucket: int, height: int | None = None, width: int | None = None, frames: int | None = None
) -> Callable[[], None]:
    """One transformer forward of `bucket` rows on fixed random inputs, each at its own time.

    With classifier-free guidance each row takes two of the network. On CUDA it returns before the device is done.
    Raises `RequestError` for fewer than one row or an impossible size.
    """
    geometry, generator = _geometry(model, height, width, frames), torch.Generator().manual_seed(0)
    x = torch.randn(whole("bucket", bucket, 1), geometry.token, geometry.channel, generator=generator)
    tau = 1 - 0.9 * torch.rand(bucket, generator=generator)
    network: Any = model  # of declared capabilities
    able, scale = model.capabilities, model.capabilities.guidance
    x, tau, guidance = x.to(model.device, model.dtype), tau.to(model.device), torch.full((bucket,), scale)
    (conditioning,) = network.encode([""], geometry) if able.sized_text else model.encode([""])
    rows = [network.for_request(conditioning, scale) if able.companies else conditioning] * bucket
    collated, guidance = network.collate(rows) if able.graphable else None, guidance.to(model.device)

    def forward() -> None:
        with torch.no_grad():
            if able.graphable:
                network.forward(x, tau, collated, guidance, geometry)
            else:
                network.velocity(x, tau, rows, guidance, geometry)

    return forward


def bare_decode(
    model: FlowModel, bucket: int, preview: bool = False, height: int | None = None, width: int | None = None,
    frames: int | None = None,
) -> Callable[[], None]:  # fmt: skip
    """One decode of `bucket` random latents of unit variance by the full decoder, or by the light one.

    On CUDA it returns before the device is done. Raises `RequestError` for fewer than one row, an impossible size, or
    a model without a light decoder.
    """
    geometry = _geometry(model, height, width, frames)
    if preview and not model.capabilities.preview:
        raise RequestError("preview=True: this model has no light decoder; leave it out")
    decode = model.preview if preview else model.decode  # type: ignore[attr-defined]
    shape = (whole("bucket", bucket, 1), geometry.token, geometry.channel)
    states = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    latents = model.layout.decodable(states, geometry).to(model.dtype)

    def run() -> None:
        with torch.no_grad():
            decode(latents)

    return run


def bare_reward(
    reward: Reward, images: Float[Tensor, "row *frame 3 height width"], prompts: Sequence[str]
) -> Callable[[], None]:
    """One call of `reward` on these images, and its scores on the host."""

    def judge() -> None:
        with torch.no_grad():
            reward(images, prompts).tolist()

    return judge


def _size(pipeline: FluxPipeline, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels, by default the model's own."""
    own = pipeline.vae.config.sample_size
    return own if height is None else height, own if width is None else width


def _rounded(images: Float[Tensor, "row 3 height width"]) -> Float[Tensor, "row 3 height width"]:
    """The images as 8 bits hold them."""
    return (images.clamp(0, 1) * 255).round() / 255


def _worth(score: float) -> float:
    """A score that is no finite number is worst."""
    return score if math.isfinite(score) else -math.inf


def _best(candidates: Sequence[_Candidate]) -> _Candidate:
    """The best reward, the first drawn on ties."""
    return max(candidates, key=lambda candidate: candidate.worth)
