"""Classifier-free guidance for a model that has none: a second row of its network an evaluation, without the prompt."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow.copies import upload
from rollflow.errors import ModelError, RequestError, shown
from rollflow.models import Capabilities, FlowModel, Geometry, adapt
from rollflow.models.rule import Rule
from rollflow.models.text import Text
from rollflow.values import flag, number

NEGATIVES = 256  # encodings that are kept


class Pair(NamedTuple):
    """What the wrapped model made of the prompt, and of what guidance leads away from: None without guidance."""

    conditional: Any
    unconditional: Any | None


class ClassifierFree(FlowModel):
    """`v = u + w (c - u)`: any model that reads prompts, with classifier-free guidance (Ho & Salimans, 2207.12598).

    `c` is the velocity with the prompt and `u` that with the negative one. Both are rows of one call of the model's
    `velocity`, first those with the prompts, and both count as `network_rows`; where the scale of a request is neutral,
    there is one, and `v = c`. An evaluation is one NFE either way.

    Of the model's capabilities all stay but `graphable`: a graph would hold one number of rows. An embedded guidance
    scale of the model's own stays at its default.

    Args:
        model: a `rollflow.models.FlowModel`, or a pipeline whose adapter has no such guidance (`FluxPipeline`).
        rule: how `c` and `u` become one, see `rollflow.models.rule`.
        negative: what requests lead away from that do not say what.
        guidance: the scale of requests that name none.
        rescale: `phi`, from 0 to 1: how far a row's standard deviation, over all of its elements, goes back to that of
            `c`, against over-exposure: `phi v std(c) / std(v) + (1 - phi) v` (Lin et al., 2305.08891, section 3.4).
        interval: `(low, high)`: guidance takes place at linear times in (low, high]; at others `v = c` (Kynkäänniemi et
            al., 2404.07724).
        skip: leave the second row out where the interval does, which waits for the device to know which. Then
            `network_rows` is the most that an evaluation takes, and a result depends on its company as far as the
            model's rows depend on the number of rows (rounding).

    Raises:
        ModelError: it is no model, or one that guides by itself.
        RequestError: a number out of range, or a negative prompt that the model cannot read.
    """

    def __init__(
        self,
        model: object,
        rule: Rule = Rule(),  # noqa: B008 (frozen)
        negative: str = "",
        *,
        guidance: float = 3.5,
        rescale: float = 0.0,
        interval: tuple[float, float] = (0.0, 1.0),
        skip: bool = False,
    ):
        inner: Any = adapt(model)
        able = inner.capabilities
        if able.negative or able.companies:
            raise ModelError(
                f"ClassifierFree of a {type(inner).__name__}: it guides by itself, or chooses which rows share a "
                "batch; pass it to the engine as it is"
            )
        if not 0 <= number("rescale", rescale) <= 1:
            raise RequestError(f"rescale={shown(rescale)}: it must be a number from 0 (none) to 1")
        if len(interval) != 2 or not 0 <= number("interval", interval[0]) < number("interval", interval[1]) <= 1:
            raise RequestError(
                f"interval={shown(interval)}: it must be (low, high), linear times with 0 <= low < high <= 1"
            )
        inner.check_prompt(negative)
        self.model, self.rule, self.negative, self.rescale = inner, rule, negative, float(rescale)
        self.interval, self.skip = (float(interval[0]), float(interval[1])), flag("skip", skip)
        self.device, self.dtype, self.layout = inner.device, inner.dtype, inner.layout
        self._negatives: dict[tuple[str, Geometry | None], Any] = {}
        self._lock = threading.Lock()
        if able.returns:
            self.borrow: Callable[[], None] = inner.borrow
            self.give_back: Callable[[], None] = inner.give_back
        self.capabilities = Capabilities(
            preview=able.preview, recordable=able.recordable, releases_text=able.releases_text, frames=able.frames,
            sized_text=able.sized_text, images=able.images, returns=able.returns, schedule=able.schedule,
            rounded=able.rounded, negative=True, guides=True, companies=True, guidance=number("guidance", guidance),
            timed=1.0 if self.interval[1] >= 1 else sum(self.interval) / 2,
            signature=None if able.signature is None else repr((able.signature, "guided", self.interval, self.skip)),
        )  # fmt: skip

    # Prompts.

    def check_prompt(self, prompt: str) -> None:
        """See `FlowModel.check_prompt`."""
        self.model.check_prompt(prompt)

    def encode(self, prompts: Sequence[str | Text], geometry: Geometry | None = None) -> list[Pair]:
        """See `FlowModel.encode`; each text alone.

        Raises:
            RequestError: a negative prompt that the model cannot read.
        """
        texts = [Text(one) if isinstance(one, str) else one for one in prompts]
        return [Pair(self._encoded(text.prompt, geometry), self._negative(text.negative, geometry)) for text in texts]

    def _encoded(self, prompt: str, geometry: Geometry | None) -> Any:
        self.model.check_prompt(prompt)  # one that was known may be asked for again, without its text encoders
        given = ([prompt], geometry) if self.model.capabilities.sized_text else ([prompt],)
        return self.model.encode(*given)[0]

    def _negative(self, negative: str | None, geometry: Geometry | None) -> Any:
        key = (self.negative if negative is None else negative, geometry)
        with self._lock:
            if key not in self._negatives:
                self._negatives[key] = self._encoded(*key)
                for old in list(self._negatives)[:-NEGATIVES]:
                    del self._negatives[old]
            return self._negatives[key]

    def guides(self, guidance: float, geometry: Geometry) -> bool:
        """Whether a request with this scale is led away from its negative prompt."""
        return self.rule.on(guidance)

    def for_request(self, conditioning: Pair, guidance: float) -> Pair:
        """The conditioning of a request with this scale: of one row where the scale is neutral."""
        return conditioning if self.rule.on(guidance) else conditioning._replace(unconditional=None)

    def company(self, conditioning: Pair) -> Hashable:
        """What rows of one batch have in common: whether they are guided."""
        return conditioning.unconditional is not None

    def network_rows(self, conditioning: Pair) -> int:
        """Rows of the network that one evaluation takes."""
        return 1 if conditioning.unconditional is None else 2

    # Rows.

    def velocity(
        self,
        x: Float[Tensor, "row token channel"],
        tau: Float[Tensor, " row"],
        conditioning: Sequence[Pair],
        guidance: Float[Tensor, " row"],
        geometry: Geometry,
    ) -> Float[Tensor, "row token channel"]:
        """See `FlowModel.velocity`; guided rows take two rows of the model, in the same call."""
        rows = [one.conditional for one in conditioning]
        low, high = self.interval
        inside = (tau > low) & (tau <= high)
        second = [i for i, one in enumerate(conditioning) if one.unconditional is not None]
        if self.skip and second and self.interval != (0.0, 1.0):
            within = inside.tolist()
            second = [i for i in second if within[i]]
        embedded = torch.full_like(guidance, self.model.capabilities.guidance)
        if not second:
            return self.model.velocity(x, tau, rows, embedded, geometry)
        rows += [conditioning[i].unconditional for i in second]
        index = upload(torch.tensor([*range(len(x)), *second]), x.device)
        both = self.model.velocity(x[index], tau[index], rows, embedded[index], geometry)
        velocity, chosen = both[: len(x)], index[len(x) :]
        c = velocity[chosen]
        combined = torch.where(inside[chosen].view(-1, 1, 1), self._combined(c, both[len(x) :], guidance[chosen]), c)
        return combined if len(second) == len(x) else velocity.index_copy(0, chosen, combined)

    def _combined(self, c: Tensor, u: Tensor, scale: Tensor) -> Tensor:
        v = self.rule.guided(c, u, scale)
        if not self.rescale:
            return v
        wanted, own = (one.flatten(1).std(1).view(-1, 1, 1) for one in (c, v))
        return self.rescale * v * (wanted / own.clamp(min=1e-12)) + (1 - self.rescale) * v

    # What the wrapped model does, where it declares it.

    def geometry(self, height: int | None = None, width: int | None = None, frames: int | None = None) -> Geometry:
        """See `FlowModel.geometry`."""
        size = (height, width, frames) if self.capabilities.frames else (height, width)
        return self.model.geometry(*size)

    def decode(self, latents: Float[Tensor, "row ..."]) -> Float[Tensor, "row *frame 3 h w"]:
        """See `FlowModel.decode`."""
        return self.model.decode(latents)

    def preview(self, latents: Float[Tensor, "row ..."]) -> Float[Tensor, "row *frame 3 h w"]:
        """`decode` by the light decoder."""
        return self.model.preview(latents)

    def state(self, image: Tensor, geometry: Geometry) -> Float[Tensor, "token channel"]:
        """The clean state of an image."""
        return self.model.state(image, geometry)

    def times(self, steps: int, geometry: Geometry) -> list[float]:
        """The linear times of the model's own sampler."""
        return self.model.times(steps, geometry)

    def record(self, geometry: Geometry, conditioning: Pair) -> None:
        """Prepares an image size on a CPU; what is recorded serves any number of rows."""
        self.model.record(geometry, conditioning.conditional)

    def release_text_encoders(self) -> None:
        """Frees the text encoders; negative prompts that were encoded before stay known."""
        self.model.release_text_encoders()
