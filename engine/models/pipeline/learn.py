"""Learns from a pipeline's own code how it calls its transformer: which argument is what, and what follows.

Runs that differ in one thing alone (state, time, scale, number of rows) are compared, argument by argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rollflow.errors import ModelError
from rollflow.models.pipeline.arguments import Argument, arguments_of, leaf, merged
from rollflow.models.pipeline.drive import SCALES, Clock, Driver
from rollflow.models.pipeline.outputs import normal, random_outputs, rows_of, viewed, views
from rollflow.models.pipeline.recording import Call, Evaluation, Recording, Script
from rollflow.models.pipeline.tree import named
from rollflow.models.rule import NORMS, Rule
from rollflow.models.text import Size, Text

# Parts of the scheduler's span, of one expert where there are two. A network of 16 bits is probed at times that it can
# hold, whether the pipeline counts them to 1 or to 1000.
TIMES = {True: (0.97, 0.93), False: (1.0, 0.5)}
BETWEEN = 2.0  # a third scale, at which an embedded scale must lie on the line through those of `SCALES`
EXACT = {True: 1e-4, False: 3e-2}  # relative to the largest element
STEPS = 12


class Part(NamedTuple):
    """One block of network rows: which call of an evaluation, and which block of its rows."""

    call: int
    block: int


@dataclass(frozen=True)
class Learned:
    """How a pipeline evaluates its network.

    Attributes:
        arguments: of its calls, by path.
        shape: of a state, a row of it.
        conditional: the block of network rows that follows the prompt.
        unconditional: the one that does not; None without classifier-free guidance.
        sign: the pipeline's velocity is `sign` times that of the network.
        rule: how guidance combines them.
        view: how the network's output becomes a state, see `views`.
        like: a call's arguments, as recorded.
        real: a call, with what the network itself gave.
        calls: calls of an evaluation.
        clock: how the network's times follow linear times.
    """

    arguments: tuple[Argument, ...]
    shape: tuple[int, ...]
    conditional: Part
    unconditional: Part | None
    sign: float
    rule: Rule
    view: str
    like: dict[str, Any]
    real: Call
    calls: int
    clock: Clock


def learn(driver: Driver, size: Size, texts: Sequence[Text]) -> Learned:
    """Learns from a few runs.

    Args:
        driver: of the pipeline.
        size: of the images.
        texts: two prompts of different lengths.

    Raises:
        ModelError: the pipeline does something that no rule here describes; it says what.
    """
    times = [driver.clock.span * TIMES[driver.exact][i] for i in (0, 0, 0, 1)]
    one, other = texts
    recording = driver.run([one], size, SCALES[0], Script(times, calls=1))
    real, clock = recording.calls[0], _clock(driver, recording)
    outputs = random_outputs(real)

    def run(asked: Sequence[Text], scale: float) -> list[Evaluation]:
        generator = torch.Generator().manual_seed(1)
        script = Script(times, lambda i, x: normal(x, generator) if i < 2 else x, outputs)
        return driver.run(asked, size, scale, script).evaluations

    alone, together = run([one], SCALES[0]), run([one, one], SCALES[0])
    scaled, reworded = run([one], SCALES[1]), run([other], SCALES[0])
    calls = len(alone[1].calls)
    _check_calls(driver, [*alone[1:4], together[1], scaled[1], reworded[1]], calls)
    arguments = merged([[*arguments_of(i, alone, together, scaled, reworded)] for i in range(calls)])
    states = [argument for argument in arguments if argument.kind == "state"]
    if len(states) != 1:
        raise ModelError(f"{driver.name}: {len(states)} arguments of its network are the state, there must be one")
    if not any(argument.kind == "time" for argument in arguments):
        raise ModelError(f"{driver.name}: no argument of its network depends on the time")
    if any(argument.kind == "scale" for argument in arguments):
        check_scale(driver.name, arguments, run([one], BETWEEN)[1].calls)
    learned = Learned(
        tuple(arguments), tuple(alone[1].sample.shape[1:]), Part(0, 0), None, 1.0, Rule(), "same",
        alone[1].calls[0].arguments, real, calls, clock,
    )  # fmt: skip
    return _with_rule(driver, size, one, learned)


def _clock(driver: Driver, recording: Recording) -> Clock:
    """How the scheduler's own times follow its noise levels."""
    span = driver.clock.span
    if not all(-1e-6 <= sigma <= 1 + 1e-6 for sigma in recording.sigmas):
        raise ModelError(
            f"{driver.name}: its scheduler's noise levels reach {max(recording.sigmas, key=abs):.4g}, those of flow "
            "matching lie in [0, 1]; give it a scheduler of flow matching"
        )
    points = [(sigma, time / span) for sigma, time in zip(recording.sigmas, recording.timesteps, strict=False)]
    if all(abs(sigma - u) < 2 / span for sigma, u in points):  # some are cut to whole numbers
        return driver.clock
    shifts = [sigma * (1 - u) / (u * (1 - sigma)) for sigma, u in points if 0 < u < 1 and 0 < sigma < 1]
    if len(shifts) < 2 or max(shifts) > min(shifts) * 1.001:  # one point fits any shift
        raise ModelError(f"{driver.name}: its scheduler's times follow its noise levels in a way that is not known")
    return driver.clock._replace(shift=sum(shifts) / len(shifts))


