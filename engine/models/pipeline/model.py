"""A flow pipeline of diffusers as a model: rows of different prompts, times and scales in one call of its network."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow.errors import ModelError, RequestError, shown
from rollflow.models import Capabilities, FlowModel, Geometry, acceleration, recompute
from rollflow.models.borrowed import Borrowed, networks_of
from rollflow.models.loaded import is_compiled, loaded
from rollflow.models.pipeline import memory
from rollflow.models.pipeline.decoding import TOLERANCE, Decodings, decoded, images_of, learn_decoding
from rollflow.models.pipeline.drive import NETWORKS, SCALES, Driver
from rollflow.models.pipeline.encoding import state_of
from rollflow.models.pipeline.exact import ExactTimes
from rollflow.models.pipeline.families import Family, family
from rollflow.models.pipeline.learn import TIMES, Learned, learn
from rollflow.models.pipeline.memory import Space
from rollflow.models.pipeline.outputs import random_outputs
from rollflow.models.pipeline.recorded_calls import laid_out, record, recorded_decoder
from rollflow.models.pipeline.recording import Script
from rollflow.models.pipeline.replay import Conditioning, Replay
from rollflow.models.pipeline.verify import PROMPTS, calls_of, verify
from rollflow.models.recorded import Function
from rollflow.models.text import Size, Text

SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
DECODE_PIXELS = (2**17, 2**22)  # that the decoder takes at a time, on a CPU and on a GPU
LONG = 0.2  # seconds of an evaluation from which on Python's part in it is small, and a recording takes minutes


class PipelineModel(FlowModel):
    """Drives a flow pipeline of diffusers, whose calls of its network are learned from its own code, and checked.

    For each size it runs the pipeline's `__call__` a few times with stand-ins, classifies the arguments of the network,
    learns how guidance combines its outputs and what is decoded, and compares its own velocities and pixels with the
    pipeline's at new times and prompts. The pipeline itself is left as it is. On a CPU, calls of small networks are
    recorded where they allow it, see `rollflow.models.pipeline.recorded_calls`.

    Args:
        pipeline: a complete pipeline whose scheduler is one of flow matching.
        known: what is known of its class, by default what `rollflow.models.pipeline.families` holds.
        own: the size of requests that name none, by default that of the pipeline's `__call__`.

    Attributes:
        pipeline: the pipeline.
        driver: runs it.
        spaces: what was learned, by size.

    Raises:
        ModelError: it is no flow pipeline, or it does something that cannot be replayed; the message says what.
    """

    def __init__(self, pipeline: Any, known: Family | None = None, own: Size | None = None):
        self.loaded = loaded(pipeline)
        _check(pipeline)
        self._borrowed = Borrowed(self, networks_of(pipeline).values())
        self.borrow, self.give_back = self._borrowed.borrow, self._borrowed.give_back
        self.pipeline, self.driver = pipeline, Driver(pipeline, known or family(pipeline))
        self._network = getattr(pipeline, self.driver.networks[0])
        self.device, self.dtype = self._network.device, self._network.dtype
        self.layout = Decodings()
        self.spaces: dict[Geometry, Space] = {}
        self._clip = any(name in self.driver.parameters for name in ("num_frames", "frames"))
        self._exact: ExactTimes | None = None
        self._own: Size = own or Size()
        self._sizes: dict[Size, Geometry] = {}
        self._decoders: dict[tuple[int, ...], Function] = {}
        self._lock = threading.Lock()
        self.capabilities = Capabilities(
            companies=True, negative=self.driver.negative, guides=True, frames=self._clip, sized_text=True,
            recordable=self.loaded.plain, schedule=True, images=callable(getattr(pipeline.vae, "encode", None)),
            returns=True, rounded=True, guidance=self.driver.default_scale,
            signature=repr((self._signature(), self.loaded)),
            compiled=self.loaded.compiled or is_compiled(pipeline.vae),
        )  # fmt: skip

    def _signature(self) -> str:
        """Of the networks as they come, as measurements of one count for all others of it: compiled ones cost less."""
        networks = [getattr(self.pipeline, name) for name in (*self.driver.networks, "vae")]
        return repr([(type(one).__name__, dict(one.config), str(one.dtype), is_compiled(one)) for one in networks])

    # Sizes.

    def geometry(self, height: int | None = None, width: int | None = None, frames: int | None = None) -> Geometry:
        """See `FlowModel.geometry`; what a size takes is learned when it is first asked for.

        Raises:
            RequestError: the pipeline refuses this size, or makes another one instead.
            ModelError: what it does there cannot be replayed.
        """
        asked = zip((height, width, frames), self._own, strict=True)
        size = Size(*(own if value is None else value for value, own in asked))
        if frames is not None and not self._clip:
            raise RequestError(f"frames={frames}: a {self.driver.name} makes images; leave it out")
        if (known := self._sizes.get(size)) is not None:  # nobody waits for a size that another learns
            return known
        with self._lock:
            if size not in self._sizes:
                with torch.no_grad(), self._borrowed.lent(), acceleration.eagerly():
                    space = self._remembered(size)
                self.spaces.setdefault(space.geometry, space)
                self.layout.of.setdefault(space.geometry, space.decoding)
                if space.replay.learned.unconditional is None and self.capabilities.negative:
                    self.capabilities = replace(self.capabilities, negative=False)
                self._sizes[size] = self._sizes.setdefault(_size(space.geometry), space.geometry)
            return self._sizes[size]

    def _remembered(self, size: Size) -> Space:
        """What is known of a size, from this process or from the pipeline."""
        learned, key = memory.known(self._network), memory.key(self.pipeline, self.driver.family, size)
        if key in learned:
            space = learned[key](self.driver)
        else:
            space = self._space(size)
            learned[key] = space.kept()
        self._exact = space.replay.exact
        return space

    def _space(self, size: Size) -> Space:
        """Learns a size, and checks what was learned."""
        text = Text(PROMPTS[0])
        learned = learn(self.driver, size, [Text(prompt) for prompt in PROMPTS[:2]])
        decoding = learn_decoding(self.driver, size, text, learned)
        state, pixels = self._own_pixels(size, text, learned)
        latent = decoding.shape
        geometry = Geometry(
            pixels.shape[-2], pixels.shape[-1], latent[-2], latent[-1], 1, math.prod(learned.shape),
            frames=pixels.shape[1] if self._clip else None, shape=learned.shape,
        )  # fmt: skip
        self._check_size(size, geometry)
        replay = Replay(learned, self.driver, self._exact)
        if not self.driver.exact and self._exact is None:
            replay.exact = ExactTimes()
            conditioning = replay.conditioning(calls_of(self.driver, replay, text, size), geometry)
            replay.learn_times(conditioning.conditional)
        made = decoded(self.pipeline.vae, decoding, decoding.latents(state.to(self.device).float()), self._clip)
        error = float((made.cpu() - pixels.cpu()).abs().max())
        precise = self.driver.exact and decoding.dtype in (torch.float32, torch.float64)
        if not error <= TOLERANCE[precise]:
            raise ModelError(
                f"{self.driver.name}: its pixels differ by {error:.2g} from those of its decoder alone: it does more "
                "to them, which is not known"
            )
        errors = verify(self.driver, replay, size, geometry)
        return Space(geometry, replay, decoding, {**errors, "pixels": error})

    def _own_pixels(self, size: Size, text: Text, learned: Learned) -> tuple[Tensor, Tensor]:
        """A random state, and what the pipeline makes of it."""
        state = torch.randn(1, *learned.shape, generator=torch.Generator().manual_seed(11))
        times = [TIMES[self.driver.exact][0] * self.driver.clock.span]
        script = Script(times, lambda i, x: state.to(x), random_outputs(learned.real), decode=True)
        return state, images_of(self.driver.run([text], size, SCALES[0], script), self._clip)

    def _check_size(self, size: Size, geometry: Geometry) -> None:
        for name, asked in size._asdict().items():
            if asked is not None and asked != getattr(geometry, name):
                raise RequestError(
                    f"{name}={asked}: the pipeline {self.driver.name} makes {geometry} of what was asked; ask for that"
                )

    def times(self, steps: int, geometry: Geometry) -> list[float]:
        """The linear times at which the pipeline itself would evaluate its network."""
        outputs = random_outputs(self.spaces[geometry].replay.learned.real)
        script = Script(None, None, outputs, calls=1, steps=steps)
        with self._borrowed.lent():
            recording = self.driver.run([Text(PROMPTS[0])], _size(geometry), None, script)
        clock, count = self.driver.clock, len(recording.timesteps)
        sigmas = recording.sigmas[:count] or [time / clock.span for time in recording.timesteps]
        return [*dict.fromkeys(1 - sigma if clock.inverted else sigma for sigma in sigmas)]

    # Texts and images.

    def check_prompt(self, prompt: str) -> None:
        """See `FlowModel.check_prompt`: a pipeline cuts what is too long."""

    def encode(self, prompts: Sequence[str | Text], geometry: Geometry | None = None) -> list[Conditioning]:
        """See `FlowModel.encode`; each text alone, as the pipeline itself does, for one size.

        Raises:
            RequestError: a negative prompt, and there is no classifier-free guidance.
        """
        geometry = self.geometry() if geometry is None else geometry
        with self._borrowed.lent():
            return [self._encoded(Text(one) if isinstance(one, str) else one, geometry) for one in prompts]

    def _encoded(self, text: Text, geometry: Geometry) -> Conditioning:
        replay = self.spaces[geometry].replay
        if text.negative is not None and not self.capabilities.negative:
            raise RequestError(
                f"negative={shown(text.negative)}: {self.driver.name} has no classifier-free guidance that would lead "
                "away from it; leave it out"
            )
        return replay.conditioning(calls_of(self.driver, replay, text, _size(geometry)), geometry)

    def guides(self, guidance: float, geometry: Geometry) -> bool:
        """Whether a request with this scale is led away from its negative prompt."""
        learned = self.spaces[geometry].replay.learned
        return learned.unconditional is not None and learned.rule.on(guidance)

    def for_request(self, conditioning: Conditioning, guidance: float) -> Conditioning:
        """The conditioning of a request with this guidance scale: without guidance, of one network row."""
        on = self.guides(guidance, conditioning.geometry)
        return conditioning if on else conditioning._replace(unconditional=None)

    def company(self, conditioning: Conditioning) -> Hashable:
        """What rows of one batch have in common: guidance or none, and what their calls of the network share."""
        unconditional = conditioning.unconditional
        return conditioning.conditional.key, None if unconditional is None else unconditional.key

    def network_rows(self, conditioning: Conditioning) -> int:
        """Rows of the network that one evaluation takes."""
        return 1 if conditioning.unconditional is None else 2

    def state(
        self, image: Float[Tensor, "*frame 3 height width"], geometry: Geometry
    ) -> Float[Tensor, "token channel"]:
        """The clean state of an image [3, height, width] or clip [frame, 3, height, width] in [0, 1].

        Raises:
            ModelError: the autoencoder cannot encode.
        """
        with self._borrowed.lent():
            flat = state_of(self.pipeline.vae, self.spaces[geometry].decoding, image)
        return flat.view(geometry.token, geometry.channel)

    # Rows.

    def record(self, geometry: Geometry, conditioning: Conditioning) -> None:
        """Records the network's calls of a size and the decoder of images, for a CPU; see `recorded_calls`."""
        space = self.spaces[geometry]
        texts, shape = [conditioning, *self.encode(PROMPTS, geometry)], space.decoding.shape
        x, one = torch.zeros(1, geometry.token, geometry.channel, dtype=self.dtype), torch.ones(1)
        with torch.no_grad(), self._borrowed.lent():
            start = time.perf_counter()
            self.velocity(x, one, [conditioning], one, geometry)
            if time.perf_counter() - start > LONG:
                return
            record(space.replay, texts)
            if not self._clip and shape not in self._decoders:
                self._decoders[shape] = recorded_decoder(self.pipeline.vae, space.decoding, self.dtype)

    def velocity(
        self,
        x: Float[Tensor, "row token channel"],
        tau: Float[Tensor, " row"],
        conditioning: Sequence[Conditioning],
        guidance: Float[Tensor, " row"],
        geometry: Geometry,
    ) -> Float[Tensor, "row token channel"]:
        """See `FlowModel.velocity`; rows with guidance take two rows of the network, in the same call."""
        with self._borrowed.lent():
            return self.spaces[geometry].replay.velocity(x, tau, conditioning, guidance)

    def decode(self, latents: Float[Tensor, "row ..."]) -> Float[Tensor, "row *frame 3 h w"]:
        """See `FlowModel.decode`: images, or clips [row, frame, 3, height, width]."""
        decoding = next(one for one in [*self.layout.of.values()] if one.shape == tuple(latents.shape[1:]))
        pixels = math.prod(latents.shape[2:]) * 64
        chunk = 1 if self._clip or recompute.active() else max(1, DECODE_PIXELS[self.device.type == "cuda"] // pixels)
        latents = laid_out(latents)
        recorded = None if torch.is_grad_enabled() else self._decoders.get(decoding.shape)
        decode = recorded or partial(decoded, self.pipeline.vae, decoding, clip=self._clip)
        with self._borrowed.lent():
            return torch.cat([decode(part) for part in latents.split(chunk)])


def _size(geometry: Geometry) -> Size:
    return Size(geometry.height, geometry.width, geometry.frames)


def _check(pipeline: Any) -> None:
    """Refuses what is no whole flow pipeline."""
    kind = type(pipeline).__name__
    scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is not None:
        prediction, sigmas = (scheduler.config.get(name) for name in ("prediction_type", "use_flow_sigmas"))
        if type(scheduler).__name__ not in SCHEDULERS and not (prediction == "flow_prediction" and sigmas):
            raise ModelError(
                f"the pipeline {kind} has a {type(scheduler).__name__}: its model must be one of flow matching, with "
                f"{SCHEDULERS[0]}, or UniPC or DPM-Solver++ with prediction_type='flow_prediction' (it is "
                f"{shown(prediction)}) and use_flow_sigmas=True (it is {shown(sigmas)}); diffusion models that predict "
                "noise, and TrigFlow, are not sampled here"
            )
    missing = [name for name in ("vae", "scheduler") if getattr(pipeline, name, None) is None]
    if all(getattr(pipeline, name, None) is None for name in NETWORKS):
        missing.insert(0, "transformer")
    if missing:
        raise ModelError(f"the pipeline {kind} lacks {', '.join(missing)}: pass a whole pipeline with a transformer")
