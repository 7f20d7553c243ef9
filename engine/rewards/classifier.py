"""The held-out judge of the `count` reward: a small convolutional network that counts the objects of each class.

It shares neither code nor assumptions with the parser of `rollflow.rewards.count`: it was trained on rendered scenes
(`python -m rollflow.bench.train_classifier`) and no search for `count` sees its score, so that an image which only
fools the parser is found out. The network maps an image to a 16 x 16 heat map a class, whose sum is the number of
objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from rollflow.errors import RequestError
from rollflow.models import world
from rollflow.rewards import catalog, protocol

CHANNELS = len(world.CLASSES) + 1  # the classes, then objects of no class
STRIDE = 4  # pixels a cell of the heat map
WEIGHTS = Path(__file__).with_name("classifier.safetensors")


class _Block(nn.Module):
    """Two 3 x 3 convolutions around a skip connection (He et al. 2016, arXiv 1512.03385)."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Float[Tensor, "image width y x"]) -> Float[Tensor, "image width y x"]:
        return torch.relu(x + self.body(x))


class CountNet(nn.Module):
    """Heat maps of object centres: logits [image, 13, 16, 16] of images [image, 3, 64, 64] in [0, 1].

    An object's centre is shared among the four nearest cells by bilinear weights, so that a map's sum is a count.
    """

    canvas: Tensor

    def __init__(self, narrow: int = 16, wide: int = 48, blocks: int = 3):
        super().__init__()
        self.register_buffer("canvas", torch.tensor(world.CANVAS).view(3, 1, 1), persistent=False)
        self.layers = nn.Sequential(
            nn.Conv2d(3, narrow, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(),
            _Block(narrow),
            nn.Conv2d(narrow, wide, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            *(_Block(wide) for _ in range(blocks)),
        )
        self.head = nn.Conv2d(wide, CHANNELS, 1)
        nn.init.constant_(self.head.get_parameter("bias"), -5.0)  # most cells are empty

    def forward(self, images: Float[Tensor, "image 3 64 64"]) -> Float[Tensor, "image 13 16 16"]:
        return self.head(self.layers(images - self.canvas))


@lru_cache(maxsize=1)
def _trained() -> CountNet:
    """The network with the weights of the package, in float32 on the CPU; read when first needed."""
    net = CountNet()
    state = {name: value.float() if value.is_floating_point() else value for name, value in load_file(WEIGHTS).items()}
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)


@lru_cache(maxsize=4096)
def _target(prompt: str) -> tuple[int, ...]:
    return (*world.target_counts(prompt).tolist(), 0)


class CountClassifier:
    """Minus the residual sum of squares between the objects that a prompt asks for and those that the network counts.

    The same scale as `count`: 0 is best. Objects of no class (13th channel) count against the image.
    """

    name = "classifier"
    size = (world.SIZE, world.SIZE)
    concurrent = True

    @cached_property
    def held_out(self) -> protocol.Reward:
        """The independent judge, the parser of `rollflow.rewards.count`."""
        return catalog.make("count")

    def parts(self, device: torch.device) -> CountNet:
        """Its network, which is on the CPU wherever the images are."""
        return _trained()

    def check(self, prompt: str) -> None:
        """Raises `RequestError` if the prompt asks for no group of the world's shapes."""
        _target(prompt)

    def soft_counts(self, images: Float[Tensor, "image 3 height width"]) -> Float[Tensor, "image 13"]:
        """Expected numbers of objects, before rounding, on the CPU; differentiable. Channels and errors as `counts`."""
        if tuple(images.shape[-2:]) != (world.SIZE, world.SIZE):
            raise RequestError(
                f"the count classifier was trained on images of {world.SIZE} x {world.SIZE} pixels, but these are "
                f"{images.shape[-1]} x {images.shape[-2]}: it judges the built-in model 'shapes' only"
            )
        images = images.to("cpu", torch.float32).nan_to_num(0.0).clamp(0, 1)
        return torch.cat([_trained()(part).sigmoid().sum((2, 3)) for part in images.split(64)])

    def counts(self, images: Float[Tensor, "image 3 height width"]) -> Int[Tensor, "image 13"]:
        """Objects of each class in the order of `world.CLASSES`, then those of no class; on the CPU.

        Raises:
            RequestError: the images are not 64 x 64.
        """
        with torch.no_grad():
            return self.soft_counts(images).round().long()

    def _miss(self, images: Tensor, prompts: Sequence[str]) -> Int[Tensor, "row 13"]:
        return self.counts(images) - torch.tensor([_target(prompt) for prompt in prompts]).reshape(-1, CHANNELS)

    def __call__(self, images: Float[Tensor, "row 3 height width"], prompts: Sequence[str]) -> Float[Tensor, " row"]:
        """Scores of 64 x 64 images in [0, 1], at most 0; raises `RequestError` for other sizes or prompts."""
        return 0.0 - self._miss(images, prompts).square().sum(1).float()  # not -0.0

    def exact(self, images: Float[Tensor, "row 3 height width"], prompts: Sequence[str]) -> Bool[Tensor, " row"]:
        """Whether the network counts exactly what the prompt asks for, and nothing else."""
        return (self._miss(images, prompts) == 0).all(1)


class SoftCount(CountClassifier):
    """Minus the residual sum of squares between the objects asked for and the network's expected numbers, unrounded.

    A differentiable form of `classifier`, for methods that follow the reward's gradient.
    """

    name = "soft_count"
    differentiable = True

    def __call__(self, images: Float[Tensor, "row 3 height width"], prompts: Sequence[str]) -> Float[Tensor, " row"]:
        """Scores of 64 x 64 images in [0, 1], below 0; raises `RequestError` for other sizes or prompts."""
        wanted = torch.tensor([_target(prompt) for prompt in prompts]).reshape(-1, CHANNELS)
        return -(self.soft_counts(images) - wanted).square().sum(1)