def _check_calls(driver: Driver, evaluations: Sequence[Evaluation], calls: int) -> None:
    for evaluation in evaluations:
        if len(evaluation.calls) != calls or not calls:
            raise ModelError(
                f"{driver.name}: its network is called {calls} times in one evaluation and {len(evaluation.calls)} "
                "times in another: guidance that depends on the step, or skips layers, is refused; switch it off"
            )


def check_scale(name: str, arguments: Sequence[Argument], calls: Sequence[Call]) -> None:
    """Raises `ModelError` where the calls of one evaluation at the scale `BETWEEN` are not as was learned from two."""
    for call, argument in product(calls, [one for one in arguments if one.kind == "scale"]):
        given = torch.as_tensor(leaf(call.arguments, argument.path), dtype=torch.float64)
        wanted = argument.slope * BETWEEN + argument.offset
        largest = max(abs(argument.slope * scale + argument.offset) for scale in SCALES)
        if not bool(((given - wanted).abs() <= largest / 256).all()):  # the precision of 16 bits
            raise ModelError(
                f"{name}: the argument {named(argument.path)} of its network is {float(given.flatten()[0]):.4g} at "
                f"guidance {BETWEEN:g}, and {wanted:.4g} lies on the line through those at guidance "
                f"{' and '.join(f'{scale:g}' for scale in SCALES)}: a scale that is not embedded linearly is refused"
            )


def _with_rule(driver: Driver, size: Size, text: Text, learned: Learned) -> Learned:
    """Adds how the pipeline makes a velocity of what its network gives: random outputs go through its own code."""
    outputs = random_outputs(learned.real)
    first = driver.clock.span * TIMES[driver.exact][0]
    times = torch.linspace(first, first / 64, STEPS).bfloat16().tolist()  # all of the span, as 16 bits hold it

    def run(scale: float | None) -> list[Evaluation]:
        return driver.run([text], size, scale, Script(times, None, outputs)).evaluations

    known = {scale: run(scale) for scale in SCALES}
    tried = 0
    blocks = _blocks(known[SCALES[0]][0])
    for view in views(rows_of(known[SCALES[0]][0].calls[0].output), learned.shape):
        for candidate in _candidates(learned, blocks, view):
            tried += 1
            if all(_fits(candidate, e, scale) for scale in SCALES for e in known[scale][:1]):
                _check_steps(driver, candidate, known)
                return _with_threshold(candidate, run)
    raise ModelError(
        f"{driver.name}: what it makes of the outputs of its network ({len(blocks)} a state) is none of the {tried} "
        "known forms of guidance (rescaled, projected or momentum guidance is refused)"
    )


def _blocks(evaluation: Evaluation) -> list[Part]:
    """The network's rows of one state, as blocks."""
    rows = len(evaluation.sample)
    return [
        Part(i, j) for i, call in enumerate(evaluation.calls) for j in range(len(rows_of(call.output)) // max(1, rows))
    ]


def _candidates(learned: Learned, parts: Sequence[Part], view: str) -> Iterator[Learned]:
    for sign in (1.0, -1.0):
        if len(parts) == 1:
            yield replace(learned, conditional=parts[0], unconditional=None, sign=sign, view=view)
        elif len(parts) == 2:
            for c, u in (parts, parts[::-1]):
                for base in ("without", "with"):
                    for norm in NORMS:
                        yield replace(
                            learned, conditional=c, unconditional=u, sign=sign, view=view, rule=Rule(base, norm)
                        )


def _fits(candidate: Learned, evaluation: Evaluation, scale: float) -> bool:
    """Whether a rule gives what the pipeline gave to its scheduler."""

    if len(evaluation.calls) != candidate.calls:
        return False

    def block(part: Part) -> Tensor:
        output = viewed(rows_of(evaluation.calls[part.call].output), candidate.shape, candidate.view)
        rows = len(evaluation.sample)
        return output[part.block * rows : (part.block + 1) * rows].float()

    velocity = block(candidate.conditional)
    if candidate.unconditional is not None:
        scales = torch.full((len(velocity),), scale, device=velocity.device)
        velocity = candidate.rule.guided(velocity, block(candidate.unconditional), scales)
    velocity, wanted = candidate.sign * velocity, evaluation.velocity.float()
    tolerance = EXACT[evaluation.velocity.dtype in (torch.float32, torch.float64)]
    return velocity.shape == wanted.shape and bool(
        (velocity - wanted).abs().max() <= tolerance * (1 + wanted.abs().max())
    )


def _check_steps(driver: Driver, candidate: Learned, known: dict[float, list[Evaluation]]) -> None:
    """Guidance must be the same at every step and time: rows of an engine are at steps of their own."""
    for scale, evaluations in known.items():
        for i, evaluation in enumerate(evaluations):
            if not _fits(candidate, evaluation, scale):
                raise ModelError(
                    f"{driver.name}: its guidance changes at step {i} of {len(evaluations)}: what depends on the time, "
                    "on the step's number or on earlier steps is refused; switch it off, or give it another guider"
                )


def _with_threshold(learned: Learned, run: Callable[[float], list[Evaluation]]) -> Learned:
    """Adds from which scale on the pipeline guides at all."""
    if learned.unconditional is None:
        return learned
    above = next((scale for scale in (1.0, 0.0) if len(_blocks(run(scale)[0])) == 1), -math.inf)
    return replace(learned, rule=replace(learned.rule, above=above))
