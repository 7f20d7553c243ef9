"""`rollflow plan`: what a model takes of a device, before it is used there."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from rollflow.cli.options import File, Guidance, Judge, Place, Size
from rollflow.errors import RequestError

PROMPT = "two red circles"


@dataclass(frozen=True)
class Plan:
    """Say what a model takes of a device: its memory, the largest batch, and the least time of an evaluation.

    It loads the model and runs it on one row and on two. The rule: the model, the pool of particles and the tensors of
    the batches that run at a time must fit into 90 % of the memory that was free before. The time is the floating-point
    operations of an evaluation over those a second of a large matrix product here: no more than a lower bound.
    """

    height: Size = None
    """Image height in pixels."""
    width: Size = None
    """Image width in pixels."""
    frames: Size = None
    """Frames of a clip, of a model of video."""
    guidance: Guidance = None
    """Guidance scale: with classifier-free guidance an evaluation takes two rows of the network."""
    prompt: str = PROMPT
    """A prompt, where the cost depends on its length."""
    reward: Judge = None
    """What images will be judged by: a name or an expression. Its networks are loaded and called, too."""
    json: File = None
    """A file for the figures."""
    place: Place = field(default_factory=Place)

    def __call__(self) -> int:
        """Runs the command; returns 1 where the model does not fit."""
        from rollflow.bench import outputs
        from rollflow.cli.reports import print_plan

        self.place.check()
        outputs.check_file(self.json)
        found = self.figures()
        if self.json is not None:
            self.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print_plan(found)
        return 0 if found["fits"] else 1

    def figures(self) -> dict[str, Any]:
        """What is printed, in bytes and seconds.

        Raises:
            RollflowError: there is no such model or device, or the model does not make what is asked.
        """
        import torch

        from rollflow.cli import measuring
        from rollflow.cli.sizes import tell
        from rollflow.device.memory import SHARE
        from rollflow.models import loading, own_size, velocity_dtype
        from rollflow.models.text import Size as Asked
        from rollflow.settings import BUCKETS, CPU_BUCKETS, bytes_of_slot, lanes_and_threads, slots_of

        if self.reward is not None:
            from rollflow.cli.judging import check_weights
            from rollflow.request import Request
            from rollflow.rewards.own import reward_of

            check_weights([Request(self.prompt, reward_of(self.reward))])
        device, dtype = self.place.placed()
        free = measuring.free_memory(device)
        pipeline: Any = loading.load(self.place.model, torch.device("cpu"), dtype, self.place.pipeline)
        parts = measuring.parts(pipeline)
        resident = sum(parts.values())
        found = {
            "model": self.place.model, "pipeline": type(pipeline).__name__, "device": str(device),
            "dtype": str(dtype).removeprefix("torch."), "free": free, "resident": resident, "parts": parts,
            "share": SHARE, "fits": resident <= SHARE * free,
        }  # fmt: skip
        if not found["fits"]:
            return found
        own = own_size(self.place.model)
        model: Any = loading.model(pipeline.to(device), own=own)
        size = size_of(model, self.height, self.width, self.frames)
        tell(model, Asked(*size), own)
        geometry = model.geometry(*size)
        conditioning, rows, guidance = conditioning_of(model, self.place.model, geometry, self.prompt, self.guidance)
        forward, decode = measuring.costs(model, geometry, conditioning, guidance)
        kept = velocity_dtype(model)
        slots, each = slots_of(None, geometry, kept), bytes_of_slot(geometry, kept)
        lanes = lanes_and_threads(device, None, None)[0]
        sizes = CPU_BUCKETS if device.type == "cpu" else BUCKETS
        judged = self._rewards(geometry, device, sizes[-1])
        left = SHARE * free - resident - slots * each - sum(one["resident"] + one["call"] for one in judged.values())
        fitting = [size for size in sizes if lanes * max(forward.bytes_of(size), decode.bytes_of(size)) <= left]
        rate = measuring.matmul_rate(device, dtype)
        return {
            **found, "fits": bool(fitting), "size": str(geometry), "state": [*geometry.state], "guidance": guidance,
            "network_rows": rows, "slot": each, "slots": slots, "pool": slots * each, "lanes": lanes,
            "batches": {size: max(forward.bytes_of(size), decode.bytes_of(size)) for size in sizes},
            "rewards": judged, "largest": fitting[-1] if fitting else None,
            "limit": "engine" if fitting == [*sizes] else "memory",
            "forward": {"flops": forward.flops, "seconds": forward.seconds, "row": forward.slope},
            "decode": {"flops": decode.flops, "seconds": decode.seconds, "row": decode.slope},
            "flops_per_second": rate, "least_seconds_an_nfe": forward.flops / rate,
            "least_seconds_a_judged_nfe": (forward.flops + decode.flops) / rate,
        }  # fmt: skip

    def _rewards(self, geometry: Any, device: Any, most: int) -> dict[str, Any]:
        """What each term of the reward takes on the device."""
        if self.reward is None:
            return {}
        from rollflow import rewards
        from rollflow.cli import measuring
        from rollflow.rewards.own import reward_of

        frames = () if geometry.frames is None else (geometry.frames,)
        shape = (*frames, 3, geometry.height, geometry.width)
        terms = rewards.terms_of(rewards.make(reward_of(self.reward)))
        return {rewards.title(term): measuring.reward_cost(term, shape, self.prompt, device, most) for term in terms}


def size_of(model: Any, height: int | None, width: int | None, frames: int | None) -> tuple[int | None, ...]:
    """The size that is asked of a model, as its `geometry` takes it; raises `RequestError` for frames of images."""
    if model.capabilities.frames:
        return height, width, frames
    if frames is not None:
        raise RequestError(f"frames={frames}: this model makes images; leave it out")
    return height, width


def conditioning_of(
    model: Any, name: str, geometry: Any, prompt: str, guidance: float | None
) -> tuple[Any, int, float]:  # fmt: skip
    """Of a prompt; the rows of the network that an evaluation takes with it; and the guidance scale."""
    from rollflow.models import traits

    able, known = model.capabilities, traits(name).guidance
    (conditioning,) = model.encode([prompt], geometry) if able.sized_text else model.encode([prompt])
    usual = able.guidance if known is None else known
    guidance = usual if guidance is None else guidance
    if not able.companies:
        return conditioning, 1, guidance
    conditioning = model.for_request(conditioning, guidance)
    return conditioning, model.network_rows(conditioning), guidance
