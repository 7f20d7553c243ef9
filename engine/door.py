"""The door: what callers ask for, checked once and turned into plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image

from rollflow import checks, methods, rewards
from rollflow.admission import promise
from rollflow.device.attempts import model_error
from rollflow.errors import BudgetError, RequestError, RollflowError, line, shown
from rollflow.models import FlowModel, Geometry, Traits
from rollflow.models.text import Text
from rollflow.plan import Plan, plan
from rollflow.request import Request

_FIELDS = {field.name for field in fields(Request)}


class Checked(NamedTuple):
    """A request that can be honoured; `resize` plans it anew, where its time decides the budget. It was `asked` so."""

    plan: Plan
    geometry: Geometry
    resize: Callable[[int], Plan] | None
    asked: Request


class Door:
    """Checks requests against the model and the engine that they are for.

    Args:
        model: the model.
        traits: what searches should know of it.
        preview: whether particles are judged on previews.
        slots: how many particles of a geometry can live at once.
        known: whether a text was encoded already, and need not be looked at again.
    """

    def __init__(
        self,
        model: FlowModel,
        traits: Traits,
        preview: bool,
        slots: Callable[[Geometry], int],
        known: Callable[[Text], bool],
    ):
        self._grids: dict[tuple[int, Geometry], tuple[float, ...]] = {}
        self._model, self._traits, self._preview, self._slots, self._known = model, traits, preview, slots, known

    def check(self, asked: str | Request, options: dict[str, Any]) -> Checked:
        """The plan of a request, or of a prompt with options.

        Raises:
            RequestError: it cannot be honoured.
        """
        request = self._own(as_request(asked, options))
        timed = request.nfe is None and (request.seconds is not None or request.deadline is not None)

        def planned(nfe: int | None) -> Plan:
            return plan(replace(request, nfe=nfe), self._traits, self._preview, partial(self._times, request))

        def for_budget(nfe: int | None) -> Plan:
            try:
                made = planned(nfe)
            except BudgetError as error:
                if not timed:
                    raise
                made = planned(error.smallest)
            if made.latents is None or not known:
                return made
            return replace(made, latents=_states(made.latents, known[0]))

        known: list[Geometry] = []
        checked = for_budget(request.nfe)
        self.check_text(Text(checked.request.prompt, checked.request.negative))
        rewards.check(checked.reward, checked.request.prompt)
        if checked.held_out is not None:
            rewards.check(checked.held_out, checked.request.prompt)
        geometry = self._cached(self._geometry(checked)) if request.cache else self._geometry(checked)
        known.append(geometry)
        self._check_guidance(checked.request, geometry)
        if checked.latents is not None:
            checked = replace(checked, latents=_states(checked.latents, geometry))
        slots, needed = self._slots(geometry), promise(checked)
        if needed > slots and timed:  # nobody has asked for that many
            checked = for_budget(slots)
            needed = promise(checked)
        if needed > slots:
            raise RequestError(
                f"nfe={checked.nfe}: the method {methods.title(checked.request.method)} may hold {needed} "
                f"particles at once then, and this engine holds {slots} of this size; lower it, or make the engine "
                "with Engine(slots=...)"
            )

        def affordable(nfe: int) -> Plan:  # a method may hold far fewer particles than it draws
            found = for_budget(nfe := min(nfe, checks.MOST_NFE))
            return found if promise(found) <= slots else for_budget(min(nfe, slots))

        return Checked(checked, geometry, affordable if timed else None, request)

    def check_text(self, text: Text) -> None:
        """Raises `RequestError` for a prompt that the model cannot read."""
        if not self._known(text):
            self._asked(self._model.check_prompt, text.prompt)

    def _own(self, request: Request) -> Request:
        """The request with what it leaves to the model, or with what the model cannot do refused."""
        able: Any = self._model.capabilities
        if request.guidance is None:
            own = self._traits.guidance
            request = replace(request, guidance=able.guidance if own is None else own)
        if request.image is not None and not able.images:
            raise RequestError("image: this model has no encoder of images (Capabilities.images); leave it out")
        image = request.image
        if request.height is None and request.width is None:
            if isinstance(image, Image.Image):
                request = replace(request, height=image.height, width=image.width)
            elif isinstance(image, torch.Tensor) and image.ndim in (3, 4):
                height, width = image.shape[-2:]
                frames = len(image) if image.ndim == 4 and request.frames is None and able.frames else request.frames
                request = replace(request, height=height, width=width, frames=frames)
        return request

    def _cached(self, geometry: Geometry) -> Geometry:
        """That of a request with a cache."""
        model: Any = self._model
        if not model.capabilities.caches:
            raise RequestError(
                f"cache=True: a {type(model).__name__} keeps nothing of an evaluation for others "
                "(Capabilities.caches); leave it out"
            )
        return replace(geometry, kept=model.kept)

    def _check_guidance(self, request: Request, geometry: Geometry) -> None:
        """Refuses a scale that means nothing, and a negative prompt that nothing would lead away from.

        Both by what the model says once it knows the size: a pipeline is learned with its first one.
        """
        model: Any = self._model
        able, scale, negative = model.capabilities, float(request.guidance or 0.0), request.negative
        if negative is not None and not able.negative:
            raise RequestError(
                f"negative={shown(negative)}: this model has no classifier-free guidance that would lead away from it; "
                "leave it out"
            )
        guides = able.guides and self._asked(model.guides, scale, geometry)
        if scale < 0 and not guides:
            raise RequestError(
                f"guidance={scale:g}: this model does not guide below 0; give a scale of at least 0, or leave it out"
            )
        if negative and able.guides and not guides:
            raise RequestError(
                f"negative={shown(negative)}: at guidance={scale:g} this model does not guide, and nothing leads away "
                "from it; give a higher guidance, or leave negative out"
            )

    def _times(self, request: Request, steps: int) -> Sequence[float]:
        """The linear times of the model's own sampler, for the grid "model"."""
        model: Any = self._model
        if not model.capabilities.schedule:
            raise RequestError(
                'grid="model": this model has no sampler of its own (Capabilities.schedule); choose paper, uniform or '
                "shifted"
            )
        key = steps, self.geometry(request.height, request.width, request.frames)
        if key not in self._grids:
            self._grids[key] = self._asked(lambda: tuple(float(time) for time in model.times(*key)))
        return self._grids[key]

    def geometry(self, height: object, width: object, frames: object = None) -> Geometry:
        """The model's geometry of a size; raises `RequestError` for one that it cannot do."""
        size = checks.size(height, width, frames)
        model: Any = self._model
        if frames is not None and not model.capabilities.frames:
            raise RequestError(f"frames={shown(frames)}: this model makes images; leave it out")
        return self._asked(model.geometry, *(size if model.capabilities.frames else size[:2]))

    @staticmethod
    def _asked(ask: Callable[..., Any], *args: Any) -> Any:
        """What a member of the model's gives; raises `ModelError` for what it raises that is not ours."""
        try:
            return ask(*args)
        except RollflowError:
            raise
        except Exception as error:
            raise model_error(error) from error

    def _geometry(self, checked: Plan) -> Geometry:
        """The image size, which model, reward and given latents must agree on."""
        geometry = self.geometry(checked.request.height, checked.request.width, checked.request.frames)
        for reward in (checked.reward, checked.held_out):
            size = None if reward is None else rewards.size(reward)
            if reward is not None and size is not None and (geometry.height, geometry.width) != size:
                raise RequestError(
                    f"size {geometry.height}x{geometry.width}: the reward {reward.name} judges images of "
                    f"{size[0]}x{size[1]} only"
                )
            if reward is not None and geometry.frames in (None, 1) and rewards.clips(reward):
                raise RequestError(
                    f"reward={shown(reward.name)}: it judges clips of two frames or more, and this request makes "
                    f"{geometry}: use a model of video, ask for more frames, or choose another reward"
                )
        image, mask = checked.request.image, checked.request.mask
        if isinstance(mask, torch.Tensor):
            if image is None:
                raise RequestError("mask: it says where an image is drawn anew; give an image")
            if tuple(mask.shape) != (geometry.height, geometry.width):
                raise RequestError(f"mask of shape {list(mask.shape)}: this request makes {geometry}; resize it")
        if isinstance(image, torch.Tensor):
            clip = () if geometry.frames is None else (geometry.frames,)
            wanted = (*clip, 3, geometry.height, geometry.width)
            if tuple(image.shape) != wanted:
                raise RequestError(
                    f"image of shape {list(image.shape)}: this request makes {geometry}, and needs {list(wanted)}; "
                    "resize it, or ask for its size"
                )
        return geometry


