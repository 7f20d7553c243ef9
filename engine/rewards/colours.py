"""The colours of objects, told by CLIP as GenEval does: zero-shot among ten, from what is in their boxes."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from rollflow.rewards.clip import images_of
from rollflow.rewards.network import LOCAL, Remembered, loading, pretrained
from rollflow.rewards.scenes import COLOURS
from rollflow.rewards.towers import tokens

_TEXTS = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
GREY = 0x99 / 255  # what stands around an object whose mask is known


class Colours:
    """CLIP as a classifier of colours; each class of objects is embedded once.

    A colour's embedding is the mean of the unit embeddings of three texts, which GenEval (Ghosh et al. 2023) takes.

    Args:
        reward: for whom, in messages.
        folder: of a CLIP of transformers, with its processor.
        device, dtype: of its network.
    """

    def __init__(self, reward: str, folder: Path, device: torch.device, dtype: torch.dtype):
        from transformers import AutoTokenizer, CLIPModel

        self._network = pretrained(reward, CLIPModel, folder, device, dtype)
        self._image = images_of(reward, self._network, folder)
        with loading(reward, folder):
            self._tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
        self._classes = Remembered(lambda names: torch.stack([self._embedded(name) for name in names]))

    def _embedded(self, name: str) -> Float[Tensor, "colour channel"]:
        texts = [text.format(colour=colour, name=name) for colour in COLOURS for text in _TEXTS]
        length = self._network.config.text_config.max_position_embeddings
        given = tokens(self._tokenizer, texts, length, self._network.device, padding=True)
        pooled = self._network.text_model(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
        each = normalize(self._network.text_projection(pooled.pooler_output).float(), dim=-1)
        return normalize(each.unflatten(0, (len(COLOURS), -1)).mean(1), dim=-1)

    def __call__(
        self,
        image: Float[Tensor, "3 height width"],
        boxes: Float[Tensor, "box 4"],
        name: str,
        masks: Bool[Tensor, "box height width"] | None = None,
    ) -> list[str]:
        """The colour of the object in each box of an image, on the device of the network.

        Args:
            image: in [0, 1].
            boxes: in pixels.
            name: of the objects.
            masks: of the objects; without them, what is around one in its box is looked at too.
        """
        seen = []
        for place, box in enumerate(boxes):
            shown = image if masks is None else torch.where(masks[place].to(image.device), image, GREY)
            seen.append(self._image(crop(shown, box)[None]))
        embedded = normalize(torch.cat(seen).float(), dim=-1)
        return [COLOURS[best] for best in (embedded @ self._classes([name])[0].T).argmax(1).tolist()]


def crop(image: Float[Tensor, "3 height width"], box: Float[Tensor, " 4"]) -> Float[Tensor, "3 high wide"]:
    """What is in a box, rounded to whole pixels of the image, at least one."""
    height, width = image.shape[-2:]
    left, top, right, bottom = (round(edge) for edge in box.tolist())
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    return image[:, top : min(max(bottom, top + 1), height), left : min(max(right, left + 1), width)]
