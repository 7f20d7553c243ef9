"""`detect`: GenEval's checks of a composition: which objects, how many, of which colour, and where."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow.rewards import known, scenes, weights
from rollflow.rewards.colours import Colours
from rollflow.rewards.detectors import Detections
from rollflow.rewards.network import imported
from rollflow.rewards.quantity import DetectionReward, Parts
from rollflow.rewards.scenes import Scene
from rollflow.rewards.weights import Wanted

MOST = 16  # objects of a class that are looked at


@dataclass(frozen=True)
class DetectReward(DetectionReward):
    """The share of GenEval's checks that an image passes, in [0, 1].

    Ghosh et al. 2023, arXiv 2310.11513, with a zero-shot detector of transformers in the place of Mask2Former on COCO,
    so that any object can be asked for; mmdetection, which GenEval takes, has no release for the torch of today. For
    each thing that a prompt names ("a photo of a red apple left of two green cups", see `rollflow.rewards.scenes`) the
    checks are that one is there, that as many are there as a number says, and that those have its colour; then one for
    each relation. As in GenEval, which gives 1 to an image that passes all, else 0 (`strict`), colours and places are
    those of the best boxes of a class, as many as are asked for.

    CLIP tells the colour, zero-shot among GenEval's ten with its three texts, from what is in the box, with grey around
    the object where `masks` are given. Statistics of pixels need no network, but take the cloth that a red cup stands
    on for the cup. No gradient.

    Attributes:
        strict: whether it is 1 for an image that passes all checks, else 0.
        colours: the CLIP of transformers that tells colours, where a prompt names one; GenEval's is OpenAI's ViT-L/14.
        scenes: what prompts ask for that do not say it in that grammar, as (prompt, scene); in Python alone.
    """

    kind: ClassVar[str] = "detect"

    strict: bool = False
    colours: str = "openai/clip-vit-large-patch14"
    scenes: tuple[tuple[str, Scene], ...] = field(default=(), repr=False)

    def scene(self, prompt: str) -> Scene:
        """What a prompt asks for. Raises `RequestError` if it does not say so."""
        return next((given for said, given in self.scenes if said == prompt), None) or scenes.scene(prompt)

    def wanted(self) -> tuple[Wanted, ...]:
        """See `NetworkReward.wanted`."""
        return (*super().wanted(), self._clip())

    def _clip(self) -> Wanted:
        return Wanted(self.colours, known.revision(self.colours), self.files)

    def check(self, prompt: str) -> None:
        """Raises `RequestError` if the prompt names no object, or weights that it takes are not here."""
        coloured = any(thing.colour for thing in self.scene(prompt).things)
        imported(self.kind, self.packages)
        for one in self.wanted() if coloured else super().wanted():
            weights.folder(self.name, *one)

    @torch.no_grad()
    def score(self, images: Float[Tensor, "row 3 height width"], prompts: list[str]) -> Float[Tensor, " row"]:
        """See `FrameReward.score`."""
        parts = self.parts(images.device)
        images, asked = images.to(parts.device), [self.scene(prompt) for prompt in prompts]
        names = [tuple(dict.fromkeys(thing.name for thing in each.things)) for each in asked]
        found = self.detections(parts, images, names)
        passed = [self._checks(parts, *row) for row in zip(images, asked, names, found, strict=True)]
        scores = [float(all(each)) if self.strict else sum(each) / len(each) for each in passed]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _checks(
        self,
        parts: Parts,
        image: Float[Tensor, "3 height width"],
        asked: Scene,
        names: tuple[str, ...],
        seen: Detections,
    ) -> list[bool]:
        """What an image passes of a scene."""
        found = {name: seen.where(seen.classes == place).boxes[:MOST] for place, name in enumerate(names)}
        total = {name: sum(thing.count for thing in asked.things if thing.name == name) for name in names}
        exact = {name: all(thing.exact for thing in asked.things if thing.name == name) for name in names}
        passed, placed = [], []
        for thing in asked.things:
            boxes, wanted = found[thing.name], total[thing.name]
            if not thing.count:
                passed.append(len(boxes) == wanted)
                placed.append(boxes[:0])
                continue
            passed.append(len(boxes) > 0)
            if wanted > 1 or exact[thing.name]:
                passed.append(len(boxes) == wanted if exact[thing.name] else len(boxes) >= wanted)
            best = boxes[:wanted]
            if thing.colour:
                colours = self._coloured(parts, image, best, thing.name)
                best = best[torch.tensor([colour == thing.colour for colour in colours], dtype=torch.bool)]
                passed.append(len(best) >= thing.count)
            placed.append(best[: thing.count] if len(best) >= thing.count else best[:0])
        for one, relation, other in asked.relations:
            pairs = [(a.tolist(), b.tolist()) for a in placed[one] for b in placed[other]]
            passed.append(bool(pairs) and all(relation in scenes.relations(*pair) for pair in pairs))
        return passed

    def _coloured(
        self, parts: Parts, image: Float[Tensor, "3 height width"], boxes: Float[Tensor, "box 4"], name: str
    ) -> list[str]:
        """The colours of the objects in boxes."""
        if not len(boxes):
            return []
        dtype = self.chosen_dtype(parts.device)
        key = (Colours, self.kind, self.colours, str(parts.device), dtype)
        folder = weights.folder(self.name, *self._clip())
        clip = weights.once(key, lambda: Colours(self.kind, folder, parts.device, dtype))
        return clip(image, boxes, name, None if parts.segmenter is None else parts.segmenter(image, boxes))
