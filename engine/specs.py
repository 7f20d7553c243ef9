"""What a request asks for as plain values, for the ledger and for replays without a device."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

from rollflow import methods, rewards
from rollflow.errors import RollflowError, shown
from rollflow.models import Geometry
from rollflow.plan import Plan

# Fields of a request that its plan depends on, and that are plain values, or are told by their text.
PLANNED = (
    "steps", "interpolant", "grid", "shift", "times", "diffusion", "solver", "finish", "finalists", "stop_at",
    "judge_all", "cache",
)  # fmt: skip
DEPTH = 4  # of containers in containers


def spec(plan: Plan, geometry: Geometry) -> dict[str, Any]:
    """A checked request as JSON can hold it; what it starts from (latents, an image) is left out.

    `opaque` names the fields that are objects, of which only the text is there: such a request cannot be made again.
    """
    request, judge = plan.request, plan.held_out
    if judge is None:
        with suppress(RollflowError):  # of an attribute that raises its request is told when its image is judged
            judge = rewards.held_out(plan.reward)
    found: dict[str, Any] = {
        "prompt": request.prompt, "method": methods.title(request.method), "reward": rewards.title(plan.reward),
        "terms": [rewards.title(term) for term in rewards.terms_of(plan.reward)],
        "held_out": None if judge is None else [rewards.title(term) for term in rewards.terms_of(judge)],
        "nfe": plan.nfe, "priority": request.priority, "seed": request.seed, "guidance": request.guidance,
        "grid_times": [step.time for step in plan.steps], "plan_finalists": plan.finalists,
        "height": geometry.height, "width": geometry.width, "frames": geometry.frames or 0,
        "options": dict(request.options), "seconds": request.seconds, "trusted_from": plan.trusted_from,
    }  # fmt: skip
    found |= {name: getattr(request, name) for name in PLANNED}
    opaque = [name for name, value in found.items() if not _plain(value)]
    opaque += ["method"] if callable(request.method) else []
    return {**found, **{name: shown(found[name]) for name in opaque if name != "method"}, "opaque": opaque}


def _plain(value: Any, depth: int = DEPTH) -> bool:
    if isinstance(value, dict):
        return depth > 0 and all(isinstance(name, str) and _plain(one, depth - 1) for name, one in value.items())
    if isinstance(value, list | tuple):
        return depth > 0 and all(_plain(one, depth - 1) for one in value)
    return value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
