"""Calls a pipeline's network for rows of different prompts, times and scales, as the pipeline would for each alone."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow.copies import upload
from rollflow.models import Geometry
from rollflow.models.pipeline.arguments import LIST, Argument, leaf, row_of
from rollflow.models.pipeline.drive import SCALES, Driver
from rollflow.models.pipeline.exact import PROBES, ExactTimes
from rollflow.models.pipeline.learn import Learned, Part
from rollflow.models.pipeline.outputs import rows_of, viewed
from rollflow.models.pipeline.recording import Call
from rollflow.models.pipeline.tree import Path, built, same
from rollflow.models.recorded import Function


class Prompt(NamedTuple):
    """Of one block of network rows: the arguments that follow the text and the size, by path, and their key.

    Rows of equal keys go into one call of the network.
    """

    arguments: dict[Path, Any]
    key: Hashable


class Conditioning(NamedTuple):
    """What a network needs of a text: with the prompt, and without it unless the request does without guidance."""

    conditional: Prompt
    unconditional: Prompt | None
    geometry: Geometry


class Replay:
    """The evaluations of a pipeline's network, of one size.

    Args:
        learned: how the network is called.
        driver: of the pipeline.
        exact: hands the network exact times; None where it does not round them.

    Attributes:
        ragged: arguments whose shape follows the length of the text, see `observe`.
        masks: masks that are None because a text alone needs no padding, with the ragged arguments that they belong to.
        grouped: whether texts of different lengths go into calls of their own; otherwise they are padded.
        recorded: functions in place of `computed`, by the place of a network and the key of its prompts.
    """

    def __init__(self, learned: Learned, driver: Driver, exact: ExactTimes | None = None):
        self.learned, self.driver, self.exact = learned, driver, exact
        ratio = driver.pipeline.config.get("boundary_ratio") if len(driver.networks) == 2 else None
        self._boundary = None if ratio is None else ratio * driver.clock.span
        self.ragged: tuple[Path, ...] = ()
        self.masks: dict[Path, Path] = {}
        self.grouped = False
        self.recorded: dict[Hashable, Function] = {}
        self._shared: dict[Path, list[Any]] = {}  # values of arguments that all rows of a call share, as they were met

    def learn_times(self, prompt: Prompt) -> None:
        """Finds where the networks can take exact times; see `ExactTimes`."""
        assert self.exact is not None, "asked for only where there are some to learn"
        device = getattr(self.driver.pipeline, self.driver.networks[0]).device
        x = torch.randn(len(PROBES), *self.learned.shape, generator=torch.Generator().manual_seed(2)).to(device)
        scales = torch.full((len(PROBES),), SCALES[0], device=device)
        for i, name in enumerate(self.driver.networks):
            call = partial(self.call, i, [prompt] * len(PROBES), x, scales=scales)
            self.exact.learn(getattr(self.driver.pipeline, name), call, self.driver.clock.span, device)

    # Texts.

    def conditioning(self, calls: Sequence[Call], geometry: Geometry) -> Conditioning:
        """What the calls of one evaluation hold of their text."""
        unconditional = self.learned.unconditional
        return Conditioning(
            self._prompt(calls, self.learned.conditional),
            None if unconditional is None else self._prompt(calls, unconditional),
            geometry,
        )

    def observe(self, calls: Sequence[Sequence[Call]]) -> None:
        """Finds the arguments whose shape follows the length of the text, in evaluations of different texts.

        They are padded where the network has a mask beside them.
        """
        parts = [self.learned.conditional, self.learned.unconditional]
        shapes: dict[Path, set[tuple[int, ...]]] = {}
        for evaluation in calls:
            for argument in self.learned.arguments:
                if argument.kind == "rows" and argument.dim != LIST:
                    rows = [row_of(leaf(evaluation[p.call].arguments, argument.path), argument.dim, p.block)
                            for p in parts if p is not None]  # fmt: skip
                    shapes.setdefault(argument.path, set()).update(tuple(row.shape) for row in rows)
        self.ragged = tuple(path for path, found in shapes.items() if len(found) > 1)
        none = {a.path for a in self.learned.arguments if leaf(self.learned.like, a.path) is None}
        masks = {(*path[:-1], f"{path[-1]}_mask"): path for path in self.ragged}
        self.masks = {mask: path for mask, path in masks.items() if mask in none}
        masked = bool(self.masks) or any("mask" in str(path[-1]) for path in self.ragged)
        self.grouped = bool(self.ragged) and not masked

    def _prompt(self, calls: Sequence[Call], part: Part) -> Prompt:
        arguments = calls[part.call].arguments
        found: dict[Path, Any] = {}
        key: list[Hashable] = []
        for argument in self.learned.arguments:
            path = argument.path
            if argument.kind in ("time", "scale") or (argument.kind == "state" and argument.place is None):
                continue
            if path in self.masks:
                text = leaf(arguments, self.masks[path])
                found[path] = torch.ones(text.shape[1], dtype=torch.bool, device=text.device)
                continue
            value = row_of(leaf(arguments, path), argument.dim, part.block)
            if argument.dim is None:
                value = self._interned(path, value)
                key.append(id(value))
            elif isinstance(value, Tensor) and argument.dim != LIST and (self.grouped or path not in self.ragged):
                key.append(tuple(value.shape))
            found[path] = value
        return Prompt(found, tuple(key))

    def _interned(self, path: Path, value: Any) -> Any:
        """The first of equal values that was met, so that equal ones are the same object."""
        known = self._shared.setdefault(path, [])
        for one in known:
            if same(one, value):
                return one
        known.append(value)
        return value

    # Rows.

    def velocity(
        self, x: Float[Tensor, "row ..."], tau: Tensor, conditioning: Sequence[Conditioning], guidance: Tensor
    ) -> Float[Tensor, "row ..."]:
        """`E[eps - x0 | x]` of states in any shape; rows with guidance take two rows of the network, in one call."""
        learned, clock = self.learned, self.learned.clock
        states, time, scales = x.view(len(x), *learned.shape), clock.time(tau), guidance
        prompts = [one.conditional for one in conditioning]
        guided = [i for i, one in enumerate(conditioning) if one.unconditional is not None]
        if guided:
            prompts += [one.unconditional for one in conditioning if one.unconditional is not None]
            index = upload(torch.tensor([*range(len(x)), *guided]), x.device)
            states, time, scales = states[index], time[index], scales[index]
        output = self._outputs(prompts, states, time, scales)
        velocity = output[: len(x)]
        if guided:
            chosen = index[len(x) :]
            combined = learned.rule.guided(velocity[chosen], output[len(x) :], guidance[chosen])
            velocity = combined if len(guided) == len(x) else velocity.index_copy(0, chosen, combined)
        sign = -learned.sign if clock.inverted else learned.sign
        return (velocity if sign == 1 else sign * velocity).reshape(x.shape).to(x.dtype)

    def _outputs(self, prompts: Sequence[Prompt], x: Tensor, time: Tensor, scales: Tensor) -> Tensor:
        """The network's outputs, in as many calls as the rows need: mostly one."""
        networks = [0] * len(prompts)
        if self._boundary is not None:
            networks = [int(t < self._boundary) for t in time.tolist()]
        groups: dict[Hashable, list[int]] = {}
        for i, (prompt, network) in enumerate(zip(prompts, networks, strict=True)):
            groups.setdefault((network, prompt.key), []).append(i)
        if len(groups) == 1:
            return self.call(networks[0], prompts, x, time, scales)
        parts, places = [], []
        for group in groups.values():
            index = upload(torch.tensor(group), x.device)
            own = [prompts[i] for i in group]
            parts.append(self.call(networks[group[0]], own, x[index], time[index], scales[index]))
            places += group
        order = upload(torch.tensor(places).argsort(), x.device)
        return torch.cat(parts)[order]

    def call(self, network: int, prompts: Sequence[Prompt], x: Tensor, time: Tensor, scales: Tensor) -> Tensor:
        """One call of a network, by its place among the pipeline's, with a row for each prompt."""
        found = self.gathered(prompts)
        if self.recorded and not torch.is_grad_enabled():
            module = getattr(self.driver.pipeline, self.driver.networks[network])
            recorded = self.recorded.get((network, prompts[0].key))
            if recorded is not None and not (module._forward_hooks or module._forward_pre_hooks):  # which want to run
                return recorded(x, time, scales, *tensors_of(found).values())
        return self.computed(network, found, x, time, scales)

    def gathered(self, prompts: Sequence[Prompt]) -> dict[Path, Any]:
        """The arguments of a call that follow the texts and the size, by path."""
        found: dict[Path, Any] = {}
        for argument in self.learned.arguments:
            path, state = argument.path, argument.kind == "state"
            if argument.kind in ("time", "scale") or (state and argument.place is None):
                continue
            values = [one.arguments[path] for one in prompts]
            if state:
                found[path] = torch.stack(values)
            elif path in self.masks or argument.dim not in (None, LIST):
                found[path] = _stacked(values, argument.dim or 0)
            else:
                found[path] = values if argument.dim == LIST else values[0]
        return found

    def computed(self, network: int, gathered: dict[Path, Any], x: Tensor, time: Tensor, scales: Tensor) -> Tensor:
        """What a network gives for rows of states, times and scales, with all its other arguments."""
        learned, found = self.learned, {**gathered}
        for argument in learned.arguments:
            path, given = argument.path, leaf(learned.like, argument.path)
            if argument.kind == "state":
                found[path] = _states(argument, given, found.get(path), x)
            elif argument.kind in ("time", "scale"):
                found[path] = _numbers(argument, given, time if argument.kind == "time" else scales)
        module = getattr(self.driver.pipeline, self.driver.networks[network])
        with nullcontext() if self.exact is None else self.exact.at(module, time):
            output = module(**built(found, learned.like))
        return viewed(rows_of(output), learned.shape, learned.view)


