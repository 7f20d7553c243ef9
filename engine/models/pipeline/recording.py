"""What a run of a pipeline is to do, what it did, and the stand-ins that see to both.

The transformer's stand-in records every call, the scheduler's replaces states and times, the autoencoder's records what
is to be decoded.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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
        times: of the evaluations, as the scheduler counts them; None for its own.
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


class Over(Exception):
    """Ends a run from within."""


def stand_in(original: nn.Module, **members: Any) -> Any:
    """A module of the same class with the same weights, without hooks, and with other members."""
    made = type(original).__new__(type(original))
    for key, value in original.__dict__.items():
        held = type(value)() if key.endswith("_hooks") else copy.copy(value) if isinstance(value, dict) else value
        made.__dict__[key] = held
    made.__dict__.update({"_compiled_call_impl": None, **members})
    return made


def recorded(name: str, original: nn.Module, recording: Recording, script: Script) -> Callable[..., Any]:
    """A network's `forward` that records its calls, and gives what the script says."""
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
            raise Over
        return output

    return call


def steered(scheduler: Any, recording: Recording, script: Script) -> Callable[..., Any]:
    """A scheduler's `step` that records its velocity, and goes where the script says."""

    def step(
        model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, return_dict: bool = True, **kw: Any
    ) -> Any:
        calls, recording.calls = recording.calls, []
        done = Evaluation(float(timestep), sample.clone(), calls, model_output.clone())
        recording.evaluations.append(done)
        if script.decode is False and len(recording.evaluations) == len(scheduler.timesteps):
            raise Over
        following = sample if script.states is None else script.states(len(recording.evaluations) - 1, sample)
        following = following.to(sample.dtype)
        return _Stepped(following) if return_dict else (following,)

    return step


class _Stepped:
    def __init__(self, sample: Tensor):
        self.prev_sample = sample

    def __getitem__(self, index: int) -> Tensor:
        return (self.prev_sample,)[index]


def timed(scheduler: Any, usual: Callable[..., None], recording: Recording, script: Script) -> Callable[..., None]:
    """A scheduler's `set_timesteps` that records its own times, and sets those of the script."""

    @wraps(usual)  # pipelines look at the names of its parameters
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        usual(*args, **kwargs)
        recording.sigmas = [float(sigma) for sigma in getattr(scheduler, "sigmas", ())]
        recording.timesteps = [float(time) for time in scheduler.timesteps]
        if script.times is not None:
            scheduler.timesteps = torch.tensor(script.times, dtype=torch.float32, device=scheduler.timesteps.device)
            scheduler.num_inference_steps = len(script.times)

    return set_timesteps


def decoding(usual: Callable[..., Any], recording: Recording, script: Script) -> Callable[..., Any]:
    """An autoencoder's `decode` that records what it is given."""

    @wraps(usual)
    def decode(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        recording.decodes.append(Decode(latents.clone(), args, kwargs))
        if script.decode is None:
            raise Over
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
