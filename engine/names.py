"""What the names that a user gives stand for, told before anything is imported or looked up: of models, of rewards."""

from __future__ import annotations

import importlib
import os
import re
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from rollflow.errors import ModelError, RequestError, said, shown

BUILT_IN = ("shapes", "shapes-base", "shapes-video")
SINGLE = (".safetensors", ".ckpt", ".gguf")  # suffixes of checkpoints in one file
MODELS = (
    f"pass a built-in model ({', '.join(BUILT_IN)}), a folder that a pipeline's save_pretrained wrote, a hub id of the "
    "form owner/name, or a single .safetensors file with its class, as in pipeline='FluxPipeline'"
)
FOLDERS = "ROLLFLOW_MODELS"  # environment variable: a folder of models, each in OWNER/NAME, as `rollflow fetch` writes
_PART = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"  # of a hub id: no "-" and no "." at its ends
_HUB_ID = re.compile(f"{_PART}/{_PART}", re.ASCII)
_OWN_REWARD = re.compile(r"(.+\.py|[^\W\d][\w.]*):([^\W\d]\w*)")
_OPERATORS = re.compile(r"[+*(),<>]|\s[-/]\s")


def hub_id(name: str | Path) -> bool:
    """Whether a model's name has the form of a hub id, owner/name."""
    return _HUB_ID.fullmatch(str(name)) is not None


def fetched(name: str | Path) -> Path | None:
    """Where a hub id is below `$ROLLFLOW_MODELS`; None where it is not, or is none."""
    own = os.environ.get(FOLDERS)
    found = Path(own).expanduser() / str(name) if own and hub_id(name) else None
    return found if found is not None and os.path.isdir(found) else None  # which never raises


def check_model(name: str | Path) -> None:
    """Refuses the name of a model that can be none, at once.

    Raises:
        ModelError: it is no built-in name, there is no such folder or file, and it has not the form of a hub id.
    """
    text = str(name)
    if text in BUILT_IN or text.endswith(SINGLE) or hub_id(text):
        return
    try:
        there = bool(text) and Path(text).exists()
    except (OSError, ValueError):  # of a path that is none
        there = False
    if not there:
        close = get_close_matches(text, BUILT_IN, 1)
        meant = f" (did you mean {close[0]!r}?)" if close else ""
        raise ModelError(f"there is no model {shown(text)}{meant}: {MODELS}")


@lru_cache
def reward_of(name: str) -> Any:
    """The reward that FILE.py:NAME or MODULE:NAME stands for, one object a name; any other text as it is.

    For expressions see `rollflow.rewards.own`.

    Raises:
        RequestError: there is none; of other texts `rollflow.rewards.make` says so.
    """
    found = None if name.startswith("-") or _OPERATORS.search(name) else _OWN_REWARD.fullmatch(name)
    if found is None:
        return name
    place, attribute = found.groups()
    try:
        if place.endswith(".py"):
            spec = spec_from_file_location(Path(place).stem, place)
            assert spec is not None and spec.loader is not None
            module = module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        return getattr(module, attribute)
    except Exception as error:
        raise RequestError(
            f"the reward {shown(name)} cannot be loaded ({said(error)}): give a built-in name, or where a function of "
            "images and prompts is, as in scores.py:redness or package.module:redness"
        ) from error
