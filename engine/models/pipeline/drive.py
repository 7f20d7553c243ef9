"""Drives a pipeline's own `__call__` with stand-ins that record what it does, and steer where its loop goes.

They share their originals' weights; the pipeline itself is not touched.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rollflow.errors import ModelError, RequestError, said
from rollflow.models.pipeline.families import Family
from rollflow.models.pipeline.recording import (
    Over,
    Recording,
    Script,
    cloned,
    decoding,
    recorded,
    stand_in,
    steered,
    timed,
)  # fmt: skip
from rollflow.models.text import Size, Text

NETWORKS = ("transformer", "transformer_2")
SCALES = (4.0, 8.0)  # of guidance, at which pipelines are probed; 16 bits hold them, and a thousand times them
_ONE = threading.RLock()  # held by a run: encoders of transformers keep in their modules what they compute
TEXTS = 16  # results of a pipeline's `encode_prompt` that are kept: learning asks for the same few again and again


class Clock(NamedTuple):
    """How a scheduler counts time.

    Attributes:
        span: its time at noise; at images it is 0.
        inverted: whether it is the other way round.
        shift: `s` where the noise level is `s u / (1 + (s - 1) u)` at the time `span u`: mostly 1, as schedulers mostly
            shift their times with their noise levels.
    """

    span: int = 1000
    inverted: bool = False
    shift: float = 1.0

    def time(self, tau: Any) -> Any:
        """The scheduler's time at a linear time, a number or a tensor."""
        part = (1 - tau) if self.inverted else tau
        return self.span * (part if self.shift == 1 else part / (self.shift + (1 - self.shift) * part))

    def tau(self, time: Any) -> Any:
        """The linear time at a time of the scheduler's."""
        part = time / self.span
        part = part if self.shift == 1 else self.shift * part / (1 + (self.shift - 1) * part)
        return 1 - part if self.inverted else part


class Driver:
    """Runs a pipeline by a script.

    Args:
        pipeline: is left as it is.
        family: what is known of its class.

    Attributes:
        networks: the names of its transformers.
        clock: how its scheduler counts time.
        exact: whether its network computes in 32 bits or more.
    """

    def __init__(self, pipeline: Any, family: Family):
        self.pipeline, self.family = pipeline, family
        self.parameters = inspect.signature(type(pipeline).__call__).parameters
        self.networks = [name for name in NETWORKS if getattr(pipeline, name, None) is not None]
        config = pipeline.scheduler.config
        self.clock = Clock(int(config.get("num_train_timesteps", 1000)), bool(config.get("invert_sigmas", False)))
        self.exact = getattr(pipeline, self.networks[0]).dtype in (torch.float32, torch.float64)
        self._texts: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """The pipeline's class."""
        return type(self.pipeline).__name__

    @property
    def scale_argument(self) -> str | None:
        """The name of the argument that holds the guidance scale."""
        for name in (self.family.guidance, "guidance_scale", "true_cfg_scale"):
            if name and name in self.parameters:
                return name
        return None

    @property
    def negative(self) -> bool:
        """Whether the scale may be one of classifier-free guidance with a negative prompt.

        Pipelines with two scales embed the first, and lead away from a negative prompt by the second, which is not
        theirs by default.
        """
        two = {"guidance_scale", "true_cfg_scale"} <= self.parameters.keys() and self.family.guidance is None
        return "negative_prompt" in self.parameters and not two

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
        pipeline = self._twin(recording, script, size, scale)
        arguments = self._arguments(texts, size, scale, script)
        try:
            with _ONE, torch.no_grad():
                result = pipeline(**arguments)
            recording.images = result[0] if isinstance(result, tuple) else next(iter(result.values()))
        except Over:
            pass
        except torch.OutOfMemoryError:
            raise
        except ValueError as error:
            raise RequestError(f"the pipeline {self.name} refuses this: {said(error)}") from error
        except Exception as error:
            absent = [name for name, part in self.pipeline.components.items() if part is None]
            lacks = f"; it lacks {', '.join(absent)}" if absent else ""
            raise ModelError(f"the pipeline {self.name} cannot be run: {said(error)}{lacks}") from error
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
            "output_type": "pt",
        }
        wanted = {name: value for name, value in wanted.items() if value is not None} | dict(self.family.fixed)
        if any(text.negative is not None for text in texts):
            wanted["negative_prompt"] = [text.negative or "" for text in texts]
        if scale is not None and (name := self.scale_argument) is not None:
            wanted[name] = scale
        if self.family.negative_needed and (scale is None or scale > 1) and "negative_prompt" not in wanted:
            wanted["negative_prompt"] = [""] * len(texts)
        return {name: value for name, value in wanted.items() if name in self.parameters}

    def _twin(self, recording: Recording, script: Script, size: Size, scale: float | None) -> Any:
        """A copy of the pipeline with stand-ins in the places of its networks, scheduler and autoencoder."""
        twin = copy.copy(self.pipeline)
        own = twin.__dict__  # past `DiffusionPipeline.__setattr__`, which would write into the shared configuration
        own["_progress_bar_config"] = {"disable": True}
        for name in self.networks:
            network = getattr(self.pipeline, name)
            own[name] = stand_in(network, forward=recorded(name, network, recording, script))
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        own["scheduler"] = scheduler
        scheduler.set_timesteps = timed(scheduler, scheduler.set_timesteps, recording, script)
        scheduler.step = steered(scheduler, recording, script)
        if hasattr(twin, "encode_prompt"):
            own["encode_prompt"] = self._remembered(twin.encode_prompt, (size, scale))
        own["vae"] = stand_in(self.pipeline.vae, decode=decoding(self.pipeline.vae.decode, recording, script))
        for name in ("guider", "ocr_guider"):
            if (guider := getattr(self.pipeline, name, None)) is not None:
                own[name] = copy.deepcopy(guider)
                if scale is not None and self.scale_argument is None:
                    own[name].guidance_scale = scale
        return twin

    def _remembered(self, usual: Callable[..., Any], asked: Any) -> Callable[..., Any]:
        """`encode_prompt`, whose last results are kept: encoders take the largest part of a run."""

        @wraps(usual)
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(value, Tensor | nn.Module) for value in (*args, *kwargs.values())):
                return usual(*args, **kwargs)
            key = repr((asked, args, sorted(kwargs.items())))
            found = self._texts.get(key)
            if found is None:
                found = usual(*args, **kwargs)
                self._texts[key] = found
                for oldest in [*self._texts][:-TEXTS]:
                    del self._texts[oldest]
            return cloned(found)

        return encode_prompt
