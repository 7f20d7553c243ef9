"""`rollflow probe`: what is learned of a pipeline, argument by argument, and by how much its replay differs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from rollflow.cli.options import File, Place, Size
from rollflow.errors import ModelError

PROMPT = "a cat that sits on a red table"
STEPS = 20  # of its own times, of a pipeline that has no default


@dataclass(frozen=True)
class Probe:
    """Show what is learned of a pipeline, and by how much its replay differs from the pipeline itself.

    It runs the pipeline a few times with stand-ins, at one size. A pipeline that cannot be used is told how far it got
    and why, and the exit code is 1.
    """

    height: Size = None
    """Image height in pixels."""
    width: Size = None
    """Image width in pixels."""
    frames: Size = None
    """Frames of a clip, of a model of video."""
    prompt: str = PROMPT
    """A prompt, of which the shapes of the text's arguments are shown."""
    json: File = None
    """A file for all of it."""
    place: Place = field(default_factory=Place)

    def __call__(self) -> int:
        """Runs the command; returns 1 for a pipeline that is refused."""
        from rollflow.bench import outputs
        from rollflow.cli.reports import print_probe
        from rollflow.models import loading

        self.place.check()
        outputs.check_file(self.json)
        device, dtype = self.place.placed()
        pipeline = loading.load(self.place.model, device, dtype, self.place.pipeline)
        found = {"model": self.place.model, "dtype": str(dtype).removeprefix("torch."), **self.of(pipeline)}
        if self.json is not None:
            self.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print_probe(found)
        return 1 if found["refused"] else 0

    def of(self, pipeline: Any) -> dict[str, Any]:
        """What is learned of a pipeline; "refused" says why it cannot be used, or is None.

        Raises:
            RequestError: the pipeline does not make this size.
        """
        from rollflow.cli import sizes
        from rollflow.models import own_size
        from rollflow.models.pipeline import PipelineModel
        from rollflow.models.text import Size as Asked

        own = own_size(self.place.model)
        found: dict[str, Any] = {"pipeline": type(pipeline).__name__, "scheduler": type(pipeline.scheduler).__name__}
        try:
            model = PipelineModel(pipeline, own=own)
        except ModelError as error:
            return {**found, "reached": "nothing of it was run", "refused": str(error)}
        found["networks"] = [type(getattr(pipeline, name)).__name__ for name in model.driver.networks]
        size = Asked(self.height, self.width, self.frames)
        sizes.tell(model, size, own)
        try:
            geometry = model.geometry(*size)
        except ModelError as error:  # a RequestError is of the size
            return {**found, **_partly(model, size), "refused": str(error)}
        return {**found, **self._whole(model, geometry), "reached": "all of it was checked", "refused": None}

    def _whole(self, model: Any, geometry: Any) -> dict[str, Any]:
        """Of a pipeline that can be used."""
        from rollflow.cli import learned

        space, parameters = model.spaces[geometry], model.driver.parameters
        known = space.replay.learned
        (conditioning,) = model.encode([self.prompt], geometry)
        steps = getattr(parameters.get("num_inference_steps"), "default", None)
        steps = steps if isinstance(steps, int) else STEPS
        return {
            "size": learned.size(geometry),
            **learned.calls(known, conditioning.conditional.arguments, space.replay.masks),
            "guidance": learned.guidance(known, model.capabilities.guidance),
            "text": learned.text(space.replay),
            "latents": learned.latents(space.decoding, known.shape),
            "second_network_below": _boundary(model),
            "steps": steps,
            "times": model.times(steps, geometry),
            "errors": dict(space.errors),
        }


def _boundary(model: Any) -> float | None:
    """The scheduler's time below which a second network takes over."""
    ratio = model.pipeline.config.get("boundary_ratio") if len(model.driver.networks) == 2 else None
    return None if ratio is None else ratio * model.driver.clock.span


def _partly(model: Any, size: Any) -> dict[str, Any]:
    """How far a refused pipeline gets."""
    from rollflow.cli import learned
    from rollflow.models.pipeline.decoding import learn_decoding
    from rollflow.models.pipeline.learn import learn
    from rollflow.models.pipeline.verify import PROMPTS
    from rollflow.models.text import Text

    texts = [Text(prompt) for prompt in PROMPTS[:2]]
    try:
        known = learn(model.driver, size, texts)
    except ModelError:
        return {"reached": "how it calls its network was not learned"}
    found = {**learned.calls(known), "guidance": learned.guidance(known, model.capabilities.guidance)}
    try:
        decoding = learn_decoding(model.driver, size, texts[0], known)
    except ModelError:
        return {**found, "reached": "how it calls its network was learned; what it decodes was not"}
    latents = learned.latents(decoding, known.shape)
    return {**found, "latents": latents, "reached": "everything was learned; the check of it failed"}
