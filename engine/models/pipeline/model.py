"""A flow pipeline of diffusers as a model: rows of different prompts, times and scales in one call of its network."""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow.errors import ModelError, RequestError
from rollflow.models import Capabilities, FlowModel, Geometry
from rollflow.models.pipeline.decoding import TOLERANCE, Decoding, Decodings, decoded, images_of, learn_decoding
from rollflow.models.pipeline.drive import Call, Driver, Evaluation, Script
from rollflow.models.pipeline.families import Family, family
from rollflow.models.pipeline.learn import (
    LIST,
    SCALES,
    TIMES,
    Argument,
    Learned,
    Part,
    leaf,
    learn,
    random_outputs,
    row_of,
    rows_of,
    viewed,
)  # fmt: skip
from rollflow.models.pipeline.tree import Path, built, same
from rollflow.models.text import Size, Text

SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
PROMPTS = ("a cat", "two red circles and a blue square on a table", "a dog that runs along a river")
CHECKS = (0.83, 0.31, 0.57)  # times at which the replay is compared with the pipeline, as parts of the scheduler's
AGREE = {torch.float32: 1e-4, torch.float64: 1e-6}  # relative to the largest element; other dtypes: 5e-2
DECODE_PIXELS = (2**17, 2**22)  # that the decoder takes at a time, on a CPU and on a GPU


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


@dataclass
class Space:
    """What was learned for one size.

    Attributes:
        learned: how the network is called.
        decoding: how states are decoded.
        grouped: whether texts of different lengths go into calls of their own.
        errors: by what the replay differed, by what was compared; relative to the largest element.
        shared: values of arguments that all rows of a call share, as they were met.
    """

    learned: Learned
    decoding: Decoding
    grouped: bool = False
    errors: dict[str, float] = field(default_factory=dict)
    shared: dict[Path, list[Any]] = field(default_factory=dict)
    ragged: dict[Path, tuple[int, ...]] = field(default_factory=dict)


