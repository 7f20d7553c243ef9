"""Compares a replay with the pipeline that it was learned from, at times and prompts that it was not learned from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rollflow.errors import ModelError
from rollflow.models import Geometry
from rollflow.models.pipeline.drive import SCALES, Driver
from rollflow.models.pipeline.learn import TIMES
from rollflow.models.pipeline.outputs import random_outputs
from rollflow.models.pipeline.recording import Call, Script
from rollflow.models.pipeline.replay import Replay
from rollflow.models.text import Size, Text

PROMPTS = ("a cat", "two red circles and a blue square on a table", "a dog that runs along a river")
# Parts of the scheduler's span, on both sides of where experts change, that 32 bits or 16 bits hold, as they do 1000
# times them.
CHECKS = {True: (954 / 1024, 321 / 1024, 587 / 1024), False: (1.0, 0.25, 0.5)}
# How far velocities may be off: in 32 bits, the largest difference, relative to the largest element; in 16 bits, where
# batches round differently, its root mean square, relative to that of the elements.
AGREE = {True: 1e-4, False: 5e-2}


def calls_of(driver: Driver, replay: Replay, text: Text, size: Size) -> list[Call]:
    """The calls of one evaluation for a text, whose states and outputs mean nothing."""
    learned = replay.learned
    times = [TIMES[driver.exact][0] * driver.clock.span] * 2
    script = Script(times, None, random_outputs(learned.real), calls=learned.calls)
    return driver.run([text], size, SCALES[0], script).calls


def verify(driver: Driver, replay: Replay, size: Size, geometry: Geometry) -> dict[str, float]:
    """Returns by how much the velocities of a mixed batch differ from the pipeline's own, each row alone.

    Texts of different lengths share calls from here on where that changes nothing.

    Raises:
        ModelError: they differ by more than rounding.
    """
    learned = replay.learned
    calls = [calls_of(driver, replay, Text(prompt), size) for prompt in PROMPTS]
    replay.observe(calls)
    states = torch.randn(len(PROMPTS), *learned.shape, generator=torch.Generator().manual_seed(5))
    scales = {"guided": SCALES[0]}
    if learned.unconditional is not None:
        scales["not guided"] = 1.0 if learned.rule.base == "without" else 0.0
    wanted = {name: _own(driver, replay, size, states, scale) for name, scale in scales.items()}
    while True:
        errors = {
            name: _difference(driver, replay, calls, states, scale, wanted[name], geometry)
            for name, scale in scales.items()
        }
        if max(errors.values()) <= AGREE[driver.exact]:
            return errors
        if replay.grouped or not replay.ragged:
            break
        replay.grouped = True  # padding changes the result: texts of different lengths go apart
    found = ", ".join(f"{error:.2g} {name}" for name, error in errors.items())
    raise ModelError(
        f"{driver.name}: its velocities are replayed with relative errors of {found}, above {AGREE[driver.exact]:g}: "
        "it does something that was not learned; see `rollflow probe`"
    )


def _own(driver: Driver, replay: Replay, size: Size, states: Tensor, scale: float) -> Tensor:
    """The pipeline's own velocities, each prompt alone: of the second evaluation, as the first is of its own noise."""
    outputs = random_outputs(replay.learned.real)
    found = []
    for prompt, state, part in zip(PROMPTS, states, CHECKS[driver.exact], strict=True):
        begun: list[bool] = []

        def output(call: Call, begun: list[bool] = begun) -> Any:
            return None if begun else outputs(call)

        def following(i: int, x: Tensor, begun: list[bool] = begun, state: Tensor = state) -> Tensor:
            begun.append(True)
            return state[None].to(x)

        script = Script([driver.clock.span * part] * 2, following, output)
        found.append(driver.run([Text(prompt)], size, scale, script).evaluations[1].velocity)
    return torch.cat(found).float()


def _difference(
    driver: Driver, replay: Replay, calls: Sequence[Sequence[Call]], states: Tensor, scale: float, wanted: Tensor,
    geometry: Geometry,
) -> float:  # fmt: skip
    """By how much the velocities of a mixed batch differ from the pipeline's own."""
    known = [replay.conditioning(one, geometry) for one in calls]
    if not replay.learned.rule.on(scale):
        known = [one._replace(unconditional=None) for one in known]
    count, device = len(known), wanted.device
    tau = replay.learned.clock.tau(driver.clock.span * torch.tensor(CHECKS[driver.exact], device=device))
    with torch.no_grad():
        u = replay.velocity(states.to(device), tau, known, torch.full((count,), scale, device=device)).float()
    target = -wanted if driver.clock.inverted else wanted
    if driver.exact:
        return float((u - target).abs().max() / target.abs().max().clamp(min=1e-6))
    return float((u - target).square().mean().sqrt() / target.square().mean().sqrt().clamp(min=1e-6))
