"""Image-text-to-text models of transformers: what they are asked, with the image as a tensor, and how they answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from rollflow.errors import ModelError
from rollflow.rewards.chat import Inputs, asked, plain, side_by_side
from rollflow.rewards.network import LOCAL, loading, pretrained
from rollflow.rewards.patches import PatchedInputs
from rollflow.rewards.pixels import Preparation

Pixels = Callable[[Tensor], Tensor]  # from images in [0, 1] to what a processor calls pixel_values


class VisionLanguage:
    """An image-text-to-text model, its processor and its chat template.

    Images stay on their device where it is known what the processor does to them: for those of Qwen2-VL, Qwen2.5-VL and
    Qwen3-VL (`rollflow.rewards.patches`), and for those that resize, crop and normalise (`rollflow.rewards.pixels`), if
    a picture of noise shows that this is all they do. Any other processor is given the images as 8-bit tensors; when
    the model is loaded, that is compared with what it makes of a picture. With torchvision such processors run on the
    device too, without it on the CPU.

    Args:
        reward: for whom, in messages.
        folder: of the model.
        device, dtype: of its network.

    Raises:
        RequestError: a package is missing.
        ModelError: the folder holds no such model.
    """

    def __init__(self, reward: str, folder: Path, device: torch.device, dtype: torch.dtype):
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, GenerationConfig

        with loading(reward, folder):
            self._network = pretrained(reward, AutoModelForImageTextToText, folder, device, dtype, read=dtype)
            looks = AutoImageProcessor.from_pretrained(folder, **LOCAL)
            kind: Any = PatchedInputs if type(looks).__name__.startswith("Qwen2VLImageProcessor") else ProcessedInputs
            self._inputs = kind(folder, looks, self._network.config)
        self._takes = signature(self._network.forward).parameters
        self._once = GenerationConfig(
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=self._inputs.tokenizer.pad_token_id,
        )

    def probability(
        self, images: Float[Tensor, "row 3 height width"], questions: Sequence[str], answer: str
    ) -> Float[Tensor, " row"]:
        """Of the first token of `answer`, as what each model says first of an image on its device to a question."""
        token = self._inputs.tokenizer.encode(answer, add_special_tokens=False)[0]
        given = self._inputs(images, questions)
        given = {
            key: value.to(images.device, self._network.dtype if value.is_floating_point() else None)
            for key, value in given.items()
            if key != "mm_token_type_ids" or key in self._takes  # some versions of transformers tell them apart
        }
        logits = self._network.generate(**given, generation_config=self._once).logits[0]
        return logits.float().softmax(-1)[:, token]


class ProcessedInputs:
    """The inputs of any other model, by its own processor.

    Arguments as of `PatchedInputs`.
    """

    def __init__(self, folder: Path, looks: Any, config: Any):
        from transformers import AutoProcessor

        self._processor = AutoProcessor.from_pretrained(folder, **LOCAL)
        self.tokenizer = self._processor.tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._pixels = self._described()
        if self._pixels is None:
            self._compare()
        self._without_pixels = lru_cache(maxsize=4096)(self._of_black)

    def __call__(self, images: Float[Tensor, "row 3 height width"], questions: Sequence[str]) -> Inputs:
        """What the model takes."""
        if self._pixels is None:
            return self._processed([*self._whole(images)], questions)
        each = [self._without_pixels(question, *images.shape[-2:]) for question in questions]
        return {**side_by_side(each, self.tokenizer.pad_token_id), "pixel_values": self._pixels(images)}

    def _processed(self, pictures: list[Any], questions: Sequence[str]) -> Inputs:
        """What the processor makes of pictures, or 8-bit tensors, and questions."""
        texts = [self._asked(question) for question in questions]
        begun = self.tokenizer.bos_token is not None and texts[0].startswith(self.tokenizer.bos_token)
        given = self._processor(
            text=texts,
            images=[[picture] for picture in pictures],
            padding=True,
            add_special_tokens=not begun,
            return_tensors="pt",
        )
        return {key: value for key, value in given.items() if isinstance(value, Tensor)}

    def _asked(self, question: str) -> str:
        """The whole text of a question: by the chat template; without one the mark of the image and the question."""
        mark = getattr(self._processor, "image_token", None) or ""
        template = self._processor.chat_template or self.tokenizer.chat_template
        question = plain(question, self.tokenizer, mark)
        return asked(question, self._processor, template) if template else f"{mark}{question}"

    def _whole(self, images: Float[Tensor, "row 3 height width"]) -> UInt8[Tensor, "row 3 height width"]:
        """8-bit images where the processor can use them: those that Pillow serves read the host's memory."""
        whole = _eight_bit(images)
        return whole if getattr(self._processor.image_processor, "backend", "") == "torchvision" else whole.cpu()

    def _of_black(self, question: str, height: int, width: int) -> Inputs:
        """All but the pixels of an image of a size, and a question."""
        given = self._processed([torch.zeros((3, height, width), dtype=torch.uint8)], [question])
        return {key: value for key, value in given.items() if key != "pixel_values"}

    def _described(self) -> Pixels | None:
        """What the processor does to images, if a picture of noise shows that it is that; else None."""
        try:
            pixels = Preparation.of(self._processor.image_processor)
        except ModelError:
            return None
        noise = _noise()
        usual = self._processed([Image.fromarray(noise)], ["?"])["pixel_values"]
        ours = pixels(torch.from_numpy(noise).permute(2, 0, 1)[None] / 255)
        return pixels if _alike(ours, usual, self._processor.image_processor) else None

    def _compare(self) -> None:
        """Raises `ModelError` if the processor makes something else of a tensor than of a picture."""
        noise = _noise()
        usual = self._processed([Image.fromarray(noise)], ["?"])["pixel_values"]
        ours = self._processed([torch.from_numpy(noise).permute(2, 0, 1)], ["?"])["pixel_values"]
        if not _alike(ours, usual, self._processor.image_processor):
            raise ModelError(
                f"{type(self._processor).__name__} makes something else of a tensor than of a picture: choose another "
                "model for vqa"
            )


def _eight_bit(images: Float[Tensor, "row 3 height width"]) -> UInt8[Tensor, "row 3 height width"]:
    return (images.nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)


def _noise() -> UInt8[np.ndarray, "45 67 3"]:
    return np.random.default_rng(0).integers(0, 256, (45, 67, 3), np.uint8)


def _alike(ours: Tensor, usual: Tensor, processor: Any) -> bool:
    """Whether pixel values are equal but for two of 256 levels, by which torchvision and Pillow may differ."""
    least = min(map(float, getattr(processor, "image_std", None) or [1.0]))
    return ours.shape == usual.shape and bool(((ours - usual).abs() * least).amax() < 2.5 / 255)
