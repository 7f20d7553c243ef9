"""`hpsv3`: what people prefer, by HPSv3."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rollflow.errors import RequestError, shown
from rollflow.rewards import checkpoint, known, published
from rollflow.rewards.network import LOCAL, REMEMBERED, NetworkReward, frozen, loading
from rollflow.rewards.qwen_pixels import Patches
from rollflow.rewards.weights import Wanted

CHECKPOINT = "HPSv3"
PIXELS = 256 * 28 * 28  # of an image, about: 256 tokens
_HEAD = "rm_head."
REWARD = "<|Reward|>"  # where the score is read off
MARK = re.compile(r"<\|\w+\|>")

# What the network was tuned with, to the letter: its scores hold for no other text. Published under the MIT licence.
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
AFTER = (
    "<|vision_end|>\n"
    "You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall "
    "score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being "
    "the best. \n\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such as abnormal "
    "body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to "
    "interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements "
    "(e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, "
    "composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of "
    "harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult "
    "material. If such content is present, the image quality and satisfaction score should be the lowest possible. \n\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align "
    "with the textual description. The subject should match the description in terms of number, appearance, and "
    "behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the "
    "image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image "
    "logically fit the scenario described in the prompt. The environment should support and enhance the subject "
    "without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, "
    "accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, "
    "but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the "
    "image. The generated content should not introduce elements that conflict with or distort the original "
    "description.\n"
    "Textual prompt - {prompt}\n\n\n\n"
    "Please provide the overall ratings of this image: <|Reward|>"
)


class Parts(NamedTuple):
    """What `HPSv3` loads."""

    network: Any
    head: nn.Module
    prepare: Patches
    before: list[int]  # tokens before those of the image
    after: Callable[[str], list[int]]  # and after them, of a prompt


@dataclass(frozen=True)
class HPSv3(NetworkReward):
    """The human preference score v3: how much people would prefer an image for its prompt, by a vision-language model.

    Ma et al. 2025, arXiv 2508.03789: Qwen2-VL-7B reads the image, an instruction with the prompt, and a mark of its
    own; a head of three linear layers reads the mean of the score, and the logarithm of its spread, off the last hidden
    state of that mark, and the mean is the score. Tuned to 1.17 million comparisons; images of the models in the paper
    score -1 to 12.

    The arithmetic is that of the authors' package `hpsv3` (1.0.0, `HPSv3RewardInferencer`), which is bound to
    transformers 4.45.2, trl and torchvision. `Qwen2VLModel` of transformers does the work; the published names become
    its own as it is loaded. Two things of the package are kept because the weights were tuned with them: positions
    count tokens, without Qwen's grid for images, and every image is resized to about 256 tokens. What follows the mark
    cannot reach it, and is left out.

    Attributes:
        base: a hub id or a folder with the configuration and the tokenizer of Qwen2-VL-7B-Instruct; its weights are not
            fetched. Not asked for where the folder `model` has them.
    """

    kind: ClassVar[str] = "hpsv3"
    differentiable: ClassVar[bool] = True
    files: ClassVar[tuple[str, ...]] = (f"{CHECKPOINT}.safetensors",)

    model: str = "MizzenAI/HPSv3"
    dtype: str = "auto"
    batch: int | None = 16
    base: str = "Qwen/Qwen2-VL-7B-Instruct"

    def wanted(self) -> tuple[Wanted, ...]:
        """The checkpoint, and the configuration and tokenizer where they are elsewhere."""
        own = super().wanted()
        if published.has_vocabulary(self.model) and _is_base(Path(self.model).expanduser()):
            return own
        return *own, Wanted(self.base, known.revision(self.base), ("config.json", *published.TOKENIZER))

    def check(self, prompt: str) -> None:
        """Looks for the checkpoint and what belongs to it; refuses prompts with marks such as `<|image_pad|>`."""
        super().check(prompt)
        published.file(self.kind, self.folder, CHECKPOINT, (".safetensors",))
        published.vocabulary(self.kind, self.wanted()[-1])
        if mark := MARK.search(prompt):
            raise RequestError(f"hpsv3: the prompt has {shown(mark[0])}, a mark of its network's own: leave it out")

    def variant(self) -> tuple[Any, ...]:
        """See `NetworkReward.variant`."""
        return (self.base,)

    def load(self, folder: Path, device: torch.device, dtype: torch.dtype) -> Parts:
        """See `NetworkReward.load`."""
        path = published.file(self.kind, folder, CHECKPOINT, (".safetensors",))
        with loading(self.kind, path):
            from transformers import AutoTokenizer, Qwen2VLConfig

            base = published.vocabulary(self.kind, self.wanted()[-1])
            config = Qwen2VLConfig.from_pretrained(base)
            network, head = filled(config, checkpoint.tensors(self.kind, Wanted(str(path))))
            tokenizer = AutoTokenizer.from_pretrained(base, **LOCAL)
            tokenizer.add_tokens([REWARD], special_tokens=True)
            vision = config.vision_config
            prepare = Patches(PIXELS, PIXELS, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
            before, lock = tokenizer(BEFORE).input_ids, Lock()

            @lru_cache(REMEMBERED)
            def after(prompt: str) -> list[int]:
                with lock:  # a tokenizer is for one thread at a time
                    return tokenizer(AFTER.replace("{prompt}", prompt)).input_ids

            network, head = frozen(network, device, dtype), frozen(head, device, torch.float32)
            return Parts(network, head, prepare, before, after)

    def score(self, images: Float[Tensor, "row 3 height width"], prompts: list[str]) -> Float[Tensor, " row"]:
        """See `FrameReward.score`."""
        network, head, prepare, before, after = self.parts(images.device)
        pixels, grid = prepare(images.to(network.device))
        image = [network.config.image_token_id] * prepare.tokens(*images.shape[-2:])
        texts = [[*before, *image, *after(prompt)] for prompt in prompts]
        ends = torch.tensor([len(text) - 1 for text in texts], device=network.device)
        places = torch.arange(int(ends.max()) + 1, device=network.device)
        ids = torch.tensor([text + [0] * (len(places) - len(text)) for text in texts], device=network.device)
        hidden = network(
            input_ids=ids,
            attention_mask=(places <= ends[:, None]).long(),
            position_ids=places.expand(3, *ids.shape),
            pixel_values=pixels.to(network.dtype),
            image_grid_thw=grid,
            use_cache=False,
        ).last_hidden_state
        return head(hidden[torch.arange(len(ids), device=ids.device), ends].float())[:, 0]


def _is_base(folder: Path) -> bool:
    """Whether the configuration in a folder is the base's; the authors' own repository has that of another model."""
    path = folder / "config.json"
    return path.is_file() and json.loads(path.read_text()).get("model_type") == "qwen2_vl"


def filled(config: Any, tensors: Mapping[str, Tensor]) -> tuple[Any, nn.Module]:
    """The network, whose vocabulary has as many tokens as the authors', and the head.

    Raises:
        ModelError: a tensor is missing, unknown or of another shape.
    """
    from transformers import Qwen2VLModel

    named, linear = mapped(tensors)
    config.text_config.vocab_size = len(named["language_model.embed_tokens.weight"])
    network = published.filled(HPSv3.kind, Qwen2VLModel, config, named)
    return network, published.head(HPSv3.kind, linear, (None, nn.ReLU(), nn.Identity(), None, nn.ReLU(), None))


def mapped(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The authors' tensors, named as in transformers 4.45, for `Qwen2VLModel` and the head; `lm_head` is not used."""
    network = {
        f"language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name: value
        for name, value in tensors.items()
        if not name.startswith(("lm_head.", _HEAD))
    }
    return network, {name.removeprefix(_HEAD): value for name, value in tensors.items() if name.startswith(_HEAD)}