class PipelineModel(FlowModel):
    """Drives a flow pipeline of diffusers, whose calls of its network are learned from its own code, and checked.

    For each size it runs the pipeline's `__call__` a few times with stand-ins, classifies the arguments of the network,
    learns how guidance combines its outputs and what is decoded, and compares its own velocities and pixels with the
    pipeline's at new times and prompts. The pipeline itself is left as it is.

    Args:
        pipeline: a complete pipeline whose scheduler is one of flow matching.

    Raises:
        ModelError: it is no flow pipeline, or it does something that cannot be replayed; the message says what.
    """

    def __init__(self, pipeline: Any):
        self.pipeline, self.family = pipeline, family(pipeline)
        kind = type(pipeline).__name__
        missing = [name for name in ("transformer", "vae", "scheduler") if getattr(pipeline, name, None) is None]
        if missing == ["transformer"] and getattr(pipeline, "transformer_2", None) is not None:
            missing = []
        if missing:
            raise ModelError(
                f"the pipeline {kind} lacks {', '.join(missing)}: pass a whole pipeline with a transformer"
            )
        _check_scheduler(pipeline)
        self.driver = Driver(pipeline, self.family)
        network = getattr(pipeline, self.driver.networks[0])
        self.device, self.dtype = network.device, network.dtype
        self.trainings = int(pipeline.scheduler.config.get("num_train_timesteps", 1000))
        self.inverted = bool(pipeline.scheduler.config.get("invert_sigmas", False))
        ratio = pipeline.config.get("boundary_ratio")
        self.boundary = ratio * self.trainings if ratio is not None and len(self.driver.networks) == 2 else None
        self.clip = any(name in self.driver.parameters for name in ("num_frames", "frames"))
        self.layout = Decodings()
        self.spaces: dict[Geometry, Space] = {}
        self._sizes: dict[Size, Geometry] = {}
        self._lock = threading.Lock()
        guided = "negative_prompt" in self.driver.parameters
        self.capabilities = Capabilities(
            companies=True, negative=guided, frames=self.clip, sized_text=True, guidance=self.driver.default_scale,
            schedule=True, signature=self._signature(),
        )  # fmt: skip

    def _signature(self) -> str:
        networks = [getattr(self.pipeline, name) for name in (*self.driver.networks, "vae")]
        return repr([(type(one).__name__, dict(one.config), str(one.dtype)) for one in networks])

    # Sizes.

    def geometry(self, height: int | None = None, width: int | None = None, frames: int | None = None) -> Geometry:
        """See `FlowModel.geometry`; what a size takes is learned when it is first asked for.

        Raises:
            RequestError: the pipeline refuses this size, or makes another one instead.
            ModelError: what it does there cannot be replayed.
        """
        size = Size(height, width, frames)
        with self._lock:
            if size not in self._sizes:
                if frames is not None and not self.clip:
                    raise RequestError(f"frames={frames}: the pipeline {self._name} makes images; leave it out")
                with torch.no_grad():
                    self._sizes[size] = self._learned(size)
            return self._sizes[size]

    @property
    def _name(self) -> str:
        return type(self.pipeline).__name__

    def _learned(self, size: Size) -> Geometry:
        texts = [Text(prompt) for prompt in PROMPTS]
        learned = learn(self.driver, size, texts[:2], self.trainings)
        outputs = random_outputs(learned.real)
        time = TIMES[0] * self.trainings
        decoding = learn_decoding(self.driver, size, texts[0], SCALES[0], time, learned.shape, outputs)
        space = Space(learned, decoding)
        geometry, state, pixels = self._whole(size, texts[0], space)
        if geometry in self.spaces:
            return geometry
        for name, asked, made in (
            ("height", size.height, geometry.height),
            ("width", size.width, geometry.width),
            ("frames", size.frames, geometry.frames),
        ):
            if asked is not None and asked != made:
                raise RequestError(
                    f"{name}={asked}: the pipeline {self._name} makes {geometry.height}x{geometry.width}"
                    + (f" with {geometry.frames} frames" if self.clip else "")
                    + " of what was asked; ask for that"
                )
        self.spaces[geometry] = space
        self.layout.of[geometry] = decoding
        try:
            own = self.decode(decoding.latents(state.float()))
            space.errors["pixels"] = float((own.cpu() - pixels.cpu()).abs().max())
            limit = TOLERANCE if self.dtype == torch.float32 else 5e-2
            if not space.errors["pixels"] <= limit:
                raise ModelError(
                    f"{self._name}: its pixels differ by {space.errors['pixels']:.2g} from those of its own decoder "
                    "alone: it does more to them, which is not known"
                )
            self._verify(size, geometry, space)
        except BaseException:
            del self.spaces[geometry], self.layout.of[geometry]
            raise
        return geometry

    def _whole(self, size: Size, text: Text, space: Space) -> tuple[Geometry, Tensor, Tensor]:
        """Lets the pipeline decode a random state; returns the size that it makes, the state and the pixels."""
        generator = torch.Generator().manual_seed(11)
        state = torch.randn(1, *space.learned.shape, generator=generator)
        script = Script(
            [TIMES[0] * self.trainings], lambda i, x: state.to(x), random_outputs(space.learned.real), decode=True
        )
        pixels = images_of(self.driver.run([text], size, SCALES[0], script), self.clip)
        numel = math.prod(space.learned.shape)
        latent = space.decoding.shape
        geometry = Geometry(
            pixels.shape[-2], pixels.shape[-1], latent[-2], latent[-1], 1, numel,
            frames=pixels.shape[1] if self.clip else None, shape=space.learned.shape,
        )  # fmt: skip
        return geometry, state.to(self.device), pixels

    def times(self, steps: int, geometry: Geometry) -> list[float]:
        """The linear times at which the pipeline itself would evaluate its network."""
        outputs = random_outputs(self.spaces[geometry].learned.real)
        size = Size(geometry.height, geometry.width, geometry.frames)
        recording = self.driver.run([Text(PROMPTS[0])], size, None, Script(None, None, outputs, calls=1, steps=steps))
        sigmas = recording.sigmas[: len(recording.timesteps)] or [t / self.trainings for t in recording.timesteps]
        return [1 - sigma if self.inverted else sigma for sigma in sigmas]

    # Texts.

    def check_prompt(self, prompt: str) -> None:
        """See `FlowModel.check_prompt`: a pipeline cuts what is too long."""

    def encode(self, prompts: Sequence[str | Text], geometry: Geometry | None = None) -> list[Conditioning]:
        """See `FlowModel.encode`; each text alone, as the pipeline itself does."""
        geometry = self.geometry() if geometry is None else geometry
        return [self._encoded(Text(one) if isinstance(one, str) else one, geometry) for one in prompts]

    def _encoded(self, text: Text, geometry: Geometry) -> Conditioning:
        space = self.spaces[geometry]
        learned = space.learned
        script = Script([TIMES[0] * self.trainings] * 2, None, random_outputs(learned.real), calls=learned.calls)
        size = Size(geometry.height, geometry.width, geometry.frames)
        calls = self.driver.run([text], size, SCALES[0], script).calls
        unconditional = None if learned.unconditional is None else self._prompt(space, calls, learned.unconditional)
        return Conditioning(self._prompt(space, calls, learned.conditional), unconditional, geometry)

    def _prompt(self, space: Space, calls: Sequence[Call], part: Part) -> Prompt:
        call = calls[part.call]
        found: dict[Path, Any] = {}
        for argument in space.learned.arguments:
            if argument.kind in ("rows", "shared", "state"):
                value = row_of(leaf(call.arguments, argument.path), argument.dim, part.block)
                found[argument.path] = self._interned(space, argument.path, value) if argument.dim is None else value
        for path, mask in _absent_masks(space):
            found[mask] = torch.ones(len(found[path]), dtype=torch.bool, device=self.device)
        return Prompt(found, self._key(space, found))

    def _interned(self, space: Space, path: Path, value: Any) -> Any:
        """The first of equal values that was met, so that equal ones are the same object."""
        known = space.shared.setdefault(path, [])
        for one in known:
            if same(one, value):
                return one
        known.append(value)
        return value

    def _key(self, space: Space, found: dict[Path, Any]) -> Hashable:
        shared = [id(found[a.path]) for a in space.learned.arguments if a.kind == "shared" and a.path in found]
        lengths = [tuple(found[path].shape) for path in space.ragged] if space.grouped else []
        return (*shared, *lengths)

    def for_request(self, conditioning: Conditioning, guidance: float) -> Conditioning:
        """The conditioning of a request with this guidance scale: without guidance, of one network row."""
        on = conditioning.unconditional is not None and self._rule(conditioning).on(guidance)
        return conditioning if on else conditioning._replace(unconditional=None)

    def company(self, conditioning: Conditioning) -> Hashable:
        """What rows of one batch have in common: guidance or none, and what their calls of the network share."""
        unconditional = conditioning.unconditional
        return conditioning.conditional.key, None if unconditional is None else unconditional.key

    def network_rows(self, conditioning: Conditioning) -> int:
        """Rows of the network that one evaluation takes."""
        return 1 if conditioning.unconditional is None else 2

    def _rule(self, conditioning: Conditioning) -> Any:
        return self.spaces[conditioning.geometry].learned.rule

    # Rows.

    def velocity(
        self,
        x: Float[Tensor, "row token channel"],
        tau: Float[Tensor, " row"],
        conditioning: Sequence[Conditioning],
        guidance: Float[Tensor, " row"],
        geometry: Geometry,
    ) -> Float[Tensor, "row token channel"]:
        """See `FlowModel.velocity`; rows with guidance take two rows of the network, in the same call."""
        space = self.spaces[geometry]
        learned = space.learned
        states = x.view(len(x), *learned.shape)
        time = self.trainings * ((1 - tau) if self.inverted else tau)
        guided = [i for i, one in enumerate(conditioning) if one.unconditional is not None]
        prompts = [one.conditional for one in conditioning]
        prompts += [one.unconditional for one in conditioning if one.unconditional is not None]
        if guided:
            index = torch.tensor([*range(len(x)), *guided], device=x.device)
            states, time, scales = states[index], time[index], guidance[index]
        else:
            scales = guidance
        output = self._outputs(space, prompts, states, time, scales)
        velocity = output[: len(x)]
        if guided:
            chosen = index[len(x) :]
            combined = learned.rule.guided(velocity[chosen], output[len(x) :], guidance[chosen])
            velocity = combined if len(guided) == len(x) else velocity.index_copy(0, chosen, combined)
        sign = -learned.sign if self.inverted else learned.sign
        return (velocity if sign == 1 else sign * velocity).reshape(x.shape).to(x.dtype)

    def _outputs(self, space: Space, prompts: Sequence[Prompt], x: Tensor, time: Tensor, scales: Tensor) -> Tensor:
        """The network's outputs, in as many calls as the rows need: mostly one."""
        networks = [0] * len(prompts)
        if self.boundary is not None:
            networks = [int(t < self.boundary) for t in time.tolist()]
        groups: dict[Hashable, list[int]] = {}
        for i, (prompt, network) in enumerate(zip(prompts, networks, strict=True)):
            groups.setdefault((network, prompt.key), []).append(i)
        if len(groups) == 1:
            return self._call(space, networks[0], prompts, x, time, scales)
        found: Tensor | None = None
        for places in groups.values():
            index = torch.tensor(places, device=x.device)
            own = [prompts[i] for i in places]
            made = self._call(space, networks[places[0]], own, x[index], time[index], scales[index])
            found = made.new_zeros(len(prompts), *made.shape[1:]) if found is None else found
            found = found.index_copy(0, index, made)
        assert found is not None
        return found

    def _call(
        self, space: Space, network: int, prompts: Sequence[Prompt], x: Tensor, time: Tensor, scales: Tensor
    ) -> Tensor:
        learned = space.learned
        found: dict[Path, Any] = {}
        for argument in learned.arguments:
            path = argument.path
            if argument.kind == "state":
                found[path] = _states(argument, [one.arguments[path] for one in prompts], x)
            elif argument.kind in ("time", "scale"):
                given = leaf(learned.like, path)
                value = argument.slope * (time if argument.kind == "time" else scales) + argument.offset
                found[path] = _numbers(argument, given, value)
            elif argument.dim is None and path not in prompts[0].arguments:
                found[path] = leaf(learned.like, path)
            elif argument.dim is None and path not in _masks_of(space):
                found[path] = prompts[0].arguments[path]
            else:
                values = [one.arguments[path] for one in prompts]
                found[path] = values if argument.dim == LIST else _stacked(values, argument.dim or 0)
        module = getattr(self.pipeline, self.driver.networks[network])
        output = module(**built(found, learned.like))
        return viewed(rows_of(output), learned.shape, learned.view)

    def decode(self, latents: Tensor) -> Tensor:
        """See `FlowModel.decode`: images, or clips [row, frame, 3, height, width]."""
        space = next(one for one in self.spaces.values() if one.decoding.shape == tuple(latents.shape[1:]))
        pixels = math.prod(latents.shape[2:]) * 64
        chunk = 1 if self.clip else max(1, DECODE_PIXELS[self.device.type == "cuda"] // pixels)
        parts = [decoded(self.pipeline.vae, space.decoding, part, self.clip) for part in latents.split(chunk)]
        return torch.cat(parts)

    # The check against the pipeline itself.

    def _verify(self, size: Size, geometry: Geometry, space: Space) -> None:
        """Compares velocities of a mixed batch with the pipeline's own, each prompt alone; else raises `ModelError`."""
        texts = [Text(prompt) for prompt in PROMPTS]
        states = torch.randn(len(texts), *space.learned.shape, generator=torch.Generator().manual_seed(5))
        scales = (SCALES[0], 1.0) if space.learned.unconditional is not None else (SCALES[0],)
        wanted = {s: [self._own(size, *one, s) for one in zip(texts, states, CHECKS, strict=True)] for s in scales}
        first = self.encode(texts, geometry)
        space.ragged = _ragged(space, first)
        space.grouped = bool(space.ragged) and not _has_mask(space)
        for attempt in (0, 1):
            known = [self._encoded(text, geometry) for text in texts]
            for scale in scales:
                error = self._error(known, states, scale, geometry, wanted[scale])
                space.errors["velocity, guided" if scale != 1.0 else "velocity"] = error
            limit = AGREE.get(self.dtype, 5e-2)
            if max(space.errors[name] for name in space.errors if name != "pixels") <= limit:
                return
            if attempt or space.grouped or not space.ragged:
                break
            space.grouped = True  # padding changes the result: texts of different lengths go apart
        found = ", ".join(f"{name} {error:.2g}" for name, error in space.errors.items())
        raise ModelError(
            f"{self._name}: the replay of its network differs from the pipeline's own results ({found}, relative to "
            "the largest element): it does something that was not learned; see `rollflow probe`"
        )

    def _own(self, size: Size, text: Text, state: Tensor, time: float, scale: float) -> Evaluation:
        t = time * self.trainings
        outputs = random_outputs(self.spaces_real(size))
        calls = [0]

        def first_fake(call: Call) -> Any:
            return None if calls[0] else outputs(call)

        def states(i: int, x: Tensor) -> Tensor:
            calls[0] += 1
            return state[None]

        return self.driver.run([text], size, scale, Script([t, t], states, first_fake)).evaluations[1]

    def spaces_real(self, size: Size) -> Call:
        """A call of the network as it was recorded for a size."""
        return next(reversed(self.spaces.values())).learned.real

    def _error(
        self, known: Sequence[Conditioning], states: Tensor, scale: float, geometry: Geometry, wanted: list[Evaluation]
    ) -> float:
        own = [self.for_request(one, scale) for one in known]
        tau = torch.tensor([1 - t if self.inverted else t for t in CHECKS], device=self.device)
        x = states.to(self.device, wanted[0].sample.dtype).view(len(states), 1, -1)
        with torch.no_grad():
            u = self.velocity(x, tau, own, torch.full((len(own),), scale, device=self.device), geometry)
        target = torch.cat([evaluation.velocity for evaluation in wanted]).reshape(u.shape).float()
        if self.inverted:
            target = -target
        return float((u.float() - target).abs().max() / target.abs().max().clamp(min=1e-6))


def _check_scheduler(pipeline: Any) -> None:
    scheduler = pipeline.scheduler
    kind, config = type(scheduler).__name__, scheduler.config
    flow = config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas", False)
    if kind not in SCHEDULERS and not (flow and hasattr(scheduler, "set_timesteps")):
        raise ModelError(
            f"the pipeline {type(pipeline).__name__} has a {kind}: its model must be one of flow matching, with "
            f"{SCHEDULERS[0]} or another scheduler in flow prediction (UniPC, DPM-Solver++); diffusion models that "
            "predict noise, and TrigFlow, are not sampled here"
        )


def _ragged(space: Space, known: Sequence[Conditioning]) -> dict[Path, tuple[int, ...]]:
    """The arguments whose shape differs from text to text."""
    found: dict[Path, tuple[int, ...]] = {}
    prompts = [one.conditional for one in known] + [one.unconditional for one in known if one.unconditional is not None]
    for argument in space.learned.arguments:
        if argument.kind == "rows" and argument.dim != LIST:
            shapes = {tuple(prompt.arguments[argument.path].shape) for prompt in prompts}
            if len(shapes) > 1:
                found[argument.path] = ()
    return found


def _has_mask(space: Space) -> bool:
    return any("mask" in str(path[-1]) for path in space.ragged) or bool(_absent_masks(space))


def _absent_masks(space: Space) -> list[tuple[Path, Path]]:
    """Ragged arguments beside which a mask is None, because alone nothing is padded; and the masks."""
    return [
        (path, mask)
        for path in space.ragged
        if (mask := (*path[:-1], f"{path[-1]}_mask")) and _is_none(space.learned, mask)
    ]


def _masks_of(space: Space) -> list[Path]:
    return [mask for _, mask in _absent_masks(space)]


def _is_none(learned: Learned, path: Path) -> bool:
    return any(argument.path == path and leaf(learned.like, path) is None for argument in learned.arguments)


def _states(argument: Argument, frames: Sequence[Any], x: Tensor) -> Any:
    """The argument that holds the states: as they are, folded, or among constants."""
    frame = frames[0]
    x = x.to(frame.dtype)
    if argument.place is None:
        rows = x.reshape(len(x), *frame.shape)
    else:
        dim, offset = argument.place
        size = x.shape[dim + 1]
        around = torch.stack(list(frames))
        left = around.narrow(dim + 1, 0, offset)
        right = around.narrow(dim + 1, offset + size, around.shape[dim + 1] - offset - size)
        rows = torch.cat([left, x, right], dim + 1)
    if argument.dim == LIST:
        return list(rows.unbind(0))
    return rows.movedim(0, argument.dim or 0)


def _numbers(argument: Argument, given: Any, value: Tensor) -> Any:
    """A time or a scale of each row, in the shape that the network has it."""
    if argument.dim == LIST:
        return list(value.unbind(0))
    if isinstance(given, Tensor):
        dtype = given.dtype if given.is_floating_point() else torch.float32
        value = value.to(dtype)
        tail = given.shape[1:] if given.ndim else ()
        return value.view(-1, *[1] * len(tail)).expand(-1, *tail) if tail else value
    return value


def _stacked(values: Sequence[Any], dim: int) -> Tensor:
    """Rows of an argument along a dimension; shorter ones are padded with zeros at their ends."""
    shapes = {tuple(value.shape) for value in values}
    if len(shapes) > 1:
        most = [max(sizes) for sizes in zip(*shapes, strict=True)]
        padded = []
        for value in values:
            whole = value.new_zeros(most)
            whole[tuple(slice(0, size) for size in value.shape)] = value
            padded.append(whole)
        values = padded
    return torch.stack(list(values), dim)


__all__ = ["Family", "PipelineModel"]
