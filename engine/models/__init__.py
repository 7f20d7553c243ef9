"""Flow models: what the engine asks of one, what one may declare beyond that, and the built-in checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow.errors import ModelError, shown
from rollflow.models.layout import LatentMap, Layout
from rollflow.models.text import Size
from rollflow.names import BUILT_IN as BUILT_IN


@dataclass(frozen=True)
class Geometry:
    """The sizes that go with one size of images or clips; rows of one forward share a geometry.

    `height` and `width` are in pixels, `latent_height` and `latent_width` in latent pixels; a state has `token` tokens
    of `channel` channels. `frames` are those of a clip, None of images. `shape` is that of a state as a pipeline
    carries it, where that is not `[token, channel]`. `kept` is of requests with a cache: how many channels of a token
    are kept of an evaluation for others, see `Capabilities.caches`. Their particles have a storage of their own.
    """

    height: int
    width: int
    latent_height: int
    latent_width: int
    token: int
    channel: int
    frames: int | None = None
    shape: tuple[int, ...] | None = None
    kept: int = 0

    def __post_init__(self) -> None:
        values = tuple(getattr(self, name) for name in self.__dataclass_fields__)
        object.__setattr__(self, "_hash", hash(values))  # it is looked up for every row

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    @property
    def state(self) -> tuple[int, ...]:
        """The shape of a state, as a pipeline carries it."""
        return (self.token, self.channel) if self.shape is None else self.shape

    @property
    def plain(self) -> Geometry:
        """That of requests without a cache."""
        return replace(self, kept=0) if self.kept else self

    def __str__(self) -> str:
        clip = "" if self.frames is None else f", {self.frames} frames"
        return f"{self.height}x{self.width}{clip}"


@dataclass(frozen=True)
class Traits:
    """What searches should know of a model, as `rollflow study fidelity` measures it.

    Attributes:
        steps: evaluations after which its samples are good.
        trusted_from: the linear time from which on, towards the image, the reward of a posterior mean foretells that of
            the final image. Near 1 for models that were distilled or rectified to a few steps; others draw blurred
            posterior means for longer.
        shift: of the time grid of its own sampler, as `Request.shift` takes it for the kind "shifted"; None where it is
            not known, or depends on the size.
        guidance: the guidance scale of requests that name none; None for that of the model's `Capabilities`.
    """

    steps: int = 10
    trusted_from: float = 1.0
    shift: float | None = None
    guidance: float | None = None


_TRAITS = {"shapes": Traits(5, 1.0), "shapes-base": Traits(10, 0.4), "shapes-video": Traits(10, 0.5)}

_SIZES = {"shapes-video": Size(32, 32, 9)}  # of those whose pipeline's class has another size as its own


def own_size(name: str | Path) -> Size | None:
    """The size that a built-in model was trained for, where its pipeline has another one as its own."""
    return _SIZES.get(str(name))


def traits(name: str | Path) -> Traits:
    """Those of a built-in model, of a folder with a traits file, or of a known hub id; the defaults for any other.

    Raises:
        ModelError: the traits file cannot be read; see `rollflow.models.known.traits_of`.
    """
    from rollflow.models.known import KNOWN, traits_of

    if str(name) in _TRAITS:
        return _TRAITS[str(name)]
    if (found := traits_of(name)) is not None:
        return found
    return KNOWN[str(name)].traits if str(name) in KNOWN else Traits()


@dataclass(frozen=True)
class Capabilities:
    """What a model offers beyond `FlowModel`. The engine goes by this declaration and looks for nothing itself.

    Attributes:
        preview: it has `preview(latents)`, `decode` by a light decoder.
        graphable: it has `collate(conditioning)`, which makes a tuple of tensors of a batch's conditionings, and
            `forward(x, tau, collated, guidance, geometry)`, which is `velocity` as a function of tensors alone: a CUDA
            graph can hold it.
        compiled: parts of it are compiled (`torch.compile`) when a batch of a new size comes.
        recordable: it has `record(geometry, conditioning)`, which prepares it for an image size on a CPU.
        releases_text: it has `release_text_encoders()`, which frees their memory.
        frames: it makes clips: its `geometry(height, width, frames)` takes their number, and `decode` gives
            `[row, frame, 3, height, width]`.
        negative: its `encode` takes `rollflow.models.text.Text`s, prompts with what guidance leads away from.
        guides: it has `guides(guidance, geometry)`, whether a request with that scale is led away from anything.
        sized_text: conditionings belong to one size: its `encode(texts, geometry)` is told which.
        companies: it has `for_request(conditioning, guidance)`, the conditioning of a request with that guidance scale,
            `company(conditioning)`, which rows of one batch have in common, and `network_rows(conditioning)`, how many
            rows of its network an evaluation takes.
        images: it has `state(image, geometry)`, the clean state [token, channel] of an image, for searches that start
            from one.
        returns: it has `borrow()`, which an engine calls when it begins, and `give_back()`, which it calls once, at the
            end of its closing; see `rollflow.models.borrowed`.
        caches: it has `kept`, how many numbers a token are kept of an evaluation for others, and beside `collate` of
            `graphable` two forms of `forward`: `forward_kept(x, tau, collated, guidance, geometry)` gives velocities
            and what is kept of them, `[row, token, kept]` in the model's dtype; `forward_cached(x, tau, collated,
            guidance, geometry, kept)` gives velocities by what was kept of others, for a part of the work. At the state
            and the time that it was kept of, both agree.
        schedule: it has `times(steps, geometry)`, the linear times of its own sampler, for the grid "model".
        rounded: its velocities are in its `dtype`, in which they are kept; those of others are kept in float32.
        guidance: the guidance scale of requests that name none.
        timed: a linear time at which an evaluation takes all of its network rows; batches are timed there.
        signature: models of the same signature cost the same, so that one's measurements count for the other; `None`
            for a model that cannot be told from others.
    """

    preview: bool = False
    graphable: bool = False
    compiled: bool = False
    recordable: bool = False
    releases_text: bool = False
    frames: bool = False
    negative: bool = False
    guides: bool = False
    sized_text: bool = False
    companies: bool = False
    images: bool = False
    returns: bool = False
    caches: bool = False
    schedule: bool = False
    rounded: bool = False
    guidance: float = 3.5
    timed: float = 1.0
    signature: str | None = None


@runtime_checkable
class FlowModel(Protocol):
    """A flow-matching model on the linear path, as the engine drives it.

    For guided methods `velocity` and `decode` must let gradients through; for others they run without. What they call
    by `rollflow.models.recompute.region` keeps less for the gradients where memory is short. A model that inherits from
    this class has no capabilities unless it declares some.

    Attributes:
        device: where it computes.
        dtype: of the states that it is given.
        layout: the way from a state to what `decode` is given: a `Layout` of images, or for other states, such as those
            of clips, an object with the members of `LatentMap`.
        capabilities: what it offers beyond this.
    """

    device: torch.device
    dtype: torch.dtype
    layout: LatentMap
    capabilities: Capabilities = Capabilities()

    def geometry(self, height: int | None, width: int | None) -> Geometry:
        """The geometry of an image size (`None`: the model's own); raises `RequestError` if it cannot do it."""
        ...

    def check_prompt(self, prompt: str) -> None:
        """Raises `RequestError` for a prompt that the model cannot read: unknown words, or too many."""
        ...

    def encode(self, prompts: Sequence[str]) -> list[Any]:
        """One conditioning a prompt."""
        ...

    def velocity(
        self,
        x: Float[Tensor, "row token channel"],
        tau: Float[Tensor, " row"],
        conditioning: Sequence[Any],
        guidance: Float[Tensor, " row"],
        geometry: Geometry,
    ) -> Float[Tensor, "row token channel"]:
        """`E[eps - x0 | x]` on the linear path, each row at its own linear time `tau` in (0, 1]."""
        ...

    def decode(self, latents: Float[Tensor, "row ..."]) -> Float[Tensor, "row *frame 3 h w"]:
        """De-scaled latents to float32 images in [0, 1]."""
        ...


_MEMBERS = (
    "device", "dtype", "layout", "capabilities", "geometry", "check_prompt", "encode", "velocity", "decode",
)  # fmt: skip
_DECLARED = {
    "preview": ("preview",),
    "graphable": ("collate", "forward"),
    "recordable": ("record",),
    "releases_text": ("release_text_encoders",),
    "guides": ("guides",),
    "companies": ("for_request", "company", "network_rows"),
    "images": ("state",),
    "returns": ("borrow", "give_back"),
    "caches": ("collate", "kept", "forward_kept", "forward_cached"),
    "schedule": ("times",),
}  # members that a capability stands for


def adapt(pipeline_or_model: object) -> FlowModel:
    """The model itself, or the adapter of a diffusers pipeline.

    Raises:
        ModelError: it is neither, and lacks members that the message names, or it is a pipeline of another kind.
    """
    given: Any = pipeline_or_model
    missing = [name for name in _MEMBERS if _lacks(given, name)]
    if not missing:
        _check_declared(given)
        return given
    from diffusers import DiffusionPipeline, FluxPipeline  # seconds, which models of one's own need not wait for

    if isinstance(given, FluxPipeline):
        from rollflow.models.flux import FluxModel

        return FluxModel(given)
    if isinstance(given, DiffusionPipeline):
        from rollflow.models.pipeline import PipelineModel

        return PipelineModel(given)
    raise ModelError(
        f"a {type(given).__name__} is no model: it lacks {', '.join(missing)}; pass a flow pipeline of diffusers, or "
        "an object with the members of rollflow.models.FlowModel (a class that inherits from it has capabilities)"
    )


def velocity_dtype(model: FlowModel) -> torch.dtype:
    """What a model's velocities are kept in: what it gives them in, as far as it declares that, else float32."""
    half = model.dtype in (torch.bfloat16, torch.float16)
    return model.dtype if half and model.capabilities.rounded else torch.float32


def _lacks(given: Any, name: str) -> bool:
    """Whether a member is not there, or is what `FlowModel` itself writes down of it."""
    written = FlowModel.__dict__.get(name)
    return not hasattr(given, name) or (callable(written) and getattr(type(given), name, None) is written)


def _check_declared(model: Any) -> None:
    kind = type(model).__name__
    for name, expected in (("layout", LatentMap), ("capabilities", Capabilities)):
        if not isinstance(getattr(model, name), expected):
            found = type(getattr(model, name)).__name__
            wanted = Layout if expected is LatentMap else expected
            raise ModelError(
                f"a {kind} has a {found} as its {name}: it must be a {wanted.__module__}.{wanted.__name__}"
            )
    for capability, members in _DECLARED.items():
        missing = [name for name in members if getattr(model.capabilities, capability) and not hasattr(model, name)]
        if missing:
            raise ModelError(f"a {kind} declares the capability {capability} and lacks {', '.join(missing)}")


def silence() -> None:
    """Turns off the loading bars of diffusers and transformers."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def folder(name: str) -> Path:
    """The folder of a built-in checkpoint, a pipeline as diffusers saves it.

    Raises:
        ModelError: there is no built-in checkpoint of this name.
    """
    path = Path(__file__).parent / name
    if name not in BUILT_IN:
        raise ModelError(f"no built-in model {shown(name)}: choose one of {', '.join(BUILT_IN)}")
    if not path.is_dir():
        raise ModelError(f"the built-in model {name!r} is not at {path}: install the package again, with its data")
    return path
