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
        masks: of text arguments, the argument that says which of their places hold text, where a pipeline leaves that
            out as long as all do.
        tensors: whether `output_type="pt"` works.
    """

    guidance: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    negative_needed: bool = False
    masks: Mapping[str, str] = field(default_factory=dict)
    tensors: bool = True


FAMILIES: dict[str, Family] = {
    "QwenImagePipeline": Family(
        "true_cfg_scale", negative_needed=True, masks={"encoder_hidden_states": "encoder_hidden_states_mask"}
    ),
}


def family(pipeline: object) -> Family:
    """That of a pipeline, or of one of which nothing special is known."""
    return FAMILIES.get(type(pipeline).__name__, Family())
