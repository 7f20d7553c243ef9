"""`lpips`: how close the pixels of an image are to those of another one, as people see it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rollflow.errors import ModelError, RequestError, shown
from rollflow.rewards import checkpoint, known
from rollflow.rewards.network import NetworkReward, frozen, loading
from rollflow.rewards.pixels import resized
from rollflow.rewards.reference import Given, Reference, given, reference
from rollflow.rewards.weights import Wanted

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # by channel, of pixels in [-1, 1]
VGG: tuple[int, ...] = (64, 128, 256, 512, 512)  # channels of the layers that are compared
ALEX: tuple[int, ...] = (64, 192, 384, 256, 256)
_COMPARED = {VGG: (3, 8, 15, 22, 29), ALEX: (1, 4, 7, 9, 11)}  # their places in torchvision's `features`
SMALLEST = {VGG: 16, ALEX: 31}  # pixels a side, below which the last layer is empty


@dataclass(frozen=True)
class Lpips(NetworkReward):
    """Minus the LPIPS distance of an image to a reference image: 0 for the same, about -1 at worst; differentiable.

    Zhang et al. 2018, arXiv 1801.03924, version 0.1: the squared difference of a network's features, those of each
    place scaled to length 1, weighted by channel (the heads), averaged over places and summed over five layers. The
    reference is resized to the images (bicubic, antialiased), which are compared at their own size. It does not look at
    the prompt.

    The authors' package and torchmetrics both import torchvision, for the backbone alone. The distance is ten lines and
    the backbone a list of convolutions, so both are here, tested against torchmetrics; from it comes the 1e-8 under the
    root, without which gradients are NaN where no feature is active.

    Attributes:
        model: torchvision's weights of the backbone, VGG-16 (which the authors take for gradients) or AlexNet (with
            which they report distances): a file (.safetensors or a torch .pth, of which tensors alone are read), a
            folder with one, or a hub id. AlexNet is on the hub only as a pickle of torchvision's.
        head: the heads of that backbone, likewise: the authors' vgg.pth or alex.pth, or a copy in safetensors.
        image: the reference: the path of a file; in Python also a picture of Pillow or a tensor [3, height, width] in
            [0, 1].
    """

    kind: ClassVar[str] = "lpips"
    differentiable: ClassVar[bool] = True
    files: ClassVar[tuple[str, ...]] = checkpoint.PATTERNS

    model: str = "timm/vgg16.tv_in1k"
    head: str = "vivym/lpips"
    image: Given = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "image", given(self.kind, self.image))

    @property
    def folder(self) -> Path:
        """Where its backbone is, a folder or a file."""
        path = Path(self.model).expanduser()
        return path if path.is_file() else super().folder

    def wanted(self) -> tuple[Wanted, ...]:
        """See `NetworkReward.wanted`."""
        return tuple(one for one in (*super().wanted(), self._head()) if not checkpoint.is_file(self.kind, one.model))

    def check(self, prompt: str) -> None:
        """Looks for the reference too; see `NetworkReward.check`."""
        self._reference()
        super().check(prompt)

    def variant(self) -> tuple[Any, ...]:
        """See `NetworkReward.variant`."""
        return (self.head,)

    def load(self, folder: Path, device: torch.device, dtype: torch.dtype) -> Distance:
        """See `NetworkReward.load`."""
        heads = [head.flatten() for head in checkpoint.tensors(self.kind, self._head()).values()]
        widths = tuple(map(len, heads))
        if widths not in SMALLEST:
            raise ModelError(
                f"lpips: head={shown(self.head)} has {shown(widths)} numbers: the heads of VGG-16 have {VGG}, and "
                f"those of AlexNet {ALEX}"
            )
        state = checkpoint.tensors(self.kind, Wanted(str(folder)))
        state = {name.removeprefix("features."): t for name, t in state.items() if name.startswith("features.")}
        layers = _vgg() if widths == VGG else _alexnet()
        with loading(self.kind, folder):
            layers.load_state_dict(state)
        return Distance(frozen(layers, device, dtype), [head.to(device, torch.float32) for head in heads])

    def score(self, images: Float[Tensor, "row 3 height width"], prompts: list[str]) -> Float[Tensor, " row"]:
        """See `FrameReward.score`."""
        distance = self.parts(images.device)
        height, width = images.shape[-2:]
        if min(height, width) < distance.smallest:
            raise RequestError(
                f"lpips: images of {height}x{width} pixels are too small for its network: a side needs "
                f"{distance.smallest}"
            )
        pixels = self._reference().pixels[None].to(distance.device)
        return -distance(images.to(distance.device), resized(pixels, height, width))

    def _head(self) -> Wanted:
        return Wanted(self.head, known.revision(self.head), checkpoint.PATTERNS)

    def _reference(self) -> Reference:
        assert isinstance(self.image, str | Reference)
        return reference(self.kind, self.image)


class Distance:
    """LPIPS by the features of a network.

    Args:
        layers: its layers.
        heads: the weights of the channels of those that are compared.

    Attributes:
        device: where they are.
        smallest: pixels that a side of an image needs.
    """

    def __init__(self, layers: nn.Sequential, heads: list[Tensor]):
        widths = tuple(map(len, heads))
        self.device, self.smallest = heads[0].device, SMALLEST[widths]
        self._layers, self._heads, self._compared = layers, heads, _COMPARED[widths]
        self._dtype = next(layers.parameters()).dtype

    def __call__(
        self, images: Float[Tensor, "row 3 height width"], reference: Float[Tensor, "1 3 height width"]
    ) -> Float[Tensor, " row"]:
        """Distances of images in [0, 1] to one, at least in float32; differentiable in the images."""
        with torch.no_grad():
            others = [*self._features(reference)]
        total = torch.zeros(len(images), device=self.device)
        for head, features, other in zip(self._heads, self._features(images), others, strict=True):
            total = total + ((features - other) ** 2).mean((2, 3)) @ head
        return total

    def _features(self, images: Float[Tensor, "row 3 height width"]) -> Iterator[Float[Tensor, "row channel y x"]]:
        shift, scale = (torch.tensor(v, device=self.device)[:, None, None] for v in (SHIFT, SCALE))
        x = ((2 * images - 1 - shift) / scale).to(self._dtype)
        for place, layer in enumerate(self._layers):
            x = layer(x)
            if place in self._compared:
                features = x.to(torch.promote_types(x.dtype, torch.float32))
                yield features / (features.square().sum(1, keepdim=True) + 1e-8).sqrt()


def _vgg() -> nn.Sequential:
    """The features of torchvision's `vgg16`."""
    layers: list[nn.Module] = []
    before = 3
    for width, convolutions in zip(VGG, (2, 2, 3, 3, 3), strict=True):
        layers += [nn.MaxPool2d(2)] if layers else []
        for _ in range(convolutions):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width
    return nn.Sequential(*layers)


def _alexnet() -> nn.Sequential:
    """The features of torchvision's `alexnet`."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    )
