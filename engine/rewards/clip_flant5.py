"""CLIP-FlanT5, the model of VQAScore's authors, from its published weights and the classes of transformers.

Their package `t2v-metrics` 3.0 asks for torch 2.5.1 and transformers 4.49.0 exactly, so that it cannot be installed
beside rollflow. The model is small in code: the last layer but one of CLIP ViT-L/14 at 336 pixels, without the class
token, a projection of two layers, and FlanT5. What is done here equals that package's `CLIPT5Model`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from rollflow.errors import ModelError
from rollflow.rewards import known
from rollflow.rewards.network import LOCAL, frozen, loading
from rollflow.rewards.pixels import Preparation
from rollflow.rewards.published import filled
from rollflow.rewards.weights import Wanted

MODELS = ("zhiqiulin/clip-flant5-xxl", "zhiqiulin/clip-flant5-xl")
_VISION = "openai/clip-vit-large-patch14-336"
_BEFORE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER:"
)
_AFTER = " ASSISTANT:"
LONGEST = 2048  # tokens of what is asked


def is_one(model: str) -> bool:
    """Whether a hub id or folder is a CLIP-FlanT5."""
    return model in MODELS or "mm_vision_tower" in _config(Path(model).expanduser())


def _config(folder: Path) -> dict[str, Any]:
    """What its authors say of a CLIP-FlanT5 in a folder; nothing, if it is none."""
    file = folder / "config.json"
    said = json.loads(file.read_text()) if file.is_file() else {}
    return said if said.get("model_type") in ("t5", "clip_t5") else {}


def wanted(model: str, revision: str | None) -> tuple[Wanted, ...]:
    """The model, whose authors publish torch pickles, with its tokenizer; the configuration of its CLIP."""
    vision = _config(Path(model).expanduser()).get("mm_vision_tower", _VISION)
    return (
        Wanted(model, revision, ("*.json", "spiece.model", "*.safetensors", "pytorch_model*.bin")),
        Wanted(vision, known.revision(vision), ("config.json", "preprocessor_config.json")),
    )


class ClipFlanT5:
    """CLIP-FlanT5; of pickles tensors alone are read.

    Args:
        reward: for whom, in messages.
        folder: of its weights and its tokenizer.
        vision: of CLIP's configuration and image processor.
        device, dtype: of the network.
    """

    def __init__(self, reward: str, folder: Path, vision: Path, device: torch.device, dtype: torch.dtype):
        from transformers import (
            AutoImageProcessor,
            AutoTokenizer,
            CLIPVisionConfig,
            CLIPVisionModel,
            T5Config,
            T5ForConditionalGeneration,
        )

        with loading(reward, folder):
            self._tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
            looks = AutoImageProcessor.from_pretrained(vision, **LOCAL)
            self._prepare = Preparation.of(looks)
            self._around = [int(255 * float(mean)) / 255 for mean in looks.image_mean]
            eyes, projection, t5 = _parts(folder)
            config = _config(folder)
            eyes = filled(reward, CLIPVisionModel, CLIPVisionConfig.from_pretrained(vision, **LOCAL), eyes)
            t5 = filled(reward, T5ForConditionalGeneration, T5Config.from_dict({**config, "model_type": "t5"}), t5)
            first, last = (projection[f"{layer}.weight"] for layer in (0, 2))
            through = nn.Sequential(nn.Linear(*first.T.shape), nn.GELU(), nn.Linear(*last.T.shape))
            through.load_state_dict(projection)
        self._eyes, self._through, self._t5 = (frozen(part, device, dtype) for part in (eyes, through, t5))
        self._layer = config.get("mm_vision_select_layer", -2)

    def probability(
        self, images: Float[Tensor, "row 3 height width"], questions: Sequence[str], answer: str
    ) -> Float[Tensor, " row"]:
        """The geometric mean of the probabilities of the answer's tokens, of which the last ends the sentence.

        Args:
            images: in [0, 1], on its device.
            questions: one an image.
            answer: what could be said.
        """
        device, dtype = images.device, self._t5.dtype
        seen = self._eyes(self._prepare(self._squared(images.float())).to(dtype), output_hidden_states=True)
        picture = self._through(seen.hidden_states[self._layer][:, 1:])
        embed = self._t5.get_input_embeddings()
        before = torch.tensor(self._tokenizer(_BEFORE).input_ids, device=device)
        after = self._tokenizer([f"{question}{_AFTER}".strip() for question in questions], padding=True)
        after = after.convert_to_tensors("pt").to(device)
        room = LONGEST - len(before) - 1  # the image is one more
        rows = len(images)
        told = [embed(before).expand(rows, -1, -1), picture, embed(after["input_ids"][:, :room])]
        shown = torch.ones((rows, len(before) + picture.shape[1]), dtype=torch.int64, device=device)
        labels = torch.tensor([self._tokenizer(answer).input_ids] * rows, device=device)
        logits = self._t5(
            inputs_embeds=torch.cat(told, 1),
            attention_mask=torch.cat([shown, after["attention_mask"][:, :room]], 1),
            labels=labels,
        ).logits[..., : len(self._tokenizer)]
        likely = logits.float().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        return likely.mean(1).exp()

    def _squared(self, images: Float[Tensor, "row 3 height width"]) -> Float[Tensor, "row 3 side side"]:
        """Images in the middle of squares of CLIP's mean colour."""
        height, width = images.shape[-2:]
        side = max(height, width)
        square = torch.tensor(self._around, dtype=images.dtype, device=images.device)[:, None, None]
        square = square.expand(len(images), 3, side, side).clone()
        top, left = (side - height) // 2, (side - width) // 2
        square[..., top : top + height, left : left + width] = images
        return square


def _parts(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the image tower, of the projection, and of FlanT5, by the names of their classes."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    found: dict[str, Tensor] = {}
    for file in files:
        read = load_file if file.suffix == ".safetensors" else _pickled
        found.update(read(file))
    tower, projection = "vision_tower.vision_tower.", "mm_projector."
    eyes = {name.removeprefix(tower): found[name] for name in found if name.startswith(tower)}
    eyes = {name.removeprefix("vision_model."): tensor for name, tensor in eyes.items() if "position_ids" not in name}
    through = {name.removeprefix(projection): found[name] for name in found if name.startswith(projection)}
    if not eyes or not through:
        raise ModelError(f"{folder} holds no CLIP-FlanT5: its weights must have {tower}* and {projection}*")
    rest = {
        name: tensor
        for name, tensor in found.items()
        if not name.startswith((tower, projection)) and name != "embed_tokens.weight"  # once more
    }
    return eyes, through, rest


def _pickled(file: Path) -> dict[str, Tensor]:
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
