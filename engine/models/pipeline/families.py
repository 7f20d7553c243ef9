"""What cannot be learned of a pipeline from the pipeline: data, by the name of its class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """What is known of a class of pipelines.

    Attributes:
        guidance: the argument of `__call__` that holds the scale of classifier-free guidance.
        fixed: further arguments of `__call__`.
        negative_needed: whether guidance takes place only where a negative prompt is given.
    """

    guidance: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    negative_needed: bool = False


FAMILIES: dict[str, Family] = {
    # Without a negative prompt it encodes one for the whole batch. Rewriting prompts runs a language model on each.
    "LongCatImagePipeline": Family(fixed={"enable_prompt_rewrite": False}, negative_needed=True),
    "QwenImagePipeline": Family("true_cfg_scale", negative_needed=True),
}


def family(pipeline: object) -> Family:
    """That of a pipeline, or of one of which nothing special is known."""
    return FAMILIES.get(type(pipeline).__name__, Family())