def _states(latents: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Given noise as [n, token, channel]."""
    shape, own = tuple(latents.shape), tuple(geometry.state)
    token = (geometry.token, geometry.channel)
    flat = (geometry.token * geometry.channel,)
    for one in (own, token, flat):
        if shape == one or shape[1:] == one:
            return latents.reshape(-1, *token)
    raise RequestError(
        f"latents of shape {list(shape)}: this model and size need {list(own)}, or [n, ...] of such, or {list(flat)} "
        "flat"
    )


def as_request(asked: str | Request, options: dict[str, Any]) -> Request:
    """The request itself, or one made of a prompt, the fields among the options, and the method's own options.

    Raises:
        RequestError: it is neither, or the options go with something else.
    """
    if isinstance(asked, Request):
        if options:
            names = line(", ".join(options), 100)
            raise RequestError(f"options {names}: they go with prompts; a Request carries its own")
        return asked
    if not isinstance(asked, str):
        raise RequestError(f"a {line(type(asked).__name__, 60)} is no request: pass a prompt or a rollflow.Request")
    known = {name: value for name, value in options.items() if name in _FIELDS}
    own = {name: value for name, value in options.items() if name not in _FIELDS}
    if "prompt" in known:
        raise RequestError(f"the prompt {shown(asked)} and prompt={shown(known['prompt'])}: give one")
    method: Any = known.get("method", Request.method)
    taken = _options_of(method) if own else []
    for name in own:
        if name not in taken and (close := get_close_matches(name, _FIELDS, 1)):
            raise RequestError(f"there is no option {shown(name)}: did you mean {close[0]!r}?")
    return Request(asked, **{**known, "options": {**checks.options(known.get("options", {})), **own}})


def _options_of(method: Any) -> list[str]:
    """The options of a method of the user's own; none for what is none, which `plan` refuses."""
    try:
        return methods.options_of(method)
    except (TypeError, ValueError):
        return []
