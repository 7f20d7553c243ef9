"""The workers that a command runs searches on: an engine in this process, processes, or actors of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rollflow.cli.options import ModelOptions
from rollflow.errors import RequestError

if TYPE_CHECKING:
    from rollflow.serve.messages import Channel


def channels(runtime: ModelOptions, workers: int, ray: bool) -> Sequence[Channel]:
    """A channel to each of `workers` engines, none of which is started yet.

    Raises:
        RequestError: there can be none, or Ray is not installed.
    """
    if workers < 1:
        raise RequestError(f"--workers {workers}: it must be at least 1")
    if ray:
        from rollflow.serve.ray_actor import RayChannel

        return [RayChannel(engine_options(runtime, workers, number)) for number in range(workers)]
    if workers == 1:
        from rollflow.serve.local import LocalChannel

        return [LocalChannel(runtime.load)]
    from rollflow.serve.process import ProcessChannel

    return [ProcessChannel(engine_options(runtime, workers, number)) for number in range(workers)]


def engine_options(runtime: ModelOptions, workers: int, number: int) -> dict[str, Any]:
    """Options of `Engine.from_pretrained`, plain JSON, for one of several workers: with its GPU, or its share of the
    cores."""
    import torch

    device, dtype = runtime.chosen()
    given: dict[str, Any] = {
        name: getattr(runtime, name) for name in ("preview", "reproducible", "compile", "pipeline")
    } | {
        "name_or_path": runtime.model,
        "device": None if device is None else str(device),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
    }
    if runtime.device in (None, "cuda") and torch.cuda.is_available():
        given["device"] = f"cuda:{number % torch.cuda.device_count()}"
    elif device is None or device.type == "cpu":
        given |= {"lanes": 1, "threads": max(1, (os.cpu_count() or 1) // workers)}
    return {name: value for name, value in given.items() if value is not None}