def tensors_of(found: dict[Path, Any]) -> dict[Path, Tensor]:
    """Those of the values that are tensors."""
    return {path: value for path, value in found.items() if isinstance(value, Tensor)}


def _states(argument: Argument, given: Any, around: Tensor | None, x: Tensor) -> Any:
    """The argument that holds the states: as they are, folded, or among constants."""
    like = row_of(given, argument.dim, 0)
    x = x.to(like.dtype)
    if around is None or argument.place is None:
        rows = x.reshape(x.shape[0], *like.shape)  # not its length, which a recording would hold
    else:
        dim, offset = argument.place
        size = x.shape[dim + 1]
        left = around.narrow(dim + 1, 0, offset)
        right = around.narrow(dim + 1, offset + size, around.shape[dim + 1] - offset - size)
        rows = torch.cat([left, x, right], dim + 1)
    if argument.dim == LIST:
        return list(rows.unbind(0))
    return rows.movedim(0, argument.dim or 0)


def _numbers(argument: Argument, given: Any, value: Tensor) -> Any:
    """What follows a time or a scale of each row, in the shape that the network has it."""
    slope, offset = argument.slope, argument.offset
    value = value / (1 / slope) if abs(slope) < 1 else value * slope  # a division by 1000 rounds as the pipeline's
    value = value + offset if offset else value
    if argument.dim == LIST:
        return list(value.unbind(0))
    if not isinstance(given, Tensor):
        return value
    value = value.to(given.dtype if given.is_floating_point() else torch.float32)
    tail = given.shape[1:]
    return value.view(-1, *[1] * len(tail)).expand(-1, *tail) if tail else value


def _stacked(values: Sequence[Tensor], dim: int) -> Tensor:
    """Rows of an argument along a dimension; shorter ones are padded with zeros at their ends."""
    if len({value.shape for value in values}) > 1:
        most = [max(sizes) for sizes in zip(*(value.shape for value in values), strict=True)]
        padded = []
        for value in values:
            whole = value.new_zeros(most)
            whole[tuple(slice(0, size) for size in value.shape)] = value
            padded.append(whole)
        values = padded
    return torch.stack(list(values), dim)
