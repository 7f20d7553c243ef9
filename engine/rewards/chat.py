"""What models that chat are asked: a question behind an image, as text and as tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Tensor]  # of a model of transformers, by the names of its arguments


def asked(question: str, speaks: Any, template: str | None) -> str:
    """The text of a question behind an image, up to where the answer begins.

    Args:
        question: without special tokens, see `plain`.
        speaks: a tokenizer or processor of transformers.
        template: chat template; None: its own.
    """
    content = [{"type": "image"}, {"type": "text", "text": question}]
    given = {"chat_template": template} if template else {}
    messages = [{"role": "user", "content": content}]
    return speaks.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **given)


def plain(question: str, tokenizer: Any, *marks: str) -> str:
    """A question without the special tokens of a model, which a prompt could else use to end it, or for more images."""
    for token in {*tokenizer.all_special_tokens, *marks} - {""}:
        question = question.replace(token, " ")
    return question


def template(folder: Path) -> str | None:
    """The chat template that a folder keeps in a file of its own, or None."""
    if (file := folder / "chat_template.json").is_file():
        return json.loads(file.read_text())["chat_template"]
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text()
    return None


def side_by_side(each: Sequence[Inputs], pad: int) -> Inputs:
    """The inputs of one row each as those of a batch: what has a value a token is padded on the left."""
    longest = max(one["input_ids"].shape[1] for one in each)
    joined = {}
    for key, first in each[0].items():
        values = [one[key] for one in each]
        if first.shape == each[0]["input_ids"].shape:
            fill = pad if key == "input_ids" else 0
            values = [torch.nn.functional.pad(one, (longest - one.shape[1], 0), value=fill) for one in values]
        joined[key] = torch.cat(values)
    return joined
