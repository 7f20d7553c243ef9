"""`similarity`: how much an image shows what another one shows, by DINOv2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from rollflow.errors import ModelError
from rollflow.rewards import weights
from rollflow.rewards.network import LOCAL, NetworkReward, loading, pretrained
from rollflow.rewards.pixels import Preparation
from rollflow.rewards.reference import Given, Reference, given, reference


class _Parts(NamedTuple):
    device: torch.device
    embed: Callable[[Tensor], Tensor]  # unit vectors of images


@dataclass(frozen=True)
class Similarity(NetworkReward):
    """The cosine, in [-1, 1], of the DINOv2 embeddings of an image and of a reference image; differentiable.

    Oquab et al. 2023, arXiv 2304.07193; the embedding is the class token after the last norm. It tells subjects and
    their parts apart, and overlooks place, light and style more than pixels do: the DINO score of DreamBooth (Ruiz et
    al. 2023, arXiv 2208.12242, section 4.2) with the newer network. For likeness of pixels see `lpips`. It does not
    look at the prompt.

    `transformers` does the work; the authors' package is fetched as code by `torch.hub`, and its weights are pickles.

    Attributes:
        model: a DINOv2 of transformers, or another vision transformer with a class token, with its image processor.
        image: the reference: the path of a file; in Python also a picture of Pillow or a tensor [3, height, width] in
            [0, 1].
    """

    kind: ClassVar[str] = "similarity"
    differentiable: ClassVar[bool] = True

    model: str = "facebook/dinov2-base"
    image: Given = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "image", given(self.kind, self.image))

    def check(self, prompt: str) -> None:
        """Looks for the reference too; see `NetworkReward.check`."""
        self._reference()
        super().check(prompt)

    def load(self, folder: Path, device: torch.device, dtype: torch.dtype) -> _Parts:
        """See `NetworkReward.load`."""
        from transformers import AutoImageProcessor, AutoModel

        network = pretrained(self.kind, AutoModel, folder, device, dtype)
        if network.main_input_name != "pixel_values":
            raise ModelError(f"similarity: {type(network).__name__} reads text: give a model of images alone")
        with loading(self.kind, folder):
            prepare = Preparation.of(AutoImageProcessor.from_pretrained(folder, **LOCAL))

        def embed(images: Float[Tensor, "row 3 height width"]) -> Float[Tensor, "row channel"]:
            seen = network(pixel_values=prepare(images.to(device)).to(dtype)).last_hidden_state[:, 0]
            return normalize(seen.float(), dim=-1)

        return _Parts(device, embed)

    def score(self, images: Float[Tensor, "row 3 height width"], prompts: list[str]) -> Float[Tensor, " row"]:
        """See `FrameReward.score`."""
        parts = self.parts(images.device)
        return parts.embed(images) @ self._target(parts)

    def _target(self, parts: _Parts) -> Float[Tensor, " channel"]:
        """The embedding of the reference, made once."""
        shown = self._reference()
        key = (type(self), self.model, self.revision, parts.device, self.chosen_dtype(parts.device), shown.digest)
        return weights.once(key, lambda: _embedded(parts, shown))

    def _reference(self) -> Reference:
        assert isinstance(self.image, str | Reference)
        return reference(self.kind, self.image)


def _embedded(parts: _Parts, shown: Reference) -> Float[Tensor, " channel"]:
    with torch.inference_mode(False), torch.no_grad():
        return parts.embed(shown.pixels[None])[0]
