"""`aesthetic`: how much people like an image, by LAION's predictor."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from rollflow.errors import ModelError, shown
from rollflow.rewards import checkpoint, known
from rollflow.rewards.clip import images_of
from rollflow.rewards.network import NetworkReward, frozen, pretrained
from rollflow.rewards.weights import Wanted

_LAYER = re.compile(r"(?:layers\.)?(\d+)\.(weight|bias)")


class _Parts(NamedTuple):
    device: torch.device
    image: Callable[[Tensor], Tensor]
    head: nn.Module


@dataclass(frozen=True)
class Aesthetic(NetworkReward):
    """LAION's aesthetic predictor V2, a mean opinion of about 1 to 10: a linear head on CLIP ViT-L/14; differentiable.

    `head(e / |e|)` of the embedding `e` of the image; Schuhmann 2022, github.com/christophschuhmann/improved-aesthetic-
    predictor, `sac+logos+ava1-l14-linearMSE`: five linear layers without anything between them, trained on ratings of
    SAC, LAION-Logos and AVA. It is the reward of the gradient task of Kim et al. 2025, arXiv 2503.19385. It does not
    look at the prompt.

    `transformers` runs CLIP, whose image embedding is that of OpenAI's `clip` package, which the authors call; the head
    is a product of matrices, for which no library is needed. The authors publish it as a torch pickle; the usual `head`
    is a copy in safetensors. A copy of both in one model of the hub (shunk031) wants code of the hub.

    Attributes:
        model: the CLIP of transformers that the head was trained on, with its image processor.
        head: a file (.safetensors, or the authors' .pth, of which tensors alone are read), a folder with one, or a hub
            id.
    """

    kind: ClassVar[str] = "aesthetic"
    differentiable: ClassVar[bool] = True

    model: str = "openai/clip-vit-large-patch14"
    head: str = "ttj/sac-logos-ava1-l14-linearMSE"

    def wanted(self) -> tuple[Wanted, ...]:
        """See `NetworkReward.wanted`."""
        files = () if checkpoint.is_file(self.kind, self.head) else (self._head(),)
        return (*super().wanted(), *files)

    def variant(self) -> tuple[Any, ...]:
        """See `NetworkReward.variant`."""
        return (self.head,)

    def load(self, folder: Path, device: torch.device, dtype: torch.dtype) -> _Parts:
        """See `NetworkReward.load`."""
        from transformers import CLIPModel

        head = linear_head(checkpoint.tensors(self.kind, self._head()), self.head)
        network = pretrained(self.kind, CLIPModel, folder, torch.device("cpu"), torch.float32)
        width = network.config.projection_dim
        if head[0].in_features != width:
            raise ModelError(
                f"aesthetic: the head {shown(self.head)} takes {head[0].in_features} numbers, and the embeddings of "
                f"{shown(self.model)} have {width}: give the CLIP that the head was trained on"
            )
        del network.text_model
        network = frozen(network, device, dtype)
        return _Parts(device, images_of(self.kind, network, folder), frozen(head, device, torch.float32))

    def score(self, images: Float[Tensor, "row 3 height width"], prompts: list[str]) -> Float[Tensor, " row"]:
        """See `FrameReward.score`."""
        parts = self.parts(images.device)
        embeddings = parts.image(images.to(parts.device)).float()
        return parts.head(normalize(embeddings, dim=-1))[:, 0]

    def _head(self) -> Wanted:
        return Wanted(self.head, known.revision(self.head), checkpoint.PATTERNS)


def linear_head(tensors: dict[str, Tensor], source: str) -> nn.Sequential:
    """Linear layers one after the other, in the numeric order of their names, as `layers.0.weight` or `0.weight`.

    Raises:
        ModelError: they are no such layers, or do not end in one number.
    """
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if (match := _LAYER.fullmatch(name)) is not None:
            found.setdefault(int(match[1]), {})[match[2]] = tensor.float()
    layers = [found[place] for place in sorted(found)]
    shapes = [tuple(layer["weight"].shape) for layer in layers if {*layer} == {"weight", "bias"}]
    ends = [shape[0] for shape in shapes if len(shape) == 2]
    if len(ends) != len(layers) or [*ends[:-1], 1] != [*(shape[1] for shape in shapes[1:]), *ends[-1:]]:
        raise ModelError(
            f"aesthetic: {shown(source)} is no head: it must have linear layers that end in one number, as in "
            f"layers.0.weight and layers.0.bias, and has {', '.join([*tensors][:4]) or 'no tensors'}"
        )
    head = nn.Sequential(*(nn.Linear(shape[1], shape[0]) for shape in shapes))
    head.load_state_dict({f"{i}.{name}": tensor for i, layer in enumerate(layers) for name, tensor in layer.items()})
    return head
