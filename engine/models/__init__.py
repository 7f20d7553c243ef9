"""Flow models: what the engine asks of one, adapters around diffusers pipelines, and the built-in checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow.errors import ModelError

BUILT_IN = ("shapes", "shapes-base")


@dataclass(frozen=True)
class Geometry:
    """The sizes that go with one image size; rows of one forward share a geometry.

    `height` and `width` are in pixels, `latent_height` and `latent_width` in latent pixels; a latent has `token`
    tokens of `channel` channels.
    """

    height: int
    width: int
    latent_height: int
    latent_width: int
    token: int
    channel: int


@dataclass(frozen=True)
class Traits:
    """What searches should know of a model, as `rollflow study fidelity` measures it.

    Attributes:
        steps: evaluations after which its samples are good.
        trusted_from: the linear time from which on, towards the image, the reward of a posterior mean foretells that of
            the final image. Near 1 for models that were distilled or rectified to a few steps; others draw blurred
            posterior means for longer.
    """

    steps: int = 10
    trusted_from: float = 1.0


_TRAITS = {"shapes": Traits(5, 1.0), "shapes-base": Traits(10, 0.4)}


def traits(name: str | Path) -> Traits:
    """Those of a built-in model, and the defaults for any other."""
    return _TRAITS.get(str(name), Traits())


@runtime_checkable
class FlowModel(Protocol):
    """A flow-matching model on the linear path, as the engine drives it.

    For guided methods `velocity` and `decode` must let gradients through; for others they run without.
    """

    device: torch.device
    dtype: torch.dtype
    scaling: float
    shift: float

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

    def decode(self, latents: Float[Tensor, "row channel height width"]) -> Float[Tensor, "row 3 h w"]:
        """De-scaled latents to float32 images in [0, 1]."""
        ...


def silence() -> None:
    """Turns off the loading bars of diffusers and transformers."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def folder(name: str) -> Path:
    """The folder of a built-in checkpoint, a `FluxPipeline` as diffusers saves it.

    Raises:
        ModelError: there is no built-in checkpoint of this name.
    """
    path = Path(__file__).parent / name
    if name not in BUILT_IN:
        raise ModelError(f"no built-in model {name!r}: choose one of {', '.join(BUILT_IN)}")
    if not path.is_dir():
        raise ModelError(f"the built-in model {name!r} is not at {path}: install the package again, with its data")
    return path
