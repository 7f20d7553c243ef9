"""Drives a pipeline's own `__call__` with stand-ins that record what it does, and steer where its loop goes.

The transformer's stand-in records every call, the scheduler's replaces states and times, the autoencoder's records what
is to be decoded. They share their originals' weights; the pipeline itself is not touched.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from functools import wraps
from io import StringIO
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rollflow.errors import ModelError, RequestError, said
from rollflow.models.pipeline.families import Family
from rollflow.models.text import Size, Text

NETWORKS = ("transformer", "transformer_2")
Outputs = Callable[["Call"], Any]  # what a call of the transformer gives


class Call(NamedTuple):
    """A call of the transformer: which of the pipeline's networks, its arguments by name, what it gave."""

    network: str
    arguments: dict[str, Any]
    output: Any


class Evaluation(NamedTuple):
    """What happened from one `scheduler.step` to the next: `velocity` is what the pipeline gave to the scheduler."""

    time: float
    sample: Tensor
    calls: list[Call]
    velocity: Tensor


class Decode(NamedTuple):
    """A call of `vae.decode`: its latents, and whatever else it was given."""

    latents: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Recording:
    """What one run of a pipeline did.

    Attributes:
        evaluations: in order.
        sigmas: the scheduler's own noise levels, as the pipeline asked for them.
        timesteps: its own times.
        decodes: calls of the autoencoder's decoder.
        images: what the pipeline returned, if it was let through.
    """

    def __init__(self) -> None:
        self.evaluations: list[Evaluation] = []
        self.sigmas: list[float] = []
        self.timesteps: list[float] = []
        self.decodes: list[Decode] = []
        self.calls: list[Call] = []  # since the last step
        self.images: Any = None


class Script(NamedTuple):
    """What a run is to do.

    Attributes:
        times: of the evaluations, as the scheduler counts them; None for the scheduler's own.
        states: gives the state of evaluation i + 1 from that of evaluation i; None leaves it as it is. After the last
            time it gives what is decoded.
        outputs: gives what a call of the transformer gives; None for what it computes.
        calls: how many calls of the transformer end the run; None for any number.
        decode: whether it goes on to the decoder: False ends it after the last time, None at the decoder's door.
        steps: how many steps the scheduler is asked for, by default as many as there are times.
    """

    times: Sequence[float] | None = None
    states: Callable[[int, Tensor], Tensor] | None = None
    outputs: Outputs | None = None
    calls: int | None = None
    decode: bool | None = False
    steps: int | None = None


class _Over(Exception):
    """Ends a run from within."""


class Driver:
    """Runs a pipeline by a script.

    Args:
        pipeline: is left as it is.
        family: what is known of its class.
    """

    def __init__(self, pipeline: Any, family: Family):
        self.pipeline, self.family = pipeline, family
        self.parameters = inspect.signature(type(pipeline).__call__).parameters
        self.networks = [name for name in NETWORKS if getattr(pipeline, name, None) is not None]

    @property
    def scale_argument(self) -> str | None:
        """The name of the argument that holds the guidance scale."""
        for name in (self.family.guidance, "guidance_scale", "true_cfg_scale"):
            if name and name in self.parameters:
                return name
        return None

    @property
    def default_scale(self) -> float:
        """The guidance scale that the pipeline takes where none is given."""
        if (name := self.scale_argument) is not None:
            default = self.parameters[name].default
            return float(default) if isinstance(default, int | float) else 1.0
        guider = getattr(self.pipeline, "guider", None)
        return float(getattr(guider, "guidance_scale", 1.0))

    def run(self, texts: Sequence[Text], size: Size, scale: float | None, script: Script) -> Recording:
        """Runs the pipeline's `__call__` for some prompts together.

        Raises:
            RequestError: the pipeline refuses what it is asked.
            ModelError: it fails in another way.
        """
        recording = Recording()
        pipeline = self._twin(recording, script, scale)
        arguments = self._arguments(texts, size, scale, script)
        try:
            with torch.no_grad(), redirect_stderr(StringIO()):
                result = pipeline(**arguments)
            recording.images = result[0] if isinstance(result, tuple) else next(iter(result.values()))
        except _Over:
            pass
        except torch.OutOfMemoryError:
            raise
        except ValueError as error:
            raise RequestError(f"the pipeline {type(self.pipeline).__name__} refuses this: {said(error)}") from error
        except Exception as error:
            raise ModelError(f"the pipeline {type(self.pipeline).__name__} cannot be run: {said(error)}") from error
        return recording

    def _arguments(self, texts: Sequence[Text], size: Size, scale: float | None, script: Script) -> dict[str, Any]:
        steps = script.steps or max(2, len(script.times or ()))
        wanted: dict[str, Any] = {
            "prompt": [text.prompt for text in texts],
            "height": size.height,
            "width": size.width,
            "num_frames": size.frames,
            "frames": size.frames,
            "num_inference_steps": steps,
            "generator": torch.Generator("cpu").manual_seed(0),
            "output_type": "pt" if self.family.tensors else "np",
            **self.family.fixed,
        }
        if any(text.negative is not None for text in texts):
            wanted["negative_prompt"] = [text.negative or "" for text in texts]
        if scale is not None and (name := self.scale_argument) is not None:
            wanted[name] = scale
        if self.family.negative_needed and (scale is None or scale > 1) and "negative_prompt" not in wanted:
            wanted["negative_prompt"] = [""] * len(texts)
        return {name: value for name, value in wanted.items() if name in self.parameters and value is not None}

    def _twin(self, recording: Recording, script: Script, scale: float | None) -> Any:
        """A copy of the pipeline with stand-ins in the places of its networks, scheduler and autoencoder."""
        twin = copy.copy(self.pipeline)
        own = twin.__dict__  # past `DiffusionPipeline.__setattr__`, which would write into the shared configuration
        own["_progress_bar_config"] = {"disable": True}
        for name in self.networks:
            network = getattr(self.pipeline, name)
            own[name] = _stand_in(network, forward=_recorded(name, network, recording, script))
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        own["scheduler"] = scheduler
        scheduler.set_timesteps = _timed(scheduler, scheduler.set_timesteps, recording, script)
        scheduler.step = _steered(scheduler, recording, script)
        own["vae"] = _stand_in(self.pipeline.vae, decode=_decoding(self.pipeline.vae.decode, recording, script))
        for name in ("guider", "ocr_guider"):
            if (guider := getattr(self.pipeline, name, None)) is not None:
                own[name] = copy.deepcopy(guider)
                if scale is not None and self.scale_argument is None:
                    own[name].guidance_scale = scale
        return twin


