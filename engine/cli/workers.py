"""The workers that a command runs searches on: an engine in this process, processes, or actors of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rollflow.cli.options import ModelOptions
from rollflow.errors import RequestError

if TYPE_CHECKING:
    from rollflow.serve.messages import Channel


def channels(
    runtime: ModelOptions,
    workers: int,
    ray: bool = False,
    cores: int | None = None,
    lanes: int | None = None,
    buckets: Sequence[int] = (),
) -> Sequence[Channel]:
    """A channel to each of `workers` engines, none of which is started yet.

    Args:
        runtime: the model, and where it runs.
        workers: how many; one that is not Ray's is in this process.
        ray: whether they are actors of a Ray cluster.
        cores: of each one, on a CPU; None: its share of this machine's.
        lanes: of each one; None: what measures fastest, or 1 where there are several on a CPU.
        buckets: batch sizes of each one, see `rollflow.Engine`; none: those that measure fastest.

    Raises:
        RequestError: there can be none.
    """
    if workers < 1:
        raise RequestError(f"--workers {workers}: it must be at least 1")
    if ray:
        from rollflow.serve.ray_actor import RayChannel

        return [RayChannel(_engine(runtime, workers, None, cores, lanes, buckets)) for _ in range(workers)]
    if workers == 1:
        from rollflow.serve.local import LocalChannel

        return [LocalChannel(partial(runtime.load, lanes=lanes, buckets=[*buckets] or None))]
    from rollflow.serve.process import ProcessChannel

    return [ProcessChannel(_engine(runtime, workers, number, cores, lanes, buckets)) for number in range(workers)]


def _engine(
    runtime: ModelOptions,
    workers: int,
    number: int | None,
    cores: int | None,
    lanes: int | None,
    buckets: Sequence[int] = (),
) -> dict[str, Any]:
    """Options of `Engine.from_pretrained`, plain JSON, for one of several workers: its GPU, or its share of the cores.

    `number` is the worker's, None on a cluster, where a device of another machine is not looked for here.
    """
    import torch

    dtype = runtime.dtype if number is None else runtime.chosen()[1]
    given: dict[str, Any] = {
        name: getattr(runtime, name) for name in ("preview", "reproducible", "compile", "pipeline", "device")
    }
    given |= {
        "lanes": lanes,
        "buckets": [*buckets] or None,
        "name_or_path": runtime.model,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
    }
    if number is not None and runtime.device in (None, "cuda") and torch.cuda.is_available():
        given["device"] = f"cuda:{number % torch.cuda.device_count()}"
    if not str(given["device"] or "cpu").startswith("cuda"):
        own = cores or max(1, (os.cpu_count() or 1) // workers)
        given |= {"device": "cpu", "lanes": lanes or 1, "threads": max(1, own // (lanes or 1))}
    return {name: value for name, value in given.items() if value is not None}
