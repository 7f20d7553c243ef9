"""The inputs of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, whose images are sequences of patches, made on the device.

They equal those of the models' processor of the `pil` backend. That processor itself takes torchvision, for the videos
that it could be given too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from rollflow.errors import ModelError, shown
from rollflow.rewards.chat import Inputs, asked, plain, template
from rollflow.rewards.network import LOCAL
from rollflow.rewards.qwen_pixels import Patches


class PatchedInputs:
    """Makes them of images and questions.

    Args:
        folder: of the model.
        looks: its image processor.
        config: its configuration.

    Raises:
        ModelError: the folder has no chat template, or the image processor is of another kind.
    """

    def __init__(self, folder: Path, looks: Any, config: Any):
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
        self._patches, self._image = Patches.of(looks), config.image_token_id
        self._template = template(folder) or self.tokenizer.chat_template
        if not self._template:
            raise ModelError(f"{shown(str(folder))} has no chat template: put chat_template.json or .jinja there")

    def __call__(self, images: Float[Tensor, "row 3 height width"], questions: Sequence[str]) -> Inputs:
        """What the model takes."""
        height, width = images.shape[-2:]
        mark = self.tokenizer.convert_ids_to_tokens(self._image)
        marks = mark * self._patches.tokens(height, width)
        texts = [self._asked(question, mark).replace(mark, marks) for question in questions]
        given = self.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        pixels, grid = self._patches(images)
        return {
            "input_ids": given["input_ids"],
            "attention_mask": given["attention_mask"],
            "mm_token_type_ids": (given["input_ids"] == self._image).long(),
            "pixel_values": pixels,
            "image_grid_thw": grid,
        }

    def _asked(self, question: str, mark: str) -> str:
        text = asked(plain(question, self.tokenizer), self.tokenizer, self._template)
        if text.count(mark) != 1:
            raise ModelError(f"the chat template of the model has {text.count(mark)} places for an image: it needs one")
        return text