def _stand_in(original: nn.Module, **members: Any) -> Any:
    """A module of the same class with the same weights, without hooks, and with other members."""
    made = type(original).__new__(type(original))
    hooks = {key: type(value)() for key, value in original.__dict__.items() if key.endswith("_hooks")}
    made.__dict__.update({**original.__dict__, **hooks, "_compiled_call_impl": None, **members})
    return made


def _recorded(name: str, original: nn.Module, recording: Recording, script: Script) -> Callable[..., Any]:
    signature = inspect.signature(original.forward)
    absent = {key: None for key, value in signature.parameters.items() if value.default is None}

    @wraps(original.forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.arguments.update({key: value for key, value in absent.items() if key not in bound.arguments})
        made = Call(name, {key: cloned(value) for key, value in bound.arguments.items()}, None)
        output = None if script.outputs is None else script.outputs(made)
        if output is None:
            output = original(*args, **kwargs)
        recording.calls.append(made._replace(output=cloned(output)))
        if script.calls is not None and len(recording.calls) == script.calls:
            raise _Over
        return output

    return call


def _steered(scheduler: Any, recording: Recording, script: Script) -> Callable[..., Any]:
    def step(
        model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, return_dict: bool = True, **kw: Any
    ) -> Any:
        calls, recording.calls = recording.calls, []
        done = Evaluation(float(timestep), sample.clone(), calls, model_output.clone())
        recording.evaluations.append(done)
        if script.decode is False and len(recording.evaluations) == len(scheduler.timesteps):
            raise _Over
        following = sample if script.states is None else script.states(len(recording.evaluations) - 1, sample)
        following = following.to(sample.dtype)
        return _Stepped(following) if return_dict else (following,)

    return step


class _Stepped:
    def __init__(self, sample: Tensor):
        self.prev_sample = sample

    def __getitem__(self, index: int) -> Tensor:
        return (self.prev_sample,)[index]


def _timed(scheduler: Any, usual: Callable[..., None], recording: Recording, script: Script) -> Callable[..., None]:
    @wraps(usual)  # pipelines look at the names of its parameters
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        usual(*args, **kwargs)
        recording.sigmas = [float(sigma) for sigma in getattr(scheduler, "sigmas", ())]
        recording.timesteps = [float(time) for time in scheduler.timesteps]
        if script.times is not None:
            scheduler.timesteps = torch.tensor(script.times, dtype=torch.float32, device=scheduler.timesteps.device)
            scheduler.num_inference_steps = len(script.times)

    return set_timesteps


def _decoding(usual: Callable[..., Any], recording: Recording, script: Script) -> Callable[..., Any]:
    @wraps(usual)
    def decode(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        recording.decodes.append(Decode(latents.clone(), args, kwargs))
        if script.decode is None:
            raise _Over
        return usual(latents, *args, **kwargs)

    return decode


def cloned(value: Any) -> Any:
    """A copy of nested arguments: pipelines write into theirs."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict) and type(value) is dict:
        return {key: cloned(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(cloned(one) for one in value)
    if hasattr(value, "sample") and hasattr(value, "keys"):
        return type(value)(**{key: cloned(value[key]) for key in value})
    return value
