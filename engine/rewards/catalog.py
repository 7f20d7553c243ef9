"""The rewards by name, and what a given reward becomes: a name or an expression, an object, or a function."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import lru_cache
from threading import Lock
from types import NoneType
from typing import Any, get_args, get_type_hints

from torch import Tensor

from rollflow.errors import RequestError, line, shown
from rollflow.rewards import expression, protocol
from rollflow.rewards.combined import Combined
from rollflow.rewards.expression import Named
from rollflow.rewards.protocol import FunctionReward, Reward

_BUILT_IN = {  # name -> module and class, or function that makes one; imported when first asked for
    "count": ("rollflow.rewards.quantity", "count"),
    "classifier": ("rollflow.rewards.classifier", "CountClassifier"),
    "soft_count": ("rollflow.rewards.classifier", "SoftCount"),
    "detect": ("rollflow.rewards.detect", "DetectReward"),
    "vqa": ("rollflow.rewards.vqa", "VqaReward"),
    "motion": ("rollflow.rewards.motion", "MotionReward"),
    "ocr": ("rollflow.rewards.ocr", "OcrReward"),
    "jpeg": ("rollflow.rewards.jpeg", "JpegReward"),
    "movement": ("rollflow.rewards.movement", "MovementReward"),
    "judge": ("rollflow.rewards.judge", "JudgeReward"),
    "http": ("rollflow.rewards.http", "HttpReward"),
    "clip": ("rollflow.rewards.clip", "ClipReward"),
    "siglip": ("rollflow.rewards.siglip", "SiglipReward"),
    "pickscore": ("rollflow.rewards.pickscore", "PickScore"),
    "aesthetic": ("rollflow.rewards.aesthetic", "Aesthetic"),
    "similarity": ("rollflow.rewards.similarity", "Similarity"),
    "lpips": ("rollflow.rewards.lpips", "Lpips"),
    "hps": ("rollflow.rewards.hps", "HPS"),
    "hpsv3": ("rollflow.rewards.hpsv3", "HPSv3"),
    "imagereward": ("rollflow.rewards.imagereward", "ImageReward"),
}
REMEMBERED = 256  # rewards of which equal ones are the same object
_lock = Lock()
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def names() -> tuple[str, ...]:
    """The names that `make` accepts."""
    return tuple(_BUILT_IN)


def with_gradients() -> list[str]:
    """The names of differentiable rewards."""
    return [
        name
        for name, (module, kind) in _BUILT_IN.items()
        if getattr(getattr(importlib.import_module(module), kind), "differentiable", False) is True
    ]


def make(reward: str | Reward | Callable[..., Tensor]) -> Reward:
    """The reward of a name or expression, a reward itself, or a plain function `f(images, prompts) -> scores` made one.

    Raises:
        RequestError: no reward has this name, an expression cannot be read, the object is not callable, or an attribute
            is not what it should be.
        FunctionError: an attribute raised; its error is the cause.
    """
    made = of(reward)
    if not isinstance(reward, str):
        _check_attributes(made)
    return made


def of(reward: Any) -> Reward:
    """As `make`, but without a look at the attributes of an object."""
    if isinstance(reward, str):
        return _of_text(reward)
    if isinstance(reward, type) or not callable(reward):
        raise RequestError(
            f"a reward is a name ({', '.join(names())}), an expression of names, an instance with the methods of "
            f"rollflow.rewards.Reward, or a function f(images, prompts), not {shown(reward)}"
        )
    if not protocol.asked(reward, lambda: isinstance(reward, Reward)):
        return FunctionReward(reward)
    return _one(reward)


def combine(text: str, own: Mapping[str, Any]) -> Reward:
    """The reward of an expression in which some names stand for given rewards or functions.

    Args:
        text: as in "0.7*vqa + 0.3*mine".
        own: by name, what is no built-in reward; none of them an expression itself.

    Raises:
        RequestError: as `make`, and for a name that a built-in reward has.
    """
    node = expression.parse(text)
    if taken := [name for name in own if name in _BUILT_IN]:
        raise RequestError(f"a built-in reward is called {taken[0]}: give your own another name than that")
    asked = [*dict.fromkeys(expression.rewards_of(node))]
    if unused := [name for name in own if name not in {one.name for one in asked}]:
        raise RequestError(f"the reward {shown(text)} does not name {shown(unused[0])}, which was given; leave it out")
    if odd := [name for name, one in own.items() if not callable(one) and not isinstance(one, str)]:
        raise RequestError(f"{odd[0]}={shown(own[odd[0]])}: it must be a reward or a function f(images, prompts)")
    named = {one: make(own[one.name]) if one.name in own else _named(one) for one in asked}
    for one, made in named.items():
        if isinstance(made, Combined):
            raise RequestError(f"{one.name} stands for {shown(made.name)}, an expression itself: write it out")
    return Combined(node, named)


def held_out(reward: Reward) -> Reward | None:
    """The second judge that `reward` names for the final image, or None."""
    given = protocol.asked(reward, lambda: getattr(reward, "held_out", None))
    return None if given is None else unscaled(of(given))


def unscaled(judge: Reward) -> Reward:
    """A held-out judge; raises `RequestError` for one that normalises."""
    if isinstance(judge, Combined) and judge.normalised:
        raise RequestError(
            f"held_out={shown(judge.name)}: z(...) normalises by a search's own particles, which a held-out judge "
            "does not see; leave it out"
        )
    return judge


def _check_attributes(reward: Reward) -> None:
    """Reads every attribute that a reward may have, once: they are read again while requests run."""
    name = protocol.asked(reward, lambda: reward.name)
    if not isinstance(name, str) or line(name, 1000) != name or not name:
        raise RequestError(f"the name of a reward is {shown(name)}: it must be a line of at most 1000 characters")
    protocol.size(reward), protocol.differentiable(reward), protocol.concurrent(reward), held_out(reward)
    protocol.timeout(reward), protocol.retry_on(reward), protocol.retries(reward)
    protocol.batch(reward), protocol.padded(reward), protocol.clips(reward)


@lru_cache(maxsize=REMEMBERED)
def _of_text(text: str) -> Reward:
    """One object a text, so that all requests that ask for it are judged in one call a batch."""
    node = expression.parse(text)
    if isinstance(node, Named):
        return _named(node)
    return Combined(node, {one: _named(one) for one in expression.rewards_of(node)})


@lru_cache(maxsize=REMEMBERED)
def _named(named: Named) -> Reward:
    kind = kind_of(named.name)
    return _one(kind(**_options(named, kind)) if named.options else kind())


def kind_of(name: str) -> Any:
    """The class of a name, or the function that makes it; raises `RequestError` where there is none."""
    if name not in _BUILT_IN:
        close = get_close_matches(name, names(), 3)
        meant = f"did you mean {', '.join(close)}? Else choose" if close else "choose"
        raise RequestError(
            f"there is no reward {shown(name)}: {meant} one of {', '.join(names())}, "
            "or give a function f(images, prompts) that returns one score an image"
        )
    module, attribute = _BUILT_IN[name]
    return getattr(importlib.import_module(module), attribute)


def _options(named: Named, kind: Any) -> dict[str, Any]:
    """The options of a reward as what its fields, or its parameters, are."""
    hints = get_type_hints(kind)
    known = [name for name in hints if name != "return"]
    if is_dataclass(kind):
        known = [f.name for f in fields(kind) if f.init and f.repr]  # one that is not shown has no text
    if not isinstance(kind, type) or is_dataclass(kind):
        found = {}
        for key, value in named.options:
            if key not in known:
                close = get_close_matches(key, known, 1)
                meant = f": did you mean {close[0]}?" if close else ""
                allowed = f"it has {', '.join(known)}" if known else "it has none"
                raise RequestError(f"the reward {named.name} has no option {shown(key)}{meant or ': ' + allowed}")
            found[key] = _value(f"the reward {named.name}: {key}", value, hints[key])
        return found
    raise RequestError(f"the reward {named.name} has no options, and {shown(str(named))} gives some; leave them out")


def _value(name: str, text: str, hint: Any) -> Any:
    kinds = get_args(hint) or (hint,)
    if text.lower() == "none" and NoneType in kinds:
        return None
    if bool in kinds:
        if text.lower() not in _TRUTH:
            raise RequestError(f"{name}={shown(text)}: it must be true or false")
        return _TRUTH[text.lower()]
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    if str in kinds:
        return text
    what = "a whole number" if int in kinds and float not in kinds else "a number"
    raise RequestError(f"{name}={shown(text)}: it must be {what}")


_ones: dict[Reward, Reward] = {}


def _one(reward: Reward) -> Reward:
    """The same object for equal rewards of ours: requests that say the same are judged in the same calls."""
    if not (is_dataclass(reward) and type(reward).__module__.startswith(__package__ or "")):
        return reward
    with _lock:
        found = _ones.pop(reward, reward)
        _ones[found] = found  # the latest last
        if len(_ones) > REMEMBERED:
            del _ones[next(iter(_ones))]
        return found
