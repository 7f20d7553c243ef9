"""The `movement` reward: how much a clip changes from frame to frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from rollflow.errors import RequestError, shown
from rollflow.rewards.network import FrameReward
from rollflow.rewards.protocol import Reward

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue: Rec. 601, as Pillow's "L"


@dataclass(frozen=True)
class MovementReward(Reward):
    """The mean change of a clip's low-passed luma from each frame to the next, in [0, 1]; the prompt does not matter.

        score = mean over f and cells of |Y[f + 1] - Y[f]|,    Y = the mean of 0.299 R + 0.587 G + 0.114 B over a cell

    Cells are square, so that grain and flicker of single pixels hardly count, and a clip has about the same score at
    every size. It measures change, not whether the change is that of a thing that moves: a clip that flickers between
    black and white has 1. So it goes with another reward and a bound: "vqa + min(movement, 0.05)".

    A frozen clip is the usual failure of a search on a reward of single frames, and telling it needs no network; those
    that estimate optical flow (RAFT, as in VBench's dynamic degree) are in torchvision, with weights of their own. It
    is differentiable, on the device where the frames are. Images and clips of one frame are refused.

    Attributes:
        grid: cells along the shorter side; frames that have fewer pixels are not low-passed.
    """

    kind: ClassVar[str] = "movement"
    differentiable: ClassVar[bool] = True
    concurrent: ClassVar[bool] = True
    clips: ClassVar[bool] = True
    packages: ClassVar[tuple[str, ...]] = ()
    name = FrameReward.name  # as it is written in a spec

    grid: int = 32

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise RequestError(f"movement: grid={self.grid}: it must be at least 1")

    def check(self, prompt: str) -> None:
        """Accepts every prompt."""

    def __call__(
        self, images: Float[Tensor, "row *frame 3 height width"], prompts: Sequence[str]
    ) -> Float[Tensor, " row"]:
        """Scores of clips [row, frame, 3, height, width]; raises `RequestError` for images and clips of one frame."""
        if images.ndim != 5 or images.shape[1] < 2:
            what = "images" if images.ndim != 5 else "clips of one frame"
            raise RequestError(
                f"the reward movement compares the frames of clips, and these are {what} "
                f"{shown(tuple(images.shape))}: use it with a model of video, or choose another reward"
            )
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        luma = (images * torch.tensor(LUMA, dtype=images.dtype, device=images.device)[:, None, None]).sum(2)
        height, width = luma.shape[-2:]
        if (cell := min(height, width) / self.grid) > 1:
            luma = adaptive_avg_pool2d(luma, (round(height / cell), round(width / cell)))
        return (luma[:, 1:] - luma[:, :-1]).abs().mean((1, 2, 3))
